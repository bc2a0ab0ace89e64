"""tokenizer.py against slow and obvious versions: merges, cuts, round trips, and what is refused."""
import base64
import hashlib
import json
import pathlib
import random
import time
from collections import Counter

import numpy as np
import pytest
import regex
import tiktoken

from lib import tokenizer as module
from lib.program import UserError
from lib.tokenizer import SPECIALS, WORD_PATTERN, Tokenizer, make_tokenizer, merge_pairs

HINDI = "हिन्दी में लिखा हुआ एक वाक्य, जिसमें क्षत्रिय, श्री, विद्या और क्‍ष जैसे संयुक्ताक्षर हैं। १२३४५"
EMOJI = "👨‍👩‍👧‍👦 family, 🏳️‍🌈 and 🇮🇳🇨🇳 flags, 👍🏽👍🏿 ❤️ 1️⃣ #️⃣ ☺ text"
MIXED = "Zoë's naïve café—\r\n\ttabs\0NUL   three  spaces\n\n今天天气真好！123456 ½ ²"
MIXED += "  e\u0301\u0323 \u3000wide\u2028line\x85 "
CHINESE = """
清晨的雾气还没有散去，河边的小镇已经醒了。卖豆浆的老人推着车子，沿着石板路慢慢地走，嘴里吆喝着祖父教
孩子们背着书包从巷子里跑出来，一边吃包子一边说昨天晚上看到的流星。桥头的修鞋匠支起雨伞，摆好锤子、钉
语言模型的工作其实并不神秘：它读过很多文字，学会了在每一个位置上猜测下一个词。猜对了，损失就小一点；
推的次数多了，模型就慢慢懂得了语法、常识，甚至一点点幽默。可是它并不知道自己不知道什么，所以我们还要
春天种下的番茄，到了六月就结出一串一串的果实。母亲把熟透的摘下来，用井水洗干净，撒上白糖，放在院子里
"""
OTHERS = "العربيّة ١٢٣ עִבְרִית ภาษาไทย 한국어 Ελλάδα it's we'll \u00a0\u200b\ufeff"


def slow_bpe(pieces: dict[str, int], n_merges: int) -> tuple[list[bytes], dict[str, list[int]]]:
    """Sennrich et al. 2016, algorithm 1, as written: count all pairs anew for every merge."""
    words = {piece: list(piece.encode()) for piece in pieces}
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < 256 + n_merges:
        counts = Counter()
        for piece, ids in words.items():
            for pair in zip(ids, ids[1:]):
                counts[pair] += pieces[piece]
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        for ids in words.values():
            i = 0
            while i + 1 < len(ids):
                if (ids[i], ids[i + 1]) == best:
                    ids[i:i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens, words


def random_pieces(rng: random.Random) -> dict[str, int]:
    """A few pieces over a few symbols: many ties, many runs like "aaaa", characters of one to four bytes."""
    symbols = rng.choice(["a", "ab", "abc", "ab ", "中文字", "कि्", "😀é\u200d", "abcdefgh", "\0\x7f"])
    sizes = (rng.choice([1, 2, 5, 9, 40]) for _ in range(rng.randint(1, 12)))
    return {"".join(rng.choices(symbols, k=size)): rng.choice([1, 1, 2, 3, 100]) for size in sizes}


def pieces_of_tiktoken(texts: list[str]) -> list[list[str]]:
    """Where tiktoken cuts: with every substring in the vocabulary, a piece is one token."""
    substrings = {text[i:j].encode() for text in texts for j in range(len(text) + 1) for i in range(j)}
    ranks = {token: i for i, token in enumerate(substrings)}
    encoding = tiktoken.Encoding("cuts", pat_str=WORD_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return [[encoding.decode([i]) for i in encoding.encode_ordinary(text)] for text in texts]


def random_text(rng: random.Random, size: int) -> str:
    """Characters of all planes, also unassigned ones, mixed with scripts that are easily cut wrong."""
    codes = [rng.randrange(rng.choice([0x80, 0x3000, 0xD800, 0x110000])) for _ in range(size)]
    others = rng.choices(HINDI + EMOJI + MIXED, k=size)
    return "".join(chr(code) if rng.random() < 0.5 and not 0xD800 <= code < 0xE000 else other
                   for code, other in zip(codes, others))


@pytest.fixture(scope="module")
def corpus() -> str:
    return pathlib.Path(json.decoder.__file__).read_text() + CHINESE + HINDI + EMOJI + MIXED


@pytest.fixture(scope="module")
def tokenizers(corpus) -> dict[str, Tokenizer]:
    return {spec: make_tokenizer(spec, corpus, 800) for spec in ("byte", "char", "bpe")}


def test_paper_example():
    """The dictionary of Sennrich et al. 2016 gives the merges of the docstring, ties to the smaller ids."""
    ranks = merge_pairs({"low": 5, "lower": 2, "newest": 6, "widest": 3}, 6)
    assert ranks[256:] == [b"es", b"est", b"lo", b"low", b"ew", b"new"]


def test_trainer_equals_slow_version():
    """The same merges in the same order as the naive algorithm, on 400 random sets of pieces."""
    rng = random.Random(1)
    for case in range(400):
        pieces, n_merges = random_pieces(rng), rng.choice([0, 1, 5, 1000])
        assert merge_pairs(pieces, n_merges) == slow_bpe(pieces, n_merges)[0], (case, pieces, n_merges)


def test_tiktoken_applies_merges_as_trainer_did():
    """tiktoken joins by rank of the union, the trainer by pair: both end with the same tokens in a piece."""
    rng = random.Random(2)
    pools = ["ab", "aab ", "中文字 ", HINDI, EMOJI] * 8
    texts = ["".join(rng.choices(pool, k=300)) for pool in pools]
    for text in [*texts, CHINESE]:
        tokenizer = make_tokenizer("bpe", text, 262 + 60)
        tokens, words = slow_bpe(Counter(regex.findall(WORD_PATTERN, text)), 60)
        assert [token.encode("latin-1") for token in tokenizer.content["merged"]] == tokens[256:]
        for piece, ids in words.items():
            assert tokenizer.encode(piece) == ids, piece


def test_what_is_not_merged():
    """Pairs at the seam of two documents, and pairs that occur once. No vocabulary is smaller than 262."""
    assert b"ab" not in module.train_bpe(["a", "b"] * 50, 300)
    assert b"ab" in module.train_bpe(["ab "] * 50, 300)
    documents = [CHINESE[:100], HINDI, EMOJI, CHINESE[50:]]
    assert module.train_bpe(documents, 400) == module.train_bpe(documents[::-1], 400)
    assert make_tokenizer("bpe", "abab cd", 4096).vocab_size == 256 + 1 + 6
    assert len(make_tokenizer("bpe", CHINESE, 4096).encode(CHINESE)) < 0.6 * len(CHINESE.encode())
    with pytest.raises(UserError, match="--vocab_size 261.*at least 262"):
        make_tokenizer("bpe", "abc", 261)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "!", "7", "中", "कि", "😀", "\r\n"])
def test_long_runs_cost_linear_time(unit, tokenizers):
    """A megabyte without a place to cut: no quadratic time, no panic over spaces, learned or encoded."""
    text = unit * (1_000_000 // len(unit.encode()))
    start = time.process_time()
    for tokenizer in (make_tokenizer("bpe", text, 300), tokenizers["byte"], tokenizers["bpe"]):
        assert tokenizer.decode(tokenizer.encode_array(text)) == text
    assert time.process_time() - start < 5


def test_trainer_and_tiktoken_cut_alike():
    """`regex` in the trainer and the Rust library in tiktoken give the same pieces, above all at marks."""
    rng = random.Random(3)
    texts = [HINDI[:60], HINDI[40:], EMOJI, MIXED[:60], CHINESE[:60]]
    texts += ["a" * 70, " " * 70 + "x", "中" * 33, "!" * 40 + "\n" * 34]
    pool = HINDI + EMOJI + MIXED + CHINESE[:200] + OTHERS
    texts += ["".join(rng.choices(pool, k=rng.randint(1, 40))) for _ in range(300)]
    for text, pieces in zip(texts, pieces_of_tiktoken(texts)):
        assert pieces == regex.findall(WORD_PATTERN, text), text


def test_pattern_keeps_words_whole_and_covers_every_character():
    """Hindi words keep their vowel signs and joiners, emoji sequences stay whole, numbers are cut in threes.
    No character falls between the alternatives: tiktoken drops what the pattern does not match."""
    for pieces in ("हिन्दी| में| क्‍ष", "ok| 👨‍👩‍👧‍👦| ❤️", "don|'t| 123|45| | x|\n"):
        assert regex.findall(WORD_PATTERN, pieces.replace("|", "")) == pieces.split("|")
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert "".join(regex.findall(WORD_PATTERN, text)) == text
    for kind in ("byte", "bpe"):
        tokenizer = make_tokenizer(kind, "abab", 262)
        assert tokenizer.decode(tokenizer.encode_array(text)) == text


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_round_trip_is_exact(kind, tokenizers, corpus):
    """decode(encode(text)) == text for every str without half characters (char learns from these texts)."""
    rng = random.Random(4)
    texts = ["", "\0", "\r\n\r", "\ufeffBOM", HINDI, EMOJI, MIXED, CHINESE, corpus]
    texts += [random_text(rng, 80) for _ in range(200)]
    tokenizer = tokenizers[kind] if kind != "char" else make_tokenizer("char", texts)
    for text in texts:
        ids, array = tokenizer.encode(text), tokenizer.encode_array(text)
        assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(array) == text.encode()
        assert array.dtype == np.uint16 and array.tolist() == ids and max(ids, default=0) < tokenizer.pad_id
        alphabet = bytes(range(256)) if kind == "byte" else sorted(tokenizer.alphabet)
        units = text.encode() if kind == "byte" else text[:100] * (kind == "char")
        assert [alphabet.index(unit) for unit in units] == ids[:len(units)]  # an id is an index


def test_specials_have_the_last_six_ids_and_never_come_from_text(tokenizers):
    """Their ids decode to their names; their names encode to the ids of seven (and more) characters."""
    trained_on_them = make_tokenizer("bpe", "hello<|end|> <|user|>more " * 200, 400)
    for tokenizer in (*tokenizers.values(), trained_on_them):
        ids = [getattr(tokenizer, f"{name.strip('<|>')}_id") for name in SPECIALS]
        assert ids == list(range(tokenizer.vocab_size - 6, tokenizer.vocab_size))
        assert tokenizer.decode(ids) == "".join(SPECIALS) and tokenizer.specials_but_end == tuple(ids[:-1])
        for encode in (tokenizer.encode, tokenizer.encode_array):
            assert max(encode("x<|end|>" + "".join(SPECIALS))) < tokenizer.pad_id
    assert len(tokenizers["byte"].encode("<|end|>")) == len(tokenizers["char"].encode("<|end|>")) == 7


def test_characters_outside_are_named(tokenizers):
    """Half a surrogate pair (any kind) or a character outside the alphabet: what and where."""
    tokenizer = make_tokenizer("char", "abc\n")
    with pytest.raises(UserError, match=r"character 6: found '中' \(U\+4E2D\).*tokenizer's 4"):
        tokenizer.encode("abc\nab中c")
    for each in (*tokenizers.values(), tokenizer):
        with pytest.raises(UserError, match="text: found half a character"):
            each.encode("a\ud83d")


def stand_in(name: str) -> tiktoken.Encoding:
    """As o200k_harmony: a gap before its specials, and an <|end|> of its own."""
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    return tiktoken.Encoding(name, pat_str=r"\w+|\s+(?!\S)|\s+|[^\w\s]+", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 260, "<|end|>": 262})


def test_named_encoding_gets_our_specials_appended(monkeypatch, tmp_path):
    """Its ids stay, ours follow, gaps decode too, and the saved file rebuilds it from its name."""
    monkeypatch.setattr(tiktoken, "get_encoding", stand_in)
    tokenizer = make_tokenizer("gpt2")
    assert tokenizer.encode("the <|endoftext|>") == stand_in("gpt2").encode_ordinary("the <|endoftext|>")
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.end_id) == (269, 263, 268)
    assert tokenizer.decode(range(257, 261)) == "the<|unused-258|><|unused-259|><|endoftext|>"
    assert tokenizer.decode(range(261, 264)) == "<|unused-261|><|unused-262|><|pad|>"
    tokenizer.save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert (loaded.kind, loaded.fingerprint, loaded.vocab_size) == ("gpt2", tokenizer.fingerprint, 269)


def test_a_tokenizer_json_fetches_nothing(monkeypatch, tmp_path):
    """A kind of tiktoken's comes from its cache, or one line says how to fill it. A user who names it
    may fetch it, and what that brought is there for every later load."""
    asked, path = [], tmp_path / "t.json"

    def network(url):
        asked.append(url)
        tokens = [bytes([i]) for i in range(256)] + [i.to_bytes(3, "big") for i in range(256, 100_256)]
        return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    monkeypatch.setattr(tiktoken.load, "read_file", network)
    monkeypatch.setattr(tiktoken.load, "check_hash", lambda *_: True)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    write(path, {"format": module.FORMAT, "kind": "cl100k_base", "specials": list(SPECIALS)})
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(UserError, match="'cl100k_base'.*may not fetch.*--tokenizer cl100k_base"):
        Tokenizer.load(path)
    assert not asked
    for spec in ("cl100k_base", str(path)):
        tiktoken.registry.ENCODINGS.clear()
        assert make_tokenizer(spec).encode("ab") == [97, 98] and len(asked) == 1
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/proc/none")
    with pytest.raises(UserError, match="could not be fetched"):
        make_tokenizer("p50k_base")


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_saved_tokenizer_is_the_same(kind, tokenizers, tmp_path, corpus):
    """load(save(t)) has the same ids, size and fingerprint; saving twice gives the same bytes."""
    tokenizer, path = tokenizers[kind], tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded, before = make_tokenizer(str(path)), path.read_bytes()
    assert loaded.encode(corpus) == tokenizer.encode(corpus) and loaded.path == str(path)
    assert loaded.content == tokenizer.content and loaded.fingerprint == tokenizer.fingerprint
    loaded.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_fingerprint_tells_tokenizers_apart(tokenizers):
    """Other merges, alphabets or kinds give others; and for ever these."""
    others = [make_tokenizer("char", "ab"), make_tokenizer("char", "ac"), make_tokenizer("bpe", "abab", 263),
              make_tokenizer("bpe", "acac", 263), make_tokenizer("bpe", "abab", 262), *tokenizers.values()]
    assert len({tokenizer.fingerprint for tokenizer in others}) == len(others)
    assert [t.fingerprint for t in (make_tokenizer("byte"), *others[:3:2])] == [
        "1559388290e2063d", "609fd1294748197b", "c01be03e515b7cc3"]


def write(path, content: dict, **changes) -> None:
    """A tokenizer.json with other values and the fingerprint that fits them; ... leaves a key out."""
    content = {key: value for key, value in (content | changes).items() if value is not ...}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps(content | {"fingerprint": hashlib.sha256(canonical).hexdigest()[:16]}))


BPE = Tokenizer("bpe", merged=["ab", "abc"]).content
BAD_CONTENT = {
    "other version": {"format": "llm-from-zero tokenizer, version 2"}, "no kind": {"kind": ...},
    "kind is a list": {"kind": ["bpe"]}, "unknown kind": {"kind": "gpt5"}, "other kind": {"kind": "byte"},
    "char without alphabet": {"kind": "char"}, "other specials": {"specials": ["<|end|>"]},
    "extra key": {"ranks": []}, "another pattern": {"pattern": "(a+)+$"}, "no merges": {"merged": ...},
    "merges null": {"merged": None}, "a number": {"merged": ["ab", 7]}, "no bytes": {"merged": ["中文"]},
}


@pytest.mark.parametrize("name", BAD_CONTENT)
def test_a_changed_file_is_one_clear_line(name, tmp_path):
    """Even with a fingerprint that fits only what `save` writes is taken; control: the unchanged file."""
    path = tmp_path / "bad.json"
    write(path, BPE)
    good = path.read_bytes()
    assert Tokenizer.load(path).vocab_size == 264
    write(path, BPE, **BAD_CONTENT[name])
    changed = path.read_bytes()
    for content in (changed, b"", b"[]", b"[" * 200_000, good * 2, good.replace(b"abc", b"abd"), b"\xff"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="bad.json.*found|tokenizer") as caught:
            Tokenizer.load(path)
        assert "\n" not in str(caught.value)
