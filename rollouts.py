"""Rollouts: replies drawn from a policy, and what policy, reference, critic and reward model say of them.

    rollout = draw(prompts, step, actor, zero, tokenizer, cfg, ranks)     one reply to each prompt
    score(rollout, batches, models, cfg, ranks)                           log-probabilities, values, scores
    for which, ids, targets, segment_ids in micro_batches(...):           the replies again, in packed rows
        in_slots(x, targets, rollout.mask[which])                         from their positions to their slots

R is the number of slots: slot t of a reply holds its token t. The table at the head of train_ppo.py shows
which number is read at which position of a row.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import CHAT_TEMPLATE, Shuffled, collate, encode_prompts, pack
from lib.program import UserError
from lib.ranks import together
from lib.records import Record, read_prompts, read_split
from model import GPT, generate_sorted

AT_ONCE = 64  # replies drawn at once per rank, to prompts of like length
SAMPLING, ORDER = 2, 4  # uses of random numbers (data.py has 0 and 1); ORDER + epoch


class Models(NamedTuple):
    actor: GPT
    critic: GPT
    reference: GPT
    reward: GPT


@dataclass
class Rollout:
    """One reply to each prompt, known to all ranks. Tensors: (B, R), or (B,) for scores."""
    prompts: list[list[int]]
    replies: list[list[int]]  # with the end, if it was drawn
    ended: list[bool]
    sequences: list[list[int]]  # prompt and reply; what did not end gets an end, for the reward model alone
    trained: list[list[int]]  # 1 where a token of `sequences` is the reply's
    mask: torch.Tensor  # bool: the slot holds a token; where it is False nothing counts
    sampled_logp: torch.Tensor  # as the sampler saw it
    logp: torch.Tensor  # the actor's, at the time of the rollout
    ref_logp: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor  # the reward model's

    def log_ratio(self) -> torch.Tensor:
        """log pi - log ref of each token, (B, R): the KL that is reported, whatever kl_penalty pays for."""
        return masked(self.logp - self.ref_logp, self.mask)


def load_prompts(cfg, tokenizer, replies: int = 1) -> tuple[Shuffled, list, list, tuple]:
    """Prompts to train on, as ids and as records; pairs (record, ids) to validate with; and what Run says of
    them. A prompt must leave room for the longest reply and its end. replies: to each prompt of a step."""
    *parts, report, counts = read_split(read_prompts, cfg)
    pairs, val = (encode_prompts(tokenizer, part, cfg.seq_len - cfg.max_new_tokens - 1) for part in parts)
    dropped = sum(map(len, parts)) - len(pairs) - len(val)
    report += (f"\n{len(pairs)} prompts to train on, {len(val)} to validate, {dropped} leave no room for "
               f"--max_new_tokens {cfg.max_new_tokens} in {cfg.seq_len}\nchat template: {CHAT_TEMPLATE}")
    if not pairs:
        raise UserError(report.replace("\n", "; "))
    records, ids = zip(*pairs)
    cfg.fit_steps(len(ids), most=100)
    train = Shuffled(ids, cfg.seq_len, cfg.batch_size // replies, cfg.seed)
    return train, records, val[:cfg.eval_prompts], (report, counts)


def masked(x, mask):
    return torch.where(mask > 0, x, 0.0)  # not x * mask: what stands beyond a reply may be inf or NaN


def draw(prompts: list[list[int]], step: int, actor: GPT, zero, tokenizer, cfg, ranks) -> Rollout:
    """One reply to each prompt; ranks share the work. Reply i depends on prompt i and (cfg.seed, step, i).
    step: that of training, from 1; 0 for evaluation."""
    seeds = [(cfg.seed, SAMPLING, step, i) for i in range(len(prompts))]
    with zero.gathered():  # no communication inside: each rank may take as many steps as its replies need
        mine = generate_sorted(actor, prompts[ranks.rank::ranks.world], batch_size=AT_ONCE,
                               seeds=seeds[ranks.rank::ranks.world], max_new_tokens=cfg.max_new_tokens,
                               temperature=cfg.temperature, eos_id=tokenizer.end_id, return_logp=True)
    of_rank = together(lambda: mine)
    drawn = [of_rank[i % ranks.world][i // ranks.world] for i in range(len(prompts))]
    replies, logps = [reply for reply, _ in drawn], [torch.tensor(logp) for _, logp in drawn]
    ended = [reply[-1] == tokenizer.end_id for reply in replies]
    parts = [(p, reply, [tokenizer.end_id] * (not end)) for p, reply, end in zip(prompts, replies, ended)]
    mask, sampled_logp = (pad_sequence(x, batch_first=True).to(ranks.device)  # (B, R) each
                          for x in ([torch.ones_like(logp, dtype=torch.bool) for logp in logps], logps))
    return Rollout(
        prompts, replies, ended, [prompt + reply + end for prompt, reply, end in parts],
        [[0] * len(prompt) + [1] * len(reply) + [0] * len(end) for prompt, reply, end in parts],
        mask, sampled_logp, *sampled_logp.new_zeros(3, *mask.shape), sampled_logp.new_zeros(len(prompts)))


def minibatches(cfg, step: int, epoch: int) -> list[list[int]]:
    """The replies 0..B-1 in a random order, cut into cfg.minibatches parts of nearly equal size."""
    bits = np.random.Philox(key=cfg.seed, counter=[0, step, ORDER + epoch, 0]).random_raw(cfg.batch_size)
    return [part.tolist() for part in np.array_split(np.argsort(bits, kind="stable"), cfg.minibatches)]


def micro_batches(rollout: Rollout, chosen: list[int], cfg, ranks) -> Iterator[list[torch.Tensor]]:
    """The chosen replies laid into packed rows, of which this rank reads rows rank::world, some at a time.
    Yields (which, ids, targets, segment_ids): the replies in these rows, one after the other, (n,); the rest
    (b, T). All ranks get the same number of rows: rows of padding, which hold no reply, fill up."""
    lengths = [len(rollout.sequences[i]) for i in chosen]
    rows = pack(lengths, cfg.seq_len)
    T = max(sum(lengths[i] for i in row) for row in rows)
    rows += [[]] * (-len(rows) % ranks.world)
    rows = [[chosen[i] for i in row] for row in rows[ranks.rank::ranks.world]]
    size = cfg.micro_batch_size or len(rows)
    for some in (rows[first:first + size] for first in range(0, len(rows), size)):
        which = torch.tensor([i for row in some for i in row], dtype=torch.int64)  # (n,)
        parts = collate(rollout.sequences, rollout.trained, some, T)  # (b, T) each
        yield [x.to(ranks.device) for x in (which, *parts)]


def in_slots(x, targets, mask):
    """What stands at the trained positions of packed rows, x (b, T), moved to slots of replies, mask (n, R).
    Rows and slots are both read reply by reply and token by token, so in the same order."""
    return torch.zeros_like(mask, dtype=x.dtype).masked_scatter(mask, x[targets >= 0])  # (n, R)


@torch.no_grad()
def score(rollout: Rollout, batches: list[list[int]], models: Models, cfg, ranks) -> None:
    """Fill in logp, ref_logp, values and scores.
    batches: lists of replies that are read together. If the first epoch of training has the same batches, its
    log-probabilities are the same to the last bit, and the ratio pi / pi_old begins at exactly 1."""
    for chosen in batches:
        for which, ids, targets, segment_ids in micro_batches(rollout, chosen, cfg, ranks):
            mask = rollout.mask[which]  # (n, R)
            for into, model in ((rollout.logp, models.actor), (rollout.ref_logp, models.reference)):
                logp = model(ids, targets, segment_ids=segment_ids, temperature=cfg.temperature)  # (b, T)
                into[which] = in_slots(logp, targets, mask)
            rollout.values[which] = in_slots(models.critic(ids, segment_ids=segment_ids), targets, mask)
            last = F.pad(segment_ids[:, 1:], (0, 1), value=-1) != segment_ids  # (b, T) the end of each reply
            rollout.scores[which] = models.reward(ids, segment_ids=segment_ids)[last]
    for name in ("logp", "ref_logp", "values", "scores"):  # each rank has filled in its own
        setattr(rollout, name, ranks.all_reduce(getattr(rollout, name)))


def sample_lines(rollout: Rollout, step: int, records: list[Record], tokenizer) -> Iterator[dict]:
    """One per prompt, as sample.py writes them, with step, the reward model's score and the reply's KL."""
    kl = rollout.log_ratio().sum(1).tolist()
    for i, record in enumerate(records):
        text = tokenizer.decode(rollout.replies[i][:-1] if rollout.ended[i] else rollout.replies[i])
        yield {"step": step, "prompt": record.messages, "responses": [text], "ended": [rollout.ended[i]],
               "reward": [round(rollout.scores[i].item(), 6)], "kl": [round(kl[i], 6)],
               **({"tag": record.tag} if record.tag else {})}
