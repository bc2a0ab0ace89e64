"""Whatever happens to a run of any of the five scripts: nothing is lost, and all ranks end together.

Runs are jobs of kill.py: small, in processes of their own, with `before` to put a fault into them. They are judged
by what a user sees: exit code, screen, files. The long versions are `python tests/kill.py` and `tests/fuzz.py`.
"""
import functools
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from fuzz import FORMS, fuzz
from kill import PATIENCE, SCRIPTS, STEPS, Job, arguments, difference, folders, make_inputs, outcome, torment
from ranks import ROOT

from lib.checkpoint import KEEP, claim, reading
from lib.program import UserError
from zero import Zero

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def cases(fast: list, *every) -> list:
    """The fast cases, and as slow ones all other combinations."""
    return [pytest.param(*case) for case in fast] + [
        slow(*case) for case in itertools.product(*every) if case not in fast]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("faults") / "inputs")


@pytest.fixture(scope="module")
def reference(inputs):
    """reference(script, *flags): the folder of a run in one process that nothing happens to."""
    @functools.cache
    def of(script, *more):
        out = inputs.parent / f"{script}{'-'.join(more)}"
        assert Job(script, arguments(script, inputs, out, *more)).wait() == 0
        return out
    return of


def refused(job: Job, *words: str) -> str:
    """The job ended with exit code 2 and one line that has these words; returns what it printed."""
    code, text = job.wait(), job.text()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in text and errors and all(word in errors[0] for word in words), text
    return text


def of_step(script: str, step: int) -> int:
    """How many updates a model has had in the middle of this step: one before each, in PPO four."""
    return step - 1 if script != "ppo" else 4 * step - 2


# ---- kill -9 ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, world, zero", cases([("pretrain", 2, 3), ("ppo", 1, 0)], SCRIPTS, (1, 2), (0, 3)))
def test_killed_at_random_moments(inputs, tmp_path, script, world, zero):
    """All ranks at once, also inside a save: checkpoints are whole, and the run that resumes ends with the last bits of
    the run that was never killed."""
    result = torment(script, world, zero, 2, inputs, tmp_path, random.Random(f"{script} {world} {zero}"))
    assert result["kills"] == 2 and not result["problems"], result["problems"]


# ---- asked to stop ---------------------------------------------------------------------------------------

def signalled(number, updates, rank):
    """This rank gets the signal twice in the middle of a step, before the optimizer has run."""
    original = Zero.step

    def step(self, *args):
        if self.updates == updates and os.environ.get("RANK", "0") == str(rank):
            for _ in range(2):
                os.kill(os.getpid(), number)
        return original(self, *args)

    Zero.step = step


@pytest.mark.parametrize("script, world, number", cases([("sft", 2, signal.SIGTERM), ("ppo", 1, signal.SIGINT)],
                                                        SCRIPTS, (1, 2), (signal.SIGINT, signal.SIGTERM)))
def test_a_signal_saves_at_the_end_of_the_step_it_comes_in(inputs, reference, tmp_path, script, world, number):
    """To the last rank alone: all ranks save after this very step, before an evaluation that is due, say so, and leave
    with 0, after Ctrl-C with 130. Resumed, the run evaluates first, and ends as if nothing had been."""
    out, step = tmp_path / "out", STEPS[script] // 2
    more = ["--save_every", "0", "--eval_every", str(step)]
    before = functools.partial(signalled, number, of_step(script, step), world - 1)
    job = Job(script, arguments(script, inputs, out, *more), world, before)
    assert job.wait() == (130 if number == signal.SIGINT else 0), job.text()
    assert folders(out) == [f"step-{step:08d}"] and f"saved after step {step};" in job.text()
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    assert not any(key.startswith("eval_") for line in lines for key in line if line["step"] == step)
    assert Job(script, arguments(script, inputs, out, *more), world).wait() == 0
    if world == 1:
        assert not difference(outcome(out), outcome(reference(script, *more)))


WRAPPED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_pretrain
from lib.program import start
from zero import Zero
original = Zero.step
def step(self, *args):
    if self.updates == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        {fault}
    return original(self, *args)
Zero.step = step
if __name__ == "__main__":
    start(train_pretrain.main)
"""


def torchrun(tmp_path, fault, restarts, *argv):
    (tmp_path / "script.py").write_text(WRAPPED.format(root=ROOT, fault=fault))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "--max_restarts", str(restarts), str(tmp_path / "script.py"), *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_torchrun_goes_on_by_itself(inputs, tmp_path):
    """torchrun --max_restarts with --resume: rank 1 is killed in step 6, both start again from the newest checkpoint,
    and the end is that of the unbroken run on 2 ranks, to the last bit."""
    job = Job("pretrain", arguments("pretrain", inputs, tmp_path / "unbroken", "--zero", "3"), 2)
    run = torchrun(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", 1,
                   *arguments("pretrain", inputs, tmp_path / "out", "--zero", "3"))
    said, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0 and "going on after step 5" in said, errors
    assert job.wait() == 0 and not difference(outcome(tmp_path / "out"), outcome(tmp_path / "unbroken"))


def started(out, process) -> None:
    """Wait until a run in `out` has logged its third step."""
    end = time.monotonic() + PATIENCE
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3:
        assert process() and time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number, everyone", itertools.product((signal.SIGTERM, signal.SIGINT), (False, True)))
def test_torchrun_passes_the_signal_on(inputs, tmp_path, number, everyone):
    """To torchrun, or to torchrun and its ranks, as Ctrl-C: saved once, said so. torchrun itself ends with an error."""
    run = torchrun(tmp_path, "pass", 0, *arguments("pretrain", inputs, tmp_path / "out", "--steps", "100000",
                                                   "--save_every", "0"))
    try:
        started(tmp_path / "out", lambda: run.poll() is None)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True)
        for pid in [*(map(int, children.stdout.split()) if everyone else ()), run.pid]:
            os.kill(pid, number)
        said, errors = run.communicate(timeout=PATIENCE)
    finally:
        run.kill()
    saved, = folders(tmp_path / "out")
    assert f"saved after step {int(saved[5:])};" in said and run.returncode == 1, errors


# ---- another number of ranks, another stage --------------------------------------------------------------

@pytest.mark.parametrize("script", ["rm", slow("pretrain"), slow("sft"), slow("dpo")])
def test_other_ranks_and_stages_follow_the_curve(inputs, reference, tmp_path, script):
    """1 -> 2 -> 1 ranks at ZeRO 0, 3, 2, stopped by signals in between: the curve of the unbroken run."""
    out = tmp_path / "out"
    for world, zero, last in ((1, 0, 2), (2, 3, 5), (1, 2, STEPS[script])):
        before = functools.partial(signalled, signal.SIGTERM, last - 1, 0) if last < STEPS[script] else None
        job = Job(script, arguments(script, inputs, out, "--zero", str(zero), "--save_every", "0"), world, before)
        assert job.wait() == 0, job.text()
    found, expected = ([(line["step"], line["loss"]) for line in outcome(place)["curve"] if "loss" in line]
                       for place in (out, reference(script)))
    assert [step for step, _ in found] == list(range(1, STEPS[script] + 1))
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-3)


# ---- disks and folders -----------------------------------------------------------------------------------

def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("script", cases([("dpo",)], SCRIPTS))
def test_a_disk_that_is_full(inputs, tmp_path, script):
    """A checkpoint that does not fit (a limit of file sizes stands for the disk): one line, and no part of it left."""
    refused(Job(script, arguments(script, inputs, tmp_path / "out"), 1, small_files), "step-00000001", "free space")
    assert [name for name in os.listdir(tmp_path / "out") if "step" in name] == []


def test_a_folder_that_cannot_be_made(inputs, tmp_path):
    refused(Job("sft", arguments("sft", inputs, "/proc/none"), log=tmp_path / "log"), "/proc/none", "another --out")


@pytest.mark.parametrize("script, how", cases([("sft", "flip")], SCRIPTS, ("flip", "cut")))
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(inputs, reference, tmp_path, script, how):
    """--resume says which file, goes on from the checkpoint before, and ends with the last bits of the unbroken run."""
    out = tmp_path / "out"
    shutil.copytree(reference(script), out)
    shutil.rmtree(out / "final")
    older, newest = folders(out)
    data = bytearray((out / newest / "rank000.pt").read_bytes())
    data[len(data) // 3] ^= 4
    (out / newest / "rank000.pt").write_bytes(data if how == "flip" else data[:-1000])
    job = Job(script, arguments(script, inputs, out))
    assert job.wait() == 0 and f"{newest}/rank000.pt: is damaged" in job.text()
    assert not difference(outcome(out), outcome(reference(script))) and len(folders(out)) == KEEP


@pytest.mark.parametrize("script, words", [("rm", "is of another model"), ("ppo", "is None there")])
def test_a_checkpoint_of_another_script(inputs, reference, tmp_path, script, words):
    """A reward model's run is no SFT run, and a PPO run has other models."""
    shutil.copytree(reference(script), tmp_path / "out")
    refused(Job("sft", arguments("sft", inputs, tmp_path / "out")), words, "step-")


def test_a_second_run_in_the_same_folder_is_refused(inputs, tmp_path):
    """With the holder's pid, resuming or not, and nothing changes. A holder that was killed holds nothing."""
    out = tmp_path / "out"
    holder = Job("pretrain", arguments("pretrain", inputs, out, "--steps", "100000", "--save_every", "0"))
    started(out, holder.alive)
    holder.signal(signal.SIGSTOP)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for more in ("--resume", "--no-resume"):
        second = Job("pretrain", arguments("pretrain", inputs, out, more), log=tmp_path / "second")
        refused(second, str(out), f"process {holder.pid};")
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    holder.signal(signal.SIGKILL)
    assert holder.wait() == -9
    claim(str(out), resume=True).close()


# ---- numbers that are none -------------------------------------------------------------------------------

def poisoned(factor, steps):
    """The gradient of one loss on the last rank is multiplied, in so many steps from each model's third update on."""
    backward, original, left = Zero.backward, Zero.step, [steps]

    def poison(self, loss):
        last = os.environ.get("RANK") == str(int(os.environ.get("WORLD_SIZE", 1)) - 1) or "RANK" not in os.environ
        backward(self, loss * factor if self.updates == 2 and left[0] > 0 and last else loss)

    def count(self, *args):
        info = original(self, *args)
        left[0] -= info.skipped
        return info

    Zero.backward, Zero.step = poison, count


@pytest.mark.parametrize("script, world, zero", cases([("sft", 2, 3), ("ppo", 1, 0)], SCRIPTS, (1, 2), (0, 3)))
def test_a_nan_in_one_ranks_gradient_is_skipped(inputs, tmp_path, script, world, zero):
    """All ranks skip the step and go on together. The log counts it, also after a resume; the model stays sound."""
    out, bad = tmp_path / "out", functools.partial(poisoned, float("nan"), 1)
    for steps, before in ((STEPS[script] - 1, bad), (STEPS[script], None)):
        job = Job(script, arguments(script, inputs, out, "--zero", str(zero), "--steps", str(steps)), world, before)
        assert job.wait() == 0, job.text()
    lines = [line for line in outcome(out)["curve"] if "loss" in line or "objective/kl" in line]
    skipped = [line.get("skipped", 0) for line in lines]
    assert skipped == ([2] * 4 if script == "ppo" else [0, 0] + [1] * 6)  # of PPO both models' third update
    assert all(torch.isfinite(weight).all() for weight in outcome(out)["weights"].values())


@pytest.mark.parametrize("world", [1, slow(2)])
def test_twenty_nans_in_a_row_stop_the_run(inputs, tmp_path, world):
    """All ranks alike, with the unit's name and what to change."""
    argv = arguments("pretrain", inputs, tmp_path / "out", "--steps", "40", "--save_every", "0")
    job = Job("pretrain", argv, world, functools.partial(poisoned, float("nan"), 99))
    assert refused(job, "20 steps in a row", "--lr").count("error: 20 steps in a row") == world


@pytest.mark.parametrize("script", cases([("rm",)], SCRIPTS))
def test_an_exploding_learning_rate_stops_the_run(inputs, tmp_path, script):
    """By the loss of a validation, or by 20 skipped steps in a row: one line that names --lr, no final model."""
    argv = arguments(script, inputs, tmp_path / "out", "--lr", "1e30", "--warmup_steps", "0", "--steps", "40",
                     "--eval_every", "10", "--save_every", "0")
    refused(Job(script, argv), "--lr")
    assert not (tmp_path / "out" / "final").exists()


# ---- files that users bring ------------------------------------------------------------------------------

@pytest.mark.parametrize("form, n", [*((form, 100) for form in FORMS), *(slow(form, 5000) for form in FORMS)])
def test_mutated_files_are_read_or_refused(form, n):
    """Success or one line, within 5 s, nothing left behind. Some of both, or else the mutations say nothing."""
    failed = []
    counts = fuzz(form, n, say=failed.append)
    assert not failed, "\n".join(failed[:5])
    assert counts["read"] >= n // 50 and counts["refused"] >= n // 5


def endless(folder, r):
    """A reader that hangs where whatever goes wrong is the file's fault."""
    yield
    with reading(folder):
        while True:
            pass


def littering(folder, r):
    (folder / "file.json").touch()
    yield
    (folder / "file.json.tmp").touch()
    raise UserError(f"{folder}: refused")


@pytest.mark.parametrize("form", [endless, littering])
def test_the_fuzzer_sees_what_hangs_and_what_is_left(monkeypatch, form):
    monkeypatch.setitem(FORMS, "bad", form)
    monkeypatch.setattr(sys.modules["fuzz"], "SECONDS", 0.3)
    assert fuzz("bad", 1, say=lambda *_: None)["failed"] == 1


def dead_at_once():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_was_killed_is_no_success(inputs, tmp_path):
    """What the tests above rely on: the exit code of a job is that of its worst rank."""
    job = Job("sft", ["--out", str(tmp_path / "out"), "--help"], 2, dead_at_once)
    assert job.wait() == 128 + 9
