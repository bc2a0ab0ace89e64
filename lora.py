"""Delta tuning: train a small part of a model, or beside it, and leave the rest, the base, as it is.

    LoRA: W' = W + s B A,  s = alpha / rank;  A (rank, in) random, B (out, rank) zero  (Hu et al. 2021, eq. 3)

The base has no gradients and no optimizer, which would take three times the memory of its weights. What is
trained is a file of kilobytes, delta.pt. With its delta off a model is its base, to the last bit: so DPO and
PPO need no second model for their reference. docs/lora.md compares the methods.

    python train_sft.py --data chats.jsonl --init out/pretrain --tune lora --out out/lora
    python sample.py --model out/pretrain --delta out/lora --chat
"""
import contextlib
import copy
import dataclasses
import math
import zlib
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.checkpoint import load_final
from lib.program import UserError, require_positive
from model import GPT, Block, LMHead, initialise, load_model, restarting_positions

Methods = Literal["", "lora", "dora", "adapter", "ladder", "prefix", "prompt", "bias", "norm", "last"]
ALONE = ("adapter", "ladder", "prefix", "prompt")  # no plain model computes the same: there is no merging


@dataclass
class DeltaConfig:
    # delta tuning
    tune: Methods = ""  # what is trained: a delta, and the rest is frozen; empty: all weights (see lora.py)
    rank: int = 8  # of lora and dora; the width of an adapter; others ignore it
    alpha: float = 16.0  # lora and dora: B A counts alpha / rank times
    targets: str = "qkv,proj,up,down"  # of lora and dora: matrices of a block; adapter: only proj, down
    length: int = 8  # of prefix and prompt, in tokens; of last, in blocks
    base: Literal["float", "int8"] = "float"  # how the frozen matrices of the blocks are held


# ---- beside one matrix: y (..., out) is W x + b ----------------------------------------------------------

class LowRank(torch.autograd.Function):
    """W x + b + s B A x, W (out, in) and b frozen; or W = scale q, made whole twice and not kept. A, B None:
    W x + b. By hand, because autograd would add up the two gradients of x in a pass of its own."""

    @staticmethod
    def forward(ctx, x, W, scale, b, A, B, s: float):
        ctx.shape, ctx.s, x = x.shape, s, x.flatten(0, -2)  # (n, in)
        y, u = F.linear(x, whole(W, scale, x.dtype), b), None  # (n, out)
        if A is not None:
            u = x @ A.T  # (n, rank)
            y.addmm_(u, B.T, alpha=s)
        ctx.save_for_backward(None if A is None else x, W, scale, A, B, u)
        return y.view(*ctx.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        (x, W, scale, A, B, u), dy, dx = ctx.saved_tensors, dy.flatten(0, -2), None
        if ctx.needs_input_grad[0]:
            dx = dy @ whole(W, scale, dy.dtype)
        if A is None:
            return dx.view(ctx.shape), *[None] * 6
        du = (B.T @ dy.T).mul_(ctx.s)  # (rank, n)
        if dx is not None:
            dx = dx.addmm_(du.T, A).view(ctx.shape)
        return dx, None, None, None, du @ x, (u.T @ dy).mul_(ctx.s).T, None


def whole(W, scale, dtype):
    return W if scale is None else (W * scale).to(dtype)


class Tuned(nn.Module):
    """A linear layer with a frozen W (out, in) and a delta of some kind. int8: W is held as scale q, a scale
    a row, so that |error| <= scale / 2. normal(rows, columns): random numbers."""
    on = True

    def __init__(self, linear: nn.Linear, kind: str, cfg: DeltaConfig, normal):
        super().__init__()
        self.weight, self.bias, self.s = linear.weight, linear.bias, cfg.alpha / cfg.rank
        (n_out, n_in), r, W = linear.weight.shape, cfg.rank, linear.weight.detach()
        q, scale, new = None, None, {}
        if cfg.base == "int8":
            scale = W.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127  # (out, 1)
            q = (W / scale).round().to(torch.int8)
            self.weight, W = None, q * scale
        self.register_buffer("q", q, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        if kind in ("lora", "dora"):  # B starts at 0, and so y at W x
            new = {"A": normal(r, n_in) * n_in**-0.5, "B": torch.zeros(n_out, r)}
        if kind == "dora":
            new["m"] = W.norm(dim=1)
        if kind == "adapter":
            new = {"down": normal(r, n_out) * n_out**-0.5, "down_bias": torch.zeros(r),
                   "up": torch.zeros(n_out, r), "up_bias": torch.zeros(n_out)}
        if kind == "bias":  # BitFit (Ben Zaken et al. 2022), of the linear layers
            new = {"shift": torch.zeros(n_out)}
        self.names = list(new)
        for name, value in new.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, x):
        own = {name: getattr(self, name) for name in self.names if self.on}
        if self.q is None and "A" not in own:
            y = F.linear(x, self.weight, self.bias)
        else:
            W = self.weight if self.q is None else self.q
            b = None if "m" in own else self.bias
            y = LowRank.apply(x, W, self.scale, b, own.get("A"), own.get("B"), self.s)
            if "m" in own:  # DoRA: W' = m V / |V| row by row, V = W + s B A: length and direction apart
                with torch.no_grad():  # (Liu et al. 2024, equation 5; no gradient through |V|, section 4.3)
                    V = whole(W, self.scale, x.dtype) + self.s * self.B @ self.A  # (out, in)
                    lengths = V.norm(dim=1).clamp(min=1e-30)  # (out,)
                y = y * (self.m / lengths) + (0 if self.bias is None else self.bias)
        if "up" in own:  # a small network, before y joins the residual stream (Houlsby et al. 2019)
            y = y + F.linear(F.gelu(F.linear(y, self.down, self.down_bias)), self.up, self.up_bias)
        return y + self.shift if "shift" in own else y

    def merged(self, W, b, own: dict):
        """(W', b') of a plain layer, all float64 and so rounded once, when they are saved."""
        if "A" in own:
            W = W + self.s * own["B"] @ own["A"]
        if "m" in own:
            W = W * (own["m"] / W.norm(dim=1).clamp(min=1e-30))[:, None]
        if "shift" in own:
            b = own["shift"] if b is None else b + own["shift"]
        return W, b


class Either(nn.Module):
    """A module that is trained whole: a copy of it, and the base for off()."""
    on = True

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.tuned = base, copy.deepcopy(base).requires_grad_(True)

    def forward(self, *args, **kwargs):
        return (self.tuned if self.on else self.base)(*args, **kwargs)


# ---- in front of the text --------------------------------------------------------------------------------

class Prefix(nn.Module):
    """Attention whose queries also see P keys and values that are no tokens (Li & Liang 2021), of G heads and
    without a position. Each document in a row sees its own copy. It never is the base: even values of 0 take
    their share of the attention."""
    on = True

    def __init__(self, attend, keys=None):
        super().__init__()
        self.attend, self.keys, self.values = attend, None, None  # (G, P, D) twice; a Prompt's if not its own
        if keys is not None:
            self.keys, self.values = nn.Parameter(keys), nn.Parameter(torch.zeros_like(keys))

    def forward(self, q, k, v, *, segment_ids, kv_segment_ids):
        if self.on and self.keys is not None:
            n = 1 if segment_ids is None else int(segment_ids.max()) + 1  # documents in a row
            k, v = (torch.cat((own.repeat(1, n, 1).expand(len(x), -1, -1, -1), x), 2)  # (B, G, n P + Tk, D)
                    for own, x in ((self.keys, k), (self.values, v)))
            if segment_ids is not None:
                copies = torch.arange(n, device=q.device).repeat_interleave(self.keys.shape[1])  # (n P,)
                ids = segment_ids if kv_segment_ids is None else kv_segment_ids
                kv_segment_ids = torch.cat((copies.expand(len(ids), -1), ids), 1)  # (B, n P + Tk)
        return self.attend(q, k, v, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids)


class Prompt(nn.Module):
    """P embeddings in front of each text (Lester et al. 2021), at positions 0 to P - 1. They see only each
    other, so one pass reads them for all texts: what they say in a layer is that layer's prefix."""
    on = True

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows)  # (P, C)

    def read(self, model: GPT) -> None:
        place = torch.arange(len(self.rows), device=self.rows.device)[None]  # (1, P)
        x, rope = self.rows[None], None  # (1, P, C)
        if model.position is not None:
            x = x + model.position(place)
        else:
            rope = [turn[place][:, :, None].to(x.dtype) for turn in (model.cos, model.sin)]  # (1, P, 1, D)
        for prefix, block in ((block.attn.attend, block) for block in model.blocks):
            kept, prefix.keys = [], None  # that of the last pass: they do not see it
            x = block(x, rope, append=lambda k, v, kept=kept: kept.append((k[0], v[0])) or (k, v))
            prefix.keys, prefix.values = kept[0]  # (G, P, D) each

    def in_front_of(self, model: GPT):
        """model.forward of texts that begin behind the prompt."""
        forward = model.forward

        def behind(ids, targets=None, *, segment_ids=None, positions=None, cache=None, **options):
            if self.on:
                if cache is None or not cache.used:  # a text that grows has it already
                    self.read(model)
                if positions is None:
                    positions = restarting_positions(ids * 0 if segment_ids is None else segment_ids)
                positions = positions + len(self.rows)  # (B, T)
            return forward(ids, targets, segment_ids=segment_ids, positions=positions, cache=cache, **options)
        return behind


# ---- beside the whole model ------------------------------------------------------------------------------
# Ladder side tuning (Sung et al. 2022). h_i: hidden states of the base, C wide; s_i: the side's, c wide:
#     s_0 = down h_0   s_i = block_i(mu s_i-1 + (1 - mu) down_i h_i), mu = sigmoid(10 a_i)  out = h_L + up s_L
# No gradient enters the base. up starts at 0, so that the start is the base (our choice). Both travel as one
# tensor (B, T, C + c). The blocks of base and side take turns in model.blocks: each has its own KV cache.

class Rung(nn.Module):
    """base: (h, s) -> (block(h), s), and the first one makes s; side: (h, s) -> (h, block of s and h); norm:
    (h, s) -> normalised h + up s, (B, T, C)."""
    on = True

    def __init__(self, place: str, module: nn.Module, C: int, map: nn.Linear | None = None):
        super().__init__()
        self.place, self.module, self.C, self.map = place, module, C, map
        if place == "side":
            self.a = nn.Parameter(torch.zeros(1))

    def forward(self, x, *args):
        h, s = x[..., :self.C], x[..., self.C:]  # (B, T, C), (B, T, c)
        if self.place == "norm":
            return self.module(h + self.map(s) if self.on else h)
        if self.place == "base":
            s = s if self.map is None else self.map(h)
            with torch.no_grad():
                h = self.module(h, *args)
        elif self.on:
            mu = (10 * self.a).sigmoid()
            s = self.module(mu * s + (1 - mu) * self.map(h), *args)
        return torch.cat((h, s), -1)


def add_ladder(model: GPT, seed: int) -> None:
    """The side has an eighth of the heads, at least one, as wide as the base's: so positions turn alike."""
    C, heads = model.config.n_embd, max(1, model.config.n_head // 8)
    c = model.config.head_width * heads
    narrow = dataclasses.replace(model.config, n_head=heads, n_kv_head=heads, n_embd=c, mlp_hidden=0)
    rungs = []
    for i, block in enumerate(model.blocks):
        rungs.append(Rung("base", block, C, None if i else nn.Linear(C, c, bias=False)))
        rungs.append(Rung("side", Block(narrow), C, nn.Linear(C, c, bias=False)))
        initialise(rungs[-1], seed, f"ladder.side.{i}")
    initialise(rungs[0].map, seed, "ladder.bottom")
    model.blocks = nn.ModuleList(rungs)
    model.norm = Rung("norm", model.norm, C, nn.Linear(c, C, bias=False))
    nn.init.zeros_(model.norm.map.weight)


# ---- the whole -------------------------------------------------------------------------------------------

Delta = namedtuple("Delta", "cfg names init checksum")  # flags; what is trained; the base's folder and sum


def check(model: GPT, cfg: DeltaConfig, born: dict) -> None:
    """UserError for flags that do not fit each other or the model."""
    require_positive(cfg, "rank", "alpha", "length")
    if set(cfg.targets.split(",")) - {"qkv", "proj", "up", "down"}:
        raise UserError(f"--targets {cfg.targets}: expected some of qkv,proj,up,down")
    if cfg.tune in ALONE and not isinstance(model.head, LMHead) and born["head"] == "lm":
        raise UserError(f"--tune {cfg.tune}: expected one that leaves a plain reward model, such as lora")
    if cfg.length >= {"last": len(model.blocks), "prompt": model.config.max_seq_len}.get(cfg.tune, math.inf):
        raise UserError(f"--tune {cfg.tune} --length {cfg.length}: nothing would be left; give less")
    if cfg.tune == "prompt" and getattr(cfg, "activation_checkpointing", False):
        raise UserError("--tune prompt: its blocks run twice a pass; leave out --activation_checkpointing")
    if cfg.tune == "bias" and model.config.norm == "layer" and not model.config.bias:
        raise UserError("--tune bias: found layer norms without bias, expected --bias or --norm rms")


def attach(model: GPT, cfg: DeltaConfig, born: dict) -> None:
    """Freeze the model and give it a delta, before Zero takes it; without --tune nothing is done. born: what
    load_model said of it. A new head of rewards is trained whole."""
    if not cfg.tune:
        if cfg.base == "int8":
            raise UserError("--base int8: found no --tune, expected one: weights in int8 cannot be trained")
        return
    check(model, cfg, born)
    targets, c, seed = {*cfg.targets.split(",")}, model.config, getattr(cfg, "seed", 0)
    targets = {"lora": targets, "dora": targets, "adapter": targets & {"proj", "down"},
               "bias": {"qkv", "proj", "up", "down"}}.get(cfg.tune, ())
    model.requires_grad_(False)

    def normal(*shape, name: str):  # each from its own stream: all ranks and resumed runs agree
        stream = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        return torch.randn(shape, generator=stream)

    for i, block in enumerate(model.blocks):
        if cfg.tune == "last" and i >= len(model.blocks) - cfg.length:
            model.blocks[i] = Either(block)
            continue
        for part, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "up"), (block.mlp, "down")):
            kind = cfg.tune if name in targets else ""
            if kind or cfg.base == "int8":
                draw = partial(normal, name=f"{i}.{name}")
                setattr(part, name, Tuned(getattr(part, name), kind, cfg, draw))
        if cfg.tune in ("prefix", "prompt"):
            shape = c.n_kv_head, cfg.length, c.head_width
            own = normal(*shape, name=f"prefix.{i}") if cfg.tune == "prefix" else None
            block.attn.attend = Prefix(block.attn.attend, own)
    for part in [*model.modules()] if cfg.tune == "norm" else [model] if cfg.tune == "last" else ():
        for name, child in [*part.named_children()]:
            if isinstance(child, (nn.RMSNorm, nn.LayerNorm)):
                setattr(part, name, Either(child))
    if cfg.tune == "ladder":
        add_ladder(model, seed)
    if cfg.tune == "bias":
        model.config = dataclasses.replace(c, bias=True)
    if cfg.tune == "prompt":  # it starts as random words, and takes its share of the positions
        model.prompt = Prompt(model.embed.weight[normal(c.vocab_size, name="prompt").argsort()[:cfg.length]])
        model.forward = model.prompt.in_front_of(model)
        model.config = dataclasses.replace(c, max_seq_len=c.max_seq_len - cfg.length)
    if not isinstance(model.head, LMHead):
        model.head = Either(model.head)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if not names:
        raise UserError(f"--tune {cfg.tune} --targets {cfg.targets}: found nothing to train; name a matrix")
    flags = DeltaConfig(*(getattr(cfg, field.name) for field in dataclasses.fields(DeltaConfig)))
    checksum = born["files"].get("model.pt", {}).get("sha256", "")
    model.delta = Delta(flags, names, getattr(cfg, "init", ""), checksum)
    model.flops_per_token = lambda T: 0  # a frozen weight takes less than the formula says: no MFU


@contextlib.contextmanager
def off(model: GPT):
    """Inside, the model is its base. Only without gradients: a block that is computed again in backward would
    find its delta on."""
    if torch.is_grad_enabled():
        raise RuntimeError("off() stands inside torch.no_grad()")
    parts = [part for part in model.modules() if getattr(part, "on", False)]
    try:
        for part in parts:
            part.on = False
        yield
    finally:
        for part in parts:
            part.on = True


def base_of(model: GPT):
    """A function that computes what the base would: a second model without a second copy."""
    return torch.no_grad()(off(model)(lambda *args, **kwargs: model(*args, **kwargs)))


def final_of(model: GPT, first=lambda weights: None):
    """What Run.finish does to the weights, after first(weights): what stays is the plain model that they are,
    or nothing if there is none. Returns delta.pt: the delta, its flags, and which base it belongs to."""
    def change(weights: dict) -> dict:
        first(weights)
        if not hasattr(model, "delta"):
            return {}
        cfg, names, init, checksum = model.delta
        delta = {"config": dataclasses.asdict(cfg), "base": checksum}
        delta["weights"] = {name: weights[name] for name in names}
        if cfg.tune in ALONE:
            weights.clear()
            return {"delta.pt": delta}
        base = load_final(init)[1] if init else {}  # a run in 16 bits has rounded it
        weights |= {name: base[name] for name in weights.keys() & base.keys() - {*names}}
        for name, part in model.named_modules():
            if isinstance(part, Tuned):
                W, b = (weights.pop(f"{name}.{key}", None) for key in ("weight", "bias"))
                own = {key: weights.pop(f"{name}.{key}").double() for key in part.names}
                W = part.q.cpu() * part.scale.cpu() if W is None else W
                W, b = part.merged(W.double(), None if b is None else b.double(), own)
                weights |= {f"{name}.weight": W.float()} | ({} if b is None else {f"{name}.bias": b.float()})
        for name in [name for name in weights if ".base." in name]:
            del weights[name]
            weights[name.replace(".base.", ".")] = weights.pop(name.replace(".base.", ".tuned."))
        return {"delta.pt": delta}
    return change


def load_tuned(folder: str, delta: str = "", head: str = "", attention: str = ""):
    """load_model; given the folder of a tuned run, with its delta and its config. UserError if it has another
    base."""
    model, tokenizer, config = load_model(folder, head, attention)
    if delta:
        born, (config, file) = config, load_final(delta, "delta.pt")
        attach(model, DeltaConfig(**file["config"]), born)
        if (model.delta.checksum, {*model.delta.names}) != (file["base"], {*file["weights"]}):
            raise UserError(f"{delta}: found the delta of another model, expected one trained from {folder}")
        model.load_state_dict(file["weights"], strict=False)
    return model, tokenizer, config
