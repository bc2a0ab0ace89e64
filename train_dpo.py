"""Direct preference optimisation (DPO): learn from pairs of replies, without a reward model and without sampling.

    The best policy under a reward r and a leash to the reference is  pi(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x).
    Read backwards, a policy IS a reward: r = beta log pi(y|x) / ref(y|x) + beta log Z(x), and in the Bradley-Terry loss
    of train_rm.py Z cancels:       (Rafailov et al. 2023, equations 4 to 7)

    minimise  L = - mean log sigmoid(beta h),    h = log pi(y_w|x) / ref(y_w|x) - log pi(y_l|x) / ref(y_l|x)

y_w is the chosen reply, y_l the rejected one; log pi(y|x) is the SUM over the reply's tokens and its end, which every
reply of a preference file gets: one that was cut off looks finished, so it had better not be chosen.

    python train_dpo.py --data preferences.jsonl --init out/sft --out out/dpo                        one process
    torchrun --nproc_per_node 2 train_dpo.py --data preferences.jsonl --init out/sft --zero 3 --out out/two
    python train_dpo.py --data preferences.jsonl --init out/sft --steps 5 --eval_every 0 --out out/toy   a first try
"""
from __future__ import annotations

import dataclasses
import gc
import math
import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from data import CHAT_TEMPLATE, Replies, Windows, encode_prompt
from lib.checkpoint import claim, final_folder, load_checkpoint, save_checkpoint, save_final
from lib.corpora import TokenFile, prepare
from lib.program import Log, UserError, matmul_peak, parse, require_positive, start
from lib.ranks import setup
from lib.records import read_preferences, split_prompts
from model import generate, load_model
from zero import Zero


@dataclass
class Config:
    # data
    data: str = ""  # preferences: .json or .jsonl (or .gz) with chosen and rejected, or ranked responses
    val_data: str = ""  # preferences to validate on; empty: the last val_fraction of data
    val_fraction: float = 0.1  # of the prompts
    pack: bool = True  # several replies in a row; off: one, padded
    seq_len: int = 0  # tokens in a row (T); 0: the longest the model was made for
    pairs: Literal["best-worst", "all"] = "best-worst"  # of ranked replies: the first against the last, or all C(K,2)
    # preference
    ref: str = ""  # folder of the frozen reference model; empty: init
    precompute_ref: bool = True  # read the reference's log-probabilities once, then free it; off: anew at every step
    beta: float = 0.3  # the leash: how much a nat of log pi / ref is worth in reward (for ipo its tau)
    loss_type: Literal["sigmoid", "robust", "ipo"] = "sigmoid"  # see dpo_loss
    label_smoothing: float = 0.0  # share of labels believed to be flipped, below 0.5 (sigmoid and robust); 0: off
    average: bool = False  # log-probabilities per token instead of sums, so that length does not count
    # optimisation
    epochs: float = 1.0  # times each pair is seen, if steps is 0
    steps: int = 0  # updates; 0: as many as epochs takes
    batch_size: int = 16  # pairs per update over all ranks
    micro_batch_size: int = 0  # pairs per rank and forward; 0: the rank's whole share at once
    lr: float = 5e-4  # peak learning rate
    min_lr: float = 0.0  # learning rate at the last step
    warmup_steps: int = 10  # updates over which the rate climbs from 0
    decay: Literal["cosine", "linear", "flat-then-linear"] = "linear"  # how it falls afterwards
    weight_decay: float = 0.0  # AdamW's, on matrices and embeddings; 0: off
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's memories of the gradient and of its square
    eps: float = 1e-8  # AdamW's
    clip: float = 1.0  # largest gradient norm; 0: off
    ptx: float = 0.0  # weight of the pretraining loss that is mixed in, against forgetting; 0: off
    ptx_data: str = ""  # its text: .txt, .json or .jsonl
    ptx_rows: int = 8  # its rows of seq_len per update over all ranks
    # run
    out: str = "out/dpo"  # folder of this run: checkpoints, metrics.jsonl, final/
    init: str = "out/sft"  # folder of the finished model to start from (weights and tokenizer)
    resume: bool = False  # go on from the newest checkpoint in out
    eval_every: int = 100  # updates between evaluations; 0: only at the end
    eval_prompts: int = 3  # validation prompts answered at each evaluation; 0: none
    save_every: int = 400  # updates between checkpoints; 0: only at the end
    keep: int = 2  # checkpoints kept
    log_every: int = 20  # updates between log lines
    seed: int = 1  # of the order of the pairs
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


def dpo_loss(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta: float,
             loss_type: str = "sigmoid", label_smoothing: float = 0.0):
    """Sum over pairs of the loss of h, all arguments (pairs,); the caller divides by the number of pairs.

    sigmoid  -(1-e) log s(beta h) - e log s(-beta h)    e = label_smoothing; 0: Rafailov et al. 2023, equation 7.
             With e "conservative" (Mitchell 2023): beta h has done enough at log (1-e)/e
    robust   [-(1-e) log s(beta h) + e log s(-beta h)] / (1 - 2e): the clean labels' loss on average, if e of them are
             flipped (Chowdhury et al. 2024)
    ipo      (h - 1/(2 beta))^2: a goal for h instead of ever more (Azar et al. 2023, equation 17, with beta for tau)
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


def read_logps(model, rows, average: bool = False):
    """log pi(reply | prompt), the sum over the reply and its end, or its average: rows ReplyRows -> (n,)."""
    logp = model(rows.ids, rows.targets, segment_ids=rows.segment_ids)  # (B, T)
    S = int(rows.segment_ids.max()) + 1
    inside = rows.segment_ids[:, None] == torch.arange(S, device=logp.device)[:, None]  # (B, S, T)
    sums = (logp[:, None] * inside).sum(-1)  # (B, S); a token that is not trained has log-probability 0
    if average:
        sums = sums / ((rows.targets >= 0)[:, None] & inside).sum(-1).clamp(min=1)
    row, end = rows.ends
    return sums[row, rows.segment_ids[row, end]]


@torch.no_grad()
def all_logps(model, pairs: Replies, chosen: list[int], size: int, average: bool, env):
    """(pairs, 2) log-probabilities of both replies of the chosen pairs, known to all ranks."""
    logps = torch.zeros(2 * len(chosen))
    for rows in pairs.batches(chosen, size, env.rank, env.world):
        logps[rows.at] = read_logps(model, rows.to(env.device), average).cpu()
        env.check_stop()
    return torch.tensor(env.sum(*logps)).view(-1, 2)


def precompute(model, pairs: Replies, steps: int, size: int, average: bool, env):
    """(len(pairs), 2) log-probabilities under the reference, read in the very batches of the first epoch: so there h is
    exactly 0 at the first step, as if read on the fly. Pairs that no step reaches stay nan."""
    logps = torch.full((len(pairs), 2), math.nan)
    for step in reversed(range(min(steps, -(-len(pairs) // pairs.batch_size)))):  # a pair's first batch has the word
        chosen = pairs.of_step(step)
        logps[chosen] = all_logps(model, pairs, chosen, size, average, env)
    return logps


def pair_metrics(logps, ref_logps, beta: float) -> dict:
    """TRL's numbers of a batch of pairs, from log-probabilities (pairs, 2): the rewards are beta log pi / ref."""
    rewards = beta * (logps - ref_logps)  # (pairs, 2)
    margins = rewards[:, 0] - rewards[:, 1]  # (pairs,)
    return {"rewards/chosen": rewards[:, 0].mean().item(), "rewards/rejected": rewards[:, 1].mean().item(),
            "rewards/accuracies": ((margins.sign() + 1) / 2).mean().item(),  # a tie is half right
            "rewards/margins": margins.mean().item(),
            "logps/chosen": logps[:, 0].mean().item(), "logps/rejected": logps[:, 1].mean().item()}


def evaluate(logps, ref_logps, cfg: Config) -> dict:
    """Loss and metrics of the validation pairs, from their log-probabilities (pairs, 2) under model and reference."""
    loss = dpo_loss(*logps.T, *ref_logps.T, cfg.beta, cfg.loss_type, cfg.label_smoothing).item() / len(logps)
    if not math.isfinite(loss):
        raise UserError(f"the validation loss is {loss}; lower --lr, or use --dtype float32 or bfloat16")
    return {f"eval_{name}": value for name, value in {"loss": loss, **pair_metrics(logps, ref_logps, cfg.beta)}.items()}


def main(argv=None) -> int:
    cfg = parse(Config, argv, __doc__)
    require_positive(cfg, "batch_size", "log_every", "keep")
    if not cfg.data:
        raise UserError("--data: found nothing, expected a file of preferences")
    require_positive(cfg, "beta")
    if cfg.label_smoothing >= 0.5 or (cfg.label_smoothing and cfg.loss_type == "ipo"):
        raise UserError(f"--label_smoothing {cfg.label_smoothing} --loss_type {cfg.loss_type}: expected less than 0.5, "
                        "and 0 for ipo, which has no such term")
    if bool(cfg.ptx) != bool(cfg.ptx_data):
        raise UserError(f"--ptx {cfg.ptx} with --ptx_data {cfg.ptx_data!r}: expected both or neither")
    env = setup(cfg.device)

    # model
    model, tokenizer, born = load_model(cfg.init, head="lm", attention=cfg.attention)
    ref, ref_tokenizer, ref_born = load_model(cfg.ref or cfg.init, head="lm", attention=cfg.attention)
    tokenizer_path = os.path.join(final_folder(cfg.init), "tokenizer.json")
    for flag, folder, config in (("init", cfg.init, born), ("ref", cfg.ref, ref_born)):
        if config.get("chat_template") != CHAT_TEMPLATE or config["head"] != "lm":
            raise UserError(f"--{flag} {folder}: found another chat template, or a scalar head; start from what "
                            "train_sft.py made")
    if ref_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"--ref {cfg.ref}: found another tokenizer than that of --init {cfg.init}")
    cfg.seq_len = cfg.seq_len or model.config.max_seq_len
    if cfg.seq_len > model.config.max_seq_len:
        raise UserError(f"--seq_len {cfg.seq_len}: the model's rows end at {model.config.max_seq_len}; lower it")

    # data: read and encoded by every rank, since conversations are small
    train, val = (Replies(part, tokenizer, cfg.seq_len, pairs=cfg.pairs, packed=cfg.pack, batch_size=cfg.batch_size,
                          seed=cfg.seed)
                  for part in split_prompts(read_preferences(cfg.data), cfg.val_fraction,
                                            read_preferences(cfg.val_data) if cfg.val_data else None))
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * len(train) / cfg.batch_size)
    require_positive(cfg, "steps")
    if cfg.ptx:
        require_positive(cfg, "ptx_rows")
        text_path, *_ = env.main_first(lambda: prepare(cfg.ptx_data, tokenizer=tokenizer_path))
        text = Windows(TokenFile(text_path, tokenizer), cfg.seq_len, batch_size=cfg.ptx_rows, seed=cfg.seed)

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
    config = {"model": dataclasses.asdict(model.config), "head": "lm", "chat_template": CHAT_TEMPLATE,
              "run": dataclasses.asdict(cfg)}
    # What a resumed run must share with the one it continues, and what it should, or else its curve bends:
    same = {"model": {**config["model"], "attention": ""}, "tokenizer": tokenizer.fingerprint}
    read = ref_born["files"].get("model.pt", {}).get("sha256")  # not its path: it may have been trained again
    should = {"data": train.fingerprint(), "ref": read} | {name: getattr(cfg, name) for name in (
        "pack", "seq_len", "beta", "loss_type", "label_smoothing", "average", "batch_size", "micro_batch_size", "lr",
        "min_lr", "warmup_steps", "decay", "weight_decay", "betas", "eps", "clip", "ptx", "ptx_data", "ptx_rows",
        "seed", "dtype", "attention")}
    should["betas"] = list(cfg.betas)  # as JSON gives it back
    # [copy: resume]
    found = load_checkpoint(cfg.out, {"model": zero}, same=same, numbers=["skipped"],
                            bitwise=should) if cfg.resume else None
    start, extra = found or (0, {"skipped": 0})
    skipped = extra["skipped"]
    if start > cfg.steps:
        raise UserError(f"--steps {cfg.steps}: {cfg.out} is already at step {start}; give more steps")
    # [end copy]

    micro = cfg.micro_batch_size  # pairs per forward
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

    # the reference: frozen, the same for the whole run
    ref_zero = Zero(ref, units=ref.units(), device=env.device, stage=cfg.zero, dtype=getattr(torch, cfg.dtype),
                    frozen=True, offload=("params",) if "params" in cfg.offload else ())
    val_ref = all_logps(ref, val, range(len(val)), micro or 16, cfg.average, env)  # (pairs, 2)
    train_ref = None
    if cfg.precompute_ref:
        train_ref = precompute(ref, train, cfg.steps, micro, cfg.average, env)  # (pairs, 2)
        del ref, ref_zero
        gc.collect()  # now: the two refer to each other

    def evaluate_and_show(step: int) -> None:
        log.event(step, **evaluate(all_logps(model, val, range(len(val)), micro or 16, cfg.average, env), val_ref, cfg))
        prompts = [encode_prompt(tokenizer, record.messages) for record in val.records[:cfg.eval_prompts]]
        prompts = [prompt for prompt in prompts if len(prompt) < model.config.max_seq_len]
        if prompts:
            with zero.gathered():
                if env.is_main:
                    room = model.config.max_seq_len - max(map(len, prompts))
                    replies = generate(model, prompts, max_new_tokens=min(room, 64), temperature=0,
                                       eos_id=tokenizer.end_id, banned=tokenizer.specials_but_end)
                    for prompt, reply in zip(prompts, replies):
                        log.say(f"    {tokenizer.decode(prompt + reply)!r}")

    # the loop: exactly cfg.steps updates, numbered from 1; evaluation and checkpoint also at the last
    log.restart_clock()
    if start == cfg.steps or extra.get("due"):
        evaluate_and_show(start)  # finished before: say how it went; or stopped there before it was evaluated
        log.restart_clock()
    for step in range(start + 1, cfg.steps + 1):
        chosen = train.of_step(step - 1)  # batch_size pairs: ONE denominator, whatever the split
        logps, ref_logps = torch.zeros(2 * len(chosen)), torch.zeros(2 * len(chosen))
        loss_sum, n_read = torch.zeros((), device=env.device), 0
        for rows in train.batches(chosen, micro, env.rank, env.world):
            at, rows = rows.at, rows.to(env.device)
            if train_ref is not None:
                ref_part = train_ref[chosen].flatten()[at].to(env.device)  # (n,)
            else:
                with torch.no_grad():
                    ref_part = read_logps(ref, rows, cfg.average)  # (n,)
            part = read_logps(model, rows, cfg.average)  # (n,) chosen, rejected, chosen, rejected, ...
            loss = dpo_loss(part[0::2], part[1::2], ref_part[0::2], ref_part[1::2],
                            cfg.beta, cfg.loss_type, cfg.label_smoothing) / cfg.batch_size
            zero.backward(loss)
            logps[at], ref_logps[at] = part.detach().cpu(), ref_part.cpu()
            loss_sum += loss.detach()
            n_read += int((rows.segment_ids >= 0).sum())
        ptx_sum, n_text = rehearse(model, zero, text, step - 1, cfg, env) if cfg.ptx else (0.0, 0)
        info = zero.step(lr_at(step, cfg), cfg.clip)
        skipped += info.skipped
        loss_sum, ptx_sum, n_read, stop = env.sum(loss_sum, ptx_sum, n_read, env.stop_signal != 0)
        log.count(n_read + n_text)
        last = step == cfg.steps
        if step % cfg.log_every == 0 or step == start + 1 or last:
            logps, ref_logps = torch.tensor(env.sum(*logps, *ref_logps)).view(2, -1, 2)  # each rank knew its own
            log.train(step, loss=loss_sum, **pair_metrics(logps, ref_logps, cfg.beta), grad_norm=info.norm,
                      learning_rate=lr_at(step, cfg), epoch=step * cfg.batch_size / len(train),
                      **({"loss/ptx_avg": ptx_sum} if cfg.ptx else {}), **({"skipped": skipped} if skipped else {}))
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
        weights = zero.full_state_dict()
        if env.is_main:
            save_final(cfg.out, weights, config, tokenizer_path)
        log.say(zero.counted())
        log.say(f"finished: {cfg.out}/final")
    env.close()
    return env.exit_code


if __name__ == "__main__":
    start(main)
