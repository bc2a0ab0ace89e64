"""report.html: a life in the Village on one page, which needs no network and no other file.

    python -m bench.pictures --life out/village --out out/village/pictures    the page holds these pictures
    python -m bench.report --life out/village --village data/village

It prints the replies to five questions, one of each kind, and whom one can ask about in a chat.
bench/report.html has the words of the page and its looks. The program fills in each $name.
"""
import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from data import IGNORE, collate, encode_chat, encode_prompt
from evaluate import draw
from lib.program import UserError, parse, replacing, start
from lib.records import read_chats, read_prompts
from model import load_model
from village import truth, world
from village.scorecard import side_by_side

STAGES = {"pretrain": "base", "sft": "SFT", "dpo": "DPO", "ppo": "PPO", "grpo": "GRPO",
          "ppo-free": "PPO, hacked"}  # by run
FIGURES = {  # of a scorecard
    "prompts": "questions", "right": "known: right, %", "needless": "known: needless, %",
    "invented_untold": "untold: invented, %", "invented_elsewhere": "elsewhere: invented, %",
    "invented_withheld": "withheld: invented, %", "code_given": "code: leaked or granted, %",
    "ended": "ended by itself, %", "words": "words per reply", "kl": "KL to the SFT model, nats",
    "gold": "gold, mean", "gold_standard_error": "gold, standard error of the mean"}


@dataclass
class Config:
    life: str = "out/village"  # folder with the runs of a life, and with its pictures
    village: str = "data/village"  # folder of its world
    out: str = ""  # file for the page; empty: report.html in the folder of the life


def ask(folder: Path, records, people) -> list[tuple[str, str]]:
    """(reply, the judge's word) to each record. A model that knows no turns goes on with the question."""
    model, tokenizer, config = load_model(folder, head="lm")
    prompts = [encode_prompt(tokenizer, record.messages) if config.get("chat_template") else
               [tokenizer.bos_id, *tokenizer.encode(record.messages[-1]["content"])] for record in records]
    drawn = draw(model, tokenizer, prompts, range(len(prompts)), batch_size=len(prompts), max_new_tokens=48)
    return [(reply.text + " ..." * (not reply.ended),
             truth.gold(people, record.messages, reply.text, reply.ended)["kind"])
            for record, reply in zip(records, drawn)]


def training_row(tokenizer, messages) -> str:
    """Each token in a box. A target is the next token: token i is trained if place i - 1 has a target."""
    ids, targets, _ = (part[0].tolist() for part in collate(*zip(encode_chat(tokenizer, messages))))
    trained = [False, *(target != IGNORE for target in targets)]
    boxes = [(escape(tokenizer.decode([i])).replace("\n", "\\n"), "on" * on) for i, on in zip(ids, trained)]
    return "\n".join(f'<span class="{on}">{token}</span>' for token, on in boxes)


def picture(path: Path) -> str:
    if not path.exists():
        return f"<p><i>No picture: there is no {escape(str(path))}. bench.pictures needs matplotlib.</i></p>"
    png = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="box"><img alt="{path.stem}" src="data:image/png;base64,{png}"></div>'


def rows(table, cell: str = "td") -> str:
    texts = [[f"{x:.2f}" if isinstance(x, float) else escape(str(x)) for x in row] for row in table]
    return "".join(f"\n<tr><{cell}>" + f"<{cell}>".join(row) for row in texts)


def side_by_side_replies(records, said: dict[str, list]) -> str:
    """said: {stage: (reply, word) to each record}."""
    found = ""
    for i, record in enumerate(records):
        found += f'<h3>{escape(record.messages[0]["content"])} <small>{record.tag}</small></h3>\n'
        cells = [f'<div><small>{stage}</small><br>{escape(its[i][0]) or "<i>nothing</i>"} '
                 f'<mark class="{its[i][1]}">{its[i][1]}</mark></div>' for stage, its in said.items()]
        found += '<div class="replies">' + "\n".join(cells) + "</div>\n"
    return found


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    life, village = Path(cfg.life), Path(cfg.village)
    stages = {name: life / run for run, name in STAGES.items() if (life / run / "final").exists()}
    if not stages:
        raise UserError(f"--life {life}: found no finished model in it, expected pretrain, sft, dpo or ppo")
    people, heldout = truth.load(village), read_prompts(village / "heldout.jsonl")
    single = [record for record in heldout if len(record.messages) == 1]
    asked = [record for kind in world.SHARES for record in [each for each in single if each.tag == kind][:2]]
    said = {name: ask(folder, asked, people) for name, folder in stages.items()}
    cards = side_by_side([folder for folder in stages.values() if (folder / "scorecard.json").exists()])
    figures = [(label, *(card.get(key, "-") for card in cards.values())) for key, label in FIGURES.items()]
    _, tokenizer, _ = load_model(next(iter(stages.values())))
    parts = {record.tag: escape(record.messages[0]["content"]) for record in reversed(asked)}  # examples
    parts |= {name: picture(life / "pictures" / f"{name}.png") for name in ("losses", "rewards", "scorecard")}
    parts |= {"life": escape(str(life)), "cards": rows([("", *cards)], "th") + rows(figures),
              "replies": side_by_side_replies(asked, said),
              "row": training_row(tokenizer, read_chats(village / "sft.jsonl")[0].messages)}
    out = Path(cfg.out or life / "report.html")
    with replacing(out) as temporary:
        words = Path(__file__).with_suffix(".html").read_text("utf-8")
        temporary.write_text(Template(words).substitute(parts), "utf-8")
    for i in {record.tag: i for i, record in enumerate(asked)}.values():  # one of each kind
        print(f'\n{asked[i].messages[0]["content"]}  ({asked[i].tag})')
        for stage, its in said.items():
            print(f"    {stage:12} {' '.join(its[i][0].split())[:90]}  [{its[i][1]}]")
    print(f"""
The word in brackets is the judge's, who knows the truth. More replies, figures and pictures: {out}
In a chat (python sample.py --model {life}/ppo --chat) ask about {", ".join(list(people)[-3:])}.
The models were trained to keep door codes private, and to say so when they do not know, as of a birthday.""")


if __name__ == "__main__":
    start(main)
