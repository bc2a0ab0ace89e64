"""ZeRO: every stage computes what one process computes, and holds and sends what the formulas say."""
import collections
import contextlib
import copy
import functools
import itertools
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from ranks import ranks
from torch.multiprocessing.reductions import StorageWeakRef

from lib import collectives
from lib.collectives import Comm, Memory
from lib.program import UserError
from model import GPT, GPTConfig, generate, initialise
from zero import Unit, Zero, data_parallel_step

LR, DECAY, CLIP = 1e-2, 0.1, 0.5
SMALL = {"vocab_size": 33, "n_layer": 2, "n_head": 2, "n_embd": 16, "max_seq_len": 12}
LARGER = GPTConfig(vocab_size=512, n_layer=2, n_head=4, n_embd=256, max_seq_len=64)


def gpt(tied=False, seed=0, **changes):
    """Nothing in it is zero: at birth the head is, and then no gradient reaches the blocks."""
    model = GPT(GPTConfig(**{**SMALL, "tie_embeddings": tied, **changes}), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return model


class Picky(nn.Linear):
    """Uses its bias now and then, and sees that no gradient is computed for what is frozen."""
    trained = True

    def forward(self, x, whole=True):
        assert self.weight.requires_grad == self.trained
        return F.linear(x, self.weight, self.bias if whole else None)


class Odd(nn.Module):
    """All that is awkward: a scalar parameter, a block with fewer elements than ranks, one never used, one
    that runs twice, two used (or their bias) in every other step, a frozen matrix, a frozen block."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.gain = nn.Embedding(33, 8), nn.Parameter(torch.tensor(1.3))
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(3, 5), Picky(8, 8),
                                     nn.Linear(8, 8), Picky(8, 8), nn.Linear(8, 8)])
        self.tiny = nn.ModuleList([nn.Linear(1, 1, bias=False)])
        self.register_buffer("offset", torch.tensor(0.7))
        self.blocks[3].trained = self.blocks[3].weight.requires_grad = False
        self.blocks[4].requires_grad_(False)

    def units(self):
        return [self.embed, *self.blocks, *self.tiny]

    def forward(self, ids, targets):
        x, even = self.embed(ids) * self.gain + self.offset, self.step % 2 == 0
        for block in (0, 1, 3, 0, 4, *((6,) if even else ())):  # 2 is never used, 0 runs twice
            x = x + self.blocks[block](x).tanh()
        x = x + self.blocks[5](x, even).tanh()
        x = x * self.tiny[0](x[..., :1])
        return F.linear(x, torch.ones(33, 8).tril()).log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def make(kind, seed=0):
    return Odd() if kind == "odd" else gpt(kind == "tied", seed)


def in_a_row(*blocks):
    model = nn.Sequential()
    model.blocks = nn.ModuleList(blocks)
    model.forward = lambda x: functools.reduce(lambda y, block: block(y).tanh(), model.blocks, x)
    return model


def batches(world, k, steps=2):
    """ids (steps, world, k, 2, 13): what each rank sees in each of k micro-batches of each step."""
    generator = torch.Generator().manual_seed(world * 10 + k)
    return torch.randint(0, 33, (steps, world, k, 2, 13), generator=generator)


def loss_of(model, ids, count):
    return -model(ids[:, :-1], ids[:, 1:]).sum() / count


def adamw(model):
    """PyTorch's own, with weight decay on matrices alone."""
    named = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in named if p.dim() >= 2], "weight_decay": DECAY},
              {"params": [p for p in named if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, fused=True)


# ---- the oracle is one process with the plain model, which adds gradients in a known order
# (and on one thread, see conftest.py: products that are split over threads differ in the last bit)

def one_process(kind, data, stage):
    """Train on the micro-batches of all ranks: (state_dict, norms). Stages 0-1 sum over micro-batches, then
    over ranks; stages 2-3 the other way round."""
    model, norms = make(kind), []
    named, optimizer = [p for p in model.parameters() if p.requires_grad], adamw(model)
    for model.step, step in enumerate(data):
        world, k = step.shape[:2]
        grads = [[torch.autograd.grad(loss_of(model, ids, world * k * 24), named, allow_unused=True)
                  for ids in rank] for rank in step]
        for i, p in enumerate(named):
            rows = [[gradients[i] for gradients in rank] for rank in grads]
            rows = rows if stage < 2 else zip(*rows)
            p.grad = torch.zeros_like(p) if grads[0][0][i] is None else functools.reduce(
                torch.add, (functools.reduce(torch.add, row) for row in rows))
        norms.append(math.sqrt(sum(p.grad.double().square().sum().item() for p in named)))
        for p in named if norms[-1] > CLIP else ():
            p.grad.div_(torch.tensor((norms[-1] + 1e-6) / CLIP))  # float32, as fused AdamW takes it
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, norms


def sharded(kind, data, stage, **options):
    """The same by the ranks of this job: (state_dict, on rank 0; norms). All begin with rank 0's weights."""
    model, norms = make(kind, seed=Comm().rank), []
    zero = Zero(model, units=model.units(), stage=stage, lr=LR, weight_decay=DECAY, **options)
    for model.step, step in enumerate(data):
        for ids in step[zero.comm.rank]:
            zero.backward(loss_of(model, ids, step.shape[0] * step.shape[1] * 24))
        norms.append(zero.step(LR, CLIP).norm)
    assert {unit.fetch().dtype for unit in zero.units} == {zero.dtype}
    return zero.full_state_dict(), norms


def many(cases, setting=contextlib.nullcontext):
    """Several sharded() runs in one job, within setting()."""
    with setting():
        return [sharded(*args, **options) for args, options in cases]


def near(state, expected, tolerance):
    return state.keys() == expected.keys() and all(
        (state[name] - expected[name]).abs().max() <= tolerance for name in expected)


def assert_equal(state, expected, label=""):
    assert state.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(state[name], expected[name])]
    assert not differing, (label, differing)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_stages_are_bitwise_one_process(world):
    """After two clipped steps the weights are bit for bit those of one process that adds the same gradients
    in the same order, and all ranks have its norms. (Stage 0 on 3 ranks: gloo's ring has its own order.)"""
    kinds = ("untied", 1, False), ("untied", 3, True), ("tied", 1, True), ("tied", 2, False)
    cases = [((kind, batches(world, k), stage), {"activation_checkpointing": recompute})
             for kind, k, recompute in kinds for stage in (0, 1, 2, 3)]
    answers = ranks().run(world, many, cases)  # a world of one has no process group
    oracle = functools.cache(lambda kind, k, order: one_process(kind, batches(world, k), order))
    for ((kind, data, stage), options), (state, norms) in zip(cases, answers[0]):
        expected, expected_norms = oracle(kind, data.shape[2], max(1, min(stage, 2)))
        label, ring = (world, kind, data.shape[2], stage, options), stage == 0 and world > 2
        assert norms == pytest.approx(expected_norms, rel=1e-5 if ring else 1e-12), label
        assert min(norms) > CLIP  # so that clipping is part of what is compared
        assert near(state, expected, 2e-6) if ring else assert_equal(state, expected, label) is None, label
    assert all([norms for _, norms in other] == [norms for _, norms in answers[0]] for other in answers)


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
    """On 3 ranks data_parallel_step, first in zero.py, computes what one process does, as all stages do."""
    (state, norms), *_ = ranks().run(3, ten_lines, batches(3, 2))
    expected, expected_norms = one_process("untied", batches(3, 2), 0)
    assert norms == pytest.approx(expected_norms, rel=1e-5) and near(state, expected, 2e-6)


def small_activations():
    return mock.patch.object(collectives, "PARK_BYTES", 64)  # park them too


def test_offload_changes_no_bit():
    """Optimizer, parameters and activations in host memory: the same bits at every stage."""
    data, first = batches(2, 2), {}
    variants = [(), ("optim",), ("acts",), ("optim", "acts")]
    cases = [(("untied", data, stage), {"offload": kinds, "activation_checkpointing": len(kinds) == 2})
             for stage in (0, 1, 2, 3) for kinds in [*variants, *[("optim", "params", "acts")][:stage // 3]]]
    for ((*_, stage), options), answer in zip(cases, ranks().run(2, many, cases, small_activations)[0]):
        state, norms = first.setdefault(stage, answer)
        assert_equal(answer[0], state, (stage, options))
        assert answer[1] == norms, (stage, options)


def poisoned_memory():
    """Memory that nobody has written holds NaN, as it may."""
    real = Memory.empty
    return mock.patch.object(Memory, "empty", lambda *args, **kw: real(*args, **kw).fill_(math.nan))


def test_odd_model():
    """All that is awkward, on 3 ranks, equals one process. (Not bitwise: the two uses of a block are added in
    another order.) What is frozen, and buffers, do not move."""
    data, before = batches(3, 2, steps=3), make("odd").state_dict()
    cases = [(("odd", data, stage), options) for stage in (0, 1, 2, 3)
             for options in ({}, {"activation_checkpointing": True}, {"offload": ("optim",)})]
    answers = ranks().run(3, many, cases, poisoned_memory)[0]
    for ((*_, stage), options), (state, norms) in zip(cases, answers):
        expected, expected_norms = one_process("odd", data, stage)
        assert norms == pytest.approx(expected_norms, rel=1e-5), (stage, options)
        assert near(state, expected, 5e-6), (stage, options)
        for name in ("blocks.3.weight", "blocks.4.weight", "blocks.4.bias", "offset"):
            assert torch.equal(state[name], before[name])


def compiled(cases):
    """(many(cases), what ran compiled) with a torch.compile that generates no code: PyTorch's kernels run."""
    torch._dynamo.reset()
    torch.cuda.is_available() and torch.cuda.init()  # else it begins in a checkpointed forward: refused
    real, ran = torch.compile, []

    def listening(f):
        run = real(f, backend="aot_eager")
        return lambda *args: ran.append(f.__qualname__) or run(*args)

    with mock.patch.object(torch, "compile", listening):
        return many(cases), ran


def test_compiled_blocks():
    """torch.compile of the blocks, and of them alone, changes the last bits at most, on one rank and on two.
    The blocks of several models are one function to it, which may have many variants. Off: nothing."""
    cases = [(("untied", batches(world, 2), stage), {"compile": True, "activation_checkpointing": world == 2})
             for world, stage in ((1, 0), (2, 3))]
    jobs = compiled(cases[:1]), ranks().run(2, compiled, cases[1:])[0]
    for ((kind, data, stage), _), (((state, norms),), ran) in zip(cases, jobs):
        expected, expected_norms = one_process(kind, data, 2)
        assert norms == pytest.approx(expected_norms, rel=1e-6)
        torch.testing.assert_close(state, expected)
        assert ran == ["Block.forward"] * (16 if stage else 8)  # 2 blocks 4 times, and again if recomputed
    assert torch._dynamo.config.recompile_limit >= 64
    assert compiled([(cases[0][0], {})])[1] == []


def lose_one(real, unit, gradients):
    real(unit, [None] * len(gradients) if unit.name == "blocks.0" and dist.get_rank() == 1 else gradients)


SEEDED_BUGS = {
    "lose one rank's gradient": (Unit, "reduce", lose_one, (1, 2, 3)),
    "swap chunks": (Comm, "reduce_scatter", lambda real, comm, x, dtype: real(
        comm, x.view(comm.world, -1).flip(0).flatten(), dtype), (1, 2, 3)),
    "shift by one": (Comm, "reduce_scatter", lambda real, comm, x, dtype: real(
        comm, x.roll(1), dtype), (1, 2, 3)),
    "divide twice": (Zero, "backward", lambda real, zero, loss: real(zero, loss / 2), (1, 2, 3)),
    "stale weights": (Unit, "fetch", lambda real, unit: vars(unit).setdefault("old", [real(unit)])[0], (3,)),
    "forget to publish": (Unit, "publish", lambda real, unit: None, (1, 2)),
    "the norm of one rank": (Comm, "all_reduce", lambda real, comm, x: None, (1, 2, 3)),
    "decay everything": (collectives, "take_out", lambda real, *args: [
        *(found := real(*args))[:2], len(found[0])], (1, 2, 3))}
BUGGY_RUNS = [(name, stage) for name, (*_, stages) in SEEDED_BUGS.items() for stage in stages]


def with_bugs():
    states = []
    for key, stage in BUGGY_RUNS:
        owner, name, bug, _ = SEEDED_BUGS[key]
        real = getattr(owner, name)
        with mock.patch.object(owner, name, lambda *args, bug=bug, real=real: bug(real, *args)):
            states.append(sharded("untied", batches(2, 1), stage)[0])
    return states


def test_seeded_bugs_turn_the_comparison_red():
    """Each of the bugs above changes the weights."""
    expected, _ = one_process("untied", batches(2, 1), 2)
    for run, state in zip(BUGGY_RUNS, ranks().run(2, with_bugs)[0]):
        assert not all(torch.equal(state[name], expected[name]) for name in expected), run


# ---- 16-bit weights, and steps that are left out

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_compute_dtypes(dtype):
    """Weights are of this dtype (see sharded), so activations are; masters are at least float32. All stages
    agree bitwise with each other, and the update is near the float32 one."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cases = [(("untied", batches(2, 1), stage), {"dtype": dtype}) for stage in (1, 2, 3)]
    answers, (expected, _) = ranks().run(2, many, cases)[0], one_process("untied", batches(2, 1), 2)
    for state, _ in answers:
        assert_equal(state, answers[0][0])
        assert {x.dtype for x in state.values()} == {wide}
        for name in expected:  # AdamW moves by about LR a step whatever the gradient's size
            error = (state[name] - expected[name]).abs()
            assert error.mean() < LR / 4 and error.max() < (1e-5 if dtype == wide else 4.1 * LR), name


def test_sixteen_bit_gradients_add_in_float32():
    """A bfloat16 sum of 300 micro-batches with a gradient of 1 + 2^-7 would stop growing at 256."""
    for stage in (0, 2):
        model = nn.Sequential(nn.Linear(1, 1, bias=False))
        zero = Zero(model, units=[model[0]], stage=stage, dtype=torch.bfloat16)
        for _ in range(300):
            zero.backward(model(torch.full((1, 1), 1 + 2**-7, dtype=torch.bfloat16)).sum())
        assert zero.step(0.0).norm == 300 * (1 + 2**-7)


OVERFLOWS, POISONED, GROWS = 1, 2, 3  # of five steps: inf on rank 1; NaN in one block there; 2000th good one


def scaled_by_zero(stage):
    model, history = gpt(), []
    zero = Zero(model, units=model.units(), stage=stage, dtype=torch.float16, lr=LR, weight_decay=DECAY)
    for step in range(5):
        zero.good_steps = 1999 if step == GROWS else zero.good_steps
        loss = loss_of(model, batches(2, 1)[0, zero.comm.rank, 0], 48)
        zero.backward(loss * (1e30 if step == OVERFLOWS and zero.comm.rank == 1 else 1.0))
        if step == POISONED and zero.comm.rank == 1:
            zero.units[2].grad[0] = math.nan
        history.append((zero.step(LR, CLIP), zero.loss_scale, zero.full_state_dict()))
    return history


def scaled_by_torch():
    """The same in one process: float32 masters, whose gradients are those of a float16 copy."""
    masters, history = gpt(), []
    optimizer, scaler = adamw(masters), torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2000)
    for step in range(5):
        if step == GROWS:
            scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": 1999})
        model, scale = copy.deepcopy(masters).half(), scaler.get_scale()
        for rank, ids in enumerate(batches(2, 1)[0, :, 0]):
            loss = loss_of(model, ids, 48) * (1e30 if step == OVERFLOWS and rank == 1 else 1.0)
            gradients = torch.autograd.grad(scaler.scale(loss), model.parameters())
            for p, gradient in zip(masters.parameters(), gradients):
                p.grad = gradient.float() if rank == 0 else p.grad + gradient
        if step == POISONED:
            masters.head.weight.grad.fill_(math.nan)
        scaler.unscale_(optimizer)
        norm = torch.cat([p.grad.double().flatten() for p in masters.parameters()]).norm().item()
        for p in masters.parameters():
            p.grad.div_(torch.tensor(max(1.0, (norm + 1e-6) / CLIP)))
        scaler.step(optimizer)
        scaler.update()
        history.append((norm, scale, scaler.get_scale(), copy.deepcopy(masters.state_dict())))
    return history


def test_loss_scale_is_that_of_torch():
    """As torch.amp.GradScaler, bit for bit, with clipping. If one rank overflows or has a NaN, all skip:
    weights stay, the scale halves. The step that earns a larger scale is itself unscaled by the old one."""
    expected = scaled_by_torch()
    assert [scale for _, scale, *_ in expected] == [2.0**16, 2.0**16, 2.0**15, 2.0**14, 2.0**15]
    for stage in (0, 1, 2, 3):
        history, other = ranks().run(2, scaled_by_zero, stage)
        for step, (mine, (norm, scale, next_scale, weights)) in enumerate(zip(history, expected)):
            info, scale_after, state = mine
            skips = step in (OVERFLOWS, POISONED)
            assert (info.skipped, info.loss_scale, scale_after) == (skips, scale, next_scale)
            assert info.norm == pytest.approx(norm, rel=1e-12) or skips
            assert_equal(state, weights, (stage, step))
        assert [str(info) for info, *_ in history] == [str(info) for info, *_ in other]


def test_counts_behind_the_loss_scale():
    """A skipped step starts the count of good ones anew, a good one that of skipped ones; the scale stays at
    least 1. A gradient of 0 changes nothing but is no failure. The 20th skip in a row is an error."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    zero = Zero(model, units=[], dtype=torch.float16)

    def update(factor=1.0):
        zero.backward(model(torch.full((1, 2), 0.1, dtype=torch.float16)).float().sum() * 0.1 * factor)
        return zero.step(0.0, CLIP).skipped

    zero.good_steps = 1999
    assert update(math.inf) and not update() and zero.loss_scale == 2.0**15
    zero.loss_scale = 1.0
    assert all(update(math.inf) for _ in range(19)) and zero.loss_scale == 1.0
    assert not update() and all(update(math.inf) for _ in range(19))
    before, updates = zero.full_state_dict(), zero.updates
    assert update(0.0) and zero.updates == updates
    assert_equal(zero.full_state_dict(), before)
    assert (zero.skipped, zero.good_steps) == (0, 1) and all(update(math.inf) for _ in range(19))
    with pytest.raises(UserError, match="20 steps"):
        update(math.inf)


# ---- bytes

@contextlib.contextmanager
def counted():
    """Yields (bytes that this rank sends, by collective; the peak of what fetched weights hold). A ring's
    all-reduce sends 2 (N-1)/N of a tensor, the others (N-1)/N of what all ranks have together."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    sent, peak, alive, real_fetch = collections.Counter(), [0], [], Unit.fetch

    def watch(name, share):
        real = getattr(dist, name)
        return mock.patch.object(dist, name, lambda *x, **g: sent.update({name: share(*x)}) or real(*x, **g))

    def fetch(unit):
        whole = real_fetch(unit)
        alive.append((StorageWeakRef(whole.untyped_storage()), whole.nbytes))
        peak[0] = max(peak[0], sum(n_bytes for storage, n_bytes in alive if not storage.expired()))
        return whole

    with (watch("all_reduce", lambda x: 2 * (world - 1) * x.nbytes // world),
          watch("all_gather_single", lambda whole, shard: (world - 1) * shard.nbytes),
          watch("all_to_all_single", lambda into, x: (world - 1) * x.nbytes // world),
          mock.patch.object(Unit, "fetch", fetch)):
        yield sent, peak


def held(zero):
    """Bytes of all vectors of all units, each storage counted once."""
    names = ("resident", "grad", "shard_grad", "master", "exp_avg", "exp_avg_sq")
    vectors = [getattr(unit, name, None) for unit in zero.units for name in names]
    storages = [vector.untyped_storage() for vector in vectors if vector is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


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
    """Counted over storages and collectives: the table at the head of zero.py with each unit's padding."""
    variants = {}, {"dtype": torch.bfloat16}, {"offload": ("optim",)}, {"activation_checkpointing": True}
    jobs = [(stage, k, options) for stage in (0, 1, 2, 3) for k in (1, 2) for options in variants]
    sizes = padded(world)
    total, rest = sum(sizes.values()), world - 1  # a rank sends its part to so many others
    shard, once = total // world, sizes["root"] + sizes["embed"]  # backward of an embedding needs no weights
    for (stage, k, options), (found, sent) in zip(jobs, ranks().run(world, bytes_of, jobs)[0]):
        p, offload, label = 2 if "dtype" in options else 4, "offload" in options, (stage, k, options)
        part = total if stage == 0 else shard
        weights, gradients = total * p if stage < 3 else 0, 4 * (total if stage < 2 else shard)
        masters = 4 * part if stage == 3 or p == 2 or offload else 0
        if offload and stage < 2:  # what was added up on the device goes to the host
            gradients += 4 * part
        upper = weights + gradients + masters + 8 * part
        assert upper - 8 * 16 * world * len(sizes) <= found <= upper, label  # the moments have no padding
        wire = {0: {"all_reduce": 2 * 4 * shard * rest},
                1: {"all_to_all_single": 4 * shard * rest, "all_gather_single": p * shard * rest},
                2: {"all_to_all_single": k * p * shard * rest, "all_gather_single": p * shard * rest},
                3: {"all_to_all_single": k * p * shard * rest,
                    "all_gather_single": k * p * (2 * total - once) // world * rest}}
        norm = {"all_reduce": 2 * rest * 8 * len(sizes) // world} if stage else {}
        assert sent == wire[stage] | norm, label


def test_report():
    """The bytes held by one rank, and those that one of four sends, are the table's."""
    holds = {torch.float32: (16, 16, 16, 16), torch.bfloat16: (18, 18, 18, 16)}  # per parameter
    sends = {torch.float32: (6, 6, 6, 9), torch.bfloat16: (6, 4.5, 3, 4.5)}
    for stage, dtype, frozen in itertools.product(range(4), holds, (False, True)):
        zero = Zero(GPT(LARGER), units=[], stage=stage, dtype=dtype, frozen=frozen)
        states, total = float(zero.report().split("held: ")[1].split()[0]), zero.units[0].numel / 2**20
        expected = total * (dtype.itemsize if frozen else holds[dtype][stage])
        assert states == pytest.approx(expected, abs=0.2), (stage, dtype, frozen)
        zero.comm.world = 4  # a frozen model is gathered once, forward
        sent = total * (0.75 * dtype.itemsize * (stage == 3) if frozen else sends[dtype][stage])
        assert float(zero.report().split()[-2]) == pytest.approx(sent, abs=0.06), (stage, dtype)


@pytest.mark.parametrize("recompute", [False, True])
def test_peak_of_gathered_weights(recompute):
    """At stage 3 the root's weights and one unit's are there at once, also of frozen units, which no reduce
    lets go. (On one rank: gloo's worker thread may hold a finished gather a moment longer.)"""
    sizes, model = padded(1), gpt()
    zero = Zero(model, units=model.units(), stage=3, activation_checkpointing=recompute)
    with counted() as (_, peak):
        zero.backward(loss_of(model, batches(1, 1)[0, 0, 0], 24))
    assert peak[0] == 4 * (sizes["root"] + sizes["blocks.0"]) and not zero.held
    model = in_a_row(*(nn.Linear(16, 16).requires_grad_(i in (0, 3)) for i in range(5)))
    zero = Zero(model, units=list(model.blocks), stage=3, activation_checkpointing=recompute)
    with counted() as (_, peak):
        zero.backward(model(torch.randn(4, 16)).sum())
    assert peak[0] == 4 * zero.units[0].shard_size and not zero.held


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
    """With activation checkpointing each block runs twice per micro-batch and its inner activations are gone
    between forward and backward. At stage 3 weights are gathered as often as without, and are gone as well.
    A graph whose loss is thrown away is freed: what the hooks keep does not refer back to it."""
    model, fetched, real = in_a_row(Spy(), Spy(), Spy()), [], Unit.fetch
    options = {"activation_checkpointing": recompute, "offload": ("acts",)}
    zero = Zero(model, units=list(model.blocks), stage=stage, **options)
    model(torch.randn(4, 64))
    assert [block.inner.expired() for block in model.blocks] == [True] * 3

    def fetch(unit):
        whole = real(unit)
        fetched.append((unit.name, StorageWeakRef(whole.untyped_storage())))
        return whole

    with mock.patch.object(Unit, "fetch", fetch):
        loss = model(torch.randn(4, 64)).sum()
        assert [block.inner.expired() for block in model.blocks] == [recompute] * 3
        assert [weights.expired() for _, weights in fetched] == [stage == 3] * 3
        zero.backward(loss)
    assert [block.forwards for block in model.blocks] == [2 + recompute] * 3
    names = ["blocks.0", "blocks.1", "blocks.2"]
    assert stage == 0 or [name for name, _ in fetched] == [*names, *reversed(names)]


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
    """gathered(): no collective inside, so ranks may generate different lengths; the same tokens as the plain
    model; an exception leaves no weights behind; evaluation outside leaves the gradients alone."""
    for stage in (0, 3):
        assert len(set(ranks().run(3, generation, stage))) == 1


def frozen_models():
    answers, ids = [], torch.arange(8)[None]
    for offload, dtype in (((), torch.float32), (("params",), torch.float32), (("params",), torch.bfloat16)):
        model = gpt()
        zero = Zero(model, units=model.units(), stage=3, frozen=True, offload=offload, dtype=dtype)
        with counted() as (sent, _):
            scores = model(ids)
        assert zero.frozen and zero.optimizer is None and set(sent) == {"all_gather_single"}
        assert torch.equal(scores, gpt().to(dtype)(ids)) and not scores.requires_grad
        answers.append(held(zero))
    return answers


def test_a_frozen_model_holds_its_shard_alone():
    """It computes what the plain model does. Beside 16-bit weights there are no float32 masters."""
    shard = sum(padded(2).values()) // 2
    assert ranks().run(2, frozen_models) == 2 * [[4 * shard, 4 * shard, 2 * shard]]


def born_on_meta(stage):
    with torch.device("meta"):
        model = GPT(GPTConfig(**SMALL))
    built = []
    zero = Zero(model, units=model.units(), stage=stage, device="cpu",
                init=lambda module, prefix: built.append(prefix) or initialise(module, 7, prefix))
    assert len(built) == len(zero.units) and not any(p.is_meta for p in model.buffers())
    zero.backward(loss_of(model, batches(2, 1)[0, zero.comm.rank, 0], 48))
    zero.step(0.0)
    return zero.full_state_dict()


def test_building_unit_by_unit():
    """A model born on the meta device and initialised unit by unit has the numbers of one built whole."""
    for stage in (1, 3):
        assert_equal(ranks().run(2, born_on_meta, stage)[0], GPT(GPTConfig(**SMALL), seed=7).state_dict())


@pytest.mark.parametrize("options, words", [
    ({"offload": ("disk",)}, "--offload disk"),
    ({"offload": ("optim", "params")}, "--zero 3"), ({"stage": 3, "offload": ("params",)}, "optim")])
def test_options_that_make_no_sense(options, words):
    """A UserError names the flag."""
    with pytest.raises(UserError, match=words):
        Zero(gpt(), units=[], **options)


# ---- activations in host memory

@contextlib.contextmanager
def parking():
    """Park small activations too. Yields the shapes of those that were copied to the host, in order."""
    shapes, real = [], Memory.park

    def park(memory, x):
        known = set(memory.parked.values())
        fetch = real(memory, x)
        shapes.extend([] if fetch in known else [tuple(x.shape)])
        return fetch

    with small_activations(), mock.patch.object(Memory, "park", park):
        yield shapes


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stage", [0, 3])
def test_weights_are_never_parked(stage, tied, recompute):
    """Activations alone go to the host until backward; of recomputed blocks, their inputs alone."""
    model = gpt(tied)
    weights = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
    options = {"offload": ("acts",), "activation_checkpointing": recompute}
    zero = Zero(model, units=model.units(), stage=stage, **options)
    with parking() as shapes:
        loss = loss_of(model, batches(1, 1)[0, 0, 0], 24)
        assert len(zero.memory.parked) > 0 and (not recompute or len(shapes) < 12)
        zero.backward(loss)
    assert not weights & set(shapes) and len(zero.memory.parked) == 0


class Saves(nn.Linear):
    """Makes autograd save a buffer, one storage in two states and as two types, and a tensor three times."""

    def __init__(self, in_place):
        super().__init__(16, 16)
        self.in_place = in_place
        self.register_buffer("gate", torch.linspace(1, 2, 64).view(4, 16))

    def forward(self, x):
        x = super().forward(x)
        first = x.sin()
        x = x.mul_(2) if self.in_place else x * 2
        second = x.cos()
        y = x * self.gate
        z = torch.view_as_complex(y.view(-1, 8, 2))
        return first + second + y.sin() + y.cos() + y.sinh() + torch.view_as_real(z * z).flatten(1)


def test_what_is_parked():
    """A storage goes to the host once, but again if it has changed or is read as another type. Buffers stay.
    The gradients are those of the same computation in fresh memory."""
    twin, model, x = Saves(False), nn.Sequential(Saves(True)), torch.randn(4, 16)
    model[0].load_state_dict(twin.state_dict())
    twin(x).sum().backward()
    zero = Zero(model, units=[model[0]], offload=("acts",))
    with parking() as shapes:
        zero.backward(model(x).sum())
    assert shapes == [*4 * [(4, 16)], (4, 8)]  # linear's input, x before and after, y, y as complex numbers
    expected = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters()))
    assert zero.step(LR).norm == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"stage": 3}, {"offload": ("acts",)}])
def test_a_saved_activation_that_is_overwritten_is_an_error(options):
    """As in plain PyTorch, which leaves this check to whoever sets saved-tensor hooks."""
    model = nn.Sequential(Saves(in_place=True))
    zero = Zero(model, units=[model[0]], **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        zero.backward(model(torch.randn(4, 16)).sum())
