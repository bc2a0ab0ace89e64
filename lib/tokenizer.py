"""Text to token ids and back.

    byte    ids 0..255 are the bytes of the UTF-8 text: nothing to train, any text, long sequences
    char    one id per character of the corpus (its alphabet); any other character is an error
    bpe     the 256 bytes, then the merges that `train_bpe` learned: any text, 3 English characters a token
    gpt2    and cl100k_base, o200k_base, ...: made by others from far more text, fetched once by tiktoken
    imported    from the tokenizer.json of another project, whose ids and specials it keeps (tools/convert.py)

tiktoken encodes for all of them. It needs a pattern that cuts text into pieces, and the rank (= id) of each
byte string that is a token. In a piece it joins the two neighbours of lowest rank, again and again.

Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909, algorithm 1; on bytes as in GPT-2) learns ranks.
Start from single bytes, count neighbouring pairs inside the pieces, join the most frequent pair everywhere,
and repeat. In a tie the smaller ids win. "low" 5 times, "lower" 2, "newest" 6 and "widest" 3 times give

    e s -> es  9 times      es t -> est  9 times      l o -> lo  7 times      lo w -> low  7 times      ...

The six special tokens (document start, whose turn, end) have the last ids. They never come from text."""
import hashlib
import heapq
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken; the standard `re` knows no \p{L}
import tiktoken.load

from lib.program import UserError, replacing
from lib.records import check_text, read_records

SPECIALS = ("<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
FORMAT = "llm-from-zero tokenizer, version 1"

# What cuts text into pieces; merges never cross a cut. GPT-2's pattern, but
# - a word goes on through combining marks and joiners: \p{L}+ alone cuts Hindi before every vowel sign;
# - numbers are cut after three digits, as in GPT-4, so that no long number becomes a token;
# - no piece is long: a megabyte of "a" would cost quadratic time, one of spaces would end tiktoken's stack.
WORD_PATTERN = "|".join((r"'(?:[sdmt]|ll|ve|re)", r" ?\p{L}[\p{L}\p{M}\u200c\u200d]{0,31}", r" ?\p{N}{1,3}",
                         r" ?[^\s\p{L}\p{N}]{1,32}", r"\s{1,32}(?!\S)", r"\s{1,32}"))


def train_bpe(documents: list[str], vocab_size: int) -> list[bytes]:
    """The 256 bytes and at most vocab_size - 262 merges, by id. Merges never cross documents. A pair that
    comes once is not merged, so a small text gives fewer."""
    if vocab_size < 262:
        raise UserError(f"--vocab_size {vocab_size}: expected at least 262, all bytes and the special tokens")
    found = (regex.finditer(WORD_PATTERN, document) for document in documents)
    return merge_pairs(Counter(match.group() for matches in found for match in matches), vocab_size - 262)


def merge_pairs(pieces: dict[str, int], n_merges: int) -> list[bytes]:
    """The greedy algorithm on {piece: how often}. Of equally frequent pairs the smallest ids come first.

    A piece is a string of one character per token, chr(id), so str.replace merges a pair in it. After a merge
    only pairs beside the new token are counted anew. The heap holds each pair's count when it was pushed.
    Later counts only fall: a pair that comes out with an old count goes back with its true one."""
    words, times = [piece.encode("utf-8").decode("latin-1") for piece in pieces], list(pieces.values())
    counts, places = Counter(), defaultdict(list)  # of a pair: how often it comes; the words that had it
    for i, word in enumerate(words):
        for left, right in zip(word, word[1:]):
            counts[left + right] += times[i]
            places[left + right].append(i)
    heap = sorted((-count, pair) for pair, count in counts.items())

    tokens = [bytes([byte]) for byte in range(256)]
    while heap and heap[0][0] <= -2 and len(tokens) < 256 + n_merges:
        count, pair = heapq.heappop(heap)
        if counts[pair] < -count:
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        (a, b), new = pair, chr(len(tokens))
        tokens.append(tokens[ord(a)] + tokens[ord(b)])
        born = set()
        for i in places.pop(pair):
            if pair not in words[i]:
                continue
            words[i] = word = words[i].replace(pair, new)
            for left, right in zip(word, word[1:]):
                if new in (left, right):  # earlier b stood on the left, or a on the right
                    counts[(b if left == new else left) + (a if right == new else right)] -= times[i]
                    counts[left + right] += times[i]
                    places[left + right].append(i)
                    born.add(left + right)
        for pair in born:
            heapq.heappush(heap, (-counts[pair], pair))
    return tokens


def named_encoding(name: str, fetch: bool) -> tiktoken.Encoding:
    """tiktoken's encoding of this name; fetch=False: only if its file is in tiktoken's cache. A
    tokenizer.json may come from anybody, so to read it must not make this program call anywhere."""
    read_file = tiktoken.load.read_file
    tiktoken.load.read_file = read_file if fetch else None
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # no network, a proxy's page in place of the file, a read-only cache, ...
        why = f"could not be fetched ({type(error).__name__})" if fetch else "a file may not fetch it"
        raise UserError(f"tokenizer {name[:40]!r} is not in tiktoken's cache (TIKTOKEN_CACHE_DIR), {why}: "
                        f"run python data.py --tokenizer {name} with a network, or use bpe") from None
    finally:
        tiktoken.load.read_file = read_file


def build_encoding(kind: str, alphabet: str, merged: Sequence[str], imported, fetch) -> tiktoken.Encoding:
    """The encoding of a kind of tokenizer, with our special tokens at its end. All its ids decode."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    if kind == "imported":
        ranks = {token.encode("latin-1"): i for i, token in enumerate(merged) if token}
        return tiktoken.Encoding(kind, pat_str=imported["pattern"], mergeable_ranks=ranks,
                                 special_tokens=imported["names"])
    pattern, reserved = WORD_PATTERN, {}
    if kind in ("byte", "bpe"):  # byte has no merges
        ranks |= {token.encode("latin-1"): 256 + i for i, token in enumerate(merged)}
    elif kind == "char":  # whole pieces, of one character here, are looked up first: bytes need no ranks
        pattern, ranks = r"(?s:.)", {char.encode("utf-8"): i for i, char in enumerate(alphabet)}
    else:
        named = named_encoding(kind, fetch)
        pattern, ranks = named._pat_str, named._mergeable_ranks
        own_names = {i: name for name, i in named._special_tokens.items() if name not in SPECIALS}
        # An id that no text gives needs a name, too: there are gaps. o200k_harmony has its own <|end|>.
        for i in sorted(set(range(named.n_vocab)) - set(ranks.values())):
            reserved[own_names.get(i, f"<|unused-{i}|>")] = i
    first = len(ranks) + len(reserved)
    specials = reserved | {name: first + i for i, name in enumerate(SPECIALS)}
    return tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


class Tokenizer:
    """vocab_size counts the specials. fingerprint: 16 hexadecimal digits of all that decides the ids. path:
    the file it was loaded from. alphabet: the characters of char. merged: what bpe has learned, one character
    per byte (latin-1). imported: its pattern, whether a text becomes NFC first, its names {name: id} of the
    ids that are "" in merged, and its specials, the ids that are our six."""

    def __init__(self, kind: str, *, alphabet="", merged: Sequence[str] = (), imported=None, fetch=True):
        learned = {"char": {"alphabet": alphabet}, "bpe": {"pattern": WORD_PATTERN, "merged": merged},
                   "imported": {"merged": merged, "imported": imported}}
        self.content = {"format": FORMAT, "kind": kind, "specials": list(SPECIALS), **learned.get(kind, {})}
        canonical = json.dumps(self.content, sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]
        self.kind, self.path, self.alphabet = kind, "", set(alphabet)
        self.encoding = build_encoding(kind, alphabet, merged, imported, fetch)
        self.vocab_size, self.nfc = self.encoding.n_vocab, bool((imported or {}).get("nfc"))
        ids = range(self.vocab_size - 6, self.vocab_size) if imported is None else imported["specials"]
        self.pad_id, self.bos_id, self.system_id, self.user_id, self.assistant_id, self.end_id = ids
        self.specials_but_end = tuple(ids[:-1])  # what a completion of plain text must not draw

    def encode(self, text: str, where: str = "text") -> list[int]:
        """Ordinary text: the names of special tokens are spelled out. UserError, which names `where`, for a
        character outside the alphabet (tiktoken would panic) and for half a surrogate pair."""
        check_text(text, f"{where}: ")
        if self.kind == "char" and (foreign := set(text) - self.alphabet):
            i = min(map(text.index, foreign))
            raise UserError(f"{where}, character {i}: found {text[i]!r} (U+{ord(text[i]):04X}), expected one "
                            f"of the tokenizer's {len(self.alphabet)}; use --tokenizer bpe or byte")
        return self.encoding.encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text)

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as an array (tokens,): uint16, or uint32 where vocab_size > 65536."""
        return np.array(self.encode(text), np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Special tokens as their names. A character may be spread over tokens: join bytes, then decode."""
        return self.encoding.decode_bytes(np.asarray(ids).tolist())

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path: str) -> None:
        """Write tokenizer.json, whole or not at all."""
        with replacing(Path(path)) as temporary:
            temporary.write_text(json.dumps({**self.content, "fingerprint": self.fingerprint}, indent=1))

    @staticmethod
    def load(path: str) -> "Tokenizer":
        """Read what `save` wrote; UserError for anything else. Nothing that the file names is fetched."""
        try:
            content, = read_records(path, strict=True)
            learned = {key: content[key] for key in ("alphabet", "merged", "imported") if key in content}
            tokenizer = Tokenizer(content["kind"], **learned, fetch=False)
            if {**tokenizer.content, "fingerprint": tokenizer.fingerprint} != content:
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{path}: found another or a changed file, expected a tokenizer.json") from None
        tokenizer.path = str(path)
        return tokenizer


def make_tokenizer(spec: str, text: str | Iterable[str] = "", vocab_size: int = 4096) -> Tokenizer:
    """spec: byte, char, bpe, a tiktoken name, or the path of a tokenizer.json. char and bpe learn from the
    text or documents, bpe up to vocab_size tokens."""
    names = ["byte", *tiktoken.list_encoding_names()]
    if spec in names:
        return Tokenizer(spec)
    if spec in ("char", "bpe"):
        documents = [text] if isinstance(text, str) else list(text)
        if spec == "char":
            return Tokenizer("char", alphabet="".join(sorted(set().union(*documents))))
        return Tokenizer("bpe", merged=[t.decode("latin-1") for t in train_bpe(documents, vocab_size)[256:]])
    if spec.endswith(".json") or Path(spec).is_file():
        return Tokenizer.load(spec)
    raise UserError(f"--tokenizer {spec}: expected char, bpe, {', '.join(names)} or a tokenizer.json")
