"""SFT: what is trained of a conversation, rows that do not know of each other, train_sft.py whole."""
import math
import random
from pathlib import Path

import pytest
import small_chat
import torch
from small_chat import curve, last, metrics, random_model, run_script, same_weights, write

import data
import train_sft
from data import IGNORE, Conversations, chat_samples, collate, encode_chat, encode_prompt, pack, truncate
from lib.program import UserError
from lib.records import Record
from lib.tokenizer import make_tokenizer
from model import load_model
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


def conversations(n=24, more=(), seq_len=128, batch_size=6) -> Conversations:
    messages = [*map(conversation, range(n)), *more]
    records = [Record(turns, where=f"file:{i}") for i, turns in enumerate(messages)]
    return Conversations(records, TOKENIZER, seq_len, batch_size=batch_size, seed=1)


def gradients(sequences, masks, rows=None, position="rope", **options):
    """The summed loss, and behind it all gradients, of a float64 model whose every weight matters."""
    model = random_model(position=position, max_seq_len=128).double()
    ids, targets, segment_ids = collate(sequences, masks, rows, **options)
    loss = sft_loss(model(ids, targets, segment_ids=segment_ids))
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())])


def test_golden_mask():
    """A dialogue of three turns, by hand: all assistant bytes and the ends of its turns, no more. A target
    stands one place before its token. A prompt ends where a reply begins. Names of specials are text."""
    ids, mask = encode_chat(TOKENIZER, DIALOGUE)
    assert ids == [BOS, SYSTEM, ord("S"), END, USER, *b"ab", END, ASSISTANT, *b"cd", END, USER, *b"e", END,
                   ASSISTANT, *"你".encode(), END, USER, *b"f", END, ASSISTANT, *b"g", END]
    assert [i for i, trained in zip(ids, mask) if trained] == [*b"cd", END, *"你".encode(), END, *b"g", END]
    _, (targets,), _ = collate([ids], [mask])
    assert targets.tolist() == [i if m else IGNORE for i, m in zip([*ids[1:], 0], [*mask[1:], 0])]
    assert encode_prompt(TOKENIZER, DIALOGUE[:-1]) == ids[:-2]
    named = encode_chat(TOKENIZER, [{"role": "user", "content": "<|end|>"}])[0]
    assert named == [BOS, USER, *b"<|end|>", END]


def test_three_ways_to_train_the_turns():
    """all: one sample, three replies. last: one sample, one reply. each: three samples of one reply each. The
    loss and the gradient of "each" are those of "all", because the model is causal."""
    whole, final, each = (chat_samples(TOKENIZER, DIALOGUE, turns) for turns in ("all", "last", "each"))
    replies = [[i for i, m in zip(ids, mask) if m] for ids, mask in each]
    assert replies == [[*b"cd", END], [*"你".encode(), END], [*b"g", END]]
    assert final == each[2:] and len(whole) == 1 and whole[0][0] == final[0][0]
    torch.testing.assert_close(gradients(*zip(*whole)), gradients(*zip(*each)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_packed_row_equals_its_conversations(position):
    """Loss and gradient of packed rows are the sum over single conversations, one without a reply, too. They
    are so in rows that are filled up with any number of any token."""
    sequences, masks = map(list, zip(*(encode_chat(TOKENIZER, conversation(i)) for i in range(9))))
    masks[4] = [0] * len(masks[4])
    rows = pack(list(map(len, sequences)), 127)
    assert len(rows) < 9 and max(map(len, rows)) > 1
    alone = sum(gradients([ids], [mask], position=position) for ids, mask in zip(sequences, masks))
    for length, pad_id in ((0, PAD), (128, PAD), (128, END), (128, 0)):
        packed = gradients(sequences, masks, rows, position, length=length, pad_id=pad_id)
        torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-12)


def test_best_fit_packing():
    """By hand: 7, 5, 4, 3 into rows of 10 are 7 + 3 and 5 + 4. Else every sequence once, no row too long, and
    no two rows that fit into one."""
    assert pack([3, 7, 4, 5], 10) == [[1, 0], [3, 2]]
    for seed in range(50):
        lengths = random.Random(seed).choices(range(1, 21), k=30)
        rows = pack(lengths, 20)
        loads = sorted(sum(lengths[i] for i in row) for row in rows)
        assert sorted(sum(rows, [])) == list(range(30)) and loads[-1] <= 20 < sum(loads[:2])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_conversation_once_per_epoch(world):
    """Over its steps and ranks; all ranks see rows of one shape; each epoch has an order of its own."""
    train, seen = conversations(), []
    for step in range(4):
        parts = [train.rows(train.of_step(step), rank, world) for rank in range(world)]
        assert len({tuple(ids.shape) for ids, _, _ in parts}) == 1
        for row, targets, segment in (row for part in parts for row in zip(*part)):
            for inside in (segment == s for s in segment.unique() if s >= 0):
                seen.append((row[inside].tolist(), [0, *(targets[inside] >= 0).int().tolist()[:-1]]))
    assert sorted(seen) == sorted(train.samples)
    assert sum(int((s >= 0).sum()) for rank in range(world) for *_, s in train.in_order(rank, world)) == \
        sum(len(ids) for ids, _ in train.samples)
    assert [train.of_step(s) for s in range(4)] != [train.of_step(s) for s in range(4, 8)]


def test_the_order_is_a_function_of_seed_and_place():
    """A stream of epochs can be entered anywhere; each epoch has every item once, and is sorted once."""
    data.order.cache_clear()
    stream = data.shuffled(7, 0, 49, seed=1)
    assert all(data.shuffled(7, start, 5, seed=1) == stream[start:start + 5] for start in range(43, 0, -1))
    assert all(sorted(stream[e:e + 7]) == list(range(7)) for e in range(0, 49, 7))
    assert data.order.cache_info().misses <= 14 and stream != data.shuffled(7, 0, 49, seed=2)


def test_truncation_from_the_left():
    """As many of the newest exchanges as fit, each whole and behind the system message; nothing if the last
    question does not fit, or if all that is left has weight 0."""
    for messages in map(conversation, range(60)):
        system = messages[:1] * (messages[0]["role"] == "system")
        tails = [system + messages[i:] for i in range(len(system), len(messages), 2)]
        tails = [encode_chat(TOKENIZER, tail) for tail in tails]  # the whole one first
        for length in range(2, len(tails[0][0]) + 2):
            fits = [tail for tail in tails if len(tail[0]) <= length]
            assert truncate(TOKENIZER, tails[:1], length) == fits[:1]
    last = encode_chat(TOKENIZER, [*DIALOGUE[:-1], {**DIALOGUE[-1], "train": False}])
    assert any(last[1]) and truncate(TOKENIZER, [last], 16) == []


def test_nothing_is_lost_silently():
    """The report counts what is used, cut and dropped. A file without any reply that fits is refused."""
    long = [DIALOGUE[1], {"role": "assistant", "content": "b" * 99}]
    train = conversations(20, [long], 40)
    assert len(train) + train.dropped == 21 and train.dropped >= 1 and train.truncated >= 1
    counts = f"{len(train)} samples", f"{train.truncated} of", f"{train.dropped} dropped"
    assert all(words in train.report() for words in counts)
    assert len(conversations(0, [long], 8)) == 0
    with pytest.raises(UserError, match="file:3.*U\\+4F60"):  # a character that has no token
        Conversations([Record(DIALOGUE, where="file:3")], make_tokenizer("char", "abcdefgS"), 40)


# ---- the script --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(conversations, a model to start from)"""
    folder = tmp_path_factory.mktemp("files")
    chats = write(folder / "chats.jsonl", [{"messages": conversation(i)} for i in range(40)])
    return chats, small_chat.save_chat_model(folder / "base")


def train(files, out, flags, world=1) -> list[float]:
    run_script("train_sft", f"--data {files[0]} --init {files[1]} --out {out} --steps 8 --batch_size 8 "
               f"--lr 3e-3 --seq_len 64 --log_every 1 --eval_every 0 --device cpu {flags}".split(), world)
    return [loss for _, loss in curve(out)]


@pytest.fixture(scope="module")
def reference(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("sft")
    train(files, out, "")
    return out


def alone(folder, samples) -> tuple[float, float]:
    """Mean loss and mean accuracy per trained token under a finished model: one forward per sample."""
    model, total, right, count = load_model(str(folder))[0], 0.0, 0, 0
    for ids, mask in (map(torch.tensor, sample) for sample in samples):
        logp, wanted, counts = model(ids[None, :-1])[0].log_softmax(-1), ids[1:], mask[1:] > 0  # (T, V), (T,)
        total -= logp.gather(-1, wanted[:, None])[counts].double().sum().item()
        right, count = right + int((logp.argmax(-1) == wanted)[counts].sum()), count + int(counts.sum())
    return total / count, right / count


def assert_evaluated(out) -> None:
    """The last evaluation is that of each held-out conversation alone, all its turns, by the final model."""
    chats = [encode_chat(TOKENIZER, conversation(i)) for i in range(36, 40)]
    loss, accuracy = alone(out, [sample for chat in chats for sample in truncate(TOKENIZER, [chat], 64)])
    assert last(out, "eval_loss") == pytest.approx(loss, rel=1e-5)
    assert last(out, "eval_perplexity") == pytest.approx(math.exp(loss), rel=1e-4)
    assert last(out, "eval_mean_token_accuracy") == pytest.approx(accuracy) and 0 < accuracy < 1


def test_a_whole_run_learns_and_leaves_a_chat_model(reference, files):
    """At first the loss is that of each conversation alone under --init, though they share rows."""
    events = [event for event in metrics(reference) if "loss" in event]
    batch = conversations(36, seq_len=64, batch_size=8)
    loss, _ = alone(files[1], [batch.samples[i] for i in batch.of_step(0)])
    assert events[0]["loss"] == pytest.approx(loss, rel=1e-5) and events[-1]["loss"] < loss - 0.2
    rates = [event["learning_rate"] for event in events]
    assert rates == pytest.approx([3e-3 / 9 * n for n in range(8, 0, -1)])
    assert [event["epoch"] for event in events] == pytest.approx([8 * n / 36 for n in range(1, 9)])
    assert load_model(str(reference))[2]["chat_template"] == data.CHAT_TEMPLATE
    assert_evaluated(reference)


@pytest.mark.parametrize("flags, world", [
    ("--micro_batch_size 1", 1), ("--zero 3", 1), ("--attention naive", 1), ("--activation_checkpointing", 1),
    ("--zero 0", 2), ("--zero 3 --micro_batch_size 1", 2)])
def test_one_curve_however_the_step_is_computed(reference, files, tmp_path, flags, world):
    """In parts, on two ranks, sharded, with another attention: the same conversations, the same losses."""
    losses = train(files, tmp_path, flags, world)
    assert losses == pytest.approx([loss for _, loss in curve(reference)], rel=1e-5)


@pytest.mark.parametrize("flags", [
    "--clip 0.01", "--seed 2", "--decay cosine", "--turns last", "--batch_size 7",
    "--val_fraction 0.2", "--epochs 1 --steps 0"])
def test_every_flag_does_something(reference, files, tmp_path, flags):
    """No flag is accepted and then ignored: the model becomes another one."""
    train(files, tmp_path, f"--eval_prompts 0 {flags}")
    assert not same_weights(reference, tmp_path)
    if flags == "--turns last":  # validated on all turns, so that the ways can be compared
        assert_evaluated(tmp_path)


def test_validation_data_of_its_own(reference, files, tmp_path):
    """--val_data with the conversations that --val_fraction would set aside: the same run and evaluation."""
    train(files, tmp_path, " ".join(small_chat.split_by_hand(files[0], 36)))
    assert curve(tmp_path) == curve(reference) and same_weights(tmp_path, reference)
    assert_evaluated(tmp_path)


def test_text_is_rehearsed(files, tmp_path, monkeypatch):
    """--ptx: each step reads the next windows and adds their mean loss times --ptx; it falls. One curve
    however the step is split."""
    monkeypatch.chdir(tmp_path)  # where its token files go
    Path("text.txt").write_text("abc def gab " * 200)
    flags = "--ptx 0.5 --ptx_data text.txt --eval_prompts 0 --lr 2e-2"
    with monkeypatch.context() as patch:
        windows, backward = (small_chat.calls_of(patch, *place) for place in
                             ((data.Windows, "batch"), (Zero, "backward")))
        whole = train(files, tmp_path / "whole", flags)
    events = [event for event in metrics("whole") if "loss" in event]
    assert [step for _, step, *_ in windows] == list(range(8))
    assert [loss.item() for _, loss in backward] == pytest.approx(
        [x for event in events for x in (event["loss"], event["loss/ptx_avg"] / 2)])
    assert events[-1]["loss/ptx_avg"] < events[0]["loss/ptx_avg"] - 0.3
    for world, more in ((1, "--micro_batch_size=1"), (2, "--zero=2")):
        assert train(files, tmp_path / more, f"{flags} {more}", world) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("flags, words", [
    ("--data nowhere.jsonl", "nowhere.jsonl"), ("--data=", "--data"), ("--seq_len 97", "--seq_len"),
    ("--seq_len 5", "--seq_len"), ("--init nowhere", "nowhere"), ("--val_fraction 1", "--val_fraction"),
    ("--ptx 1", "both or neither"), ("--ptx_data text.txt", "both or neither")])
def test_bad_input_is_one_clear_line(files, tmp_path, flags, words):
    """The flag or file is named, and nothing is written."""
    given = f"--data {files[0]} --init {files[1]} --out {tmp_path}/out {flags}".split()
    with pytest.raises(UserError) as error:
        train_sft.main(given)
    assert words in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()
