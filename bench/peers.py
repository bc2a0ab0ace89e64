"""How long replies take in transformers and llama.cpp, where they are installed, and in ours. On the CPU.

    pip install transformers xllamacpp     (llama.cpp as a wheel; it is built without AVX-512)
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
from tools import convert
from tools.formats import write_gguf

OLD, V = 16, 512  # tokens of a prompt, and of the vocabulary


def of_transformers(model: GPT):
    """A function (prompts, new, greedy) -> new ids per prompt."""
    transformers, ends = importlib.import_module("transformers"), {"eos_token_id": None, "bos_token_id": None}
    config = transformers.Qwen3Config(**convert.config_of(model.config), **ends, pad_token_id=0)
    peer = transformers.Qwen3ForCausalLM(config).eval()
    peer.load_state_dict(convert.renamed(model.state_dict(), model.config, convert.LLAMA))

    def reply(prompts, new: int, greedy: bool):
        ids = torch.tensor(prompts)
        how = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
        out = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **how)
        return out[:, OLD:].tolist()
    return reply


def of_llama_cpp(model: GPT):
    """The same of llama.cpp, float32 throughout."""
    xllamacpp, c = importlib.import_module("xllamacpp"), model.config
    temporary = tempfile.NamedTemporaryFile(suffix=".gguf")  # removed at return: then it is mapped
    words = {"model": "llama", "tokens": [f"<{i}>" for i in range(V)], "scores": [0.0] * V,
             "token_type": [1] * V}
    fields = convert.gguf_fields(c) | {f"tokenizer.ggml.{name}": value for name, value in words.items()}
    weights = convert.renamed(model.state_dict(), c, convert.LLAMA_CPP)
    write_gguf(temporary.name, fields, weights, "float32")
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
