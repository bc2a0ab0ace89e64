"""Pretraining on a grid of processes: data, tensor and pipeline parallelism by hand, and all three together.

    torchrun --nproc_per_node 8 train_parallel.py --data_parallel 2 --tensor 2 --pipeline 2 --out out/grid
    python -m tools.parallel --data_parallel 2 --tensor 2 --pipeline 2       draws which rank holds what

Three ways to cut a step of B rows, T tokens, width C: rank = (replica * P + stage) * M + tensor rank.

    --data_parallel N  the rows     a replica reads B / N of them    sums gradients, once a step
    --tensor M         the matrices a rank has H / M heads           sums (B, T, C) four times a block
    --pipeline P       the blocks   a stage has L / P of them        sends (B, T, C) on, a gradient back

A block on a tensor rank (Shoeybi et al. 2019, arXiv 1909.08053, section 3): qkv and up are split by outputs
(column-parallel), proj and down by inputs (row-parallel). Forward, g sums what the ranks have of an output;
backward, f what they have of a gradient. Between g and f all ranks hold the same x, or with
--sequence_parallel (Korthikanti et al. 2022, arXiv 2205.05198) T / M places of it each.

    x -- norm -- f -- qkv - heads - proj -- g -- + x -- norm -- f -- up - silu - down -- g -- + x

                           f: forward   backward            g: forward       backward
                           copy         all-reduce          all-reduce       copy
    --sequence_parallel    all-gather   reduce-scatter      reduce-scatter   all-gather

ZeRO-1 (zero.py) shards the optimizer over replicas. Checkpoints are those of train_pretrain.py: any grid, or
one process, goes on from any. Read in this order: pieces, operators, make_part, schedule, train_step.
"""
import dataclasses
import json
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Windows, eval_windows
from lib.collectives import Comm, group_parameters, materialise
from lib.corpora import TokenFile, prepare
from lib.grid import Axis, Grid, Whole, make_grid
from lib.program import UserError, parse, require_positive, start
from lib.ranks import setup
from lib.run import Run, RunConfig, lr_at
from lib.tokenizer import Tokenizer
from model import GPT, Block, GPTConfig, LMHead, initialise, restarting_positions
from zero import SCALARS, VECTORS, Zero, sum_of_squares


@dataclass
class Config(RunConfig, GPTConfig):  # every field of the model's shape is a flag, too
    # grid
    data_parallel: int = 1  # N, replicas: each reads its share of the rows
    tensor: int = 1  # M, ranks that share each matrix
    pipeline: int = 1  # P, stages: each holds some of the blocks
    schedule: Literal["1f1b", "gpipe"] = "1f1b"  # the order of a stage's forwards and backwards
    sequence_parallel: bool = False  # between the matrices, a tensor rank holds T / M places of a row
    zero: Literal[0, 1] = 1  # the optimizer: whole in each replica, or sharded over them
    # data
    data: str = "stdlib"  # corpus: stdlib, shakespeare, or files: text or {"text"} records; or a folder
    tokenizer: str = ""  # byte, char, bpe, a tiktoken name, a tokenizer.json; empty: bpe
    vocab_size: int = 2048  # of a bpe learned here; the other tokenizers bring their own
    cache: str = "data"  # folder for token files, so that a second start reads no text
    windows: Literal["random", "sequential"] = "random"  # where the rows of a batch begin
    seq_len: int = 256
    max_seq_len: int = 0  # longest row that the model is made for; 0: seq_len
    # optimisation
    epochs: float = 40.0  # most readings of the text, if steps is 0; then 500 updates at most
    lr: float = 3e-3
    min_lr: float = 0.0  # what the learning rate falls to, one update after the last
    warmup_steps: int = 50
    weight_decay: float = 0.1  # AdamW's, on matrices and embeddings; 0: off
    # run
    out: str = "out/parallel"
    eval_every: int = 200
    eval_rows: int = 0  # rows of the validation text per evaluation; 0: the whole text

    may_change = RunConfig.may_change | {
        "cache", "tokenizer", "vocab_size", "eval_rows", "data_parallel", "tensor", "pipeline", "schedule",
        "sequence_parallel"}

    def __post_init__(self):
        RunConfig.__post_init__(self)
        GPTConfig.__post_init__(self)
        require_positive(self, "seq_len", "epochs", "data_parallel", "tensor", "pipeline")
        if self.init or self.compile:
            raise UserError(f"--{'init' if self.init else 'compile'}: not on a grid; use train_pretrain.py")

    def fit_grid(self, c: GPTConfig, world: int) -> None:
        """UserError if the grid does not fit the processes or the model."""
        N, M, P = self.data_parallel, self.tensor, self.pipeline
        parts = {"query heads": c.n_head, "key/value heads": c.n_kv_head, "columns in the MLP": c.mlp_hidden,
                 "tokens in the vocabulary": c.vocab_size, "places in a row": self.seq_len}
        for what, n in parts.items():
            if n % M and (what != "places in a row" or self.sequence_parallel):
                raise UserError(f"--tensor {M}: found {n} {what}, expected a multiple of {M}")
        if P > c.n_layer:
            raise UserError(f"--pipeline {P}: found {c.n_layer} blocks, expected at least {P}")
        if N * M * P != world:
            raise UserError(f"--data_parallel {N} --tensor {M} --pipeline {P}: found {world} processes, "
                            f"expected {N * M * P}; start it with torchrun --nproc_per_node {N * M * P}")


# ---- one rank's part of the model ------------------------------------------------------------------------

SPLIT = {"qkv": 0, "up": 0, "embed": 0, "head": 0, "proj": 1, "down": 1}  # along which dimension; else copied


def pieces(name: str, x, c: GPTConfig, M: int, r: int) -> list:
    """Views of a full parameter x, which tensor rank r of M holds, joined. The rows of qkv are queries, keys,
    values, those of up gates and values: each kind is cut alone, and queries stay with their keys and values.
    The bias of a sum is rank 0's, because g would add it M times."""
    kind = name.split(".")[-2]
    if kind not in SPLIT or M == 1:
        return [x]
    if SPLIT[kind] == 1 and x.dim() == 1:
        return [x] if r == 0 else []
    rows = {"qkv": [n * c.head_width for n in (c.n_head, c.n_kv_head, c.n_kv_head)],
            "up": [c.mlp_hidden] * (1 + (c.mlp == "swiglu"))}.get(kind, len(x))
    return [part.chunk(M, SPLIT[kind])[r] for part in x.split(rows)]


class Move(torch.autograd.Function):
    """y = there(x), dx = back(dy)."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, dy):
        return ctx.back(dy), None, None


def operators(tensor: Axis, sequence: bool) -> tuple:
    """(f, g). Without f, or with the two swapped, the loss is right and gradients are wrong."""
    def copy(x):
        return x.view_as(x)

    def total(x):
        x = x.clone(memory_format=torch.contiguous_format)  # others may read x
        tensor.all_reduce(x)
        return x

    def gather(x):  # (B, T/M, C) -> (B, T, C)
        return tensor.all_gather(x.flatten()).view(-1, *x.shape).transpose(0, 1).flatten(1, 2)

    def scatter(x):  # (B, T, C) -> (B, T/M, C)
        x = x.unflatten(1, (tensor.world, -1)).transpose(0, 1)  # (M, B, T/M, C)
        wide = torch.promote_types(x.dtype, torch.float32)
        return tensor.reduce_scatter(x.flatten(), wide).view(x.shape[1:]).to(x.dtype)

    f, g = ((gather, scatter), (scatter, gather)) if sequence else ((copy, total), (total, copy))
    return lambda x: Move.apply(x, *f), lambda x: Move.apply(x, *g)


def split_embedding(ids, weight, tensor: Axis, g):
    """Vocabulary-parallel embedding: ids (B, T), weight (V/M, C) -> (B, T, C).
    A rank that does not have a token's row adds 0."""
    ids = ids - tensor.rank * len(weight)
    here = (ids >= 0) & (ids < len(weight))
    return g(F.embedding(ids * here, weight) * here[..., None])


def split_logp(x, weight, targets, tensor: Axis, total):
    """Vocabulary-parallel cross-entropy:
    x (B, T, C), weight (V/M, C), targets (B, T) -> log-probabilities (B, T), 0 where a target is -100.
    log p(t) = z_t - m - log sum_v e^(z_v - m). Three numbers a token travel, and no rank has all V logits."""
    z = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))  # (B, T, V/M)
    m = tensor.all_gather(z.detach().amax(-1).flatten()).view(-1, *targets.shape).amax(0)  # (B, T)
    z, ids = z - m[..., None], targets - tensor.rank * len(weight)
    here = (ids >= 0) & (ids < len(weight))  # -100 is nowhere
    rows = torch.arange(ids.numel(), device=ids.device)
    chosen = z.flatten(0, 1)[rows, (ids * here).flatten()].view_as(ids) * here  # (B, T); gather would keep z
    chosen, l = total(torch.stack((chosen, z.exp().sum(-1))))
    return (chosen - l.log()).masked_fill(targets == -100, 0.0)


class Elsewhere(LMHead):
    """Stands where another stage has a module: passes on what it gets, or gives `instead`."""

    def __init__(self, instead=None):
        nn.Module.__init__(self)
        self.instead = instead

    def forward(self, x, *_, **__):
        return x if self.instead is None else self.instead


def blocks_of(stage: int, P: int, c: GPTConfig) -> range:
    """As even as can be, if the head costs as much as V / (12 C) blocks; at least one."""
    share = (c.n_layer + c.vocab_size / (12 * c.n_embd)) / P
    first = [max(i, min(round(i * share), c.n_layer - P + i)) for i in range(P)] + [c.n_layer]
    return range(first[stage], first[stage + 1])


def make_part(c: GPTConfig, grid: Grid) -> GPT:
    """model.py's GPT, on the meta device, with this rank's heads, columns and tokens; f and g around the two
    halves of a block; Elsewhere where another stage has a module. Names are those of the whole model."""
    tensor, M, stage = grid.tensor, grid.tensor.world, grid.down.rank
    with torch.device("meta"):
        part = GPT(dataclasses.replace(c, n_head=c.n_head // M, n_kv_head=c.n_kv_head // M,
                                       mlp_hidden=c.mlp_hidden // M, vocab_size=c.vocab_size // M))
    if M > 1:
        (f, g), (_, total) = operators(tensor, grid.sequence), operators(tensor, sequence=False)
        embed, head = part.embed, part.head
        embed.forward = lambda ids: split_embedding(ids, embed.weight, tensor, g)
        head.forward = lambda x, targets, **_: split_logp(f(x), head.weight, targets, tensor, total)
        for block in part.blocks:
            for half, last in (block.attn, block.attn.proj), (block.mlp, block.mlp.down):
                half.register_forward_pre_hook(lambda _, args: (f(args[0]), *args[1:]))
                half.register_forward_hook(lambda _, args, y: g(y))
                last.bias = last.bias if tensor.rank == 0 else None
        if part.position is not None and grid.sequence:
            part.position.register_forward_hook(lambda _, args, y: y.chunk(M, 1)[tensor.rank])
    for i in {*range(c.n_layer)} - {*blocks_of(stage, grid.down.world, c)}:
        part.blocks[i] = Elsewhere()
    if stage > 0:
        part.embed, part.position = Elsewhere(), part.position and Elsewhere(instead=0.0)
    if stage < grid.down.world - 1:
        part.norm = part.head = Elsewhere()
    return part


class Part(Zero):
    """One rank's part of a new model, and ZeRO-1 of it over the replicas."""

    def __init__(self, c: GPTConfig, grid: Grid, seed: int, **options):
        self.c, self.grid, self.everyone, part = c, grid, Comm(), make_part(c, grid)
        with torch.device("meta"):
            whole = GPT(c)
        for i, block in enumerate(part.blocks):
            whole.blocks[i] = whole.blocks[i] if isinstance(block, Block) else block

        def fill(module, prefix):
            """Each parameter is made in full, as `seed` and its name say, cut and forgotten: from a seed and
            a width of their own, ranks would begin as copies of each other, and too large."""
            full = whole.get_submodule(prefix)
            materialise(group_parameters(full, [], False)[0][-1], torch.device("cpu"))
            initialise(full, seed, prefix)
            for name, p in module.named_parameters(prefix):
                p.data.copy_(torch.cat(self.pieces(name, whole.get_parameter(name))))
            for inner in full.modules():
                inner._parameters.clear()

        super().__init__(part, units=part.units(), comm=grid.data, init=fill, **options)

    def pieces(self, name: str, x) -> list:
        return pieces(name, x, self.c, self.grid.tensor.world, self.grid.tensor.rank)

    def counts(self, name: str) -> bool:
        """Whether this rank's is the one to count, of copies and of a matrix that is tied over stages."""
        copied = name.split(".")[-2] not in SPLIT and self.grid.tensor.rank > 0
        return not copied and not (self.c.tie_embeddings and name == "head.weight")

    @torch.no_grad()
    def add_up(self) -> None:
        """After the last micro-batch, sum gradients of which ranks have parts. q_norm and k_norm have seen a
        rank's own heads; all copies its own places, if places are shared out; a matrix that is tied over
        stages has two. No loss shows what is missing here, and the norm hardly does."""
        _, tensor, down, up, sequence = self.grid
        pairs = [pair for unit in self.trained for pair in zip(unit.slots, unit.views(unit.grad))]
        for slot, grad in pairs:
            kind = slot.places[0][0].split(".")[-2]
            if tensor.world > 1 and (kind in ("q_norm", "k_norm") or sequence and kind not in SPLIT):
                tensor.all_reduce(grad)
            if self.c.tie_embeddings and down.world > 1 and kind in ("embed", "head"):
                there, back, other = (up, down, 0) if down.rank else (down, up, down.world - 1)
                there.send(grad, other)
                more = back.receive(torch.empty_like(grad), other)
                there.finish()
                grad += more

    def squares(self):
        """Of the gradients of the whole model, each parameter once, summed over all ranks: (1,) float64."""
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        for unit in self.trained if self.stage > 0 or self.comm.rank == 0 else ():
            for low, shape, places in unit.slots:
                first, last = (max(i - unit.low, 0) for i in (low, low + shape.numel()))
                if self.counts(places[0][0]):
                    total += sum_of_squares(unit.shard_grad[first:last])
        self.everyone.all_reduce(total)
        return total


# ---- one step --------------------------------------------------------------------------------------------

def schedule(name: str, stage: int, P: int, m: int) -> str:
    """What a stage does with m micro-batches: F a forward, B the backward of the oldest that waits. Of 1F1B
    (Narayanan et al. 2019) P - stage of them wait at most, of GPipe (Huang et al. 2019) all m. Both leave
    a stage idle for (P - 1) / (m + P - 1) of the time, the bubble."""
    ahead = m if name == "gpipe" else min(P - stage - 1, m)
    return "F" * ahead + "FB" * (m - ahead) + "B" * ahead


def forward(part: Part, batch) -> tuple:
    """One micro-batch, (ids, targets, segment_ids), each (b, T): (what comes in, what goes out), which is ids
    or hidden states (b, T, C), and hidden states or log-probabilities (b, T)."""
    (x, targets, segment_ids), (_, tensor, down, _, sequence) = batch, part.grid
    if down.rank > 0:
        T = x.shape[1] // (tensor.world if sequence else 1)
        x = torch.empty(len(x), T, part.c.n_embd, dtype=part.dtype, device=part.device)
        x = down.receive(x, down.rank - 1).requires_grad_(torch.is_grad_enabled())
    y = part.model(x, targets, segment_ids=segment_ids, positions=restarting_positions(segment_ids),
                   equal_weights=True)
    if down.rank < down.world - 1:
        down.send(y, down.rank + 1)
    return x, y


def train_step(part: Part, batch, micro: int, n_tokens: float, order: str):
    """Gradients of one batch, `micro` rows at a time. Returns its loss, on the last stage, else 0. Each part
    is divided by the ONE number of tokens before its backward, so parts need not be equal."""
    todo, waiting, loss, (*_, down, up, _) = zip(*(x.split(micro) for x in batch)), deque(), 0.0, part.grid
    for what in order:
        if what == "F":
            x, y = forward(part, next(todo))
            if down.rank == down.world - 1:
                y = -y.sum() / n_tokens
                loss += y.detach()
            waiting.append((x, y))
            continue
        x, y = waiting.popleft()
        if down.rank == down.world - 1:
            part.backward(y)
        else:
            torch.autograd.backward(y, up.receive(torch.empty_like(y), down.rank + 1))
        if down.rank > 0:
            up.send(x.grad, down.rank - 1)
        x = y = None  # the next forward needs their room
    down.finish()
    up.finish()
    part.add_up()
    return loss


@torch.no_grad()
def evaluate(part: Part, tokens: TokenFile, rows: int, cfg: Config, ranks) -> dict:
    """Mean loss per token of the validation text; rows: of a micro-batch."""
    loss, count, (data, tensor, down, *_) = 0.0, 0, part.grid
    if len(tokens) < 2:
        return {}
    for batch in eval_windows(tokens, cfg.seq_len, rows, data.rank, data.world, cfg.eval_rows):
        _, logp = forward(part, [x.to(part.device) for x in batch])
        if down.rank == down.world - 1 and tensor.rank == 0:
            loss, count = loss - logp.double().sum(), count + (batch[1] >= 0).sum()
    down.finish()
    loss, count = ranks.sum(loss, count)
    return {"eval_loss": loss / count, "eval_perplexity": math.exp(min(loss / count, 700.0)),
            "eval_bits_per_byte": loss / count / math.log(2) * tokens.n_targets / tokens.n_bytes}


def main(argv=None) -> int:
    cfg = parse(Config, argv, __doc__)
    ranks = setup(cfg.device)  # this process and its peers: rank, world, device, sum()

    # data: rank 0 makes the token files, then every rank finds them made
    train_path, val_path, tokenizer_path = ranks.main_first(lambda: prepare(
        cfg.data, tokenizer=cfg.tokenizer or "bpe", vocab_size=cfg.vocab_size, val_data=cfg.val_data,
        val_fraction=cfg.val_fraction, strict=cfg.strict, cache=cfg.cache))
    tokenizer = Tokenizer.load(tokenizer_path)
    train_tokens, val_tokens = TokenFile(train_path, tokenizer), TokenFile(val_path, tokenizer)
    cfg.fit_steps(len(train_tokens) / cfg.seq_len, most=500)
    train = Windows(train_tokens, cfg.seq_len, batch_size=cfg.batch_size, mode=cfg.windows, seed=cfg.seed)

    # model
    shape = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(GPTConfig)}
    shape |= {"vocab_size": tokenizer.vocab_size, "max_seq_len": cfg.max_seq_len or cfg.seq_len}
    cfg.fit_rows(shape["max_seq_len"])
    cfg.fit_grid(GPTConfig(**shape), ranks.world)
    grid = make_grid(cfg.data_parallel, cfg.tensor, cfg.pipeline, ranks.rank, cfg.sequence_parallel)
    part = Part(GPTConfig(**shape), grid, cfg.seed, **cfg.zero_options(ranks))

    share = -(-cfg.batch_size // grid.data.world)  # rows per replica and update
    micro = min(cfg.micro_batch_size or share, share)  # rows per forward
    m, P = -(-share // micro), cfg.pipeline
    order = schedule(cfg.schedule, grid.down.rank, P, m)
    with torch.device("meta"):
        whole = Whole(part, GPT(part.c), VECTORS, SCALARS)
    run = Run(cfg, ranks, {"model": whole}, tokenizer, inputs={"data": train_tokens.note},
              final={"head": "lm"}, read=json.loads(tokenizer_path.with_name("read.json").read_text()))
    run.say(f"{m} micro-batches x {micro} rows x {cfg.seq_len} in each replica: {P} stages idle for "
            f"(P - 1) / (m + P - 1) = {(P - 1) / (m + P - 1):.0%} of the time")
    if m < P:
        run.say(f"warning: {m} micro-batches keep at most {m} of {P} stages busy; lower --micro_batch_size")

    first = grid.down.rank == grid.tensor.rank == 0  # of the ranks of a replica
    for step in run.steps(lambda: evaluate(part, val_tokens, micro, cfg, ranks)):
        batch = [x.to(ranks.device) for x in train.batch(step - 1, grid.data.rank, grid.data.world)]  # (b, T)
        n_tokens, = ranks.sum((batch[1] >= 0).sum() * first)  # every rank of a replica has the same rows
        for axis in grid[:4]:
            axis.sent = axis.waited = 0.0
        begun = time.perf_counter()
        loss = train_step(part, batch, micro, n_tokens, order)
        seconds = time.perf_counter() - begun
        busy = seconds - grid.down.waited - grid.up.waited
        lr = lr_at(step, cfg)
        info = part.step(lr, cfg.clip)
        loss, busy, seconds = ranks.sum(  # the first stage ends last: a step takes as long as it does there
            loss * (grid.tensor.rank == 0), busy, seconds * (grid.down.rank == 0))
        also = {f"sent_{name}": axis.sent for name, axis in zip(grid._fields, grid[:4]) if axis.sent}
        if P > 1 and ranks.device.type == "cpu":  # on a GPU Python does not wait for what it receives
            also["bubble"] = 1 - busy / seconds / P
        run.log(step, tokens=n_tokens, skipped=info.skipped, loss=loss, grad_norm=info.norm, learning_rate=lr,
                **also)
    return run.finish()


if __name__ == "__main__":
    start(main)
