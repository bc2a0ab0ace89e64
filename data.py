"""From files to training batches: rows of token ids, what to predict at each, and where one text ends.

    Windows, eval_windows       pretraining: windows over a token file
    encode_chat, encode_prompt  messages -> ids and which of them are trained: the chat template
    pack, collate               sequences of any lengths -> full rows; the one place that shifts targets
    Conversations               SFT: batches of conversations, a pure function of (seed, step)
    Replies                     reward model and DPO: batches of groups of replies to one prompt, the best first

    python data.py                                             # the English of Python's own library, as BPE tokens
    python data.py --data my.txt --vocab_size 1024 --show      # and print a window: token | target | segment
    python data.py --show --stage sft --data chats.jsonl       # print the first conversation: token | target | trained?
"""
from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch

from lib.corpora import TokenFile, prepare
from lib.program import UserError, parse, start
from lib.records import Record, read_chats
from lib.tokenizer import Tokenizer, make_tokenizer

IGNORE = -100  # the target of a position that is not trained


# ---- pretraining batches ------------------------------------------------------------------------------------------

def read_windows(tokens: TokenFile, starts: np.ndarray, seq_len: int, n_rows: int) -> tuple[torch.Tensor, ...]:
    """(ids, targets, segment_ids), each int64 (n_rows, T), of the windows that begin at `starts`.

    Rows without a start and places beyond the end of the file are padding: pad, -100, -1. A target is the next token,
    but -100 where that is a bos: which document follows is not language, and a free right answer would flatter the
    loss. segment_ids: how many documents have begun in the row so far (0: the one it came into the middle of).
    """
    window = np.full((n_rows, seq_len + 1), -1, dtype=np.int64)  # (B, T + 1)
    for row, start in zip(window, starts.tolist()):
        piece = tokens.ids[start : start + seq_len + 1]
        row[: len(piece)] = piece
    tokens.forget_pages()
    if window.max() >= tokens.vocab_size:
        raise UserError(f"{tokens.path}: found id {window.max()}, expected less than {tokens.vocab_size}; the file is "
                        "damaged: delete its folder to make it again")
    ids, targets = window[:, :-1].copy(), window[:, 1:].copy()  # (B, T)
    segment_ids = np.cumsum(ids == tokens.bos_id, axis=1)  # (B, T)
    segment_ids[ids < 0] = -1
    ids[ids < 0] = tokens.pad_id
    targets[(targets < 0) | (targets == tokens.bos_id)] = IGNORE
    return torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(segment_ids)


class Windows:
    """Batches of windows of seq_len tokens, without any state: to resume takes the step alone.

    batch_size: rows of a step over ALL ranks. mode "random": row r of a step begins anywhere, by (seed, step, r) alone;
    "sequential": it is window step * batch_size + r of the file, one epoch after the other (a rest at the end of the
    file that fills no window is left out).
    """

    def __init__(self, tokens: TokenFile, seq_len: int, *, batch_size: int, mode: str = "random", seed: int = 0):
        if len(tokens) < seq_len + 1:
            raise UserError(f"{tokens.path}: found {len(tokens)} tokens, expected seq_len + 1 = {seq_len + 1} or more; "
                            "lower --seq_len or give more text")
        self.tokens, self.seq_len, self.batch_size, self.mode, self.seed = tokens, seq_len, batch_size, mode, seed
        self.n_windows = (len(tokens) - 1) // seq_len  # of an epoch

    def starts(self, step: int) -> np.ndarray:
        """Where each row of the global batch begins, int64 (batch_size,)."""
        if self.mode == "sequential":
            return (step * self.batch_size + np.arange(self.batch_size)) % self.n_windows * self.seq_len
        # Philox enciphers a counter (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so every step
        # has its own stream. Raw bits, because numpy may change what its other methods make of them.
        bits = np.random.Philox(key=self.seed, counter=[0, step, 0, 0]).random_raw(self.batch_size)
        return (bits % np.uint64(len(self.tokens) - self.seq_len)).astype(np.int64)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[torch.Tensor, ...]:
        """Rows rank::world of the step: (ids, targets, segment_ids), each int64 (ceil(batch_size / world), T)."""
        return read_windows(self.tokens, self.starts(step)[rank::world], self.seq_len, -(-self.batch_size // world))


def eval_windows(tokens: TokenFile, seq_len: int, batch_size: int, rank: int = 0, world: int = 1, max_rows: int = 0):
    """Yields batches like those of Windows, which over all ranks hold every target of the file exactly once.

    batch_size: rows per rank, at most. All batches have one shape, and every rank gets the same number of them.
    max_rows: only so many rows from the beginning of the file, the same whatever the world; 0: all.
    """
    n_windows = -(-(len(tokens) - 1) // seq_len)
    n_windows = min(n_windows, max_rows or n_windows)
    n_batches = -(-n_windows // (batch_size * world))
    n_rows = -(-n_windows // (n_batches * world))  # and not batch_size, so that few rows are padding
    for i in range(n_batches):
        first = (i * world + rank) * n_rows
        yield read_windows(tokens, np.arange(first, min(first + n_rows, n_windows)) * seq_len, seq_len, n_rows)


# ---- the chat template --------------------------------------------------------------------------------------------

# Content is ordinary text: nothing that a user types becomes a special token. Each piece is encoded on its own, so no
# merge of the tokenizer crosses from what is read to what is trained.
CHAT_TEMPLATE = "<|bos|>{<|system|>text<|end|>}[<|user|>text<|end|><|assistant|>text<|end|>]..."


def expect_chat(folder: str, config: dict) -> None:
    """UserError unless the model in this folder, with this config.json, has learned to chat by our template."""
    if config.get("chat_template") != CHAT_TEMPLATE:
        raise UserError(f"{folder}: found a model with the chat template {config.get('chat_template')!r}, expected "
                        f"{CHAT_TEMPLATE!r}; train it to chat with train_sft.py")


def encode_chat(tokenizer: Tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """(ids, mask) of a conversation by CHAT_TEMPLATE; mask 1: trained, which is what an assistant says and its end."""
    role_ids = {"system": tokenizer.system_id, "user": tokenizer.user_id, "assistant": tokenizer.assistant_id}
    ids, mask = [tokenizer.bos_id], [0]
    for message in messages:
        content = tokenizer.encode(message["content"])
        ids += [role_ids[message["role"]], *content, tokenizer.end_id]
        mask += [0] + [int(message["role"] == "assistant")] * (len(content) + 1)
    return ids, mask


def encode_prompt(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """The ids after which the assistant speaks; encode_chat(messages and a reply) begins with them."""
    return encode_chat(tokenizer, messages)[0] + [tokenizer.assistant_id]


def encode_prompts(tokenizer: Tokenizer, records: list[Record], longest: int) -> list[tuple[Record, list[int]]]:
    """(record, ids) of the prompts that have at most `longest` tokens."""
    pairs = []
    for record in records:
        try:
            ids = encode_prompt(tokenizer, record.messages)
        except UserError as error:  # a character outside the alphabet
            raise UserError(f"{record.where}: {error}") from None
        pairs += [(record, ids)] if len(ids) <= longest else []
    return pairs


def chat_samples(tokenizer: Tokenizer, messages: list[dict], turns="all") -> list[tuple[list[int], list[int]]]:
    """What is trained of one conversation, as a list of (ids, mask).

    turns "all": every assistant turn in one pass, since a causal model answers turn 1 as if turn 2 did not exist;
    "last": the last one, the others are context; "each": one sample per assistant turn, cut off behind it. "each"
    trains the tokens of "all" and reads a conversation of n turns n times.
    """
    if turns == "all":
        return [encode_chat(tokenizer, messages)]
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    samples = []
    for i in replies[-1:] if turns == "last" else replies:
        context = encode_prompt(tokenizer, messages[:i])
        ids, _ = encode_chat(tokenizer, messages[: i + 1])
        samples.append((ids, [0] * len(context) + [1] * (len(ids) - len(context))))
    return samples


def truncate(tokenizer: Tokenizer, ids: list[int], mask: list[int], length: int) -> tuple[list[int], list[int]] | None:
    """At most `length` of the ids, cut from the left behind bos and the system message; None if no reply is left whole.

    A reply that has lost its beginning is context, not trained: the model would learn to begin in the middle.
    """
    if len(ids) <= length:
        return ids, mask
    head = ids.index(tokenizer.end_id) + 1 if ids[1] == tokenizer.system_id else 1
    cut = head + len(ids) - length
    if cut >= len(ids):
        return None
    tail = mask[cut:]
    rest = tail.index(0) if 0 in tail else len(tail)  # of a reply that the cut goes through; 0 if it goes elsewhere
    tail[:rest] = [0] * rest
    return (ids[:head] + ids[cut:], mask[:head] + tail) if any(tail) else None


# ---- rows ---------------------------------------------------------------------------------------------------------

def pack(lengths: list[int], length: int) -> list[list[int]]:
    """Best-fit decreasing: the longest sequence first, each into the row it fills best. Returns the indices per row."""
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [r for r in range(len(rows)) if room[r] >= lengths[i]]
        if not fits:
            fits = [len(rows)]
            rows.append([])
            room.append(length)
        best = min(fits, key=lambda r: room[r])
        rows[best].append(i)
        room[best] -= lengths[i]
    return rows


def collate(sequences: list[list[int]], masks: list[list[int]], rows: list[list[int]] | None = None,
            length: int = 0, pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, targets, segment_ids), each (B, T) int64. The only place that shifts: a target is the next id of the same
    sequence where its mask is 1, else -100, so each sequence ends with -100 and its last id is still an input.

    rows: which sequences stand in each row, one after the other (None: one each); segment_ids number them from 0, -1 is
    padding. T is the longest row, or `length`.
    """
    rows = [[i] for i in range(len(sequences))] if rows is None else rows
    T = length or max(sum(len(sequences[i]) for i in row) for row in rows)
    ids = torch.full((len(rows), T), pad_id)  # (B, T)
    targets, segment_ids = torch.full_like(ids, IGNORE), torch.full_like(ids, -1)
    for r, row in enumerate(rows):
        start = 0
        for segment, i in enumerate(row):
            sequence, mask = torch.tensor(sequences[i]), torch.tensor(masks[i], dtype=torch.bool)
            end = start + len(sequence)
            ids[r, start:end], segment_ids[r, start:end] = sequence, segment
            targets[r, start : end - 1] = torch.where(mask[1:], sequence[1:], IGNORE)
            start = end
    return ids, targets, segment_ids


# ---- SFT batches --------------------------------------------------------------------------------------------------

def shuffled(n: int, start: int, count: int, seed: int) -> list[int]:
    """Items start .. start + count - 1 of an endless stream of epochs over n items, each in an order of its own."""
    return [order(n, i // n, seed)[i % n] for i in range(start, start + count)]


@functools.lru_cache(maxsize=2)  # steps come one after the other: an epoch, and the next
def order(n: int, epoch: int, seed: int) -> list[int]:
    bits = np.random.Philox(key=seed, counter=[0, epoch, 1, 0]).random_raw(n)
    return np.argsort(bits, kind="stable").tolist()


class Shuffled:
    """Items in batches, without any state: to resume takes the step alone. batch_size: items of a step over ALL ranks;
    packed: several sequences to a row."""

    def __init__(self, tokenizer: Tokenizer, seq_len: int, packed: bool, batch_size: int, seed: int):
        self.pad_id, self.seq_len, self.packed = tokenizer.pad_id, seq_len, packed
        self.batch_size, self.seed, self.items = batch_size, seed, []

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell these items from others."""
        return hashlib.sha256(json.dumps(self.items).encode()).hexdigest()[:16]

    def of_step(self, step: int) -> list[int]:
        """Which items step `step`, counted from 0, trains."""
        return shuffled(len(self), step * self.batch_size, self.batch_size, self.seed)


class Conversations(Shuffled):
    """Batches of chat samples. truncated, dropped: how many of the file's were; dropped are those whose reply alone is
    longer than seq_len. UserError if none is left."""

    def __init__(self, records: list[Record], tokenizer: Tokenizer, seq_len: int, *, turns="all", packed=True,
                 batch_size: int = 16, seed: int = 0):
        super().__init__(tokenizer, seq_len, packed, batch_size, seed)
        self.samples, self.truncated, self.dropped = self.items, 0, 0
        for record in records:
            try:
                samples = chat_samples(tokenizer, record.messages, turns)
            except UserError as error:  # a character outside the alphabet
                raise UserError(f"{record.where}: {error}") from None
            for ids, mask in samples:
                sample = truncate(tokenizer, ids, mask, seq_len)
                self.truncated += sample is not None and len(ids) > seq_len
                self.dropped += sample is None
                self.samples += [sample] if sample else []
        if not self.samples:
            raise UserError(f"{records[0].where.rpartition(':')[0]}: found no reply shorter than --seq_len {seq_len}")

    def report(self) -> str:
        """What became of the conversations, and what an epoch costs."""
        n_tokens = sum(len(ids) for ids, _ in self.samples)
        n_trained = sum(sum(mask) for _, mask in self.samples)
        n_steps = -(-len(self) // self.batch_size)
        steps = [self.of_step(step) for step in range(min(n_steps, 200))]  # enough to say "about"
        computed = sum(len(rows) * T for rows, T in map(self.layout, steps))
        fill = sum(len(self.samples[i][0]) for step in steps for i in step) / computed
        return (f"{len(self)} samples used, {self.truncated} of them truncated, {self.dropped} dropped (longer than "
                f"{self.seq_len} tokens); {n_trained:,} of {n_tokens:,} tokens trained; rows filled to "
                f"{'about ' * (n_steps > len(steps))}{fill:.1%}")

    def layout(self, chosen: list[int]) -> tuple[list[list[int]], int]:
        """(rows of indices into `chosen`, T). Rows need not be seq_len long: of 16 lengths the one that leaves least
        empty, which is also less attention than the longest."""
        lengths = [len(self.samples[i][0]) for i in chosen]
        ways = [[[i] for i in range(len(chosen))]]
        if self.packed:
            ways = [pack(lengths, T) for T in np.linspace(max(lengths), self.seq_len, 16, dtype=int).tolist()]
        sized = [(rows, max(sum(lengths[i] for i in row) for row in rows)) for rows in ways]
        return min(sized, key=lambda way: len(way[0]) * way[1])

    def rows(self, chosen: list[int], rank: int = 0, world: int = 1) -> tuple[torch.Tensor, ...]:
        """The chosen samples as rows rank::world: (ids, targets, segment_ids), each (b, T), equal shapes on all ranks:
        rows of padding fill up."""
        rows, T = self.layout(chosen)
        rows += [[]] * (-len(rows) % world)
        sequences, masks = zip(*(self.samples[i] for i in chosen))
        return collate(sequences, masks, rows[rank::world], T, self.pad_id)

    def in_order(self, rank: int = 0, world: int = 1) -> Iterator[tuple[torch.Tensor, ...]]:
        """Every sample once, batch_size at a time, for evaluation."""
        everyone = list(range(len(self)))
        for start in range(0, len(self), self.batch_size):
            yield self.rows(everyone[start : start + self.batch_size], rank, world)


# ---- batches for the reward model and DPO -------------------------------------------------------------------------

class ReplyRows(NamedTuple):
    """What one forward reads: whole groups of n replies in all, laid into B rows."""
    at: torch.Tensor  # (n,) which of the step's replies these are, counted through its groups in order
    sizes: list[int]  # replies of each group; a group's replies follow one another, the best first
    ids: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), -100 but for the reply and its end
    segment_ids: torch.Tensor  # (B, T)
    ends: torch.Tensor  # (2, n) row and column of each reply's last token, its end

    def to(self, device) -> ReplyRows:
        return ReplyRows(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in self))


class Replies(Shuffled):
    """Batches of groups of replies to one prompt, the best first.

    Each reply is prompt + reply + end, of which reply and end are trained: files of preferences hold texts, so a reply
    that once was cut off looks finished here; it should not be ranked high. pairs "none": a group is a prompt with all
    its replies; "best-worst": its first and last; "all": one group of two for each of the C(K,2) pairs.
    Of replies that read alike the best one is kept. A prompt too long for seq_len loses its beginning, the same tokens
    for all its replies; one of which nothing would be left is dropped.
    """

    def __init__(self, records: list[Record], tokenizer: Tokenizer, seq_len: int, *,
                 pairs: Literal["none", "best-worst", "all"] = "none", packed=True, batch_size=16, seed=0):
        super().__init__(tokenizer, seq_len, packed, batch_size, seed)
        self.groups, self.records = self.items, []  # records[g]: what groups[g] was made of
        self.truncated, self.repeated, self.alike, self.too_long = 0, 0, 0, 0
        for record in records:
            kept = [i for i, text in enumerate(record.responses) if text not in record.responses[:i]]
            self.repeated += len(record.responses) - len(kept)
            self.alike += len(kept) < 2
            if len(kept) < 2:
                continue
            try:
                group = [chat_samples(tokenizer, [*record.messages, {"role": "assistant", "content": text}], "last")[0]
                         for text in (record.responses[i] for i in kept)]
            except UserError as error:  # a character outside the alphabet
                raise UserError(f"{record.where}: {error}") from None
            excess = max(0, max(len(ids) for ids, _ in group) - seq_len)
            group = [truncate(tokenizer, ids, mask, len(ids) - excess) for ids, mask in group]
            self.too_long += None in group
            if None in group:
                continue
            self.truncated += excess > 0
            chosen = {"none": [range(len(kept))], "best-worst": [(0, len(kept) - 1)],
                      "all": itertools.combinations(range(len(kept)), 2)}[pairs]
            for members in chosen:
                self.groups.append([group[i] for i in members])
                parts = {name: [values[kept[i]] for i in members] for name in ("responses", "tags", "scores")
                         if (values := getattr(record, name))}
                self.records.append(dataclasses.replace(record, **parts))
        if not self.groups:
            raise UserError(f"{records[0].where.rpartition(':')[0]}: found no prompt with two different replies that "
                            f"are shorter than --seq_len {seq_len}")

    def report(self) -> str:
        """What became of the records."""
        sequences = [sample for group in self.groups for sample in group]
        n_tokens, n_replied = sum(len(ids) for ids, _ in sequences), sum(sum(mask) for _, mask in sequences)
        negatives = sum(record.negative for record in self.records)
        return (f"{len(self)} groups{f' ({negatives} negatives)' if negatives else ''} of "
                f"{len(sequences) / len(self):.1f} replies, {n_replied:,} of {n_tokens:,} tokens "
                f"in replies; {self.truncated} prompts truncated, {self.too_long} dropped (longer than {self.seq_len} "
                f"tokens), {self.repeated} repeated replies left out, {self.alike} prompts dropped for it")

    def sizes(self, chosen: list[int]) -> list[int]:
        return [len(self.groups[g]) for g in chosen]

    def batches(self, chosen: list[int], size: int = 0, rank: int = 0, world: int = 1) -> Iterator[ReplyRows]:
        """The chosen groups, numbers rank::world of them, `size` groups at a time (0: all at once). All ranks get the
        same number of batches: one of padding alone fills up."""
        first = [0, *itertools.accumulate(self.sizes(chosen))]  # number of each group's first reply
        mine, share = range(rank, len(chosen), world), -(-len(chosen) // world)
        for start in range(0, share, size or share):
            groups = mine[start : start + (size or share)]
            at = [i for g in groups for i in range(first[g], first[g + 1])]
            samples = [sample for g in groups for sample in self.groups[chosen[g]]]
            lengths = [len(ids) for ids, _ in samples]
            rows = pack(lengths, self.seq_len) if self.packed else [[i] for i in range(len(samples))]
            ends = torch.zeros(2, len(samples), dtype=torch.long)  # (2, n)
            for r, row in enumerate(rows):
                for i, end in zip(row, itertools.accumulate(lengths[i] for i in row)):
                    ends[:, i] = torch.tensor([r, end - 1])
            tensors = collate([ids for ids, _ in samples], [mask for _, mask in samples], rows or [[]],
                              0 if rows else 1, self.pad_id)
            yield ReplyRows(torch.tensor(at, dtype=torch.long), self.sizes([chosen[g] for g in groups]), *tensors, ends)


# ---- rehearsal ----------------------------------------------------------------------------------------------------

class Rehearsal:
    """Text of pretraining beside the batches of a later stage: what a small model knows and is not asked about is
    otherwise soon overwritten (Ouyang et al. 2022, equation 2, the term with gamma).

    cfg: has ptx, the weight of the text's mean loss (0: off), ptx_data, ptx_rows, seq_len, seed, micro_batch_size.
    """

    def __init__(self, cfg, tokenizer: Tokenizer, ranks):
        if bool(cfg.ptx) != bool(cfg.ptx_data):
            raise UserError(f"--ptx {cfg.ptx} with --ptx_data {cfg.ptx_data!r}: expected both or neither")
        self.cfg, self.ranks, self.text = cfg, ranks, None
        if cfg.ptx:
            path, *_ = ranks.main_first(lambda: prepare(cfg.ptx_data, tokenizer=tokenizer.path))
            self.text = Windows(TokenFile(path, tokenizer), cfg.seq_len, batch_size=cfg.ptx_rows, seed=cfg.seed)

    def fingerprint(self) -> str:
        return self.text.tokens.note if self.text else ""

    def backward(self, model, zero, batch: int) -> tuple[dict, float]:
        """Add ptx times the gradient of the mean loss of one batch of text. Returns ({"loss/ptx_avg": that loss}, how
        many tokens it had), over all ranks; without text ({}, 0)."""
        if self.text is None:
            return {}, 0
        rows = [x.to(self.ranks.device) for x in self.text.batch(batch, self.ranks.rank, self.ranks.world)]
        n_tokens, = self.ranks.sum((rows[1] >= 0).sum())
        loss_sum = torch.zeros((), device=self.ranks.device)
        for ids, targets, segment_ids in zip(*(x.split(self.cfg.micro_batch_size or len(x)) for x in rows)):  # (b, T)
            loss = -model(ids, targets, segment_ids=segment_ids, equal_weights=True).sum() / n_tokens
            zero.backward(self.cfg.ptx * loss)
            loss_sum += loss.detach()
        loss, = self.ranks.sum(loss_sum)
        return {"loss/ptx_avg": loss}, n_tokens


# ---- the command --------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Config:
    data: str = "stdlib"       # stdlib, shakespeare, or a .txt, .json or .jsonl file (or .gz of these)
    tokenizer: str = "bpe"     # byte, char, bpe, a name that tiktoken knows, or a tokenizer.json
    vocab_size: int = 4096     # of bpe
    val_data: str = ""         # validation text; empty: the end of data
    val_fraction: float = 0.1  # how much of data, in characters
    cache: str = "data"        # folder for what is made here
    show: bool = False         # also print a training sample: token, target, segment or trained?
    stage: Literal["pretrain", "sft"] = "pretrain"  # what the sample is of; sft only shows
    turns: Literal["all", "last", "each"] = "all"  # assistant turns trained, as in train_sft.py
    seq_len: int = 64          # of the window, tokens
    seed: int = 0              # of the window


def show_rows(tokenizer: Tokenizer, ids, targets, notes) -> None:
    for i, target, note in zip(ids, targets, notes):
        shown = "-" if target == IGNORE else repr(tokenizer.decode([target]))
        print(f"{tokenizer.decode([i])!r:24} {shown:24} {note}".rstrip())


def show_chat(cfg: Config) -> None:
    """The first conversation of the file: token | target | trained?"""
    record = read_chats(cfg.data)[0]
    texts = [message["content"] for message in record.messages]
    tokenizer = make_tokenizer("byte" if cfg.tokenizer == "bpe" else cfg.tokenizer, texts)
    print(f"chat template: {CHAT_TEMPLATE}")
    for ids, mask in chat_samples(tokenizer, record.messages, cfg.turns):
        (ids,), (targets,), _ = (part.tolist() for part in collate([ids], [mask]))
        show_rows(tokenizer, ids, targets, ["" if target == IGNORE else "trained" for target in targets])


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    if cfg.stage == "sft":
        return show_chat(cfg)
    *files, tokenizer_path = prepare(cfg.data, tokenizer=cfg.tokenizer, vocab_size=cfg.vocab_size,
                                     val_data=cfg.val_data, val_fraction=cfg.val_fraction, cache=cfg.cache)
    tokenizer = Tokenizer.load(tokenizer_path)
    print(f"{tokenizer_path}: {tokenizer.kind}, {tokenizer.vocab_size} tokens")
    for path in files:
        tokens = TokenFile(path, tokenizer)
        print(f"{path}: {len(tokens)} tokens, {len(tokens) / tokens.n_bytes:.3f} per byte of {tokens.n_bytes}")
        print(f"    {tokens.note}\n    {[tokenizer.decode([i]) for i in tokens.ids[:16]]}")
    if cfg.show:
        windows = Windows(TokenFile(files[0], tokenizer), cfg.seq_len, batch_size=1, seed=cfg.seed)
        show_rows(tokenizer, *(rows[0].tolist() for rows in windows.batch(0)))


if __name__ == "__main__":
    start(main)
