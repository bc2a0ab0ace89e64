"""What reward model, DPO and PPO share: batches of ranked replies, whole runs however they are computed."""
import gzip
import itertools
import json
import math
import os

import pytest
import torch
from ranks import as_torchrun, ranks
from small_chat import assert_noticed, calls_of, metrics, ranked, save_chat_model, split_by_hand, write
from test_grpo import FLAGS_OF_GRPO, REFUSED_BY_GRPO, train_grpo

import lib.run
import train_dpo
import train_ppo
import train_rm
from data import Rehearsal, Replies, Windows
from lib.checkpoint import load_final
from lib.program import UserError
from lib.records import Record, random_negatives, split
from lib.tokenizer import make_tokenizer

TOKENIZER = make_tokenizer("byte", [])
SCRIPTS = {script.__name__: script for script in (train_rm, train_dpo, train_ppo, train_grpo)}
ALL = pytest.mark.parametrize("name", SCRIPTS)


def record_of(prompt, *responses, **more) -> Record:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Record(turns, list(responses), where="f:1", **more)


def records_of(lines) -> list[Record]:
    """Records as lib.records reads them."""
    return [record_of(line["prompt"], *line["responses"], tag=line["tag"], tags=line["tags"],
                      scores=line["scores"]) for line in lines]


def make_files(folder):
    """Eleven records of ranked replies, the last one to validate; a text; models, some of them refused."""
    write(folder / "ranked.jsonl", ranked())
    (folder / "text.txt").write_text("abc def gab " * 200)
    other = make_tokenizer("char", "".join(map(chr, range(32, 288))))  # of as many tokens as there are bytes
    for name, more in (("init", {}), ("rm", {"head": "scalar"}), ("base", {"chat_template": None}),
                       ("other", {"tokenizer": other}), ("other-rm", {"tokenizer": other, "head": "scalar"})):
        save_chat_model(folder / name, **more)
    return folder


def arguments(name, files, out, *more) -> list[str]:
    """Flags of a run of any script: 7 of 10 prompts a step, four steps."""
    own = f"--reward_model {files}/rm --steps 4 --minibatches 2 --max_new_tokens 8 --group_size 7"
    own = {"train_grpo": own, "train_ppo": own.partition(" --group")[0]}.get(name, "--epochs 2.5")
    return ["--data", f"{files}/ranked.jsonl", "--init", f"{files}/init", "--out", str(out), "--lr", "3e-3",
            "--batch_size", "7", "--warmup_steps", "2", "--eval_every", "0", "--save_every", "2",
            "--log_every", "1", "--eval_prompts", "1", "--device", "cpu", *own.split(), *more]


def train(name, files, out, *more) -> list[dict]:
    """Run a script, alone or as a rank of the pool. What it logged, less what depends on the machine."""
    with as_torchrun() if torch.distributed.is_initialized() else pytest.MonkeyPatch.context() as patch:
        patch.chdir(files)
        patch.setattr(lib.run, "matmul_peak", lambda *_: 1e10)
        patch.setattr(SCRIPTS[name].Config, "adam_eps", 1e-4)  # AdamW would else make much of rounding
        assert SCRIPTS[name].main(arguments(name, files, out, *more)) == 0
    return logged(out)


def logged(out) -> list[dict]:
    machine = ("seconds", "memory", "tokens_per_second", "mfu")
    return [{key: math.nan if value is None else value for key, value in event.items()
             if not key.startswith(machine)} for event in metrics(out)]


def train_on(world, *given) -> None:
    """train() on one rank, or on two: of 7 groups, one at a time, the last forward is then padding."""
    if world == 1:
        train(*given)
    else:
        ranks().run(world, train, *given, "--zero", "3", "--micro_batch_size", "1", timeout=180)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def references(files, tmp_path_factory):
    """{(script, number of ranks): folder of a run}"""
    found = {(name, world): tmp_path_factory.mktemp("reference") for name in SCRIPTS for world in (1, 2)}
    for (name, world), out in found.items():
        train_on(world, name, files, out)
    return found


def test_every_batch_of_a_step_is_the_step():
    """Whole groups, each once, whatever the ranks and the size; as many batches on each rank. Every reply
    ends where `ends` says, and it alone is trained."""
    replies = Replies(records_of(ranked()), TOKENIZER, 96, batch_size=7, seed=3)
    assert sorted(g for step in range(11) for g in replies.of_step(step)) == sorted([*range(11)] * 7)
    chosen = replies.of_step(1)
    for world, size in itertools.product((1, 2, 3, 8), (0, 1, 5)):
        parts = [list(replies.batches(chosen, size, rank, world)) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        batches = [batch for part in parts for batch in part]
        assert sorted(i for batch in batches for i in batch.at.tolist()) == [*range(28)]
        for batch in batches:
            assert sum(batch.sizes) == len(batch.at) == batch.ends.shape[1] and batch.ids.numel() > 0
            for i, row, end in zip(batch.at.tolist(), *batch.ends.tolist()):
                ids, mask = replies.groups[chosen[i // 4]][i % 4]
                begin, targets = end + 1 - len(ids), [t if m else -100 for t, m in zip(ids[1:], mask[1:])]
                assert batch.ids[row, begin:end + 1].tolist() == ids
                assert batch.targets[row, begin:end].tolist() == targets


def test_prompts_that_are_too_long():
    """A prompt that is too long loses the same oldest turns for all its replies. If the last question and a
    reply do not fit, the record goes."""
    user, names = "x" * 30 + "yz", ("user", "assistant", "user")
    long = [{"role": role, "content": text} for role, text in zip(names, ("first", "a", user))]
    replies = Replies([record_of(long, "short", "l" * 30), record_of(user, "short", "l" * 80)], TOKENIZER, 70)
    assert len(replies) == replies.truncated == replies.dropped == 1
    for (ids, mask), text in zip(replies.groups[0], ("short", "l" * 30)):
        assert sum(mask) == len(text) + 1 and TOKENIZER.decode(ids) == (
            f"<|bos|><|user|>{user}<|end|><|assistant|>{text}<|end|>")
    assert len(nothing := Replies([record_of(user, "a", "b")], TOKENIZER, 3)) == 0 and nothing.dropped == 1


def test_no_prompt_on_both_sides():
    """Equal prompts stay together; with --val_data, training loses what validation has."""
    records = [record_of(prompt, str(n), "z") for n, prompt in enumerate("abcdaebfag")]
    training, validation = split(records, 0.3)
    assert {r.messages[0]["content"] for r in validation} == {"f", "g"}  # 2 of 7 prompts
    assert {r.responses[0] for r in training + validation} == set("0123456789")
    training, validation = split(records, 0.3, [record_of("a", "x", "y"), record_of("z", "x", "y")])
    assert {r.messages[0]["content"] for r in training} == set("bcdefg") and len(validation) == 2
    with pytest.raises(UserError, match="--val_data"):
        split(records[:1], 0.3, records)


def test_random_negatives():
    """Each best reply, n times, above a reply to another prompt; never above one of its own."""
    records = [record_of("a", "A", "x", tag="kind", scores=[1, 0]), record_of("a", "P", "y"),
               record_of("b", "B", "A"), record_of("c", "C", "z")]
    found = random_negatives(records, 200, seed=1)
    assert {(r.messages[0]["content"], *r.responses) for r in found} == {
        (prompt, best, worse) for prompt, best, others in (
            ("a", "A", "BCz"), ("a", "P", "BACz"), ("b", "B", "xPyCz"), ("c", "C", "AxPyB"))
        for worse in others}
    assert all(r.scores == [] and r.negative for r in found) and found[0].tag == "kind"
    assert 400 < len(found) < 600 and found == random_negatives(records, 200, seed=1)
    assert found != random_negatives(records, 200, seed=2)


@pytest.mark.parametrize("name", ["train_rm", "train_dpo"])
def test_a_public_file_as_it_is(files, tmp_path, name, capsys):
    """Like the harmless-base file of HH-RLHF: packed, with turns that are blank or out of order, and with
    equal replies. It trains; what is left out is counted."""
    starts = [f"\n\nHuman: What of the {n}?\n\nAssistant:" for n in range(60)]
    pairs = [{"chosen": start + " Nothing.", "rejected": start + " Do it!"} for start in starts]
    for n, odd in enumerate(("\n\nHuman: ", "\n\nAssistant: Yes.", starts[9] + " Hm.")):
        same = " " if n == 2 else " Not"
        pairs[20 * n] = {"chosen": odd + starts[n] + " Not", "rejected": odd + starts[n] + same}
    path = tmp_path / "test.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(pair) + "\n" for pair in pairs).encode()))
    train(name, files, tmp_path / "out", "--data", str(path), "--steps", "1")
    assert f"{path}: 57 used, 3 left out: " in capsys.readouterr().out
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["used"], first["left_out"], sum(first.values())) == (57, 3, 63)


@pytest.mark.parametrize("more", ["--micro_batch_size 2", "--zero 2 --offload optim", "--attention naive",
                                  "two ranks", "--val_data", "--zero 3 --activation_checkpointing"])
@ALL
def test_one_curve_however_it_is_computed(files, references, tmp_path, name, more):
    """Micro-batches, ZeRO, two ranks, other attention, the prompt that validates in a file of its own: the
    same log and the same final model, up to rounding."""
    out, same = references[name, 2] if more == "two ranks" else tmp_path, references[name, 1]
    if more != "two ranks":
        flags = split_by_hand(files / "ranked.jsonl", 10) if more == "--val_data" else more.split()
        train(name, files, out, *flags)
    for event, expected in zip(logged(out), logged(same), strict=True):
        assert event == pytest.approx(expected, rel=1e-3, abs=1e-4, nan_ok=True)
    a, b = (load_final(str(folder))[1] for folder in (same, out))
    assert all((a[key] - b[key]).abs().max() < 1e-3 for key in a)


@pytest.mark.parametrize("world", [1, 2])
@ALL
def test_resuming_is_bitwise_equal_to_not_stopping(files, references, tmp_path, name, world):
    """From the checkpoint of step 2 on: the rest of the log and the final model, to the last bit."""
    out = references[name, world]
    os.symlink(out / "step-00000002", tmp_path / "step-00000002")
    train_on(world, name, files, tmp_path, "--resume")
    assert logged(tmp_path) == [event for event in logged(out) if event["step"] > 2]
    expected, found = (load_final(str(folder))[1] for folder in (out, tmp_path))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


FLAGS = {"train_rm": ["--seed 2", "--clip 0.001", "--centre 0.5", "--negatives 1"],
         "train_dpo": ["--seed 2", "--clip 0.001", "--beta 0.5", "--pairs all", "--label_smoothing 0.1",
                       "--loss_type ipo", "--label_smoothing 0.1 --loss_type robust"],
         "train_ppo": ["--seed 2", "--clip 0.001", "--beta 0.5", "--lam 0.5", "--no-whiten_advantages",
                       "--cliprange 0.001", "--cliprange_value 0.001", "--critic_lr 1e-2", "--stop_kl 1e-9",
                       "--missing_eos_penalty 5", "--temperature 0.7", "--ppo_epochs 1", "--minibatches 1"]}
FLAGS["train_grpo"] = FLAGS_OF_GRPO


@pytest.mark.parametrize("name, more", [(name, more) for name in FLAGS for more in FLAGS[name]])
def test_every_flag_does_something(files, references, tmp_path, name, more):
    """No flag is accepted and then ignored: the log is another one."""
    assert train(name, files, tmp_path, *more.split()) != logged(references[name, 1])


@pytest.mark.parametrize("name, each", [("train_dpo", 1), ("train_ppo", 4), ("train_grpo", 2)])
def test_text_is_rehearsed(files, tmp_path, monkeypatch, name, each):
    """--ptx: each update has windows of the text of its own, also where PPO stops a step early. With a large
    weight the text becomes likelier than with a small one."""
    windows, means, backward = calls_of(monkeypatch, Windows, "batch"), [], Rehearsal.backward
    monkeypatch.setattr(Rehearsal, "backward", lambda *args: means.append(backward(*args)) or means[-1])
    runs = [[event for event in train(name, files, tmp_path / ptx, "--lr", "2e-2", "--ptx_data", "text.txt",
                                      "--ptx", ptx) if "loss/ptx_avg" in event] for ptx in ("0.01", "1")]
    assert [at for _, at, *_ in windows] == [each * (event["step"] - 1) + n for run in runs for event in run
                                                   for n in range(event.get("updates", each))]
    for event in (event for run in runs for event in run):  # the mean over a step's updates, not the last
        losses = [means.pop(0)[0]["loss/ptx_avg"] for _ in range(event.get("updates", each))]
        assert len(losses) == 1 or min(losses) < event["loss/ptx_avg"] < max(losses)
    (*_, low), (first, *_, high) = ([event["loss/ptx_avg"] for event in run] for run in runs)
    assert high < min(first, low) - 0.3


COMMON = [("--data ", "--data"), ("--data nowhere.jsonl", "nowhere.jsonl"), ("--init nowhere", "nowhere"),
          ("--init base", "train_sft.py"), ("--seq_len 1000", "--seq_len"), ("--seq_len 5", " 5"),
          ("--val_fraction 1", "--val_fraction"), ("--steps -1", "--steps")]
REFUSED = {"train_grpo": REFUSED_BY_GRPO,
    "train_dpo": [("--ref base", "train_sft.py"), ("--ref rm", "reward model"), ("--ref other", "tokenizer"),
                  ("--init rm", "reward model"), ("--beta 0", "--beta"), ("--ptx 1", "--ptx_data"),
                  ("--ptx_data text.txt", "--ptx 0.0"), ("--label_smoothing 0.5", "--label_smoothing"),
                  ("--loss_type ipo --label_smoothing 0.1", "--label_smoothing")],
    "train_ppo": [("--reward_model init", "--reward_model"), ("--reward_model nowhere", "nowhere"),
                  ("--reward_model other-rm", "tokenizer"), ("--init rm", "reward model"),
                  ("--minibatches 8", "--minibatches"), ("--max_new_tokens 90", "--max_new_tokens"),
                  ("--temperature 0", "--temperature"), ("--ppo_epochs 0", "--ppo_epochs")]}


@pytest.mark.parametrize("name, flags, words", [(name, *case) for name in SCRIPTS
                                                for case in COMMON + REFUSED.get(name, [])])
def test_bad_input_is_one_clear_line(files, tmp_path, name, flags, words):
    """A UserError that names what to change; no checkpoint, no model."""
    with pytest.raises(UserError) as error:
        train(name, files, tmp_path, *flags.split(" "))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not [*tmp_path.glob("step-*"), *tmp_path.glob("final")]


BUGS = {  # where, what stands there, the bug, and who must notice it
    "groups are read twice": (Replies, "batches", "range(rank, len(chosen), world)",
                              "range(0, len(chosen), world)", test_every_batch_of_a_step_is_the_step),
    **{f"a mean of means: {name}": (
        SCRIPTS[name], "main", "/ cfg.batch_size  # ONE", "/ len(rows.sizes)  # ONE",
        test_one_curve_however_it_is_computed, name, "--micro_batch_size 2")
       for name in ("train_rm", "train_dpo")},
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_noticed(request, monkeypatch, bug):
    assert_noticed(request, monkeypatch, *BUGS[bug])
