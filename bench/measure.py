"""How all of bench/ measures, and the command line that its programs share.

Peers take turns (A B A B ...), so that a noisy neighbour slows all of them alike. A time is a median. A ratio
is the median of the ratios within one turn, with its quartiles. Memory is the peak of a fresh process.
"""
import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import time

import torch

from lib.program import UserError, parse

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


@dataclasses.dataclass
class Config:
    repeats: int = 9  # turns per measurement, at least 2; short measurements take more
    threads: int = 0  # CPU threads; 0: one per core
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


def process_memory(field: str) -> int:
    """Bytes of this process: VmRSS (resident now), VmHWM (resident at its peak) or VmData (private)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def peak_memory(function, device: str = DEVICE) -> tuple[int, int]:
    """Bytes that this process holds at its peak while function() runs, and how many more than before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        before, peak = process_memory("VmRSS"), lambda: process_memory("VmHWM")
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM starts anew; if that is forbidden, the process's start counts too
    function()
    return peak(), peak() - before


def in_fresh_process(function, *args):
    """function(*args), where no memory freed earlier is used again. CUDA's own count needs no such care."""
    if DEVICE == "cuda":
        return function(*args)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


class Table:
    """Rows of figures, printed as they come (markdown)."""

    def __init__(self, title: str):
        self.rows = []
        print(f"\n{title}\n\n| what | measured | besides |\n|---|---|---|", flush=True)

    def add(self, what: str, value: float, low=None, high=None, **details) -> None:
        """value: ours / peer unless `what` says otherwise; low, high: its spread; details: more figures."""
        spread = "" if low is None else f" ({low:.2f}..{high:.2f})"
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in details.items()}
        besides = ", ".join(f"{k} {v}" for k, v in shown.items())
        print(f"| {what} | {value:.3g}{spread} | {besides} |", flush=True)
        self.rows.append({"what": what, "value": value, "low": low, "high": high, **details})

    def compare(self, what: str, seconds: dict[str, list[float]], ours: str, peer: str, **details) -> None:
        """One row: the ratio of two times, its quartiles over the turns, and the median of every time."""
        low, median, high = statistics.quantiles([a / b for a, b in zip(seconds[ours], seconds[peer])], n=4)
        times = {f"{name} ms": statistics.median(some) * 1e3 for name, some in seconds.items()}
        self.add(what, median, low, high, **times, **details)


def run(doc: str, argv=None, **parts) -> None:
    """The program: all parts, or the one that --only names. A part is a function of cfg; it prints tables."""
    cfg = parse(Config, argv, doc)
    if cfg.only not in ("", *parts):
        raise UserError(f"--only {cfg.only}: expected one of {', '.join(parts)}")
    torch.set_num_threads(cfg.threads or os.cpu_count())
    print(f"torch {torch.__version__} on {DEVICE}, load average {os.getloadavg()[0]:.1f}")
    for part in [parts[cfg.only]] if cfg.only else parts.values():
        part(cfg)
