"""The tiled attention: equal to the definition, its work and memory as promised, at home with autograd."""
import math
import random
import types

import pytest
import torch
from small_chat import random_model
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import flash_attention, naive_attention, sdpa_attention, simple_tiled_attention

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(seed, low, high, *shape):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed, B, H, G, Tq, Tk, D, dtype=torch.float64):
    """q (B, H, Tq, D), k and v (B, G, Tk, D) that want gradients, and a gradient for the output."""
    shapes = [(B, H, Tq, D), (B, G, Tk, D), (B, G, Tk, D), (B, H, Tq, D)]
    q, k, v, g = (normal(4 * seed + i, *shape, dtype=dtype) for i, shape in enumerate(shapes))
    return [x.requires_grad_() for x in (q, k, v)], g


def run(attention, qkv, g, **options):
    """[output, dq, dk, dv]"""
    out = attention(*qkv, **options)
    return [out, *torch.autograd.grad(out, qkv, g)]


def in_float64(qkv, g, **options):
    return run(naive_attention, [x.detach().double().requires_grad_() for x in qkv], g.double(), **options)


def assert_near(a, b, tolerance=1e-12, where=""):
    for name, x, y in zip(("out", "dq", "dk", "dv"), a, b):
        assert x.shape == y.shape and x.isfinite().all(), f"{where}{name} is off by its shape or not finite"
        error, largest = ((z.abs().max() if z.numel() else 0) for z in (x - y, y))
        assert error <= tolerance * max(1, largest), f"{where}{name} is off by {error:.1e}"


def random_case(seed):
    """Odd shapes, every option, small tiles so that all kinds of borders between them occur."""
    r = random.Random(seed)
    B, G, group, D = r.choice([1, 2, 3]), r.choice([1, 2, 3]), r.choice([1, 1, 2, 3]), r.choice([1, 3, 8])
    Tq = r.choice([1, r.randint(1, 40)])
    Tk = r.choice([Tq, r.randint(1, 40), r.randint(1, 40)])
    options = {"causal": r.random() < 0.6, "block": (r.choice([2, 5, 7, 16]), r.choice([3, 8, 16, 50]))}
    if r.random() < 0.6:
        ids = [integers(seed, -1, r.choice([1, 2, 5]), B, T) for T in (Tq, Tk)]
        if r.random() < 0.3:  # whole tiles of one id, in any order
            ids = [x.repeat_interleave(8, 1)[:, :x.shape[1]] for x in ids]
        if r.random() < 0.6:
            ids = [x.sort(dim=1).values for x in ids]
        options["segment_ids"], options["kv_segment_ids"] = ids
        if Tq == Tk and r.random() < 0.5:
            del options["kv_segment_ids"]
    return inputs(seed, B, G * group, G, Tq, Tk, D), options


def check_against_naive(module, seeds):
    for seed in seeds:
        (qkv, g), options = random_case(seed)
        module.SCORES_AT_ONCE = {"cpu": [200, 2**20][seed % 2]}  # few heads in a tile, or all
        plain = {name: value for name, value in options.items() if name != "block"}
        assert_near(run(module.flash_attention, qkv, g, **options), run(naive_attention, qkv, g, **plain),
                    where=f"case {seed}, {[tuple(x.shape) for x in qkv]}, {plain}: ")


def test_equals_naive_on_random_shapes(monkeypatch):
    """Output and gradients equal the definition's to 1e-12 in float64, over 300 shapes, with all options."""
    monkeypatch.setattr(kernels, "SCORES_AT_ONCE", None)  # restored at the end
    check_against_naive(kernels, range(300))


@pytest.mark.parametrize("T", [1, 64, 150])
def test_short_version_equals_naive_and_fast(T):
    """simple_tiled_attention: the definition's output and log-sum-exp, and the fast version's output."""
    (q, k, v), _ = inputs(0, 2, 3, 3, T, T, 8)
    out, L = simple_tiled_attention(q, k, v)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(2, 3) / math.sqrt(8)).masked_fill(future, -math.inf)
    torch.testing.assert_close(L, scores.logsumexp(-1, keepdim=True), rtol=1e-12, atol=1e-12)
    for other in (naive_attention, flash_attention):
        torch.testing.assert_close(out, other(q, k, v), rtol=1e-12, atol=1e-12)


def test_default_tiles_equal_naive_and_sdpa():
    """The three selectable attentions are one function, at lengths on both sides of the tile sizes."""
    shapes = [(2, 2, 1, 700, 700), (1, 4, 2, 130, 643), (2, 3, 3, 64, 64), (1, 1, 1, 1, 1), (3, 2, 1, 1, 600),
              (12, 6, 6, 129, 129)]
    for seed, (B, H, G, Tq, Tk) in enumerate(shapes):
        qkv, g = inputs(seed, B, H, G, Tq, Tk, 8)
        ids = torch.arange(Tk).expand(B, -1) // 150 + 7
        for options in ({}, {"causal": False}, {"segment_ids": ids[:, Tk - Tq:], "kv_segment_ids": ids}):
            exact = run(naive_attention, qkv, g, **options)
            assert_near(run(flash_attention, qkv, g, **options), exact)
            assert_near(run(sdpa_attention, qkv, g, **options), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding(dtype, monkeypatch):
    """One query without gradient takes no tiles, which would copy the cache. With padding and rows that see
    nothing, too, it is at most twice as far from the truth as PyTorch's kernel."""
    monkeypatch.setattr(kernels, "TiledAttention", None)
    for seed, (B, H, G, Tk) in enumerate([(3, 4, 2, 9), (1, 1, 1, 1), (2, 2, 1, 0), (4, 4, 2, 300)]):
        q, k, v = (x.detach() for x in inputs(seed, B, H, G, 1, Tk, 32, dtype)[0])
        ids = {"segment_ids": torch.zeros(B, 1, dtype=torch.long),
               "kv_segment_ids": integers(seed, -1, 2, B, Tk)}
        ids["segment_ids"][0] = -1  # sees nothing
        for large, options in ((1, {}), (10, {}), (1, ids)):
            exact = naive_attention(large * q.double(), k.double(), v.double(), **options)
            ours, sdpa = (f(large * q, k, v, **options) for f in (flash_attention, sdpa_attention))
            assert ours.dtype == dtype and ours.shape == q.shape
            rounding = 4 * torch.finfo(dtype).eps * exact.norm()
            assert (ours - exact).norm() <= 2 * (sdpa - exact).norm() + rounding


def test_no_leak_between_documents():
    """Changing one document, even to 1e30, leaves the outputs of the others bitwise as they were."""
    for border in (64, 100):
        (q, k, v), _ = inputs(1, 1, 2, 2, 256, 256, 8)
        ids = torch.arange(256)[None] // border
        before = flash_attention(q, k, v, segment_ids=ids)
        with torch.no_grad():
            k[:, :, :border], v[:, :, :border] = 1e30, 1e30
        assert torch.equal(flash_attention(q, k, v, segment_ids=ids)[:, :, border:], before[:, :, border:])


@pytest.mark.parametrize("Tk, options, blind", [
    (5, {"segment_ids": torch.tensor([[-1, -1, 0, 0, 3], [0, 0, 1, 1, -1]])}, [[0, 1], [4]]),
    (5, {"segment_ids": torch.tensor([[0, 1, 2, 3, 4]] * 2), "kv_segment_ids": torch.full((2, 5), -1)},
     [[0, 1, 2, 3, 4]] * 2),
    (2, {}, [[0, 1, 2]] * 2),  # the last query sees both keys, the one before it one, the others none
    (0, {}, [[0, 1, 2, 3, 4]] * 2)])
def test_rows_that_see_nothing(Tk, options, blind):
    """Padding, queries whose id no key has, more queries than keys: output exactly 0, gradients exactly 0."""
    qkv, g = inputs(2, 2, 2, 1, 5, Tk, 4)
    for block in (None, (2, 2)):
        out, dq, dk, dv = run(flash_attention, qkv, g, block=block, **options)
        for b, rows in enumerate(blind):
            assert not out[b, :, rows].any() and not dq[b, :, rows].any()
            seeing = [t for t in range(5) if t not in rows]
            assert out[b, :, seeing].all()
        assert torch.isfinite(dk).all() and torch.isfinite(dv).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_scores(dtype):
    """Scores of +-1e5, where exp overflows: no NaN, and as close as scores rounded to eps * 1e5 allow."""
    (q, k, v), g = inputs(3, 1, 2, 2, 200, 200, 16, dtype)
    qkv = [(q.detach() * 300).requires_grad_(), (k.detach() * 100).requires_grad_(), v]
    largest = (qkv[0] @ qkv[1].transpose(-1, -2)).abs().max() / 4
    assert largest > 1e5
    assert_near(run(flash_attention, qkv, g, block=(32, 64)), in_float64(qkv, g),
                8 * largest * torch.finfo(dtype).eps)


def test_recomputed_probabilities_sum_to_one():
    """Backward rounds large scores as forward did; otherwise 2^(S - L) would be off by eps * S. The gradient
    of v for a unit matrix is P^T, seen directly."""
    (q, k, v), _ = inputs(16, 1, 1, 1, 128, 128, 128, torch.float32)
    P_t, = torch.autograd.grad(flash_attention(1000 * q, k, v), v, torch.eye(128)[None, None])
    assert (P_t.sum(2) - 1).abs().max() < 3e-4  # eps * S is above 1e-3


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_errors_no_larger_than_sdpa(dtype):
    """Output and gradients are at most twice as far from the truth as those of PyTorch's kernel."""
    qkv, g = inputs(6, 1, 2, 2, 256, 256, 64, dtype)
    exact = in_float64(qkv, g)
    ours, sdpa = (max((a - b).norm() / b.norm() for a, b in zip(run(attention, qkv, g), exact))
                  for attention in (flash_attention, sdpa_attention))
    assert ours <= 2 * sdpa


@pytest.mark.parametrize("dtype, B, G", [(torch.float32, 2, 3), (torch.bfloat16, 1, 6)])
def test_any_layout_in_same_dtype_out(dtype, B, G):
    """Views as attention layers make them give bitwise what contiguous copies give, in the input's dtype."""
    qkv, g = normal(6, B, 50, 6 + 2 * G, 8, dtype=dtype), normal(7, B, 50, 6, 8, dtype=dtype).transpose(1, 2)
    views = [x.transpose(1, 2).requires_grad_() for x in qkv.split((6, G, G), 2)]  # (B, H or G, T, D)
    copies = [x.detach().contiguous().requires_grad_() for x in views]
    for a, b in zip(run(flash_attention, views, g), run(flash_attention, copies, g)):
        assert a.dtype == dtype and torch.equal(a, b)


def test_half_precision_products(monkeypatch):
    """On a GPU half-precision factors go into products with a float32 sum. Imitated: exact to bfloat16."""
    real = torch.baddbmm

    def multiply(x, a, b, out_dtype, **options):
        assert a.dtype == b.dtype == torch.bfloat16
        return real(x, a.to(out_dtype), b.to(out_dtype), **options)

    qkv, g = inputs(13, 2, 4, 2, 70, 70, 8, torch.bfloat16)
    exact = in_float64(qkv, g)
    monkeypatch.setattr(kernels, "dtypes", lambda x: (x.dtype, torch.float32))
    monkeypatch.setattr(torch, "baddbmm", multiply)
    for a, b in zip(run(flash_attention, qkv, g, block=(16, 32)), exact):
        assert (a - b).norm() <= 1e-2 * b.norm()


# ---- work and memory -------------------------------------------------------------------------------------

def scores_computed(monkeypatch, T, **options):
    """How many scores the forward pass computes, from the sizes of its products."""
    count, product = [0], kernels.product

    def counting(a, b, out, scale=1.0, add=False):
        count[0] += 0 if add else out.numel()  # the other product of the forward pass is added to acc
        return product(a, b, out, scale, add)

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "product", counting)
        flash_attention(*[torch.zeros(1, 1, T, 1)] * 3, **options)
    return count[0]


def test_tiles_nobody_sees_are_not_computed(monkeypatch):
    """Causal: the half below the diagonal and a tile's width. 8 documents in it: 1/6, in any order."""
    T = 4096
    one = scores_computed(monkeypatch, T)
    assert T * T / 2 < one <= T * (T + 256) / 2
    assert scores_computed(monkeypatch, T, causal=False) == T * T
    for ids in (torch.arange(T) // 512, torch.tensor([5, 0, 7, 3, 1, 6, 2, 4]).repeat_interleave(512)):
        assert scores_computed(monkeypatch, T, segment_ids=ids[None]) <= one / 6
    padded = torch.arange(T) // 512
    padded[512:] = -1
    assert scores_computed(monkeypatch, T, segment_ids=padded[None]) <= one / 48


class Peak(TorchDispatchMode):
    """bytes: the most that tensors made in this context held at once."""

    def __init__(self):
        super().__init__()
        self.bytes, self.made = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        storages = [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.made |= {StorageWeakRef(storage): storage.nbytes() for storage in storages}
        self.made = {storage: nbytes for storage, nbytes in self.made.items() if not storage.expired()}
        self.bytes = max(self.bytes, sum(self.made.values()))
        return out


def peak_of(attention, T):
    qkv, g = inputs(0, 1, 2, 2, T, T, 16, torch.float32)
    with Peak() as peak:
        run(attention, qkv, g)
    return peak.bytes


def test_memory_grows_with_T_not_with_its_square():
    """Forward + backward: twice the length takes twice the memory, but four times that of the definition."""
    assert peak_of(naive_attention, 1024) > 3.5 * peak_of(naive_attention, 512) > 2 * 4 * 512**2
    short, long = peak_of(flash_attention, 2048), peak_of(flash_attention, 4096)
    assert long <= 2.1 * short and long < 2 * 4 * 4096**2 / 8


# ---- together with PyTorch's other tools -----------------------------------------------------------------

def test_compiled_model():
    """torch.compile runs around both kernels and gives the same numbers, forward and backward."""
    model, ids = random_model(n_layer=1, n_head=4, n_kv_head=2).double(), integers(0, 0, 256, 2, 90)
    segment_ids = torch.arange(90).expand(2, -1) // 40

    def loss_and_gradients():
        logp, entropy, _ = model(ids, ids, segment_ids=segment_ids, with_stats=True)
        loss = logp.sum() + entropy.sum() + model(ids, ids, equal_weights=True).sum()
        return loss, *torch.autograd.grad(loss, model.parameters())

    plain = loss_and_gradients()
    torch._dynamo.reset()
    for module in (model.blocks[0], model.head):
        module.forward = torch.compile(module.forward, backend="aot_eager")
    torch.testing.assert_close(loss_and_gradients(), plain, rtol=1e-11, atol=1e-11)


def test_everything_saved_goes_through_the_hooks():
    """Hooks that put all aside and give back copies (offloading) change nothing, nor does checkpointing."""
    qkv, g = inputs(11, 1, 2, 1, 70, 70, 8)
    plain, seen = run(flash_attention, qkv, g), []
    with saved_tensors_hooks(lambda x: seen.append(x.numel()) or x.clone(), torch.clone):
        out = flash_attention(*qkv)
    with torch.no_grad():
        out.fill_(torch.nan)  # what the kernel kept must be the hooks' copy, not this tensor
    again = run(lambda *x: checkpoint(flash_attention, *x, use_reentrant=False), qkv, g)
    for a, b, c in zip(torch.autograd.grad(out, qkv, g), again[1:], plain[1:]):
        assert torch.equal(a, c) and torch.equal(b, c)
    assert sum(seen) == 3 * g.numel() + 2 * 70  # q, out, k and v of half as many heads, and one number a row


@pytest.mark.parametrize("q, k, v, ids", [
    ((1, 3, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8), {}), ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 5, 8), {}),
    ((2, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8), {}), ((2, 4, 8), (2, 4, 8), (2, 4, 8), {}),
    ((1, 2, 4, 8), (1, 2, 6, 8), (1, 2, 6, 8), {"segment_ids": torch.zeros(1, 4)}),
    ((2, 2, 4, 8), (2, 2, 4, 8), (2, 2, 4, 8), {"segment_ids": torch.zeros(1, 4)})])
def test_what_does_not_fit_is_refused(q, k, v, ids):
    """A ValueError, not an index out of range nor a result."""
    with pytest.raises(ValueError):
        flash_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), **ids)


# ---- the test of the tests -------------------------------------------------------------------------------

def mutant(old, new):
    """The module with one piece of its source replaced."""
    with open(kernels.__file__) as file:
        source = file.read()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    module = types.ModuleType("mutant")
    exec(source.replace(old, new), module.__dict__)
    return module


@pytest.mark.parametrize("old, new", [
    ("acc.mul_(shrink), add", "acc, add"),  # the rescale dropped from the numerator
    ("l.mul_(shrink).add_(", "l.add_("),  # and from the denominator
    ("torch.finfo(total).min", "-math.inf"),  # -inf - -inf where the first tile hides all from a row
    (".triu_(1)[:, None]", ".triu_(0)[:, None]"),  # the mask off by one: a query does not see itself
    (".triu_(1)[:, None]", ".triu_(2)[:, None]"),  # or sees one key of the future
    ("dP.sub_(delta[heads, :, rows])", "dP"),  # delta missing
    ("seen = i0 + self.Tk - self.Tq", "seen = i0"),  # causal aligned top-left
    ("(low_q <= high_k)", "(low_q < high_k)"),  # a document's last tile skipped
    ("if any(mask[", "if mask and all(mask["),  # a wide tile forgets that a part of it needs the mask
    ("range(0, len(self.k), self.heads)", "range(0, len(self.k) - self.heads + 1, self.heads)"),  # last heads
    ("= self.ids_q[heads, i0:i1, None]", "= self.ids_q[:len(a), i0:i1, None]"),  # ids of other heads
    ("q[heads, rows], dk[heads, keys], t.scale", "q[heads, rows], dk[heads, keys], 1.0")])  # scale of dk
def test_seeded_bugs_are_found(old, new):
    """A test of the tests: the check against naive fails on each of the classic mistakes."""
    with pytest.raises((AssertionError, RuntimeError), match="off by|case"):
        check_against_naive(mutant(old, new), range(60))
