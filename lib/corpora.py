"""Text and token files.

    read_corpus   a name (stdlib, shakespeare) or a file (.txt, .json, .jsonl, or .gz of these) -> documents
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
from lib.records import by_form, check_text, read_records, read_text
from lib.tokenizer import Tokenizer, make_tokenizer

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
STDLIB = Path(os.__file__).parent
STDLIB_SKIP = set("site-packages dist-packages test tests idlelib lib2to3 turtledemo encodings".split())
DOCSTRING_OWNERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SEPARATOR = re.compile(r"(?m)^<\|endoftext\|>\r?$\n?")  # a line of its own between two documents
TEXTS = {("text",): lambda record, where: check_text(record["text"], f'{where}, "text"')}  # a form of records


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
            raise UserError(f"tiny Shakespeare: {error}; put {SHAKESPEARE_URL} there as {path}") from None
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    return path


def read_corpus(data: str, cache="data") -> list[str]:
    """The documents, none of them blank, of stdlib, shakespeare or a file: .json or .jsonl records with
    "text", or any other text, in which lines <|endoftext|> part the documents; plain or .gz."""
    path = shakespeare_file(cache) if data == "shakespeare" else data
    if data == "stdlib":
        documents = stdlib_documents()
    elif {".json", ".jsonl"} & set(Path(path).suffixes):
        documents = [by_form(TEXTS, record, where) for where, record in read_records(path)]
    else:
        documents = SEPARATOR.split(read_text(path))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"{data}: found no text, expected at least one document")
    return documents


# magic, version, bytes per id, vocabulary, tokenizer's fingerprint, ids, targets, bytes of text, note, CRC
HEADER = struct.Struct("<8s I I Q 16s Q Q Q 188s I")
MAGIC, VERSION = b"LLM0TOKS", 1


def write_token_file(path, arrays: Iterable, tokenizer: Tokenizer, n_bytes: int, note: str = "") -> None:
    """Write the ids of the arrays, one after the other, as a token file; n_bytes and note as in TokenFile."""
    width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    ids = np.concatenate([np.asarray(array, f"<u{width}") for array in arrays])
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
        self.pad_id, self.bos_id = self.vocab_size - 6, self.vocab_size - 5  # as in every Tokenizer

    def __len__(self) -> int:
        return len(self.ids)


def pieces(text: str, size: int = 1 << 20) -> list[str]:
    """Parts of a text, of about `size` characters: they take less memory to encode. The ids are those of the
    whole: any tokenizer begins anew before a space behind a word, and on a new line that begins with one."""
    return re.findall(rf"(?s).{{{size}}}.*?(?:\S(?= )|\S\n(?=\w))|.+", text)


def split_documents(documents: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """(training, validation): validation is the last val_fraction of characters. A document may be cut."""
    left = max(0, int(sum(map(len, documents)) * (1 - val_fraction)))  # what still goes to training
    train, val = [], []
    for document in documents:
        train.append(document[:left])
        val.append(document[left:])
        left -= len(train[-1])
    return list(filter(None, train)), list(filter(None, val))


def identity(data: str) -> list:
    """What tells one state of a corpus from another, without reading it."""
    if data in ("stdlib", "shakespeare"):
        return [sys.version, str(STDLIB)] if data == "stdlib" else [SHAKESPEARE_SHA256]
    if not os.path.isfile(data):
        raise UserError(f"{data}: found no such file, expected stdlib, shakespeare or a path")
    return [os.path.abspath(data), os.path.getsize(data), os.stat(data).st_mtime_ns]


def prepare(data: str, *, tokenizer="bpe", vocab_size=4096, val_data="", val_fraction=0.1, cache="data"):
    """Make or find the token files of a corpus. Returns the paths (train.bin, val.bin, tokenizer.json).
    data, val_data: as in read_corpus; without val_data the last val_fraction of data is validation.
    tokenizer, vocab_size: as in make_tokenizer. The folder in `cache` is named after a hash of all that
    decides the ids: a second start reads no text."""
    made = None if tokenizer in ("char", "bpe") else make_tokenizer(tokenizer)  # fetches what only has a name
    spec = made.fingerprint if made and made.path else tokenizer
    decides = [VERSION, identity(data), identity(val_data) if val_data else val_fraction, spec, vocab_size]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]
    folder = Path(cache) / f"{Path(data).name.split('.')[0]}-{Path(tokenizer).stem}-{key}"
    paths = folder / "train.bin", folder / "val.bin", folder / "tokenizer.json"
    if folder.exists():
        return paths
    train = read_corpus(data, cache)
    train, val = (train, read_corpus(val_data, cache)) if val_data else split_documents(train, val_fraction)
    if not train or not val:
        raise UserError(f"{data}: found no text to train on, or none for --val_fraction {val_fraction}")
    # BPE learns from training text alone; the alphabet is that of all text, or validation cannot be encoded.
    made = made or make_tokenizer(tokenizer, train + val if tokenizer == "char" else train, vocab_size)
    with replacing(folder) as temporary:  # of processes that start together, one wins
        temporary.mkdir()
        made.save(temporary / "tokenizer.json")
        for path, part, source in zip(paths, (train, val), (data, val_data or data)):
            text = "".join(part).encode()
            source = f"stdlib of Python {sys.version.split()[0]}" if source == "stdlib" else source
            note = (f"{len(part)} documents, {sum(map(len, part))} characters, "
                    f"sha256 {hashlib.sha256(text).hexdigest()[:16]}, {source}")
            ids = (array for document in part for array in
                   ([made.bos_id], *map(made.encode_array, pieces(document)), [made.end_id]))
            write_token_file(temporary / path.name, ids, made, len(text), note)
    return paths
