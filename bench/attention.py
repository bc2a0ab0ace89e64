"""The tiled attention and the tiled loss beside PyTorch's own: time and memory.

    python -m bench.attention                  in bfloat16 where there is a GPU, else in float32
    python -m bench.attention --only length    one of: time, length, logp
"""
from functools import partial

import torch
import torch.nn.functional as F

from bench.measure import DEVICE, DTYPE, compare, head, in_fresh_process, interleave, peak_memory, run
from kernels import flash_attention, naive_attention, sdpa_attention, target_logp
from lib.program import start

PEERS = {"ours": flash_attention, "sdpa": sdpa_attention, "naive": naive_attention}


def attention_steps(B, H, T, D, *, G=None, Tq=None, dtype=DTYPE, grad=True, peers=PEERS, **options):
    """{peer: a function that runs one forward and, if grad, one backward}. All have the same inputs,
    q (B, H, Tq, D), k and v (B, G, T, D)."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, Tq or T, D), (B, G or H, T, D), (B, G or H, T, D), (B, H, Tq or T, D)
    *inputs, g = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]

    def step(attention):
        out = attention(*(x.requires_grad_(grad) for x in inputs), **options)
        return torch.autograd.grad(out, inputs, g) if grad else out
    return {name: partial(step, attention) for name, attention in peers.items()
            if name != "naive" or T <= 4096}  # the scores of a longer row fill the memory


def logp_steps(M, C, V):
    """{peer: a function that runs one forward + backward of a mean loss over M rows of width C, V logits}."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, C, generator=generator).to(DEVICE).requires_grad_()
    weight = (torch.randn(V, C, generator=generator) * 0.02).to(DEVICE).requires_grad_()
    targets = torch.randint(0, V, (M,), generator=generator).to(DEVICE)

    def untiled(hidden, weight, targets):
        return -F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")

    def step(logp):
        return torch.autograd.grad(-logp(hidden, weight, targets).mean(), (hidden, weight))
    equal = partial(target_logp, equal_weights=True)
    peers = {"ours": target_logp, "equal_weights": equal, "untiled": untiled}
    return {name: partial(step, logp) for name, logp in peers.items()}


def extra_memory(steps, peer: str, small: tuple, shape: tuple) -> float:
    """MB that steps(*shape)[peer] needs at its peak, inputs not counted."""
    steps(*small)[peer]()  # loads the libraries and makes their workspaces
    return peak_memory(steps(*shape)[peer])[1] / 1e6


def time_of_attention(cfg):
    head(f"time, {DTYPE}, causal, (B, H, T, D)")
    shapes = [(12, 4, 64, 32), (8, 4, 256, 32), (2, 6, 1024, 64), (1, 6, 4096, 64)] if DEVICE == "cpu" else \
        [(16, 12, 1024, 64), (4, 12, 4096, 64), (1, 12, 16384, 64), (1, 12, 32768, 64)]
    ids = torch.where(torch.arange(2048) < 8 * torch.arange(16)[:, None], -1, 0).to(DEVICE)  # (B, T)
    padding, cached = {"segment_ids": ids[:, -1:], "kv_segment_ids": ids}, {"grad": False, "Tq": 1}
    for what, shape, options in (
            *(("forward + backward", shape, {}) for shape in (shapes[:2] if cfg.quick else shapes)),
            ("forward", (1, 6, 2048, 64), {"grad": False}), ("decode", (16, 6, 2048, 64), cached),
            ("decode, left padding", (16, 6, 2048, 64), cached | padding),
            ("decode, 2 key heads", (16, 8, 2048, 64), cached | {"G": 2}),
            ("decode, bfloat16", (16, 6, 2048, 64), cached | {"dtype": torch.bfloat16})):
        turns = cfg.repeats * max(1, min(30, 2**14 // (shape[0] * shape[2])))
        seconds = interleave(attention_steps(*shape, **options), turns)
        for peer in list(seconds)[1:]:
            compare(f"{what}, {shape}", seconds, "ours", peer)
    documents = torch.arange(4096, device=DEVICE)[None] // 512  # (1, T)
    packing = {"one": flash_attention, "packed": partial(flash_attention, segment_ids=documents)}
    seconds = interleave(attention_steps(1, 6, 4096, 64, peers=packing), cfg.repeats)
    compare("8 documents of 512 in one row of 4096, both ours", seconds, "packed", "one")


def attention_by_length(cfg):
    """Time and memory as rows grow: memory should double with T, where T x T scores would need four times."""
    head(f"by length, {DTYPE}, causal, (1, 4, T, 64), forward + backward")
    shortest = 256 if DEVICE == "cpu" else 1024
    for T in [shortest << i for i in range(3 if cfg.quick else 6)]:
        steps, shapes = attention_steps(1, 4, T, 64), ((1, 1, 1024, 64), (1, 4, T, 64))
        seconds = interleave(steps, cfg.repeats * max(1, min(16, 8 * shortest // T)))
        memory = {f"{p} MB": in_fresh_process(extra_memory, attention_steps, p, *shapes) for p in steps}
        compare(f"T {T}", seconds, "ours", "sdpa", **memory)


def logp(cfg):
    M, C, V = (1024, 256, 8192) if cfg.quick else (8192, 768, 50304)
    head(f"log-probabilities of targets, forward + backward, M {M}, C {C}, V {V}")
    steps = logp_steps(M, C, V)
    seconds = interleave(steps, max(3, cfg.repeats // 3))
    memory = {f"{p} MB": in_fresh_process(extra_memory, logp_steps, p, (8, C, 16), (M, C, V)) for p in steps}
    for p in ("ours", "equal_weights"):
        compare("time", seconds, p, "untiled", **memory)


if __name__ == "__main__":
    start(lambda: run(__doc__, time=time_of_attention, length=attention_by_length, logp=logp))
