"""The reward model: its loss against an explicit loop, where it is read, its zero and scale, reports, whole runs."""
import dataclasses
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from small_chat import (
    FORMS,
    SHAPE,
    TOPICS,
    assert_noticed,
    curve,
    last,
    launch,
    metrics,
    random_model,
    ranked,
    same_metrics,
    save_chat_model,
    split_by_hand,
    trained_alike,
    write,
)

import train_rm
from data import Replies, encode_prompt
from lib import records
from lib.checkpoint import load_final
from lib.program import UserError, parse
from lib.ranks import Ranks
from lib.records import Record, random_negatives, read_preferences, split_prompts
from lib.tokenizer import make_tokenizer
from model import Block, load_model
from train_rm import (
    Config,
    all_rewards,
    calibration_error,
    evaluate,
    normalise,
    pair_metrics,
    read_rewards,
    rm_loss,
    wins,
)
from zero import Zero

TOKENIZER = make_tokenizer("byte", [])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def loss_by_loop(rewards, group_sizes, margin=0.0, centre=0.0):
    """Ouyang et al. 2022, equation 1, as it is written."""
    total, start = 0.0, 0
    for K in group_sizes:
        r = rewards[start:start + K]
        losses = [-math.log(1 / (1 + math.exp(-(r[i] - r[j] - margin)))) + centre * (r[i] + r[j]) ** 2
                  for i in range(K) for j in range(i + 1, K)]
        total, start = total + sum(losses) / math.comb(K, 2), start + K
    return total


# ---- the loss -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [[2], [4], [2, 4, 3, 9]])
@pytest.mark.parametrize("margin, centre", [(0.0, 0.0), (0.7, 0.0), (0.0, 0.01), (0.3, 0.2)])
def test_r1_the_loss_is_the_double_loop(sizes, margin, centre):
    """R1: groups of unequal size, each of weight 1; K = 2 is the pair."""
    r = torch.randn(sum(sizes), dtype=torch.float64)
    assert rm_loss(r, sizes, margin, centre).item() == pytest.approx(loss_by_loop(r.tolist(), sizes, margin, centre))


def test_r2_only_differences_inside_a_prompt_count():
    """R2: another constant for each prompt changes neither loss nor gradient, and the gradient of each sums to 0."""
    sizes = [3, 2, 4]
    r = torch.randn(9, dtype=torch.float64, requires_grad=True)
    shift = torch.tensor([5.0] * 3 + [-2.0] * 2 + [9.0] * 4, dtype=torch.float64)
    a, b = rm_loss(r, sizes), rm_loss(r + shift, sizes)
    assert a.item() == pytest.approx(b.item(), rel=1e-12)
    (g,), (h,) = torch.autograd.grad(a, r), torch.autograd.grad(b, r)
    torch.testing.assert_close(g, h, rtol=1e-12, atol=1e-12)
    assert all(abs(part.sum()) < 1e-12 and part.abs().max() > 0 for part in g.split(sizes))


def test_r3_swapping_a_pair_costs_its_difference():
    """R3: L(-d) - L(d) = d."""
    for d in (-3.0, 0.0, 0.5, 20.0):
        swapped, right = (rm_loss(torch.tensor(pair), [2]) for pair in ([0.0, d], [d, 0.0]))
        assert (swapped - right).item() == pytest.approx(d, abs=1e-6)


@pytest.mark.parametrize("d", [1e4, -1e4])
def test_r5_huge_differences_stay_finite(d):
    """R5: log(1 + exp(-d)) would be inf, and its gradient nan."""
    r = torch.tensor([d, 0.0], requires_grad=True)
    loss = rm_loss(r, [2])
    loss.backward()
    assert loss.item() == max(0.0, -d) and r.grad.tolist() == ([0, 0] if d > 0 else [-1, 1])


def test_a_constant_margin_makes_it_too_sure():
    """If 80 % say so, the loss is least where sigmoid(d) = 0.8; with a margin, at a larger d: no probability."""
    d = torch.arange(0, 4, 1e-2, dtype=torch.float64)
    sure = []
    for margin in (0.0, 1.0):
        right, wrong = ([rm_loss(sign * torch.tensor([x, 0.0]), [2], margin) for x in d.tolist()] for sign in (1, -1))
        sure.append(torch.sigmoid(d[(0.8 * torch.stack(right) + 0.2 * torch.stack(wrong)).argmin()]).item())
    assert sure[0] == pytest.approx(0.8, abs=0.01) and sure[1] > 0.83


def test_a_forward_without_replies_adds_zero():
    """A rank's filling batch: loss 0, still connected, so that its backward takes part in the communication."""
    r = torch.randn(3, requires_grad=True)
    loss = rm_loss(r[torch.zeros(0, dtype=torch.long)], [])
    loss.backward()
    assert loss.item() == 0 and r.grad.tolist() == [0, 0, 0]


def test_r9_a_linear_reward_recovers_the_gold_one():
    """R9: rankings drawn by Plackett-Luce from w.x; the loss over linear rewards is least at w, its scale included."""
    generator = torch.Generator().manual_seed(3)
    w = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    x = torch.randn(3000, 4, 3, dtype=torch.float64, generator=generator)  # prompts, K, features
    gumbel = -(-torch.rand(3000, 4, dtype=torch.float64, generator=generator).log()).log()
    order = (x @ w + gumbel).argsort(1, descending=True)
    x = x.gather(1, order[..., None].expand_as(x)).flatten(0, 1)  # the best first
    found = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([found], max_iter=30)

    def closure():
        optimizer.zero_grad()
        loss = rm_loss(x @ found, [4] * 3000) / 3000
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(found.detach(), w, rtol=0.08, atol=0.05)
    assert torch.cosine_similarity(found.detach(), w, dim=0) > 0.999


# ---- reading the reward -------------------------------------------------------------------------------------------

def records_of(lines):
    return [Record("x:1", [{"role": "user", "content": line["prompt"]}] if isinstance(line["prompt"], str) else
                   line["prompt"], line["responses"], line["tag"], line["tags"], line["scores"]) for line in lines]


ONE_RANK = Ranks(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))


def plain_reward(model, record, text):
    """One reply alone: prompt, reply, end; the last position."""
    ids = encode_prompt(TOKENIZER, record.messages) + TOKENIZER.encode(text) + [TOKENIZER.end_id]
    return model(torch.tensor([ids]))[0, -1].item()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("size", [0, 1, 3])
def test_r6_neighbours_and_padding_change_nothing(packed, size):
    """R6: packed, padded, alone, any number at once: each reward is that of the reply read by itself (1e-5)."""
    model, records = random_model("scalar"), records_of(ranked())
    replies = Replies(records, TOKENIZER, SHAPE["max_seq_len"], packed=packed)
    chosen = [5, 0, 3, 10, 2]
    rewards = all_rewards(model, replies, chosen, size, ONE_RANK)
    expected = [plain_reward(model, records[g], text) for g in chosen for text in records[g].responses]
    torch.testing.assert_close(rewards, torch.tensor(expected).double(), rtol=0, atol=1e-5)
    assert rewards.std() > 0.1


def test_r7_the_reward_stands_on_the_end():
    """R7: every reply is read at its one end token; what stands after it has no say, the last letter before has."""
    model = random_model("scalar")
    replies = Replies(records_of(ranked()), TOKENIZER, SHAPE["max_seq_len"], packed=False)
    rows = next(replies.batches(list(range(len(replies)))))
    assert (rows.ids[rows.ends[0], rows.ends[1]] == TOKENIZER.end_id).all()
    assert all(ids[-1] == TOKENIZER.end_id and ids.count(TOKENIZER.end_id) == ids.count(TOKENIZER.user_id) * 2
               for group in replies.groups for ids, _ in group)
    rewards = read_rewards(model, rows)
    garbage = rows.ids.clone()
    garbage[rows.segment_ids < 0] = 65
    assert (garbage != rows.ids).any()
    assert torch.equal(read_rewards(model, rows._replace(ids=garbage)), rewards)
    changed = rows.ids.clone()
    changed[rows.ends[0], rows.ends[1] - 1] = 90
    assert (read_rewards(model, rows._replace(ids=changed)) - rewards).abs().min() > 1e-4


def test_every_batch_of_a_step_is_the_step():
    """Whole groups, each once, whatever the ranks and the size; equal numbers of batches on all ranks."""
    replies = Replies(records_of(ranked()), TOKENIZER, SHAPE["max_seq_len"], batch_size=7, seed=3)
    assert sorted(g for step in range(11) for g in replies.of_step(step)) == sorted(list(range(11)) * 7)
    chosen = replies.of_step(1)
    for world, size in itertools.product((1, 2, 3, 8), (0, 1, 2, 5)):
        parts = [list(replies.batches(chosen, size, rank, world)) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        rows = [batch for part in parts for batch in part]
        assert sorted(i for batch in rows for i in batch.at.tolist()) == list(range(28))
        for batch in rows:
            assert sum(batch.sizes) == len(batch.at) == batch.ends.shape[1] and batch.ids.numel() > 0
            for n, i in enumerate(batch.at.tolist()):
                ids, mask = replies.groups[chosen[i // 4]][i % 4]
                row, end = batch.ends[:, n].tolist()
                assert batch.ids[row, end + 1 - len(ids):end + 1].tolist() == ids
                kept = batch.targets[row, end + 1 - len(ids):end].tolist()
                assert kept == [t if m else -100 for t, m in zip(ids[1:], mask[1:])]


def test_replies_that_read_alike_or_are_too_long():
    """Alike: the best stays, with its tag and score. Too long: the same prompt tokens go for all replies; or the
    record goes, if a reply fills the row alone."""
    user = [{"role": "user", "content": "x" * 60 + "yz"}]
    records = [Record("f:1", user, ["a", "b", "a", "c"], "", ["1", "2", "3", "4"], [4, 3, 2, 1]),
               Record("f:2", user, ["same", "same"]),
               Record("f:3", user, ["short", "l" * 30]),
               Record("f:4", user, ["short", "l" * 80])]
    replies = Replies(records, TOKENIZER, 70)
    assert replies.records[0].responses == ["a", "b", "c"] and replies.records[0].tags == ["1", "2", "4"]
    assert replies.records[0].scores == [4, 3, 1]
    assert (replies.repeated, replies.alike, replies.truncated, replies.too_long) == (2, 1, 1, 1)
    (short, short_mask), (long, long_mask) = replies.groups[1]
    prompt = len(long) - 31
    assert len(long) == 70 and short[:prompt] == long[:prompt] and long[0] == TOKENIZER.bos_id
    assert sum(long_mask) == 31 and sum(short_mask) == 6 and TOKENIZER.decode(long[prompt - 4:prompt - 2]) == "yz"
    with pytest.raises(UserError, match="--seq_len 3"):
        Replies(records, TOKENIZER, 3)


def test_pairs_of_ranked_replies():
    """"best-worst" is the first against the last, "all" is every i < j, each with its own tags."""
    records = records_of(ranked(TOPICS[:2], K=3))
    texts = [[record.responses for record in Replies(records, TOKENIZER, 96, pairs=pairs).records]
             for pairs in ("best-worst", "all")]
    a, b = (record.responses for record in records)
    assert texts == [[[a[0], a[2]], [b[0], b[2]]],
                     [[r[i], r[j]] for r in (a, b) for i, j in ((0, 1), (0, 2), (1, 2))]]


# ---- reports ------------------------------------------------------------------------------------------------------

def test_r8_zero_and_scale_are_free():
    """R8: after normalising, mean 0 and deviation 1; differences are only scaled, and once more changes nothing."""
    model = random_model("scalar")
    replies = Replies(records_of(ranked()), TOKENIZER, SHAPE["max_seq_len"])
    chosen = list(range(len(replies)))
    before = all_rewards(model, replies, chosen, 0, ONE_RANK)
    for _ in range(2):
        rewards = all_rewards(model, replies, chosen, 0, ONE_RANK)
        normalise(model.state_dict(), rewards.mean().item(), rewards.std().item())
        after = all_rewards(model, replies, chosen, 0, ONE_RANK)
        assert abs(after.mean()) < 1e-6 and after.std() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(after, (before - before.mean()) / before.std(), rtol=0, atol=1e-5)


def test_ties_are_half_right():
    assert wins(torch.tensor([2.0, 0.0, -1.0])).tolist() == [1, 0.5, 0]
    assert pair_metrics(torch.zeros(5), [3, 2])["accuracy"] == 0.5
    found = pair_metrics(torch.tensor([1.0, 0.0, 3.0, -2.0]), [2, 2])
    assert found == {"accuracy": 1.0, "margin": 3.0, "min_reward": -2.0, "mean_reward": 0.5, "max_reward": 3.0}


def noisy(n, temperature=0.5, seed=0):
    """Two replies per record, ordered by noise: (records, E[max(p, 1 - p)], probabilities)."""
    rng = np.random.default_rng(seed)
    records, p = [], []
    for _ in range(n):
        a, b = rng.normal(size=2).tolist()
        p.append(1 / (1 + math.exp(-(a - b) / temperature)))
        order = [(a, "A"), (b, "B")] if rng.random() < p[-1] else [(b, "B"), (a, "A")]
        records.append(Record("f:1", [{"role": "user", "content": "q"}], [text for _, text in order], "topic",
                              [text.lower() for _, text in order], [score for score, _ in order]))
    return records, np.maximum(p, 1 - np.array(p)).mean()


def test_r12_the_ceiling_is_what_noise_leaves():
    """R12: on Bradley-Terry labels the true scores reach E[max(p, 1-p)] accuracy, agreement 1, and are calibrated;
    the same order three times too confident is not, and a reversed one agrees with nothing."""
    records, expected = noisy(4000)
    replies = Replies(records, TOKENIZER, 96)
    gold = torch.tensor([score for record in records for score in record.scores], dtype=torch.float64)
    cfg = Config()
    true, bold, wrong = (evaluate(gold * scale, replies, cfg) for scale in (2.0, 6.0, -2.0))
    error = 4 * 0.5 / math.sqrt(4000)
    assert true["eval_accuracy"] == true["eval_ceiling"] == pytest.approx(expected, abs=error)
    assert true["eval_agreement"] == 1 and wrong["eval_agreement"] == 0 and wrong["eval_accuracy"] < 0.5
    assert true["eval_calibration_error"] < 0.03 < 0.1 < bold["eval_calibration_error"]
    assert true["eval_accuracy/a|b"] == true["eval_accuracy/topic"] == true["eval_accuracy"]
    wide = evaluate(gold * 2, replies, Config(score_gap=1.0))
    assert wide["eval_agreement"] == 1 and wide["eval_ceiling"] == true["eval_ceiling"]
    assert evaluate(gold * 0, replies, cfg)["eval_accuracy"] == 0.5


def test_accuracy_by_kind_of_pair():
    """Tags of the two replies in either order are one kind; records without tags or scores count in the total alone."""
    user = [{"role": "user", "content": "q"}]
    records = [Record("f:1", user, ["1", "2", "3"], "t", ["b", "a", "b"], [3.0, 2.9, 2.9]),
               Record("f:2", user, ["4", "5"])]
    replies = Replies(records, TOKENIZER, 96)
    found = evaluate(torch.tensor([0.0, 1.0, -1.0, 5.0, 6.0]), replies, Config())
    assert found["eval_accuracy"] == pytest.approx(2 / 4)  # 1<2 wrong, 1>3 right, 2>3 right, 4<5 wrong
    assert found["eval_accuracy/a|b"] == pytest.approx(1 / 2) and found["eval_accuracy/b|b"] == 1
    assert found["eval_accuracy/t"] == pytest.approx(2 / 3)
    assert [found[f"eval_pairs{kind}"] for kind in ("", "/a|b", "/b|b", "/t")] == [4, 2, 1, 3]
    assert found["eval_agreement"] == 0.5 and found["eval_ceiling"] == pytest.approx((1 + 1 + 0.5) / 3)
    gapped = evaluate(torch.tensor([0.0, 1.0, -1.0, 5.0, 6.0]), replies, Config(score_gap=0.1))
    assert gapped["eval_agreement"] == 0.5
    assert "eval_agreement" not in evaluate(torch.zeros(5), replies, Config(score_gap=0.2))
    for margin, centre in ((0.0, 0.0), (0.3, 0.2)):
        rewards = torch.tensor([0.0, 1.0, -1.0, 5.0, 6.0])
        found = evaluate(rewards, replies, Config(margin=margin, centre=centre))
        assert found["eval_loss"] == pytest.approx(loss_by_loop(rewards.tolist(), [3, 2], margin, centre) / 2)


def test_calibration_of_known_bins():
    """Confident 0.88 and right 1 of 2: |0.5 - 0.88|; ties: confidence 0.5, right half the time: 0."""
    two = torch.tensor([2.0, -2.0])
    assert calibration_error(two) == pytest.approx(torch.sigmoid(two[0]).item() - 0.5, abs=1e-6)
    assert calibration_error(torch.zeros(7)) == 0
    assert calibration_error(torch.tensor([1e4])) == 0


def test_r11_no_prompt_on_both_sides():
    """R11: equal prompts stay together; with --val_data training loses what validation has."""
    def record(prompt, n):
        return Record(f"f:{n}", [{"role": "user", "content": prompt}], ["a", "b"])
    records = [record(p, n) for n, p in enumerate("abcdaebfag")]
    train, val = split_prompts(records, 0.3)
    assert {r.messages[0]["content"] for r in val} == {"f", "g"}  # 2 of 7 prompts
    assert sorted(r.where for r in train + val) == sorted(r.where for r in records)
    train, val = split_prompts(records, 0.3, [record("a", 0), record("z", 1)])
    assert {r.messages[0]["content"] for r in train} == set("bcdefg") and len(val) == 2
    with pytest.raises(UserError, match="--val_data"):
        split_prompts(records[:1], 0.3, records)


def test_random_negatives():
    """Best reply above any reply to another prompt: never one of its own, never one to the same prompt, n times."""
    def record(prompt, *responses):
        return Record("f:1", [{"role": "user", "content": prompt}], list(responses), "kind", ["good", "bad"], [1., 0.])
    records = [record("a", "A", "x"), record("a", "AA", "y"), record("b", "B", "A"), record("c", "C", "z")]
    found = random_negatives(records, 200, seed=1)
    pairs = {(r.messages[0]["content"], *r.responses) for r in found}
    assert pairs == {("a", "A", "B"), ("a", "A", "C"), ("a", "A", "z"), ("a", "AA", "B"), ("a", "AA", "A"),
                     ("a", "AA", "C"), ("a", "AA", "z"), ("b", "B", "x"), ("b", "B", "AA"), ("b", "B", "y"),
                     ("b", "B", "C"), ("b", "B", "z"), ("c", "C", "A"), ("c", "C", "x"), ("c", "C", "AA"),
                     ("c", "C", "y"), ("c", "C", "B")}
    assert all(r.tags == r.scores == [] and r.tag == "kind" for r in found)
    assert 400 < len(found) < 600 and found == random_negatives(records, 200, seed=1)
    assert found != random_negatives(records, 200, seed=2)
    assert random_negatives(records, 0, seed=1) == random_negatives(records[:2], 5, seed=1) == []


# ---- whole runs ---------------------------------------------------------------------------------------------------

FLAGS = ["--batch_size", "7", "--lr", "3e-3", "--warmup_steps", "3", "--eval_every", "0", "--save_every", "0",
         "--log_every", "1", "--device", "cpu", "--eps", "1e-4"]


@pytest.fixture(autouse=True, scope="module")
def quick():
    """The speed of this machine is not what is tested."""
    measured, train_rm.matmul_peak = train_rm.matmul_peak, lambda *_: 1e10
    yield
    train_rm.matmul_peak = measured


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(preferences, model to start from)"""
    folder = tmp_path_factory.mktemp("files")
    return write(folder / "ranked.jsonl", ranked()), save_chat_model(folder / "init")


def arguments(files, out, *more):
    return ["--data", files[0], "--init", files[1], "--out", str(out), *FLAGS, *more]


def train(files, out, *more):
    assert train_rm.main(arguments(files, out, *more)) == 0
    return curve(out)


@pytest.fixture(scope="module")
def reference(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    return out, train(files, out, "--steps", "6", "--save_every", "3")


def test_r4_starts_at_ln_2_and_moves(reference):
    """R4: a new head is 0: loss ln 2, accuracy 0.5, all rewards 0, gradient not 0; then it learns; TRL's names, and
    the rates and epochs of 7 of 10 prompts a step."""
    first = metrics(reference[0])[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["accuracy"] == 0.5
    assert first["min_reward"] == first["max_reward"] == first["margin"] == 0 and first["grad_norm"] > 1e-3
    assert reference[1][-1][1] < 0.67
    steps = [event for event in metrics(reference[0]) if "loss" in event]
    assert [event["learning_rate"] for event in steps] == pytest.approx([1e-3, 2e-3, 3e-3, 2e-3, 1e-3, 0])
    assert [event["epoch"] for event in steps] == pytest.approx([0.7 * event["step"] for event in steps])
    assert {"eval_loss", "eval_accuracy", "eval_margin", "eval_accuracy/bad|fine", "eval_ceiling/even"} <= {
        name for event in metrics(reference[0]) for name in event}


def test_r8_the_saved_model_has_mean_0_over_references(files, reference, tmp_path):
    """R8: reloaded from the disk, the best replies of the training prompts have mean 0 (1e-6), with --unit_scale all
    replies deviation 1, and rewards differ from those of the first model by shift and scale alone."""
    out = tmp_path / "scaled"
    shutil.copytree(reference[0], out)
    train(files, out, "--steps", "6", "--resume", "--unit_scale", "--reference", "all")
    records, _ = split_prompts(read_preferences(files[0]), 0.1)
    found = []
    for folder in (reference[0], out):
        model, tokenizer, config = load_model(str(folder))
        replies = Replies(records, tokenizer, 96)
        found.append(all_rewards(model, replies, range(len(replies)), 0, ONE_RANK))
        assert config["head"] == "scalar" and config["reward_std"] == pytest.approx(found[-1].std().item(), rel=1e-4)
    assert abs(found[0][::4].mean()) < 1e-6 and abs(found[1].mean()) < 1e-6
    assert found[1].std() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(found[1], (found[0] - found[0].mean()) / found[0].std(), rtol=1e-4, atol=1e-5)


def test_zero_is_that_of_the_reference_prompts(files, reference, tmp_path):
    """--reference_prompts 3: the best replies of the first three training prompts have mean 0; those of all do not."""
    out = tmp_path / "few"
    shutil.copytree(reference[0], out)
    train(files, out, "--steps", "6", "--resume", "--reference_prompts", "3")
    model, _, config = load_model(str(out))
    replies = Replies(split_prompts(read_preferences(files[0]), 0.1)[0], TOKENIZER, 96)
    rewards = all_rewards(model, replies, range(10), 0, ONE_RANK)
    assert abs(rewards[:12:4].mean()) < 1e-6 < 1e-3 < abs(rewards[::4].mean())
    assert config["reward_std"] == pytest.approx(rewards[:12].std().item(), rel=1e-4)


def test_validation_data_of_its_own(files, reference, tmp_path):
    """--val_data with the prompts that --val_fraction would have set aside: the same log."""
    train(files, tmp_path, "--steps", "6", *split_by_hand(files[0], 10))
    same_metrics(reference[0], tmp_path, 1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_file_is_trained_alike(files, tmp_path, form):
    """The same pairs as prompt with chosen and rejected, Alpaca, HH transcripts or messages: the log of ranked ones."""
    trained_alike(lambda data, out: train((data, files[1]), out, "--steps", "3"), form, tmp_path)


def test_r10_eight_prompts_are_learned_by_heart(files, tmp_path):
    """R10: 8 prompts of 4 replies, accuracy 1.0 on all 48 pairs."""
    data = write(tmp_path / "eight.jsonl", ranked(TOPICS[:9]))
    train((data, files[1]), tmp_path / "out", "--steps", "40", "--batch_size", "8", "--val_fraction", "0.11",
          "--lr", "1e-2")
    assert last(tmp_path / "out", "accuracy") == 1.0 and last(tmp_path / "out", "margin") > 1


@pytest.mark.parametrize("more", [["--micro_batch_size", "2"], ["--micro_batch_size", "1", "--no-pack"],
                                  ["--zero", "2"], ["--zero", "3", "--activation_checkpointing"],
                                  ["--attention", "naive"]], ids=" ".join)
def test_how_it_is_computed_does_not_matter(files, reference, tmp_path, more):
    """Micro-batches, padding in place of packing, ZeRO, attention: the same numbers in the log (1e-4)."""
    train(files, tmp_path, "--steps", "6", *more)
    same_metrics(reference[0], tmp_path, 1e-4)


def test_negatives_teach_what_no_ranking_says(files, tmp_path):
    """Replies name their topic, and every prompt ranks its own alone: only --negatives tells that a good reply to
    another prompt is a bad one here. They count as prompts, and not among the references."""
    own = read_preferences(files[0])
    others = [dataclasses.replace(record, responses=[record.responses[0], other.responses[0]], tags=[], scores=[])
              for record in own for other in own if other is not record]
    mixed, accuracy = Replies(others, TOKENIZER, 96), {}
    for n in (0, 4):
        out = tmp_path / str(n)
        train(files, out, "--steps", "60", "--lr", "1e-2", "--negatives", str(n), "--reference", "all")
        model, _, config = load_model(str(out))
        rewards = all_rewards(model, mixed, range(len(mixed)), 0, ONE_RANK)
        accuracy[n] = pair_metrics(rewards, mixed.sizes(range(len(mixed))))["accuracy"]
        known = Replies(split_prompts(own, 0.1)[0], TOKENIZER, 96)
        assert abs(all_rewards(model, known, range(len(known)), 0, ONE_RANK).mean()) < 1e-5
        assert metrics(out)[0]["epoch"] == pytest.approx(7 / (10 if n == 0 else 50), rel=0.15)
    assert accuracy[4] > 0.75 > 0.6 > accuracy[0], accuracy


def test_negatives_are_no_references(files, tmp_path, capfd):
    """A ranked prompt that is dropped, since its replies are alike, does not make room for a negative: zero is the mean
    over the nine others' replies. The log tells how many groups are negatives."""
    lines = ranked()
    lines[3]["responses"] = ["the same"] * 4
    data = write(tmp_path / "ranked.jsonl", lines)
    train((data, files[1]), tmp_path / "out", "--steps", "3", "--negatives", "1", "--reference", "all",
          "--reference_prompts", "0")
    own = split_prompts(read_preferences(data), 0.1)[0]
    known = Replies(own, TOKENIZER, 96)
    rewards = all_rewards(load_model(str(tmp_path / "out"))[0], known, range(len(known)), 0, ONE_RANK)
    assert len(known) == 9 and abs(rewards.mean()) < 1e-6 and rewards.std() > 1e-3
    said = capfd.readouterr().out
    assert "9 prompts" in said and f"({len(random_negatives(own, 1, seed=1))} negatives)" in said


def test_two_processes_at_stage_3_give_the_same_curve(files, reference, tmp_path):
    """7 prompts a step on 2 ranks, one at a time, so that the second rank's last forward is padding: the same log and
    final model."""
    launch("train_rm.py", arguments(files, tmp_path, "--steps", "6", "--zero", "3", "--micro_batch_size", "1"))
    same_metrics(reference[0], tmp_path, 1e-4)
    a, b = (load_final(str(out))[1] for out in (reference[0], tmp_path))
    assert all((a[name] - b[name]).abs().max() < 1e-3 for name in a)


def test_resuming_is_bitwise_equal_to_not_stopping(files, reference, tmp_path, monkeypatch):
    """Died after the checkpoint of step 3: the rest of the run and its final model are bitwise those of an unbroken
    one; and to finish a finished run again changes nothing."""
    step = Zero.step

    def dying(self, *args, **kwargs):
        if self.updates == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Zero, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        train(files, tmp_path, "--steps", "6", "--save_every", "3")
    monkeypatch.undo()
    expected = load_final(str(reference[0]))[1]
    for _ in range(2):
        assert train(files, tmp_path, "--steps", "6", "--save_every", "3", "--resume") == reference[1]
        found = load_final(str(tmp_path))[1]
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("more", [["--dtype", "bfloat16"], ["--dtype", "float16"], ["--offload", "optim,acts"]],
                         ids=" ".join)
def test_low_precision_and_offload_train(files, reference, tmp_path, more):
    """About the same loss at the end."""
    assert train(files, tmp_path, "--steps", "6", *more)[-1][1] == pytest.approx(reference[1][-1][1], abs=0.02)


@pytest.mark.parametrize("more", [["--margin", "0.5"], ["--centre", "0.5"], ["--seed", "2"], ["--weight_decay", "0.5"],
                                  ["--clip", "0.001"], ["--min_lr", "1e-3"], ["--val_fraction", "0.5"],
                                  ["--betas", "0.5,0.9"], ["--eps", "1e-2"], ["--decay", "flat-then-linear"],
                                  ["--negatives", "1"], ["--lr", "1e-3"], ["--batch_size", "5"],
                                  ["--warmup_steps", "1"]], ids=" ".join)
def test_every_flag_does_something(files, reference, tmp_path, more):
    """The curve of a run with the flag is another one."""
    found = train(files, tmp_path, "--steps", "6", *more)
    assert any(abs(a - b) > 1e-5 for (_, a), (_, b) in zip(reference[1], found))


@pytest.mark.parametrize("epochs, steps", [("0.5", 1), ("1", 2), ("2", 3)])
def test_epochs_count_the_updates(files, tmp_path, epochs, steps):
    """With --steps 0: as many updates of 7 as it takes to see so much of 10 prompts."""
    assert [step for step, _ in train(files, tmp_path, "--epochs", epochs)] == [*range(1, steps + 1)]


BAD = {
    "no data": (["--data", ""], "--data"),
    "missing file": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "no model": (["--init", "nowhere"], "nowhere"),
    "rows longer than the model's": (["--seq_len", "1000"], "--seq_len"),
    "rows too short": (["--seq_len", "5"], "--seq_len 5"),
    "nothing to validate on": (["--val_fraction", "0"], "--val_fraction"),
    "no prompts": (["--batch_size", "0"], "--batch_size"),
    "no epochs": (["--epochs", "0"], "--steps"),
    "negative": (["--margin", "-1"], "--margin"),
    "unknown flag": (["--center", "1"], "did you mean --centre"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(files, tmp_path, case):
    """A UserError of one line that names what to change, and no checkpoint."""
    flags, named = BAD[case]
    with pytest.raises(UserError) as error:
        train_rm.main(arguments(files, tmp_path, "--steps", "2" if case != "no epochs" else "0", *flags))
    assert named in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("step-*")) and not (tmp_path / "final").exists()


def test_a_model_that_cannot_chat_is_refused(files, tmp_path):
    init = save_chat_model(tmp_path / "base", chat_template=None)
    with pytest.raises(UserError, match="train_sft.py"):
        train_rm.main(arguments((files[0], init), tmp_path / "out"))


LOSS, ALONE = test_r1_the_loss_is_the_double_loop, test_r6_neighbours_and_padding_change_nothing
BUGS = {  # where, what stands there, the bug, and who must notice it
    "prompts weigh by their pairs": (train_rm, "rm_loss", "[2 / (K * (K - 1))", "[1.0", LOSS, [2, 4, 3, 9], 0.0, 0.0),
    "mean for sum": (train_rm, "rm_loss", "(weights)).sum()", "(weights)).mean()", LOSS, [2, 4, 3, 9], 0.0, 0.0),
    "no margin": (train_rm, "rm_loss", "- worse - margin", "- worse", test_a_constant_margin_makes_it_too_sure),
    "the worse one above": (train_rm, "rm_loss", "better, worse =", "worse, better =",
                            test_r3_swapping_a_pair_costs_its_difference),
    "reward a token early": (train_rm, "read_rewards", "rows.ends[1]]", "rows.ends[1] - 1]", ALONE, True, 0),
    "neighbours are seen": (train_rm, "read_rewards", "=rows.segment_ids", "=None", ALONE, True, 0),
    "chosen and rejected change places": (records, "preference_of", '[record["chosen"], record["rejected"]]',
                                          '[record["rejected"], record["chosen"]]',
                                          test_every_form_of_a_file_is_trained_alike, "hh"),
    "dropout": (Block, "forward", "self.attn_norm(x)", "F.dropout(self.attn_norm(x), 0.1)", ALONE, True, 0),
    "scale without its bias": (train_rm, "normalise", '["head.bias"] /= std', '["head.bias"] /= 1',
                               test_r8_zero_and_scale_are_free),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_noticed(request, monkeypatch, bug):
    assert_noticed(request, monkeypatch, *BUGS[bug])


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--help"], train_rm.__doc__)
    shown = capsys.readouterr().out
    assert all(f"--{name} " in shown or f"--{name}," in shown for name in json.loads(json.dumps(vars(Config()))))
