#!/bin/sh
# Everything that judges a change: tests with gcc and clang, sanitizers, hygiene, command line, examples.
# ci.sh [GOLDEN_DIR]
cd "$(dirname "$0")" || exit 2
golden=${1:+MOQ_GOLDEN=$1}
log=$(mktemp) || exit 2
dir=$(mktemp -d) || exit 2
trap 'rm -rf "$log" "$dir"' EXIT
status=0
step() {
    echo "== $*"
    "$@" 2>&1 | tee -a "$log"
    # the pipe hides the exit code; the closing lines are counted below, and make's own word is looked for
}
# shellcheck disable=SC2086
step make -s -j2 CC=gcc BUILD=build/gcc programs $golden
# What comes next is compiled on one core while tests run on the other, and the threads are watched there. A leg waits for its programs.
later() { # NAME COMMAND...
    name=$1
    shift
    "$@" >"$dir/$name.log" 2>&1 || echo "*** $name: exit code $?" >>"$dir/$name.log"
    : >"$dir/$name"
}
clang_flags="-O1 -DMOQ_STATIC"
# With clang the bundled golden folders alone, as everybody has them: a test must not want others.
{
    later clang make -s CC=clang BUILD=build/clang CFLAGS="$clang_flags" MOQ_GOLDEN= programs
    later sanitizers make -s CC=gcc sanitize-programs
    later threads make -s CC=gcc sanitize-threads
    later nvcc make -s cuda-compile
} &
built() {
    until [ -e "$dir/$1" ]; do sleep 1; done
    step cat "$dir/$1.log"
}
# shellcheck disable=SC2086
step make -s CC=gcc BUILD=build/gcc $golden
built clang
step make -s CC=clang BUILD=build/clang CFLAGS="$clang_flags" MOQ_GOLDEN= test
built sanitizers
later half make -s CC=gcc sanitize-memory "ONLY=test_[g-z]*" &
step make -s CC=gcc sanitize-memory "ONLY=test_[a-f]*"
step make -s -C ../examples check
built half
built threads
built nvcc
grep -qE '\*\*\* |Error [0-9]' "$log" && status=1
p=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | awk '{n += $1} END {print n + 0}')
f=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | awk '{n += $3} END {print n + 0}')
[ "$status" -ne 0 ] && [ "$f" -eq 0 ] && f=1
echo "$p passed, $f failed"
[ "$f" -eq 0 ]
