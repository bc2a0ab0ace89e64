"""The floor that every script stands on: flags, the log, errors. Nothing here is worth an experiment.

    cfg = parse(Config, argv, __doc__)   a dataclass becomes the command line; the comment behind each field is its help
    log = Log(cfg.out, env, ...)         one readable line on the screen, one JSON object per event in metrics.jsonl
    progress = Progress("replies")       how far, and how much time is left, where there is no log
    start(main)                          a UserError becomes one line on stderr and exit code 2
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import functools
import inspect
import json
import math
import os
import re
import resource
import secrets
import shutil
import sys
import time
import typing
from collections.abc import Iterator
from pathlib import Path

import torch


class UserError(Exception):
    """Something the user can mend. One line: where, what was found, what was expected, what to change."""

    def __str__(self) -> str:
        """One line, of bearable length, and nothing that moves a cursor, whatever of a file's content it quotes."""
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__()[:1000])


class Stopped(Exception):
    """All ranks leave together, as they were asked to: see Ranks.check_stop."""


class LostRanks(UserError):
    """A collective failed: what this rank was told to do may be in order."""


def start(main) -> None:
    """Run `main()` as a program: UserError -> one line and exit 2; an integer result is the exit code."""
    try:
        try:
            code = main()
        except Stopped as stopped:  # before the first step or after the last checkpoint
            env, = stopped.args
            env.close()
            code = env.exit_code
            if env.is_main:
                env.tell("stopped: nothing to save; the same command with --resume goes on", sys.stderr)
        sys.stdout.flush()
    except UserError as error:
        code, said = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, said = 130, "interrupted"
    except BrokenPipeError:
        code, said = 141, ""  # as a shell has it: whoever read our output has gone
    except OSError as error:  # where nobody has foreseen it, as a full disk under our own output
        code, said = 2, f"error: {UserError(error)}"
    else:
        sys.exit(code or 0)
    with contextlib.suppress(OSError):
        sys.stdout.flush()  # into a pipe or a file it is not by itself
    with contextlib.suppress(OSError):
        print(said, end="\n" if said else "", file=sys.stderr, flush=True)
    os._exit(code)  # not sys.exit: other ranks may wait in a collective, and a clean shutdown would wait for them


# ---- writing files ------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def writing(path, place: str = "--out"):
    """What the disk refuses becomes a line that says what to do."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path}: cannot be written: {why}; free space, or choose another {place}") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path for a file or folder, which gets its name after the block; after an error nothing is left."""
    temporary = Path(f"{path}.tmp-{secrets.token_hex(4)}")
    with writing(path, "place"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)  # or a loss of power could leave the name with nothing behind it
            os.replace(temporary, path)
        except OSError:
            if not (temporary.is_dir() and path.is_dir()):  # else another process made the same folder meanwhile
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # if it is a folder
            with contextlib.suppress(OSError):
                temporary.unlink()


def sync(path) -> None:
    """Force a file, or which files a folder holds, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep_lines(path: str, last: int) -> None:
    """A file of JSON lines made new: only those up to step `last` stay, and nothing that a crash has left of a line."""
    def stays(line: str) -> bool:
        try:
            return line.endswith("\n") and json.loads(line)["step"] <= last
        except (ValueError, KeyError, TypeError, RecursionError):
            return False

    with replacing(Path(path)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        if last and os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as old:
                file.writelines(filter(stays, old))


# ---- flags --------------------------------------------------------------------------------------------------------

def _number(kind, text: str):
    """int or float from a flag. None of ours is negative, and nan or inf would pass every later comparison."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < (2**63 if kind is int else math.inf):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a finite {kind.__name__} >= 0")
    return value


_int, _float = functools.partial(_number, int), functools.partial(_number, float)


def _pair(text: str) -> tuple[float, ...]:
    if text.count(",") != 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected two numbers with a comma between")
    pair = tuple(_float(part) for part in text.split(","))
    if max(pair) >= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected numbers below 1")
    return pair


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the whole usage and exit by itself
        raise UserError(f"{message} (see --help)")


def parse(config_class, argv=None, doc: str | None = None):
    """Command line -> an instance of the dataclass `config_class`.

    Every field is a flag `--name`; the comment behind it is the help text, one on a line of its own starts a group.
    bool fields also get `--no-name`; Literal[...] fields accept only their values. Unknown flags are an error.
    """
    parser = _Parser(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(config_class)
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    group, known = parser, set()
    classes = [c for c in config_class.__mro__ if dataclasses.is_dataclass(c)]  # a Config may inherit the model's
    for line in "\n".join(map(inspect.getsource, classes)).splitlines():
        if title := re.match(r"    # ([^\[].*)", line):  # not "[copy: ...]"
            group = parser.add_argument_group(title[1])
        match = re.match(r"    (\w+): .*?(?:  # (.*))?$", line)
        if not match or match[1] not in fields or match[1] in known or not match[2]:
            continue
        known.add(match[1])
        name, default = match[1], fields[match[1]].default
        kind = typing.get_origin(hints[name]) or hints[name]
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        options = {"default": default, "help": f"{match[2] or ''} [{shown}]".replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is typing.Literal:
            options |= {"choices": typing.get_args(hints[name]), "type": type(default)}
        else:
            options["type"], options["metavar"] = {int: (_int, "N"), float: (_float, "X"), tuple: (_pair, "X,X"),
                                                   str: (str, "TEXT")}[kind]
        group.add_argument(f"--{name}", **options)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag.lstrip("-"), [*fields, *("no-" + n for n in fields)], n=1)
        raise UserError(f"unknown argument {flag}" + (f"; did you mean --{near[0]}?" if near else " (see --help)"))
    return config_class(**vars(values))


def require_positive(cfg, *names: str) -> None:
    """UserError for the first of these flags that is 0: most counts mean "off" then, these have no off."""
    for name in names:
        if getattr(cfg, name) <= 0:
            raise UserError(f"--{name} {getattr(cfg, name)}: expected more than 0")


# ---- the log ------------------------------------------------------------------------------------------------------

def matmul_peak(device: torch.device, dtype: torch.dtype = torch.float32, size: int = 1024, repeats: int = 8) -> float:
    """FLOP/s of a plain large square matrix product here and now: the yardstick behind the MFU that a run prints."""
    size = size if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held at once: on the GPU for CUDA, resident in main memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _show(value) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if 0.1 <= abs(value) < 100 else f"{value:.4g}"


class Progress:
    """progress(done, total): on a terminal one line with the time left, which the next one overwrites; else nothing."""

    def __init__(self, what: str):
        self.what, self.start = what, time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        if sys.stdout.isatty():
            left = datetime.timedelta(seconds=round((total - done) * (time.perf_counter() - self.start) / done))
            line = f"{self.what} {done:,} of {total:,} | {left} left" if done < total else ""
            print(f"\r\033[K{line}", end="", flush=True)


class Log:
    """One JSON object per event in out/metrics.jsonl, one line on the screen; only rank 0 writes.

    env: a processes.Ranks; steps: the last step of the run; start: the step it begins after (later events of an earlier
    life are dropped, so that a resumed run has one curve); flops_per_token and peak_flops (per process): for MFU, 0
    leaves it out.
    """

    def __init__(self, out: str, env, *, steps: int, start: int = 0, flops_per_token=0.0, peak_flops=0.0):
        self.env, self.steps, self.flops_per_token, self.peak_flops = env, steps, flops_per_token, peak_flops
        self.live = env.is_main and sys.stdout.isatty()
        self.path = os.path.join(out, "metrics.jsonl")
        if env.is_main:
            keep_lines(self.path, start)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Call after evaluation and saving, so that tokens/s speaks of training alone."""
        self.clock, self.tokens, self.counted_steps = time.perf_counter(), 0, 0

    def count(self, tokens: float) -> None:
        """Tokens (over all ranks) that the step just finished has processed."""
        self.tokens, self.counted_steps = self.tokens + tokens, self.counted_steps + 1

    def train(self, step: int, **numbers) -> None:
        """A line about training; adds speed, MFU, memory and the time left."""
        seconds = max(time.perf_counter() - self.clock, 1e-9)
        rate = self.tokens / seconds
        numbers["tokens_per_second"] = rate
        if self.flops_per_token and self.peak_flops:
            numbers["mfu"] = rate * self.flops_per_token / (self.peak_flops * self.env.world)
        numbers["memory"] = peak_memory(self.env.device)
        left = datetime.timedelta(seconds=round((self.steps - step) * seconds / max(1, self.counted_steps)))
        self.event(step, live=True, left=str(left), **numbers)
        self.restart_clock()

    def event(self, step: int, live: bool = False, left: str = "", **numbers) -> None:
        """Write one event; live: on a terminal the next live line overwrites this one."""
        if not self.env.is_main:
            return
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in numbers.items()}
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")  # JSON has no nan: null
        speed, mfu, memory = (numbers.pop(k, None) for k in ("tokens_per_second", "mfu", "memory"))
        words = [f"step {step}/{self.steps}"]
        words += [f"{name} {_show(value)}" for name, value in numbers.items()]
        words += [f"{speed:,.0f} tok/s"] if speed else []
        words += [f"mfu {mfu:.0%}"] if mfu else []
        words += [f"{memory / 2**20:.0f} MiB"] if memory else []
        words += [f"{left} left"] if left else []
        self.say(" | ".join(words), live=live)

    def say(self, text: str, live: bool = False) -> None:
        """Print for the person at the screen (rank 0 only); not written to metrics.jsonl."""
        if self.env.is_main:
            self.env.tell(f"\r\033[K{text}" if self.live else text, sys.stdout, "" if self.live and live else "\n")
