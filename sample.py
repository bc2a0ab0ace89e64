"""Let a trained model write: go on with a text, talk, or answer a file of prompts.

    python sample.py --model out/pretrain --prompt "The history of" --n 2
    python sample.py --model out/sft --chat                          /reset forgets, /quit leaves
    python sample.py --model out/sft --chat --prompt "Who are you?"  one reply
    python sample.py --model out/sft --prompts prompts.jsonl --k 4 --temperature 1 --out samples.jsonl

samples.jsonl has a line per prompt: {"prompt": messages, "responses": k texts, "ended": k booleans}
"""
import codecs
import json
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data import encode_prompt, encode_prompts, expect_chat
from evaluate import Progress, Reply, draw
from lib.program import UserError, parse, replacing, require_positive, start
from lib.ranks import setup
from lib.records import read_prompts
from lora import load_tuned


@dataclass
class Config:
    model: str = "out/pretrain"  # folder of a run, or of a finished model
    delta: str = ""  # folder of a run with --tune whose base --model is; empty: none
    prompt: str = ""  # text to go on with, or with --chat to answer; empty: a new text
    n: int = 1  # how many continuations
    chat: bool = False  # a conversation; with --prompt: one reply
    system: str = ""  # with --chat: what the assistant is told before the conversation
    prompts: str = ""  # file of prompts to answer: {"prompt"} records, or conversations without last reply
    k: int = 1  # replies per prompt of the file
    strict: bool = False  # stop if a prompt cannot be used, instead of leaving it out
    limit: int = 0  # answer only the first prompts of the file; 0: all
    out: str = "samples.jsonl"  # where the replies go
    batch_size: int = 64  # replies drawn at once
    max_new_tokens: int = 0  # longest continuation or reply; 0: up to the model's longest row
    temperature: float = 0.8  # 1: the model's own distribution; 0: always the likeliest token
    top_k: int = 0  # draw among the k likeliest; 0: all
    top_p: float = 1.0  # draw among the likeliest that together reach p; 1: all
    seed: int = 1  # the same seed draws the same text
    device: str = "auto"  # auto, cpu, cuda, cuda:N


TEXT, CHAT, FILE = 10, 11, 12  # what random numbers are for (rollouts.py has 2); seeds are (seed, use, index)


def longest_prompt(model, cfg: Config) -> int:
    """In tokens. It leaves room for --max_new_tokens or, without that flag, for a quarter of the row."""
    return model.config.max_seq_len - (cfg.max_new_tokens or model.config.max_seq_len // 4)


def write(model, tokenizer, prompt: list[int], seed: tuple, cfg: Config) -> Reply:
    """Print what the model writes behind the prompt, token by token. UserError if the row is too short."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # one character may need several tokens

    def show(row: int, token: int) -> None:
        if token != tokenizer.end_id:
            print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)

    return draw(model, tokenizer, [prompt], [seed], batch_size=1, max_new_tokens=cfg.max_new_tokens,
                on_token=show, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)[0]


def answer(model, tokenizer, messages: list[dict], turn: int, cfg: Config) -> list[dict]:
    """Print a reply to the user and the assistant's turns. The oldest go until there is room for it; what
    --system says stays. Returns the turns that the model has read, and the reply."""
    system = [{"role": "system", "content": cfg.system}] if cfg.system else []
    while len(messages) > 1 and len(encode_prompt(tokenizer, system + messages)) > longest_prompt(model, cfg):
        messages = messages[2:]
    reply = write(model, tokenizer, encode_prompt(tokenizer, system + messages), (cfg.seed, CHAT, turn), cfg)
    print("" if reply.ended else " ...")
    return [*messages, {"role": "assistant", "content": reply.text}]


def chat(model, tokenizer, cfg: Config) -> None:
    """Answer what is typed, until /quit or the end of the input. /reset forgets the turns before."""
    messages, turn = [], 0
    print("/reset forgets what was said, /quit leaves")
    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if said == "/quit":
            return
        if said == "/reset":
            messages = []
        elif said:
            try:
                question = {"role": "user", "content": said}
                messages = answer(model, tokenizer, [*messages, question], turn, cfg)
            except UserError as error:
                print(f"error: {error}")
            except KeyboardInterrupt:  # ends this reply, which the conversation then forgets
                print()
            turn += 1


def answer_file(model, tokenizer, cfg: Config) -> None:
    """k replies to each prompt of the file. A reply depends on the seed, its prompt and its number alone."""
    found, longest = read_prompts(cfg.prompts, cfg.strict), longest_prompt(model, cfg)
    print(found.report())
    records = found[: cfg.limit or None]
    asked = encode_prompts(tokenizer, records, longest)
    if not asked:
        raise UserError(f"{cfg.prompts}: found no prompt of {longest} tokens or fewer; others leave no room")
    many, before = [], Counter()
    for _, prompt in asked:  # if it comes again, its replies are the next ones
        many += [(prompt, before[str(prompt)] + number) for number in range(cfg.k)]
        before[str(prompt)] += cfg.k
    seeds = [(cfg.seed, FILE, zlib.crc32(str(prompt).encode()), number) for prompt, number in many]
    replies = draw(model, tokenizer, [prompt for prompt, _ in many], seeds, batch_size=cfg.batch_size,
                   max_new_tokens=cfg.max_new_tokens, progress=Progress("replies"),
                   temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)
    with replacing(Path(cfg.out)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for i, (record, _) in enumerate(asked):
            own = replies[i * cfg.k : (i + 1) * cfg.k]
            line = {"prompt": record.messages, "responses": [reply.text for reply in own],
                    "ended": [reply.ended for reply in own]} | ({"tag": record.tag} if record.tag else {})
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    ended = sum(reply.ended for reply in replies) / len(replies)
    print(f"{cfg.out}: {len(replies)} replies to {len(asked)} prompts, {len(records) - len(asked)} dropped "
          f"(longer than {longest} tokens); {ended:.1%} ended by themselves")


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    require_positive(cfg, "n", "k", "batch_size", "top_p")
    model, tokenizer, config = load_tuned(cfg.model, cfg.delta, head="lm")
    model.to(setup(cfg.device, catch_signals=False).device)
    if cfg.chat or cfg.prompts:
        expect_chat(cfg.delta or cfg.model, config)
    if cfg.prompts:
        answer_file(model, tokenizer, cfg)
    elif cfg.chat and cfg.prompt:
        answer(model, tokenizer, [{"role": "user", "content": cfg.prompt}], 0, cfg)
    elif cfg.chat:
        chat(model, tokenizer, cfg)
    else:
        for number in range(cfg.n):
            print("\n" + "-" * 40 + "\n" if number else "", end=cfg.prompt)
            prompt = [tokenizer.bos_id, *tokenizer.encode(cfg.prompt)]
            write(model, tokenizer, prompt, (cfg.seed, TEXT, number), cfg)
        print()


if __name__ == "__main__":
    start(main)
