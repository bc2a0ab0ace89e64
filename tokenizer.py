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

so frequent strings become one token and rare ones are spelled from parts: no text is out of vocabulary.

The special tokens that give a training text its form (document start, whose turn, end) have the last six ids. They
never come from text: who types "<|end|>" types seven characters, or else could put words into the assistant's mouth.

    python tokenizer.py --train book.txt --vocab_size 4096 --out tokenizer.json
    python tokenizer.py --show "Hello there" --tokenizer tokenizer.json
"""
from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import regex  # comes with tiktoken; the standard `re` knows no \p{L}
import tiktoken

from common import UserError, run

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
LEARNED_KEYS = {"byte": [], "char": ["alphabet"], "bpe": ["pattern", "merged"]}  # what each kind has to remember
MAX_FILE_BYTES = 32 * 2**20  # 100,000 tokens take 2 to 6 MB
MAX_SPACE = 100_000  # the look-ahead in tiktoken's own patterns overflows a stack at several times this
LONG_SPACE = regex.compile(rf"(?<!\s)\s{{{MAX_SPACE}}}\s")


# ---- checks that tiktoken does not make ----------------------------------------------------------------------------

def place(text: str, index: int) -> str:
    line, column = text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)
    return f"line {line}, column {column} (character {index})"


def check_text(text: str) -> None:
    """Refuse what no UTF-8 can hold; tiktoken would put U+FFFD in its place without a word."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(f"text, {place(text, error.start)}: found the lone surrogate U+{code:04X} (half a character), "
                        "expected whole characters; remove it or read the file as UTF-8") from None


def documents_of(text_or_documents: str | Iterable[str]) -> list[str]:
    documents = [text_or_documents] if isinstance(text_or_documents, str) else list(text_or_documents)
    if not any(documents):
        raise UserError("the training text of the tokenizer is empty; expected at least one character")
    for document in documents:
        check_text(document)
    return documents


# ---- byte-pair encoding: learning the ranks ------------------------------------------------------------------------

def train_bpe(text_or_documents: str | Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Learn at most vocab_size - 256 - 6 merges. Returns the rank of every token: the 256 bytes, then merges in order.

    Every merge takes the most frequent pair (of equals: the smallest ids), just as the naive algorithm that counts all
    anew. A pair that occurs once is not merged, so a small text gives a smaller vocabulary. Merges never cross
    documents. UserError for an empty text and for vocab_size < 262.
    """
    n_merges = vocab_size - 256 - len(SPECIALS)
    if n_merges < 0:
        raise UserError(f"--vocab_size {vocab_size}: expected at least {256 + len(SPECIALS)} for bpe, "
                        f"the 256 bytes and {len(SPECIALS)} special tokens")
    split = regex.compile(WORD_PATTERN)
    pieces = Counter()
    for document in documents_of(text_or_documents):
        pieces.update(match.group() for match in split.finditer(document))
    return merge_pairs(pieces, n_merges)


def merge_pairs(pieces: dict[str, int], n_merges: int) -> dict[bytes, int]:
    """The greedy algorithm on {piece: how often}; a merge costs as much as there are symbols that it touches.

    All pieces lie one behind the other in one array of symbols; `right` and `left` link the symbols that still stand,
    and a pair is known by the index of its left symbol. `places` says where each pair stands (or stood: checked when
    used). The heap says which pair is the most frequent (or was: once entered, a pair's count only falls).
    """
    words = [piece.encode("utf-8") for piece in pieces]
    lengths = np.array([len(word) for word in words], np.int64)
    weight = np.repeat(np.array(list(pieces.values()), np.int64), lengths)  # (n,) how often the symbol's piece occurs
    n = len(weight)
    ids = np.append(np.frombuffer(b"".join(words), np.uint8), 0).astype(np.int32)  # (n + 1,)
    right, left = np.arange(1, n + 2), np.arange(-1, n)
    ends = np.cumsum(lengths)
    right[ends - 1] = right[n] = left[ends - lengths] = n  # n stands for "no neighbour": no pair leaves a piece

    tokens = [bytes([byte]) for byte in range(256)]
    base = 256 + n_merges  # the pair (a, b) is the number a * base + b: the smaller number wins a tie
    counts: dict[int, int] = {}
    places: dict[int, np.ndarray] = {}
    heap: list[tuple[int, int]] = []

    def group(where: np.ndarray):
        """What stands at these indices: yields (pair, its count, its indices in ascending order)."""
        where = where[right[where] < n]
        pairs = ids[where].astype(np.int64) * base + ids[right[where]]
        order = np.argsort(pairs, kind="stable")
        pairs, where = pairs[order], where[order]
        first = np.flatnonzero(np.diff(pairs, prepend=-1))
        totals = np.add.reduceat(weight[where], first) if len(first) else first
        bounds = [*first.tolist(), len(where)]
        for i, (pair, total) in enumerate(zip(pairs[first].tolist(), totals.tolist())):
            yield pair, total, where[bounds[i]:bounds[i + 1]]

    def enter(where: np.ndarray) -> None:
        for pair, total, indices in group(where):
            if total > 1:
                counts[pair], places[pair] = total, indices
                heapq.heappush(heap, (-total, pair))

    enter(np.arange(n))
    while heap and len(tokens) < base:
        total, pair = heapq.heappop(heap)
        if counts[pair] < -total:  # it has lost some since it was pushed: back with it, to its right place
            if counts[pair] > 1:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        a, b = divmod(pair, base)
        a_at = places.pop(pair)
        a_at = a_at[(ids[a_at] == a) & (ids[right[a_at]] == b)]
        if a == b:
            a_at = without_overlaps(a_at, right)
        b_at = right[a_at]
        for changed, lost, _ in group(np.unique(np.concatenate((left[a_at], a_at, b_at)))):
            if changed in counts:
                counts[changed] -= lost
        ids[a_at], ids[b_at] = len(tokens), -1
        right[a_at] = right[b_at]
        left[right[a_at]] = a_at
        tokens.append(tokens[a] + tokens[b])
        enter(np.unique(np.concatenate((left[a_at], a_at))))  # all with the new token in them: none was entered before
    return {token: rank for rank, token in enumerate(tokens)}


def without_overlaps(where: np.ndarray, right: np.ndarray) -> np.ndarray:
    """"aaa" holds the pair (a, a) twice but only the first can merge: keep every second index of an unbroken run."""
    index = np.arange(len(where))
    starts_run = np.append(True, where[1:] != right[where[:-1]])
    run_start = np.maximum.accumulate(np.where(starts_run, index, 0))
    return where[(index - run_start) % 2 == 0]


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


def fetch_encoding(name: str) -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding(name)
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
            raise UserError(f"{path}: {what}, expected a tokenizer.json as Tokenizer.save writes it; make it again")

    expect(isinstance(content, dict), f"found {type(content).__name__} instead of an object")
    expect(content.get("format") == FORMAT, f"found no \"format\": {json.dumps(FORMAT)}")
    kind = content.get("kind")
    keys = {**LEARNED_KEYS, **{name: [] for name in tiktoken.list_encoding_names()}}
    expect(isinstance(kind, str) and kind in keys, f"found kind {str(kind)[:40]!r}, known are {', '.join(keys)}")
    wanted = {"format", "kind", "specials", "fingerprint", *keys[kind]}
    expect(set(content) == wanted, f"found the keys {str(sorted(content))[:200]} instead of {sorted(wanted)}")
    expect(content["specials"] == list(SPECIALS), f"found other special tokens than {list(SPECIALS)}")
    if kind == "char":
        alphabet = content["alphabet"]
        expect(isinstance(alphabet, str) and alphabet, "found an \"alphabet\" that is no text")
        expect(sorted(set(alphabet)) == list(alphabet), "found an \"alphabet\" out of order or with a character twice")
        expect(not any("\ud800" <= char <= "\udfff" for char in alphabet), "found half a character in \"alphabet\"")
    if kind == "bpe":
        merged = content["merged"]
        expect(content["pattern"] == WORD_PATTERN, "found a \"pattern\" other than this version's")
        expect(isinstance(merged, list), "found \"merged\" that is no list")
        for i, token in enumerate(merged):
            expect(isinstance(token, str) and 2 <= len(token) <= MAX_TOKEN_BYTES and max(token) <= "\xff",
                   f"found \"merged\"[{i}] that is not 2 to {MAX_TOKEN_BYTES} bytes")
        expect(len(set(merged)) == len(merged), "found the same token twice in \"merged\"")
    expect(content["fingerprint"] == fingerprint(content), "found a \"fingerprint\" that is not that of the content")


def fingerprint(content: dict) -> str:
    """16 hexadecimal digits of the SHA-256 of the canonical JSON."""
    content = {key: value for key, value in content.items() if key != "fingerprint"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]


def unique_keys(pairs: list[tuple]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("the same key twice in one object")
    return dict(pairs)


def read_text(path: str, max_bytes: float = float("inf")) -> str:
    """A whole UTF-8 file, or UserError. Pipes and devices are refused: opening them could wait for ever."""
    try:
        if not os.path.isfile(path):
            raise UserError(f"{path}: found no such file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise UserError(f"{path}: found {size} bytes, expected at most {max_bytes}")
            return file.read().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: found byte 0x{error.object[error.start]:02x} at offset {error.start}, expected "
                        "UTF-8; convert the file") from None


# ---- the one face of all kinds -------------------------------------------------------------------------------------

class Tokenizer:
    """Made by `make_tokenizer` or `Tokenizer.load`. vocab_size counts the specials, which have the last six ids."""

    def __init__(self, kind: str, **learned):
        """learned: {"alphabet": str} for char, {"pattern": str, "merged": list of latin-1 strings} for bpe."""
        self.content = {"format": FORMAT, "kind": kind, "specials": list(SPECIALS), **learned}
        self.kind = kind
        self.fingerprint = fingerprint(self.content)
        self.encoding = build_encoding(self.content)
        self.alphabet = set(learned["alphabet"]) if kind == "char" else None
        self.vocab_size = self.encoding.n_vocab
        ids = range(self.vocab_size - len(SPECIALS), self.vocab_size)
        self.pad_id, self.bos_id, self.system_id, self.user_id, self.assistant_id, self.end_id = ids
        self.specials_but_end = tuple(ids[:-1])  # what a completion of plain text must not draw

    def encode(self, text: str) -> list[int]:
        """Ordinary text only: the names of special tokens are spelled out.

        UserError for a lone surrogate (tiktoken would put U+FFFD in its place) and where tiktoken would panic: for a
        character outside the alphabet, and for endless white space where the pattern is one of its own.
        """
        check_text(text)
        if self.alphabet is not None and not self.alphabet.issuperset(text):
            index = next(i for i, char in enumerate(text) if char not in self.alphabet)
            char = text[index]
            raise UserError(f"text, {place(text, index)}: found {char!r} (U+{ord(char):04X}), expected one of the "
                            f"{len(self.alphabet)} characters of the char tokenizer; use --tokenizer byte or bpe")
        if self.kind not in LEARNED_KEYS and (spaces := LONG_SPACE.search(text)):
            raise UserError(f"text, {place(text, spaces.start())}: found a run of white space too long for "
                            f"{self.kind!r}, expected at most {MAX_SPACE} in a row; shorten it or use --tokenizer bpe")
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
        """decode_bytes as text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path: str) -> None:
        """Write tokenizer.json whole or not at all. bpe tokens stand in it with one character per byte (latin-1)."""
        text = json.dumps({**self.content, "fingerprint": self.fingerprint}, indent=1)
        if len(text) > MAX_FILE_BYTES:
            raise UserError(f"{path}: found {len(text)} bytes to write, expected at most {MAX_FILE_BYTES} as in "
                            "Tokenizer.load; reduce --vocab_size")
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            with open(temporary, "w", encoding="ascii") as file:
                file.write(text)
            os.replace(temporary, path)
        except OSError as error:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None

    @staticmethod
    def load(path: str) -> Tokenizer:
        """Read what `save` wrote; UserError for anything else. Nothing named in the file is executed or opened."""
        path = os.fspath(path)
        try:
            content = json.loads(read_text(path, MAX_FILE_BYTES), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: found no valid JSON ({error}), expected a tokenizer.json as Tokenizer.save "
                            "writes it; make it again") from None
        check_content(content, path)
        return Tokenizer(content["kind"], **{key: content[key] for key in LEARNED_KEYS.get(content["kind"], [])})


def make_tokenizer(spec: str, text_or_documents: str | Iterable[str] = "", vocab_size: int = 4096) -> Tokenizer:
    """spec: "byte", "char", "bpe", a tiktoken name ("gpt2"), or the path of a tokenizer.json.

    text_or_documents is what char and bpe learn from. vocab_size concerns bpe alone; where the text is too small for
    it, the vocabulary is smaller, with a warning. UserError for an unknown spec, an empty text, vocab_size < 262.
    """
    names = tiktoken.list_encoding_names()
    if spec == "byte" or spec in names:
        return Tokenizer(spec)
    if spec == "char":
        return Tokenizer("char", alphabet="".join(sorted(set().union(*documents_of(text_or_documents)))))
    if spec == "bpe":
        merged = list(train_bpe(text_or_documents, vocab_size))[256:]
        tokenizer = Tokenizer("bpe", pattern=WORD_PATTERN, merged=[token.decode("latin-1") for token in merged])
        if tokenizer.vocab_size < vocab_size:
            print(f"warning: in this text only {len(merged)} pairs are worth a merge: the bpe vocabulary has "
                  f"{tokenizer.vocab_size} tokens instead of --vocab_size {vocab_size}", file=sys.stderr)
        return tokenizer
    if spec.endswith(".json") or os.path.isfile(spec):
        return Tokenizer.load(spec)
    raise UserError(f"--tokenizer {spec}: expected byte, char, bpe, {', '.join(names)} or the path of a tokenizer.json")


# ---- command line --------------------------------------------------------------------------------------------------

def show(tokenizer: Tokenizer, text: str) -> None:
    """One line per token: id and text; bytes where the token is not whole characters."""
    ids = tokenizer.encode(text)
    for i in ids:
        token = tokenizer.decode_bytes([i])
        try:
            print(f"{i:8d}  {token.decode('utf-8')!r}")
        except UnicodeDecodeError:
            print(f"{i:8d}  {token!r}")
    print(f"{len(ids)} tokens, {len(text)} characters, {tokenizer.kind} vocabulary of {tokenizer.vocab_size}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", metavar="FILE", help="learn a bpe vocabulary from this UTF-8 text")
    parser.add_argument("--vocab_size", type=int, default=4096, help="ids in all, bytes and specials included [4096]")
    parser.add_argument("--out", default="tokenizer.json", help="where --train writes [tokenizer.json]")
    parser.add_argument("--show", metavar="TEXT_OR_FILE", help="print the tokens of a text")
    parser.add_argument("--tokenizer", help="what --show uses: byte, gpt2, ... or a tokenizer.json [--out]")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.train is None and args.show is None:
        raise UserError("nothing to do; expected --train FILE or --show TEXT_OR_FILE (see --help)")
    if args.train is not None:
        documents = regex.split(r"(?m)^<\|endoftext\|>\r?(?:\n|\Z)", read_text(args.train))
        tokenizer = make_tokenizer("bpe", documents, args.vocab_size)
        tokenizer.save(args.out)
        print(f"{args.out}: {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint}")
    if args.show is not None:
        show(make_tokenizer(args.tokenizer or args.out),
             read_text(args.show) if os.path.isfile(args.show) else args.show)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--show book.txt | head` ends without a traceback
    run(main)
