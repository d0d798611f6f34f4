#!/bin/sh
# Unlearn with gates, and decide by the exit code. Usage: unlearn.sh MODEL OUT
set -u
model=$1
out=$2

run() {
    llmsurgery unlearn "$model" --method npo --forget forget.jsonl --retain retain.jsonl -o "$out" --resume "$@" \
        --require 'forget.token_prob<=0.25x' --require 'retain.token_prob>=0.9x'
}

run
code=$?
if [ "$code" -eq 9 ]; then
    echo "diverged: on from the last good state, with a smaller step" >&2
    run --set lr=1e-5
    code=$?
fi

case $code in
0)
    llmsurgery verify "$out" --base "$model" || exit $?
    echo "published: $out"
    ;;
6) echo "a gate failed: $out.report.json has the figures" >&2 ;;
7) echo "out of memory or disk: try --batch-size auto, then run this again" >&2 ;;
130) echo "interrupted: run this again, it goes on from $out.partial" >&2 ;;
*) echo "failed, exit code $code" >&2 ;;
esac
exit "$code"
