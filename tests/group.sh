#!/bin/sh
# group.sh TEST...    prints a program that holds several test programs and is the one whose name it is called by: most of what a compiler does for
# a test is the headers, which are compiled once here. Tests of a group use the same parts of the headers, and each other's names for nothing else.
for t in "$@"; do
    sed -n '/^#include/q; s|^\(#define [A-Z_0-9]* *[^/ ]*\).*|\1|p' "$t.c" # what a test defines before the first header
done | sort -u
for t in "$@"; do printf '#define main %s\n#include "%s.c"\n#undef main\n' "main_of_$t" "$t"; done
printf 'int main(int argc, char **argv)\n{\n    const char *slash = strrchr(argv[0], 47), *name = slash ? slash + 1 : argv[0];\n'
for t in "$@"; do printf '    if (strcmp(name, "%s") == 0) return main_of_%s(argc, argv);\n' "$t" "$t"; done
printf '    fprintf(stderr, "%%s is none of the tests in this program\\n", name);\n    return 2;\n}\n'
