#!/bin/sh
# Everything that judges a change: tests with gcc and clang, sanitizers, hygiene, command line, examples.
# ci.sh [GOLDEN_DIR]
cd "$(dirname "$0")" || exit 2
golden=${1:+MOQ_GOLDEN=$1}
log=$(mktemp) || exit 2
cuda=$(mktemp) || exit 2
trap 'rm -f "$log" "$cuda"' EXIT
# nvcc takes minutes on one core: beside the tests, most of which run on one
make -s cuda-compile >"$cuda" 2>&1 &
compiling=$!
status=0
step() {
    echo "== $*"
    "$@" 2>&1 | tee -a "$log"
    # the pipe hides the exit code; the closing lines are counted below, and make's own word is looked for
}
# shellcheck disable=SC2086
step make -s -j2 CC=gcc BUILD=build/gcc programs $golden
step make -s CC=gcc BUILD=build/gcc $golden
step make -s -j2 CC=clang BUILD=build/clang CFLAGS="-O1 -DMOQ_STATIC" programs
step make -s CC=clang BUILD=build/clang CFLAGS="-O1 -DMOQ_STATIC" test
step make -s -j2 CC=gcc sanitize-programs
step make -s CC=gcc sanitize
step make -s -C ../examples check
wait "$compiling" || echo "*** cuda-compile" >>"$log"
step cat "$cuda"
grep -qE '\*\*\* |Error [0-9]' "$log" && status=1
p=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | awk '{n += $1} END {print n + 0}')
f=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | awk '{n += $3} END {print n + 0}')
[ "$status" -ne 0 ] && [ "$f" -eq 0 ] && f=1
echo "$p passed, $f failed"
[ "$f" -eq 0 ]
