"""Text and token files.

    read_corpus   a name (stdlib, shakespeare) or files (text, or records with "text") -> documents
    prepare       a corpus -> tokenizer, training and validation token files; made once, then found again
    TokenFile     a token file, memory-mapped: it opens at once and takes next to no memory, however large
"""
import ast
import hashlib
import json
import mmap
import os
import random
import re
import struct
import sys
import urllib.request
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lib.program import UserError, replacing
from lib.records import Records, check_text, find_files, found_in, read_text
from lib.tokenizer import Tokenizer, make_tokenizer

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
STDLIB = Path(os.__file__).parent
STDLIB_SKIP = set("site-packages dist-packages test tests idlelib lib2to3 turtledemo encodings".split())
DOCSTRING_OWNERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SEPARATOR = re.compile(r"<\|endoftext\|>\n?")  # between two documents, anywhere in a line
RECORDS = re.compile(r'\s*(\[\s*)?\{\s*("[^"\n]*"\s*:|\})')  # how JSON begins; a text may also begin with {


def stdlib_documents() -> list[str]:
    """The English in every Python, about 2 MB: help topics and the docstrings of each module. They repeat one
    another; a repeated paragraph is left out, or validation would hold training text."""
    documents, seen = [], set()
    for path in sorted(STDLIB.rglob("*.py")):
        if STDLIB_SKIP.intersection(path.relative_to(STDLIB).parts):
            continue
        try:
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError, OSError):
            continue  # a template, a broken link
        if path.parent.name == "pydoc_data":  # topics.py is one dict, name: text
            texts = [value.value for node in nodes if isinstance(node, ast.Dict) for value in node.values]
        else:
            owners = [node for node in nodes if isinstance(node, DOCSTRING_OWNERS)]
            owners.sort(key=lambda node: getattr(node, "lineno", 0))  # the order of the source
            texts = ["\n\n".join(filter(None, map(ast.get_docstring, owners)))]
        for text in texts:
            paragraphs = []
            for paragraph in re.split(r"\n\s*\n", text.strip()):
                if len(paragraph) <= 40 or paragraph not in seen:  # "For example:" may come again
                    paragraphs.append(paragraph)
                    seen.add(paragraph)
            documents.append("\n\n".join(paragraphs) + "\n")
    random.Random(0).shuffle(documents)  # else validation would be about urllib and xml alone
    return documents


def shakespeare_file(cache) -> Path:
    """Where tiny Shakespeare lies (1.1 MB, public domain). It is downloaded once."""
    path = Path(cache) / "tinyshakespeare.txt"
    if not path.exists():
        try:
            content = urllib.request.urlopen(SHAKESPEARE_URL, timeout=30).read()
            if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
                raise OSError("another text by its sha256")
        except OSError as error:
            raise UserError(f"tiny Shakespeare: {error}; use --data stdlib, which needs no network, or put "
                            f"{SHAKESPEARE_URL} there as {path}") from None
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    return path


def text_of_record(record: dict) -> str:
    if not isinstance(text := record.get("text"), str) or not text.strip():
        raise UserError(f'found {found_in(record)} and no text, expected a record with "text"')
    return check_text(text)


def read_corpus(data: str, cache="data", strict: bool = False) -> Records:
    """The documents, none of them blank, of stdlib, shakespeare or files: records with "text", or plain text.
    <|endoftext|> parts documents. CRLF becomes LF: it would cost two tokens a line."""
    found = Records(data)
    if data == "stdlib":
        found += stdlib_documents()
    name = str(shakespeare_file(cache)) if data == "shakespeare" else data
    for path in find_files(name) if data != "stdlib" else ():
        text = read_text(path, "surrogateescape")
        if RECORDS.match(text) or re.search(r"\.jsonl?(\.gz)?$", path):
            found.take(path, text, text_of_record)
        else:
            found.append(text if text.isascii() else read_text(path))
    parts = [part for text in found for part in SEPARATOR.split(text.replace("\r\n", "\n"))]
    found[:] = [part for part in parts if part.strip()]
    return found.check(strict)


# magic, version, bytes per id, vocabulary, tokenizer's fingerprint, ids, targets, bytes of text, note, CRC
HEADER = struct.Struct("<8s I I Q 16s Q Q Q 188s I")
MAGIC, VERSION = b"LLM0TOKS", 1


def write_token_file(path, arrays: Iterable, tokenizer: Tokenizer, n_bytes: int, note: str = "") -> None:
    """Write the ids of the arrays, one after the other, as a token file; n_bytes and note as in TokenFile."""
    width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    ids = np.concatenate([np.zeros(0, f"<u{width}"), *(np.asarray(array, f"<u{width}") for array in arrays)])
    head = HEADER.pack(MAGIC, VERSION, width, tokenizer.vocab_size, tokenizer.fingerprint.encode(), len(ids),
                       int((ids != tokenizer.bos_id).sum()), n_bytes, note.encode(), 0)[:-4]
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(head + struct.pack("<I", zlib.crc32(head)) + ids.tobytes())


class TokenFile:
    """ids: uint16 or uint32 (tokens,), a view of the file; of each document bos + ids + end. vocab_size,
    fingerprint, pad_id, bos_id: of its tokenizer. n_targets: ids to predict, all but bos. n_bytes: of the
    UTF-8 text; bits per byte are mean loss * n_targets / (n_bytes * ln 2). note: where the text comes from.
    map: the memory that holds the file. UserError for a damaged file, or one of another tokenizer."""

    def __init__(self, path, tokenizer: Tokenizer | None = None):
        with open(path, "rb") as file:
            head, size = file.read(HEADER.size).ljust(HEADER.size), os.path.getsize(path)
            magic, version, width, self.vocab_size, fingerprint, count, *more, crc = HEADER.unpack(head)
            whole = MAGIC, VERSION, zlib.crc32(head[:-4]), HEADER.size + count * width
            if (magic, version, crc, size) != whole:
                raise UserError(f"{path}: found no whole token file, expected one; delete its folder")
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.path, (self.n_targets, self.n_bytes, note) = path, more
        self.fingerprint, self.note = (x.rstrip(b"\0").decode(errors="ignore") for x in (fingerprint, note))
        if tokenizer and self.fingerprint != tokenizer.fingerprint:
            raise UserError(f"{path}: found tokenizer {self.fingerprint}, expected {tokenizer.fingerprint}")
        self.ids = np.frombuffer(self.map, f"<u{width}", count, HEADER.size)  # slices faster than np.memmap
        self.pad_id, self.bos_id = self.vocab_size - 6, tokenizer.bos_id if tokenizer else self.vocab_size - 5

    def __len__(self) -> int:
        return len(self.ids)


def pieces(text: str, size: int = 1 << 20) -> list[str]:
    """Parts of a text, of about `size` characters: they take less memory to encode. The ids are those of the
    whole: any tokenizer begins anew before a space behind a word, and on a new line that begins with one."""
    return re.findall(rf"(?s).{{{size}}}.*?(?:\S(?= )|\S\n(?=\w))|.+", text)


def split_documents(documents: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """(training, validation): the last val_fraction of characters, less documents that training has, too."""
    left = max(0, int(sum(map(len, documents)) * (1 - val_fraction)))  # what still goes to training
    train, val = [], []
    for document in documents:
        train.append(document[:left])
        val.append(document[left:])
        left -= len(train[-1])
    known = {"", *train}
    return list(filter(None, train)), [document for document in val if document not in known]


def identity(data: str) -> list:
    """What tells one state of a corpus from another, without reading it."""
    if data in ("stdlib", "shakespeare"):
        return [sys.version, str(STDLIB)] if data == "stdlib" else [SHAKESPEARE_SHA256]
    stats = [(os.path.abspath(path), os.stat(path)) for path in find_files(data)]
    return [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]


def prepare(data: str, *, tokenizer="bpe", vocab_size=4096, val_data="", val_fraction=0.1, strict=False,
            cache="data"):
    """Make or find the token files of a corpus. Returns the paths (train.bin, val.bin, tokenizer.json).
    Beside them read.json says what was read, in words and numbers. Without validation val.bin is empty.
    data, val_data: as in read_corpus; without val_data the last val_fraction of data is validation.
    tokenizer, vocab_size: as in make_tokenizer. The folder in `cache` is named after a hash of all that
    decides the ids: a second start reads no text."""
    made = None if tokenizer in ("char", "bpe") else make_tokenizer(tokenizer)  # fetches what only has a name
    spec = made.fingerprint if made and made.path else tokenizer
    other = identity(val_data) if val_data else val_fraction
    decides = [VERSION, identity(data), other, spec, vocab_size, strict]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]
    folder = Path(cache) / f"{Path(data).name.split('.')[0]}-{Path(tokenizer).stem}-{key}"
    paths = folder / "train.bin", folder / "val.bin", folder / "tokenizer.json"
    if folder.exists():
        return paths
    found = [read_corpus(name, cache, strict) for name in (data, val_data) if name]
    train, val = found if val_data else split_documents(found[0], val_fraction)
    if not train:
        raise UserError(f"{data}: found no text left to train on, expected a lower --val_fraction")
    # BPE learns from training text alone; the alphabet is that of all text, or validation cannot be encoded.
    made = made or make_tokenizer(tokenizer, train + val if tokenizer == "char" else train, vocab_size)
    with replacing(folder) as temporary:  # of processes that start together, one wins
        temporary.mkdir()
        made.save(temporary / "tokenizer.json")
        none = [] if val else [f"no validation: --val_fraction {val_fraction} leaves no text for it"]
        report = "\n".join([records.report() for records in found] + none)
        (temporary / "read.json").write_text(json.dumps([report, found[0].metrics()]), "utf-8")
        for path, part, source in zip(paths, (train, val), (data, val_data or data)):
            text = "".join(part).encode()
            source = f"stdlib of Python {sys.version.split()[0]}" if source == "stdlib" else source
            note = (f"{len(part)} documents, {sum(map(len, part))} characters, "
                    f"sha256 {hashlib.sha256(text).hexdigest()[:16]}, {source}")
            ids = (array for document in part for array in
                   ([made.bos_id], *map(made.encode_array, pieces(document)), [made.end_id]))
            write_token_file(temporary / path.name, ids, made, len(text), note)
    return paths
