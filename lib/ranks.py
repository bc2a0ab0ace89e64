"""Several processes as one program.

    ranks = setup(cfg.device)    works the same under `python` and under `torchrun`
    total, = ranks.sum(n)        the sum over all processes, the same on each
    together(action)             every rank does it, or every rank raises
"""
import datetime
import os
import signal
import time

import torch
import torch.distributed as dist

from lib.program import UserError

PATIENCE = datetime.timedelta(minutes=10)  # who waits longer for a dead or hanging rank ends with an error


class Ranks:
    """Where this process stands. Without torchrun it is rank 0 of world 1 and uses no torch.distributed."""
    def __init__(self, rank: int = 0, world: int = 1, device: str | torch.device = "cpu"):
        self.rank, self.world, self.device, self.is_main = rank, world, torch.device(device), rank == 0
        self.stop_signal, self.stop_time = 0, 0.0  # the signal that asked this very rank to stop, and when

    def sum(self, *numbers) -> list[float]:
        """Sum each number (or tensor of one number) over all ranks: one collective, in float64."""
        parts = [torch.as_tensor(n, dtype=torch.float64, device=self.device).detach() for n in numbers]
        return self.all_reduce(torch.stack(parts)).tolist()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over all ranks, on the device and in x's dtype. It may overwrite x."""
        x = x.to(self.device)
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all ranks. All must call it."""
        return self.sum(self.stop_signal != 0)[0] > 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def main_first(self, action):
        """action() on rank 0, then on the others: a file that it makes, they find."""
        result = action() if self.is_main else None
        self.barrier()
        return result if self.is_main else action()

    def close(self) -> None:
        """The ranks leave together: gloo aborts a process that leaves while a peer still talks to it."""
        if self.world > 1:
            self.barrier()
            dist.destroy_process_group()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _on_signal(self, number, frame) -> None:
        if not self.stop_signal:
            self.stop_signal, self.stop_time = number, time.monotonic()
            os.write(2, b"\nstopping after this step; once more to stop at once\n" * self.is_main)
        elif time.monotonic() - self.stop_time > 1:  # earlier it is no second request, but torchrun's echo
            raise KeyboardInterrupt


def together(action) -> list:
    """Run action() on all ranks; returns the results of all. If it fails on one, all raise."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    try:
        mine, error = (action(), ""), None
    except Exception as found:  # whatever it is: the other ranks wait below
        mine, error = (None, str(found) if isinstance(found, UserError) else repr(found)), found
    everyone = [mine] * world
    if world > 1:
        dist.all_gather_object(everyone, mine)
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(everyone) if text]
    if error or failures:
        raise error or UserError(failures[0])
    return [result for result, _ in everyone]


def setup(device: str = "auto", catch_signals: bool = True) -> Ranks:
    """Join the ranks that torchrun has started (or none); choose the device and the number of threads.
    catch_signals: SIGTERM and Ctrl-C only ask to stop, see asked_to_stop(). Off: they end the program."""
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world, local_world = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    gpus = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    if device == "auto" or (device == "cuda" and gpus):
        device = gpus[local_rank % len(gpus)] if gpus else "cpu"
    if device not in ("cpu", *gpus):
        raise UserError(f"--device {device}: expected auto, cuda or one of {', '.join(['cpu', *gpus])}")
    if device != "cpu":
        torch.cuda.set_device(device)
    if local_world > 1:  # torchrun sets OMP_NUM_THREADS=1, which leaves most cores idle
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS
        torch.set_num_threads(max(1, cores // local_world))
    if world > 1:
        # torchrun's store outlives the ranks: after a restart it still holds the addresses of the dead ones,
        # so each attempt has names of its own. (Several machines do not count their restarts alike.)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if local_world == world else "0"
        store = dist.PrefixStore(f"attempt-{attempt}", next(dist.rendezvous("env://", timeout=PATIENCE))[0])
        backend = "nccl" if device != "cpu" and local_world <= len(gpus) else "gloo"  # NCCL: a GPU per rank
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    ranks = Ranks(rank, world, device)
    for number in (signal.SIGTERM, signal.SIGINT) if catch_signals else ():
        signal.signal(number, ranks._on_signal)
    return ranks
