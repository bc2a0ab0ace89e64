"""Checkpoints that are whole or not there: one folder per step, one file of flat shards per rank.

    out/step-00000300/   config.json, tokenizer.json, rank000.pt ..., meta.json (last: sizes and sha256 of all others)
    out/final/           config.json, tokenizer.json, model.pt (plain {name: tensor})

A folder is made as tmp-*, flushed to the disk and renamed when all ranks agree, so step-* is never half a checkpoint.
Shards are slices of flat vectors, so any world size and any ZeRO stage loads what any other has written.
Every torch.load is weights_only, which refuses to run code from a file.
"""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import sys
import zipfile
from functools import partial

import torch

from common import LostRanks, UserError, run, sync, together
from model import GPT, GPTConfig
from tokenizer import Tokenizer
from zero import Zero
from zero_tools import rank_and_world

VERSION = 1


def save_checkpoint(out: str, step: int, models: dict[str, Zero], extra: dict, *, keep: int = 2,
                    config: dict | None = None, tokenizer_path: str | None = None) -> str:
    """Write out/step-XXXXXXXX; all ranks call it. extra: JSON-able, given back by load_checkpoint. Returns the folder.

    Raises UserError on all ranks alike when any of them cannot write; then nothing of this step is left behind.
    """
    rank, world = rank_and_world()
    folder, tmp = os.path.join(out, f"step-{step:08d}"), os.path.join(out, f"tmp-{step:08d}")

    @_explaining(folder)
    def prepare():
        for name in os.listdir(out) if os.path.isdir(out) else []:
            if re.fullmatch(r"tmp-((old|gone)-step-)?\d{8}", name):  # of a save that was killed
                shutil.rmtree(os.path.join(out, name))
        os.makedirs(tmp)

    @_explaining(folder)
    def write_shard():
        return _write_all(tmp, {f"rank{rank:03d}.pt": {key: state_shards(z) for key, z in models.items()}})

    @_explaining(folder)
    def finish():
        files = {name: entry for written in shards for name, entry in written.items()}
        files |= _write_all(tmp, {"config.json": config, "tokenizer.json": tokenizer_path})
        meta = {"version": VERSION, "step": step, "world": world, "threads": torch.get_num_threads(),
                "torch": torch.__version__, "layout": {key: layout(z) for key, z in models.items()},
                "files": files, "extra": extra}
        _write_all(tmp, {"meta.json": {**meta, "sha256": _digest(meta)}})
        _replace_folder(tmp, folder)
        saved = steps(out)
        here = saved.index(os.path.basename(folder))
        for name in saved[:here] + saved[here + keep:]:  # later ones: damaged, or this run had begun with them
            shutil.rmtree(_hide_folder(os.path.join(out, name), "gone"))

    try:
        together(prepare if rank == 0 else None)
        shards = together(write_shard)
        together(finish if rank == 0 else None)
    except Exception:
        if rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        raise
    return folder


def load_checkpoint(out: str, models: dict[str, Zero], *, same: dict | None = None, numbers=(),
                    bitwise: dict | None = None) -> tuple[int, dict] | None:
    """Restore the newest whole checkpoint of `out`; all ranks call it. Returns (step, extra), None if there is none.

    A damaged one is named in a warning and the one before it is taken; UserError if all are damaged, or the newest
    whole one is of another model or lacks what this run needs of extra: the values of `same`, and numbers >= 0 under
    the names in `numbers`. bitwise: settings of this run (as micro_batch_size) that should equal those in extra, or
    else, as with another world size, number of threads or PyTorch, a warning says that the last bits will differ.
    """
    rank, world = rank_and_world()
    problem = None
    for name in together((lambda: steps(out)) if rank == 0 else None)[0]:
        folder = os.path.join(out, name)
        try:
            meta = together(partial(_examine, folder, slice(rank, None, world)))[0]  # each rank hashes its share
        except UserError as error:
            if isinstance(error, LostRanks):
                raise
            problem = error
            print(f"warning: {error}; trying the checkpoint before it", file=sys.stderr) if rank == 0 else None
            continue
        _check_layout(folder, meta["layout"], {key: layout(z) for key, z in models.items()})
        extra, path = meta["extra"], os.path.join(folder, "meta.json")
        for key, value in (same or {}).items():
            _expect(extra.get(key) == value, f"{path}: is of a run with another {key}; choose another --out")
        for key in numbers:
            _expect(_is_number(extra.get(key)), f"{path}: expected a number as {key}")
        for key, z in models.items():
            with _reading(folder):
                load_shards(z, _read_shards(folder, meta, key))
        now = {"threads": torch.get_num_threads(), "torch": torch.__version__, "world": world, **(bitwise or {})}
        changed = [f"{key} was {was!r:.80} and is {value!r:.80}" for key, value in now.items()
                   if (was := meta.get(key, extra.get(key))) != value]
        if changed and rank == 0:
            print(f"warning: {folder}: {', '.join(changed)}: going on, but the last bits will differ", file=sys.stderr)
        return meta["step"], extra
    _expect(not problem, f"{problem}; no checkpoint in {out} is whole: remove them, or choose another --out")
    return None


def consolidate(folder: str, key: str = "model") -> dict[str, torch.Tensor]:
    """{name: tensor} of one model in a step folder: one process, no torch.distributed, no GPU, no model code."""
    meta = _examine(folder, slice(None))
    _expect(key in meta["layout"], f"{folder}: holds {', '.join(meta['layout'])}, not {key}")
    shards, state = _read_shards(folder, meta, key), {}
    with _reading(os.path.join(folder, "meta.json")):
        for unit, tensors in meta["layout"][key].items():
            flat = torch.cat([shard["units"][unit]["master"] for shard in shards])
            for names, shape, start in tensors:
                state |= dict.fromkeys(names, flat[start:start + math.prod(shape)].view(shape).clone())
        return state | shards[0]["buffers"]


# ---- what of a Zero is in a checkpoint ------------------------------------------------------------------------------

SCALARS = ("updates", "loss_scale", "good_steps", "skipped")


def layout(z: Zero) -> dict:
    """JSON-able: which tensors lie in which flat vector. A checkpoint must match it; world size and stage are free."""
    return {unit.name: [[[name for name, _, _ in slot.places], list(slot.shape), slot.start] for slot in unit.slots]
            for unit in z.units}


def _vectors(unit) -> dict[str, torch.Tensor]:
    """What is kept of a unit; each begins at element unit.low of its flat vector."""
    return {key: getattr(unit, key) for key in ("master", "exp_avg", "exp_avg_sq")[:3 if unit.trainable else 1]}


def state_shards(z: Zero) -> dict:
    """This rank's part of all that training needs: {"units": {unit: {vector: (n,) tensor}}, "buffers", "scalars"}.

    A vector is master, exp_avg or exp_avg_sq: elements [r S, (r+1) S) of the flat one, without the padding at its end.
    """
    def compact(x: torch.Tensor) -> torch.Tensor:
        """In main memory, for machines without a GPU; in a storage of its own, since torch.save writes whole ones."""
        x = x.cpu()
        return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x

    units = {}
    for unit in z.units:
        first, last = (min(r * unit.S, unit.length) - unit.low for r in (z.comm.rank, z.comm.rank + 1))
        units[unit.name] = {key: compact(vector[first:last]) for key, vector in _vectors(unit).items()}
    return {"units": units, "buffers": {name: compact(x) for name, x in z.model.state_dict().items()},
            "scalars": {key: getattr(z, key) for key in SCALARS}}


@torch.no_grad()
def load_shards(z: Zero, shards: list[dict]) -> None:
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
        with _explaining(folder):
            shutil.rmtree(tmp, ignore_errors=True)
            os.makedirs(tmp)
            config["files"] = _write_all(tmp, {"model.pt": state_dict, "tokenizer.json": tokenizer_path})
            _write_all(tmp, {"config.json": {**config, "sha256": _digest(config)}})
            _replace_folder(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return folder


def final_folder(folder: str) -> str:
    """The folder of the finished model, given that folder or the run's."""
    final = os.path.join(folder, "final")
    return final if os.path.isdir(final) else folder


def load_model(folder: str, head: str = "", **changes) -> tuple[GPT, Tokenizer, dict]:
    """(model, tokenizer, config) of a finished run. head: "lm" or "scalar", a new one if the model has the other;
    changes: fields of GPTConfig that are no weights, as attention."""
    folder = final_folder(folder)
    config, weights = load_final(folder)
    tokenizer = Tokenizer.load(os.path.join(folder, "tokenizer.json"))
    _expect(isinstance(config.get("model"), dict) and config.get("head") in ("lm", "scalar"),
            f'{folder}/config.json: expected "model" and "head", as training scripts write them')
    shape = GPTConfig.from_dict({**config["model"], **changes}, folder)
    _expect(shape.vocab_size == tokenizer.vocab_size,
            f"{folder}: the model has {shape.vocab_size} tokens, its tokenizer {tokenizer.vocab_size}")
    # config.json may claim any size. What follows from it is compared with the weights before memory is taken.
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    found = shape.n_layer, (shape.vocab_size, shape.n_embd), shape.max_seq_len * shape.n_embd // shape.n_head <= 2**27
    with _reading(os.path.join(folder, "config.json")):
        _expect(found == (layers, tuple(weights["embed.weight"].shape), True),
                f"{folder}/config.json: its sizes are not those of the weights in model.pt, or too large to be true")
        with torch.device("meta"):
            GPT(shape, head=head or config["head"]).load_weights(weights, folder)
    model = GPT(shape, head=head or config["head"])
    model.load_weights(weights, folder)
    return model, tokenizer, config


def load_final(folder: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(config, {name: tensor}) of a folder that save_final wrote, or of the run's; tensors are read when used."""
    folder = final_folder(folder)
    config = _read_json(os.path.join(folder, "config.json"))
    own = config.pop("sha256", None)  # a folder made by hand may lack it, and "files"
    _expect(own in (None, _digest(config)), f"{folder}/config.json: its checksum is not its own; the file is damaged")
    files = config.setdefault("files", {})
    _expect(isinstance(files, dict), f"{folder}/config.json: expected 'files' to be of type dict")
    for name in {"model.pt", "tokenizer.json"} & files.keys():
        _verify(folder, name, files[name])
    state = _load(os.path.join(folder, "model.pt"))
    _expect(isinstance(state, dict) and all(isinstance(t, torch.Tensor) for t in state.values()) and
            all(isinstance(name, str) for name in state),
            f"{folder}/model.pt: expected a plain {{name: tensor}} dictionary")
    return config, state


# ---- the run's folder -----------------------------------------------------------------------------------------------

def claim(out: str, resume: bool):
    """Take `out` for this run (rank 0 alone calls it); keep what is returned until the process ends.

    UserError if another run holds it, naming the holder's pid, or if it holds checkpoints and this run does not resume.
    The kernel drops a flock when its holder dies, however it dies, so there is no stale lock to clean up.
    """
    path = os.path.join(out, "lock")
    try:
        os.makedirs(out, exist_ok=True)
        file = open(path, "a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for old in [name for name in os.listdir(out) if re.fullmatch(r"tmp-old-(step-\d{8}|final)", name)]:
            hidden, folder = (os.path.join(out, name) for name in (old, old.removeprefix("tmp-old-")))
            shutil.rmtree(hidden) if os.path.isdir(folder) else os.rename(hidden, folder)
        newest = "".join(steps(out)[:1])
        _expect(resume or not newest, f"{out}: holds a run ({newest}); go on by --resume, or choose another --out")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{out}: in use by process {file.read().strip()}; choose another --out") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; choose another --out") from None
    return file


def steps(out: str) -> list[str]:
    """Names of the step folders in `out`, newest first."""
    names = os.listdir(out) if os.path.isdir(out) else []
    return sorted((n for n in names if re.fullmatch(r"step-\d{8}", n)), reverse=True)


def _replace_folder(tmp: str, folder: str) -> None:
    """Rename tmp to folder, for good even if the power goes."""
    sync(tmp)
    old = _hide_folder(folder, "old") if os.path.isdir(folder) else None
    os.rename(tmp, folder)
    sync(os.path.dirname(folder))
    if old:
        shutil.rmtree(old)


def _hide_folder(folder: str, why: str) -> str:
    """Out of sight before it goes off the disk: killed in the middle, no half of it stands under its name.

    why: "gone", or "old" of one that claim() gives its name back if it is killed before the new one has it."""
    out, name = os.path.split(folder)
    hidden = os.path.join(out, f"tmp-{why}-{name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    return hidden


# ---- files ----------------------------------------------------------------------------------------------------------

def _size_and_hash(path: str) -> dict:
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
        return {"bytes": file.tell(), "sha256": hashed.hexdigest()}


def _write(path: str, content: dict | str) -> dict:
    """A new file, forced to the disk: a dict as JSON or (*.pt) tensors, a path as a copy. Returns its size and hash."""
    with open(path, "wb") as file:
        if not isinstance(content, dict):
            with open(content, "rb") as source:
                shutil.copyfileobj(source, file)
        elif path.endswith(".pt"):
            try:
                torch.save(content, file)
            except RuntimeError as error:  # all that torch says of a full disk is "unexpected pos"
                raise error.__context__ or OSError(str(error)) from None
        else:
            file.write(json.dumps(content, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    return _size_and_hash(path)


def _write_all(folder: str, contents: dict) -> dict[str, dict]:
    """{name: size and hash}; None is no file."""
    return {name: _write(os.path.join(folder, name), content)
            for name, content in contents.items() if content is not None}


@contextlib.contextmanager
def _explaining(folder: str):
    """What the disk refuses becomes a line that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: could not be saved: {error}; free space or choose another --out; earlier "
                        "checkpoints are untouched") from None


@contextlib.contextmanager
def _reading(path: str):
    """Whatever a missing, damaged or hostile file makes its reader raise becomes one line that names it."""
    try:
        if not (os.path.isfile(path) or os.path.isdir(path)):  # to open a pipe could wait for ever
            raise FileNotFoundError
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a folder written by a training script") from None
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {(str(error) or repr(error)).splitlines()[0]}") from None


def _read_json(path: str) -> dict:
    with _reading(path), open(path, encoding="utf-8") as file:
        content = json.load(file)
    _expect(isinstance(content, dict), f"{path}: found {type(content).__name__}, expected an object")
    return content


def _expect(good: bool, otherwise: str) -> None:
    if not good:
        raise UserError(otherwise)


def _is_number(x) -> bool:
    """A finite one that is not negative: what counters, scales and coefficients are."""
    return isinstance(x, (int, float)) and 0 <= x < 2**63


def _examine(folder: str, part: slice) -> dict:
    """meta.json, after checking all of it that the loader relies on, and that part of the files it lists."""
    path = os.path.join(folder, "meta.json")
    meta = _read_json(path)
    _expect(meta.pop("sha256", None) == _digest(meta),
            f"{path}: its checksum is not its own; the file is damaged")
    _expect(meta.get("version") == VERSION,
            f"{path}: checkpoint version {ascii(meta.get('version'))[:40]}, this program reads {VERSION}")
    kinds = {"step": int, "world": int, "threads": int, "torch": str, "layout": dict, "files": dict, "extra": dict}
    for key, kind in kinds.items():
        _expect(isinstance(meta.get(key), kind), f"{path}: expected {key!r} to be of type {kind.__name__}")
    for name in meta["files"]:  # names are looked for in this folder and nowhere else
        _expect(re.fullmatch(r"rank\d{3,}\.pt|config\.json|tokenizer\.json", name),
                f"{path}: unexpected file {ascii(name)[:80]}")
    _expect(meta["step"] >= 0, f"{path}: expected a step >= 0, found {meta['step']}")
    _expect(sum(name.startswith("rank") for name in meta["files"]) == meta["world"] > 0 and
            all(f"rank{r:03d}.pt" in meta["files"] for r in range(meta["world"])),
            f"{path}: a world of {meta['world']} should have as many rank files")
    for name, entry in sorted(meta["files"].items())[part]:
        _verify(folder, name, entry)
    return meta


def _digest(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _verify(folder: str, name: str, expected: dict) -> None:
    path = os.path.join(folder, name)
    with _reading(path):
        found = _size_and_hash(path)
    _expect(found == expected,
            f"{path}: its {found['bytes']} bytes are not what was written: size or checksum differ; it is damaged")


def _load(path: str):
    """torch.load that runs no code from the file (weights_only) and takes no memory before it is used (mmap), nor then
    more than twice the file's size: a tied tensor stands under two names."""
    with _reading(path):
        size = os.path.getsize(path)
        with zipfile.ZipFile(path) as records:
            _expect(all(record.compress_type == zipfile.ZIP_STORED for record in records.infolist()) and
                    sum(record.file_size for record in records.infolist()) <= size,
                    f"{path}: is packed, or its parts are larger than the file; expected what torch.save writes")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors = list(_tensors(content))
        _expect(all(x.device.type == "cpu" and x.layout == torch.strided and x.is_contiguous() for x in tensors) and
                sum(x.nbytes for x in tensors) <= 2 * size,
                f"{path}: does not hold plain tensors that are as large as they claim")
        return content


def _tensors(content):
    """All tensors in nested dicts."""
    if isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, torch.Tensor):
        yield content


def _read_shards(folder: str, meta: dict, key: str) -> list[dict]:
    """What state_shards() returned for one model, for every rank of the run that saved; not yet read into memory."""
    shards = []
    for r in range(meta["world"]):
        path = os.path.join(folder, f"rank{r:03d}.pt")
        with _reading(path):
            shard = _load(path)[key]
            vectors = [vector for unit in meta["layout"][key] for vector in shard["units"][unit].values()]
            _expect(all(_is_number(shard["scalars"][name]) for name in SCALARS) and shard["scalars"]["loss_scale"] > 0
                    and all(vector.dim() == 1 and vector.is_floating_point() for vector in vectors),
                    f"{path}: does not hold what meta.json says")
        shards.append(shard)
    return shards


def _check_layout(folder: str, found: dict, expected: dict) -> None:
    """UserError naming the first tensor in which the layouts of the models differ."""
    if {key: found.get(key) for key in expected} == expected:
        return
    missing = sorted(expected.keys() - found.keys())
    _expect(not missing, f"{folder}: holds {', '.join(found)}, expected {', '.join(missing)}")
    with _reading(os.path.join(folder, "meta.json")):
        have, want = ({f"{key}: {names[0]}": tuple(shape) for key, units in layouts.items()
                       for tensors in units.values() for names, shape, _ in tensors} for layouts in (found, expected))
    for name in [*want, *have]:
        there, here = (shapes.get(name, "missing") for shapes in (have, want))
        _expect(there == here, f"{folder}: is of another model: {name} is {there} there and {here} here; choose "
                               "another --out, or the flags it was made with")
    raise UserError(f"{folder}: has the tensors of this model, but cut into other units")


def main() -> None:
    """python checkpoint.py out/run/step-00000300 [actor]: make out/run/final of a run that did not get to its end."""
    _expect(len(sys.argv) in (2, 3), "usage: python checkpoint.py out/run/step-00000300 [name of the model]")
    folder = sys.argv[1].rstrip("/")
    state, config = consolidate(folder, *sys.argv[2:]), _read_json(os.path.join(folder, "config.json"))
    print(save_final(os.path.dirname(folder) or ".", state, config, os.path.join(folder, "tokenizer.json")))


if __name__ == "__main__":
    run(main)
