"""Shared by all tests: the project folder on the path, and `--all` for the slow ones."""
import os
import sys

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: threads only wait for each other, above all on a busy machine
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests marked slow (up to half an hour)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; runs under --all")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --all"))
