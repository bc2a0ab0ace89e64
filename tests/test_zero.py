"""ZeRO: every stage computes what one process computes, holds and sends what the formulas say, and fails loudly."""
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from model import GPT, GPTConfig
from ranks import ranks
from zero import Zero

STEPS, LR, DECAY = 2, 1e-2, 0.1


@pytest.fixture(autouse=True)
def one_thread():
    """Matrix products split over threads differ in the last bit; the ranks have one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lively_gpt(tied, dtype=torch.float32, layers=2, seed=0):
    """A GPT in which nothing is zero: at birth its blocks are the identity and their gradients hide every mistake."""
    model = GPT(GPTConfig(vocab_size=33, n_layer=layers, n_head=2, n_embd=16, max_seq_len=12, tie_embeddings=tied), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return model


def batches(world, k):
    """ids (steps, world, k, 2, 13) : what each rank sees in each micro-batch of each step."""
    return torch.randint(0, 33, (STEPS, world, k, 2, 13), generator=torch.Generator().manual_seed(world * 10 + k))


def loss_of(model, ids, count):
    return -model(ids[:, :-1], ids[:, 1:]).sum() / count


# ---- the oracle: one process, the plain model, gradients added in a known order -------------------------------------

def one_process(model, data, inner, clip=None):
    """Train the plain model on all ranks' micro-batches. inner "micro": sum over ranks of sums over micro-batches (the
    order of stage 1); inner "rank": the other way round (stages 2 and 3). Returns (state_dict, norms)."""
    named = dict(model.named_parameters())
    groups = [{"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": DECAY},
              {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer, norms = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, fused=True), []
    for step in data:
        world, k = step.shape[:2]
        grads = {}
        for r, m in itertools.product(range(world), range(k)):
            loss = loss_of(model, step[r, m], world * k * 24)
            grads[r, m] = torch.autograd.grad(loss, list(named.values()))
        for i, p in enumerate(named.values()):
            outer, inside = (range(world), range(k)) if inner == "micro" else (range(k), range(world))
            total = None
            for a in outer:
                part = None
                for b in inside:
                    g = grads[(a, b) if inner == "micro" else (b, a)][i]
                    part = g.clone() if part is None else part + g
                total = part if total is None else total + part
            p.grad = total
        norm = torch.stack([p.grad.double().square().sum() for p in named.values()]).sum().sqrt()
        norms.append(norm.item())
        if clip and norm > clip:
            for p in named.values():
                p.grad.mul_(clip / (norm.item() + 1e-6))
        optimizer.step()
    return {k: v.detach().clone() for k, v in model.state_dict().items()}, norms


def sharded(tied, stage, data, clip=None, **options):
    """The same on the ranks of this job. Returns (state_dict on rank 0, norms, peaks)."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = lively_gpt(tied)
    z = Zero(model, units=model.units(), stage=stage, lr=LR, weight_decay=DECAY, **options)
    norms = []
    for step in data:
        for ids in step[rank]:
            z.backward(loss_of(model, ids, step.shape[0] * step.shape[1] * 24))
        norms.append(z.step(LR, clip).norm)
    return z.full_state_dict(), norms, dict(z.memory.peak)


def many(cases):
    """Run several sharded() cases in one job."""
    return [sharded(*args, **options) for args, options in cases]


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("world", [2, 3])
def test_stages_are_bitwise_one_process(world):
    """Stages 1-3, k = 1..3 micro-batches, tied and untied, recomputation on and off: the weights after the steps are bit for
    bit those of one process that adds the same gradients in the same order."""
    cases = [((tied, stage, batches(world, k), 0.5), {"activation_checkpointing": ac})
             for tied in (True, False) for k in (1, 2, 3) for stage in (1, 2, 3) for ac in (False, True)]
    answers = ranks().run(world, many, cases)
    for (args, options), (state, norms, _) in zip(cases, answers[0]):
        tied, stage, data, clip = args
        expected, expected_norms = one_process(lively_gpt(tied), data, "micro" if stage == 1 else "rank", clip)
        label = (world, tied, stage, data.shape[2], options)
        assert norms == pytest.approx(expected_norms, rel=1e-12), label
        assert min(norms) > clip  # so that clipping is part of what is compared
        assert equal({k: state[k] for k in expected}, expected), label
    for other in answers[1:]:
        assert [norms for _, norms, _ in other] == [norms for _, norms, _ in answers[0]]
