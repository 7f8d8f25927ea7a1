#!/usr/bin/env python3
"""Compares this repository's tokenizer with the Hugging Face `tokenizers` package: ids, and decoded text.

    pip install tokenizers
    make -C tests programs ONLY=test_tokenizer
    python3 tests/interop/tokenizer.py tests/build/cc/test_tokenizer examples/demo-model/tokenizer.json [MORE.json ...] [--lines 10000] [--seed 1]
    python3 tests/interop/tokenizer.py --train DIR      writes small tokenizers of every supported kind to DIR
    python3 tests/interop/tokenizer.py --cases A.json   writes A.txt: lines, their ids and decoded texts, as tests/data/tokenizers has them
    python3 tests/interop/tokenizer.py --hashes         what the normalizers make of all characters, as tests/test_tokenizer.c has it

Ends with "N passed, N failed", a pass for each tokenizer and mode."""
import argparse, random, struct, subprocess, sys, unicodedata
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = ("the quick brown fox jumps over lazy dogs don't we'll I'VE you're THEY'D it's 'tis o'clock naïve café Ångström straße ﬁne "
         "Привет мир это проверка Ёжик Київ Ελληνικά γλώσσα δοκιμή שלום עולם בדיקה مرحبا بالعالم اختبار नमस्ते दुनिया परीक्षण বাংলা தமிழ் ไทยแลนด์ ทดสอบ "
         "你好世界 测试分词器 日本語のテスト カタカナ ひらがな 한국어 시험 안녕하세요 ქართული հայերեն አማርኛ ᏣᎳᎩ ລາວ ខ្មែរ မြန်မာ ǅ ǈ Ǆungla ʰello ªº ⅷ ½ ² ①② Ⅻ "
         "int main(void) return 0; if (x<=y&&z!=w) {} [] => -> ++ -- :: // /* */ #include <stdio.h> \\n \"quoted\" 'single' `tick` $HOME @user #tag 50% ~/.bashrc "
         "0 1 12 123 1234 12345 3.14159 1,000,000 2024-01-31 0xDEADBEEF 1e-5 ٠١٢٣ ०१२ 一二三 ... !!! ??? —– … “quotes” «guillemets» 、。！？ ¿qué? "
         "😀 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ ☃ ✓ ™ © ∑∫√ ≠ € £ ¥ → ⇒ ◆ █ ﷽ ﬀ Ａ１ ｶﾞ e\u0301 o\u0308\u0323 a\u0323\u0302 \u0915\u093c \u0958 \u1112\u1161\u11ab "
         "\u212b \u2126 \uf900 \U0002f800 \u0344 \u0340 \u0f73 \u00c5\u0301 \u1e9b\u0323 q\u0307\u0323 s\u0307\u0323 \u3099 か\u3099 \u0c46\u0c56 "
         "<|im_start|> <|im_end|> <|endoftext|> <s> </s> <unk> <|eot_id|> <think> </think> [INST] <|user|> <|end|> 'ſ 'S 'LL \u212aelvin").split(" ")
SPACES = [" ", " ", " ", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r\n\r\n", " \n", "\n ", "\u00a0", "\u3000", "\u2003", "        ", "", "", "\u200b", "\u200d", "\x0b", "\x1c", "\x85"]
BROKEN = [b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\x80", b"\xe0\x80\x80", b"\xf8\x88", b"\xf0\x80\x80\x80", b"\x00"]
BLOCKS = [(0x20, 0x7f), (0xa0, 0x250), (0x250, 0x370), (0x370, 0x530), (0x590, 0x780), (0x900, 0xe00), (0xe00, 0x1100), (0x1100, 0x1200), (0x1e00, 0x2000), (0x2000, 0x2c00),
          (0x3000, 0x3200), (0x4e00, 0x9fff), (0xa640, 0xa800), (0xac00, 0xd7a4), (0xf900, 0xfb50), (0xfb50, 0xfff0), (0x10000, 0x10400), (0x1d400, 0x1d800), (0x1f300, 0x1fa00),
          (0x300, 0x370), (0x20, 0x10ffff)]

def line(r):
    kind, out = r.random(), b""
    if kind < 0.55:
        for _ in range(r.randint(1, 25)):
            out += (r.choice(WORDS) + r.choice(SPACES)).encode()
    elif kind < 0.75:  # characters of one block, with marks and spaces
        lo, hi = r.choice(BLOCKS)
        for _ in range(r.randint(1, 60)):
            c = r.randrange(lo, hi) if r.random() < 0.85 else r.choice([0x20, 0x301, 0x327, 0x308, 0x0a, 0x31, 0x41, 0x323, 0x345])
            if not 0xd800 <= c <= 0xdfff and c not in range(0x11de0, 0x11dea):  # digits newer than Unicode 16
                out += chr(c).encode()
    elif kind < 0.85:
        out = "".join(r.choice("  \n\r\t a1.'") for _ in range(r.randint(0, 40))).encode()
    elif kind < 0.92:
        out = (r.choice(["a", "A", " ", "7", "!", "é", "中", "👍", "\n", "e\u0301"]) * r.randint(1, 200)).encode()
    else:
        out = "".join(chr(r.choice([r.randrange(0x20, 0x7f), 0x20, 0x0a])) for _ in range(r.randint(1, 80))).encode()
    if r.random() < 0.15:
        at = r.randint(0, len(out))
        out = out[:at] + r.choice(BROKEN) + out[at:]
    return out

def compare(program, path, lines, special):
    hf = Tokenizer.from_file(path)
    hf.encode_special_tokens = not special
    data = b"".join(struct.pack("<I", len(x)) + x for x in lines)
    flags = 3 if special else 0
    got = subprocess.run([program, "--ids", path, str(flags)], input=data, stdout=subprocess.PIPE)
    rows = got.stdout.decode().split("\n")[:-1]
    if got.returncode or len(rows) != len(lines):
        print(f"{path}: the program ended with {got.returncode} after {len(rows)} of {len(lines)} lines: {rows[-1:]}")
        return False
    bad = 0
    for x, row in zip(lines, rows):
        ids, shown = row.split("\t")
        text = x.decode("utf-8", errors="replace")
        want = hf.encode(text, add_special_tokens=special).ids
        mine = [int(i) for i in ids.split(",") if i]
        what = "ids" if mine != want else ""
        if not what:
            back = hf.decode(want, skip_special_tokens=not special)
            raw = bytes.fromhex(shown)
            if raw.decode("utf-8", errors="replace") != back and "\ufffd" not in back:
                what = "text"
        if what:
            bad += 1
            if bad <= 5:
                print(f"{path}: {what} of {x!r}\n  here {mine if what == 'ids' else raw!r}\n  want {want if what == 'ids' else back!r}")
    print(f"{path} special={int(special)}: {len(lines) - bad} of {len(lines)} lines equal")
    return bad == 0

# ---- small tokenizers of every kind, trained on generated text ----

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK = [r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"]
CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"

TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
          r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")

def split(pattern, behavior="isolated", **more):
    return pre_tokenizers.Split(Regex(pattern), behavior, **more)

def byte_level(first, normalizer=None, size=900, post=None, prefix=False, regex=False, ignore_merges=False):
    t = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    t.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    t.pre_tokenizer = pre_tokenizers.Sequence(first + [last]) if first else last
    t.decoder = decoders.ByteLevel()
    return t, trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())

def pieces(form, size=1200):
    t = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if form == "gemma":
        t.normalizer = normalizers.Replace(" ", "▁")
        t.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    elif form == "prepend":
        t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        t.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=form, split=form != "first")
        t.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme=form)]) if form == "always" else \
            decoders.Metaspace(replacement="▁", prepend_scheme=form)
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    return t, trainers.BpeTrainer(vocab_size=size, show_progress=False, special_tokens=tokens, max_token_length=16, limit_alphabet=400)

def charsmap(blocks=(range(0x80, 0x3400), range(0xf900, 0x10000), range(0x1d400, 0x1d800))):
    """A map as SentencePiece compiles it (a Darts double array), with rules like those of nmt_nfkc and some odd ones."""
    table, nfkc = {}, unicodedata.normalize
    for c in [c for b in blocks for c in b]:
        if nfkc("NFKC", chr(c)) != chr(c):
            table[chr(c)] = nfkc("NFKC", chr(c))
        parts = nfkc("NFD", chr(c))
        if 1 < len(parts) < 4 and nfkc("NFC", parts) == chr(c):
            table[parts] = chr(c)
    table.update({chr(c): "" for c in [*range(1, 9), 0xb, *range(0xe, 0x20), 0x7f, 0x8f, 0x9f]})
    table.update({chr(c): " " for c in [9, 10, 12, 13, 0x1680, *range(0x200b, 0x2010), 0x2028, 0x2029, 0xfeff]})
    table.update({"z": "", "\u0600": "N", "\u00ad": "", "q\u0307": "Q", "\u1100": "g", "\u1161": "a", "\u11a8": "k", "\u0e01": "K", "\u102b": "aa"})
    blob, where, trie = b"", {}, {}
    for key, value in table.items():
        if value not in where:
            where[value] = len(blob)
            blob += value.encode() + b"\0"
        node = trie
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[-1] = where[value]
    units, used, bases, lowest = [0], {0}, set(), 1
    todo = [(trie, 0)]
    while todo:
        node, at = todo.pop()
        labels, base = [max(x, 0) for x in node], lowest
        while base in bases or any(base ^ x in used for x in labels):
            base += 1
        if len(bases) % 64 == 0:
            lowest = max(lowest, base - 512)
        bases.add(base)
        used.update(base ^ x for x in labels)
        units += [0] * (max(base ^ x for x in labels) + 1 - len(units))
        units[at] |= (base ^ at) << 10 | (-1 in node) << 8
        for x, below in node.items():
            if x < 0:
                units[base] = 1 << 31 | below
            else:
                units[base ^ x] |= x
                todo.append((below, base ^ x))
    units += [0] * (-len(units) % 256)
    return struct.pack(f"<{len(units) + 1}I", 4 * len(units), *units) + blob

def unigram(form, size=2500):
    """The trainer wants a vocabulary with every character, so the pieces are drawn here; scores repeat, so that ties are decided, too."""
    r = random.Random(form)
    pieces, spaced = {}, ["▁" + (w.lower() if form == "lower" else w) for w in WORDS if w and w[0] != "<"]
    for _ in range(size):
        w = r.choice(spaced)
        at = r.randrange(len(w))
        pieces[w[at:at + r.choice([1, 1, 1, 2, 2, 3, 4, 6, 9])]] = -r.choice([2.5, 3, 3.75, 5, 7.125, r.uniform(2, 14), r.uniform(2, 14)])
    pieces["▁"] = -3.0
    bytes_ = {f"<0x{b:02X}>": 0.0 for b in range(256)} if form == "bytes" else {}
    vocab = [(x, 0.0) for x in ("<unk>", "<s>", "</s>")] + list(bytes_.items()) + list(pieces.items())
    t = Tokenizer(models.Unigram(vocab, 0, form == "bytes"))
    n, p = normalizers, pre_tokenizers
    spaces = n.Replace(Regex(r" {2,}"), " ")
    if form == "t5":
        t.normalizer, t.pre_tokenizer = n.Sequence([n.Precompiled(charsmap()), spaces]), p.Sequence([p.WhitespaceSplit(), p.Metaspace(prepend_scheme="always")])
    elif form == "map":
        t.normalizer, t.pre_tokenizer = n.Precompiled(charsmap()), p.Metaspace(prepend_scheme="first")
    elif form == "strip":
        t.normalizer, t.pre_tokenizer = n.Sequence([n.Nmt(), n.NFKC(), n.Strip(left=False, right=True), spaces]), p.Metaspace(prepend_scheme="always")
    elif form == "lower":
        t.normalizer = n.Sequence([n.Replace("``", '"'), n.Replace("''", '"'), n.NFKD(), n.StripAccents(), n.Lowercase(), n.Precompiled(charsmap())])
        t.pre_tokenizer = p.Metaspace(prepend_scheme="always")
    elif form == "small":
        t.normalizer = n.Sequence([n.Precompiled(charsmap([range(0xc0, 0x120)])), n.NFKD(), n.StripAccents(), n.Lowercase(), n.Nmt(), spaces])
        t.pre_tokenizer = p.Sequence([p.WhitespaceSplit(), p.Metaspace(prepend_scheme="always")])
    else:
        t.normalizer, t.pre_tokenizer = n.Sequence([n.NFC(), n.Prepend("▁"), n.Replace(" ", "▁")]), None
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]) if form == "bytes" else \
        decoders.Metaspace(prepend_scheme="first" if form == "map" else "always")
    return t, None

def cases(path, count):
    """One case a line: special or not, text, ids, decoded text; texts in hexadecimal, "-" for a decoded text that is not UTF-8."""
    r = random.Random(11)
    with open(path[:-5] + ".txt", "w") as out:
        for i in range(count):
            special, text = i % 2, line(r)
            hf = Tokenizer.from_file(path) if i < 2 else tokenizers[special]
            if i < 2:
                tokenizers = [hf] if i == 0 else tokenizers + [hf]
                hf.encode_special_tokens = not special
            ids = hf.encode(text.decode("utf-8", errors="replace"), add_special_tokens=bool(special)).ids
            back = hf.decode(ids, skip_special_tokens=not special)
            shown = "-" if "\ufffd" in back else back.encode().hex()
            out.write(f"{special} {text.hex() or '.'} {','.join(map(str, ids)) or '.'} {shown or '.'}\n")

def hashes():
    """FNV-1a of every character after a normalizer, each followed by a line end; tests/test_tokenizer.c has them."""
    for name in ("NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Lowercase", "Nmt"):
        form, h = getattr(normalizers, name)(), 0xcbf29ce484222325
        for c in range(1, 0x110000):
            if not 0xd800 <= c <= 0xdfff:
                for b in (form.normalize_str("a" + chr(c)) + "\n").encode():
                    h = (h ^ b) * 0x100000001b3 & 0xffffffffffffffff
        print(f"{name} 0x{h:016x}")

def train(folder, only):
    r = random.Random(7)
    text = [line(r).decode("utf-8", errors="replace") for _ in range(3000)]
    kinds = {
        "llama3": lambda: byte_level([split(LLAMA3)], ignore_merges=True), "qwen2": lambda: byte_level([split(QWEN2)], normalizers.NFC()),
        "nfd": lambda: byte_level([split(QWEN2)], normalizers.NFD()),
        "gpt2": lambda: byte_level([], regex=True), "gpt2_prefix": lambda: byte_level([], regex=True, prefix=True),
        "digits": lambda: byte_level([pre_tokenizers.Digits(individual_digits=True)], regex=True),
        "digits_whole": lambda: byte_level([pre_tokenizers.Digits(individual_digits=False)], regex=True),
        "o200k": lambda: byte_level([split(O200K)]), "deepseek": lambda: byte_level([split(p) for p in DEEPSEEK]), "cl100k": lambda: byte_level([split(CL100K)]),
        "previous": lambda: byte_level([split(r"[\p{L}]", "merged_with_previous")]), "next": lambda: byte_level([split(r"[\s.]", "merged_with_next")]),
        "contiguous": lambda: byte_level([split(r"\p{P}", "contiguous")]), "removed": lambda: byte_level([split(r"\s", "removed")]),
        "inverted": lambda: byte_level([split(r"\w+|[^\w\s]+", "removed", invert=True)]), "whitespace": lambda: byte_level([pre_tokenizers.WhitespaceSplit()]),
        "words": lambda: byte_level([pre_tokenizers.Punctuation()]),
        "literal": lambda: byte_level([pre_tokenizers.Split("e", "merged_with_next")], normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(r"\s{2,}"), "_")])),
        "prepend": lambda: pieces("prepend"), "metaspace": lambda: pieces("always"), "metaspace_first": lambda: pieces("first"), "metaspace_never": lambda: pieces("never"),
        "gemma": lambda: pieces("gemma"), "tekken": lambda: byte_level([split(TEKKEN)], ignore_merges=True),
        "nfkc": lambda: byte_level([split(QWEN2)], normalizers.NFKC()), "nfkd": lambda: byte_level([split(QWEN2)], normalizers.NFKD()),
        "plain": lambda: byte_level([split(QWEN2)], normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])),
        "compiled": lambda: byte_level([split(QWEN2)], normalizers.Sequence([normalizers.Precompiled(charsmap()), normalizers.Nmt()])),
        "unigram_t5": lambda: unigram("t5"), "unigram_map": lambda: unigram("map"), "unigram_strip": lambda: unigram("strip"),
        "unigram": lambda: unigram("small", 900), "unigram_lower": lambda: unigram("lower"), "unigram_bytes": lambda: unigram("bytes"),
    }
    for name, make in kinds.items():
        if only and name not in only:
            continue
        t, trainer = make()
        if trainer: t.train_from_iterator(text, trainer)
        t.add_special_tokens([AddedToken("<|im_start|>", special=True, normalized=False), AddedToken("<|im_end|>", special=True, normalized=False, rstrip=name == "gpt2"),
                              AddedToken("<|eot_id|>", special=True, normalized=False, lstrip=True)])
        t.add_tokens([AddedToken("<think>", normalized=False), AddedToken("fox", normalized=True, single_word=True), AddedToken("Å!", normalized=True),
                      AddedToken("</think>", normalized=False, rstrip=True, lstrip=True), AddedToken("int main", normalized=name != "prepend")])
        if name == "gemma":
            t.add_tokens([AddedToken(x, normalized=False) for x in ("\n", "\n\n", "\n\n\n", "\t", "\t\t", "▁▁", "▁▁▁", "▁▁▁▁", "<start_of_turn>")])
        if name == "prepend":  # as Phi-3 has them
            t.add_special_tokens([AddedToken(x, special=True, normalized=False, rstrip=True) for x in ("<|user|>", "<|end|>")])
        bos = "<s>" if t.token_to_id("<s>") is not None else "<|im_start|>"
        t.post_processor = processors.TemplateProcessing(single=f"{bos} $A" + (" <|im_end|>" if name in ("qwen2", "unigram_t5") else ""), pair=None,
                                                         special_tokens=[(x, t.token_to_id(x)) for x in (bos, "<|im_end|>")])
        t.save(f"{folder}/{name}.json", pretty=False)

def main():
    p = argparse.ArgumentParser()
    p.add_argument("files", nargs="*")
    p.add_argument("--lines", type=int, default=10000)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--train")
    p.add_argument("--only", nargs="*", help="with --train: these kinds")
    p.add_argument("--cases", nargs="*")
    p.add_argument("--hashes", action="store_true")
    a = p.parse_args()
    for path in a.cases or []:
        cases(path, 60 if "unigram" in path else 140)
    if a.hashes:
        hashes()
    if a.cases or a.hashes:
        return 0
    if a.train:
        train(a.train, a.only)
        return 0
    r = random.Random(a.seed)
    lines = [line(r) for _ in range(a.lines)]
    results = [compare(a.files[0], path, lines, special) for path in a.files[1:] for special in (False, True)]
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if all(results) else 1

if __name__ == "__main__":
    sys.exit(main())
