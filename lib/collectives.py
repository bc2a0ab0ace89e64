"""What zero.py stands on and what is not ZeRO itself. Read zero.py first.

    Slot, group_parameters(), take_out()    a module's parameters as one flat vector
    Comm      the collectives, over torch.distributed
    Memory    tensors on the device or in host memory; activations parked in host memory
"""
import collections
import functools
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.multiprocessing.reductions import StorageWeakRef

PARK_BYTES = 1 << 20  # smaller activations are not worth a copy to the host
# Parameters and shards begin at its multiples. Otherwise the last bits would depend on N, because vector
# instructions treat the ragged end of a vector differently.
ALIGN = 16


class Slot(NamedTuple):
    """Where one parameter lies in its unit's flat vector, and where it is used (several places if tied)."""
    start: int
    shape: torch.Size
    places: list[tuple[str, nn.Module, str]]  # full name, module, attribute


def aligned(numel: int) -> int:
    return -(-numel // ALIGN) * ALIGN


def group_parameters(model: nn.Module, units: list[nn.Module], frozen: bool) -> list[tuple]:
    """Share out the parameters: [(name, module, whether they train, [places of each])] per unit that has any.
    A parameter that is not inside exactly one unit belongs to the model itself, the last entry. A module of
    which a part is frozen gives two entries, since only the other part has gradients and an optimizer."""
    found: dict[nn.Parameter, list] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        path, _, key = name.rpartition(".")
        found.setdefault(p, []).append((name, model.get_submodule(path), key))
    inside, members = [set(unit.modules()) for unit in units], [[] for _ in [*units, model]]
    for places in found.values():
        homes = [i for i, parts in enumerate(inside) if all(module in parts for _, module, _ in places)]
        members[homes[0] if len(homes) == 1 else -1].append(places)
    names = {module: name for name, module in model.named_modules()}
    parts = [(names[module], module, train, [places for places in some if train == (
                  not frozen and getattr(*places[0][1:]).requires_grad)])
             for module, some in zip([*units, model], members) for train in (True, False)]
    return [part for part in parts if part[-1]]


def materialise(parameters: list, device: torch.device) -> None:
    """Give parameters that were born on the meta device memory, not yet initialised."""
    for places in parameters:
        p = getattr(*places[0][1:])
        fresh = nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad)
        for _, module, key in places:
            setattr(module, key, fresh)


def take_out(parameters: list) -> tuple[list[Slot], list[torch.Tensor], int]:
    """Delete the parameters from their modules. Returns (slots, values, how many have weight decay): the
    matrices, which come first; then norms and biases."""
    taken = [(getattr(*places[0][1:]), places) for places in parameters]
    taken.sort(key=lambda entry: entry[0].dim() < 2)
    slots, start = [], 0
    for p, places in taken:
        slots.append(Slot(start, p.shape, places))
        start = aligned(start + p.numel())
        for _, module, key in places:
            module._parameters.pop(key, None)
    return slots, [p.detach() for p, _ in taken], sum(p.dim() >= 2 for p, _ in taken)


class Comm:
    """The collectives that ZeRO needs, of all ranks. In a world of one none of them sends anything."""
    group = None  # all ranks
    def __init__(self):
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def all_reduce(self, x: torch.Tensor) -> None:
        """x <- the sum of x over ranks. A ring sends 2 (N-1)/N of x per rank."""
        if self.world > 1:
            dist.all_reduce(x, group=self.group)

    def all_gather(self, shard: torch.Tensor, whole: torch.Tensor | None = None) -> torch.Tensor:
        """whole (N shard_size,) <- the shards (shard_size,) of all ranks. Sends (N-1)/N of it."""
        whole = shard.new_empty(self.world * shard.numel()) if whole is None else whole
        if self.world > 1:
            dist.all_gather_single(whole, shard, group=self.group)
        elif whole.data_ptr() != shard.data_ptr():
            whole.copy_(shard)
        return whole

    def reduce_scatter(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x (N shard_size,) -> (shard_size,): this rank's part of the sum over ranks, in dtype. May use x.
        Every rank sends each other rank its part, (N-1)/N of x in all, and adds what it gets in rank order,
        16-bit numbers in float32. gloo's own reduce-scatter sends twice as much (PyTorch #118911)."""
        chunks = x.view(self.world, -1)  # (N, shard_size)
        if self.world > 1:
            chunks = torch.empty_like(chunks)
            dist.all_to_all_single(chunks, x.view(self.world, -1), group=self.group)
        total = chunks[0].to(dtype)  # (shard_size,)
        for chunk in chunks[1:]:
            total += chunk
        return total


class Memory:
    """Tensors on the device or in host memory. With CUDA, host memory is pinned, and copies to it run on a
    stream of their own, beside the computation. On a CPU the same calls are plain copies."""

    def __init__(self, device: torch.device):
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.leaving = collections.deque()  # (tensor, event) of copies to the host that may not have ended
        self.parked = weakref.WeakValueDictionary()

    def empty(self, numel: int, dtype: torch.dtype, host: bool = False) -> torch.Tensor:
        device, pinned = "cpu" if host else self.device, host and self.side is not None
        return torch.empty(numel, dtype=dtype, device=device, pin_memory=pinned)

    def put(self, target: torch.Tensor, x: torch.Tensor, add: bool = False) -> None:
        """target <- x, or target + x. If target is in host memory, wait() before reading it; x may change."""
        if target.device.type == self.device.type:
            if add:
                target.add_(x)
            elif target.data_ptr() != x.data_ptr():
                target.copy_(x)
            return
        if add:  # the device adds: the host would have to wait until the device has computed x
            x += self.to_device(target, x.dtype)
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            target.copy_(x, non_blocking=True)
            self.leaving.append((x, self.side.record_event()))
        if len(self.leaving) > 2:  # x must live until it is read, and not too many of them may wait for that
            self.leaving.popleft()[1].synchronize()

    def to_device(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x on the device in dtype, perhaps x itself. It is cast before the trip: fewer bytes travel."""
        if x.device.type == self.device.type:
            return x.to(dtype)
        torch.cuda.current_stream(self.device).wait_stream(self.side)  # x may be on its way to the host
        if x.dtype != dtype:
            x = self.empty(x.numel(), dtype, host=True).copy_(x)
        return x.to(self.device, non_blocking=True)

    def wait(self) -> None:
        if self.side is not None:
            torch.cuda.synchronize(self.device)
        self.leaving.clear()

    def park(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Copy the storage of x to host memory, once for all tensors that share it. The function that returns
        brings it back, once too. On a GPU the copy is made beside the computation: x must not change."""
        storage = x.untyped_storage()
        key = (storage.data_ptr(), x._version, x.dtype)
        fetch = self.parked.get(key)
        if fetch is None or fetch.storage.expired():  # expired: a new storage lies at the old address
            flat = torch.empty(0, dtype=x.dtype, device=x.device).set_(storage)
            copy = self.empty(flat.numel(), flat.dtype, host=True)
            self.put(copy, flat)
            fetch = self.parked[key] = functools.cache(lambda: self.to_device(copy, copy.dtype))
            fetch.storage = StorageWeakRef(storage)
        return fetch
