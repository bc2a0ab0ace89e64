"""How many near duplicates MinHash-LSH finds, and how fast it and the cleaning are on one core.

    OMP_NUM_THREADS=1 python -m bench.near                    beside datasketch: pip install datasketch
    OMP_NUM_THREADS=1 python -m bench.near --data my.txt

Time is from the texts to the documents that stay: words, shingles, signatures, bands. Ours also compares what
meets in a band, shingle by shingle. Texts are cut after 2,500 characters.
"""
import importlib.util
import random
import statistics
from dataclasses import dataclass

import numpy as np

from bench.measure import compare, head, interleave, row
from lib.corpora import read_corpus
from lib.program import parse, start
from tools.clean import clean
from tools.prepare import Config as Flags
from tools.repeats import duplicates, jaccard, judge_words, shingles_of, words_of


@dataclass
class Config:
    data: str = "stdlib"  # stdlib, or files
    repeats: int = 5  # turns
    pairs: int = 2000  # pairs of texts for each point of the curve


def curve(pairs: int = 2000) -> np.ndarray:
    """(3, 13): mean similarity of pairs of texts of 200 words, of which more and more differ; the share of
    them that meets in a band; the share expected."""
    rng, cfg, found = random.Random(0), Flags(), []
    for edits in range(1, 26, 2):
        texts = []
        for _ in range(pairs):
            text = rng.choices(range(20000), k=200)
            places = rng.sample(range(200), edits)
            other = [rng.randrange(20000) if at in places else word for at, word in enumerate(text)]
            texts += [" ".join(map(str, text)), " ".join(map(str, other))]
        _, keys, _ = judge_words([*map(words_of, texts)], cfg)
        sets = [shingles_of(text, cfg.shingle) for text in texts]
        s = np.array([jaccard(a, b) for a, b in zip(sets[::2], sets[1::2])])
        found.append((s, (keys[::2] == keys[1::2]).any(1), 1 - (1 - s**cfg.rows) ** cfg.bands))
    return np.array(found).mean(-1).T


def main(argv=None) -> None:
    cfg, flags = parse(Config, argv, __doc__), Flags(repetition=False)
    head(f"share of pairs that meet in one of {flags.bands} bands of {flags.rows} rows")
    for s, met, expected in curve(cfg.pairs).T:
        row(f"similarity {s:.3f}", met, expected=expected)
    text, k = "\n".join(read_corpus(cfg.data)), flags.bands * flags.rows
    texts = [text[at : at + 2500] for at in range(0, len(text), 2500)]
    parts = [[(0, "", "", each) for each in texts[at : at + 400]] for at in range(0, len(texts), 400)]

    def ours():
        digests, keys, _ = judge_words([*map(words_of, texts)], flags)
        duplicates(np.array([bytes.fromhex(each) for each in digests], "V16"), keys, texts.__getitem__, flags)

    def theirs():
        index = datasketch.MinHashLSH(num_perm=k, params=(flags.bands, flags.rows))
        for i, words in enumerate(each.lower().split() for each in texts):
            minhash = datasketch.MinHash(num_perm=k)
            minhash.update_batch({" ".join(words[at : at + 5]).encode() for at in range(len(words) - 4)})
            index.query(minhash)
            index.insert(i, minhash)
    functions = {"cleaning": lambda: [clean(part, Flags()) for part in parts], "MinHash": ours}
    if importlib.util.find_spec("datasketch"):
        import datasketch
        functions["datasketch"] = theirs
    size, seconds = sum(len(each.encode()) for each in texts) / 1e6, interleave(functions, cfg.repeats)
    head(f"{len(texts)} documents, {size:.1f} MB, of which one core does so many in a second")
    for name, some in seconds.items():
        row(f"{name}, MB/s", size / statistics.median(some))
    if "datasketch" in seconds:
        compare("time", seconds, "datasketch", "MinHash")


if __name__ == "__main__":
    start(main)
