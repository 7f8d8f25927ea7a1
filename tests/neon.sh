#!/bin/sh
# The kernels of AArch64 under qemu-user: `moq selftest`, test_cpu and test_backend on a processor with dot products, matrix
# instructions and BF16, on one with dot products alone, and on one with neither. Needs aarch64-linux-gnu-gcc (or CROSS) and qemu-aarch64.
cd "$(dirname "$0")" || exit 2
B=build/neon
CROSS=${CROSS:-aarch64-linux-gnu-gcc}
pass=0 fail=0
for tool in "$CROSS" qemu-aarch64; do
    if ! command -v "$tool" >/dev/null 2>&1; then echo "skipped: $tool is not installed"; echo "0 passed, 0 failed, 1 skipped"; exit 0; fi
done
mkdir -p $B
here=$(pwd)
golden=${MOQ_GOLDEN:-$here/data/golden}
"$CROSS" -std=c99 -O2 -static -DMOQ_STATIC ../tools/moq.c -o $B/moq -lm -pthread || exit 1
for t in test_cpu test_backend; do
    "$CROSS" -std=c99 -O2 -static -DMOQ_STATIC -DTEST_DIR="\"$here\"" -DGOLDEN_DIR="\"$golden\"" $t.c -o $B/$t -lm -pthread || exit 1
done

# run CPU SETS: every set of kernels that this processor must be given, and nothing fails
run() {
    for set in $2; do
        if qemu-aarch64 -cpu "$1" $B/moq selftest --kernel "$set" >$B/log 2>&1; then pass=$((pass + 1)); else fail=$((fail + 1)); echo "FAILED $1, kernel $set"; fi
        echo "note: $1, kernel $set: $(tail -n 1 $B/log)"
    done
    for set in $3; do
        qemu-aarch64 -cpu "$1" $B/moq selftest --kernel "$set" >$B/log 2>&1
        code=$?
        if [ $code -eq 2 ] && grep -q "$set" $B/log; then pass=$((pass + 1)); else fail=$((fail + 1)); echo "FAILED $1 has no $set: exit code $code"; fi
    done
    for t in test_cpu test_backend; do
        if qemu-aarch64 -cpu "$1" $B/$t >$B/log 2>&1; then pass=$((pass + 1)); else fail=$((fail + 1)); echo "FAILED $1, $t"; tail -n 20 $B/log; fi
        echo "note: $1, $t: $(tail -n 1 $B/log)"
    done
}
run max "neon neondot neonmm" ""
run cortex-a76 "neon neondot" "neonmm"
run cortex-a53 "neon" "neondot neonmm"
echo "$pass passed, $fail failed"
[ $fail -eq 0 ]
