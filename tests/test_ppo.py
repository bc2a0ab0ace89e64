"""PPO: each formula against an oracle, its gradient however it is split, train_ppo.py from end to end."""
import dataclasses
import itertools
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import as_torchrun, ranks
from small_chat import assert_noticed, bandit, calls_of, metrics, write
from test_rollouts import ONE, TOKENIZER, lively, naive_logp, rolled_out, settings

import train_ppo
from data import CHAT_TEMPLATE, encode_prompt
from lib.checkpoint import save_final
from model import load_model
from train_ppo import add_gradients, gae, kl_penalty, ppo_policy_loss, ppo_value_loss, token_rewards, whiten
from zero import Zero


def replies(B=6, R=9):
    """Random logp, old_logp, advantages, values, old_values, returns (B, R), and a mask of ragged replies:
    one of a single token, one that fills all slots. Behind a reply stands NaN, which must not matter."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, R, *torch.randint(2, R, (B - 2,), generator=generator).tolist()])
    mask = torch.arange(R) < lengths[:, None]
    numbers = (torch.randn(B, R, generator=generator, dtype=torch.float64) for _ in range(6))
    return *(torch.where(mask, x, math.nan) for x in numbers), mask


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_equals_the_double_loop(gamma, lam):
    """A_t = sum_k (gamma lambda)^k delta_t+k, written out; return = A + V; after the last token 0."""
    rewards, values, *_, mask = replies()
    columns = rewards, values, *gae(rewards, values, mask, gamma, lam), mask.sum(1)
    for r, v, found, total, n in zip(*(x.tolist() for x in columns)):
        v[n:] = [0.0] * (len(v) - n + 1)
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        expected = [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
        assert found == pytest.approx(expected + [0.0] * (len(found) - n), abs=1e-12)
        assert total == pytest.approx([a + b for a, b in zip(found, v)], abs=1e-12)


def test_the_rewards_of_a_reply():
    """-beta k at each token, and the score at the last one, wherever that is; nothing behind it."""
    logp, ref_logp, *_, mask = replies()
    rewards = token_rewards(kl_penalty(logp, ref_logp), torch.arange(6).double(), mask, 0.3)
    for b, n in enumerate(mask.sum(1).tolist()):
        expected = -0.3 * (logp - ref_logp)[b, :n]
        expected[n - 1] += b
        torch.testing.assert_close(rewards[b, :n], expected)
        assert not rewards[b, n:].any()


def test_clipping_has_four_quadrants():
    """No gradient iff A > 0 and rho > 1 + eps, or A < 0 and rho < 1 - eps; else -A rho, which at rho = 1 is
    the policy gradient. The loss is a sum over the tokens. What is masked, NaN here, has no gradient."""
    ratio, A = torch.tensor([*itertools.product((0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0), (1.0, -2.0))],
                            dtype=torch.float64).T  # (14,) twice
    logp, mask = ratio.log().requires_grad_(), torch.tensor([[True], [False]]).expand(2, 14)
    given = (torch.stack((x, torch.full_like(x, math.nan))) for x in (logp, 0 * A, A))
    loss, sums = ppo_policy_loss(*given, mask, 0.2)
    stuck = torch.where(A > 0, ratio > 1.2, ratio < 0.8)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], torch.where(stuck, 0, -A * ratio))
    torch.testing.assert_close(loss, torch.where(stuck, -A * ratio.clamp(0.8, 1.2), -A * ratio).sum())
    assert sums["policy/clipfrac_avg"] == stuck.sum()
    assert sums["val/ratio"].item() == pytest.approx(ratio.sum().item())
    assert sums["policy/approxkl_avg"].item() == pytest.approx(0.5 * logp.square().sum().item())


def test_clipped_values():
    """Never below the plain squared error; no gradient exactly where the clipped term is the larger one."""
    *_, values, old_values, returns, mask = replies()
    loss, sums = ppo_value_loss(values.requires_grad_(), old_values, returns, mask, 0.5)
    plain = 0.5 * (values - returns) ** 2
    clipped = 0.5 * (old_values + (values - old_values).clamp(-0.5, 0.5) - returns) ** 2
    larger = (clipped > plain + 1e-12) & mask
    assert larger.any() and sums["val/clipfrac_avg"] == larger.sum()
    assert loss.item() == pytest.approx(torch.maximum(plain, clipped)[mask].sum().item())
    torch.testing.assert_close(torch.autograd.grad(loss, values)[0],
                               torch.where(mask & ~larger, values - returns, 0.0))
    unclipped, sums = ppo_value_loss(values, old_values, returns, mask, math.inf)
    assert unclipped.item() == pytest.approx(plain[mask].sum().item()) and sums["val/clipfrac_avg"] == 0


def test_whitening():
    """Over the tokens mean 0 and variance 1, pads 0; a constant stays finite."""
    x, *_, mask = replies()
    white = whiten(3 * x + 7, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12) and not white[~mask].any()
    assert white[mask].var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert whiten(torch.full_like(x, 5.0), mask).abs().max() < 1e-9


def test_the_bandit_reaches_the_gibbs_policy():
    """Replies of one token, a table as policy: the best one is ref exp(r / beta) / Z. PPO's own parts, one
    rollout after the other, must arrive there."""
    (ref, r, best), n, beta = bandit(0.5), 4096, 0.5
    logits, value = ref.clone().requires_grad_(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, value])
    mask, grid = torch.ones(n, 1, dtype=torch.bool), (torch.arange(n) + 0.5).double() / n
    for left in reversed(range(150)):
        optimizer.param_groups[0]["lr"] = 0.1 * (left + 1) / 150
        with torch.no_grad():
            cdf = logits.softmax(0).cumsum(0)  # the grid draws every action about as often as it is likely
            actions = torch.searchsorted(cdf, grid).clamp(max=len(r) - 1)[:, None]  # (n, 1)
            old_logp, old_values = logits.log_softmax(0)[actions], value.expand(n, 1).clone()
            rewards = token_rewards(kl_penalty(old_logp, ref[actions]), r[actions[:, 0]], mask, beta)
            advantages, returns = gae(rewards, old_values, mask, 1.0, 0.95)
            advantages = whiten(advantages, mask)
        for _ in range(2):
            policy, _ = ppo_policy_loss(logits.log_softmax(0)[actions], old_logp, advantages, mask, 0.2)
            error, _ = ppo_value_loss(value.expand(n, 1), old_values, returns, mask, 0.2)
            optimizer.zero_grad()
            ((policy + error) / n).backward()
            optimizer.step()
    torch.testing.assert_close(logits.detach().softmax(0), best.exp(), rtol=0, atol=0.005)


def test_the_gradient_of_a_minibatch():
    """That of the mean loss per token, from one reply at a time, whatever the rows per forward, the order of
    the replies and the length of the rows."""
    cfg = {"cliprange": 0.2, "cliprange_value": 0.2, "temperature": 0.7}
    models, rollout = rolled_out(settings(**cfg))
    plain, chosen = SimpleNamespace(backward=lambda loss: loss.backward()), [7, 2, 5, 0, 9]  # no Zero

    def gradients(backward):
        for model in models[:2]:
            model.zero_grad()
        backward()
        return torch.cat([p.grad.flatten() for model in models[:2] for p in model.parameters()])

    def naive():
        for i in chosen:
            prompt, reply = rollout.prompts[i], rollout.replies[i]
            mask, goal = torch.ones(len(reply), dtype=torch.bool), rollout.ref_logp[i, :len(reply)]
            logp = naive_logp(models.actor, prompt, reply, 0.7)
            values = models.critic(torch.tensor([prompt + reply]))[0, len(prompt) - 1:-1]
            policy, _ = ppo_policy_loss(logp, rollout.logp[i, :len(reply)], goal, mask, 0.2)
            value, _ = ppo_value_loss(values, rollout.values[i, :len(reply)], goal, mask, 0.2)
            ((policy + value) / rollout.mask[chosen].sum()).backward()

    expected = gradients(naive)
    for order, more in ((chosen, {}), (chosen, {"micro_batch_size": 1}), (chosen, {"micro_batch_size": 2}),
                        (sorted(chosen), {}), (chosen, {"seq_len": 30}), (chosen[::-1], {"seq_len": 40})):
        found = gradients(lambda o=order, m=more: add_gradients(
            rollout, o, rollout.ref_logp, rollout.ref_logp, models, plain, plain, settings(**cfg, **m), ONE))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an actor, a reward model and 40 prompts."""
    folder, r = tmp_path_factory.mktemp("ppo"), random.Random(0)
    for name, model, head in (("sft", lively(noise=0.1), "lm"), ("rm", lively("scalar", 3), "scalar")):
        (folder / name).mkdir()
        TOKENIZER.save(folder / name / "tokenizer.json")
        config = {"model": dataclasses.asdict(model.config), "head": head, "chat_template": CHAT_TEMPLATE}
        save_final(f"{folder}/{name}", model.state_dict(), config, f"{folder}/{name}/tokenizer.json")
    write(folder / "prompts.jsonl", [{"prompt": "".join(r.choices("abcdefg ", k=r.randint(0, 19))) + "b",
                                      "tag": "odd" if i % 2 else "even"} for i in range(40)])
    return folder


def arguments(place, out, *more):
    return ["--data", f"{place}/prompts.jsonl", "--init", f"{place}/sft", "--reward_model", f"{place}/rm",
            "--out", str(out), "--steps", "2", "--batch_size", "12", "--minibatches", "3", "--lr", "3e-3",
            "--min_lr", "3e-3", "--warmup_steps", "0", "--max_new_tokens", "8", "--eval_every", "0",
            "--save_every", "0", "--stop_kl", "0", "--eval_prompts", "3", "--device", "cpu", *more]


def train(place, out, *more):
    """(training events, final weights, lines of samples.jsonl)"""
    assert train_ppo.main(arguments(place, out, *more)) == 0
    samples = [json.loads(line) for line in open(out / "samples.jsonl")]
    weights = torch.load(out / "final" / "model.pt", weights_only=True)
    return [event for event in metrics(out) if "objective/kl" in event], weights, samples


def test_rollouts_are_what_they_say(place, tmp_path, monkeypatch):
    """Reward and KL in samples.jsonl, from the texts alone and with naive models: the reference is the first
    actor, the policy what the step before has left. The rewards that gae is given add up to score - penalty
    - beta KL, the penalty once. The events hold the means."""
    flags, gaes = ["--missing_eos_penalty", "0.7", "--beta", "0.5"], calls_of(monkeypatch, train_ppo, "gae")
    train(place, tmp_path, *flags, "--steps", "1")
    init, actor, rm = (load_model(str(folder))[0] for folder in (place / "sft", tmp_path, place / "rm"))
    events, _, samples = train(place, tmp_path, *flags, "--resume")
    expected = []
    for line in samples:
        prompt, ended = encode_prompt(TOKENIZER, line["prompt"]), line["ended"][0]
        reply = TOKENIZER.encode(line["responses"][0]) + [TOKENIZER.end_id] * ended
        logp, ref_logp = (naive_logp(model, prompt, reply, 1.0)
                          for model in (init if line["step"] == 1 else actor, init))
        reward = rm(torch.tensor([prompt + reply + [TOKENIZER.end_id] * (not ended)]))[0, -1].item()
        kl = (logp - ref_logp).sum().item()
        assert (line["reward"][0], line["kl"][0]) == pytest.approx((reward, kl), abs=1e-5)
        expected.append([kl, reward - 0.7 * (not ended), -logp.sum().item(), len(reply), ended])
    kl, scores, *_ = np.array(expected).T  # (24,) each
    found = torch.cat([rewards.sum(1) for rewards, *_ in gaes]).tolist()
    assert found == pytest.approx(scores - 0.5 * kl, abs=1e-5)
    names = [f"objective/{name}" for name in ("kl", "scores", "entropy")]
    names += ["val/response_length", "val/num_eos_tokens"]
    for event, some in zip(events, (expected[:12], expected[12:])):
        means = np.mean(some, 0) * [1, 1, 1, 1, 12]
        assert [event[name] for name in names] == pytest.approx(means.tolist(), abs=1e-4)
        assert 0 < event["val/num_eos_tokens"] < 12 and event["val/sampler_gap"] < 1e-5
    assert events[0]["objective/kl"] == 0 < events[1]["objective/kl"]


@pytest.mark.parametrize("flags", ["", "--micro_batch_size 1", "--temperature 0.7", "--seq_len 34",
                                   "--activation_checkpointing", "--dtype bfloat16", "two ranks",
                                   pytest.param("--compile", marks=pytest.mark.slow)])
def test_the_first_ratio_is_exactly_one(place, tmp_path, flags):
    """Before the first update, whatever the rows, the precision and the ranks."""
    if flags == "two ranks":  # each has rows of its own, some of them padding
        ranks().run(2, first_update, place, tmp_path, "--zero", "3", timeout=180)
    else:
        first_update(place, tmp_path, *flags.split())


def first_update(place, out, *flags):
    """With a rate of 0: before the first update the ratio is 1 to the last bit, and V is V_old. Later epochs
    mix the replies differently, and both stay within rounding. Both models step once per minibatch and epoch.
    The actor learns from A, whitened over the rollout, the critic from A + V before that: each slot once."""
    with as_torchrun() if torch.distributed.is_initialized() else pytest.MonkeyPatch.context() as patch:
        stepped, gaes, policy, value = (calls_of(patch, owner, name) for owner, name in (
            (Zero, "step"), *((train_ppo, name) for name in ("gae", "ppo_policy_loss", "ppo_value_loss"))))
        flags = ["--steps", "1", "--lr", "0", "--min_lr", "0", "--ppo_epochs", "3", *flags]
        (event,), *_ = train(place, out, *flags)
    assert len(stepped) == 2 * 3 * 3 and event["updates"] == 9 and event["policy/clipfrac_avg"] == 0
    (advantages, returns), mask, close = gae(*gaes[0]), gaes[0][2], 0.2 if "--dtype" in flags else 1e-5
    for called, expected in ((policy, whiten(advantages, mask)), (value, returns)):
        epoch = called[:len(called) // 3]
        assert all(torch.equal(new, old) for new, old, *_ in epoch) and any(new.numel() for new, *_ in epoch)
        assert all(((new - old).abs() < close).all() for new, old, *_ in called)
        learned = torch.cat([given[mask] for _, _, given, mask, _ in epoch]).sort().values
        assert "--zero" in flags or torch.equal(learned, expected[mask].sort().values)  # one rank has all


def test_what_is_logged(place, tmp_path, monkeypatch):
    """Means over the tokens of all updates; those of an evaluation, over its rollout."""
    policy, gaes, scored = (calls_of(monkeypatch, train_ppo, name)
                            for name in ("ppo_policy_loss", "gae", "score"))
    (event,), *_ = train(place, tmp_path, "--steps", "1", "--lr", "1e-2")
    tokens = sum(mask.sum() for *_, mask, _ in policy)
    (_, values, mask, *_), (_, returns) = gaes[0], gae(*gaes[0])
    for name, expected in (
            ("loss/policy_avg", sum(ppo_policy_loss(*call)[0] for call in policy) / tokens),
            ("val/ratio", sum((new - old).exp()[mask].sum() for new, old, _, mask, _ in policy) / tokens),
            ("val/explained_variance", 1 - (returns - values)[mask].var() / returns[mask].var())):
        assert event[name] == pytest.approx(expected.item(), rel=1e-4)
    rollout, found = scored[-1][0], metrics(tmp_path)[-1]
    first, second, third = rollout.scores.tolist()
    assert {name: found[name] for name in found if name != "step"} == pytest.approx({
        "eval_score": (first + second + third) / 3, "eval_score_stderr": rollout.scores.std().item() / 3**0.5,
        "eval_score/even": (first + third) / 2,
        "eval_score/odd": second, "eval_kl": rollout.log_ratio().sum().item() / 3,
        "eval_ended": sum(reply[-1] == TOKENIZER.end_id for reply in rollout.replies) / 3,
        "eval_response_length": np.mean([len(reply) for reply in rollout.replies])}, abs=1e-5)


def test_which_prompts_are_drawn(place, tmp_path, monkeypatch):
    """Each step draws prompts by epochs, with its number. Evaluations draw the last tenth of the prompts as
    step 0. Equal prompts stay on one side. One prompt alone trains without validation."""
    lines = [json.loads(line) for line in open(place / "prompts.jsonl")]
    ids = [encode_prompt(TOKENIZER, [{"role": "user", "content": line["prompt"]}]) for line in lines]
    drawn, flags = calls_of(monkeypatch, train_ppo, "draw"), ["--steps", "3", "--eval_prompts", "9"]
    for n, order in enumerate(([*range(40)], [*range(37), 3, 38, 5])):
        data = write(tmp_path / f"{n}.jsonl", [lines[i] for i in order])
        train(place, tmp_path / str(n), *flags, "--data", data)
        first, *steps, last = drawn[5 * n:]
        different = [*dict.fromkeys(tuple(ids[i]) for i in order)]
        trained = [ids[i] for i in order if tuple(ids[i]) in different[:round(0.9 * len(different))]]
        seen = [prompt for prompts, *_ in steps for prompt in prompts]
        assert len(seen) == 36 and all(seen.count(prompt) <= trained.count(prompt) for prompt in seen)
        assert [step for _, step, *_ in steps] == [1, 2, 3] and first[:2] == last[:2]
        assert first[:2] == ([ids[i] for i in order if ids[i] not in trained], 0)
    train(place, tmp_path / "2", "--steps", "1", "--data", write(tmp_path / "same.jsonl", lines[:1] * 2))
    assert not any(name.startswith("eval") for event in metrics(tmp_path / "2") for name in event)


def test_little_data_is_no_endless_run(place, tmp_path, capsys):
    """Without --steps at most --epochs replies to each prompt. If no reply ends in time, it says so."""
    events, *_ = train(place, tmp_path, "--steps", "0", "--epochs", "0.5", "--max_new_tokens", "1")
    assert len(events) == 2  # 36 prompts, 12 a step
    assert capsys.readouterr().out.count("no reply ended in time") == sum(
        event["val/num_eos_tokens"] == 0 for event in events) > 0


def test_early_stopping_leaves_the_weights_alone(place, tmp_path, monkeypatch):
    """Once the approximate KL is above stop_kl nothing moves until the next rollout."""
    flags = ["--steps", "1", "--lr", "0.01", "--stop_kl", "0.03", "--ppo_epochs"]
    (event,), weights, _ = train(place, tmp_path / "a", *flags, "4")
    calls = calls_of(monkeypatch, train_ppo, "ppo_policy_loss")
    _, until, _ = train(place, tmp_path / "b", *flags, "9")
    assert 1 < event["updates"] < 12 and len(calls) == event["updates"]
    assert all(torch.equal(weights[name], until[name]) for name in weights)


def test_it_raises_what_it_is_paid_for(place, tmp_path):
    """Without a leash the reward model's score climbs."""
    events, *_ = train(place, tmp_path, "--steps", "8", "--batch_size", "32", "--lr", "2e-2", "--beta", "0")
    assert events[-1]["objective/scores"] > events[0]["objective/scores"] + 0.3


QUADRANTS, REWARDS, GRADIENT, RATIO = (test_clipping_has_four_quadrants, test_the_rewards_of_a_reply,
                                       test_the_gradient_of_a_minibatch, test_the_first_ratio_is_exactly_one)
BUGS = {  # where in train_ppo.py, what stands there, the bug, and who must notice it
    "mean for sum": ("ppo_policy_loss", "clipped).sum(), {", "clipped).mean(), {", QUADRANTS),
    "an optimist's clip": ("ppo_policy_loss", "torch.maximum", "torch.minimum", QUADRANTS),
    "score behind the last token": ("token_rewards", ") - 1  #", ").clamp(max=len(mask[0]) - 1)  #", REWARDS),
    "unmasked KL": ("token_rewards", "masked(-beta * kl, mask)", "(-beta * kl)", REWARDS),
    "replies for tokens": ("add_gradients", "int(rollout.mask[chosen].sum())", "len(chosen)", GRADIENT),
    "a mean of means": ("add_gradients", "(policy_loss / n_tokens)", "(policy_loss / mask.sum())", GRADIENT),
    "a step per micro-batch": ("add_gradients", "critic.back", "actor.step(0.0, cfg.clip), critic.back",
                               RATIO, "--micro_batch_size 1"),
    "penalty twice": ("main", "- cfg.missing", "- 2 * cfg.missing", test_rollouts_are_what_they_say),
    "scored in other batches than trained": ("main", "(cfg, step, 0)", "(cfg, step, 1)", RATIO, ""),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_noticed(request, monkeypatch, bug):
    assert_noticed(request, monkeypatch, train_ppo, *BUGS[bug])
