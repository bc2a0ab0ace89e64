"""A small chat model with random weights, and small files of ranked replies: what tests of train_rm.py and train_dpo.py
start from."""
import dataclasses
import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from data import CHAT_TEMPLATE
from lib.checkpoint import save_final
from lib.tokenizer import make_tokenizer
from model import GPT, GPTConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 2, "max_seq_len": 96}
TOPICS = ["apple", "bridge", "cat", "door", "engine", "forest", "garden", "house", "island", "jacket", "kettle"]
WORDS = ["good", "fair", "poor", "bad"]


def random_model(head="lm", seed=1, **shape) -> GPT:
    """Nothing in it is zero, so that every token has its say."""
    model = GPT(GPTConfig(vocab_size=make_tokenizer("byte", []).vocab_size, **{**SHAPE, **shape}), head=head)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
    return model


def save_chat_model(folder, seed=1, tokenizer=None, head="lm", **changes) -> str:
    """A folder for --init, or with head="scalar" for --reward_model; returns it."""
    tokenizer, model = tokenizer or make_tokenizer("byte", []), random_model(head, seed)
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    config = {"model": dataclasses.asdict(model.config), "head": head, "chat_template": CHAT_TEMPLATE, **changes}
    save_final(str(folder), model.state_dict(), config, os.path.join(folder, "tokenizer.json"))
    return str(folder)


def ranked(topics=TOPICS, K=4) -> list[dict]:
    """Records of K replies to each topic, the best first, with tags and scores; the first topic has two turns."""
    records = []
    for n, topic in enumerate(topics):
        prompt = f"What of the {topic}?" if n else [
            {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."},
            {"role": "user", "content": f"And the {topic}?"}]
        records.append({"prompt": prompt, "responses": [f"A {word} {topic}{'!' * (n % 3)}" for word in WORDS[:K]],
                        "tag": "odd" if n % 2 else "even", "tags": ["fine", "fine", "bad", "bad"][:K],
                        "scores": [3.0, 2.5, 1.0, 0.0][:K]})
    return records


FORMS = ["chosen and rejected", "alpaca", "hh", "messages"]


def in_form(form: str, records: list[dict]) -> list[dict]:
    """Ranked records of two replies in another public form. Alpaca has no room for earlier turns."""
    found = []
    for record in records:
        rest = {name: value for name, value in record.items() if name not in ("prompt", "responses")}
        turns = record["prompt"] if isinstance(record["prompt"], list) else [
            {"role": "user", "content": record["prompt"]}]
        talks = [[*turns, {"role": "assistant", "content": text}] for text in record["responses"]]
        prompt, (chosen, rejected) = {
            "chosen and rejected": ({"prompt": record["prompt"]}, record["responses"]),
            "alpaca": ({"instruction": turns[-1]["content"], "input": ""}, record["responses"]),
            "hh": ({}, ["".join(f"\n\n{'Human' if turn['role'] == 'user' else 'Assistant'}: {turn['content']}"
                                for turn in talk) for talk in talks]),
            "messages": ({}, talks)}[form]
        found.append({**prompt, "chosen": chosen, "rejected": rejected, **rest})
    return found


def bandit(beta: float, V: int = 8):
    """A world of one prompt and replies of one token: log-probabilities of the reference (V,), a reward for each, and
    the log-probabilities of the best policy for both, ref exp(r / beta) / Z, where PPO and DPO must arrive."""
    generator = torch.Generator().manual_seed(3)
    ref = torch.randn(V, generator=generator, dtype=torch.float64).log_softmax(0)
    r = torch.randn(V, generator=generator, dtype=torch.float64)
    return ref, r, (ref + r / beta).log_softmax(0)


def assert_noticed(request, monkeypatch, owner, name, right, wrong, check, *given) -> None:
    """A test of a test: check(the fixtures it asks for, *given) must fail once `right` in the source of owner.name is
    `wrong`."""
    asked = [*inspect.signature(check).parameters]
    fixtures = [request.getfixturevalue(fixture) for fixture in asked[:len(asked) - len(given)]]
    original, scope = getattr(owner, name), {}
    function = inspect.unwrap(original)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, f"{name} has changed: found {source.count(right)} times {right!r}"
    exec(source.replace(right, wrong), function.__globals__, scope)
    for place in (owner, sys.modules[check.__module__]):  # which may have imported it by its name
        if getattr(place, name, None) is original:
            monkeypatch.setattr(place, name, scope[name])
    with pytest.raises(AssertionError):
        check(*fixtures, *given)


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def metrics(out) -> list[dict]:
    with open(out / "metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def curve(out) -> list[tuple[int, float]]:
    return [(event["step"], event["loss"]) for event in metrics(out) if "loss" in event]


def same_metrics(out, other, rel, leave_out=("tokens_per_second", "mfu", "memory", "grad_norm")) -> None:
    """Both runs logged the same numbers, one event after the other, but for those of the machine (grad_norm is a
    difference of large numbers at the end)."""
    for a, b in zip(metrics(out), metrics(other), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - set(leave_out):
            assert abs(a[name] - b[name]) <= rel * max(1.0, abs(a[name])), (a["step"], name, a[name], b[name])


def calls_of(monkeypatch, owner, name) -> list:
    """What is passed to a function or method from now on."""
    calls, original = [], getattr(owner, name)

    def listening(*args, **options):
        calls.append(args)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, listening)
    return calls


def split_by_hand(path, n) -> list[str]:
    """Flags for the same lines as two files, the first n to train on."""
    lines = Path(path).read_text().splitlines(keepends=True)
    for name, part in (("front", lines[:n]), ("back", lines[n:])):
        Path(f"{path}.{name}.jsonl").write_text("".join(part))
    return ["--data", f"{path}.front.jsonl", "--val_data", f"{path}.back.jsonl"]


def last(out, name):
    return [event[name] for event in metrics(out) if name in event][-1]


def launch(script, arguments, processes=2) -> None:
    """torchrun; fails the test that calls it if the script fails."""
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                             str(processes), os.path.join(ROOT, script), *arguments], capture_output=True, text=True,
                            timeout=120)
    assert result.returncode == 0, result.stderr


def trained_alike(train, form: str, folder) -> None:
    """train(data, out) logs the same of ranked pairs and of the same pairs in another form."""
    records = ranked(K=2)[form == "alpaca":]  # the first prompt has two turns
    for name, lines in (("ranked", records), ("form", in_form(form, records))):
        train(write(folder / f"{name}.jsonl", lines), folder / name)
    same_metrics(folder / "ranked", folder / "form", 1e-9)
