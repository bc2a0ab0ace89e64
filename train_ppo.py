"""PPO from human feedback: draw replies, score them, make the better ones likelier, stay near the start.

    maximise  E[ score(x, y) - beta KL(policy || reference) ]         (Ouyang et al. 2022, section 3.5, eq. 2)

Four models. The actor (policy) and the critic (value) are trained; the critic begins as the reward model. The
reference, which is the actor as it was at first, and the reward model are frozen. A step has three parts:

    rollout      the actor replies to a batch of prompts: pure sampling at one temperature, no top-k or top-p
    scoring      k_t = log pi(a_t|s_t) - log ref(a_t|s_t);  r_t = -beta k_t, and at the last token + score
                 delta_t = r_t + gamma V(s_t+1) - V(s_t);  A_t = delta_t + gamma lambda A_t+1
                 return_t = A_t + V(s_t)
    optimising   rho_t = pi(a_t|s_t) / pi_old(a_t|s_t);  minimise, as means over the tokens of the replies,
                 max(-A rho, -A clip(rho, 1-eps, 1+eps))
                 and 1/2 max((V - return)^2, (clip(V, V_old +- c) - return)^2)

Which number is read where, of four tokens of a prompt (q), a reply of two (a) and its end (E):

    position     0    1    2    3    4    5    6
    ids          q    q    q    q    a0   a1   E
    target       .    .    .    a0   a1   E    .
    slot t       .    .    .    0    1    2    .      log pi(a_t|s_t) and V(s_t) stand at the position before
    log pi, V    .    .    .    3    4    5    .      a_t, since s_t is all that comes before it
    score        .    .    .    .    .    .    6      the reward model reads the whole reply, so at E
    r_t          .    .    .    -bk0 -bk1 -bk2+score  but it is the reward for the action E; after E V = 0

A reply that did not end in time has no E to act. Its score is read at an E put there for the reward model
alone. It counts at the last token, and missing_eos_penalty is taken off.

    python train_ppo.py --data prompts.jsonl --init out/sft --reward_model out/rm --out out/ppo   one process
"""
import copy
import itertools
import math
from collections import Counter
from dataclasses import dataclass

import torch

import rollouts
from data import CHAT_TEMPLATE, Rehearsal, RehearsalConfig, expect_chat
from lib.program import UserError, parse, require_positive, start
from lib.ranks import setup
from lib.run import Run, RunConfig, lr_at, with_error
from lib.tokenizer import Tokenizer
from lora import DeltaConfig, attach, base_of, final_of
from model import GPT, load_model
from rollouts import Models, Rollout, draw, in_slots, masked, micro_batches, minibatches, sample_lines, score
from zero import Zero


@dataclass
class Config(RunConfig, RehearsalConfig, DeltaConfig):  # the flags that all stages share are in lib/run.py
    # data
    data: str = ""  # prompts: {"prompt"}, or conversations less the last reply; files or a folder
    # rollouts
    max_new_tokens: int = 48  # longest reply
    temperature: float = 1.0  # sampling and all log-probabilities are of logits / temperature
    # reward
    reward_model: str = "out/rm"  # folder of the reward model
    beta: float = 0.05  # weight of the KL penalty; 0: off
    missing_eos_penalty: float = 1.0  # taken off the score of a reply that did not end
    lam: float = 0.95  # of GAE: 1 trusts returns alone, 0 the critic alone
    whiten_advantages: bool = True  # give the advantages of a rollout mean 0 and variance 1
    # optimisation
    steps: int = 0  # rollouts, each with ppo_epochs x minibatches updates; 0: 100, or fewer by --epochs
    epochs: float = 20.0  # most replies to each prompt, if steps is 0
    batch_size: int = 128  # prompts per rollout over all ranks, one reply each (B)
    ppo_epochs: int = 2  # times each rollout is seen
    minibatches: int = 4  # updates per epoch
    micro_batch_size: int = 0  # packed rows per rank and forward; 0: the rank's share of a minibatch
    cliprange: float = 0.2  # eps: a ratio further than this from 1 has no gradient
    cliprange_value: float = 0.2  # c: how far a value may move from where it was at the rollout; 0: off
    stop_kl: float = 0.1  # approximate KL per token to the rollout's policy that ends a step early; 0: off
    lr: float = 2e-4  # peak learning rate of the actor
    min_lr: float = 1e-5  # what the learning rate falls to, one update after the last
    critic_lr: float = 0.0  # of the critic; 0: as the actor's
    warmup_steps: int = 5  # rollouts over which the rate climbs from 0
    # run
    out: str = "out/ppo"
    init: str = "out/sft"
    eval_every: int = 25  # steps between evaluations; 0: only before the first step and at the end
    eval_prompts: int = 128  # validation prompts answered at each evaluation; 0: none
    save_every: int = 50
    log_every: int = 1

    adam_eps, gamma = 1e-5, 1.0  # no flags: AdamW's, discount per token
    may_change = RunConfig.may_change | {"reward_model"}

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "max_new_tokens", "temperature", "ppo_epochs", "minibatches", "cliprange")
        if self.batch_size < self.minibatches:
            raise UserError(f"--minibatches {self.minibatches}: more than --batch_size {self.batch_size}")


# ---- the algorithm: B replies of R slots. Losses are sums; the caller divides by the tokens of all ranks.

def kl_penalty(logp, ref_logp):
    """log pi - log ref of each token, any shape. Its mean over the policy's own samples is the KL (k1 of
    Schulman 2020), and as a reward it has the gradient of the KL. A single one may be negative."""
    return logp - ref_logp


def token_rewards(kl, scores, mask, beta):
    """r_t = -beta k_t, and + score at the last token of each reply. kl (B, R), scores (B,) -> (B, R)."""
    last = mask.long().sum(1, keepdim=True) - 1  # (B, 1)
    return masked(-beta * kl, mask).scatter_add(1, last, scores[:, None].to(kl.dtype))


def gae(rewards, values, mask, gamma, lam):
    """(advantages, returns), (B, R) each (Schulman et al. 2016, eq. 16): A_t = sum_k (gamma lam)^k delta_t+k
    with delta_t = r_t + gamma V_t+1 - V_t. After the last token there is nothing to come: V = 0, A = 0."""
    rewards, values = masked(rewards, mask), masked(values, mask)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = masked(delta + gamma * lam * next_advantage, mask[:, t])
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def whiten(x, mask):
    """x (B, R) shifted and scaled to mean 0 and variance 1 over the tokens of a whole rollout."""
    n = (mask > 0).sum()
    mean = masked(x, mask).sum() / n
    variance = masked((x - mean) ** 2, mask).sum() / n
    return masked((x - mean) * torch.rsqrt(variance + 1e-8), mask)


def ppo_policy_loss(logp, old_logp, advantages, mask, clip):
    """Sum over tokens of max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = pi / pi_old; all (B, R).
    Schulman et al. 2017, eq. 7. The maximum is a pessimistic bound: to move beyond clip gains nothing, but a
    move in the wrong direction costs in full. Returns (loss, sums to be logged)."""
    log_ratio = masked(logp - old_logp, mask)
    ratio, advantages = log_ratio.exp(), masked(advantages, mask)
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(free, clipped).sum(), {
        "policy/approxkl_avg": 0.5 * (log_ratio**2).sum(),
        "policy/clipfrac_avg": (clipped > free).sum(), "val/ratio": masked(ratio, mask).sum()}


def ppo_value_loss(values, old_values, returns, mask, clip):
    """Sum over tokens of 1/2 max((V - return)^2, (V_old + clip(V - V_old, -clip, clip) - return)^2); (B, R).
    Again the larger of two: a value gains nothing by moving further than clip. Returns (loss, sums)."""
    free = masked(values - returns, mask) ** 2
    moved = masked(values - old_values, mask).clamp(-clip, clip)
    clipped = (masked(old_values - returns, mask) + moved) ** 2
    clipped = torch.where(moved.abs() < clip, free, clipped)  # the same number, without its rounding
    return 0.5 * torch.maximum(free, clipped).sum(), {"val/clipfrac_avg": (clipped > free).sum()}


def add_gradients(rollout: Rollout, chosen: list[int], advantages, returns, models: Models, actor: Zero,
                  critic: Zero, cfg: Config, ranks) -> dict[str, float]:
    """Gradients of both losses of a minibatch, as means over its tokens. Returns sums over them."""
    n_tokens = int(rollout.mask[chosen].sum())  # ONE denominator, however micro-batches and ranks split them
    sums = Counter()
    for which, ids, targets, segment_ids in micro_batches(rollout, chosen, cfg, ranks):
        mask = rollout.mask[which]  # (n, R)
        logp = models.actor(ids, targets, segment_ids=segment_ids, temperature=cfg.temperature)  # (b, T)
        policy_loss, policy_sums = ppo_policy_loss(in_slots(logp, targets, mask), rollout.logp[which],
                                                   advantages[which], mask, cfg.cliprange)
        actor.backward(policy_loss / n_tokens)
        values = in_slots(models.critic(ids, segment_ids=segment_ids), targets, mask)  # (n, R)
        value_loss, value_sums = ppo_value_loss(values, rollout.values[which], returns[which], mask,
                                                cfg.cliprange_value or math.inf)
        critic.backward(value_loss / n_tokens)
        found = {"loss/policy_avg": policy_loss, "loss/value_avg": value_loss, **policy_sums, **value_sums}
        sums.update({name: x.detach() for name, x in found.items()})  # a sum would keep each graph
    return {"tokens": n_tokens, **dict(zip(sums, ranks.sum(*sums.values())))}


def load_models(cfg: Config) -> tuple[Models, Tokenizer, list]:
    """(actor, critic, reference, reward model; their tokenizer; checksums of the frozen two)."""
    actor, tokenizer, born = load_model(cfg.init, "lm", attention=cfg.attention)
    reward, its_tokenizer, its_config = load_model(cfg.reward_model, "scalar", attention=cfg.attention)
    if its_config["head"] != "scalar" or its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"--reward_model {cfg.reward_model}: found another head or tokenizer, expected a "
                        f"reward model that train_rm.py made from --init {cfg.init}")
    actor.head.forbid(tokenizer.specials_but_end)  # a reply never holds pad, bos or a role
    for folder, model, config in ((cfg.init, actor, born), (cfg.reward_model, reward, its_config)):
        expect_chat(folder, config)
        attach(model, cfg, config)  # with --tune: a delta, and the rest frozen
    cfg.fit_rows(min(actor.config.max_seq_len, reward.config.max_seq_len))
    frozen = [config["files"].get("model.pt", {}).get("sha256") for config in (born, its_config)]
    if cfg.tune:  # no second copies: the same two with their deltas off
        return Models(actor, reward, base_of(actor), base_of(reward)), tokenizer, frozen
    return Models(actor, copy.deepcopy(reward), copy.deepcopy(actor), reward), tokenizer, frozen


def evaluate(val: list, models: Models, zero: Zero, tokenizer, cfg: Config, ranks, say) -> dict:
    """Score, KL and length of one reply to each prompt, with the same random numbers at every evaluation."""
    n, size = len(val), -(-cfg.batch_size // cfg.minibatches)
    rollout = draw([ids for _, ids in val], 0, models.actor, zero, tokenizer, cfg, ranks)
    score(rollout, [list(range(n))[first:first + size] for first in range(0, n, size)], models, cfg, ranks)
    means = {**with_error("eval_score", rollout.scores), "eval_kl": rollout.log_ratio().sum() / n,
             "eval_ended": sum(rollout.ended) / n, "eval_response_length": rollout.mask.sum() / n}
    tags = [record.tag for record, _ in val]
    for tag in sorted(set(tags) - {""}):
        means[f"eval_score/{tag}"] = rollout.scores[[i for i in range(n) if tags[i] == tag]].mean()
    for prompt, reply in zip(rollout.prompts[:3], rollout.replies):
        say(f"    {tokenizer.decode(prompt + reply)!r}")
    return {name: float(value) for name, value in means.items()}


def metrics_of(rollout: Rollout, scores, returns) -> dict[str, float]:
    """What a rollout is like, a mean per reply where nothing else is said. The names are TRL's."""
    n, mask = len(scores), rollout.mask
    explained = 1 - (returns - rollout.values)[mask].var(correction=0) / returns[mask].var(correction=0)
    return {"objective/scores": scores.mean().item(), "objective/kl": rollout.log_ratio().sum().item() / n,
            "objective/entropy": -masked(rollout.logp, mask).sum().item() / n,
            "val/explained_variance": explained.item(), "val/num_eos_tokens": sum(rollout.ended),
            "val/response_length": mask.sum().item() / n,
            "val/sampler_gap": masked(rollout.sampled_logp - rollout.logp, mask).abs().max().item()}


def main(argv=None) -> int:
    cfg = parse(Config, argv, __doc__)
    ranks = setup(cfg.device)  # this process and its peers: rank, world, device, sum()
    models, tokenizer, frozen = load_models(cfg)
    train, records, val, read = rollouts.load_prompts(cfg, tokenizer)
    text = Rehearsal(cfg, tokenizer, ranks)  # of --ptx; without it nothing
    actor, critic, *_ = (Zero(model, units=model.units(), frozen=model in models[2:],
                              **cfg.zero_options(ranks)) for model in models if isinstance(model, GPT))
    run = Run(cfg, ranks, {"actor": actor, "critic": critic}, tokenizer, read=read,
              inputs={"data": train.fingerprint(), "frozen": frozen, "ptx_data": text.fingerprint()},
              final={"head": "lm", "chat_template": CHAT_TEMPLATE})

    for step in run.steps(lambda: evaluate(val, models, actor, tokenizer, cfg, ranks, run.say) if val else {},
                          first=True):
        # rollout
        chosen = train.of_step(step - 1)
        rollout = draw([train.items[i] for i in chosen], step, models.actor, actor, tokenizer, cfg, ranks)
        score(rollout, minibatches(cfg, step, 0), models, cfg, ranks)
        run.append("samples.jsonl", sample_lines(rollout, step, [records[i] for i in chosen], tokenizer))
        if not any(rollout.ended):
            run.say("    no reply ended in time; give more --max_new_tokens, or train SFT for longer")

        # rewards and advantages: the same numbers on every rank
        scores = rollout.scores - cfg.missing_eos_penalty * ~torch.tensor(rollout.ended, device=ranks.device)
        kl = kl_penalty(rollout.logp, rollout.ref_logp)  # (B, R)
        rewards = token_rewards(kl, scores, rollout.mask, cfg.beta)  # (B, R)
        advantages, returns = gae(rewards, rollout.values, rollout.mask, cfg.gamma, cfg.lam)  # (B, R) each
        if cfg.whiten_advantages:
            advantages = whiten(advantages, rollout.mask)

        # optimising: epochs x minibatches updates
        totals, updates, skipped = Counter(), 0, 0
        lr, critic_lr = lr_at(step, cfg), lr_at(step, cfg, peak=cfg.critic_lr)
        for epoch, m in itertools.product(range(cfg.ppo_epochs), range(cfg.minibatches)):
            part = minibatches(cfg, step, epoch)[m]
            sums = add_gradients(rollout, part, advantages, returns, models, actor, critic, cfg, ranks)
            batch = (step - 1) * cfg.ppo_epochs * cfg.minibatches + updates
            ptx, _ = text.backward(models.actor, actor, batch)  # PPO-ptx (Ouyang et al. 2022, eq. 2)
            infos = actor.step(lr, cfg.clip), critic.step(critic_lr, cfg.clip)
            totals.update(sums | {name: sums["tokens"] * mean for name, mean in ptx.items()})
            updates, skipped = updates + 1, skipped + sum(info.skipped for info in infos)
            if 0 < cfg.stop_kl < sums["policy/approxkl_avg"] / sums["tokens"]:  # on all ranks alike
                break
        n_tokens = totals.pop("tokens")
        run.log(step, tokens=sum(map(len, rollout.sequences)), skipped=skipped,
                **metrics_of(rollout, scores, returns), **{name: x / n_tokens for name, x in totals.items()},
                lr=lr, episode=step * cfg.batch_size, updates=updates,
                **{"grad_norm/actor": infos[0].norm, "grad_norm/critic": infos[1].norm})
    return run.finish(final_of(models.actor))


if __name__ == "__main__":
    start(main)
