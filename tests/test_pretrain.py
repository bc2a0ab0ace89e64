"""Pretraining from the command line to the finished model: through main([...]) and through torchrun."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import train_pretrain
from lib.checkpoint import load_checkpoint
from lib.corpora import TokenFile, write_token_file
from lib.program import UserError, parse
from lib.ranks import Ranks
from lib.tokenizer import make_tokenizer
from model import GPT, GPTConfig
from train_pretrain import Config, lr_at
from zero import Zero

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ["--tokenizer", "byte", "--n_layer", "2", "--n_embd", "32", "--n_head", "2",
        "--seq_len", "24", "--batch_size", "12", "--lr", "4e-3", "--warmup_steps", "5",
        "--eval_every", "0", "--save_every", "0", "--log_every", "1", "--eval_rows", "24", "--device", "cpu"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A real text that every machine has: a module of the standard library, cut into two documents."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    with open(os.__file__, encoding="utf-8") as file:
        source = file.read()
    path.write_text(source[:9000] + "\n<|endoftext|>\n" + source[9000:20000])
    return path


def arguments(text, out, *more):
    return ["--data", str(text), "--cache", str(text.parent / "tokens"), "--out", str(out), *TINY, *more]


def train(text, out, *more):
    """Run main([...]); returns the metrics, the final weights."""
    assert train_pretrain.main(arguments(text, out, *more)) == 0
    return metrics(out), torch.load(out / "final" / "model.pt", weights_only=True)


def metrics(out):
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


def curve(events):
    return [(e["step"], e["loss"]) for e in events if "loss" in e]


def launch(arguments, processes=1, **popen):
    """Start the script as a user does: python, or torchrun for several processes."""
    program = [sys.executable] if processes == 1 else \
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen([*program, os.path.join(ROOT, "train_pretrain.py"), *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen)


@pytest.fixture(scope="module")
def reference(text, tmp_path_factory):
    """20 steps in one process, all 12 rows at once, a checkpoint at step 10."""
    out = tmp_path_factory.mktemp("reference")
    return out, *train(text, out, "--steps", "20", "--save_every", "10", "--eval_every", "10")


def test_a_whole_run_learns_and_leaves_a_model(reference):
    """Loss falls from ln V, evaluation and checkpoint also at the last step, final/ predicts as the run said."""
    out, events, weights = reference
    losses = [loss for _, loss in curve(events)]
    assert [step for step, _ in curve(events)] == list(range(1, 21))
    assert losses[0] == pytest.approx(5.568, abs=0.01)  # ln 262: 256 bytes and six specials
    assert losses[-1] < losses[0] - 1
    assert [e["step"] for e in events if "eval_loss" in e] == [10, 20]
    assert (out / "step-00000020").is_dir()
    config = json.load(open(out / "final" / "config.json"))
    model = GPT(GPTConfig.from_dict(config["model"], "config.json"))
    model.load_weights(weights, "model.pt")
    assert not torch.equal(model.head.weight, torch.zeros_like(model.head.weight))


@pytest.mark.parametrize("micro", [6, 4])
def test_micro_batches_do_not_change_the_curve(reference, text, tmp_path, micro):
    """1x12, 2x6 and 3x4 rows per forward: one loss curve (float32, 1e-6 relative)."""
    events, _ = train(text, tmp_path, "--steps", "20", "--micro_batch_size", str(micro))
    for (_, a), (_, b) in zip(curve(reference[1]), curve(events), strict=True):
        assert b == pytest.approx(a, rel=1e-6)


def test_two_processes_give_the_one_process_curve(reference, text, tmp_path):
    """torchrun with 2 processes and the same global batch: one loss curve (float32, 1e-6 relative), one evaluation."""
    process = launch(arguments(text, tmp_path, "--steps", "20", "--micro_batch_size", "3"), processes=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    for (_, a), (_, b) in zip(curve(reference[1]), curve(metrics(tmp_path)), strict=True):
        assert b == pytest.approx(a, rel=1e-6)
    a, b = ([e for e in events if "eval_loss" in e][-1] for events in (reference[1], metrics(tmp_path)))
    assert b["eval_loss"] == pytest.approx(a["eval_loss"], rel=1e-6)


def test_resuming_is_bitwise_equal_to_not_stopping(reference, text, tmp_path):
    """Steps 1..10, a new process state, steps 11..20: final weights and losses bitwise those of the unbroken run."""
    with pytest.raises(Stop):  # die right after the checkpoint of step 10
        interrupted(text, tmp_path, 10)
    assert not (tmp_path / "final").exists()
    events, weights = train(text, tmp_path, "--steps", "20", "--save_every", "10", "--resume")
    assert all(torch.equal(weights[name], reference[2][name]) for name in reference[2])
    assert curve(events) == curve(reference[1])  # and metrics.jsonl holds each step once


class Stop(Exception):
    pass


def interrupted(text, out, step, monkeypatch=None):
    """Train, and raise Stop in the update after `step`."""
    original = Zero.step

    def dying(self, *args, **kwargs):
        if self.updates == step:
            raise Stop
        return original(self, *args, **kwargs)

    Zero.step = dying
    try:
        train(text, out, "--steps", "20", "--save_every", str(step))
    finally:
        Zero.step = original


def test_a_signal_saves_at_the_next_step_and_says_so(text, tmp_path):
    """SIGTERM: checkpoint at the next step boundary, exit 0; --resume continues from exactly there."""
    process = launch(arguments(text, tmp_path, "--steps", "100000"))
    while not (tmp_path / "metrics.jsonl").exists() or len(curve(metrics(tmp_path))) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    saved = max(int(name[5:]) for name in os.listdir(tmp_path) if name.startswith("step-"))
    assert saved == curve(metrics(tmp_path))[-1][0] and f"saved after step {saved}" in output
    events, _ = train(text, tmp_path, "--steps", str(saved + 2), "--resume")
    assert [step for step, _ in curve(events)] == list(range(1, saved + 3))


@pytest.mark.parametrize("flags", [["--dtype", "bfloat16"], ["--activation_checkpointing"],
                                   ["--windows", "sequential", "--decay", "cosine", "--tie_embeddings"],
                                   ["--offload", "optim,acts", "--zero", "3", "--overlap"],
                                   pytest.param(["--dtype", "float16"], marks=pytest.mark.slow),  # CPUs emulate it
                                   pytest.param(["--compile"], marks=pytest.mark.slow)])
def test_every_way_of_running_trains(reference, text, tmp_path, flags):
    """Each option trains to about the loss of the plain run; recomputation, offload and compilation to the same."""
    events, _ = train(text, tmp_path, "--steps", "20", *flags)
    expected, found = curve(reference[1])[-1][1], curve(events)[-1][1]
    exact = flags[0] in ("--activation_checkpointing", "--offload")
    assert found == pytest.approx(expected, rel=1e-6 if exact else 1e-5 if flags[0] == "--compile" else 0.1)


def test_a_new_model_is_born_unit_by_unit(text, tmp_path, monkeypatch):
    """No rank holds a new model whole: it comes to Zero without memory and is filled there, with the numbers of
    GPT(config, seed)."""
    born, original = [], Zero.__init__

    def watch(self, model, **options):
        born.append({p.device.type for p in model.parameters()})
        original(self, model, **options)

    monkeypatch.setattr(Zero, "__init__", watch)
    _, weights = train(text, tmp_path, "--steps", "1", "--lr", "0", "--seed", "5", "--sample_tokens", "0")
    config = json.load(open(tmp_path / "final" / "config.json"))["model"]
    expected = GPT(GPTConfig.from_dict(config, ""), seed=5).state_dict()
    assert born == [{"meta"}] and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_init_starts_from_the_weights_alone(reference, text, tmp_path):
    """--init: the first loss is about the last one of the run it comes from, and the step count starts anew."""
    events, _ = train(text, tmp_path, "--steps", "2", "--init", str(reference[0]), "--lr", "0")
    assert [step for step, _ in curve(events)] == [1, 2]
    expected = [e for e in reference[1] if "eval_loss" in e][-1]["eval_loss"]
    assert [e for e in events if "eval_loss" in e][-1]["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_learning_rate_at_its_corners():
    """Warmup is linear from 0, the peak is reached exactly, the last update has exactly min_lr."""
    for decay in ("linear", "cosine", "flat-then-linear"):
        cfg = Config(steps=100, warmup_steps=10, lr=1.0, min_lr=0.1, decay=decay)
        assert lr_at(1, cfg) == pytest.approx(0.1) and lr_at(5, cfg) == pytest.approx(0.5) and lr_at(10, cfg) == 1.0
        assert lr_at(100, cfg) == pytest.approx(0.1)
        rates = [lr_at(step, cfg) for step in range(10, 101)]
        assert rates == sorted(rates, reverse=True)
    cfg = Config(steps=100, warmup_steps=0, lr=1.0)
    assert lr_at(1, cfg) == pytest.approx(0.99)
    assert lr_at(55, Config(steps=100, warmup_steps=10, lr=1.0, decay="cosine")) == pytest.approx(0.5)
    assert lr_at(46, Config(steps=100, warmup_steps=10, lr=1.0, decay="flat-then-linear")) == 1.0


def test_one_update_equals_adamw_by_hand():
    """Loshchilov & Hutter 2019, algorithm 2, written out in float64: two clipped updates, decay on matrices alone.

    (1e-7, not 1e-12: Adam divides gradients of 1e-9, which are differences of larger numbers, by their own size.)"""
    cfg = Config(vocab_size=11, n_layer=1, n_head=2, n_embd=8, max_seq_len=6)
    shape = GPTConfig(vocab_size=11, n_layer=1, n_head=2, n_embd=8, max_seq_len=6)
    model, twin = GPT(shape).double(), GPT(shape).double()
    zero = Zero(model, units=model.units(), dtype=torch.float64, lr=0.1, weight_decay=0.2, betas=cfg.betas, eps=cfg.eps)
    ids = torch.arange(12).view(2, 6) % 11
    m = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    v = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for t, lr in ((1, 0.1), (2, 0.05)):
        zero.backward(-model(ids, ids.roll(-1, 1)).sum())
        info = zero.step(lr, clip=0.5)
        twin.zero_grad()
        (-twin(ids, ids.roll(-1, 1)).sum()).backward()
        norm = sum(p.grad.square().sum() for p in twin.parameters()).sqrt()
        assert info.norm == pytest.approx(norm.item(), rel=1e-10) and norm > 0.5
        with torch.no_grad():
            for name, p in twin.named_parameters():
                g = p.grad * 0.5 / (norm + 1e-6)
                m[name] = cfg.betas[0] * m[name] + (1 - cfg.betas[0]) * g
                v[name] = cfg.betas[1] * v[name] + (1 - cfg.betas[1]) * g**2
                p *= 1 - lr * (0.2 if p.dim() == 2 else 0.0)
                p -= lr * m[name] / (1 - cfg.betas[0]**t) / ((v[name] / (1 - cfg.betas[1]**t)).sqrt() + cfg.eps)
        state = zero.full_state_dict()
        for name, p in twin.named_parameters():
            torch.testing.assert_close(state[name], p, rtol=1e-7, atol=1e-7)


BAD = {
    "missing file": (["--data", "nowhere.txt"], "nowhere.txt"),
    "unknown flag": (["--learning_rate", "1"], "--learning_rate"),
    "n_embd not divisible": (["--n_embd", "33"], "--n_embd"),
    "rows longer than the text": (["--seq_len", "100000"], "--seq_len"),
    "not a number": (["--lr", "fast"], "--lr"),
    "nan": (["--lr", "nan"], "--lr"),
    "no rows": (["--batch_size", "0"], "--batch_size"),
    "no steps": (["--steps", "0"], "--steps"),
    "unknown choice": (["--norm", "batch"], "--norm"),
    "unknown offload": (["--offload", "disk,x"], "offload"),
    "unknown device": (["--device", "abacus"], "--device"),
    "init from nowhere": (["--init", "nowhere"], "nowhere"),
    "rows longer than the model's": (["--max_seq_len", "20"], "--seq_len"),
    "no width": (["--n_embd", "0"], "--n_embd"),
    "no rotation": (["--rope_theta", "0"], "--rope_theta"),
    "betas of 1 and more": (["--betas", "0.9,1.5"], "--betas"),
    "a seed beyond 64 bits": (["--seed", str(2**64)], "--seed"),
    "a device that computes nothing": (["--device", "meta"], "--device"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(text, tmp_path, case):
    """A UserError of one line that names what to change, and nothing in --out."""
    flags, named = BAD[case]
    out = tmp_path / "out"
    with pytest.raises(UserError) as error:
        train_pretrain.main(arguments(text, out, *flags))
    assert named in str(error.value) and "\n" not in str(error.value)
    assert not out.exists() or not any(name.startswith("step-") for name in os.listdir(out))


def test_exit_code_of_bad_input_is_2(text, tmp_path):
    """As a program: one line on stderr, exit code 2, no traceback."""
    process = launch(arguments(text, tmp_path / "out", "--data", "nowhere.txt"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("error: nowhere.txt") and errors.count("\n") == 1


def test_resuming_another_run_is_refused_or_said(reference, text, tmp_path, capfd):
    """Another model of the same tensor shapes and fewer steps than done are refused; another seed is a warning."""
    with pytest.raises(UserError, match="another model"):
        train_pretrain.main(arguments(text, reference[0], "--steps", "30", "--resume", "--rope_theta", "500"))
    with pytest.raises(UserError, match="already at step 20"):
        train_pretrain.main(arguments(text, reference[0], "--steps", "10", "--resume"))
    shutil.copytree(reference[0], tmp_path / "copy")
    train(text, tmp_path / "copy", "--steps", "20", "--resume", "--seed", "7")  # nothing left to do: only evaluates
    shown = capfd.readouterr()
    assert "seed was 1 and is 7" in shown.err and "eval_loss" in shown.out
    assert "ZeRO, rank 0: nothing sent or gathered\nfinished" in shown.out


def test_a_full_disk_under_the_log_is_one_clear_line(text, tmp_path):
    """metrics.jsonl that cannot grow (a file size limit stands for a full disk): exit 2, one line naming the file."""
    process = launch(arguments(text, tmp_path, "--steps", "1000"),
                     preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "metrics.jsonl" in errors and errors.count("\n") == 1


def test_a_full_disk_under_a_checkpoint_is_one_clear_line(text, tmp_path):
    """A checkpoint that does not fit: exit 2, one line that says why and what to do, no part of it left behind."""
    process = launch(arguments(text, tmp_path, "--steps", "2"),
                     preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "File too large" in errors and "free space" in errors
    assert errors.count("\n") == 1 and sorted(os.listdir(tmp_path)) == ["lock", "metrics.jsonl"]


def test_a_loss_that_blew_up_is_not_saved(text, tmp_path, monkeypatch):
    """A validation loss that is not finite: UserError that names --lr, no final/."""
    monkeypatch.setattr(train_pretrain, "pretrain_loss", lambda logp: -logp.sum() * float("nan"))
    with pytest.raises(UserError, match="--lr"):
        train_pretrain.main(arguments(text, tmp_path, "--steps", "3"))
    assert not (tmp_path / "final").exists()


def test_a_validation_text_without_anything_to_predict(tmp_path):
    """A token file of document starts alone, whose header says otherwise: one line, not a division by zero."""
    tokenizer = make_tokenizer("byte")
    write_token_file(tmp_path / "val.bin", [np.array([1, 2] + [tokenizer.bos_id] * 20)], tokenizer, n_bytes=20)
    tokens = TokenFile(tmp_path / "val.bin")
    tokens.ids = tokens.ids[2:]
    env = Ranks(0, 1, 0, 1, torch.device("cpu"))
    with pytest.raises(UserError, match="val.bin: found nothing to predict"):
        train_pretrain.evaluate(lambda ids, *_, **__: torch.zeros(ids.shape), tokens, 2, Config(seq_len=4), env)


def test_an_occupied_folder_is_not_overwritten(reference, text):
    """A second run into the folder of a first one is refused without --resume: its checkpoints would mix."""
    with pytest.raises(UserError, match="--resume"):
        train_pretrain.main(arguments(text, reference[0], "--steps", "20"))


def test_a_checkpoint_of_another_shape_is_refused(reference, text, tmp_path):
    """--resume with a different model, --init with a different tokenizer: the first difference is named."""
    with pytest.raises(UserError, match="blocks|embed"):
        train_pretrain.main(arguments(text, reference[0], "--steps", "30", "--resume", "--n_embd", "64"))
    with pytest.raises(UserError, match="tokenizer"):
        train_pretrain.main(arguments(text, tmp_path, "--init", str(reference[0]), "--tokenizer", "char"))
    with pytest.raises(UserError, match="--n_layer 3"):
        train_pretrain.main(arguments(text, tmp_path, "--init", str(reference[0]), "--n_layer", "3"))


def test_help_lists_every_field_with_its_comment(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--help"], "doc")
    shown = capsys.readouterr().out
    assert "--n_layer" in shown and "peak learning rate [" in shown and "--no-resume" in shown


def test_the_checkpoint_says_what_it_needs(reference):
    """config.json beside the shards: the model's shape, the head, the run's flags."""
    config = json.load(open(reference[0] / "step-00000020" / "config.json"))
    assert config["model"]["n_layer"] == 2 and config["head"] == "lm" and config["run"]["batch_size"] == 12
    model = GPT(GPTConfig.from_dict(config["model"], ""))
    step, extra = load_checkpoint(str(reference[0]), {"model": Zero(model, units=model.units())})
    assert step == 20 and extra["skipped"] == 0
