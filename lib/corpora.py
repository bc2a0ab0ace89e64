"""Text and token files.

    read_documents  a .txt or the "text" of records, each also .gz -> documents
    read_corpus     a name (stdlib, shakespeare) or a file -> documents
    prepare         a corpus -> tokenizer, training and validation token files; made once, then found again
    TokenFile       a token file, memory-mapped: ten gigabytes open at once and cost next to no memory
"""
from __future__ import annotations

import ast
import errno
import hashlib
import http.client
import json
import mmap
import os
import random
import re
import struct
import sys
import sysconfig
import urllib.request
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken

from lib.program import UserError, replacing
from lib.records import check_text, read_records, read_text
from lib.tokenizer import SPECIALS, Tokenizer, make_tokenizer

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}
DOCSTRING_OWNERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


# ---- documents ----------------------------------------------------------------------------------------------------

def read_documents(path) -> list[str]:
    """Documents of a .txt (between lines <|endoftext|>), or the "text" of .json or .jsonl records; plain or .gz."""
    form = Path(str(path).removesuffix(".gz")).suffix
    if form == ".txt":
        return re.split(r"(?m)^<\|endoftext\|>\r?$\n?", read_text(path))
    if form not in (".json", ".jsonl"):
        raise UserError(f"{path}: found a name that ends in {form!r}, expected stdlib, shakespeare, or a .txt, .json "
                        "or .jsonl file, or .gz of these")
    documents = []
    for where, record in read_records(path):
        if "text" not in record:
            raise UserError(f'{where}: found the keys {list(record)[:8]}, expected "text"')
        documents.append(check_text(record["text"], f'{where}, "text"'))
    return documents


# ---- corpora by name ----------------------------------------------------------------------------------------------

def stdlib_documents() -> list[str]:
    """The English in every Python: its help topics, and the docstrings of each module as one document; about 2 MB.

    Sources are parsed, never imported. A paragraph that was there before is left out: topics quote one another and
    classes repeat their parents, so that an eighth of the validation text would be training text word for word.
    """
    documents, seen = [], set()
    for path in sorted(STDLIB.rglob("*.py")):
        if STDLIB_SKIP.intersection(path.relative_to(STDLIB).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escapes such as "\d"
                nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError, OSError):
            continue  # a template, a broken link
        if path.parent.name == "pydoc_data":  # topics.py is one dict, name: text
            texts = [value.value for node in nodes if isinstance(node, ast.Dict) for value in node.values]
        else:
            owners = [node for node in nodes if isinstance(node, DOCSTRING_OWNERS)]
            owners.sort(key=lambda node: getattr(node, "lineno", 0))  # as in the source; ast.walk goes level by level
            texts = ["\n\n".join(filter(None, map(ast.get_docstring, owners)))]
        for text in texts:
            paragraphs = []
            for paragraph in re.split(r"\n\s*\n", text.strip()):
                if len(paragraph) <= 40 or paragraph not in seen:  # "For example:" may come again
                    paragraphs.append(paragraph)
                    seen.add(paragraph)
            documents.append("\n\n".join(paragraphs) + "\n")
    # Validation is the last tenth, and in the order of the alphabet that would be about urllib and xml alone.
    random.Random(0).shuffle(documents)
    return documents


def shakespeare_file(cache) -> Path:
    """Where tiny Shakespeare lies (1.1 MB, public domain): downloaded the first time, the checksum verified always."""
    path = Path(cache) / "tinyshakespeare.txt"
    try:
        content = path.read_bytes() if path.exists() else urllib.request.urlopen(SHAKESPEARE_URL, timeout=30).read()
        problem = "" if hashlib.sha256(content).hexdigest() == SHAKESPEARE_SHA256 else "found another text (sha256)"
    except (OSError, http.client.HTTPException) as error:
        problem = f"no download ({error})"
    if problem:
        raise UserError(f"tiny Shakespeare: {problem}; put {SHAKESPEARE_URL} there by hand, as {path}")
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    return path


def read_corpus(data: str, cache="data") -> list[str]:
    """The documents, none of them blank, of a corpus by name or of a file."""
    if data == "stdlib":
        documents = stdlib_documents()
    else:
        documents = read_documents(shakespeare_file(cache) if data == "shakespeare" else data)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"{data}: found no text, expected at least one document")
    return documents


# ---- token files --------------------------------------------------------------------------------------------------

# magic, version, bytes per id, vocabulary, tokenizer's fingerprint, ids, targets, bytes of the text, note, CRC of these
HEADER = struct.Struct("<8s I I Q 16s Q Q Q 188s I")
MAGIC, VERSION = b"LLM0TOKS", 1
DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def write_token_file(path, arrays: Iterable[np.ndarray], tokenizer: Tokenizer, n_bytes: int, note: str = "") -> None:
    """Write the ids of the arrays, one after the other, as a token file; n_bytes and note as in TokenFile."""
    width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    count = n_targets = 0
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        file.write(bytes(HEADER.size))
        for array in arrays:
            file.write(array.astype(DTYPES[width]))
            count += len(array)
            n_targets += int((array != tokenizer.bos_id).sum())
        note_bytes = note.encode()[:188].decode(errors="ignore").encode()  # never half a character
        head = HEADER.pack(MAGIC, VERSION, width, tokenizer.vocab_size, tokenizer.fingerprint.encode(), count,
                           n_targets, n_bytes, note_bytes, 0)[:-4]
        file.seek(0)
        file.write(head + struct.pack("<I", zlib.crc32(head)))


class TokenFile:
    """A token file, memory-mapped. Each document in it is bos + ids + end: where a bos stands, a document begins.

    ids: (N,) uint16 or uint32, a view of the file; vocab_size, fingerprint: of its tokenizer (another `tokenizer` is
    refused); n_targets: ids that are predicted, all but the bos, so that bits per byte are mean loss * n_targets /
    (n_bytes * ln 2); n_bytes: of the text, in UTF-8; note: its origin. UserError for any other file or a damaged one.
    """

    def __init__(self, path, tokenizer: Tokenizer | None = None):
        self.path = path
        try:
            if not os.path.isfile(path):  # to open a pipe could wait for ever
                raise OSError(errno.ENOENT, "it is a folder" if os.path.isdir(path) else "found no such file")
            with open(path, "rb") as file:
                head = file.read(HEADER.size)
                self._check(head, os.fstat(file.fileno()).st_size)
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; delete its folder to make it again") from None
        _, _, width, self.vocab_size, fingerprint, count, self.n_targets, self.n_bytes, note, _ = HEADER.unpack(head)
        self.fingerprint, self.note = ("".join(c if c.isprintable() else "?" for c in text.rstrip(b"\0").decode(
            errors="replace")) for text in (fingerprint, note))  # they are shown
        self.ids = np.frombuffer(self.map, DTYPES[width], count, HEADER.size)  # slices faster than np.memmap
        first_special = self.vocab_size - len(SPECIALS)  # they are the last ids of every vocabulary
        self.pad_id, self.bos_id = (first_special + SPECIALS.index(name) for name in ("<|pad|>", "<|bos|>"))
        if tokenizer and (self.fingerprint, self.vocab_size) != (tokenizer.fingerprint, tokenizer.vocab_size):
            raise UserError(f"{path}: found ids of tokenizer {self.fingerprint} ({self.vocab_size} tokens), expected "
                            f"{tokenizer.fingerprint} ({tokenizer.vocab_size}); prepare the text with this tokenizer")

    def _check(self, head: bytes, size: int) -> None:
        """Nothing in the header is believed before it is known to be whole and to fit the file."""
        if not head.startswith(MAGIC):
            raise UserError(f"{self.path}: found {head[:8]!r}, expected a token file ({MAGIC!r}) as data.py makes them")
        _, version, width, vocab_size, _, count, n_targets, n_bytes, _, crc = HEADER.unpack(
            head.ljust(HEADER.size, b"\0"))
        if version != VERSION:
            problem = f"found version {version}, expected {VERSION}"
        elif crc != zlib.crc32(head[:-4]):
            problem = f"found a damaged header, expected one with the checksum {crc:08x}"
        elif width not in DTYPES or not len(SPECIALS) < vocab_size <= 256**width or count < 2:
            problem = f"found {count} ids of {width} bytes for {vocab_size} tokens, expected two or more that fit"
        elif size != HEADER.size + count * width:
            problem = f"found {size} bytes, expected {HEADER.size + count * width} for {count} ids"
        elif not 0 < n_targets <= count or n_bytes == 0:  # a mean per id and one per byte are taken
            problem = f"found {n_targets} to predict of {count} ids, of {n_bytes} bytes of text, expected some"
        else:
            return
        raise UserError(f"{self.path}: {problem}; delete its folder to make it again")

    def __len__(self) -> int:
        return len(self.ids)

    def forget_pages(self) -> None:
        """Pages once read count as memory of this process until they are the whole file. Let them go; the system keeps
        them cached. Not for 64 MB and less: to map them again would double the time of a small batch."""
        if len(self.map) > 1 << 26:
            self.map.madvise(mmap.MADV_DONTNEED)


# ---- preparing ----------------------------------------------------------------------------------------------------

# In front of the spaces behind a word, and behind the end of a line if a word follows, every tokenizer begins anew, so
# that a cut there changes no id. (A text without such a place is encoded whole.)
CUT = re.compile(r"\S(?= )|\S\n(?=\w)")


def pieces(text: str, size: int = 1 << 20) -> Iterator[str]:
    """A long text in parts of about `size` characters, whose ids one after the other are the ids of the whole."""
    start = 0
    while cut := CUT.search(text, start + size):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def encode_documents(documents: list[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """bos + ids + end of each document, in pieces: encoding takes several times the memory of its text."""
    for document in documents:
        yield np.array([tokenizer.bos_id])
        yield from map(tokenizer.encode_array, pieces(document))
        yield np.array([tokenizer.end_id])


def split_documents(documents: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """(training, validation): validation is the last val_fraction of all characters; a document in the way is cut."""
    left = int(sum(map(len, documents)) * (1 - val_fraction))  # characters that still go to training
    train, val = [], []
    for document in documents:
        train.append(document[:left])
        val.append(document[left:])
        left -= len(train[-1])
    return list(filter(None, train)), list(filter(None, val))


def identity(data: str) -> list:
    """What tells one state of a corpus from another, without reading it."""
    if data == "stdlib":
        return [sys.version, str(STDLIB)]
    if data == "shakespeare":
        return [SHAKESPEARE_SHA256]
    if not os.path.isfile(data):
        found = "a folder" if os.path.isdir(data) else "no such file"
        raise UserError(f"{data}: found {found}, expected stdlib, shakespeare or the path of a file")
    return [os.path.abspath(data), os.path.getsize(data), os.stat(data).st_mtime_ns]


def prepare(data: str, *, tokenizer="bpe", vocab_size=4096, val_data="", val_fraction=0.1, cache="data"):
    """Make or find the token files of a corpus. Returns the paths (train.bin, val.bin, tokenizer.json).

    data, val_data: stdlib, shakespeare or a file; without val_data the last val_fraction of data is validation.
    tokenizer: byte, char, bpe, a name that tiktoken knows, or a tokenizer.json; vocab_size: of bpe.
    Their folder in `cache` is named after a hash of all that decides the ids: a second start reads no text. Processes
    that start together make the same files, and one wins. UserError for unusable input; nothing is written then.
    """
    if not val_data and not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction: found {val_fraction}, expected a number between 0 and 1")
    spec = Tokenizer.load(tokenizer).fingerprint if os.path.isfile(tokenizer) else tokenizer
    if spec in tiktoken.list_encoding_names():
        make_tokenizer(spec)  # named by the user, so fetched if need be: the tokenizer.json below fetches none
    decides = [VERSION, identity(data), identity(val_data) if val_data else val_fraction, spec, vocab_size]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]
    folder = Path(cache) / f"{Path(data).name.split('.')[0]}-{Path(tokenizer).stem}-{key}"
    paths = folder / "train.bin", folder / "val.bin", folder / "tokenizer.json"
    if folder.exists():
        return paths

    documents = read_corpus(data, cache)
    train, val = (documents, read_corpus(val_data, cache)) if val_data else split_documents(documents, val_fraction)
    if not train or not val:
        raise UserError(f"{data}: found too little text to set --val_fraction {val_fraction} aside; give more text")
    # BPE learns from the training text alone. An alphabet has to be that of all the text: a character that only
    # validation has could not be encoded at all, and to know that it exists does not help to predict it.
    encoder = make_tokenizer(tokenizer, train + val if tokenizer == "char" else train, vocab_size)
    with replacing(folder) as temporary:
        temporary.mkdir()
        encoder.save(temporary / "tokenizer.json")
        for path, part, source in zip(paths, (train, val), (data, val_data or data)):
            n_bytes, digest = 0, hashlib.sha256()
            for document in map(str.encode, part):
                n_bytes += len(document)
                digest.update(document)
            origin = f"stdlib of Python {sys.version.split()[0]}" if source == "stdlib" else source
            note = f"{len(part)} documents, {sum(map(len, part))} characters, " \
                   f"sha256 {digest.hexdigest()[:16]}, {origin}"
            write_token_file(temporary / path.name, encode_documents(part, encoder), encoder, n_bytes, note)
    return paths
