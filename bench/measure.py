"""How all of bench/ measures, and the command line that its programs share.

Peers take turns (A B A B ...), so that a noisy neighbour slows all of them alike. A time is a median. A ratio
is the median of the ratios within one turn, with its quartiles. Memory is the peak of a fresh process.
"""
import contextlib
import multiprocessing
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lib.program import UserError, parse

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


@dataclass
class Config:
    repeats: int = 9  # turns per measurement, at least 2; short measurements take more
    only: str = ""  # one part alone
    quick: bool = False  # small shapes where the real ones take minutes


def interleave(functions: dict, repeats: int, before=lambda: None) -> dict[str, list[float]]:
    """{name: [seconds]}: call every function once per turn, in one turn of warm-up and `repeats` that count.
    before() is called ahead of each function; its time does not count."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            before()
            start = time.perf_counter()
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: some[1:] for name, some in seconds.items()}


def resident(field: str) -> int:
    """Bytes of main memory that this process holds now (VmRSS) or held at its peak (VmHWM)."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def peak_memory(function, device: str = DEVICE) -> tuple[int, int]:
    """Bytes that this process holds at its peak while function() runs, and how many more than before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        before, peak = resident("VmRSS"), lambda: resident("VmHWM")
        with contextlib.suppress(OSError):  # if this is forbidden, the process's start counts too
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    function()
    return peak(), peak() - before


def in_fresh_process(function, *args):
    """function(*args), where no memory freed earlier is used again. CUDA's own count needs no such care."""
    if DEVICE == "cuda":
        return function(*args)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def head(title: str) -> None:  # of a markdown table
    print(f"\n{title}\n\n| what | measured | besides |\n|---|---|---|", flush=True)


def row(what: str, value: float, spread: str = "", **besides: float) -> None:
    more = ", ".join(f"{name} {figure:.4g}" for name, figure in besides.items())
    print(f"| {what} | {value:.3g}{spread} | {more} |", flush=True)


def compare(what: str, seconds: dict[str, list[float]], above: str, below: str, scale=1.0, **besides):
    """A row: the ratio of two times, times scale, with its quartiles over the turns; and both medians."""
    ratios = [scale * a / b for a, b in zip(seconds[above], seconds[below])]
    low, median, high = statistics.quantiles(ratios, n=4)
    times = {f"{name} ms": 1e3 * statistics.median(seconds[name]) for name in (above, below)}
    row(f"{what}, {above} / {below}", median, f" ({low:.2f}..{high:.2f})", **times, **besides)


def run(doc: str, argv=None, **parts) -> None:
    """The program: all parts, or the one that --only names. A part is a function of cfg; it prints tables."""
    cfg = parse(Config, argv, doc)
    if cfg.only not in ("", *parts):
        raise UserError(f"--only {cfg.only}: expected one of {', '.join(parts)}")
    print(f"torch {torch.__version__} on {DEVICE}, load average {os.getloadavg()[0]:.1f}")
    for part in [parts[cfg.only]] if cfg.only else parts.values():
        part(cfg)
