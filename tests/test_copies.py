"""Blocks that are equal in several scripts on purpose: marked `# [copy: name]`, and kept equal here."""
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
