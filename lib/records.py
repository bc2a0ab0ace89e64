"""Files of records, in the public forms, told apart by their keys: .json arrays or .jsonl lines, plain or .gz.

    read_chats         {"messages"}, Alpaca {"instruction", "input", "output"}, ShareGPT {"conversations"}
    read_prompts       {"prompt"}, or conversations of which the last reply is left away
    read_preferences   {"prompt", "chosen", "rejected"}, Alpaca or HH with these two, ranked {"prompt", "responses"}
    read_records       any records, each with its place for error messages

What cannot be used is a UserError with file, line, what was found and what was expected; a file is taken whole or not.
"""
from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import os
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from lib.program import UserError

# ---- reading files ------------------------------------------------------------------------------------------------

GZIP_FREE, GZIP_RATIO = 64 * 2**20, 100  # text shrinks to a third or a tenth; a bomb, to a thousandth


def read_text(path) -> str:
    """A whole UTF-8 file, plain or .gz. CRLF stays CRLF; a byte order mark is dropped."""
    if not os.path.isfile(path):  # to open a pipe could wait for ever
        raise UserError(f"{path}: found no such file")
    try:
        packed, limit = str(path).endswith(".gz"), GZIP_FREE + GZIP_RATIO * os.path.getsize(path)
        with (gzip.open if packed else open)(path, "rb") as file:
            content = file.read(limit + 1 if packed else -1)
        if packed and len(content) > limit:
            raise UserError(f"{path}: found {os.path.getsize(path)} bytes that unpack to more than {limit}, expected a "
                            "text; unpack it by hand if it is one")
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: found byte 0x{content[error.start]:02x} at offset {error.start} of the file, "
                        "expected UTF-8; convert it, for example with iconv -t UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def unique_keys(pairs: list[tuple]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("the same key twice in one object")
    return dict(pairs)


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_no_constant)


def load_json(text: str, path, line: int):
    """Parse JSON that begins in this line of the file."""
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        found = repr(text[error.pos : error.pos + 20]) if error.pos < len(text) else "the end of the text"
        raise UserError(f"{path}:{line + error.lineno - 1}: found {found}, expected JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # also a number of many thousand digits, many thousand brackets
        raise UserError(f"{path}:{line}: found JSON that is not accepted ({error}); mend it") from None


def array_items(text: str) -> Iterator[tuple[int, object]]:
    """(line, item) of every item of a JSON array that is known to be valid."""
    at = text.index("[") + 1
    line = 1 + text.count("\n", 0, at)
    while True:
        start = re.compile(r"[\s,]*").match(text, at).end()
        line += text.count("\n", at, start)
        if text[start] == "]":
            return
        item, at = DECODER.raw_decode(text, start)
        yield line, item
        line += text.count("\n", start, at)


def read_records(path) -> Iterator[tuple[str, dict]]:
    """(where, record) of a .json array or of .jsonl lines, plain or .gz; `where` begins the record's error messages."""
    text = read_text(path)
    if ".jsonl" in Path(path).suffixes:
        lines = enumerate(text.split("\n"), start=1)  # not splitlines: U+2028 may stand in a string
        found = ((number, load_json(line, path, number)) for number, line in lines if line.strip())
    else:
        kind = type(load_json(text, path, 1)).__name__
        if kind != "list":
            raise UserError(f"{path}:1: found one JSON {kind}, expected an array of records [...]")
        found = array_items(text)
    for line, record in found:
        if not isinstance(record, dict):
            raise UserError(f"{path}:{line}: found a JSON {type(record).__name__}, expected a record {{...}}")
        yield f"{path}:{line}", record


def check_text(text, where: str) -> str:
    """The text itself. JSON can also hold other things, and half a surrogate pair, which is no character."""
    if not isinstance(text, str):
        raise UserError(f"{where}: found {type(text).__name__}, expected a string")
    if half := re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: found half a character, {half[0]!a}, at {half.start()}, expected whole ones")
    return text


# ---- records in the public forms ------------------------------------------------------------------------------------

@dataclasses.dataclass
class Record:
    """messages: a conversation that ends with a reply, or (prompts and preferences) one that waits for it, as
    {"role": system | user | assistant, "content": text}; responses: replies to it, the best first; tags and scores:
    one for each of them, or none; they are reported, never trained on. negative: made by random_negatives. where: file
    and line, for error messages."""
    where: str
    messages: list[dict]
    responses: list[str] = dataclasses.field(default_factory=list)
    tag: str = ""
    tags: list[str] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    negative: bool = False


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def text_of(content, where: str) -> str:
    if not check_text(content, where).strip():
        raise UserError(f"{where}: found a blank text, expected words; remove the record or fill it in")
    return content


def found_in(value) -> str:
    """What stands there instead of what we want, short enough for one line."""
    return f"{type(value).__name__} {ascii(value)[:40]}"


def turn_texts(turns, where: str) -> list[dict]:
    """[{"role", "content"}] from a list of {"role", "content"} or {"from", "value"}: an optional system turn, then user
    and assistant by turns, none of them blank."""
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: found {found_in(turns)}, expected a list of messages")
    messages = []
    for i, turn in enumerate(turns, start=1):
        spot = f"{where}, message {i}"
        if isinstance(turn, dict) and {"role", "content"} <= turn.keys():
            role, content = turn["role"], turn["content"]
        elif isinstance(turn, dict) and {"from", "value"} <= turn.keys():
            role, content = turn["from"], turn["value"]
        else:
            raise UserError(f'{spot}: found {found_in(turn)}, expected {{"role", "content"}} or {{"from", "value"}}')
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"{spot}: found the role {found_in(role)}, expected one of {', '.join(ROLES)}")
        expected = "assistant" if messages and messages[-1]["role"] == "user" else "user"
        if ROLES[role] != expected and not (i == 1 and role == "system"):
            raise UserError(f"{spot}: found a turn of the {ROLES[role]}, expected the {expected}; turns alternate")
        messages.append({"role": ROLES[role], "content": text_of(content, spot)})
    return messages


def alpaca_prompt(record: dict, where: str) -> list[dict]:
    """Instruction and, on a line of its own, the input if there is one; "system" if there is one."""
    instruction = text_of(record["instruction"], f'{where}, "instruction"')
    extra = check_text(record.get("input", ""), f'{where}, "input"')
    system = check_text(record.get("system", ""), f'{where}, "system"')
    turns = [{"role": "system", "content": system}] if system.strip() else []
    return [*turns, {"role": "user", "content": f"{instruction}\n{extra}" if extra.strip() else instruction}]


def hh_messages(text, where: str) -> list[dict]:
    """Anthropic's HH form: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    parts = re.split(r"(?:\n\n|^)(Human|Assistant):", check_text(text, where))
    if parts[0].strip() or len(parts) < 3:
        raise UserError(f'{where}: found {found_in(text)}, expected "\\n\\nHuman: ...\\n\\nAssistant: ..."')
    return turn_texts([{"from": "human" if name == "Human" else "gpt", "value": content.strip()}
                       for name, content in zip(parts[1::2], parts[2::2])], where)


def chat_of(record: dict, where: str) -> Record:
    """A conversation that ends with a reply."""
    if "messages" in record or "conversations" in record:
        messages = turn_texts(record.get("messages", record.get("conversations")), where)
    elif {"instruction", "output"} <= record.keys():
        reply = {"role": "assistant", "content": text_of(record["output"], f'{where}, "output"')}
        messages = [*alpaca_prompt(record, where), reply]
    else:
        raise UserError(f'{where}: found the keys {found_in(list(record))}, expected "messages", "conversations", or '
                        '"instruction" and "output"')
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: found a conversation that ends with the {messages[-1]['role']}, expected a reply")
    return Record(where, messages)


def prompt_of(record: dict, where: str) -> Record:
    """{"prompt"}, a text or messages, or a conversation of which the last reply is left away."""
    if "prompt" in record:
        prompt = record["prompt"]
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = turn_texts(turns, f'{where}, "prompt"')
    elif "instruction" in record:
        messages = alpaca_prompt(record, where)
    elif {"chosen", "rejected"} <= record.keys():
        messages = preference_of(record, where).messages
    else:
        messages = chat_of(record, where).messages[:-1]
    if messages[-1]["role"] != "user":
        raise UserError(f"{where}: found a prompt that ends with the {messages[-1]['role']}, expected the user")
    return Record(where, messages)


def preference_of(record: dict, where: str) -> Record:
    """A prompt and two or more replies, the best first."""
    if not {"chosen", "rejected"} <= record.keys() and "responses" not in record:
        raise UserError(f'{where}: found the keys {found_in(list(record))}, expected "prompt" with "chosen" and '
                        '"rejected", or with "responses"')
    replies = record["responses"] if "responses" in record else [record["chosen"], record["rejected"]]
    if not isinstance(replies, list) or len(replies) < 2:
        raise UserError(f'{where}: found {found_in(replies)} as "responses", expected a list of two or more')
    alone = "prompt" not in record and "instruction" not in record  # each reply brings the conversation before it
    prompt = None if alone else prompt_of(record, where).messages
    texts = []
    for i, reply in enumerate(replies, start=1):
        spot = f"{where}, reply {i}"
        if alone and isinstance(reply, str):
            reply = hh_messages(reply, spot)
        if isinstance(reply, list):  # a conversation: its last turn is the reply, what comes before it the prompt
            head = turn_texts(reply[:-1], spot) if len(reply) > 1 else prompt
            full = turn_texts([*(head or ()), *reply[-1:]], spot)
            if full[-1]["role"] != "assistant" or (i > 1 and full[:-1] != prompt):
                raise UserError(f"{spot}: found another prompt or no reply at its end, expected one prompt for all")
            prompt, reply = full[:-1], full[-1]["content"]
        texts.append(text_of(reply, spot))
    return Record(where, prompt, texts)


def read(path, record_of) -> list[Record]:
    """All records of a file, or UserError naming the first line that cannot be used."""
    records = []
    for where, content in read_records(path):
        record = record_of(content, where)
        record.tag = check_text(content.get("tag", ""), f'{where}, "tag"')
        for name, what, right in (("tags", "text", lambda tag: isinstance(tag, str)),
                                  ("scores", "number", lambda x: type(x) in (int, float) and abs(x) < 1e300)):
            values = content.get(name, []) if record.responses else []
            if not isinstance(values, list) or len(values) not in (0, len(record.responses)) or \
                    not all(map(right, values)):
                raise UserError(f'{where}: found {found_in(values)} as "{name}", expected one {what} per response')
            setattr(record, name, values)
        records.append(record)
    if not records:
        raise UserError(f"{path}: found no record, expected at least one")
    return records


def read_chats(path) -> list[Record]:
    return read(path, chat_of)


def read_prompts(path) -> list[Record]:
    return read(path, prompt_of)


def read_preferences(path) -> list[Record]:
    return read(path, preference_of)


def split_records(records: list, val_fraction: float) -> tuple[list, list]:
    """(training, validation): validation is the last val_fraction of the records."""
    n = round(len(records) * (1 - val_fraction))
    if not 0 < n < len(records):
        raise UserError(f"--val_fraction {val_fraction}: {len(records)} records cannot be split like that")
    return records[:n], records[n:]


def split_prompts(records: list[Record], val_fraction: float, val_records: list[Record] | None = None):
    """(training, validation), no prompt on both sides: what was learned about one reply to a prompt would flatter
    the judgement of another. Validation is val_records, or the last val_fraction of the prompts."""
    by_prompt = {}
    for record in records:
        by_prompt.setdefault(json.dumps(record.messages), []).append(record)
    if val_records is None:
        parts = split_records(list(by_prompt.values()), val_fraction)
        return tuple(list(itertools.chain(*part)) for part in parts)
    for record in val_records:
        by_prompt.pop(json.dumps(record.messages), None)
    if not by_prompt:
        raise UserError("--val_data: found every prompt of --data in it, expected others")
    return list(itertools.chain(*by_prompt.values())), val_records


def random_negatives(records: list[Record], n: int, seed: int) -> list[Record]:
    """Each prompt n times more, as a pair: its best reply above a reply to another prompt.

    Rankings compare what one model said to one prompt, and say nothing of what it never said there; that is where PPO
    looks for reward (docs/rm.md). Usual in retrieval (Karpukhin et al. 2020, section 3.2).
    """
    rng = random.Random(seed)
    drawn = [(record, other, rng.choice(other.responses)) for record in records for other in rng.choices(records, k=n)]
    return [dataclasses.replace(record, responses=[record.responses[0], reply], tags=[], scores=[], negative=True)
            for record, other, reply in drawn if other.messages != record.messages and reply not in record.responses]
