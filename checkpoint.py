"""Checkpoints that are whole or not there: one folder per step, one file of flat shards per rank.

    out/step-00000300/   config.json, tokenizer.json, rank000.pt ..., meta.json (last: sizes and sha256 of all others)
    out/final/           config.json, tokenizer.json, model.pt (plain {name: tensor})

A folder is made as tmp-*, flushed to the disk and renamed when all ranks agree, so step-* is never half a checkpoint.
Shards are slices of flat vectors, so any world size and any ZeRO stage loads what any other has written.
Every torch.load is weights_only, which refuses to run code from a file.
"""
from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys

import torch
import torch.distributed as dist

from common import UserError
from zero import Zero

VERSION = 1


def save_checkpoint(out: str, step: int, models: dict[str, Zero], extra: dict, *, keep: int = 2,
                    config: dict | None = None, tokenizer_path: str | None = None) -> str:
    """Write out/step-XXXXXXXX; all ranks call it. extra: JSON-able, given back by load_checkpoint. Returns the folder.

    Raises UserError on all ranks alike when any of them cannot write; then nothing of this step is left behind.
    """
    rank, world = _ranks()
    folder, tmp = os.path.join(out, f"step-{step:08d}"), os.path.join(out, f"tmp-{step:08d}")

    def prepare():
        _clear_leftovers(out)
        os.makedirs(tmp)

    def write_shard():
        name = f"rank{rank:03d}.pt"
        state = {key: state_shards(z) for key, z in models.items()}
        return name, _write(os.path.join(tmp, name), lambda file: torch.save(_compact(state), file))

    def finish():
        if config is not None:
            files["config.json"] = _write(os.path.join(tmp, "config.json"), _json_writer(config))
        if tokenizer_path is not None:
            with open(tokenizer_path, "rb") as source:
                content = source.read()
            files["tokenizer.json"] = _write(os.path.join(tmp, "tokenizer.json"), lambda file: file.write(content))
        meta = {"version": VERSION, "step": step, "world": world, "threads": torch.get_num_threads(),
                "torch": torch.__version__, "layout": {key: layout(z) for key, z in models.items()},
                "files": files, "extra": extra}
        _write(os.path.join(tmp, "meta.json"), _json_writer(meta))
        _replace_folder(tmp, folder)
        for name in steps(out)[keep:]:
            _remove_folder(os.path.join(out, name))

    try:
        _together(prepare if rank == 0 else None)
        files = dict(_together(write_shard))
        _together(finish if rank == 0 else None)
    except UserError as error:
        if rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        raise UserError(f"{folder}: could not be saved: {error}; earlier checkpoints are untouched") from None
    return folder


def load_checkpoint(out: str, models: dict[str, Zero]) -> tuple[int, dict] | None:
    """Restore the newest checkpoint of `out` that is whole; all ranks call it. Returns (step, extra), None if none exists.

    A damaged one is named in a warning and the one before it is taken; UserError if all are damaged, or if the newest
    whole one belongs to another model.
    """
    rank, world = _ranks()
    names, = _together((lambda: steps(out)) if rank == 0 else None)[:1]
    for name in names:
        folder = os.path.join(out, name)
        try:
            meta = _together(lambda: read_meta(folder))[0]
            files = sorted(meta["files"])
            _together(lambda: [_verify(folder, file, meta["files"][file]) for file in files[rank::world]])
        except UserError as error:
            if rank == 0:
                print(f"warning: {error}; trying the checkpoint before it", file=sys.stderr, flush=True)
            continue
        for key, z in models.items():
            _check_layout(f"{folder}/meta.json", meta["layout"].get(key), layout(z))
        shards = [_load(os.path.join(folder, f"rank{r:03d}.pt")) for r in range(meta["world"])]
        for key, z in models.items():
            load_shards(z, [shard[key] for shard in shards])
        if rank == 0:
            _warn_of_changes(folder, meta, world)
        return meta["step"], meta["extra"]
    if names:
        raise UserError(f"{out}: none of its {len(names)} checkpoints is whole; remove them, or start without --resume")
    return None


# ---- what of a Zero is in a checkpoint ------------------------------------------------------------------------------

SCALARS = ("updates", "loss_scale", "good_steps", "skipped")


def layout(z: Zero) -> dict:
    """JSON-able: which tensors lie in which flat vector. A checkpoint must match it, whatever its world size and stage."""
    return {unit.name: [[[name for name, _, _ in slot.places], list(slot.shape), slot.start] for slot in unit.slots]
            for unit in z.units}


def state_shards(z: Zero) -> dict:
    """This rank's part of all that training needs: {"units": {unit: {vector: (n,) tensor}}, "buffers", "scalars"}.

    A vector is master, exp_avg or exp_avg_sq: elements [r S, (r+1) S) of the flat vector, without the padding at its end.
    """
    units = {}
    for unit in z.units:
        first, last = (min(r * unit.S, unit.length) - unit.low for r in (z.comm.rank, z.comm.rank + 1))
        units[unit.name] = {key: vector[first:last] for key, vector in unit.vectors().items()}
    return {"units": units, "buffers": z.model.state_dict(), "scalars": {key: getattr(z, key) for key in SCALARS}}


@torch.no_grad()
def load_shards(z: Zero, shards: list[dict]) -> None:
    """shards: state_shards() of every rank of the run that saved, in rank order; its world size and stage do not matter."""
    for unit in z.units:
        for key, mine in unit.vectors().items():
            start = -unit.low  # of the next piece, counted from the start of my own vector
            for piece in (shard["units"][unit.name][key] for shard in shards):
                first, last = max(start, 0), min(start + piece.numel(), mine.numel())
                if first < last:
                    mine[first:last].copy_(piece[first - start:last - start])
                start += piece.numel()
        unit.publish()
    z.model.load_state_dict(shards[0]["buffers"])
    for key in SCALARS:
        setattr(z, key, shards[0]["scalars"][key])
    if z.optimizer:
        for state in z.optimizer.state.values():
            state["step"].fill_(z.updates)


# ---- final models ---------------------------------------------------------------------------------------------------

def save_final(out: str, state_dict: dict[str, torch.Tensor], config: dict, tokenizer_path: str) -> str:
    """Write out/final; called by rank 0 alone. config: JSON-able, enough to build the model. Returns the folder."""
    folder, tmp = os.path.join(out, "final"), os.path.join(out, "tmp-final")
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        os.makedirs(tmp)
        with open(tokenizer_path, "rb") as source:
            content = source.read()
        _write(os.path.join(tmp, "model.pt"), lambda file: torch.save(state_dict, file))
        _write(os.path.join(tmp, "tokenizer.json"), lambda file: file.write(content))
        _write(os.path.join(tmp, "config.json"), _json_writer(config))
        _replace_folder(tmp, folder)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise UserError(f"{folder}: could not be saved: {error}") from None
    return folder


def final_folder(folder: str) -> str:
    """The folder of the finished model, given that folder or the run's."""
    final = os.path.join(folder, "final")
    return final if os.path.isdir(final) else folder


def load_final(folder: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(config, {name: tensor}) of a folder that save_final wrote; the run's folder will do too."""
    folder = final_folder(folder)
    config = _read_json(os.path.join(folder, "config.json"))
    path = os.path.join(folder, "model.pt")
    state = _load(path)
    if not isinstance(config, dict):
        raise UserError(f"{folder}/config.json: found {type(config).__name__}, expected an object")
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path}: expected a plain {{name: tensor}} dictionary")
    return config, state


# ---- the run's folder ---------------------------------------------------------------------------------------------

def claim(out: str, resume: bool):
    """Take `out` for this run (rank 0 alone calls it); keep what is returned until the process ends.

    UserError if another run holds it, naming the holder's pid, or if it holds checkpoints and this run does not resume.
    The kernel drops a flock when its holder dies, however it dies, so there is no stale lock to clean up.
    """
    path = os.path.join(out, "lock")
    try:
        os.makedirs(out, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; choose another --out") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise UserError(f"{out}: in use by process {file.read().strip()}; choose another --out") from None
    if steps(out) and not resume:
        raise UserError(f"{out}: holds a run ({steps(out)[0]}); go on with it by --resume, or choose another --out")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def steps(out: str) -> list[str]:
    """Names of the step folders in `out`, newest first."""
    names = os.listdir(out) if os.path.isdir(out) else []
    return sorted((n for n in names if re.fullmatch(r"step-\d{8}", n)), reverse=True)


def _clear_leftovers(out: str) -> None:
    for name in os.listdir(out) if os.path.isdir(out) else []:
        if re.fullmatch(r"tmp-(old-)?(step-)?\d{8}", name):  # of a save that was killed
            shutil.rmtree(os.path.join(out, name))


def _replace_folder(tmp: str, folder: str) -> None:
    """Rename tmp to folder, for good even if the power goes."""
    if os.path.isdir(folder):
        _remove_folder(folder)
    _sync_folder(tmp)
    os.rename(tmp, folder)
    _sync_folder(os.path.dirname(folder))


def _remove_folder(folder: str) -> None:
    """First out of sight, then out of the disk: killed between the two, no half of it stands under its name."""
    out, name = os.path.split(folder)
    gone = os.path.join(out, f"tmp-old-{name}")
    os.rename(folder, gone)
    shutil.rmtree(gone)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---- files ----------------------------------------------------------------------------------------------------------

class _Hashing:
    """A file that hashes what passes through, so that it need not be read again."""

    def __init__(self, file):
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, data) -> int:
        self.hash.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _write(path: str, writer) -> dict:
    """Let writer(file) fill a new file, force it to the disk; returns its entry for meta.json."""
    with open(path, "wb") as file:
        hashing = _Hashing(file)
        writer(hashing)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.bytes, "sha256": hashing.hash.hexdigest()}


def _json_writer(value):
    return lambda file: file.write(json.dumps(value, indent=1).encode())


def _read_json(path: str):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a folder written by a training script") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def read_meta(folder: str) -> dict:
    """meta.json, checked for everything that the loader relies on."""
    path = os.path.join(folder, "meta.json")
    meta = _read_json(path)
    kinds = {"version": int, "step": int, "world": int, "threads": int, "torch": str, "layout": dict, "files": dict,
             "extra": dict}
    for key, kind in kinds.items():
        if not isinstance(meta, dict) or not isinstance(meta.get(key), kind):
            raise UserError(f"{path}: expected {key!r} to be of type {kind.__name__}")
    if meta["version"] != VERSION:
        raise UserError(f"{path}: checkpoint version {meta['version']}, this program reads {VERSION}")
    for r in range(meta["world"]):
        if f"rank{r:03d}.pt" not in meta["files"]:
            raise UserError(f"{path}: lists no rank{r:03d}.pt for a world of {meta['world']}")
    for name, entry in meta["files"].items():
        if not re.fullmatch(r"rank\d{3,}\.pt|config\.json|tokenizer\.json", name) or not isinstance(entry, dict):
            raise UserError(f"{path}: unexpected file entry {name!r}")
    return meta


def _verify(folder: str, name: str, expected: dict) -> None:
    path = os.path.join(folder, name)
    try:
        size = os.path.getsize(path)
        if size != expected.get("bytes"):
            raise UserError(f"{path}: has {size} bytes, meta.json says {expected.get('bytes')}")
        hashed = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if hashed.hexdigest() != expected.get("sha256"):
        raise UserError(f"{path}: its checksum is not the one in meta.json; the file is damaged")


def _load(path: str):
    """torch.load that runs no code from the file (weights_only) and takes no memory before it is used (mmap)."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # whatever a hostile or damaged file makes the unpickler raise
        raise UserError(f"{path}: not a file of tensors: {str(error).splitlines()[0] if str(error) else error!r}") from None


def _compact(state):
    """The same nested dictionaries with every tensor in a storage of its own size: torch.save writes whole storages."""
    if isinstance(state, dict):
        return {key: _compact(value) for key, value in state.items()}
    if isinstance(state, torch.Tensor) and state.untyped_storage().nbytes() > state.nbytes:
        return state.clone()
    return state


def _check_layout(path: str, found, expected: dict) -> None:
    """UserError naming the first tensor in which two Zero.layout()s differ."""
    def shapes(layout) -> dict:
        return {names[0]: tuple(shape) for tensors in layout.values() for names, shape, _ in tensors}

    if found == expected:
        return
    try:
        have, want = shapes(found), shapes(expected)
    except (AttributeError, TypeError, ValueError, IndexError):
        raise UserError(f"{path}: its layout cannot be understood") from None
    for name in [*want, *have]:
        if have.get(name) != want.get(name):
            raise UserError(f"{path}: is of another model: {name} is {have.get(name, 'missing')} there and "
                            f"{want.get(name, 'missing')} here")
    raise UserError(f"{path}: has the tensors of this model, but cut into other units")


def _warn_of_changes(folder: str, meta: dict, world: int) -> None:
    now = {"world": world, "threads": torch.get_num_threads(), "torch": torch.__version__}
    changed = [f"{key} {meta[key]} -> {value}" for key, value in now.items() if meta[key] != value]
    if changed:
        print(f"warning: {folder}: {', '.join(changed)}: the run goes on, but not bitwise as it would have", file=sys.stderr,
              flush=True)


# ---- all ranks together ---------------------------------------------------------------------------------------------

def _ranks() -> tuple[int, int]:
    inside = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if inside else (0, 1)


def _together(action) -> list:
    """Run action() (None: nothing to do) on every rank; returns all results in rank order. If one fails, all raise."""
    try:
        mine = (True, action() if action else None)
    except (UserError, OSError, RuntimeError) as error:
        mine = (False, str(error))
    rank, world = _ranks()
    everyone = [mine] * world
    if world > 1:
        dist.all_gather_object(everyone, mine)
    for r, (done, result) in enumerate(everyone):
        if not done:
            raise UserError(result if world == 1 else f"rank {r}: {result}")
    return [result for _, result in everyone]
