"""lib/checkpoint.py: whole or not there, loadable by any number of ranks at any stage, damage found out."""
import errno
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from ranks import RankFailed, ranks

from lib import checkpoint, program
from lib.checkpoint import (
    claim,
    consolidate,
    load_checkpoint,
    load_final,
    save_final,
    steps,
)
from lib.program import UserError
from model import GPT, GPTConfig
from zero import Zero

SHAPE = dict(vocab_size=33, n_layer=3, n_head=2, n_embd=16, max_seq_len=12, tie_embeddings=True)


def make(stage=0, dtype=torch.float32, **changes) -> Zero:
    """A small model with tied weights, a frozen block, a frozen matrix in another block, and a buffer."""
    model, generator = GPT(GPTConfig(**{**SHAPE, **changes}), seed=0), torch.Generator().manual_seed(0)
    model.register_buffer("offset", torch.tensor(0.7))
    model.blocks[1].requires_grad_(False)
    next(model.blocks[0].parameters()).requires_grad_(False)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return Zero(model, units=model.units(), stage=stage, lr=1e-2, weight_decay=0.1, dtype=dtype)


def train(z: Zero, first: int, last: int) -> None:
    """Steps first+1..last of a run whose data do not depend on the number of ranks: 6 rows a step."""
    for step in range(first + 1, last + 1):
        ids = torch.randint(0, 33, (6, 13), generator=torch.Generator().manual_seed(step))
        mine = ids[z.comm.rank::z.comm.world]
        z.backward(-z.model(mine[:, :-1], mine[:, 1:]).sum() / 72)
        z.step(1e-2, 0.5)


def save(out, step: int, z: Zero, **extra) -> None:
    checkpoint.save_checkpoint(str(out), step, {"model": z}, extra, config={"a": 1}, tokenizer_path=__file__)


def run_part(out, stage, first, last, again=""):
    """Resume what `out` holds, save it `again` as it is, train to `last`, save. Returns rank 0's weights."""
    z = make(stage)
    found = load_checkpoint(out, {"model": z})
    assert found == ((first, {"seen": 6 * first}) if first else None)
    if again:
        save(again, first, z, seen=6 * first)
    train(z, first, last)
    save(out, last, z, seen=6 * last)
    return z.full_state_dict()


def vectors(folder: Path) -> dict:
    """What a step folder holds of each unit, as whole vectors, and the numbers beside them."""
    shards = [torch.load(path, weights_only=True)["model"] for path in sorted(folder.glob("rank*.pt"))]
    return {"scalars": shards[0]["scalars"], "buffers": shards[0]["buffers"],
            **{(unit, key): torch.cat([shard["units"][unit][key] for shard in shards])
               for unit, kept in shards[0]["units"].items() for key in kept}}


def near(a: dict, b: dict, far: float) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=far) for name in a)


def unbroken(last: int) -> dict:
    z = make()
    train(z, 0, last)
    return z.full_state_dict()


# ---- what comes back -------------------------------------------------------------------------------------

def test_any_world_size_and_stage_loads_any_other(tmp_path):
    """2 -> 3 -> 1 -> 2 ranks at stages 3, 2, 0, 1: masters and moments are bitwise what was saved, the end is that of
    the unbroken run to 1e-5. A frozen block has no moments, a partly frozen one has fewer than weights."""
    out = tmp_path / "out"
    for world, stage, first, last in ((2, 3, 0, 2), (3, 2, 2, 4), (1, 0, 4, 6), (2, 1, 6, 8)):
        again = tmp_path / f"again-{first}" if first else ""
        state = ranks().run(world, run_part, str(out), stage, first, last, again and str(again))[0]
        if first:
            one, other = (vectors(place / f"step-{first:08d}") for place in (out, again))
            assert one.keys() == other.keys() and ("blocks.1", "exp_avg") not in one
            assert all(torch.equal(one[key], other[key]) for key in one if isinstance(key, tuple))
            assert one["scalars"] == other["scalars"] and one["scalars"]["updates"] == first
            assert one["buffers"] == other["buffers"]
    assert near(state, unbroken(8), 1e-5)


@pytest.mark.parametrize("world, stage", [(1, 3), (2, 0), (2, 3)])
def test_going_on_is_bitwise_not_stopping(tmp_path, world, stage):
    """At the same world size, also where stage 0 goes on as stage 3."""
    ranks().run(world, run_part, str(tmp_path / "out"), stage, 0, 3)
    state = ranks().run(world, run_part, str(tmp_path / "out"), 3 - stage, 3, 6)[0]
    expected = ranks().run(world, run_part, str(tmp_path / "at once"), stage, 0, 6)[0]
    assert near(state, expected, 0)


def test_the_loss_scale_and_its_counts_come_back(tmp_path):
    for step, numbers in enumerate([(0, 1.0, 0, 0), (7, 2.0**9, 5, 3)]):  # the second has something to change
        saved, loaded = (make(dtype=torch.float16) for _ in range(2))
        for key, number in zip(checkpoint.SCALARS, numbers):
            setattr(saved, key, number)
        save(tmp_path, step, saved)
        load_checkpoint(str(tmp_path), {"model": loaded})
        assert (loaded.updates, loaded.loss_scale, loaded.good_steps, loaded.skipped) == numbers


def test_one_process_makes_a_model_of_two_ranks_checkpoint(tmp_path, monkeypatch, capsys):
    """By consolidate() and by the command line: full_state_dict() of the run. A run that is at work is left alone."""
    state, folder = ranks().run(2, run_part, str(tmp_path), 3, 0, 2)[0], tmp_path / "step-00000002"
    assert near(consolidate(str(folder)), state, 0) and {"embed.weight", "head.weight", "offset"} <= state.keys()
    with pytest.raises(UserError, match="holds model, not actor"):
        consolidate(str(folder), "actor")
    monkeypatch.setattr("sys.argv", ["lib.checkpoint", f"{folder}/"])
    lock = claim(str(tmp_path), resume=True)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}; choose another --out"):
        checkpoint.main()
    lock.close()
    checkpoint.main()
    config, weights = load_final(str(tmp_path))
    assert near(weights, state, 0) and config["a"] == 1


def test_settings_that_differ_are_named(tmp_path, capsys, monkeypatch):
    """The run goes on, unless what it cannot do without differs. A tuple is as good as JSON's list."""
    extra = {"--lr": 0.001, "--betas": (0.9, 0.95), "tokenizer": "x", "skipped": 2}
    save(tmp_path, 1, make(), **extra)

    def load(**more):
        load_checkpoint(str(tmp_path), {"model": make()}, **more)
        return capsys.readouterr().err

    assert load(same={"tokenizer": "x"}, numbers=["skipped"], bitwise={"--lr": 0.001, "--betas": (0.9, 0.95)}) == ""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert load(bitwise={"--lr": 0.002}) == (
        f"warning: {tmp_path}/step-00000001: --lr was 0.001 and is 0.002, threads was 1 and is 77: going on, but not "
        "bit for bit as the unbroken run\n")
    assert load(bitwise={"--new": 1, "--lr": 0.001}).count("older") == 1
    with pytest.raises(UserError, match="of a run with another tokenizer; choose another --out"):
        load(same={"tokenizer": "y"})
    with pytest.raises(UserError, match="expected a number as beta"):
        load(numbers=["beta"])


@pytest.mark.parametrize("change, words", [
    ({"n_embd": 32}, r"qkv.weight is \[48, 16\] there and \[96, 32\] here"), ({"n_layer": 2}, "blocks.2.* and None"),
    ({"n_layer": 4}, "blocks.3.* is None there"), ({"tie_embeddings": False}, "head.weight is None there")])
def test_a_checkpoint_of_another_model(tmp_path, change, words):
    """The first tensor that differs is named, with both shapes."""
    save(tmp_path, 1, make())
    with pytest.raises(UserError, match=f"of another model: model: .*{words}.*choose another --out"):
        load_checkpoint(str(tmp_path), {"model": make(**change)})
    with pytest.raises(UserError, match="actor: .* is None there"):
        load_checkpoint(str(tmp_path), {"actor": make()})


# ---- the folder of a run ---------------------------------------------------------------------------------

def test_only_the_newest_stay(tmp_path):
    """A step that is there already is not written again: nothing was trained since it was loaded."""
    z = make()
    for step in (1, 2, 3, 4, 4):
        save(tmp_path, step, z, n=step)
        z.updates += 1
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]
    assert load_checkpoint(str(tmp_path), {"model": z}) == (4, {"n": 4}) and z.updates == 3


def test_who_may_take_a_folder(tmp_path):
    """One run at a time; one that has begun is gone on with; a finished model alone is not overwritten. What a killed
    save has left is cleared away, and no stranger's file."""
    out = str(tmp_path)
    first = claim(out, resume=False)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()};"):
        claim(out, resume=True)
    first.close()
    for name in ("step-00000002.tmp-0123abcd", "step-00000001.tmp-gone", "final.tmp-0123abcd", "tmp-mine"):
        (tmp_path / name).mkdir()
    save_final(out, {"a": torch.zeros(3)}, {}, __file__)
    for resume in (False, True):
        with pytest.raises(UserError, match="holds final/ but no checkpoint"):
            claim(out, resume)
    save(out, 1, make())
    with pytest.raises(UserError, match="holds a run; go on by --resume"):
        claim(out, resume=False)
    claim(out, resume=True).close()
    assert sorted(os.listdir(out)) == ["final", "lock", "step-00000001", "tmp-mine"]
    with pytest.raises(UserError, match="/proc/none: cannot be written"):
        claim("/proc/none", resume=False)


# ---- crashes and disks that fail -------------------------------------------------------------------------

def save_and_die(out, rank, point):
    """A save during which `rank` is killed."""
    z = make(3)
    assert load_checkpoint(out, {"model": z})[0] == 2
    train(z, 2, 3)
    if z.comm.rank == rank:
        write, replace = checkpoint._write, os.replace

        def writing(folder, contents):
            if point == "inside the shard":
                folder.mkdir(exist_ok=True)
                (folder / f"rank{rank:03d}.pt").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return write(folder, contents)

        def replacing(old, new):
            if point == "after the rename":
                replace(old, new)
            os.kill(os.getpid(), signal.SIGKILL)

        checkpoint._write, program.os.replace = writing, replacing
    save(out, 3, z, seen=18)
    torch.distributed.barrier()


@pytest.mark.parametrize("rank, point", [(0, "inside the shard"), (1, "inside the shard"), (0, "before the rename"),
                                         (0, "after the rename")])
def test_killed_inside_a_save(tmp_path, rank, point):
    """kill -9 of a rank at any point: the other rank ends with an error, no step folder is ever partial, and the run
    goes on at 1 and 3 ranks from the last whole one."""
    ranks().run(2, run_part, str(tmp_path / "run"), 3, 0, 2)
    with pytest.raises(RankFailed) as failure:
        ranks().run(2, save_and_die, str(tmp_path / "run"), rank, point, patience=5)
    died, survived = failure.value.answers[rank], failure.value.answers[1 - rank]
    assert died is None and survived[0] == "error" and "free space" not in survived[1]  # that is for full disks
    whole = 3 if point == "after the rename" else 2
    assert steps(tmp_path / "run")[0].name == f"step-{whole:08d}"
    for world in (1, 3):
        out = tmp_path / f"copy{world}"
        shutil.copytree(tmp_path / "run", out)
        claim(str(out), resume=True).close()
        assert near(ranks().run(world, run_part, str(out), 3, whole, 4)[0], unbroken(4), 1e-5)
        assert all(name.startswith("step-") and "." not in name or name == "lock" for name in os.listdir(out))


def test_what_is_removed_is_hidden_first(tmp_path, monkeypatch):
    """Killed while an old checkpoint is removed, no half of it keeps its name."""
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    for step in (1, 2, 3):
        save(tmp_path, step, make())
    assert [path.name for path in steps(tmp_path)] == ["step-00000003", "step-00000002"]
    assert (tmp_path / "step-00000001.tmp-gone").exists()


def save_with_limit(out):
    """A real limit on the size of files, so that torch.save itself meets the error in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match="step-00000002: cannot be written: .*; free space"):
            save(out, 2, make())
        with pytest.raises(UserError, match="final: cannot be written: .*; free space"):
            save_final(out, {"a": torch.zeros(10_000)}, {}, __file__)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(tmp_path, monkeypatch):
    """While tensors or meta.json are written: a UserError naming the folder, nothing of the step is left, the earlier
    checkpoint is untouched."""
    save(tmp_path, 1, make())
    ranks().run(1, save_with_limit, str(tmp_path))
    fsync, calls = os.fsync, itertools.count(1)

    def full(descriptor):
        if next(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="step-00000002: cannot be written: No space left on device; free space"):
        save(tmp_path, 2, make())
    assert os.listdir(tmp_path) == ["step-00000001"] and load_checkpoint(str(tmp_path), {"model": make()})[0] == 1
    with pytest.raises(UserError, match="/proc/none"):
        save("/proc/none", 1, make())


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def digit(path):
    """Still JSON, and it could be true: only its checksum says that it is not."""
    path.write_text(path.read_text().replace('"n": ', '"n": 7'))


DAMAGE = {"a flipped bit": flip, "a lost end": lambda path: path.write_bytes(path.read_bytes()[:-1]),
          "an empty file": lambda path: path.write_bytes(b""), "a lost file": os.remove, "another digit": digit}


@pytest.mark.parametrize("how, name", [("another digit", "meta.json"), *itertools.product(
    list(DAMAGE)[:4], ("rank000.pt", "config.json", "tokenizer.json", "meta.json"))])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, capsys, how, name):
    """It is moved aside, so that it does not count as one of those that stay. With all damaged: an error."""
    for step in (1, 2):
        save(tmp_path, step, make(), n=step)
    DAMAGE[how](tmp_path / "step-00000002" / name)
    assert load_checkpoint(str(tmp_path), {"model": make()}) == (1, {"n": 1})
    assert f"step-00000002/{name}: " in (said := capsys.readouterr().err) and "trying the checkpoint before" in said
    assert sorted(path.name[:21] for path in tmp_path.iterdir()) == ["damaged-step-00000002", "step-00000001"]
    DAMAGE[how](tmp_path / "step-00000001" / name)
    with pytest.raises(UserError, match=f"step-00000001/{name}.*no checkpoint in .* is whole"):
        load_checkpoint(str(tmp_path), {"model": make()})
    assert (tmp_path / "step-00000001").exists()


# ---- final models ----------------------------------------------------------------------------------------

def test_a_final_model_comes_back(tmp_path):
    """Weights, config and tokenizer; tied tensors are stored once; saving again replaces the folder as a whole."""
    state = make().full_state_dict()
    for n in (1, 2):
        save_final(str(tmp_path), state, {"model": {"n": n}}, __file__)
    config, loaded = load_final(str(tmp_path))
    assert config["model"] == {"n": 2} and config["files"].keys() == {"model.pt", "tokenizer.json"}
    assert near(loaded, state, 0) and loaded["embed.weight"].data_ptr() == loaded["head.weight"].data_ptr()
    assert near(torch.load(tmp_path / "final" / "model.pt", weights_only=True), state, 0)
    assert load_final(str(tmp_path / "final"))[0] == config
    assert os.listdir(tmp_path) == ["final"] and len(os.listdir(tmp_path / "final")) == 3


@pytest.mark.parametrize("how, name", itertools.product(DAMAGE, ("config.json", "tokenizer.json", "model.pt")))
def test_a_damaged_final_model_is_refused(tmp_path, how, name):
    (tmp_path / "tokenizer.json").write_text('{"n": 1}')
    save_final(str(tmp_path), {"a": torch.ones(300)}, {"n": 1}, str(tmp_path / "tokenizer.json"))
    DAMAGE["a flipped bit" if how == "another digit" and name == "model.pt" else how](tmp_path / "final" / name)
    with pytest.raises(UserError, match=f"final/{name}: (is damaged|cannot be read)"):
        load_final(str(tmp_path))


class Trap:
    """Unpickled, it makes a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_no_code_from_a_file_is_run(tmp_path):
    """As model.pt of a folder without checksums, as those made by hand: refused in one line, the trap not sprung."""
    (tmp_path / "config.json").write_text(json.dumps({"model": {}}))
    torch.save({"a": Trap(tmp_path / "sprung")}, tmp_path / "zip")
    for content in (pickle.dumps(Trap(tmp_path / "sprung")), (tmp_path / "zip").read_bytes(), b"PK no zip"):
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(UserError, match="model.pt: cannot be read"):
            load_final(str(tmp_path))
    assert not (tmp_path / "sprung").exists()
