"""Shared by all tests: the project folder on the path, `--all` for the slow tests, and a text."""
import os
import sys

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # the tensors are tiny: several threads would only wait for each other
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests marked slow (up to half an hour)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; runs under --all")


def pytest_collection_modifyitems(config, items):
    for item in () if config.getoption("--all") else items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --all"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A real text that every machine has: a module of the standard library, cut into two documents."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    with open(os.__file__, encoding="utf-8") as file:
        source = file.read()
    path.write_text(source[:9000] + "\n<|endoftext|>\n" + source[9000:20000])
    return path
