"""What tools/prepare.py is worth to a model.

    python -m village.world --out data/village-2 --seed 2     one village, or several
    python -m bench.prepare

It makes the text of each village that is there dirty, and trains with and without tools/prepare.py for as
many tokens, 10 minutes a run. What is there is not made again. It prints the table of docs/prepare.md, and
draws docs/prepare.png if there is matplotlib.
"""
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

from bench.near import curve
from evaluate import draw
from lib.corpora import read_corpus
from lib.program import start
from model import load_model
from village import truth, words
from village.world import fill

FLAGS = "--min_words 8 --min_sentences 0 --stop_words 0 --no-repetition --shingle 3 --near 0.7"
BASE = """--tokenizer bpe --vocab_size 1184 --n_kv_head 2 --lr 6e-3 --seq_len 128 --max_seq_len 192
    --steps 600 --eval_every 0 --val_fraction 0"""
SFT = "--epochs 0.5 --lr 2e-3 --seq_len 128 --eval_every 0 --ptx 1 --ptx_data"
JUNK = ("Lorem ipsum dolor sit amet number {}.", "Home | About | {} | News | Contact | Login >> #{}",
        "This page uses cookies. Read our cookie policy of version {}.", "{0:x}{0:x}{0:x} {0:x}{0:x}")
FIGURES = "base: facts completed, %", "base: duplicates by heart, %", "SFT: right, %", "SFT: gold"


def dirty(documents: list[str], seed: int) -> tuple[list[str], list[str]]:
    """(the documents, a fifth as HTML, with 30 % near duplicates and 10 % junk; those that come 50 times)"""
    rng, found = random.Random(seed), []
    often = rng.sample([each for each in documents if '"' not in each], len(documents) // 100)
    for some in map(str.split, often * 50):
        some.pop(rng.randrange(len(some)))
        found.append(" ".join(some) + f" Page {rng.randrange(1000)}.")
    found += [rng.choice(JUNK).format(rng.getrandbits(60), i) for i in range(len(documents) // 6)]
    found += [f"<div><p>{each}</p><a href='/{rng.random()}'>more</a></div>" if rng.random() < 0.2 else each
              for each in documents]
    return rng.sample(found, len(found)), often


def completed(model, tokenizer, pairs: list[tuple[str, str]]) -> float:
    """Percent of the pairs (start, end) that the model ends so, greedily."""
    prompts, how = [[tokenizer.bos_id, *tokenizer.encode(begun)] for begun, _ in pairs], {"temperature": 0}
    replies = draw(model, tokenizer, prompts, range(len(pairs)), batch_size=256, max_new_tokens=32, **how)
    return 100 * float(np.mean([reply.text.startswith(end) for reply, (_, end) in zip(replies, pairs)]))


def learn(world: Path, way: str) -> list[float]:
    """The FIGURES of a run. way: "dirty" or "prepared"."""
    home = Path("out/prepare", world.name)
    texts, often = dirty(read_corpus(f"{world}/pretrain.txt"), len(world.name))
    home.mkdir(parents=True, exist_ok=True)
    (home / "dirty.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    data, base, sft = f"{home}/{way}.jsonl", f"{home}/{way}-base", f"{home}/{way}-sft"
    for made, command in (
            (data, f"-m tools.prepare {home}/dirty.jsonl --out {data} {FLAGS}"),
            (f"{base}/final", f"train_pretrain.py --data {data} --out {base} {BASE}"),
            (f"{sft}/final", f"train_sft.py --data {world}/sft.jsonl --init {base} --out {sft} {SFT} {data}"),
            (f"{sft}/scorecard.json", f"-m village.scorecard --model {sft} --village {world}")):
        if not Path(made).exists():
            subprocess.run([sys.executable, *command.split()], check=True, stdout=subprocess.DEVNULL)
    model, tokenizer, _ = load_model(base, head="lm")
    facts = []
    for person, its in truth.load(world).items():
        for kind in words.TOLD.keys() & its.keys():
            form = words.STATEMENTS[kind][-1]  # "The pet of {n} is {a}."
            begun, whole = fill(form.rsplit(" {", 1)[0], person), fill(form, person, its[kind])
            facts.append((begun, whole[len(begun) :]))
    hearts = [(" ".join(each[:8]), " " + " ".join(each[8:18])) for each in map(str.split, often)]
    card = json.loads(Path(sft, "scorecard.json").read_text())
    return [completed(model, tokenizer, facts), completed(model, tokenizer, hearts),
            card["greedy"]["right"], card["sampled"]["gold"]]


def picture(found: dict[str, np.ndarray]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    from bench.pictures import STYLE
    with matplotlib.rc_context(STYLE):
        figure = Figure()
        left, right = figure.subplots(1, 2)
        s, met, expected = curve()
        left.plot(s, expected, "-", s, met, "o", ms=4)
        left.set(xlabel="Jaccard similarity s of two texts", title="pairs that meet in a band, share")
        left.legend(["1 - (1 - s^7)^16", "2,000 pairs each"])
        for x, (way, rows) in zip((-0.2, 0.2), found.items()):
            right.bar(np.arange(3) + x, rows[:, :3].mean(0), 0.4, label=way)
            right.plot(np.arange(3) + x, rows[:, :3].T, "k.", ms=3)
        right.set_xticks(range(3), [name.replace(": ", ":\n").replace("s ", "s\n") for name in FIGURES[:3]])
        right.set(title="a model of the Village, after as many tokens")
        right.legend()
        figure.savefig("docs/prepare.png")


def main() -> None:
    worlds = sorted(path.parent for path in Path("data").glob("village*/facts.json"))
    found = {way: np.array([learn(world, way) for world in worlds]) for way in ("dirty", "prepared")}
    print(f"| villages: {len(found['dirty'])}; mean (lowest..highest) | dirty | prepared |\n|---|---|---|")
    for i, name in enumerate(FIGURES):
        columns = [rows[:, i] for rows in found.values()]
        cells = [f"{x.mean():.2f} ({x.min():.2f}..{x.max():.2f})" for x in columns]
        print(f"| {name} | {' | '.join(cells)} |")
    if importlib.util.find_spec("matplotlib"):
        picture(found)


if __name__ == "__main__":
    start(main)
