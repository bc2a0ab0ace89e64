"""losses.png, rewards.png and scorecard.png of a life. They need matplotlib: pip install matplotlib

    python -m bench.pictures --life out/village --out out/village/pictures

A life is a folder with the runs pretrain, sft, rm, ppo, dpo-1 and dpo, or some of them, as run.sh makes it.
"""
import os
from dataclasses import dataclass

import numpy as np

from lib.program import UserError, parse, start
from lib.records import read_records

try:
    import matplotlib.pyplot as plt
except ImportError:
    plt = None

COLOURS = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"  # the colour-blind can tell them apart
STYLE = {"figure.figsize": (8, 3.4), "figure.dpi": 160, "figure.constrained_layout.use": True, "font.size": 9,
         "axes.titlesize": 9, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e5e5e5",
         "legend.frameon": False}
CURVES = [*((run, "loss", "eval_loss") for run in ("pretrain", "sft", "rm", "dpo-1", "dpo")),
          ("ppo", "objective/scores", "eval_score"), ("ppo", "objective/kl", "eval_kl")]
REWARDED = {"ppo": "PPO", "ppo-free": "lesser reward model, beta 0", "ppo-leashed": "the same, beta 0.3"}
BARS = "right", "needless", "invented_untold", "invented_elsewhere", "invented_withheld", "code_given"


@dataclass
class Config:
    life: str = "out/village"  # folder with the runs of a life
    out: str = "pictures"  # folder for the pictures


def losses(life: str):
    """What the stages' own logs say, in training and on what was held out."""
    curves = [curve for curve in CURVES if os.path.exists(os.path.join(life, curve[0], "metrics.jsonl"))]
    if not curves:
        raise UserError(f"--life {life}: found no run in it, expected pretrain, sft, rm, ppo or dpo")
    lines = -(-len(curves) // 3)
    figure, axes = plt.subplots(lines, 3, figsize=(8, 2.4 * lines), squeeze=False)
    for ax in axes.flat[len(curves):]:
        ax.axis("off")
    for ax, (run, *names) in zip(axes.flat, curves):
        rows = [row for _, row in read_records(os.path.join(life, run, "metrics.jsonl"))]
        for name, style in zip(names, ("-", "o-")):
            some = [row for row in rows if row.get(name) is not None]
            ax.plot([row["step"] for row in some], [row[name] for row in some], style, label=name, lw=1, ms=4)
        ax.set(title=run, xlabel="rollout" if run == "ppo" else "step")
        ax.legend()
    return figure


def rewards(life: str):
    """As PPO moves away from where it began, what it is paid rises. Is it worth more in truth?"""
    figure, axes = plt.subplots(1, 2, sharex=True)
    paths = {label: os.path.join(life, run, "rollouts.json") for run, label in REWARDED.items()}
    for (label, path), colour in zip(paths.items(), COLOURS):
        rows = [row for _, row in read_records(path)] if os.path.exists(path) else []
        mean = np.ones(1 + len(rows) // 12) / (1 + len(rows) // 12)  # over neighbouring rollouts
        for ax, name in zip(axes, ("reward", "gold")) if rows else ():
            kl, values = [row["kl"] for row in rows], [row[name] for row in rows]
            ax.scatter(kl, values, s=8, color=colour, alpha=0.35, linewidths=0)
            ax.plot(*(np.convolve(x, mean, "valid") for x in (kl, values)), color=colour, label=label)
    for ax, title in zip(axes, ("paid: mean score of the reward model", "worth in truth: mean gold")):
        ax.set(title=title, xlabel="KL to the model before (nats per reply)")
    axes[0].legend()
    return figure if axes[0].lines else None


def scorecard(life: str):
    """What each model does in the Village, in percent of the questions of that kind, and its gold."""
    from village.scorecard import side_by_side
    folders = [os.path.join(life, run) for run in ("sft", "ppo", "dpo")]
    models = side_by_side([f for f in folders if os.path.exists(os.path.join(f, "scorecard.json"))])
    figure, (ax, gold) = plt.subplots(1, 2, width_ratios=[4, 1])
    for i, (name, card) in enumerate(models.items()):
        look = {"label": name, "color": COLOURS[i % 5]}
        at = np.arange(len(BARS)) + 0.8 * ((i + 0.5) / len(models) - 0.5)
        bars = ax.bar(at, [card[key] for key in BARS], 0.8 / len(models), **look)
        ax.bar_label(bars, fmt="%.0f", fontsize=6)
        gold.bar(i, card["gold"], yerr=card["gold_standard_error"], capsize=2, **look)
    ax.set_xticks(range(len(BARS)), [key.replace("_", "\n") for key in BARS])
    ax.set(title="held-out questions, replies at temperature 1", ylabel="percent of the questions of a kind")
    gold.set(title="mean gold per reply", xticks=[])
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(models) or 1)
    return figure if models else None


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    if plt is None:
        raise UserError("matplotlib: found none, needed for pictures; pip install matplotlib")
    os.makedirs(cfg.out, exist_ok=True)
    plt.switch_backend("Agg")  # into files: it needs no screen
    with plt.rc_context(STYLE | {"axes.prop_cycle": plt.cycler(color=COLOURS)}):
        for draw in (losses, rewards, scorecard):
            if figure := draw(cfg.life):
                path = os.path.join(cfg.out, f"{draw.__name__}.png")
                figure.savefig(path)
                print(path)


if __name__ == "__main__":
    start(main)
