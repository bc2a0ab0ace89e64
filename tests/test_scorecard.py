"""The scorecard of the Village: what it counts of replies that are known, and a model against itself."""
import dataclasses
import json
import math

import pytest
import torch

import evaluate
import village
from checkpoint import save_final
from common import UserError
from data import CHAT_TEMPLATE
from model import GPT, GPTConfig
from records import read_prompts
from tokenizer import make_tokenizer

TOKENIZER = make_tokenizer("byte")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small village with few held-out questions, and a random language model and reward model beside it."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(village, "HELDOUT", 6)
        patch.setattr(village, "BIOGRAPHIES", 2)
        village.main(["--out", str(folder / "village"), "--people", "40"])
    TOKENIZER.save(folder / "tokenizer.json")
    config = GPTConfig(vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=2, n_embd=16, max_seq_len=512)
    for name, head, seed in (("lm", "lm", 1), ("other", "lm", 2), ("rm", "scalar", 3)):
        model = GPT(config, head=head)
        for i, p in enumerate(model.parameters()):
            p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i))
        save_final(str(folder / name), model.state_dict(), {"model": dataclasses.asdict(config), "head": head,
                                                            "chat_template": CHAT_TEMPLATE}, folder / "tokenizer.json")
    return folder


def run(world, *flags):
    out = world / "card.json"
    assert evaluate.main(["--village", str(world / "village"), "--max_new_tokens", "12", "--device", "cpu",
                          "--out", str(out), *flags]) == 0
    return json.load(open(out))


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
    people, asked = village.load(world / "village"), read_prompts(world / "village" / "heldout.jsonl")
    golds = {record.tag: village.gold(people, record.messages, said[1.0])["score"] for record in asked}
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
    (tmp_path / "s.jsonl").write_text(json.dumps({"prompt": record.messages, "responses": ["a"]}) + "\n")
    with pytest.raises(UserError, match="s.jsonl:1"):
        evaluate.main(flags)


def test_a_model_that_cannot_answer_completes_sentences(world, monkeypatch):
    """One that always goes on with a town, and ends: all towns that are this one are right, nothing else."""
    model = GPT(GPTConfig(vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=2, n_embd=16, max_seq_len=512))
    save_final(str(world / "base"), model.state_dict(), {"model": dataclasses.asdict(model.config), "head": "lm"},
               world / "tokenizer.json")
    people = village.load(world / "village")
    town = next(facts["town"] for facts in people.values() if "town" in facts)
    asked = []
    monkeypatch.setattr(evaluate, "generate_sorted", lambda model, prompts, **_: [
        asked.append(TOKENIZER.decode(prompt[1:])) or TOKENIZER.encode(f" {town}.") for prompt in prompts])
    card = run(world, "--model", str(world / "base"))
    towns = [facts["town"] for facts in people.values() if "town" in facts]
    assert card["completed_town"] == pytest.approx(100 * towns.count(town) / len(towns)) and card["completed_job"] == 0
    assert card["completed"] < card["completed_town"] and card["facts"] == len(asked)
    assert any(text.endswith(" works as") for text in asked) and not any(text.endswith(" ") for text in asked)
