#!/usr/bin/env bash
# The first command of the README: make .venv, train a GPT for about three minutes on two CPU cores, show what it learned.
#   bash run.sh              on the English that ships with every Python (no download)
#   bash run.sh my_text.txt  on your own text
# Interrupted? The same command goes on where it stopped. To start afresh, remove the folder under out/.
set -euo pipefail
data=${1:-stdlib}
[ -e "$data" ] && data=$(cd "$(dirname "$data")" && pwd)/$(basename "$data")  # as seen from where you are
cd "$(dirname "$0")"

# the environment: made once, again when requirements.txt changes
if ! cmp -s requirements.txt .venv/requirements.txt; then
    echo "making .venv and installing requirements.txt ..."
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/
fi

# one folder per text, told apart by name and content
out=out/pretrain-$(basename "$data" .txt)
[ -e "$data" ] && out=$out-$(cksum < "$data" | cut -d" " -f1)

set -x
.venv/bin/python train_pretrain.py --data "$data" --out "$out" --resume
.venv/bin/python sample.py --model "$out" --n 2 --max_new_tokens 150
