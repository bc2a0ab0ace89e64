"""From files to training batches: rows of token ids, what to predict at each, and where one text ends.

    Windows, eval_windows       pretraining: windows over a token file
    encode_chat, encode_prompt  messages -> ids, and which of them are trained: the chat template
    pack, collate               sequences of any lengths -> full rows; the one place that shifts targets
    Conversations, Replies      batches of conversations (SFT), of ranked replies (reward model, DPO)
    Rehearsal                   text of pretraining beside the batches of a later stage

    python data.py --data my.txt --vocab_size 1024 --show    # token files; a window: token | target | segment
    python data.py --show --stage sft --data chats.jsonl     # the first chat: token | target | trained?
"""
from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from itertools import accumulate, combinations
from typing import Literal, NamedTuple

import numpy as np
import torch

from lib.corpora import TokenFile, prepare
from lib.program import UserError, parse, start
from lib.records import Record, read_chats
from lib.tokenizer import Tokenizer, make_tokenizer

IGNORE = -100  # the target of a position that is not trained
# Content is ordinary text: nothing that a user types becomes a special token. Each message is encoded alone:
# no merge of the tokenizer joins what is only read to what is trained.
CHAT_TEMPLATE = "<|bos|>{<|system|>text<|end|>}[<|user|>text<|end|><|assistant|>text<|end|>]..."


def read_windows(tokens: TokenFile, starts: np.ndarray, seq_len: int, n_rows: int) -> tuple:
    """(ids, targets, segment_ids), each int64 (n_rows, T), of the windows that begin at `starts`.

    A target is the next id. We do not train on bos: which document comes next cannot be predicted, and
    counting it would change the loss. segment_ids: how many documents have begun in the row. Rows without a
    start and places behind the end of the file are padding: pad, -100, -1.
    """
    starts = np.pad(starts, (0, n_rows - len(starts)), constant_values=len(tokens))
    at = starts[:, None] + np.arange(seq_len + 1)  # (B, T + 1)
    window = np.where(at < len(tokens), tokens.ids[at.clip(max=len(tokens) - 1)].astype(np.int64), -1)
    tokens.forget_pages()
    ids, targets = window[:, :-1], window[:, 1:]  # (B, T)
    segment_ids = np.where(ids < 0, -1, np.cumsum(ids == tokens.bos_id, axis=1))  # (B, T)
    targets = np.where((targets < 0) | (targets == tokens.bos_id), IGNORE, targets)
    return tuple(map(torch.from_numpy, (np.where(ids < 0, tokens.pad_id, ids), targets, segment_ids)))


class Windows:
    """Batches of windows of seq_len tokens; a batch depends on (seed, step) alone. batch_size: rows of a step
    over ALL ranks. mode "random": a row begins anywhere. "sequential": row r is window step * batch_size + r
    of the file, epoch after epoch; an incomplete window at its end is left out."""

    def __init__(self, tokens: TokenFile, seq_len: int, *, batch_size: int, mode="random", seed: int = 0):
        if len(tokens) <= seq_len:
            raise UserError(f"{tokens.path}: found {len(tokens)} tokens, expected more than {seq_len}; "
                            "lower --seq_len or give more text")
        self.tokens, self.seq_len, self.batch_size = tokens, seq_len, batch_size
        self.mode, self.seed, self.n_windows = mode, seed, (len(tokens) - 1) // seq_len  # of an epoch

    def starts(self, step: int) -> np.ndarray:
        """Where each row of the global batch begins, int64 (batch_size,)."""
        if self.mode == "sequential":
            return (step * self.batch_size + np.arange(self.batch_size)) % self.n_windows * self.seq_len
        # Philox enciphers a counter, so each step has its own stream (Salmon et al. 2011, "Parallel random
        # numbers: as easy as 1, 2, 3"). Raw bits: numpy may change what its other methods make of them.
        bits = np.random.Philox(key=self.seed, counter=[0, step, 0, 0]).random_raw(self.batch_size)
        return (bits % np.uint64(len(self.tokens) - self.seq_len)).astype(np.int64)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple:
        """Rows rank::world of a step: (ids, targets, segment_ids), each (ceil(batch_size / world), T)."""
        starts, n_rows = self.starts(step)[rank::world], -(-self.batch_size // world)
        return read_windows(self.tokens, starts, self.seq_len, n_rows)


def eval_windows(tokens: TokenFile, seq_len: int, batch_size: int, rank=0, world=1, max_rows: int = 0):
    """Yields batches like those of Windows, which over all ranks hold every target of the file exactly once.
    All have one shape, of at most batch_size rows, and all ranks get the same number of them. max_rows: only
    so many rows from the beginning of the file, whatever the world; 0: all."""
    n_windows = min(-(-(len(tokens) - 1) // seq_len), max_rows or len(tokens))
    n_batches = -(-n_windows // (batch_size * world))
    n_rows = -(-n_windows // (n_batches * world))  # not batch_size, so that few rows are padding
    for first in range(rank * n_rows, n_batches * world * n_rows, world * n_rows):
        starts = np.arange(first, min(first + n_rows, n_windows)) * seq_len
        yield read_windows(tokens, starts, seq_len, n_rows)


def expect_chat(folder: str, config: dict) -> None:
    """UserError unless the model in this folder, with this config.json, has learned to chat by our template."""
    if config.get("chat_template") != CHAT_TEMPLATE:
        raise UserError(f"{folder}: found a model with the chat template {config.get('chat_template')!r}, "
                        f"expected {CHAT_TEMPLATE!r}; train it to chat with train_sft.py")


def encode_chat(tokenizer: Tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """(ids, mask) of a conversation. mask is 1 for what is trained: what an assistant says, and its end."""
    ids, mask = [tokenizer.bos_id], [0]
    for message in messages:
        content = tokenizer.encode(message["content"])
        ids += [getattr(tokenizer, f"{message['role']}_id"), *content, tokenizer.end_id]
        mask += [0] + [int(message["role"] == "assistant")] * (len(content) + 1)
    return ids, mask


def encode_prompt(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """The ids after which the assistant speaks; encode_chat(messages and a reply) begins with them."""
    return encode_chat(tokenizer, messages)[0] + [tokenizer.assistant_id]


def encode_prompts(tokenizer: Tokenizer, records: list[Record], longest: int) -> list[tuple]:
    """(record, ids) of the prompts that have at most `longest` tokens."""
    pairs = []
    for record in records:
        try:
            ids = encode_prompt(tokenizer, record.messages)
        except UserError as error:  # a character outside the alphabet
            raise UserError(f"{record.where}: {error}") from None
        pairs += [(record, ids)] if len(ids) <= longest else []
    return pairs


def chat_samples(tokenizer: Tokenizer, messages: list[dict], turns: str = "all") -> list[tuple]:
    """What is trained of one conversation, as a list of (ids, mask).

    turns "all": every assistant turn in one pass, since a causal model does not see turn 2 in turn 1. "last":
    the last turn. "each": a sample for each turn, which ends there; it trains what "all" does and reads more.
    """
    if turns == "all":
        return [encode_chat(tokenizer, messages)]
    ends = [i for i, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    samples = []
    for end in ends[-1:] if turns == "last" else ends:
        ids, mask = encode_chat(tokenizer, messages[:end])
        n_context = len(encode_prompt(tokenizer, messages[: end - 1]))
        samples.append((ids, [0] * n_context + mask[n_context:]))
    return samples


def truncate(tokenizer: Tokenizer, ids: list[int], mask: list[int], length: int) -> tuple | None:
    """(ids, mask) of at most `length` ids, cut behind bos and the system message; None if no reply is left.
    A reply that has lost its beginning is not trained: the model would learn to begin in the middle."""
    if len(ids) <= length:
        return ids, mask
    head = ids.index(tokenizer.end_id) + 1 if ids[1] == tokenizer.system_id else 1
    cut = head + len(ids) - length
    tail = mask[cut:]
    broken = tail.index(0) if 0 in tail else len(tail)  # what is left of a reply that the cut goes through
    tail[:broken] = [0] * broken
    return (ids[:head] + ids[cut:], mask[:head] + tail) if any(tail) else None


def pack(lengths: list[int], length: int) -> list[list[int]]:
    """Best-fit decreasing: the longest sequence first, each into the row it fills best. Returns the rows."""
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [r for r, left in enumerate(room) if left >= lengths[i]]
        best = min(fits, key=lambda r: room[r], default=len(rows))
        if best == len(rows):
            rows.append([])
            room.append(length)
        rows[best].append(i)
        room[best] -= lengths[i]
    return rows


def collate(sequences: list[list[int]], masks: list[list[int]], rows=None, length=0, pad_id=0) -> tuple:
    """(ids, targets, segment_ids), each (B, T) int64. The only place that shifts: a target is the next id of
    the same sequence if its mask is 1, else -100. The last id of a sequence is an input without a target.
    rows: for each row the numbers of its sequences (None: one each); segment_ids count them from 0, -1 is
    padding. T is the longest row, or `length`."""
    rows = [[i] for i in range(len(sequences))] if rows is None else rows
    T = length or max(sum(len(sequences[i]) for i in row) for row in rows)
    ids = torch.full((len(rows), T), pad_id)  # (B, T)
    targets, segment_ids = torch.full_like(ids, IGNORE), torch.full_like(ids, -1)  # (B, T)
    for r, row in enumerate(rows):
        end = 0
        for segment, i in enumerate(row):
            sequence, mask = torch.tensor(sequences[i]), torch.tensor(masks[i], dtype=torch.bool)
            first, end = end, end + len(sequence)
            ids[r, first:end], segment_ids[r, first:end] = sequence, segment
            targets[r, first : end - 1] = torch.where(mask[1:], sequence[1:], IGNORE)
    return ids, targets, segment_ids


@functools.lru_cache(maxsize=2)  # steps come one after the other: an epoch, and the next
def order(n: int, epoch: int, seed: int) -> list[int]:
    bits = np.random.Philox(key=seed, counter=[0, epoch, 1, 0]).random_raw(n)
    return np.argsort(bits, kind="stable").tolist()


def shuffled(n: int, first: int, count: int, seed: int) -> list[int]:
    """Items first .. first + count - 1 of an endless stream of epochs over n items, each in its own order."""
    return [order(n, i // n, seed)[i % n] for i in range(first, first + count)]


class Shuffled:
    """Items in batches; a batch depends on (seed, step) alone. batch_size: items of a step over ALL ranks."""

    def __init__(self, tokenizer: Tokenizer, seq_len: int, batch_size: int, seed: int):
        self.tokenizer, self.seq_len, self.batch_size, self.seed = tokenizer, seq_len, batch_size, seed
        self.items = []

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell these items from others."""
        return hashlib.sha256(json.dumps(self.items).encode()).hexdigest()[:16]

    def of_step(self, step: int) -> list[int]:
        """Which items step `step`, counted from 0, trains."""
        return shuffled(len(self), step * self.batch_size, self.batch_size, self.seed)

    def encode(self, record: Record, messages: list[dict], turns: str) -> list[tuple[list[int], list[int]]]:
        try:
            return chat_samples(self.tokenizer, messages, turns)
        except UserError as error:  # a character outside the alphabet
            raise UserError(f"{record.where}: {error}") from None

    def check_items(self, records: list[Record], found: str) -> None:
        if not self.items:
            where = records[0].where.rpartition(":")[0]
            raise UserError(f"{where}: found no {found} shorter than --seq_len {self.seq_len}")


class Conversations(Shuffled):
    """Batches of chat samples, (ids, mask). truncated, dropped: how many were. A sample is dropped if its
    reply alone is longer than seq_len."""

    def __init__(self, records, tokenizer: Tokenizer, seq_len: int, *, turns="all", batch_size=16, seed=0):
        super().__init__(tokenizer, seq_len, batch_size, seed)
        found = [sample for record in records for sample in self.encode(record, record.messages, turns)]
        self.items += filter(None, (truncate(tokenizer, ids, mask, seq_len) for ids, mask in found))
        self.samples, self.dropped = self.items, len(found) - len(self)
        self.truncated = sum(len(ids) > seq_len for ids, _ in found) - self.dropped
        self.check_items(records, "reply")

    def report(self) -> str:
        """What became of the conversations, and what an epoch costs."""
        n_tokens, n_trained = map(sum, zip(*((len(ids), sum(mask)) for ids, mask in self.samples)))
        n_steps = -(-len(self) // self.batch_size)
        steps = [self.of_step(step) for step in range(min(n_steps, 200))]  # enough to say "about"
        computed = sum(len(rows) * T for rows, T in map(self.layout, steps))
        fill = sum(len(self.samples[i][0]) for step in steps for i in step) / computed
        return (f"{len(self)} samples used, {self.truncated} of them truncated, {self.dropped} dropped "
                f"(longer than {self.seq_len} tokens); {n_trained:,} of {n_tokens:,} tokens trained; rows "
                f"filled to {'about ' * (n_steps > len(steps))}{fill:.1%}")

    def layout(self, chosen: list[int]) -> tuple[list[list[int]], int]:
        """(rows of indices into `chosen`, T). Of 16 row lengths T the one that leaves fewest places empty."""
        lengths = [len(self.samples[i][0]) for i in chosen]
        ways = [pack(lengths, T) for T in np.linspace(max(lengths), self.seq_len, 16, dtype=int).tolist()]
        sized = [(rows, max(sum(lengths[i] for i in row) for row in rows)) for rows in ways]
        return min(sized, key=lambda way: len(way[0]) * way[1])

    def rows(self, chosen: list[int], rank: int = 0, world: int = 1) -> tuple:
        """Rows rank::world of the chosen samples: (ids, targets, segment_ids), each (B, T). Rows of padding
        give all ranks one shape."""
        rows, T = self.layout(chosen)
        rows += [[]] * (-len(rows) % world)
        sequences, masks = zip(*(self.samples[i] for i in chosen))
        return collate(sequences, masks, rows[rank::world], T, self.tokenizer.pad_id)

    def in_order(self, rank: int = 0, world: int = 1) -> Iterator[tuple]:
        """Every sample once, batch_size at a time, for evaluation."""
        for first in range(0, len(self), self.batch_size):
            yield self.rows(list(range(first, min(first + self.batch_size, len(self)))), rank, world)


class ReplyRows(NamedTuple):
    """What one forward reads: whole groups, n replies in all, laid into B rows."""
    at: torch.Tensor  # (n,) which of the step's replies these are, counted through its groups in order
    sizes: list[int]  # replies of each group; a group's replies follow one another, the best first
    ids: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), -100 but for the reply and its end
    segment_ids: torch.Tensor  # (B, T)
    ends: torch.Tensor  # (2, n) row and column of each reply's last token, its end

    def to(self, device) -> ReplyRows:
        return ReplyRows(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in self))


class Replies(Shuffled):
    """Batches of groups of replies to one prompt, the best first. A group is a list of (ids, mask): prompt,
    reply and end, of which reply and end are trained. pairs "none": a group is a prompt with all its replies;
    "best-worst": with the first and the last; "all": a group of two for each pair of replies. Of equal
    replies the best is kept. A prompt too long loses its beginning, the same for all its replies."""

    def __init__(self, records, tokenizer: Tokenizer, seq_len: int, *, pairs="none", batch_size=16, seed=0):
        super().__init__(tokenizer, seq_len, batch_size, seed)
        self.groups, self.records = self.items, []  # records[g]: what groups[g] was made of
        self.truncated = self.repeated = self.alike = self.too_long = 0
        for record in records:
            kept = [i for i, text in enumerate(record.responses) if text not in record.responses[:i]]
            replies = [{"role": "assistant", "content": record.responses[i]} for i in kept]
            group = [self.encode(record, [*record.messages, reply], "last")[0] for reply in replies]
            excess = max(0, max(len(ids) for ids, _ in group) - seq_len)
            group = [truncate(tokenizer, ids, mask, len(ids) - excess) for ids, mask in group]
            self.repeated += len(record.responses) - len(kept)
            if len(kept) < 2 or None in group:
                self.alike += len(kept) < 2
                self.too_long += len(kept) >= 2
                continue
            self.truncated += excess > 0
            places = list(range(len(kept)))
            ways = {"none": [places], "best-worst": [[0, places[-1]]], "all": combinations(places, 2)}
            for members in ways[pairs]:
                self.groups.append([group[i] for i in members])
                parts = {name: [values[kept[i]] for i in members] for name in ("responses", "tags", "scores")
                         if (values := getattr(record, name))}
                self.records.append(dataclasses.replace(record, **parts))
        self.check_items(records, "prompt with two different replies")

    def report(self) -> str:
        """What became of the records."""
        samples = [sample for group in self.groups for sample in group]
        n_tokens, n_replied = map(sum, zip(*((len(ids), sum(mask)) for ids, mask in samples)))
        negatives = sum(record.negative for record in self.records)
        return (f"{len(self)} groups{f' ({negatives} negatives)' if negatives else ''} of "
                f"{len(samples) / len(self):.1f} replies, {n_replied:,} of {n_tokens:,} tokens in replies; "
                f"{self.truncated} prompts truncated, {self.too_long} dropped (longer than {self.seq_len} "
                f"tokens), {self.repeated} repeated replies left out, {self.alike} prompts dropped for it")

    def sizes(self, chosen: list[int]) -> list[int]:
        return [len(self.groups[g]) for g in chosen]

    def batches(self, chosen: list[int], size=0, rank: int = 0, world: int = 1) -> Iterator[ReplyRows]:
        """Groups rank::world of the chosen ones, `size` at a time (0: all at once). All ranks get the same
        number of batches: one of padding alone fills up."""
        firsts = [0, *accumulate(self.sizes(chosen))]  # number of each group's first reply
        mine, share = range(rank, len(chosen), world), -(-len(chosen) // world)
        for i in range(0, share, size or share):
            groups = mine[i : i + (size or share)]
            at = torch.tensor([j for g in groups for j in range(firsts[g], firsts[g + 1])], dtype=torch.long)
            samples = [sample for g in groups for sample in self.groups[chosen[g]]]
            lengths = [len(ids) for ids, _ in samples]
            rows = pack(lengths, self.seq_len) or [[]]
            at_end = {j: (r, end - 1) for r, row in enumerate(rows)
                      for j, end in zip(row, accumulate(lengths[j] for j in row))}
            ends = torch.tensor([at_end[j] for j in range(len(samples))], dtype=torch.long).view(-1, 2)
            ids, masks = [ids for ids, _ in samples], [mask for _, mask in samples]
            tensors = collate(ids, masks, rows, 0 if samples else 1, self.tokenizer.pad_id)
            yield ReplyRows(at, self.sizes([chosen[g] for g in groups]), *tensors, ends.T)


class Rehearsal:
    """Text of pretraining beside the batches of a later stage: a small model soon forgets what is not asked
    (Ouyang et al. 2022, equation 2, gamma). cfg has ptx (weight of the text's mean loss; 0: off), ptx_data,
    ptx_rows, seq_len, seed, micro_batch_size."""

    def __init__(self, cfg, tokenizer: Tokenizer, ranks):
        if bool(cfg.ptx) != bool(cfg.ptx_data):
            raise UserError(f"--ptx {cfg.ptx} with --ptx_data {cfg.ptx_data!r}: expected both or neither")
        self.cfg, self.ranks, self.text = cfg, ranks, None
        if cfg.ptx:
            path, *_ = ranks.main_first(lambda: prepare(cfg.ptx_data, tokenizer=tokenizer.path))
            tokens = TokenFile(path, tokenizer)
            self.text = Windows(tokens, cfg.seq_len, batch_size=cfg.ptx_rows, seed=cfg.seed)

    def fingerprint(self) -> str:
        return self.text.tokens.note if self.text else ""

    def backward(self, model, zero, batch: int) -> tuple[dict, float]:
        """Add ptx times the gradient of the mean loss of a batch of text. Returns ({"loss/ptx_avg": that
        loss}, how many tokens it had), over all ranks; without text ({}, 0)."""
        if self.text is None:
            return {}, 0
        rows = [x.to(self.ranks.device) for x in self.text.batch(batch, self.ranks.rank, self.ranks.world)]
        n_tokens, = self.ranks.sum((rows[1] >= 0).sum())
        total = 0.0
        for ids, targets, segment_ids in zip(*(x.split(self.cfg.micro_batch_size or len(x)) for x in rows)):
            loss = -model(ids, targets, segment_ids=segment_ids, equal_weights=True).sum() / n_tokens
            zero.backward(self.cfg.ptx * loss)
            total += loss.detach()
        loss, = self.ranks.sum(total)
        return {"loss/ptx_avg": loss}, n_tokens


@dataclasses.dataclass
class Config:
    data: str = "stdlib"  # stdlib, shakespeare, or a text, .json or .jsonl file (or .gz of these)
    tokenizer: str = "bpe"  # byte, char, bpe, a name that tiktoken knows, or a tokenizer.json
    vocab_size: int = 4096  # of bpe
    cache: str = "data"  # folder for what is made here
    show: bool = False  # also print a training sample: token, target, segment or trained?
    stage: Literal["pretrain", "sft"] = "pretrain"  # what the sample is of; sft only shows
    seq_len: int = 64  # of the window, tokens


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    if cfg.stage == "sft":
        messages = read_chats(cfg.data)[0].messages
        texts = [message["content"] for message in messages]
        tokenizer = make_tokenizer("byte" if cfg.tokenizer == "bpe" else cfg.tokenizer, texts)
        print(f"chat template: {CHAT_TEMPLATE}")
        sample = collate(*zip(encode_chat(tokenizer, messages)))
    else:
        *files, path = prepare(cfg.data, tokenizer=cfg.tokenizer, vocab_size=cfg.vocab_size, cache=cfg.cache)
        tokenizer = Tokenizer.load(path)
        print(f"{path}: {tokenizer.kind}, {tokenizer.vocab_size} tokens")
        for tokens in map(TokenFile, files):
            print(f"{tokens.path}: {len(tokens)} tokens of {tokens.n_bytes} bytes; {tokens.note}")
        sample = Windows(TokenFile(files[0]), cfg.seq_len, batch_size=1).batch(0) if cfg.show else []
    for i, target, segment in zip(*(part[0].tolist() for part in sample)):
        shown, trained = (repr(tokenizer.decode([target])), "trained") if target != IGNORE else ("-", "")
        note = trained if cfg.stage == "sft" else segment
        print(f"{tokenizer.decode([i])!r:24} {shown:24} {note}".rstrip())


if __name__ == "__main__":
    start(main)
