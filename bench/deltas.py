"""Every way of delta tuning beside full tuning: the time of a step, and what SFT in the Village learns.

    python -m bench.deltas --only time
    python -m bench.deltas --only quality      after bash run.sh, SEED=2 bash run.sh and SEED=3 bash run.sh

quality trains each method in every village that is there, 2 minutes a run; what is there is not repeated. It
prints the table of docs/lora.md and, with matplotlib, draws docs/lora.png.
"""
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.measure import head, run
from bench.train import gpt
from lib.program import start
from lora import DeltaConfig, attach
from zero import Zero

REHEARSAL = "--ptx 1 --ptx_data data/{}/pretrain.txt"
RUNS = {  # rates: the best of three by the loss of held-out replies after 300 steps in village 1
    "all weights": "--lr 4e-3", "lora, rank 1": "--tune lora --rank 1 --alpha 2 --lr 2e-2",
    "lora, rank 4": "--tune lora --rank 4 --alpha 8 --lr 2e-2",
    "lora, rank 16": "--tune lora --rank 16 --alpha 32 --lr 2e-2",
    "dora, rank 4": "--tune dora --rank 4 --alpha 8 --lr 2e-2",
    "adapter, width 16": "--tune adapter --rank 16 --lr 1e-2", "ladder": "--tune ladder --lr 3e-2",
    "prefix, 16": "--tune prefix --length 16 --lr 1e-1", "prompt, 16": "--tune prompt --length 16 --lr 3e-1",
    "bias": "--tune bias --lr 1e-1", "norm": "--tune norm --lr 1e-1",
    "last block": "--tune last --length 1 --lr 4e-3",
    "all weights, rehearsal": f"--lr 4e-3 {REHEARSAL}",
    "lora, rank 4, rehearsal": f"--tune lora --rank 4 --alpha 8 --lr 1e-2 {REHEARSAL}",
    "lora, rank 16, rehearsal": f"--tune lora --rank 16 --alpha 32 --lr 1e-2 {REHEARSAL}",
    "lora, rank 64, rehearsal": f"--tune lora --rank 64 --alpha 128 --lr 5e-3 {REHEARSAL}"}


COLUMNS = {"right, greedy": "{:.0f}", "invented": "{:.0f}", "gold": "{:.2f}", "loss of biographies": "{:.2f}"}


def learn(name: str, world: str) -> dict:
    """Train in one village and ask the held-out questions: what is trained, and the figures."""
    base, out = f"out/{world}/pretrain", f"out/deltas/{world}/{name.replace(', ', '-').replace(' ', '-')}"
    flags = RUNS[name].format(world).split()
    train = f"train_sft.py --data data/{world}/sft.jsonl --init {base} --out {out} --epochs 1 --seq_len 128"
    model = f"{base} --delta {out}" if "--tune" in flags else out
    card = f"-m village.scorecard --village data/{world} --model {model}"
    for command, made in ((train.split() + flags, "final"), (card.split(), "scorecard.json")):
        if not Path(out, made).exists():
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    found, files = json.loads(Path(out, "scorecard.json").read_text()), Path(out, "final")
    delta = torch.load(files / "delta.pt")["weights"] if "--tune" in flags else torch.load(files / "model.pt")
    sampled = found["sampled"]
    return {"trained": sum(x.numel() for x in delta.values()), "right, greedy": found["greedy"]["right"],
            "invented": (sampled["invented_untold"] + sampled["invented_elsewhere"]) / 2,
            "gold": sampled["gold"], "loss of biographies": found["biographies_loss"]}


def quality(cfg):
    worlds = [path.name for path in sorted(Path("data").glob("village*")) if Path("out", path.name).exists()]
    points = {}
    title = " | ".join(("", "trained", "AdamW holds", *COLUMNS))
    print(f"\n{len(worlds)} villages: mean (lowest..highest)\n\n|{title} |")
    print("|---" * 7 + "|")
    for name in RUNS:
        found = [learn(name, world) for world in worlds]
        cells = []
        for column, form in COLUMNS.items():
            some = [each[column] for each in found]
            cells.append(f"{form} ({form}..{form})".format(statistics.mean(some), min(some), max(some)))
        points[name] = found[0]["trained"], [each["right, greedy"] for each in found]
        trained = found[0]["trained"]  # AdamW: two float32 numbers for each
        print(f"| {name} | {trained:,} | {8 * trained / 1000:,.0f} kB | {' | '.join(cells)} |", flush=True)
    if importlib.util.find_spec("matplotlib"):
        draw(points)


def draw(points: dict) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    from bench.pictures import STYLE
    with matplotlib.rc_context(STYLE):
        figure = Figure()
        ax = figure.add_subplot(xscale="log", xlabel="numbers trained", ylabel="right, greedy, %")
        for name, (trained, right) in points.items():
            mean = statistics.mean(right)
            left = trained > 3e5 or name in ("lora, rank 4", "lora, rank 16, rehearsal")
            below = trained > 9e5 or name in ("prefix, 16", "dora, rank 4")  # where its name stands
            ax.errorbar(trained, mean, [[mean - min(right)], [max(right) - mean]], lw=1, ms=4,
                        fmt="C1o" if "rehearsal" in name else "C0o")
            ax.annotate(name, (trained, mean), (-5 if left else 5, -12 if below else 4),
                        textcoords="offset points", ha="right" if left else "left")
        figure.savefig("docs/lora.png")


def times(cfg):
    """Forward, backward and step of each method, as shares of full tuning's, in turns, on the CPU."""
    B, T, *shape = (16, 64, 2, 4, 128) if cfg.quick else (16, 256, 6, 6, 384)
    ids = torch.randint(0, 71, (B, T + 1), generator=torch.Generator().manual_seed(0))
    models = {}
    for tune in ("", "lora", "dora", "adapter", "ladder", "prefix", "prompt", "bias", "norm", "last"):
        model = gpt(*shape, T + 16, "flash").cpu()
        attach(model, DeltaConfig(tune=tune, length=1 if tune == "last" else 16), {"files": {}})
        models[tune] = model, Zero(model, units=model.units())
    taken = {tune: [] for tune in models}
    for _ in range(cfg.repeats + 1):
        for tune, (model, zero) in models.items():
            at = [time.perf_counter()]
            loss = -model(ids[:, :-1], ids[:, 1:], equal_weights=True).sum() / (B * T)
            at.append(time.perf_counter())
            zero.backward(loss)
            at.append(time.perf_counter())
            zero.step(1e-3, 1.0)
            at.append(time.perf_counter())
            taken[tune].append([at[1] - at[0], at[2] - at[1], at[3] - at[0]])
    head(f"GPT of {shape[0]} layers, width {shape[2]}, seq_len {T}, batch {B}: time / full tuning's")
    for tune in list(models)[1:]:
        parts = zip(zip(*taken[tune][1:]), zip(*taken[""][1:]))
        ratios = [sorted(a / b for a, b in zip(ours, full)) for ours, full in parts]
        words = [f"{statistics.median(some):.2f} ({some[0]:.2f}..{some[-1]:.2f})" for some in ratios]
        print(f"| {tune} | {words[2]} | forward {words[0]}, backward {words[1]} |", flush=True)


if __name__ == "__main__":
    start(lambda: run(__doc__, time=times, quality=quality))
