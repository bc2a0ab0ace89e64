"""sample.py and evaluate.py on a small finished model."""
import dataclasses
import json
import math
import re
import sys

import numpy as np
import pytest
import torch

import evaluate
import sample
from data import CHAT_TEMPLATE, encode_chat, encode_prompt
from evaluate import perplexity, strided_rows
from lib.checkpoint import save_final
from lib.program import UserError
from lib.tokenizer import make_tokenizer
from model import GPT, GPTConfig, generate


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
    save_final(str(out), model.state_dict(), {"model": dataclasses.asdict(config), "head": "lm",
                                              "chat_template": CHAT_TEMPLATE}, str(out / "tokenizer.json"))
    return out, model, tokenizer


def asked(*contents):
    """A conversation of the user and the assistant by turns."""
    return [{"role": role, "content": content} for role, content in zip(["user", "assistant"] * 9, contents)]


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


# ---- chatting -------------------------------------------------------------------------------------------------------

def test_a_chat_remembers_resets_and_quits(finished, monkeypatch, capsys):
    """What the model is asked: the conversation so far, without it after /reset, nothing after /quit."""
    out, _, tokenizer = finished
    prompts = []
    monkeypatch.setattr(sample, "generate_sorted", lambda model, p, on_token, **_: (
        prompts.append(tokenizer.decode(p[0])), [on_token(0, i) for i in (72, 105, tokenizer.end_id)])
        and [[72, 105, tokenizer.end_id]])
    lines = iter(["ab", "", "cd", "/reset", "ef", "/quit", "gh"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert sample.main(["--model", str(out), "--chat", "--max_new_tokens", "4", "--system", "S"]) == 0
    start = "<|bos|><|system|>S<|end|><|user|>"
    assert prompts == [f"{start}ab<|end|><|assistant|>",
                       f"{start}ab<|end|><|assistant|>Hi<|end|><|user|>cd<|end|><|assistant|>",
                       f"{start}ef<|end|><|assistant|>"]
    assert capsys.readouterr().out == "Hi\n" * 3 and next(lines) == "gh"


def test_a_chat_forgets_its_oldest_turns(finished):
    """Whole exchanges go, from the left, until the prompt fits; the system message and the last question stay."""
    tokenizer = finished[2]
    system = [{"role": "system", "content": "S"}]
    messages = system + asked("aa", "bb", "cc", "dd", "ee")
    whole = len(encode_prompt(tokenizer, messages))
    for longest, left in ((whole, messages), (whole - 1, system + messages[3:]), (12, system + messages[5:]),
                          (1, system + messages[5:])):
        assert sample.recent(tokenizer, messages, longest) == left
    assert sample.recent(tokenizer, messages[1:], whole - 9) == messages[3:]


def test_one_reply_and_its_errors(finished, capsys, monkeypatch):
    """--chat --prompt prints one reply; too long a text is an error there, and a message in the conversation."""
    out, model, tokenizer = finished
    args = ["--model", str(out), "--chat", "--temperature", "0", "--device", "cpu", "--max_new_tokens", "5"]
    assert sample.main([*args, "--prompt", "ab"]) == 0
    new, = generate(model, [encode_prompt(tokenizer, asked("ab"))], max_new_tokens=5, temperature=0,
                    eos_id=tokenizer.end_id, banned=tokenizer.specials_but_end)
    reply = tokenizer.decode([i for i in new if i != tokenizer.end_id]).rstrip("\ufffd")  # half a character waits
    assert capsys.readouterr().out == reply + (" ..." if tokenizer.end_id not in new else "") + "\n"
    with pytest.raises(UserError, match="rows end at 32"):
        sample.main([*args, "--prompt", "a" * 40])
    assert sample.main([*args, "--prompt", "/reset"]) == 0 and capsys.readouterr().out  # a prompt like any other
    lines = iter(["a" * 40, "\ud800", "ab", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert sample.main(args) == 0
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 2 and captured.out.startswith(reply)


def test_replies_to_a_file(finished, tmp_path, capsys):
    """k replies per prompt in the order of the file, the same whatever the batch; tags are carried on."""
    out, _, _ = finished
    prompts = [{"prompt": "abc", "tag": "x"}, {"prompt": asked("a", "b", "c")}, {"messages": asked("de", "gone")}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    results = []
    for batch in ("1", "4", "64"):
        files = ["--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "s.jsonl")]
        flags = ["--k", "3", "--batch_size", batch, "--max_new_tokens", "8"]
        assert sample.main(["--model", str(out), *files, *flags]) == 0
        results.append([json.loads(line) for line in open(tmp_path / "s.jsonl", encoding="utf-8")])
    assert results[0] == results[1] == results[2]
    assert [r["prompt"] for r in results[0]] == [asked("abc"), asked("a", "b", "c"), asked("de")]
    assert [r.get("tag") for r in results[0]] == ["x", None, None]
    assert all(len(r["responses"]) == len(r["ended"]) == 3 and len(set(r["responses"])) == 3 for r in results[0])
    assert sample.main(["--model", str(out), *files, *flags, "--limit", "2"]) == 0
    assert [json.loads(line) for line in open(tmp_path / "s.jsonl", encoding="utf-8")] == results[0][:2]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a" * 40}) + "\n")
    with pytest.raises(UserError, match="p.jsonl"):
        sample.main(["--model", str(out), "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "t.jsonl")])
    assert not (tmp_path / "t.jsonl").exists()


def test_progress_on_a_terminal(finished, tmp_path, capsys, monkeypatch):
    """A file of replies tells on a terminal how far it is and how much time is left, on one line that goes away at the
    end; into a pipe nothing of that."""
    out, _, _ = finished
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "abc"}) + "\n")
    args = ["--model", str(out), "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "s.jsonl"), "--k", "3",
            "--batch_size", "1", "--max_new_tokens", "4"]
    assert sample.main(args) == 0 and "left" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert sample.main(args) == 0
    lines = capsys.readouterr().out.split("\r\033[K")
    assert [line.partition(" | ")[0] for line in lines[1:3]] == ["replies 1 of 3", "replies 2 of 3"]
    assert all(re.search(r"\d:\d\d:\d\d left$", line) for line in lines[1:3]) and "3 replies to 1 prompts" in lines[3]


@pytest.mark.parametrize("limit, length", [("0", 13), ("8", 8)])
def test_prompts_that_leave_no_room_are_dropped(finished, tmp_path, capsys, monkeypatch, limit, length):
    """In rows of 32 a prompt of 25 tokens has less than a quarter left, or than --max_new_tokens 8: it is dropped and
    counted, the others are answered as without it; without a limit they get what the longest of them leaves."""
    out, _, tokenizer = finished
    prompts = [{"prompt": "a" * n} for n in (3, 21, 15)]
    lengths = []
    draw = sample.draw
    monkeypatch.setattr(sample, "draw", lambda *args: lengths.append(args[5]) or draw(*args))
    for name, some in (("s", prompts), ("t", [prompts[0], prompts[2]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in some))
        assert sample.main(["--model", str(out), "--prompts", str(tmp_path / f"{name}.jsonl"), "--k", "2",
                            "--max_new_tokens", limit, "--out", str(tmp_path / f"{name}.out.jsonl")]) == 0
    assert "4 replies to 2 prompts, 1 dropped (longer than 24 tokens)" in capsys.readouterr().out
    found, without = ([json.loads(line) for line in open(tmp_path / f"{name}.out.jsonl")] for name in "st")
    assert [line["prompt"] for line in found] == [line["prompt"] for line in without] == [asked("aaa"), asked(15 * "a")]
    assert found[0] == without[0] and lengths == [length, length]


FILTERS = [{"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.3}, {"repetition_penalty": 4.0}, {"seed": 2}]


@pytest.mark.parametrize("flags", FILTERS, ids=str)
def test_every_way_to_sample_reaches_the_sampler(finished, tmp_path, flags):
    """The file's replies are those of generate with the same options, and other ones than without."""
    out, model, tokenizer = finished
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "abc"}) + "\n")
    assert sample.main(["--model", str(out), "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "s.jsonl"),
                        "--max_new_tokens", "8", "--k", "4", *(str(x) for name in flags for x in (
                            f"--{name}", flags[name]))]) == 0
    prompt, options = encode_prompt(tokenizer, asked("abc")), {"temperature": 0.8, "seed": 1}
    replies = []
    for changed in ({}, flags):
        kwargs = options | changed
        seed = kwargs.pop("seed") << 64
        new = generate(model, [prompt] * 4, seeds=[seed + n for n in range(4)], max_new_tokens=8,
                       eos_id=tokenizer.end_id, banned=tokenizer.specials_but_end, **kwargs)
        replies.append([tokenizer.decode([i for i in ids if i != tokenizer.end_id]) for ids in new])
    plain, expected = replies
    assert json.loads((tmp_path / "s.jsonl").read_text())["responses"] == expected != plain


def test_a_model_that_never_learned_to_chat_is_refused(finished, tmp_path):
    out, model, _ = finished
    config = json.load(open(out / "final" / "config.json"))
    save_final(str(tmp_path), model.state_dict(), {"model": config["model"], "head": "lm"}, str(out / "tokenizer.json"))
    with pytest.raises(UserError, match="train_sft.py"):
        sample.main(["--model", str(tmp_path), "--chat", "--prompt", "Hi"])


def test_answers_of_conversations(finished, tmp_path, capsys, monkeypatch):
    """Loss and first guesses are those of one forward per conversation, exact match and ended of the greedy reply."""
    out, model, tokenizer = finished
    prompt = encode_prompt(tokenizer, asked("ab"))
    monkeypatch.setattr(evaluate, "generate_sorted", lambda model, prompts, **_: [
        [*b"cd", tokenizer.end_id] if p == prompt else [120] * 12 for p in prompts])
    chats = [asked("ab", "cd"), asked("x", "y", "z", "你")]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in chats))
    assert evaluate.main(["--model", str(out), "--chats", str(tmp_path / "c.jsonl"), "--max_new_tokens",
                          "12"]) == 0
    result = json.loads(capsys.readouterr().out)
    total = right = count = 0
    for messages in chats:
        ids, prompt = encode_chat(tokenizer, messages)[0], encode_prompt(tokenizer, messages[:-1])
        logits = model(torch.tensor([ids[:-1]]))[0, len(prompt) - 1:]
        reply = torch.tensor(ids[len(prompt):])
        total -= logits.log_softmax(-1).gather(-1, reply[:, None]).double().sum().item()
        right, count = right + int((logits.argmax(-1) == reply).sum()), count + len(reply)
    assert result["loss"] == pytest.approx(total / count, rel=1e-5) and result["tokens"] == count
    assert result["mean_token_accuracy"] == right / count and result["replies"] == result["prompts"] == 2
    assert result["exact_match"] == result["ended"] == 0.5
