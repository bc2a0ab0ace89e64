"""losses.png, rewards.png and scorecard.png of a life. They need matplotlib: pip install matplotlib

    python -m bench.pictures --life out/village --out out/village/pictures
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.program import UserError, parse, start
from lib.records import read_records

STYLE = {"figure.figsize": (8, 3.4), "figure.dpi": 160, "figure.constrained_layout.use": True, "font.size": 8}
CURVES = [*((run, "loss", "eval_loss") for run in ("pretrain", "sft", "rm", "dpo-1", "dpo")),
          ("ppo", "objective/scores", "eval_score"), ("ppo", "objective/kl", "eval_kl")]
REWARDED = {"ppo": "PPO", "grpo": "GRPO", "ppo-free": "lesser reward model, beta 0",
            "ppo-leashed": "the same, beta 0.3"}
BARS = "right", "needless", "invented_untold", "invented_elsewhere", "invented_withheld", "code_given"


@dataclass
class Config:
    life: str = "out/village"  # folder with the runs of a life
    out: str = "pictures"  # folder for the pictures


def losses(figure, life: Path) -> bool:
    """What the stages' own logs say, in training and on what was held out."""
    curves = [curve for curve in CURVES if (life / curve[0] / "metrics.jsonl").exists()]
    if not curves:
        raise UserError(f"--life {life}: found no run in it, expected pretrain, sft, rm, ppo or dpo")
    figure.set_figheight(2.4 * -(-len(curves) // 3))
    for i, (run, *names) in enumerate(curves, start=1):
        ax = figure.add_subplot(-(-len(curves) // 3), 3, i, title=run)
        rows = read_records(life / run / "metrics.jsonl")
        for name, style in zip(names, ("-", "o-")):
            some = [row for row in rows if row.get(name) is not None]
            ax.plot([row["step"] for row in some], [row[name] for row in some], style, label=name, lw=1, ms=4)
        ax.legend()
    return True


def rewards(figure, life: Path) -> bool:
    """As PPO moves away from where it began, what it is paid rises. Is it worth more in truth?"""
    axes = figure.subplots(1, 2, sharex=True)
    for run, label in REWARDED.items():
        path = life / run / "rollouts.json"
        rows = read_records(path) if path.exists() else []
        for ax, name in zip(axes, ("reward", "gold")) if rows else ():
            ax.plot([row["kl"] for row in rows], [row[name] for row in rows], ".", label=label)
    for ax, title in zip(axes, ("paid: mean score of the reward model", "worth in truth: mean gold")):
        ax.set(title=title, xlabel="KL to the model before (nats per reply)")
    axes[0].legend()
    return bool(axes[0].lines)


def scorecard(figure, life: Path) -> bool:
    """What each model does in the Village, in percent of the questions of that kind, and its gold."""
    from village.scorecard import side_by_side
    folders = [life / run for run in ("sft", "ppo", "dpo", "grpo")]
    models = side_by_side([folder for folder in folders if (folder / "scorecard.json").exists()])
    ax = figure.add_subplot()
    for i, (name, card) in enumerate(models.items()):
        label = f"{name}: gold {card['gold']:.2f} +- {card['gold_standard_error']:.2f}"
        at = np.arange(len(BARS)) + 0.8 * ((i + 0.5) / len(models) - 0.5)
        ax.bar_label(ax.bar(at, [card[key] for key in BARS], 0.8 / len(models), label=label), fmt="%.0f")
    ax.set_xticks(range(len(BARS)), [key.replace("_", "\n") for key in BARS])
    ax.set(title="held-out questions, replies at temperature 1", ylabel="percent of the questions of a kind")
    figure.legend(loc="outside lower center", ncols=3)
    return bool(models)


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no pictures: they need matplotlib; pip install matplotlib")
    plt.switch_backend("Agg")  # into files: it needs no screen
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    with plt.style.context(["seaborn-v0_8-colorblind", STYLE]):
        for draw in (losses, rewards, scorecard):
            figure, path = plt.figure(), Path(cfg.out) / f"{draw.__name__}.png"
            if draw(figure, Path(cfg.life)):
                figure.savefig(path)
                print(path)


if __name__ == "__main__":
    start(main)
