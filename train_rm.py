"""Reward model: learn from rankings which of two replies people prefer, and by how much.

    P(y_i preferred to y_j | x) = sigmoid(r(x, y_i) - r(x, y_j))                                (Bradley & Terry 1952)
    minimise  L = - mean_x 1/C(K,2) sum_{i ranked above j} log sigmoid(r_i - r_j)     (Ouyang et al. 2022, equation 1)

x is a prompt with K ranked replies; each is read once, and all C(K,2) pairs of a prompt are compared in one step, since
scattered over the epoch they would show every reply K - 1 times. (--negatives makes groups of its own: the best reply
is read again in each of its pairs.) r is read at the last token, the end of the reply, which alone has seen everything:

    ids     b u x x e a y y e      b(os), u(ser), the prompt x, e(nd), a(ssistant), the reply y, its end
    reward                  r

    python train_rm.py --data preferences.jsonl --init out/sft --out out/rm                         one process
    torchrun --nproc_per_node 2 train_rm.py --data preferences.jsonl --init out/sft --zero 3 --out out/two
    python train_rm.py --data preferences.jsonl --init out/sft --steps 5 --eval_every 0 --out out/toy    a first try
"""
from __future__ import annotations

import dataclasses
import itertools
import math
import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from data import CHAT_TEMPLATE, Replies
from lib.checkpoint import claim, final_folder, load_checkpoint, save_checkpoint, save_final
from lib.program import Log, UserError, matmul_peak, parse, require_positive, start
from lib.ranks import setup
from lib.records import random_negatives, read_preferences, split_prompts
from model import load_model
from zero import Zero


@dataclass
class Config:
    # data
    data: str = ""  # preferences: .json or .jsonl (or .gz) with chosen and rejected, or ranked responses
    val_data: str = ""  # preferences to validate on; empty: the last val_fraction of data
    val_fraction: float = 0.1  # of the prompts
    pack: bool = True  # several replies in a row; off: one, padded
    seq_len: int = 0  # tokens in a row (T); 0: the longest the model was made for
    negatives: int = 0  # times each best reply is also compared with a random one to another prompt, as a pair; 0: off
    # reward
    margin: float = 0.0  # by how much a better reply should be above a worse one, a constant (see rm_loss); 0: off
    centre: float = 0.0  # weight of (r_i + r_j)^2, which keeps rewards near 0 (0.01 is usual); 0: off
    reference: Literal["best", "all"] = "best"  # replies whose mean reward becomes 0: the best of each prompt, or all
    reference_prompts: int = 1000  # training prompts whose replies set zero and scale; 0: all
    unit_scale: bool = False  # divide the reward by its deviation over replies; then its sigmoid is no probability
    score_gap: float = 0.0  # agreement with scores counts pairs whose scores differ by this or more
    # optimisation
    epochs: float = 1.0  # times each group (a prompt with its replies, or a negative's pair) is seen, if steps is 0
    steps: int = 0  # updates; 0: as many as epochs takes
    batch_size: int = 16  # groups per update over all ranks
    micro_batch_size: int = 0  # groups per rank and forward; 0: the rank's whole share at once
    lr: float = 5e-4  # peak learning rate
    min_lr: float = 0.0  # learning rate at the last step
    warmup_steps: int = 10  # updates over which the rate climbs from 0
    decay: Literal["cosine", "linear", "flat-then-linear"] = "linear"  # how it falls afterwards
    weight_decay: float = 0.0  # AdamW's, on matrices and embeddings; 0: off
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's memories of the gradient and of its square
    eps: float = 1e-8  # AdamW's
    clip: float = 1.0  # largest gradient norm; 0: off
    # run
    out: str = "out/rm"  # folder of this run: checkpoints, metrics.jsonl, final/
    init: str = "out/sft"  # folder of the finished model to start from (weights and tokenizer)
    resume: bool = False  # go on from the newest checkpoint in out
    eval_every: int = 100  # updates between evaluations; 0: only at the end
    eval_prompts: int = 1  # validation prompts whose replies are shown with their rewards; 0: none
    save_every: int = 400  # updates between checkpoints; 0: only at the end
    keep: int = 2  # checkpoints kept
    log_every: int = 20  # updates between log lines
    seed: int = 1  # of the order of the prompts
    # [copy: machine]
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of weights and activations in forward and backward
    attention: Literal["flash", "sdpa", "naive"] = "flash"  # ours, PyTorch's C++ kernel, the ten lines
    zero: Literal[0, 1, 2, 3] = 0  # ZeRO stage: what is sharded over the ranks
    offload: str = ""  # to host memory: comma list of optim, params, acts; and disk: the optimizer's part in files
    activation_checkpointing: bool = False  # recompute each block in backward instead of keeping its activations
    compile: bool = False  # torch.compile each block
    # [end copy]


# [copy: lr_at]
def lr_at(step: int, cfg: Config) -> float:
    """Learning rate of update `step` (1..steps): linear warmup, then decay to min_lr, reached at the last update."""
    if step < cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)  # 0..1
    if cfg.decay == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    elif cfg.decay == "linear":
        left = 1 - done
    else:
        left = min(1.0, (1 - done) / 0.6)  # flat for the first 40 %
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * left
# [end copy]


def ranked_pairs(group_sizes: list[int]) -> torch.Tensor:
    """(2, pairs): of every pair inside a group the better and the worse, numbered through all groups, best first."""
    starts = itertools.accumulate([0, *group_sizes])
    pairs = [(start + i, start + j) for start, K in zip(starts, group_sizes) for i, j in
             itertools.combinations(range(K), 2)]
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2).T


def rm_loss(rewards, group_sizes: list[int], margin: float = 0.0, centre: float = 0.0):
    """Sum over groups of the mean over its pairs of -log sigmoid(r_i - r_j - margin) + centre (r_i + r_j)^2.

    rewards (n,): group after group, the best first. Each group weighs the same, however many replies it has; the
    caller divides by the number of groups. centre: Eisenstein et al. 2023. margin: Touvron et al. 2023, equation 2,
    where it depends on how much better the rating was; here it is a constant. With it P = sigmoid(r_i - r_j - margin),
    which does not sum to 1 over both orders: sigmoid(r_i - r_j) is then too sure, and calibration_error says so.
    """
    better, worse = rewards[ranked_pairs(group_sizes).to(rewards.device)]  # (pairs,) twice
    losses = -F.logsigmoid(better - worse - margin) + centre * (better + worse).square()  # logsigmoid never overflows
    weights = [2 / (K * (K - 1)) for K in group_sizes for _ in range(K * (K - 1) // 2)]  # 1/C(K,2)
    return (losses * losses.new_tensor(weights)).sum()


def wins(differences):
    """1 where it is above 0, and 0.5 for a tie: a model that says 0 to everything is half right, not always wrong."""
    return (differences.sign() + 1) / 2


def pair_metrics(rewards, group_sizes: list[int]) -> dict:
    """accuracy and margin over pairs, and the range of the rewards (n,)."""
    better, worse = rewards[ranked_pairs(group_sizes)]  # (pairs,) twice
    return {"accuracy": wins(better - worse).mean().item(), "margin": (better - worse).mean().item(),
            **{f"{name}_reward": getattr(rewards, name)().item() for name in ("min", "mean", "max")}}


def calibration_error(differences, n_bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3) of sigmoid(r_i - r_j), which should be how often i is
    preferred: over bins of the model's confidence in its favourite, 0.5 to 1, |how often it was right - confidence|."""
    confidence = differences.abs().sigmoid()
    bins = ((confidence - 0.5) * 2 * n_bins).long().clamp(max=n_bins - 1)
    gaps = torch.zeros(n_bins, dtype=confidence.dtype).index_add_(0, bins, wins(differences) - confidence)
    return (gaps.abs().sum() / len(differences)).item()


def normalise(weights: dict, mean: float, std: float) -> None:
    """r <- (r - mean) / std, in place. The loss knows r only up to a constant per prompt: zero and unit are ours to
    choose, and linear in the head."""
    weights["head.weight"] /= std
    weights["head.bias"] -= mean
    weights["head.bias"] /= std


def read_rewards(model, rows):
    """The reward of each reply, at its end: rows ReplyRows -> (n,)."""
    return model(rows.ids, segment_ids=rows.segment_ids)[rows.ends[0], rows.ends[1]]


@torch.no_grad()
def all_rewards(model, replies: Replies, chosen: list[int], size: int, env):
    """Rewards of all replies of the chosen groups, (n,) float64, known to all ranks."""
    rewards = torch.zeros(sum(replies.sizes(chosen)))
    for rows in replies.batches(chosen, size, env.rank, env.world):
        rewards[rows.at] = read_rewards(model, rows.to(env.device)).cpu()
        env.check_stop()
    return torch.tensor(env.sum(*rewards), dtype=torch.float64)


def evaluate(rewards, replies: Replies, cfg: Config) -> dict:
    """What the rewards (n,) of all replies are worth: loss and accuracy against the labels, also by kind of pair.

    A pair's kind is its two replies' tags, "a|b"; a record's tag is reported too. With scores, which are noise-free:
    agreement is the accuracy against their order, ceiling the accuracy that their own order has against the labels.
    """
    sizes = replies.sizes(range(len(replies)))
    pairs = ranked_pairs(sizes)  # (2, pairs)
    differences = rewards[pairs[0]] - rewards[pairs[1]]  # (pairs,)
    loss = rm_loss(rewards, sizes, cfg.margin, cfg.centre).item() / len(sizes)
    if not math.isfinite(loss):
        raise UserError(f"the validation loss is {loss}; lower --lr, or use --dtype float32 or bfloat16")
    tags = [tag for record in replies.records for tag in record.tags or [""] * len(record.responses)]
    topics = [record.tag for record in replies.records for _ in record.responses]
    scores = [score for record in replies.records for score in record.scores or [math.nan] * len(record.responses)]
    kinds = {"": list(range(len(differences)))}
    for n, (i, j) in enumerate(pairs.T.tolist()):
        for kind in filter(None, (topics[i], "|".join(sorted((tags[i], tags[j]))) if tags[i] and tags[j] else "")):
            kinds.setdefault(kind, []).append(n)
    gaps = torch.tensor(scores, dtype=torch.float64)[pairs]  # (2, pairs)
    gaps = gaps[0] - gaps[1]  # nan where there are no scores, and then in none of the masks
    known, differ = gaps.abs() >= 0, (gaps.abs() > 0) & (gaps.abs() >= cfg.score_gap - 1e-9)
    result = {"loss": loss, **pair_metrics(rewards, sizes), "calibration_error": calibration_error(differences)}
    for kind, members in sorted(kinds.items()):
        chosen = torch.zeros(len(differences), dtype=torch.bool)
        chosen[members] = True
        for name, right, counted in (("accuracy", wins(differences), chosen),
                                     ("agreement", wins(differences * gaps), chosen & differ),
                                     ("ceiling", wins(gaps), chosen & known)):
            if counted.any():
                result[f"{name}/{kind}".rstrip("/")] = right[counted].mean().item()
        result[f"pairs/{kind}".rstrip("/")] = len(members)
    return {f"eval_{name}": value for name, value in result.items()}


def main(argv=None) -> int:
    cfg = parse(Config, argv, __doc__)
    require_positive(cfg, "batch_size", "log_every", "keep")
    if not cfg.data:
        raise UserError("--data: found nothing, expected a file of preferences")
    env = setup(cfg.device)

    # model
    model, tokenizer, born = load_model(cfg.init, head="scalar", attention=cfg.attention)
    tokenizer_path = os.path.join(final_folder(cfg.init), "tokenizer.json")
    if born.get("chat_template") != CHAT_TEMPLATE:
        raise UserError(f"--init {cfg.init}: found another chat template; train it to chat with train_sft.py")
    cfg.seq_len = cfg.seq_len or model.config.max_seq_len
    if cfg.seq_len > model.config.max_seq_len:
        raise UserError(f"--seq_len {cfg.seq_len}: the model's rows end at {model.config.max_seq_len}; lower it")

    # data: read and encoded by every rank, since conversations are small
    ranked, held_out = split_prompts(read_preferences(cfg.data), cfg.val_fraction,
                                     read_preferences(cfg.val_data) if cfg.val_data else None)
    train, val = (Replies(part, tokenizer, cfg.seq_len, packed=cfg.pack, batch_size=cfg.batch_size, seed=cfg.seed)
                  for part in (ranked + random_negatives(ranked, cfg.negatives, cfg.seed), held_out))
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * len(train) / cfg.batch_size)
    require_positive(cfg, "steps")

    # [copy: shard]
    parameters, flops = model.parameter_count(), model.flops_per_token(cfg.seq_len)
    zero = Zero(model, units=model.units(), device=env.device, stage=cfg.zero, dtype=getattr(torch, cfg.dtype),
                offload=tuple(filter(None, cfg.offload.split(","))), lr=cfg.lr, weight_decay=cfg.weight_decay,
                betas=cfg.betas, eps=cfg.eps, activation_checkpointing=cfg.activation_checkpointing,
                compile=cfg.compile)

    # where were we
    lock = claim(cfg.out, cfg.resume) if env.is_main else None  # noqa: F841 - held until this function returns
    env.barrier()
    # [end copy]
    config = {"model": dataclasses.asdict(model.config), "head": "scalar", "chat_template": CHAT_TEMPLATE,
              "run": dataclasses.asdict(cfg)}
    # What a resumed run must share with the one it continues, and what it should, or else its curve bends:
    same = {"model": {**config["model"], "attention": ""}, "tokenizer": tokenizer.fingerprint}
    should = {"data": train.fingerprint()} | {name: getattr(cfg, name) for name in (
        "pack", "seq_len", "margin", "centre", "batch_size", "micro_batch_size", "lr", "min_lr", "warmup_steps",
        "decay", "weight_decay", "betas", "eps", "clip", "seed", "dtype", "attention")}
    should["betas"] = list(cfg.betas)  # as JSON gives it back
    # [copy: resume]
    found = load_checkpoint(cfg.out, {"model": zero}, same=same, numbers=["skipped"],
                            bitwise=should) if cfg.resume else None
    start, extra = found or (0, {"skipped": 0})
    skipped = extra["skipped"]
    if start > cfg.steps:
        raise UserError(f"--steps {cfg.steps}: {cfg.out} is already at step {start}; give more steps")
    # [end copy]

    micro = cfg.micro_batch_size  # groups per forward
    # [copy: open_log]
    log = Log(cfg.out, env, steps=cfg.steps, start=start, flops_per_token=flops,
              peak_flops=matmul_peak(env.device, getattr(torch, cfg.dtype)))
    log.say(f"{parameters:,} parameters, {flops / 1e6:.1f} MFLOP per token; a large matrix product runs at "
            f"{log.peak_flops / 1e9:.0f} GFLOP/s per process")
    log.say(f"training: {train.report()}\nvalidation: {val.report()}\nchat template: {CHAT_TEMPLATE}")
    log.say(zero.report())
    if cfg.resume:
        log.say(f"going on after step {start}" if found else f"--resume: nothing in {cfg.out} yet, starting fresh")
    # [end copy]

    def evaluate_and_show(step: int) -> None:
        rewards = all_rewards(model, val, range(len(val)), micro or 16, env)  # (n,)
        found = evaluate(rewards, val, cfg)
        for kind in sorted({name.partition("/")[2] for name in found}):  # a line each; all pairs together come first
            log.event(step, **{name: value for name, value in found.items() if name.partition("/")[2] == kind})
        for record in val.records[:cfg.eval_prompts]:
            log.say(f"    {record.messages[-1]['content']!r}")
            for text, reward in zip(record.responses, rewards.tolist()):
                log.say(f"    {reward:8.3f} {text!r}")
            rewards = rewards[len(record.responses):]

    # the loop: exactly cfg.steps updates, numbered from 1; evaluation and checkpoint also at the last
    if start == cfg.steps or extra.get("due"):
        evaluate_and_show(start)  # finished before: say how it went; or stopped there before it was evaluated
        log.restart_clock()
    for step in range(start + 1, cfg.steps + 1):
        chosen = train.of_step(step - 1)  # batch_size groups: ONE denominator, whatever the split
        rewards, loss_sum, n_read = torch.zeros(sum(train.sizes(chosen))), torch.zeros((), device=env.device), 0
        for rows in train.batches(chosen, micro, env.rank, env.world):
            at, rows = rows.at, rows.to(env.device)
            part = read_rewards(model, rows)  # (n,)
            loss = rm_loss(part, rows.sizes, cfg.margin, cfg.centre) / cfg.batch_size
            zero.backward(loss)
            rewards[at] = part.detach().cpu()
            loss_sum += loss.detach()
            n_read += int((rows.segment_ids >= 0).sum())
        info = zero.step(lr_at(step, cfg), cfg.clip)
        skipped += info.skipped
        loss_sum, n_read, stop = env.sum(loss_sum, n_read, env.stop_signal != 0)
        log.count(n_read)
        last = step == cfg.steps
        if step % cfg.log_every == 0 or step == start + 1 or last:
            rewards = torch.tensor(env.sum(*rewards))  # each rank knew its own
            log.train(step, loss=loss_sum, **pair_metrics(rewards, train.sizes(chosen)), grad_norm=info.norm,
                      learning_rate=lr_at(step, cfg), epoch=step * cfg.batch_size / len(train),
                      **({"skipped": skipped} if skipped else {}))
        # [copy: evaluate_and_save]
        due = last or (cfg.eval_every and step % cfg.eval_every == 0)
        if due and not stop:  # asked to stop, save at once
            stop = env.stopped_in(evaluate_and_show, step)
            log.restart_clock()
        if last or stop or (cfg.save_every and step % cfg.save_every == 0):
            save_checkpoint(cfg.out, step, {"model": zero}, {**same, **should, "skipped": skipped, "due": due and stop},
                            keep=cfg.keep, config=config, tokenizer_path=tokenizer_path)
            log.restart_clock()
        if stop:
            log.say(f"asked to stop: saved after step {step}; go on with --resume")
            break
        # [end copy]
    else:
        known = [g for g, record in enumerate(train.records) if not record.negative][:cfg.reference_prompts or None]
        rewards = all_rewards(model, train, known, micro or 16, env)  # (n,)
        best = [0, *itertools.accumulate(train.sizes(known))][:-1]  # each group's first reply
        mean = (rewards[best] if cfg.reference == "best" else rewards).mean().item()
        std = rewards.std().item()
        log.event(cfg.steps, reference_mean=mean, reward_std=std)
        weights = zero.full_state_dict()
        if env.is_main:
            normalise(weights, mean, max(std, 1e-8) if cfg.unit_scale else 1.0)
            scale = {"reward_std": 1.0 if cfg.unit_scale else std, "reference": cfg.reference}
            save_final(cfg.out, weights, {**config, **scale}, tokenizer_path)
        log.say(zero.counted())
        log.say(f"finished: {cfg.out}/final, mean reward 0 over the {cfg.reference} replies of {len(known)} prompts")
    env.close()
    return env.exit_code


if __name__ == "__main__":
    start(main)
