"""ZeRO by hand: train a model sharded over ranks, or offloaded to host memory, with torch.distributed alone.

    zero = Zero(model, units=model.units(), stage=2, dtype=torch.bfloat16, lr=3e-4, weight_decay=0.1)
    for micro_batch in batch:
        zero.backward(loss_sum / global_count)   # gradients are SUMMED over micro-batches and ranks
    info = zero.step(lr, clip=1.0)               # StepInfo(norm, skipped, loss_scale), the same on all ranks
    with zero.gathered(): generate(model, ...)   # whole weights, no communication inside

Data parallelism holds all of it N times, once per rank. ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) cuts
it in N shards, with each stage one kind more. Psi is the number of parameters, p the bytes of one weight in
forward and backward (2 or 4), m the micro-batches of one step, and f = (N-1)/N. Bytes per rank:

    stage            weights  gradients  fp32 masters  Adam moments  sent in one step
    0 data parallel  p Psi    4 Psi      4 Psi *       8 Psi         2f 4 Psi            all-reduce
    1 + optimizer    p Psi    4 Psi      4 Psi/N *     8 Psi/N       f 4 Psi + f p Psi   reduce, gather
    2 + gradients    p Psi    4 Psi/N    4 Psi/N *     8 Psi/N       m f p Psi + f p Psi m reduces, gather
    3 + weights      0        4 Psi/N    4 Psi/N       8 Psi/N       m f 3p Psi          2m gathers, m reduces
    * 0 if p = 4: then the masters are the weights, or a slice of them

For a moment stage 3 also holds the weights of one unit (block), and every reduce about three vectors of that
size. With many micro-batches stage 1 sends as with one. In numbers: `python -m tools.scaling plan --n 64`.

One training step at stage 2, and what other stages do instead:
    forward   Use, fetch     All weights are at hand. Stage 3: they are gathered for as long as the unit runs.
    backward  Use, reduce    Each rank sums 1/N of a unit's gradients over ranks. Stages 0, 1: only at
                             the end, in Unit.finish_gradients; until then they add up.
    update    Zero.step      One norm of all gradients, clipping, AdamW on this rank's 1/N of the masters.
              Unit.publish   Each rank sends its new weights to all others. Stages 0, 3: nothing to send.
"""
import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from lib import collectives
from lib.collectives import Slot, aligned
from lib.program import UserError

VECTORS = ("master", "exp_avg", "exp_avg_sq")  # what a checkpoint holds of a unit, and of the whole Zero:
SCALARS = ("updates", "loss_scale", "good_steps", "skipped")


def data_parallel_step(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> float:
    """Stage 0 in ten lines, called after loss.backward(). All stages must equal it; a test compares them."""
    for p in model.parameters():
        dist.all_reduce(p.grad)
    norm = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm().item()
    for p in model.parameters():
        p.grad *= min(1.0, clip / (norm + 1e-6))
    optimizer.step()
    optimizer.zero_grad()
    return norm


class StepInfo(NamedTuple):
    norm: float  # of all gradients, before clipping
    skipped: bool  # the norm was not finite, or 0: weights and optimizer were left alone, on all ranks
    loss_scale: float  # by which this step's gradients were multiplied (1 unless dtype is float16)


class Zero:
    """Shards a model, owns its optimizer, and takes the place of loss.backward() and optimizer.step().

    units: modules that are fetched one at a time (blocks; untied embedding and head). A parameter that is not
        inside exactly one of them belongs to the root unit, which is fetched once for forward and backward.
    dtype: of weights and activations, in place of autocast. The rest is float32 (float64 if dtype is).
    offload: "optim": masters, moments and gradient shards are in host memory, and AdamW runs there; "params"
        (stage 3): weight shards too; "acts": large activations.
    frozen: no gradients, no optimizer (a reference or reward model); sharded at stage 3 only.
    activation_checkpointing, compile: of units that are members of a ModuleList, which are the blocks.
    init(module, prefix): for a model built under torch.device("meta"), because no rank may hold it whole. It
        fills one unit's parameters in place, as their full names say. device: where to. comm: which ranks.
    Afterwards the model has no Parameters: model(...) works as before, model.parameters() is empty.
    """

    def backward(self, loss: torch.Tensor) -> None:
        """loss: already divided by the global count; gradients of all ranks and micro-batches are summed."""
        (loss * self.loss_scale).backward()
        self.held.clear()

    @torch.no_grad()
    def step(self, lr: float, clip: float | None = None) -> StepInfo:
        """Clip to the global norm `clip` (None or 0: off), AdamW with rate `lr`, publish the new weights.
        If a gradient is not finite on any rank, all ranks skip the update. The 20th in a row is a UserError.
        If all gradients are 0, the update is skipped too: Adam's momentum alone would move the weights."""
        for unit in self.trained:
            unit.finish_gradients()
        self.memory.wait()  # for gradients on their way to the host
        scale, norm = self.loss_scale, self.squares().sum().sqrt().item() / self.loss_scale
        if not math.isfinite(norm):
            self.skipped, self.good_steps = self.skipped + 1, 0
            if self.dtype == torch.float16:
                self.loss_scale = max(1.0, self.loss_scale / 2)
            if self.skipped >= 20:
                raise UserError(f"{self.skipped} steps in a row had a gradient that is not finite; lower "
                                "--lr, or use --dtype bfloat16 or float32")
            return StepInfo(norm, True, scale)
        if norm > 0:
            divisor = scale * max(1.0, (norm + 1e-6) / clip if clip else 1.0)  # fused AdamW divides for free
            self.optimizer.grad_scale = torch.tensor(divisor, device=self.trained[0].shard_grad.device)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            for unit in self.trained:
                unit.publish()
            self.updates += 1
        self.skipped, self.good_steps = 0, self.good_steps + 1
        if self.dtype == torch.float16 and self.good_steps == 2000:  # the rules of torch.amp.GradScaler
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0
        return StepInfo(norm, norm == 0, scale)

    def squares(self) -> torch.Tensor:
        """(units,) of all ranks: also the vote on skipping, as an inf or NaN of one reaches them all."""
        squares = torch.stack([sum_of_squares(unit.shard_grad) for unit in self.trained]).to(self.device)
        if self.stage > 0:
            self.comm.all_reduce(squares)
        return squares

    @contextlib.contextmanager
    def gathered(self):
        """Inside, modules have whole weights and nothing is communicated: replies may differ in length."""
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

    def __init__(self, model: nn.Module, *, units: list[nn.Module], stage: int = 0, comm=None,
                 dtype: torch.dtype = torch.float32, offload: tuple[str, ...] = (), lr: float = 1e-3,
                 weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 frozen: bool = False, activation_checkpointing: bool = False, compile: bool = False,
                 init: Callable[[nn.Module, str], None] | None = None, device: torch.device | str = ""):
        if set(offload) - {"optim", "params", "acts"}:
            raise UserError(f"--offload {','.join(offload)}: expected a comma list of optim, params, acts")
        if "params" in offload and (stage != 3 or not (frozen or "optim" in offload)):
            raise UserError("--offload params: needs --zero 3, and optim as well unless the model is frozen")
        self.model, self.stage, self.dtype, self.offload = model, stage, dtype, tuple(offload)
        self.activation_checkpointing, self.compile = activation_checkpointing, compile
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.device = torch.device(device or next(model.parameters()).device)
        self.memory, self.comm = collectives.Memory(self.device), comm or collectives.Comm()
        self.is_gathered, self.held = False, {}  # held: {unit: its weights} of backward's module
        self.loss_scale = 2.0**16 if dtype == torch.float16 else 1.0
        self.updates = self.good_steps = self.skipped = 0  # all; since the scale changed; skipped in a row
        if compile:  # torch.compile takes the blocks of all models for one function, and allows it 8 variants
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self.units = []
        for name, module, trains, parameters in collectives.group_parameters(model, units, frozen):
            if init is not None:
                collectives.materialise(parameters, self.device)
                init(module, name)
            self.units.append(Unit(self, name or "root", module, trains, *collectives.take_out(parameters)))
            module.forward = self.units[-1].forward
        model.to(self.device)  # the buffers: the parameters are out of it
        self.stays = {buffer.data_ptr(): None for buffer in model.buffers()}  # not parked, nor weights in use
        self.trained = [unit for unit in self.units if unit.trainable]
        self.frozen = not self.trained
        self.optimizer = None if self.frozen else self._optimizer(lr, betas, eps, weight_decay)

    def _optimizer(self, lr, betas, eps, weight_decay) -> torch.optim.AdamW:
        """AdamW (Loshchilov & Hutter 2019) is elementwise: its tensors may be parts of shards."""
        groups, state = [{"params": [], "weight_decay": decay} for decay in (weight_decay, 0.0)], {}
        for unit in self.trained:
            for group, part in zip(groups, (slice(0, unit.decay), slice(unit.decay, unit.end))):
                p = nn.Parameter(unit.master[part])
                p.grad = unit.shard_grad[part]
                group["params"].append(p)
                state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": unit.exp_avg[part],
                            "exp_avg_sq": unit.exp_avg_sq[part]}
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        optimizer.state.update(state)
        return optimizer

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """{name: tensor} like state_dict() of the unsharded model, in main memory; {} on all ranks but 0.
        All ranks must call it. Tied names share one tensor."""
        state = {}
        for unit in self.units:
            whole = unit.master
            if whole.numel() < unit.length:
                whole = self.comm.all_gather(whole.to(self.device))
            if self.comm.rank == 0:
                for slot, view in zip(unit.slots, unit.views(whole)):
                    state |= dict.fromkeys((name for name, *_ in slot.places), view.to("cpu", copy=True))
        return state | self.model.state_dict() if self.comm.rank == 0 else {}

    def layout(self) -> dict:
        """{unit: [[names, shape, start] of each parameter]}. World size and stage do not change it."""
        return {unit.name: [[[name for name, _, _ in slot.places], list(slot.shape), slot.start]
                            for slot in unit.slots] for unit in self.units}

    def state_shards(self) -> dict:
        """This rank's share: {"units": {unit: {vector: (n,) tensor}}, "buffers", "scalars"}."""
        units, rank = {}, self.comm.rank
        for unit in self.units:  # of each flat vector this rank's shard, without the padding at its end
            first, last = (min((rank + i) * unit.shard_size, unit.length) - unit.low for i in (0, 1))
            keys = VECTORS[:3 if unit.trainable else 1]
            parts = {key: getattr(unit, key)[first:last].cpu() for key in keys}
            units[unit.name] = {  # torch.save would write the whole storage of a part
                key: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x for key, x in parts.items()}
        return {"units": units, "buffers": self.model.state_dict(),
                "scalars": {key: getattr(self, key) for key in SCALARS}}

    def load_shards(self, shards: list[dict]) -> None:
        """shards: state_shards() of all ranks that saved, in rank order, whatever their number and stage."""
        for unit in self.units:
            for key in shards[0]["units"][unit.name]:
                rest = torch.cat([shard["units"][unit.name][key] for shard in shards])[unit.low:]
                mine = getattr(unit, key)
                mine[:len(rest)] = rest[:len(mine)]  # at its end mine may have padding, which was not saved
            unit.publish()
        self.model.load_state_dict(shards[0]["buffers"])
        for key in SCALARS:
            setattr(self, key, shards[0]["scalars"][key])
        for state in self.optimizer.state.values() if self.optimizer else ():
            state["step"].fill_(self.updates)

    def report(self) -> str:
        """For the log: bytes of model states held, counted; bytes to send, by the table above."""
        psi, total = (sum(unit.numel for unit in units) for units in (self.trained, self.units))
        *_, sent = per_rank(self.stage, self.comm.world, psi, total, self.dtype.itemsize, self.wide.itemsize)
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for unit in self.units for x in vars(unit).values() if isinstance(x, torch.Tensor)}
        return (f"ZeRO stage {self.stage}, rank {self.comm.rank} of {self.comm.world}: {total:,} parameters\n"
                f"trained: {psi:,}; model states held: {sum(held.values()) / 2**20:.1f} MiB\n"
                f"to send per step of one micro-batch: {sent / 2**20:.1f} MiB")


def per_rank(stage, N, psi, total, p, w=4, m=1, offload=0) -> tuple:
    """(weights, gradients, masters, moments, host's, sent): the table. offload: 1 optim, 2 and params."""
    own = psi / N if stage else psi  # what this rank updates
    here = 0 if offload else own
    sent = (psi * 2 * w, psi * (w + p), (m + 1) * psi * p, m * (psi + total + total * (psi > 0)) * p)[stage]
    return (p * (psi if stage < 3 else own * (offload == 1)), w * (psi if stage < 2 else here),
            w * here * (stage == 3 or p < w), 2 * w * here, 4 * w * (own - here), (1 - 1 / N) * sent)


class Use(torch.autograd.Function):
    """Use of a unit's weights: forward fetches them, backward gets the gradients of all of them at once."""

    @staticmethod
    def forward(ctx, unit: "Unit", trigger: torch.Tensor):  # trigger: see Unit.run
        ctx.unit = unit
        ctx.set_materialize_grads(False)  # the gradient of an unused weight stays None
        return tuple(unit.views(unit.fetch()))

    @staticmethod
    def backward(ctx, *gradients):
        ctx.unit.reduce(gradients)
        return None, None


def plug(slots: list[Slot], weights: list[torch.Tensor] | None) -> None:
    """Set the weights as ordinary attributes where the Parameters were; None: delete them again."""
    for i, slot in enumerate(slots):
        for _, module, key in slot.places:
            module.__dict__.pop(key, None)
            if weights is not None:
                module.__dict__[key] = weights[i]


def sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """In float64. Part by part, because x.double() would take twice the memory of the gradient."""
    parts = map(torch.Tensor.double, x.split(1 << (17 if x.device.type == "cpu" else 24)))  # a CPU's cache
    return sum((torch.dot(part, part) for part in parts), x.new_zeros((), dtype=torch.float64))


class Unit:
    """One module's parameters as one flat vector of N shard_size elements, the last of them padding.

    slots, values: the parameters in the order of the vector: with weight decay, then without.
    decaying: how many of the slots are. low: the first element that this rank owns, of shard_size or all.
    A module of which a part is frozen has two units: that of the frozen part calls the other, inner one.
    """

    def __init__(self, zero: Zero, name: str, module: nn.Module, trainable: bool, slots: list[Slot],
                 values: list[torch.Tensor], decaying: int):
        self.zero, self.name, self.module, self.slots, self.trainable = zero, name, module, slots, trainable
        memory, comm, stage = zero.memory, zero.comm, zero.stage
        self.numel = sum(slot.shape.numel() for slot in slots)
        self.length = aligned(slots[-1].start + slots[-1].shape.numel())
        self.shard_size = aligned(-(-self.length // comm.world))
        flat = memory.empty(self.shard_size * comm.world, zero.wide if trainable else zero.dtype).zero_()
        for view, value in zip(self.views(flat), values):
            view.copy_(value)
        if comm.world > 1:  # ranks that were seeded differently would train a mixture
            dist.broadcast(flat, group=comm.group, group_src=0)
        size = self.shard_size if stage > 0 else flat.numel()
        self.low = comm.rank * size if stage > 0 else 0
        # resident: the weights that compute, as far as they stay on the device: all at stages 0-2; at stage 3
        # this rank's shard, if the optimizer alone is offloaded. master: what this rank owns, in float32.
        self.offloaded = "params" in zero.offload or (trainable and "optim" in zero.offload)
        self.resident = flat.to(zero.dtype) if stage < 3 else None
        self.master = flat[self.low:self.low + size]
        if self.offloaded:
            self.master = memory.empty(size, flat.dtype, host=True).copy_(self.master)
        elif self.resident is not flat:
            self.master = self.master.clone()
        if stage == 3 and self.offloaded and "params" not in zero.offload:
            self.resident = memory.to_device(self.master, zero.dtype)
        self.is_block = name.split(".")[-1].isdigit()  # a member of a ModuleList
        self.original, self.is_inner = module.forward, False
        self.fwd = torch.compile(self.original) if zero.compile and self.is_block else self.original
        if zero.units and zero.units[-1].module is module:
            self.name, self.fwd, zero.units[-1].is_inner = f"{name}, frozen", self.original, True
        self.filled = False  # whether grad holds gradients of this step
        if trainable:
            ends = [*(slot.start for slot in slots), self.length]
            self.decay, self.end = (min(max(ends[n] - self.low, 0), size) for n in (decaying, -1))
            self.exp_avg, self.exp_avg_sq, self.shard_grad = (
                memory.empty(n, zero.wide, host=self.offloaded).zero_() for n in (self.end, self.end, size))
            self.grad = self.shard_grad if stage > 1 else memory.empty(flat.numel(), zero.wide).zero_()
            if stage < 2 and not self.offloaded:
                self.shard_grad = self.grad[self.low:self.low + size]

    def views(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole[slot.start:slot.start + slot.shape.numel()].view(slot.shape) for slot in self.slots]

    def fetch(self) -> torch.Tensor:
        """The weights (N shard_size,): at hand at stages 0-2, gathered from the shards at stage 3."""
        weights = self.resident
        if weights is None:
            weights = self.zero.memory.to_device(self.master, self.zero.dtype)
        return weights if self.zero.stage < 3 else self.zero.comm.all_gather(weights)

    @torch.no_grad()
    def reduce(self, gradients) -> None:
        """Add up the gradients of one backward (None: unused): over all ranks at stages 2-3, else my own."""
        self.zero.held.pop(self, None)
        total = self.zero.memory.empty(self.shard_size * self.zero.comm.world, self.zero.dtype).zero_()
        for part, gradient in zip(self.views(total), gradients):
            if gradient is not None:
                part.copy_(gradient)
        if self.zero.stage > 1:
            total = self.zero.comm.reduce_scatter(total, self.zero.wide)  # (shard_size,)
        self.zero.memory.put(self.grad, total, add=self.filled)
        self.filled = True

    def finish_gradients(self) -> None:
        """After the last micro-batch: stages 0-1 communicate only now, however many there were."""
        if not self.filled:  # nobody used this unit
            self.grad.zero_()
        self.filled = False
        if self.zero.stage == 0:
            self.zero.comm.all_reduce(self.grad)
            self.zero.memory.put(self.shard_grad, self.grad)
        elif self.zero.stage == 1:
            self.zero.memory.put(self.shard_grad, self.zero.comm.reduce_scatter(self.grad, self.zero.wide))

    def publish(self) -> None:
        """After an update: the weights that compute take the new values of the masters."""
        if self.resident is not None:
            mine = self.zero.memory.to_device(self.master, self.zero.dtype)
            if 0 < self.zero.stage < 3:
                self.zero.comm.all_gather(mine, self.resident)
            else:
                self.zero.memory.put(self.resident, mine)

    def forward(self, *args, **kwargs):
        """Takes the place of module.forward."""
        if self.zero.is_gathered:
            return self.original(*args, **kwargs)
        if self.is_inner:  # what follows is done around the outer one
            return self.run(*args, **kwargs)
        # Of nested saved_tensors_hooks only the innermost pair acts, so ours stand outside of checkpoint. It
        # calls `run` again in backward, which fetches the weights again.
        with self.hooks():
            if self.zero.activation_checkpointing and self.is_block and torch.is_grad_enabled():
                return checkpoint(self.run, *args, use_reentrant=False, **kwargs)
            return self.run(*args, **kwargs)

    def run(self, *args, **kwargs):
        train = self.trainable and torch.is_grad_enabled()
        weights = Use.apply(self, torch.zeros(0, requires_grad=True)) if train else self.views(self.fetch())
        address = weights[0].untyped_storage().data_ptr()
        self.zero.stays[address] = self
        plug(self.slots, weights)
        try:
            return self.fwd(*args, **kwargs)
        finally:
            plug(self.slots, None)
            self.zero.stays.pop(address, None)

    def hooks(self):
        """What autograd keeps for backward. Of gathered weights: their place in the vector, which refetch()
        brings back. Of large activations, if they are offloaded: a copy in host memory."""
        zero = self.zero
        if not torch.is_grad_enabled() or zero.stage < 3 and "acts" not in zero.offload:
            return contextlib.nullcontext()

        def pack(x):
            address, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
            unit = zero.stays.get(address)
            if zero.stage == 3 and unit and unit.module is not zero.model:
                fetch = unit.refetch  # but the root is kept: it is needed until the end of backward
            elif "acts" in zero.offload and size >= collectives.PARK_BYTES and address not in zero.stays:
                fetch = zero.memory.park(x)
            else:  # detached: x may be the output of the node that keeps it, a circle that nobody would free
                return x.detach(), x._version
            return fetch, (x.size(), x.stride(), x.storage_offset())

        def unpack(kept):
            source, more = kept
            if callable(source):
                return source().as_strided(*more)
            if source._version != more:  # autograd leaves this check to whoever sets hooks
                raise RuntimeError("a tensor needed for backward has been modified by an inplace operation")
            return source

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def refetch(self) -> torch.Tensor:
        """The weights again, in backward. They are held for a module, because autograd asks several times."""
        held = self.zero.held
        if self not in held:
            for other in [unit for unit in held if unit.module is not self.module]:
                del held[other]  # first let go of the other module's
            held[self] = self.fetch()
        return held[self]
