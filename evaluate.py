"""How well does a model predict a text, or answer?

    python evaluate.py --model out/pretrain --data my.txt                 rows of seq_len that do not overlap
    python evaluate.py --model out/pretrain --data my.txt --stride 64     each token sees seq_len - 64 or more before it
    python evaluate.py --model out/sft --chats held_out.jsonl             the replies of conversations

Of a text: the mean loss (nats per token), perplexity exp(loss), and bits per byte, which alone can be compared between
tokenizers: total loss / ln 2 / UTF-8 bytes. Of conversations: loss and first guesses per token of the replies, and what
the model answers when it takes the likeliest token each time: how often word for word, how often to an end.
"""
from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import torch

from checkpoint import load_model
from common import UserError, parse, require_positive, run, setup
from corpus import read_corpus
from data import Conversations, encode_prompt
from model import generate
from records import read_chats


@dataclass
class Config:
    # what
    model: str = "out/pretrain"  # folder of a run, or of a finished model
    data: str = "shakespeare"  # stdlib, shakespeare, or a path (.txt, .json, .jsonl, each also .gz)
    chats: str = ""  # instead of data: conversations, in any form that train_sft.py reads
    # how
    seq_len: int = 0  # tokens the model sees at once; 0: the longest it was made for
    stride: int = 0  # tokens scored per row, the rest is context; 0: seq_len, rows do not overlap
    batch_size: int = 16  # rows at once
    device: str = "auto"  # auto, cpu, cuda, cuda:N


def strided_rows(ids: np.ndarray, seq_len: int, stride: int):
    """Rows (ids, targets) of seq_len over one document; every id but the first is a target in exactly one row.

    Row i starts at i * stride and scores only what no row before it has scored: the first row everything, every other
    its last `stride` targets, which so have at least seq_len - stride tokens before them. -100: not scored here.
    """
    scored = 0  # targets 0 .. scored-1 are done; target t is ids[t + 1]
    start = 0
    while scored < len(ids) - 1:
        row = np.zeros(seq_len, dtype=np.int64)
        targets = np.full(seq_len, -100, dtype=np.int64)
        end = min(start + seq_len, len(ids) - 1)
        row[: end - start] = ids[start:end]
        targets[scored - start : end - start] = ids[scored + 1 : end + 1]
        yield row, targets
        scored, start = end, start + stride


@torch.no_grad()
def perplexity(model, tokenizer, documents, seq_len: int, stride: int, batch_size: int, device) -> dict:
    """Loss of every token of every document, its end included."""
    total, count, n_bytes, rows = 0.0, 0, 0, []

    def score(rows):
        ids, targets = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*rows))  # (b, T) each
        return -model(ids, targets).double().sum().item(), int((targets >= 0).sum())

    for document in documents:
        n_bytes += len(document.encode("utf-8"))
        ids = np.concatenate(([tokenizer.bos_id], tokenizer.encode_array(document), [tokenizer.end_id]))
        for row in strided_rows(ids, seq_len, stride):
            rows.append(row)
            if len(rows) == batch_size:
                loss, n = score(rows)
                total, count, rows = total + loss, count + n, []
    if rows:
        loss, n = score(rows)
        total, count = total + loss, count + n
    if not n_bytes:
        raise UserError("the text to evaluate on is empty")
    mean = total / count
    return {"tokens": count, "bytes": n_bytes, "loss": mean, "perplexity": math.exp(min(mean, 700.0)),
            "bits_per_byte": total / math.log(2) / n_bytes}


@torch.no_grad()
def answers(model, tokenizer, records, batch_size: int, device) -> dict:
    """The last replies of the conversations: predicted token by token, and given by greedy decoding."""
    longest = model.config.max_seq_len
    chats = Conversations(records, tokenizer, longest, turns="last", batch_size=batch_size)
    loss, right, count = 0.0, 0, 0
    for batch in chats.in_order():
        ids, targets, segment_ids = (part.to(device) for part in batch)  # (b, T) each
        logp, _, hits = model(ids, targets, segment_ids=segment_ids, with_stats=True)  # (b, T) each
        loss, count = loss - logp.double().sum().item(), count + int((targets >= 0).sum())
        right += int(hits[targets >= 0].sum())
    prompts = [encode_prompt(tokenizer, record.messages[:-1]) for record in records]
    asked = sorted((i for i, prompt in enumerate(prompts) if len(prompt) < longest), key=lambda i: len(prompts[i]))
    exact = ended = 0
    for start in range(0, len(asked), batch_size):
        some = asked[start : start + batch_size]
        room = longest - max(len(prompts[i]) for i in some)
        replies = generate(model, [prompts[i] for i in some], max_new_tokens=room, temperature=0,
                           eos_id=tokenizer.end_id, banned=tokenizer.specials_but_end)
        for i, reply in zip(some, replies):
            ended += reply[-1] == tokenizer.end_id
            exact += reply == [*tokenizer.encode(records[i].messages[-1]["content"]), tokenizer.end_id]
    mean = loss / count
    return {"replies": len(chats), "dropped": chats.dropped, "tokens": count, "loss": mean,
            "perplexity": math.exp(min(mean, 700.0)), "mean_token_accuracy": right / count, "prompts": len(asked),
            "exact_match": exact / max(1, len(asked)), "ended": ended / max(1, len(asked))}


def main(argv=None) -> int:
    cfg = parse(Config, argv, __doc__)
    require_positive(cfg, "batch_size")
    env = setup(cfg.device, catch_signals=False)
    model, tokenizer, _ = load_model(cfg.model)
    model.to(env.device)
    if cfg.chats:
        result = answers(model, tokenizer, read_chats(cfg.chats), cfg.batch_size, env.device)
        print(json.dumps({"model": cfg.model, "chats": cfg.chats, **result}))
        return 0
    seq_len = min(cfg.seq_len or model.config.max_seq_len, model.config.max_seq_len)
    stride = min(cfg.stride or seq_len, seq_len)
    result = perplexity(model, tokenizer, read_corpus(cfg.data), seq_len, stride, cfg.batch_size, env.device)
    print(json.dumps({"model": cfg.model, "data": cfg.data, "seq_len": seq_len, "stride": stride, **result}))
    return 0


if __name__ == "__main__":
    run(main)
