"""DPO: its losses and their minimisers, its log-probabilities against one reply at a time, whole runs."""
import dataclasses
import gc
import itertools
import math
import shutil

import pytest
import torch
from ranks import as_torchrun, ranks
from small_chat import (
    FORMS,
    SHAPE,
    TOPICS,
    assert_noticed,
    bandit,
    calls_of,
    curve,
    last,
    metrics,
    random_model,
    ranked,
    same_metrics,
    save_chat_model,
    split_by_hand,
    trained_alike,
    write,
)

import train_dpo
from data import Replies, Windows, chat_samples, collate, encode_prompt
from lib import records
from lib.checkpoint import load_final
from lib.program import Log, UserError, parse
from lib.ranks import Ranks
from lib.records import Record, read_preferences, split_prompts
from lib.tokenizer import make_tokenizer
from model import GPT, Block, load_model
from train_dpo import Config, all_logps, dpo_loss, pair_metrics, precompute, read_logps
from zero import Zero

TOKENIZER = make_tokenizer("byte", [])
OTHER = make_tokenizer("char", "".join(map(chr, range(32, 32 + TOKENIZER.vocab_size - 6))))  # of as many ids


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


KINDS = [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2), ("ipo", 0.0)]


def four(n=5, **options):
    """chosen, rejected, and both under the reference."""
    return [torch.randn(n, dtype=torch.float64, **options) for _ in range(4)]


# ---- the losses ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("loss_type, e", KINDS)
def test_d1_loss_and_gradient_where_training_begins(loss_type, e, beta):
    """D1: policy = reference: ln 2 per pair (IPO: 1 / (4 beta^2)), and the gradient is not 0.
    D2: for sigmoid it is -(beta / 2) of the gradient of chosen - rejected."""
    chosen, rejected, *_ = four(requires_grad=True)
    loss = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta, loss_type, e)
    expected = 1 / (4 * beta**2) if loss_type == "ipo" else math.log(2)
    assert loss.item() == pytest.approx(5 * expected)
    loss.backward()
    slope = {"sigmoid": -beta / 2 * (1 - 2 * e), "robust": -beta / 2 / (1 - 2 * e), "ipo": -1 / beta}[loss_type]
    torch.testing.assert_close(chosen.grad, torch.full_like(chosen, slope))
    torch.testing.assert_close(rejected.grad, -chosen.grad)


@pytest.mark.parametrize("loss_type, e", KINDS)
def test_losses_are_their_formulas(loss_type, e):
    """Each written out with log and exp, pair by pair; the result is their sum."""
    values, beta = four(), 0.4
    total = 0.0
    for c, r, rc, rr in zip(*(v.tolist() for v in values)):
        h = (c - rc) - (r - rr)
        right, wrong = math.log(1 + math.exp(-beta * h)), math.log(1 + math.exp(beta * h))
        total += {"sigmoid": (1 - e) * right + e * wrong, "robust": ((1 - e) * right - e * wrong) / (1 - 2 * e),
                  "ipo": (h - 1 / (2 * beta)) ** 2}[loss_type]
    assert dpo_loss(*values, beta, loss_type, e).item() == pytest.approx(total, rel=1e-12)


def test_d3_swapping_chosen_and_rejected_turns_h():
    """D3: sigmoid: L(-h) - L(h) = beta h; the metrics' margin changes sign."""
    c, r, rc, rr = four()
    h = ((c - rc) - (r - rr)).sum().item()
    assert (dpo_loss(r, c, rr, rc, 0.3) - dpo_loss(c, r, rc, rr, 0.3)).item() == pytest.approx(0.3 * h)
    logps, ref = torch.stack([c, r], 1), torch.stack([rc, rr], 1)
    assert pair_metrics(logps, ref, 0.3)["rewards/margins"] == pytest.approx(0.3 * h / 5)
    assert pair_metrics(logps.flip(1), ref.flip(1), 0.3)["rewards/margins"] == pytest.approx(-0.3 * h / 5)


@pytest.mark.parametrize("loss_type, e", KINDS)
def test_d4_a_constant_per_prompt_cancels(loss_type, e):
    """D4: c(x) added to all four changes nothing: a shared prefix may be counted or not."""
    values, c = four(), torch.randn(5, dtype=torch.float64)
    a, b = (dpo_loss(*v, 0.3, loss_type, e).item() for v in (values, [x + c for x in values]))
    assert a == pytest.approx(b, rel=1e-10)


@pytest.mark.parametrize("h", [1e5, -1e5])
def test_huge_differences_stay_finite(h):
    chosen = torch.tensor([h], requires_grad=True)
    loss = dpo_loss(chosen, torch.zeros(1), torch.zeros(1), torch.zeros(1), 0.1)
    loss.backward()
    assert loss.item() == max(0.0, -0.1 * h) and chosen.grad.isfinite().all()


def least(loss, low=-30.0, high=30.0):
    """Where a convex function of h is least, by ternary search."""
    for _ in range(120):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return (low + high) / 2


def at(h, *options):
    zero = torch.zeros(1, dtype=torch.float64)
    return dpo_loss(zero + h, zero, zero, zero, *options).item()


@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_d11_minimisers(beta):
    """D11: conservative: beta h = log (1-e)/e. IPO, when a share p of the labels says so: h = (2p - 1) / (2 beta).
    Sigmoid then: beta h = log p/(1-p); robust with the true share of flips is that of clean labels, its loss too."""
    e, p = 0.1, 0.8
    assert beta * least(lambda h: at(h, beta, "sigmoid", e)) == pytest.approx(math.log((1 - e) / e), abs=1e-4)
    assert least(lambda h: p * at(h, beta, "ipo") + (1 - p) * at(-h, beta, "ipo")) == \
        pytest.approx((2 * p - 1) / (2 * beta), abs=1e-4)
    assert beta * least(lambda h: p * at(h, beta) + (1 - p) * at(-h, beta)) == \
        pytest.approx(math.log(p / (1 - p)), abs=1e-4)
    for h in (-2.0, 0.3, 4.0):
        mixed = (1 - e) * at(h, beta, "robust", e) + e * at(-h, beta, "robust", e)
        assert mixed == pytest.approx(at(h, beta), rel=1e-12)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_d14_the_bandit_reaches_the_gibbs_policy(beta):
    """D14 (P19): replies of one token, policy a table, every pair labelled by Bradley-Terry from r: the minimiser of
    the population's loss is ref exp(r / beta) / Z."""
    (ref, r, best), V = bandit(beta), 8
    logits = ref.clone().requires_grad_()
    i, j = torch.tensor(list(itertools.permutations(range(V), 2))).T
    p = torch.sigmoid(r[i] - r[j])  # of i being chosen over j
    optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        pi = logits.log_softmax(0)
        loss = sum(p[n] * dpo_loss(pi[i[n:n + 1]], pi[j[n:n + 1]], ref[i[n:n + 1]], ref[j[n:n + 1]], beta)
                   for n in range(len(p)))
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(logits.detach().softmax(0), best.exp(), rtol=0, atol=1e-6)
    assert (best.exp() - ref.exp()).abs().max() > 0.01


# ---- log-probabilities --------------------------------------------------------------------------------------------

ONE_RANK = Ranks(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))


def records_of(lines):
    return [Record("x:1", [{"role": "user", "content": line["prompt"]}] if isinstance(line["prompt"], str) else
                   line["prompt"], line["responses"]) for line in lines]


def plain_logps(model, record, text):
    """log p of every token of one reply and its end, by log_softmax over the whole row's logits: (n,)."""
    prompt, reply = encode_prompt(TOKENIZER, record.messages), TOKENIZER.encode(text) + [TOKENIZER.end_id]
    logp = model(torch.tensor([prompt + reply]))[0].log_softmax(-1)  # (T, V)
    return torch.stack([logp[len(prompt) - 1 + n, token] for n, token in enumerate(reply)])


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("packed, size", [(True, 0), (True, 2), (False, 0), (False, 1)])
def test_d6_neighbours_and_padding_change_nothing(packed, size, average):
    """D6, D9, D10: in a batch, packed, padded or alone, chosen and rejected in one forward: the sum (or mean) over the
    reply and its one end, as one reply alone has it (1e-4 of about 50)."""
    model, records = random_model(), records_of(ranked())
    pairs = Replies(records, TOKENIZER, SHAPE["max_seq_len"], pairs="best-worst", packed=packed)
    chosen = [5, 0, 3, 10, 2]
    found = all_logps(model, pairs, chosen, size, average, ONE_RANK)
    each = [[plain_logps(model, records[g], text) for text in (records[g].responses[0], records[g].responses[-1])]
            for g in chosen]
    expected = torch.tensor([[(x.mean() if average else x.sum()).item() for x in pair] for pair in each])
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-4)


def test_sums_of_segments_are_exact_in_a_gradient():
    """The gradient of read_logps through packed rows is that of each reply alone."""
    model = random_model().double()
    pairs = Replies(records_of(ranked(TOPICS[:3])), TOKENIZER, 96)
    rows = next(pairs.batches([0, 1, 2]))
    weights = torch.randn(12, dtype=torch.float64)
    (read_logps(model, rows) * weights).sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    n = itertools.count()
    sum(plain_logps(model, record, text).sum() * weights[next(n)] for record in pairs.records
        for text in record.responses).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(packed[name], p.grad, rtol=1e-6, atol=1e-6)


def test_d8_golden_targets():
    """D8: of the multi-turn prompt nothing is trained, of the reply everything, and one end."""
    pairs = Replies(records_of(ranked(TOPICS[:1])), TOKENIZER, SHAPE["max_seq_len"], pairs="best-worst", packed=False)
    rows = next(pairs.batches([0]))
    trained = [[TOKENIZER.decode([t]) for t in row.tolist() if t >= 0] for row in rows.targets]
    assert ["".join(row) for row in trained] == ["A good apple<|end|>", "A bad apple<|end|>"]
    first = (rows.targets[0] >= 0).nonzero()[0].item()
    assert rows.ids[0, first] == TOKENIZER.assistant_id and rows.ids[0, first + 1] == rows.targets[0, first]
    model, moved = random_model(), rows.targets.clone()
    moved[0, first] = -100
    assert (read_logps(model, rows) - read_logps(model, rows._replace(targets=moved)))[0].abs() > 0.1


def test_d7_training_the_earlier_turns_too_cancels():
    """D7: with a mask over all assistant turns, the shared ones cancel in h."""
    record = records_of(ranked(TOPICS[:1]))[0]
    pairs = Replies([record], TOKENIZER, SHAPE["max_seq_len"], pairs="best-worst", packed=False)
    policy, ref = random_model(seed=1), random_model(seed=2)
    rows = next(pairs.batches([0]))
    samples = [chat_samples(TOKENIZER, [*record.messages, {"role": "assistant", "content": text}], "all")[0]
               for text in (record.responses[0], record.responses[-1])]
    _, targets, _ = collate([ids for ids, _ in samples], [mask for _, mask in samples])
    both = rows._replace(targets=targets)
    (a, b), (c, d) = ([read_logps(model, r) for model in (policy, ref)] for r in (rows, both))
    assert (a - c).abs().min() > 1
    assert ((a - b)[0] - (a - b)[1]).item() == pytest.approx(((c - d)[0] - (c - d)[1]).item(), abs=1e-4)


def test_d10_averages_differ_from_sums_where_lengths_do():
    """D10: h of averages is h / n for equal lengths, and nothing of the kind for unequal ones."""
    user = [{"role": "user", "content": "q"}]
    records = [Record("f:1", user, ["abcd", "efgh"]), Record("f:2", user, ["abcd", "efghijkl"])]
    pairs = Replies(records, TOKENIZER, 96)
    sums, means = (all_logps(random_model(), pairs, [0, 1], 0, average, ONE_RANK) for average in (False, True))
    h, mean_h = (x[:, 0] - x[:, 1] for x in (sums, means))
    assert mean_h[0].item() == pytest.approx(h[0].item() / 5, rel=1e-4)
    assert abs(mean_h[1] - h[1] / 5) > 0.1 and means[1, 1].item() == pytest.approx(sums[1, 1].item() / 9, rel=1e-4)


def test_d5_precomputed_is_on_the_fly():
    """D5: what precompute keeps for a pair is what another batch order and padding gives (1e-5 of about 50), for every
    pair that a step reaches; and bitwise what the first epoch's own batches give."""
    model, lines = random_model(), records_of(ranked())
    pairs = Replies(lines, TOKENIZER, 96, pairs="best-worst", batch_size=4, seed=5)
    kept = precompute(model, pairs, 100, 3, False, ONE_RANK)
    loose = Replies(lines, TOKENIZER, 96, pairs="best-worst", packed=False)
    torch.testing.assert_close(kept, all_logps(model, loose, range(11), 1, False, ONE_RANK), rtol=1e-5, atol=1e-5)
    first = pairs.of_step(0)
    assert torch.equal(kept[first], all_logps(model, pairs, first, 3, False, ONE_RANK))
    few = precompute(model, pairs, 1, 3, False, ONE_RANK)
    assert torch.equal(few[first], kept[first]) and few.isnan().any(1).sum() == 7


# ---- whole runs ---------------------------------------------------------------------------------------------------

FLAGS = ["--batch_size", "7", "--lr", "3e-3", "--warmup_steps", "3", "--eval_every", "0", "--save_every", "0",
         "--log_every", "1", "--device", "cpu", "--eval_prompts", "0", "--beta", "0.1", "--eps", "1e-4"]


@pytest.fixture(autouse=True, scope="module")
def quick():
    """The speed of this machine is not what is tested."""
    measured, train_dpo.matmul_peak = train_dpo.matmul_peak, lambda *_: 1e10
    yield
    train_dpo.matmul_peak = measured


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(preferences, model to start from)"""
    folder = tmp_path_factory.mktemp("files")
    return write(folder / "ranked.jsonl", ranked()), save_chat_model(folder / "init")


def arguments(files, out, *more):
    return ["--data", files[0], "--init", files[1], "--out", str(out), *FLAGS, *more]


def train(files, out, *more):
    assert train_dpo.main(arguments(files, out, *more)) == 0
    return curve(out)


@pytest.fixture(scope="module")
def reference(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    return out, train(files, out, "--steps", "6", "--save_every", "3", "--eval_prompts", "1")


def test_d1_a_run_starts_at_ln_2_and_moves(reference):
    """D1: loss ln 2, margins and rewards exactly 0, accuracy 0.5, gradient not 0; then it learns; TRL's names."""
    first = metrics(reference[0])[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["rewards/accuracies"] == 0.5
    assert first["rewards/margins"] == first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert first["grad_norm"] > 0.1 and first["logps/chosen"] < -10
    steps = [event for event in metrics(reference[0]) if "loss" in event]
    assert [event["learning_rate"] for event in steps] == pytest.approx([1e-3, 2e-3, 3e-3, 2e-3, 1e-3, 0])
    assert [event["epoch"] for event in steps] == pytest.approx([0.7 * event["step"] for event in steps])
    assert reference[1][-1][1] < 0.6
    assert {"eval_loss", "eval_rewards/margins", "eval_logps/rejected"} <= {
        name for event in metrics(reference[0]) for name in event}


@pytest.mark.parametrize("loss, expected", [(["--loss_type", "ipo"], 25.0), (["--label_smoothing", "0.1"], math.log(2)),
                                            (["--loss_type", "robust", "--label_smoothing", "0.1"], math.log(2)),
                                            (["--average"], math.log(2))])
def test_d1_every_loss_starts_where_it_should(files, reference, tmp_path, loss, expected):
    """D1 in a run, and each is another curve than the plain one."""
    found = train(files, tmp_path, "--steps", "6", *loss)
    assert found[0][1] == pytest.approx(expected, rel=1e-5)
    assert abs(found[-1][1] - reference[1][-1][1]) > 1e-4 and metrics(tmp_path)[0]["grad_norm"] > 0


def test_d5_the_reference_stays_that_of_the_start(files, reference):
    """D5: at the end, rewards are beta (log pi of final/ - log pi of --init), both read anew from the disk."""
    _, val = split_prompts(read_preferences(files[0]), 0.1)
    logps = []
    for folder in (str(reference[0]), files[1]):
        model, tokenizer, _ = load_model(folder)
        pairs = Replies(val, tokenizer, 96, pairs="best-worst")
        logps.append(all_logps(model, pairs, range(len(pairs)), 0, False, ONE_RANK))
    for n, name in enumerate(("chosen", "rejected")):
        expected = 0.1 * (logps[0] - logps[1])[:, n].mean().item()
        assert last(reference[0], f"eval_rewards/{name}") == pytest.approx(expected, abs=1e-5) and abs(expected) > 0.02


def test_another_reference(files, reference, tmp_path):
    """--ref: then the margin does not start at 0."""
    ref = save_chat_model(tmp_path / "ref", seed=9)
    train(files, tmp_path / "out", "--steps", "1", "--ref", ref)
    assert abs(metrics(tmp_path / "out")[0]["rewards/margins"]) > 1e-3


@pytest.mark.parametrize("more", [["--no-precompute_ref"], ["--micro_batch_size", "2"],
                                  ["--micro_batch_size", "1", "--no-pack"], ["--zero", "2"],
                                  ["--zero", "3", "--no-precompute_ref", "--activation_checkpointing"]], ids=" ".join)
def test_d12_how_it_is_computed_does_not_matter(files, reference, tmp_path, more):
    """D5, D12: reference on the fly, micro-batches, padding in place of packing, ZeRO: the same numbers in
    the log (1e-4)."""
    train(files, tmp_path, "--steps", "6", *more)
    same_metrics(reference[0], tmp_path, 1e-4)


def test_d13_eight_pairs_are_learned_by_heart(files, tmp_path):
    """D13: accuracy 1, and the margin grows."""
    data = write(tmp_path / "eight.jsonl", ranked(TOPICS[:9], K=2))
    train((data, files[1]), tmp_path / "out", "--steps", "25", "--batch_size", "8", "--val_fraction", "0.11")
    margins = [event["rewards/margins"] for event in metrics(tmp_path / "out") if "rewards/margins" in event]
    assert last(tmp_path / "out", "rewards/accuracies") == 1.0 and margins[-1] > margins[4] > margins[0] == 0


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_file_is_trained_alike(files, tmp_path, form):
    """The same pairs as prompt with chosen and rejected, Alpaca, HH transcripts or messages: the log of ranked ones."""
    trained_alike(lambda data, out: train((data, files[1]), out, "--steps", "3"), form, tmp_path)


def test_all_pairs_are_more_pairs(files, tmp_path):
    """--pairs all: an epoch of C(4, 2) pairs per prompt, 10 prompts: 60 pairs, 9 steps of 7."""
    assert len(train(files, tmp_path, "--pairs", "all")) == 9


def run_rank(files, out, more):
    """One rank of a pool of processes that already joined."""
    with as_torchrun() as patch:
        patch.setattr(train_dpo, "matmul_peak", lambda *_: 1e10)
        return train(files, out, *more)


def test_two_processes_at_stage_3_give_the_same_curve(files, reference, tmp_path):
    """7 pairs a step on 2 ranks, two at a time, so that the second rank's last forward is half of it: the same log and
    final model."""
    more = ["--steps", "6", "--zero", "3", "--micro_batch_size", "2"]
    ranks().run(2, run_rank, files, tmp_path, more, timeout=180)
    same_metrics(reference[0], tmp_path, 1e-4)
    a, b = (load_final(str(out))[1] for out in (reference[0], tmp_path))
    assert all((a[name] - b[name]).abs().max() < 1e-3 for name in a)


def test_validation_data_of_its_own(files, reference, tmp_path):
    """--val_data with the prompts that --val_fraction would have set aside: the same log."""
    train(files, tmp_path, "--steps", "6", *split_by_hand(files[0], 10))
    same_metrics(reference[0], tmp_path, 1e-9)


def test_resuming_is_bitwise_equal_to_not_stopping(files, reference, tmp_path, monkeypatch):
    """Died after the checkpoint of step 3: the rest of the run and its final model are bitwise those of an unbroken
    one; the reference is that of the start, not of the checkpoint."""
    step = Zero.step

    def dying(self, *args, **kwargs):
        if self.updates == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Zero, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        train(files, tmp_path, "--steps", "6", "--save_every", "3")
    monkeypatch.undo()
    assert train(files, tmp_path, "--steps", "6", "--save_every", "3", "--resume") == reference[1]
    expected, found = (load_final(str(out))[1] for out in (reference[0], tmp_path))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_reference_that_was_trained_again_is_noticed(files, tmp_path, capfd):
    """Under the same path stands another model: a resumed run says so. The same one elsewhere is no matter."""
    ref, copy = save_chat_model(tmp_path / "ref", seed=3), tmp_path / "copy"
    shutil.copytree(ref, copy)
    train(files, tmp_path / "out", "--steps", "1", "--ref", ref)
    train(files, tmp_path / "out", "--steps", "2", "--ref", str(copy), "--resume")
    assert "ref was" not in capfd.readouterr().err
    save_chat_model(ref, seed=4)
    train(files, tmp_path / "out", "--steps", "3", "--ref", ref, "--resume")
    assert "ref was" in capfd.readouterr().err


@pytest.mark.parametrize("more", [["--dtype", "bfloat16"], ["--dtype", "float16"], ["--offload", "optim,acts"]],
                         ids=" ".join)
def test_low_precision_and_offload_train(files, reference, tmp_path, more):
    """About the same loss at the end."""
    assert train(files, tmp_path, "--steps", "6", *more)[-1][1] == pytest.approx(reference[1][-1][1], abs=0.05)


@pytest.mark.parametrize("more, models", [([], 1), (["--no-precompute_ref"], 2)])
def test_the_reference_is_freed_once_it_is_read(files, tmp_path, monkeypatch, more, models):
    """While training, the policy alone is in memory, unless the reference is read on the fly."""
    step, alive = Zero.step, []

    def counting(self, *args, **kwargs):
        alive.append(sum(type(thing) is GPT for thing in gc.get_objects()))
        return step(self, *args, **kwargs)

    gc.collect()
    before = sum(type(thing) is GPT for thing in gc.get_objects())
    monkeypatch.setattr(Zero, "step", counting)
    train(files, tmp_path, "--steps", "1", *more)
    assert alive == [before + models]


def test_no_whole_model_is_moved(files, tmp_path, monkeypatch):
    """Zero lays out policy and reference itself: a model that is moved to the device before is there whole on each
    rank, though its shards may be all that fit."""
    moved, original = [], GPT.to

    def moving(self, *args):
        moved.append(sum(p.numel() for p in self.parameters()))
        return original(self, *args)

    monkeypatch.setattr(GPT, "to", moving)
    train(files, tmp_path, "--steps", "1")
    assert moved == [0, 0]


@pytest.mark.parametrize("more", [["--beta", "0.5"], ["--seed", "2"], ["--weight_decay", "0.5"], ["--clip", "0.001"],
                                  ["--val_fraction", "0.5"], ["--betas", "0.5,0.9"], ["--eps", "1e-2"],
                                  ["--min_lr", "1e-3"], ["--decay", "flat-then-linear"], ["--lr", "1e-3"],
                                  ["--batch_size", "5"], ["--warmup_steps", "1"]],
                         ids=" ".join)
def test_every_flag_does_something(files, reference, tmp_path, more):
    """The curve of a run with the flag is another one."""
    found = train(files, tmp_path, "--steps", "6", *more)
    assert any(abs(a - b) > 1e-5 for (_, a), (_, b) in zip(reference[1], found))


@pytest.mark.parametrize("epochs, steps", [("0.5", 1), ("1", 2), ("2", 3)])
def test_epochs_count_the_updates(files, tmp_path, epochs, steps):
    """With --steps 0: as many updates of 7 as it takes to see so much of 10 prompts."""
    assert [step for step, _ in train(files, tmp_path, "--epochs", epochs)] == [*range(1, steps + 1)]


def test_text_is_rehearsed(files, reference, tmp_path, monkeypatch):
    """--ptx adds its own gradient with its weight, from the next windows at each step: another curve than without it,
    the same however the step is split; the speed counts what is read of both."""
    monkeypatch.chdir(tmp_path)  # where its token files go
    (tmp_path / "text.txt").write_text("abc def gab " * 200)
    flags = ["--steps", "6", "--ptx", "1", "--ptx_data", "text.txt", "--ptx_rows", "3"]
    windows, backward, counted = (calls_of(monkeypatch, owner, name) for owner, name in (
        (Windows, "batch"), (Zero, "backward"), (Log, "count")))
    train(files, tmp_path / "c", *flags, "--ptx", "0.5")
    assert [step for _, step, *_ in windows] == list(range(6))
    events = [event for event in metrics(tmp_path / "c") if "loss" in event]
    assert [loss.item() for _, loss in backward] == pytest.approx(
        [x for event in events for x in (event["loss"], 0.5 * event["loss/ptx_avg"])])
    pairs = Replies(split_prompts(read_preferences(files[0]), 0.1)[0], TOKENIZER, 96, pairs="best-worst", batch_size=7,
                    seed=1)
    read = [sum(len(ids) for g in pairs.of_step(step) for ids, _ in pairs.groups[g]) for step in range(6)]
    assert [tokens for _, tokens in counted] == [tokens + 3 * 96 for tokens in read]
    assert all(event["tokens_per_second"] > 0 for event in events)
    whole, parts = (train(files, tmp_path / name, *flags, *more) for name, more in
                    (("a", []), ("b", ["--micro_batch_size", "1"])))
    assert any(abs(a - b) > 1e-5 for (_, a), (_, b) in zip(reference[1], whole))
    assert [b for _, b in parts] == pytest.approx([a for _, a in whole], rel=1e-4)


BAD = {
    "text without a file": (["--ptx", "1"], "--ptx_data"),
    "text for nothing": (["--ptx_data", "text.txt"], "--ptx 0.0"),
    "no data": (["--data", ""], "--data"),
    "missing file": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "no model": (["--init", "nowhere"], "nowhere"),
    "no reference": (["--ref", "nowhere"], "nowhere"),
    "no leash": (["--beta", "0"], "--beta"),
    "half the labels flipped": (["--label_smoothing", "0.5"], "--label_smoothing"),
    "ipo has no smoothing": (["--loss_type", "ipo", "--label_smoothing", "0.1"], "--label_smoothing"),
    "unknown loss": (["--loss_type", "hinge"], "--loss_type"),
    "rows longer than the model's": (["--seq_len", "1000"], "--seq_len"),
    "nothing to validate on": (["--val_fraction", "0"], "--val_fraction"),
    "no pairs": (["--batch_size", "0"], "--batch_size"),
    "unknown flag": (["--bta", "1"], "did you mean --beta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(files, tmp_path, case):
    """A UserError of one line that names what to change, and no checkpoint."""
    flags, named = BAD[case]
    with pytest.raises(UserError) as error:
        train_dpo.main(arguments(files, tmp_path, "--steps", "2", *flags))
    assert named in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("step-*")) and not (tmp_path / "final").exists()


@pytest.mark.parametrize("flag", ["init", "ref"])
@pytest.mark.parametrize("changes, words", [({"chat_template": None}, "train_sft.py"), ({"head": "scalar"}, "scalar"),
                                            ({"tokenizer": OTHER}, "tokenizer")], ids=["base", "reward", "tokenizer"])
def test_models_that_cannot_chat_are_refused(files, tmp_path, flag, changes, words):
    """A pretrained model knows no turns, a reward model says nothing, ids of another tokenizer mean something else."""
    folder = save_chat_model(tmp_path / "other", **changes)
    more = ["--ref", files[1]] if flag == "init" else []
    with pytest.raises(UserError, match=words) as error:
        train_dpo.main(arguments(files, tmp_path / "out", *more, f"--{flag}", folder))
    assert (f"--{flag} {folder}" in str(error.value)) and "\n" not in str(error.value)


FORMULA, ALONE = test_losses_are_their_formulas, test_d6_neighbours_and_padding_change_nothing
BUGS = {  # where, what stands there, the bug, and who must notice it
    "mean for sum": (train_dpo, "dpo_loss", "losses.sum()", "losses.mean()", FORMULA, "sigmoid", 0.0),
    "the rejected one above": (train_dpo, "dpo_loss", "(chosen_logp - rejected_logp)", "(rejected_logp - chosen_logp)",
                               FORMULA, "sigmoid", 0.0),
    "no reference": (train_dpo, "dpo_loss", " - (ref_chosen_logp - ref_rejected_logp)", "",
                     test_d14_the_bandit_reaches_the_gibbs_policy, 0.5),
    "shift by one": (train_dpo, "read_logps", "rows.targets, seg", "rows.targets.roll(1, 1), seg", ALONE, True, 0,
                     False),
    "neighbours are seen": (train_dpo, "read_logps", "targets, segment_ids=rows.segment_ids", "targets", ALONE, True, 0,
                            False),
    "average for sum": (train_dpo, "read_logps", "if average", "if True", ALONE, True, 0, False),
    "reference is the policy": (train_dpo, "main", "read_logps(ref, rows", "read_logps(model, rows",
                                test_d12_how_it_is_computed_does_not_matter, ["--no-precompute_ref"]),
    "chosen and rejected change places": (records, "preference_of", '[record["chosen"], record["rejected"]]',
                                          '[record["rejected"], record["chosen"]]',
                                          test_every_form_of_a_file_is_trained_alike, "hh"),
    "dropout": (Block, "forward", "self.attn_norm(x)", "F.dropout(self.attn_norm(x), 0.1)", ALONE, True, 0, False),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_noticed(request, monkeypatch, bug):
    assert_noticed(request, monkeypatch, *BUGS[bug])


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--help"], train_dpo.__doc__)
    shown = capsys.readouterr().out
    assert all(f"--{field.name} " in shown or f"--{field.name}," in shown for field in dataclasses.fields(Config))
