"""Tokens per second of generate, beside a program without a KV cache.

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
        model = gpt(*shape, old + new, "flash").eval()
        head(f"decoding, {model.parameter_count() / 1e6:.2f} M parameters, {old} + {new} tokens")
        for B in (1, 32):
            ids = torch.randint(0, 71, (B, old + new), generator=torch.Generator().manual_seed(0)).to(DEVICE)
            reply = partial(generate, model, ids[:, :old].tolist(), max_new_tokens=new)
            with torch.inference_mode():  # without a cache, each new token needs a forward pass of its own
                seconds = interleave({"reply": reply, "forward": partial(model, ids)}, cfg.repeats)
            speed = {"tokens/s": B * new / statistics.median(seconds["reply"])}
            compare(f"cache, batch {B}, {new} x", seconds, "forward", "reply", scale=new, **speed)


if __name__ == "__main__":
    start(lambda: run(__doc__, decode=decoding))
