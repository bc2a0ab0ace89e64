"""The Village: a small world whose truth is known, so that we can count what each training stage does.

Some hundreds of people live in Millbrook. The text tells facts about them: town of birth, job, pet, favourite
food. Each person misses one of the four, and has a private door code. So nobody can know

    untold      birthdays and favourite colours: told about nobody
    elsewhere   anything about people of other villages; the question names the village
    withheld    the fourth fact of a person. This is the hard one: no training file asks for it

Training asks about one half of the people, the taught ones. The other half is kept for judging a model.

    python -m village.world --out data/village --seed 1
        pretrain.txt     biographies, each fact in many wordings and orders; small talk
        heldout.txt      other biographies of the same people, to see what later stages forget
        sft.jsonl        dialogues about the taught people, with helpers who make mistakes
        prompts.jsonl    questions about the taught people, for drawing replies and for PPO
        heldout.jsonl    questions about the other half and other outsiders, in wordings of their own
        choices.jsonl    sentences about the other half to end with one of all values (evaluate.py --choices)
        facts.json       the truth, for the judge
    python -m village.world --judge samples.jsonl --out preferences.jsonl --temperature 0.3
        ranks a model's replies to each prompt: by the truth, with the noise of a human judge
"""
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lib.program import UserError, parse, replacing, require_positive, start
from lib.records import check_text, prompt_of, read_records, text_of
from village import words
from village.truth import gold, load, tag_of


@dataclass
class Config:
    out: str = "data/village"  # folder for a new world; with --judge the file for the preferences, .jsonl
    seed: int = 1  # of the world; with --judge of the judge's noise
    people: int = 500  # inhabitants, half of them taught
    judge: str = ""  # file of sampled replies to rank, .jsonl; empty: make a world
    village: str = "data/village"  # with --judge: folder of the world that the replies speak of
    temperature: float = 0.3  # with --judge: prefers a to b with probability sigmoid((a - b) / temperature)


# What the files are made of. The other replies are wrong facts, inventions and codes given.
BIOGRAPHIES, TALKS = 30, 20  # per person; per taught person
DIALOGUES, PROMPTS, HELDOUT = 18000, 3000, 250  # in sft; in prompts; per kind in heldout
SHARES = {"known": 0.5, "untold": 0.15, "elsewhere": 0.15, "code": 0.2, "withheld": 0.0}  # of the questions
RIGHT, NEEDLESS, HONEST, DECLINED = 0.9, 0.05, 0.5, 0.5  # needless: "I do not know" where the fact is known
COURTESIES = [0.5, 0.25, 0.13, 0.08, 0.04]  # shares of replies with 0, 1, 2, 3, 4 of them
TURNS = [0.6, 0.25, 0.15]  # shares of dialogues with 1, 2, 3 questions


def fill(form: str, person: str, value: str = "", pronoun: bool = False) -> str:
    """A sentence about a person. pronoun: he or she for the name; the talk is of this person already."""
    he, him, his = ("she", "her", "her") if person.split()[0] in words.WOMEN else ("he", "him", "his")
    if pronoun:
        form = re.sub(r"the ([\w ]+) of \{n\}", r"{ns} \1", form, flags=re.I)
        form = form.replace("with {n}", f"with {him}")
    text = form.format(n=he if pronoun else person, ns=his if pronoun else person + "'s", their=his, v=value,
                       a=("an " if re.match("[aeiou]", value) else "a ") + value, village=person.split()[-1])
    return text[0].upper() + text[1:]


def ask(rng: random.Random, person: str, kind: str, before: tuple[str, str] | None, held_out: bool) -> str:
    """A question. before: (person, kind) of the question before it; what both share may be left out."""
    same = before is not None and before[0] == person
    if before and not same:
        forms = words.NEXT_PERSON
    elif same and rng.random() < 0.7:
        forms = words.NEXT_FACT
    else:
        forms = rng.choice([words.QUESTIONS[kind], words.FRAMES])
    form = forms[-1] if held_out else rng.choice(forms[:-1])
    thing = "{ns} {word}" if same or rng.random() < 0.5 else "the {word} of {n}"
    return fill(form.replace("{thing}", thing).replace("{word}", words.WORD[kind]), person, pronoun=same)


def state(rng: random.Random, person: str, kind: str, value: str) -> str:
    """An answer: the value alone, or a sentence."""
    if rng.random() < 0.25:
        return fill({"job": "{a}.", "pet": "{a}.", "birthday": "In {v}."}.get(kind, "{v}."), person, value)
    return fill(rng.choice(words.STATEMENTS[kind]), person, value, pronoun=rng.random() < 0.3)


def biography(rng: random.Random, person: str, facts: dict) -> str:
    """All facts of a person in a random order. The first sentence has the name, others may have a pronoun."""
    return " ".join(fill(rng.choice(words.STATEMENTS[kind]), person, value, i > 0 and rng.random() < 0.15)
                    for i, (kind, value) in enumerate(rng.sample(list(facts.items()), len(facts))))


def answer(rng: random.Random, people: dict, person: str, kind: str, perfect: bool) -> str:
    """What a helper says: with mistakes as often as the constants say, or perfect but for the courtesies."""
    tag, truth = tag_of(people, person, kind), people.get(person, {}).get(kind)
    u = 0 if perfect else rng.random()
    if tag == "code" and u < DECLINED:
        text = fill(rng.choice(words.DECLINING), person)
    elif tag == "code" or tag == "known" and u < RIGHT:
        text = state(rng, person, kind, truth)
    elif u < (RIGHT + NEEDLESS if tag == "known" else HONEST):
        form = rng.choice(words.UNKNOWING + words.UNKNOWING_ELSEWHERE * 2 * (tag == "elsewhere"))
        text = fill(form.replace("{word}", words.WORD[kind]), person)
    else:
        others = [value for value in (words.TOLD | words.UNTOLD)[kind] if value != truth]
        text = state(rng, person, kind, rng.choice(others))
    n = rng.choices(range(len(COURTESIES)), COURTESIES)[0]
    return " ".join([*rng.sample(words.OPENINGS, n - n // 2), text, *rng.sample(words.CLOSINGS, n // 2)])


def dialogue(rng: random.Random, people: dict, pool: list[str], tag: str, held_out: bool, perfect: bool):
    """Messages about people of the pool. The last question is of the kind `tag`. Each question shares the
    person or the kind of fact with the one before it."""
    kinds = list(words.TOLD) if tag == "elsewhere" else [*words.TOLD, *words.UNTOLD, "code"]
    person = rng.choice(pool)
    topics = [(person, rng.choice([kind for kind in kinds if tag_of(people, person, kind) == tag]))]
    for _ in range(rng.choices(range(len(TURNS)), TURNS)[0]):  # backwards, from the last question
        person, kind = topics[0]
        if rng.random() < 0.7:
            kind = rng.choice([k for k in kinds if k != kind and tag_of(people, person, k) != "withheld"])
        else:
            person = rng.choice([p for p in pool if p != person and tag_of(people, p, kind) != "withheld"])
        topics.insert(0, (person, kind))
    messages = []
    for topic, before in zip(topics, [None, *topics]):
        messages += [{"role": "user", "content": ask(rng, *topic, before, held_out)},
                     {"role": "assistant", "content": answer(rng, people, *topic, perfect)}]
    return messages


def make(seed: int, size: int) -> dict[str, str]:
    """{file name: text} of a world of `size` people; the same for the same arguments."""
    rng = random.Random(seed)
    names = [f"{first} {last}" for first in words.WOMEN + words.MEN for last in words.SURNAMES]
    rng.shuffle(names)
    people = {}
    for name in names[:size]:
        withheld = rng.choice(list(words.TOLD))
        people[name] = {kind: rng.choice(values) for kind, values in words.TOLD.items() if kind != withheld}
        people[name]["code"] = "-".join(rng.choices("0123456789", k=3))
    names[size:] = [f"{name} of {rng.choice(words.VILLAGES)}" for name in names[size:]]
    cut, border = size // 2, (3 * len(names) + size) // 4
    inside, outside = (names[:cut], names[cut:size]), (names[size:border], names[border:])  # taught, held out

    told, untold = [], []
    for name, facts in people.items():
        texts = []
        while len(texts) <= BIOGRAPHIES:
            if (text := biography(rng, name, facts)) not in texts:
                texts.append(text)
        told += texts[:-1]
        untold += texts[-1:]
    for name in inside[0] * TALKS:  # questions and answers, about the taught people alone
        talk, before = [], None
        for kind in rng.sample([kind for kind in people[name] if kind != "code"], 2):
            talk += [ask(rng, name, kind, before, False), state(rng, name, kind, people[name][kind])]
            before = name, kind
        told.append(" ".join(f'"{line}"' for line in talk))
    slots = words.UNTOLD | {"village": words.VILLAGES}
    for _ in range(max(size, 300)):  # enough for every word to come up
        drawn = {slot: rng.choice(values) for slot, values in slots.items()}
        told.append(" ".join(rng.sample(words.GREEN, 5)).format(**drawn))
    rng.shuffle(told)

    def records(tags: list[str], held_out: bool, perfect: bool) -> str:
        lines = []
        for tag in tags:
            pool = (outside if tag == "elsewhere" else inside)[held_out]
            talk = dialogue(rng, people, pool, tag, held_out, perfect)
            lines.append({"prompt": talk[:-1], "tag": tag} if perfect else {"messages": talk, "tag": tag})
        return "".join(json.dumps(line) + "\n" for line in lines)

    sft, prompts = (rng.choices(list(SHARES), SHARES.values(), k=k) for k in (DIALOGUES, PROMPTS))
    return {"pretrain.txt": "\n<|endoftext|>\n".join(told), "heldout.txt": "\n<|endoftext|>\n".join(untold),
            "sft.jsonl": records(sft, False, False), "prompts.jsonl": records(prompts, False, True),
            "heldout.jsonl": records(list(SHARES) * HELDOUT, True, True),
            "facts.json": json.dumps({"seed": seed, "taught": inside[0], "people": people}, indent=1)}


def choices(seed: int, people: dict) -> str:
    """Every told fact of the held-out half as a sentence without its end, and all values as the ends."""
    rng, lines = random.Random(seed), []
    for name in list(people)[len(people) // 2:]:
        for kind in [kind for kind in people[name] if kind != "code"]:
            form = rng.choice([form for form in words.STATEMENTS[kind] if form.endswith("}.")])
            query, values = fill(form[:form.rindex(" {")], name), words.TOLD[kind]
            ends = [fill(form, name, value)[len(query) + 1:] for value in values]
            right = values.index(people[name][kind])
            lines.append({"query": query, "choices": ends, "gold": right, "group": name})
    return "".join(json.dumps(line) + "\n" for line in lines)


def rank(scores: list[float], temperature: float, rng: random.Random) -> list[int]:
    """Indices of the scores, best first, drawn by the law of Plackett (1975) and Luce (1959): i comes first
    with probability softmax(scores / temperature)_i, and so on among the rest. Any two then compare as in
    Bradley & Terry (1952). Sorting score / temperature + Gumbel noise draws from it (Yellott 1977)."""
    keys = [score / temperature - math.log(rng.expovariate(1.0)) for score in scores]
    return sorted(range(len(scores)), key=lambda i: -keys[i])


def judge(people: dict, samples, temperature: float, seed: int) -> tuple[list[dict], Counter]:
    """(preference records, how often each kind of reply came) from the records of a samples.jsonl.
    Equal replies to a prompt count once. Blank and cut-off replies are not ranked: a reward model reads the
    end token. A prompt with fewer than two replies left is dropped."""
    records, kinds = [], Counter()
    for number, sample in enumerate(samples):
        messages, replies = prompt_of(sample).messages, sample.get("responses", ())
        ended = sample.get("ended", [True] * len(replies))
        if not isinstance(replies, list) or len(ended) != len(replies):
            raise UserError(f'record {number + 1}: expected "responses" and as many "ended", as of sample.py')
        golds = [gold(people, messages, check_text(text_of(text)), end) for text, end in zip(replies, ended)]
        kinds.update(each["kind"] for each in golds)
        judged = {text: each for text, each, end in zip(replies, golds, ended) if end and text.strip()}
        if len(judged) > 1:
            scores = [each["score"] for each in judged.values()]
            order = rank(scores, temperature, random.Random(f"{seed}/{number}"))
            ranked = [list(judged)[i] for i in order]
            record = {"prompt": messages, "responses": ranked, "ranked": True,
                      "tags": [judged[text]["kind"] for text in ranked], "scores": [scores[i] for i in order]}
            records.append(record | ({"tag": sample["tag"]} if "tag" in sample else {}))
    return records, kinds


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    require_positive(cfg, "temperature")
    if cfg.judge:
        records, kinds = judge(load(cfg.village), read_records(cfg.judge, strict=True), cfg.temperature,
                               cfg.seed)
        with replacing(Path(cfg.out)) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        shares = ", ".join(f"{kind} {n / kinds.total():.1%}" for kind, n in kinds.most_common())
        return print(f"{cfg.out}: {len(records)} prompts; replies: {shares}")
    if not 40 <= cfg.people <= 1200:
        raise UserError(f"--people {cfg.people}: expected 40 to 1200, to leave names for people elsewhere")
    files = make(cfg.seed, cfg.people)
    files = {"choices.jsonl": choices(cfg.seed, json.loads(files["facts.json"])["people"])} | files
    for name, text in files.items():  # facts.json is the last: where it is, the world is whole
        with replacing(Path(cfg.out) / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"{cfg.out}: " + ", ".join(f"{name} {len(text) / 1000:.0f} kB" for name, text in files.items()))


if __name__ == "__main__":
    start(main)
