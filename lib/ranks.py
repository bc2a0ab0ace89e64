"""Several processes as one program: who is here, what they add up, who is lost, who was asked to stop.

    env = setup(cfg.device)              ranks, device, threads, stop signals; works with `python` and with `torchrun`
    env.sum(...), env.barrier()          collectives that name the rank that died, hangs or raised an error
    together(action)                     all do it, or all raise
"""
from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from lib.program import LostRanks, Stopped, UserError


@dataclasses.dataclass
class Ranks:
    """Where this process stands. One process is rank 0 of world 1 and uses no torch.distributed at all."""
    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    stop_signal: int = 0           # the signal that asked us to stop (0: none); agree on it with `sum` before acting
    stop_time: float = 0.0         # when it came
    old_handlers: dict = dataclasses.field(default_factory=dict, repr=False)  # they hold the Ranks before: 2^n to print

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

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over all ranks, in x's dtype, on the device; x itself with one rank."""
        x = x.to(self.device)
        if self.world > 1:
            with naming_lost_ranks("all_reduce"):
                dist.all_reduce(x)
        return x

    def asked_to_stop(self) -> bool:
        """Whether any rank was: all ranks get one answer."""
        return bool(self.sum(self.stop_signal != 0)[0])

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
    """Run action() (None: nothing to do) on every rank; returns all results in rank order. If one fails, all raise.
    Checkpoints are made and read so."""
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


def setup(device: str = "auto", timeout: float = 600.0, catch_signals: bool = True) -> Ranks:
    """Join the process group that torchrun describes in the environment (or none), pick device and thread count.

    timeout: seconds after which a collective whose peer died or hangs becomes an error instead of waiting for ever.
    catch_signals: SIGTERM and Ctrl-C ask to stop (Ranks.stop_signal); off: they stop the program at once.
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
    env = Ranks(rank, world, local_rank, local_world, chosen)
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
