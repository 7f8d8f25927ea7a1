#!/bin/sh
# run.sh [-n] [-l] [STEP...]    builds and runs the tests and measurements of the CUDA backend; ends with "N passed, N failed".
#
#   STEP          which steps, in their order (default: all); -l lists them with the seconds they took or may take on an H100 or H200
#   -n            dry run: says what each step would run, and which tools are missing; builds and runs nothing
#
#   ARCH          what nvcc -arch takes (default: native, but sm_90a on H100 and H200, whose own instructions native leaves out)
#   NVCC, CC      other compilers
#   MOQ_BUILD     where programs go (default: tests/build/cuda); build on one machine, copy the folder, run on another
#   MOQ_GOLDEN    a folder with all golden checkpoints instead of the subset in tests/data/golden
#   MOQ_MODELS    where folders with random weights are written (default: /tmp); 4.8 GB and 17 GB
#   FORMS         layer forms of bench-few and bench-many (default: nvfp4 mxfp4 int4-g128 fp8-tensor fp8-block128)
#
# Rows of the table of measurements come from: bench-few (1 to 16 rows of x beside a plain read), bench-many (17 and more beside cuBLAS),
# bench-moe, bench-attention, bench-model. Peers: tests/bench/gpu_peers.sh.
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
nvcc=${NVCC:-nvcc}
cc=${CC:-cc}
arch=${ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n '1s/^9\.0$/sm_90a/p')}
arch=${arch:-native}
target=-arch=$arch
[ "$arch" = sm_90a ] && target=-gencode=arch=compute_90a,code=sm_90a # -arch=sm_90a alone compiles everything for compute_90 too
build=${MOQ_BUILD:-$here/../build/cuda}
models=${MOQ_MODELS:-/tmp}
forms=${FORMS:-nvfp4 mxfp4 int4-g128 fp8-tensor fp8-block128}
passed=0 failed=0 skipped=0 dry=
export MOQ_DATA="$here/../data" MOQ_DEMO="$root/examples/demo-model"

# name, seconds, what. Seconds are estimates until a run says better: the table that -l prints is for planning.
steps='tools 3 compilers, sanitizer, device
build 240 modelopt_q_cuda.cu and every program here
gemm 130 products of 17 and more rows: every form x odd shapes x modes against float64, same bits in every run; mixtures of experts
backend 150 the function table: every kernel x scheme x odd shape against float64, caches, mixtures, graphs, two backends, memory that runs out
sync 300 the function table again on compute capability 9.0, compiled without wgmma: what other devices run
logits 90 golden logits through the backend
models 30 whole random models: families, sizes, formats, caches, orders of work, CPU against CUDA
demo 20 the demo model'\''s answers, CPU and CUDA
gpus 10 examples/gpus.cu: the demo model in two parts, on as many GPUs as there are, answers as in one
memcheck 240 compute-sanitizer over the function table and golden logits
racecheck 120 compute-sanitizer over one test of each kernel
initcheck 90 the same
synccheck 60 the same
bench-few 45 1, 2, 8, 16 rows of x beside a plain read of the same bytes
bench-many 240 17 to 4096 rows of x beside cuBLAS BF16
bench-moe 40 mixtures of experts
bench-attention 40 caches of 4 to 32 thousand positions
bench-model 200 tokens a second of Llama-8B and Qwen3-30B-A3B shapes with random weights'
sanitized='test_cuda_ops test_cuda_rotation test_cuda_fused test_cuda_requantized test_cuda_moe_stored test_cuda_graphs test_cuda_embed test_cuda_each_kernel
    test_cuda_few_fused test_cuda_many_small test_cuda_together test_cuda_enter test_cuda_moe_small'
# racecheck does not know what acquire and release order in test_cuda_moe_few_small, nor how blocks of a cluster wait in test_cuda_many_cut

list() {
    total=0
    echo "$steps" | { while read -r name seconds what; do
        total=$((total + seconds))
        printf '%-16s %4d s  %s\n' "$name" "$seconds" "$what"
    done; printf '%-16s %4d s\n' all "$total"; }
}

while [ $# -gt 0 ]; do
    case $1 in
    -n) dry=1 ;;
    -l) list; exit 0 ;;
    -*) sed -n '2,6p' "$0"; exit 2 ;;
    *) break ;;
    esac
    shift
done
wanted=${*:-$(echo "$steps" | while read -r name _; do echo "$name"; done)}
for w in $wanted; do
    echo "$steps" | grep -q "^$w " || { echo "no step '$w'; known are:"; list; exit 2; }
done
log=$(mktemp) || exit 2
trap 'rm -f "$log" "$log.tool"' EXIT

# Runs a command, or says that it would.
run() {
    if [ -n "$dry" ]; then echo "    $*"; return 0; fi
    "$@"
}

count() { # name, exit code: adds what the closing line of $log says
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
    p=$(echo "$line" | sed -n 's/^\([0-9]*\) passed.*/\1/p')
    f=$(echo "$line" | sed -n 's/.* \([0-9]*\) failed.*/\1/p')
    if [ -z "$line" ] || { [ "$2" -ne 0 ] && [ "${f:-0}" -eq 0 ]; }; then f=$((${f:-0} + 1)); echo "exit code $2" >>"$log"; fi
    printf '%-52s %5d ok %3d failed\n' "$1" "${p:-0}" "$f"
    if [ "$f" -gt 0 ]; then tail -n 60 "$log"; else grep -E '^note:' "$log"; fi
    passed=$((passed + ${p:-0})) failed=$((failed + f))
}

tested() { # name, command...
    name=$1
    shift
    if [ -n "$dry" ]; then run "$@"; return; fi
    if [ ! -x "$1" ]; then echo "$name: $1 is not there; run the step build"; skipped=$((skipped + 1)); return; fi
    "$@" >"$log" 2>&1
    count "$name" $?
}

measured() { # command...: a table on standard output
    if [ -n "$dry" ]; then run "$@"; return; fi
    if [ ! -x "$1" ]; then echo "$1 is not there; run the step build"; skipped=$((skipped + 1)); return; fi
    "$@" || failed=$((failed + 1))
}

sanitized_by() { # tool, program, filter
    bound=
    [ "$1" = synccheck ] && bound='--num-cuda-barriers 65536' # its own bound is too small for a kernel with a barrier of each warp
    if [ -n "$dry" ]; then run compute-sanitizer --tool "$1" $bound "$build/$2" "$3"; return; fi
    if ! command -v compute-sanitizer >/dev/null; then skipped=$((skipped + 1)); echo "$1: compute-sanitizer is not installed"; return; fi
    compute-sanitizer --tool "$1" $bound --error-exitcode 9 --log-file "$log.tool" "$build/$2" ${3:+"$3"} >"$log" 2>&1
    code=$?
    if grep -q 'ERROR SUMMARY: 0 errors\|RACECHECK SUMMARY: 0 hazards' "$log.tool"; then code=0; else cat "$log.tool" >>"$log"; [ "$code" -eq 0 ] && code=9; fi
    count "$1 $2 $3" "$code"
}

step_tools() {
    for t in "$nvcc" "$cc" nvidia-smi compute-sanitizer; do
        if command -v "$t" >/dev/null; then echo "$t: $(command -v "$t")"; else echo "$t: not there"; fi
    done
    [ -z "$dry" ] || return 0
    nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version --format=csv,noheader 2>/dev/null || { echo "no device answers"; skipped=$((skipped + 1)); }
}

one() { # what, command...: a part of the build
    what=$1
    shift
    if run "$@" >"$log" 2>&1; then [ -z "$dry" ] || cat "$log"; return 0; fi
    echo "$what was not built:"
    tail -n 20 "$log"
    failed=$((failed + 1))
    return 1
}

step_build() {
    command -v "$nvcc" >/dev/null || { echo "nvcc is not installed"; skipped=$((skipped + 1)); return; }
    run mkdir -p "$build"
    start=$(date +%s)
    one modelopt_q_cuda.cu "$nvcc" -std=c++17 -O2 "$target" -c "$root/modelopt_q_cuda.cu" -o "$build/backend.o" || return
    echo "modelopt_q_cuda.cu compiled for $arch in $(($(date +%s) - start)) s"
    for t in test_backend test_logits test_models bench_backend bench_model; do
        one "$t" "$cc" -O2 -g -DTEST_DIR="\"$here\"" -c "$here/$t.c" -o "$build/$t.o" && one "$t" "$nvcc" "$build/$t.o" "$build/backend.o" -o "$build/$t" -lm -lpthread
    done
    one gpus "$nvcc" -O2 "$root/examples/gpus.cu" "$build/backend.o" -o "$build/gpus" -lm -lpthread
    one header "$cc" -O1 -DMODELOPT_Q_IMPLEMENTATION -x c -c "$root/modelopt_q.h" -o "$build/header.o" || return
    one bench "$nvcc" -std=c++17 -O2 "$target" "$here/bench.cu" "$root/tools/moq_cuda.cu" "$build/backend.o" "$build/header.o" -o "$build/bench" -lm -lpthread
    one gemm "$nvcc" -std=c++17 -O2 "$target" "$here/gemm.cu" "$build/backend.o" "$build/header.o" -o "$build/gemm" -lcublas -lm -lpthread # beside cuBLAS
}

step_gemm() {
    tested gemm "$build/gemm" test
    tested "gemm, mma.sync" "$build/gemm" test "" gemm-mma # what older devices run
}
step_backend() { tested test_backend "$build/test_backend"; }
step_sync() {
    case $arch in sm_90*) ;; *) [ -n "$dry" ] || echo "sync: only for compute capability 9.0; the step backend runs this code here"; return ;; esac
    one "modelopt_q_cuda.cu without wgmma" "$nvcc" -std=c++17 -O2 -gencode=arch=compute_90,code=sm_90 -c "$root/modelopt_q_cuda.cu" -o "$build/sync.o" &&
        one test_backend "$nvcc" "$build/test_backend.o" "$build/sync.o" -o "$build/test_sync" -lm -lpthread && tested "test_backend without wgmma" "$build/test_sync"
}
step_logits() { tested test_logits "$build/test_logits" golden; }
step_models() { tested test_models "$build/test_models" 1 60 25; }
step_demo() { tested "test_logits demo" "$build/test_logits" demo; }
step_gpus() {
    if [ -n "$dry" ]; then run "$build/gpus" "$MOQ_DEMO" 2; return; fi
    if [ ! -x "$build/gpus" ]; then echo "gpus: $build/gpus is not there; run the step build"; skipped=$((skipped + 1)); return; fi
    f=0
    for prompt in "please put the red pillow on the bedroom bed" "bring the yellow book to Juno"; do
        for ranks in 1 2 4; do
            "$build/gpus" "$MOQ_DEMO" "$ranks" "$prompt" >"$log.$ranks" 2>&1 && sed -n '$p' "$log.$ranks" || { f=1; cat "$log.$ranks"; }
            [ "$(sed '$d' "$log.1")" = "$(sed '$d' "$log.$ranks")" ] || { f=1; echo "$ranks ranks say:"; cat "$log.$ranks"; }
        done
    done
    if [ "$f" -eq 0 ]; then echo "1 passed, 0 failed" >"$log"; else echo "0 passed, 1 failed" >"$log"; fi
    rm -f "$log".[124]
    count gpus "$f"
}
step_memcheck() {
    sanitized_by memcheck test_backend ""
    sanitized_by memcheck test_logits test_cuda_golden_foreign
}
each_sanitized() {
    for t in $sanitized; do
        [ "$1 $t" = "initcheck test_cuda_many_small" ] && continue # tiles read x past the last token, and nobody writes those sums
        sanitized_by "$1" test_backend "$t"
    done
}
step_racecheck() { each_sanitized racecheck; }
step_initcheck() { each_sanitized initcheck; }
step_synccheck() { each_sanitized synccheck; }
step_bench_few() { for f in $forms; do measured "$build/bench" "$f"; done; }
step_bench_many() {
    for f in $forms; do measured "$build/gemm" bench "$f"; done
    for f in fp8-tensor int8; do measured "$build/gemm" stored "$f"; done # inputs as stored: products of bytes
}
step_bench_moe() { measured "$build/bench_backend" moe; }
step_bench_attention() { measured "$build/bench_backend" attention; }
step_bench_model() {
    for s in llama-8b qwen3-30b-a3b; do measured "$build/bench_model" "$s" "$models/moq-$s"; done
}

for w in $wanted; do
    seconds=$(echo "$steps" | sed -n "s/^$w \([0-9]*\) .*/\1/p")
    echo "== $w (about $seconds s)"
    start=$(date +%s)
    "step_$(echo "$w" | tr - _)"
    [ -n "$dry" ] || echo "== $w took $(($(date +%s) - start)) s"
done
if [ -n "$dry" ]; then echo "dry run: nothing was done"; exit 0; fi
if [ "$skipped" -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ "$failed" -eq 0 ]
