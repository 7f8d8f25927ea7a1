/* test_st.c - safetensors reader and writer: every row of the container table, an independent slow reader, every prefix, bit flip,
   failing allocation; the writer's bytes and refusals. */
#define _POSIX_C_SOURCE 200809L
#include "test.h"
#include <sys/stat.h>
#include <unistd.h>

/* ---- an independent judge: accepts or refuses, by the text of the rules, quadratic and recursive on purpose ---- */

typedef struct slow_value { int type; size_t at, end; char *text; size_t bytes; } slow_value; /* type: the first byte of the value */
typedef struct slow_file { const uint8_t *s; size_t n, pos; int bad; } slow_file;
typedef struct slow_range { uint64_t begin, end; } slow_range;

static void slow_space(slow_file *f)
{
    while (f->pos < f->n && (f->s[f->pos] == ' ' || f->s[f->pos] == '\n' || f->s[f->pos] == '\r' || f->s[f->pos] == '\t')) f->pos++;
}

static int slow_hex(slow_file *f, uint32_t *out)
{
    *out = 0;
    for (int i = 0; i < 4; i++) {
        int c = f->pos < f->n ? f->s[f->pos++] : 0;
        if (c >= '0' && c <= '9') c -= '0';
        else if (c >= 'a' && c <= 'f') c -= 'a' - 10;
        else if (c >= 'A' && c <= 'F') c -= 'A' - 10;
        else return 0;
        *out = *out * 16 + (uint32_t)c;
    }
    return 1;
}

static size_t slow_encode(uint32_t c, char *o)
{
    if (c < 0x80) { o[0] = (char)c; return 1; }
    if (c < 0x800) { o[0] = (char)(0xc0 | c >> 6); o[1] = (char)(0x80 | (c & 63)); return 2; }
    if (c < 0x10000) { o[0] = (char)(0xe0 | c >> 12); o[1] = (char)(0x80 | (c >> 6 & 63)); o[2] = (char)(0x80 | (c & 63)); return 3; }
    o[0] = (char)(0xf0 | c >> 18); o[1] = (char)(0x80 | (c >> 12 & 63)); o[2] = (char)(0x80 | (c >> 6 & 63)); o[3] = (char)(0x80 | (c & 63));
    return 4;
}

/* An unescaped string on the heap, or NULL. */
static char *slow_string(slow_file *f, size_t *bytes)
{
    char *out = (char *)malloc(f->n + 4);
    size_t n = 0;
    if (f->pos >= f->n || f->s[f->pos] != '"') { free(out); return NULL; }
    for (f->pos++; f->pos < f->n;) {
        uint8_t c = f->s[f->pos++];
        if (c == '"') { out[n] = 0; *bytes = n; return out; }
        if (c < 0x20) break;
        if (c != '\\') { out[n++] = (char)c; continue; }
        c = f->pos < f->n ? f->s[f->pos++] : 0;
        if (c == '"' || c == '\\' || c == '/') out[n++] = (char)c;
        else if (c == 'b') out[n++] = '\b';
        else if (c == 'f') out[n++] = '\f';
        else if (c == 'n') out[n++] = '\n';
        else if (c == 'r') out[n++] = '\r';
        else if (c == 't') out[n++] = '\t';
        else if (c == 'u') {
            uint32_t u, low;
            if (!slow_hex(f, &u)) break;
            if (u >= 0xdc00 && u <= 0xdfff) break;
            if (u >= 0xd800 && u <= 0xdbff) {
                if (f->pos + 2 > f->n || f->s[f->pos] != '\\' || f->s[f->pos + 1] != 'u') break;
                f->pos += 2;
                if (!slow_hex(f, &low) || low < 0xdc00 || low > 0xdfff) break;
                u = 0x10000 + (u - 0xd800) * 0x400 + (low - 0xdc00);
            }
            n += slow_encode(u, out + n);
        } else break;
    }
    free(out);
    return NULL;
}

static int slow_json(slow_file *f, int depth, int *type);

/* The members of an object are handed to `each`; a list's too (key NULL). */
typedef int (*slow_each)(slow_file *f, const char *key, size_t key_bytes, void *arg);

static int slow_container(slow_file *f, int depth, slow_each each, void *arg)
{
    char close = f->s[f->pos] == '{' ? '}' : ']';
    char *keys[4096];
    size_t lengths[4096], count = 0;
    int ok = 0;
    f->pos++;
    if (depth > 8) return 0;
    slow_space(f);
    if (f->pos < f->n && f->s[f->pos] == close) { f->pos++; return 1; }
    while (count < 4096) {
        keys[count] = NULL;
        lengths[count] = 0;
        slow_space(f);
        if (close == '}') {
            keys[count] = slow_string(f, &lengths[count]);
            if (!keys[count]) break;
            int twice = 0;
            for (size_t i = 0; i < count; i++) twice |= lengths[i] == lengths[count] && memcmp(keys[i], keys[count], lengths[i]) == 0;
            slow_space(f);
            if (twice || f->pos >= f->n || f->s[f->pos++] != ':') { free(keys[count]); break; }
            slow_space(f);
        }
        count++;
        int type;
        if (!(each ? each(f, keys[count - 1], lengths[count - 1], arg) : slow_json(f, depth, &type))) break;
        slow_space(f);
        if (f->pos >= f->n) break;
        char c = (char)f->s[f->pos++];
        if (c == close) { ok = 1; break; }
        if (c != ',') break;
    }
    for (size_t i = 0; i < count; i++) free(keys[i]);
    return ok;
}

/* Any value; *type is its first byte. */
static int slow_json(slow_file *f, int depth, int *type)
{
    static const char *const words[] = {"true", "false", "null"};
    slow_space(f);
    *type = f->pos < f->n ? f->s[f->pos] : 0;
    if (*type == '{' || *type == '[') return slow_container(f, depth + 1, NULL, NULL);
    if (*type == '"') {
        size_t n;
        char *s = slow_string(f, &n);
        free(s);
        return s != NULL;
    }
    for (int i = 0; i < 3; i++)
        if (f->n - f->pos >= strlen(words[i]) && memcmp(f->s + f->pos, words[i], strlen(words[i])) == 0) { f->pos += strlen(words[i]); return 1; }
    size_t p = f->pos;
#define DIGIT(at) ((at) < f->n && f->s[at] >= '0' && f->s[at] <= '9')
    if (p < f->n && f->s[p] == '-') p++;
    if (!DIGIT(p)) return 0;
    if (f->s[p] == '0') p++;
    else while (DIGIT(p)) p++;
    if (p < f->n && f->s[p] == '.') { p++; if (!DIGIT(p)) return 0; while (DIGIT(p)) p++; }
    if (p < f->n && (f->s[p] == 'e' || f->s[p] == 'E')) {
        p++;
        if (p < f->n && (f->s[p] == '+' || f->s[p] == '-')) p++;
        if (!DIGIT(p)) return 0;
        while (DIGIT(p)) p++;
    }
    f->pos = p;
    return 1;
}

/* Plain digits below 2^64. */
static int slow_natural(slow_file *f, uint64_t *out)
{
    size_t from = f->pos;
    int type;
    long double v = 0;
    *out = 0;
    if (!slow_json(f, 3, &type)) return 0;
    for (size_t i = from; i < f->pos; i++) {
        if (f->s[i] < '0' || f->s[i] > '9') return 0;
        v = v * 10 + (f->s[i] - '0');
        *out = *out * 10 + (uint64_t)(f->s[i] - '0');
        if (v > 18446744073709551615.0L) return 0;
    }
    return f->pos > from;
}

typedef struct slow_entry { int dtype_bits, seen, rank; long double product; uint64_t shape[8], range[2]; int offsets, zero; } slow_entry;
typedef struct slow_state { slow_range list[4096]; size_t count; uint64_t section; } slow_state;

static int slow_dim(slow_file *f, const char *key, size_t n, void *arg)
{
    slow_entry *e = (slow_entry *)arg;
    uint64_t v;
    (void)key; (void)n;
    if (e->rank == MOQ_MAX_RANK || !slow_natural(f, &v)) return 0;
    e->rank++;
    if (v == 0) e->zero = 1;
    else e->product *= (long double)v;
    return 1;
}

static int slow_offset(slow_file *f, const char *key, size_t n, void *arg)
{
    slow_entry *e = (slow_entry *)arg;
    (void)key; (void)n;
    return e->offsets < 2 && slow_natural(f, &e->range[e->offsets++]);
}

static int slow_member(slow_file *f, const char *key, size_t n, void *arg)
{
    static const struct { const char *name; int bits; } table[] = {
        {"BOOL", 8}, {"U8", 8}, {"I8", 8}, {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"F4", 4},
        {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"I16", 16}, {"U16", 16}, {"F16", 16}, {"BF16", 16}, {"I32", 32}, {"U32", 32}, {"F32", 32}, {"C64", 64},
        {"F64", 64}, {"I64", 64}, {"U64", 64}};
    slow_entry *e = (slow_entry *)arg;
    char first = (char)(f->pos < f->n ? f->s[f->pos] : 0);
    if (n == 5 && memcmp(key, "dtype", 5) == 0) {
        size_t bytes = 0;
        char *s = slow_string(f, &bytes);
        for (size_t i = 0; s && i < MOQI_COUNT(table); i++)
            if (strlen(table[i].name) == bytes && memcmp(table[i].name, s, bytes) == 0) e->dtype_bits = table[i].bits;
        free(s);
        e->seen |= 1;
        return e->dtype_bits != 0;
    }
    if (n == 5 && memcmp(key, "shape", 5) == 0 && first == '[') { e->seen |= 2; return slow_container(f, 3, slow_dim, e); }
    if (n == 12 && memcmp(key, "data_offsets", 12) == 0 && first == '[') { e->seen |= 4; return slow_container(f, 3, slow_offset, e) && e->offsets == 2; }
    return 0;
}

static int slow_text(slow_file *f, const char *key, size_t n, void *arg)
{
    char *s = slow_string(f, &n);
    (void)key; (void)arg;
    free(s);
    return s != NULL;
}

static int slow_tensor(slow_file *f, const char *key, size_t n, void *arg)
{
    slow_state *st = (slow_state *)arg;
    slow_entry e;
    if (f->pos >= f->n || f->s[f->pos] != '{') return 0;
    if (n == 12 && memcmp(key, "__metadata__", 12) == 0) return slow_container(f, 2, slow_text, NULL);
    if (n == 0 || n > MOQ_MAX_NAME_BYTES) return 0;
    for (size_t i = 0; i < n; i++)
        if ((uint8_t)key[i] < 0x20 || key[i] == 0x7f) return 0;
    memset(&e, 0, sizeof e);
    e.product = 1;
    if (!slow_container(f, 2, slow_member, &e) || e.seen != 7) return 0;
    long double bits = e.product * (long double)e.dtype_bits;
    if (e.product >= 18446744073709551616.0L || bits >= 18446744073709551616.0L) return 0;
    uint64_t whole = (uint64_t)bits; /* exact: a long double has 64 bits, and every partial product was below 2^64 */
    if (e.zero) whole = 0;
    if (whole % 8 != 0 || e.range[0] > e.range[1] || e.range[1] > st->section || e.range[1] - e.range[0] != whole / 8) return 0;
    st->list[st->count].begin = e.range[0];
    st->list[st->count++].end = e.range[1];
    return 1;
}

/* Decodes by the definition of UTF-8 and encodes again: overlong forms and surrogates do not survive. */
static int slow_utf8(const uint8_t *s, size_t n)
{
    for (size_t i = 0; i < n;) {
        size_t len = s[i] < 0x80 ? 1 : (s[i] & 0xe0) == 0xc0 ? 2 : (s[i] & 0xf0) == 0xe0 ? 3 : (s[i] & 0xf8) == 0xf0 ? 4 : 0;
        char again[4];
        uint32_t c = len == 1 ? s[i] : s[i] & (0x7fu >> len);
        if (len == 0 || i + len > n) return 0;
        for (size_t k = 1; k < len; k++) {
            if ((s[i + k] & 0xc0) != 0x80) return 0;
            c = c << 6 | (s[i + k] & 63);
        }
        if (c > 0x10ffff || (c >= 0xd800 && c < 0xe000) || slow_encode(c, again) != len) return 0;
        i += len;
    }
    return 1;
}

static int slow_accepts(const uint8_t *s, size_t n)
{
    static slow_state st;
    slow_file f;
    uint64_t header = 0, end = 0;
    memset(&st, 0, sizeof st);
    if (n < 10) return 0;
    for (int i = 7; i >= 0; i--) header = header * 256 + s[i];
    if (header < 2 || header > 100000000 || header > n - 8) return 0;
    f.s = s + 8;
    f.n = (size_t)header;
    f.pos = 0;
    st.section = n - 8 - header;
    if (!slow_utf8(f.s, f.n) || f.s[0] != '{' || !slow_container(&f, 1, slow_tensor, &st)) return 0;
    while (f.pos < f.n)
        if (f.s[f.pos++] != ' ') return 0;
    /* Ranges: every step must find exactly where the data goes on. Empty ranges may lie on any border. */
    for (size_t done = 0; done < st.count;) {
        size_t best = st.count;
        for (size_t i = 0; i < st.count; i++)
            if (st.list[i].begin != UINT64_MAX && (best == st.count || st.list[i].begin < st.list[best].begin || (st.list[i].begin == st.list[best].begin && st.list[i].end < st.list[best].end))) best = i;
        if (st.list[best].begin != end) return 0;
        end = st.list[best].end;
        st.list[best].begin = UINT64_MAX;
        done++;
    }
    return end == st.section;
}

/* ---- building files ---- */

typedef struct bytes { uint8_t *p; size_t n; } bytes;

/* N, header, `data` bytes of data. */
static bytes file_of(const void *header, size_t header_bytes, size_t data)
{
    bytes b;
    b.n = 8 + header_bytes + data;
    b.p = (uint8_t *)malloc(b.n);
    for (size_t i = 0; i < 8; i++) b.p[i] = (uint8_t)((uint64_t)header_bytes >> (8 * i));
    memcpy(b.p + 8, header, header_bytes);
    for (size_t i = 0; i < data; i++) b.p[8 + header_bytes + i] = (uint8_t)(i * 7 + 1);
    return b;
}

static int printable(const char *s)
{
    for (; *s; s++)
        if ((unsigned char)*s < 0x20 || (unsigned char)*s > 0x7e) return 0;
    return 1;
}

/* Opens a copy of exact size; checks the outcome contract; returns the code. */
static moq_result verdict(const uint8_t *p, size_t n, moq_error *e)
{
    uint8_t *copy = test_copy(p, n);
    moq_open_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.allocator = test_allocator();
    memset(e, 0x55, sizeof *e);
    moq_st *st = moq_st_open_memory(copy, n, "x.safetensors", &desc, e);
    if (st) {
        uint64_t sum = 0;
        for (size_t i = 0; i < moq_st_count(st); i++) {
            const moq_tensor *t = moq_st_get(st, i);
            const uint8_t *d = (const uint8_t *)t->data;
            if (t->bytes) sum += (uint64_t)d[0] + d[t->bytes - 1];
            CHECK(moq_st_find(st, t->name) == t);
            CHECK(t->offset + t->bytes <= n && d == copy + t->offset);
        }
        CHECK(sum < UINT64_MAX);
        moq_st_close(st);
    } else {
        CHECK(e->code < 0 && e->text[0] && printable(e->text) && printable(e->object) && strncmp(e->text, "x.safetensors: ", 15) == 0);
    }
    if (test_state.live_allocs) { test_state.broken++; fprintf(stderr, "%ld allocations live\n", test_state.live_allocs); test_state.live_allocs = 0; }
    free(copy);
    return st ? MOQ_OK : e->code;
}

static void expect_bytes(const char *id, const uint8_t *p, size_t n, moq_result code, const char *a, const char *b)
{
    moq_error e;
    moq_result r = verdict(p, n, &e);
    if (r != code || (r != MOQ_OK && ((a && !strstr(e.text, a)) || (b && !strstr(e.text, b))))) {
        test_state.broken++;
        fprintf(stderr, "%s: %s, expected %s naming '%s' '%s': %s\n", id, moq_result_name(r), moq_result_name(code), a ? a : "", b ? b : "", r ? e.text : "");
    }
    if (n < 100000 && (r == MOQ_OK) != slow_accepts(p, n)) { test_state.broken++; fprintf(stderr, "%s: the slow reader disagrees\n", id); }
}

static void expect(const char *id, const char *header, size_t data, moq_result code, const char *a, const char *b)
{
    bytes f = file_of(header, strlen(header), data);
    expect_bytes(id, f.p, f.n, code, a, b);
    free(f.p);
}

#define T(name, dtype, shape, begin, end) "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end "]}"

static const char *const good_header = "{\"__metadata__\":{\"format\":\"pt\",\"k\":\"v\"}," T("b", "F32", "[2,2]", 0, 16) "," T("a", "BF16", "[3]", 16, 22) ","
    T("c", "F4", "[4]", 22, 24) "," T("s", "U8", "[]", 24, 25) "," T("e", "F32", "[0,7]", 25, 25) "}   ";

/* ---- the table ---- */

/* The first 8 bytes are wrong, the text behind them is whole: it is the length that every message blames. */
static void test_st_damaged_length(void)
{
    char whole[60];
    size_t n = strlen(good_header);
    snprintf(whole, sizeof whole, "its text ends after %zu ", n - 3); /* without the padding */
    const struct { uint64_t length; moq_result code; const char *says; } cases[] = {
        {n + 24, MOQ_E_UTF8, whole}, {n - 4, MOQ_E_JSON, whole}, {n / 2, MOQ_E_JSON, whole}, {3, MOQ_E_JSON, whole},
        {n + 26, MOQ_E_TRUNCATED, whole}, {0, MOQ_E_LIMIT, whole}, {(uint64_t)1 << 50, MOQ_E_LIMIT, whole}};
    for (size_t i = 0; i < MOQI_COUNT(cases); i++) {
        bytes f = file_of(good_header, n, 25);
        for (int k = 0; k < 8; k++) f.p[k] = (uint8_t)(cases[i].length >> 8 * k);
        expect_bytes("damaged length", f.p, f.n, cases[i].code, cases[i].says, "Download the file again");
        free(f.p);
    }
    /* a file that ends inside the spaces behind its text, or before the first: the length is right */
    for (size_t cut = 1; cut <= 3; cut++) {
        bytes f = file_of(good_header, n, 0);
        expect_bytes("cut in the spaces", f.p, f.n - cut, MOQ_E_TRUNCATED, "The download is probably incomplete", "git lfs pull");
        free(f.p);
    }
    /* with the order of bytes swapped the length is that of the text: its writer is blamed, not the download */
    bytes f = file_of(good_header, n, 25);
    for (int k = 0; k < 8; k++) f.p[k] = (uint8_t)((uint64_t)n >> 8 * (7 - k));
    expect_bytes("swapped length", f.p, f.n, MOQ_E_LIMIT, "byte order", NULL);
    free(f.p);
    /* braces that close nothing, or around bytes that are no text, are not believed */
    f = file_of("{\xff}", 3, 0);
    f.p[0] = 100;
    expect_bytes("no text", f.p, f.n, MOQ_E_TRUNCATED, "has 11. The download", NULL);
    free(f.p);
    expect("text damaged", "{\"q\":{\"dtype\":\"U8\";}}", 0, MOQ_E_JSON, "the header is not JSON", "Download the file again");
}

static void test_st_frame(void)
{
    uint8_t raw[64] = {0};
    expect_bytes("S1", raw, 0, MOQ_E_TRUNCATED, "x.safetensors", "0 bytes");
    expect_bytes("S2", raw, 7, MOQ_E_TRUNCATED, "7 bytes", NULL);
    memcpy(raw + 8, "{}", 2);
    expect_bytes("S3", raw, 10, MOQ_E_LIMIT, "N = 0", NULL);
    raw[0] = 1;
    expect_bytes("S4", raw, 10, MOQ_E_LIMIT, "N = 1", NULL);
    memset(raw, 0xff, 8);
    expect_bytes("S5", raw, 10, MOQ_E_LIMIT, "N = 18446744073709551615", "100000000");
    memset(raw, 0, 8);
    raw[7] = 0x80;
    expect_bytes("S6", raw, 10, MOQ_E_LIMIT, "N = 9223372036854775808", NULL);
    raw[7] = 2;
    expect_bytes("S10", raw, 10, MOQ_E_LIMIT, "N = 144115188075855872", "byte order");
    memset(raw, 0, 8);
    raw[0] = 100;
    expect_bytes("S9", raw, 10, MOQ_E_TRUNCATED, "100 bytes", "has 10");
    expect("R0", "{}", 0, MOQ_OK, NULL, NULL);
    expect("good", good_header, 25, MOQ_OK, NULL, NULL);
    expect("S11a", "[]", 0, MOQ_E_HEADER, "'['", "byte 8");
    expect("S11b", "\"x\"", 0, MOQ_E_HEADER, "0x22", "byte 8");
    expect("S11c", "1  ", 0, MOQ_E_HEADER, "'1'", "byte 8");
    expect("S11d", "null", 0, MOQ_E_HEADER, "'n'", "byte 8");
    expect("S12a", " {}", 0, MOQ_E_HEADER, "byte 8", NULL);
    expect("S12b", "\n{}", 0, MOQ_E_HEADER, "byte 8", NULL);
    expect("S13", "\xef\xbb\xbf{}", 0, MOQ_E_UTF8, "byte 8", NULL);
    bytes f = file_of("{}\0\0", 4, 0);
    expect_bytes("S14", f.p, f.n, MOQ_E_HEADER, "0x00", "byte 10");
    free(f.p);
    expect("S15a", "{}\t", 0, MOQ_E_HEADER, "0x09", "byte 10");
    expect("S15b", "{}  \n", 0, MOQ_E_HEADER, "follows", "byte 10");
    expect("S16", "{} x", 0, MOQ_E_HEADER, "follows", "byte 10");
    expect("S17", "{}{}", 0, MOQ_E_HEADER, "follows", "byte 10");
    expect("S18", "{\"a", 0, MOQ_E_JSON, "byte 9", NULL);
    expect("S18b", "{\"a\":{\"dtype\":\"F3", 0, MOQ_E_JSON, "entry 'a'", "byte");
    expect("S63a", "{\"a\":[[[[[[[[[[]]]]]]]]]]}", 0, MOQ_E_LIMIT, "8 levels", "byte");
}

static void test_st_keys(void)
{
    expect("S19", "{" T("a", "U8", "[1]", 0, 1) "," T("a", "U8", "[1]", 1, 2) "}", 2, MOQ_E_DUPLICATE, "'a'", NULL);
    expect("S20", "{" T("a", "U8", "[1]", 0, 1) "," T("\\u0061", "U8", "[1]", 1, 2) "}", 2, MOQ_E_DUPLICATE, "'a'", NULL);
    expect("S21", "{\"q\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, MOQ_E_DUPLICATE, "'q'", "'dtype'");
    expect("S22", "{\"__metadata__\":{},\"__metadata__\":{}}", 0, MOQ_E_DUPLICATE, "__metadata__", NULL);
    expect("S23", "{\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"}}", 0, MOQ_E_DUPLICATE, "'k'", NULL);
    expect("S24a", "{\"__metadata__\":{\"k\":1}}", 0, MOQ_E_HEADER, "'k'", "1");
    expect("S24b", "{\"__metadata__\":{\"k\":null}}", 0, MOQ_E_HEADER, "'k'", "null");
    expect("S24c", "{\"__metadata__\":{\"k\":{}}}", 0, MOQ_E_HEADER, "'k'", "an object");
    expect("S25a", "{\"__metadata__\":null}", 0, MOQ_E_HEADER, "__metadata__", NULL);
    expect("S25b", "{\"__metadata__\":[]}", 0, MOQ_E_HEADER, "__metadata__", NULL);
    expect("S26", "{\"__metadata__\":{}}", 0, MOQ_OK, NULL, NULL);
    expect("S28a", "{\"q\":[]}", 0, MOQ_E_HEADER, "'q'", "a list");
    expect("S28b", "{\"q\":\"x\"}", 0, MOQ_E_HEADER, "'q'", "x");
    expect("S28c", "{\"q\":null}", 0, MOQ_E_HEADER, "'q'", "null");
    expect("S29a", "{\"q\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1, MOQ_E_HEADER, "'q'", "'dtype'");
    expect("S29b", "{\"q\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1, MOQ_E_HEADER, "'q'", "'shape'");
    expect("S29c", "{\"q\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, MOQ_E_HEADER, "'q'", "'data_offsets'");
    expect("S30", "{\"q\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"more\":1}}", 1, MOQ_E_HEADER, "'more'", "Download the file again");
    expect("S30", "{\"q\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"more\":1}}", 1, MOQ_E_HEADER, "tensor 'q'", NULL);
    expect("S56", "{" T("", "U8", "[1]", 0, 1) "}", 1, MOQ_E_HEADER, "byte", "empty");
    expect("S57a", "{" T("a\\u0000b", "U8", "[1]", 0, 1) "}", 1, MOQ_E_HEADER, "a\\x00b", "control");
    expect("S57b", "{" T("a\\u0007b", "U8", "[1]", 0, 1) "}", 1, MOQ_E_HEADER, "a\\x07b", "control");
    expect("S57c", "{" T("a\\u007fb", "U8", "[1]", 0, 1) "}", 1, MOQ_E_HEADER, "a\\x7fb", "control");
    expect("S58", "{" T("a\x01", "U8", "[1]", 0, 1) "}", 1, MOQ_E_JSON, "byte", NULL);
    expect("S60a", "{" T("a\xff", "U8", "[1]", 0, 1) "}", 1, MOQ_E_UTF8, "byte 11", NULL);
    expect("S60b", "{" T("a\xc0\xaf", "U8", "[1]", 0, 1) "}", 1, MOQ_E_UTF8, "byte 11", NULL);
    expect("S60c", "{" T("a\xed\xa0\x80", "U8", "[1]", 0, 1) "}", 1, MOQ_E_UTF8, "byte 11", NULL);
    expect("S60d", "{" T("a\xf4\x90\x80\x80", "U8", "[1]", 0, 1) "}", 1, MOQ_E_UTF8, "byte 11", NULL);
    expect("S61", "{" T("a\\ud800", "U8", "[1]", 0, 1) "}", 1, MOQ_E_UTF8, "byte 11", NULL);
    expect("S62", "{" T("\\u001b[31mred", "U8", "[1]", 0, 1) "}", 1, MOQ_E_HEADER, "\\x1b[31mred", NULL);
    expect("utf8", "{" T("\xc3\xa9\xf0\x9f\x98\x80", "U8", "[1]", 0, 1) "}", 1, MOQ_OK, NULL, NULL);
}

static void test_st_dtype_shape(void)
{
    static const char *const bad[] = {"\"f32\"", "\"F32 \"", "\"FLOAT\"", "\"\"", "5", "null", "\"F8_E3M4\"", "\"I4\"", "[]", "\"F32\\u0000\""};
    static const struct { const char *shape; moq_result code; const char *name; } shapes[] = {
        {"[-1]", MOQ_E_SHAPE, "-1"}, {"[-0]", MOQ_E_SHAPE, "-0"}, {"[+2]", MOQ_E_JSON, "byte"}, {"[02]", MOQ_E_JSON, "byte"}, {"[2.0]", MOQ_E_SHAPE, "2.0"},
        {"[2e0]", MOQ_E_SHAPE, "2e0"}, {"\"2\"", MOQ_E_SHAPE, "\"2\""}, {"[[2]]", MOQ_E_SHAPE, "a list"}, {"{}", MOQ_E_SHAPE, "an object"}, {"[\"2\"]", MOQ_E_SHAPE, "\"2\""},
        {"[18446744073709551616]", MOQ_E_OVERFLOW, "18446744073709551616"}, {"[4294967296,4294967296]", MOQ_E_OVERFLOW, "[4294967296, 4294967296]"},
        {"[4611686018427387906,4]", MOQ_E_OVERFLOW, "[4611686018427387906, 4]"}, {"[0,9223372036854775807,4]", MOQ_E_OVERFLOW, "9223372036854775807"},
        {"[9223372036854775807,4,0]", MOQ_E_OVERFLOW, "9223372036854775807"}, {"[1,1,1,1,1,1,1,1,1]", MOQ_E_LIMIT, "MOQ_MAX_RANK"}};
    char text[5000];
    for (size_t i = 0; i < MOQI_COUNT(bad); i++) {
        snprintf(text, sizeof text, "{\"q\":{\"dtype\":%s,\"shape\":[1],\"data_offsets\":[0,4]}}", bad[i]);
        expect("S31", text, 4, MOQ_E_DTYPE, "'q'", i < 7 ? bad[i] : NULL);
    }
    for (size_t i = 0; i < MOQI_COUNT(shapes); i++) {
        snprintf(text, sizeof text, "{\"q\":{\"dtype\":\"F32\",\"shape\":%s,\"data_offsets\":[0,8]}}", shapes[i].shape);
        expect("S33-39", text, 8, shapes[i].code, "'q'", shapes[i].name);
    }
    size_t n = (size_t)snprintf(text, sizeof text, "{\"q\":{\"dtype\":\"F32\",\"shape\":[1");
    for (int i = 0; i < 999; i++) n += (size_t)snprintf(text + n, sizeof text - n, ",1");
    snprintf(text + n, sizeof text - n, "],\"data_offsets\":[0,4]}}");
    expect("S39b", text, 4, MOQ_E_LIMIT, "1000", "MOQ_MAX_RANK");
    expect("S40a", "{" T("q", "F4", "[3]", 0, 1) "}", 1, MOQ_E_SHAPE, "'q'", "12 bits");
    expect("S40b", "{" T("q", "F6_E2M3", "[2]", 0, 1) "}", 1, MOQ_E_SHAPE, "'q'", "12 bits");
    expect("S40c", "{" T("q", "F6_E3M2", "[4]", 0, 3) "}", 3, MOQ_OK, NULL, NULL);
    expect("S41", "{" T("q", "F32", "[]", 0, 0) "}", 0, MOQ_E_OFFSETS, "'q'", NULL);
    for (int i = 1; i < MOQ_DTYPE_COUNT; i++) { /* each of the 22, with 8 elements, opens */
        int stored = moq_dtype_find(moq_dtype_name((moq_dtype)i), strlen(moq_dtype_name((moq_dtype)i))) != MOQ_NONE;
        int b = moq_dtype_bits((moq_dtype)i);
        snprintf(text, sizeof text, "{\"q\":{\"shape\":[8],\"data_offsets\":[0,%d],\"dtype\":\"%s\"}}", b, moq_dtype_name((moq_dtype)i));
        expect(moq_dtype_name((moq_dtype)i), text, (size_t)b, stored ? MOQ_OK : MOQ_E_DTYPE, "'q'", NULL);
    }
}

static void test_st_ranges(void)
{
    static const char *const offsets[] = {"[]", "[0]", "[0,4,4]", "{}", "[-1,4]", "[0,4.0]", "[0,\"4\"]", "[5,4]", "null"};
    char text[400];
    for (size_t i = 0; i < MOQI_COUNT(offsets); i++) {
        snprintf(text, sizeof text, "{\"q\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":%s}}", offsets[i]);
        expect("S42-44", text, 8, MOQ_E_OFFSETS, "'q'", NULL);
    }
    expect("S45", "{" T("q", "U8", "[5]", 0, 5) "}", 4, MOQ_E_TRUNCATED, "'q'", "5 of a data section of 4");
    expect("S45: sizes", "{" T("q", "U8", "[5]", 0, 5) "," T("r", "U8", "[3]", 5, 8) "}", 4, MOQ_E_TRUNCATED, "has 117 bytes, its header describes 121",
           "download it again, or `git lfs pull`");
    expect("S46", "{" T("q", "U8", "[4]", 18446744073709551611, 18446744073709551615) "}", 4, MOQ_E_TRUNCATED, "'q'", "18446744073709551615");
    expect("S44b", "{" T("q", "U8", "[4]", 0, 18446744073709551616) "}", 4, MOQ_E_OVERFLOW, "'q'", "18446744073709551616");
    expect("S47a", "{" T("q", "F32", "[2]", 0, 7) "}", 7, MOQ_E_OFFSETS, "7", "8");
    expect("S47b", "{" T("q", "F32", "[2]", 0, 9) "}", 9, MOQ_E_OFFSETS, "9", "8");
    expect("S48", "{" T("one", "U8", "[4]", 0, 4) "," T("two", "U8", "[4]", 0, 4) "}", 4, MOQ_E_OVERLAP, "one", "two");
    expect("S49", "{" T("one", "U8", "[4]", 0, 4) "," T("two", "U8", "[4]", 3, 7) "}", 7, MOQ_E_OVERLAP, "one", "two");
    expect("S49b", "{" T("one", "U8", "[4]", 0, 4) "," T("two", "U8", "[0]", 2, 2) "}", 4, MOQ_E_OVERLAP, "one", "two");
    expect("S50a", "{" T("q", "U8", "[4]", 3, 7) "}", 7, MOQ_E_HOLE, "'q'", "3 bytes");
    expect("S50b", "{" T("q", "U8", "[4]", 0, 4) "," T("w", "U8", "[2]", 6, 8) "}", 8, MOQ_E_HOLE, "'w'", "2 bytes");
    expect("S50c", "{" T("q", "U8", "[4]", 0, 4) "}", 9, MOQ_E_HOLE, "5 bytes", NULL);
    expect("S51", "{" T("q", "U8", "[4]", 0, 4) "}", 5, MOQ_E_HOLE, "1 bytes", NULL);
    expect("S52", good_header, 24, MOQ_E_TRUNCATED, "'s'", NULL);
    expect("S53", "{}", 3, MOQ_E_HOLE, "3 bytes", NULL);
    expect("S54", "{" T("z", "U8", "[1]", 1, 2) "," T("a", "U8", "[1]", 2, 3) "," T("m", "U8", "[1]", 0, 1) "}", 3, MOQ_OK, NULL, NULL);
    expect("S55", "{" T("a", "F32", "[0]", 0, 0) "," T("b", "U8", "[2]", 0, 2) "," T("c", "U8", "[0,3]", 2, 2) "," T("d", "I8", "[0]", 2, 2) "," T("e", "U8", "[1]", 2, 3) ","
           T("f", "U8", "[0]", 3, 3) "}", 3, MOQ_OK, NULL, NULL);
}

/* The first error is the first in the text, whatever kind it is; range errors come last. */
static void test_st_first_error(void)
{
    moq_error e, again;
    expect("order1", "{" T("a", "f32", "[1]", 0, 4) "," T("b", "U8", "[1]", 0, 1) ",}", 4, MOQ_E_DTYPE, "'a'", NULL);
    expect("order2", "{" T("a", "F32", "[1]", 0, 4) "," T("b", "U8", "[-1]", 0, 1) "," T("a", "F32", "[1]", 0, 4) ",\"c\":tru}", 4, MOQ_E_SHAPE, "'b'", NULL);
    expect("order3", "{" T("a", "F32", "[1]", 0, 4) "," T("a", "F32", "[1]", 0, 4) "," T("b", "U8", "[-1]", 0, 1) ",\"c\":tru}", 4, MOQ_E_DUPLICATE, "'a'", NULL);
    expect("order4", "{" T("a", "F32", "[1]", 4, 8) "," T("b", "U8", "[1]", 0, 1) ",\"c\":tru}", 8, MOQ_E_JSON, "'c'", NULL);
    expect("order5", "{" T("a", "U8", "[1]", 3, 4) "," T("b", "U8", "[2]", 0, 2) "," T("c", "U8", "[2]", 1, 3) "}", 9, MOQ_E_OVERLAP, "'c'", "'b'");
    bytes f = file_of("{" T("a", "F32", "[1]", 0, 3) "}", strlen("{" T("a", "F32", "[1]", 0, 3) "}"), 3);
    verdict(f.p, f.n, &e);
    verdict(f.p, f.n, &again);
    CHECK_STR(e.text, again.text);
    CHECK(e.offset == again.offset && e.offset > 8);
    free(f.p);
}

static void test_st_kinds(void)
{
    static const struct { const char *magic; size_t n; const char *kind; } rows[] = {
        {"version https://git-lfs.github.com/spec/v1\noid sha256:", 54, "looks like a Git-LFS pointer"}, {"PK\003\004\024\000\000\000\010\000", 10, "zip"},
        {"\200\002\212\nl\374\234F\371 j", 11, "save the model as .safetensors"},
        {"GGUF\003\000\000\000\042\000\000\000", 12, "GGUF file: take the folder"}, {"<!DOCTYPE html>", 15, "HTML"}, {"{\"error\": 1}", 12, "JSON"},
        {"#!/bin/sh\necho\n", 15, "is no safetensors file; this looks like a text"}, {"\n\n\n\n\r\n\ta line", 13, "looks like a text"},
        {"Gr\303\274\303\237e aus dem Wald, der lang ist und noch l\303\244nger als zu sehn\303", 64, "looks like a text"},
        {"text \377 and", 10, "is no safetensors file, or a damaged one: header length N"}, {"\177ELF\002\001\001\000\000\000", 10, "or a damaged one: header length N"},
        {"a text\n", 7, "the file has 7 bytes, a safetensors file at least 10. Download it again"}};
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) {
        uint8_t raw[64] = {0};
        moq_error e;
        memcpy(raw, rows[i].magic, rows[i].n);
        moq_result r = verdict(raw, rows[i].n, &e);
        CHECK(r == MOQ_E_LIMIT || r == MOQ_E_TRUNCATED);
        CHECK(strstr(e.text, rows[i].kind) != NULL);
    }
}

/* A header built by a function of the index. */
static bytes many(size_t count, const char *format, int metadata)
{
    size_t cap = count * 160 + 6000, n = 0;
    char *text = (char *)malloc(cap);
    n += (size_t)snprintf(text, cap, metadata ? "{\"__metadata__\":{" : "{");
    for (size_t i = 0; i < count; i++) {
        if (i) text[n++] = ',';
        text[n++] = '"';
        n += (size_t)snprintf(text + n, cap - n, format, (unsigned)i);
        if (metadata) n += (size_t)snprintf(text + n, cap - n, "\":\"v\"");
        else n += (size_t)snprintf(text + n, cap - n, "\":{\"dtype\":\"BF16\",\"shape\":[1,1],\"data_offsets\":[%llu,%llu]}", 2ULL * i, 2ULL * i + 2);
    }
    n += (size_t)snprintf(text + n, cap - n, metadata ? "}}" : "}");
    bytes f = file_of(text, n, metadata ? 0 : 2 * count);
    free(text);
    return f;
}

static size_t peak_live, peak_most;
static void *peak_alloc(void *user, size_t n, size_t align)
{
    peak_live += n;
    if (peak_live > peak_most) peak_most = peak_live;
    return test_alloc(user, n, align);
}
static void peak_release(void *user, void *p, size_t n)
{
    peak_live -= n;
    test_release(user, p, n);
}

/* Rule R22: at most 4 bytes of memory for a byte of header and 128 for an entry; `entries` of them are in the file. */
static void timed(const char *what, size_t entries, bytes f, moq_result code, const char *name)
{
    moq_error e;
    moq_open_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.allocator.alloc = peak_alloc;
    desc.allocator.release = peak_release;
    peak_live = peak_most = 0;
    double t = moq_seconds();
    moq_st *st = moq_st_open_memory(f.p, f.n, "big.safetensors", &desc, &e);
    t = moq_seconds() - t;
    CHECK_INT(st ? MOQ_OK : e.code, code);
    if (!st && name) CHECK(strstr(e.text, name) != NULL);
    moq_st_close(st);
    CHECK_INT(test_state.live_allocs, 0);
    CHECK(peak_live == 0);
    CHECK(peak_most <= 4 * f.n + 128 * entries + 65536);
    printf("note: %s, %.1f MB of file: %.0f ms, %.1f MB of memory at most\n", what, (double)f.n * 1e-6, t * 1e3, (double)peak_most * 1e-6);
    free(f.p);
}

static void test_st_large(void)
{
    char *text;
    timed("60,000 tensors", 60000, many(60000, "model.layers.%u.mlp.experts.down_proj.weight_scale_2", 0), MOQ_OK, NULL);
    timed("60,000 metadata keys", 60000, many(60000, "key%u", 1), MOQ_OK, NULL);
    timed("60,000 tensors of one 8-byte block each (S65)", 60000, many(60000, "AAAAAAAA%08xBBBBBBBB", 0), MOQ_OK, NULL);
    bytes f = many(60000, "t%u", 0);
    f.p[f.n - 120001 - 60] = '!'; /* somewhere in the last entry: all before it is judged, and judged once */
    timed("60,000 tensors with an error in the last", 60000, f, MOQ_E_JSON, NULL);
    size_t n = 100000;
    text = (char *)malloc(n + 8);
    memcpy(text, "{\"a\":", 5);
    memset(text + 5, '[', n - 5);
    timed("100,000 brackets (S63)", 1, file_of(text, n, 0), MOQ_E_LIMIT, "byte");
    free(text);
    timed("5,000 bytes of name (S59)", 1, many(1, "%05000u", 0), MOQ_E_LIMIT, "MOQ_MAX_NAME_BYTES");
    timed("1,048,577 tensors (S64)", 1048577, many(1048577, "%u", 0), MOQ_E_LIMIT, "MOQ_MAX_TENSORS");
    n = 100000000;
    text = (char *)malloc(n);
    memset(text, ' ', n);
    memcpy(text, "{}", 2);
    timed("a header of 100,000,000 bytes (S8)", 0, file_of(text, n, 0), MOQ_OK, NULL);
    free(text);
    text = (char *)malloc(n = 20000000);
    memset(text, '0', n);
    for (size_t i = 1; i < n; i += 2) text[i] = ',';
    memcpy(text, "{\"a\":{\"shape\":[1,", 17);
    timed("a hostile list of 20 MB", 1, file_of(text, n, 0), MOQ_E_JSON, NULL);
    free(text);
}

/* ---- families ---- */

static void test_st_every_prefix_fails(void)
{
    bytes f = file_of(good_header, strlen(good_header), 25);
    moq_error e;
    for (size_t n = 0; n < f.n; n++) CHECK(verdict(f.p, n, &e) < 0);
    CHECK_INT(verdict(f.p, f.n, &e), MOQ_OK);
    free(f.p);
}

static void differ(const uint8_t *p, size_t n, const char *how)
{
    moq_error e;
    int ours = verdict(p, n, &e) == MOQ_OK, slow = slow_accepts(p, n);
    if (ours == slow) return;
    test_state.broken++;
    fprintf(stderr, "%s: we %s, the slow reader does not agree: %.*s\n   %s\n", how, ours ? "accept" : "refuse", (int)(n > 8 ? n - 8 : 0), (const char *)p + 8, ours ? "" : e.text);
}

static void test_st_every_bit_flip(void)
{
    bytes f = file_of(good_header, strlen(good_header), 25);
    for (size_t bit = 0; bit < (8 + strlen(good_header)) * 8; bit++) {
        f.p[bit / 8] ^= (uint8_t)(1u << (bit & 7));
        differ(f.p, f.n, "bit flip");
        f.p[bit / 8] ^= (uint8_t)(1u << (bit & 7));
    }
    free(f.p);
}

/* Mutated headers: pieces replaced, doubled, removed, numbers and words from a dictionary. */
static void test_st_differential(void)
{
    static const char *const words[] = {"0", "1", "-1", "4", "16", "22", "25", "24", "18446744073709551615", "9223372036854775807", "4294967296", "{", "}", "[", "]", ",", ":", "\"", "\\u0061",
        "\\ud83d\\ude00", "\\ud83d", "null", "true", "1e3", "0.5", "01", " ", "\t", "\"dtype\"", "\"shape\"", "\"data_offsets\"", "\"__metadata__\"", "{}", "[]", "\"F32\"", "\"U8\"", "\"F4\"", "\"a\":",
        "\xc3\xa9", "\xff", "\x7f", "F8_E4M3", ",\"a\":{}", "[0,0]", "[16,22]", "\\u0000"};
    int accepted = 0;
    for (int round = 0; round < 30000; round++) {
        char text[1200];
        size_t n = strlen(good_header), data = 25;
        memcpy(text, good_header, n);
        int edits = 1 + (int)(test_random() % 3);
        for (int k = 0; k < edits; k++) {
            size_t at = test_random() % n, cut = test_random() % 4 == 0 ? test_random() % 24 : test_random() % 3;
            if (cut > n - at) cut = n - at;
            const char *w = test_random() % 3 ? words[test_random() % MOQI_COUNT(words)] : "";
            size_t m = strlen(w);
            if (test_random() % 4 == 0) { /* a whole number replaced by another */
                while (at < n && (text[at] < '0' || text[at] > '9')) at++;
                for (cut = 0; at + cut < n && text[at + cut] >= '0' && text[at + cut] <= '9';) cut++;
                w = words[test_random() % 11];
                m = strlen(w);
            }
            if (n - cut + m + 2 > sizeof text || at > n) continue;
            memmove(text + at + m, text + at + cut, n - at - cut);
            memcpy(text + at, w, m);
            n = n - cut + m;
            if (n == 0) break;
        }
        if (n == 0) continue;
        if (test_random() % 16 == 0) data = test_random() % 30;
        bytes f = file_of(text, n, data);
        if (test_random() % 64 == 0) f.p[test_random() % 8] = (uint8_t)test_random();
        differ(f.p, f.n, "mutation");
        accepted += slow_accepts(f.p, f.n);
        free(f.p);
    }
    CHECK(accepted > 500); /* the comparison means something on both sides */
    CHECK(accepted < 25000);
}

static void test_st_failing_allocations(void)
{
    static const struct { const char *header; moq_result code; } cases[] = {{NULL, MOQ_OK}, {"{" T("a", "U8", "[1]", 0, 1) "," T("a", "U8", "[1]", 0, 1) "}", MOQ_E_DUPLICATE},
        {"{" T("a", "U8", "[1]", 0, 1) "," T("b", "U8", "[1]", 1, 2) ",x}", MOQ_E_JSON}};
    for (int c = 0; c < 3; c++)
        for (int forever = 0; forever < 2; forever++)
            for (long k = 1;; k++) {
                const char *h = cases[c].header ? cases[c].header : good_header;
                bytes f = file_of(h, strlen(h), c ? 2 : 25);
                moq_open_desc desc;
                moq_error e;
                memset(&desc, 0, sizeof desc);
                desc.allocator = test_allocator();
                long before = test_state.total_allocs;
                test_state.fail_at = k;
                test_state.fail_forever = forever;
                moq_st *st = moq_st_open_memory(f.p, f.n, "x.safetensors", &desc, &e);
                int fired = test_state.total_allocs - before >= k;
                test_state.fail_at = 0;
                if (fired) CHECK(!st && (e.code == MOQ_E_NOMEM || e.code == cases[c].code));
                else CHECK_INT(st ? MOQ_OK : e.code, cases[c].code);
                if (fired && c == 0) CHECK_INT(e.code, MOQ_E_NOMEM);
                moq_st_close(st);
                CHECK_INT(test_state.live_allocs, 0);
                free(f.p);
                if (!fired) { CHECK(k > 3); break; }
            }
}

static void test_st_reading(void)
{
    bytes f = file_of(good_header, strlen(good_header), 25);
    moq_error e;
    moq_st *st = moq_st_open_memory(f.p, f.n, NULL, NULL, &e);
    CHECK(st != NULL);
    if (!st) { free(f.p); return; }
    CHECK_INT(moq_st_count(st), 5);
    CHECK_STR(moq_st_get(st, 0)->name, "a");
    CHECK_STR(moq_st_get(st, 4)->name, "s");
    CHECK(moq_st_get(st, 5) == NULL && moq_st_find(st, "nothing") == NULL && moq_st_find(st, "") == NULL);
    const moq_tensor *b = moq_st_find(st, "b");
    CHECK(b && b->dtype == MOQ_F32 && b->rank == 2 && b->shape[0] == 2 && b->shape[1] == 2 && b->bytes == 16 && b->name_bytes == 1);
    CHECK(b && b->offset == 8 + strlen(good_header) && b->data == f.p + b->offset);
    CHECK_INT(moq_st_find(st, "s")->rank, 0);
    CHECK_INT(moq_st_find(st, "e")->bytes, 0);
    CHECK_STR(moq_st_metadata(st, "format"), "pt");
    CHECK_STR(moq_st_metadata(st, "k"), "v");
    CHECK(moq_st_metadata(st, "x") == NULL);
    moq_st_close(st);
    moq_st_close(NULL);
    CHECK(moq_st_open_memory(NULL, 4, "x", NULL, &e) == NULL && e.code == MOQ_E_ARG);
    CHECK(moq_st_open(NULL, NULL, &e) == NULL && e.code == MOQ_E_ARG);
    CHECK(moq_st_open_memory(f.p, 3, "x", NULL, NULL) == NULL); /* err may be NULL */
    free(f.p);
}

/* ---- files ---- */

/* A path in this test's own folder; the result lives until the eighth call after. */
static const char *temp(const char *name)
{
    static char text[8][1100];
    static int turn;
    turn = (turn + 1) & 7;
    mkdir(test_path("build"), 0777);
    mkdir(test_path("build/tmp"), 0777);
    mkdir(test_path("build/tmp/st"), 0777);
    snprintf(text[turn], sizeof text[turn], "%s/%s", test_path("build/tmp/st"), name);
    return text[turn];
}

static void put(const char *path, const void *p, size_t n)
{
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(p, 1, n, f) == n);
    if (f) fclose(f);
}

static void test_st_files(void)
{
    bytes f = file_of(good_header, strlen(good_header), 25);
    moq_error e;
    moq_open_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.allocator = test_allocator();
    const char *path = temp("good file.safetensors");
    for (int read = 0; read < 2; read++) { /* mapped and read: the same verdicts as from memory */
        desc.flags = read ? MOQ_OPEN_READ : 0;
        put(path, f.p, f.n);
        moq_st *st = moq_st_open(path, &desc, &e);
        CHECK(st != NULL);
        if (st) {
            const moq_tensor *t = moq_st_find(st, "b");
            CHECK(memcmp(t->data, f.p + t->offset, 16) == 0);
        }
        moq_st_close(st);
        for (size_t n = 0; n < f.n; n += 1 + n / 9) {
            moq_error m;
            put(path, f.p, n);
            st = moq_st_open(path, &desc, &e);
            moq_result r = verdict(f.p, n, &m);
            CHECK(!st && e.code == r);
            CHECK_STR(e.file, "good file.safetensors");
            CHECK(strncmp(e.text, path, strlen(path)) == 0 && e.text[strlen(path)] == ':');
            CHECK_STR(strstr(e.text, ": "), strstr(m.text, ": ")); /* the same sentence behind the name */
        }
        CHECK_INT(test_state.live_allocs, 0);
    }
    remove(path);
    CHECK(moq_st_open(path, &desc, &e) == NULL && e.code == MOQ_E_NOTFOUND);
    CHECK(moq_st_open(temp(""), &desc, &e) == NULL && e.code == MOQ_E_IO);
    free(f.p);

    desc.flags = 0;

    /* S7 and S66: sparse files. The header of the second describes a tensor beyond 4 GiB. */
    FILE *s = fopen(temp("sparse.safetensors"), "wb");
    uint8_t length[8] = {0x01, 0xe1, 0xf5, 0x05, 0, 0, 0, 0};
    CHECK(s && fwrite(length, 1, 8, s) == 8 && fseek(s, 100000008, SEEK_SET) == 0 && fputc(0, s) == 0);
    if (s) fclose(s);
    CHECK(moq_st_open(temp("sparse.safetensors"), &desc, &e) == NULL && e.code == MOQ_E_LIMIT);
    CHECK(strstr(e.text, "MOQ_MAX_HEADER_BYTES") && strstr(e.text, "100000001"));
    const char *h = "{" T("big", "U8", "[4999999995]", 0, 4999999995) "," T("far", "U8", "[5]", 4999999995, 5000000000) "}";
    s = fopen(temp("sparse.safetensors"), "wb");
    bytes head = file_of(h, strlen(h), 0);
    CHECK(s && fwrite(head.p, 1, head.n, s) == head.n);
    if (s && sizeof(long) == 8 && sizeof(void *) == 8) {
        CHECK(fseek(s, (long)(head.n + 4999999999u), SEEK_SET) == 0 && fputc(77, s) == 77);
        fclose(s);
        double t = moq_seconds();
        moq_st *st = moq_st_open(temp("sparse.safetensors"), &desc, &e);
        t = moq_seconds() - t;
        CHECK(st != NULL);
        if (st) CHECK_INT(((const uint8_t *)moq_st_find(st, "far")->data)[4], 77);
        moq_st_close(st);
        printf("note: 5 GB sparse file opened in %.2f ms\n", t * 1e3);
    } else if (s) fclose(s);
    free(head.p);
    remove(temp("sparse.safetensors"));
    CHECK_INT(test_state.live_allocs, 0);
}

/* ---- writer ---- */

static moq_tensor make(const char *name, moq_dtype dtype, uint64_t a, uint64_t b, const void *data, uint64_t n)
{
    moq_tensor t;
    memset(&t, 0, sizeof t);
    t.name = name;
    t.dtype = dtype;
    t.rank = a ? (b ? 2 : 1) : 0;
    t.shape[0] = a;
    t.shape[1] = b;
    t.data = data;
    t.bytes = n;
    return t;
}

static bytes slurp(const char *path)
{
    bytes b = {NULL, 0};
    FILE *f = fopen(path, "rb");
    if (!f) return b;
    b.p = (uint8_t *)malloc(1 << 20);
    b.n = fread(b.p, 1, 1 << 20, f);
    fclose(f);
    return b;
}

static void test_st_writer_round_trip(void)
{
    static const char *const metadata[] = {"format", "pt", "quote\"\\\n", "\xc3\xa9"};
    uint8_t data[64];
    moq_allocator a = test_allocator();
    moq_error e;
    for (int i = 0; i < 64; i++) data[i] = (uint8_t)test_random();
    moq_tensor list[] = {make("w.b", MOQ_U8, 3, 0, data, 3), make("w.a", MOQ_F32, 2, 2, data + 3, 16), make("x \"q\"", MOQ_F4, 4, 2, data + 20, 4), make("s", MOQ_F64, 0, 0, data + 30, 8),
                         make("w.c", MOQ_F32, 1, 0, data + 40, 4), make("h", MOQ_BF16, 1, 1, data + 50, 2), make("i", MOQ_F8_E4M3, 5, 0, data + 51, 5)};
    size_t count = MOQI_COUNT(list);
    const char *path = temp("out.safetensors");
    CHECK_INT(moq_st_write(path, list, count, metadata, 2, &a, &e), MOQ_OK);
    CHECK_INT(test_state.live_allocs, 0);
    bytes first = slurp(path);
    moq_open_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.allocator = a;
    moq_st *st = moq_st_open(path, &desc, &e);
    CHECK(st != NULL && moq_st_count(st) == count);
    uint64_t last = 0;
    static const char *const order[] = {"s", "w.a", "w.c", "h", "i", "w.b", "x \"q\""}; /* by width, then name */
    for (size_t i = 0; st && i < count; i++) {
        const moq_tensor *t = moq_st_find(st, list[i].name), *o = moq_st_find(st, order[i]);
        CHECK(t && t->dtype == list[i].dtype && t->rank == list[i].rank && t->bytes == list[i].bytes && memcmp(t->shape, list[i].shape, sizeof t->shape) == 0);
        CHECK(t && memcmp(t->data, list[i].data, (size_t)t->bytes) == 0);
        CHECK(t && moq_dtype_bits(t->dtype) >= 8 ? t->offset % ((uint64_t)moq_dtype_bits(t->dtype) / 8) == 0 : 1);
        CHECK(o && o->offset > last);
        last = o ? o->offset : 0;
    }
    if (st) CHECK_STR(moq_st_metadata(st, "quote\"\\\n"), "\xc3\xa9");
    moq_st_close(st);
    CHECK(first.n > 8 && slow_accepts(first.p, first.n) && moqi_load_u64(first.p) % 8 == 0);
    moq_tensor t = list[0];
    list[0] = list[4];
    list[4] = t;
    CHECK_INT(moq_st_write(path, list, count, metadata, 2, &a, &e), MOQ_OK); /* other order of input, same bytes */
    bytes second = slurp(path);
    CHECK(first.n == second.n && memcmp(first.p, second.p, first.n) == 0);
    CHECK_INT(moq_st_write(path, NULL, 0, NULL, 0, NULL, &e), MOQ_OK);
    st = moq_st_open(path, NULL, &e);
    CHECK(st && moq_st_count(st) == 0);
    moq_st_close(st);
    free(first.p);
    free(second.p);
    remove(path);
}

/* Written over the file that the data is mapped from: the old content stays valid while open. */
static void test_st_writer_over_itself(void)
{
    uint8_t data[4096];
    moq_error e;
    for (int i = 0; i < 4096; i++) data[i] = (uint8_t)(i * 13);
    moq_tensor t = make("t", MOQ_U8, 4096, 0, data, 4096);
    const char *path = temp("self.safetensors");
    CHECK_INT(moq_st_write(path, &t, 1, NULL, 0, NULL, &e), MOQ_OK);
    moq_st *st = moq_st_open(path, NULL, &e);
    if (!st) { CHECK(0); return; }
    moq_tensor two[2];
    two[0] = *moq_st_get(st, 0);
    two[1] = make("a", MOQ_U8, 1, 0, two[0].data, 1);
    CHECK_INT(moq_st_write(path, two, 2, NULL, 0, NULL, &e), MOQ_OK);
    CHECK(memcmp(moq_st_get(st, 0)->data, data, 4096) == 0);
    moq_st_close(st);
    st = moq_st_open(path, NULL, &e);
    CHECK(st && moq_st_count(st) == 2 && memcmp(moq_st_find(st, "t")->data, data, 4096) == 0);
    moq_st_close(st);
    remove(path);
}

static void test_st_writer_refusals(void)
{
    uint8_t data[16] = {0};
    static const struct { const char *name; moq_dtype dtype; uint64_t rows, bytes; moq_result code; } rows[] = {
        {"__metadata__", MOQ_U8, 1, 1, MOQ_E_ARG}, {"", MOQ_U8, 1, 1, MOQ_E_ARG}, {"a\nb", MOQ_U8, 1, 1, MOQ_E_ARG}, {"\x7f", MOQ_U8, 1, 1, MOQ_E_ARG},
        {"\xff", MOQ_U8, 1, 1, MOQ_E_UTF8}, {"x", MOQ_I4, 2, 1, MOQ_E_DTYPE}, {"x", MOQ_NONE, 1, 1, MOQ_E_DTYPE}, {"x", MOQ_F32, 2, 4, MOQ_E_ARG},
        {"x", MOQ_F4, 3, 1, MOQ_E_SHAPE}, {"x", MOQ_F64, UINT64_MAX, 8, MOQ_E_OVERFLOW}};
    const char *path = temp("refused.safetensors");
    moq_allocator a = test_allocator();
    moq_error e;
    put(path, "old", 3);
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) {
        moq_tensor t = make(rows[i].name, rows[i].dtype, rows[i].rows, 0, data, rows[i].bytes);
        CHECK_INT(moq_st_write(path, &t, 1, NULL, 0, &a, &e), rows[i].code);
        CHECK(e.code == rows[i].code && printable(e.text) && e.text[0]);
    }
    moq_tensor twice[2];
    twice[0] = twice[1] = make("same", MOQ_U8, 2, 0, data, 2);
    CHECK_INT(moq_st_write(path, twice, 2, NULL, 0, &a, &e), MOQ_E_DUPLICATE);
    CHECK(strstr(e.text, "'same'") != NULL);
    twice[0].data = NULL;
    CHECK_INT(moq_st_write(path, twice, 1, NULL, 0, &a, &e), MOQ_E_ARG);
    char *name = (char *)malloc(MOQ_MAX_NAME_BYTES + 2);
    memset(name, 'n', MOQ_MAX_NAME_BYTES + 1);
    name[MOQ_MAX_NAME_BYTES + 1] = 0;
    twice[1].name = name;
    CHECK_INT(moq_st_write(path, twice + 1, 1, NULL, 0, &a, &e), MOQ_E_LIMIT);
    free(name);
    const char *same[] = {"k", "1", "k", "2"}, *bad[] = {"k", "\xc0\xaf"}, *none[] = {"k", NULL};
    CHECK_INT(moq_st_write(path, NULL, 0, same, 2, &a, &e), MOQ_E_DUPLICATE);
    CHECK_INT(moq_st_write(path, NULL, 0, bad, 1, &a, &e), MOQ_E_UTF8);
    CHECK_INT(moq_st_write(path, NULL, 0, none, 1, &a, &e), MOQ_E_ARG);
    char *big = (char *)malloc(100000001);
    memset(big, 'x', 100000000);
    big[100000000] = 0;
    const char *huge[] = {"k", big};
    CHECK_INT(moq_st_write(path, NULL, 0, huge, 1, &a, &e), MOQ_E_LIMIT);
    CHECK(strstr(e.text, "MOQ_MAX_HEADER_BYTES") != NULL);
    free(big);
    CHECK_INT(moq_st_write(NULL, NULL, 0, NULL, 0, &a, &e), MOQ_E_ARG);
    CHECK_INT(moq_st_write(temp("no/such/folder.safetensors"), NULL, 0, NULL, 0, &a, &e), MOQ_E_NOTFOUND);
    bytes old = slurp(path);
    CHECK(old.n == 3 && memcmp(old.p, "old", 3) == 0); /* nothing was touched */
    free(old.p);
    moq_tensor t = make("t", MOQ_U8, 16, 0, data, 16);
    for (long k = 1;; k++) {
        test_state.fail_at = k;
        moq_result r = moq_st_write(path, &t, 1, NULL, 0, &a, &e);
        int fired = test_state.fail_at == 0;
        test_state.fail_at = 0;
        CHECK_INT(test_state.live_allocs, 0);
        CHECK_INT(r, fired ? MOQ_E_NOMEM : MOQ_OK);
        if (!fired) break;
    }
    CHECK_INT(test_state.live_allocs, 0);
    remove(path);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_st_damaged_length);
    RUN(test_st_frame);
    RUN(test_st_keys);
    RUN(test_st_dtype_shape);
    RUN(test_st_ranges);
    RUN(test_st_first_error);
    RUN(test_st_kinds);
    RUN(test_st_large);
    RUN(test_st_every_prefix_fails);
    RUN(test_st_every_bit_flip);
    RUN(test_st_differential);
    RUN(test_st_failing_allocations);
    RUN(test_st_reading);
    RUN(test_st_files);
    RUN(test_st_writer_round_trip);
    RUN(test_st_writer_over_itself);
    RUN(test_st_writer_refusals);
    rmdir(temp(""));
    return test_end();
}
