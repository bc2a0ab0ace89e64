"""From files to training batches: rows of token ids, what to predict at each, and where one text ends.

    Windows, eval_windows       pretraining: windows over a token file
    encode_chat, encode_prompt  messages -> ids, and which of them are trained: the chat template
    pack, collate               sequences of any lengths -> full rows; the one place that shifts targets
    Conversations, Replies      batches of conversations (SFT), of ranked replies (reward model, DPO)

    python data.py --show --data my.txt                     # a window: token | target | segment
    python data.py --show --stage sft --data chats.jsonl    # the first chat: token | target | trained?
"""
import dataclasses
import functools
import hashlib
import json
import mmap
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
    start and places behind the end of the file are padding: pad, -100, -1."""
    starts = np.pad(starts, (0, n_rows - len(starts)), constant_values=len(tokens))
    at = starts[:, None] + np.arange(seq_len + 1)  # (B, T + 1)
    window = np.where(at < len(tokens), tokens.ids[at.clip(max=len(tokens) - 1)].astype(np.int64), -1)
    tokens.map.madvise(mmap.MADV_DONTNEED)  # the file's pages would else count as memory of this process
    ids, targets = window[:, :-1], window[:, 1:]  # (B, T)
    segment_ids = np.where(ids < 0, -1, np.cumsum(ids == tokens.bos_id, axis=1))  # (B, T)
    targets = np.where((targets < 0) | (targets == tokens.bos_id), IGNORE, targets)
    return tuple(map(torch.from_numpy, (np.where(ids < 0, tokens.pad_id, ids), targets, segment_ids)))


class Windows:
    """Batches of windows of seq_len tokens; a batch depends on (seed, step) alone. batch_size: rows of a step
    over ALL ranks. mode "random": a row begins anywhere; "sequential": the file's windows one after another,
    epoch after epoch, but for an incomplete one at its end."""

    def __init__(self, tokens: TokenFile, seq_len: int, *, batch_size: int, mode="random", seed: int = 0):
        if len(tokens) <= seq_len:
            raise UserError(f"{tokens.path}: found {len(tokens)} tokens, need more than --seq_len {seq_len}")
        self.tokens, self.seq_len, self.batch_size = tokens, seq_len, batch_size
        self.mode, self.seed, self.n_windows = mode, seed, (len(tokens) - 1) // seq_len  # of an epoch

    def starts(self, step: int) -> np.ndarray:
        """Where each row of the global batch begins, int64 (batch_size,)."""
        if self.mode == "sequential":
            return (step * self.batch_size + np.arange(self.batch_size)) % self.n_windows * self.seq_len
        # Philox has a stream for each step (Salmon et al. 2011). Raw bits: numpy may change all else.
        bits = np.random.Philox(key=self.seed, counter=[0, step, 0, 0]).random_raw(self.batch_size)
        return (bits % np.uint64(len(self.tokens) - self.seq_len)).astype(np.int64)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple:
        """Rows rank::world of a step: (ids, targets, segment_ids), each (ceil(batch_size / world), T)."""
        starts, n_rows = self.starts(step)[rank::world], -(-self.batch_size // world)
        return read_windows(self.tokens, starts, self.seq_len, n_rows)


def eval_windows(tokens: TokenFile, seq_len: int, batch_size: int, rank=0, world=1, max_rows: int = 0):
    """Yields batches as Windows makes them; over all ranks they hold every target of the file once. All have
    one shape, at most batch_size rows; all ranks get as many. max_rows: only the first of them; 0: all."""
    n_windows = min(-(-(len(tokens) - 1) // seq_len), max_rows or len(tokens))
    n_batches = -(-n_windows // (batch_size * world))
    n_rows = -(-n_windows // (n_batches * world))  # not batch_size, so that few rows are padding
    for first in range(rank * n_rows, n_batches * world * n_rows, world * n_rows):
        starts = np.arange(first, min(first + n_rows, n_windows)) * seq_len
        yield read_windows(tokens, starts, seq_len, n_rows)


def expect_chat(folder: str, config: dict) -> None:
    """UserError unless the model in this folder, with this config.json, has learned our chat template."""
    if config.get("chat_template") != CHAT_TEMPLATE:
        raise UserError(f"{folder}: found a model that has not learned to chat; train it with train_sft.py")


def encode_chat(tokenizer: Tokenizer, messages: list[dict], where="text") -> tuple[list[int], list[int]]:
    """(ids, mask) of a conversation. mask is 1 for what is trained: what an assistant says, and its end."""
    ids, mask = [tokenizer.bos_id], [0]
    for message in messages:
        content = tokenizer.encode(message["content"], where)
        ids += [getattr(tokenizer, f"{message['role']}_id"), *content, tokenizer.end_id]
        trained = message.get("train", message["role"] == "assistant")
        mask += [0] + [int(trained)] * (len(content) + 1)
    return ids, mask


def encode_prompt(tokenizer: Tokenizer, messages: list[dict], where="text") -> list[int]:
    """The ids after which the assistant speaks; encode_chat(messages and a reply) begins with them."""
    return encode_chat(tokenizer, messages, where)[0] + [tokenizer.assistant_id]


def encode_prompts(tokenizer: Tokenizer, records: list[Record], longest: int) -> list[tuple]:
    """(record, ids) of the prompts that have at most `longest` tokens."""
    pairs = [(record, encode_prompt(tokenizer, record.messages, record.where)) for record in records]
    return [(record, ids) for record, ids in pairs if len(ids) <= longest]


def chat_samples(tokenizer: Tokenizer, messages: list[dict], turns: str = "all", where="text") -> list[tuple]:
    """What is trained of a conversation: a list of (ids, mask). turns: "all" in one sample, since a causal
    model does not see turn 2 in turn 1; the "last" alone; or "each" in a sample that ends with it."""
    if turns == "all":
        return [encode_chat(tokenizer, messages, where)]
    replies = [i for i, each in enumerate(messages) if each.get("train", each["role"] == "assistant")]
    samples = []
    for i in replies[-1:] if turns == "last" else replies:
        n = len(encode_prompt(tokenizer, messages[:i], where))
        ids, mask = encode_chat(tokenizer, messages[: i + 1], where)
        samples.append((ids, [0] * n + mask[n:]))
    return samples


def truncate(tokenizer: Tokenizer, samples: list[tuple], length: int) -> list[tuple]:
    """Samples (ids, mask) of one prompt, less its oldest turns, so that each has at most `length` ids. What
    is left has the system message, and begins with a whole question. [] if not even the last one fits."""
    ids, longest = samples[0][0], max(len(ids) for ids, _ in samples)
    head = ids.index(tokenizer.end_id) + 1 if ids[1] == tokenizer.system_id else 1
    questions = (i for i, token in enumerate(ids) if token == tokenizer.user_id)
    cut = next((i for i in questions if head + longest - i <= length), len(ids))
    short = [(ids[:head] + ids[cut:], mask[:head] + mask[cut:]) for ids, mask in samples]
    return short if all(any(mask) for _, mask in short) else []


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
    """(ids, targets, segment_ids), each int64 (B, T). The only place that shifts: a target is the next id of
    its sequence if that has mask 1, else -100. rows: for each row the numbers of its sequences (None: one
    each). segment_ids count them from 0; -1 is padding. T is the longest row, or `length`."""
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


def segment_sums(x, segment_ids) -> torch.Tensor:
    """The sum of x (B, T) over each segment of each row: (B, segments)."""
    numbers = torch.arange(int(segment_ids.max()) + 1, device=x.device)[:, None]
    return (x[:, None] * (segment_ids[:, None] == numbers)).sum(-1)  # sum over T of (B, segments, T)


@functools.lru_cache(maxsize=2)  # steps come one after the other: an epoch, and the next
def order(n: int, epoch: int, seed: int) -> list[int]:
    bits = np.random.Philox(key=seed, counter=[0, epoch, 1, 0]).random_raw(n)
    return np.argsort(bits, kind="stable").tolist()


def shuffled(n: int, first: int, count: int, seed: int) -> list[int]:
    """Items first .. first + count - 1 of an endless stream of epochs over n items, each in its own order."""
    return [order(n, i // n, seed)[i % n] for i in range(first, first + count)]


class Shuffled:
    """Items in batches; a batch depends on (seed, step) alone. batch_size: items of a step over ALL ranks.
    truncated: how many lost their oldest turns to fit into seq_len. dropped: how many lacked room for their
    last question and its reply. fingerprint(): 16 hexadecimal digits, others for other items."""

    def __init__(self, items: list, seq_len: int, batch_size: int, seed: int):
        self.items, self.seq_len, self.batch_size, self.seed = items, seq_len, batch_size, seed

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.items).encode()).hexdigest()[:16]

    def of_step(self, step: int) -> list[int]:
        """Which items step `step`, counted from 0, trains."""
        return shuffled(len(self), step * self.batch_size, self.batch_size, self.seed)

    def report(self) -> str:
        return f"{len(self)} samples, {self.truncated} of them truncated, {self.dropped} dropped as too long"


class Conversations(Shuffled):
    """Batches of chat samples, (ids, mask)."""

    def __init__(self, records, tokenizer: Tokenizer, seq_len: int, *, turns="all", batch_size=16, seed=0):
        found = [sample for record in records
                 for sample in chat_samples(tokenizer, record.messages, turns, record.where)]
        cut = [truncate(tokenizer, [sample], seq_len) for sample in found]
        self.samples = [sample for part in cut for sample in part]
        self.dropped, self.pad_id = cut.count([]), tokenizer.pad_id
        self.truncated = sum(len(ids) > seq_len for ids, _ in found) - self.dropped
        super().__init__(self.samples, seq_len, batch_size, seed)

    def rows(self, chosen: list[int], rank: int = 0, world: int = 1) -> tuple:
        """Rows rank::world of the chosen samples: (ids, targets, segment_ids), each (B, T). Of 16 row lengths
        T the one that leaves fewest places empty. Rows of padding give all ranks one shape."""
        sequences, masks = zip(*(self.samples[i] for i in chosen))
        lengths = list(map(len, sequences))
        ways = [pack(lengths, T) for T in np.linspace(max(lengths), self.seq_len, 16, dtype=int).tolist()]
        sized = [(rows, max(sum(lengths[i] for i in row) for row in rows)) for rows in ways]
        rows, T = min(sized, key=lambda way: len(way[0]) * way[1])
        rows += [[]] * (-len(rows) % world)
        return collate(sequences, masks, rows[rank::world], T, self.pad_id)

    def in_order(self, rank: int = 0, world: int = 1):
        """Yields every sample once, batch_size at a time, for evaluation."""
        for first in range(0, len(self), self.batch_size):
            yield self.rows(range(len(self))[first : first + self.batch_size], rank, world)


class ReplyRows(NamedTuple):
    """What one forward reads: whole groups, n replies in all, laid into B rows."""
    at: torch.Tensor  # (n,) which of the step's replies these are, counted through its groups in order
    sizes: list[int]  # replies of each group; a group's replies follow one another, the best first
    ids: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), -100 but for the reply and its end
    segment_ids: torch.Tensor  # (B, T)
    ends: torch.Tensor  # (2, n) row and column of each reply's last token, its end

    def to(self, device) -> "ReplyRows":
        return ReplyRows(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in self))


class Replies(Shuffled):
    """Batches of groups. A group is (ids, mask) of prompt and reply for the replies to one prompt, the best
    first. pairs "none": all its replies; "best-worst": the first and the last; "all": each two of them."""

    def __init__(self, records, tokenizer: Tokenizer, seq_len: int, *, pairs="none", batch_size=16, seed=0):
        self.groups, self.records, self.pad_id = [], [], tokenizer.pad_id  # records[g]: of groups[g]
        self.truncated = self.dropped = 0
        for record in records:
            chats = [[*record.messages, {"role": "assistant", "content": text}] for text in record.responses]
            whole = [chat_samples(tokenizer, chat, "last", record.where)[0] for chat in chats]
            if not (group := truncate(tokenizer, whole, seq_len)):
                self.dropped += 1
                continue
            self.truncated += group != whole
            K = range(len(group))
            for members in {"none": [K], "best-worst": [(0, K[-1])], "all": combinations(K, 2)}[pairs]:
                self.groups.append([group[i] for i in members])
                parts = {name: [values[i] for i in members] for name in ("responses", "tags", "scores")
                         if (values := getattr(record, name))}
                self.records.append(dataclasses.replace(record, **parts))
        super().__init__(self.groups, seq_len, batch_size, seed)

    def sizes(self, chosen: list[int]) -> list[int]:
        return [len(self.groups[g]) for g in chosen]

    def batches(self, chosen: list[int], size=0, rank: int = 0, world: int = 1):
        """Yields ReplyRows: groups rank::world of the chosen ones, `size` at a time (0: all at once). All
        ranks get the same number of batches: one of padding alone fills up."""
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
            tensors = collate(ids, masks, rows, 0 if samples else 1, self.pad_id)
            yield ReplyRows(at, self.sizes([chosen[g] for g in groups]), *tensors, ends.T)


@dataclasses.dataclass
class RehearsalConfig:
    # optimisation
    ptx: float = 0.0  # weight of the pretraining loss that is mixed in, against forgetting; 0: off
    ptx_data: str = ""  # its text: .txt, .json or .jsonl
    ptx_rows = 4  # rows of that text per update over all ranks


class Rehearsal:
    """Text of pretraining beside the batches of a later stage: a small model soon forgets what is not asked
    (Ouyang et al. 2022, equation 2, gamma). cfg: the flags of the script; without --ptx nothing is done."""

    def __init__(self, cfg, tokenizer: Tokenizer, ranks):
        if bool(cfg.ptx) != bool(cfg.ptx_data):
            raise UserError(f"--ptx {cfg.ptx} with --ptx_data {cfg.ptx_data!r}: expected both or neither")
        self.cfg, self.ranks, self.text = cfg, ranks, None
        if cfg.ptx:
            path, *_ = ranks.main_first(
                lambda: prepare(cfg.ptx_data, tokenizer=tokenizer.path, strict=cfg.strict))
            self.text = Windows(TokenFile(path, tokenizer), cfg.seq_len, batch_size=cfg.ptx_rows,
                                seed=cfg.seed)

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
        return {"loss/ptx_avg": self.ranks.sum(total)[0]}, n_tokens


@dataclasses.dataclass
class Config:
    show: bool = False  # print what training reads, one token a line
    data: str = "stdlib"  # stdlib, shakespeare, or files
    stage: Literal["pretrain", "sft"] = "pretrain"  # pretrain: a window of the text; sft: the first chat
    tokenizer: str = "bpe"  # byte, char, bpe, a name that tiktoken knows, or a tokenizer.json; sft: byte


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    if cfg.stage == "sft":
        messages = read_chats(cfg.data)[0].messages
        tokenizer = make_tokenizer("byte" if cfg.tokenizer == "bpe" else cfg.tokenizer)
        print(f"chat template: {CHAT_TEMPLATE}")
        sample = collate(*zip(encode_chat(tokenizer, messages)))
    else:
        path, _, its = prepare(cfg.data, tokenizer=cfg.tokenizer)
        tokenizer = Tokenizer.load(its)
        sample = Windows(TokenFile(path, tokenizer), 64, batch_size=1).batch(0)
    for i, target, segment in zip(*(part[0].tolist() for part in sample)) if cfg.show else ():
        shown, trained = (repr(tokenizer.decode([target])), "trained") if target != IGNORE else ("-", "")
        last = trained if cfg.stage == "sft" else segment
        print(f"{tokenizer.decode([i])!r:24} {shown:24} {last}".rstrip())


if __name__ == "__main__":
    start(main)
