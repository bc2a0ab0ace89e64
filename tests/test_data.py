"""Text, token files and pretraining batches: what data.py promises, each against a plain oracle."""
import base64
import gzip
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import struct
import subprocess
import sys
import time
import urllib.error
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import torch

import data
from data import Windows, eval_windows
from lib import corpora as corpus
from lib.corpora import TokenFile, prepare, read_corpus, read_documents, write_token_file
from lib.program import UserError
from lib.tokenizer import Tokenizer, make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
MANY_SCRIPTS = "One line.\r\nनमस्ते दुनिया\n你好，世界\n😀👩‍👩‍👧 end\n"


def fake_tokenizer(vocab_size=60_000, fingerprint="0123456789abcdef"):
    """Ids without a text behind them; the special tokens are the last six ids, as in every tokenizer."""
    return SimpleNamespace(vocab_size=vocab_size, fingerprint=fingerprint, bos_id=vocab_size - 5, end_id=vocab_size - 1)


def token_file(folder, ids, tokenizer=None) -> TokenFile:
    tokenizer = tokenizer or fake_tokenizer()
    write_token_file(folder / "ids.bin", [np.asarray(ids)], tokenizer, n_bytes=len(ids))
    return TokenFile(folder / "ids.bin", tokenizer)


def positions_file(folder, n, bos_at=()) -> TokenFile:
    """Every id is its own position in the file, apart from the bos."""
    ids = np.arange(n)
    ids[list(bos_at)] = fake_tokenizer().bos_id
    return token_file(folder, ids)


def files_under(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file()) if Path(folder).exists() else []


# ---- reading ------------------------------------------------------------------------------------------------------

def test_every_form_of_file_gives_the_same_documents(tmp_path):
    """.txt, .json and .jsonl, plain and .gz, with or without a byte order mark, hold the same texts, byte for byte."""
    texts = [MANY_SCRIPTS, "second\u2028document <|endoftext|> inside a line\n", "third\n"]
    lines = "\n".join(json.dumps({"text": text, "other": 1}, ensure_ascii=False) for text in texts)
    forms = {
        "a.txt": "<|endoftext|>\n".join(texts),
        "crlf.txt": "<|endoftext|>\r\n".join(texts) + "<|endoftext|>",
        "a.jsonl": lines + "\n\n",
        "a.json": json.dumps([{"text": text} for text in texts], indent=1),
    }
    for name, content in forms.items():
        for mark in (b"", b"\xef\xbb\xbf"):
            (tmp_path / name).write_bytes(mark + content.encode())
            (tmp_path / (name + ".gz")).write_bytes(gzip.compress(mark + content.encode()))
            assert read_corpus(str(tmp_path / name)) == texts
            assert read_corpus(str(tmp_path / (name + ".gz"))) == texts


def test_blank_documents_are_dropped_and_a_separator_needs_its_own_line(tmp_path):
    (tmp_path / "a.txt").write_text("<|endoftext|>\n \n<|endoftext|>\none <|endoftext|>\n<|endoftext|>x\n<|endoftext|>")
    assert read_corpus(str(tmp_path / "a.txt")) == ["one <|endoftext|>\n<|endoftext|>x\n"]


BAD_FILES = {
    "empty": ("a.txt", b"", ["no text"]),
    "blank": ("a.txt", b" \n\n<|endoftext|>\n ", ["no text"]),
    "only a mark": ("a.txt", b"\xef\xbb\xbf", ["no text"]),
    "latin-1": ("a.txt", "eins\nzwei\ndrei für vier".encode("latin-1"), ["a.txt:3:", "0xfc", "offset 16", "UTF-8"]),
    "cut character": ("a.txt", "x\n你".encode()[:-1], ["a.txt:2:", "0xe4", "offset 2", "UTF-8"]),
    "utf-16": ("a.txt", "hello".encode("utf-16"), ["a.txt:1:", "0xff", "offset 0"]),
    "utf-16 json": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), ["a.jsonl:1:", "UTF-8"]),
    "cut gzip": ("a.txt.gz", gzip.compress(os.urandom(5000))[:-100], ["a.txt.gz", "ended"]),
    "no gzip": ("a.txt.gz", b"plain text", ["a.txt.gz", "gzip"]),
    "broken gzip": ("a.txt.gz", gzip.compress(b"text")[:10] + b"\xff" * 40, ["a.txt.gz"]),
    "latin-1 in gzip": ("a.txt.gz", gzip.compress(b"one\n\xfc"), ["a.txt.gz:2:", "offset 4"]),
    "unknown ending": ("a.pdf", b"%PDF", ["'.pdf'", ".txt"]),
    "no ending": ("book", b"text", ["''", ".txt"]),
    "half a line of json": ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', ["a.jsonl:3:", "end of the text", "JSON"]),
    "not json": ("a.jsonl", b'{"text": "a"}\nhello you', ["a.jsonl:2:", "'hello you'"]),
    "json error in line 3": ("a.json", b'[\n{"text": "a"},\n{"text" "b"}]', ["a.json:3:", '"b"']),
    "lines in .json": ("a.json", b'{"text": "a"}\n{"text": "b"}', ["a.json:2:", "Extra data"]),
    "one object": ("a.json", b'{"text": "a"}', ["a.json:1:", "dict", "array"]),
    "no records": ("a.json", b"[]", ["no text"]),
    "a list as record": ("a.jsonl", b'{"text": "a"}\n["a"]', ["a.jsonl:2:", "list", "record"]),
    "a number as record": ("a.json", b'[{"text": "a"}, 7]', ["a.json:1:", "int", "record"]),
    "other keys": ("a.jsonl", b'{"text": "a"}\n{"prompt": "a"}', ["a.jsonl:2:", "'prompt'", '"text"']),
    "text is null": ("a.jsonl", b'{"text": null}', ["a.jsonl:1", "NoneType", "string"]),
    "half a character": ("a.jsonl", b'{"text": "ok"}\n{"text": "ab\\ud83d"}', ["a.jsonl:2", "\\ud83d", "at 2"]),
    "half a character in an array": ("a.json", b'[{"text": "\\udc00"}]', ["a.json:1", "\\udc00"]),
    "too deep": ("a.json", b"[" * 200_000, ["a.json:1:"]),
    "one character": ("a.txt", b"x", ["too little text", "--val_fraction"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_clear_line_and_writes_nothing(tmp_path, case):
    """The message names the file, the line where there is one, what was found and what was expected."""
    name, content, words = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        prepare(str(tmp_path / name), tokenizer="byte", cache=tmp_path / "cache")
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in [name, *words]), message
    assert not files_under(tmp_path / "cache")


@pytest.mark.parametrize("make, words", [
    (lambda path: None, ["no such file", "stdlib"]),
    (lambda path: path.mkdir(), ["folder", "a file"]),
    (lambda path: os.mkfifo(path), ["no such file"]),  # opening it would wait for ever
])
def test_what_is_not_a_file_is_refused(tmp_path, make, words):
    make(tmp_path / "a.txt")
    with pytest.raises(UserError) as caught:
        prepare(str(tmp_path / "a.txt"), tokenizer="byte", cache=tmp_path / "cache")
    assert all(word in str(caught.value) for word in words)
    assert not files_under(tmp_path / "cache")


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1.5])
def test_val_fraction_outside_0_to_1_is_refused_unless_val_data_is_given(tmp_path, fraction):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(UserError, match="--val_fraction"):
        prepare(str(tmp_path / "a.txt"), tokenizer="byte", val_fraction=fraction, cache=tmp_path / "cache")
    prepare(str(tmp_path / "a.txt"), tokenizer="byte", val_fraction=fraction, val_data=str(tmp_path / "a.txt"),
            cache=tmp_path / "cache")


# ---- corpora by name ----------------------------------------------------------------------------------------------

def test_stdlib_is_a_few_megabytes_of_readable_english():
    """Letters and spaces make up most of it, and the commonest English words are about as common as in prose."""
    documents = read_corpus("stdlib")
    text = "\n".join(documents)
    assert 1.2e6 < len(text) < 6e6 and len(documents) > 300
    assert sum(char.isalpha() or char.isspace() for char in text) / len(text) > 0.85
    words = text.lower().split()
    assert sum(word in ("the", "a", "of", "to", "is", "and", "in") for word in words) / len(words) > 0.15
    assert any("Truth Value Testing" in document for document in documents), "the pydoc topics are missing"
    paragraphs = [p for document in documents for p in document.strip().split("\n\n") if len(p) > 40]
    assert len(paragraphs) == len(set(paragraphs))


def test_stdlib_rules_on_a_small_tree(tmp_path, monkeypatch):
    """Docstrings in source order, cleaned, not repeated; topics apart; no tests, no broken files; nothing is run."""
    long = "This paragraph has more than forty characters in it."
    sources = {
        "one.py": f'"""Module one.\n\n    {long}\n    """\nraise SystemExit("imported")\n'
                  'class A:\n    """Class A."""\n    def method(self):\n'
                  '        r"""Do \\d.\n\n        More.\n        """\ndef last():\n    "Last."\n',
        "two.py": f'def f():\n    """Again.\n\n    {long}\n    """\nasync def g():\n    """Async."""\n',
        "old.py": 'print "python 2"\n',
        "silent.py": "x = 1\n",
        "test/x.py": '"""A test."""', "pkg/tests/x.py": '"""A test."""', "site-packages/x.py": '"""Foreign."""',
        "pydoc_data/topics.py": "topics = {'if': 'About if.\\n', 'else': 'About else.\\n'}\n",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    (tmp_path / "link.py").symlink_to("nowhere.py")
    monkeypatch.setattr(corpus, "STDLIB", tmp_path)
    documents = read_corpus("stdlib")
    assert sorted(documents) == [
        "About else.\n", "About if.\n", "Again.\n\nAsync.\n",
        f"Module one.\n\n{long}\n\nClass A.\n\nDo \\d.\n\nMore.\n\nLast.\n"]
    assert documents == read_corpus("stdlib")
    in_order = ["Module", "About if", "About else", "Again"]
    assert not all(document.startswith(start) for document, start in zip(documents, in_order)), "not shuffled"


def test_stdlib_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "STDLIB", tmp_path / "python.zip")
    with pytest.raises(UserError, match="stdlib: found no text"):
        prepare("stdlib", tokenizer="byte", cache=tmp_path / "cache")


def test_shakespeare_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    """One request for any number of tokenizers; the file placed by hand serves as well; another text is refused."""
    text, requests = b"First Citizen:\nSpeak, speak.\n", []
    monkeypatch.setattr(corpus, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(corpus.urllib.request, "urlopen", lambda url, timeout: requests.append(url) or io.BytesIO(text))
    for tokenizer in ("byte", "char", "byte"):
        prepare("shakespeare", tokenizer=tokenizer, cache=tmp_path)
    assert len(requests) == 1 and (tmp_path / "tinyshakespeare.txt").read_bytes() == text
    assert b"tinyshakespeare/input.txt" in requests[0].encode()
    by_hand = tmp_path / "by hand"
    by_hand.mkdir()
    (by_hand / "tinyshakespeare.txt").write_bytes(text[:-1])
    with pytest.raises(UserError, match="sha256.*by hand"):
        prepare("shakespeare", tokenizer="byte", cache=by_hand)
    (by_hand / "tinyshakespeare.txt").write_bytes(text)
    prepare("shakespeare", tokenizer="byte", cache=by_hand)
    assert len(requests) == 1


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), TimeoutError("timed out"),
                                   corpus.http.client.IncompleteRead(b"")])
def test_shakespeare_without_network_says_where_to_put_the_file(tmp_path, monkeypatch, error):
    def urlopen(url, timeout):
        raise error
    monkeypatch.setattr(corpus.urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError) as caught:
        prepare("shakespeare", tokenizer="char", cache=tmp_path / "cache")
    assert corpus.SHAKESPEARE_URL in str(caught.value) and "cache/tinyshakespeare.txt" in str(caught.value)
    assert not files_under(tmp_path)


def test_shakespeare_download_of_something_else_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.urllib.request, "urlopen",
                        lambda url, timeout: io.BytesIO(b"<html>Please log in</html>"))
    with pytest.raises(UserError, match="sha256"):
        prepare("shakespeare", tokenizer="char", cache=tmp_path)
    assert not files_under(tmp_path)


# ---- preparing ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.999])
def test_validation_is_the_last_part_of_the_characters(fraction):
    """Nothing is lost or moved, and the cut is where the fraction says, inside a document if need be."""
    documents = ["a" * 7, "b", "c" * 30, "d" * 11]
    train, val = corpus.split_documents(documents, fraction)
    assert "".join(train + val) == "".join(documents) and all(train + val)
    assert len("".join(train)) == int(49 * (1 - fraction))
    whole = [document for document in train + val if document in documents]
    assert len(whole) >= 3, "more than one document was cut"


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_prepare_keeps_the_text_the_boundaries_and_the_counts(tmp_path, tokenizer):
    """bos + ids + end per document; decoded, the two files are the text; bytes and targets are those of the oracle."""
    texts = [MANY_SCRIPTS * 3, "short", "the end of the text, the end of the text\n" * 20]
    (tmp_path / "a.txt").write_bytes("\n<|endoftext|>\n".join(texts).encode())
    documents = read_documents(tmp_path / "a.txt")
    train_path, val_path, tokenizer_path = prepare(str(tmp_path / "a.txt"), tokenizer=tokenizer, vocab_size=300,
                                                   cache=tmp_path / "cache")
    made = Tokenizer.load(tokenizer_path)
    for path, part in zip((train_path, val_path), corpus.split_documents(documents, 0.1)):
        tokens = TokenFile(path, made)
        expected = [i for text in part for i in [made.bos_id, *made.encode(text), made.end_id]]
        assert tokens.ids.tolist() == expected
        assert made.decode([i for i in tokens.ids if i not in (made.bos_id, made.end_id)]) == "".join(part)
        assert tokens.n_bytes == len("".join(part).encode())
        assert tokens.n_targets == len(expected) - len(part)
        assert (tokens.vocab_size, tokens.bos_id, tokens.pad_id) == (made.vocab_size, made.bos_id, made.pad_id)
        assert hashlib.sha256("".join(part).encode()).hexdigest()[:16] in tokens.note and "a.txt" in tokens.note


def test_bpe_learns_from_training_text_and_char_from_all(tmp_path):
    """A string that only validation repeats is no bpe token; a character that only validation has can be encoded."""
    (tmp_path / "a.txt").write_text("abab" * 250 + "\nxyxyxy" * 16)
    *_, path = prepare(str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=300, cache=tmp_path / "cache")
    made = Tokenizer.load(path)
    assert len(made.encode("ab")) == 1 and len(made.encode("xy")) == 2
    *_, path = prepare(str(tmp_path / "a.txt"), tokenizer="char", cache=tmp_path / "cache")
    assert Tokenizer.load(path).vocab_size == len("\nabxy") + 6


def test_val_data_leaves_the_data_whole(tmp_path):
    (tmp_path / "a.txt").write_text("training text")
    (tmp_path / "b.jsonl").write_text('{"text": "validation: ä"}')
    train, val, path = prepare(str(tmp_path / "a.txt"), val_data=str(tmp_path / "b.jsonl"), tokenizer="char",
                               cache=tmp_path)
    made = Tokenizer.load(path)
    assert made.decode(TokenFile(train).ids[1:-1]) == "training text"
    assert made.decode(TokenFile(val).ids[1:-1]) == "validation: ä"


def test_second_start_reads_no_text(tmp_path, monkeypatch):
    """The same question finds the folder without opening the text; whatever decides the ids makes another one."""
    path = tmp_path / "a.txt"
    path.write_text("some text " * 50)
    calls = []
    read = corpus.read_text
    monkeypatch.setattr(corpus, "read_text", lambda path: calls.append(path) or read(path))

    def folder(**options):
        options = {"tokenizer": "bpe", "vocab_size": 270, "cache": tmp_path / "cache", **options}
        return prepare(str(path), **options)[0].parent

    first = folder()
    assert folder() == first and len(calls) == 1
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        folder()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02
    others = [folder(vocab_size=280), folder(val_fraction=0.2), folder(tokenizer="byte"), folder(val_data=str(path)),
              folder(tokenizer=str(first / "tokenizer.json"))]
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    others.append(folder())
    path.write_text("other text" * 51)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    others.append(folder())
    assert len({first, *others}) == 8


def test_stdlib_of_another_python_is_prepared_again(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "stdlib_documents", lambda: ["some English text"])
    paths = prepare("stdlib", tokenizer="byte", cache=tmp_path)
    assert f"Python {sys.version.split()[0]}" in TokenFile(paths[0]).note
    assert prepare("stdlib", tokenizer="byte", cache=tmp_path) == paths
    monkeypatch.setattr(corpus.sys, "version", "3.99.0 (other)")
    assert prepare("stdlib", tokenizer="byte", cache=tmp_path) != paths


def test_tokenizer_of_a_checkpoint(tmp_path):
    """The path of a tokenizer.json means exactly that tokenizer; a character outside its alphabet writes nothing."""
    (tmp_path / "a.txt").write_text("abcabcabc abcabc")
    *_, made = prepare(str(tmp_path / "a.txt"), tokenizer="char", cache=tmp_path / "one")
    (tmp_path / "b.txt").write_text("cab cab cab")
    train, _, copy = prepare(str(tmp_path / "b.txt"), tokenizer=str(made), cache=tmp_path / "two")
    assert TokenFile(train, Tokenizer.load(made)).fingerprint == Tokenizer.load(copy).fingerprint
    *_, other = prepare(str(tmp_path / "b.txt"), tokenizer="byte", cache=tmp_path / "one")
    path = tmp_path / "tokenizer.json"
    path.write_bytes(made.read_bytes())
    assert prepare(str(tmp_path / "b.txt"), tokenizer=str(path), cache=tmp_path / "two")[0] == train
    path.write_bytes(other.read_bytes())
    assert prepare(str(tmp_path / "b.txt"), tokenizer=str(path), cache=tmp_path / "two")[0] != train
    (tmp_path / "b.txt").write_text("cab cab cab, but new")
    before = files_under(tmp_path / "two")
    with pytest.raises(UserError, match="','"):
        prepare(str(tmp_path / "b.txt"), tokenizer=str(made), cache=tmp_path / "two")
    assert files_under(tmp_path / "two") == before and len(list((tmp_path / "two").iterdir())) == 2


@pytest.mark.parametrize("tokenizer", ["none.json", "wordpiece", "broken.json", "."])
def test_unusable_tokenizer_writes_nothing(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "broken.json").write_text('{"kind": ')
    with pytest.raises(UserError):
        prepare("a.txt", tokenizer=tokenizer, cache="cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("fails", ["fsync", "rename"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, fails):
    def full(*_):
        raise OSError(28, "No space left on device")
    (tmp_path / "a.txt").write_text("some text")
    monkeypatch.setattr(corpus.os, "fsync" if fails == "fsync" else "replace", full)
    with pytest.raises(UserError, match="No space left"):
        prepare(str(tmp_path / "a.txt"), tokenizer="byte", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        prepare(str(tmp_path / "a.txt"), tokenizer="byte", cache=tmp_path / "cache")


def test_processes_that_prepare_at_once_end_with_one_good_folder(tmp_path):
    """All have missed the cache before the first writes; all return the same whole files; nothing else is left."""
    (tmp_path / "a.txt").write_text(MANY_SCRIPTS * 2000)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()

    def work():
        original = data.make_tokenizer

        def wait(*arguments):
            barrier.wait(30)
            return original(*arguments)
        data.make_tokenizer = wait
        paths = prepare(str(tmp_path / "a.txt"), tokenizer="char", cache=tmp_path / "cache")
        made = Tokenizer.load(paths[2])
        results.put((paths, [len(TokenFile(path, made)) for path in paths[:2]]))

    processes = [context.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    got = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert got == [got[0]] * 4
    assert [path.name for path in files_under(tmp_path / "cache")] == ["tokenizer.json", "train.bin", "val.bin"]


def random_texts(n, seed=1):
    parts = [*"ab1._-/' ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "é", "你", "。", "क्", "😀", "\u00a0", "\u2028", "'s",
             "\x1d"]  # white space to Python, not to Unicode
    draw = random.Random(seed)
    return ["".join(draw.choices(parts, k=60)) for _ in range(n)]


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_long_texts_are_encoded_in_pieces_without_a_trace(kind):
    """The ids of the pieces, one after the other, are the ids of the whole, wherever a piece may end."""
    texts = random_texts(300)
    made = make_tokenizer(kind, texts, 500)
    cuts = 0
    for text in texts:
        parts = list(corpus.pieces(text, size=2))
        assert "".join(parts) == text
        assert [i for part in parts for i in made.encode(part)] == made.encode(text)
        cuts += len(parts) - 1
    assert cuts > 300
    assert len(list(corpus.pieces("你好。\n" * 9, size=2))) == 9, "a script without spaces is cut at its lines"


def test_a_named_encoding_is_fetched_again_where_its_files_are_found_made(tmp_path, monkeypatch):
    """The second start finds token files and tokenizer.json, but tiktoken's cache has been emptied. The user has named
    the encoding, so it may be fetched; the tokenizer.json alone could not."""
    asked = []
    ranks_file = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (tmp_path / "text.txt").write_text("a b c d e f g")
    monkeypatch.setattr("tiktoken.load.check_hash", lambda *_: True)
    monkeypatch.setattr("tiktoken.load.read_file", lambda url: asked.append(url) or ranks_file)
    for start in ("1", "2"):
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / start))
        monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
        *_, path = prepare(str(tmp_path / "text.txt"), tokenizer="cl100k_base", val_fraction=0.3, cache=str(tmp_path))
        assert Tokenizer.load(path).kind == "cl100k_base" and len(asked) == int(start)


def test_pieces_hold_for_the_patterns_of_tiktoken(monkeypatch):
    """Each named encoding splits the pieces as it splits the whole (its pattern alone: the ranks need a download)."""
    import tiktoken_ext.openai_public as named
    monkeypatch.setattr(named, "load_tiktoken_bpe", lambda *_, **__: {})
    monkeypatch.setattr(named, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: dict.fromkeys(range(50256)))
    patterns = {constructor()["pat_str"] for name, constructor in named.ENCODING_CONSTRUCTORS.items()
                if name != "p50k_edit"}
    assert len(patterns) >= 3
    for pattern in map(regex.compile, patterns):
        for text in random_texts(300):
            whole = [match.group() for match in pattern.finditer(text)]
            split = [match.group() for part in corpus.pieces(text, size=2) for match in pattern.finditer(part)]
            assert split == whole


# ---- token files --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("vocab_size, dtype", [
    (300, "uint16"), (65536, "uint16"), (65537, "uint32"), (200_000, "uint32")])
def test_token_file_round_trip(tmp_path, vocab_size, dtype):
    """Arrays of any integer type and length become one sequence of the smallest type that holds the vocabulary."""
    arrays = [np.array([vocab_size - 5]), np.array([], np.uint16), np.array([0, vocab_size - 1, 7], np.uint32)]
    write_token_file(tmp_path / "a.bin", iter(arrays), fake_tokenizer(vocab_size), n_bytes=12345, note="x" + "ü" * 200)
    tokens = TokenFile(tmp_path / "a.bin", fake_tokenizer(vocab_size))
    assert tokens.ids.dtype == dtype and tokens.ids.tolist() == [vocab_size - 5, 0, vocab_size - 1, 7]
    assert (len(tokens), tokens.n_targets, tokens.n_bytes, tokens.vocab_size) == (4, 3, 12345, vocab_size)
    assert tokens.fingerprint == "0123456789abcdef" and tokens.note == "x" + "ü" * 93
    with pytest.raises(ValueError):
        tokens.ids[0] = 1  # read-only


FIELDS = ["magic", "version", "width", "vocab_size", "fingerprint", "count", "n_targets", "n_bytes", "note"]


def change_header(path, resealed=False, **changes):
    """Overwrite fields of the header; resealed: with a checksum that fits, as a wrong writer would leave it."""
    content = bytearray(path.read_bytes())
    fields = dict(zip([*FIELDS, "crc"], corpus.HEADER.unpack(content[:corpus.HEADER.size])))
    head = corpus.HEADER.pack(*{**fields, **changes}.values())
    content[:len(head)] = head[:-4] + struct.pack("<I", zlib.crc32(head[:-4])) if resealed else head
    path.write_bytes(content)


@pytest.mark.parametrize("field, value, word", [
    ("magic", b"RIFFWAVE", "RIFFWAVE"), ("version", 2, "version 2"), ("width", 4, "checksum"),
    ("vocab_size", 99, "checksum"), ("fingerprint", b"f" * 16, "checksum"), ("count", 9, "checksum"),
    ("n_targets", 9, "checksum"), ("n_bytes", 9, "checksum"), ("note", b"x", "checksum"), ("crc", 9, "checksum")])
def test_any_changed_header_field_is_noticed(tmp_path, field, value, word):
    path = Path(token_file(tmp_path, range(10)).path)
    change_header(path, **{field: value})
    with pytest.raises(UserError) as caught:
        TokenFile(path)
    assert word in str(caught.value) and "ids.bin" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("field, value, word", [
    ("width", 3, "3 bytes"), ("width", 0, "0 bytes"), ("width", 4, "expected 296"),
    ("vocab_size", 70_000, "70000"), ("vocab_size", 6, "for 6 tokens"),
    ("count", 9, "expected 274"), ("count", 11, "expected 278"), ("count", 0, "0 ids"), ("count", 1, "1 ids"),
    ("count", 1 << 60, "expected"), ("count", (1 << 64) - 1, "expected"),
    ("n_bytes", 0, "0 bytes of text"), ("n_targets", 0, "0 to predict"), ("n_targets", 11, "11 to predict")])
def test_header_that_does_not_fit_the_file_is_refused(tmp_path, field, value, word):
    """Also when its checksum is right: sizes are compared before anything is mapped."""
    path = Path(token_file(tmp_path, range(10)).path)
    change_header(path, resealed=True, **{field: value})
    with pytest.raises(UserError) as caught:
        TokenFile(path)
    assert word in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 100, 255, 256, 257, 275, 277])
def test_token_file_of_another_length_is_refused(tmp_path, size):
    path = Path(token_file(tmp_path, range(10)).path)
    assert path.stat().st_size == 276
    path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))
    with pytest.raises(UserError, match="ids.bin"):
        TokenFile(path)


def test_token_file_missing_or_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")  # opening it would wait for ever
    for name, found in (("none.bin", "found no such file"), ("", "it is a folder"), ("pipe.bin", "found no such file")):
        with pytest.raises(UserError, match=f"cannot be read: {found}"):
            TokenFile(tmp_path / name)


@pytest.mark.parametrize("other", [dict(vocab_size=60_001), dict(fingerprint="f" * 16)])
def test_token_file_of_another_tokenizer_is_refused(tmp_path, other):
    tokens = token_file(tmp_path, range(10))
    with pytest.raises(UserError, match="tokenizer"):
        TokenFile(tokens.path, fake_tokenizer(**other))


@pytest.mark.parametrize("place", [0, 3, 5, 15, 19])
def test_ids_outside_the_vocabulary_are_refused_when_read(tmp_path, place):
    """Only the windows read are looked at, targets included; a good window of a damaged file is given out."""
    ids = np.arange(20)
    ids[place] = 60_000
    tokens = token_file(tmp_path, ids)
    windows = Windows(tokens, 5, batch_size=1, mode="sequential")
    for step in range(3):
        if 5 * step <= place <= 5 * step + 5:
            with pytest.raises(UserError, match="found id 60000, expected less than 60000"):
                windows.batch(step)
        else:
            windows.batch(step)
    with pytest.raises(UserError, match="60000"):
        list(eval_windows(tokens, 5, 2))


def test_writing_is_all_or_nothing(tmp_path):
    """A generator that fails midway leaves the old file as it was and no other."""
    before = Path(token_file(tmp_path, range(10)).path).read_bytes()

    def arrays():
        yield np.arange(5)
        raise UserError("bad text")
    with pytest.raises(UserError, match="bad text"):
        write_token_file(tmp_path / "ids.bin", arrays(), fake_tokenizer(), 5)
    assert files_under(tmp_path) == [tmp_path / "ids.bin"] and (tmp_path / "ids.bin").read_bytes() == before


def test_ten_gigabytes_cost_little_memory_and_time(tmp_path):
    """A sparse file of 10 GB opens at once; after 320 random windows no page of it is held any more."""
    token_file(tmp_path, range(10))
    count = 5 * 10**9
    change_header(tmp_path / "ids.bin", resealed=True, count=count)
    os.truncate(tmp_path / "ids.bin", corpus.HEADER.size + 2 * count)
    program = """
import os, re, resource, sys, time
from lib.corpora import TokenFile
from data import Windows
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
Windows(TokenFile(sys.argv[2]), 8, batch_size=2).batch(0)  # what numpy and torch need for themselves
before, start = peak(), time.perf_counter()
windows = Windows(TokenFile(sys.argv[1]), 64, batch_size=32)
windows.batch(0)
seconds = time.perf_counter() - start
for step in range(10):
    windows.batch(step)
held = 0.0
if os.path.exists("/proc/self/smaps"):
    held = int(re.search(r"big/ids.bin\\n(?:.*\\n)*?Rss: +(\\d+) kB", open("/proc/self/smaps").read())[1]) / 1024
print(peak() - before, seconds, held)
"""
    (tmp_path / "small").mkdir()
    (tmp_path / "big").mkdir()
    os.rename(tmp_path / "ids.bin", tmp_path / "big/ids.bin")
    small = token_file(tmp_path / "small", range(100))
    output = subprocess.run([sys.executable, "-c", program, tmp_path / "big/ids.bin", small.path], cwd=ROOT, check=True,
                            capture_output=True, text=True, timeout=120).stdout
    grown, seconds, held = map(float, output.split())
    assert grown < 100 and seconds < 1 and held < 1, output


# ---- pretraining batches ------------------------------------------------------------------------------------------

def naive_rows(tokens, start, seq_len):
    """One row, token by token."""
    piece = tokens.ids[start:start + seq_len + 1].tolist()
    ids, targets, segments, segment = [], [], [], 0
    for i in range(seq_len):
        if i < len(piece):
            segment += piece[i] == tokens.bos_id
        ids.append(piece[i] if i < len(piece) else tokens.pad_id)
        segments.append(segment if i < len(piece) else -1)
        following = piece[i + 1] if i + 1 < len(piece) else tokens.bos_id
        targets.append(-100 if following == tokens.bos_id else following)
    return ids, targets, segments


@pytest.mark.parametrize("mode", ["random", "sequential"])
def test_rows_are_slices_of_the_file(tmp_path, mode):
    """ids, targets (one further, a bos masked) and segment ids (bos so far) as counted token by token; all int64."""
    tokens = positions_file(tmp_path, 200, bos_at=[0, 50, 51, 60, 77, 78, 130, 199])
    windows = Windows(tokens, 9, batch_size=16, mode=mode)
    for step in range(20):
        batch = windows.batch(step)
        assert all(part.dtype == torch.int64 and part.shape == (16, 9) and part.is_contiguous() for part in batch)
        for row, start in enumerate(windows.starts(step).tolist()):
            assert tuple(part[row].tolist() for part in batch) == naive_rows(tokens, start, 9)


@pytest.mark.parametrize("mode", ["random", "sequential"])
@pytest.mark.parametrize("batch_size, world", [(12, 1), (12, 2), (12, 3), (7, 2), (7, 3), (2, 3), (1, 4)])
def test_ranks_share_one_global_batch(tmp_path, mode, batch_size, world):
    """Row r of the global batch is on rank r % world; every rank has equally many rows; the surplus trains nothing."""
    tokens = positions_file(tmp_path, 500, bos_at=[0, 100])
    windows = [Windows(tokens, 8, batch_size=batch_size, mode=mode, seed=3) for _ in range(world)]
    for step in (0, 1, 29):
        whole = windows[0].batch(step)
        shares = [windows[rank].batch(step, rank, world) for rank in range(world)]
        for ids, targets, segment_ids in shares:
            assert ids.shape == targets.shape == segment_ids.shape == (math.ceil(batch_size / world), 8)
        for part, expected in enumerate(whole):
            # row i of rank k is row i * world + k of the whole
            interleaved = torch.stack([share[part] for share in shares], dim=1).flatten(0, 1)
            assert torch.equal(interleaved[:batch_size], expected)
            surplus = interleaved[batch_size:]
            assert (surplus == (tokens.pad_id, -100, -1)[part]).all()


def test_random_rows_depend_on_seed_step_and_row_alone(tmp_path):
    """Not on the batch size, the order of the calls or the object; every change of the three changes the row."""
    tokens = positions_file(tmp_path, 50_000)
    windows = Windows(tokens, 4, batch_size=8, seed=1)
    starts = [windows.starts(step).tolist() for step in range(50)]
    assert [windows.starts(step).tolist() for step in reversed(range(50))] == starts[::-1]
    smaller = Windows(tokens, 4, batch_size=3, seed=1)
    assert [smaller.starts(step).tolist() for step in range(50)] == [rows[:3] for rows in starts]
    other = [Windows(tokens, 4, batch_size=8, seed=2).starts(step).tolist() for step in range(50)]
    everything = [start for rows in starts + other for start in rows]
    assert len(set(everything)) > 0.98 * len(everything), "steps, rows or seeds repeat each other"


def philox4x64_10(counter, key):
    """Salmon et al. 2011, section 4.3 and figure 3, in plain integers: four random numbers of 64 bits."""
    low = (1 << 64) - 1
    for i in range(10):
        a, b = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        k, m = (key[0] + i * 0x9E3779B97F4A7C15) & low, (key[1] + i * 0xBB67AE8584CAA73B) & low
        counter = [b >> 64 ^ counter[1] ^ k, b & low, a >> 64 ^ counter[3] ^ m, a & low]
    return counter


def test_random_windows_follow_the_paper(tmp_path):
    """An independent Philox gives the same windows: they stay the same for ever, on every machine and numpy."""
    windows = Windows(positions_file(tmp_path, 50_000), 64, batch_size=10, seed=7)
    for step in (0, 1, 123_456):
        bits = [number for block in range(1, 4) for number in philox4x64_10([block, step, 0, 0], [7, 0])]
        assert windows.starts(step).tolist() == [number % (50_000 - 64) for number in bits[:10]]


def test_random_windows_reach_every_place_equally(tmp_path):
    """All N - T starts, the first and the last included, about equally often (chi-squared, 5 sigma)."""
    windows = Windows(positions_file(tmp_path, 20), 8, batch_size=1200)
    counts = np.bincount(np.concatenate([windows.starts(step) for step in range(10)]), minlength=12)
    assert len(counts) == 12
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert chi2 < 11 + 5 * math.sqrt(22)


@pytest.mark.parametrize("n, batch_size", [(65, 3), (72, 5), (73, 4), (9, 4)])
def test_sequential_windows_go_through_the_file_epoch_after_epoch(tmp_path, n, batch_size):
    """Each epoch is all windows in file order, across the borders of steps and epochs, nothing left out between."""
    windows = Windows(positions_file(tmp_path, n), 8, batch_size=batch_size, mode="sequential")
    assert windows.n_windows == (n - 1) // 8
    rows = [row for step in range(3 * windows.n_windows) for row in windows.batch(step)[0].tolist()]
    epoch = [list(range(8 * i, 8 * i + 8)) for i in range(windows.n_windows)]
    assert rows == epoch * (3 * batch_size)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n, seq_len, batch_size", [
    (200, 8, 4), (201, 8, 4), (202, 8, 64), (2, 8, 4), (9, 8, 1), (10, 8, 1), (1000, 7, 5), (3, 1, 1)])
def test_eval_windows_hold_every_target_once(tmp_path, n, seq_len, batch_size, world):
    """Over all ranks each id but the bos is a target once, after its own predecessor; equal shapes and counts."""
    bos_at = [i for i in (0, 17, 18, 170, 199) if i < n - 1]
    tokens = positions_file(tmp_path, n, bos_at)
    ranks = [list(eval_windows(tokens, seq_len, batch_size, rank, world)) for rank in range(world)]
    shapes = {part.shape for batches in ranks for batch in batches for part in batch}
    assert len(shapes) == 1 and len({len(batches) for batches in ranks}) == 1
    rows, width = shapes.pop()
    assert rows <= batch_size and width == seq_len
    windows = math.ceil((n - 1) / seq_len)
    assert len(ranks[0]) == math.ceil(windows / (batch_size * world))
    assert rows * world * len(ranks[0]) < windows + world * len(ranks[0]), "more padding than needed"
    seen = []
    for batches in ranks:
        for ids, targets, segment_ids in batches:
            trained = targets != -100
            seen += targets[trained].tolist()
            before = ids[trained]
            assert ((before == targets[trained] - 1) | (before == tokens.bos_id)).all()
            assert ((segment_ids == -1) == (ids == tokens.pad_id)).all() and (targets[segment_ids == -1] == -100).all()
    assert sorted(seen) == [i for i in range(1, n) if i not in bos_at] and len(seen) == tokens.n_targets


@pytest.mark.parametrize("batch_size", [2, 5, 64])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_eval_windows_of_the_first_rows_alone(tmp_path, batch_size, world):
    """max_rows: the targets of exactly the first rows, whatever the world and batch; more rows than there are: all."""
    tokens = positions_file(tmp_path, 200)
    for max_rows in (1, 7, 1000):
        seen = [target for rank in range(world)
                for _, targets, _ in eval_windows(tokens, 8, batch_size, rank, world, max_rows)
                for target in targets[targets != -100].tolist()]
        assert sorted(seen) == list(range(1, min(8 * max_rows, 199) + 1))


def test_text_shorter_than_one_window_says_what_to_change(tmp_path):
    tokens = positions_file(tmp_path, 64)
    Windows(tokens, 63, batch_size=1).batch(0)
    with pytest.raises(UserError, match=r"found 64 tokens, expected seq_len \+ 1 = 65 or more; lower --seq_len"):
        Windows(tokens, 64, batch_size=1)


@pytest.mark.parametrize("batch_size, seq_len, limit", [(12, 64, 150e-6), (32, 1024, 2e-3)])
def test_a_batch_takes_microseconds(tmp_path, batch_size, seq_len, limit):
    """The best of many, since other processes share the machine."""
    windows = Windows(positions_file(tmp_path, 50_000), seq_len, batch_size=batch_size)
    best = math.inf
    for step in range(2000):
        start = time.perf_counter()
        windows.batch(step)
        best = min(best, time.perf_counter() - start)
    assert best < limit


# ---- the command --------------------------------------------------------------------------------------------------

def test_command_shows_what_it_made(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("ab" * 40 + "\n<|endoftext|>\n" + "cd" * 10)
    data.main(["--data", str(tmp_path / "a.txt"), "--tokenizer", "char", "--cache", str(tmp_path), "--show",
               "--seq_len", "90"])
    lines = capsys.readouterr().out.splitlines()
    assert "char, 11 tokens" in lines[0] and "train.bin" in lines[1] and "'<|bos|>', 'a', 'b'" in lines[3]
    rows = [line.split() for line in lines[7:]]
    assert len(rows) == 90 and ["'<|end|>'", "-", "0"] in [[row[0], row[1], "0"] for row in rows]
    assert {row[2] for row in rows} == {"1", "2"} or {row[2] for row in rows} == {"0", "1"}


def test_command_exits_with_2_and_one_line(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "data.py", "--data", "nowhere.txt", "--cache", tmp_path],
                            capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "nowhere.txt" in result.stderr and not files_under(tmp_path)
