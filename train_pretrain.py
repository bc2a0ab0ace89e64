"""Pretraining: learn to predict the next token of plain text.

    minimise  L = - sum_t m_t log p(x_{t+1} | x_<=t) / sum_t m_t        (Radford et al. 2018, eq. 1)

m_t is 0 where there is nothing to predict: padding, and the start of the next document.

    python train_pretrain.py --out out/pretrain                             one process, defaults for a laptop
    python train_pretrain.py --data my.txt --out out/mine                   your own text
    torchrun --nproc_per_node 2 train_pretrain.py --zero 3 --out out/two    two processes, on GPUs or CPU
"""
from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Literal

import torch

from data import Windows, eval_windows
from lib.checkpoint import claim, final_folder, load_checkpoint, save_checkpoint, save_final
from lib.corpora import TokenFile, prepare
from lib.program import Log, UserError, matmul_peak, parse, require_positive, start
from lib.ranks import setup
from lib.tokenizer import Tokenizer
from model import GPT, GPTConfig, generate, initialise, load_model
from zero import Zero


@dataclass
class Config(GPTConfig):  # every field of GPTConfig is a flag too
    # data
    data: str = "stdlib"  # corpus: stdlib, shakespeare, or a path (.txt, .json, .jsonl, each also .gz)
    val_data: str = ""  # corpus to validate on; empty: the last val_fraction of data
    val_fraction: float = 0.1  # of the characters
    tokenizer: str = ""  # byte, char, bpe (trained on data), a tiktoken name, a tokenizer.json; empty: init's, else bpe
    vocab_size: int = 2048  # of a bpe trained here; the other tokenizers bring their own
    cache: str = "data"  # folder for token files, so that a second start reads no text
    windows: Literal["random", "sequential"] = "random"  # where the rows of a batch begin
    seq_len: int = 256  # tokens in a row (T)
    max_seq_len: int = 0  # longest row the model is made for; 0: seq_len
    # optimisation
    steps: int = 500  # updates
    batch_size: int = 16  # rows per update over all ranks (B)
    micro_batch_size: int = 0  # rows per rank and forward; 0: the rank's whole share at once
    lr: float = 3e-3  # peak learning rate
    min_lr: float = 0.0  # learning rate at the last step
    warmup_steps: int = 50  # updates over which the rate climbs from 0
    decay: Literal["cosine", "linear", "flat-then-linear"] = "linear"  # how it falls afterwards
    weight_decay: float = 0.1  # AdamW's, on matrices and embeddings; 0: off
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's memories of the gradient and of its square
    eps: float = 1e-8  # AdamW's
    clip: float = 1.0  # largest gradient norm; 0: off
    # run
    out: str = "out/pretrain"  # folder of this run: checkpoints, metrics.jsonl, final/
    init: str = ""  # folder of a finished model to start from (weights only); empty: a new model
    resume: bool = False  # go on from the newest checkpoint in out
    eval_every: int = 200  # updates between evaluations; 0: only at the end
    eval_rows: int = 0  # rows of the validation text per evaluation; 0: the whole text
    sample_tokens: int = 64  # length of the sample shown at each evaluation; 0: none
    save_every: int = 400  # updates between checkpoints; 0: only at the end
    keep: int = 2  # checkpoints kept
    log_every: int = 20  # updates between log lines
    seed: int = 1  # of initial weights, batches and samples
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of weights and activations in forward and backward
    zero: Literal[0, 1, 2, 3] = 0  # ZeRO stage: what is sharded over the ranks
    offload: str = ""  # to host memory: comma list of optim, params, acts; and disk: the optimizer's part in files
    overlap: bool = False  # gather a unit ahead and reduce one behind the computation; the same numbers, more memory
    activation_checkpointing: bool = False  # recompute each block in backward instead of keeping its activations
    compile: bool = False  # torch.compile each block


# [copy: lr_at]
def lr_at(step: int, cfg: Config) -> float:
    """Learning rate of update `step` (1..steps): linear warmup, then decay to min_lr, reached at the last update."""
    if step < cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)  # 0..1
    if cfg.decay == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    elif cfg.decay == "linear":
        left = 1 - done
    else:
        left = min(1.0, (1 - done) / 0.6)  # flat for the first 40 %
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * left
# [end copy]


def pretrain_loss(logp):
    """Sum of -log p(target); masked targets have log p = 0, so they add nothing. logp (B, T) -> scalar."""
    return -logp.sum()


@torch.no_grad()
def evaluate(model, tokens: TokenFile, rows: int, cfg: Config, env) -> dict:
    """Mean loss per token of the validation text, each token predicted once, in rows of seq_len without overlap,
    so many of them at once on each rank. UserError if the loss is not finite: what has blown up is not worth saving."""
    loss, count = torch.zeros((), device=env.device, dtype=torch.float64), 0
    batches = eval_windows(tokens, cfg.seq_len, rows, env.rank, env.world, cfg.eval_rows)
    for ids, targets, segment_ids in batches:  # (b, T) each
        ids, targets, segment_ids = ids.to(env.device), targets.to(env.device), segment_ids.to(env.device)
        loss += pretrain_loss(model(ids, targets, segment_ids=segment_ids))
        count += int((targets >= 0).sum())
        env.check_stop()
    loss, count = env.sum(loss, count)
    if not count:
        raise UserError(f"{tokens.path}: found nothing to predict; give another --val_data, or raise --eval_rows")
    mean = loss / count
    if not math.isfinite(mean):
        raise UserError(f"the validation loss is {mean}; lower --lr, or use --dtype float32 or bfloat16")
    return {"eval_loss": mean, "eval_perplexity": math.exp(min(mean, 700.0)),
            "eval_bits_per_byte": mean / math.log(2) * tokens.n_targets / tokens.n_bytes}


def main(argv=None) -> int:
    cfg = parse(Config, argv, __doc__)
    require_positive(cfg, "steps", "batch_size", "seq_len", "log_every", "keep")
    env = setup(cfg.device)

    # data: rank 0 makes the token files, then every rank finds them made
    given = os.path.join(final_folder(cfg.init), "tokenizer.json") if cfg.init else "bpe"
    train_path, val_path, tokenizer_path = env.main_first(lambda: prepare(
        cfg.data, tokenizer=cfg.tokenizer or given, vocab_size=cfg.vocab_size, val_data=cfg.val_data,
        val_fraction=cfg.val_fraction, cache=cfg.cache))
    tokenizer = Tokenizer.load(tokenizer_path)
    train_tokens, val_tokens = TokenFile(train_path, tokenizer), TokenFile(val_path, tokenizer)
    train = Windows(train_tokens, cfg.seq_len, batch_size=cfg.batch_size, mode=cfg.windows, seed=cfg.seed)

    # model
    if cfg.init:
        if Tokenizer.load(given).fingerprint != tokenizer.fingerprint:
            raise UserError(f"--tokenizer {cfg.tokenizer}: not the tokenizer of --init {cfg.init}; leave the flag out")
        model, *_ = load_model(cfg.init, attention=cfg.attention)
        model_config = model.config
        for name, value in dataclasses.asdict(model_config).items():
            if name != "vocab_size" and getattr(cfg, name) not in (value, getattr(Config(), name)):
                raise UserError(f"--{name} {getattr(cfg, name)}: the model of --init has {value}; leave the flag out")
    else:
        shape = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(GPTConfig)}
        shape |= {"vocab_size": tokenizer.vocab_size, "max_seq_len": cfg.max_seq_len or cfg.seq_len}
        model_config = GPTConfig(**shape)
        with torch.device("meta"):  # without memory: it is filled unit by unit below, so no rank need hold it whole
            model = GPT(model_config)
    if cfg.seq_len > model_config.max_seq_len:
        raise UserError(f"--seq_len {cfg.seq_len}: the model's rows end at {model_config.max_seq_len}; lower it"
                        + ("" if cfg.init else ", or raise --max_seq_len"))
    parameters, flops = model.parameter_count(), model.flops_per_token(cfg.seq_len)
    zero = Zero(model, units=model.units(), stage=cfg.zero, device=env.device,
                init=None if cfg.init else lambda module, prefix: initialise(module, cfg.seed, prefix),
                dtype=getattr(torch, cfg.dtype),
                offload=tuple(filter(None, cfg.offload.split(","))), lr=cfg.lr, weight_decay=cfg.weight_decay,
                betas=cfg.betas, eps=cfg.eps, activation_checkpointing=cfg.activation_checkpointing,
                compile=cfg.compile, overlap=cfg.overlap)

    # where were we
    lock = claim(cfg.out, cfg.resume) if env.is_main else None  # noqa: F841 - held until this function returns
    env.barrier()
    config = {"model": dataclasses.asdict(model_config), "head": "lm", "run": dataclasses.asdict(cfg)}
    # What a resumed run must share with the one it continues, and what it should, or else its curve bends:
    same = {"model": {**config["model"], "attention": ""}, "tokenizer": tokenizer.fingerprint}
    should = {"data": train_tokens.note} | {name: getattr(cfg, name) for name in (
        "windows", "seq_len", "batch_size", "micro_batch_size", "lr", "min_lr", "warmup_steps", "decay", "weight_decay",
        "betas", "eps", "clip", "seed", "dtype", "attention")}
    should["betas"] = list(cfg.betas)  # as JSON gives it back
    # [copy: resume]
    found = load_checkpoint(cfg.out, {"model": zero}, same=same, numbers=["skipped"],
                            bitwise=should) if cfg.resume else None
    start, extra = found or (0, {"skipped": 0})
    skipped = extra["skipped"]
    if start > cfg.steps:
        raise UserError(f"--steps {cfg.steps}: {cfg.out} is already at step {start}; give more steps")
    # [end copy]

    share = -(-cfg.batch_size // env.world)  # rows per rank and update
    micro = min(cfg.micro_batch_size or share, share)  # rows per forward
    log = Log(cfg.out, env, steps=cfg.steps, start=start, flops_per_token=flops,
              peak_flops=matmul_peak(env.device, getattr(torch, cfg.dtype)))
    log.say(f"{parameters:,} parameters, {flops / 1e6:.1f} MFLOP per token; a large matrix product runs at "
            f"{log.peak_flops / 1e9:.0f} GFLOP/s per process")
    log.say(f"{len(train_tokens):,} training and {len(val_tokens):,} validation tokens ({tokenizer.kind}, V = "
            f"{tokenizer.vocab_size}); {cfg.batch_size * cfg.seq_len:,} per update: {env.world} ranks x "
            f"{-(-share // micro)} micro-batches x {micro} rows x {cfg.seq_len}\n{train_tokens.note}")
    log.say(zero.report())
    if cfg.resume:
        log.say(f"going on after step {start}" if found else f"--resume: nothing in {cfg.out} yet, starting fresh")

    def evaluate_and_show(step: int) -> None:
        log.event(step, **evaluate(model, val_tokens, micro, cfg, env))
        if cfg.sample_tokens:
            with zero.gathered():
                if env.is_main:
                    length = min(cfg.sample_tokens, model_config.max_seq_len - 1)
                    new = generate(model, [[tokenizer.bos_id]], max_new_tokens=length, eos_id=tokenizer.end_id,
                                   banned=tokenizer.specials_but_end, seeds=[cfg.seed])
                    log.say("    " + tokenizer.decode(new[0]).replace("\n", "\n    "))

    # the loop: exactly cfg.steps updates, numbered from 1; evaluation and checkpoint also at the last
    if start == cfg.steps or extra.get("due"):
        evaluate_and_show(start)  # finished before: say how it went; or stopped there before it was evaluated
        log.restart_clock()
    for step in range(start + 1, cfg.steps + 1):
        batch = train.batch(step - 1, env.rank, env.world)
        ids, targets, segment_ids = (part.to(env.device) for part in batch)  # (b, T) each
        n_tokens, = env.sum((targets >= 0).sum())  # ONE denominator, whatever the split
        loss_sum = torch.zeros((), device=env.device)
        for row in range(0, share, micro):
            rows = slice(row, row + micro)
            logp = model(ids[rows], targets[rows], segment_ids=segment_ids[rows], equal_weights=True)  # (b, T)
            loss = pretrain_loss(logp) / n_tokens
            zero.backward(loss)
            loss_sum += loss.detach()
        info = zero.step(lr_at(step, cfg), cfg.clip)
        skipped += info.skipped
        loss_sum, stop = env.sum(loss_sum, env.stop_signal != 0)  # asked at the end: before it would be one step late
        log.count(n_tokens)
        last = step == cfg.steps
        if step % cfg.log_every == 0 or step == start + 1 or last:
            log.train(step, loss=loss_sum, grad_norm=info.norm, learning_rate=lr_at(step, cfg),
                      **({"skipped": skipped} if skipped else {}))
        # [copy: evaluate_and_save]
        due = last or (cfg.eval_every and step % cfg.eval_every == 0)
        if due and not stop:  # asked to stop, save at once
            stop = env.stopped_in(evaluate_and_show, step)
            log.restart_clock()
        if last or stop or (cfg.save_every and step % cfg.save_every == 0):
            save_checkpoint(cfg.out, step, {"model": zero}, {**same, **should, "skipped": skipped, "due": due and stop},
                            keep=cfg.keep, config=config, tokenizer_path=tokenizer_path)
            log.restart_clock()
        if stop:
            log.say(f"asked to stop: saved after step {step}; go on with --resume")
            break
        # [end copy]
    else:
        weights = zero.full_state_dict()
        if env.is_main:
            save_final(cfg.out, weights, config, tokenizer_path)
        log.say(zero.counted())
        log.say(f"finished: {cfg.out}/final")
    env.close()
    return env.exit_code


if __name__ == "__main__":
    start(main)
