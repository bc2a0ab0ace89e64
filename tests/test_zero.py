"""ZeRO: every stage computes what one process computes, holds and sends what the formulas say, and fails loudly."""
import collections
import contextlib
import copy
import datetime
import errno
import functools
import gc
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from ranks import RankFailed, ranks
from torch.multiprocessing.reductions import StorageWeakRef

from bench import zero as bench_zero
from lib import collectives as zero_tools
from lib.program import UserError
from lib.ranks import Ranks, setup
from model import GPT, GPTConfig, generate, initialise
from zero import Unit, Zero, data_parallel_step

STEPS, LR, DECAY, CLIP = 2, 1e-2, 0.1, 0.5


@pytest.fixture(autouse=True)
def one_thread():
    """Matrix products split over threads differ in the last bit; the ranks have one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lively(model, seed=0):
    """Nothing is zero: at birth the blocks of a GPT are the identity and their gradients would hide every mistake."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator).to(p.dtype)
    return model


def gpt(tied=False, seed=0):
    config = GPTConfig(vocab_size=33, n_layer=2, n_head=2, n_embd=16, max_seq_len=12, tie_embeddings=tied)
    return lively(GPT(config, seed=seed), seed)


class HalfUsed(nn.Linear):
    """Uses its bias now and then."""

    def forward(self, x, whole):
        return F.linear(x, self.weight, self.bias if whole else None)


class Odd(nn.Module):
    """All that is awkward: a scalar parameter, a block smaller than the number of ranks, one that is never used, one
    that runs twice, two that are used (or whose bias is) in every other step, a frozen matrix, a frozen block, a
    buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.gain = nn.Embedding(33, 8), nn.Parameter(torch.tensor(1.3))
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(3, 5), nn.Linear(8, 8),
                                     nn.Linear(8, 8), HalfUsed(8, 8), nn.Linear(8, 8)])
        self.tiny = nn.ModuleList([nn.Linear(1, 1, bias=False)])
        self.register_buffer("offset", torch.tensor(0.7))
        self.blocks[3].weight.requires_grad_(False)
        self.blocks[4].requires_grad_(False)

    def units(self):
        return [self.embed, *self.blocks, *self.tiny]

    def forward(self, ids, targets):
        x = self.embed(ids) * self.gain + self.offset
        even = self.step % 2 == 0
        for block in (0, 1, 3, 0, 4, *((6,) if even else ())):  # 2 is never used, 0 runs twice
            x = x + self.blocks[block](x).tanh()
        x = x + self.blocks[5](x, even).tanh()
        x = x * self.tiny[0](x[..., :1])
        return F.linear(x, torch.ones(33, 8).tril()).log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def make(kind):
    return Odd() if kind == "odd" else gpt(tied=kind == "tied")


def batches(world, k, steps=STEPS):
    """ids (steps, world, k, 2, 13): what each rank sees in each micro-batch of each step."""
    return torch.randint(0, 33, (steps, world, k, 2, 13), generator=torch.Generator().manual_seed(world * 10 + k))


def loss_of(model, ids, count):
    return -model(ids[:, :-1], ids[:, 1:]).sum() / count


# ---- the oracle: one process, the plain model, gradients added in a known order -------------------------------------

def one_process(kind, data, stage, clip=CLIP):
    """Train the plain model on all ranks' micro-batches. Stage 1 sums over micro-batches first, then over ranks;
    stages 2 and 3 the other way round. Returns (state_dict, norms)."""
    model = make(kind)
    named = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in named if p.dim() >= 2], "weight_decay": DECAY},
              {"params": [p for p in named if p.dim() < 2], "weight_decay": 0.0}]
    optimizer, norms = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, fused=True), []
    for model.step, step in enumerate(data):
        world, k = step.shape[:2]
        grads = {(r, m): torch.autograd.grad(loss_of(model, step[r, m], world * k * 24), named, allow_unused=True)
                 for r, m in itertools.product(range(world), range(k))}
        for i, p in enumerate(named):
            rows = [[grads[r, m][i] for m in range(k)] for r in range(world)]
            rows = rows if stage == 1 else zip(*rows)
            unused = grads[0, 0][i] is None
            p.grad = torch.zeros_like(p) if unused else functools.reduce(
                torch.add, (functools.reduce(torch.add, row) for row in rows))
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in named))
        norms.append(norm)
        if clip and norm > clip:
            for p in named:
                p.grad.div_(torch.tensor((norm + 1e-6) / clip))  # float32, as fused AdamW takes it
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, norms


def sharded(kind, data, stage, clip=CLIP, **options):
    """The same by the ranks of this job. Returns (state_dict, on rank 0; norms; bytes sent)."""
    model = make(kind)
    z = Zero(model, units=model.units(), stage=stage, lr=LR, weight_decay=DECAY, **options)
    norms = []
    for model.step, step in enumerate(data):
        for ids in step[z.comm.rank]:
            z.backward(loss_of(model, ids, step.shape[0] * step.shape[1] * 24))
        norms.append(z.step(LR, clip).norm)
    return z.full_state_dict(), norms, dict(z.comm.sent)


def many(cases):
    """Several sharded() runs in one job."""
    return [sharded(*args, **options) for args, options in cases]


def near(state, expected, tolerance):
    return all((state[name] - expected[name]).abs().max() <= tolerance for name in expected)


def assert_equal(state, expected, label=""):
    assert state.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(state[name], expected[name])]
    assert not differing, (label, differing)


# ---- 1, 2: equal to one process -------------------------------------------------------------------------------------

@pytest.mark.parametrize("world", [2, 3])
def test_stages_are_bitwise_one_process(world):
    """Stages 1-3, k = 1..3 micro-batches, tied and untied, recomputation on and off: after two clipped steps the
    weights are bit for bit those of one process that adds the same gradients in the same order; the fp64 norms agree
    to 1e-12."""
    cases = [((kind, batches(world, k), stage), {"activation_checkpointing": recompute})
             for kind in ("tied", "untied") for k in (1, 2, 3) for stage in (1, 2, 3) for recompute in (False, True)]
    answers = ranks().run(world, many, cases)
    oracle = functools.lru_cache(lambda kind, k, first: one_process(kind, batches(world, k), 1 if first else 2))
    for ((kind, data, stage), options), (state, norms, _) in zip(cases, answers[0]):
        expected, expected_norms = oracle(kind, data.shape[2], stage == 1)
        label = (world, kind, data.shape[2], stage, options)
        assert norms == pytest.approx(expected_norms, rel=1e-12), label
        assert min(norms) > CLIP  # so that clipping is part of what is compared
        assert_equal(state, expected, label)
    assert all([norms for _, norms, _ in other] == [norms for _, norms, _ in answers[0]] for other in answers)


def test_stage_0_and_one_rank():
    """Stage 0 on 3 ranks equals one process to 1e-6 (gloo's ring adds in its own order); on one rank every stage,
    without torch.distributed, is bitwise the plain loop."""
    (state, norms, _), *_ = ranks().run(3, many, [(("untied", batches(3, 2), 0), {})])[0]
    expected, expected_norms = one_process("untied", batches(3, 2), 1)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert near(state, expected, 2e-6)
    for stage in (0, 1, 2, 3):
        for k in (1, 2):
            expected, _ = one_process("tied", batches(1, k), 1)
            assert_equal(sharded("tied", batches(1, k), stage)[0], expected, stage)


def ten_lines(data):
    """zero.data_parallel_step on a plain model, per rank one row of micro-batches."""
    model, norms = gpt(), []
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}],
                                  lr=LR, betas=(0.9, 0.95), fused=True)
    for step in data:
        for ids in step[dist.get_rank()]:
            loss_of(model, ids, step.shape[0] * step.shape[1] * 24).backward()
        norms.append(data_parallel_step(model, optimizer, CLIP))
    return model.state_dict(), norms


def test_all_stages_equal_the_ten_lines():
    """Stages 0-3 on 3 ranks compute what data_parallel_step does, the plain all-reduce that stands first in zero.py."""
    data = batches(3, 2)
    expected, expected_norms = ranks().run(3, ten_lines, data)[0]
    for state, norms, _ in ranks().run(3, many, [(("untied", data, stage), {}) for stage in (0, 1, 2, 3)])[0]:
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        assert near(state, expected, 2e-6)


def test_overlap_and_offload_change_no_bit():
    """Prefetch and asynchronous reduce, optimizer, parameters, activations and moments elsewhere than on the device:
    the same bits at every stage, with recomputation and without."""
    data = batches(2, 2)
    variants = [{}, {"overlap": True}, {"offload": ("optim",)}, {"offload": ("acts",)}, {"offload": ("optim", "disk")},
                {"offload": ("optim", "acts"), "activation_checkpointing": True, "overlap": True}]
    cases = [(("untied", data, stage), options) for stage in (0, 1, 2, 3) for options in variants]
    cases += [(("untied", data, 3), {"offload": ("optim", "params")}),
              (("untied", data, 3), {"offload": ("optim", "params", "acts"), "overlap": True})]
    first = {}
    with mock.patch.object(zero_tools, "PARK_BYTES", 0):
        answers = ranks().run(2, many_with_small_parking, cases)[0]
    for ((_, _, stage), options), (state, norms, sent) in zip(cases, answers):
        expected = first.setdefault(stage, (state, norms, sent))
        assert_equal(state, expected[0], (stage, options))
        assert (norms, sent) == expected[1:], (stage, options)


def many_with_small_parking(cases):
    with mock.patch.object(zero_tools, "PARK_BYTES", 64):  # the activations of these models are small
        return many(cases)


def compiled(backend, function, *args):
    """function(*args) with a torch.compile that has no code generator: `backend` runs PyTorch's own kernels."""
    torch._dynamo.reset()
    real = torch.compile
    with mock.patch.object(torch, "compile", lambda f: real(f, backend=backend)):
        return function(*args)


def test_compiled_blocks():
    """torch.compile of the blocks (here without its code generator) changes no bit, on one rank and on two."""
    cases = [(("untied", batches(world, 2), stage), {"compile": True, "activation_checkpointing": recompute})
             for world, stage, recompute in ((1, 0, False), (1, 0, True), (1, 3, False), (1, 3, True), (2, 3, True))]
    answers = compiled("aot_eager", many, cases[:4]) + ranks().run(2, compiled, "aot_eager", many, cases[4:])[0]
    for ((kind, data, stage), options), (state, norms, _) in zip(cases, answers):
        expected, expected_norms = one_process(kind, data, 2)
        assert norms == pytest.approx(expected_norms, rel=1e-12)
        assert_equal(state, expected, (len(data[0]), stage, options))


def use_two_models():
    """Blocks of two widths, trained and evaluated, with rows of two lengths, plain and packed."""
    for width in (16, 32):
        model = GPT(GPTConfig(vocab_size=33, n_layer=1, n_head=2, n_embd=width, max_seq_len=12))
        z = Zero(model, units=model.units(), compile=True)
        for ids in (torch.ones(2, 12, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)):
            for segment_ids in (None, (torch.arange(ids.shape[1]) // 5).expand_as(ids)):
                z.backward(model(ids, ids, segment_ids=segment_ids).sum())
                with torch.no_grad():
                    model(ids, ids, segment_ids=segment_ids)
    return dict(torch._dynamo.utils.counters["frames"])


def test_all_models_of_a_script_stay_compiled():
    """The blocks of several models are one function to torch.compile: none runs uncompiled because the others have
    used up its variants."""
    frames = compiled("eager", use_two_models)
    assert frames["total"] == frames["ok"] > 8


def test_compile_compiles_the_blocks_and_them_alone():
    """compile=True hands each block's forward to torch.compile and runs what it gives back; off: nothing."""
    for flag in (False, True):
        ran, model = [], gpt()
        with mock.patch.object(torch, "compile", lambda f, ran=ran: lambda *a, **k: ran.append(f) or f(*a, **k)):
            Zero(model, units=model.units(), compile=flag)
            model(torch.arange(4)[None])
        assert ran == ([type(block).forward.__get__(block) for block in model.blocks] if flag else [])


def watched_collectives(overlap):
    """Per collective of a backward: (name, asynchronous?); and after each reduce whether one is still under way."""
    model, calls, under_way = gpt(), [], []
    z = Zero(model, units=model.units(), stage=3, overlap=overlap)
    real_call, real_reduce = zero_tools.Comm.call, Unit.reduce
    with mock.patch.object(zero_tools.Comm, "call", lambda comm, kind, *a, later=False: calls.append((kind, later))
                           or real_call(comm, kind, *a, later=later)), \
            mock.patch.object(Unit, "reduce", lambda *a: real_reduce(*a) or under_way.append(bool(z.comm.under_way))):
        z.backward(loss_of(model, batches(2, 1)[0, z.comm.rank, 0], 48))
        z.backward(loss_of(model, batches(2, 1)[0, z.comm.rank, 0], 48))
    return calls, under_way, bool(z.comm.under_way)


def test_overlap_overlaps():
    """With overlap every reduce is asynchronous and one is under way while backward goes on; the first micro-batch
    learns the order of the units, from the second on all are gathered ahead but those that nothing precedes. Without,
    nothing of that. After backward nothing is under way."""
    for overlap in (False, True):
        calls, under_way, after = ranks().run(2, watched_collectives, overlap)[0]
        reduces, gathers = ([later for kind, later in calls if kind.startswith(name)] for name in ("reduce", "all_g"))
        assert len(reduces) == 10 and set(reduces) == set(under_way) == {overlap} and not after
        learnt = [False, *4 * [overlap], False, *2 * [overlap]]  # root, embed, two blocks, head; head, two blocks
        assert gathers == 8 * [False] + learnt


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_compute_dtypes(dtype):
    """16-bit compute: weights and activations are 16-bit, masters and gradients float32, micro-batches add in
    float32; the update is near the float32 one. float64 keeps everything wide. All stages agree bitwise with each
    other at k = 1."""
    states = ranks().run(2, dtype_case, dtype)[0]
    expected, _ = one_process("untied", batches(2, 1), 2)
    for state in states:
        assert_equal(state, states[0])
        assert {value.dtype for value in state.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
        for name in expected:  # AdamW moves by about LR a step whatever the gradient's size, and signs may differ
            error = (state[name] - expected[name]).abs()
            assert error.mean() < LR / 4 and error.max() < 4.1 * LR, name
            assert dtype != torch.float64 or error.max() < 1e-5, name


def dtype_case(dtype):
    states = []
    for stage in (1, 2, 3):
        model = gpt()
        z = Zero(model, units=model.units(), stage=stage, lr=LR, weight_decay=DECAY, dtype=dtype)
        for step in batches(2, 1):
            logp = model(step[z.comm.rank, 0, :, :-1], step[z.comm.rank, 0, :, 1:])
            assert logp.dtype == z.wide
            z.backward(-logp.sum() / 48)
            assert not z.step(LR, CLIP).skipped
        with z.gathered():
            assert model.blocks[0].mlp.up.weight.dtype == model(step[0, 0, :, :12]).dtype == dtype
        states.append(z.full_state_dict())
    return states


def test_sixteen_bit_gradients_add_in_float32():
    """256 micro-batches of a gradient of 1 in bfloat16 sum to 256; a bfloat16 accumulator would stop at 256 only by
    luck, and adding 1 + 2^-7 there would lose the small part."""
    for stage in (0, 2):
        model = nn.Sequential(nn.Linear(1, 1, bias=False))
        z = Zero(model, units=[model[0]], stage=stage, dtype=torch.bfloat16)
        for _ in range(300):
            z.backward(model(torch.full((1, 1), 1 + 2**-7, dtype=torch.bfloat16)).sum())
        assert z.step(0.0).norm == 300 * (1 + 2**-7)


# ---- 3: the tests can fail ------------------------------------------------------------------------------------------

def lose_one_gradient(z_unit, gradients, original=Unit.reduce):
    original(z_unit, [None] * len(gradients) if z_unit.name == "blocks.0" and dist.get_rank() == 1 else gradients)


def swap_chunks(comm, x, deliver, original=zero_tools.Comm.reduce_scatter):
    original(comm, x.view(comm.world, -1).flip(0).flatten(), deliver)


def shift_by_one(comm, x, deliver, original=zero_tools.Comm.reduce_scatter):
    original(comm, x.roll(1), deliver)


def divide_twice(z, loss, original=Zero.backward):
    original(z, loss / 2)


def stale_weights(unit, original=Unit.fetch):
    if not hasattr(unit, "stale"):
        unit.stale = original(unit).clone()
    return unit.stale


def forget_publish(unit):
    pass


def local_norm_only(comm, x, original=zero_tools.Comm.all_reduce):
    if x.dtype != torch.float64:
        original(comm, x)


def decay_everything(parameters, frozen, original=zero_tools.take_out):
    slots, values, trainable, decaying = original(parameters, frozen)
    return slots, values, trainable, trainable


SEEDED_BUGS = [(Unit, "reduce", lose_one_gradient, (1, 2, 3)),
               (zero_tools.Comm, "reduce_scatter", swap_chunks, (1, 2, 3)),
               (zero_tools.Comm, "reduce_scatter", shift_by_one, (1, 2, 3)),
               (Zero, "backward", divide_twice, (1, 2, 3)),
               (Unit, "fetch", stale_weights, (3,)),
               (Unit, "publish", forget_publish, (1, 2)),
               (zero_tools.Comm, "all_reduce", local_norm_only, (1, 2, 3)),
               (zero_tools, "take_out", decay_everything, (1, 2, 3))]


def with_bug(i, stage):
    owner, name, bug, _ = SEEDED_BUGS[i]
    with mock.patch.object(owner, name, bug):
        state, _, _ = sharded("untied", batches(2, 1), stage)
    return state


def test_seeded_bugs_turn_the_comparison_red():
    """A lost gradient, swapped or shifted chunks, dividing twice, stale weights, a forgotten publish, a local norm,
    decay of the norms: each makes the comparison of group 1 fail."""
    jobs = [(i, stage) for i, (*_, stages) in enumerate(SEEDED_BUGS) for stage in stages]
    expected, _ = one_process("untied", batches(2, 1), 2)
    assert_equal(sharded_by_two(), expected)
    for (i, stage), state in zip(jobs, ranks().run(2, with_bugs, jobs)[0]):
        with pytest.raises(AssertionError):
            assert_equal(state, expected)
            print("survived:", SEEDED_BUGS[i][2].__name__, stage)


def sharded_by_two():
    return ranks().run(2, many, [(("untied", batches(2, 1), 3), {})])[0][0][0]


def with_bugs(jobs):
    return [with_bug(*job) for job in jobs]


# ---- 4, 5: bytes ----------------------------------------------------------------------------------------------------

def padded(model, world):
    """Elements of each unit's flat vector, from the documented rule alone: parameters aligned to 16, shards as well."""
    def up(n):
        return -(-n // 16) * 16

    units = {name: 0 for name in ("embed", "blocks.0", "blocks.1", "head", "root")}
    for name, p in model.named_parameters():
        home = next((unit for unit in units if name.startswith(unit + ".")), "root")
        units[home] += up(p.numel())
    return {name: world * up(-(-n // world)) for name, n in units.items()}


def count_bytes(kind, stage, k, options):
    model = make(kind)
    z = Zero(model, units=model.units(), stage=stage, **options)
    held, born = [zero_tools.held(z), zero_tools.held_by_formula(z)], z.comm.sent.pop("broadcast", 0)
    assert born == (z.comm.world - 1) * 4 * sum(padded(make(kind), z.comm.world).values()) // z.comm.world
    for ids in batches(z.comm.world, k)[0, z.comm.rank]:
        z.backward(loss_of(model, ids, 1))
        alive = alive_after(z)
    z.step(LR, CLIP)
    return held, dict(z.comm.sent), zero_tools.sent_by_formula(z, k), dict(z.memory.peak), alive, zero_tools.held(z)


def alive_after(z, seconds=2.0):
    """Kinds of the temporaries that are alive; gloo's worker thread may hold one for a moment."""
    end = time.monotonic() + seconds
    while (alive := [kind for kind, ref, *_ in z.memory.alive if not ref.expired()]) and time.monotonic() < end:
        time.sleep(0.01)
    return alive


def count_all_bytes(jobs):
    return [count_bytes(*job) for job in jobs]


@pytest.mark.parametrize("world", [2, 3])
def test_bytes_held_and_sent_are_the_formulas(world):
    """Counted over storages and collectives: exactly the table at the head of zero.py, here written down once more by
    hand; no temporary stays alive after backward."""
    jobs = [("untied", stage, k, options) for stage in (0, 1, 2, 3) for k in (1, 2)
            for options in ({}, {"dtype": torch.bfloat16}, {"overlap": True}, {"offload": ("optim",)},
                            {"activation_checkpointing": True})]
    sizes = padded(gpt(), world)
    total, N = sum(sizes.values()), world
    for (_, stage, k, options), answer in zip(jobs, ranks().run(world, count_all_bytes, jobs)[0]):
        held, sent, sent_formula, peak, alive, held_after = answer
        p, label = 2 if "dtype" in options else 4, (stage, k, options)
        part = total if stage == 0 else total // N
        weights = total * p if stage < 3 else part * p if "offload" in options else 0
        masters = part * 4 if stage == 3 or p != 4 or "offload" in options else 0
        grads = 4 * (total if stage < 2 else part) + (4 * part if stage < 2 and "offload" in options else 0)
        by_hand = {"weights": weights, "gradients": grads, "masters": masters}
        assert {kind: held[0][kind] for kind in by_hand} == by_hand, label
        assert held[0]["moments"] <= 8 * part and held[0]["moments"] >= 8 * part - 8 * 16 * N * 5, label
        assert held[0] == held[1] == held_after, label
        once = sizes["root"] + sizes["embed"]
        rest = N - 1  # a rank sends its part of everything to so many others
        wire = {0: {"all_reduce": 2 * 4 * total // N * rest},
                1: {"reduce_scatter": 4 * total // N * rest, "all_gather": p * total // N * rest},
                2: {"reduce_scatter": k * p * total // N * rest, "all_gather": p * total // N * rest},
                3: {"reduce_scatter": k * p * total // N * rest, "all_gather": k * p * (2 * total - once) // N * rest}}
        expected = wire[stage] | ({"all_reduce": 2 * (N - 1) * 8 * 5 // N} if stage else {})
        assert sent == expected, label
        assert sent_formula == expected, label
        assert alive == [], label
        assert stage < 2 or peak["reduced"] >= 2 * p * max(sizes.values()), label  # what is sent and what is received
    assert "formula" in Zero(gpt(), units=[]).report()


def test_what_was_counted_is_told():
    """The line at the end of a run: nothing before the first forward, then every counter that moved."""
    model = gpt()
    z = Zero(model, units=model.units(), stage=3)
    assert z.counted() == "ZeRO, rank 0: nothing sent or gathered"
    z.comm.sent.update(all_gather=3 << 20, reduce_scatter=1 << 20)
    z.memory.temporary("gathered", 1 << 19, torch.float32)
    assert z.counted() == ("ZeRO, rank 0: sent 4.0 MiB (all_gather 3.0, reduce_scatter 1.0); "
                           "temporaries' peak 2.0 MiB (gathered 2.0)")


def test_peak_of_gathered_weights():
    """At stage 3, alive at once are the root's weights and one unit's, and one unit's gradients under way; with overlap
    two; recomputed or not. (On one rank, since gloo's worker thread may hold a finished gather a moment longer.)"""
    sizes = padded(gpt(), 1)
    for overlap, recompute in itertools.product((False, True), (False, True)):
        options = {"overlap": overlap, "activation_checkpointing": recompute}
        _, _, _, peak, alive, _ = count_bytes("untied", 3, 2, options)
        assert peak["gathered"] == 4 * (sizes["root"] + sizes["blocks.0"] * (1 + overlap)) and not alive
        assert peak["reduced"] == 4 * sizes["blocks.0"] * (1 + overlap)  # N ranks: what they receive as well


class Spy(nn.Module):
    """A block that counts its forwards and remembers the storage of what happens inside."""

    def __init__(self):
        super().__init__()
        self.linear, self.forwards, self.inner = nn.Linear(64, 64), 0, None

    def forward(self, x):
        self.forwards += 1
        hidden = self.linear(x).tanh()
        self.inner = StorageWeakRef(hidden.untyped_storage())
        return x + self.linear(hidden * 2).sin()


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_checkpointing_really_drops_and_recomputes(stage, recompute):
    """With activation checkpointing each block runs twice per micro-batch and its inner activations are gone between
    forward and backward; at stage 3 weights are gathered as often as without."""
    model = nn.Sequential()
    model.blocks = nn.ModuleList(Spy() for _ in range(3))
    model.forward = lambda x: functools.reduce(lambda y, block: block(y), model.blocks, x)
    z = Zero(model, units=list(model.blocks), stage=stage, activation_checkpointing=recompute)
    fetches, real = [], Unit.start_gather
    with mock.patch.object(Unit, "start_gather", lambda unit, *a: fetches.append(unit.name) or real(unit, *a)):
        loss = model(torch.randn(4, 64)).sum()
        assert [block.inner.expired() for block in model.blocks] == [recompute] * 3
        if stage == 3:
            assert not alive_after(z)  # no weights between forward and backward
        z.backward(loss)
    assert [block.forwards for block in model.blocks] == [1 + recompute] * 3
    names = ["blocks.0", "blocks.1", "blocks.2"]
    assert fetches == ([*names, *reversed(names)] if stage == 3 else [])


@pytest.mark.parametrize("options", [{"stage": 3}, {"stage": 0, "offload": ("acts",)}])
def test_a_graph_that_is_dropped_is_freed(options):
    """A forward with gradients whose loss is thrown away (a validation without no_grad, a rejected rollout) leaves
    nothing behind: what the hooks keep for backward must not refer back to the graph that keeps it."""
    model = nn.Sequential()
    model.blocks = nn.ModuleList(Spy() for _ in range(2))
    model.forward = lambda x: model.blocks[1](model.blocks[0](x)).exp()
    Zero(model, units=list(model.blocks), **options)
    model(torch.randn(4, 64))
    assert [block.inner.expired() for block in model.blocks] == [True, True]


# ---- 7, 8: loss scale and NaN guard ---------------------------------------------------------------------------------

OVERFLOWS, GROWS = 1, 2  # of these four steps: rank 1 overflows in the one; the other is the 2000th good one in a row


def scale_case(stage):
    model = gpt()
    z = Zero(model, units=model.units(), stage=stage, dtype=torch.float16, lr=LR, weight_decay=DECAY)
    history, ids = [], batches(2, 1)[0, z.comm.rank, 0]
    for step in range(4):
        if step == GROWS:
            z.good_steps = 1999
        z.backward(loss_of(model, ids, 48) * (1e30 if step == OVERFLOWS and z.comm.rank == 1 else 1.0))
        history.append((z.step(LR, None), z.loss_scale, z.full_state_dict()))
    return history


def grad_scaler_case():
    """The same by torch.amp.GradScaler in one process: float32 masters, whose gradients are the float16 model's."""
    masters, scaler, history = gpt(), torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2000), []
    optimizer = torch.optim.AdamW([{"params": [p for p in masters.parameters() if p.dim() >= 2], "weight_decay": DECAY},
                                   {"params": [p for p in masters.parameters() if p.dim() < 2], "weight_decay": 0.0}],
                                  lr=LR, betas=(0.9, 0.95), fused=True)
    for step in range(4):
        if step == GROWS:
            scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": 1999})
        model, scale = copy.deepcopy(masters).half(), scaler.get_scale()
        optimizer.zero_grad()
        for rank, ids in enumerate(batches(2, 1)[0, :, 0]):
            loss = loss_of(model, ids, 48) * (1e30 if step == OVERFLOWS and rank == 1 else 1.0)
            for p, gradient in zip(masters.parameters(), torch.autograd.grad(scaler.scale(loss), model.parameters())):
                p.grad = gradient.float() if rank == 0 else p.grad + gradient
        scaler.unscale_(optimizer)
        norm = torch.cat([p.grad.double().flatten() for p in masters.parameters()]).norm().item()
        scaler.step(optimizer)
        scaler.update()
        history.append((norm, scale, scaler.get_scale(), copy.deepcopy(masters.state_dict())))
    return history


def test_loss_scale_is_that_of_torch():
    """As torch.amp.GradScaler in one process, bit for bit: one rank overflows, so all skip, the weights stay and the
    scale halves; the step that earns a larger scale is itself unscaled by the old one."""
    expected = grad_scaler_case()
    assert [scale for _, scale, *_ in expected] == [2.0**16, 2.0**16, 2.0**15, 2.0**16]
    for stage in (1, 2, 3):
        history, other = ranks().run(2, scale_case, stage)
        for step, ((info, scale_after, state), (norm, scale, next_scale, weights)) in enumerate(zip(history, expected)):
            assert (info.skipped, info.loss_scale, scale_after) == (step == OVERFLOWS, scale, next_scale), (stage, step)
            assert info.norm == pytest.approx(norm, rel=1e-12) or step == OVERFLOWS
            assert_equal(state, weights, (stage, step))
        assert_equal(history[OVERFLOWS][2], history[OVERFLOWS - 1][2])
        assert [str(info) for info, *_ in history] == [str(info) for info, *_ in other]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_float16_gradients_are_unscaled(stage, clip):
    """AdamW divides by the gradient's own size, which hides a scale that nobody took out again; its first moment does
    not: after a step it is a tenth of the float32 gradient."""
    found = {}
    for dtype in (torch.float16, torch.float32):
        model = gpt()
        z = Zero(model, units=model.units(), stage=stage, dtype=dtype)
        z.backward(loss_of(model, batches(1, 1)[0, 0, 0], 24))
        assert z.step(LR, clip).norm > CLIP
        found[dtype] = torch.cat([unit.exp_avg for unit in z.units])
    error = (found[torch.float16] - found[torch.float32]).norm() / found[torch.float32].norm()
    assert error < 0.02


def test_counts_behind_the_loss_scale():
    """A skipped step starts the count of good ones anew, a good one that of skipped ones; the scale stays above 1."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    z = Zero(model, units=[], dtype=torch.float16)

    def update(factor=1.0):
        z.backward(model(torch.full((1, 2), 0.1, dtype=torch.float16)).float().sum() * 0.1 * factor)
        return z.step(0.0, CLIP).skipped

    z.good_steps = 1999
    assert update(math.inf) and not update() and z.loss_scale == 2.0**15
    z.good_steps = 1999
    assert not update() and z.loss_scale == 2.0**16 and not update() and z.loss_scale == 2.0**16
    z.loss_scale = 1.0
    assert all(update(math.inf) for _ in range(19)) and z.loss_scale == 1.0
    assert not update() and all(update(math.inf) for _ in range(19))
    before, updates = z.full_state_dict(), z.updates
    assert update(0.0) and z.updates == updates  # no gradient at all: left out, but no failure: the scale may grow
    assert_equal(z.full_state_dict(), before)
    assert (z.skipped, z.good_steps) == (0, 1) and all(update(math.inf) for _ in range(19))
    with pytest.raises(UserError, match="20 steps"):
        update(math.inf)
    z.skipped = 30  # as a checkpoint may say
    with pytest.raises(UserError, match="31 steps"):
        update(math.inf)


def poison(unit, gradients, original=Unit.reduce):
    original(unit, [torch.full_like(g, torch.nan) for g in gradients] if unit.name == "blocks.1" else gradients)


def nan_case(stage, poisoned):
    model = gpt()
    z = Zero(model, units=model.units(), stage=stage)
    ids, before, infos = batches(2, 1)[0, z.comm.rank, 0], z.full_state_dict(), []
    for _ in range(poisoned):
        with mock.patch.object(Unit, "reduce", poison) if z.comm.rank == 1 else contextlib.nullcontext():
            z.backward(loss_of(model, ids, 48))
        infos.append(z.step(LR, CLIP))
    after = z.full_state_dict()
    z.backward(loss_of(model, ids, 48))
    return infos, all(torch.equal(before[k], after[k]) for k in before), z.step(LR, CLIP)


def test_one_nan_makes_all_ranks_skip():
    """A NaN in one rank's gradient of one block: every rank skips, weights and moments stay, and the next step is
    sound."""
    for stage in (0, 1, 2, 3):
        for infos, unchanged, last in ranks().run(2, nan_case, stage, 3):
            assert all(info.skipped for info in infos) and unchanged and not last.skipped and math.isfinite(last.norm)


def test_twenty_skipped_in_a_row_is_an_error():
    """The 20th step in a row that is not finite ends the run and names the unit, on all ranks."""
    with pytest.raises(RankFailed) as failure:
        ranks().run(2, nan_case, 3, 20)
    assert all("blocks.1" in text and "UserError: 20 steps" in text for _, text in failure.value.answers)


# ---- 9: a rank that dies, hangs or raises ---------------------------------------------------------------------------

def faulty(fault, where, stage):
    rank, world = dist.get_rank(), dist.get_world_size()
    env, model = Ranks(rank, world, rank, world, torch.device("cpu")), gpt()
    if where == "birth":
        strike(fault)
    z = Zero(model, units=model.units(), stage=stage, overlap=where == "backward")
    for step in range(3):
        hidden = torch.zeros(1, requires_grad=True)
        if step == 1 and where == "backward":
            hidden.register_hook(lambda _: strike(fault))
        if step == 1 and where in ("forward", "sum", "barrier"):
            strike(fault)
        if where == "sum":
            env.sum(1)
        elif where == "barrier":
            env.barrier()
        z.backward(loss_of(model, batches(2, 1)[0, 0, 0], 48) + (hidden * 0).sum())
        z.step(LR, CLIP)


def strike(fault):
    if dist.get_rank() == 1:
        {"dies": lambda: os.kill(os.getpid(), signal.SIGKILL), "hangs": lambda: time.sleep(7.5),
         "raises": lambda: 1 / 0}[fault]()


@pytest.mark.parametrize("world, fault, where, stage", [
    (3, "dies", "forward", 3), (3, "dies", "backward", 3), (3, "dies", "birth", 1), (3, "raises", "forward", 0),
    (3, "hangs", "barrier", 1), pytest.param(5, "dies", "sum", 2, marks=pytest.mark.slow)])
def test_a_lost_rank_is_named(world, fault, where, stage):
    """A rank that is killed, raises, or sleeps: the others end within the timeout, with an error that names it and no
    other, though of five ranks two are no neighbours of the lost one."""
    with pytest.raises(RankFailed) as failure:
        ranks().run(world, faulty, fault, where, stage, patience=20 if fault == "dies" else 3, timeout=40)
    for rank in {*range(world)} - {1}:
        status, text = failure.value.answers[rank]
        assert status == "error" and "LostRanks" in text and "rank 1 died, hangs or raised" in text, text


TWO_MACHINES = """
import sys
sys.path.insert(0, {root!r})
sys.path.insert(0, {root!r} + "/tests")
from lib.ranks import setup
env = setup("cpu", timeout=30)
from test_zero import batches, sharded
norms = sharded("untied", batches(2, 2), 3)[1]
if env.is_main:
    print("norms", *map(repr, norms))
env.close()
"""


@pytest.mark.slow
def test_two_agents_on_one_machine(tmp_path):
    """torchrun --nnodes 2 --rdzv_backend c10d, two agents as on two machines: the norms of one process."""
    script = tmp_path / "job.py"
    script.write_text(TWO_MACHINES.format(root=os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    options = f"--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint localhost:{port} --rdzv_id test"
    command = [sys.executable, "-m", "torch.distributed.run", *options.split(), str(script)]
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    output = "".join(agent.communicate(timeout=120)[0] for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0]
    norms = next(line.split()[1:] for line in output.splitlines() if line.startswith("norms"))
    assert [float(n) for n in norms] == pytest.approx(one_process("untied", batches(2, 2), 3)[1], rel=1e-6)


# ---- 5: as the operating system sees it --------------------------------------------------------------------------

@pytest.mark.slow  # half a minute each, and on the loopback device it must be alone
@pytest.mark.parametrize("peer, memory, wire", [("stage 0", 4, 1), ("stage 1", 3, 1), ("stage 2", 2.5, 1),
                                                ("stage 3", 2, 1.5)])
def test_bytes_as_the_operating_system_counts_them(peer, memory, wire):
    """Two ranks, growth from 4 to 12 layers in units of 4 bytes per parameter: peak resident memory and bytes on the
    loopback device follow the formulas to 3 %. (gloo's own reduce-scatter, an all-reduce in disguise, would show.)"""
    slope = bench_zero.slopes(2, peer)
    assert slope["peak"] == pytest.approx(memory, rel=0.03)
    assert slope["wire"] == pytest.approx(wire, rel=0.03)
    assert slope["held"] == pytest.approx(memory, rel=1e-3) and slope["sent"] == pytest.approx(wire, rel=1e-3)


# ---- 6: does not fit ---------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_what_fits_under_a_memory_cap():
    """Under the same RLIMIT_DATA stage 0 fails and stage 3 trains; with moments on disk a still larger model trains."""
    bench_zero.fit_table()


# ---- 11: generation -------------------------------------------------------------------------------------------------

def generation_case(stage):
    model = gpt()
    plain = gpt()
    z = Zero(model, units=model.units(), stage=stage)
    rank = z.comm.rank
    z.backward(loss_of(model, batches(3, 1)[0, rank, 0], 72))
    grads = [unit.grad.clone() for unit in z.units]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        out = model(ids)  # evaluation between backward and step
    alive = alive_after(z)
    with contextlib.suppress(ZeroDivisionError), z.gathered():
        before = z.comm.sent.copy()
        for _ in range(rank + 1):  # each rank a different number of forwards
            new = generate(model, [[1, 2, 3]], max_new_tokens=4 + rank, seeds=[rank])
        assert z.comm.sent == before
        assert not model(ids).requires_grad
        assert torch.equal(model.embed.weight, plain.embed.weight)
        for forbidden in (lambda: z.backward(torch.zeros((), requires_grad=True)), lambda: z.step(LR)):
            with pytest.raises(RuntimeError, match="gathered"):
                forbidden()
        raise ZeroDivisionError  # leaving by an exception restores
    assert torch.equal(out, plain(ids)) and not alive
    assert all(torch.equal(a, unit.grad) for a, unit in zip(grads, z.units))
    with pytest.raises(AttributeError):
        model.embed.weight  # noqa: B018
    assert new == generate(plain, [[1, 2, 3]], max_new_tokens=4 + rank, seeds=[rank])
    return z.step(LR, CLIP).norm


def test_generation_with_ragged_lengths():
    """gathered(): no collective inside, so ranks may generate different lengths; the same tokens as the plain model;
    backward and step are refused; an exception restores; evaluation outside leaves gradients alone and frees what it
    gathered."""
    for stage in (0, 3):
        assert len(set(ranks().run(3, generation_case, stage))) == 1


def test_gathered_gathers_each_unit_once():
    """With overlap too: no unit is gathered ahead, gathers leave nothing pending, and the order of the units is not the
    one to learn for training."""
    model = gpt()
    z = Zero(model, units=model.units(), stage=3, overlap=True)
    with z.gathered():
        model(torch.arange(4)[None])
    assert z.memory.peak["gathered"] == 4 * sum(padded(gpt(), 1).values())
    assert z.order == [] and all(unit.pending is None for unit in z.units) and not alive_after(z)


def test_gathered_that_fails_or_is_nested():
    """A gather that fails takes all weights out again; a second gathered() inside is refused and ends nothing."""
    model = gpt()
    z = Zero(model, units=model.units(), stage=3)
    real = Unit.fetch
    with mock.patch.object(Unit, "fetch", lambda unit: 1 / 0 if unit.name == "blocks.1" else real(unit)), \
            pytest.raises(ZeroDivisionError), z.gathered():
        pass
    assert not z.is_gathered and "weight" not in model.embed.__dict__ and not alive_after(z)
    with z.gathered():
        with pytest.raises(RuntimeError, match="inside gathered"), z.gathered():
            pass
        assert model(torch.arange(4)[None]).isfinite().all() and model.embed.weight.shape == (33, 16)


# ---- 12: four models at once ----------------------------------------------------------------------------------------

def ppo_case():
    actor, critic, reference, reward = (gpt(seed=i) for i in range(4))
    za, zc = (Zero(m, units=m.units(), stage=stage, lr=LR, weight_decay=DECAY)
              for m, stage in ((actor, 3), (critic, 2)))
    zr, zw, zh = (Zero(m, units=m.units(), stage=3, frozen=True, offload=offload, dtype=dtype)
                  for m, offload, dtype in ((reference, (), torch.float32), (reward, ("params",), torch.float32),
                                            (gpt(), (), torch.bfloat16)))
    for step in batches(2, 1):
        ids = step[za.comm.rank, 0]
        with torch.no_grad():
            score = loss_of(reward, ids, 48) - loss_of(reference, ids, 48)
        za.backward(loss_of(actor, ids, 48) * score)
        zc.backward((loss_of(critic, ids, 48) - score).square())
        za.step(LR, CLIP)
        zc.step(LR, CLIP)
    with pytest.raises(RuntimeError, match="frozen"):
        zr.backward(score)
    for z in (zr, zw, zh):
        held = zero_tools.held(z)
        assert held == zero_tools.held_by_formula(z) and held["moments"] == held["gradients"] == 0
        assert set(z.comm.sent) == {"broadcast", *(["all_gather"] if z is not zh else [])}  # zh was not run
    whole = gpt().parameter_count()  # 16-bit weights of a frozen model have no float32 masters beside them
    assert sum(zero_tools.held(zh).values()) < 1.1 * 2 * whole / zh.comm.world
    return za.full_state_dict(), zc.full_state_dict(), zr.full_state_dict()


def test_four_models_in_one_process():
    """Actor, critic, reference and reward model interleaved: the trained ones equal plain training, the frozen ones
    stay, hold no optimizer bytes and send no gradients."""
    actor, critic, reference, reward = (gpt(seed=i) for i in range(4))
    optimizers = [torch.optim.AdamW([{"params": [p for p in m.parameters() if p.dim() >= 2], "weight_decay": DECAY},
                                     {"params": [p for p in m.parameters() if p.dim() < 2], "weight_decay": 0.0}],
                                    lr=LR, betas=(0.9, 0.95), fused=True) for m in (actor, critic)]
    for step in batches(2, 1):
        for ids in step[:, 0]:
            with torch.no_grad():
                score = loss_of(reward, ids, 48) - loss_of(reference, ids, 48)
            (loss_of(actor, ids, 48) * score).backward()
            (loss_of(critic, ids, 48) - score).square().backward()
        for model, optimizer in zip((actor, critic), optimizers):
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    for got, model in zip(ranks().run(2, ppo_case)[0], (actor, critic, reference)):
        expected = model.state_dict()
        assert near(got, expected, 1e-5)
    assert_equal(got, reference.state_dict())


# ---- 13: uneven and partly frozen -----------------------------------------------------------------------------------

def many_poisoned(cases):
    """Memory that nobody has written holds NaN, as it may."""
    real = zero_tools.Memory.empty
    with mock.patch.object(zero_tools.Memory, "empty", lambda *args, **kw: real(*args, **kw).fill_(math.nan)):
        return many(cases)


def test_odd_model():
    """Scalars, more ranks than elements, a block used twice, unused ones, some used in steps 1 and 3 alone, frozen
    ones: stages 0-3 on 3 ranks equal one process (not bitwise: autograd adds the two uses of a block in its own order
    here, and after the micro-batch there), frozen tensors and buffers do not move."""
    data = batches(3, 2, steps=3)
    cases = [(("odd", data, stage), options) for stage in (0, 1, 2, 3)
             for options in ({}, {"activation_checkpointing": True, "overlap": True}, {"offload": ("optim",)},
                             {"overlap": True})]
    before = make("odd").state_dict()
    for ((_, _, stage), options), (state, norms, _) in zip(cases, ranks().run(3, many_poisoned, cases)[0]):
        expected, expected_norms = one_process("odd", data, min(stage, 2))
        assert norms == pytest.approx(expected_norms, rel=1e-5), (stage, options)
        assert near(state, expected, 5e-6), (stage, options)
        for name in ("blocks.3.weight", "blocks.4.weight", "blocks.4.bias", "offset"):
            assert torch.equal(state[name], before[name])


def chain(*trainable):
    """Linear blocks of which some are frozen."""
    model = nn.Sequential()
    model.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in trainable)
    for block, train in zip(model.blocks, trainable):
        block.requires_grad_(train)
    model.forward = lambda x: functools.reduce(lambda y, block: block(y).tanh(), model.blocks, x)
    return model


def test_frozen_weights_need_no_gradient():
    """Of a unit's weights the frozen ones are no parts of the graph: for them no gradient is even computed."""
    seen, real = [], nn.Linear.forward
    with mock.patch.object(nn.Linear, "forward", lambda linear, x: seen.append(
            (linear.weight.requires_grad, linear.bias.requires_grad)) or real(linear, x)):
        for stage in (0, 3):
            model = chain(True)
            model.blocks[0].weight.requires_grad_(False)
            z = Zero(model, units=list(model.blocks), stage=stage)
            z.backward(model(torch.randn(4, 16)).sum())
    assert seen == 2 * [(False, True)]


def test_weights_are_let_go_in_backward():
    """At stage 3 backward holds one unit's weights at a time, also of frozen ones, which no reduce lets go; none after
    it."""
    model = chain(True, False, False, True, True)
    z = Zero(model, units=list(model.blocks), stage=3)
    z.backward(model(torch.randn(4, 16)).sum())
    assert z.memory.peak["gathered"] == 4 * z.units[0].S and not alive_after(z)
    assert all(unit.held is None for unit in z.units)


def test_a_model_without_trainable_parameters():
    """Frozen by requires_grad instead of frozen=True: one clear error."""
    model = chain(False, False)
    z = Zero(model, units=list(model.blocks), stage=1)
    for forbidden in (lambda: z.backward(torch.zeros((), requires_grad=True)), lambda: z.step(LR)):
        with pytest.raises(RuntimeError, match="none of its parameters requires a gradient"):
            forbidden()


def one_sided(folder):
    """Rank 1 leaves out a block that rank 0 uses."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(os.path.join(folder, "debug"), 2), rank=rank, world_size=2,
                                timeout=datetime.timedelta(seconds=5))
        model = make("odd")
        z = Zero(model, units=model.units(), stage=3)
        model.blocks = model.blocks[rank:]
        x = functools.reduce(lambda x, block: block(x), model.blocks[:2 - rank], model.embed(torch.arange(4)))
        z.backward(x.sum())
        z.step(LR)
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


@pytest.mark.slow  # two ranks must meet within a few seconds, which a busy machine does not promise
def test_a_block_used_on_one_rank_only(tmp_path):
    """Conditional blocks that differ between ranks are forbidden; with TORCH_DISTRIBUTED_DEBUG=DETAIL the error says
    which collectives do not match, at once instead of at the timeout."""
    start = time.monotonic()
    with pytest.raises(RankFailed, match="mismatch|Mismatch|not match|differ"):
        ranks().run(2, one_sided, str(tmp_path))
    assert time.monotonic() - start < 10


def test_a_disk_that_is_full():
    """Moments on disk: the room is taken when the file is made, so that a full disk is a clear line then and no SIGBUS
    in the middle of training."""
    for number in (errno.ENOSPC, errno.EFBIG):
        with mock.patch.object(os, "posix_fallocate", side_effect=OSError(number, "what the disk said")), \
                pytest.raises(UserError, match="what the disk said.*TMPDIR"):
            Zero(gpt(), units=[], offload=("optim", "disk"))


# ---- building -------------------------------------------------------------------------------------------------------

def meta_case(stage):
    config = GPTConfig(vocab_size=33, n_layer=2, n_head=2, n_embd=16, max_seq_len=12)
    with torch.device("meta"):
        model = GPT(config)
    built = []
    real = zero_tools.materialise
    with mock.patch.object(zero_tools, "materialise", lambda p, d: built.append(real(p, d))):
        z = Zero(model, units=model.units(), stage=stage, device="cpu",
                 init=lambda module, prefix: initialise(module, 7, prefix))
    assert len(built) == len(z.units) and not any(p.is_meta for p in model.buffers())
    z.backward(loss_of(model, batches(2, 1)[0, z.comm.rank, 0], 48))
    z.step(0.0)
    return z.full_state_dict()


def test_building_unit_by_unit():
    """A model born on the meta device and initialised one unit at a time has the numbers of one built whole."""
    expected = GPT(GPTConfig(vocab_size=33, n_layer=2, n_head=2, n_embd=16, max_seq_len=12), seed=7).state_dict()
    for stage in (1, 3):
        assert_equal(ranks().run(2, meta_case, stage)[0], expected)


def seeds_case():
    return [sharded_seed(stage) for stage in (0, 1, 3)]


def sharded_seed(stage):
    model = gpt(seed=dist.get_rank())
    return Zero(model, units=model.units(), stage=stage).full_state_dict()


def test_ranks_that_were_seeded_differently_start_from_rank_0():
    """Every stage begins with rank 0's weights everywhere, not with a mixture."""
    for state in ranks().run(2, seeds_case)[0]:
        assert_equal(state, gpt(seed=0).state_dict())


def test_autocast_is_refused():
    """autocast would save its own casted copies of the weights, which stage 3 could not free."""
    model = gpt()
    Zero(model, units=model.units(), stage=3)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="dtype"):
        model(torch.arange(4)[None])


@pytest.mark.parametrize("options, words", [
    ({"stage": 4}, "--zero 4"), ({"offload": ("optimizer",)}, "--offload optimizer"),
    ({"stage": 2, "offload": ("optim", "params")}, "--zero 3"), ({"stage": 3, "offload": ("params",)}, "optim")])
def test_options_that_make_no_sense(options, words):
    """A UserError names the flag."""
    with pytest.raises(UserError, match=words):
        Zero(gpt(), units=[], **options)


# ---- 14: activation offload -----------------------------------------------------------------------------------------

def test_activations_are_parked_once_and_weights_never():
    """Each large storage goes to the host once, however many views of it autograd saves; weights and buffers never;
    after backward nothing is left there. With checkpointing only the block inputs go."""
    data = batches(1, 1)
    for stage, recompute, tied in itertools.product((0, 3), (False, True), (False, True)):
        model = gpt(tied)
        weights = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
        z = Zero(model, units=model.units(), stage=stage, offload=("acts",), activation_checkpointing=recompute)
        seen, shapes = [], []
        real = zero_tools.Parked.__init__

        def watch(parked, memory, x, real=real, seen=seen, shapes=shapes):
            seen.append(StorageWeakRef(x.untyped_storage()).cdata)
            shapes.append(tuple(x.shape))
            real(parked, memory, x)

        with mock.patch.object(zero_tools, "PARK_BYTES", 64), mock.patch.object(zero_tools.Parked, "__init__", watch):
            loss = loss_of(model, data[0, 0, 0], 24)
            assert len(z.memory.parked) > 0
            inside = len(z.memory.parked)
            z.backward(loss)
        assert not weights & set(shapes)
        assert len(z.memory.parked) == 0
        assert z.memory.moved["to_host"] == z.memory.moved["from_host"] > 0
        assert not recompute or inside < 12


class Gated(nn.Linear):
    """Multiplies by a buffer, which autograd saves."""

    def __init__(self):
        super().__init__(16, 16)
        self.register_buffer("gate", torch.randn(16, 16))

    def forward(self, x):
        return super().forward(x) * self.gate


def test_buffers_are_not_parked():
    """A buffer stays on the device, though autograd keeps it: only the linear's input goes to the host."""
    model = nn.Sequential(Gated())
    z = Zero(model, units=[model[0]], offload=("acts",))
    with mock.patch.object(zero_tools, "PARK_BYTES", 64):
        z.backward(model(torch.randn(16, 16)).tanh().sum())
    assert z.memory.moved["to_host"] == 4 * 16 * 16


class SharesStorage(nn.Module):
    """Saves for backward one storage in two states, and as two types."""

    def __init__(self):
        super().__init__()
        self.linear, self.in_place = nn.Linear(16, 16), True

    def forward(self, x):
        x = self.linear(x)
        first = x.sin()
        x = x.mul_(2) if self.in_place else x * 2
        second = x.cos()
        y = x * 3
        z = torch.view_as_complex(y.view(-1, 8, 2))
        return first + second + y.sin() + torch.view_as_real(z * z).flatten(1)


def test_parked_copies_are_of_the_right_moment_and_type():
    """A storage that changed in between, or is read as another type, is another copy: the gradients are those of the
    same computation in fresh memory."""
    torch.manual_seed(0)
    norms, twin, x = [], SharesStorage(), torch.randn(4, 16)
    twin.in_place = False
    twin(x).sum().backward()
    expected = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters()))
    model = nn.Sequential(SharesStorage())
    model[0].load_state_dict(twin.state_dict())
    z = Zero(model, units=[model[0]], offload=("acts",))
    with mock.patch.object(zero_tools, "PARK_BYTES", 64):
        z.backward(model(x).sum())
    norms.append(z.step(LR).norm)
    assert norms == pytest.approx([expected], rel=1e-5)


class Spoils(nn.Module):
    """Overwrites what sin() has saved for its backward pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        h = self.linear(x)
        return h.sin() + h.mul_(2)


@pytest.mark.parametrize("options", [{}, {"stage": 3}, {"offload": ("acts",)}])
def test_a_saved_activation_that_is_overwritten_is_an_error(options):
    """As in plain PyTorch, which leaves this check to whoever sets saved-tensor hooks; not a wrong gradient."""
    model = nn.Sequential(Spoils())
    z = Zero(model, units=[model[0]], **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward(model(torch.randn(4, 16)).sum())


def test_moments_on_disk_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(zero_tools.tempfile, "tempdir", str(tmp_path))
    z = Zero(gpt(), units=[], offload=("optim", "disk"))
    assert zero_tools.held(z)["moments"] > 0 and not list(tmp_path.iterdir())


def test_a_state_dict_is_a_copy():
    """What a caller keeps of it does not follow the training."""
    model = gpt()
    z = Zero(model, units=model.units())
    before = z.full_state_dict()
    kept = {name: weight.clone() for name, weight in before.items()}
    z.backward(loss_of(model, batches(1, 1)[0, 0, 0], 24))
    z.step(LR)
    assert_equal(before, kept)
    assert not torch.equal(z.full_state_dict()["embed.weight"], kept["embed.weight"])


# ---- 15: on a GPU ---------------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
def test_cuda_bytes_and_offload():
    """torch.cuda.memory_allocated grows by what the formula says (each tensor in whole 512 bytes, and the buffers).
    Parking activations changes no bit; the CPU's AdamW rounds otherwise than the GPU's, in the last bits."""
    states = []
    for offload in ((), ("acts",), ("optim",), ("optim", "params"), ("optim", "params", "acts")):
        gc.collect()  # a Zero and its model refer to each other: the one before may still be there
        before = torch.cuda.memory_allocated()
        large = GPT(GPTConfig(vocab_size=512, n_layer=2, n_head=4, n_embd=256, max_seq_len=64)).cuda()
        z = Zero(large, units=large.units(), stage=3, offload=offload)
        on_device = torch.cuda.memory_allocated() - before
        held = zero_tools.held_by_formula(z)
        expected = held["weights"] if "optim" in offload else sum(held.values())
        expected += sum(buffer.nbytes for buffer in large.buffers())
        assert 0 <= on_device - expected < 512 * 5 * len(z.units) + 4096
        del large, z
        model = gpt().cuda()
        z = Zero(model, units=model.units(), stage=3, offload=offload)
        with mock.patch.object(zero_tools, "PARK_BYTES", 64):
            for step in batches(1, 2):
                for ids in step[0].cuda():
                    z.backward(loss_of(model, ids, 48))
                z.step(LR, CLIP)
        assert ("acts" in offload) == (z.memory.moved["to_host"] > 0) or "optim" in offload
        states.append(z.full_state_dict())
    assert_equal(states[1], states[0])
    for state in states[2:]:
        assert all(torch.allclose(state[k], states[0][k], atol=1e-5) for k in state)


def on_cuda(offload=(), stage=3, overlap=False, dtype=torch.float32, nap=0):
    """Three updates of the small model on the GPU, all of its activations parked if any. nap: cycles that each stream
    sleeps before what the other one should wait for."""
    model = gpt().cuda()
    z = Zero(model, units=model.units(), stage=stage, offload=offload, overlap=overlap, dtype=dtype, lr=LR,
             weight_decay=DECAY)
    real = z.memory.to_host

    def late(*args, **options):
        with torch.cuda.stream(z.memory.side):
            torch.cuda._sleep(nap)  # the copy comes late: who reads the host's memory must wait for it
        return real(*args, **options)

    with mock.patch.object(zero_tools, "PARK_BYTES", 64), mock.patch.object(z.memory, "to_host", late):
        for step in batches(z.comm.world, 2, steps=3):
            for ids in step[z.comm.rank].cuda():
                loss = loss_of(model, ids, z.comm.world * 48)
                torch.cuda._sleep(nap)  # the gradients come late: who copies them must wait for them
                z.backward(loss)
            z.step(LR, CLIP)
    return z


@needs_cuda
@pytest.mark.parametrize("offload", [("acts",), ("optim",), ("optim", "params", "acts")])
def test_cuda_copies_are_as_counted(offload, tmp_path):
    """Bytes between device and pinned memory as the profiler sees them are Memory.moved, both ways."""
    on_cuda(offload)  # warm: libraries make copies of their own at their first call
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        z = on_cuda(offload)
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    copies = collections.Counter()
    for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]:
        n_bytes = event.get("args", {}).get("bytes", 0)
        if event.get("cat") == "gpu_memcpy" and "Pinned" in event["name"] and n_bytes >= 64:  # less: an .item()
            copies["to_host" if "DtoH" in event["name"] else "from_host"] += n_bytes
    born = 4 * sum(unit.shard_size for unit in z.units) if "optim" in offload else 0  # the masters left when they were made
    assert copies == {"to_host": z.memory.moved["to_host"] + born, "from_host": z.memory.moved["from_host"]}


BLOCKING = """
import hashlib, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from test_zero import on_cuda
state = on_cuda(("optim", "params", "acts"), overlap=True).full_state_dict()
print(hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest())
"""


@needs_cuda
def test_cuda_streams_do_not_race():
    """The copies run on a stream of their own. When either stream is late, or with CUDA_LAUNCH_BLOCKING=1, where no
    kernel runs beside another: the same bits."""
    for options in ({}, {"dtype": torch.bfloat16}):
        quick, late = (on_cuda(("optim", "params", "acts"), overlap=True, nap=nap, **options).full_state_dict()
                       for nap in (0, 10**6))
        assert_equal(late, quick, options)
    code = BLOCKING.format(root=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    found = {subprocess.run([sys.executable, "-c", code], env=os.environ | {"CUDA_LAUNCH_BLOCKING": blocking},
                            check=True, capture_output=True, text=True, timeout=120).stdout for blocking in "01"}
    assert len(found) == 1


def two_on_one_gpu():
    cases = [(offload, stage, overlap) for stage in (0, 1, 2, 3) for overlap in (False, True)
             for offload in ((), ("optim",), *([("optim", "params")] if stage == 3 else []))]
    return [on_cuda(*case).full_state_dict() for case in cases]


@needs_cuda
def test_two_ranks_on_one_gpu():
    """Over gloo, since nccl refuses two ranks on one device: the weights of one process, at every stage."""
    expected, _ = one_process("untied", batches(2, 2, steps=3), 3)
    for state in ranks().run(2, two_on_one_gpu)[0]:
        assert near(state, expected, 1e-4)


@needs_cuda
def test_two_ranks_of_a_script_on_one_gpu(monkeypatch):
    """processes.setup chooses gloo where there are more ranks than GPUs."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(torch.cuda.device_count() + 1))
    monkeypatch.setenv("WORLD_SIZE", str(torch.cuda.device_count() + 1))
    chosen = []
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: chosen.append(backend))
    setup("cuda", catch_signals=False)
    assert chosen == ["gloo"]
