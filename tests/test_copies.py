"""Blocks that the scripts deliberately share stay equal: what differs between two stages is then their algorithm."""
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_blocks_of_one_name_are_equal():
    """Between `# [copy: name]` and `# [end copy]`, in all training scripts."""
    found = {}
    for path in sorted(ROOT.glob("train_*.py")):
        text = path.read_text()
        blocks = re.findall(r"# \[copy: (\w+)\]\n(.*?)# \[end copy\]\n", text, re.DOTALL)
        assert len(blocks) == text.count("# [copy: ") == text.count("# [end copy]"), path.name
        for name, block in blocks:
            found.setdefault(name, {})[path.name] = block
    assert "lr_at" in found
    for name, blocks in found.items():
        assert len(blocks) > 1 and len(set(blocks.values())) == 1, f"{name} differs between {', '.join(blocks)}"
