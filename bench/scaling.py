"""docs/scaling.png: runs of equal FLOPs, and the law. It needs matplotlib: pip install matplotlib

    python -m bench.scaling --law out/scaling/torch/law.json --out docs/scaling.png
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.pictures import STYLE
from lib.program import UserError, parse, start


@dataclass
class Config:
    law: str = "out/scaling/torch/law.json"  # what `python -m tools.scaling measure` wrote
    out: str = "docs/scaling.png"  # the picture


def draw(ax, known: dict) -> None:
    """Loss over N, a colour for each budget. Points are runs, lines are the law; dashed, with a star: the
    largest run, which the law has not seen."""
    E, A, alpha, B, beta = known["law"].values()
    N, D, loss = np.array([*known["points"], [*known["largest"], known["loss"]]]).T  # (runs,) each
    C, sizes = 6 * N * D, np.geomspace(N.min() / 1.3, N.max() * 2, 200)
    for budget in sorted({float(f"{c:.3g}") for c in C}):
        mine, style, mark = np.isclose(C, budget, rtol=0.01), "-", "o"
        if mine[-1]:
            style, mark = "--", "*"
        line, = ax.plot(sizes, E + A / sizes**alpha + B * (6 * sizes / budget) ** beta, style, lw=1)
        ax.plot(N[mine], loss[mine], mark, color=line.get_color(), label=f"{budget:.3g} FLOPs")
    ax.set(xscale="log", xlabel="N: FLOPs of a token / 6", ylabel="held-out loss, nats a byte",
           ylim=(loss.min() - 0.05, loss.max() + 0.05))
    ax.legend()


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no picture: it needs matplotlib; pip install matplotlib")
    if not Path(cfg.law).exists():
        raise UserError(f"--law {cfg.law}: found no file, expected the law.json of `tools.scaling measure`")
    plt.switch_backend("Agg")  # into files: it needs no screen
    with plt.style.context(["seaborn-v0_8-colorblind", STYLE]):
        figure, ax = plt.subplots()
        draw(ax, json.loads(Path(cfg.law).read_text("utf-8")))
        figure.savefig(cfg.out)


if __name__ == "__main__":
    start(main)
