"""Pretraining: learn to predict the next token of plain text.

    minimise  loss = - sum_t m_t log p(x_{t+1} | x_<=t) / sum_t m_t        (Radford et al. 2018, eq. 1)

m_t is 0 where there is nothing to predict: padding, and the start of the next document.

    python train_pretrain.py --out out/pretrain                             one process, defaults for a laptop
    python train_pretrain.py --data my.txt --out out/mine                   your own text
    torchrun --nproc_per_node 2 train_pretrain.py --zero 3 --out out/two    two processes, on GPUs or CPU
"""
import dataclasses
import json
import math
import os
from dataclasses import dataclass
from typing import Literal

import torch

from data import Windows, eval_windows
from lib.checkpoint import final_folder
from lib.corpora import TokenFile, prepare
from lib.program import UserError, parse, require_positive, start
from lib.ranks import setup, together
from lib.run import Run, RunConfig, lr_at, with_error
from lib.tokenizer import Tokenizer
from model import GPT, GPTConfig, generate, initialise, load_model
from zero import Zero


@dataclass
class Config(RunConfig, GPTConfig):  # every field of the model's shape is a flag, too
    # data
    data: str = "stdlib"  # corpus: stdlib, shakespeare, or files: text or {"text"} records; or a folder
    tokenizer: str = ""  # byte, char, bpe, a tiktoken name, a tokenizer.json; empty: init's, else bpe
    vocab_size: int = 2048  # of a bpe learned here; the other tokenizers bring their own
    cache: str = "data"  # folder for token files, so that a second start reads no text
    windows: Literal["random", "sequential"] = "random"  # where the rows of a batch begin
    seq_len: int = 256
    max_seq_len: int = 0  # longest row that the model is made for; 0: seq_len
    # optimisation
    steps: int = 0  # updates; 0: 500, or fewer by --epochs
    epochs: float = 40.0  # most readings of the text, if steps is 0 (Muennighoff et al. 2023: more is no use)
    lr: float = 3e-3
    min_lr: float = 0.0  # what the learning rate falls to, one update after the last
    warmup_steps: int = 50
    weight_decay: float = 0.1  # AdamW's, on matrices and embeddings; 0: off
    # run
    out: str = "out/pretrain"
    init: str = ""  # folder of a finished model to start from (weights only); empty: a new model
    eval_every: int = 200
    eval_rows: int = 0  # rows of the validation text per evaluation; 0: the whole text
    sample_tokens: int = 64  # length of the sample shown at each evaluation; 0: none

    may_change = RunConfig.may_change | {"cache", "tokenizer", "vocab_size", "eval_rows", "sample_tokens"}

    def __post_init__(self):
        RunConfig.__post_init__(self)
        GPTConfig.__post_init__(self)
        require_positive(self, "seq_len", "epochs")


def pretrain_loss(logp):
    """Sum of -log p(target). Masked targets have log p = 0 and add nothing. logp (B, T) -> scalar."""
    return -logp.sum()


@torch.no_grad()
def evaluate(model, tokens: TokenFile, rows: int, cfg: Config, ranks) -> dict:
    """Mean loss per token of the validation text, each token predicted once, in rows that do not overlap.

    rows: how many of them one forward reads."""
    if len(tokens) < 2:
        return {}
    items = []  # (rows, 2): of each its loss and its targets
    for batch in eval_windows(tokens, cfg.seq_len, rows, ranks.rank, ranks.world, cfg.eval_rows):
        ids, targets, segment_ids = (x.to(ranks.device) for x in batch)  # (b, T) each
        logp = model(ids, targets, segment_ids=segment_ids)  # (b, T)
        items.append(torch.stack((-logp.double().sum(1), (targets >= 0).sum(1)), -1).cpu())
    loss, count = torch.cat(sum(together(lambda: items), [])).T  # of all ranks
    found = with_error("eval_loss", loss[count > 0], count[count > 0])
    return {**found, "eval_perplexity": math.exp(min(found["eval_loss"], 700.0)), "eval_bits_per_byte":
            found["eval_loss"] / math.log(2) * tokens.n_targets / tokens.n_bytes}


def make_model(cfg: Config, tokenizer: Tokenizer) -> GPT:
    """The model of --init; or a new one on the meta device, without memory: Zero fills it unit by unit."""
    if not cfg.init:
        shape = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(GPTConfig)}
        shape |= {"vocab_size": tokenizer.vocab_size, "max_seq_len": cfg.max_seq_len or cfg.seq_len}
        with torch.device("meta"):
            return GPT(GPTConfig(**shape))
    model, its_tokenizer, _ = load_model(cfg.init, head="lm", attention=cfg.attention)
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"--tokenizer {cfg.tokenizer}: not that of --init {cfg.init}; leave the flag out")
    for name, value in dataclasses.asdict(model.config).items():
        if name != "vocab_size" and getattr(cfg, name) not in (value, getattr(Config(), name)):
            raise UserError(f"--{name} {getattr(cfg, name)}: the model of --init has {value}; leave it out")
    return model


def main(argv=None) -> int:
    cfg = parse(Config, argv, __doc__)
    ranks = setup(cfg.device)  # this process and its peers: rank, world, device, sum()

    # data: rank 0 makes the token files, then every rank finds them made
    given = os.path.join(final_folder(cfg.init), "tokenizer.json") if cfg.init else "bpe"
    train_path, val_path, tokenizer_path = ranks.main_first(lambda: prepare(
        cfg.data, tokenizer=cfg.tokenizer or given, vocab_size=cfg.vocab_size, val_data=cfg.val_data,
        val_fraction=cfg.val_fraction, strict=cfg.strict, cache=cfg.cache))
    tokenizer = Tokenizer.load(tokenizer_path)
    train_tokens, val_tokens = TokenFile(train_path, tokenizer), TokenFile(val_path, tokenizer)
    size = cfg.batch_size * cfg.seq_len  # tokens an update
    cfg.fit_steps(len(train_tokens) / cfg.seq_len, most=500)
    train = Windows(train_tokens, cfg.seq_len, batch_size=cfg.batch_size, mode=cfg.windows, seed=cfg.seed)

    # model
    model = make_model(cfg, tokenizer)
    cfg.fit_rows(model.config.max_seq_len)
    init = None if cfg.init else lambda module, prefix: initialise(module, cfg.seed, prefix)
    zero = Zero(model, units=model.units(), init=init, **cfg.zero_options(ranks))

    share = -(-cfg.batch_size // ranks.world)  # rows per rank and update
    micro = min(cfg.micro_batch_size or share, share)  # rows per forward
    run = Run(cfg, ranks, {"model": zero}, tokenizer, inputs={"data": train_tokens.note},
              final={"head": "lm"}, read=json.loads(tokenizer_path.with_name("read.json").read_text()))
    run.say(f"{len(train_tokens):,} training and {len(val_tokens):,} validation tokens ({tokenizer.kind}, "
            f"V = {tokenizer.vocab_size}); {size:,} an update: {ranks.world} ranks x {-(-share // micro)} "
            f"micro-batches x {micro} rows x {cfg.seq_len}\n{train_tokens.note}\n{cfg.steps} updates read "
            f"the text {cfg.steps * size / len(train_tokens):.1f} times")

    def evaluate_and_show() -> dict:
        if cfg.sample_tokens:
            with zero.gathered():
                length = min(cfg.sample_tokens, model.config.max_seq_len - 1)
                new, = generate(model, [[tokenizer.bos_id]], max_new_tokens=length, eos_id=tokenizer.end_id,
                                banned=tokenizer.specials_but_end, seeds=[cfg.seed])
            run.say("    " + tokenizer.decode(new).replace("\n", "\n    "))
        return evaluate(model, val_tokens, micro, cfg, ranks)

    for step in run.steps(evaluate_and_show):
        batch = train.batch(step - 1, ranks.rank, ranks.world)
        ids, targets, segment_ids = (x.to(ranks.device) for x in batch)  # (b, T) each
        n_tokens, = ranks.sum((targets >= 0).sum())
        mean_loss = torch.zeros((), device=ranks.device)
        for rows in (slice(row, row + micro) for row in range(0, share, micro)):
            logp = model(ids[rows], targets[rows], segment_ids=segment_ids[rows], equal_weights=True)
            loss = pretrain_loss(logp) / n_tokens  # ONE denominator, however the batch is split
            zero.backward(loss)
            mean_loss += loss.detach()
        lr = lr_at(step, cfg)
        info = zero.step(lr, cfg.clip)
        mean_loss, = ranks.sum(mean_loss)
        run.log(step, tokens=n_tokens, skipped=info.skipped, loss=mean_loss, grad_norm=info.norm,
                learning_rate=lr)
    return run.finish()


if __name__ == "__main__":
    start(main)
