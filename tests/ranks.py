"""A pool of processes that play the ranks of one job after another, so that `import torch` is paid once per test session.

    ranks().run(3, function, *args)  ->  [function(*args) of rank 0, of rank 1, of rank 2]

function must be importable (top level of a test file). A job that does not answer within its timeout is killed.
"""
import atexit
import datetime
import functools
import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback

ANSWER_SECONDS = 60
COLLECTIVE_SECONDS = 8


class RankFailed(Exception):
    """Some ranks raised; .answers holds per rank ("ok", value), ("error", text), or None of a rank that died."""

    def __init__(self, answers):
        self.answers = answers
        super().__init__("\n".join(f"rank {r}: {a[1] if a else 'died'}" for r, a in enumerate(answers) if not a or a[0] != "ok"))


def _play(pipe):
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    while True:
        try:
            rank, world, folder, function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            if world > 1:
                store = dist.FileStore(os.path.join(folder, "store"), world)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=world,
                                        timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS))
            answer = ("ok", function(*args))
            if world > 1:
                dist.barrier()
        except BaseException:
            answer = ("error", traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
        if dist.is_initialized():
            dist.destroy_process_group()


class Ranks:
    def __init__(self):
        self.context, self.members = mp.get_context("spawn"), []

    def _start(self, n):
        while len(self.members) < n:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_play, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.members.append((process, ours))

    def run(self, world, function, *args, timeout=ANSWER_SECONDS):
        self.members = [m for m in self.members if m[0].is_alive()]
        self._start(world)
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(self.members[:world]):
                pipe.send_bytes(pickle.dumps((rank, world, folder, function, args)))
            answers, end = [None] * world, time.monotonic() + timeout
            for rank, (process, pipe) in enumerate(self.members[:world]):
                try:
                    if pipe.poll(max(0.0, end - time.monotonic())):
                        answers[rank] = pickle.loads(pipe.recv_bytes())
                    else:
                        answers[rank] = ("error", f"no answer in {timeout} s")
                except (EOFError, ConnectionError):
                    process.join(5)  # it died
        if any(a is None or a[0] != "ok" for a in answers):
            self.stop()  # their connections are in an unknown state
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
