"""Three ways to pretrain the same blocks: predict what comes next, what is hidden, or what was taken out.

    clm      GPT   - sum_t log p(x_{t+1} | x_<=t)                    all tokens    Radford et al. 2018
    mlm      BERT  - sum_t log p(x_t | x, some of it hidden)         hidden ones   Devlin et al. 2019
    seq2seq  T5    - sum_t log p(y_{t+1} | y_<=t, x without y)       y: the gaps   Raffel et al. 2020

`--show` prints this: a token that is read, which tokens it sees (#), and what it is to predict.

    clm                  mlm                  seq2seq: source   seq2seq
    Edgar  #.... Stone   Edgar  #####         <0>    ####       <bos>  #### #.... <0>
    Stone  ##... likes   Stone  #####         likes  ####       <0>    #### ##... Edgar
    likes  ###.. fresh   likes  ##### likes   fresh  ####       Edgar  #### ###.. Stone
    fresh  ####. bread   <mask> ##### fresh   bread  ####       Stone  #### ####. <end>
    bread  #####         bread  #####                           <end>  #### #####
"""
import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from data import IGNORE, Windows, collate, eval_windows
from lib.corpora import TokenFile, prepare
from lib.program import UserError, parse, start
from lib.ranks import setup
from lib.run import Run, RunConfig, lr_at
from lib.tokenizer import Tokenizer
from model import GPT, Attention, Block, GPTConfig, initialise, norm, restarting_positions
from zero import Zero


@dataclass
class Shape(GPTConfig):
    objective: Literal["clm", "mlm", "seq2seq"] = "mlm"  # predict what comes next, is hidden, was taken out


@dataclass
class Config(RunConfig, Shape):
    # objective
    mask_rate: float = 0.15  # share of the tokens that mlm hides and seq2seq takes out
    span: float = 3.0  # seq2seq: tokens in a gap, on average
    show: bool = False  # print a drawing of what each objective sees and predicts, and train nothing
    # data
    data: str = "stdlib"  # corpus: stdlib, shakespeare, or files: text or {"text"} records; or a folder
    tokenizer: str = "bpe"  # byte, char, bpe, a tiktoken name, or a tokenizer.json
    vocab_size: int = 2048  # of a bpe learned here; the other tokenizers bring their own
    # optimisation
    steps: int = 500  # updates
    lr: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1  # AdamW's, on matrices and embeddings; 0: off

    def __post_init__(self):
        RunConfig.__post_init__(self)
        GPTConfig.__post_init__(self)
        self.fit_rows(self.max_seq_len)
        if self.init or not 0 < self.mask_rate < 1 <= self.span:
            raise UserError(f"--init {self.init!r} --mask_rate {self.mask_rate} --span {self.span}: expected "
                            "no --init, a share between 0 and 1, and a length of at least 1")


# ---- who sees whom ---------------------------------------------------------------------------------------

class Encoder(GPT):
    """A GPT without the causal mask: a token sees all of its document."""

    def __init__(self, config: Shape, seed: int = 0):
        super().__init__(config, seed=seed)
        for block in self.blocks:
            block.attn.attend = partial(block.attn.attend, causal=False)


class CrossAttention(Attention):
    """The decoder asks, the encoder answers (Vaswani et al. 2017, section 3.2.3); no positions, as in T5."""

    def __init__(self, config: Shape):
        super().__init__(config)
        self.attend = partial(self.attend, causal=False)

    def forward(self, x, segment_ids, memory, memory_ids):
        rows = slice(self.H * self.D, None)  # of the matrix: what makes keys and values
        kv = F.linear(memory, self.qkv.weight[rows], None if self.qkv.bias is None else self.qkv.bias[rows])
        k, v = kv.unflatten(-1, (-1, self.D)).transpose(1, 2).chunk(2, dim=1)  # (B, G, Tk, D) twice
        return super().forward(x, None, segment_ids, memory_ids, lambda *own: (self.k_norm(k), v))


class DecoderBlock(Block):
    def __init__(self, config: Shape):
        super().__init__(config)
        self.cross_norm, self.cross = norm(config.n_embd, config), CrossAttention(config)

    def forward(self, x, rope, segment_ids, memory, memory_ids):
        x = x + self.attn(self.attn_norm(x), rope, segment_ids, None, None)
        x = x + self.cross(self.cross_norm(x), segment_ids, memory, memory_ids)
        return x + self.mlp(self.mlp_norm(x))


class Seq2Seq(GPT):
    """The first half of the blocks reads a source, the second half writes. A document sees the part of the
    source that has its segment id. source, source_ids (B, Ts): ids and segment ids."""

    def __init__(self, config: Shape, seed: int = 0):
        super().__init__(config)
        self.half, self.source_norm = config.n_layer // 2, norm(config.n_embd, config)
        for i, block in enumerate(self.blocks):
            if i < self.half:
                block.attn.attend = partial(block.attn.attend, causal=False)
            else:
                self.blocks[i] = DecoderBlock(config)
        initialise(self, seed)

    def through(self, blocks, ids, segment_ids, *memory):
        """ids (B, T) -> hidden states behind some of the blocks, (B, T, C)."""
        x, rope, positions = self.embed(ids), None, restarting_positions(segment_ids)
        if self.position is not None:
            x = x + self.position(positions)
        else:
            rope = [turn[positions][:, :, None].to(x.dtype) for turn in (self.cos, self.sin)]  # (B, T, 1, D)
        for block in blocks:
            x = block(x, rope, segment_ids, *memory)
        return x

    def encode(self, source, source_ids):
        return self.source_norm(self.through(self.blocks[:self.half], source, source_ids))  # (B, Ts, C)

    def forward(self, ids, targets=None, *, segment_ids, source, source_ids, **options):
        memory = self.encode(source, source_ids)
        x = self.through(self.blocks[self.half:], ids, segment_ids, memory, source_ids)
        return self.head(self.norm(x), targets, **options)


# ---- what is read, and what is predicted -----------------------------------------------------------------

def hide(ids, tokenizer: Tokenizer, rate: float, rng) -> tuple:
    """ids (T,) -> (what the model reads, its targets), (T,) each (Devlin et al. 2019, section 3.1).
    Each ordinary token is chosen with probability `rate`. Of the chosen 80 % become the mask, 10 % a random
    token, and 10 % stay: a text in use has no masks, so the model shall think about every token."""
    special = [*tokenizer.specials_but_end, tokenizer.end_id]
    ordinary = np.delete(np.arange(tokenizer.vocab_size), special)  # no sorting: this is done for each row
    chosen, way, other = rng.random((3, len(ids)))
    chosen = (chosen < rate) & ~np.isin(ids, special)
    hidden = np.where(way < 0.9, ordinary[(other * len(ordinary)).astype(int)], ids)
    hidden[way < 0.8] = tokenizer.vocab_size
    return np.where(chosen, hidden, ids), np.where(chosen, ids, IGNORE)


def gaps(n: int, rate: float, span: float, rng) -> list[tuple[int, int]]:
    """(first, end) of the gaps in n tokens: n rate tokens on average, and in long texts n rate / span gaps.
    No two touch. All choices of as many tokens and gaps are equally likely."""
    def some(n: int, k: int):  # of 0 .. n-1, in order
        return np.sort(rng.random(n).argsort()[:k])

    taken = int(n * rate + rng.random())
    if not taken:
        return []
    count = min(max(1, int(taken / span + rng.random())), taken, n - taken + 1)
    ends = np.r_[some(taken - 1, count - 1) + 1, taken]  # of the gaps, counted in taken tokens
    kept = some(n - taken + 1, count)  # tokens that stay before each gap
    return list(zip((kept + np.r_[0, ends[:-1]]).tolist(), (kept + ends).tolist()))


def take_out(ids: list[int], tokenizer: Tokenizer, rate: float, span: float, rng) -> tuple[list, list]:
    """A document -> (source, target) (Raffel et al. 2020, section 3.1.4). In the source a sentinel, the id
    vocab_size + i, stands for gap i. The target has this id and what stood there, gap after gap."""
    begin, end = int(ids[0] == tokenizer.bos_id), len(ids) - (ids[-1] == tokenizer.end_id)
    source, target, at = [], [tokenizer.bos_id], 0
    for i, (a, b) in enumerate(gaps(end - begin, rate, span, rng), tokenizer.vocab_size):
        source += [*ids[at:begin + a], i]
        target += [i, *ids[begin + a:begin + b]]
        at = begin + b
    return source + ids[at:], target + [tokenizer.end_id]


def read(text: tuple, cfg: Config, tokenizer: Tokenizer, step: int, rows) -> dict[str, torch.Tensor]:
    """What the model is called with, (B, T) each. text: (ids, targets, segment_ids) as Windows makes them.
    rows: their numbers in the step. What is hidden depends on (seed, step, row) alone."""
    streams = [np.random.Generator(np.random.Philox(key=cfg.seed, counter=[0, step, 2, row])) for row in rows]
    (ids, targets, segment_ids), more = text, {}
    if cfg.objective == "mlm":
        pairs = [hide(row, tokenizer, cfg.mask_rate, rng) for row, rng in zip(ids.numpy(), streams)]
        ids, targets = (torch.from_numpy(np.stack(part)) for part in zip(*pairs))
    if cfg.objective == "seq2seq":
        pairs, places = [], []  # of all documents; which of them stand in a row
        for row, its, rng in zip(ids, segment_ids, streams):
            documents = [row[its == number].tolist() for number in its[its >= 0].unique()]
            places.append(range(len(pairs), len(pairs) + len(documents)))
            pairs += [take_out(each, tokenizer, cfg.mask_rate, cfg.span, rng) for each in documents]
        (source, _, source_ids), (ids, targets, segment_ids) = (
            collate(side, [[1] * len(each) for each in side], places, 0 if side else 1, tokenizer.pad_id)
            for side in ([pair[i] for pair in pairs] for i in (0, 1)))
        more = {"source": source, "source_ids": source_ids}
    return {"ids": ids, "targets": targets, "segment_ids": segment_ids, **more}


@torch.no_grad()
def evaluate(model, tokens: TokenFile, n_rows: int, cfg: Config, tokenizer: Tokenizer, ranks) -> dict:
    """Mean loss per target of the validation text, n_rows at a time. What is hidden is always the same."""
    total = torch.zeros(2, dtype=torch.float64)  # loss, targets
    for i, text in enumerate(eval_windows(tokens, cfg.seq_len, n_rows, ranks.rank, ranks.world)
                             if len(tokens) > 1 else ()):
        first = (i * ranks.world + ranks.rank) * len(text[0])
        batch = read(text, cfg, tokenizer, 2**63, range(first, first + len(text[0])))  # no step is so late
        logp = model(**{name: x.to(ranks.device) for name, x in batch.items()}).cpu()  # (b, T)
        total += torch.stack((-logp.double().sum(), (batch["targets"] >= 0).sum()))
    loss, count = ranks.all_reduce(total).tolist()
    return {"eval_loss": loss / count} if count else {}


def main(argv=None) -> int | None:
    cfg = parse(Config, argv, __doc__)
    if cfg.show:
        return print(__doc__)
    ranks = setup(cfg.device)
    train_path, val_path, tokenizer_path = ranks.main_first(lambda: prepare(
        cfg.data, tokenizer=cfg.tokenizer, vocab_size=cfg.vocab_size, val_data=cfg.val_data,
        val_fraction=cfg.val_fraction, strict=cfg.strict))
    tokenizer = Tokenizer.load(tokenizer_path)
    tokens, val_tokens = TokenFile(train_path, tokenizer), TokenFile(val_path, tokenizer)
    train = Windows(tokens, cfg.seq_len, batch_size=cfg.batch_size, seed=cfg.seed)

    most = 1 + int((1 + int(cfg.mask_rate * cfg.seq_len)) / cfg.span)  # gaps in a document, each with a name
    model_class, more = {"clm": (GPT, 0), "mlm": (Encoder, 1), "seq2seq": (Seq2Seq, most)}[cfg.objective]
    kind = GPTConfig if cfg.objective == "clm" else Shape  # so that sample.py reads a clm and refuses others
    shape = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(kind)}
    shape |= {"vocab_size": tokenizer.vocab_size + more,  # a target of many gaps may be three longer than
              "max_seq_len": cfg.max_seq_len + 3 * (cfg.objective == "seq2seq")}  # its row
    with torch.device("meta"):  # without memory: Zero fills it unit by unit
        model = model_class(kind(**shape))
    if more:
        model.flops_per_token = lambda T: 0.0  # GPT's count is of causal attention and of all targets
    zero = Zero(model, units=model.units(), init=lambda module, prefix: initialise(module, cfg.seed, prefix),
                **cfg.zero_options(ranks))
    share = -(-cfg.batch_size // ranks.world)  # rows per rank and update
    micro = min(cfg.micro_batch_size or share, share)  # rows per forward
    run = Run(cfg, ranks, {"model": zero}, tokenizer, inputs={"data": tokens.note}, final={"head": "lm"},
              read=json.loads(tokenizer_path.with_name("read.json").read_text()))

    for step in run.steps(lambda: evaluate(model, val_tokens, micro, cfg, tokenizer, ranks)):
        text = train.batch(step - 1, ranks.rank, ranks.world)  # (b, T) each
        batch = read(text, cfg, tokenizer, step - 1, range(ranks.rank, share * ranks.world, ranks.world))
        n_read, n_targets = ranks.sum((text[2] >= 0).sum(), (batch["targets"] >= 0).sum())
        mean_loss = torch.zeros((), device=ranks.device)
        for row in range(0, share, micro):
            part = {name: x[row:row + micro].to(ranks.device) for name, x in batch.items()}
            loss = -model(**part, equal_weights=True).sum() / max(1, n_targets)
            zero.backward(loss)
            mean_loss += loss.detach()
        info = zero.step(lr_at(step, cfg), cfg.clip)
        mean_loss, = ranks.sum(mean_loss)
        run.log(step, tokens=n_read, skipped=info.skipped, targets=n_targets, loss=mean_loss,
                grad_norm=info.norm, learning_rate=lr_at(step, cfg))
    return run.finish()


if __name__ == "__main__":
    start(main)
