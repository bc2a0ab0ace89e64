"""What lies in the files of others. tools/convert.py says what it means here.

    model.safetensors    8 bytes N; N bytes of JSON {name: {dtype, shape, data_offsets}}; the tensors
    tokenizer.json       the tokens, in which order they are made, the pattern that cuts a text into pieces
    *.gguf               llama.cpp's: fields, such as the tokens; where each tensor begins; the tensors"""
import json
import math
import mmap
import re
import struct
from pathlib import Path

import torch

from lib.checkpoint import expect
from lib.program import UserError
from lib.tokenizer import SPECIALS, WORD_PATTERN, Tokenizer

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
MOST = 1 << 22  # bytes of a header; that of a model with a thousand tensors has a thirtieth


def read_json(text: bytes, name: str) -> dict:
    """The object in a file of this name. A key may not come twice: one of the two would win in silence."""
    def once(pairs: list) -> dict:
        expect(len(found := dict(pairs)) == len(pairs), f"{name}: found a key twice")
        return found
    try:
        found = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: found no JSON: {error}") from None
    expect(type(found) is dict, f"{name}: found {str(found):.40}, expected an object {{...}}")
    return found


# ---- model.safetensors -----------------------------------------------------------------------------------

def well_formed(its, size: int) -> bool:
    """Whether an entry of a header has what it must have, and no number beyond the size of the file."""
    if type(its) is not dict or its.keys() != {"dtype", "shape", "data_offsets"}:
        return False
    shape, offsets = its["shape"], its["data_offsets"]
    return (str(its["dtype"]) in DTYPES and type(shape) is type(offsets) is list and len(shape) < 9
            and len(offsets) == 2 and all(type(x) is int and 0 <= x <= size for x in shape + offsets))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, as views of it. Anybody may have made its header: nothing of it is used before
    the tensors are known to fill the file, each once, from end to end."""
    with open(path, "rb") as file:
        n, size = int.from_bytes(file.read(8), "little"), path.stat().st_size - 8
        expect(0 < n <= min(size, MOST), f"{path.name}: found a header of {n} bytes in a file of {size + 8}")
        header = read_json(file.read(n), path.name)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # what is changed stays in memory
    notes, found, last = header.pop("__metadata__", {}), {}, 0
    expect(type(notes) is dict and all(type(note) is str for note in notes.values()),
           f"{path.name}: found __metadata__ {str(notes):.40}, expected texts")
    for name, its in header.items():
        if not well_formed(its, size):
            raise UserError(f"{path.name}: found {name} {str(its):.150}, expected a dtype of "
                            f"{', '.join(DTYPES)}, a shape, data_offsets")
    for name, its in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (begin, end), dtype = its["shape"], its["data_offsets"], DTYPES[its["dtype"]]
        count = math.prod(shape)
        if begin != last or end - begin != count * dtype.itemsize or end > size - n:
            raise UserError(f"{path.name}: found {name} {str(its):.150}, expected as many bytes as it has, "
                            f"from {last} on, in a file that is whole")
        x = torch.empty(0, dtype=dtype)
        if count:
            x = torch.frombuffer(data, dtype=dtype, count=count, offset=8 + n + begin)
        found[name], last = x.view(shape), end
    expect(last == size - n, f"{path.name}: found {size - n} bytes behind the header, expected {last}")
    return found


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of model.safetensors, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return read_tensors(folder / "model.safetensors")
    where = read_json(index.read_bytes(), index.name)["weight_map"]
    expect(all(re.fullmatch(r"\w[\w.-]*\.safetensors", file) for file in where.values()),
           f"{index.name}: found a shard with another name than letters, digits, - and . give")
    shards = {file: read_tensors(folder / file) for file in {*where.values()}}
    expect(sorted(where.items()) == sorted((name, file) for file, shard in shards.items() for name in shard),
           f"{index.name}: found other tensors in the shards than it lists")
    return {name: shards[file][name] for name, file in where.items()}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Wide numbers come first: so each lies at a multiple of its width."""
    names, header, end = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        x, begin, end = tensors[name], end, end + tensors[name].nbytes
        header[name] = {"dtype": names[x.dtype], "shape": [*x.shape], "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            write(file, tensors[name])


def write(file, x) -> int:
    """The bytes of a tensor; returns how many."""
    content = x.contiguous().view(torch.uint8).numpy()
    content.tofile(file)
    return content.nbytes


# ---- tokenizer.json: byte-level BPE ----------------------------------------------------------------------

SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are written as themselves (GPT-2)
CHARS = {byte: chr(byte) for byte in SHOWN}  # the others, in order, are U+0100 and so on: a space is U+0120
CHARS |= {byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - {*SHOWN}))}
BYTES = {char: byte for byte, char in CHARS.items()}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")
DIGITS = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")  # GPT-2's between digits
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
PATTERNS = {"gpt-2": GPT2, "smollm": DIGITS, "qwen2": QWEN, "llama-bpe": LLAMA3,
            "": WORD_PATTERN}  # by llama.cpp's names; it does not know ours
BPE = {"type": "BPE", "dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
       "byte_fallback": False}
JINJA = ("{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}"
         "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")  # data.CHAT_TEMPLATE


def cut_by(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def pattern_of(pre: dict) -> str:
    """The pattern of a pre_tokenizer. A foreign one could run for ever: UserError."""
    *first, level = pre.get("pretokenizers", [pre])
    known = {pattern: [cut_by(pattern)] for pattern in PATTERNS.values()}
    if level.get("use_regex", True):  # then it cuts as GPT-2 does
        known = {GPT2: [], DIGITS: [{"type": "Digits", "individual_digits": True}]}
    found = next((pattern for pattern, cuts in known.items() if cuts == first), None)
    expect(found and level["type"] == "ByteLevel" and not level["add_prefix_space"],
           f"found pre_tokenizer {str(pre):.300}, expected that of GPT-2, Llama 3, Qwen2, Qwen3 or SmolLM2")
    return found


def last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple:
    """The two parts that tiktoken joins last when it makes a token; () if it cannot, and only takes it for a
    piece that is this token. Of all neighbours that make a token, those of the lowest id go first. Inside a
    text the bytes of a token go the same way, so that no other neighbours ever make it. transformers joins
    listed pairs in their order: it agrees if the last pairs are listed by id."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        ids = [ranks.get(left + right, math.inf) for left, right in zip(parts, parts[1:])]
        i = ids.index(min(ids))
        if ids[i] == math.inf:
            return ()
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def read_tokenizer(found: dict, V: int, bos, end) -> Tokenizer:
    """found: tokenizer.json; V: rows of the model; bos, end: their ids, or None. All ids stay. Our other
    specials, and bytes without a token, get new rows: rows of the model without a token may all be alike."""
    model, form = found["model"], (found.get("normalizer") or {}).get("type")
    for field, good in BPE.items():
        expect(model.get(field) in (None, good), f"found {field} {model.get(field)}, expected byte-level BPE")
    expect(form in (None, "NFC"), f"found normalizer {form}, expected NFC or none")
    names = {token["content"]: token["id"] for token in found.get("added_tokens", [])}
    ranks = {bytes(BYTES[c] for c in text): i for text, i in model["vocab"].items() if text not in names}
    pairs = [merge.split(" ") if type(merge) is str else merge for merge in model["merges"]]
    pairs = [tuple(bytes(BYTES[c] for c in part) for part in pair) for pair in pairs]
    made, listed = [ranks[left + right] for left, right in pairs], {*pairs}
    listed |= {()} if model.get("ignore_merges") else set()  # then a piece that is a token is taken whole
    expect(made == sorted(made) and all(len(t) < 2 or last_pair(t, ranks) in listed for t in ranks),
           "found merges in another order than the ids that they make, expected one order")
    taken = {*names.values(), *ranks.values()}
    expect(all(type(i) is int and 0 <= i < V for i in taken) and len(taken) == len(names) + len(ranks),
           f"found an id twice, or one that is not below vocab_size {V}")
    new = iter(range(V, V + 300))
    ranks |= {bytes([byte]): next(new) for byte in range(256) if bytes([byte]) not in ranks}
    own, specials = {"<|bos|>": bos, "<|end|>": end}, []
    for name in SPECIALS:
        i = names.get(name, own.get(name))
        if i not in names.values() or i in specials:
            i = names[name] = next(new)
        specials.append(i)
    names |= {f"<|unused-{i}|>": i for i in {*range(V)} - {*names.values(), *ranks.values()}}
    merged = [""] * (max(ranks.values()) + 1)
    for token, i in ranks.items():
        merged[i] = token.decode("latin-1")
    its = {"nfc": form == "NFC", "pattern": pattern_of(found["pre_tokenizer"]), "names": names}
    return Tokenizer("imported", merged=merged, imported={**its, "specials": specials})


def ends_of(tokenizer: Tokenizer, V: int) -> dict[str, int]:
    """The ids of bos, eos and pad below V: of a model that was not trained here only those that it had."""
    bos, end, pad = tokenizer.bos_id, tokenizer.end_id, tokenizer.pad_id
    return {name: i for name, i in (("bos", bos), ("eos", end if end < V else bos), ("pad", pad)) if i < V}


def vocabulary(tokenizer: Tokenizer, V: int) -> tuple[dict, dict, list[str], str]:
    """({token as it is written: id}, {name: id}, merges, pattern) of byte-level BPE, of the ids below V.
    UserError for another tokenizer."""
    ranks, pattern = tokenizer.encoding._mergeable_ranks, tokenizer.encoding._pat_str
    pattern = {"gpt2": GPT2, "cl100k_base": LLAMA3}.get(tokenizer.kind, pattern)  # tiktoken rewords them
    expect(pattern in PATTERNS.values() and all(bytes([byte]) in ranks for byte in range(256)),
           f"found a tokenizer of kind {tokenizer.kind}, expected byte, bpe, gpt2, cl100k_base or imported")
    texts = {token: "".join(CHARS[byte] for byte in token) for token in sorted(ranks, key=ranks.get)}
    pairs = [last_pair(token, ranks) for token in texts if len(token) > 1]
    merges = [" ".join(texts[part] for part in pair) for pair in pairs if pair]
    vocab = {text: ranks[token] for token, text in texts.items() if ranks[token] < V}
    names = {name: i for name, i in tokenizer.encoding._special_tokens.items() if i < V}
    return vocab, names, merges, pattern


def tokenizer_json(tokenizer: Tokenizer, V: int) -> dict:
    """A text gets bos in front, as in training. Names are in vocab, too: a reader gives others new ids."""
    vocab, names, merges, pattern = vocabulary(tokenizer, V)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = {name: names[name] for name in sorted(names, key=names.get)}
    added = [{"id": i, "content": name, **flags} for name, i in names.items()]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bos = tokenizer.decode([tokenizer.bos_id])
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    after = {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text, text],
             "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}}}
    return {"version": "1.0", "added_tokens": added, "decoder": level,
            "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut_by(pattern), level]},
            "post_processor": after if tokenizer.bos_id < V else None,
            "model": {**BPE, "ignore_merges": True, "vocab": vocab | names, "merges": merges}}


# ---- GGUF, version 3 -------------------------------------------------------------------------------------

def gguf_words(tokenizer: Tokenizer, V: int, chat: bool) -> dict:
    """The fields that say what the tokens are."""
    vocab, names, merges, pattern = vocabulary(tokenizer, V)
    tokens = sorted((vocab | names).items(), key=lambda item: item[1])
    pre = next(name for name, known in PATTERNS.items() if known == pattern)
    if not pre:
        print("warning: llama.cpp gets GPT-2's pattern, as it does not know ours: numbers of more than three "
              "digits, Hindi, and runs of more than 32 characters become other tokens there")
    ends = {f"{name.replace('pad', 'padding')}_token_id": i for name, i in ends_of(tokenizer, V).items()}
    words = {"model": "gpt2", "pre": pre or "gpt-2", "tokens": [token for token, _ in tokens],
             "token_type": [3 if token in names else 1 for token, _ in tokens], "merges": merges,
             "add_bos_token": tokenizer.bos_id < V, **ends}
    return {f"tokenizer.ggml.{name}": value for name, value in words.items()} | (
        {"tokenizer.chat_template": JINJA} if chat else {})


def packed(value) -> bytes:
    """A value behind the number of its type. A list holds one type, integers with a sign."""
    if type(value) is list:
        kind = {int: 5, float: 6, str: 8}[type((value or [""])[0])]
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(packed(item)[4:] for item in value)
    if type(value) is str:
        return struct.pack("<IQ", 8, len(value.encode())) + value.encode()
    number, form = {int: (4, "I"), float: (6, "f"), bool: (7, "?")}[type(value)]
    return struct.pack(f"<I{form}", number, value)


def q8_0(x):
    """Blocks of 32 numbers as a scale in float16 and 32 integers; x is about scale times integer."""
    x = x.float().reshape(-1, 32)
    scale = x.abs().amax(1, keepdim=True) / 127  # (n / 32, 1)
    y = x * torch.where(scale > 0, 1 / scale, 0)
    y = (y.abs() + 0.5).floor() * y.sign()  # a half goes away from 0, as in C
    return torch.cat((scale.half().view(torch.int8), y.to(torch.int8)), 1)  # (n / 32, 34) bytes


WAYS = {  # to hold a matrix: llama.cpp's number, bytes of a number of ours, the change
    "float32": (0, 4, torch.Tensor.float), "float16": (1, 2, torch.Tensor.half), "q8_0": (8, 34 / 32, q8_0)}


def write_gguf(path: Path, fields: dict, tensors: dict[str, torch.Tensor], kind: str) -> None:
    """kind: of the matrices. q8_0 needs rows that are multiples of 32; other matrices become float16."""
    places, ways, end = [], [], 0
    for name, x in tensors.items():
        fits = kind != "q8_0" or x.shape[-1] % 32 == 0
        ways.append("float32" if x.dim() == 1 else kind if fits else "float16")
        number, width, _ = WAYS[ways[-1]]
        place = struct.pack(f"<I{x.dim()}QIQ", x.dim(), *x.shape[::-1], number, end)
        places.append(packed(name)[4:] + place)
        end += -(-int(x.numel() * width) // 32) * 32  # all begin at multiples of 32
    pairs = [packed(name)[4:] + packed(value) for name, value in fields.items()]
    head = b"".join([struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields)), *pairs, *places])
    with open(path, "wb") as file:
        file.write(head + bytes(-len(head) % 32))
        for way, x in zip(ways, tensors.values()):
            n_bytes = sum(write(file, WAYS[way][2](part)) for part in x.split(4096))  # rows: a copy is small
            file.write(bytes(-n_bytes % 32))
