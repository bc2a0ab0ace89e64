"""Whole updates of a GPT (forward, backward, clipping, AdamW) as a share of what the processor can do.

    python -m bench.train

MFU: GPT.flops_per_token x tokens per second / FLOP/s of a large square matrix product, in the same turns.
"""
import statistics

import torch

from bench.measure import DEVICE, DTYPE, compare, head, interleave, run
from lib.program import start
from model import GPT, GPTConfig
from zero import Zero


def gpt(layers: int, heads: int, width: int, T: int, attention: str) -> GPT:
    return GPT(GPTConfig(vocab_size=71, n_layer=layers, n_head=heads, n_embd=width, max_seq_len=T,
                         attention=attention)).to(DEVICE)


def training_step(model: GPT, ids: torch.Tensor, compile: bool):
    """A function that makes one update; ids: (B, T + 1)."""
    zero = Zero(model, units=model.units(), dtype=DTYPE, compile=compile)

    def step():
        zero.backward(-model(ids[:, :-1], ids[:, 1:], equal_weights=True).sum() / ids[:, 1:].numel())
        zero.step(1e-3, 1.0)
    return step


def training(cfg):
    B, T, *shape = (16, 64, 2, 4, 128) if cfg.quick else (16, 256, 6, 6, 384)
    size = 1024 if DEVICE == "cpu" else 8192
    head(f"GPT of {shape[0]} layers, width {shape[2]}, seq_len {T}, batch {B}, {DTYPE}: MFU against "
         f"8 products of {size} x {size}")
    ids = torch.randint(0, 71, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    steps = {f"{attention}{', compiled' * compile}": training_step(gpt(*shape, T, attention), ids, compile)
             for attention in ("flash", "sdpa") for compile in (False, True)}
    a = torch.randn(size, size, device=DEVICE, dtype=DTYPE)
    seconds = interleave({**steps, "product": lambda: [a @ a for _ in range(8)]}, cfg.repeats)
    flops, of_product = gpt(*shape, T, "flash").flops_per_token(T) * B * T, 8 * 2 * size**3
    for name in steps:
        speed = {"tokens/s": B * T / statistics.median(seconds[name])}
        compare(f"MFU of {name}", seconds, "product", name, scale=flops / of_product, **speed)
    compare("speed", seconds, "sdpa", "flash")


if __name__ == "__main__":
    start(lambda: run(__doc__, train=training))
