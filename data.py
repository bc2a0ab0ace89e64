"""From text to training batches.

    prepare         a corpus -> tokenizer, training and validation token files; made once, then found again
    TokenFile       a token file, memory-mapped: ten gigabytes open at once and cost next to no memory
    Windows         pretraining batches, a pure function of (seed, step, row): the same data at any world size
    eval_windows    every target of a token file, exactly once

    python data.py                                             # the English of Python's own library, as BPE tokens
    python data.py --data shakespeare --tokenizer char
    python data.py --data my.txt --vocab_size 1024 --show      # and print a window: token | target | segment
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from common import UserError, parse, run
from corpus import SHAKESPEARE_SHA256, STDLIB, read_corpus, replacing
from tokenizer import SPECIALS, Tokenizer, make_tokenizer

IGNORE = -100  # the target of a position that is not trained


# ---- token files --------------------------------------------------------------------------------------------------

# magic, version, bytes per id, vocabulary, tokenizer's fingerprint, ids, targets, bytes of the text, note, CRC of these
HEADER = struct.Struct("<8s I I Q 16s Q Q Q 188s I")
MAGIC, VERSION = b"LLM0TOKS", 1
DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def write_token_file(path, arrays: Iterable[np.ndarray], tokenizer: Tokenizer, n_bytes: int, note: str = "") -> None:
    """Write the ids of the arrays, one after the other, as a token file, whole or not at all.

    n_bytes: UTF-8 bytes of the text, for bits per byte; note: its origin, for the log. Memory: one array.
    """
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
        file.flush()
        os.fsync(file.fileno())


class TokenFile:
    """A token file, memory-mapped. Each document in it is bos + ids + end: where a bos stands, a document begins.

    ids: (N,) uint16 or uint32, a view of the file; vocab_size, fingerprint: of its tokenizer (another `tokenizer` is
    refused); n_targets: ids that are predicted, all but the bos, so that bits per byte are mean loss * n_targets /
    (n_bytes * ln 2); n_bytes: of the text, in UTF-8; note: its origin. UserError for any other file or a damaged one.
    """

    def __init__(self, path, tokenizer: Tokenizer | None = None):
        self.path = path
        try:
            with open(path, "rb") as file:
                head = file.read(HEADER.size)
                self._check(head, os.fstat(file.fileno()).st_size)
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; delete its folder to make it again") from None
        _, _, width, self.vocab_size, fingerprint, count, self.n_targets, self.n_bytes, note, _ = HEADER.unpack(head)
        self.fingerprint, self.note = fingerprint.decode(), note.rstrip(b"\0").decode()
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
        _, version, width, vocab_size, _, count, *_, crc = HEADER.unpack(head.ljust(HEADER.size, b"\0"))
        if version != VERSION:
            problem = f"found version {version}, expected {VERSION}"
        elif crc != zlib.crc32(head[:-4]):
            problem = f"found a damaged header, expected one with the checksum {crc:08x}"
        elif width not in DTYPES or not len(SPECIALS) < vocab_size <= 256**width or count < 2:
            problem = f"found {count} ids of {width} bytes for {vocab_size} tokens, expected two or more that fit"
        elif size != HEADER.size + count * width:
            problem = f"found {size} bytes, expected {HEADER.size + count * width} for {count} ids"
        else:
            return
        raise UserError(f"{self.path}: {problem}; delete its folder to make it again")

    def __len__(self) -> int:
        return len(self.ids)


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
    stat = os.stat(data)
    return [os.path.abspath(data), stat.st_size, stat.st_mtime_ns]


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
            for document in part:
                encoded = document.encode()
                n_bytes += len(encoded)
                digest.update(encoded)
            origin = f"stdlib of Python {sys.version.split()[0]}" if source == "stdlib" else source
            characters = sum(map(len, part))
            note = f"{len(part)} documents, {characters} characters, sha256 {digest.hexdigest()[:16]}, {origin}"
            write_token_file(temporary / path.name, encode_documents(part, encoder), encoder, n_bytes, note)
    return paths


# ---- pretraining batches ------------------------------------------------------------------------------------------

def read_windows(tokens: TokenFile, starts: np.ndarray, seq_len: int, n_rows: int) -> tuple[torch.Tensor, ...]:
    """(ids, targets, segment_ids), each int64 (n_rows, T), of the windows that begin at `starts`.

    Rows without a start and places beyond the end of the file are padding: pad, -100, -1. A target is the next token,
    but -100 where that is a bos: which document follows is not language, and a free right answer would flatter the
    loss. segment_ids: how many documents have begun in the row so far (0: the one it came into the middle of).
    """
    window = np.full((n_rows, seq_len + 1), -1, dtype=np.int64)  # (B, T + 1)
    for row, start in zip(window, starts.tolist()):
        piece = tokens.ids[start : start + seq_len + 1]
        row[: len(piece)] = piece
    if len(tokens.map) > 1 << 26:
        # Pages once read count as memory of this process until they are the whole file. Let them go; the system keeps
        # them cached. Not for 64 MB and less: to map them again would double the time of a small batch.
        tokens.map.madvise(mmap.MADV_DONTNEED)
    if window.max() >= tokens.vocab_size:
        raise UserError(f"{tokens.path}: found id {window.max()}, expected less than {tokens.vocab_size}; the file is "
                        "damaged: delete its folder to make it again")
    ids, targets = window[:, :-1].copy(), window[:, 1:].copy()  # (B, T)
    segment_ids = np.cumsum(ids == tokens.bos_id, axis=1)  # (B, T)
    segment_ids[ids < 0] = -1
    ids[ids < 0] = tokens.pad_id
    targets[(targets < 0) | (targets == tokens.bos_id)] = IGNORE
    return torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(segment_ids)


class Windows:
    """Batches of windows of seq_len tokens, without any state: to resume takes the step alone.

    batch_size: rows of a step over ALL ranks. mode "random": row r of a step begins anywhere, by (seed, step, r) alone;
    "sequential": it is window step * batch_size + r of the file, one epoch after the other (a rest at the end of the
    file that fills no window is left out).
    """

    def __init__(self, tokens: TokenFile, seq_len: int, *, batch_size: int, mode: str = "random", seed: int = 0):
        if len(tokens) < seq_len + 1:
            raise UserError(f"{tokens.path}: found {len(tokens)} tokens, expected seq_len + 1 = {seq_len + 1} or more; "
                            "lower --seq_len or give more text")
        self.tokens, self.seq_len, self.batch_size, self.mode, self.seed = tokens, seq_len, batch_size, mode, seed
        self.n_windows = (len(tokens) - 1) // seq_len  # of an epoch

    def starts(self, step: int) -> np.ndarray:
        """Where each row of the global batch begins, int64 (batch_size,)."""
        if self.mode == "sequential":
            return (step * self.batch_size + np.arange(self.batch_size)) % self.n_windows * self.seq_len
        # Philox enciphers a counter (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so every step
        # has its own stream. Raw bits, because numpy may change what its other methods make of them.
        bits = np.random.Philox(key=self.seed, counter=[0, step, 0, 0]).random_raw(self.batch_size)
        return (bits % np.uint64(len(self.tokens) - self.seq_len)).astype(np.int64)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[torch.Tensor, ...]:
        """Rows rank::world of the step: (ids, targets, segment_ids), each int64 (ceil(batch_size / world), T)."""
        return read_windows(self.tokens, self.starts(step)[rank::world], self.seq_len, -(-self.batch_size // world))


def eval_windows(tokens: TokenFile, seq_len: int, batch_size: int, rank: int = 0, world: int = 1, max_rows: int = 0):
    """Yields batches like those of Windows, which over all ranks hold every target of the file exactly once.

    batch_size: rows per rank, at most. All batches have one shape, and every rank gets the same number of them.
    max_rows: only so many rows from the beginning of the file, the same whatever the world; 0: all.
    """
    n_windows = -(-(len(tokens) - 1) // seq_len)
    n_windows = min(n_windows, max_rows or n_windows)
    n_batches = -(-n_windows // (batch_size * world))
    n_rows = -(-n_windows // (n_batches * world))  # and not batch_size, so that few rows are padding
    for i in range(n_batches):
        first = (i * world + rank) * n_rows
        yield read_windows(tokens, np.arange(first, min(first + n_rows, n_windows)) * seq_len, seq_len, n_rows)


# ---- the command --------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Config:
    data: str = "stdlib"       # stdlib, shakespeare, or a .txt, .json or .jsonl file (or .gz of these)
    tokenizer: str = "bpe"     # byte, char, bpe, a name that tiktoken knows, or a tokenizer.json
    vocab_size: int = 4096     # of bpe
    val_data: str = ""         # validation text; empty: the end of data
    val_fraction: float = 0.1  # how much of data, in characters
    cache: str = "data"        # folder for what is made here
    show: bool = False         # also print a training window: token, target, segment
    seq_len: int = 64          # of that window, tokens
    seed: int = 0              # of that window


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    *files, tokenizer_path = prepare(cfg.data, tokenizer=cfg.tokenizer, vocab_size=cfg.vocab_size,
                                     val_data=cfg.val_data, val_fraction=cfg.val_fraction, cache=cfg.cache)
    tokenizer = Tokenizer.load(tokenizer_path)
    print(f"{tokenizer_path}: {tokenizer.kind}, {tokenizer.vocab_size} tokens")
    for path in files:
        tokens = TokenFile(path, tokenizer)
        print(f"{path}: {len(tokens)} tokens, {len(tokens) / tokens.n_bytes:.3f} per byte of {tokens.n_bytes}")
        print(f"    {tokens.note}\n    {[tokenizer.decode([i]) for i in tokens.ids[:16]]}")
    if cfg.show:
        windows = Windows(TokenFile(files[0], tokenizer), cfg.seq_len, batch_size=1, seed=cfg.seed)
        for i, target, segment in zip(*(rows[0].tolist() for rows in windows.batch(0))):
            shown = "-" if target == IGNORE else repr(tokenizer.decode([target]))
            print(f"{tokenizer.decode([i])!r:24} {shown:24} {segment}")


if __name__ == "__main__":
    run(main)
