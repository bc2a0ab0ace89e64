"""Random mutations of every form of file that is read: success or one UserError, within 5 s, and nothing left behind.

    python tests/fuzz.py --n 5000 --form all
    python tests/fuzz.py --form meta --n 1 --seed 1234     one failure again: each try is a function of its seed

Forms: chat, preference, text (plain and .gz, lines and arrays), tokens (token files), tokenizer, and meta (meta.json
with its checksum made right again, config.json of a finished model). Whatever is read is used as the scripts use it:
laid into batches, encoded, loaded into a model. Exit code 1 if any try fails.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path
from unittest import mock

ROOT = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

import tiktoken  # noqa: E402
import torch  # noqa: E402

import train_pretrain  # noqa: E402
from data import Conversations, Replies, Windows  # noqa: E402
from lib import (
    checked,  # noqa: E402
    checkpoint,  # noqa: E402
)
from lib import corpora as corpus  # noqa: E402
from lib.program import UserError  # noqa: E402
from lib.ranks import Ranks  # noqa: E402
from lib.records import read_chats, read_preferences, read_prompts  # noqa: E402
from lib.tokenizer import FORMAT, SPECIALS, Tokenizer, fingerprint, make_tokenizer  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from zero import Zero  # noqa: E402

SECONDS, HANG = 5, 120  # of computing, so that a busy machine is no failure; and of waiting for something
PIECES = (b"9" * 30, b"[" * 3000, b'{"a":' * 2000, b"null", b'"', b"{}", b"[]", b"1e999", b"-1", b"0", b"NaN", b"[1]",
          b"\xff", b"\xc3", b"\0", b"\r\n", b"\n", b"\xe2\x80\xa8", b"\\ud83d", b"\\u0000", b"../../x", b"/etc/passwd",
          b"<|end|>", b"\n<|endoftext|>\n", b"true", b'"messages"', b'"prompt"', b'"responses"', b'"role"',
          b"assistant", b"18446744073709551616", b"-9223372036854775809", b" ", b",", b":")


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


VALUES = (None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -0.0, "", "x", "../../etc/passwd", "\0", [], [[]],
          [None], {}, {"a": 1}, "x" * 10_000, [0] * 1000, ["a", "b"], "assistant", "user")


def mutate_json(value, r: random.Random):
    """The value with something in it replaced, removed, doubled or renamed: still JSON, so it reaches the checks."""
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


# ---- the forms: each writes a mutated file, yields, and does with it what the program does --------------------------

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
    pairs = Replies(read_preferences(path), BYTES, 48, batch_size=2, pairs=r.choice(("none", "best-worst", "all")))
    pairs.report()
    list(pairs.batches(pairs.of_step(0)))


def use_text(folder: Path, r: random.Random):
    if r.random() < 0.5:
        path = records_file(folder, TEXTS, r)
    else:
        path, data = folder / "file.txt", mutate_bytes(b"One day.\n<|endoftext|>\nThe cat sat. \xe4\xbd\xa0\n" * 3, r)
        if r.random() < 0.2:
            path, data = folder / "file.txt.gz", mutate_bytes(gzip.compress(data, 1, mtime=0), r)
        path.write_bytes(data)
    yield
    cache = folder / "cache"
    try:
        train, *_, tokenizer = corpus.prepare(str(path), tokenizer=r.choice(("byte", "char", "bpe")), vocab_size=280,
                                              val_fraction=0.3, cache=str(cache))
        corpus.TokenFile(train, Tokenizer.load(tokenizer))
        shutil.rmtree(cache)
    finally:  # after an error the folder may be there, but nothing in it
        if cache.exists() and not os.listdir(cache):
            cache.rmdir()


def use_tokens(folder: Path, r: random.Random):
    path = folder / "file.bin"
    corpus.write_token_file(path, iter([torch.arange(40).numpy() % 256]), BYTES, 40, "note")
    data = path.read_bytes()
    if r.random() < 0.5:  # the header alone, with its checksum made right again
        size = corpus.HEADER.size
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
    tokens = corpus.TokenFile(path, BYTES if r.random() < 0.5 else None)
    Windows(tokens, 8, batch_size=4).batch(0)
    train_pretrain.evaluate(lambda ids, *_, **__: torch.zeros(ids.shape), tokens, 4, train_pretrain.Config(seq_len=8),
                            Ranks(0, 1, 0, 1, torch.device("cpu")))


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
    with mock.patch.object(tiktoken.load, "read_file", network), mock.patch.dict(
            os.environ, TIKTOKEN_CACHE_DIR=str(folder / "none")), mock.patch.dict(tiktoken.registry.ENCODINGS):
        tiktoken.registry.ENCODINGS.clear()
        tokenizer = Tokenizer.load(str(path))
    ids = tokenizer.encode("ab")
    tokenizer.decode([*ids, tokenizer.vocab_size - 1])


class Malicious:
    """Unpickled, it makes a file."""
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def resign(folder: Path, name: str = "meta.json", **changes) -> None:
    """Change meta.json or config.json, with the right checksum: on purpose, not by accident."""
    content = {**json.loads((folder / name).read_bytes()), **changes}
    content.pop("sha256", None)
    (folder / name).write_text(json.dumps({**content, "sha256": checked.digest(content)}))


def put_shard(folder: Path, shard: dict | bytes) -> None:
    """In place of rank000.pt, with matching checksums."""
    path = folder / "rank000.pt"
    path.write_bytes(shard) if isinstance(shard, bytes) else torch.save(shard, path)
    files = json.loads((folder / "meta.json").read_text())["files"]
    resign(folder, files={**files, "rank000.pt": checked.size_and_hash(str(path))})


def use_meta(folder: Path, r: random.Random):
    """A run's folder: meta.json or config.json of final/ mutated, nine times in ten with the right checksum."""
    shutil.copytree(MODELS, folder / "run", copy_function=os.link)  # rank files are read, never written
    final, step = r.random() < 0.2, folder / "run" / "step-00000001"
    path = folder / "run" / "final" / "config.json" if final else step / "meta.json"
    content = json.loads(path.read_bytes())
    path.unlink()
    content.pop("sha256")
    data = mutate_content(content, r) if r.random() < 0.7 else mutate_bytes(json.dumps(content).encode(), r)
    path.write_bytes(data)
    if r.random() < 0.9:
        with contextlib.suppress(ValueError, RecursionError, TypeError):  # no object any more
            resign(path.parent, path.name)
    yield
    if final:
        checkpoint.load_model(str(folder / "run"))
    elif r.random() < 0.5:
        checkpoint.consolidate(str(step))
    else:
        checkpoint.load_checkpoint(str(folder / "run"), {"model": small_zero()}, same={"lr": 1.0}, numbers=["skipped"],
                                   bitwise={"betas": [0.9, 0.95]})


FORMS = {"chat": use_chat, "preference": use_preference, "text": use_text, "tokens": use_tokens,
         "tokenizer": use_tokenizer, "meta": use_meta}


# ---- what they start from -------------------------------------------------------------------------------------------

BYTES = make_tokenizer("byte")
TOKENIZERS = [json.dumps({**t.content, "fingerprint": t.fingerprint})
              for t in (BYTES, make_tokenizer("char", "abc é中"), make_tokenizer("bpe", "abab abc abcabc " * 9, 266))]
GPT2 = {"format": FORMAT, "kind": "gpt2", "specials": list(SPECIALS)}
TOKENIZERS.append(json.dumps({**GPT2, "fingerprint": fingerprint(GPT2)}))
MODELS = None


def small_zero() -> Zero:
    model = GPT(GPTConfig(vocab_size=BYTES.vocab_size, n_layer=1, n_head=1, n_embd=8, max_seq_len=8))
    return Zero(model, units=model.units())


def make_models(folder: Path) -> Path:
    BYTES.save(folder / "tokenizer.json")
    z = small_zero()
    config = {"model": dataclasses.asdict(z.model.config), "head": "lm"}
    checkpoint.save_checkpoint(str(folder), 1, {"model": z}, {"lr": 1.0, "betas": [0.9, 0.95], "skipped": 0},
                               config=config, tokenizer_path=str(folder / "tokenizer.json"))
    checkpoint.save_final(str(folder), z.full_state_dict(), config, str(folder / "tokenizer.json"))
    return folder


# ---- the loop -------------------------------------------------------------------------------------------------------

class Failure(BaseException):
    """No Exception: that, a reader could take for the fault of the file and turn into a UserError."""


def too_slow(number, _):
    raise Failure("it waits" if number == signal.SIGALRM else f"more than {SECONDS} s")


def network(url):
    raise Failure(f"a file made the program call {url}")


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def attempt(form: str, seed: int, folder: Path) -> tuple[str, str]:
    """("read" | "refused" | "failed", what was said) of one try."""
    folder.mkdir()
    timers = {signal.ITIMER_REAL: (signal.SIGALRM, HANG), signal.ITIMER_PROF: (signal.SIGPROF, SECONDS)}
    for timer, (number, seconds) in timers.items():
        signal.signal(number, too_slow)
        signal.setitimer(timer, seconds)
    try:
        use = FORMS[form](folder, random.Random(f"{form} {seed}"))
        next(use)
        before = listing(folder)
        next(use, None)
        answer = "read", ""
    except UserError as error:
        message = str(error)
        clear = message.isprintable() and len(message) < 1500 and (str(folder) in message or "--" in message)
        answer = ("refused" if clear else "failed"), message
    except (Exception, Failure):
        answer = "failed", traceback.format_exc()
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
    if (after := listing(folder)) != before:
        answer = "failed", f"left behind or removed: {set(before) ^ set(after)}"
    shutil.rmtree(folder)
    return answer


def fuzz(form: str, n: int, seed: int = 0, say=print) -> dict:
    """{"read", "refused", "failed", "slowest"} of n tries, with the seeds seed .. seed + n - 1."""
    global MODELS
    counts = {"read": 0, "refused": 0, "failed": 0, "slowest": 0.0}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        if form == "meta":
            MODELS = Path(place) / "models"
            MODELS.mkdir()
            make_models(MODELS)
        for one in range(seed, seed + n):
            start = time.process_time()
            with contextlib.redirect_stderr(io.StringIO()):  # warnings about 5,000 odd files are no news
                kind, message = attempt(form, one, Path(place) / "try")
            counts[kind] += 1
            counts["slowest"] = max(counts["slowest"], time.process_time() - start)
            if kind == "failed":
                say(f"{form}, seed {one}: {message}")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=5000, help="mutations of each form [5000]")
    parser.add_argument("--form", choices=[*FORMS, "all"], default="all", help="[all]")
    parser.add_argument("--seed", type=int, default=0, help="of the first [0]")
    args = parser.parse_args()
    failed = 0
    for form in FORMS if args.form == "all" else [args.form]:
        counts = fuzz(form, args.n, args.seed)
        failed += counts["failed"] + (counts["slowest"] >= SECONDS)
        print(f"{form}: {args.n} mutations, {counts['read']} read, {counts['refused']} refused in one line, "
              f"{counts['failed']} failed; the slowest took {counts['slowest']:.2f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
