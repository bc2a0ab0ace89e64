"""Public record forms: what is read of them, and the one clear line for all that is not."""
import gzip
import json

import pytest

from lib import records
from lib.program import UserError
from lib.records import read_chats, read_preferences, read_prompts, read_records

USER, REPLY = {"role": "user", "content": "Hi 你好"}, {"role": "assistant", "content": "Hello 🙂"}
SYSTEM, NO = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "No."}


def lines(*records) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def write(folder, *records):
    (folder / "file.jsonl").write_bytes(lines(*records))
    return folder / "file.jsonl"


CHATS = {
    "messages": ({"messages": [SYSTEM, USER, REPLY, USER, REPLY]}, [SYSTEM, USER, REPLY, USER, REPLY]),
    "alpaca, empty input": ({"instruction": "Hi 你好", "input": "", "output": "Hello 🙂"}, [USER, REPLY]),
    "alpaca": ({"instruction": "翻译:", "input": "今天", "output": "Hello 🙂", "system": "Be kind."},
               [SYSTEM, {"role": "user", "content": "翻译:\n今天"}, REPLY]),
    "sharegpt": ({"id": 7, "conversations": [{"from": "human", "value": "Hi 你好"},
                                             {"from": "gpt", "value": "Hello 🙂"}]}, [USER, REPLY]),
    "conversations with roles": ({"conversations": [USER, REPLY]}, [USER, REPLY]),
}


@pytest.mark.parametrize("name", CHATS)
def test_every_chat_form_gives_the_same_messages(name, tmp_path):
    """Array or lines, plain or gzip: the messages, and the line of the file where each record begins."""
    record, messages = CHATS[name]
    array = json.dumps([record, record], indent=1, ensure_ascii=False)
    second = [i for i, line in enumerate(array.split("\n"), start=1) if line == " {"][1]
    for content, where in ((lines(record, record), [1, 2]), (array.encode(), [2, second])):
        for path, data in ((tmp_path / "a.json", content), (tmp_path / "a.jsonl.gz", gzip.compress(content))):
            path.write_bytes(data)
            found = read_chats(path)
            assert [chat.messages for chat in found] == [messages, messages]
            assert [chat.where for chat in found] == [f"{path}:{line}" for line in where]


PREFERENCES = {
    "text prompt": {"prompt": "Hi 你好", "chosen": "Hello 🙂", "rejected": "No."},
    "messages as prompt": {"prompt": [USER], "chosen": "Hello 🙂", "rejected": "No."},
    "alpaca": {"instruction": "Hi 你好", "input": "", "output": "-", "chosen": "Hello 🙂", "rejected": "No."},
    "replies as messages": {"prompt": [USER], "chosen": [REPLY], "rejected": [NO]},
    "whole conversations": {"prompt": "Hi 你好", "chosen": [USER, REPLY], "rejected": [USER, NO]},
    "conversations alone": {"chosen": [USER, REPLY], "rejected": [USER, NO]},
    "hh": {"chosen": "\n\nHuman: Hi 你好\n\nAssistant: Hello 🙂",
           "rejected": "\n\nHuman: Hi 你好\n\nAssistant: No."},
    "ranked": {"prompt": "Hi 你好", "responses": ["Hello 🙂", "No."]},
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_every_preference_form_gives_prompt_and_ranked_replies(name, tmp_path):
    """The best reply first; the same file also gives its prompts."""
    path = write(tmp_path, PREFERENCES[name])
    record, = read_preferences(path)
    assert record.messages == [USER] and record.responses == ["Hello 🙂", "No."]
    assert read_prompts(path)[0].messages == [USER]


def test_hh_turns_and_what_stands_beside_responses(tmp_path):
    """In HH a colon or a newline inside a turn stays. Tags and scores are carried."""
    start = "\n\nHuman: a: b\nc\n\nAssistant: d\n\nHuman: e\n\nAssistant:"
    hh, ranked = read_preferences(write(tmp_path, {"chosen": start + " good", "rejected": start + " bad"}, {
        "prompt": "a", "responses": ["b", "c"], "tags": ["x", "y"], "scores": [1, 0.5], "tag": "t"}))
    assert [m["content"] for m in hh.messages] == ["a: b\nc", "d", "e"] and hh.responses == ["good", "bad"]
    assert (ranked.tag, ranked.tags, ranked.scores) == ("t", ["x", "y"], [1, 0.5])


@pytest.mark.parametrize("record", [{"prompt": "Hi 你好"}, {"prompt": [USER]}, {"messages": [USER, REPLY]},
                                    {"conversations": [USER, REPLY]}, {"instruction": "Hi 你好"},
                                    {"prompt": "Hi 你好", "chosen": "x"}])
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
        assert [record for _, record in read_records(tmp_path / "a.json")] == found


LONG = "x" * 1_000_000
GOOD = lines({"messages": [USER, REPLY]})


def chat(*messages):
    return lines({"messages": list(messages)})


BAD = {  # what the file holds, and words that its one line of error must have
    "blank lines alone": (b"\n \n", ["no record"]),
    "no JSON": (b"hello\n", [":1:", "JSON"]),
    "JSON cut off": (GOOD + GOOD[:30], [":2:", "JSON"]),
    "array cut off": (b"\n[" + GOOD + b", " + GOOD, [":3:", "without an end"]),
    "single quotes": (b"{'messages': []}", [":1:", "double quotes"]),
    "other keys": (b'{"question": "a"}', [":1:", "question", '"messages"', '"instruction" and "output"']),
    "messages is null": (b'{"messages": null}', [":1:", "NoneType", "list"]),
    "mixed keys": (b'{"messages": [{"role": "user", "value": "Hi"}]}', [":1, message 1", '"from"']),
    "unknown role": (chat({"role": "tool", "content": "a"}), [":1, message 1", "tool", "the user"]),
    "role is a list": (chat({"role": ["user"], "content": "a"}), [":1, message 1", "list"]),
    "a megabyte as role": (chat({"role": LONG, "content": "a"}), [":1, message 1", "xxx"]),
    "starts with the assistant": (chat(REPLY, USER), [":1, message 1", "assistant", "expected the user"]),
    "two user turns": (chat(USER, USER, REPLY), [":1, message 2", "user", "expected the assistant"]),
    "system in the middle": (chat(USER, SYSTEM, REPLY), [":1, message 2", "system"]),
    "ends with the user": (GOOD + chat(USER, REPLY, USER), [":2:", "ends with the user"]),
    "content is null": (chat(USER, {"role": "assistant", "content": None}), [":1, message 2", "NoneType"]),
    "blank user turn": (chat({"role": "user", "content": " \n\u3000"}, REPLY), [":1, message 1", "blank"]),
    "blank instruction": (b'{"instruction": " ", "output": "a"}', [":1, \"instruction\"", "blank"]),
    "input is a number": (b'{"instruction": "a", "input": 3, "output": "b"}', [":1, \"input\"", "int"]),
    "half a character": (b'{"instruction": "a", "output": "ab\\ud83d"}', [":1, message 2", "\\ud83d"]),
    "bad UTF-8": (GOOD + b"\xff\xfe", [":2:", "0xff", "UTF-8"]),
}


def one_clear_line(reader, path, *words):
    with pytest.raises(UserError) as caught:
        reader(path)
    message = str(caught.value)
    assert all(word in message for word in [str(path), *words]), message
    assert "\n" not in message and len(message) < 400 + len(str(path))


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_file_is_one_clear_line(name, tmp_path):
    """File, line, what was found, what was expected; short, whatever the file holds."""
    content, words = BAD[name]
    (tmp_path / "bad.jsonl").write_bytes(content)
    one_clear_line(read_chats, tmp_path / "bad.jsonl", *words)


def test_what_cannot_be_read_is_one_clear_line(tmp_path):
    """A gzip that was cut, broken, or is none; nothing there; a folder; thousands of brackets."""
    for content, word in ((gzip.compress(GOOD * 99)[:60], "ended"), (GOOD, "gzip"),
                          (gzip.compress(GOOD)[:10] + b"\xff" * 40, "invalid")):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        one_clear_line(read_chats, tmp_path / "a.jsonl.gz", "cannot be read", word)
    one_clear_line(read_chats, tmp_path / "none.jsonl", "No such file")
    one_clear_line(read_chats, tmp_path, "directory")
    one_clear_line(lambda path: records.load_json("[" * 100_000, path), "a.json", ":1:")


BAD_PREFERENCES = {
    "one response": {"prompt": "a", "responses": ["b"]},
    "no list": {"prompt": "a", "responses": {}},
    "blank response": {"prompt": "a", "responses": ["b", " "]},
    "a number": {"prompt": "a", "responses": ["b", 3]},
    "no prompt": {"responses": ["b", "c"]},
    "prompt ends with a reply": {"prompt": [USER, REPLY], "chosen": "b", "rejected": "c"},
    "two prompts": {"chosen": [USER, REPLY], "rejected": [{"role": "user", "content": "Bye"}, REPLY]},
    "no reply at the end": {"chosen": [USER, REPLY, USER], "rejected": [USER, REPLY]},
    "hh without turns": {"chosen": "good", "rejected": "bad"},
    "hh after a text": dict.fromkeys(("chosen", "rejected"), "x\n\nHuman: a\n\nAssistant: b"),
    "tags too few": {"prompt": "a", "responses": ["b", "c"], "tags": ["x"]},
    "scores no numbers": {"prompt": "a", "responses": ["b", "c"], "scores": ["1", "2"]},
}


@pytest.mark.parametrize("name", BAD_PREFERENCES)
def test_a_malformed_preference_is_one_clear_line(name, tmp_path):
    path = write(tmp_path, {"prompt": "a", "responses": ["b", "c"]}, BAD_PREFERENCES[name])
    one_clear_line(read_preferences, path, f"{path}:2", "found", "expected")


def test_split_is_the_last_part_of_the_records():
    assert records.split_records(list(range(10)), 0.2) == ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9])
    for fraction in (0.01, 1.0):
        with pytest.raises(UserError, match="--val_fraction"):
            records.split_records(list(range(10)), fraction)
