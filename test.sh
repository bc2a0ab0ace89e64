#!/usr/bin/env bash
# The second command of the README: make .venv and run the tests, under 5 minutes on two CPU cores.
# `bash test.sh --all` adds the slow tests. Other arguments go to pytest: bash test.sh -k attention
set -euo pipefail
cd "$(dirname "$0")"
if ! cmp -s requirements.txt .venv/requirements.txt; then  # once, and after a change of requirements.txt
    echo "making .venv and installing requirements.txt ..." >&2
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    .venv/bin/python -m pip install --quiet matplotlib || echo "no matplotlib, no pictures" >&2
    cp requirements.txt .venv/
fi
exec .venv/bin/python -m pytest -q tests "$@"
