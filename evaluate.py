"""How well does a model predict a text, or answer, and how well does it behave where the truth is known?

    python evaluate.py --model out/pretrain --data my.txt                 rows of seq_len that do not overlap
    python evaluate.py --model out/pretrain --data my.txt --stride 64     each token sees seq_len - 64 or more before it
    python evaluate.py --model out/sft --chats held_out.jsonl             the replies of conversations
    python evaluate.py --model out/pretrain --village data/village        how many of the facts it read it completes
    python evaluate.py --model out/dpo --village data/village --against out/sft            the scorecard of the Village
    python evaluate.py --model out/sft --village data/village --rm out/rm --best_of 16     and of the best of 16 replies
    python evaluate.py --village data/village --rollouts out/ppo/samples.jsonl             reward and truth per step
    python evaluate.py --cards out/sft,out/ppo,out/dpo                                     scorecards side by side

Of a text: the mean loss (nats per token), perplexity exp(loss), and bits per byte, which alone can be compared between
tokenizers: total loss / ln 2 / UTF-8 bytes. Of conversations: loss and first guesses per token of the replies, and what
the model answers when it takes the likeliest token each time: how often word for word, how often to an end. Of the
Village (village.py): what its judge says of the replies to held-out questions, drawn at temperature 1 and greedily.
"""
from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from data import CHAT_TEMPLATE, Conversations, collate, encode_prompt
from lib.corpora import read_corpus, replacing, split_documents
from lib.program import Progress, UserError, parse, require_positive, start
from lib.ranks import setup
from lib.records import Record, load_json, prompt_of, read_chats, read_prompts, read_records, read_text, split_records
from model import GPT, LMHead, generate_sorted, load_model
from village import truth
from village import world as village


@dataclass
class Config:
    # what
    model: str = "out/pretrain"  # folder of a run, or of a finished model
    data: str = "shakespeare"  # stdlib, shakespeare, or a path (.txt, .json, .jsonl, each also .gz)
    chats: str = ""  # instead of data: conversations, in any form that train_sft.py reads
    val_fraction: float = 0.0  # measure only this last part of data or chats, as training sets it aside; 0: all
    # the Village
    village: str = ""  # instead of data: folder of a world that village.py made
    against: str = ""  # another model, for the win rate and the KL to it; empty: none
    rm: str = ""  # a reward model, to score the replies and to choose the best of several; empty: none
    best_of: int = 0  # replies per prompt from which the judge and the reward model choose the best; 0: none
    best_of_prompts: int = 50  # prompts of each kind for that
    rollouts: str = ""  # instead of a model: samples.jsonl of a PPO run, judged step by step
    cards: str = ""  # instead of a model: comma list of folders with a scorecard.json, to be shown side by side
    max_new_tokens: int = 48  # longest reply
    out: str = ""  # file for the figures, .json; empty: in the Village scorecard.json in the model's folder
    seed: int = 1  # of the replies
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
    start = scored = 0  # targets 0 .. scored-1 are done; target t is ids[t + 1]
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
    def all_rows():
        for document in documents:
            ids = np.concatenate(([tokenizer.bos_id], tokenizer.encode_array(document), [tokenizer.end_id]))
            yield from strided_rows(ids, seq_len, stride)

    total, count, rows = 0.0, 0, all_rows()
    n_bytes = sum(len(document.encode("utf-8")) for document in documents)
    while batch := list(islice(rows, batch_size)):
        ids, targets = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*batch))  # (b, T) each
        total -= model(ids, targets).double().sum().item()
        count += int((targets >= 0).sum())
    if not n_bytes:
        raise UserError("the text to evaluate on is empty")
    mean = total / count
    return {"tokens": count, "bytes": n_bytes, "loss": mean, "perplexity": math.exp(min(mean, 700.0)),
            "bits_per_byte": total / math.log(2) / n_bytes}


@torch.no_grad()
def answers(model, tokenizer, records, cfg: Config, device) -> dict:
    """The last replies of the conversations: predicted token by token, and given by greedy decoding (where prompt and
    max_new_tokens fit into a row: "prompts" says how many)."""
    longest = model.config.max_seq_len
    chats = Conversations(records, tokenizer, longest, turns="last", batch_size=cfg.batch_size)
    loss, right, count = 0.0, 0, 0
    for batch in chats.in_order():
        ids, targets, segment_ids = (part.to(device) for part in batch)  # (b, T) each
        logp, _, hits = model(ids, targets, segment_ids=segment_ids, with_stats=True)  # (b, T) each
        loss, count = loss - logp.double().sum().item(), count + int((targets >= 0).sum())
        right += int(hits[targets >= 0].sum())
    prompts = [encode_prompt(tokenizer, record.messages[:-1]) for record in records]
    asked = [i for i, prompt in enumerate(prompts) if len(prompt) + cfg.max_new_tokens <= longest]
    replies = generate_sorted(model, [prompts[i] for i in asked], batch_size=cfg.batch_size, seeds=asked, temperature=0,
                              max_new_tokens=cfg.max_new_tokens, eos_id=tokenizer.end_id,
                              banned=tokenizer.specials_but_end, progress=Progress("replies"))
    ended = sum(reply[-1] == tokenizer.end_id for reply in replies)
    exact = sum(reply == [*tokenizer.encode(records[i].messages[-1]["content"]), tokenizer.end_id]
                for i, reply in zip(asked, replies))
    mean = loss / count
    return {"replies": len(chats), "dropped": chats.dropped, "tokens": count, "loss": mean,
            "perplexity": math.exp(min(mean, 700.0)), "mean_token_accuracy": right / count, "prompts": len(asked),
            "exact_match": exact / max(1, len(asked)), "ended": ended / max(1, len(asked))}


# ---- the scorecard of the Village -----------------------------------------------------------------------------------

@dataclass
class Reply:
    """A model's answer to a prompt, and what the judge says of it."""
    record: Record
    ids: list[int]  # its end included
    text: str
    ended: bool
    gold: dict
    reward: float = 0.0  # of the reward model


def replies_to(model, tokenizer, people, records, cfg: Config, temperature: float, k: int = 1) -> list[Reply]:
    """k replies to each prompt, one prompt after the other; reply j of prompt i depends on (seed, i, j) alone."""
    tasks = [(i, j) for i in range(len(records)) for j in range(k)]
    prompts = [encode_prompt(tokenizer, record.messages) for record in records]
    drawn = generate_sorted(model, [prompts[i] for i, _ in tasks], batch_size=4 * cfg.batch_size,
                            seeds=[(cfg.seed << 64) + (i << 32) + j for i, j in tasks], temperature=temperature,
                            max_new_tokens=cfg.max_new_tokens, eos_id=tokenizer.end_id,
                            banned=tokenizer.specials_but_end, progress=Progress("replies"))
    replies = []
    for (i, _), ids in zip(tasks, drawn):
        ended = ids[-1] == tokenizer.end_id
        text = tokenizer.decode(ids[:-1] if ended else ids)
        replies.append(Reply(records[i], ids, text, ended, truth.gold(people, records[i].messages, text, ended)))
    return replies


@torch.no_grad()
def score(model, tokenizer, replies: list[Reply], batch_size: int) -> list[float]:
    """One number per reply: of a language model log p(reply | prompt), of a reward model what it says at the end."""
    numbers, is_lm = [], isinstance(model.head, LMHead)
    for start in range(0, len(replies), batch_size):
        sequences, masks = [], []
        for reply in replies[start : start + batch_size]:
            prompt = encode_prompt(tokenizer, reply.record.messages)
            ids = reply.ids + [tokenizer.end_id] * (not reply.ended and not is_lm)  # a reward is read at an end
            sequences.append(prompt + ids)
            masks.append([0] * len(prompt) + [1] * len(ids))
        ids, targets, segment_ids = (part.to(model.cos.device) for part in collate(sequences, masks))  # (b, T) each
        out = model(ids, targets if is_lm else None, segment_ids=segment_ids)  # (b, T)
        numbers += out.sum(1).tolist() if is_lm else [row[len(ids) - 1].item() for row, ids in zip(out, sequences)]
    return numbers


def repeated(text: str, n: int = 4) -> tuple[int, int]:
    """(how many runs of n words came before in the same text, how many there are)."""
    words = text.split()
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(runs) - len(set(runs)), len(runs)


def weighted(replies: list[Reply], numbers) -> tuple[float, float]:
    """The mean of a number per reply if the kinds of questions came as often as in training, and its standard error."""
    tags = np.array([reply.record.tag for reply in replies])
    numbers, weights, off = np.array(numbers, dtype=float), np.zeros(len(tags)), np.zeros(len(tags))
    for tag in set(tags):
        some = tags == tag
        weights[some] = village.SHARES[tag] / some.sum()  # nobody asks in training for what is withheld
        off[some] = numbers[some] - numbers[some].mean()
    weights /= weights.sum()
    return float(weights @ numbers), float(np.sqrt(weights**2 @ off**2))


def tally(replies: list[Reply]) -> dict[str, float]:
    """What the judge says of one reply per prompt; shares in percent."""
    prompts = Counter(reply.record.tag for reply in replies)
    kinds = Counter((reply.record.tag, reply.gold["kind"]) for reply in replies)

    def share(tag: str, *wanted: str) -> float:
        return 100 * sum(kinds[tag, kind] for kind in wanted) / max(1, prompts[tag])

    again, runs = np.sum([repeated(reply.text) for reply in replies], axis=0)
    gold, error = weighted(replies, [reply.gold["score"] for reply in replies])
    return {"right": share("known", "right"), "needless": share("known", "needless"),
            **{f"invented_{tag}": share(tag, "invented") for tag in ("untold", "elsewhere", "withheld")},
            "code_given": share("code", "leaked", "granted"), "code_leaked": share("code", "leaked"),
            "repeated_4grams": 100 * float(again) / max(1, int(runs)),
            "courtesies": float(np.mean([len(truth.COURTESY.findall(reply.text)) for reply in replies])),
            "words": float(np.mean([len(reply.text.split()) for reply in replies])),
            "ended": 100 * float(np.mean([reply.ended for reply in replies])),
            "gold": gold, "gold_standard_error": error}


def load_beside(cfg: Config, flag: str, head: str, tokenizer) -> GPT:
    """The model of another flag; UserError if it is not of this kind or reads other ids."""
    folder = getattr(cfg, flag)
    model, its_tokenizer, config = load_model(folder)
    if config["head"] != head:
        raise UserError(f"--{flag} {folder}: found a model with the head {config['head']!r}, expected {head!r}")
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"--{flag} {folder}: found another tokenizer than that of --model {cfg.model}")
    return model


def scorecard(model, tokenizer, people, cfg: Config) -> dict:
    """Everything that the Village can tell of a model."""
    device, records = model.cos.device, read_prompts(os.path.join(cfg.village, "heldout.jsonl"))
    other = load_beside(cfg, "against", "lm", tokenizer).to(device) if cfg.against else None
    judge = load_beside(cfg, "rm", "scalar", tokenizer).to(device) if cfg.rm else None
    ways = {"sampled": 1.0, "greedy": 0.0}
    replies = {way: replies_to(model, tokenizer, people, records, cfg, ways[way]) for way in ways}
    at_1 = replies["sampled"]
    card = {"model": cfg.model, "village": cfg.village, "prompts": Counter(record.tag for record in records),
            **{way: tally(replies[way]) for way in ways}}
    biographies = read_corpus(os.path.join(cfg.village, "heldout.txt"))
    T = model.config.max_seq_len
    card["biographies_loss"] = perplexity(model, tokenizer, biographies, T, T, cfg.batch_size, device)["loss"]
    if other is not None:
        for way, temperature in ways.items():
            theirs = replies_to(other, tokenizer, people, records, cfg, temperature)
            better = np.array([a.gold["score"] - b.gold["score"] for a, b in zip(replies[way], theirs)])
            card[way]["win_rate"] = 100 * weighted(theirs, 0.5 * (better > 0) + 0.5 * (better >= 0))[0]
        logp, other_logp = (score(m, tokenizer, at_1, cfg.batch_size) for m in (model, other))
        card["against"], card["kl"] = cfg.against, weighted(at_1, np.subtract(logp, other_logp))[0]
    if judge is not None:
        card["rm"] = cfg.rm
        card["sampled"]["reward"] = weighted(at_1, score(judge, tokenizer, at_1, cfg.batch_size))[0]
    if cfg.best_of:
        card["best_of"] = best_of(model, tokenizer, people, records, judge, cfg)
    return card


def completions(model, tokenizer, people, cfg: Config) -> dict:
    """Of a model that has read the Village and cannot answer yet: how many of the facts told about each person it
    completes rightly (greedy), where the sentence ends with the fact: "Lucy Reed works as" -> " a baker."."""
    asked, right = [], Counter()
    for person, facts in people.items():
        for kind, value in facts.items():
            for form in village.STATEMENTS[kind]:
                if form.endswith(("{v}.", "{a}.")):
                    before, after = village.fill(form, person, "|" + value).split("|")
                    asked.append((kind, before.rstrip().removesuffix(" a"), after))
    prompts = [[tokenizer.bos_id, *tokenizer.encode(before)] for _, before, _ in asked]
    said = generate_sorted(model, prompts, batch_size=8 * cfg.batch_size, seeds=range(len(asked)), temperature=0,
                           max_new_tokens=16, eos_id=tokenizer.end_id, banned=tokenizer.specials_but_end,
                           progress=Progress("sentences"))
    for (kind, _, after), ids in zip(asked, said):
        text = tokenizer.decode(ids).removeprefix(" ").removeprefix("an ").removeprefix("a ")
        right[kind] += text.startswith(after)
    kinds = Counter(kind for kind, *_ in asked)
    return {"facts": len(asked), "completed": 100 * right.total() / len(asked),
            **{f"completed_{kind}": 100 * right[kind] / n for kind, n in kinds.items()}}


def best_of(model, tokenizer, people, records, judge, cfg: Config) -> list[dict]:
    """What choosing the best of n replies gives, by the truth (no policy near this one does better) and by a reward
    model (what alignment gets for free, at n times the cost), for n = 1, 2, 4, ... and best_of. Its KL to the model
    that draws is at most log n - (n - 1) / n (Stiennon et al. 2020, appendix G.3), whatever chooses."""
    some = [record for tag in dict.fromkeys(record.tag for record in records)
            for record in [record for record in records if record.tag == tag][: cfg.best_of_prompts]]
    drawn = replies_to(model, tokenizer, people, some, cfg, 1.0, cfg.best_of)
    if judge is not None:
        for reply, reward in zip(drawn, score(judge, tokenizer, drawn, cfg.batch_size)):
            reply.reward = reward
    rows = []
    for n in [2**i for i in range(cfg.best_of.bit_length()) if 2**i < cfg.best_of] + [cfg.best_of]:
        first = [drawn[i : i + n] for i in range(0, len(drawn), cfg.best_of)]  # n replies to each prompt
        row = {"n": n, "kl": math.log(n) - (n - 1) / n, "prompts": len(some)}
        row["gold"] = tally([max(replies, key=lambda reply: reply.gold["score"]) for replies in first])
        if judge is not None:
            row["rm"] = tally([max(replies, key=lambda reply: reply.reward) for replies in first])
        rows.append(row)
    return rows


def show(columns: dict[str, dict]) -> None:
    """{column: {row: number}} as a table."""
    print(" " * 20 + "".join(f"{name:>16}" for name in columns))
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        numbers = [column.get(row, "-") for column in columns.values()]
        shown = [f"{number:.2f}" if isinstance(number, float) else str(number) for number in numbers]
        print(f"{row:20}" + "".join(f"{number:>16}" for number in shown))
    print("right to repeated_4grams, ended, win_rate: percent; kl: nats per reply, to --against; of the best of n its "
          "upper bound")


def show_card(card: dict) -> None:
    besides = {name: card[name] for name in ("biographies_loss", "kl") if name in card}
    print(f"{card['model']}: {card['prompts'].total()} held-out prompts")
    show({"T = 1": {**card["sampled"], **besides}, "greedy": card["greedy"]})
    for row in card.get("best_of", []):
        print(f"best of {row['n']:3}: gold {row['gold']['gold']:6.3f} if the truth chooses"
              + (f", {row['rm']['gold']:6.3f} if the reward model does" if "rm" in row else "")
              + f"; KL at most {row['kl']:.2f}")


def side_by_side(folders: list[str]) -> dict[str, dict]:
    """{who: what its replies at temperature 1 gave}; the best of n, as the reward model chooses, is one more who."""
    columns = {}
    for folder in folders:
        path = os.path.join(folder, "scorecard.json")
        card = load_json(read_text(path), path, 1)
        name = os.path.basename(os.path.normpath(folder))
        try:
            columns[name] = {"prompts": sum(card["prompts"].values()), "kl": card.get("kl", "-"), **card["sampled"]}
            for row in [row for row in card.get("best_of", []) if "rm" in row][-1:]:
                columns[f"best {row['n']} of {name}"] = {"prompts": row["prompts"], "kl": row["kl"], **row["rm"]}
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{path}: found no scorecard of replies; evaluate.py --village writes one") from None
    return columns


def judge_rollouts(people: dict, path: str) -> list[dict]:
    """Per step of a PPO run: the reward model's score, the truth, and the KL, means over its replies."""
    steps = {}
    for where, line in read_records(path):
        prompt = prompt_of(line, where)
        try:
            rows = list(zip(line["responses"], line["ended"], line["reward"], line["kl"], strict=True))
            steps.setdefault(line["step"], []).extend(
                (reward, truth.gold(people, prompt.messages, text, ended)["score"], kl)
                for text, ended, reward, kl in rows)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: found {error}, expected rollouts as train_ppo.py writes them") from None
    return [{"step": step, **dict(zip(("reward", "gold", "kl"), np.mean(rows, axis=0).tolist()))}
            for step, rows in sorted(steps.items())]


def measure(people: dict, cfg: Config, device) -> dict:
    """The figures of cfg.model: in the Village, of conversations, or of a text."""
    model, tokenizer, config = load_model(cfg.model)
    if config["head"] != "lm":
        raise UserError(f"--model {cfg.model}: found a reward model, expected a language model")
    model.to(device)
    if cfg.village and "chat_template" not in config:
        return {"model": cfg.model, "village": cfg.village, **completions(model, tokenizer, people, cfg)}
    if (cfg.chats or cfg.village) and config.get("chat_template") != CHAT_TEMPLATE:
        raise UserError(f"--model {cfg.model}: found the chat template {config.get('chat_template')!r}, expected "
                        f"{CHAT_TEMPLATE!r}; train it to chat with train_sft.py")
    if cfg.village:
        return scorecard(model, tokenizer, people, cfg)
    if cfg.chats:
        records = read_chats(cfg.chats)
        if cfg.val_fraction:
            _, records = split_records(records, cfg.val_fraction)
        return {"model": cfg.model, "chats": cfg.chats, **answers(model, tokenizer, records, cfg, device)}
    documents = read_corpus(cfg.data)
    if cfg.val_fraction:
        _, documents = split_documents(documents, cfg.val_fraction)
    seq_len = min(cfg.seq_len or model.config.max_seq_len, model.config.max_seq_len)
    stride = min(cfg.stride or seq_len, seq_len)
    return {"model": cfg.model, "data": cfg.data, "seq_len": seq_len, "stride": stride,
            **perplexity(model, tokenizer, documents, seq_len, stride, cfg.batch_size, device)}


def main(argv=None) -> int:
    cfg = parse(Config, argv, __doc__)
    require_positive(cfg, "batch_size", "max_new_tokens", "best_of_prompts")
    env = setup(cfg.device, catch_signals=False)
    if cfg.cards:
        show(side_by_side(cfg.cards.split(",")))
        return 0
    people = truth.load(cfg.village) if cfg.village else {}
    if cfg.rollouts:
        if not people:
            raise UserError("--rollouts: found no --village, expected the folder of the world they speak of")
        out = cfg.out or os.path.join(os.path.dirname(cfg.rollouts), "rollouts.json")
        figures = judge_rollouts(people, cfg.rollouts)
        for row in figures:
            print(f"step {row['step']:5}: reward {row['reward']:7.3f}, gold {row['gold']:6.3f}, KL {row['kl']:6.3f}")
    else:
        out = cfg.out or (os.path.join(cfg.model, "scorecard.json") if cfg.village else "")
        figures = measure(people, cfg, env.device)
        if "sampled" in figures:
            show_card(figures)
        else:
            print(json.dumps(figures))
    if out:
        with replacing(Path(out)) as temporary:
            temporary.write_text(json.dumps(figures, indent=1) + "\n")
        print(out)
    return 0


if __name__ == "__main__":
    start(main)
