"""Direct preference optimisation (DPO): learn from pairs of replies, without a reward model or sampling.

    The best policy under a reward r and a KL penalty is  pi(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x).
    Solved for r, a policy IS a reward:  r = beta log pi(y|x) / ref(y|x) + beta log Z(x)
    In the Bradley-Terry loss of train_rm.py Z cancels:          (Rafailov et al. 2023, equations 4 to 7)

    minimise  loss = - mean log sigmoid(beta h),   h = log pi(y_w|x) / ref(y_w|x) - log pi(y_l|x) / ref(y_l|x)

y_w is the chosen reply, y_l the rejected one. log pi(y|x) is the SUM over the reply's tokens and its end.
Every reply gets an end token, even one that was cut off: do not put those among the chosen ones.

    python train_dpo.py --data preferences.jsonl --init out/sft --out out/dpo                     one process
"""
import gc
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from data import CHAT_TEMPLATE, Rehearsal, RehearsalConfig, Replies, encode_prompt, expect_chat, segment_sums
from lib.program import UserError, parse, require_positive, start
from lib.ranks import setup
from lib.records import read_preferences, read_split
from lib.run import Run, RunConfig, lr_at, with_error
from lora import DeltaConfig, attach, base_of, final_of
from model import greedy_replies, load_model
from zero import Zero


@dataclass
class Config(RunConfig, RehearsalConfig, DeltaConfig):  # the flags that all stages share are in lib/run.py
    # data
    data: str = ""  # preferences: chosen and rejected, or ranked responses; files or a folder
    pairs: Literal["best-worst", "all"] = "best-worst"  # of ranked replies: first and last, or all C(K,2)
    # preference
    ref: str = ""  # folder of the frozen reference model; empty: init
    beta: float = 0.3  # strength of the KL penalty (for ipo its tau)
    loss_type: Literal["sigmoid", "robust", "ipo"] = "sigmoid"  # see dpo_loss
    label_smoothing: float = 0.0  # share of labels believed to be flipped, below 0.5; 0: off
    # optimisation
    epochs: float = 1.0  # times each pair is seen, if steps is 0
    batch_size: int = 16  # pairs per update over all ranks
    lr: float = 5e-4
    # run
    out: str = "out/dpo"
    init: str = "out/sft"
    eval_prompts: int = 3  # validation prompts answered at each evaluation; 0: none

    may_change = RunConfig.may_change | {"ref"}

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "beta")
        if self.label_smoothing >= 0.5 or (self.label_smoothing and self.loss_type == "ipo"):
            raise UserError(f"--loss_type {self.loss_type} --label_smoothing {self.label_smoothing}: "
                            "expected less than 0.5, for ipo 0, which has no such term")


def dpo_loss(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta: float,
             loss_type: str = "sigmoid", label_smoothing: float = 0.0):
    """Sum over pairs of the loss of h. All arguments (pairs,); the caller divides by the number of pairs.

    sigmoid  -(1-e) log s(beta h) - e log s(-beta h)    e = label_smoothing; 0: Rafailov et al. 2023, eq. 7.
             With e, "conservative" (Mitchell 2023): the least loss is at beta h = log (1-e)/e
    robust   [-(1-e) log s(beta h) + e log s(-beta h)] / (1 - 2e): on average the loss of the clean labels, if
             a share e of them is flipped (Chowdhury et al. 2024)
    ipo      (h - 1/(2 beta))^2: a goal for h instead of ever more (Azar et al. 2023, eq. 17; beta is its tau)
    """
    h = (chosen_logp - rejected_logp) - (ref_chosen_logp - ref_rejected_logp)  # (pairs,)
    e = label_smoothing
    if loss_type == "ipo":
        losses = (h - 1 / (2 * beta)).square()
    elif loss_type == "robust":
        losses = (-(1 - e) * F.logsigmoid(beta * h) + e * F.logsigmoid(-beta * h)) / (1 - 2 * e)
    else:
        losses = -(1 - e) * F.logsigmoid(beta * h) - e * F.logsigmoid(-beta * h)
    return losses.sum()


def read_logps(model, rows):
    """log pi(reply | prompt), the sum over the reply's tokens and its end: rows ReplyRows -> (n,)."""
    logp = model(rows.ids, rows.targets, segment_ids=rows.segment_ids)  # (B, T), 0 where nothing is trained
    sums = segment_sums(logp, rows.segment_ids)  # (B, segments)
    row, end = rows.ends
    return sums[row, rows.segment_ids[row, end]]


@torch.no_grad()
def all_logps(model, pairs: Replies, which: list[int], size: int, ranks):
    """(pairs, 2) log-probabilities of chosen and rejected replies of these pairs, known to all ranks."""
    logps = torch.zeros(len(which), 2)
    for rows in pairs.batches(which, size, ranks.rank, ranks.world):
        logps.view(-1)[rows.at] = read_logps(model, rows.to(ranks.device)).cpu()
    return ranks.all_reduce(logps).cpu()


def reference_logps(ref, pairs: Replies, steps: int, size: int, ranks):
    """(len(pairs), 2) log-probabilities under the reference, read once; NaN for pairs that no step reaches.

    The reference sees exactly the batches of training. The last bits depend on the batch, so only then is h
    exactly 0 at step 1. The last batch of an epoch also holds pairs of the next one. We go backwards, so that
    each pair keeps the value of its first batch.
    """
    logps = torch.full((len(pairs), 2), math.nan)
    for step in reversed(range(min(steps, -(-len(pairs) // pairs.batch_size)))):
        batch = pairs.of_step(step)
        logps[batch] = all_logps(ref, pairs, batch, size, ranks)
    return logps


def pair_metrics(logps, ref_logps, beta: float) -> dict:
    """TRL's numbers of a batch of pairs, from log-probabilities (pairs, 2). Rewards are beta log pi / ref."""
    rewards = beta * (logps - ref_logps)  # (pairs, 2)
    margins = rewards[:, 0] - rewards[:, 1]  # (pairs,)
    return {"rewards/chosen": rewards[:, 0].mean().item(), "rewards/rejected": rewards[:, 1].mean().item(),
            "rewards/accuracies": ((margins.sign() + 1) / 2).mean().item(),  # a tie is half right
            "rewards/margins": margins.mean().item(),
            "logps/chosen": logps[:, 0].mean().item(), "logps/rejected": logps[:, 1].mean().item()}


def evaluate(logps, ref_logps, cfg: Config) -> dict:
    """Loss and metrics of the validation pairs, from their log-probabilities (pairs, 2) under both models."""
    if not len(logps):
        return {}
    loss = dpo_loss(*logps.T, *ref_logps.T, cfg.beta, cfg.loss_type, cfg.label_smoothing).item() / len(logps)
    metrics = {"loss": loss, **pair_metrics(logps, ref_logps, cfg.beta)}
    right = ((logps - ref_logps) @ torch.tensor([1.0, -1.0])).sign() / 2 + 0.5  # (pairs,)
    metrics |= with_error("rewards/accuracies", right, share=True)
    return {f"eval_{name}": value for name, value in metrics.items()}


def main(argv=None) -> int:
    cfg = parse(Config, argv, __doc__)
    ranks = setup(cfg.device)  # this process and its peers: rank, world, device, sum()

    # models: the policy, and the reference, which stays as it is
    model, tokenizer, born = load_model(cfg.init, head="lm", attention=cfg.attention)
    ref, ref_tokenizer, ref_born = (model, tokenizer, born) if cfg.tune and not cfg.ref else load_model(
        cfg.ref or cfg.init, head="lm", attention=cfg.attention)
    expect_chat(cfg.init, born)
    expect_chat(cfg.ref or cfg.init, ref_born)
    if ref_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"--ref {cfg.ref}: found another tokenizer than that of --init {cfg.init}")
    attach(model, cfg, born)  # with --tune: a delta, and the rest frozen
    cfg.fit_rows(model.config.max_seq_len)
    zero = Zero(model, units=model.units(), **cfg.zero_options(ranks))
    if cfg.tune and not cfg.ref:  # no second model: the policy with its delta off
        ref, ref_zero = base_of(model), None
    else:
        ref_zero = Zero(ref, units=ref.units(), frozen=True, **cfg.zero_options(ranks))

    # data
    *parts, report, counts = read_split(read_preferences, cfg)
    train, val = (Replies(part, tokenizer, cfg.seq_len, pairs=cfg.pairs, batch_size=cfg.batch_size,
                          seed=cfg.seed) for part in parts)
    text = Rehearsal(cfg, tokenizer, ranks)  # of --ptx; without it nothing
    cfg.fit_steps(len(train))

    run = Run(cfg, ranks, {"model": zero}, tokenizer,
              inputs={"data": train.fingerprint(), "ptx_data": text.fingerprint(),
                      "ref": ref_born["files"].get("model.pt", {}).get("sha256")},
              final={"head": "lm", "chat_template": CHAT_TEMPLATE}, read=(report, counts))
    run.say(f"training: {train.report()}\nvalidation: {val.report()}\nchat template: {CHAT_TEMPLATE}")
    micro, everything = cfg.micro_batch_size, range(len(val))  # micro: pairs per forward

    val_ref = all_logps(ref, val, everything, micro or 16, ranks)  # (pairs, 2)
    train_ref = reference_logps(ref, train, cfg.steps, micro, ranks)  # (pairs, 2)
    del ref, ref_zero
    gc.collect()  # the two refer to each other, so their memory would else be freed at some later time

    def evaluate_and_show() -> dict:
        prompts = [encode_prompt(tokenizer, record.messages) for record in val.records[:cfg.eval_prompts]]
        with zero.gathered():
            run.say(greedy_replies(model, prompts, tokenizer))
        return evaluate(all_logps(model, val, everything, micro or 16, ranks), val_ref, cfg)

    for step in run.steps(evaluate_and_show):
        batch = train.of_step(step - 1)  # numbers of batch_size pairs
        logps, ref_logps = torch.zeros(len(batch), 2), train_ref[batch]  # (pairs, 2) each: chosen, rejected
        mean_loss, n_read = torch.zeros((), device=ranks.device), 0
        for rows in train.batches(batch, micro, ranks.rank, ranks.world):  # rows.at: their places in logps
            part = read_logps(model, rows.to(ranks.device))  # (n,) chosen, rejected, chosen, rejected, ...
            ref_part = ref_logps.view(-1)[rows.at].to(ranks.device)  # (n,)
            loss = dpo_loss(part[0::2], part[1::2], ref_part[0::2], ref_part[1::2], cfg.beta, cfg.loss_type,
                            cfg.label_smoothing) / cfg.batch_size  # ONE denominator, however they are split
            zero.backward(loss)
            logps.view(-1)[rows.at] = part.detach().cpu()
            mean_loss += loss.detach()
            n_read += int((rows.segment_ids >= 0).sum())
        ptx, n_text = text.backward(model, zero, step - 1)
        lr = lr_at(step, cfg)
        info = zero.step(lr, cfg.clip)
        mean_loss, n_read = ranks.sum(mean_loss, n_read)
        logps = ranks.all_reduce(logps).cpu()  # each rank knew its own
        run.log(step, tokens=n_read + n_text, skipped=info.skipped, loss=mean_loss,
                **pair_metrics(logps, ref_logps, cfg.beta), grad_norm=info.norm, learning_rate=lr,
                epoch=step * cfg.batch_size / len(train), **ptx)
    return run.finish(final_of(model))


if __name__ == "__main__":
    start(main)
