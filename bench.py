"""Speed and memory, each figure beside its peers', measured in the same run.

    python bench.py attention --out bench_attention.json    # minutes on two cores; on a GPU: bfloat16, T up to 32768
    python bench.py train --out bench_train.json            # whole updates, as a share of the matrix product's speed
    python bench.py decode --out bench_decode.json          # tokens per second of generate

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

PEERS = {"ours": flash_attention, "sdpa": sdpa_attention, "naive": naive_attention}


def interleave(functions: dict, repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Call every function once per turn, for one turn of warm-up and `repeats` more: {name: [seconds]}."""
    seconds = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(ours: list[float], peer: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of ours / peer, turn by turn."""
    ratios = sorted(a / b for a, b in zip(ours, peer))
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), low, high


def memory_now(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its peak) of this process, bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def extra_memory(function) -> int:
    """Peak bytes that function() needs on top of what was there before, in this process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    before = memory_now("VmRSS")
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets VmHWM
    except OSError:  # not allowed in some containers; the peak so far then stays, which a fresh process keeps low
        pass
    function()
    return memory_now("VmHWM") - before


def in_fresh_process(function, *args):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def attention_inputs(B, H, G, Tq, Tk, D, *, dtype=torch.float32, device="cpu", grad=True):
    """q (B, H, Tq, D), k and v (B, G, Tk, D) and a gradient shaped like q."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, Tq, D), (B, G, Tk, D), (B, G, Tk, D), (B, H, Tq, D)]
    q, k, v, g = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    return [x.requires_grad_(grad) for x in (q, k, v)], g


def attention_memory(peer: str, shape: tuple[int, int, int, int]) -> int:
    """Peak extra bytes of forward + backward."""
    B, H, T, D = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, g = attention_inputs(B, H, H, T, T, D, device=device)
    warm, g_warm = attention_inputs(1, 1, 1, 1024, 1024, D, device=device)
    torch.autograd.grad(PEERS[peer](*warm), warm, g_warm)  # loads the libraries and makes their workspaces
    return extra_memory(lambda: torch.autograd.grad(PEERS[peer](*inputs), inputs, g))


def untiled_logp(hidden, weight, targets):
    return -F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


LOGP = {"untiled": untiled_logp, "ours": target_logp,
        "ours, equal_weights": lambda *inputs: target_logp(*inputs, equal_weights=True)}


def logp_step(peer: str, N: int, C: int, V: int):
    """A function that runs one forward + backward of a mean loss."""
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(N, C, generator=generator).to(device).requires_grad_()
    weight = (torch.randn(V, C, generator=generator) * 0.02).to(device).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator).to(device)
    return lambda: torch.autograd.grad(-LOGP[peer](hidden, weight, targets).mean(), (hidden, weight))


def logp_memory(peer: str, N: int, C: int, V: int) -> int:
    logp_step(peer, 8, C, 16)()
    return extra_memory(logp_step(peer, N, C, V))


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


def relative_errors(dtype: torch.dtype, shape=(1, 2, 256, 64)) -> dict[str, float]:
    """Largest relative error (in norm) of output and gradients, by peer."""
    B, H, T, D = shape
    inputs, g = attention_inputs(B, H, H, T, T, D, dtype=dtype)
    exact = exact_attention(*inputs, g)
    errors = {}
    for name, attention in PEERS.items():
        out = attention(*inputs)
        found = out.detach(), *torch.autograd.grad(out, inputs, g)
        errors[name] = max(float(np.linalg.norm((a.double().numpy() - b).ravel()) / np.linalg.norm(b.ravel()))
                           for a, b in zip(found, exact))
    return errors


class Table:
    """Rows of the report: printed as they come (markdown), kept for the JSON file."""

    def __init__(self, title: str):
        self.title, self.rows = title, []
        print(f"\n{title}\n\n| what | measured | at least | aim |\n|---|---|---|---|", flush=True)

    def add(self, what: str, value: float, low=None, high=None, *, at_least="", aim="", **detail) -> None:
        """value: a ratio, ours / peer unless `what` says otherwise."""
        spread = "" if low is None else f" ({low:.2f}..{high:.2f})"
        numbers = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in detail.items())
        print(f"| {what} | {value:.3g}{spread}{'; ' + numbers if numbers else ''} | {at_least} | {aim} |", flush=True)
        limits = {"low": low, "high": high, "at_least": at_least, "aim": aim}
        self.rows.append({"what": what, "value": value, **limits, **detail})


def milliseconds(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {f"{name} ms": statistics.median(s) * 1e3 for name, s in seconds.items()}


def step_of(attention, inputs, g, **options):
    """Forward + backward where a gradient is given, forward alone where not."""
    if g is None:
        return lambda: attention(*inputs, **options)
    return lambda: torch.autograd.grad(attention(*inputs, **options), inputs, g)


def report(title: str, tables: list[Table]) -> dict:
    """What goes into the JSON file: the tables and the circumstances."""
    return {"title": title, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "tables": {table.title: table.rows for table in tables}}


def bench_attention(args) -> dict:
    """The table of the tiled kernels. On a CPU float32, on a GPU bfloat16."""
    tables = attention_on_gpu(args.repeats) if torch.cuda.is_available() else attention_on_cpu(args.repeats, args.quick)
    return report("attention", tables)


def attention_on_cpu(repeats: int, quick: bool) -> list[Table]:
    table = Table("time (ours / peer), float32, causal")
    for B, H, T, D, at_least, aim in [(1, 6, 4096, 64, 1.35, 1.1), (2, 6, 1024, 64, 1.35, 1.1),
                                      (8, 4, 256, 32, 2.0, 1.3), (12, 4, 64, 32, 2.0, 1.3)]:
        inputs, g = attention_inputs(B, H, H, T, T, D)
        turns = repeats * max(1, min(30, 2**14 // (B * T)))
        seconds = interleave({p: step_of(f, inputs, g) for p, f in PEERS.items() if p != "naive" or T < 4096}, turns)
        table.add(f"forward + backward / sdpa, {(B, H, T, D)}", *ratio(seconds["ours"], seconds["sdpa"]),
                  at_least=at_least, aim=aim, **milliseconds(seconds))

    inputs, g = attention_inputs(1, 6, 6, 4096, 4096, 64)
    seconds = interleave({p: step_of(PEERS[p], inputs, g) for p in ("ours", "naive")}, max(3, repeats // 3))
    table.add("naive / ours, (1, 6, 4096, 64)", *ratio(seconds["naive"], seconds["ours"]), at_least=4, aim=6,
              **milliseconds(seconds))

    inputs, _ = attention_inputs(1, 6, 6, 2048, 2048, 64, grad=False)
    seconds = interleave({p: step_of(f, inputs, None) for p, f in PEERS.items()}, repeats)
    table.add("forward / sdpa, (1, 6, 2048, 64)", *ratio(seconds["ours"], seconds["sdpa"]), at_least=1.3, aim=1.0,
              **milliseconds(seconds))

    padding = {"segment_ids": torch.zeros(16, 1, dtype=torch.long),
               "kv_segment_ids": torch.where(torch.arange(2048) < 8 * torch.arange(16)[:, None], -1, 0)}
    for H, G, options in [(6, 6, {}), (6, 6, padding), (8, 2, {})]:
        inputs, _ = attention_inputs(16, H, G, 1, 2048, 64, grad=False)
        seconds = interleave({p: step_of(f, inputs, None, **options) for p, f in PEERS.items()}, 3 * repeats)
        table.add(f"decode / sdpa, B 16, Tk 2048, H {H}, G {G}{', left padding' if options else ''}",
                  *ratio(seconds["ours"], seconds["sdpa"]), at_least=1.3, aim=1.0, **milliseconds(seconds))

    inputs, g = attention_inputs(1, 6, 6, 4096, 4096, 64)
    packed = {"segment_ids": torch.arange(4096)[None] // 512}
    steps = {"packed": step_of(flash_attention, inputs, g, **packed), "one": step_of(flash_attention, inputs, g),
             "sdpa": step_of(sdpa_attention, inputs, g, **packed)}
    seconds = interleave(steps, max(3, repeats // 2))
    table.add("8 documents of 512 / 1 of 4096, both ours", *ratio(seconds["packed"], seconds["one"]), at_least=0.25,
              **milliseconds(seconds))

    compiled = torch.compile(flash_attention, fullgraph=True)
    for shape in [(2, 6, 1024, 64), (12, 4, 64, 32)]:
        B, H, T, D = shape
        inputs, g = attention_inputs(B, H, H, T, T, D)
        steps = {"compiled": step_of(compiled, inputs, g), "eager": step_of(flash_attention, inputs, g)}
        seconds = interleave(steps, 3 * repeats)
        table.add(f"torch.compile / eager, both ours, {shape}", *ratio(seconds["compiled"], seconds["eager"]),
                  **milliseconds(seconds))

    for causal in (True, False):  # causal tiles on the diagonal are half wasted, a larger share of short rows
        steps = {}
        for T in (2048, 8192):
            inputs, g = attention_inputs(1, 6, 6, T, T, 64)
            steps |= {f"{p} {T}": step_of(PEERS[p], inputs, g, causal=causal) for p in ("ours", "sdpa")}
        seconds = interleave(steps, max(3, repeats // 2))
        for p in ("ours", "sdpa"):
            table.add(f"growth of time, T 2048 to 8192, (1, 6, T, 64), {p}, {'' if causal else 'not '}causal",
                      *ratio(seconds[f"{p} 8192"], seconds[f"{p} 2048"]), at_least="16 +- 15 %",
                      **{f"{T} ms": statistics.median(seconds[f"{p} {T}"]) * 1e3 for T in (2048, 8192)})

    memory = Table("peak extra memory, forward + backward")
    peak = {p: in_fresh_process(attention_memory, p, (1, 4, 16384, 64)) for p in ("ours", "sdpa")}
    memory.add("ours / sdpa, (1, 4, 16384, 64)", peak["ours"] / peak["sdpa"], at_least=1.25, aim=1.0,
               **{f"{p} MB": b / 1e6 for p, b in peak.items()})
    for shape in [(1, 8), (8, 8)]:
        for p in ("ours", "sdpa"):
            peak = {T: in_fresh_process(attention_memory, p, (*shape, T, 64)) for T in (2048, 8192)}
            memory.add(f"growth, T 2048 to 8192, {(*shape, 'T', 64)}, {p}", peak[8192] / peak[2048],
                       at_least="4 +- 10 %", **{f"T {T} MB": b / 1e6 for T, b in peak.items()})

    errors = Table("largest relative error of output and gradients against 80-bit floats (ours / sdpa)")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        found = relative_errors(dtype)
        errors.add(str(dtype), found["ours"] / found["sdpa"], at_least=2, aim=1, **found)

    N, C, V = (1024, 256, 8192) if quick else (8192, 768, 50304)
    logp = Table(f"log-probabilities of targets (ours / untiled), forward + backward of a mean, N {N}, C {C}, V {V}")
    seconds = interleave({p: logp_step(p, N, C, V) for p in LOGP}, max(3, repeats // 3))
    peak = {p: in_fresh_process(logp_memory, p, N, C, V) for p in LOGP}
    for p in LOGP:
        logp.add(f"time, {p}", *ratio(seconds[p], seconds["untiled"]), at_least=1.15, aim=1.0,
                 s=statistics.median(seconds[p]))
    for p in LOGP:
        logp.add(f"memory, {p}", peak[p] / peak["untiled"], at_least=1 / 8, aim=1 / 16, MB=peak[p] / 1e6)
    return [table, memory, errors, logp]


def attention_on_gpu(repeats: int) -> list[Table]:
    """bfloat16, forward + backward, ours in eager mode and under torch.compile beside PyTorch's kernel."""
    table = Table("time (ours / sdpa), bfloat16, causal, forward + backward, GPU")
    compiled = torch.compile(flash_attention, fullgraph=True, dynamic=False)
    for B, H, T, D in [(16, 12, 1024, 64), (4, 12, 4096, 64), (1, 12, 16384, 64), (1, 12, 32768, 64)]:
        inputs, g = attention_inputs(B, H, H, T, T, D, dtype=torch.bfloat16, device="cuda")
        peers = {"ours": flash_attention, "compiled": compiled, "sdpa": sdpa_attention, "naive": naive_attention}
        if T > 8192:
            del peers["naive"]  # its scores do not fit
        steps = {p: step_of(f, inputs, g) for p, f in peers.items()}
        for step in steps.values():
            step()  # compilation and the libraries' workspaces are not the attention's memory
        peak = {f"{p} MB": extra_memory(step) / 1e6 for p, step in steps.items()}
        seconds = interleave(steps, repeats, "cuda")
        for p in ("ours", "compiled"):
            table.add(f"{p}, {(B, H, T, D)}", *ratio(seconds[p], seconds["sdpa"]), **milliseconds(seconds), **peak)
    return [table]


def bench_train(args) -> dict:
    """Whole updates (forward, backward, clip, AdamW) of a GPT, beside the same model with PyTorch's attention.

    MFU: GPT.flops_per_token x tokens per second / FLOP/s of a large square matrix product, measured in the same turns.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    B, T, layers, width = (16, 64, 2, 128) if args.quick else (16, 256, 6, 384)
    ids = torch.randint(0, 71, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(device)

    def update(attention: str, compile: bool):
        heads = 6 if width % 6 == 0 else 4
        config = GPTConfig(vocab_size=71, n_layer=layers, n_head=heads, n_embd=width, max_seq_len=T,
                           attention=attention)
        model = GPT(config)
        flops = model.flops_per_token(T) * B * T
        zero = Zero(model.to(device), units=model.units(), dtype=dtype, compile=compile)

        def step():
            zero.backward(-model(ids[:, :-1], ids[:, 1:], equal_weights=True).sum() / (B * T))
            zero.step(1e-3, 1.0)
        return step, flops

    made = {f"{attention}{', compiled' if compile else ''}": update(attention, compile)
            for attention in ("flash", "sdpa") for compile in (False, True)}
    flops = made["flash"][1]
    a = torch.randn(1024 if device.type == "cpu" else 8192, 1024 if device.type == "cpu" else 8192).to(device, dtype)
    peers = {name: step for name, (step, _) in made.items()} | {"product": lambda: [a @ a for _ in range(8)]}
    seconds = interleave(peers, args.repeats, device.type)
    product = [8 * 2 * len(a)**3 / s for s in seconds["product"]]  # FLOP/s
    table = Table(f"GPT of {layers} layers, width {width}, seq_len {T}, batch {B}, {dtype}: MFU against a product of "
                  f"{statistics.median(product) / 1e9:.0f} GFLOP/s")
    for name, least in (("flash", 0.50), ("flash, compiled", 0.62), ("sdpa", ""), ("sdpa, compiled", "")):
        mfu = sorted(flops / s / p for s, p in zip(seconds[name], product))
        middle = statistics.median(seconds[name])
        table.add(f"MFU, {name}", statistics.median(mfu), mfu[0], mfu[-1], at_least=least,
                  **{"ms": middle * 1e3, "tokens/s": B * T / middle})
    for suffix in ("", ", compiled"):
        speed = ratio(seconds["sdpa" + suffix], seconds["flash" + suffix])
        table.add(f"speed, flash / sdpa{suffix}", *speed, at_least=0.95)
    return report("train", [table])


def bench_decode(args) -> dict:
    """Tokens per second of generate: replies up to 256 tokens long, with a KV cache and by forwarding all again."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    T, start = (64, 16) if args.quick else (256, 16)
    tables = []
    for layers, heads, width in [(4, 4, 128), (6, 6, 384)]:
        models = {attention: GPT(GPTConfig(vocab_size=71, n_layer=layers, n_head=heads, n_embd=width, max_seq_len=T,
                                           attention=attention)).to(device).eval() for attention in ("flash", "sdpa")}
        millions = models["flash"].parameter_count() / 1e6
        table = Table(f"decoding, {millions:.2f} M parameters, prompts of {start} tokens")
        for B in (1, 32):
            prompts = torch.randint(0, 71, (B, start), generator=torch.Generator().manual_seed(0)).tolist()
            full = torch.randint(0, 71, (B, T), device=device)
            peers = {name: partial(generate, model, prompts, max_new_tokens=T - start)
                     for name, model in models.items()}
            with torch.inference_mode():
                seconds = interleave({**peers, "again": partial(models["flash"], full)}, args.repeats, device.type)
            rates = {name: [B * (T - start) / s for s in seconds[name]] for name in peers}
            again = [B / s for s in seconds["again"]]
            table.add(f"cache / forwarding all {T} again, batch {B}", *ratio(rates["flash"], again),
                      at_least=10 if B == 32 else "", **{"tokens/s": statistics.median(rates["flash"])})
            table.add(f"speed, flash / sdpa, batch {B}", *ratio(rates["flash"], rates["sdpa"]))
        tables.append(table)
    return report("decode", tables)


def bench_zero(args) -> dict:
    import bench_zero  # a file of its own: it starts ranks, which import it
    return bench_zero.bench_zero(args)


BENCHES = {"attention": bench_attention, "train": bench_train, "decode": bench_decode, "zero": bench_zero}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--repeats", type=int, default=9, help="turns per measurement (more for short ones)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--only", default="", help="of zero, one part: time, memory, step or fit")
    parser.add_argument("--quick", action="store_true", help="small shapes where the real ones take minutes")
    parser.add_argument("--out", default="", help="also write the figures to this JSON file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    result = BENCHES[args.bench](args)
    if args.out:
        with open(args.out + ".tmp", "w") as file:
            json.dump(result, file, indent=1)
        os.replace(args.out + ".tmp", args.out)


if __name__ == "__main__":
    main()
