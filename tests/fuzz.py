"""Random mutations of the files that users bring: success or one UserError, within 5 s, nothing left behind.

    python tests/fuzz.py --n 5000 --form all
    python tests/fuzz.py --form chat --n 1 --seed 1234     one failure again: a try is a function of its seed

What is read is used as the scripts use it: laid into batches, encoded, decoded. Exit code 1 if any try fails.
"""
from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import zlib
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import numpy as np
import tiktoken

from data import Conversations, Replies, Windows, eval_windows
from lib.corpora import HEADER, TokenFile, prepare, write_token_file
from lib.program import UserError
from lib.records import read_chats, read_preferences, read_prompts
from lib.tokenizer import FORMAT, SPECIALS, Tokenizer, fingerprint, make_tokenizer

SECONDS = 5  # of computing, so that a busy machine is no failure
PIECES = (b"9" * 30, b"[" * 3000, b'{"a":' * 2000, b"null", b'"', b"{}", b"[]", b"1e999", b"-1", b"0", b"NaN",
          b"[1]", b"\xff", b"\xc3", b"\0", b"\r\n", b"\n", b"\xe2\x80\xa8", b"\\ud83d", b"\\u0000", b"../x",
          b"/etc/passwd", b"<|end|>", b"\n<|endoftext|>\n", b"true", b'"messages"', b'"prompt"', b'"role"',
          b'"responses"', b"assistant", b"18446744073709551616", b"-9223372036854775809", b" ", b",", b":")
VALUES = (None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -0.0, "", "x", "../../etc/passwd", "\0", [],
          [[]], [None], {}, {"a": 1}, "x" * 10_000, [0] * 1000, ["a", "b"], "assistant", "user")


def mutate_bytes(data: bytes, r: random.Random) -> bytes:
    """One to eight changes: another byte, a piece lost, doubled or moved, or something awkward put in."""
    data = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 8))):
        i, n = r.randrange(len(data) + 1), r.choice((1, 2, 8, 60))
        kind = r.randrange(6)
        if kind == 0 and i < len(data):
            data[i] = r.randrange(256)
        elif kind == 1:
            del data[i:i + n]
        elif kind == 2:
            data[i:i] = r.choice(PIECES)
        elif kind == 3:
            data[i:i] = data[i:i + n]
        elif kind == 4:
            piece, j = data[i:i + n], r.randrange(len(data) + 1)
            del data[i:i + n]
            data[j:j] = piece
        elif r.random() < 0.3:
            del data[i:]
    return bytes(data)


def mutate_json(value, r: random.Random):
    """The value with something in it replaced, removed, doubled or renamed. Still JSON, so it gets further."""
    if isinstance(value, (dict, list)) and value and r.random() < 0.9:
        key = r.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = value.copy()
        kind = r.randrange(10)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[r.choice(("x", "", *value))] = value.pop(key)
        elif kind == 1:
            value.insert(key, value[key])
        else:
            value[key] = mutate_json(value[key], r)
        return value
    return r.choice(VALUES)


def mutate_content(content, r: random.Random) -> bytes:
    for _ in range(r.choice((1, 1, 2, 4))):
        content = mutate_json(content, r)
    return json.dumps(content).encode()


# ---- the forms: each writes a mutated file, yields, and does with it what the program does ----------------

USER, REPLY = {"role": "user", "content": "Hi 你好"}, {"role": "assistant", "content": "Hello 🙂"}
CHATS = [{"messages": [{"role": "system", "content": "S"}, USER, REPLY, USER, REPLY], "tag": "t"},
         {"instruction": "Add", "input": "1 and 2", "output": "3"},
         {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]
PREFERENCES = [{"prompt": "a", "chosen": "b", "rejected": "c"},
               {"prompt": [USER], "chosen": [REPLY], "rejected": "no"},
               {"prompt": "a", "responses": ["b", "c", "d"], "tags": ["x", "y", "z"], "scores": [1, 0.5, 0]},
               {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
               {"instruction": "a", "input": "", "output": "x", "chosen": "b", "rejected": "c"}]
TEXTS = [{"text": "One day a cat sat.\nIt sat long."}, {"text": "你好 🙂", "tag": "t"}]


def records_file(folder: Path, records: list, r: random.Random) -> Path:
    """The records as lines or as an array, plain or .gz, with changed bytes or with other content in them."""
    records = r.sample(records, r.randint(1, len(records)))
    lines, packed = r.random() < 0.5, r.random() < 0.2
    if r.random() < 0.5:
        i = r.randrange(len(records))
        changed = [json.dumps(record, ensure_ascii=r.random() < 0.5).encode() for record in records]
        changed[i] = mutate_content(records[i], r)
        data = b"\n".join(changed) if lines else b"[" + b",\n".join(changed) + b"]"
    else:
        data = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) if lines else \
            json.dumps(records, indent=1)
        data = mutate_bytes(data.encode(), r)
    if packed:
        data = gzip.compress(data, 1, mtime=0)
        data = mutate_bytes(data, r) if r.random() < 0.5 else data
    path = folder / f"file.{'jsonl' if lines else 'json'}{'.gz' if packed else ''}"
    path.write_bytes(data)
    return path


def use_chat(folder: Path, r: random.Random):
    path = records_file(folder, CHATS, r)
    yield
    records = (read_prompts if r.random() < 0.2 else read_chats)(path)
    if records[0].messages[-1]["role"] == "assistant":
        chats = Conversations(records, BYTES, 48, turns=r.choice(("all", "last", "each")), batch_size=2)
        chats.report()
        chats.rows(chats.of_step(0))


def use_preference(folder: Path, r: random.Random):
    path = records_file(folder, PREFERENCES, r)
    yield
    kind = r.choice(("none", "best-worst", "all"))
    pairs = Replies(read_preferences(path), BYTES, 48, batch_size=2, pairs=kind)
    pairs.report()
    list(pairs.batches(pairs.of_step(0)))


def use_text(folder: Path, r: random.Random):
    if r.random() < 0.5:
        path = records_file(folder, TEXTS, r)
    else:
        data = mutate_bytes(b"One day.\n<|endoftext|>\nThe cat sat. \xe4\xbd\xa0\n" * 3, r)
        path = folder / "file.txt"
        if r.random() < 0.2:
            path, data = folder / "file.txt.gz", mutate_bytes(gzip.compress(data, 1, mtime=0), r)
        path.write_bytes(data)
    yield
    cache = folder / "cache"
    try:
        train, *_, tokenizer = prepare(str(path), tokenizer=r.choice(("byte", "char", "bpe")), vocab_size=280,
                                              val_fraction=0.3, cache=str(cache))
        TokenFile(train, Tokenizer.load(tokenizer))
        shutil.rmtree(cache)
    finally:  # after an error the folder may be there, but nothing in it
        if cache.exists() and not os.listdir(cache):
            cache.rmdir()


def use_tokens(folder: Path, r: random.Random):
    path = folder / "file.bin"
    write_token_file(path, iter([np.arange(40) % 256]), BYTES, 40, "note")
    data = path.read_bytes()
    if r.random() < 0.5:  # the header alone, with its checksum made right again
        size = HEADER.size
        head = bytearray(mutate_bytes(data[:size], r)[:size].ljust(size, b"\0"))
        for _ in range(r.choice((0, 0, 1, 3))):
            at = r.choice((8, 12, 16, 40, 48, 56))  # version, width, vocabulary, ids, targets, bytes
            head[at:at + 4] = struct.pack("<I", r.choice((0, 1, 2, 4, 255, 2**31, 2**32 - 1)))
        head[:8] = data[:8]
        head[-4:] = struct.pack("<I", zlib.crc32(head[:-4]))
        data = bytes(head) + data[len(head):]
    else:
        data = mutate_bytes(data, r)
    path.write_bytes(data)
    yield
    tokens = TokenFile(path, BYTES if r.random() < 0.5 else None)
    Windows(tokens, 8, batch_size=4).batch(0)
    list(eval_windows(tokens, 8, 4, 0, 1, 0))


def use_tokenizer(folder: Path, r: random.Random):
    path = folder / "file.json"
    content = json.loads(r.choice(TOKENIZERS))
    if r.random() < 0.5:
        content = json.loads(mutate_content(content, r))
        if isinstance(content, dict) and "fingerprint" in content:
            content["fingerprint"] = fingerprint(content)
        data = json.dumps(content).encode()
    else:
        data = mutate_bytes(json.dumps(content).encode(), r)
    path.write_bytes(data)
    yield
    nowhere = {"TIKTOKEN_CACHE_DIR": str(folder / "none")}
    with mock.patch.object(tiktoken.load, "read_file", network), mock.patch.dict(os.environ, nowhere), \
            mock.patch.dict(tiktoken.registry.ENCODINGS, clear=True):
        tokenizer = Tokenizer.load(str(path))
    ids = tokenizer.encode("ab")
    tokenizer.decode([*ids, tokenizer.vocab_size - 1])


FORMS = {"chat": use_chat, "preference": use_preference, "text": use_text, "tokens": use_tokens,
         "tokenizer": use_tokenizer}


BYTES = make_tokenizer("byte")
TOKENIZERS = [json.dumps({**t.content, "fingerprint": t.fingerprint}) for t in (
    BYTES, make_tokenizer("char", "abc é中"), make_tokenizer("bpe", "abab abc abcabc " * 9, 266))]
GPT2 = {"format": FORMAT, "kind": "gpt2", "specials": list(SPECIALS)}
TOKENIZERS.append(json.dumps({**GPT2, "fingerprint": fingerprint(GPT2)}))


# ---- the loop --------------------------------------------------------------------------------------------

class Failure(BaseException):
    """No Exception: that, a reader could take for the fault of the file and turn into a UserError."""


def too_slow(*_):
    raise Failure(f"more than {SECONDS} s")


def network(url):
    raise Failure(f"a file made the program call {url}")


def attempt(form: str, seed: int, folder: Path) -> tuple[str, str]:
    """("read" | "refused" | "failed", what was said) of one try."""
    folder.mkdir()
    signal.signal(signal.SIGPROF, too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    before = None
    try:
        use = FORMS[form](folder, random.Random(f"{form} {seed}"))
        next(use)
        before = set(folder.rglob("*"))
        next(use, None)
        answer = "read", ""
    except UserError as error:
        message = str(error)
        clear = message.isprintable() and len(message) < 1500 and (str(folder) in message or "--" in message)
        answer = ("refused" if clear else "failed"), message
    except (Exception, Failure):
        answer = "failed", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if (after := set(folder.rglob("*"))) != before:
        answer = "failed", f"left behind or removed: {before ^ after}"
    shutil.rmtree(folder)
    return answer


def fuzz(form: str, n: int, seed: int = 0, say=print) -> dict:
    """{"read", "refused", "failed"} of n tries, with the seeds seed .. seed + n - 1."""
    counts = {"read": 0, "refused": 0, "failed": 0}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        for one in range(seed, seed + n):
            kind, message = attempt(form, one, Path(place) / "try")
            counts[kind] += 1
            if kind == "failed":
                say(f"{form}, seed {one}: {message}")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=5000, help="mutations of each form")
    parser.add_argument("--form", choices=[*FORMS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    args = parser.parse_args()
    counts = {form: fuzz(form, args.n, args.seed) for form in (FORMS if args.form == "all" else [args.form])}
    print("\n".join(f"{form}: {count}" for form, count in counts.items()))
    return int(any(count["failed"] for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
