"""The network and generation: what every configuration must satisfy, against independent oracles."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_chat import calls_of
from torch.utils.flop_counter import FlopCounterMode

from lib.checkpoint import save_final
from lib.program import UserError
from lib.tokenizer import make_tokenizer
from model import GPT, GPTConfig, choose, generate, generate_sorted, load_model, restarting_positions, rotate

SMALL = dict(vocab_size=37, n_layer=2, n_head=4, n_embd=32, max_seq_len=48)
NAMES = ("norm", "position", "mlp", "qk_norm", "bias", "tie_embeddings", "n_kv_head", "attention")
SWITCHES = [dict(zip(NAMES, values)) for values in [
    ("rms", "rope", "swiglu", True, False, False, 4, "flash"),
    ("layer", "learned", "gelu", False, True, True, 4, "flash"),
    ("rms", "rope", "swiglu", False, False, True, 2, "naive"),
    ("layer", "rope", "gelu", True, True, False, 1, "sdpa"),
    ("rms", "learned", "swiglu", True, True, False, 2, "flash")]]
every_switch = pytest.mark.parametrize("switches", SWITCHES)


def lively(seed=0, dtype=torch.float64, head="lm", **changes):
    """A model in which nothing is zero: a newborn head is, and would hide every bug."""
    model = GPT(GPTConfig(**{**SMALL, **changes}), head=head, seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


def some_ids(B, T, seed=0):
    return torch.randint(0, SMALL["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


# ---- the network -----------------------------------------------------------------------------------------

@every_switch
def test_logp_equals_float64_log_softmax(switches):
    """model(ids, targets) is the log-softmax of model(ids) at the targets, 0 where masked; with stats."""
    model, ids = lively(**switches), some_ids(3, 17)
    targets = ids.roll(-1, 1)
    targets[:, ::4] = -100
    expected = (model(ids) / 0.7).log_softmax(-1)
    logp, entropy, correct = model(ids, targets, temperature=0.7, with_stats=True)
    kept = targets >= 0
    picked = expected.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(logp, picked * kept, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy[kept], -(expected.exp() * expected).sum(-1)[kept])
    assert torch.equal(correct[kept], (expected.argmax(-1) == targets)[kept])


@every_switch
def test_no_token_sees_the_future(switches):
    """Changing token t changes nothing before t, bitwise, and does change t."""
    model, ids = lively(**switches), some_ids(2, 16)
    before = model(ids)
    for t in (1, 7, 15):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % SMALL["vocab_size"]
        after = model(other)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.allclose(before[:, t], after[:, t])


@every_switch
def test_packed_documents_equal_separate_ones(switches):
    """Two documents in one row, told apart by segment_ids, give what each gives alone: no attention across,
    and positions restart."""
    model, a, b = lively(**switches), some_ids(1, 9, seed=1), some_ids(1, 14, seed=2)
    row = torch.cat((a, b, torch.zeros(1, 3, dtype=torch.long)), 1)
    packed = model(row, segment_ids=torch.tensor([[0] * 9 + [1] * 14 + [-1] * 3]))
    torch.testing.assert_close(packed[:, :9], model(a), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(packed[:, 9:23], model(b), rtol=1e-10, atol=1e-10)
    assert packed.isfinite().all()
    segments = torch.tensor([[0, 0, 0, 1, 1, 5, 5, -1, -1], [2, 2, 2, 2, 2, 2, 2, 2, 2]])
    assert restarting_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0, 1, 0, 1], list(range(9))]


def test_rotary_matches_complex_multiplication():
    """Entry pair (d, d + D/2) turns by position * theta^(-2d/D), as a complex number times exp(i angle). So
    scores depend on the distance alone (Su et al. 2021, section 3.2)."""
    model = GPT(GPTConfig(**SMALL))
    x = torch.randn(2, 48, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, model.cos.double()[None, :, None], model.sin.double()[None, :, None])
    angle = torch.arange(48)[:, None, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angle)
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), -1), rtol=1e-5, atol=1e-5)


@every_switch
def test_every_configuration_overfits_four_lines(switches):
    """Every switch builds and trains: four lines of text are learned by heart."""
    lines = ["to be, or not to be, that is", "whether 'tis nobler in the mi",
             "the slings and arrows of outr", "or to take arms against a sea"]
    alphabet = sorted(set("".join(lines)))
    ids = torch.tensor([[alphabet.index(c) for c in line[:28]] for line in lines])
    model = GPT(GPTConfig(**{**SMALL, **switches}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(100):
        loss = -model(ids[:, :-1], ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert generate(model, [ids[2, :4].tolist()], max_new_tokens=24, temperature=0)[0] == ids[2, 4:].tolist()


def test_first_loss_is_ln_V_and_every_parameter_gets_a_number():
    """An untied head starts at zero: the first loss is exactly ln V. The seed decides all parameters; none
    is left as it was allocated, none of a block is 0. A gradient reaches all of a model without zeros."""
    model, ids = GPT(GPTConfig(**SMALL)), some_ids(4, 20)
    assert -model(ids, ids.roll(-1, 1)).mean().item() == pytest.approx(math.log(37), abs=1e-6)
    again, other = GPT(GPTConfig(**SMALL)), GPT(GPTConfig(**SMALL), seed=1)
    both = zip(model.parameters(), again.parameters())
    assert all(p.isfinite().all() and torch.equal(p, q) for p, q in both)
    assert not torch.equal(model.embed.weight, other.embed.weight)
    assert all(p.any() for p in model.blocks.parameters())  # from 0 the Village needs 400 more steps
    for switches in SWITCHES:
        model = lively(**switches)
        model(ids, ids.roll(-1, 1)).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_forbidden_ids_have_no_probability():
    """LMHead.forbid: never drawn; log-probabilities are of a softmax over those left."""
    model, ids = lively(), some_ids(2, 10) % 30 + 7
    left = torch.tensor([i for i in range(37) if i not in (0, 6)])
    expected = torch.full((2, 10, 37), -torch.inf, dtype=torch.float64)
    expected[..., left] = model(ids)[..., left].log_softmax(-1)
    model.head.forbid([0, 6])
    torch.testing.assert_close(model(ids).log_softmax(-1), expected)
    torch.testing.assert_close(model(ids, ids), expected.gather(-1, ids[..., None])[..., 0])
    assert not {0, 6} & set(generate(model, [[9]], max_new_tokens=40, temperature=5.0)[0])


def test_flops_formula_counts_the_matrix_products():
    """flops_per_token against PyTorch's own counter, over the naive model, which computes both triangles."""
    T, ids = 16, some_ids(2, 16)
    model = GPT(GPTConfig(**{**SMALL, "attention": "naive", "n_kv_head": 2}))
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    wasted = 2 * T * 6 * 2 * SMALL["n_embd"] * (T - 1)  # tokens * 6 layers C keys above the diagonal
    assert counter.get_total_flops() == pytest.approx(2 * T * model.flops_per_token(T) + wasted, rel=1e-6)


# ---- configurations and files ----------------------------------------------------------------------------

def test_configuration_errors_name_the_flag():
    """A configuration that cannot be built is one line, with the flag to change."""
    for bad, flag in ((dict(n_embd=30), "--n_embd"), (dict(n_kv_head=3), "--n_kv_head 3"),
                      (dict(n_embd=12, n_head=4), "--position"), (dict(n_head=0), "--n_head")):
        with pytest.raises(UserError, match=flag):
            GPTConfig(**{**SMALL, **bad})


def test_load_model(tmp_path):
    """A finished model comes back with its tokenizer, from its folder or the run's, with another attention or
    head if wanted. A folder that holds something else is one line that names it."""
    saved = make_tokenizer("byte")
    saved.save(str(tmp_path / "tokenizer.json"))
    shape = {**SMALL, "vocab_size": saved.vocab_size}
    model = lively(**shape, dtype=torch.float32)

    def save(weights, **config):
        save_final(str(tmp_path), weights, config, str(tmp_path / "tokenizer.json"))
        return str(tmp_path / "final")

    weights = model.state_dict()
    final = save(weights, model=shape, head="lm")
    for folder, attention in ((str(tmp_path), ""), (final, "naive")):
        loaded, tokenizer, config = load_model(folder, attention=attention)
        torch.testing.assert_close(loaded(some_ids(1, 9)), model(some_ids(1, 9)))
        assert loaded.config.attention == attention or not attention and loaded.config.attention == "flash"
        assert tokenizer.vocab_size == saved.vocab_size
        assert config["files"].keys() == {"model.pt", "tokenizer.json"}
    reward = load_model(final, "scalar")[0](some_ids(1, 9))
    assert reward.shape == (1, 9) and reward.dtype == torch.float32 and not reward.any()  # a new head is 0
    good = {"model": shape, "head": "lm"}
    for config, words in (({}, "'model'"), ({"model": {**shape, "depth": 1}}, "depth"),
                          ({**good, "model": {**shape, "n_layer": 3}}, "not a model"),
                          ({**good, "weights": {**weights, "extra": torch.zeros(1)}}, "extra"),
                          ({**good, "weights": {**weights, "norm.weight": torch.zeros(3)}}, "norm.weight")):
        with pytest.raises(UserError, match=f"final.*{words}"):
            load_model(save(**{"weights": weights, **config}))
    with pytest.raises(UserError, match="found a reward model"):
        load_model(save(lively(**shape, head="scalar").state_dict(), model=shape, head="scalar"), "lm")


# ---- generation ------------------------------------------------------------------------------------------

@every_switch
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_cached_generation_equals_recomputation(switches, temperature):
    """Cached generation of ragged prompts draws what full recomputation of each row alone draws."""
    model, seeds = lively(**switches), [3, 4, 5]
    prompts = [some_ids(1, n, seed=n)[0].tolist() for n in (5, 1, 9)]
    new, logps = generate(model, prompts, max_new_tokens=12, temperature=temperature, seeds=seeds,
                          return_logp=True)
    for row, prompt in enumerate(prompts):
        uniforms = torch.from_numpy(np.random.Generator(np.random.Philox(seeds[row])).random(12))
        ids = list(prompt)
        for t in range(12):
            logits = model(torch.tensor([ids]))[:, -1]
            token = int(choose(logits, uniforms[t:t + 1], temperature))
            expected = (logits / (temperature or 1.0)).log_softmax(-1)[0, token].item()
            assert new[row][t] == token and abs(logps[row][t] - expected) < 1e-5  # generate reports float32
            ids.append(token)


def test_generation_ends_at_eos_and_does_not_depend_on_neighbours(monkeypatch):
    """A row ends with its eos, and then leaves the batch. Its tokens and log-probabilities are the same alone
    and among others, of which it outlives some, and through generate_sorted. Banned ids are never drawn."""
    model = lively(dtype=torch.float32)
    prompts = [[1, 2], [3, 4, 5], [6], [3, 4, 5], [2]]  # one comes twice: it is read once
    read = calls_of(monkeypatch, model, "forward")
    how = dict(max_new_tokens=30, eos_id=7, temperature=1.5, banned=(0, 11), return_logp=True)
    seen, done, seeds = [], [], range(21, 26)
    together, logps = generate(model, prompts, seeds=seeds, on_token=lambda *x: seen.append(x), **how)
    replies = generate_sorted(model, prompts, batch_size=2, seeds=seeds, progress=lambda *x: done.append(x),
                              **how)
    assert done == [(2, 5), (4, 5), (5, 5)] and [len(ids) for ids, in read[:2]] == [4, 5]
    assert len({*map(len, together)}) > 3 and together[0] != max(together, key=len)
    for i, prompt in enumerate(prompts):
        (alone,), (its,) = generate(model, [prompt], seeds=[i + 21], **how)
        assert alone == together[i] == replies[i][0]
        assert its == pytest.approx(logps[i], abs=1e-5) and its == pytest.approx(replies[i][1], abs=1e-5)
        assert [token for row, token in seen if row == i] == alone
        assert 7 not in alone[:-1] and (alone[-1] == 7 or len(alone) == 30) and not {0, 11} & set(alone)


def test_a_row_ends_where_its_positions_do():
    """max_new_tokens 0: each prompt is continued up to max_seq_len, as if it stood alone."""
    model, prompts = lively(dtype=torch.float32), [[1, 2], [3] * 30, [6] * 7]
    limit = model.config.max_seq_len
    together = generate(model, prompts, max_new_tokens=0, seeds=[1, 2, 3])
    assert [len(new) for new in together] == [limit - len(prompt) for prompt in prompts]
    alone = [generate(model, [p], max_new_tokens=0, seeds=[s])[0] for p, s in zip(prompts, (1, 2, 3))]
    assert together == alone
    with pytest.raises(UserError, match="shorten"):
        generate(model, [[1] * limit], max_new_tokens=0)


def test_small_seeds_are_as_good_as_any():
    """Seeds are mixed: the first numbers of a thousand neighbours are uniform."""
    for seeds in (range(1000), [(1, 11, n) for n in range(1000)], [(1, 12, 99, n) for n in range(1000)]):
        first = np.sort([np.random.Generator(np.random.Philox(s)).random() for s in seeds])
        assert np.abs(first - np.arange(1000) / 1000).max() < 0.05  # Kolmogorov-Smirnov, p about 0.01
    first = [np.random.Generator(np.random.Philox((1, 11, turn))).random() for turn in range(20)]
    assert 0.001 < min(first) < max(first) < 0.999  # of the first messages of a default chat


def test_sampled_frequencies_follow_the_softmax():
    """Chi-square of 20,000 draws against softmax(logits / T), and exact supports of top-k and top-p."""
    n = 20_000
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5]).expand(n, -1)
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature in (0.7, 1.0):
        p = (logits[0] / temperature).softmax(-1)
        counts = choose(logits, uniforms, temperature).bincount(minlength=5)
        assert ((counts - n * p) ** 2 / (n * p)).sum() < 18.5  # 0.1 % point with 4 degrees of freedom
    for options, support in (({"top_k": 2}, {0, 3}), ({"top_p": 0.5}, {3}), ({"top_p": 0.6}, {0, 3}),
                             ({"temperature": 0}, {3})):  # p(3) = 0.56
        assert set(choose(logits, uniforms, **options).tolist()) == support


def test_generation_refuses_what_does_not_fit():
    """Too long rows are one line, in generation and in a pass."""
    model = lively(dtype=torch.float32)
    with pytest.raises(UserError, match="exceed"):
        generate(model, [[1] * 40], max_new_tokens=9)
    with pytest.raises(UserError, match="max_seq_len"):
        model(some_ids(1, 49))
