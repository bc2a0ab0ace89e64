"""evaluate.py --choices: layouts as the field has them, log-likelihoods, shots, credits, numbers."""
import json
import math

import numpy as np
import pytest
import torch
from small_chat import assert_noticed, random_model, save_chat_model, write

import evaluate
from data import encode_prompt
from evaluate import Config, Item, encode_item, item_of, last_number, shots_of
from lib.program import UserError
from lib.tokenizer import make_tokenizer
from village import chains, world

TOKENIZER = make_tokenizer("byte", [])
RECORDS = {
    "hellaswag": {"ind": 4, "activity_label": "Roof", "ctx_a": "A man  sits. [header] It rains",
                  "ctx_b": "he is", "label": "2",
                  "endings": ["wet. [step] Soon.", "dry.", " away [title] now", "up."]},
    "arc": {"question": "What is wet?", "choices": {"text": ["sand", "water"], "label": ["A", "B"]},
            "answerKey": "B"},
    "piqa": {"goal": "To dry off,", "sol1": "swim.", "sol2": "sit in the sun.", "label": 1},
    "mmlu": {"question": " How many? ", "subject": "high_school_mathematics", "choices": [1, 2, 3, 4],
             "answer": 2},
    "plain": {"question": "Who?", "choices": ["she", "he"], "answer": "he"},
    "gsm8k": {"question": "2 and 3?", "answer": "It is 2+3=<<2+3=5>>5.\n#### 5"},
    "ours": {"query": "She has", "choices": ["a cat.", "an owl."], "gold": 1, "group": "Ann"},
    "our number": {"query": "3 +4", "target": "so 7"}}
LAYOUTS = {  # what lm-evaluation-harness 0.4.13 gives to the model: all that is read, and the choices
    "hellaswag": ("Roof: A man sits. It rains He is", ["wet. Soon.", "dry.", "away. now", "up."], 2),
    "arc": ("Question: What is wet?\nAnswer:", ["sand", "water"], 1),
    "piqa": ("Question: To dry off,\nAnswer:", ["swim.", "sit in the sun."], 1),
    "mmlu": ("The following are multiple choice questions (with answers) about high school mathematics.\n\n"
             "How many?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", ["A", "B", "C", "D"], 2),
    "plain": ("Question: Who?\nAnswer:", ["she", "he"], 1),
    "gsm8k": ("Question: 2 and 3?\nAnswer:", ["It is 2+3=<<2+3=5>>5.\n#### 5"], 0),
    "ours": ("She has", ["a cat.", "an owl."], 1), "our number": ("3 +4", ["so 7"], 0)}
BROKEN = [{"question": "Who?"}, {"question": "Who?", "choices": ["a", "b"], "answer": 2}, {"query": "x"},
          {"question": "Who?", "choices": ["a", " "], "answer": 0}, {"question": "2 + 3?", "answer": "five"},
          RECORDS["arc"] | {"answerKey": "C"}, RECORDS["hellaswag"] | {"label": ""},
          RECORDS["ours"] | {"gold": -1}, RECORDS["ours"] | {"gold": ""}, RECORDS["mmlu"] | {"choices": [1]}]


# ---- layouts -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", RECORDS)
def test_each_form_is_laid_out_as_the_field_does(form):
    item = item_of(RECORDS[form])
    assert (item.head + item.query, item.choices, item.gold) == LAYOUTS[form]


@pytest.mark.parametrize("record", BROKEN)
def test_what_is_no_question_is_left_out(record):
    with pytest.raises(UserError, match="expected a question"):
        item_of(record)


@pytest.mark.parametrize("text, number", [
    ("It is 5.", "5"), ("#### 1,234", "1234"), ("from 3 to -4.50, no more", "-4.50"), ("none", ""),
    ("$18. ", "18"), ("7 of 10%", "10")])
def test_the_last_number(text, number):
    assert last_number(text) == number


# ---- log-likelihoods ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model():
    return random_model(seed=3)


def by_hand(model, context: list[int], ids: list[int]) -> float:
    """log p(ids | context): one forward, one softmax a token."""
    logits = model(torch.tensor([context + ids]))[0]  # (T, V)
    return sum(logits[len(context) + i - 1].log_softmax(0)[token].item() for i, token in enumerate(ids))


def test_scores_are_sums_over_the_choice_alone(model):
    """In batches, padded, of unequal lengths, where one choice begins another; the space is the choice's,
    also where the question ends with one. In a chat the end counts, so that "a" is not sure to beat "ab"."""
    bos, end, encode = TOKENIZER.bos_id, TOKENIZER.end_id, TOKENIZER.encode
    for query in ("Who is it?", "Who is it? ", ""):
        item = Item(query, ["a", "ab", "a bee"], 0)
        replies = encode_item(model, TOKENIZER, item, [], Config())
        expected = [by_hand(model, [bos, *encode(query.rstrip())],
                            encode(" " * (1 + query.endswith(" ")) + choice)) for choice in item.choices]
        np.testing.assert_allclose(evaluate.score(model, TOKENIZER, replies, 2), expected, rtol=1e-5)
    said = [("One?", "x"), ("Two?", "y")]
    item = Item("Three?", ["a", "ab"], 0, head="Be brief.")
    messages = [{"role": role, "content": text} for role, text in (
        ("system", "Be brief."), ("user", "One?"), ("assistant", "x"), ("user", "Two?"), ("assistant", "y"),
        ("user", "Three?"))]
    prompt = encode_prompt(TOKENIZER, messages)
    expected = [by_hand(model, prompt, [*encode(choice), end]) for choice in item.choices]
    replies = encode_item(model, TOKENIZER, item, said, Config(chat=True))
    np.testing.assert_allclose(evaluate.score(model, TOKENIZER, replies, 2), expected, rtol=1e-5)
    text = "Be brief.One? x\n\nTwo? y\n\nThree?"
    for reply in encode_item(model, TOKENIZER, item, said, Config()):
        assert reply.prompt == [bos, *encode(text)] and TOKENIZER.decode(reply.ids) == f" {reply.text}"


def test_a_token_that_crosses_the_border(model):
    """What lies behind the context's own tokens is the choice, as in lm-evaluation-harness: of "ab" and "cd"
    joined as one token "bc" the choice keeps the rest."""
    class Joined:
        bos_id = 0

        def encode(self, text):
            return {"ab": [1, 2], "ab cd": [1, 3, 4, 5]}[text]
    reply, _ = encode_item(model, Joined(), Item("ab", ["cd", "cd"], 0), [], Config())
    assert (reply.prompt, reply.ids) == ([0, 1, 2], [4, 5])


def test_too_long_a_context_loses_its_beginning(model):
    """The choice and what stands right before it stay; the row is full to the last token."""
    item = Item("x" * 200 + "y", ["a", "longer"], 0)
    for reply in encode_item(model, TOKENIZER, item, [], Config()):
        assert TOKENIZER.decode(reply.ids) == f" {reply.text}"
        assert len(reply.prompt + reply.ids) == 96 and TOKENIZER.decode(reply.prompt)[-2:] == "xy"
    left = [encode_item(model, TOKENIZER, Item("x" * 200, ["5"], 0), [], Config(max_new_tokens=n))[0].prompt
            for n in (40, 200)]  # 200: drawing will refuse it
    assert [*map(len, left)] == [56, 1]
    items = [Item("z", ["a", "b"], 0), Item("z" * 85, ["a", "a" * 30], 0), item]
    assert evaluate.choose(model, TOKENIZER, items, Config())["cropped"] == 2


# ---- shots ----------------------------------------------------------------------------------------------

def test_shots_are_others(model):
    """Never the item itself, one of its group, or one under another head."""
    items = [Item(f"q{i}", ["a", "b"], i % 2, head="h" * (i % 2), group=f"g{i // 4}") for i in range(40)]
    drawn = [shots_of(items, i, Config(shots=3)) for i in range(40)]
    for i, shots in enumerate(drawn):
        numbers = [int(query[1:]) for query, _ in shots]
        assert len({*numbers}) == 3 and all(n % 2 == i % 2 and n // 4 != i // 4 for n in numbers)
        assert all(answer == "ab"[n % 2] for n, (_, answer) in zip(numbers, shots))
    assert drawn == [shots_of(items, i, Config(shots=3)) for i in range(40)]
    assert drawn != [shots_of(items, i, Config(shots=3, seed=2)) for i in range(40)]
    assert len({str(shots) for shots in drawn}) > 30 and not shots_of(items, 0, Config())
    with pytest.raises(UserError, match="--shots 19"):
        shots_of(items, 0, Config(shots=19))
    figures = [evaluate.choose(model, TOKENIZER, items, Config(shots=2, batch_size=n)) for n in (1, 7)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)


# ---- credits -----------------------------------------------------------------------------------------------

def choose_by(monkeypatch, logp, items, **flags) -> dict:
    """The figures where log p(choice | context) is logp(query, choice)."""
    def score(model, tokenizer, replies, batch_size):
        texts = [TOKENIZER.decode([i for i in reply.prompt if i < 256]) for reply in replies]
        return [logp(text, reply.text) for text, reply in zip(texts, replies)]
    monkeypatch.setattr(evaluate, "score", score)
    return evaluate.choose(random_model(max_seq_len=999), TOKENIZER, items, Config(**flags))


TABLE = {("q", "aa"): -4.0, ("q", "bbbbbbbbb"): -9.0, ("q", "c"): -4.5, ("", "aa"): -1.0,
         ("", "bbbbbbbbb"): -7.0, ("", "c"): -6.0}


@pytest.mark.parametrize("gold, right", [(0, {"acc", "acc_no_context"}), (1, {"acc_norm"}),
                                         (2, {"acc_mutual_info"})])
def test_each_way_prefers_what_it_says(monkeypatch, gold, right):
    """-4 is the likeliest, -9 / 9 the likeliest per character, -4.5 + 6 gains most from the question."""
    figures = choose_by(monkeypatch, lambda *key: TABLE[key], [Item("q", ["aa", "bbbbbbbbb", "c"], gold)])
    ways = {"acc", "acc_norm", "acc_no_context", "acc_mutual_info"}
    assert {way for way in ways if figures[way] == 1} == right
    assert all(figures[way] == 0 for way in ways - right) and figures["chance"] == pytest.approx(1 / 3)


def test_chance_perfection_and_error(monkeypatch):
    """A model that knows nothing scores chance even if all right answers stand first; a perfect one is 1 on
    the centred scale, one that is always wrong is below 0. Three of four right: sqrt(p (1 - p) / (n - 1))."""
    items = [Item(f"q{i}", ["aa", "bb", "cc", "dd"][: 2 + 2 * (i % 2)], 0) for i in range(8)]
    figures = choose_by(monkeypatch, lambda *_: -2.0, items)
    assert figures["acc"] == figures["acc_norm"] == figures["chance"] == 0.375 and figures["centred"] == 0
    assert choose_by(monkeypatch, lambda _, choice: -(choice != "aa"), items)["centred"] == 1
    figures = choose_by(monkeypatch, lambda _, choice: -(choice == "aa"), items)
    assert figures["acc"] == 0 and figures["centred"] == pytest.approx(-0.375 / 0.625)
    figures = choose_by(monkeypatch, lambda ask, choice: -((choice == "aa") != (ask not in "q0q4")), items)
    assert figures["acc"] == 0.75 and figures["acc_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 7))
    assert choose_by(monkeypatch, lambda *_: -2.0, items[:1])["acc_stderr"] == 0


def test_numbers_are_read_off_the_greedy_reply(monkeypatch, model):
    """Up to where a next question begins; in a chat all of it."""
    said = {"q0": " 2+3 = 5\n\nq9 6", "q1": "The answer is 1,000.", "q2": " 4 Question: 7", "q3": "none"}
    monkeypatch.setattr(evaluate, "draw", lambda model, tokenizer, prompts, seeds, **_: [
        evaluate.Reply(p, [], said[TOKENIZER.decode([i for i in p if i < 256])], True) for p in prompts])
    items = [Item(f"q{i}", [f"so {gold}"], 0) for i, gold in enumerate((5, 1000, 4, 0))]
    assert evaluate.choose(model, TOKENIZER, items, Config())["exact_match"] == 0.75
    assert evaluate.choose(model, TOKENIZER, items, Config(chat=True))["exact_match"] == 0.25
    with pytest.raises(UserError, match="two files"):
        evaluate.choose(model, TOKENIZER, [*items, Item("q", ["a", "b"], 0)], Config())


# ---- files -------------------------------------------------------------------------------------------------

def test_the_command(tmp_path, capsys):
    """One line of figures; broken records are left out and counted; --chat wants a model that can."""
    folder = save_chat_model(tmp_path / "chat")
    path = write(tmp_path / "q.jsonl", [RECORDS["ours"], RECORDS["arc"], RECORDS["piqa"]] * 9 + [BROKEN[0]])
    for flags in ([], ["--chat"], ["--shots", "2"]):
        evaluate.main(["--model", folder, "--choices", path, "--device", "cpu", *flags])
        out, err = capsys.readouterr()
        figures = json.loads(out)
        assert figures["items"] == 27 and "27 used, 1 left out" in err and 0 <= figures["acc"] <= 1
    base = save_chat_model(tmp_path / "base", chat_template="")
    with pytest.raises(UserError, match="has not learned to chat"):
        evaluate.main(["--model", base, "--choices", path, "--device", "cpu", "--chat"])
    numbers = write(tmp_path / "n.jsonl", [RECORDS["gsm8k"]])
    evaluate.main(["--model", folder, "--choices", numbers, "--device", "cpu", "--max_new_tokens", "5"])
    assert json.loads(capsys.readouterr().out)["exact_match"] == 0


def test_the_worlds_write_questions():
    """A sentence of the Village with its right end is one that a biography may have, all its ends are of the
    right kind; people of the taught half are not asked about. Chains: what answer() says."""
    people = {f"{first} Reed": {"town": "Selby", "pet": "owl", "food": "rice", "code": "1-2-3"}
              for first in ("Lucy", "Anna", "Carl", "Ruth")}
    items = [item_of(json.loads(line)) for line in world.choices(1, people).splitlines()]
    assert len(items) == 6 and {item.group for item in items} == {"Carl Reed", "Ruth Reed"}
    for item in items:
        kind, = (kind for kind, value in people[item.group].items() if value in item.choices[item.gold])
        sentences = [world.fill(form, item.group, people[item.group][kind])
                     for form in world.words.STATEMENTS[kind]]
        assert f"{item.query} {item.choices[item.gold]}" in sentences
        assert len(item.choices) == len(world.words.TOLD[kind])


def test_the_chains_write_questions(monkeypatch):
    for name, size in (("CHATS", 20), ("PROMPTS", 20), ("HELDOUT", 3)):
        monkeypatch.setattr(chains, name, size)
    files = chains.make(1)
    for name in ("choices.jsonl", "numbers.jsonl"):
        for line in files[name].splitlines():
            item = item_of(json.loads(line))
            assert item.choices[item.gold] == chains.answer(item.query)


BUGS = {
    "per token for per character": ("multiple_choice", "map(len, item.choices)", "map(len, [[1]] * 3)",
                                    test_each_way_prefers_what_it_says, 1, {"acc_norm"}),
    "the delimiter is counted": ("multiple_choice", "x / [*map(len, item.choices)]",
                                 "x / [len(c) + 9 for c in item.choices]",
                                 test_each_way_prefers_what_it_says, 1, {"acc_norm"}),
    "the first of equals": ("multiple_choice", "/ (x == x.max()).sum()", "* (x.argmax() == item.gold)",
                            test_chance_perfection_and_error),
    "percent for shares": ("choose", '(found["acc"] - chance)', '(found["acc"] - 100 * chance)',
                           test_chance_perfection_and_error),
    "own item shown": ("shots_of", "x.group != items[i].group", "True", test_shots_are_others),
    "one stream for all items": ("shots_of", "{cfg.seed}/{i}", "{cfg.seed}", test_shots_are_others),
    "cropped at the end": ("encode_item", "context[-max(1, n):]", "context[:n]",
                           test_too_long_a_context_loses_its_beginning),
    "no space": ("encode_item", "{text} {choice}", "{text}{choice}",
                 test_scores_are_sums_over_the_choice_alone),
    "a chat without its end": ("encode_item", ", tokenizer.end_id]", "]",
                               test_scores_are_sums_over_the_choice_alone),
    "the first number": ("last_number", "[-1]", "[0]", test_the_last_number, "7 of 10%", "10")}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_noticed(request, monkeypatch, bug):
    assert_noticed(request, monkeypatch, evaluate, *BUGS[bug])
