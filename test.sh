#!/usr/bin/env bash
# The second command of the README: make .venv and run the tests, 5 to 9 minutes on two CPU cores; `bash test.sh --all` adds
# the slow ones (up to 30 minutes). Other arguments go to pytest: bash test.sh -k attention
set -euo pipefail
cd "$(dirname "$0")"

# the environment: made once, again when requirements.txt changes
if ! cmp -s requirements.txt .venv/requirements.txt; then
    echo "making .venv and installing requirements.txt ..."
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/
fi

exec .venv/bin/python -m pytest -q tests "$@"
