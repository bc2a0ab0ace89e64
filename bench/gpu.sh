#!/usr/bin/env bash
# On a machine with a GPU: what only it can check, in at most nine minutes. It needs .venv, as test.sh makes it.
#   bash bench/gpu.sh                 output in out/gpu, or in the folder $OUT: one log per command
set -uo pipefail
out=$(mkdir -p "${OUT:-out/gpu}" && cd "${OUT:-out/gpu}" && pwd) failed=0
unset OUT  # run.sh reads it, too
cd "$(dirname "$0")/.."
attempt() {  # attempt NAME SECONDS command ...: a failure is told, and the next command runs
    local name=$1 limit=$2 start=$SECONDS code=0
    shift 2
    timeout --kill-after 5 "$limit" "$@" > "$out/$name.log" 2>&1 < /dev/null || code=$?
    [ $code = 0 ] || failed=1
    echo "$name: exit code $code after $((SECONDS - start)) s (124: not done within $limit s)"
    tail -n 3 "$out/$name.log"
}
python=.venv/bin/python
attempt tests 110 $python -m pytest -q tests/test_cuda.py
attempt attention 60 $python -m bench.attention --repeats 5 --only time
attempt train 40 $python -m bench.train
attempt decode 40 $python -m bench.decode --repeats 2
attempt zero 110 $python -m bench.zero --only cuda --quick
attempt run 150 bash run.sh --quick
exit $failed
