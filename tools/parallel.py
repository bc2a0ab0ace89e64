"""A grid of processes on paper: which rank holds what, what it keeps and sends, when it waits.

    python -m tools.parallel --data_parallel 2 --tensor 2 --pipeline 2 --batch_size 16 --micro_batch_size 2

takes the flags of train_parallel.py, and needs one process. Bytes sent are exact, those kept within 5 % for
the default shape in float32: tests count them. In 16 bits norms keep more on a CPU; GPT-2's parts keep less.
"""
import torch

from lib.collectives import aligned, group_parameters, take_out
from lib.grid import Axis, Grid
from lib.program import parse, start
from model import GPTConfig
from train_parallel import SPLIT, Config, blocks_of, make_part, schedule
from zero import per_rank


def on_paper(cfg: Config, stage: int, r: int) -> Grid:
    """The grid as tensor rank r of a stage sees it; nobody else is there."""
    axes = (Axis([*range(n)], i, None) for n, i in (
        (cfg.data_parallel, 0), (cfg.tensor, r), (cfg.pipeline, stage), (cfg.pipeline, stage)))
    return Grid(*axes, cfg.sequence_parallel)


def numbers(cfg: Config, c: GPTConfig, stage: int, r: int) -> tuple[int, int, int, int]:
    """(parameters of a rank; with the padding of ZeRO; those whose gradients tensor ranks sum; of a tied
    matrix that two stages have)."""
    N, M, P, grid = cfg.data_parallel, cfg.tensor, cfg.pipeline, on_paper(cfg, stage, r)
    part, psi, padded, summed, tied = make_part(c, grid), 0, 0, 0, 0
    for *_, places in group_parameters(part, part.units(), False):
        slots = take_out(places)[0]
        padded += N * aligned(-(-aligned(slots[-1].start + slots[-1].shape.numel()) // N))
        for _, shape, ((name, *_), *_) in slots:
            kind, n = name.split(".")[-2], shape.numel()
            psi += n
            summed += n * (M > 1 and (kind in ("q_norm", "k_norm") or grid.sequence and kind not in SPLIT))
            tied += n * (P > 1 and c.tie_embeddings and kind in ("embed", "head"))
    return psi, padded, summed, tied


def kept(cfg: Config, c: GPTConfig, stage: int, m: int, tokens: int) -> int:
    """Numbers that a stage keeps for backward at most. Of a token a block keeps 6 C + 2 around its norms, and
    what heads and columns make: only that is cut by M, or all but 2 C if places are shared out, too."""
    M, C, D, H, G = cfg.tensor, c.n_embd, c.head_width, c.n_head, c.n_kv_head
    S = M if cfg.sequence_parallel else 1
    norms = (4 * C + 2) // S + 2 * C
    inside = (5 * H * D + 5 * G * D + 4 * c.mlp_hidden + 2 * H + G) // M
    blocks, waiting = len(blocks_of(stage, cfg.pipeline, c)), schedule(cfg.schedule, stage, cfg.pipeline, m)
    most = max(waiting[:i].count("F") - waiting[:i].count("B") for i in range(len(waiting) + 1))
    wide = max(1, 4 / getattr(torch, cfg.dtype).itemsize)  # logits are float32
    head = wide * c.vocab_size // M * tokens if M > 1 else C * (tokens + c.vocab_size)
    rest = 2 * D * tokens + (stage == cfg.pipeline - 1) * ((2 * C // S + C) * tokens + head)  # 2 D: rotations
    if cfg.activation_checkpointing:  # the input of each block, and one block anew
        return most * (blocks * C // S * tokens + rest) + tokens * (norms + inside)
    return most * (blocks * (norms + inside) * tokens + rest)


def sent(cfg: Config, c: GPTConfig, stage: int, r: int, tokens: int) -> tuple[float, float, float]:
    """Bytes that a rank sends in a step over the axes data, tensor, pipeline. tokens: a replica's."""
    N, M, P, C = cfg.data_parallel, cfg.tensor, cfg.pipeline, c.n_embd
    _, padded, summed, tied = numbers(cfg, c, stage, r)
    p, wide = getattr(torch, cfg.dtype).itemsize, 8 if cfg.dtype == "float64" else 4
    *_, data = per_rank(cfg.zero, N, padded, padded, p, wide)
    first, last, ring = stage == 0, stage == P - 1, 2 * (M - 1) / M
    again = cfg.activation_checkpointing * (1.5 if cfg.sequence_parallel else 1)  # up to the input of `down`
    sums = (4 + again) * len(blocks_of(stage, P, c)) + first + last  # of (B, T, C)
    loss = last * tokens * (M - 1 + 2 * ring)  # the largest logits are gathered, and two numbers summed
    tensor = ring * (sums * tokens * C * p + summed * wide) + loss * wide
    places = tokens // (M if cfg.sequence_parallel else 1)
    return data, tensor, (2 - first - last) * places * C * p + tied * wide


def timeline(name: str, P: int, m: int) -> list[str]:
    """A line for each stage: digits are forwards, letters backwards, which take twice as long; . waits."""
    orders, lines, done = [schedule(name, stage, P, m) for stage in range(P)], [""] * P, {}
    begun = [{"F": 0, "B": 0} for _ in range(P)]
    while any(orders):
        for stage, order in enumerate(orders):
            if not order:
                continue
            what, i = order[0], begun[stage][order[0]]
            needs = (what, stage + (-1 if what == "F" else 1), i)
            if what == "B" and stage == P - 1 or what == "F" and stage == 0 or needs in done:
                lines[stage] = lines[stage].ljust(done.get(needs, 0), ".")
                lines[stage] += "0123456789"[i % 10] if what == "F" else 2 * "abcdefghij"[i % 10]
                done[what, stage, i] = len(lines[stage])
                begun[stage][what], orders[stage] = i + 1, order[1:]
    return [line.ljust(max(map(len, lines)), ".") for line in lines]


def span(n: int, parts: int, r: int) -> str:
    return f"{r * n // parts}-{(r + 1) * n // parts - 1}"


def drawing(cfg: Config, c: GPTConfig) -> str:
    """Who holds what."""
    N, M, P = cfg.data_parallel, cfg.tensor, cfg.pipeline
    names = [f"{'embed, ' * (s == 0)}blocks {b[0]}-{b[-1]}{', norm, head' * (s == P - 1)}"
             for s, b in enumerate(blocks_of(s, P, c) for s in range(P))]
    width = max(map(len, names), default=0) + 3
    lines = [" " * 34 + "".join(name.ljust(width) for name in names)]
    for n, r in ((n, r) for n in range(min(N, 4)) for r in range(M)):
        ranks = "".join(f"rank {(n * P + s) * M + r}".ljust(width) for s in range(P))
        lines.append(f"replica {n}, tensor rank {r}".ljust(34) + ranks)
    lines += [f"and {N - 4} more replicas"] * (N > 4)
    for r in range(M):
        lines.append(f"tensor rank {r}: heads {span(c.n_head, M, r)}, of keys {span(c.n_kv_head, M, r)}; MLP "
                     f"{span(c.mlp_hidden, M, r)}; tokens {span(c.vocab_size, M, r)}")
    return "\n".join(lines)


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    c = GPTConfig(**{name: getattr(cfg, name) for name in GPTConfig.__dataclass_fields__})
    cfg.fit_grid(c, cfg.data_parallel * cfg.tensor * cfg.pipeline)
    share = -(-cfg.batch_size // cfg.data_parallel)
    micro = min(cfg.micro_batch_size or share, share)
    m, P, p = -(-share // micro), cfg.pipeline, getattr(torch, cfg.dtype).itemsize
    print(drawing(cfg, c))
    print(f"\n{cfg.schedule}, {m} micro-batches: {(P - 1) / (m + P - 1):.0%} idle")
    for s, line in enumerate(timeline(cfg.schedule, P, m)):
        print(f"stage {s}  {line if len(line) < 100 else line[:90] + ' and so on'}")
    print("\na rank's  parameters   MB: states        kept     sent: data  tensor    pipeline")
    for s in range(P):
        psi, padded, *_ = numbers(cfg, c, s, 0)
        states = sum(per_rank(cfg.zero, cfg.data_parallel, padded, padded, p)[:4])
        most, send = p * kept(cfg, c, s, m, micro * cfg.seq_len), sent(cfg, c, s, 0, share * cfg.seq_len)
        print(f"stage {s}" + "".join(f"{x / 1e6:12.3f}" for x in (psi, states, most, *send)))


if __name__ == "__main__":
    start(main)
