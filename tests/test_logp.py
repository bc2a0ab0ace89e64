"""The tiled log-probabilities: equal to log_softmax of all logits, without them; at home with autograd."""
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from small_chat import calls_of
from test_attention import Peak, mutant, normal
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import target_logp


def untiled(hidden, weight, targets, *, bias=None, temperature=1.0):
    """The definition, on all the logits at once: logp, entropy, correct."""
    logits = F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    logp = (logits / temperature).log_softmax(-1)
    trained = targets != -100
    chosen = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)
    return chosen.where(trained, 0.0), entropy.where(trained, 0.0), (logp.argmax(-1) == targets) & trained


def inputs(seed, M, C, V, dtype=torch.float64, untrained=0.3):
    """hidden and weight that want gradients, targets, a bias."""
    hidden, weight = normal(5 * seed, M, C, dtype=dtype), normal(5 * seed + 1, V, C, dtype=dtype)
    targets = torch.randint(0, V, (M,), generator=torch.Generator().manual_seed(seed))
    targets[normal(5 * seed + 3, M).abs() < {0: 0, 0.3: 0.385, 1: 99}[untrained]] = -100
    return [hidden.requires_grad_(), weight.requires_grad_()], targets, normal(5 * seed + 2, V, dtype=dtype)


def check_against_untiled(module, seeds):
    """Values, and gradients for a random and for a constant weight per token, with every option."""
    for seed in seeds:
        r = random.Random(seed)
        M, C, V = r.randint(1, 12), r.randint(1, 6), r.randint(1, 13)
        parameters, targets, bias = inputs(seed, M, C, V, untrained=r.choice([0, 0.3, 0.3, 1]))
        options = {"temperature": r.choice([1.0, 0.7, 2.0]), "bias": r.choice([None, bias])}
        module.LOGITS_AT_ONCE = r.choice([1, 40, 10**6])
        exact = untiled(*parameters, targets, **options)
        for g in (normal(seed + 1, M), torch.full((M,), 0.3, dtype=torch.float64)):
            for more in ({}, {"equal_weights": True}, {"with_stats": True}):
                found = module.target_logp(*parameters, targets, **options, **more)
                found = found if "with_stats" in more else (found,)
                pairs = list(zip(found[:2], exact))
                weights = g, normal(seed + 2, M)
                losses = [sum((x * w).sum() for x, w in zip(side, weights)) for side in zip(*pairs)]
                pairs += zip(*(torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses))
                worst = max(float((a - b).detach().abs().max()) for a, b in pairs)
                assert worst < 1e-12, f"off by {worst:.1e} in case {seed} with {more}"
                assert "with_stats" not in more or torch.equal(found[2], exact[2]), "off by a flag"


def test_equals_untiled_on_random_shapes(monkeypatch):
    """Log-probabilities, entropies, argmax flags, all gradients equal the definition's to 1e-12 in float64,
    with bias, temperature, untrained targets, many chunks and one, whether equal_weights is true or not."""
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", None)  # restored at the end
    check_against_untiled(kernels, range(120))


@pytest.mark.parametrize("options", [{}, {"equal_weights": True}])
def test_untrained_rows_are_left_out(options, monkeypatch):
    """Rows without a target are not projected. Of the gradient that arrives there, even NaN, nothing comes.
    Nothing to train, or no rows at all: zeros and zero gradients."""
    for M in (4, 0):
        parameters, targets, _ = inputs(2, M, 3, 5, untrained=1)
        out = target_logp(*parameters, targets, **options)
        assert out.shape == (M,) and not out.any()
        assert not any(g.any() for g in torch.autograd.grad(out.sum(), parameters))
    rows, product = [], kernels.product
    monkeypatch.setattr(kernels, "product", lambda a, *more: rows.append(len(a)) or product(a, *more))
    parameters, targets, _ = inputs(13, 12, 3, 5)
    with torch.no_grad():
        target_logp(*parameters, targets)
    assert sum(rows) == int((targets != -100).sum()) < 12
    monkeypatch.undo()
    for g in (normal(14, 12), torch.ones(12, dtype=torch.float64)):
        out = target_logp(*parameters, targets, **options)
        spoilt = torch.where(targets == -100, torch.nan, g)
        found = torch.autograd.grad(out, parameters, spoilt, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, torch.autograd.grad(out, parameters, g)))


def test_of_equal_logits_the_first_is_the_guess():
    """A newborn model, whose logits are all 0, guesses token 0 everywhere, as greedy decoding does."""
    targets, weight = torch.tensor([3, 0, 1, -100, 0]), torch.zeros(4, 3, dtype=torch.float64)
    *_, correct = target_logp(normal(0, 5, 3), weight, targets, with_stats=True)
    assert correct.tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("options", [{}, {"equal_weights": True}, {"with_stats": True}])
def test_extreme_logits(options):
    """Logits of +-1e4 and a bias of -inf (a forbidden token): finite results, as the definition gives."""
    (hidden, weight), targets, bias = inputs(4, 30, 8, 12, torch.float32, untrained=0)
    with torch.no_grad():
        hidden *= 3000
    bias[3], targets[targets == 3] = -torch.inf, 4
    found = target_logp(hidden, weight, targets, bias=bias, **options)
    found = found[:2] if "with_stats" in options else (found,)
    exact = untiled(hidden.detach().double(), weight.detach().double(), targets, bias=bias.double())
    assert all(torch.allclose(a.double(), b, rtol=1e-5, atol=1e-2) for a, b in zip(found, exact))
    gradients = torch.autograd.grad(sum(x.sum() for x in found), (hidden, weight))
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision(dtype, monkeypatch):
    """Results are float32, gradients keep their parameter's dtype. Both are at most twice as far off as the
    untiled ones, although the weight's gradient is summed over fifty chunks."""
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", 10 * 64)
    parameters, targets, _ = inputs(5, 500, 32, 64, dtype, untrained=0)
    wide, g = [x.detach().double().requires_grad_() for x in parameters], normal(6, 500, dtype=torch.float32)
    exact, reference, ours = (
        (out, *torch.autograd.grad(out, xs, g.to(out.dtype))) for out, xs in (
            (untiled(*wide, targets)[0], wide), (untiled(*parameters, targets)[0], parameters),
            (target_logp(*parameters, targets), parameters)))
    for truth, untiled_one, found in zip(exact, reference, ours):
        assert found.dtype == untiled_one.dtype
        assert (found - truth).norm() <= 2 * (untiled_one - truth).norm() + 1e-7 * truth.norm()


def test_memory_is_a_chunk_not_all_logits(monkeypatch):
    """Forward + backward stay under an eighth of the untiled peak."""
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", 2**16)
    parameters, targets, _ = inputs(6, 600, 8, 3000, torch.float32, untrained=0)
    peaks = []
    for function in (lambda *x: untiled(*x)[0], target_logp, lambda *x: target_logp(*x, equal_weights=True)):
        with Peak() as peak:
            torch.autograd.grad(function(*parameters, targets).mean(), parameters)
        peaks.append(peak.bytes)
    assert max(peaks[1:]) < peaks[0] / 8, peaks


# ---- together with PyTorch's other tools -----------------------------------------------------------------

def loss_of(parameters, targets, **options):
    out = target_logp(*parameters, targets, **options)
    logp, entropy = out[:2] if "with_stats" in options else (out, out)
    return (logp * torch.linspace(0, 1, len(targets))).sum() + entropy.sum()


@pytest.mark.parametrize("options", [{"with_stats": True}, {"equal_weights": True}, {}])
def test_what_is_saved_is_enough(options):
    """Backward twice, activation checkpointing, hooks that keep a recipe instead of the gathered weight
    (ZeRO-3: it is freed between forward and backward): bitwise the same gradients."""
    (hidden, shard), targets, _ = inputs(11, 20, 4, 9)
    loss = loss_of((hidden, shard), targets, **options)
    plain = torch.autograd.grad(loss, (hidden, shard), retain_graph=True)
    again = checkpoint(lambda *x: loss_of(x, targets, **options), hidden, shard, use_reentrant=False)
    gathered = shard * 1.0
    address, alive = gathered.data_ptr(), weakref.ref(gathered)
    with saved_tensors_hooks(lambda x: "recipe" if x.data_ptr() == address else x,
                             lambda x: shard.detach().clone() if isinstance(x, str) else x):
        freed = loss_of((hidden, gathered), targets, **options)
    del gathered
    assert alive() is None
    for other in (loss, again, freed):
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(other, (hidden, shard)), plain))


@pytest.mark.parametrize("equal_weights", [False, True])
def test_a_frozen_weight_costs_no_gradient(monkeypatch, equal_weights):
    """Without it, dh is the same to the last bit, and the products that make dW are left out."""
    (hidden, weight), targets, _ = inputs(14, 5, 4, 4)
    found, products = [], calls_of(monkeypatch, kernels, "product")
    for frozen in (weight, weight.detach()):
        loss = target_logp(hidden, frozen, targets, equal_weights=equal_weights).sum()
        found.append((torch.autograd.grad(loss, hidden)[0], len(products)))
    assert torch.equal(found[0][0], found[1][0]) and found[1][1] == 2 * found[0][1] - 1


def test_second_derivative_is_refused():
    """Second derivatives are not written, here nor of attention: an error, not wrong numbers."""
    (hidden, weight), targets, _ = inputs(12, 5, 4, 4)
    qkv = (hidden.view(1, 1, 5, 4),) * 3
    for out in (target_logp(hidden, weight, targets), kernels.flash_attention(*qkv)):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(out.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("rows, width", [(5, 2), (4, 3)])
def test_what_does_not_fit_is_refused(rows, width):
    """A ValueError, not trailing zeros nor an index out of range."""
    (hidden, weight), targets, _ = inputs(13, 5, 3, 4)
    with pytest.raises(ValueError, match="do not fit"):
        target_logp(hidden[:, :width], weight, targets[:rows])


@pytest.mark.parametrize("old, new", [
    ("dz = z.scatter_add_(1, targets[rows, None], g[rows, None])", "dz = z"),  # the target's own term missing
    ("bool((trained == trained[0]).all())", "True"),  # believes the hint without looking
    ("h, dW, 1 / temperature, add", "h, dW, 1.0, add"),  # temperature missing in dW
    ("(g + g_entropy * entropy)", "(g + g_entropy)"),  # the entropy's gradient wrong
    ("(targets != -100).nonzero()", "(targets != -1).nonzero()"),  # untrained rows taken for trained
    ("lse[rows] = (m + l.log2())", "lse[rows] = (l.log2())")])  # the maximum left out
def test_seeded_bugs_are_found(old, new):
    """A test of the tests: the check against the definition fails on each of these mistakes."""
    with pytest.raises((AssertionError, RuntimeError), match="off by|out of bounds"):
        check_against_untiled(mutant(old, new), range(30))
