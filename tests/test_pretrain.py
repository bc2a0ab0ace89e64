"""train_pretrain.py from a text to a finished model, however the step is computed; one update by hand."""
import numpy as np
import pytest
import torch
from small_chat import curve, last, metrics, run_script, same_weights, save_chat_model, write

import train_pretrain
from lib.program import UserError
from lib.run import RunConfig
from model import GPT, GPTConfig, load_model
from zero import Zero

TINY = ("--tokenizer byte --n_layer 2 --n_embd 32 --n_head 2 --seq_len 24 --batch_size 12 --lr 4e-3 "
        "--steps 20 --warmup_steps 5 --eval_every 0 --save_every 0 --log_every 1 --eval_rows 24 --device cpu")


def arguments(text, out, flags):
    return f"--data {text} --cache {text.parent}/tokens --out {out} {TINY} {flags}".split()


def train(text, out, flags, world=1):
    run_script("train_pretrain", arguments(text, out, flags), world)


@pytest.fixture(scope="module")
def reference(text, tmp_path_factory):
    """20 steps in one process, all 12 rows at once."""
    out = tmp_path_factory.mktemp("reference")
    train(text, out, "--eval_every 10")
    return out


def test_a_whole_run_learns(reference):
    """From ln 262 (256 bytes and six special tokens) downwards. The last step is evaluated, too."""
    steps, losses = zip(*curve(reference))
    assert list(steps) == [*range(1, 21)]
    assert losses[0] == pytest.approx(5.568, abs=0.01) and losses[-1] < losses[0] - 1
    assert [event["step"] for event in metrics(reference) if "eval_loss" in event] == [10, 20]


@pytest.mark.parametrize("flags, world", [
    ("--micro_batch_size 5", 1), ("--attention naive", 1), ("--activation_checkpointing", 1),
    ("--offload optim,acts --zero 3", 1), ("--micro_batch_size 4 --zero 2", 2),
    pytest.param("--compile", 1, marks=pytest.mark.slow)])
def test_one_curve_however_the_step_is_computed(reference, text, tmp_path, flags, world):
    """In uneven parts, by another attention, recomputed, parked in host memory, on two ranks, compiled. The
    evaluation is one, too."""
    train(text, tmp_path, flags, world)
    rel = 1e-5 if flags in ("--attention naive", "--compile") else 1e-6
    for (_, a), (_, b) in zip(curve(reference), curve(tmp_path), strict=True):
        assert b == pytest.approx(a, rel=rel)
    assert last(tmp_path, "eval_loss") == pytest.approx(last(reference, "eval_loss"), rel=rel)


def test_steps_follow_from_a_small_text(text, tmp_path, capsys):
    """Without --steps: at most --epochs readings, which is said. --val_fraction 0: no validation, as said."""
    train(text, tmp_path, "--steps 0 --epochs 0.25 --val_fraction 0")
    steps = -(-20_004 // 24 // 12 // 4)
    assert [step for step, _ in curve(tmp_path)] == [*range(1, steps + 1)]
    said = capsys.readouterr().out
    assert f"{steps} updates read the text 0.3 times" in said and "no validation: --val_fraction 0.0" in said
    assert not any("eval_loss" in event for event in metrics(tmp_path))


@pytest.mark.parametrize("flags", [
    "--dtype bfloat16", "--windows sequential --decay cosine --tie_embeddings",
    pytest.param("--dtype float16", marks=pytest.mark.slow)])  # CPUs only emulate it
def test_other_runs_learn_about_as_much(reference, text, tmp_path, flags):
    """And no flag is accepted and then ignored."""
    train(text, tmp_path, flags)
    assert last(tmp_path, "loss") == pytest.approx(last(reference, "loss"), rel=0.1)
    assert curve(tmp_path) != curve(reference)


def test_a_new_model_is_born_unit_by_unit(text, tmp_path, monkeypatch):
    """No rank holds a new model whole: it comes to Zero without memory. There it is filled, and becomes what
    GPT(config, seed) is."""
    born, original = [], Zero.__init__

    def watch(self, model, **options):
        born.append({p.device.type for p in model.parameters()})
        original(self, model, **options)

    monkeypatch.setattr(Zero, "__init__", watch)
    train(text, tmp_path, "--steps 1 --lr 0 --seed 5 --sample_tokens 0")
    found, *_ = load_model(str(tmp_path))
    expected = GPT(found.config, seed=5).state_dict()
    assert born == [{"meta"}] and found.state_dict().keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in found.state_dict().items())


def test_training_and_evaluation_by_hand(tmp_path):
    """Each token but a document's first one is predicted once, from what stands before it in its row and its
    document. Here all rows of the text are one batch. --init takes the weights of another run."""
    documents = ["One document. " * 5 + "And an end.", "你好, another one! " * 4]
    path = write(tmp_path / "text.jsonl", [{"text": document} for document in documents])
    init = save_chat_model(tmp_path / "init")
    train(tmp_path / "text.jsonl", tmp_path / "out", f"--init {init} --val_data {path} --windows sequential "
          "--batch_size 7 --steps 1 --lr 0 --eval_rows 0")
    model, tokenizer, _ = load_model(init)
    ids = [i for document in documents for i in (tokenizer.bos_id, *document.encode(), tokenizer.end_id)]
    assert len(ids) == 7 * 24 + 1
    loss, count = 0.0, 0
    for t in range(1, len(ids)):
        begun = max(i for i in range(t) if ids[i] == tokenizer.bos_id or i == (t - 1) // 24 * 24)
        if ids[t] != tokenizer.bos_id:
            logits = model(torch.tensor([ids[begun:t]]))[0, -1]  # (V,)
            loss, count = loss - logits.log_softmax(0)[ids[t]].item(), count + 1
    mean, n_bytes = pytest.approx(loss / count, rel=1e-5), sum(len(text.encode()) for text in documents)
    assert curve(tmp_path / "out") == [(1, mean)] and last(tmp_path / "out", "eval_loss") == mean
    assert last(tmp_path / "out", "eval_perplexity") == pytest.approx(np.exp(loss / count), rel=1e-4)
    assert last(tmp_path / "out", "eval_bits_per_byte") == pytest.approx(loss / np.log(2) / n_bytes, rel=1e-5)
    assert same_weights(tmp_path / "out", init)


def test_one_update_equals_adamw_by_hand():
    """Loshchilov & Hutter 2019, algorithm 2, in float64: two clipped updates, weight decay on matrices alone.

    (To 1e-7: Adam divides gradients of 1e-9, which are differences of larger numbers, by their own size.)"""
    betas, eps = RunConfig.betas, RunConfig.adam_eps
    shape = GPTConfig(vocab_size=11, n_layer=1, n_head=2, n_embd=8, max_seq_len=6)
    model, twin, ids = GPT(shape).double(), GPT(shape).double(), torch.arange(12).view(2, 6) % 11
    zero = Zero(model, units=model.units(), dtype=torch.float64, weight_decay=0.2, betas=betas, eps=eps)
    m, v = ({name: torch.zeros_like(p) for name, p in twin.named_parameters()} for _ in range(2))
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
                m[name] = betas[0] * m[name] + (1 - betas[0]) * g
                v[name] = betas[1] * v[name] + (1 - betas[1]) * g**2
                p *= 1 - lr * (0.2 if p.dim() == 2 else 0.0)
                p -= lr * m[name] / (1 - betas[0]**t) / ((v[name] / (1 - betas[1]**t)).sqrt() + eps)
        for name, p in zero.full_state_dict().items():
            torch.testing.assert_close(p, twin.state_dict()[name], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("flags, named", [
    ("--data nowhere.txt", "nowhere.txt"), ("--seq_len 100000", "--seq_len"), ("--seq_len 0", "--seq_len"),
    ("--max_seq_len 20", "--seq_len"), ("--epochs 0", "--epochs"), ("--n_embd 33", "n_embd"),
    ("--offload disks", "offload"), ("--device abacus", "--device"),
    ("--init nowhere", "nowhere"), ("--init REFERENCE --tokenizer char", "tokenizer"),
    ("--init REFERENCE --n_layer 3", "--n_layer 3"), ("--init REFERENCE --seq_len 25", "--seq_len 25")])
def test_bad_input_is_one_clear_line(reference, text, tmp_path, flags, named):
    """It names what to change, and comes before anything is written to --out."""
    given = arguments(text, tmp_path / "out", flags.replace("REFERENCE", str(reference)))
    with pytest.raises(UserError) as error:
        train_pretrain.main(given)
    assert named in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()
