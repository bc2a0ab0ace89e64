"""The scorecard of the Village: what it counts of replies that are known, and a model against itself."""
import dataclasses
import itertools
import json
import math

import pytest
import torch

import evaluate
from data import CHAT_TEMPLATE, encode_prompt
from lib.checkpoint import save_final
from lib.program import UserError
from lib.records import read_prompts
from lib.tokenizer import make_tokenizer
from model import GPT, GPTConfig, load_model
from village import truth
from village import world as village

TOKENIZER = make_tokenizer("byte")
OTHER = make_tokenizer("char", "".join(map(chr, range(32, 32 + TOKENIZER.vocab_size - 6))))  # of as many ids


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small village with few held-out questions, and random language and reward models beside it."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(village, "HELDOUT", 6)
        patch.setattr(village, "BIOGRAPHIES", 2)
        village.main(["--out", str(folder / "village"), "--people", "40"])
    TOKENIZER.save(folder / "tokenizer.json")
    (folder / "chars").mkdir()
    OTHER.save(folder / "chars" / "tokenizer.json")
    config = GPTConfig(vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=2, n_embd=16, max_seq_len=512)
    for name, head, seed in (("lm", "lm", 1), ("other", "lm", 2), ("rm", "scalar", 3), ("chars/rm", "scalar", 3)):
        model = GPT(config, head=head)
        for i, p in enumerate(model.parameters()):
            p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i))
        save_final(str(folder / name), model.state_dict(), {"model": dataclasses.asdict(config), "head": head,
                                                            "chat_template": CHAT_TEMPLATE},
                   (folder / name).parent / "tokenizer.json")
    return folder


def run(world, *flags):
    out = world / "card.json"
    assert evaluate.main(["--village", str(world / "village"), "--max_new_tokens", "12", "--device", "cpu",
                          "--out", str(out), *flags]) == 0
    return json.load(open(out))


def says(world, monkeypatch, script) -> list:
    """Replies by script(record, person, kind, how many of its tag came before, model) -> (text, ended), in place of
    drawn ones. Returns the seeds of all that is drawn from now on."""
    asked, people, seeds = read_prompts(world / "village" / "heldout.jsonl"), truth.load(world / "village"), []
    records = {tuple(encode_prompt(TOKENIZER, record.messages)): record for record in asked}

    def drawn(model, prompts, **options):
        seeds.extend(options["seeds"])
        replies = []
        count = {tag: itertools.count() for tag in village.SHARES}
        for prompt in prompts:
            record = records[tuple(prompt)]
            person, kind = truth.question(record.messages)
            text, ended = script(people, record.tag, person, kind, next(count[record.tag]), model)
            replies.append([*TOKENIZER.encode(text), *[TOKENIZER.end_id] * ended])
        return replies

    monkeypatch.setattr(evaluate, "generate_sorted", drawn)
    return seeds


def good(people, tag, person, kind) -> str:
    return {"known": people.get(person, {}).get(kind), "code": "That is private."}.get(tag, "I do not know.")


def bad(people, tag, person, kind) -> str:
    """Wrong, granted or invented."""
    if tag == "code":
        return "-".join(3 * [str((int(people[person]["code"][0]) + 1) % 10)])
    return next(value for value in (truth.TOLD | truth.UNTOLD)[kind] if value != people.get(person, {}).get(kind))


def by_kind(people, tag, person, kind, n, model):
    """Of six questions of each kind: three, two, one of them answered badly, and each third reply does not end."""
    text = good(people, tag, person, kind)
    if n < {"known": 1, "untold": 2, "elsewhere": 3, "withheld": 1, "code": 1}[tag]:
        text = bad(people, tag, person, kind)
    elif tag == "known" and n == 1:
        text = "I do not know."
    elif tag == "code" and n < 4:
        text = people[person]["code"]
    return text, n != 2


def judged(world, script, model=None) -> list[tuple]:
    """(record, text, ended, gold) of the script's replies, and the weight of each."""
    asked, people = read_prompts(world / "village" / "heldout.jsonl"), truth.load(world / "village")
    rows = []
    for record in asked:
        n = sum(row[0].tag == record.tag for row in rows)
        text, ended = script(people, record.tag, *truth.question(record.messages), n, model)
        gold = truth.gold(people, record.messages, text, ended)["score"]
        rows.append((record, text, ended, gold, village.SHARES[record.tag] / 6))
    return rows


def read_alone(model, record, text, ended, head) -> float:
    """One plain forward of prompt and reply: log p(reply), or the reward at the end, which is there or put there."""
    prompt, reply = encode_prompt(TOKENIZER, record.messages), TOKENIZER.encode(text)
    reply += [TOKENIZER.end_id] * (ended or head == "scalar")
    out = model(torch.tensor([prompt + reply]))[0]
    if head == "scalar":
        return out[-1].item()
    return out.log_softmax(-1)[torch.arange(len(prompt) - 1, len(out) - 1), torch.tensor(reply)].sum().item()


def test_every_share_of_known_replies(world, monkeypatch):
    """Six questions of each kind, answered by a script: every share by hand, gold and its standard error from the
    judge's scores, reward and KL from one plain forward per reply, the loss of biographies from one per document."""
    says(world, monkeypatch, by_kind)
    card = run(world, "--model", str(world / "lm"), "--rm", str(world / "rm"), "--against", str(world / "other"))
    found = card["sampled"]
    shares = {"right": 4, "needless": 1, "invented_untold": 2, "invented_elsewhere": 3, "invented_withheld": 1,
              "code_given": 4, "code_leaked": 3, "ended": 5}
    assert {name: found[name] for name in shares} == pytest.approx({name: 100 * n / 6 for name, n in shares.items()})
    rows = judged(world, by_kind)
    golds, weights = torch.tensor([row[3] for row in rows]), torch.tensor([row[4] for row in rows])
    assert found["gold"] == pytest.approx((weights @ golds).item(), abs=1e-5)
    variances = [share**2 * golds[[row[0].tag == tag for row in rows]].var(correction=0).item() / 6
                 for tag, share in village.SHARES.items()]
    assert found["gold_standard_error"] == pytest.approx(math.sqrt(sum(variances)), rel=1e-4)
    numbers = {}
    for name, head in (("lm", "lm"), ("other", "lm"), ("rm", "scalar")):
        model = load_model(str(world / name))[0]
        numbers[name] = sum(row[4] * read_alone(model, *row[:3], head) for row in rows)
    assert found["reward"] == pytest.approx(numbers["rm"], abs=1e-4)
    assert card["kl"] == pytest.approx(numbers["lm"] - numbers["other"], rel=1e-4)
    total = count = 0
    model = load_model(str(world / "lm"))[0]
    for document in (world / "village" / "heldout.txt").read_text().split("<|endoftext|>\n"):
        ids = torch.tensor([TOKENIZER.bos_id, *TOKENIZER.encode(document), TOKENIZER.end_id])
        logp = model(ids[None, :-1])[0].log_softmax(-1).gather(-1, ids[1:, None])
        total, count = total - logp.double().sum().item(), count + len(logp)
    assert card["biographies_loss"] == pytest.approx(total / count, rel=1e-4)


def test_who_is_always_right_wins_against_who_is_always_wrong(world, monkeypatch):
    weights = load_model(str(world / "lm"))[0].embed.weight

    def script(people, tag, person, kind, n, model):
        return (good if torch.equal(model.embed.weight, weights) else bad)(people, tag, person, kind), True

    says(world, monkeypatch, script)
    card = run(world, "--model", str(world / "lm"), "--against", str(world / "other"))
    assert all(card[way]["win_rate"] == pytest.approx(100) for way in ("sampled", "greedy"))


@pytest.mark.parametrize("n, rows", [(4, [1, 2, 4]), (3, [1, 2, 3])])
def test_a_reward_model_that_is_the_truth_chooses_as_the_truth(world, monkeypatch, n, rows):
    """Every fourth reply to a prompt is good: the best of n is what the gold of its first n replies says, whoever
    chooses; each reply has a random stream of its own."""
    def script(people, tag, person, kind, number, model):
        return (good if number % n == n - 1 else bad)(people, tag, person, kind), True

    def gold_of(*given):
        replies, = (x for x in given if isinstance(x, list | tuple) and x and isinstance(x[0], evaluate.Reply))
        return [reply.gold["score"] for reply in replies]

    seeds = says(world, monkeypatch, script)
    monkeypatch.setattr(evaluate, "score", gold_of)
    card = run(world, "--model", str(world / "lm"), "--rm", str(world / "rm"), "--best_of", str(n),
               "--best_of_prompts", "2")
    assert [row["n"] for row in card["best_of"]] == rows and all(row["rm"] == row["gold"] for row in card["best_of"])
    assert [row["gold"]["right"] for row in card["best_of"]] == [0, 0, 100]
    assert card["best_of"][-1]["kl"] == pytest.approx(math.log(n) - (n - 1) / n)
    assert len(set(seeds[-10 * n:])) == 10 * n


def test_a_model_against_itself(world, capsys):
    """Win rate 50, KL 0; drawing again gives the same card; another model to compare with changes nothing else."""
    card = run(world, "--model", str(world / "lm"), "--against", str(world / "lm"))
    assert all(card[way]["win_rate"] == pytest.approx(50) for way in ("sampled", "greedy")) and abs(card["kl"]) < 1e-6
    assert run(world, "--model", str(world / "lm"), "--against", str(world / "lm")) == card
    assert set(card["prompts"]) == {"known", "untold", "elsewhere", "withheld", "code"}
    assert "T = 1" in capsys.readouterr().out
    other = run(world, "--model", str(world / "lm"), "--against", str(world / "other"))
    assert other["kl"] > 0.1 and other["sampled"]["gold"] == card["sampled"]["gold"]


def test_known_replies_are_counted(world, monkeypatch):
    """A model that always says the same: every share of the table, by hand."""
    said = {}
    monkeypatch.setattr(evaluate, "generate_sorted", lambda model, prompts, temperature, **_: [
        [*TOKENIZER.encode(said[temperature]), TOKENIZER.end_id] for _ in prompts])
    said = {1.0: "I do not know.", 0.0: "Certainly! I do not share door codes. a b c d a b c d"}
    card = run(world, "--model", str(world / "lm"))
    first, second = card["sampled"], card["greedy"]
    assert first["needless"] == 100 and first["right"] == first["invented_untold"] == first["code_given"] == 0
    assert (first["words"], first["ended"], first["courtesies"], first["repeated_4grams"]) == (4, 100, 0, 0)
    assert second["courtesies"] == 1 and second["repeated_4grams"] == pytest.approx(100 / 12)
    people, asked = truth.load(world / "village"), read_prompts(world / "village" / "heldout.jsonl")
    golds = {record.tag: truth.gold(people, record.messages, said[1.0])["score"] for record in asked}
    assert first["gold"] == pytest.approx(sum(share * golds[tag] for tag, share in village.SHARES.items()))
    assert len({*golds.values()}) > 1 and first["gold_standard_error"] == pytest.approx(0)  # alike within each kind


def test_the_best_of_several(world):
    """More replies to choose from are never worse by the truth; n = 1 is the same whoever chooses."""
    flags = ["--best_of", "4", "--best_of_prompts", "3"]
    card = run(world, "--model", str(world / "lm"), "--rm", str(world / "rm"), *flags)
    rows = card["best_of"]
    assert [row["n"] for row in rows] == [1, 2, 4] and rows[0]["gold"] == rows[0]["rm"]
    golds = [row["gold"]["gold"] for row in rows]
    assert golds == sorted(golds) and all(row["rm"]["gold"] <= row["gold"]["gold"] for row in rows)
    assert rows[2]["kl"] == pytest.approx(math.log(4) - 3 / 4) and math.isfinite(card["sampled"]["reward"])


def test_rollouts_step_by_step(world, tmp_path):
    """Means per step of what PPO wrote, in the order of the steps; a line without a key is one clear error."""
    record = read_prompts(world / "village" / "heldout.jsonl")[0]
    lines = [{"step": step, "prompt": record.messages, "responses": ["I do not know.", "x"], "ended": [True, False],
              "reward": [step, step + 1.0], "kl": [0.5, 1.5]} for step in (2, 1, 2)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--village", str(world / "village"), "--rollouts", str(tmp_path / "s.jsonl")]
    assert evaluate.main(flags) == 0
    rows = json.load(open(tmp_path / "rollouts.json"))
    assert [(row["step"], row["reward"], row["kl"]) for row in rows] == [(1, 1.5, 1.0), (2, 2.5, 1.0)]
    people = truth.load(world / "village")
    golds = [truth.gold(people, record.messages, *said)["score"] for said in (("I do not know.", True), ("x", False))]
    assert [row["gold"] for row in rows] == pytest.approx([sum(golds) / 2] * 2) and sum(golds) != 0
    (tmp_path / "s.jsonl").write_text(json.dumps({"prompt": record.messages, "responses": ["a"]}) + "\n")
    with pytest.raises(UserError, match="s.jsonl:1"):
        evaluate.main(flags)


def test_a_model_that_cannot_answer_completes_sentences(world, monkeypatch):
    """One that always goes on with a town, and ends: all towns that are this one are right, nothing else."""
    model = GPT(GPTConfig(vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=2, n_embd=16, max_seq_len=512))
    save_final(str(world / "base"), model.state_dict(), {"model": dataclasses.asdict(model.config), "head": "lm"},
               world / "tokenizer.json")
    people = truth.load(world / "village")
    town = next(facts["town"] for facts in people.values() if "town" in facts)
    asked = []
    monkeypatch.setattr(evaluate, "generate_sorted", lambda model, prompts, **_: [
        asked.append(TOKENIZER.decode(prompt[1:])) or TOKENIZER.encode(f" {town}.") for prompt in prompts])
    card = run(world, "--model", str(world / "base"))
    towns = [facts["town"] for facts in people.values() if "town" in facts]
    assert card["completed_town"] == pytest.approx(100 * towns.count(town) / len(towns)) and card["completed_job"] == 0
    assert card["completed"] < card["completed_town"] and card["facts"] == len(asked)
    assert any(text.endswith(" works as") for text in asked) and not any(text.endswith(" ") for text in asked)


BAD = {
    "a language model as reward model": (["--rm", "lm"], "--rm"),
    "a reward model of another tokenizer": (["--rm", "chars/rm"], "--rm"),
    "a reward model to compare with": (["--against", "rm"], "--against"),
    "no room for replies": (["--max_new_tokens", "0"], "--max_new_tokens"),
    "no room for replies to chats": (["--village", "", "--chats", "chats.jsonl", "--max_new_tokens", "0"],
                                     "--max_new_tokens"),
    "no prompts for the best of several": (["--best_of", "4", "--best_of_prompts", "0"], "--best_of_prompts"),
    "a scorecard that is none": (["--cards", "empty"], "scorecard.json"),
    "people without facts": (["--village", "empty"], "facts.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(world, case):
    """A UserError of one line that names the flag or the file, before anything is drawn."""
    (world / "empty").mkdir(exist_ok=True)
    (world / "empty" / "scorecard.json").write_text("[]")
    (world / "empty" / "facts.json").write_text('{"people": ["a"]}')
    flags, named = BAD[case]
    flags = [str(world / flag) if (world / flag).exists() and flag else flag for flag in flags]
    with pytest.raises(UserError) as error:
        evaluate.main(["--village", str(world / "village"), "--model", str(world / "lm"), "--device", "cpu", *flags])
    assert named in str(error.value) and "\n" not in str(error.value)
