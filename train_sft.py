"""Supervised fine-tuning (SFT): learn to answer, from conversations that show how.

    minimise  L = - sum_t m_t log p(x_{t+1} | x_<=t) / sum_t m_t        (Ouyang et al. 2022, section 3.5)

m_t is 1 where the next token is said by the assistant, or ends its turn, and 0 elsewhere: the user's words are read,
never imitated. All assistant turns of a conversation are trained in one pass, and several conversations share a row
without seeing each other. With --ptx the text of pretraining is rehearsed beside them (as in Ouyang et al. 2022,
equation 2): what a small model knows and is not asked about is otherwise soon overwritten.

    python train_sft.py --data chats.jsonl --init out/pretrain --out out/sft    one process
    torchrun --nproc_per_node 2 train_sft.py --data chats.jsonl --init out/pretrain --zero 3 --out out/two
    python train_sft.py --data chats.jsonl --init out/pretrain --steps 5 --eval_every 0 --out out/toy       a first try
"""
from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Literal

import torch

from data import CHAT_TEMPLATE, Conversations, Windows, encode_prompt
from lib.checkpoint import claim, final_folder, load_checkpoint, save_checkpoint, save_final
from lib.corpora import TokenFile, prepare
from lib.program import Log, UserError, matmul_peak, parse, require_positive, start
from lib.ranks import setup
from lib.records import read_chats, split_records
from model import generate, load_model
from zero import Zero


@dataclass
class Config:
    # data
    data: str = ""  # conversations: .json or .jsonl (or .gz) with messages, Alpaca or ShareGPT records
    val_data: str = ""  # conversations to validate on, on all their turns; empty: the last val_fraction of data
    val_fraction: float = 0.1  # of the records
    turns: Literal["all", "last", "each"] = "all"  # train every assistant turn in one pass, the last, or each by itself
    pack: bool = True  # several conversations in a row; off: one, padded
    seq_len: int = 0  # tokens in a row (T); 0: the longest the model was made for
    # optimisation
    epochs: float = 3.0  # times each conversation is seen, if steps is 0
    steps: int = 0  # updates; 0: as many as epochs takes
    batch_size: int = 16  # conversations per update over all ranks, before they are packed into rows (B)
    micro_batch_size: int = 0  # rows per rank and forward; 0: the rank's whole share at once
    lr: float = 1e-3  # peak learning rate
    min_lr: float = 0.0  # learning rate at the last step
    warmup_steps: int = 10  # updates over which the rate climbs from 0
    decay: Literal["cosine", "linear", "flat-then-linear"] = "linear"  # how it falls afterwards
    weight_decay: float = 0.0  # AdamW's, on matrices and embeddings; 0: off
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's memories of the gradient and of its square
    eps: float = 1e-8  # AdamW's
    clip: float = 1.0  # largest gradient norm; 0: off
    ptx: float = 0.0  # weight of the pretraining loss that is mixed in, against forgetting; 0: off
    ptx_data: str = ""  # its text: .txt, .json or .jsonl
    ptx_rows: int = 8  # its rows of seq_len per update over all ranks
    # run
    out: str = "out/sft"  # folder of this run: checkpoints, metrics.jsonl, final/
    init: str = "out/pretrain"  # folder of the finished model to start from (weights and tokenizer)
    resume: bool = False  # go on from the newest checkpoint in out
    eval_every: int = 100  # updates between evaluations; 0: only at the end
    eval_prompts: int = 3  # validation prompts answered at each evaluation; 0: none
    save_every: int = 400  # updates between checkpoints; 0: only at the end
    keep: int = 2  # checkpoints kept
    log_every: int = 20  # updates between log lines
    seed: int = 1  # of the order of the conversations
    # [copy: machine]
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of weights and activations in forward and backward
    attention: Literal["flash", "sdpa", "naive"] = "flash"  # ours, PyTorch's C++ kernel, the ten lines
    zero: Literal[0, 1, 2, 3] = 0  # ZeRO stage: what is sharded over the ranks
    offload: str = ""  # to host memory: comma list of optim, params, acts; and disk: the optimizer's part in files
    activation_checkpointing: bool = False  # recompute each block in backward instead of keeping its activations
    compile: bool = False  # torch.compile each block
    # [end copy]


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


def sft_loss(logp):
    """Sum of -log p(target); what is not trained has log p = 0, so it adds nothing. logp (B, T) -> scalar."""
    return -logp.sum()


# [copy: rehearse]
def rehearse(model, zero, text: Windows, batch: int, cfg: Config, env) -> tuple[torch.Tensor, float]:
    """Add cfg.ptx times the gradient of the mean loss of one batch of text. Returns (this rank's part of that loss, the
    tokens of all ranks)."""
    windows = [x.to(env.device) for x in text.batch(batch, env.rank, env.world)]  # (b, T) each
    n_tokens, = env.sum((windows[1] >= 0).sum())
    loss_sum = torch.zeros((), device=env.device)
    for ids, targets, segment_ids in zip(*(x.split(cfg.micro_batch_size or cfg.ptx_rows) for x in windows)):
        loss = -model(ids, targets, segment_ids=segment_ids, equal_weights=True).sum() / n_tokens
        zero.backward(cfg.ptx * loss)
        loss_sum += loss.detach()
    return loss_sum, n_tokens
# [end copy]


@torch.no_grad()
def evaluate(model, chats: Conversations, rows: int, env) -> dict:
    """Mean loss per trained token of the validation replies, and how many tokens are the model's first guess."""
    loss, right, count = torch.zeros((), device=env.device, dtype=torch.float64), 0, 0
    for batch in chats.in_order(env.rank, env.world):
        for part in zip(*(whole.split(rows) for whole in batch)):
            ids, targets, segment_ids = (rows_of.to(env.device) for rows_of in part)  # (b, T) each
            logp, _, hits = model(ids, targets, segment_ids=segment_ids, with_stats=True)  # (b, T) each
            loss += sft_loss(logp)
            right += int(hits[targets >= 0].sum())
            count += int((targets >= 0).sum())
        env.check_stop()
    loss, right, count = env.sum(loss, right, count)
    mean = loss / count
    if not math.isfinite(mean):
        raise UserError(f"the validation loss is {mean}; lower --lr, or use --dtype float32 or bfloat16")
    return {"eval_loss": mean, "eval_perplexity": math.exp(min(mean, 700.0)), "eval_mean_token_accuracy": right / count}


def main(argv=None) -> int:
    cfg = parse(Config, argv, __doc__)
    require_positive(cfg, "batch_size", "log_every", "keep")
    if not cfg.data:
        raise UserError("--data: found nothing, expected a file of conversations")
    if bool(cfg.ptx) != bool(cfg.ptx_data):
        raise UserError(f"--ptx {cfg.ptx} with --ptx_data {cfg.ptx_data!r}: expected both or neither")
    env = setup(cfg.device)

    # model
    model, tokenizer, born = load_model(cfg.init, head="lm", attention=cfg.attention)
    if born["head"] != "lm":
        raise UserError(f"--init {cfg.init}: found a reward model, expected a language model")
    tokenizer_path = os.path.join(final_folder(cfg.init), "tokenizer.json")
    cfg.seq_len = cfg.seq_len or model.config.max_seq_len
    if cfg.seq_len > model.config.max_seq_len:
        raise UserError(f"--seq_len {cfg.seq_len}: the model's rows end at {model.config.max_seq_len}; lower it")

    # data: read and encoded by every rank, since conversations are small
    records = read_chats(cfg.data)
    records, val_records = (records, read_chats(cfg.val_data)) if cfg.val_data else \
        split_records(records, cfg.val_fraction)
    train, val = (Conversations(part, tokenizer, cfg.seq_len, turns=turns, packed=cfg.pack, batch_size=cfg.batch_size,
                                seed=cfg.seed) for part, turns in ((records, cfg.turns), (val_records, "all")))
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * len(train) / cfg.batch_size)
    require_positive(cfg, "steps")
    if cfg.ptx:
        require_positive(cfg, "ptx_rows")
        text_path, *_ = env.main_first(lambda: prepare(cfg.ptx_data, tokenizer=tokenizer_path))
        text = Windows(TokenFile(text_path, tokenizer), cfg.seq_len, batch_size=cfg.ptx_rows, seed=cfg.seed)

    # [copy: shard]
    parameters, flops = model.parameter_count(), model.flops_per_token(cfg.seq_len)
    zero = Zero(model, units=model.units(), device=env.device, stage=cfg.zero, dtype=getattr(torch, cfg.dtype),
                offload=tuple(filter(None, cfg.offload.split(","))), lr=cfg.lr, weight_decay=cfg.weight_decay,
                betas=cfg.betas, eps=cfg.eps, activation_checkpointing=cfg.activation_checkpointing,
                compile=cfg.compile)

    # where were we
    lock = claim(cfg.out, cfg.resume) if env.is_main else None  # noqa: F841 - held until this function returns
    env.barrier()
    # [end copy]
    config = {"model": dataclasses.asdict(model.config), "head": "lm", "chat_template": CHAT_TEMPLATE,
              "run": dataclasses.asdict(cfg)}
    # What a resumed run must share with the one it continues, and what it should, or else its curve bends:
    same = {"model": {**config["model"], "attention": ""}, "tokenizer": tokenizer.fingerprint}
    should = {"data": train.fingerprint()} | {name: getattr(cfg, name) for name in (
        "pack", "seq_len", "batch_size", "micro_batch_size", "lr", "min_lr", "warmup_steps", "decay", "weight_decay",
        "betas", "eps", "clip", "ptx", "ptx_data", "ptx_rows", "seed", "dtype", "attention")}
    should["betas"] = list(cfg.betas)  # as JSON gives it back
    # [copy: resume]
    found = load_checkpoint(cfg.out, {"model": zero}, same=same, numbers=["skipped"],
                            bitwise=should) if cfg.resume else None
    start, extra = found or (0, {"skipped": 0})
    skipped = extra["skipped"]
    if start > cfg.steps:
        raise UserError(f"--steps {cfg.steps}: {cfg.out} is already at step {start}; give more steps")
    # [end copy]

    micro = cfg.micro_batch_size or 10**9  # rows per forward
    # [copy: open_log]
    log = Log(cfg.out, env, steps=cfg.steps, start=start, flops_per_token=flops,
              peak_flops=matmul_peak(env.device, getattr(torch, cfg.dtype)))
    log.say(f"{parameters:,} parameters, {flops / 1e6:.1f} MFLOP per token; a large matrix product runs at "
            f"{log.peak_flops / 1e9:.0f} GFLOP/s per process")
    log.say(f"training: {train.report()}\nvalidation: {val.report()}\nchat template: {CHAT_TEMPLATE}")
    log.say(zero.report())
    if cfg.resume:
        log.say(f"going on after step {start}" if found else f"--resume: nothing in {cfg.out} yet, starting fresh")
    # [end copy]

    def evaluate_and_show(step: int) -> None:
        log.event(step, **evaluate(model, val, min(micro, 16), env))
        prompts = [encode_prompt(tokenizer, r.messages[:-1]) for r in val_records[:cfg.eval_prompts]]
        prompts = [prompt for prompt in prompts if len(prompt) < model.config.max_seq_len]
        if prompts:
            with zero.gathered():
                if env.is_main:
                    room = model.config.max_seq_len - max(map(len, prompts))
                    replies = generate(model, prompts, max_new_tokens=min(room, 64), temperature=0,
                                       eos_id=tokenizer.end_id, banned=tokenizer.specials_but_end)
                    for prompt, reply in zip(prompts, replies):
                        log.say(f"    {tokenizer.decode(prompt + reply)!r}")

    # the loop: exactly cfg.steps updates, numbered from 1; evaluation and checkpoint also at the last
    if start == cfg.steps or extra.get("due"):
        evaluate_and_show(start)  # finished before: say how it went; or stopped there before it was evaluated
        log.restart_clock()
    for step in range(start + 1, cfg.steps + 1):
        batch = train.rows(train.of_step(step - 1), env.rank, env.world)
        ids, targets, segment_ids = (part.to(env.device) for part in batch)  # (b, T) each
        n_tokens, n_read = env.sum((targets >= 0).sum(), (segment_ids >= 0).sum())
        loss_sum = torch.zeros((), device=env.device)
        for row in range(0, len(ids), micro):
            rows = slice(row, row + micro)
            logp = model(ids[rows], targets[rows], segment_ids=segment_ids[rows], equal_weights=True)  # (b, T)
            loss = sft_loss(logp) / n_tokens  # ONE denominator, whatever the split
            zero.backward(loss)
            loss_sum += loss.detach()
        ptx_sum, n_text = rehearse(model, zero, text, step - 1, cfg, env) if cfg.ptx else (0.0, 0)
        info = zero.step(lr_at(step, cfg), cfg.clip)
        skipped += info.skipped
        # asked at the end of the step: at its start, the save would come a step late
        loss_sum, ptx_sum, stop = env.sum(loss_sum, ptx_sum, env.stop_signal != 0)
        log.count(n_read + n_text)
        last = step == cfg.steps
        if step % cfg.log_every == 0 or step == start + 1 or last:
            log.train(step, loss=loss_sum, grad_norm=info.norm, learning_rate=lr_at(step, cfg),
                      epoch=step * cfg.batch_size / len(train), **({"loss/ptx_avg": ptx_sum} if cfg.ptx else {}),
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
