#!/bin/sh
# run.sh [ARCH]    builds and runs the tests of the CUDA backend on this machine's GPU; ends with "N passed, N failed".
#
#   ARCH          what nvcc -arch takes (default: native)
#   NVCC, CC      other compilers
#   MOQ_GOLDEN    a folder with all golden checkpoints instead of the subset in tests/data/golden
#   MOQ_PREBUILT  a folder that holds the test programs already: nothing is compiled
#   QUICK=1       without compute-sanitizer and without the bench
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
nvcc=${NVCC:-nvcc}
cc=${CC:-cc}
arch=${1:-native}
build=${MOQ_PREBUILT:-$here/../build/cuda}
passed=0 failed=0 skipped=0
log=$(mktemp) || exit 2
trap 'rm -f "$log"' EXIT
export MOQ_DATA="$here/../data" MOQ_DEMO="$root/examples/demo-model"

count() { # name, exit code: adds what the closing line of $log says
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
    p=$(echo "$line" | sed -n 's/^\([0-9]*\) passed.*/\1/p')
    f=$(echo "$line" | sed -n 's/.* \([0-9]*\) failed.*/\1/p')
    if [ -z "$line" ] || { [ "$2" -ne 0 ] && [ "${f:-0}" -eq 0 ]; }; then f=$((${f:-0} + 1)); echo "exit code $2" >>"$log"; fi
    printf '%-44s %5d ok %3d failed\n' "$1" "${p:-0}" "$f"
    if [ "$f" -gt 0 ]; then tail -n 60 "$log"; else grep -E '^note:' "$log"; fi
    passed=$((passed + ${p:-0})) failed=$((failed + f))
}

if [ -z "${MOQ_PREBUILT:-}" ]; then
    command -v "$nvcc" >/dev/null || { echo "nvcc is not installed"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }
    mkdir -p "$build"
    start=$(date +%s)
    "$nvcc" -std=c++17 -O2 -arch="$arch" -c "$root/modelopt_q_cuda.cu" -o "$build/backend.o" || { echo "0 passed, 1 failed"; exit 1; }
    echo "modelopt_q_cuda.cu compiled for $arch in $(($(date +%s) - start)) s"
    for t in "$here"/test_*.c "$here"/bench_*.c; do
        [ -e "$t" ] || continue
        name=$(basename "$t" .c)
        "$cc" -O2 -g -DTEST_DIR="\"$here\"" -c "$t" -o "$build/$name.o" && "$nvcc" "$build/$name.o" "$build/backend.o" -o "$build/$name" -lm -lpthread || { echo "0 passed, 1 failed"; exit 1; }
    done
    # products of many rows: needs cuBLAS, which they are compared with
    "$cc" -O1 -DMODELOPT_Q_IMPLEMENTATION -x c -c "$root/modelopt_q.h" -o "$build/header.o" &&
        "$nvcc" -std=c++17 -O2 -arch="$arch" "$here/gemm.cu" "$build/backend.o" "$build/header.o" -o "$build/gemm" -lcublas -lm -lpthread >"$log" 2>&1 ||
        { skipped=$((skipped + 1)); echo "gemm was not built: $(tail -n 1 "$log")"; }
fi

if [ -x "$build/gemm" ]; then
    "$build/gemm" test >"$log" 2>&1
    count gemm $?
fi
for t in test_backend test_logits; do
    "$build/$t" >"$log" 2>&1
    count "$t" $?
done

# compute-sanitizer: memory and synchronisation over everything, the slower tools over one test of each kernel
sanitize() { # tool, program, filter
    compute-sanitizer --tool "$1" --error-exitcode 9 --log-file "$log.tool" "$build/$2" ${3:-} >"$log" 2>&1
    code=$?
    if grep -q 'ERROR SUMMARY: 0 errors\|RACECHECK SUMMARY: 0 hazards' "$log.tool"; then code=0; else cat "$log.tool" >>"$log"; [ "$code" -eq 0 ] && code=9; fi
    rm -f "$log.tool"
    count "$1 $2 ${3:-}" $code
}
if [ -z "${QUICK:-}" ]; then
    if command -v compute-sanitizer >/dev/null; then
        sanitize memcheck test_backend
        sanitize memcheck test_logits test_cuda_golden_foreign
        for tool in racecheck initcheck synccheck; do
            for t in test_cuda_ops test_cuda_rotation test_cuda_fused test_cuda_requantized test_cuda_moe_stored test_cuda_graphs test_cuda_embed test_cuda_each_kernel; do sanitize $tool test_backend $t; done
        done
    else
        skipped=$((skipped + 1))
        echo "compute-sanitizer is not installed"
    fi
    [ -x "$build/gemm" ] && "$build/gemm" bench nvfp4
fi
if [ "$skipped" -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ "$failed" -eq 0 ]
