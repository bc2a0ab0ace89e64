"""Every way of delta tuning beside full tuning, as SFT in the Village: what it costs and what is learnt.

    python -m bench.deltas                           after bash run.sh, SEED=2 bash run.sh, SEED=3 bash run.sh
    python -m bench.deltas --seeds 1 --only lora     one world, one method

Prints the table of docs/lora.md and draws docs/lora.png. A run that is there is not made again.
"""
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lib.program import UserError, parse, start

FLAGS = ["--epochs", "2", "--seq_len", "128", "--eval_every", "0", "--eval_prompts", "0"]
RUNS = {  # the best of three rates, by the loss of held-out replies after 500 steps in world 1
    "full": ["--lr", "2e-3"], "lora": ["--lr", "2e-2"]}


@dataclass
class Config:
    seeds: str = "1,2,3"  # worlds, and of SFT
    only: str = ""  # one method
    out: str = "out/deltas"  # folder of the runs


def measure(name: str, seed: str, cfg: Config) -> dict:
    """Train, ask the held-out questions, and say what it was."""
    of = "" if seed == "1" else f"-{seed}"
    base, out, world = f"out/village{of}/pretrain", f"{cfg.out}/{name}{of}", f"data/village{of}"
    train = [sys.executable, "train_sft.py", "--data", f"{world}/sft.jsonl", "--init", base, "--out", out,
             "--seed", seed, *FLAGS, *RUNS[name]]
    tuned = "--tune" in RUNS[name]
    model = ["--model", base, "--delta", out] if tuned else ["--model", out]
    card = [sys.executable, "-m", "village.scorecard", "--village", world, "--seed", seed, *model]
    for command, made in ((train, "final"), (card, "scorecard.json")):
        if not Path(out, made).exists():
            subprocess.run(command, check=True)
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    found = json.loads(Path(out, "scorecard.json").read_text())
    return {"right": found["greedy"]["right"]}


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)


if __name__ == "__main__":
    start(main)
