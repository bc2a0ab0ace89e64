"""The network: what every configuration must satisfy, against oracles that share no code with it."""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib.program import UserError
from model import GPT, GPTConfig, KVCache, choose, generate, generate_sorted, restarting_positions, rotate

SMALL = dict(vocab_size=37, n_layer=2, n_head=4, n_embd=32, max_seq_len=48)
SWITCHES = [dict(zip(("norm", "position", "mlp", "qk_norm", "bias", "tie_embeddings", "n_kv_head", "attention"),
                     values))
            for values in [("rms", "rope", "swiglu", True, False, False, 4, "flash"),
                           ("layer", "learned", "gelu", False, True, True, 4, "flash"),
                           ("rms", "rope", "swiglu", False, False, True, 2, "naive"),
                           ("layer", "rope", "gelu", True, True, False, 1, "sdpa"),
                           ("rms", "learned", "swiglu", True, True, False, 2, "flash")]]


def lively(seed=0, dtype=torch.float64, head="lm", **changes):
    """A model in which nothing is zero: right after birth the blocks are the identity and would hide every bug."""
    model = GPT(GPTConfig(**{**SMALL, **changes}), head=head, seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


def some_ids(B, T, seed=0):
    return torch.randint(0, SMALL["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("switches", SWITCHES)
def test_logp_equals_float64_log_softmax(switches):
    """model(ids, targets) is the log-softmax of model(ids) at the targets, 0 where masked; entropy and argmax too."""
    model, ids = lively(**switches), some_ids(3, 17)
    targets = ids.roll(-1, 1)
    targets[:, ::4] = -100
    for temperature in (1.0, 0.7):
        expected = (model(ids) / temperature).log_softmax(-1)
        logp, entropy, correct = model(ids, targets, temperature=temperature, with_stats=True)
        kept = targets >= 0
        picked = expected.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        torch.testing.assert_close(logp, picked * kept, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(entropy[kept], -(expected.exp() * expected).sum(-1)[kept], rtol=1e-10, atol=1e-10)
        assert torch.equal(correct[kept], (expected.argmax(-1) == targets)[kept])


@pytest.mark.parametrize("switches", SWITCHES)
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


@pytest.mark.parametrize("switches", SWITCHES)
def test_packed_documents_equal_separate_ones(switches):
    """Two documents in one row, told apart by segment_ids, give what each gives alone: no attention across, and
    positions restart."""
    model, a, b = lively(**switches), some_ids(1, 9, seed=1), some_ids(1, 14, seed=2)
    row = torch.cat((a, b, torch.zeros(1, 3, dtype=torch.long)), 1)
    segments = torch.tensor([[0] * 9 + [1] * 14 + [-1] * 3])
    packed = model(row, segment_ids=segments)
    torch.testing.assert_close(packed[:, :9], model(a), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(packed[:, 9:23], model(b), rtol=1e-10, atol=1e-10)
    assert packed.isfinite().all()


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_cached_generation_equals_recomputation(switches, temperature):
    """Cached generation of ragged prompts draws what full recomputation of each row alone draws, greedy and sampled."""
    model = lively(**switches)
    prompts = [some_ids(1, n, seed=n)[0].tolist() for n in (5, 1, 9)]
    new, logps = generate(model, prompts, max_new_tokens=12, temperature=temperature, seeds=[3, 4, 5], return_logp=True)
    for row, prompt in enumerate(prompts):
        uniforms = torch.from_numpy(np.random.Generator(np.random.Philox(key=[3, 4, 5][row])).random(12))
        ids = list(prompt)
        for t in range(12):
            logits = model(torch.tensor([ids]))[:, -1]
            token = int(choose(logits, uniforms[t:t + 1], temperature))
            expected = (logits / (temperature or 1.0)).log_softmax(-1)[0, token].item()
            assert new[row][t] == token
            assert abs(logps[row][t] - expected) < 1e-5  # generate reports float32
            ids.append(token)


def test_generation_ends_at_eos_and_does_not_depend_on_neighbours():
    """A row ends with its eos, and then leaves the batch; its tokens and their log-probabilities are the same alone and
    among others, of which it outlives some; banned ids are never drawn."""
    model = lively(dtype=torch.float32)
    prompts = [[1, 2], [3, 4, 5], [6], [8, 9, 10, 1], [2]]
    how = {"max_new_tokens": 30, "eos_id": 7, "temperature": 1.5, "banned": (0, 11), "repetition_penalty": 1.3,
           "return_logp": True}
    seen = []
    together, logps = generate(model, prompts, seeds=range(1, 6), on_token=lambda *said: seen.append(said), **how)
    assert [[token for row, token in seen if row == i] for i in range(5)] == together
    assert len({*map(len, together)}) > 3 and together[0] != max(together, key=len)
    for i, prompt in enumerate(prompts):
        (alone,), (its,) = generate(model, [prompt], seeds=[i + 1], **how)
        assert alone == together[i] and its == pytest.approx(logps[i], abs=1e-5)
    for row in together:
        assert 7 not in row[:-1] and (row[-1] == 7 or len(row) == 30)
        assert not {0, 11} & set(row)
    prompts, seen = prompts[:3], []
    generate(model, prompts, max_new_tokens=5, seeds=[1, 2, 3], on_token=lambda row, token: seen.append((row, token)))
    assert sorted(seen) == sorted((i, token) for i in range(3) for token in
                                  generate(model, prompts, max_new_tokens=5, seeds=[1, 2, 3])[i])


def test_any_number_of_prompts_in_the_order_they_were_given():
    """generate_sorted: the replies of generate, prompt by prompt; on_token counts the prompts as the caller does, and
    progress what is done."""
    model, seen, done = lively(dtype=torch.float32), [], []
    prompts = [[1, 2, 3, 4], [5], [6, 7, 8], [9, 10], [11]]
    replies = generate_sorted(model, prompts, batch_size=2, seeds=range(5), max_new_tokens=6,
                              on_token=lambda *said: seen.append(said), progress=lambda *told: done.append(told))
    assert done == [(2, 5), (4, 5), (5, 5)]
    alone = [generate(model, [prompt], seeds=[i], max_new_tokens=6)[0] for i, prompt in enumerate(prompts)]
    assert replies == alone
    assert [[token for row, token in seen if row == i] for i in range(5)] == replies


def test_sampled_frequencies_follow_the_softmax():
    """Chi-square of 20,000 draws against softmax(logits / T), and exact supports of top-k and top-p."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    n = 20_000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature in (0.7, 1.0):
        p = (logits / temperature).softmax(-1)
        counts = choose(logits.expand(n, -1), uniforms, temperature).bincount(minlength=5)
        chi_square = ((counts - n * p) ** 2 / (n * p)).sum()
        assert chi_square < 18.5  # 0.1 % point of the chi-square distribution with 4 degrees of freedom
    assert set(choose(logits.expand(n, -1), uniforms, top_k=2).tolist()) == {0, 3}
    assert set(choose(logits.expand(n, -1), uniforms, top_p=0.5).tolist()) == {3}  # p(3) = 0.56 suffices
    assert set(choose(logits.expand(n, -1), uniforms, top_p=0.6).tolist()) == {0, 3}
    assert set(choose(logits.expand(n, -1), uniforms, temperature=0).tolist()) == {3}


def test_repetition_penalty_makes_seen_tokens_less_likely():
    """With a huge penalty greedy decoding never repeats; with 1 it is the plain model."""
    model = lively(dtype=torch.float32)
    plain = generate(model, [[1, 2, 3]], max_new_tokens=20, temperature=0)[0]
    assert generate(model, [[1, 2, 3]], max_new_tokens=20, temperature=0, repetition_penalty=1.0)[0] == plain
    _, logps = generate(model, [[1, 2, 3]], max_new_tokens=1, temperature=1.0, repetition_penalty=5.0, return_logp=True,
                        seeds=[4])  # log-probabilities are the model's own, before the penalty
    token = generate(model, [[1, 2, 3]], max_new_tokens=1, temperature=1.0, repetition_penalty=5.0, seeds=[4])[0][0]
    assert logps[0][0] == pytest.approx(model(torch.tensor([[1, 2, 3]]))[0, -1].log_softmax(-1)[token].item(), abs=1e-5)
    penalised = generate(model, [[1, 2, 3]], max_new_tokens=20, temperature=0, repetition_penalty=1e6)[0]
    assert len(set(penalised)) == 20 and not {1, 2, 3} & set(penalised)


def test_generation_refuses_what_does_not_fit():
    model = lively(dtype=torch.float32)
    with pytest.raises(UserError, match="exceed"):
        generate(model, [[1] * 40], max_new_tokens=9)
    with pytest.raises(UserError, match="no tokens"):
        generate(model, [[1], []], max_new_tokens=3)
    with pytest.raises(UserError, match="max_seq_len"):
        model(some_ids(1, 49))


def test_no_prompts_no_replies():
    """What a filter left empty is not a prompt without tokens."""
    model = lively(dtype=torch.float32)
    assert generate(model, [], max_new_tokens=3) == []
    assert generate(model, [], max_new_tokens=3, return_logp=True) == ([], [])


def test_rotary_scores_depend_on_distance_alone():
    """RoPE: <rotate(q, m), rotate(k, n)> depends on m - n only, and lengths are kept (Su et al. 2021, section 3.2)."""
    model = GPT(GPTConfig(**SMALL))
    q, k = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0)), torch.ones(1, 1, 1, 8)

    def at(x, position):
        return rotate(x, model.cos[[position]][None, :, None], model.sin[[position]][None, :, None])

    for distance in (0, 1, 5):
        scores = [(at(q, m) * at(k, m - distance)).sum().item() for m in range(distance, 40, 7)]
        assert max(scores) - min(scores) < 1e-5
    assert (at(q, 3) * at(k, 0)).sum() != pytest.approx((at(q, 4) * at(k, 0)).sum().item(), abs=1e-3)
    assert at(q, 17).norm().item() == pytest.approx(q.norm().item(), rel=1e-6)


def test_rotary_matches_complex_multiplication():
    """Entry pair (d, d + D/2) turns by position * theta^(-2d/D), as a complex number times exp(i angle)."""
    model = GPT(GPTConfig(**SMALL))
    x = torch.randn(2, 48, 3, 8, dtype=torch.float64)
    turned = rotate(x, model.cos.double()[None, :, None], model.sin.double()[None, :, None])
    angle = torch.arange(48)[:, None, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angle)
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), -1), rtol=1e-5, atol=1e-5)


def test_positions_restart_with_each_segment():
    segments = torch.tensor([[0, 0, 0, 1, 1, 5, 5, -1, -1], [2, 2, 2, 2, 2, 2, 2, 2, 2]])
    assert restarting_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0, 1, 0, 1], list(range(9))]


@pytest.mark.parametrize("switches", SWITCHES)
def test_every_configuration_overfits_four_lines(switches):
    """Every switch builds and trains: four lines of text are learned by heart."""
    lines = ["to be, or not to be, that is", "whether 'tis nobler in the mi",
             "the slings and arrows of outr", "or to take arms against a sea"]
    alphabet = sorted(set("".join(lines)))
    ids = torch.tensor([[alphabet.index(c) for c in line[:28]] for line in lines])
    model = GPT(GPTConfig(**{**SMALL, **switches}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        loss = -model(ids[:, :-1], ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert generate(model, [ids[2, :4].tolist()], max_new_tokens=24, temperature=0)[0] == ids[2, 4:].tolist()


def test_first_loss_is_ln_V_and_every_parameter_gets_a_number():
    """An untied head starts at zero: the first loss is exactly ln V. No parameter is left as it was allocated."""
    model = GPT(GPTConfig(**SMALL))
    ids = some_ids(4, 20)
    assert -model(ids, ids.roll(-1, 1)).mean().item() == pytest.approx(math.log(37), abs=1e-6)
    assert all(p.isfinite().all() for p in model.parameters())
    again, other = GPT(GPTConfig(**SMALL)), GPT(GPTConfig(**SMALL), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not torch.equal(model.embed.weight, other.embed.weight)
    for switches in SWITCHES:  # one gradient step must reach every parameter that the zero matrices do not shadow
        model = lively(**switches)
        model(ids, ids.roll(-1, 1)).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_scalar_head_reads_each_position():
    """head="scalar": (B, T) float32, causal, one number per position."""
    model, ids = lively(head="scalar", dtype=torch.float32), some_ids(2, 10)
    values = model(ids)
    assert values.shape == (2, 10) and values.dtype == torch.float32
    torch.testing.assert_close(model(ids[:, :6]), values[:, :6])


def test_flops_formula_counts_the_matrix_products():
    """flops_per_token against PyTorch's own counter over the naive model, whose attention computes both triangles."""
    from torch.utils.flop_counter import FlopCounterMode
    T = 16
    model = GPT(GPTConfig(**{**SMALL, "attention": "naive", "n_kv_head": 2}))
    ids = some_ids(2, T)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    # keys above the diagonal: rows * tokens * 6 layers C (2T - (T+1))
    wasted = 2 * T * 6 * 2 * SMALL["n_embd"] * (T - 1)
    assert counter.get_total_flops() == pytest.approx(2 * T * model.flops_per_token(T) + wasted, rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_loaded_strictly(tied):
    """load_weights: another shape, a missing or unknown name is one clear line; another head kind is left as born."""
    shape = {**SMALL, "tie_embeddings": tied}
    source, target = lively(seed=3, dtype=torch.float32, tie_embeddings=tied), GPT(GPTConfig(**shape))
    target.load_weights(source.state_dict(), "x")
    ids = some_ids(1, 8)
    assert torch.equal(source(ids), target(ids))
    for broken in ({**source.state_dict(), "extra": torch.zeros(1)},
                   {**source.state_dict(), "norm.weight": torch.zeros(3)},
                   {k: v for k, v in source.state_dict().items() if k != "norm.weight"}):
        with pytest.raises(UserError, match="norm.weight|extra"):
            target.load_weights(broken, "x")
    reward = GPT(GPTConfig(**shape), head="scalar")
    reward.load_weights(source.state_dict(), "x")
    assert torch.equal(reward.embed.weight, source.embed.weight) and reward.head.weight.shape == (1, 32)


def test_configuration_errors_name_the_flag():
    for bad, flag in ((dict(n_embd=30), "--n_embd"), (dict(n_kv_head=3), "--n_kv_head"),
                      (dict(n_embd=12, n_head=4), "--position"), (dict(n_head=0), "--n_head")):
        with pytest.raises(UserError, match=flag):
            GPTConfig(**{**SMALL, **bad})
    with pytest.raises(UserError, match="n_layers"):
        GPTConfig.from_dict({"n_layers": 3}, "config.json")
    with pytest.raises(UserError, match="n_layer"):
        GPTConfig.from_dict({"n_layer": "3"}, "config.json")


def test_cache_holds_every_position_once():
    cache = KVCache(1, 6)
    layer = cache.layers[0]
    chunks = [torch.randn(2, 3, n, 4) for n in (3, 1, 2)]
    for i in range(3):
        k, v = layer.append(chunks[i], -chunks[i])
        expected = torch.cat(chunks[:i + 1], 2)
        assert torch.equal(k, expected) and torch.equal(v, -expected)


def test_shapes_of_every_switch_combination():
    """All 2^6 combinations of the switches run forward."""
    ids = some_ids(2, 6)
    for norm, position, mlp, qk_norm, bias, tie in itertools.product(
            ("rms", "layer"), ("rope", "learned"), ("swiglu", "gelu"), (True, False), (True, False), (True, False)):
        config = GPTConfig(**SMALL, norm=norm, position=position, mlp=mlp,
                           qk_norm=qk_norm, bias=bias, tie_embeddings=tie)
        assert GPT(config)(ids).shape == (2, 6, 37)
