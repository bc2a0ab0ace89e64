"""Whatever happens to a run of any of the five scripts: nothing is lost, and nothing is let in.

Runs are jobs of kill.py: small, in processes of their own, with `before` to put a fault into them. The long versions
are `python tests/kill.py` and `python tests/fuzz.py`; docs/reliability.md says what they found.
"""
import contextlib
import functools
import gzip
import itertools
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fuzz import FORMS, Malicious, fuzz, make_models, put_shard, resign, small_zero
from kill import KEEP, PATIENCE, ROOT, SCRIPTS, Job, arguments, difference, folders, make_inputs, outcome, torment
from ranks import ranks

from lib import checked, checkpoint, records
from lib.checkpoint import claim, load_checkpoint
from lib.corpora import TokenFile, read_corpus
from lib.program import UserError
from lib.ranks import Ranks
from lib.records import read_chats
from lib.tokenizer import Tokenizer
from model import GPT, load_model
from zero import Unit, Zero

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("faults") / "inputs")


@pytest.fixture(scope="module")
def reference(inputs):
    """reference(script): what a run in one process leaves that nothing happens to."""
    @functools.cache
    def of(script):
        out = inputs.parent / f"reference-{script}"
        assert Job(script, arguments(script, inputs, out)).wait() == 0
        return outcome(out)
    return of


def refused(job: Job, *words: str) -> str:
    """The job ended with exit code 2 and one line that has these words; returns the line."""
    code, text = job.wait(), job.text()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in text and errors and all(word in errors[0] for word in words), text
    return errors[0]


def curve(out) -> list[tuple]:
    return [(line["step"], line[key]) for line in outcome(out)["curve"] for key in ("loss", "objective/scores")
            if key in line]


# ---- kill -9 --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, world, zero, kills", [
    ("pretrain", 2, 3, 2), ("sft", 1, 0, 2), ("rm", 1, 3, 2), ("dpo", 1, 0, 2), ("ppo", 1, 3, 3),
    *(slow(script, world, zero, 5) for script in SCRIPTS for world in (1, 2) for zero in (0, 3))])
def test_killed_at_random_moments(inputs, tmp_path, script, world, zero, kills):
    """kill -9 of all ranks, also inside a save: checkpoints are whole, keep + 1 folders at most, and the run that
    resumes ends with the last bits of the run that was never killed."""
    result = torment(script, world, zero, kills, inputs, tmp_path, random.Random(f"{script} {world} {zero}"))
    assert result["kills"] == kills and not result["problems"], result["problems"]


def test_a_damaged_newest_checkpoint_costs_no_good_one(tmp_path):
    """Resumed from step 1 because steps 2 and 3 are damaged: they are moved aside and --keep does not count them."""
    make_models(tmp_path)
    for step in (2, 3):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / f"step-0000000{step}")
        (tmp_path / f"step-0000000{step}" / "rank000.pt").write_bytes(b"damaged")
    z = small_zero()
    assert load_checkpoint(str(tmp_path), {"model": z})[0] == 1
    assert folders(tmp_path) == ["step-00000001"] and (tmp_path / "damaged-step-00000003").is_dir()
    for keep in (2, 1):
        checkpoint.save_checkpoint(str(tmp_path), 2, {"model": z}, {}, keep=keep)
        assert len(folders(tmp_path)) == keep and load_checkpoint(str(tmp_path), {"model": z})[0] == 2


# ---- asked to stop --------------------------------------------------------------------------------------------------

def signalled(module, number, updates, rank, times=1):
    """This rank gets the signal in the middle of a step, before the optimizer has run; twice: as under a scheduler that
    signals torchrun and its ranks."""
    original = Zero.step

    def step(self, *args):
        if self.updates == updates and os.environ.get("RANK", "0") == str(rank):
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(self, *args)

    Zero.step = step


@pytest.mark.parametrize("script, world, number", [
    ("pretrain", 1, signal.SIGINT), ("sft", 2, signal.SIGTERM), ("rm", 1, signal.SIGTERM), ("dpo", 1, signal.SIGINT),
    ("ppo", 1, signal.SIGTERM), *(slow(*case) for case in itertools.product(SCRIPTS, (1, 2), (2, 15)))])
def test_a_signal_saves_at_the_end_of_the_step_it_comes_in(inputs, reference, tmp_path, script, world, number):
    """SIGTERM or Ctrl-C to the last rank alone, and a second one right behind it: all ranks save after this very step,
    say so, and leave with 0, the signalled rank with 130 after Ctrl-C; resumed, the run ends as if nothing had been."""
    out = tmp_path / "out"
    updates, step = (6, 2) if script == "ppo" else (3, 4)  # PPO: of 4 updates a step
    before = functools.partial(signalled, number=number, updates=updates, rank=world - 1, times=2)
    job = Job(script, arguments(script, inputs, out, "--save_every", "0"), world, before)
    code = job.wait()
    assert code == (130 if number == signal.SIGINT else 0), job.text()
    assert folders(out) == [f"step-{step:08d}"] and f"saved after step {step};" in job.text()
    if world == 1:
        assert Job(script, arguments(script, inputs, out)).wait() == 0
        assert not difference(outcome(out), reference(script))


def signalled_before_an_endless_evaluation(module, updates):
    """SIGTERM in the middle of the step; an evaluation after that would not end (here it ends the process at once)."""
    signalled(module, signal.SIGTERM, updates, rank=0)
    evaluate, asked = module.evaluate, []
    ask, Ranks._on_signal = Ranks._on_signal, lambda *args: (asked.append(1), ask(*args))
    module.evaluate = lambda *args: os._exit(7) if asked else evaluate(*args)


@pytest.mark.parametrize("script, at, world", [("pretrain", "middle", 2), ("ppo", "middle", 1), ("sft", "end", 1), *(
    slow(script, at, world) for script in SCRIPTS for at, world in (("middle", 1), ("middle", 2), ("end", 1)))])
def test_a_signal_on_a_step_that_is_evaluated(inputs, tmp_path, script, at, world):
    """A preemption leaves 30 s and an evaluation may take minutes: saved without it. The resumed run evaluates first,
    and the curve is that of a run that was never stopped, point for point."""
    steps, updates = (6, 4) if script == "ppo" else (10, 1)  # PPO: of 4 updates a step
    more = ["--save_every", "0", "--eval_every", str(steps // 2)]
    step = steps if at == "end" else steps // 2
    assert Job(script, arguments(script, inputs, tmp_path / "unbroken", *more), world).wait() == 0
    before = functools.partial(signalled_before_an_endless_evaluation, updates=(step - 1) * updates)
    job = Job(script, arguments(script, inputs, tmp_path / "out", *more), world, before)
    assert job.wait() == 0 and folders(tmp_path / "out") == [f"step-{step:08d}"], job.text()
    assert Job(script, arguments(script, inputs, tmp_path / "out", *more), world).wait() == 0
    expected = outcome(tmp_path / "unbroken")
    assert any("eval" in key for line in expected["curve"] for key in line)
    assert outcome(tmp_path / "out")["curve"] == expected["curve"]
    assert not difference(outcome(tmp_path / "out"), expected)


def signalled_inside_an_evaluation(module, updates, rank):
    """SIGTERM to one rank at the first forward after so many updates that does not train; a second batch (PPO: the
    scoring of the replies) would not end, here: ends the process at once."""
    forward, score, step, asked = GPT.forward, getattr(module, "score", None), Zero.step, []
    done = [0]

    def counted_step(self, *args):
        done[0] += 1
        return step(self, *args)

    def signalled_forward(self, *args, **kwargs):
        if done[0] == updates and not torch.is_grad_enabled():
            if asked and not score:
                os._exit(7)
            if not asked and os.environ.get("RANK", "0") == str(rank):
                os.kill(os.getpid(), signal.SIGTERM)
            asked.append(1)
        return forward(self, *args, **kwargs)

    Zero.step, GPT.forward = counted_step, signalled_forward
    if score:
        module.score = lambda *args: os._exit(7) if asked else score(*args)


@pytest.mark.parametrize("script, world", [("pretrain", 1), ("sft", 2), *(
    slow(script, world) for script in SCRIPTS for world in (1, 2))])
def test_a_signal_inside_an_evaluation(inputs, tmp_path, script, world):
    """The evaluation is left after the batch it is in, on all ranks; what is trained is saved, and the resumed run
    evaluates first."""
    steps, updates = (6, 8 * 3) if script == "ppo" else (10, 5)  # PPO: 4 updates a step, of two models
    more = ["--save_every", "0", "--eval_every", str(steps // 2)]
    more += ["--val_fraction", "0.5"] if script in ("sft", "rm", "dpo") else []
    more += ["--micro_batch_size", "1"] if script in ("pretrain", "rm", "dpo") else []
    assert Job(script, arguments(script, inputs, tmp_path / "unbroken", *more), world).wait() == 0
    before = functools.partial(signalled_inside_an_evaluation, updates=updates, rank=world - 1)
    job = Job(script, arguments(script, inputs, tmp_path / "out", *more), world, before)
    assert job.wait() == 0 and folders(tmp_path / "out") == [f"step-{steps // 2:08d}"], job.text()
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert not any('"eval_' in line and json.loads(line)["step"] == steps // 2 for line in lines)
    assert Job(script, arguments(script, inputs, tmp_path / "out", *more), world).wait() == 0
    assert not difference(outcome(tmp_path / "out"), outcome(tmp_path / "unbroken"))


@pytest.mark.parametrize("script, world, steps", [("dpo", 1, 0), slow("dpo", 2, 0), ("pretrain", 1, 10),
                                                  slow("rm", 2, 10)])
def test_a_signal_where_there_is_nothing_to_save(inputs, tmp_path, script, world, steps):
    """Inside what comes before the first step (DPO reads the reference), or an evaluation of a finished run: left at
    once, said in one line, exit 0; started again, the run is as if nothing had been."""
    more = ["--micro_batch_size", "1", "--val_fraction", "0.5"]
    out = tmp_path / "out"
    argv = arguments(script, inputs, out, *more)
    if steps:
        assert Job(script, argv, world).wait() == 0
    before = functools.partial(signalled_inside_an_evaluation, updates=0, rank=world - 1)
    job = Job(script, argv, world, before, log=tmp_path / "stopped.log")
    assert job.wait() == 0, job.text()
    assert job.text().count("stopped: nothing to save") == 1 and "Traceback" not in job.text()
    assert len(folders(out)) == (KEEP if steps else 0)
    assert Job(script, argv, world).wait() == 0
    assert Job(script, arguments(script, inputs, tmp_path / "unbroken", *more), world).wait() == 0
    assert all(torch.equal(w, outcome(out)["weights"][name])
               for name, w in outcome(tmp_path / "unbroken")["weights"].items())


def without_a_reader(module):
    """The pipe that all output goes to is closed at its other end just before Ctrl-C comes."""
    signalled(module, signal.SIGINT, updates=3, rank=0)
    step = Zero.step

    def close_and_step(self, *args):
        if self.updates == 3:
            reader, writer = os.pipe()
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.close(reader)
        return step(self, *args)

    Zero.step = close_and_step


def test_ctrl_c_that_also_ends_the_reader_of_our_output(inputs, tmp_path):
    """... | tee log: both get Ctrl-C. The run still saves."""
    job = Job("pretrain", arguments("pretrain", inputs, tmp_path / "out", "--save_every", "0"), 1, without_a_reader)
    assert job.wait() == 130 and folders(tmp_path / "out") == ["step-00000004"], job.text()


def test_a_second_signal_later_means_it():
    """Within a second it is an echo of the first; after that it stops the program at once."""
    env = Ranks(1, 2, 0, 1, torch.device("cpu"))
    for _ in range(3):
        env._on_signal(signal.SIGINT, None)
    env.stop_time -= 2
    with pytest.raises(KeyboardInterrupt):
        env._on_signal(signal.SIGINT, None)


WRAPPED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_pretrain
from lib.program import start
from zero import Zero
train_pretrain.matmul_peak = lambda *_: 1e10
original = Zero.step
def step(self, *args):
    if self.updates == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        {fault}
    return original(self, *args)
Zero.step = step
if __name__ == "__main__":
    start(train_pretrain.main)
"""


def torchrun(tmp_path, fault, *argv):
    (tmp_path / "script.py").write_text(WRAPPED.format(root=ROOT, fault=fault))
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *argv[:2],
            str(tmp_path / "script.py"), *argv[2:]]


def test_torchrun_goes_on_by_itself(inputs, tmp_path):
    """torchrun --max_restarts with --resume: rank 1 is killed in step 6, both start again from the newest checkpoint,
    and the end is that of the unbroken run on 2 ranks, to the last bit."""
    more = ["--zero", "3"]
    assert Job("pretrain", arguments("pretrain", inputs, tmp_path / "unbroken", *more), 2).wait() == 0
    command = torchrun(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", "--max_restarts", "1",
                       *arguments("pretrain", inputs, tmp_path / "out", *more))
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "nothing in" in done.stdout and "going on after step 5" in done.stdout
    assert not difference(outcome(tmp_path / "out"), outcome(tmp_path / "unbroken"))


@pytest.mark.slow
@pytest.mark.parametrize("number, everyone", [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, False),
                                              (signal.SIGINT, True)])
def test_torchrun_passes_the_signal_on(inputs, tmp_path, number, everyone):
    """To torchrun, or to torchrun and its ranks, as Ctrl-C: saved once, said so, torchrun itself ends with an error."""
    command = torchrun(tmp_path, "pass", "--max_restarts", "0",
                       *arguments("pretrain", inputs, tmp_path / "out", "--steps", "100000", "--save_every", "0"))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + PATIENCE
        while not (tmp_path / "out" / "metrics.jsonl").exists() or len(curve_lines(tmp_path / "out")) < 3:
            assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
            time.sleep(0.05)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        for pid in [*(map(int, children.stdout.split()) if everyone else ()), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        output, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    saved, = folders(tmp_path / "out")
    assert f"saved after step {int(saved[5:])};" in output and process.returncode == 1, errors
    assert len(curve_lines(tmp_path / "out")) == int(saved[5:])


def curve_lines(out) -> list[str]:
    return (out / "metrics.jsonl").read_text().splitlines()


# ---- another number of ranks, another stage -------------------------------------------------------------------------

@pytest.mark.parametrize("script", ["rm", slow("pretrain"), slow("sft"), slow("dpo")])
def test_other_ranks_and_stages_follow_the_curve(inputs, reference, tmp_path, script):
    """1 -> 2 -> 3 -> 1 ranks at ZeRO 0, 3, 2, 1, stopped by signals in between: the curve of the unbroken run, 1e-6."""
    out = tmp_path / "out"
    for world, zero, last in ((1, 0, 2), (2, 3, 5), (3, 2, 7), (1, 1, 10)):
        before = None if last == 10 else \
            functools.partial(signalled, number=signal.SIGTERM, updates=last - 1, rank=0)
        job = Job(script, arguments(script, inputs, out, "--zero", str(zero), "--save_every", "0"), world, before)
        assert job.wait() == 0, job.text()
    expected = [(line["step"], line["loss"]) for line in reference(script)["curve"] if "loss" in line]
    found = curve(out)
    assert [step for step, _ in found] == [step for step, _ in expected] == list(range(1, 11))
    for (_, a), (_, b) in zip(found, expected):  # DPO's falls to a hundredth, a small rest of large numbers
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6 * expected[0][1])


def in_rollout(module):
    """SIGTERM in the first rollout: saved as it was loaded."""
    original = module.score
    module.score = lambda *args: (os.kill(os.getpid(), signal.SIGTERM), original(*args))[1]


def state_of(folder: Path) -> dict:
    """Masters and moments of actor and critic as whole vectors, and all numbers beside them."""
    meta = json.loads((folder / "meta.json").read_text())
    state = {"extra": meta["extra"], "step": meta["step"]}
    for key in ("actor", "critic"):
        shards = checkpoint._read_shards(str(folder), meta, key)
        state[f"{key} scalars"] = shards[0]["scalars"]
        for unit, vectors in shards[0]["units"].items():
            for name in vectors:
                state[f"{key} {unit} {name}"] = torch.cat([shard["units"][unit][name] for shard in shards])
    return state


@pytest.mark.slow
def test_ppo_loads_the_same_state_at_other_ranks_and_stages(inputs, tmp_path):
    """There a last bit may change a sampled token. But what 2 ranks at ZeRO 3, 3 at 2 and 1 at 0 load, and save again
    before they train, is what was saved: weights, moments, beta, counters."""
    out = tmp_path / "out"
    before = functools.partial(signalled, number=signal.SIGTERM, updates=6, rank=0)
    assert Job("ppo", arguments("ppo", inputs, out, "--save_every", "0"), 1, before).wait() == 0
    folder, = (out / name for name in folders(out))
    saved = state_of(folder)
    for world, zero in ((2, 3), (3, 2), (1, 0)):
        job = Job("ppo", arguments("ppo", inputs, out, "--zero", str(zero), "--save_every", "0"), world, in_rollout)
        assert job.wait() == 0 and "saved after step 2;" in job.text(), job.text()
        found = state_of(folder)
        assert json.loads((folder / "meta.json").read_text())["world"] == world and found.keys() == saved.keys()
        for key, value in saved.items():
            assert torch.equal(value, found[key]) if isinstance(value, torch.Tensor) else value == found[key], key


# ---- disks ----------------------------------------------------------------------------------------------------------

def small_files(module):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_disk_that_is_full(inputs, tmp_path, script):
    """A checkpoint that does not fit (a limit of file sizes stands for the disk): one line with the folder, exit 2, and
    no part of it left."""
    refused(Job(script, arguments(script, inputs, tmp_path / "out"), 1, small_files), "step-00000001", "free space")
    assert folders(tmp_path / "out") == []


def no_room_for_samples(module):
    module.write_samples = lambda file, *_: print("x" * 100_000, file=file, flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_a_disk_that_is_full_under_the_samples(inputs, tmp_path):
    job = Job("ppo", arguments("ppo", inputs, tmp_path / "out"), 1, no_room_for_samples)
    refused(job, "samples.jsonl", "free space")


def as_nobody(module):
    """Root may write anywhere."""
    original = module.claim

    def claim_as_nobody(*args):
        if os.getuid() == 0:
            os.setuid(65534)
        return original(*args)

    module.claim = claim_as_nobody


@pytest.mark.parametrize("script", ["dpo", *(slow(script) for script in SCRIPTS if script != "dpo")])
def test_a_folder_that_is_read_only(inputs, tmp_path, script):
    (tmp_path / "closed").mkdir(mode=0o555)
    argv = arguments(script, inputs, tmp_path / "out")
    argv[argv.index("--out") + 1] = str(tmp_path / "closed" / "out")
    job = Job(script, [*argv], 1, as_nobody, log=tmp_path / "log")
    refused(job, "closed/out", "Permission denied", "--out")


def damage(folder: Path, how: str) -> None:
    path = folder / "rank000.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(bytes(data) if how == "flip" else path.read_bytes()[:-1000])


@pytest.mark.parametrize("script, how", [("sft", "flip"), ("ppo", "cut"),
                                         *(slow(script, how) for script in SCRIPTS for how in ("flip", "cut"))])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(inputs, reference, tmp_path, script, how):
    """A flipped byte or a truncated file: --resume says which, goes on from the checkpoint before, and ends with the
    last bits of the unbroken run; with that one damaged too, one line and exit 2."""
    out = tmp_path / "out"
    expected = reference(script)  # makes the folder
    shutil.copytree(inputs.parent / f"reference-{script}", out)
    shutil.rmtree(out / "final")
    older, newest = sorted(folders(out))
    damage(out / newest, how)
    job = Job(script, arguments(script, inputs, out))
    assert job.wait() == 0 and f"{newest}/rank000.pt" in job.text() and "it is damaged; trying" in job.text()
    assert not difference(outcome(out), expected) and sorted(folders(out)) == [older, newest]
    for name in folders(out):
        damage(out / name, how)
    refused(Job(script, arguments(script, inputs, out)), f"{older}/rank000.pt", "no checkpoint",
            "choose another --out")


@pytest.mark.parametrize("change, words", [({"version": 2}, "version 2, this program reads 1"),
                                           ({"world": 7}, "rank files of a world of 7")])
def test_a_checkpoint_of_another_version(tmp_path, change, words):
    resign(make_models(tmp_path) / "step-00000001", **change)
    with pytest.raises(UserError, match=f"step-00000001/meta.json.*{words}"):
        load_checkpoint(str(tmp_path), {"model": small_zero()})


def test_a_checkpoint_of_another_script(inputs, reference, tmp_path):
    """A reward model's run is no SFT run, and a PPO run has other models."""
    for script, words in (("rm", "another model"), ("ppo", "missing there")):
        reference(script)
        out = tmp_path / script
        shutil.copytree(inputs.parent / f"reference-{script}", out)
        refused(Job("sft", arguments("sft", inputs, out)), words, "step-")


# ---- numbers that are none ------------------------------------------------------------------------------------------

def poisoned(module, steps):
    """NaN in one number of a gradient on the last rank, in so many steps from the third update on. Sharded, that number
    is the last rank's as well, so that all others have to be told."""
    original, left = Unit.reduce, [steps]
    step = Zero.step

    def reduce(self, gradients):
        if self.zero.updates == 2 and left[0] > 0 and self.name == "blocks.1" and os.environ.get("RANK", "1") == "1":
            gradients = [*gradients[:-1], gradients[-1].clone()]
            gradients[-1][-1] = torch.nan
        original(self, gradients)

    def count(self, *args):
        info = step(self, *args)
        left[0] -= info.skipped
        return info

    Unit.reduce, Zero.step = reduce, count


@pytest.mark.parametrize("script, world, zero", [
    ("pretrain", 1, 0), ("sft", 2, 3), ("rm", 1, 0), ("dpo", 1, 0), ("ppo", 1, 3),
    *(slow(script, 2, zero) for script in SCRIPTS for zero in (0, 3))])
def test_a_nan_in_one_ranks_gradient_is_skipped(inputs, tmp_path, script, world, zero):
    """All ranks skip the step and go on together; the log counts it; the model stays sound."""
    job = Job(script, arguments(script, inputs, tmp_path / "out", "--zero", str(zero)), world,
              functools.partial(poisoned, steps=1))
    assert job.wait() == 0, job.text()
    found = outcome(tmp_path / "out")
    # PPO trains two models, and each has its third update
    counts = [line.get("skipped", 0) for line in found["curve"] if "loss" in line or "objective/kl" in line]
    assert counts == ([2] * 6 if script == "ppo" else [0, 0] + [1] * 8)
    assert all(torch.isfinite(w).all() for w in found["weights"].values())


@pytest.mark.parametrize("script", ["sft", *(slow(script) for script in SCRIPTS if script != "sft")])
def test_skips_are_counted_on_after_a_resume(inputs, tmp_path, script):
    """A step that was skipped before the checkpoint is still in the count of the run that goes on from it."""
    first, more = (4, 6) if script == "ppo" else (5, 7)
    bad = functools.partial(poisoned, steps=1)
    assert Job(script, arguments(script, inputs, tmp_path / "out", "--steps", str(first)), 1, bad).wait() == 0
    assert Job(script, arguments(script, inputs, tmp_path / "out", "--steps", str(more))).wait() == 0
    counts = [line.get("skipped", 0) for line in outcome(tmp_path / "out")["curve"]
              if "loss" in line or "objective/kl" in line]
    assert counts == ([2] * 6 if script == "ppo" else [0, 0, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("world", [1, slow(2)])
def test_twenty_nans_in_a_row_stop_the_run(inputs, tmp_path, world):
    """All ranks alike, with the unit's name and what to change."""
    job = Job("pretrain", arguments("pretrain", inputs, tmp_path / "out", "--steps", "40"), world,
              functools.partial(poisoned, steps=99))
    assert "blocks.1" in refused(job, "20 steps in a row", "--lr")
    assert job.text().count("error: 20 steps in a row") == world


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_exploding_learning_rate_stops_the_run(inputs, tmp_path, script):
    """By the loss of a validation, or by 20 skipped steps in a row: one line that names --lr, no final model."""
    argv = arguments(script, inputs, tmp_path / "out", "--lr", "1e30", "--warmup_steps", "0", "--steps", "40",
                     "--eval_every", "10", "--save_every", "0")
    refused(Job(script, argv), "--lr")
    assert not (tmp_path / "out" / "final").exists()


def nothing_to_train(module):
    """The batch of step 3 has no target at all."""
    source, name = (module.Conversations, "rows") if hasattr(module, "Conversations") else (module.Windows, "batch")
    original, calls = getattr(source, name), []

    def masked(self, *args):
        ids, targets, segment_ids = original(self, *args)
        calls.append(1)
        return ids, torch.full_like(targets, -100) if len(calls) == 3 else targets, segment_ids

    setattr(source, name, masked)


@pytest.mark.parametrize("script, world", [("pretrain", 1), slow("pretrain", 2), slow("sft", 1), slow("sft", 2)])
def test_a_batch_with_nothing_to_train_is_skipped(inputs, tmp_path, script, world):
    """0 of 0 tokens on all ranks: the loss of that step is null in the log, its gradient 0 and not NaN, the update is
    left out and counted. (RM, DPO and PPO count pairs and replies, which are never none.)"""
    job = Job(script, arguments(script, inputs, tmp_path / "out"), world, nothing_to_train)
    assert job.wait() == 0, job.text()
    found = outcome(tmp_path / "out")
    steps = [line for line in found["curve"] if "loss" in line]
    assert [line["loss"] is None for line in steps] == [False, False, True] + [False] * 7
    assert steps[2]["grad_norm"] == 0 and all(line["grad_norm"] > 0 for line in steps[:2] + steps[3:])
    assert [line.get("skipped", 0) for line in steps] == [0, 0] + [1] * 8
    assert all(torch.isfinite(w).all() for w in found["weights"].values())


def overflowing(module):
    """A loss that float16 cannot hold once it is scaled, in the third update."""
    original, left = Zero.backward, [1]

    def backward(self, loss):
        if self.updates == 2 and left[0]:
            left[0], loss = 0, loss * 1e6
        original(self, loss)

    Zero.backward = backward


def test_a_float16_overflow_is_skipped_and_the_scale_halved(inputs, tmp_path):
    job = Job("pretrain", arguments("pretrain", inputs, tmp_path / "out", "--dtype", "float16", "--steps", "5"), 1,
              overflowing)
    assert job.wait() == 0, job.text()
    assert [line.get("skipped", 0) for line in outcome(tmp_path / "out")["curve"] if "loss" in line] == [0, 0, 1, 1, 1]
    shard = torch.load(tmp_path / "out" / "step-00000005" / "rank000.pt", weights_only=True)["model"]
    assert shard["scalars"]["loss_scale"] == 2.0**15 and shard["scalars"]["updates"] == 4


# ---- files from strangers -------------------------------------------------------------------------------------------

READERS = {"tokenizer.json": lambda path: Tokenizer.load(str(path)), "train.bin": TokenFile,
           "chats.jsonl": read_chats, "text.txt": lambda path: read_corpus(str(path)),
           "text.jsonl.gz": lambda path: read_corpus(str(path))}


@pytest.mark.parametrize("name", READERS)
def test_a_pickle_in_place_of_any_file_is_refused_unrun(tmp_path, name):
    """As tokenizer, token file, conversations or text. (As checkpoint or model: test_checkpoint.py.)"""
    trap, path = tmp_path / "trap", tmp_path / name
    torch.save(Malicious(trap), tmp_path / "zip")
    for content in (pickle.dumps(Malicious(trap)), (tmp_path / "zip").read_bytes()):
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        with pytest.raises(UserError, match=name):
            READERS[name](path)
    assert not trap.exists()


def opened_by(action) -> list[str]:
    """Names of all files that Python opens, lists or makes while action() runs."""
    seen, active = [], [True]
    sys.addaudithook(lambda event, args: seen.append(os.fsdecode(args[0])) if active[0] and args and event in (
        "open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "shutil.copyfile") and isinstance(
        args[0], (str, bytes)) else None)
    with contextlib.suppress(UserError):
        action()
    active[0] = False
    return seen


def hostile_paths(folder: str) -> list[str]:
    """What is opened to read a run in whose files names of other files stand wherever a text may stand."""
    folder, secret = Path(folder), "/etc/passwd"
    step = folder / "step-00000001"
    meta = json.loads((step / "meta.json").read_text())
    load_checkpoint(str(folder), {"model": small_zero()})  # what Python imports at the first use is no matter here
    checkpoint.consolidate(str(step))
    load_model(str(folder))
    seen = []
    for files in ({**meta["files"], "../../secret": meta["files"]["rank000.pt"]},
                  {**meta["files"], secret: meta["files"]["rank000.pt"]},
                  {"rank000.pt": meta["files"]["rank000.pt"]}):
        resign(step, files=files, torch=secret, extra={**meta["extra"], "data": secret, "tokenizer": secret})
        seen += opened_by(lambda: load_checkpoint(str(folder), {"model": small_zero()}))
        seen += opened_by(lambda: checkpoint.consolidate(str(step)))
    files = json.loads((folder / "final" / "config.json").read_text())["files"]
    files |= {secret: files["model.pt"], "../secret": files["model.pt"]}
    resign(folder / "final", "config.json", files=files, run={"init": secret, "data": secret}, tokenizer=secret)
    return seen + opened_by(lambda: load_model(str(folder)))


def test_no_path_from_a_files_content_is_opened(tmp_path):
    """All that is opened lies in the run's own folder, and the files in it were read (the test sees opens at all)."""
    make_models(tmp_path)
    seen, = ranks().run(1, hostile_paths, str(tmp_path))
    names = {os.path.relpath(path, tmp_path) for path in seen if not path.startswith("/dev/")}
    assert {"step-00000001/meta.json", "step-00000001/rank000.pt", "final/config.json", "final/model.pt"} <= names
    assert all(not name.startswith("..") for name in names), names


@pytest.mark.parametrize("claim_", [{"n_layer": 10**9}, {"max_seq_len": 2**40}, {"n_embd": 2**40},
                                    {"mlp_hidden": 2**40}, {"vocab_size": 2**40}, {"norm_eps": -1.0},
                                    {"n_kv_head": -1}, {"mlp": "none"}])
def test_sizes_in_a_config_are_checked_before_memory_is_taken(tmp_path, claim_):
    """A config.json that claims terabytes: one line, at once."""
    final = make_models(tmp_path) / "final"
    model = json.loads((final / "config.json").read_text())["model"]
    resign(final, "config.json", model={**model, **claim_})
    start = time.process_time()
    with pytest.raises(UserError, match="final(?!.*checksum)"):
        load_model(str(tmp_path))
    assert time.process_time() - start < 2


@pytest.mark.parametrize("change", [
    lambda z: z["units"]["blocks.0"].pop("exp_avg"), lambda z: z["units"].pop("blocks.0"), lambda z: z.pop("buffers"),
    lambda z: z["units"]["blocks.0"].update(exp_avg_sq=torch.zeros(3)), lambda z: z.update(buffers={"x": 1}),
    lambda z: z["units"]["blocks.0"].update(master=z["units"]["blocks.0"]["master"].to(torch.complex64).add(1j)),
    lambda z: z.update(buffers=[]), lambda z: z["scalars"].update(updates=-1), lambda z: z["scalars"].pop("skipped"),
    lambda z: z["scalars"].update(loss_scale=math.nan), lambda z: z["scalars"].update(updates=10**400),
    lambda z: z["scalars"].update(loss_scale=0.0),
    lambda z: z.clear()])
def test_a_forged_shard_is_refused_in_one_line(tmp_path, change):
    """What the checksums cannot find: who wrote it meant it."""
    step = make_models(tmp_path) / "step-00000001"
    shard = torch.load(step / "rank000.pt", weights_only=True)
    change(shard["model"])
    put_shard(step, shard)
    with pytest.raises(UserError, match="step-00000001"):
        load_checkpoint(str(tmp_path), {"model": small_zero()})


@pytest.mark.parametrize("changes, word", [
    ({"extra": {}}, "another model"), ({"skipped": "x"}, "skipped"), ({"skipped": None}, "skipped"),
    ({"skipped": -1}, "skipped"), ({"skipped": math.nan}, "skipped"), ({"model": [[]]}, "another model"),
    ({"tokenizer": 1}, "another tokenizer"), ({"step": -4}, "step"), ({"world": 0, "files": {}}, "rank files"),
    ({"files": {"rank001.pt": {}}}, "rank files"),
    ({"data": {"\x1b[2J": "\n"}, "lr": None, "betas": "x" * 10**6}, "")])
def test_a_forged_meta_is_refused_in_one_line(inputs, reference, tmp_path, changes, word):
    """A real run, in whose meta.json something is missing, of another type, or no number that it could be; what decides
    nothing is only shown, in a short line."""
    reference("sft")
    out = tmp_path / "out"
    shutil.copytree(inputs.parent / "reference-sft", out)
    for name in folders(out):
        extra = json.loads((out / name / "meta.json").read_text())["extra"]
        own = {key: value for key, value in changes.items() if key in ("extra", "step", "world", "files")}
        resign(out / name, **(own or {"extra": {**extra, **changes}}))
    job = Job("sft", arguments("sft", inputs, out))
    if word:
        assert len(refused(job, word, "meta.json")) < 1000
    else:
        assert job.wait() == 0 and "last bits will differ" in job.text() and "\x1b" not in job.text()
        assert len(job.text()) < 10_000


def test_a_gz_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "GZIP_FREE", 10_000)
    text = "".join(json.dumps({"text": f"{i} bottles, {math.sqrt(i)} litres"}) + "\n" for i in range(2000))
    for name, content, fine in (("text.jsonl.gz", text, True), ("bomb.txt.gz", "a" * 3_000_000, False)):
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
        with contextlib.nullcontext() if fine else pytest.raises(UserError, match="bomb.txt.gz.*unpack"):
            assert len("".join(read_corpus(str(tmp_path / name)))) > 10_000


@pytest.mark.parametrize("n", [120, slow(5000)])
@pytest.mark.parametrize("form", FORMS)
def test_mutated_files_are_read_or_refused(form, n, capsys):
    """Success or one line, within 5 s, nothing left behind. Some of both, or else the mutations are too weak or too
    strong to say anything."""
    failed = []
    counts = fuzz(form, n, say=failed.append)
    assert not failed, "\n".join(failed[:5])
    assert counts["read"] >= n // 50 and counts["refused"] >= n // 5 and counts["slowest"] < 5


def endless(folder, r):
    """A reader that hangs where whatever goes wrong is the file's fault."""
    yield
    with checked.reading(str(folder)):
        while True:
            pass


def littering(folder, r):
    (folder / "file.json").touch()
    yield
    (folder / "file.json.tmp").touch()
    raise UserError(f"{folder}: refused")


@pytest.mark.parametrize("form", [endless, littering])
def test_the_fuzzer_sees_what_hangs_and_what_is_left(tmp_path, monkeypatch, form):
    monkeypatch.setitem(FORMS, "bad", form)
    monkeypatch.setattr(sys.modules["fuzz"], "SECONDS", 0.3)
    assert fuzz("bad", 1, say=lambda *_: None)["failed"] == 1


# ---- two runs, one folder -------------------------------------------------------------------------------------------

def test_a_second_run_in_the_same_folder_is_refused(inputs, tmp_path):
    """With the holder's pid, resuming or not, and nothing in the folder changes; a holder that was killed holds
    nothing."""
    out = tmp_path / "out"
    holder = Job("pretrain", arguments("pretrain", inputs, out, "--steps", "100000", "--save_every", "0"))
    end = time.monotonic() + PATIENCE
    while not (out / "metrics.jsonl").exists() or not curve_lines(out):
        assert holder.alive() and time.monotonic() < end, holder.text()
        time.sleep(0.02)
    holder.signal(signal.SIGSTOP)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for more in (["--resume"], ["--no-resume"]):
        second = Job("pretrain", arguments("pretrain", inputs, out, *more), log=tmp_path / "second")
        refused(second, str(out), f"process {holder.pid};")
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    holder.signal(signal.SIGKILL)
    holder.wait()
    claim(str(out), resume=True).close()


def dead_at_once(module):
    module.main = lambda argv: os.kill(os.getpid(), signal.SIGKILL) if os.environ["RANK"] == "1" else 0


def test_a_rank_that_a_signal_killed_is_no_success(inputs, tmp_path):
    """What the tests above rely on: the exit code of a job in which one rank was killed is not that of the other."""
    assert Job("pretrain", arguments("pretrain", inputs, tmp_path / "out"), 2, dead_at_once).wait() == 128 + 9


def test_the_folders_of_the_small_runs(inputs, reference):
    """What the tests above rely on: a checkpoint after each step, of which keep are left."""
    reference("sft")
    assert len(folders(inputs.parent / "reference-sft")) == KEEP
