"""Checkpoints that are whole or not there: one folder per step, one file of flat shards per rank.

    out/run/step-00000300/   rank000.pt ..., config.json, tokenizer.json, meta.json
    out/run/final/           model.pt (plain {name: tensor}), config.json, tokenizer.json

A folder gets its name when it is complete and on the disk: a crash leaves no half checkpoint. meta.json (of
final/: config.json) holds the checksums of all files. Shards are slices of flat vectors, so any number of
ranks, at any ZeRO stage, loads what any other has written.
"""
import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import torch

from lib.program import UserError, replacing, start, sync, writing
from lib.ranks import together

KEEP = 2  # checkpoints that stay; older ones are removed


def save_checkpoint(out: str, step: int, models: dict, extra: dict, config: dict, tokenizer_path) -> None:
    """Write out/step-XXXXXXXX; all ranks call it, after claim(). models: {name: Zero}. extra: JSON-able.
    UserError if it cannot be written; then nothing of this step is left."""
    comm, folder = next(iter(models.values())).comm, Path(out, f"step-{step:08d}")
    with replacing(folder) if comm.rank == 0 else contextlib.nullcontext() as tmp:
        tmp = together(lambda: tmp)[0]  # rank 0 has chosen the name
        mine = {f"rank{comm.rank:03d}.pt": {key: zero.state_shards() for key, zero in models.items()}}
        mine |= {"config.json": config, "tokenizer.json": tokenizer_path} if comm.rank == 0 else {}
        written = together(lambda: _write(tmp, mine))
        if comm.rank == 0:
            _write(tmp, {"meta.json": {
                "version": 1, "step": step, "world": comm.world, "threads": torch.get_num_threads(),
                "torch": torch.__version__, "layout": {key: zero.layout() for key, zero in models.items()},
                "files": {name: entry for part in written for name, entry in part.items()}, "extra": extra}})
    for old in steps(out)[KEEP:] if comm.rank == 0 else ():
        _remove(old)


def load_checkpoint(out: str, models: dict, *, same: dict, bitwise: dict) -> tuple[int, dict] | None:
    """Restore the newest whole checkpoint; all ranks call it. Returns (step, extra), None if there is none.
    same: what extra must say, else a UserError. bitwise: settings that may differ, with a warning."""
    comm = next(iter(models.values())).comm
    if not (found := _newest_whole(out, comm)):
        return None
    folder, meta = found
    for key, value in same.items():
        expect(meta["extra"].get(key) == value, f"{folder}: has another {key}; choose another --out")
    for key, zero in models.items():
        expect(meta["layout"].get(key) == zero.layout(), f"{folder}: has another {key}; choose another --out")
        zero.load_shards([_load_tensors(folder / f"rank{r:03d}.pt")[key] for r in range(meta["world"])])
    was = {**meta["extra"], **meta}
    now = {**bitwise, "world": comm.world, "threads": torch.get_num_threads(), "torch": torch.__version__}
    changes = [f"{key} was {was.get(key)!r:.80} and is {value!r:.80}" for key, value in now.items()
               if was.get(key) != value]
    if changes and comm.rank == 0:
        print(f"warning: {folder}: {', '.join(changes)}: going on, but not bit for bit as the unbroken run",
              file=sys.stderr)
    return meta["step"], meta["extra"]


def _newest_whole(out: str, comm) -> tuple[Path, dict] | None:
    """The newest step folder that is whole, and its meta.json. Damaged ones are named and moved aside."""
    folders = together(lambda: steps(out))[0]
    for n, folder in enumerate(folders):
        try:
            meta = together(lambda folder=folder: _examine(folder, "meta.json", comm.rank, comm.world))[0]
        except UserError as error:
            if comm.rank == 0:
                print(f"warning: {error}; trying the checkpoint before it", file=sys.stderr)
            continue
        for damaged in folders[:n] if comm.rank == 0 else ():
            damaged.rename(damaged.with_name(f"damaged-{damaged.name}-{os.getpid()}"))
        return folder, meta
    expect(not folders, f"{out}: no checkpoint is whole; remove them, or choose another --out")


def claim(out: str, resume: bool):
    """Take the folder `out` for this run; rank 0 alone calls it, and keeps what is returned until it ends.
    UserError if another run holds it, or if it has a run that this one does not go on with."""
    with writing(out):
        os.makedirs(out, exist_ok=True)
        lock = open(os.path.join(out, "lock"), "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops the lock of a dead process
    except BlockingIOError:
        raise UserError(f"{out}: in use by another run; choose another --out, or end that run") from None
    for left in Path(out).glob("*.tmp-*"):  # by a save that was killed
        shutil.rmtree(left, ignore_errors=True)
    found = steps(out)
    expect(resume and found or not found and not Path(out, "final").exists(),
           f"{out}: holds a run; choose another --out, or go on from its newest step folder by --resume")
    return lock


def steps(out: str) -> list[Path]:
    """The step folders in `out`, newest first."""
    return sorted(Path(out).glob(f"step-{'[0-9]' * 8}"), reverse=True)


def keep_step(out: str, step: int) -> bool:
    """Remove the step folders in `out` but this one. Returns whether it is there."""
    for folder in steps(out):
        if folder.name != f"step-{step:08d}":
            _remove(folder)
    return bool(steps(out))


def _remove(folder: Path) -> None:
    """Renamed first: killed in the middle, no half of the folder stays under its name."""
    gone = folder.with_name(f"{folder.name}.tmp-gone")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def save_final(out: str, state_dict: dict, config: dict, tokenizer_path, more=()) -> None:
    """Write out/final; rank 0 alone calls it. config: JSON-able, enough to build the model. more: other files
    {name: tensors}. Without weights in state_dict there is no model.pt."""
    folder, model = Path(out, "final"), {"model.pt": state_dict} if state_dict else {}
    with replacing(folder) as tmp:
        files = _write(tmp, {**model, **dict(more), "tokenizer.json": tokenizer_path})
        _write(tmp, {"config.json": {**config, "files": files}})
        if folder.exists():
            _remove(folder)


def final_folder(folder: str) -> str:
    """The folder of the finished model, given that folder or the run's."""
    final = os.path.join(folder, "final")
    return final if os.path.isdir(final) else folder


def load_final(folder: str, name: str = "model.pt") -> tuple[dict, dict]:
    """(config, contents of the file `name`) of a finished run, given its folder or final/. UserError."""
    folder = Path(final_folder(folder))
    config = {"files": {}, **_examine(folder, "config.json")}
    expect(name in config["files"] or (folder / name).exists() or "delta.pt" not in config["files"],
           f"{folder}: holds a delta alone; sample.py, evaluate.py and village.scorecard read it by --delta")
    return config, _load_tensors(folder / name)


def _write(folder: Path, contents: dict) -> dict[str, dict]:
    """Write {name: tensors (*.pt), JSON, or a path to copy} for good. Returns {name: its checksum}."""
    folder.mkdir(exist_ok=True)
    for path, content in ((folder / name, content) for name, content in contents.items()):
        if not isinstance(content, dict):
            shutil.copyfile(content, path)
        elif path.suffix == ".json":
            path.write_text(json.dumps({**content, "sha256": _checksum(content)}, indent=1))
        else:
            try:
                torch.save(content, path)
            except RuntimeError as error:  # of a full disk
                raise OSError(error) from None
        sync(path)
    return {name: {"sha256": _checksum(folder / name)} for name in contents}


def _checksum(of: dict | Path) -> str:
    hashed, text = hashlib.sha256(), json.dumps(of, sort_keys=True) if isinstance(of, dict) else ""
    with io.BytesIO(text.encode()) if text else open(of, "rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()


def expect(good, otherwise: str) -> None:
    if not good:
        raise UserError(otherwise)


@contextlib.contextmanager
def reading(path):
    """Whatever a missing or damaged file makes its reader raise becomes one line that names the file."""
    try:
        yield
    except Exception as error:
        why = (getattr(error, "strerror", "") or str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{path}: cannot be read: {why}; expected what a training script wrote") from None


def _examine(folder: Path, name: str, rank: int = 0, world: int = 1) -> dict:
    """The JSON file `name`, once it and the files that it lists are found whole. The ranks share the work."""
    with reading(folder / name):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        own = content.pop("sha256", None)  # a file made by hand has none
        expect(own in (None, _checksum(content)), "it is damaged, its checksum differs")
    for other, entry in sorted(content.get("files", {}).items())[rank::world]:
        with reading(folder / other):
            expect(entry["sha256"] == _checksum(folder / other), "it is damaged, its checksum differs")
    return content


def _load_tensors(path: Path):
    """torch.load that runs no code from the file (weights_only) and reads a tensor when it is used (mmap)."""
    with reading(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def main() -> None:
    """Make final/ of the first model in a step folder, without its code, a process group or a GPU."""
    expect(len(sys.argv) == 2, "usage: python -m lib.checkpoint out/run/step-00000300")
    folder = Path(sys.argv[1])
    meta, config, state = _examine(folder, "meta.json"), _examine(folder, "config.json"), {}
    key, units = next(iter(meta["layout"].items()))
    shards = [_load_tensors(folder / f"rank{r:03d}.pt")[key] for r in range(meta["world"])]
    for unit, tensors in units.items():
        flat = torch.cat([shard["units"][unit]["master"] for shard in shards])
        for names, shape, first in tensors:
            state |= dict.fromkeys(names, flat[first:first + torch.Size(shape).numel()].view(shape).clone())
    lock = claim(str(folder.parent), resume=True)  # noqa: F841 - held until this function returns
    save_final(folder.parent, state | shards[0]["buffers"], config, folder / "tokenizer.json")


if __name__ == "__main__":
    start(main)
