"""ZeRO by hand: train a model that is sharded over ranks, or moved to host memory, with torch.distributed alone.

    z = Zero(model, units=model.units(), stage=3, dtype=torch.bfloat16, lr=3e-4, weight_decay=0.1)
    for micro_batch in batch:
        z.backward(loss_sum / global_count)      # gradients are SUMMED over micro-batches and ranks
    info = z.step(lr, clip=1.0)                  # StepInfo(norm, skipped, loss_scale), the same on all ranks
    with z.gathered(): generate(model, ...)      # whole weights, no communication inside

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) removes what data parallelism repeats on each of its N ranks. With P
parameters, p bytes per weight in forward and backward (2 or 4), k micro-batches per step and f = (N-1)/N:

    stage                weights + gradients + fp32 masters + Adam's two moments    bytes sent per step and rank
    0 data parallel      p P     + 4 P       + 4 P *        + 8 P                   2f 4P    all-reduce of gradients
    1 optimizer          p P     + 4 P       + 4 P/N *      + 8 P/N                 f 4P + f pP
    2 + gradients        p P     + 4 P/N     + 4 P/N *      + 8 P/N                 k f pP + f pP
    3 + weights                    4 P/N     + 4 P/N        + 8 P/N                 k f 3pP  (2 gathers, 1 reduce)
    * 0 when p = 4: then the masters are the weights, or a slice of them

plus, for a moment, one unit (block) of weights at stage 3 and about three at every reduce of stages 2-3 (with overlap
two and five). So in float32 stage 3 sends 1.5k x of data parallelism, with k micro-batches, and half of that where
p = 2; stage 1, at 1x and 0.75x, is the stage to accumulate with.

Example, 7 B parameters, p = 2, GB per GPU; last, the fewest GPUs that leave a quarter of their memory for activations:
                     N = 1      2      4      8     16     64      of 24 GB   80 GB   141 GB
    stage 0            126    126    126    126    126    126         never   never    never
    stage 1            126     84     63   52.5   47.3   43.3         never       5        2
    stage 2            126     70     42     28     21   15.8            28       3        2
    stage 3            112     56     28     14      7    1.8             7       2        2
    3, offload optim    14      7    3.5    1.8    0.9    0.2             1       1        1     + 112/N in main memory
The common estimate of 168 GB for full fine-tuning of 7 B in float32 is 24 bytes per parameter: 16 of model states (the
table with p = 4: weights 28 + gradients 28 + moments 56 = 112 GB), and as a rule of thumb half as much again for
activations. Those follow batch x length and not the parameters; activation_checkpointing takes most of them away.

Several machines: the same command on each, with --out on a file system that they share:
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint FIRST:29500 train_pretrain.py --zero 3

How it works. A unit is a module whose parameters become one flat vector, cut in N shards. Its parameters are deleted
and plugged in anew at every forward by `Use`, an autograd function that fetches weights on the way in and reduces
gradients on the way back. The stages differ in three small methods: Unit.fetch, Unit.reduce, Unit.publish.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lib import collectives as zero_tools
from lib.collectives import Slot, aligned, plug, sum_of_squares
from lib.program import UserError


def data_parallel_step(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> float:
    """Stage 0 as the ten lines that all the rest must equal (the tests compare); call it after loss.backward()."""
    for p in model.parameters():
        dist.all_reduce(p.grad)
    norm = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm().item()
    for p in model.parameters():
        p.grad *= min(1.0, clip / (norm + 1e-6))
    optimizer.step()
    optimizer.zero_grad()
    return norm


class StepInfo(NamedTuple):
    norm: float  # global gradient norm before clipping
    skipped: bool  # the norm was not finite, or 0: weights and optimizer were left alone, on all ranks
    loss_scale: float  # the scale this step's gradients carried (1 unless dtype is float16)


class Use(torch.autograd.Function):
    """Using a unit's weights: forward fetches them, backward receives their gradients.

    Autograd calls backward once all consumers of the weights are differentiated, and before the unit that ran earlier.
    """

    @staticmethod
    def forward(ctx, unit: Unit, trigger: torch.Tensor):
        ctx.unit = unit
        ctx.set_materialize_grads(False)  # an unused weight's gradient stays None
        views = unit.views(unit.fetch())
        ctx.mark_non_differentiable(*views[unit.trainable:])
        return tuple(views)

    @staticmethod
    def backward(ctx, *gradients):
        ctx.unit.reduce(gradients[:ctx.unit.trainable])
        return None, None


class Unit:
    """One module's parameters as one flat vector, padded to N S elements; rank r owns [r S, (r+1) S).

    slots, values: the parameters in the vector's order: with weight decay, without, frozen; so decay is one boundary.
    trainable, decaying: how many of the slots are.
    """

    def __init__(self, zero: Zero, name: str, module: nn.Module, slots: list[Slot], values: list[torch.Tensor],
                 trainable: int, decaying: int):
        self.zero, self.name, self.module, self.slots, self.trainable = zero, name, module, slots, trainable
        memory, world, rank, stage = zero.memory, zero.comm.world, zero.comm.rank, zero.stage
        self.is_block = name.split(".")[-1].isdigit()  # a member of a ModuleList, not an embedding or a head
        self.numel, self.length = sum(slot.numel for slot in slots), aligned(slots[-1].start + slots[-1].numel)
        self.ends = [*(slot.start for slot in slots), self.length]  # ends[n]: where the first n slots end
        self.shard_size = aligned(-(-self.length // world))
        flat = memory.empty(self.shard_size * world, zero.wide if trainable else zero.dtype).zero_()
        for view, value in zip(self.views(flat), values):
            view.copy_(value.detach())
        zero.comm.broadcast(flat)  # ranks that were seeded differently would train a mixture
        self.low, self.high = (0, self.shard_size * world) if stage == 0 else (rank * self.shard_size, (rank + 1) * self.shard_size)
        # resident: the weights that compute, as far as they stay on the device: all at stages 0-2; at stage 3 this
        # rank's part if its master alone is in the host. master: its part of the truth; without a cast it is a slice
        # of resident and costs nothing.
        self.offloaded = "params" in zero.offload or (trainable > 0 and "optim" in zero.offload)
        self.resident = flat.to(zero.dtype) if stage < 3 else None
        self.master = flat[self.low:self.high]
        if self.offloaded:
            self.master = memory.empty(self.master.numel(), flat.dtype, host=True).copy_(self.master)
        elif self.resident is not flat:
            self.master = self.master.clone()
        if stage == 3 and self.offloaded and "params" not in zero.offload:
            self.resident = self.compute_shard()
        if self.resident is not None:
            memory.resident.add(self.resident.data_ptr())

        self.filled = False  # grad holds gradients of this step, not of the last one
        self.pending = self.held = None  # stage 3: a gather under way; weights, from first use in backward to reduce
        self.recipe_for, self.gathers_in_backward = None, False  # the storage that autograd must not keep; see hooks()
        self.original = module.forward
        self.fwd = torch.compile(self.original) if zero.compile and self.is_block else self.original
        if not trainable:
            return

        def owned(n_slots: int) -> int:  # elements of the first n_slots that lie in this rank's part
            return min(max(self.ends[n_slots] - self.low, 0), self.high - self.low)

        self.decay, self.end = owned(decaying), owned(trainable)
        self.exp_avg, self.exp_avg_sq = (memory.moment(self.end, zero.wide, host=self.offloaded) for _ in range(2))
        part = self.high - self.low
        if stage < 2:
            self.grad = memory.empty(flat.numel(), zero.wide).zero_()
            self.shard_grad = memory.empty(part, zero.wide, True) if self.offloaded else self.grad[self.low:self.high]
        else:
            self.grad = self.shard_grad = memory.empty(part, zero.wide, host=self.offloaded).zero_()

    def views(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole[slot.start:slot.start + slot.numel].view(slot.shape) for slot in self.slots]

    def compute_shard(self) -> torch.Tensor:
        """This rank's part of the weights, on the device and in the compute dtype."""
        memory, dtype = self.zero.memory, self.zero.dtype
        return memory.to_device(self.master, dtype) if self.offloaded else self.master.to(dtype)

    # ---- the four stages are these three methods

    def fetch(self) -> torch.Tensor:
        """The whole flat vector: resident at stages 0-2, gathered from the shards at stage 3."""
        if self.zero.stage < 3:
            return self.resident
        whole, handle = self.pending or self.start_gather()
        self.pending = None
        self.zero.comm.wait(handle)
        self.zero.prefetch_after(self)
        return whole

    @torch.no_grad()
    def reduce(self, gradients) -> None:
        """Add one backward's gradients to the local gradient (stages 0-1), or to this rank's shard (2-3)."""
        self.held = None
        if self.zero.stage < 2:
            for part, gradient in zip(self.views(self.grad), gradients):
                gradient = part.new_zeros(()) if gradient is None else gradient
                part.add_(gradient) if self.filled else part.copy_(gradient)
            self.filled = True
            return
        flat, end = self.zero.memory.temporary("reduced", self.shard_size * self.zero.comm.world, self.zero.dtype), 0
        for slot, part, gradient in zip(self.slots, self.views(flat), gradients):
            flat[end:slot.start].zero_()  # padding between parameters
            part.copy_(gradient) if gradient is not None else part.zero_()
            end = slot.start + slot.numel
        flat[end:].zero_()  # frozen parameters, padding at the end
        self.zero.comm.reduce_scatter(flat, self.add_to_shard)

    def publish(self) -> None:
        """After an update: the weights that compute take the masters' new values."""
        if self.pending:  # gathered ahead, before the update
            self.zero.comm.wait(self.pending[1])
            self.pending = None
        if self.zero.stage in (1, 2):
            self.zero.comm.all_gather(self.resident, self.compute_shard())
        elif self.resident is not None and self.resident.data_ptr() != self.master.data_ptr():
            self.resident.copy_(self.compute_shard())

    def start_gather(self, later: bool = False):
        whole = self.zero.memory.temporary("gathered", self.shard_size * self.zero.comm.world, self.zero.dtype)
        shard = self.compute_shard() if self.resident is None else self.resident
        return whole, self.zero.comm.all_gather(whole, shard, later)

    def refetch(self) -> torch.Tensor:
        """The weights again, in backward; held until reduce, or if the unit is frozen until another one's turn."""
        if self.held is None:
            for unit in self.zero.units:
                unit.held = unit.held if unit.trainable else None
            self.held = self.fetch()
        return self.held

    def finish_gradients(self) -> None:
        """After the last micro-batch: stages 0-1 communicate only now, however many there were."""
        if not self.filled:
            self.grad.zero_()  # nobody used this unit
        if self.zero.stage == 0:
            self.zero.comm.all_reduce(self.grad)
            self.add_to_shard(self.grad[None])
        elif self.zero.stage == 1:
            self.zero.comm.reduce_scatter(self.grad, self.add_to_shard)
            self.zero.comm.finish()
        self.filled = False

    def add_to_shard(self, chunks: torch.Tensor) -> None:
        """shard gradient (+)= the sum of chunks (N, S), one per rank, in rank order and in the wide dtype."""
        total = chunks[0].to(self.zero.wide)
        for chunk in chunks[1:]:
            total += chunk
        more = self.filled and self.zero.stage >= 2  # this step's earlier micro-batches are in the shard already
        if self.offloaded:
            self.zero.memory.to_host(self.shard_grad, total, add=more)
        elif more:
            self.shard_grad.add_(total)
        elif self.shard_grad.data_ptr() != total.data_ptr():
            self.shard_grad.copy_(total)
        self.filled = True

    def forward(self, *args, **kwargs):
        """What calling the module runs from now on."""
        if self.zero.is_gathered:
            return self.original(*args, **kwargs)
        if torch.is_autocast_enabled(self.zero.device.type):  # autograd would keep its casted copies of all the weights
            raise RuntimeError("autocast with Zero: choose the compute dtype by Zero(dtype=...)")
        # Of nested saved_tensors_hooks only the innermost pair acts: ours must stand outside of checkpoint, or it would
        # drop nothing. Checkpoint itself drops the weights, and recomputing `run` fetches them again.
        with self.hooks():
            if self.zero.activation_checkpointing and self.is_block and torch.is_grad_enabled():
                return checkpoint(self.run, *args, use_reentrant=False, **kwargs)
            return self.run(*args, **kwargs)

    def run(self, *args, **kwargs):
        train = self.trainable and torch.is_grad_enabled()
        weights = Use.apply(self, self.zero.trigger) if train else self.views(self.fetch())
        if self.zero.stage == 3 and self is not self.zero.root:  # the root is needed until backward ends, so it is kept
            self.recipe_for = weights[0].untyped_storage().data_ptr()
        plug(self.slots, weights)
        try:
            return self.fwd(*args, **kwargs)
        finally:
            plug(self.slots, None)
            self.recipe_for = None

    def hooks(self):
        """What autograd keeps for backward: of gathered weights a recipe (where to look after gathering again); of
        large activations, if they are offloaded, a copy in host memory."""
        if not torch.is_grad_enabled() or self.zero.stage < 3 and "acts" not in self.zero.offload:
            return contextlib.nullcontext()

        def pack(x):
            if x.untyped_storage().data_ptr() == self.recipe_for:
                return None, x.size(), x.stride(), x.storage_offset()
            kept = self.zero.memory.park(x)
            return (kept, x._version) if isinstance(kept, torch.Tensor) else kept

        def unpack(kept):
            parked, *geometry = kept
            if isinstance(parked, torch.Tensor):
                if [parked._version] != geometry:  # with hooks this check of autograd is ours
                    raise RuntimeError("a tensor needed for backward has been modified by an inplace operation")
                return parked
            return (parked.fetch() if parked else self.refetch()).as_strided(*geometry)

        return saved_tensors_hooks(pack, unpack)


# ---- the whole model ------------------------------------------------------------------------------------------------

class Zero:
    """Shards a model, owns its optimizer (AdamW), and takes the place of loss.backward() and optimizer.step().

    units: modules that are fetched one at a time (blocks; untied embedding and head). A parameter that is not inside
        exactly one of them belongs to the root unit, fetched once for the whole forward and backward.
    dtype: of weights and activations; masters, gradients and moments are float32 (float64 if dtype is).
    offload: "optim" masters, moments and gradient shards in host memory, updated there; "params" (stage 3) weight
        shards too; "acts" large activations; "disk" the moments in a file instead of memory.
    frozen: no gradients, no optimizer (a reference or reward model); sharded at stage 3 only.
    activation_checkpointing, compile: of every unit that is a member of a ModuleList, i.e. of the blocks.
    overlap: gather one unit ahead, and let one reduce run beside the computation. The same numbers, more memory.
    init(module, prefix): for a model built under torch.device("meta") because no rank may hold it whole (then device
        says where to): fills one unit's parameters in place, with numbers that depend on their full names alone.
    Afterwards the model's Parameters are gone: model(...) works as before, model.parameters() is empty.
    """

    def __init__(self, model: nn.Module, *, units: list[nn.Module], stage: int = 0, dtype: torch.dtype = torch.float32,
                 offload: tuple[str, ...] = (), lr: float = 1e-3, weight_decay: float = 0.0,
                 betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, frozen: bool = False,
                 activation_checkpointing: bool = False, compile: bool = False, overlap: bool = False,
                 init: Callable[[nn.Module, str], None] | None = None, device: torch.device | str | None = None):
        zero_tools.check_options(stage, offload, frozen)
        self.model, self.stage, self.dtype, self.offload = model, stage, dtype, tuple(offload)
        self.activation_checkpointing, self.compile, self.overlap = activation_checkpointing, compile, overlap
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.device = torch.device(device or next(model.parameters()).device)
        self.memory = zero_tools.Memory(self.device, self.offload)
        self.comm = zero_tools.Comm(self.memory, overlap)
        self.trigger = torch.zeros((), requires_grad=True)  # makes Use a node of the graph
        self.is_gathered = self.in_backward = False
        self.order = []  # overlap: units in the order of the first forward
        self.loss_scale = 2.0**16 if dtype == torch.float16 else 1.0
        self.updates = self.good_steps = self.skipped = 0  # all in all; since the scale changed; skipped in a row
        if compile:  # to dynamo all blocks of all models are one function; beyond its limit of 8 variants it runs eager
            config = torch._dynamo.config
            limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.7
            setattr(config, limit, max(64, getattr(config, limit)))
        self.units = []
        for name, module, parameters in zero_tools.group_parameters(model, units):
            if init is not None:
                zero_tools.materialise(parameters, self.device)
                init(module, name)
            self.units.append(Unit(self, name or "root", module, *zero_tools.take_out(parameters, frozen)))
            module.forward = self.units[-1].forward
        model.to(self.device)  # the parameters are out of it; what it moves are the buffers
        self.memory.resident |= {buffer.data_ptr() for buffer in model.buffers()}
        self.root = next((unit for unit in self.units if unit.module is model), None)
        self.trained = [unit for unit in self.units if unit.trainable]
        self.frozen = not self.trained
        self.optimizer = None if self.frozen else self._optimizer(lr, betas, eps, weight_decay)

    def _optimizer(self, lr, betas, eps, weight_decay) -> torch.optim.AdamW:
        """AdamW (Loshchilov & Hutter 2019) is elementwise: it need not know that its tensors are slices of shards."""
        groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
        state = {}
        for unit in self.trained:
            for group, part in zip(groups, (slice(0, unit.decay), slice(unit.decay, unit.end))):
                p = nn.Parameter(unit.master[part])
                p.grad = unit.shard_grad[part]
                group["params"].append(p)
                moments = {"exp_avg": unit.exp_avg[part], "exp_avg_sq": unit.exp_avg_sq[part]}
                state[p] = {"step": torch.zeros((), device=p.device), **moments}
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        optimizer.state.update(state)
        return optimizer

    def prefetch_after(self, unit: Unit) -> None:
        """Start gathering what comes next, in the order of the first forward, or in backward its reverse."""
        if not self.overlap or self.is_gathered:
            return
        if unit not in self.order:
            self.order.append(unit)
        unit.gathers_in_backward |= self.in_backward
        i = self.order.index(unit) + (-1 if self.in_backward else 1)
        following = self.order[i] if 0 <= i < len(self.order) else unit
        needed = following.gathers_in_backward or not self.in_backward
        if following is not unit and needed and following.pending is following.held is None:
            following.pending = following.start_gather(later=True)

    # ---- training

    def backward(self, loss: torch.Tensor) -> None:
        """loss: already divided by the global count; gradients of all ranks and micro-batches are summed."""
        self._must_train()
        self.in_backward = True
        try:
            (loss * self.loss_scale if self.loss_scale != 1.0 else loss).backward()
        finally:
            self.in_backward = False
            for unit in self.units:
                unit.held = None
        self.comm.finish()

    def _must_train(self) -> None:
        if self.is_gathered or self.frozen:
            raise RuntimeError("backward or step " + ("inside gathered()" if self.is_gathered else
                               "of a frozen model: none of its parameters requires a gradient"))

    @torch.no_grad()
    def step(self, lr: float, clip: float | None = None) -> StepInfo:
        """Reduce, clip to the global norm `clip` (None or 0: off), AdamW with learning rate `lr`, publish.

        A gradient that is not finite on any rank makes all ranks skip the update; the 20th in a row is a UserError.
        One of 0 everywhere, since there was nothing to train, is skipped as well.
        """
        self._must_train()
        for unit in reversed(self.trained):
            unit.finish_gradients()
        self.memory.wait()
        squares = torch.stack([sum_of_squares(unit.shard_grad) for unit in self.trained]).to(self.device)  # (units,)
        if self.stage > 0:  # norm, overflow vote and NaN guard in one: an inf anywhere is an inf everywhere
            self.comm.all_reduce(squares)
        scale, norm = self.loss_scale, squares.sum().sqrt().item() / self.loss_scale
        if not math.isfinite(norm):
            self.skipped, self.good_steps = self.skipped + 1, 0
            if self.dtype == torch.float16:
                self.loss_scale = max(1.0, self.loss_scale / 2)
            if self.skipped >= 20:  # a checkpoint may bring some
                bad = [unit.name for unit, square in zip(self.trained, squares.tolist()) if not math.isfinite(square)]
                raise UserError(f"{self.skipped} steps in a row had a gradient that is not finite, first in {bad[0]}; "
                                "lower --lr, or use --dtype bfloat16 or float32")
            return StepInfo(norm, True, scale)
        if norm > 0:  # 0: no token was trained, on no rank. Adam's momentum alone would move the weights blindly
            # AdamW divides while it reads the gradient anyway: a pass of our own would take a quarter of its time.
            divisor = scale * max(1.0, (norm + 1e-6) / clip if clip else 1.0)
            self.optimizer.grad_scale = torch.tensor(divisor, device=self.trained[0].shard_grad.device)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            for unit in self.trained:
                unit.publish()
            self.updates += 1
        self.skipped, self.good_steps = 0, self.good_steps + 1
        if self.dtype == torch.float16 and self.good_steps == 2000:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0  # only now: this step was made with the old scale
        return StepInfo(norm, norm == 0, scale)

    @contextlib.contextmanager
    def gathered(self):
        """Whole weights in every module, no gradients, no communication: ranks may generate different lengths."""
        if self.is_gathered:
            raise RuntimeError("gathered() inside gathered(): leaving the inner one would end the outer")
        self.is_gathered = True
        try:
            with torch.no_grad():
                for unit in self.units:
                    plug(unit.slots, unit.views(unit.fetch()))
                yield
        finally:
            self.is_gathered = False
            for unit in self.units:
                plug(unit.slots, None)

    # ---- state

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """{name: tensor} as the unsharded model's own state_dict(), in main memory; on rank 0 alone, {} elsewhere.
        All ranks must call it. Tied names share one tensor."""
        state = {}
        for unit in self.units:
            whole = unit.master
            if self.stage > 0 and unit.master.numel() < unit.length:
                whole = self.memory.empty(unit.shard_size * self.comm.world, unit.master.dtype)
                self.comm.all_gather(whole, unit.master.to(self.device))
            if self.comm.rank == 0:
                for slot, view in zip(unit.slots, unit.views(whole)):
                    state |= dict.fromkeys((name for name, _, _ in slot.places), view.to("cpu", copy=True))
        return state | self.model.state_dict() if self.comm.rank == 0 else {}

    def report(self) -> str:
        """A few lines for the log: bytes held by this rank, as counted and by formula; bytes to send."""
        return zero_tools.report(self)

    def counted(self) -> str:
        """One line for the end of the log: bytes that this rank has sent so far, and the peak of its temporaries."""
        return zero_tools.counted(self)
