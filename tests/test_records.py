"""Public record forms: what is read of them, what is left out and counted; one line for a bad file."""
import gzip
import json
import time
from types import SimpleNamespace

import pytest

from lib.corpora import read_corpus
from lib.program import UserError
from lib.records import find_files, read_chats, read_preferences, read_prompts, read_records, split
from lib.records import read_split as split_of

USER, REPLY = {"role": "user", "content": "Hi 你好"}, {"role": "assistant", "content": "Hello 🙂"}
SYSTEM, NO = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "No."}
HH = "\n\nHuman: Hi 你好\n\nAssistant:"


def lines(*records) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def write(folder, *records, name="file.jsonl"):
    (folder / name).write_bytes(lines(*records))
    return folder / name


def said(*texts) -> list[dict]:
    """Turns of the user and the assistant."""
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, texts)]


# ---- forms

TWO = {"conversations": [{"from": "human", "value": "Hi 你好"}, {"from": "gpt", "value": "Hello 🙂"}]}
PARTS = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "你好"}]
CHATS = {
    "messages": ({"messages": [SYSTEM, USER, REPLY, USER, REPLY]}, [SYSTEM, USER, REPLY, USER, REPLY]),
    "alpaca, empty input": ({"instruction": "Hi 你好", "input": "", "output": "Hello 🙂"}, [USER, REPLY]),
    "alpaca": ({"instruction": "翻译:", "input": "今天", "output": "Hello 🙂", "system": "Be kind."},
               [SYSTEM, {"role": "user", "content": "翻译:\n今天"}, REPLY]),
    "alpaca with a history": ({"instruction": "c", "output": "d", "history": [["a", "b"]],
                               "system": "Be kind."}, [SYSTEM, *said("a", "b", "c", "d")]),
    "sharegpt": ({"id": 7, **TWO}, [USER, REPLY]),
    "sharegpt with a system text beside": ({**TWO, "system": "Be kind."}, [SYSTEM, USER, REPLY]),
    "conversation, of roles": ({"conversation": [USER, REPLY]}, [USER, REPLY]),
    "prompt and completion": ({"prompt": [SYSTEM, USER], "completion": [REPLY]}, [SYSTEM, USER, REPLY]),
    "query and response": ({"query": "Hi 你好", "response": "Hello 🙂"}, [USER, REPLY]),
    "dolly": ({"instruction": "a", "context": "b", "response": "c", "category": "qa"}, said("a\nb", "c")),
    "hh": ({"prompt": f"\n\nHuman: a\n\nAssistant: b{HH}", "response": "Hello 🙂"},
           [*said("a", "b"), USER, REPLY]),
    "a list of text parts": ({"messages": [{"role": "user", "content": PARTS}, REPLY]}, [USER, REPLY]),
    "blank system inside": ({"messages": [{"role": "system", "content": None}, USER, REPLY]}, [USER, REPLY]),
    "null is absent": ({"instruction": "Hi 你好", "input": None, "output": "Hello 🙂", "system": None,
                        "history": None, "messages": None}, [USER, REPLY]),
    "what is not ours": ({"messages": [USER, REPLY], "tag": ["x"], "scores": "?", "tags": 3}, [USER, REPLY]),
    "weights": ({"messages": [USER, {**NO, "weight": 0}, USER, {**NO, "train": False}, USER,
                              {**NO, "loss": False}, {**USER, "weight": 1}, {**REPLY, "weight": 1}]},
                [*[USER, {**NO, "train": False}] * 3, USER, REPLY]),
    "tools": ({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]},
                            {"role": "tool", "content": "42"}, REPLY,
                            {"from": "observation", "value": "x"}, NO]},
              [{"role": "user", "content": 'Hi 你好\ntool_calls: [{"name": "f"}]\ntool: 42'},
               REPLY, {"role": "user", "content": "observation: x"}, NO]),
}


@pytest.mark.parametrize("name", CHATS)
def test_every_chat_form_gives_the_same_messages(name, tmp_path):
    """Array or lines, plain or gzip, whatever the name: the messages, and the line of each record."""
    record, messages = CHATS[name]
    array = json.dumps([record, record], indent=1, ensure_ascii=False)
    second = [i for i, line in enumerate(array.split("\n"), start=1) if line == " {"][1]
    for content, where in ((lines(record, record), [1, 2]), (array.encode(), [2, second])):
        for path, data in ((tmp_path / "a.json", content), (tmp_path / "b.jsonl", gzip.compress(content))):
            path.write_bytes(data)
            found = read_chats(path)
            assert [chat.messages for chat in found] == [messages, messages] and not found.left_out
            assert [chat.where for chat in found] == [f"{path}:{line}" for line in where]


PREFERENCES = {
    "text prompt": {"prompt": "Hi 你好", "chosen": "Hello 🙂", "rejected": "No."},
    "messages as prompt": {"prompt": [USER], "chosen": "Hello 🙂", "rejected": "No."},
    "alpaca": {"instruction": "Hi 你好", "input": "", "output": "-", "chosen": "Hello 🙂", "rejected": "No."},
    "other scores beside": {"prompt": "Hi 你好", "chosen": "Hello 🙂", "rejected": "No.", "scores": [1, 9],
                            "ended": 0},
    "alpaca, two outputs": {"instruction": "Hi 你好", "output": ["Hello 🙂", "No."]},
    "orca": {"question": "Hi 你好", "chosen": "Hello 🙂", "rejected": "No."},
    "replies as messages": {"prompt": [USER], "chosen": [REPLY], "rejected": NO},
    "whole conversations": {"prompt": "Hi 你好", "chosen": [USER, REPLY], "rejected": [USER, NO]},
    "conversations alone": {"chosen": [USER, REPLY], "rejected": [USER, NO]},
    "sharegpt": {"conversations": TWO["conversations"][:1], "chosen": {"from": "gpt", "value": "Hello 🙂"},
                 "rejected": {"from": "gpt", "value": "No."}},
    "hh": {"chosen": HH + " Hello 🙂", "rejected": HH + " No."},
    "hh in both": {"prompt": HH, "chosen": HH + " Hello 🙂", "rejected": HH + " No."},
    "hh in the prompt": {"prompt": HH, "chosen": " Hello 🙂", "rejected": " No."},
    "ranked": {"prompt": "Hi 你好", "responses": ["Hello 🙂", "No."]},
    "scored": {"prompt": "Hi 你好", "responses": ["No.", "Hello 🙂", "Tie."], "scores": [1, 9.5, 1]},
    "drawn, then ranked": {"prompt": "Hi 你好", "responses": ["Hello 🙂", "No."], "ended": [1, 1],
                           "ranked": True},
    "ranked by a judge with noise": {"prompt": "Hi 你好", "responses": ["Hello 🙂", "No."],
                                     "scores": [0, 1], "ranked": True},
    "equal or blank ones beside": {"prompt": "Hi 你好",
                                   "responses": ["Hello 🙂", " ", "Hello 🙂", "No.", None]},
}


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", PREFERENCES)
def test_every_preference_form_gives_prompt_and_ranked_replies(name, system, tmp_path):
    """The best reply first, with the system text that stands beside; the same file also gives its prompts."""
    path = write(tmp_path, {**PREFERENCES[name], **({"system": "Be kind."} if system else {})})
    record, = read_preferences(path)
    assert record.messages == [SYSTEM] * system + [USER] and record.responses == ["Hello 🙂", "No."]
    assert read_prompts(path)[0].messages == record.messages
    assert not read_preferences(path).unused and len(read_preferences(path).left_out) == ("blank" in name)


def test_what_stands_beside_responses(tmp_path):
    """Tags and scores are carried, in the order and for those of the replies that stay. In HH a colon or a
    newline inside a turn stays."""
    start = "\n\nHuman: a: b\nc\n\nAssistant: d\n\nHuman: e\n\nAssistant:"
    hh, ranked = read_preferences(write(tmp_path, {"chosen": start + " good", "rejected": start + " bad"}, {
        "prompt": "a", "responses": ["b", " ", "c"], "tags": ["x", [], 7], "scores": [0.5, 7, 1],
        "tag": "t"}))
    assert [m["content"] for m in hh.messages] == ["a: b\nc", "d", "e"] and hh.responses == ["good", "bad"]
    assert (ranked.responses, ranked.tags, ranked.scores) == (["c", "b"], ["7", "x"], [1, 0.5])
    assert ranked.tag == "t"


@pytest.mark.parametrize("record", [
    {"prompt": "Hi 你好"}, {"prompt": [USER]}, {"messages": [USER, REPLY]}, TWO, {"messages": [USER]},
    {"instruction": "Hi 你好"}, {"prompt": HH}, {"prompt": "Hi 你好", "chosen": "x"}])
def test_prompts_from_prompts_and_from_conversations(record, tmp_path):
    """Of a conversation that ends with a reply, the prompt is all before it."""
    assert read_prompts(write(tmp_path, record))[0].messages == [USER]


def test_records_of_an_array_are_those_of_json(tmp_path):
    """Nested brackets, commas and quotes in strings, any white space between, a byte order mark, CRLF."""
    found = [{"a": "]],[", "b": [1, {"c": []}]}, {}, {"d": "\\\"]"}, {"e": "\u2028"}]
    plain = json.dumps(found)
    spaced, rows = " \n" + plain.replace(", ", " ,\n "), lines(*found).decode()
    for text in (plain, json.dumps(found, indent=3), spaced, rows, "\ufeff" + rows.replace("\n", "\r\n\n")):
        (tmp_path / "a.json").write_text(text, newline="")
        assert read_records(tmp_path / "a.json", strict=True) == found


# ---- what is left out

GOOD = lines({"messages": [USER, REPLY]})


def chat(*messages):
    return lines({"messages": list(messages)})


UNUSABLE = {  # what the file holds beside good records, and words of the reason
    "no JSON": (b"hello\n", ["JSON"]),
    "JSON cut off": (GOOD[:30] + b"\n", ["JSON"]),
    "thousands of brackets": (b'{"a":' * 100_000 + b"\n", ["JSON"]),
    "no record": (b'"text"\n', ["str", "a record"]),
    "a blank system alone": (chat({"role": "system", "content": " "}), ["list []"]),
    "other keys": (b'{"text": "a"}\n', ["'text'", "messages"]),
    "KTO": (b'{"prompt": "a", "completion": "b", "label": true}\n', ["KTO records (one reply with"]),
    "stepwise": (b'{"prompt": "a", "completions": ["b"], "labels": [true]}\n', ["stepwise"]),
    "preferences": (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', ["preferences"]),
    "messages is a number": (b'{"messages": 3}\n', ["int", "list"]),
    "unknown role": (chat(USER, {"role": "asistant", "content": "a"}), ["asistant", "the assistant"]),
    "role is a list": (chat({"role": ["user"], "content": "a"}), ["['user']"]),
    "a megabyte as role": (chat({"role": "x" * 1_000_000, "content": "a"}), ["xxx"]),
    "starts with the assistant": (chat(REPLY, USER), ["assistant", "expected the user"]),
    "two user turns": (chat(USER, USER, REPLY), ["user", "expected the assistant"]),
    "ends with the user": (chat(USER, REPLY, USER), ["ends with the user"]),
    "all have weight 0": (chat(SYSTEM, USER, {**REPLY, "weight": 0}), ["weight"]),
    "content is null": (chat(USER, {"role": "assistant", "content": None}), ["blank"]),
    "a picture": (chat({"role": "user", "content": [{"type": "image_url"}]}, REPLY), ["pictures"]),
    "blank user turn": (chat({"role": "user", "content": " \n\u3000"}, REPLY), ["blank"]),
    "input is a number": (b'{"instruction": "a", "input": 3, "output": "b"}\n', ["no text"]),
    "history of no pairs": (lines({"instruction": "a", "output": "b", "history": [["c"]]}), ["history"]),
    "half a character": (b'{"instruction": "a", "output": "ab\\ud83d"}\n', ["half a character"]),
    "bad UTF-8": (lines({"messages": [USER, REPLY]}).replace(b"Hello", b"\xff"), ["no UTF-8"]),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_record_is_left_out_and_counted(name, tmp_path):
    """One of eleven: the reason and the place are told. With --strict, or among fewer: one clear line."""
    content, words = UNUSABLE[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 4 + content + GOOD * 6)
    found = read_chats(path)
    assert [chat.messages for chat in found] == [[USER, REPLY]] * 10 and found.unused == 1
    report = found.report()
    assert "10 used, 1 left out: 1 x found" in report and report.endswith("(a.jsonl:5)")
    assert all(word in report for word in words) and "\n" not in report and len(report) < 400 + len(str(path))
    assert {"used": 10, "left_out": 1}.items() < found.metrics().items() and len(found.metrics()) == 3
    one_clear_line(lambda path: read_chats(path, strict=True), path, "(a.jsonl:5)", "--strict", *words)
    path.write_bytes(GOOD * 8 + content)
    one_clear_line(read_chats, path, "1 left out", "(a.jsonl:9)", "at most a tenth may be left out", *words)


def one_clear_line(reader, path, *words):
    with pytest.raises(UserError) as caught:
        reader(path)
    message = str(caught.value)
    assert all(word in message for word in [str(path), *words]), message
    assert "\n" not in message and len(message) < 500 + 4 * len(str(path))


def test_all_reasons_at_once(tmp_path):
    """A third of a file cannot be used: one run tells the five commonest reasons with their first places."""
    bad = [b"{}\n", chat(REPLY), chat(USER, REPLY, USER), b"7\n", b"x\n", chat({**USER, "content": ""})]
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 30 + b"".join(one * n for n, one in enumerate(bad, start=1)))
    with pytest.raises(UserError) as caught:
        read_chats(path)
    said = str(caught.value)
    assert said.count(" x found") == 5 and "30 used, 21 left out: 6 x found a blank text" in said
    assert "(a.jsonl:46, a.jsonl:47, a.jsonl:48)" in said and "1 x" not in said


def test_a_wrong_file_is_refused_at_once(tmp_path):
    """Two megabytes of text in place of chats: each line is tried, in time that grows with their number."""
    path, began = tmp_path / "a.txt", time.process_time()
    path.write_text("some words\n" * 180_000)
    one_clear_line(read_chats, path, "180000 x found no valid JSON")
    assert time.process_time() - began < 5


@pytest.mark.parametrize("content, words", [
    (b"\n \n", ["0 used"]), (b"\n[" + GOOD + b", " + GOOD, [":3", "without an end"]),
    (b"[" + GOOD + b", {'a'}," + GOOD * 99 + b"]", [":2", "JSON"])])
def test_what_may_have_lost_much_is_refused(content, words, tmp_path):
    """Nothing in it; an array that is cut off or broken."""
    (tmp_path / "a.json").write_bytes(content)
    one_clear_line(read_chats, tmp_path / "a.json", *words)


BAD_PREFERENCES = {
    "KTO": {"prompt": "a", "completion": "b", "label": False},
    "conversations": {"messages": [USER, REPLY]},
    "equal replies": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "equal scores": {"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]},
    "drawn and not ranked": {"prompt": "a", "responses": ["b", "c"], "ended": [True, True]},
    "a number": {"prompt": "a", "responses": ["b", 3]},
    "no prompt": {"responses": ["b", "c"]},
    "prompt ends with a reply": {"prompt": [USER, REPLY], "chosen": "b", "rejected": "c"},
    "two prompts": {"chosen": [USER, REPLY], "rejected": [{"role": "user", "content": "Bye"}, NO]},
    "no reply at the end": {"chosen": [USER, REPLY, USER], "rejected": [USER, REPLY]},
    "hh without turns": {"chosen": "good", "rejected": "bad"},
    "hh with a blank turn": {"chosen": f"\n\nHuman: {HH} b", "rejected": f"\n\nHuman: {HH} c"},
    "scores too few": {"prompt": "a", "responses": ["b", "c"], "scores": [1]},
    "scores no numbers": {"prompt": "a", "responses": ["b", "c"], "scores": ["1", "2"]},
    "a score that is none": {"prompt": "a", "responses": ["b", "c"], "scores": [1, float("nan")]},
}


@pytest.mark.parametrize("name", BAD_PREFERENCES)
def test_an_unusable_preference_is_left_out_and_counted(name, tmp_path):
    good = [{"prompt": "a", "responses": ["b", "c"]}] * 10
    path = write(tmp_path, *good, BAD_PREFERENCES[name])
    found = read_preferences(path)
    assert len(found) == 10 and found.unused == 1 and "(file.jsonl:11)" in found.report()
    assert ("KTO" in name) == ("KTO records" in found.report())
    assert ("conversations" == name) == ("found conversations" in found.report())


# ---- files, and training and validation

def test_several_files_a_folder_and_a_glob(tmp_path):
    """In the order of their names; content tells the form, not the name. Two kinds that need converting."""
    (tmp_path / "sub").mkdir()
    for number, name in enumerate(("a.json", "b.txt", "c,d.jsonl", "sub/e.jsonl.gz", "notes.md", ".b.json")):
        content = lines({"messages": said("x", str(number))})
        (tmp_path / name).write_bytes(gzip.compress(content) if number == 3 else content)

    def read(data) -> str:
        return "".join(chat.messages[1]["content"] for chat in read_chats(data))

    assert read(tmp_path) == "0123" and read(f"{tmp_path}/b.txt,{tmp_path}/a.json") == "10"
    assert read(f"{tmp_path}/c,d.jsonl") == "2" and read(f"{tmp_path}/[ab]*") == "01"
    assert read(f"{tmp_path}/notes.md") == "4" and len(find_files(f"{tmp_path}/**/*.gz")) == 1
    for name, content in (("t.parquet", b"PAR1..."), ("t.csv", b"a,b\n1,2\n")):
        (tmp_path / name).write_bytes(content)
        for reader in (read_chats, read_corpus):
            one_clear_line(lambda path, reader=reader: reader(str(path)), tmp_path, f"read_{name[2:]}('")
        (tmp_path / name).unlink()
    for nothing in ("none.jsonl", "*.xml", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        one_clear_line(read_chats, f"{tmp_path}/{nothing}", "no such file")


def test_what_cannot_be_read_is_one_clear_line(tmp_path):
    """A gzip that was cut or broken."""
    packed = gzip.compress(GOOD * 99)
    for content, word in ((packed[:60], "ended"), (packed[:10] + b"\xff" * 40, "invalid")):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        one_clear_line(read_chats, tmp_path / "a.jsonl.gz", "cannot be read", word)


def test_the_last_part_validates_and_nothing_stands_on_both_sides(tmp_path):
    """By place, if all are different; equal conversations stay together. A part of less than one, or
    --val_fraction 0: no validation, which is said."""
    chats = [{"messages": said(f"q{n}", "a")} for n in range(10)]
    for given, fraction, expected in ((chats, 0.2, "89"), (chats, 0.0, ""), (chats[:2], 0.1, ""),
                                      ([*chats, chats[1], chats[9]], 0.2, "899")):
        path = write(tmp_path, *given)
        cfg = SimpleNamespace(data=path, val_data="", val_fraction=fraction, strict=False)
        train, val, report, counts = split_of(read_chats, cfg)
        assert "".join(record.messages[0]["content"][1:] for record in val) == expected
        assert len(train) + len(val) == len(given) == counts["used"]
        assert ("no validation" in report) == (not val)
    with pytest.raises(UserError, match="--val_fraction"):
        split(read_chats(path), 1.0)
