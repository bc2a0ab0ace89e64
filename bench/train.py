"""Whole updates of a GPT (forward, backward, clipping, AdamW) as a share of what the processor can do.

    python -m bench.train

MFU: GPT.flops_per_token x tokens per second / FLOP/s of a large square matrix product, in the same turns.
"""
import itertools
from functools import partial

import torch

from bench.measure import DEVICE, DTYPE, compare, head, interleave, run
from lib.program import start
from model import GPT, GPTConfig
from zero import Zero


def gpt(layers: int, heads: int, width: int, T: int, attention: str, V: int = 71) -> GPT:
    return GPT(GPTConfig(vocab_size=V, n_layer=layers, n_head=heads, n_embd=width, max_seq_len=T,
                         attention=attention)).to(DEVICE)


def training(cfg):
    shapes = {"quick": (16, 64, 71, 2, 4, 128), "cpu": (16, 256, 71, 6, 6, 384),
              "cuda": (16, 1024, 50304, 12, 12, 768)}  # GPT-2's smallest
    B, T, V, *shape = shapes["quick" if cfg.quick else DEVICE]
    size = 1024 if DEVICE == "cpu" else 8192
    head(f"GPT of {shape[0]} layers, width {shape[2]}, seq_len {T}, batch {B}, {DTYPE}: MFU against "
         f"8 products of {size} x {size}")
    ids = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def step(model, zero):
        zero.backward(-model(ids[:, :-1], ids[:, 1:], equal_weights=True).sum() / ids[:, 1:].numel())
        zero.step(1e-3, 1.0)
    a = torch.randn(size, size, device=DEVICE, dtype=DTYPE)
    steps = {"product": lambda: [a @ a for _ in range(8)]}
    for attention, compile in itertools.product(("flash", "sdpa"), (False, True)):
        model = gpt(*shape, T, attention, V)
        scale = model.flops_per_token(T) * B * T / (8 * 2 * size**3)
        zero = Zero(model, units=model.units(), dtype=DTYPE, compile=compile)
        steps[f"{attention}{', compiled' * compile}"] = partial(step, model, zero)
    seconds = interleave(steps, cfg.repeats)
    for name in list(steps)[1:]:
        compare("MFU", seconds, "product", name, scale=scale)
    compare("speed", seconds, "sdpa", "flash")


if __name__ == "__main__":
    start(lambda: run(__doc__, train=training))
