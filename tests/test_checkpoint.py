"""lib/checkpoint.py: whole or not there, loadable by any number of ranks at any stage, damage found out."""
import itertools
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import RankFailed, ranks
from test_zero import gpt, near

from lib import checkpoint
from lib.checkpoint import claim, load_checkpoint, load_final, save_final, steps
from lib.program import UserError
from zero import Zero


def make(stage=0, dtype=torch.float32, **changes) -> Zero:
    """A small model with tied weights, a frozen block, a frozen matrix in another block, and a buffer."""
    model = gpt(**{"tie_embeddings": True, "n_layer": 3, **changes})
    model.register_buffer("offset", torch.tensor(0.7))
    model.blocks[1].requires_grad_(False)
    next(model.blocks[0].parameters()).requires_grad_(False)
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


def load(out, z: Zero, **bitwise):
    return load_checkpoint(str(out), {"model": z}, same={}, bitwise=bitwise)


def run_part(out, stage, first, last, again=""):
    """Resume what `out` holds, save it `again` as it is, train to `last`, save. Returns rank 0's weights."""
    z = make(stage)
    assert load(out, z) == ((first, {"seen": 6 * first}) if first else None)
    if first:
        save(again, first, z, seen=6 * first) if again else None
    else:
        z.loss_scale = 4.0  # for a checkpoint to bring back; a power of two changes no bits
    train(z, first, last)
    save(out, last, z, seen=6 * last)
    return z.full_state_dict()


def vectors(folder: Path) -> dict:
    """What a step folder holds of each unit, as whole vectors, and the numbers beside them."""
    shards = [torch.load(path, weights_only=True)["model"] for path in sorted(folder.glob("rank*.pt"))]
    return {"scalars": shards[0]["scalars"], "buffers": shards[0]["buffers"],
            **{(unit, key): torch.cat([shard["units"][unit][key] for shard in shards]).tolist()
               for unit, kept in shards[0]["units"].items() for key in kept}}


def unbroken(last: int) -> dict:
    z = make()
    train(z, 0, last)
    return z.full_state_dict()


def test_any_world_size_and_stage_loads_any_other(tmp_path):
    """2 -> 3 -> 1 -> 2 ranks at stages 3, 2, 0, 1: masters and moments are bitwise what was saved, the end is
    near that of the unbroken run. A frozen block has no moments, a partly frozen one fewer than weights."""
    for world, stage, first, last in ((2, 3, 0, 2), (3, 2, 2, 4), (1, 0, 4, 6), (2, 1, 6, 8)):
        again = f"{tmp_path}/again" if first else ""
        state = ranks().run(world, run_part, f"{tmp_path}/out", stage, first, last, again)[0]
        if first:
            saved, loaded = (vectors(tmp_path / place / f"step-{first:08d}") for place in ("out", "again"))
            assert saved == loaded and ("blocks.1", "exp_avg") not in saved
            assert saved["scalars"] == dict(updates=first, loss_scale=4.0, good_steps=first, skipped=0)
    assert near(state, unbroken(8), 1e-5)


@pytest.mark.parametrize("world, stage", [(1, 3), (2, 0), (2, 3)])
def test_going_on_is_bitwise_not_stopping(tmp_path, world, stage):
    """At the same world size, also where stage 0 goes on as stage 3."""
    ranks().run(world, run_part, str(tmp_path / "out"), stage, 0, 3)
    state = ranks().run(world, run_part, str(tmp_path / "out"), 3 - stage, 3, 6)[0]
    assert near(state, ranks().run(world, run_part, str(tmp_path / "at once"), stage, 0, 6)[0], 0)


def test_one_process_makes_a_model_of_two_ranks_checkpoint(tmp_path, monkeypatch):
    """full_state_dict() of the run, by the command line. A run at work is left alone."""
    state, folder = ranks().run(2, run_part, str(tmp_path), 3, 0, 2)[0], tmp_path / "step-00000002"
    assert {"embed.weight", "head.weight", "offset"} <= state.keys()
    monkeypatch.setattr("sys.argv", ["lib.checkpoint", f"{folder}/"])
    lock = claim(str(tmp_path), resume=True)
    with pytest.raises(UserError, match="in use by another run; choose another --out"):
        checkpoint.main()
    lock.close()
    checkpoint.main()
    config, weights = load_final(str(tmp_path))
    assert near(weights, state, 0) and config["a"] == 1


def test_settings_that_differ_are_named(tmp_path, capsys, monkeypatch):
    """The run goes on. Threads count as well, since the order of sums depends on them."""
    save(tmp_path, 1, make(), lr=0.001, b=[1, 2])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    load(tmp_path, make(), lr=0.002, b=[1, 2])
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/step-00000001: lr was 0.001 and is 0.002, threads was 1 and is 77: going on, "
        "but not bit for bit as the unbroken run\n")


@pytest.mark.parametrize("change", [{"n_embd": 32}, {"n_layer": 2}, {"tie_embeddings": False}])
def test_a_checkpoint_of_another_model(tmp_path, change):
    save(tmp_path, 1, make())
    with pytest.raises(UserError, match="step-00000001: has another model; choose another --out"):
        load(tmp_path, make(**change))


def test_only_the_newest_stay(tmp_path, monkeypatch):
    """What goes is renamed first, so that no half of it keeps its name."""
    z = make()
    for z.updates, step in enumerate((1, 2, 3, 4)):
        save(tmp_path, step, z, n=step)
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]
    assert load(tmp_path, z) == (4, {"n": 4}) and z.updates == 3
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    save(tmp_path, 5, z)
    assert [path.name for path in steps(tmp_path)] == ["step-00000005", "step-00000004"]


def test_who_may_take_a_folder(tmp_path):
    """One run at a time; one that has begun is gone on with; a finished model alone is kept. What a killed
    save has left is cleared away, and nothing else."""
    out, first = str(tmp_path), claim(str(tmp_path), resume=False)
    with pytest.raises(UserError, match="in use by another run;"):
        claim(out, resume=True)
    first.close()
    for name in ("step-00000002.tmp-0123abcd", "step-00000001.tmp-gone", "final.tmp-0123abcd", "tmp-mine"):
        (tmp_path / name).mkdir()
    save_final(out, {"a": torch.zeros(3)}, {}, __file__)
    for resume in (False, True):
        with pytest.raises(UserError, match="holds a run; choose another --out"):
            claim(out, resume)
    save(out, 1, make())
    with pytest.raises(UserError, match="holds a run; .* by --resume"):
        claim(out, resume=False)
    claim(out, resume=True).close()
    assert sorted(os.listdir(out)) == ["final", "lock", "step-00000001", "tmp-mine"]


def save_and_die(out, rank, point):
    """A save during which `rank` is killed."""
    z = make(3)
    assert load(out, z)[0] == 2
    train(z, 2, 3)
    if z.comm.rank == rank:
        replace, die = os.replace, lambda: os.kill(os.getpid(), signal.SIGKILL)
        if point == "inside the shard":
            torch.save = lambda shard, path: (path.write_bytes(b"half"), die())
        os.replace = lambda old, new: (point == "after the rename" and replace(old, new), die())
    save(out, 3, z, seen=18)
    torch.distributed.barrier()


@pytest.mark.parametrize("rank, point", [(0, "inside the shard"), (1, "inside the shard"),
                                         (0, "before the rename"), (0, "after the rename")])
def test_killed_inside_a_save(tmp_path, rank, point):
    """The other rank ends with an error, no folder is partial, 1 or 3 ranks go on from the last whole one."""
    ranks().run(2, run_part, str(tmp_path / "run"), 3, 0, 2)
    with pytest.raises(RankFailed) as failure:
        ranks().run(2, save_and_die, str(tmp_path / "run"), rank, point, patience=5)
    died, survived = failure.value.answers[rank], failure.value.answers[1 - rank]
    assert died is None and survived[0] == "error" and "free space" not in survived[1]  # as on a full disk
    whole = 3 if point == "after the rename" else 2
    assert steps(tmp_path / "run")[0].name == f"step-{whole:08d}"
    for world in (1, 3):
        out = shutil.copytree(tmp_path / "run", tmp_path / f"copy{world}")
        claim(str(out), resume=True).close()
        assert near(ranks().run(world, run_part, str(out), 3, whole, 4)[0], unbroken(4), 1e-5)
        assert not [name for name in os.listdir(out) if "tmp" in name]


def test_a_full_disk(tmp_path):
    """At meta.json (test_faults: at tensors). A UserError names the folder; nothing of the step is left."""
    save(tmp_path, 1, make())
    full = mock.Mock(side_effect=[None, None, None, OSError(28, "No space left")])  # at meta.json
    with mock.patch("os.fsync", full), pytest.raises(UserError, match="2: cannot be written: No space left;"):
        save(tmp_path, 2, make())
    assert os.listdir(tmp_path) == ["step-00000001"] and load(tmp_path, make())[0] == 1
    for action in (lambda: save("/proc/none", 1, make()), lambda: save_final("/proc/none", {}, {}, __file__),
                   lambda: claim("/proc/none", resume=False)):
        with pytest.raises(UserError, match="/proc/none.*: cannot be written"):
            action()


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def digit(path):
    """Still JSON, and it could be true: only its checksum says that it is not."""
    path.write_text(path.read_text().replace('"n": ', '"n": 7'))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = (flip, cut, os.remove)


@pytest.mark.parametrize("damage, name", [(digit, "meta.json"), *itertools.product(
    DAMAGE, ("rank000.pt", "config.json", "tokenizer.json", "meta.json"))])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, capsys, damage, name):
    """It is moved aside, so that it does not count as one of those that stay. With all damaged: an error."""
    for step in (1, 2):
        save(tmp_path, step, make(), n=step)
    damage(tmp_path / "step-00000002" / name)
    assert load(tmp_path, make()) == (1, {"n": 1})
    assert f"warning: {tmp_path}/step-00000002/{name}: " in capsys.readouterr().err
    assert sorted(path.name[:21] for path in tmp_path.iterdir()) == ["damaged-step-00000002", "step-00000001"]
    damage(tmp_path / "step-00000001" / name)
    with pytest.raises(UserError, match="no checkpoint is whole"):
        load(tmp_path, make())
    assert (tmp_path / "step-00000001").exists()


def test_a_final_model_comes_back(tmp_path):
    """Weights and config; tied tensors are stored once; saving again replaces the folder as a whole."""
    state = make().full_state_dict()
    for n in (1, 2):
        save_final(str(tmp_path), state, {"model": {"n": n}}, __file__)
    config, loaded = load_final(str(tmp_path))
    assert config["model"] == {"n": 2} and config["files"].keys() == {"model.pt", "tokenizer.json"}
    assert near(loaded, state, 0) and loaded["embed.weight"].data_ptr() == loaded["head.weight"].data_ptr()
    assert near(torch.load(tmp_path / "final" / "model.pt", weights_only=True), state, 0)
    assert load_final(str(tmp_path / "final"))[0] == config
    assert os.listdir(tmp_path) == ["final"] and len(os.listdir(tmp_path / "final")) == 3


@pytest.mark.parametrize("damage, name", [(digit, "config.json"), (digit, "tokenizer.json"), *(
    itertools.product(DAMAGE, ("config.json", "tokenizer.json", "model.pt")))])
def test_a_damaged_final_model_is_refused(tmp_path, damage, name):
    (tmp_path / "tokenizer.json").write_text('{"n": 1}')
    save_final(str(tmp_path), {"a": torch.ones(300)}, {"n": 1}, str(tmp_path / "tokenizer.json"))
    damage(tmp_path / "final" / name)
    with pytest.raises(UserError, match=f"final/{name}: cannot be read"):
        load_final(str(tmp_path))


class Trap:
    """Unpickled, it makes a folder."""
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_no_code_from_a_file_is_run(tmp_path, monkeypatch):
    """As model.pt of a folder made by hand, without checksums: refused in one line, the trap not sprung."""
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text("{}")
    torch.save({"a": Trap()}, "model.pt")
    with pytest.raises(UserError, match="model.pt: cannot be read"):
        load_final(".")
    assert not Path("sprung").exists()
