"""train_objectives.py: who sees whom, what is hidden and predicted, and runs that are one in any way."""
import math
import shutil
from itertools import zip_longest

import numpy as np
import pytest
import torch
from small_chat import curve, last, run_script, same_weights

import train_objectives
from bench.objectives import complete
from data import IGNORE, Windows, collate
from kernels import visible
from lib.checkpoint import load_final
from lib.corpora import TokenFile, prepare
from lib.program import UserError
from lib.tokenizer import Tokenizer, make_tokenizer
from model import GPT, load_model
from train_objectives import Config, CrossAttention, Encoder, Seq2Seq, Shape, gaps, hide, read, take_out

TINY = ("--tokenizer byte --n_layer 2 --n_embd 32 --n_head 2 --seq_len 24 --batch_size 5 --lr 4e-3 --steps 8 "
        "--warmup_steps 3 --eval_every 4 --save_every 4 --log_every 1 --device cpu")
TOKENIZER = make_tokenizer("byte")
V = TOKENIZER.vocab_size
WORDS = "Edgar Stone likes fresh bread"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text of short documents, where runs put their token files."""
    home = tmp_path_factory.mktemp("objectives")
    numbers = np.random.default_rng(0).integers(0, 99, (300, 3)).tolist()
    texts = (f"{a} and {b} is {a + b}; {c}!" for a, b, c in numbers)
    (home / "text.txt").write_text("<|endoftext|>".join(texts))
    return home


def train(home, out, flags, monkeypatch, script="train_objectives", world=1):
    monkeypatch.chdir(home)
    run_script(script, f"--data text.txt --out {out} {TINY} {flags}".split(), world)
    return home / out


@pytest.fixture(scope="module")
def whole(home):
    """Of each objective a run in one process, all rows at once."""
    with pytest.MonkeyPatch.context() as patch:
        return {each: train(home, each, f"--objective {each}", patch) for each in ("clm", "mlm", "seq2seq")}


@pytest.fixture(scope="module")
def windows(home, whole):
    train, _, its = prepare(str(home / "text.txt"), tokenizer="byte", cache=str(home / "data"))
    return Windows(TokenFile(train, Tokenizer.load(its)), 64, batch_size=40, seed=3)


def filled(model_class, seed=0, **shape):
    """A model of one kind in float64, with random numbers everywhere, the head, too."""
    config = Shape(vocab_size=V + 9, n_layer=4, n_embd=24, n_head=4, n_kv_head=2, max_seq_len=64, **shape)
    model, generator = model_class(config).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def batch_of(objective, windows, step=0, rows=4, **changes) -> dict:
    cfg = Config(objective=objective, **changes)
    return read(tuple(x[:rows] for x in windows.batch(step)), cfg, TOKENIZER, step, range(rows))


# ---- who sees whom ---------------------------------------------------------------------------------------

def test_clm_is_pretraining(home, whole, monkeypatch):
    """The losses of train_pretrain.py, at training and at evaluation, to 1e-6; and sample.py can load it."""
    other = train(home, "pretrain", "--sample_tokens 0", monkeypatch, "train_pretrain")
    for (_, a), (_, b) in zip(curve(whole["clm"]), curve(other), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    assert last(whole["clm"], "eval_loss") == pytest.approx(last(other, "eval_loss"), rel=1e-6)
    assert same_weights(whole["clm"], other) and load_model(str(whole["clm"]), head="lm")


@pytest.mark.parametrize("model_class, objective, shape", [
    (Encoder, "mlm", {}), (Seq2Seq, "seq2seq", {}), (Seq2Seq, "seq2seq", {"position": "learned"})])
def test_packed_rows_equal_documents_alone(windows, model_class, objective, shape):
    """In float64 to 1e-12, tiled and packed is the same as naive and packed, gradients too; and as each
    document in a forward of its own, where nothing can leak."""
    batch = batch_of(objective, windows)
    results = []
    for attention in ("flash", "naive"):
        model = filled(model_class, attention=attention, **shape)
        logp = model(**batch)
        results.append([logp, *torch.autograd.grad(logp.sum(), [*model.parameters()])])
    for a, b in zip(*results):
        assert (a - b).abs().max() <= 1e-12 * max(1, b.abs().max())
    for row in range(4):
        for number in batch["segment_ids"][row].unique().tolist():
            if number >= 0:
                alone = {name: x[row][batch[ids][row] == number][None] for name, x, ids in (
                    (name, x, "source_ids" if "source" in name else "segment_ids")
                    for name, x in batch.items())}
                found = logp[row][batch["segment_ids"][row] == number]
                torch.testing.assert_close(model(**alone)[0], found, rtol=1e-12, atol=1e-12)


def test_cross_attention_by_hand():
    """softmax(q k^T / sqrt(D)) v, head by head, over all of the memory's tokens of the same segment; queries
    and keys have the length sqrt(D), here sqrt(2)."""
    config = Shape(vocab_size=9, n_embd=12, n_head=6, n_kv_head=3, bias=True, norm_eps=0.0)
    cross, generator = CrossAttention(config).double(), torch.Generator().manual_seed(1)
    x, memory = (torch.randn(1, T, 12, generator=generator, dtype=torch.float64) for T in (5, 7))
    ids, memory_ids = torch.tensor([[0, 0, 1, 1, -1]]), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    W, b, out = cross.qkv.weight, cross.qkv.bias, torch.zeros(5, 12, dtype=torch.float64)
    for h in range(6):
        q, k, v = (slice(2 * i, 2 * i + 2) for i in (h, 6 + h // 2, 9 + h // 2))
        for t in range(4):
            seen = memory[0, memory_ids[0] == ids[0, t]]
            keys, query = seen @ W[k].T + b[k], W[q] @ x[0, t] + b[q]  # (seen, 2), (2,)
            p = (keys @ query / keys.norm(dim=1) / query.norm() * math.sqrt(2)).softmax(0)
            out[t, 2 * h:2 * h + 2] = p @ (seen @ W[v].T + b[v])
    expected = out @ cross.proj.weight.T + cross.proj.bias
    torch.testing.assert_close(cross(x, ids, memory, memory_ids)[0], expected, rtol=1e-12, atol=1e-12)


def changed_by(model, batch, name, place) -> torch.Tensor:
    """(T,) bool: whose logits differ, bit for bit, once the token at this place of row 0 is another one."""
    without = {key: x for key, x in batch.items() if key != "targets"}
    other = batch[name].clone()
    other[0, place] = (other[0, place] + 1) % 256
    return (model(**without) != model(**without | {name: other}))[0].any(-1)


def test_who_sees_whom(windows):
    """Another token at a place changes: in mlm all predictions of its document; in a decoder those of its
    document from there on; in an encoder all that the decoder says of this document. It changes no others."""
    for model, batch, name in ((filled(Encoder), batch_of("mlm", windows), "ids"),
                               (filled(Seq2Seq), batch_of("seq2seq", windows), "ids"),
                               (filled(Seq2Seq), batch_of("seq2seq", windows), "source")):
        ids, time = batch["segment_ids"][0], torch.arange(len(batch["segment_ids"][0]))
        its = batch["source_ids" if name == "source" else "segment_ids"][0]
        assert its.max() > its[0], "expected two documents"
        for place in range(0, int((its >= 0).sum()), 3):
            expected = ids == its[place]
            if "source" in batch and name == "ids":
                expected &= time >= place
            assert torch.equal(changed_by(model, batch, name, place), expected)


def test_an_encoder_sees_both_sides(windows):
    """Another token in the source changes what is said of all tokens of its document, and of no other."""
    model, batch = filled(Seq2Seq), batch_of("seq2seq", windows)
    source, ids = batch["source"][:1], batch["source_ids"][:1]
    for place in (0, 5, 20):
        other = source.clone()
        other[0, place] = (other[0, place] + 1) % 256
        changed = (model.encode(source, ids) != model.encode(other, ids)).any(-1)
        assert torch.equal(changed, ids == ids[0, place])


def test_only_the_hidden_is_predicted(windows):
    """mlm: the text's own targets are not looked at. What the loss says of the chosen tokens does not change
    with the target of another place; it does with the token that is read there, on either side."""
    text = tuple(x[:4] for x in windows.batch(0))
    cfg, model = Config(objective="mlm"), filled(Encoder)
    batch = read(text, cfg, TOKENIZER, 0, range(4))
    scrambled = read((text[0], text[1].flip(1), text[2]), cfg, TOKENIZER, 0, range(4))
    assert all(torch.equal(batch[name], scrambled[name]) for name in batch)
    chosen, segment = batch["targets"][0] >= 0, batch["segment_ids"][0]
    assert torch.equal(batch["targets"][chosen[None] & (torch.arange(4) == 0)[:, None]], text[0][0][chosen])
    logp = model(**batch)
    assert not logp[batch["targets"] < 0].any()
    places = chosen.nonzero()[:, 0]
    for place in places.tolist():
        for near in (place - 1, place + 1):
            if 0 <= near < len(segment) and not chosen[near] and segment[near] == segment[place]:
                targets, ids = batch["targets"].clone(), batch["ids"].clone()
                targets[0, near], ids[0, near] = 7, (ids[0, near] + 1) % 256
                assert torch.equal(model(**batch | {"targets": targets})[0, places], logp[0, places])
                assert (model(**batch | {"ids": ids})[0, place] != logp[0, place]).all()


# ---- what is hidden --------------------------------------------------------------------------------------

def test_shares_of_what_is_hidden():
    """15 % of the ordinary tokens are chosen; of them 80 % are masked, 10 % random, 10 % as they were: within
    three standard errors. (A random token is the old one once in 256 times.) Special tokens never are."""
    ids = np.random.default_rng(1).integers(0, V, 200_000)
    found, targets = hide(ids, TOKENIZER, 0.15, np.random.default_rng(2))
    chosen, ordinary = targets >= 0, ids < V - 6
    assert not chosen[~ordinary].any() and (targets[chosen] == ids[chosen]).all()
    assert (found[~chosen] == ids[~chosen]).all() and (targets[~chosen] == IGNORE).all()
    masked, stayed = found[chosen] == V, found[chosen] == ids[chosen]
    drawn = found[chosen][~masked & ~stayed]
    assert drawn.max() < V - 6 and len(set(drawn.tolist())) == 256

    def near(hits, n, p):
        return abs(hits / n - p) <= 3 * math.sqrt(p * (1 - p) / n)

    n = chosen.sum()
    assert near(n, ordinary.sum(), 0.15) and near(masked.sum(), n, 0.8)
    assert near(len(drawn), n, 0.1 * 255 / 256) and near(stayed.sum(), n, 0.1 + 0.1 / 256)


@pytest.mark.parametrize("n", [1, 2, 3, 20, 61, 400])
def test_gaps(n):
    """In order, inside the text, never touching. On average 15 % of the tokens, within three standard errors;
    in long texts 3 tokens a gap."""
    rng, lengths, taken = np.random.default_rng(n), [], []
    for _ in range(2000):
        found = gaps(n, 0.15, 3.0, rng)
        flat = [x for gap in found for x in gap]
        assert all(a < b for a, b in zip(flat, flat[1:])) and all(0 <= x <= n for x in flat)
        lengths += [b - a for a, b in found]
        taken.append(sum(b - a for a, b in found))
    assert abs(np.mean(taken) - 0.15 * n) <= 3 * math.sqrt(0.25 / 2000)  # it is one of two neighbours
    assert n < 61 or np.mean(lengths) == pytest.approx(3, rel=0.02)


def test_the_target_restores_the_source():
    """Source and target together are the document: each gap's id comes once in both, in order from V on. What
    the target says behind it, put in its place, gives the text again."""
    rng = np.random.default_rng(4)
    for n in [*range(0, 30), 200] * 5:
        document = rng.integers(0, 256, n + 1).tolist() + [TOKENIZER.end_id] * (n % 3 > 0)
        document = [TOKENIZER.bos_id] * (n % 2) + document
        source, target = take_out(document, TOKENIZER, 0.15, 3.0, rng)
        assert target[0] == TOKENIZER.bos_id and target[-1] == TOKENIZER.end_id
        assert not {*range(256, V)} & {*target[1:-1]}, "a special token was taken out"
        names = [i for i in source if i >= V]
        assert names == [i for i in target if i >= V] == [*range(V, V + len(names))]
        assert not target[1:-1] or target[1] == V
        said = {}
        for i in target[1:-1]:
            if i >= V:
                name = i
                said[name] = []
            else:
                said[name].append(i)
        assert [x for i in source for x in said.get(i, [i])] == document and all(said.values())


def test_what_is_hidden_depends_on_seed_step_and_row(windows):
    """Alone: not on who reads it, nor on the other rows. And it does depend on each of the three."""
    text, cfg = windows.batch(0), Config(objective="mlm")
    twice = tuple(x[:1].repeat(2, 1) for x in text)

    def hidden(step=0, rows=(0, 1), seed=1):
        cfg.seed = seed
        return read(twice, cfg, TOKENIZER, step, rows)["ids"]

    assert torch.equal(hidden(rows=(5, 2))[1], hidden(rows=(2, 5))[0])
    others = [hidden(), hidden(step=1), hidden(seed=2), hidden(rows=(2, 3))]
    assert len({tuple(row.tolist()) for x in others for row in x}) == 8


# ---- runs ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("objective", ["mlm", "seq2seq"])
def test_one_curve_however_it_is_computed(home, whole, objective, monkeypatch):
    """On two ranks, sharded, uneven, with a row of padding; recomputed, naive. Targets may outgrow rows."""
    assert (losses := [loss for _, loss in curve(whole[objective])])[-1] < losses[0]
    train(home, f"{objective}-gaps", f"--objective {objective} --mask_rate 0.5 --span 1", monkeypatch)
    for i, (flags, world) in enumerate((("--zero 3 --micro_batch_size 2", 2),
                                        ("--zero 1 --activation_checkpointing --attention naive", 1))):
        out = train(home, f"{objective}-{i}", f"--objective {objective} {flags}", monkeypatch, world=world)
        assert [loss for _, loss in curve(out)] == pytest.approx(losses, rel=1e-5)
        assert last(out, "eval_loss") == pytest.approx(last(whole[objective], "eval_loss"), rel=1e-5)


@pytest.mark.parametrize("objective", ["mlm", "seq2seq"])
def test_resume_is_bitwise(home, whole, objective, monkeypatch):
    """Stopped after step 4, and gone on with: the weights of the run that was never stopped."""
    out = home / f"{objective}-again"
    shutil.copytree(whole[objective], out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "step-00000008")
    train(home, out.name, f"--objective {objective} --resume", monkeypatch)
    assert same_weights(out, whole[objective]) and curve(out) == curve(whole[objective])


@pytest.mark.parametrize("objective, model_class", [("mlm", Encoder), ("seq2seq", Seq2Seq)])
def test_a_finished_model_loads_here_alone(whole, objective, model_class):
    """As what it is; a script for causal models refuses it in one line."""
    config, weights = load_final(str(whole[objective]))
    model_class(Shape(**config["model"])).load_state_dict(weights)
    for head in ("lm", "scalar", ""):
        with pytest.raises(UserError, match="objective"):
            load_model(str(whole[objective]), head=head)


@pytest.mark.parametrize("flags, named", [
    ("--init out/x", "--init"), ("--mask_rate 0", "--mask_rate"), ("--mask_rate 1", "--mask_rate"),
    ("--span 0.5", "--span"), ("--objective bert", "--objective"), ("--seq_len 300", "--seq_len")])
def test_bad_flags_are_one_clear_line(flags, named):
    with pytest.raises(UserError) as error:
        train_objectives.main(flags.split())
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("model_class", [GPT, Encoder, Seq2Seq])
def test_gaps_are_filled(model_class):
    """What bench/objectives.py asks. In a gap of one token stands the likeliest one that may be said there,
    by a forward of this text alone."""
    model, never = filled(model_class), [*TOKENIZER.specials_but_end]
    asked = [([TOKENIZER.bos_id, *b"two and"], [*b" is two"], 1), ([*b"a"], [], 1)]
    for (left, right, _), said in zip(asked, complete(model, TOKENIZER, asked)):
        source, ids = torch.tensor([[*left, V, *right]]), torch.tensor([[TOKENIZER.bos_id, V]])
        if model_class is GPT:
            logits = model(torch.tensor([left]))[0, -1]  # (V + 9,)
        elif model_class is Encoder:
            logits, never = model(source)[0, len(left)], [*range(256, V + 1)]
        else:
            logits = model(ids, segment_ids=ids * 0, source=source, source_ids=source * 0)[0, -1]
            never = []
        likeliest = logits.index_fill(0, torch.tensor(never, dtype=torch.long), -math.inf).argmax().item()
        done = model_class is Seq2Seq and (likeliest >= V or likeliest == TOKENIZER.end_id)
        assert said == ([] if done else [likeliest])
    longer = complete(model, TOKENIZER, [(left, right, n) for n, (left, right, _) in zip((5, 2), asked)], 1.0)
    assert all(len(ids) <= 5 for ids in longer) and (model_class is not Encoder or len(longer[1]) == 2)


def drawing(seed: int) -> str:
    """Columns side by side: what is read, what it sees, what it predicts, by what training uses."""
    tokenizer, columns = make_tokenizer("bpe", [WORDS] * 2), []  # learned on it alone: a word is a token
    text, size = collate([tokenizer.encode(WORDS)], [[1] * 5]), tokenizer.vocab_size

    def say(i):
        new = "<mask>" if objective == "mlm" else f"<{i - size}>"
        return "" if i < 0 else new if i >= size else tokenizer.decode([i]).strip().replace("|", "")

    def column(title, ids, targets, *sights):
        marks = [" ".join("".join(".#"[sees] for sees in part) for part in parts)
                 for parts in zip(*(sight[0, 0].tolist() for sight in sights))]
        lines = [title, *(f"{say(i):7}{mark} {say(target)}"
                          for i, mark, target in zip(ids[0].tolist(), marks, targets[0].tolist()))]
        columns.append([f"{line:{max(map(len, lines))}}" for line in lines])

    for objective in ("clm", "mlm", "seq2seq"):
        batch = read(text, Config(objective=objective, mask_rate=0.4, seed=seed), tokenizer, 0, [0])
        ids, targets, segments = batch["ids"], batch["targets"], batch["segment_ids"]
        T, own = ids.shape[1], visible(ids.shape[1], ids.shape[1], objective != "mlm", segments, None, "cpu")
        cross = []
        if objective == "seq2seq":
            source, places = batch["source"], batch["source_ids"]
            Ts = source.shape[1]
            column("seq2seq: source", source, source * 0 - 1, visible(Ts, Ts, False, places, None, "cpu"))
            cross = [visible(T, Ts, False, segments, places, "cpu")]
        column(objective, ids, targets, *cross, own)
    rows = ("   ".join(cell or " " * len(column[0]) for cell, column in zip(row, columns))
            for row in zip_longest(*columns))
    return "\n".join(f"    {row.rstrip()}" for row in rows)


def test_the_drawing_is_true(capsys):
    """The one in the docstring, which --show prints, is what training does with these words."""
    train_objectives.main(["--show"])
    assert drawing(12) in capsys.readouterr().out
