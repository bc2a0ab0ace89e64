"""How long files are, who imports whom, and how much a reader meets in a training script."""
import ast
import builtins
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from lib.run import RunConfig
from lora import DeltaConfig
from model import GPTConfig

ROOT = Path(__file__).parent.parent
ROOMS = [name for name in ("", "lib", "tools", "village", "bench", "tests") if (ROOT / name).is_dir()]
PYTHON = {room: sorted((ROOT / room).glob("*.py")) for room in ROOMS}  # room "": the top level
LINES = {path: path.read_text(encoding="utf-8").splitlines() for paths in PYTHON.values() for path in paths}
TREES = {path: ast.parse("\n".join(lines)) for path, lines in LINES.items()}
AT_MOST = {  # lines of a file, of some, of a room
    "model.py": 402, "kernels.py": 340, "data.py": 360, "zero.py": 430, "sample.py": 170, "evaluate.py": 299,
    "train_pretrain.py": 160, "train_sft.py": 160, "train_rm.py": 210, "train_dpo.py": 220,
    "train_ppo.py rollouts.py": 420, "lib": 1750, "village": 700, "bench": 735, "tests": 7060}
LATER = {"lora.py": 389, "bench/deltas.py": 129, "tests/test_lora.py": 444, "train_grpo.py": 245,
         "village/chains.py": 157, "tests/test_grpo.py": 430, "tools/convert.py": 254, "bench/near.py": 85,
         "tools/formats.py": 294, "tests/test_convert.py": 527, "tools/scaling.py": 300,
         "bench/scaling.py": 55, "tests/test_scaling.py": 300, "tools/prepare.py": 320, "tools/clean.py": 225,
         "bench/prepare.py": 120, "tools/repeats.py": 195, "tests/test_prepare.py": 506,
         "train_parallel.py": 420, "lib/grid.py": 152, "tools/parallel.py": 132,
         "tests/test_parallel.py": 560, "tests/test_choices.py": 266, "tools/retrieve.py": 130,
         "village/reader.py": 165, "tests/test_retrieve.py": 310, "village/plant.py": 189,
         "village/probes.py": 260, "tests/test_probes.py": 368,
         "train_objectives.py": 260, "bench/objectives.py": 158, "tests/test_objectives.py": 358,
         "tests/test_cuda.py": 160}
AT_MOST, LATER = AT_MOST | LATER, [ROOT / name for name in LATER]  # LATER: not in the sums
FLOOR = ["lib", "kernels", "model", "data", "zero", "lora", "rollouts"]  # each may import those before it
ABOVE = {"script": [], "evaluate": [], "sample": ["evaluate"], "village": ["evaluate", "village"],
         "bench": ["script", "evaluate", "village", "bench", "tools"],
         "tools": ["script", "tools"]}  # and the floor
SCRIPTS = {  # lines of main, flags, names from outside in the loop, share of lines that a sibling has, too
    "train_pretrain": (70, 36, 12, 1 / 3), "train_sft": (70, 36, 12, 1 / 2), "train_rm": (70, 36, 17, 1 / 3),
    "train_dpo": (70, 36, 17, 1 / 3), "train_ppo": (120, 46, 34, 1 / 3), "train_grpo": (70, 46, 34, 1 / 3)}


@pytest.mark.parametrize("what", AT_MOST)
def test_no_file_and_no_room_grows(what):
    """A limit that no machine holds is missed."""
    paths = {*PYTHON[what]} - {*LATER} if what in ROOMS else [ROOT / name for name in what.split()]
    assert sum(len(LINES[path]) for path in paths) <= AT_MOST[what]


def test_the_whole_is_small():
    assert sum(len(LINES[path]) for path in LINES.keys() - {*LATER, *PYTHON["tests"]}) <= 6235
    assert len(PYTHON[""]) <= 16


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_front_page_counts_the_lines(page):
    """Of each file at the top level, and of each room but tests/."""
    rows = re.findall(r"^\| \d+ \| \[([\w.]+)/?\]\((\1)\) \| (\d+) \|", (ROOT / page).read_text(), re.M)
    counted = {path.name: len(LINES[path]) for path in PYTHON[""]}
    counted |= {room: sum(len(LINES[path]) for path in PYTHON[room]) for room in ROOMS[1:-1]}
    assert {name: int(n) for name, _, n in rows} == counted


def test_lines_fit_on_a_screen():
    assert not [f"{path.relative_to(ROOT)}:{number}" for path in [*LINES, *ROOT.glob("*.sh")]
                for number, line in enumerate(path.read_text("utf-8").splitlines(), 1) if len(line) > 110]


def test_no_words_of_a_list_that_a_reader_does_not_have():
    """The numbers of our own tasks and aims, in code, tests and docs."""
    word = re.compile(r"(?<![-\w])[DPRS]\d{1,2}\b(?![-\w])|[(|] ?[Aa]sked for|Asked for:|[Tt]he issue\b")
    paths = [*LINES, *ROOT.glob("*.sh"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    assert not [f"{path.relative_to(ROOT)}:{n}: {found[0]}" for path in paths if path != Path(__file__)
                for n, line in enumerate(path.read_text().split("\n"), 1) if (found := word.search(line))]


@pytest.mark.parametrize("path", [*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md")], ids=lambda p: p.name)
def test_a_page_is_short(path):
    """Outside tables and code no line is wider than 160 columns, and no word stands twice in a row."""
    text = path.read_text(encoding="utf-8")
    free = {"log.md": 999, "exercises.md": 999, "troubleshooting.md": 999, "results.md": 150}
    assert text.count("\n") <= free.get(path.name, 60 if path.parent.name == "docs" else 120)
    prose = re.sub(r"^```.*?^```|^\|.*?$", "", text, flags=re.M | re.S)
    assert not [line for line in prose.split("\n") if len(line) > 160]
    assert not [found[0] for found in re.finditer(r"\b([A-Za-z]+)\s+\1\b", prose, re.I)]


def place(module: str) -> str:
    """Where a module belongs: an entry of FLOOR or ABOVE, "tests"; "" if it is none of ours."""
    first = module.split(".")[0]
    ours = "script" if ROOT / f"{first}.py" in LINES else ""
    return first if first in (*ROOMS, *FLOOR, *ABOVE) else ours


@pytest.mark.parametrize("path", [path for path in LINES if path.parent.name != "tests"],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_who_imports_whom(path):
    """Downwards only, so that a file can be read after those that it needs. No script needs another one."""
    mine = place(path.stem if path.parent == ROOT else path.parent.name)
    allowed = FLOOR + ABOVE[mine] if mine in ABOVE else FLOOR[:max(1, FLOOR.index(mine))]
    imports = [node for node in ast.walk(TREES[path]) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [getattr(node, "module", None) or alias.name for node in imports for alias in node.names]
    assert not [name for name in names if place(name) not in ("", *allowed)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_reader_meets_in_a_script(script):
    """A short main(); few flags, the shape's and deltas' aside; few names in the loop; little of siblings."""
    main, = (node for node in TREES[ROOT / f"{script}.py"].body if getattr(node, "name", "") == "main")
    loop, = (node for node in main.body if isinstance(node, ast.For) and node.target.id == "step")
    loaded, stored = ({node.id for node in ast.walk(loop) if isinstance(node, ast.Name) and
                       isinstance(node.ctx, kind)} for kind in (ast.Load, ast.Store))
    shared_flags, shape, delta, own = ({field.name for field in dataclasses.fields(config)} for config in (
        RunConfig, GPTConfig, DeltaConfig, importlib.import_module(script).Config))
    code = {name: [line.strip() for line in LINES[ROOT / f"{name}.py"] if line.strip()] for name in SCRIPTS}
    mine = code.pop(script)
    found = (main.end_lineno - main.lineno + 1, len(own - (shape - shared_flags) - delta),
             len(loaded - stored - set(dir(builtins))),
             sum(any(line in other for other in code.values()) for line in mine) / len(mine))
    assert all(a <= b for a, b in zip(found, SCRIPTS[script])), found
