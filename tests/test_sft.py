"""SFT: what is trained of a conversation, rows that do not know of each other, train_sft.py from end to end."""
import json
import math
import random
from pathlib import Path

import pytest
import torch
from small_chat import (
    calls_of,
    curve,
    last,
    metrics,
    random_model,
    run_script,
    same_weights,
    save_chat_model,
    split_by_hand,
    write,
)

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
from lib.program import UserError
from lib.records import Record
from lib.tokenizer import make_tokenizer
from model import generate, load_model
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


def records(n: int) -> list[Record]:
    return [Record(f"file:{i}", conversation(i)) for i in range(n)]


def loss_and_gradients(sequences, masks, rows=None, position="rope", **options):
    """Of a float64 model whose every weight matters: (summed loss, all gradients)."""
    model = random_model(position=position, max_seq_len=128).double()
    ids, targets, segment_ids = collate(sequences, masks, rows, **options)
    loss = sft_loss(model(ids, targets, segment_ids=segment_ids))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def assert_same(a, b) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-12) and torch.allclose(a[1], b[1], rtol=1e-9, atol=1e-12)


# ---- what is trained ---------------------------------------------------------------------------------------

def test_golden_mask():
    """A dialogue of three turns, by hand: every assistant byte and every end of its turns, and nothing else."""
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
    path = write(tmp_path / "chats.jsonl", [{"messages": DIALOGUE[1:3]}])
    data.main(["--show", "--stage", "sft", "--data", path])
    template, *rows = capsys.readouterr().out.splitlines()
    assert template == f"chat template: {data.CHAT_TEMPLATE}"
    assert [row.split() for row in rows] == [
        *([f"'{token}'", "-"] for token in ("<|bos|>", "<|user|>", "a", "b", "<|end|>")),
        ["'<|assistant|>'", "'c'", "trained"], ["'c'", "'d'", "trained"], ["'d'", "'<|end|>'", "trained"],
        ["'<|end|>'", "-"]]


def test_the_prompt_is_the_beginning_of_the_chat():
    """What sampling starts from is what training saw before the reply. Names of special tokens are plain text."""
    messages = [*DIALOGUE[:4], {"role": "assistant", "content": "<|end|><|user|>"}]
    ids, mask = encode_chat(TOKENIZER, messages)
    prompt = encode_prompt(TOKENIZER, messages[:-1])
    assert ids == [*prompt, *b"<|end|><|user|>", END] and mask[len(prompt):] == [1] * (len(ids) - len(prompt))


def test_three_ways_to_train_the_turns():
    """all: one sample, three replies. last: one sample, one reply. each: three samples of one reply each. "each"
    has the loss and the gradient of "all": the model is causal."""
    all_turns, last_turn, each_turn = (chat_samples(TOKENIZER, DIALOGUE, turns) for turns in ("all", "last", "each"))
    replies = [[i for i, m in zip(ids, mask) if m] for ids, mask in each_turn]
    assert replies == [[*b"cd", END], [*"你".encode(), END], [*b"g", END]]
    assert last_turn == each_turn[2:] and [ids for ids, _ in last_turn] == [ids for ids, _ in all_turns]
    assert_same(loss_and_gradients(*zip(*all_turns)), loss_and_gradients(*zip(*each_turn)))


# ---- rows --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_packed_row_equals_its_conversations(position):
    """Loss and gradient of packed rows are the sum over single conversations, also if one has nothing to train."""
    sequences, masks = map(list, zip(*(encode_chat(TOKENIZER, conversation(i)) for i in range(9))))
    masks[4] = [0] * len(masks[4])
    rows = pack(list(map(len, sequences)), 128)
    assert len(rows) < 9 and max(map(len, rows)) > 1
    alone = [loss_and_gradients([s], [m], position=position) for s, m in zip(sequences, masks)]
    assert_same(loss_and_gradients(sequences, masks, rows, position), [sum(parts) for parts in zip(*alone)])


def test_padding_changes_nothing():
    """Any number of any token behind the conversation."""
    ids, mask = encode_chat(TOKENIZER, DIALOGUE)
    plain = loss_and_gradients([ids], [mask])
    for more, pad_id in ((1, PAD), (30, PAD), (5, END), (5, 0)):
        assert_same(loss_and_gradients([ids], [mask], length=len(ids) + more, pad_id=pad_id), plain)


def test_best_fit_packing():
    """By hand: 7, 5, 4, 3 into rows of 10 are 7 + 3 and 5 + 4. Else every sequence once, no row too long, and no
    two rows that fit into one."""
    assert pack([3, 7, 4, 5], 10) == [[1, 0], [3, 2]]
    r = random.Random(0)
    for _ in range(50):
        lengths = [r.randint(1, 20) for _ in range(r.randint(2, 40))]
        rows = pack(lengths, 20)
        loads = sorted(sum(lengths[i] for i in row) for row in rows)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths))) and loads[-1] <= 20
        assert len(rows) == 1 or sum(loads[:2]) > 20


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_conversation_once_per_epoch(world):
    """Over the steps and ranks of an epoch; all ranks see rows of one shape; each epoch has an order of its own."""
    train = Conversations(records(24), TOKENIZER, 128, batch_size=6, seed=3)
    seen, trained = [], 0
    for step in range(4):
        parts = [train.rows(train.of_step(step), rank, world) for rank in range(world)]
        assert len({tuple(ids.shape) for ids, _, _ in parts}) == 1
        for ids, targets, segments in parts:
            trained += int((targets >= 0).sum())
            for row, segment in zip(ids, segments):
                seen += [tuple(row[segment == s].tolist()) for s in segment.unique() if s >= 0]
    assert sorted(seen) == sorted(tuple(ids) for ids, _ in train.samples)
    assert trained == sum(sum(mask) for _, mask in train.samples)
    assert [train.of_step(s) for s in range(4)] != [train.of_step(s) for s in range(4, 8)]


def test_the_order_is_a_function_of_seed_and_place():
    """A stream of epochs can be entered anywhere, and each epoch has every item once. It is sorted once."""
    data.order.cache_clear()
    stream = shuffled(7, 0, 49, seed=1)
    assert all(shuffled(7, start, 5, seed=1) == stream[start:start + 5] for start in range(43, 0, -1))
    assert all(sorted(stream[e:e + 7]) == list(range(7)) for e in range(0, 49, 7))
    assert data.order.cache_info().misses <= 14 and stream != shuffled(7, 0, 49, seed=2)


def test_truncation_from_the_left():
    """The beginning goes, behind bos and the system message. A reply that lost its beginning is not trained, no
    end is invented, and no sample is left without a trained token."""
    for seed in range(60):
        ids, mask = encode_chat(TOKENIZER, conversation(seed))
        head = ids.index(END) + 1 if ids[1] == SYSTEM else 1
        for length in range(2, len(ids) + 2):
            cut, cut_mask = truncate(TOKENIZER, ids, mask, length) or ([], [])
            if cut:
                assert len(cut) == min(length, len(ids)) and any(cut_mask)
                assert cut[:head] == ids[:head] and cut[head:] == ids[len(ids) - len(cut) + head:]
                assert all(m <= o for m, o in zip(cut_mask[::-1], mask[::-1]))
            for t, m in enumerate(cut_mask):  # each trained run begins right behind its assistant token
                assert not m or cut_mask[t - 1] or cut[t - 1] == ASSISTANT
    long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 50}]
    assert truncate(TOKENIZER, *encode_chat(TOKENIZER, long), 40) is None


def test_nothing_is_lost_silently():
    """The report counts what is used, cut and dropped, and how full rows are: tokens of an epoch over the places
    computed for them. A file without any reply that fits is refused, and so is a character without a token."""
    long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 99}]
    many = records(20) + [Record("file:99", long)]
    train = Conversations(many, TOKENIZER, 40, batch_size=6)
    assert len(train) + train.dropped == 21 and train.dropped >= 1 and train.truncated >= 1
    segments = [train.rows(train.of_step(step))[2] for step in range(-(-len(train) // 6))]
    fill = sum(int((s >= 0).sum()) for s in segments) / sum(s.numel() for s in segments)
    for words in (f"{len(train)} samples", f"{train.truncated} of them", f"{train.dropped} dropped", f"{fill:.1%}"):
        assert words in train.report()
    with pytest.raises(UserError, match="--seq_len 8"):
        Conversations(many[-1:], TOKENIZER, 8)
    with pytest.raises(UserError, match="file:3.*U\\+4F60"):
        Conversations([Record("file:3", [*long[:1], DIALOGUE[4]])], make_tokenizer("char", "ab"), 40)


def test_four_dialogues_are_learned_by_heart():
    """Accuracy 1; greedy decoding gives the replies and stops."""
    dialogues = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}]
                 for q, a in (("ab?", "Yes."), ("cd?", "No, never."), ("你好", "你好!"), ("sum", "1+1=2"))]
    sequences, masks = zip(*(encode_chat(TOKENIZER, d) for d in dialogues))
    ids, targets, segments = collate(sequences, masks, pack(list(map(len, sequences)), 64))
    model = random_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(80):
        optimizer.zero_grad()
        (sft_loss(model(ids, targets, segment_ids=segments)) / (targets >= 0).sum()).backward()
        optimizer.step()
    _, _, right = model(ids, targets, segment_ids=segments, with_stats=True)
    replies = generate(model, [encode_prompt(TOKENIZER, d[:1]) for d in dialogues], max_new_tokens=30,
                       temperature=0, eos_id=END)
    assert right[targets >= 0].all() and all(reply[-1] == END for reply in replies)
    assert [TOKENIZER.decode(reply[:-1]) for reply in replies] == [d[1]["content"] for d in dialogues]


# ---- the script --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(conversations, a model to start from, a text), as flags."""
    folder = tmp_path_factory.mktemp("files")
    chats = write(folder / "chats.jsonl", [{"messages": conversation(i)} for i in range(40)])
    return chats, save_chat_model(folder / "base")


def train(files, out, *more, world=1):
    run_script("train_sft", [
        "--data", files[0], "--init", files[1], "--out", str(out), "--steps", "8", "--batch_size", "8", "--lr",
        "3e-3", "--seq_len", "64", "--log_every", "1", "--eval_every", "0", "--device", "cpu", *more], world)
    return [loss for _, loss in curve(out)]


@pytest.fixture(scope="module")
def reference(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("sft")
    train(files, out, "--save_every", "4")
    return out


def assert_evaluated(out, chats):
    """The last evaluation is one forward per held-out conversation, all its turns, under the final model."""
    model, *_ = load_model(str(out))
    total = right = count = 0
    for line in Path(chats).read_text().splitlines()[36:]:
        chat = encode_chat(TOKENIZER, json.loads(line)["messages"])
        ids, mask = map(torch.tensor, truncate(TOKENIZER, *chat, 64))
        logits, wanted, counts = model(ids[None, :-1])[0], ids[1:], mask[1:] > 0  # (T, V), (T,), (T,)
        total -= logits.log_softmax(-1).gather(-1, wanted[:, None])[counts].double().sum().item()
        right, count = right + int((logits.argmax(-1) == wanted)[counts].sum()), count + int(counts.sum())
    assert last(out, "eval_loss") == pytest.approx(total / count, rel=1e-5)
    assert last(out, "eval_perplexity") == pytest.approx(math.exp(total / count), rel=1e-4)
    assert last(out, "eval_mean_token_accuracy") == pytest.approx(right / count) and 0 < right < count


def test_a_whole_run_learns_and_leaves_a_chat_model(reference, files):
    trained = [event for event in metrics(reference) if "loss" in event]
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.2
    assert [event["learning_rate"] for event in trained] == pytest.approx([3e-4 * step for step in range(1, 9)])
    assert [event["epoch"] for event in trained] == pytest.approx([8 * step / 36 for step in range(1, 9)])
    config = json.loads((reference / "final" / "config.json").read_text())
    assert config["chat_template"] == data.CHAT_TEMPLATE
    assert_evaluated(reference, files[0])


@pytest.mark.parametrize("flags, world", [
    ("--micro_batch_size 1", 1), ("--zero 3", 1), ("--attention naive", 1), ("--activation_checkpointing", 1),
    ("--zero 0", 2), ("--zero 3 --micro_batch_size 1", 2)])
def test_one_curve_however_the_step_is_computed(reference, files, tmp_path, flags, world):
    """In parts, on two ranks, sharded, with another attention: the same conversations, the same losses."""
    losses = train(files, tmp_path, *flags.split(), world=world)
    assert losses == pytest.approx([loss for _, loss in curve(reference)], rel=1e-5)


@pytest.mark.parametrize("flags", [
    "--weight_decay 0.5", "--clip 0.01", "--seed 2", "--warmup_steps 4", "--min_lr 1e-3", "--turns last",
    "--decay flat-then-linear --warmup_steps 2", "--batch_size 7", "--val_fraction 0.2", "--epochs 1 --steps 0"])
def test_every_flag_does_something(reference, files, tmp_path, flags):
    """No flag is accepted and then ignored: the model becomes another one."""
    train(files, tmp_path, "--eval_prompts", "0", *flags.split())
    assert not same_weights(reference, tmp_path)
    if flags == "--turns last":  # validated on all turns, so that the ways can be compared
        assert_evaluated(tmp_path, files[0])


def test_validation_data_of_its_own(reference, files, tmp_path):
    """--val_data with the conversations that --val_fraction would set aside: the same run, the same evaluation."""
    train(files, tmp_path, *split_by_hand(files[0], 36))
    assert curve(tmp_path) == curve(reference) and same_weights(tmp_path, reference)
    assert_evaluated(tmp_path, files[0])


def test_a_resumed_run_is_bitwise_the_unbroken_one(reference, files, tmp_path):
    """Which conversations a step reads follows from the step alone."""
    (tmp_path / "step-00000004").symlink_to(reference / "step-00000004")
    train(files, tmp_path, "--resume")
    assert curve(tmp_path) == curve(reference)[4:] and same_weights(tmp_path, reference)


def test_text_is_rehearsed(files, tmp_path, monkeypatch):
    """--ptx: each step reads the next windows, and adds their mean loss times --ptx. The text becomes likelier than
    without. One curve however the step is split; a resumed run reads on where it was."""
    monkeypatch.chdir(tmp_path)  # where its token files go
    (tmp_path / "text.txt").write_text("abc def gab " * 200)
    flags = "--ptx 0.5 --ptx_data text.txt --eval_prompts 0 --lr 2e-2 --save_every 4".split()
    with monkeypatch.context() as patch:
        windows, backward = calls_of(patch, Windows, "batch"), calls_of(patch, Zero, "backward")
        whole = train(files, tmp_path / "whole", *flags)
    events = [event for event in metrics(tmp_path / "whole") if "loss" in event]
    assert [step for _, step, *_ in windows] == list(range(8))
    assert [loss.item() for _, loss in backward] == pytest.approx(
        [x for event in events for x in (event["loss"], 0.5 * event["loss/ptx_avg"])])
    for world, more in ((1, "--micro_batch_size 1"), (2, "--zero 2")):
        split = train(files, tmp_path / f"split-{world}", *flags, *more.split(), world=world)
        assert split == pytest.approx(whole, rel=1e-4)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    (resumed / "step-00000004").symlink_to(tmp_path / "whole" / "step-00000004")
    assert train(files, resumed, *flags, "--resume") == whole[4:]
    assert train(files, tmp_path / "without", *flags, "--ptx", "0", "--ptx_data", "")[1:] != whole[1:]
    ids = torch.tensor([TOKENIZER.encode("abc def gab " * 5)])
    text_losses = [-load_model(str(tmp_path / name))[0](ids[:, :-1], ids[:, 1:]).mean()
                   for name in ("whole", "without")]
    assert text_losses[0] < text_losses[1] - 0.3


@pytest.mark.parametrize("flags, words", [
    ("--data nowhere.jsonl", "nowhere.jsonl"), ("--data=", "--data"), ("--seq_len 97", "--seq_len"),
    ("--seq_len 5", "--seq_len"), ("--init nowhere", "nowhere"), ("--val_fraction 0", "--val_fraction"),
    ("--ptx 1", "both or neither"), ("--ptx_data text.txt", "both or neither")])
def test_bad_input_is_one_clear_line(files, tmp_path, flags, words):
    """The flag or file is named, and nothing is written."""
    given = ["--data", files[0], "--init", files[1], "--out", str(tmp_path / "out"), *flags.split()]
    with pytest.raises(UserError) as error:
        train_sft.main(given)
    assert words in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()
