"""From dirty text to a corpus: clean, filter, mask, drop what repeats, mix.

    python -m tools.prepare a.jsonl.gz folder/ b.txt --out corpus.jsonl
    python -m tools.prepare web/ books/ --mix mix.json --against test.jsonl --out corpus.jsonl

The inputs come first, then the flags. report.html, beside the corpus, shows what each rule removed. The rules
are in tools/clean.py and tools/repeats.py. A run that was stopped goes on.
"""
import fcntl
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from lib.corpora import RECORDS, identity, text_of_record
from lib.program import UserError, parse, replacing, require_positive, start, writing
from lib.records import KINDS, Records, check_text, find_files, read_records, scan
from tools.clean import CleanConfig, clean, edits, size
from tools.repeats import RepeatConfig, duplicates

PART = 1 << 20  # characters that are cleaned at once
ENDLESS = 16 * PART  # a text in which no separator comes is parted after so many bytes
NUMBERS = "input", "offset", "size"  # of a document: which input, where in the file of cleaned ones, bytes
LATE = "out", "workers", "exact", "near", "mix", "size", "max_epochs"  # flags that cleaning does not need


@dataclass
class Config(CleanConfig, RepeatConfig):
    out: str = "corpus.jsonl"  # the corpus, records {"text", "source"}; the report goes beside it
    workers: int = 2  # processes that clean
    separator: str = "<|endoftext|>"  # what parts the documents of a plain text; $'\n\n': an empty line
    # mixture
    mix: str = ""  # file {input: weight}, which weighs bytes; empty: every document once
    size: int = 0  # bytes of it; 0: as many as the inputs have left
    max_epochs: float = 4.0  # most readings of one input (Muennighoff et al. 2023)


# ---- reading

def blocks(path: str, separator: str) -> Iterator[tuple[int, str, bool, int]]:
    """(number of the first line, text of whole documents, whether these are records, bytes of the file that
    are read). About a megabyte each, but a JSON array is one block. CRLF becomes LF."""
    with open(path, "rb") as raw:
        file = gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
        head, line, left, lines = file.peek(1 << 12), 1, b"", [b""]
        kind = next((kind for begin, kind in KINDS.items() if head.startswith(begin)), "")
        if kind or re.search(r"\.csv(\.gz)?$", path, re.I):
            raise UserError(f"found {kind or 'csv'}, expected JSON or UTF-8 text; pandas can convert it")
        head = head.decode("utf-8", "replace")
        records = bool(RECORDS.match(head.lstrip("\ufeff")) or re.search(r"\.jsonl?(\.gz)?$", path, re.I))
        array = records and head.lstrip("\ufeff \r\n").startswith("[")
        border = b"\n" if records else separator.encode()
        file.read(3 * (head[:1] == "\ufeff"))
        while lines:
            lines = file.readlines(-1 if array else PART)
            left += b"".join(lines).replace(b"\r\n", b"\n")
            end = left.rfind(border) + len(border) if border in left else 0
            end = len(left) if array or not lines or len(left) - end > ENDLESS else end
            text = left[:end].decode("utf-8", "surrogateescape")
            yield line, text, records, raw.tell()
            line, left = line + text.count("\n"), left[end:]


def documents(path: str, separator: str) -> Iterator[tuple[str, str | UserError, int]]:
    """(file:line, text or what is wrong, bytes of the file that are read)"""
    try:
        for line, text, records, read in blocks(path, separator):
            for at, item in scan(path, text) if records else [(1, piece) for piece in text.split(separator)]:
                where = f"{path}:{line + at - 1}"
                line += 0 if records else (item + separator).count("\n")  # scan() counts lines by itself
                try:
                    item = text_of_record(item) if isinstance(item, dict) else item
                    if len(check_text(str(item))) > 2 * ENDLESS:
                        raise UserError("found a text of more than 32 million letters, expected documents")
                except UserError as error:
                    item = error
                if str(item).strip():
                    yield where, item, read
    except (OSError, EOFError, zlib.error, UserError) as error:
        yield path, UserError(f"cannot be read to its end: {error}"), 0


def parts(inputs: list[tuple[int, str]], done: int, separator: str) -> Iterator[tuple[list, float]]:
    """([(input, file, file:line, text or what is wrong)], share that is read) of inputs (number, file): about
    a megabyte each. The first documents, which are done, are left out."""
    part, length, before, total = [], 0, 0, sum(os.path.getsize(path) for _, path in inputs)
    for source, path in inputs:
        for where, text, read in documents(path, separator):
            done -= 1
            if done < 0:
                part.append((source, path, where, text))
                length += len(str(text))
            if length > PART:
                yield part, (before + read) / total
                part, length = [], 0
        before += os.path.getsize(path)
    yield part, 1.0


# ---- cleaning

def clean_all(inputs: list[tuple[int, str]], path: Path, cfg: Config) -> None:
    """Write path: a line for each document. Lines that are there stay, but for one that was cut off."""
    how = cfg.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)
    with multiprocessing.Pool(*how) as pool, writing(path), open(path, "ab+") as file:  # no worker locks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: in use by another run; choose another --out, or end that run") from None
        file.seek(0)
        done = end = 0
        for line in file:
            done, end = (done + 1, end + len(line)) if line.endswith(b"\n") else (done, end)
        file.truncate(end)
        left, first, began = parts(inputs, done, cfg.separator), None, time.perf_counter()
        workers, some = {*multiprocessing.active_children()}, list(islice(left, 4 * cfg.workers))
        while some:  # few at once, so that they need little memory
            result = pool.starmap_async(clean, [(part, cfg) for part, _ in some], 1)
            share, some = some[-1][1], list(islice(left, 4 * cfg.workers))  # we read on while they clean
            while not result.ready():
                result.wait(1)
                if {*multiprocessing.active_children()} != workers:  # its part would never come
                    raise UserError("a worker was killed, perhaps for its memory; fewer --workers need less")
            file.writelines(result.get())
            first = share if first is None else first
            if sys.stdout.isatty() and share > first:
                seconds = (time.perf_counter() - began) * (1 - share) / (share - first)
                said = f"{share:.0%} cleaned, {seconds:.0f} s left" if share < 1 else "all cleaned\n"
                print(f"\r\033[K{said}", end="", flush=True)


# ---- the mixture

def quotas(sizes: dict[str, int], weights: dict[str, float], total: float, most: float) -> dict[str, float]:
    """Bytes of each input, in the order of sizes: the total in the ratio of the weights, but of no input more
    than `most` epochs. What it lacks the others give, in their ratio."""
    found, free = {}, dict(weights)
    while free:
        rate = (total - sum(found.values())) / (sum(free.values()) or 1)
        full = {name: most * sizes[name] for name in free if free[name] * rate >= most * sizes[name]}
        found |= full or {name: free[name] * rate for name in free}
        free = {name: free[name] for name in free if name not in found}
    return {name: found[name] for name in sizes}


def mixed(of_input, sizes, digests, quota: list[float]) -> np.ndarray:
    """Numbers of documents, so many bytes of each input, evenly spread. Hashes order an input, anew in each
    epoch, and the last one may end early: so its choice does not depend on the other inputs."""
    chosen, place = [np.zeros(0, np.int64)], [np.zeros(0)]
    for source, wanted in enumerate(quota):
        mine = np.flatnonzero(of_input == source)
        for epoch in range(math.ceil(wanted / max(1, sizes[mine].sum()))):
            factor = np.uint64(random.Random(epoch).getrandbits(64) | 1)
            order = mine[np.argsort(digests[mine] * factor)]
            upto = epoch * sizes[mine].sum() + np.cumsum(sizes[order]) - sizes[order] / 2
            chosen.append(order[upto < wanted])
            place.append(upto[upto < wanted] / wanted)
    return np.concatenate(chosen)[np.argsort(np.concatenate(place), kind="stable")]


# ---- the whole

def note(rules: dict, rule: str, cut: int, where: str, example: str) -> None:
    """Count a document that a rule changed or removed. Ten examples stay, those with the smallest hashes."""
    entry = rules.setdefault(rule, {"documents": 0, "bytes": 0, "examples": []})
    entry["documents"] += 1
    entry["bytes"] += cut
    entry["examples"] = sorted([*entry["examples"], [zlib.crc32(example.encode()), where, example]])[:10]


def read_cleaned(path: Path, bands: int) -> tuple[dict, dict, dict, int]:
    """({what: array} of the documents left, what each rule did, what was used of each file, bytes read)"""
    left = {"digest": bytearray(), "bands": bytearray(), **{name: array("q") for name in NUMBERS}}
    rules, files, read, offset = {}, {}, 0, 0
    with open(path, "rb") as file:
        for text in file:
            line = json.loads(text)
            used = files.setdefault(line["file"], Records(line["file"]))
            if why := line.get("left_out"):
                used.left_out[why].append(line["source"])
                used.unused += 1
            else:
                used.append(None)
                read += line["read"]
            for rule, cut, example in line["rules"]:
                note(rules, rule, cut, line["source"], example)
            if "text" in line:
                for name, value in zip(NUMBERS, (line["input"], offset, size(line["text"]))):
                    left[name].append(value)
                left["digest"] += bytes.fromhex(line["digest"])
                left["bands"] += bytes.fromhex(line["bands"])
            offset += len(text)
    kinds = {"digest": "V16", "bands": ("<u4", bands)}
    left = {name: np.frombuffer(some, kinds.get(name, "i8")) for name, some in left.items()}
    return left, rules, files, read


def table(rules: dict, edited: list[str], documents: int, read: int) -> list[dict]:
    """The rules and what is left after each: in their order, but of those on one text the strongest first."""
    last, found = ["text of a test", "same words", "near duplicate"], []
    removed = sorted(rules.keys() - {*edited, *last}, key=lambda rule: (-rules[rule]["bytes"], rule))
    for rule in [*edited, *removed, *last]:
        entry = rules.get(rule, {"documents": 0, "bytes": 0, "examples": []})
        documents, read = documents - entry["documents"] * (rule not in edited), read - entry["bytes"]
        found.append({"rule": rule, "removes": rule not in edited, **entry,
                      "documents_left": documents, "bytes_left": read})
    return found


def largest(first, similarity: Callable, line_of: Callable) -> list[dict]:
    """The ten largest clusters, with the document that stays and the least similar of a hundred others."""
    found = []
    for i, n in Counter(first.tolist()).most_common(10):
        if others := np.flatnonzero(first == i)[1:101].tolist():
            far = min(others, key=lambda j: similarity(i, j))
            found.append({"documents": n, "similarity": similarity(i, far),
                          "stays": line_of(i)["text"][:300], "goes": line_of(far)["text"][:300]})
    return found


def finish(cleaned: Path, names: list[str], weights: dict, cfg: Config) -> dict:
    """Write the corpus of what clean_all() has written; return the report."""
    left, rules, files, read = read_cleaned(cleaned, cfg.bands)
    documents = sum(map(len, files.values()))
    with open(cleaned, "rb") as file:
        def line_of(i: int) -> dict:
            file.seek(left["offset"][i])
            return json.loads(file.readline())

        same, first, similarity = duplicates(left["digest"], left["bands"], lambda i: line_of(i)["text"], cfg)
        for i in np.flatnonzero(first != np.arange(len(first))).tolist():
            line, rule = line_of(i), "same words" if same[i] != i else "near duplicate"
            note(rules, rule, size(line["text"]), line["source"], line["text"][:200])
        order = kept = np.flatnonzero(first == np.arange(len(first)))
        of_input, sizes = left["input"][kept], left["size"][kept]
        have = {name: int(sizes[of_input == i].sum()) for i, name in enumerate(names)}
        if weights := weights or (have if cfg.size else {}):
            take = quotas(have, weights, cfg.size or sum(have.values()), cfg.max_epochs)
            order = kept[mixed(of_input, sizes, left["digest"][kept].view("<u8")[::2], list(take.values()))]
        if len(order):
            with replacing(Path(cfg.out)) as temporary, open(temporary, "w", encoding="utf-8") as corpus:
                for line in map(line_of, order.tolist()):
                    record = {"text": line["text"], "source": line["source"]}
                    corpus.write(json.dumps(record, ensure_ascii=False) + "\n")
        return {"documents": documents, "bytes": read, "rules": table(rules, [*edits(cfg)], documents, read),
                "files": {path: found.report() for path, found in files.items() if found.unused},
                "clusters": largest(first, similarity, line_of),
                "inputs": [{"input": name, "documents": int((of_input == i).sum()), "bytes": have[name],
                            "taken": int(left["size"][order][left["input"][order] == i].sum())}
                           for i, name in enumerate(names)]}


def show(report: dict) -> None:
    for found in report["files"].values():
        print(found)
    print(f"{'rule':32}{'documents':>12}{'MB':>10}{'documents left':>16}{'MB left':>10}")
    for row in report["rules"]:
        print(f"{row['rule']:32}{row['documents']:12,}{row['bytes'] / 1e6:10.2f}{row['documents_left']:16,}"
              f"{row['bytes_left'] / 1e6:10.2f}")


def read_weights(path: str, names: list[str]) -> dict[str, float]:
    weights = read_records(path)[0]
    good = all(type(weight) in (int, float) and 0 <= weight < math.inf for weight in weights.values())
    if weights.keys() != set(names) or not good or not any(weights.values()):
        raise UserError(f"{path}: found {ascii(weights)}, expected weights of {', '.join(names)}")
    return weights


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    n = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    names, cfg = argv[:n], parse(Config, argv[n:], __doc__)
    require_positive(cfg, "workers", "shingle", "bands", "rows", "max_epochs")
    if not names or len(set(names)) < len(names) or not cfg.separator:
        raise UserError(f"found {names}, expected different files or folders before the flags, a --separator")
    weights, out = read_weights(cfg.mix, names) if cfg.mix else {}, Path(cfg.out)
    pages = out.with_name("report.json"), out.with_name("report.html")
    ours = [path.resolve() for path in (out, *pages)]
    inputs = [(i, path) for i, name in enumerate(names) for path in find_files(name)
              if Path(path).resolve() not in ours]
    decides = {name: value for name, value in asdict(cfg).items() if name not in LATE}
    decides = [decides, [(i, identity(path)) for i, path in inputs], cfg.against and identity(cfg.against)]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]
    cleaned = out.with_name(f"{out.name}.{key}.cleaned")
    out.parent.mkdir(parents=True, exist_ok=True)
    clean_all(inputs, cleaned, cfg)
    report = finish(cleaned, names, weights, cfg)
    page = Path(__file__).with_suffix(".html").read_text("utf-8")
    page = page.replace("$report", json.dumps(report).replace("<", "\\u003c"))
    for path, text in zip(pages, (json.dumps(report, indent=1), page)):
        with replacing(path) as temporary:
            temporary.write_text(text, "utf-8")
    for left in [*out.parent.glob(f"{out.name}.*.cleaned"), *out.parent.glob(f"{out.name}.tmp-*")]:
        left.unlink()  # also of runs that were killed or had other flags
    show(report)
    taken = sum(row["taken"] for row in report["inputs"])
    if not taken:
        raise UserError(f"{' '.join(names)}: nothing is left, {pages[1]} shows why; long texts: --separator")
    print(f"{out}: {taken / 1e6:.2f} MB, about {taken / 4e6:.1f} M tokens; {pages[1]} shows what was removed")


if __name__ == "__main__":
    start(main)
