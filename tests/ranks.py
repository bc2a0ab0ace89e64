"""A pool of processes that play the ranks of one job after another, so that `import torch` is paid once per test
session.

    ranks().run(3, function, *args)  ->  [function(*args) of rank 0, of rank 1, of rank 2]

function must be importable (top level of a test file). A job that does not answer within its timeout is killed.
patience: seconds after which a collective whose peer is silent becomes an error.
"""
import atexit
import contextlib
import datetime
import functools
import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback

ANSWER_SECONDS = 60


@contextlib.contextmanager
def as_torchrun():
    """Inside, a member of the pool that has joined is to a script what torchrun would have started."""
    import pytest
    import torch.distributed as dist
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", dist.get_rank()), ("WORLD_SIZE", dist.get_world_size()),
                            ("LOCAL_RANK", dist.get_rank())):
            patch.setenv(name, str(value))
        store = dist.distributed_c10d._get_default_store()
        patch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, dist.get_rank(), dist.get_world_size())]))
        patch.setattr(dist, "init_process_group", lambda *_, **__: None)
        patch.setattr(dist, "destroy_process_group", lambda: None)
        yield patch


class RankFailed(Exception):
    """Some ranks raised; .answers holds per rank ("ok", value), ("error" or "silent", text), or None of a rank that
    died."""

    def __init__(self, answers):
        self.answers = answers
        failed = [f"rank {r}: {a[1] if a else 'died'}" for r, a in enumerate(answers) if not a or a[0] != "ok"]
        super().__init__("\n".join(failed))


def _play(pipe):
    import torch
    import torch.distributed as dist

    from lib.ranks import RollCall
    torch.set_num_threads(1)
    pipe.send_bytes(b"ready")
    while True:
        try:
            rank, world, folder, patience, function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            if world > 1:
                store = dist.FileStore(os.path.join(folder, "store"), world)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=world,
                                        timeout=datetime.timedelta(seconds=patience))
            answer = ("ok", function(*args))
            if world > 1:
                dist.barrier()
        except BaseException:
            answer = ("error", traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
        if dist.is_initialized():
            RollCall.stop()
            dist.destroy_process_group()


class Ranks:
    def __init__(self):
        self.context, self.members = mp.get_context("spawn"), []

    def _start(self, n):
        started = []
        while len(self.members) < n:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_play, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.members.append((process, ours))
            started.append(ours)
        for pipe in started:
            pipe.recv_bytes()

    def run(self, world, function, *args, timeout=ANSWER_SECONDS, patience=20):
        self.members = [m for m in self.members if m[0].is_alive()]
        self._start(world)
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(self.members[:world]):
                pipe.send_bytes(pickle.dumps((rank, world, folder, patience, function, args)))
            answers, end = [None] * world, time.monotonic() + timeout
            for rank, (process, pipe) in enumerate(self.members[:world]):
                try:
                    if pipe.poll(max(0.0, end - time.monotonic())):
                        answers[rank] = pickle.loads(pipe.recv_bytes())
                    else:
                        answers[rank] = ("silent", f"no answer in {timeout} s")
                except (EOFError, ConnectionError):
                    process.join(5)  # it died
        if any(a is None or a[0] != "ok" for a in answers):
            for (process, _), answer in zip(self.members, answers):
                if answer and answer[0] == "silent":
                    process.kill()
                    process.join()
            raise RankFailed(answers)
        return [value for _, value in answers]

    def stop(self):
        for process, pipe in self.members:
            pipe.close()
            process.kill()
            process.join()
        self.members = []


@functools.lru_cache(maxsize=1)
def ranks() -> Ranks:
    pool = Ranks()
    atexit.register(pool.stop)
    return pool
