"""Tokens per second of generate, beside a program without a KV cache, and beside PyTorch's attention.

    python -m bench.decode
"""
import statistics
from functools import partial

import torch

from bench.measure import DEVICE, compare, head, interleave, run
from bench.train import gpt
from lib.program import start
from model import generate


def decoding(cfg):
    old, new = 16, 48 if cfg.quick else 240  # tokens of a prompt and of its reply
    for shape in (4, 4, 128), (6, 6, 384):
        models = {attention: gpt(*shape, old + new, attention).eval() for attention in ("flash", "sdpa")}
        head(f"decoding, {models['flash'].parameter_count() / 1e6:.2f} M parameters, {old} + {new} tokens")
        for B in (1, 32):
            ids = torch.randint(0, 71, (B, old + new), generator=torch.Generator().manual_seed(0)).to(DEVICE)
            functions = {attention: partial(generate, model, ids[:, :old].tolist(), max_new_tokens=new)
                         for attention, model in models.items()}
            with torch.inference_mode():
                seconds = interleave(functions | {"forward": partial(models["flash"], ids)}, cfg.repeats)
            speed = {"tokens/s": B * new / statistics.median(seconds["flash"])}
            # without a cache, each new token needs a forward pass of its own
            compare(f"cache, batch {B}, {new} x", seconds, "forward", "flash", scale=new, **speed)
            compare(f"speed, batch {B}", seconds, "sdpa", "flash")


if __name__ == "__main__":
    start(lambda: run(__doc__, decode=decoding))
