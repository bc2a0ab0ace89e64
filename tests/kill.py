"""Kill -9 small runs of the training scripts at random moments, and compare with runs that never died.

    python tests/kill.py --script sft --tries 20 --seed 7    5 kills at each of 1 and 2 ranks, ZeRO 0 and 3

Every second kill comes at a random moment, every other one while a checkpoint is written. After each kill all
step folders must be whole. A run that reached its end must have the weights, the curve and the samples of the
reference, to the last bit. Otherwise: an AssertionError, and the folder of the runs stays.
"""
import argparse
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
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
from lib.program import start

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
               "--minibatches 2 --max_new_tokens 6 --eval_prompts 2 --stop_kl 0"}[script]
    shared = "--resume --save_every 1 --eval_every 0 --log_every 1 --warmup_steps 2 --lr 3e-3 --device cpu"
    return [*own.split(), *shared.split(), "--steps", str(STEPS[script]), "--out", str(out), *more]


def play(script: str, argv: list[str], before) -> int:
    """One rank: the script's main() as `python` would run it. before(): what to break first."""
    try:
        module = importlib.import_module(f"train_{script}")
        sys.modules["lib.run"].matmul_peak = lambda *_: 1e10  # the speed of the machine is not tested
        if before:
            before()
        start(lambda: module.main(argv))
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1


def play_all(script: str, argv: list[str], world: int, log: str, before) -> None:
    """The ranks of one run, in a process group of their own; ends with the largest exit code."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if world == 1:
        os._exit(play(script, argv, before))
    port = random.randrange(20_000, 30_000)  # not one that the system may give to a connection meanwhile
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": str(port),
                   "MASTER_ADDR": "127.0.0.1"}
    children = []
    for rank in range(world):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os._exit(play(script, argv, before))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a signal to the group is for the ranks
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os._exit(max(code if code >= 0 else 128 - code for code in codes))  # of a killed one: as a shell says it


class Job:
    """A run in the background: its process group is `pid`, what it prints is in `log`."""

    def __init__(self, script: str, argv: list[str], world: int = 1, before=None, log: Path | None = None):
        out = Path(argv[argv.index("--out") + 1])
        self.log = log or out.parent / f"{out.name}.log"
        self.process = warm().Process(target=play_all, args=(script, argv, world, str(self.log), before))
        self.process.start()
        self.pid = self.process.pid

    def wait(self) -> int:
        """The exit code; -9 for a run that was killed, also for one that did not end in time."""
        self.process.join(PATIENCE)
        if self.alive():
            self.signal(signal.SIGKILL)
            self.process.join()
        return self.process.exitcode

    def alive(self) -> bool:
        return self.process.exitcode is None

    def signal(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # not yet in its own group
            self.alive() and os.kill(self.pid, number)

    def text(self) -> str:
        return self.log.read_text(errors="replace")


# ---- what must hold --------------------------------------------------------------------------------------

def folders(out: Path, pattern: str = r"step-\d{8}") -> list[str]:
    return sorted(name for name in os.listdir(out) if re.fullmatch(pattern, name)) if out.exists() else []


def parts(out: Path) -> list[str]:
    """Checkpoints that are not whole yet, or no longer."""
    return folders(out, r"step-\d{8}\.tmp-\w+")


CLOCK = re.compile(r"tokens_per_second|mfu|memory|seconds/")


def outcome(out: Path) -> dict:
    """All that a run leaves, but for what it says about the machine."""
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return {"weights": torch.load(out / "final" / "model.pt", weights_only=True),
            "curve": [{k: v for k, v in line.items() if not CLOCK.match(k)} for line in lines],
            "samples": [path.read_text() for path in out.glob("samples.jsonl")]}


def difference(found: dict, expected: dict) -> str:
    """In what a run differs from the one that never died; "" if in nothing, to the last bit."""
    for name, weight in expected["weights"].items():
        if not torch.equal(found["weights"][name], weight):
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
    """Kill runs of one setting `kills` times, each run once or twice. Returns how often."""
    def begin() -> Job:
        return Job(script, arguments(script, inputs, out, "--zero", str(zero)), world)

    work.mkdir(parents=True, exist_ok=True)
    out, clock = work / f"reference-{world}-{zero}", time.monotonic()
    assert begin().wait() == 0, f"see {out}.log"
    seconds, expected = time.monotonic() - clock, outcome(out)
    counts = {"kills": 0, "in save": 0, "runs": 0}
    while counts["kills"] < kills:
        out = work / f"run-{world}-{zero}-{counts['runs']}"
        for _ in range(min(dice.randint(1, 2), kills - counts["kills"])):
            in_save = counts["kills"] % 2
            late = dice.uniform(0, 0.02 if in_save else seconds)
            if kill(begin(), late, dice.randint(1, 4) * in_save, out):
                counts["kills"] += 1
                counts["in save"] += bool(parts(out))
                for name in folders(out):
                    _examine(out / name, "meta.json")
                assert len(folders(out) + parts(out)) <= KEEP + 2  # one is new, one is to be removed
        assert begin().wait() == 0, f"see {out}.log"
        assert not (problem := difference(outcome(out), expected)), f"{out}: {problem}"
        counts["runs"] += 1
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--script", choices=SCRIPTS, required=True)
    parser.add_argument("--tries", type=int, default=20, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    work, dice = Path(tempfile.mkdtemp(prefix="kill-")), random.Random(args.seed)
    inputs = make_inputs(work / "inputs")
    for world, zero in itertools.product((1, 2), (0, 3)):
        counts = torment(args.script, world, zero, -(-args.tries // 4), inputs, work, dice)
        print(f"{args.script}, {world} ranks, ZeRO {zero}: {counts}", flush=True)
    shutil.rmtree(work)
