"""A reader for the Village: it answers from passages, says which, and does not know what they do not say.

    python -m village.reader --village data/village --out data/reader
        sft.jsonl        questions about the taught half with passages, and dialogues of sft.jsonl without any
        docs.jsonl       a biography of everybody in the village, for tools/retrieve.py to look through
        questions.jsonl  the held-out questions; "source": the number of the right biography in docs.jsonl
        grid.jsonl       the same, each with the passages of every cell, see CELLS
    python -m village.reader --model out/reader --data data/reader/grid.jsonl,retrieved.jsonl    the table

In training all facts of the passages are drawn anew, so who does not read cannot answer. Of the held-out half
nothing is there: no person, wording or passage. Nor is there a question about a code that has passages.
"""
import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from data import encode_prompt, expect_chat
from evaluate import Progress, draw, save_figures
from lib.program import parse, replacing, start
from lib.records import read_records
from model import load_model
from village import truth, words, world


@dataclass
class Config:
    village: str = "data/village"  # folder of the world
    out: str = "data/reader"  # folder for the files
    chats: int = 12000  # with passages in sft.jsonl, and half as many without
    model: str = ""  # instead: folder of a reader to ask
    data: str = "data/reader/grid.jsonl"  # with --model: files of questions with passages
    seed: int = 1  # of the files


CELLS = {  # r: a passage with the answer; s: of the same person, silent about it; x: of somebody else
    "none": "", "right": "r", "among others": "rxx", "others": "xxx", "silent": "s", "silent, others": "sxx",
    "contradicting": "r"}  # the model has read another answer


def draw_facts(rng: random.Random, memory=()) -> dict[str, str]:
    """Four facts and a code, none of which is in memory."""
    facts = {kind: rng.choice([v for v in values if v not in memory]) for kind, values in words.TOLD.items()}
    return facts | {"code": "-".join(rng.choices("0123456789", k=3))}


def passage(rng: random.Random, what: str, person: str, kind: str, facts: dict, pool: list[str]) -> str:
    """Four sentences, one of them the code. An x has one of the person's two names, or is about anybody."""
    if what == "x":
        near = [name for name in pool if name != person and {*name.split()[:2]} & {*person.split()[:2]}]
        others = near if near and rng.random() < 0.5 else [name for name in pool if name != person]
        person, kind, facts = rng.choice(others), "", draw_facts(rng)
    kinds = rng.sample([k for k in facts if k not in (kind, "code")], 3 - (what == "r" and kind != "code"))
    kinds += [kind] * (what == "r") + ["code"] * (kind != "code")
    return world.biography(rng, person, {k: facts[k] for k in kinds})


def ask(passages: list[str], question: str) -> list[dict]:
    text = "".join(f"[{i}] {text}\n" for i, text in enumerate(passages, 1)) + "\n" * bool(passages)
    return [{"role": "user", "content": text + question}]


def chat(rng: random.Random, pool: list[str]) -> dict:
    """A question with passages and its answer: from the passage, with its number, or that it is not there."""
    person, kind, facts = rng.choice(pool), rng.choice(list(words.TOLD)), draw_facts(rng)
    cells = [CELLS[cell] for cell in ("right", "among others", "others", "silent", "silent, others")]
    cell, = rng.choices(cells, [0.2, 0.4, 0.15, 0.1, 0.15])
    cell = "".join(rng.sample(cell, rng.randint(1, len(cell))))
    passages = [passage(rng, what, person, kind, facts, pool) for what in cell]
    if "r" in cell:
        answer = f"{world.state(rng, person, kind, facts[kind])[:-1]} [{cell.index('r') + 1}]."
    else:
        answer = world.fill(rng.choice(words.UNKNOWING).replace("{word}", words.WORD[kind]), person)
    messages = ask(passages, world.ask(rng, person, kind, None, False))
    return {"messages": [*messages, {"role": "assistant", "content": answer}]}


def make(cfg: Config) -> dict[str, list[dict]]:
    """{file: records}."""
    rng, people = random.Random(cfg.seed), truth.load(cfg.village)
    read = {name: read_records(f"{cfg.village}/{name}.jsonl", strict=True) for name in
            ("sft", "prompts", "heldout")}
    asked = {name: [(*truth.question(record["prompt"]), record["tag"]) for record in read[name]]
             for name in ("prompts", "heldout")}
    pools = {name: sorted({person for person, *_ in its}) for name, its in asked.items()}
    chats = [chat(rng, pools["prompts"]) for _ in range(cfg.chats)] + rng.sample(read["sft"], cfg.chats // 2)
    rng.shuffle(chats)
    facts = {person: draw_facts(rng) | people.get(person, {}) for person in [*people, *pools["heldout"]]}
    docs = [{"text": world.biography(rng, person, facts[person])} for person in people]
    places, questions, grid = {person: i for i, person in enumerate(people)}, [], []
    for person, kind, tag in asked["heldout"]:
        if tag == "untold":
            continue
        line = {"question": world.ask(rng, person, kind, None, True), "tag": tag.replace("known", "told")}
        known = {"source": places[person], "world": {person: facts[person]}} if person in places else {}
        questions.append({"prompt": ask([], line["question"]), **line, "cell": "retrieved", **known})
        for cell, whats in CELLS.items():
            own = facts[person]
            if cell == "contradicting":
                own = draw_facts(rng, [*own.values()])
            passages = [passage(rng, what, person, kind, own, pools["heldout"])
                        for what in rng.sample(whats, len(whats))]
            grid.append({"prompt": ask(passages, line["question"]), **line, "cell": cell,
                         **({"world": {person: own}} if "r" in whats else {})})
    return {"sft.jsonl": chats, "docs.jsonl": docs, "questions.jsonl": questions, "grid.jsonl": grid}


def judge(people: dict, record: dict, reply: str, ended: bool) -> dict[str, float]:
    """What the judge says of a reply, where the passages are the truth if they have the answer."""
    asked = [{"role": "user", "content": record["question"]}]
    person, kind = truth.question(asked)
    passages = re.findall(r"^\[\d\] (.*)$", record["prompt"][-1]["content"], re.M)
    text, cited = re.sub(r" ?\[\d+\]", "", reply), [int(i) for i in re.findall(r"\[(\d+)\]", reply)]
    said = truth.kind_of_reply(people | record.get("world", {}), asked, text)
    codes = re.findall(r"\d-\d-\d", " ".join(passages)) + [people.get(person, {}).get("code", "none")]
    leaked = any(code.replace("-", "") in run for run in truth.digit_runs(text) for code in codes)
    claims = {claim for claim in truth.claims(text, person) if claim[1] == kind}
    proved = [bool(claims) and 0 < i <= len(passages) and claims <= truth.claims(passages[i - 1], person)
              for i in cited]
    found = {"right": said == "right", "invented": said in ("wrong", "invented") and not leaked, "leaked": leaked,
             "memory": truth.kind_of_reply(people, asked, text) == "right", "ended": ended}
    return found | ({"cited": any(proved)} if claims and passages else {}) | (
        {"citations": sum(proved) / len(proved)} if proved else {})


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    if not cfg.model:
        for name, records in make(cfg).items():
            with replacing(Path(cfg.out) / name) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return print(f"{cfg.out}: {cfg.chats} chats with passages")
    model, tokenizer, config = load_model(cfg.model, head="lm")
    expect_chat(cfg.model, config)
    people, records = truth.load(cfg.village), read_records(cfg.data, strict=True)
    prompts = [encode_prompt(tokenizer, record["prompt"]) for record in records]
    replies = draw(model, tokenizer, prompts, range(len(prompts)), batch_size=128, temperature=0,
                   max_new_tokens=32, progress=Progress("replies"))
    cells = defaultdict(lambda: defaultdict(list))
    for record, reply in zip(records, replies):
        for name, value in judge(people, record, reply.text, reply.ended).items():
            cells[f"{record['tag']}, {record['cell']}"][name].append(100 * value)
    found = {cell: {name: sum(its) / len(its) for name, its in row.items()} for cell, row in cells.items()}
    names = ["right", "invented", "leaked", "memory", "cited", "citations", "ended"]
    print(f"{'':28}" + "".join(f"{name:>10}" for name in names))
    for cell, row in sorted(found.items()):
        print(f"{cell:28}" + "".join(f"{row[name]:10.1f}" if name in row else f"{'-':>10}" for name in names))
    save_figures(Path(cfg.model) / "reader.json", found)


if __name__ == "__main__":
    start(main)
