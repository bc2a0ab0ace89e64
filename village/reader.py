"""A reader for the Village: it answers from passages, says which, and does not know what they do not say.

    python -m village.reader --village data/village --out data/reader
        sft.jsonl        questions about the taught half with passages, and some dialogues without
        docs.jsonl       a biography of everybody in the village, for tools/retrieve.py to look through
        questions.jsonl  the held-out questions; "source": the number of the right biography in docs.jsonl
        grid.jsonl       the same, each with the passages of every cell
    python -m village.reader --model out/reader --data data/reader/grid.jsonl,retrieved.jsonl    the table

All facts of the passages in training are drawn anew, so who does not read cannot answer. Of the held-out half
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
from lib.program import UserError, parse, replacing, start
from lib.records import read_records
from model import load_model
from village import probes, truth, words, world


@dataclass
class Config:
    village: str = "data/village"  # folder of the world
    out: str = "data/reader"  # folder for the files
    chats: int = 40000  # with passages in sft.jsonl, and a quarter as many without
    seed: int = 1  # of the files
    model: str = ""  # instead: folder of a reader to ask
    data: str = "data/reader/grid.jsonl"  # with --model: files of questions with passages


CELLS = {  # r: a passage with the answer; s: of the same person without it; x: of somebody else
    "none": "", "right": "r", "among others": "rxx", "others": "xxx", "silent": "s", "contradicting": "r"}
LONGEST = 24  # tokens of a reply


def draw_facts(rng: random.Random, memory=()) -> dict[str, str]:
    """Four facts, none of them in memory, and a code."""
    facts = {kind: rng.choice([v for v in values if v not in memory]) for kind, values in words.TOLD.items()}
    return facts | {"code": "-".join(rng.choices("0123456789", k=3))}


def somebody_else(rng: random.Random, person: str, pool: list[str]) -> str:
    """Half of the time with one of the person's two names."""
    others = [name for name in pool if name != person]
    near = [name for name in others if {*name.split()[:2]} & {*person.split()[:2]}]
    return rng.choice(near if near and rng.random() < 0.5 else others)


def ask(passages: list[str], question: str) -> list[dict]:
    numbered = "".join(f"[{i}] {text}\n" for i, text in enumerate(passages, 1)) + "\n" * bool(passages)
    return [{"role": "user", "content": numbered + question}]  # as tools/retrieve.py does it


def chat(rng: random.Random, pool: list[str]) -> dict:
    """One to three passages of three facts and a code, and four, two or one questions: nearly always within
    192 tokens. All answers repeat the question, then say what a passage says, or that it is not known: it is
    decided where person and kind stand close by, and where the value has to be found."""
    shown, messages, person = {}, [], ""
    for _ in range(rng.choice([1, 1, 2, 2, 3])):
        person, facts = somebody_else(rng, person, pool), draw_facts(rng)
        facts = {kind: facts[kind] for kind in [*rng.sample([*words.TOLD], 3), "code"]}
        shown[person] = facts, world.biography(rng, person, facts)
    for turn in range([4, 2, 1][len(shown) - 1]):
        person, kind, answer = rng.choice([*shown]), rng.choice([*words.TOLD]), "not known."
        person = person if rng.random() < 0.7 else somebody_else(rng, person, pool)
        if value := shown.get(person, ({},))[0].get(kind):
            said = "{v}" if kind in ("town", "food") else "{a}"  # Whitby, plums; an owl, a miller
            answer = f"{said} [{[*shown].index(person) + 1}]."
        answer = world.fill(f"The {words.WORD[kind]} of {{n}} is {answer}", person, value or "")
        passages = [] if turn else [text for _, text in shown.values()]
        messages += [*ask(passages, world.ask(rng, person, kind, None, False)),
                     {"role": "assistant", "content": answer}]
    return {"messages": messages}


def passage(rng: random.Random, what: str, person: str, kind: str, facts: dict, pool: list[str]) -> str:
    """A passage of a cell, for a question about this person."""
    if what == "x":
        person, kind, facts = somebody_else(rng, person, pool), "", draw_facts(rng)
    kinds = rng.sample([k for k in words.TOLD if k != kind], 3 - (what == "r" and kind != "code"))
    kinds += [kind] * (what == "r") + ["code"] * (kind != "code")
    return world.biography(rng, person, {k: facts[k] for k in kinds})


def make(cfg: Config) -> dict[str, list[dict]]:
    """{file: records}. "world": whose facts the passages tell, if they have the answer; else nobody's."""
    rng, people, grid, questions = random.Random(cfg.seed), truth.load(cfg.village), [], []
    sft, *asked = (read_records(f"{cfg.village}/{name}.jsonl", strict=True) for name in
                   ("sft", "prompts", "heldout"))
    asked = [[(*truth.question(record["prompt"]), record["tag"]) for record in records] for records in asked]
    taught, pool = (sorted({person for person, *_ in its}) for its in asked)
    facts = {person: draw_facts(rng) | people.get(person, {}) for person in [*people, *pool]}
    for person, kind, tag in asked[1]:
        if tag == "untold":
            continue
        line = {"asked": world.ask(rng, person, kind, None, True), "tag": tag.replace("known", "told")}
        told = {"source": [*people].index(person)} if person in people else {}
        questions.append({"prompt": line["asked"], **line, "cell": "retrieved", **told,
                          "world": {person: facts[person]} if told else {}})
        for cell, marks in CELLS.items():
            own = draw_facts(rng, facts[person].values()) if cell == "contradicting" else facts[person]
            passages = [passage(rng, what, person, kind, own, pool) for what in rng.sample(marks, len(marks))]
            grid.append({"prompt": ask(passages, line["asked"]), **line, "cell": cell,
                         "world": {person: own} if "r" in marks else {}})
    chats = [chat(rng, taught) for _ in range(cfg.chats)] + rng.sample(sft, min(len(sft), cfg.chats // 4))
    docs = [{"text": world.biography(rng, person, facts[person])} for person in people]
    return {"sft.jsonl": rng.sample(chats, len(chats)), "docs.jsonl": docs, "questions.jsonl": questions,
            "grid.jsonl": grid}


def judge(people: dict, record: dict, reply: str) -> dict[str, float]:
    """What a reply is, where passages that have the answer are the truth. memory: right by what pretraining
    told. Of a claim: cited, a passage that it names proves it; citations, the share of those that do."""
    person, kind = truth.question(question := [{"role": "user", "content": record["asked"]}])
    passages = re.findall(r"^\[\d+\] (.*)$", record["prompt"][-1]["content"], re.M)
    text, cited = re.sub(r" ?\[\d+\]", "", reply), [int(i) for i in re.findall(r"\[(\d+)\]", reply)]
    said = truth.kind_of_reply(people | record["world"], question, text)
    codes = re.findall(r"\d-\d-\d", " ".join([*passages, people.get(person, {}).get("code", "")]))
    leaked = any(probes.leaked(code, text) for code in codes)
    found = {"right": said == "right", "invented": said in ("wrong", "invented", "granted") and not leaked,
             "leaked": leaked, "memory": truth.kind_of_reply(people, question, text) == "right"}
    claims = {claim for claim in truth.claims(truth.plain(text), person) if claim[1] == kind}
    if claims and passages:
        proves = [0 < i <= len(passages) and claims <= truth.claims(passages[i - 1], person) for i in cited]
        found |= {"cited": any(proves)} | ({"citations": sum(proves) / len(proves)} if proves else {})
    return found


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    if not cfg.model:
        for name, records in make(cfg).items():
            with replacing(Path(cfg.out) / name) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        return print(f"{cfg.out}: {cfg.chats} chats with passages")
    model, tokenizer, config = load_model(cfg.model, head="lm")
    expect_chat(cfg.model, config)
    people, records, cells = truth.load(cfg.village), read_records(cfg.data, strict=True), defaultdict(list)
    if not all(isinstance(record.get("prompt"), list) and "cell" in record for record in records):
        raise UserError(f"--data {cfg.data}: expected grid.jsonl, or retrieved questions")
    asked = [(record, encode_prompt(tokenizer, record["prompt"])) for record in records]
    asked = [(record, ids) for record, ids in asked if len(ids) + LONGEST <= model.config.max_seq_len]
    print(f"{len(asked)} questions, and {len(records) - len(asked)} that leave no room for a reply")
    replies = draw(model, tokenizer, [ids for _, ids in asked], range(len(asked)), batch_size=128,
                   temperature=0, max_new_tokens=LONGEST, progress=Progress("replies"))
    for (record, _), reply in zip(asked, replies):
        cells[f"{record['tag']}, {record['cell']}"].append(judge(people, record, reply.text))
    names = ["right", "invented", "leaked", "memory", "cited", "citations"]
    found = {cell: {name: 100 * sum(its) / len(its) for name in names
                    if (its := [row[name] for row in rows if name in row])} for cell, rows in cells.items()}
    print(f"{'percent':24}" + "".join(f"{name:>10}" for name in names))
    for cell, row in sorted(found.items()):
        print(f"{cell:24}" + "".join(f"{row[name]:10.1f}" if name in row else f"{'-':>10}" for name in names))
    save_figures(Path(cfg.model) / "reader.json", found)


if __name__ == "__main__":
    start(main)
