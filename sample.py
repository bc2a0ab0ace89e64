"""Let a trained model write.

    python sample.py --model out/pretrain --prompt "The history of"
    python sample.py --model out/pretrain --n 5 --temperature 0.8 --top_k 50
"""
from __future__ import annotations

import codecs
import os
from dataclasses import dataclass

from checkpoint import final_folder, load_final
from common import UserError, parse, require_positive, run, setup
from model import GPT, GPTConfig, generate
from tokenizer import Tokenizer


@dataclass
class Config:
    # what
    model: str = "out/pretrain"  # folder of a run, or of a finished model
    prompt: str = ""  # text to continue; empty: a new document; @FILE reads it from a file
    n: int = 1  # how many continuations
    max_new_tokens: int = 0  # longest continuation; 0: up to the model's longest row
    # how
    temperature: float = 0.8  # 1: the model's own distribution; 0: always the likeliest token
    top_k: int = 0  # draw among the k likeliest; 0: all
    top_p: float = 1.0  # draw among the likeliest that together reach p; 1: all
    repetition_penalty: float = 1.0  # above 1: tokens already seen become less likely
    seed: int = 1  # continuation i is drawn with seed + i
    device: str = "auto"  # auto, cpu, cuda, cuda:N


class Printer:
    """Prints tokens as they come; a character whose bytes have not all arrived waits for the rest."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, row: int, token: int) -> None:
        if token != self.tokenizer.end_id:
            print(self.decoder.decode(self.tokenizer.decode_bytes([token])), end="", flush=True)


def main(argv=None) -> int:
    cfg = parse(Config, argv, __doc__)
    require_positive(cfg, "n", "top_p", "repetition_penalty")
    env = setup(cfg.device)
    folder = final_folder(cfg.model)
    config, weights = load_final(folder)
    tokenizer = Tokenizer.load(os.path.join(folder, "tokenizer.json"))
    model = GPT(GPTConfig.from_dict(config["model"], folder), head=config["head"])
    model.load_weights(weights, folder)
    model.to(env.device)
    text = cfg.prompt
    if text.startswith("@"):
        try:
            with open(text[1:], encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{text[1:]}: cannot be read as UTF-8 text ({error})") from None
    prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
    room = model.config.max_seq_len - len(prompt)
    if room < 1:
        raise UserError(f"the prompt has {len(prompt)} tokens, but the model's rows end at {model.config.max_seq_len}; "
                        "shorten it")
    if cfg.max_new_tokens > room:
        raise UserError(f"--max_new_tokens {cfg.max_new_tokens}: the model's rows end at {model.config.max_seq_len}, "
                        f"which leaves {room}")
    for number in range(cfg.n):
        print(text, end="")
        generate(model, [prompt], max_new_tokens=cfg.max_new_tokens or room, temperature=cfg.temperature,
                 top_k=cfg.top_k, top_p=cfg.top_p, repetition_penalty=cfg.repetition_penalty, eos_id=tokenizer.end_id,
                 banned=tokenizer.specials_but_end, seeds=[cfg.seed + number], on_token=Printer(tokenizer))
        print("\n" + "-" * 40 if number + 1 < cfg.n else "")
    env.close()
    return 0


if __name__ == "__main__":
    run(main)
