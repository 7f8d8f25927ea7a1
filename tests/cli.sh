#!/bin/sh
# The command line: verbs, options, exit codes, the shape of every output. One line per check, then "N passed, N failed".
# MOQ_GOLDEN=DIR: golden checkpoints from there instead of data/golden.   MOQ=PATH: that program instead of a fresh build.
here=$(cd "$(dirname "$0")" && pwd) || exit 2
golden=${MOQ_GOLDEN:-$here/data/golden}
demo=$here/../examples/demo-model
moq=$here/../tools/moq
passed=0 failed=0
dir=$(mktemp -d) || exit 2
trap 'rm -rf "$dir"' EXIT
if [ -n "$MOQ" ]; then moq=$MOQ; elif ! make -s -C "$here/../tools" CC="${CC:-cc}" >"$dir/build" 2>&1; then
    cat "$dir/build"
    echo "0 passed, 1 failed"
    exit 1
fi

# check WHAT CONDITION...: the condition is a command
check() {
    what=$1
    shift
    if "$@" >"$dir/why" 2>&1; then
        passed=$((passed + 1))
        echo "ok      $what"
    else
        failed=$((failed + 1))
        echo "FAILED  $what: $*"
        head -n 5 "$dir/why" "$dir/out" "$dir/err" 2>/dev/null
    fi
}
# run ARGS...: output in out and err, exit code in code
run() {
    "$moq" "$@" >"$dir/out" 2>"$dir/err" </dev/null
    code=$?
}
is() { [ "$code" -eq "$1" ]; }
out() { grep -q -- "$1" "$dir/out"; }
err() { grep -q -- "$1" "$dir/err"; }
empty() { [ ! -s "$dir/$1" ]; }
lines() { [ "$(wc -l <"$dir/$1")" -eq "$2" ]; }
last() { tail -n 1 "$dir/out" | grep -qE -- "$1"; }
# refused TEXT: exit 2, nothing on stdout, one line "moq: ... TEXT ..." on stderr
refused() { is 2 && empty out && lines err 1 && grep -q "^moq: .*$1" "$dir/err"; }
# The tool's own strict parser judges its JSON: a sound file is refused only because it holds no token ids.
json() {
    cp "$dir/out" "$dir/judged.json" && lines_of=$(head -c 1 "$dir/out") && [ "$lines_of" = "{" ] &&
        "$moq" logits "$demo" --tokens "$dir/judged.json" --out "$dir/never.safetensors" 2>&1 | grep -q "no list of token ids"
}
# what expected.json says, in the form of dequant --hash
expected() {
    tr -d ' \n' <"$1/expected.json" | grep -oE '"[^"]+":\{"shape":\[[0-9,]+\],"fnv1a64":"[0-9a-f]{16}"' |
        sed -E 's/^"([^"]+)":\{"shape":\[([0-9,]+)\],"fnv1a64":"([0-9a-f]+)"$/\1,\2,\3/' |
        awk -F, '{ shape = $2; for (i = 3; i < NF; i++) shape = shape "x" $i; print $1 "\t" shape "\t" $NF }' | LC_ALL=C sort
}
all_hashes_right() {
    "$moq" dequant "$1" --hash >"$dir/hashes" || return 1
    LC_ALL=C sort -c -k1,1 -t "$(printf '\t')" "$dir/hashes" || return 1
    expected "$1" >"$dir/expected"
    [ -s "$dir/expected" ] && LC_ALL=C sort "$dir/hashes" | LC_ALL=C comm -13 - "$dir/expected" >"$dir/missing" && [ ! -s "$dir/missing" ] &&
        LC_ALL=C sort "$dir/hashes" | LC_ALL=C comm -23 - "$dir/expected" | grep -v '\]	' >"$dir/extra"
    [ ! -s "$dir/extra" ] && [ ! -s "$dir/missing" ]
}
# The relative error of two files with one tensor is below the limit (or they are equal).
near() {
    "$moq" diff "$1" "$2" >"$dir/near" && return 0
    [ $? -eq 1 ] && sed -n 's/.*relative_error //p' "$dir/near" | awk -v limit="$3" '{ n++; if (!($1 < limit)) bad = 1 } END { exit bad || n == 0 }'
}

# ---- help, version, wrong usage ----
run help
check "help" is 0
for v in inspect verify dequant logits eval run tokenize recipes diff bench selftest; do
    check "help lists $v" out "^  $v "
done
for v in inspect verify dequant logits eval run tokenize recipes diff bench selftest; do
    run help $v
    check "help $v has an example" out "^example: .*moq $v"
done
run --version
check "--version" out "^moq [0-9]"
check "--version names CPU features" out "^cpu: "
run
check "no verb" refused "help"
run help inspec
check "a slip in what help is asked for" refused "is inspect meant"
run nonsense
check "unknown verb" refused "nonsense"
src=$golden/sources/llama
run quantize "$src" "$dir/q" --recipe w4a16_nvfp4
check "quantize" is 0
run verify "$dir/q"
check "the quantized folder is sound" is 0
run quantize "$src" "$dir/q" --recipe w4a16_nvfp4
check "quantize does not overwrite" refused "$dir/q"
run quantize "$src" "$dir/q2" --recipe nvfp4
check "a recipe that needs data says so" refused "calibration"
check "and leaves nothing" test ! -e "$dir/q2"
run quantize "$src" "$dir/q2" --recipe nonsense
check "unknown recipe" refused "nonsense"
# like RECIPE MEANT: a name that is like a recipe's
like() {
    run quantize "$src" "$dir/q2" --recipe "$1"
    check "a recipe like $2: $1" refused "is $2 meant"
}
like nvfp nvfp4
like nvpf4_awq_lite nvfp4_awq_lite
like NVFP4-SVDQuant nvfp4_svdquant
like fp8_pb_wo fp8_2d_blockwise_weight_only
like awq int4_awq
run run "$src" --quantize mxpf4 --prompt x
check "--quantize: a slip in a recipe" refused "is mxfp4 meant"
run quantize "$src" "$dir/q2" --recipe mxfp4 --rule '*=mxfp9'
check "--rule: a slip in a recipe" refused "is mxfp4 meant"
for names in nvfp4, ,nvfp4 nvfp4,,fp8; do
    run autoquant "$src" --bits 6 --recipes "$names" --calib 1,2,3
    check "--recipes $names" refused "a name between commas is missing"
done
run autoquant "$src" --bits 6 --recipes nvfp4,fp9 --calib 1,2,3
check "--recipes: a slip in a recipe" refused "is fp8 meant"
run autoquant "$src" --bits 6 --recipes "$("$moq" recipes | sed -n '2,18s/ .*//p' | paste -sd , -)" --calib 1,2,3
check "--recipes: too many" refused "more than 16"
run autoquant "$src" --bits 6 --recipes nvfp4,NVFP4_DEFAULT_CFG --calib 1,2,3
check "--recipes: one twice" refused "names NVFP4_DEFAULT_CFG twice"
run autoquant "$src" --bits 1 --recipes nvfp4,fp8 --calib 1,2,3,4
check "autoquant: too few bits" refused ": --bits: 1 bits a weight are too few"
run autoquant "$src" "$dir/q2" --bits 6 --recipes nvfp4,fp8 --calib 1,2,3,4
cp "$dir/out" "$dir/chosen"
run inspect "$dir/q2"
check "autoquant says what its bits are of" grep -qE '^[0-9]+ units, [0-9.]+ bits a weight of linear layers \([0-9.]+ with embeddings\), score ' "$dir/chosen"
check "and the folder has those bits" out "^effective bits: $(sed -n 's/.*layers (\([0-9.]*\) with embeddings.*/\1/p' "$dir/chosen") over all"
rm -r "$dir/q2"
# calibration: every kind of data, what is saved is read back, refusals write nothing
calib=$src/inputs.json#calib
run quantize "$src" "$dir/q3" --recipe nvfp4_awq_lite --calib "$calib" --batch 4 --save-calibration "$dir/kept.safetensors"
check "quantize --calib" is 0
check "quantize says what it calibrated with" last ', calibrated with 16 rows, 384 tokens in all$'
run quantize "$src" "$dir/q4" --recipe nvfp4_awq_lite --calibration "$dir/kept.safetensors"
check "--calibration of what was saved" is 0
check "gives the same bytes" cmp "$dir/q3/model.safetensors" "$dir/q4/model.safetensors"
rm -rf "$dir/q4"
run quantize "$src" "$dir/q4" --recipe w4a16_nvfp4 --calib "$calib"
check "a recipe that needs no data is not called calibrated" last 'W4A16_NVFP4, .* in 1 file$'
rm -rf "$dir/q4"
run quantize "$src" "$dir/q4" --recipe nvfp4_awq_lite --calib "$calib" --batch 4 --max-memory 64M
check "--max-memory" is 0
check "changes no byte" cmp "$dir/q3/model.safetensors" "$dir/q4/model.safetensors"
rm -rf "$dir/q3" "$dir/q4"
run quantize "$src" "$dir/q4" --recipe nvfp4 --calib "$calib" --max-memory 1M
check "--max-memory that cannot be kept" refused "allow at least"
"$moq" dequant "$demo" --out "$dir/float" --dtype bf16 >/dev/null 2>&1
printf 'bring the red mug to the kitchen table, please, and then go to the hallway bench' >"$dir/calib.txt"
{
    echo '{"text": "bring the red mug"}'
    echo '{"system": "robot at garage", "user": "go to the kitchen", "assistant": "ok"}'
    echo '{"messages": [{"role": "user", "content": "go to the kitchen"}, {"role": "assistant", "content": "ok"}], "text": null}'
} >"$dir/calib.jsonl"
for data in "$dir/calib.txt" "$dir/calib.jsonl" 5,6,7,8,9; do
    rm -rf "$dir/q4"
    run quantize "$dir/float" "$dir/q4" --recipe fp8 --calib "$data" --samples 3 --seq 16
    check "quantize --calib $(basename "$data")" is 0
done
rm -rf "$dir/q4"
run quantize "$dir/float" "$dir/q4" --recipe fp8 --calib "$dir/calib.jsonl" --samples 2 --json
check "--samples is what it calibrates with" out '"calibration_rows": 2,'
check "and quantize --json is JSON" json
check "nothing to note" empty err
rm -rf "$dir/q4"
run quantize "$dir/float" "$dir/q4" --recipe fp8 --calib "$dir/calib.jsonl" --samples 5 --seq 16
check "fewer rows than --samples are noted" err "note: .*calib.jsonl: 3 rows of up to 16 tokens; --samples asked for 5"
check "in a line" lines err 1
rm -rf "$dir/q4"
{ cat "$dir/calib.jsonl"; for i in 1 2; do echo '{"text": "bring the red mug", "user": "go", "messages": [{"role": "user", "content": "go"}]}'; done; } >"$dir/both.jsonl"
run quantize "$dir/float" "$dir/q4" --recipe fp8 --calib "$dir/both.jsonl"
check "a row that is a text and a conversation" last 'calibrated with 5 rows'
check "is noted, once" lines err 1
check "with its line" err 'both.jsonl: line 4 has "text" and "messages"; of such rows only "text" is read'
rm -rf "$dir/q4"
run quantize "$src" "$dir/q4" --recipe fp8 --calib 5,999999
check "tokens outside the vocabulary" refused "5,999999: row 0: token 999999 is outside the vocabulary of 256"
echo '[[1, 2], [3, 9999]]' >"$dir/beyond.json"
run quantize "$src" "$dir/q4" --recipe fp8 --calib "$dir/beyond.json"
check "tokens of a file outside the vocabulary" refused "beyond.json: row 1: token 9999 is outside"
echo '[[1, 2], [3, -4]]' >"$dir/beyond.json"
run eval "$src" --data "$dir/beyond.json"
check "tokens of a file that are none" refused "beyond.json: row 1 is no list of token ids"
: >"$dir/empty.txt"
run quantize "$dir/float" "$dir/q4" --recipe fp8 --calib "$dir/empty.txt"
check "an empty calibration text" refused "empty.txt"
: >"$dir/empty.safetensors"
run quantize "$src" "$dir/q4" --recipe fp8 --calibration "$dir/empty.safetensors"
check "an empty calibration file" refused "empty.safetensors"
run quantize "$dir/float" "$dir/q4" --recipe fp8 --calib "$dir/nowhere.txt"
check "a calibration text that is not there" refused "nowhere"
run eval "$dir/float" --data nowhere
check "data without an ending that is not there" refused "--data nowhere: no such file"
run quantize "$dir/float" "$dir/q4" --recipe fp8 --calib nowhere
check "the same of --calib" refused "--calib nowhere: no such file"
run logits "$src" --tokens 1,2,x --out "$dir/never.safetensors"
check "a list with a word in it" refused "--tokens: .1,2,x. is no list of token ids: .x. is no number"
printf 'bring the red m\303\050g' >"$dir/latin.txt"
run quantize "$dir/float" "$dir/q4" --recipe fp8 --calib "$dir/latin.txt"
check "a calibration text that is not UTF-8" refused "latin.txt: byte 15 is no UTF-8"
head -c 3000 "$dir/float/model.safetensors" >"$dir/binary.txt"
run quantize "$dir/float" "$dir/q4" --recipe fp8 --calib "$dir/binary.txt"
check "a calibration text that is no text" refused "binary.txt: byte [0-9]* is no UTF-8"
printf '\377\376b\000r\000' >"$dir/wide.txt"
run eval "$demo" --data "$dir/wide.txt"
check "a text in UTF-16" refused "UTF-16"
run quantize "$dir/float" "$dir/q4" --recipe fp8 --calib 1,2,3 --samples 0
check "no samples at all" refused "--samples is a whole number from 1 to 2147483647, not '0'"
run quantize "$dir/float" "$dir/q4" --recipe fp8 --calib 1,2,3 --samples -1
check "a negative number of samples" refused "--samples is a whole number from 1 to 2147483647, not '-1'"
run quantize "$src" "$dir/q4" --recipe fp8 --calib 1,2,3 --calibration "$dir/kept.safetensors"
check "--calib and --calibration" refused "one of them"
run quantize "$src" "$dir/q4" --recipe fp8 --save-calibration "$dir/k"
check "--save-calibration without --calib" refused "calib"
run quantize "$src" "$dir/q4" --recipe fp8 --calib 1,2,3 --seq 99999999
check "--seq beyond the model" refused "was made for"
run quantize "$src" "$dir/slash//" --recipe mxfp4
check "quantize: slashes behind the target" is 0
check "quantize: the folder has its name" test -e "$dir/slash/config.json"
run quantize "$src" "" --recipe mxfp4
check "quantize: a target without a name" refused "without a name"
for option in recipe calibration save-calibration exclude; do
    run quantize "$src" "$dir/q4" --$option ""
    check "quantize: --$option is empty" refused "--$option is empty"
done
run quantize "$src" "$dir/q4" --recipe mxfp4 --act x
check "--act is judged where nothing runs, too" refused "auto, stored, wide or bf16"
run quantize "$src" "$dir/q4" --recipe mxfp4 --format x
check "an unknown container is told of its option" refused "--format: .x. is no container that can be written; use modelopt, compressed-tensors or gpt-oss"
ln -s nowhere "$dir/q4"
for to in q4 q4/; do
    run quantize "$src" "$dir/$to" --recipe mxfp4
    check "quantize: the target $to is a link to nothing" refused "q4.*is a link to nothing"
done
rm "$dir/q4"
: >"$dir/q4"
run quantize "$src" "$dir/q4/" --recipe mxfp4
check "quantize: the target is a file, with a slash behind it" refused "q4.*exists already"
rm "$dir/q4"
run quantize "$src" "$dir/no/such/parent" --recipe mxfp4
check "quantize: no parent" refused "parent"
mkdir "$dir/own" "$dir/own/more"
cp "$src"/* "$dir/own"
for to in own/q own/q// own/more/q own/more/../q; do
    run quantize "$dir/own" "$dir/$to" --recipe mxfp4
    check "quantize: $to is inside the source" refused "lies inside the source"
done
run dequant "$dir/own" --out "$dir/own/q"
check "dequant: a target inside the source" refused "lies inside the source"
run logits "$dir/own" --tokens 1,2 --out "$dir/own/model.safetensors"
check "logits: onto the source" refused "is a file of the source"
check "the source is as it was" cmp "$src/model.safetensors" "$dir/own/model.safetensors"
ln -s "$dir/own" "$dir/alias"
run quantize "$dir/alias" "$dir/own/more/q" --recipe mxfp4
check "quantize: inside the source by another name" refused "lies inside the source"
run logits "$dir/own" --tokens 1,2 --out "$dir/own/mine.safetensors"
check "logits: beside the source's files" is 0
rm -r "$dir/own" "$dir/alias"
check "refusals leave nothing" sh -c "! ls -d '$dir'/q4* '$dir'/*tmp* '$dir'/*spill* '$dir'/k 2>/dev/null"
(ulimit -f 20; "$moq" quantize "$src" "$dir/q4" --recipe mxfp4 >"$dir/out" 2>"$dir/err"); code=$?
check "no space for the folder" refused "q4"
(ulimit -f 20; "$moq" quantize "$src" "$dir/q4" --recipe fp8 --calib "$calib" --max-memory 64M --save-calibration "$dir/k" >"$dir/out" 2>"$dir/err"); code=$?
check "no space after a calibration" refused "q4"
check "no space: nothing half-written" sh -c "! ls -d '$dir'/q4* '$dir'/*tmp* '$dir'/*spill* 2>/dev/null"
# stopped in the middle of a calibration, which would take minutes
awk 'BEGIN { for (i = 0; i < 20000; i++) print "bring the red mug to the kitchen table, number", i }' >"$dir/long.txt"
for signal in INT TERM HUP; do
    case $signal in INT) status=130 ;; TERM) status=143 ;; HUP) status=129 ;; esac
    if [ $signal != INT ] && sh -c "kill -$signal \$\$; true"; then echo "note: $signal is ignored here (nohup), and so it stays: not tried"; continue; fi
    "$moq" quantize "$dir/float" "$dir/q4" --recipe nvfp4_awq_full --calib "$dir/long.txt" --max-memory 80M >"$dir/out" 2>"$dir/err" </dev/null &
    stopped=$!
    for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do ls -d "$dir"/q4.tmp* >/dev/null 2>&1 && break; sleep 0.5; done
    sleep 0.3
    kill -$signal $stopped
    wait $stopped 2>/dev/null
    code=$?
    check "$signal while calibrating ends as by the signal" is $status
    check "$signal: what is said" sh -c "[ ! -s '$dir/out' ] && [ \"\$(cat '$dir/err')\" = 'moq: stopped' ]"
    check "$signal: nothing half-written" sh -c "! ls -d '$dir'/q4* '$dir'/*tmp* '$dir'/*spill* 2>/dev/null"
done
# killed, it cannot clean up: the next run says so
"$moq" quantize "$dir/float" "$dir/q4" --recipe nvfp4_awq_full --calib "$dir/long.txt" >"$dir/out" 2>"$dir/err" </dev/null &
stopped=$!
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do ls -d "$dir"/q4.tmp* >/dev/null 2>&1 && break; sleep 0.5; done
mkdir "$dir/q4.tmp-$$-0" "$dir/q4.tmp-x" # of a program that runs, and no name of ours
kill -KILL $stopped
wait $stopped 2>/dev/null
run quantize "$src" "$dir/q4/" --recipe mxfp4
check "after a run that was killed" is 0
check "what it left is named" err "^moq: note: .*/q4.tmp-$stopped-0 is what a run that was killed left behind; remove it, unless another machine or container is writing it"
check "nothing else is" lines err 1
rm -r "$dir"/q4*
# what needs no numbers is refused before the calibration, which would take minutes
run quantize "$dir/float" "$dir/q4" --recipe nvfp4_awq_lite --calib "$dir/long.txt" --format compressed-tensors
check "a recipe that the container cannot hold" refused "no pre_quant_scale can stand beside a weight"
run quantize "$dir/float" "$dir/q4" --recipe nvfp4_awq_lite --calib "$dir/long.txt" --kv int8
check "a KV cache that no folder can say" refused "no folder says this KV cache"
run quantize "$dir/float" "$dir/q4" --recipe mxfp4 --kv fp8
check "a KV cache that needs text" refused "not calibrated; calibrate with text (--calib), give a file that has them (--calibration), or use fp8_cast"
run quantize "$dir/float" "$dir/q4" --recipe fp8 --calibration "$dir/long.txt"
check "text where recorded values are wanted" refused "long.txt: --calibration takes recorded values, a .safetensors file; text .* --calib"
run quantize "$dir/float" "$dir/q4" --recipe fp8 --calib "$dir/long.txt" --save-calibration "$dir/no/such/kept.safetensors"
check "a place where no calibration can be kept" refused "kept.safetensors: its parent folder"
run autoquant "$dir/float" "$dir/q4" --bits 6 --recipes nvfp4,fp8 --calib "$dir/long.txt" --save-search "$dir/no/such/scores.json"
check "a place where no scores can be kept" refused "scores.json: its parent folder"
check "early refusals leave nothing" sh -c "! ls -d '$dir'/q4* '$dir'/*tmp* 2>/dev/null"
# at load
run quantize "$src" "$dir/q4" --recipe w4a16_nvfp4
"$moq" logits "$dir/q4" --tokens 1,2,3 --out "$dir/a.safetensors"
run logits "$src" --quantize w4a16_nvfp4 --tokens 1,2,3 --out "$dir/b.safetensors"
check "logits --quantize" is 0
check "computes what the folder would" cmp "$dir/a.safetensors" "$dir/b.safetensors"
run run "$dir/float" --quantize mxfp4 --prompt hello --max-tokens 2
check "run --quantize" is 0
run run "$dir/float" --quantize mxfp4 --prompt hello --max-memory 100K
check "run --quantize stays below --max-memory" refused "are allowed"
run eval "$dir/float" --quantize int8_weight_only --data "$dir/calib.txt" --seq 8
check "eval --quantize" last '^nll '
run logits "$src" --quantize nvfp4_awq_lite --tokens 1,2 --out "$dir/never.safetensors"
check "--quantize with a recipe that needs data" refused "moq quantize"
run run "$demo" --quantize mxfp4
check "--quantize of a quantized folder" refused "quantized already"
run inspect
check "missing argument" refused "usage: moq inspect DIR"
run inspect a b
check "too many arguments" refused "one argument too many"
run inspect "$demo" --bogus
check "unknown option" refused "'--bogus'"
run inspect "$demo" --hash
check "option of another verb" refused "not for 'inspect'"
run inspect "$demo" --threads x
check "bad number" refused "whole number"
run inspect "$demo" --threads -3
check "number below 0" refused "--threads is a whole number from 0 to 1024, not '-3'"
run inspect "$demo" --context 99999999999
check "number beyond all" refused "--context is a whole number from 0 to 16777216"
run run "$demo" --prompt hello --top-p 1.5
check "share beyond 1" refused "--top-p is a number from 0 to 1, not '1.5'"
run run "$demo" --prompt hello --max-tokens=zero --max-tokens 1 --json --json
check "an option twice, the first a fault" refused "--max-tokens"
run run "$demo" --prompt hello --max-tokens 5 --max-tokens 1 --json --json
check "an option twice: the last one counts" is 0
run run "$demo" --prompt hello --temperature 1
check "another name of an option" refused "is --temp meant"
run run "$demo" --prompt hello --json-shema x
check "a slip in an option that begins like another" refused "is --json-schema meant"
run run "$demo" --prompt hello --max_tokens 1
check "another spelling of an option" refused "is --max-tokens meant"
run inspcet "$demo"
check "a slip in a verb" refused "is inspect meant"
# a model that is not that of config.json
cp -r "$demo" "$dir/other"
sed 's/"num_hidden_layers": *6/"num_hidden_layers": 8/' "$demo/config.json" >"$dir/other/config.json"
run verify "$dir/other"
check "verify: a layer too few is found" is 1
check "with what is missing" out "model.layers.6.input_layernorm.weight: the tensor is absent, but config.json describes a 'llama' of 8 layers"
sed 's/"quant_algo": *"NVFP4"/"quant_algo": "FP8"/' "$demo/hf_quant_config.json" >"$dir/other/hf_quant_config.json"
run verify "$dir/other"
check "verify: a description of other weights" out "dtype U8, expected F8_E4M3 (the description says 'FP8'); take weights and description from one export"
sed 's/"group_size": *16/"group_size": 32/' "$demo/hf_quant_config.json" >"$dir/other/hf_quant_config.json"
run verify "$dir/other"
check "verify: another group_size is the description's" out "^$dir/other/hf_quant_config.json: layer .*asks for groups of 32 (group_size), but .* has groups of 16"
cp "$demo/hf_quant_config.json" "$dir/other/"
# whole, but not for this engine: said on stderr, and no fault of the folder. changed WHAT FROM TO
changed() {
    sed "s/$2/$3/" "$demo/config.json" >"$dir/other/config.json"
    run verify "$dir/other"
    check "verify: $1 is no fault" is 0
    check "verify: $1 leaves stdout empty" empty out
}
changed "an unknown family" '"llama"' '"falcon"'
check "but it is said that run does not run it" err "^moq: note: $dir/other/config.json: model_type: .*'falcon' is unknown.*the checkpoint is whole, but .moq run. does not run it"
run verify "$dir/other" --json
check "verify --json: whole all the same" out '"sound": true'
check "verify --json: with the finding" out '"fatal": false, "code": "MOQ_E_UNSUPPORTED", "file": "config.json", "object": "model_type"'
run quantize "$dir/other" "$dir/q2" --recipe nvfp4
check "an unknown family: calibrated recipes name one that needs no data" err "^moq: .*or take recipe w4a16_nvfp4, which needs no data"
run quantize "$dir/other" "$dir/q2" --recipe nvfp4 --calib 1,2,3
check "and so does who cannot calibrate" err "^moq: .*recipes that need no data, as w4a16_nvfp4"
run quantize "$dir/other" "$dir/q2" --recipe w4a16_nvfp4
check "which works" is 0
rm -rf "$dir/q2"
changed "another hidden_act" '"silu"' '"quickgelu"'
check "hidden_act is told" err "hidden_act: 'quickgelu' is not implemented"
changed "a layer too many" '"num_hidden_layers": *6' '"num_hidden_layers": 5'
check "layers left over are told" err "model.layers.5.: tensors with this prefix are not used"
changed "a misspelled key" '"rms_norm_eps"' '"rms_norm_epss"'
check "a misspelled key is told" err "^moq: note: $dir/other/config.json: rms_norm_epss: nothing reads this key; is rms_norm_eps meant"
check "once" lines err 1
run run "$dir/other" --prompt x --max-tokens 1
check "by run" err "is rms_norm_eps meant"
check "run: once" lines err 1
run run "$dir/other" --prompt x --max-tokens 1 --max-memory 8G
check "run with a limit: once" lines err 1
run inspect "$dir/other"
check "by inspect" err "is rms_norm_eps meant"
check "inspect: once" lines err 1
cp "$demo/config.json" "$dir/other/"
rm "$dir/other/tokenizer.json"
run verify "$dir/other"
check "verify: no tokenizer is no fault" is 0
check "no tokenizer is told" err "tokenizer.json: is missing; .*cannot read and write text with it"
head -c 20000 "$demo/tokenizer.json" >"$dir/other/tokenizer.json"
run verify "$dir/other"
check "verify: half a tokenizer is one" is 1
check "with its place" out "^$dir/other/tokenizer.json: line [0-9]*, column [0-9]*: .*incomplete"
sed 's/: *684,*$/: 5000/' "$demo/tokenizer.json" >"$dir/other/tokenizer.json"
run verify "$dir/other"
check "verify: a tokenizer of another model" is 1
check "is told" out "vocab_size 1024; the two are not of one model"
added='{"id": 1030, "content": "<picture>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": SPECIAL}'
sed "s/\"added_tokens\": *\[/&$(echo "$added" | sed 's/SPECIAL/true/'),/" "$demo/tokenizer.json" >"$dir/other/tokenizer.json"
run verify "$dir/other"
check "verify: a special token past the embedding is another model's" is 0
run run "$dir/other" --prompt "hello" --max-tokens 4
check "and no hindrance" is 0
run logits "$dir/other" --tokens 3,1030 --out "$dir/never.safetensors"
check "but cannot be run" refused "token 1030 is outside the vocabulary of 1024"
sed "s/\"added_tokens\": *\[/&$(echo "$added" | sed 's/SPECIAL/false/'),/" "$demo/tokenizer.json" >"$dir/other/tokenizer.json"
run verify "$dir/other"
check "verify: one that plain text becomes is wrong" out "'<picture>' has the id 1030, but config.json has vocab_size 1024"
cp "$demo/tokenizer.json" "$dir/other/"
echo '{{ weird(messages) }}' >"$dir/other/chat_template.jinja"
run verify "$dir/other"
check "verify: an unknown chat template" is 0
check "is told with what does without" err "none of the known ones.*moq run --raw. and rows of {\"text\"}"
check "and without the list of known ones" err "known ones (.moq run. lists them)"
run run "$dir/other" --prompt x
check "run: an unknown chat template" refused "moq run --raw"
# memory: run refuses with the figures of inspect, but for the scratch memory of its backend, which is there by then (attention's is 0.15 GB here)
if [ "$(awk '/^MemTotal/ { print int($2 / 1e6) }' /proc/meminfo 2>/dev/null || echo 99)" -lt 64 ]; then
    run run "$demo" --context 16000000 --kv wide --prompt x
    check "a context beyond the machine's memory" refused "this machine has .* lower --context or --chunk"
    said=$(sed -n 's/.* \([0-9.]*\) run state.*/\1/p' "$dir/err")
    run inspect "$demo" --context 16000000 --kv wide
    check "and inspect counts the same run state and that scratch memory" awk -v a="$said" -v b="$(sed -n 's/.*run state \([0-9.]*\) GB.*/\1/p' "$dir/out")" 'BEGIN { exit !(a > 0.5 && a - b < 0.06 && b - a < 0.26) }'
fi
# folders of one name: the error is about the right one
mkdir -p "$dir/there/other"
run quantize "$dir/other" "$dir/there/other" --recipe w4a16_nvfp4
check "a target of the source's name" refused "$dir/there/other: exists already"
run run "$dir/nowhere" --prompt x
check "no folder: what to do" refused "no such folder; name one with config.json"
printf '<!DOCTYPE html>\n<html></html>\n' >"$dir/other/model.safetensors"
run verify "$dir/other"
check "verify: a page of the web" out "this looks like an HTML page: download the file again"
rm -r "$dir/other"
printf 'GGUF\003' >"$dir/model.gguf"
run run "$dir/model.gguf" --prompt x
check "a GGUF file" refused "model.gguf: is a file; .*GGUF is not read; take the folder"
printf 'only a few\nwords\n' >"$dir/words.txt"
run verify "$dir/words.txt"
check "verify: a text" out "words.txt: is no safetensors file; this looks like a text"
run verify "$dir/model.gguf"
check "verify: a GGUF file" out "this looks like a GGUF file: take the folder with .safetensors files"
cp "$demo/model.safetensors" "$dir/length.safetensors"
printf '\377\377' | dd of="$dir/length.safetensors" conv=notrunc 2>/dev/null
run verify "$dir/length.safetensors"
check "verify: a damaged length is blamed, not the text" out "the header says 65535 bytes, but its text ends after 19043 .*: the length (bytes 0 to 7) is damaged. Download the file again"
rm "$dir/length.safetensors"
mkdir -p "$dir/hub0/snapshots/0123" "$dir/hub0/refs"
run inspect "$dir/hub0"
check "a folder of a hub's cache" refused "hub0: in the folder there is no config.json.*in snapshots/NAME"
mkdir "$dir/pickled"
cp "$demo/config.json" "$dir/pickled"
run inspect "$dir/pickled"
check "a folder without weights" refused "neither model.safetensors nor .*; download the weights, too"
: >"$dir/pickled/pytorch_model.bin"
run quantize "$dir/pickled" "$dir/q4" --recipe mxfp4
check "a folder of pickles" refused "save the model as .safetensors"
cp "$demo/model.safetensors" "$dir/pickled"
run run "$dir/pickled" --prompt x
check "a pickle beside a model is not what is wrong" refused "tokenizer.json"
check "a pickle beside a model is not named" sh -c "! grep -q PyTorch '$dir/err'"
run inspect "$demo/model.safetensors"
check "a lone file" refused "moq verify"
mkdir "$dir/foreign"
cp "$demo"/*.safetensors "$demo/tokenizer_config.json" "$dir/foreign"
cp "$demo/config.json" "$dir/foreign"
run run "$dir/foreign" --prompt x
check "no tokenizer.json" refused "foreign/tokenizer.json: is missing; .moq run., .*need it: download it .*, or copy it from a folder of the same model"
sed 's/"model_type": *"[a-z0-9_]*"/"model_type": "foo"/' "$demo/config.json" >"$dir/foreign/config.json"
run inspect "$dir/foreign"
check "inspect of a model that run does not know" out "^.moq run. cannot: .*foo"
echo '{}' >"$dir/foreign/config.json"
run inspect "$dir/foreign"
check "inspect of a config.json that says nothing" out "^foreign: no model_type, "
run inspect "$demo" --act x
check "bad --act" refused "auto, stored, wide or bf16"
run inspect "$demo" --kernel x
check "bad --kernel" refused "--kernel: no kernels 'x'"
export MOQ_KERNEL=x
run run "$demo" --prompt x
check "bad MOQ_KERNEL" refused "MOQ_KERNEL in the environment: no kernels 'x'"
run inspect "$demo" --kernel plain
check "--kernel goes before it" is 0
unset MOQ_KERNEL
mkdir "$dir/slip"
cp "$demo"/* "$dir/slip"
sed 's/"quant_algo"/"quant_alog"/' "$demo/hf_quant_config.json" >"$dir/slip/hf_quant_config.json"
for v in verify inspect; do
    run $v "$dir/slip"
    check "$v: a misspelled key of a quantization block" err "slip/hf_quant_config.json: key 'quant_alog': nothing reads this key; is quant_algo meant"
done
rm "$dir/slip/hf_quant_config.json"
echo '{"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bit": 4}}' >"$dir/slip/config.json"
run verify "$dir/slip"
check "verify: a misspelled key that is missed" out "config.json: key 'bits': missing"
check "and why it is missed" err "key 'bit': nothing reads this key; is bits meant"
# what does not meet: no description, one of another folder; links that lead nowhere
rm "$dir/slip/config.json"
sed 's/"quantization_config"/"_quantization"/' "$golden/modelopt/llama-nvfp4/config.json" >"$dir/slip/config.json"
cp "$golden/modelopt/llama-nvfp4/model.safetensors" "$dir/slip/model.safetensors"
run verify "$dir/slip"
check "verify: nothing describes the codes" err "slip: layer 'model.layers.0.mlp.down_proj': neither hf_quant_config.json nor .*; its tensors say nvfp4 (14 such layers)"
run inspect "$dir/slip"
check "inspect: nothing describes the codes" out "quantized without a description, KV cache wide"
echo '{"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"model.layers": {"quant_algo": "NVFP4", "group_size": 16}, "model.layer": {"quant_algo": "FP8"}}}}' \
    >"$dir/slip/hf_quant_config.json"
run verify "$dir/slip"
check "verify: a layer that is not there" err "hf_quant_config.json: layer 'model.layer': quantized_layers names it, but no tensor does (1 such name)"
echo '{"quantization": "NVFP4"}' >"$dir/slip/hf_quant_config.json"
run verify "$dir/slip"
check "verify: a description that is no object" out "key 'quantization': an object is expected"
for f in hf_quant_config.json model.safetensors; do
    rm "$dir/slip/$f"
    ln -s ../blobs/0123 "$dir/slip/$f"
    run inspect "$dir/slip"
    check "a link that leads nowhere: $f" refused "slip/$f: is a link that leads to no file; download the folder again"
    rm "$dir/slip/$f"
    cp "$golden/modelopt/llama-nvfp4/$f" "$dir/slip/$f"
done
run inspect "$demo" --kv x
check "bad --kv: all that there are" refused "--kv is auto, wide, bf16, fp8, fp8_affine, int8, nvfp4, nvfp4_affine, nvfp4_rotate or mxfp4, not 'x'"
run quantize "$src" "$dir/q9" --recipe mxfp4 --kv x
check "bad --kv of a folder" refused "--kv is none, fp8, .* or nvfp4_rotate, not 'x'"
run help autoquant
check "help: --kv of a folder" out "^  --kv F .*none, fp8, fp8_affine, fp8_cast, .* or nvfp4_rotate\$"
run convert "$src" "$dir/q9" --to modelopt --kv fp8
check "convert keeps the KV cache" refused "--kv is not for 'convert'"
kv_bytes() { "$moq" inspect "$demo" --backend cpu --context 256 --kv "$1" --json | sed -n 's/.*"kv_bytes": *\([0-9]*\).*/\1/p'; }
wide=$(kv_bytes wide) half=$(kv_bytes bf16)
check "--kv bf16 takes half the bytes" test $((half * 2)) -lt $((wide + wide / 50)) -a $((half * 2)) -gt $((wide - wide / 50))
run logits "$demo" --tokens 5,6,7,8 --kv wide --out "$dir/wide.safetensors"
run logits "$demo" --tokens 5,6,7,8 --kv bf16 --backend cpu --out "$dir/half.safetensors"
check "--kv bf16: nearly the same" near "$dir/wide.safetensors" "$dir/half.safetensors" 0.02
run logits "$demo" --tokens 5,6,7,8 --kv int8 --out "$dir/int8.safetensors"
check "a folder without scales of keys and values: said" err "note: .*--kv: the checkpoint has no scales of keys and values; int8 takes 1/8"
check "said once" lines err 1
check "and int8 is of use all the same" near "$dir/wide.safetensors" "$dir/int8.safetensors" 0.3
run inspect "$demo" --backend tpu
check "bad --backend" refused "cpu, cuda or cuda:N"
if ! "$moq" --version | grep -q "^cuda: not built in"; then echo "note: built with CUDA: --backend cuda is not refused"; else
    run inspect "$demo" --backend cuda:1
    check "--backend cuda without CUDA" refused "no CUDA"
fi
run inspect "$dir/nowhere"
check "folder that is not there" refused "nowhere"

# ---- inspect, recipes ----
run inspect "$demo"
check "inspect" is 0
check "inspect: a module" out "^model.layers.0.mlp.up_proj  *nvfp4  *768x256  *4.50"
check "inspect: totals" out "^44 modules, 183 tensors in 1 file"
check "inspect: effective bits" out "^effective bits: 5.65"
check "inspect: memory plan" out "^memory for a context of 1024 tokens: weights .*, KV cache .*, repacked or copied weights .*, run state .*, tokenizer .*, together "
run run "$demo" --max-memory 1M --prompt hello
check "too little memory" refused "1000000 bytes are allowed, [0-9]* are needed: [0-9]* mapped weights"
run inspect "$demo"
together=$(sed -n 's/.*together \([0-9.]*\) MB.*/\1/p' "$dir/out")
run run "$demo" --max-memory "$(awk -v t="$together" 'BEGIN { printf "%d", t * 1e6 - 200000 }')" --prompt hello
check "run refuses less than inspect says" refused "are allowed"
run run "$demo" --max-memory x --prompt hello
check "no number of bytes" refused "needs a number of bytes"
run inspect "$demo" --json --context 777 --chunk 64
plan=$(sed -n '/"tokenizer_bytes"/,$s/.*"total_bytes": \([0-9]*\).*/\1/p' "$dir/out" | head -n 1)
run run "$demo" --context 777 --chunk 64 --max-memory 1M --prompt hello
check "inspect and run plan the same memory" refused "--max-memory: 1000000 bytes are allowed, $plan are needed.*(1 slot of 777 tokens).*; raise it, or take a folder"
run run "$demo" --context 777 --chunk 64 --max-memory $((plan - 1)) --prompt hello
check "weights that fit, but not the rest" refused "lower --context or --chunk, or choose a smaller --kv\$"
run run "$demo" --context 777 --chunk 64 --weights copied --max-memory $((plan + 1)) --prompt hello
check "copies that are too much" refused "repacked or copied.*; leave --weights mapped\$"
run run "$demo" --context 24 --prompt "$(yes hello | head -n 100 | tr '\n' ' ')"
check "an error names the option and the whole path" refused "$demo: context: the conversation has .* open with a larger --context, or begin anew\$"
if [ -w /dev/full ]; then
    for full in "run $demo --prompt hello --max-tokens 3" "bench --scheme nvfp4 --shape 256x512 --m 1" "inspect $demo"; do
        # shellcheck disable=SC2086
        "$moq" $full >/dev/full 2>"$dir/err" </dev/null; code=$?
        check "no space for what ${full%% *} prints" is 2
    done
    head -c 100000 "$demo/model.safetensors" >"$dir/short.safetensors"
    "$moq" verify "$dir/short.safetensors" >/dev/full 2>"$dir/err" </dev/null; code=$?
    check "no space for what verify finds" is 2
fi
for empty in "" "  "; do
    run run "$demo" --prompt "$empty"
    check "an empty prompt" refused "prompt is empty"
done
run run "$demo" --raw --prompt hi --max-tokens 12
cp "$dir/out" "$dir/again"
run run "$demo" --raw --prompt hi --max-tokens 12 --repeat-penalty 1 --presence-penalty 0 --frequency-penalty 0
check "run: penalties of 1 and 0 change nothing" cmp "$dir/out" "$dir/again"
for penalty in repeat presence frequency; do
    run run "$demo" --raw --prompt hi --max-tokens 12 --$penalty-penalty 50
    check "run --$penalty-penalty" is 0
    check "run --$penalty-penalty: greedy answers change, too" sh -c "! cmp -s '$dir/out' '$dir/again'"
done
run run "$demo" --prompt hi --repeat-penalty 1,1
check "run: a comma in a number" refused "--repeat-penalty is a number from 0 to 100, not '1,1'"
run run "$demo" --prompt hi --max-tokens 1 --context 300000
check "run: a context beyond the model's" err "more than the [0-9]* that the model was made for: .*; lower it to [0-9]*$"
run logits "$golden/sources/llama" --tokens 1,2 --out "$dir/free.safetensors" --quantize fp8
check "--quantize of a recipe that needs data names those that need none" refused "load with one that needs none: fp8_per_channel_per_token, .*, w4a16_nvfp4, .*mxfp8"
run help run
check "help run lists them" out "^  w4a16_nvfp4 nvfp4 "
sed -n '/^recipes that need no data/,/^$/p' "$dir/out" | sed 1d >"$dir/free"
for r in $(cat "$dir/free"); do
    run logits "$golden/sources/llama" --tokens 1,2 --out "$dir/free.safetensors" --quantize $r
    check "--quantize $r" is 0
done
(ulimit -v 24000 2>/dev/null && "$moq" run "$demo" --prompt hi --max-tokens 1 >"$dir/out" 2>"$dir/err")
code=$?
check "run: too little memory by ulimit is said in one line" refused "bytes were refused; .*\`ulimit -v\` allows this program 25 MB"
run run "$demo" --prompt hello --seed 3 --max-tokens 1
check "--seed without --temp" err "note: --seed changes nothing without --temp"
run run "$demo" --prompt hello --json-schema nowhere.json
check "a file that is not there" refused "nowhere.json: no such file; name it with its whole path"
run verify /dev/null
check "verify of a device" refused "/dev/null: is a device or a pipe; name a checkpoint folder"
run verify /dev/null --json
check "verify --json of a device" refused "/dev/null: is a device or a pipe"
run logits "$demo" --tokens "$dir/none.txt" --out "$dir/never.safetensors"
check "text where token ids belong" refused "none.txt: is text by its name.*moq tokenize"
run run "$demo"
check "nothing on standard input" refused "no prompt on standard input"
run run "$demo" --prompt "$(printf 'm\303\050g')"
check "a prompt that is not UTF-8" refused "no UTF-8 text: byte 1 is 0xc3"
printf 'a\000b' | "$moq" run "$demo" >"$dir/out" 2>"$dir/err"; code=$?
check "standard input that is no text" refused "byte 1 is 0x00"
"$moq" run "$demo" --max-tokens 1 >"$dir/out" 2>"$dir/err" </dev/zero; code=$?
check "a prompt without end" refused "standard input: 64 MB were read and it goes on"
for a in --json-schema --grammar; do
    run run "$demo" --prompt hello $a /dev/zero
    check "$a without end" refused "/dev/zero: 64 MB were read and it goes on"
done
"$moq" run "$demo" --prompt hello --max-tokens 5 --stats >"$dir/out" 2>&1 </dev/null
check "statistics come behind the answer, on a line of their own" sh -c "grep -q '^moq: prompt' '$dir/out'"
run run "$demo" --context 40 --stats --prompt "hello"
written=$(sed -n 's/.*generated \([0-9]*\) tokens.*/\1/p' "$dir/err")
check "an answer that fills the context is one" is 0
check "--stats and the note count the same tokens" err "the answer $written, of which the last was not run; set --max-tokens, or open with a larger --context\$"
check "--stats says that the context ended it" err "generated $written tokens, .* tokens/s, until the context was full\$"
run run "$demo" --max-tokens 3 --stats --prompt "hello"
check "--stats says that --max-tokens ended it" err "generated 3 tokens, .* tokens/s, up to --max-tokens\$"
run help run
check "help says when an answer ends" out "until the context is full, unless --max-tokens says less"
check "help says the default of --context" out "--context N .*default.*config.json says, at most 4096"
run inspect "$demo" --context 512 --explain
check "inspect --context" out "context of 512 tokens"
check "inspect --explain" out "up_proj.*: nvfp4"
check "inspect --explain: equal layers share a line" out "^model.layers.0-5.mlp.up_proj  *nvfp4  *768x256  *4.50[0-9]  *663600  *6  [a-z0-9]*: "
check "inspect --explain: all modules in few lines" test "$(wc -l <"$dir/out")" -le 14
run inspect "$golden/modelopt/mixtral-nvfp4" --explain
check "inspect --explain: layers and experts" out "^model.layers.0-1.block_sparse_moe.experts.0-3.w1  *nvfp4 .*  8  [a-z0-9]*: "
run inspect "$golden/modelopt/qwen3_moe-auto_kl_awq_8.0" --explain
check "inspect --explain: layers of other schemes keep their lines" out "^model.layers.1.mlp.experts.0-3.up_proj  *nvfp4 .*  4  [a-z0-9]*: "
check "inspect --explain: and those that differ in no more stand together" out "^model.layers.0-1.mlp.gate  *bf16 .*  2  [a-z0-9]*: "
if [ ! -f "$golden/sources/qwen3/config.json" ]; then echo "skipped inspect --head of a shared table: not in this set"; else # its output layer is the embedding
    run inspect "$golden/sources/qwen3"
    grep -E '^(effective bits|[0-9]* modules)' "$dir/out" >"$dir/as_stored"
    run inspect "$golden/sources/qwen3" --head int8
    check "inspect --head: a shared table as it would run" out '^lm_head  *w8a16 '
    grep -E '^(effective bits|[0-9]* modules)' "$dir/out" >"$dir/a"
    check "inspect --head: its weights are counted once" cmp "$dir/a" "$dir/as_stored"
fi
run inspect "$demo" --kv fp8
check "inspect --kv" out "KV cache 1.6 MB"
run inspect "$demo" --weights copied --backend cpu
check "inspect --weights: copies are counted" out "repacked or copied weights [1-9][0-9.]* MB"
run run "$demo" --weights printed --prompt a
check "run --weights: no such way" refused "there are mapped and copied"
run run "$demo" --weights --prompt a
check "run --weights without a value" refused "--weights needs a value before --prompt"
run run "$demo" --prompt=--weights --max-tokens 1
check "run --prompt=: a value that looks like an option" is 0
run inspect "$demo" --json
check "inspect --json is JSON" json
for k in '"model_type": "llama"' '"quant_algo": "NVFP4"' '"kv_cache": "wide"' '"effective_bits": 5.65' '"total_bytes": 3709776' \
    '{"name": "model.layers.5.mlp.down_proj", "scheme": "nvfp4", "shape": \[256, 768\], "bits": 4.50[0-9]*, "bytes": 110600, "kernel": "[a-z0-9]*"'; do
    check "inspect --json: $k" out "$k"
done
run inspect "$demo" --png "$dir/no/such/picture.png"
check "inspect: a picture that cannot be written leaves stdout empty" refused "picture.png"
run recipes
check "recipes" out "^nvfp4_awq_lite .*NVFP4_AWQ_LITE_CFG"
check "recipes of KV caches" out "^nvfp4_affine .*NVFP4_AFFINE_KV_CFG"
check "recipes: all of them" test "$(wc -l <"$dir/out")" -ge 36
run recipes --json
check "recipes --json is JSON" json

# ---- verify ----
run verify "$demo" --deep
check "verify: sound folder" is 0
check "verify: silent" empty out
mkdir "$dir/cut"
cp "$demo"/* "$dir/cut/"
chmod u+w "$dir/cut"/*
run verify "$dir/cut/model.safetensors"
check "verify: sound file" is 0
head -c 3000000 "$demo/model.safetensors" >"$dir/cut/model.safetensors"
run verify "$dir/cut"
check "verify: cut file" is 1
check "verify: one finding" lines out 1
check "verify: names folder, file, tensor" out "^$dir/cut/model.safetensors: tensor '"
run verify "$dir/cut/model.safetensors"
check "verify: cut file alone" is 1
mkdir "$dir/links" && cp "$demo/hf_quant_config.json" "$dir/links/" && ln -s nowhere "$dir/links/config.json"
run verify "$dir/links"
check "verify: a link to nothing is a fault of the folder" is 1
run verify "$dir/cut" --json
check "verify --json is JSON" json
check "verify --json: code" out '"code": "MOQ_E_TRUNCATED"'
run inspect "$dir/cut"
check "a refusal is one line" refused "cut/model.safetensors: tensor '"
run verify "$dir/nowhere"
check "verify: nothing there" refused "nowhere"

# ---- dequant ----
for e in "$golden"/*/*/expected.json; do
    d=${e%/expected.json}
    check "dequant --hash $(basename "$d")" all_hashes_right "$d"
done
run dequant "$golden/modelopt/llama-nvfp4" --hash --json
check "dequant --hash --json is JSON" json
run dequant "$demo"
check "dequant needs a purpose" refused "--hash or --out DST; try: moq help dequant"
for c in llama-nvfp4 llama-nvfp4_svdquant llama-int4_awq; do
    d=$golden/modelopt/$c
    run dequant "$d" --out "$dir/plain"
    check "dequant --out $c" is 0
    check "no quantization_config" sh -c "! grep -q quantization_config '$dir/plain/config.json'"
    run verify "$dir/plain"
    check "its folder is sound" is 0
    "$moq" logits "$d" --act wide --tokens 1,2,3,4,5 --out "$dir/a.safetensors"
    "$moq" logits "$dir/plain" --tokens 1,2,3,4,5 --out "$dir/b.safetensors"
    check "its logits are the layers' wide logits" near "$dir/a.safetensors" "$dir/b.safetensors" 0.00001
    rm -rf "$dir/plain"
done
run dequant "$demo" --out "$dir/plain" --dtype bf16
check "dequant --dtype bf16" is 0
check "dequant copies the tokenizer" cmp "$demo/tokenizer.json" "$dir/plain/tokenizer.json"
run inspect "$dir/plain"
check "dequant --dtype bf16: modules" out "up_proj  *bf16 "
run dequant "$demo" --out "$dir/plain"
check "dequant: the target is there" refused "exists already"
ln -s nowhere "$dir/x"
run dequant "$demo" --out "$dir/x/"
check "dequant: the target is a link to nothing" refused "x: is a link to nothing"
rm "$dir/x"
run dequant "$demo" --out "$dir/no/such/parent"
check "dequant: no parent" refused "parent"
run dequant "$demo" --out "$dir/x" --dtype f8
check "dequant: bad --dtype" refused "f32 or bf16"
check "dequant leaves nothing half-done" sh -c "! ls -d '$dir'/*tmp* '$dir'/x"

# ---- logits ----
echo '{"eval": [[1,2,3],[4,5,6]], "one": [1,2,3], "none": []}' >"$dir/tokens.json"
echo '[1,2,3]' >"$dir/list.json"
run logits "$demo" --tokens 1,2,3 --out "$dir/a.safetensors" --threads 1
check "logits" is 0
run logits "$demo" --tokens "$dir/tokens.json#one" --out "$dir/b.safetensors" --threads 3
check "logits: FILE.json#KEY, any number of threads, the same bytes" cmp "$dir/a.safetensors" "$dir/b.safetensors"
run logits "$demo" --tokens "$dir/list.json" --out "$dir/b.safetensors" --chunk 1
check "logits: FILE.json, token by token: other kernels for one row, inputs in BF16" near "$dir/a.safetensors" "$dir/b.safetensors" 0.01
run logits "$demo" --tokens "$dir/list.json" --out "$dir/a.safetensors" --act stored
run logits "$demo" --tokens "$dir/list.json" --out "$dir/b.safetensors" --act stored --chunk 1
check "logits: token by token, activations as stored" near "$dir/a.safetensors" "$dir/b.safetensors" 0.00001
run logits "$demo" --tokens "$dir/list.json" --out "$dir/b.safetensors" --act stored --kernel reference
check "logits: reference kernel" near "$dir/a.safetensors" "$dir/b.safetensors" 0.00001
run logits "$demo" --tokens "$dir/tokens.json#eval" --out "$dir/b.safetensors"
check "logits: two rows" grep -q '"logits":{"dtype":"F32","shape":\[2,3,1024\]' "$dir/b.safetensors"
run logits "$demo" --tokens 1,99999 --out "$dir/never.safetensors"
check "logits: token outside the vocabulary" refused "outside the vocabulary of 1024"
run logits "$demo" --tokens "$dir/tokens.json#none" --out "$dir/never.safetensors"
check "logits: empty list" refused "no list of token ids"
run logits "$demo" --tokens "$dir/tokens.json#nokey" --out "$dir/never.safetensors"
check "logits: no such key" refused "key nokey is no list .*; FILE.json#KEY takes one of its lists: eval, one, none$"
run logits "$demo" --tokens 1,2, --out "$dir/never.safetensors"
check "logits: a token is missing at the end" refused "a token is missing"
ln -s nowhere "$dir/link"
run logits "$demo" --tokens 1,2 --out "$dir/link"
check "logits: the target is a link to nothing" refused "link: is a link to nothing"
run inspect "$demo" --png "$dir/link"
check "inspect: the picture is a link to nothing" refused "link: is a link to nothing"
rm "$dir/link"
run logits "$demo" --tokens 1,2 --out /dev/null
check "logits: the target is a device" refused "is a device or a pipe"
echo '[1, 2]' >"$dir/read.json"
run logits "$demo" --tokens "$dir/read.json" --out "$dir/read.json"
check "logits: onto its tokens" refused "read.json: is read by this command"
check "the tokens are as they were" test "$(cat "$dir/read.json")" = '[1, 2]'
run logits "$demo" --tokens 1,2 --out "$dir"
check "logits: the target is a folder" refused "is a folder"
run logits "$demo" --tokens 1,2 --out "$dir/no/such.safetensors"
check "logits: no parent" refused "its parent folder"
run dequant "$demo" --out "$dir/nowhere/plain"
check "dequant: no parent" refused "nowhere/plain: its parent folder"
run dequant "$demo" --out "$dir/words.txt/plain"
check "dequant: a file in the place of the parent" refused "words.txt/plain: cannot be written: .*; choose a place that can be written"
run quantize "$src" "$dir/words.txt/plain" --recipe mxfp8
check "quantize: the same" refused "words.txt/plain: .*; correct it, or choose another place"
run logits "$demo" --tokens 1,2
check "logits needs --out" refused "--out"
check "a refusal writes nothing" test ! -e "$dir/never.safetensors"

# ---- run, tokenize ----
scene='green umbrella at hallway bench; green plate at bedroom drawer; green spoon at kitchen fridge; Chen at hallway coat rack; robot at garage toolbox'
answer='{"say":"Bringing the green plate to Chen.","plan":[{"do":"go","to":"bedroom drawer"},{"do":"pick","what":"green plate"},{"do":"go","to":"hallway coat rack"},{"do":"give","what":"green plate","to":"Chen"}]}'
run run "$demo" --system "$scene" --prompt "can you give the green plate to Chen?" --stats
check "run: the answer" test "$(cat "$dir/out")" = "$answer"
check "run --stats" err "^moq: prompt 40 tokens, .* tokens/s; generated"
echo "can you give the green plate to Chen?" | "$moq" run "$demo" --system "$scene" >"$dir/out" 2>"$dir/err"
check "run: prompt on stdin" test "$(cat "$dir/out")" = "$answer"
run run "$demo" --system "$scene" --prompt "can you give the green plate to Chen?" --json
check "run --json is JSON" json
check "run --json: tokens" out '"prompt_tokens": 40'
run run "$demo" --prompt "hello" --max-tokens 3 --json
check "run --max-tokens" out '"generated_tokens": 3'
check "run --json: why it ended" out '"end": "length"'
run run "$demo" --prompt "hello" --temp 1 --seed 7
cp "$dir/out" "$dir/first"
run run "$demo" --prompt "hello" --temp 1 --seed 7 --threads 1
check "run: same seed, same text" cmp "$dir/out" "$dir/first"
run run "$demo" --prompt hello --top-k 5 --max-tokens 2
check "run: sampling without --temp is noted" err "^moq: note: --top-k, --top-p and --min-p change nothing without --temp"
check "run: and answers" is 0
run run "$demo" hello
check "run: a prompt without its option" refused "'hello' is one argument too many: what to say comes after --prompt"
run run "$demo" --raw --prompt "<|system|>" --max-tokens 4
check "run --raw" is 0
cat >"$dir/schema.json" <<'END'
{"type": "object", "properties": {"say": {"type": "string", "maxLength": 80},
 "plan": {"type": "array", "items": {"type": "object", "properties": {"do": {"enum": ["go", "pick"]}, "to": {"type": "string"}}, "required": ["do"]}}},
 "required": ["say", "plan"], "additionalProperties": false}
END
run run "$demo" --system "$scene" --prompt "can you give the green plate to Chen?" --json-schema "$dir/schema.json"
check "run --json-schema is JSON" json
check "run --json-schema: members" out '"plan": *\['
run run "$demo" --prompt "hello" --json-schema "$dir/schema.json" --max-tokens 30 --temp 5 --seed 3
check "run --json-schema: complete within its tokens" json
"$moq" run "$demo" --prompt hello --json-schema "$dir/schema.json" --max-tokens 30 >"$dir/schema.file"
"$moq" run "$demo" --prompt hello --json-schema - --max-tokens 30 <"$dir/schema.json" >"$dir/schema.redirected"
cat "$dir/schema.json" | "$moq" run "$demo" --prompt hello --json-schema - --max-tokens 30 >"$dir/schema.piped"
cat "$dir/schema.json" | "$moq" run "$demo" --prompt hello --json-schema /dev/stdin --max-tokens 30 >"$dir/schema.named"
mkfifo "$dir/fifo"
cat "$dir/schema.json" >"$dir/fifo" &
"$moq" run "$demo" --prompt hello --json-schema "$dir/fifo" --max-tokens 30 >"$dir/schema.fifo"
for from in redirected piped named fifo; do
    check "run --json-schema: $from" cmp "$dir/schema.file" "$dir/schema.$from"
done
run run "$demo" --prompt hello --json-schema -
check "run --json-schema: nothing on stdin" refused "standard input: it is empty"
run run "$demo" --json-schema -
check "run --json-schema: prompt and schema on stdin" refused "standard input cannot be the prompt and the schema; give --prompt"
run run "$demo" --prompt hello --grammar "$dir"
check "run --grammar: a folder" refused "is a folder; expected a regular file"
echo '{"type": "objct"}' >"$dir/wrong.json"
run run "$demo" --prompt "hello" --json-schema "$dir/wrong.json"
check "run --json-schema: no type" refused "wrong.json: #/type: 'objct' is no type (is 'object' meant?); types are null,"
run run "$demo" --prompt "hello" --json-schema "$dir/schema.json" --max-tokens 4
check "run --json-schema: too few tokens" refused "shortest"
echo '{"type": "object", "required": ["a"], "additionalProperties": false}' >"$dir/schema.json"
run run "$demo" --prompt "hello" --json-schema "$dir/schema.json"
check "run --json-schema: impossible" refused "#/required"
echo 'root' >"$dir/yes.gbnf"
run run "$demo" --prompt "hello" --grammar "$dir/yes.gbnf"
check "run --grammar: one that stops in the middle" refused "yes.gbnf: grammar: line [12], at its end: ::= was expected"
echo 'root ::= "yes" | "no"' >"$dir/yes.gbnf"
run run "$demo" --prompt "hello" --grammar "$dir/yes.gbnf"
check "run --grammar" grep -qE "^(yes|no)$" "$dir/out"
printf 'bring the red mug\n\n  two  spaces, 123 and <|end|>\nlast' >"$dir/text"
run tokenize "$demo" --file "$dir/text"
check "tokenize: a line for a line" lines out 4
check "tokenize: only ids" sh -c "! grep -vE '^([0-9]+(,[0-9]+)*)?\$' '$dir/out'"
cp "$dir/out" "$dir/ids"
run tokenize "$demo" --decode --file "$dir/ids"
printf '\n' >>"$dir/text"
check "tokenize --decode: the reverse" cmp "$dir/out" "$dir/text"
echo "1,x" >"$dir/ids"
run tokenize "$demo" --decode --file "$dir/ids"
check "tokenize --decode: not ids" is 2
echo "1,99999" >"$dir/ids"
run tokenize "$demo" --decode --file "$dir/ids"
check "tokenize --decode: no id of this tokenizer" refused "token 99999 is none of the tokenizer's 685"
run tokenize "$demo" --file "$dir"
check "tokenize: a folder" refused "$dir: "

# ---- eval ----
escaped=$(printf '%s' "$answer" | sed 's/"/\\"/g')
{
    printf '{"system": "%s", "user": "can you give the green plate to Chen?", "assistant": "%s"}\n' "$scene" "$escaped"
    printf '{"messages": [{"role": "system", "content": "%s"}, {"role": "user", "content": "can you give the green plate to Chen?"}, {"role": "assistant", "content": "%s"}]}\n' "$scene" "$escaped"
    printf '{"system": "%s", "user": "can you give the green plate to Chen?", "assistant": "no"}\n' "$scene"
} >"$dir/rows.jsonl"
run eval "$demo" --data "$dir/rows.jsonl"
check "eval: chat rows" last '^exact 2/3 nll [0-9]+\.[0-9]+$'
run eval "$demo" --data "$dir/rows.jsonl" --limit 2 --against "$demo"
check "eval --limit --against" last '^exact 2/2 nll 0\.00[0-9]* kl -?0\.000000$'
run eval "$demo" --data "$dir/rows.jsonl" --json
check "eval --json is JSON" json
check "eval --json: exact" out '"exact": 2'
printf 'the red mug is at the kitchen table; the green key is at the hallway bench' >"$dir/text.txt"
: >"$dir/nothing.txt"
run eval "$demo" --data "$dir/nothing.txt"
check "eval: an empty file" refused "nothing.txt: the file is empty; give text of at least two tokens"
run eval "$demo" --data /dev/null
check "eval: a device" refused "'/dev/null' is a device or a pipe; text is read from"
run eval "$demo" --data "$dir/text.txt" --seq 8
check "eval: text" last '^nll [0-9]+\.[0-9]+ ppl [0-9]+\.[0-9]+ tokens [0-9]+$'
run eval "$demo" --data 5,6,7,8,9,10,11,12,13 --seq 4
check "eval: tokens; a window of one is dropped" last ' tokens 8$'
run eval "$demo" --data 5,6,7 --seq 1
check "eval: windows of one token" refused "at least 2 tokens"
run eval "$demo" --data 5,,6
check "eval: a token that is missing" refused "no list of token ids"
echo 'no JSON' >"$dir/bad.jsonl"
run eval "$demo" --data "$dir/bad.jsonl"
check "eval: a row that is no JSON" refused 'bad.jsonl: line 1, column 1: .*; a row is {"text"}, '
echo '{"nothing": 1}' >"$dir/bad.jsonl"
run eval "$demo" --data "$dir/bad.jsonl"
check "eval: a row of another kind" refused 'bad.jsonl: line 1 has neither "text" nor messages; a row is {"text"}'
# row MESSAGE LINE: that line after a good one is refused by who scores and by who calibrates
row() {
    { head -n 1 "$dir/rows.jsonl"; printf '%s\n' "$2"; } >"$dir/bad.jsonl"
    run eval "$demo" --data "$dir/bad.jsonl"
    check "eval: $2" refused "bad.jsonl: line 2$1"
    run quantize "$dir/float" "$dir/q4" --recipe fp8 --calib "$dir/bad.jsonl"
    check "quantize: $2" refused "bad.jsonl: line 2$1"
}
row ', column 10: found the end of the text.*a row is a line, whole' '{"user": '
row ': .*the second time with the value at column 23' '{"text": "a", "text": "b"}'
row ': the key "usr" would be ignored; write "user"' '{"system": "a", "usr": "b", "assistant": "c"}'
row ': the key "txet" would be ignored; write "text"' '{"txet": "a"}'
row ': the key "users" would be ignored; write "user"' '{"users": "a", "assistant": "c"}'
row ': "assistant" is no string' '{"user": "a", "assistant": 5}'
row ': "messages" is no list' '{"messages": "a"}'
row ': message 2 has no "content"' '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "contents": "b"}]}'
row ': message 1 has the role "usr"; write "user"' '{"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]}'
{ head -n 1 "$dir/rows.jsonl"; echo '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "test": 1, "users": null, "text": null}'; } >"$dir/own.jsonl"
run eval "$demo" --data "$dir/own.jsonl"
check "eval: keys of one's own, and null for none" is 0
{ head -n 1 "$dir/rows.jsonl"; echo '{"text": "bring the red mug"}'; } >"$dir/bad.jsonl"
run eval "$demo" --data "$dir/bad.jsonl"
check "eval: texts among conversations" refused "line 2: texts and conversations are not scored together"
run eval "$demo" --data "$dir/nowhere.txt"
check "eval: no data" refused "nowhere"

# ---- export and convert ----
src=$golden/sources/llama
"$moq" quantize "$src" "$dir/x" --recipe w4a16_nvfp4 >/dev/null 2>&1
# a cache of links to blobs that may not be written: what belongs to the model goes along, weights in other formats stay, a link to nothing is an error
mkdir -p "$dir/hub/blobs" "$dir/hub/snapshot/additional_chat_templates" "$dir/hub/snapshot/onnx"
for f in "$src"/*; do cp "$f" "$dir/hub/blobs/" && ln -s "../blobs/$(basename "$f")" "$dir/hub/snapshot/"; done
for f in tokenizer.json chat_template.jinja merges.txt modeling_own.py pytorch_model.bin model.onnx; do
    echo "$f" >"$dir/hub/blobs/$f" && ln -s "../blobs/$f" "$dir/hub/snapshot/"
done
echo tools >"$dir/hub/snapshot/additional_chat_templates/tool_use.jinja"
chmod -R a-w "$dir/hub"
run quantize "$dir/hub/snapshot" "$dir/x3" --recipe w4a16_nvfp4
check "quantize from links" is 0
check "the same weights" cmp "$dir/x/model.safetensors" "$dir/x3/model.safetensors"
for f in tokenizer.json chat_template.jinja merges.txt modeling_own.py additional_chat_templates/tool_use.jinja; do
    check "copied: $f" cmp "$dir/hub/snapshot/$f" "$dir/x3/$f"
done
check "no other weights" test ! -e "$dir/x3/pytorch_model.bin" -a ! -e "$dir/x3/model.onnx" -a ! -e "$dir/x3/onnx" -a ! -L "$dir/x3/config.json"
chmod -R u+w "$dir/hub" "$dir/x3"
rm -r "$dir/x3" "$dir/hub/blobs/merges.txt"
run quantize "$dir/hub/snapshot" "$dir/x3" --recipe w4a16_nvfp4
check "a link to nothing" refused "hub/snapshot/merges.txt"
check "and nothing is left" test ! -e "$dir/x3" -a -z "$(find "$dir" -name 'x3.tmp*')"
run quantize "$src" "$dir/x3" --recipe w4a16_nvfp4 --shard 100K
check "shards" test -f "$dir/x3/model-00001-of-00004.safetensors" -a -f "$dir/x3/model.safetensors.index.json"
run diff "$dir/x" "$dir/x3"
check "shards hold the same tensors" is 0
run quantize "$dir/x3" "$dir/x4" --recipe int8_weight_only
check "from shards" is 0
for c in modelopt/llama-fp8:compressed-tensors compressed-tensors/llama-fp8-kv:modelopt foreign/deepseek_v3-fp8-block:modelopt foreign/llama-awq-g128:compressed-tensors; do
    from=$golden/${c%%:*} to=${c##*:}
    if [ ! -d "$from" ]; then echo "skipped convert of ${c%%:*}: not in this set"; continue; fi
    run convert "$from" "$dir/conv" --to "$to"
    check "convert $c" is 0
    "$moq" dequant "$from" --hash >"$dir/a" && "$moq" dequant "$dir/conv" --hash >"$dir/b"
    check "convert $c keeps every weight" cmp "$dir/a" "$dir/b"
    rm -rf "$dir/conv"
done
run convert "$dir/x" "$dir/conv" --to modelopt
check "convert: nothing to do" refused "$dir/x: is a ModelOpt folder already"
run convert "$src" "$dir/conv" --to modelopt
check "convert: nothing quantized" refused "moq quantize"
run convert "$dir/x" "$dir/conv" --format gguf
check "--format where --to is the word" refused ".gguf. is no container that can be written; use modelopt"
run convert "$dir/x" "$dir/conv" --to gguf
check "convert: unknown container" refused "--to: .gguf. is no container that can be written; use modelopt"
check "convert leaves nothing" test ! -e "$dir/conv"

# ---- diff ----
run diff "$demo" "$demo"
check "diff: the same folder" is 0
check "diff: last line" last '^equal 183/183 tensors$'
run diff "$golden/modelopt/llama-nvfp4" "$golden/modelopt/llama-nvfp4_svdquant" --against "$golden/sources/llama"
check "diff: other folders" is 1
check "diff: last line of others" last '^equal [0-9]+/[0-9]+ tensors$'
check "diff --against" out "snr_a_db [0-9.]*	snr_b_db"
check "diff: one side only" out "only in "
run diff "$golden/modelopt/llama-nvfp4" "$golden/sources/llama"
check "diff: types and shapes where they differ" out "self_attn.q_proj.weight	U8 \[128, 64\] against BF16 \[128, 128\]"
run diff "$demo" "$demo" --json
check "diff --json is JSON" json
run diff "$golden/modelopt/llama-fp8" "$golden/modelopt/llama-fp8_pb_wo" --against "$golden/sources/llama"
check "diff: bytes, error and ratios as computed elsewhere" out "self_attn.q_proj.weight	242 of 16384 bytes differ	relative_error 0.00923071	snr_a_db 31.486	snr_b_db 31.5084"
check "diff: equal tensors as counted elsewhere" last '^equal 11/49 tensors$'
run diff "$golden/modelopt/llama-fp8" "$golden/modelopt/llama-fp8_pb_wo" --against "$golden/sources/llama" --json
check "diff --json with a source" out '"differing_bytes": 242, "bytes": 16384, "relative_error": 0.00923071'
check "diff --json is JSON there too" json
run convert "$golden/modelopt/llama-nvfp4" "$dir/conv" --to compressed-tensors
run diff "$golden/modelopt/llama-nvfp4" "$dir/conv"
check "diff across containers names what compares them" err "note: 14 layers are stored under other names in .*conv; .moq dequant DIR --hash"
rm -r "$dir/conv"
run diff "$golden/modelopt/llama-fp8" "$golden/modelopt/llama-fp8_pb_wo" --brief
check "diff --brief: what is equal is not listed" lines out 39
check "diff --brief: the last line as ever" last '^equal 11/49 tensors$'
signs() { # NAME, the second of two BF16 values as printf takes it
    printf '\076\000\000\000\000\000\000\000{"t":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}       ' >"$dir/$1.safetensors"
    printf "\\200\\077$2" >>"$dir/$1.safetensors"
}
signs plus '\000\000'
signs minus '\000\200'
run diff "$dir/plus.safetensors" "$dir/minus.safetensors"
check "diff: signs of zeros are said to be all" out "relative_error 0	only the signs of zeros differ"
run diff "$dir/plus.safetensors" "$dir/minus.safetensors" --json
check "diff --json: the same values" out '"same_values": true'
run diff "$demo" "$dir/nowhere"
check "diff: nothing there" refused "nowhere: no such folder or file; name two checkpoint folders"

# ---- bench, selftest ----
run bench --scheme nvfp4 --scheme int8 --shape 256x512 --m 1,4 --json
check "bench --json is JSON" json
for k in '"device": "' '"threads": ' '{"scheme": "int8", "shape": \[256, 512\], "m": 4, "us": [0-9.]*, "gbps": [0-9.]*, "gflops": [0-9.]*, "read_ratio": [0-9.]*, "peak_ratio": [0-9.nul]*, "kernel": "[a-z0-9]*", "copies": [0-9]*}'; do
    check "bench --json: $k" out "$k"
done
run bench --scheme bf16 --shape 8x128 --m 1,512 --copies 3 --threads 8 --json
# every read_ratio, two of them, is sane; a plain read takes as long at both m: within a factor of 10, for other work shares the machine
sane_reads() {
    tr ',' '\n' <"$dir/out" | awk '/"us":/ { us = $NF } /"read_ratio":/ { n++; bad = bad || !($NF > 0 && $NF < 3); plain[n] = us * $NF }
        END { exit bad || n != 2 || plain[1] > 10 * plain[2] || plain[2] > 10 * plain[1] }'
}
check "bench: reads with 8 threads" sane_reads
run bench --scheme bf16 --shape 1048576x1048576 --m 1
check "bench: a layer beyond the memory" refused "--shape 1048576x1048576: 2199023255552 bytes of bf16 are more than a quarter of the memory"
run bench --scheme nvfp4 --shape 256x512 --m 1 --copies 257
check "bench: too many copies" refused "--copies is a whole number from 0 to 256"
run bench "$demo"
check "bench DIR" out 'prompt [0-9.]* tokens/s .*, generation [0-9.]* tokens/s'
run bench "$demo" --json
check "bench DIR --json is JSON" json
check "bench DIR --json: speed" out '"generated_tokens_per_second": [0-9]'
run bench --scheme nonsense --json
check "bench: unknown kind" refused "nonsense"
run bench --scheme nvfp4 --shape 10x10 --json
check "bench: bad shape" refused "10x10"
for m in 0 x -1 1.5 1,,2 1, ,1 65537 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17; do
    run bench --m $m
    check "bench: bad --m $m" refused "--m is 1 to 16 numbers of rows from 1 to 65536.* not '$m'"
done
run bench --kv fp8 --m 1
check "bench: --kv without a folder" refused "moq bench DIR --kv"
run bench "$dir/nowhere" --json
check "bench: no folder" refused "nowhere"
run selftest
check "selftest" is 0
check "selftest: last line" last '^[1-9][0-9]* passed, 0 failed$'
run selftest --json
check "selftest --json is JSON" json
run selftest --backend gpu
check "selftest of no backend" refused "--backend is cpu, cuda or cuda:N, not 'gpu'"

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
