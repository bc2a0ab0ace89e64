"""ZeRO: every stage computes what one process computes, and holds and sends what the formulas say."""
import collections
import contextlib
import copy
import functools
import gc
import hashlib
import itertools
import math
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from ranks import RankFailed, ranks
from torch.multiprocessing.reductions import StorageWeakRef

from bench import zero as bench_zero
from lib import collectives
from lib.collectives import Comm, Memory
from lib.program import UserError
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


# ---- models and data

def lively(model, seed=0):
    """Nothing is zero: at birth the blocks of a GPT are the identity, and their gradients would hide mistakes."""
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
    that runs twice, two that are used (or whose bias is) in every other step, a frozen matrix, a frozen block."""

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
    """ids (steps, world, k, 2, 13): what each rank sees in each of k micro-batches of each step."""
    return torch.randint(0, 33, (steps, world, k, 2, 13), generator=torch.Generator().manual_seed(world * 10 + k))


def loss_of(model, ids, count):
    return -model(ids[:, :-1], ids[:, 1:]).sum() / count


def linears(*trainable):
    """Linear blocks in a row, of which some are frozen."""
    model = nn.Sequential()
    model.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in trainable)
    for block, train in zip(model.blocks, trainable):
        block.requires_grad_(train)
    model.forward = lambda x: functools.reduce(lambda y, block: block(y).tanh(), model.blocks, x)
    return model


def adamw(model):
    """PyTorch's own, with weight decay on matrices alone."""
    named = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in named if p.dim() >= 2], "weight_decay": DECAY},
              {"params": [p for p in named if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, fused=True)


# ---- the oracle is one process with the plain model, which adds gradients in a known order

def one_process(kind, data, stage):
    """Train on the micro-batches of all ranks: (state_dict, norms). Stages 0 and 1 sum over micro-batches first,
    then over ranks; stages 2 and 3 the other way round."""
    model, norms = make(kind), []
    named, optimizer = [p for p in model.parameters() if p.requires_grad], adamw(model)
    for model.step, step in enumerate(data):
        world, k = step.shape[:2]
        grads = {(r, m): torch.autograd.grad(loss_of(model, step[r, m], world * k * 24), named, allow_unused=True)
                 for r, m in itertools.product(range(world), range(k))}
        for i, p in enumerate(named):
            rows = [[grads[r, m][i] for m in range(k)] for r in range(world)]
            rows = rows if stage < 2 else zip(*rows)
            unused = grads[0, 0][i] is None
            p.grad = torch.zeros_like(p) if unused else functools.reduce(
                torch.add, (functools.reduce(torch.add, row) for row in rows))
        norms.append(math.sqrt(sum(p.grad.double().square().sum().item() for p in named)))
        for p in named if norms[-1] > CLIP else ():
            p.grad.div_(torch.tensor((norms[-1] + 1e-6) / CLIP))  # float32, as fused AdamW takes it
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, norms


def sharded(kind, data, stage, **options):
    """The same by the ranks of this job: (state_dict, on rank 0; norms)."""
    model, norms = make(kind), []
    zero = Zero(model, units=model.units(), stage=stage, lr=LR, weight_decay=DECAY, **options)
    for model.step, step in enumerate(data):
        for ids in step[zero.comm.rank]:
            zero.backward(loss_of(model, ids, step.shape[0] * step.shape[1] * 24))
        norms.append(zero.step(LR, CLIP).norm)
    return zero.full_state_dict(), norms


def many(cases):
    """Several sharded() runs in one job."""
    return [sharded(*args, **options) for args, options in cases]


def on_ranks(world, cases):
    return ranks().run(world, many, cases)


def near(state, expected, tolerance):
    return all((state[name] - expected[name]).abs().max() <= tolerance for name in expected)


def assert_equal(state, expected, label=""):
    assert state.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(state[name], expected[name])]
    assert not differing, (label, differing)


# ---- equal to one process

@pytest.mark.parametrize("world", [2, 3])
def test_stages_are_bitwise_one_process(world):
    """After two clipped steps the weights are bit for bit those of one process that adds the same gradients in the
    same order; the norms agree to 1e-12 and are the same on all ranks. (Stage 0 on 3 ranks: gloo's ring adds in an
    order of its own.)"""
    cases = [((kind, batches(world, k), stage), {"activation_checkpointing": recompute})
             for kind, k, recompute in (("untied", 1, False), ("untied", 3, True), ("tied", 1, True), ("tied", 2, False))
             for stage in (0, 1, 2, 3)]
    answers = on_ranks(world, cases)
    oracle = functools.lru_cache(lambda kind, k, first: one_process(kind, batches(world, k), 1 if first else 2))
    for ((kind, data, stage), options), (state, norms) in zip(cases, answers[0]):
        expected, expected_norms = oracle(kind, data.shape[2], stage < 2)
        label, ring = (world, kind, data.shape[2], stage, options), stage == 0 and world > 2
        assert norms == pytest.approx(expected_norms, rel=1e-5 if ring else 1e-12), label
        assert min(norms) > CLIP  # so that clipping is part of what is compared
        assert near(state, expected, 2e-6), label
        assert ring or assert_equal(state, expected, label) is None
    assert all([norms for _, norms in other] == [norms for _, norms in answers[0]] for other in answers)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_is_bitwise_the_plain_loop(stage):
    """Without torch.distributed."""
    assert_equal(sharded("tied", batches(1, 2), stage)[0], one_process("tied", batches(1, 2), 1)[0])


def ten_lines(data):
    """zero.data_parallel_step on a plain model."""
    model, norms = gpt(), []
    optimizer = adamw(model)
    for step in data:
        for ids in step[dist.get_rank()]:
            loss_of(model, ids, step.shape[0] * step.shape[1] * 24).backward()
        norms.append(data_parallel_step(model, optimizer, CLIP))
    return model.state_dict(), norms


def test_all_stages_equal_the_ten_lines():
    """Stages 0-3 on 3 ranks compute what data_parallel_step does, the plain all-reduce that stands first in zero.py."""
    data = batches(3, 2)
    expected, expected_norms = ranks().run(3, ten_lines, data)[0]
    for state, norms in on_ranks(3, [(("untied", data, stage), {}) for stage in (0, 1, 2, 3)])[0]:
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        assert near(state, expected, 2e-6)


def many_with_small_parking(cases):
    with mock.patch.object(collectives, "PARK_BYTES", 64):  # the activations of these models are small
        return many(cases)


def test_offload_changes_no_bit():
    """Optimizer, parameters and activations in host memory: the same bits at every stage."""
    data, first = batches(2, 2), {}
    variants = [{}, {"offload": ("optim",)}, {"offload": ("acts",)},
                {"offload": ("optim", "acts"), "activation_checkpointing": True}]
    cases = [(("untied", data, stage), options) for stage in (0, 1, 2, 3) for options in variants]
    cases += [(("untied", data, 3), {"offload": kinds}) for kinds in (("optim", "params"), ("optim", "params", "acts"))]
    for ((*_, stage), options), answer in zip(cases, ranks().run(2, many_with_small_parking, cases)[0]):
        state, norms = first.setdefault(stage, answer)
        assert_equal(answer[0], state, (stage, options))
        assert answer[1] == norms, (stage, options)


def many_poisoned(cases):
    """Memory that nobody has written holds NaN, as it may."""
    real = Memory.empty
    with mock.patch.object(Memory, "empty", lambda *args, **kw: real(*args, **kw).fill_(math.nan)):
        return many(cases)


def test_odd_model():
    """Scalars, more ranks than elements, a block used twice, unused ones, some used in steps 1 and 3 alone, frozen
    ones: stages 0-3 on 3 ranks equal one process (not bitwise: here autograd adds the two uses of a block, there
    the micro-batches come between). What is frozen, and buffers, do not move."""
    data, before = batches(3, 2, steps=3), make("odd").state_dict()
    cases = [(("odd", data, stage), options) for stage in (0, 1, 2, 3)
             for options in ({}, {"activation_checkpointing": True}, {"offload": ("optim",)})]
    for ((*_, stage), options), (state, norms) in zip(cases, ranks().run(3, many_poisoned, cases)[0]):
        expected, expected_norms = one_process("odd", data, stage)
        assert norms == pytest.approx(expected_norms, rel=1e-5), (stage, options)
        assert near(state, expected, 5e-6), (stage, options)
        for name in ("blocks.3.weight", "blocks.4.weight", "blocks.4.bias", "offset"):
            assert torch.equal(state[name], before[name])


# ---- the comparison can fail

def lose_one_gradient(unit, gradients, original=Unit.reduce):
    original(unit, [None] * len(gradients) if unit.name == "blocks.0" and dist.get_rank() == 1 else gradients)


def swap_chunks(comm, x, dtype, original=Comm.reduce_scatter):
    return original(comm, x.view(comm.world, -1).flip(0).flatten(), dtype)


def shift_by_one(comm, x, dtype, original=Comm.reduce_scatter):
    return original(comm, x.roll(1), dtype)


def divide_twice(zero, loss, original=Zero.backward):
    original(zero, loss / 2)


def stale_weights(unit, original=Unit.fetch):
    if not hasattr(unit, "stale"):
        unit.stale = original(unit).clone()
    return unit.stale


def forget_publish(unit):
    pass


def local_norm_only(comm, x, original=Comm.all_reduce):
    if x.dtype != torch.float64:
        original(comm, x)


def decay_everything(parameters, frozen, original=collectives.take_out):
    slots, values, trainable, decaying = original(parameters, frozen)
    return slots, values, trainable, trainable


SEEDED_BUGS = [(Unit, "reduce", lose_one_gradient, (1, 2, 3)), (Comm, "reduce_scatter", swap_chunks, (1, 2, 3)),
               (Comm, "reduce_scatter", shift_by_one, (1, 2, 3)), (Zero, "backward", divide_twice, (1, 2, 3)),
               (Unit, "fetch", stale_weights, (3,)), (Unit, "publish", forget_publish, (1, 2)),
               (Comm, "all_reduce", local_norm_only, (1, 2, 3)),
               (collectives, "take_out", decay_everything, (1, 2, 3))]


def with_bugs(jobs):
    states = []
    for i, stage in jobs:
        owner, name, bug, _ = SEEDED_BUGS[i]
        with mock.patch.object(owner, name, bug):
            states.append(sharded("untied", batches(2, 1), stage)[0])
    return states


def test_seeded_bugs_turn_the_comparison_red():
    """A lost gradient, swapped or shifted chunks, dividing twice, stale weights, a forgotten publish, a local norm,
    decay of the norms: each changes the weights."""
    jobs = [(i, stage) for i, (*_, stages) in enumerate(SEEDED_BUGS) for stage in stages]
    expected, _ = one_process("untied", batches(2, 1), 2)
    for (i, stage), state in zip(jobs, ranks().run(2, with_bugs, jobs)[0]):
        with pytest.raises(AssertionError):
            assert_equal(state, expected)
            print("survived:", SEEDED_BUGS[i][2].__name__, stage)


# ---- compiled blocks

def compiled(backend, function, *args):
    """function(*args) with a torch.compile that has no code generator: `backend` runs PyTorch's own kernels."""
    torch._dynamo.reset()
    real = torch.compile
    with mock.patch.object(torch, "compile", lambda f: real(f, backend=backend)):
        return function(*args)


def test_compiled_blocks():
    """torch.compile of the blocks (here without its code generator) changes no bit, on one rank and on two."""
    cases = [(("untied", batches(world, 2), stage), {"compile": True, "activation_checkpointing": recompute})
             for world, stage, recompute in ((1, 0, False), (1, 3, True), (2, 3, True))]
    answers = compiled("aot_eager", many, cases[:2]) + ranks().run(2, compiled, "aot_eager", many, cases[2:])[0]
    for ((kind, data, stage), options), (state, norms) in zip(cases, answers):
        expected, expected_norms = one_process(kind, data, 2)
        assert norms == pytest.approx(expected_norms, rel=1e-12)
        assert_equal(state, expected, (len(data[0]), stage, options))


def use_two_models():
    """Blocks of two widths, trained and evaluated, with rows of two lengths, plain and packed."""
    for width in (16, 32):
        model = GPT(GPTConfig(vocab_size=33, n_layer=1, n_head=2, n_embd=width, max_seq_len=12))
        zero = Zero(model, units=model.units(), compile=True)
        for ids in (torch.ones(2, 12, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)):
            for segment_ids in (None, (torch.arange(ids.shape[1]) // 5).expand_as(ids)):
                zero.backward(model(ids, ids, segment_ids=segment_ids).sum())
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


# ---- 16-bit weights

def states_of_dtype(dtype):
    states = []
    for stage in (1, 2, 3):
        model = gpt()
        zero = Zero(model, units=model.units(), stage=stage, lr=LR, weight_decay=DECAY, dtype=dtype)
        for step in batches(2, 1):
            logp = model(step[zero.comm.rank, 0, :, :-1], step[zero.comm.rank, 0, :, 1:])
            assert logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            zero.backward(-logp.sum() / 48)
            assert not zero.step(LR, CLIP).skipped
        with zero.gathered():
            assert model.blocks[0].mlp.up.weight.dtype == model(step[0, 0, :, :12]).dtype == dtype
        states.append(zero.full_state_dict())
    return states


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_compute_dtypes(dtype):
    """Weights and activations are of this dtype, masters at least float32. All stages agree bitwise with each
    other, and the update is near the float32 one."""
    states = ranks().run(2, states_of_dtype, dtype)[0]
    expected, _ = one_process("untied", batches(2, 1), 2)
    for state in states:
        assert_equal(state, states[0])
        assert {x.dtype for x in state.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
        for name in expected:  # AdamW moves by about LR a step whatever the gradient's size, and signs may differ
            error = (state[name] - expected[name]).abs()
            assert error.mean() < LR / 4 and error.max() < 4.1 * LR, name
            assert dtype != torch.float64 or error.max() < 1e-5, name


@pytest.mark.parametrize("stage", [0, 2])
def test_sixteen_bit_gradients_add_in_float32(stage):
    """A bfloat16 sum of 300 micro-batches with a gradient of 1 + 2^-7 would stop growing at 256."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    zero = Zero(model, units=[model[0]], stage=stage, dtype=torch.bfloat16)
    for _ in range(300):
        zero.backward(model(torch.full((1, 1), 1 + 2**-7, dtype=torch.bfloat16)).sum())
    assert zero.step(0.0).norm == 300 * (1 + 2**-7)


OVERFLOWS, GROWS = 1, 2  # of these four steps: rank 1 overflows in one; the other is the 2000th good one in a row


def scaled_by_zero(stage):
    model = gpt()
    zero = Zero(model, units=model.units(), stage=stage, dtype=torch.float16, lr=LR, weight_decay=DECAY)
    history, ids = [], batches(2, 1)[0, zero.comm.rank, 0]
    for step in range(4):
        if step == GROWS:
            zero.good_steps = 1999
        zero.backward(loss_of(model, ids, 48) * (1e30 if step == OVERFLOWS and zero.comm.rank == 1 else 1.0))
        history.append((zero.step(LR, None), zero.loss_scale, zero.full_state_dict()))
    return history


def scaled_by_torch():
    """The same in one process: float32 masters, whose gradients are those of a float16 copy."""
    masters, history = gpt(), []
    optimizer, scaler = adamw(masters), torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2000)
    for step in range(4):
        if step == GROWS:
            scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": 1999})
        model, scale = copy.deepcopy(masters).half(), scaler.get_scale()
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
    """As torch.amp.GradScaler, bit for bit: one rank overflows, so all skip, the weights stay and the scale halves;
    the step that earns a larger scale is itself unscaled by the old one."""
    expected = scaled_by_torch()
    assert [scale for _, scale, *_ in expected] == [2.0**16, 2.0**16, 2.0**15, 2.0**16]
    for stage in (1, 2, 3):
        history, other = ranks().run(2, scaled_by_zero, stage)
        for step, ((info, after, state), (norm, scale, next_scale, weights)) in enumerate(zip(history, expected)):
            assert (info.skipped, info.loss_scale, after) == (step == OVERFLOWS, scale, next_scale), (stage, step)
            assert info.norm == pytest.approx(norm, rel=1e-12) or step == OVERFLOWS
            assert_equal(state, weights, (stage, step))
        assert_equal(history[OVERFLOWS][2], history[OVERFLOWS - 1][2])
        assert [str(info) for info, *_ in history] == [str(info) for info, *_ in other]


@pytest.mark.parametrize("clip", [None, CLIP])
def test_float16_gradients_are_unscaled(clip):
    """AdamW divides by the gradient's own size, which hides a scale that nobody took out again. Its first moment
    does not: after a step it is a tenth of the float32 gradient."""
    found = {}
    for dtype in (torch.float16, torch.float32):
        model = gpt()
        zero = Zero(model, units=model.units(), stage=3, dtype=dtype)
        zero.backward(loss_of(model, batches(1, 1)[0, 0, 0], 24))
        assert zero.step(LR, clip).norm > CLIP
        found[dtype] = torch.cat([unit.exp_avg for unit in zero.units])
    assert (found[torch.float16] - found[torch.float32]).norm() < 0.02 * found[torch.float32].norm()


# ---- steps that are left out

def test_counts_behind_the_loss_scale():
    """A skipped step starts the count of good ones anew, a good one that of skipped ones; the scale stays at least 1.
    A gradient of 0 changes nothing but is no failure. The 20th skip in a row is an error."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    zero = Zero(model, units=[], dtype=torch.float16)

    def update(factor=1.0):
        zero.backward(model(torch.full((1, 2), 0.1, dtype=torch.float16)).float().sum() * 0.1 * factor)
        return zero.step(0.0, CLIP).skipped

    zero.good_steps = 1999
    assert update(math.inf) and not update() and zero.loss_scale == 2.0**15
    zero.good_steps = 1999
    assert not update() and zero.loss_scale == 2.0**16 and not update() and zero.loss_scale == 2.0**16
    zero.loss_scale = 1.0
    assert all(update(math.inf) for _ in range(19)) and zero.loss_scale == 1.0
    assert not update() and all(update(math.inf) for _ in range(19))
    before, updates = zero.full_state_dict(), zero.updates
    assert update(0.0) and zero.updates == updates
    assert_equal(zero.full_state_dict(), before)
    assert (zero.skipped, zero.good_steps) == (0, 1) and all(update(math.inf) for _ in range(19))
    with pytest.raises(UserError, match="20 steps"):
        update(math.inf)


def poison(unit, gradients, original=Unit.reduce):
    original(unit, [torch.full_like(g, torch.nan) for g in gradients] if unit.name == "blocks.1" else gradients)


def one_rank_is_poisoned(stage, steps):
    model = gpt()
    zero = Zero(model, units=model.units(), stage=stage)
    ids, before, infos = batches(2, 1)[0, zero.comm.rank, 0], zero.full_state_dict(), []
    for _ in range(steps):
        with mock.patch.object(Unit, "reduce", poison) if zero.comm.rank == 1 else contextlib.nullcontext():
            zero.backward(loss_of(model, ids, 48))
        infos.append(zero.step(LR, CLIP))
    after = zero.full_state_dict()
    zero.backward(loss_of(model, ids, 48))
    return infos, all(torch.equal(before[k], after[k]) for k in before), zero.step(LR, CLIP)


def test_one_nan_makes_all_ranks_skip():
    """A NaN in one rank's gradient of one block: every rank skips, the weights stay, and the next step is sound."""
    for stage in (0, 1, 2, 3):
        for infos, unchanged, last in ranks().run(2, one_rank_is_poisoned, stage, 3):
            assert all(info.skipped for info in infos) and unchanged
            assert not last.skipped and math.isfinite(last.norm)


def test_twenty_skipped_in_a_row_is_an_error():
    """It names the unit, on all ranks."""
    with pytest.raises(RankFailed) as failure:
        ranks().run(2, one_rank_is_poisoned, 3, 20)
    assert all("blocks.1" in text and "UserError: 20 steps" in text for _, text in failure.value.answers)


# ---- bytes

@contextlib.contextmanager
def counted():
    """(bytes this rank sends, by collective; bytes of gathered weights at their peak). A ring's all-reduce sends
    2 (N-1)/N of a tensor, the two others (N-1)/N of what all ranks hold together."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    sent, peak, alive, real_fetch = collections.Counter(), [0], [], Unit.fetch

    def watch(name, share):
        real = getattr(dist, name)
        return mock.patch.object(dist, name, lambda *args: sent.update({name: share(*args)}) or real(*args))

    def fetch(unit):
        whole = real_fetch(unit)
        alive[:] = [entry for entry in alive if not entry[0].expired()]
        alive.append((StorageWeakRef(whole.untyped_storage()), whole.nbytes))
        peak[0] = max(peak[0], sum(n_bytes for _, n_bytes in alive))
        return whole

    with (watch("all_reduce", lambda x: 2 * (world - 1) * x.nbytes // world),
          watch("all_gather_single", lambda whole, shard: (world - 1) * shard.nbytes),
          watch("all_to_all_single", lambda into, x: (world - 1) * x.nbytes // world),
          mock.patch.object(Unit, "fetch", fetch)):
        yield sent, peak


def held(zero):
    """Bytes of model states by kind, each storage counted once."""
    kinds, seen = collections.Counter(), set()
    for unit in zero.units:
        for kind, names in {"weights": ["resident"], "gradients": ["grad", "shard_grad"], "masters": ["master"],
                            "moments": ["exp_avg", "exp_avg_sq"]}.items():
            for storage in (getattr(unit, n).untyped_storage() for n in names if getattr(unit, n, None) is not None):
                kinds[kind] += 0 if storage.data_ptr() in seen else storage.nbytes()
                seen.add(storage.data_ptr())
    return kinds


def padded(world):
    """Elements of each unit's flat vector, by the rule alone: parameters and shards are aligned to 16."""
    def up(n):
        return -(-n // 16) * 16

    units = {name: 0 for name in ("embed", "blocks.0", "blocks.1", "head", "root")}
    for name, p in gpt().named_parameters():
        units[next((unit for unit in units if name.startswith(unit + ".")), "root")] += up(p.numel())
    return {name: world * up(-(-n // world)) for name, n in units.items()}


def bytes_of(jobs):
    answers = []
    for stage, k, options in jobs:
        model = gpt()
        zero = Zero(model, units=model.units(), stage=stage, **options)
        with counted() as (sent, _):
            before = held(zero)
            for ids in batches(zero.comm.world, k)[0, zero.comm.rank]:
                zero.backward(loss_of(model, ids, 1))
            zero.step(LR, CLIP)
        assert held(zero) == before
        answers.append((before, dict(sent)))
    return answers


@pytest.mark.parametrize("world", [2, 3])
def test_bytes_held_and_sent_are_the_formulas(world):
    """Counted over storages and collectives: exactly the table at the head of zero.py with each unit's padding."""
    jobs = [(stage, k, options) for stage in (0, 1, 2, 3) for k in (1, 2)
            for options in ({}, {"dtype": torch.bfloat16}, {"offload": ("optim",)}, {"activation_checkpointing": True})]
    sizes = padded(world)
    total, N = sum(sizes.values()), world
    shard, rest = total // N, N - 1  # a rank sends its part of everything to so many others
    for (stage, k, options), (found, sent) in zip(jobs, ranks().run(world, bytes_of, jobs)[0]):
        p, offload, label = 2 if "dtype" in options else 4, "offload" in options, (stage, k, options)
        part = total if stage == 0 else shard
        # On the host masters are never a slice of the weights, and stages 0-1 have their gradients there as well.
        # (At stage 3 the host's shard and the device's are one, since here both are the CPU.)
        assert found["weights"] + found["masters"] == \
            (total * p if stage < 3 else 0) + (4 * part if stage == 3 or p != 4 or offload else 0), label
        assert found["gradients"] == 4 * (total if stage < 2 else shard) + 4 * part * (offload and stage < 2), label
        assert 8 * part - 8 * 16 * N * 5 <= found["moments"] <= 8 * part, label  # they have no padding
        once = sizes["root"] + sizes["embed"]  # gathered once, since backward of an embedding needs no weights
        wire = {0: {"all_reduce": 2 * 4 * shard * rest},
                1: {"all_to_all_single": 4 * shard * rest, "all_gather_single": p * shard * rest},
                2: {"all_to_all_single": k * p * shard * rest, "all_gather_single": p * shard * rest},
                3: {"all_to_all_single": k * p * shard * rest,
                    "all_gather_single": k * p * (2 * total - once) // N * rest}}
        norm = {"all_reduce": 2 * rest * 8 * 5 // N} if stage else {}
        assert sent == wire[stage] | norm, label


def reports():
    model = GPT(GPTConfig(vocab_size=512, n_layer=2, n_head=4, n_embd=256, max_seq_len=64))
    return [Zero(copy.deepcopy(model), units=[], stage=stage, dtype=dtype, frozen=frozen).report()
            for stage in (0, 1, 2, 3) for dtype in (torch.float32, torch.bfloat16) for frozen in (False, True)]


def test_report():
    """What is counted over the storages is the sum of what the formula says, for trained and frozen models."""
    psi = GPT(GPTConfig(vocab_size=512, n_layer=2, n_head=4, n_embd=256, max_seq_len=64)).parameter_count()
    found = ranks().run(2, reports)[0]
    for report in found:
        counted_mib, formula = report.split("model states held: ")[1].split("\n")[0].split(" MiB; by formula ")
        assert float(counted_mib) == pytest.approx(sum(float(term.split()[1]) for term in formula.split(" + ")), abs=0.2)
    sent = [float(report.split()[-2]) * 2**20 / psi for report in found[::2]]
    assert sent == pytest.approx([4, 4, 4, 3, 4, 2, 6, 3], rel=0.02)  # float32, bfloat16 of stages 0, 1, 2, 3


@pytest.mark.parametrize("recompute", [False, True])
def test_peak_of_gathered_weights(recompute):
    """At stage 3 the root's weights and one unit's are there at once. (On one rank, since gloo's worker thread may
    hold a finished gather a moment longer.)"""
    sizes, model = padded(1), gpt()
    zero = Zero(model, units=model.units(), stage=3, activation_checkpointing=recompute)
    with counted() as (_, peak):
        zero.backward(loss_of(model, batches(1, 1)[0, 0, 0], 24))
    assert peak[0] == 4 * (sizes["root"] + sizes["blocks.0"]) and zero.held is None


def test_frozen_weights_are_let_go_in_backward():
    """At stage 3 backward holds one unit's weights at a time, also of frozen ones, which no reduce lets go."""
    model = linears(True, False, False, True, True)
    zero = Zero(model, units=list(model.blocks), stage=3)
    with counted() as (_, peak):
        zero.backward(model(torch.randn(4, 16)).sum())
    assert peak[0] == 4 * zero.units[0].shard_size and zero.held is None


def test_frozen_weights_need_no_gradient():
    """Of a unit's weights the frozen ones are no parts of the graph: for them no gradient is even computed."""
    seen, real = [], nn.Linear.forward
    with mock.patch.object(nn.Linear, "forward", lambda linear, x: seen.append(
            (linear.weight.requires_grad, linear.bias.requires_grad)) or real(linear, x)):
        for stage in (0, 3):
            model = linears(True)
            model.blocks[0].weight.requires_grad_(False)
            Zero(model, units=list(model.blocks), stage=stage).backward(model(torch.randn(4, 16)).sum())
    assert seen == 2 * [(False, True)]


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


def spies(n):
    model = nn.Sequential()
    model.blocks = nn.ModuleList(Spy() for _ in range(n))
    model.forward = lambda x: functools.reduce(lambda y, block: block(y), model.blocks, x)
    return model


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_checkpointing_really_drops_and_recomputes(stage, recompute):
    """With activation checkpointing each block runs twice per micro-batch and its inner activations are gone
    between forward and backward. At stage 3 weights are gathered as often as without, and are gone as well."""
    model, fetched = spies(3), []
    zero, real = Zero(model, units=list(model.blocks), stage=stage, activation_checkpointing=recompute), Unit.fetch

    def fetch(unit):
        whole = real(unit)
        fetched.append((unit.name, StorageWeakRef(whole.untyped_storage())))
        return whole

    with mock.patch.object(Unit, "fetch", fetch):
        loss = model(torch.randn(4, 64)).sum()
        assert [block.inner.expired() for block in model.blocks] == [recompute] * 3
        assert [weights.expired() for _, weights in fetched] == [stage == 3] * 3
        zero.backward(loss)
    assert [block.forwards for block in model.blocks] == [1 + recompute] * 3
    names = ["blocks.0", "blocks.1", "blocks.2"]
    assert stage == 0 or [name for name, _ in fetched] == [*names, *reversed(names)]


@pytest.mark.parametrize("options", [{"stage": 3}, {"stage": 0, "offload": ("acts",)}])
def test_a_graph_that_is_dropped_is_freed(options):
    """A forward with gradients whose loss is thrown away leaves nothing behind: what the hooks keep for backward
    must not refer back to the graph that keeps it."""
    model = spies(2)
    Zero(model, units=list(model.blocks), **options)
    model(torch.randn(4, 64)).exp()
    assert [block.inner.expired() for block in model.blocks] == [True, True]


@pytest.mark.slow  # half a minute each, and on the loopback device it must be alone
@pytest.mark.parametrize("peer, memory, wire", [("stage 0", 4, 1), ("stage 1", 3, 1), ("stage 2", 2.5, 1),
                                                ("stage 3", 2, 1.5)])
def test_bytes_as_the_operating_system_counts_them(peer, memory, wire):
    """Two ranks, growth from 4 to 12 layers in units of 4 bytes per parameter: peak resident memory and bytes on the
    loopback device follow the formulas to 3 %. (gloo's own reduce-scatter, an all-reduce in disguise, would show.)"""
    slope = bench_zero.slopes(2, peer)
    assert (slope["peak"], slope["sent"]) == (pytest.approx(memory, rel=0.03), pytest.approx(wire, rel=0.03))


# ---- generation, and several models

def generation(stage):
    model, plain = gpt(), gpt()
    zero = Zero(model, units=model.units(), stage=stage)
    rank, ids = zero.comm.rank, torch.arange(8)[None]
    zero.backward(loss_of(model, batches(3, 1)[0, rank, 0], 72))
    grads = [unit.grad.clone() for unit in zero.units]
    with torch.no_grad():
        assert torch.equal(model(ids), plain(ids))  # an evaluation between backward and step
    with contextlib.suppress(ZeroDivisionError), zero.gathered(), counted() as (sent, _):
        for _ in range(rank + 1):  # each rank a different number of forwards
            new = generate(model, [[1, 2, 3]], max_new_tokens=4 + rank, seeds=[rank])
        assert not sent and not model(ids).requires_grad
        assert torch.equal(model.embed.weight, plain.embed.weight)
        raise ZeroDivisionError
    assert not zero.is_gathered and "weight" not in model.embed.__dict__
    assert all(torch.equal(a, unit.grad) for a, unit in zip(grads, zero.units))
    assert new == generate(plain, [[1, 2, 3]], max_new_tokens=4 + rank, seeds=[rank])
    return zero.step(LR, CLIP).norm


def test_generation_with_ragged_lengths():
    """gathered(): no collective inside, so ranks may generate different lengths; the same tokens as the plain model;
    an exception leaves no weights behind; evaluation outside leaves the gradients alone."""
    for stage in (0, 3):
        assert len(set(ranks().run(3, generation, stage))) == 1


def four_models():
    actor, critic, reference, reward = (gpt(seed=i) for i in range(4))
    za, zc = (Zero(m, units=m.units(), stage=stage, lr=LR, weight_decay=DECAY)
              for m, stage in ((actor, 3), (critic, 2)))
    frozen = [Zero(m, units=m.units(), stage=3, frozen=True, offload=offload, dtype=dtype)
              for m, offload, dtype in ((reference, (), torch.float32), (reward, ("params",), torch.float32),
                                        (gpt(), (), torch.bfloat16))]
    for step in batches(2, 1):
        ids = step[za.comm.rank, 0]
        with torch.no_grad(), counted() as (sent, _):
            score = loss_of(reward, ids, 48) - loss_of(reference, ids, 48)
        assert set(sent) == {"all_gather_single"}
        za.backward(loss_of(actor, ids, 48) * score)
        zc.backward((loss_of(critic, ids, 48) - score).square())
        za.step(LR, CLIP)
        zc.step(LR, CLIP)
    for zero in frozen:  # 16-bit weights of a frozen model have no float32 masters beside them
        assert zero.frozen and zero.optimizer is None
        assert sum(held(zero).values()) == sum(padded(2).values()) // 2 * zero.dtype.itemsize
    return za.full_state_dict(), zc.full_state_dict(), frozen[0].full_state_dict()


def test_four_models_in_one_process():
    """Actor, critic, reference and reward model interleaved: the trained ones equal plain training, the frozen ones
    stay, hold their weights' bytes alone, and send no gradients."""
    actor, critic, reference, reward = (gpt(seed=i) for i in range(4))
    optimizers = [adamw(model) for model in (actor, critic)]
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
    states = ranks().run(2, four_models)[0]
    assert all(near(state, model.state_dict(), 1e-5) for state, model in zip(states, (actor, critic)))
    assert_equal(states[2], reference.state_dict())


# ---- building

def born_on_meta(stage):
    config = GPTConfig(vocab_size=33, n_layer=2, n_head=2, n_embd=16, max_seq_len=12)
    with torch.device("meta"):
        model = GPT(config)
    built, real = [], collectives.materialise
    with mock.patch.object(collectives, "materialise", lambda p, d: built.append(real(p, d))):
        zero = Zero(model, units=model.units(), stage=stage, device="cpu",
                    init=lambda module, prefix: initialise(module, 7, prefix))
    assert len(built) == len(zero.units) and not any(p.is_meta for p in model.buffers())
    zero.backward(loss_of(model, batches(2, 1)[0, zero.comm.rank, 0], 48))
    zero.step(0.0)
    return zero.full_state_dict()


def test_building_unit_by_unit():
    """A model born on the meta device and initialised one unit at a time has the numbers of one built whole."""
    expected = GPT(GPTConfig(vocab_size=33, n_layer=2, n_head=2, n_embd=16, max_seq_len=12), seed=7).state_dict()
    for stage in (1, 3):
        assert_equal(ranks().run(2, born_on_meta, stage)[0], expected)


def seeded_by_rank():
    models = [gpt(seed=dist.get_rank()) for _ in range(3)]
    return [Zero(m, units=m.units(), stage=stage).full_state_dict() for m, stage in zip(models, (0, 1, 3))]


def test_ranks_that_were_seeded_differently_start_from_rank_0():
    """Every stage begins with rank 0's weights everywhere, not with a mixture."""
    for state in ranks().run(2, seeded_by_rank)[0]:
        assert_equal(state, gpt(seed=0).state_dict())


@pytest.mark.parametrize("options, words", [
    ({"stage": 4}, "--zero 4"), ({"offload": ("optimizer",)}, "--offload optimizer"),
    ({"stage": 2, "offload": ("optim", "params")}, "--zero 3"), ({"stage": 3, "offload": ("params",)}, "optim")])
def test_options_that_make_no_sense(options, words):
    """A UserError names the flag."""
    with pytest.raises(UserError, match=words):
        Zero(gpt(), units=[], **options)


def test_a_state_dict_is_a_copy():
    """What a caller keeps of it does not follow the training."""
    model = gpt()
    zero = Zero(model, units=model.units())
    before = zero.full_state_dict()
    zero.backward(loss_of(model, batches(1, 1)[0, 0, 0], 24))
    zero.step(LR)
    assert_equal(before, gpt().state_dict())
    assert not torch.equal(zero.full_state_dict()["embed.weight"], before["embed.weight"])


# ---- activations in host memory

@contextlib.contextmanager
def parking():
    """Park small activations too. Yields their shapes, in the order in which they were copied to the host."""
    shapes, real = [], Memory.park

    def park(memory, x):
        known = set(memory.parked.values())
        fetch = real(memory, x)
        shapes.extend([] if fetch in known else [tuple(x.shape)])
        return fetch

    with mock.patch.object(collectives, "PARK_BYTES", 64), mock.patch.object(Memory, "park", park):
        yield shapes


@pytest.mark.parametrize("stage, recompute, tied", itertools.product((0, 3), (False, True), (False, True)))
def test_activations_are_parked_once_and_weights_never(stage, recompute, tied):
    """Each large storage goes to the host once, however many views of it autograd saves, and comes back once;
    weights never; after backward nothing is left there. With checkpointing only the block inputs go."""
    model, back = gpt(tied), []
    weights = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
    zero = Zero(model, units=model.units(), stage=stage, offload=("acts",), activation_checkpointing=recompute)
    real = Memory.to_device
    with parking() as shapes, mock.patch.object(
            Memory, "to_device", lambda memory, x, dtype: back.append(x.data_ptr()) or real(memory, x, dtype)):
        loss = loss_of(model, batches(1, 1)[0, 0, 0], 24)
        assert len(zero.memory.parked) == len(shapes) > 0 and (not recompute or len(shapes) < 12)
        copies = {fetch: None for fetch in zero.memory.parked.values()}
        back.clear()  # of the weights that were fetched
        masters = {unit.master.data_ptr() for unit in zero.units}
        n, copies = len(copies), None
        zero.backward(loss)
    assert not weights & set(shapes)
    assert len([address for address in back if address not in masters]) == n and copies is None
    assert len(zero.memory.parked) == 0


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
    zero = Zero(model, units=[model[0]], offload=("acts",))
    with parking() as shapes:
        zero.backward(model(torch.randn(8, 16)).tanh().sum())
    assert shapes == [(8, 16)]


class SharesStorage(nn.Module):
    """Saves for backward one storage in two states, and as two types."""

    def __init__(self, in_place):
        super().__init__()
        self.linear, self.in_place = nn.Linear(16, 16), in_place

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
    twin, model, x = SharesStorage(False), nn.Sequential(SharesStorage(True)), torch.randn(4, 16)
    model[0].load_state_dict(twin.state_dict())
    twin(x).sum().backward()
    zero = Zero(model, units=[model[0]], offload=("acts",))
    with parking():
        zero.backward(model(x).sum())
    expected = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters()))
    assert zero.step(LR).norm == pytest.approx(expected, rel=1e-5)


class Spoils(nn.Linear):
    """Overwrites what sin() has saved for its backward pass."""

    def forward(self, x):
        h = super().forward(x)
        return h.sin() + h.mul_(2)


@pytest.mark.parametrize("options", [{}, {"stage": 3}, {"offload": ("acts",)}])
def test_a_saved_activation_that_is_overwritten_is_an_error(options):
    """As in plain PyTorch, which leaves this check to whoever sets saved-tensor hooks; not a wrong gradient."""
    model = nn.Sequential(Spoils(16, 16))
    zero = Zero(model, units=[model[0]], **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        zero.backward(model(torch.randn(4, 16)).sum())


# ---- on a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(offload=(), stage=3, dtype=torch.float32, nap=0):
    """Three updates of the small model on the GPU, all of its activations parked if any. nap: cycles that each stream
    sleeps before what the other one should wait for."""
    model = gpt().cuda()
    zero = Zero(model, units=model.units(), stage=stage, offload=offload, dtype=dtype, lr=LR, weight_decay=DECAY)
    real = zero.memory.put

    def late(*args, **options):
        with torch.cuda.stream(zero.memory.side):
            torch.cuda._sleep(nap)  # the copy comes late: who reads the host's memory must wait for it
        return real(*args, **options)

    with mock.patch.object(collectives, "PARK_BYTES", 64), mock.patch.object(zero.memory, "put", late):
        for step in batches(zero.comm.world, 2, steps=3):
            for ids in step[zero.comm.rank].cuda():
                loss = loss_of(model, ids, zero.comm.world * 48)
                torch.cuda._sleep(nap)  # the gradients come late: who copies them must wait for them
                zero.backward(loss)
            zero.step(LR, CLIP)
    return zero.full_state_dict()


@needs_cuda
def test_cuda_bytes_and_offload():
    """torch.cuda.memory_allocated grows by what stays on the device (each tensor in whole 512 bytes, and buffers).
    Parking activations changes no bit; the CPU's AdamW rounds otherwise than the GPU's, in the last bits."""
    states = []
    for offload in ((), ("acts",), ("optim",), ("optim", "params"), ("optim", "params", "acts")):
        gc.collect()  # a Zero and its model refer to each other: the one before may still be there
        before = torch.cuda.memory_allocated()
        large = GPT(GPTConfig(vocab_size=512, n_layer=2, n_head=4, n_embd=256, max_seq_len=64)).cuda()
        zero = Zero(large, units=large.units(), stage=3, offload=offload)
        on_device = torch.cuda.memory_allocated() - before - sum(buffer.nbytes for buffer in large.buffers())
        per_parameter = 0 if "params" in offload else 4 if "optim" in offload else 16
        expected = per_parameter * sum(unit.length for unit in zero.units)
        assert abs(on_device - expected) < 512 * 5 * len(zero.units) + 4096
        del large, zero
        states.append(on_cuda(offload))
    assert_equal(states[1], states[0])
    for state in states[2:]:
        assert all(torch.allclose(state[k], states[0][k], atol=1e-5) for k in state)


def digest():
    state = on_cuda(("optim", "params", "acts"))
    print(hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest())


@needs_cuda
def test_cuda_streams_do_not_race():
    """The copies run on a stream of their own. When either stream is late, or with CUDA_LAUNCH_BLOCKING=1, where no
    kernel runs beside another: the same bits."""
    for dtype in (torch.float32, torch.bfloat16):
        quick, late = (on_cuda(("optim", "params", "acts"), dtype=dtype, nap=nap) for nap in (0, 10**6))
        assert_equal(late, quick, dtype)
    tests = os.path.dirname(os.path.abspath(__file__))
    code = f"import sys; sys.path[:0] = [{os.path.dirname(tests)!r}, {tests!r}]; import test_zero; test_zero.digest()"
    found = {subprocess.run([sys.executable, "-c", code], env=os.environ | {"CUDA_LAUNCH_BLOCKING": blocking},
                            check=True, capture_output=True, text=True, timeout=120).stdout for blocking in "01"}
    assert len(found) == 1


def two_on_one_gpu():
    return [on_cuda(offload, stage) for stage in (0, 1, 2, 3)
            for offload in ((), ("optim",), *([("optim", "params")] if stage == 3 else []))]


@needs_cuda
def test_two_ranks_on_one_gpu():
    """Over gloo, since nccl refuses two ranks on one device: the weights of one process, at every stage."""
    expected, _ = one_process("untied", batches(2, 2, steps=3), 3)
    for state in ranks().run(2, two_on_one_gpu)[0]:
        assert near(state, expected, 1e-4)
