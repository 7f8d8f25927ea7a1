#!/bin/sh
# peers.sh SRC [WORK]    tokens a second of one model here and in llama.cpp, on this CPU: prompt of 512 tokens, then 128 generated ones.
#
#   SRC          an unquantized checkpoint folder (SmolLM2-135M, say) with its tokenizer
#   WORK         where folders and GGUF files go and stay (default: /tmp/moq-peers)
#   LLAMA        the source tree of llama.cpp (its converter needs Python with torch, transformers, sentencepiece)
#   LLAMA_BIN    where llama-bench and llama-quantize are (default: $LLAMA/build/bin)
#   PYTHON       the Python of the converter (default: python3)
#   CALIB        text for the NVFP4 recipe (default: the demo model's)
#   THREADS      e.g. "1 2" (default)      ROUNDS  runs of each, one after the other in turn; the best counts (default 3)
#   GET=1        fetch and build llama.cpp from the source package of llama-cpp-python into WORK first: takes minutes and the network
#
# Downloads nothing without GET=1. What is missing is said, and the rest is measured. Exit 0: both sides were; 2: something was missing.
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
src=${1:?peers.sh SRC [WORK]: SRC is an unquantized checkpoint folder}
work=${2:-/tmp/moq-peers}
moq=$root/tools/moq
python=${PYTHON:-python3}
calib=${CALIB:-$root/tests/data/demo-eval.jsonl}
threads=${THREADS:-1 2}
rounds=${ROUNDS:-3}
missing=0
mkdir -p "$work" || exit 2
say() { echo "peers.sh: $*" >&2; }
lacks() { say "missing: $*"; missing=1; }

# 1. llama.cpp
if [ "${GET:-0}" = 1 ] && [ ! -d "$work/llama.cpp" ]; then
    "$python" -m pip download -q --no-deps --no-binary :all: llama-cpp-python -d "$work" || lacks "the source package of llama-cpp-python"
    for f in "$work"/llama_cpp_python-*.tar.gz; do tar xzf "$f" -C "$work" && mv "$work"/llama_cpp_python-*/vendor/llama.cpp "$work/llama.cpp"; done
    # files may be dated later than this machine's clock
    find "$work/llama.cpp" -type f -exec touch {} +
    cmake -S "$work/llama.cpp" -B "$work/llama.cpp/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF >"$work/build.log" 2>&1 &&
        make -C "$work/llama.cpp/build" llama-bench llama-quantize >>"$work/build.log" 2>&1 || lacks "a build of llama.cpp; see $work/build.log"
fi
[ -z "${LLAMA:-}" ] && [ -d "$work/llama.cpp" ] && LLAMA=$work/llama.cpp
LLAMA=${LLAMA:-}
bin=${LLAMA_BIN:-$LLAMA/build/bin}
[ -x "$bin/llama-bench" ] || lacks "llama-bench in '$bin': set LLAMA_BIN, or GET=1"
[ -x "$bin/llama-quantize" ] || lacks "llama-quantize in '$bin'"
[ -f "$LLAMA/convert_hf_to_gguf.py" ] || lacks "convert_hf_to_gguf.py in '$LLAMA': set LLAMA"
[ -x "$moq" ] || make -s -C "$root/tools" || exit 2

# 2. the same model in every format; what is there already is used
[ -d "$work/nvfp4" ] || "$moq" quantize "$src" "$work/nvfp4" --recipe nvfp4 --calib "$calib" --samples 8 --seq 64 || exit 2
convert() { # folder, file, further arguments
    [ -f "$2" ] && return
    in=$1 out=$2
    shift 2
    PYTHONPATH=$LLAMA/gguf-py${PYTHONPATH:+:$PYTHONPATH} "$python" "$LLAMA/convert_hf_to_gguf.py" "$in" --outfile "$out" "$@" >"$work/convert.log" 2>&1 ||
        lacks "$out; see $work/convert.log"
}
if [ -f "$LLAMA/convert_hf_to_gguf.py" ]; then
    convert "$src" "$work/bf16.gguf" --outtype bf16
    convert "$work/nvfp4" "$work/nvfp4.gguf"
fi
for q in Q4_0 Q8_0; do
    if [ ! -f "$work/$q.gguf" ] && [ -x "$bin/llama-quantize" ] && [ -f "$work/bf16.gguf" ]; then
        "$bin/llama-quantize" "$work/bf16.gguf" "$work/$q.gguf" $q >"$work/convert.log" 2>&1 || lacks "$work/$q.gguf; see $work/convert.log"
    fi
done

# 3. in turn, so that what else the machine does falls on all of them
number() { sed -n "s/.*\"$1\": *\([0-9.e+-]*\).*/\1/p" | head -n 1; }
ours() { # name, folder, threads, further options
    name=$1 dir=$2 t=$3
    shift 3
    "$moq" bench "$dir" --threads "$t" --backend cpu --json "$@" >"$work/out" 2>/dev/null || { lacks "a run of moq bench $dir"; return; }
    echo "$t ours-$name $(number prompt_tokens_per_second <"$work/out") $(number generated_tokens_per_second <"$work/out") $(number token_bytes <"$work/out")" >>"$work/results"
}
theirs() { # name, threads
    [ -x "$bin/llama-bench" ] && [ -f "$work/$1.gguf" ] || return
    "$bin/llama-bench" -m "$work/$1.gguf" -p 512 -n 128 -t "$2" -r 1 -o json >"$work/out" 2>/dev/null || { lacks "a run of llama-bench on $1"; return; }
    # two objects, the prompt first
    set -- "$1" "$2" $(sed -n 's/.*"avg_ts": *\([0-9.]*\).*/\1/p' "$work/out")
    [ $# -ge 4 ] && echo "$2 llama.cpp-$1 $3 $4 0" >>"$work/results"
}
: >"$work/results"
for t in $threads; do
    i=0
    while [ "$i" -lt "$rounds" ]; do
        ours nvfp4 "$work/nvfp4" "$t"
        theirs nvfp4 "$t"
        ours nvfp4-int8-head "$work/nvfp4" "$t" --head int8
        theirs Q4_0 "$t"
        ours bf16 "$src" "$t"
        theirs bf16 "$t"
        theirs Q8_0 "$t"
        i=$((i + 1))
    done
done

# 4. one table: the best of each, and ratios to their NVFP4 and their Q4_0
grep -m 1 'model name' /proc/cpuinfo 2>/dev/null
printf '%-8s %-24s %12s %12s %10s %10s %10s %10s\n' threads model prompt/s generated/s p/NVFP4 g/NVFP4 p/Q4_0 g/Q4_0
awk '
    { k = $1 " " $2; if (!(k in p)) order[++n] = k; if ($3 > p[k]) p[k] = $3; if ($4 > g[k]) g[k] = $4 }
    function ratio(a, b) { return b > 0 ? sprintf("%.2f", a / b) : "-" }
    END {
        for (i = 1; i <= n; i++) {
            split(order[i], part, " ")
            a = part[1] " llama.cpp-nvfp4"; b = part[1] " llama.cpp-Q4_0"
            printf "%-8s %-24s %12.1f %12.1f %10s %10s %10s %10s\n", part[1], part[2], p[order[i]], g[order[i]],
                   ratio(p[order[i]], p[a]), ratio(g[order[i]], g[a]), ratio(p[order[i]], p[b]), ratio(g[order[i]], g[b])
        }
    }' "$work/results"
[ "$missing" = 0 ] || exit 2
