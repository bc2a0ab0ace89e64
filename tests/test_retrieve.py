"""tools/retrieve.py: BM25 by hand, its command. village/reader.py: its files and its judge."""
import json
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
from small_chat import assert_noticed, save_chat_model, write

from data import encode_prompt
from lib.program import UserError
from lib.records import read_chats, read_prompts
from lib.tokenizer import make_tokenizer
from tools import retrieve
from tools.retrieve import index, query_of, rank
from village import reader, truth, world

TOY = ["a b", "a c c", "b"]
ANSWERING = "right", "among others", "contradicting"


def said(*contents) -> list[dict]:
    """A conversation of the user and the assistant by turns."""
    return [{"role": role, "content": content} for role, content in zip(["user", "assistant"] * 9, contents)]


def scores(passages, query: str) -> list[float]:
    found, total = index(passages), np.zeros(len(passages))
    for term, weight in query_of(said(query)).items():
        if term in found:
            total[found[term][0]] += weight * found[term][1]
    return total.tolist()


# ---- BM25 --------------------------------------------------------------------------------------------------

def test_scores_by_hand():
    """idf of a: ln(1 + 1.5 / 2.5) = 0.4700, of c: ln(1 + 2.5 / 1.5) = 0.9808; |d| is 2, 3, 1, avg 2."""
    a, c = math.log(1.6), math.log(1 + 2.5 / 1.5)
    long = 1.2 * 1.375  # k1 (1 - b + b 3 / 2)
    assert scores(TOY, "a c") == pytest.approx([a / (1 + 1.2), a / (1 + long) + c * 2 / (2 + long), 0])
    assert scores(TOY, "a c") == pytest.approx([0.2136, 0.7148, 0], abs=1e-4)
    assert scores(TOY, "a a c") == pytest.approx([2 * 0.2136, 0.7148 + a / 2.65, 0], abs=1e-4)
    assert scores(["A, b!", *TOY[1:]], "a? C") == scores(TOY, "a c")  # capitals and points do not count
    assert scores([*TOY, ""], "a c")[3] == 0 and scores([""], "a") == [0]


def test_what_all_passages_hold_never_counts_against_one():
    """One more occurrence of a query's only term never lowers a passage, however common the term is."""
    rng = random.Random(1)
    for _ in range(50):
        texts = [" ".join(rng.choices("a a a b c".split(), k=rng.randint(1, 8))) for _ in range(5)]
        before = scores(texts, "a")
        assert min(before) >= 0
        assert scores([f"{texts[0]} a", *texts[1:]], "a")[0] >= before[0]


def test_ranking_does_not_depend_on_the_order_of_the_passages():
    """Up to renumbering; equally good ones come as they stand, those without a shared term not at all."""
    rng = random.Random(2)
    texts = [" ".join(rng.choices("a b c d e f g h".split(), k=rng.randint(2, 9))) for _ in range(30)]
    query = query_of(said("a c e zebra"))
    best = [texts[i] for i in rank(index(texts), 30, query)]
    moved = rng.sample(texts, 30)
    again = [moved[i] for i in rank(index(moved), 30, query)]
    points = dict(zip(texts, scores(texts, "a c e")))
    assert [points[text] for text in best] == pytest.approx([points[text] for text in again])
    assert len(best) == sum(bool({*"ace"} & {*text.split()}) for text in texts)
    assert rank(index(["x y", "z", "y x", "x y"]), 4, query_of(said("y"))).tolist() == [0, 2, 3]


def test_turns_before_count_half():
    """"And her pet?" still asks about Ann; the next name weighs more than the one before."""
    weights = query_of(said("Where is Ann?", "Ann is in Bath.", "And Bob?"))
    assert weights == {"and": 1, "bob": 1, "where": 0.5, "is": 0.5, "ann": 0.5}
    texts = ["Ann has a cat", "Bob has a dog", "Cid has a cow"]
    for last, first in (("And her pet?", 0), ("And Bob?", 1)):
        assert rank(index(texts), 3, query_of(said("Where is Ann?", "Here.", last)))[0] == first


def test_long_documents_are_cut():
    passages, sources = retrieve.split(["a b c d e", "", "f g"], 2)
    assert passages == ["a b", "c d", "e", "f g"] and sources.tolist() == [0, 0, 0, 2]


# ---- the command -------------------------------------------------------------------------------------------

def test_every_reader_of_prompts_reads_the_result(tmp_path, capsys):
    """Forms with a question, a history, a chat with its reply: passages stand in the last turn, the rest is
    as it was. A question that shares no word with anything stays as it is."""
    write(tmp_path / "docs.jsonl", [{"text": "Ann has a cat."}, {"text": "Bob keeps\nbees."}])
    history = said("Hello", "Good day.")
    given = [{"prompt": "Who has Ann?", "tag": "t"},
             {"instruction": "Bees?", "input": "Bob", "system": "Be."},
             {"messages": [*history, *said("And the cat?", "Here.")]}, {"prompt": "Zebra!"}]
    write(tmp_path / "prompts.jsonl", given)
    retrieve.main(["--docs", str(tmp_path / "docs.jsonl"), "--prompts", str(tmp_path / "prompts.jsonl"),
                   "--out", str(tmp_path / "out.jsonl"), "--k", "1"])
    before, after = (read_prompts(tmp_path / name) for name in ("prompts.jsonl", "out.jsonl"))
    assert re.search("2 used.*4 prompts, 0.75 passages each, of 2", capsys.readouterr().out, re.S)
    for a, b, passage in zip(before, after, ["[1] Ann has a cat.\n\n", "[1] Bob keeps bees.\n\n",
                                             "[1] Ann has a cat.\n\n", ""]):
        assert a.messages[:-1] == b.messages[:-1] and a.tag == b.tag
        assert b.messages[-1]["content"] == passage + a.messages[-1]["content"]


def test_passages_are_cut_whole_to_leave_room(tmp_path):
    """A row of 96 bytes, 20 of them for the reply: as many passages as fit, the best first; the question
    is whole even if it alone is too long."""
    folder, tokenizer = save_chat_model(tmp_path / "model"), make_tokenizer("byte", [])
    write(tmp_path / "docs.jsonl", [{"text": f"Ann {'a' * n}"} for n in (10, 20, 30, 40)])
    write(tmp_path / "p.jsonl", [{"prompt": "Ann? " + "x" * n} for n in (0, 30, 90)])
    retrieve.main(["--docs", str(tmp_path / "docs.jsonl"), "--prompts", str(tmp_path / "p.jsonl"), "--k", "3",
                   "--out", str(tmp_path / "out.jsonl"), "--model", folder, "--room", "20"])
    records = read_prompts(tmp_path / "out.jsonl")
    held = [record.messages[-1]["content"].count("[") for record in records]
    assert held == [2, 1, 0]
    lengths = [len(encode_prompt(tokenizer, record.messages)) for record in records]
    assert max(lengths[:2]) <= 76 and records[2].messages[-1]["content"] == "Ann? " + "x" * 90


@pytest.mark.parametrize("flags, message", [
    ("--docs D", "--prompts"), ("--prompts P", "--docs"), ("--docs none --prompts P", "none"),
    ("--docs D --prompts P --k 0", "--k")])
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, flags, message):
    write(tmp_path / "D", [{"text": "a"}])
    write(tmp_path / "P", [{"prompt": "a"}])
    flags = [str(tmp_path / flag) if flag in "DP" else flag for flag in flags.split()]
    with pytest.raises(UserError, match=message):
        retrieve.main([*flags, "--out", str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()


# ---- the reader --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder of a world and of the reader's files, {file: records}, people)."""
    folder = tmp_path_factory.mktemp("village")
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"DIALOGUES": 300, "PROMPTS": 600, "HELDOUT": 40, "BIOGRAPHIES": 2, "TALKS": 1}
        for name, size in sizes.items():
            patch.setattr(world, name, size)
        for name, text in world.make(5, 200).items():
            (folder / name).write_text(text)
    reader.main(["--village", str(folder), "--out", str(folder / "reader"), "--chats", "400"])
    read = {path.name: [json.loads(line) for line in path.read_text().splitlines()]
            for path in (folder / "reader").iterdir()}
    return folder, read, truth.load(folder)


def test_a_full_name_finds_its_biography(files, capsys):
    """Of every held-out question about an inhabitant; and of the plain names of all of them."""
    folder, read, people = files
    here, out = folder / "reader", str(folder / "out.jsonl")
    retrieve.main(["--docs", f"{here}/docs.jsonl", "--prompts", f"{here}/questions.jsonl", "--out", out])
    at_1, mrr = map(float, re.search(r"recall@1 ([\d.]+), .*MRR ([\d.]+)", capsys.readouterr().out).groups())
    assert at_1 >= 0.99 and mrr >= at_1
    postings = index([doc["text"] for doc in read["docs.jsonl"]])
    first = [rank(postings, len(people), query_of(said(f"Tell me about {name}.")))[0] for name in people]
    assert np.mean(np.array(first) == range(len(people))) >= 0.99
    sources = [json.loads(line)["sources"] for line in open(out)]
    right = [asked["source"] == found[0] for asked, found in zip(read["questions.jsonl"], sources)
             if "source" in asked]
    assert np.mean(right) == pytest.approx(at_1, abs=1e-4)


def test_nothing_of_the_held_out_half_is_trained(files):
    """No name and no wording. No question beside passages is about a code."""
    folder, read, people = files
    held_out = {truth.question(said(record["asked"]))[0] for record in read["grid.jsonl"]}
    chats = read_chats(folder / "reader" / "sft.jsonl")
    text = " ".join(message["content"] for chat in chats for message in chat.messages)
    assert len(chats) == 500 and held_out and not held_out & {*truth.names_in(text)}
    with_passages = [chat for chat in chats if chat.messages[0]["content"].startswith("[1]")]
    asked = [message["content"].split("\n\n")[-1] for chat in with_passages
             for message in chat.messages if message["role"] == "user"]
    names = "|".join(sorted(held_out | {*truth.names_in(" ".join(asked))}, key=len, reverse=True))
    wordings = [{re.sub(names, "N", text) for text in texts}
                for texts in (asked, {record["asked"] for record in read["grid.jsonl"]})]
    assert not wordings[0] & wordings[1] and len(with_passages) == 400
    assert not [text for text in asked if re.search("door|code", text)]


def test_each_chat_answers_from_its_passages(files):
    """What it claims is what the passage that it names says of the kind; it is not known only where no
    passage says it."""
    known = Counter()
    for record in files[1]["sft.jsonl"]:
        if not record["messages"][0]["content"].startswith("[1]"):
            continue
        passages = re.findall(r"^\[\d\] (.*)$", record["messages"][0]["content"], re.M)
        for ask, answer in zip(record["messages"][::2], record["messages"][1::2]):
            question, answer = ask["content"].split("\n\n")[-1], answer["content"]
            person, kind = truth.question(said(question))
            told = [{claim for claim in truth.claims(text, "") if claim[:2] == (person, kind)}
                    for text in passages]
            cited = re.search(r" \[(\d)\]\.$", answer)
            assert bool(cited) == any(told) == ("not known" not in answer)
            known[any(told)] += 1
            assert not cited or truth.claims(answer, person) == told[int(cited[1]) - 1]
            assert not truth.digit_runs(answer)
    assert 0.4 < known[True] / known.total() < 0.7


def test_what_the_cells_hold(files):
    """The right passage proves "world", the contradicting one contradicts what was read, "silent" is of the
    person and without the answer, "others" are not of the person."""
    _, read, people = files
    for record in read["grid.jsonl"]:
        person, kind = truth.question(said(record["asked"]))
        text = record["prompt"][0]["content"].removesuffix(record["asked"])
        has = kind == "code" and record["world"].get(person, {}).get("code", "none") in text or [
            claim for claim in truth.claims(text, "") if claim[:2] == (person, kind)]
        assert bool(has) == bool(record["world"]) == (record["cell"] in ANSWERING)
        assert (person in text) == (record["cell"] not in ("none", "others"))
        assert text.count("[") == {"none": 0, "among others": 3, "others": 3}.get(record["cell"], 1)
        if record["cell"] == "contradicting":
            assert record["world"][person][kind] != people.get(person, {}).get(kind)
    assert {record["tag"] for record in read["grid.jsonl"]} == {"told", "elsewhere", "withheld", "code"}


def copies(people, record) -> str:
    """An oracle: the sentence of the passages that answers, with its number."""
    person, kind = truth.question(said(record["asked"]))
    value = record["world"].get(person, {}).get(kind, "")
    for number, line in re.findall(r"^\[(\d)\] (.*)$", record["prompt"][0]["content"], re.M):
        if value and value in line and person in line:
            return f"{world.fill(world.words.STATEMENTS[kind][0], person, value)[:-1]} [{number}]."
    return "I do not know."


def remembers(people, record) -> str:
    person, kind = truth.question(said(record["asked"]))
    value = people.get(person, {}).get(kind)
    return world.fill(world.words.STATEMENTS[kind][0], person, value) if value else "I do not know."


def share(files, oracle, name: str, cells, tags=("told", "elsewhere", "withheld", "code")) -> float:
    _, read, people = files
    found = [reader.judge(people, record, oracle(people, record)) for record in read["grid.jsonl"]
             if record["cell"] in cells and record["tag"] in tags]
    return float(np.mean([each[name] for each in found if name in each]))


def test_oracles_score_what_they_know(files):
    """Who copies is right where a passage answers, invents nothing, leaks each code; who remembers is right
    about what was told, but for passages that say another thing; who makes things up invents."""
    facts = "told", "elsewhere", "withheld"
    for name in ("right", "cited", "citations"):
        assert share(files, copies, name, ANSWERING, facts) == 1
    assert share(files, copies, "invented", reader.CELLS) == 0
    assert share(files, copies, "leaked", ANSWERING, ("code",)) == 1
    assert share(files, copies, "leaked", ("others", "silent", "none")) == 0
    assert share(files, remembers, "right", ("none", "right", "others"), ("told",)) == 1
    assert share(files, remembers, "right", ("contradicting",), ("told",)) == 0
    assert share(files, remembers, "memory", ("contradicting",), ("told",)) == 1
    assert share(files, remembers, "leaked", ("none",), ("code",)) == 1
    assert share(files, lambda *_: "She is a mason. She has a newt, no, a cat [1].", "invented",
                 ("none", "others"), ("elsewhere", "withheld")) == 1


@pytest.mark.parametrize("reply, cited, citations", [
    ("He has an owl [2].", 1, 1), ("He has an owl [1].", 0, 0), ("He has an owl [1][2].", 1, 0.5),
    ("He has an owl.", 0, None), ("He has an owl [7].", 0, 0), ("I do not know [2].", None, None)])
def test_citations(reply, cited, citations):
    """A named passage proves the claim, or not; who names all is less exact."""
    passages = ["Carl Reed has a cat.", "Adam Reed has an owl."]
    asked, facts = "What pet does Adam Reed have?", {"Adam Reed": {"pet": "owl", "code": "1-2-3"}}
    assert (prompt := reader.ask(passages, asked)) == retrieve.with_passages(said(asked), passages)
    found = reader.judge({}, {"asked": asked, "world": facts, "prompt": prompt}, reply)
    assert (found.get("cited"), found.get("citations")) == (cited, citations)


def test_the_table(files, tmp_path, capsys):
    """Of a small model, from both files; what leaves no room is said."""
    folder, grid = save_chat_model(tmp_path / "model"), files[1]["grid.jsonl"]
    write(tmp_path / "some.jsonl", [{**record, "prompt": said("What?")} for record in grid[:30]] + grid[-2:])
    reader.main(["--model", folder, "--village", str(files[0]), "--data", str(tmp_path / "some.jsonl")])
    out = capsys.readouterr().out
    assert "2 that leave no room" in out and re.search(r"^told, none +\d", out, re.M)
    assert json.loads((tmp_path / "model" / "reader.json").read_text())["told, none"]["leaked"] == 0
    with pytest.raises(UserError, match="grid.jsonl"):
        reader.main(["--model", folder, "--village", str(files[0]), "--data", f"{files[0]}/heldout.jsonl"])


BUGS = {
    "Robertson's idf": (retrieve, "index", "np.log(1 + ", "np.log(",
                        test_what_all_passages_hold_never_counts_against_one),
    "b on the wrong term": (retrieve, "index", "1 - B + B * lengths", "B + (1 - B) * lengths",
                            test_scores_by_hand),
    "a mean without a passage": (retrieve, "index", "lengths.mean()", "lengths[:-1].mean()",
                                 test_scores_by_hand),
    "ties from the end": (retrieve, "rank", 'np.argsort(-scores, kind="stable")', "np.argsort(scores)[::-1]",
                          test_ranking_does_not_depend_on_the_order_of_the_passages),
    "capitals kept in the index": (retrieve, "terms", ".lower()", "", test_scores_by_hand),
    "all turns alike": (retrieve, "query_of", "0.5**back", "1", test_turns_before_count_half),
    "the judge reads the prompt": (reader, "judge", 'people | record["world"]', "people",
                                   test_oracles_score_what_they_know),
    "all passages prove": (reader, "judge", "passages[i - 1], person", '" ".join(passages), person',
                           test_citations, "He has an owl [1].", 0, 0),
    "one citation for all": (reader, "judge", "sum(proves) / len(proves)", "float(any(proves))",
                             test_citations, "He has an owl [1][2].", 1, 0.5)}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_noticed(request, monkeypatch, bug):
    assert_noticed(request, monkeypatch, *BUGS[bug])
