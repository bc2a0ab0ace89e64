"""What the tests of the training scripts share: small models, small files, and what a run has left behind."""
import dataclasses
import importlib
import inspect
import json
import os
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from ranks import as_torchrun, ranks

from data import CHAT_TEMPLATE
from lib.checkpoint import final_folder, save_final
from lib.tokenizer import make_tokenizer
from model import GPT, GPTConfig

SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 2, "max_seq_len": 96}
TOPICS = "apple bridge cat door engine forest garden house island jacket kettle".split()


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
    config = {"model": dataclasses.asdict(model.config), "head": head, "chat_template": CHAT_TEMPLATE}
    save_final(str(folder), model.state_dict(), {**config, **changes}, os.path.join(folder, "tokenizer.json"))
    return str(folder)


def ranked(topics=TOPICS, K=4) -> list[dict]:
    """Records of K replies to each topic, the best first; the first topic has two turns."""
    records = []
    for n, topic in enumerate(topics):
        prompt = f"What of the {topic}?" if n else [
            {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."},
            {"role": "user", "content": f"And the {topic}?"}]
        replies = [f"A {word} {topic}{'!' * (n % 3)}" for word in ("good", "fair", "poor", "bad")]
        records.append({"prompt": prompt, "responses": replies[:K], "tag": "odd" if n % 2 else "even",
                        "tags": ["fine", "fine", "bad", "bad"][:K], "scores": [3.0, 2.5, 1.0, 0.0][:K]})
    return records


def bandit(beta: float, V: int = 8):
    """One prompt, V replies of one token: (log ref, rewards, log of the best policy: ref exp(r / beta) / Z),
    each (V,). PPO and DPO must arrive at the last one."""
    generator = torch.Generator().manual_seed(3)
    ref = torch.randn(V, generator=generator, dtype=torch.float64).log_softmax(0)
    r = torch.randn(V, generator=generator, dtype=torch.float64)
    return ref, r, (ref + r / beta).log_softmax(0)


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def split_by_hand(path, n) -> list[str]:
    """Flags for the same lines as two files, the first n to train on."""
    lines = Path(path).read_text().splitlines(keepends=True)
    for name, part in (("front", lines[:n]), ("back", lines[n:])):
        Path(f"{path}.{name}.jsonl").write_text("".join(part))
    return ["--data", f"{path}.front.jsonl", "--val_data", f"{path}.back.jsonl"]


# ---- runs, and what they have left -------------------------------------------------------------------------

def play(script: str, arguments: list[str], folder: str) -> None:
    """Run main(arguments), without measuring how fast this machine is: that takes longer than our runs."""
    with as_torchrun() if torch.distributed.is_initialized() else pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.run.matmul_peak", lambda *_: 1e10)
        patch.chdir(folder)
        assert importlib.import_module(script).main(arguments) == 0


def run_script(script: str, arguments: list[str], world=1) -> None:
    """Run a script to its end, in this process or as `world` ranks of the pool."""
    given = script, arguments, os.getcwd()
    play(*given) if world == 1 else ranks().run(world, play, *given, timeout=180)


def metrics(out) -> list[dict]:
    """The log, less what was read."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "left_out" not in line]


def curve(out) -> list[tuple[int, float]]:
    return [(event["step"], event["loss"]) for event in metrics(out) if "loss" in event]


def last(out, name):
    return [event[name] for event in metrics(out) if name in event][-1]


def same_weights(out, other) -> bool:
    a, b = (torch.load(Path(final_folder(folder)) / "model.pt", weights_only=True) for folder in (out, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_metrics(out, other, rel, leave_out=("tokens_per_second", "mfu", "memory", "grad_norm")) -> None:
    """Both runs logged the same numbers, but for those of the machine. (At the end grad_norm is rounding.)"""
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


def assert_noticed(request, monkeypatch, owner, name, right, wrong, check, *given) -> None:
    """A test of a test: check(the fixtures it asks for, *given) must fail once `right` in the source of
    owner.name is `wrong`."""
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
