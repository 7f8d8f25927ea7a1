#!/bin/sh
# The header as a product: every language mode, every option, symbols, style. Prints one line per failure and the sum.
cd "$(dirname "$0")" || exit 2
B=build/hygiene
mkdir -p $B
pass=0 fail=0 skip=0
WARN="-Wall -Wextra -pedantic -Wconversion -Wshadow -Werror"
H=../modelopt_q.h

# check NAME COMMAND...   the command must succeed silently
check() {
    name=$1
    shift
    if "$@" >$B/log 2>&1 && [ ! -s $B/log ]; then pass=$((pass + 1)); else
        fail=$((fail + 1))
        echo "FAILED $name: $*"
        head -n 20 $B/log
    fi
}
have() { command -v "$1" >/dev/null 2>&1; }
skipped() { skip=$((skip + 1)); echo "skipped: $1"; }

printf '#define MODELOPT_Q_IMPLEMENTATION\n#include "../../%s"\n' "$H" >$B/impl.c
printf '#include "../../%s"\nint moq_test_use(void);\nint moq_test_use(void) { return (int)sizeof(moq_linear); }\n' "$H" >$B/decl.c
printf '#include "../../%s"\nint moq_test_use(void);\nint main(void) { return moq_test_use() ? moq_result_name(MOQ_OK)[0] == 0 : 1; }\n' "$H" >$B/main.c
printf '#define MODELOPT_Q_IMPLEMENTATION\n#include "../../%s"\n#define LLM_IMPLEMENTATION\n#include "../../../examples/llm.h"\n' "$H" >$B/llm.c
cp $B/impl.c $B/impl.cpp
cp $B/decl.c $B/decl.cpp
cp $B/llm.c $B/llm.cpp

# 1. language modes, warnings as errors
for cc in gcc clang; do
    if ! have $cc; then skipped "$cc is not installed"; continue; fi
    check "$cc -O1" $cc -std=c99 $WARN -Wstrict-prototypes -O1 -c $B/impl.c -o $B/impl_$cc.o
    for std in c99 c11 c17 gnu99; do
        check "$cc $std" $cc -std=$std $WARN -Wstrict-prototypes -fsyntax-only $B/impl.c
        check "$cc $std declarations" $cc -std=$std $WARN -Wstrict-prototypes -c $B/decl.c -o $B/decl_$cc.o
        check "$cc $std llm.h" $cc -std=$std $WARN -Wstrict-prototypes -fsyntax-only $B/llm.c
    done
done
for cc in g++ clang++; do
    if ! have $cc; then skipped "$cc is not installed"; continue; fi
    for std in c++11 c++14 c++17 c++20; do
        check "$cc $std" $cc -std=$std $WARN -fsyntax-only $B/impl.cpp
        check "$cc $std declarations" $cc -std=$std $WARN -fsyntax-only $B/decl.cpp
        check "$cc $std llm.h" $cc -std=$std $WARN -fsyntax-only $B/llm.cpp
    done
done
if have clang; then
    check "clang strict" clang -std=c99 $WARN -Wmissing-prototypes -Wcomma -Wreserved-identifier -fsyntax-only $B/impl.c
    check "clang cl /W4" clang --driver-mode=cl /W4 /WX /Zs -Wno-msvc-not-found -Wno-unused-command-line-argument -DMOQ_NO_OS $B/decl.c
fi
CC=${CC:-cc}

# 2. options
for cc in gcc clang; do if have $cc; then check "$cc MOQ_QUANTIZE" $cc -std=c99 $WARN -Wstrict-prototypes -DMOQ_QUANTIZE -O1 -c $B/impl.c -o $B/quantize.o; fi; done
for cc in g++ clang++; do if have $cc; then check "$cc MOQ_QUANTIZE" $cc -std=c++11 $WARN -DMOQ_QUANTIZE -fsyntax-only $B/llm.cpp; fi; done
for option in MOQ_STATIC MOQ_NO_OS MOQ_NO_THREADS MOQ_NO_SIMD MOQ_DEBUG "MOQ_NO_OS -DMOQ_NO_THREADS -DMOQ_NO_SIMD" "MOQ_NO_OS -DMOQ_QUANTIZE"; do
    # shellcheck disable=SC2086
    check "option $option" $CC -std=c99 $WARN -O1 -D$option -c $B/impl.c -o $B/option.o
done
printf '#include <stddef.h>\nvoid *my_alloc(size_t);\nvoid my_free(void *);\n' >$B/my_alloc.h
check "own allocator" $CC -std=c99 $WARN "-DMOQ_MALLOC(n)=my_alloc(n)" "-DMOQ_FREE(p)=my_free(p)" -include $B/my_alloc.h -c $B/impl.c -o $B/option.o
# sums in whole numbers must survive it: the compiler may not take v + c - c for v
check "-ffast-math" $CC -std=c99 $WARN -Wno-unused-function -O1 -ffast-math -DMOQ_STATIC -DTEST_DIR='""' -DGOLDEN_DIR='""' test_backend.c -o $B/fast -lm -pthread
check "products under -ffast-math" sh -c "$B/fast automatic >$B/fast.log 2>&1 || cat $B/fast.log"
if have clang && have aarch64-linux-gnu-gcc; then # its libc's headers
    check "clang for AArch64" clang --target=aarch64-linux-gnu --sysroot=/usr/aarch64-linux-gnu -isystem /usr/aarch64-linux-gnu/include -std=c99 $WARN -O1 -c $B/impl.c -o $B/cross.o
fi
for cross in x86_64-w64-mingw32-gcc aarch64-linux-gnu-gcc i686-linux-gnu-gcc; do
    if have $cross; then
        check "$cross" $cross -std=c99 $WARN -O1 -c $B/impl.c -o $B/cross.o
        check "$cross MOQ_QUANTIZE" $cross -std=c99 $WARN -DMOQ_QUANTIZE -fsyntax-only $B/impl.c
    else skipped "$cross is not installed"; fi
done

# 3. several translation units link and run
# and as a debug build makes them: without optimization the headers of intrinsics are macros, not functions
for cc in gcc clang; do
    if ! have $cc; then skipped "$cc is not installed"; continue; fi
    check "$cc -O0, two translation units" $cc -g $B/impl.c $B/decl.c $B/main.c -o $B/two -lm -pthread
    check "they run" $B/two
done

# 4. symbols: nothing exported but moq_, no writable data
$CC -std=c99 -O2 -c $B/impl.c -o $B/impl.o
check "only moq_ symbols are exported" sh -c "nm -g --defined-only $B/impl.o | awk '{print \$3}' | grep -v '^moq_'; true"
check "no writable data" sh -c "objdump -h $B/impl.o | awk '\$2 ~ /^\\.(data|bss|tdata|tbss)\$/ && \$3 !~ /^0+\$/'"
check "no exit, abort, printing, environment" sh -c "nm -u $B/impl.o | grep -wE 'exit|abort|printf|fprintf|puts|putchar|getenv|strtod|atof|rand|srand|time|setlocale|signal|stderr|stdout'; true"

# 5. declarations need only stddef.h and stdint.h
check "includes of the declarations" awk '/^#ifndef MODELOPT_Q_H/ {on = 1} /public part ends here/ {exit} on && /^ *# *include/ && !/<(stddef|stdint)\.h>/' $H

# 6. style limits
check "style of modelopt_q.h" awk -f ../tools/lint.awk -v tags=1 $H
check "style of llm.h" awk -f ../tools/lint.awk -v tags=1 ../examples/llm.h
check "plain text" sh -c "LC_ALL=C grep -nP '[^\\x00-\\x7F]|\\t|[ ]+\$' $H ../modelopt_q_cuda.cu ../examples/*.h ../examples/*.c ../tools/*.c ../tools/*.h *.c *.h; true"

# 7. figures, printed, not judged here: they depend on the machine
printf '#include "../../%s"\n#define LLM_IMPLEMENTATION\n#include "../../../examples/llm.h"\n' "$H" >$B/engine.c
# user seconds of a command
seconds() { sh -c '"$@" >/dev/null 2>&1 || echo failed; times' sh "$@" | awk '/failed/ { bad = 1 } END { split($1, t, /[ms]/); if (bad) printf "failed"; else printf "%.2f", 60 * t[1] + t[2] }'; }
echo "note: user seconds of $CC -O2: $(seconds $CC -std=c99 -O2 -c $B/impl.c -o $B/impl.o) modelopt_q.h, \
$(seconds $CC -std=c99 -O2 -c $B/engine.c -o $B/impl.o) llm.h; $(wc -l <$H) and $(wc -l <../examples/llm.h) lines"

if [ $skip -gt 0 ]; then echo "$pass passed, $fail failed, $skip skipped"; else echo "$pass passed, $fail failed"; fi
[ $fail -eq 0 ]
