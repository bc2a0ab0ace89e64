"""Weights of the world in, weights for the world out.

    python -m tools.convert --from Qwen3-0.6B --max_seq_len 1024 --out out/base   in: a folder of transformers
    python -m tools.convert --model out/sft --to chat                             out: one, also for vLLM
    python -m tools.convert --model out/sft --gguf chat.gguf --type q8_0          out: a file for llama.cpp

Llama, Mistral, Qwen2, Qwen3 and GPT-2 are this model under other names. What they keep apart we join: rows of
q, k and v, of gate and up. What we do not compute is refused by the name of its field."""
import json
import math
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from data import CHAT_TEMPLATE
from lib.checkpoint import claim, expect, load_final, save_final
from lib.program import UserError, parse, replacing, start
from model import GPT, GPTConfig, load_model
from tools import formats


@dataclass
class Config:
    from_: str = ""  # folder with config.json, tokenizer.json, and model.safetensors or its index
    out: str = "out/base"  # where --from goes, for --init and --model
    max_seq_len: int = 0  # longest row of --from; 0: as config.json says, often more than memory holds
    model: str = ""  # folder of a run of ours, or of a finished model
    to: str = ""  # new folder for --model, in the form of transformers
    gguf: str = ""  # file for --model, in the form of llama.cpp
    type: Literal["float32", "float16", "q8_0"] = "float32"  # of the matrices in --gguf; q8_0: 8 bits


LLAMA, GPT2, LLAMA_CPP = range(3)  # columns: Llama and its kin, GPT-2, llama.cpp
NAMES = {
    "blocks": ("model.layers", "transformer.h", "blk"),
    "embed": ("model.embed_tokens", "transformer.wte", "token_embd"),
    "position": ("", "transformer.wpe", ""),
    "attn_norm": ("input_layernorm", "ln_1", "attn_norm"),
    "attn.qkv": ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn.c_attn", "attn_q attn_k attn_v"),
    "attn.q_norm": ("self_attn.q_norm", "", "attn_q_norm"),
    "attn.k_norm": ("self_attn.k_norm", "", "attn_k_norm"),
    "attn.proj": ("self_attn.o_proj", "attn.c_proj", "attn_output"),
    "mlp_norm": ("post_attention_layernorm", "ln_2", "ffn_norm"),
    "mlp.up": ("mlp.gate_proj mlp.up_proj", "mlp.c_fc", "ffn_gate ffn_up"),
    "mlp.down": ("mlp.down_proj", "mlp.c_proj", "ffn_down"),
    "norm": ("model.norm", "transformer.ln_f", "output_norm"),
    "head": ("lm_head", "lm_head", "output")}
FIELDS = {
    "vocab_size": ("vocab_size", "vocab_size", "vocab_size"),
    "n_layer": ("num_hidden_layers", "n_layer", "block_count"),
    "n_head": ("num_attention_heads", "n_head", "attention.head_count"),
    "n_kv_head": ("num_key_value_heads", "", "attention.head_count_kv"),
    "n_embd": ("hidden_size", "n_embd", "embedding_length"),
    "head_width": ("head_dim", "", "attention.key_length"),
    "mlp_hidden": ("intermediate_size", "n_inner", "feed_forward_length"),
    "max_seq_len": ("max_position_embeddings", "n_positions", "context_length"),
    "rope_theta": ("rope_theta", "", "rope.freq_base"),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "attention.layer_norm_rms_epsilon"),
    "tie_embeddings": ("tie_word_embeddings", "tie_word_embeddings", "")}
ONLY = {  # fields without a name here: what they must say, or not be there
    "hidden_act": "silu", "activation_function": "gelu_new", "attention_bias": False, "mlp_bias": False,
    "partial_rotary_factor": 1, "quantization_config": None, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
SCALING = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
PLAIN = {"norm": "rms", "position": "rope", "mlp": "swiglu", "qk_norm": False, "bias": False,
        "qkv_bias": False}
FAMILIES = {  # model_type: our switches
    "llama": PLAIN, "mistral": PLAIN, "qwen2": PLAIN | {"qkv_bias": True}, "qwen3": PLAIN | {"qk_norm": True},
    "gpt2": PLAIN | {"norm": "layer", "position": "learned", "mlp": "gelu", "bias": True}}


# ---- tensors ---------------------------------------------------------------------------------------------

def renamed(weights: dict, shape: GPTConfig, column: int) -> dict[str, torch.Tensor]:
    """Our weights under their names, as views. A tied head is left out."""
    found, heads = {}, [shape.head_width * n for n in (shape.n_head, shape.n_kv_head, shape.n_kv_head)]
    for name, x in weights.items():
        (stem, kind), layer = name.rsplit(".", 1), ""
        if stem.startswith("blocks."):
            _, i, stem = stem.split(".", 2)
            layer = f"{NAMES['blocks'][column]}.{i}."
            x = x.T if column == GPT2 and x.dim() == 2 else x  # its Conv1D is (in, out), our Linear (out, in)
        names = NAMES[stem][column].split()
        parts = x.split(heads if len(names) == 3 else len(x) // len(names))
        if name != "head.weight" or not shape.tie_embeddings:
            found |= {f"{layer}{each}.{kind}": part for each, part in zip(names, parts)}
    return found


def joined(tensors: dict, shape: GPTConfig, column: int) -> dict[str, torch.Tensor]:
    """Their tensors under our names, but for a tied head. One missing, left over or misshapen is refused."""
    tables = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")  # in old files
    tensors = {name: x for name, x in tensors.items() if not tables.fullmatch(name)}
    if column == GPT2 and "wte.weight" in tensors:  # as its authors named them
        tensors = {f"transformer.{name}": x for name, x in tensors.items()}
    expect(tensors, "found no tensors")
    dtype = max((x.dtype for x in tensors.values()), key=lambda dtype: dtype.itemsize)
    with torch.device("meta"):
        plain = GPT(shape).state_dict()
    weights = {name: torch.empty(x.shape, dtype=dtype) for name, x in plain.items()
               if name != "head.weight" or not shape.tie_embeddings}
    for name, view in renamed(weights, shape, column).items():
        x = tensors.pop(name)[:len(view) if name == "transformer.wpe.weight" else None]
        expect(x.shape == view.shape and x.is_floating_point(),
               f"found {name} {x.dtype} {[*x.shape]}, expected floats {[*view.shape]}")
        view.copy_(x)
    embed = weights["embed.weight"]
    expect(not shape.tie_embeddings or torch.equal(tensors.pop("lm_head.weight", embed), embed),
           "found tie_word_embeddings true and another matrix as lm_head.weight, expected one of the two")
    expect(not tensors, f"found {next(iter(tensors), '')}, which a model of this model_type does not have")
    return weights


def widened(weights: dict, shape: GPTConfig, V: int) -> None:
    """Add a tied head, and rows for new tokens. No two rows are alike: with --tune lora they stay so."""
    draw, more, shape.vocab_size = torch.Generator().manual_seed(0), V - shape.vocab_size, V
    for name in [name for name in ("embed.weight", "head.weight") if more and name in weights]:
        x = weights[name].float()  # (V before, C)
        rows = x.mean(0) + x.std(0) * torch.randn(more, x.shape[1], generator=draw)  # (more, C)
        weights[name] = torch.cat((weights[name], rows.to(weights[name].dtype)))
    if shape.tie_embeddings:
        weights["head.weight"] = weights["embed.weight"]


# ---- config.json -----------------------------------------------------------------------------------------

def shape_of(their: dict, longest: int) -> GPTConfig:
    """config.json as our shape, with rows of at most `longest`. UserError names what we do not compute."""
    kind = their.get("model_type")
    expect(kind in FAMILIES, f"found model_type {kind}, expected {', '.join(FAMILIES)}")
    column = GPT2 if kind == "gpt2" else LLAMA
    rope = (their.get("rope_scaling") or {}) | (their.get("rope_parameters") or {})  # transformers 4 and 5
    absent = {"num_key_value_heads": 0, "head_dim": 0, "rms_norm_eps": 1e-6, "layer_norm_epsilon": 1e-5,
              "rope_theta": 1e4, "tie_word_embeddings": kind == "gpt2", "n_inner": 4 * their.get("n_embd", 0)}
    their = absent | {field: value for field, value in (their | rope).items() if value is not None}
    for field, good in ONLY.items():
        expect(their.get(field, good) == good, f"found {field} {their.get(field)}, expected {good}")
    found = {ours: their[names[column]] for ours, names in FIELDS.items() if names[column]}
    for ours, value in found.items():
        most = {"n_layer": 2**10, "vocab_size": 2**22}.get(ours, 2**40)  # these two cost memory early
        expect(type(value) in (int, float, bool) and 0 <= value < most,
               f"found {FIELDS[ours][column]} {value}, expected a number of 0 to {most}")
        found[ours] = type(getattr(GPTConfig, ours))(value)  # llama.cpp refuses the integer 1000000 as theta
    found["max_seq_len"] = min(longest or math.inf, found["max_seq_len"])
    window = their.get("sliding_window") if their.get("use_sliding_window", True) else None
    expect((window or math.inf) >= found["max_seq_len"], f"found sliding_window {window}, expected none; "
           f"with --max_seq_len {window} it changes nothing")
    scaling = their.get("rope_type", their.get("type", "default"))
    expect(scaling in ("default", "llama3"), f"found rope_type {scaling}, expected default or llama3")
    if scaling == "llama3":
        found["rope_scaling"] = ",".join(str(float(their[field])) for field in SCALING)
    return GPTConfig(**found, **FAMILIES[kind])


def config_of(shape: GPTConfig) -> dict:
    """Our shape as config.json. UserError if none of the families computes the same."""
    kind = next((kind for kind, its in FAMILIES.items() if its.items() <= asdict(shape).items()), "")
    expect(kind and (kind != "gpt2" or shape.n_kv_head * shape.head_width == shape.n_embd),
           f"found {', '.join(f'--{name} {getattr(shape, name)}' for name in PLAIN)}, which none of "
           f"{', '.join(FAMILIES)} computes")
    column, name = (GPT2, "GPT2LMHeadModel") if kind == "gpt2" else (LLAMA, f"{kind.title()}ForCausalLM")
    found = {names[column]: getattr(shape, ours) for ours, names in FIELDS.items() if names[column]}
    if shape.rope_scaling:
        numbers = map(float, shape.rope_scaling.split(","))
        found["rope_scaling"] = {"rope_type": "llama3", **dict(zip(SCALING, numbers))}
    return {"architectures": [name], "model_type": kind, **found}


def gguf_fields(shape: GPTConfig) -> dict:
    """The architectures of llama.cpp that turn their heads as we do. Our default switches are qwen3."""
    kind = config_of(shape)["model_type"]
    expect(kind in ("qwen2", "qwen3") and not shape.rope_scaling, "--gguf: expected --qk_norm or --qkv_bias, "
           "and no --rope_scaling; for others use --to, then llama.cpp's convert_hf_to_gguf.py")
    found = {names[LLAMA_CPP]: getattr(shape, ours) for ours, names in FIELDS.items() if names[LLAMA_CPP]}
    found["attention.value_length"] = shape.head_width
    return {"general.architecture": kind, **{f"{kind}.{name}": value for name, value in found.items()}}


# ---- the commands ----------------------------------------------------------------------------------------

def take_in(cfg: Config) -> None:
    """--from DIR --out DIR"""
    folder = Path(cfg.from_)
    try:
        their = formats.read_json((folder / "config.json").read_bytes(), "config.json")
        shape = shape_of(their, cfg.max_seq_len)
        found = formats.read_json((folder / "tokenizer.json").read_bytes(), "tokenizer.json")
        bos, end = their.get("bos_token_id"), their.get("eos_token_id")  # some end with one of several
        tokenizer = formats.read_tokenizer(found, shape.vocab_size, bos, end[0] if type(end) is list else end)
        weights = joined(formats.read_weights(folder), shape, GPT2 if shape.position == "learned" else LLAMA)
    except (UserError, OSError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        what = f"found no {error}, expected it" if isinstance(error, KeyError) else error
        raise UserError(f"{folder}: {what}") from None
    more = tokenizer.vocab_size - shape.vocab_size
    widened(weights, shape, tokenizer.vocab_size)
    learned = {"chat_template": CHAT_TEMPLATE} if their.get("llm_from_zero") == CHAT_TEMPLATE else {}
    lock = claim(cfg.out, resume=False)  # noqa: F841 - held until this function returns
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save(f"{temporary}/tokenizer.json")
        config = {"model": asdict(shape), "head": "lm", "rows": shape.vocab_size - more, **learned}
        save_final(cfg.out, weights, config, f"{temporary}/tokenizer.json")
    names = [tokenizer.decode([i]) for i in (tokenizer.bos_id, tokenizer.end_id)]
    print(f"{cfg.out}/final: {their['model_type']}, rows of {shape.max_seq_len}, {shape.vocab_size} tokens, "
          f"of which {more} are new; a text begins with {names[0]}, a reply ends with {names[1]}")


def give_out(cfg: Config) -> None:
    """--model DIR --to DIR --gguf FILE"""
    model, tokenizer, config = load_model(cfg.model, head="lm")
    shape, weights = model.config, load_final(cfg.model)[1]  # as they are stored; the model is float32
    del model
    chat = config.get("chat_template") == CHAT_TEMPLATE
    shape.vocab_size = V = config.get("rows", shape.vocab_size)  # rows: nothing was trained since --from
    weights |= {name: weights[name][:V] for name in ("embed.weight", "head.weight")}
    dtype = max((x.dtype for x in weights.values()), key=lambda dtype: dtype.itemsize)
    weights = {name: x.to(dtype) for name, x in weights.items()}  # --tune leaves several types
    if cfg.gguf:
        fields = gguf_fields(shape) | formats.gguf_words(tokenizer, V, chat)
        with replacing(Path(cfg.gguf)) as temporary:
            formats.write_gguf(temporary, fields, renamed(weights, shape, LLAMA_CPP), cfg.type)
    if cfg.to:
        expect(not Path(cfg.to).exists(), f"--to {cfg.to}: it exists, expected a new folder")
        ends, pad = formats.ends_of(tokenizer, V), tokenizer.pad_id  # bos ends a text, too
        numbers = {f"{name}_token_id": i for name, i in ends.items()}
        words = {f"{name}_token": tokenizer.decode([i]) for name, i in ends.items()}
        their = config_of(shape) | numbers | {"torch_dtype": str(dtype).removeprefix("torch.")}
        files = {
            "config.json": their | ({"llm_from_zero": CHAT_TEMPLATE} if chat else {}),
            "generation_config.json": numbers | {"eos_token_id": sorted({*ends.values()} - {pad})},
            "tokenizer.json": formats.tokenizer_json(tokenizer, V),
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **words,
                                      "clean_up_tokenization_spaces": False,
                                      **({"chat_template": formats.JINJA} if chat else {})}}
        with replacing(Path(cfg.to)) as temporary:
            temporary.mkdir()
            for name, content in files.items():
                (temporary / name).write_text(json.dumps(content, indent=1))
            tensors = renamed(weights, shape, GPT2 if shape.position == "learned" else LLAMA)
            formats.write_tensors(temporary / "model.safetensors", tensors)


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    expect(bool(cfg.from_) != bool(cfg.model) and bool(cfg.model) == bool(cfg.to or cfg.gguf),
           "expected either --from, or --model with --to or --gguf")
    take_in(cfg) if cfg.from_ else give_out(cfg)


if __name__ == "__main__":
    start(main)
