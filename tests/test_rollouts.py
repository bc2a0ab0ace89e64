"""Rollouts: what is drawn and what the four models say of it, against naive models that read one reply at a time."""
import contextlib
import math
import random
from types import SimpleNamespace

import pytest
import torch
from small_chat import assert_noticed

import rollouts
from data import encode_prompt
from lib.tokenizer import make_tokenizer
from model import GPT, Block, GPTConfig
from rollouts import Models, draw, in_slots, micro_batches, minibatches, score

TOKENIZER = make_tokenizer("char", "abcdefg ")
ONE = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), all_reduce=lambda x: x,
                      sum=lambda *numbers: [float(n) for n in numbers])  # a process alone
WHOLE = SimpleNamespace(gathered=contextlib.nullcontext)  # in place of Zero: nothing is sharded


def lively(head="lm", seed=0, noise=0.3, **more) -> GPT:
    """A tiny model whose every weight matters."""
    config = GPTConfig(vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_embd=16, max_seq_len=64, **more)
    model, generator = GPT(config, head=head), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += noise * torch.randn(p.shape, generator=generator)
    return model


def four_models(**more) -> Models:
    models = Models(lively(**more), lively("scalar", 1), lively(seed=2, **more), lively("scalar", 3))
    for model in (models.actor, models.reference):
        model.head.forbid(TOKENIZER.specials_but_end)
    return models


def some_prompts(n: int) -> list[list[int]]:
    r = random.Random(0)
    texts = ["".join(r.choices("abcdefg ", k=r.randint(1, 20))) for _ in range(n)]
    return [encode_prompt(TOKENIZER, [{"role": "user", "content": text}]) for text in texts]


def settings(**more):
    return SimpleNamespace(**{"batch_size": 10, "minibatches": 2, "max_new_tokens": 8, "seq_len": 64, "seed": 5,
                              "temperature": 1.0, "micro_batch_size": 0} | more)


def naive_logp(model, prompt: list[int], reply: list[int], temperature: float) -> torch.Tensor:
    """log p of each token of one reply, the forbidden ones left out of softmax by hand: (n,)."""
    logits = model(torch.tensor([prompt + reply]))[0, len(prompt) - 1:-1] / temperature  # (n, V)
    logits[:, list(TOKENIZER.specials_but_end)] = -math.inf
    return logits.log_softmax(-1)[torch.arange(len(reply)), torch.tensor(reply)]


def rolled_out(cfg, **more):
    models = four_models(**more)
    rollout = draw(some_prompts(10), 1, models.actor, WHOLE, TOKENIZER, cfg, ONE)
    score(rollout, minibatches(10, cfg, 1, 0), models, cfg, ONE)
    return models, rollout


@pytest.mark.parametrize("temperature, more", [
    (0.7, {}), (1.0, {}), (1.0, {"tie_embeddings": True, "position": "learned"})])
def test_sampler_scorer_and_a_naive_model_agree(temperature, more):
    """Log-probabilities from the sampler's cache, from packed rows and from one reply at a time are equal to 1e-5.
    Values stand before their token. Scores are read at the end, which is put there where it was not drawn."""
    models, rollout = rolled_out(settings(temperature=temperature), **more)
    assert {True, False} == set(rollout.ended)
    assert (rollout.sampled_logp - rollout.logp).abs().max() < 1e-5
    for i, (prompt, reply) in enumerate(zip(rollout.prompts, rollout.replies)):
        n, both = len(reply), torch.tensor([prompt + reply])
        assert rollout.mask[i].tolist() == [True] * n + [False] * (rollout.mask.shape[1] - n)
        for logp, seed in ((rollout.logp, 0), (rollout.ref_logp, 2)):
            expected = naive_logp(lively(seed=seed, **more), prompt, reply, temperature)
            torch.testing.assert_close(logp[i, :n], expected, atol=1e-5, rtol=0)
            assert not logp[i, n:].any()
        values = models.critic(both)[0, len(prompt) - 1:-1]
        torch.testing.assert_close(rollout.values[i, :n], values, atol=1e-5, rtol=0)
        end = [] if rollout.ended[i] else [TOKENIZER.end_id]
        reward = models.reward(torch.tensor([prompt + reply + end]))[0, -1]
        torch.testing.assert_close(rollout.scores[i], reward, atol=1e-5, rtol=0)
        assert not set(reply) & set(TOKENIZER.specials_but_end)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_frequencies_and_kl_of_samples(temperature):
    """3000 first tokens, drawn at different places of a rollout: chi-square against softmax(logits / T) over the
    allowed ids; and the mean of log pi - log ref is the exact KL, within 3 standard errors."""
    models, prompt, n = four_models(), some_prompts(1)[0], 3000
    cfg = settings(max_new_tokens=1, temperature=temperature)
    rollout = draw([prompt] * n, 1, models.actor, WHOLE, TOKENIZER, cfg, ONE)
    p, q = ((model(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1).double()
            for model in (models.actor, models.reference))
    count = torch.bincount(torch.tensor([reply[0] for reply in rollout.replies]), minlength=len(p))
    allowed = p > 0
    assert allowed.sum() == TOKENIZER.vocab_size - 5 and count[~allowed].sum() == 0
    chi2 = ((count - n * p) ** 2 / (n * p))[allowed].sum()
    assert chi2 < 8 + 4 * math.sqrt(16)  # 8 degrees of freedom: four standard deviations above their mean
    score(rollout, [list(range(n))], models, cfg, ONE)
    kl, exact = rollout.log_ratio(), (p * (p / q).log())[allowed].sum()
    assert (kl.mean() - exact).abs() < 3 * kl.std() / math.sqrt(n) and exact > 0.05


def test_replies_depend_on_seed_step_and_place():
    """The same prompt at many places and steps gets many replies; the same call gives the same ones; who stands
    beside a prompt changes nothing."""
    models, prompts = four_models(), some_prompts(1) * 12

    def replies(prompts, step, **more):
        return draw(prompts, step, models.actor, WHOLE, TOKENIZER, settings(**more), ONE).replies

    first, again, later, other = (replies(prompts, 1), replies(prompts, 1), replies(prompts, 2),
                                  replies(prompts, 1, seed=6))
    assert first == again and len({tuple(reply) for reply in first + later + other}) > 30
    mixed = [prompts[0], *some_prompts(12)[1:]]
    assert replies(mixed, 1)[0] == first[0]


def test_every_rank_has_as_many_rows_and_together_they_have_all():
    """Whatever the world: each reply is in one rank's rows, all ranks run the same number of forwards, and what
    stands at trained positions moves into the slots of its reply."""
    _, rollout = rolled_out(settings())
    for world in (1, 2, 3, 7):
        parts = [list(micro_batches(rollout, [*range(10)], settings(micro_batch_size=1),
                                    SimpleNamespace(rank=rank, world=world, device="cpu"))) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        batches = [batch for part in parts for batch in part]
        assert sorted(i for which, *_ in batches for i in which.tolist()) == [*range(10)]
        for which, ids, targets, _ in batches:
            slots = in_slots(ids.roll(-1, 1), targets, rollout.mask[which])
            assert [row[mask].tolist() for row, mask in zip(slots, rollout.mask[which])] == \
                [rollout.replies[i] for i in which]


def test_minibatches_are_a_partition_that_epochs_shuffle():
    cfg = settings(minibatches=3)
    parts = minibatches(10, cfg, 1, 0)
    assert sorted(sum(parts, [])) == [*range(10)] and [len(part) for part in parts] == [3, 3, 4]
    assert parts == minibatches(10, cfg, 1, 0) and parts != minibatches(10, cfg, 1, 1) != minibatches(10, cfg, 2, 1)


ALIKE = test_sampler_scorer_and_a_naive_model_agree
BUGS = {  # where, what stands there, the bug, and who must notice it
    "shift by one": (rollouts, "in_slots", "x[targets >= 0]", "x.roll(1, 1)[targets >= 0]", ALIKE, 1.0, {}),
    "score read a token early": (rollouts, "score", "[last]", "[last.roll(-1, 1)]", ALIKE, 1.0, {}),
    "reference is the actor": (rollouts, "score", "models.reference", "models.actor", ALIKE, 1.0, {}),
    "scored at another temperature": (rollouts, "score", "cfg.temperature", "1.0", ALIKE, 0.7, {}),
    "drawn at another temperature": (rollouts, "draw", "cfg.temperature", "1.0", ALIKE, 0.7, {}),
    "one seed for all": (rollouts, "draw", "SAMPLING, B)", "SAMPLING, 1).repeat(B)",
                         test_frequencies_and_kl_of_samples, 1.0),
    "dropout": (Block, "forward", "self.attn_norm(x)", "F.dropout(self.attn_norm(x), 0.1)", ALIKE, 1.0, {}),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_noticed(request, monkeypatch, bug):
    assert_noticed(request, monkeypatch, *BUGS[bug])
