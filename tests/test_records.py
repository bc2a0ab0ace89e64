"""The public record forms: what is read, and the one clear line for everything that is not."""
import gzip
import json

import pytest

from lib.program import UserError
from lib.records import read_chats, read_preferences, read_prompts, read_records, split_records

USER, REPLY = {"role": "user", "content": "Hi 你好"}, {"role": "assistant", "content": "Hello 🙂"}


def write(path, *records, form=".jsonl", compress=False):
    text = json.dumps(records, indent=1, ensure_ascii=False) if form == ".json" else \
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path = path / f"file{form}{'.gz' if compress else ''}"
    path.write_bytes(gzip.compress(text.encode()) if compress else text.encode())
    return str(path)


CHATS = {
    "messages": ({"messages": [USER, REPLY]}, [USER, REPLY]),
    "system and two turns": (
        {"messages": [{"role": "system", "content": "Be kind."}, USER, REPLY, USER, REPLY]},
        [{"role": "system", "content": "Be kind."}, USER, REPLY, USER, REPLY]),
    "alpaca without input": ({"instruction": "Hi 你好", "input": "", "output": "Hello 🙂"}, [USER, REPLY]),
    "alpaca without the key input": ({"instruction": "Hi 你好", "output": "Hello 🙂"}, [USER, REPLY]),
    "alpaca": ({"instruction": "将下列文本翻译成英文:", "input": "今天天气真好", "output": "Today is a nice day!"},
               [{"role": "user", "content": "将下列文本翻译成英文:\n今天天气真好"},
                {"role": "assistant", "content": "Today is a nice day!"}]),
    "sharegpt": ({"id": 7, "conversations": [{"from": "human", "value": "Hi 你好"},
                                             {"from": "gpt", "value": "Hello 🙂"}]}, [USER, REPLY]),
    "conversations with roles": ({"conversations": [USER, REPLY]}, [USER, REPLY]),
}


@pytest.mark.parametrize("form, compress", [(".json", False), (".jsonl", False), (".json", True), (".jsonl", True)])
@pytest.mark.parametrize("name", CHATS)
def test_every_chat_form_gives_the_same_messages(name, form, compress, tmp_path):
    """Array or lines, plain or gzip: the messages, and the line of the file where the record begins."""
    record, messages = CHATS[name]
    path = write(tmp_path, record, record, form=form, compress=compress)
    found = read_chats(path)
    assert [chat.messages for chat in found] == [messages, messages]
    lines = [int(chat.where.rpartition(":")[2]) for chat in found]
    if form == ".jsonl":
        assert lines == [1, 2]
    else:
        text = (gzip.open if compress else open)(path, "rb").read().decode().split("\n")
        assert lines[0] == 2 and text[lines[1] - 1].strip() == "{" and lines[1] > 2


PREFERENCES = {
    "text prompt": {"prompt": "Hi 你好", "chosen": "Hello 🙂", "rejected": "No."},
    "messages as prompt": {"prompt": [USER], "chosen": "Hello 🙂", "rejected": "No."},
    "alpaca": {"instruction": "Hi 你好", "input": "", "output": "-", "chosen": "Hello 🙂", "rejected": "No."},
    "replies as messages": {"prompt": [USER], "chosen": [REPLY], "rejected": [{"role": "assistant", "content": "No."}]},
    "whole conversations": {"prompt": "Hi 你好", "chosen": [USER, REPLY],
                            "rejected": [USER, {"role": "assistant", "content": "No."}]},
    "conversations alone": {"chosen": [USER, REPLY], "rejected": [USER, {"role": "assistant", "content": "No."}]},
    "hh": {"chosen": "\n\nHuman: Hi 你好\n\nAssistant: Hello 🙂", "rejected": "\n\nHuman: Hi 你好\n\nAssistant: No."},
    "ranked": {"prompt": "Hi 你好", "responses": ["Hello 🙂", "No."]},
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_every_preference_form_gives_prompt_and_ranked_replies(name, tmp_path):
    record, = read_preferences(write(tmp_path, PREFERENCES[name]))
    assert record.messages == [USER] and record.responses == ["Hello 🙂", "No."]


@pytest.mark.parametrize("read", [read_chats, read_prompts, read_preferences])
def test_alpaca_with_a_system_message(read, tmp_path):
    """"system" comes first; an empty one is none."""
    record = {"instruction": "a", "output": "b"} if read != read_preferences else {
        "instruction": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path, record | {"system": "Be brief."}, record | {"system": ""})
    with_one, without = ([(m["role"], m["content"]) for m in found.messages] for found in read(path))
    assert with_one == [("system", "Be brief."), *without] and without[0] == ("user", "a")


def test_hh_with_several_turns(tmp_path):
    """The prompt is all but the last turn; a colon or a newline inside a turn stays."""
    start = "\n\nHuman: a: b\nc\n\nAssistant: d\n\nHuman: e\n\nAssistant:"
    record, = read_preferences(write(tmp_path, {"chosen": start + " good", "rejected": start + " bad"}))
    assert [m["content"] for m in record.messages] == ["a: b\nc", "d", "e"] and record.responses == ["good", "bad"]


def test_tags_and_scores_are_carried(tmp_path):
    path = write(tmp_path, {"prompt": "a", "responses": ["b", "c"], "tags": ["x", "y"], "scores": [1, 0.5], "tag": "t"})
    record, = read_preferences(path)
    assert (record.tag, record.tags, record.scores) == ("t", ["x", "y"], [1, 0.5])


@pytest.mark.parametrize("record", [{"prompt": "Hi 你好"}, {"prompt": [USER]}, {"messages": [USER, REPLY]},
                                    {"instruction": "Hi 你好", "output": "x"}, {"prompt": "Hi 你好", "chosen": "x"}])
def test_prompts_from_prompts_and_from_conversations(record, tmp_path):
    assert read_prompts(write(tmp_path, record))[0].messages == [USER]


def test_split_is_the_last_part_of_the_records():
    assert split_records(list(range(10)), 0.2) == ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9])
    for fraction in (0.0, 0.01, 1.0):
        with pytest.raises(UserError, match="--val_fraction"):
            split_records(list(range(10)), fraction)


LONG = "x" * 1_000_000
GOOD = json.dumps({"messages": [USER, REPLY]}).encode()


def chat(*messages, **more):
    return json.dumps({"messages": list(messages), **more}).encode()


BAD = {  # what the file holds, and words that its one line of error must have
    "an empty file": (b"", ["no record"]),
    "blank lines alone": (b"\n \n", ["no record"]),
    "an empty array": (b"[]", ["no record"], ".json"),
    "no JSON": (b"hello\n", [":1:", "'hello'"]),
    "JSON cut off": (GOOD + b"\n" + GOOD[:30], [":2:", "JSON"]),
    "array cut off": (b"[" + GOOD + b",\n", [":2:", "end of the text"], ".json"),
    "two arrays": (b"[" + GOOD + b"]\n[]", [":2:", "'[]'"], ".json"),
    "one object instead of an array": (GOOD, [":1:", "dict", "array"], ".json"),
    "a comma at the end": (b"[" + GOOD + b"\n,]", [":2:"], ".json"),
    "single quotes": (b"{'messages': []}", [":1:", "double quotes"]),
    "a record over two lines": (b'{"messages":\n[]}', [":1:", "JSON"]),
    "two records on a line": (GOOD + GOOD, [":1:", "Extra data"]),
    "a number as record": (GOOD + b"\n7", [":2:", "int"]),
    "null as record": (b"[null]", [":1:", "NoneType"], ".json"),
    "an array as record": (b"[[]]", [":1:", "list"], ".json"),
    "other keys": (b'{"question": "a", "answer": "b"}', [":1:", "question", '"messages"']),
    "no keys": (b"{}", [":1:", '"messages"']),
    "instruction alone": (b'{"instruction": "a"}', [":1:", '"output"']),
    "nested instances": (b'{"id": "seed_task_0", "instruction": "a", "instances": [{"input": "", "output": "b"}]}',
                         [":1:", "instances", '"output"']),
    "messages is null": (b'{"messages": null}', [":1:", "NoneType", "list"]),
    "messages is a text": (b'{"messages": "Hi"}', [":1:", "str", "list"]),
    "no messages": (b'{"messages": []}', [":1:", "list"]),
    "a text as message": (b'{"messages": ["Hi"]}', [":1, message 1", "str"]),
    "no role": (b'{"messages": [{"content": "Hi"}]}', [":1, message 1", '"role"']),
    "no content": (b'{"messages": [{"role": "user"}]}', [":1, message 1", '"content"']),
    "mixed keys": (b'{"messages": [{"role": "user", "value": "Hi"}]}', [":1, message 1", '"from"']),
    "both kinds of keys": (chat({"role": "user", "from": "x", "value": "Hi"}), [":1, message 1", "'x'"]),
    "unknown role": (chat({"role": "tool", "content": "a"}), [":1, message 1", "tool", "assistant"]),
    "role is null": (chat({"role": None, "content": "a"}), [":1, message 1", "NoneType"]),
    "role is a list": (chat({"role": ["user"], "content": "a"}), [":1, message 1", "list"]),
    "a megabyte as role": (chat({"role": LONG, "content": "a"}), [":1, message 1", "xxx"]),
    "a megabyte as key": (json.dumps({LONG: 1}).encode(), [":1:", "xxx"]),
    "starts with the assistant": (chat(REPLY, USER), [":1, message 1", "assistant", "expected the user"]),
    "two user turns": (chat(USER, USER, REPLY), [":1, message 2", "user", "expected the assistant"]),
    "two replies": (chat(USER, REPLY, REPLY), [":1, message 3", "expected the user"]),
    "system in the middle": (chat(USER, {"role": "system", "content": "a"}, REPLY), [":1, message 2", "system"]),
    "two system messages": (chat(*[{"role": "system", "content": "a"}] * 2, USER, REPLY), [":1, message 2", "system"]),
    "ends with the user": (GOOD + b"\n" + chat(USER, REPLY, USER), [":2:", "ends with the user"]),
    "system alone": (chat({"role": "system", "content": "a"}), [":1:", "ends with the system"]),
    "content is null": (chat(USER, {"role": "assistant", "content": None}), [":1, message 2", "NoneType", "string"]),
    "content is a number": (chat(USER, {"role": "assistant", "content": 3}), [":1, message 2", "int", "string"]),
    "content is a list": (chat(USER, {"role": "assistant", "content": ["a"]}), [":1, message 2", "list", "string"]),
    "content is NaN": (b'{"messages": [{"role": "user", "content": NaN}]}', [":1:", "NaN"]),
    "content is infinite": (b'{"messages": [{"role": "user", "content": -Infinity}]}', [":1:", "Infinity"]),
    "empty reply": (chat(USER, {"role": "assistant", "content": ""}), [":1, message 2", "blank"]),
    "blank user turn": (chat({"role": "user", "content": " \n\u3000"}, REPLY), [":1, message 1", "blank"]),
    "blank instruction": (b'{"instruction": " ", "output": "a"}', [":1, \"instruction\"", "blank"]),
    "blank output": (b'{"instruction": "a", "output": ""}', [":1, \"output\"", "blank"]),
    "input is a number": (b'{"instruction": "a", "input": 3, "output": "b"}', [":1, \"input\"", "int"]),
    "the same key twice": (b'{"instruction": "a", "output": "b", "output": "c"}', [":1:", "twice"]),
    "half a character": (chat(USER, {"role": "assistant", "content": "ab\ud83d"}), [":1, message 2", "\\ud83d"]),
    "tag is a number": (chat(USER, REPLY, tag=3), [":1, \"tag\"", "int"]),
    "bad UTF-8": (GOOD + b"\n\xff\xfe", [":2:", "0xff", "UTF-8"]),
    "UTF-16": (b"\xff\xfe[\x00]\x00", [":1:", "UTF-8"], ".json"),
    "a truncated gzip": (gzip.compress(GOOD * 99)[:60], ["cannot be read"], ".jsonl.gz"),
    "no gzip": (GOOD, ["cannot be read"], ".jsonl.gz"),
    "many brackets": (b"[" * 100_000, [":1:"], ".json"),
    "a number of many digits": (b'{"messages": ' + b"9" * 10_000 + b"}", [":1"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_file_is_one_clear_line(name, tmp_path):
    """File, line, what was found, what was expected; short, whatever the file holds; nothing is written."""
    content, words, *form = BAD[name]
    path = tmp_path / f"bad{form[0] if form else '.jsonl'}"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_chats(path)
    message = str(caught.value)
    assert all(word in message for word in [str(path), *words]), message
    assert "\n" not in message and len(message) < 400 + len(str(path))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_list_of_malformed_files_is_long():
    assert len(BAD) >= 40


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf" + GOOD, GOOD + b"\r\n" + GOOD + b"\r\n", b"\n\n" + GOOD + b"\n\n"])
def test_byte_order_mark_crlf_and_blank_lines_are_no_errors(content, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert read_chats(tmp_path / "a.jsonl")[0].messages == [USER, REPLY]


BAD_PREFERENCES = {
    **{f"score {score}": {"prompt": "a", "responses": ["b", "c"], "scores": [score, 1]}
       for score in (True, "2", float("nan"), float("inf"), 10**400)},
    "one response": {"prompt": "a", "responses": ["b"]}, "no responses": {"prompt": "a", "responses": {}},
    "blank response": {"prompt": "a", "responses": ["b", " "]}, "a number": {"prompt": "a", "responses": ["b", 3]},
    "no prompt": {"responses": ["b", "c"]}, "rejected alone": {"prompt": "a", "rejected": "b"},
    "blank prompt": {"prompt": "", "chosen": "b", "rejected": "c"},
    "prompt ends with a reply": {"prompt": [USER, REPLY], "chosen": "b", "rejected": "c"},
    "two prompts": {"chosen": [USER, REPLY], "rejected": [{"role": "user", "content": "Bye"}, REPLY]},
    "no reply at the end": {"chosen": [USER, REPLY, USER], "rejected": [USER, REPLY]},
    "hh without turns": {"chosen": "good", "rejected": "bad"},
    "tags too few": {"prompt": "a", "responses": ["b", "c"], "tags": ["x"]},
    "scores no numbers": {"prompt": "a", "responses": ["b", "c"], "scores": ["1", "2"]},
}


@pytest.mark.parametrize("name", BAD_PREFERENCES)
def test_a_malformed_preference_is_one_clear_line(name, tmp_path):
    path = write(tmp_path, {"prompt": "a", "responses": ["b", "c"]}, BAD_PREFERENCES[name])
    with pytest.raises(UserError) as caught:
        read_preferences(path)
    assert f"{path}:2" in str(caught.value) and "found" in str(caught.value) and "\n" not in str(caught.value)


def test_a_score_beyond_all_numbers_is_refused(tmp_path):
    """JSON knows no infinity, but 1e999 is one when it is read."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "responses": ["b", "c"], "scores": [1e999, 1]}\n')
    with pytest.raises(UserError, match="a.jsonl:1.*scores"):
        read_preferences(tmp_path / "a.jsonl")


def test_records_of_an_array_are_those_of_json(tmp_path):
    """Nested brackets, commas and quotes in strings, any white space between: json.loads is the oracle."""
    records = [{"a": "]],[", "b": [1, {"c": []}]}, {}, {"d": "\\\"]"}, {"e": "\u2028"}]
    plain = json.dumps(records)
    for text in (plain, json.dumps(records, indent=3), " \n" + plain.replace(", ", " ,\n ")):
        (tmp_path / "a.json").write_text(text)
        assert [record for _, record in read_records(tmp_path / "a.json")] == json.loads(text)
