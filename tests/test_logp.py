"""The tiled log-probabilities: equal to log_softmax of all the logits, without them, and at home with autograd."""
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from test_attention import mutant, normal
from torch.utils.checkpoint import checkpoint

import kernels
from bench import attention as bench
from kernels import target_logp


def untiled(hidden, weight, targets, *, bias=None, temperature=1.0):
    """The definition, on all the logits at once: logp, entropy, correct."""
    logits = F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    logp = (logits / temperature).log_softmax(-1)
    trained = targets != -100
    chosen = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)
    return chosen.where(trained, 0.0), entropy.where(trained, 0.0), (logp.argmax(-1) == targets) & trained


def inputs(seed, N, C, V, bias=True, dtype=torch.float64, untrained=0.3):
    parameters = [normal(5 * seed, N, C, dtype=dtype), normal(5 * seed + 1, V, C, dtype=dtype)]
    parameters += [normal(5 * seed + 2, V, dtype=dtype)] if bias else []
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(seed))
    targets[normal(5 * seed + 3, N).abs() < {0: 0, 0.3: 0.385, 1: 99}[untrained]] = -100
    return [x.requires_grad_() for x in parameters], targets


def call(function, parameters, targets, **options):
    return function(*parameters[:2], targets, bias=parameters[2] if len(parameters) > 2 else None, **options)


def check_against_untiled(module, seeds):
    """Values, and gradients for a random and for a constant weight per token, with every option."""
    for seed in seeds:
        r = random.Random(seed)
        N, C, V = r.randint(1, 12), r.randint(1, 6), r.randint(1, 13)
        parameters, targets = inputs(seed, N, C, V, r.random() < 0.5, untrained=r.choice([0, 0.3, 0.3, 1]))
        temperature, module.LOGITS_AT_ONCE = r.choice([1.0, 0.7, 2.0]), r.choice([1, 40, 10**6])
        exact = call(untiled, parameters, targets, temperature=temperature)
        for constant in (False, True):
            g, g_entropy = normal(seed + 1, N), normal(seed + 2, N)
            g = torch.full_like(g, 0.3) if constant else g
            for options in ({}, {"equal_weights": True}, {"with_stats": True}):
                found = call(module.target_logp, parameters, targets, temperature=temperature, **options)
                found = found if "with_stats" in options else (found,)
                pairs, weights = list(zip(found[:2], exact)), (g, g_entropy)
                losses = [sum((x * w).sum() for x, w in zip(side, weights)) for side in zip(*pairs)]
                pairs += zip(*(torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses))
                worst = max(float((a - b).detach().abs().max()) for a, b in pairs)
                assert worst < 1e-12, f"off by {worst:.1e} in case {seed} with {options}, constant {constant}"
                assert "with_stats" not in options or torch.equal(found[2], exact[2]), "off by a flag"


def test_equals_untiled_on_random_shapes(monkeypatch):
    """Log-probabilities, entropies, argmax flags and all gradients equal the definition's to 1e-12 in float64: with and
    without bias, temperature, untrained targets, many chunks and one, whether the equal_weights hint is true or not."""
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", None)  # restored at the end
    check_against_untiled(kernels, range(120))


@pytest.mark.parametrize("equal_weights", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias, equal_weights):
    """The gradients of logp and entropy are their derivatives: finite differences in float64."""
    parameters, targets = inputs(1, 6, 3, 7, bias)
    assert torch.autograd.gradcheck(
        lambda *p: call(target_logp, p, targets, temperature=0.7, equal_weights=equal_weights), parameters)
    assert torch.autograd.gradcheck(
        lambda *p: call(target_logp, p, targets, temperature=0.7, with_stats=True)[:2], parameters)


def test_nothing_to_train():
    """All targets -100, or no rows at all: zeros and zero gradients, not NaN."""
    for N in (4, 0):
        parameters, targets = inputs(2, N, 3, 5, untrained=1)
        for options in ({}, {"equal_weights": True}):
            out = call(target_logp, parameters, targets, **options)
            assert out.shape == (N,) and not out.any()
            assert not any(g.any() for g in torch.autograd.grad(out.sum(), parameters))


def test_of_equal_logits_the_first_is_the_guess():
    """A newborn model, whose logits are all 0, guesses token 0 everywhere, as greedy decoding does: it is not right
    everywhere."""
    targets = torch.tensor([3, 0, 1, -100, 0])
    *_, correct = target_logp(normal(0, 5, 3), torch.zeros(4, 3, dtype=torch.float64), targets, with_stats=True)
    assert correct.tolist() == [False, True, False, False, True]


def test_gradient_of_an_untrained_row_is_ignored():
    """Whatever gradient arrives where the target is -100, even NaN, nothing comes of it."""
    parameters, targets = inputs(13, 12, 3, 5)
    g = normal(14, 12)
    spoilt = torch.where(targets == -100, torch.nan, g)
    for options in ({}, {"equal_weights": True}):
        out = call(target_logp, parameters, targets, **options)
        found = torch.autograd.grad(out, parameters, spoilt, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, torch.autograd.grad(out, parameters, g)))


def test_untrained_rows_cost_nothing(monkeypatch):
    """Only rows with a target are projected onto the vocabulary."""
    rows, product = [], kernels.product

    def counting(a, b, scale, out):
        rows.append(len(a))
        return product(a, b, scale, out)

    monkeypatch.setattr(kernels, "product", counting)
    parameters, targets = inputs(3, 100, 3, 5)
    call(target_logp, parameters, targets)
    assert sum(rows) == int((targets != -100).sum()) < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype):
    """Logits of +-1e4 and a bias of -inf (a forbidden token): finite results, as the definition gives."""
    (hidden, weight, bias), targets = inputs(4, 30, 8, 12, dtype=dtype, untrained=0)
    with torch.no_grad():
        hidden *= 3000
        bias[3] = -torch.inf
    targets[targets == 3] = 4
    for options in ({}, {"equal_weights": True}, {"with_stats": True}):
        found = target_logp(hidden, weight, targets, bias=bias, **options)
        exact = untiled(hidden.detach().double(), weight.detach().double(), targets, bias=bias.detach().double())
        found = found if "with_stats" in options else (found,)
        assert all(torch.allclose(a.double(), b, rtol=1e-5, atol=1e-2) for a, b in zip(found[:2], exact))
        gradients = torch.autograd.grad(sum(x.sum() for x in found[:2]), (hidden, weight))
        assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision(dtype, monkeypatch):
    """Results are float32 and gradients keep their parameter's dtype; against float64, both at most twice as far off
    as the untiled ones, although the weight's gradient is summed over fifty chunks."""
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", 10 * 64)
    parameters, targets = inputs(5, 500, 32, 64, bias=False, dtype=dtype, untrained=0)
    g = normal(6, 500, dtype=torch.float32)
    exact_parameters = [x.detach().double().requires_grad_() for x in parameters]
    exact = call(untiled, exact_parameters, targets)[0]
    exact = exact, *torch.autograd.grad(exact, exact_parameters, g.double())
    results = []
    for function in (lambda *a, **k: untiled(*a, **k)[0], target_logp):
        out = call(function, parameters, targets)
        assert out.dtype == torch.float32
        results.append((out, *torch.autograd.grad(out, parameters, g)))
    for reference, found, truth in zip(*results, exact):
        assert found.dtype == reference.dtype
        assert (found - truth).norm() <= 2 * (reference - truth).norm() + 1e-7 * truth.norm()


def test_backward_twice():
    """retain_graph gives the same gradients again: nothing kept is overwritten."""
    parameters, targets = inputs(7, 9, 3, 5)
    loss = call(target_logp, parameters, targets, equal_weights=True).mean()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, parameters)))


def test_memory_is_a_chunk_not_all_logits():
    """Forward + backward stay under an eighth of the untiled peak, measured in fresh processes."""
    shape = (6000, 16, 20000)
    untiled_peak, ours = (bench.in_fresh_process(bench.logp_memory, p, *shape) for p in ("untiled", "ours"))
    assert ours < untiled_peak / 8, (ours, untiled_peak)


@pytest.mark.slow
def test_memory_of_a_real_head():
    """The head of GPT-2 on 8192 tokens: an eighth of the untiled peak, the float32 gradient of the weight included."""
    peaks = {p: bench.in_fresh_process(bench.logp_memory, p, 8192, 768, 50304) for p in bench.LOGP}
    assert peaks["ours"] < peaks["untiled"] / 8 and peaks["ours, equal_weights"] < peaks["untiled"] / 8, peaks


# ---- together with PyTorch's other tools ----------------------------------------------------------------------------

def losses(parameters, targets, **options):
    out = call(target_logp, parameters, targets, **options)
    logp, entropy = out[:2] if "with_stats" in options else (out, out)
    return (logp * torch.linspace(0, 1, len(targets))).sum() + entropy.sum()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_without_graph_break(backend, monkeypatch):
    """torch.compile(fullgraph=True) takes it as one operator, with the same numbers forward and backward."""
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # its key does not see how we differentiate
    parameters, targets = inputs(8, 20, 4, 9, dtype=torch.float32)
    for options in ({"with_stats": True}, {"equal_weights": True}):
        compiled = torch.compile(lambda *p, o=options: losses([p[0].tanh(), *p[1:]], targets, **o), fullgraph=True,
                                 backend=backend)
        eager = losses([parameters[0].tanh(), *parameters[1:]], targets, **options)
        assert torch.allclose(compiled(*parameters), eager)
        for a, b in zip(torch.autograd.grad(compiled(*parameters), parameters), torch.autograd.grad(eager, parameters)):
            assert torch.allclose(a, b, atol=1e-5)


def test_autocast():
    """Under autocast the factors are bfloat16, the results float32, the gradients the parameters' float32."""
    parameters, targets = inputs(9, 20, 4, 9, dtype=torch.float32)
    half = [x.detach().bfloat16().requires_grad_() for x in parameters]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(target_logp, parameters, targets)
        gradients = torch.autograd.grad(out.sum(), parameters)
    plain = call(target_logp, half, targets)
    assert torch.equal(out, plain) and out.dtype == torch.float32
    for a, b in zip(gradients, torch.autograd.grad(plain.sum(), half)):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_activation_checkpointing():
    """Recomputed in the backward pass: bitwise the same gradients."""
    parameters, targets = inputs(10, 20, 4, 9)
    for options in ({"with_stats": True}, {"equal_weights": True}):
        again = checkpoint(lambda *p, o=options: losses(p, targets, **o), *parameters, use_reentrant=False)
        plain = losses(parameters, targets, **options)
        for a, b in zip(torch.autograd.grad(again, parameters), torch.autograd.grad(plain, parameters)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("equal_weights", [False, True])
def test_gathered_weight_is_not_kept(equal_weights):
    """ZeRO-3: hooks that keep a recipe in place of the gathered weight free it between forward and backward, and the
    backward pass computes with what the recipe returns."""
    (hidden, shard), targets = inputs(11, 20, 4, 9, bias=False)
    plain = torch.autograd.grad(losses((hidden, shard), targets, equal_weights=equal_weights), (hidden, shard))
    gathered = shard * 1.0
    address, alive = gathered.data_ptr(), weakref.ref(gathered)

    def pack(x):
        return "recipe" if x.data_ptr() == address else x

    def unpack(x):
        return shard.detach().clone() if isinstance(x, str) else x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = losses((hidden, gathered), targets, equal_weights=equal_weights)
    del gathered
    assert alive() is None
    for a, b in zip(torch.autograd.grad(loss, (hidden, shard)), plain):
        assert torch.equal(a, b)


def test_double_backward_is_refused():
    """Second derivatives are not written: an error, not wrong numbers."""
    parameters, targets = inputs(12, 5, 3, 4)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(call(target_logp, parameters, targets).sum(), parameters, create_graph=True)


@pytest.mark.parametrize("change", ["targets too short", "width", "bias", "temperature 0", "temperature below 0"])
def test_what_does_not_fit_is_named(change):
    """A ValueError that says what was found and expected, not trailing zeros or an index out of range."""
    (hidden, weight, bias), targets = inputs(13, 5, 3, 4)
    arguments = {"targets too short": (hidden, weight, targets[:4]), "width": (hidden[:, :2], weight, targets),
                 "bias": (hidden, weight, targets)}.get(change, (hidden, weight, targets))
    temperature = {"temperature 0": 0.0, "temperature below 0": -1.0}.get(change, 1.0)
    with pytest.raises(ValueError, match="found.*expected"):
        target_logp(*arguments, bias=bias[:3] if change == "bias" else bias, temperature=temperature)


@pytest.mark.parametrize("ahead", [False, True])
def test_operators_are_what_they_declare(ahead):
    """PyTorch's own check of custom operators: shapes and dtypes without data, aliasing, gradients under tracing."""
    (hidden, weight, bias), targets = inputs(14, 5, 3, 4, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.tiled.logp.default,
                          (hidden, weight, bias, targets, 1.5, not ahead, ahead), atol=1e-2, rtol=1e-2)


# ---- the test of the tests ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("old, new", [
    ("dz.scatter_add_(1, targets[rows, None], g[rows, None])", "pass"),  # the target's own term missing
    ("bool((trained == trained[0]).all())", "True"),  # believes the hint without looking
    ("1 / temperature, out=dW", "1.0, out=dW"),  # temperature missing in dW
    ("(g + g_H * H)", "(g + g_H)"),  # the entropy's gradient wrong
    ("(targets != -100).nonzero()", "(targets != -1).nonzero()"),  # untrained rows taken for trained
    ("lse[rows] = (m + l.log2())", "lse[rows] = (l.log2())")])  # the maximum left out
def test_seeded_bugs_are_found(old, new):
    """A test of the tests: the check against the definition fails on each of these mistakes."""
    with pytest.raises((AssertionError, RuntimeError), match="off by|out of bounds"):
        check_against_untiled(mutant(old, new), range(30))
