"""tools/scaling.py: what it adds up is what is there, what it fits is what was planted."""
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import ranks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import train_pretrain
from bench.scaling import draw
from lib.program import UserError
from model import GPT, GPTConfig
from tools import scaling
from tools.scaling import Law, fit_law, minimum, sizes_of, worth
from zero import Zero, per_rank

PLANTED = Law(E=1.1, A=60.0, alpha=0.41, B=90.0, beta=0.35)
CHINCHILLA = Law(1.8172, 482.01, 0.3478, 2085.43, 0.3658)
ENDED = subprocess.CompletedProcess([], 0, stderr="\nerror: no room left\n")
SHAPES = ({"n_layer": 2, "n_embd": 32, "n_head": 4, "n_kv_head": 2, "vocab_size": 800},
          {"n_layer": 3, "n_embd": 48, "n_head": 3})


def shape(**changes):
    return GPTConfig(**{"vocab_size": 40, "max_seq_len": 16, "attention": "naive", **changes})


def plan(capsys, *flags) -> str:
    scaling.main(["plan", *flags])
    return capsys.readouterr().out


# ---- plan ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", SHAPES)
def test_parameters_and_flops_are_the_model_s(changes):
    """Both are those that GPT counts. FLOPs are those that PyTorch counts, if all T x T scores are taken."""
    config, T = shape(**changes), 16
    model = GPT(config)
    params, unit, flops, *_ = sizes_of(config)
    assert (params, flops) == (model.parameter_count(), model.flops_per_token(T))
    assert unit == max(sum(p.numel() for p in module.parameters()) for module in model.units())
    ids = torch.randint(40, (2, T))
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    whole = flops + 6 * config.n_layer * config.n_embd * (2 * T - (T + 1))  # (T + 1) / 2 keys became T
    assert counter.get_total_flops() == whole * ids.numel()


def kept_by(blocks, x, recompute: bool) -> int:
    """Numbers in the tensors that autograd keeps, each storage once, parameters left out."""
    found, weights = {}, {p.untyped_storage().data_ptr() for block in blocks for p in block.parameters()}
    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes() // 4, tensor  # kept, or its place is reused
        return tensor
    rope = [torch.randn(1, x.shape[1], 1, blocks[0].attn.D) for _ in range(2)]
    weights |= {part.untyped_storage().data_ptr() for part in rope}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for block in blocks:
            x = checkpoint(block, x, rope, use_reentrant=False) if recompute else block(x, rope)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("changes", SHAPES)
def test_activations_are_those_that_autograd_keeps(changes):
    config, B, T = shape(**changes, attention="flash"), 2, 16
    blocks, x = GPT(config).blocks, torch.randn(B, T, config.n_embd, requires_grad=True)
    *_, kept, less = sizes_of(config)
    assert kept_by(blocks, x, False) == kept * B * T
    assert kept_by(blocks, x, True) == (less - kept // config.n_layer) * B * T


def counted() -> dict:
    """Bytes that a rank holds after a step, host memory included, for each stage, dtype and offload."""
    found, config = {}, GPTConfig(vocab_size=512, n_layer=2, n_head=4, n_embd=128, max_seq_len=16)
    for stage, dtype, offload in itertools.product(range(4), (torch.float32, torch.bfloat16), range(3)):
        if offload == 2 and stage < 3:
            continue
        model = GPT(config)
        zero = Zero(model, units=[], stage=stage, dtype=dtype, offload=("optim", "params")[:offload])
        ids = torch.randint(512, (2, 16))
        zero.backward(-model(ids, ids).sum())
        zero.step(1e-3)
        found[stage, dtype.itemsize, offload] = sum(
            {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for unit in zero.units
             for x in vars(unit).values() if isinstance(x, torch.Tensor)}.values())
    return found


def test_states_are_those_that_zero_holds():
    """Weights, gradients, masters, moments and what is in host memory, of one rank of one or two."""
    psi = sizes_of(GPTConfig(vocab_size=512, n_layer=2, n_head=4, n_embd=128, max_seq_len=16))[0]
    for world, found in ((1, counted()), (2, ranks().run(2, counted)[0])):
        for (stage, p, offload), held in found.items():
            weights, *more, _ = per_rank(stage, world, psi, psi, p, offload=offload)
            weights *= (stage, p, offload) != (3, 4, 1)  # on a CPU, one memory, these are the masters
            assert held == pytest.approx(weights + sum(more), rel=0.005), (world, stage, p, offload)


def test_the_common_estimate_is_a_sum(capsys):
    out = plan(capsys, "--params", "7e9", "--tokens", "1e12", "--n", "64")
    assert "28 weights + 28 gradients + 56 moments = 112 GB" in out and "168 GB" in out
    states = {line[:17].strip(): [float(x) for x in line[17:].replace("|", " ").split()[:6]]
              for line in out.splitlines() if "yes" in line or " no" in line}
    assert states["0 data parallel"][:4] == [14, 28, 28, 56]  # 18 bytes a parameter
    assert states["3 + weights"][:4] == [0, 0.4375, 0.4375, 0.875]  # 16 bytes over 64 GPUs
    assert states["3, and params"][4] == 1.75


@pytest.mark.parametrize("N, V", [(1e6, 262), (1e6, 32000), (1e8, 32000), (7e9, 32000), (1e13, 262)])
def test_the_planned_shape_has_the_size_asked(N, V, capsys):
    """Embedding and head counted; and a day is FLOPs / (GPUs, their peak, MFU) seconds / 86400."""
    out = plan(capsys, f"--params={N}", f"--vocab_size={V}", "--tokens=1e12", "--n=8", "--mfu=0.5")
    L, C, _, _, params, each, _, flops, days = map(float, re.findall(r"\d\S*\d|\d", out)[:9])
    assert params == pytest.approx(N, rel=0.07) and L <= max(1, C / 64)
    assert flops == pytest.approx(each * 1e12, rel=0.01) and each > 6 * (params - V * C)
    assert days == pytest.approx(flops / (8 * 989e12 * 0.5) / 86400, rel=0.01)


def test_optimum_and_overtraining(capsys):
    """N* and D* cost C, no neighbour is better, and the ratios are those of the published table."""
    for C, ratio in ((1e14, 32.4), (1e18, 25.7), (1e21, 21.6), (5.76e23, 18.4)):
        N = CHINCHILLA.best_size(C)
        assert (D := C / 6 / N) / N == pytest.approx(ratio, rel=0.01)
        assert CHINCHILLA.best_tokens(N) == pytest.approx(D)
        assert all(CHINCHILLA.loss(N * k, D / k) > CHINCHILLA.loss(N, D) for k in (0.99, 1.01))
    loss = CHINCHILLA.loss(N, D)
    assert [CHINCHILLA.tokens_for(k * N, loss) / D for k in (1, 0.5, 0.35, 0.25, 2)] == pytest.approx(
        [1, 2.5, 5.5, 17.9, 0.57], rel=0.02)
    assert CHINCHILLA.tokens_for(0.145 * N, loss) == math.inf > CHINCHILLA.tokens_for(0.147 * N, loss)
    for line in re.findall("its loss.*best N(.*)", plan(capsys, "--served", "2e12")):
        N, _, _, training, all_in_all, _ = map(float, line.split())
        assert all_in_all == pytest.approx(training + 4e12 * N, rel=0.01)


def test_repeated_text():
    """The two published losses; one reading is a plain one; more readings are worth at most 16.4 texts."""
    law = Law(math.exp(0.6254804), math.exp(6.255414), 0.3526596, math.exp(7.3049974), 0.3526596)
    U, best = 25e9, 25e9 / law.best_tokens(1)  # alpha is beta; they count size beyond the best likewise
    for N, D, loss in ((6.34e9, 242e9, 2.225644), (8.67e9, 178e9, 2.226963)):
        assert law.loss(worth(N, best, 5.309743), worth(D, U)) == pytest.approx(loss, abs=2e-6)
    assert [worth(E, 1) / E for E in (1, 4, 16, 40)] == pytest.approx([1, 0.93, 0.66, 0.38], abs=0.005)
    assert worth(5, 9) == 5 and worth(1e15, 1e9) == pytest.approx(16.387756e9)


# ---- the fit ---------------------------------------------------------------------------------------------
def test_fit_recovers_what_was_planted():
    """To 3 digits; with one point far off to 2 %; with noise of half a percent as the drawn laws say."""
    N, D = (x.ravel() for x in np.meshgrid(np.geomspace(2e4, 2e6, 6), np.geomspace(3e5, 1e8, 5)))
    L = PLANTED.loss(N, D)
    assert fit_law(N, D, L)[0] == pytest.approx(PLANTED, rel=1e-3)
    assert fit_law(N, D, np.where(L == L[7], 1.5, 1) * L)[0] == pytest.approx(PLANTED, rel=0.02)
    noise = np.random.default_rng(0).normal(0, 0.005, len(N))
    law, *more = fit_law(N, D, L * np.exp(noise), bootstrap=20)
    for i in (0, 2, 4):
        assert abs(law[i] - PLANTED[i]) < 2.5 * np.std([x[i] for x in more]) < 0.5 * PLANTED[i]


def test_chinchilla_s_points_give_the_corrected_constants():
    """In the 95 % intervals of Besiroglu et al. 2024, and what another minimiser found."""
    N, C, L = np.loadtxt(Path(__file__).with_name("chinchilla.csv"), delimiter=",").T
    law, = fit_law(N, C / 6 / N, L)
    low, high = (1.769, 285, 0.317, 1042, 0.331), (1.871, 744, 0.373, 5810, 0.415)
    assert np.all(np.less(low, law) & np.less(law, high))
    assert law == pytest.approx((1.8172, 477.8, 0.3473, 2143.9, 0.3672), rel=2e-3)


def test_minimum():
    """The lowest point of a parabola; None at the edge, for less than five sizes, or a hill."""
    N = np.array([1e4, 2e4, 4e4, 8e4, 16e4])
    L = 2 + 0.1 * np.log(N / 5e4) ** 2
    assert minimum(N, L) == pytest.approx((5e4, 2))
    assert minimum(N, 2 + 0.1 * np.log(N / 2e5) ** 2) is None
    assert minimum(N[:4], L[:4]) is None and minimum(N, -L) is None


# ---- measure ---------------------------------------------------------------------------------------------
@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("All work and no play. " * 50000)
    return ["measure", "--data", "my.txt", "--out", "out", "--jobs", "2"]


def test_a_measurement_on_planted_losses(corpus, tmp_path, monkeypatch, capsys):
    """It finds the planted law, and predicts before the largest run begins, of 4 times the FLOPs of any
    other. What is done is read, not done again."""
    out, seen = tmp_path / "out" / "my.txt", []
    def command(line, **_):
        flags = dict(x[2:].split("=") for x in line[3:])
        N, D = scaling.family(int(flags["n_embd"]))[1], int(flags["steps"]) * 4 * scaling.T
        seen.append((6 * N * D, (out / "prediction.json").exists()))
        Path(flags["out"], "final").mkdir(parents=True)
        row = {"step": 1, "eval_loss": PLANTED.loss(N, D) * (1 + 0.001 * (int(flags["steps"]) % 3 - 1))}
        Path(flags["out"], "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return ENDED
    monkeypatch.setattr(scaling.subprocess, "run", command)
    monkeypatch.setattr(scaling, "BUDGETS", (1e11, 2e11, 4e11))
    monkeypatch.setattr(scaling, "CENTRE", PLANTED.best_size(1e12))
    monkeypatch.setattr(scaling, "fit_law", lambda *points, bootstrap: fit_law(*points, bootstrap=3))
    scaling.main([*corpus, "--only", "law"])
    report, *others = capsys.readouterr().out, *sorted(seen[:-1])
    assert seen[-1][1] and not any(known for _, known in others)
    assert seen[-1][0] >= 3.99 * max(C for C, _ in others)
    known = json.loads((out / "law.json").read_text())
    assert known["found"]["guess"][0] == pytest.approx(known["loss"], rel=5e-3)
    assert all(Law(**known["law"]).loss(N, D) == pytest.approx(PLANTED.loss(N, D), rel=3e-3)
               for N, D, _ in known["points"])
    assert report.count("best N") == 4 and (out / "report.txt").exists()
    seen.clear()
    scaling.main([*corpus, "--only", "epochs"])
    assert len(seen) == 5  # the whole text, 1, 2, 4 and 16 readings, and none of the law
    assert re.findall(r"epochs.*?worth \d+%, by the law (\d+)%", capsys.readouterr().out) == [
        "100", "100", "98", "93", "66"]
    assert [len((out / f"text-{E}.txt").read_text()) for E in (1, 16)] == [6e5, 37500]


@pytest.mark.parametrize("quick", [False, True])
def test_each_budget_has_five_sizes(quick, monkeypatch):
    """On both sides of the one that is thought to be the best."""
    runs = []
    monkeypatch.setattr(scaling, "train_all", lambda cfg, what, grid: runs.extend(grid) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scaling.measure_law(scaling.MeasureConfig(quick=quick), 1e9)
    sizes = [(scaling.family(width)[1], D) for width, D in runs]
    for C in (C / 48**quick for C in scaling.BUDGETS):
        mine = [N for N, D in sizes if 6 * N * D == pytest.approx(C)]
        assert len(mine) >= 5 and min(mine) < scaling.CENTRE * (C / 1e12) ** 0.5 / 1.5 < max(mine) / 2.2


def test_one_run_is_a_run_of_train_pretrain(corpus, monkeypatch):
    """The command is one that train_pretrain.py takes. A run that has ended is not begun again, one that was
    stopped goes on, one that fails says why. Texts of one name and --quick have folders of their own."""
    lines = []
    monkeypatch.setattr(scaling, "measure_law", lambda cfg, U: (cfg, []))
    monkeypatch.setattr(scaling, "compare", lambda cfg, law, what: [])
    monkeypatch.setattr(scaling.subprocess, "run",
                        lambda line, **_: lines.append(train_pretrain.main(line[2:])) or ENDED)
    scaling.main(corpus)
    cfg = scaling.MeasureConfig(out=Path("out/my.txt").absolute())
    loss = scaling.train(cfg, 16, 20 * 512)
    assert 1 < loss < math.log(262) and scaling.train(cfg, 16, 20 * 512) == loss and lines == [0]
    shutil.rmtree(*cfg.out.glob("*/final"))
    assert scaling.train(cfg, 16, 20 * 512) == pytest.approx(loss) and lines == [0, 0]
    scaling.main([*corpus, "--quick"])
    scaling.main([*corpus, "--data", str(Path("my.txt").absolute())])
    assert len([*Path("out").iterdir()]) == 3
    monkeypatch.setattr(scaling.subprocess, "run", lambda *_, **__: ENDED)
    with pytest.raises(UserError, match="24-wide.*: error: no room left"):
        scaling.train(cfg, 24, 20 * 512)


def test_texts_that_will_not_do(monkeypatch):
    """A short one; and one on which larger models are worse: one line instead of a traceback."""
    monkeypatch.setattr(scaling, "fit_law", lambda *points, bootstrap: fit_law(*points))
    monkeypatch.setattr(scaling, "train_all", lambda cfg, what, runs: np.array([1 + x[0] / 99 for x in runs]))
    for U, words in ((6000, "--data my.txt: found 6000 bytes"), (1e9, "--data my.txt: .* follow no law")):
        with pytest.raises(UserError, match=words):
            scaling.measure_law(scaling.MeasureConfig(data="my.txt"), U)


def test_the_time_left_is_that_of_runs_which_are_left(monkeypatch, capsys):
    """Two of four were there, the third took a minute: the fourth will."""
    monkeypatch.setattr(scaling.time, "monotonic", iter([0, 0.1, 0.2, 60, 120]).__next__)
    monkeypatch.setattr(scaling, "train", lambda *_: 1.0)
    scaling.train_all(scaling.MeasureConfig(jobs=1), "law", [(48, 1e6)] * 4)
    assert "2 of 4 runs\nlaw: 3 of 4 runs, 1.0 minutes left\n" in capsys.readouterr().out


@pytest.mark.parametrize("flags, word", [
    ([], "plan or measure"), (["draw"], "plan or measure"), (["plan", "--mfu", "2"], "--mfu"),
    (["plan", "--params", "0"], "--params"), (["plan", "--gpu", "abacus"], "--gpu"),
    (["plan", "--law", "none.json"], "--law none.json"), (["measure", "--step", "3"], "--step")])
def test_bad_flags_are_one_line(flags, word):
    with pytest.raises(UserError, match=word):
        scaling.main(flags)


def test_the_picture_shows_the_runs(tmp_path):
    """Each run is a point, the largest one alone on its curve; the curves are the law."""
    plt = pytest.importorskip("matplotlib.pyplot")
    known = {"law": PLANTED._asdict(), "points": [(1e4, 4e6, 2.5), (2e4, 2e6, 3.5)],
             "largest": (1e5, 1.6e6), "loss": 2.0}
    figure, ax = plt.subplots()
    draw(ax, known)
    small, points, large, star = [np.stack(line.get_data()) for line in ax.lines]
    assert points.tolist() == [[1e4, 2e4], [2.5, 3.5]] and star.tolist() == [[1e5], [2.0]]
    assert small[1] == pytest.approx(PLANTED.loss(small[0], 4e10 / small[0]))
    assert large[1] == pytest.approx(PLANTED.loss(large[0], 1.6e11 / large[0]))
    plt.close(figure)
