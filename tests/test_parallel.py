"""train_parallel.py: each grid computes what one process computes, and holds and sends what formulas say."""
import contextlib
import copy
import datetime
import functools
import inspect
import math
import os
import shutil
import textwrap
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import RankFailed, ranks
from small_chat import curve, last, metrics, play, run_script, same_weights
from test_pretrain import arguments as pretrain_arguments
from torch.multiprocessing.reductions import StorageWeakRef

import lib.grid
import train_parallel as tp
from lib.collectives import Comm
from lib.grid import Whole, make_grid
from lib.program import UserError
from model import GPT, GPTConfig, load_model
from tools import parallel as paper
from zero import SCALARS, VECTORS, Zero, per_rank

V, T = 24, 12
SHAPE = {"vocab_size": V, "n_layer": 4, "n_head": 8, "n_kv_head": 4, "n_embd": 24, "head_width": 4,
         "mlp_hidden": 40, "max_seq_len": T, "attention": "naive"}  # H D is not C
GPT2 = {"norm": "layer", "position": "learned", "mlp": "gelu", "bias": True}
GRIDS = {2: [(1, 2, 1), (1, 1, 2)], 8: [(2, 2, 2)],
         4: [(2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 4, 1), (1, 1, 4)]}  # (data, tensor, pipeline)
FOUR = pytest.param(4, marks=pytest.mark.slow)


def random_gpt(seed=0, dtype=torch.float64, **changes) -> GPT:
    """Nothing in it is zero, gains included. At birth the head is: it hides all that comes before."""
    model, generator = GPT(GPTConfig(**{**SHAPE, **changes})).to(dtype), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=dtype) + (p.dim() == 1))
    return model


@functools.lru_cache
def batch(rows, seed=5) -> tuple:
    """(ids, targets, segment_ids), (rows, T) each. Several documents a row; a row without any target."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (rows, T), generator=generator)
    hidden = torch.rand(ids.shape, generator=generator) < 0.3
    hidden[1] = True
    begins = torch.rand(ids.shape, generator=generator) < 0.2
    return ids, ids.roll(-1, 1).masked_fill(hidden, -100), begins.long().cumsum(1)


def one_process(rows, micro=None, **changes) -> tuple:
    """(loss, {name: gradient}) of the plain model; micro: rows of a forward, for the last bits."""
    model, (ids, targets, segment_ids) = random_gpt(**changes), batch(rows)
    n, loss = (targets >= 0).sum().item(), 0.0
    for part in zip(*(x.split(micro or rows) for x in (ids, targets, segment_ids))):
        some = -model(part[0], part[1], segment_ids=part[2], equal_weights=True).sum() / n
        some.backward()
        loss += some.item()
    return loss, {name: p.grad for name, p in model.named_parameters()}


class Alone(Comm):
    """For a Zero of one process inside a job of several."""
    def __init__(self):
        self.rank, self.world = 0, 1


@functools.lru_cache
def on_meta(config: str) -> GPT:
    with torch.device("meta"):
        return GPT(eval(config))


def quick_gpt(config) -> GPT:
    """GPT(config) on the meta device; a copy is quicker than to draw numbers that are not there."""
    return copy.deepcopy(on_meta(repr(config)))


def build(N, M, P, sequence=False, stage=1, dtype=torch.float64, model=None, **options) -> tuple:
    """(part, whole) of this rank with the weights of random_gpt, as from a checkpoint of one process."""
    changes = {key: options.pop(key) for key in [*options] if key in GPTConfig.__dataclass_fields__}
    grid, model = make_grid(N, M, P, dist.get_rank(), sequence), model or random_gpt(dtype=dtype, **changes)
    with mock.patch.object(tp, "GPT", quick_gpt):
        part = tp.Part(model.config, grid, 0, dtype=dtype, stage=stage, device="cpu", **options)
    whole = Whole(part, quick_gpt(model.config), VECTORS, SCALARS)
    whole.load_shards([Zero(model, units=model.units(), dtype=dtype, comm=Alone()).state_shards()])
    return part, whole


def named(whole, key) -> dict:
    """{name: one of the whole model's vectors}; all ranks must call it."""
    return {places[0][0]: flat[start:start + shape.numel()].view(shape).clone()
            for _, slots, flat in whole.gathered(key) for start, shape, places in slots}


def gradients(part, rows, micro, schedule="1f1b") -> float:
    """Compute the gradients of batch(rows), summed over the grid. Returns this rank's loss."""
    N, d, P = part.grid.data.world, part.grid.data.rank, part.grid.down.world
    mine, n = [x[d::N] for x in batch(rows)], (batch(rows)[1] >= 0).sum().item()
    order = tp.schedule(schedule, part.grid.down.rank, P, -(-len(mine[0]) // micro))
    loss = tp.train_step(part, mine, micro, n, order)
    for unit in part.trained:
        unit.finish_gradients()
    return float(loss)


def measured(cases) -> list:
    """Of each case (grid, rows, micro, options), on each rank: loss, norm, gradients, weights, bytes sent."""
    answers = []
    for (N, M, P), rows, micro, options in cases:
        part, whole = build(N, M, P, **options)
        loss = gradients(part, rows, micro)
        norm, sent = part.squares().sqrt().item(), [axis.sent for axis in part.grid[:4]]
        answers.append((loss, norm, named(whole, "shard_grad"), whole.full_state_dict(), sent))
    return answers


def worst(found, expected) -> float:
    """The largest error of a gradient relative to its own size; one that is exactly 0, as that of a key's
    bias, to 1e-5 of the largest gradient."""
    assert found.keys() == expected.keys()
    least = 1e-5 * max(g.abs().max() for g in expected.values())
    return max(((found[name] - g).abs().max() / max(g.abs().max(), least)).item()
               for name, g in expected.items())


# ---- equality

VARIANTS = [{"attention": "flash"}, {"sequence": True, "tie_embeddings": True},
            {"sequence": True, "n_kv_head": 8, "activation_checkpointing": True, **GPT2},
            {"tie_embeddings": True, "stage": 0, **GPT2}]


@pytest.mark.parametrize("world", [2, 8, FOUR])
def test_every_gradient_is_that_of_one_process(world):
    """Loss and norm, and each gradient relative to its own size, to 1e-10 in float64, on every grid: grouped
    queries, several documents a row, uneven micro-batches, tied embeddings, GPT-2's parts, sequence parallel.
    And what a checkpoint would hold is, bit for bit, what the parts were made of."""
    cases = [(grid, 5 * grid[0], 2, {"n_layer": max(2, grid[2]), **options})
             for grid in GRIDS[world] for i, options in enumerate(VARIANTS)
             if world == 2 or grid == (1, 2, 2) or i % 2 == sum(grid) % 2]
    answers = ranks().run(world, measured, cases, timeout=300)
    for i, (grid, rows, _, options) in enumerate(cases):
        changes = {key: value for key, value in options.items() if key in GPTConfig.__dataclass_fields__}
        loss, expected = one_process(rows, **changes)
        found = sum(answer[i][0] for rank, answer in enumerate(answers) if rank % grid[1] == 0)
        norm = math.sqrt(sum(g.square().sum().item() for g in expected.values()))
        _, its_norm, its_gradients, weights, _ = answers[0][i]
        assert found == pytest.approx(loss, rel=1e-10), (grid, options)
        assert [answer[i][1] for answer in answers] == pytest.approx([norm] * world, rel=1e-12), grid
        assert worst(its_gradients, expected) < 1e-10, (grid, options)
        before = random_gpt(**changes).state_dict()
        assert weights.keys() == before.keys()
        assert all(torch.equal(weights[name], x) for name, x in before.items())


def replaced(owner, name, right, wrong):
    """Inside, `right` in the source of owner.name is `wrong`."""
    original, scope = inspect.unwrap(getattr(owner, name)), {}
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(right) == 1, f"{name}: found {source.count(right)} times {right!r}"
    exec(source.replace(right, wrong), original.__globals__, scope)
    return mock.patch.object(owner, name, scope[name])


PP, TP, SP, TIED = (((1, *grid), {"n_layer": 2, **options}) for grid, options in (
    ((1, 2), {}), ((2, 1), {}), ((2, 1), {"sequence": True}), ((1, 2), {"tie_embeddings": True})))
KNOWN = {  # bug, in brackets who has had it: (where, owner, function, right, wrong)
    "no f: a plain all_reduce in forward": (TP, tp, "operators", "(copy, total), ", "(copy, copy), "),
    "f and g swapped": (TP, tp, "operators", "(copy, total), (total, copy)", "(total, copy), (copy, total)"),
    "a g that sums both ways (torch.distributed.nn)": (TP, tp, "operators", "l, copy))", "l, total))"),
    "no sum over places": (SP, tp, "operators", "tensor.reduce_scatter(x.flatten(), wide).view(x.shape[1:])",
                           "x[tensor.rank].contiguous()"),
    "q_norm and k_norm not summed (Megatron 1446)": (TP, tp.Part, "add_up", '"q_norm", "k_norm"', '""'),
    "copies not summed over places (Megatron 7452)": (SP, tp.Part, "add_up", "sequence and", "False and"),
    "the mean, not the sum (gpt-neox 1259)": (TP, tp.Part, "add_up", "reduce(grad)", "reduce(grad.div_(2))"),
    "qkv cut like any other matrix": (TP, tp, "pieces", '"qkv": [', '"none": ['),
    "up cut like any other matrix": (TP, tp, "pieces", '"up": [', '"none": ['),
    "a token that is elsewhere read as row 0": (TP, tp, "split_embedding", " * here[..., None]", ""),
    "each rank subtracts its own maximum": (TP, tp, "split_logp", ".amax(0)", "[tensor.rank]"),
    "the wrong micro-batch": (PP, tp, "train_step", "popleft", "pop"),
    "not divided before backward (picotron)": (PP, tp, "train_step", "-y.sum() / n_tokens", "-y.sum()"),
    "the mean of means": (PP, tp, "train_step", "/ n_tokens", "/ (y != 0).sum() / 2"),
    "a tied matrix not summed (Megatron 844)": (TIED, tp.Part, "add_up", "grad += more", "pass"),
    "copies counted M times (TransformerEngine 715)": (TP, tp.Part, "counts", "not copied and", ""),
    "a tied matrix counted twice": (TIED, tp.Part, "counts", "self.c.tie_embeddings", "False"),
    "the norm of one stage (torchtitan 596)": (PP, tp.Part, "squares", "self.everyone", "self.comm")}


def with_bugs() -> list[bool]:
    """Whether the norm or a gradient is not that of one process, without a bug, and with each of them."""
    noticed, right = [], functools.lru_cache(lambda *changes: one_process(4, **dict(changes)))
    for (grid, options), *bug in [[where] for where in (PP, TP, TIED, SP)] + [*KNOWN.values()]:
        loss, expected = right(*((key, value) for key, value in options.items() if key != "sequence"))
        norm = math.sqrt(sum(g.square().sum().item() for g in expected.values()))
        with replaced(*bug) if bug else contextlib.nullcontext():
            (_, its_norm, found, _, _), = measured([(grid, 4, 2, options)])
        noticed.append(worst(found, expected) > 1e-7 or abs(its_norm / norm - 1) > 1e-7)
    return noticed


def test_known_bugs_are_noticed():
    """Each of these changes a gradient or the norm; some of them leave the loss as it is. None is here."""
    answer = ranks().run(2, with_bugs, timeout=300)[0]
    assert not any(answer[:4])
    assert all(answer[4:]), [name for name, seen in zip(KNOWN, answer[4:]) if not seen]


# ---- what is held and sent, and when

def test_schedules():
    """1F1B keeps at most P - stage micro-batches, GPipe all; each forward and backward once; and what the
    paper's timeline says: idle (P - 1) / (m + P - 1) of the time, if a backward takes two forwards."""
    for P in (1, 2, 3, 4):
        for m in {1, P - 1, P, 2 * P + 1} - {0}:
            for name in ("1f1b", "gpipe"):
                for stage in range(P):
                    order = tp.schedule(name, stage, P, m)
                    waits = [order[:i].count("F") - order[:i].count("B") for i in range(2 * m + 1)]
                    assert sorted(order) == ["B"] * m + ["F"] * m and min(waits) == 0
                    assert max(waits) == (m if name == "gpipe" else min(P - stage, m))
                lines = "".join(paper.timeline(name, P, m))
                assert lines.count(".") / len(lines) == pytest.approx((P - 1) / (m + P - 1))
    assert tp.schedule("1f1b", 1, 4, 6) == "FFFBFBFBFBBB" and tp.schedule("gpipe", 1, 4, 3) == "FFFBBB"
    assert paper.timeline("1f1b", 2, 3) == ["01..aa2bb.cc", ".0aa1bb2cc.."]


def pipelines(cases) -> list:
    """Of each case (P, m, schedule): the gradients, and how many micro-batches waited at most."""
    class Watched(tp.deque):
        def append(self, x):
            super().append(x)
            most.append(len(self))

    answers = []
    for P, m, schedule in cases:
        (part, whole), most = build(1, 1, P), []
        with mock.patch.object(tp, "deque", Watched):
            gradients(part, 2 * m + (m == 3), 2, schedule)
        answers.append((named(whole, "shard_grad"), max(most)))
    return answers


@pytest.mark.parametrize("P", [2, FOUR])
def test_pipelines_are_bitwise_one_process(P):
    """For as many micro-batches as stages, fewer and more, of unequal sizes. At most P - stage of them wait,
    of GPipe's all. No schedule ends in a circle of ranks that wait for each other."""
    cases = [(P, m, "1f1b") for m in sorted({1, P - 1, P, 2 * P + 1})] + [(P, 2 * P + 1, "gpipe")]
    answers = ranks().run(P, pipelines, cases, timeout=300)
    for i, (_, m, name) in enumerate(cases):
        _, expected = one_process(2 * m + (m == 3), 2)
        found, m = answers[0][i][0], m + (m == 3)
        assert all(torch.equal(found[name], g) for name, g in expected.items()), (P, m, name)
        assert [answer[i][1] for answer in answers] == [m if name == "gpipe" else min(P - stage, m)
                                                        for stage in range(P)]


LARGER = {"vocab_size": 48, "n_layer": 2, "n_head": 16, "n_kv_head": 8, "n_embd": 64, "head_width": 4,
          "mlp_hidden": 160, "max_seq_len": 64, "attention": "flash"}


def used(cases) -> list:
    """Of each case (grid, options): (bytes of model states, most bytes kept for backward, bytes sent by axis)
    of one step of 6 x 64 tokens in each replica, 2 rows at a time."""
    answers = []
    for grid, options in cases:
        options = {"dtype": torch.float32, **options}
        shape = LARGER | {"n_layer": max(2, grid[2])} | options.pop("shape", {})
        model = random_gpt(dtype=torch.float32, **shape)
        part, _ = build(*grid, model=model, **options)
        ids, kept, peak = torch.arange(6 * 64).view(6, 64) % 48, {}, [0]
        weights = {unit.resident.untyped_storage().data_ptr() for unit in part.trained}

        def pack(x, kept=kept, peak=peak, weights=weights):
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[StorageWeakRef(storage)] = storage.nbytes()
            return x.detach()

        def most(*_, kept=kept, peak=peak):  # is kept when a forward has ended
            alive = {ref.cdata: n for ref, n in kept.items() if not ref.expired()}
            peak[0] = max(peak[0], sum(alive.values()))

        order = tp.schedule("1f1b", part.grid.down.rank, grid[2], 3)
        for axis in part.grid[:4]:  # loading has published weights
            axis.sent = 0.0
        part.model.register_forward_hook(most)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            tp.train_step(part, (ids, ids.roll(-1, 1), ids * 0), 2, 1.0, order)
        part.step(1e-3, 1.0)
        vectors = [x for unit in part.trained for x in vars(unit).values() if isinstance(x, torch.Tensor)]
        held = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in vectors}.values())
        data, tensor, down, up = (axis.sent for axis in part.grid[:4])
        answers.append((held, peak[0], (data, tensor, down + up)))
    return answers


def predicted(rank, grid, sequence=False, stage=1, dtype=torch.float32, shape=(), **options) -> tuple:
    """The same by the formulas of tools/parallel.py."""
    cfg = tp.Config(data_parallel=grid[0], tensor=grid[1], pipeline=grid[2], sequence_parallel=sequence,
                    zero=stage, dtype=str(dtype)[6:], **options)
    c = GPTConfig(**LARGER | {"n_layer": max(2, grid[2])} | dict(shape))
    stage, r = rank // grid[1] % grid[2], rank % grid[1]
    _, padded, *_ = paper.numbers(cfg, c, stage, r)
    states = sum(per_rank(cfg.zero, grid[0], padded, padded, dtype.itemsize)[:4])
    most = dtype.itemsize * paper.kept(cfg, c, stage, 3, 2 * 64)
    return states, most, paper.sent(cfg, c, stage, r, 6 * 64)


@pytest.mark.parametrize("world", [2, 8, FOUR])
def test_bytes_are_the_formulas(world):
    """Bytes sent over each axis are those of tools/parallel.py, exactly: so there are two sums a block and
    direction, not five (picotron), no logits travel (picotron), and data parallelism sends once a step,
    however many micro-batches. What a rank holds and keeps at most is predicted within 5 %."""
    wide = {"shape": {"vocab_size": 768}}  # of a token the logits are more than a block
    variants = [wide, {"sequence": True}, {"shape": {"tie_embeddings": True}, "stage": 0},
                {"activation_checkpointing": True}, {"activation_checkpointing": True, "sequence": True},
                {"dtype": torch.bfloat16, "shape": GPT2}]
    cases = [(grid, variants[i]) for grid in GRIDS[world]
             for i in {2: range(0, 6, 5 if grid[2] > 1 else 1), 4: (sum(grid) % 2,), 8: (2,)}[world]]
    for rank, answer in enumerate(ranks().run(world, used, cases, timeout=300)):
        for (grid, options), (held, kept, sent) in zip(cases, answer):
            states, most, to_send = predicted(rank, grid, **options)
            assert sent == pytest.approx(to_send, rel=1e-12), (grid, options, rank)
            if not {"dtype", "activation_checkpointing"} & {*options}:
                assert held == states and kept == pytest.approx(most, rel=0.05), (grid, options, rank)


# ---- the parts alone

def parts_alone() -> list:
    grid, done = make_grid(1, 2, 1, dist.get_rank()), []
    f, g = tp.operators(grid.tensor, sequence=False)
    x, dy = (torch.full((2, 3, 4), 1.0 + i + dist.get_rank()) for i in range(2))
    for operator in (f, g):  # neither changes what it is given: others may hold it (picotron sums in place)
        leaf = x.clone().requires_grad_()
        operator(leaf).backward(dy)
        done.append(torch.equal(leaf, x) and bool((dy == 2.0 + dist.get_rank()).all()))
    generator = torch.Generator().manual_seed(1)
    z = 1e4 * torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 8, (3, 5), generator=generator)
    targets[0, :2], targets[1] = torch.tensor([3, 4]), -100  # both sides of the border between the ranks
    mine = z.chunk(2, -1)[grid.tensor.rank].contiguous().requires_grad_()
    logp = tp.split_logp(mine, torch.eye(4, dtype=torch.float64), targets, grid.tensor, g)
    z.requires_grad_()
    expected = -F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none").view(3, 5)
    dy = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    logp.backward(dy)
    expected.backward(dy)
    done.append(torch.allclose(logp, expected, rtol=1e-12, atol=1e-9))
    done.append(torch.allclose(mine.grad, z.grad.chunk(2, -1)[grid.tensor.rank], rtol=1e-10, atol=1e-12))
    return done


def test_operators_and_the_split_cross_entropy():
    """f and g leave their inputs alone. The loss of split logits as large as 1e4, with targets on both ranks,
    at their border and nowhere, is F.cross_entropy, and so is its gradient."""
    assert ranks().run(2, parts_alone) == [[True] * 4] * 2


def births(cases) -> list:
    """full_state_dict of new parts, and after three updates the bits of this rank's copies, by name."""
    answers = []
    for grid, sequence, changes in cases:
        axes, c = make_grid(*grid, dist.get_rank(), sequence), GPTConfig(**{**SHAPE, **changes})
        part = tp.Part(c, axes, 7, device="cpu", stage=1, lr=1e-2)
        with torch.device("meta"):
            state = Whole(part, GPT(c), VECTORS, SCALARS).full_state_dict()
        order = tp.schedule("1f1b", axes.down.rank, grid[2], 2)
        for step in range(3):
            mine = [x[axes.data.rank::grid[0]] for x in batch(4 * grid[0], seed=step)]
            tp.train_step(part, mine, 2, 50.0, order)
            part.step(1e-2, 0.5)
        views = {slot.places[0][0]: view for unit in part.trained
                 for slot, view in zip(unit.slots, unit.views(unit.resident))}
        copies = {name: view.tolist() for name, view in views.items() if name.split(".")[-2] not in tp.SPLIT}
        answers.append((state, copies))
    return answers


def test_a_new_model_is_that_of_one_process_and_its_copies_stay_equal():
    """Bit for bit GPT(config, seed), whatever the grid: ranks that drew their own shards with one seed, and
    with the fan-in of a shard, would be copies of each other (picotron). Norms have the same bits on all
    tensor ranks and replicas after updates, too."""
    cases = [((2, 2, 1), True, GPT2), ((1, 2, 2), False, {"tie_embeddings": True})]
    answers = ranks().run(4, births, cases, timeout=120)
    for i, (grid, _, changes) in enumerate(cases):
        state, expected = answers[0][i][0], GPT(GPTConfig(**{**SHAPE, **changes}), seed=7).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], x) for name, x in expected.items()), grid
        for rank, answer in enumerate(answers):
            assert answer[i][1] == answers[rank // grid[1] % grid[2] * grid[1]][i][1], (grid, rank)


def bubbles(m) -> tuple[float, float]:
    """(seconds at work, of a step), if a stage's forward sleeps for 0.1 s and its backward for 0.2 s."""
    (part, _), P = build(1, 1, dist.get_world_size()), dist.get_world_size()
    stage, ids = part.grid.down.rank, torch.arange(T).repeat(m, 1)
    block = part.model.blocks[tp.blocks_of(stage, P, part.c)[0]]
    block.attn.register_forward_hook(lambda *_: time.sleep(0.1))
    block.attn.register_full_backward_hook(lambda *_: time.sleep(0.2))
    for _ in range(2):  # the first step warms up
        dist.barrier()
        part.grid.down.waited, part.grid.up.waited, begun = 0.0, 0.0, time.perf_counter()
        tp.train_step(part, (ids, ids, ids * 0), 1, 1.0, tp.schedule("1f1b", stage, P, m))
        seconds = time.perf_counter() - begun
    return seconds - part.grid.down.waited - part.grid.up.waited, seconds


@pytest.mark.slow
def test_the_bubble_is_as_predicted():
    """(P - 1) / (m + P - 1) of the time, within a tenth of it. Slow: it needs an idle machine."""
    for P, m in (2, 4), (4, 4), (2, 1):
        busy, seconds = zip(*ranks().run(P, bubbles, m, timeout=120))
        assert 1 - sum(busy) / P / max(seconds) == pytest.approx((P - 1) / (m + P - 1), rel=0.1)


# ---- the script

def arguments(text, out, flags):
    return pretrain_arguments(text, out, f"--tokenizer bpe --vocab_size 264 --n_layer 4 --n_head 4 {flags}")


def on_grid(text, out, grid, flags=""):
    N, M, P = grid
    flags = f"--data_parallel {N} --tensor {M} --pipeline {P} {flags}"
    run_script("train_parallel", arguments(text, out, flags), N * M * P)


@pytest.fixture(scope="module")
def reference(text, tmp_path_factory):
    """20 updates of train_pretrain.py in one process."""
    out = tmp_path_factory.mktemp("reference")
    run_script("train_pretrain", arguments(text, out, "--sample_tokens 0"))
    return out


@pytest.mark.parametrize("grid, flags", [
    ((1, 2, 2), "--micro_batch_size 6 --sequence_parallel"),
    *(pytest.param(grid, flags, marks=pytest.mark.slow) for grids in GRIDS.values() for grid in grids
      for flags in ("--micro_batch_size 3", "--micro_batch_size 3 --schedule gpipe --zero 0"))])
def test_one_curve_on_every_grid(reference, text, tmp_path, grid, flags):
    """The loss of each of 20 updates, and of the evaluation, within 1e-5 of train_pretrain.py's. What it has
    saved is an ordinary model."""
    on_grid(text, tmp_path, grid, flags)
    for (_, a), (_, b) in zip(curve(reference), curve(tmp_path), strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    assert last(tmp_path, "eval_loss") == pytest.approx(last(reference, "eval_loss"), rel=1e-5)
    found, expected = (load_model(str(out))[0].state_dict() for out in (tmp_path, reference))
    for name, x in expected.items():
        assert (found[name] - x).abs().mean() < 1e-4, name


def test_a_grid_of_one_is_bitwise_train_pretrain(reference, text, tmp_path):
    run_script("train_parallel", arguments(text, tmp_path, ""))
    assert same_weights(tmp_path, reference)
    assert [loss for _, loss in curve(tmp_path)] == [loss for _, loss in curve(reference)]
    assert not any("bubble" in event for event in metrics(tmp_path))


@pytest.mark.parametrize("grid, other", [
    ((1, 1, 2), (1, 2, 1)), pytest.param((1, 2, 2), (2, 1, 2), marks=pytest.mark.slow)])
def test_any_grid_goes_on_from_any_other(text, tmp_path, grid, other):
    """From step 2 of 4 of a run on a grid: the same grid bit for bit, another one and train_pretrain.py to
    1e-5. (picotron's checkpoints are bound to their grid.)"""
    flags = "--steps 4 --save_every 2 --micro_batch_size 6"
    on_grid(text, tmp_path / "first", grid, flags)

    def half(name):
        shutil.copytree(tmp_path / "first", tmp_path / name)
        for done in ("step-00000004", "final"):
            shutil.rmtree(tmp_path / name / done)
        return tmp_path / name

    on_grid(text, half("same"), grid, f"{flags} --resume")
    assert same_weights(tmp_path / "first", tmp_path / "same")
    on_grid(text, half("other"), other, f"{flags} --resume")
    run_script("train_pretrain", arguments(text, half("plain"), f"{flags} --resume --sample_tokens 0"))
    for name in ("other", "plain"):
        assert len(curve(tmp_path / name)) == 4
        for (_, a), (_, b) in zip(curve(tmp_path / "first"), curve(tmp_path / name), strict=True):
            assert b == pytest.approx(a, rel=1e-5)


@pytest.mark.parametrize("flags, words", [
    ("--tensor 3", "--tensor 3: found 4 query heads, expected a multiple of 3"),
    ("--tensor 4 --n_kv_head 2", "--tensor 4: found 2 key/value heads"),
    ("--tensor 4 --vocab_size 266", "266 tokens in the vocabulary"),
    ("--tensor 4 --mlp_hidden 34", "34 columns in the MLP"),
    ("--tensor 2 --sequence_parallel --seq_len 23", "23 places in a row"),
    ("--pipeline 5", "--pipeline 5: found 4 blocks, expected at least 5"),
    ("--data_parallel 2", "found 1 processes, expected 2; start it with torchrun --nproc_per_node 2"),
    ("--init x", "--init"), ("--compile", "--compile"), ("--zero 2", "--zero"), ("--tensor 0", "--tensor 0")])
def test_what_does_not_fit_is_one_clear_line(text, tmp_path, flags, words):
    with pytest.raises(UserError) as error:
        tp.main(arguments(text, tmp_path / "out", flags))
    assert words in str(error.value) and "\\n" not in str(error.value) and not (tmp_path / "out").exists()


def told(argv, folder) -> list[str]:
    said = []
    with mock.patch("lib.run.Run.say", lambda run, text: said.append(text)):
        play("train_parallel", argv, folder)
    return said


def test_few_micro_batches_are_warned_of(text, tmp_path):
    """And the run says how long stages will idle, and logs how long they did, and what was sent."""
    flags = "--pipeline 2 --steps 1 --batch_size 4"
    for micro, m, share in (2, 2, "33%"), (4, 1, "50%"):
        argv = arguments(text, tmp_path / f"{m}", f"{flags} --micro_batch_size {micro}")
        said = "\n".join(ranks().run(2, told, argv, os.getcwd())[0])
        assert f"(P - 1) / (m + P - 1) = {share}" in said
        assert ("warning: 1 micro-batches" in said) == (m == 1)
        event = metrics(tmp_path / f"{m}")[0]
        assert 0 < event["bubble"] < 1 and "sent_tensor" not in event
        assert event["sent_down"] == 4 * 24 * 32 * 4  # 4 rows of 24 places, 32 wide, in float32


def dies(how) -> None:
    """A rank that ends, or falls silent, between two micro-batches."""
    with mock.patch.object(lib.grid, "PATIENCE", datetime.timedelta(seconds=3)):
        part, _ = build(1, 2, 2)
    for n in range(3):
        if n == 2 and dist.get_rank() == 3:
            os._exit(1) if how == "killed" else time.sleep(9)
        gradients(part, 6, 2)


@pytest.mark.parametrize("how", ["killed", pytest.param("silent", marks=pytest.mark.slow)])
def test_a_dying_rank_ends_all(how):
    """All other ranks end with an error: at once if it died, else after the patience of their group."""
    begun = time.monotonic()
    with pytest.raises(RankFailed) as failure:
        ranks().run(4, dies, how, timeout=60, patience=3)
    assert all(answer is None or answer[0] == "error" for answer in failure.value.answers)
    assert [answer is None for answer in failure.value.answers] == [False, False, False, how == "killed"]
    assert time.monotonic() - begun < 40
