"""Every command that is shown has flags that exist. run.sh skips what is done and goes on after a failure."""
import importlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.program import parse

ROOT = Path(__file__).parent.parent
# train_sft.py ..., python -m village.world ..., torchrun ... train_sft.py ...
COMMAND = re.compile(r"(?:\$ )?((?:\S*python3? |\S*torchrun .*?)?(?<!\S)(-m [a-z]+\.\w+|\w+\.py)( .*)?)")
FILES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"),
         *(path for room in ("", "lib", "tools", "village", "bench") for path in (ROOT / room).glob("*.py"))]


def split(command: str) -> tuple[str, list[str]]:
    """(module, flags) of a command: ("village.world", ["--seed", "1"])."""
    words = [word for word in shlex.split(command, comments=True) if word != "--help"]
    at = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    return (words[at + 1], words[at + 2:]) if words[at] == "-m" else (words[at][:-3], words[at + 1:])


def check(command: str) -> None:
    """Read the flags as the program would; nothing runs."""
    name, flags = split(command)
    module = importlib.import_module(name)
    if name.startswith("bench.") and not hasattr(module, "Config"):
        module = importlib.import_module("bench.measure")
    if name.startswith("tools."):  # some take words before their flags: files, or what to do
        words = [*itertools.takewhile(lambda word: not word.startswith("-"), flags)]
        config = getattr(module, f"{''.join(words[:1]).title()}Config", None)  # PlanConfig of "plan"
        parse(config or module.Config, flags[len(words):])
    elif hasattr(module, "Config"):
        parse(module.Config, flags)
    else:
        assert not any(flag.startswith("-") for flag in flags), f"{name} has no flags"


def shown_in(path: Path) -> list[str]:
    """Commands of a markdown file (code blocks and backticks) or of a script's docstring."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        lines = text.split('"""')[1].splitlines() if '"""' in text else []
        lines = [line.strip() for line in lines if re.match(r"    (python|torchrun) ", line)]
        lines = [line.split("  ")[0] for line in lines]  # what a command does stands behind two spaces
    else:
        lines = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)).splitlines()
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        lines += [re.sub(r"\s+", " ", found) for found in re.findall(r"(?<!`)`([^`]+\s[^`]+)`(?!`)", prose)]
    return [match[1] for line in lines if (match := COMMAND.fullmatch(line))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shown_commands_have_flags_that_exist(path):
    """README, docs, and the docstrings of scripts. A sentence may name a flag without its value."""
    for command in shown_in(path):
        try:
            check(command)
        except Exception as error:
            assert "expected one argument" in str(error), f"{path.name} shows `{command}`: {error}"
            check(command + " 1")


def test_commands_are_found_and_wrong_flags_noticed():
    assert len(shown_in(ROOT / "README.md")) >= 5 and len(shown_in(ROOT / "village" / "scorecard.py")) == 4
    for command in ("torchrun --nproc_per_node 2 train_sft.py --step 3", "python -m village.world --step 3"):
        assert COMMAND.fullmatch(command)
        with pytest.raises(Exception, match="unknown argument --step"):
            check(command)


# ---- run.sh ------------------------------------------------------------------------------------------------

def run_sh(*arguments, root=ROOT, timeout=60, **environment):
    return subprocess.run(["bash", str(root / "run.sh"), *arguments], capture_output=True, text=True,
                          timeout=timeout, stdin=subprocess.DEVNULL,
                          env={"PATH": os.environ["PATH"], **environment})


def life(*arguments, **environment) -> dict[str, str]:
    """{stage: command} that run.sh shows, all of them with flags that exist."""
    result = run_sh(*arguments, "--show", **environment)
    assert result.returncode == 0, result.stderr
    commands = dict(re.findall(r"^([\w-]+)\n\$ (.*)$", result.stdout, re.M))
    for command in commands.values():
        check(command)
    return commands


VILLAGE = ["village", "pretrain", "write", "sft", "sft-answers", "sft-ranked", "heldout-answers",
           "heldout-ranked", "rm", "ppo", "ppo-rollouts", "dpo-1", "dpo-1-answers", "dpo-1-ranked", "dpo",
           "sft-card", "ppo-card", "dpo-card", "scorecard", "pictures", "report"]


@pytest.mark.parametrize("flags", [[], ["--quick"]])
@pytest.mark.parametrize("ranks", [{}, {"NPROC": "2", "ZERO": "3", "SEED": "2"}])
def test_the_life_in_the_village(flags, ranks):
    """All stages in order; with ranks, training and only training goes through torchrun; seeds reach every
    stage. DPO goes half the way from the SFT model's replies, then from what the model of that answers."""
    commands = life(*flags, **ranks)
    assert list(commands) == VILLAGE
    for name, command in commands.items():
        training = "train_" in command
        assert ("torchrun --standalone --nproc_per_node 2 " in command) == ("--zero 3" in command) == \
            (training and bool(ranks)), command
        assert ("--resume" in command) == training
        assert ("--seed 2" in command) == bool(ranks) or re.search("write|roll|scorecard|pic|report", name)
    out = re.search(r"--out (\S+)/pretrain ", commands["pretrain"])[1]
    assert f"--data {out}/sft-ranked.jsonl --init {out}/sft --epochs 0.5 " in commands["dpo-1"]
    assert f"--data {out}/dpo-1-ranked.jsonl --init {out}/dpo-1 " in commands["dpo"]
    assert f"--model {out}/dpo-1 " in commands["dpo-1-answers"]


def test_reward_hacking_in_one_command():
    """--hack adds a reward model without negatives and PPO against it, without the KL penalty and with one,
    all else equal; of two equal flags the last one counts."""
    commands = life("--hack")
    free = commands["ppo-free"]
    assert "--reward_model out/village/rm-plain " in free
    assert commands["rm-plain"].split("--negatives")[-1].startswith(" 0 ")
    leashed = free.replace("ppo-free", "ppo-leashed").replace("--beta 0 ", "--beta 0.3 ")
    assert commands["ppo-leashed"] == leashed
    assert "--rollouts out/village/ppo-free/samples.jsonl" in commands["ppo-free-rollouts"]


def test_the_life_on_files_of_ones_own(tmp_path):
    """As far as they reach, packed or not; a folder with a space and a dot in its name; PPO asks the prompts,
    or what the preferences ask. A stage gets the flags that are given for it, behind all others."""
    own = tmp_path / "my files.v2"
    own.mkdir()
    chats, ranked = ["sft", "sft-chats"], ["sft", "rm", "ppo", "dpo", "sft-chats", "ppo-chats", "dpo-chats"]
    for name, stages in {"text.txt": [], "chats.json.gz": chats, "preferences.jsonl": ranked}.items():
        (own / name).write_text("something")
        assert list(life("--data-from", str(own))) == ["pretrain", "write", *stages, "pictures"]
    for prompts in (own / "preferences.jsonl", own / "prompts.json"):
        prompts.write_text("something")
        _, flags = split(life("--data-from", str(own))["ppo"])
        assert flags[flags.index("--data") + 1] == str(prompts)
    commands = life("--data-from", str(own), "--sft", "--epochs 2 --strict", "--dpo", "--beta 1")
    assert [name for name in commands if "--epochs 2 --strict" in commands[name]] == ["sft"]
    assert commands["dpo"].endswith(" --beta 1") and "--beta" not in commands["ppo"]
    (own / "other.txt").write_text("another thing")
    texts = [life(text) for text in (str(own / "text.txt"), str(own / "other.txt"), "stdlib")]
    assert [list(commands) for commands in texts] == [["pretrain", "write", "pictures"]] * 3
    assert len({re.search(r"-(\d+)/pretrain", commands["pretrain"])[1] for commands in texts}) == 3
    assert run_sh("--quik").returncode == 2


FAKE = """#!/usr/bin/env bash
# stands for python: makes what a stage would make; the stage named in fail.txt fails
echo "$1" >> ran.txt
[ "$(cat fail.txt 2> /dev/null)" != "$1" ] || exit 3
while [ $# -gt 0 ]; do [ "$1" != --out ] || mkdir -p "$2/final"; shift; done
"""


def test_what_is_done_is_skipped_and_a_failure_ends_the_life(tmp_path):
    """run.sh with a python that does nothing: the second start runs what is left."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "run.sh", tmp_path)
    (tmp_path / "test.sh").write_text("")  # it would make the environment
    for name, text in (("requirements.txt", ""), (".venv/requirements.txt", ""), (".venv/bin/python", FAKE),
                       ("fail.txt", "train_sft.py"), ("text.txt", "a text"), ("chats.json", "[]")):
        (tmp_path / name).write_text(text)
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)

    def ran():
        result = run_sh("--data-from", str(tmp_path), root=tmp_path, OUT="out/x")
        scripts = (tmp_path / "ran.txt").read_text().split()
        (tmp_path / "ran.txt").unlink()
        return result, scripts

    result, scripts = ran()
    assert result.returncode == 2 and scripts == ["train_pretrain.py", "sample.py", "train_sft.py"]
    assert "the same command goes on" in result.stderr
    (tmp_path / "fail.txt").unlink()
    result, scripts = ran()
    assert not result.returncode and scripts == ["sample.py", "train_sft.py", "evaluate.py", "-m"], result
    assert "done before; to do it again, remove out/x/pretrain\n" in result.stdout


SHORT = {"run.sh": "--quick", "train_pretrain.py": "--steps 2 --n_layer 1", "train_sft.py": "--steps 2"}


@pytest.mark.slow
def test_every_command_of_the_front_page_runs(tmp_path):
    """In a copy of the project, made short. Both machines of the last command are this one."""
    root, text = tmp_path / "copy", (ROOT / "README.md").read_text()
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".*", "out", "data", "tests", "shared"))
    for folder in (root / "DIR", root / ".venv" / "bin"):
        folder.mkdir(parents=True)
    (root / "test.sh").write_text("")  # it would make the environment, and run us
    for name, module in (("python", ""), ("torchrun", "-m torch.distributed.run ")):
        (root / ".venv" / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module}"$@"\n')
        (root / ".venv" / "bin" / name).chmod(0o755)
    chats = (f'{{"prompt": "After {i}?", "response": "{i + 1}."}}\n' for i in range(200))
    words = (ROOT / "docs" / "log.md").read_text()
    for path, content in (("text.txt", words), ("chats.jsonl", "".join(chats))):
        (root / path).write_text(content)
        (root / "DIR" / path).write_text(content)
    lines = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)).splitlines()
    lines += re.findall(r"`((?:\w+=\w+ )*(?:bash|python) [^`]+)`", text)
    assert len(lines) >= 10 and {"bash run.sh --hack", "NPROC=2 ZERO=3 bash run.sh"} <= {*lines}
    for command in dict.fromkeys(re.sub(" +#.*", "", line) for line in lines):
        script = re.search(r"\w+\.(sh|py)\b", command)[0]
        more = "--pretrain '--steps 2' --sft '--steps 2'" if "DIR" in command else SHORT.get(script, "")
        env = {"PATH": f"{root}/.venv/bin:{os.environ['PATH']}"}
        env |= {"OUT": "out/two"} if "NPROC" in command else {}
        short = command.replace("out/village", "out/village-quick").replace("A:", "localhost:")
        with open(tmp_path / "said.txt", "w+") as said:
            machines = [subprocess.Popen(["bash", "-c", f"{short} {more}"], cwd=root, env=env, stdout=said,
                                         stderr=said, stdin=subprocess.DEVNULL)
                        for _ in range(2 if "--nnodes 2" in command else 1)]
            assert not any([machine.wait(900) for machine in machines]), (short, said.seek(0), said.read())
