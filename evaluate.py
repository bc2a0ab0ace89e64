"""How well does a model predict a text, and how well does it answer?

    python evaluate.py --model out/pretrain --data my.txt              rows that do not overlap
    python evaluate.py --model out/pretrain --data my.txt --stride 64  all but 64 tokens of a row are context
    python evaluate.py --model out/sft --chats held_out.jsonl          the last replies of conversations
    python evaluate.py --model out/pretrain --choices arc.jsonl --shots 5    which of the answers is likeliest

Of a text: the mean loss (nats per token), perplexity exp(loss), and bits per byte, total loss / ln 2 / UTF-8
bytes. Only bits per byte can be compared between tokenizers. Of conversations: the loss of the replies, how
often the likeliest token is the right one, how many greedy replies are right word for word, how many end.
"""
import datetime
import json
import math
import random
import re
import sys
import time
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from data import Conversations, collate, encode_prompt, expect_chat
from lib.corpora import read_corpus, split_documents
from lib.program import UserError, parse, replacing, require_positive, start
from lib.ranks import setup
from lib.records import Records, check_text, found_in, read, read_chats, split
from lora import load_tuned
from model import LMHead, generate_sorted


@dataclass
class Config:
    model: str = "out/pretrain"  # folder of a run, or of a finished model
    delta: str = ""  # folder of a run with --tune whose base --model is; empty: none
    data: str = "stdlib"  # stdlib, shakespeare, or files: text, or records with "text"; or a folder
    chats: str = ""  # instead of data: conversations, in any form that train_sft.py reads
    choices: str = ""  # instead of data: questions, as HellaSwag, ARC, MMLU, PIQA or GSM8K have them
    shots: int = 0  # of choices: solved questions of the same file in front of each
    chat: bool = False  # of choices: the user asks, the assistant answers; else it is a text that goes on
    seed: int = 1  # of the shots
    strict: bool = False  # stop if a record cannot be used, instead of leaving it out
    val_fraction: float = 0.0  # only this last part of data or chats, as training sets it aside; 0: all
    out: str = ""  # file for the figures, .json; empty: none
    stride: int = 0  # tokens scored per row, the rest is context; 0: all, rows do not overlap
    max_new_tokens: int = 48  # longest greedy reply
    batch_size: int = 16  # rows at once
    device: str = "auto"  # auto, cpu, cuda, cuda:N


def strided_rows(ids: np.ndarray, seq_len: int, stride: int):
    """Rows (ids, targets) over one document, (seq_len,) each. Every id but the first is a target once. Row i
    begins at i * stride and scores its last `stride` targets, so that each has at least seq_len - stride
    tokens before it; the first row scores all. -100: not scored in this row."""
    start = scored = 0  # targets 0 .. scored-1 are done; target t is ids[t + 1]
    while scored < len(ids) - 1:
        row, targets = np.zeros(seq_len, dtype=np.int64), np.full(seq_len, -100, dtype=np.int64)
        end = min(start + seq_len, len(ids) - 1)
        row[: end - start] = ids[start:end]
        targets[scored - start : end - start] = ids[scored + 1 : end + 1]
        yield row, targets
        scored, start = end, start + stride


@torch.no_grad()
def perplexity(model, tokenizer, documents: list[str], stride: int, batch_size: int) -> dict:
    """Loss of every token of every document, its end included, in rows of the model's max_seq_len."""
    longest, total, count, device = model.config.max_seq_len, 0.0, 0, model.cos.device
    stride = min(stride or longest, longest)
    encoded = (np.r_[tokenizer.bos_id, tokenizer.encode_array(text), tokenizer.end_id] for text in documents)
    rows = (row for ids in encoded for row in strided_rows(ids, longest, stride))
    while batch := list(islice(rows, batch_size)):
        ids, targets = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*batch))  # (B, T) each
        total -= model(ids, targets).double().sum().item()
        count += int((targets >= 0).sum())
    n_bytes = sum(len(document.encode("utf-8")) for document in documents)
    return {"seq_len": longest, "stride": stride, "tokens": count, "bytes": n_bytes, "loss": total / count,
            "perplexity": math.exp(total / count), "bits_per_byte": total / math.log(2) / n_bytes}


class Progress:
    """progress(done, total): on a terminal, one line with the time left. The next call overwrites it."""

    def __init__(self, what: str):
        self.what, self.start = what, time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        if sys.stdout.isatty():
            left = datetime.timedelta(seconds=round((time.perf_counter() - self.start) * (total / done - 1)))
            line = f"{self.what} {done:,} of {total:,} | {left} left" if done < total else ""
            print(f"\r\033[K{line}", end="", flush=True)


@dataclass
class Reply:
    prompt: list[int]
    ids: list[int]  # with the end token, if it has ended
    text: str
    ended: bool  # by itself; else it was cut off at max_new_tokens


def draw(model, tokenizer, prompts: list[list[int]], seeds, **options) -> list[Reply]:
    """One reply to each prompt (a list of ids). It depends on its prompt and its seed alone, not on its
    batch. options: those of model.generate_sorted and model.generate; seeds: (seed, use, index, ...)."""
    end = tokenizer.end_id
    drawn = generate_sorted(model, prompts, seeds=seeds, eos_id=end, banned=tokenizer.specials_but_end,
                            **options)
    return [Reply(prompt, ids, tokenizer.decode([i for i in ids if i != end]), ended=ids[-1] == end)
            for prompt, ids in zip(prompts, drawn)]


@torch.no_grad()
def score(model, tokenizer, replies: list[Reply], batch_size: int) -> list[float]:
    """Of each reply log p(reply | prompt) by a language model, or a reward model's reward at its end."""
    numbers, is_lm = [], isinstance(model.head, LMHead)
    for at in range(0, len(replies), batch_size):
        some = replies[at : at + batch_size]
        said = [reply.ids + [tokenizer.end_id] * (not reply.ended and not is_lm) for reply in some]
        sequences = [reply.prompt + ids for reply, ids in zip(some, said)]
        masks = [[0] * len(reply.prompt) + [1] * len(ids) for reply, ids in zip(some, said)]
        ids, targets, segment_ids = (x.to(model.cos.device) for x in collate(sequences, masks))  # (B, T) each
        out = model(ids, targets if is_lm else None, segment_ids=segment_ids)  # (B, T)
        ends = [len(sequence) - 1 for sequence in sequences]
        numbers += (out.sum(1) if is_lm else out[range(len(ends)), ends]).tolist()
    return numbers


@torch.no_grad()
def answers(model, tokenizer, records, cfg: Config) -> dict:
    """Figures of the last replies of conversations; prompts: how many leave room for a greedy reply."""
    longest, loss, right, count = model.config.max_seq_len, 0.0, 0, 0
    chats = Conversations(records, tokenizer, longest, turns="last", batch_size=cfg.batch_size)
    for batch in chats.in_order():
        ids, targets, segment_ids = (part.to(model.cos.device) for part in batch)  # (B, T) each
        logp, _, hits = model(ids, targets, segment_ids=segment_ids, with_stats=True)  # (B, T) each
        loss, count = loss - logp.double().sum().item(), count + int((targets >= 0).sum())
        right += int(hits[targets >= 0].sum())
    last = [(encode_prompt(tokenizer, prompt), reply["content"])
            for *prompt, reply in (record.messages for record in records)]
    asked = [(prompt, given) for prompt, given in last if len(prompt) + cfg.max_new_tokens <= longest]
    replies = draw(model, tokenizer, [prompt for prompt, _ in asked], range(len(asked)), temperature=0,
                   batch_size=cfg.batch_size, max_new_tokens=cfg.max_new_tokens, progress=Progress("replies"))
    exact = sum(reply.ended and reply.text == given for reply, (_, given) in zip(replies, asked))
    return {"replies": len(chats), "dropped": chats.dropped, "tokens": count, "loss": loss / count,
            "perplexity": math.exp(loss / count), "mean_token_accuracy": right / count,
            "prompts": len(asked), "exact_match": exact / max(1, len(asked)),
            "ended": sum(reply.ended for reply in replies) / max(1, len(asked))}


@dataclass
class Item:
    query: str
    choices: list[str]  # one alone: the solution, whose last number counts
    gold: int  # which of them is right
    head: str = ""  # stands once above all shots; they have the same
    group: str = ""  # no shot is of the same one


def last_number(text: str) -> str:
    return (re.findall(r"-?\d[\d,]*(?:\.\d+)?", text) or [""])[-1].replace(",", "")


def item_of(record: dict) -> Item:
    """A record, laid out as lm-evaluation-harness does. The first form that fits counts."""
    head, ask = "", "Question: {}\nAnswer:".format
    try:
        match record:
            case {"query": query}:  # our own, as it stands
                choices, gold = record.get("choices", [record.get("target")]), record.get("gold", 0)
            case {"activity_label": about, "ctx_a": a, "ctx_b": b, "endings": endings, "label": gold}:
                query, *choices = (re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace(
                    "  ", " ") for text in (f"{about}: {a} {b.capitalize()}", *endings))  # HellaSwag
            case {"goal": goal, "sol1": a, "sol2": b, "label": gold}:  # PIQA
                query, choices = ask(goal), [a, b]
            case {"question": question, "choices": {"text": choices, "label": labels}, "answerKey": key}:
                query, gold = ask(question), labels.index(key)  # ARC
            case {"question": question, "subject": about, "choices": texts, "answer": gold}:  # MMLU
                choices, about = [*"ABCD"], about.replace("_", " ")
                lines = [f"{letter}. {text}" for letter, text in zip(choices, texts, strict=True)]
                query = "\n".join([question.strip(), *lines, "Answer:"])
                head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
            case {"question": question, "choices": choices, "answer": gold}:
                query, gold = ask(question), choices.index(gold) if isinstance(gold, str) else gold
            case {"question": question, "answer": solution}:  # GSM8K
                query, choices, gold = ask(question), [solution], 0
        known = len(choices) > 1 or last_number(check_text(choices[0]))
        if known and all(check_text(text).strip() for text in choices) and 0 <= int(gold) < len(choices):
            return Item(check_text(query), choices, int(gold), head, record.get("group", query))
    except (AttributeError, NameError, TypeError, ValueError):  # NameError: no form fits
        pass
    raise UserError(f"found {found_in(record)}, expected a question with choices, or with a number")


def shots_of(items: list[Item], i: int, cfg: Config) -> list[tuple[str, str]]:
    """Solved questions (query, answer) for item i. They depend on the seed and on i alone."""
    pool = [x for x in items if x.head == items[i].head and x.group != items[i].group] if cfg.shots else []
    if len(pool) < cfg.shots:
        raise UserError(f"--shots {cfg.shots}: found {len(pool)} other questions for one, expected more")
    return [(x.query, x.choices[x.gold]) for x in random.Random(f"{cfg.seed}/{i}").sample(pool, cfg.shots)]


def encode_item(model, tokenizer, item: Item, solved: list[tuple[str, str]], cfg: Config) -> list[Reply]:
    """Each choice as the reply to its context, which loses its beginning if both are too long. In a text they
    are encoded as one, the space with the choice. In a chat the end of the reply is part of it."""
    if cfg.chat:
        turns = zip(["user", "assistant"] * len(solved) + ["user"], [*chain(*solved), item.query])
        turns = [{"role": role, "content": text} for role, text in (("system", item.head), *turns) if text]
        context = encode_prompt(tokenizer, turns)
        many = [[*tokenizer.encode(choice), tokenizer.end_id] for choice in item.choices]
    else:
        text = item.head + "".join(f"{ask} {answer}\n\n" for ask, answer in solved) + item.query
        context = [tokenizer.bos_id, *tokenizer.encode(text.rstrip())]
        many = [tokenizer.encode(f"{text} {choice}")[len(context) - 1 :] for choice in item.choices]
    room = [model.config.max_seq_len - (len(ids) if len(many) > 1 else cfg.max_new_tokens) for ids in many]
    return [Reply(context[-max(1, n):], ids, said, True) for n, ids, said in zip(room, many, item.choices)]


def multiple_choice(model, tokenizer, items: list[Item], replies: list[list[Reply]], cfg: Config) -> dict:
    """{way: of each item the credit}: 1 if the right choice is the likeliest, 1/n if n are equally likely."""
    alone = [encode_item(model, tokenizer, Item("", item.choices, 0), [], cfg) for item in items]
    flat = {str((x.prompt, x.ids)): x for its in (*replies, *alone) for x in its}  # equal ones are read once
    logps = dict(zip(flat, score(model, tokenizer, [*flat.values()], cfg.batch_size)))
    given, alone = ([np.array([logps[str((x.prompt, x.ids))] for x in its]) for its in whose]
                    for whose in (replies, alone))  # of each item (choices,)
    ways = {"acc": given,  # log p(choice | context), the sum over its tokens
            "acc_norm": [x / [*map(len, item.choices)] for x, item in zip(given, items)],  # per character
            "acc_no_context": alone,  # log p(choice): what can be guessed without the question
            "acc_mutual_info": [x - y for x, y in zip(given, alone)]}
    return {way: [(x[item.gold] == x.max()) / (x == x.max()).sum() for x, item in zip(scores, items)]
            for way, scores in ways.items()}


def exact_match(model, tokenizer, items: list[Item], replies: list[list[Reply]], cfg: Config) -> dict:
    """1 if a greedy reply ends with the right number, else 0. The next question would end it in a text."""
    drawn = draw(model, tokenizer, [its[0].prompt for its in replies], range(len(items)), temperature=0,
                 max_new_tokens=cfg.max_new_tokens, batch_size=cfg.batch_size, progress=Progress("replies"))
    said = [reply.text if cfg.chat else re.split("Question:|\n\n", reply.text)[0] for reply in drawn]
    return {"exact_match": [last_number(x) == last_number(item.choices[0]) for x, item in zip(said, items)]}


def choose(model, tokenizer, items: list[Item], cfg: Config) -> dict:
    """Means of the credits with their standard errors; centred: acc on a scale where chance is 0."""
    replies = [encode_item(model, tokenizer, x, shots_of(items, i, cfg), cfg) for i, x in enumerate(items)]
    found, chances = {"items": len(items), "shots": cfg.shots}, [1 / len(item.choices) for item in items]
    found["cropped"] = sum(any(x.prompt[0] != tokenizer.bos_id for x in its) for its in replies)
    if min(chances) < max(chances) == 1:
        raise UserError(f"{cfg.choices}: found choices and numbers, expected them in two files")
    items, replies = zip(*sorted(zip(items, replies), key=lambda pair: len(pair[1][0].prompt)))  # pads little
    measure = exact_match if 1 in chances else multiple_choice
    for way, credits in measure(model, tokenizer, items, replies, cfg).items():
        error = np.std(credits, ddof=len(items) > 1) / len(items) ** 0.5
        found |= {way: float(np.mean(credits)), f"{way}_stderr": float(error)}
    if (chance := float(np.mean(chances))) < 1:
        found |= {"chance": chance, "centred": (found["acc"] - chance) / (1 - chance)}
    return found


def held_out(found: Records, split_in_two, val_fraction: float) -> list:
    """The last val_fraction of what was read; all of it if that is nothing. stdout has the figures alone."""
    print(found.report(), file=sys.stderr)
    last = split_in_two(found, val_fraction)[1] if val_fraction else found
    if not last:
        print(f"--val_fraction {val_fraction} of it is less than one: all is read", file=sys.stderr)
    return last or found


def save_figures(path, figures) -> None:
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + "\n")
    print(path)


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    require_positive(cfg, "batch_size", "max_new_tokens")
    model, tokenizer, config = load_tuned(cfg.model, cfg.delta, head="lm")
    model.to(setup(cfg.device, catch_signals=False).device)
    if cfg.chats or cfg.chat:
        expect_chat(cfg.delta or cfg.model, config)
    if cfg.choices:
        items = held_out(read(cfg.choices, cfg.strict, record_of=item_of), None, 0.0)
        found = {"choices": cfg.choices, **choose(model, tokenizer, items, cfg)}
    elif cfg.chats:
        records = held_out(read_chats(cfg.chats, cfg.strict), split, cfg.val_fraction)
        found = {"chats": cfg.chats, **answers(model, tokenizer, records, cfg)}
    else:
        documents = held_out(read_corpus(cfg.data, strict=cfg.strict), split_documents, cfg.val_fraction)
        found = {"data": cfg.data, **perplexity(model, tokenizer, documents, cfg.stride, cfg.batch_size)}
    figures = {"model": cfg.delta or cfg.model, **found}
    print(json.dumps(figures))
    if cfg.out:
        save_figures(cfg.out, figures)


if __name__ == "__main__":
    start(main)
