"""PPO: each formula against an oracle, the rollout against a naive model, train_ppo.py from end to end."""
import dataclasses
import json
import math
import os
import random

import numpy as np
import pytest
import torch
from ranks import as_torchrun, ranks
from small_chat import FORMS, assert_noticed, bandit, calls_of, in_form, split_by_hand

import train_ppo
from data import CHAT_TEMPLATE, Windows, encode_prompt
from lib import records
from lib.checkpoint import load_checkpoint, save_final
from lib.program import UserError
from lib.ranks import Ranks
from lib.records import read_prompts
from lib.tokenizer import make_tokenizer
from model import GPT, Block, GPTConfig, load_model
from train_ppo import (
    Config,
    Models,
    ReplyHead,
    adapted,
    draw,
    gae,
    in_slots,
    kl_penalty,
    micro_batches,
    minibatches,
    ppo_policy_loss,
    ppo_value_loss,
    score,
    token_rewards,
    whiten,
)
from zero import Zero

TOKENIZER = make_tokenizer("char", "abcdefg ")
ENV = Ranks(0, 1, 0, 1, torch.device("cpu"))


def replies(B=6, R=9, seed=0):
    """Random logp, old_logp, advantages, values, old_values, returns (B, R) in float64, and a mask of ragged replies:
    one of a single token, one that fills all slots."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(B, R, generator=generator, dtype=torch.float64) for _ in range(6)]
    lengths = torch.tensor([1, R, *torch.randint(2, R, (B - 2,), generator=generator).tolist()])
    return *numbers, torch.arange(R) < lengths[:, None]


# ---- formulas -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0), (0.0, 0.7)])
def test_gae_equals_the_double_loop(gamma, lam):
    """P4: A_t = sum_k (gamma lambda)^k delta_t+k, written out; return = A + V; lambda 1 is G - V, lambda 0 is delta."""
    rewards, values, *_, mask = replies()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b in range(len(mask)):
        n = int(mask[b].sum())
        r, v = rewards[b].tolist(), [*values[b, :n].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(expected + v[t], abs=1e-12)
            if lam == 1:
                assert returns[b, t].item() == pytest.approx(sum(gamma**k * r[t + k] for k in range(n - t)), abs=1e-12)
        assert not advantages[b, n:].any() and not returns[b, n:].any()


def test_the_rewards_of_a_reply_add_up():
    """P6: sum_t r_t = score - beta sum k, the score at the last token, wherever that is; P14: nothing behind it."""
    logp, ref_logp, *_, mask = replies()
    kl, scores = kl_penalty(logp, ref_logp), torch.arange(6).double()
    rewards = token_rewards(kl, scores, mask, 0.3)
    for b, n in enumerate(mask.sum(1).tolist()):
        assert rewards[b].sum().item() == pytest.approx(b - 0.3 * (logp - ref_logp)[b, :n].sum().item())
        expected = -0.3 * kl[b, :n]
        expected[n - 1] += b
        torch.testing.assert_close(rewards[b, :n], expected)
        assert not rewards[b, n:].any()


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_what_stands_behind_a_reply_changes_nothing(garbage):
    """P5: huge, infinite and undefined numbers in the pads: all results and all gradients as with zeros there."""
    *numbers, mask = replies()

    def results(fill):
        logp, old_logp, advantages, values, old_values, returns = (
            torch.where(mask, x, fill).requires_grad_() for x in numbers)
        policy, sums = ppo_policy_loss(logp, old_logp, advantages, mask, 0.2)
        value, more = ppo_value_loss(values, old_values, returns, mask, 0.2)
        (policy + value).backward()
        rewards = token_rewards(kl_penalty(logp, old_logp), returns[:, 0], mask, 0.1)
        tensors = [policy, value, *sums.values(), *more.values(), logp.grad, values.grad, rewards, whiten(logp, mask),
                   *gae(rewards, values, mask, 0.9, 0.8)]
        return [x.detach() for x in tensors]

    for clean, dirty in zip(results(0.0), results(garbage), strict=True):
        assert torch.equal(clean, dirty)


def test_clipping_has_four_quadrants():
    """P7: no gradient iff A > 0 and rho > 1 + eps, or A < 0 and rho < 1 - eps; else -A rho."""
    for advantage in (1.0, -2.0):
        for ratio in (0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0):
            logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
            one = torch.ones(1, 1, dtype=torch.float64)
            loss, sums = ppo_policy_loss(logp, 0 * one, advantage * one, one, 0.2)
            loss.backward()
            stuck = ratio > 1.2 if advantage > 0 else ratio < 0.8
            assert logp.grad.item() == pytest.approx(0.0 if stuck else -advantage * ratio)
            assert sums["clipfrac"] == stuck and sums["ratio"].item() == pytest.approx(ratio)
            assert loss.item() == pytest.approx(max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2)))


def test_at_ratio_one_it_is_the_policy_gradient():
    """P8: the gradient at the first update is that of -A log pi, summed."""
    logp, _, advantages, *_, mask = replies()
    logp.requires_grad_()
    loss, sums = ppo_policy_loss(logp, logp.detach(), advantages, mask, 0.2)
    loss.backward()
    torch.testing.assert_close(logp.grad, torch.where(mask, -advantages, 0.0))
    assert sums["clipfrac"] == 0 and sums["approxkl"] == 0 and sums["ratio"] == mask.sum()


def test_clipped_values():
    """P9: never below the plain squared error; equal where |V - V_old| <= c; no gradient exactly where the clipped
    term is the larger one."""
    *_, values, old_values, returns, mask = replies()
    values = values.requires_grad_()
    loss, sums = ppo_value_loss(values, old_values, returns, mask, 0.5)
    loss.backward()
    plain = 0.5 * ((values - returns) ** 2)
    clipped = 0.5 * ((old_values + (values - old_values).clamp(-0.5, 0.5) - returns) ** 2)
    larger = (clipped > plain + 1e-12) & mask
    assert larger.any() and sums["value_clipfrac"] == larger.sum()
    assert loss.item() == pytest.approx(torch.maximum(plain, clipped)[mask].sum().item())
    torch.testing.assert_close(values.grad, torch.where(mask & ~larger, (values - returns).detach(), 0.0))
    unclipped, sums = ppo_value_loss(values, old_values, returns, mask, math.inf)
    assert unclipped.item() == pytest.approx(plain[mask].sum().item()) and sums["value_clipfrac"] == 0


def test_whitening():
    """P10: over the tokens mean 0 and variance 1, pads 0; shift_mean=False keeps the mean; a constant stays finite."""
    x, *_, mask = replies()
    white, scaled = whiten(3 * x + 7, mask), whiten(3 * x + 7, mask, shift_mean=False)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[mask].var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert not white[~mask].any() and not scaled[~mask].any()
    assert scaled[mask].mean().item() == pytest.approx((3 * x + 7)[mask].mean().item())
    assert whiten(torch.full_like(x, 5.0), mask).abs().max() < 1e-9


def test_the_controller_of_beta():
    """P12: KL on target stays; 20 % and more above it multiplies by 1 + 0.2 n / horizon; below lowers; 0: fixed."""
    assert adapted(0.1, 6.0, 6.0, 100, 1000) == 0.1
    assert adapted(0.1, 7.2, 6.0, 100, 1000) == adapted(0.1, 99.0, 6.0, 100, 1000) == pytest.approx(0.1 * 1.02)
    assert adapted(0.1, 6.3, 6.0, 100, 1000) == pytest.approx(0.1 * (1 + 0.05 / 10))
    assert adapted(0.1, -1.0, 6.0, 100, 1000) == pytest.approx(0.1 * 0.98)
    assert adapted(0.1, 50.0, 0.0, 100, 1000) == 0.1


def test_beta_has_the_time_to_adapt():
    """In a run of the defaults beta can become ten times as large: a longer horizon would leave it where it was."""
    cfg, beta = Config(), 1.0
    for _ in range(cfg.steps):
        beta = adapted(beta, 9.0, 3.0, cfg.batch_size, cfg.kl_horizon)
    assert beta > 10


def test_bandit_reaches_the_gibbs_policy():
    """P19: replies of one token, a table for a policy: the KL-penalised optimum is pi* = ref exp(r / beta) / Z, with
    objective beta log Z. PPO's own parts, rollout after rollout, must arrive there."""
    generator, V, N, beta = torch.Generator().manual_seed(3), 8, 4096, 0.5
    ref, r, best = bandit(beta, V)
    logits, value = ref.clone().requires_grad_(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, value], lr=0.1)
    mask = torch.ones(N, 1, dtype=torch.bool)
    rollouts = 150
    for i in range(rollouts):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - i / rollouts)
        with torch.no_grad():
            grid = (torch.arange(N) + torch.rand((), generator=generator)) / N  # samples without most of their noise
            actions = torch.searchsorted(logits.softmax(0).cumsum(0), grid.double()).clamp(max=V - 1)[:, None]  # (N, 1)
            old_logp, old_values = logits.log_softmax(0)[actions], value.expand(N, 1).clone()
            rewards = token_rewards(kl_penalty(old_logp, ref[actions]), r[actions[:, 0]], mask, beta)
            advantages, returns = gae(rewards, old_values, mask, 1.0, 0.95)
            advantages = whiten(advantages, mask)
        for _ in range(2):
            policy, _ = ppo_policy_loss(logits.log_softmax(0)[actions], old_logp, advantages, mask, 0.2)
            error, _ = ppo_value_loss(value.expand(N, 1), old_values, returns, mask, 0.2)
            optimizer.zero_grad()
            ((policy + error) / N).backward()
            optimizer.step()
    p = logits.detach().log_softmax(0)
    assert (p.exp() - best.exp()).abs().max() < 0.01
    objective = (p.exp() * (r - beta * (p - ref))).sum().item()
    assert objective == pytest.approx(beta * (ref + r / beta).logsumexp(0).item(), abs=2e-3)


# ---- rollouts -------------------------------------------------------------------------------------------------------

def lively(head="lm", seed=0, noise=0.3, **more) -> GPT:
    """A tiny model whose every weight matters."""
    model = GPT(GPTConfig(vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_embd=16, max_seq_len=64, **more),
                head=head)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += noise * torch.randn(p.shape, generator=generator)
    return model


def four_models(**more) -> tuple[Models, Zero]:
    models = Models(lively(**more), lively("scalar", 1), lively(seed=2, **more), lively("scalar", 3))
    for model in (models.actor, models.reference):
        model.head = ReplyHead(model.head, TOKENIZER.vocab_size, TOKENIZER.specials_but_end)
    return models, Zero(models.actor, units=models.actor.units())


def some_prompts(n: int, seed=0) -> list[list[int]]:
    r = random.Random(seed)
    texts = ["".join(r.choices("abcdefg ", k=r.randint(1, 20))) for _ in range(n)]
    return [encode_prompt(TOKENIZER, [{"role": "user", "content": text}]) for text in texts]


def small(**more) -> Config:
    return Config(**{"batch_size": 10, "minibatches": 2, "max_new_tokens": 8, "seq_len": 64, "seed": 5} | more)


def naive_logp(model, sequence: list[int], temperature: float) -> torch.Tensor:
    """log p of each token of one sequence after the first, the forbidden ones left out of softmax: (T - 1,)."""
    model.head = getattr(model, "plain_head", model.head)
    logits = model(torch.tensor([sequence]))[0, :-1] / temperature  # (T - 1, V)
    logits[:, list(TOKENIZER.specials_but_end)] = -math.inf
    return logits.log_softmax(-1)[torch.arange(len(sequence) - 1), torch.tensor(sequence[1:])]


def rolled_out(cfg: Config, n=10, **more):
    models, actor = four_models(**more)
    rollout = draw(some_prompts(n), list(range(n)), models.actor, actor, TOKENIZER, cfg, ENV)
    score(rollout, minibatches(n, cfg, 1, 0), models, cfg, ENV)
    return models, actor, rollout


@pytest.mark.parametrize("temperature, more", [
    (0.7, {}), (1.0, {}), (1.0, {"tie_embeddings": True, "position": "learned"})])
def test_sampler_scorer_and_a_naive_model_agree(temperature, more):
    """P3: log-probabilities from the sampler's cache, from packed rows and from one reply at a time are equal to 1e-5;
    values stand before their token, scores are read at the end, which is put there where it was not drawn."""
    models, actor, rollout = rolled_out(small(temperature=temperature), **more)
    assert {True, False} == set(rollout.ended)
    assert (rollout.sampled_logp - rollout.logp).abs().max() < 1e-5
    with actor.gathered():
        for i, (prompt, reply) in enumerate(zip(rollout.prompts, rollout.replies)):
            P, n = len(prompt), len(reply)
            assert rollout.mask[i].tolist() == [True] * n + [False] * (rollout.mask.shape[1] - n)
            whole = prompt + reply + [TOKENIZER.end_id] * (not rollout.ended[i])
            for logp, model in ((rollout.logp, models.actor), (rollout.ref_logp, models.reference)):
                expected = naive_logp(model, prompt + reply, temperature)[P - 1:]
                torch.testing.assert_close(logp[i, :n], expected, atol=1e-5, rtol=0)
                assert not logp[i, n:].any()
            values = models.critic(torch.tensor([prompt + reply]))[0, P - 1 : -1]
            torch.testing.assert_close(rollout.values[i, :n], values, atol=1e-5, rtol=0)
            reward = models.reward(torch.tensor([whole]))[0, -1]
            torch.testing.assert_close(rollout.scores[i], reward, atol=1e-5, rtol=0)
            assert not set(reply) & set(TOKENIZER.specials_but_end)


def test_a_sampler_at_another_temperature_is_noticed():
    """P3's mutation: replies drawn at 0.7 and scored at 1 do not agree."""
    models, actor, rollout = rolled_out(small(temperature=0.7))
    score(rollout, minibatches(10, small(), 1, 0), models, small(), ENV)
    assert (rollout.sampled_logp - rollout.logp).abs().max() > 0.05


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_frequencies_of_samples(temperature):
    """P3: chi-square of 3000 first tokens against softmax(logits / T) over the allowed ids."""
    models, actor = four_models()
    prompt, n = some_prompts(1)[0], 3000
    cfg = small(max_new_tokens=1, temperature=temperature)
    seeds = train_ppo.random_bits(1, 1, train_ppo.SAMPLING, n).tolist()
    rollout = draw([prompt] * n, seeds, models.actor, actor, TOKENIZER, cfg, ENV)
    with actor.gathered():
        p = (models.actor(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1).double()
    count = torch.bincount(torch.tensor([reply[0] for reply in rollout.replies]), minlength=len(p))
    allowed = p > 0
    assert allowed.sum() == TOKENIZER.vocab_size - 5 and count[~allowed].sum() == 0
    chi2 = ((count - n * p) ** 2 / (n * p))[allowed].sum()
    assert chi2 < 8 + 4 * math.sqrt(16)  # 8 degrees of freedom: four standard deviations above their mean


def test_estimates_of_kl_agree_with_the_exact_one():
    """P20: over 3000 samples of one token, the means of k1 and k3 are the exact KL, within 3 standard errors."""
    models, actor = four_models()
    prompt, n, cfg = some_prompts(1)[0], 3000, small(max_new_tokens=1)
    seeds = train_ppo.random_bits(2, 1, train_ppo.SAMPLING, n).tolist()
    rollout = draw([prompt] * n, seeds, models.actor, actor, TOKENIZER, cfg, ENV)
    with actor.gathered():
        logp, ref_logp = (model(torch.tensor([prompt]))[0, -1].log_softmax(-1)[[r[0] for r in rollout.replies]]
                          for model in (models.actor, models.reference))
        p, q = (model(torch.tensor([prompt]))[0, -1].softmax(-1) for model in (models.actor, models.reference))
    exact = torch.where(p > 0, p * (p / q).log(), 0.0).sum()
    k1 = kl_penalty(logp, ref_logp)
    for estimate in (k1, torch.expm1(-k1) + k1):
        assert (estimate.mean() - exact).abs() < 3 * estimate.std() / math.sqrt(n) and exact > 0.05


def test_the_entropy_of_a_uniform_policy():
    """P11: ln of the number of allowed ids at each token of a reply, and nothing anywhere else."""
    model = lively(noise=0.0)  # a new head is 0
    model.head = ReplyHead(model.head, TOKENIZER.vocab_size, TOKENIZER.specials_but_end)
    ids = torch.randint(8, (2, 6))
    targets = torch.where(torch.rand(2, 6) < 0.5, ids, -100)
    _, entropy, _ = model(ids, targets, with_stats=True)
    expected = torch.where(targets >= 0, math.log(TOKENIZER.vocab_size - 5), 0.0)
    torch.testing.assert_close(entropy, expected)


def gradients(rollout, models, actor, cfg, chosen, env=ENV):
    """Of the loss of one minibatch, as train_ppo's loop accumulates it."""
    n = int(rollout.mask[chosen].sum())
    for which, ids, targets, segment_ids in micro_batches(rollout, chosen, cfg, env):
        m = rollout.mask[which]
        logp = models.actor(ids, targets, segment_ids=segment_ids)
        loss, _ = ppo_policy_loss(in_slots(logp, targets, m), rollout.ref_logp[which], rollout.values[which], m, 0.2)
        actor.backward(loss / n)
    flat = torch.cat([unit.grad for unit in actor.units])
    for unit in actor.units:
        unit.finish_gradients()
    return flat.clone()


def test_parts_and_order_of_a_minibatch_do_not_change_its_gradient():
    """P13: whatever the rows per forward, the order of the replies and the length of the rows, uneven as they are."""
    models, actor, rollout = rolled_out(small())
    chosen = [7, 2, 5, 0, 9]
    whole = gradients(rollout, models, actor, small(), chosen)
    for cfg, order in ((small(micro_batch_size=1), chosen), (small(micro_batch_size=2), chosen),
                       (small(), sorted(chosen)), (small(seq_len=30), chosen), (small(seq_len=40), chosen[::-1])):
        again = gradients(rollout, models, actor, cfg, order)
        torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-6)
    assert whole.norm() > 0.01


def test_every_rank_has_as_many_rows_and_together_they_have_all():
    """Whatever the world, each reply is in one rank's rows, and all ranks run the same number of forwards."""
    _, _, rollout = rolled_out(small())
    for world in (1, 2, 3, 7):
        batches = [list(micro_batches(rollout, list(range(10)), small(micro_batch_size=1), Ranks(
            rank, world, 0, 1, torch.device("cpu")))) for rank in range(world)]
        assert len({len(mine) for mine in batches}) == 1
        assert sorted(i for mine in batches for which, *_ in mine for i in which.tolist()) == list(range(10))
        for which, ids, targets, _ in (batch for mine in batches for batch in mine):
            assert torch.equal(in_slots(ids.roll(-1, 1), targets, rollout.mask[which])[rollout.mask[which]],
                               targets[targets >= 0])


def test_minibatches_are_a_partition_that_epochs_shuffle():
    cfg = small(minibatches=3)
    parts = minibatches(10, cfg, 1, 0)
    assert sorted(sum(parts, [])) == list(range(10)) and [len(part) for part in parts] == [3, 3, 4]
    assert parts == minibatches(10, cfg, 1, 0) and parts != minibatches(10, cfg, 1, 1) != minibatches(10, cfg, 2, 1)


# ---- the script -----------------------------------------------------------------------------------------------------

def finished(folder, model: GPT, head: str) -> str:
    folder.mkdir()
    TOKENIZER.save(folder / "tokenizer.json")
    config = {"model": dataclasses.asdict(model.config), "head": head, "chat_template": CHAT_TEMPLATE}
    save_final(str(folder), model.state_dict(), config, str(folder / "tokenizer.json"))
    return str(folder)


def likes_a() -> GPT:
    """A reward model made by hand: it looks back at all tokens alike, and its reward grows with the share of a's."""
    config = GPTConfig(vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=1, n_embd=16, max_seq_len=64)
    model = GPT(config, head="scalar")
    for p in (model.embed.weight, model.blocks[0].attn.qkv.weight, model.blocks[0].attn.proj.weight, model.head.weight):
        p.data.zero_()
    model.embed.weight.data[:, 1] = 1.0
    model.embed.weight.data[TOKENIZER.encode("a")[0], 0] = 1.0
    model.blocks[0].attn.qkv.weight.data[32] = torch.eye(16)[0]  # v_0 is "this is an a"; q and k are 0: all alike
    model.blocks[0].attn.proj.weight.data[2, 0] = 1.0
    model.head.weight.data[0, 2] = 1.0
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an actor, a reward model and prompts."""
    folder = tmp_path_factory.mktemp("ppo")
    finished(folder / "sft", lively(noise=0.1), "lm")
    finished(folder / "rm", likes_a(), "scalar")
    r = random.Random(0)
    with open(folder / "prompts.jsonl", "w") as file:
        for i in range(40):
            text = "".join(r.choices("abcdefg ", k=r.randint(0, 19))) + "b"
            file.write(json.dumps({"prompt": text, "tag": "even" if i % 2 == 0 else "odd"}) + "\n")
    return folder


def arguments(place, out, *more):
    return ["--data", str(place / "prompts.jsonl"), "--init", str(place / "sft"), "--reward_model", str(place / "rm"),
            "--out", str(out), "--steps", "4", "--batch_size", "12", "--minibatches", "3", "--max_new_tokens", "8",
            "--lr", "3e-3", "--warmup_steps", "0", "--eval_every", "0", "--save_every", "0", "--stop_kl", "0",
            "--eval_prompts", "4", "--device", "cpu", *more]


def train(place, out, *more):
    """Run main([...]): (training events, final weights, lines of samples.jsonl)."""
    assert train_ppo.main(arguments(place, out, *more)) == 0
    events = [e for e in map(json.loads, open(out / "metrics.jsonl")) if "objective/kl" in e]
    samples = [json.loads(line) for line in open(out / "samples.jsonl")]
    return events, torch.load(out / "final" / "model.pt", weights_only=True), samples


@pytest.fixture(scope="module")
def reference(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "out"
    return out, *train(place, out, "--save_every", "1", "--keep", "9", "--target_kl", "0.05", "--kl_horizon", "100")


def test_a_whole_run(reference):
    """P2: at first KL is exactly 0 and the objective is the mean score; P13: epochs x minibatches updates; the run
    leaves events, samples and a model to chat with."""
    out, events, weights, samples = reference
    assert [e["step"] for e in events] == [1, 2, 3, 4] and len(samples) == 4 * 12
    first = events[0]
    assert first["objective/kl"] == 0 and first["objective/rlhf_reward"] == first["objective/scores"]
    assert all(e["updates"] == 6 and e["val/sampler_gap"] < 1e-5 for e in events)
    assert [e["episode"] for e in events] == [12, 24, 36, 48]
    assert events[-1]["objective/kl"] > 0.01 and 0 < events[-1]["policy/approxkl_avg"] < 0.5
    assert json.load(open(out / "final" / "config.json"))["chat_template"] == CHAT_TEMPLATE
    actor, *_ = load_model(str(out))
    assert all(torch.equal(p, weights[name]) for name, p in actor.named_parameters())
    evaluations = [e for e in map(json.loads, open(out / "metrics.jsonl")) if "eval_score" in e]
    assert [e["step"] for e in evaluations] == [0, 4]
    assert evaluations[0]["eval_kl"] == 0 and {"eval_score/even", "eval_score/odd"} <= evaluations[0].keys()


def test_rollouts_are_what_they_say(reference, place):
    """The reward and KL in samples.jsonl, from the texts alone and with the naive model: the reference is the first
    actor, the policy that of the checkpoint before; the events' means are those of the samples, from the same
    log-probabilities."""
    out, events, _, samples = reference
    init, rm = load_model(str(place / "sft"))[0], load_model(str(place / "rm"))[0]
    for step in (1, 3):
        actor, critic = load_model(str(place / "sft"))[0], load_model(str(place / "rm"))[0]
        if step > 1:
            (place / f"only-{step}").mkdir()
            os.symlink(out / f"step-{step - 1:08d}", place / f"only-{step}" / f"step-{step - 1:08d}")
            zeros = {"actor": Zero(actor, units=actor.units()), "critic": Zero(critic, units=critic.units())}
            assert load_checkpoint(str(place / f"only-{step}"), zeros)[0] == step - 1
            weights = zeros["actor"].full_state_dict()
            actor = load_model(str(place / "sft"))[0]
            actor.load_weights(weights, "")
        lines = [line for line in samples if line["step"] == step]
        entropy, k3, lengths = [], [], []
        for line in lines:
            prompt = encode_prompt(TOKENIZER, line["prompt"])
            reply = TOKENIZER.encode(line["responses"][0]) + [TOKENIZER.end_id] * line["ended"][0]
            logp, ref_logp = (naive_logp(model, prompt + reply, 1.0)[len(prompt) - 1:] for model in (actor, init))
            k = logp - ref_logp
            assert line["kl"][0] == pytest.approx(k.sum().item(), abs=1e-5)
            entropy.append(-logp.sum().item())
            k3.append((torch.exp(-k) - 1 + k).sum().item())
            lengths.append(len(reply))
            whole = prompt + reply + [TOKENIZER.end_id] * (not line["ended"][0])
            assert line["reward"][0] == pytest.approx(rm(torch.tensor([whole]))[0, -1].item(), abs=1e-5)
        event, unfinished = events[step - 1], 12 - sum(line["ended"][0] for line in lines)
        assert event["objective/kl"] == pytest.approx(np.mean([line["kl"] for line in lines]), abs=1e-5)
        mean = np.mean([line["reward"] for line in lines])
        assert event["objective/scores"] == pytest.approx(mean - unfinished / 12, abs=1e-5)  # P6: the penalty, once
        assert event["val/num_eos_tokens"] == 12 - unfinished and 0 < unfinished < 12
        assert event["objective/rlhf_reward"] == pytest.approx(
            event["objective/scores"] - event["beta"] * event["objective/kl"])
        assert event["objective/non_score_reward"] == pytest.approx(-event["beta"] * event["objective/kl"])
        for name, each in (("objective/entropy", entropy), ("objective/kl_k3", k3), ("val/response_length", lengths)):
            assert event[name] == pytest.approx(np.mean(each), abs=1e-4), name


def test_beta_follows_its_target(reference):
    """P12 in the run: each step's beta is the controller's answer to the one before."""
    events = reference[1]
    assert events[0]["beta"] == 0.05 and events[0]["beta"] > events[1]["beta"]  # KL 0 is below its target
    for before, after in zip(events, events[1:]):
        assert after["beta"] == pytest.approx(adapted(before["beta"], before["objective/kl"], 0.05, 12, 100))


def test_what_advantages_are_made_of(place, tmp_path, monkeypatch):
    """P6 in the run: the rewards that gae is given add up to score - penalty - beta KL of samples.jsonl, the penalty
    once and beta as adapted so far; --whiten_rewards divides them by their deviation and keeps their mean."""
    flags = ["--missing_eos_penalty", "0.7", "--target_kl", "0.05", "--beta", "0.5", "--kl_horizon", "12"]
    gaes = calls_of(monkeypatch, train_ppo, "gae")
    events, _, samples = train(place, tmp_path / "plain", *flags)
    for event, (rewards, *_) in zip(events, gaes, strict=True):
        lines = [line for line in samples if line["step"] == event["step"]]
        expected = [line["reward"][0] - 0.7 * (not line["ended"][0]) - event["beta"] * line["kl"][0] for line in lines]
        assert rewards.sum(1).tolist() == pytest.approx(expected, abs=1e-5)
        assert 0 < sum(line["ended"][0] for line in lines) < 12
    assert events[0]["beta"] == 0.5 and events[1]["beta"] == pytest.approx(0.4) != events[2]["beta"]
    train(place, tmp_path / "white", *flags, "--steps", "1", "--whiten_rewards")
    (rewards, _, mask, *_), (white, *_) = gaes[0], gaes[-1]  # of the same rollout
    torch.testing.assert_close(white, whiten(rewards, mask, shift_mean=False))


def test_resuming_is_bitwise_equal_to_not_stopping(reference, place, tmp_path):
    """P18: from the checkpoint of step 2 on, with beta, both optimizers and the draws: the same last bits, and each
    line once."""
    out, events, weights, samples = reference
    (tmp_path / "step-00000002").symlink_to(out / "step-00000002")
    lines = [json.dumps(line) + "\n" for line in samples[:30]]
    (tmp_path / "samples.jsonl").write_text("".join(lines) + '{"step": 3, "pro')
    again, resumed, lines = train(place, tmp_path, "--resume", "--target_kl", "0.05", "--kl_horizon", "100")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    timeless = [{k: v for k, v in e.items() if "second" not in k and k != "memory"} for e in (*events[2:], *again)]
    assert timeless[:2] == timeless[2:] and lines == samples


def first_update(place, out, patch, flags):
    """A run with lr 0: what policy loss, value loss and gae were given, and the events; P1, P16. And P13: both models
    step once per minibatch and epoch, whatever the micro-batches."""
    stepped = calls_of(patch, Zero, "step")
    calls, valued, gaes = (calls_of(patch, train_ppo, name) for name in ("ppo_policy_loss", "ppo_value_loss", "gae"))
    events, *_ = train(place, out, "--steps", "1", "--lr", "0", "--min_lr", "0", "--ppo_epochs", "3", *flags)
    assert len(stepped) == 2 * 3 * 3
    for called in (calls, valued):
        first = [new - old for new, old, *_ in called[: len(called) // 3]]  # all of epoch 1, as nothing moves
        assert all(not difference.any() for difference in first), max(d.abs().max() for d in first if d.numel())
        assert all(((new - old).abs() < 1e-5).all() for new, old, *_ in called) and any(map(torch.numel, first))
    return calls, valued, gaes, events


@pytest.mark.parametrize("flags", [[], ["--micro_batch_size", "1"], ["--temperature", "0.7"], ["--seq_len", "34"],
                                   ["--activation_checkpointing"],
                                   pytest.param(["--compile"], marks=pytest.mark.slow),
                                   pytest.param(["--compile", "--micro_batch_size", "1"], marks=pytest.mark.slow)])
def test_the_first_ratio_is_exactly_one(place, tmp_path, monkeypatch, flags):
    """P1: before the first update log pi_new - log pi_old is 0 to the last bit, and so is V - V_old; P16: with lr 0
    both stay below 1e-5 in all epochs, which mix the replies differently."""
    calls, valued, gaes, events = first_update(place, tmp_path, monkeypatch, flags)
    # The actor learns from A, whitened over the rollout, the critic from A + V before that; each slot once an epoch:
    advantages, returns = gae(*gaes[0])
    for called, expected in ((calls, whiten(advantages, gaes[0][2])), (valued, returns)):
        learned = torch.cat([given[mask] for _, _, given, mask, _ in called[: len(called) // 3]])
        assert torch.equal(learned.sort().values, expected[gaes[0][2]].sort().values)
    assert events[0]["policy/clipfrac_avg"] == 0 and events[0]["policy/approxkl_avg"] < 1e-10
    assert events[0]["val/ratio"] == pytest.approx(1) and events[0]["updates"] == 9


@pytest.mark.parametrize("bonus", [0.0, 0.1])
def test_what_is_logged_of_updates_and_evaluations(place, tmp_path, monkeypatch, bonus):
    """Each number from what the losses were given: means over the tokens of all updates, the explained variance over
    those of the rollout; backward gets the loss per token of its minibatch, for the critic as for the actor, whose
    entropy is worth --entropy. Those of an evaluation from its rollout."""
    policy, value, gaes, scored = (calls_of(monkeypatch, train_ppo, name) for name in (
        "ppo_policy_loss", "ppo_value_loss", "gae", "score"))
    backward, stepped = (calls_of(monkeypatch, Zero, name) for name in ("backward", "step"))
    entropies, forward = [], GPT.forward

    def listening(self, *args, **options):
        out = forward(self, *args, **options)
        if options.get("with_stats") and torch.is_grad_enabled():
            entropies.append(out[1].sum().item())
        return out

    monkeypatch.setattr(GPT, "forward", listening)
    (event,), *_ = train(place, tmp_path, "--steps", "1", "--lr", "1e-2", "--min_lr", "1e-2", "--cliprange", "0.05",
                         "--cliprange_value", "0.05", "--eval_prompts", "3", "--entropy", str(bonus))
    assert len(stepped) == 2 * 2 * 3 and event["updates"] == 6
    assert all(event[f"seconds/{name}"] > 0 for name in ("rollout", "scoring", "optimisation"))
    new, old, advantages = (torch.cat([call[i][call[3]] for call in policy]).detach().double() for i in range(3))
    values, old_values, returns = (torch.cat([call[i][call[3]] for call in value]).detach().double() for i in range(3))
    ratio = (new - old).exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(0.95, 1.05)
    error = (values - returns) ** 2
    clipped_error = (old_values + (values - old_values).clamp(-0.05, 0.05) - returns) ** 2
    rolled, mask = gae(*gaes[0])[1], gaes[0][2]
    expected = {
        "loss/policy_avg": torch.maximum(free, clipped).mean(), "policy/approxkl_avg": (new - old).square().mean() / 2,
        "policy/clipfrac_avg": (clipped > free).double().mean(), "val/ratio": ratio.mean(),
        "val/ratio_var": ratio.var(correction=0), "loss/value_avg": torch.maximum(error, clipped_error).mean() / 2,
        "val/clipfrac_avg": (clipped_error > error).double().mean(),
        "policy/entropy_avg": torch.tensor(sum(entropies) / len(new)),
        "val/explained_variance": 1 - (rolled - gaes[0][1])[mask].var(correction=0) / rolled[mask].var(correction=0)}
    for name, number in expected.items():
        assert event[name] == pytest.approx(number.item(), rel=1e-4, abs=1e-6) and number != 0, name
    for p, v, entropy, of_actor, of_critic in zip(policy, value, entropies, backward[0::2], backward[1::2],
                                                  strict=True):
        for calls, loss, of in ((p, ppo_policy_loss(*p)[0].item() - bonus * entropy, of_actor),
                                (v, ppo_value_loss(*v)[0].item(), of_critic)):
            assert of[1].item() == pytest.approx(loss / int(calls[3].sum()), rel=1e-5)
    evaluations = [e for e in map(json.loads, open(tmp_path / "metrics.jsonl")) if "eval_score" in e]
    for found, (rollout, *_) in zip(evaluations, (scored[0], scored[-1]), strict=True):
        scores = rollout.scores.tolist()
        assert {name: found[name] for name in found if name != "step"} == pytest.approx({
            "eval_score": np.mean(scores), "eval_score/even": (scores[0] + scores[2]) / 2, "eval_score/odd": scores[1],
            "eval_kl": (rollout.logp - rollout.ref_logp)[rollout.mask].sum().item() / 3,
            "eval_ended": sum(reply[-1] == TOKENIZER.end_id for reply in rollout.replies) / 3,
            "eval_response_length": np.mean([len(reply) for reply in rollout.replies])}, abs=1e-5)


def test_validation_data_of_its_own(reference, place, tmp_path):
    """--val_data with the prompts that --val_fraction would have set aside: the same evaluation and first rollout."""
    *_, samples = train(place, tmp_path, "--steps", "1", *split_by_hand(place / "prompts.jsonl", 36))
    found, expected = ([json.loads(line) for line in open(out / "metrics.jsonl")] for out in (tmp_path, reference[0]))
    assert found[0] == expected[0] and "eval_score" in found[0] and samples == reference[3][:12]


def test_no_prompt_is_trained_and_validated(place, tmp_path, monkeypatch):
    """Of the four prompts set aside two are also trained on: the others validate, and training is what it was. If all
    are, that is said."""
    lines = (place / "prompts.jsonl").read_text().splitlines()
    (tmp_path / "prompts.jsonl").write_text("\n".join([*lines[:37], lines[3], lines[38], lines[5]]))
    drawn = calls_of(monkeypatch, train_ppo, "draw")
    for name, folder in (("before", place), ("after", tmp_path)):
        train(place, tmp_path / name, "--steps", "1", "--data", str(folder / "prompts.jsonl"))
    prompts = [encode_prompt(TOKENIZER, record.messages) for record in read_prompts(place / "prompts.jsonl")]
    assert drawn[0][0] == prompts[36:] and drawn[3][0] == [prompts[36], prompts[38]]
    assert drawn[1][:2] == drawn[4][:2]
    (tmp_path / "prompts.jsonl").write_text("\n".join([*lines[:36], *lines[:4]]))
    with pytest.raises(UserError, match="--val_data"):
        train(place, tmp_path / "none", "--data", str(tmp_path / "prompts.jsonl"))


@pytest.mark.parametrize("form", [*FORMS, "ranked"])
def test_preferences_are_prompts_too(place, tmp_path, form):
    """Whatever the form of the file: its replies are left away, and the run is that of the bare prompts."""
    records = [json.loads(line) for line in open(place / "prompts.jsonl")]
    records = [{**record, "prompt": record["prompt"].strip(), "responses": ["a", "b"]} for record in records]
    records[0]["prompt"] = [{"role": role, "content": "abc"} for role in ("user", "assistant", "user")]
    records = records[form == "alpaca":]  # which has no room for earlier turns
    bare = [{"prompt": record["prompt"], "tag": record["tag"]} for record in records]
    found = []
    for name, lines in (("bare", bare), ("form", records if form == "ranked" else in_form(form, records))):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found.append(train(place, tmp_path / name, "--steps", "1", "--data", str(path)))
    (_, weights, samples), (_, others, same_samples) = found
    assert samples == same_samples and all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(place, tmp_path, monkeypatch, dtype):
    """However coarse the numbers: the first ratio is still exactly 1, and the sampler is not far."""
    calls = calls_of(monkeypatch, train_ppo, "ppo_policy_loss")
    events, *_ = train(place, tmp_path, "--dtype", dtype, "--steps", "1", "--lr", "0", "--min_lr", "0")
    assert all(torch.equal(logp, old_logp) for logp, old_logp, *_ in calls[:3])
    assert events[0]["objective/kl"] == 0 and events[0]["val/sampler_gap"] < 0.1


def test_each_step_draws_anew(place, tmp_path, monkeypatch):
    """Prompts by epochs, each with a seed of its own that never comes again; evaluations all with the same ones."""
    calls = calls_of(monkeypatch, train_ppo, "draw")
    train(place, tmp_path, "--ppo_epochs", "1", "--minibatches", "1", "--eval_every", "2")
    (first, *steps), evaluations = [[calls[i] for i in some] for some in ((1, 2, 4, 5), (0, 3, 6))]
    assert len(set(sum((seeds for _, seeds, *_ in (first, *steps)), []))) == 48
    assert sorted(first[0] + steps[0][0] + steps[1][0]) == sorted(
        encode_prompt(TOKENIZER, record.messages) for record in read_prompts(place / "prompts.jsonl")[:36])
    assert all(call[:2] == evaluations[0][:2] for call in evaluations)


def test_only_two_of_four_models_learn(place, tmp_path, monkeypatch):
    """P15: reference and reward model are bitwise what they were, actor and critic are not."""
    built, original = [], Zero.__init__

    def remembering(self, model, **options):
        built.append((self, {name: p.detach().clone() for name, p in model.named_parameters()}))
        original(self, model, **options)

    monkeypatch.setattr(Zero, "__init__", remembering)
    train(place, tmp_path, "--steps", "2")
    same = [all(torch.equal(p, z.full_state_dict()[name]) for name, p in before.items()) for z, before in built]
    assert same == [False, False, True, True] and [z.frozen for z, _ in built] == [False, False, True, True]


def test_early_stopping_leaves_the_weights_alone(place, tmp_path, monkeypatch):
    """P17: once the approximate KL is above stop_kl nothing moves until the next rollout."""
    flags = ["--steps", "1", "--lr", "0.01", "--min_lr", "0.01"]
    full, _, _ = train(place, tmp_path / "full", *flags, "--ppo_epochs", "4")
    events, weights, _ = train(place, tmp_path / "a", *flags, "--ppo_epochs", "4", "--stop_kl", "0.03")
    updates = events[0]["updates"]
    assert full[0]["updates"] == 12 and 1 < updates < 12
    calls = calls_of(monkeypatch, train_ppo, "ppo_policy_loss")
    _, until, _ = train(place, tmp_path / "b", *flags, "--ppo_epochs", "9", "--stop_kl", "0.03")
    assert len(calls) == updates and all(torch.equal(weights[name], until[name]) for name in weights)


def test_it_raises_what_it_is_paid_for(place, tmp_path):
    """The policy learns to say a, and a larger beta keeps it nearer to the reference."""
    flags = ["--steps", "8", "--batch_size", "32", "--minibatches", "2", "--lr", "2e-2", "--eval_prompts", "0"]
    events, _, samples = train(place, tmp_path / "free", *flags, "--beta", "0")
    assert events[-1]["objective/scores"] > events[0]["objective/scores"] + 0.3
    share = [sum(line["responses"][0].count("a") for line in samples if line["step"] == step) for step in (1, 8)]
    assert share[1] > 2 * share[0]
    held, _, _ = train(place, tmp_path / "held", *flags, "--beta", "2")
    assert held[-1]["objective/kl"] < 0.3 * events[-1]["objective/kl"]


# What the first step shows, and what the second one does:
CHANGES = [["--temperature", "0.7"], ["--missing_eos_penalty", "5"], ["--gamma", "0.5"], ["--lam", "0.5"],
           ["--whiten_rewards"], ["--no-whiten_advantages"], ["--ppo_epochs", "2"], ["--minibatches", "2"],
           ["--cliprange", "0.001"], ["--entropy", "0.1"], ["--clip", "0.1"], ["--seed", "2"],
           ["--weight_decay", "0.5"], ["--max_new_tokens", "6"], ["--batch_size", "9"], ["--critic_init", "sft"],
           ["--ref", "other"], ["--min_lr", "1e-3"], ["--betas", "0.5,0.9"], ["--eps", "1e-2"], ["--stop_kl", "1e-9"]]
LATER = [["--beta", "0.5"], ["--cliprange_value", "0.001"], ["--critic_lr", "1e-2"], ["--warmup_steps", "3"],
         ["--decay", "flat-then-linear"], ["--lr", "1e-2"]]
QUICK = ["--ppo_epochs", "1", "--min_lr", "2e-3", "--eval_prompts", "0"]


@pytest.fixture(scope="module")
def plain(place, tmp_path_factory):
    """{steps: what such a run gives}"""
    return {steps: train(place, tmp_path_factory.mktemp("plain"), *QUICK, "--steps", str(steps)) for steps in (1, 2)}


@pytest.mark.parametrize("steps, flags", [(1, flags) for flags in CHANGES] + [(2, flags) for flags in LATER])
def test_every_flag_changes_the_run(plain, place, tmp_path, steps, flags):
    """No flag is accepted and then ignored: the actor becomes another one."""
    if flags[-1] in ("sft", "other"):
        if flags[-1] == "other" and not (place / "other").exists():
            finished(place / "other", lively(seed=9, noise=0.1), "lm")
        flags = [flags[0], str(place / flags[-1])]
    _, weights, _ = train(place, tmp_path, *QUICK, "--steps", str(steps), *flags)
    assert any(not torch.equal(weights[name], plain[steps][1][name]) for name in weights)


def test_the_entropy_bonus_keeps_the_policy_open(place, tmp_path):
    """A large bonus raises the entropy, which without it falls."""
    flags = ["--steps", "4", "--lr", "2e-2", "--eval_prompts", "0"]
    low, high = (train(place, tmp_path / e, *flags, "--entropy", e)[0][-1]["policy/entropy_avg"] for e in ("0", "1"))
    assert high > low + 0.1


def test_pretraining_loss_is_mixed_in(place, tmp_path, monkeypatch):
    """--ptx: the text becomes likelier than in a run without it; each update reads the next windows, micro_batch_size
    of them at a time."""
    (tmp_path / "text.txt").write_text("abc def gab " * 200)
    flags = ["--steps", "5", "--lr", "2e-2", "--min_lr", "2e-2", "--eval_prompts", "0", "--ppo_epochs", "1",
             "--ptx_data", str(tmp_path / "text.txt"), "--ptx_rows", "2"]
    monkeypatch.chdir(tmp_path)  # where its token files go
    windows = calls_of(monkeypatch, Windows, "batch")
    low, high = (train(place, tmp_path / c, *flags, "--ptx", c)[0] for c in ("0.01", "1"))
    assert [batch for _, batch, *_ in windows] == [*range(15), *range(15)]
    forwards = calls_of(monkeypatch, GPT, "forward")
    parts, *_ = train(place, tmp_path / "parts", *flags, "--ptx", "1", "--steps", "1", "--micro_batch_size", "1")
    assert {len(ids) for _, ids, *_ in forwards if ids.shape[1] == 64} == {1}
    assert parts[0]["loss/ptx_avg"] == pytest.approx(high[0]["loss/ptx_avg"], rel=1e-4)
    assert high[-1]["loss/ptx_avg"] < high[0]["loss/ptx_avg"] - 0.5
    assert high[-1]["loss/ptx_avg"] < low[-1]["loss/ptx_avg"] - 0.3


@pytest.mark.parametrize("flags", [["--zero", "3"], ["--zero", "2", "--offload", "optim"], ["--attention", "naive"],
                                   ["--activation_checkpointing"], ["--micro_batch_size", "1"],
                                   ["--rollout_batch_size", "5"]])
def test_one_curve_however_it_is_computed(plain, place, tmp_path, flags):
    events, *_ = train(place, tmp_path, *QUICK, "--steps", "2", *flags)
    assert_same_curve(events, plain[2][0])


def assert_same_curve(events, expected):
    for name in ("objective/scores", "objective/kl", "loss/value_avg", "policy/entropy_avg"):
        assert [e[name] for e in events] == pytest.approx([e[name] for e in expected], rel=1e-3, abs=1e-5)


def run_rank(place, out, more):
    """One rank of a pool of processes that already joined."""
    with as_torchrun():
        return train(place, out, *more)[0]


@pytest.mark.parametrize("world, stage", [(2, 0), (2, 3), *(pytest.param(*case, marks=pytest.mark.slow)
                                                            for case in ((2, 1), (2, 2), (3, 0), (3, 3)))])
def test_ranks_give_the_same_curve(plain, place, tmp_path, world, stage):
    """The same replies, rewards and updates whatever the world and the stage; and shares may be uneven."""
    events, *_ = ranks().run(world, run_rank, place, tmp_path, [*QUICK, "--steps", "2", "--zero", str(stage)])
    assert_same_curve(events, plain[2][0])


def first_update_of_a_rank(place, out, flags):
    with as_torchrun() as patch:
        first_update(place, out, patch, flags)


@pytest.mark.parametrize("flags", [["--zero", "3"], *(pytest.param(flags, marks=pytest.mark.slow) for flags in (
    [], ["--micro_batch_size", "1"]))])
def test_the_first_ratio_of_two_ranks_is_exactly_one(place, tmp_path, flags):
    """P1 where each rank has rows of its own, some of them padding."""
    ranks().run(2, first_update_of_a_rank, place, tmp_path, flags)


def test_more_ranks_than_prompts_and_early_stops(place, tmp_path):
    """A rank without a prompt, whose rows are padding, keeps step with the other."""
    more = ["--steps", "2", "--zero", "3", "--batch_size", "1", "--minibatches", "1", "--ppo_epochs", "4", "--stop_kl",
            "1e-5", "--lr", "0.03", "--eval_prompts", "1"]
    alone, *_ = train(place, tmp_path / "alone", *more)
    events, *_ = ranks().run(2, run_rank, place, tmp_path / "two", more)
    assert_same_curve(events, alone)
    assert [e["updates"] for e in events] == [e["updates"] for e in alone] and 1 < alone[0]["updates"] < 4


BAD = {
    "no data": (["--data", ""], "--data"),
    "missing file": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "a language model as judge": (["--reward_model", "sft"], "--reward_model"),
    "a reward model to imitate": (["--ref", "rm"], "--ref"),
    "no reward model": (["--reward_model", "nowhere"], "nowhere"),
    "more minibatches than prompts": (["--minibatches", "13"], "--minibatches"),
    "replies longer than the rows": (["--max_new_tokens", "63"], "--max_new_tokens"),
    "no room for any prompt": (["--max_new_tokens", "60"], "--max_new_tokens"),
    "greedy": (["--temperature", "0"], "--temperature"),
    "no epochs": (["--ppo_epochs", "0"], "--ppo_epochs"),
    "ptx without text": (["--ptx", "1"], "--ptx"),
    "ptx without rows": (["--ptx", "1", "--ptx_data", "text.txt", "--ptx_rows", "0"], "--ptx_rows"),
    "a rate that climbs": (["--lr", "1e-6"], "--min_lr"),
    "a critic's rate that climbs": (["--critic_lr", "1e-6"], "--min_lr"),
    "no beta to adapt": (["--target_kl", "3", "--beta", "0"], "--beta"),
    "beta adapts faster than it is told": (["--target_kl", "3", "--kl_horizon", "11"], "--kl_horizon"),
    "unknown flag": (["--kl_coef", "1"], "--kl_coef"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(place, tmp_path, case):
    flags, named = BAD[case]
    flags = [str(place / flag) if flag in ("sft", "rm") else flag for flag in flags]
    with pytest.raises(UserError) as error:
        train_ppo.main(arguments(place, tmp_path / "out", *flags))
    assert named in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "final").exists()


def test_another_tokenizer_is_refused(place, tmp_path):
    """Ids of one tokenizer mean nothing to a reward model of another."""
    other = make_tokenizer("char", "abcdefgh")
    folder = tmp_path / "rm"
    folder.mkdir()
    other.save(folder / "tokenizer.json")
    config = {"model": dataclasses.asdict(likes_a().config), "head": "scalar", "chat_template": CHAT_TEMPLATE}
    assert other.vocab_size == TOKENIZER.vocab_size
    save_final(str(folder), likes_a().state_dict(), config, str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="tokenizer"):
        train_ppo.main(arguments(place, tmp_path / "out", "--reward_model", str(folder)))


@pytest.mark.parametrize("when", ["rollout", "optimising"])
def test_a_signal_saves_and_resuming_goes_on(reference, place, tmp_path, monkeypatch, when):
    """SIGTERM during the rollout of step 3: saved as after step 2, the rollout is drawn again; during its updates:
    saved after step 3. Either way the resumed run ends with the last bits of the unbroken one."""
    made, count = [], [0]
    original_setup, name = train_ppo.setup, {"rollout": "draw", "optimising": "adapted"}[when]
    original = getattr(train_ppo, name)
    monkeypatch.setattr(train_ppo, "setup", lambda *a: made.append(original_setup(*a)) or made[-1])

    def interrupting(*args):
        count[0] += 1
        if count[0] == 3 + (when == "rollout"):  # the first draw is the evaluation's
            made[0].stop_signal = 15
        return original(*args)

    monkeypatch.setattr(train_ppo, name, interrupting)
    flags = ["--target_kl", "0.05", "--kl_horizon", "100"]
    assert train_ppo.main(arguments(place, tmp_path, *flags)) == 0
    assert [n for n in os.listdir(tmp_path) if n.startswith("step-")] == [f"step-{2 if when == 'rollout' else 3:08d}"]
    events, weights, samples = train(place, tmp_path, *flags, "--resume")
    assert all(torch.equal(weights[name], reference[2][name]) for name in weights)
    assert samples == reference[3] and [e["step"] for e in events] == [1, 2, 3, 4]


ALIKE, ADD_UP, MADE_OF = (test_sampler_scorer_and_a_naive_model_agree, test_the_rewards_of_a_reply_add_up,
                          test_what_advantages_are_made_of)
BUGS = {  # where, what stands there, the bug, and who must notice it
    "shift by one": (train_ppo, "in_slots", "x[targets >= 0]", "x.roll(1, 1)[targets >= 0]", ALIKE, 1.0, {}),
    "mean for sum": (train_ppo, "ppo_policy_loss", "clipped).sum(), {", "clipped).mean(), {",
                     test_at_ratio_one_it_is_the_policy_gradient),
    "mean for sum of values": (train_ppo, "ppo_value_loss", "clipped).sum(), {", "clipped).mean(), {",
                               test_clipped_values),
    "an optimist's clip": (train_ppo, "ppo_policy_loss", "torch.maximum", "torch.minimum",
                           test_clipping_has_four_quadrants),
    "replies for tokens": (train_ppo, "main", "n = int(mask[part].sum())", "n = len(part)",
                           test_what_is_logged_of_updates_and_evaluations, 0.1),
    "entropy is punished": (train_ppo, "main", "policy_loss - cfg.entropy", "policy_loss + cfg.entropy",
                            test_what_is_logged_of_updates_and_evaluations, 0.1),
    "a step per micro-batch": (train_ppo, "main", "(value_loss / n)", "(value_loss / n), actor.step(0.0, cfg.clip)",
                               test_the_first_ratio_is_exactly_one, ["--micro_batch_size", "1"]),
    "score behind the last token": (train_ppo, "token_rewards", "keepdim=True) - 1",
                                    "keepdim=True).clamp(max=mask.shape[1] - 1)", ADD_UP),
    "score read a token early": (train_ppo, "score", "[last]", "[last.roll(-1, 1)]", ALIKE, 1.0, {}),
    "unmasked KL": (train_ppo, "token_rewards", "masked(-beta * masked(kl, mask), mask)", "(-beta * kl)", ADD_UP),
    "beta as it was at first": (train_ppo, "main", "scores, mask, beta)", "scores, mask, cfg.beta)", MADE_OF),
    "penalty twice": (train_ppo, "main", "scores - cfg.missing", "scores - 2 * cfg.missing", MADE_OF),
    "rewards lose their mean": (train_ppo, "main", "shift_mean=False", "shift_mean=True", MADE_OF),
    "reference is the actor": (train_ppo, "score", "models.reference", "models.actor", ALIKE, 1.0, {}),
    "scored at another temperature": (train_ppo, "score", "cfg.temperature", "1.0", ALIKE, 0.7, {}),
    "old log-probabilities from other batches": (train_ppo, "main", "minibatches(cfg.batch_size, cfg, step, 0)",
                                                 "minibatches(cfg.batch_size, cfg, step, 1)",
                                                 test_the_first_ratio_is_exactly_one, []),
    "another prompt": (records, "alpaca_prompt", "else instruction}", "else instruction + 'a'}",
                       test_preferences_are_prompts_too, "alpaca"),
    "dropout": (Block, "forward", "self.attn_norm(x)", "F.dropout(self.attn_norm(x), 0.1)",
                test_the_first_ratio_is_exactly_one, []),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_noticed(request, monkeypatch, bug):
    assert_noticed(request, monkeypatch, *BUGS[bug])


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit):
        train_ppo.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{f.name}" in shown for f in dataclasses.fields(Config))
