"""Attention without T x T scores, and log-probabilities without M x V logits: exact.

B batch, T time (Tq queries, Tk keys), H query heads, G key/value heads, group = H/G, D head width; M rows of
hidden states, C width, V vocabulary."""
import math

import torch
import torch.nn.functional as F

LOG2E = math.log2(math.e)
SCORES_AT_ONCE = {"cpu": 2**20, "cuda": 2**25}  # in one tile, with all its heads; a CPU's fits into the cache
LOGITS_AT_ONCE = 3 * 2**23  # 96 MB of float32; with fewer, the weight and its gradient are read more often

# ---- attention, the short version ------------------------------------------------------------------------
# softmax(q k^T / sqrt(D)) v has T x T scores, but its result has T x D numbers. Two facts let us make scores
# tile by tile, and forget each tile after use. Softmax does not change when a number m is subtracted from all
# scores of a row. And a sum made with an old m becomes one with a new m by the factor e^(old - new). So a row
# carries m, its largest score so far, l = sum_j e^(s_j - m) and acc = sum_j e^(s_j - m) v_j. In the end its
# result is acc / l. (Online softmax, Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022.)

def simple_tiled_attention(q, k, v, tile=64):
    """Causal attention: q, k, v (B, H, T, D) -> out (B, H, T, D) and L (B, H, T, 1), the log of sum_j e^(s_j)
    of each row. A backward pass gets the probabilities back from it: P = e^(S - L)."""
    out, L = torch.empty_like(q), torch.empty_like(q[..., :1])
    for i in range(0, q.shape[2], tile):
        rows = slice(i, i + tile)
        m = torch.full_like(L[:, :, rows], -math.inf)  # (B, H, rows, 1)
        l, acc = torch.zeros_like(m), torch.zeros_like(q[:, :, rows])  # (B, H, rows, 1), (B, H, rows, D)
        for j in range(0, i + 1, tile):  # later tiles of keys lie in the future
            keys = slice(j, j + tile)
            S = q[:, :, rows] @ k[:, :, keys].transpose(2, 3) * q.shape[-1] ** -0.5  # (B, H, rows, keys)
            if i == j:  # on the diagonal each query sees the keys up to its own
                S = S.masked_fill(torch.ones_like(S, dtype=torch.bool).triu(1), -math.inf)
            old, m = m, torch.maximum(m, S.amax(-1, keepdim=True))
            P, shrink = (S - m).exp(), (old - m).exp()
            l = l * shrink + P.sum(-1, keepdim=True)
            acc = acc * shrink + P @ v[:, :, keys]
        out[:, :, rows], L[:, :, rows] = acc / l, m + l.log()
    return out, L


def visible(Tq, Tk, causal, segment_ids, kv_segment_ids, device):
    """Which query sees which key, (Tq, Tk) or (B, 1, Tq, Tk) bool; None if all see all, as one query does."""
    mask = torch.ones(Tq, Tk, dtype=torch.bool, device=device).tril(Tk - Tq) if causal and Tq > 1 else None
    ids_q, ids_k = segment_ids, segment_ids if kv_segment_ids is None else kv_segment_ids
    if ids_k is None:
        return mask
    same = (ids_q[:, None, :, None] == ids_k[:, None, None]) & (ids_k >= 0)[:, None, None]  # (B, 1, Tq, Tk)
    return same if mask is None else mask & same


def naive_attention(q, k, v, *, causal=True, segment_ids=None, kv_segment_ids=None):
    """softmax(q k^T / sqrt(D)) v: the definition that flash_attention must equal, with the same arguments."""
    (B, H, Tq, D), (_, G, Tk, _), total = q.shape, k.shape, dtypes(q)[1]
    q = (q.to(total) * D ** -0.5).reshape(B, G, H // G * Tq, D)
    S = (q @ k.to(total).transpose(2, 3)).view(B, H, Tq, Tk)
    mask = visible(Tq, Tk, causal, segment_ids, kv_segment_ids, q.device)
    if mask is None:
        P = S.softmax(-1)
    else:  # where a row sees nothing, softmax gives NaN, but the answer is 0
        P = S.masked_fill_(~mask, -math.inf).softmax(-1).masked_fill(~mask, 0.0)
    return (P.to(v.dtype).view(B, G, H // G * Tq, Tk) @ v).view(B, H, Tq, D)


def sdpa_attention(q, k, v, *, causal=True, segment_ids=None, kv_segment_ids=None):
    """PyTorch's own kernel, for comparison and as an alternative. Packed rows cost it a (Tq, Tk) mask."""
    (_, H, Tq, _), (_, G, Tk, _) = q.shape, k.shape
    triangle = causal and segment_ids is None and Tq == Tk
    mask = None if triangle else visible(Tq, Tk, causal, segment_ids, kv_segment_ids, q.device)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=triangle, enable_gqa=H != G)
    return out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


# ---- attention, the fast version -------------------------------------------------------------------------
#                  keys ->
#              a a a b b b          one character a tile, of two documents a and b packed in one row:
#     queries  \ . . . . .          #  every query sees every key: computed as it is
#        |     # \ . . . .          \  the diagonal, or a border between documents: computed, then masked
#        v     # # \ . . .          .  no query sees any key, the future or another document: left out
#              . . . \ . .
#              . . . # \ .          Powers are of 2 here, since exp2 can be faster than exp: log2(e) is
#              . . . # # \          a part of the scores' scale.
#
# Kept for backward: the output O and L = m + log2(l), one number a row. The scores are made again. With dO,
# the gradient of O, and s = 1/sqrt(D) (FlashAttention, algorithm 4; FlashAttention-2, Dao 2023):
#     P = 2^(S - L)    dv = P^T dO    dP = dO v^T    dS = P * (dP - delta)    dq = s dS k    dk = s dS^T q
#     delta_i = sum_j P_ij dP_ij = dO_i . O_i     (the one term of softmax's gradient that needs a whole row)

def flash_attention(q, k, v, *, causal=True, segment_ids=None, kv_segment_ids=None, block=None):
    """Tiled attention, forward and backward by hand: equals naive_attention, with memory linear in T.

    q (B, H, Tq, D), k, v (B, G, Tk, D), one floating dtype, H a multiple of G -> (B, H, Tq, D). Softmax and
    sums are float32 (float64 for float64). causal: the last query sees all keys, the one before it one less,
    and so on. segment_ids (B, Tq), kv_segment_ids (B, Tk), by default the same: a query sees keys of its own
    id only; negative ids are padding; a query that sees nothing gives 0. block: (rows, columns) of a tile."""
    (B, H, Tq, D), (_, G, Tk, _) = q.shape, k.shape
    ids_q, ids_k = segment_ids, segment_ids if kv_segment_ids is None else kv_segment_ids
    ids_fit = ids_k is None or (ids_q.shape == (B, Tq) and ids_k.shape == (B, Tk))
    if k.shape != (B, G, Tk, D) or v.shape != k.shape or H % G or not ids_fit:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} or the segment ids do not fit together")
    if Tq == 1 and block is None:  # decoding: few scores
        return naive_attention(q, k, v, segment_ids=ids_q, kv_segment_ids=ids_k)
    if block is None:  # small tiles waste less at the borders of rows and documents; GPUs like large ones
        rows = 64 if Tq <= 512 else 128 if Tq <= 1024 or ids_q is not None else 256
        large = max(256, 2 ** ((Tq * G // H).bit_length() // 2 + 3))  # of one head about 8 sqrt(Tq)
        block = (large, 2 * large) if q.is_cuda else (rows, 512)
    if ids_k is not None:  # padding gets two ids that never match
        ids_q = ids_q.long().masked_fill(ids_q < 0, 2**63 - 1).repeat_interleave(G, 0)  # (B G, Tq)
        ids_k = ids_k.long().masked_fill(ids_k < 0, 2**63 - 2).repeat_interleave(G, 0)  # (B G, Tk)
    # The queries that share a key become rows of one product, time first. So keys are never repeated.
    q = q.unflatten(1, (G, H // G)).transpose(2, 3).reshape(B * G, Tq * (H // G), D)  # (B G, Tq group, D)
    k, v = k.flatten(0, 1), v.flatten(0, 1)  # (B G, Tk, D) twice
    out = uncompiled(TiledAttention.apply, q, k, v, ids_q, ids_k, H, G, causal, block)
    return out.view(B, G, Tq, H // G, D).transpose(2, 3).reshape(B, H, Tq, D)


def uncompiled(function, *args):
    """function(*args), kept from torch.compile, which would unroll the tiles into thousands of operations."""
    if torch.compiler.is_compiling():  # only then: disable() loads the compiler, which takes seconds
        function = torch.compiler.disable(function)
    return function(*args)


def dtypes(x):
    """Of a product's factors, and of its sum. Only GPUs offer half-precision factors with a float32 sum."""
    total = torch.promote_types(x.dtype, torch.float32)
    return (x.dtype if x.is_cuda else total), total


def product(a, b, out, scale=1.0, add=False):
    """out = scale * a @ b, or out += scale * a @ b, also for batches. If one factor is a half, both are."""
    if add and not (out.is_contiguous() or out.is_cuda):  # a CPU's BLAS writes them slowly
        return out.add_(product(a, b, out.new_empty(out.shape), scale))
    multiply = torch.baddbmm if out.dim() == 3 else torch.addmm
    half = a.dtype if b.dtype == out.dtype else b.dtype
    wider = {} if half == out.dtype else {"out_dtype": out.dtype}
    return multiply(out, a.to(half), b.to(half), beta=int(add), alpha=scale, out=out, **wider)


class Tiles:
    """Iterating gives (heads, rows, tiles) for each tile of queries; iterating over `tiles` gives (keys, S).

    heads, rows, keys: slices of q (B G, Tq group, D) and k (B G, Tk, D). S (n, rows, keys), or (n, keys,
    rows) if keys_first: the scores times log2(e), -inf where hidden, free to be overwritten."""

    def __init__(self, q, k, ids_q, ids_k, H, G, causal, block, keys_first=False):
        self.q, self.k, self.ids_q, self.ids_k, self.keys_first = q, k, ids_q, ids_k, keys_first
        self.group, self.causal, self.scale, self.width = H // G, causal, q.shape[2] ** -0.5, block[0]
        self.Tq, self.Tk = q.shape[1] // self.group, k.shape[1]
        self.rows = max(1, min(block[0], self.Tq))  # of a tile, in time
        self.columns = max(block[0], block[1] * (block[0] // self.rows))  # few queries take many keys at once
        size = self.rows * self.group * min(self.columns, max(1, self.Tk))
        self.heads = max(1, min(len(k), SCORES_AT_ONCE[q.device.type] // size))  # in one tile
        if ids_q is not None and self.heads > G:  # whole rows of the batch: each has borders of its own
            self.heads -= self.heads % G
        self.buffers = q.new_empty(1 + keys_first, self.heads * size, dtype=dtypes(q)[1])  # S, dP: reused
        self.P = self.buffers[0] if q.dtype == self.buffers.dtype else q.new_empty(self.heads * size)  # 2^S
        self.future = self.buffers.new_full((self.rows, self.rows), -math.inf).triu_(1)[:, None]  # (t, 1, t)
        if ids_q is not None:  # told from a tile's smallest and largest: right in any order, sharp if sorted
            edges = []
            for ids, width, shape in ((ids_q, self.rows, (-1, 1)), (ids_k, self.width, (1, -1))):
                whole = torch.cat((ids, ids[:, -1:].expand(-1, -ids.shape[1] % width)), 1)
                edges += whole.view(len(ids), *shape, width).aminmax(dim=-1)
            low_q, high_q, low_k, high_k = edges  # (B G, query tiles, 1), (B G, 1, key tiles)
            self.need = (low_q <= high_k) & (low_k <= high_q)  # (B G, query tiles, key tiles): ids in common
            self.mixed = (low_q != high_k) | (low_k != high_q)  # more than one id

    def __iter__(self):
        for first in range(0, len(self.k), self.heads):
            heads = slice(first, first + self.heads)
            if self.ids_q is not None:
                needless = (~self.need[heads].any(0)).cumprod(-1).sum(-1)  # key tiles before the first needed
                starts, mixed = (needless * self.width).tolist(), self.mixed[heads].any(0).tolist()
            for i, i0 in enumerate(range(0, self.Tq, self.rows)):
                i1 = min(i0 + self.rows, self.Tq)
                rows = slice(i0 * self.group, i1 * self.group)
                start, mask = (0, ()) if self.ids_q is None else (starts[i], mixed[i])
                yield heads, rows, self.scores(heads, rows, i0, i1, start, mask)

    def scores(self, heads, rows, i0, i1, start, mask):
        q, factor = self.q[heads, rows], self.scale * LOG2E
        if q.dtype == self.buffers.dtype:  # product scales its first factor: q forward, k backward. But both
            q, factor = q * factor, 1.0  # must round alike, or 2^(S - L) is wrong where S is large.
        seen = i0 + self.Tk - self.Tq  # the last key that query i0 may see
        end = min(self.Tk, seen + i1 - i0) if self.causal else self.Tk
        for j0 in range(start, end, self.columns):
            j1 = min(j0 + self.columns, end)
            a, b = (self.k[heads, j0:j1], q) if self.keys_first else (q, self.k[heads, j0:j1])
            shape = len(a), a.shape[1], b.shape[1]
            S = product(a, b.transpose(1, 2), self.buffers[0, :math.prod(shape)].view(shape), factor)
            by_time = S.transpose(1, 2) if self.keys_first else S
            by_time = by_time.unflatten(1, (i1 - i0, self.group))  # (n, t, group, keys)
            if self.causal and j1 > seen + 1:  # the diagonal runs through this tile
                by_time[..., max(0, seen - j0):].add_(self.future[:i1 - i0, :, max(0, j0 - seen):j1 - seen])
            if any(mask[j0 // self.width:-(-j1 // self.width)]):
                differ = self.ids_q[heads, i0:i1, None] != self.ids_k[heads, None, j0:j1]  # (n, t, keys)
                by_time.masked_fill_(differ[:, :, None], -math.inf)
            yield slice(j0, j1), S


class TiledAttention(torch.autograd.Function):
    """q (B G, Tq group, D), k, v (B G, Tk, D) and what else Tiles takes -> out, shaped as q."""

    @staticmethod
    def forward(ctx, q, k, v, ids_q, ids_k, *options):
        factors, total = dtypes(q)
        values, lowest = v.to(factors), torch.finfo(total).min  # finite, since -inf - -inf is NaN
        out, L = q.new_empty(q.shape), q.new_empty(*q.shape[:2], 1, dtype=total)
        t = Tiles(q.to(factors), k.to(factors), ids_q, ids_k, *options)
        for heads, rows, tiles in t:
            m = torch.full_like(L[heads, rows], lowest)  # (n, rows, 1)
            l, acc = torch.zeros_like(m), m.new_zeros(*m.shape[:2], v.shape[2])  # (n, rows, 1), (n, rows, D)
            for keys, S in tiles:
                old, m = m, torch.maximum(m, S.amax(-1, keepdim=True))
                P, shrink = torch.exp2(S.sub_(m), out=t.P[:S.numel()].view_as(S)), old.sub_(m).exp2_()
                l.mul_(shrink).add_(P.sum(-1, keepdim=True, dtype=total))
                product(P, values[heads, keys], acc.mul_(shrink), add=True)
            l.clamp_(min=1.0)  # a row's largest term is 2^0; less is a row that saw nothing, its result 0 / 1
            torch.div(acc, l, out=out[heads, rows])
            torch.add(m, l.log2_(), out=L[heads, rows])
        ctx.save_for_backward(q, k, v, ids_q, ids_k, out, L)  # here the hooks of ZeRO find all of it
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("there is no second derivative; call backward without create_graph")
        # Keys come first in S, and dQ is summed transposed: BLAS is slow where it must transpose P or dS.
        *saved, ids_q, ids_k, out, L = ctx.saved_tensors
        q, k, v, out, grad = (x.to(dtypes(x)[0]) for x in (*saved, out, grad))
        t = Tiles(q, k, ids_q, ids_k, *ctx.options, keys_first=True)
        delta = (grad * out).sum(-1, dtype=L.dtype)[:, None]  # (B G, 1, Tq group)
        L = L.transpose(1, 2)  # (B G, 1, Tq group)
        dq, dk, dv = (L.new_zeros(x.shape) for x in (q, k, v))
        for heads, rows, tiles in t:
            dq_t = L.new_zeros(dq[heads, rows].transpose(1, 2).shape)  # (n, D, rows)
            for keys, S in tiles:
                P = torch.exp2(S.sub_(L[heads, :, rows]), out=t.P[:S.numel()].view_as(S))  # (n, keys, rows)
                product(P, grad[heads, rows], dv[heads, keys], add=True)
                dP = product(v[heads, keys], grad[heads, rows].mT, t.buffers[1, :S.numel()].view_as(S))
                dS = torch.mul(dP.sub_(delta[heads, :, rows]), P, out=P)
                product(k[heads, keys].transpose(1, 2), dS, dq_t, t.scale, add=True)
                product(dS, q[heads, rows], dk[heads, keys], t.scale, add=True)
            dq[heads, rows] = dq_t.transpose(1, 2)
        return *(dx.to(x.dtype) for dx, x in zip((dq, dk, dv), saved)), *[None] * 6


# ---- log-probabilities -----------------------------------------------------------------------------------
# log p(t) = z_t - log sum_v e^(z_v), z = (W h + b) / temperature. Some rows' V logits are made, reduced to a
# few numbers and overwritten. The backward pass makes them again and gets p from the saved log-sum-exp (after
# "Cut Your Losses", Wijmans et al. 2024). With g and g', the gradients of log p(t) and of the entropy:
#     dz_v = g (1[v = t] - p_v) - g' p_v (log p_v + entropy)    dh = W^T dz / temperature    dW likewise
# dh and dW are linear in g. If g is the same for all rows, the forward pass can make them for g = 1 while it
# has the logits, and the backward pass only multiplies (Liger-Kernel, Hsu et al. 2024).

def target_logp(hidden, weight, targets, *, bias=None, temperature=1, with_stats=False, equal_weights=False):
    """log p(target) under softmax((hidden weight^T + bias) / temperature), without all (M, V) logits.

    hidden (M, C), weight (V, C), bias (V,) a constant, targets (M,) int64 -> logp (M,) float32 (float64 for
    float64), 0 where the target is -100. with_stats: also the entropy in nats (M,), differentiable, and
    whether the target was the argmax, the first of several (M,) bool. equal_weights: a hint that the loss
    weighs all trained tokens alike, as a mean does. A true hint saves FLOPs, a false one costs some."""
    if hidden.shape != (len(targets), weight.shape[1]):
        raise ValueError(f"hidden {hidden.shape}, weight {weight.shape}, targets {targets.shape}: do not fit")
    ahead = equal_weights and not with_stats and torch.is_grad_enabled()
    out = uncompiled(TiledLogp.apply, hidden, weight, bias, targets, temperature, with_stats, ahead)
    return out if with_stats else out[0]


def logits(hidden, weight, bias, targets, temperature):
    """(rows, h, W, z) for some rows with a target at a time: an index, (n, C), (V, C), log2(e) z (n, V)."""
    factors, total = dtypes(hidden)
    weight, scale, step = weight.to(factors), LOG2E / temperature, max(1, LOGITS_AT_ONCE // len(weight))
    buffer = weight.new_empty(min(step, len(hidden)), len(weight), dtype=total)
    trained = (targets != -100).nonzero()[:, 0]
    for i in range(0, len(trained), step):
        rows = trained[i:i + step] if len(trained) < len(hidden) else slice(i, i + step)  # no copy
        h = hidden[rows].to(factors)
        z = product(h, weight.T, buffer[:len(h)], scale)
        yield rows, h, weight, z if bias is None else z.add_(bias, alpha=scale)


class TiledLogp(torch.autograd.Function):
    """-> logp, entropy (0 without stats), correct, (M,) each. ahead: makes dh and dW of sum(logp) at once."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, with_stats, ahead):
        logp, entropy, lse = (hidden.new_zeros(len(hidden), dtype=dtypes(hidden)[1]) for _ in range(3))
        correct = torch.zeros_like(targets, dtype=torch.bool)
        trained = weight if ctx.needs_input_grad[1] else weight[:0]  # a frozen W gets no gradient
        made = [lse.new_zeros(x.shape) for x in (hidden, trained)] if ahead else []
        for rows, h, W, z in logits(hidden, weight, bias, targets, temperature):
            t, m = targets[rows, None], z.amax(-1, keepdim=True)  # (n, 1) twice
            chosen = z.sub_(m).gather(1, t)
            # 2^-2000 is 0, and 0 * -2000 is 0, whereas 0 * -inf is NaN
            p = z.clamp_(min=-2000.0).exp2() if with_stats else z.exp2_()
            l = p.sum(-1, keepdim=True)
            if with_stats:
                correct[rows] = z.argmax(-1) == targets[rows]
                entropy[rows] = (l.log2() - z.mul_(p).sum(-1, keepdim=True) / l)[:, 0] / LOG2E
            lse[rows] = (m + l.log2())[:, 0]
            logp[rows] = (chosen - l.log2())[:, 0] / LOG2E
            if ahead:
                dz = p.div_(-l).scatter_add_(1, t, torch.ones_like(l))
                made[0][rows] = product(dz, W, lse.new_empty(h.shape), 1 / temperature)
                if ctx.needs_input_grad[1]:
                    product(dz.T, h, made[1], 1 / temperature, add=True)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, lse, *made)
        ctx.options = temperature, with_stats
        ctx.mark_non_differentiable(correct)
        return logp, entropy, correct

    @staticmethod
    def backward(ctx, g, g_entropy, _):
        if torch.is_grad_enabled():
            raise RuntimeError("there is no second derivative; call backward without create_graph")
        hidden, weight, bias, targets, entropy, lse, *made = ctx.saved_tensors
        temperature, with_stats = ctx.options
        trained = g[targets != -100]
        if made and len(trained) and bool((trained == trained[0]).all()):
            dh, dW = (x * trained[0] for x in made)
        else:
            needed = weight if ctx.needs_input_grad[1] else weight[:0]
            dh, dW = (lse.new_zeros(x.shape) for x in (hidden, needed))
            for rows, h, W, z in logits(hidden, weight, bias, targets, temperature):
                z.sub_(lse[rows, None])  # log2 p
                if with_stats:
                    p = z.clamp_(min=-2000.0).exp2()
                    z.mul_(g_entropy[rows, None] / -LOG2E).sub_((g + g_entropy * entropy)[rows, None]).mul_(p)
                else:
                    z.exp2_().mul_(-g[rows, None])
                dz = z.scatter_add_(1, targets[rows, None], g[rows, None])
                dh[rows] = product(dz, W, lse.new_empty(h.shape), 1 / temperature)
                if ctx.needs_input_grad[1]:
                    product(dz.T, h, dW, 1 / temperature, add=True)
        return dh.to(hidden.dtype), dW.to(weight.dtype), *[None] * 5
