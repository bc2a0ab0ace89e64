"""Chains: a small world of serial computation, where thinking aloud can be seen to help.

A question is a digit and k operations modulo 10, from left to right: "3 +4 *9 -5". It is answered

    with steps    3 +4 =7 *9 =3 -5 =8 so 8     each operation said again, and the value after it
    alone         so 8

Alone, all k operations have to happen in one pass through the layers. With steps a pass is one operation.

    python -m village.chains --out data/chains
        newborn.txt                   all characters, to make a model that knows nothing
        steps.jsonl, answers.jsonl    questions of 1 to 6 operations, answered in two ways
        prompts.jsonl                 more, unanswered, for train_grpo.py --reward village.chains:right
        heldout.jsonl                 questions of 1 to 10 operations that no other file has
        choices.jsonl, numbers.jsonl  the same for evaluate.py --choices FILE --chat
    python -m village.chains --model out/steps
        what it answers, by the number of operations, see scorecard()
"""
import json
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import encode_prompt, expect_chat
from evaluate import Progress, draw, save_figures
from lib.program import parse, replacing, start
from lib.records import read_prompts
from model import load_model

TRAINED, LONGEST = 6, 10  # operations in a question, in training and held out
CHATS, PROMPTS, HELDOUT = 60000, 4000, 100  # held out: of each length
CARD = 14  # what random numbers are for, as in sample.py


@dataclass
class Config:
    out: str = "data/chains"  # folder for a new world
    seed: int = 1  # of the world, or of the replies
    model: str = ""  # instead: folder of a model to ask the held-out questions
    data: str = "data/chains"  # with --model: the folder of the world
    k: int = 8  # with --model: replies drawn to each question


def values(question: str) -> list[int]:
    """The value after each operation: "3 +4 *9" -> [7, 3]."""
    first, *operations = question.split()
    value, found = int(first), []
    for operator, digit in operations:
        a, b = value, int(digit)
        value = {"+": a + b, "-": a - b, "*": a * b}[operator] % 10
        found.append(value)
    return found


def answer(question: str) -> str:
    return f"so {values(question)[-1]}"


def steps(question: str) -> str:
    said = (f"{operation} ={value}" for operation, value in zip(question.split()[1:], values(question)))
    return " ".join([question[0], *said, answer(question)])


def right(messages, reply: str, ended: bool, data=None) -> float:
    """1 if the reply ends with the answer, else 0. What stands before the answer is not looked at."""
    return float(ended and f" {reply}".endswith(f" {answer(messages[-1]['content'])}"))


def make(seed: int) -> dict[str, str]:
    """{file name: text} of a world; the same for the same seed."""
    rng, digits = random.Random(seed), "0123456789"

    def ask(k: int) -> str:
        return " ".join([rng.choice(digits), *(rng.choice("+-*") + rng.choice(digits) for _ in range(k))])

    heldout = {ask(k): k for k in range(1, LONGEST + 1) for _ in range(HELDOUT)}
    asked = [question for question in (ask(rng.randint(1, TRAINED)) for _ in range(2 * (CHATS + PROMPTS)))
             if question not in heldout][:CHATS + PROMPTS]
    files = {name: [{"prompt": question, "completion": said(question)} for question in asked[:CHATS]]
             for name, said in (("steps.jsonl", steps), ("answers.jsonl", answer))}
    files["prompts.jsonl"] = [{"prompt": question} for question in asked[CHATS:]]
    files["heldout.jsonl"] = [{"prompt": question, "tag": str(k)} for question, k in heldout.items()]
    files["choices.jsonl"] = [{"query": question, "choices": [f"so {digit}" for digit in digits],
                               "gold": values(question)[-1]} for question in heldout]
    files["numbers.jsonl"] = [{"query": question, "target": answer(question)} for question in heldout]
    text = "".join(f"{question}\n{steps(question)}\n" for question in asked[:1000])
    return {"newborn.txt": text} | {name: "".join(json.dumps(line) + "\n" for line in lines)
                                    for name, lines in files.items()}


def wrong_start(question: str) -> tuple[str, str]:
    """The beginning of a reply whose first value is one too high, and the question that it then answers."""
    first, operation, *rest = question.split()
    value = (values(question)[0] + 1) % 10
    return f"{first} {operation} ={value}", " ".join([f"{value} +0", *rest])


def scorecard(model, tokenizer, records, cfg: Config) -> dict[str, dict]:
    """{operations: shares in percent of the questions}:

    greedy      the likeliest reply is right
    pass@1      of k replies drawn at temperature 1 one is right, on average;  pass@k: any is
    majority    what most of them answer is right
    follows     after a wrong first value, greedy, of those that it leads elsewhere: that is answered
    unmoved     ... the right answer is given all the same
    tokens      of a greedy reply, its end included; no share
    """
    prompts = [encode_prompt(tokenizer, record.messages) for record in records]
    questions = [record.messages[-1]["content"] for record in records]
    starts, others = zip(*map(wrong_start, questions))

    def replies(prompts, use: int, temperature: float = 0.0, k: int = 1):
        seeds = [(cfg.seed, CARD, use, i, j) for i in range(len(prompts)) for j in range(k)]
        return draw(model, tokenizer, [ids for ids in prompts for _ in range(k)], seeds, batch_size=256,
                    temperature=temperature, max_new_tokens=80, progress=Progress("replies"))

    greedy, drawn = replies(prompts, 0), replies(prompts, 1, 1.0, cfg.k)
    forced = replies([ids + tokenizer.encode(text) for ids, text in zip(prompts, starts)], 2)

    def last(reply) -> str:  # the answer, if it is one
        return reply.text[-4:] if reply.ended else ""

    rows = defaultdict(list)
    for i, (question, record) in enumerate(zip(questions, records)):
        said, told = [last(reply) for reply in drawn[i * cfg.k:(i + 1) * cfg.k]], last(forced[i])
        goal, other = answer(question), answer(others[i])
        rows[record.tag].append({
            "greedy": last(greedy[i]) == goal, "pass@1": said.count(goal) / cfg.k,
            f"pass@{cfg.k}": goal in said, "majority": Counter(said).most_common(1)[0][0] == goal,
            "follows": told == other if other != goal else np.nan,
            "unmoved": told == goal if other != goal else np.nan, "tokens": len(greedy[i].ids) / 100})
    return {tag: {name: 100 * float(np.nanmean([row[name] for row in some])) for name in some[0]}
            for tag, some in rows.items()}


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    if cfg.model:
        model, tokenizer, config = load_model(cfg.model, head="lm")
        expect_chat(cfg.model, config)
        found = scorecard(model, tokenizer, read_prompts(f"{cfg.data}/heldout.jsonl"), cfg)
        print(f"{'operations':>10}" + "".join(f"{name:>10}" for name in found["1"]))
        for tag, row in found.items():
            print(f"{tag:>10}" + "".join(f"{x:10.1f}" for x in row.values()))
        return save_figures(Path(cfg.model) / "chains.json", found)
    files = make(cfg.seed)
    for name, text in files.items():
        with replacing(Path(cfg.out) / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"{cfg.out}: " + ", ".join(f"{name} {len(text) / 1000:.0f} kB" for name, text in files.items()))


if __name__ == "__main__":
    start(main)
