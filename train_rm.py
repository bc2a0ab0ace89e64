"""Reward model: learn from rankings which of two replies people prefer, and by how much.

    P(y_i preferred to y_j | x) = sigmoid(r(x, y_i) - r(x, y_j))                     (Bradley & Terry 1952)
    minimise  loss = - mean_x 1/C(K,2) sum_{i above j} log sigmoid(r_i - r_j)   (Ouyang et al. 2022, eq. 1)

x is a prompt with K ranked replies. Each reply is read once, and all C(K,2) pairs of a prompt are compared in
one step: scattered over the epoch, they would show every reply K - 1 times. r is read at the last token, the
end of the reply, since it alone has seen everything:

    ids     b u x x e a y y e      b(os), u(ser), the prompt x, e(nd), a(ssistant), the reply y, its end
    reward                  r

    python train_rm.py --data preferences.jsonl --init out/sft --out out/rm                       one process
"""
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import CHAT_TEMPLATE, Replies, expect_chat
from lib.program import parse, start
from lib.ranks import setup
from lib.records import random_negatives, read_preferences, read_split
from lib.run import Run, RunConfig, lr_at, with_error
from lora import DeltaConfig, attach, final_of
from model import load_model
from zero import Zero


@dataclass
class Config(RunConfig, DeltaConfig):  # the flags that all stages share are in lib/run.py
    # data
    data: str = ""  # preferences: chosen and rejected, or ranked responses; files or a folder
    negatives: int = 0  # times each best reply is also compared with a random one to another prompt; 0: off
    # reward
    centre: float = 0.0  # weight of (r_i + r_j)^2, which keeps rewards near 0 (0.01 is usual); 0: off
    reference_prompts: int = 1000  # training prompts whose best replies get a mean reward of 0; 0: all
    score_gap: float = 0.0  # agreement with scores counts pairs whose scores differ by this or more
    # optimisation
    epochs: float = 1.0  # times each group (a prompt with its replies) is seen, if steps is 0
    batch_size: int = 16  # groups per update over all ranks
    lr: float = 5e-4
    # run
    out: str = "out/rm"
    init: str = "out/sft"
    eval_prompts: int = 1  # validation prompts whose replies are shown with their rewards; 0: none


def ranked_pairs(group_sizes: list[int]) -> torch.Tensor:
    """(2, pairs): the better and the worse of every pair in a group. Of all replies, the best first."""
    starts = itertools.accumulate([0, *group_sizes])
    pairs = [(start + i, start + j) for start, K in zip(starts, group_sizes)
             for i, j in itertools.combinations(range(K), 2)]
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2).T


def rm_loss(rewards, group_sizes: list[int], centre: float = 0.0):
    """Sum over groups of the mean over its pairs of -log sigmoid(r_i - r_j) + centre (r_i + r_j)^2.

    rewards (n,): group after group, the best first. Each group weighs the same, however many replies it has;
    the caller divides by the number of groups. centre: Eisenstein et al. 2023."""
    better, worse = rewards[ranked_pairs(group_sizes).to(rewards.device)]  # (pairs,) twice
    losses = -F.logsigmoid(better - worse) + centre * (better + worse).square()
    weights = [2 / (K * (K - 1)) for K in group_sizes for _ in range(K * (K - 1) // 2)]  # 1/C(K,2)
    return (losses * losses.new_tensor(weights)).sum()


def wins(differences):
    """1 where it is above 0, and 0.5 for a tie: a model that says 0 to everything is half right."""
    return (differences.sign() + 1) / 2


def pair_metrics(rewards, group_sizes: list[int]) -> dict:
    """accuracy and margin over pairs, and the range of the rewards (n,)."""
    better, worse = rewards[ranked_pairs(group_sizes)]  # (pairs,) twice
    return {"accuracy": wins(better - worse).mean().item(), "margin": (better - worse).mean().item(),
            **{f"{name}_reward": getattr(rewards, name)().item() for name in ("min", "mean", "max")}}


def calibration_error(differences, n_bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3) of sigmoid(r_i - r_j) as a probability: over
    bins of the confidence in the favourite, 0.5 to 1, |how often it was preferred - mean confidence|."""
    confidence = differences.abs().sigmoid()
    bins = ((confidence - 0.5) * 2 * n_bins).long().clamp(0, n_bins - 1)
    gaps = torch.zeros(n_bins, dtype=confidence.dtype).index_add_(0, bins, wins(differences) - confidence)
    return (gaps.abs().sum() / len(differences)).item()


def read_rewards(model, rows):
    """The reward of each reply, at its end: rows ReplyRows -> (n,)."""
    return model(rows.ids, segment_ids=rows.segment_ids)[rows.ends[0], rows.ends[1]]


@torch.no_grad()
def all_rewards(model, replies: Replies, which: list[int], size: int, ranks):
    """Rewards of all replies of these groups, (n,) float64, known to all ranks."""
    rewards = torch.zeros(sum(replies.sizes(which)))
    for rows in replies.batches(which, size, ranks.rank, ranks.world):
        rewards[rows.at] = read_rewards(model, rows.to(ranks.device)).cpu()
    return ranks.all_reduce(rewards).cpu().double()


def kinds_of_pairs(replies: Replies, pairs) -> dict[str, list[int]]:
    """{kind: its pairs}. A pair has up to two kinds: its record's tag, and its two replies' tags as "a|b"."""
    tags = [tag for record in replies.records for tag in record.tags or [""] * len(record.responses)]
    topics = [record.tag for record in replies.records for _ in record.responses]
    kinds = defaultdict(list)
    for n, (i, j) in enumerate(pairs.T.tolist()):
        kinds[topics[i]].append(n)
        kinds["|".join(sorted((tags[i], tags[j]))) if tags[i] and tags[j] else ""].append(n)
    kinds.pop("", None)
    return kinds


def evaluate(rewards, replies: Replies, cfg: Config) -> dict:
    """What the rewards (n,) of all replies are worth against the labels, for all pairs and by kind of pair.

    accuracy: of pairs; its error: of prompts, whose pairs are not independent. agreement: accuracy against
    the order of the replies' scores, which have no noise. ceiling: accuracy of that order on the labels."""
    if not len(replies):
        return {}
    sizes = replies.sizes(range(len(replies)))
    pairs = ranked_pairs(sizes)  # (2, pairs)
    differences = rewards[pairs[0]] - rewards[pairs[1]]  # (pairs,)
    scores = [s for record in replies.records for s in record.scores or [math.nan] * len(record.responses)]
    better, worse = torch.tensor(scores, dtype=torch.float64)[pairs]  # (pairs,) twice
    gaps = better - worse  # NaN where there are no scores: then neither of the next two is true
    known, differ = gaps.abs() >= 0, (gaps.abs() > 0) & (gaps.abs() >= cfg.score_gap - 1e-9)
    of_prompts = [part.mean() for part in wins(differences).split([math.comb(K, 2) for K in sizes])]
    result = {"loss": rm_loss(rewards, sizes, cfg.centre).item() / len(sizes),
              **with_error("accuracy", torch.stack(of_prompts), share=True),  # its mean is replaced below
              **pair_metrics(rewards, sizes), "calibration_error": calibration_error(differences)}
    for kind, members in {"": list(range(len(differences))), **kinds_of_pairs(replies, pairs)}.items():
        chosen = torch.zeros(len(differences), dtype=torch.bool).index_fill(0, torch.tensor(members), True)
        for name, right, counted in (("accuracy", wins(differences), chosen),
                                     ("agreement", wins(differences * gaps), chosen & differ),
                                     ("ceiling", wins(gaps), chosen & known)):
            if counted.any():
                result[f"{name}/{kind}".rstrip("/")] = right[counted].mean().item()
        result[f"pairs/{kind}".rstrip("/")] = len(members)
    return {f"eval_{name}": value for name, value in result.items()}


def main(argv=None) -> int:
    cfg = parse(Config, argv, __doc__)
    ranks = setup(cfg.device)  # this process and its peers: rank, world, device, sum()

    # model
    model, tokenizer, born = load_model(cfg.init, head="scalar", attention=cfg.attention)
    expect_chat(cfg.init, born)
    attach(model, cfg, born)  # with --tune: a delta, and the rest frozen
    cfg.fit_rows(model.config.max_seq_len)
    zero = Zero(model, units=model.units(), **cfg.zero_options(ranks))

    # data
    ranked, held_out, *read = read_split(read_preferences, cfg)
    ranked += random_negatives(ranked, cfg.negatives, cfg.seed)
    train, val = (Replies(part, tokenizer, cfg.seq_len, batch_size=cfg.batch_size, seed=cfg.seed)
                  for part in (ranked, held_out))
    cfg.fit_steps(len(train))

    run = Run(cfg, ranks, {"model": zero}, tokenizer, inputs={"data": train.fingerprint()},
              final={"head": "scalar", "chat_template": CHAT_TEMPLATE}, read=read)
    run.say(f"training: {train.report()}\nvalidation: {val.report()}\nchat template: {CHAT_TEMPLATE}")
    micro = cfg.micro_batch_size  # groups per forward

    def evaluate_and_show() -> dict:
        rewards = all_rewards(model, val, range(len(val)), micro or 16, ranks)  # (n,)
        shown = [text for record in val.records[:cfg.eval_prompts] for text in record.responses]
        for text, reward in zip(shown, rewards.tolist()):
            run.say(f"    {reward:8.3f} {text!r}")
        return evaluate(rewards, val, cfg)

    for step in run.steps(evaluate_and_show):
        batch = train.of_step(step - 1)  # numbers of batch_size groups
        rewards, n_read = torch.zeros(sum(train.sizes(batch))), 0
        mean_loss = torch.zeros((), device=ranks.device)
        for rows in train.batches(batch, micro, ranks.rank, ranks.world):
            part = read_rewards(model, rows.to(ranks.device))  # (n,)
            loss = rm_loss(part, rows.sizes, cfg.centre) / cfg.batch_size  # ONE denominator
            zero.backward(loss)
            rewards[rows.at] = part.detach().cpu()
            mean_loss += loss.detach()
            n_read += int((rows.segment_ids >= 0).sum())
        lr = lr_at(step, cfg)
        info = zero.step(lr, cfg.clip)
        mean_loss, n_read = ranks.sum(mean_loss, n_read)
        rewards = ranks.all_reduce(rewards).cpu()  # each rank knew its own
        run.log(step, tokens=n_read, skipped=info.skipped, loss=mean_loss,
                **pair_metrics(rewards, train.sizes(batch)), grad_norm=info.norm, learning_rate=lr,
                epoch=step * cfg.batch_size / len(train))
    if run.stopped:
        return run.finish()
    # The loss knows r only up to a constant. We choose it: the mean over the best replies becomes 0.
    known = [g for g, each in enumerate(train.records) if not each.negative][:cfg.reference_prompts or None]
    rewards = all_rewards(model, train, known, micro or 16, ranks)  # (n,)
    best = [0, *itertools.accumulate(train.sizes(known))][:-1]  # each group's first reply
    mean, std = rewards[best].mean().item(), rewards.std().item()
    run.event(cfg.steps, reference_mean=mean, reward_std=std)
    bias = "head.tuned.bias" if cfg.tune else "head.bias"
    change = final_of(model, lambda weights: weights[bias].sub_(mean))
    return run.finish(change, reward_std=std, reference="best")


if __name__ == "__main__":
    start(main)
