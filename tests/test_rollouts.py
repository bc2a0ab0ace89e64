"""Rollouts: what is drawn and what four models say of it, against naive models that read one reply alone."""
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
                      # a process alone. numpy() refuses a number that holds on to the graph it came from.
                      sum=lambda *numbers: [float(torch.as_tensor(n).numpy()) for n in numbers])
WHOLE = SimpleNamespace(gathered=contextlib.nullcontext)  # in place of Zero: nothing is sharded


def lively(head="lm", seed=0, noise=0.3, **more) -> GPT:
    """A tiny model whose every weight matters."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "max_seq_len": 64, **more}
    model = GPT(GPTConfig(vocab_size=TOKENIZER.vocab_size, **shape), head=head)
    generator = torch.Generator().manual_seed(seed)
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
    return SimpleNamespace(**{"batch_size": 10, "minibatches": 2, "max_new_tokens": 8, "seq_len": 64,
                              "seed": 5, "temperature": 1.0, "micro_batch_size": 0} | more)


def naive_logp(model, prompt: list[int], reply: list[int], temperature: float) -> torch.Tensor:
    """log p of each token of one reply, the forbidden ones left out of softmax by hand: (n,)."""
    logits = model(torch.tensor([prompt + reply]))[0, len(prompt) - 1:-1] / temperature  # (n, V)
    logits[:, list(TOKENIZER.specials_but_end)] = -math.inf
    return logits.log_softmax(-1)[torch.arange(len(reply)), torch.tensor(reply)]


def rolled_out(cfg, **more):
    models = four_models(**more)
    rollout = draw(some_prompts(10), 1, models.actor, WHOLE, TOKENIZER, cfg, ONE)
    score(rollout, minibatches(cfg, 1, 0), models, cfg, ONE)
    return models, rollout


@pytest.mark.parametrize("temperature, more", [
    (0.7, {}), (1.0, {}), (1.0, {"tie_embeddings": True, "position": "learned"})])
def test_sampler_scorer_and_a_naive_model_agree(temperature, more):
    """Log-probabilities from the sampler's cache, from packed rows and from one reply at a time are equal to
    1e-5. Values stand before their token. Scores are read at the end, put there where it was not drawn."""
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


def test_replies_depend_on_seed_step_and_place():
    """The same prompt at many places gets many replies, other ones at another step or by another seed. The
    same call gives the same ones, and who stands beside a prompt changes nothing."""
    actor, prompts = four_models().actor, some_prompts(1) * 12
    first, again, later, other, mixed = (
        draw(some, step, actor, WHOLE, TOKENIZER, settings(seed=seed, temperature=1.5), ONE).replies
        for some, step, seed in (
            (prompts, 1, 5), (prompts, 1, 5), (prompts, 2, 5), (prompts, 1, 6), (some_prompts(12), 1, 5)))
    assert first == again and first[0] == mixed[0] and len({*map(tuple, first + later + other)}) > 30


def test_every_rank_has_as_many_rows_and_together_they_have_all():
    """Whatever the world: each reply is in one rank's rows, all ranks run the same number of forwards, and
    what stands at trained positions moves into the slots of its reply."""
    _, rollout = rolled_out(settings())
    for world in (1, 2, 3, 7):
        everyone = [SimpleNamespace(rank=rank, world=world, device="cpu") for rank in range(world)]
        parts = [list(micro_batches(rollout, [*range(10)], settings(micro_batch_size=1), one))
                 for one in everyone]
        assert len({len(part) for part in parts}) == 1
        batches = [batch for part in parts for batch in part]
        assert sorted(i for which, *_ in batches for i in which.tolist()) == [*range(10)]
        for which, ids, targets, _ in batches:
            slots = in_slots(ids.roll(-1, 1), targets, rollout.mask[which])
            assert [row[mask].tolist() for row, mask in zip(slots, rollout.mask[which])] == \
                [rollout.replies[i] for i in which]


def test_minibatches_are_a_partition():
    """Each reply is in one of them; the order is another one at each epoch and step."""
    first, again, epoch, step = (minibatches(settings(minibatches=3), *of) for of in (
        (1, 0), (1, 0), (1, 1), (2, 1)))
    assert sorted(sum(first, [])) == [*range(10)] and [len(part) for part in first] == [4, 3, 3]
    assert first == again and first != epoch != step


ALIKE = test_sampler_scorer_and_a_naive_model_agree
BUGS = {  # where, what stands there, the bug, and who must notice it
    "shift by one": (rollouts, "in_slots", "x[targets >= 0]", "x.roll(1, 1)[targets >= 0]", ALIKE, 1.0, {}),
    "score read a token early": (rollouts, "score", "[last]", "[last.roll(-1, 1)]", ALIKE, 1.0, {}),
    "reference is the actor": (rollouts, "score", "models.reference", "models.actor", ALIKE, 1.0, {}),
    "scored at another temperature": (rollouts, "score", "cfg.temperature", "1.0", ALIKE, 0.7, {}),
    "drawn at another temperature": (rollouts, "draw", "cfg.temperature", "1.0", ALIKE, 0.7, {}),
    "one seed for all": (rollouts, "draw", "(cfg.seed, SAMPLING, step, i)", "(cfg.seed, SAMPLING, step)",
                         test_replies_depend_on_seed_step_and_place),
    "dropout": (Block, "forward", "self.attn_norm(x)", "F.dropout(self.attn_norm(x), 0.1)", ALIKE, 1.0, {}),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_noticed(request, monkeypatch, bug):
    assert_noticed(request, monkeypatch, *BUGS[bug])
