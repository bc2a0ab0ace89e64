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


def attention_steps(B, H, T, D, *, G=None, Tq=None, dtype=DTYPE, grad=True, **options):
    """{peer: one forward and, if grad, one backward}, of the same q (B, H, Tq, D), k and v (B, G, T, D)."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, Tq or T, D), (B, G or H, T, D), (B, G or H, T, D), (B, H, Tq or T, D)
    *inputs, g = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]

    def step(attention):
        out = attention(*(x.requires_grad_(grad) for x in inputs), **options)
        return torch.autograd.grad(out, inputs, g) if grad else out
    naive = {"naive": naive_attention} if T <= 4096 else {}  # the scores of a longer row fill the memory
    peers = {"sdpa": sdpa_attention, "ours": flash_attention} | naive
    return {name: partial(step, attention) for name, attention in peers.items()}


def logp_steps(M, C, V):
    """{peer: a function that runs one forward + backward of a mean loss over M rows of width C, V logits}."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, C, generator=generator).to(DEVICE).requires_grad_()
    weight = (torch.randn(V, C, generator=generator) * 0.02).to(DEVICE).requires_grad_()
    targets = torch.randint(0, V, (M,), generator=generator).to(DEVICE)

    def step(logp):
        return torch.autograd.grad(-logp(hidden, weight, targets).mean(), (hidden, weight))
    peers = {"untiled": lambda h, w, ids: -F.cross_entropy((h @ w.T).float(), ids, reduction="none"),
             "ours": target_logp, "equal_weights": partial(target_logp, equal_weights=True)}
    return {name: partial(step, logp) for name, logp in peers.items()}


def extra_memory(steps_of, peer: str, small: tuple, shape: tuple) -> float:
    """MB that a step of the peer needs at its peak, inputs not counted."""
    steps_of(*small)[peer]()  # loads the libraries and makes their workspaces
    return peak_memory(steps_of(*shape)[peer])[1] / 1e6


def beside(what: str, steps_of, shape: tuple, turns: int, small: tuple = (), **options) -> None:
    """Rows: all peers of steps_of(*shape) beside the first: time and, given a small shape, memory."""
    steps = steps_of(*shape, **options)
    first, *others = steps
    seconds = interleave(steps, turns)
    memory = {f"{p} MB": in_fresh_process(extra_memory, steps_of, p, small, shape) for p in steps if small}
    for peer in others:
        compare(f"{what}, {shape}", seconds, peer, first, **memory)


def time_of_attention(cfg):
    head(f"time, {DTYPE}, causal, (B, H, T, D)")
    shapes = [(12, 4, 64, 32), (8, 4, 256, 32), (2, 6, 1024, 64), (1, 6, 4096, 64)] if DEVICE == "cpu" else \
        [(16, 12, 1024, 64), (4, 12, 4096, 64), (1, 12, 16384, 64), (1, 12, 32768, 64)]
    for B, H, T, D in shapes[:2] if cfg.quick else shapes:
        turns = cfg.repeats * max(1, min(30, 2**14 // (B * T)))
        beside("forward + backward", attention_steps, (B, H, T, D), turns)
    for what, shape, options in (
            ("forward", (1, 6, 2048, 64), {}), ("decode", (16, 6, 2048, 64), {"Tq": 1}),
            ("decode, 2 key heads", (16, 8, 2048, 64), {"Tq": 1, "G": 2}),
            ("decode, bfloat16", (16, 6, 2048, 64), {"Tq": 1, "dtype": torch.bfloat16})):
        beside(what, attention_steps, shape, 3 * cfg.repeats, grad=False, **options)
    documents = torch.arange(4096, device=DEVICE)[None] // 512  # (1, T)
    packed, one = (attention_steps(1, 6, 4096, 64, segment_ids=ids)["ours"] for ids in (documents, None))
    seconds = interleave({"packed": packed, "one": one}, cfg.repeats)
    compare("8 documents of 512 in one row of 4096, both ours", seconds, "packed", "one")


def attention_by_length(cfg):
    """Time and memory as rows grow: memory should double with T, where T x T scores would need four times."""
    head(f"by length, {DTYPE}, causal, (B, H, T, D), forward + backward")
    for T in (256, 512, 1024) if cfg.quick else (256, 512, 1024, 2048, 4096, 8192):
        turns = cfg.repeats * max(1, 2048 // T)
        beside("length", attention_steps, (1, 4, T, 64), turns, small=(1, 1, 1024, 64))


def logp(cfg):
    head("log-probabilities of targets, forward + backward, (M, C, V)")
    shape = (1024, 256, 8192) if cfg.quick else (8192, 768, 50304)
    beside("loss", logp_steps, shape, max(3, cfg.repeats // 3), small=(8, shape[1], 16))


if __name__ == "__main__":
    start(lambda: run(__doc__, time=time_of_attention, length=attention_by_length, logp=logp))
