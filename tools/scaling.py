"""How large a model, how many tokens, which machine? Plan a run; measure a scaling law.

    L(N, D) = E + A / N^alpha + B / D^beta        C = 6 N D        (Hoffmann et al. 2022, arXiv 2203.15556)

N: size of a model, D: tokens it reads, C: FLOPs of its training, L: loss on held-out text. E is what nobody
can know, A's term what a small model cannot hold, B's what a short text does not tell (docs/scaling.md).

    python -m tools.scaling plan --params 7e9 --tokens 1e12 --gpu h100 --n 64
    python -m tools.scaling measure      on two idle cores 40 minutes, --quick 4; the same command goes on
"""
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from kernels import LOGITS_AT_ONCE
from lib.checkpoint import expect, reading
from lib.corpora import read_corpus, split_documents
from lib.program import parse, replacing, require_positive, start
from lib.records import read_records
from model import GPTConfig
from zero import per_rank


class Law(namedtuple("Law", "E A alpha B beta")):
    def loss(self, N, D):
        return self.E + self.A / N**self.alpha + self.B / D**self.beta

    def best_tokens(self, N: float) -> float:
        """The D for which N is the best use of 6 N D FLOPs: there alpha A / N^alpha = beta B / D^beta."""
        return (self.beta * self.B / (self.alpha * self.A) * N**self.alpha) ** (1 / self.beta)

    def best_size(self, C: float) -> float:
        return (C / 6 / self.best_tokens(1)) ** (self.beta / (self.alpha + self.beta))

    def tokens_for(self, N: float, loss: float) -> float:
        """How many tokens bring size N to this loss; inf: no number does."""
        left = loss - self.E - self.A / N**self.alpha
        return (self.B / left) ** (1 / self.beta) if left > 0 else math.inf


def worth(x: float, once: float, most: float = 15.387756) -> float:
    """Of x tokens only `once` differ: R = x / once - 1 more readings are worth R* (1 - e^(-R / R*)) of them,
    R* = most (Muennighoff et al. 2023, arXiv 2305.16264, section 3.1)."""
    return min(x, once + once * most * (1 - math.exp((1 - max(x / once, 1)) / most)))


def fit_law(N, D, L, bootstrap: int = 0) -> list[Law]:
    """[law, and those of points drawn anew with replacement]: the least SUM of Huber's loss, delta 1e-3, of
    log L(N, D) - log L (Hoffmann et al. 2022, section 3.3; their mean of it stopped early, 2404.10102)."""
    x, y, z = (torch.tensor(np.log(np.asarray(v, float))) for v in (N, D, L))  # (n,) each
    mx, my, E = x.mean(), y.mean(), 0.7 * z.min().exp()  # centred, A hardly depends on alpha
    def descend(start, counts) -> tuple[float, list[float]]:
        theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14,
                                      line_search_fn="strong_wolfe")
        def closure():
            optimizer.zero_grad()
            e, a, alpha, b, beta = theta
            parts = torch.stack((e.expand_as(x), a - alpha * (x - mx), b - beta * (y - my)))  # (3, n)
            cost = (counts * F.huber_loss(parts.logsumexp(0), z, reduction="none", delta=1e-3)).sum()
            cost.backward()
            return cost
        optimizer.step(closure)
        return closure().item(), theta.tolist()
    half, ones = math.log((z.mean().exp() - E) / 2), torch.ones_like(z)
    _, best = min(descend((math.log(E), half, a, half, b), ones) for a in (0.2, 0.5) for b in (0.2, 0.5))
    drawn = torch.tensor(np.random.default_rng(0).multinomial(len(z), ones / len(z), bootstrap))
    return [Law(math.exp(e), math.exp(a + alpha * mx), alpha, math.exp(b + beta * my), beta)
            for e, a, alpha, b, beta in (best, *(descend(best, counts)[1] for counts in drawn))]


def minimum(N, L) -> tuple[float, float] | None:
    """(N, L) at the lowest point of a parabola in log N through models of one budget (Hoffmann et al. 2022,
    section 3.2). None if they are fewer than five, or if it lies outside: there nothing is known."""
    c2, c1, c0 = np.polyfit(np.log(N), L, 2) if len(N) > 4 else (0, 0, 0)
    at = math.exp(-c1 / c2 / 2) if c2 > 0 else 0
    return (at, c0 - c1 * c1 / c2 / 4) if min(N) < at < max(N) else None


# ---- plan ------------------------------------------------------------------------------------------------
GPUS = {"rtx4090": (24, 165), "a100": (80, 312), "h100": (80, 989), "h200": (141, 989), "b200": (192, 2250)}
STAGES = {"0 data parallel": (0, 0), "1 + optimizer": (1, 0), "2 + gradients": (2, 0), "3 + weights": (3, 0),
          "3, offload optim": (3, 1), "3, and params": (3, 2)}  # GPUS: GB, and TFLOP/s in bfloat16


@dataclass
class PlanConfig:
    params: float = 7e9  # parameters of the model
    tokens: float = 0.0  # tokens to train on; 0: as many as make this size the best one
    served: float = 0.0  # tokens that the finished model will read and write
    law: str = ""  # law.json that `measure` wrote; empty: Chinchilla's points, as fitted anew in 2024
    vocab_size: int = 32000  # V
    seq_len: int = 2048  # tokens in a row
    rows: int = 1  # rows of a micro-batch, on each GPU
    micro_batches: int = 1  # of a step, on each GPU
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights and activations in the passes
    gpu: Literal["rtx4090", "a100", "h100", "h200", "b200"] = "h100"  # which GPU
    n: int = 8  # how many of them
    mfu: float = 0.4  # share of their bfloat16 peak that training reaches


def sizes_of(c: GPTConfig) -> tuple[int, int, int, int, int]:
    """(parameters; those of ZeRO's largest unit; FLOPs of a trained token, as GPT.flops_per_token has them;
    numbers a token that blocks keep for backward; with checkpointing: each its input, and one the rest)."""
    C, H, G, F, D = c.n_embd, c.n_head, c.n_kv_head, c.mlp_hidden, c.n_embd // c.n_head
    products, table = C * (D * (2 * H + 2 * G) + 3 * F), c.vocab_size * C
    block = products + 2 * C + 2 * D  # kept: two norms 6 C; q, k, v; q and k normalised, turned; v by heads;
    kept = 11 * C + 5 * D * G + 4 * F + 2 + 2 * H + G  # result twice; MLP 4 F; of norms and softmax one each
    flops = 6 * (c.n_layer * products + table) + 6 * c.n_layer * C * (c.max_seq_len + 1)
    return c.n_layer * block + 2 * table + C, max(block, table), flops, c.n_layer * kept, c.n_layer * C + kept


def plan_memory(cfg: PlanConfig, shape: GPTConfig) -> str:
    p, room, tokens = (2 if cfg.dtype == "bfloat16" else 4), GPUS[cfg.gpu][0], cfg.rows * cfg.seq_len
    _, unit, _, kept, less = (p * x / 1e9 * y for x, y in zip(sizes_of(shape), (1, 1, 1, tokens, tokens)))
    logits = tokens * cfg.vocab_size * (p + 8) / 1e9  # with their float32 copy and its gradient
    tiled, full = min(logits, LOGITS_AT_ONCE * 8 / 1e9), 4 * cfg.params / 1e9
    text = "GB of a GPU      weights gradients  masters  moments |    host     sent |  all kept  recomputed\n"
    for name, (stage, offload) in STAGES.items():
        ours = per_rank(stage, cfg.n, cfg.params / 1e9, cfg.params / 1e9, p, 4, cfg.micro_batches, offload)
        states = sum(ours[:4]) + (4 if stage == 3 else 3) * unit * (cfg.n > 1) + tiled  # 3: to reduce
        fits = (f"{states + x:8.4g} {'yes' if states + x < 0.95 * room else 'no':3}" for x in (kept, less))
        text += "{:17}{:7.4g}{:10.4g}{:9.4g}{:9.4g} |{:8.4g}{:9.4g} |{}{}\n".format(name, *ours, *fits)
    return (f"{text}\nactivations of {cfg.rows} x {cfg.seq_len} tokens, GB: all kept {kept:.3g}, recomputed "
            f"{less:.3g}; logits {logits:.3g}, with the tiled loss {tiled:.3g}\n"
            f"A common estimate, float32: {full:.4g} weights + {full:.4g} gradients + {2 * full:.4g} moments "
            f"= {4 * full:.4g} GB,\nand half as much for activations: {6 * full:.4g} GB\n")


def plan(cfg: PlanConfig) -> None:
    require_positive(cfg, "params", "vocab_size", "seq_len", "rows", "micro_batches", "n", "mfu")
    expect(cfg.mfu <= 1, f"--mfu {cfg.mfu}: expected a share, at most 1")
    law = Law(1.8172, 482.01, 0.3478, 2085.43, 0.3658)  # Chinchilla's points, fitted anew (arXiv 2404.10102)
    if cfg.law:
        with reading(f"--law {cfg.law}"):
            law = Law(**json.loads(Path(cfg.law).read_text())["law"])
    N, V, tokens = cfg.params, cfg.vocab_size, cfg.tokens or law.best_tokens(cfg.params)
    widths = *range(8, 256, 8), *range(256, 2**16, 128)  # N is 12 L C^2 + 2 V C, and L about C / 128
    C = min(widths, key=lambda C: abs(12 * C**2 * max(1, round(C / 128)) + 2 * V * C - N))
    L = max(1, min(C // 64, round((N - 2 * V * C) / 12 / C**2)))
    shape = GPTConfig(V, n_layer=L, n_embd=C, n_head=max(1, C // 128), max_seq_len=cfg.seq_len)
    params, _, flops, *_ = sizes_of(shape)
    days = flops * tokens / (cfg.n * GPUS[cfg.gpu][1] * 1e12 * cfg.mfu) / 86400
    print(f"{L} blocks, {C} wide, {shape.n_head} heads, MLP {shape.mlp_hidden}: {params:.4g} parameters, "
          f"{flops:.3g} FLOPs a token\n{tokens:.3g} tokens: {flops * tokens:.3g} FLOPs, {days:.3g} days on "
          f"{cfg.n} {cfg.gpu} at an MFU of {cfg.mfu:g}\n\n{plan_memory(cfg, shape)}\nL = {law.E:.4g} + "
          f"{law.A:.4g} / N^{law.alpha:.4g} + {law.B:.4g} / D^{law.beta:.4g}\n"
          f"{'':24}{'N':>10}{'D':>10}{'D / N':>10}{'6 N D':>10}{'+ 2 N served':>14}{'loss':>10}")
    best, loss = law.best_size(6 * N * tokens), law.loss(N, tokens)
    same = (law.A / (loss - law.E) * (1 + law.alpha / law.beta)) ** (1 / law.alpha)  # the best for this loss
    smaller = [(f"its loss, {k:g} best N", k * same, law.tokens_for(k * same, loss))
               for k in (1, 0.7, 0.5, 0.35, 0.25, 0.125)]  # inf: no number of tokens suffices
    for name, n, D in [("this run", N, tokens), ("best for its FLOPs", best, N * tokens / best),
                       ("best for its size", N, law.best_tokens(N)), *smaller]:
        print(f"{name:24}{n:10.3g}{D:10.3g}{D / n:10.3g}{6 * n * D:10.3g}{n * (6 * D + 2 * cfg.served):14.3g}"
              f"{law.loss(n, D):10.4f}")


# ---- measure ---------------------------------------------------------------------------------------------
ROOT, T, ROWS, RATE = Path(__file__).resolve().parent.parent, 128, 4, 0.4  # tokens in a row, rows in a batch
WIDTHS = 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 224, 272  # N from 6 k to 1.9 M
BUDGETS, CENTRE, WITHIN = (1e12, 2e12, 4e12), 1e5, 4  # FLOPs; sizes around this N at 1e12


@dataclass
class MeasureConfig:
    data: str = ""  # as in train_pretrain.py; empty: PyTorch's own code, 46 MB
    out: str = "out/scaling"  # folder, with one for each text; what is done there is not done again
    only: Literal["all", "law", "rate", "epochs", "batch"] = "all"  # what to measure beside the law
    quick: bool = False  # a 48th of the FLOPs, and the law alone
    jobs: int = 0  # runs at a time, each on one core; 0: one for each core


def family(width: int) -> tuple[dict, float]:
    """(flags of a model, its N). N is a token's FLOPs / 6: attention counts as if it had weights. So 6 N D is
    what is computed (DeepSeek 2024, arXiv 2401.02954, section 3.2)."""
    shape = {"n_embd": width, "n_layer": 2, "n_head": 2, "mlp_hidden": 8 * round(width / 3), "max_seq_len": T}
    return shape, sizes_of(GPTConfig(262, **shape))[2] / 6


def write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def train(cfg, width: int, tokens: float, rows: int = ROWS, factor: float = 1.0, text: str = "text") -> float:
    """The loss on val.txt, nats a byte. A run that was stopped goes on; one that is done is read. The rate is
    as 1 / width (Yang et al. 2022, arXiv 2203.03466) and as the root of the rows; it ends at 0."""
    steps, lr = max(20, round(tokens / rows / T)), f"{factor * RATE / width * (rows / ROWS) ** 0.5:.3g}"
    folder = cfg.out / f"{text}-{width}-wide-{steps}-x-{rows}-{lr}"
    if not (final := folder / "final").exists():
        flags = family(width)[0] | {
            "data": cfg.out / f"{text}.txt", "val_data": cfg.out / "val.txt", "out": folder, "seq_len": T,
            "tokenizer": "byte", "batch_size": rows, "steps": steps, "warmup_steps": steps // 20, "lr": lr,
            "eval_every": 0, "sample_tokens": 0}
        command = [sys.executable, "train_pretrain.py", "--resume", *(f"--{x}={flags[x]}" for x in flags)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        expect(final.exists(), f"{folder}: {(done.stderr.strip() or 'stopped').splitlines()[-1]}")
    return [row["eval_loss"] for row in read_records(folder / "metrics.jsonl") if "eval_loss" in row][-1]


def train_all(cfg, what: str, runs: list[tuple]) -> np.ndarray:
    """The losses of runs, each what train() takes. A token takes time for N, and for what does not grow."""
    work = np.cumsum([(1e5 + family(x)[1]) * D for x, D, *_ in runs])
    clock, losses, read = time.monotonic(), [], 0
    os.environ["OMP_NUM_THREADS"] = str(max(1, cfg.jobs // len(runs)))
    with ThreadPoolExecutor(cfg.jobs) as pool:
        for done, loss in zip(work, pool.map(lambda run: train(cfg, *run), runs)):
            minutes, losses = (time.monotonic() - clock) / 60, [*losses, loss]
            read = done if minutes < 1 / 60 else read  # what an earlier command has trained
            left = f", {minutes * (work[-1] - done) / (done - read):.1f} minutes left" if done > read else ""
            print(f"{what}: {len(losses)} of {len(runs)} runs{left}", flush=True)
    return np.array(losses)


def measure_law(cfg: MeasureConfig, U: int) -> tuple[Law, list[str]]:
    """Curves of equal FLOPs, the law, and a prediction that is on the disk before its run begins."""
    budgets, sizes = [C / 48**cfg.quick for C in BUDGETS], {x: family(x)[1] for x in WIDTHS}
    grid = [(width, C / 6 / N) for C in budgets for width, N in sizes.items()
            if 1 / WITHIN < N / CENTRE / (C / 1e12) ** 0.5 < WITHIN]
    N, D = np.array([(sizes[width], D) for width, D in grid]).T
    expect(D.max() <= 4 * U, f"--data {cfg.data}: found {U} bytes, expected {D.max() / 4:.0f} or more")
    L = train_all(cfg, "law", grid)
    law, *more = fit_law(N, D, L, bootstrap=200)
    expect(all(0.01 < x < 10 for x in law[2::2]), f"--data {cfg.data}: its losses follow no law, found {law}")
    lines = ["width         N         D   D / N    FLOPs  read    loss     law", *(
        f"{x:5}{n:10.0f}{d:10.0f}{d / n:8.0f}{6 * n * d:9.2g}{d / U:6.2f}{loss:8.4f}{law.loss(n, d):8.4f}"
        for (x, _), n, d, loss in zip(grid, N, D, L))]
    lowest = {C: minimum(N[mine], L[mine]) for C in budgets for mine in [np.isclose(6 * N * D, C)]}
    lines += [f"{C:.3g} FLOPs: best N {at[0]:.0f}, D / N {C / 6 / at[0]**2:.0f}, loss {at[1]:.4f}" if at else
              f"{C:.3g} FLOPs: no minimum among five sizes or more" for C, at in lowest.items()]
    found = np.array([(C, at[0]) for C, at in lowest.items() if at])
    a = np.polyfit(*np.log(found.T), 1)[0] if len(found) > 2 else math.nan
    lines.append(f"so the best N grows like C^{a:.3f}. The law, its a, its guess for the largest run:")
    C = 4 * max(budgets)
    _, n, width = min((abs(math.log(N / law.best_size(C))), N, x) for x, N in sizes.items())
    values = np.array([(*x, x.beta / (x.alpha + x.beta), x.loss(n, C / 6 / n)) for x in (law, *more)])
    low, high = np.percentile(values[1:], (2.5, 97.5), axis=0)
    spans = dict(zip((*law._fields, "a", "guess"), zip(values[0], low, high)))
    lines += ["{:6}{:10.4g} ({:.4g}..{:.4g})".format(name, *x) for name, x in spans.items()]
    known = {"law": law._asdict(), "found": spans, "points": [*zip(N, D, L)], "largest": (n, C / 6 / n)}
    write(cfg.out / "prediction.json", json.dumps(known))
    loss, = train_all(cfg, "the largest", [(width, C / 6 / n)])
    write(cfg.out / "law.json", json.dumps(known | {"loss": loss}))
    return law, [*lines, f"N {n:.0f}, {C:.2g} FLOPs: {loss:.4f}, off by {values[0, -1] / loss - 1:+.2%}"]


def compare(cfg: MeasureConfig, law: Law, what: str) -> list[str]:
    """Runs of one D. worth: the share of D that the law wants for this loss, if the first run's is right."""
    D, lines, texts = 6e5, [], {f"text-{E}": E for E in (1, 2, 4, 16)}  # name: how often it is read
    runs = {"rate": [(width, D, ROWS, factor) for width in (32, 128) for factor in (1, 0.5, 2)],
            "batch": [(48, D, rows) for rows in (1, 2, 4, 8, 16, 32, 64)],
            "epochs": [(48, D, ROWS, 1, name) for name in ("text", *texts)]}[what]
    for name, E in texts.items():
        write(cfg.out / f"{name}.txt", (cfg.out / "text.txt").read_text("utf-8")[:int(D / E)])
    for run, loss in zip(runs, losses := train_all(cfg, what, runs)):
        N, first = family(run[0])[1], losses[[width for width, *_ in runs].index(run[0])]
        here, D_law = law.tokens_for(N, law.loss(N, D) + loss - first), worth(D, D / texts.get(run[-1], 1))
        lines.append(f"{what} {run}: {loss:.4f}, worth {here / D:.0%}, by the law {D_law / D:.0%}")
    return lines


def measure(cfg: MeasureConfig) -> None:
    name = "-".join(re.findall(r"[\w.]+", cfg.data)) or "torch"  # the whole path: two texts are two folders
    cfg.jobs, cfg.out = cfg.jobs or os.cpu_count(), Path(cfg.out, name + "-quick" * cfg.quick).absolute()
    if not (cfg.out / "val.txt").exists():  # one document each: attention that ends at documents is slower
        documents = read_corpus(cfg.data or f"{Path(torch.__file__).parent}/**/*.py")
        np.random.default_rng(0).shuffle(documents)
        parts = split_documents(documents, min(0.1, 2e5 / sum(map(len, documents))))
        for name, part in zip(("text.txt", "val.txt"), parts):
            write(cfg.out / name, "\n".join(part))
    law, lines = measure_law(cfg, (cfg.out / "text.txt").stat().st_size)
    for what in ("rate", "epochs", "batch"):
        lines += compare(cfg, law, what) if cfg.only in ("all", what) and not cfg.quick else []
    print("\n".join(lines))
    write(cfg.out / "report.txt", "\n".join(lines) + "\n")


def main(argv=None) -> None:
    word, *rest = (sys.argv[1:] if argv is None else argv) or ["nothing"]
    expect(word in ("plan", "measure"), f"found {word}, expected plan or measure: tools.scaling plan --help")
    does, config = (plan, PlanConfig) if word == "plan" else (measure, MeasureConfig)
    does(parse(config, rest, __doc__))


if __name__ == "__main__":
    start(main)
