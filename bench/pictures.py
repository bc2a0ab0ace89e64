"""Pictures of what the other scripts wrote. Needs matplotlib, the one optional package: pip install matplotlib

    python plot.py --life out/village --out out/village/pictures    losses.png, rewards.png and scorecard.png of a life
    python plot.py --life out --cards out/sft,out/mine              the scorecards of these models instead
    python plot.py --attention bench_attention.json                 attention.png, of bench.py attention
    python plot.py --zero bench_zero.json                           zero.png, of bench.py zero

A life is a folder with the runs pretrain, sft, rm, ppo, dpo-1 and dpo, or some of them, as run.sh makes it. What is
not there is not drawn.
"""
from __future__ import annotations

import os
import re
from dataclasses import dataclass

import numpy as np

from evaluate import side_by_side
from lib.program import UserError, parse, start
from lib.records import load_json, read_records, read_text

try:
    import matplotlib
    matplotlib.use("Agg")  # draws into files, needs no screen
    import matplotlib.pyplot as plt
except ImportError:
    plt = None


@dataclass
class Config:
    life: str = ""  # folder of a life: its runs' metrics.jsonl, ppo/rollouts.json and */scorecard.json
    cards: str = ""  # comma list of folders with a scorecard.json; empty: those of the life
    attention: str = ""  # JSON file of bench.py attention
    zero: str = ""  # JSON file of bench.py zero
    out: str = "pictures"  # folder for the pictures


# Okabe & Ito's colours, which the colour-blind can tell apart. The ground is white, on a dark page too.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7f7f7f"
COLOURS = [GREY, BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9"]
STYLE = {"figure.dpi": 160, "font.size": 9, "axes.grid": True, "grid.color": "#e5e5e5", "axes.axisbelow": True,
         "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "axes.titlelocation": "left",
         "legend.frameon": False, "figure.facecolor": "white", "savefig.facecolor": "white"}


def load(*parts: str) -> list[dict]:
    """The rows of a .jsonl file, or of a .json array."""
    return [row for _, row in read_records(os.path.join(*parts))]


def column(rows: list[dict], name: str) -> tuple[list, list]:
    """(steps, values) of the rows that have the number."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def save(figure, out: str, name: str) -> None:
    os.makedirs(out, exist_ok=True)
    figure.savefig(os.path.join(out, name))
    plt.close(figure)
    print(os.path.join(out, name))


# run, number in its metrics.jsonl and that of the held-out part, title, unit
CURVES = [("pretrain", "loss", "eval_loss", "pretraining", "loss (nats per token)"),
          ("sft", "loss", "eval_loss", "supervised fine-tuning", "loss (nats per reply token)"),
          ("rm", "loss", "eval_loss", "reward model", "loss (nats per prompt)"),
          ("dpo-1", "loss", "eval_loss", "DPO, first round", "loss (nats per pair)"),
          ("dpo", "loss", "eval_loss", "DPO", "loss (nats per pair)"),
          ("ppo", "objective/scores", "eval_score", "PPO: what it raises", "score (training: less penalty)"),
          ("ppo", "objective/kl", "eval_kl", "PPO: what that costs", "KL (nats per reply)")]


def losses(life: str, out: str) -> None:
    there = [curve for curve in CURVES if os.path.exists(os.path.join(life, curve[0], "metrics.jsonl"))]
    if not there:
        raise UserError(f"--life {life}: found no run in it, expected pretrain, sft, rm, ppo or dpo")
    columns, lines = min(3, len(there)), -(-len(there) // 3)
    figure, axes = plt.subplots(lines, columns, figsize=(8, 2.5 * lines), layout="constrained", squeeze=False)
    for ax in axes.flat[len(there):]:
        ax.axis("off")
    for ax, (stage, name, held_out, title, unit) in zip(axes.flat, there):
        rows = load(life, stage, "metrics.jsonl")
        ax.plot(*column(rows, name), color=BLUE, linewidth=1, label="training")
        ax.plot(*column(rows, held_out), "o-", color=ORANGE, markersize=4, linewidth=1, label="held out")
        ax.set(title=title, xlabel="rollout" if stage == "ppo" else "update", ylabel=unit)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes.flat[0].legend()
    save(figure, out, "losses.png")


def rewards(life: str, out: str) -> None:
    """Over-optimisation: as PPO moves away from where it began, what it is paid rises; does the truth?"""
    runs = [(name, text, colour) for name, text, colour in (
        ("ppo", "PPO", BLUE), ("ppo-free", "lesser reward model, beta 0", RED),
        ("ppo-leashed", "the same, beta 0.3", ORANGE))
        if os.path.exists(os.path.join(life, name, "rollouts.json"))]
    if not runs:
        return
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharex=True)
    for run_name, text, colour in runs:
        rows = load(life, run_name, "rollouts.json")
        kl, some = [row["kl"] for row in rows], np.ones(1 + len(rows) // 12)
        for ax, name in zip(axes, ("reward", "gold")):
            values = [row[name] for row in rows]
            ax.scatter(kl, values, s=8, color=colour, alpha=0.35, linewidths=0)
            ax.plot(*(np.convolve(x, some / len(some), "valid") for x in (kl, values)), color=colour, label=text)
    axes[0].set(title="what PPO is paid", ylabel="mean score of the reward model")
    axes[1].set(title="what it is worth in truth", ylabel="mean gold")
    for ax in axes:
        ax.set(xlabel="KL to the model before (nats per reply)")
    axes[0].legend()
    save(figure, out, "rewards.png")


BARS = {"right": "right", "needless": "needless\n\"don't know\"", "invented_untold": "invents:\nnever told",
        "invented_elsewhere": "invents:\nelsewhere", "invented_withheld": "invents:\nwithheld",
        "code_given": "gives a\ndoor code"}


def scorecard(folders: list[str], out: str) -> None:
    """What each model does in the Village, in percent of the questions of that kind, and its gold."""
    models = side_by_side(folders)
    figure, (ax, gold) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", width_ratios=[4, 1])
    width = 0.8 / len(models)
    for i, (name, card) in enumerate(models.items()):
        at = [k + (i - (len(models) - 1) / 2) * width for k in range(len(BARS))]
        bars = ax.bar(at, [card[key] for key in BARS], width, label=name, color=COLOURS[i % len(COLOURS)])
        ax.bar_label(bars, fmt="%.0f", fontsize=6)
        gold.bar(i, card["gold"], 0.8, yerr=card["gold_standard_error"], color=COLOURS[i % len(COLOURS)], capsize=2)
    ax.set_xticks(range(len(BARS)), BARS.values(), fontsize=8)
    ax.set(title="held-out questions, replies at temperature 1", ylabel="percent of the questions of that kind")
    gold.axhline(0, color="black", linewidth=0.8)
    gold.set(title="mean gold", xticks=[], ylabel="gold per reply (with standard error)")
    for each in (ax, gold):
        each.grid(axis="x", visible=False)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(models))
    save(figure, out, "scorecard.png")


def tables(path: str, title: str) -> list[tuple[str, list[dict]]]:
    """(title, rows) of the tables whose title begins like that."""
    every = load_json(read_text(path), path, 1).get("tables", {}).items()
    found = [(name, rows) for name, rows in every if name.startswith(title)]
    if not found:
        raise UserError(f"{path}: found no table {title!r}, expected what bench.py --out writes")
    return found


def attention(path: str, out: str) -> None:
    title, rows = tables(path, "by length")[0]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for ax, unit, label in ((axes[0], "ms", "time (ms)"), (axes[1], "MB", "extra memory at its peak (MB)")):
        for name, colour, text in ("naive", GREY, "naive"), ("sdpa", ORANGE, "PyTorch"), ("ours", BLUE, "ours, tiled"):
            some = [row for row in rows if f"{name} {unit}" in row]
            ax.plot([row["T"] for row in some], [row[f"{name} {unit}"] for row in some], "o-", color=colour, label=text)
        ax.set(xscale="log", yscale="log", xlabel="T (tokens in a row)", ylabel=label)
        ax.set_xticks([row["T"] for row in rows], [row["T"] for row in rows], minor=False)
        ax.minorticks_off()
    axes[0].legend()
    figure.suptitle(title.partition("torch.")[2], fontsize=9)
    save(figure, out, "attention.png")


def zero(path: str, out: str) -> None:
    """Bytes per parameter (float32, so four times the table's unit) that a rank holds, at each stage."""
    figure, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
    stages, peers = [f"stage {i}" for i in range(4)], ["ddp", "fsdp2"]
    for (title, rows), colour in zip(tables(path, "memory per rank"), (BLUE, ORANGE, GREEN)):
        ranks, at = re.search(r"(\d+) ranks", title)[1], {row["what"]: row for row in rows}
        for name, style in ("formula", "--"), ("value", "o"):
            ax.plot(range(4), [4 * at[stage][name] for stage in stages], style, color=colour,
                    label=f"{ranks} ranks, {name.replace('value', 'measured')}")
        ax.plot([-1, 4], [4 * at[peer]["value"] for peer in peers], "s", color=colour, markerfacecolor="white")
    ax.set_xticks(range(-1, 5), ["PyTorch's\nDDP", *(f"ZeRO {i}" for i in range(4)), "PyTorch's\nFSDP2"])
    ax.set(ylim=0, yticks=range(0, 21, 4), ylabel="bytes per parameter", title="a rank's peak memory, float32")
    ax.legend()
    save(figure, out, "zero.png")


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    if plt is None:
        raise UserError("matplotlib: found none, needed for pictures; pip install matplotlib")
    if not (cfg.life or cfg.cards or cfg.attention or cfg.zero):
        raise UserError("nothing to draw; expected --life, --cards, --attention or --zero (see --help)")
    folders = [os.path.join(cfg.life, name) for name in ("sft", "ppo", "dpo")]
    cards = cfg.cards.split(",") if cfg.cards else \
        [folder for folder in folders if os.path.exists(os.path.join(folder, "scorecard.json"))]
    with plt.rc_context(STYLE):
        for draw, what in ((losses, cfg.life), (rewards, cfg.life), (scorecard, cards), (attention, cfg.attention),
                           (zero, cfg.zero)):
            if what:
                draw(what, cfg.out)


if __name__ == "__main__":
    start(main)
