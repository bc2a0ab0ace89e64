"""Retrieval: passages that may hold the answer, found by their words and put in front of the question.

    python -m tools.retrieve --docs texts/ --prompts prompts.jsonl --out with-passages.jsonl

Every script that reads prompts reads the result. The last turn becomes "[1] passage, [2] passage, question".

BM25 (Robertson & Zaragoza 2009, section 3) scores a passage d by the terms t that it shares with a query:

    sum_t w_t idf(t) f / (f + k1 (1 - b + b |d| / avg)),   idf(t) = ln(1 + (N - n + 0.5) / (n + 0.5))

f: how often t stands in d; |d|: terms in d, avg their mean; n of N passages hold t. A rare term weighs more,
a second occurrence less than the first, all less in a long passage. 1 + is Lucene's: without it a term that
most passages hold would count against them. w_t: how often t stands in the last question, plus half of that
for the question before, and so on: "And her pet?" needs the name."""
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import encode_prompt
from lib.corpora import read_corpus
from lib.program import UserError, parse, replacing, require_positive, start
from lib.records import ANSWER, ASKED, CONVERSATION, MORE, SYSTEM, prompt_of, read
from model import load_model


@dataclass
class Config:
    docs: str = ""  # what to look through: text files, or records with "text"; or a folder
    prompts: str = ""  # file of prompts, as sample.py reads them
    out: str = "with-passages.jsonl"  # the same with passages
    k: int = 3  # passages for a prompt, fewer if no more share a word with it
    words: int = 100  # longest passage; a longer document becomes several
    model: str = ""  # folder of a model: as many passages as leave room in its row; empty: k
    room: int = 48  # tokens of that row for the reply
    strict: bool = False  # stop if a record cannot be used, instead of leaving it out


K1, B = 1.2, 0.75  # Lucene's
ASKS = {*CONVERSATION, *ASKED, *MORE, *SYSTEM, *ANSWER, "history", "chosen", "rejected", "responses"}


def terms(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def split(texts: list[str], longest: int) -> tuple[list[str], np.ndarray]:
    """(passages of at most `longest` words, the number of the text that each is of)."""
    cut = [(" ".join(words[at : at + longest]), number) for number, words in enumerate(map(str.split, texts))
           for at in range(0, len(words), longest)]
    return [passage for passage, _ in cut], np.array([number for _, number in cut])


def index(passages: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{term: (numbers of the passages that hold it, what it adds to the score of each)}."""
    counts, held = [Counter(terms(passage)) for passage in passages], defaultdict(list)
    lengths = np.array([count.total() for count in counts])
    norm = K1 * (1 - B + B * lengths / max(1e-9, lengths.mean()))  # (passages,)
    for number, count in enumerate(counts):
        for term, f in count.items():
            held[term].append((number, f))
    found = {}
    for term, places in held.items():
        at, f = np.array(places).T
        idf = np.log(1 + (len(passages) - len(at) + 0.5) / (len(at) + 0.5))
        found[term] = at, idf * f / (f + norm[at])
    return found


def query_of(messages: list[dict]) -> dict[str, float]:
    """{term: weight} of the user's turns."""
    weights, asked = Counter(), [message["content"] for message in messages if message["role"] == "user"]
    for back, text in enumerate(reversed(asked)):
        for term in terms(text):
            weights[term] += 0.5**back
    return weights


def rank(postings: dict, n: int, query: dict[str, float]) -> np.ndarray:
    """Numbers of those of the n passages that share a term with the query, the best first; of equally good
    ones the first."""
    scores = np.zeros(n)
    for term in sorted(query.keys() & postings.keys()):  # in one order: so rounding is the same in all runs
        at, score = postings[term]
        scores[at] += query[term] * score
    return np.argsort(-scores, kind="stable")[: np.count_nonzero(scores)]


def with_passages(messages: list[dict], passages: list[str]) -> list[dict]:
    """The conversation with numbered passages in its last turn."""
    before = "".join(f"[{i}] {passage}\n" for i, passage in enumerate(passages, 1)) + "\n" * bool(passages)
    return [*messages[:-1], {"role": "user", "content": before + messages[-1]["content"]}]


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    require_positive(cfg, "k", "words")
    if not cfg.docs or not cfg.prompts:
        raise UserError(f"--docs {cfg.docs!r} --prompts {cfg.prompts!r}: expected files for both")
    texts = read_corpus(cfg.docs, strict=cfg.strict)
    passages, sources = split(texts, cfg.words)
    records = read(cfg.prompts, cfg.strict, record_of=lambda record: (record, prompt_of(record).messages))
    print(f"{texts.report()}\n{records.report()}")
    model, tokenizer, _ = load_model(cfg.model) if cfg.model else (None, None, None)
    postings, places, lines = index(passages), [], []
    for record, messages in records:
        order = rank(postings, len(passages), query_of(messages))
        if (source := record.get("source")) is not None:  # the number of the right document is known
            places.append(1 + min(np.flatnonzero(sources[order] == source), default=np.inf))
        for k in range(min(cfg.k, len(order)), -1, -1):
            prompt = with_passages(messages, [passages[i] for i in order[:k]])
            if not model or len(encode_prompt(tokenizer, prompt)) <= model.config.max_seq_len - cfg.room:
                break
        rest = {key: value for key, value in record.items() if key not in ASKS}
        lines.append({"prompt": prompt, **rest, "sources": sources[order[:k]].tolist()})
    with replacing(Path(cfg.out)) as temporary:
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    mean = np.mean([len(line["sources"]) for line in lines])
    print(f"{cfg.out}: {len(lines)} prompts, {mean:.2f} passages each, of {len(passages)}")
    if places:
        at = np.array(places)
        print(f"{len(at)} prompts with a known source: recall@1 {(at == 1).mean():.4f}, "
              f"recall@{cfg.k} {(at <= cfg.k).mean():.4f}, MRR {(1 / at).mean():.4f}")


if __name__ == "__main__":
    start(main)
