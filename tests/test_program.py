"""lib/program.py: flags, errors as one line, files that are written whole."""
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

import evaluate
from lib.program import UserError, keep_lines, parse, replacing, require_positive, start

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass
class Model:
    width: int = 8  # C


@dataclass
class Shared:
    # optimisation
    lr: float = 4e-3  # peak
    # run
    out: str = "out/run"  # its folder
    resume: bool = False  # go on


@dataclass
class Config(Shared, Model):
    own = ("not", "a", "flag")
    # data
    data: str = "stdlib"  # 10 % of it for validation
    lr: float = 1e-4
    mask: bool = True  # on
    # run
    zero: Literal[0, 1, 2] = 0  # stage


def test_every_kind_of_field_is_a_flag():
    cfg = parse(Config, "--lr 1 --zero 2 --resume --no-mask --width 3 --data x.txt".split())
    assert cfg == Config(width=3, lr=1.0, zero=2, resume=True, mask=False, data="x.txt")
    assert isinstance(cfg.lr, float) and isinstance(cfg.zero, int)
    assert parse(Config, []) == Config()


@pytest.mark.parametrize("arguments, said", [
    ("--lr fast", "--lr: invalid float value: 'fast'"), ("--lr nan", "--lr nan: expected a finite number"),
    ("--lr -1", "--lr"), ("--lr inf", "--lr"), ("--width 1.5", "--width: invalid int value: '1.5'"),
    ("--zero 3", "--zero"), ("--lrr=1", "unknown argument --lrr (see --help)"), ("--lr", "--lr"),
    ("text", "text"), ("--own x", "unknown")])
def test_bad_flags_are_one_clear_line(arguments, said):
    with pytest.raises(UserError) as error:
        parse(Config, arguments.split())
    assert said in str(error.value) and "\n" not in str(error.value)


def test_help_shows_groups_comments_and_defaults(capsys):
    """A class comes before its parents. Groups of one title are one. A new default keeps a parent's help."""
    with pytest.raises(SystemExit):
        parse(Config, ["--help"], "what it does")
    shown = " ".join(capsys.readouterr().out.split())
    order = ["what it does options:", "C [8]", "data:", "10 % of it for validation [stdlib]", "on [", "run:",
             "stage [0]", "its folder [out/run]", "optimisation:", "peak [0.0001]"]
    found = [shown.index(words) for words in order]
    assert found == sorted(found) and shown.count(" run:") == 1


def test_a_flag_without_help_is_a_bug():
    @dataclass
    class Careless(Shared):
        forgotten: int = 1

    with pytest.raises(TypeError, match="Careless.*forgotten"):
        parse(Careless, [])


def test_counts_without_an_off_value_are_refused_at_zero():
    require_positive(Config(), "width")
    with pytest.raises(UserError, match="--width 0"):
        require_positive(Config(width=0), "width")


def test_a_file_or_folder_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Renamed first, a power cut could leave the new name with nothing behind it, and the old file gone."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (calls.append(os.readlink(f"/proc/self/fd/{d}")), fsync(d)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("replaced"), replace(old, new)))
    for name in ("file", "folder"):
        with replacing(tmp_path / "new" / name) as temporary:
            temporary.mkdir() if name == "folder" else temporary.write_text("text")
        assert calls == [str(temporary), "replaced", str(tmp_path / "new")]
        calls.clear()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyError("bug")])
def test_what_could_not_be_written_leaves_nothing(tmp_path, error):
    (tmp_path / "file").write_text("old")
    with pytest.raises((UserError, KeyError), match="file: cannot be written: No space left; free space|bug"):
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise error
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_two_processes_may_make_the_same_folder(tmp_path):
    """The second one finds the first one's folder and keeps it."""
    with replacing(tmp_path / "folder") as mine:
        mine.mkdir()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "theirs").touch()
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["theirs"]


def test_a_resumed_run_keeps_the_lines_up_to_its_step(tmp_path):
    """Later lines, and what a kill has left of a line, go."""
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    path.write_text("".join(good) + '{"step": 1, "lo')
    keep_lines(str(path), 2)
    assert path.read_text() == "".join(good[:2])
    keep_lines(str(path), 0)
    assert path.read_text() == ""


def test_progress_is_for_a_terminal(capsys, monkeypatch):
    progress = evaluate.Progress("replies")
    progress(1, 2)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    progress.start -= 60
    progress(1, 2_000)
    assert capsys.readouterr().out.startswith("\r\033[Kreplies 1 of 2,000 | 1 day, 9:1")


def test_a_user_error_is_one_short_line_whatever_it_quotes():
    assert str(UserError("a\n\x1b[2Jb 你" + "c" * 10**6)) == "a\\n\\x1b[2Jb 你" + "c" * 991


def fail(error):
    raise error


@pytest.mark.parametrize("main, code, said", [
    (lambda: fail(UserError("found\n")), 2, "error: found\\n\n"), (lambda: 7, 7, ""), (str, 0, ""),
    (lambda: fail(OSError(28, "No space left")), 2, "error: [Errno 28] No space left\n"),
    (lambda: fail(KeyboardInterrupt), 130, "interrupted\n"), (lambda: fail(BrokenPipeError), 141, "")])
def test_the_end_of_a_program(main, code, said, monkeypatch, capsys):
    """What the user can mend is one line and 2. A bug keeps its traceback."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        start(main)
    assert (end.value.code, capsys.readouterr().err) == (code, said)
    with pytest.raises(KeyError):
        start(lambda: {}["bug"])


@pytest.mark.parametrize("encoding, shown", [
    ("ascii", rb"\u4f60 \U0001f642 \xe9"), ("gbk", b"\xc4\xe3 " + rb"\U0001f642 " + "é".encode("gbk")),
    ("latin-1", rb"\u4f60 \U0001f642 " + b"\xe9"), ("utf-8", "你 🙂 é".encode())])
def test_any_terminal_shows_any_text(encoding, shown):
    """What the encoding of a terminal lacks is escaped; nothing ends and nothing is lost."""
    code = "from lib.program import start; start(lambda: print('\\u4f60 \\U0001f642 \\xe9'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT,
                            env={**os.environ, "PYTHONIOENCODING": encoding})
    assert result.stdout.strip() == shown and not result.stderr and result.returncode == 0


def test_a_closed_pipe_is_no_traceback():
    """The reader of our output, such as `head`, has gone."""
    code = "from lib.program import start; start(lambda: [print('x' * 9999) for _ in range(99)])"
    result = subprocess.run(f"{sys.executable} -c \"{code}\" | head -c 9", capture_output=True, shell=True,
                            cwd=ROOT)
    assert result.stdout == b"x" * 9 and not result.stderr


def test_what_was_printed_is_not_lost():
    """Into a file it is not written at once. A full disk under it (python train_x.py > log) is one line."""
    code = "from lib.program import *\ndef main():\n print('before')\n {}\nstart(main)"
    for body, out, said in (("raise UserError('x')", "/dev/stdout", "x"), ("pass", "/dev/full", "[Errno 28")):
        command = f"{shlex.join([sys.executable, '-c', code.format(body)])} > {out}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout) == (2, "before\n" if said == "x" else "")
        assert done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
