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

# Marks, compositions and compatibility characters newer than Unicode 9: the reference implementation of normalization in tokenizers does not know
# them, and vocabularies were made with it.
NEWER_THAN_9 = [
    (0x07FD, 0x07FD), (0x0897, 0x089F), (0x08CA, 0x08D3), (0x09FE, 0x09FE), (0x0AFA, 0x0AFF), (0x0B55, 0x0B55), (0x0C04, 0x0C04),
    (0x0C3C, 0x0C3C), (0x0CF3, 0x0CF3), (0x0D00, 0x0D00), (0x0D3B, 0x0D3C), (0x0D81, 0x0D81), (0x0EBA, 0x0EBA), (0x0ECE, 0x0ECE),
    (0x1715, 0x1715), (0x180F, 0x180F), (0x1ABF, 0x1ACE), (0x1CF7, 0x1CF7), (0x1DF6, 0x1DFA), (0x32FF, 0x32FF), (0xA7F2, 0xA7F4),
    (0xA82C, 0xA82C), (0xA8FF, 0xA8FF), (0xAB69, 0xAB69), (0x105C9, 0x105C9), (0x105E4, 0x105E4), (0x10781, 0x10785), (0x10787, 0x107B0),
    (0x107B2, 0x107BA), (0x10D24, 0x10D27), (0x10D69, 0x10D6D), (0x10EAB, 0x10EAC), (0x10EFC, 0x10EFF), (0x10F46, 0x10F50), (0x10F82, 0x10F85),
    (0x11070, 0x11070), (0x11073, 0x11074), (0x110C2, 0x110C2), (0x11145, 0x11146), (0x111C9, 0x111C9), (0x111CE, 0x111CF), (0x11241, 0x11241),
    (0x1133B, 0x1133B), (0x11383, 0x11383), (0x11385, 0x11385), (0x1138E, 0x1138E), (0x11391, 0x11391), (0x113B8, 0x113C0), (0x113C2, 0x113C2),
    (0x113C5, 0x113C5), (0x113C7, 0x113CA), (0x113CC, 0x113D0), (0x113D2, 0x113D2), (0x113E1, 0x113E2), (0x1145E, 0x1145E), (0x1182C, 0x1183A),
    (0x11930, 0x11935), (0x11937, 0x11938), (0x1193B, 0x1193E), (0x11940, 0x11940), (0x11942, 0x11943), (0x119D1, 0x119D7), (0x119DA, 0x119E0),
    (0x119E4, 0x119E4), (0x11A01, 0x11A0A), (0x11A33, 0x11A39), (0x11A3B, 0x11A3E), (0x11A47, 0x11A47), (0x11A51, 0x11A5B), (0x11A8A, 0x11A99),
    (0x11D31, 0x11D36), (0x11D3A, 0x11D3A), (0x11D3C, 0x11D3D), (0x11D3F, 0x11D45), (0x11D47, 0x11D47), (0x11D8A, 0x11D8E), (0x11D90, 0x11D91),
    (0x11D93, 0x11D97), (0x11EF3, 0x11EF6), (0x11F00, 0x11F01), (0x11F03, 0x11F03), (0x11F34, 0x11F3A), (0x11F3E, 0x11F42), (0x11F5A, 0x11F5A),
    (0x13440, 0x13440), (0x13447, 0x13455), (0x1611E, 0x1612F), (0x16D68, 0x16D6A), (0x16F4F, 0x16F4F), (0x16F7F, 0x16F87), (0x16FE4, 0x16FE4),
    (0x16FF0, 0x16FF1), (0x1CCD6, 0x1CCF9), (0x1CF00, 0x1CF2D), (0x1CF30, 0x1CF46), (0x1E030, 0x1E06D), (0x1E08F, 0x1E08F), (0x1E130, 0x1E136),
    (0x1E2AE, 0x1E2AE), (0x1E2EC, 0x1E2EF), (0x1E4EC, 0x1E4EF), (0x1E5EE, 0x1E5EF), (0x1F16C, 0x1F16C), (0x1FBF0, 0x1FBF9),
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

def new_marks():
    """Marks that stripping accents leaves alone, and the two letters that were marks in Unicode 9."""
    out, at, c = "", 0, 0
    odd = lambda c: c in (0x1cf2, 0x1cf3) or (is_newer(c) and U.category(chr(c))[0] == "M")
    while c < 0x20000:
        start = c
        while odd(c):
            c += 1
        if c > start:
            out += number(start - at) + number(c - start)
            at = c
        c += 1
    return out

def compatibility():
    """Full compatibility decompositions, in runs of neighbours that differ by 0 or 1 in their first part and in nothing else."""
    list, out, at, last = [], "", 0, [0] * 20
    for c in range(0x110000):
        if U.decomposition(chr(c))[:1] == "<" and not is_newer(c):
            list.append((c, [ord(x) for x in U.normalize("NFKD", chr(c))]))
    while list:
        c, parts = list[0]
        run, step = 1, 0
        for s in (0, 1):
            n = 1
            while n < len(list) and list[n] == (c + n, [parts[0] + s * n] + parts[1:]):
                n += 1
            if n > run:
                run, step = n, s
        out += number(c - at) + number((run - 1) * 2 + step) + number(len(parts) - 1)
        for i, x in enumerate(parts):
            out += number(zigzag(x - last[i]))
        last[:len(parts)] = parts
        last[0], at, list = parts[0] + step * (run - 1), c + run, list[run:]
    return out

# Lower case that Python 3.11 (Unicode 14) does not know: first, last, difference, step; up to Unicode 17, as the reference has it.
NEWER_LOWER = [(0x1c89, 0x1c89, 1, 1), (0xa7cb, 0xa7cb, 0x264 - 0xa7cb, 1), (0xa7cc, 0xa7cc, 1, 1), (0xa7ce, 0xa7ce, 1, 1), (0xa7d2, 0xa7d4, 1, 2), (0xa7da, 0xa7da, 1, 1),
               (0xa7dc, 0xa7dc, 0x19b - 0xa7dc, 1), (0x10d50, 0x10d65, 32, 1), (0x16ea0, 0x16eb8, 27, 1)]

def lower_runs():
    """Runs of every or every second character with one difference; U+0130, which becomes two characters, is left to the program."""
    to = {c: ord(chr(c).lower()) for c in range(0x110000) if len(chr(c).lower()) == 1 and chr(c).lower() != chr(c)}
    for a, b, d, step in NEWER_LOWER:
        to.update({c: c + d for c in range(a, b + 1, step)})
    out, at, keys = "", 0, sorted(to)
    while keys:
        c, run, step = keys[0], 1, 1
        for s in (1, 2):
            n = 1
            while n < len(keys) and keys[n] == c + s * n and to[keys[n]] - keys[n] == to[c] - c:
                n += 1
            if n > run:
                run, step = n, s
        out += number(c - at) + number((run - 1) * 2 + step - 1) + number(zigzag(to[c] - c))
        at, keys = c + (run - 1) * step + 1, keys[run:]
    return out

if __name__ == "__main__":
    emit("llmi_class_text", "Runs of one class from U+0000 on.", class_runs())
    emit("llmi_ccc_text", "Canonical combining classes: gap, length, class of each run.", ccc_runs())
    emit("llmi_decomposition_text", "Canonical decompositions: difference to the last code point * 2 + never recomposed, differences of the first and second part.", decompositions())
    emit("llmi_compat_text", "Compatibility decompositions: gap, (length - 1) * 2 + step of the first part, parts - 1, differences of the parts.", compatibility())
    emit("llmi_lower_text", "Lower case: gap, (length - 1) * 2 + (every second one only), difference.", lower_runs())
    emit("llmi_new_marks_text", "Marks newer than Unicode 9, and letters that were marks: gap, length.", new_marks())
