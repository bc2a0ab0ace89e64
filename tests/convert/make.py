"""How the files beside this one were made: transformers 5.24.0, tokenizers 0.23.3, gguf 0.19.0, torch 2.13.0.

    python tests/convert/make.py     in an environment that has them, in the folder of the repository

Random models of four families, each with a small tokenizer of its kind, and what transformers computes with
them. The weights are large, the norms and biases random: a wrong detail changes the logits by more than 0.01.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":  # what the project itself does not need
    import gguf
    import transformers
    from safetensors.torch import save_file
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

sys.path.insert(0, ".")
from tools import formats  # noqa: E402

HERE = Path(__file__).parent
TEXTS = [
    "The tall theatre, isn't it? I'LL say: 12345 + 67.", "  two  spaces\n\n\tand a tab \r\n",
    "你好，世界。", "क़लम और ज़मीन", "e\u0301 \u212b ﬁ", "😀👩\u200d👧🇩🇪", "def f(x):\n    return x**2  # ok",
    "\u00a0x\u3000y\x0b\x85", "½ ⅷ ٣٤٥٦"]
MORE = ["the then that this is in it at on 1 22 333 4444 returns the theatre", "你好你好世界क़लम ज़मीन"]
MESSAGES = [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": " Hi {{ x }} "},
            {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "你好 12345"}]


def tokenizer(kind: str):
    """With two tokens of its own, the start of a text and its end."""
    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    made.pre_tokenizer, made.decoder = level, decoders.ByteLevel()
    if kind != "gpt2":
        pattern = Regex(formats.PATTERNS["llama-bpe" if kind == "llama" else "qwen2"])
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), level])
    if kind.startswith("qwen"):
        made.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS + 3 * MORE, trainers.BpeTrainer(
        vocab_size=286, initial_alphabet=alphabet, show_progress=False))
    ends = [AddedToken(name, special=True, normalized=False) for name in ("<|start|>", "<|stop|>")]
    made.add_special_tokens(ends)
    return made


def model(kind: str, V: int):
    """All that the families have: scaled rotation, grouped heads, tied ones, wide ones, biases."""
    shape = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
             "bos_token_id": 286, "eos_token_id": 287}
    config = {
        "llama": lambda: transformers.LlamaConfig(**shape, rms_norm_eps=1e-2, rope_theta=100.0, rope_scaling={
            "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 24}),
        "qwen2": lambda: transformers.Qwen2Config(**shape, tie_word_embeddings=True),
        "qwen3": lambda: transformers.Qwen3Config(
            **shape, tie_word_embeddings=True, head_dim=6, rope_theta=1e3),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=64,
                                                bos_token_id=286, eos_token_id=286)}[kind]()
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    random = torch.Generator().manual_seed(len(kind))
    for name, p in made.named_parameters():
        x = torch.randn(p.shape, generator=random)
        norm = p.dim() == 1 and name.endswith("weight")
        wide = p.dim() == 1 or "embed" in name or "wte" in name
        p.data.copy_(1 + 0.5 * x if norm else x * (0.5 if wide else 0.3))
    return made.to({"qwen3": torch.bfloat16, "llama": torch.float16}.get(kind, torch.float32))


def main():
    ids = torch.randint(0, 286, (1, 8), generator=torch.Generator().manual_seed(1))
    encoded = {}
    for kind in ("llama", "qwen2", "qwen3", "gpt2"):
        words, folder = tokenizer(kind), HERE / kind
        made = model(kind, 288 if kind != "qwen3" else 296)  # Qwen3's models have rows without a token
        made.save_pretrained(folder, **({"max_shard_size": "20kB"} if kind == "qwen2" else {}))
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "tokenizer.json").write_text(words.to_str())
        peer = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits = peer(ids).logits[:, -4:].contiguous()
        save_file({"ids": ids, "logits": logits}, folder / "expected.safetensors")
        encoded[kind] = [words.encode(text, add_special_tokens=False).ids for text in TEXTS]
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    x[0, 32:] = 0
    q8_0 = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0)
    template = transformers.utils.chat_template_utils._compile_jinja_template(formats.JINJA)
    ends = {"bos_token": "<|bos|>", "eos_token": "<|end|>"}
    chat = template.render(messages=MESSAGES, add_generation_prompt=True, **ends)
    (HERE / "expected.json").write_text(json.dumps({
        "texts": TEXTS, "ids": encoded, "messages": MESSAGES, "jinja": formats.JINJA, "chat": chat,
        "x": np.round(x.numpy().astype(float), 12).tolist(), "q8_0": q8_0.tobytes().hex()}, indent=0))


if __name__ == "__main__":
    main()
