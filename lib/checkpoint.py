"""Checkpoints that are whole or not there: one folder per step, one file of flat shards per rank.

    out/step-00000300/   config.json, tokenizer.json, rank000.pt ..., meta.json (last: sizes and sha256 of all others)
    out/final/           config.json, tokenizer.json, model.pt (plain {name: tensor})

A folder is made as tmp-*, flushed to the disk and renamed when all ranks agree, so step-* is never half a checkpoint.
One that a resumed run could not read is renamed to damaged-step-* (in place of an earlier one of that step): it counts
no longer, but is not thrown away.
Shards are slices of flat vectors, so any world size and any ZeRO stage loads what any other has written.
Every torch.load is weights_only, which refuses to run code from a file.
"""
from __future__ import annotations

import fcntl
import math
import os
import re
import shutil
import sys

import torch

from lib.checked import expect, is_number, load_tensors, read_json, reading, verify, write_files
from lib.collectives import rank_and_world
from lib.program import LostRanks, UserError, start, sync, writing
from lib.ranks import together

VERSION = 1


def save_checkpoint(out: str, step: int, models: dict, extra: dict, *, keep: int = 2,
                    config: dict | None = None, tokenizer_path: str | None = None) -> str:
    """Write out/step-XXXXXXXX and return its path; all ranks call it, after claim(). extra: JSON-able, given back by
    load_checkpoint.

    Raises UserError on all ranks alike when any of them cannot write; then no part of this step is left behind.
    """
    rank, world = rank_and_world()
    folder, tmp = os.path.join(out, f"step-{step:08d}"), os.path.join(out, f"tmp-{step:08d}")

    @writing(folder)
    def prepare():
        _prune(out, keep)  # once more: a run that was killed may not have come to it
        os.makedirs(tmp)

    @writing(folder)
    def write_shard():
        return write_files(tmp, {f"rank{rank:03d}.pt": {key: state_shards(z) for key, z in models.items()}})

    @writing(folder)
    def finish():
        files = {name: entry for written in shards for name, entry in written.items()}
        files |= write_files(tmp, {"config.json": config, "tokenizer.json": tokenizer_path})
        meta = {"version": VERSION, "step": step, "world": world, "threads": torch.get_num_threads(),
                "torch": torch.__version__, "layout": {key: layout(z) for key, z in models.items()},
                "files": files, "extra": extra}
        write_files(tmp, {"meta.json": meta})
        _replace_folder(tmp, folder)
        _prune(out, keep)

    try:
        together(prepare if rank == 0 else None)
        shards = together(write_shard)
        together(finish if rank == 0 else None)
    except Exception:
        if rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        raise
    return folder


def load_checkpoint(out: str, models: dict, *, same: dict | None = None, numbers=(),
                    bitwise: dict | None = None) -> tuple[int, dict] | None:
    """Restore the newest whole checkpoint of `out`; all ranks call it. Returns (step, extra), None if there is none.

    A damaged one is named in a warning and moved aside, the one before it is taken; UserError if all are damaged or the
    newest whole one is of another model or lacks what this run needs of extra: the values of `same`, and numbers >= 0
    under the names in `numbers`. bitwise: settings of this run (as micro_batch_size) that should equal those in extra,
    or else, as with another world size, number of threads or PyTorch, a warning says that the last bits will differ.
    """
    rank, world = rank_and_world()
    problem, damaged, share = None, [], slice(rank, None, world)  # of the files, which the ranks hash together
    for name in together((lambda: steps(out)) if rank == 0 else None)[0]:
        folder = os.path.join(out, name)
        try:
            found = []  # not sent to the others, who have it too
            together(lambda found=found, folder=folder: found.append(_examine(folder, share)))
            meta, = found
            expect(name == f"step-{meta['step']:08d}", f"{folder}/meta.json: is that of step {meta['step']}")
        except LostRanks:
            raise
        except UserError as error:
            problem = error
            damaged.append(folder)
            print(f"warning: {error}; trying the checkpoint before it", file=sys.stderr) if rank == 0 else None
            continue
        _check_layout(folder, meta["layout"], {key: layout(z) for key, z in models.items()})
        extra, path = meta["extra"], os.path.join(folder, "meta.json")
        for key, value in (same or {}).items():
            expect(extra.get(key) == value, f"{path}: is of a run with another {key}; choose another --out")
        for key in numbers:
            expect(is_number(extra.get(key)), f"{path}: expected a number as {key}")
        for key, z in models.items():
            with reading(folder):
                load_shards(z, _read_shards(folder, meta, key))
        now = {"threads": torch.get_num_threads(), "torch": torch.__version__, "world": world, **(bitwise or {})}
        changed = [f"{key} was {was!r:.80} and is {value!r:.80}" for key, value in now.items()
                   if (was := meta.get(key, extra.get(key))) != value]
        if changed and rank == 0:
            print(f"warning: {folder}: {', '.join(changed)}: going on, but the last bits will differ", file=sys.stderr)
        # Aside, since --keep must not count them. Not away: it may have been the disk that failed, for a moment.
        together((lambda: [_hide_folder(folder, "damaged") for folder in damaged]) if rank == 0 else None)
        return meta["step"], extra
    expect(not problem, f"{problem}; no checkpoint in {out} is whole: remove them, or choose another --out")
    return None


def consolidate(folder: str, key: str = "model") -> dict[str, torch.Tensor]:
    """{name: tensor} of one model in a step folder: one process, no torch.distributed, no GPU, no model code."""
    meta = _examine(folder, slice(None))
    expect(key in meta["layout"], f"{folder}: holds {', '.join(meta['layout'])}, not {key}")
    shards, state = _read_shards(folder, meta, key), {}
    with reading(os.path.join(folder, "meta.json")):
        for unit, tensors in meta["layout"][key].items():
            flat = torch.cat([shard["units"][unit]["master"] for shard in shards])
            expect(sum(abs(math.prod(shape)) for _, shape, _ in tensors) <= len(flat),
                   f"{folder}/meta.json: the shapes in {ascii(unit)[:80]} are larger than what was saved")
            for names, shape, start in tensors:
                state |= dict.fromkeys(names, flat[start:start + math.prod(shape)].view(shape).clone())
        return state | shards[0]["buffers"]


# ---- what of a Zero is in a checkpoint ------------------------------------------------------------------------------

SCALARS = ("updates", "loss_scale", "good_steps", "skipped")


def layout(z) -> dict:
    """JSON-able: which tensors lie in which flat vector. A checkpoint must match it; world size and stage are free."""
    return {unit.name: [[[name for name, _, _ in slot.places], list(slot.shape), slot.start] for slot in unit.slots]
            for unit in z.units}


def _vectors(unit) -> dict[str, torch.Tensor]:
    """What is kept of a unit; each begins at element unit.low of its flat vector."""
    return {key: getattr(unit, key) for key in ("master", "exp_avg", "exp_avg_sq")[:3 if unit.trainable else 1]}


def state_shards(z) -> dict:
    """This rank's part of all that training needs: {"units": {unit: {vector: (n,) tensor}}, "buffers", "scalars"}.

    A vector is master, exp_avg or exp_avg_sq: elements [r S, (r+1) S) of the flat one, without the padding at its end.
    """
    def compact(x: torch.Tensor) -> torch.Tensor:
        """In main memory, for machines without a GPU; in a storage of its own, since torch.save writes whole ones."""
        x = x.cpu()
        return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x

    units = {}
    for unit in z.units:
        first, last = (min(r * unit.shard_size, unit.length) - unit.low for r in (z.comm.rank, z.comm.rank + 1))
        units[unit.name] = {key: compact(vector[first:last]) for key, vector in _vectors(unit).items()}
    return {"units": units, "buffers": {name: compact(x) for name, x in z.model.state_dict().items()},
            "scalars": {key: getattr(z, key) for key in SCALARS}}


@torch.no_grad()
def load_shards(z, shards: list[dict]) -> None:
    """shards: state_shards() of all ranks of the run that saved, in rank order, whatever its world size and stage."""
    for unit in z.units:
        for key, mine in _vectors(unit).items():
            start = -unit.low  # of the next piece, counted from the start of my own vector
            for piece in (shard["units"][unit.name][key] for shard in shards):
                first, last = max(start, 0), min(start + piece.numel(), mine.numel())
                if first < last:
                    mine[first:last].copy_(piece[first - start:last - start])
                start += piece.numel()
            found, end = start + unit.low, unit.length if key == "master" else unit.ends[unit.trainable]
            if found != end:
                raise ValueError(f"{unit.name}: {key} has {found} elements, expected {end}")
        unit.publish()
    z.model.load_state_dict(shards[0]["buffers"])
    for key in SCALARS:
        setattr(z, key, shards[0]["scalars"][key])
    for state in z.optimizer.state.values() if z.optimizer else ():
        state["step"].fill_(z.updates)


# ---- final models ---------------------------------------------------------------------------------------------------

def save_final(out: str, state_dict: dict[str, torch.Tensor], config: dict, tokenizer_path: str) -> str:
    """Write out/final; called by rank 0 alone. Returns the folder.

    config: JSON-able, enough to build the model. Added to it: "tied", the groups of names that share one tensor,
    "files", sizes and checksums, and "sha256", its own.
    """
    folder, tmp = os.path.join(out, "final"), os.path.join(out, "tmp-final")
    storages = {}
    for name, tensor in state_dict.items():
        storages.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    config = {**config, "tied": [names for names in storages.values() if len(names) > 1]}
    try:
        with writing(folder):
            os.makedirs(tmp)
            config["files"] = write_files(tmp, {"model.pt": state_dict, "tokenizer.json": tokenizer_path})
            write_files(tmp, {"config.json": config})
            _replace_folder(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return folder


def final_folder(folder: str) -> str:
    """The folder of the finished model, given that folder or the run's."""
    final = os.path.join(folder, "final")
    return final if os.path.isdir(final) else folder


def load_final(folder: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(config, {name: tensor}) of a folder that save_final wrote, or of the run's; tensors are read when used."""
    folder = final_folder(folder)
    config = read_json(os.path.join(folder, "config.json"))
    files = config.setdefault("files", {})  # a folder made by hand has none
    expect(isinstance(files, dict), f"{folder}/config.json: expected 'files' to be of type dict")
    for name in {"model.pt", "tokenizer.json"} & files.keys():
        verify(folder, name, files[name])
    state = load_tensors(os.path.join(folder, "model.pt"))
    expect(isinstance(state, dict) and all(isinstance(name, str) and isinstance(t, torch.Tensor) and
                                           t.is_floating_point() for name, t in state.items()),
           f"{folder}/model.pt: expected a plain {{name: tensor}} dictionary of floating-point numbers")
    return config, state


# ---- the run's folder -----------------------------------------------------------------------------------------------

def claim(out: str, resume: bool):
    """Take `out` for this run (rank 0 alone calls it); keep what is returned until the process ends.

    UserError if another run holds it, naming the holder's pid, if it holds checkpoints and this run does not resume, or
    if it holds a finished model and none. What a save that was killed has left is cleared away.
    The kernel drops a flock when its holder dies, however it dies, so there is no stale lock to clean up.
    """
    with writing(out):
        os.makedirs(out, exist_ok=True)
        file = open(os.path.join(out, "lock"), "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{out}: in use by process {file.read().strip()}; choose another --out") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for name in filter(re.compile(r"tmp-((old|gone)-step-)?\d{8}|tmp-(old-)?final").fullmatch, os.listdir(out)):
            hidden, folder = (os.path.join(out, name) for name in (name, name.removeprefix("tmp-old-")))
            shutil.rmtree(hidden) if os.path.isdir(folder) else os.rename(hidden, folder)  # the last to be replaced
    newest, finished = "".join(steps(out)[:1]), os.path.isdir(os.path.join(out, "final"))
    expect(resume or not newest, f"{out}: holds a run ({newest}); go on by --resume, or choose another --out")
    expect(newest or not finished, f"{out}: holds final/ and no checkpoint to go on from; choose another --out")
    return file


def steps(out: str) -> list[str]:
    """Names of the step folders in `out`, newest first."""
    names = os.listdir(out) if os.path.isdir(out) else []
    return sorted((n for n in names if re.fullmatch(r"step-\d{8}", n)), reverse=True)


def _replace_folder(tmp: str, folder: str) -> None:
    """Rename tmp to folder, for good even if the power goes."""
    sync(tmp)
    old = _hide_folder(folder, "tmp-old") if os.path.isdir(folder) else None
    os.rename(tmp, folder)
    sync(os.path.dirname(folder))
    if old:
        shutil.rmtree(old)


def _prune(out: str, keep: int) -> None:
    """All but the newest. They are whole: what is damaged is moved aside by the run that finds it, before it saves."""
    for folder in (os.path.join(out, name) for name in steps(out)[keep:]):
        with writing(folder):
            shutil.rmtree(_hide_folder(folder, "tmp-gone"))


def _hide_folder(folder: str, prefix: str) -> str:
    """Out of sight before it goes off the disk: killed in the middle, no half of it stands under its name.

    prefix: "tmp-gone", "tmp-old" of one that claim() gives its name back if it is killed before the new one has it, or
    "damaged" of one that stays."""
    out, name = os.path.split(folder)
    hidden = os.path.join(out, f"{prefix}-{name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    return hidden


def _examine(folder: str, part: slice) -> dict:
    """meta.json, after checking all of it that the loader relies on, and that part of the files it lists."""
    path = os.path.join(folder, "meta.json")
    meta = read_json(path)
    expect(meta.get("version") == VERSION,
           f"{path}: checkpoint version {ascii(meta.get('version'))[:40]}, this program reads {VERSION}")
    kinds = {"step": int, "world": int, "threads": int, "torch": str, "layout": dict, "files": dict, "extra": dict}
    for key, kind in kinds.items():
        expect(isinstance(meta.get(key), kind), f"{path}: expected {key!r} to be of type {kind.__name__}")
    world, files = meta["world"], meta["files"].keys()  # names are looked for in this folder and nowhere else
    ranks = {f"rank{r:03d}.pt" for r in range(min(world, len(files) + 1))}
    expect(world > 0 and ranks <= files <= ranks | {"config.json", "tokenizer.json"},
           f"{path}: expected the rank files of a world of {world}, config.json and tokenizer.json, found others")
    for name, entry in sorted(meta["files"].items())[part]:
        verify(folder, name, entry)
    return meta


def _read_shards(folder: str, meta: dict, key: str) -> list[dict]:
    """What state_shards() returned for one model, for every rank of the run that saved; not yet read into memory."""
    shards = []
    for r in range(meta["world"]):
        path = os.path.join(folder, f"rank{r:03d}.pt")
        with reading(path):
            shard = load_tensors(path)[key]
            vectors = [vector for unit in meta["layout"][key] for vector in shard["units"][unit].values()]
            expect(all(is_number(shard["scalars"][name]) for name in SCALARS) and shard["scalars"]["loss_scale"] > 0
                   and all(vector.dim() == 1 and vector.is_floating_point() for vector in vectors),
                   f"{path}: does not hold what meta.json says")
        shards.append(shard)
    return shards


def _check_layout(folder: str, found: dict, expected: dict) -> None:
    """UserError naming the first tensor in which the layouts of the models differ."""
    if {key: found.get(key) for key in expected} == expected:
        return
    with reading(os.path.join(folder, "meta.json")):
        have, want = ({f"{key}: {names[0]}": tuple(shape) for key, units in layouts.items()
                       for tensors in units.values() for names, shape, _ in tensors} for layouts in (found, expected))
    for name in [*want, *have]:
        there, here = (shapes.get(name, "missing") for shapes in (have, want))
        expect(there == here, f"{folder}: is of another model: {name} is {there} there and {here} here; choose "
                              "another --out, or the flags it was made with")
    raise UserError(f"{folder}: has the tensors of this model, but cut into other units")


def main() -> None:
    """python checkpoint.py out/run/step-00000300 [actor]: make out/run/final of a run that did not get to its end."""
    expect(len(sys.argv) in (2, 3), "usage: python checkpoint.py out/run/step-00000300 [name of the model]")
    folder = sys.argv[1].rstrip("/")
    state, config = consolidate(folder, *sys.argv[2:]), read_json(os.path.join(folder, "config.json"))
    lock = claim(os.path.dirname(folder) or ".", resume=True)  # noqa: F841 - held until this function returns
    print(save_final(os.path.dirname(folder) or ".", state, config, os.path.join(folder, "tokenizer.json")))


if __name__ == "__main__":
    start(main)
