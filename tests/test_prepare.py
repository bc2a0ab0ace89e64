"""tools/prepare.py: cleaning, what repeats, mixing; each beside a plain computation."""
import functools
import gzip
import json
import os
import random
import re
import resource
import unicodedata
from collections import defaultdict

import numpy as np
import pytest

from lib.corpora import read_corpus
from lib.program import UserError
from tools import prepare, repeats
from tools.clean import CleanConfig, c4_lines, edits, faults, mask, strip_markup, tidy
from tools.prepare import Config, mixed, quotas
from tools.repeats import hash_words, judge_words, ngrams, root, words_of

PROSE = "The cat and the dog have to be with that man. " * 6  # 66 words, 6 sentences


def lines(*texts):
    return "\n".join(texts)


def of_words(n, word="abcd", *others):
    """n words, the common ones, and others."""
    some = ["the", "and", *others]
    return " ".join([*some, *[word] * (n - len(some))])


# ---- one text ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule, kept, removed", [
    ("Gopher: words", of_words(50), of_words(49)),
    ("Gopher: words", of_words(100000), of_words(100001)),
    ("Gopher: length of words", " ".join(["abc"] * 50), " ".join(["abc"] * 49 + ["ab"])),
    ("Gopher: length of words", " ".join(["a" * 10] * 50), " ".join(["a" * 10] * 49 + ["a" * 11])),
    ("Gopher: symbols", of_words(50) + "#" * 5, of_words(50) + "#" * 6),
    ("Gopher: symbols", of_words(50) + "..." * 5, of_words(50) + "..." * 5 + "…"),
    ("Gopher: bullets", lines(*["- one"] * 9, "one"), lines(*["- one"] * 9, "• one")),
    ("Gopher: ellipses", lines(*["a..."] * 3, *"abcdefg"), lines(*["a..."] * 3, "b…", *"abcdef")),
    ("Gopher: numbers", of_words(40, "ab1") + " 12" * 10, of_words(39, "ab1") + " 12" * 11),
    ("Gopher: common words", of_words(50), of_words(50).replace("and", "ant")),
    ("Gopher: lines that repeat", lines("x" * 99, *"abcdef", *"abc"), lines("x" * 99, *"abcde", *"abcd")),
    ("Gopher: lines that repeat", lines(*["yy"] * 3, *"aa bb cc dd ee ff g h".split()),
     lines(*["yy"] * 3, *"aa bb cc dd ee f g h".split())),
    ("Gopher: paragraphs that repeat", "\n\n".join(["x" * 99, *"abcdefabc"]),
     "\n\n".join(["x" * 99, *"abcdeabcd"])),
    ("C4: sentences", "A. B? C! (D.) 'E.'", "A. B? C! 2.5 'D.'"),
    ("C4: lorem ipsum", "Lorem dolor", "Lorem Ipsum"),
    ("C4: brace", "a (b)", "a {b"),
    ("broken characters", "a" * 999 + "\ufffd", "a" * 998 + "\ufffd"),
    ("script", "ab яж", "a яж"),
    ("no words", "a", " -\n")])
def test_each_rule_at_its_edge(rule, kept, removed):
    """At the limit a text stays; one unit beyond it breaks the rule. Limits: tables in the papers."""
    cfg = CleanConfig(script="latin")
    assert rule not in faults(kept, words_of(kept), cfg) and rule in faults(removed, words_of(removed), cfg)


def test_rules_can_be_switched_off():
    text = "# {lorem ipsum} " * 3
    off = {"quality": False, "repetition": False, "tidy": False, "c4": "off"}
    found = [list(faults(text, words_of(text), cfg)) for cfg in (CleanConfig(), CleanConfig(**off))]
    assert found[0] and not found[1]
    assert not edits(CleanConfig(markup=False, mask=False, emoji="keep", **off))


def test_lines_that_c4_drops():
    """Fewer than 3 words, a word above 1,000 letters, javascript, policies; strict: no end of a sentence."""
    good = ["One two three", "a " * 3 + "x" * 1000, "", 'He said "no."', "And so... it ended!"]
    bad = ["One two", "a " * 3 + "x" * 1001, "Turn on JavaScript now", "Read our Privacy Policy here"]
    assert c4_lines(lines(*good, *bad), strict=False) == lines(*good)
    assert c4_lines(lines(*good, "It ends so..."), strict=True) == lines("", *good[3:])
    assert c4_lines("It is so[3] here[citation needed].", False) == "It is so here."


def test_markup():
    """Text nodes stay, block tags break lines, entities are decoded once; what is no tag stays."""
    page = """<!DOCTYPE html><html><head><title>T</title><style>p {a}</style></head><body><nav>Home</nav>
        <script>if (a < b) { "<p>" }</script><p class="a>b">One
        &amp;lt; <b>two</b>.</p><!-- no --><ul><li>three<li>four</ul></body></html>"""
    assert tidy(strip_markup(page)).split("\n") == ['b">One &lt; two.', "", "three", "four"]
    for text in ("a < b and c > d", "vector<int> x", "if (a<b) c>d", "<name> said", "x?a=1&region=US&copy=2"):
        assert strip_markup(text) == text
    assert strip_markup("Write <b>so</b>:\n\n    def f():\n") == "Write so:\n\n    def f():\n"  # no page
    assert strip_markup("Tom &amp; Jerry &amp;lt;") == "Tom & Jerry &lt;"
    assert len(strip_markup("<nav>" * 3000)) < 10  # never closed: no text is lost, and no time


def test_unicode_and_space():
    """NFC, not NFKC; joiners stay, what is invisible goes before letters are composed."""
    for text in ("x² ½ ﬁ … ™", "👩\u200d💻", "می\u200cخواهم", "  def f():\n      pass", "a\n\nb"):
        assert tidy(text) == text
    assert tidy("e\u200b\u0301 A\u030a") == "é Å"
    assert tidy("\ufeffa\0\xadb\r\nc\rd \t\n\n\n\ne\u2028f\n") == "ab\nc\nd\n\ne\nf"
    assert tidy("a \xa0 b\u3000c   d") == "a b c d"


def test_what_is_clean_stays(seed=0):
    """f(f(x)) = f(x) on random text of awkward characters."""
    rng, pool = random.Random(seed), [*"aé\u0301\u200b\u200d\xa0\t \n\n\r.-+(12345@:[]\u2028👍🏽🇩\ufe0f"]
    for emoji in ("text", "keep"):
        steps = edits(CleanConfig(emoji=emoji, markup=False, c4="off"))
        for _ in range(3000):
            text = "".join(rng.choices(pool, k=rng.randrange(30)))
            once = functools.reduce(lambda text, edit: edit(text), steps.values(), text)
            assert functools.reduce(lambda text, edit: edit(text), steps.values(), once) == once, ascii(text)
            assert unicodedata.is_normalized("NFC", once)


@pytest.mark.parametrize("emoji, name", [
    ("👍🏽", ":thumbs_up_sign_type_4:"), ("👩\u200d💻", ":woman_personal_computer:"), ("🇩🇪", ":flag_d_e:"),
    ("❤️", ":heavy_black_heart:"), ("1️⃣", ":digit_one:"), ("🤷🏻\u200d♂️", ":shrug_type_1_2_male_sign:"),
    ("↔️", ":left_right_arrow:"), ("🏴\U000e0065\U000e006e\U000e0067\U000e007f", ":waving_black_flag_e_n_g:")])
def test_emoji(emoji, name):
    """A sequence is one name."""
    ways = [edits(CleanConfig(emoji=way, tidy=False)).get("emoji") for way in ("text", "drop", "keep")]
    assert [way and way(f"C♯ {emoji}, 1") for way in ways] == [f"C♯ {name}, 1", "C♯ , 1", None]


@pytest.mark.parametrize("text, masked", [
    ("to a.b+c@mail.example.co.uk, or", "to [mail], or"), ("@name a@b", None), ("8.8.8.8.", "[ip]."),
    ("192.168.0.1 and 127.0.0.1", None), ("v12.1.1.10", None), ("1.2.3.4.5", None), ("300.1.1.1", None),
    ("(2001:4860:4860::8888)", "([ip])"), ("12:30:45, std::vector, a::b", None), ("::1", None),
    ("4111 1111 1111 1111!", "[card]!"), ("5500-0000-0000-0004", "[card]"), ("4111 1111 1111 1112", None),
    ("340000000000009", "[card]"), ("x4111111111111111", None), ("(555) 123-4567", "[phone]"),
    ("555-123-4567 x", "[phone] x"), ("+49 (176) 1234-5678.", "[phone]."), ("2024-11-28 10:20", None),
    ("1990 1995 2000", None), ("978-3-16-148410-0", None), ("3.14159265358979", None),
    ("4111 1111 1111 1111 12/25, 123", "[card] 12/25, 123"), ("3782 822463 10005", "[card]"),
    ("48 78 57 22 73 91 32 43", None), ("0.4111111111111111", None), ("lodash@4.17.21, a@b.T", None),
    ("(555)123-4567 1-800-555-1234", "[phone] [phone]"), ("1.2E+12345680 +0.12345678 2+34567890", None)])
def test_personal_data(text, masked):
    assert mask(text) == (text if masked is None else masked)


# ---- what repeats ------------------------------------------------------------------------------------------

def shares_by_hand(words: list[bytes]) -> list[float]:
    """By slices of a list of words."""
    found, size = [], [len(word) + 1 for word in words]
    for n in range(2, 11):
        places = defaultdict(list)
        for i in range(len(words) - n + 1):
            places[tuple(words[i : i + n])].append(i)
        twice = [some for some in places.values() if len(some) > 1]
        if n < 5:
            most = max(map(len, twice), default=0)
            sizes = [len(some) * sum(size[some[0] : some[0] + n]) for some in twice if len(some) == most]
            part = max(sizes, default=0)
        else:
            part = sum(size[i] for i in {i + k for some in twice for i in some for k in range(n)})
        found.append(part / max(1, sum(size)))
    return found


def test_repeated_ngrams_are_those_counted_by_hand():
    """Documents of few different words, some without any; no n-gram reaches into the next document."""
    rng, keys = random.Random(0), []
    for k in range(60):
        words = ["a", "bb", "ccc"] * (k % 3 + 1) + ["d", "ee"]
        keys.append(words_of(" ".join(rng.choices(words, k=rng.choice([0, 1, 9, 40, 90])))))
    found = repeats.repeated(*hash_words(keys), len(keys))
    np.testing.assert_allclose(found.T, [*map(shares_by_hand, keys)], atol=1e-12)


def test_repeated_ngrams_at_the_edge():
    """Of 20 words of one letter a pair that comes twice is 0.2: no more than the limit. Of 19 it is more."""
    words = "a b c d e f g h i j k l m n o p q r a b".split()
    for text, rule in ((words, None), (words[1:-2] + ["b", "c"], "Gopher: 2-grams that repeat")):
        assert judge_words([words_of(" ".join(text))], Config())[2].get(0) == rule


def test_words():
    """Those of a regular expression, of ASCII and other text: lower case; a Chinese letter is a word."""
    word = re.compile("[^\\W\u3040-\u30ff\u3400-\u9fff]+|[\u3040-\u30ff\u3400-\u9fff]")
    rng, pool = random.Random(0), [*map(chr, range(128)), *"éÉßİ你好か“–…½²Яж٣\u0301\u200b\xa0\u2028😀ª"]
    for n in range(2000):
        text = "".join(rng.choices(pool[: 128 if n % 2 else None], k=rng.randrange(20)))
        assert words_of(text) == [found.encode() for found in word.findall(text.lower())]


def test_bands_are_minima_over_python_integers():
    """Of documents with many shingles, one, and none, wherever they stand."""
    texts = ["one two three", "a b c d e f", "", "u v w x y", "a b", "g h i j k l m n o"]
    hashes, _, numbers = hash_words([*map(words_of, texts)])
    grams, where = ngrams(hashes, numbers, 5)
    keys, M, top = repeats.band_keys(grams, where, len(texts), 3, 2), 0x9E3779B97F4A7C15, 1 << 64
    for number, text in enumerate(texts):
        its, rng = [int(x) * M % top >> 32 for x in grams[where == number]], random.Random(0)
        assert len(its) == max(0, len(text.split()) - 4)
        for key in keys[number].tolist():
            expected = 0
            for _ in range(2):
                a, b = rng.getrandbits(64), rng.getrandbits(64)
                expected = (expected * M + (min((a * x + b) % top >> 32 for x in its) if its else 0)) % top
            assert key == expected * M % top >> 32


def pairs_of_sets(s: float, n: int, size=200) -> tuple[np.ndarray, np.ndarray]:
    """(shingles, numbers) of n pairs of sets with a Jaccard similarity of exactly s."""
    both, bits = round(2 * size * s / (1 + s)), np.random.default_rng(0)
    common, own = bits.integers(0, 2**64, (n, both), "u8"), bits.integers(0, 2**64, (2, n, size - both), "u8")
    sets = np.concatenate([np.stack([common, common]), own], 2)  # (2, n, size)
    return sets.transpose(1, 0, 2).reshape(-1), np.repeat(np.arange(2 * n), size)


@pytest.mark.parametrize("s", [0.2, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_minhash_estimates_the_similarity_and_bands_follow_the_s_curve(s):
    """Within 4 standard errors and 2 percent, over 3,000 pairs; s up to the rounding of the sets."""
    n, size, b, r = 3000, 200, 16, 7
    s = (both := round(2 * size * s / (1 + s))) / (2 * size - both)
    sets = pairs_of_sets(s, n)
    minima, keys = repeats.band_keys(*sets, 2 * n, 100, 1), repeats.band_keys(*sets, 2 * n, b, r)
    for found, expected in (((minima[::2] == minima[1::2]).mean(1), s),
                            ((keys[::2] == keys[1::2]).any(1), 1 - (1 - s**r) ** b)):
        assert abs(found.mean() - expected) < min(0.02, 4 * max(1e-3, found.std() / n**0.5))


def similar_texts(n: int, rng) -> list[str]:
    """Texts of 60 to 200 words; half of them are others with some words changed."""
    texts = []
    for _ in range(n):
        words = rng.choices(range(3000), k=rng.randrange(60, 200))
        if texts and rng.random() < 0.5:
            words = rng.choice(texts[-50:]).split()
            for _ in range(rng.choice([0, 1, 1, 2, 3, 5, 9])):
                words[rng.randrange(len(words))] = "new"
        texts.append(" ".join(map(str, words)))
    return texts


def test_near_duplicates_are_those_of_brute_force():
    """2,000 documents. Of all pairs with J >= 0.8, by sets of strings, 95 % are in one cluster. No cluster
    joins what no chain of such pairs joins (graph search), and the first one stays."""
    texts = similar_texts(2000, random.Random(0))
    sets = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in map(str.split, texts)]
    places, near = defaultdict(list), defaultdict(set)
    for i, its in enumerate(sets):
        for j in {j for shingle in its for j in places[shingle]}:
            if len(its & sets[j]) >= 0.8 * len(its | sets[j]):
                near[i].add(j)
                near[j].add(i)
        for shingle in its:
            places[shingle].append(i)
    digests, keys, _ = judge_words([*map(words_of, texts)], cfg := Config())
    digests = np.array([bytes.fromhex(each) for each in digests], "V16")
    equal, first, _ = repeats.duplicates(digests, keys, texts.__getitem__, cfg)
    pairs = [(i, j) for i in near for j in near[i]]
    assert len(pairs) > 1000 and np.mean([first[i] == first[j] for i, j in pairs]) >= 0.95
    component = components(range(2000), near)
    assert all(component[i] == component[first[i]] and first[i] <= i for i in range(2000))
    assert all(first[first[i]] == first[i] and texts[i] == texts[equal[i]] for i in range(2000))


def components(nodes, neighbours) -> dict:
    """{node: the first node that can be reached from it}"""
    found = {}
    for start in nodes:
        stack = [start] * (start not in found)
        while stack:
            node = stack.pop()
            found.setdefault(node, start)
            stack += [other for other in neighbours[node] if other not in found]
    return found


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_those_of_a_graph_search(seed):
    """Random keys of three bands, a random relation. 0 is no key. Another order gives the same clusters."""
    rng, n = random.Random(seed), 120
    keys = np.array([[rng.randrange(40) for _ in range(3)] for _ in range(n)])
    similar = {frozenset((i, j)) for i in range(n) for j in range(i) if rng.random() < 0.5}
    edges = {i: {j for j in range(n) if j != i and frozenset((i, j)) in similar and
                 any(a == b > 0 for a, b in zip(keys[i], keys[j]))} for i in range(n)}
    wanted = components(range(n), edges)
    for order in (list(range(n)), rng.sample(range(n), n)):
        parent = list(range(n))
        for band in keys[order].T:
            repeats.join_similar(parent, band, lambda i, j, at=order: frozenset((at[i], at[j])) in similar)
        clusters = defaultdict(set)
        for i in range(n):
            assert root(parent, i) <= i
            clusters[root(parent, i)].add(order[i])
        assert {*map(frozenset, clusters.values())} == {frozenset(i for i in range(n) if wanted[i] == k)
                                                        for k in {*wanted.values()}}


def test_text_of_tests_is_found(tmp_path):
    """13 words in a row, in other case and punctuation, of a string in a record or of a text; not 12 words.
    A shorter test counts whole, from five words on."""
    short = ["Who is the king of Spain?", "is it so"]
    record = {"a": [{"q": "a b c d e f g h i j k l m n o"}], "b": 1, "c": short}
    (tmp_path / "t.jsonl").write_text(json.dumps(record))
    (tmp_path / "t.txt").write_text("Some text that is kept for a test, v w x y z v w x y z")
    found = {"x B, c d e f g h i j k l m (n)! x": True, "b c d e f g h i j k l m": False,
             "so who IS the king of spain": True, "who is the king of": False, "is it so": False,
             "Text that is kept for a test: v w x y z v": True}
    cfg = Config(against=f"{tmp_path}/t.jsonl,{tmp_path}/t.txt", repetition=False)
    broken = judge_words([*map(words_of, found)], cfg)[2]
    assert [i in broken for i in range(len(found))] == list(found.values())
    assert sorted(repeats.examined(cfg.against)) == [6, 13]
    (tmp_path / "u.jsonl").write_text(json.dumps(record) + '\n{"a": ')
    with pytest.raises(UserError, match="u.jsonl:2: found no valid JSON"):
        repeats.examined(f"{tmp_path}/u.jsonl")


# ---- the mixture -------------------------------------------------------------------------------------------

def test_quotas_fill_up_to_the_caps():
    """Random inputs: none above its cap, the others in the ratio of the weights, the sum as wanted."""
    rng = random.Random(0)
    for _ in range(300):
        sizes = {i: rng.randrange(1, 100) for i in range(rng.randrange(1, 6))}
        weights = {i: rng.choice([1, 2, 5]) for i in rng.sample([*sizes], len(sizes))}
        most, total = rng.choice([1, 4]), rng.randrange(1, 900)
        found = quotas(sizes, weights, total, most)
        assert sum(found.values()) == pytest.approx(min(total, most * sum(sizes.values())))
        rates = [found[i] / weights[i] for i in sizes if found[i] < most * sizes[i] - 1e-9]
        assert not rates or max(rates) == pytest.approx(min(rates))
        assert all(found[i] / weights[i] <= (rates or [1e9])[0] + 1e-9 for i in sizes)
        assert [*found] == [*sizes]  # whatever the order of the weights


def test_a_mixture_is_even_and_each_document_comes_as_often_as_its_input_is_read():
    """Every start of the corpus has its shares within a document or two. What is taken of an input, and in
    which order, does not depend on the others."""
    rng = np.random.default_rng(0)
    of_input, sizes = rng.integers(0, 3, 600), rng.integers(1, 50, 600)
    digests, have = rng.integers(0, 2**64, 600, "u8"), np.bincount(of_input, sizes)
    quota = [2.5 * have[0], 0.3 * have[1], have[2]]
    order = mixed(of_input, sizes, digests, quota)
    taken = np.cumsum(sizes[order] * (of_input[order] == np.arange(3)[:, None]), 1)
    assert (abs(taken - np.outer(quota, taken.sum(0)) / sum(quota)) <= 100).all()
    assert (abs(taken[:, -1] - quota) <= 25).all()
    times = np.bincount(order, minlength=600)
    assert [{*times[of_input == i].tolist()} for i in range(3)] == [{2, 3}, {0, 1}, {1}]
    alone = mixed(of_input, sizes, digests, [quota[0], 0, 0])
    assert (order[of_input[order] == 0] == alone).all()
    first, second, _ = np.split(alone, [sum(of_input == 0), 2 * sum(of_input == 0)])
    assert (np.sort(first) == np.sort(second)).all() and (first != second).any()
    assert (np.diff(first) < 0).any()


# ---- the whole ---------------------------------------------------------------------------------------------

@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A gzip of records, a text and a folder: {input: texts}. Every fifth text repeats one before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "PART", 5000)  # many parts
    rng, texts, n = random.Random(0), [], 200
    for i in range(n):
        words = [f"w{rng.randrange(400)}" for _ in range(80)]
        sentences = (" ".join(words[k : k + 10]) for k in range(0, 80, 10))
        texts.append(f"The text and {i}. " + ". ".join(sentences) + ".")
        if i % 5 == 4:
            texts[-1] = texts[-3].upper() + "!" if i % 3 else texts[-2].replace("text", "test")
    records = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts[: n // 2])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    (tmp_path / "b.txt").write_text("\n<|endoftext|>\n".join(texts[n // 2 : 3 * n // 4]))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "c.json").write_text(json.dumps([{"text": text} for text in texts[3 * n // 4 :]]))
    return {"a.jsonl.gz": texts[: n // 2], "b.txt": texts[n // 2 : 3 * n // 4], "c": texts[3 * n // 4 :]}


FLAGS = ["--no-repetition", "--out", "out/corpus.jsonl"]


def outcome(folder):
    return (folder / "out/corpus.jsonl").read_bytes(), (folder / "out/report.json").read_bytes()


def test_all_is_kept_or_counted_and_training_reads_it(inputs, tmp_path, capsys):
    """What is left, removed and read adds up, at each rule; the first of equals stays, with its place."""
    prepare.main([*inputs, *FLAGS, "--workers", "1"])
    report = json.loads((tmp_path / "out/report.json").read_text())
    left = report["documents"], report["bytes"]
    for row in report["rules"]:
        left = left[0] - row["documents"] * row["removes"], left[1] - row["bytes"]
        assert left == (row["documents_left"], row["bytes_left"])
        assert len(row["examples"]) == min(10, row["documents"])
    some = {rule: {"documents": 1, "bytes": n, "examples": []} for rule, n in zip("edcab", (1, 9, 5, 5, 7))}
    assert "".join(row["rule"][:1] for row in prepare.table(some, ["e"], 9, 99)) == "edbactsn"
    rows = [json.loads(line) for line in open("out/corpus.jsonl", encoding="utf-8")]
    assert (len(rows), sum(len(row["text"].encode()) for row in rows)) == left
    removed = {row["rule"]: row["documents"] for row in report["rules"] if row["removes"]}
    assert removed == {"text of a test": 0, "same words": 27, "near duplicate": 13}
    assert report["documents"] == 200
    assert sum(cluster["documents"] - 1 for cluster in report["clusters"]) == 10
    assert rows[0] == {"text": inputs["a.jsonl.gz"][0], "source": "a.jsonl.gz:1"}
    assert {row["source"] for row in rows} >= {"b.txt:1", "b.txt:2", "c/c.json:1"}
    assert read_corpus("out/corpus.jsonl") == [row["text"] for row in rows]
    assert "report.html" in capsys.readouterr().out and "<script>" in open("out/report.html").read()
    assert sorted(os.listdir("out")) == ["corpus.jsonl", "report.html", "report.json"]


def test_workers_and_interruptions_change_nothing(inputs, tmp_path, monkeypatch):
    """The same bytes with one or two workers, and after a stop at any byte of the cleaned file, or of a run
    that had other flags."""
    prepare.main([*inputs, *FLAGS, "--workers", "1"])
    wanted = outcome(tmp_path)
    prepare.main([*inputs, *FLAGS, "--workers", "2"])
    assert outcome(tmp_path) == wanted
    cleaned = []

    def stop(path, *_):
        cleaned.append(path)
        raise KeyboardInterrupt

    for cut, *flags in ((0,), (1,), (5000,), (40000,), (-1,), (None,), (None, "--min_words", "90")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(prepare, "finish", stop)
            prepare.main([*inputs, *FLAGS, *flags, "--workers", "1"])
        cleaned[-1].write_bytes(whole := cleaned[-1].read_bytes()[:cut])
        assert whole.count(b"\n") < 200 or cut is None
        prepare.main([*inputs, *FLAGS, "--workers", "1"])
        assert outcome(tmp_path) == wanted
    assert len({*cleaned}) == 2 and not list(tmp_path.glob("out/*.cleaned"))


def test_a_mixture_is_written_as_asked(inputs, tmp_path):
    """The weights in any order, a cap, a size without weights. Inputs that the file does not name are an
    error."""
    def taken(*flags):
        prepare.main([*inputs, *FLAGS, *flags, "--workers", "1"])
        rows = json.loads((tmp_path / "out/report.json").read_text())["inputs"]
        return [row["taken"] / 60000 for row in rows], [row["taken"] / row["bytes"] for row in rows]
    (tmp_path / "mix.json").write_text('{"c": 0, "b.txt": 1, "a.jsonl.gz": 3}')
    assert taken("--mix", "mix.json", "--size", "60000")[0] == pytest.approx([0.75, 0.25, 0], abs=0.01)
    assert taken("--mix", "mix.json", "--size", "1000000", "--max_epochs", "2")[1] == [2, 2, 0]
    shares, epochs = taken("--size", "30000")
    assert sum(shares) == pytest.approx(0.5, abs=0.02) and epochs == pytest.approx(3 * [epochs[0]], abs=0.1)
    (tmp_path / "mix.json").write_text('{"a.jsonl.gz": 3, "b.txt": 1, "d": 0}')
    with pytest.raises(UserError, match="mix.json: found"):
        prepare.main([*inputs, *FLAGS, "--mix", "mix.json"])


def test_bad_input_is_counted_one_line_a_file(inputs, tmp_path, capsys):
    """Broken JSON, no text, half a character, a wrong byte, a gzip cut off, Parquet. The rest is used."""
    rows = [json.dumps({"text": inputs["b.txt"][0]}).encode(), b'{"text": ', b'{"txt": "a"}']
    (tmp_path / "d.jsonl").write_bytes(b"\n".join([*rows, b'{"text": "\\ud800"}', b'{"text": "\xff"}']))
    (tmp_path / "e.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:3000])
    (tmp_path / "f.parquet").write_bytes(b"PAR1")
    (tmp_path / "g.txt").write_bytes(b"\xef\xbb\xbf" + inputs["c"][0].encode() + b"<|endoftext|>\xff")
    prepare.main(["d.jsonl", "e.gz", "f.parquet", "g.txt", *FLAGS, "--workers", "1"])
    said = {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert re.search(r" 1 used, 4 left out: 2 x found half a .* \(d.jsonl:4, d.jsonl:5\)", said["d.jsonl"])
    assert re.search(r" [1-9]\d* used, 1 left out: 1 x cannot be read to its end", said["e.gz"])
    assert re.search(" 0 used, 1 left .* pandas", said["f.parquet"]) and "1 used, 1 left out" in said["g.txt"]
    for first, error in ("f.parquet", "nothing is left"), ("--exact", "different"), ("no.txt", "no such"):
        (tmp_path / "out/corpus.jsonl").unlink(missing_ok=True)
        with pytest.raises(UserError, match=error):
            prepare.main([first, *FLAGS, "--workers", "1"])
        assert not (tmp_path / "out/corpus.jsonl").exists()


def killed(part, cfg):
    os.kill(os.getpid(), 9)


def test_a_killed_worker_and_a_full_disk_are_one_line(inputs, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="a worker was killed"):
        patch.setattr(prepare, "clean", killed)
        prepare.main([*inputs, *FLAGS, "--workers", "1"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, before[1]))
    try:
        with pytest.raises(UserError, match="cleaned: cannot be written: .*; free space"):
            prepare.main([*inputs, *FLAGS, "--workers", "1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_documents_do_not_depend_on_where_blocks_end(tmp_path, monkeypatch, size):
    """A byte order mark, letters of several bytes, CRLF, empty documents; lines are counted."""
    monkeypatch.setattr(prepare, "PART", size)
    texts = ["é中😀\r\n" * 3, "", " ", "b\u2028c\x85", "d" * 100, "<|endof", "\ufeffx"]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8-sig", newline="")
    found = list(prepare.documents(f"{tmp_path}/a.txt", "<|endoftext|>"))
    assert [text for _, text, _ in found] == [text.replace("\r\n", "\n") for text in texts if text.strip()]
    assert [int(where.rpartition(":")[2]) for where, *_ in found] == [1, 4, 4, 4, 4]
    rows = [{"text": text} for text in texts]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for text, numbers in (lines, range(1, 8)), (json.dumps(rows, indent=1), range(2, 23, 3)):
        (tmp_path / "b.json").write_text(text, encoding="utf-8-sig")
        found = list(prepare.documents(f"{tmp_path}/b.json", ""))
        assert [text for _, text, _ in found if isinstance(text, str)] == [*filter(str.strip, texts)]
        assert [int(where.rpartition(":")[2]) for where, *_ in found] == [*numbers]


def test_the_benches_run(tmp_path, capsys):
    """Of 200 texts 133 others are near duplicates or junk; the times of a small text are printed."""
    from bench import near
    from bench.prepare import dirty
    texts, often = dirty([f"{i} is a number of which it is said that it is one." for i in range(200)], 1)
    assert len(texts) == 200 + 100 + 33 and len(often) == 2 and sum("Page" in text for text in texts) == 100
    (tmp_path / "a.txt").write_text(PROSE * 50)
    near.main(["--data", str(tmp_path / "a.txt"), "--repeats", "2", "--pairs", "20"])
    said = capsys.readouterr().out
    assert "cleaning, MB/s" in said and said.count("similarity") == 13
