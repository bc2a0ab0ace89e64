"""Files of records in the public forms: a JSON array or one record per line, plain or .gz.

    read_chats         conversations that end with a reply
    read_prompts       conversations that wait for a reply
    read_preferences   prompts with two or more replies, the best first
    read_records       any records, each with its place for error messages

The keys of a record tell its form: see CHATS, PROMPTS and REPLIES. An unusable record is a UserError.
"""
import dataclasses
import functools
import gzip
import json
import random
import re
import zlib
from collections.abc import Iterator

from lib.program import UserError


def read_text(path) -> str:
    """A whole UTF-8 file, plain or .gz. CRLF stays CRLF; a byte order mark is dropped."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            content = file.read()
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: found byte 0x{content[error.start]:02x} at offset {error.start}, "
                        "expected UTF-8; convert the file, for example with iconv -t UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def load_json(text: str, path, line: int = 1, decode=json.loads):
    """decode(text). line: named in an error that knows no line of its own."""
    try:
        return decode(text)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
        raise UserError(f"{path}:{getattr(error, 'lineno', line)}: found no valid JSON: {error}") from None


def read_records(path) -> Iterator[tuple[str, dict]]:
    """(where, record) for each record; where is "file:line". An array and lines are read alike: the commas,
    brackets and white space between two records are skipped. But an array must end, or records are lost."""
    text, decoder, between = read_text(path), json.JSONDecoder(), re.compile(r"[\s,\[\]]*")
    line, end = 1, 0
    while (start := between.match(text, end).end()) < len(text):
        line += text.count("\n", end, start)
        record, end = load_json(text, path, decode=functools.partial(decoder.raw_decode, idx=start))
        if not isinstance(record, dict):
            raise UserError(f"{path}:{line}: found {found_in(record)}, expected a record {{...}}")
        yield f"{path}:{line}", record
        line += text.count("\n", start, end)
    if text.lstrip().startswith("[") and not text.rstrip().endswith("]"):
        raise UserError(f"{path}:{line}: found an array without an end, expected ]; the file may be cut off")


@dataclasses.dataclass
class Record:
    """A conversation [{"role": system | user | assistant, "content": text}, ...]; or a prompt and replies."""
    where: str  # file and line
    messages: list[dict]
    responses: list[str] = dataclasses.field(default_factory=list)  # the best first
    tag: str = ""  # this and the next two are reported, never trained on
    tags: list[str] = dataclasses.field(default_factory=list)  # one per response, or none
    scores: list[float] = dataclasses.field(default_factory=list)
    negative: bool = False  # made by random_negatives


def check_text(text, where: str, blank: bool = True) -> str:
    """The text. UserError for another type, for half a surrogate pair and, if not blank, for no words."""
    if not isinstance(text, str):
        raise UserError(f"{where}: found {type(text).__name__}, expected a string")
    if half := re.search("[\ud800-\udfff]", text):  # JSON can hold it, UTF-8 cannot
        raise UserError(f"{where}: found half a character {half[0]!a} at {half.start()}, expected it whole")
    if not blank and not text.strip():
        raise UserError(f"{where}: found a blank text, expected words; remove the record or fill it in")
    return text


def found_in(value) -> str:
    """What stands there instead of what we want (of a record: its keys), short enough for one line."""
    return f"{type(value).__name__} {ascii(list(value) if isinstance(value, dict) else value)[:40]}"


def by_form(forms: dict, record, where: str):
    """forms: {keys: function(record, where)}. Applies the first function whose keys the record has."""
    for keys, function in forms.items():
        if isinstance(record, dict) and all(key in record for key in keys):
            return function(record, where)
    expected = " or ".join(" and ".join(f'"{key}"' for key in keys) for keys in forms)
    raise UserError(f"{where}: found {found_in(record)}, expected the keys {expected}")


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
TURNS = {("role", "content"): lambda turn, where: (turn["role"], turn["content"]),
         ("from", "value"): lambda turn, where: (turn["from"], turn["value"])}


def messages_of(turns, where: str) -> list[dict]:
    """A list of turns as messages: system (if any), then user and assistant in turn. A text is the user's."""
    turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: found {found_in(turns)}, expected a list of messages")
    messages = []
    for i, turn in enumerate(turns, start=1):
        spot = f"{where}, message {i}"
        name, content = by_form(TURNS, turn, spot)
        role = ROLES.get(str(name))
        due = "assistant" if messages and messages[-1]["role"] == "user" else "user"
        if role != due and not (i == 1 and role == "system"):
            raise UserError(f"{spot}: found the role {found_in(name)}, expected the {due}; turns alternate")
        messages.append({"role": role, "content": check_text(content, spot, blank=False)})
    return messages


def alpaca_prompt(record: dict, where: str) -> list[dict]:
    """The system message if any; then the instruction and, on a line of its own, the input if any."""
    text, extra, system = (check_text(record.get(key, ""), f'{where}, "{key}"', blank=key != "instruction")
                           for key in ("instruction", "input", "system"))
    turns = [{"role": "system", "content": system}] if system.strip() else []
    return [*turns, {"role": "user", "content": f"{text}\n{extra}" if extra.strip() else text}]


def hh_turns(text: str) -> list[dict]:
    """Anthropic's HH form, "\\n\\nHuman: ...\\n\\nAssistant: ..."; [] for another text."""
    start, *parts = re.split(r"(?:\n\n|^)(Human|Assistant):", text)
    return [{"role": "user" if name == "Human" else "assistant", "content": content.strip()}
            for name, content in zip(parts[::2], parts[1::2]) if not start.strip()]


# The forms: the keys that tell each, and what it makes of (record, where).
CHATS = {("messages",): lambda record, where: messages_of(record["messages"], where),
         ("conversations",): lambda record, where: messages_of(record["conversations"], where),
         ("instruction", "output"): lambda record, where: messages_of(
             [*alpaca_prompt(record, where), {"role": "assistant", "content": record["output"]}], where)}
PROMPTS = {("prompt",): lambda record, where: messages_of(record["prompt"], f'{where}, "prompt"'),
           ("instruction",): alpaca_prompt,
           ("chosen", "rejected"): lambda record, where: preference_of(record, where).messages,
           **{keys: lambda record, where: chat_of(record, where).messages[:-1] for keys in CHATS}}
REPLIES = {("responses",): lambda record, where: record["responses"],
           ("chosen", "rejected"): lambda record, where: [record["chosen"], record["rejected"]]}


def conversation_of(role: str, forms: dict, record: dict, where: str) -> Record:
    messages = by_form(forms, record, where)
    if (last := messages[-1]["role"]) != role:
        raise UserError(f"{where}: found a conversation that ends with the {last}, expected the {role}")
    return Record(where, messages)


chat_of = functools.partial(conversation_of, "assistant", CHATS)  # (record, where) -> Record
prompt_of = functools.partial(conversation_of, "user", PROMPTS)


def preference_of(record: dict, where: str) -> Record:
    """A prompt and two or more replies. A reply is a text, or a whole conversation that ends with it."""
    replies = by_form(REPLIES, record, where)
    if not isinstance(replies, list) or len(replies) < 2:
        raise UserError(f'{where}: found {found_in(replies)} as "responses", expected a list of two or more')
    alone = "prompt" not in record and "instruction" not in record  # the replies bring the prompt with them
    prompt, texts = [] if alone else prompt_of(record, where).messages, []
    for i, reply in enumerate(replies, start=1):
        if isinstance(reply, str):
            reply = hh_turns(reply) if alone else [{"role": "assistant", "content": reply}]
        turns = prompt + reply if isinstance(reply, list) and len(reply) == 1 else reply
        messages = messages_of(turns, f"{where}, reply {i}")
        if messages[-1]["role"] != "assistant" or (i > 1 and messages[:-1] != prompt):
            raise UserError(f"{where}, reply {i}: found no reply or another prompt, expected one for all")
        prompt, texts = messages[:-1], [*texts, messages[-1]["content"]]
    return Record(where, prompt, texts)


def read(path, record_of) -> list[Record]:
    records = []
    for where, content in read_records(path):
        record = record_of(content, where)
        record.tag = check_text(content.get("tag", ""), f'{where}, "tag"')
        for name, types in {"tags": str, "scores": (int, float)}.items() if record.responses else ():
            values = content.get(name, [])
            if not isinstance(values, list) or len(values) not in (0, len(record.responses)) or not all(
                    isinstance(value, types) for value in values):
                raise UserError(f'{where}: found {found_in(values)} as "{name}", expected one per response')
            setattr(record, name, values)
        records.append(record)
    if not records:
        raise UserError(f"{path}: found no record, expected at least one")
    return records


read_chats = functools.partial(read, record_of=chat_of)  # (path) -> list[Record]
read_prompts = functools.partial(read, record_of=prompt_of)
read_preferences = functools.partial(read, record_of=preference_of)


def split_records(records: list, val_fraction: float, val_records: list | None = None) -> tuple[list, list]:
    """(training, validation): validation is val_records, or else the last val_fraction of the records."""
    if val_records is not None:
        return records, val_records
    n = round(len(records) * (1 - val_fraction))
    if not 0 < n < len(records):
        raise UserError(f"--val_fraction {val_fraction}: {len(records)} records cannot be split like that")
    return records[:n], records[n:]


def split_prompts(records: list[Record], val_fraction: float, val_records: list[Record] | None = None):
    """(training, validation), no prompt on both sides: who has learned one reply judges the others too well.
    Validation is val_records, or the last val_fraction of the prompts."""
    by_prompt = {}
    for record in records:
        by_prompt.setdefault(json.dumps(record.messages), []).append(record)
    if val_records is None:
        parts = split_records(list(by_prompt.values()), val_fraction)
        return tuple([record for group in part for record in group] for part in parts)
    for record in val_records:
        by_prompt.pop(json.dumps(record.messages), None)
    if not by_prompt:
        raise UserError("--val_data: found every prompt of --data in it, expected others")
    return [record for group in by_prompt.values() for record in group], val_records


def random_negatives(records: list[Record], n: int, seed: int) -> list[Record]:
    """n more pairs for each prompt: its best reply above a reply to another prompt. Rankings say nothing of
    what no model said to a prompt, but PPO may try it (docs/rm.md). Karpukhin et al. 2020, section 3.2."""
    rng = random.Random(seed)
    drawn = [(a, b, rng.choice(b.responses)) for a in records for b in rng.choices(records, k=n)]
    return [dataclasses.replace(a, responses=[a.responses[0], reply], tags=[], scores=[], negative=True)
            for a, b, reply in drawn if a.messages != b.messages and reply not in a.responses]
