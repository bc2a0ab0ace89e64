"""Every command that is shown can be run: its flags exist. And run.sh skips what is done and says how to go on."""
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_chat import TOPICS, ranked, write
from test_plot import write_benchmarks

from bench import pictures as plot
from lib.program import parse

ROOT = Path(__file__).parent.parent
# a command in a code block, or between backticks in a sentence; scripts at its beginning, or after python or torchrun
COMMAND = re.compile(r"^(?:\$ |    )?((?:\S*python3? |\S*torchrun .*?)?(?<!\S)\w+\.py(?: .*)?)$")


def check(command: str) -> None:
    """Read the flags of `... script.py flags` as the script would; nothing runs."""
    words = [word for word in shlex.split(command, comments=True) if word != "--help"]
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, flags = words[at][:-3], words[at + 1:]
    assert (ROOT / words[at]).exists(), f"{words[at]}: no such file"
    module = importlib.import_module(script)
    if hasattr(module, "Config"):
        parse(module.Config, flags)
    elif hasattr(module, "parser"):
        module.parser().parse_args(flags)
    else:
        assert not any(flag.startswith("-") for flag in flags), f"{words[at]} has no flags"


def shown_in(path: Path) -> list[str]:
    """Commands of a markdown file (code blocks and backticks) or of a script's docstring."""
    text = path.read_text()
    if path.suffix == ".py":
        lines = re.split(r'"""', text)[1].splitlines()
        lines = [line.strip() for line in lines if re.match(r"    (python|torchrun) ", line)]
        lines = [re.split(r"  +", line)[0] for line in lines]  # what it is for stands behind two spaces or more
    else:
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
        lines = [line for block in blocks for line in block.splitlines()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        lines += [found.replace("\n", " ") for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
    found = [match[1] for line in lines if (match := COMMAND.match(line))]
    return [line for line in found if (ROOT / next(w for w in line.split() if w.endswith(".py"))).exists()]


FILES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shown_commands_have_flags_that_exist(path):
    """README, docs, and the docstring at the top of each script."""
    for command in shown_in(path):
        try:
            check(command)
        except Exception as error:
            if "expected one argument" in str(error):  # a sentence may name a flag without a value
                check(command + " 1")
            else:
                raise AssertionError(f"{path.name} shows `{command}`: {error}") from None


def test_commands_are_found():
    """The test above sees them: code blocks, sentences, docstrings."""
    assert len(shown_in(ROOT / "README.md")) >= 15 and len(shown_in(ROOT / "train_ppo.py")) == 3
    assert any("bench.py attention" in command for command in shown_in(ROOT / "docs" / "benchmarks.md"))
    with pytest.raises(Exception, match="did you mean --steps"):
        check("torchrun --nproc_per_node 2 train_sft.py --step 3")


# ---- run.sh ---------------------------------------------------------------------------------------------------------

def run_sh(*arguments, root=ROOT, timeout=60, **environment):
    return subprocess.run(["bash", str(root / "run.sh"), *arguments], capture_output=True, text=True, timeout=timeout,
                          env={"PATH": os.environ["PATH"], **environment}, stdin=subprocess.DEVNULL)


def pipeline(*arguments, **environment) -> list[str]:
    """The commands of run.sh, one per stage."""
    result = run_sh(*arguments, "--show", **environment)
    assert result.returncode == 0, result.stderr
    return [line[2:] for line in result.stdout.splitlines() if line.startswith("$ ")]


def scripts(commands: list[str]) -> list[str]:
    return [re.search(r"(\w+)\.py", command)[1] for command in commands]


LIFE = ["village", "train_pretrain", "sample", "train_sft", "sample", "village", "sample", "village", "train_rm",
        "train_ppo", "train_dpo", "sample", "village", "train_dpo", *["evaluate"] * 5, "plot", "sample"]


@pytest.mark.parametrize("quick", [[], ["--quick"]])
@pytest.mark.parametrize("ranks", [{}, {"NPROC": "2", "ZERO": "3"}])
def test_the_life_in_the_village(quick, ranks):
    """All stages in order, with flags that exist; with ranks, training and only training goes through torchrun."""
    commands = pipeline(*quick, **ranks)
    assert scripts(commands) == LIFE
    for command in commands:
        check(command)
        training = "train_" in command
        assert ("torchrun --standalone --nproc_per_node 2" in command) == ("--zero 3" in command) == \
            (training and bool(ranks)), command
        assert ("--resume" in command) == training


def test_dpo_goes_on_from_its_own_replies():
    """In the Village: half the way from the SFT model's replies, then from what the model of that answers; with files
    of one's own, where nobody is there to judge, from the SFT model in one go (below)."""
    first, second = (command for command in pipeline() if "train_dpo" in command)
    assert "--data out/village/preferences.jsonl --init out/village/sft " in first and "--epochs 0.5 " in first
    assert "--data out/village/dpo-1-preferences.jsonl --init out/village/dpo-1 " in second and "--epochs" not in second
    drawn, judged = (next(command for command in pipeline() if f"--out out/village/{name}" in command)
                     for name in ("dpo-1.jsonl", "dpo-1-preferences.jsonl"))
    assert "--model out/village/dpo-1 " in drawn and "--judge out/village/dpo-1.jsonl " in judged


def test_reward_hacking_in_one_command():
    """`bash run.sh --hack` adds a reward model without negatives, PPO against it without the KL penalty and with one,
    all else equal, and what became of it; seeds reach every stage."""
    commands = pipeline("--hack", SEED="2")
    free = next(command for command in commands if "train_ppo" in command and "--beta 0" in command)
    check(free)
    assert "--reward_model out/village-2/rm-plain " in free
    plain = next(command for command in commands if "--out out/village-2/rm-plain " in command)
    check(plain)
    assert plain.index("--negatives 1") < plain.index("--negatives 0")  # the last one counts
    assert free.replace("ppo-free", "ppo-leashed").replace("--beta 0 ", "--beta 0.3 ") in commands
    assert all(any(f"--rollouts out/village-2/{run}/samples.jsonl" in command for command in commands)
               for run in ("ppo-free", "ppo-leashed"))
    assert all(re.search(r"--seed 2\b", command) for command in commands if re.search(r"train_|village.py", command))


def test_the_life_on_files_of_ones_own(tmp_path):
    """As far as they reach; a folder with a space in its name; files as seen from where the reader stands."""
    own = tmp_path / "my files"
    own.mkdir()
    assert run_sh("--data-from", str(own), "--show").returncode == 2
    (tmp_path / "text.txt").write_text("something")
    (tmp_path / "preferences.json").write_text("something")
    assert "no chats" in run_sh("--data-from", str(tmp_path), "--show").stderr
    lives = {"text.txt": ["train_pretrain", "sample", "evaluate", "plot"],
             "chats.json": ["train_pretrain", "sample", "train_sft", "evaluate", "plot", "sample"],
             "preferences.jsonl": ["train_pretrain", "sample", "train_sft", "train_rm", "train_ppo", "train_dpo",
                                   "evaluate", "evaluate", "evaluate", "plot", "sample"]}
    seen = set()
    for name, expected in lives.items():
        (own / name).write_text("something")
        commands = pipeline("--data-from", str(own))
        assert scripts(commands) == expected
        for command in commands:
            check(command)
        seen.add(re.search(r"--out (\S+)", commands[0])[1])
    assert len(seen) == 3  # other files, another folder
    dpo = next(command for command in commands if "train_dpo" in command)
    assert re.search(r"--init out/\S+/sft ", dpo) and "preferences.jsonl" in dpo
    ppo = next(command for command in commands if "train_ppo" in command)
    assert shlex.split(ppo)[shlex.split(ppo).index("--data") + 1] == str(own / "preferences.jsonl")
    (own / "prompts.jsonl").write_text("something")
    assert any("train_ppo" in command and "prompts.jsonl" in command for command in pipeline("--data-from", str(own)))
    assert scripts(pipeline(str(own / "text.txt"))) == lives["text.txt"]
    assert run_sh("--quik").returncode == 2


FAKE = """#!/usr/bin/env bash
# stands for python: makes what a stage would make; the stage named in fail.txt fails
echo "$1" >> ran.txt
[ "$(cat fail.txt 2> /dev/null)" != "$1" ] || exit 3
while [ $# -gt 0 ]; do case $1 in
    --out) case $2 in *.json*) echo '{"bits_per_byte": 2.5}' > "$2" ;;
        *) mkdir -p "$2/final"; echo '{"eval_bits_per_byte": 1.5}' > "$2/metrics.jsonl" ;; esac ;;
    -c) exit 1 ;;  # no matplotlib
esac; shift; done
"""


def test_what_is_done_is_skipped_and_a_failure_says_how_to_go_on(tmp_path):
    """run.sh with a python that does nothing: times and figures are kept, the second start runs what is left."""
    (tmp_path / "run.sh").write_text((ROOT / "run.sh").read_text())
    (tmp_path / "requirements.txt").write_text("")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "requirements.txt").write_text("")
    (tmp_path / ".venv" / "bin" / "python").write_text(FAKE)
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    (tmp_path / "mine.txt").write_text("a text")

    def ran():
        lines = (tmp_path / "ran.txt").read_text().split()
        (tmp_path / "ran.txt").unlink()
        return [line for line in lines if line != "-c"]

    (tmp_path / "fail.txt").write_text("evaluate.py")
    first = run_sh(str(tmp_path / "mine.txt"), root=tmp_path, OUT="out/x")
    assert first.returncode == 1
    assert f"To go on where it was: OUT=out/x bash run.sh {shlex.quote(str(tmp_path / 'mine.txt'))}\n" in first.stderr
    assert ran() == ["train_pretrain.py", "sample.py", "evaluate.py"]
    (tmp_path / "fail.txt").unlink()
    second = run_sh(str(tmp_path / "mine.txt"), root=tmp_path, OUT="out/x")
    assert second.returncode == 0, second.stderr
    assert ran() == ["sample.py", "evaluate.py"] and "pretrain: done before" in second.stdout
    assert re.search(r"^text +\d+  bits_per_byte 2.500$", second.stdout, re.M) and "no pictures" in second.stdout

    table = tmp_path / "out" / "x" / "stages.tsv"  # of an older run.sh, which had other flags
    table.write_text(table.read_text().replace("train_pretrain.py", "train_pretrain.py --older"))
    third = run_sh(str(tmp_path / "mine.txt"), root=tmp_path, OUT="out/x")
    assert "but by another command: to redo it, remove out/x/pretrain\n" in third.stdout
    shutil.rmtree(tmp_path / "out" / "x" / "pretrain")
    fourth = run_sh(str(tmp_path / "mine.txt"), root=tmp_path, OUT="out/x")
    assert ran() == ["sample.py", "train_pretrain.py", "sample.py"]
    assert len(re.findall(r"^pretrain +\d+  eval_bits_per_byte 1.500$", fourth.stdout, re.M)) == 1  # not two


def copy_project(folder) -> None:
    """The scripts in a folder of their own, with this Python as its .venv."""
    for name in [*ROOT.glob("*.py"), ROOT / "run.sh", ROOT / "requirements.txt"]:
        shutil.copy(name, folder)
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", folder / ".venv")
    for name, module in (("python", ""), ("torchrun", "-m torch.distributed.run ")):
        (folder / ".venv" / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module}"$@"\n')
        (folder / ".venv" / "bin" / name).chmod(0o755)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["--hack", "two ranks", "--data-from"])
def test_a_short_life_lived_in_every_way(tmp_path, way):
    """run.sh --quick as the README shows it, really run, to the end of its table: what no other test executes."""
    copy_project(tmp_path)
    flags, ranks, stages = [way], {}, ["pretrain", "sft", "rm", "ppo", "dpo"]
    if way == "--data-from":
        own = tmp_path / "own"
        own.mkdir()
        (own / "text.txt").write_text(Path(os.__file__).read_text(encoding="utf-8")[:60_000])
        replies = ranked([f"{topic} {n}" for n in range(4) for topic in TOPICS])
        write(own / "preferences.jsonl", replies)
        write(own / "chats.jsonl", [{"instruction": r["prompt"], "output": r["responses"][0]} for r in replies[1:]])
        flags += [str(own)]
    elif way == "two ranks":
        flags, ranks = [], {"NPROC": "2", "ZERO": "3"}
    else:
        stages += ["rm-plain", "ppo-free", "ppo-leashed"]
    result = run_sh("--quick", *flags, root=tmp_path, timeout=900, OUT="out/short", **ranks)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    for stage in stages:
        assert (tmp_path / "out" / "short" / stage / "final" / "model.pt").exists()
        assert re.search(rf"^{stage} +\d+  \S", result.stdout, re.M), stage


# ---- the shown commands, run ----------------------------------------------------------------------------------------

TINY = {"train_pretrain": "--steps 2 --n_layer 1 --n_embd 32 --n_head 2 --batch_size 4 --eval_rows 8 --vocab_size 300",
        "train_sft": "--steps 2", "train_rm": "--steps 2 --reference_prompts 8", "train_dpo": "--steps 2",
        "train_ppo": "--steps 1 --batch_size 8 --minibatches 2 --max_new_tokens 8 --eval_prompts 4",
        "sample": "--limit 8 --max_new_tokens 8", "evaluate": "--max_new_tokens 8 --batch_size 128 --best_of_prompts 4",
        "tokenizer": "", "bench": "--quick", "data": "", "village": "", "checkpoint": "", "plot": ""}


def runnable(path: Path) -> list[str]:
    """What a page shows to be typed as it stands, `python ...` or `torchrun ...`. Not here: two machines and bench.py
    zero, which test_zero.py runs; a script without a flag in a sentence; pictures, without matplotlib."""
    return [command for command in shown_in(path) if re.match("python |torchrun ", command) and "..." not in command
            and not re.search(r"--nnodes|bench\.py zero" + ("" if plot.plt else r"|plot\.py"), command)
            and (path.suffix == ".py" or len(shlex.split(command, comments=True)) > 2)]


@pytest.fixture(scope="module")
def short_life(tmp_path_factory):
    """A folder with all that the shown commands read, made by run.sh --quick; the benchmarks' files, by hand."""
    folder = tmp_path_factory.mktemp("life")
    copy_project(folder)
    result = run_sh("--quick", root=folder, timeout=600, OUT="out/village")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    life, world = folder / "out" / "village", folder / "data" / "village"
    world.symlink_to(folder / "data" / "village-quick")
    for name in ("pretrain", "sft", "rm", "ppo", "dpo", "dpo-1"):
        (folder / "out" / name).symlink_to(life / name)
    for name, source in (("mine", "sft"), ("shakespeare", "pretrain"), ("sharded", "pretrain")):
        shutil.copytree(life / source, folder / "out" / name)
    newest = max((folder / "out" / "sharded").glob("step-*"))
    newest.rename(newest.with_name("step-00000400"))
    shutil.rmtree(folder / "out" / "sharded" / "final")
    for name in ("my.txt", "text.txt", "book.txt", "tinyshakespeare.txt"):
        (folder / name).write_text(Path(os.__file__).read_text(encoding="utf-8")[:60_000])
    for name, source in (("chats", world / "sft"), ("held_out", world / "sft"), ("prompts", world / "prompts"),
                         ("preferences", life / "preferences"), ("samples", life / "samples"),
                         ("dpo-1", life / "dpo-1"), ("dpo-1-preferences", life / "dpo-1-preferences"),
                         ("please", world / "heldout"), ("replies", life / "samples")):
        lines = source.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:200]), encoding="utf-8")
    shutil.copy(life / "pretrain" / "final" / "tokenizer.json", folder)
    write_benchmarks(folder / "bench_attention.json", folder / "bench_zero.json")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in FILES if runnable(path)], ids=lambda path: path.name)
def test_shown_commands_run(short_life, path):
    """Every command of README, docs and docstrings, with flags behind it that make it small: to its end, and without an
    error. What it makes goes to a place of its own, so that all commands find the same files."""
    for command in runnable(path):
        words = shlex.split(command, comments=True)
        script = next(word for word in words if word.endswith(".py"))[:-3]
        if "--help" not in words and not (script == "sample" and "--prompts" not in words):
            words += shlex.split(TINY[script])
        if script in ("train_pretrain", "data") and ("--data" not in words or "shakespeare" in words):
            words += ["--data", "my.txt"]
        if script == "tokenizer" and "--train" in words:
            words += ["--vocab_size", "300"]
        if script.startswith("train_") or "--out" in words:
            shutil.rmtree(short_life / "out" / "made", ignore_errors=True)
            (short_life / "out" / "made").mkdir()
            form = Path(words[words.index("--out") + 1]).suffix if "--out" in words else ""
            words += ["--out", f"out/made/it{form}"]
        result = subprocess.run([short_life / ".venv" / "bin" / words[0], *words[1:]], cwd=short_life, text=True,
                                capture_output=True, stdin=subprocess.DEVNULL, timeout=300)
        assert result.returncode == 0, f"{path.name} shows `{command}`: {result.stdout[-2000:]}{result.stderr[-2000:]}"
