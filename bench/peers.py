"""How long replies take in transformers and llama.cpp, where they are installed, and in ours. On the CPU.

    pip install transformers gguf xllamacpp     (llama.cpp as a wheel; it is built without AVX-512)
    OMP_NUM_THREADS=1 python -m bench.peers

A Qwen3 of transformers and of llama.cpp is this model under other names. So all have the same weights, and
before the clock starts they must say the same greedy tokens. llama.cpp is asked through its server, a thread
a reply: its time includes some JSON.
"""
import importlib.metadata
import importlib.util
import itertools
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from bench.measure import compare, head, interleave, run
from lib.program import UserError, start
from model import GPT, GPTConfig, generate

OLD, V = 16, 512  # tokens of a prompt, and of the vocabulary
NAMES = {  # of a weight: ours, transformers', llama.cpp's. Ours joins q, k, v, and gate and up.
    "embed": ("model.embed_tokens", "token_embd"), "norm": ("model.norm", "output_norm"),
    "head": ("lm_head", "output"), "attn_norm": ("input_layernorm", "attn_norm"),
    "attn.q": ("self_attn.q_proj", "attn_q"), "attn.k": ("self_attn.k_proj", "attn_k"),
    "attn.v": ("self_attn.v_proj", "attn_v"), "attn.proj": ("self_attn.o_proj", "attn_output"),
    "attn.q_norm": ("self_attn.q_norm", "attn_q_norm"), "attn.k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"), "mlp.gate": ("mlp.gate_proj", "ffn_gate"),
    "mlp.up": ("mlp.up_proj", "ffn_up"), "mlp.down": ("mlp.down_proj", "ffn_down")}


def renamed(model: GPT, layer: str, peer: int) -> dict[str, torch.Tensor]:
    """The weights as Qwen3 names them. layer: what stands before a layer's number; peer: a column."""
    c, found = model.config, {}
    heads = [c.n_embd // c.n_head * n for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
    for name, x in model.state_dict().items():
        name, number = name.removesuffix(".weight"), ""
        if name.startswith("blocks."):
            _, number, name = name.split(".", 2)
        parts = {name: x}
        if name == "attn.qkv":
            parts = dict(zip(("attn.q", "attn.k", "attn.v"), x.split(heads)))
        elif name == "mlp.up":
            parts = dict(zip(("mlp.gate", "mlp.up"), x.chunk(2)))
        for part, x in parts.items():
            found[f"{layer}{number}." * bool(number) + f"{NAMES[part][peer]}.weight"] = x
    return found


def of_transformers(model: GPT):
    """A function (prompts, new, greedy) -> new ids per prompt."""
    transformers, c = importlib.import_module("transformers"), model.config
    config = transformers.Qwen3Config(
        vocab_size=V, hidden_size=c.n_embd, intermediate_size=c.mlp_hidden, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.n_embd // c.n_head,
        max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
        tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    peer = transformers.Qwen3ForCausalLM(config).eval()
    peer.load_state_dict(renamed(model, "model.layers.", 0))

    def reply(prompts, new: int, greedy: bool):
        ids = torch.tensor(prompts)
        how = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
        out = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **how)
        return out[:, OLD:].tolist()
    return reply


def of_llama_cpp(model: GPT):
    """The same of llama.cpp, float32 throughout."""
    gguf, xllamacpp, c = importlib.import_module("gguf"), importlib.import_module("xllamacpp"), model.config
    temporary = tempfile.NamedTemporaryFile(suffix=".gguf")  # removed at return: then it is mapped
    file = gguf.GGUFWriter(temporary.name, "qwen3")
    D = c.n_embd // c.n_head
    for name, value in {"context_length": c.max_seq_len, "embedding_length": c.n_embd, "key_length": D,
                        "value_length": D, "block_count": c.n_layer, "feed_forward_length": c.mlp_hidden,
                        "head_count": c.n_head, "head_count_kv": c.n_kv_head, "rope_freq_base": c.rope_theta,
                        "layer_norm_rms_eps": c.norm_eps, "tokenizer_model": "llama",
                        "token_list": [f"<{i}>" for i in range(V)], "token_scores": [0.0] * V,
                        "token_types": [1] * V}.items():
        getattr(file, f"add_{name}")(value)
    for name, x in renamed(model, "blk.", 1).items():
        file.add_tensor(name, x.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = temporary.name, 32, 32 * c.max_seq_len
    params.verbosity, params.port, params.cache_ram_mib = 0, 0, 0  # any free port; no copies of old prompts
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def reply(prompts, new: int, greedy: bool):
        how = {"n_predict": new, "ignore_eos": True, "cache_prompt": False, "samplers": ["temperature"],
               "temperature": 0.0 if greedy else 1.0}
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = pool.map(lambda ids: server.handle_completions({"prompt": ids, **how}), prompts)
            texts = [answer["choices"][0]["text"] for answer in answers]
        return [[int(i) for i in re.findall(r"<(\d+)>", text)] for text in texts]
    return reply


def peers(cfg):
    new, found = 48 if cfg.quick else 240, {"transformers": of_transformers, "xllamacpp": of_llama_cpp}
    found = {name: make for name, make in found.items() if importlib.util.find_spec(name)}
    if not found:
        raise UserError("found neither transformers nor xllamacpp, expected one of them; see --help")
    for layers, heads, width in (4, 4, 128), (6, 6, 384):
        model = GPT(GPTConfig(vocab_size=V, n_layer=layers, n_head=heads, n_embd=width, max_seq_len=256))
        model.head.weight.data.normal_(std=width**-0.5, generator=torch.Generator().manual_seed(0))
        ids = torch.randint(3, V, (32, OLD), generator=torch.Generator().manual_seed(0)).tolist()
        ours, replies = generate(model, ids[:2], max_new_tokens=48, temperature=0), {}  # then ties differ
        for name, make in found.items():
            reply = replies[name] = make(model)
            if reply(ids[:2], 48, True) != ours or {*map(len, reply(ids, new, False))} != {new}:
                raise UserError(f"{name}: says other greedy tokens, or fewer; nothing to compare")
            print(f"{name} {importlib.metadata.version(name)}: the same 2 x 48 greedy tokens as ours")
        head(f"CPU, {model.parameter_count() / 1e6:.2f} M parameters, {OLD} + {new} tokens, threads: "
             f"{torch.get_num_threads()}; time of a peer / ours: above 1 ours is faster")
        for B, (name, reply) in itertools.product((1, 32), replies.items()):
            seconds = interleave({"ours": partial(generate, model, ids[:B], max_new_tokens=new),
                                  name: partial(reply, ids[:B], new, False)}, cfg.repeats)
            compare(f"batch {B}, {B * new} tokens", seconds, name, "ours")


if __name__ == "__main__":
    start(lambda: run(__doc__, peers=peers))
