"""What repeats: n-grams inside a document, near duplicates, the text of a test.

    MinHash    the minimum of a hash over the shingles of a document; two documents have the same one with
               probability s, their Jaccard similarity: shared shingles / all shingles (Broder 1997)
    bands      b bands of r such minima; two documents meet in a band with probability 1 - (1 - s^r)^b
               (Leskovec et al., Mining of Massive Datasets, section 3.4)

Words become numbers, so that numpy handles many documents at once: arrays of N words, and for each word the
number of its document.
"""
import functools
import hashlib
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import numpy as np

from lib.corpora import RECORDS
from lib.program import UserError
from lib.records import find_files, read_text, scan

APART = re.compile("([\u3040-\u30ff\u3400-\u9fff])|[^\\w\0-\x7f]")  # a Chinese letter; or what is in no word
LOWER = bytes(ord(chr(i).lower()) if chr(i).isalnum() or chr(i) == "_" else 32 for i in range(128)) + bytes(
    range(128, 256))
M = np.uint64(0x9E3779B97F4A7C15)  # odd, and irregular
REPEATED = {  # n: the largest share of a document that n-grams may be which repeat (Gopher, table A1)
    2: 0.20, 3: 0.18, 4: 0.16, 5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


@dataclass
class RepeatConfig:
    # what repeats
    against: str = ""  # files of tests; a document with 13 words in a row of one goes; empty: none
    exact: bool = True  # of documents with the same words the first stays
    near: float = 0.8  # share of equal shingles from which documents are near duplicates; 0: off
    shingle: int = 5  # words in a row that are one shingle
    bands: int = 16  # b
    rows: int = 7  # r


def words_of(text: str) -> list[bytes]:
    """The words of a text, letters and digits, in lower case. A Chinese letter is one."""
    if not text.isascii():
        text = APART.sub(r" \1 ", text.lower())
    return text.encode().translate(LOWER).split()


def hash_words(documents: list[list[bytes]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hashes; sizes, in bytes with a space; numbers of their documents), each (N,), of the words of all."""
    words = list(chain.from_iterable(documents))
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    sizes = np.fromiter(map(len, words), np.int64, len(words)) + 1
    return hashes, sizes, np.repeat(np.arange(len(documents)), [*map(len, documents)])


def ngrams(hashes, numbers, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, numbers) of all n words in a row of one document: h_1 M^(n-1) + ... + h_n mod 2^64."""
    found = hashes
    for i in range(1, n):
        found = found[:-1] * M + hashes[i:]
    inside = numbers[: len(found)] == numbers[n - 1 :]
    return found[inside], numbers[: len(found)][inside]


def repeated(hashes, sizes, numbers, count: int) -> np.ndarray:
    """(9, count): for n = 2..10 the share of the bytes of each document: up to 4 in its commonest n-gram, if
    that comes twice; from 5 in all that come twice, every byte once."""
    at, found = np.arange(len(hashes)), hashes + numbers.astype(np.uint64) * M * M
    upto, shares = np.r_[0, np.cumsum(sizes)], np.zeros((len(REPEATED), count))
    for n, share in zip(REPEATED, shares):
        # Only what begins with an (n-1)-gram that comes twice can come twice: few places are left soon.
        inside = np.flatnonzero(at + n <= len(hashes))
        inside = inside[numbers[at[inside]] == numbers[at[inside] + n - 1]]
        at, found = at[inside], found[inside] * M + hashes[at[inside] + n - 1]
        buckets = (found * M >> np.uint64(61 - len(found).bit_length())).astype(np.int64)
        shared = np.bincount(buckets)[buckets] > 1  # most are alone in theirs: few are left to sort
        at, found = at[shared], found[shared]
        _, inverse, counts = np.unique(found, return_inverse=True, return_counts=True)
        twice = counts[inverse] > 1
        at, found, times = at[twice], found[twice], counts[inverse][twice]
        if n < 5:
            most = np.zeros(count, np.int64)
            np.maximum.at(most, numbers[at], times)
            commonest = times == most[numbers[at]]
            np.maximum.at(share, numbers[at], commonest * times * (upto[at + n] - upto[at]))
        else:
            inside = np.zeros(len(hashes) + 1, np.int64)
            inside[at] += 1
            inside[at + n] -= 1
            share += np.bincount(numbers, sizes * (np.cumsum(inside[:-1]) > 0), count)
    return shares / np.maximum(np.bincount(numbers, sizes, count), 1)


def band_keys(shingles, numbers, count: int, bands: int, rows: int) -> np.ndarray:
    """(count, bands): a hash of each band; 0 for a document without shingles. A row is the minimum of
    (a x + b mod 2^64) >> 32 for x of 32 bits, pairwise independent (Dietzfelbinger 1996)."""
    first = np.flatnonzero(np.diff(numbers, prepend=-1))  # the first shingle of each document that has any
    x, rng, keys = shingles * M >> np.uint64(32), random.Random(0), np.zeros((bands, len(first)), np.uint64)
    for key in keys if len(first) else ():
        for _ in range(rows):
            a, b = np.uint64(rng.getrandbits(64)), np.uint64(rng.getrandbits(64))
            key[:] = key * M + (np.minimum.reduceat(x * a + b, first) >> np.uint64(32))
    found = np.zeros((count, bands), "<u4")
    found[numbers[first]] = (keys * M >> np.uint64(32)).T
    return found


def root(parent: list[int], i: int) -> int:
    """The first document of the cluster of i. The path to it becomes half as long."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


def join_similar(parent: list[int], keys, similar: Callable[[int, int], bool], most: int = 64) -> None:
    """Join documents whose keys (n,) of one band are equal, if they are similar. most: each is compared with
    so many before it, because a template can fill a band. 0 is no key."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order].astype(np.int64), prepend=0))
    ends = np.r_[starts[1:], len(order)]
    for start, end in zip(starts[ends - starts > 1].tolist(), ends[ends - starts > 1].tolist()):
        members = order[start:end].tolist()
        for at, j in enumerate(members):
            for i in members[max(0, at - most) : at]:
                a, b = sorted((root(parent, i), root(parent, j)))
                if a != b and similar(i, j):
                    parent[b] = a


def shingles_of(text: str, n: int) -> np.ndarray:
    hashes, _, numbers = hash_words([words_of(text)])
    return np.unique(ngrams(hashes, numbers, n)[0])


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sets of shingles."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)


def duplicates(digests, bands, text_of: Callable[[int], str], cfg: RepeatConfig):
    """Of each document (n,) the first one with its digest, and the first one of its cluster; and the function
    that compares two. What it finds similar is joined, so a chain of such pairs leads to the first one."""
    shingles = functools.lru_cache(256)(lambda i: shingles_of(text_of(i), cfg.shingle))

    def similarity(i: int, j: int) -> float:
        return 1.0 if equal[i] == equal[j] else jaccard(shingles(i), shingles(j))
    equal = here = np.arange(len(digests))
    if cfg.exact:
        _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
        equal = first[inverse]
    parent = equal.tolist()
    for keys in bands.T if cfg.near else ():
        join_similar(parent, np.where(equal == here, keys, 0), lambda i, j: similarity(i, j) >= cfg.near)
    return equal, np.array([root(parent, i) for i in parent], np.int64), similarity


@functools.cache
def examined(data: str, longest: int = 13) -> dict[int, np.ndarray]:
    """{n: hashes of n-grams} of files of tests: texts, or all strings in records. A string of less than 13
    words must occur whole; one of less than five says nothing."""
    def strings(value) -> list[str]:
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return [value] if isinstance(value, str) else [text for part in inside for text in strings(part)]
    texts, found = [], {}
    for path in find_files(data):
        text = read_text(path, "replace")
        for line, record in scan(path, text) if RECORDS.match(text) else [(1, text)]:
            if isinstance(record, UserError):
                raise UserError(f"{path}:{line}: {record}")
            texts += strings(record)
    for words in map(words_of, texts):
        if (n := min(longest, len(words))) >= 5:
            hashes, _, numbers = hash_words([words])
            found.setdefault(n, []).append(ngrams(hashes, numbers, n)[0])
    return {n: np.unique(np.concatenate(some)) for n, some in found.items()}


def judge_words(documents: list[list[bytes]], cfg: RepeatConfig) -> tuple[list[str], np.ndarray, dict]:
    """(digests, band keys, {number of a document: first rule that it breaks}) of documents, lists of words"""
    digests = [hashlib.blake2b(b" ".join(words), digest_size=16).hexdigest() for words in documents]
    (hashes, sizes, numbers), count, broken = hash_words(documents), len(documents), {}
    bands = band_keys(*ngrams(hashes, numbers, cfg.shingle), count, cfg.bands, cfg.rows)
    for n, shares in zip(REPEATED, repeated(hashes, sizes, numbers, count)) if cfg.repetition else ():
        some = np.flatnonzero(shares > REPEATED[n])
        broken = dict.fromkeys(some, f"Gopher: {n}-grams that repeat") | broken
    for n, tested in examined(cfg.against).items() if cfg.against else ():
        grams, where = ngrams(hashes, numbers, n)
        broken = dict.fromkeys(where[np.isin(grams, tested)], "text of a test") | broken
    return digests, bands, broken
