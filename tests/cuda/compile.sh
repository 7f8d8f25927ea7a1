#!/bin/sh
# compile.sh TARGET...    compiles modelopt_q_cuda.cu for each target (80, 86, 87, 89, 90a; ptx: PTX 9.0 for later devices), two at a time. A warning is
# a failure, of the header's implementation in a .cu file, too. Ends with "N passed, N failed"; without nvcc nothing is tried and it says so.
cd "$(dirname "$0")/../.." || exit 2
nvcc=${NVCC:-nvcc}
command -v "$nvcc" >/dev/null || { echo "nvcc is not installed: modelopt_q_cuda.cu was not compiled"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }
dir=$(mktemp -d) || exit 2
trap 'rm -rf "$dir"' EXIT

one() { # target
    code="arch=compute_$1,code=sm_$1"
    [ "$1" = ptx ] && code="arch=compute_90,code=compute_90"
    start=$(date +%s)
    "$nvcc" -std=c++17 -O2 -gencode="$code" -Xcompiler -Wall,-Wextra -c modelopt_q_cuda.cu -o "$dir/$1.o" >"$dir/$1.log" 2>&1
    code=$?
    grep -q -i warning "$dir/$1.log" && code=1
    echo "modelopt_q_cuda.cu, $1: $([ "$code" -eq 0 ] && echo fine || echo FAILED), $(($(date +%s) - start)) s" >"$dir/$1.line"
    [ "$code" -eq 0 ] && : >"$dir/$1.good"
}

# The implementation of the header in a .cu file, as a program may have it.
printf '#define MODELOPT_Q_IMPLEMENTATION\n#include "%s/modelopt_q.h"\n' "$PWD" >"$dir/header.cu"
if "$nvcc" -O0 -c "$dir/header.cu" -o "$dir/header.o" >"$dir/header.log" 2>&1 && ! grep -q -i warning "$dir/header.log"; then
    echo "modelopt_q.h in a .cu file: fine" >"$dir/header.line"
    : >"$dir/header.good"
else
    echo "modelopt_q.h in a .cu file: FAILED" >"$dir/header.line"
fi
cat "$dir/header.line"
[ -e "$dir/header.good" ] || cat "$dir/header.log"

while [ $# -gt 0 ]; do
    one "$1" & first=$!
    if [ $# -gt 1 ]; then one "$2" & wait $!; fi
    wait "$first"
    for t in "$1" ${2:-}; do cat "$dir/$t.line"; [ -e "$dir/$t.good" ] || cat "$dir/$t.log"; done
    shift
    [ $# -gt 0 ] && shift
done
passed=0 all=0
for t in "$dir"/*.line; do
    [ -e "$t" ] || continue
    all=$((all + 1))
    [ -e "${t%.line}.good" ] && passed=$((passed + 1))
done
echo "$passed passed, $((all - passed)) failed"
[ "$passed" -eq "$all" ]
