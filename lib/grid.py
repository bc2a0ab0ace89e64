"""What train_parallel.py stands on: processes as a grid, and one checkpoint of what they all hold.

    Axis, make_grid   who talks to whom; every byte that is sent is counted
    Whole             parts of a model on many ranks -> the one model that checkpoints hold, and back
"""
import time
from collections import namedtuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from lib.collectives import Comm, aligned, group_parameters, take_out
from lib.ranks import PATIENCE


class Axis(Comm):
    """The ranks that differ from this one in one coordinate of the grid. sent: bytes; waited: seconds."""

    def __init__(self, members: list[int], me: int, group):
        self.members, self.rank, self.world, self.group = members, members.index(me), len(members), group
        self.sent, self.waited, self.under_way = 0.0, 0.0, None

    def all_reduce(self, x):
        self.sent += 2 * (self.world - 1) * x.nbytes / self.world  # in a ring
        super().all_reduce(x)

    def all_gather(self, shard, whole=None):
        self.sent += (self.world - 1) * shard.nbytes
        return super().all_gather(shard, whole)

    def reduce_scatter(self, x, dtype):
        self.sent += (self.world - 1) * x.nbytes / self.world
        return super().reduce_scatter(x, dtype)

    def send(self, x, to: int) -> None:
        """Does not wait for its receiver: in 1F1B neighbours send to each other, so both would wait. It waits
        for that of the send before, who needs nothing that this rank has yet to do. Until it is received x
        must not change, since gloo reads it late."""
        self.finish()
        x = x.detach().contiguous()
        self.sent += x.nbytes
        self.under_way = dist.isend(x, self.members[to], group=self.group), x

    def finish(self) -> None:
        if self.under_way:
            self.under_way[0].wait()
        self.under_way = None

    def receive(self, x, source: int):
        """Fills x, and returns it."""
        begun = time.perf_counter()
        dist.recv(x, self.members[source], group=self.group)
        self.waited += time.perf_counter() - begun
        return x


# down: to later stages; up: to earlier ones; sequence: whether places of a row are shared out over `tensor`
Grid = namedtuple("Grid", "data tensor down up sequence")


def make_grid(N: int, M: int, P: int, rank: int, sequence: bool = False) -> Grid:
    """rank = (replica * P + stage) * M + tensor rank. All ranks make all groups, also those that they are not
    in, in one order. Down and up have groups of their own, because in one NCCL group two neighbours that both
    send first would wait for each other."""
    grid, axes = torch.arange(N * P * M).view(N, P, M), []
    for rows in (grid.permute(1, 2, 0), grid, grid.permute(0, 2, 1), grid.permute(0, 2, 1)):
        for members in rows.flatten(0, 1).tolist():
            group = dist.new_group(members, timeout=PATIENCE) if len(members) > 1 else None
            axes += [Axis(members, rank, group)] if rank in members else []
    return Grid(*axes, sequence)


class Whole:
    """What Run and checkpoints see in place of a Zero: one model, in the layout that it has in one process.

    part: the Zero of this rank's part. part.pieces(name, x): views of the full parameter x that it holds;
    part.counts(name): whether its copy is the one to save; part.everyone: all ranks. model: the whole one, on
    the meta device, which loses its parameters. vectors, scalars: names of what is saved."""

    def __init__(self, part, model: nn.Module, vectors: tuple, scalars: tuple):
        self.part, self.model, self.comm = part, model, part.everyone
        self.vectors, self.scalars, self.units = vectors, scalars, []
        for name, _, _, parameters in group_parameters(model, model.units(), False):
            slots = take_out(parameters)[0]
            self.units.append((name or "root", slots, aligned(slots[-1].start + slots[-1].shape.numel())))

    def report(self) -> str:
        return f"of {self.comm.world} processes this one, among its replicas: {self.part.report()}"

    def layout(self) -> dict:
        """As Zero.layout."""
        return {name: [[[place[0] for place in slot.places], list(slot.shape), slot.start] for slot in slots]
                for name, slots, _ in self.units}

    def pairs(self, slots, flat, mine: list):
        """(name, a place in the vector of a whole unit, the same in this rank's own) for all it holds."""
        parts = {slot.places[0][0]: view for unit, own in zip(self.part.trained, mine)
                 for slot, view in zip(unit.slots, unit.views(own))}
        for start, shape, places in slots:
            for name in (name for name, *_ in places if name in parts):
                full = self.part.pieces(name, flat[start:start + shape.numel()].view(shape))
                yield from zip([name] * len(full), full, parts[name].split([len(piece) for piece in full]))

    @torch.no_grad()
    def gathered(self, key: str):
        """Yields (a unit's name, slots, one of its vectors), whole. All ranks go through them together. Each
        puts in what no other does, and bits are summed, not numbers: so nothing is rounded."""
        part, mine = self.part, [getattr(unit, key) for unit in self.part.trained]
        if part.stage > 0:
            mine = [part.comm.all_gather(F.pad(x.to(part.device), (0, unit.shard_size - len(x))))
                    for unit, x in zip(part.trained, mine)]
        for unit, slots, length in self.units:
            flat = torch.zeros(length, dtype=part.wide, device=part.device)
            for name, place, own in self.pairs(slots, flat, mine):
                if part.counts(name) and part.comm.rank == 0:
                    place.copy_(own)
            self.comm.all_reduce(flat.view(torch.int32 if flat.itemsize == 4 else torch.int64))
            yield unit, slots, flat

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """As Zero.full_state_dict."""
        state = {}
        for _, slots, flat in self.gathered("master"):
            for start, shape, places in slots if self.comm.rank == 0 else ():
                x = flat[start:start + shape.numel()].view(shape).to("cpu", copy=True)
                state |= dict.fromkeys((name for name, *_ in places), x)
        return state

    def state_shards(self) -> dict:
        """As Zero.state_shards of a model that is sharded over all ranks."""
        units = {name: {} for name, *_ in self.units}
        for key in self.vectors:
            for unit, _, flat in self.gathered(key):
                size = aligned(-(-len(flat) // self.comm.world))
                units[unit][key] = flat[self.comm.rank * size:][:size].to("cpu", copy=True)
        scalars = {key: getattr(self.part, key) for key in self.scalars}
        return {"units": units, "buffers": {}, "scalars": scalars}

    def load_shards(self, shards: list[dict]) -> None:
        """As Zero.load_shards, whatever grid or ZeRO stage has saved them."""
        trained, units = self.part.trained, {unit.name: {} for unit in self.part.trained}
        for key in self.vectors:
            mine = [torch.zeros(unit.length, dtype=self.part.wide) for unit in trained]
            for unit, slots, _ in self.units:
                flat = torch.cat([shard["units"][unit][key] for shard in shards])
                for _, place, own in self.pairs(slots, flat, mine):
                    own.copy_(place)
            for unit, flat in zip(trained, mine):
                units[unit.name][key] = flat
        self.part.load_shards([{**shards[0], "units": units}])
