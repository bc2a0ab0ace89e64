"""ZeRO by hand (Rajbhandari et al. 2020, arXiv 1910.02054): stages 0-3 over torch.distributed.

    z = Zero(model, units=model.units(), stage=3, dtype=torch.bfloat16, lr=3e-4, weight_decay=0.1)
    for micro_batch in batch:
        z.backward(loss_sum / global_count)      # gradients are SUMMED over micro-batches and ranks
    info = z.step(lr, clip=1.0)                  # StepInfo(norm, skipped, loss_scale), the same on all ranks
    with z.gathered(): generate(model, ...)      # whole weights, no communication inside
"""
from __future__ import annotations

import contextlib
import math
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn

from common import UserError


class StepInfo(NamedTuple):
    norm: float        # global gradient norm before clipping
    skipped: bool      # the norm was not finite: weights and optimizer were left alone, on all ranks
    loss_scale: float  # the scale this step's gradients carried (1 unless dtype is float16)


# ---- collectives --------------------------------------------------------------------------------------------------

class Comm:
    """The collectives ZeRO needs. `sent` counts the bytes that this rank puts on the wire, per kind of collective."""

    def __init__(self):
        inside = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if inside else (0, 1)
        self.sent: dict[str, int] = {}

    def count(self, kind: str, sent: int) -> None:
        self.sent[kind] = self.sent.get(kind, 0) + sent

    def all_reduce(self, x: torch.Tensor) -> None:
        """Sum over ranks, in place. A ring sends 2 (N-1)/N of the tensor."""
        if self.world > 1:
            self.count("all_reduce", 2 * (self.world - 1) * x.nbytes // self.world)
            dist.all_reduce(x)

    def all_gather(self, out: torch.Tensor, shard: torch.Tensor) -> None:
        """Concatenate the equal shards (S,) of all ranks into out (N S,). Sends (N-1)/N of the whole."""
        if self.world == 1:
            if out.data_ptr() != shard.data_ptr():
                out.copy_(shard)
            return
        self.count("all_gather", (self.world - 1) * shard.nbytes)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        gather(out, shard)

    def exchange(self, x: torch.Tensor) -> torch.Tensor:
        """x (N S,) -> (N, S): what each rank holds of MY shard. Summed in rank order this is a reduce-scatter.

        gloo's own reduce-scatter all-reduces a clone and sends twice as much. This sends (N-1)/N of the tensor, is
        deterministic, and lets the caller add 16-bit gradients in float32.
        """
        if self.world == 1:
            return x[None]
        self.count("reduce_scatter", (self.world - 1) * x.nbytes // self.world)
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x)
        return received.view(self.world, -1)


# ---- one unit: a block's parameters as one flat vector --------------------------------------------------------------

class Slot(NamedTuple):
    """Where one parameter lies in its unit's flat vector, and in which modules it is plugged in (several if tied)."""
    names: list[str]
    shape: torch.Size
    start: int
    numel: int
    places: list[tuple[nn.Module, str]]


class Use(torch.autograd.Function):
    """Using a unit's weights: forward fetches them, backward gets their gradients, and that is all ZeRO needs.

    Autograd calls backward when every consumer of the weights has been differentiated, before the previous unit's.
    """

    @staticmethod
    def forward(ctx, unit: "Unit", master: torch.Tensor):
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
    def __init__(self, zero: "Zero", name: str, module: nn.Module, slots: list[Slot], values: list[torch.Tensor],
                 trainable: int, decaying: int):
        """values: the parameters in the slots' order: first those with weight decay, then the other trainable ones,
        then the frozen ones; trainable, decaying: how many parameters."""
        self.zero, self.name, self.module, self.slots, self.trainable = zero, name, module, slots, trainable
        world, rank = zero.comm.world, zero.comm.rank
        self.numel = sum(s.numel for s in slots)
        self.S = -(-self.numel // world)  # elements of a shard; the last one is padded
        wide = torch.float64 if zero.dtype == torch.float64 else torch.float32
        flat = torch.zeros(self.S * world, dtype=wide if trainable else zero.dtype, device=zero.device)
        for slot, value in zip(slots, values):
            flat[slot.start:slot.start + slot.numel].copy_(value.detach().flatten())
        if world > 1:
            dist.broadcast(flat, 0)  # ranks that were seeded differently would train a mixture
        self.low, self.high = (0, self.S * world) if zero.stage == 0 else (rank * self.S, (rank + 1) * self.S)
        # Without a cast the fp32 master weights are a slice of the weights that compute, not a copy.
        self.full = None if zero.stage == 3 else flat.to(zero.dtype)
        self.master = flat[self.low:self.high] if self.full is flat else flat[self.low:self.high].clone()
        self.fwd = module.forward
        if not trainable:
            return

        def owned(parameters: int) -> int:  # how much of the first so many parameters lies in this rank's shard
            end = slots[parameters - 1].start + slots[parameters - 1].numel if parameters else 0
            return min(max(end - self.low, 0), self.high - self.low)

        self.decay, self.end = owned(decaying), owned(trainable)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master[:self.end]), torch.zeros_like(self.master[:self.end])
        self.grad = torch.zeros(flat.numel() if zero.stage < 2 else self.S, dtype=wide, device=zero.device)
        self.filled = False  # whether grad holds this step's gradients or the last step's, to be overwritten
        self.shard_grad = self.grad[self.low:self.high] if zero.stage == 1 else self.grad

    def views(self, full: torch.Tensor) -> list[torch.Tensor]:
        return [full[s.start:s.start + s.numel].view(s.shape) for s in self.slots]

    # The four stages are these three methods.

    def fetch(self) -> torch.Tensor:
        """The whole unit in the compute dtype: resident at stages 0-2, gathered from the shards at stage 3."""
        if self.full is not None:
            return self.full
        full = torch.empty(self.S * self.zero.comm.world, dtype=self.zero.dtype, device=self.zero.device)
        self.zero.comm.all_gather(full, self.master.to(self.zero.dtype))
        return full

    @torch.no_grad()
    def reduce(self, gradients) -> None:
        """Add one backward's gradients: to the whole local gradient at stages 0-1, to this rank's shard at 2-3."""
        local = self.zero.stage < 2
        flat = self.grad if local else torch.zeros(self.S * self.zero.comm.world, dtype=self.zero.dtype,
                                                   device=self.zero.device)
        for part, gradient in zip(self.views(flat), gradients):
            if local and self.filled:
                part.add_(gradient) if gradient is not None else None
            elif gradient is not None:
                part.copy_(gradient)
            else:
                part.zero_()
        if not local:
            self.add_to_shard(self.zero.comm.exchange(flat))
        self.filled = True

    def add_to_shard(self, chunks: torch.Tensor) -> None:
        """shard gradient (+)= sum of chunks (N, S) in rank order, in the wide dtype."""
        total = chunks[0].to(self.shard_grad.dtype)
        for chunk in chunks[1:]:
            total += chunk
        self.shard_grad.add_(total) if self.filled and self.zero.stage > 1 else self.shard_grad.copy_(total)

    def finish_gradients(self) -> None:
        """After the last micro-batch: stages 0-1 communicate now, once, however many micro-batches there were."""
        if not self.filled:
            self.grad.zero_()  # nobody used this unit
        if self.zero.stage == 0:
            self.zero.comm.all_reduce(self.grad)
        elif self.zero.stage == 1 and self.zero.comm.world > 1:
            self.add_to_shard(self.zero.comm.exchange(self.grad))
        self.filled = False

    def publish(self) -> None:
        """After the update: at stages 0-2 the resident weights take the new values."""
        if self.zero.stage == 0 and self.full.dtype != self.master.dtype:
            self.full.copy_(self.master)
        elif self.zero.stage in (1, 2):
            self.zero.comm.all_gather(self.full, self.master.to(self.full.dtype))

    def vectors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of this unit; each vector begins at element self.low of the unit's flat vector."""
        vectors = {"master": self.master}
        if self.trainable:
            vectors |= {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return vectors

    def plug(self, weights) -> None:
        for slot, weight in zip(self.slots, weights):
            for module, key in slot.places:
                module.__dict__[key] = weight  # shadows the deleted Parameter

    def unplug(self) -> None:
        for slot in self.slots:
            for module, key in slot.places:
                module.__dict__.pop(key, None)

    def forward(self, *args, **kwargs):
        if self.zero.is_gathered:
            return self.fwd(*args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args, **kwargs):
        train = self.trainable and torch.is_grad_enabled()
        self.plug(Use.apply(self, self.zero.trigger) if train else self.views(self.fetch()))
        try:
            return self.fwd(*args, **kwargs)
        finally:
            self.unplug()


# ---- the whole model ----------------------------------------------------------------------------------------------

class Zero:
    """Shards a model, owns its optimizer (AdamW), and takes the place of loss.backward() and optimizer.step().

    units: modules that are fetched one at a time (blocks; untied embedding and head); whatever parameter is not inside
        exactly one of them belongs to the root unit, fetched once for the whole forward and backward.
    dtype: of weights and activations in forward and backward; float32 masters, gradients and optimizer states stay wide.
    init(module, prefix): for a model built under torch.device("meta"), larger than one rank may hold: fills the
        parameters of one unit, in place, with numbers that depend on their full names (prefix + name) alone.
    Afterwards the model's Parameters are gone: model(...) works as before, model.parameters() is empty.
    """

    def __init__(self, model: nn.Module, *, units: list[nn.Module], stage: int = 0, dtype: torch.dtype = torch.float32,
                 offload: tuple[str, ...] = (), lr: float = 1e-3, weight_decay: float = 0.0,
                 betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, frozen: bool = False,
                 activation_checkpointing: bool = False, compile: bool = False, overlap: bool = False,
                 init: Callable[[nn.Module, str], None] | None = None, device: torch.device | str | None = None):
        if stage not in (0, 1, 2, 3):
            raise UserError(f"--zero {stage}: expected 0, 1, 2 or 3")
        if stage or offload or activation_checkpointing or compile or overlap:
            raise UserError("only --zero 0 is ready")
        self.model, self.stage, self.dtype, self.comm, self.frozen = model, stage, dtype, Comm(), frozen
        first = next(model.parameters())
        self.device = torch.device(device) if device else first.device
        self.trigger = torch.zeros((), requires_grad=True)  # makes Use part of the graph
        self.is_gathered = False
        self.loss_scale = 2.0**16 if dtype == torch.float16 else 1.0
        self.updates = self.good_steps = self.skipped = 0  # made at all; since the scale moved; skipped in a row
        model.to(self.device) if first.device.type != "meta" else None
        self.units = self._cut(units, init)
        self.parameter_count = sum(u.numel for u in self.units)
        self.optimizer = None if frozen else self._optimizer(lr, betas, eps, weight_decay)

    def _cut(self, modules: list[nn.Module], init) -> list[Unit]:
        """Give every parameter to one unit, then turn the units into flat vectors one after the other, the root last."""
        slots: dict[nn.Parameter, tuple[list, list]] = {}  # parameter -> (names, places)
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            for key, p in module._parameters.items():
                if p is not None:
                    names, places = slots.setdefault(p, ([], []))
                    names.append(f"{prefix}.{key}" if prefix else key)
                    if all(m is not module or k != key for m, k in places):
                        places.append((module, key))
        names = {module: name for name, module in self.model.named_modules()}
        inside = [set(module.modules()) for module in modules]
        members = [[] for _ in modules] + [[]]
        for p, (_, places) in slots.items():
            homes = [i for i, parts in enumerate(inside) if all(module in parts for module, _ in places)]
            members[homes[0] if len(homes) == 1 else -1].append(p)
        units = []
        for module, parameters in zip([*modules, self.model], members):
            if parameters:
                units.append(self._unit(names[module] or "root", module, [(p, *slots.pop(p)) for p in parameters], init))
            parameters.clear()  # the originals go as their unit is made: two copies of one unit, never of the model
        for unit in units:
            unit.module.forward = unit.forward
        return units

    def _unit(self, name, module, found, init) -> Unit:
        def rank_of(entry) -> int:  # decay, no decay, frozen: then weight decay is one boundary in the flat vector
            p = entry[0]
            return 2 if self.frozen or not p.requires_grad else 0 if p.dim() >= 2 else 1

        found.sort(key=rank_of)
        if found[0][0].is_meta:
            for p, _, places in found:
                fresh = nn.Parameter(torch.empty_like(p, device=self.device), requires_grad=p.requires_grad)
                for owner, key in places:
                    owner._parameters[key] = fresh
            init(module, "" if name == "root" else name)
        kinds, made, values, start = [rank_of(entry) for entry in found], [], [], 0
        for p, names, places in found:
            owner, key = places[0]
            values.append(owner._parameters[key])
            made.append(Slot(names, p.shape, start, p.numel(), places))
            start += p.numel()
            for owner, key in places:
                del owner._parameters[key]
        return Unit(self, name, module, made, values, trainable=sum(k < 2 for k in kinds), decaying=kinds.count(0))

    def _optimizer(self, lr, betas, eps, weight_decay) -> torch.optim.AdamW:
        """AdamW is elementwise, so it neither knows nor cares that it sees flat shards (Loshchilov & Hutter 2019)."""
        groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
        states = {}
        for unit in self.units:
            if unit.trainable:
                for group, part in zip(groups, (slice(0, unit.decay), slice(unit.decay, unit.end))):
                    p = nn.Parameter(unit.master[part])
                    p.grad = unit.shard_grad[part]
                    group["params"].append(p)
                    states[p] = {"step": torch.zeros((), device=p.device), "exp_avg": unit.exp_avg[part],
                                 "exp_avg_sq": unit.exp_avg_sq[part]}
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        optimizer.state.update(states)
        return optimizer

    @property
    def trained(self) -> list[Unit]:
        return [u for u in self.units if u.trainable]

    # ---- training

    def backward(self, loss: torch.Tensor) -> None:
        """loss: already divided by the global count; gradients of all ranks and micro-batches are summed."""
        if self.is_gathered:
            raise RuntimeError("backward inside gathered(): nothing was recorded there")
        (loss * self.loss_scale if self.loss_scale != 1.0 else loss).backward()

    @torch.no_grad()
    def step(self, lr: float, clip: float | None = None) -> StepInfo:
        """Reduce, clip to global norm `clip` (None or 0: off), AdamW with learning rate `lr`, publish."""
        if self.is_gathered or self.frozen:
            raise RuntimeError("step of a frozen model, or inside gathered()")
        for unit in reversed(self.trained):
            unit.finish_gradients()
        squares = torch.stack([_sum_of_squares(unit.shard_grad) for unit in self.trained])
        if self.stage > 0:
            self.comm.all_reduce(squares)
        scale, norm = self.loss_scale, squares.sum().sqrt().item() / self.loss_scale
        if not math.isfinite(norm):  # an inf or nan anywhere is one everywhere: all ranks take this branch together
            self.skipped, self.good_steps = self.skipped + 1, 0
            bad = next(unit.name for unit, square in zip(self.trained, squares) if not square.isfinite())
            if self.skipped == 20:
                raise UserError(f"20 steps in a row had a gradient that is not finite, first in {bad}; lower --lr, "
                                "or use --dtype bfloat16 or float32")
            if self.dtype == torch.float16:
                self.loss_scale = max(1.0, self.loss_scale / 2)
            return StepInfo(norm, True, scale)
        self.skipped = 0
        divisor = scale * max(1.0, (norm + 1e-6) / clip if clip else 1.0)
        # The fused kernel divides by grad_scale as it reads the gradient (GradScaler's way in): no extra pass.
        self.optimizer.grad_scale = torch.tensor(divisor, dtype=torch.float32) if divisor != 1.0 else None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for unit in self.trained:
            unit.publish()
        self.updates, self.good_steps = self.updates + 1, self.good_steps + 1
        if self.dtype == torch.float16 and self.good_steps % 2000 == 0:
            self.loss_scale *= 2  # only now: this step's gradients were made with the old scale
        return StepInfo(norm, False, scale)

    @contextlib.contextmanager
    def gathered(self):
        """Whole weights in every module for generation: no collective inside, so ranks may stop at different lengths."""
        for unit in self.units:
            unit.plug(unit.views(unit.fetch()))
        self.is_gathered = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.is_gathered = False
            for unit in self.units:
                unit.unplug()

    # ---- state

    def layout(self) -> dict:
        """JSON-able: which tensor lies where in the flat vectors. A checkpoint must match it, at any world size and stage."""
        return {u.name: [[s.names, list(s.shape)] for s in u.slots] for u in self.units}

    def state_shards(self) -> dict:
        """This rank's part of everything that training needs: {"units": {unit: {vector: (n,) tensor}}, "buffers", "scaler"}.

        A vector is [master | exp_avg | exp_avg_sq], elements [r S, (r+1) S) of the unpadded whole, S = ceil(numel / N).
        """
        shards, rank = {}, self.comm.rank
        for unit in self.units:
            first, last = (min(r * unit.S, unit.numel) - unit.low for r in (rank, rank + 1))
            shards[unit.name] = {key: vector[first:last] for key, vector in unit.vectors().items()}
        return {"units": shards, "buffers": self.model.state_dict(),
                "scaler": {"loss_scale": self.loss_scale, "good_steps": self.good_steps, "skipped": self.skipped,
                           "updates": self.updates}}

    @torch.no_grad()
    def load_shards(self, shards: list[dict]) -> None:
        """shards: state_shards() of every rank of the run that saved, in rank order; any world size, any stage."""
        for unit in self.units:
            for key, mine in unit.vectors().items():
                start = -unit.low  # where the next piece begins, counted from the start of my own vector
                for piece in (shard["units"][unit.name][key] for shard in shards):
                    first, last = max(start, 0), min(start + piece.numel(), mine.numel())
                    if first < last:
                        mine[first:last].copy_(piece[first - start:last - start])
                    start += piece.numel()
            unit.publish()
        self.model.load_state_dict(shards[0]["buffers"])
        for name, value in shards[0]["scaler"].items():
            setattr(self, name, value)
        if not self.frozen:
            for state in self.optimizer.state.values():
                state["step"].fill_(self.updates)

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """{name: tensor} as the unsharded model's own state_dict(), in main memory; on rank 0 alone, {} elsewhere.
        All ranks must call it. Tied names share one tensor."""
        state = {}
        for unit in self.units:
            whole = unit.master
            if self.stage > 0:
                whole = torch.empty(unit.S * self.comm.world, dtype=unit.master.dtype, device=self.device)
                self.comm.all_gather(whole, unit.master)
            if self.comm.rank == 0:
                for slot, view in zip(unit.slots, unit.views(whole)):
                    state |= dict.fromkeys(slot.names, view.to("cpu", copy=True))
        return state | self.model.state_dict() if self.comm.rank == 0 else {}


def _sum_of_squares(x: torch.Tensor, chunk: int = 1 << 20) -> torch.Tensor:
    """In float64, through a buffer that fits the cache: x.double() whole would double the gradient's memory."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    buffer = torch.empty(min(chunk, x.numel()), dtype=torch.float64, device=x.device)
    for part in x.split(chunk):
        wide = buffer[:part.numel()].copy_(part)
        total += torch.dot(wide, wide)
    return total
