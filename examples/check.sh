#!/bin/sh
# Runs the examples on demo-model and compares what they print. Ends with "N passed, N failed".
cd "$(dirname "$0")" || exit 2
passed=0 failed=0
out=$(mktemp) || exit 2
trap 'rm -f "$out"' EXIT

# expect WHAT LINE: the line, whole, must be in $out
expect() {
    if grep -qxF -- "$2" "$out"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED $1: expected the line"
        echo "$2"
        echo "in"
        cat "$out"
    fi
}

./hello >"$out" 2>&1
expect hello "model.layers.0.mlp.up_proj: nvfp4, 768 x 256, |y| = 33.4979"
./hello demo-model lm_head >"$out" 2>&1
expect "hello with a module" "lm_head: bf16, 1024 x 256, |y| = 36.7396"
./hello no-such-folder >"$out" 2>&1
if [ $? -eq 1 ] && [ "$(wc -l <"$out")" -eq 1 ] && grep -q no-such-folder "$out"; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED hello without a folder"; fi

./chat >"$out" 2>&1
expect "chat 1" 'robot  {"say":"Bringing the green plate to Chen.","plan":[{"do":"go","to":"bedroom drawer"},{"do":"pick","what":"green plate"},{"do":"go","to":"hallway coat rack"},{"do":"give","what":"green plate","to":"Chen"}]}'
expect "chat 2" 'robot  {"say":"Moving the purple key and green mug.","plan":[{"do":"pick","what":"purple key"},{"do":"go","to":"hallway coat rack"},{"do":"place","what":"purple key","on":"hallway coat rack"},{"do":"go","to":"kitchen counter"},{"do":"pick","what":"green mug"},{"do":"go","to":"hallway coat rack"},{"do":"place","what":"green mug","on":"hallway coat rack"}]}'
expect "chat 3" 'robot  {"say":"I cannot see a black pillow.","plan":[]}'
if [ "$(grep -c 'tokens per second' "$out")" -eq 3 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED chat: three speeds"; fi

./robot >"$out" 2>&1
expect "robot: a plan that fails" "  failed: pick red mug (it is not here)"
expect "robot: and the next one" "  done:   place red mug on hallway bench"
expect "robot: puts down what it cannot give" "  done:   put down yellow book at kitchen table"
if [ "$(grep -c 'finished after' "$out")" -eq 3 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED robot: three errands"; cat "$out"; fi
./robot --eval ../tests/data/demo-eval.jsonl >"$out" 2>&1
# every plan is valid; how many are right differs by a few with the rounding of the processor's kernels
right=$(sed -n 's/^200 requests: 200 valid plans, [0-9]* carried out, \([0-9]*\) exactly right$/\1/p' "$out")
if [ "${right:-0}" -ge 184 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED robot: 200 requests"; cat "$out"; fi
grep '^200 requests' "$out"

# four seconds of a game: every robot has been asked, the first one has planned what it plans alone, and frames were counted
./game demo-model 4 >"$out" 2>&1
if grep -q '^[0-9]* frames in .* late; work of a frame' "$out"; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED game: statistics"; cat "$out"; fi
if [ "$(grep -c '^[A-Z][a-z]*, asked [1-9][0-9]* times: {"say":' "$out")" -eq 3 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED game: three robots speak"; cat "$out"; fi
tail -n 1 "$out"

# the same chat on a GPU, where one line differs
if diff chat.c cuda.c | grep '^>' | grep -v '^> *\(cuda.c\|nvcc\|/\?\*\|./cuda\)' | grep -q 'moq_cuda_backend'; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED cuda.c: the line that differs"; fi
if [ -x ./cuda ]; then
    ./cuda >"$out" 2>&1
    if grep -q '^robot  {"say":"Bringing the green plate to Chen."' "$out"; then passed=$((passed + 1))
    elif grep -qi 'cuda' "$out"; then echo "cuda: built, not run: $(head -n 1 "$out")"
    else failed=$((failed + 1)); echo "FAILED cuda"; cat "$out"; fi
else
    echo "cuda: skipped, it is built here where nvcc and a GPU are"
fi

# the demo model once more, in FP8: the folder opens, a layer answers nearly as before, and a target that exists is refused
work=$(mktemp -d) || exit 2
trap 'rm -rf "$out" "$work"' EXIT
./quantize demo-model "$work/fp8" fp8 ../tests/data/demo-eval.jsonl >"$out" 2>/dev/null
expect quantize "$work/fp8: fp8, calibrated with 64 rows"
./hello "$work/fp8" >"$out" 2>&1
if grep -q '^model.layers.0.mlp.up_proj: fp8, 768 x 256, |y| = 33\.[4-6]' "$out"; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED hello on its folder"; cat "$out"; fi
if ./quantize demo-model "$work/fp8" fp8 ../tests/data/demo-eval.jsonl >"$out" 2>/dev/null || ! grep -q 'exists already' "$out"; then
    failed=$((failed + 1)); echo "FAILED quantize onto a folder"
else passed=$((passed + 1)); fi

# a row that is none: its place is said, and nothing is written
for row in '{"user": ' '{"text": "go"}'; do
    { head -n 1 ../tests/data/demo-eval.jsonl; printf '%s\n' "$row"; } >"$work/rows.jsonl"
    if ./quantize demo-model "$work/none" fp8 "$work/rows.jsonl" >"$out" 2>/dev/null || ! grep -q 'rows.jsonl, row 2: ' "$out" || [ -e "$work/none" ]; then
        failed=$((failed + 1)); echo "FAILED quantize with the row $row"; cat "$out"
    else passed=$((passed + 1)); fi
done

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
