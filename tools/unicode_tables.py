#!/usr/bin/env python3
"""Prints the character tables of examples/llm.h, section llm-unicode: unicode_tables.py > tables.h
Needs Unicode 16 data: `pip install unicodedata2==16.0.0` where Python's own unicodedata is another version."""
import sys
try:
    import unicodedata2 as U
except ImportError:
    import unicodedata as U
if U.unidata_version != "16.0.0":
    sys.exit(f"Unicode data {U.unidata_version} found, 16.0.0 wanted: pip install unicodedata2==16.0.0")

ALPHABET = [chr(c) for c in range(0x20, 0x7f) if chr(c) not in '"\\?*']  # 91 characters that mean nothing else in a C string
CLASSES = ["other", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "Nd", "Nl", "No", "Pc", "P", "S"]
PAIRS = len(CLASSES)  # a run of alternating Lu, Ll
END = 0x32400         # above: nothing but U+E0100..E01EF (M), private use and unassigned

# Marks and compositions newer than Unicode 9: the reference implementation of normalization in tokenizers does not know
# them, and vocabularies were made with it.
NEWER_THAN_9 = [
    (0x07FD, 0x07FD), (0x0897, 0x089F), (0x08CA, 0x08D3), (0x09FE, 0x09FE), (0x0C3C, 0x0C3C), (0x0D3B, 0x0D3C), (0x0EBA, 0x0EBA),
    (0x1715, 0x1715), (0x1ABF, 0x1ACE), (0x1DF6, 0x1DFA), (0xA82C, 0xA82C), (0x105C9, 0x105C9), (0x105E4, 0x105E4), (0x10D24, 0x10D27),
    (0x10D69, 0x10D6D), (0x10EAB, 0x10EAC), (0x10EFD, 0x10EFF), (0x10F46, 0x10F50), (0x10F82, 0x10F85), (0x11070, 0x11070), (0x1133B, 0x1133B),
    (0x11383, 0x11383), (0x11385, 0x11385), (0x1138E, 0x1138E), (0x11391, 0x11391), (0x113C5, 0x113C5), (0x113C7, 0x113C8), (0x113CE, 0x113D0),
    (0x1145E, 0x1145E), (0x11839, 0x1183A), (0x11938, 0x11938), (0x1193D, 0x1193E), (0x11943, 0x11943), (0x119E0, 0x119E0), (0x11A34, 0x11A34),
    (0x11A47, 0x11A47), (0x11A99, 0x11A99), (0x11D42, 0x11D42), (0x11D44, 0x11D45), (0x11D97, 0x11D97), (0x11F41, 0x11F42), (0x16121, 0x16128),
    (0x1612F, 0x1612F), (0x16D68, 0x16D6A), (0x16FF0, 0x16FF1), (0x1E08F, 0x1E08F), (0x1E130, 0x1E136), (0x1E2AE, 0x1E2AE), (0x1E2EC, 0x1E2EF),
    (0x1E4EC, 0x1E4EF), (0x1E5EE, 0x1E5EF),
]

def is_newer(c):
    return any(a <= c <= b for a, b in NEWER_THAN_9)

def klass(c):
    g = U.category(chr(c))
    if g in CLASSES:
        return CLASSES.index(g)
    return CLASSES.index(g[0]) if g[0] in "MPS" else 0

def number(v):
    """Base 45, low digit first; a digit of 45 and above means that more follow."""
    out = ""
    while v >= 45:
        out += ALPHABET[45 + v % 45]
        v //= 45
    return out + ALPHABET[v]

def zigzag(v):
    return 2 * v if v >= 0 else -2 * v - 1

def emit(name, comment, text):
    print(f"/* {comment} */\nstatic const char *const {name}[] = {{")
    while text:
        print(f'    "{text[:140]}",')
        text = text[140:]
    print("    NULL};\n")

def class_runs():
    k = [klass(c) for c in range(END)]
    runs, i = [], 0
    while i < END:
        j = i
        while j < END and k[j] == k[i]:
            j += 1
        pair = i
        while pair + 1 < END and k[pair] == 1 and k[pair + 1] == 2:
            pair += 2
        if pair - i > 2 and pair > j:
            runs.append((PAIRS, (pair - i) // 2))
            i = pair
        else:
            runs.append((k[i], j - i))
            i = j
    out = ""
    for c, n in runs:  # short runs are one character: class * 6 + length - 1; longer ones class * 6 + 5, then the number
        out += ALPHABET[c * 6 + n - 1] if n <= 5 else ALPHABET[c * 6 + 5] + number(n - 6)
    return out

def ccc_runs():
    out, at, c = "", 0, 0
    value = lambda c: 0 if is_newer(c) else U.combining(chr(c))
    while c < 0x20000:
        v, start = value(c), c
        if v == 0:
            c += 1
            continue
        while value(c) == v:
            c += 1
        out += number(start - at) + number(c - start) + number(v)
        at = c
    return out

def decompositions():
    out, last, la, lb = "", 0, 0, 0
    for c in range(0x110000):
        d = U.decomposition(chr(c))
        if not d or d[0] == "<" or is_newer(c) or 0xac00 <= c <= 0xd7a3:
            continue
        parts = [int(x, 16) for x in d.split()]
        a, b = parts[0], parts[1] if len(parts) > 1 else 0
        excluded = U.normalize("NFC", chr(c)) != chr(c)
        out += number((c - last) * 2 + excluded) + number(zigzag(a - la)) + number(zigzag(b - lb))
        last, la, lb = c, a, b
    return out

if __name__ == "__main__":
    emit("llmi_class_text", "Runs of one class from U+0000 on.", class_runs())
    emit("llmi_ccc_text", "Canonical combining classes: gap, length, class of each run.", ccc_runs())
    emit("llmi_decomposition_text", "Canonical decompositions: difference to the last code point * 2 + never recomposed, differences of the first and second part.", decompositions())
