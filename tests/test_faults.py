"""Whatever happens to a run of any of the five scripts: nothing is lost, and all ranks end together.

Runs are jobs of kill.py: small, in processes of their own, with `before` to put a fault into them. They are
judged by what a user sees: exit code, screen, files. Longer: python tests/kill.py and python tests/fuzz.py.
"""
import functools
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from fuzz import FORMS, fuzz
from kill import PATIENCE, SCRIPTS, STEPS, Job, arguments, difference, folders, make_inputs, outcome, torment
from ranks import ROOT

from lib.checkpoint import claim
from zero import Zero

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EVERYWHERE = SCRIPTS, (1, 2), (0, 3)  # numbers of ranks and ZeRO stages


def cases(fast: list, *every) -> list:
    """All combinations; those that are not fast are slow."""
    return [pytest.param(*case, marks=[] if case in fast else pytest.mark.slow)
            for case in itertools.product(*every)]


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


def refused(job: Job, *words: str) -> None:
    """The job ended with exit code 2 and one line that has these words."""
    code, text = job.wait(), job.text()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in text and errors and all(word in errors[0] for word in words), text


@pytest.mark.parametrize("script, world, zero", cases([("pretrain", 2, 3), ("ppo", 1, 0)], *EVERYWHERE))
def test_killed_at_random_moments(inputs, tmp_path, script, world, zero):
    """All ranks at once, also inside a save: checkpoints are whole, the resumed run is the unbroken one."""
    torment(script, world, zero, 2, inputs, tmp_path, random.Random(f"{script} {world} {zero}"))


def signalled(number, updates, rank):
    """This rank gets the signal twice in the middle of a step, before the optimizer has run."""
    original = Zero.step

    def step(self, *args):
        if self.updates == updates and os.environ.get("RANK", "0") == str(rank):
            for _ in range(2):
                os.kill(os.getpid(), number)
        return original(self, *args)

    Zero.step = step


@pytest.mark.parametrize("script, world, number", cases(
    [("sft", 2, signal.SIGTERM), ("ppo", 1, signal.SIGINT)], SCRIPTS, (1, 2), SIGNALS))
def test_a_signal_saves_at_the_end_of_its_step(inputs, reference, tmp_path, script, world, number):
    """To the last rank alone: all ranks save after this very step, before an evaluation that is due, say so
    and leave with 0 (Ctrl-C: 130). Resumed, the run evaluates first, and ends as if nothing had been."""
    out, step = tmp_path / "out", STEPS[script] // 2
    more = ["--save_every", "0", "--eval_every", str(step)]
    updates = step - 1 if script != "ppo" else 4 * step - 2  # that a model has had in the middle of this step
    before = functools.partial(signalled, number, updates, world - 1)
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
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args)
Zero.step = step
if __name__ == "__main__":
    start(train_pretrain.main)
"""


@pytest.mark.slow
def test_torchrun_goes_on_by_itself(inputs, tmp_path):
    """torchrun --max_restarts with --resume: rank 1 is killed in step 6, both start again from the newest
    checkpoint, and the end is that of the unbroken run on 2 ranks, to the last bit."""
    job = Job("pretrain", arguments("pretrain", inputs, tmp_path / "unbroken", "--zero", "3"), 2)
    (tmp_path / "script.py").write_text(WRAPPED.format(root=ROOT))
    command = f"torch.distributed.run --standalone --nproc_per_node 2 --max_restarts 1 {tmp_path}/script.py"
    command = [sys.executable, "-m", *command.split()]
    argv = arguments("pretrain", inputs, tmp_path / "out", "--zero", "3")
    run = subprocess.run(command + argv, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0 and "going on after step 5" in run.stdout, run.stderr
    assert job.wait() == 0 and not difference(outcome(tmp_path / "out"), outcome(tmp_path / "unbroken"))


@pytest.mark.parametrize("script", cases([("rm",)], ("pretrain", "sft", "rm", "dpo")))
def test_other_ranks_and_stages_follow_the_curve(inputs, reference, tmp_path, script):
    """1 -> 2 -> 1 ranks at ZeRO 0, 3, 2, stopped by signals in between: the curve of the unbroken run."""
    out = tmp_path / "out"
    for world, zero, last in ((1, 0, 2), (2, 3, 5), (1, 2, STEPS[script])):
        before = functools.partial(signalled, signal.SIGTERM, last - 1, 0) if last < STEPS[script] else None
        argv = arguments(script, inputs, out, "--zero", str(zero), "--save_every", "0")
        job = Job(script, argv, world, before)
        assert job.wait() == 0, job.text()
    found, expected = ([(line["step"], line["loss"]) for line in outcome(place)["curve"] if "loss" in line]
                       for place in (out, reference(script)))
    assert [step for step, _ in found] == list(range(1, STEPS[script] + 1))
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-3)


def small_files():
    """A limit on the size of files stands for a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("script", cases([("dpo",)], SCRIPTS))
def test_a_disk_that_is_full(inputs, tmp_path, script):
    """One line, and no part of the checkpoint left."""
    job = Job(script, arguments(script, inputs, tmp_path / "out"), 1, small_files)
    refused(job, "step-00000001", "free space")
    assert [name for name in os.listdir(tmp_path / "out") if "step" in name] == []


def test_a_second_run_in_the_same_folder_is_refused(inputs, tmp_path):
    """Resuming or not, and nothing changes. A holder that was killed holds nothing."""
    out = tmp_path / "out"
    holder = Job("pretrain", arguments("pretrain", inputs, out, "--steps", "100000", "--save_every", "0"))
    while not (out / "metrics.jsonl").exists():
        assert holder.alive(), holder.text()
        time.sleep(0.02)
    holder.signal(signal.SIGSTOP)
    before = [(path.name, path.read_bytes()) for path in sorted(out.iterdir())]
    for more in ("--resume", "--no-resume"):
        second = Job("pretrain", arguments("pretrain", inputs, out, more), log=tmp_path / "second")
        refused(second, str(out), "in use by another run")
    assert before == [(path.name, path.read_bytes()) for path in sorted(out.iterdir())]
    holder.signal(signal.SIGKILL)
    assert holder.wait() == -9
    claim(str(out), resume=True).close()


def poisoned():
    """NaN in the gradient of rank 0, once, at each model's third update."""
    backward, original, left = Zero.backward, Zero.step, [1]

    def poison(self, loss):
        bad = self.updates == 2 and left[0] > 0 and os.environ.get("RANK", "0") == "0"
        backward(self, loss * float("nan") if bad else loss)

    def count(self, *args):
        info = original(self, *args)
        left[0] -= info.skipped
        return info

    Zero.backward, Zero.step = poison, count


@pytest.mark.parametrize("script, world, zero", cases([("sft", 2, 3), ("ppo", 1, 0)], *EVERYWHERE))
def test_a_nan_in_one_ranks_gradient_is_skipped(inputs, tmp_path, script, world, zero):
    """All ranks skip the step and go on. The log counts it, also after a resume; the model stays sound."""
    out = tmp_path / "out"
    for steps, before in ((STEPS[script] - 1, poisoned), (STEPS[script], None)):
        argv = arguments(script, inputs, out, "--zero", str(zero), "--steps", str(steps))
        job = Job(script, argv, world, before)
        assert job.wait() == 0, job.text()
    lines = [line for line in outcome(out)["curve"] if "loss" in line or "objective/kl" in line]
    skipped = [line.get("skipped", 0) for line in lines]
    assert skipped == ([2] * 4 if script == "ppo" else [0, 0] + [1] * 6)  # of PPO both models' third update
    assert all(torch.isfinite(weight).all() for weight in outcome(out)["weights"].values())


@pytest.mark.parametrize("script", cases([("rm",)], SCRIPTS))
def test_an_exploding_learning_rate_stops_the_run(inputs, tmp_path, script):
    """By the validation's loss, or by 20 skipped steps in a row: one line that names --lr, no final model."""
    argv = arguments(script, inputs, tmp_path / "out", "--lr", "1e30", "--warmup_steps", "0", "--steps", "40",
                     "--eval_every", "10", "--save_every", "0")
    refused(Job(script, argv), "--lr")
    assert not (tmp_path / "out" / "final").exists()


@pytest.mark.parametrize("form, n", cases([(form, 100) for form in FORMS], FORMS, (100, 5000)))
def test_mutated_files_are_read_or_refused(form, n):
    """Success or one line, within 5 s, nothing left behind. Some of both, or the mutations say nothing."""
    failed = []
    counts = fuzz(form, n, say=failed.append)
    assert not failed, "\n".join(failed[:5])
    assert counts["read"] >= n // 50 and counts["refused"] >= n // 5
