"""What the three objectives of train_objectives.py learn of the Village from as many tokens.

    python -m bench.objectives

It makes three villages of 40 people, trains each objective in each of them with as many parameters, 3 minutes
a run, and prints the table of docs/objectives.md. What is there is not made again.
"""
import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from data import IGNORE, collate
from evaluate import perplexity
from lib.checkpoint import load_final
from lib.corpora import read_corpus
from lib.program import start
from lib.records import read_chats, read_prompts
from lib.tokenizer import Tokenizer
from model import GPT, generate
from train_objectives import Encoder, Seq2Seq, Shape
from village import truth, words
from village.world import fill

FLAGS = """--steps 3000 --n_embd 64 --n_head 2 --tokenizer bpe --vocab_size 800 --lr 6e-3 --seq_len 64
    --val_fraction 0 --eval_every 0 --save_every 0 --resume"""
RUNS = {"clm": "", "mlm": "", "seq2seq": "--mlp_hidden 117"}  # not 160: so it pays for the cross-attention
KINDS = "known", "untold", "elsewhere", "code"  # of questions


def complete(model, tokenizer, asked, temperature=1e-4) -> list[list[int]]:
    """What stands between left and right, for (left, right, n) in asked: ids, and how many are missing. clm
    does not see the right side. mlm fills n places, the surest first. seq2seq says itself when it is done."""
    V, most, never = tokenizer.vocab_size, max(n for *_, n in asked), tokenizer.specials_but_end

    def draw(logits):  # (B, V) -> (B, 1)
        return torch.multinomial((logits / temperature).softmax(-1), 1)

    if type(model) is GPT:
        return generate(model, [left for left, *_ in asked], max_new_tokens=most, temperature=temperature,
                        eos_id=tokenizer.end_id, banned=never)
    rows = [[*left, *[V] * (n if type(model) is Encoder else 1), *right] for left, right, n in asked]
    ids, _, segment_ids = collate(rows, rows)  # (B, T) each
    if type(model) is Seq2Seq:
        source, ids = ids, torch.tensor([[tokenizer.bos_id, V]] * len(asked))
        for _ in range(most):
            logits = model(ids, segment_ids=ids * 0, source=source, source_ids=segment_ids)  # (B, t, V')
            ids = torch.cat((ids, draw(logits[:, -1])), 1)
        said = ids[:, 2:]
        done = ((said == tokenizer.end_id) | (said >= V)).cumsum(1) > 0
        return [row[~end].tolist() for row, end in zip(said, done)]
    while (hidden := ids == V).any():
        logits = model(ids, segment_ids=segment_ids)  # (B, T, V + 1)
        logits = logits.index_fill(-1, torch.tensor([*never, tokenizer.end_id, V]), -torch.inf)
        sure = logits.softmax(-1).amax(-1).masked_fill(~hidden, 0).argmax(1, keepdim=True)  # (B, 1)
        drawn = draw(logits.take_along_dim(sure[..., None], 1)[:, 0])
        ids = torch.where(hidden, ids.scatter(1, sure, drawn), ids)
    return [row[len(left):len(left) + n] for row, (left, _, n) in zip(ids.tolist(), asked)]


def facts(world, tokenizer) -> dict[str, list]:
    """{where it stands: [(left, right, answer)]}: facts in ids, with another fact of the person beside it."""
    rng, people, found = random.Random(1), truth.load(world), {"last": [], "in the middle": [], "first": []}
    for person, kind in [(name, kind) for name, its in people.items() for kind in its if kind != "code"]:
        its, other = people[person], rng.choice([each for each in people[person] if each != kind])
        form = rng.choice([form for form in words.STATEMENTS[kind] if form.endswith("}.")])
        beside = fill(rng.choice(words.STATEMENTS[other]), person, its[other])
        for where, asked in found.items():
            he = where == "first"  # the name comes behind the fact, as where a window begins inside of a text
            begun = fill(form.rsplit(" {", 1)[0], person, pronoun=he)
            answer = tokenizer.encode(fill(form, person, its[kind], he)[len(begun):-1])
            left = tokenizer.encode(f"{beside} {begun}" if where == "last" else begun)
            right = tokenizer.encode("" if where == "last" else f". {beside}")
            asked.append(([tokenizer.bos_id] * (not he) + left, right, answer))
    return found


def pseudo_loss(model, tokenizer, texts) -> float:
    """Mean -log p(token | all others); its exp is the pseudo-perplexity (Salazar et al. 2020)."""
    losses = []
    for text in texts:
        ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text)])  # (T,)
        hidden = torch.eye(len(ids), dtype=torch.bool)[1:]  # (T - 1, T): row t hides token t + 1
        logp = model(ids.masked_fill(hidden, tokenizer.vocab_size), ids.masked_fill(~hidden, IGNORE))
        losses += (-logp[hidden]).tolist()
    return statistics.mean(losses)


def kinds_told(model, tokenizer, train, test) -> dict[str, float]:
    """From the mean of a question's last hidden states, by ridge regression on indicators of its kind."""
    rows = [[tokenizer.bos_id, *tokenizer.encode(each.messages[0]["content"])] for each in train + test]
    ids, _, segment_ids = collate(rows, rows)  # (n, T) each
    model.head = torch.nn.Identity()
    x = model.encode(ids, segment_ids) if type(model) is Seq2Seq else model(ids, segment_ids=segment_ids)
    x = (x * (segment_ids >= 0)[..., None]).sum(1)  # (n, C)
    x, found = F.normalize(x - x.mean(0)), {}
    Y = F.one_hot(torch.tensor([KINDS.index(each.tag) for each in train + test])) - 0.25  # (n, kinds)
    for n in (20, 100, 500):
        W = torch.linalg.solve(x[:n].T @ x[:n] + 0.1 * torch.eye(x.shape[1]), x[:n].T @ Y[:n])  # (C, kinds)
        right = (x[len(train):] @ W).argmax(1) == Y[len(train):].argmax(1)
        found[f"kind of question from {n} labels, %"] = 100 * right.float().mean().item()
    return found


@torch.no_grad()
def measure(objective: str, world: Path) -> dict[str, float]:
    """Train, unless it is done, and ask."""
    out, flags = Path("out", world.name, objective), f"--objective {objective} {FLAGS} {RUNS[objective]}"
    for made, command in (
            (world / "facts.json", f"-m village.world --people 40 --seed {world.name[-1]} --out {world}"),
            (out / "final", f"train_objectives.py --data {world}/pretrain.txt --out {out} {flags}")):
        if not made.exists():
            subprocess.run([sys.executable, *command.split()], check=True)
    config, weights = load_final(str(out))
    model = {"clm": GPT, "mlm": Encoder, "seq2seq": Seq2Seq}[objective](Shape(**config["model"]))
    model.load_state_dict(weights)
    tokenizer, people = Tokenizer.load(str(out / "final/tokenizer.json")), truth.load(world)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    log = [line for line in map(json.loads, lines) if "targets" in line]
    found = {"targets, % of the tokens read": statistics.mean(line["targets"] / 10.24 for line in log),
             "microseconds a token": statistics.median(1e6 / line["tokens_per_second"] for line in log)}
    for where, asked in facts(world, tokenizer).items():
        said = complete(model, tokenizer, [(left, right, len(answer)) for left, right, answer in asked])
        right = [ids[:len(answer)] == answer for ids, (*_, answer) in zip(said, asked)]
        found[f"facts completed, {where}, %"] = 100 * statistics.mean(right)
    texts, found["loss of a token"] = read_corpus(f"{world}/heldout.txt")[:40], math.nan
    if objective != "seq2seq":
        found["loss of a token"] = pseudo_loss(model, tokenizer, texts) if objective == "mlm" else perplexity(
            model, tokenizer, texts, 0, 16)["loss"]
    torch.manual_seed(0)
    written = complete(model, tokenizer, [([tokenizer.bos_id], [], 60)] * 100, 1.0)
    claims = [100.0 * (people[who].get(kind) == value) for ids in written
              for who, kind, value in truth.claims(tokenizer.decode(ids), "") if who in people]
    found |= {"claims in 100 written texts": len(claims), "true, %": statistics.mean(claims or [math.nan])}
    train = [each for each in read_chats(f"{world}/sft.jsonl") if len(each.messages) == 2][:500]
    test = [each for each in read_prompts(f"{world}/heldout.jsonl")
            if len(each.messages) == 1 and each.tag in KINDS]
    return found | kinds_told(model, tokenizer, train, test)


def main() -> None:
    worlds = [Path("data", f"objectives-{seed}") for seed in (1, 2, 3)]
    found = {each: [measure(each, world) for world in worlds] for each in RUNS}
    print(f"| {len(worlds)} villages: mean (lowest..highest) | {' | '.join(RUNS)} |\n|---|---|---|---|")
    for name in found["clm"][0]:
        columns = [[each[name] for each in some] for some in found.values()]
        cells = [f"{statistics.mean(some):.3g} ({min(some):.3g}..{max(some):.3g})" for some in columns]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    start(main)
