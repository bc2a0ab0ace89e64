"""SFT: what is trained of a conversation, rows that do not know of each other, and train_sft.py from end to end."""
import dataclasses
import json
import math
import random

import pytest
import torch
from ranks import as_torchrun, ranks
from small_chat import calls_of, split_by_hand

import data
import train_sft
from data import (
    IGNORE,
    Conversations,
    Windows,
    chat_samples,
    collate,
    encode_chat,
    encode_prompt,
    pack,
    shuffled,
    truncate,
)
from lib.checkpoint import save_final
from lib.program import UserError
from lib.records import Record
from lib.tokenizer import make_tokenizer
from model import GPT, GPTConfig, generate, load_model
from train_sft import sft_loss
from zero import Zero

TOKENIZER = make_tokenizer("byte")
PAD, BOS, SYSTEM, USER, ASSISTANT, END = (getattr(TOKENIZER, f"{name}_id") for name in
                                          ("pad", "bos", "system", "user", "assistant", "end"))
DIALOGUE = [{"role": role, "content": content} for role, content in (
    ("system", "S"), ("user", "ab"), ("assistant", "cd"), ("user", "e"), ("assistant", "你"), ("user", "f"),
    ("assistant", "g"))]


def conversation(seed: int) -> list[dict]:
    """One to three exchanges of random letters, sometimes with a system message."""
    r = random.Random(seed)
    turns = [{"role": role, "content": "".join(r.choices("abcdef 你🙂", k=r.randint(1, 12)))}
             for _ in range(r.randint(1, 3)) for role in ("user", "assistant")]
    return [{"role": "system", "content": "be"}, *turns] if r.random() < 0.3 else turns


def records(n: int, start: int = 0) -> list[Record]:
    return [Record(f"file:{i}", conversation(start + i)) for i in range(n)]


def lively(position="rope", **more) -> GPT:
    """A small float64 model whose every weight matters."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_embd=16, max_seq_len=128,
                          position=position, **more)).double()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def loss_and_gradients(model, ids, targets, segment_ids=None, denominator=1.0):
    model.zero_grad()
    loss = sft_loss(model(ids, targets, segment_ids=segment_ids)) / denominator
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


# ---- what is trained ------------------------------------------------------------------------------------------------

def test_golden_mask():
    """S1: a dialogue of three turns, by hand: every assistant byte and every end of its turns, and nothing else."""
    ids, mask = encode_chat(TOKENIZER, DIALOGUE)
    assert ids == [BOS, SYSTEM, ord("S"), END, USER, *b"ab", END, ASSISTANT, *b"cd", END, USER, *b"e", END,
                   ASSISTANT, *"你".encode(), END, USER, *b"f", END, ASSISTANT, *b"g", END]
    assert [i for i, trained in zip(ids, mask) if trained] == [*b"cd", END, *"你".encode(), END, *b"g", END]
    (row,), (targets,), (segments,) = collate([ids], [mask])
    assert row.tolist() == ids and segments.tolist() == [0] * len(ids) and targets[-1] == IGNORE
    for t in range(len(ids) - 1):  # a target stands one place before its token
        assert targets[t] == (ids[t + 1] if mask[t + 1] else IGNORE)


def test_show_prints_what_is_trained(tmp_path, capsys):
    """python data.py --show --stage sft: the template, then token | target | trained? of the first conversation."""
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    data.main(["--show", "--stage", "sft", "--data", str(tmp_path / "chats.jsonl")])
    template, *rows = capsys.readouterr().out.splitlines()
    assert template == f"chat template: {data.CHAT_TEMPLATE}"
    assert [row.split() for row in rows] == [
        *([f"'{token}'", "-"] for token in ("<|bos|>", "<|user|>", "a", "b", "<|end|>")),
        ["'<|assistant|>'", "'c'", "trained"], ["'c'", "'d'", "trained"], ["'d'", "'<|end|>'", "trained"],
        ["'<|end|>'", "-"]]


def test_the_prompt_is_the_beginning_of_the_chat():
    """What sampling starts from is exactly what training saw before the reply; names of specials are plain text."""
    messages = [*DIALOGUE[:4], {"role": "assistant", "content": "<|end|><|user|>"}]
    ids, mask = encode_chat(TOKENIZER, messages)
    prompt = encode_prompt(TOKENIZER, messages[:-1])
    assert ids[:len(prompt)] == prompt and mask[len(prompt):] == [1] * (len(ids) - len(prompt))
    assert ids[len(prompt):-1] == list(b"<|end|><|user|>")


def test_three_ways_to_train_the_turns():
    """all: one sample, three replies. last: one sample, one reply. each: three samples, one reply each; "each" trains
    the same tokens as "all" after the same contexts, and reads more."""
    trained = {}
    for turns in ("all", "last", "each"):
        samples = chat_samples(TOKENIZER, DIALOGUE, turns)
        trained[turns] = [[i for i, m in zip(ids, mask) if m] for ids, mask in samples]
        trained[turns, "contexts"] = {tuple(ids[:t]) for ids, mask in samples for t, m in enumerate(mask) if m}
        trained[turns, "read"] = sum(len(ids) for ids, _ in samples)
    first, second, third = [*b"cd", END], [*"你".encode(), END], [*b"g", END]
    assert trained["all"] == [first + second + third] and trained["last"] == [third]
    assert trained["each"] == [first, second, third]
    assert trained["all", "contexts"] == trained["each", "contexts"] > trained["last", "contexts"]
    assert trained["each", "read"] > trained["all", "read"] == trained["last", "read"]


def test_one_pass_equals_one_sample_per_turn():
    """The loss and gradient of all turns in one pass are the sum over one sample per turn: causality, measured."""
    model = lively()
    results = []
    for turns in ("all", "each"):
        sequences, masks = zip(*chat_samples(TOKENIZER, DIALOGUE, turns))
        results.append(loss_and_gradients(model, *collate(sequences, masks)))
    (a, grad_a), (b, grad_b) = results
    assert a == pytest.approx(b.item(), rel=1e-12) and torch.allclose(grad_a, grad_b, rtol=1e-9, atol=1e-12)


def test_loss_of_an_oracle():
    """S2: a model certain of the true next token has no loss; one certain of the current token has a large one."""
    ids, mask = encode_chat(TOKENIZER, DIALOGUE)
    row, targets, _ = collate([ids], [mask])
    shifted = torch.tensor([ids[1:] + [PAD]])
    for guess, low in ((shifted, True), (row, False)):
        logits = 100.0 * torch.nn.functional.one_hot(guess, TOKENIZER.vocab_size)
        logp = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        mean = sft_loss(logp.where(targets >= 0, 0.0)) / sum(mask)
        assert (mean < 1e-4) == low and (mean > 10) != low


def test_gradients_stay_where_they_belong():
    """S3: no gradient for the embedding of what follows the last trained target, some for what the user said."""
    model = lively()
    ids, mask = encode_chat(TOKENIZER, DIALOGUE[1:3] + [{"role": "user", "content": "zz"}])
    loss_and_gradients(model, *collate([ids], [mask])[:2])
    gradient = model.embed.weight.grad
    assert not gradient[ord("z")].any() and gradient[ord("a")].any() and gradient[ord("c")].any()


def test_a_label_that_is_not_trained_does_not_matter():
    """S4: where nothing is trained, padding above all, any token may stand: the loss is bitwise the same."""
    model = lively()
    ids, mask = encode_chat(TOKENIZER, DIALOGUE)
    losses = []
    for pad_id in (PAD, END, 0):
        row, targets, segments = collate([ids], [mask], length=len(ids) + 5, pad_id=pad_id)
        assert (targets >= 0).sum() == sum(mask)
        losses.append(loss_and_gradients(model, row, targets, segments)[0])
    assert losses[0] == losses[1] == losses[2]


# ---- packing and padding --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_packed_row_equals_its_conversations(position):
    """S5: loss and gradients of packed rows are the sum over single conversations, also for learned positions."""
    model = lively(position)
    sequences, masks = zip(*(encode_chat(TOKENIZER, conversation(i)) for i in range(9)))
    rows = pack(list(map(len, sequences)), 128)
    assert len(rows) < 9 and max(map(len, rows)) > 1
    packed, packed_gradient = loss_and_gradients(model, *collate(sequences, masks, rows))
    alone = [loss_and_gradients(model, *collate([s], [m])[:2]) for s, m in zip(sequences, masks)]
    assert packed == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-12)
    assert torch.allclose(packed_gradient, sum(gradient for _, gradient in alone), rtol=1e-9, atol=1e-12)


def test_no_leak_between_conversations():
    """S6: another first conversation of the same length leaves the logits of the second bitwise as they were."""
    model = lively()
    (a, mask_a), (b, mask_b) = (encode_chat(TOKENIZER, conversation(i)) for i in (1, 2))
    outputs = []
    for first in (a, [BOS] + [7] * (len(a) - 1)):
        ids, _, segments = collate([first, b], [mask_a, mask_b], [[0, 1]])
        outputs.append(model(ids, segment_ids=segments)[0, len(a):])
    assert torch.equal(*outputs)


def test_padding_changes_nothing():
    """S7: rows padded on the right by any number of tokens have the loss of the unpadded row."""
    model = lively()
    ids, mask = encode_chat(TOKENIZER, DIALOGUE)
    plain, _ = loss_and_gradients(model, *collate([ids], [mask])[:2])
    for k in (1, 30):
        padded, _ = loss_and_gradients(model, *collate([ids], [mask], length=len(ids) + k))
        assert padded == pytest.approx(plain.item(), rel=1e-12)


def test_micro_batches_do_not_change_the_gradient():
    """S8: 1, 2 and 4 rows at a time with ONE denominator, uneven token counts, and a row with nothing to train."""
    model = lively()
    sequences, masks = map(list, zip(*(encode_chat(TOKENIZER, conversation(i)) for i in range(4))))
    masks[1] = [0] * len(masks[1])
    ids, targets, segments = collate(sequences, masks)
    count = int((targets >= 0).sum())
    whole = loss_and_gradients(model, ids, targets, segments, count)[1]
    for micro in (1, 2):
        parts = [loss_and_gradients(model, ids[i:i + micro], targets[i:i + micro], segments[i:i + micro], count)
                 for i in range(0, 4, micro)]
        assert all(loss.isfinite() for loss, _ in parts)
        assert torch.allclose(sum(gradient for _, gradient in parts), whole, rtol=1e-9, atol=1e-12)


def test_best_fit_packing():
    """Every sequence once, no row too long, and by hand: 7, 5, 4, 3 into rows of 10 are 7+3 and 5+4."""
    assert pack([3, 7, 4, 5], 10) == [[1, 0], [3, 2]]
    r = random.Random(0)
    for _ in range(50):
        lengths = [r.randint(1, 20) for _ in range(r.randint(1, 40))]
        rows = pack(lengths, 20)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
        loads = sorted(sum(lengths[i] for i in row) for row in rows)
        assert sum(loads[:2]) > 20 or len(rows) == 1, "two rows that fit into one"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_trained_token_once_per_epoch(packed, world):
    """S9: over the ranks and steps of an epoch each conversation comes once; all ranks see rows of one shape."""
    train = Conversations(records(24), TOKENIZER, 128, packed=packed, batch_size=6, seed=3)
    everything = sorted(tuple(ids) for ids, _ in train.samples)
    seen, trained = [], 0
    for step in range(4):
        parts = [train.rows(train.of_step(step), rank, world) for rank in range(world)]
        assert len({tuple(ids.shape) for ids, _, _ in parts}) == 1
        for ids, targets, segments in parts:
            trained += int((targets >= 0).sum())
            for row, segment in zip(ids, segments):
                seen += [tuple(row[segment == s].tolist()) for s in segment.unique() if s >= 0]
    assert sorted(seen) == everything and trained == sum(sum(mask) for _, mask in train.samples)
    assert [train.of_step(s) for s in range(4)] != [train.of_step(s) for s in range(4, 8)], "a new order each epoch"


def test_the_order_is_a_function_of_seed_and_place():
    """A stream of epochs can be entered anywhere, and each epoch has every item once."""
    stream = shuffled(7, 0, 50, seed=1)
    assert all(shuffled(7, start, 5, seed=1) == stream[start:start + 5] for start in range(45))
    assert all(sorted(stream[e * 7:e * 7 + 7]) == list(range(7)) for e in range(7))
    assert stream != shuffled(7, 0, 50, seed=2)
    data.order.cache_clear()
    for start in range(0, 1000, 10):
        shuffled(1000, start, 10, seed=1)
    assert data.order.cache_info().misses == 1  # an epoch is sorted once, not at every step


def test_truncation_from_the_left():
    """S10: what is cut is the beginning, behind bos and the system message; a reply that lost its beginning is not
    trained, no end is invented, and no sample without a trained token is left."""
    for seed in range(60):
        ids, mask = encode_chat(TOKENIZER, conversation(seed))
        head = ids.index(END) + 1 if ids[1] == SYSTEM else 1
        for length in range(2, len(ids) + 2):
            found = truncate(TOKENIZER, ids, mask, length)
            if found is None:
                continue
            cut, cut_mask = found
            kept = len(cut) - head if len(ids) > length else len(ids)
            assert len(cut) == min(length, len(ids)) and any(cut_mask)
            if len(ids) > length:
                assert cut[:head] == ids[:head] and cut[head:] == ids[-kept:]
            assert all(m <= o for m, o in zip(cut_mask[::-1], mask[::-1]))
            for t, m in enumerate(cut_mask):  # each trained run begins right behind its assistant token
                assert not m or cut_mask[t - 1] or cut[t - 1] == ASSISTANT
    long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 50}]
    assert truncate(TOKENIZER, *encode_chat(TOKENIZER, long), 40) is None


def test_nothing_is_lost_silently():
    """used + dropped = samples; truncated ones are counted; a file without any reply that fits is refused."""
    long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 99}]
    many = records(20) + [Record("file:99", long)]
    train = Conversations(many, TOKENIZER, 40)
    assert len(train) + train.dropped == 21 and train.dropped >= 1 and train.truncated >= 1
    assert f"{len(train)} samples used, {train.truncated} of them truncated, {train.dropped} dropped" in train.report()
    with pytest.raises(UserError, match="--seq_len 8"):
        Conversations(many[-1:], TOKENIZER, 8)
    with pytest.raises(UserError, match="file:3.*U\\+4F60"):
        Conversations([Record("file:3", [*long[:1], {"role": "assistant", "content": "你"}])],
                      make_tokenizer("char", "ab"), 40)


def test_the_report_counts_what_it_says():
    """Fill rate: the tokens of an epoch over the places computed for them, counted here from the batches."""
    train = Conversations(records(24), TOKENIZER, 128, batch_size=6)
    batches = [train.rows(train.of_step(step)) for step in range(4)]
    fill = sum(int((s >= 0).sum()) for _, _, s in batches) / sum(s.numel() for _, _, s in batches)
    assert f"rows filled to {fill:.1%}" in train.report()
    many = Conversations(records(24) * 10, TOKENIZER, 128, packed=False, batch_size=1)
    assert "rows filled to about 100.0%" in many.report()  # of one conversation each


# ---- the script -----------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True, scope="module")
def quick():
    """The speed of this machine is not what is tested."""
    measured, train_sft.matmul_peak = train_sft.matmul_peak, lambda *_: 1e10
    yield
    train_sft.matmul_peak = measured


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A new model of bytes, as pretraining leaves one."""
    out = tmp_path_factory.mktemp("base")
    TOKENIZER.save(out / "tokenizer.json")
    config = GPTConfig(vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_embd=32, max_seq_len=64)
    save_final(str(out), GPT(config, seed=1).state_dict(), {"model": dataclasses.asdict(config), "head": "lm"},
               str(out / "tokenizer.json"))
    return out


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": conversation(i)}) + "\n" for i in range(40)))
    return path


def train(base, chats, out, *more):
    arguments = ["--data", str(chats), "--init", str(base), "--out", str(out), "--steps", "8", "--batch_size", "8",
                 "--lr", "3e-3", "--log_every", "1", "--eval_every", "0", "--device", "cpu", *more]
    assert train_sft.main(arguments) == 0
    events = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return [e["loss"] for e in events if "loss" in e], torch.load(out / "final" / "model.pt", weights_only=True), events


def run_rank(base, chats, out, more):
    with as_torchrun() as patch:
        patch.setattr(train_sft, "matmul_peak", lambda *_: 1e10)
        patch.chdir(out.parent)  # these processes began elsewhere
        return train(base, chats, out, *more)[0]


@pytest.fixture(scope="module")
def reference(base, chats, tmp_path_factory):
    out = tmp_path_factory.mktemp("sft")
    return out, *train(base, chats, out, "--save_every", "4")


def test_a_whole_run_learns_and_leaves_a_chat_model(reference):
    out, losses, weights, events = reference
    assert losses[0] == pytest.approx(5.568, abs=0.01) and losses[-1] < losses[0] - 0.2  # ln 262: a new model
    trained = [e for e in events if "loss" in e]
    assert [e["learning_rate"] for e in trained] == pytest.approx([3e-4 * step for step in range(1, 9)])  # of 10 warmup
    assert [e["epoch"] for e in trained] == pytest.approx([8 * step / 36 for step in range(1, 9)])
    assert json.load(open(out / "final" / "config.json"))["chat_template"].startswith("<|bos|>")


@pytest.mark.parametrize("flags", [["--no-pack"], ["--micro_batch_size", "1"], ["--no-pack", "--micro_batch_size", "3"],
                                   ["--zero", "3"], ["--attention", "naive"], ["--activation_checkpointing"]])
def test_one_curve_however_the_step_is_computed(reference, base, chats, tmp_path, flags):
    """Packed or padded, in parts, sharded or with another attention: the same conversations, the same losses."""
    losses, _, _ = train(base, chats, tmp_path, *flags)
    assert losses == pytest.approx(reference[1], rel=1e-5)


def assert_evaluated(out, events, chats):
    """Loss, perplexity and accuracy of the last evaluation are those of one forward per held-out conversation, all of
    whose turns count, under the model that the run left."""
    model, *_ = load_model(str(out))
    total = right = count = 0
    for line in chats.read_text().splitlines()[36:]:
        ids, mask = map(torch.tensor, truncate(TOKENIZER, *encode_chat(TOKENIZER, json.loads(line)["messages"]), 64))
        logits, wanted, counts = model(ids[None, :-1])[0], ids[1:], mask[1:] > 0
        total -= logits.log_softmax(-1).gather(-1, wanted[:, None])[counts].double().sum().item()
        right, count = right + int((logits.argmax(-1) == wanted)[counts].sum()), count + int(counts.sum())
    found = [e for e in events if "eval_loss" in e][-1]
    assert found["eval_loss"] == pytest.approx(total / count, rel=1e-5) and found["step"] == 8
    assert found["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["eval_mean_token_accuracy"] == pytest.approx(right / count) and 0 < right < count


def test_the_evaluation_is_one_forward_per_conversation(reference, chats):
    assert_evaluated(reference[0], reference[3], chats)


SHORT = ["--steps", "4", "--warmup_steps", "2", "--eval_prompts", "0"]


@pytest.fixture(scope="module")
def short(base, chats, tmp_path_factory):
    return train(base, chats, tmp_path_factory.mktemp("short"), *SHORT)[1]


@pytest.mark.parametrize("flags", [["--weight_decay", "0.5"], ["--betas", "0.5,0.9"], ["--eps", "1e-2"],
                                   ["--clip", "0.01"], ["--seed", "2"], ["--warmup_steps", "4"], ["--min_lr", "1e-3"],
                                   ["--decay", "flat-then-linear"], ["--batch_size", "7"], ["--val_fraction", "0.2"]],
                         ids=" ".join)
def test_every_flag_does_something(short, base, chats, tmp_path, flags):
    """No flag is accepted and then ignored: the model becomes another one."""
    _, weights, _ = train(base, chats, tmp_path, *SHORT, *flags)
    assert any(not torch.equal(weights[name], short[name]) for name in weights)


def test_validation_data_of_its_own(reference, base, chats, tmp_path):
    """--val_data with the conversations that --val_fraction would have set aside: the same run, the same evaluation."""
    losses, weights, events = train(base, chats, tmp_path, *split_by_hand(chats, 36))
    assert losses == reference[1] and all(torch.equal(weights[name], reference[2][name]) for name in weights)
    assert_evaluated(tmp_path, events, chats)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_two_ranks_give_the_same_curve(reference, base, chats, tmp_path, stage):
    losses, _ = ranks().run(2, run_rank, base, chats, tmp_path, ["--zero", str(stage)], timeout=180)
    assert losses == pytest.approx(reference[1], rel=1e-5)


def test_resuming_is_bitwise_equal_to_not_stopping(reference, base, chats, tmp_path):
    out, losses, weights, _ = reference
    (tmp_path / "step-00000004").symlink_to(out / "step-00000004")
    again, resumed, _ = train(base, chats, tmp_path, "--resume")
    assert again[-4:] == losses[-4:] and all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_text_is_rehearsed(base, chats, tmp_path, monkeypatch):
    """--ptx: the text becomes likelier than in a run without it, by one curve however the step is split; each step
    reads the next windows, and its loss has the weight of --ptx."""
    monkeypatch.chdir(tmp_path)  # where its token files go
    (tmp_path / "text.txt").write_text("abc def gab " * 200)
    flags = ["--ptx", "1", "--ptx_data", "text.txt", "--ptx_rows", "3", "--eval_prompts", "0", "--lr", "2e-2"]

    def text_loss(weights) -> float:
        model = GPT(GPTConfig(vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_embd=32, max_seq_len=64))
        model.load_state_dict(weights)
        ids = torch.tensor([TOKENIZER.encode("abc def gab " * 5)])
        return -model(ids[:, :-1], ids[:, 1:]).mean().item()

    windows, backward = calls_of(monkeypatch, Windows, "batch"), calls_of(monkeypatch, Zero, "backward")
    light, _, events = train(base, chats, tmp_path / "g", *flags, "--ptx", "0.5")
    assert [step for _, step, *_ in windows] == list(range(8))
    assert [loss.item() for _, loss in backward] == pytest.approx(
        [x for e in events if "loss" in e for x in (e["loss"], 0.5 * e["loss/ptx_avg"])])
    whole, with_text, events = train(base, chats, tmp_path / "a", *flags, "--save_every", "4")
    assert light[1:] != pytest.approx(whole[1:], rel=1e-3)
    parts, *_ = train(base, chats, tmp_path / "b", *flags, "--micro_batch_size", "1")
    sharded, _ = ranks().run(2, run_rank, base, chats, tmp_path / "c", [*flags, "--zero", "2"], timeout=180)
    _, without, _ = train(base, chats, tmp_path / "d", *flags, "--ptx", "0", "--ptx_data", "")
    assert parts == pytest.approx(whole, rel=1e-4) and sharded == pytest.approx(whole, rel=1e-4)
    assert text_loss(with_text) < text_loss(without) - 0.3
    said = [event["loss/ptx_avg"] for event in events if "loss/ptx_avg" in event]
    assert said[0] == pytest.approx(math.log(TOKENIZER.vocab_size), abs=0.01) and said[-1] < said[0] - 0.3
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "step-00000004").symlink_to(tmp_path / "a" / "step-00000004")
    resumed, *_ = train(base, chats, tmp_path / "f", *flags, "--resume")
    assert resumed[-4:] == whole[-4:]
    for half in (("--ptx", "1"), ("--ptx_data", "text.txt")):
        with pytest.raises(UserError, match="both or neither"):
            train(base, chats, tmp_path / "e", *half)


def test_turns_change_what_is_trained(reference, base, chats, tmp_path):
    losses, _, events = train(base, chats, tmp_path, "--turns", "last")
    assert losses != pytest.approx(reference[1], rel=1e-3)
    assert_evaluated(tmp_path, events, chats)  # on all turns, so that the ways can be compared


def test_overfit_four_dialogues():
    """S11: four dialogues are learned by heart: accuracy 1, and greedy decoding gives the replies and stops."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_embd=48, max_seq_len=64))
    dialogues = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}]
                 for q, a in (("ab?", "Yes."), ("cd?", "No, never."), ("你好", "你好!"), ("sum", "1+1=2"))]
    sequences, masks = zip(*(encode_chat(TOKENIZER, d) for d in dialogues))
    ids, targets, segments = collate(sequences, masks, pack(list(map(len, sequences)), 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(80):
        optimizer.zero_grad()
        (sft_loss(model(ids, targets, segment_ids=segments)) / (targets >= 0).sum()).backward()
        optimizer.step()
    _, _, right = model(ids, targets, segment_ids=segments, with_stats=True)
    assert right[targets >= 0].all()
    replies = generate(model, [encode_prompt(TOKENIZER, d[:1]) for d in dialogues], max_new_tokens=30, temperature=0,
                       eos_id=END)
    assert [TOKENIZER.decode(r[:-1]) for r in replies] == [d[1]["content"] for d in dialogues]
    assert all(r[-1] == END for r in replies)


@pytest.mark.parametrize("flags, words", [
    (["--data", ""], "--data"), (["--data", "nowhere.jsonl"], "nowhere.jsonl"), (["--seq_len", "65"], "--seq_len"),
    (["--init", "nowhere"], "nowhere"), (["--val_fraction", "0"], "--val_fraction"), (["--seq_len", "5"], "--seq_len")])
def test_bad_input_is_one_clear_line(base, chats, tmp_path, flags, words):
    """The flag or file is named, and nothing is written."""
    with pytest.raises(UserError) as caught:
        train_sft.main(["--data", str(chats), "--init", str(base), "--out", str(tmp_path / "out"), *flags])
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
