"""plot.py draws what is there; it is the one script with an optional package."""
import json

import pytest

from bench import pictures as plot
from lib.program import UserError


def test_without_matplotlib(monkeypatch):
    """One line that says how to get it."""
    monkeypatch.setattr(plot, "plt", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot.main(["--life", "out"])


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_benchmarks(attention, zero):
    """What bench.py attention and zero would leave, as far as plot.py reads it."""
    row = {"T": 256, **{f"{peer} {unit}": 1.0 for peer in ("ours", "sdpa", "naive") for unit in ("ms", "MB")}}
    attention.write_text(json.dumps({"tables": {"by length (ours / sdpa), torch.float32, causal": [row]}}))
    peers = "ddp", "fsdp2", "stage 0", "stage 1", "stage 2", "stage 3"
    zero.write_text(json.dumps({"tables": {"memory per rank, 2 ranks": [
        {"what": peer, "value": 4.1, "formula": 4.0} for peer in peers]}}))


def test_every_picture(tmp_path):
    """A life of two stages, and both benchmarks; a file that is none is one clear error."""
    pytest.importorskip("matplotlib")
    life, out = tmp_path / "life", tmp_path / "pictures"
    lines(life / "sft" / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None},
                                           {"step": 2, "eval_loss": 1.0}])
    lines(life / "ppo" / "metrics.jsonl", [{"step": 0, "eval_score": 0.0, "eval_kl": 0.0},
                                           {"step": 1, "objective/scores": 0.1, "objective/kl": 0.2}])
    (life / "ppo" / "rollouts.json").write_text(json.dumps([{"step": 1, "reward": 0.1, "gold": 0.2, "kl": 0.3}]))
    numbers = dict.fromkeys([*plot.BARS, "gold", "gold_standard_error"], 1.0)
    (life / "sft" / "scorecard.json").write_text(json.dumps({
        "prompts": {"known": 2}, "sampled": numbers, "best_of": [{"n": 2, "kl": 0.2, "prompts": 2, "rm": numbers}]}))
    attention, zero = tmp_path / "attention.json", tmp_path / "zero.json"
    write_benchmarks(attention, zero)
    plot.main(["--life", str(life), "--attention", str(attention), "--zero", str(zero), "--out", str(out)])
    assert {path.name for path in out.iterdir()} == {f"{name}.png" for name in (
        "losses", "rewards", "scorecard", "attention", "zero")}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.iterdir())
    with pytest.raises(UserError, match="by length"):
        plot.main(["--attention", str(zero), "--out", str(out)])
