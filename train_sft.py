"""Supervised fine-tuning (SFT): learn from conversations to answer, and to stop.

    minimise  loss = - sum_t m_t log p(x_{t+1} | x_<=t) / sum_t m_t        (Ouyang et al. 2022, section 3.5)

m_t is 1 where the next token is said by the assistant or ends its turn, and 0 elsewhere. So the user's words
are read and never imitated. All assistant turns of a conversation are trained in one pass. Several
conversations share a row without seeing each other. With --ptx, text of pretraining is rehearsed beside them
(ibid., equation 2): a small model soon forgets what it knows and is not asked about.

    python train_sft.py --data chats.jsonl --init out/pretrain --out out/sft    one process
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch

from data import CHAT_TEMPLATE, Conversations, Rehearsal, RehearsalConfig, encode_prompt, segment_sums
from lib.program import parse, start
from lib.ranks import setup, together
from lib.records import read_chats, read_split
from lib.run import Run, RunConfig, lr_at, with_error
from lora import DeltaConfig, attach, final_of
from model import greedy_replies, load_model
from zero import Zero


@dataclass
class Config(RunConfig, RehearsalConfig, DeltaConfig):  # the flags that all stages share are in lib/run.py
    # data
    data: str = ""  # conversations: messages, ShareGPT, Alpaca or prompt and completion; files or a folder
    turns: Literal["all", "last", "each"] = "all"  # train every turn in one pass, the last, or each by itself
    # optimisation
    epochs: float = 3.0  # times each conversation is seen, if steps is 0
    # run
    out: str = "out/sft"
    init: str = "out/pretrain"
    eval_prompts: int = 3  # validation prompts answered at each evaluation; 0: none


def sft_loss(logp):
    """Sum of -log p(target). What is not trained has log p = 0 and adds nothing. logp (B, T) -> scalar."""
    return -logp.sum()


@torch.no_grad()
def evaluate(model, chats: Conversations, rows: int, ranks) -> dict:
    """Mean loss per trained token, and how many are the model's first guess; `rows` rows at a time."""
    if not len(chats):
        return {}
    items = []  # (conversations, 3): of each its loss, its right guesses, its trained tokens
    for batch in chats.in_order(ranks.rank, ranks.world):
        for part in zip(*(whole.split(rows) for whole in batch)):
            ids, targets, segment_ids = (x.to(ranks.device) for x in part)  # (b, T) each
            logp, _, hits = model(ids, targets, segment_ids=segment_ids, with_stats=True)  # (b, T) each
            trained = targets >= 0
            sums = [segment_sums(x, segment_ids) for x in (-logp, hits & trained, trained)]  # (b, segments)
            items.append(torch.stack(sums, -1).flatten(0, 1).cpu().double())
    items = torch.cat(sum(together(lambda: items), []))  # of all ranks
    loss, right, count = items[items[:, 2] > 0].T  # without padding
    found = with_error("eval_loss", loss, count)
    return {**found, "eval_perplexity": math.exp(min(found["eval_loss"], 700.0)),
            **with_error("eval_mean_token_accuracy", right, count)}


def main(argv=None) -> int:
    cfg = parse(Config, argv, __doc__)
    ranks = setup(cfg.device)  # this process and its peers: rank, world, device, sum()

    # model
    model, tokenizer, born = load_model(cfg.init, head="lm", attention=cfg.attention)
    attach(model, cfg, born)  # with --tune: a delta, and the rest frozen
    cfg.fit_rows(model.config.max_seq_len)
    zero = Zero(model, units=model.units(), **cfg.zero_options(ranks))

    # data: read and encoded by every rank, since conversations are small
    records, val_records, *read = read_split(read_chats, cfg)
    sampling = {"batch_size": cfg.batch_size, "seed": cfg.seed}
    train = Conversations(records, tokenizer, cfg.seq_len, turns=cfg.turns, **sampling)
    val = Conversations(val_records, tokenizer, cfg.seq_len, **sampling)
    text = Rehearsal(cfg, tokenizer, ranks)  # of --ptx; without it nothing
    cfg.fit_steps(len(train))

    run = Run(cfg, ranks, {"model": zero}, tokenizer,
              inputs={"data": train.fingerprint(), "ptx_data": text.fingerprint()},
              final={"head": "lm", "chat_template": CHAT_TEMPLATE}, read=read)
    run.say(f"training: {train.report()}\nvalidation: {val.report()}\nchat template: {CHAT_TEMPLATE}")
    micro = cfg.micro_batch_size or 10**9  # rows per forward

    def evaluate_and_show() -> dict:
        asked = val_records[:cfg.eval_prompts]
        prompts = [encode_prompt(tokenizer, record.messages[:-1]) for record in asked]
        with zero.gathered():
            run.say(greedy_replies(model, prompts, tokenizer))
        return evaluate(model, val, min(micro, 16), ranks)

    for step in run.steps(evaluate_and_show):
        batch = train.rows(train.of_step(step - 1), ranks.rank, ranks.world)
        ids, targets, segment_ids = (x.to(ranks.device) for x in batch)  # (b, T) each
        n_tokens, n_read = ranks.sum((targets >= 0).sum(), (segment_ids >= 0).sum())
        mean_loss = torch.zeros((), device=ranks.device)
        for rows in (slice(row, row + micro) for row in range(0, len(ids), micro)):
            logp = model(ids[rows], targets[rows], segment_ids=segment_ids[rows], equal_weights=True)
            loss = sft_loss(logp) / n_tokens  # ONE denominator, however the batch is split
            zero.backward(loss)
            mean_loss += loss.detach()
        ptx, n_text = text.backward(model, zero, step - 1)
        lr = lr_at(step, cfg)
        info = zero.step(lr, cfg.clip)
        mean_loss, = ranks.sum(mean_loss)
        run.log(step, tokens=n_read + n_text, skipped=info.skipped, loss=mean_loss, grad_norm=info.norm,
                learning_rate=lr, epoch=step * cfg.batch_size / len(train), **ptx)
    return run.finish(final_of(model))


if __name__ == "__main__":
    start(main)
