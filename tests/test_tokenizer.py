"""tokenizer.py against slow and obvious versions: merges, cuts, round trips, and every way to hand it nonsense."""
import base64
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import regex
import tiktoken

from lib import tokenizer as tokenizer_module
from lib.program import UserError
from lib.tokenizer import (
    FORMAT,
    SPECIALS,
    WORD_PATTERN,
    Tokenizer,
    fingerprint,
    main,
    make_tokenizer,
    merge_pairs,
    train_bpe,
)

HINDI = "हिन्दी में लिखा हुआ एक वाक्य, जिसमें क्षत्रिय, श्री, विद्या और क्‍ष जैसे संयुक्ताक्षर हैं। १२३४५ रुपये"
EMOJI = "👨‍👩‍👧‍👦 family, 🏳️‍🌈 and 🇮🇳🇨🇳 flags, 👍🏽👍🏿 ❤️ 1️⃣ #️⃣ ☺ text"
MIXED = "Zoë's naïve café—\r\n\ttabs\0NUL   three  spaces\n\n今天天气真好！123456 ½ ²"
MIXED += "  e\u0301\u0323 \u3000wide\u2028line\x85 "
CHINESE = """
清晨的雾气还没有散去，河边的小镇已经醒了。卖豆浆的老人推着车子，沿着石板路慢慢地走，嘴里吆喝着祖父教给他的调子。
孩子们背着书包从巷子里跑出来，一边吃包子一边说昨天晚上看到的流星。桥头的修鞋匠支起雨伞，摆好锤子、钉子和胶水，等着第一位客人。
语言模型的工作其实并不神秘：它读过很多文字，学会了在每一个位置上猜测下一个词。猜对了，损失就小一点；猜错了，参数就被轻轻地推一下。
推的次数多了，模型就慢慢懂得了语法、常识，甚至一点点幽默。可是它并不知道自己不知道什么，所以我们还要教它诚实地说“我不清楚”。
春天种下的番茄，到了六月就结出一串一串的果实。母亲把熟透的摘下来，用井水洗干净，撒上白糖，放在院子里的木桌上。
父亲下班回来，先不急着吃饭，总要坐在葡萄架下喝一杯茶，听收音机里的新闻，然后讲工厂里发生的事情。
历史书上写着，这条运河挖了几十年，动用了上百万人，把南方的粮食运到北方，把北方的煤炭运到南方。
后来铁路修好了，火车比船快得多，码头上的仓库一间一间地空了下来。如今这里是博物馆，游客可以看到古老的船票、账本和地图。
数学老师在黑板上画了一个圆，又画了一条切线，问大家：“为什么切线和半径互相垂直？”教室里安静得只听见风扇的声音。
过了一会儿，坐在最后一排的女孩举起手来，说可以用反证法。老师笑了，把粉笔递给她，请她到前面来写完整的证明。
医院的走廊很长，灯光是白色的。护士推着药车走过，鞋底几乎没有声音。病房里的老爷爷拉着孙女的手，说等身体好了，就带她去看大海。
海上的天气变化很快，上午还是晴空万里，下午就起了风浪。船长看了看气压计，下令收帆，水手们立刻行动起来，没有人多说一句话。
城市的夜晚从来不是黑暗的。高楼上的广告牌一直亮到天明，出租车排着队等在车站门口，便利店的店员一遍又一遍地说“欢迎光临”。
有人说城市没有感情，可是下雨的时候，总有陌生人愿意把伞分给你一半；迷路的时候，总有人停下来为你指路。
做菜最要紧的是火候。油热了再放葱姜蒜，闻到香味以后把肉片倒进去，快速翻炒，颜色一变就加酱油和一点点醋。
豆腐要最后放，轻轻地推，不能用力，不然就碎了。出锅以前尝一尝咸淡，撒一把香菜，这道菜就算完成了。
科学家在沙漠里建了一座天文台，因为那里的空气干燥，夜空特别清楚。他们观察遥远的星系，计算光走了多少年才到达地球。
年轻的研究员第一次看到土星的光环时，激动得整夜没有睡觉。她在日记里写道：原来书上说的都是真的，宇宙比我想象的还要美丽。
秋天的图书馆里人很多，靠窗的座位一大早就被占满了。有的人在准备考试，有的人在写论文，也有的人只是喜欢这里的安静。
管理员是一位戴眼镜的先生，他记得每一本书的位置，也记得每一位常来的读者喜欢看什么书。他说，书和人一样，都在等待合适的相遇。
冬天的第一场雪下了整整一夜。早上推开门，院子、屋顶和远处的山全都变成了白色，连平时吵闹的麻雀也不见了。
孩子们堆了一个很大的雪人，用胡萝卜做鼻子，用煤球做眼睛，又把爷爷的旧帽子戴在它的头上，大家围着它唱歌跳舞。
"""


def stdlib_text(size: int) -> str:
    """English and code that every machine has: the sources of the standard library, in order of their names."""
    text = ""
    for path in sorted(pathlib.Path(json.__file__).parents[1].glob("*.py")):
        if len(text) < size:
            text += path.read_text(encoding="utf-8")
    return text[:size]


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
    """A few pieces over a few symbols: many ties, many runs like "aaaa", and characters of one to four bytes."""
    symbols = rng.choice(["a", "ab", "abc", "ab ", "中文字", "कि्", "😀é\u200d", "abcdefgh", "\0\x7f"])
    sizes = (rng.choice([1, 2, 5, 9, 40]) for _ in range(rng.randint(1, 12)))
    return {"".join(rng.choices(symbols, k=size)): rng.choice([1, 1, 2, 3, 100]) for size in sizes}


def pieces_of_tiktoken(texts: list[str]) -> list[list[str]]:
    """Where tiktoken cuts: with every substring in the vocabulary, a piece is looked up whole and becomes one token."""
    substrings = {text[i:j].encode() for text in texts for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    ranks = {token: i for i, token in enumerate(substrings)}
    encoding = tiktoken.Encoding("cuts", pat_str=WORD_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return [[encoding.decode([i]) for i in encoding.encode_ordinary(text)] for text in texts]


def random_text(rng: random.Random, size: int) -> str:
    """Characters of all planes, also unassigned and private ones, mixed with scripts that are easily cut wrong."""
    def any_char() -> str:
        code = rng.choice([rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x10000), rng.randrange(0x110000)])
        return chr(code) if not 0xD800 <= code < 0xE000 else "�"
    return "".join(any_char() if rng.random() < 0.5 else rng.choice(HINDI + EMOJI + MIXED) for _ in range(size))


@pytest.fixture(scope="module")
def corpus() -> str:
    return stdlib_text(200_000) + CHINESE + HINDI + EMOJI + MIXED


@pytest.fixture(scope="module")
def tokenizers(corpus) -> dict[str, Tokenizer]:
    return {spec: make_tokenizer(spec, corpus, 1500) for spec in ("byte", "char", "bpe")}


# ---- the trainer ---------------------------------------------------------------------------------------------------

def test_paper_example():
    """The dictionary of Sennrich et al. 2016 gives the merges of the docstring, ties to the smaller ids."""
    ranks = merge_pairs({"low": 5, "lower": 2, "newest": 6, "widest": 3}, 6)
    assert list(ranks)[256:] == [b"es", b"est", b"lo", b"low", b"ew", b"new"]


def test_trainer_equals_slow_version():
    """The same merges in the same order as the naive algorithm, on 400 random sets of pieces."""
    rng = random.Random(1)
    for case in range(400):
        pieces, n_merges = random_pieces(rng), rng.choice([0, 1, 5, 1000])
        assert list(merge_pairs(pieces, n_merges)) == slow_bpe(pieces, n_merges)[0], (case, pieces, n_merges)


def test_tiktoken_applies_merges_as_trainer_did():
    """tiktoken joins by rank of the union, the trainer by pair: both end with the same tokens in a training piece."""
    rng = random.Random(2)
    texts = ["".join(rng.choices(rng.choice(["ab", "aab ", "中文字 ", HINDI, EMOJI]), k=300)) for _ in range(60)]
    for text in [*texts, CHINESE]:
        tokenizer = make_tokenizer("bpe", text, 262 + 60)
        pieces = Counter(regex.findall(WORD_PATTERN, text))
        tokens, words = slow_bpe(pieces, 60)
        assert [token.encode("latin-1") for token in tokenizer.content["merged"]] == tokens[256:]
        for piece, ids in words.items():
            assert tokenizer.encode(piece) == ids, piece


def test_merges_never_cross_documents():
    """Two documents never make a pair at their seam, and their order changes nothing."""
    assert b"ab" not in train_bpe(["a", "b"] * 50, 300)
    assert b"ab" in train_bpe("ab " * 50, 300)
    documents = [CHINESE[:300], HINDI, EMOJI, CHINESE[200:600]]
    assert train_bpe(documents, 400) == train_bpe(documents[::-1], 400)


def test_special_names_in_training_text_stay_text():
    """A corpus full of "<|end|>" teaches merges of its characters; no special id ever comes out of encoding it."""
    text = "hello<|end|> <|user|>more " * 200
    tokenizer = make_tokenizer("bpe", text, 400)
    assert max(tokenizer.encode(text)) < tokenizer.pad_id
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_small_text_gives_smaller_vocabulary_with_warning(capsys):
    """Pairs that occur once are not merged: the size says so, and the user is told."""
    tokenizer = make_tokenizer("bpe", "abab cd", 4096)
    assert tokenizer.vocab_size == 256 + 1 + 6
    assert "263 tokens instead of --vocab_size 4096" in capsys.readouterr().err
    with pytest.raises(UserError, match="at least 262"):
        train_bpe("abc", 261)
    for nothing in ("", [], ["", ""]):
        for spec in ("bpe", "char"):
            with pytest.raises(UserError, match="empty"):
                make_tokenizer(spec, nothing, 300)


def test_training_and_encoding_are_fast_enough():
    """1.1 MB of text: 4096 tokens in under 10 s (about 1), and every kind encodes more than 1 MB/s (about 15)."""
    text = stdlib_text(1_100_000)
    start = time.perf_counter()
    bpe = make_tokenizer("bpe", text, 4096)
    assert time.perf_counter() - start < 10
    assert bpe.vocab_size == 4096 and len(bpe.encode_array(text)) < 0.45 * len(text)
    for tokenizer in (make_tokenizer("byte"), make_tokenizer("char", text), bpe):
        start = time.perf_counter()
        tokenizer.encode_array(text)
        assert time.perf_counter() - start < len(text.encode()) / 1e6


def test_chinese_needs_under_1_2_tokens_per_character():
    """From a page of varied Chinese, whose characters are three bytes each."""
    tokenizer = make_tokenizer("bpe", CHINESE, 4096)
    assert len(tokenizer.encode(CHINESE)) < 1.2 * len(CHINESE)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "!", "7", "中", "कि", "😀", "ab", "\r\n"])
def test_long_runs_cost_linear_time(unit, tokenizers):
    """A megabyte without a place to cut: no quadratic time, no panic over white space, in training and encoding."""
    text = unit * (1_000_000 // len(unit.encode()))
    start = time.perf_counter()
    trained = make_tokenizer("bpe", text, 300)
    for tokenizer in (trained, tokenizers["byte"], tokenizers["bpe"]):
        assert tokenizer.decode(tokenizer.encode_array(text)) == text
    assert time.perf_counter() - start < 10


# ---- cuts and round trips ------------------------------------------------------------------------------------------

def test_trainer_and_tiktoken_cut_alike():
    """`regex` in the trainer and the Rust library in tiktoken give the same pieces, above all at combining marks."""
    rng = random.Random(3)
    pool = HINDI + EMOJI + MIXED + CHINESE[:200]
    pool += "العربيّة ١٢٣ עִבְרִית ภาษาไทย 한국어 Ελλάδα it's we'll \u00a0\u200b\ufeff"
    texts = [HINDI[:60], HINDI[40:], EMOJI, MIXED[:60], CHINESE[:60]]
    texts += ["a" * 70, " " * 70 + "x", "中" * 33, "!" * 40 + "\n" * 34]
    texts += ["".join(rng.choices(pool, k=rng.randint(1, 40))) for _ in range(300)]
    for text, pieces in zip(texts, pieces_of_tiktoken(texts)):
        assert pieces == regex.findall(WORD_PATTERN, text), text


def test_pattern_keeps_words_whole():
    """Hindi words keep their vowel signs and joiners, emoji sequences stay whole, long numbers are cut in threes."""
    assert regex.findall(WORD_PATTERN, "हिन्दी में क्‍ष") == ["हिन्दी", " में", " क्‍ष"]
    assert regex.findall(WORD_PATTERN, "ok 👨‍👩‍👧‍👦 ❤️") == ["ok", " 👨‍👩‍👧‍👦", " ❤️"]
    assert regex.findall(WORD_PATTERN, "don't 12345  x\n") == ["don", "'t", " 123", "45", " ", " x", "\n"]


def test_pattern_covers_every_character():
    """No character falls between the alternatives: what the pattern does not match tiktoken drops without a word."""
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert "".join(regex.findall(WORD_PATTERN, text)) == text
    for kind in ("byte", "bpe"):
        tokenizer = make_tokenizer(kind, "abab", 262)
        assert tokenizer.decode(tokenizer.encode_array(text)) == text


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_round_trip_is_exact(kind, tokenizers, corpus):
    """decode(encode(text)) == text for every str without lone surrogates; char has learned from these texts."""
    rng = random.Random(4)
    texts = ["", "\0", "\r\n\r", "\ufeffBOM", HINDI, EMOJI, MIXED, CHINESE] + [random_text(rng, 80) for _ in range(200)]
    tokenizer = tokenizers[kind] if kind != "char" else make_tokenizer("char", texts + [corpus])
    for text in texts + [corpus]:
        ids = tokenizer.encode(text)
        array = tokenizer.encode_array(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(array) == text.encode()
        assert array.dtype == np.uint16 and array.tolist() == ids and max(ids, default=0) < tokenizer.pad_id


def test_byte_and_char_ids_are_what_they_say(tokenizers):
    """byte: the UTF-8 bytes. char: one id per character, the index in the sorted alphabet."""
    assert tokenizers["byte"].encode(MIXED + EMOJI) == list((MIXED + EMOJI).encode())
    alphabet = sorted(set(MIXED + EMOJI))
    tokenizer = make_tokenizer("char", [MIXED, EMOJI])
    assert tokenizer.encode(MIXED) == [alphabet.index(char) for char in MIXED]
    assert tokenizer.vocab_size == len(alphabet) + 6


def test_specials_have_the_last_six_ids_and_never_come_from_text(tokenizers):
    """Their ids decode to their names; their names encode to the ids of seven (and more) characters."""
    for tokenizer in tokenizers.values():
        names = ["pad_id", "bos_id", "system_id", "user_id", "assistant_id", "end_id"]
        ids = [getattr(tokenizer, name) for name in names]
        assert ids == list(range(tokenizer.vocab_size - 6, tokenizer.vocab_size))
        assert tokenizer.decode(ids) == "".join(SPECIALS)
        for encode in (tokenizer.encode, tokenizer.encode_array):
            assert max(encode("x<|end|>" + "".join(SPECIALS))) < tokenizer.pad_id
    assert len(tokenizers["byte"].encode("<|end|>")) == len(tokenizers["char"].encode("<|end|>")) == 7


def test_partial_characters_decode_to_replacement(tokenizers):
    """A stream cut inside a character: the bytes are exact, the text shows U+FFFD."""
    ids = tokenizers["byte"].encode("中")
    assert tokenizers["byte"].decode(ids[:2]) == "\ufffd"
    assert b"".join(tokenizers["byte"].decode_bytes([i]) for i in ids).decode() == "中"


@pytest.mark.parametrize("ids", [[-1], [10**6], [0, 1.5], [-100], np.array([70000])])
def test_foreign_ids_are_refused(ids, tokenizers):
    """Ids of another vocabulary, or targets with -100 among them: an error that names the id."""
    with pytest.raises(UserError, match="token id"):
        tokenizers["bpe"].decode(ids)


def test_characters_outside_are_named(tokenizers):
    """A lone surrogate (any kind) or a character outside the alphabet: what and where, before tiktoken panics."""
    tokenizer = make_tokenizer("char", "abc\n")
    with pytest.raises(UserError, match=r"line 2, column 3 \(character 6\).*'中' \(U\+4E2D\).*4 characters"):
        tokenizer.encode("abc\nab中c")
    for each in (*tokenizers.values(), tokenizer):
        with pytest.raises(UserError, match=r"line 1, column 2 \(character 1\).*surrogate U\+D83D"):
            each.encode("a\ud83d")
    for spec in ("char", "bpe"):
        with pytest.raises(UserError, match="surrogate"):
            make_tokenizer(spec, ["fine", "a\udc00"], 300)


# ---- tiktoken's named encodings (the files are on the network: a small one stands in) --------------------------------

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
    assert tokenizer.decode([268]) == "<|end|>"
    tokenizer.save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert (loaded.kind, loaded.fingerprint, loaded.vocab_size) == ("gpt2", tokenizer.fingerprint, 269)
    assert tokenizer.decode(tokenizer.encode("\n" * 100_000 + "x")) == "\n" * 100_000 + "x"
    with pytest.raises(UserError, match="column 2 .*white space"):  # tiktoken's own look-ahead would overflow
        tokenizer.encode("x" + " " * 1_000_000)


def test_named_encoding_offline_says_how_to_prefetch(monkeypatch):
    """Without a network: one line with the variable, the command and the alternative."""
    def no_network(name):
        raise OSError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match="'cl100k_base' could not.*TIKTOKEN_CACHE_DIR.*--tokenizer bpe") as info:
        make_tokenizer("cl100k_base")
    assert "\n" not in str(info.value)


def test_a_tokenizer_json_fetches_nothing(monkeypatch, tmp_path):
    """It may come from anybody: a kind of tiktoken's is taken from the cache, or else one line says how to fill it. The
    network is asked where a user has named the kind, and what that brought is there for every later load."""
    asked = []

    def network(url):
        asked.append(url)
        return b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))

    monkeypatch.setattr(tiktoken.load, "read_file", network)
    monkeypatch.setattr(tiktoken.load, "check_hash", lambda *_: True)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    content = {"format": FORMAT, "kind": "cl100k_base", "specials": list(SPECIALS)}
    path = tmp_path / "t.json"
    path.write_text(json.dumps({**content, "fingerprint": fingerprint(content)}))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(UserError, match=r"t.json: .*'cl100k_base'.*--tokenizer cl100k_base") as info:
        Tokenizer.load(path)
    assert not asked and "\n" not in str(info.value)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="could not be fetched"):
        patch.setenv("TIKTOKEN_CACHE_DIR", "/proc/none")  # named by the user; FileNotFoundError, but not of the network
        make_tokenizer("cl100k_base")
    asked.clear()
    make_tokenizer("cl100k_base")
    assert len(asked) == 1
    for known in (tiktoken.registry.ENCODINGS, {}):  # the cache alone knows it
        monkeypatch.setattr(tiktoken.registry, "ENCODINGS", known)
        assert Tokenizer.load(path).encode("ab") == [97, 98]
    assert len(asked) == 1


# ---- tokenizer.json ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_saved_tokenizer_is_the_same(kind, tokenizers, tmp_path, corpus):
    """load(save(t)) has the same ids, size and fingerprint; saving twice gives the same bytes; no temporary file."""
    tokenizer, path = tokenizers[kind], tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = make_tokenizer(str(path))
    assert loaded.encode(corpus) == tokenizer.encode(corpus)
    assert (loaded.vocab_size, loaded.kind, loaded.fingerprint) == (tokenizer.vocab_size, kind, tokenizer.fingerprint)
    before = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["tokenizer.json"]


def test_fingerprint_tells_tokenizers_apart(tokenizers):
    """16 hexadecimal digits; other merges, another alphabet or another kind give others; the same text the same."""
    others = [make_tokenizer("char", "ab"), make_tokenizer("char", "ac"), make_tokenizer("bpe", "abab", 263),
              make_tokenizer("bpe", "acac", 263), make_tokenizer("bpe", "abab", 262), *tokenizers.values()]
    prints = [tokenizer.fingerprint for tokenizer in others]
    assert len(set(prints)) == len(prints)
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)
    assert make_tokenizer("char", ["cb", "ba"]).fingerprint == make_tokenizer("char", "abc").fingerprint


def changed(content: dict, **changes) -> dict:
    """The content of a file with other values and the fingerprint that fits them: only the value itself is wrong."""
    content = {key: value for key, value in (content | changes).items() if value is not ...}
    content.pop("fingerprint", None)
    return content | {"fingerprint": tokenizer_module.fingerprint(content)}


BPE = Tokenizer("bpe", pattern=WORD_PATTERN, merged=["ab", "abc"]).content
CHAR = Tokenizer("char", alphabet="abc").content
BAD_CONTENT = {
    "list": [], "null": None, "number": 3, "text": "byte",
    "no format": changed(BPE, format=...), "other version": changed(BPE, format="llm-from-zero tokenizer, version 2"),
    "no kind": changed(BPE, kind=...), "unknown kind": changed(BPE, kind="gpt5"),
    "kind is a list": changed(BPE, kind=["bpe"]), "kind is a path": changed(CHAR, kind="/etc/passwd"),
    "byte with merges": changed(BPE, kind="byte"),
    "no specials": changed(BPE, specials=...), "other specials": changed(BPE, specials=["<|end|>"]),
    "extra key": changed(BPE, ranks=[]), "no merges": changed(BPE, merged=...),
    "merges null": changed(BPE, merged=None),
    "merges an object": changed(BPE, merged={"ab": 256}), "merge a number": changed(BPE, merged=["ab", 7]),
    "merge of one byte": changed(BPE, merged=["a"]), "empty merge": changed(BPE, merged=[""]),
    "merge beyond latin-1": changed(BPE, merged=["ab", "中文"]),
    "same merge twice": changed(BPE, merged=["ab", "bc", "ab"]),
    "huge merge": changed(BPE, merged=["a" * 1000]), "another pattern": changed(BPE, pattern=r"(a+)+$"),
    "pattern null": changed(BPE, pattern=None), "empty alphabet": changed(CHAR, alphabet=""),
    "alphabet a list": changed(CHAR, alphabet=["a", "b"]), "character twice": changed(CHAR, alphabet="aab"),
    "alphabet unsorted": changed(CHAR, alphabet="ba"), "surrogate": changed(CHAR, alphabet="a\ud800"),
    "fingerprint missing": CHAR, "fingerprint of another": changed(CHAR) | {"fingerprint": "0" * 16},
    "fingerprint a number": changed(CHAR) | {"fingerprint": 1},
}
GOOD_BYTES = json.dumps(changed(CHAR)).encode()
BAD_BYTES = {
    "empty": b"", "truncated": GOOD_BYTES[:-9], "BOM": b"\xef\xbb\xbf" + GOOD_BYTES, "two documents": GOOD_BYTES * 2,
    "not UTF-8": b"\xff\xfe{}", "UTF-16": GOOD_BYTES.decode().encode("utf-16"), "pickle": pickle.dumps(changed(BPE)),
    "NaN": b'{"format": NaN}', "infinity": b'[-Infinity]', "deep": b"[" * 200_000, "huge integer": b"1" * 10_000,
    "same key twice": GOOD_BYTES[:-1] + b', "kind": "char"}', "NUL": b"\0" * 100,
}


@pytest.mark.parametrize("name", [*BAD_CONTENT, *BAD_BYTES])
def test_malformed_file_is_one_clear_line(name, tmp_path):
    """UserError that begins with the path and says what was found and expected; control: the unchanged file loads."""
    path = tmp_path / "bad.json"
    path.write_bytes(BAD_BYTES[name] if name in BAD_BYTES else json.dumps(BAD_CONTENT[name]).encode())
    with pytest.raises(UserError) as info:
        Tokenizer.load(path)
    message = str(info.value)
    assert message.startswith(f"{path}: ") and "found" in message and "expected" in message and "\n" not in message
    path.write_bytes(GOOD_BYTES)
    assert Tokenizer.load(path).vocab_size == 9


def test_unreadable_paths(tmp_path):
    """Missing, a directory, a pipe that nobody writes to, and a file of absurd size, refused before it is read."""
    os.mkfifo(tmp_path / "pipe.json")
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(2**40)  # sparse
    (tmp_path / "folder.json").mkdir()
    for name, message in {"missing.json": "no such file", "folder.json": "no such file", "pipe.json": "no such file",
                          "huge.json": "expected at most"}.items():
        with pytest.raises(UserError, match=message):
            make_tokenizer(str(tmp_path / name))
    with pytest.raises(UserError, match="expected byte, char, bpe"):
        make_tokenizer("gpt7")


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_mutated_files_never_give_a_traceback(kind, tmp_path):
    """400 random mutations of a file, half of them with a fitting fingerprint: a tokenizer that works, or UserError."""
    rng, path = random.Random(5), tmp_path / "t.json"
    text = "abcabc abcd é中"
    make_tokenizer(kind, text, 263).save(path)
    good = path.read_bytes()
    for attempt in range(400):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            i = rng.randrange(len(data))
            new = rng.choice([b"", b'"', b"9", b"[", b"null", b"\\ud800", bytes([rng.randrange(256)])])
            data[i:i + rng.choice([0, 1, 5])] = new
        if attempt % 2:
            try:
                data = json.dumps(changed(json.loads(data))).encode()
            except (ValueError, TypeError):
                pass  # no JSON any more, or no object
        path.write_bytes(bytes(data))
        try:
            loaded = Tokenizer.load(path)
            assert loaded.decode(loaded.encode(text)) == text
        except UserError as error:
            assert "\n" not in str(error)


def test_failed_save_leaves_nothing(tokenizers, tmp_path):
    """A folder in the way: UserError, and no temporary file beside it."""
    (tmp_path / "t.json").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        tokenizers["byte"].save(tmp_path / "t.json")
    assert os.listdir(tmp_path) == ["t.json"]


# ---- command line --------------------------------------------------------------------------------------------------

def test_command_line_trains_and_shows(tmp_path, capsys):
    """--train writes a file of the wanted size, --show prints a line per token; <|endoftext|> lines part documents."""
    book, out = tmp_path / "book.txt", str(tmp_path / "t.json")
    book.write_bytes(("the cat and the hat\r\n<|endoftext|>\r\n" * 30).encode())
    main(["--train", str(book), "--vocab_size", "270", "--out", out])
    assert "270 tokens" in capsys.readouterr().out
    assert make_tokenizer(out).content == make_tokenizer("bpe", ["the cat and the hat\r\n"] * 30, 270).content
    main(["--show", "the 中<|end|>", "--tokenizer", out])
    lines = capsys.readouterr().out.splitlines()
    tokens = make_tokenizer(out).encode("the 中<|end|>")
    assert len(lines) == len(tokens) + 1 and lines[0].endswith("'the'") and "b'\\xe4'" in "".join(lines)
    main(["--show", str(book), "--tokenizer", "byte"])
    assert capsys.readouterr().out.count("'\\r'") == 60


def test_command_line_errors_are_one_line(tmp_path):
    """As a program: exit code 2, one line on stderr, no file left."""
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    program = [sys.executable, tokenizer_module.__file__, "--train", "latin1.txt", "--out", "t.json"]
    result = subprocess.run(program, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "byte 0xe9 at offset 3" in result.stderr
    assert os.listdir(tmp_path) == ["latin1.txt"]
    for argv, message in {(): "nothing to do", ("--train", "missing.txt"): "no such file"}.items():
        with pytest.raises(UserError, match=message):
            main(list(argv))
