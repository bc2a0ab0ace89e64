"""Tokens per second of generate, beside a program without a KV cache, and beside PyTorch's attention.

    python -m bench.decode
"""
import statistics
from functools import partial

import torch

from bench.measure import DEVICE, Table, interleave, run
from bench.train import gpt
from lib.program import start
from model import generate


def decoding(cfg):
    old, T = 16, 64 if cfg.quick else 256  # tokens of a prompt, and with its reply
    for shape in (4, 4, 128), (6, 6, 384):
        models = {attention: gpt(*shape, T, attention).eval() for attention in ("flash", "sdpa")}
        millions = models["flash"].parameter_count() / 1e6
        table = Table(f"decoding, {millions:.2f} M parameters, prompts of {old} tokens")
        for B in (1, 32):
            ids = torch.randint(0, 71, (B, T), generator=torch.Generator().manual_seed(0)).to(DEVICE)
            functions = {attention: partial(generate, model, ids[:, :old].tolist(), max_new_tokens=T - old)
                         for attention, model in models.items()}
            with torch.inference_mode():
                seconds = interleave(functions | {"again": partial(models["flash"], ids)}, cfg.repeats)
            seconds["again"] = [(T - old) * s for s in seconds["again"]]  # a forward pass for each new token
            rate = {"tokens/s": B * (T - old) / statistics.median(seconds["flash"])}
            table.compare(f"cache / forwarding all {T} again, batch {B}", seconds, "again", "flash", **rate)
            table.compare(f"speed, flash / sdpa, batch {B}", seconds, "sdpa", "flash")


if __name__ == "__main__":
    start(lambda: run(__doc__, decode=decoding))
