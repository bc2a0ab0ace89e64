"""lib/ranks.py: several processes as one program."""
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed, as_torchrun, ranks

from lib.program import UserError
from lib.ranks import Ranks, setup, together


def sums():
    with as_torchrun():
        me = setup("cpu", catch_signals=False)
        return me.sum(me.rank + 1, torch.tensor(0.1), me.rank > 0), me.all_reduce(torch.ones(2)).tolist()


def test_sums_over_ranks_are_in_float64():
    """A float32 0.1 is not 0.1; three of them are added as what they are."""
    tenth = torch.tensor(0.1).item()
    assert ranks().run(3, sums) == [([6.0, pytest.approx(3 * tenth, rel=1e-15), 2.0], [3.0, 3.0])] * 3
    assert Ranks().sum(2, torch.tensor(0.5), True) == [2.0, 0.5, 1.0]


def make_slowly(path):
    """Whether the file was there already."""
    def make():
        found = os.path.exists(path)
        time.sleep(0.2)
        open(path, "w").close()
        return found

    return Ranks(dist.get_rank(), dist.get_world_size()).main_first(make)


def test_main_first(tmp_path):
    """Rank 0 makes the file, all others find it whole."""
    assert ranks().run(3, make_slowly, str(tmp_path / "made")) == [False, True, True]
    assert Ranks().main_first(lambda: 7) == 7


def refuse():
    raise UserError("no space")


def fail(action):
    return together(lambda: dist.get_rank() if dist.get_rank() != 1 else action())


@pytest.mark.parametrize("action, own, others", [
    (refuse, "UserError: no space", "rank 1: no space"), ({}.popitem, "KeyError: 'p", "rank 1: KeyError('p")])
def test_what_one_rank_cannot_do_all_report(action, own, others):
    """No rank waits for ever for one that met an error, foreseen or not."""
    assert ranks().run(2, fail, int) == [[0, 0]] * 2
    with pytest.raises(RankFailed) as failure:
        ranks().run(2, fail, action)
    (_, said_0), (_, said_1) = failure.value.answers
    assert f"UserError: {others}" in said_0 and own in said_1
    with pytest.raises(UserError, match="^no space$"):
        together(refuse)


def asked(number):
    with as_torchrun():
        me = setup("cpu")
        before = me.asked_to_stop()
        for one in (number, signal.SIGTERM) if me.rank == 1 else ():  # twice: torchrun passes on what it gets
            os.kill(os.getpid(), one)
        answer = before, me.asked_to_stop(), me.stop_signal
        me.close()
        return *answer, signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_rank_that_is_asked_to_stop_stops_all(number):
    assert ranks().run(2, asked, number) == [(False, True, 0, True), (False, True, number, True)]


def test_a_second_signal_means_it(capfd):
    """Within a second it is an echo of the first; after that it stops the program at once."""
    me = Ranks()
    for _ in range(3):
        me._on_signal(signal.SIGINT, None)
    assert me.stop_signal == signal.SIGINT
    assert capfd.readouterr().err.count("stopping after this step") == 1
    me.stop_time -= 2
    with pytest.raises(KeyboardInterrupt):
        me._on_signal(signal.SIGINT, None)


def start_twice(rank, port):
    """A rank that torchrun restarts: the store stays the same, and now rank 0 comes long before rank 1."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port,
             "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True}
    with pytest.MonkeyPatch.context() as patch:
        for attempt in (0, 1):
            for name, value in {**names, "TORCHELASTIC_RESTART_COUNT": attempt}.items():
                patch.setenv(name, str(value))
            time.sleep(rank * attempt)
            me = setup("cpu", catch_signals=False)
            torch.set_num_threads(1)
            found = me.sum(rank + 1), me.main_first(lambda: rank), together(lambda: rank), me.asked_to_stop()
            me.close()
    return found


def test_restarted_ranks_do_not_meet_the_dead():
    """What the first attempt left in torchrun's store, as its addresses, is not that of the second."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor() as pool:
        other = pool.submit(ranks().run, 1, start_twice, 1, store.port)
        assert start_twice(0, store.port) == ([3.0], 0, [0, 1], False)
        assert other.result() == [([3.0], 1, [0, 1], False)]


@pytest.mark.parametrize("mac", [False, True])
@pytest.mark.parametrize("local_world, threads", [(2, [4]), (20, [1]), (1, [])])
def test_threads_are_shared_among_the_ranks_of_a_machine(monkeypatch, local_world, threads, mac):
    """torchrun sets OMP_NUM_THREADS=1. 2 ranks on 8 cores take 4 threads each. One alone changes nothing. A
    Mac has no sched_getaffinity."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr("os.cpu_count", lambda: 8 if mac else 99)
    if mac:
        monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world))
    assert setup("cpu", catch_signals=False).world == 1 and chosen == threads


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:99"])
def test_an_unknown_device_is_a_user_error(device):
    with pytest.raises(UserError, match=f"--device {device}: expected auto, cuda or one of cpu"):
        setup(device)
    assert setup(catch_signals=False).device.type in ("cpu", "cuda")
