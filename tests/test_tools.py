"""sample.py and evaluate.py on a small finished model."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import evaluate
import sample
from checkpoint import save_final
from common import UserError
from evaluate import perplexity, strided_rows
from model import GPT, GPTConfig
from tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a random but lively byte-level model, as a training run leaves it."""
    out = tmp_path_factory.mktemp("run")
    tokenizer = make_tokenizer("byte")
    tokenizer.save(out / "tokenizer.json")
    config = GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16, max_seq_len=32)
    model = GPT(config)
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    save_final(str(out), model.state_dict(), {"model": dataclasses.asdict(config), "head": "lm"},
               str(out / "tokenizer.json"))
    return out, model, tokenizer


@pytest.mark.parametrize("n", [2, 3, 9, 17, 40])
@pytest.mark.parametrize("seq_len, stride", [(8, 8), (8, 3), (8, 1), (1, 1), (64, 5)])
def test_strided_rows_score_every_token_once_with_enough_context(n, seq_len, stride):
    """Each id but the first is a target once, right after its predecessor, with min(t, seq_len - stride) ids before."""
    ids = np.arange(100, 100 + n)
    seen = []
    for row, targets in strided_rows(ids, seq_len, stride):
        assert row.shape == targets.shape == (seq_len,)
        for place in np.flatnonzero(targets >= 0):
            target = targets[place] - 100
            seen.append(target)
            context = row[:place + 1] - 100
            assert context.tolist() == list(range(target - len(context), target))
            assert len(context) >= min(target, seq_len - stride + 1)
    assert seen == list(range(1, n))


def test_perplexity_equals_one_long_forward(finished):
    """Documents no longer than a row: the sum of -log p over each whole document, per token and per byte."""
    _, model, tokenizer = finished
    documents = ["a b c", "naïve café", "x"]
    result = perplexity(model, tokenizer, documents, 32, 32, 2, torch.device("cpu"))
    total = count = 0
    for document in documents:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(document), tokenizer.end_id]])
        logp = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])
        total, count = total - logp.double().sum().item(), count + logp.numel()
    assert result["tokens"] == count and result["bytes"] == sum(len(d.encode()) for d in documents)
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / result["bytes"], rel=1e-5)


def test_evaluate_prints_json_and_refuses_what_is_no_text(finished, tmp_path, capsys):
    out, _, _ = finished
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 3)
    results = []
    for flags in ([], ["--stride", "4"], ["--seq_len", "8"]):
        args = ["--model", str(out), "--data", str(tmp_path / "text.txt"), "--device", "cpu", *flags]
        assert evaluate.main(args) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert [r["tokens"] for r in results] == [130] * 3 and len({r["loss"] for r in results}) == 3
    (tmp_path / "empty.txt").write_text("")
    for flags in (["--data", str(tmp_path / "empty.txt")], ["--data", "nowhere.txt"], ["--model", str(tmp_path)]):
        with pytest.raises(UserError):
            evaluate.main(["--model", str(out), "--data", str(tmp_path / "text.txt"), *flags])


def test_sample_prints_the_prompt_and_its_continuations(finished, tmp_path, capsys):
    """Deterministic by seed; n samples differ; @FILE reads the prompt; too long a prompt is refused."""
    out, _, _ = finished

    def run(*flags):
        assert sample.main(["--model", str(out), "--device", "cpu", *flags]) == 0
        return capsys.readouterr().out

    once = run("--prompt", "Ünd ", "--max_new_tokens", "12")
    assert once.startswith("Ünd ") and once == run("--prompt", "Ünd ", "--max_new_tokens", "12")
    two = run("--prompt", "Ünd ", "--max_new_tokens", "12", "--n", "2").split("-" * 40)
    assert len(two) == 2 and two[0] == once and two[0].strip() != two[1].strip()
    (tmp_path / "prompt.txt").write_text("Ünd ")
    assert run("--prompt", f"@{tmp_path}/prompt.txt", "--max_new_tokens", "12") == once
    with pytest.raises(UserError, match="shorten"):
        run("--prompt", "x" * 40)
    with pytest.raises(UserError, match="nowhere"):
        run("--prompt", "@nowhere")


def test_a_character_split_over_tokens_waits_for_its_bytes(finished, capsys):
    """Streaming prints a character of several byte tokens when the last of them has come, and end never."""
    _, _, tokenizer = finished
    printer = sample.Printer(tokenizer)
    for token in tokenizer.encode("é中"):
        printer(0, token)
    printer(0, tokenizer.end_id)
    assert capsys.readouterr().out == "é中"
