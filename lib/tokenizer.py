"""Text to token ids and back: bytes, characters, byte-pair encoding trained here, and tiktoken's named encodings.

    byte    ids 0..255 are the bytes of the UTF-8 text: nothing to train, any text, long sequences
    char    one id per character of the corpus (its alphabet); any other character is an error
    bpe     the 256 bytes and then the merges that `train_bpe` learned: any text, English at 3 characters per token
    gpt2    and cl100k_base, o200k_base, ...: made by others from far more text; tiktoken fetches the file once

Whatever the kind, tiktoken does the encoding: it is given a pattern that cuts text into pieces, and the rank (= id) of
each byte string that is a token. Inside a piece it joins, again and again, the neighbours whose union has lowest rank.

Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909, algorithm 1; on bytes as in GPT-2) learns those ranks: start
from single bytes, count all neighbouring pairs inside the pieces, join the most frequent pair everywhere, and repeat.
From "low" 5 times, "lower" 2, "newest" 6 and "widest" 3 times come

    e s -> es    9 times (and so is "s t": a tie goes to the pair with the smaller ids)
    es t -> est  9 times       l o -> lo  7 times       lo w -> low  7 times       e w -> ew  6 times       ...

The special tokens that give a training text its form (document start, whose turn, end) have the last six ids. They
never come from text: who types "<|end|>" types seven characters, or else could put words into the assistant's mouth.

    python tokenizer.py --train book.txt --vocab_size 4096 --out tokenizer.json
    python tokenizer.py --show "Hello there" --tokenizer tokenizer.json
"""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import heapq
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import regex  # comes with tiktoken; the standard `re` knows no \p{L}
import tiktoken
import tiktoken.load

from lib.program import UserError, parse, replacing, start
from lib.records import read_text, unique_keys

SPECIALS = ("<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

# What cuts text into pieces; merges never cross a cut. GPT-2's pattern, changed in three ways:
# - a word goes on through combining marks and zero-width joiners: \p{L}+ alone cuts Hindi in front of every vowel sign;
# - numbers are cut after three digits, as in GPT-4, so that no long number of the corpus becomes a token of its own;
# - no piece is longer than 32 characters (and a space before): a page of Chinese without punctuation or a megabyte of
#   "a" costs linear time, and a megabyte of spaces no stack (with GPT-2's \s+(?!\S) it makes tiktoken panic).
# \p{..} is looked up in the Unicode tables of `regex` (trainer) and of tiktoken (encoder). They differ for characters
# that one of the two is too old to know; such a character may then be cut otherwise than in training, but never lost.
WORD_PATTERN = "|".join((
    r"'(?:[sdmt]|ll|ve|re)",
    r" ?\p{L}[\p{L}\p{M}\u200c\u200d]{0,31}",
    r" ?\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]{1,32}",
    r"\s{1,32}(?!\S)",
    r"\s{1,32}",
))
MAX_TOKEN_BYTES = 4 * 33  # a space and 32 characters of at most four bytes
CHAR_PATTERN = r"(?s:.)"
BYTE_PATTERN = r"(?s:.{1,64})"  # without merges it does not matter where to cut, and long pieces are faster

FORMAT = "llm-from-zero tokenizer, version 1"
EXPECTED = "expected a tokenizer.json as Tokenizer.save writes it; make it again"
LEARNED_KEYS = {"byte": [], "char": ["alphabet"], "bpe": ["pattern", "merged"]}  # what each kind has to remember
MAX_VOCAB = 2**20  # the trainer writes ids as characters
MAX_FILE_BYTES = 32 * 2**20  # 100,000 tokens take 2 to 6 MB
MAX_SPACE = 100_000  # the look-ahead in tiktoken's own patterns overflows a stack at several times this
LONG_SPACE = regex.compile(rf"(?<!\s)\s{{{MAX_SPACE}}}\s")


# ---- checks that tiktoken does not make ----------------------------------------------------------------------------

def refuse(text: str, index: int, found: str, expected: str) -> NoReturn:
    line, column = text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)
    raise UserError(f"text, line {line}, column {column} (character {index}): found {found}, expected {expected}")


def check_text(text: str) -> None:
    """Refuse what no UTF-8 can hold; tiktoken would put U+FFFD in its place without a word."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        refuse(text, error.start, f"the lone surrogate U+{ord(text[error.start]):04X} (half a character)",
               "whole characters; remove it or read the file as UTF-8")


def documents_of(text_or_documents: str | Iterable[str]) -> list[str]:
    documents = [text_or_documents] if isinstance(text_or_documents, str) else list(text_or_documents)
    if not any(documents):
        raise UserError("the training text of the tokenizer is empty; expected at least one character")
    for document in documents:
        check_text(document)
    return documents


# ---- byte-pair encoding: learning the ranks ------------------------------------------------------------------------

def train_bpe(text_or_documents: str | Iterable[str], vocab_size: int) -> list[bytes]:
    """The 256 bytes and at most vocab_size - 256 - 6 merges, in the order of their ids.

    A pair that occurs once is not merged, so a small text gives a smaller vocabulary. Merges never cross documents.
    UserError for an empty text and for vocab_size < 262.
    """
    least = 256 + len(SPECIALS)
    if not least <= vocab_size <= MAX_VOCAB:
        raise UserError(f"--vocab_size {vocab_size}: expected at least {least} for bpe, the 256 bytes and "
                        f"{len(SPECIALS)} special tokens, and at most {MAX_VOCAB}")
    split = regex.compile(WORD_PATTERN)
    pieces = Counter()
    for document in documents_of(text_or_documents):
        pieces.update(match.group() for match in split.finditer(document))
    return merge_pairs(pieces, vocab_size - least)


def merge_pairs(pieces: dict[str, int], n_merges: int) -> list[bytes]:
    """The greedy algorithm on {piece: how often}: of equally frequent pairs the one with the smallest ids is merged.

    A piece is kept as a string of one character per token, chr(id), so that str.replace merges a pair in it. After a
    merge only the pairs beside the new token are counted anew, and only in the pieces that hold it. The heap says
    which pair is the most frequent, or was when it was pushed: after that its count only falls.
    """
    words, times = [piece.encode("utf-8").decode("latin-1") for piece in pieces], list(pieces.values())
    counts: dict[str, int] = Counter()
    places: dict[str, list[int]] = defaultdict(list)  # the words that hold a pair, or did
    for i, word in enumerate(words):
        for left, right in zip(word, word[1:]):
            counts[left + right] += times[i]
            places[left + right].append(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)

    tokens = [bytes([byte]) for byte in range(256)]
    while heap and len(tokens) < 256 + n_merges:
        count, pair = heapq.heappop(heap)
        if counts[pair] < -count:  # it has lost some since it was pushed: back with it, to its right place
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if -count < 2:
            break
        a, b = pair
        new = chr(len(tokens))
        tokens.append(tokens[ord(a)] + tokens[ord(b)])
        born = set()
        for i in places.pop(pair):
            if pair not in words[i]:
                continue
            words[i] = word = words[i].replace(pair, new)
            for left, right in zip(word, word[1:]):
                if left == new or right == new:  # where this pair stands now stood that of b or a
                    counts[(b if left == new else left) + (a if right == new else right)] -= times[i]
                    counts[left + right] += times[i]
                    places[left + right].append(i)
                    born.add(left + right)
        for pair in born:
            heapq.heappush(heap, (-counts[pair], pair))
    return tokens


# ---- from the content of tokenizer.json to a tiktoken encoding -----------------------------------------------------

def build_encoding(content: dict) -> tiktoken.Encoding:
    """content: a dict that passed `check_content`. Afterwards every id below n_vocab can be decoded."""
    kind = content["kind"]
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    reserved: dict[str, int] = {}
    if kind == "byte":
        pattern, ranks = BYTE_PATTERN, single_bytes
    elif kind == "char":
        # A piece is one character, and tiktoken looks up whole pieces first: the bytes inside need no ranks.
        pattern, ranks = CHAR_PATTERN, {char.encode("utf-8"): i for i, char in enumerate(content["alphabet"])}
    elif kind == "bpe":
        merged = {token.encode("latin-1"): 256 + i for i, token in enumerate(content["merged"])}
        pattern, ranks = content["pattern"], single_bytes | merged
    else:
        named = fetch_encoding(kind)
        pattern, ranks = named._pat_str, named._mergeable_ranks
        taken = {i: name for name, i in named._special_tokens.items()}
        # Ids that no text has need a name, or decoding fails: there are gaps, and o200k_harmony has its own <|end|>.
        for i in sorted(set(range(named.n_vocab)) - set(ranks.values())):
            own_name = i in taken and taken[i] not in SPECIALS
            reserved[taken[i] if own_name else f"<|unused-{i}|>"] = i
    first = len(ranks) + len(reserved)
    specials = reserved | {name: first + i for i, name in enumerate(SPECIALS)}
    return tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


@contextlib.contextmanager
def without_network(path: str, name: str):
    """What tiktoken needs it takes from its cache: a file from anybody must not make this program call anywhere."""
    def refuse(*_):
        raise UserError(f"the tokenizer {name!r} is not in tiktoken's cache, and a file may not fetch it; if you trust "
                        f"the file, run python tokenizer.py --show text --tokenizer {name}")

    fetch, tiktoken.load.read_file = tiktoken.load.read_file, refuse
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    finally:
        tiktoken.load.read_file = fetch


def fetch_encoding(name: str) -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding(name)
    except UserError:  # without_network
        raise
    except Exception as error:  # no network, a proxy's page instead of the file, an unwritable cache: all the same here
        command = f"TIKTOKEN_CACHE_DIR=tiktoken-cache python -c \"import tiktoken; tiktoken.get_encoding('{name}')\""
        raise UserError(f"tokenizer {name!r} could not be fetched ({type(error).__name__}); where there is a network, "
                        f"run {command}, copy the folder tiktoken-cache here and set TIKTOKEN_CACHE_DIR to its path; "
                        "or train your own with --tokenizer bpe") from None


# ---- reading tokenizer.json, which may come from anybody -----------------------------------------------------------

def check_content(content, path: str) -> None:
    """All that `build_encoding` relies on. No pattern but our own: a regular expression can take for ever to match."""

    def expect(condition, what: str) -> None:
        if not condition:
            raise UserError(f"{path}: found {what}, {EXPECTED}")

    expect(isinstance(content, dict), f"{type(content).__name__} instead of an object")
    expect(content.get("format") == FORMAT, f"no \"format\": {json.dumps(FORMAT)}")
    kind = content.get("kind")
    keys = {**LEARNED_KEYS, **{name: [] for name in tiktoken.list_encoding_names()}}
    expect(isinstance(kind, str) and kind in keys, f"kind {str(kind)[:40]!r}, known are {', '.join(keys)}")
    wanted = {"format", "kind", "specials", "fingerprint", *keys[kind]}
    expect(set(content) == wanted, f"the keys {str(sorted(content))[:200]} instead of {sorted(wanted)}")
    expect(content["specials"] == list(SPECIALS), f"other special tokens than {list(SPECIALS)}")
    if kind == "char":
        alphabet = content["alphabet"]
        expect(isinstance(alphabet, str) and alphabet and list(alphabet) == sorted(set(alphabet)) and
               not regex.search("[\ud800-\udfff]", alphabet), "an \"alphabet\" that is no sorted text of characters")
    if kind == "bpe":
        merged = content["merged"]
        expect(content["pattern"] == WORD_PATTERN, "a \"pattern\" other than this version's")
        expect(isinstance(merged, list) and all(isinstance(token, str) and 2 <= len(token) <= MAX_TOKEN_BYTES and
                                                max(token) <= "\xff" for token in merged),
               f"a \"merged\" that is no list of tokens of 2 to {MAX_TOKEN_BYTES} bytes")
        expect(len(set(merged)) == len(merged), "the same token twice in \"merged\"")
    expect(content["fingerprint"] == fingerprint(content), "a \"fingerprint\" that is not that of the content")


def fingerprint(content: dict) -> str:
    """16 hexadecimal digits of the SHA-256 of the canonical JSON."""
    content = {key: value for key, value in content.items() if key != "fingerprint"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]


# ---- the one face of all kinds -------------------------------------------------------------------------------------

class Tokenizer:
    """Made by `make_tokenizer` or `Tokenizer.load`. vocab_size counts the specials, which have the last six ids."""

    def __init__(self, kind: str, **learned):
        """learned: {"alphabet": str} for char, {"pattern": str, "merged": list of latin-1 strings} for bpe."""
        self.content = {"format": FORMAT, "kind": kind, "specials": list(SPECIALS), **learned}
        self.kind, self.path = kind, ""  # path: of the file it was read from
        self.fingerprint = fingerprint(self.content)
        self.encoding = build_encoding(self.content)
        self.alphabet = set(learned["alphabet"]) if kind == "char" else None
        self.vocab_size = self.encoding.n_vocab
        ids = range(self.vocab_size - len(SPECIALS), self.vocab_size)
        self.pad_id, self.bos_id, self.system_id, self.user_id, self.assistant_id, self.end_id = ids
        self.specials_but_end = tuple(ids[:-1])  # what a completion of plain text must not draw

    def encode(self, text: str) -> list[int]:
        """Ordinary text only: the names of special tokens are spelled out. UserError where tiktoken would panic: for a
        character outside the alphabet, and for endless white space where the pattern is one of its own."""
        check_text(text)
        if self.alphabet is not None and not self.alphabet.issuperset(text):
            index = next(i for i, char in enumerate(text) if char not in self.alphabet)
            refuse(text, index, f"{text[index]!r} (U+{ord(text[index]):04X})",
                   f"one of the {len(self.alphabet)} characters of the char tokenizer; use --tokenizer byte or bpe")
        if self.kind not in LEARNED_KEYS and (spaces := LONG_SPACE.search(text)):
            refuse(text, spaces.start(), f"a run of white space too long for {self.kind!r}",
                   f"at most {MAX_SPACE} in a row; shorten it or use --tokenizer bpe")
        return self.encoding.encode_ordinary(text)  # encode_to_numpy of tiktoken 0.9 lets special tokens through

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as an array (tokens,): uint16, or uint32 where vocab_size > 65536."""
        return np.array(self.encode(text), np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Special tokens as their names. A character may be spread over several tokens: join bytes before decoding."""
        ids = np.asarray(ids).tolist()
        for i in ids:
            if not (isinstance(i, int) and 0 <= i < self.vocab_size):
                raise UserError(f"found token id {i}, expected integers from 0 to {self.vocab_size - 1}; "
                                "the ids come from another tokenizer")
        return self.encoding.decode_bytes(ids)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path: str) -> None:
        """Write tokenizer.json whole or not at all. bpe tokens stand in it with one character per byte (latin-1)."""
        with replacing(Path(path)) as temporary:
            temporary.write_text(json.dumps({**self.content, "fingerprint": self.fingerprint}, indent=1))

    @staticmethod
    def load(path: str) -> Tokenizer:
        """Read what `save` wrote; UserError for anything else. Nothing named in the file is executed or opened."""
        try:
            if not os.path.isfile(path):  # to open a pipe could wait for ever
                raise UserError(f"{path}: found no such file")
            if (size := os.path.getsize(path)) > MAX_FILE_BYTES:
                raise UserError(f"{path}: found {size} bytes, expected at most {MAX_FILE_BYTES}")
            with open(path, encoding="utf-8") as file:
                content = json.load(file, object_pairs_hook=unique_keys)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: found no valid JSON ({error}), {EXPECTED}") from None
        check_content(content, path)
        with without_network(path, content["kind"]):
            tokenizer = Tokenizer(content["kind"], **{key: content[key] for key in LEARNED_KEYS.get(content["kind"], [])})
        tokenizer.path = str(path)
        return tokenizer


def make_tokenizer(spec: str, text_or_documents: str | Iterable[str] = "", vocab_size: int = 4096) -> Tokenizer:
    """spec: "byte", "char", "bpe", a tiktoken name ("gpt2"), or the path of a tokenizer.json. char and bpe learn from
    the text; vocab_size concerns bpe alone. UserError for an unknown spec, an empty text, vocab_size < 262."""
    names = tiktoken.list_encoding_names()
    if spec == "byte" or spec in names:
        return Tokenizer(spec)
    if spec == "char":
        return Tokenizer("char", alphabet="".join(sorted(set().union(*documents_of(text_or_documents)))))
    if spec == "bpe":
        merged = train_bpe(text_or_documents, vocab_size)[256:]
        tokenizer = Tokenizer("bpe", pattern=WORD_PATTERN, merged=[token.decode("latin-1") for token in merged])
        if tokenizer.vocab_size < vocab_size:
            print(f"warning: in this text only {len(merged)} pairs are worth a merge: the bpe vocabulary has "
                  f"{tokenizer.vocab_size} tokens instead of --vocab_size {vocab_size}", file=sys.stderr)
        return tokenizer
    if spec.endswith(".json") or os.path.isfile(spec):
        return Tokenizer.load(spec)
    raise UserError(f"--tokenizer {spec}: expected byte, char, bpe, {', '.join(names)} or the path of a tokenizer.json")


# ---- command line --------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Config:
    train: str = ""  # UTF-8 text to learn a bpe vocabulary from
    vocab_size: int = 4096  # ids in all, bytes and special tokens included
    out: str = "tokenizer.json"  # where --train writes
    show: str = ""  # text, or a file of it, of which to print the tokens
    tokenizer: str = ""  # what --show uses: byte, gpt2, ... or a tokenizer.json; empty: --out


def show(tokenizer: Tokenizer, text: str) -> None:
    """One line per token: id and text; bytes where the token is not whole characters."""
    ids = tokenizer.encode(text)
    for i in ids:
        token = tokenizer.decode([i])
        print(f"{i:8d}  {tokenizer.decode_bytes([i]) if chr(0xFFFD) in token else token!r}")
    print(f"{len(ids)} tokens, {len(text)} characters, {tokenizer.kind} vocabulary of {tokenizer.vocab_size}")


def main(argv: list[str] | None = None) -> None:
    cfg = parse(Config, argv, __doc__)
    if not cfg.train and not cfg.show:
        raise UserError("nothing to do; expected --train FILE or --show TEXT_OR_FILE (see --help)")
    if cfg.train:
        documents = regex.split(r"(?m)^<\|endoftext\|>\r?(?:\n|\Z)", read_text(cfg.train))
        tokenizer = make_tokenizer("bpe", documents, cfg.vocab_size)
        tokenizer.save(cfg.out)
        print(f"{cfg.out}: {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint}")
    if cfg.show:
        show(make_tokenizer(cfg.tokenizer or cfg.out), read_text(cfg.show) if os.path.isfile(cfg.show) else cfg.show)


if __name__ == "__main__":
    start(main)
