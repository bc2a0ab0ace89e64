"""The model: a GPT that is LLaMA-shaped by default and becomes GPT-2 one switch at a time.

B batch (b: a part of it), T time, C width, H query heads, G key/value heads, D head width, V vocabulary.

    model = GPT(GPTConfig(vocab_size=4096))
    logp = model(ids, targets)            # (B, T) log-probability of each target; every loss is made of these
    logits = model(ids)                   # (B, T, V), for generation and tests

Read in this order: GPTConfig, GPT.forward, Block, Attention, generate; then kernels.py."""
import os
import zlib
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import flash_attention, naive_attention, sdpa_attention, target_logp
from lib.checkpoint import final_folder, load_final
from lib.program import UserError
from lib.tokenizer import Tokenizer


@dataclass
class GPTConfig:
    vocab_size: int = 0  # V, special tokens included; 0: as the tokenizer says
    n_layer: int = 4  # blocks
    n_head: int = 4  # H, query heads
    n_kv_head: int = 0  # G, key/value heads, shared by H/G query heads each; 0: as n_head
    n_embd: int = 128  # C
    head_width: int = 0  # D; 0: C / H
    mlp_hidden: int = 0  # width inside the MLP; 0: 8/3 C (swiglu) or 4 C (gelu), which cost the same
    max_seq_len: int = 256  # longest T, prompt and reply together
    rope_theta: float = 10000.0  # base of the rotation frequencies
    rope_scaling: str = ""  # Llama 3's, for longer rows: factor,low,high,length (8,1,4,8192); empty: none
    norm_eps: float = 1e-5  # keeps a norm of zeros finite
    tie_embeddings: bool = False  # one matrix for reading tokens and predicting them
    norm: Literal["rms", "layer"] = "rms"  # RMSNorm (Zhang & Sennrich 2019) or LayerNorm
    position: Literal["rope", "learned"] = "rope"  # rotary (Su et al. 2021) or a table
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # gated (Shazeer 2020) or GPT-2's
    qk_norm: bool = True  # normalise queries and keys, as Qwen3: lets small models take large learning rates
    bias: bool = False  # bias in linear layers and layer norms
    qkv_bias: bool = False  # bias of queries, keys and values alone, as Qwen2
    attention: Literal["flash", "sdpa", "naive"] = "flash"  # ours, PyTorch's C++ kernel, the definition

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        C, H, G = self.n_embd, self.n_head, self.n_kv_head
        if min(self.n_layer, C, H, G) <= 0 or C % H and not self.head_width or H % G:
            raise UserError(f"--n_layer {self.n_layer} --n_embd {C} --n_head {H} --n_kv_head {G}: expected "
                            "numbers above 0, and each of the last three to divide the one before it")
        self.head_width = self.head_width or C // H
        if self.position == "rope" and self.head_width % 2:
            raise UserError(f"--position rope needs an even head width, found --n_embd {C} / --n_head {H}")
        width = 8 * C / 3 if self.mlp == "swiglu" else 4 * C
        self.mlp_hidden = self.mlp_hidden or max(32, int(width) // 32 * 32)  # multiples of 32 are fast


# ---- the network -----------------------------------------------------------------------------------------

def norm(width: int, config: GPTConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(width, config.norm_eps)
    return nn.LayerNorm(width, config.norm_eps, bias=config.bias)


def rotate(x, cos, sin):
    """Rotary position (Su et al. 2021, eq. 34) in LLaMA's half-split layout: entry d is paired with d + D/2.

    x (B, T, H, D); cos and sin (B or 1, T, 1, D), the sine of the first half negated. (x1, x2) becomes
    (x1 cos - x2 sin, x2 cos + x1 sin), and (x2, x1) is x rolled by D/2."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def frequencies(config: GPTConfig):
    """Radians by which pair j of a head turns from one position to the next, theta^(-2j/D): (D/2,) float64.

    rope_scaling (Llama 3.1, apply_scaling in llama-models): a pair that turns round less than `low` times in
    `length` positions is slowed down by `factor`; more than `high` times, not at all; between, in part."""
    D, scaling = config.head_width, config.rope_scaling
    turn = config.rope_theta ** (-torch.arange(0, D, 2, device="cpu").double() / D)
    if scaling:
        try:
            factor, low, high, length = map(float, scaling.split(","))
        except ValueError:
            raise UserError(f"--rope_scaling {scaling}: expected factor,low,high,length") from None
        kept = ((length * turn / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)
        turn = turn * (kept + (1 - kept) / factor)
    return turn


class Attention(nn.Module):
    """Causal self-attention with H query heads over G key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.H, self.G, self.D = config.n_head, config.n_kv_head, config.head_width
        width, bias = (self.H + 2 * self.G) * self.D, config.bias or config.qkv_bias
        self.qkv = nn.Linear(config.n_embd, width, bias=bias)  # rows: q, k, v
        self.proj = nn.Linear(self.H * self.D, config.n_embd, bias=config.bias)
        self.q_norm, self.k_norm = (norm(self.D, config) if config.qk_norm else nn.Identity() for _ in "qk")
        kernels = {"flash": flash_attention, "sdpa": sdpa_attention, "naive": naive_attention}
        self.attend = kernels[config.attention]

    def forward(self, x, rope, segment_ids, kv_segment_ids, append):
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, self.H + 2 * self.G, self.D)
        q, k, v = qkv.split((self.H, self.G, self.G), dim=2)  # (B, T, H, D), (B, T, G, D) twice
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, G, T, D) twice
        if append is not None:
            k, v = append(k, v)  # (B, G, Tk, D) twice
        y = self.attend(q, k, v, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, H D) -> (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.up = nn.Linear(config.n_embd, config.mlp_hidden * (1 + self.gated), bias=config.bias)
        self.down = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        if not self.gated:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        gate, h = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * h)


class Block(nn.Module):
    """Pre-norm: each half reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attn_norm, self.attn = norm(config.n_embd, config), Attention(config)
        self.mlp_norm, self.mlp = norm(config.n_embd, config), MLP(config)

    def forward(self, x, rope=None, segment_ids=None, kv_segment_ids=None, append=None):
        x = x + self.attn(self.attn_norm(x), rope, segment_ids, kv_segment_ids, append)
        return x + self.mlp(self.mlp_norm(x))


class LMHead(nn.Module):
    """Hidden states to log-probabilities of the targets, or to logits."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.n_embd))
        self.register_buffer("bias", None, persistent=False)

    def forbid(self, ids) -> None:
        """Give these ids probability 0, in drawing and in every log-probability. If only the sampler left
        them out, each log-probability would be wrong by log(1 - p(forbidden))."""
        zeros = self.weight.new_zeros(len(self.weight))
        self.bias = zeros.index_fill(0, torch.tensor(ids, device=zeros.device), -torch.inf)  # (V,)

    def forward(self, x, targets=None, temperature=1.0, **options):
        if targets is None:
            logits = F.linear(x, self.weight) / temperature  # (B, T, V)
            return logits if self.bias is None else logits + self.bias
        x, flat = x.flatten(0, 1), targets.flatten()  # (B T, C), (B T,)
        out = target_logp(x, self.weight, flat, bias=self.bias, temperature=temperature, **options)
        return out.view_as(targets) if torch.is_tensor(out) else [x.view_as(targets) for x in out]  # (B, T)


class GPT(nn.Module):
    """Decoder-only transformer. ids, targets, segment_ids, positions: (B, T) integers.

    With targets, forward returns log p(target) under softmax(logits / temperature), (B, T) float32; options
    are those of target_logp. Without: logits / temperature, (B, T, V), or with a cache (B, 1, V), the last
    position's. With head "scalar": (B, T) float32. segment_ids tell documents apart inside a row (-1:
    padding): attention does not cross them, and positions restart at each change."""

    def __init__(self, config: GPTConfig, head: Literal["lm", "scalar"] = "lm", seed: int = 0):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.position = None if config.position == "rope" else nn.Embedding(config.max_seq_len, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = norm(config.n_embd, config)
        self.head = LMHead(config) if head == "lm" else nn.Linear(config.n_embd, 1)  # a reward or a value
        if config.tie_embeddings and head == "lm":
            self.head.weight = self.embed.weight
        time = torch.arange(config.max_seq_len, device="cpu").double()
        angles = time[:, None] * frequencies(config)  # (T, D/2)
        for name, table in (("cos", (angles.cos(), angles.cos())), ("sin", (-angles.sin(), angles.sin()))):
            self.register_buffer(name, torch.cat(table, -1).float(), persistent=False)  # (T, D)
        initialise(self, seed)

    def forward(self, ids, targets=None, *, segment_ids=None, positions=None, cache=None, **options):
        if ids.shape[1] > self.config.max_seq_len:
            raise UserError(f"a row of {ids.shape[1]} tokens exceeds max_seq_len {self.config.max_seq_len}")
        if segment_ids is not None and bool((segment_ids == segment_ids[:, :1]).all()):
            segment_ids = None  # one document a row: the causal mask alone is the same and cheaper
        if positions is None:
            row = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
            positions = row if segment_ids is None else restarting_positions(segment_ids)  # (B or 1, T)
        x, rope, kv_segment_ids = self.embed(ids), None, None  # (B, T, C)
        if self.position is not None:
            x = x + self.position(positions)
        else:
            rope = [turn[positions][:, :, None].to(x.dtype) for turn in (self.cos, self.sin)]  # (B, T, 1, D)
        if cache is not None:
            segment_ids, kv_segment_ids = cache.advance(ids.shape[1])  # (B, T), (B, Tk)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, segment_ids, kv_segment_ids, cache and partial(cache.append, i))
        x = self.norm(x if cache is None else x[:, -1:])
        if isinstance(self.head, LMHead):
            return self.head(x, targets, **options)
        return self.head(x).squeeze(-1).float()  # (B, T)

    def units(self) -> list[nn.Module]:
        """The modules that ZeRO gathers one at a time. What is in none of them is gathered once a pass."""
        return [*self.blocks] if self.config.tie_embeddings else [self.embed, self.head, *self.blocks]

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> float:
        """Floating-point operations of one training token in a row of T, forward and backward: 6 per weight
        of a matrix product, 12 H D per visible key, of which there are (T + 1) / 2. (Kaplan et al. 2020.)"""
        c, outputs = self.config, self.config.vocab_size if isinstance(self.head, LMHead) else 1
        attention = c.head_width * (2 * c.n_embd * (c.n_head + c.n_kv_head) + c.n_head * (T + 1))
        mlp = c.n_embd * c.mlp_hidden * (2 + (c.mlp == "swiglu"))
        return 6 * (c.n_layer * (attention + mlp) + c.n_embd * outputs)


def restarting_positions(segment_ids):
    """(B, T) positions that count from 0 again wherever the segment id changes."""
    time = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = F.pad(torch.where(segment_ids.diff(dim=1) != 0, time[:, 1:], 0), (1, 0))  # (B, T)
    return time - starts.cummax(1).values


def initialise(module: nn.Module, seed: int, prefix: str = "") -> None:
    """Fill every parameter from its own random stream, a function of (seed, its full name). So a model built
    whole and one built unit by unit on several ranks start from the same numbers. Choices:
    - matrices N(0, 1/fan_in): this keeps the variance of what passes through;
    - 0 for an untied head: the first loss is ln V, and no step is spent on unlearning random guesses;
    - embeddings N(0, 1), the scale that norms give everything else; if tied N(0, 0.02^2), as GPT-2, since a
      token's logit for itself would start at sqrt(C)."""
    tied = isinstance(module, GPT) and module.config.tie_embeddings and isinstance(module.head, LMHead)
    for name, p in module.named_parameters(prefix):
        kind = name.split(".")[-2]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        with torch.no_grad():
            if p.dim() == 1:
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif kind == "head" and not tied:
                p.zero_()
            else:
                std = (0.02 if tied else 1.0) if kind == "embed" else p.shape[1] ** -0.5
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float32) * std)


def load_model(folder: str, head: str = "", attention: str = "") -> tuple[GPT, Tokenizer, dict]:
    """(model, tokenizer, config) of a finished run, given its folder. UserError if it holds something else.

    head "scalar": a language model gets a new head of zeros. head "lm": a reward model is refused. attention:
    another one than it was trained with. config: what config.json holds; config["files"] are checksums."""
    folder = final_folder(folder)
    config, weights = load_final(folder)
    try:
        shape = GPTConfig(**config["model"] | ({"attention": attention} if attention else {}))
        if head == "lm" != config["head"]:
            raise UserError(f"{folder}: found a reward model, expected a language model")
        model = GPT(shape, head=head or config["head"])
        if head not in ("", config["head"]):
            weights = {name: x for name, x in weights.items() if not name.startswith("head.")} | {
                f"head.{name}": p for name, p in model.head.named_parameters()}  # the new head as it was born
        model.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder}: not a model of this version: {' '.join(str(error).split())}") from None
    return model, Tokenizer.load(os.path.join(folder, "tokenizer.json")), config


# ---- generation ------------------------------------------------------------------------------------------

class KVCache:
    """What attention must remember while a text grows: keys and values per layer, and which are padding.
    The buffers have the final length, so that a step only writes its own token. segment_ids (B, length) are
    those of all tokens to come, or None."""

    def __init__(self, n_layer: int, length: int, segment_ids):
        self.length, self.used, self.layers, self.segment_ids = length, 0, [None] * n_layer, segment_ids

    def advance(self, T: int):
        """T new tokens. Returns their segment ids (B, T), and those of all tokens so far, (B, used)."""
        self.used += T
        ids = self.segment_ids
        return (None, None) if ids is None else (ids[:, self.used - T:self.used], ids[:, :self.used])

    def append(self, layer: int, k, v):
        """k, v (B, G, T, D) of the new tokens -> those of all tokens so far, (B, G, used, D) twice."""
        if self.layers[layer] is None:
            self.layers[layer] = [x.new_empty(*x.shape[:2], self.length, x.shape[3]) for x in (k, v)]
        for buffer, x in zip(self.layers[layer], (k, v)):
            buffer[:, :, self.used - x.shape[2]:self.used] = x
        return [buffer[:, :, :self.used] for buffer in self.layers[layer]]

    def keep(self, rows) -> None:
        """Go on with these rows alone, in this order; one may come several times."""
        self.layers = [layer and [buffer[rows] for buffer in layer] for layer in self.layers]
        self.segment_ids = None if self.segment_ids is None else self.segment_ids[rows]


def choose(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0):
    """Draw one token per row: invert its CDF at the row's own uniform number. Temperature 0 takes the argmax.

    logits (B, V), uniforms (B,) in [0, 1) float64 -> (B,) ids. top_k keeps the k likeliest (0: all), top_p
    the fewest whose probability reaches p (Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.double() / temperature).softmax(-1)  # (B, V)
    if top_k or top_p < 1:
        ranked, order = p.sort(dim=-1, descending=True, stable=True)
        drop = ranked.cumsum(-1) - ranked >= top_p  # the mass before a token already suffices
        drop[:, 0], drop[:, top_k or len(p[0]):] = False, True
        p = p.scatter(-1, order, ranked.masked_fill(drop, 0.0))
    cdf = p.cumsum(-1)
    ids = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)[:, 0]
    return ids.clamp(max=p.shape[-1] - 1)


@torch.inference_mode()
def generate(model, prompts, *, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos_id=None, banned=(),
             seeds=None, return_logp=False, on_token=lambda row, id: None):
    """Continue each prompt (a non-empty list of ids): a list of new ids per prompt, eos_id included if drawn.

    max_new_tokens 0: up to max_seq_len. seeds: an integer for each prompt, or some: (seed, use, index). What
    row i draws depends on seeds[i], not on its neighbours. banned: ids never drawn. return_logp: also their
    log-probabilities under softmax(logits / temperature). on_token(row, id): called at every new token."""
    device, T, limit = model.cos.device, max(map(len, prompts)), model.config.max_seq_len
    room = [max_new_tokens or limit - len(prompt) for prompt in prompts]  # most new ids of each
    if T + (max_new_tokens or 1) > limit:
        raise UserError(f"{T} + {max_new_tokens} new tokens exceed max_seq_len {limit}; shorten the prompt")
    ids = torch.tensor([[-1] * (T - len(p)) + list(p) for p in prompts], device=device)  # padded left, (B, T)
    ids, each = ids.unique(dim=0, return_inverse=True)  # equal prompts are read once: (b, T), (B,)
    positions = (ids >= 0).cumsum(1) - 1  # (b, T), -1 at padding
    padded = F.pad(positions.clamp(max=0), (0, max(room)))  # (b, T + max(room)), the same
    cache = KVCache(len(model.blocks), padded.shape[1], padded if min(map(len, prompts)) < T else None)
    ids, positions = ids.clamp(min=0), positions.clamp(min=0)
    uniforms = [np.random.Generator(np.random.Philox(s)).random(max(room)) for s in seeds or range(len(room))]
    uniforms = torch.from_numpy(np.stack(uniforms)).to(device)  # (B, max(room)); Philox mixes s first
    banned = torch.tensor(banned, dtype=torch.long, device=device)
    new, logps, rows = [[] for _ in prompts], [[] for _ in prompts], list(range(len(prompts)))
    for t in range(max(room)):
        full = model(ids, positions=positions, cache=cache)[:, -1].float()  # (b, V)
        if t == 0:  # the prompts are read: from here on every reply has its own row
            cache.keep(each)
            full, positions = full[each], positions[each]  # (B, V), (B, T)
        drawn = choose(full.index_fill(-1, banned, -torch.inf), uniforms[:, t], temperature, top_k, top_p)
        if return_logp:
            scaled = (full / (temperature or 1.0)).log_softmax(-1).gather(-1, drawn[:, None])[:, 0].tolist()
        going = []  # which of the rows go on
        for i, (row, token) in enumerate(zip(rows, drawn.tolist())):
            if new[row][-1:] == [eos_id] or len(new[row]) == room[row]:
                continue
            new[row].append(token)
            if return_logp:
                logps[row].append(scaled[i])
            on_token(row, token)
            if token != eos_id and len(new[row]) < room[row]:
                going.append(i)
        if not going:
            break
        if len(going) <= 0.75 * len(rows):  # to drop the finished rows saves time, but copies the cache
            rows = [rows[i] for i in going]
            cache.keep(going)
            drawn, uniforms, positions = drawn[going], uniforms[going], positions[going]
        ids, positions = drawn[:, None], (positions[:, -1:] + 1).clamp(max=limit - 1)  # (b, 1) twice
    return (new, logps) if return_logp else new


def generate_sorted(model, prompts, *, batch_size, seeds, progress=None, **options):
    """generate for any number of prompts: batch_size at a time, those of like length together to pad little.

    Replies come in the order of the prompts; with return_logp each is a pair (ids, logp). progress(done,
    total) is called after every batch. on_token gets a row's place in its batch."""
    order, replies = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [None] * len(prompts)
    for start in range(0, len(order), batch_size):
        some = order[start:start + batch_size]
        new = generate(model, [prompts[i] for i in some], seeds=[seeds[i] for i in some], **options)
        for i, reply in zip(some, zip(*new) if options.get("return_logp") else new):
            replies[i] = reply
        if progress:
            progress(start + len(some), len(order))
    return replies


def greedy_replies(model, prompts, tokenizer, longest: int = 64) -> str:
    """Each prompt (a list of ids) with the likeliest reply, a line each. What leaves no room is left out."""
    how = {"temperature": 0, "eos_id": tokenizer.end_id, "banned": tokenizer.specials_but_end}
    room = [(prompt, min(longest, model.config.max_seq_len - len(prompt))) for prompt in prompts]
    whole = (p + generate(model, [p], max_new_tokens=n, **how)[0] for p, n in room if n > 0)
    return "\n".join(f"    {tokenizer.decode(ids)!r}" for ids in whole)
