"""sample.py and evaluate.py on a small finished model."""
import codecs
import dataclasses
import json
import math
import zlib

import numpy as np
import pytest
import torch

import evaluate
import sample
from data import CHAT_TEMPLATE, encode_chat, encode_prompt
from lib.checkpoint import save_final
from lib.program import UserError
from lib.tokenizer import make_tokenizer
from model import GPT, GPTConfig, generate

TOKENIZER = make_tokenizer("byte")
END = TOKENIZER.end_id


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, model): random but lively, with rows of 32 bytes. folder/base has not learned to chat."""
    out = tmp_path_factory.mktemp("run")
    TOKENIZER.save(out / "tokenizer.json")
    model = GPT(GPTConfig(vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=2, n_embd=16, max_seq_len=32))
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    about = {"model": dataclasses.asdict(model.config), "head": "lm"}
    for folder, template in ((out, {"chat_template": CHAT_TEMPLATE}), (out / "base", {})):
        save_final(str(folder), model.state_dict(), about | template, str(out / "tokenizer.json"))
    return out, model


def asked(*contents):
    """A conversation of the user and the assistant by turns."""
    return [{"role": role, "content": content} for role, content in zip(["user", "assistant"] * 9, contents)]


def write(path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def answered(finished, tmp_path, prompts, *flags) -> list[dict]:
    """What sample.py writes to a file of prompts."""
    write(tmp_path / "p.jsonl", prompts)
    sample.main(["--model", str(finished[0]), "--device", "cpu", "--prompts", str(tmp_path / "p.jsonl"),
                 "--out", str(tmp_path / "s.jsonl"), *flags])
    return [json.loads(line) for line in open(tmp_path / "s.jsonl", encoding="utf-8")]


# ---- evaluate.py -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [2, 3, 9, 17, 40])
@pytest.mark.parametrize("seq_len, stride", [(8, 8), (8, 3), (8, 1), (1, 1), (64, 5)])
def test_strided_rows_score_every_token_once_with_enough_context(n, seq_len, stride):
    """Each id but the first is a target once, right behind its predecessor, with min(t, seq_len - stride)
    before it."""
    seen = []
    for row, targets in evaluate.strided_rows(np.arange(100, 100 + n), seq_len, stride):
        assert row.shape == targets.shape == (seq_len,)
        for place in np.flatnonzero(targets >= 0):
            target, context = targets[place] - 100, row[:place + 1] - 100
            seen.append(target)
            assert context.tolist() == list(range(target - len(context), target))
            assert len(context) >= min(target, seq_len - stride + 1)
    assert seen == list(range(1, n))


def test_perplexity_equals_one_long_forward(finished):
    """Documents no longer than a row: the sum of -log p over each whole document, per token and per byte."""
    documents, model = ["a b c", "naïve café", "x"], finished[1]
    result = evaluate.perplexity(model, TOKENIZER, documents, stride=0, batch_size=2)
    total = count = 0
    for document in documents:
        ids = torch.tensor([[TOKENIZER.bos_id, *TOKENIZER.encode(document), END]])
        logp = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])
        total, count = total - logp.double().sum().item(), count + logp.numel()
    assert result["tokens"] == count and result["bytes"] == sum(len(d.encode()) for d in documents)
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / result["bytes"], rel=1e-5)


def test_figures_of_a_text(finished, tmp_path, capsys):
    """Printed as JSON and written to --out; all tokens at every stride, or those of the last part; no text is
    an error."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 3)
    args, results = ["--model", str(finished[0]), "--data", str(tmp_path / "text.txt"), "--device", "cpu"], []
    for flags in ([], ["--stride", "4"], ["--val_fraction", "0.5"]):
        evaluate.main([*args, *flags, "--out", str(tmp_path / "out.json")])
        results.append(json.loads(capsys.readouterr().out.splitlines()[0]))
        assert results[-1] == json.loads((tmp_path / "out.json").read_text())
    assert [result["tokens"] for result in results] == [130, 130, 66]
    assert len({result["loss"] for result in results}) == 3
    (tmp_path / "empty.txt").write_text("")
    for flags in (["--data", str(tmp_path / "empty.txt")], ["--data", "nowhere.txt"], ["--model", "nowhere"]):
        with pytest.raises(UserError):
            evaluate.main([*args, *flags])


def test_figures_of_conversations(finished, tmp_path, capsys, monkeypatch):
    """Loss and first guesses are those of one forward per conversation, exact match and ended of the greedy
    reply. One that says the right thing without an end is no match."""
    model = finished[1]
    first = encode_prompt(TOKENIZER, asked("ab"))
    monkeypatch.setattr(evaluate, "generate_sorted", lambda model, prompts, **_: [
        [*b"cd", END] if prompt == first else [*"你".encode()] for prompt in prompts])
    chats = [asked("left", "out"), asked("ab", "cd"), asked("x", "y", "z", "你")]
    write(tmp_path / "c.jsonl", [{"messages": messages} for messages in chats])
    evaluate.main(["--model", str(finished[0]), "--device", "cpu", "--chats", str(tmp_path / "c.jsonl"),
                   "--max_new_tokens", "12", "--val_fraction", "0.6"])
    result = json.loads(capsys.readouterr().out)
    total = right = count = 0
    for messages in chats[1:]:
        ids, prompt = encode_chat(TOKENIZER, messages)[0], encode_prompt(TOKENIZER, messages[:-1])
        logits = model(torch.tensor([ids[:-1]]))[0, len(prompt) - 1:]
        reply = torch.tensor(ids[len(prompt):])
        total -= logits.log_softmax(-1).gather(-1, reply[:, None]).double().sum().item()
        right, count = right + int((logits.argmax(-1) == reply).sum()), count + len(reply)
    assert result["loss"] == pytest.approx(total / count, rel=1e-5) and result["tokens"] == count
    assert result["mean_token_accuracy"] == right / count and result["replies"] == result["prompts"] == 2
    assert result["exact_match"] == result["ended"] == 0.5


# ---- sample.py: a text and a conversation ------------------------------------------------------------------

def test_continuations_of_a_text(finished, capsys):
    """The prompt comes first; a seed draws the same text; n texts differ; too long a prompt is an error."""
    def run(*flags):
        sample.main(["--model", str(finished[0]), "--device", "cpu", "--max_new_tokens", "12", *flags])
        return capsys.readouterr().out

    once = run("--prompt", "Ünd ")
    two = run("--prompt", "Ünd ", "--n", "2").split("-" * 40)
    assert once.startswith("Ünd ") and [two[0], len(two)] == [once, 2] and two[0].strip() != two[1].strip()
    with pytest.raises(UserError, match="shorten"):
        run("--prompt", "x" * 40)


def test_a_chat_remembers_resets_and_quits(finished, monkeypatch, capsys):
    """What the model is asked: the conversation so far, without it after /reset, nothing after /quit. A
    character of several tokens is printed once it is whole."""
    prompts, reply = [], [*TOKENIZER.encode("é中"), END]

    def drawn(model, some, on_token, **_):
        prompts.append(TOKENIZER.decode(some[0]))
        for token in reply:
            on_token(0, token)
        return [reply]

    monkeypatch.setattr(evaluate, "generate_sorted", drawn)
    lines = iter(["ab", "", "cd", "/reset", "ef", "/quit", "gh"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    sample.main(["--model", str(finished[0]), "--chat", "--max_new_tokens", "4", "--system", "S"])
    start = "<|bos|><|system|>S<|end|><|user|>"
    assert prompts == [f"{start}ab<|end|><|assistant|>",
                       f"{start}ab<|end|><|assistant|>é中<|end|><|user|>cd<|end|><|assistant|>",
                       f"{start}ef<|end|><|assistant|>"]
    said = capsys.readouterr().out.split("\n", 1)
    assert "/reset" in said[0] and said[1] == "é中\n" * 3 and next(lines) == "gh"


def test_a_chat_forgets_its_oldest_turns(finished, monkeypatch):
    """Whole exchanges go, from the left, until the prompt fits; the system message and the last question
    stay."""
    system, turns, asked_with = [{"role": "system", "content": "S"}], asked("aa", "bb", "cc", "dd", "ee"), []
    monkeypatch.setattr(sample, "write", lambda model, tokenizer, prompt, *_: (
        asked_with.append(prompt) or evaluate.Reply(prompt, [], "ff", True)))
    whole = len(encode_prompt(TOKENIZER, system + turns))
    for longest, left in ((whole, turns), (whole - 1, turns[2:]), (1, turns[4:])):
        monkeypatch.setattr(sample, "longest_prompt", lambda model, cfg, longest=longest: longest)
        said = sample.answer(None, TOKENIZER, turns, 1, sample.Config(system="S"))
        assert asked_with.pop() == encode_prompt(TOKENIZER, system + left)
        assert said == [*left, {"role": "assistant", "content": "ff"}]


def test_one_reply_and_its_errors(finished, capsys, monkeypatch):
    """--chat --prompt prints one reply. Too long a text is an error there, and a message in the
    conversation."""
    out, model = finished
    args = "--model", str(out), "--chat", "--temperature", "0", "--device", "cpu", "--max_new_tokens", "5"
    sample.main([*args, "--prompt", "ab"])
    new, = generate(model, [encode_prompt(TOKENIZER, asked("ab"))], max_new_tokens=5, temperature=0,
                    eos_id=END, banned=TOKENIZER.specials_but_end)
    bytes_ = TOKENIZER.decode_bytes([i for i in new if i != END])
    reply = codecs.getincrementaldecoder("utf-8")("replace").decode(bytes_)  # half a character waits
    assert capsys.readouterr().out == reply + (" ..." if END not in new else "") + "\n"
    for flags, message in ((["--prompt", "a" * 40], "max_seq_len 32"),
                           (["--model", str(out / "base")], "train_sft.py")):
        with pytest.raises(UserError, match=message):
            sample.main([*args, *flags])
    lines = iter(["a" * 40, "\ud800", "ab"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or "/quit")
    sample.main(args)
    captured = capsys.readouterr()
    assert captured.out.count("error: ") == 2 and reply in captured.out


# ---- sample.py: a file of prompts --------------------------------------------------------------------------

def test_replies_to_a_file(finished, tmp_path):
    """k replies per prompt in the order of the file, the same whatever the batch; tags are carried on."""
    prompts = [{"prompt": "abc", "tag": "x"}, {"prompt": asked("a", "b", "c")},
               {"messages": asked("de", "gone")}]
    flags = "--k", "3", "--max_new_tokens", "8"
    first, *others = [answered(finished, tmp_path, prompts, *flags, "--batch_size", size) for size in "149"]
    assert others == [first, first]
    assert [line["prompt"] for line in first] == [asked("abc"), asked("a", "b", "c"), asked("de")]
    assert [line.get("tag") for line in first] == ["x", None, None]
    assert all(len(line["ended"]) == len(line["responses"]) == len({*line["responses"]}) for line in first)
    assert answered(finished, tmp_path, prompts, *flags, "--limit", "2") == first[:2]


@pytest.mark.parametrize("limit", ["0", "8"])
def test_prompts_that_leave_no_room_are_dropped(finished, tmp_path, capsys, monkeypatch, limit):
    """In rows of 32 a prompt of 25 tokens leaves less than a quarter, or than --max_new_tokens 8. It is
    dropped and counted, the others are answered as without it; without a limit each up to its row's end."""
    prompts, drawn, draw = [{"prompt": "a" * n} for n in (3, 21, 15)], [], sample.draw
    monkeypatch.setattr(sample, "draw", lambda *args, **more: drawn.append(draw(*args, **more)) or drawn[-1])
    found, without = (answered(finished, tmp_path, some, "--k", "2", "--max_new_tokens", limit)
                      for some in (prompts, prompts[::2]))
    assert "4 replies to 2 prompts, 1 dropped (longer than 24 tokens)" in capsys.readouterr().out
    assert [line["prompt"] for line in found] == [line["prompt"] for line in without] == [
        asked("aaa"), asked(15 * "a")]
    assert found == without and all(reply.ended or len(reply.ids) == (int(limit) or 32 - len(reply.prompt))
                                    for reply in drawn[0]) and not all(reply.ended for reply in drawn[0])
    with pytest.raises(UserError, match="p.jsonl"):
        answered(finished, tmp_path, prompts[1:2])


@pytest.mark.parametrize("changed", [
    {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.3}, {"seed": 2}], ids=str)
def test_every_way_to_sample_reaches_the_sampler(finished, tmp_path, changed):
    """The file's replies are those of generate with the same options, and other ones than without."""
    prompt, replies = encode_prompt(TOKENIZER, asked("abc")), []
    for options in ({}, changed):
        options = {"temperature": 0.8, "seed": 1} | options
        seeds = [(options.pop("seed"), sample.FILE, zlib.crc32(str(prompt).encode()), 0)]
        seeds += [(*seeds[0][:3], number) for number in (1, 2, 3)]
        new = generate(finished[1], [prompt] * 4, seeds=seeds, max_new_tokens=8, eos_id=END,
                       banned=TOKENIZER.specials_but_end, **options)
        replies.append([TOKENIZER.decode([i for i in ids if i != END]) for ids in new])
    flags = [str(x) for name in changed for x in (f"--{name}", changed[name])]
    found = answered(finished, tmp_path, [{"prompt": "abc"}], "--max_new_tokens", "8", "--k", "4", *flags)
    assert found[0]["responses"] == replies[1] != replies[0]
