"""Speed and memory, each figure beside its peers', measured in the same run.

    python bench.py attention --out bench_attention.json    # minutes on two cores; on a GPU: bfloat16, T up to 32768
    python bench.py train --out bench_train.json            # whole updates, as a share of the matrix product's speed
    python bench.py decode --out bench_decode.json          # tokens per second of generate
    python bench.py zero --out bench_zero.json              # ZeRO beside DDP and FSDP2: see bench_zero.py

Peers take turns (A B A B ...), so that a noisy neighbour hits all alike. A time is a median; a ratio is the median of
the ratios within one turn, with its quartiles. Memory is measured in a fresh process.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from kernels import flash_attention, naive_attention, sdpa_attention, target_logp
from model import GPT, GPTConfig, generate
from zero import Zero

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


# ---- measuring ------------------------------------------------------------------------------------------------------

def interleave(functions: dict, repeats: int, before=lambda: None) -> dict[str, list[float]]:
    """Call every function once per turn, for one turn of warm-up and `repeats` more: {name: [seconds]}.

    before: called ahead of each of them; its time does not count.
    """
    seconds = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            before()
            start = time.perf_counter()
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def memory_now(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its peak) of this process, bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def reset_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets VmHWM
    except OSError:  # not allowed in some containers; the peak so far then stays, which a fresh process keeps low
        pass


def extra_memory(function) -> int:
    """Peak bytes that function() needs on top of what was there before, in this process."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    before = memory_now("VmRSS")
    reset_peak()
    function()
    return memory_now("VmHWM") - before


def in_fresh_process(function, *args):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


class Table:
    """Rows of the report: printed as they come (markdown), kept for the JSON file."""

    def __init__(self, title: str):
        self.title, self.rows = title, []
        print(f"\n{title}\n\n| what | measured | besides |\n|---|---|---|", flush=True)

    def add(self, what: str, value: float, low=None, high=None, **detail) -> None:
        """value: a ratio, ours / peer unless `what` says otherwise; low and high: its spread."""
        spread = "" if low is None else f" ({low:.2f}..{high:.2f})"
        besides = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in detail.items())
        print(f"| {what} | {value:.3g}{spread} | {besides} |", flush=True)
        self.rows.append({"what": what, "value": value, "low": low, "high": high, **detail})

    def compare(self, what: str, seconds: dict[str, list[float]], ours: str, peer: str, **detail) -> None:
        """A row with the ratio of two times, its quartiles over the turns, and the median of every time."""
        ratios = [a / b for a, b in zip(seconds[ours], seconds[peer])]
        low, median, high = statistics.quantiles(ratios, n=4)
        times = {f"{name} ms": statistics.median(s) * 1e3 for name, s in seconds.items()}
        self.add(what, median, low, high, **times, **detail)


# ---- attention ------------------------------------------------------------------------------------------------------

PEERS = {"ours": flash_attention, "sdpa": sdpa_attention, "naive": naive_attention}


def peers_at(T: int) -> dict:
    """naive only as long as its scores do not fill the memory."""
    return {p: f for p, f in PEERS.items() if p != "naive" or T <= (4096 if DEVICE == "cpu" else 8192)}


def attention_inputs(B, H, T, D, *, G=None, Tq=None, dtype=DTYPE, device=DEVICE, grad=True):
    """q (B, H, Tq, D), k and v (B, G, T, D) and a gradient shaped like q."""
    generator = torch.Generator().manual_seed(0)
    q, kv = (B, H, Tq or T, D), (B, G or H, T, D)
    q, k, v, g = (torch.randn(shape, generator=generator).to(device, dtype) for shape in (q, kv, kv, q))
    return [x.requires_grad_(grad) for x in (q, k, v)], g


def attention_steps(peers: dict, *shape: int, grad=True, G=None, Tq=None, dtype=DTYPE, **options) -> dict:
    """{peer: a function that runs one forward and, if grad, one backward}, all on the same inputs."""
    inputs, g = attention_inputs(*shape, G=G, Tq=Tq, dtype=dtype, grad=grad)

    def step(attention):
        out = attention(*inputs, **options)
        return torch.autograd.grad(out, inputs, g) if grad else out
    return {name: partial(step, attention) for name, attention in peers.items()}


def attention_memory(peer: str, shape: tuple[int, int, int, int]) -> int:
    """Peak extra bytes of forward + backward."""
    step, = attention_steps({peer: PEERS[peer]}, *shape).values()
    warm, = attention_steps({peer: PEERS[peer]}, 1, 1, 1024, shape[3]).values()
    warm()  # loads the libraries and makes their workspaces
    return extra_memory(step)


def time_of_attention(args) -> list[Table]:
    table = Table(f"time (ours / peer), {DTYPE}, causal")
    shapes = [(1, 6, 4096, 64), (2, 6, 1024, 64), (8, 4, 256, 32), (12, 4, 64, 32)] if DEVICE == "cpu" else \
        [(16, 12, 1024, 64), (4, 12, 4096, 64), (1, 12, 16384, 64), (1, 12, 32768, 64)]
    compiled = {"compiled": torch.compile(flash_attention, fullgraph=True, dynamic=False)}
    for B, H, T, D in shapes[2 * (DEVICE == "cpu"):][:2] if args.quick else shapes:
        turns = args.repeats * max(1, min(30, 2**14 // (B * T)))
        seconds = interleave(attention_steps(peers_at(T) | compiled, B, H, T, D), turns)
        for ours, peer in (("ours", "sdpa"), ("compiled", "ours"), ("naive", "ours")):
            if ours in seconds:
                table.compare(f"forward + backward, {(B, H, T, D)}, {ours} / {peer}", seconds, ours, peer)

    seconds = interleave(attention_steps(PEERS, 1, 6, 2048, 64, grad=False), args.repeats)
    table.compare("forward, (1, 6, 2048, 64), ours / sdpa", seconds, "ours", "sdpa")

    columns = torch.arange(2048, device=DEVICE)
    padding = {"segment_ids": torch.zeros(16, 1, dtype=torch.long, device=DEVICE),
               "kv_segment_ids": torch.where(columns < 8 * columns[:16, None], -1, 0)}
    for H, G, dtype, options in [(6, 6, DTYPE, {}), (6, 6, DTYPE, padding), (8, 2, DTYPE, {}),
                                 (6, 6, torch.bfloat16, {}), (6, 6, torch.float16, {})]:
        steps = attention_steps(PEERS, 16, H, 2048, 64, G=G, Tq=1, dtype=dtype, grad=False, **options)
        what = f"decode, B 16, Tk 2048, H {H}, G {G}, {dtype}{', left padding' if options else ''}"
        table.compare(f"{what}, ours / sdpa",
                      interleave(steps, 3 * args.repeats), "ours", "sdpa")

    documents = torch.arange(4096, device=DEVICE)[None] // 512
    ours = {"one": flash_attention, "packed": partial(flash_attention, segment_ids=documents)}
    seconds = interleave(attention_steps(ours, 1, 6, 4096, 64), args.repeats)
    table.compare("8 documents of 512 / 1 of 4096, both ours", seconds, "packed", "one")
    return [table]


def growth_of_attention(args) -> list[Table]:
    """From T = 2048 to 8192: the work x 16, the memory x 4. Causal tiles on the diagonal are half wasted, which is a
    larger share of short rows."""
    short, long, longest = (512, 2048, 4096) if args.quick else (2048, 8192, 16384)
    table = Table(f"growth of forward + backward, T {short} to {long}, {DTYPE}")
    two = {p: PEERS[p] for p in ("ours", "sdpa")}
    for causal in (True, False):
        steps = {f"{p} {T}": step for T in (short, long)
                 for p, step in attention_steps(two, 1, 6, T, 64, causal=causal).items()}
        seconds = interleave(steps, args.repeats)
        for p in two:
            what = f"time, (1, 6, T, 64), {'' if causal else 'not '}causal, {p}"
            table.compare(what, seconds, f"{p} {long}", f"{p} {short}")
    for B in (1, 8):
        for p in two:
            peak = {T: in_fresh_process(attention_memory, p, (B, 8, T, 64)) / 1e6 for T in (short, long)}
            table.add(f"extra memory, ({B}, 8, T, 64), {p}", peak[long] / peak[short],
                      **{f"T {T} MB": megabytes for T, megabytes in peak.items()})
    peak = {f"{p} MB": in_fresh_process(attention_memory, p, (1, 4, longest, 64)) / 1e6 for p in two}
    table.add(f"extra memory, (1, 4, {longest}, 64), ours / sdpa", peak["ours MB"] / peak["sdpa MB"], **peak)
    return [table]


def attention_by_length(args) -> list[Table]:
    """Time and memory of forward + backward as rows grow, for plot.py."""
    table = Table(f"by length (ours / sdpa), {DTYPE}, causal, (1, 4, T, 64), forward + backward")
    lengths = [256, 512, 1024, 2048, 4096, 8192] if DEVICE == "cpu" else [1024, 2048, 4096, 8192, 16384, 32768]
    for T in lengths[:3] if args.quick else lengths:
        peers = peers_at(T)
        turns = args.repeats * max(1, min(16, lengths[3] // T))
        peak = {f"{p} MB": in_fresh_process(attention_memory, p, (1, 4, T, 64)) / 1e6 for p in peers}
        table.compare(f"T {T}", interleave(attention_steps(peers, 1, 4, T, 64), turns), "ours", "sdpa", T=T, **peak)
    return [table]


def exact_attention(q, k, v, g):
    """Causal attention (B, H, T, D) and its gradients by the formulas, in numpy's long double: out, dq, dk, dv."""
    q, k, v, g = (x.detach().double().numpy().astype(np.longdouble) for x in (q, k, v, g))
    T, scale = q.shape[2], np.longdouble(q.shape[3]) ** -0.5
    scores = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(2, 3) * scale, -np.inf)  # (B, H, T, T)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = g @ v.swapaxes(2, 3)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    return p @ v, ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ g


def relative_errors(dtype: torch.dtype) -> dict[str, float]:
    """Largest relative error (in norm) of output and gradients, by peer, on the CPU."""
    inputs, g = attention_inputs(1, 2, 256, 64, dtype=dtype, device="cpu")
    exact = exact_attention(*inputs, g)
    errors = {}
    for name, attention in PEERS.items():
        out = attention(*inputs)
        found = out.detach(), *torch.autograd.grad(out, inputs, g)
        errors[name] = max(float(np.linalg.norm((a.double().numpy() - b).ravel()) / np.linalg.norm(b.ravel()))
                           for a, b in zip(found, exact))
    return errors


def errors_of_attention(args) -> list[Table]:
    table = Table("largest relative error of output and gradients against 80-bit floats (ours / sdpa)")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        found = relative_errors(dtype)
        table.add(str(dtype), found["ours"] / found["sdpa"], **found)
    return [table]


# ---- log-probabilities ----------------------------------------------------------------------------------------------

def untiled_logp(hidden, weight, targets):
    return -F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


LOGP = {"untiled": untiled_logp, "ours": target_logp, "ours, equal_weights": partial(target_logp, equal_weights=True)}


def logp_step(peer: str, N: int, C: int, V: int):
    """A function that runs one forward + backward of a mean loss."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator).to(DEVICE).requires_grad_()
    weight = (torch.randn(V, C, generator=generator) * 0.02).to(DEVICE).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator).to(DEVICE)
    return lambda: torch.autograd.grad(-LOGP[peer](hidden, weight, targets).mean(), (hidden, weight))


def logp_memory(peer: str, N: int, C: int, V: int) -> int:
    logp_step(peer, 8, C, 16)()
    return extra_memory(logp_step(peer, N, C, V))


def bench_logp(args) -> list[Table]:
    N, C, V = (1024, 256, 8192) if args.quick else (8192, 768, 50304)
    table = Table(f"log-probabilities of targets (ours / untiled), forward + backward of a mean, N {N}, C {C}, V {V}")
    seconds = interleave({p: logp_step(p, N, C, V) for p in LOGP}, max(3, args.repeats // 3))
    peak = {p: in_fresh_process(logp_memory, p, N, C, V) / 1e6 for p in LOGP}
    for p in ("ours", "ours, equal_weights"):
        table.compare(f"time, {p}", seconds, p, "untiled")
        table.add(f"memory, {p}", peak[p] / peak["untiled"], MB=peak[p], untiled_MB=peak["untiled"])
    return [table]


# ---- whole models ---------------------------------------------------------------------------------------------------

def gpt(layers: int, heads: int, width: int, T: int, attention: str) -> GPT:
    return GPT(GPTConfig(vocab_size=71, n_layer=layers, n_head=heads, n_embd=width, max_seq_len=T,
                         attention=attention)).to(DEVICE)


def bench_train(args) -> list[Table]:
    """Whole updates (forward, backward, clip, AdamW) of a GPT, beside the same model with PyTorch's attention.

    MFU: GPT.flops_per_token x tokens per second / FLOP/s of a large square matrix product, measured in the same turns.
    """
    B, T, layers, heads, width = (16, 64, 2, 4, 128) if args.quick else (16, 256, 6, 6, 384)
    ids = torch.randint(0, 71, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def update(attention: str, compile: bool):
        model = gpt(layers, heads, width, T, attention)
        zero = Zero(model, units=model.units(), dtype=DTYPE, compile=compile)

        def step():
            zero.backward(-model(ids[:, :-1], ids[:, 1:], equal_weights=True).sum() / (B * T))
            zero.step(1e-3, 1.0)
        return step

    steps = {f"{attention}{', compiled' if compile else ''}": update(attention, compile)
             for attention in ("flash", "sdpa") for compile in (False, True)}
    flops = gpt(layers, heads, width, T, "flash").flops_per_token(T) * B * T
    n = 1024 if DEVICE == "cpu" else 8192
    a = torch.randn(n, n).to(DEVICE, DTYPE)
    seconds = interleave({**steps, "product": lambda: [a @ a for _ in range(8)]}, args.repeats)
    product = [8 * 2 * n**3 / s for s in seconds["product"]]  # FLOP/s
    table = Table(f"GPT of {layers} layers, width {width}, seq_len {T}, batch {B}, {DTYPE}: MFU against a product of "
                  f"{statistics.median(product) / 1e9:.0f} GFLOP/s")
    for name in steps:
        mfu = sorted(flops / s / p for s, p in zip(seconds[name], product))
        middle = statistics.median(seconds[name])
        table.add(f"MFU, {name}", statistics.median(mfu), mfu[0], mfu[-1],
                  **{"ms": middle * 1e3, "tokens/s": B * T / middle})
    for suffix in ("", ", compiled"):
        table.compare(f"speed, flash / sdpa{suffix}", seconds, "sdpa" + suffix, "flash" + suffix)
    return [table]


def bench_decode(args) -> list[Table]:
    """Tokens per second of generate: replies up to 256 tokens long, with a KV cache and by forwarding all again."""
    T, start = (64, 16) if args.quick else (256, 16)
    tables = []
    for layers, heads, width in [(4, 4, 128), (6, 6, 384)]:
        models = {attention: gpt(layers, heads, width, T, attention).eval() for attention in ("flash", "sdpa")}
        millions = models["flash"].parameter_count() / 1e6
        table = Table(f"decoding, {millions:.2f} M parameters, prompts of {start} tokens")
        for B in (1, 32):
            prompts = torch.randint(0, 71, (B, start), generator=torch.Generator().manual_seed(0)).tolist()
            functions = {name: partial(generate, model, prompts, max_new_tokens=T - start)
                         for name, model in models.items()}
            functions["again"] = partial(models["flash"], torch.randint(0, 71, (B, T), device=DEVICE))
            with torch.inference_mode():
                seconds = interleave(functions, args.repeats)
            seconds["again"] = [(T - start) * s for s in seconds["again"]]  # a forward pass per new token
            rate = {"tokens/s": B * (T - start) / statistics.median(seconds["flash"])}
            table.compare(f"cache / forwarding all {T} again, batch {B}", seconds, "again", "flash", **rate)
            table.compare(f"speed, flash / sdpa, batch {B}", seconds, "sdpa", "flash")
        tables.append(table)
    return tables


# ---- the command ----------------------------------------------------------------------------------------------------

def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=["attention", "train", "decode", "zero"])
    parser.add_argument("--repeats", type=int, default=9, help="turns per measurement (more for short ones)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--only", default="", help="one part: of attention, time, growth, length, errors or logp; "
                                                   "of zero, time, memory, step, fit or cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes where the real ones take minutes")
    parser.add_argument("--out", default="", help="also write the figures to this JSON file")
    return parser


def main(argv=None) -> None:
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    parts = {"train": {"": bench_train}, "decode": {"": bench_decode},
             "attention": {"time": time_of_attention, "growth": growth_of_attention, "length": attention_by_length,
                           "errors": errors_of_attention, "logp": bench_logp}}
    if args.bench == "zero":
        import bench_zero  # a file of its own: it starts ranks, which import it
        parts["zero"] = bench_zero.PARTS
    tables = [table for name, part in parts[args.bench].items() if args.only in ("", name) for table in part(args)]
    if args.out:
        result = {"title": args.bench, "torch": torch.__version__, "threads": torch.get_num_threads(),
                  "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", "load": os.getloadavg(),
                  "tables": {table.title: table.rows for table in tables}}
        with open(args.out + ".tmp", "w") as file:
            json.dump(result, file, indent=1)
        os.replace(args.out + ".tmp", args.out)


if __name__ == "__main__":
    main()
