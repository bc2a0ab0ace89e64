"""The two kernels that keep the model lean, forward and backward written out in plain PyTorch operations:
flash_attention never holds T x T scores, target_logp never holds N x V logits.

Shapes: B batch, T time (Tq queries, Tk keys), H query heads, G key/value heads, D head width; N rows, C width,
V vocabulary.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- attention ----------------------------------------------------------------------------------------------------
# softmax(q k^T / sqrt(D)) v has T x T scores but T x D results. The tiled version never holds more than one tile of
# scores: for each query tile (64 to 256 rows) it walks over the key tiles (up to 512 columns) that some row may see.
#
#                  keys ->
#              a a a a b b b b          one character a tile, of two documents a and b packed in one row:
#     queries  \ . . . . . . .          #  every row sees every key: computed as it is
#        |     # \ . . . . . .          \  the diagonal, or a border between documents: computed, then masked
#        v     # # \ . . . . .          .  no row sees any key, the future or another document: never computed
#              # # # \ . . . .
#              . . . . \ . . .
#              . . . . # \ . .
#
# Exact, not an approximation: softmax does not change when a number is subtracted from all scores of a row, and a sum
# made with an old maximum m becomes one with a new m' by the factor 2^(m - m') (online softmax, Milakov & Gimelshein
# 2018). So a row carries its running maximum m, l = sum_j 2^(s_j - m) and acc = sum_j 2^(s_j - m) v_j; its result is
# acc / l. Powers of two: torch.exp2 takes a third of exp's time on an AMD CPU, a little more than exp on an Intel one;
# log2(e) is part of the scores' scale.
#
# Kept for the backward pass: o and L = m + log2(l), one number a row. Recomputed, tile by tile: P = 2^(S - L). With dO
# the gradient of o and s = 1/sqrt(D) (FlashAttention, Dao et al. 2022, algorithm 4; Dao 2023):
#     dV = P^T dO      dP = dO V^T      dS = P * (dP - delta)      dQ = s dS K      dK = s dS^T Q
#     delta_i = sum_j P_ij dP_ij = dO_i . o_i     (the one term of softmax's gradient that needs the whole row)
# FLOPs per visible pair and head: 4 D forward (2 products), 10 D backward (5). Numbers moved per head, with query tiles
# of r rows, causal: 2 T D for q and o, T D T / r for k and v; backward twice that, and dk and dv as often. The naive
# version moves each of T^2 scores about 10 times forward and 13 backward. Memory: O(T D), and a tile.

LOG2E = math.log2(math.e)
SCORES_AT_ONCE = {"cpu": 2**20, "cuda": 2**24}  # of a tile, its heads together; on a CPU 4 MB, to stay in the caches


def visible(q, k, causal: bool, segment_ids: Tensor | None, kv_segment_ids: Tensor | None) -> Tensor:
    """Which query sees which key, (B or 1, 1, Tq, Tk) bool. Causal is aligned bottom-right: the last sees all."""
    if segment_ids is None and kv_segment_ids is not None:
        raise ValueError("found kv_segment_ids without segment_ids, expected both: the queries' ids have no default")
    mask = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    mask = mask.tril(k.shape[2] - q.shape[2]) if causal else mask
    if segment_ids is None:
        return mask
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    same = segment_ids[:, None, :, None] == kv_segment_ids[:, None, None]
    return mask & same & (kv_segment_ids >= 0)[:, None, None]


def naive_attention(q, k, v, *, causal=True, segment_ids=None, kv_segment_ids=None, scale=None):
    """Attention as the formula says, softmax(q k^T / sqrt(D)) v: the definition that flash_attention must equal."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # (B, H, Tk, D)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, H, Tq, Tk)
    mask = visible(q, k, causal, segment_ids, kv_segment_ids)
    p = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return p.masked_fill(~mask, 0.0) @ v  # a row that sees nothing: softmax gives NaN, the answer is 0


def sdpa_attention(q, k, v, *, causal=True, segment_ids=None, kv_segment_ids=None, scale=None):
    """PyTorch's own fused kernel, for comparison and as an alternative. Packed rows cost it a (Tq, Tk) mask."""
    causal = causal and q.shape[2] > 1  # a single query is the last one and sees all
    plain = segment_ids is None and kv_segment_ids is None and (q.shape[2] == k.shape[2] or not causal)
    mask = None if plain else visible(q, k, causal, segment_ids, kv_segment_ids)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and plain, scale=scale,
                                         enable_gqa=q.shape[1] != k.shape[1])
    return out if plain else out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def flash_attention(q, k, v, *, causal=True, segment_ids=None, kv_segment_ids=None, scale=None, block=None):
    """Tiled attention, forward and backward by hand: equals naive_attention, with memory linear in T.

    q (B, H, Tq, D), k and v (B, G, Tk, D), one floating dtype, H a multiple of G -> (B, H, Tq, D). Softmax and sums
    are float32 (float64 for float64). segment_ids (B, Tq), kv_segment_ids (B, Tk), by default the same: a query sees
    keys of its own id only; negative ids are padding; a query that sees nothing gives 0. block: (rows, columns) of a
    tile. Under autocast q, k, v are cast, as for PyTorch's own kernel. Raises ValueError for shapes that do not fit.
    """
    q, k, v = autocast(q, k, v)
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    if not (q.dim() == k.dim() == 4 and k.shape == v.shape and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
            and q.shape[1] % k.shape[1] == 0 and q.dtype == k.dtype == v.dtype):
        found = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in (q, k, v))
        raise ValueError(f"found {found}; expected one dtype, (B, H, Tq, D) and twice (B, G, Tk, D), H a multiple of G")
    for ids, x in ((segment_ids, q), (kv_segment_ids, k)) if kv_segment_ids is not None else ():
        if ids is None or ids.shape != (x.shape[0], x.shape[2]) or ids.is_floating_point():
            raise ValueError(f"found segment ids {'None' if ids is None else f'{ids.dtype} {tuple(ids.shape)}'}, "
                             f"expected integers {(x.shape[0], x.shape[2])}, for the queries and for the keys")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    factors, total = dtypes(q)
    if block is None and q.shape[2] == 1 and factors == total and not needs_grad:
        with torch.autocast(q.device.type, enabled=False):  # it would cast the float32 scores back
            return one_query(q, k, v, segment_ids, kv_segment_ids, scale)
    if block is None:  # short rows and documents: small tiles waste less at their borders; GPUs: fewer, larger kernels
        rows = 64 if q.shape[2] <= 512 else 128 if q.shape[2] <= 1024 or segment_ids is not None else 256
        block = (512, 1024) if q.is_cuda else (rows, 512)
    return tiled_attention(q, k, v, segment_ids, kv_segment_ids, causal, scale, *block)[0]


def one_query(q, k, v, ids_q, ids_k, scale):
    """Tq = 1, as in decoding: a row of scores is smaller than the keys are, so tiles would only cost time."""
    B, H, _, D = q.shape
    _, total = dtypes(q)
    q = (q.to(total) * scale).reshape(B, k.shape[1], -1, D)  # (B, G, R, D), R = H/G queries share a key
    if k.dtype == total:
        S = q @ k.transpose(2, 3)  # (B, G, R, Tk)
    else:  # half-precision scores would be twice as far off, and a float32 copy of all keys would not fit the cache
        rows = max(1, 2**17 // max(1, k[:1].numel()))
        S = torch.cat([a @ b.to(total).transpose(2, 3) for a, b in zip(q.split(rows), k.split(rows))])
    if ids_q is None:
        return (S.softmax(-1).to(v.dtype) @ v).view(B, H, 1, D)
    hidden = ((ids_q != ids_k) | (ids_k < 0))[:, None, None]  # (B, 1, 1, Tk)
    P = S.masked_fill_(hidden, -math.inf).softmax(-1).masked_fill_(hidden, 0.0)  # all hidden: NaN, the answer is 0
    return (P.to(v.dtype) @ v).view(B, H, 1, D)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As PyTorch's own kernels are treated under torch.autocast: cast to its dtype, float64 left alone."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return tuple(x if dtype is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def dtypes(x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of a matrix product's factors and of its sum. Half-precision factors with a float32 sum: only GPUs offer that."""
    total = torch.promote_types(x.dtype, torch.float32)
    return (x.dtype if x.is_cuda and hasattr(torch.ops.aten.bmm, "dtype") else total), total


def product(a: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    """out = scale * a @ b, for matrices and batches of them. (Autocast leaves alone what is done in place.)"""
    if a.dtype == b.dtype == out.dtype:
        return (out.baddbmm_ if out.dim() == 3 else out.addmm_)(a, b, beta=0, alpha=scale)
    half = b.dtype if a.dtype == out.dtype else a.dtype
    multiply = torch.bmm if out.dim() == 3 else torch.mm
    return torch.mul(multiply(a.to(half), b.to(half), out_dtype=out.dtype), scale, out=out)


def add_product(a: Tensor, b: Tensor, scale: float, out: Tensor) -> None:
    """out += scale * a @ b. Batched BLAS writes contiguous results only, so that a slice takes a detour."""
    if a.dtype == b.dtype == out.dtype and out.is_contiguous():
        (out.baddbmm_ if out.dim() == 3 else out.addmm_)(a, b, alpha=scale)
    else:
        out.add_(product(a, b, scale, out=out.new_empty(out.shape)))


class Tiles:
    """One attention, cut into tiles. Iterating gives (heads, rows, tiles) per query tile; tiles gives (keys, S).

    heads, rows, keys: slices into q (N, Tq R, D) and k, v (N, Tk, D). N = B G, and the R = H/G queries that share a
    key are rows of one product, time first, so keys are never repeated. S (n, rows, keys), or (n, keys, rows) if
    keys_first: scores times log2(e), -inf where hidden, the caller's to overwrite. A tile is computed if one of its n
    heads needs it.
    """

    def __init__(self, q, k, v, ids_q, ids_k, causal, scale, block_q, block_k, keys_first=False):
        (_, H, self.Tq, _), (_, self.G, self.Tk, _) = q.shape, k.shape
        self.R, self.causal, self.scale, self.block, self.keys_first = H // self.G, causal, scale, block_q, keys_first
        self.factors, self.dtype = dtypes(q)
        self.q, self.k, self.v = self.fold(q), self.fold(k), self.fold(v)
        self.rows = max(1, min(block_q, self.Tq))  # of a query tile, in time
        self.columns = max(block_q, block_k * (block_q // self.rows))  # of a key tile: one query takes all keys at once
        size = self.rows * self.R * min(self.columns, max(1, self.Tk))
        self.heads = max(1, min(len(self.k), SCORES_AT_ONCE.get(q.device.type, 2**24) // size))  # in one tile
        self.buffers = self.q.new_empty(2, self.heads * size, dtype=self.dtype)  # reused: they stay in the cache
        if causal:
            self.future = self.buffers.new_full((self.rows, self.rows), -math.inf).triu_(1)[:, None]  # (t, 1, key)
        self.packed = ids_q is not None
        if self.packed and self.heads > self.G:  # whole rows of the batch: others have their borders elsewhere
            self.heads -= self.heads % self.G
        if self.packed:  # padding gets two ids that never match
            last = torch.iinfo(torch.int64).max
            self.ids_q = ids_q.long().masked_fill(ids_q < 0, last).repeat_interleave(self.G, 0)  # (N, Tq)
            self.ids_k = ids_k.long().masked_fill(ids_k < 0, last - 1).repeat_interleave(self.G, 0)  # (N, Tk)

    def fold(self, x: Tensor) -> Tensor:
        B, heads, T, D = x.shape
        x = x.reshape(B * self.G, heads // self.G, T, D).transpose(1, 2)  # (N, T, R, D)
        return x.reshape(B * self.G, T * heads // self.G, D).to(self.factors)  # (N, T R, D)

    def unfold(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse. Not by a view: autograd forbids users of a view what it allows them on a tensor."""
        B, heads, T, D = like.shape
        if heads > self.G:
            x = x.view(B * self.G, T, heads // self.G, D).transpose(1, 2).contiguous()  # (N, R, T, D)
        return x.resize_(B, heads, T, D).to(like.dtype)

    def buffer(self, which: int, *shape: int) -> Tensor:
        return self.buffers[which, :math.prod(shape)].view(shape)

    def __iter__(self):
        for first in range(0, len(self.k), self.heads):
            heads = slice(first, min(first + self.heads, len(self.k)))
            width, skip, mask = self.overlap(heads)
            for i, i0 in enumerate(range(0, self.Tq, self.rows)):
                i1 = min(i0 + self.rows, self.Tq)
                end = min(self.Tk, i1 + self.Tk - self.Tq) if self.causal else self.Tk
                spans = []  # (first key, end, mask by id?), neighbours joined up to the width of a tile
                for j, j0 in enumerate(range(0, end, width)):
                    j1 = min(j0 + width, end)
                    if skip[i][j]:
                        continue
                    if spans and spans[-1][1] == j0 and j1 - spans[-1][0] <= self.columns:
                        spans[-1] = (spans[-1][0], j1, spans[-1][2] or mask[i][j])
                    else:
                        spans.append((j0, j1, mask[i][j]))
                yield heads, slice(i0 * self.R, i1 * self.R), self.scores(heads, i0, i1, spans)

    def overlap(self, heads: slice):
        """(width, skip, mask): for each query tile and each `width` keys, have they no id in common; have they several.

        Told from the smallest and largest id on either side: right for ids in any order, and sharp for sorted ones.
        """
        queries = -(-self.Tq // self.rows)
        if not self.packed or (queries == 1 and self.Tk <= self.columns):  # nothing to skip
            keys = -(-self.Tk // self.columns)
            return self.columns, [[False] * keys] * queries, [[self.packed] * keys] * queries
        edges = []
        for ids, width in ((self.ids_q[heads], self.rows), (self.ids_k[heads], self.block)):
            filled = torch.cat((ids, ids[:, -1:].expand(-1, -ids.shape[1] % width)), 1)  # a whole number of tiles
            edges += filled.view(len(ids), -1, width).aminmax(dim=-1)  # (n, tiles) twice
        low_q, high_q, low_k, high_k = edges[0][..., None], edges[1][..., None], edges[2][:, None], edges[3][:, None]
        skip = ((low_q > high_k) | (low_k > high_q)).all(0)
        mask = ((low_q != high_k) | (low_k != high_q)).any(0)
        return self.block, *torch.stack((skip, mask)).tolist()  # the one time a GPU is waited for

    def scores(self, heads: slice, i0: int, i1: int, spans):
        q, factor = self.q[heads, i0 * self.R:i1 * self.R], self.scale * LOG2E
        if q.dtype == self.dtype:  # BLAS scales its first factor: q k^T and k q^T would round differently, and where S
            q, factor = q * factor, 1.0  # is large 2^(S - L) would show it. (In half precision q would round.)
        seen = i0 + self.Tk - self.Tq  # the last key that the first query of the tile may see
        for j0, j1, mask in spans:
            a, b = (self.k[heads, j0:j1], q) if self.keys_first else (q, self.k[heads, j0:j1])
            S = product(a, b.transpose(1, 2), factor, out=self.buffer(0, len(q), a.shape[1], b.shape[1]))
            diagonal = self.causal and j1 > seen + 1  # runs through this tile
            if diagonal or mask:
                by_time = S.transpose(1, 2) if self.keys_first else S
                by_time = by_time.unflatten(1, (i1 - i0, self.R))  # (n, t, R, keys)
            if diagonal:
                j = max(j0, seen)
                by_time[..., j - j0:].add_(self.future[:i1 - i0, :, j - seen:j1 - seen])
            if mask:
                differ = self.ids_q[heads, i0:i1, None] != self.ids_k[heads, None, j0:j1]  # (n, t, keys)
                by_time.masked_fill_(differ[:, :, None], -math.inf)
            yield slice(j0, j1), S


def attention_forward(q, k, v, ids_q, ids_k, causal, scale, block_q, block_k):
    """-> out (B, H, Tq, D) and L (B G, Tq H/G, 1)."""
    t = Tiles(q, k, v, ids_q, ids_k, causal, scale, block_q, block_k)
    low = torch.finfo(t.dtype).min  # finite: where nothing is seen, -inf - low stays -inf
    out, L = q.new_zeros(t.q.shape), q.new_full((*t.q.shape[:2], 1), low, dtype=t.dtype)
    for heads, rows, tiles in t:
        acc = None
        for keys, S in tiles:
            top = S.amax(-1, keepdim=True)
            if acc is None:
                m = top.clamp_(min=low)
                P = S.sub_(m).exp2_()
                l = P.sum(-1, keepdim=True)
                acc = product(P, t.v[heads, keys], 1.0, out=L.new_empty(*l.shape[:2], out.shape[2]))
            else:
                old, m = m, torch.maximum(m, top, out=top)
                P, shrink = S.sub_(m).exp2_(), old.sub_(m).exp2_()
                l.mul_(shrink).add_(P.sum(-1, keepdim=True))
                add_product(P, t.v[heads, keys], 1.0, out=acc.mul_(shrink))
        if acc is None:
            continue  # no row of these sees any key
        l.clamp_(min=1.0)  # a row's largest term is 2^0; less is a row that saw nothing, its result 0 / 1
        torch.div(acc, l, out=out[heads, rows])
        torch.add(m, l.log2_(), out=L[heads, rows])
    return t.unfold(out, like=q), L


def attention_backward(grad, q, k, v, ids_q, ids_k, out, L, causal, scale, block_q, block_k):
    """-> dq, dk, dv.

    The tiles are held keys first, and dQ is summed transposed: BLAS takes a third more time where it has to transpose
    a large first factor, as in P^T dO and dS^T Q.
    """
    t = Tiles(q, k, v, ids_q, ids_k, causal, scale, block_q, block_k, keys_first=True)
    grad = t.fold(grad)
    delta = (grad * t.fold(out)).sum(-1, dtype=t.dtype)[:, None]  # (N, 1, Tq R)
    L = L.transpose(1, 2)  # (N, 1, Tq R)
    dq, dk, dv = (L.new_zeros(x.shape) for x in (t.q, t.k, t.v))
    for heads, rows, tiles in t:
        dq_t = torch.zeros_like(dq[heads, rows].transpose(1, 2), memory_format=torch.contiguous_format)  # (n, D, rows)
        for keys, S in tiles:
            P = S.sub_(L[heads, :, rows]).exp2_()
            add_product(P, grad[heads, rows], 1.0, out=dv[heads, keys])
            dP = product(t.v[heads, keys], grad[heads, rows].transpose(1, 2), 1.0, out=t.buffer(1, *S.shape))
            dS = dP.sub_(delta[heads, :, rows]).mul_(P)
            add_product(t.k[heads, keys].transpose(1, 2), dS, scale, out=dq_t)
            add_product(dS, t.q[heads, rows], scale, out=dk[heads, keys])
        dq[heads, rows] = dq_t.transpose(1, 2)
    return t.unfold(dq, like=q), t.unfold(dk, like=k), t.unfold(dv, like=v)


def differentiable(name, forward, backward, shapes, tensors, options, outputs, results, gradients):
    """forward(*tensors, *options) -> outputs, as a function whose gradient is computed by
    backward(*gradients of the first `results` outputs, *tensors, *outputs, *options) -> of the first `gradients` ones.

    In eager mode an autograd.Function; under torch.compile, which would unroll the tiles into thousands of graph nodes,
    two opaque operators (`shapes`: forward for tensors without data; tensors and options: their declarations). What is
    kept goes through save_for_backward alone: there saved-tensor hooks (ZeRO-3's recipes, offloading) find it.
    """
    n = tensors.count("Tensor")

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:n], *output)
        ctx.options = inputs[n:]
        ctx.set_materialize_grads(False)

    def gradient(run):
        def apply(ctx, *grads):
            saved = ctx.saved_tensors
            grads = [torch.zeros_like(o) if g is None else g for g, o in zip(grads, saved[n:n + results])]
            return *run(*grads, *saved, *ctx.options), *[None] * (n + len(ctx.options) - gradients)
        return apply

    eager_gradient = gradient(backward)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            keep(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            if torch.is_grad_enabled():
                raise RuntimeError(f"the tiled {name} has no second derivative; call backward without create_graph")
            return eager_gradient(ctx, *grads)

    given, kept = ("".join(f"Tensor {x}{i}, " for i in range(m)) for x, m in (("grad", results), ("out", outputs)))
    op = torch.library.custom_op(f"tiled::{name}", forward, mutates_args=(),
                                 schema=f"({tensors}, {options}) -> ({', '.join(['Tensor'] * outputs)})")
    op_backward = torch.library.custom_op(f"tiled::{name}_backward", backward, mutates_args=(), schema=(
        f"({given}{tensors}, {kept}{options}) -> ({', '.join(['Tensor'] * gradients)})"))
    op.register_fake(shapes)
    op_backward.register_fake(lambda *args: tuple(x.new_empty(x.shape) for x in args[results:results + gradients]))
    op.register_autograd(gradient(op_backward), setup_context=keep)
    return lambda *args: op(*args) if torch.compiler.is_compiling() else Eager.apply(*args)


def attention_shapes(q, k, *_):
    L = k.shape[0] * k.shape[1], q.shape[2] * (q.shape[1] // k.shape[1]), 1
    return q.new_empty(q.shape), q.new_empty(L, dtype=dtypes(q)[1])


tiled_attention = differentiable("attention", attention_forward, attention_backward, attention_shapes,
                                 "Tensor q, Tensor k, Tensor v, Tensor? ids_q, Tensor? ids_k",
                                 "bool causal, float scale, int block_q, int block_k",
                                 outputs=2, results=1, gradients=3)


# ---- log-probabilities --------------------------------------------------------------------------------------------
# log p(t) = z_t - log sum_v e^(z_v), z = (W h + b) / temperature. The V logits of a row are made, reduced to a few
# numbers and overwritten, for some rows at a time; the backward pass makes them again and gets p from the saved
# log-sum-exp (after Wijmans et al. 2024, "Cut Your Losses"). For one row, with H the entropy, g and g_H the incoming
# gradients of log p(t) and H:
#     dz_v = g (1[v = t] - p_v) - g_H p_v (log p_v + H)      dh = W^T dz / temperature      dW += dz h^T / temperature
# That is 8 C V FLOPs a row; who keeps the logits needs 6 C V, and N V numbers. equal_weights gets both: dh and dW are
# linear in g, so if every row is going to get the same g (any mean or sum does that), the forward pass can make them
# for g = 1 while it has the logits, and the backward pass multiplies (Liger-Kernel, Hsu et al. 2024). It looks before
# it does, and makes dW again if g varies. Rows whose target is -100 are left out. dW is summed in float32.

LOGITS_AT_ONCE = 3 * 2**23  # 96 MB of float32; less means more passes over W and dW


def target_logp(hidden, weight, targets, *, bias=None, temperature=1.0, with_stats=False, equal_weights=False):
    """log p(target) under softmax((hidden weight^T + bias) / temperature), in chunks: never holds the (N, V) logits.

    hidden (N, C), weight (V, C), bias (V,), targets (N,) int64 -> logp (N,) float32 (float64 for float64), 0 where the
    target is -100. with_stats: also the entropy in nats (N,), differentiable, and whether the target was the argmax
    (the first, of several) (N,) bool. equal_weights: a hint that the loss weighs all trained tokens alike (pretraining,
    SFT). The gradients are right either way; where it is true it saves a quarter of the FLOPs, where it is false (or
    where activation checkpointing runs the forward pass twice) it costs as much. ValueError for shapes that do not fit.
    """
    bias = weight.new_empty(0) if bias is None else bias
    shapes = [tuple(x.shape) for x in (hidden, weight, targets, bias)]
    if hidden.dim() != 2 or weight.shape[1:] != hidden.shape[1:] or targets.shape != hidden.shape[:1] or (
            bias.shape not in ((0,), weight.shape[:1])) or not float(temperature) > 0:
        raise ValueError(f"found hidden, weight, targets, bias {shapes}, temperature {temperature}; expected (N, C), "
                         "(V, C), (N,), (V,) and a number above 0")
    hidden, weight, bias = autocast(hidden, weight, bias)
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    ahead = equal_weights and wanted and not with_stats
    logp, entropy, correct, *_ = tiled_logp(hidden, weight, bias, targets, temperature, with_stats, ahead)
    return (logp, entropy, correct) if with_stats else logp


def logits(hidden, weight, bias, targets, temperature):
    """Chunks of the rows with a target: (rows, h, W, z), an index, h (n, C), W (V, C), z (n, V) = log2(e) logits."""
    factors, dtype = dtypes(hidden)
    weight, scale, step = weight.to(factors), LOG2E / temperature, max(1, LOGITS_AT_ONCE // len(weight))
    buffer = weight.new_empty(min(step, len(hidden)), len(weight), dtype=dtype)
    chunks = (targets != -100).nonzero()[:, 0].split(step)
    if sum(map(len, chunks)) == len(hidden):
        chunks = [slice(i, i + step) for i in range(0, len(hidden), step)]  # views where every row has a target
    for rows in chunks:
        h = hidden[rows].to(factors)
        z = product(h, weight.T, scale, out=buffer[:len(h)])
        yield rows, h, weight, z.add_(bias, alpha=scale) if len(bias) else z


def add_gradients(dz, rows, h, W, temperature, dh, dW, db):
    if dh is not None:
        dh[rows] = product(dz, W, 1 / temperature, out=dh.new_empty(h.shape))
    add_product(dz.T, h, 1 / temperature, out=dW)
    if len(db):
        db.add_(dz.sum(0), alpha=1 / temperature)


def logp_forward(hidden, weight, bias, targets, temperature, with_stats, ahead):
    """-> logp, entropy (0 without stats), correct, log2 sum exp, (N,) each; dh, dW, db of sum(logp), if ahead."""
    logp, entropy, lse = (hidden.new_zeros(len(hidden), dtype=dtypes(hidden)[1]) for _ in range(3))
    correct = torch.zeros_like(targets, dtype=torch.bool)
    dh, dW, db = (lse.new_zeros(x.shape if ahead else 0) for x in (hidden, weight, bias))
    for rows, h, W, z in logits(hidden, weight, bias, targets, temperature):
        t = targets[rows, None]
        if with_stats:  # of several largest logits the first counts as the guess, as in greedy decoding
            m, guess = z.max(-1, keepdim=True)
            correct[rows] = (guess == t)[:, 0]
        else:
            m = z.amax(-1, keepdim=True)
        chosen = z.gather(1, t).sub_(m)
        # 2^-2000 is 0, and 0 * -2000 is not NaN, as 0 * -inf is
        p = z.sub_(m).clamp_(min=-2000.0).exp2() if with_stats else z.sub_(m).exp2_()
        l = p.sum(-1, keepdim=True)
        if with_stats:
            entropy[rows] = (l.log2() - z.mul_(p).sum(-1, keepdim=True) / l)[:, 0] / LOG2E
        lse[rows] = (m + l.log2())[:, 0]
        logp[rows] = (chosen - l.log2())[:, 0] / LOG2E
        if ahead:
            dz = p.div_(-l).scatter_add_(1, t, torch.ones_like(l))
            add_gradients(dz, rows, h, W, temperature, dh, dW, db)
    return logp, entropy, correct, lse, dh, dW, db


def logp_backward(g, g_H, hidden, weight, bias, targets, _, H, __, lse, dh, dW, db, temperature, with_stats, ahead):
    """-> dhidden, dweight, dbias."""
    trained = g[targets != -100]
    dh = dh * g.where(targets != -100, 0.0)[:, None] if ahead else lse.new_zeros(hidden.shape)
    if ahead and len(trained) and bool((trained == trained[0]).all()):
        dW, db = dW * trained[0], db * trained[0]
    else:
        dW, db = (lse.new_zeros(x.shape) for x in (weight, bias))
        for rows, h, W, z in logits(hidden, weight, bias, targets, temperature):
            z.sub_(lse[rows, None])  # log2 p
            if with_stats:
                p = z.clamp_(min=-2000.0).exp2()
                dz = z.mul_(g_H[rows, None] / -LOG2E).sub_((g + g_H * H)[rows, None]).mul_(p)
            else:
                dz = z.exp2_().mul_(-g[rows, None])
            dz.scatter_add_(1, targets[rows, None], g[rows, None])
            add_gradients(dz, rows, h, W, temperature, None if ahead else dh, dW, db)
    return dh.to(hidden.dtype), dW.to(weight.dtype), db.to(bias.dtype)


def logp_shapes(hidden, weight, bias, targets, temperature, with_stats, ahead):
    dtype = dtypes(hidden)[1]
    rows = [hidden.new_empty(len(hidden), dtype=d) for d in (dtype, dtype, torch.bool, dtype)]
    return *rows, *(hidden.new_empty(x.shape if ahead else 0, dtype=dtype) for x in (hidden, weight, bias))


tiled_logp = differentiable("logp", logp_forward, logp_backward, logp_shapes,
                            "Tensor hidden, Tensor weight, Tensor bias, Tensor targets",
                            "float temperature, bool with_stats, bool ahead", outputs=7, results=2, gradients=3)
