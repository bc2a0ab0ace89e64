"""Random mutations of the files that users bring: success or one UserError, within 5 s, nothing left behind.

    python tests/fuzz.py                   5000 tries of each form
    python tests/fuzz.py 1 1234 chat       one failure again: a try is a function of its seed

What is read is used as the scripts use it: laid into batches, encoded, decoded. Exit code 1 if any try fails.
"""
import gzip
import hashlib
import json
import random
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import numpy as np

from data import Conversations, Replies, Windows, eval_windows
from lib.corpora import TokenFile, prepare, write_token_file
from lib.program import UserError
from lib.records import read_chats, read_preferences, read_prompts
from lib.run import RunConfig
from lib.tokenizer import Tokenizer, make_tokenizer

SECONDS = 5  # of computing, so that a busy machine is no failure
PIECES = (b"9" * 30, b"[" * 3000, b'{"a":' * 2000, b"null", b'"', b"{}", b"[]", b"1e999", b"-1", b"0", b"NaN",
          b"\xff", b"\xc3", b"\0", b"\r\n", b"\n", b"\xe2\x80\xa8", b"\\ud83d", b"\\u0000", b"../x", b"true",
          b"<|end|>", b"\n<|endoftext|>\n", b'"messages"', b'"prompt"', b'"role"', b'"responses"', b"user",
          b"18446744073709551616", b"-9223372036854775809", b" ", b",", b":")
VALUES = (None, True, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, "", "x", "../../etc/passwd", "\0", [], [[]],
          [None], {}, {"a": 1}, "x" * 10_000, [0] * 1000, ["a", "b"], "assistant", "user")


def mutate_bytes(data: bytes, r: random.Random) -> bytes:
    """One to eight changes: another byte, a piece lost or doubled, the end lost, something awkward put in."""
    data = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 8))):
        i, n = r.randrange(len(data) + 1), r.choice((1, 2, 8, 60))
        kind = r.randrange(5)
        if kind == 0 and i < len(data):
            data[i] = r.randrange(256)
        elif kind == 1:
            del data[i:i + n]
        elif kind == 2:
            data[i:i] = r.choice(PIECES)
        elif kind == 3:
            data[i:i] = data[i:i + n]
        elif r.random() < 0.3:
            del data[i:]
    return bytes(data)


def mutate_json(value, r: random.Random):
    """Something in it is replaced, removed, doubled or renamed: still JSON, so that it gets further."""
    if not isinstance(value, (dict, list)) or not value or r.random() < 0.1:
        return r.choice(VALUES)
    value, kind = value.copy(), r.randrange(10)
    key = r.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[r.choice(("x", "", *value))] = value.pop(key)
    elif kind == 1:
        value.insert(key, value[key])
    else:
        value[key] = mutate_json(value[key], r)
    return value


def mutate_content(content, r: random.Random) -> bytes:
    for _ in range(r.choice((1, 1, 2, 4))):
        content = mutate_json(content, r)
    return json.dumps(content).encode()


# ---- the forms: each writes a mutated file, yields, and does with it what the program does ----------------

USER, REPLY = {"role": "user", "content": "Hi 你好"}, {"role": "assistant", "content": "Hello 🙂"}
CHATS = [{"messages": [{"role": "system", "content": "S"}, USER, REPLY, USER, REPLY], "tag": "t"},
         {"instruction": "Add", "input": "1 and 2", "output": "3"},
         {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}],
          "system": "S"},
         {"prompt": "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: b\n\nAssistant:", "response": "c"},
         {"query": [USER], "completion": [REPLY], "history": [["a", "b"]]},
         {"messages": [USER, {**REPLY, "weight": 0}, {"role": "tool", "content": [{"text": "1"}]}, REPLY]}]
PREFERENCES = [{"prompt": "a", "chosen": "b", "rejected": "c"},
               {"prompt": [USER], "chosen": [REPLY], "rejected": "no"},
               {"prompt": "a", "responses": ["b", "c", "d"], "tags": ["x", "y", "z"], "scores": [1, 0.5, 0]},
               {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
               {"instruction": "a", "input": "", "output": "x", "chosen": "b", "rejected": "c"},
               {"question": "a", "output": ["b", "c"], "system": "S"},
               {"prompt": "a", "responses": ["b", "c"], "ended": [True, True], "ranked": True}]
TEXTS = [{"text": "One day a cat sat.\nIt sat long."}, {"text": "你好 🙂", "tag": "t"}]


def packed(path: Path, data: bytes, r: random.Random) -> Path:
    """Write it, now and then as .gz, which may be damaged itself."""
    if r.random() < 0.2:
        path, data = path.with_name(path.name + ".gz"), gzip.compress(data, 1, mtime=0)
        data = mutate_bytes(data, r) if r.random() < 0.5 else data
    path.write_bytes(data)
    return path


def records_file(folder: Path, records: list, r: random.Random) -> Path:
    """The records as lines or as an array, with changed bytes or with other content in them."""
    records = r.sample(records, r.randint(1, len(records))) * r.choice((1, 20))  # of many one may be left out
    lines, by_content = r.random() < 0.5, r.random() < 0.5
    parts = [json.dumps(record, ensure_ascii=r.random() < 0.5).encode() for record in records]
    if by_content:
        parts[0] = mutate_content(records[0], r)
    data = b"\n".join(parts) if lines else b"[" + b",\n".join(parts) + b"]"
    data = data if by_content else mutate_bytes(data, r)
    return packed(folder / ("file.jsonl" if lines else "file.json"), data, r)


def use_chat(folder: Path, r: random.Random):
    path = records_file(folder, CHATS, r)
    yield
    records = (read_prompts if r.random() < 0.2 else read_chats)(path)
    if records[0].messages[-1]["role"] == "assistant":
        chats = Conversations(records, BYTES, 48, turns=r.choice(("all", "last", "each")), batch_size=2)
        chats.report()
        RunConfig(data=str(path), steps=1, seq_len=48).fit_steps(len(chats))
        chats.rows(chats.of_step(0))


def use_preference(folder: Path, r: random.Random):
    path = records_file(folder, PREFERENCES, r)
    yield
    kind = r.choice(("none", "best-worst", "all"))
    pairs = Replies(read_preferences(path), BYTES, 48, batch_size=2, pairs=kind)
    pairs.report()
    RunConfig(data=str(path), steps=1, seq_len=48).fit_steps(len(pairs))
    list(pairs.batches(pairs.of_step(0)))


def use_text(folder: Path, r: random.Random):
    if r.random() < 0.5:
        path = records_file(folder, TEXTS, r)
    else:
        text = b"One day.\n<|endoftext|>\nThe cat sat. \xe4\xbd\xa0\n" * 3
        path = packed(folder / "file.txt", mutate_bytes(text, r), r)
    cache = folder / "cache"
    cache.mkdir()
    yield
    train, *_, tokenizer = prepare(str(path), tokenizer=r.choice(("byte", "char", "bpe")), vocab_size=280,
                                   val_fraction=0.3, cache=str(cache))
    TokenFile(train, Tokenizer.load(tokenizer))
    shutil.rmtree(cache)
    cache.mkdir()


def use_tokens(folder: Path, r: random.Random):
    path = folder / "file.bin"
    write_token_file(path, iter([np.arange(40) % 256]), BYTES, 40, "note")
    path.write_bytes(mutate_bytes(path.read_bytes(), r))
    yield
    tokens = TokenFile(path, BYTES if r.random() < 0.5 else None)
    Windows(tokens, 8, batch_size=4).batch(0)
    list(eval_windows(tokens, 8, 4))


def use_tokenizer(folder: Path, r: random.Random):
    path = folder / "file.json"
    data = r.choice(TOKENIZERS).encode()
    if r.random() < 0.5:
        content = json.loads(mutate_content(json.loads(data), r))
        if isinstance(content, dict) and "fingerprint" in content:
            del content["fingerprint"]
            canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
            content["fingerprint"] = hashlib.sha256(canonical).hexdigest()[:16]
        path.write_text(json.dumps(content))
    else:
        path.write_bytes(mutate_bytes(data, r))
    yield
    tokenizer = Tokenizer.load(str(path))
    ids = tokenizer.encode("ab")
    tokenizer.decode([*ids, tokenizer.vocab_size - 1])


FORMS = {"chat": use_chat, "preference": use_preference, "text": use_text, "tokens": use_tokens,
         "tokenizer": use_tokenizer}
BYTES = make_tokenizer("byte")
TOKENIZERS = [json.dumps({**t.content, "fingerprint": t.fingerprint}) for t in (
    BYTES, make_tokenizer("char", "abc é中"), make_tokenizer("bpe", "abab abc abcabc " * 9, 266))]


# ---- the loop --------------------------------------------------------------------------------------------

class Failure(BaseException):
    """No Exception: that, a reader could take for the fault of the file and turn into a UserError."""


def too_slow(*_):
    raise Failure(f"more than {SECONDS} s")


def attempt(form: str, seed: int, folder: Path) -> tuple[str, str]:
    """("read" | "refused" | "failed", what was said) of one try."""
    folder.mkdir()
    signal.signal(signal.SIGPROF, too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        use = FORMS[form](folder, random.Random(f"{form} {seed}"))
        next(use)
        before = set(folder.rglob("*"))
        next(use, None)
        answer = "read", ""
    except UserError as error:
        said = str(error)
        clear = said.isprintable() and len(said) < 1500 and (str(folder) in said or "--" in said)
        answer = "refused" if clear else "failed", said
    except (Exception, Failure):
        answer = "failed", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if left := set(folder.rglob("*")) ^ before:
        answer = "failed", f"left behind or removed: {left}"
    shutil.rmtree(folder)
    return answer


def fuzz(form: str, n: int, seed: int = 0, say=print) -> dict:
    """{"read", "refused", "failed"} of n tries, with the seeds seed .. seed + n - 1."""
    counts = {"read": 0, "refused": 0, "failed": 0}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        for one in range(seed, seed + n):
            kind, said = attempt(form, one, Path(place) / "try")
            counts[kind] += 1
            if kind == "failed":
                say(f"{form}, seed {one}: {said}")
    return counts


if __name__ == "__main__":
    n, seed, *forms = sys.argv[1:] or (5000, 0)
    found = {form: fuzz(form, int(n), int(seed)) for form in forms or FORMS}
    print("\n".join(f"{form}: {counts}" for form, counts in found.items()))
    sys.exit(any(counts["failed"] for counts in found.values()))
