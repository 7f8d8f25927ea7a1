#!/bin/sh
# Every recipe on one model: what it costs and what is left. One row a recipe: score, size, time of calibration and writing.
#   recipes.sh [MODEL [DATA [CALIB]]]
# MODEL  a float folder; default: the demo model of examples/, decoded to BF16 (NVFP4 is then lossless, and the base of all rows)
# DATA   what `moq eval` takes: chat rows (exact answers, nll) or text (nll, perplexity); default: data/demo-eval.jsonl
# CALIB  what `moq quantize --calib` takes; default: every second row of DATA, and the others are judged; for text the comments of modelopt_q.h
# RECIPES="a b"  only these    SAMPLES=512 SEQ=512  of calibration    EVAL="--limit 50"  more for `moq eval`    MOQ=PATH  that program
# ACT=stored  how inputs are rounded while judging: as the folder says, which is what ModelOpt simulates; ACT=auto: as the fastest kernels do
here=$(cd "$(dirname "$0")" && pwd) || exit 2
moq=${MOQ:-$here/../tools/moq}
data=${2:-$here/data/demo-eval.jsonl}
dir=$(mktemp -d) || exit 2
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
[ -n "$MOQ" ] || make -s -C "$here/../tools" || exit 2
model=$1
if [ -z "$model" ]; then
    model=$dir/float
    "$moq" dequant "$here/../examples/demo-model" --out "$model" --dtype bf16 || exit 2
fi
calib=$3
if [ -z "$calib" ]; then # nothing is calibrated on what it is judged by
    case $data in
    *.jsonl)
        calib=$dir/calib.jsonl
        awk 'NR % 2 == 0' "$data" >"$calib"
        awk 'NR % 2 == 1' "$data" >"$dir/data.jsonl"
        data=$dir/data.jsonl
        ;;
    *)
        calib=$dir/calib.txt
        awk '/^ *\/\*/ { on = 1 }
            on { text = $0; gsub(/^ *\/?\*+|\*\/.*$/, "", text); gsub(/-----+/, "", text); if (text ~ /[a-z]/) print text }
            /\*\// { on = 0 }' "$here/../modelopt_q.h" >"$calib"
        ;;
    esac
fi

# score FOLDER: "exact 927/1000 nll 0.003412" or "nll 2.8731 ppl 17.69 tokens 4096", as three columns
score() {
    # shellcheck disable=SC2086
    "$moq" eval "$1" --data "$data" --act "${ACT:-stored}" $EVAL 2>"$dir/err" | tail -n 1 | awk '$1 == "exact" { print $2, $4 } $1 == "nll" { print $4, $2 }'
}
row() { printf '%-34s %10s %9s %9s %8s\n' "$@"; }
megabytes() { cat "$1"/*.safetensors | wc -c | awk '{ printf "%.3f", $1 / 1e6 }'; }

echo "$(basename "$model"), judged by ${2:-data/demo-eval.jsonl}, calibrated with $([ "$calib" = "$3" ] && echo "$3" || case $data in *.jsonl) echo "its other rows" ;; *) echo "the comments of modelopt_q.h" ;; esac)"
case $data in *.jsonl) row recipe exact nll MB seconds ;; *) row recipe perplexity nll MB seconds ;; esac
# shellcheck disable=SC2046
row "float" $(score "$model") "$(megabytes "$model")" -
failed=0
for r in ${RECIPES:-$("$moq" recipes | awk 'NR > 1 { print $1 }')}; do
    start=$(date +%s)
    rm -rf "$dir/q"
    if "$moq" quantize "$model" "$dir/q" --recipe "$r" --calib "$calib" --samples "${SAMPLES:-512}" --seq "${SEQ:-512}" >"$dir/out" 2>"$dir/err"; then
        seconds=$(($(date +%s) - start))
        got=$(score "$dir/q")
        # shellcheck disable=SC2086
        if [ -n "$got" ]; then row "$r" $got "$(megabytes "$dir/q")" "$seconds"; else row "$r" failed - - -; head -n 1 "$dir/err"; failed=1; fi
    elif grep -qE 'covers no layer|input features|output features' "$dir/err"; then
        row "$r" "-" "-" "-" "-" # not for this model
    else
        row "$r" failed - - -
        head -n 1 "$dir/err"
        failed=1
    fi
done
exit $failed
