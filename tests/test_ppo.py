"""PPO: each formula against an oracle, its gradient however it is split, train_ppo.py from end to end."""
import dataclasses
import itertools
import json
import math
import os
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import as_torchrun, ranks
from small_chat import assert_noticed, bandit, calls_of, metrics, write
from test_rollouts import ONE, TOKENIZER, lively, naive_logp, rolled_out, settings

import train_ppo
from data import CHAT_TEMPLATE, Windows, encode_prompt
from lib.checkpoint import save_final
from lib.program import UserError
from lib.tokenizer import make_tokenizer
from model import load_model
from train_ppo import add_gradients, gae, kl_penalty, ppo_policy_loss, ppo_value_loss, token_rewards, whiten
from zero import Zero


def replies(B=6, R=9):
    """Random logp, old_logp, advantages, values, old_values, returns (B, R) in float64, and a mask of ragged
    replies: one of a single token, one that fills all slots."""
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(B, R, generator=generator, dtype=torch.float64) for _ in range(6)]
    lengths = torch.tensor([1, R, *torch.randint(2, R, (B - 2,), generator=generator).tolist()])
    return *numbers, torch.arange(R) < lengths[:, None]


# ---- formulas ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_equals_the_double_loop(gamma, lam):
    """A_t = sum_k (gamma lambda)^k delta_t+k, written out; return = A + V; after the last token 0."""
    rewards, values, *_, mask = replies()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for r, V, A, G, n in zip(*(x.tolist() for x in (rewards, values, advantages, returns, mask.sum(1)))):
        V[n:] = [0.0] * (len(V) - n + 1)
        delta = [r[t] + gamma * V[t + 1] - V[t] for t in range(n)]
        expected = [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
        assert A == pytest.approx(expected + [0.0] * (len(A) - n), abs=1e-12)
        assert G == pytest.approx([a + v for a, v in zip(A, V)], abs=1e-12)


def test_the_rewards_of_a_reply():
    """-beta k at each token, and the score at the last one, wherever that is; nothing behind it."""
    logp, ref_logp, *_, mask = replies()
    rewards = token_rewards(kl_penalty(logp, ref_logp), torch.arange(6).double(), mask, 0.3)
    for b, n in enumerate(mask.sum(1).tolist()):
        expected = -0.3 * (logp - ref_logp)[b, :n]
        expected[n - 1] += b
        torch.testing.assert_close(rewards[b, :n], expected)
        assert not rewards[b, n:].any()


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_what_stands_behind_a_reply_changes_nothing(garbage):
    """Huge, infinite and undefined numbers in the pads: all results and all gradients as with zeros there."""
    *numbers, mask = replies()

    def results(fill):
        logp, old_logp, advantages, values, old_values, returns = (
            torch.where(mask, x, fill).requires_grad_() for x in numbers)
        policy, sums = ppo_policy_loss(logp, old_logp, advantages, mask, 0.2)
        value, more = ppo_value_loss(values, old_values, returns, mask, 0.2)
        (policy + value).backward()
        rewards = token_rewards(kl_penalty(logp, old_logp), returns[:, 0], mask, 0.1)
        return [policy, value, *sums.values(), *more.values(), logp.grad, values.grad, rewards,
                whiten(logp, mask), *gae(rewards, values, mask, 0.9, 0.8)]

    assert all(torch.equal(a, b) for a, b in zip(results(0.0), results(garbage), strict=True))


def test_clipping_has_four_quadrants():
    """No gradient iff A > 0 and rho > 1 + eps, or A < 0 and rho < 1 - eps; else -A rho, which at rho = 1 is the
    policy gradient. The loss is a sum over the tokens."""
    ratio, A = torch.tensor([*itertools.product((0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0), (1.0, -2.0))],
                            dtype=torch.float64).T[:, None]  # (1, 14) twice
    logp = ratio.log().requires_grad_()
    loss, sums = ppo_policy_loss(logp, 0 * A, A, torch.ones(1, 14), 0.2)
    stuck = torch.where(A > 0, ratio > 1.2, ratio < 0.8)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], torch.where(stuck, 0, -A * ratio))
    torch.testing.assert_close(loss, torch.where(stuck, -A * ratio.clamp(0.8, 1.2), -A * ratio).sum())
    assert sums["clipfrac"] == stuck.sum() and sums["ratio"].item() == pytest.approx(ratio.sum().item())
    assert sums["approxkl"].item() == pytest.approx(0.5 * logp.square().sum().item())


def test_clipped_values():
    """Never below the plain squared error; no gradient exactly where the clipped term is the larger one."""
    *_, values, old_values, returns, mask = replies()
    loss, sums = ppo_value_loss(values.requires_grad_(), old_values, returns, mask, 0.5)
    plain = 0.5 * (values - returns) ** 2
    clipped = 0.5 * (old_values + (values - old_values).clamp(-0.5, 0.5) - returns) ** 2
    larger = (clipped > plain + 1e-12) & mask
    assert larger.any() and sums["value_clipfrac"] == larger.sum()
    assert loss.item() == pytest.approx(torch.maximum(plain, clipped)[mask].sum().item())
    torch.testing.assert_close(torch.autograd.grad(loss, values)[0],
                               torch.where(mask & ~larger, values - returns, 0.0))
    unclipped, sums = ppo_value_loss(values, old_values, returns, mask, math.inf)
    assert unclipped.item() == pytest.approx(plain[mask].sum().item()) and sums["value_clipfrac"] == 0


def test_whitening():
    """Over the tokens mean 0 and variance 1, pads 0; a constant stays finite."""
    x, *_, mask = replies()
    white = whiten(3 * x + 7, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12) and not white[~mask].any()
    assert white[mask].var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert whiten(torch.full_like(x, 5.0), mask).abs().max() < 1e-9


def test_the_bandit_reaches_the_gibbs_policy():
    """Replies of one token, a table as policy: the best one is ref exp(r / beta) / Z, worth beta log Z. PPO's own
    parts, rollout after rollout, must arrive there."""
    (ref, r, best), n, beta = bandit(0.5), 4096, 0.5
    logits, value = ref.clone().requires_grad_(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, value])
    mask, generator = torch.ones(n, 1, dtype=torch.bool), torch.Generator().manual_seed(3)
    for left in reversed(range(150)):
        optimizer.param_groups[0]["lr"] = 0.1 * (left + 1) / 150
        with torch.no_grad():
            grid = (torch.arange(n) + torch.rand((), generator=generator)).double() / n  # samples of little noise
            actions = torch.searchsorted(logits.softmax(0).cumsum(0), grid).clamp(max=len(r) - 1)[:, None]
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
    p = logits.detach().log_softmax(0)
    assert (p.exp() - best.exp()).abs().max() < 0.01
    objective = (p.exp() * (r - beta * (p - ref))).sum().item()
    assert objective == pytest.approx(beta * (ref + r / beta).logsumexp(0).item(), abs=2e-3)


def test_the_gradient_of_a_minibatch():
    """That of the mean loss per token, from one reply at a time, whatever the rows per forward, the order of the
    replies and the length of the rows."""
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
            prompt, reply, mask = rollout.prompts[i], rollout.replies[i], rollout.mask[i]
            logp = naive_logp(models.actor, prompt, reply, 0.7)
            values = models.critic(torch.tensor([prompt + reply]))[0, len(prompt) - 1:-1]
            old = [x[i][mask] for x in (rollout.logp, rollout.ref_logp, rollout.values, rollout.ref_logp)]
            loss = ppo_policy_loss(logp, *old[:2], mask[mask], 0.2)[0]
            loss = loss + ppo_value_loss(values, *old[2:], mask[mask], 0.2)[0]
            (loss / sum(len(rollout.replies[i]) for i in chosen)).backward()

    expected = gradients(naive)
    for order, more in ((chosen, {}), (chosen, {"micro_batch_size": 1}), (chosen, {"micro_batch_size": 2}),
                        (sorted(chosen), {}), (chosen, {"seq_len": 30}), (chosen[::-1], {"seq_len": 40})):
        found = gradients(lambda o=order, m=more: add_gradients(
            rollout, o, rollout.ref_logp, rollout.ref_logp, models, plain, plain, settings(**cfg, **m), ONE))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert expected.norm() > 0.01


# ---- the script -------------------------------------------------------------------------------------------

def finished(folder, head, seed, tokenizer=TOKENIZER) -> None:
    folder.mkdir()
    tokenizer.save(folder / "tokenizer.json")
    model = lively(head, seed, noise=0.1)
    config = {"model": dataclasses.asdict(model.config), "head": head, "chat_template": CHAT_TEMPLATE}
    save_final(str(folder), model.state_dict(), config, str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an actor, two reward models (one of other tokens), and 40 prompts."""
    folder, r = tmp_path_factory.mktemp("ppo"), random.Random(0)
    finished(folder / "sft", "lm", 0)
    finished(folder / "rm", "scalar", 3)
    finished(folder / "other", "scalar", 3, make_tokenizer("char", "abcdefgh"))
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
    assert torch.cat([rewards.sum(1) for rewards, *_ in gaes]).tolist() == pytest.approx(scores - 0.5 * kl, abs=1e-5)
    for event, some in zip(events, (expected[:12], expected[12:])):
        means = np.mean(some, 0) * [1, 1, 1, 1, 12]
        names = "objective/kl", "objective/scores", "objective/entropy", "val/response_length", "val/num_eos_tokens"
        assert [event[name] for name in names] == pytest.approx(means.tolist(), abs=1e-4)
        assert 0 < event["val/num_eos_tokens"] < 12 and event["val/sampler_gap"] < 1e-5
    assert events[0]["objective/kl"] == 0 < events[1]["objective/kl"]


def first_update(place, out, patch, *flags):
    """With a rate of 0: before the first update the ratio is 1 to the last bit, and so is V - V_old; later epochs
    mix the replies differently, and both stay within rounding. Both models step once per minibatch and epoch.
    The actor learns from A, whitened over the rollout, the critic from A + V before that: each slot once."""
    stepped, gaes, policy, value = (calls_of(patch, owner, name) for owner, name in (
        (Zero, "step"), *((train_ppo, name) for name in ("gae", "ppo_policy_loss", "ppo_value_loss"))))
    events, *_ = train(place, out, "--steps", "1", "--lr", "0", "--min_lr", "0", "--ppo_epochs", "3", *flags)
    assert len(stepped) == 2 * 3 * 3 and events[0]["updates"] == 9 and events[0]["policy/clipfrac_avg"] == 0
    (advantages, returns), mask = gae(*gaes[0]), gaes[0][2]
    for called, expected in ((policy, whiten(advantages, mask)), (value, returns)):
        epoch = called[:len(called) // 3]
        assert all(torch.equal(new, old) for new, old, *_ in epoch) and any(new.numel() for new, *_ in epoch)
        assert all(((new - old).abs() < (0.2 if "--dtype" in flags else 1e-5)).all() for new, old, *_ in called)
        learned = torch.cat([given[mask] for _, _, given, mask, _ in epoch]).sort().values
        if "--zero" not in flags:  # of two ranks, each learns from its own share
            assert torch.equal(learned, expected[mask].sort().values)


@pytest.mark.parametrize("flags", ["", "--micro_batch_size 1", "--temperature 0.7", "--activation_checkpointing",
                                   "--seq_len 34", "--dtype bfloat16",
                                   pytest.param("--compile", marks=pytest.mark.slow)])
def test_the_first_ratio_is_exactly_one(place, tmp_path, monkeypatch, flags):
    first_update(place, tmp_path, monkeypatch, *flags.split())


def first_update_of_a_rank(place, out, *flags):
    with as_torchrun() as patch:
        first_update(place, out, patch, *flags)


def test_the_first_ratio_of_two_ranks_is_exactly_one(place, tmp_path):
    """Where each rank has rows of its own, some of them padding."""
    ranks().run(2, first_update_of_a_rank, place, tmp_path, "--zero", "3")


def test_what_is_logged(place, tmp_path, monkeypatch):
    """Means over the tokens of all updates, from what the losses were given; those of an evaluation, from its
    rollout."""
    losses = {name: calls_of(monkeypatch, train_ppo, f"ppo_{name}_loss") for name in ("policy", "value")}
    gaes, scored = (calls_of(monkeypatch, train_ppo, name) for name in ("gae", "score"))
    (event,), *_ = train(place, tmp_path, "--steps", "1", "--lr", "1e-2", "--cliprange", "0.05")
    for name, shown in (("policy", {"approxkl": "policy/approxkl_avg", "clipfrac": "policy/clipfrac_avg",
                                    "ratio": "val/ratio"}), ("value", {"value_clipfrac": "val/clipfrac_avg"})):
        found = [getattr(train_ppo, f"ppo_{name}_loss")(*call) for call in losses[name][:6]]
        tokens = sum(int(call[3].sum()) for call in losses[name][:6])
        assert event[f"loss/{name}_avg"] == pytest.approx(sum(loss.item() for loss, _ in found) / tokens, rel=1e-4)
        for key, where in shown.items():
            assert event[where] == pytest.approx(sum(float(sums[key]) for _, sums in found) / tokens, rel=1e-4)
    (_, values, mask, *_), (_, returns) = gaes[0], gae(*gaes[0])
    assert 1 - event["val/explained_variance"] == pytest.approx(
        ((returns - values)[mask].var() / returns[mask].var()).item(), rel=1e-4)
    rollout, found = scored[-1][0], metrics(tmp_path)[-1]
    first, second, third = rollout.scores.tolist()
    assert {name: found[name] for name in found if name != "step"} == pytest.approx({
        "eval_score": (first + second + third) / 3, "eval_score/even": (first + third) / 2,
        "eval_score/odd": second, "eval_kl": (rollout.logp - rollout.ref_logp)[rollout.mask].sum().item() / 3,
        "eval_ended": sum(reply[-1] == TOKENIZER.end_id for reply in rollout.replies) / 3,
        "eval_response_length": np.mean([len(reply) for reply in rollout.replies])}, abs=1e-5)


def test_which_prompts_are_drawn(place, tmp_path, monkeypatch):
    """Each step draws prompts by epochs, with its number. Evaluations draw the last tenth of the prompts as step
    0, less those that are also trained on; if that leaves none, --val_data is asked for."""
    lines = [json.loads(line) for line in open(place / "prompts.jsonl")]
    ids = [encode_prompt(TOKENIZER, [{"role": "user", "content": line["prompt"]}]) for line in lines]
    mixed = write(tmp_path / "mixed.jsonl", [*lines[:37], lines[3], lines[38], lines[5]])
    drawn, flags = calls_of(monkeypatch, train_ppo, "draw"), ["--steps", "3", "--eval_prompts", "9"]
    for n, data in enumerate((place / "prompts.jsonl", mixed)):
        train(place, tmp_path / str(n), *flags, "--data", str(data))
        first, *steps, last = drawn[5 * n:]
        assert sorted(sum((prompts for prompts, *_ in steps), [])) == sorted(ids[:36])
        assert [step for _, step, *_ in steps] == [1, 2, 3]
        assert first[:2] == last[:2] == ([ids[36], ids[38]] if data == mixed else ids[36:], 0)
    with pytest.raises(UserError, match="--val_data"):
        train(place, tmp_path / "2", "--data", write(tmp_path / "same.jsonl", [*lines[:36], *lines[:4]]))


def test_early_stopping_leaves_the_weights_alone(place, tmp_path, monkeypatch):
    """Once the approximate KL is above stop_kl nothing moves until the next rollout."""
    flags = ["--steps", "1", "--lr", "0.01", "--stop_kl", "0.03", "--ppo_epochs"]
    (event,), weights, _ = train(place, tmp_path / "a", *flags, "4")
    calls = calls_of(monkeypatch, train_ppo, "ppo_policy_loss")
    _, until, _ = train(place, tmp_path / "b", *flags, "9")
    assert 1 < event["updates"] < 12 and len(calls) == event["updates"]
    assert all(torch.equal(weights[name], until[name]) for name in weights)


def test_it_raises_what_it_is_paid_for(place, tmp_path):
    """The scores rise; with a larger beta the policy stays nearer to the reference."""
    flags = ["--steps", "8", "--batch_size", "32", "--minibatches", "2", "--lr", "2e-2", "--eval_prompts", "0"]
    free, held = (train(place, tmp_path / beta, *flags, "--beta", beta)[0] for beta in ("0", "2"))
    assert free[-1]["objective/scores"] > free[0]["objective/scores"] + 0.3
    assert held[-1]["objective/kl"] < 0.3 * free[-1]["objective/kl"]


def test_pretraining_loss_is_mixed_in(place, tmp_path, monkeypatch):
    """--ptx: each update reads the next windows of the text, which becomes likelier than with a small weight."""
    monkeypatch.chdir(tmp_path)  # where its token files go
    (tmp_path / "text.txt").write_text("abc def gab " * 200)
    windows, flags = calls_of(monkeypatch, Windows, "batch"), ["--lr", "2e-2", "--ptx_data", "text.txt", "--ptx"]
    low, high = (train(place, tmp_path / ptx, *flags, ptx)[0] for ptx in ("0.01", "1"))
    assert [batch for _, batch, *_ in windows] == [*range(12), *range(12)]
    assert high[-1]["loss/ptx_avg"] < min(high[0]["loss/ptx_avg"], low[-1]["loss/ptx_avg"]) - 0.3


def test_a_signal_in_the_rollout_saves_the_step_before(place, tmp_path, monkeypatch):
    """SIGTERM during the rollout of step 2: saved as after step 1. The resumed run draws it again, and ends with
    the last bits of an unbroken one."""
    _, weights, samples = train(place, tmp_path / "whole")
    drawn, original = [], train_ppo.draw

    def interrupting(*args):
        drawn.append(args)
        if len(drawn) == 3:  # the first is the evaluation's
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(train_ppo, "draw", interrupting)
    out = tmp_path / "out"
    assert train_ppo.main(arguments(place, out)) == 0 and not (out / "final").exists()
    assert [path.name for path in out.glob("step-*")] == ["step-00000001"]
    _, resumed, lines = train(place, out, "--resume")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights) and lines == samples


@pytest.mark.parametrize("flags, words", [
    ("--reward_model sft", "--reward_model"), ("--init rm", "reward model"), ("--reward_model other", "tokenizer"),
    ("--reward_model nowhere", "nowhere"), ("--minibatches 13", "--minibatches"), ("--ptx 1", "--ptx"),
    ("--max_new_tokens 60", "--max_new_tokens"), ("--temperature 0", "--temperature"),
    ("--ppo_epochs 0", "--ppo_epochs"), ("--cliprange 0", "--cliprange")])
def test_bad_input_is_one_clear_line(place, tmp_path, monkeypatch, flags, words):
    """A UserError of one line that names what to change, and no model."""
    monkeypatch.chdir(place)
    with pytest.raises(UserError) as error:
        train_ppo.main(arguments(place, tmp_path, *flags.split()))
    assert words in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "final").exists()


QUADRANTS, REWARDS, GRADIENT, ROLLOUTS, RATIO = (
    test_clipping_has_four_quadrants, test_the_rewards_of_a_reply, test_the_gradient_of_a_minibatch,
    test_rollouts_are_what_they_say, test_the_first_ratio_is_exactly_one)
BUGS = {  # where, what stands there, the bug, and who must notice it
    "mean for sum": ("ppo_policy_loss", "clipped).sum(), {", "clipped).mean(), {", QUADRANTS),
    "an optimist's clip": ("ppo_policy_loss", "torch.maximum", "torch.minimum", QUADRANTS),
    "score behind the last token": ("token_rewards", "keepdim=True) - 1",
                                    "keepdim=True).clamp(max=mask.shape[1] - 1)", REWARDS),
    "unmasked KL": ("token_rewards", "masked(-beta * masked(kl, mask), mask)", "(-beta * kl)", REWARDS),
    "replies for tokens": ("add_gradients", "int(rollout.mask[chosen].sum())", "len(chosen)", GRADIENT),
    "a mean of means": ("add_gradients", "(policy_loss / n)", "(policy_loss / mask.sum())", GRADIENT),
    "another temperature": ("add_gradients", "cfg.temperature", "1.0", GRADIENT),
    "a step per micro-batch": ("add_gradients", "(value_loss / n)", "(value_loss / n), actor.step(0.0, cfg.clip)",
                               RATIO, "--micro_batch_size 1"),
    "penalty twice": ("main", "scores - cfg.missing", "scores - 2 * cfg.missing", ROLLOUTS),
    "old log-probabilities from other batches": ("main", "minibatches(B, cfg, step, 0)",
                                                 "minibatches(B, cfg, step, 1)", RATIO, ""),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_noticed(request, monkeypatch, bug):
    assert_noticed(request, monkeypatch, train_ppo, *BUGS[bug])
