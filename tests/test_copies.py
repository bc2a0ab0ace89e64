"""What holds for the text of all files: blocks marked `# [copy: name]` are equal, and who may import whom."""
import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^( *)# \[copy: (\w+)\]\n(.*?)^\1# \[end copy\]$", re.M | re.S)


def blocks() -> dict[str, dict[str, str]]:
    """{name: {file: text}}."""
    found = defaultdict(dict)
    for path in sorted(ROOT.glob("*.py")):
        for _, name, text in BLOCK.findall(path.read_text()):
            assert path.name not in found[name], f"{path.name} has two blocks named {name}"
            found[name][path.name] = text
    return found


@pytest.mark.parametrize("name", blocks())
def test_copies_are_equal(name):
    """A change to one copy is a change to all, or else the block needs another name."""
    copies = blocks()[name]
    first, *others = copies
    assert others, f"{name} stands in {first} alone: it is no copy"
    for other in others:
        assert copies[other] == copies[first], f"{name} differs between {first} and {other}"


def test_every_mark_is_closed():
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        assert text.count("# [copy: ") == text.count("# [end copy]") == len(BLOCK.findall(text)) or \
            path.name == "common.py", path.name


# What the floor may import of it; scripts may import all of the floor but the village and its truth, and never each
# other. So no training script knows of the village, and a change to one script cannot break another.
FLOOR = {"common": "", "kernels": "", "processes": "common", "checked": "common", "records": "common",
         "tokenizer": "common records", "model": "common kernels", "zero_tools": "common processes",
         "zero": "common zero_tools", "corpus": "common records tokenizer", "data": "common corpus records tokenizer",
         "checkpoint": "common checked processes model tokenizer zero zero_tools", "truth": "common records",
         "village": "common corpus records truth"}
EXCEPTIONS = {"evaluate": {"village", "truth"}, "plot": {"evaluate"}, "bench": {"bench_zero"}, "bench_zero": {"bench"}}


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_who_may_import_whom(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    allowed = set(FLOOR[path.stem].split()) if path.stem in FLOOR else \
        set(FLOOR) - {"village", "truth"} | EXCEPTIONS.get(path.stem, set())
    assert imported & {other.stem for other in ROOT.glob("*.py")} <= allowed
