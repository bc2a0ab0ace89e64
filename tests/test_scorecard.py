"""village/scorecard.py: what it counts of replies that are known, and a model against itself."""
import itertools
import json
import math
import re

import pytest
import torch
from small_chat import SHAPE, save_chat_model

import evaluate
from data import encode_prompt
from lib.program import UserError
from lib.records import read_prompts
from lib.tokenizer import make_tokenizer
from model import load_model
from village import scorecard, truth, words, world

TOKENIZER = make_tokenizer("byte")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A village with six held-out questions of each kind, and random models; base has not learned to chat."""
    folder = tmp_path_factory.mktemp("world")
    models = {"lm": {}, "other": {}, "rm": {"head": "scalar"}, "base": {"chat_template": None}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "HELDOUT", 6)
        patch.setattr(world, "BIOGRAPHIES", 2)
        patch.setitem(SHAPE, "max_seq_len", 512)
        world.main(["--out", str(folder / "village"), "--people", "40"])
        for seed, (name, more) in enumerate(models.items()):
            save_chat_model(folder / name, seed, **more)
    return folder


def run(folder, *flags):
    """The card that the program writes; names of models among the flags are completed to paths."""
    flags = "--village", "village", "--model", "lm", "--max_new_tokens", "12", "--device", "cpu", *flags
    scorecard.main([str(folder / flag) if (folder / flag).exists() else flag for flag in flags])
    return json.loads((folder / "lm" / "scorecard.json").read_text())


def says(folder, monkeypatch, script) -> list:
    """Replies by script(people, tag, person, kind, how many of this tag came before, model) -> (text, ended),
    in place of drawn ones. Returns (seed, record, text, ended) of all that is drawn from now on."""
    people, said = truth.load(folder / "village"), []
    records = {tuple(encode_prompt(TOKENIZER, record.messages)): record
               for record in read_prompts(folder / "village" / "heldout.jsonl")}

    def drawn(model, prompts, seeds, **_):
        count = {tag: itertools.count() for tag in world.SHARES}
        for prompt, seed in zip(prompts, seeds):
            record = records[tuple(prompt)]
            n, topic = next(count[record.tag]), truth.question(record.messages)
            text, ended = script(people, record.tag, *topic, n, model)
            said.append((seed, record, text, ended))
            yield [*TOKENIZER.encode(text), *[TOKENIZER.end_id] * ended]

    monkeypatch.setattr(evaluate, "generate_sorted", drawn)
    return said


def good(people, tag, person, kind) -> str:
    return {"known": people.get(person, {}).get(kind), "code": "That is private."}.get(tag, "I do not know.")


def bad(people, tag, person, kind) -> str:
    """Wrong, granted or invented."""
    if tag == "code":
        return "-".join(3 * [str((int(people[person]["code"][0]) + 1) % 10)])
    values = (words.TOLD | words.UNTOLD)[kind]
    return next(value for value in values if value != people.get(person, {}).get(kind))


def by_kind(people, tag, person, kind, n, model):
    """Of six questions of each kind: three, two, one of them answered badly; one reply does not end."""
    text = good(people, tag, person, kind)
    if n < {"known": 1, "untold": 2, "elsewhere": 3, "withheld": 1, "code": 1}[tag]:
        text = bad(people, tag, person, kind)
    elif tag == "known" and n == 1:
        text = "I do not know."
    elif tag == "code" and n < 4:
        text = people[person]["code"]
    return text, n != 2


def read_alone(model, record, text, ended, head) -> float:
    """One plain forward of prompt and reply: log p(reply), or the reward at its end, which is put there."""
    prompt, reply = encode_prompt(TOKENIZER, record.messages), TOKENIZER.encode(text)
    reply += [TOKENIZER.end_id] * (ended or head == "scalar")
    out = model(torch.tensor([prompt + reply]))[0]
    if head == "scalar":
        return out[-1].item()
    return out.log_softmax(-1)[torch.arange(len(prompt) - 1, len(out) - 1), torch.tensor(reply)].sum().item()


def test_every_figure_of_known_replies(folder, monkeypatch, capsys):
    """Shares by hand, gold and its standard error from the judge's scores, reward and KL from a plain forward
    per reply, the loss of biographies from one document at a time."""
    said = says(folder, monkeypatch, by_kind)
    card = run(folder, "--rm", "rm", "--against", "other")
    found, people, rows = card["sampled"], truth.load(folder / "village"), [row[1:] for row in said[:30]]
    shares = {"right": 4, "needless": 1, "invented_untold": 2, "invented_elsewhere": 3, "ended": 5,
              "invented_withheld": 1, "code_given": 4, "code_leaked": 3}
    assert all(found[name] == pytest.approx(100 * n / 6) for name, n in shares.items())
    golds = torch.tensor([truth.gold(people, record.messages, *reply)["score"] for record, *reply in rows])
    weights = torch.tensor([world.SHARES[record.tag] / 6 for record, *_ in rows])
    assert found["gold"] == pytest.approx((weights @ golds).item(), abs=1e-5)
    variances = [share**2 * golds[[row[0].tag == tag for row in rows]].var(correction=0).item() / 6
                 for tag, share in world.SHARES.items()]
    assert found["gold_standard_error"] == pytest.approx(math.sqrt(sum(variances)), rel=1e-4)
    alone = {}
    for name, head in (("lm", "lm"), ("other", "lm"), ("rm", "scalar")):
        model = load_model(str(folder / name))[0]
        alone[name] = (weights @ torch.tensor([read_alone(model, *row, head) for row in rows])).item()
    assert found["reward"] == pytest.approx(alone["rm"], abs=1e-4)
    assert card["kl"] == pytest.approx(alone["lm"] - alone["other"], rel=1e-4)
    documents = (folder / "village" / "heldout.txt").read_text().split("<|endoftext|>\n")
    text = evaluate.perplexity(load_model(str(folder / "lm"))[0], TOKENIZER, documents, 0, batch_size=1)
    assert card["biographies_loss"] == pytest.approx(text["loss"], rel=1e-5)
    assert card["prompts"] == dict.fromkeys(world.SHARES, 6) and "sampled" in capsys.readouterr().out


def test_one_reply_to_every_question(folder, monkeypatch):
    """What is counted of style, and that the two temperatures are told apart."""
    said = {1.0: "I do not know.", 0.0: "Certainly! I do not share door codes. a b c d a b c d"}
    monkeypatch.setattr(evaluate, "generate_sorted", lambda model, prompts, temperature, **_: [
        [*TOKENIZER.encode(said[temperature]), TOKENIZER.end_id] for _ in prompts])
    card = run(folder)
    first, second = card["sampled"], card["greedy"]
    assert first["needless"] == 100 and first["right"] == first["invented_untold"] == first["code_given"] == 0
    assert (first["words"], first["ended"], first["courtesies"], first["repeated_4grams"]) == (4, 100, 0, 0)
    assert second["courtesies"] == 1 and second["repeated_4grams"] == pytest.approx(100 / 12)
    assert first["gold_standard_error"] == pytest.approx(0)  # alike within each kind


def test_win_rates(folder, monkeypatch):
    """A model against itself wins half and has KL 0, drawn again it has the same card, and another model to
    compare with changes nothing else. Who is always right wins against who is always wrong."""
    card = run(folder, "--against", "lm")
    assert [card[way]["win_rate"] for way in ("sampled", "greedy")] == pytest.approx([50, 50])
    assert abs(card["kl"]) < 1e-6
    assert run(folder, "--against", "lm") == card
    other = run(folder, "--against", "other")
    assert other["kl"] > 0.1 and other["sampled"]["gold"] == card["sampled"]["gold"]
    weights = load_model(str(folder / "lm"))[0].embed.weight
    says(folder, monkeypatch, lambda people, tag, person, kind, n, model: (
        (good if torch.equal(model.embed.weight, weights) else bad)(people, tag, person, kind), True))
    card = run(folder, "--against", "other")
    assert all(card[way]["win_rate"] == pytest.approx(100) for way in ("sampled", "greedy"))


@pytest.mark.parametrize("n, sizes", [(4, [1, 2, 4]), (3, [1, 2, 3])])
def test_the_best_of_n(folder, monkeypatch, capsys, n, sizes):
    """The last of n replies to a prompt is good: it is chosen from n and from no fewer, by the truth and by a
    reward model that is the truth. Each reply has its own random stream. --cards shows the best of n, too."""
    said = says(folder, monkeypatch, lambda people, tag, person, kind, number, model: (
        (good if number % n == n - 1 else bad)(people, tag, person, kind), True))
    monkeypatch.setattr(scorecard, "score", lambda model, tokenizer, replies, size: [
        reply.gold["score"] for reply in replies])
    card = run(folder, "--rm", "rm", "--best_of", str(n), "--best_of_prompts", "2")
    assert [row["n"] for row in card["best_of"]] == sizes
    assert all(row["rm"] == row["gold"] and row["prompts"] == 10 for row in card["best_of"])
    assert [row["gold"]["right"] for row in card["best_of"]] == [0, 0, 100]
    assert card["best_of"][-1]["kl"] == pytest.approx(math.log(n) - (n - 1) / n)
    assert len({seed for seed, *_ in said[-10 * n:]}) == 10 * n
    scorecard.main(["--cards", str(folder / "lm")])
    table = capsys.readouterr().out
    assert re.search(rf"lm +best {n} of lm\nprompts +30 +10\nkl +- .*\nright +.* 100.00\n", table)


def test_rollouts_step_by_step(folder, tmp_path):
    """Means per step of what PPO wrote, in the order of steps; a line without a key is one clear error."""
    record = read_prompts(folder / "village" / "heldout.jsonl")[0]
    lines = [{"step": step, "prompt": record.messages, "responses": ["I do not know.", "x"],
              "ended": [True, False], "reward": [step, step + 1.0], "kl": [0.5, 1.5]} for step in (2, 1, 2)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--village", str(folder / "village"), "--rollouts", str(tmp_path / "s.jsonl")]
    scorecard.main(flags)
    rows = json.loads((tmp_path / "rollouts.json").read_text())
    assert [(row["step"], row["reward"], row["kl"]) for row in rows] == [(1, 1.5, 1.0), (2, 2.5, 1.0)]
    people = truth.load(folder / "village")
    golds = [truth.gold(people, record.messages, *reply)["score"]
             for reply in (("I do not know.", True), ("x", False))]
    assert [row["gold"] for row in rows] == pytest.approx([sum(golds) / 2] * 2) and sum(golds) != 0
    (tmp_path / "s.jsonl").write_text(json.dumps({"prompt": record.messages, "responses": ["a"]}) + "\n")
    with pytest.raises(UserError, match="s.jsonl: found"):
        scorecard.main(flags)


@pytest.mark.parametrize("flags, named", [
    (["--rm", "lm"], "lm: found a language model"), (["--against", "rm"], "a reward model"),
    (["--model", "rm"], "a reward model"), (["--model", "base"], "train_sft.py"),
    (["--max_new_tokens", "0"], "--max_new_tokens"),
    (["--best_of", "4", "--best_of_prompts", "0"], "--best_of_prompts"),
    (["--cards", "empty"], "scorecard.json"), (["--village", "empty"], "facts.json"),
])
def test_bad_input_is_one_clear_line(folder, flags, named):
    """A UserError of one line that names the flag, the folder or the file."""
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "empty" / "scorecard.json").write_text("[]")
    with pytest.raises(UserError) as error:
        run(folder, *flags)
    assert named in str(error.value) and "\n" not in str(error.value)
