#!/bin/sh
# run.sh PROGRAM-OR-SCRIPT...   runs each, prints a line per file with its seconds and the sum as the closing line.
# Every one ends its own output with "N passed, N failed[, N skipped]"; one that does not counts as a failure.
passed=0 failed=0 skipped=0
out=$(mktemp) || exit 2
trap 'rm -f "$out"' EXIT
for t in "$@"; do
    start=$(date +%s)
    case $t in *.sh) sh "./$t" >"$out" 2>&1 ;; *) "./$t" >"$out" 2>&1 ;; esac
    code=$?
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed(, [0-9]+ skipped)?$' "$out" | tail -n 1)
    p=$(echo "$line" | sed -n 's/^\([0-9]*\) passed.*/\1/p')
    f=$(echo "$line" | sed -n 's/.* \([0-9]*\) failed.*/\1/p')
    s=$(echo "$line" | sed -n 's/.* \([0-9]*\) skipped.*/\1/p')
    if [ -z "$line" ] || { [ "$code" -ne 0 ] && [ "${f:-0}" -eq 0 ]; }; then
        f=$((${f:-0} + 1))
        echo "exit code $code" >>"$out"
    fi
    printf '%-28s %5d ok %3d failed%s %6d s\n' "$(basename "$t")" "${p:-0}" "${f:-0}" "${s:+, $s skipped}" $(($(date +%s) - start))
    if [ "${f:-0}" -gt 0 ]; then tail -n 60 "$out"; else grep -E '^(note|skipped):' "$out"; fi
    passed=$((passed + ${p:-0})) failed=$((failed + ${f:-0})) skipped=$((skipped + ${s:-0}))
done
if [ "$skipped" -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ "$failed" -eq 0 ]
