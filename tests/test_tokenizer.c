/* Tokenizers of examples/llm.h. The expected ids in data/tokenizers were written by the Hugging Face tokenizers package
   (tests/interop/tokenizer.py makes them, and compares many more tokenizers and lines).

   test_tokenizer --ids FILE FLAGS     reads records (32-bit length, text), prints ids and, in hexadecimal, the decoded text */
#define MOQ_MAX_VOCAB 300000
#include "test.h"
#define LLM_IMPLEMENTATION
#include "../examples/llm.h"
#include "text.h"

/* ---- a tokenizer from JSON text ---- */

static moq_checkpoint *folder;

static llm_tokenizer *open_json(const char *json, size_t bytes, const char *config, int counted, moq_error *err)
{
    static const char header[] = "{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}    ";
    static char tensors[sizeof header + 11];
    moq_file files[3];
    moq_open_desc desc;
    memset(&desc, 0, sizeof desc);
    if (counted) desc.allocator = test_allocator();
    tensors[0] = (char)(sizeof header - 1);
    memcpy(tensors + 8, header, sizeof header - 1);
    files[0].name = "model.safetensors";
    files[0].data = tensors;
    files[0].bytes = 8 + sizeof header - 1 + 4;
    files[1].name = "config.json";
    files[1].data = config;
    files[1].bytes = strlen(config);
    files[2].name = "tokenizer.json";
    files[2].data = json;
    files[2].bytes = bytes;
    folder = moq_open_memory(files, 3, &desc, err);
    return folder ? llm_tokenizer_open(folder, err) : NULL;
}

static void close_json(llm_tokenizer *t)
{
    llm_tokenizer_close(t);
    moq_close(folder);
    folder = NULL;
}

/* {"vocab": {a, b, ab, <unk>, ..}} with the given other keys of the file and of the model. */
static llm_tokenizer *open_small(const char *file_keys, const char *model_keys, moq_error *err)
{
    static text t;
    t.count = 0;
    add(&t, "{\"added_tokens\": [{\"id\": 9, \"content\": \"<x>\", \"special\": true}], ");
    add(&t, file_keys);
    add(&t, "\"model\": {\"type\": \"BPE\", ");
    add(&t, model_keys);
    add(&t, "\"vocab\": {\"a\": 0, \"b\": 1, \"ab\": 2, \"abab\": 3, \"\\u0120\": 4, \"\\u0120a\": 5, \"c\": 6}, \"merges\": [\"a b\", [\"ab\", \"ab\"], \"\\u0120 a\"]}}");
    return open_json(t.data, t.count, "{}", 1, err);
}

static const char *ids_of(const llm_tokenizer *t, const char *s, size_t bytes, uint32_t flags)
{
    static char out[4096];
    int32_t ids[500];
    size_t n = llm_encode(t, s, bytes, flags, ids, 500), k = 0;
    out[0] = 0;
    for (size_t i = 0; i < n && i < 500; i++) k += (size_t)snprintf(out + k, sizeof out - k, i ? ",%d" : "%d", ids[i]);
    return out;
}

/* ---- recorded cases ---- */

static size_t unhex(const char *s, size_t n, uint8_t *out)
{
    if (n == 1) return 0;
    for (size_t i = 0; i + 1 < n; i += 2) out[i / 2] = (uint8_t)(llmi_hex(s[i]) * 16 + llmi_hex(s[i + 1]));
    return n / 2;
}

static int recorded_case(const llm_tokenizer *t, const char *line, const char *end)
{
    static uint8_t source[20000], shown[20000], back[20000];
    const char *hex = line + 2, *list = strchr(hex, ' ') + 1, *last = strchr(list, ' ') + 1;
    uint32_t flags = line[0] == '1' ? LLM_SPECIAL | LLM_BOS : 0;
    size_t bytes = unhex(hex, (size_t)(list - 1 - hex), source);
    int32_t ids[4000];
    uint8_t *exact = test_copy(source, bytes);
    size_t n = llm_encode(t, (const char *)exact, bytes, flags, ids, 4000), k = 0;
    free(exact);
    for (const char *p = list; p < last - 1 && *p != '.'; p++) {
        int32_t v = 0;
        for (; *p >= '0' && *p <= '9'; p++) v = v * 10 + (*p - '0');
        if (k >= n || ids[k] != v) return 0;
        k++;
    }
    if (k != n) return 0;
    if (*last == '-') return 1;
    size_t want = unhex(last, (size_t)(end - last), shown), got = llm_decode(t, ids, n, flags, (char *)back, sizeof back);
    return got == want && memcmp(back, shown, want) == 0;
}

static void run_cases(const char *name)
{
    char path[100];
    moq_error err;
    size_t json_bytes = 0, bytes = 0, lines = 0, bad = 0;
    snprintf(path, sizeof path, "data/tokenizers/%s.json", name);
    char *json = moq_read_file(test_path(path), 1 << 24, NULL, &json_bytes, &err);
    snprintf(path, sizeof path, "data/tokenizers/%s.txt", name);
    char *cases = moq_read_file(test_path(path), 1 << 24, NULL, &bytes, &err);
    CHECK(json && cases);
    llm_tokenizer *t = json ? open_json(json, json_bytes, "{}", 1, &err) : NULL;
    CHECK(t != NULL);
    for (char *p = cases, *end; t && p && *p; p = end + 1, lines++) {
        end = strchr(p, '\n');
        if (recorded_case(t, p, end)) continue;
        if (bad++ < 3) fprintf(stderr, "%s: case %d differs\n", name, (int)lines + 1);
    }
    CHECK(lines >= 60);
    CHECK_INT((long long)bad, 0);
    close_json(t);
    moq_release(NULL, json, json_bytes + 1);
    moq_release(NULL, cases, bytes + 1);
    CHECK_INT(test_state.live_allocs, 0);
}

static void test_tokenizer_qwen2(void) { run_cases("qwen2"); }       /* NFC, one digit */
static void test_tokenizer_o200k(void) { run_cases("o200k"); }       /* upper and lower case */
static void test_tokenizer_deepseek(void) { run_cases("deepseek"); } /* three patterns, one after the other */
static void test_tokenizer_prepend(void) { run_cases("prepend"); }   /* SentencePiece style with byte fallback */
static void test_tokenizer_unigram(void) { run_cases("unigram"); }   /* Precompiled, NFKD, StripAccents, Lowercase, Nmt */

/* ---- UTF-8 ---- */

/* Table 3-7 of the Unicode standard, row by row: how many bytes at s begin a well-formed character, and whether it is whole. */
static int oracle_utf8(const uint8_t *s, int n, int *whole)
{
    static const uint8_t rows[9][8] = {
        {0x00, 0x7f, 0, 0, 0, 0, 0, 0}, {0xc2, 0xdf, 0x80, 0xbf, 0, 0, 0, 0}, {0xe0, 0xe0, 0xa0, 0xbf, 0x80, 0xbf, 0, 0}, {0xe1, 0xec, 0x80, 0xbf, 0x80, 0xbf, 0, 0},
        {0xed, 0xed, 0x80, 0x9f, 0x80, 0xbf, 0, 0}, {0xee, 0xef, 0x80, 0xbf, 0x80, 0xbf, 0, 0}, {0xf0, 0xf0, 0x90, 0xbf, 0x80, 0xbf, 0x80, 0xbf},
        {0xf1, 0xf3, 0x80, 0xbf, 0x80, 0xbf, 0x80, 0xbf}, {0xf4, 0xf4, 0x80, 0x8f, 0x80, 0xbf, 0x80, 0xbf}};
    for (int r = 0; r < 9; r++) {
        int k = 0;
        while (k < 4 && (k == 0 || rows[r][2 * k + 1]) && k < n && s[k] >= rows[r][2 * k] && s[k] <= rows[r][2 * k + 1]) k++;
        if (k == 0) continue;
        *whole = k == 4 || rows[r][2 * k + 1] == 0;
        return k;
    }
    *whole = 0;
    return 1;
}

static void test_llm_utf8(void)
{
    static const uint8_t edges[] = {0x00, 0x41, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc1, 0xc2, 0xdf, 0xe0, 0xe1, 0xec, 0xed, 0xee, 0xef, 0xf0, 0xf1, 0xf3, 0xf4, 0xf5, 0xff};
    int count = (int)sizeof edges, bad = 0;
    for (int code = 0; code < count * count * count * count; code++) {
        uint8_t s[4];
        for (int i = 0, c = code; i < 4; i++, c /= count) s[i] = edges[c % count];
        for (int n = 1; n <= 4; n++) {
            int whole, cut;
            uint32_t cp;
            int want = oracle_utf8(s, n, &whole);
            size_t got = llmi_utf8_get((const char *)s, (size_t)n, &cp, &cut);
            bad += got != (size_t)want || (!whole && cp != 0xfffd) || (whole && cut);
            char again[4];
            if (whole) bad += llmi_utf8_put(cp, again) != got || memcmp(again, s, got) != 0;
        }
    }
    CHECK_INT(bad, 0);
}

/* ---- Unicode ---- */

static void test_llm_classes(void)
{
    /* Characters of each class in Unicode 16.0, counted by another implementation. */
    static const struct { uint32_t classes; int count; } want[] = {
        {LLMI_LETTERS, 141028}, {LLMI_NUMBERS, 1911}, {LLMI_BIT(M), 2501}, {LLMI_BIT(LU), 1858}, {LLMI_BIT(LL), 2258}, {LLMI_BIT(LT), 31}, {LLMI_BIT(LM), 404},
        {LLMI_BIT(LO), 136477}, {LLMI_BIT(P) | LLMI_BIT(PC), 855}, {LLMI_BIT(S), 8514}};
    llmi_arena r = llmi_arena_make(NULL);
    llmi_unicode u;
    int space = 0;
    CHECK(llmi_unicode_make(&u, &r));
    for (size_t i = 0; i < sizeof want / sizeof want[0]; i++) {
        int n = 0;
        for (uint32_t c = 0; c < 0x110000; c++) n += (int)(want[i].classes >> llmi_class(&u, c) & 1u);
        CHECK_INT(n, want[i].count);
    }
    for (uint32_t c = 0; c < 0x110000; c++) space += llmi_is_space(c);
    CHECK_INT(space, 25);
    CHECK_INT(llmi_class(&u, 'A'), LLMI_CLASS_LU);
    CHECK_INT(llmi_class(&u, 0x1c5), LLMI_CLASS_LT);
    CHECK_INT(llmi_class(&u, 0x4e00), LLMI_CLASS_LO);
    CHECK_INT(llmi_class(&u, 0x301), LLMI_CLASS_M);
    CHECK_INT(llmi_class(&u, 0x1f600), LLMI_CLASS_S);
    CHECK_INT(llmi_class(&u, 0xe000), LLMI_CLASS_OTHER);
    llmi_arena_drop(&r);
}

static void normalize(const llmi_unicode *u, const char *s, size_t n, int compose, llmi_bytes *out)
{
    out->count = 0;
    CHECK(llmi_normalize(u, s, n, compose, 0, out));
    CHECK(llmi_bytes_add(out, "", 1));
    out->count--;
}

static void test_llm_normalization(void)
{
    static const struct { const char *from, *c, *d; } known[] = {
        {"e\xcc\x81", "\xc3\xa9", "e\xcc\x81"}, {"\xe2\x84\xab", "\xc3\x85", "A\xcc\x8a"}, {"q\xcc\x87\xcc\xa3", "q\xcc\xa3\xcc\x87", "q\xcc\xa3\xcc\x87"},
        {"\xe1\x84\x92\xe1\x85\xa1\xe1\x86\xab", "\xed\x95\x9c", "\xe1\x84\x92\xe1\x85\xa1\xe1\x86\xab"}, {"\xe0\xa5\x98", "\xe0\xa4\x95\xe0\xa4\xbc", "\xe0\xa4\x95\xe0\xa4\xbc"},
        {"\xef\xa4\x80", "\xe8\xb1\x88", "\xe8\xb1\x88"}, {"s\xcc\xa3\xcc\x87", "\xe1\xb9\xa9", "s\xcc\xa3\xcc\x87"}, {"\xcd\x84", "\xcc\x88\xcc\x81", "\xcc\x88\xcc\x81"}, {"abc", "abc", "abc"}};
    llmi_arena r = llmi_arena_make(NULL);
    llmi_unicode u;
    llmi_bytes c = llmi_bytes_make(NULL), d = llmi_bytes_make(NULL), x = llmi_bytes_make(NULL);
    int bad = 0, changed = 0;
    CHECK(llmi_unicode_make(&u, &r) && llmi_unicode_normalization(&u, &r));
    CHECK_INT(u.pair_count, 2060);
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        normalize(&u, known[i].from, strlen(known[i].from), 1, &c);
        CHECK_STR(c.data, known[i].c);
        normalize(&u, known[i].from, strlen(known[i].from), 0, &d);
        CHECK_STR(d.data, known[i].d);
    }
    for (uint32_t cp = 1; cp < 0x110000; cp++) { /* C(D(x)) = C(x), D(C(x)) = D(x), with marks around */
        char s[16];
        if (cp >= 0xd800 && cp <= 0xdfff) continue;
        size_t n = llmi_utf8_put(cp, s);
        memcpy(s + n, cp & 1 ? "\xcc\xa7\xcc\x81" : "\xcc\x81\xcc\xa7", 4);
        n += cp % 3 ? 4 : 0;
        normalize(&u, s, n, 1, &c);
        normalize(&u, s, n, 0, &d);
        changed += c.count != n || memcmp(c.data, s, n) != 0;
        normalize(&u, d.data, d.count, 1, &x);
        bad += x.count != c.count || memcmp(x.data, c.data, c.count) != 0;
        normalize(&u, c.data, c.count, 0, &x);
        bad += x.count != d.count || memcmp(x.data, d.data, d.count) != 0;
    }
    CHECK_INT(bad, 0);
    CHECK(changed > 1000);
    x.count = 0;
    CHECK(llmi_bytes_add(&x, "a", 1)); /* many marks in the worst order: linear, and each class in its order */
    for (int i = 0; i < 200000; i++) CHECK(llmi_bytes_add(&x, i & 1 ? "\xcc\xa7" : "\xcc\x88", 2));
    double start = test_seconds();
    normalize(&u, x.data, x.count, 1, &c);
    CHECK(test_seconds() - start < 10);
    CHECK(c.count == 2 + 400000 - 2 && memcmp(c.data, "\xc3\xa4\xcc\xa7\xcc\xa7", 6) == 0 && memcmp(c.data + c.count - 4, "\xcc\x88\xcc\x88", 4) == 0);
    llmi_bytes_drop(&c);
    llmi_bytes_drop(&d);
    llmi_bytes_drop(&x);
    llmi_arena_drop(&r);
}

/* The package's answer for every character (tests/interop/tokenizer.py --hashes), as one number each. */
static void test_llm_normalizers(void)
{
    static const struct { int kind; uint64_t hash; } want[] = {
        {LLMI_NFC, 0x8003f0b463a62b16u}, {LLMI_NFD, 0x5ff479e2ab772d30u}, {LLMI_NFKC, 0x9fef142e0f29bfb6u}, {LLMI_NFKD, 0x143cce4e561ba7e3u},
        {LLMI_STRIP_ACCENTS, 0xf6be31762850d8cbu}, {LLMI_LOWERCASE, 0x1cbe093057480977u}, {LLMI_NMT, 0x83966687c3daf981u}};
    llmi_arena r = llmi_arena_make(NULL);
    llmi_unicode u;
    llmi_matcher m;
    llmi_stage x;
    llmi_bytes out = llmi_bytes_make(NULL);
    memset(&m, 0, sizeof m);
    CHECK(llmi_unicode_make(&u, &r) && llmi_unicode_normalization(&u, &r) && llmi_unicode_compat(&u, &r) && llmi_unicode_lower(&u, &r));
    CHECK_INT(u.compat_count, 2084);
    CHECK_INT(u.lower_count, 185);
    memset(&x, 0, sizeof x);
    for (size_t i = 0; i < sizeof want / sizeof want[0]; i++) {
        uint64_t h = 0xcbf29ce484222325u;
        x.kind = want[i].kind;
        for (uint32_t c = 1; c < 0x110000; c++) {
            char s[5] = {'a'};
            out.count = 0;
            if (c >= 0xd800 && c <= 0xdfff) continue;
            CHECK(llmi_normalize_stage(&u, &m, &x, s, 1 + llmi_utf8_put(c, s + 1), &out) && llmi_bytes_add(&out, "\n", 1));
            for (size_t k = 0; k < out.count; k++) h = (h ^ (uint8_t)out.data[k]) * 0x100000001b3u;
        }
        CHECK(h == want[i].hash);
        if (h != want[i].hash) fprintf(stderr, "normalizer %d gives another text\n", x.kind);
    }
    llmi_bytes_drop(&out);
    llmi_arena_drop(&r);
}

/* ---- patterns ---- */

/* Matches of a pattern as "[a][b]", text between them as it is. */
static const char *matches(const char *pattern, const char *s, const char **error)
{
    static char out[4000];
    static moq_error err;
    llmi_arena r = llmi_arena_make(NULL);
    llmi_unicode u;
    llmi_matcher m;
    size_t n = strlen(s), k = 0;
    memset(&m, 0, sizeof m);
    CHECK(llmi_unicode_make(&u, &r));
    const llmi_regex *x = llmi_regex_make(pattern, strlen(pattern), 0, &u, &r, &err);
    *error = x ? "" : err.text;
    m.u = &u;
    if (x) llmi_matcher_set(&m, x, s, n);
    for (size_t i = 0; x && i < n;) {
        size_t end = llmi_match(&m, i);
        if (end == LLMI_NO_MATCH || end == i) { out[k++] = s[i++]; continue; }
        k += (size_t)snprintf(out + k, 200, "[%.*s]", (int)(end - i), s + i);
        i = end;
    }
    out[k] = 0;
    llmi_matcher_drop(&m);
    llmi_arena_drop(&r);
    return out;
}

static void test_llm_pattern(void)
{
    static const struct { const char *pattern, *s, *want; } known[] = {
        {"a|ab", "abab", "[a]b[a]b"}, {"ab|a", "aba", "[ab][a]"}, {"a*b", "aab b", "[aab] [b]"}, {"(ab)+", "ababa", "[abab]a"}, {"(?:a|bc){2,3}", "abcabca", "[abca][bca]"},
        {"\\s+(?!\\S)|\\s+", "a   b ", "a[  ][ ]b[ ]"}, {"(?i:'s|'LL)", "'S'll'x", "['S]['ll]'x"}, {"[^\\S\\n]+", " \n\t", "[ ]\n[\t]"}, {"\\p{N}{1,3}", "12345", "[123][45]"},
        {"\\p{Lu}\\p{Ll}*", "AbCD", "[Ab][C][D]"}, {"[a-c\\-x]+", "ab-xd", "[ab-x]d"}, {"a(?=b)", "abac", "[a]bac"}, {"\\d+$", "12\n34", "[12]\n[34]"}, {"a\\z", "aa", "a[a]"},
        {"(a|b)*c", "abc", "[abc]"}, {"a?+a", "aa", "[aa]"}, {"a++a", "aa", "aa"}, {"\\x41\\x{42}\\u0043", "ABC", "[ABC]"}, {"[]a]+", "a]b", "[a]]b"}, {".+", "ab\ncd", "[ab]\n[cd]"},
        {"(?i:K)", "k\xe2\x84\xaa", "[k][\xe2\x84\xaa]"}, {"\\P{L}+", "a1!b", "a[1!]b"}, {"(?:aa|a)(?:ab|c)", "aaab", "[aaab]"}, {"(a(?:b|c)?){2}", "abac", "[abac]"}};
    static const char *const refused[] = {"a*?", "\\bx", "(?<=a)b", "(?<n>a)", "\\p{Han}", "[a[b]]", "[a&&b]", "(?!ab)", "\\1", "^a", "(a*)*", "(a+)++", "[a-\\d]", "a{5000}",
                                          "(?i:\xc3\xa9)"};
    static const char *const malformed[] = {"(a", "a)", "[a", "*a", "a{2", "a{3,1}", "\\p", "\\p{L", "\\x", "\\x{41", "\\x{110000}", "a\\", "[a\\", "[b-a]"};
    const char *error;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) CHECK_STR(matches(known[i].pattern, known[i].s, &error), known[i].want);
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        matches(refused[i], "ab", &error);
        CHECK(strstr(error, "does not know") != NULL);
        if (!*error) fprintf(stderr, "not refused: %s\n", refused[i]);
    }
    for (size_t i = 0; i < sizeof malformed / sizeof malformed[0]; i++) {
        matches(malformed[i], "ab", &error);
        CHECK(strstr(error, "is malformed: ") != NULL);
        if (!strstr(error, "is malformed: ")) fprintf(stderr, "not called malformed: %s: %s\n", malformed[i], error);
    }
}

/* The same language decided by a naive matcher over a b c: returns the ends that a pattern can reach, in order of preference. */
typedef struct ends { int at[64]; int count; } ends;

static void add_end(ends *e, int at)
{
    for (int i = 0; i < e->count; i++)
        if (e->at[i] == at) return;
    if (e->count < 64) e->at[e->count++] = at;
}

static ends naive_choice(const char **p, const char *s, int at, int n);

static ends naive_item(const char **p, const char *s, int at, int n)
{
    ends e = {{0}, 0};
    if (**p == '(') {
        (*p)++;
        e = naive_choice(p, s, at, n);
        (*p)++;
        return e;
    }
    if (at < n && (s[at] == **p || **p == '.')) add_end(&e, at + 1);
    (*p)++;
    return e;
}

static void naive_repeat(const char *item, const char *s, int at, int n, int least, int most, int depth, ends *out)
{
    if (most != 0 && depth < 12) {
        const char *p = item;
        ends e = naive_item(&p, s, at, n);
        for (int i = 0; i < e.count; i++)
            if (e.at[i] > at) naive_repeat(item, s, e.at[i], n, least - 1, most - 1, depth + 1, out);
    }
    if (least <= 0) add_end(out, at);
}

static ends naive_sequence(const char **p, const char *s, int at, int n)
{
    ends now = {{0}, 0};
    add_end(&now, at);
    while (**p && **p != '|' && **p != ')') {
        const char *item = *p;
        ends next = {{0}, 0};
        naive_item(p, s, n + 1, n);
        char q = **p;
        if (q == '*' || q == '+' || q == '?') (*p)++;
        else q = 0;
        for (int i = 0; i < now.count; i++) naive_repeat(item, s, now.at[i], n, q == '*' || q == '?' ? 0 : 1, q == '*' || q == '+' ? 99 : 1, 0, &next);
        now = next;
    }
    return now;
}

static ends naive_choice(const char **p, const char *s, int at, int n)
{
    ends all = naive_sequence(p, s, at, n);
    while (**p == '|') {
        (*p)++;
        ends e = naive_sequence(p, s, at, n);
        for (int i = 0; i < e.count; i++) add_end(&all, e.at[i]);
    }
    return all;
}

/* A random pattern whose items always take a character. */
static void random_pattern(char *out, int *n, int depth)
{
    int items = 1 + (int)(test_random() % 3);
    for (int i = 0; i < items && *n < 60; i++) {
        uint32_t k = test_random() % 8;
        if (k < 5 || depth == 0) {
            out[(*n)++] = "abc."[test_random() % 4];
        } else {
            out[(*n)++] = '(';
            out[(*n)++] = "abc"[test_random() % 3];
            random_pattern(out, n, depth - 1);
            if (test_random() % 2) {
                out[(*n)++] = '|';
                out[(*n)++] = "abc"[test_random() % 3];
                random_pattern(out, n, depth - 1);
            }
            out[(*n)++] = ')';
        }
        if (test_random() % 3 == 0) out[(*n)++] = "*+?"[test_random() % 3];
    }
    out[*n] = 0;
}

static void test_llm_pattern_random(void)
{
    llmi_arena r = llmi_arena_make(NULL);
    llmi_unicode u;
    int bad = 0, matched = 0;
    CHECK(llmi_unicode_make(&u, &r));
    for (int round = 0; round < 3000; round++) {
        char pattern[200], s[12];
        int n = 0, bytes = (int)(test_random() % 11);
        random_pattern(pattern, &n, 2);
        for (int i = 0; i < bytes; i++) s[i] = "abc"[test_random() % 3];
        llmi_arena scratch = llmi_arena_make(NULL);
        const llmi_regex *x = llmi_regex_make(pattern, (size_t)n, 0, &u, &scratch, NULL);
        for (int memo = 0; x && memo < 2; memo++) { /* once as usual, once remembering everything from the start */
            llmi_matcher m;
            memset(&m, 0, sizeof m);
            m.u = &u;
            llmi_matcher_set(&m, x, s, (size_t)bytes);
            if (memo) llmi_count_step(&m, (uint64_t)1 << 40);
            for (int at = 0, next; at <= bytes; at = next) {
                const char *p = pattern;
                next = at + 1;
                ends e = naive_choice(&p, s, at, bytes);
                size_t got = llmi_match(&m, (size_t)at);
                matched += e.count > 0;
                if (memo && e.count && e.at[0] > at) next = e.at[0]; /* what is remembered holds for searches only */
                if (got == (e.count ? (size_t)e.at[0] : LLMI_NO_MATCH)) continue;
                if (bad++ < 3) fprintf(stderr, "%s on %.*s at %d memo %d: %ld, expected %d\n", pattern, bytes, s, at, memo, (long)got, e.count ? e.at[0] : -1);
            }
            llmi_matcher_drop(&m);
        }
        llmi_arena_drop(&scratch);
    }
    CHECK_INT(bad, 0);
    CHECK(matched > 5000);
    llmi_arena_drop(&r);
}

/* A text of 1 MB must take time in proportion, whatever the pattern. */
static void test_llm_pattern_linear(void)
{
    static const char *const patterns[] = {"(a+)+b", "(a|a)*b", "a*b|a", "(?:a?a?a?)a*+b|a", "a*a*a*b", "(?:aa|a)+b|aaa", "a{1,3}a{1,3}b|a"};
    size_t n = 300000;
    char *s = (char *)malloc(n);
    llmi_arena r = llmi_arena_make(NULL);
    llmi_unicode u;
    memset(s, 'a', n);
    CHECK(llmi_unicode_make(&u, &r));
    for (size_t k = 0; k < sizeof patterns / sizeof patterns[0]; k++) {
        moq_error err;
        llmi_matcher m;
        memset(&m, 0, sizeof m);
        m.u = &u;
        const llmi_regex *x = llmi_regex_make(patterns[k], strlen(patterns[k]), 0, &u, &r, &err);
        CHECK(x != NULL);
        if (!x) continue;
        double start = test_seconds();
        llmi_matcher_set(&m, x, s, n);
        for (size_t i = 0; i < n;) {
            size_t end = llmi_match(&m, i);
            i = end == LLMI_NO_MATCH || end == i ? i + 1 : end;
        }
        CHECK(!m.failed && test_seconds() - start < 20);
        llmi_matcher_drop(&m);
    }
    llmi_arena_drop(&r);
    free(s);
}

/* ---- definitions ---- */

static void refuse(const char *file_keys, const char *model_keys, moq_result code, const char *names)
{
    moq_error err;
    llm_tokenizer *t = open_small(file_keys, model_keys, &err);
    CHECK(t == NULL);
    CHECK_INT(err.code, code);
    CHECK(strstr(err.text, names) != NULL);
    if (!strstr(err.text, names)) fprintf(stderr, "%s\n", err.text);
    close_json(t);
    CHECK_INT(test_state.live_allocs, 0);
}

static void refuse_json(const char *json, moq_result code, const char *names)
{
    moq_error err;
    llm_tokenizer *t = open_json(json, strlen(json), "{\"vocab_size\": 50}", 1, &err);
    CHECK(t == NULL);
    CHECK_INT(err.code, code);
    CHECK(strstr(err.text, names) != NULL);
    if (t || !strstr(err.text, names)) fprintf(stderr, "%s: %s\n", json, err.text);
    close_json(t);
    CHECK_INT(test_state.live_allocs, 0);
}

static void test_tokenizer_refused(void)
{
    refuse_json("{}", MOQ_E_TOKENIZER, "'model'");
    refuse_json("{\"model\": {\"type\": \"WordPiece\", \"vocab\": {}}}", MOQ_E_UNSUPPORTED, "WordPiece");
    refuse_json("{\"model\": {\"vocab\": {\"a\": 0}}}", MOQ_E_UNSUPPORTED, "(none)");
    refuse_json("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 0}, \"merges\": []}}", MOQ_E_TOKENIZER, "'a' and 'b'");
    refuse_json("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": -1}, \"merges\": []}}", MOQ_E_TOKENIZER, "'a'");
    refuse_json("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 2147483648}, \"merges\": []}}", MOQ_E_TOKENIZER, "2147483648");
    refuse_json("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 9223372036854775808}, \"merges\": []}}", MOQ_E_TOKENIZER, "9223372036854775808");
    refuse_json("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 1.5}, \"merges\": []}}", MOQ_E_TOKENIZER, "1.5");
    refuse_json("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": \"0\"}, \"merges\": []}}", MOQ_E_TOKENIZER, "'a'");
    refuse_json("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 300000}, \"merges\": []}}", MOQ_E_LIMIT, "MOQ_MAX_VOCAB");
    refuse_json("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 50}, \"merges\": []}}", MOQ_E_MISMATCH, "'a' has the id 50");
    refuse_json("{\"model\": {\"type\": \"BPE\", \"vocab\": {}, \"merges\": []}}", MOQ_E_TOKENIZER, "vocab");
    refuse_json("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}}}", MOQ_E_TOKENIZER, "merges");
    refuse_json("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": [\"a\"]}}", MOQ_E_TOKENIZER, "merge 0");
    refuse_json("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"aa\": 1}, \"merges\": [\"a a\", \"a a a\"]}}", MOQ_E_TOKENIZER, "merge 1");
    refuse_json("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"aa\": 1}, \"merges\": [[\"a\", \"a\", \"a\"]]}}", MOQ_E_TOKENIZER, "merge 0");
    refuse_json("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"aa\": 1}, \"merges\": [[\"a\", 1]]}}", MOQ_E_TOKENIZER, "merge 0");
    refuse_json("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 1}, \"merges\": [\"a b\"]}}", MOQ_E_TOKENIZER, "joined");
    refuse_json("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": [], \"byte_fallback\": true}}", MOQ_E_TOKENIZER, "<0x00>");
    refuse("", "\"dropout\": 0.1, ", MOQ_E_UNSUPPORTED, "dropout");
    refuse("", "\"continuing_subword_prefix\": \"##\", ", MOQ_E_UNSUPPORTED, "continuing_subword_prefix");
    refuse("", "\"end_of_word_suffix\": \"</w>\", ", MOQ_E_UNSUPPORTED, "end_of_word_suffix");
    refuse("", "\"unk_token\": \"<nothing>\", ", MOQ_E_TOKENIZER, "<nothing>");
    refuse("\"normalizer\": {\"type\": \"BertNormalizer\"}, ", "", MOQ_E_UNSUPPORTED, "BertNormalizer");
    refuse("\"normalizer\": {\"type\": \"Precompiled\", \"precompiled_charsmap\": null}, ", "", MOQ_E_TOKENIZER, "precompiled_charsmap");
    refuse("\"normalizer\": {\"type\": \"Precompiled\", \"precompiled_charsmap\": \"BAAAAAA\"}, ", "", MOQ_E_TOKENIZER, "precompiled_charsmap"); /* no padding */
    refuse("\"normalizer\": {\"type\": \"Precompiled\", \"precompiled_charsmap\": \"BAAA*AAAAAA=\"}, ", "", MOQ_E_TOKENIZER, "precompiled_charsmap");
    refuse("\"normalizer\": {\"type\": \"Precompiled\", \"precompiled_charsmap\": \"CAAAAAAAAAA=\"}, ", "", MOQ_E_TOKENIZER, "precompiled_charsmap"); /* 8 bytes of 4 */
    refuse("\"normalizer\": {\"type\": \"Precompiled\", \"precompiled_charsmap\": \"BAAAAAAAAAD/AA==\"}, ", "", MOQ_E_TOKENIZER, "UTF-8");
    refuse_json("{\"model\": {\"type\": \"Unigram\", \"vocab\": []}}", MOQ_E_TOKENIZER, "vocab");
    refuse_json("{\"model\": {\"type\": \"Unigram\", \"vocab\": {\"a\": 1}}}", MOQ_E_TOKENIZER, "vocab");
    refuse_json("{\"model\": {\"type\": \"Unigram\", \"vocab\": [[\"a\", 0], [\"b\"]]}}", MOQ_E_TOKENIZER, "entry 1");
    refuse_json("{\"model\": {\"type\": \"Unigram\", \"vocab\": [[\"a\", \"x\"]]}}", MOQ_E_TOKENIZER, "entry 0");
    refuse_json("{\"model\": {\"type\": \"Unigram\", \"vocab\": [[\"a\", 1e300]]}}", MOQ_E_TOKENIZER, "entry 0");
    refuse_json("{\"model\": {\"type\": \"Unigram\", \"vocab\": [[\"a\", 0], [\"a\", 1]]}}", MOQ_E_TOKENIZER, "'a' is in model.vocab twice");
    refuse_json("{\"model\": {\"type\": \"Unigram\", \"unk_id\": 2, \"vocab\": [[\"a\", 0], [\"b\", 1]]}}", MOQ_E_TOKENIZER, "unk_id");
    refuse_json("{\"model\": {\"type\": \"Unigram\", \"byte_fallback\": true, \"vocab\": [[\"a\", 0]]}}", MOQ_E_TOKENIZER, "<0x00>");
    refuse("\"decoder\": {\"type\": \"WordPiece\"}, ", "", MOQ_E_UNSUPPORTED, "WordPiece");
    refuse("\"post_processor\": {\"type\": \"Other\"}, ", "", MOQ_E_UNSUPPORTED, "Other");
    refuse("\"pre_tokenizer\": {\"type\": \"UnicodeScripts\"}, ", "", MOQ_E_UNSUPPORTED, "UnicodeScripts");
    refuse("\"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": \"(?<=a)b\"}, \"behavior\": \"Isolated\"}, ", "", MOQ_E_UNSUPPORTED, "(?<=a)b");
    refuse("\"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": \"a\"}, \"behavior\": \"Odd\"}, ", "", MOQ_E_UNSUPPORTED, "Odd");
    refuse("\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": \"<q>\"}}], \"special_tokens\": {}}, ", "", MOQ_E_TOKENIZER, "<q>");
}

static void test_tokenizer_added_refused(void)
{
    const char *model = "\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": []}}";
    static text t;
    static const struct { const char *list; moq_result code; const char *names; } rows[] = {
        {"{\"id\": 1, \"content\": \"\"}", MOQ_E_TOKENIZER, "added token 0"}, {"{\"id\": 1, \"content\": \"x\"}, {\"id\": 2, \"content\": \"x\"}", MOQ_E_TOKENIZER, "twice"},
        {"{\"id\": 1, \"content\": \"x\"}, {\"id\": 1, \"content\": \"y\"}", MOQ_E_TOKENIZER, "'x' and 'y'"}, {"{\"id\": 0, \"content\": \"x\"}", MOQ_E_TOKENIZER, "'a' and 'x'"},
        {"{\"id\": -1, \"content\": \"x\"}", MOQ_E_TOKENIZER, "'x'"}, {"{\"content\": \"x\"}", MOQ_E_TOKENIZER, "'x'"}, {"{\"id\": 1}", MOQ_E_TOKENIZER, "added token 0"}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        t.count = 0;
        add(&t, "{\"added_tokens\": [");
        add(&t, rows[i].list);
        add(&t, "], ");
        add(&t, model);
        refuse_json(t.data, rows[i].code, rows[i].names);
    }
    t.count = 0;
    add(&t, "{\"added_tokens\": [{\"id\": 1, \"content\": \"");
    for (int i = 0; i < 1 << 16; i++) add(&t, "0123456789abcdef");
    add(&t, "\"}], ");
    add(&t, model);
    refuse_json(t.data, MOQ_E_LIMIT, "added token 0");
    t.count = 0;
    add(&t, "{");
    for (int i = 0; i < 10000; i++) add(&t, i ? "{\"type\": \"Sequence\", \"normalizers\": [" : "\"normalizer\": {\"type\": \"Sequence\", \"normalizers\": [");
    for (int i = 0; i < 10000; i++) add(&t, "]}");
    add(&t, ", ");
    add(&t, model);
    refuse_json(t.data, MOQ_E_LIMIT, "");
    t.count = 0;
    add(&t, "{\"normalizer\": {\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"Strip\"}");
    for (int i = 0; i < 100; i++) add(&t, ", {\"type\": \"Strip\"}");
    add(&t, "]}, ");
    add(&t, model);
    refuse_json(t.data, MOQ_E_LIMIT, "steps");
}

static const char *const byte_level = "\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false}, \"decoder\": {\"type\": \"ByteLevel\"}, ";

static void test_tokenizer_small(void)
{
    moq_error err;
    char out[8];
    int32_t ids[4] = {2, 9, 5, 7}, few[2] = {-5, -5};
    llm_tokenizer *t = open_small(byte_level, "", &err);
    CHECK(t != NULL);
    CHECK_STR(ids_of(t, "ababab a", 8, 0), "3,2,5");
    CHECK_STR(ids_of(t, "a<x>b", 5, 0), "0,1"); /* < x > are not in this vocabulary: bytes without a token vanish */
    CHECK_STR(ids_of(t, "a<x>b", 5, LLM_SPECIAL), "0,9,1");
    CHECK_STR(ids_of(t, "a\0b", 3, 0), "0,1");
    CHECK_STR(ids_of(t, "", 0, LLM_SPECIAL | LLM_BOS), "");
    CHECK_INT((long long)llm_encode(t, NULL, 0, 0, NULL, 0), 0);
    CHECK_INT((long long)llm_encode(t, "abc", 3, 0, few, 1), 2);
    CHECK(few[0] == 2 && few[1] == -5);
    CHECK_INT(llm_vocab(t), 10);
    CHECK_INT(llm_token_find(t, "abab"), 3);
    CHECK_INT(llm_token_find(t, "<x>"), 9);
    CHECK_INT(llm_token_find(t, "nothing"), -1);
    CHECK_INT((long long)llm_decode(t, ids, 4, 0, out, sizeof out), 4); /* 9 is special, 7 a gap */
    CHECK_STR(out, "ab a");
    CHECK_INT((long long)llm_decode(t, ids, 4, LLM_SPECIAL, out, 8), 7);
    CHECK_STR(out, "ab<x> a");
    memset(out, '#', sizeof out);
    CHECK_INT((long long)llm_decode(t, ids, 4, 0, out, 4), 4); /* it fits, the NUL does not */
    CHECK(memcmp(out, "ab a####", 8) == 0);
    CHECK_INT((long long)llm_decode(t, ids, 4, 0, NULL, 0), 4);
    ids[0] = -1;
    ids[1] = INT32_MAX;
    CHECK_INT((long long)llm_decode(t, ids, 2, 0, out, 8), 0);
    CHECK_STR(out, "");
    close_json(t);
    CHECK(llm_tokenizer_open(NULL, &err) == NULL && err.code == MOQ_E_ARG);
    llm_tokenizer_close(NULL);
    CHECK_INT(llm_vocab(NULL), 0);
    CHECK_INT(test_state.live_allocs, 0);
}

static void test_tokenizer_around(void)
{
    moq_error err;
    llm_tokenizer *t = open_small("\"post_processor\": {\"type\": \"Sequence\", \"processors\": [{\"type\": \"ByteLevel\"}, {\"type\": \"TemplateProcessing\", \"single\": "
        "[{\"SpecialToken\": {\"id\": \"<x>\", \"type_id\": 0}}, {\"Sequence\": {\"id\": \"A\", \"type_id\": 0}}, {\"SpecialToken\": {\"id\": \"c\", \"type_id\": 0}}], "
        "\"special_tokens\": {\"<x>\": {\"id\": \"<x>\", \"ids\": [9], \"tokens\": [\"<x>\"]}, \"c\": {\"id\": \"c\", \"ids\": [6, 6], \"tokens\": [\"c\", \"c\"]}}}]}, ", "", &err);
    CHECK(t != NULL);
    CHECK_STR(ids_of(t, "ab", 2, LLM_BOS), "9,2,6,6");
    CHECK_STR(ids_of(t, "", 0, LLM_BOS), "9,6,6");
    CHECK_STR(ids_of(t, "ab", 2, 0), "2");
    close_json(t);
    t = open_small("\"post_processor\": {\"type\": \"RobertaProcessing\", \"cls\": [\"<x>\", 9], \"sep\": [\"c\", 6]}, ", "", &err);
    CHECK_STR(ids_of(t, "ab", 2, LLM_BOS), "9,2,6");
    close_json(t);
}

static void test_tokenizer_unknown(void)
{
    moq_error err;
    llm_tokenizer *t = open_small("", "\"unk_token\": \"c\", ", &err);
    CHECK_STR(ids_of(t, "a??b\xff", 5, 0), "0,6,6,1,6");
    close_json(t);
    t = open_small("", "\"unk_token\": \"c\", \"fuse_unk\": true, ", &err);
    CHECK_STR(ids_of(t, "a??b\xff", 5, 0), "0,6,1,6");
    close_json(t);
    t = open_small("", "", &err);
    CHECK_STR(ids_of(t, "a??b", 4, 0), "2"); /* the reference, too, merges across what vanished */
    close_json(t);
    t = open_small(byte_level, "\"ignore_merges\": true, ", &err);
    CHECK_STR(ids_of(t, "c ab", 4, 0), "6,4,2");
    close_json(t);
}

static void test_tokenizer_long_texts(void)
{
    moq_error err;
    size_t n = 1 << 20, bytes = 0;
    char *s = (char *)malloc(n), *json = moq_read_file(test_path("data/tokenizers/qwen2.json"), 1 << 24, NULL, &bytes, &err);
    static const char *const fills[] = {"a", " ", "\n", "1", "!", "\xcc\x81", "\xe4\xb8\xad", "\xff", "<|im_"};
    llm_tokenizer *t = json ? open_json(json, bytes, "{}", 0, &err) : NULL;
    CHECK(t != NULL);
    for (size_t k = 0; t && k < sizeof fills / sizeof fills[0]; k++) {
        size_t m = strlen(fills[k]);
        for (size_t i = 0; i < n; i++) s[i] = fills[k][i % m];
        double start = test_seconds();
        size_t count = llm_encode(t, s, n / m * m, 0, NULL, 0);
        CHECK(count != SIZE_MAX && count > n / 200);
        CHECK(test_seconds() - start < 20);
    }
    close_json(t);
    moq_release(NULL, json, bytes + 1);
    free(s);
}

static void test_tokenizer_many_added(void)
{
    moq_error err;
    text t = {NULL, 0, 0};
    int count = 100000;
    add(&t, "{\"added_tokens\": [");
    for (int i = 0; i < count; i++) {
        add_number(&t, i ? ", {\"id\": " : "{\"id\": ", i + 1);
        add_number(&t, ", \"normalized\": false, \"content\": \"<common_prefix_", i);
        add(&t, ">\"}");
    }
    add(&t, "], \"model\": {\"type\": \"BPE\", \"vocab\": {\"<\": 0}, \"merges\": []}}");
    double start = test_seconds();
    llm_tokenizer *tok = open_json(t.data, t.count, "{}", 0, &err);
    CHECK(tok != NULL && test_seconds() - start < 10);
    if (tok) CHECK_STR(ids_of(tok, "<common_prefix_99999><<common_prefix_7><common_prefix_100000>", 61, 0), "100000,0,8,0");
    close_json(tok);
    size_t n = 1 << 20;
    char *s = (char *)malloc(n);
    for (size_t i = 0; i < n; i++) s[i] = "<common_prefix_"[i % 15];
    tok = open_json(t.data, t.count, "{}", 0, &err);
    start = test_seconds();
    CHECK(tok && llm_encode(tok, s, n, 0, NULL, 0) == n / 15 + 1);
    CHECK(test_seconds() - start < 10);
    close_json(tok);
    free(s);
    free(t.data);
}

/* A large vocabulary opens quickly: 150,000 tokens, 149,000 merges. */
static void test_tokenizer_large(void)
{
    moq_error err;
    text t = {NULL, 0, 0};
    int letters = 1000, count = 150000;
    char name[64];
    add(&t, "{\"model\": {\"type\": \"BPE\", \"vocab\": {");
    for (int i = 0; i < count; i++) {
        if (i < letters) snprintf(name, sizeof name, "%s\"\\u%04x\": %d", i ? "," : "", 0x4e00 + i, i);
        else snprintf(name, sizeof name, ",\"\\u%04x\\u%04x\": %d", 0x4e00 + i % 1000, 0x4e00 + i / 1000, i);
        add(&t, name);
    }
    add(&t, "}, \"merges\": [");
    for (int i = letters; i < count; i++) {
        snprintf(name, sizeof name, "%s\"\\u%04x \\u%04x\"", i > letters ? "," : "", 0x4e00 + i % 1000, 0x4e00 + i / 1000);
        add(&t, name);
    }
    add(&t, "]}}");
    double start = test_seconds();
    llm_tokenizer *tok = open_json(t.data, t.count, "{}", 0, &err);
    CHECK(tok != NULL && test_seconds() - start < 5);
    CHECK_STR(ids_of(tok, "\xe4\xb8\x85\xe4\xb8\x81", 6, 0), "1005"); /* letters 5 and 1 */
    CHECK_STR(ids_of(tok, "\xe4\xb8\x85\xe4\xb8\x80", 6, 0), "5,0");
    close_json(tok);
    free(t.data);
}

static void fail_tokenizer_allocations(const char *path)
{
    moq_error err;
    size_t bytes = 0;
    int done = 0;
    const char *s = "int main \xcc\x81\xff<|im_start|> 123";
    char *json = moq_read_file(test_path(path), 1 << 24, NULL, &bytes, &err);
    CHECK(json != NULL);
    for (long k = 1; json && !done && k < 3000; k++) {
        test_state.fail_at = k;
        llm_tokenizer *t = open_json(json, bytes, "{}", 1, &err);
        done = test_state.fail_at > 0;
        test_state.fail_at = 0;
        CHECK(done ? t != NULL : t == NULL && err.code == MOQ_E_NOMEM);
        if (t) {
            int whole = 0;
            size_t want = llm_encode(t, s, strlen(s), LLM_SPECIAL, NULL, 0);
            for (long i = 1; !whole && i < 1000; i++) {
                test_state.fail_at = i;
                size_t n = llm_encode(t, s, strlen(s), LLM_SPECIAL, NULL, 0);
                whole = test_state.fail_at > 0;
                test_state.fail_at = 0;
                CHECK(n == (whole ? want : SIZE_MAX));
            }
            CHECK(whole);
        }
        close_json(t);
        CHECK_INT(test_state.live_allocs, 0);
    }
    CHECK(done);
    moq_release(NULL, json, bytes + 1);
}

static void test_tokenizer_failing_allocations(void)
{
    fail_tokenizer_allocations("data/tokenizers/qwen2.json");
    fail_tokenizer_allocations("data/tokenizers/unigram.json");
}

/* Every byte of a definition damaged in turn: refused or opened, never a crash or a leak. */
/* Every byte changed in three ways, and every length: an error with a text, or a tokenizer that works. */
static void damage_json(const char *good, size_t n, int least)
{
    moq_error err;
    int opened = 0;
    char *json = (char *)test_copy(good, n);
    for (size_t i = 0; i < n; i++) {
        for (int k = 0; k < 4; k++) {
            size_t m = k == 3 ? i : n;
            json[i] = (char)(k == 0 ? good[i] ^ 1 : k == 1 ? "\"{}[]9"[i % 6] : k == 2 ? (char)(test_random() & 0xff) : good[i]);
            uint8_t *exact = test_copy(json, m);
            llm_tokenizer *t = open_json((const char *)exact, m, "{}", 1, &err);
            opened += t != NULL;
            if (t) CHECK(llm_encode(t, "ab 1<x>\xcc\x81 c\xef\xbc\xa1", 14, LLM_SPECIAL | LLM_BOS, NULL, 0) != SIZE_MAX);
            else CHECK(err.code < 0 && err.text[0]);
            close_json(t);
            free(exact);
            CHECK_INT(test_state.live_allocs, 0);
        }
        json[i] = good[i];
    }
    CHECK(opened > least);
    free(json);
}

static void test_tokenizer_damaged(void)
{
    static const char unigram[] = "{\"added_tokens\":[{\"id\":4,\"content\":\"<x>\",\"normalized\":true}],\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":["
        "{\"type\":\"Precompiled\",\"precompiled_charsmap\":\"CAAAAAAEAAAAAAAAYQA=\"},{\"type\":\"NFKC\"},{\"type\":\"Replace\",\"pattern\":{\"Regex\":\" {2,}\"},\"content\":\" \"}]},"
        "\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"\xe2\x96\x81\",\"prepend_scheme\":\"first\"},\"decoder\":{\"type\":\"Metaspace\"},"
        "\"model\":{\"type\":\"Unigram\",\"unk_id\":0,\"vocab\":[[\"<unk>\",0],[\"a\",-1.5],[\"ab\",-2e0],[\"\xe2\x96\x81\",-3]]}}";
    static const char bpe[] = "{\"added_tokens\":[{\"id\":4,\"content\":\"<x>\",\"special\":true,\"lstrip\":true}],\"normalizer\":{\"type\":\"NFC\"},\"pre_tokenizer\":{\"type\":\"Sequence\","
        "\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\p{N}{1,3}|[^a-c]+(?!\\\\S)|(?:a|b)?+c\"},\"behavior\":\"Isolated\"},{\"type\":\"ByteLevel\",\"use_regex\":false}]},"
        "\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<x>\"}},{\"Sequence\":{\"id\":\"A\"}}],\"special_tokens\":{\"<x>\":{\"ids\":[4]}}},"
        "\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2,\"1\":3},\"merges\":[\"a b\"]}}";
    damage_json(bpe, sizeof bpe - 1, 10);
    damage_json(unigram, sizeof unigram - 1, 10);
}

/* ---- Unigram ---- */

static const char *const unigram_pieces[] = {"<unk>", "a", "b", "ab", "aba", "bb", "abab", "\xc3\xa9", "b\xc3\xa9", ("\xc3\xa9" "a"), "\xc3\xa9\xc3\xa9", "bbbb", "aa"};
enum { UNIGRAM_PIECES = sizeof unigram_pieces / sizeof unigram_pieces[0] };

/* The best sum of scores over all ways to cut s[at, n): every piece, or one unknown character where no piece is that character. */
static double best_cut(const char *s, size_t at, size_t n, const double *scores, double unknown)
{
    double best = -1e300;
    int alone = 0;
    if (at == n) return 0;
    size_t width = (uint8_t)s[at] < 0x80 ? 1 : 2;
    for (int k = 1; k < UNIGRAM_PIECES; k++) {
        size_t m = strlen(unigram_pieces[k]);
        if (m > n - at || memcmp(s + at, unigram_pieces[k], m) != 0) continue;
        double v = scores[k] + best_cut(s, at + m, n, scores, unknown);
        if (v > best) best = v;
        if (m == width) alone = 1;
    }
    if (!alone) {
        double v = unknown + best_cut(s, at + width, n, scores, unknown);
        if (v > best) best = v;
    }
    return best;
}

/* Viterbi against all segmentations, with scores drawn anew for each vocabulary. */
static void test_tokenizer_unigram_best(void)
{
    static const char *const letters[] = {"a", "b", "\xc3\xa9", "c", "a", "b"};
    uint32_t seed = 5;
    int unknowns = 0;
    for (int round = 0; round < 40; round++) {
        static text t;
        double scores[UNIGRAM_PIECES], least = 0;
        moq_error err;
        t.count = 0;
        add(&t, "{\"model\": {\"type\": \"Unigram\", \"unk_id\": 0, \"vocab\": [");
        for (int k = 0; k < UNIGRAM_PIECES; k++) {
            char s[60];
            seed = seed * 1664525u + 1013904223u;
            scores[k] = k == 0 ? 0 : -(double)(seed >> 8) / 1048576.0 - (double)strlen(unigram_pieces[k]);
            if (scores[k] < least) least = scores[k];
            snprintf(s, sizeof s, "%s[\"%s\", %.17g]", k ? ", " : "", unigram_pieces[k], scores[k]);
            add(&t, s);
        }
        add(&t, "]}}");
        llm_tokenizer *tok = open_json(t.data, t.count, "{}", 1, &err);
        CHECK(tok != NULL);
        for (int i = 0; i < 50 && tok; i++) {
            char s[64] = "";
            int32_t ids[64];
            double sum = 0;
            int n = 1 + i % 12, runs = 0, open = 0;
            for (int k = 0; k < n; k++) {
                seed = seed * 1664525u + 1013904223u;
                strcat(s, letters[(seed >> 16) % 6]);
            }
            size_t count = llm_encode(tok, s, strlen(s), 0, ids, 64), at = 0;
            for (size_t k = 0; k < count && k < 64; k++) { /* every id has its bytes; an unknown stands for a run of c */
                if (ids[k] == 0) {
                    for (open = 0; s[at] == 'c'; at++, open++) sum += least - 10;
                    CHECK(open > 0);
                    runs++;
                    continue;
                }
                const char *piece = unigram_pieces[ids[k]];
                CHECK(strncmp(s + at, piece, strlen(piece)) == 0);
                at += strlen(piece);
                sum += scores[ids[k]];
            }
            double best = best_cut(s, 0, strlen(s), scores, least - 10);
            CHECK(at == strlen(s));
            CHECK(fabs(sum - best) <= 1e-9 * fabs(best));
            unknowns += runs;
        }
        close_json(tok);
    }
    CHECK(unknowns > 100);
    CHECK_INT(test_state.live_allocs, 0);
}

/* Unknown characters without an unknown token vanish; a text of one letter costs a time that grows with its length only. */
static void test_tokenizer_unigram_odd(void)
{
    moq_error err;
    static char s[400000];
    static const char json[] = "{\"model\": {\"type\": \"Unigram\", \"vocab\": [[\"a\", -1], [\"aa\", -1.5], [\"\", -2], [\"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\", -3]]}}";
    llm_tokenizer *t = open_json(json, sizeof json - 1, "{}", 1, &err);
    CHECK(t != NULL);
    if (!t) fprintf(stderr, "%s\n", err.text);
    CHECK_STR(ids_of(t, "aaaxa", 5, 0), "0,1,0");
    CHECK_STR(ids_of(t, "", 0, 0), "");
    memset(s, 'a', sizeof s);
    double start = test_seconds();
    CHECK_INT((long long)llm_encode(t, s, sizeof s, 0, NULL, 0), (long long)sizeof s / 32);
    CHECK(test_seconds() - start < 10);
    close_json(t);
    CHECK_INT(test_state.live_allocs, 0);
}

/* ---- for tests/interop/tokenizer.py ---- */

static int print_ids(const char *path, uint32_t flags)
{
    moq_error err;
    size_t bytes = 0;
    uint8_t head[4];
    char *json = moq_read_file(path, 1u << 30, NULL, &bytes, &err);
    llm_tokenizer *t = json ? open_json(json, bytes, "{}", 0, &err) : NULL;
    if (!t) { printf("%s\n", err.text); return 1; }
    while (fread(head, 1, 4, stdin) == 4) {
        size_t n = moqi_load_u32(head);
        char *s = (char *)malloc(n + 1);
        if (!s || fread(s, 1, n, stdin) != n) return 1;
        size_t count = llm_encode(t, s, n, flags, NULL, 0);
        int32_t *ids = (int32_t *)malloc((count + 1) * sizeof *ids);
        if (!ids || llm_encode(t, s, n, flags, ids, count) != count) return 1;
        size_t shown = llm_decode(t, ids, count, flags, NULL, 0);
        char *back = (char *)malloc(shown + 1);
        llm_decode(t, ids, count, flags, back, shown + 1);
        for (size_t i = 0; i < count; i++) printf(i ? ",%d" : "%d", ids[i]);
        printf("\t");
        for (size_t i = 0; i < shown; i++) printf("%02x", (unsigned)(uint8_t)back[i]);
        printf("\n");
        free(back);
        free(ids);
        free(s);
    }
    close_json(t);
    moq_release(NULL, json, bytes + 1);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 4 && strcmp(argv[1], "--ids") == 0) return print_ids(argv[2], (uint32_t)atoi(argv[3]));
    test_begin(argc, argv);
    RUN(test_llm_utf8);
    RUN(test_llm_classes);
    RUN(test_llm_normalization);
    RUN(test_llm_normalizers);
    RUN(test_llm_pattern);
    RUN(test_llm_pattern_random);
    RUN(test_llm_pattern_linear);
    RUN(test_tokenizer_qwen2);
    RUN(test_tokenizer_o200k);
    RUN(test_tokenizer_deepseek);
    RUN(test_tokenizer_prepend);
    RUN(test_tokenizer_unigram);
    RUN(test_tokenizer_unigram_best);
    RUN(test_tokenizer_unigram_odd);
    RUN(test_tokenizer_refused);
    RUN(test_tokenizer_added_refused);
    RUN(test_tokenizer_small);
    RUN(test_tokenizer_around);
    RUN(test_tokenizer_unknown);
    RUN(test_tokenizer_long_texts);
    RUN(test_tokenizer_many_added);
    RUN(test_tokenizer_large);
    RUN(test_tokenizer_failing_allocations);
    RUN(test_tokenizer_damaged);
    return test_end();
}
