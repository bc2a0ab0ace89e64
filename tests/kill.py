"""Kill -9 small runs of the training scripts at random moments, resume them, and compare with runs that never died.

    python tests/kill.py --script sft --tries 20                      5 kills at each of 1 and 2 ranks, ZeRO 0 and 3
    python tests/kill.py --script ppo --tries 8 --world 2 --zero 3 --seed 7

Every second kill comes at a random moment of the run, every other one while a tmp-* folder is there, so inside a save.
After each kill every step-* folder must be whole and there are at most keep + 1 folders; a run that got to its end must
have the weights, the curve and (PPO) the samples of the reference, to the last bit. Exit code 1 otherwise.

The ranks are forked from a process that has imported everything, which saves seconds per life; what torchrun adds is
tested in test_faults.py. That file uses the jobs and inputs of this one.
"""
from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import multiprocessing as mp
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
SCRIPTS = ("pretrain", "sft", "rm", "dpo", "ppo")
KEEP = 2
PATIENCE = 900  # seconds that a small run may take, on a machine that has other things to do


# ---- small runs -----------------------------------------------------------------------------------------------------

def make_inputs(folder: Path) -> Path:
    """A text, conversations, ranked replies, prompts, a model that can chat and a reward model."""
    from small_chat import ranked, save_chat_model, write

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(Path(os.__file__).read_text(encoding="utf-8")[:12_000])
    replies = ranked()
    write(folder / "ranked.jsonl", replies)
    write(folder / "prompts.jsonl", [{"prompt": record["prompt"]} for record in replies])
    write(folder / "chats.jsonl", [{"instruction": record["prompt"], "output": record["responses"][0]}
                                   for record in replies[1:]])
    save_chat_model(folder / "chat")
    save_chat_model(folder / "rm", seed=2, head="scalar")
    return folder


def arguments(script: str, inputs: Path, out, *more) -> list[str]:
    """A small run with a checkpoint after every step. Adam's eps keeps gradients that are all but 0 from deciding."""
    data = {"pretrain": "text.txt", "sft": "chats.jsonl", "ppo": "prompts.jsonl"}.get(script, "ranked.jsonl")
    own = {"pretrain": ["--cache", str(inputs / "cache"), "--tokenizer", "byte", "--n_layer", "2", "--n_embd", "32",
                        "--n_head", "2", "--seq_len", "24", "--batch_size", "6", "--eval_rows", "12",
                        "--sample_tokens", "0"],
           "ppo": ["--init", str(inputs / "chat"), "--reward_model", str(inputs / "rm"), "--batch_size", "8",
                   "--minibatches", "2", "--max_new_tokens", "6", "--eval_prompts", "2", "--val_fraction", "0.2",
                   "--target_kl", "0.05", "--kl_horizon", "100", "--stop_kl", "0"],
           }.get(script, ["--init", str(inputs / "chat"), "--batch_size", "4", "--eval_prompts", "0",
                          "--val_fraction", "0.2"])
    return ["--data", str(inputs / data), *own, "--out", str(out), "--steps", "6" if script == "ppo" else "10",
            "--save_every", "1", "--keep", str(KEEP), "--eval_every", "0", "--log_every", "1", "--warmup_steps", "2",
            "--lr", "3e-3", "--eps", "1e-4", "--device", "cpu", "--resume", *more]


def play(script: str, argv: list[str], before) -> int:
    """One rank: the script's main() as `python` would run it. before(module): what to change in it first."""
    module = importlib.import_module(f"train_{script}")
    module.matmul_peak = lambda *_: 1e10  # the speed of this machine is not what is tested
    if before:
        before(module)
    from lib.program import start
    faulthandler.dump_traceback_later(PATIENCE - 10)  # where it hangs
    try:
        start(lambda: module.main(argv))
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1


def job(script: str, argv: list[str], world: int, port: int, log: str, before) -> None:
    """The ranks of one run, in a process group of their own; ends with the largest exit code."""
    os.setsid()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if world == 1:
        os._exit(play(script, argv, before))
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE":
                           str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os._exit(play(script, argv, before))
        children.append(child)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a signal to the group is for the ranks
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os._exit(max(code if code >= 0 else 128 - code for code in codes))  # killed: as a shell says it


def free_port() -> int:
    """Below those that the system gives to connections: a rank that tries to reach its peer could get the very one, and
    would then be connected with itself."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return port


class Job:
    """A run in the background: its process group is `pid`, what it prints is in `log`."""
    context = None

    def __init__(self, script: str, argv: list[str], world: int = 1, before=None, log: Path | None = None):
        if Job.context is None:
            os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, os.path.join(ROOT, "tests")])
            os.environ["OMP_NUM_THREADS"] = "1"
            Job.context = mp.get_context("forkserver")
            ours = [name for name in ("kill", "pytest", "test_faults") if name in sys.modules]
            Job.context.set_forkserver_preload([*(f"train_{script}" for script in SCRIPTS), *ours])
        port = free_port()
        out = Path(argv[argv.index("--out") + 1])
        self.log = log or out.parent / f"{out.name}.log"
        self.process = Job.context.Process(target=job, args=(script, argv, world, port, str(self.log), before))
        self.process.start()
        self.pid = self.process.pid

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code; -9 for a run that was killed, also for one that did not end in time."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.signal(signal.SIGKILL)
            self.process.join()
        return self.process.exitcode

    def alive(self) -> bool:
        return self.process.exitcode is None

    def signal(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # not yet in its own group, or no longer there
            if self.alive():
                os.kill(self.pid, number)

    def text(self) -> str:
        return self.log.read_text(errors="replace")


# ---- what must hold -------------------------------------------------------------------------------------------------

def folders(out: Path) -> list[str]:
    """Checkpoints, and parts of them; final/ and its parts do not count."""
    return [name for name in os.listdir(out) if re.fullmatch(r"(step-|tmp-.*)\d{8}", name)] if out.exists() else []


def check_folders(out: Path) -> str:
    """What is wrong with the checkpoints of a run that was killed; "" if nothing is."""
    from lib.checkpoint import _examine
    from lib.program import UserError

    found = folders(out)
    if len(found) > KEEP + 1:
        return f"{len(found)} folders: {sorted(found)}"
    for name in found:
        try:
            if name.startswith("step-"):
                _examine(str(out / name), slice(None))
        except UserError as error:
            return str(error)
    return ""


CLOCK = re.compile(r"tokens_per_second|mfu|memory|seconds/")


def outcome(out: Path) -> dict:
    """All that a run leaves, but for what it says about the machine."""
    import torch
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    samples = out / "samples.jsonl"
    return {"weights": torch.load(out / "final" / "model.pt", weights_only=True),
            "curve": [{k: v for k, v in line.items() if not CLOCK.match(k)} for line in lines],
            "samples": samples.read_text() if samples.exists() else ""}


def difference(found: dict, expected: dict) -> str:
    """In what a run differs from the one that never died; "" if in nothing, to the last bit."""
    import torch
    names = [name for name in expected["weights"] if name not in found["weights"] or
             not torch.equal(found["weights"][name], expected["weights"][name])]
    if names:
        return f"other weights: {names[0]}"
    # A run that had finished and is resumed says once more how it went.
    curve = [line for i, line in enumerate(found["curve"]) if line not in found["curve"][:i]]
    if curve != expected["curve"]:
        return "another curve"
    return "" if found["samples"] == expected["samples"] else "other samples"


# ---- the command ----------------------------------------------------------------------------------------------------

def wait_for(job: Job, moment: tuple, out: Path) -> None:
    """Return at the moment to kill, or when the job has ended. moment: ("at", seconds), or ("in save", n, seconds):
    so long after the n-th tmp-* folder came."""
    kind, amount, *late = moment
    start, seen = time.monotonic(), set()
    while job.alive():
        if kind == "at" and time.monotonic() - start >= amount:
            return
        if kind == "in save":
            seen |= {name for name in folders(out) if re.fullmatch(r"tmp-\d+", name)}
            if len(seen) >= amount:
                time.sleep(late[0])
                return
        time.sleep(0.0005)


def torment(script: str, world: int, zero: int, kills: int, inputs: Path, work: Path, random_: random.Random) -> dict:
    """Kill runs of one setting `kills` times. Returns counts and, under "problems", everything that was not right."""
    more = ["--zero", str(zero)]
    work.mkdir(parents=True, exist_ok=True)
    reference = work / f"reference-{world}-{zero}"
    started = time.monotonic()
    if (code := Job(script, arguments(script, inputs, reference, *more), world).wait()) != 0:
        sys.exit(f"the reference run ended with {code}, see {reference}.log")
    seconds, expected = time.monotonic() - started, outcome(reference)
    result = {"kills": 0, "in save": 0, "runs": 0, "problems": []}
    life, n, out = 0, 0, work / f"run-{world}-{zero}-0"

    def finish(code: int) -> None:
        nonlocal n, out
        problem = f"ended with {code}" if code else difference(outcome(out), expected)
        if problem:
            result["problems"].append(f"{out}: {problem}")
        else:
            shutil.rmtree(out)
        result["runs"], n = result["runs"] + 1, n + 1
        out = work / f"run-{world}-{zero}-{n}"

    while result["kills"] < kills:
        life += 1
        moment = ("at", random_.uniform(0, seconds)) if life % 2 else \
            ("in save", random_.randint(1, 4), random_.uniform(0, 0.02))
        run = Job(script, arguments(script, inputs, out, *more), world)
        wait_for(run, moment, out)
        if not run.alive():
            finish(run.wait())  # too late: not counted as a kill
            continue
        run.signal(signal.SIGKILL)
        run.wait()
        result["kills"] += 1
        result["in save"] += any(name.startswith("tmp-") for name in folders(out))
        if problem := check_folders(out):
            result["problems"].append(f"{out}, killed {moment}: {problem}")
        if random_.random() < 0.5 or result["kills"] == kills:  # else the resumed run is killed as well
            finish(Job(script, arguments(script, inputs, out, *more), world).wait())
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=SCRIPTS, required=True)
    parser.add_argument("--tries", type=int, default=20, help="kills in all, spread over the settings [20]")
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2], help="numbers of ranks [1 2]")
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 3], help="ZeRO stages [0 3]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    parser.add_argument("--work", help="folder for runs and logs; what went wrong stays there [a new one]")
    args = parser.parse_args()
    work = Path(args.work or tempfile.mkdtemp(prefix="kill-"))
    inputs = make_inputs(work / f"inputs-{args.script}")
    settings = [(world, zero) for world in args.world for zero in args.zero]
    failed, random_ = 0, random.Random(args.seed)
    for i, (world, zero) in enumerate(settings):
        kills = args.tries * (i + 1) // len(settings) - args.tries * i // len(settings)
        result = torment(args.script, world, zero, kills, inputs, work / args.script, random_)
        failed += len(result["problems"])
        print(f"{args.script}, {world} ranks, ZeRO {zero}: {result['kills']} kills, {result['in save']} of them inside "
              f"a save, {result['runs']} runs to the end, {len(result['problems'])} problems", flush=True)
        for problem in result["problems"]:
            print(f"    {problem}", flush=True)
    if not failed and not args.work:
        shutil.rmtree(work)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
    sys.exit(main())
