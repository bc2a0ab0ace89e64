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

plus, for a moment, one unit (block) of weights at stage 3 and about three at every reduce of stages 2-3. So stage 3 sends
1.5x of data parallelism at k = 1, but 1.5k x with accumulation, where stage 1 stays at 1x: the stage to accumulate with.

Example, 7 B parameters, p = 2, in GB per GPU; activations come on top, so leave a quarter free:
                     N = 1      2      4      8     16     64       fits on 24 GB         80 GB         141 GB
    stage 0            126    126    126    126    126    126       never                never         N >= 1
    stage 1            126     84     63   52.5   47.3   43.3       never                N >= 4        N >= 2
    stage 2            126     70     42     28     21   15.8       N >= 64              N >= 4        N >= 2
    stage 3            112     56     28     14      7    1.8       N >= 8               N >= 2        N >= 1 (tight)
    stage 3, offload optim: 14/N on the GPU, 112/N in the host: one 24 GB card, with 112 GB of main memory beside it.
The common estimate of 168 GB for full fine-tuning of 7 B in float32 is 24 bytes per parameter: 16 of model states (the
table with p = 4: weights 28 + gradients 28 + moments 56 = 112 GB) and half as much again as a rule of thumb for activations,
which really follow batch x length and not the parameters; activation_checkpointing takes most of them away.

How it works. A unit is a module whose parameters become one flat vector, cut in N equal shards. Its parameters are deleted
and plugged in anew at every forward by `Use`, an autograd function that fetches weights on the way in and reduces gradients
on the way back. The stages differ in three small methods: Unit.fetch, Unit.reduce, Unit.publish. Stage 0, plain
all-reduce, is the one that the others must equal.
"""
from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
import weakref
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from common import UserError

OFFLOADS = ("optim", "params", "acts", "disk")
PARK_BYTES = 1 << 20  # smaller activations are not worth a copy to the host


class StepInfo(NamedTuple):
    norm: float  # global gradient norm before clipping
    skipped: bool  # the norm was not finite: weights and optimizer were left alone, on all ranks
    loss_scale: float  # the scale this step's gradients carried (1 unless dtype is float16)


# ---- collectives --------------------------------------------------------------------------------------------------

class Comm:
    """The collectives ZeRO needs. `sent`: bytes this rank has put on the wire (or moved to and from the host), by kind."""

    def __init__(self):
        inside = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if inside else (0, 1)
        self.sent: dict[str, int] = {}

    def count(self, kind: str, n_bytes: int) -> None:
        self.sent[kind] = self.sent.get(kind, 0) + n_bytes

    def all_reduce(self, x: torch.Tensor) -> None:
        """Sum over ranks, in place. A ring sends 2 (N-1)/N of the tensor."""
        if self.world > 1:
            self.count("all_reduce", 2 * (self.world - 1) * x.nbytes // self.world)
            with naming_lost_ranks("all_reduce"):
                dist.all_reduce(x)

    def all_gather(self, whole: torch.Tensor, shard: torch.Tensor, later: bool = False):
        """whole (N S,) <- the shards (S,) of all ranks. Sends (N-1)/N of the whole. later: returns a handle to wait()."""
        if self.world == 1:
            if whole.data_ptr() != shard.data_ptr():
                whole.copy_(shard)
            return None
        self.count("all_gather", (self.world - 1) * shard.nbytes)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        with naming_lost_ranks("all_gather"):
            return gather(whole, shard, async_op=later)

    def exchange(self, received: torch.Tensor, x: torch.Tensor, later: bool = False):
        """received (N, S) <- what each rank holds of MY shard in its x (N S,): summed in rank order, a reduce-scatter.

        gloo's own reduce-scatter all-reduces a clone, twice the bytes. This sends (N-1)/N of x, gives the same sum
        whatever the timing, and lets the receiver add 16-bit gradients in float32.
        """
        self.count("reduce_scatter", (self.world - 1) * x.nbytes // self.world)
        with naming_lost_ranks("reduce_scatter"):
            return dist.all_to_all_single(received.view(-1), x, async_op=later)


@contextlib.contextmanager
def naming_lost_ranks(what: str):
    """Turn a failed collective into a UserError that says which ranks did not take part.

    The backend knows only that a neighbour went silent. So every rank that notices leaves a mark in the store of the
    rendezvous (it outlives the ranks under torchrun) and looks, shortly after, who left none.
    """
    try:
        yield
    except RuntimeError as error:
        store, rank, world = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
        try:
            store.set(f"noticed/{rank}", what)
            time.sleep(2)
            lost = [r for r in range(world) if not store.check([f"noticed/{r}"])]
        except RuntimeError:  # the store died with its rank
            lost = [0]
        who = f"rank {', '.join(map(str, lost))} died, hangs or raised an error" if lost else "the connection broke"
        raise UserError(f"{what} on rank {rank} failed: {who} ({str(error).splitlines()[0]})") from error


# ---- host memory --------------------------------------------------------------------------------------------------

class Host:
    """Main memory beside the device. With CUDA it is pinned and copies to it run on a stream of their own; on CPU the
    same calls are plain copies, so that the tests walk the same path."""

    def __init__(self, device: torch.device, comm: Comm):
        self.device, self.comm = device, comm
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(numel, dtype=dtype, pin_memory=self.side is not None)

    def take(self, target: torch.Tensor, x: torch.Tensor) -> None:
        """target (host) <- x (device); wait() before reading it."""
        self.comm.count("to_host", x.nbytes)
        if self.side is None:
            target.copy_(x)
            return
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            target.copy_(x, non_blocking=True)
        x.record_stream(self.side)  # its memory must not be given to others before the copy has read it

    def give(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x (host) on the device; cast before the trip, which is the narrow part."""
        if x.dtype != dtype:
            x = self.empty(x.numel(), dtype).copy_(x)
        self.comm.count("from_host", x.nbytes)
        return x.to(self.device, non_blocking=True, copy=True)

    def wait(self) -> None:
        if self.side is not None:
            torch.cuda.synchronize(self.device)


def on_disk(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros in a file of the temporary folder (set TMPDIR to a fast disk). The file has no name, so it dies with us."""
    handle, path = tempfile.mkstemp(prefix="zero-")
    os.close(handle)
    try:
        return torch.from_file(path, shared=True, size=numel, dtype=dtype)
    finally:
        os.unlink(path)


class Parked:
    """The storage of an activation, in host memory until backward asks for it."""

    def __init__(self, host: Host, x: torch.Tensor):
        flat = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
        self.host, self.original, self.back = host, StorageWeakRef(x.untyped_storage()), None
        self.copy = host.empty(flat.numel(), flat.dtype)
        host.take(self.copy, flat)

    def restore(self) -> torch.Tensor:
        if self.back is None:  # kept for the other views of this storage, which are asked for next
            if self.host.side is not None:
                torch.cuda.current_stream(self.host.device).wait_stream(self.host.side)
            self.back = self.host.give(self.copy, self.copy.dtype)
        return self.back


# ---- one unit -----------------------------------------------------------------------------------------------------

class Slot(NamedTuple):
    """Where one parameter lies in its unit's flat vector, and in which modules it is plugged in (several if tied)."""
    names: list[str]
    shape: torch.Size
    start: int
    numel: int
    places: list[tuple[nn.Module, str]]


class Use(torch.autograd.Function):
    """Using a unit's weights: forward fetches them, backward receives their gradients.

    Autograd calls backward once all consumers of the weights are differentiated, and before the unit that ran earlier.
    """

    @staticmethod
    def forward(ctx, unit: "Unit", trigger: torch.Tensor):
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
    """One module's parameters as one flat vector of N S elements, S = ceil(numel / N); rank r owns [r S, (r+1) S).

    slots: the parameters in the vector's order: with weight decay, without, frozen; so decay is one boundary in a shard.
    values: their initial values; trainable, decaying: how many of the slots are.
    """

    def __init__(self, zero: "Zero", name: str, module: nn.Module, slots: list[Slot], values: list[torch.Tensor],
                 trainable: int, decaying: int):
        self.zero, self.name, self.module, self.slots, self.trainable = zero, name, module, slots, trainable
        world, rank = zero.comm.world, zero.comm.rank
        self.is_block = name.split(".")[-1].isdigit()  # a member of a ModuleList, not an embedding or a head
        self.numel = sum(slot.numel for slot in slots)
        self.S = -(-self.numel // world)
        flat = torch.zeros(self.S * world, dtype=zero.wide if trainable else zero.dtype, device=zero.device)
        for view, value in zip(self.views(flat), values):
            view.copy_(value.detach())
        if world > 1:
            dist.broadcast(flat, 0)  # ranks that were seeded differently would train a mixture
        self.low, self.high = (0, self.S * world) if zero.stage == 0 else (rank * self.S, (rank + 1) * self.S)

        # full: the weights that compute, at stages 0-2. master: the truth, this rank's part. copy: stage 3 with masters in
        # host memory but weights not, this rank's part of the weights.
        self.offloaded = zero.offloads("params") or (trainable > 0 and zero.offloads("optim"))
        self.full = flat.to(zero.dtype) if zero.stage < 3 else None
        self.master = flat[self.low:self.high]  # without a cast, masters are a slice of the weights and cost nothing
        if self.offloaded:
            self.master = zero.empty(self.S if zero.stage else flat.numel(), flat.dtype, host=True).copy_(self.master)
        elif self.full is not flat:
            self.master = self.master.clone()
        has_copy = zero.stage == 3 and self.offloaded and not zero.offloads("params")
        self.copy = self.compute_shard() if has_copy else None

        # Stage 3: a gather under way; weights held from first use in backward to reduce; the storage to make recipes for.
        self.pending = self.held = self.recipe_for = None
        self.gathers_in_backward = self.filled = False  # filled: grad holds this step's gradients, not the last step's
        self.original = module.forward
        self.fwd = torch.compile(self.original) if zero.compile and self.is_block else self.original
        if not trainable:
            return

        def owned(parameters: int) -> int:  # elements of the first so many parameters that lie in this rank's part
            return min(max(sum(slot.numel for slot in slots[:parameters]) - self.low, 0), self.high - self.low)

        self.decay, self.end = owned(decaying), owned(trainable)
        self.exp_avg, self.exp_avg_sq = (zero.moment(self.end) for _ in range(2))
        part = self.master.numel()
        if zero.stage < 2:
            self.grad = zero.empty(flat.numel(), zero.wide).zero_()
            self.shard_grad = zero.empty(part, zero.wide, host=True) if self.offloaded else self.grad[self.low:self.high]
        else:
            self.grad = self.shard_grad = zero.empty(part, zero.wide, host=self.offloaded).zero_()

    def views(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole[slot.start:slot.start + slot.numel].view(slot.shape) for slot in self.slots]

    def compute_shard(self) -> torch.Tensor:
        """This rank's part of the weights, on the device and in the compute dtype."""
        if self.offloaded:
            return self.zero.host.give(self.master, self.zero.dtype)
        return self.master.to(self.zero.dtype)

    # ---- the four stages are these three methods

    def fetch(self) -> torch.Tensor:
        """The whole flat vector: resident at stages 0-2, gathered from the shards at stage 3."""
        if self.full is not None:
            return self.full
        whole, work = self.pending or self.start_gather()
        self.pending = None
        self.zero.wait(work)
        self.zero.prefetch_after(self)
        return whole

    def start_gather(self, later: bool = False):
        whole = self.zero.temporary("gathered", self.S * self.zero.comm.world)
        shard = self.copy if self.copy is not None else self.compute_shard()
        return whole, self.zero.comm.all_gather(whole, shard, later)

    @torch.no_grad()
    def reduce(self, gradients) -> None:
        """Add one backward's gradients to the whole local gradient (stages 0-1), or to this rank's shard (2-3)."""
        self.held = None
        local = self.zero.stage < 2
        flat = self.grad if local else self.zero.temporary("reduced", self.S * self.zero.comm.world)
        for part, gradient in zip(self.views(flat), gradients):
            if local and self.filled:
                part.add_(gradient) if gradient is not None else None
            else:
                part.copy_(gradient) if gradient is not None else part.zero_()
        if local:
            self.filled = True
            return
        flat[sum(slot.numel for slot in self.slots[:self.trainable]):].zero_()  # frozen parameters and padding
        self.zero.start_reduce(self, flat)

    def publish(self) -> None:
        """After an update: the weights that compute take the new values of the masters."""
        self.zero.wait(self.pending[1]) if self.pending else None
        self.pending = self.held = None  # gathered before the update
        if self.zero.stage == 3:
            if self.copy is not None:
                self.copy.copy_(self.compute_shard())
        elif self.zero.stage > 0:
            self.zero.comm.all_gather(self.full, self.compute_shard())
        elif self.full.data_ptr() != self.master.data_ptr():
            self.full.copy_(self.compute_shard())

    # ---- gradients

    def finish_gradients(self) -> None:
        """After the last micro-batch: stages 0-1 communicate only now, however many micro-batches there were."""
        if not self.filled:
            self.grad.zero_()  # nobody used this unit
        if self.zero.stage == 0:
            self.zero.comm.all_reduce(self.grad)
        if self.zero.stage < 2:
            self.add_to_shard(self.zero.exchange(self.grad)[0] if self.zero.stage == 1 else self.grad[None])
        self.filled = False

    def add_to_shard(self, chunks: torch.Tensor) -> None:
        """shard gradient (+)= the sum of chunks (N, S), one per rank, in rank order and in the wide dtype."""
        total, target = chunks[0].to(self.zero.wide), self.shard_grad
        for chunk in chunks[1:]:
            total += chunk
        accumulate = self.filled and self.zero.stage >= 2
        if self.offloaded and accumulate:
            arrived = self.zero.empty(total.numel(), total.dtype, host=True)
            self.zero.host.take(arrived, total)
            self.zero.host.wait()
            target.add_(arrived)
        elif self.offloaded:
            self.zero.host.take(target, total)
        elif accumulate:
            target.add_(total)
        elif target.data_ptr() != total.data_ptr():
            target.copy_(total)
        self.filled = True

    # ---- forward

    def vectors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of this unit; each begins at element self.low of the unit's flat vector."""
        if not self.trainable:
            return {"master": self.master}
        return {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def plug(self, weights) -> None:
        for slot, weight in zip(self.slots, weights):
            for module, key in slot.places:
                module.__dict__[key] = weight  # an ordinary attribute, in place of the deleted Parameter

    def unplug(self) -> None:
        for slot in self.slots:
            for module, key in slot.places:
                module.__dict__.pop(key, None)

    def forward(self, *args, **kwargs):
        """What calling the module runs from now on."""
        if self.zero.is_gathered:
            return self.original(*args, **kwargs)
        if not torch.is_grad_enabled():
            return self.run(*args, **kwargs)
        # Of nested saved_tensors_hooks only the innermost pair acts: ours must stand outside of checkpoint, or it would
        # drop nothing. Checkpoint itself drops the weights, and recomputing `run` fetches them again.
        with self.hooks():
            if self.zero.activation_checkpointing and self.is_block:
                return checkpoint(self.run, *args, use_reentrant=False, **kwargs)
            return self.run(*args, **kwargs)

    def run(self, *args, **kwargs):
        train = self.trainable and torch.is_grad_enabled()
        weights = Use.apply(self, self.zero.trigger) if train else self.views(self.fetch())
        if self.zero.stage == 3 and self is not self.zero.root:  # the root is in use until backward ends: kept as it is
            self.recipe_for = weights[0].untyped_storage().data_ptr()
        self.plug(weights)
        try:
            return self.fwd(*args, **kwargs)
        finally:
            self.unplug()
            self.recipe_for = None

    def hooks(self):
        """What autograd keeps for backward: of gathered weights a recipe (where to look after gathering again), of large
        activations, if they are offloaded, a copy in host memory."""
        if self.zero.stage < 3 and not self.zero.offloads("acts"):
            return contextlib.nullcontext()

        def pack(x):
            storage = x.untyped_storage()
            if storage.data_ptr() == self.recipe_for:
                return None, x.size(), x.stride(), x.storage_offset()
            if self.zero.offloads("acts") and storage.nbytes() >= PARK_BYTES and not self.zero.is_weight(storage):
                return self.zero.park(x), x.size(), x.stride(), x.storage_offset()
            return x

        def unpack(kept):
            if isinstance(kept, torch.Tensor):
                return kept
            parked, *geometry = kept
            return (parked.restore() if parked else self.refetch()).as_strided(*geometry)

        return saved_tensors_hooks(pack, unpack)

    def refetch(self) -> torch.Tensor:
        """The weights again, in backward; kept until reduce, or for a frozen unit until the next one's turn."""
        if self.held is None:
            for unit in self.zero.units:
                unit.held = unit.held if unit.trainable else None
            self.held = self.fetch()
        return self.held


# ---- the whole model ----------------------------------------------------------------------------------------------

def check_options(stage: int, offload: tuple[str, ...], frozen: bool) -> None:
    if stage not in (0, 1, 2, 3):
        raise UserError(f"--zero {stage}: expected 0, 1, 2 or 3")
    for kind in offload:
        if kind not in OFFLOADS:
            raise UserError(f"--offload {kind}: expected a comma list of {', '.join(OFFLOADS)}")
    if "params" in offload and stage != 3:
        raise UserError(f"--offload params needs --zero 3, found --zero {stage}: other stages hold all weights on the device")
    if not frozen and "optim" not in offload and ("params" in offload or "disk" in offload):
        raise UserError("--offload params and disk need optim too: the optimizer works where its masters are")


class Zero:
    """Shards a model, owns its optimizer (AdamW), and takes the place of loss.backward() and optimizer.step().

    units: modules that are fetched one at a time (blocks; untied embedding and head). A parameter that is not inside
        exactly one of them belongs to the root unit, fetched for the whole forward and backward.
    dtype: of weights and activations; masters, gradients and moments are float32 (float64 if dtype is).
    offload: "optim" masters, moments and gradient shards in host memory, updated there; "params" (stage 3) weight shards
        too; "acts" large activations; "disk" the moments in a file instead of memory.
    frozen: no gradients, no optimizer (a reference or reward model); sharded at stage 3 only.
    activation_checkpointing, compile: of every unit that is a member of a ModuleList, i.e. of the blocks.
    overlap: gather one unit ahead, and let one reduce run beside the computation. The same numbers, more memory.
    init(module, prefix): for a model built under torch.device("meta") because no rank may hold it whole: fills one unit's
        parameters, in place, with numbers that depend on nothing but their full names (prefix + "." + name).
    Afterwards the model's Parameters are gone: model(...) works as before, model.parameters() is empty.
    """

    def __init__(self, model: nn.Module, *, units: list[nn.Module], stage: int = 0, dtype: torch.dtype = torch.float32,
                 offload: tuple[str, ...] = (), lr: float = 1e-3, weight_decay: float = 0.0,
                 betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, frozen: bool = False,
                 activation_checkpointing: bool = False, compile: bool = False, overlap: bool = False,
                 init: Callable[[nn.Module, str], None] | None = None, device: torch.device | str | None = None):
        check_options(stage, offload, frozen)
        self.model, self.stage, self.dtype, self.frozen, self.offload = model, stage, dtype, frozen, tuple(offload)
        self.activation_checkpointing, self.compile, self.overlap = activation_checkpointing, compile, overlap
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.comm, self.device = Comm(), torch.device(device or next(model.parameters()).device)
        self.host = Host(self.device, self.comm)
        self.trigger = torch.zeros((), requires_grad=True)  # makes Use a node of the graph
        self.is_gathered = self.in_backward = False
        self.loss_scale = 2.0**16 if dtype == torch.float16 else 1.0
        self.updates = self.good_steps = self.skipped = 0  # all in all; since the scale changed; skipped in a row
        self.alive, self.peak = [], {}  # temporaries (kind, storage, bytes), and the most bytes alive at once by kind
        self.parked = weakref.WeakValueDictionary()
        self.order, self.reducing = [], None
        self.units = self._cut(units, init)
        self.root = next((unit for unit in self.units if unit.module is model), None)
        self.trained = [unit for unit in self.units if unit.trainable]
        self.optimizer = self._optimizer(lr, betas, eps, weight_decay) if self.trained else None

    # ---- building

    def offloads(self, what: str) -> bool:
        return what in self.offload

    def empty(self, numel: int, dtype: torch.dtype, host: bool = False) -> torch.Tensor:
        return self.host.empty(numel, dtype) if host else torch.empty(numel, dtype=dtype, device=self.device)

    def moment(self, numel: int) -> torch.Tensor:
        if self.offloads("disk"):
            return on_disk(numel, self.wide)
        return self.empty(numel, self.wide, host=self.offloads("optim")).zero_()

    def _cut(self, modules: list[nn.Module], init) -> list[Unit]:
        """Give every parameter to one unit, then turn the units into flat vectors one after the other, the root last."""
        found: dict[nn.Parameter, tuple[list, list]] = {}  # parameter -> (full names, places)
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            for key, p in module._parameters.items():
                if p is not None:
                    names, places = found.setdefault(p, ([], []))
                    names.append(f"{prefix}.{key}" if prefix else key)
                    if (module, key) not in places:
                        places.append((module, key))
        names = {module: name for name, module in self.model.named_modules()}
        inside = [set(module.modules()) for module in modules]
        members = [[] for _ in (*modules, self.model)]
        for p, (_, places) in found.items():
            homes = [i for i, parts in enumerate(inside) if all(module in parts for module, _ in places)]
            members[homes[0] if len(homes) == 1 else -1].append(p)
        units = []
        for module, parameters in zip((*modules, self.model), members):
            if parameters:
                entries = [(p, *found.pop(p)) for p in parameters]
                parameters.clear()  # each unit's originals go when it is made: the model is never held twice
                units.append(self._unit(names[module] or "root", module, entries, init))
        for unit in units:
            unit.module.forward = unit.forward
        return units

    def _unit(self, name: str, module: nn.Module, entries: list, init) -> Unit:
        def kind(p) -> int:  # vectors (norms, biases) do not decay
            return 2 if self.frozen or not p.requires_grad else 0 if p.dim() >= 2 else 1

        entries.sort(key=lambda entry: kind(entry[0]))
        kinds = [kind(p) for p, _, _ in entries]
        if any(p.is_meta for p, _, _ in entries):
            for p, _, places in entries:
                fresh = nn.Parameter(torch.empty_like(p, device=self.device), requires_grad=p.requires_grad)
                for owner, key in places:
                    owner._parameters[key] = fresh
            init(module, "" if module is self.model else name)
        slots, values, start = [], [], 0
        for p, names, places in entries:
            slots.append(Slot(names, p.shape, start, p.numel(), places))
            start += p.numel()
            values.append([owner._parameters.pop(key) for owner, key in places][0])
        return Unit(self, name, module, slots, values, trainable=sum(k < 2 for k in kinds), decaying=kinds.count(0))

    def _optimizer(self, lr, betas, eps, weight_decay) -> torch.optim.AdamW:
        """AdamW (Loshchilov & Hutter 2019) is elementwise: it neither knows nor cares that its tensors are flat shards."""
        groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
        state = {}
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

    # ---- what units ask for

    def temporary(self, kind: str, numel: int) -> torch.Tensor:
        """An uninitialised vector in the compute dtype, watched for as long as anything refers to its storage."""
        x = torch.empty(numel, dtype=self.dtype, device=self.device)
        self.alive = [entry for entry in self.alive if not entry[1].expired()]
        self.alive.append((kind, StorageWeakRef(x.untyped_storage()), x.nbytes, x.data_ptr()))
        now = sum(n_bytes for k, _, n_bytes, _ in self.alive if k == kind)
        self.peak[kind] = max(self.peak.get(kind, 0), now)
        return x

    def is_weight(self, storage: torch.UntypedStorage) -> bool:
        """Weights and buffers live on in the device anyway; a copy of them in the host would save nothing."""
        pointer = storage.data_ptr()
        return any(unit.full is not None and unit.full.data_ptr() == pointer for unit in self.units) \
            or any(kind == "gathered" and p == pointer and not ref.expired() for kind, ref, _, p in self.alive) \
            or any(buffer.untyped_storage().data_ptr() == pointer for buffer in self.model.buffers())

    def park(self, x: torch.Tensor) -> Parked:
        """x's storage in host memory; several views of one storage share the copy."""
        key = (x.untyped_storage().data_ptr(), x._version, x.dtype)
        parked = self.parked.get(key)
        if parked is None or parked.original.expired():  # expired: another storage has come to lie at that address
            parked = self.parked[key] = Parked(self.host, x)
        return parked

    def wait(self, work) -> None:
        if work is not None:
            with naming_lost_ranks("collective"):
                work.wait()

    def prefetch_after(self, unit: Unit) -> None:
        """Start gathering the unit that will be fetched next: the order is that of the first forward, then its reverse."""
        if not self.overlap:
            return
        if unit not in self.order:
            self.order.append(unit)
        unit.gathers_in_backward |= self.in_backward
        i = self.order.index(unit) + (-1 if self.in_backward else 1)
        if 0 <= i < len(self.order) and self.order[i].pending is self.order[i].held is None:
            if self.order[i].gathers_in_backward or not self.in_backward:
                self.order[i].pending = self.order[i].start_gather(later=True)

    def exchange(self, flat: torch.Tensor, later: bool = False):
        """(chunks (N, S) to be summed in rank order, handle)."""
        if self.comm.world == 1:
            return flat[None], None
        received = torch.empty_like(flat).view(self.comm.world, -1)
        return received, self.comm.exchange(received, flat, later)

    def start_reduce(self, unit: Unit, flat: torch.Tensor) -> None:
        received, work = self.exchange(flat, later=self.overlap)
        self.finish_reduce()
        self.reducing = unit, flat, received, work
        if not self.overlap:
            self.finish_reduce()

    def finish_reduce(self) -> None:
        if self.reducing:
            unit, _, received, work = self.reducing
            self.reducing = None
            self.wait(work)
            unit.add_to_shard(received)

    # ---- training

    def backward(self, loss: torch.Tensor) -> None:
        """loss: already divided by the global count; gradients of all ranks and micro-batches are summed."""
        if self.is_gathered or self.frozen:
            raise RuntimeError("backward of a frozen model, or inside gathered()")
        self.in_backward = True
        try:
            (loss * self.loss_scale if self.loss_scale != 1.0 else loss).backward()
        finally:
            self.in_backward = False
            for unit in self.units:
                unit.held = None
        self.finish_reduce()

    @torch.no_grad()
    def step(self, lr: float, clip: float | None = None) -> StepInfo:
        """Reduce, clip to the global norm `clip` (None or 0: off), AdamW with learning rate `lr`, publish.

        A gradient that is not finite on any rank makes all ranks skip the update; the 20th in a row is a UserError.
        """
        if self.is_gathered or self.frozen:
            raise RuntimeError("step of a frozen model, or inside gathered()")
        for unit in reversed(self.trained):
            unit.finish_gradients()
        self.host.wait()
        squares = torch.stack([sum_of_squares(unit.shard_grad) for unit in self.trained]).to(self.device)  # (units,)
        if self.stage > 0:  # one all-reduce is norm, overflow vote and NaN guard: an inf anywhere is an inf everywhere
            self.comm.all_reduce(squares)
        scale, norm = self.loss_scale, squares.sum().sqrt().item() / self.loss_scale
        if not math.isfinite(norm):
            self.skipped, self.good_steps = self.skipped + 1, 0
            if self.dtype == torch.float16:
                self.loss_scale = max(1.0, self.loss_scale / 2)
            if self.skipped == 20:
                bad = next(unit.name for unit, square in zip(self.trained, squares.tolist()) if not math.isfinite(square))
                raise UserError(f"20 steps in a row had a gradient that is not finite, first in {bad}; lower --lr, "
                                "or use --dtype bfloat16 or float32")
            return StepInfo(norm, True, scale)
        # The fused kernel divides by grad_scale as it reads the gradient (it is GradScaler's way in): no extra pass.
        divisor = scale * max(1.0, (norm + 1e-6) / clip if clip else 1.0)
        home = self.trained[0].master.device
        self.optimizer.grad_scale = torch.tensor(divisor, device=home) if divisor != 1.0 else None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for unit in self.trained:
            unit.publish()
        self.skipped, self.updates, self.good_steps = 0, self.updates + 1, self.good_steps + 1
        if self.dtype == torch.float16 and self.good_steps == 2000:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0  # only now: this step was made with the old scale
        return StepInfo(norm, False, scale)

    @contextlib.contextmanager
    def gathered(self):
        """Whole weights in every module, without gradients: no collective inside, so ranks may stop at different lengths."""
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

    # ---- what it costs

    def bytes_held(self) -> dict[str, int]:
        """Bytes of model states this rank holds by kind, each storage counted once."""
        kinds = {"weights": [t for u in self.units for t in (u.full, u.copy)],
                 "gradients": [t for u in self.trained for t in (u.grad, u.shard_grad)],
                 "masters": [u.master for u in self.units],
                 "moments": [t for u in self.trained for t in (u.exp_avg, u.exp_avg_sq)]}
        seen, held = set(), {}
        for kind, tensors in kinds.items():
            held[kind] = 0
            for storage in (t.untyped_storage() for t in tensors if t is not None):
                held[kind] += storage.nbytes() if storage.data_ptr() not in seen else 0
                seen.add(storage.data_ptr())
        return held

    def bytes_by_formula(self) -> dict[str, int]:
        """The table at the head of this file, with the padding of each unit."""
        N, p, w = self.comm.world, self.dtype.itemsize, self.wide.itemsize
        held = dict.fromkeys(("weights", "gradients", "masters", "moments"), 0)
        for unit in self.units:
            whole, part = unit.S * N, unit.S if self.stage else unit.S * N
            truth = w if unit.trainable else p
            held["weights"] += whole * p if self.stage < 3 else part * p if unit.copy is not None else 0
            held["masters"] += part * truth if self.stage == 3 or unit.offloaded or truth != p else 0
            if unit.trainable:
                held["gradients"] += w * (whole if self.stage < 2 else part)
                held["gradients"] += w * part if unit.offloaded and self.stage < 2 else 0
                held["moments"] += 2 * w * unit.end
        return held

    def sent_by_formula(self, micro_batches: int = 1) -> dict[str, int]:
        """Bytes this rank sends per step, by collective."""
        N, p, w, k = self.comm.world, self.dtype.itemsize, self.wide.itemsize, micro_batches
        shards = sum(unit.S for unit in self.trained)
        # The root is gathered once for forward and backward; reading an embedding needs no weights in backward.
        once = [unit for unit in self.units if unit is self.root or isinstance(unit.module, nn.Embedding)]
        gathers = 2 * sum(unit.S for unit in self.units) - sum(unit.S for unit in once)
        norm = 2 * (N - 1) * 8 * len(self.trained) // N
        sent = {"all_reduce": 2 * (N - 1) * shards * w if self.stage == 0 else norm,
                "all_gather": (0, shards * p, shards * p, k * gathers * p)[self.stage] * (N - 1),
                "reduce_scatter": (0, shards * w, k * shards * p, k * shards * p)[self.stage] * (N - 1)}
        return {kind: n_bytes for kind, n_bytes in sent.items() if n_bytes}

    def report(self) -> str:
        """Several lines: bytes per rank by kind, by formula and as counted now; bytes sent; temporary peaks."""
        mib = 2.0**20
        held, formula = self.bytes_held(), self.bytes_by_formula()
        lines = [f"ZeRO stage {self.stage}, rank {self.comm.rank} of {self.comm.world}, {str(self.dtype).split('.')[1]}"
                 + (f", offload {','.join(self.offload)}" if self.offload else "")
                 + f": {sum(unit.numel for unit in self.units):,} parameters in {len(self.units)} units"]
        lines += ["held:  " + ", ".join(f"{kind} {held[kind] / mib:.1f}" for kind in held)
                  + f" = {sum(held.values()) / mib:.1f} MiB; formula {sum(formula.values()) / mib:.1f} MiB"]
        if not self.frozen:
            sent = self.sent_by_formula()
            lines += [f"sent per step of one micro-batch: {sum(sent.values()) / mib:.1f} MiB ("
                      + ", ".join(f"{kind} {n_bytes / mib:.1f}" for kind, n_bytes in sent.items()) + ")"]
        if self.comm.sent:
            lines += ["sent so far: " + ", ".join(f"{kind} {n / mib:.1f}" for kind, n in self.comm.sent.items()) + " MiB"]
        if self.peak:
            lines += ["temporary peak: " + ", ".join(f"{kind} {n / mib:.1f}" for kind, n in self.peak.items()) + " MiB"]
        if self.device.type == "cuda":
            slack = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            lines += [f"allocator: peak {torch.cuda.max_memory_allocated(self.device) / mib:.1f}, slack {slack / mib:.1f} MiB"]
        return "\n".join(lines)


def sum_of_squares(x: torch.Tensor, chunk: int = 1 << 20) -> torch.Tensor:
    """In float64, through a buffer that fits the cache: x.double() whole would double the gradient's memory."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    buffer = torch.empty(min(chunk, x.numel()), dtype=torch.float64, device=x.device)
    for part in x.split(chunk):
        wide = buffer[:part.numel()].copy_(part)
        total += torch.dot(wide, wide)
    return total
