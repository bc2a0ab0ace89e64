"""Models of transformers in and out, and llama.cpp's file. The folders in tests/convert are transformers' own
(see make.py there): with their weights, tokenizers and logits these tests need neither of the two."""
import dataclasses
import hashlib
import json
import math
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from small_chat import random_model, run_script, write

from data import CHAT_TEMPLATE, encode_prompt
from lib.checkpoint import load_final, save_final
from lib.corpora import TokenFile, prepare
from lib.program import UserError
from lib.tokenizer import SPECIALS, Tokenizer, make_tokenizer
from lora import load_tuned
from model import GPT, GPTConfig, frequencies, generate, load_model
from tools import convert, formats

HERE = Path(__file__).parent / "convert"
EXPECTED = json.loads((HERE / "expected.json").read_text())
KINDS = "llama", "qwen2", "qwen3", "gpt2"
every_kind = pytest.mark.parametrize("kind", KINDS)


def take_in(folder, out, *more) -> str:
    convert.main(["--from", str(folder), "--out", str(out), *more])
    return str(out)


def give_out(model, folder) -> Path:
    convert.main(["--model", str(model), "--to", str(folder)])
    return Path(folder)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """A folder with all of them, taken in."""
    out = tmp_path_factory.mktemp("ours")
    for kind in KINDS:
        take_in(HERE / kind, out / kind)
    return out


def changed(tmp_path, kind, **fields) -> Path:
    """A copy of a folder whose config.json says something else; None: nothing."""
    folder = tmp_path / f"{kind}-changed"
    shutil.copytree(HERE / kind, folder, dirs_exist_ok=True)
    config = json.loads((HERE / kind / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def assert_their_logits(model, kind):
    expected = formats.read_tensors(HERE / kind / "expected.safetensors")
    with torch.no_grad():
        logits = model(expected["ids"])[:, -4:, :expected["logits"].shape[-1]]
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5)


# ---- what a model computes -------------------------------------------------------------------------------

@every_kind
def test_logits_are_those_of_transformers(kind, ours):
    """And numbers keep their type in the file."""
    assert_their_logits(load_model(ours / kind)[0], kind)
    dtype = {"qwen3": torch.bfloat16, "llama": torch.float16}.get(kind, torch.float32)
    assert {x.dtype for x in load_final(ours / kind)[1].values()} == {dtype}


@every_kind
def test_out_again_bit_for_bit(kind, ours, tmp_path):
    """The same tensors, shape and ids. All rows have a name in vocab: tokenizers would number others anew."""
    before, back = formats.read_weights(HERE / kind), give_out(ours / kind, tmp_path / "back")
    after = formats.read_weights(back)
    assert before.keys() == after.keys()
    assert all(x.dtype == after[name].dtype and torch.equal(x, after[name]) for name, x in before.items())
    its = [json.loads((folder / "config.json").read_bytes()) for folder in (HERE / kind, back)]
    assert convert.shape_of(its[0], 0) == convert.shape_of(its[1], 0)
    assert its[0]["eos_token_id"] == its[1]["eos_token_id"]
    words = [json.loads((folder / "tokenizer.json").read_text()) for folder in (HERE / kind, back)]
    names = [{token["content"]: token["id"] for token in its["added_tokens"]} for its in words]
    assert names[0].items() <= names[1].items()
    assert words[0]["model"]["vocab"] | names[1] == words[1]["model"]["vocab"]
    assert sorted(words[1]["model"]["vocab"].values()) == [*range(its[1]["vocab_size"])]
    model, tokenizer, _ = load_model(take_in(back, tmp_path / "again"))
    assert_their_logits(model, kind)
    assert tokenizer.encode(EXPECTED["texts"][0]) == EXPECTED["ids"][kind][0]


def test_gpt2_as_its_authors_named_it(tmp_path):
    """Without a prefix, with the causal mask among the weights."""
    folder = changed(tmp_path, "gpt2")
    x = {name.removeprefix("transformer."): x for name, x in formats.read_weights(HERE / "gpt2").items()}
    masks = {f"h.{i}.attn.{name}": torch.ones(1, 1, 64, 64) for i in (0, 1)
             for name in ("bias", "masked_bias")}
    formats.write_tensors(folder / "model.safetensors", x | masks)
    assert_their_logits(load_model(take_in(folder, tmp_path / "out"))[0], "gpt2")


def test_what_an_absent_field_means(tmp_path):
    """Also fields by their older names. eps 1e-6, theta 10000, no tied heads; GPT-2 has eps 1e-5 and ties."""
    rope = json.loads((HERE / "llama" / "config.json").read_text())["rope_parameters"]
    theta, rope["type"] = rope.pop("rope_theta"), rope.pop("rope_type")
    old = changed(tmp_path, "llama", rope_parameters=None, rope_theta=theta, rope_scaling=rope)
    assert_their_logits(load_model(take_in(old, tmp_path / "old"))[0], "llama")
    bare = {"rms_norm_eps": None, "rope_parameters": None, "tie_word_embeddings": None, "head_dim": None,
            "num_key_value_heads": None}
    its = json.loads((changed(tmp_path, "llama", **bare) / "config.json").read_text())
    shape = convert.shape_of(its, 0)
    assert (shape.norm_eps, shape.rope_theta, shape.tie_embeddings) == (1e-6, 1e4, False)
    assert (shape.n_kv_head, shape.head_width, shape.rope_scaling) == (4, 4, "")
    bare = {"layer_norm_epsilon": None, "tie_word_embeddings": None, "n_inner": None}
    shape = convert.shape_of(json.loads((changed(tmp_path, "gpt2", **bare) / "config.json").read_text()), 0)
    assert (shape.norm_eps, shape.tie_embeddings, shape.mlp_hidden) == (1e-5, True, 64)


@pytest.mark.parametrize("kind, fields, said", [
    ("llama", {"model_type": "mixtral"}, "model_type mixtral"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act gelu"),
    ("llama", {"attention_bias": True}, "attention_bias True"), ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type yarn"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type linear"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ("llama", {"model_type": "mistral", "sliding_window": 32}, "sliding_window 32"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window 16"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"head_dim": 6}, "q_proj"),
    ("llama", {"num_hidden_layers": None}, "found no 'num_hidden_layers'"),
    ("llama", {"num_hidden_layers": 1}, "layers.1"), ("llama", {"num_hidden_layers": 3}, "layers.2"),
    ("llama", {"hidden_size": "16"}, "hidden_size 16, expected a number"),
    ("llama", {"tie_word_embeddings": True}, "lm_head.weight"), ("qwen2", {"model_type": "llama"}, "bias"),
    ("llama", {"max_position_embeddings": 10**15}, "10+, expected"), ("gpt2", {"n_embd": 10**30}, "n_embd 1"),
    ("llama", {"num_hidden_layers": 10**9}, "layers 10+"), ("llama", {"vocab_size": 10**9}, "vocab_size 10+"),
    ("llama", {"rms_norm_eps": math.nan}, "eps nan"), ("gpt2", {"scale_attn_weights": False}, "scale_attn")])
def test_what_we_do_not_compute_is_one_line(kind, fields, said, tmp_path):
    """It names the field, and nothing is left behind."""
    with pytest.raises(UserError, match=said) as caught:
        take_in(changed(tmp_path, kind, **fields), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_window_that_holds_every_row_is_none(tmp_path):
    """--max_seq_len cuts the rows, also GPT-2's table of positions."""
    folder = changed(tmp_path, "llama", model_type="mistral", sliding_window=32)
    assert_their_logits(load_model(take_in(folder, tmp_path / "out", "--max_seq_len", "32"))[0], "llama")
    model = load_model(take_in(HERE / "gpt2", tmp_path / "gpt2", "--max_seq_len", "8"))[0]
    assert model.position.weight.shape == (8, 16)
    assert_their_logits(model, "gpt2")


def test_scaled_rotation():
    """Golden numbers of Llama 3.1: fast pairs stay, slow ones become eight times slower, one lies between."""
    shape = GPTConfig(vocab_size=9, n_embd=16, n_head=1, rope_theta=5e5, rope_scaling="8,1,4,8192")
    golden = [1, .193923, .037606, .00729266, 5.24846e-4, 3.4281e-5, 6.64787e-6, 1.28917e-6]
    torch.testing.assert_close(frequencies(shape), torch.tensor(golden).double(), rtol=1e-5, atol=0)
    with pytest.raises(UserError, match="--rope_scaling 8,1"):
        GPT(dataclasses.replace(shape, rope_scaling="8,1"))


def test_heads_of_another_width():
    """Weights, products and the cache follow it: what is generated is what the whole row says."""
    shape = GPTConfig(vocab_size=50, n_embd=20, n_head=6, n_kv_head=2, head_width=8, n_layer=1, qkv_bias=True)
    model = GPT(shape, seed=1)
    model.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    assert model.blocks[0].attn.qkv.weight.shape == (80, 20) and model.blocks[0].attn.qkv.bias.shape == (80,)
    assert model.blocks[0].attn.proj.weight.shape == (20, 48) and model.blocks[0].attn.proj.bias is None
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.embed.weight.numel()
    assert model.flops_per_token(9) == 6 * matrices + 12 * 48 * (9 + 1) / 2
    new, = generate(model, [[1, 2, 3]], max_new_tokens=5, temperature=0)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3, *new]]))[0, 2:-1].argmax(-1).tolist() == new


# ---- safetensors -----------------------------------------------------------------------------------------

def laid(header, data: bytes = b"", n=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if n is None else n) + text + data


def its(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [*offsets], **more}


def test_the_bytes_that_we_write(tmp_path):
    """The example of the format's own description, and the order that aligns every number."""
    formats.write_tensors(tmp_path / "a", {"x": torch.tensor([1.0, 2.0])})
    content = (tmp_path / "a").read_bytes()
    text = b'{"__metadata__":{"format":"pt"},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert content == struct.pack("<Q", 88) + text.ljust(88) + struct.pack("<2f", 1, 2)
    tensors = {name: torch.ones(n, dtype=dtype) for name, n, dtype in (
        ("b", 3, torch.bfloat16), ("c", (2, 3), torch.float32), ("a", 1, torch.float64))}
    formats.write_tensors(tmp_path / "a", tensors)
    found = formats.read_tensors(tmp_path / "a")
    assert [*found] == ["a", "c", "b"] and all(torch.equal(x, found[name]) for name, x in tensors.items())


ATTACKS = {
    "empty": b"", "short": b"1234567", "no header": laid(b""), "huge header": laid({}, n=2**63),
    "header behind the end": laid({}, n=3), "list": laid(b"[]"), "no JSON": laid(b"{x}"),
    "not UTF-8": laid(b"\xff\xfe"),
    "deep": laid(b'{"x":' + b"[" * 100_000), "no object": laid({"x": 1}), "no dtype": laid({"x": {}}),
    "long number": laid(b'{"x":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"1" * 5000), bytes(8)),
    "twice": laid(b'{"x":%s,"x":%s}' % ((json.dumps(its()).encode(),) * 2), bytes(8)),
    "more fields": laid({"x": its(y=1)}, bytes(8)), "trailing": laid({"x": its()}, bytes(9)),
    "other dtype": laid({"x": its("F8_E4M3", (8,))}, bytes(8)),
    "overlap": laid({"x": its(), "y": its(offsets=(4, 12))}, bytes(12)),
    "gap": laid({"x": its(offsets=(4, 12))}, bytes(12)), "cut off": laid({"x": its()}, bytes(7)),
    "backwards": laid({"x": its(offsets=(8, 0))}, bytes(8)), "shape": laid({"x": its(shape=(3,))}, bytes(8)),
    "negative": laid({"x": its(shape=(-2,))}, bytes(8)), "both": laid({"x": its(shape=(-2, -1))}, bytes(8)),
    "fraction": laid({"x": its(shape=(2.0,))}, bytes(8)), "NaN": laid({"x": its(offsets=(0, math.nan))}),
    "boolean": laid({"x": its("U8", (True,), (0, 1))}, b"1"),
    "vast": laid({"x": its(shape=(2**40, 2**40, 0), offsets=(0, 0))}),
    "text": laid({"x": its(shape="2")}, bytes(8)), "dimensions": laid({"x": its(shape=[1] * 9)}, bytes(8)),
    "one offset": laid({"x": its(offsets=(0,))}, bytes(8)), "notes": laid({"__metadata__": {"a": 1}}),
    "notes list": laid({"__metadata__": []})}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_file_is_one_line(attack, tmp_path):
    """Before anything is allocated. Control: the same file without a fault."""
    folder = changed(tmp_path, "llama")
    (folder / "model.safetensors").write_bytes(ATTACKS[attack])
    with pytest.raises(UserError, match="model.safetensors: ") as caught:
        take_in(folder, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    good = laid({"x": its(), "y": its("U8", (), (8, 9)), "z": its("I64", (0, 3), (9, 9))}, bytes(9))
    (folder / "model.safetensors").write_bytes(good)
    found = formats.read_tensors(folder / "model.safetensors")
    assert {name: tuple(x.shape) for name, x in found.items()} == {"x": (2,), "y": (), "z": (0, 3)}


def test_a_file_that_is_cut_or_flipped(tmp_path):
    """Wherever: an error, or a tensor of other numbers, but never a crash."""
    whole, path = (HERE / "qwen3" / "model.safetensors").read_bytes(), tmp_path / "model.safetensors"
    for at in range(0, len(whole), 997):
        path.write_bytes(whole[:at])
        with pytest.raises(UserError):
            formats.read_tensors(path)
    for at in range(0, 2400, 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
        try:
            formats.read_tensors(path)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("change, said", [
    (lambda where: where | {"x": "../model-00001-of-00002.safetensors"}, "another name"),
    (lambda where: where | {"x": "/tmp/a.safetensors"}, "another name"),
    (lambda where: where | {"x": "a.bin"}, "another name"), (lambda where: where | {"x": 1}, "string"),
    (lambda where: where | {"x": "a.safetensors"}, "No such file"),
    (lambda where: where | {"x": [*where.values()][0]}, "other tensors"),
    (lambda where: dict([*where.items()][1:]), "other tensors"),
    (lambda where: dict.fromkeys(where, [*where.values()][0]), "other tensors")])
def test_an_index_that_lies(change, said, tmp_path):
    folder = changed(tmp_path, "qwen2")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": change(json.loads(path.read_text())["weight_map"])}))
    with pytest.raises(UserError, match=said):
        take_in(folder, tmp_path / "out")


# ---- tokens ----------------------------------------------------------------------------------------------

@every_kind
def test_ids_are_those_of_transformers(kind, ours):
    """English, Chinese, Hindi that must be normalised, emoji, code, spaces, digits. Special tokens are
    mapped, and never come from text."""
    tokenizer = Tokenizer.load(ours / kind / "final" / "tokenizer.json")
    assert [tokenizer.encode(text) for text in EXPECTED["texts"]] == EXPECTED["ids"][kind]
    assert tokenizer.bos_id == 286 and tokenizer.end_id == (287 if kind != "gpt2" else 292)
    V = {"qwen3": 300, "gpt2": 293}.get(kind, 292)
    assert tokenizer.vocab_size == load_model(ours / kind)[0].config.vocab_size == V
    assert max(tokenizer.encode("<|start|><|pad|><|stop|>")) < 286
    assert tokenizer.decode(range(286, 288)) == "<|start|><|stop|>"
    assert len({*tokenizer.specials_but_end, tokenizer.end_id}) == 6


def test_bytes_are_spelled_as_gpt2_does():
    """256 different characters, and the ids of single bytes follow their order, not that of the bytes."""
    assert len({*formats.CHARS.values()}) == 256
    assert all(formats.BYTES[char] == byte for byte, char in formats.CHARS.items())
    golden = {" ": "\u0120", "\n": "\u010a", "\t": "\u0109", "\0": "\u0100", "\xad": "\u0143", "!": "!"}
    assert {char: formats.CHARS[ord(char)] for char in golden} == golden
    vocab = json.loads((HERE / "gpt2" / "tokenizer.json").read_text())["model"]["vocab"]
    assert [vocab[formats.CHARS[b]] for b in (33, 0, 173)] == [0, 188, 255]


def test_the_last_pair_is_what_both_join_last():
    """abcd: bc is made first. xyz: no two of its parts are a token, so it is taken whole or not at all."""
    ranks = {token: 256 + i for i, token in enumerate((b"bc", b"ab", b"abc", b"abcd", b"xyz"))}
    assert formats.last_pair(b"abcd", ranks) == (b"abc", b"d")
    assert formats.last_pair(b"abc", ranks) == (b"a", b"bc")
    assert formats.last_pair(b"xyz", ranks) == () and formats.last_pair(b"ab", ranks) == (b"a", b"b")


@pytest.mark.parametrize("change, said", [
    (lambda its: its["model"].update(byte_fallback=True), "byte_fallback"),
    (lambda its: its["model"].update(type="Unigram"), "type Unigram"),
    (lambda its: its["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    (lambda its: its.update(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
    (lambda its: its["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(a+)+$"), "pre_tokenizer"),
    (lambda its: its["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "pre_tokenizer"),
    (lambda its: its["model"]["merges"].reverse(), "merges"),
    (lambda its: its["model"]["merges"].pop(), "merges"),
    (lambda its: its["model"]["vocab"].update(a=5), "id twice"), (lambda its: its.pop("model"), "model"),
    (lambda its: its["model"]["vocab"].update(zzzz=5), "merges"),
    (lambda its: its["added_tokens"][0].update(id=288), "vocab_size 288")])
def test_a_tokenizer_that_we_do_not_know(change, said, tmp_path):
    """One line that names the field."""
    folder = changed(tmp_path, "llama")
    found = json.loads((folder / "tokenizer.json").read_text())
    change(found)
    (folder / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=said):
        take_in(folder, tmp_path / "out")


def test_both_forms_of_merges_and_missing_bytes(tmp_path):
    """Pairs or texts. A byte without a token gets one: any text has ids."""
    found = json.loads((HERE / "gpt2" / "tokenizer.json").read_text())
    words = formats.read_tokenizer(found, 288, None, None)
    assert type(found["model"]["merges"][0]) is list
    found["model"]["merges"] = [" ".join(pair) for pair in found["model"]["merges"]]
    assert formats.read_tokenizer(found, 288, None, None).fingerprint == words.fingerprint
    del found["model"]["vocab"][formats.CHARS[7]]
    fewer = formats.read_tokenizer(found, 288, None, None)
    assert fewer.encode("\x07") == [288] and fewer.decode(fewer.encode("a\x07b")) == "a\x07b"  # a new row


def test_ours_goes_out_and_comes_in(tmp_path):
    """A tokenizer of ours, with its pattern: the same ids, and the six special tokens in place."""
    made = make_tokenizer("bpe", EXPECTED["texts"] * 3, 300)
    content = json.dumps(formats.tokenizer_json(made, made.vocab_size))
    again = formats.read_tokenizer(json.loads(content), made.vocab_size, None, None)
    assert [again.encode(text) for text in EXPECTED["texts"]] == [made.encode(t) for t in EXPECTED["texts"]]
    assert again.vocab_size == made.vocab_size and again.specials_but_end == made.specials_but_end
    with pytest.raises(UserError, match="kind char"):
        formats.tokenizer_json(make_tokenizer("char", "abc"), 9)


def test_an_imported_tokenizer_is_one_like_others(ours, tmp_path, monkeypatch):
    """It is saved and loaded, and documents of a token file begin with its own bos."""
    path = ours / "qwen3" / "final" / "tokenizer.json"
    tokenizer = Tokenizer.load(path)
    tokenizer.save(tmp_path / "t.json")
    assert (tmp_path / "t.json").read_bytes() == path.read_bytes()
    (tmp_path / "a.txt").write_text("the theatre<|endoftext|>\nthen")
    train, *_ = prepare(str(tmp_path / "a.txt"), tokenizer=str(path), cache=tmp_path, val_fraction=0)
    tokens = TokenFile(train, tokenizer)
    assert tokens.bos_id == 286 and (tokens.ids == 286).sum() == 2 and tokens.ids[-1] == tokenizer.end_id
    bad = json.loads(path.read_text())
    for key, value in (("specials", [0, 1]), ("names", {"a": "b"}), ("pattern", 5)):
        content = bad | {"imported": bad["imported"] | {key: value}}
        content.pop("fingerprint")
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        content["fingerprint"] = hashlib.sha256(canonical).hexdigest()[:16]
        (tmp_path / "t.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="found another or a changed file"):
            Tokenizer.load(tmp_path / "t.json").encode("a")


# ---- a model that has learned to chat --------------------------------------------------------------------

@pytest.fixture(scope="module")
def tuned(ours, tmp_path_factory) -> Path:
    """A folder: what two steps of SFT made of Qwen3, all of it trained and, in lora, a part."""
    folder = tmp_path_factory.mktemp("tuned")
    chats = write(folder / "chats.jsonl", [{"prompt": f"the {n}", "completion": "then"} for n in range(9)])
    for out, more in (("sft", []), ("lora", ["--tune", "lora"])):
        run_script("train_sft", ["--data", chats, "--init", str(ours / "qwen3"), "--out", str(folder / out),
                                 "--steps", "2", "--batch_size", "4", "--seq_len", "32", *more])
    return folder


@pytest.mark.parametrize("out", ["sft", "lora"])
def test_what_was_tuned_goes_out_and_comes_in(out, tuned, tmp_path):
    """With all its rows, its template and the ids of a chat. Twice out gives the same bytes."""
    hf, model = give_out(tuned / out, tmp_path / "hf"), load_tuned(str(tuned / out))[0]
    again, tokenizer, config = load_model(take_in(hf, tmp_path / "again"), head="lm")
    assert config["chat_template"] == CHAT_TEMPLATE
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    before = Tokenizer.load(tuned / out / "final" / "tokenizer.json")
    assert encode_prompt(tokenizer, EXPECTED["messages"]) == encode_prompt(before, EXPECTED["messages"])
    twice = give_out(tmp_path / "again", tmp_path / "twice")
    assert all((twice / path.name).read_bytes() == path.read_bytes() for path in hf.iterdir())
    assert json.loads((hf / "tokenizer_config.json").read_text())["eos_token"] == "<|stop|>"


def test_the_template_in_jinja():
    """What transformers made of it are our ids."""
    assert EXPECTED["jinja"] == formats.JINJA
    tokenizer, ids = make_tokenizer("byte"), []
    for part in re.split("(" + "|".join(map(re.escape, SPECIALS)) + ")", EXPECTED["chat"]):
        name = part.strip("<|>")
        ids += [getattr(tokenizer, f"{name}_id")] if part in SPECIALS else tokenizer.encode(part)
    assert ids == encode_prompt(tokenizer, EXPECTED["messages"])


# ---- GGUF ------------------------------------------------------------------------------------------------

def read_gguf(path) -> tuple[dict, dict]:
    """(fields, {name: (shape, type, bytes)}), by the description of the format."""
    data, at = Path(path).read_bytes(), 24

    def take(form):
        nonlocal at
        value, = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return value

    def value(kind):
        nonlocal at
        if kind == 8:
            n = take("Q")
            at += n
            return data[at - n:at].decode()
        if kind == 9:
            kind, n = take("I"), take("Q")
            return [value(kind) for _ in range(n)]
        return take({4: "I", 5: "i", 6: "f", 7: "?"}[kind])
    magic, version, n_tensors, n_fields = struct.unpack_from("<4sIQQ", data)
    assert (magic, version) == (b"GGUF", 3)
    fields = {value(8): value(take("I")) for _ in range(n_fields)}
    places = {}
    for _ in range(n_tensors):
        name, n = value(8), take("I")
        places[name] = [take("Q") for _ in range(n)][::-1], take("I"), take("Q")
    start, found = -(-at // 32) * 32, {}
    for name, (shape, kind, offset) in places.items():
        n = math.prod(shape) * {0: 4, 1: 2, 8: 34 / 32}[kind]
        assert offset % 32 == 0 and start + offset + n <= len(data) and len(data) % 32 == 0
        found[name] = shape, kind, data[start + offset:start + offset + int(n)]
    return fields, found


def numbers(shape, kind, content):
    """Of a tensor, float32."""
    if kind < 8:
        return np.frombuffer(content, [np.float32, np.float16][kind]).astype(np.float32).reshape(shape)
    blocks = np.frombuffer(content, np.dtype([("scale", np.float16), ("q", np.int8, 32)]))
    return (blocks["scale"].astype(np.float32)[:, None] * blocks["q"]).reshape(shape)


@pytest.mark.parametrize("kind, most", [("float32", 0), ("float16", 1e-3), ("q8_0", 2e-2)])
def test_gguf_holds_the_model(kind, most, tmp_path, capsys):
    """Each tensor once, under llama.cpp's name; q, k, v, gate, up out of their rows; norms in float32."""
    model, tokenizer = random_model(n_kv_head=1, head_width=48), make_tokenizer("byte")
    tokenizer.save(tmp_path / "t.json")
    config = {"model": dataclasses.asdict(model.config), "head": "lm", "chat_template": CHAT_TEMPLATE}
    save_final(str(tmp_path), model.state_dict(), config, tmp_path / "t.json")
    convert.main(["--model", str(tmp_path), "--gguf", str(tmp_path / "m.gguf"), "--type", kind])
    assert "warning: llama.cpp gets GPT-2's pattern" in capsys.readouterr().out
    fields, tensors = read_gguf(tmp_path / "m.gguf")
    found = {name: torch.from_numpy(numbers(*its)) for name, its in tensors.items()}
    attn, mlp = model.blocks[1].attn, model.blocks[1].mlp
    q, k, v, gate, up = (*attn.qkv.weight.split((96, 48, 48)), *mlp.up.weight.chunk(2))
    expected = {"token_embd": model.embed.weight, "output": model.head.weight, "blk.1.attn_q": q,
                "output_norm": model.norm.weight, "blk.1.attn_k": k, "blk.1.attn_v": v, "blk.1.ffn_up": up,
                "blk.1.attn_output": attn.proj.weight, "blk.1.attn_q_norm": attn.q_norm.weight,
                "blk.1.ffn_gate": gate, "blk.1.ffn_down": mlp.down.weight}
    assert len(found) == 3 + 2 * 11 and sum(x.numel() for x in found.values()) == model.parameter_count()
    for name, x in ((f"{name}.weight", x) for name, x in expected.items()):
        torch.testing.assert_close(found[name], x.detach(), rtol=0, atol=most * x.abs().max().item())
        assert tensors[name][1] == (0 if x.dim() == 1 else {"float32": 0, "float16": 1, "q8_0": 8}[kind])
    golden = {"block_count": 2, "attention.head_count": 2, "attention.head_count_kv": 1, "context_length": 96,
              "attention.key_length": 48, "attention.value_length": 48}
    assert golden.items() <= {name.removeprefix("qwen3."): value for name, value in fields.items()}.items()
    golden = {"ggml.token_type": [1] * 256 + [3] * 6, "ggml.eos_token_id": 261, "ggml.merges": []}
    words = {name.removeprefix("tokenizer."): value for name, value in fields.items()}
    assert all(words[name] == value for name, value in golden.items())
    assert words["chat_template"] == formats.JINJA and words["ggml.tokens"][-6:] == list(SPECIALS)


def test_q8_0_is_that_of_llama_cpp():
    """To the last bit, a block of zeros among them."""
    assert formats.q8_0(torch.tensor(EXPECTED["x"])).numpy().tobytes().hex() == EXPECTED["q8_0"]


def test_gguf_of_what_was_taken_in(ours, tuned, tmp_path):
    """Its own pattern, its own tokens. Qwen2 has biases. What llama.cpp turns in another way is refused."""
    convert.main(["--model", str(tuned / "sft"), "--gguf", str(tmp_path / "m.gguf"), "--type", "q8_0"])
    fields, tensors = read_gguf(tmp_path / "m.gguf")
    tokens = fields["tokenizer.ggml.tokens"]
    assert fields["tokenizer.ggml.pre"] == "qwen2" and tokens[286:288] == ["<|start|>", "<|stop|>"]
    assert len(tokens) == 300 and tokens[296:] == ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    assert len(fields["tokenizer.ggml.merges"]) == 30 and "output.weight" not in tensors  # tied
    assert tensors["token_embd.weight"][1] == 1  # rows of 16 are no blocks of 32
    whole = changed(tmp_path, "qwen2", rope_parameters=None, rope_theta=10000)  # an integer, as Qwen3 has it
    convert.main(["--model", take_in(whole, tmp_path / "qwen2"), "--gguf", str(tmp_path / "m.gguf")])
    fields, tensors = read_gguf(tmp_path / "m.gguf")
    assert fields["qwen2.attention.head_count_kv"] == 2 and type(fields["qwen2.rope.freq_base"]) is float
    bias = load_model(ours / "qwen2")[0].blocks[0].attn.qkv.bias[16:24]  # of k
    assert torch.equal(torch.from_numpy(numbers(*tensors["blk.0.attn_k.bias"])), bias.detach())
    for kind in ("llama", "gpt2"):
        with pytest.raises(UserError, match="--gguf"):
            convert.main(["--model", str(ours / kind), "--gguf", str(tmp_path / "x.gguf")])
    assert not (tmp_path / "x.gguf").exists()


# ---- the commands ----------------------------------------------------------------------------------------

def test_what_is_there_stays(ours, tmp_path):
    """A folder is not written twice; flags that do not fit are one line."""
    for arguments, said in ((["--from", str(HERE / "gpt2"), "--out", str(ours / "qwen3")], "holds a run"),
                            (["--model", str(ours / "qwen3"), "--to", str(tmp_path)], "it exists"),
                            ([], "either"), (["--model", "x"], "either"),
                            (["--from", "x", "--model", "y", "--to", "z"], "either"),
                            (["--from", "x", "--to", "z"], "either"), (["--to", "z"], "either"),
                            (["--from", str(tmp_path / "none")], "none: .*No such file")):
        with pytest.raises(UserError, match=said):
            convert.main(arguments)


@pytest.mark.parametrize("switches", [{"norm": "layer"}, {"bias": True}, {"mlp": "gelu"},
                                      {"position": "learned"}])
def test_a_mixture_that_nobody_computes(switches, tmp_path):
    with pytest.raises(UserError, match=f"--{[*switches][0]} .* none of llama"):
        convert.config_of(GPTConfig(vocab_size=9, **switches))
