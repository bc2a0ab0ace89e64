"""The reward model: its loss against an explicit loop, where a reward is read, its zero, what is reported."""
import itertools
import math

import numpy as np
import pytest
import torch
from small_chat import assert_noticed, last, random_model, ranked, write
from test_alignment import TOKENIZER, make_files, record_of, records_of, train
from test_rollouts import ONE

import train_rm
from data import Replies, encode_prompt
from model import load_model
from train_rm import Config, all_rewards, evaluate, pair_metrics, rm_loss


def loss_by_loop(rewards, group_sizes, centre=0.0):
    """Ouyang et al. 2022, equation 1: log sigmoid(d) = min(d, 0) - log(1 + exp(-|d|))."""
    total, start = 0.0, 0
    for K in group_sizes:
        pairs = list(itertools.combinations(rewards[start:start + K], 2))
        losses = [math.log1p(math.exp(-abs(a - b))) - min(a - b, 0) + centre * (a + b) ** 2 for a, b in pairs]
        total, start = total + sum(losses) / math.comb(K, 2), start + K
    return total


@pytest.mark.parametrize("sizes, centre, scale", [
    ([2], 0.0, 1), ([2, 4, 3, 9], 0.0, 1), ([2, 4, 3, 9], 0.2, 1), ([2, 4, 3, 9], 0.0, 1e5)])
def test_the_loss_is_the_double_loop(sizes, centre, scale):
    """Groups of unequal size, each of weight 1; rewards so far apart that exp overflows; the gradient stays
    finite, and without centring it sums to 0 in each group, since only differences count."""
    r = scale * torch.randn(sum(sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = rm_loss(r.requires_grad_(), sizes, centre)
    assert loss.item() == pytest.approx(loss_by_loop(r.tolist(), sizes, centre))
    loss.backward()
    assert all(part.isfinite().all() and (abs(part.sum()) < 1e-12 or centre) for part in r.grad.split(sizes))


def plain_rewards(model, record) -> list[float]:
    """Each reply alone: prompt, reply, end; the last position."""
    ids = [encode_prompt(TOKENIZER, record.messages) + TOKENIZER.encode(text) + [TOKENIZER.end_id]
           for text in record.responses]
    return [model(torch.tensor([row]))[0, -1].item() for row in ids]


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_reward_is_that_of_the_reply_alone(size):
    """Packed and padded, any number at once: each reward is that of its reply, read by itself at its end."""
    model, records, chosen = random_model("scalar"), records_of(ranked()), [5, 0, 3, 10, 2]
    rewards = all_rewards(model, Replies(records, TOKENIZER, 96), chosen, size, ONE)
    expected = sum((plain_rewards(model, records[g]) for g in chosen), [])
    assert rewards.tolist() == pytest.approx(expected, abs=1e-5) and rewards.std() > 0.1


def test_the_ceiling_is_what_noise_leaves():
    """On Bradley-Terry labels the true scores reach the accuracy E[max(p, 1 - p)] and agreement 1, and they
    are calibrated. The same order three times too confident is not. A reversed one agrees with nothing."""
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(4000, 2))
    p = 1 / (1 + np.exp(-2 * (scores[:, 0] - scores[:, 1])))  # that the first one is preferred
    scores = np.where((generator.random(4000) < p)[:, None], scores, scores[:, ::-1])
    replies = Replies([record_of("q", "A", "B", tag="topic", tags=["a", "b"], scores=pair)
                       for pair in scores.tolist()], TOKENIZER, 96)
    gold = torch.from_numpy(scores).flatten()
    true, bold, wrong = (evaluate(gold * scale, replies, Config(data="x")) for scale in (2.0, 6.0, -2.0))
    assert true["eval_accuracy"] == true["eval_ceiling"]
    assert true["eval_ceiling"] == pytest.approx(np.maximum(p, 1 - p).mean(), abs=0.03)
    assert true["eval_agreement"] == 1 and wrong["eval_agreement"] == 0 and wrong["eval_accuracy"] < 0.5
    assert true["eval_calibration_error"] < 0.03 < 0.1 < bold["eval_calibration_error"]


def test_accuracy_by_kind_of_pair():
    """Tags of two replies in either order are one kind. Records without tags or scores count in the total
    alone. Pairs whose scores differ by less than score_gap have no agreement. A tie is half right."""
    records = [record_of("q", "1", "2", "3", tag="t", tags=["b", "a", "b"], scores=[3.0, 2.9, 2.9]),
               record_of("q", "4", "5")]
    replies, rewards = Replies(records, TOKENIZER, 96), torch.tensor([0.0, 1.0, -1.0, 5.0, 6.0])
    found = evaluate(rewards, replies, Config(data="x", centre=0.2))
    assert found["eval_accuracy"] == pytest.approx(2 / 4)  # 1<2 wrong, 1>3 right, 2>3 right, 4<5 wrong
    assert found["eval_accuracy/a|b"] == pytest.approx(1 / 2) and found["eval_accuracy/b|b"] == 1
    assert found["eval_accuracy/t"] == pytest.approx(2 / 3)
    assert [found[f"eval_pairs{kind}"] for kind in ("", "/a|b", "/b|b", "/t")] == [4, 2, 1, 3]
    assert found["eval_agreement"] == 0.5 and found["eval_ceiling"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert found["eval_loss"] == pytest.approx(loss_by_loop(rewards.tolist(), [3, 2], 0.2) / 2)
    assert "eval_agreement" not in evaluate(rewards, replies, Config(data="x", score_gap=0.2))
    assert pair_metrics(torch.tensor([1.0, 0.0, 3.0, 3.0]), [2, 2]) == {
        "accuracy": 0.75, "margin": 0.5, "min_reward": 0.0, "mean_reward": 1.75, "max_reward": 3.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def test_a_run_begins_at_ln_2_and_learns(files, tmp_path):
    """A new head is 0: all rewards 0, loss ln 2, accuracy 0.5. Then the loss falls. The evaluation's numbers
    are those of the model in final/, each reply read alone: the constant that is taken off changes none."""
    first, *_, event, _ = train("train_rm", files, tmp_path)
    assert first["loss"] == pytest.approx(math.log(2)) and first["accuracy"] == 0.5
    assert first["min_reward"] == first["max_reward"] == first["margin"] == 0 < first["grad_norm"]
    assert last(tmp_path, "loss") < 0.68 and event["step"] == 4
    rewards = plain_rewards(load_model(str(tmp_path))[0], records_of(ranked())[10])
    assert event["eval_loss"] == pytest.approx(loss_by_loop(rewards, [4]), abs=1e-4)
    assert event["eval_accuracy"] == sum(a > b for a, b in itertools.combinations(rewards, 2)) / 6


@pytest.mark.parametrize("more, known", [("", 10), ("--reference_prompts 3", 3),
                                         ("--negatives 1 --reference_prompts 0", 9)])
def test_zero_is_the_mean_of_the_best_replies(files, tmp_path, more, known):
    """In the saved model the best replies of the first training prompts have a mean reward of 0. A prompt
    that was dropped, since its replies are alike, does not make room for a negative."""
    lines = ranked()
    lines[3]["responses"] = ["the same"] * 4 if known == 9 else lines[3]["responses"]
    data = write(tmp_path / "ranked.jsonl", lines)
    train("train_rm", files, tmp_path / "out", "--data", data, *more.split())
    model, _, config = load_model(str(tmp_path / "out"))
    good = [line for line in lines if len({*line["responses"]}) > 1]
    replies = Replies(records_of(good)[:-1], TOKENIZER, 96)  # the last one is for validation
    rewards = all_rewards(model, replies, range(len(replies)), 0, ONE)
    assert abs(rewards[:4 * known:4].mean()) < 1e-6 and (known != 3 or abs(rewards[::4].mean()) > 1e-3)
    assert config["reward_std"] == pytest.approx(rewards[:4 * known].std().item(), rel=1e-4)


LOSS, ALONE = test_the_loss_is_the_double_loop, test_a_reward_is_that_of_the_reply_alone
BUGS = {  # where, what stands there, the bug, and who must notice it
    "prompts weigh by their pairs": ("rm_loss", "[2 / (K * (K - 1))", "[1.0", LOSS, [2, 4, 3, 9], 0.0, 1),
    "mean for sum": ("rm_loss", "(weights)).sum()", "(weights)).mean()", LOSS, [2, 4, 3, 9], 0.0, 1),
    "the worse one above": ("rm_loss", "better, worse =", "worse, better =", LOSS, [2], 0.0, 1),
    "log(1 + exp)": ("rm_loss", "-F.logsigmoid(better - worse)", "(1 + (worse - better).exp()).log()", LOSS,
                     [2, 4, 3, 9], 0.0, 1e5),
    "reward a token early": ("read_rewards", "rows.ends[1]]", "rows.ends[1] - 1]", ALONE, 0),
    "neighbours are seen": ("read_rewards", "=rows.segment_ids", "=None", ALONE, 0),
    "negatives are references": ("main", "if not each.negative", "if True",
                                 test_zero_is_the_mean_of_the_best_replies,
                                 "--negatives 1 --reference_prompts 0", 9),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_noticed(request, monkeypatch, bug):
    assert_noticed(request, monkeypatch, train_rm, *BUGS[bug])
