"""The scorecard of the Village: what the judge says of a model's replies to the held-out questions.

    python -m village.scorecard --model out/dpo --village data/village --against out/sft
    python -m village.scorecard --model out/sft --village data/village --rm out/rm --best_of 16
    python -m village.scorecard --village data/village --rollouts out/ppo/samples.jsonl  PPO step by step
    python -m village.scorecard --cards out/sft,out/ppo,out/dpo  scorecards side by side

Each question is answered at temperature 1 ("sampled") and greedily. docs/village.md explains every figure.
"""
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import encode_prompt, expect_chat
from evaluate import Progress, Reply, draw, perplexity, save_figures, score
from lib.corpora import read_corpus
from lib.program import UserError, parse, require_positive, start
from lib.ranks import setup
from lib.records import prompt_of, read_prompts, read_records
from lora import load_tuned
from model import LMHead, load_model
from village import truth, words, world


@dataclass
class Config:
    model: str = "out/sft"  # folder of a run, or of a finished model
    delta: str = ""  # folder of a run with --tune whose base --model is; empty: none
    village: str = "data/village"  # folder of the world
    against: str = ""  # another model, for the win rate and the KL to it; empty: none
    rm: str = ""  # a reward model, to score the replies and choose the best of several; empty: none
    best_of: int = 0  # replies per prompt, of which the truth and the reward model choose the best; 0: none
    best_of_prompts: int = 50  # prompts of each kind for that
    rollouts: str = ""  # instead of a model: samples.jsonl of a PPO run
    cards: str = ""  # instead of a model: comma list of folders with a scorecard.json
    max_new_tokens: int = 48  # longest reply
    batch_size: int = 16  # rows at once; four times as many replies are drawn at once
    seed: int = 1  # of the replies
    device: str = "auto"  # auto, cpu, cuda, cuda:N


CARD = 13  # what random numbers are for, as in sample.py


@dataclass
class Judged(Reply):
    tag: str  # the kind of question
    gold: dict  # what truth.gold says


def replies_to(model, tokenizer, people, records, cfg: Config, temperature: float, k: int = 1):
    """k replies to each prompt, prompt by prompt. Reply j to prompt i depends on (seed, i, j) alone."""
    asked = [record for record in records for _ in range(k)]
    prompts = [encode_prompt(tokenizer, record.messages) for record in asked]
    seeds = [(cfg.seed, CARD, i, j) for i in range(len(records)) for j in range(k)]
    drawn = draw(model, tokenizer, prompts, seeds, batch_size=4 * cfg.batch_size, temperature=temperature,
                 max_new_tokens=cfg.max_new_tokens, progress=Progress("replies"))
    return [Judged(**vars(reply), tag=record.tag,
                   gold=truth.gold(people, record.messages, reply.text, reply.ended))
            for record, reply in zip(asked, drawn)]


def weighted(replies: list[Judged], numbers) -> tuple[float, float]:
    """(mean, standard error) of a number per reply. Kinds of questions weigh as much as in training."""
    tags, numbers, mean, variance = np.array([reply.tag for reply in replies]), np.array(numbers), 0.0, 0.0
    for tag, share in world.SHARES.items():  # 0 for withheld: training never asks for it
        some = numbers[tags == tag]
        mean, variance = mean + share * some.mean(), variance + share**2 * some.var() / len(some)
    return float(mean), math.sqrt(variance)


def tally(replies: list[Judged]) -> dict[str, float]:
    """What the judge says of one reply per prompt. Shares are in percent."""
    tags = Counter(reply.tag for reply in replies)
    kinds = Counter((reply.tag, reply.gold["kind"]) for reply in replies)
    texts = [reply.text.split() for reply in replies]
    runs = [[*zip(*(text[i:] for i in range(4)))] for text in texts]  # of four words
    gold, error = weighted(replies, [reply.gold["score"] for reply in replies])

    def share(tag: str, *wanted: str) -> float:
        return 100 * sum(kinds[tag, kind] for kind in wanted) / max(1, tags[tag])

    return {"right": share("known", "right"), "needless": share("known", "needless"),
            **{f"invented_{tag}": share(tag, "invented") for tag in ("untold", "elsewhere", "withheld")},
            "code_given": share("code", "leaked", "granted"), "code_leaked": share("code", "leaked"),
            "repeated_4grams": 100 * sum(len(x) - len(set(x)) for x in runs) / max(1, sum(map(len, runs))),
            "courtesies": float(np.mean([len(words.COURTESY.findall(reply.text)) for reply in replies])),
            "words": float(np.mean([len(text) for text in texts])),
            "ended": 100 * float(np.mean([reply.ended for reply in replies])),
            "gold": gold, "gold_standard_error": error}


def scorecard(model, tokenizer, people, cfg: Config) -> dict:
    """All figures of a model that can answer."""
    device, records = model.cos.device, read_prompts(Path(cfg.village) / "heldout.jsonl")
    other = load_model(cfg.against, head="lm")[0].to(device) if cfg.against else None
    rm = load_model(cfg.rm)[0].to(device) if cfg.rm else None
    if rm and isinstance(rm.head, LMHead):
        raise UserError(f"{cfg.rm}: found a language model, expected a reward model")
    card = {"model": cfg.delta or cfg.model, "village": cfg.village,
            "prompts": Counter(record.tag for record in records)}
    for way, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        replies = replies_to(model, tokenizer, people, records, cfg, temperature)
        card[way] = tally(replies)
        if other:
            theirs = replies_to(other, tokenizer, people, records, cfg, temperature)
            better = np.array([a.gold["score"] - b.gold["score"] for a, b in zip(replies, theirs)])
            card[way]["win_rate"] = 100 * weighted(replies, 0.5 * (better > 0) + 0.5 * (better >= 0))[0]
    if other:  # `replies` are those at temperature 1 now: over them the mean of log p - log p_other is the KL
        logp, other_logp = (score(its, tokenizer, replies, cfg.batch_size) for its in (model, other))
        card |= {"against": cfg.against, "kl": weighted(replies, np.subtract(logp, other_logp))[0]}
    if rm:
        card["rm"] = cfg.rm
        card["sampled"]["reward"] = weighted(replies, score(rm, tokenizer, replies, cfg.batch_size))[0]
    if cfg.best_of:
        card["best_of"] = best_of(model, tokenizer, people, records, rm, cfg)
    biographies = read_corpus(f"{cfg.village}/heldout.txt")
    card["biographies_loss"] = perplexity(model, tokenizer, biographies, 0, cfg.batch_size)["loss"]
    return card


def best_of(model, tokenizer, people, records, rm, cfg: Config) -> list[dict]:
    """The figures of the best of n = 1, 2, 4, ..., best_of replies, where the truth chooses ("gold") or the
    reward model ("rm"). kl: log n - (n - 1) / n, a bound for both (Stiennon et al. 2020, appendix G.3)."""
    some = [record for tag in world.SHARES
            for record in [each for each in records if each.tag == tag][: cfg.best_of_prompts]]
    drawn, rows = replies_to(model, tokenizer, people, some, cfg, 1.0, cfg.best_of), []
    numbers = {"gold": [reply.gold["score"] for reply in drawn]}
    if rm:
        numbers["rm"] = score(rm, tokenizer, drawn, cfg.batch_size)
    for n in [2**i for i in range(cfg.best_of.bit_length()) if 2**i < cfg.best_of] + [cfg.best_of]:
        rows.append({"n": n, "kl": math.log(n) - (n - 1) / n, "prompts": len(some)})
        for chooser, its in numbers.items():
            best = [max(range(i, i + n), key=its.__getitem__) for i in range(0, len(drawn), cfg.best_of)]
            rows[-1][chooser] = tally([drawn[i] for i in best])
    return rows


def judge_rollouts(people: dict, path: str) -> list[dict]:
    """Per step of a PPO run, means over its replies: the reward model's score, the truth, and the KL."""
    steps = defaultdict(list)
    for line in read_records(path, strict=True):
        if not {"step", "prompt", "responses", "ended", "reward", "kl"} <= line.keys():
            raise UserError(f"{path}: found {list(line)}, expected rollouts as train_ppo.py writes them")
        messages = prompt_of(line).messages
        golds = [truth.gold(people, messages, *reply)["score"]
                 for reply in zip(line["responses"], line["ended"])]
        steps[line["step"]] += zip(line["reward"], golds, line["kl"])
    return [{"step": step, **dict(zip(("reward", "gold", "kl"), np.mean(rows, axis=0).tolist()))}
            for step, rows in sorted(steps.items())]


def side_by_side(folders: list[str]) -> dict[str, dict]:
    """{model: its figures at temperature 1}, and those of the best of n replies that a reward model chose."""
    found = {}
    for folder in folders:
        path, name = Path(folder) / "scorecard.json", Path(folder).name
        card = read_records(path, strict=True)[0]
        if not (isinstance(card, dict) and {"sampled", "prompts"} <= card.keys()):
            raise UserError(f"{path}: found no scorecard of replies; python -m village.scorecard writes one")
        found[name] = {"prompts": sum(card["prompts"].values()), "kl": card.get("kl", "-")} | card["sampled"]
        row = card.get("best_of", [{}])[-1]
        if "rm" in row:
            found[f"best {row['n']} of {name}"] = {"prompts": row["prompts"], "kl": row["kl"], **row["rm"]}
    return found


def show(columns: dict[str, dict]) -> None:
    """{column: {row: number}} as a table."""
    print(" " * 20 + "".join(f"{name:>16}" for name in columns))
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        numbers = [column.get(row, "-") for column in columns.values()]
        print(f"{row:20}" + "".join(f"{x:16.2f}" if isinstance(x, float) else f"{x:>16}" for x in numbers))


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    require_positive(cfg, "batch_size", "max_new_tokens", "best_of_prompts")
    if cfg.cards:
        return show(side_by_side(cfg.cards.split(",")))
    people = truth.load(cfg.village)
    if cfg.rollouts:
        rows = judge_rollouts(people, cfg.rollouts)
        for row in rows[:: -(-len(rows) // 10)]:  # the file has them all
            print("step {step:5}: reward {reward:7.3f}, gold {gold:6.3f}, KL {kl:6.3f}".format(**row))
        return save_figures(Path(cfg.rollouts).with_name("rollouts.json"), rows)
    model, tokenizer, config = load_tuned(cfg.model, cfg.delta, head="lm")
    model.to(setup(cfg.device, catch_signals=False).device)
    expect_chat(cfg.delta or cfg.model, config)
    card = scorecard(model, tokenizer, people, cfg)
    besides = {name: card.get(name, "-") for name in ("biographies_loss", "kl")}
    show({"sampled": card["sampled"] | besides, "greedy": card["greedy"]})
    save_figures(Path(cfg.delta or cfg.model) / "scorecard.json", card)


if __name__ == "__main__":
    start(main)
