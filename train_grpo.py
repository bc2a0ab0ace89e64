"""GRPO: PPO without a critic. Draw a group of replies to each prompt; the better ones of it become likelier.

    A_i advantage of reply i, one of G to a prompt, with reward r_i; the same for all its tokens, |o_i| in all
    rho_t = pi(a_t|s_t) / pi_old(a_t|s_t) of a token;  l(A, rho) = max(-A rho, -A clip(rho, 1-eps, 1+eps'))

    --variant  A_i                           minimise, for N replies
    grpo       (r_i - mean) / (std + 1e-4)   1/N sum_i 1/|o_i| sum_t l(A_i, rho_t)   Shao et al. 2024, eq. 3
    dr_grpo    r_i - mean                    1/N sum_i 1/L sum_t l(A_i, rho_t)       Liu et al. 2025, sec. 3
    rloo       r_i - mean of the other G-1   1/N sum_i l(A_i, prod_t rho_t)          Ahmadian et al. 2024

L is --max_new_tokens. std is that of the G rewards, with G - 1 below the line. A group of equal rewards has
A = 0 and teaches nothing. Because of 1/|o_i| a token of a long wrong reply is punished less than one of a
short wrong reply, so wrong replies grow longer; dr_grpo divides by L. For rloo a whole reply is one action.

The policy pays beta times its KL to the reference, told by d = log ref - log pi of each token (--kl):

    reward      k_i = -sum_t d_t counts as a reward of -beta k_i, but no std divides it: that of KL(pi || ref)
    k1          -d, in the loss: its value is that KL, but its gradient is 0 on average
    k2          d^2 / 2: the gradient of KL(pi || ref)
    k3          exp(d) - d - 1: the value of KL(pi || ref), the gradient of KL(ref || pi)    (Schulman 2020)

    python train_grpo.py --data prompts.jsonl --init out/sft --reward_model out/rm --out out/grpo
    python train_grpo.py --data prompts.jsonl --init out/sft --reward village.truth:points
"""
import copy
import itertools
import pkgutil
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch

import rollouts
from data import CHAT_TEMPLATE, Rehearsal, RehearsalConfig, expect_chat
from lib.program import UserError, parse, require_positive, start
from lib.ranks import setup, together
from lib.run import Run, RunConfig, lr_at, with_error
from lora import DeltaConfig, attach, base_of, final_of
from model import GPT, load_model
from rollouts import Models, Rollout, draw, in_slots, masked, micro_batches, minibatches, sample_lines, score
from zero import Zero


@dataclass
class Config(RunConfig, RehearsalConfig, DeltaConfig):  # the flags that all stages share are in lib/run.py
    # data
    data: str = ""  # prompts: {"prompt"}, or conversations less the last reply; files or a folder
    # rollouts
    group_size: int = 8  # replies to each prompt (G)
    max_new_tokens: int = 48  # longest reply (L)
    temperature: float = 1.0  # sampling and all log-probabilities are of logits / temperature
    # reward
    reward_model: str = ""  # folder of a reward model; or else
    reward: str = ""  # module:function, say village.truth:points: f(messages, reply, ended, data) -> number
    variant: Literal["grpo", "dr_grpo", "rloo"] = "grpo"  # see the head of this file
    beta: float = 0.3  # weight of the KL; 0: off
    kl: Literal["reward", "k1", "k2", "k3"] = "reward"  # how it is paid for
    missing_eos_penalty: float = 1.0  # taken off the reward of a reply that did not end in time
    # optimisation
    steps: int = 0  # rollouts, each with num_iterations x minibatches updates; 0: 100, or fewer by --epochs
    epochs: float = 20.0  # most replies to each prompt, if steps is 0
    batch_size: int = 128  # replies per rollout over all ranks (N)
    num_iterations: int = 1  # times each rollout is seen
    minibatches: int = 4  # updates each time
    micro_batch_size: int = 0  # packed rows per rank and forward; 0: the rank's share of a minibatch
    cliprange: float = 0.2  # eps: a worse reply's token that fell so far has no gradient
    cliprange_high: float = 0.28  # eps': nor a better one's that rose so far (clip-higher, Yu et al. 2025)
    lr: float = 5e-4
    warmup_steps: int = 5  # rollouts over which the rate climbs from 0
    # run
    out: str = "out/grpo"
    init: str = "out/sft"
    eval_every: int = 25  # steps between evaluations; 0: only before the first step and at the end
    eval_prompts: int = 128  # validation prompts answered at each evaluation; 0: none
    save_every: int = 50
    log_every: int = 1

    may_change = RunConfig.may_change | {"reward_model"}

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "max_new_tokens", "temperature", "num_iterations", "minibatches", "cliprange")
        N, G, M = self.batch_size, self.group_size, self.minibatches
        if G < 2 or N % G or N < M:
            raise UserError(f"--batch_size {N} --group_size {G} --minibatches {M}: found no whole groups")
        if bool(self.reward_model) == bool(self.reward):
            raise UserError(f"--reward_model {self.reward_model!r} --reward {self.reward!r}: expected one")
        try:
            if self.reward and not callable(pkgutil.resolve_name(self.reward)):
                raise ValueError("found no function")
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"--reward {self.reward}: {error}; expected module:function") from None


# ---- the algorithm: N replies of R slots, those of a group side by side ----------------------------------

def group_advantages(rewards, group_size: int, variant: str):
    """A of each reply: (N,) -> (N,)."""
    r = rewards.view(-1, group_size)  # (N/G, G)
    A = r - r.mean(1, keepdim=True)
    if variant == "grpo":
        A = A / (r.std(1, keepdim=True) + 1e-4)
    if variant == "rloo":  # r_i - (sum - r_i) / (G - 1)
        A = A * group_size / (group_size - 1)
    equal = (r == r[:, :1]).all(1, keepdim=True)  # their std may be a rounding error, and A its multiple
    return A.masked_fill(equal, 0).flatten()


def token_weights(mask, variant: str, longest: int):
    """What the loss of each token counts, (n, R): so that all sums below are means over n replies."""
    lengths = mask.sum(1, keepdim=True) if variant == "grpo" else longest if variant == "dr_grpo" else 1
    return mask / lengths / len(mask)


def policy_loss(logp, old_logp, A, mask, weights, variant: str, low: float, high: float):
    """Sum over tokens of weight x max(-A rho, -A clip(rho, 1 - low, 1 + high)); (n, R) each, A (n,). For rloo
    rho is that of the whole reply. Returns (loss, sums to be logged)."""
    log_ratio, A = masked(logp - old_logp, mask), A[:, None]
    if variant == "rloo":
        log_ratio, weights = log_ratio.sum(1, keepdim=True), weights[:, :1]  # (n, 1) each
    ratio = log_ratio.exp()
    free, clipped = -A * ratio, -A * ratio.clamp(1 - low, 1 + high)
    stuck = weights * (clipped > free)
    return (weights * torch.maximum(free, clipped)).sum(), {
        "clip_ratio/low_mean": (stuck * (A < 0)).sum(), "clip_ratio/high_mean": (stuck * (A > 0)).sum()}


def kl_loss(logp, ref_logp, mask, weights, kind: str):
    """Sum over tokens of weight x k1, k2 or k3; (n, R) each."""
    d = masked(ref_logp - logp, mask)
    return (weights * {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[kind]).sum()


def add_gradients(rollout, chosen: list[int], A, models: Models, actor: Zero, cfg: Config, ranks) -> Counter:
    """Gradients of a minibatch's loss. Every token's weight is known before the replies are split."""
    weights, sums = torch.zeros_like(rollout.logp), Counter()  # (N, R)
    weights[chosen] = token_weights(rollout.mask[chosen], cfg.variant, cfg.max_new_tokens)
    for which, ids, targets, segment_ids in micro_batches(rollout, chosen, cfg, ranks):
        mask = rollout.mask[which]  # (n, R)
        logp = models.actor(ids, targets, segment_ids=segment_ids, temperature=cfg.temperature)  # (b, T)
        logp = in_slots(logp, targets, mask)  # (n, R)
        loss, found = policy_loss(logp, rollout.logp[which], A[which], mask, weights[which], cfg.variant,
                                  cfg.cliprange, cfg.cliprange_high)
        if cfg.beta and cfg.kl != "reward":
            loss = loss + cfg.beta * kl_loss(logp, rollout.ref_logp[which], mask, weights[which], cfg.kl)
        actor.backward(loss)
        sums.update({name: x.detach() for name, x in {"loss/policy_avg": loss, **found}.items()})
    return Counter(dict(zip(sums, ranks.sum(*sums.values()))))


def load_models(cfg: Config) -> tuple[Models, object, list]:
    """(actor, no critic, reference, reward model or nothing; tokenizer; checksums of the frozen ones)"""
    def nothing(ids, **_):  # stands where a model is missing: 0 at each position, (B, T)
        return torch.zeros(ids.shape, device=ids.device)
    actor, tokenizer, born = load_model(cfg.init, "lm", attention=cfg.attention)
    expect_chat(cfg.init, born)
    actor.head.forbid(tokenizer.specials_but_end)  # a reply never holds pad, bos or a role
    attach(actor, cfg, born)  # with --tune: a delta, and the rest frozen
    reference = base_of(actor) if cfg.tune else copy.deepcopy(actor)
    actor.flops_per_token = lambda T: 0  # most of a step is drawing and scoring: no MFU
    reward, longest, configs = nothing, actor.config.max_seq_len, [born]
    if cfg.reward_model:
        reward, its_tokenizer, config = load_model(cfg.reward_model, "scalar", attention=cfg.attention)
        if config["head"] != "scalar" or its_tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(f"--reward_model {cfg.reward_model}: found another head or tokenizer, expected "
                            f"what train_rm.py made from --init {cfg.init}")
        longest, configs = min(longest, reward.config.max_seq_len), [born, config]
    cfg.fit_rows(longest)
    frozen = [config["files"].get("model.pt", {}).get("sha256") for config in configs]
    return Models(actor, nothing, reference, reward), tokenizer, frozen


def roll_out(pairs, step: int, models: Models, zero: Zero, tokenizer, cfg: Config, ranks) -> Rollout:
    """A reply to each (record, prompt), and what it is worth: the models' word, or that of a function."""
    rollout = draw([ids for _, ids in pairs], step, models.actor, zero, tokenizer, cfg, ranks)
    n, size = len(pairs), -(-cfg.batch_size // cfg.minibatches)
    parts = minibatches(cfg, step, 0) if step else [range(n)[i:i + size] for i in range(0, n, size)]
    score(rollout, parts, models, cfg, ranks)
    if cfg.reward:
        points = pkgutil.resolve_name(cfg.reward)
        said = together(lambda: ranks.rank == 0 and [
            points(record.messages, tokenizer.decode(reply[:-1] if end else reply), end, cfg.data)
            for (record, _), reply, end in zip(pairs, rollout.replies, rollout.ended)])[0]
        rollout.scores = torch.tensor(said, dtype=torch.float32, device=ranks.device)  # (N,)
    return rollout


def evaluate(val: list, models: Models, zero: Zero, tokenizer, cfg: Config, ranks, say) -> dict:
    """Reward, KL and length of one reply to each prompt, with the same random numbers at every evaluation."""
    rollout, n = roll_out(val, 0, models, zero, tokenizer, cfg, ranks), len(val)
    for (_, prompt), reply in zip(val[:3], rollout.replies):
        say(f"    {tokenizer.decode(prompt + reply)!r}")
    means = {**with_error("eval_score", rollout.scores), "eval_kl": rollout.log_ratio().sum() / n,
             "eval_ended": sum(rollout.ended) / n, "eval_response_length": rollout.mask.sum() / n}
    return {name: float(value) for name, value in means.items()}


def main(argv=None) -> int:
    cfg = parse(Config, argv, __doc__)
    ranks = setup(cfg.device)  # this process and its peers: rank, world, device, sum()
    models, tokenizer, frozen = load_models(cfg)
    N, G = cfg.batch_size, cfg.group_size
    train, records, val, read = rollouts.load_prompts(cfg, tokenizer, G)
    text = Rehearsal(cfg, tokenizer, ranks)  # of --ptx; without it nothing
    actor, *_ = (Zero(model, units=model.units(), frozen=model is not models.actor,
                      **cfg.zero_options(ranks)) for model in models if isinstance(model, GPT))
    run = Run(cfg, ranks, {"actor": actor}, tokenizer, read=read,
              inputs={"data": train.fingerprint(), "frozen": frozen, "ptx_data": text.fingerprint()},
              final={"head": "lm", "chat_template": CHAT_TEMPLATE})

    for step in run.steps(lambda: evaluate(val, models, actor, tokenizer, cfg, ranks, run.say) if val else {},
                          first=True):
        # rollout: the replies to a prompt stand side by side, each drawn with random numbers of its own
        pairs = [(records[i], train.items[i]) for i in train.of_step(step - 1) for _ in range(G)]
        rollout = roll_out(pairs, step, models, actor, tokenizer, cfg, ranks)
        run.append("samples.jsonl", sample_lines(rollout, step, [record for record, _ in pairs], tokenizer))

        # advantages: the same numbers on every rank
        kl = rollout.log_ratio().sum(1)  # (N,)
        rewards = rollout.scores - cfg.missing_eos_penalty * ~torch.tensor(rollout.ended, device=ranks.device)
        A, groups = group_advantages(rewards, G, cfg.variant), rewards.view(-1, G)
        if cfg.kl == "reward":  # never divided by a std: that of equal rewards would be the KL's own noise
            A = A - cfg.beta * group_advantages(kl, G, "rloo" if cfg.variant == "rloo" else "dr_grpo")

        # optimising
        totals, skipped, lr, n_updates = Counter(), 0, lr_at(step, cfg), cfg.num_iterations * cfg.minibatches
        for i, (epoch, m) in enumerate(itertools.product(range(cfg.num_iterations), range(cfg.minibatches))):
            part = minibatches(cfg, step, epoch)[m]
            totals.update(add_gradients(rollout, part, A, models, actor, cfg, ranks))
            totals.update(text.backward(models.actor, actor, (step - 1) * n_updates + i)[0])
            info = actor.step(lr, cfg.clip)
            skipped += info.skipped
        run.log(step, tokens=sum(map(len, rollout.sequences)), skipped=skipped, reward=rewards.mean().item(),
                reward_std=groups.std(1).mean().item(),
                frac_reward_zero_std=(groups == groups[:, :1]).all(1).float().mean().item(),
                kl=kl.mean().item(), entropy=-masked(rollout.logp, rollout.mask).sum().item() / N,
                **{"completions/mean_length": rollout.mask.sum().item() / N,
                   "completions/clipped_ratio": 1 - sum(rollout.ended) / N},
                **{name: x / n_updates for name, x in totals.items()}, lr=lr, grad_norm=info.norm)
    return run.finish(final_of(models.actor))


if __name__ == "__main__":
    start(main)
