"""The tiled attention: equal to the ten-line definition, in memory and work what it promises, and at home with
autograd's other tools."""
import json
import random
import types

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernels
from bench import attention as bench
from kernels import flash_attention, naive_attention, sdpa_attention

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator_of(seed), dtype=torch.float64).to(dtype)


def inputs(seed, B, H, G, Tq, Tk, D, dtype=torch.float64):
    """q (B, H, Tq, D), k and v (B, G, Tk, D) that want gradients, and a gradient for the output."""
    shapes = [(B, H, Tq, D), (B, G, Tk, D), (B, G, Tk, D), (B, H, Tq, D)]
    q, k, v, g = (normal(4 * seed + i, *shape, dtype=dtype) for i, shape in enumerate(shapes))
    return [x.requires_grad_() for x in (q, k, v)], g


def output_and_gradients(attention, qkv, g, **options):
    out = attention(*qkv, **options)
    return out, *torch.autograd.grad(out, qkv, g)


def assert_equal(a, b, tolerance=1e-12):
    for name, x, y in zip(("out", "dq", "dk", "dv"), a, b):
        assert x.shape == y.shape and torch.isfinite(x).all(), name
        assert (x - y).abs().max() <= tolerance * max(1, y.abs().max()) if x.numel() else True, \
            f"{name} is off by {(x - y).abs().max():.1e}"


def random_case(seed):
    """Odd shapes, every option, small tiles so that all kinds of borders between them occur."""
    r = random.Random(seed)
    B, G, R, D = r.choice([1, 2, 3]), r.choice([1, 2, 3]), r.choice([1, 1, 2, 3]), r.choice([1, 3, 8])
    Tq = r.choice([1, r.randint(1, 40)])
    Tk = r.choice([Tq, r.randint(1, 40), r.randint(1, 40)])
    options = {"causal": r.random() < 0.6, "block": (r.choice([2, 5, 7, 16]), r.choice([3, 8, 16, 50]))}
    if r.random() < 0.3:
        options["scale"] = r.uniform(0.1, 2)
    if r.random() < 0.6:
        generator = generator_of(seed)
        ids = [torch.randint(-1, r.choice([1, 2, 5]), (B, T), generator=generator) for T in (Tq, Tk)]
        if r.random() < 0.6:
            ids = [x.sort(dim=1).values for x in ids]
        options["segment_ids"], options["kv_segment_ids"] = ids
        if Tq == Tk and r.random() < 0.5:
            del options["kv_segment_ids"]
    if r.random() < 0.25:  # whole tiles of one id, in any order: what is skipped and what is joined
        Tq = Tk = 32
        options["block"] = 8, 32
        options["segment_ids"] = torch.randint(0, 3, (B, 4), generator=generator_of(seed)).repeat_interleave(8, 1)
        options.pop("kv_segment_ids", None)
    return inputs(seed, B, G * R, G, Tq, Tk, D), options


def check_against_naive(module, seeds):
    for seed in seeds:
        (qkv, g), options = random_case(seed)
        module.SCORES_AT_ONCE = {"cpu": [200, 2**20][seed % 2]}  # few heads in a tile, as in large batches; or all
        plain = {name: value for name, value in options.items() if name != "block"}
        try:
            assert_equal(output_and_gradients(module.flash_attention, qkv, g, **options),
                         output_and_gradients(naive_attention, qkv, g, **plain))
        except AssertionError as error:
            shapes = [tuple(x.shape) for x in qkv]
            raise AssertionError(f"case {seed}, {shapes}, {plain}: {error}") from None


def test_equals_naive_on_random_shapes(monkeypatch):
    """Output and gradients equal the definition's to 1e-12 in float64, over 300 shapes with all sorts of options."""
    monkeypatch.setattr(kernels, "SCORES_AT_ONCE", None)  # restored at the end
    check_against_naive(kernels, range(300))


def test_default_tiles_equal_naive_and_sdpa():
    """The three selectable attentions are one function, at lengths on both sides of the tile sizes."""
    shapes = [(2, 2, 1, 700, 700), (1, 4, 2, 130, 643), (2, 3, 3, 64, 64), (1, 1, 1, 1, 1), (3, 2, 1, 1, 600),
              (12, 6, 6, 129, 129)]
    for seed, (B, H, G, Tq, Tk) in enumerate(shapes):
        qkv, g = inputs(seed, B, H, G, Tq, Tk, 8)
        ids = torch.arange(Tk).expand(B, -1) // 150 + 7
        for options in ({}, {"causal": False}, {"segment_ids": ids[:, Tk - Tq:], "kv_segment_ids": ids}):
            exact = output_and_gradients(naive_attention, qkv, g, **options)
            assert_equal(output_and_gradients(flash_attention, qkv, g, **options), exact)
            assert_equal(output_and_gradients(sdpa_attention, qkv, g, **options), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_query_without_gradient(dtype):
    """Decoding has a way of its own: the numbers of the definition, grouped heads, padding and blind rows included."""
    for seed, (B, H, G, Tk) in enumerate([(3, 4, 2, 9), (1, 1, 1, 1), (2, 6, 6, 70), (2, 2, 1, 0)]):
        qkv = [x.detach() for x in inputs(seed, B, H, G, 1, Tk, 8, dtype)[0]]
        ids = {"segment_ids": torch.zeros(B, 1, dtype=torch.long),
               "kv_segment_ids": torch.randint(-1, 2, (B, Tk), generator=generator_of(seed))}
        ids["segment_ids"][0] = -1  # sees nothing
        for options in ({}, {"scale": 0.7}, ids):
            exact = naive_attention(*(x.double() for x in qkv), **options)
            found = flash_attention(*qkv, **options)
            assert found.dtype == dtype and found.shape == qkv[0].shape
            assert torch.allclose(found.double(), exact, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("large", [1, 10])
def test_one_query_errors_no_larger_than_sdpa(dtype, large, monkeypatch):
    """Decoding is at most twice as far from the truth as PyTorch's kernel, in half precision also where scores are
    large; and no dtype takes the way of tiles, which would copy the whole cache at every token."""
    monkeypatch.setattr(kernels, "tiled_attention", None)
    q, k, v = (x.detach() for x in inputs(15, 4, 4, 2, 1, 300, 32, dtype)[0])
    exact = naive_attention(large * q.double(), k.double(), v.double())
    ours, sdpa = ((f(large * q, k, v) - exact).norm() for f in (flash_attention, sdpa_attention))
    assert ours <= 2 * sdpa + torch.finfo(torch.float64).eps * exact.norm()


@pytest.mark.parametrize("seed", range(6))
def test_gradcheck(seed):
    """The gradient is the derivative: finite differences in float64, with every option somewhere."""
    B, H, G, Tq, Tk, D = [(1, 1, 1, 5, 5, 3), (2, 4, 2, 3, 7, 2), (1, 2, 1, 6, 4, 1), (1, 3, 3, 1, 5, 2),
                          (2, 2, 2, 4, 4, 3), (1, 2, 2, 7, 7, 2)][seed]
    qkv, _ = inputs(seed, B, H, G, Tq, Tk, D)
    options = {"causal": seed != 4, "block": (2, 3), "scale": [None, 0.7][seed % 2]}
    if seed in (1, 5):
        options["segment_ids"] = torch.arange(Tq).expand(B, -1) // 2 - 1
        options["kv_segment_ids"] = torch.arange(Tk).expand(B, -1) // 2 - 1
    assert torch.autograd.gradcheck(lambda *x: flash_attention(*x, **options), qkv)


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_packed_documents_equal_separate_ones(order):
    """A row of packed documents gives each document what it gets alone; shuffled ids only rename them."""
    lengths = [3, 70, 1, 129, 40]
    qkv, g = inputs(0, 1, 4, 2, sum(lengths), sum(lengths), 8)
    names = torch.arange(len(lengths)) if order == "sorted" else torch.tensor([9, 2, 2**40, 0, 5])
    ids = names.repeat_interleave(torch.tensor(lengths))[None]
    packed = output_and_gradients(flash_attention, qkv, g, segment_ids=ids)
    pieces = zip(*(x.split(lengths, 2) for x in (*qkv, g)))
    separate = [output_and_gradients(naive_attention, [q, k, v], gradient) for q, k, v, gradient in pieces]
    assert_equal(packed, [torch.cat(parts, 2) for parts in zip(*separate)])


def test_no_leak_between_documents():
    """Changing one document, even to 1e30, leaves the outputs of the others bitwise as they were, at any border."""
    for border in (64, 100):
        (q, k, v), _ = inputs(1, 1, 2, 2, 256, 256, 8)
        ids = torch.arange(256)[None] // border
        before = flash_attention(q, k, v, segment_ids=ids)
        with torch.no_grad():
            k[:, :, :border], v[:, :, :border] = 1e30, 1e30
        after = flash_attention(q, k, v, segment_ids=ids)
        assert torch.equal(after[:, :, border:], before[:, :, border:])


@pytest.mark.parametrize("options, blind", [
    ({"segment_ids": torch.tensor([[-1, -1, 0, 0, 3], [0, 0, 1, 1, -1]])}, [[0, 1], [4]]),
    ({"segment_ids": torch.tensor([[0, 1, 2, 3, 4]] * 2), "kv_segment_ids": torch.full((2, 5), -1)},
     [[0, 1, 2, 3, 4]] * 2)])
def test_rows_that_see_nothing(options, blind):
    """Padding, and queries whose id no key has, give exactly 0 and get exactly zero gradients."""
    qkv, g = inputs(2, 2, 2, 1, 5, 5, 4)
    for block in (None, (2, 2)):
        out, dq, dk, dv = output_and_gradients(flash_attention, qkv, g, block=block, **options)
        for b, rows in enumerate(blind):
            assert not out[b, :, rows].any() and not dq[b, :, rows].any()
        assert torch.isfinite(dk).all() and torch.isfinite(dv).all()


def test_more_queries_than_keys():
    """Causal is aligned bottom-right: with Tq > Tk the first Tq - Tk queries see nothing and give 0."""
    qkv, g = inputs(3, 1, 2, 2, 9, 4, 4)
    out, dq, *_ = output_and_gradients(flash_attention, qkv, g)
    assert not out[:, :, :5].any() and not dq[:, :, :5].any() and out[:, :, 5:].all()


def test_no_keys_at_all():
    """Tk = 0 and B = 0 give zeros of the right shape."""
    assert not flash_attention(normal(0, 2, 2, 3, 4), normal(0, 2, 2, 0, 4), normal(0, 2, 2, 0, 4)).any()
    assert flash_attention(*[normal(0, 0, 2, 3, 4)] * 3).shape == (0, 2, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_scores(dtype):
    """Scores of +-1e5, where exp overflows: no NaN, and as close to the truth as scores rounded to eps * 1e5 allow."""
    for seed in range(4):
        (q, k, v), g = inputs(seed, 1, 2, 2, 200, 200, 16, dtype)
        qkv = [(q.detach() * 300).requires_grad_(), (k.detach() * 100).requires_grad_(), v]
        exact = output_and_gradients(naive_attention, [x.detach().double().requires_grad_() for x in qkv], g.double())
        largest = (qkv[0] @ qkv[1].transpose(-1, -2)).abs().max() / 4
        assert largest > 1e5
        assert_equal(output_and_gradients(flash_attention, qkv, g, block=(32, 64)), exact,
                     8 * largest * torch.finfo(dtype).eps)


def test_recomputed_probabilities_sum_to_one():
    """Where scores are large, those that backward makes are rounded as those of the forward pass were, or 2^(S - L)
    would be off by eps * S. With v's gradient for a unit matrix, P^T, seen directly."""
    (q, k, v), _ = inputs(16, 1, 1, 1, 128, 128, 128, torch.float32)
    P_t, = torch.autograd.grad(flash_attention(1000 * q, k, v), v, torch.eye(128)[None, None])
    assert (P_t.sum(2) - 1).abs().max() < 3e-4  # eps * S is above 1e-3


def test_maximum_that_rises_late():
    """The running maximum rises from -1e4 to +1e4 along the row, as in no random data: every tile must rescale."""
    qkv, g = inputs(5, 1, 1, 1, 64, 64, 4)
    with torch.no_grad():
        qkv[0][:] = 1
        qkv[1][:] = torch.linspace(-1e4, 1e4, 64)[:, None] / 2
    options = {"causal": False, "block": (16, 16)}
    assert_equal(output_and_gradients(flash_attention, qkv, g, **options),
                 output_and_gradients(naive_attention, qkv, g, causal=False), 1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_no_larger_than_sdpa(dtype):
    """Output and gradients are at most twice as far from the truth (80-bit floats) as those of PyTorch's kernel."""
    errors = bench.relative_errors(dtype)
    assert errors["ours"] <= 2 * errors["sdpa"], errors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, G", [(2, 3), (1, 6), (1, 3)])
def test_any_layout_in_same_dtype_out(B, G, dtype):
    """Views as attention layers make them give bitwise what contiguous copies give, in the dtype of the input."""
    qkv = normal(6, B, 50, 6 + 2 * G, 8, dtype=dtype)
    views = [x.transpose(1, 2).requires_grad_() for x in qkv.split((6, G, G), 2)]  # (B, H or G, T, D), strided in T
    copies = [x.detach().contiguous().requires_grad_() for x in views]
    g = normal(7, B, 50, 6, 8, dtype=dtype).transpose(1, 2)
    for a, b in zip(output_and_gradients(flash_attention, views, g), output_and_gradients(flash_attention, copies, g)):
        assert a.dtype == dtype and torch.equal(a, b)
    assert (flash_attention(*views) + 1).add_(1).shape == g.shape  # and may be changed in place


def test_half_precision_products(monkeypatch):
    """On a GPU half-precision factors go into products with a float32 sum. Imitated here: exact to bfloat16."""
    def multiply(a, b, out_dtype):
        assert a.dtype == b.dtype == torch.bfloat16
        return torch.matmul(a.to(out_dtype), b.to(out_dtype))

    qkv, g = inputs(13, 2, 4, 2, 70, 70, 8, torch.bfloat16)
    exact = output_and_gradients(naive_attention, [x.detach().double().requires_grad_() for x in qkv], g.double())
    monkeypatch.setattr(kernels, "dtypes", lambda x: (x.dtype, torch.float32))
    monkeypatch.setattr(torch, "bmm", multiply)
    for a, b in zip(output_and_gradients(flash_attention, qkv, g, block=(16, 32)), exact):
        assert (a - b).norm() <= 1e-2 * b.norm()


# ---- work and memory ------------------------------------------------------------------------------------------------

def scores_computed(monkeypatch, T, **options):
    """How many scores the forward pass computes, from the sizes of its products."""
    count, product = [0], kernels.product

    def counting(a, b, scale, out):
        count[0] += out.numel() * (a.shape[-1] == 1)  # over D = 1: scores, not P V
        return product(a, b, scale, out)

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "product", counting)
        patch.setattr(kernels, "add_product", lambda a, b, scale, out: None)
        flash_attention(*[torch.zeros(1, 1, T, 1)] * 3, **options)
    return count[0]


def test_tiles_nobody_sees_are_not_computed(monkeypatch):
    """Causal: the half below the diagonal and a tile's width. 8 packed documents: 1/6 of one, whatever their ids."""
    T = 4096
    one = scores_computed(monkeypatch, T)
    assert T * T / 2 < one <= T * (T + 256) / 2
    for ids in (torch.arange(T) // 512, torch.tensor([5, 0, 7, 3, 1, 6, 2, 4]).repeat_interleave(512)):
        assert scores_computed(monkeypatch, T, segment_ids=ids[None]) <= one / 6
    torn = torch.tensor([0, 1, 0, 1]).repeat_interleave(1024)  # each document in two pieces, the other one between them
    assert scores_computed(monkeypatch, T, segment_ids=torn[None]) <= 0.65 * one
    assert scores_computed(monkeypatch, T, causal=False) == T * T


def test_a_row_of_the_batch_does_not_pay_for_its_neighbours(monkeypatch):
    """Room for a row and a third in a tile: rows with other borders between their documents are computed apart."""
    count, product = [], kernels.product
    monkeypatch.setattr(kernels, "SCORES_AT_ONCE", {"cpu": 4 * 64 * 256})
    monkeypatch.setattr(kernels, "product", lambda a, b, s, out: count.append(out.numel()) or product(a, b, s, out))
    ids = torch.stack([torch.arange(256) // border for border in (64, 128, 100)])
    qkv = [torch.zeros(3, 3, 256, 1)] * 3
    flash_attention(*qkv, segment_ids=ids)
    together = sum(count)
    count.clear()
    for b in range(3):
        flash_attention(*(x[b:b + 1] for x in qkv), segment_ids=ids[b:b + 1])
    assert together == sum(count)


def test_memory_grows_with_T_not_with_its_square():
    """Forward + backward at T = 4096 take a tenth of what one score matrix would, measured in a fresh process."""
    extra = bench.in_fresh_process(bench.attention_memory, "ours", (1, 4, 4096, 32))
    assert extra < 4 * 4096**2 * 4 / 10


@pytest.mark.slow
def test_memory_against_sdpa():
    """At T = 16384 the peak is at most 1.25 times PyTorch's kernel's; from 2048 to 8192 it grows by 4, within 10 %."""
    ours, sdpa = (bench.in_fresh_process(bench.attention_memory, p, (1, 4, 16384, 64)) for p in ("ours", "sdpa"))
    assert ours <= 1.25 * sdpa
    short, long = (bench.in_fresh_process(bench.attention_memory, "ours", (8, 8, T, 64)) for T in (2048, 8192))
    assert 3.6 <= long / short <= 4.4


# ---- together with PyTorch's other tools ----------------------------------------------------------------------------

@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_without_graph_break(backend, monkeypatch):
    """torch.compile(fullgraph=True) takes it as one operator, with the same numbers forward and backward."""
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # its key does not see how we differentiate
    qkv, g = inputs(8, 2, 4, 2, 90, 90, 8, torch.float32)
    ids = torch.arange(90).expand(2, -1) // 40

    def f(q, k, v):
        return flash_attention(q.sin().transpose(1, 2).contiguous().transpose(1, 2), k, v, segment_ids=ids) * 2

    compiled = torch.compile(f, fullgraph=True, backend=backend)
    assert_equal(output_and_gradients(compiled, qkv, g), output_and_gradients(f, qkv, g), 1e-5)


def test_autocast():
    """Under autocast it computes in bfloat16, as PyTorch's kernel does, and hands float32 gradients back; also when the
    backward pass runs inside the autocast region."""
    qkv, g = inputs(9, 1, 2, 2, 40, 40, 8, torch.float32)
    half = [x.detach().bfloat16().requires_grad_() for x in qkv]
    plain = output_and_gradients(flash_attention, half, g.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = output_and_gradients(flash_attention, qkv, g.bfloat16())
    assert cast[0].dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in cast[1:])
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(cast, plain))
    one = [x.detach()[:, :, -1:] if i == 0 else x.detach() for i, x in enumerate(half)]  # decoding
    ours = flash_attention(*one)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # its float32 scores are not to be cast
        assert torch.equal(flash_attention(*one), ours)
        assert flash_attention(*(x.detach().double() for x in qkv)).dtype == torch.float64  # and float64 is left alone


def test_activation_checkpointing():
    """Recomputed in the backward pass: bitwise the same gradients."""
    qkv, g = inputs(10, 1, 2, 1, 70, 70, 8)
    again = output_and_gradients(lambda *x: checkpoint(flash_attention, *x, use_reentrant=False), qkv, g)
    for a, b in zip(again, output_and_gradients(flash_attention, qkv, g)):
        assert torch.equal(a, b)


def test_everything_saved_goes_through_the_hooks():
    """saved_tensors_hooks that put everything aside and hand back copies (offloading) change nothing."""
    qkv, g = inputs(11, 1, 2, 2, 70, 70, 8)
    plain = output_and_gradients(flash_attention, qkv, g)
    seen = []

    def pack(x):
        seen.append(x.numel())
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.clone):
        out = flash_attention(*qkv)
    with torch.no_grad():
        out.fill_(torch.nan)  # what the kernel kept must be the hooks' copy, not this tensor
    for a, b in zip(torch.autograd.grad(out, qkv, g), plain[1:]):
        assert torch.equal(a, b)
    assert sum(seen) <= 4 * g.numel() + 2 * 70  # q, k, v, out and one number a row


def test_double_backward_is_refused():
    """Second derivatives are not written: an error, not wrong numbers."""
    qkv, g = inputs(12, 1, 1, 1, 5, 5, 2)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(flash_attention(*qkv), qkv, g, create_graph=True)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("q, k, v, more", [
    (zeros(1, 3, 4, 8), zeros(1, 2, 4, 8), zeros(1, 2, 4, 8), {}),  # 3 heads over 2
    (zeros(1, 2, 4, 8), zeros(1, 2, 4, 8), zeros(1, 2, 5, 8), {}),
    (zeros(2, 2, 4, 8), zeros(1, 2, 4, 8), zeros(1, 2, 4, 8), {}),
    (zeros(1, 2, 4, 8), zeros(1, 2, 4, 6), zeros(1, 2, 4, 6), {}),
    (zeros(2, 4, 8), zeros(2, 4, 8), zeros(2, 4, 8), {}),
    (zeros(1, 2, 4, 8), zeros(1, 2, 4, 8, dtype=torch.float64), zeros(1, 2, 4, 8), {}),
    (zeros(1, 2, 4, 8), zeros(1, 2, 6, 8), zeros(1, 2, 6, 8), {"segment_ids": zeros(1, 4, dtype=torch.long)}),
    (zeros(2, 2, 4, 8), zeros(2, 2, 4, 8), zeros(2, 2, 4, 8), {"segment_ids": zeros(1, 4, dtype=torch.long)}),
    (zeros(1, 2, 4, 8), zeros(1, 2, 4, 8), zeros(1, 2, 4, 8), {"segment_ids": zeros(4, dtype=torch.long)}),
    (zeros(1, 2, 4, 8), zeros(1, 2, 4, 8), zeros(1, 2, 4, 8), {"segment_ids": zeros(1, 4)}),
    (zeros(1, 2, 4, 8), zeros(1, 2, 4, 8), zeros(1, 2, 4, 8), {"kv_segment_ids": zeros(1, 4, dtype=torch.long)})])
def test_what_does_not_fit_is_named(q, k, v, more):
    """A ValueError that says what was found and expected, not an index out of range, or ids cut to integers."""
    with pytest.raises(ValueError, match="found.*expected"):
        flash_attention(q, k, v, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_what_they_declare(dtype):
    """PyTorch's own check of custom operators: shapes and dtypes without data, aliasing, gradients under tracing."""
    qkv, _ = inputs(14, 2, 4, 2, 9, 7, 8, dtype)
    ids = zeros(2, 9, dtype=torch.long), zeros(2, 7, dtype=torch.long)
    for segment_ids in ((None, None), ids):
        torch.library.opcheck(torch.ops.tiled.attention.default, (*qkv, *segment_ids, True, 0.3, 4, 4),
                              atol=1e-2, rtol=1e-2)


# ---- the test of the tests ------------------------------------------------------------------------------------------

def mutant(old, new):
    """The module with one piece of its source replaced."""
    with open(kernels.__file__) as file:
        source = file.read()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    module = types.ModuleType(f"mutant{abs(hash((old, new)))}")
    exec(source.replace(old, new).replace("tiled::", module.__name__ + "::"), module.__dict__)
    return module


@pytest.mark.parametrize("old, new", [
    ("out=acc.mul_(shrink))", "out=acc)"),  # the rescale dropped from the numerator
    ("l.mul_(shrink).add_(", "l.add_("),  # and from the denominator
    ("top.clamp_(min=low)", "top"),  # -inf - -inf where the first tile hides all from a row
    (".triu_(1)[:, None]", ".triu_(0)[:, None]"),  # the mask off by one: a query does not see itself
    (".triu_(1)[:, None]", ".triu_(2)[:, None]"),  # or sees one key of the future
    ("dP.sub_(delta[heads, :, rows]).mul_(P)", "dP.mul_(P)"),  # delta missing
    ("seen = i0 + self.Tk - self.Tq", "seen = i0"),  # causal aligned top-left
    ("(low_q > high_k)", "(low_q >= high_k)"),  # a document's last tile skipped
    ("spans[-1][2] or mask[i][j]", "mask[i][j]"),  # a joined tile forgets that its first part needs the mask
    ("range(0, len(self.k), self.heads)", "range(0, len(self.k) - self.heads + 1, self.heads)"),  # last heads left out
    ("(self.ids_k[heads], self.block)", "(self.ids_k[:heads.stop - heads.start], self.block)"),  # the first heads' ids
    ("self.ids_q[heads, i0:i1, None]", "self.ids_q[:heads.stop - heads.start, i0:i1, None]"),  # the same in the mask
    ("if spans and spans[-1][1] == j0 and", "if spans and"),  # tiles joined over a gap
    ("t.q[heads, rows], scale, out", "t.q[heads, rows], 1.0, out")])  # scale missing in dk
def test_seeded_bugs_are_found(old, new):
    """A test of the tests: the check against naive fails on each of the classic mistakes."""
    with pytest.raises(AssertionError, match="off by|case"):
        check_against_naive(mutant(old, new), range(60))


def test_the_benchmark_runs_one_part_and_writes_it(tmp_path, monkeypatch, capsys):
    """bench.py attention --only growth: that table alone, on the screen and as JSON; here in one process."""
    monkeypatch.setattr(bench, "in_fresh_process", lambda function, *args: 1e6)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    bench.main(["attention", "--quick", "--only", "growth", "--repeats", "2", "--out", str(tmp_path / "a.json")])
    (title, rows), = json.loads((tmp_path / "a.json").read_text())["tables"].items()
    assert title.startswith("growth") and len(rows) == 9 and rows[-1]["what"] in capsys.readouterr().out


def test_unchanged_copy_passes():
    """The machinery of the previous test is not what fails there."""
    check_against_naive(mutant("acc.mul_(shrink)", "acc.mul_(shrink) "), range(60))
