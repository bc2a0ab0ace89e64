"""The tiled attention and the tiled loss beside PyTorch's own: time and memory.

    python -m bench.attention                  in bfloat16 where there is a GPU, else in float32
    python -m bench.attention --only length    one of: time, length, logp
"""
from functools import partial

import torch
import torch.nn.functional as F

from bench.measure import DEVICE, DTYPE, Table, in_fresh_process, interleave, peak_memory, run
from kernels import flash_attention, naive_attention, sdpa_attention, target_logp
from lib.program import start

TWO = {"ours": flash_attention, "sdpa": sdpa_attention}
PEERS = TWO | {"naive": naive_attention}


def peers_at(T: int) -> dict:
    return PEERS if T <= 4096 else TWO  # the scores of a longer row fill the memory


def attention_steps(peers, B, H, T, D, *, G=None, Tq=None, dtype=DTYPE, grad=True, **options):
    """{peer: a function that runs one forward and, if grad, one backward}. All have the same inputs,
    q (B, H, Tq, D), k and v (B, G, T, D)."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, Tq or T, D), (B, G or H, T, D), (B, G or H, T, D), (B, H, Tq or T, D)
    *inputs, g = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]

    def step(attention):
        out = attention(*(x.requires_grad_(grad) for x in inputs), **options)
        return torch.autograd.grad(out, inputs, g) if grad else out
    return {name: partial(step, attention) for name, attention in peers.items()}


def attention_memory(peer: str, shape: tuple[int, int, int, int]) -> int:
    """Bytes of forward + backward at their peak, inputs not counted; shape: (B, H, T, D)."""
    warm, step = (attention_steps(PEERS, *some)[peer] for some in ((1, 1, 1024, shape[3]), shape))
    warm()  # loads the libraries and makes their workspaces
    return peak_memory(step)[1]


def megabytes(peers, *shape: int) -> dict[str, float]:
    return {f"{peer} MB": in_fresh_process(attention_memory, peer, shape) / 1e6 for peer in peers}


def time_of_attention(cfg):
    table = Table(f"time (ours / peer), {DTYPE}, causal")
    shapes = [(12, 4, 64, 32), (8, 4, 256, 32), (2, 6, 1024, 64), (1, 6, 4096, 64)] if DEVICE == "cpu" else \
        [(16, 12, 1024, 64), (4, 12, 4096, 64), (1, 12, 16384, 64), (1, 12, 32768, 64)]
    compiled = {"compiled": torch.compile(flash_attention, dynamic=False)}
    for B, H, T, D in shapes[:2] if cfg.quick else shapes:
        turns = cfg.repeats * max(1, min(30, 2**14 // (B * T)))
        seconds = interleave(attention_steps(peers_at(T) | compiled, B, H, T, D), turns)
        for ours, peer in (("ours", "sdpa"), ("compiled", "ours"), ("naive", "ours")):
            if ours in seconds:
                table.compare(f"forward + backward, {(B, H, T, D)}, {ours} / {peer}", seconds, ours, peer)
    columns = torch.arange(2048, device=DEVICE)
    padding = {"segment_ids": torch.zeros(16, 1, dtype=torch.long, device=DEVICE),
               "kv_segment_ids": torch.where(columns < 8 * columns[:16, None], -1, 0)}  # (B, T)
    rows = {"forward, (1, 6, 2048, 64), ours / sdpa": attention_steps(PEERS, 1, 6, 2048, 64, grad=False)}
    for H, G, dtype, options in ((6, 6, DTYPE, {}), (6, 6, DTYPE, padding), (8, 2, DTYPE, {}),
                                 (6, 6, torch.bfloat16, {}), (6, 6, torch.float16, {})):
        left = ", left padding" if options else ""
        what = f"decode, B 16, Tk 2048, H {H}, G {G}, {dtype}{left}, ours / sdpa"
        rows[what] = attention_steps(PEERS, 16, H, 2048, 64, G=G, Tq=1, dtype=dtype, grad=False, **options)
    for what, steps in rows.items():
        table.compare(what, interleave(steps, 3 * cfg.repeats), "ours", "sdpa")
    documents = torch.arange(4096, device=DEVICE)[None] // 512  # (1, T)
    packing = {"one": flash_attention, "packed": partial(flash_attention, segment_ids=documents)}
    seconds = interleave(attention_steps(packing, 1, 6, 4096, 64), cfg.repeats)
    table.compare("8 documents of 512 / 1 of 4096, both ours", seconds, "packed", "one")


def attention_by_length(cfg):
    """Time and memory as rows grow: memory should double with T, where T x T scores would need four times."""
    table = Table(f"by length (ours / sdpa), {DTYPE}, causal, (1, 4, T, 64), forward + backward")
    shortest = 256 if DEVICE == "cpu" else 1024
    for T in [shortest << i for i in range(3 if cfg.quick else 6)]:
        turns = cfg.repeats * max(1, min(16, 8 * shortest // T))
        seconds = interleave(attention_steps(peers_at(T), 1, 4, T, 64), turns)
        table.compare(f"T {T}", seconds, "ours", "sdpa", T=T, **megabytes(peers_at(T), 1, 4, T, 64))


LOGP = {"untiled": lambda h, weight, ids: -F.cross_entropy((h @ weight.T).float(), ids, reduction="none"),
        "ours": target_logp, "ours, equal_weights": partial(target_logp, equal_weights=True)}


def logp_step(peer: str, M: int, C: int, V: int):
    """A function that runs one forward + backward of a mean loss over M rows of width C, V logits each."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, C, generator=generator).to(DEVICE).requires_grad_()
    weight = (torch.randn(V, C, generator=generator) * 0.02).to(DEVICE).requires_grad_()
    targets = torch.randint(0, V, (M,), generator=generator).to(DEVICE)
    return lambda: torch.autograd.grad(-LOGP[peer](hidden, weight, targets).mean(), (hidden, weight))


def logp_memory(peer: str, M: int, C: int, V: int) -> int:
    """Bytes of logp_step at its peak, inputs not counted."""
    logp_step(peer, 8, C, 16)()
    return peak_memory(logp_step(peer, M, C, V))[1]


def logp(cfg):
    M, C, V = (1024, 256, 8192) if cfg.quick else (8192, 768, 50304)
    table = Table(f"log-probabilities of targets (ours / untiled), forward + backward, M {M}, C {C}, V {V}")
    seconds = interleave({p: logp_step(p, M, C, V) for p in LOGP}, max(3, cfg.repeats // 3))
    peak = {p: in_fresh_process(logp_memory, p, M, C, V) / 1e6 for p in LOGP}
    for p in ("ours", "ours, equal_weights"):
        table.compare(f"time, {p}", seconds, p, "untiled")
        table.add(f"memory, {p}", peak[p] / peak["untiled"], MB=peak[p], untiled_MB=peak["untiled"])


if __name__ == "__main__":
    start(lambda: run(__doc__, time=time_of_attention, length=attention_by_length, logp=logp))
