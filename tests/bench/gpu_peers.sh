#!/bin/sh
# gpu_peers.sh [-r] [PEER...]    the engines that the CUDA backend is compared with: what to install and how to time the same products and models.
# Without -r only prints the commands; with it runs them in PEERS (default: /tmp/moq-peers), each peer in a folder of its own. None of their code
# is here. Needs git, cmake, Python with venv, nvcc and a GPU; installs from the network.
#
#   cublas     BF16 and the plain read of the same bytes: part of this repository's own programs, same run
#   marlin     the original INT4 kernel: INT4 g128, 1 to 64 rows
#   vllm       Marlin INT4 and FP4 (NVFP4, MXFP4); whole models
#   llama.cpp  NVFP4, MXFP4, Q4_0: products of all shapes, whole models
#   sglang     whole models
#   trtllm     whole models
#
# Compare like with like: weights that do not stay in the cache (more copies than it holds), graphs or many launches in one timing, the median of
# several runs, the clock of the device unlocked, nothing else on it. Loops over one matrix are too good by what the cache gives: 60 MB on H200.
#
#   SHAPES     N x K of products (default: the five of the table)
#   ROWS       rows of x (default: 1 8 16 64 128 512 2048)
#   MODEL      folder for whole models (default: what tests/cuda/bench_model writes: random NVFP4 weights of Llama-8B's shape)
#   MODEL_BF16 folder or name of the same architecture in BF16, for llama.cpp's converter
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
peers=${PEERS:-/tmp/moq-peers}
shapes=${SHAPES:-4096x4096 14336x4096 4096x14336 8192x8192 28672x8192}
rows=${ROWS:-1 8 16 64 128 512 2048}
model=${MODEL:-/tmp/moq-llama-8b}
plain=${MODEL_BF16:-meta-llama/Llama-3.1-8B}
go=
failed=0

say() { # a command line as a shell reads it
    echo "    $1"
    [ -n "$go" ] || return 0
    (cd "$peers/$peer" && sh -c "$1") || { echo "    failed: exit code $?"; failed=$((failed + 1)); }
}

ns() { for s in $shapes; do echo "${s%x*}"; done | sort -un | tr '\n' ' '; }
ks() { for s in $shapes; do echo "${s#*x}"; done | sort -un | tr '\n' ' '; }

peer_cublas() {
    say "sh '$root/tests/cuda/run.sh' build bench-few bench-many"
}

peer_marlin() {
    say "git clone --depth 1 https://github.com/IST-DASLab/marlin . || git pull"
    say "python3 -m venv env && env/bin/pip install torch numpy ninja && env/bin/pip install --no-build-isolation ."
    say "env/bin/python test.py && env/bin/python bench.py"
    echo "    # its shapes are those of models: compare by N, K and rows. On SM90 its cache hints may be refused: then build it for sm_80"
}

peer_vllm() {
    say "python3 -m venv env && env/bin/pip install vllm"
    say "git clone --depth 1 https://github.com/vllm-project/vllm source || git -C source pull"
    say "cd source/benchmarks/kernels && ../../../env/bin/python benchmark_marlin.py --batch-sizes $rows --limit-n $(ns)--limit-k $(ks)--limit-num-bits 4"
    say "env/bin/vllm bench latency --model '$model' --load-format safetensors --skip-tokenizer-init --input-len 64 --output-len 128 --batch-size 1"
    say "env/bin/vllm bench latency --model '$model' --load-format safetensors --skip-tokenizer-init --input-len 8192 --output-len 128 --batch-size 1 --kv-cache-dtype fp8"
}

peer_llama_cpp() {
    say "git clone --depth 1 https://github.com/ggml-org/llama.cpp . || git pull"
    say "cmake -B build -DGGML_CUDA=ON -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF && cmake --build build -j --target test-backend-ops llama-bench llama-quantize"
    for s in $shapes; do
        for t in nvfp4 mxfp4 q4_0; do say "build/bin/test-backend-ops perf -o MUL_MAT -b CUDA0 -p 'type_a=$t,type_b=f32,m=${s%x*},n=[0-9]+,k=${s#*x},'"; done
    done
    echo "    # it times the shapes that its source lists; add those that are missing to make_test_cases_perf in tests/test-backend-ops.cpp, m N, n rows, k K"
    say "python3 -m venv env && env/bin/pip install -r requirements/requirements-convert_hf_to_gguf.txt && env/bin/python convert_hf_to_gguf.py '$plain' --outfile model.gguf"
    say "build/bin/llama-quantize model.gguf q4.gguf Q4_0 && build/bin/llama-bench -m q4.gguf -ngl 99 -p 512 -n 128 -d 0,1024,8192"
}

peer_sglang() {
    say "python3 -m venv env && env/bin/pip install 'sglang[all]'"
    say "env/bin/python -m sglang.bench_one_batch --model-path '$model' --load-format safetensors --skip-tokenizer-init --batch-size 1 --input-len 64 --output-len 128"
}

peer_trtllm() {
    say "python3 -m venv env && env/bin/pip install tensorrt_llm"
    say "env/bin/trtllm-bench --help && env/bin/trtllm-bench --model '$model' latency --help"
    echo "    # then: trtllm-bench --model MODEL --model_path $model latency --dataset FILE, with FILE from its prepare_dataset (input 64, output 128)"
}

while [ $# -gt 0 ]; do
    case $1 in
    -r) go=1 ;;
    -*) sed -n '2,4p' "$0"; exit 2 ;;
    *) break ;;
    esac
    shift
done
[ $# -gt 0 ] || set -- cublas marlin vllm llama.cpp sglang trtllm
for peer in "$@"; do
    case $peer in
    cublas|marlin|vllm|llama.cpp|sglang|trtllm) ;;
    *) echo "no peer '$peer'; known are cublas marlin vllm llama.cpp sglang trtllm"; exit 2 ;;
    esac
    echo "== $peer"
    [ -z "$go" ] || mkdir -p "$peers/$peer"
    "peer_$(echo "$peer" | tr . _)"
done
[ "$failed" -eq 0 ]
