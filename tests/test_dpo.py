"""DPO: its losses and their minimisers, log-probabilities against one reply at a time, its reference."""
import gc
import itertools
import math

import pytest
import torch
from small_chat import assert_noticed, bandit, last, random_model, ranked, save_chat_model
from test_alignment import TOKENIZER, make_files, records_of, train
from test_rollouts import ONE

import train_dpo
from data import Replies, encode_prompt
from model import GPT, load_model
from train_dpo import all_logps, dpo_loss, reference_logps
from zero import Zero


@pytest.mark.parametrize("scale", [1, 1e5])
@pytest.mark.parametrize("loss_type, e", [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2), ("ipo", 0.0)])
def test_losses_are_their_formulas(loss_type, e, scale):
    """Each written out pair by pair; the result is their sum. A constant per prompt, added to all four
    log-probabilities, cancels. Where exp overflows, loss and gradient stay finite."""
    generator, beta, total = torch.Generator().manual_seed(1), 0.4, 0.0
    values = scale * torch.randn(4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    for c, r, rc, rr in values.T.tolist():
        h = (c - rc) - (r - rr)
        right, wrong = (math.log1p(math.exp(-abs(beta * h))) + max(0, sign * beta * h) for sign in (-1, 1))
        total += {"sigmoid": (1 - e) * right + e * wrong, "ipo": (h - 1 / (2 * beta)) ** 2,
                  "robust": ((1 - e) * right - e * wrong) / (1 - 2 * e)}[loss_type]
    assert dpo_loss(*values, beta, loss_type, e).item() == pytest.approx(total, rel=1e-10)
    loss = dpo_loss(*(values + torch.arange(5)), beta, loss_type, e)
    assert loss.item() == pytest.approx(total, rel=1e-8)
    assert torch.autograd.grad(loss, values)[0].isfinite().all()


@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_minimisers(beta):
    """Where the slope is 0. Conservative: beta h = log (1-e)/e. IPO, when a share p of the labels says so:
    h = (2p - 1) / (2 beta). Sigmoid then: beta h = log p/(1-p). Robust: where clean labels have it."""
    e, p, zero = 0.1, 0.8, torch.zeros(1, dtype=torch.float64)

    def loss(h, right, *options):
        return sum(share * dpo_loss(zero + sign * h, zero, zero, zero, beta, *options)
                   for share, sign in ((right, 1), (1 - right, -1)))

    for value, h in ((lambda h: loss(h, 1, "sigmoid", e), math.log((1 - e) / e) / beta),
                     (lambda h: loss(h, p, "ipo"), (2 * p - 1) / (2 * beta)),
                     (lambda h: loss(h, p), math.log(p / (1 - p)) / beta),
                     (lambda h: loss(h, 1 - e, "robust", e) - loss(h, 1), 0.7)):
        h = torch.tensor(h, dtype=torch.float64, requires_grad=True)
        assert abs(torch.autograd.grad(value(h), h)[0]) < 1e-9


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_bandit_reaches_the_gibbs_policy(beta):
    """Replies of one token, a table as policy, every pair labelled by Bradley-Terry from r: the population's
    loss is least at ref exp(r / beta) / Z."""
    ref, r, best = bandit(beta)
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        pi = logits.log_softmax(0)
        loss = sum((r[i] - r[j]).sigmoid() * dpo_loss(pi[i], pi[j], ref[i], ref[j], beta)
                   for i, j in itertools.permutations(range(len(r)), 2))
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(logits.detach().softmax(0), best.exp(), rtol=0, atol=1e-6)


def plain_logps(model, record) -> list[float]:
    """log pi of the best and the worst reply and their ends, by log_softmax over whole rows of logits."""
    sums, prompt = [], encode_prompt(TOKENIZER, record.messages)
    for text in (record.responses[0], record.responses[-1]):
        reply = TOKENIZER.encode(text) + [TOKENIZER.end_id]
        logp = model(torch.tensor([prompt + reply]))[0].log_softmax(-1)  # (T, V)
        sums.append(sum(logp[len(prompt) - 1 + n, token].item() for n, token in enumerate(reply)))
    return sums


@pytest.mark.parametrize("size", [0, 1, 2])
def test_a_logp_is_that_of_the_reply_alone(size):
    """In one forward with others, packed: the sum over the reply and its one end, as one alone has it."""
    model, records, chosen = random_model(), records_of(ranked()), [5, 0, 3, 10, 2]
    pairs = Replies(records, TOKENIZER, 96, pairs="best-worst")
    expected = torch.tensor([plain_logps(model, records[g]) for g in chosen])
    found = all_logps(model, pairs, chosen, size, ONE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_reference_is_read_once():
    """What is kept of a pair is bitwise what the batch that reads it first gives, and up to rounding what any
    batch gives. A pair that no step reaches has NaN."""
    model = random_model()
    for seed in (1, 2, 3):  # whether a batch changes last bits is luck
        pairs = Replies(records_of(ranked()), TOKENIZER, 96, pairs="best-worst", batch_size=8, seed=seed)
        kept, few = (reference_logps(model, pairs, steps, 3, ONE) for steps in (100, 1))
        torch.testing.assert_close(kept, all_logps(model, pairs, range(11), 1, ONE), rtol=1e-5, atol=1e-5)
        first = pairs.of_step(0)
        assert torch.equal(kept[first], all_logps(model, pairs, first, 3, ONE))
        assert torch.equal(few[first], kept[first]) and few.isnan().any(1).sum() == 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def test_a_run_begins_at_the_reference_and_learns(files, tmp_path):
    """Loss ln 2 and margins of exactly 0 at step 1, though micro-batches read each pair anew; then the loss
    falls. At the end rewards are beta (log pi of final/ - log pi of --init), both read from the disk."""
    first, *_, event = train("train_dpo", files, tmp_path, "--micro_batch_size", "2", "--beta", "0.1")
    assert first["rewards/margins"] == first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert first["loss"] == pytest.approx(math.log(2)) and first["rewards/accuracies"] == 0.5
    assert last(tmp_path, "loss") < 0.65 and event["step"] == 4
    policy, start = (plain_logps(load_model(folder)[0], records_of(ranked())[10])  # which validates
                     for folder in (str(tmp_path), f"{files}/init"))
    for name, logp, ref_logp in zip(("chosen", "rejected"), policy, start):
        assert event[f"eval_logps/{name}"] == pytest.approx(logp, abs=1e-4)
        assert event[f"eval_rewards/{name}"] == pytest.approx(0.1 * (logp - ref_logp), abs=1e-5)


def test_another_reference(files, tmp_path, monkeypatch):
    """--ref: the margin does not start at 0. Once it is read, the policy alone is in memory."""
    def models():
        return sum(type(thing) is GPT for thing in gc.get_objects())

    gc.collect()
    before, step, alive = models(), Zero.step, []
    monkeypatch.setattr(Zero, "step", lambda *given: alive.append(models()) or step(*given))
    ref = save_chat_model(tmp_path / "ref", seed=9)
    first, *_ = train("train_dpo", files, tmp_path / "out", "--steps", "1", "--ref", ref)
    assert abs(first["rewards/margins"]) > 1e-3 and alive == [before + 1]


FORMULA, ALONE = test_losses_are_their_formulas, test_a_logp_is_that_of_the_reply_alone
BUGS = {  # what stands there, the bug, and who must notice it
    "mean for sum": ("dpo_loss", "losses.sum()", "losses.mean()", FORMULA, "sigmoid", 0.0, 1),
    "rejected one above": ("dpo_loss", "h = (chosen_logp", "h = -(chosen_logp", FORMULA, "sigmoid", 0.0, 1),
    "no reference": ("dpo_loss", " - (ref_chosen_logp - ref_rejected_logp)", "",
                     test_the_bandit_reaches_the_gibbs_policy, 0.5),
    "shift by one": ("read_logps", "rows.targets, seg", "rows.targets.roll(1, 1), seg", ALONE, 0),
    "neighbours are seen": ("read_logps", "targets, segment_ids=rows.segment_ids", "targets", ALONE, 0),
    "another pair's reference": ("main", "train_ref[batch]", "train_ref[sorted(batch)]",
                                 test_a_run_begins_at_the_reference_and_learns),
    "the last batch decides": ("reference_logps", "in reversed(range(", "in (range(",
                               test_the_reference_is_read_once),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_noticed(request, monkeypatch, bug):
    assert_noticed(request, monkeypatch, train_dpo, *BUGS[bug])
