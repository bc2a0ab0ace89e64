"""lib/run.py on a toy loop: when a run evaluates, saves and stops; what a resumed run must share with the one
that it continues; what is written; the learning rate at its corners."""
import math
import os
import shutil
import signal
from dataclasses import dataclass

import pytest
import torch
from ranks import as_torchrun, ranks
from small_chat import curve, metrics, random_model, same_metrics, same_weights

from lib.checkpoint import save_checkpoint
from lib.program import UserError, parse
from lib.ranks import setup
from lib.run import Run, RunConfig, lr_at, matmul_peak, peak_memory, with_error
from lib.tokenizer import Tokenizer, make_tokenizer
from zero import Zero

IDS = torch.arange(64).view(2, 32)


@dataclass
class Config(RunConfig):
    data: str = "here"
    beta: float = 0.3  # a stage's own flag
    epochs: float = 2.0  # of the data
    min_lr: float = 0.0  # where the rate ends
    steps: int = 6
    eval_every: int = 2
    save_every: int = 3
    log_every: int = 1


def new_run(out, shape=(), tokenizer="byte", fingerprint="abc", read=("", {}), **flags) -> Run:
    """A run of a tiny model in the folder `out`."""
    cfg = Config(out=str(out), device="cpu", **flags)
    members, path = setup("cpu", catch_signals=False), f"{out}.tokenizer.json"
    if members.is_main:
        make_tokenizer(tokenizer, map(chr, range(32, 288))).save(path)  # of both kinds equally large
    members.barrier()
    model = random_model(**{"n_layer": 1, "n_embd": 8, "max_seq_len": 32, **dict(shape)})
    zero = Zero(model, units=model.units(), **cfg.zero_options(members))
    return Run(cfg, members, {"model": zero}, Tokenizer.load(path), inputs={"data": fingerprint},
               final={"head": "lm"}, read=read)


def go(run, body=lambda run, step: None, stop_at=0, number=signal.SIGTERM, first=False) -> tuple[list, int]:
    """Train to the end, or until a signal comes in step `stop_at`; body(run, step) may return "break" or
    "continue". Returns (what happened, exit code)."""
    happened, (zero,) = [], run.models.values()

    def evaluate() -> dict:
        happened.append("evaluated")
        with torch.no_grad():
            return {"eval_loss": -zero.model(IDS[:, :-1], IDS[:, 1:]).mean().item()}

    def save(out, step, *more, **options):
        happened.append(f"saved {step}")
        save_checkpoint(out, step, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.run.save_checkpoint", save)
        for step in run.steps(evaluate, first=first):
            happened.append(step)
            if (what := body(run, step)) == "break":
                break
            if what == "continue":
                continue
            if step == stop_at:
                run.ranks.stop_signal = number
            loss = -zero.model(IDS[:, :-1], IDS[:, 1:]).mean()
            zero.backward(loss / run.ranks.world)
            info = zero.step(lr_at(step, run.cfg), run.cfg.clip)
            run.log(step, tokens=62, skipped=info.skipped, loss=loss.item())
    code = run.finish()
    if run.lock:
        run.lock.close()  # as when the process ends
    return happened, code


WHOLE = [1, 2, "evaluated", 3, "saved 3", 4, "evaluated", 5, 6, "evaluated", "saved 6"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert go(new_run(out)) == (WHOLE, 0)
    return out


@pytest.mark.parametrize("flags, first, expected", [
    ({"eval_every": 0, "save_every": 0, "steps": 2}, False, [1, 2, "evaluated", "saved 2"]),
    ({"steps": 3, "resume": True}, True, ["evaluated", 1, 2, "evaluated", 3, "evaluated", "saved 3"])])
def test_what_happens_between_the_turns(tmp_path, flags, first, expected):
    """Evaluation, then the checkpoint, where they are due and after the last step; with 0 only there.
    --resume with nothing to resume is a fresh start."""
    out = tmp_path / "out"
    assert go(new_run(out, **flags), first=first) == (expected, 0) and (out / "final").is_dir()
    assert sum("eval_loss" in line for line in metrics(out)) == expected.count("evaluated")


@pytest.mark.parametrize("at, before, after", [
    (1, [1, "saved 1"], WHOLE[1:]), (4, [*WHOLE[:6], "saved 4"], WHOLE[6:]),
    (6, [*WHOLE[:9], "saved 6"], ["evaluated"])])
def test_a_stop_saves_at_once_and_nothing_is_lost(unbroken, tmp_path, at, before, after):
    """Asked to stop in step `at`: saved after it, without an evaluation and without final/. The run that goes
    on first makes the evaluation, if one was due. Weights and log end as those of the unbroken run."""
    out = tmp_path / "out"
    assert go(new_run(out), stop_at=at, number=signal.SIGINT) == (before, 130)
    assert not (out / "final").exists()
    assert go(new_run(out, resume=True), first=True) == (after, 0)  # first: of a new run alone
    assert same_weights(out, unbroken)
    same_metrics(out, unbroken, 0)


def one_rank_is_asked(out, resume):
    """Rank 1 of two, in step 4 of its first life."""
    with as_torchrun():
        run = new_run(out, resume=resume, zero=3)
        return go(run, stop_at=4 if run.ranks.rank and not resume else 0)


def test_all_ranks_stop_together(tmp_path):
    """Both save after that very step and go on together. Rank 0 alone writes the log."""
    out = tmp_path / "out"
    for resume, happened in ((False, [*WHOLE[:6], "saved 4"]), (True, WHOLE[6:])):
        assert ranks().run(2, one_rank_is_asked, out, resume) == [(happened, 0)] * 2
    assert [step for step, _ in curve(out)] == [1, 2, 3, 4, 5, 6]


def test_break_and_continue(tmp_path):
    """`continue` is a whole turn. After `break` nothing is evaluated or saved; final/ is written."""
    assert go(new_run(tmp_path / "a"), body=lambda *_: "continue") == (WHOLE, 0)
    assert go(new_run(tmp_path / "b"), body=lambda _, step: "break" if step == 2 else None) == ([1, 2], 0)
    assert (tmp_path / "b" / "final").is_dir()


def test_a_loss_that_blew_up_is_not_saved(tmp_path):
    """A validation loss that is not finite: one line that names --lr, and no checkpoint."""
    run = new_run(tmp_path / "out")
    with pytest.raises(UserError, match="--lr"):
        for _ in run.steps(lambda: {"eval_loss": float("nan")}):
            pass
    assert os.listdir(tmp_path / "out") == ["lock"]


def test_a_resumed_run_says_which_flags_differ(tmp_path, capsys):
    """All flags but a few are compared, a stage's own as well. Of a file the content is, its path is not."""
    out, free = tmp_path / "out", {"data": "elsewhere", "save_every": 0, "steps": 7, "zero": 1}
    go(new_run(out, steps=3))
    go(new_run(out, resume=True, **free))
    assert "warning" not in capsys.readouterr().err
    go(new_run(out, resume=True, steps=8, lr=2e-3, beta=0.5, seed=7, fingerprint="another"))
    said = capsys.readouterr().err
    for words in ("--lr was 0.001 and is 0.002", "--beta was 0.3 and is 0.5", "--seed was 1 and is 7",
                  "data was 'abc' and is 'another'"):
        assert words in said
    assert said.count("warning") == 1 and said.count(" was ") == 4


@pytest.mark.parametrize("changes, words", [
    ({"shape": {"rope_theta": 500.0}}, "another model"), ({"tokenizer": "char"}, "another tokenizer"),
    ({"steps": 5}, "--steps 5: .* at step 6"), ({"resume": False}, "--resume")])
def test_another_run_is_refused(unbroken, changes, words):
    """Another model, though all its tensors have the same shapes; another tokenizer of the same size; fewer
    steps than are done; without --resume, a folder that holds a run."""
    with pytest.raises(UserError, match=words):
        new_run(unbroken, **{"resume": True, **changes})


def test_an_older_checkpoint(unbroken, tmp_path, capsys):
    """What the log and the files of append() hold of later steps is dropped, and comes anew. A checkpoint
    that knows fewer flags loads, with a warning."""
    def body(run, step):
        run.append("samples.jsonl", [{"step": step, "text": "你", "n": n} for n in range(2)])

    out = tmp_path / "out"
    run = new_run(out)
    del run.should["--beta"]
    go(run, body=body)
    before = (out / "samples.jsonl").read_text()
    (out / "step-00000006").rename(tmp_path / "gone")
    with open(out / "samples.jsonl", "a") as file:
        file.write('{"step": 2, "te')  # what a kill has left
    assert go(new_run(out, resume=True), body=body) == (WHOLE[5:], 0)
    assert "warning" in capsys.readouterr().err
    assert (out / "samples.jsonl").read_text() == before and before.count("你") == 12
    assert same_weights(out, unbroken)
    same_metrics(out, unbroken, 0)


def test_the_numbers_of_the_log(tmp_path, capsys, monkeypatch):
    """At every log_every-th step, the first and the last: tokens per second since the line before, MFU,
    skipped updates, which add up over a resume as well. A NaN is null. The screen shows twelve numbers."""
    monkeypatch.setattr("lib.run.matmul_peak", lambda *_: 2e6)
    monkeypatch.setattr("model.GPT.flops_per_token", lambda *_: 1e3)
    monkeypatch.setattr("time.perf_counter", iter(range(10**6)).__next__)  # each look takes a second
    more = {f"x{n}": n for n in range(12)}
    for steps in (6, 7):
        run = new_run(tmp_path / "out", resume=steps == 7, steps=steps, log_every=2, eval_every=0)
        for step in run.steps(dict):
            run.log(step, tokens=100, skipped=step in (2, 7), loss=float("nan"), **more)
        run.lock.close()
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 7] and {line["loss"] for line in lines} == {None}
    assert [line["tokens_per_second"] for line in lines] == [100, 100, 100, 200, 100]  # saved at 3
    assert [line["mfu"] for line in lines] == [line["tokens_per_second"] * 1e3 / 2e6 for line in lines]
    assert [line.get("skipped") for line in lines] == [None, 1, 1, 1, 2] and lines[0]["memory"] > 2**20
    shown, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/6 | loss nan"))
    assert "x10 10 | 100 tok/s | mfu 5% |" in shown and shown.endswith("0:05 left")


def test_the_best_model_is_kept(tmp_path, capsys):
    """--keep_best: final/ is the model with the lowest validation loss, also if a resumed run comes later. A
    loss that is higher than before is said, with or without the flag."""
    weights = {}

    def train(keep_best, losses, stop_at=0, resume=False):
        run = new_run(tmp_path / str(keep_best), eval_every=1, keep_best=keep_best, resume=resume)
        zero, = run.models.values()
        for step in run.steps(lambda: {"eval_loss": losses.pop(0)}):
            zero.backward(-zero.model(IDS[:, :-1], IDS[:, 1:]).mean())
            zero.step(1e-2, 1.0)
            weights[step] = zero.full_state_dict()["head.weight"].clone()
            run.ranks.stop_signal = signal.SIGTERM if step == stop_at else 0
        run.finish()
        run.lock.close()
        final = tmp_path / str(keep_best) / "final" / "model.pt"
        return torch.load(final)["head.weight"] if final.exists() else None

    assert torch.equal(train(False, [3.0, 2.0, 4.0, 5.0, 2.5, 6.0]), weights[6])
    assert capsys.readouterr().out.count("eval_loss was 2 at step 2 (see --keep_best)") == 4
    assert train(True, [3.0, 2.0, 4.0], stop_at=4) is None
    assert torch.equal(train(True, [5.0, 2.5, 6.0], resume=True), weights[2])
    out = tmp_path / "True"  # as a run leaves it that is killed before its first checkpoint
    for folder in (out / "final", *out.glob("step-*")):
        shutil.rmtree(folder)
    os.rename(out / "best" / "step-00000002", out / "best" / "step-00000099")
    assert torch.equal(train(True, [3.0, 4.0, 2.0, 5.0, 6.0, 7.0]), weights[3])
    shutil.rmtree(out / "best")  # as of a run that did not keep it
    shutil.rmtree(out / "step-00000006")
    assert torch.equal(train(True, [9.0, 10.0, 11.0], resume=True), weights[4])


def test_what_was_read_is_said_and_counted_once(tmp_path, capsys):
    """In the log before step 1; a run that goes on says it without counting it again."""
    for resume in (False, True):
        run = new_run(tmp_path / "out", read=("x.jsonl: 9 used, 1 left out", {"used": 9, "left_out": 1}),
                      resume=resume, steps=6 if resume else 3)
        go(run)
        assert "x.jsonl: 9 used" in capsys.readouterr().out
    logged = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert logged[0] == '{"step": 0, "used": 9, "left_out": 1}' and "left_out" not in "".join(logged[1:])


def test_means_with_their_errors():
    """The error of a ratio of sums is what drawing the items anew shows; of a mean it is std / sqrt(n). From
    30 items on there is none. One of one is no certainty; of one number nothing is known."""
    torch.manual_seed(0)
    n = torch.randint(1, 6, (29,)).double()
    x, draws = n * 3 + torch.randn(29).double(), torch.randint(0, 29, (20_000, 29))
    found, drawn = with_error("a", x, n), x[draws].sum(1) / n[draws].sum(1)
    assert found["a"] == pytest.approx((x.sum() / n.sum()).item())
    assert found["a_stderr"] == pytest.approx(drawn.std().item(), rel=0.05)
    assert with_error("a", x)["a_stderr"] == pytest.approx(x.std().item() / 29**0.5)
    assert with_error("a", torch.ones(30)) == {"a": 1.0}
    assert with_error("a", torch.ones(1), share=True)["a_stderr"] == pytest.approx(0.245, abs=1e-3)
    assert math.isnan(with_error("a", torch.ones(1))["a_stderr"])


@pytest.mark.parametrize("decay, middle", [("linear", 0.55), ("cosine", 0.55), ("flat-then-linear", 0.85)])
def test_the_learning_rate_at_its_corners(decay, middle):
    """A climb from 0 in equal parts, the peak where it ends, then down. It would be at min_lr one update
    after the last: a rate of 0 would waste the last one."""
    cfg = Config(steps=100, warmup_steps=10, lr=1.0, min_lr=0.1, decay=decay)
    rates = [lr_at(step, cfg) for step in range(1, 102)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[100] == pytest.approx(0.1) and rates[99] > 0.1
    assert (rates[54] + rates[55]) / 2 == pytest.approx(middle)  # half of the way down
    assert (rates[45] == 1.0) == (decay == "flat-then-linear")  # for 40 % of the way
    for steps, warmup in ((1, 0), (1, 1), (5, 0), (5, 5), (29, 3), (29, 50)):  # at most a tenth climbs
        cfg = Config(steps=steps, warmup_steps=warmup, lr=1.0, decay=decay)
        rates = [lr_at(step, cfg, peak=0.5) for step in range(1, steps + 1)]
        assert min(rates) > 0 and max(rates) <= 0.5 and rates.index(max(rates)) <= max(0, steps // 10 - 1)


def test_steps_and_rows_that_were_left_open():
    """As many steps as the epochs take, rounded up; rows as long as the model reads, and no longer."""
    cfg = parse(Config, ["--steps", "0", "--batch_size", "8"])
    cfg.fit_steps(33)
    cfg.fit_rows(64)
    assert (cfg.steps, cfg.seq_len, cfg.eval_every) == (9, 64, 1)  # 2 epochs of 33 items
    for wrong, action in (("--seq_len 65", lambda cfg: cfg.fit_rows(64)), ("--log_every 0", None),
                          ("--epochs 0 --steps 0", lambda cfg: cfg.fit_steps(64)), ("--batch_size 0", None),
                          ("--seq_len 5", lambda cfg: cfg.fit_steps(0))):
        with pytest.raises(UserError, match=wrong.split()[0]):
            action(parse(Config, wrong.split()))


def test_the_machine_is_measured():
    assert 1e8 < matmul_peak(torch.device("cpu"), torch.float32) < 1e14
    assert 2**20 < peak_memory(torch.device("cpu")) < 2**40
