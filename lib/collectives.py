"""What zero.py stands on and what is not ZeRO itself. Read zero.py first.

    group_parameters(), take_out(), Slot    a module's parameters as one flat vector
    Comm      the three collectives over torch.distributed, counted
    Memory    device, host or disk: where tensors live, temporaries being watched, activations parked in host memory
    report(), counted()   bytes per rank: before training, counted and by formula; what came to be
"""
from __future__ import annotations

import collections
import os
import tempfile
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.multiprocessing.reductions import StorageWeakRef

from lib.program import UserError
from lib.ranks import naming_lost_ranks

PARK_BYTES = 1 << 20  # smaller activations are not worth a copy to the host
ALIGN = 16  # elements: vector kernels round a ragged end differently, so results of unaligned shards would depend on N


def check_options(stage: int, offload: tuple[str, ...], frozen: bool) -> None:
    if stage not in (0, 1, 2, 3):
        raise UserError(f"--zero {stage}: expected 0, 1, 2 or 3")
    for kind in offload:
        if kind not in ("optim", "params", "acts", "disk"):
            raise UserError(f"--offload {kind}: expected a comma list of optim, params, acts, disk")
    if "params" in offload and stage != 3:
        raise UserError(f"--offload params needs --zero 3, found {stage}: other stages hold all weights on the device")
    if not frozen and "optim" not in offload and ("params" in offload or "disk" in offload):
        raise UserError("--offload params and disk need optim too: the optimizer works where its masters are")


# ---- flat vectors ---------------------------------------------------------------------------------------------------

class Slot(NamedTuple):
    """Where one parameter lies in its unit's flat vector, and where it is plugged in (several places if tied)."""
    start: int
    numel: int
    shape: torch.Size
    places: list[tuple[str, nn.Module, str]]  # full name, module, attribute


def aligned(numel: int) -> int:
    return -(-numel // ALIGN) * ALIGN


def group_parameters(model: nn.Module, units: list[nn.Module]) -> list[tuple[str, nn.Module, list]]:
    """(name, module, [places of each parameter]) per unit, last the model itself with what is not inside exactly one
    unit."""
    found: dict[nn.Parameter, list] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, p in module._parameters.items():
            if p is not None:
                found.setdefault(p, []).append((f"{prefix}.{key}".lstrip("."), module, key))
    modules = [*units, model]
    inside, members = [set(unit.modules()) for unit in units], [[] for _ in modules]
    for places in found.values():
        homes = [i for i, parts in enumerate(inside) if all(module in parts for _, module, _ in places)]
        members[homes[0] if len(homes) == 1 else -1].append(places)
    names = {module: name for name, module in model.named_modules()}
    return [(names[module], module, members) for module, members in zip(modules, members) if members]


def materialise(parameters: list, device: torch.device) -> None:
    """Uninitialised memory for parameters that were born on the meta device."""
    for places in parameters:
        _, module, key = places[0]
        p = module._parameters[key]
        fresh = nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad)
        for _, module, key in places:
            module._parameters[key] = fresh


def take_out(parameters: list, frozen: bool) -> tuple[list[Slot], list[torch.Tensor], int, int]:
    """Delete the parameters from their modules. Returns slots, values, how many are trainable, how many of those decay.

    Order: with weight decay (matrices), without (norms, biases), frozen; so each is one range of the flat vector.
    """
    def kind(p) -> int:
        return 2 if frozen or not p.requires_grad else 0 if p.dim() >= 2 else 1

    taken = [(module._parameters[key], places) for places in parameters for _, module, key in places[:1]]
    taken.sort(key=lambda entry: kind(entry[0]))
    slots, start = [], 0
    for p, places in taken:
        slots.append(Slot(start, p.numel(), p.shape, places))
        start = aligned(start + p.numel())
        for _, module, key in places:
            module._parameters.pop(key, None)
    kinds = [kind(p) for p, _ in taken]
    return slots, [p.detach() for p, _ in taken], sum(k < 2 for k in kinds), kinds.count(0)


def plug(slots: list[Slot], weights: list[torch.Tensor] | None) -> None:
    """Ordinary attributes in place of the deleted Parameters; weights None: take them out again."""
    for i, slot in enumerate(slots):
        for _, module, key in slot.places:
            if weights is None:
                module.__dict__.pop(key, None)
            else:
                module.__dict__[key] = weights[i]


def sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """In float64, through a buffer: x.double() whole would be twice the gradient. On the CPU the buffer fits the cache;
    on a GPU small parts would cost more in launches than in sums."""
    chunk = 1 << (17 if x.device.type == "cpu" else 24)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    buffer = torch.empty(min(chunk, x.numel()), dtype=torch.float64, device=x.device)
    for part in x.split(chunk):
        wide = buffer[:part.numel()].copy_(part)
        total += torch.dot(wide, wide)
    return total


# ---- collectives ----------------------------------------------------------------------------------------------------

def rank_and_world() -> tuple[int, int]:
    inside = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if inside else (0, 1)


class Comm:
    """The collectives ZeRO needs; without a process group, a world of one. sent: bytes put on the wire per rank.

    overlap: one reduce_scatter at a time stays under way while the computation goes on.
    """

    def __init__(self, memory: Memory, overlap: bool = False):
        self.rank, self.world = rank_and_world()
        self.memory, self.overlap, self.under_way = memory, overlap, None
        self.sent = collections.Counter()

    def call(self, kind: str, n_bytes: int, collective: Callable, *args, later: bool = False):
        """Run one collective over N > 1 ranks and count it; later: do not wait, return a handle for wait()."""
        self.sent[kind] += n_bytes
        with naming_lost_ranks(kind):
            return collective(*args, async_op=later)

    def wait(self, handle) -> None:
        if handle is not None:
            with naming_lost_ranks("a collective under way"):
                handle.wait()

    def broadcast(self, x: torch.Tensor) -> None:
        """x <- rank 0's x, when the model is built. The others receive it once: (N-1)/N of x per rank on average."""
        if self.world > 1:
            self.call("broadcast", (self.world - 1) * x.nbytes // self.world, dist.broadcast, x, 0)

    def all_reduce(self, x: torch.Tensor) -> None:
        """Sum over ranks, in place. A ring sends 2 (N-1)/N of the tensor."""
        if self.world > 1:
            self.call("all_reduce", 2 * (self.world - 1) * x.nbytes // self.world, dist.all_reduce, x)

    def all_gather(self, whole: torch.Tensor, shard: torch.Tensor, later: bool = False):
        """whole (N S,) <- the shards (S,) of all ranks. Sends (N-1)/N of the whole."""
        if self.world > 1:
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
            return self.call("all_gather", (self.world - 1) * shard.nbytes, gather, whole, shard, later=later)
        if whole.data_ptr() != shard.data_ptr():
            whole.copy_(shard)

    def reduce_scatter(self, x: torch.Tensor, deliver: Callable[[torch.Tensor], None]) -> None:
        """x (N S,) of every rank -> deliver(chunks (N, S)): what each rank holds of MY shard, to be summed in rank
        order.

        gloo's own reduce-scatter all-reduces a clone, twice the bytes (PyTorch #118911). This sends (N-1)/N of x, gives
        the same sum whatever the timing, and lets the receiver add 16-bit gradients in float32.
        """
        received, handle = x, None
        if self.world > 1:
            received = self.memory.temporary("reduced", x.numel(), x.dtype)
            handle = self.call("reduce_scatter", (self.world - 1) * x.nbytes // self.world, dist.all_to_all_single,
                               received, x, later=self.overlap)
        self.finish()
        self.under_way = handle, deliver, received.view(self.world, -1), x
        if not self.overlap:
            self.finish()

    def finish(self) -> None:
        """Wait for the reduce_scatter under way, if any, and deliver it."""
        if self.under_way:
            (handle, deliver, chunks, _), self.under_way = self.under_way, None
            self.wait(handle)
            deliver(chunks)


# ---- memory ---------------------------------------------------------------------------------------------------------

class Memory:
    """Allocates on the device, in host memory, or in a file. With CUDA, host memory is pinned and copies to it run on a
    stream of their own; on CPU the same calls are plain copies, so that the tests walk the same path."""

    def __init__(self, device: torch.device, offload: tuple[str, ...]):
        self.device, self.offload = device, offload
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.leaving = collections.deque()  # (tensor, event) of copies to the host that may not have ended
        self.moved = collections.Counter()  # bytes to_host, from_host
        self.alive: list[tuple[str, StorageWeakRef, int, int]] = []  # temporaries: kind, storage, bytes, address
        self.peak: dict[str, int] = {}  # most bytes of temporaries alive at once, by kind
        self.resident: set[int] = set()  # addresses of weights and buffers that stay on the device
        self.parked = weakref.WeakValueDictionary()

    def empty(self, numel: int, dtype: torch.dtype, host: bool = False) -> torch.Tensor:
        if host:
            return torch.empty(numel, dtype=dtype, pin_memory=self.side is not None)
        return torch.empty(numel, dtype=dtype, device=self.device)

    def on_disk(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros in a file of the temporary folder (TMPDIR: on a fast disk). It has no name, so it dies with us."""
        handle, path = tempfile.mkstemp(prefix="zero-")
        try:
            if hasattr(os, "posix_fallocate"):  # else the file has holes, and writing into one on a full disk kills us
                os.posix_fallocate(handle, 0, max(1, numel) * dtype.itemsize)
            return torch.from_file(path, shared=True, size=max(1, numel), dtype=dtype)[:numel]
        except OSError as error:
            raise UserError(f"{path}: {numel * dtype.itemsize >> 20} MiB for --offload disk: {error.strerror}; free "
                            "space, or set TMPDIR to a larger disk") from None
        finally:
            os.close(handle)
            os.unlink(path)

    def temporary(self, kind: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised vector on the device, watched for as long as anything refers to its storage."""
        x = self.empty(numel, dtype)
        self.alive = [entry for entry in self.alive if not entry[1].expired()]
        self.alive.append((kind, StorageWeakRef(x.untyped_storage()), x.nbytes, x.data_ptr()))
        self.peak[kind] = max(self.peak.get(kind, 0), sum(n_bytes for k, _, n_bytes, _ in self.alive if k == kind))
        return x

    def moment(self, numel: int, dtype: torch.dtype, host: bool) -> torch.Tensor:
        """Zeros for one of Adam's moments."""
        if "disk" in self.offload:
            return self.on_disk(numel, dtype)
        return self.empty(numel, dtype, host).zero_()

    def to_host(self, target: torch.Tensor, x: torch.Tensor, add: bool = False) -> None:
        """target (host) <- x (device), which is ours to change, or target + x; wait() before reading it."""
        if add:  # on the device: an addition on the host would have to wait until the device has got as far as x
            if self.side is not None:
                torch.cuda.current_stream(self.device).wait_stream(self.side)  # the copy that wrote target
            x += self.to_device(target, x.dtype)
        self.moved["to_host"] += x.nbytes
        if self.side is None:
            target.copy_(x)
            return
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            target.copy_(x, non_blocking=True)
            self.leaving.append((x, self.side.record_event()))
        if len(self.leaving) > 2:  # x must stay until it is read, and the host must not queue more and more of them
            self.leaving.popleft()[1].synchronize()

    def to_device(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x (host) on the device; cast before the trip, which is the narrow part."""
        if x.dtype != dtype:
            x = self.empty(x.numel(), dtype, host=True).copy_(x)
        self.moved["from_host"] += x.nbytes
        return x.to(self.device, non_blocking=True, copy=True)

    def wait(self) -> None:
        if self.side is not None:
            torch.cuda.synchronize(self.device)
        self.leaving.clear()

    def park(self, x: torch.Tensor):
        """What autograd keeps in place of x: with offload "acts", a host copy of its storage, one for all its views.

        Never of weights or buffers: they stay on the device anyway. Detached, since x may be the output of the very
        node that keeps it: such a circle runs through C++, where no garbage collector finds it. On a GPU the copy runs
        beside the computation, so x must not be overwritten in place: plain PyTorch would raise, here nobody notices.
        """
        storage = x.untyped_storage()
        if "acts" not in self.offload or storage.nbytes() < PARK_BYTES or storage.data_ptr() in self.resident:
            return x.detach()
        if any(kind == "gathered" and address == storage.data_ptr() and not ref.expired()
               for kind, ref, _, address in self.alive):
            return x.detach()
        key = (storage.data_ptr(), x._version, x.dtype)
        parked = self.parked.get(key)
        if parked is None or parked.original.expired():  # expired: another storage has come to lie at that address
            parked = self.parked[key] = Parked(self, x)
        return parked, x.size(), x.stride(), x.storage_offset()


class Parked:
    """The storage of an activation, in host memory until backward asks for it."""

    def __init__(self, memory: Memory, x: torch.Tensor):
        flat = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
        self.memory, self.original, self.restored = memory, StorageWeakRef(x.untyped_storage()), None
        self.copy = memory.empty(flat.numel(), flat.dtype, host=True)
        memory.to_host(self.copy, flat)

    def fetch(self) -> torch.Tensor:
        if self.restored is None:  # kept for the storage's other views, which backward asks for next
            if self.memory.side is not None:
                torch.cuda.current_stream(self.memory.device).wait_stream(self.memory.side)
            self.restored = self.memory.to_device(self.copy, self.copy.dtype)
        return self.restored


# ---- formulas -------------------------------------------------------------------------------------------------------

def held(z) -> dict[str, int]:
    """Bytes of model states that this rank of a Zero holds, by kind, each storage counted once."""
    kinds = {"weights": [unit.resident for unit in z.units],
             "gradients": [t for unit in z.trained for t in (unit.grad, unit.shard_grad)],
             "masters": [unit.master for unit in z.units],
             "moments": [t for unit in z.trained for t in (unit.exp_avg, unit.exp_avg_sq)]}
    seen, total = set(), dict.fromkeys(kinds, 0)
    for kind, tensors in kinds.items():
        for storage in (t.untyped_storage() for t in tensors if t is not None):
            total[kind] += 0 if storage.data_ptr() in seen else storage.nbytes()
            seen.add(storage.data_ptr())
    return total


def held_by_formula(z) -> dict[str, int]:
    """The table at the head of zero.py, with the padding of each unit."""
    N, p, w = z.comm.world, z.dtype.itemsize, z.wide.itemsize
    total = dict.fromkeys(("weights", "gradients", "masters", "moments"), 0)
    for unit in z.units:
        whole, part = unit.shard_size * N, unit.shard_size if z.stage else unit.shard_size * N
        truth = w if unit.trainable else p
        total["weights"] += p * (whole if z.stage < 3 else part) if unit.resident is not None else 0
        total["masters"] += part * truth if z.stage == 3 or unit.offloaded or truth != p else 0
        if unit.trainable:
            total["gradients"] += w * (whole if z.stage < 2 else part)
            total["gradients"] += w * part if unit.offloaded and z.stage < 2 else 0
            total["moments"] += 2 * w * unit.end
    return total


def sent_by_formula(z, micro_batches: int = 1) -> dict[str, int]:
    """Bytes that this rank sends per step, by collective: the other half of the table."""
    N, p, w, k = z.comm.world, z.dtype.itemsize, z.wide.itemsize, micro_batches
    trained = sum(unit.shard_size for unit in z.trained)
    # The root is gathered once for forward and backward; reading an embedding needs no weights in backward.
    gathers = sum(unit.shard_size * (1 if unit is z.root or isinstance(unit.module, nn.Embedding) else 2) for unit in z.units)
    norm = 2 * (N - 1) * 8 * len(z.trained) // N
    sent = {"all_reduce": 2 * (N - 1) * trained * w if z.stage == 0 else norm,
            "all_gather": (0, trained * p, trained * p, k * gathers * p)[z.stage] * (N - 1),
            "reduce_scatter": (0, trained * w, k * trained * p, k * trained * p)[z.stage] * (N - 1)}
    return {kind: n_bytes for kind, n_bytes in sent.items() if n_bytes}


def mib(table: dict[str, int]) -> str:
    return f"{sum(table.values()) / 2**20:.1f} MiB (" \
        + ", ".join(f"{kind} {n_bytes / 2**20:.1f}" for kind, n_bytes in table.items()) + ")"


def report(z) -> str:
    """A few lines: bytes held by this rank, as counted and by formula; bytes to send."""
    lines = [f"ZeRO stage {z.stage}, rank {z.comm.rank} of {z.comm.world}, {str(z.dtype).removeprefix('torch.')}: "
             f"{sum(unit.numel for unit in z.units):,} parameters in {len(z.units)} units"
             + (f", offload {','.join(z.memory.offload)}" if z.memory.offload else ""),
             f"model states held: {mib(held(z))}; by formula {sum(held_by_formula(z).values()) / 2**20:.1f} MiB"]
    if z.trained and z.comm.world > 1:
        lines.append(f"to send per step of one micro-batch: {mib(sent_by_formula(z))}")
    return "\n".join(lines)


def counted(z) -> str:
    """One line: bytes that this rank has sent and moved to and from the host, peaks of temporaries and allocator."""
    tables = {"sent": z.comm.sent, "moved": z.memory.moved, "temporaries' peak": z.memory.peak}
    parts = [f"{name} {mib(table)}" for name, table in tables.items() if table]
    if z.device.type == "cuda":
        used, reserved = torch.cuda.memory_allocated(z.device), torch.cuda.memory_reserved(z.device)
        peak = torch.cuda.max_memory_allocated(z.device)
        parts.append("allocator " + mib({"in use": used, "slack": reserved - used}) + f", peak {peak / 2**20:.1f} MiB")
    return f"ZeRO, rank {z.comm.rank}: {'; '.join(parts) or 'nothing sent or gathered'}"
