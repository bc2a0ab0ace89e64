"""Kill -9 small runs of the training scripts at random moments, and compare with runs that never died.

    python tests/kill.py --script sft --tries 20            5 kills at each of 1 and 2 ranks, ZeRO 0 and 3
    python tests/kill.py --script ppo --tries 8 --world 2 --zero 3 --seed 7

Every second kill comes at a random moment, every other one while a checkpoint is written. After each kill all
step folders must be whole. A run that reached its end must have the weights, the curve and the samples of the
reference, to the last bit. The ranks are forked from a process that has imported everything.
"""
from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
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

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch
from ranks import warm

from lib.checkpoint import KEEP, _examine
from lib.program import UserError, start

SCRIPTS = ("pretrain", "sft", "rm", "dpo", "ppo")
STEPS = {"pretrain": 8, "sft": 8, "rm": 8, "dpo": 8, "ppo": 4}  # one of PPO has 4 updates: 2 models, 2 parts
PATIENCE = 600  # seconds that a small run may take, on a machine that has other things to do


# ---- small runs ------------------------------------------------------------------------------------------

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
    """The flags of a small run that saves after every step."""
    chat = f"--init {inputs}/chat --val_fraction 0.2"
    pairs = f"--data {inputs}/ranked.jsonl {chat} --batch_size 4 --eval_prompts 0"
    own = {
        "pretrain": f"--data {inputs}/text.txt --cache {inputs}/cache --tokenizer byte --n_layer 2 "
                    "--n_embd 32 --n_head 2 --seq_len 24 --batch_size 6 --eval_rows 12 --sample_tokens 0",
        "sft": f"--data {inputs}/chats.jsonl {chat} --batch_size 4 --eval_prompts 0",
        "rm": pairs, "dpo": pairs,
        "ppo": f"--data {inputs}/prompts.jsonl {chat} --reward_model {inputs}/rm --batch_size 8 "
               "--minibatches 2 --max_new_tokens 6 --eval_prompts 2 --target_kl 0.05 --kl_horizon 100 --stop_kl 0"}[script]
    shared = "--resume --save_every 1 --eval_every 0 --log_every 1 --warmup_steps 2 --lr 3e-3 --device cpu"
    return [*own.split(), *shared.split(), "--steps", str(STEPS[script]), "--out", str(out), *more]


def play(script: str, argv: list[str], before) -> int:
    """One rank: the script's main() as `python` would run it. before(): what to break first."""
    faulthandler.dump_traceback_later(PATIENCE - 10)  # says where it hangs
    try:
        module = importlib.import_module(f"train_{script}")
        for place in (module, sys.modules.get("lib.run"), sys.modules["lib.program"]):
            if hasattr(place, "matmul_peak"):
                place.matmul_peak = lambda *_: 1e10  # the speed of this machine is not what is tested
        if before:
            before()
        start(lambda: module.main(argv))
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1


def play_all(script: str, argv: list[str], world: int, port: int, log: str, before) -> None:
    """The ranks of one run, in a process group of their own; ends with the largest exit code."""
    os.setsid()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if world == 1:
        os._exit(play(script, argv, before))
    children = []
    for rank in range(world):
        children.append(os.fork())
        if children[-1] == 0:
            numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world,
                       "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(n) for name, n in numbers.items()}
            os._exit(play(script, argv, before))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a signal to the group is for the ranks
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os._exit(max(code if code >= 0 else 128 - code for code in codes))  # of a killed one: as a shell says it


def free_port() -> int:
    """Below the ports that the system gives to connections: a rank could else be connected with itself."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return port


class Job:
    """A run in the background: its process group is `pid`, what it prints is in `log`."""

    def __init__(self, script: str, argv: list[str], world: int = 1, before=None, log: Path | None = None):
        out = Path(argv[argv.index("--out") + 1])
        self.log = log or out.parent / f"{out.name}.log"
        job = (script, argv, world, free_port(), str(self.log), before)
        self.process = warm().Process(target=play_all, args=job)
        self.process.start()
        self.pid = self.process.pid

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code; -9 for a run that was killed, also for one that did not end in time."""
        self.process.join(seconds)
        if self.alive():
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


# ---- what must hold --------------------------------------------------------------------------------------

def folders(out: Path, pattern: str = r"step-\d{8}") -> list[str]:
    return sorted(name for name in os.listdir(out) if re.fullmatch(pattern, name)) if out.exists() else []


def parts(out: Path) -> list[str]:
    """Checkpoints that are not whole yet, or no longer."""
    return folders(out, r"step-\d{8}\.tmp-\w+")


def check_folders(out: Path) -> str:
    """What is wrong with the checkpoints of a run that was killed; "" if nothing is."""
    found = folders(out)
    if len(found) + len(parts(out)) > KEEP + 2:  # one is being written, and one is to be removed
        return f"too many folders: {found + parts(out)}"
    try:
        return "".join("" for name in found if not _examine(out / name, "meta.json"))
    except UserError as error:
        return str(error)


CLOCK = re.compile(r"tokens_per_second|mfu|memory|seconds/")


def outcome(out: Path) -> dict:
    """All that a run leaves, but for what it says about the machine."""
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    samples = out / "samples.jsonl"
    return {"weights": torch.load(out / "final" / "model.pt", weights_only=True),
            "curve": [{k: v for k, v in line.items() if not CLOCK.match(k)} for line in lines],
            "samples": samples.read_text() if samples.exists() else ""}


def difference(found: dict, expected: dict) -> str:
    """In what a run differs from the one that never died; "" if in nothing, to the last bit."""
    for name, weight in expected["weights"].items():
        if name not in found["weights"] or not torch.equal(found["weights"][name], weight):
            return f"other weights: {name}"
    # A run that had finished and is resumed says once more how it went.
    curve = [line for i, line in enumerate(found["curve"]) if line not in found["curve"][:i]]
    if curve != expected["curve"]:
        return f"another curve: {curve} instead of {expected['curve']}"
    return "" if found["samples"] == expected["samples"] else "other samples"


# ---- kills -----------------------------------------------------------------------------------------------

def kill(run: Job, late: float, saves: int, out: Path) -> bool:
    """Kill `late` seconds after the start, or after the saves-th checkpoint began. False: it had ended."""
    clock, seen = time.monotonic(), set()
    while run.alive() and time.monotonic() < clock + late:
        if len(seen) < saves:
            clock = time.monotonic()
            seen.update(parts(out))
        time.sleep(0.0005)
    alive = run.alive()
    run.signal(signal.SIGKILL)
    run.wait()
    return alive


def torment(script, world: int, zero: int, kills: int, inputs: Path, work: Path, dice: random.Random) -> dict:
    """Kill runs of one setting `kills` times, each run once or twice. Returns counts and "problems"."""
    def begin() -> Job:
        return Job(script, arguments(script, inputs, out, "--zero", str(zero)), world)

    work.mkdir(parents=True, exist_ok=True)
    out, clock = work / f"reference-{world}-{zero}", time.monotonic()
    if code := begin().wait():
        sys.exit(f"the reference run ended with {code}, see {out}.log")
    seconds, expected = time.monotonic() - clock, outcome(out)
    result = {"kills": 0, "in save": 0, "runs": 0, "problems": []}
    while result["kills"] < kills:
        out = work / f"run-{world}-{zero}-{result['runs']}"
        for _ in range(min(dice.randint(1, 2), kills - result["kills"])):
            in_save = result["kills"] % 2
            late = dice.uniform(0, 0.02 if in_save else seconds)
            if kill(begin(), late, dice.randint(1, 4) if in_save else 0, out):
                result["kills"] += 1
                result["in save"] += bool(parts(out))
                if problem := check_folders(out):
                    result["problems"].append(f"{out}, killed: {problem}")
        code = begin().wait()
        result["runs"] += 1
        if problem := f"ended with {code}" if code else difference(outcome(out), expected):
            result["problems"].append(f"{out}: {problem}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--script", choices=SCRIPTS, required=True)
    parser.add_argument("--tries", type=int, default=20, help="kills in all, spread over the settings")
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2], help="numbers of ranks")
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 3], help="ZeRO stages")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    work, dice, failed = Path(tempfile.mkdtemp(prefix="kill-")), random.Random(args.seed), 0
    inputs = make_inputs(work / "inputs")
    settings = [(world, zero) for world in args.world for zero in args.zero]
    for world, zero in settings:
        result = torment(args.script, world, zero, -(-args.tries // len(settings)), inputs, work, dice)
        print(f"{args.script}, {world} ranks, ZeRO {zero}:", result, flush=True)
        failed += len(result["problems"])
    if not failed:
        shutil.rmtree(work)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
