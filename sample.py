"""Let a trained model write: go on with a text, talk, or answer a file of prompts.

    python sample.py --model out/pretrain --prompt "The history of" --n 2
    python sample.py --model out/sft --chat                          /reset forgets, /quit leaves
    python sample.py --model out/sft --chat --prompt "Who are you?"  one reply
    python sample.py --model out/sft --prompts prompts.jsonl --k 4 --temperature 1 --out samples.jsonl

samples.jsonl has one line per prompt: {"prompt": messages, "responses": [k texts], "ended": [k times true or false]}.
"""
from __future__ import annotations

import codecs
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from data import CHAT_TEMPLATE, encode_prompt
from lib.program import Progress, UserError, parse, replacing, require_positive, start
from lib.ranks import setup
from lib.records import read_prompts, read_text
from lib.tokenizer import Tokenizer
from model import generate_sorted, load_model


@dataclass
class Config:
    # what
    model: str = "out/pretrain"  # folder of a run, or of a finished model
    prompt: str = ""  # text to go on with, or with --chat to answer; empty: a new document; @FILE reads it from a file
    n: int = 1  # how many continuations
    chat: bool = False  # a conversation; with --prompt: one reply
    system: str = ""  # with --chat: what the assistant is told before the conversation
    prompts: str = ""  # file of prompts to answer: {"prompt"} records, or conversations without their last reply
    k: int = 1  # replies per prompt of the file
    limit: int = 0  # prompts of the file that are answered, its first ones; 0: all
    out: str = "samples.jsonl"  # where the replies go
    batch_size: int = 64  # replies drawn at once
    # how
    max_new_tokens: int = 0  # longest continuation or reply; 0: up to the model's longest row
    temperature: float = 0.8  # 1: the model's own distribution; 0: always the likeliest token
    top_k: int = 0  # draw among the k likeliest; 0: all
    top_p: float = 1.0  # draw among the likeliest that together reach p; 1: all
    repetition_penalty: float = 1.0  # above 1: tokens already seen become less likely
    seed: int = 1  # the same seed draws the same text
    device: str = "auto"  # auto, cpu, cuda, cuda:N


class Printer:
    """Prints tokens as they come; a character whose bytes have not all arrived waits for the rest."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, row: int, token: int) -> None:
        if token != self.tokenizer.end_id:
            print(self.decoder.decode(self.tokenizer.decode_bytes([token])), end="", flush=True)


def draw(model, tokenizer, prompts: list[list[int]], seeds: list[int], cfg: Config, length: int, on_token=None,
         progress=None):
    """At most `length` new ids for each prompt, as the flags say."""
    return generate_sorted(model, prompts, batch_size=cfg.batch_size, seeds=seeds, max_new_tokens=length,
                           temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, eos_id=tokenizer.end_id,
                           repetition_penalty=cfg.repetition_penalty, banned=tokenizer.specials_but_end,
                           on_token=on_token, progress=progress)


def room(model, prompt_length: int, cfg: Config) -> int:
    """How many new tokens fit behind the prompt; UserError if none, or fewer than asked for."""
    left = model.config.max_seq_len - prompt_length
    if left < max(1, cfg.max_new_tokens):
        raise UserError(f"a prompt of {prompt_length} tokens and --max_new_tokens {max(1, cfg.max_new_tokens)}: the "
                        f"model's rows end at {model.config.max_seq_len}; shorten one of them")
    return cfg.max_new_tokens or left


def longest_prompt(model, cfg: Config) -> int:
    """Tokens of a prompt behind which a quarter of the row stays free for the reply, or what is asked for."""
    return model.config.max_seq_len - (cfg.max_new_tokens or model.config.max_seq_len // 4)


def complete(model, tokenizer, text: str, cfg: Config) -> None:
    """Print n continuations of the text."""
    prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
    for number in range(cfg.n):
        length = room(model, len(prompt), cfg)
        print(text, end="")
        draw(model, tokenizer, [prompt], [cfg.seed + number], cfg, length, Printer(tokenizer))
        print("\n" + "-" * 40 if number + 1 < cfg.n else "")


def recent(tokenizer, messages: list[dict], longest: int) -> list[dict]:
    """The conversation without its oldest exchanges, so that the prompt has at most `longest` tokens; the system
    message and the last user turn always stay."""
    messages = list(messages)
    first = int(messages[0]["role"] == "system")
    while len(messages) > first + 1 and len(encode_prompt(tokenizer, messages)) > longest:
        del messages[first : first + 2]
    return messages


def answer(model, tokenizer, messages: list[dict], seed: int, cfg: Config) -> list[dict]:
    """Print a reply to the conversation; returns what of it the model has read, and the reply."""
    messages = recent(tokenizer, messages, longest_prompt(model, cfg))
    prompt = encode_prompt(tokenizer, messages)
    new = draw(model, tokenizer, [prompt], [seed], cfg, room(model, len(prompt), cfg), Printer(tokenizer))[0]
    ended = new[-1] == tokenizer.end_id
    print("" if ended else " ...")
    return [*messages, {"role": "assistant", "content": tokenizer.decode(new[:-1] if ended else new)}]


def chat(model, tokenizer, start: list[dict], cfg: Config) -> None:
    """Answer whoever types, until /quit or the end of the input. start: what every conversation begins with."""
    messages, turn = start, 0
    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if said == "/quit":
            return
        if said == "/reset":
            messages = start
        if said in ("/reset", ""):
            continue
        try:
            messages = answer(model, tokenizer, [*messages, {"role": "user", "content": said}], cfg.seed + turn, cfg)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # enough of this reply: it is not remembered
            print()
        turn += 1


def answer_file(model, tokenizer, cfg: Config) -> None:
    """k replies to each prompt of the file. A reply depends on (seed, prompt, number) alone, not on the batch size."""
    records = read_prompts(cfg.prompts)[:cfg.limit or None]
    prompts = []
    for record in records:
        try:
            prompts.append(encode_prompt(tokenizer, record.messages))
        except UserError as error:
            raise UserError(f"{record.where}: {error}") from None
    kept = [i for i, prompt in enumerate(prompts) if len(prompt) <= longest_prompt(model, cfg)]
    if not kept:
        raise UserError(f"{cfg.prompts}: found no prompt of {longest_prompt(model, cfg)} tokens or fewer, which leaves "
                        "room for a reply; shorten them or --max_new_tokens")
    length = room(model, max(len(prompts[i]) for i in kept), cfg)
    tasks = [(i, number) for i in kept for number in range(cfg.k)]
    drawn = draw(model, tokenizer, [prompts[i] for i, _ in tasks],
                 [(cfg.seed << 64) + (i << 32) + number for i, number in tasks], cfg, length, None, Progress("replies"))
    ended = [new[-1] == tokenizer.end_id for new in drawn]
    texts = [tokenizer.decode(new[:-1] if end else new) for new, end in zip(drawn, ended)]
    with replacing(Path(cfg.out)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for n, record in enumerate(records[i] for i in kept):
            own = slice(n * cfg.k, (n + 1) * cfg.k)
            line = {"prompt": record.messages, "responses": texts[own], "ended": ended[own]}
            file.write(json.dumps(line | ({"tag": record.tag} if record.tag else {}), ensure_ascii=False) + "\n")
    print(f"{cfg.out}: {len(drawn)} replies to {len(kept)} prompts, {len(prompts) - len(kept)} dropped (longer than "
          f"{longest_prompt(model, cfg)} tokens); {sum(ended) / len(drawn):.1%} ended by themselves")


def main(argv=None) -> int:
    cfg = parse(Config, argv, __doc__)
    require_positive(cfg, "n", "k", "batch_size", "top_p", "repetition_penalty")
    env = setup(cfg.device, catch_signals=False)
    for stream in (sys.stdin, sys.stdout):  # a terminal that is not UTF-8 shows "?" instead of a traceback
        stream.reconfigure(errors="replace") if hasattr(stream, "reconfigure") else None
    model, tokenizer, config = load_model(cfg.model)
    model.to(env.device)
    if config["head"] != "lm":
        raise UserError(f"--model {cfg.model}: found a reward model, expected a language model")
    if (cfg.chat or cfg.prompts) and config.get("chat_template") != CHAT_TEMPLATE:
        raise UserError(f"--model {cfg.model}: found the chat template {config.get('chat_template')!r}, expected "
                        f"{CHAT_TEMPLATE!r}; train it to chat with train_sft.py")
    text = read_text(cfg.prompt[1:]) if cfg.prompt.startswith("@") else cfg.prompt
    start = [{"role": "system", "content": cfg.system}] if cfg.system else []
    if cfg.prompts:
        answer_file(model, tokenizer, cfg)
    elif cfg.chat and text:
        answer(model, tokenizer, [*start, {"role": "user", "content": text}], cfg.seed, cfg)
    elif cfg.chat:
        chat(model, tokenizer, start, cfg)
    else:
        complete(model, tokenizer, text, cfg)
    return 0


if __name__ == "__main__":
    start(main)
