"""The floor that every script stands on: flags, processes, the log, errors. Nothing here is worth an experiment.

    cfg = parse(Config, argv, __doc__)   a dataclass becomes the command line; the comment behind each field is its help
    env = setup(cfg.device)              ranks, device, threads, stop signals; works with `python` and with `torchrun`
    log = Log(cfg.out, env, ...)         one readable line on the screen, one JSON object per event in metrics.jsonl
    run(main)                            a UserError becomes one line on stderr and exit code 2
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
import signal
import sys
import threading
import time
import typing
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist


class UserError(Exception):
    """Something the user can mend. One line: where, what was found, what was expected, what to change."""

    def __str__(self) -> str:
        """One line, of bearable length, and nothing that moves a cursor, whatever of a file's content it quotes."""
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__()[:1000])


class Stopped(Exception):
    """All ranks leave together, as they were asked to: see Env.check_stop."""


class LostRanks(UserError):
    """A collective failed: what this rank was told to do may be in order."""


def run(main) -> None:
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
        if not match or match[1] not in fields or match[1] in known:
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


# ---- processes ----------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Env:
    """Where this process stands. One process is rank 0 of world 1 and uses no torch.distributed at all."""
    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    stop_signal: int = 0           # the signal that asked us to stop (0: none); agree on it with `sum` before acting
    stop_time: float = 0.0         # when it came
    old_handlers: dict = dataclasses.field(default_factory=dict, repr=False)  # they hold the Env before: 2^n to print

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as a shell expects; 0 after SIGTERM: to save and leave when asked to is no failure."""
        return 130 if self.stop_signal == signal.SIGINT else 0

    def sum(self, *numbers) -> list[float]:
        """Sum each number (or 0-dim tensor) over all ranks, in float64, with a single collective."""
        total = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=self.device).detach() for n in numbers])
        if self.world > 1:
            with naming_lost_ranks("sum"):
                dist.all_reduce(total)
        return total.tolist()

    def check_stop(self) -> None:
        """Leave here, by Stopped, if any rank was asked to stop: for long work that a resumed run does again, as an
        evaluation. All ranks must call it equally often."""
        if self.sum(self.stop_signal != 0)[0]:
            raise Stopped(self)

    def stopped_in(self, action, *args) -> bool:
        """Run action(*args); whether it was left by check_stop()."""
        try:
            action(*args)
        except Stopped:
            return True
        return False

    def barrier(self) -> None:
        if self.world > 1:
            with naming_lost_ranks("barrier"):
                dist.barrier()

    def main_first(self, action):
        """action(), on rank 0 before all others: what it makes, as a file, the others find made."""
        for turn in (True, False):
            if self.is_main == turn:
                result = action()
            self.barrier()
        return result

    def close(self) -> None:
        if self.world > 1:
            self.barrier()  # leaving while a peer still talks to us is how gloo aborts at exit
            RollCall.stop()
            dist.destroy_process_group()
        for number, handler in self.old_handlers.items():  # last: the second of two signals may still be coming
            signal.signal(number, handler)

    def _on_signal(self, number, frame) -> None:
        if self.stop_signal:
            if time.monotonic() - self.stop_time < 1:  # one request: schedulers signal every process of a job, and
                return                                 # torchrun passes on to its ranks what it gets itself
            raise KeyboardInterrupt  # the second one means it
        self.stop_signal, self.stop_time = number, time.monotonic()
        if self.is_main:
            self.tell("\nstopping after this step; once more to stop at once", sys.stderr)

    def tell(self, text: str, stream, end: str = "\n") -> None:
        """Print. Where the same Ctrl-C that asks us to stop has ended our reader, as tee, the save must still come."""
        try:
            print(text, end=end, file=stream, flush=True)
        except OSError:
            if not self.stop_signal:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class RollCall(threading.Thread):
    """While this rank waits in a collective, answers another one that asks who is still there.

    A backend tells only the neighbours of a lost rank. All others sit in their collective, where no Python runs, until
    those neighbours leave or the timeout comes.
    """
    current = None  # of this process group

    def __init__(self):
        super().__init__(daemon=True)
        self.store, self.rank, self.waits_in = dist.distributed_c10d._get_default_store(), dist.get_rank(), ""

    def run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store has gone, and the job with it
            while RollCall.current is self:
                time.sleep(0.25)
                if self.waits_in and self.store.check(["alarm"]):
                    self.store.set(f"here/{self.rank}", "yes")

    @classmethod
    def stop(cls) -> None:
        """Let the thread end: one that is in the store while the interpreter leaves aborts the process."""
        thread, cls.current = cls.current, None
        if thread:
            thread.join()

    def lost_ranks(self) -> list[str]:
        """Sound the alarm and see who answers. The store is that of the rendezvous; torchrun's outlives the ranks."""
        try:
            self.store.set("alarm", "now")
            self.store.set(f"here/{self.rank}", "yes")
            time.sleep(2)
            return [str(r) for r in range(dist.get_world_size()) if not self.store.check([f"here/{r}"])]
        except RuntimeError:
            return ["0"]  # which served the store, without torchrun


@contextlib.contextmanager
def naming_lost_ranks(what: str):
    """Turn a failed collective into a LostRanks that says which ranks did not take part."""
    call = RollCall.current
    if call is None or call.store is not dist.distributed_c10d._get_default_store():  # the first collective
        call = RollCall.current = RollCall()
        call.start()
    call.waits_in = what
    try:
        yield
    except RuntimeError as error:
        lost = call.lost_ranks()
        who = f"rank {lost[0]} died, hangs or raised an error" if len(lost) == 1 else \
            f"one or more of the ranks {', '.join(lost)} died, hang or raised an error" if lost else \
            "all ranks are there, but lost their connection"
        raise LostRanks(f"{what} failed on rank {call.rank}: {who} ({str(error).splitlines()[0][:200]})") from error
    finally:
        call.waits_in = ""


def together(action) -> list:
    """Run action() (None: nothing to do) on every rank; returns all results in rank order. If one fails, all raise."""
    inside = dist.is_available() and dist.is_initialized()
    bug, world = None, dist.get_world_size() if inside else 1
    try:
        mine = (True, action() if action else None)
    except Exception as error:  # whatever it is: the others wait below
        expected = isinstance(error, (UserError, OSError, RuntimeError))
        bug, mine = None if expected else error, (False, str(error) if expected else repr(error))
    everyone = [mine] * world
    if world > 1:
        with naming_lost_ranks("checkpoint"):
            dist.all_gather_object(everyone, mine)
    if bug:
        raise bug  # with its traceback
    for r, (done, result) in enumerate(everyone):
        if not done:
            raise UserError(result if world == 1 else f"rank {r}: {result}")
    return [result for _, result in everyone]


def setup(device: str = "auto", timeout: float = 600.0, catch_signals: bool = True) -> Env:
    """Join the process group that torchrun describes in the environment (or none), pick device and thread count.

    timeout: seconds after which a collective whose peer died or hangs becomes an error instead of waiting for ever.
    catch_signals: SIGTERM and Ctrl-C ask to stop (Env.stop_signal); off: they stop the program at once.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this PyTorch sees no CUDA device; use --device cpu")
    if device == "cuda":
        device = f"cuda:{local_rank % torch.cuda.device_count()}"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if local_world > 1:  # torchrun sets OMP_NUM_THREADS=1, which leaves most cores idle
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    env = Env(rank, world, local_rank, local_world, chosen)
    if world > 1:
        alone = chosen.type == "cuda" and local_world <= torch.cuda.device_count()  # NCCL wants a GPU for each rank
        backend = "nccl" if alone else "gloo"
        # NCCL's calls return before anything is sent, and on a timeout its watchdog kills the process, which could then
        # not say who was lost. Waiting on the host turns that into an exception. The price is small: a kernel launch
        # or two later per unit.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        patience = datetime.timedelta(seconds=timeout)
        # torchrun's store outlives the ranks: restarted ones must not find the addresses and alarms of the dead in it.
        # Several machines do not count restarts alike; docs/reliability.md says what they need.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if local_world == world else "0"
        store, *_ = next(dist.rendezvous("env://", timeout=patience))
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    for number in (signal.SIGTERM, signal.SIGINT) if catch_signals else ():
        env.old_handlers[number] = signal.signal(number, env._on_signal)
    return env


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


class Log:
    """One JSON object per event in out/metrics.jsonl, one line on the screen; only rank 0 writes.

    steps: the last step of the run; start: the step it begins after (later events of an earlier life are dropped, so
    that a resumed run has one curve); flops_per_token and peak_flops (per process): for MFU, 0 leaves it out.
    """

    def __init__(self, out: str, env: Env, *, steps: int, start: int = 0, flops_per_token=0.0, peak_flops=0.0):
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
