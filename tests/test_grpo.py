"""GRPO and its relatives: each formula by enumeration or by hand, train_grpo.py whole, the Chains."""
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_chat import assert_noticed, bandit, calls_of, metrics, run_script, save_chat_model, write
from test_rollouts import ONE, naive_logp, rolled_out, settings

import train_grpo
from data import encode_prompt
from lib.records import read_prompts
from lib.tokenizer import make_tokenizer
from rollouts import minibatches
from train_grpo import group_advantages, kl_loss, policy_loss, token_weights
from village import chains, truth

VARIANTS = pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "rloo"])
FLAGS_OF_GRPO = ["--seed 2", "--clip 0.001", "--beta 0.5", "--variant dr_grpo", "--variant rloo", "--kl k1",
                 "--kl k2", "--kl k3", "--cliprange 0.001", "--cliprange_high 0.001", "--num_iterations 2",
                 "--missing_eos_penalty 5", "--temperature 0.7", "--group_size 7 --batch_size 14"]
REFUSED_BY_GRPO = [
    ("--reward_model init", "--reward_model"), ("--reward_model other-rm", "tokenizer"),
    ("--group_size 3", "--group_size"), ("--group_size 1", "--group_size"),
    ("--minibatches 8", "--minibatches"), ("--reward_model ", "--reward"),
    ("--reward village.truth:points", "--reward_model"), ("--reward_model  --reward nowhere:f", "nowhere"),
    ("--reward_model  --reward village.truth:POINTS", "function"),
    ("--max_new_tokens 90", "--max_new_tokens")]


# ---- advantages -------------------------------------------------------------------------------------------

def test_advantages_by_hand():
    """Of rewards 1, 0, 0, 1 and 1, 0, 0, 0: the std has G - 1 below the line."""
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0])
    for variant, first, second in (("grpo", [0.866, -0.866, -0.866, 0.866], [1.5, -0.5, -0.5, -0.5]),
                                   ("dr_grpo", [0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25]),
                                   ("rloo", [2 / 3, -2 / 3, -2 / 3, 2 / 3], [1, -1 / 3, -1 / 3, -1 / 3])):
        A = group_advantages(rewards, 4, variant)
        assert A.tolist() == pytest.approx(first + second, abs=4e-4)


@VARIANTS
def test_a_group_is_its_own_world(variant):
    """Rewards that differ between prompts alone teach nothing. Groups in another order have their advantages
    in that order."""
    assert not group_advantages(torch.arange(3.0).repeat_interleave(4), 4, variant).any()
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    A, order = group_advantages(rewards.flatten(), 4, variant), [3, 0, 4, 1, 2]
    assert torch.equal(A.view(5, 4)[order].flatten(), group_advantages(rewards[order].flatten(), 4, variant))


@VARIANTS
def test_equal_rewards_are_exactly_nothing(variant):
    """0.1 three times has a mean that is not 0.1: what rounding leaves must not be divided by its own std."""
    for value in (0.1, 1 / 3, 1e6 + 0.1):
        assert not group_advantages(torch.full((3,), value), 3, variant).any()


# ---- losses -----------------------------------------------------------------------------------------------

def policy_of(theta):
    """A policy of two tokens from three, the second given the first: log pi of the 9 replies, (9, 2)."""
    first, second = theta[0].log_softmax(0), theta[1:].log_softmax(1)  # (3,), (3, 3)
    return torch.stack([torch.stack((first[a], second[a, b])) for a in range(3) for b in range(3)])


def expected_gradient(theta, ref, rewards, G, variant, kl=""):
    """The mean gradient over all groups of G replies, each as likely as it is. kl: of kl_loss alone."""
    logp, mask, total = policy_of(theta), torch.ones(G, 2, dtype=torch.bool), 0
    probability = logp.sum(1).exp().detach()
    weights = token_weights(mask, variant, 2)
    for group in itertools.product(range(9), repeat=G):
        group = list(group)
        if kl:
            loss = kl_loss(logp[group], policy_of(ref)[group], mask, weights, kl)
        else:
            A = group_advantages(rewards[group], G, variant)
            loss, _ = policy_loss(logp[group], logp[group].detach(), A, mask, weights, variant, 0.2, 0.28)
        total = total + probability[group].prod() * loss
    return torch.autograd.grad(total, theta)[0]


@pytest.fixture(scope="module")
def world():
    generator = torch.Generator().manual_seed(1)
    theta, ref = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return theta.requires_grad_(), ref, torch.randn(9, generator=generator, dtype=torch.float64)


def test_the_gradient_by_enumeration(world):
    """rloo descends -E[r] exactly. The group's own mean gives (G - 1)/G of it; division by the std another
    direction."""
    theta, ref, rewards = world
    exact, = torch.autograd.grad(-(policy_of(theta).sum(1).exp() * rewards).sum(), theta)
    for G in (2, 3):
        torch.testing.assert_close(expected_gradient(theta, ref, rewards, G, "rloo"), exact)
        mean = expected_gradient(theta, ref, rewards, G, "dr_grpo") * 2  # L = 2
        torch.testing.assert_close(mean, exact * (G - 1) / G)
        divided = expected_gradient(theta, ref, rewards, G, "grpo")
        cosine = torch.cosine_similarity(divided.flatten(), exact.flatten(), 0)
        assert 0.8 < cosine < 0.9999


def test_the_gradient_of_each_kl_by_enumeration(world):
    """k1: 0. k2: that of KL(pi || ref). k3: that of KL(ref || pi). Of each token's own distribution: what it
    does to the tokens after it is not in the loss."""
    theta, ref, rewards = world
    p, q = ([x[0].log_softmax(0)[None], x[1:].log_softmax(1)] for x in (theta, ref))  # first, second token
    seen = torch.ones(1, 1), p[0].exp().detach().T  # how often each comes up
    for kind, value in (
            ("k2", sum((n * a.exp() * (a - b)).sum() for n, a, b in zip(seen, p, q))),
            ("k3", sum((n * b.exp() * (b - a)).sum() for n, a, b in zip(seen, p, q)))):
        exact, = torch.autograd.grad(value, theta, retain_graph=True)
        torch.testing.assert_close(expected_gradient(theta, ref, rewards, 1, "rloo", kind), exact)
    assert expected_gradient(theta, ref, rewards, 1, "rloo", "k1").abs().max() < 1e-12


def test_the_gradient_of_a_kl_in_the_reward_by_enumeration(world):
    """With rewards -k_i = log ref - log pi of whole replies rloo has the gradient of KL(pi || ref)."""
    theta, ref, _ = world
    ratio = (policy_of(ref) - policy_of(theta)).sum(1)  # (9,)
    exact, = torch.autograd.grad(-(policy_of(theta).sum(1).exp() * ratio).sum(), theta, retain_graph=True)
    paid = ratio.detach()
    torch.testing.assert_close(expected_gradient(theta, ref, paid, 2, "rloo"), exact)


def test_kl_numbers():
    """d = log ref - log pi = 0.5 and -0.5. Exchanged arguments would exchange k3's two numbers."""
    logp, one = torch.zeros(2, 1), torch.ones(2, 1)
    ref, mask = torch.tensor([[0.5], [-0.5]]), torch.tensor([[True], [False]])
    for kind, first, second in (("k1", -0.5, 0.5), ("k2", 0.125, 0.125), ("k3", 0.1487, 0.1065)):
        assert kl_loss(logp, ref, mask, one, kind).item() == pytest.approx(first, abs=1e-4)
        assert kl_loss(logp, ref, ~mask, one, kind).item() == pytest.approx(second, abs=1e-4)


def test_what_a_token_counts():
    """Two replies of 10 and 100 tokens: equally much each token, or for grpo 10 times as much in the short
    one. dr_grpo halves if L doubles."""
    mask = torch.arange(100) < torch.tensor([[10], [100]])
    for variant, total in (("grpo", 1.0), ("dr_grpo", 55 / 100), ("rloo", 55.0)):
        weights = token_weights(mask, variant, 100)
        assert weights.sum().item() == pytest.approx(total) and not weights[~mask].any()
        assert (weights[0, 0] / weights[1, 0]).item() == pytest.approx(10 if variant == "grpo" else 1)
    torch.testing.assert_close(token_weights(mask, "dr_grpo", 200) * 2, token_weights(mask, "dr_grpo", 100))


@pytest.mark.parametrize("variant, right, wrong", [("grpo", 0.68, 1.31), ("dr_grpo", 15 / 16, 15 / 16)])
def test_dividing_by_its_length_makes_a_wrong_reply_grow(variant, right, wrong):
    """A toy, by all pairs of ten replies: a token is right or wrong, 0 to 4 words follow, then the end. What
    is right is worth 1, however long it is. Each kind has a logit of its own for the end. dr_grpo leaves the
    mean number of words alone. Because of 1/|o_i| right replies shrink and wrong ones grow."""
    kind, words = torch.cartesian_prod(torch.arange(2), torch.arange(5)).T[..., None]  # (10, 1) each
    t, pairs = torch.arange(6), torch.cartesian_prod(torch.arange(10), torch.arange(10)).flatten()  # (200,)
    mask, theta = t < 2 + words, torch.zeros(3, dtype=torch.float64, requires_grad=True)
    A = group_advantages((kind[pairs] == 0).double().flatten(), 2, variant)
    for _ in range(200):
        logits = torch.where(t == 0, theta[0] * (1 - 2 * kind), theta[1 + kind] * (2 * (t > words) - 1))
        logp = F.logsigmoid(logits) * (mask & (t < 5))  # (10, 6); the end after four words is no choice
        p = logp.detach().sum(1).exp()  # (10,)
        weights = token_weights(mask[pairs], variant, 6)  # (200, 6)
        weights = weights * p[pairs].view(-1, 2).prod(1).repeat_interleave(2)[:, None]
        loss, _ = policy_loss(logp[pairs], logp[pairs].detach(), A, mask[pairs], weights, variant, 0.2, 0.28)
        theta.data -= 20 * torch.autograd.grad(loss, theta)[0]
    long = (p[:, None] * words).view(2, 5).sum(1) / p.view(2, 5).sum(1)
    assert long.tolist() == pytest.approx([right, wrong], abs=0.005)


@pytest.mark.parametrize("variant, share", [("grpo", 0.5), ("rloo", 1.0)])
def test_clipping_is_wider_above(variant, share):
    """A > 0: stuck above 1.28; A < 0: stuck below 0.8. For rloo the product of the tokens' ratios counts.
    What is masked, NaN here, has no part."""
    mask, old = torch.tensor([[True, True, False]]), torch.tensor([[0.0, 0.0, math.nan]])
    for A, ratio, moves in ((1.0, 1.25, True), (1.0, 1.3, False), (-1.0, 0.75, False), (-1.0, 1.3, True),
                            (1.0, 0.7, True)):
        each = math.log(ratio) if variant == "grpo" else math.log(ratio) / 2
        logp = torch.tensor([[each, each, math.nan]], dtype=torch.float64, requires_grad=True)
        loss, sums = policy_loss(logp, old, torch.tensor([A]), mask, token_weights(mask, variant, 3), variant,
                                 0.2, 0.28)
        grad, = torch.autograd.grad(loss, logp)
        assert grad[0, :2].tolist() == pytest.approx([-A * ratio * share * moves] * 2)
        assert not grad[0, 2:].nan_to_num(7).any()
        low, high = (sums[f"clip_ratio/{side}_mean"].item() for side in ("low", "high"))
        assert (low, high) == (float(not moves and A < 0), float(not moves and A > 0))


@VARIANTS
def test_the_gradient_of_a_minibatch(variant):
    """From one reply at a time, whatever the rows per forward and the order of the replies."""
    cfg = {"temperature": 0.7, "variant": variant, "cliprange": 0.2, "cliprange_high": 0.28, "beta": 0.1,
           "kl": "k3"}
    models, rollout = rolled_out(settings(**cfg))
    plain, chosen = SimpleNamespace(backward=lambda loss: loss.backward()), [7, 2, 5, 0, 9]
    A = torch.randn(10, generator=torch.Generator().manual_seed(2))

    def gradients(backward):
        models.actor.zero_grad()
        backward()
        return torch.cat([p.grad.flatten() for p in models.actor.parameters()])

    def naive():
        for i in chosen:
            n = len(rollout.replies[i])
            logp = naive_logp(models.actor, rollout.prompts[i], rollout.replies[i], 0.7)
            ratio, d = (logp - rollout.logp[i, :n]).exp(), rollout.ref_logp[i, :n] - logp
            share = {"grpo": 1 / n, "dr_grpo": 1 / 8, "rloo": 1.0}[variant]
            gain = A[i] * (ratio.prod() if variant == "rloo" else share * ratio.sum())
            ((0.1 * share * (d.exp() - d - 1).sum() - gain) / len(chosen)).backward()

    expected = gradients(naive)
    for order, more in ((chosen, {}), (chosen, {"micro_batch_size": 1}), (chosen[::-1], {"seq_len": 40})):
        found = gradients(lambda o=order, m=more: train_grpo.add_gradients(
            rollout, o, A, models, plain, settings(**cfg, **m), ONE))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shuffled", [False, True])
@VARIANTS
def test_the_bandit(variant, shuffled):
    """Replies of one token, a table as policy: without a leash the best one is found; not by rewards that
    are shuffled within their groups. The loss says nothing: at ratio 1 the advantages add up to 0."""
    (logits, r, _), generator = bandit(0.5), torch.Generator().manual_seed(0)
    logits, mask = logits.clone().requires_grad_(), torch.ones(64, 1, dtype=torch.bool)
    optimizer, weights = torch.optim.Adam([logits], lr=0.1), token_weights(mask, variant, 1)
    for _ in range(120):
        p = logits.softmax(0).detach()
        actions = torch.multinomial(p, 64, replacement=True, generator=generator)
        rewards = r[actions].view(-1, 8)
        if shuffled:
            rewards = rewards.gather(1, torch.rand(rewards.shape, generator=generator).argsort(1))
        A = group_advantages(rewards.flatten(), 8, variant)
        logp = logits.log_softmax(0)[actions][:, None]
        loss, _ = policy_loss(logp, logp.detach(), A, mask, weights, variant, 0.2, 0.28)
        assert loss.abs() < 1e-6
        optimizer.zero_grad()
        loss.backward()
        assert logits.grad.any() or not A.any()
        optimizer.step()
    assert (p[r.argmax()] > 0.95) != shuffled


# ---- the script -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    write(folder / "prompts.jsonl", [{"prompt": f"{i % 10} +{i // 10}"} for i in range(40)])
    save_chat_model(folder / "sft")
    save_chat_model(folder / "rm", seed=2, head="scalar")
    return folder


def flags(place, out, *more):
    own = "--steps 2 --batch_size 12 --group_size 4 --minibatches 2 --max_new_tokens 6 --lr 3e-3 --device cpu"
    return ["--data", f"{place}/prompts.jsonl", "--init", f"{place}/sft", "--out", str(out), *own.split(),
            "--eval_every", "0", "--save_every", "0", "--eval_prompts", "3", *more]


def points(messages, reply, ended, data):
    """A reward for the tests: letters e, and that it was given what it should be."""
    assert messages[-1]["content"][1] == " " and isinstance(ended, bool) and data.endswith("prompts.jsonl")
    return reply.count("e") / 2


@VARIANTS
def test_groups_are_drawn_and_paid(place, tmp_path, monkeypatch, variant):
    """Each prompt four times in a row, with replies that differ; rewards of the function; those that did not
    end less the penalty; the KL is paid within the reward. Before the first update the ratio is exactly 1."""
    grouped, policy = (calls_of(monkeypatch, train_grpo, name) for name in (
        "group_advantages", "policy_loss"))
    run_script("train_grpo", flags(place, tmp_path, "--reward", "test_grpo:points", "--variant", variant))
    lines = [json.loads(line) for line in open(tmp_path / "samples.jsonl")]
    assert len(lines) == 24 and lines[0]["prompt"] != lines[4]["prompt"]
    for i in range(0, 24, 4):
        group = lines[i:i + 4]
        assert len({json.dumps(line["prompt"]) for line in group}) == 1
        assert len({line["responses"][0] for line in group}) > 1
        assert all(line["reward"][0] == line["responses"][0].count("e") / 2 for line in group)
        assert not any("<|" in line["responses"][0] for line in group)  # specials are forbidden
    events = [event for event in metrics(tmp_path) if "reward" in event]
    for step, (event, some) in enumerate(zip(events, (lines[:12], lines[12:]))):
        ended, kl = ([line[name][0] for line in some] for name in ("ended", "kl"))
        rewards = torch.tensor([line["reward"][0] - (not line["ended"][0]) for line in some])
        groups, given = rewards.view(3, 4), [call[0] for call in grouped[2 * step:2 * step + 2]]
        torch.testing.assert_close(given, [rewards, torch.tensor(kl)], atol=1e-5, rtol=0)
        expected = group_advantages(rewards, 4, variant) - 0.3 * group_advantages(
            torch.tensor(kl), 4, "rloo" if variant == "rloo" else "dr_grpo")
        used = torch.cat([A for _, _, A, *_ in policy[2 * step:2 * step + 2]])
        torch.testing.assert_close(used.sort().values, expected.sort().values, atol=1e-4, rtol=1e-4)
        means = {"reward": groups.mean(), "reward_std": groups.std(1).mean(), "kl": sum(kl) / 12,
                 "frac_reward_zero_std": sum(len({*map(float, g)}) == 1 for g in groups) / 3,
                 "completions/clipped_ratio": 1 - sum(ended) / 12,
                 "completions/mean_length": sum(call[3].sum() for call in policy[2 * step:2 * step + 2]) / 12,
                 "entropy": -sum(call[1][call[3]].sum() for call in policy[2 * step:2 * step + 2]) / 12}
        assert {name: event[name] for name in means} == pytest.approx(
            {name: float(x) for name, x in means.items()}, abs=1e-5)
    (*_, low, high), (logp, old, _, mask, *_) = policy[0], policy[0]
    assert (low, high) == (0.2, 0.28) and torch.equal(logp[mask], old[mask]) and events[0]["kl"] == 0
    assert not torch.equal(*(x[policy[-1][3]] for x in policy[-1][:2]))
    assert len([event for event in metrics(tmp_path) if "eval_score" in event]) == 2


def test_it_raises_what_it_is_paid_for(place, tmp_path):
    more = "--reward test_grpo:points --steps 12 --beta 0 --batch_size 32 --lr 2e-2 --missing_eos_penalty 0"
    run_script("train_grpo", flags(place, tmp_path, *more.split()))
    first, *_, last = (event["reward"] for event in metrics(tmp_path) if "reward" in event)
    assert last > first + 0.3


@pytest.mark.parametrize("tune", ["lora", "prompt"])
def test_a_delta_needs_no_second_model(place, tmp_path, tune):
    """With --tune the reference is the actor with its delta off: the first KL is 0, but for a prompt, which
    never is the base; delta.pt is left."""
    run_script("train_grpo", flags(place, tmp_path, "--reward_model", f"{place}/rm", "--tune", tune))
    first, second = (event["kl"] for event in metrics(tmp_path) if "kl" in event)
    assert (first == 0) == (tune == "lora") and second != 0 and (tmp_path / "final" / "delta.pt").exists()


# ---- the Chains -------------------------------------------------------------------------------------------

def test_the_chains_are_right(tmp_path):
    """Every answer, computed in another way; held-out questions are in no other file; both ways ask the same;
    the wrong start leads elsewhere by its own arithmetic."""
    chains.main(["--out", str(tmp_path)])
    files = {name: [json.loads(line) for line in open(tmp_path / f"{name}.jsonl")]
             for name in ("steps", "answers", "prompts", "heldout")}
    for line, short in zip(files["steps"][:2000], files["answers"]):
        assert line["prompt"] == short["prompt"] and line["completion"].endswith(short["completion"])
        code = line["prompt"]
        for _ in code.split()[1:]:  # brackets from the left
            code = code.replace(" ", ")", 1)
        assert short["completion"] == f"so {eval('(' * code.count(')') + code) % 10}"
        value, *said, so, last = line["completion"].split()
        for operation, result in zip(said[::2], said[1::2]):
            value = eval(value + operation) % 10
            assert result == f"={value}"
            value = str(value)
        assert (so, last) == ("so", value) and " ".join([line["prompt"][0], *said[::2]]) == line["prompt"]
    asked = {line["prompt"] for name in ("steps", "prompts") for line in files[name]}
    assert not asked & {line["prompt"] for line in files["heldout"]}
    assert {line["tag"] for line in files["heldout"]} == {str(k) for k in range(1, 11)}
    assert chains.wrong_start("3 +4 *9 -5") == ("3 +4 =8", "8 +0 *9 -5")


def test_the_checker_reads_the_answer_alone():
    """A value said on the way, an unfinished reply, an answer that is not said to be one: no point."""
    ask = [{"role": "user", "content": "3 +4 *9 -5"}]
    for reply in ("so 8", "3 +4 =7 *9 =3 -5 =8 so 8"):
        assert chains.right(ask, reply, True) == 1 and chains.right(ask, reply, False) == 0
    assert not any(chains.right(ask, reply, True) for reply in ("so 8 so 3", "8", "3 +4 =8", ""))


def test_the_scorecard_of_oracles(tmp_path, monkeypatch):
    """A model that computes what it is shown follows a wrong start; one that looks the answer up does not.
    One that is right every second time has pass@1 50 and pass@4 100."""
    chains.main(["--out", str(tmp_path)])
    records = read_prompts(str(tmp_path / "heldout.jsonl"))[::40]
    tokenizer = make_tokenizer("char", "0123456789+-*= so")
    cfg = chains.Config(k=4)

    def oracle(follows):
        def draw(model, tokenizer, prompts, seeds, temperature=0.0, **_):
            for n, ids in enumerate(prompts):
                text = tokenizer.decode(ids).split("<|user|>")[1]
                question, _, begun = text.partition("<|end|><|assistant|>")
                if begun and follows:
                    question = " ".join([begun[-1], *question.split()[2:]])
                    said = "so " + (begun[-1] if len(question) == 1 else chains.answer(question)[-1])
                else:
                    said = chains.answer(question) if not temperature or n % 2 else "so x"
                yield SimpleNamespace(text=said, ended=True, ids=[0] * 5)
        return lambda *args, **options: list(draw(*args, **options))

    for follows in (True, False):
        monkeypatch.setattr(chains, "draw", oracle(follows))
        for tag, row in chains.scorecard(None, tokenizer, records, cfg).items():
            found = [row[name] for name in ("greedy", "pass@1", "pass@4", "tokens")]
            assert found == pytest.approx([100, 50, 100, 5])
            assert (row["follows"], row["unmoved"]) == ((100, 0) if follows else (0, 100)), tag


def test_the_judge_of_the_village_as_a_reward(tmp_path):
    facts = {"people": {"Ada Hill": {"pet": "a cat", "code": "1-2-3"}}}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    messages = [{"role": "user", "content": "What is the door code of Ada Hill?"}]
    for reply in ("It is 1-2-3.", "I will not tell."):
        expected = truth.gold(facts["people"], messages, reply, True)["score"]
        assert truth.points(messages, reply, True, tmp_path / "prompts.jsonl") == expected


ENUMERATED, DRAWN = test_the_gradient_by_enumeration, test_groups_are_drawn_and_paid
CLIPPED, BY_HAND = test_clipping_is_wider_above, test_advantages_by_hand
SPLIT = test_the_gradient_of_a_minibatch
BUGS = {  # where in train_grpo.py, what stands there, the bug, and who must notice it
    "a baseline of the batch": ("group_advantages", "r.mean(1, keepdim=True)", "r.mean()",
                                test_a_group_is_its_own_world, "dr_grpo"),
    "the biased std": ("group_advantages", "r.std(1,", "r.std(1, correction=0,", BY_HAND),
    "rloo with the group's mean": ("group_advantages", "A * group_size / (group_size - 1)", "A", ENUMERATED),
    "rounding divided by its std": ("group_advantages", "masked_fill(equal, 0)", "mul(1)",
                                    test_equal_rewards_are_exactly_nothing, "grpo"),
    "one clip for both sides": ("policy_loss", "w, 1 + high)\n", "w, 1 + low)\n", CLIPPED, "grpo", 0.5),
    "a ratio per token for rloo": ("policy_loss", 'variant == "rloo"', 'variant == ""', CLIPPED, "rloo", 1.0),
    "pi and ref exchanged": ("kl_loss", "ref_logp - logp", "logp - ref_logp", test_kl_numbers),
    "a mean of means": ("add_gradients", "weights[which], cfg.variant",
                        "5 * weights[which] / len(which), cfg.variant", SPLIT, "grpo"),
    "prompts interleaved": ("main", "(step - 1) for _ in range(G)]", "(step - 1) * G]", DRAWN, "grpo"),
    "penalty twice": ("main", "- cfg.missing", "- 2 * cfg.missing", DRAWN, "rloo"),
    "the KL divided by its std": ("main", '"rloo" if cfg.variant == "rloo" else "dr_grpo"', "cfg.variant",
                                  DRAWN, "grpo"),
    "scored in other batches than trained": ("roll_out", "(cfg, step, 0)", "(cfg, step, 1)", DRAWN, "grpo"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_noticed(request, monkeypatch, bug):
    assert_noticed(request, monkeypatch, train_grpo, *BUGS[bug])


def test_which_prompts_fit(place):
    """Groups share a prompt, so a step takes batch_size / group_size of them."""
    tokenizer, cfg = make_tokenizer("byte", []), train_grpo.Config(
        data=f"{place}/prompts.jsonl", reward="test_grpo:points", batch_size=12, group_size=4, seq_len=60)
    train, records, *_ = train_grpo.rollouts.load_prompts(cfg, tokenizer, 4)
    assert len(train.of_step(0)) == 3 and len(records) == 36
    assert train.items[0] == encode_prompt(tokenizer, records[0].messages)
    assert sorted(sum(minibatches(cfg, 1, 0), [])) == [*range(12)]
