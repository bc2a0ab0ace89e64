"""The floor: flags, the log, sums over ranks, errors as one line."""
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from ranks import ranks

from lib.program import Log, UserError, keep_lines, matmul_peak, parse, replacing, require_positive
from lib.ranks import Ranks, RollCall, setup


@dataclass
class Base:
    width: int = 8  # C


@dataclass
class Config(Base):
    # data
    data: str = "stdlib"  # corpus, 10 % of it for validation
    # optimisation
    lr: float = 4e-3  # peak
    betas: tuple[float, float] = (0.9, 0.95)  # of Adam
    zero: Literal[0, 1, 2] = 0  # stage
    resume: bool = False  # go on
    mask: bool = True  # on


def test_every_kind_of_field_is_a_flag():
    cfg = parse(Config, ["--lr", "1", "--betas", "0.8,0.9", "--zero", "2", "--resume", "--no-mask", "--width", "3"])
    assert cfg == Config(width=3, lr=1.0, betas=(0.8, 0.9), zero=2, resume=True, mask=False)
    assert isinstance(cfg.lr, float) and isinstance(cfg.zero, int)
    assert parse(Config, []) == Config()


@pytest.mark.parametrize("arguments, said", [
    (["--lr", "fast"], "'fast', expected a finite float"), (["--lr", "nan"], "--lr"), (["--lr", "-1"], "--lr"),
    (["--lr", "inf"], "--lr"), (["--width", "1.5"], "expected a finite int"), (["--width", "-1"], "--width"),
    (["--betas", "0.9"], "comma"), (["--betas", "0.9,1"], "below 1"), (["--width", "1" * 30], "--width"),
    (["--zero", "3"], "--zero"), (["--lrr", "1"], "did you mean --lr?"),
    (["--no-masc"], "did you mean --no-mask?"), (["--qqqq"], "--help"), (["--lr"], "--lr"), (["text"], "text")])
def test_bad_flags_are_one_clear_line(arguments, said):
    with pytest.raises(UserError) as error:
        parse(Config, arguments)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_help_shows_groups_comments_and_defaults(capsys):
    """The comment behind a field is its help, own and inherited; a comment on its own line is a heading."""
    with pytest.raises(SystemExit):
        parse(Config, ["--help"], "what it does")
    shown = capsys.readouterr().out
    for words in ("what it does", "data:", "optimisation:", "corpus, 10 % of it for validation [stdlib]", "[0.9,0.95]",
                  "C [8]", "{0,1,2}", "--mask, --no-mask"):
        assert words in shown


def test_counts_without_an_off_value_are_refused_at_zero():
    require_positive(Config(), "width")
    with pytest.raises(UserError, match="--width 0"):
        require_positive(Config(width=0), "width")


def test_log_keeps_one_curve_over_a_resume(tmp_path, capsys):
    """Events go to metrics.jsonl; a run that resumes after step 2 drops what an earlier life wrote beyond it, and a
    last line that was cut short."""
    env = Ranks(0, 1, 0, 1, torch.device("cpu"))
    log = Log(str(tmp_path), env, steps=4, flops_per_token=1e6, peak_flops=1e9)
    for step in (1, 2, 3):
        log.count(100)
        log.train(step, loss=1.0 / step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(f'garbage\n{"[" * 10**5}\n{{"step": 1}}{{\n{{"step": 1, "lo')
    log = Log(str(tmp_path), env, steps=4, start=2)
    log.event(3, loss=0.5, grad_norm=float("nan"))
    events = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert [(e["step"], e["loss"]) for e in events] == [(1, 1.0), (2, 0.5), (3, 0.5)]
    assert events[-1]["grad_norm"] is None  # JSON has no nan
    rate = events[0]["tokens_per_second"]
    assert rate > 0 and events[0]["mfu"] == pytest.approx(rate * 1e6 / 1e9) and events[0]["memory"] > 2**20
    assert "step 1/4 | loss 1.0000" in capsys.readouterr().out


def test_replaced_files_are_on_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    """Renamed first, a loss of power could leave the new name with nothing behind it, and the old file gone."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{d}"))),
                                                fsync(d)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("replaced"), replace(old, new)))
    for name in ("file", "folder"):
        with replacing(tmp_path / name) as temporary:
            temporary.mkdir() if name == "folder" else temporary.write_text("text")
        assert calls == [temporary.name, "replaced"] and (tmp_path / name).exists()
        calls.clear()
    keep_lines(str(tmp_path / "metrics.jsonl"), 1)
    assert len(calls) == 2


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = Log(str(tmp_path), Ranks(1, 2, 1, 2, torch.device("cpu")), steps=1)
    log.event(1, loss=1.0)
    log.say("hello")
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_sum_of_one_rank_is_the_number_itself():
    env = setup("cpu")
    assert env.sum(2, torch.tensor(0.5), True) == [2.0, 0.5, 1.0]
    env.close()


def make_slowly(path):
    """Whether the file was there already."""
    def make():
        found = os.path.exists(path)
        if not found:
            time.sleep(0.5)
            open(path, "w").close()
        return found

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return Ranks(rank, world, rank, world, torch.device("cpu")).main_first(make)


def test_main_first(tmp_path):
    """Rank 0 makes the file, all others find it whole."""
    assert ranks().run(3, make_slowly, str(tmp_path / "made")) == [False, True, True]


def start_again(port):
    """Ranks that torchrun restarts: its store is the same, and this time rank 0 is there long before rank 1."""
    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    with pytest.MonkeyPatch.context() as patch:
        for attempt in (0, 1):
            for name, value in {**names, "TORCHELASTIC_RESTART_COUNT": attempt}.items():
                patch.setenv(name, str(value))
            time.sleep(2 * rank * attempt)
            env = setup("cpu", timeout=30, catch_signals=False)
            torch.set_num_threads(1)
            total = env.sum(rank + 1)
            if attempt == 0:
                RollCall.stop()
                torch.distributed.destroy_process_group()
    return total


def test_restarted_ranks_do_not_meet_the_dead():
    """What the ranks of the first attempt left in torchrun's store, as their addresses, is not that of the second."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert ranks().run(2, start_again, store.port) == [[3.0], [3.0]]


def test_threads_are_shared_among_the_ranks_of_a_machine(monkeypatch):
    """torchrun sets OMP_NUM_THREADS=1; with 2 ranks on 8 cores each takes 4 threads, with more ranks than cores one."""
    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    try:
        for local_world, threads in ((2, 4), (20, 1), (1, 1)):
            torch.set_num_threads(1)
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world))
            setup("cpu", catch_signals=False)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_unknown_device_is_a_user_error():
    with pytest.raises(UserError, match="--device abacus"):
        setup("abacus")


def test_peak_is_a_plausible_speed():
    assert 1e8 < matmul_peak(torch.device("cpu"), size=256) < 1e14


def test_a_user_error_is_one_short_line_whatever_it_quotes():
    assert str(UserError("a\n\x1b[2Jb 你" + "c" * 10**6)) == "a\\n\\x1b[2Jb 你" + "c" * 991


def test_run_turns_user_errors_into_exit_code_2(monkeypatch):
    """UserError: one line on stderr and 2; an integer result is the exit code; other errors keep their traceback. What
    was printed before reaches the pipe. Ranks that are lost while all leave as asked to are an error as well."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    program = """
from lib.program import LostRanks, Stopped, UserError, start
class Peerless:
    def close(self):
        raise LostRanks("rank 1 died")
def main():
    print("before")
    {}
start(main)"""
    for body, code, said in (("raise UserError('found this')", 2, "error: found this\n"), ("return 130", 130, ""),
                             (r"raise UserError('a\n\x1b[2Jb' + 'c' * 10**6)", 2, f"error: a\\n\\x1b[2Jb{'c' * 993}\n"),
                             ("raise OSError(28, 'No space left')", 2, "error: [Errno 28] No space left\n"),
                             ("open('no/such')", 2, "error: [Errno 2] No such file or directory: 'no/such'\n"),
                             ("raise Stopped(Peerless())", 2, "error: rank 1 died\n"),
                             ("pass", 0, ""), ("raise KeyError(1)", 1, "KeyError")):
        result = subprocess.run([sys.executable, "-c", program.format(body)], capture_output=True, text=True,
                                cwd=__file__.rsplit("/", 2)[0])
        assert result.returncode == code and (said in result.stderr if code == 1 else said == result.stderr)
        assert result.stdout == "before\n"


@pytest.mark.parametrize("flush", [True, False])
def test_a_full_disk_under_what_is_printed_is_one_line(flush):
    """python train_...py > log, where the log's disk is full: at a print, or only at the end."""
    program = f"from lib.program import start\nstart(lambda: print('x', flush={flush}))"
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True,
                                cwd=__file__.rsplit("/", 2)[0])
    assert (result.returncode, result.stderr) == (2, "error: [Errno 28] No space left on device\n")


PIPED = """
import os, signal, sys
from lib.program import Log, start
from lib.ranks import setup
def main():
    env = setup("cpu")
    log = Log(sys.argv[1], env, steps=2)
    sys.stdin.read()  # until the reader of our output has gone
    if sys.argv[2] == "asked":
        os.kill(os.getpid(), signal.SIGINT)
    log.event(1, loss=1.0)
    open(os.path.join(sys.argv[1], "saved"), "w").close()
    log.say("saved")
    env.close()
    return env.exit_code
start(main)
"""


@pytest.mark.parametrize("asked, code, left", [("asked", 130, ["metrics.jsonl", "saved"]),
                                               ("not asked", 141, ["metrics.jsonl"])])
def test_what_reads_our_output_dies_of_the_same_ctrl_c(tmp_path, asked, code, left):
    """`python train_...py 2>&1 | tee log`: Ctrl-C ends tee as well, and what we then print has no reader. The run goes
    on to its save. A reader that leaves by itself, as head, ends the run as ever."""
    process = subprocess.Popen([sys.executable, "-c", PIPED, str(tmp_path), asked], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=__file__.rsplit("/", 2)[0])
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == code and sorted(os.listdir(tmp_path)) == left
