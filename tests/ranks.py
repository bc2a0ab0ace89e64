"""A pool of processes that play the ranks of one job after another. `import torch` is paid once per session.

    ranks().run(3, function, *args)  ->  [function(*args) of rank 0, of rank 1, of rank 2]

function must be importable (top level of a test file). A job that does not answer in time is killed.
patience: seconds after which a collective that waits for a silent rank becomes an error.
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

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@functools.lru_cache(maxsize=1)
def warm():
    """A multiprocessing context whose processes are forks of one that has imported torch and the project."""
    os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, os.path.join(ROOT, "tests")])
    os.environ["OMP_NUM_THREADS"] = "1"
    context = mp.get_context("forkserver")
    context.set_forkserver_preload("pytest kill torch._dynamo train_pretrain train_sft train_rm train_dpo "
                                   "train_ppo".split())
    return context


@contextlib.contextmanager
def as_torchrun():
    """Inside, a member of the pool that has joined is to a script what torchrun would have started."""
    import pytest
    import torch.distributed as dist
    with pytest.MonkeyPatch.context() as patch:
        rank, world = dist.get_rank(), dist.get_world_size()
        for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", rank)):
            patch.setenv(name, str(value))
        store = dist.distributed_c10d._get_default_store()
        patch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, rank, world)]))
        patch.setattr(dist, "init_process_group", lambda *_, **__: None)
        patch.setattr(dist, "destroy_process_group", lambda: None)
        yield patch


class RankFailed(Exception):
    """.answers holds per rank ("ok", value), ("error" or "silent", text), or None if the rank died."""

    def __init__(self, answers):
        self.answers = answers
        super().__init__("\n".join(f"rank {r}: {a[1] if a else 'died'}" for r, a in enumerate(answers)))


def _play(pipe):
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
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
            dist.destroy_process_group()


class Pool:
    def __init__(self):
        self.members = []

    def run(self, world, function, *args, timeout=60, patience=20):
        self.members = [member for member in self.members if member[0].is_alive()]
        while len(self.members) < world:
            ours, theirs = warm().Pipe()
            process = warm().Process(target=_play, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.members.append((process, ours))
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
                        process.kill()
                except (EOFError, ConnectionError):  # it died
                    process.join(5)
        if any(a is None or a[0] != "ok" for a in answers):
            raise RankFailed(answers)
        return [value for _, value in answers]

    def stop(self):
        for process, pipe in self.members:
            pipe.close()
            process.kill()
            process.join()


@functools.lru_cache(maxsize=1)
def ranks() -> Pool:
    pool = Pool()
    atexit.register(pool.stop)
    return pool
