"""How well does a model predict a text, and how well does it answer?

    python evaluate.py --model out/pretrain --data my.txt              rows of seq_len that do not overlap
    python evaluate.py --model out/pretrain --data my.txt --stride 64  seq_len - 64 or more before each token
    python evaluate.py --model out/sft --chats held_out.jsonl          the last replies of conversations

Of a text: the mean loss (nats per token), perplexity exp(loss), and bits per byte: total loss / ln 2 / UTF-8
bytes. Only bits per byte can be compared between tokenizers. Of conversations: the loss per token of the
replies, and how often the likeliest token is the right one; then, of greedy replies, how many equal the given
ones word for word, and how many end by themselves.
"""
from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from data import CHAT_TEMPLATE, Conversations, collate, encode_prompt
from lib.corpora import read_corpus, split_documents
from lib.program import Progress, UserError, parse, replacing, require_positive, start
from lib.ranks import setup
from lib.records import read_chats, split_records
from model import LMHead, generate_sorted, load_model


@dataclass
class Config:
    # what
    model: str = "out/pretrain"  # folder of a run, or of a finished model
    data: str = "shakespeare"  # stdlib, shakespeare, or a path (.txt, .json, .jsonl, each also .gz)
    chats: str = ""  # instead of data: conversations, in any form that train_sft.py reads
    val_fraction: float = 0.0  # only this last part of data or chats, as training sets it aside; 0: all
    out: str = ""  # file for the figures, .json; empty: none
    # how
    seq_len: int = 0  # tokens the model sees at once; 0: the longest it was made for
    stride: int = 0  # tokens scored per row, the rest is context; 0: seq_len, rows do not overlap
    max_new_tokens: int = 48  # longest greedy reply
    batch_size: int = 16  # rows at once
    device: str = "auto"  # auto, cpu, cuda, cuda:N


def strided_rows(ids: np.ndarray, seq_len: int, stride: int):
    """Rows (ids, targets) over one document, (seq_len,) each. Every id but the first is a target once.

    Row i starts at i * stride. The first row scores all its targets. Every other row scores its last `stride`
    targets only, so that each has at least seq_len - stride tokens before it. -100: not scored in this row.
    """
    start = scored = 0  # targets 0 .. scored-1 are done; target t is ids[t + 1]
    while scored < len(ids) - 1:
        row, targets = np.zeros(seq_len, dtype=np.int64), np.full(seq_len, -100, dtype=np.int64)
        end = min(start + seq_len, len(ids) - 1)
        row[: end - start] = ids[start:end]
        targets[scored - start : end - start] = ids[scored + 1 : end + 1]
        yield row, targets
        scored, start = end, start + stride


@torch.no_grad()
def perplexity(model, tokenizer, documents, seq_len: int, stride: int, batch_size: int, device) -> dict:
    """Loss of every token of every document, its end included."""
    def all_rows():
        for document in documents:
            ids = np.concatenate(([tokenizer.bos_id], tokenizer.encode_array(document), [tokenizer.end_id]))
            yield from strided_rows(ids, seq_len, stride)

    total, count, rows = 0.0, 0, all_rows()
    n_bytes = sum(len(document.encode("utf-8")) for document in documents)
    while batch := list(islice(rows, batch_size)):
        ids, targets = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*batch))  # (B, T) each
        total -= model(ids, targets).double().sum().item()
        count += int((targets >= 0).sum())
    if not n_bytes:
        raise UserError("the text to evaluate on is empty")
    mean = total / count
    return {"tokens": count, "bytes": n_bytes, "loss": mean, "perplexity": math.exp(min(mean, 700.0)),
            "bits_per_byte": total / math.log(2) / n_bytes}


@dataclass
class Reply:
    prompt: list[int]
    ids: list[int]  # with the end token, if it has ended
    text: str
    ended: bool  # by itself; else it was cut off at max_new_tokens


def draw(model, tokenizer, prompts: list[list[int]], seeds, **options) -> list[Reply]:
    """One reply to each prompt (a list of ids). It depends on its prompt and its seed alone, not on its
    batch. options: those of model.generate_sorted and model.generate."""
    drawn = generate_sorted(model, prompts, seeds=seeds, eos_id=tokenizer.end_id,
                            banned=tokenizer.specials_but_end, **options)
    replies = []
    for prompt, ids in zip(prompts, drawn):
        ended = ids[-1] == tokenizer.end_id
        replies.append(Reply(prompt, ids, tokenizer.decode(ids[:-1] if ended else ids), ended))
    return replies


@torch.no_grad()
def score(model, tokenizer, replies: list[Reply], batch_size: int) -> list[float]:
    """A number per reply: log p(reply | prompt) of a language model, or the reward that a reward model reads
    at the reply's end."""
    numbers, is_lm = [], isinstance(model.head, LMHead)
    for at in range(0, len(replies), batch_size):
        sequences, masks = [], []
        for reply in replies[at : at + batch_size]:
            ids = reply.ids + [tokenizer.end_id] * (not reply.ended and not is_lm)
            sequences.append(reply.prompt + ids)
            masks.append([0] * len(reply.prompt) + [1] * len(ids))
        ids, targets, segment_ids = (x.to(model.cos.device) for x in collate(sequences, masks))  # (B, T) each
        out = model(ids, targets if is_lm else None, segment_ids=segment_ids)  # (B, T)
        ends = [len(sequence) - 1 for sequence in sequences]
        numbers += (out.sum(1) if is_lm else out[range(len(ends)), ends]).tolist()
    return numbers


@torch.no_grad()
def answers(model, tokenizer, records, cfg: Config, device) -> dict:
    """The figures of the last replies of conversations. "prompts" counts the greedy replies: those whose
    prompt and max_new_tokens fit into a row."""
    longest = model.config.max_seq_len
    chats = Conversations(records, tokenizer, longest, turns="last", batch_size=cfg.batch_size)
    loss, right, count = 0.0, 0, 0
    for batch in chats.in_order():
        ids, targets, segment_ids = (part.to(device) for part in batch)  # (B, T) each
        logp, _, hits = model(ids, targets, segment_ids=segment_ids, with_stats=True)  # (B, T) each
        loss, count = loss - logp.double().sum().item(), count + int((targets >= 0).sum())
        right += int(hits[targets >= 0].sum())
    prompts = [encode_prompt(tokenizer, record.messages[:-1]) for record in records]
    asked = [i for i, prompt in enumerate(prompts) if len(prompt) + cfg.max_new_tokens <= longest]
    replies = draw(model, tokenizer, [prompts[i] for i in asked], asked, batch_size=cfg.batch_size,
                   temperature=0, max_new_tokens=cfg.max_new_tokens, progress=Progress("replies"))
    exact = sum(reply.ids == [*tokenizer.encode(records[i].messages[-1]["content"]), tokenizer.end_id]
                for i, reply in zip(asked, replies))
    return {"replies": len(chats), "dropped": chats.dropped, "tokens": count, "loss": loss / count,
            "perplexity": math.exp(min(loss / count, 700.0)), "mean_token_accuracy": right / count,
            "prompts": len(asked), "exact_match": exact / max(1, len(asked)),
            "ended": sum(reply.ended for reply in replies) / max(1, len(asked))}


def load_language_model(folder: str, device, chat: bool = False):
    """(model, tokenizer, config) of a finished run. UserError if it is a reward model or, with chat, if it
    has not learned our chat template."""
    model, tokenizer, config = load_model(folder)
    if config["head"] != "lm":
        raise UserError(f"--model {folder}: found a reward model, expected a language model")
    found = config.get("chat_template")  # None: not trained to chat
    if found != CHAT_TEMPLATE and (chat or found):
        raise UserError(f"--model {folder}: found the chat template {found!r}, expected {CHAT_TEMPLATE!r}; "
                        "train it to chat with train_sft.py")
    return model.to(device), tokenizer, config


def save_figures(path, figures) -> None:
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + "\n")
    print(path)


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    require_positive(cfg, "batch_size", "max_new_tokens")
    device = setup(cfg.device, catch_signals=False).device
    model, tokenizer, _ = load_language_model(cfg.model, device, bool(cfg.chats))
    if cfg.chats:
        records = read_chats(cfg.chats)
        if cfg.val_fraction:
            _, records = split_records(records, cfg.val_fraction)
        figures = {"chats": cfg.chats, **answers(model, tokenizer, records, cfg, device)}
    else:
        documents = read_corpus(cfg.data)
        if cfg.val_fraction:
            _, documents = split_documents(documents, cfg.val_fraction)
        seq_len = min(cfg.seq_len or model.config.max_seq_len, model.config.max_seq_len)
        stride = min(cfg.stride or seq_len, seq_len)
        figures = {"data": cfg.data, "seq_len": seq_len, "stride": stride,
                   **perplexity(model, tokenizer, documents, seq_len, stride, cfg.batch_size, device)}
    figures = {"model": cfg.model, **figures}
    print(json.dumps(figures))
    if cfg.out:
        save_figures(cfg.out, figures)


if __name__ == "__main__":
    start(main)
