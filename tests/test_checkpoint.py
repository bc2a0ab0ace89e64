"""Checkpoints: whole or not there, loadable at any world size and stage, and never trusted."""
import errno
import functools
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from unittest import mock

import pytest
import torch
from fuzz import Malicious, make_models, put_shard, resign
from ranks import RankFailed, ranks
from test_zero import CLIP, DECAY, LR, assert_equal, loss_of, near
from test_zero import make as make_model

from lib import checked, checkpoint
from lib.checkpoint import consolidate, load_checkpoint, load_final, save_checkpoint, save_final, steps
from lib.program import UserError
from model import GPT, GPTConfig, load_model
from zero import Zero

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def training(stage, kind="tied", **options):
    model = make_model(kind)
    return Zero(model, units=model.units(), stage=stage, lr=LR, weight_decay=DECAY, **options)


def train(z, first, last):
    """Steps first+1..last of a run whose data do not depend on the number of ranks: 6 rows a step."""
    for z.model.step in range(first + 1, last + 1):
        ids = torch.randint(0, 33, (6, 13), generator=torch.Generator().manual_seed(z.model.step))
        z.backward(loss_of(z.model, ids[z.comm.rank::z.comm.world], 72))
        z.step(LR, CLIP)


def moments(z):
    """The optimizer's state as whole vectors, whatever the sharding."""
    whole = {}
    for unit in z.units:
        for key, vector in checkpoint._vectors(unit).items():
            full = torch.zeros(unit.shard_size * z.comm.world)
            if z.stage == 0 or z.comm.world == 1:
                full[:vector.numel()] = vector
            else:
                padded = torch.zeros(unit.shard_size)
                padded[:vector.numel()] = vector
                z.comm.all_gather(full, padded)
            whole[unit.name, key] = full[:unit.end if key != "master" and z.comm.world == 1 else unit.length].clone()
    return whole


def run_part(out, stage, first, last, kind="tied"):
    """Resume `out` if it holds anything, train to `last`, save. Returns (step it began with, weights, optimizer
    state)."""
    z = training(stage, kind)
    found = load_checkpoint(out, {"model": z})
    at_load = moments(z)
    assert (found[0] if found else 0) == first
    train(z, first, last)
    save_checkpoint(out, last, {"model": z}, {"seen": 6 * last})
    return found, z.full_state_dict(), at_load, moments(z)


@pytest.mark.parametrize("kind", ["tied", "odd"])
def test_reshard_at_any_world_size_and_stage(tmp_path, kind):
    """2 -> 3 -> 1 -> 2 ranks at stages 3, 2, 0, 1: the optimizer state right after each load is bitwise what was
    saved, and the end is that of an uninterrupted run to 1e-5; extra comes back. Also of units that are frozen, partly
    or wholly: they have fewer moments than weights, or none."""
    out, saved = str(tmp_path), None
    for world, stage, first, last in ((2, 3, 0, 2), (3, 2, 2, 4), (1, 0, 4, 6), (2, 1, 6, 8)):
        part = ranks().run(world, run_part, out, stage, first, last, kind)[0]
        found, state, at_load, at_end = part
        if saved:
            assert found == (first, {"seen": 6 * first})
            for key, vector in saved.items():
                n = min(vector.numel(), at_load[key].numel())
                assert torch.equal(vector[:n], at_load[key][:n]), key
        saved = at_end
    z = training(0, kind)
    train(z, 0, 8)
    expected = z.full_state_dict()
    assert near(state, expected, 1e-5)


@pytest.mark.parametrize("world, stage, kind", [(1, 0, "tied"), (1, 3, "odd"), (2, 0, "tied"), (2, 3, "tied")])
def test_resume_is_bitwise(tmp_path, world, stage, kind):
    """Stopping and going on at the same world size ends in the same bits, also where stage 0 resumes as stage 3."""
    out, at_once = str(tmp_path / "out"), str(tmp_path / "at once")
    ranks().run(world, run_part, out, stage, 0, 3, kind)
    _, state, *_ = ranks().run(world, run_part, out, 3 - stage, 3, 6, kind)[0]
    _, expected, *_ = ranks().run(world, run_part, at_once, stage, 0, 6, kind)[0]
    assert_equal(state, expected)


def test_the_loss_scale_and_its_counts_come_back(tmp_path):
    """A float16 run goes on with the scale it had found and with the counts of good and of skipped steps."""
    for numbers in ((0, 1.0, 0, 0), (7, 2.0**9, 5, 3)):  # the second load has something to change
        saved, loaded = (training(0, dtype=torch.float16) for _ in range(2))
        for key, number in zip(checkpoint.SCALARS, numbers):
            setattr(saved, key, number)
        save_checkpoint(str(tmp_path), 1, {"model": saved}, {})
        load_checkpoint(str(tmp_path), {"model": loaded})
        assert (loaded.updates, loaded.loss_scale, loaded.good_steps, loaded.skipped) == numbers


def test_consolidate_equals_full_state_dict(tmp_path):
    """One process without torch.distributed reads a two-rank checkpoint; tied names are both there; files open with a
    plain torch.load(weights_only=True)."""
    state = ranks().run(2, run_part, str(tmp_path), 3, 0, 2)[0][1]
    folder = str(tmp_path / "step-00000002")
    assert_equal(consolidate(folder), state)
    assert {"embed.weight", "head.weight"} <= state.keys()
    for name in ("rank000.pt", "rank001.pt"):
        assert torch.load(os.path.join(folder, name), weights_only=True)["model"]["units"]
    with pytest.raises(UserError, match="holds model, not actor"):
        consolidate(folder, "actor")


def test_only_the_newest_are_kept(tmp_path):
    """keep=2 keeps two; nothing else stands in the folder; during a save there are at most three, also after one that
    was killed before it threw the oldest away."""
    z, out, most = training(0), str(tmp_path), []
    real = checked.write_file
    with mock.patch.object(checked, "write_file", lambda *a: most.append(len(os.listdir(out))) or real(*a)):
        for step in range(1, 4):
            save_checkpoint(out, step, {"model": z}, {}, keep=2)
        with mock.patch.object(checkpoint, "_hide_folder", mock.Mock(side_effect=KeyboardInterrupt)), \
                pytest.raises(KeyboardInterrupt):
            save_checkpoint(out, 4, {"model": z}, {}, keep=2)
        assert len(steps(out)) == 3
        for _ in range(2):
            save_checkpoint(out, 5, {"model": z}, {}, keep=2)  # the same step again replaces it
    assert sorted(os.listdir(out)) == ["step-00000004", "step-00000005"] and max(most) == 3


# ---- crashes --------------------------------------------------------------------------------------------------------

def save_and_die(out, rank, point):
    """A save during which `rank` is killed: at its shard, after it, at meta.json, before or after the rename."""
    z = training(3)
    assert load_checkpoint(out, {"model": z})[0] == 2
    train(z, 2, 3)
    die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    if z.comm.rank == rank:
        real_write, real_rename = checked.write_file, os.rename

        def write(path, content):
            name = os.path.basename(path)
            if point == "inside the shard" and name.startswith("rank"):
                with open(path, "wb") as file:
                    file.write(b"half")
                die()
            entry = real_write(path, content)
            if (point, name) in (("after the shard", f"rank{rank:03d}.pt"), ("after meta", "meta.json")):
                die()
            return entry

        def rename(old, new):
            real_rename(old, new)
            if point == "after the rename":
                die()

        checked.write_file, os.rename = write, rename
    save_checkpoint(out, 3, {"model": z}, {"seen": 18})


POINTS = [(0, "inside the shard"), (1, "inside the shard"), (1, "after the shard"), (0, "after meta"),
          (0, "after the rename")]


@pytest.mark.parametrize("rank, point", [POINTS[1], POINTS[3], *(pytest.param(*p, marks=pytest.mark.slow)
                                                                 for p in (POINTS[0], POINTS[2], POINTS[4]))])
def test_killed_inside_a_save(tmp_path, rank, point):
    """kill -9 of a rank at any point of a save: the other rank ends with an error, no step folder is ever partial,
    and the run goes on at 1, 2 or 3 ranks from the last whole one."""
    ranks().run(2, run_part, str(tmp_path / "run"), 3, 0, 2)
    with pytest.raises(RankFailed) as failure:
        ranks().run(2, save_and_die, str(tmp_path / "run"), rank, point, patience=5)
    assert failure.value.answers[rank] is None
    survivor = failure.value.answers[1 - rank]
    assert survivor[0] == "error" and "LostRanks" in survivor[1] and f"rank {rank}" in survivor[1]
    assert "free space" not in survivor[1]  # that is for disks that are full
    whole = 3 if point == "after the rename" else 2
    assert steps(str(tmp_path / "run"))[0] == f"step-{whole:08d}"
    reference = training(0)
    train(reference, 0, 4)
    expected = reference.full_state_dict()
    for world in (1, 2, 3):
        out = str(tmp_path / f"copy{world}")
        shutil.copytree(tmp_path / "run", out)
        checkpoint.claim(out, resume=True).close()  # clears away what is left
        state = ranks().run(world, run_part, out, 3, whole, 4)[0][1]
        assert near(state, expected, 1e-5)
        assert all(name.startswith("step-") or name == "lock" for name in os.listdir(out))


@pytest.mark.parametrize("what", ["final", "step-00000001"])
def test_killed_between_two_renames(tmp_path, what):
    """The same step, or final/, saved again replaces a folder by two renames. A kill between them leaves none under its
    name; claim() gives the old one its name back, and clears away what else a kill has left."""
    z, out = training(0), str(tmp_path / "out")
    save_checkpoint(out, 1, {"model": z}, {})
    save_final(out, {"a": torch.zeros(3)}, {}, __file__)
    rename = os.rename

    def save_again():
        os.rename = lambda old, new: rename(old, new) if "tmp-old" in new else os._exit(9)
        save_final(out, {}, {}, __file__) if what == "final" else save_checkpoint(out, 1, {"model": z}, {})

    child = multiprocessing.get_context("fork").Process(target=save_again)
    child.start()
    child.join(60)
    assert child.exitcode == 9 and not os.path.exists(os.path.join(out, what))
    checkpoint.claim(out, resume=True).close()
    assert load_checkpoint(out, {"model": z})[0] == 1 and load_final(out)[1].keys() == {"a"}
    for left in (f"tmp-old-{what}", "tmp-final", "tmp-00000007"):  # killed a moment later, or in the middle of a save
        shutil.copytree(os.path.join(out, what), os.path.join(out, left))
    checkpoint.claim(out, resume=True).close()
    assert sorted(os.listdir(out)) == ["final", "lock", "step-00000001"]


def test_a_folder_killed_while_it_is_thrown_away_does_not_come_back(tmp_path):
    """What --keep drops is hidden, then removed; half removed, it must not get its name back."""
    z, out = training(0), str(tmp_path)
    save_checkpoint(out, 1, {"model": z}, {})
    with mock.patch.object(shutil, "rmtree"):
        save_checkpoint(out, 2, {"model": z}, {}, keep=1)
    assert len(os.listdir(out)) == 2
    checkpoint.claim(out, resume=True).close()
    assert steps(out) == ["step-00000002"]
    save_checkpoint(out, 3, {"model": z}, {}, keep=1)
    assert sorted(os.listdir(out)) == ["lock", "step-00000003"]


def save_with_a_bug(out):
    """A save in which rank 1 meets an error that nobody foresaw."""
    z = training(3)
    with pytest.MonkeyPatch.context() as patch:  # other tests will use this process
        if z.comm.rank == 1:
            patch.setattr(checkpoint, "state_shards", lambda z: {}["no such key"])
        save_checkpoint(out, 1, {"model": z}, {})


def test_an_unforeseen_error_inside_a_save_reaches_all_ranks(tmp_path):
    """A KeyError on one rank keeps its traceback there; the others do not wait for it in the collective, and nothing
    says that the disk is full."""
    with pytest.raises(RankFailed) as failure:
        ranks().run(2, save_with_a_bug, str(tmp_path), patience=60, timeout=30)
    (_, said), (_, traceback) = failure.value.answers
    assert "UserError: rank 1: KeyError('no such key')" in said and "KeyError: 'no such key'" in traceback
    assert "free space" not in said + traceback and os.listdir(tmp_path) == []


# ---- disks that fail ------------------------------------------------------------------------------------------------

def test_no_space_left(tmp_path):
    """A full disk while a shard or meta.json is written: a UserError naming the folder, nothing of the step is left,
    the earlier checkpoint is untouched."""
    z, out = training(0), str(tmp_path)
    save_checkpoint(out, 1, {"model": z}, {})
    for writes in (0, 1):
        full = [None] * writes + [OSError(errno.ENOSPC, "No space left on device")]
        with mock.patch("os.fsync", side_effect=full), pytest.raises(UserError, match="step-00000002.*No space left"):
            save_checkpoint(out, 2, {"model": z}, {})
        assert os.listdir(out) == ["step-00000001"] and load_checkpoint(out, {"model": z})[0] == 1


def test_what_fails_after_a_save_is_not_said_of_it(tmp_path):
    """The old checkpoint that cannot be removed is named, not the new one, which is whole."""
    z, out, rmtree = training(0), str(tmp_path), shutil.rmtree
    save_checkpoint(out, 1, {"model": z}, {})

    def stuck(path, **options):
        if "gone" in path and not options:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        rmtree(path, **options)

    with mock.patch.object(shutil, "rmtree", stuck), \
            pytest.raises(UserError, match="step-00000001: .*not empty; free space"):
        save_checkpoint(out, 2, {"model": z}, {}, keep=1)
    assert load_checkpoint(out, {"model": z})[0] == 2


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), OSError("No space left")])
def test_a_full_disk_under_the_lock(tmp_path, error):
    """The pid that cannot be written: one line, also where the error has a text alone."""
    with mock.patch("os.getpid", side_effect=error), pytest.raises(UserError, match="written: No space left; free"):
        checkpoint.claim(str(tmp_path), resume=False)


def test_who_holds_a_folder_is_known_at_once(tmp_path):
    """Whoever is refused while the holder still looks around reads its pid, not that of the run before."""
    (tmp_path / "lock").write_text("1")
    with mock.patch.object(checkpoint, "steps", lambda _: [(tmp_path / "lock").read_text()]), \
            pytest.raises(UserError, match=rf"holds a run \({os.getpid()}\)"):
        checkpoint.claim(str(tmp_path), resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_without_checkpoints_is_not_begun_anew(tmp_path, resume):
    """Its curve would be emptied and its model replaced."""
    save_final(str(tmp_path), {"a": torch.zeros(3)}, {}, __file__)
    with pytest.raises(UserError, match="holds final/ and no checkpoint"):
        checkpoint.claim(str(tmp_path), resume)


def limited_save(out):
    """A real limit on the size of files, so that torch.save itself meets the error in the middle."""
    z = training(0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            save_checkpoint(out, 1, {"model": z}, {})
        with pytest.raises(UserError, match="cannot be written"):
            save_final(out, {"a": torch.zeros(10_000)}, {}, __file__)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return os.listdir(out)


def test_a_write_that_fails_in_the_middle(tmp_path):
    """torch.save running into the end of the disk is a UserError and leaves nothing."""
    assert ranks().run(1, limited_save, str(tmp_path)) == [[]]


def test_folder_that_cannot_be_written():
    """A read-only or impossible folder: a UserError that names it."""
    with pytest.raises(UserError, match="/proc/none/out"):
        save_checkpoint("/proc/none/out", 1, {"model": training(0)}, {})
    with pytest.raises(UserError, match="/proc/none/out"):
        save_final("/proc/none/out", {}, {}, __file__)


# ---- files that are not what they claim -----------------------------------------------------------------------------

@pytest.fixture
def two_saved(tmp_path):
    z = training(0)
    for step in (1, 2):
        train(z, step - 1, step)
        save_checkpoint(str(tmp_path), step, {"model": z}, {"n": step}, config={"a": 1}, tokenizer_path=__file__)
    return tmp_path


def test_shapes_that_meta_makes_larger_than_the_shards_are_refused(two_saved):
    """The same numbers under 60,000 names, or shapes with a minus that hide them in a sum: before memory is taken."""
    step = two_saved / "step-00000002"
    layout = json.loads((step / "meta.json").read_text())["layout"]
    for more in ([["x"], [33, 16], 0], [["y"], [-33, 16], 0]):
        layout["model"]["root"].append(more)
        resign(step, layout=layout)
        with pytest.raises(UserError, match="meta.json: .*larger than what was saved"):
            consolidate(str(step))


def test_a_checkpoint_under_another_name_and_a_giant_meta_are_damage(two_saved, capsys):
    """A copy of step 1 that is called 300 would be saved over; a meta.json of gigabytes would be taken into memory."""
    shutil.copytree(two_saved / "step-00000001", two_saved / "step-00000300")
    with open(two_saved / "step-00000002" / "meta.json", "a") as file:
        file.write(" " * checked.MAX_BYTES)
    assert load_checkpoint(str(two_saved), {"model": training(0)})[0] == 1
    said = capsys.readouterr().err
    assert "00000300/meta.json: is that of step 1" in said and "00000002/meta.json: found more than" in said
    assert steps(str(two_saved)) == ["step-00000001"] and (two_saved / "damaged-step-00000300").is_dir()


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_digit(path):
    """Still JSON, and it could be true: only its checksum says that it is not."""
    path.write_text(path.read_text().replace('"n": ', '"n": 7'))


@pytest.mark.parametrize("damage, name", [(damage_digit, "meta.json"), *itertools.product(
    (damage_flip, damage_cut, os.remove), ("rank000.pt", "config.json", "tokenizer.json", "meta.json"))])
def test_damaged_file_is_named_and_the_previous_checkpoint_used(two_saved, capsys, name, damage):
    """A flipped byte, a lost byte, a lost file: a warning names the file, the checkpoint before is loaded; with both
    damaged, an error."""
    damage(two_saved / "step-00000002" / name)
    assert load_checkpoint(str(two_saved), {"model": training(0)}) == (1, {"n": 1})
    assert f"step-00000002/{name}" in capsys.readouterr().err
    damage(two_saved / "step-00000001" / name)
    with pytest.raises(UserError, match=f"step-00000001/{name}"):
        load_checkpoint(str(two_saved), {"model": training(0)})


@pytest.mark.parametrize("plain", [checked.PLAIN, re.compile(".*")])
def test_pickles_that_run_code_are_refused(two_saved, tmp_path, monkeypatch, plain):
    """A pickle that would create a file, in place of a shard (with matching checksums) or of model.pt, is refused
    unrun; by weights_only alone as well."""
    monkeypatch.setattr(checked, "PLAIN", plain)
    evil = Malicious(tmp_path / "trap")
    for content in (pickle.dumps(evil), torch_saved(evil), torch_saved({"model": evil})):
        for path, read in hostile(two_saved, content):
            with pytest.raises(UserError, match=path):
                read()
    assert not (tmp_path / "trap").exists()


def torch_saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def hostile(place, content):
    """Put it where it could be read: (file, what reads it), as a shard with matching checksums and as model.pt."""
    step, final = place / "step-00000002", place / "final"
    put_shard(step, content)
    final.mkdir(exist_ok=True)
    (final / "model.pt").write_bytes(content)
    (final / "config.json").write_text("{}")
    return (("step-00000002/rank000.pt", lambda: consolidate(str(step))),
            ("final/model.pt", lambda: load_final(str(final))))


class Zeros:
    """2 GB of nothing, in some 30 bytes of a pickle that weights_only lets through."""
    def __reduce__(self):
        return bytearray, (2 * 10**9,)


def doubled():
    """2^40 dictionaries, in one kilobyte."""
    content = {}
    for _ in range(40):
        content = {"a": content, "b": content}
    return content


HOSTILE = {
    "one number shown 10^12 times": lambda: {"a": torch.zeros(1).expand(10**12)},
    "one storage under many names": lambda: dict.fromkeys(map(str, range(100)), torch.zeros(10_000)),
    "no memory behind it": lambda: {"a": torch.zeros(10**12, device="meta")},
    "sparse": lambda: {"a": torch.zeros(3, 3).to_sparse()},
    "nothing, of a size": lambda: {"a": Zeros()},
    "the same dictionary under many names": doubled,
    "a zip bomb": lambda: packed(),
    "two directories": lambda: with_two_directories(packed()),
    "two directories, as torch ends a file": lambda: with_two_directories(packed(), zip64=True),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_larger_than_its_file_is_refused(two_saved, what):
    """In place of model.pt, and of a shard (with matching checksums): one line, at once and before memory is taken."""
    content = HOSTILE[what]()
    content = content if isinstance(content, bytes) else torch_saved({"model": content})
    assert len(content) < 2**20
    for path, read in hostile(two_saved, content):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(UserError, match=f"{path}: .*(hold|packed)"):
            read()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
        assert time.process_time() - start < 5


@functools.cache
def packed() -> bytes:
    """What torch saves, deflated, with a pickle behind which a gigabyte of nothing follows."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(torch_saved({"a": torch.zeros(3)}))) as old, \
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            with new.open(name, "w") as record:
                record.write(old.read(name))
                for _ in range(1000 * name.endswith("data.pkl")):
                    record.write(bytes(10**6))
    return file.getvalue()


def with_two_directories(content: bytes, zip64: bool = False) -> bytes:
    """Behind the directory of a packed zip another one, by which nothing is packed. Python takes the one that lies in
    front of the end; torch the one that the end names, or (zip64) the end that the locator names."""
    n, size, start = struct.unpack("<HII", content[-12:-2])
    plain, at = bytearray(content[start:start + size]), 0
    while at < size:
        plain[at + 10:at + 12], plain[at + 24:at + 28] = bytes(2), plain[at + 20:at + 24]  # stored; its packed size
        at += 46 + sum(struct.unpack("<HHH", plain[at + 28:at + 34]))
    first, second = (struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, n, n, size, directory)
                     for directory in (start, start + size + 56))
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
    return content[:-22] + (first + plain + second + locator if zip64 else plain) + content[-22:]


@pytest.mark.parametrize("name", ["meta.json", "rank000.pt", "config.json", "model.pt"])
def test_a_pipe_in_place_of_a_file_is_refused(two_saved, tmp_path, name):
    """To open one waits until somebody writes; that may be never."""
    (tmp_path / "tokenizer.json").write_text("{}")
    save_final(str(tmp_path), {"a": torch.zeros(3)}, {}, str(tmp_path / "tokenizer.json"))
    folder = two_saved / "step-00000002" if name in ("meta.json", "rank000.pt") else tmp_path / "final"
    (folder / name).unlink()
    os.mkfifo(folder / name)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(99))
    signal.alarm(20)
    with pytest.raises(UserError, match=f"{name}: no such file"):
        load_final(str(tmp_path))
        consolidate(str(folder))
    signal.alarm(0)


@pytest.mark.parametrize("change, words", [
    ({"n_embd": 32}, r"qkv.weight is \(48, 16\) there and \(96, 32\) here"),
    ({"n_layer": 3}, "blocks.2.*missing there"),
    ({"tie_embeddings": False}, "other units|head.weight")])
def test_checkpoint_of_another_model(two_saved, change, words):
    """The first tensor that differs is named, with both shapes."""
    shape = dict(vocab_size=33, n_layer=2, n_head=2, n_embd=16, max_seq_len=12, tie_embeddings=True)
    model = GPT(GPTConfig(**{**shape, **change}))
    with pytest.raises(UserError, match=words):
        load_checkpoint(str(two_saved), {"model": Zero(model, units=model.units())})
    with pytest.raises(UserError, match="actor: .* is missing there"):
        load_checkpoint(str(two_saved), {"actor": training(0)})


def test_other_settings_warn(two_saved, capsys):
    """Another number of threads or ranks, another micro_batch_size, another torch: loads, and says the bits will
    differ."""
    with mock.patch.object(torch, "get_num_threads", lambda: 77):
        load_checkpoint(str(two_saved), {"model": training(0)}, bitwise={"n": 3})
    warning = capsys.readouterr().err
    assert "is 77" in warning and "n was 2 and is 3" in warning and "torch" not in warning
    load_checkpoint(str(two_saved), {"model": training(0)}, bitwise={"n": 2})
    assert not capsys.readouterr().err


# ---- final models ---------------------------------------------------------------------------------------------------

def test_final_round_trip(tmp_path):
    """Weights, config and tokenizer come back; config names the tied tensors, which are stored once; saving again
    replaces the folder as a whole."""
    z, tokenizer = training(0), tmp_path / "tokenizer.json"
    tokenizer.write_text('{"kind": "byte"}')
    state = z.full_state_dict()
    for n in (1, 2):
        save_final(str(tmp_path), state, {"model": {"n": n}}, str(tokenizer))
    assert json.loads((tmp_path / "final" / "config.json").read_text()).keys() == {"model", "tied", "files", "sha256"}
    config, loaded = load_final(str(tmp_path))
    assert config.pop("files").keys() == {"model.pt", "tokenizer.json"}
    assert config == {"model": {"n": 2}, "tied": [["embed.weight", "head.weight"]]}
    assert_equal(loaded, state)
    assert loaded["embed.weight"].data_ptr() == loaded["head.weight"].data_ptr()
    assert_equal(load_final(str(tmp_path / "final"))[1], torch.load(tmp_path / "final" / "model.pt", weights_only=True))
    assert sorted(os.listdir(tmp_path)) == ["final", "tokenizer.json"]
    assert sorted(os.listdir(tmp_path / "final")) == ["config.json", "model.pt", "tokenizer.json"]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.float8_e4m3fn])
def test_weights_that_are_no_plain_floating_point_numbers_are_refused(tmp_path, dtype):
    """Complex numbers would lose half of themselves, with a warning."""
    config, weights = load_final(str(make_models(tmp_path)))
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    save_final(str(tmp_path), weights, config, str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="final/model.pt: .*expected (a )?plain"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.pt"])
def test_a_digit_that_changed_in_a_final_folder_is_noticed(tmp_path, name):
    """Still JSON, and could be true: only a checksum says that it is not."""
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    save_final(str(tmp_path), {"a": torch.ones(300)}, {"a": 1}, str(tmp_path / "tokenizer.json"))
    load_final(str(tmp_path))
    path = tmp_path / "final" / name
    path.write_bytes(path.read_bytes().replace(b'"a": 1', b'"a": 2').replace(b"\0\0\x80\x3f" * 9, b"\1\0\x80\x3f" * 9))
    with pytest.raises(UserError, match=f"final/{name}: .*damaged"):
        load_final(str(tmp_path))


@pytest.mark.parametrize("name, content, words", [
    ("config.json", b"[1]", "expected an object"), ("config.json", b"{", "config.json"),
    ("config.json", b"\xff", "config.json"),
    ("model.pt", b"", "damaged"), ("model.pt", b"PK\x03\x04 no zip", "damaged"), ("model.pt", None, "damaged")])
def test_not_a_model_folder(tmp_path, name, content, words):
    """A folder without the files, or with others in their place: a UserError that names the file."""
    (tmp_path / "tokenizer.json").write_text("{}")
    save_final(str(tmp_path), {"a": torch.zeros(3)}, {}, str(tmp_path / "tokenizer.json"))
    if content is None:
        torch.save([1, 2], tmp_path / "final" / name)
    else:
        (tmp_path / "final" / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_final(str(tmp_path))
    if name == "model.pt":  # a folder made by hand has no checksums
        (tmp_path / "final" / "config.json").write_text("{}")
        with pytest.raises(UserError, match="model.pt: "):
            load_final(str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        load_final(str(tmp_path / "nowhere"))


def test_command_line(tmp_path):
    """python checkpoint.py STEP writes final/ from a checkpoint; a wrong folder is one line and exit code 2."""
    def command(folder):
        return subprocess.run([sys.executable, "-m", "lib.checkpoint", folder], cwd=ROOT, capture_output=True, text=True)

    out, z = str(tmp_path), training(0)
    (tmp_path / "tokenizer.json").write_text("{}")
    save_checkpoint(out, 1, {"model": z}, {}, config={"c": 1}, tokenizer_path=out + "/tokenizer.json")
    done = command(out + "/step-00000001")
    assert done.returncode == 0, done.stderr
    assert_equal(load_final(out)[1], z.full_state_dict())
    with checkpoint.claim(out, resume=True):  # a run that may be writing final/ itself
        done = command(out + "/step-00000001")
    assert done.returncode == 2 and f"in use by process {os.getpid()}" in done.stderr
    done = command(out)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "meta.json" in done.stderr
