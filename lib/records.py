"""Files of records in the public forms: a JSON array or one record per line, plain or .gz.

    read_records       dicts as they stand there
    read_chats         conversations with replies to learn
    read_prompts       conversations that wait for a reply
    read_preferences   prompts with two or more replies, the best first
    read_split         one of these, parted into training and validation

The keys of a record tell its form, see CONVERSATION, ASKED and the tables beside them. Public files are
dirty: what cannot be used is left out and counted. More than a tenth of it, or nothing else, is a UserError.
"""
import functools
import gc
import glob
import gzip
import json
import os
import random
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from lib.program import UserError

DATA_FILE = re.compile(r"\.(jsonl?|txt|csv|parquet|gz)$", re.I)  # what is read of a folder
KINDS = {b"PAR1": "parquet", b"\xff\xfe": "UTF-16", b"PK\3\4": "zip", b"\x28\xb5\x2f\xfd": "zstd"}


def find_files(data) -> list[str]:
    """The files of --data: one, several with commas between, a glob, or all data files in a folder."""
    found = []
    for name in [str(data)] if os.path.exists(data) else filter(None, map(str.strip, str(data).split(","))):
        folder = os.path.isdir(name)
        inside = glob.escape(name) + "/**" * folder if os.path.exists(name) else name
        paths = [path for path in glob.glob(inside, recursive=True)
                 if not os.path.isdir(path) and (not folder or DATA_FILE.search(path))]
        if not paths:
            raise UserError(f"{name}: found no such file, expected .json, .jsonl, .txt, a folder or a glob")
        found += sorted(paths)
    return found


def read_text(path, errors: str = "strict") -> str:
    """A whole UTF-8 file, plain or gzip. A byte order mark is dropped. errors: as in bytes.decode."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        kind = next((kind for start, kind in KINDS.items() if content.startswith(start)), "")
        kind = "csv" if re.search(r"\.csv(\.gz)?$", str(path), re.I) else kind
        if kind:
            how = f"pandas.read_{kind}('{path}').to_json('data.jsonl', orient='records', lines=True)"
            how = f'python -c "import pandas; {how}"' if kind in ("csv", "parquet") else "convert it first"
            raise UserError(f"{path}: found {kind}, expected JSON or text in UTF-8: {how}")
        return content.decode("utf-8", errors).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: found byte 0x{content[error.start]:02x} at offset {error.start}, "
                        "expected UTF-8; convert the file, for example with iconv -t UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def scan(path, text: str) -> Iterator[tuple[int, dict | UserError]]:
    """(line, record) for each record, or what is wrong with it. An array and lines are read alike: commas,
    brackets and white space between two records are skipped. Behind a broken record the next line is tried.
    A broken array is a UserError at once: nobody knows how much of it is lost."""
    decode, between = json.JSONDecoder().scan_once, re.compile(r"[\s,\[\]]*").match
    array, line, start, end = text.lstrip()[:1] == "[", 1, 0, 0
    while (after := between(text, end).end()) < len(text):
        line, start = line + text.count("\n", start, after), after
        try:
            record, end = decode(text, start)
            if type(record) is not dict:
                record = UserError(f"found {found_in(record)}, expected a record {{...}}")
        except (ValueError, StopIteration, RecursionError) as error:
            record = UserError(f"found no valid JSON: {getattr(error, 'msg', 'expected a value')}")
            if array:
                raise UserError(f"{path}:{line}: {record}") from None
            end = text.find("\n", start) % (len(text) + 1)  # -1: the end of the text
        yield line, record
    if array and not text.rstrip().endswith("]"):
        raise UserError(f"{path}:{line}: found an array without an end, expected ]; the file may be cut off")


def found_in(value) -> str:
    """What stands there instead of what we want, in short; of a record its form, or its keys."""
    if isinstance(value, dict):
        return form_of(value) or f"the keys {ascii([*value])[:60]}"
    return f"{type(value).__name__} {ascii(value)[:40]}"


@dataclass
class Record:
    """A conversation [{"role": system | user | assistant, "content": text}, ...]; or a prompt and replies.
    A message with "train": False is read and not trained."""
    messages: list[dict]
    responses: list[str] = field(default_factory=list)  # the best first
    tags: list[str] = field(default_factory=list)  # one per response, or none; like tag only reported
    scores: list[float] = field(default_factory=list)
    left_out: str = ""  # why some of its replies were
    where: str = ""  # file and line
    tag: str = ""
    negative: bool = False  # made by random_negatives


class Records(list):
    """What could be used of the files that --data names. left_out: {why: places} of what could not."""

    def __init__(self, data):
        self.data, self.left_out, self.unused = data, defaultdict(list), 0

    def take(self, path, text: str, record_of: Callable[[dict], object]) -> None:
        """Add record_of(content) for each record in the text of a file. What raises UserError is left out."""
        for line, content in scan(path, text):
            try:
                if type(content) is UserError:
                    raise content
                record = record_of(content)
            except UserError as error:
                self.unused += 1
                self.left_out[str(error)].append(f"{path}:{line}")
                continue
            if type(record) is Record:
                record.where, tag = f"{path}:{line}", content.get("tag")
                record.tag = tag if type(tag) is str else ""
                if record.left_out:
                    self.left_out[record.left_out].append(record.where)
            self.append(record)

    def check(self, strict: bool) -> "Records":
        """self. UserError if too much is left out or nothing is left; strict: if anything is left out."""
        if not self or self.unused > (len(self) + self.unused) / 10 or (strict and self.left_out):
            most = "none (--strict)" if strict else "at most a tenth"
            raise UserError(f"{self.report()}; found too few that can be used, {most} may be left out")
        return self

    def reasons(self) -> list[tuple[str, list[str]]]:
        return sorted(self.left_out.items(), key=lambda item: -len(item[1]))[:5]  # the five commonest

    def report(self) -> str:
        why = "; ".join(f"{len(places)} x {why} ({', '.join(map(os.path.basename, places[:3]))})"
                        for why, places in self.reasons())
        return f"{self.data}: {len(self)} used, {self.unused} left out" + (f": {why}" if why else "")

    def metrics(self) -> dict[str, int]:
        reasons = {f"left_out/{why}": len(places) for why, places in self.reasons()}
        return {"used": len(self), "left_out": self.unused, **reasons}


# ---- messages

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant", "model": "assistant"}
TOOLS = "tool", "function", "observation", "function_call", "tool_call", "tool_calls", "ipython"


def said(role: str, content) -> dict:
    return {"role": role, "content": content}


def text_of(content) -> str:
    """A content as one text; it may be a list of parts {"type": "text", "text": ...}. null is empty."""
    parts = content if isinstance(content, list) else [content or ""]
    parts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(part, str) for part in parts):
        raise UserError("found a content that is no text, or has other parts such as pictures; expected text")
    return "".join(parts)


def check_text(text: str, where: str = "") -> str:
    """The text. UserError for what is no UTF-8: half of a surrogate pair, or a byte of another encoding."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}found half a character, or a byte that is no UTF-8") from None
    return text


def messages_of(turns) -> list[dict]:
    """A list of turns as messages: system (if any), then user and assistant in turn. A text is the
    assistant's. What tools say or are told is not trained: it becomes the user's, behind the role's name."""
    if not isinstance(turns, list) or not turns:
        raise UserError(f"found {found_in(turns)}, expected a list of messages")
    messages, due, tool = [], "user", False
    for turn in turns:
        turn = said("assistant", turn) if isinstance(turn, str) else turn
        if not isinstance(turn, dict):
            raise UserError(f"found {found_in(turn)}, expected a message {{...}}")
        name = turn.get("role") or turn.get("from")
        if type(content := turn.get("content")) is not str:
            content = text_of(turn.get("value") if content is None else content)
        check_text(content)
        if calls := turn.get("tool_calls"):
            name, content = "tool_calls", f"{content}\n{json.dumps(calls, ensure_ascii=False)}".strip()
        role = ROLES.get(name.lower()) if type(name) is str else None
        if not content or content.isspace():
            if role == "system":
                continue
            raise UserError("found a blank text, expected words")
        before, tool = tool, role is None and name in TOOLS
        role, content = ("user", f"{name}: {content}") if tool else (role, content)
        if role == "user" and due == "assistant" and (tool or before):  # one message of both
            content, due = f"{messages.pop()['content']}\n{content}", "user"
        if role == due:
            due = "assistant" if role == "user" else "user"
        elif messages or role != "system":
            raise UserError(f"found the role {ascii(name)[:40]}, expected the {due}; turns alternate")
        plain = len(turn) == 2 and name == role and turn.get("content") is content
        messages.append(turn if plain else said(role, content))
        if len(turn) > 2 and (turn.get("weight") == 0 or False in (turn.get("train"), turn.get("loss"))):
            messages[-1]["train"] = False
    return messages or messages_of(messages)  # nothing is left of a blank system message alone: an error


def hh_turns(text: str) -> list[dict]:
    """The turns of Anthropic's HH form; [] for another text. A prompt ends with "Assistant:" and nothing."""
    start, *parts = re.split(r"(?:\n\n|^)(Human|Assistant):", text) if "Human:" in text else [""]
    turns = [said(name, content.strip()) for name, content in zip(parts[::2], parts[1::2])]
    return [] if start.strip() else turns[:-1] if turns[-1:] == [said("Assistant", "")] else turns


# ---- forms. Each key can stand in for the one before it. null is as good as absent.

CONVERSATION = "messages", "conversations", "conversation"
ASKED = "prompt", "instruction", "query", "question", "input"
MORE, SYSTEM = ("input", "context"), ("system", "system_prompt")  # beside what is asked
ANSWER = "completion", "output", "response", "answer"
NAMES = {  # how to call what is read by another stage, or by none
    ("completion", "label"): "KTO records (one reply with a label)",
    ("completions", "labels"): "stepwise records (completions with labels)",
    ("chosen", "rejected"): "preferences (chosen and rejected)", ("responses",): "ranked replies",
    **{(key,): "conversations" for key in CONVERSATION}}


def form_of(record: dict) -> str:
    return next((name for keys, name in NAMES.items() if None not in map(record.get, keys)), "")


def first(record: dict, keys: tuple[str, ...]):
    """What stands under the first of these keys that is there."""
    for key in keys:
        if (value := record.get(key)) is not None:
            return value
    return None


def in_context(record: dict, turns: list) -> list:
    """The turns behind the record's system message and its history [[question, answer], ...], if any."""
    history, system = record.get("history") or [], first(record, SYSTEM) or ""
    if not isinstance(history, list) or any(type(pair) is not list or len(pair) != 2 for pair in history):
        raise UserError(f"found {found_in(history)} as history, expected [[question, answer], ...]")
    before = [turn for a, b in history for turn in (said("user", a), said("assistant", b))]
    return [said("system", system)] * bool(system) + before + turns


def asked_in(record: dict) -> list:
    """The turns before the reply, of a conversation all; [] if the record has none."""
    turns = first(record, CONVERSATION) or first(record, ASKED) or []
    if isinstance(turns, str):
        more = text_of(first(record, MORE))
        more = "" if more == turns else more.strip() and f"\n{more}"
        turns = hh_turns(turns) or [said("user", turns + more)]
    if not isinstance(turns, list):
        raise UserError(f"found {found_in(turns)}, expected a list of messages")
    return in_context(record, turns) if turns and first(record, ("history", *SYSTEM)) else turns


def chat_of(record: dict) -> Record:
    turns = asked_in(record)
    if first(record, CONVERSATION) is None:
        if not turns or (answer := first(record, ANSWER)) is None or type(record.get("label")) is bool:
            raise UserError(f"found {found_in(record)}, expected messages, or a prompt with its completion")
        turns = turns + (answer if isinstance(answer, list) else [answer])
    messages = messages_of(turns)
    if messages[-1]["role"] != "assistant":
        raise UserError("found a conversation that ends with the user, expected a reply at its end")
    if "train" in messages[-1] and all("train" in m for m in messages if m["role"] == "assistant"):
        raise UserError("found no reply with a weight, expected one to train")
    return Record(messages)


def prompt_of(record: dict) -> Record:
    """A prompt; or a conversation or a preference, without the reply."""
    if not (turns := asked_in(record)):
        return Record(preference_of(record).messages)
    messages = messages_of(turns)
    if messages[-1]["role"] == "assistant" and first(record, CONVERSATION) is not None:
        messages.pop()
    if not messages or messages[-1]["role"] != "user":
        raise UserError("found a prompt that ends with a reply, expected the user at its end")
    return Record(messages)


def in_order(record: dict, n: int) -> list[int]:
    """Which of the n replies is the best, which the next, and so on. Scores beside them tell, and of equal
    scores one is taken. "ranked": true is a judge's mark: they stand in order, whatever the scores say."""
    scores = record.get("scores") or []
    if scores and not (isinstance(scores, list) and len(scores) == n and all(
            isinstance(score, (int, float)) and abs(score) < 1e300 for score in scores)):
        raise UserError(f"found {found_in(scores)} as scores, expected a number for each reply")
    if record.get("ranked", not scores and "ended" not in record):  # sample.py writes "ended"
        return list(range(n))
    if not scores:
        raise UserError('found replies in no order, expected the best first and "ranked": true, or "scores"')
    return sorted({scores[i]: i for i in reversed(range(n))}.values(), key=lambda i: -scores[i])


def preference_of(record: dict) -> Record:
    """A prompt and two or more replies. A reply is a text, or a whole conversation that ends with it."""
    pair = [record.get("chosen"), record.get("rejected")]
    replies = pair if None not in pair else first(record, ("responses", "output"))
    if not isinstance(replies, list) or len(replies) < 2:
        raise UserError(f"found {found_in(record)}, expected replies: chosen and rejected, or responses")
    turns, asked, prompts, kept, left_out = asked_in(record), first(record, ASKED), [], {}, ""
    hh = isinstance(asked, str) and hh_turns(asked)
    for i in (0, 1) if replies is pair else in_order(record, len(replies)):
        reply = replies[i].strip() if hh and isinstance(replies[i], str) else replies[i]
        reply = isinstance(reply, str) and hh_turns(reply) or reply
        reply = reply if isinstance(reply, list) else [reply]
        last = reply[-1] if reply else ""
        if not text_of(first(last, ("content", "value")) if isinstance(last, dict) else last).strip():
            left_out = "blank reply, left out of its record"
            continue
        if not turns and len(reply) == 1:
            raise UserError("found replies without a prompt, expected one")
        messages = messages_of(turns + reply if len(reply) == 1 else in_context(record, reply))
        prompts.append(messages[:-1])
        if messages[-1]["role"] != "assistant" or prompts[-1] != prompts[0]:
            raise UserError("found no reply, or none to the same prompt, expected one prompt and its replies")
        kept.setdefault(messages[-1]["content"], i)  # the place of each different reply
    if len(kept) < 2:
        raise UserError("found no two different replies (they are blank, equal, or of equal scores)")
    tags, scores = record.get("tags"), record.get("scores") or []
    tags = [str(tags[i]) for i in kept.values()] if type(tags) is list and len(tags) == len(replies) else []
    scores = [] if replies is pair or not scores else [scores[i] for i in kept.values()]
    return Record(prompts[0], list(kept), tags, scores, left_out)


def read(data, strict: bool = False, *, record_of: Callable[[dict], Record]) -> Records:
    """What can be used of the files that --data names, as record_of makes it."""
    records = Records(data)
    gc.disable()  # else it looks through all records again and again while they become more
    try:
        for path in find_files(data):
            records.take(path, read_text(path, "surrogateescape"), record_of)
    finally:
        gc.enable()
    return records.check(strict)


read_records = functools.partial(read, record_of=lambda record: record)  # (data, strict) -> Records of dicts
read_chats = functools.partial(read, record_of=chat_of)
read_prompts = functools.partial(read, record_of=prompt_of)
read_preferences = functools.partial(read, record_of=preference_of)


# ---- training and validation

def split(records: list[Record], val_fraction: float, val_records: list[Record] = ()) -> tuple[list, list]:
    """(training, validation): val_records, or else the last val_fraction of the records. Equal conversations
    and replies to one prompt stand on one side: who has learned one by heart knows the others."""
    groups = {}
    for record in records:
        groups.setdefault(json.dumps(record.messages), []).append(record)
    for record in val_records:
        groups.pop(json.dumps(record.messages), None)
    n, groups = len(groups), [*groups.values()]
    n = n if val_records else round(n * (1 - val_fraction))
    if not n:
        raise UserError("found nothing to train on, expected less in --val_data or a lower --val_fraction")
    train, val = ([record for group in part for record in group] for part in (groups[:n], groups[n:]))
    return train, [*val_records, *val]


def read_split(read_form, cfg) -> tuple[list[Record], list[Record], str, dict[str, int]]:
    """(training, validation, what to say of them, counts for metrics.jsonl) of a script's --data, --val_data
    and --val_fraction. read_form: one of the three above."""
    found = [read_form(data, cfg.strict) for data in (cfg.data, cfg.val_data) if data]
    train, val = split(found[0], cfg.val_fraction, *found[1:])
    report = "\n".join(records.report() for records in found)
    more = "" if val else f"\nno validation: --val_fraction {cfg.val_fraction} of them is less than one"
    if cfg.val_data and (both := len(found[0]) - len(train)):
        more = f"\n{both} of --data stand in --val_data too and are not trained"
    return train, val, report + more, found[0].metrics()


def random_negatives(records: list[Record], n: int, seed: int) -> list[Record]:
    """n more pairs for each prompt: its best reply above a reply to another prompt. Rankings say nothing of
    what no model said to a prompt, but PPO may try it (docs/rm.md). Karpukhin et al. 2020, section 3.2."""
    rng = random.Random(seed)
    drawn = [(a, b, rng.choice(b.responses)) for a in records for b in rng.choices(records, k=n)]
    return [replace(a, responses=[a.responses[0], reply], tags=[], scores=[], negative=True)
            for a, b, reply in drawn if a.messages != b.messages and reply not in a.responses]
