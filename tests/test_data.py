"""Text, token files and training batches: what is promised, against plain oracles."""
import gzip
import hashlib
import io
import json
import math
import os
import random
import struct
import subprocess
import sys
import urllib.error
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import tiktoken_ext.openai_public as named
import torch

import data
from data import Windows, eval_windows
from lib import corpora
from lib.corpora import TokenFile, prepare, read_corpus, write_token_file
from lib.program import UserError
from lib.tokenizer import WORD_PATTERN, Tokenizer, make_tokenizer

MANY_SCRIPTS = "One line.\r\nनमस्ते दुनिया\n你好，世界\n😀👩‍👩‍👧 end\n"
BYTES = make_tokenizer("byte")


def fake_tokenizer(vocab_size=60_000, fingerprint="0123456789abcdef"):
    """Ids without a text behind them; the special tokens are the last six ids, as in every tokenizer."""
    return SimpleNamespace(vocab_size=vocab_size, fingerprint=fingerprint, bos_id=vocab_size - 5)


def positions_file(folder, n, bos_at=()) -> TokenFile:
    """Every id is its own position in the file, apart from the bos."""
    ids = np.arange(n)
    ids[list(bos_at)] = fake_tokenizer().bos_id
    write_token_file(folder / "ids.bin", [ids], fake_tokenizer(), n_bytes=n)
    return TokenFile(folder / "ids.bin", fake_tokenizer())


def test_every_form_of_file_gives_the_same_documents(tmp_path):
    """.txt, .json and .jsonl, plain and .gz, with or without a byte order mark, hold the same texts. The
    separator may stand inside a line; CRLF becomes LF."""
    texts = [MANY_SCRIPTS, "second\u2028document <|endoftext|> inside a line\n", "third\n"]
    documents = [MANY_SCRIPTS.replace("\r", ""), *texts[1].split("<|endoftext|>"), "third\n"]
    forms = {
        "a.txt": "<|endoftext|>\n".join(texts),
        "crlf.md": "<|endoftext|>\r\n \n<|endoftext|>\r\n".join(texts) + "<|endoftext|>",
        "a.jsonl": "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + "\n\n",
        "a.json": json.dumps([{"text": text} for text in texts], indent=1),
    }
    for name, content in forms.items():
        for mark in (b"", b"\xef\xbb\xbf"):
            (tmp_path / name).write_bytes(mark + content.encode())
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(mark + content.encode()))
            for path in (tmp_path / name, tmp_path / f"{name}.gz"):
                assert read_corpus(str(path)) == documents


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b" \n\n<|endoftext|>\n ", ["0 used"]),
    ("a.txt", "one\ntwo\nf\xfcr".encode("latin-1"), [":3:", "0xfc", "offset 9", "UTF-8"]),
    ("a.jsonl", b'{"text": "a"}\n{"prompt": "a"}', ["1 left out", "a.jsonl:2", "'prompt'", '"text"']),
    ("a.jsonl", b'broken\n{"text": "a"}', ["1 left out", "a.jsonl:1", "JSON"]),
    ("a.txt", None, ["no such file", ".jsonl"]),
])
def test_bad_text_is_one_clear_line_and_writes_nothing(tmp_path, name, content, words):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        prepare(str(tmp_path / name), tokenizer="byte", cache=tmp_path / "cache")
    assert all(word in str(caught.value) for word in [name, *words]) and "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*"))


def test_stdlib_is_a_few_megabytes_of_readable_english():
    """Letters and spaces make up most of it, common words are as common as in prose, nothing is repeated."""
    documents = read_corpus("stdlib")
    text = "\n".join(documents)
    assert 1.2e6 < len(text) < 6e6 and len(documents) > 300
    assert sum(char.isalpha() or char.isspace() for char in text) / len(text) > 0.85
    words = text.lower().split()
    assert sum(map(words.count, ("the", "a", "of", "to", "is", "and", "in"))) / len(words) > 0.15
    paragraphs = [p for document in documents for p in document.strip().split("\n\n") if len(p) > 40]
    assert len(paragraphs) == len(set(paragraphs))


def test_shakespeare_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    """One request for two tokenizers. No network or another text: what to put where by hand."""
    text = b"First Citizen:\nSpeak, speak.\n"

    def urlopen(url, timeout):
        if answer := answers.pop(0):
            return io.BytesIO(answer)
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(corpora.urllib.request, "urlopen", urlopen)
    answers = [b"", b"<html>Please log in</html>", text]
    for found in ("no network", "sha256"):
        with pytest.raises(UserError, match=f"{found}.*tinyshakespeare/input.txt there as .*speare.txt"):
            prepare("shakespeare", tokenizer="byte", cache=tmp_path)
        assert not list(tmp_path.iterdir())
    for tokenizer in ("byte", "char"):
        prepare("shakespeare", tokenizer=tokenizer, cache=tmp_path)
    assert (tmp_path / "tinyshakespeare.txt").read_bytes() == text


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_prepare_keeps_the_text_the_boundaries_and_the_counts(tmp_path, tokenizer):
    """bos + ids + end per document; the last tenth of the text is validation; counts and note."""
    texts = [MANY_SCRIPTS.replace("\r", "") * 3, "short\n", "the end of the text, the end of the text\n" * 20]
    (tmp_path / "a.txt").write_bytes("<|endoftext|>\n".join(texts).encode())
    *paths, path = prepare(str(tmp_path / "a.txt"), tokenizer=tokenizer, vocab_size=300, cache=tmp_path)
    made, left = Tokenizer.load(path), int(0.9 * len("".join(texts))) - len(texts[0] + texts[1])
    for path, part in zip(paths, ([*texts[:2], texts[2][:left]], [texts[2][left:]])):
        tokens = TokenFile(path, made)
        expected = [i for text in part for i in [made.bos_id, *made.encode(text), made.end_id]]
        text = "".join(part).encode()
        assert tokens.ids.tolist() == expected and tokens.n_targets == len(expected) - len(part)
        assert (tokens.vocab_size, tokens.bos_id, tokens.n_bytes) == (made.vocab_size, made.bos_id, len(text))
        assert hashlib.sha256(text).hexdigest()[:16] in tokens.note and "a.txt" in tokens.note


def test_bpe_learns_from_training_text_and_char_from_all(tmp_path):
    """What only validation repeats is no bpe token; a character that only validation has can be encoded."""
    (tmp_path / "a.txt").write_text("abab" * 250)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "xyxyxy" * 16}))
    for spec, check in (("bpe", lambda made: len(made.encode("ab")) == 1 and len(made.encode("xy")) == 2),
                        ("char", lambda made: made.vocab_size == len("abxy") + 6)):
        train, val, path = prepare(str(tmp_path / "a.txt"), tokenizer=spec, val_fraction=0.0,
                                   val_data=str(tmp_path / "b.jsonl"), cache=tmp_path)
        made = Tokenizer.load(path)
        assert check(made) and made.decode(TokenFile(train).ids[1:-1]) == "abab" * 250
        assert made.decode(TokenFile(val).ids[1:-1]) == "xyxyxy" * 16
    train, val, path = prepare(str(tmp_path / "a.txt"), tokenizer="byte", val_fraction=0.0, cache=tmp_path)
    assert len(TokenFile(train)) == 1002 and len(TokenFile(val)) == 0
    assert "no validation" in json.loads(path.with_name("read.json").read_text())[0]
    with pytest.raises(UserError, match="--val_fraction"):
        prepare(str(tmp_path / "a.txt"), tokenizer="byte", val_fraction=1.0, cache=tmp_path)


def test_second_start_reads_no_text(tmp_path, monkeypatch):
    """The same question finds the folder without opening the text; whatever decides the ids makes another."""
    path, calls, read = tmp_path / "a.txt", [], corpora.read_text
    path.write_text("some text " * 50)
    monkeypatch.setattr(corpora, "read_text", lambda path, *more: calls.append(path) or read(path))

    def folder(**options):
        options = {"tokenizer": "bpe", "vocab_size": 270, "cache": tmp_path / "cache", **options}
        return prepare(str(path), **options)[0].parent
    first = folder()
    assert folder() == first and len(calls) == 1
    changes = [{"vocab_size": 280}, {"val_fraction": 0.2}, {"tokenizer": "byte"}, {"val_data": str(path)}]
    others = [folder(**change) for change in [*changes, {"tokenizer": str(first / "tokenizer.json")}]]
    os.utime(path, ns=(0, 1))
    others.append(folder())
    path.write_text("other text" * 51)
    os.utime(path, ns=(0, 1))
    others.append(folder())
    assert len({first, *others}) == 8


def test_tokenizer_of_a_checkpoint(tmp_path):
    """A path of a tokenizer.json means exactly that tokenizer. What cannot be used writes nothing."""
    (tmp_path / "a.txt").write_text("abcabcabc abcabc")
    *_, made = prepare(str(tmp_path / "a.txt"), tokenizer="char", cache=tmp_path / "one")
    (tmp_path / "b.txt").write_text("cab cab cab")
    train, *_ = prepare(str(tmp_path / "b.txt"), tokenizer=str(made), cache=tmp_path / "two")
    assert len(TokenFile(train, Tokenizer.load(made))) == 11
    (tmp_path / "b.txt").write_text("cab cab More cab")
    for tokenizer, error in ((made, "'M'"), (tmp_path / "x.json", "no such file"), ("gpt7", "expected char")):
        with pytest.raises(UserError, match=error):
            prepare(str(tmp_path / "b.txt"), tokenizer=str(tokenizer), cache=tmp_path / "two")
    assert list((tmp_path / "two").iterdir()) == [train.parent]


@pytest.mark.parametrize("name", ["ours", "gpt2", "cl100k_base", "o200k_base"])
def test_long_texts_are_encoded_in_pieces_without_a_trace(name, monkeypatch):
    """Every pattern splits the pieces of a text as it splits the whole, wherever a piece may end."""
    ranks = dict.fromkeys(range(50256))  # the pattern alone is needed: ranks are downloaded
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(named, loader, lambda *_, **__: ranks)
    pattern = WORD_PATTERN if name == "ours" else named.ENCODING_CONSTRUCTORS[name]()["pat_str"]
    parts = [*"ab1._-/' \n\té你。😀\u00a0\u2028", " ", "  ", "\n\n", "\r\n", "क्", "'s",
             "\x1d"]  # white space to Python, not to Unicode
    draw, cuts = random.Random(1), 0
    for _ in range(200):
        text = "".join(draw.choices(parts, k=60))
        pieces = corpora.pieces(text, size=2)
        assert "".join(pieces) == text and regex.findall(pattern, text) == [
            token for piece in pieces for token in regex.findall(pattern, piece)]
        cuts += len(pieces) - 1
    assert cuts > 200 and len(corpora.pieces("你好。\n" * 9, size=2)) == 9, "without spaces: cut at lines"


@pytest.mark.parametrize("vocab_size, dtype", [(300, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_token_file_round_trip(tmp_path, vocab_size, dtype):
    """Arrays of any integer type become one sequence of the smallest type that holds the vocabulary."""
    arrays = [np.array([vocab_size - 5]), np.array([], np.uint16), [0, vocab_size - 1, 7]]
    write_token_file(tmp_path / "a.bin", iter(arrays), fake_tokenizer(vocab_size), 12345, "x" + "ü" * 200)
    tokens = TokenFile(tmp_path / "a.bin", fake_tokenizer(vocab_size))
    assert tokens.ids.dtype == dtype and tokens.ids.tolist() == [vocab_size - 5, 0, vocab_size - 1, 7]
    assert (len(tokens), tokens.n_targets, tokens.n_bytes, tokens.vocab_size) == (4, 3, 12345, vocab_size)
    assert tokens.fingerprint == "0123456789abcdef" and tokens.note == "x" + "ü" * 93
    with pytest.raises(UserError, match="tokenizer"):
        TokenFile(tmp_path / "a.bin", fake_tokenizer(vocab_size, "f" * 16))


def test_any_damage_to_the_header_or_the_size_is_noticed(tmp_path):
    """Each byte of the header changed, other lengths, other files: one line with the path."""
    path = Path(positions_file(tmp_path, 10).path)
    good = path.read_bytes()
    changed = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1:] for i in range(256)]
    for content in [b"", good[:100], good[:-1], good + b"\0", b"RIFF" + good[4:], *changed]:
        path.write_bytes(content)
        with pytest.raises(UserError, match="ids.bin: found.*expected") as caught:
            TokenFile(path)
        assert "\n" not in str(caught.value)


def test_a_large_file_costs_no_memory(tmp_path):
    """A sparse file of 1 GB opens at once; after 160 random windows no page of it is held any more."""
    path, count = Path(positions_file(tmp_path, 10).path), 5 * 10**8
    head = bytearray(path.read_bytes()[:256])
    head[40:48] = struct.pack("<Q", count)
    path.write_bytes(head[:-4] + struct.pack("<I", zlib.crc32(head[:-4])))
    os.truncate(path, 256 + 2 * count)
    windows = Windows(TokenFile(path), 64, batch_size=32)
    for step in range(5):
        windows.batch(step)
    if os.path.exists("/proc/self/smaps"):
        mapped = open("/proc/self/smaps").read().split("ids.bin\n")[1]
        assert int(regex.search(r"Rss: +(\d+) kB", mapped)[1]) < 1000


def naive_row(tokens, start, seq_len):
    """One row, token by token."""
    piece = tokens.ids[start:start + seq_len + 1].tolist()
    ids, targets, segments, segment = [], [], [], 0
    for i in range(seq_len):
        inside = i < len(piece)
        segment += inside and piece[i] == tokens.bos_id
        ids.append(piece[i] if inside else tokens.pad_id)
        segments.append(segment if inside else -1)
        following = piece[i + 1] if i + 1 < len(piece) else tokens.bos_id
        targets.append(-100 if following == tokens.bos_id else following)
    return ids, targets, segments


@pytest.mark.parametrize("mode", ["random", "sequential"])
@pytest.mark.parametrize("batch_size, world", [(12, 1), (12, 3), (7, 2), (7, 3), (2, 3), (1, 4)])
def test_ranks_share_rows_that_are_slices_of_the_file(tmp_path, mode, batch_size, world):
    """Row r of the global batch is on rank r % world, as counted token by token; sequential rows go through
    the file epoch after epoch. The surplus trains nothing."""
    tokens = positions_file(tmp_path, 200, bos_at=[0, 50, 51, 60, 77, 78, 130, 199])
    windows = Windows(tokens, 9, batch_size=batch_size, mode=mode, seed=3)
    for step in range(20):
        starts = windows.starts(step)
        if mode == "sequential":
            assert starts.tolist() == [(step * batch_size + r) % (199 // 9) * 9 for r in range(batch_size)]
        for rank in range(world):
            batch = windows.batch(step, rank, world)
            assert {(x.dtype, x.shape) for x in batch} == {(torch.int64, (-(-batch_size // world), 9))}
            for row in range(len(batch[0])):
                r = row * world + rank
                start = starts[r] if r < batch_size else len(tokens)
                assert tuple(part[row].tolist() for part in batch) == naive_row(tokens, start, 9)
    with pytest.raises(UserError, match="found 200 tokens, need more than --seq_len 200"):
        Windows(tokens, 200, batch_size=1)


def philox4x64_10(counter, key):
    """Salmon et al. 2011, section 4.3 and figure 3, in plain integers: four random numbers of 64 bits."""
    low = (1 << 64) - 1
    for i in range(10):
        a, b = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        k, m = (key[0] + i * 0x9E3779B97F4A7C15) & low, (key[1] + i * 0xBB67AE8584CAA73B) & low
        counter = [b >> 64 ^ counter[1] ^ k, b & low, a >> 64 ^ counter[3] ^ m, a & low]
    return counter


def test_random_windows_follow_the_paper(tmp_path):
    """An independent Philox gives the same windows, on every machine and for ever."""
    windows = Windows(positions_file(tmp_path, 50_000), 64, batch_size=10, seed=7)
    for step in (0, 1, 123_456):
        bits = [number for block in range(1, 4) for number in philox4x64_10([block, step, 0, 0], [7, 0])]
        assert windows.starts(step).tolist() == [number % (50_000 - 64) for number in bits[:10]]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n, seq_len, batch_size", [
    (200, 8, 4), (201, 8, 4), (202, 8, 64), (2, 8, 4), (9, 8, 1), (1000, 7, 5), (3, 1, 1)])
def test_eval_windows_hold_every_target_once(tmp_path, n, seq_len, batch_size, world):
    """Over all ranks each id but the bos is a target once, after its own predecessor; equal shapes and
    counts; of the first rows alone (max_rows) exactly their targets."""
    bos_at = [i for i in (0, 17, 18, 170, 199) if i < n - 1]
    tokens = positions_file(tmp_path, n, bos_at)
    for max_rows in (0, 2, 1000):
        ranks = [list(eval_windows(tokens, seq_len, batch_size, r, world, max_rows)) for r in range(world)]
        (rows, width), = {part.shape for batches in ranks for batch in batches for part in batch}
        windows = min(math.ceil((n - 1) / seq_len), max_rows or n)
        assert rows <= batch_size and width == seq_len
        assert {len(batches) for batches in ranks} == {math.ceil(windows / (batch_size * world))}
        assert rows * world * len(ranks[0]) < windows + world * len(ranks[0]), "more padding than needed"
        seen = []
        for ids, targets, segment_ids in (batch for batches in ranks for batch in batches):
            trained = targets != -100
            seen += targets[trained].tolist()
            assert ((ids[trained] == targets[trained] - 1) | (ids[trained] == tokens.bos_id)).all()
            assert ((segment_ids < 0) == (ids == tokens.pad_id)).all() and not trained[segment_ids < 0].any()
        assert sorted(seen) == [i for i in range(1, min(n, windows * seq_len + 1)) if i not in bos_at]


DIALOGUE = [{"role": role, "content": content} for role, content in (
    ("system", "S"), ("user", "ab"), ("assistant", "cd"), ("user", "e"), ("assistant", "你"))]


def test_command_shows_what_training_reads(tmp_path, capsys, monkeypatch):
    """A window: token | target | segment; a chat: token | target | trained?"""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("ab" * 20 + "\n<|endoftext|>\n" + "cd" * 20)
    data.main(["--data", "a.txt", "--tokenizer", "char", "--show"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 64 and "'<|end|>'" in {row.split()[0] for row in rows} and rows[-1][-1] in "12"
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": DIALOGUE[1:3]}))
    data.main(["--show", "--stage", "sft", "--data", "a.jsonl"])
    template, *rows = capsys.readouterr().out.splitlines()
    assert template == f"chat template: {data.CHAT_TEMPLATE}"
    trained = [["'c'", "trained"], ["'d'", "trained"], ["'<|end|>'", "trained"]]
    assert [row.split()[1:] for row in rows] == [["-"]] * 5 + trained + [["-"]]
    result = subprocess.run([sys.executable, data.__file__, "--data", "none.txt"], capture_output=True)
    assert result.returncode == 2 and result.stdout == b"" and result.stderr.count(b"\n") == 1
