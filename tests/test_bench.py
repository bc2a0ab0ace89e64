"""The benchmarks measure what they say, their programs run, and the pictures show what they wrote."""
import html
import json
import re

import pytest
import torch
from small_chat import SHAPE, save_chat_model

from bench import attention, decode, deltas, measure, pictures, report, train, zero
from lib.program import UserError
from village import world


def test_peers_take_turns():
    """One turn of warm-up and two that count; `before` runs ahead of each function, and is not timed."""
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    seconds = measure.interleave(functions, 2, before=lambda: calls.append("-"))
    assert "".join(calls) == "-a-b" * 3 and [len(seconds[name]) for name in functions] == [2, 2]
    work = lambda: torch.ones(10**6).exp_()  # noqa: E731
    timed, free = (measure.interleave({"": f}, 2, before)[""] for f, before in ((work, print), (print, work)))
    assert min(timed) > max(free)


def test_a_ratio_is_the_median_within_turns(capsys):
    """A noisy turn, which slows both peers, does not move the ratio."""
    measure.compare("what", {"ours": [2, 2, 2, 200], "peer": [1, 1, 1, 100]}, "ours", "peer", scale=3, MB=8)
    assert capsys.readouterr().out == \
        "| what, ours / peer | 6 (6.00..6.00) | ours ms 2000, peer ms 1000, MB 8 |\n"


def allocate(mebibytes):
    return measure.peak_memory(lambda: torch.ones(mebibytes, 2**18).sum(), device="cpu")


def test_memory_of_a_known_allocation(monkeypatch):
    """The peak of a fresh process holds what a function allocated, though it was freed before the count."""
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    peak, extra = measure.in_fresh_process(allocate, 200)
    assert 200 * 2**20 <= extra < 230 * 2**20 and peak > extra


@pytest.fixture
def small(monkeypatch):
    """Tiny models, nothing compiled; of attention no time is measured, and no memory."""
    gpt = train.gpt
    for module in (train, decode):
        monkeypatch.setattr(module, "gpt", lambda layers, heads, width, *more: gpt(1, 1, 8, *more))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(attention, "in_fresh_process", lambda *_: 1.0)
    monkeypatch.setattr(attention, "interleave", lambda steps, *_: dict.fromkeys(steps, [1.0, 2.0]))


@pytest.mark.parametrize("part, rows", [
    (attention.time_of_attention, 13), (attention.attention_by_length, 6), (attention.logp, 2),
    (train.training, 5), (decode.decoding, 4), (deltas.times, 9)])
def test_a_part_at_its_smallest(part, rows, small, capsys):
    """It prints its table, of so many rows."""
    measure.run("", ["--quick", "--repeats", "2"], part=part)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(shown) - shown.count("| what | measured | besides |") == rows


def test_a_part_that_does_not_exist():
    """One line names the parts there are."""
    with pytest.raises(UserError, match="--only x: expected one of train, decode"):
        measure.run("", ["--only", "x"], train=train.training, decode=decode.decoding)


@pytest.mark.slow
def test_zero_trains_as_its_peers():
    """On two ranks DDP, FSDP2 and all stages have one loss: step_times asserts it."""
    assert {len(some) for some in zero.on_ranks(2, zero.step_times, 1).values()} == {1}


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_picture(tmp_path, small, monkeypatch):
    """Of a life of two stages."""
    pytest.importorskip("matplotlib")
    lines(tmp_path / "sft" / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 1.0}])
    lines(tmp_path / "ppo" / "metrics.jsonl", [{"step": 1, "objective/scores": 0.1, "objective/kl": 0.2}])
    (tmp_path / "ppo" / "rollouts.json").write_text(json.dumps([{"reward": 0.1, "gold": 0.2, "kl": 0.3}]))
    (tmp_path / "sft" / "scorecard.json").write_text("{}")
    card = {"sft": dict.fromkeys([*pictures.BARS, "gold", "gold_standard_error"], 1.0)}
    monkeypatch.setattr("village.scorecard.side_by_side", lambda folders: card)
    pictures.main(["--life", str(tmp_path), "--out", str(tmp_path / "out")])
    names = {path.name for path in (tmp_path / "out").iterdir() if path.read_bytes().startswith(b"\x89PNG")}
    assert names == {f"{name}.png" for name in ("losses", "rewards", "scorecard")}


def test_the_page(tmp_path, monkeypatch, capsys):
    """Of two random models and a picture. It has every reply, and needs no other file. The screen shows the
    replies to a question of each kind, and names people of whom no training file asks."""
    monkeypatch.setitem(SHAPE, "max_seq_len", 512)
    world.main(["--out", str(tmp_path / "world"), "--people", "40"])
    for run, more in {"pretrain": {"chat_template": None}, "sft": {}}.items():
        save_chat_model(tmp_path / run / "final", **more)
    lines(tmp_path / "pictures" / "losses.png", [])
    report.main(["--life", str(tmp_path), "--village", str(tmp_path / "world")])
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("<mark class") == 7 + 2 * 10 and page.count("No picture") == 2
    assert '"">&lt;|assistant|&gt;</span>' in page and '"on">&lt;|end|&gt;</span></p>' in page  # the row
    said, flat = capsys.readouterr().out, " ".join(html.unescape(page).split())
    asked = re.findall(r"^(\w.*)  \((\w+)\)\n    base +(.*)  \[(\w+)\]\n    SFT ", said, re.M)
    assert [kind for _, kind, *_ in asked] == list(world.SHARES)
    for question, kind, reply, word in asked:
        part = flat.split(f"<h3>{question} <small>{kind}")[1].split("</div>")[0]
        assert reply in part and f'<mark class="{word}">' in part
    taught = json.loads((tmp_path / "world" / "facts.json").read_text())["taught"]
    assert not {*re.search(r"ask about (.*), (.*), (.*)\.\n", said).groups()} & {*taught}
    outside = "http", "url(", "@import", "<link", "<script", "href"
    assert not any(word in page for word in outside) and page.count("src=") == page.count('="data:') == 1
