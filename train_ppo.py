"""PPO from human feedback: write replies, have them judged, make the better ones likelier, stay near where we began.

    maximise  E[ score(x, y) - beta KL(policy || reference) ]               (Ouyang et al. 2022, section 3.5, eq. 2)

Four models: the actor (policy) and the critic (value) are trained; the reference, which is the actor as it was at
first, and the reward model are frozen. One step is a rollout and some epochs over it:

    rollout      the actor replies to a batch of prompts: pure sampling at one temperature, nothing cut off
    scoring      k_t = log pi(a_t|s_t) - log ref(a_t|s_t);  r_t = -beta k_t, and at the last token + score
                 delta_t = r_t + gamma V(s_t+1) - V(s_t),  A_t = delta_t + gamma lambda A_t+1,  return_t = A_t + V(s_t)
    optimising   rho_t = pi(a_t|s_t) / pi_old(a_t|s_t);  minimise, as means over the tokens of the replies,
                 max(-A rho, -A clip(rho, 1-eps, 1+eps))  and  1/2 max((V - return)^2, (clip(V, V_old +- c) - return)^2)

Which number is read where, of four tokens of a prompt (q), a reply of two (a) and its end (E):

    position     0    1    2    3    4    5    6
    ids          q    q    q    q    a0   a1   E
    target       .    .    .    a0   a1   E    .
    slot t       .    .    .    0    1    2    .      log pi(a_t|s_t) and V(s_t) stand at the position BEFORE a_t, since
    log pi, V    .    .    .    3    4    5    .      s_t is all that comes before it
    score        .    .    .    .    .    .    6      the reward model reads the whole reply, so at E
    r_t          .    .    .    -bk0 -bk1 -bk2+score  but it is the reward for the action E, slot 2; V after E is 0

A reply that did not end in time has no E to act: its score is read at an E put there for the reward model alone, counts
at its last token, and missing_eos_penalty is taken off.

    python train_ppo.py --data prompts.jsonl --init out/sft --reward_model out/rm --out out/ppo      one process
    torchrun --nproc_per_node 2 train_ppo.py --data prompts.jsonl --init out/sft --reward_model out/rm --zero 3
    python train_ppo.py --data prompts.jsonl --init out/sft --reward_model out/rm --steps 3 --out out/toy    a first try
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from data import CHAT_TEMPLATE, Windows, collate, encode_prompt, pack, shuffled
from kernels import target_logp
from lib.checkpoint import claim, final_folder, load_checkpoint, save_checkpoint, save_final
from lib.corpora import TokenFile, prepare
from lib.program import Log, UserError, keep_lines, parse, require_positive, start, writing
from lib.ranks import naming_lost_ranks, setup
from lib.records import Record, read_prompts, split_records
from model import GPT, LMHead, generate_sorted, load_model
from zero import Zero


@dataclass
class Config:
    # data
    data: str = ""  # prompts: .json or .jsonl (or .gz) with {"prompt"}, or conversations without their last reply
    val_data: str = ""  # prompts to validate on; empty: the last val_fraction of data
    val_fraction: float = 0.1  # of the records; prompts that are also trained on are left out
    seq_len: int = 0  # tokens in a row (T), several replies packed into one; 0: the longest the models were made for
    # rollouts
    max_new_tokens: int = 48  # longest reply
    temperature: float = 1.0  # of the policy: sampling and all log-probabilities are of logits / temperature
    rollout_batch_size: int = 32  # replies drawn at once per rank, of similar prompts; 0: the rank's whole share
    # reward
    beta: float = 0.05  # weight of the KL penalty; 0: off
    target_kl: float = 0.0  # nats per reply that beta is adapted to keep; 0: beta is fixed
    kl_horizon: float = 500.0  # replies over which beta changes by 20 % at most
    missing_eos_penalty: float = 1.0  # taken off the score of a reply that did not end
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # of GAE: 1 trusts returns alone, 0 the critic alone
    whiten_rewards: bool = False  # divide the rewards by their standard deviation
    whiten_advantages: bool = True  # shift and scale the advantages of a rollout to mean 0 and variance 1
    # optimisation
    steps: int = 100  # rollouts, each with ppo_epochs x minibatches updates
    batch_size: int = 128  # prompts per rollout over all ranks (N), one reply each
    ppo_epochs: int = 2  # times each rollout is seen
    minibatches: int = 4  # updates per epoch
    micro_batch_size: int = 0  # packed rows per rank and forward; 0: the rank's whole share of a minibatch
    cliprange: float = 0.2  # eps of the ratio
    cliprange_value: float = 0.2  # c: how far a value may move from where it was at the rollout; 0: off
    entropy: float = 0.0  # weight of an entropy bonus; 0: off
    stop_kl: float = 0.1  # approximate KL to the rollout's policy, per token, that ends the epochs early; 0: off
    ptx: float = 0.0  # weight of the pretraining loss that is mixed in (PPO-ptx); 0: off
    ptx_data: str = ""  # its text: .txt, .json or .jsonl
    ptx_rows: int = 4  # its rows of seq_len per update over all ranks
    lr: float = 2e-4  # peak learning rate of the actor
    critic_lr: float = 0.0  # of the critic; 0: as the actor's
    min_lr: float = 1e-5  # learning rate at the last step; 0 would waste its rollout
    warmup_steps: int = 5  # rollouts over which the rate climbs from 0
    decay: Literal["cosine", "linear", "flat-then-linear"] = "linear"  # how it falls afterwards
    weight_decay: float = 0.0  # AdamW's, on matrices and embeddings; 0: off
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's memories of the gradient and of its square
    eps: float = 1e-5  # AdamW's
    clip: float = 1.0  # largest gradient norm; 0: off
    # run
    out: str = "out/ppo"  # folder of this run: checkpoints, metrics.jsonl, samples.jsonl, final/
    init: str = "out/sft"  # folder of the finished model to start from (weights and tokenizer)
    ref: str = ""  # folder of the reference; empty: as init
    reward_model: str = "out/rm"  # folder of the reward model
    critic_init: str = ""  # folder of the model the critic starts from; empty: the reward model
    resume: bool = False  # go on from the newest checkpoint in out
    eval_every: int = 25  # steps between evaluations; 0: only before the first step and at the end
    eval_prompts: int = 128  # validation prompts answered and scored at each evaluation; 0: none
    save_every: int = 50  # steps between checkpoints; 0: only at the end
    keep: int = 2  # checkpoints kept
    log_every: int = 1  # steps between log lines
    seed: int = 1  # of the order of the prompts and of all that is sampled
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


# ---- the algorithm ------------------------------------------------------------------------------------------------
# B replies, R slots (tokens of a reply). mask is 1 where a slot holds a token; where it is 0 nothing counts, whatever
# stands there. Losses are sums: the caller divides by the number of tokens of all ranks.

def masked(x, mask):
    return torch.where(mask > 0, x, 0.0)  # not x * mask: garbage may be inf or NaN


def kl_penalty(logp, ref_logp):
    """log pi - log ref of each token: its mean over the policy's own samples is the KL (Schulman 2020: k1). Any shape.

    As a reward it has the gradient of the KL. A single one may be negative; the mean over many replies must not."""
    return logp - ref_logp


def token_rewards(kl, scores, mask, beta):
    """r_t = -beta k_t, and + score at the last token of each reply. kl (B, R), scores (B,) -> (B, R)."""
    last = mask.long().sum(1, keepdim=True) - 1  # (B, 1)
    return masked(-beta * masked(kl, mask), mask).scatter_add(1, last, scores[:, None].to(kl.dtype))


def gae(rewards, values, mask, gamma, lam):
    """(advantages, returns), (B, R) each (Schulman et al. 2016, eq. 16): A_t = sum_k (gamma lam)^k delta_t+k with
    delta_t = r_t + gamma V_t+1 - V_t. After the last token there is nothing to come: V = 0, A = 0."""
    rewards, values = masked(rewards, mask), masked(values, mask)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = masked(delta + gamma * lam * next_advantage, mask[:, t])
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def whiten(x, mask, shift_mean=True):
    """x with variance 1 and mean 0 (or, if shift_mean is False, its own mean) over the tokens of a whole rollout."""
    n = (mask > 0).sum()
    mean = masked(x, mask).sum() / n
    variance = masked((x - mean) ** 2, mask).sum() / n
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return masked(white if shift_mean else white + mean, mask)


def ppo_policy_loss(logp, old_logp, advantages, mask, clip):
    """Sum over tokens of max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = pi / pi_old; all (B, R).

    Schulman et al. 2017, eq. 7. The maximum is the pessimist's choice: no reward for moving further than clip, but
    every reproach for having gone the wrong way. Returns (loss, sums to be logged)."""
    log_ratio = masked(logp - old_logp, mask)
    ratio, advantages = log_ratio.exp(), masked(advantages, mask)
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(free, clipped).sum(), {
        "approxkl": 0.5 * (log_ratio**2).sum(), "clipfrac": (clipped > free).sum(),
        "ratio": masked(ratio, mask).sum(), "ratio_squared": masked(ratio**2, mask).sum()}


def ppo_value_loss(values, old_values, returns, mask, clip):
    """Sum over tokens of 1/2 max((V - return)^2, (V_old + clip(V - V_old, -clip, clip) - return)^2). All (B, R).

    Again the larger of two: a value gains nothing by moving further than clip in one rollout. Returns (loss, sums)."""
    free = masked(values - returns, mask) ** 2
    moved = masked(values - old_values, mask).clamp(-clip, clip)
    clipped = (masked(old_values - returns, mask) + moved) ** 2
    clipped = torch.where(moved.abs() < clip, free, clipped)  # the same number, without its rounding
    return 0.5 * torch.maximum(free, clipped).sum(), {"value_clipfrac": (clipped > free).sum()}


def adapted(beta: float, kl: float, target_kl: float, replies: int, horizon: float) -> float:
    """beta after a rollout with this mean KL per reply (Ziegler et al. 2019, section 2.2): grows where KL exceeds the
    target, by at most 20 % per horizon replies; target_kl 0: stays."""
    error = min(max(kl / target_kl - 1, -0.2), 0.2) if target_kl else 0.0
    return beta * (1 + error * replies / horizon)


# [copy: rehearse]
def rehearse(model, zero, text: Windows, batch: int, cfg: Config, env) -> tuple[torch.Tensor, float]:
    """Add cfg.ptx times the gradient of the mean loss of one batch of text. Returns (this rank's part of that loss, the
    tokens of all ranks)."""
    windows = [x.to(env.device) for x in text.batch(batch, env.rank, env.world)]  # (b, T) each
    n_tokens, = env.sum((windows[1] >= 0).sum())
    loss_sum = torch.zeros((), device=env.device)
    for ids, targets, segment_ids in zip(*(x.split(cfg.micro_batch_size or cfg.ptx_rows) for x in windows)):
        loss = -model(ids, targets, segment_ids=segment_ids, equal_weights=True).sum() / n_tokens
        zero.backward(cfg.ptx * loss)
        loss_sum += loss.detach()
    return loss_sum, n_tokens
# [end copy]


class ReplyHead(LMHead):
    """The output layer of a policy that never says some ids (pad, bos, the roles): their probability is exactly 0.

    One distribution for all: sampler, actor and reference normalise over the same ids. To forbid ids to the sampler
    alone would make every log-probability wrong by log(1 - p(forbidden)), 0.02 for an untrained byte model."""

    def __init__(self, head: LMHead, vocab_size: int, forbidden):
        torch.nn.Module.__init__(self)
        self.weight = head.weight
        bias = torch.zeros(vocab_size).index_fill(0, torch.tensor(forbidden), -torch.inf)  # (V,)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x, targets=None, temperature=1.0, with_stats=False, equal_weights=False):
        if targets is None:
            return super().forward(x, None, temperature) + self.bias  # (B, T, V)
        out = target_logp(x.flatten(0, 1), self.weight, targets.flatten(), bias=self.bias, temperature=temperature,
                          with_stats=with_stats, equal_weights=equal_weights)
        return tuple(o.view_as(targets) for o in out) if with_stats else out.view_as(targets)  # (B, T)


# ---- rollouts -----------------------------------------------------------------------------------------------------

class Models(NamedTuple):
    actor: GPT
    critic: GPT
    reference: GPT
    reward: GPT


@dataclass
class Rollout:
    """N replies of all ranks, known to each of them. Tensors: (N, R), slot t for token t of a reply, or (N,)."""
    prompts: list[list[int]]
    replies: list[list[int]]  # with the end if it was drawn
    ended: list[bool]
    sequences: list[list[int]]  # prompt, reply and, for the reward model, an end to what did not end
    trained: list[list[int]]  # 1 where a token of `sequences` is the reply's
    mask: torch.Tensor  # (N, R) bool
    sampled_logp: torch.Tensor  # (N, R) as the sampler saw it
    logp: torch.Tensor  # (N, R) the actor's, at the time of the rollout
    ref_logp: torch.Tensor  # (N, R)
    values: torch.Tensor  # (N, R)
    scores: torch.Tensor  # (N,) the reward model's


def random_bits(seed: int, step: int, use: int, n: int) -> np.ndarray:
    """n random 64-bit numbers, a function of the arguments alone; uses 0 and 1 are data.py's."""
    return np.random.Philox(key=seed, counter=[0, step, use, 0]).random_raw(n)


SAMPLING, EVALUATION, ORDER = 2, 3, 4  # uses of random_bits; ORDER + epoch


def everywhere(x: torch.Tensor, env) -> torch.Tensor:
    """Each rank has filled some rows and left 0 in the others: now all rows are there on all ranks."""
    if env.world > 1:
        with naming_lost_ranks("rollout"):
            dist.all_reduce(x)
    return x


def draw(prompts: list[list[int]], seeds: list[int], actor: GPT, zero: Zero, tokenizer, cfg: Config, env) -> Rollout:
    """One reply to each prompt; ranks share the work. Reply i depends on prompt i and seed i alone."""
    N, R = len(prompts), cfg.max_new_tokens
    tokens, sampled_logp = torch.zeros(N, R, dtype=torch.int64), torch.zeros(N, R)  # (N, R)
    lengths = torch.zeros(N, dtype=torch.int64)
    mine = range(env.rank, N, env.world)
    with zero.gathered():  # no communication inside, so ranks may take as many steps as their replies need
        drawn = generate_sorted(actor, [prompts[i] for i in mine], batch_size=cfg.rollout_batch_size or N,
                                seeds=[seeds[i] for i in mine], max_new_tokens=R, temperature=cfg.temperature,
                                eos_id=tokenizer.end_id, return_logp=True)
    for i, (new, logp) in zip(mine, drawn):
        lengths[i] = len(new)
        tokens[i, : len(new)], sampled_logp[i, : len(new)] = torch.tensor(new), torch.tensor(logp)
    tokens, sampled_logp, lengths = (everywhere(x.to(env.device), env) for x in (tokens, sampled_logp, lengths))
    R = int(lengths.max())
    mask = torch.arange(R, device=env.device) < lengths[:, None]  # (N, R)
    replies = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist())]
    ended = [reply[-1] == tokenizer.end_id for reply in replies]
    added = [[] if end else [tokenizer.end_id] for end in ended]
    return Rollout(
        prompts, replies, ended, [a + b + c for a, b, c in zip(prompts, replies, added)],
        [[0] * len(a) + [1] * len(b) + [0] * len(c) for a, b, c in zip(prompts, replies, added)],
        mask, sampled_logp[:, :R], *(torch.zeros(N, R, device=env.device) for _ in range(3)),
        torch.zeros(N, device=env.device))


def minibatches(n: int, cfg: Config, step: int, epoch: int) -> list[list[int]]:
    """The replies 0..n-1 in a random order, cut into cfg.minibatches parts of equal size, or nearly."""
    order = np.argsort(random_bits(cfg.seed, step, ORDER + epoch, n), kind="stable").tolist()
    cuts = [n * m // cfg.minibatches for m in range(cfg.minibatches + 1)]
    return [order[a:b] for a, b in zip(cuts, cuts[1:])]


def micro_batches(rollout: Rollout, chosen: list[int], cfg: Config, env):
    """Lay the chosen replies into packed rows, of which this rank has rows rank::world, and yield some rows at a time:
    (which replies they hold, one after the other, (n,); ids, targets, segment_ids, (b, T) each). All ranks get as many
    rows: rows of padding, which hold no reply, fill up."""
    lengths = [len(rollout.sequences[i]) for i in chosen]
    rows = pack(lengths, cfg.seq_len)
    T = max(sum(lengths[i] for i in row) for row in rows)
    rows += [[]] * (-len(rows) % env.world)
    rows = [[chosen[i] for i in row] for row in rows[env.rank :: env.world]]
    size = cfg.micro_batch_size or len(rows)
    for some in (rows[first : first + size] for first in range(0, len(rows), size)):
        parts = collate(rollout.sequences, rollout.trained, some, T)
        which = torch.tensor([i for row in some for i in row], dtype=torch.int64)  # (n,)
        yield [x.to(env.device) for x in (which, *parts)]


def in_slots(x, targets, mask):
    """What stands at the trained positions of packed rows, x (b, T), moved to the slots of their replies, mask (n, R).

    Both are read row by row, so reply by reply and token by token in the same order."""
    return torch.zeros_like(mask, dtype=x.dtype).masked_scatter(mask, x[targets >= 0])  # (n, R)


@torch.no_grad()
def score(rollout: Rollout, batches: list[list[int]], models: Models, cfg: Config, env) -> None:
    """Fill in log-probabilities, values and scores.

    batches: those of the first epoch, so that its forwards repeat these to the last bit, and the ratio begins at 1."""
    for chosen in batches:
        for which, ids, targets, segment_ids in micro_batches(rollout, chosen, cfg, env):
            mask = rollout.mask[which]  # (n, R)
            for into, model in ((rollout.logp, models.actor), (rollout.ref_logp, models.reference)):
                logp, *_ = model(ids, targets, segment_ids=segment_ids, temperature=cfg.temperature, with_stats=True)
                into[which] = in_slots(logp, targets, mask)
            rollout.values[which] = in_slots(models.critic(ids, segment_ids=segment_ids), targets, mask)
            following = torch.nn.functional.pad(segment_ids[:, 1:], (0, 1), value=-1)  # (b, T)
            last = (segment_ids >= 0) & (following != segment_ids)  # the E of each reply
            rollout.scores[which] = models.reward(ids, segment_ids=segment_ids)[last]
    for x in (rollout.logp, rollout.ref_logp, rollout.values, rollout.scores):
        everywhere(x, env)


def write_samples(file, step: int, records: list[Record], rollout: Rollout, tokenizer) -> None:
    """One line per prompt, as sample.py writes them, with step, reward (the reward model's score) and kl (of the
    reply)."""
    kl = masked(kl_penalty(rollout.logp, rollout.ref_logp), rollout.mask).sum(1).tolist()
    for i, record in enumerate(records):
        text = tokenizer.decode(rollout.replies[i][:-1] if rollout.ended[i] else rollout.replies[i])
        line = {"step": step, "prompt": record.messages, "responses": [text], "ended": [rollout.ended[i]],
                "reward": [round(rollout.scores[i].item(), 6)], "kl": [round(kl[i], 6)]}
        file.write(json.dumps(line | ({"tag": record.tag} if record.tag else {}), ensure_ascii=False) + "\n")


def evaluate(prompts: list[list[int]], tags: list[str], models: Models, zero: Zero, tokenizer, cfg: Config,
             env) -> tuple[dict, Rollout]:
    """Score, KL and length of one reply to each prompt, with the same random numbers at every evaluation."""
    n, size = len(prompts), -(-cfg.batch_size // cfg.minibatches)
    seeds = random_bits(cfg.seed, 0, EVALUATION, n).tolist()
    rollout = draw(prompts, seeds, models.actor, zero, tokenizer, cfg, env)
    env.check_stop()
    score(rollout, [list(range(n))[first : first + size] for first in range(0, n, size)], models, cfg, env)
    env.check_stop()
    kl = masked(kl_penalty(rollout.logp, rollout.ref_logp), rollout.mask).sum() / n
    means = {"eval_score": rollout.scores.mean(), "eval_kl": kl, "eval_ended": sum(rollout.ended) / n,
             "eval_response_length": rollout.mask.sum() / n}
    for tag in sorted(set(tags) - {""}):
        means[f"eval_score/{tag}"] = rollout.scores[[i for i in range(n) if tags[i] == tag]].mean()
    return {name: float(value) for name, value in means.items()}, rollout


def main(argv=None) -> int:
    cfg = parse(Config, argv, __doc__)
    require_positive(cfg, "steps", "batch_size", "log_every", "keep", "max_new_tokens", "temperature", "ppo_epochs",
                     "minibatches", "cliprange", "kl_horizon")
    if not cfg.data:
        raise UserError("--data: found nothing, expected a file of prompts")
    if cfg.batch_size < cfg.minibatches:
        raise UserError(f"--minibatches {cfg.minibatches}: more than --batch_size {cfg.batch_size}; lower it")
    if bool(cfg.ptx) != bool(cfg.ptx_data):
        raise UserError(f"--ptx {cfg.ptx} with --ptx_data {cfg.ptx_data!r}: expected both or neither")
    if cfg.ptx:
        require_positive(cfg, "ptx_rows")
    if cfg.target_kl and not (cfg.beta and cfg.kl_horizon >= cfg.batch_size):  # far below, beta would turn negative
        raise UserError(f"--target_kl {cfg.target_kl} --beta {cfg.beta} --kl_horizon {cfg.kl_horizon}: expected a beta "
                        f"above 0 to adapt, over a horizon of at least --batch_size {cfg.batch_size} replies")
    if cfg.min_lr > min(cfg.lr, cfg.critic_lr or cfg.lr):
        raise UserError(f"--min_lr {cfg.min_lr}: more than --lr {cfg.lr} or --critic_lr {cfg.critic_lr}, which would "
                        "climb to it; lower it")
    env = setup(cfg.device)

    # models
    folders = {"init": cfg.init, "critic_init": cfg.critic_init or cfg.reward_model, "ref": cfg.ref or cfg.init,
               "reward_model": cfg.reward_model}
    heads = ("lm", "scalar", "lm", "scalar")
    loaded = [load_model(folder, head, attention=cfg.attention) for folder, head in zip(folders.values(), heads)]
    tokenizer, tokenizer_path = loaded[0][1], os.path.join(final_folder(cfg.init), "tokenizer.json")
    for (flag, folder), head, (_, other, found) in zip(folders.items(), heads, loaded):
        if found["head"] != head and flag != "critic_init":  # load_model has made a new head
            raise UserError(f"--{flag} {folder}: found a model with the head {found['head']!r}, expected {head!r}; "
                            "a reward model is made by train_rm.py")
        if other.fingerprint != tokenizer.fingerprint:
            raise UserError(f"--{flag} {folder}: its tokenizer is not that of --init {cfg.init}; train it from there")
        if found.get("chat_template") != CHAT_TEMPLATE and flag != "critic_init":
            raise UserError(f"--{flag} {folder}: found the chat template {found.get('chat_template')!r}, expected "
                            f"{CHAT_TEMPLATE!r}; train it on conversations")
    models = Models(*(model for model, *_ in loaded))
    for model in (models.actor, models.reference):
        model.head = ReplyHead(model.head, model.config.vocab_size, tokenizer.specials_but_end)
    longest = min(model.config.max_seq_len for model in models)
    cfg.seq_len = cfg.seq_len or longest
    if not cfg.max_new_tokens + 2 < cfg.seq_len <= longest:
        raise UserError(f"--seq_len {cfg.seq_len}, --max_new_tokens {cfg.max_new_tokens}: the models' rows end at "
                        f"{longest}, and a prompt, its reply and an end must fit; lower one of them")

    # data: prompts that leave room for the longest reply and its end
    def encoded(records: list[Record]) -> list[tuple[Record, list[int]]]:
        pairs = []
        for record in records:
            try:
                pairs.append((record, encode_prompt(tokenizer, record.messages)))
            except UserError as error:  # a character outside the alphabet
                raise UserError(f"{record.where}: {error}") from None
        return [pair for pair in pairs if len(pair[1]) + cfg.max_new_tokens + 1 <= cfg.seq_len]

    records = read_prompts(cfg.data)
    records, val_records = (records, read_prompts(cfg.val_data)) if cfg.val_data else \
        split_records(records, cfg.val_fraction)
    train, val = encoded(records), encoded(val_records)
    dropped = len(records) + len(val_records) - len(train) - len(val)
    if not train or not val:
        raise UserError(f"{cfg.data}: found no prompt that leaves room for --max_new_tokens {cfg.max_new_tokens} in "
                        f"rows of {cfg.seq_len} tokens")
    seen = {tuple(prompt) for _, prompt in train}  # what was learned about a prompt would flatter the evaluation
    val = [(record, prompt) for record, prompt in val if tuple(prompt) not in seen][:cfg.eval_prompts]
    if cfg.eval_prompts and not val:
        raise UserError(f"{cfg.val_data or cfg.data}: found every prompt to validate among those to train on; give "
                        "others by --val_data, or --eval_prompts 0")
    if cfg.ptx:
        text_path, *_ = env.main_first(lambda: prepare(cfg.ptx_data, tokenizer=tokenizer_path))
        text = Windows(TokenFile(text_path, tokenizer), cfg.seq_len, batch_size=cfg.ptx_rows, seed=cfg.seed)

    def sharded(model: GPT, lr: float, frozen: bool = False) -> Zero:
        return Zero(model, units=model.units(), device=env.device, stage=cfg.zero, dtype=getattr(torch, cfg.dtype),
                    offload=tuple(filter(None, cfg.offload.split(","))), lr=lr, weight_decay=cfg.weight_decay,
                    betas=cfg.betas, eps=cfg.eps, activation_checkpointing=cfg.activation_checkpointing,
                    compile=cfg.compile, frozen=frozen)

    parameters = [model.parameter_count() for model in models]
    critic_cfg = dataclasses.replace(cfg, lr=cfg.critic_lr or cfg.lr)
    actor, critic = sharded(models.actor, cfg.lr), sharded(models.critic, critic_cfg.lr)
    reference, _ = (sharded(model, 0.0, frozen=True) for model in (models.reference, models.reward))

    # where were we
    lock = claim(cfg.out, cfg.resume) if env.is_main else None  # noqa: F841 - held until this function returns
    env.barrier()
    config = {"model": dataclasses.asdict(models.actor.config), "head": "lm", "chat_template": CHAT_TEMPLATE,
              "run": dataclasses.asdict(cfg)}
    # What a resumed run must share with the one it continues, and what it should, or else its curve bends:
    same = {"model": {**config["model"], "attention": ""}, "tokenizer": tokenizer.fingerprint}
    ids = json.dumps([prompt for _, prompt in train]).encode()
    frozen = [found.get("files", {}).get("model.pt", {}).get("sha256") for _, _, found in loaded[2:]]
    should = {"data": hashlib.sha256(ids).hexdigest()[:16], "frozen": frozen} | {name: getattr(cfg, name) for name in (
        "seq_len", "max_new_tokens", "temperature", "rollout_batch_size", "beta", "target_kl", "kl_horizon", "lam",
        "gamma", "missing_eos_penalty", "whiten_rewards", "whiten_advantages", "batch_size", "ppo_epochs",
        "minibatches", "micro_batch_size", "cliprange", "cliprange_value", "entropy", "stop_kl", "ptx", "ptx_data",
        "ptx_rows", "lr", "critic_lr", "min_lr", "warmup_steps", "decay", "weight_decay", "betas", "eps", "clip",
        "seed", "dtype", "attention")}
    should["betas"] = list(cfg.betas)  # as JSON gives it back
    found = load_checkpoint(cfg.out, {"actor": actor, "critic": critic}, same=same,
                            numbers=["skipped", "adapted_beta"], bitwise=should) if cfg.resume else None
    start, extra = found or (0, {"skipped": 0, "adapted_beta": cfg.beta})
    skipped, beta = extra["skipped"], extra["adapted_beta"] if cfg.target_kl else cfg.beta
    if start > cfg.steps:
        raise UserError(f"--steps {cfg.steps}: {cfg.out} is already at step {start}; give more steps")

    log = Log(cfg.out, env, steps=cfg.steps, start=start)
    log.say("parameters: " + ", ".join(f"{name} {n:,}" for name, n in zip(Models._fields, parameters)))
    log.say(f"prompts: {len(train)} to train on, {len(val)} to validate, {dropped} dropped (no room for "
            f"--max_new_tokens {cfg.max_new_tokens} in rows of {cfg.seq_len}); {cfg.batch_size} per rollout, "
            f"{cfg.ppo_epochs} epochs x {cfg.minibatches} updates\nchat template: {CHAT_TEMPLATE}")
    log.say(f"actor: {actor.report()}\nreference: {reference.report()}")
    if cfg.resume:
        log.say(f"going on after step {start}" if found else f"--resume: nothing in {cfg.out} yet, starting fresh")
    if env.is_main:
        samples_path = os.path.join(cfg.out, "samples.jsonl")
        keep_lines(samples_path, start)

    def evaluate_and_show(step: int) -> None:
        if not val:
            return
        numbers, rollout = evaluate([prompt for _, prompt in val], [record.tag for record, _ in val], models, actor,
                                    tokenizer, cfg, env)
        log.event(step, **numbers)
        for prompt, reply in list(zip(rollout.prompts, rollout.replies))[:3]:
            log.say(f"    {tokenizer.decode(prompt + reply)!r}")
        log.restart_clock()

    def save(step: int, due=False) -> None:
        save_checkpoint(cfg.out, step, {"actor": actor, "critic": critic}, {**same, **should, "skipped": skipped,
                        "adapted_beta": beta, "due": due}, keep=cfg.keep, config=config, tokenizer_path=tokenizer_path)
        log.restart_clock()

    # the loop: exactly cfg.steps rollouts, numbered from 1; evaluation and checkpoint also at the last
    if start in (0, cfg.steps) or extra.get("due"):
        evaluate_and_show(start)  # where it begins; how it went, if finished before; or stopped before it was evaluated
    for step in range(start + 1, cfg.steps + 1):
        # rollout
        clock = [time.perf_counter()]
        chosen = shuffled(len(train), (step - 1) * cfg.batch_size, cfg.batch_size, cfg.seed)
        seeds = random_bits(cfg.seed, step, SAMPLING, cfg.batch_size).tolist()
        rollout = draw([train[i][1] for i in chosen], seeds, models.actor, actor, tokenizer, cfg, env)
        clock.append(time.perf_counter())
        score(rollout, minibatches(cfg.batch_size, cfg, step, 0), models, cfg, env)
        if env.is_main:
            with writing(samples_path), open(samples_path, "a", encoding="utf-8") as samples:
                write_samples(samples, step, [train[i][0] for i in chosen], rollout, tokenizer)
        stop, = env.sum(env.stop_signal != 0)
        if stop:  # nothing has been trained on this rollout: the run goes on by drawing it again
            save(step - 1)
            log.say(f"asked to stop: saved after step {step - 1}; go on with --resume")
            break

        # rewards and advantages: the same numbers on every rank
        mask, N = rollout.mask, cfg.batch_size
        kl = kl_penalty(rollout.logp, rollout.ref_logp)  # (N, R)
        scores = rollout.scores - cfg.missing_eos_penalty * (~torch.tensor(rollout.ended, device=env.device)).float()
        rewards = token_rewards(kl, scores, mask, beta)  # (N, R)
        if cfg.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, rollout.values, mask, cfg.gamma, cfg.lam)  # (N, R)
        error = returns[mask] - rollout.values[mask]
        explained = 1 - error.var(correction=0) / returns[mask].var(correction=0)
        if cfg.whiten_advantages:
            advantages = whiten(advantages, mask)
        clock.append(time.perf_counter())

        # optimising: epochs x minibatches updates
        totals, updates, n_trained, stopped = {}, 0, 0, False
        for epoch in range(cfg.ppo_epochs):
            for part in minibatches(N, cfg, step, epoch):
                n = int(mask[part].sum())  # ONE denominator, whatever the split over micro-batches and ranks
                sums = dict.fromkeys(("policy", "value", "entropy", "approxkl", "clipfrac", "value_clipfrac", "ratio",
                                      "ratio_squared", "ptx"), 0.0)
                for which, ids, targets, segment_ids in micro_batches(rollout, part, cfg, env):
                    m = mask[which]  # (n, R)
                    logp, entropy, _ = models.actor(ids, targets, segment_ids=segment_ids, temperature=cfg.temperature,
                                                    with_stats=True)  # (b, T) each
                    policy_loss, policy_sums = ppo_policy_loss(in_slots(logp, targets, m), rollout.logp[which],
                                                               advantages[which], m, cfg.cliprange)
                    actor.backward((policy_loss - cfg.entropy * entropy.sum()) / n)
                    values = in_slots(models.critic(ids, segment_ids=segment_ids), targets, m)  # (n, R)
                    value_loss, value_sums = ppo_value_loss(values, rollout.values[which], returns[which], m,
                                                            cfg.cliprange_value or math.inf)
                    critic.backward(value_loss / n)
                    for name, value in {"policy": policy_loss, "value": value_loss, "entropy": entropy.sum(),
                                        **policy_sums, **value_sums}.items():
                        sums[name] += value.detach()
                if cfg.ptx:  # the actor must not forget what is not asked about (Ouyang et al. 2022, eq. 2)
                    batch = (step - 1) * cfg.ppo_epochs * cfg.minibatches + updates
                    sums["ptx"] += n * rehearse(models.actor, actor, text, batch, cfg, env)[0]
                infos = [actor.step(lr_at(step, cfg), cfg.clip), critic.step(lr_at(step, critic_cfg), cfg.clip)]
                skipped += sum(info.skipped for info in infos)
                updates, n_trained = updates + 1, n_trained + n
                sums = dict(zip(sums, env.sum(*sums.values())))
                totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
                stopped = bool(cfg.stop_kl) and sums["approxkl"] / n > cfg.stop_kl  # the same numbers on all ranks
                if stopped:
                    break
            if stopped:
                break
        clock.append(time.perf_counter())

        # what happened
        log.count(sum(map(len, rollout.sequences)))
        last = step == cfg.steps
        if step % cfg.log_every == 0 or step == start + 1 or last:
            mean = {name: value / n_trained for name, value in totals.items()}
            kl_sum, entropy_sum = masked(kl, mask).sum().item() / N, -masked(rollout.logp, mask).sum().item() / N
            k3 = masked(torch.expm1(-kl) + kl, mask).sum().item() / N  # never negative, and less noisy than k1
            log.train(step, **{
                "objective/scores": scores.mean().item(), "objective/kl": kl_sum, "objective/kl_k3": k3,
                "objective/entropy": entropy_sum, "objective/non_score_reward": -beta * kl_sum,
                "objective/rlhf_reward": scores.mean().item() - beta * kl_sum,
                "policy/approxkl_avg": mean["approxkl"], "policy/clipfrac_avg": mean["clipfrac"],
                "policy/entropy_avg": mean["entropy"], "loss/policy_avg": mean["policy"],
                "loss/value_avg": mean["value"], **({"loss/ptx_avg": mean["ptx"]} if cfg.ptx else {}),
                "val/ratio": mean["ratio"], "val/ratio_var": mean["ratio_squared"] - mean["ratio"] ** 2,
                "val/clipfrac_avg": mean["value_clipfrac"], "val/num_eos_tokens": sum(rollout.ended),
                "val/explained_variance": explained.item(), "val/response_length": mask.sum().item() / N,
                "val/sampler_gap": masked(rollout.sampled_logp - rollout.logp, mask).abs().max().item(),
                "beta": beta, "lr": lr_at(step, cfg), "episode": step * N, "updates": updates,
                "grad_norm/actor": infos[0].norm, "grad_norm/critic": infos[1].norm,
                **{f"seconds/{name}": b - a for name, a, b in zip(("rollout", "scoring", "optimisation"), clock,
                                                                  clock[1:])},
                **({"skipped": skipped} if skipped else {})})
        beta = adapted(beta, masked(kl, mask).sum().item() / N, cfg.target_kl, N, cfg.kl_horizon)
        stop, = env.sum(env.stop_signal != 0)
        due = last or (cfg.eval_every and step % cfg.eval_every == 0)
        if due and not stop:  # asked to stop, save at once
            stop = env.stopped_in(evaluate_and_show, step)
        if last or stop or (cfg.save_every and step % cfg.save_every == 0):
            save(step, due and stop)
        if stop:
            log.say(f"asked to stop: saved after step {step}; go on with --resume")
            break
    else:
        weights = actor.full_state_dict()
        if env.is_main:
            save_final(cfg.out, weights, config, tokenizer_path)
        log.say(f"actor: {actor.counted()}\ncritic: {critic.counted()}")
        log.say(f"finished: {cfg.out}/final")
    env.close()
    return env.exit_code


if __name__ == "__main__":
    start(main)
