/* test_config.c - quantization blocks of every kind, name patterns, claims about modules. */
#include "test.h"
#include <time.h>

#define WRONG(what) (test_state.broken++, fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, what))

#ifndef GOLDEN_DIR
#define GOLDEN_DIR TEST_DIR "/data/golden"
#endif

/* ---- a description parsed from texts ---- */

static struct {
    moq_json_doc *docs[3];
    moqi_arena arena;
    moqi_quant q;
    moq_error err;
    moq_open_desc desc;
    moq_result result;
    int findings;
    char first[800], finding[800]; /* the last */
} p;

static void on_log(void *user, moq_log_level level, moq_result code, const char *text)
{
    (void)user;
    (void)level;
    (void)code;
    if (p.findings++ == 0) snprintf(p.first, sizeof p.first, "%s", text);
    snprintf(p.finding, sizeof p.finding, "%s", text);
}

static void drop(void)
{
    for (int i = 0; i < 3; i++) moq_json_destroy(p.docs[i]);
    moqi_arena_drop(&p.arena);
    memset(&p, 0, sizeof p);
}

/* Texts of config.json, hf_quant_config.json, quantize_config.json; NULL: no such file. */
static moq_result parse(const char *config, const char *hf, const char *gptq)
{
    const char *texts[3];
    const moq_json *roots[3];
    moq_allocator a = test_allocator();
    drop();
    texts[0] = config ? config : "{}";
    texts[1] = hf;
    texts[2] = gptq;
    for (int i = 0; i < 3; i++) {
        p.docs[i] = texts[i] ? moq_json_parse(texts[i], strlen(texts[i]), MOQ_JSON_CONFIG, 0, "test", NULL, &p.err) : NULL;
        if (texts[i] && !p.docs[i]) fprintf(stderr, "test text: %s\n%s\n", p.err.text, texts[i]);
        CHECK(!texts[i] || p.docs[i]);
        roots[i] = p.docs[i] ? moq_json_root(p.docs[i]) : NULL;
    }
    p.desc.log = on_log;
    p.arena = moqi_arena_make(&a);
    p.result = moqi_quant_parse(&p.q, roots[0], roots[1], roots[2], &p.arena, &p.desc, &p.err);
    /* the claims must not point into the documents */
    for (int i = 0; i < 3; i++) { moq_json_destroy(p.docs[i]); p.docs[i] = NULL; }
    return p.result;
}

/* config.json with this quantization_config. */
static moq_result parse_block(const char *block)
{
    static char text[1 << 17];
    snprintf(text, sizeof text, "{\"model_type\": \"llama\", \"quantization_config\": %s}", block);
    return parse(text, NULL, NULL);
}

/* hf_quant_config.json with these settings. */
static moq_result parse_nested(const char *settings)
{
    static char text[1 << 17];
    snprintf(text, sizeof text, "{\"producer\": {\"name\": \"modelopt\", \"version\": \"0.47.0\"}, \"quantization\": %s}", settings);
    return parse(NULL, text, NULL);
}

static moqi_claim claim(const char *module)
{
    moqi_claim c;
    moq_error err;
    moq_result r = moqi_quant_claim(&p.q, module, &c, &err);
    if (r != MOQ_OK) fprintf(stderr, "%s\n", err.text);
    CHECK_INT(r, MOQ_OK);
    CHECK(c.algo != NULL);
    return c;
}

/* Known and not excluded. */
static int covers(const char *module)
{
    moqi_claim c = claim(module);
    return c.known && !c.excluded;
}

#define FAILS(want, what, call)                                                                                        \
    do {                                                                                                               \
        CHECK_INT(call, want);                                                                                         \
        CHECK_INT(p.err.code, want);                                                                                   \
        if (!strstr(p.err.text, what)) { WRONG("the message says why"); fprintf(stderr, "  %s\n", p.err.text); }      \
    } while (0)

/* ---- globs ---- */

/* All ways a star can go, one after the other. */
static int slow_glob(const char *g, const char *s)
{
    if (*g == 0) return *s == 0;
    if (*g == '*') return slow_glob(g + 1, s) || (*s && slow_glob(g, s + 1));
    return *s && (*g == '?' || *g == *s) && slow_glob(g + 1, s + 1);
}

static void test_glob_against_brute_force(void)
{
    int matched = 0, n = 200000;
    for (int i = 0; i < n; i++) {
        char g[9], s[11];
        uint32_t gn = test_random() % 9, sn = test_random() % 11;
        for (uint32_t k = 0; k < gn; k++) g[k] = "ab.*?*ab"[test_random() % 8];
        for (uint32_t k = 0; k < sn; k++) s[k] = "ab."[test_random() % 3];
        g[gn] = s[sn] = 0;
        int want = slow_glob(g, s);
        matched += want;
        if (moq_glob_match(g, s) != want) { WRONG("glob and brute force agree"); fprintf(stderr, "  %s %s %d\n", g, s, want); return; }
    }
    CHECK(matched > n / 50 && matched < n / 2);
}

static void test_glob_table(void)
{
    CHECK(moq_glob_match("model.layers.1*", "model.layers.10.mlp") && !moq_glob_match("model.layers.1.*", "model.layers.10.mlp"));
    CHECK(moq_glob_match("*.attn.*", "layers.3.attn.wq") && moq_glob_match("mtp*", "mtp.layers.0"));
    CHECK(moq_glob_match("a[b]", "a[b]") && !moq_glob_match("a[b]", "ab")); /* brackets are literal */
    CHECK(moq_glob_match("", "") && moq_glob_match("***", "") && !moq_glob_match("?", ""));
}

/* K10: no pattern is exponential. */
static void test_glob_long_patterns_are_fast(void)
{
    enum { N = 10000 };
    static char g[N + 2], s[N + 1];
    clock_t start = clock();
    for (int i = 0; i < N; i += 2) { g[i] = '*'; g[i + 1] = 'a'; }
    g[N] = 0;
    memset(s, 'a', N);
    s[N] = 0;
    CHECK(moq_glob_match(g, s));
    g[N] = 'b';
    g[N + 1] = 0;
    CHECK(!moq_glob_match(g, s));
    CHECK((double)(clock() - start) / CLOCKS_PER_SEC < 0.01);
}

/* ---- regular expressions ---- */

/* 1, 0: verdict of Python's re.match; -1: refused. */
static int regex(const char *pattern, const char *name, moq_error *err)
{
    moq_allocator a = test_allocator();
    moqi_arena r = moqi_arena_make(&a);
    moqi_regex x;
    moq_result res = moqi_regex_compile(&x, pattern, &r, moqi_at("config.json", "key", "targets", -1), err);
    int verdict = res == MOQ_OK ? moqi_regex_match(&x, name, strlen(name)) : -1;
    CHECK(res == MOQ_OK || res == MOQ_E_UNSUPPORTED);
    moqi_arena_drop(&r);
    CHECK_INT(test_state.live_allocs, 0);
    return verdict;
}

static void test_regex_table(void)
{
    static const struct { const char *pattern, *name; int verdict; } rows[] = {
        {".*lm_head", "lm_head", 1}, {".*lm_head", "model.lm_head.weight", 1}, {"lm_head", "model.lm_head", 0}, {"lm_head", "lm_head2", 1},
        {"lm_head$", "lm_head2", 0}, {".*self_attn.*", "model.layers.0.self_attn.q_proj", 1}, {".*mlp.*", "model.layers.0.self_attn.q_proj", 0},
        {".*mlp\\.gate$", "model.layers.3.mlp.gate", 1}, {".*mlp\\.gate$", "model.layers.3.mlp.gate_proj", 0}, {".*mlp.gate$", "model.layers.3.mlpXgate", 1},
        {".*layers\\.[0-9]+\\.mlp\\.experts\\.\\d+\\..*", "model.layers.12.mlp.experts.7.up_proj", 1},
        {".*layers\\.[0-9]+\\.mlp\\.experts\\.\\d+\\..*", "model.layers.12.mlp.experts.up_proj", 0},
        {".*(q|k|v)_proj$", "a.q_proj", 1}, {".*(q|k|v)_proj$", "a.o_proj", 0}, {".*(?:gate|up)_proj$", "mlp.up_proj", 1}, {"(?P<x>a+)b", "aab", 1},
        {"a{2}", "a", 0}, {"a{2}", "aaa", 1}, {"a{2}$", "aaa", 0}, {"a{2,}$", "aaaa", 1}, {"a{,2}$", "aaa", 0}, {"a{1,3}b", "aaab", 1}, {"a{1,3}?b", "aaaab", 0},
        {"(ab){2,3}$", "ababab", 1}, {"(ab){2,3}$", "abababab", 0}, {"(ab){2,3}$", "ab", 0}, {"a{0}b", "b", 1}, {"a{0}b", "ab", 0}, {"a{x}", "a{x}", 1},
        {"x{", "x{", 1}, {"a+?b", "aab", 1}, {"a*?$", "aab", 0}, {"a??b", "b", 1}, {"[^.]+$", "model", 1}, {"[^.]+$", "a.b", 0}, {"[]a]b", "]b", 1},
        {"[a-]x", "-x", 1}, {"[\\w.]+\\.q_proj", "m.l_0.q_proj", 1}, {"[\\w.]+\\.q_proj", "m-l.q_proj", 0}, {"\\W", "-", 1}, {"\\W", "a", 0}, {"\\S\\s\\D", "a b", 1},
        {"\\S\\s\\D", "a 1", 0}, {"^a", "a", 1}, {"a^b", "ab", 0}, {"(^a|b)c", "ac", 1}, {"(^a|b)c", "bc", 1}, {"x*^y", "y", 1}, {"x*^y", "xy", 0}, {"^$", "", 1}, {"^$", "a", 0},
        {"(foo$|bar)$", "foo", 1}, {"(foo$|bar)$", "foob", 0}, {"a$", "a\n", 1}, {"a$", "a\nb", 0}, {"a$\\n", "a\n", 1}, {".", "\n", 0}, {"a.b", "a\nb", 0}, {"", "anything", 1},
        {"|a", "zzz", 1}, {"a||b", "zzz", 1}, {"()", "x", 1}, {"(a*)*b", "aaab", 1}, {"(a*)*b", "aaac", 0}, {"(a|aa)+$", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab", 0},
        {"\\Aa", "a", 1}, {"a\\.b", "a.b", 1}, {"a\\.b", "axb", 0}, {"a\\-b", "a-b", 1}, {"\\[a\\]", "[a]", 1}, {"model\\.layers\\.(0|1|2[0-9])\\.", "model.layers.25.mlp", 1},
        {"model\\.layers\\.(0|1|2[0-9])\\.", "model.layers.35.mlp", 0}, {"\xc3\xa9+", "\xc3\xa9", 1}};
    static const char *const refused[] = {"(?!a)b", "(?=a)b", "(?<=a)b", "(?i)a", "a\\b", "(a)\\1", "a++", "a**", "*a", "+", "(a", "a)", "[a", "[z-a]", "[\\b]", "a{3,1}", "\\Z",
                                          "a\\", "(?", "(?P<n", "[\xc3\xa9]", "a{2}{3}?*", "(((((((((((((((((((((((((((((a)))))))))))))))))))))))))))))", "{2}a", "a{2}{3}", "a*{2}", "a{257}", "((a{16}){16}){2}", "((){99}){99}"};
    moq_error err;
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) {
        int got = regex(rows[i].pattern, rows[i].name, &err);
        if (got != rows[i].verdict) { WRONG("the verdict"); fprintf(stderr, "  '%s' on '%s': %d, expected %d\n", rows[i].pattern, rows[i].name, got, rows[i].verdict); }
    }
    for (size_t i = 0; i < MOQI_COUNT(refused); i++) {
        int got = regex(refused[i], "aaa", &err);
        if (got != -1) { WRONG("a refusal"); fprintf(stderr, "  '%s': %d\n", refused[i], got); continue; }
        CHECK(strstr(err.text, "targets") && strstr(err.text, "config.json"));
    }
}

/* Random patterns as trees: printed for the library, matched here by walking the tree with sets of reachable offsets. */
typedef struct tree { int kind, min, max; char c; struct tree *a, *b; } tree;
enum { T_CHAR, T_DOT, T_CAT, T_ALT, T_REPEAT, T_START, T_END, T_CLASS };
static tree pool[64];
static int pool_used;

static tree *grow(int depth)
{
    tree *t = &pool[pool_used++];
    memset(t, 0, sizeof *t);
    uint32_t k = test_random() % (depth > 3 || pool_used > 40 ? 6 : 14);
    if (k < 3) { t->kind = T_CHAR; t->c = "abc"[k]; }
    else if (k == 3) t->kind = T_DOT;
    else if (k == 4) t->kind = test_random() % 3 ? T_CLASS : T_START;
    else if (k == 5) t->kind = test_random() % 3 ? T_CHAR : T_END, t->c = 'a';
    else if (k < 10) { t->kind = T_CAT; t->a = grow(depth + 1); t->b = grow(depth + 1); }
    else if (k < 12) { t->kind = T_ALT; t->a = grow(depth + 1); t->b = grow(depth + 1); }
    else { t->kind = T_REPEAT; t->min = (int)(test_random() % 3); t->max = test_random() & 1 ? -1 : t->min + (int)(test_random() % 3); t->a = grow(depth + 1); }
    return t;
}

static void print_tree(const tree *t, char **out)
{
    switch (t->kind) {
    case T_CHAR: *(*out)++ = t->c; break;
    case T_DOT: *(*out)++ = '.'; break;
    case T_START: *(*out)++ = '^'; break;
    case T_END: *(*out)++ = '$'; break;
    case T_CLASS: *out += sprintf(*out, "[^a]"); break;
    case T_CAT: print_tree(t->a, out); print_tree(t->b, out); break;
    default:
        *out += sprintf(*out, "(?:");
        print_tree(t->a, out);
        if (t->kind == T_ALT) { *(*out)++ = '|'; print_tree(t->b, out); }
        *(*out)++ = ')';
        if (t->kind == T_REPEAT && t->max < 0) *out += sprintf(*out, t->min == 0 ? "*" : t->min == 1 ? "+" : "{%d,}", t->min);
        else if (t->kind == T_REPEAT) *out += sprintf(*out, "{%d,%d}", t->min, t->max);
    }
    **out = 0;
}

/* Offsets where a match can end that began at any of `from` (bit i: offset i). */
static uint32_t walk(const tree *t, const char *s, uint32_t n, uint32_t from)
{
    uint32_t to = 0, all;
    switch (t->kind) {
    case T_START: return from & 1;
    case T_END: return from & 1u << n;
    case T_CAT: return walk(t->b, s, n, walk(t->a, s, n, from));
    case T_ALT: return walk(t->a, s, n, from) | walk(t->b, s, n, from);
    case T_REPEAT:
        for (int i = 0; i < t->min; i++) from = walk(t->a, s, n, from);
        for (int i = t->min; t->max < 0 ? i < t->min + 16 : i < t->max; i++) from |= walk(t->a, s, n, from);
        return from;
    default:
        for (uint32_t i = 0; i < n; i++) {
            all = from >> i & 1;
            if (all && (t->kind == T_DOT || (t->kind == T_CLASS ? s[i] != 'a' : s[i] == t->c))) to |= 2u << i;
        }
        return to;
    }
}

static void test_regex_against_tree_walk(void)
{
    int matched = 0, n = 0;
    for (int i = 0; i < 4000; i++) {
        char pattern[1024], *end = pattern;
        moq_allocator a = test_allocator();
        moqi_arena r = moqi_arena_make(&a);
        moqi_regex x;
        moq_error err;
        pool_used = 0;
        tree *t = grow(0);
        print_tree(t, &end);
        if (moqi_regex_compile(&x, pattern, &r, moqi_at(NULL, NULL, NULL, -1), &err) != MOQ_OK) {
            CHECK(strstr(err.text, "too long")); /* nested repeats */
            moqi_arena_drop(&r);
            continue;
        }
        for (int k = 0; k < 20; k++, n++) {
            char s[12];
            uint32_t len = test_random() % 9;
            for (uint32_t j = 0; j < len; j++) s[j] = "abca"[test_random() % 4];
            s[len] = 0;
            int want = walk(t, s, len, 1) != 0;
            matched += want;
            if (moqi_regex_match(&x, s, len) != want) { WRONG("automaton and tree agree"); fprintf(stderr, "  %s %s %d\n", pattern, s, want); moqi_arena_drop(&r); return; }
        }
        moqi_arena_drop(&r);
    }
    CHECK(n > 60000 && matched > n / 10 && matched < n * 9 / 10);
}

/* ---- ModelOpt ---- */

/* Every algorithm, in the raw file and in config.json, in either case. */
static void test_modelopt_algorithms(void)
{
    static const struct { const char *algo, *claimed; int group; } rows[] = {
        {"FP8", "FP8", 0}, {"FP8_PER_CHANNEL_PER_TOKEN", "FP8_PER_CHANNEL_PER_TOKEN", 0}, {"W4A16_AWQ", "W4A16_AWQ", 128}, {"W4A8_AWQ", "W4A8_AWQ", 128}, {"W8A16", "W8A16", 0},
        {"W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_CHANNEL", 0}, {"NVFP4", "NVFP4", 16}, {"W4A16_NVFP4", "W4A16_NVFP4", 32}, {"NVFP4_AWQ", "NVFP4_AWQ", 16},
        {"W4A8_NVFP4_FP8", "W4A8_NVFP4_FP8", 32}, {"W4A8_MXFP4_FP8", "W4A8_MXFP4_FP8", 32}, {"NVFP4_SVD", "NVFP4_SVD", 16}, {"MXFP8", "MXFP8", 32}, {"mxfp4", "MXFP4", 0},
        {"fp8_pb_wo", "FP8_PB_WO", 0}, {"fp8_pb_real", "FP8_PB_REAL", 0}, {"nvfp4", "NVFP4", 16}, {"Fp8_Pb_Wo", "FP8_PB_WO", 0}, {"int4_awq", "W4A16_AWQ", 128}};
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) {
        char s[512], group[80] = "";
        if (rows[i].group) snprintf(group, sizeof group, "\"group_size\": %d, \"has_zero_point\": false, ", rows[i].group);
        snprintf(s, sizeof s, "{\"quant_algo\": \"%s\", \"kv_cache_quant_algo\": null, %s\"exclude_modules\": [\"lm_head\", \"model.embed_tokens\", \"model.layers.1.self_attn*\"]}",
                 rows[i].algo, group);
        for (int flat = 0; flat < 2; flat++) {
            CHECK_INT(flat ? parse_block(s) : parse_nested(s), MOQ_OK);
            moqi_claim c = claim("model.layers.0.mlp.up_proj");
            CHECK_INT(p.q.family, MOQ_FAMILY_MODELOPT);
            CHECK_STR(p.q.algo, rows[i].algo);
            CHECK_STR(p.q.producer, flat ? "" : "modelopt 0.47.0");
            CHECK(c.known && !c.excluded && !c.has_coding);
            CHECK_STR(c.algo, rows[i].claimed);
            CHECK_INT(c.group_size, rows[i].group);
            CHECK(claim("lm_head").excluded && claim("model.embed_tokens").excluded && claim("model.layers.1.self_attn.q_proj").excluded);
            CHECK(!claim("model.layers.1.mlp.up_proj").excluded && !claim("model.layers.11.self_attn.q_proj").excluded);
            CHECK_INT(p.q.kv, MOQ_KV_WIDE);
            CHECK_INT(p.findings, 0);
        }
    }
}

/* config.json as the exporter converts it: group sizes hide in config_groups. */
static void test_modelopt_flat(void)
{
    CHECK_INT(parse_block("{\"config_groups\": {\"group_0\": {\"input_activations\": {\"dynamic\": false, \"num_bits\": 4, \"type\": \"float\", \"group_size\": 16},"
                          "\"weights\": {\"dynamic\": false, \"num_bits\": 4, \"type\": \"float\", \"group_size\": 16}, \"targets\": [\"Linear\"]}},"
                          "\"ignore\": [\"lm_head\", \"model.layers.0.self_attn*\"], \"quant_algo\": \"NVFP4\","
                          "\"kv_cache_scheme\": {\"dynamic\": false, \"num_bits\": 8, \"type\": \"float\"},"
                          "\"producer\": {\"name\": \"modelopt\", \"version\": \"0.47.0\"}, \"quant_method\": \"modelopt\"}"),
              MOQ_OK);
    CHECK_INT(claim("model.layers.3.mlp.up_proj").group_size, 16);
    CHECK(claim("model.layers.0.self_attn.q_proj").excluded && claim("lm_head").excluded);
    CHECK_INT(p.q.kv, MOQ_KV_FP8);
    CHECK_STR(p.q.producer, "modelopt 0.47.0");
    CHECK_INT(parse_block("{\"ignore\": [], \"kv_cache_scheme\": \"NVFP4_AFFINE\", \"producer\": {\"name\": \"modelopt\", \"version\": \"0.47.0\"}, \"quant_method\": \"modelopt\"}"), MOQ_OK);
    CHECK_INT(p.q.kv, MOQ_KV_NVFP4_AFFINE);
    CHECK_STR(p.q.algo, "");
    CHECK(!claim("model.layers.0.mlp.up_proj").known);
    /* drafters keep the raw form inside config.json; engines write their own method names */
    CHECK_INT(parse_block("{\"producer\": {\"name\": \"modelopt\"}, \"quantization\": {\"quant_algo\": \"FP8\", \"kv_cache_quant_algo\": \"INT8\"}}"), MOQ_OK);
    CHECK_STR(claim("x.y").algo, "FP8");
    CHECK_STR(p.q.producer, "modelopt");
    CHECK_INT(p.q.kv, MOQ_KV_INT8);
    CHECK_INT(parse_block("{\"quant_method\": \"ModelOpt_fp4\", \"quant_algo\": \"NVFP4\"}"), MOQ_OK);
    CHECK_STR(claim("x.y").algo, "NVFP4");
}

static const char *const mixed_layers =
    "\"quantized_layers\": {\"model.layers.0.self_attn.q_proj\": {\"quant_algo\": \"FP8\"}, \"model.layers.0.mlp\": {\"quant_algo\": \"FP8\"},"
    "\"model.layers.0.mlp.experts\": {\"quant_algo\": \"NVFP4\", \"group_size\": 16},"
    "\"model.layers.0.mlp.experts.3.up_proj\": {\"quant_algo\": \"W4A16_AWQ\", \"group_size\": 128, \"has_zero_point\": false, \"pre_quant_scale\": true},"
    "\"*.attn.*\": {\"quant_algo\": \"mxfp8\"}, \"mtp.*\": {\"quant_algo\": \"FP8\"}}";

/* MIXED_PRECISION: the longest container name wins, globs come last, what is not listed is unknown. */
static void test_modelopt_mixed(void)
{
    static const char *const rows[][2] = {
        {"model.layers.0.self_attn.q_proj", "FP8"}, {"model.layers.0.self_attn.k_proj", ""}, {"model.layers.0.mlp.up_proj", "FP8"}, {"model.layers.0.mlp.experts.0.up_proj", "NVFP4"},
        {"model.layers.0.mlp.experts.3.up_proj", "W4A16_AWQ"}, {"model.layers.0.mlp.experts.gate_up_proj", "NVFP4"}, {"layers.4.attn.wq", "MXFP8"}, {"mtp.0.attn.wq", "MXFP8"}, {"mtp.0.ffn", "FP8"},
        {"model.layers.0.mlpx", ""}, {"lm_head", ""}};
    char s[1024];
    snprintf(s, sizeof s, "{\"quant_algo\": \"MIXED_PRECISION\", \"kv_cache_quant_algo\": \"FP8\", %s}", mixed_layers);
    for (int flat = 0; flat < 3; flat++) {
        if (flat < 2) CHECK_INT(flat ? parse_block(s) : parse_nested(s), MOQ_OK);
        else { /* hf_quant_config.json without the layers borrows those of config.json */
            char config[1200];
            snprintf(config, sizeof config, "{\"quantization_config\": {\"quant_algo\": \"MIXED_PRECISION\", \"kv_cache_scheme\": \"FP8\", %s}}", mixed_layers);
            CHECK_INT(parse(config, "{\"quantization\": {\"quant_algo\": \"MIXED_PRECISION\", \"kv_cache_quant_algo\": \"FP8\"}}", NULL), MOQ_OK);
        }
        for (size_t i = 0; i < MOQI_COUNT(rows); i++) {
            moqi_claim c = claim(rows[i][0]);
            CHECK_STR(c.algo, rows[i][1]);
            CHECK_INT(c.known, rows[i][1][0] != 0);
        }
        CHECK_INT(claim("model.layers.0.mlp.experts.3.up_proj").group_size, 128);
        CHECK_INT(p.findings, 0);
    }
}

/* Nemotron-H exports: a NUL and a sentinel end every name. */
static void test_modelopt_damaged_names(void)
{
    CHECK_INT(parse_nested("{\"quant_algo\": \"FP8\", \"exclude_modules\": [\"lm_head.\\u0000backbone.pt_name_sentinel\", \"backbone.layers.2.\\u0000backbone.pt_name_sentinel*\","
                           "\"\\u0000x\", \"backbone.layers.1.mixer.gate.\\u0000backbone.pt_name_sentinel\"]}"),
              MOQ_OK);
    CHECK_STR(claim("a.b").algo, "FP8");
    CHECK(claim("lm_head").excluded && claim("backbone.layers.2.mixer.q_proj").excluded && claim("backbone.layers.1.mixer.gate").excluded);
    CHECK(!claim("backbone.layers.20.mixer.up_proj").excluded && !claim("backbone.layers.1.mixer.up_proj").excluded);
    CHECK_INT(parse_nested("{\"quant_algo\": \"MIXED_PRECISION\", \"quantized_layers\": {\"a.up_proj.\\u0000x\": {\"quant_algo\": \"FP8\"}}}"), MOQ_OK);
    CHECK_STR(claim("a.up_proj").algo, "FP8");
}

/* Multimodal models: the outermost parts of names differ between description and tensors. */
static void test_modelopt_outer_names(void)
{
    CHECK_INT(parse_nested("{\"quant_algo\": \"NVFP4\", \"group_size\": 16, \"exclude_modules\": [\"language_model.lm_head\", \"language_model.model.layers.0.self_attn*\"]}"), MOQ_OK);
    CHECK(claim("lm_head").excluded && claim("model.language_model.layers.0.self_attn.q_proj").excluded && claim("language_model.model.layers.0.self_attn.q_proj").excluded);
    CHECK(covers("model.language_model.layers.1.self_attn.q_proj"));
    CHECK_INT(parse_nested("{\"quant_algo\": \"MIXED_PRECISION\", \"quantized_layers\": {\"model.layers.0.mlp.up_proj\": {\"quant_algo\": \"FP8\"}}}"), MOQ_OK);
    CHECK_STR(claim("model.language_model.layers.0.mlp.up_proj").algo, "FP8");
    CHECK_INT(parse("{\"text_config\": {\"quantization_config\": {\"quant_method\": \"modelopt\", \"quant_algo\": \"FP8\"}}}", NULL, NULL), MOQ_OK);
    CHECK_STR(claim("a").algo, "FP8");
}

/* robustness: K1 to K15, as far as JSON alone decides. */
static void test_config_k_rows(void)
{
    static const char *const bad_groups[] = {"0", "-16", "17", "1099511627776", "\"16\"", "16.0", "[]", "131072", "8", "-1"};
    char s[256];
    CHECK_INT(parse("{}", NULL, NULL), MOQ_OK); /* K2: nothing said */
    CHECK_INT(p.q.family, MOQ_FAMILY_NONE);
    CHECK(!claim("lm_head").known && p.q.algo[0] == 0 && p.q.producer[0] == 0);
    CHECK_INT(parse("{\"quantization_config\": null}", NULL, NULL), MOQ_OK);
    CHECK_INT(parse("{\"quantization_config\": {\"quant_method\": \"modelopt\", \"quant_algo\": \"FP8\"}}", "{\"quantization\": {\"quant_algo\": \"NVFP4\", \"kv_cache_quant_algo\": \"FP8\"}}", NULL),
              MOQ_OK); /* K3 */
    CHECK_STR(p.q.algo, "NVFP4");
    CHECK_INT(p.findings, 2);
    CHECK(strstr(p.finding, "'fp8' here, 'wide' in config.json") != NULL);
    CHECK_INT(parse("{\"quantization_config\": {\"quant_method\": \"modelopt\", \"quant_algo\": \"nvfp4\"}}", "{\"quantization\": {\"quant_algo\": \"NVFP4\"}}", NULL), MOQ_OK);
    CHECK_INT(p.findings, 0);
    CHECK_INT(parse("{\"quantization_config\": {\"quant_method\": \"fp8\", \"weight_block_size\": [128, 128]}}", "{\"quantization\": {\"quant_algo\": \"NVFP4\"}}", NULL), MOQ_OK);
    CHECK_INT(p.findings, 1);
    CHECK(strstr(p.finding, "'fp8' in config.json") != NULL);
    FAILS(MOQ_E_UNSUPPORTED, "'NVFP3' is not known; correct it, or export again as one of FP8", parse_nested("{\"quant_algo\": \"NVFP3\"}")); /* K4 */
    FAILS(MOQ_E_UNSUPPORTED, "'NVFP3'", parse_nested("{\"quant_algo\": \"MIXED_PRECISION\", \"quantized_layers\": {\"a\": {\"quant_algo\": \"NVFP3\"}}}"));
    FAILS(MOQ_E_CONFIG, "quant_algo", parse_nested("{\"quant_algo\": 8}")); /* K6 */
    CHECK_INT(parse_nested("{\"quant_algo\": null, \"group_size\": 16, \"quantized_layers\": {}}"), MOQ_OK);
    CHECK_INT(p.findings, 1);
    CHECK(!claim("a.b").known);
    for (size_t i = 0; i < MOQI_COUNT(bad_groups); i++) { /* K7 */
        snprintf(s, sizeof s, "{\"quant_algo\": \"NVFP4\", \"group_size\": %s}", bad_groups[i]);
        FAILS(MOQ_E_CONFIG, "group_size", parse_nested(s));
    }
    FAILS(MOQ_E_CONFIG, "exclude_modules", parse_nested("{\"quant_algo\": \"FP8\", \"exclude_modules\": \"lm_head\"}")); /* K9 */
    FAILS(MOQ_E_CONFIG, "element 1", parse_nested("{\"quant_algo\": \"FP8\", \"exclude_modules\": [\"lm_head\", 7]}"));
    FAILS(MOQ_E_CONFIG, "element 0", parse_block("{\"quant_method\": \"modelopt\", \"quant_algo\": \"FP8\", \"ignore\": [null]}"));
    CHECK_INT(parse_nested("{\"quant_algo\": \"FP8\", \"exclude_modules\": null}"), MOQ_OK);
    CHECK_INT(parse_nested("{\"quant_algo\": \"MIXED_PRECISION\"}"), MOQ_OK); /* K11 */
    CHECK_INT(p.findings, 1);
    CHECK(!claim("a").known);
    FAILS(MOQ_E_CONFIG, "quantized_layers", parse_nested("{\"quant_algo\": \"MIXED_PRECISION\", \"quantized_layers\": []}"));
    FAILS(MOQ_E_CONFIG, "'a'", parse_nested("{\"quant_algo\": \"MIXED_PRECISION\", \"quantized_layers\": {\"a\": 1}}"));
    FAILS(MOQ_E_CONFIG, "one module", parse_nested("{\"quant_algo\": \"MIXED_PRECISION\", \"quantized_layers\": {\"a\": {\"quant_algo\": \"mixed_precision\"}}}"));
    FAILS(MOQ_E_UNSUPPORTED, "INT3", parse_nested("{\"quant_algo\": \"FP8\", \"kv_cache_quant_algo\": \"INT3\"}")); /* K13 */
    FAILS(MOQ_E_CONFIG, "kv_cache_quant_algo", parse_nested("{\"quant_algo\": \"FP8\", \"kv_cache_quant_algo\": 8}"));
    FAILS(MOQ_E_UNSUPPORTED, "has_zero_point", parse_nested("{\"quant_algo\": \"W4A16_AWQ\", \"group_size\": 128, \"has_zero_point\": true}"));
    FAILS(MOQ_E_CONFIG, "object", parse("{}", "[]", NULL));
    FAILS(MOQ_E_CONFIG, "object", parse("{\"quantization_config\": []}", NULL, NULL));
    FAILS(MOQ_E_CONFIG, "quant_method", parse_block("{\"quant_method\": 3}"));
    FAILS(MOQ_E_UNSUPPORTED, "modelopt, compressed-tensors, mxfp4, fp8, awq, gptq", parse_block("{\"quant_method\": \"bitsandbytes\"}"));
    FAILS(MOQ_E_UNSUPPORTED, "quant_method", parse_block("{}"));
}

/* A key that is nearly one of a block's, where that one is not: told with its file, once. Module and group names and keys of the writers' own: not. */
static void test_config_misspelled_keys(void)
{
    static const struct { int file; const char *text, *key, *meant; } cases[] = {
        {1, "{\"quant_alog\": \"FP8\", \"exclude_modules\": []}", "quant_alog", "quant_algo"},
        {1, "{\"quant_algo\": \"NVFP4\", \"groupsize\": 16}", "groupsize", "group_size"},
        {1, "{\"quant_algo\": \"FP8\", \"kv_cache_quant_algos\": \"FP8\"}", "kv_cache_quant_algos", "kv_cache_quant_algo"},
        {1, "{\"quant_algo\": \"MIXED_PRECISION\", \"quantized_layers\": {\"a.quant_alog\": {\"quant_algo\": \"NVFP4\", \"group_sizes\": 32}}}", "group_sizes", "group_size"},
        {1, "{\"quant_algo\": \"MIXED_PRECISION\", \"quantized_layers\": {\"weight\": {\"quant_algo\": \"NVFP4\"}, \"ignored\": {\"quant_algo\": \"FP8\"}}}", NULL, NULL},
        {1, "{\"quant_algo\": \"FP8\", \"quant_algos\": \"FP8\", \"awq_block_size\": 1, \"clamp_val\": null, \"smoothquant_val\": 0.5, \"dtype\": 1, \"bias\": 1}", NULL, NULL},
        {0, "{\"quant_method\": \"gptq\", \"bits\": 4, \"group_size\": 128, \"dynamic\": {\"bit\": {\"bitss\": 8}}}", "bitss", "bits"},
        {0, "{\"quant_method\": \"gptq\", \"bits\": 4, \"desc_acts\": true, \"damp_percent\": 0.1, \"static_groups\": false, \"true_sequential\": true}", "desc_acts", "desc_act"},
        {0, "{\"quant_method\": \"awq\", \"bits\": 4, \"zero_pint\": false}", "zero_pint", "zero_point"},
        {0, "{\"quant_method\": \"fp8\", \"weight_blocksize\": [128, 128]}", "weight_blocksize", "weight_block_size"},
        {0, "{\"quant_metod\": \"fp8\"}", "quant_metod", "quant_method"},
        {0, "{\"config_groups\": {\"weight\": {\"targets\": [\"Linear\"], \"weights\": {\"num_bits\": 4, \"symetric\": false}}}}", "symetric", "symmetric"},
        {0, "{\"config_groups\": {\"g\": {\"targets\": [\"Linear\"], \"weight\": {\"num_bits\": 4}}}}", "weight", "weights"},
        {0, "{\"config_groups\": {}, \"transform_config\": {\"config_groups\": {\"typ\": {\"type\": \"hadamard\", \"aply\": [], \"precision\": \"x\"}}}}", "aply", "apply"},
        {2, "{\"quantisation_config\": {\"quant_method\": \"fp8\"}}", "quantisation_config", "quantization_config"},
        {2, "{\"text_config\": {\"quantization_confg\": {\"quant_method\": \"fp8\"}}}", "quantization_confg", "quantization_config"},
        {2, "{\"quantization_configs\": 3, \"torch_dtype\": \"bfloat16\"}", NULL, NULL}};
    char want[160];
    for (size_t i = 0; i < MOQI_COUNT(cases); i++) {
        if (cases[i].file == 0) parse_block(cases[i].text);
        else if (cases[i].file == 1) parse_nested(cases[i].text);
        else parse(cases[i].text, NULL, NULL);
        if (!cases[i].key) { CHECK_INT(p.findings, 0); continue; }
        snprintf(want, sizeof want, "%s: key '%s': nothing reads this key; is %s meant?", cases[i].file == 1 ? "hf_quant_config.json" : "config.json", cases[i].key,
                 cases[i].meant);
        if (strncmp(p.first, want, strlen(want)) != 0) { WRONG(want); fprintf(stderr, "  %s\n", p.first); }
    }
    parse_nested("{\"quant_algo\": \"MIXED_PRECISION\", \"quantized_layers\": {\"a\": {\"quant_algo\": \"NVFP4\", \"group_sizes\": 32}, " /* told once */
                 "\"b\": {\"quant_algo\": \"NVFP4\", \"group_sizes\": 32}}}");
    CHECK_INT(p.findings, 1);
    parse("{}", NULL, "{\"bits\": 4, \"group_sise\": 32}");
    CHECK(strstr(p.first, "quantize_config.json: key 'group_sise': nothing reads this key; is group_size meant?") != NULL);
    parse("{\"quantization_config\": {\"quant_algo\": \"FP8\", \"ignor\": []}}", "{\"quantization\": {\"quant_algo\": \"FP8\"}}", NULL); /* the copy, too */
    CHECK(strstr(p.first, "config.json: key 'ignor'") == p.first);
    parse(NULL, "{\"quantisation\": {\"quant_algo\": \"FP8\"}}", NULL);
    CHECK(strstr(p.first, "hf_quant_config.json: key 'quantisation': nothing reads this key; is quantization meant?") != NULL);
    drop();
}

static void test_slips(void)
{
    static const char *const yes[][2] = {{"group_size", "groupsize"}, {"group_size", "gruop_size"}, {"group_size", "roup_sizeg"}, {"bits", "bit"}, {"bits", "bots"},
                                         {"abc", "acb"}, {"abc", "abcd"}};
    static const char *const no[][2] = {{"group_size", "q_group_size"}, {"bits", "nbts"}, {"abcd", "badc"}, {"ab", "abc"}, {"ab", "ac"}, {"", "a"}, {"weights", "inputs"}};
    for (size_t i = 0; i < MOQI_COUNT(yes); i++) CHECK(moq_is_slip(yes[i][0], yes[i][1]) && moq_is_slip(yes[i][1], yes[i][0]));
    for (size_t i = 0; i < MOQI_COUNT(no); i++) CHECK(!moq_is_slip(no[i][0], no[i][1]) && !moq_is_slip(no[i][1], no[i][0]));
}

static void test_config_kv(void)
{
    static const struct { const char *kv; int format; } rows[] = {
        {"\"FP8\"", MOQ_KV_FP8}, {"\"INT8\"", MOQ_KV_INT8}, {"\"NVFP4\"", MOQ_KV_NVFP4}, {"\"NVFP4_AFFINE\"", MOQ_KV_NVFP4_AFFINE}, {"\"fp8_affine\"", MOQ_KV_FP8_AFFINE},
        {"\"NVFP4_ROTATE\"", MOQ_KV_NVFP4_ROTATE}, {"\"MXFP4\"", MOQ_KV_MXFP4}, {"\"FLOAT8\"", MOQ_KV_FP8}, {"\"none\"", MOQ_KV_WIDE}, {"null", MOQ_KV_WIDE},
        {"{\"dynamic\": false, \"num_bits\": 8, \"type\": \"float\"}", MOQ_KV_FP8}, {"{\"num_bits\": 4, \"type\": \"float\", \"group_size\": 16, \"dynamic\": \"local\"}", MOQ_KV_NVFP4},
        {"{\"num_bits\": 4, \"type\": \"float\", \"scale_dtype\": \"torch.uint8\", \"group_size\": 32, \"dynamic\": true}", MOQ_KV_MXFP4}, {"{\"num_bits\": 8, \"type\": \"int\"}", MOQ_KV_INT8},
        {"{\"num_bits\": 8, \"type\": \"float\", \"strategy\": \"attn_head\", \"group_size\": null, \"symmetric\": true}", MOQ_KV_FP8}};
    static const char *const bad[] = {"\"FP7\"", "{\"num_bits\": 2, \"type\": \"int\"}", "{\"num_bits\": 8, \"type\": \"int\", \"symmetric\": false}", "{\"num_bits\": 8, \"type\": \"float\", \"dynamic\": true}",
                                      "{\"num_bits\": 8, \"type\": \"bool\"}", "{\"num_bits\": 8, \"strategy\": \"channel\"}"};
    char s[400];
    for (size_t i = 0; i < MOQI_COUNT(rows) + MOQI_COUNT(bad); i++) {
        const char *kv = i < MOQI_COUNT(rows) ? rows[i].kv : bad[i - MOQI_COUNT(rows)];
        for (int ct = 0; ct < 2; ct++) {
            snprintf(s, sizeof s, "{\"quant_method\": \"%s\", \"quant_algo\": \"FP8\", \"kv_cache_scheme\": %s}", ct ? "compressed-tensors" : "modelopt", kv);
            CHECK_INT(parse_block(s), i < MOQI_COUNT(rows) ? MOQ_OK : MOQ_E_UNSUPPORTED);
            if (i >= MOQI_COUNT(rows)) continue;
            CHECK_INT(p.q.kv, rows[i].format);
            CHECK_INT(p.q.kv_from_config, strcmp(kv, "null") != 0);
        }
    }
}

/* ---- compressed-tensors ---- */

static int coding_is(const moq_coding *c, moq_dtype elem, int rows, int cols, moq_dtype scale, int global, int dynamic, int zero, int rule)
{
    int ok = c->elem == elem && c->group_rows == rows && c->group_cols == cols && c->scale == scale && c->has_global == global && c->dynamic == dynamic && c->zero_point == zero && c->rule == rule;
    if (!ok)
        fprintf(stderr, "  coding %s %d %d %s global %d dynamic %d zero %d rule %d\n", moq_dtype_name(c->elem), c->group_rows, c->group_cols, moq_dtype_name(c->scale), c->has_global, c->dynamic,
                c->zero_point, c->rule);
    return ok;
}

static moq_result parse_group(const char *weights, const char *inputs, const char *more)
{
    char s[1200];
    snprintf(s, sizeof s, "{\"quant_method\": \"compressed-tensors\", \"version\": \"0.20.0\", %s \"config_groups\": {\"group_0\": {\"targets\": [\"Linear\"], \"weights\": %s, \"input_activations\": %s}}}", more,
             weights, inputs);
    return parse_block(s);
}

static void test_ct_arguments(void)
{
    moqi_claim c;
    CHECK_INT(parse_group("{\"num_bits\": 4, \"type\": \"int\", \"strategy\": \"group\", \"group_size\": 128}", "null", "\"format\": \"pack-quantized\","), MOQ_OK);
    CHECK_INT(p.q.family, MOQ_FAMILY_COMPRESSED_TENSORS);
    CHECK_STR(p.q.algo, "pack-quantized");
    CHECK_STR(p.q.producer, "compressed-tensors 0.20.0");
    c = claim("model.layers.0.mlp.up_proj");
    CHECK(c.known && c.has_coding && c.weight_bits == 4 && c.group_size == 128 && c.packed_format == MOQI_CT_PACK && !c.old_packing && !c.act_order && !c.zero_point);
    CHECK(coding_is(&c.weight, MOQ_I4, 1, 128, MOQ_F32, 0, 0, 0, 0) && c.input.elem == MOQ_NONE);
    CHECK(!claim("model.embed_tokens").known && claim("lm_head").known); /* Linear is no embedding */

    /* inferred strategies: a group size, -1, nothing */
    CHECK_INT(parse_group("{\"num_bits\": 3, \"group_size\": 64, \"symmetric\": false, \"actorder\": \"group\"}", "null", ""), MOQ_OK);
    c = claim("a.b");
    CHECK(coding_is(&c.weight, MOQ_I3, 1, 64, MOQ_F32, 0, 0, 1, 0) && c.act_order && c.zero_point && c.packed_format == MOQI_CT_PACK && !c.old_packing);
    CHECK_INT(parse_group("{\"num_bits\": 8, \"group_size\": -1, \"actorder\": \"weight\"}", "{\"num_bits\": 8, \"strategy\": \"token\", \"dynamic\": true}", ""), MOQ_OK);
    c = claim("a.b");
    CHECK(coding_is(&c.weight, MOQ_I8, 1, MOQ_ALL, MOQ_F32, 0, 0, 0, 0) && coding_is(&c.input, MOQ_I8, 1, MOQ_ALL, MOQ_F32, 0, 1, 0, 0) && !c.act_order && c.group_size == MOQ_ALL);
    CHECK_INT(c.packed_format, MOQI_CT_INT);
    CHECK_INT(parse_group("{\"num_bits\": 8, \"type\": \"float\"}", "{\"num_bits\": 8, \"type\": \"float\", \"symmetric\": true}", ""), MOQ_OK);
    c = claim("a.b");
    CHECK(coding_is(&c.weight, MOQ_F8_E4M3, MOQ_ALL, MOQ_ALL, MOQ_F32, 0, 0, 0, 0) && coding_is(&c.input, MOQ_F8_E4M3, MOQ_ALL, MOQ_ALL, MOQ_F32, 0, 0, 0, 0) && c.group_size == 0);
    CHECK_INT(c.packed_format, MOQI_CT_FLOAT);

    /* blocks, as a list or a string */
    for (int text = 0; text < 2; text++) {
        CHECK_INT(parse_group(text ? "{\"num_bits\": 8, \"type\": \"float\", \"strategy\": \"block\", \"block_structure\": \"64x128\"}"
                                   : "{\"num_bits\": 8, \"type\": \"float\", \"strategy\": \"block\", \"block_structure\": [64, 128], \"group_size\": null}",
                              "{\"num_bits\": 8, \"type\": \"float\", \"strategy\": \"group\", \"group_size\": 128, \"dynamic\": true}", "\"format\": \"float-quantized\","), MOQ_OK);
        c = claim("a.b");
        CHECK(coding_is(&c.weight, MOQ_F8_E4M3, 64, 128, MOQ_F32, 0, 0, 0, 0) && coding_is(&c.input, MOQ_F8_E4M3, 1, 128, MOQ_F32, 0, 1, 0, 0) && c.block_rows == 64 && c.block_cols == 128 && c.group_size == 0);
    }

    /* NVFP4 with and without scale_dtype, MXFP4 and MXFP8 rounding their own way */
    CHECK_INT(parse_group("{\"num_bits\": 4, \"type\": \"float\", \"strategy\": \"tensor_group\", \"group_size\": 16}",
                          "{\"num_bits\": 4, \"type\": \"float\", \"strategy\": \"tensor_group\", \"group_size\": 16, \"dynamic\": \"local\"}", "\"format\": \"nvfp4-pack-quantized\","), MOQ_OK);
    c = claim("a.b");
    CHECK(coding_is(&c.weight, MOQ_F4, 1, 16, MOQ_F8_E4M3, 1, 0, 0, 0) && coding_is(&c.input, MOQ_F4, 1, 16, MOQ_F8_E4M3, 1, 1, 0, 0) && c.packed_format == MOQI_CT_NVFP4);
    for (int said = 0; said < 2; said++) {
        CHECK_INT(parse_group(said ? "{\"num_bits\": 4, \"type\": \"float\", \"group_size\": 32, \"scale_dtype\": \"torch.uint8\"}" : "{\"num_bits\": 4, \"type\": \"float\", \"group_size\": 32}",
                              "{\"num_bits\": 4, \"type\": \"float\", \"group_size\": 32, \"dynamic\": true}", said ? "\"format\": null," : "\"format\": \"mxfp4-pack-quantized\","), MOQ_OK);
        c = claim("a.b");
        CHECK(coding_is(&c.weight, MOQ_F4, 1, 32, MOQ_F8_E8M0, 0, 0, 0, 0) && coding_is(&c.input, MOQ_F4, 1, 32, MOQ_F8_E8M0, 0, 1, 0, MOQ_RULE_E8M0_ROUND) && c.packed_format == MOQI_CT_MXFP4);
    }
}

static void test_ct_refusals(void)
{
    static const struct { const char *weights, *inputs, *more, *text; int code; } rows[] = {
        {"{\"num_bits\": 9}", "null", "", "9-bit", MOQ_E_UNSUPPORTED},
        {"{\"num_bits\": 1}", "null", "", "1-bit", MOQ_E_UNSUPPORTED},
        {"{\"num_bits\": 0}", "null", "", "num_bits", MOQ_E_CONFIG},
        {"{\"num_bits\": \"4\"}", "null", "", "num_bits", MOQ_E_CONFIG},
        {"{\"num_bits\": 6, \"type\": \"float\"}", "null", "", "6-bit", MOQ_E_UNSUPPORTED},
        {"{\"num_bits\": 6, \"type\": \"float\", \"group_size\": 16}", "null", "", "6-bit", MOQ_E_UNSUPPORTED},
        {"{\"num_bits\": 5, \"type\": \"float\"}", "null", "", "5-bit", MOQ_E_UNSUPPORTED},
        {"{\"num_bits\": 8, \"type\": \"float\", \"symmetric\": false}", "null", "", "symmetric", MOQ_E_UNSUPPORTED},
        {"{\"num_bits\": 4, \"dynamic\": true}", "null", "", "dynamic", MOQ_E_UNSUPPORTED},
        {"{\"num_bits\": 4, \"dynamic\": \"local\"}", "null", "", "tensor_group", MOQ_E_CONFIG},
        {"{\"num_bits\": 4, \"dynamic\": 3}", "null", "", "dynamic", MOQ_E_CONFIG},
        {"{\"num_bits\": 4, \"strategy\": \"group\"}", "null", "", "group_size", MOQ_E_CONFIG},
        {"{\"num_bits\": 4, \"group_size\": 17}", "null", "", "group_size", MOQ_E_CONFIG},
        {"{\"num_bits\": 4, \"group_size\": 0}", "null", "", "group_size", MOQ_E_CONFIG},
        {"{\"num_bits\": 8, \"strategy\": \"block\"}", "null", "", "block_structure", MOQ_E_CONFIG},
        {"{\"num_bits\": 8, \"strategy\": \"block\", \"block_structure\": \"128\"}", "null", "", "block_structure", MOQ_E_CONFIG},
        {"{\"num_bits\": 8, \"strategy\": \"block\", \"block_structure\": [128, 0]}", "null", "", "block_structure", MOQ_E_CONFIG},
        {"{\"num_bits\": 8, \"strategy\": \"block\", \"block_structure\": \"12800000000000000000000x1\"}", "null", "", "block_structure", MOQ_E_CONFIG},
        {"{\"num_bits\": 8, \"strategy\": \"token\"}", "null", "", "token", MOQ_E_UNSUPPORTED},
        {"{\"num_bits\": 8}", "{\"num_bits\": 8, \"strategy\": \"channel\"}", "", "channel", MOQ_E_UNSUPPORTED},
        {"{\"num_bits\": 8}", "{\"num_bits\": 8, \"strategy\": \"token\"}", "", "static scale", MOQ_E_UNSUPPORTED},
        {"{\"num_bits\": 4, \"actorder\": 1}", "null", "", "actorder", MOQ_E_CONFIG},
        {"null", "{\"num_bits\": 8}", "", "unquantized weights", MOQ_E_UNSUPPORTED},
        {"[]", "null", "", "weights", MOQ_E_CONFIG},
        {"{\"num_bits\": 4}", "null", "\"format\": \"marlin-24\",", "known are pack-quantized", MOQ_E_UNSUPPORTED},
        {"{\"num_bits\": 4}", "null", "\"sparsity_config\": {\"format\": \"sparse-24-bitmask\"},", "sparse", MOQ_E_UNSUPPORTED},
        {"{\"num_bits\": 4}", "null", "\"ignore\": [\"re:a(?=b)\"],", "a(?=b)", MOQ_E_UNSUPPORTED},
        {"{\"num_bits\": 4}", "null", "\"ignore\": {},", "ignore", MOQ_E_CONFIG},
        {"{\"num_bits\": 4}", "null", "\"ignore\": [1],", "element 0", MOQ_E_CONFIG}};
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) FAILS((moq_result)rows[i].code, rows[i].text, parse_group(rows[i].weights, rows[i].inputs, rows[i].more));
    FAILS(MOQ_E_CONFIG, "config_groups", parse_block("{\"quant_method\": \"compressed-tensors\", \"config_groups\": []}"));
    FAILS(MOQ_E_CONFIG, "g0", parse_block("{\"quant_method\": \"compressed-tensors\", \"config_groups\": {\"g0\": 1}}"));
    FAILS(MOQ_E_UNSUPPORTED, "NVFP3", parse_block("{\"quant_method\": \"compressed-tensors\", \"config_groups\": {\"NVFP3\": [\"Linear\"]}}"));
}

/* Targets: names and patterns before classes, each in file order; ignore; groups with their own formats. */
static void test_ct_targets(void)
{
    static const struct { const char *module; int bits; } rows[] = {
        {"model.layers.0.mlp.up_proj", 8}, {"model.layers.0.self_attn.q_proj", 4}, {"model.layers.3.self_attn.o_proj", 2}, {"model.layers.4.self_attn.o_proj", 4},
        {"model.layers.0.mlp.down_proj", 3}, {"lm_head", 0}, {"model.layers.0.mlp.gate", 0}, {"model.embed_tokens", 5}, {"model.layers.7.mlp.down_proj", 3}};
    CHECK_INT(parse_block("{\"quant_method\": \"compressed_tensors\", \"config_groups\": {"
                          "\"a\": {\"targets\": [\"Linear\"], \"weights\": {\"num_bits\": 8}},"
                          "\"b\": {\"targets\": [\"model.layers.3.self_attn.o_proj\"], \"weights\": {\"num_bits\": 2, \"group_size\": 32}},"
                          "\"c\": {\"targets\": [\"re:.*self_attn.*\", \"re:nothing\"], \"weights\": {\"num_bits\": 4, \"group_size\": 32}},"
                          "\"d\": {\"targets\": [\"re:.*down_proj$\"], \"weights\": {\"num_bits\": 3, \"group_size\": 32}},"
                          "\"e\": {\"targets\": [\"model.layers.7.mlp.down_proj\", \"Embedding\"], \"weights\": {\"num_bits\": 5, \"group_size\": 32}}},"
                          "\"ignore\": [\"lm_head\", \"re:.*mlp\\\\.gate$\"]}"),
              MOQ_OK);
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) {
        moqi_claim c = claim(rows[i].module);
        CHECK_INT(c.excluded ? 0 : c.weight_bits, rows[i].bits);
        CHECK(c.known);
    }
    CHECK(claim("model.layers.3.self_attn.q_proj").old_packing == 0 && claim("model.layers.0.mlp.down_proj").old_packing == 1); /* no version: old */
    CHECK_INT(p.findings, 0);

    /* a group of a preset's name, several presets; unknown classes are found */
    CHECK_INT(parse_block("{\"quant_method\": \"compressed-tensors\", \"version\": \"0.17.1\", \"config_groups\": {\"NVFP4\": [\"re:.*mlp.*\"], \"FP8_BLOCK\": [\"re:.*self_attn.*\"], \"W4A16_ASYM\": [\"lm_head\", \"LlamaAttention\"]}}"),
              MOQ_OK);
    CHECK_INT(p.findings, 1);
    moqi_claim c = claim("model.layers.0.mlp.up_proj");
    CHECK(c.packed_format == MOQI_CT_NVFP4 && coding_is(&c.input, MOQ_F4, 1, 16, MOQ_F8_E4M3, 1, 1, 0, 0));
    c = claim("model.layers.0.self_attn.q_proj");
    CHECK(c.packed_format == MOQI_CT_FLOAT && c.block_rows == 128 && coding_is(&c.input, MOQ_F8_E4M3, 1, 128, MOQ_F32, 0, 1, 0, 0));
    c = claim("lm_head");
    CHECK(c.packed_format == MOQI_CT_PACK && c.zero_point && c.group_size == 128 && c.weight_bits == 4);
    CHECK(!claim("visual.patch_embed").known);

    /* weights null: named, but plain. Old version without dots in compression_config. */
    CHECK_INT(parse("{\"compression_config\": {\"format\": \"dense\", \"config_groups\": {\"g\": {\"targets\": [\"Linear\"], \"weights\": null}}}}", NULL, NULL), MOQ_OK);
    CHECK_INT(p.q.family, MOQ_FAMILY_COMPRESSED_TENSORS);
    CHECK(claim("a.b").excluded);
}

/* Versions that padded words: all before 0.18, where the bits do not divide 32. */
static void test_ct_old_packing(void)
{
    static const struct { const char *version; int bits, old; } rows[] = {{"0.17.1", 3, 1}, {"0.18.0", 3, 0}, {"0.13.0", 4, 0}, {"0.9.4", 6, 1}, {"0.20.0", 5, 0}, {"1.0", 7, 0},
                                                                          {"0.18.0.a20260701", 3, 0}, {"", 3, 1}, {"junk", 3, 1}, {"0.99999999999999999999", 3, 1}};
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) {
        char s[300];
        snprintf(s, sizeof s, "{\"quant_method\": \"compressed-tensors\", \"version\": \"%s\", \"config_groups\": {\"g\": {\"targets\": [\"Linear\"], \"weights\": {\"num_bits\": %d}}}}", rows[i].version,
                 rows[i].bits);
        CHECK_INT(parse_block(s), MOQ_OK);
        CHECK_INT(claim("a").old_packing, rows[i].old);
    }
}

static moq_result parse_transform(const char *type, const char *apply, const char *size)
{
    char s[1500];
    snprintf(s, sizeof s, "{\"quant_method\": \"compressed-tensors\", \"config_groups\": {\"W4A16\": [\"Linear\"]}, \"ignore\": [\"lm_head\"],"
                          "\"transform_config\": {\"config_groups\": {\"v\": {\"type\": \"%s\", %s \"apply\": [%s]}}}}", type, size, apply);
    return parse_block(s);
}

static void test_ct_transforms(void)
{
    moqi_claim c;
    CHECK_INT(parse_transform("random-hadamard", "{\"location\": \"input\", \"targets\": [\"Linear\"], \"ignore\": [\"lm_head\", \"re:.*o_proj\"]}, {\"location\": \"weight_input\", \"inverse\": true, \"targets\": [\"Linear\"]}",
                              "\"head_dim\": 32,"), MOQ_OK);
    c = claim("model.layers.0.self_attn.q_proj");
    CHECK(c.hadamard_size == 32 && c.weight_bits == 4);
    CHECK_STR(c.transform, "v");
    CHECK(claim("lm_head").transform == NULL && claim("a.o_proj").transform == NULL && claim("a.o_proj").hadamard_size == 0 && claim("model.embed_tokens").transform == NULL);
    CHECK_INT(parse_transform("hadamard", "{\"location\": \"input\", \"inverse\": true, \"targets\": [\"re:.*down_proj$\"]}", "\"head_dim\": null,"), MOQ_OK);
    CHECK_INT(claim("a.down_proj").hadamard_size, -1);
    CHECK_INT(parse_transform("hadamard", "{\"location\": \"weight_output\", \"targets\": [\"Linear\"]}", ""), MOQ_OK);
    CHECK(claim("a.down_proj").transform == NULL);
    FAILS(MOQ_E_UNSUPPORTED, "k_cache", parse_transform("hadamard", "{\"location\": \"k_cache\", \"targets\": [\"Linear\"]}", ""));
    FAILS(MOQ_E_UNSUPPORTED, "random-matrix", parse_transform("random-matrix", "{\"location\": \"input\", \"targets\": [\"Linear\"]}", ""));
    FAILS(MOQ_E_UNSUPPORTED, "inverse", parse_transform("random-hadamard", "{\"location\": \"input\", \"inverse\": true, \"targets\": [\"Linear\"]}", ""));
    FAILS(MOQ_E_CONFIG, "head_dim", parse_transform("hadamard", "{\"location\": \"input\", \"targets\": [\"Linear\"]}", "\"head_dim\": 0,"));
    CHECK_INT(parse_transform("hadamard", "{\"location\": \"input\", \"targets\": [\"Linear\"]}, {\"location\": \"input\", \"targets\": [\"a\"]}", ""), MOQ_OK);
    CHECK_INT(moqi_quant_claim(&p.q, "a", &c, &p.err), MOQ_E_UNSUPPORTED);
    CHECK_INT(moqi_quant_claim(&p.q, "b", &c, &p.err), MOQ_OK);
}

/* ---- other families ---- */

static void test_gpt_oss(void)
{
    CHECK_INT(parse_block("{\"quant_method\": \"mxfp4\", \"modules_to_not_convert\": [\"model.layers.*.self_attn\", \"model.layers.*.mlp.router\", \"model.embed_tokens\", \"lm_head\"]}"), MOQ_OK);
    moqi_claim c = claim("model.layers.0.mlp.experts.gate_up_proj");
    CHECK_INT(p.q.family, MOQ_FAMILY_GPT_OSS);
    CHECK(c.known && !c.excluded && c.has_coding && c.input.elem == MOQ_NONE && c.group_size == 32 && coding_is(&c.weight, MOQ_F4, 1, 32, MOQ_F8_E8M0, 0, 0, 0, 0));
    CHECK(claim("model.layers.11.self_attn.q_proj").excluded && claim("model.layers.11.mlp.router").excluded && claim("lm_head").excluded && claim("model.embed_tokens").excluded);
    CHECK(!covers("model.layers.0.mlp.other"));
}

static void test_fp8_blocks(void)
{
    moqi_claim c;
    CHECK_INT(parse_block("{\"quant_method\": \"fp8\", \"fmt\": \"e4m3\", \"activation_scheme\": \"dynamic\", \"weight_block_size\": [128, 128], \"modules_to_not_convert\": [\"mlp.gate\", \"visual\"]}"), MOQ_OK);
    c = claim("model.layers.0.mlp.gate_proj");
    CHECK_INT(p.q.family, MOQ_FAMILY_FP8_BLOCK);
    CHECK(c.known && !c.excluded && c.block_rows == 128 && c.block_cols == 128 && coding_is(&c.weight, MOQ_F8_E4M3, 128, 128, MOQ_F32, 0, 0, 0, 0));
    CHECK(coding_is(&c.input, MOQ_F8_E4M3, 1, 128, MOQ_F32, 0, 1, 0, 0));
    CHECK(claim("model.layers.0.mlp.gate").excluded && claim("visual.blocks.0.qkv").excluded && claim("lm_head").excluded && claim("model.embed_tokens").excluded);
    CHECK_INT(parse_block("{\"quant_method\": \"fp8\", \"activation_scheme\": \"dynamic\", \"scale_fmt\": \"ue8m0\", \"weight_block_size\": [128, 128]}"), MOQ_OK);
    c = claim("a.b");
    CHECK(coding_is(&c.input, MOQ_F8_E4M3, 1, 128, MOQ_F8_E8M0, 0, 1, 0, MOQ_RULE_E8M0_CEIL));
    CHECK_INT(parse_block("{\"quant_method\": \"fp8\", \"activation_scheme\": \"static\", \"ignored_layers\": [\"model.layers.0\"]}"), MOQ_OK);
    c = claim("model.layers.1.mlp.up_proj");
    CHECK(coding_is(&c.weight, MOQ_F8_E4M3, MOQ_ALL, MOQ_ALL, MOQ_F32, 0, 0, 0, 0) && coding_is(&c.input, MOQ_F8_E4M3, MOQ_ALL, MOQ_ALL, MOQ_F32, 0, 0, 0, 0) && c.block_rows == 0);
    CHECK(claim("model.layers.0.mlp.up_proj").excluded && !claim("model.layers.01.mlp").excluded);
    CHECK_INT(parse_block("{\"quant_method\": \"fp8\", \"moe_quant_algo\": \"NVFP4\", \"weight_block_size\": [128, 128]}"), MOQ_OK);
    CHECK_STR(claim("layers.3.ffn.experts.7.w1").algo, "NVFP4");
    CHECK(!claim("layers.3.ffn.experts.7.w1").has_coding && claim("layers.3.attn.wq").has_coding);
    FAILS(MOQ_E_CONFIG, "weight_block_size", parse_block("{\"quant_method\": \"fp8\", \"weight_block_size\": 128}"));
    FAILS(MOQ_E_UNSUPPORTED, "e5m2", parse_block("{\"quant_method\": \"fp8\", \"fmt\": \"e5m2\"}"));
    FAILS(MOQ_E_UNSUPPORTED, "often", parse_block("{\"quant_method\": \"fp8\", \"activation_scheme\": \"often\"}"));
    FAILS(MOQ_E_UNSUPPORTED, "moe_quant_algo", parse_block("{\"quant_method\": \"fp8\", \"moe_quant_algo\": \"INT2\"}"));
}

static void test_awq(void)
{
    CHECK_INT(parse_block("{\"quant_method\": \"awq\", \"bits\": 4, \"group_size\": 64, \"version\": \"GEMM\", \"zero_point\": true, \"modules_to_not_convert\": [\"gate\", \"model.vision\"]}"), MOQ_OK);
    moqi_claim c = claim("model.layers.0.mlp.gate_proj");
    CHECK_INT(p.q.family, MOQ_FAMILY_AWQ);
    CHECK(c.known && !c.excluded && c.weight_bits == 4 && c.group_size == 64 && c.zero_point && !c.act_order && coding_is(&c.weight, MOQ_I4, 1, 64, MOQ_F16, 0, 0, 1, 0));
    CHECK(claim("model.layers.0.block_sparse_moe.gate").excluded && claim("model.vision.a").excluded && claim("lm_head").excluded);
    CHECK_INT(parse_block("{\"quant_method\": \"AWQ\", \"group_size\": -1, \"zero_point\": false, \"modules_to_not_convert\": null}"), MOQ_OK);
    CHECK(claim("a").group_size == MOQ_ALL && !claim("a").zero_point);
    FAILS(MOQ_E_UNSUPPORTED, "gemv", parse_block("{\"quant_method\": \"awq\", \"bits\": 4, \"version\": \"gemv\"}"));
    FAILS(MOQ_E_UNSUPPORTED, "llm-awq", parse_block("{\"quant_method\": \"awq\", \"bits\": 4, \"backend\": \"llm-awq\"}"));
    FAILS(MOQ_E_UNSUPPORTED, "bits", parse_block("{\"quant_method\": \"awq\", \"bits\": 8}"));
    FAILS(MOQ_E_CONFIG, "group_size", parse_block("{\"quant_method\": \"awq\", \"bits\": 4, \"group_size\": 48}"));
}

static void test_gptq(void)
{
    moqi_claim c;
    CHECK_INT(parse_block("{\"quant_method\": \"gptq\", \"bits\": 4, \"group_size\": 32, \"desc_act\": true, \"sym\": true, \"checkpoint_format\": \"gptq\", \"lm_head\": false}"), MOQ_OK);
    c = claim("model.layers.0.mlp.up_proj");
    CHECK_INT(p.q.family, MOQ_FAMILY_GPTQ);
    CHECK(c.known && c.weight_bits == 4 && c.group_size == 32 && c.act_order && !c.zero_point && !c.gptq_v2 && coding_is(&c.weight, MOQ_I4, 1, 32, MOQ_F16, 0, 0, 0, 0));
    CHECK(claim("lm_head").excluded);
    CHECK_INT(parse(NULL, NULL, "{\"bits\": 8, \"group_size\": -1, \"sym\": false, \"format\": \"gptq_v2\", \"lm_head\": true}"), MOQ_OK); /* quantize_config.json alone */
    c = claim("lm_head");
    CHECK(c.known && !c.excluded && c.weight_bits == 8 && c.group_size == MOQ_ALL && c.zero_point && c.gptq_v2 && !c.act_order);
    CHECK_INT(parse(NULL, NULL, "{\"quant_method\": \"awq\", \"bits\": 4, \"group_size\": 128}"), MOQ_OK);
    CHECK_INT(p.q.family, MOQ_FAMILY_AWQ);
    CHECK_INT(parse("{\"quantization_config\": {\"quant_method\": \"gptq\", \"bits\": 4}}", NULL, "{\"bits\": 8}"), MOQ_OK); /* config.json goes first */
    CHECK_INT(claim("a").weight_bits, 4);
    CHECK_INT(parse_block("{\"quant_method\": \"gptq\", \"bits\": 4, \"group_size\": 128, \"dynamic\": {\"-:.*\\\\.mlp\\\\.gate$\": {}, \"+:.*down_proj\": {\"bits\": 8, \"group_size\": 32}, \".*up\": {\"desc_act\": true, \"sym\": true}}}"),
              MOQ_OK);
    CHECK(claim("l.0.mlp.gate").excluded && claim("l.0.mlp.down_proj").weight_bits == 8 && claim("l.0.mlp.down_proj").group_size == 32 && claim("l.0.mlp.down_proj").weight.elem == MOQ_I8);
    CHECK(claim("l.0.mlp.up_proj").act_order && claim("l.0.mlp.up_proj").weight_bits == 4 && claim("l.0.mlp.up_proj").group_size == 128 && !claim("l.0.mlp.gate_proj").excluded);
    static const char *const marlin[] = {"\"quant_method\": \"gptq\", \"checkpoint_format\": \"marlin\"", "\"quant_method\": \"gptq\", \"is_marlin_format\": true",
                                         "\"quant_method\": \"awq\", \"version\": \"marlin\", \"zero_point\": false"};
    for (size_t i = 0; i < MOQI_COUNT(marlin); i++) {
        char text[200];
        snprintf(text, sizeof text, "{%s, \"bits\": 4, \"group_size\": -1}", marlin[i]);
        CHECK_INT(parse_block(text), MOQ_OK);
        CHECK(p.q.marlin && claim("a").weight_bits == 4 && claim("a").group_size == MOQ_ALL);
        snprintf(text, sizeof text, "{%s, \"bits\": 8}", marlin[i]);
        FAILS(MOQ_E_UNSUPPORTED, "4 bits", parse_block(text));
    }
    FAILS(MOQ_E_UNSUPPORTED, "sym", parse_block("{\"quant_method\": \"gptq\", \"bits\": 4, \"sym\": false, \"checkpoint_format\": \"marlin\"}"));
    FAILS(MOQ_E_UNSUPPORTED, "desc_act", parse_block("{\"quant_method\": \"gptq\", \"bits\": 4, \"desc_act\": true, \"checkpoint_format\": \"marlin\"}"));
    FAILS(MOQ_E_UNSUPPORTED, "dynamic", parse_block("{\"quant_method\": \"gptq\", \"bits\": 4, \"dynamic\": {\".*up\": {}}, \"checkpoint_format\": \"marlin\"}"));
    FAILS(MOQ_E_UNSUPPORTED, "zero_point", parse_block("{\"quant_method\": \"awq\", \"bits\": 4, \"version\": \"marlin\"}"));
    FAILS(MOQ_E_UNSUPPORTED, "marlin_24", parse_block("{\"quant_method\": \"gptq\", \"bits\": 4, \"checkpoint_format\": \"marlin_24\"}"));
    CHECK_INT(parse_block("{\"quant_method\": \"gptq\", \"bits\": 4}"), MOQ_OK);
    CHECK(!p.q.marlin);
    FAILS(MOQ_E_UNSUPPORTED, "5 bits", parse_block("{\"quant_method\": \"gptq\", \"bits\": 5}"));
    FAILS(MOQ_E_CONFIG, "bits", parse_block("{\"quant_method\": \"gptq\"}"));
    FAILS(MOQ_E_CONFIG, "bits", parse_block("{\"quant_method\": \"gptq\", \"bits\": \"4\"}"));
    FAILS(MOQ_E_CONFIG, "group_size", parse_block("{\"quant_method\": \"gptq\", \"bits\": 4, \"group_size\": 0}"));
    FAILS(MOQ_E_CONFIG, "dynamic", parse_block("{\"quant_method\": \"gptq\", \"bits\": 4, \"dynamic\": []}"));
    FAILS(MOQ_E_UNSUPPORTED, "(?!x)", parse_block("{\"quant_method\": \"gptq\", \"bits\": 4, \"dynamic\": {\"-:(?!x)\": {}}}"));
}

/* ---- rules at size, allocation ---- */

/* Exclude lists of prefixes: the sorted list against a glob each. */
static void test_rules_prefixes_against_globs(void)
{
    static char text[65536];
    char patterns[40][24];
    int hits = 0;
    for (int round = 0; round < 200; round++) {
        int count = (int)(test_random() % 40), at = snprintf(text, sizeof text, "{\"quant_algo\": \"FP8\", \"exclude_modules\": [");
        for (int i = 0; i < count; i++) {
            int n = 0, parts = 1 + (int)(test_random() % 3);
            for (int k = 0; k < parts; k++) n += snprintf(patterns[i] + n, sizeof patterns[i] - (size_t)n, "%s%c%u", k ? "." : "", "ab"[test_random() % 2], (unsigned)(test_random() % 12));
            snprintf(patterns[i] + n, sizeof patterns[i] - (size_t)n, "%s", test_random() & 1 ? "*" : test_random() & 1 ? ".*" : "");
            at += snprintf(text + at, sizeof text - (size_t)at, "%s\"%s\"", i ? ", " : "", patterns[i]);
        }
        snprintf(text + at, sizeof text - (size_t)at, "]}");
        CHECK_INT(parse_nested(text), MOQ_OK);
        for (int k = 0; k < 200; k++) {
            char name[40];
            int want = 0;
            snprintf(name, sizeof name, "%c%u.%c%u.%c%u", "ab"[test_random() % 2], (unsigned)(test_random() % 12), "ab"[test_random() % 2], (unsigned)(test_random() % 12), "ab"[test_random() % 2], (unsigned)(test_random() % 12));
            for (int i = 0; i < count; i++) {
                size_t n = strlen(patterns[i]);
                want |= moq_glob_match(patterns[i], name) || (strncmp(name, patterns[i], n) == 0 && name[n] == '.'); /* a name covers what lies below */
            }
            hits += want;
            if (claim(name).excluded != want) { WRONG("rules and globs agree"); fprintf(stderr, "  %s in %s: %d\n", name, text, want); return; }
        }
    }
    CHECK(hits > 5000 && hits < 35000);
}

/* A file with thousands of patterns is refused before it costs memory or time. */
static void test_too_many_patterns(void)
{
    static char text[200000];
    for (int kind = 0; kind < 2; kind++) {
        int at = snprintf(text, sizeof text, kind ? "{\"quantization_config\": {\"quant_method\": \"compressed-tensors\", \"ignore\": [\"x\""
                                                  : "{\"quantization_config\": {\"quant_method\": \"modelopt\", \"quant_algo\": \"FP8\", \"ignore\": [\"x\"");
        for (int i = 0; i < 4097; i++) at += snprintf(text + at, sizeof text - (size_t)at, kind ? ", \"re:a%d.*\"" : ", \"a%d*b\"", i);
        snprintf(text + at, sizeof text - (size_t)at, "]}}");
        FAILS(MOQ_E_LIMIT, "at most 4096", parse(text, NULL, NULL));
    }
}

/* 60,000 modules, thousands of rules: claims must not be felt when a model opens. */
static void test_claims_are_cheap(void)
{
    enum { MODULES = 60000, LAYERS = 61 };
    static char text[1 << 20];
    static char names[MODULES][64];
    int at = snprintf(text, sizeof text, "{\"quantization\": {\"quant_algo\": \"NVFP4\", \"group_size\": 16, \"exclude_modules\": [\"lm_head\"");
    for (int i = 0; i < LAYERS; i++) at += snprintf(text + at, sizeof text - (size_t)at, ", \"model.layers.%d.self_attn*\", \"model.layers.%d.mlp.gate\"", i, i);
    snprintf(text + at, sizeof text - (size_t)at, "]}}");
    for (int i = 0; i < MODULES; i++) snprintf(names[i], sizeof names[i], "model.layers.%d.mlp.experts.%d.%s", i % LAYERS, i / LAYERS % 256, i & 1 ? "up_proj" : "down_proj");
    for (int ct = 0; ct < 2; ct++) {
        if (ct) {
            at = snprintf(text, sizeof text, "{\"quantization_config\": {\"quant_method\": \"compressed-tensors\", \"config_groups\": {\"NVFP4\": [\"re:.*mlp\\\\.experts\\\\.\\\\d+\\\\..*_proj$\"], \"FP8\": [\"Linear\"]}, \"ignore\": [\"re:.*lm_head\", \"re:visual.*\"");
            for (int i = 0; i < LAYERS * 64; i++) at += snprintf(text + at, sizeof text - (size_t)at, ", \"model.layers.%d.mlp.gate_%d\"", i % LAYERS, i);
            snprintf(text + at, sizeof text - (size_t)at, "]}}");
        }
        CHECK_INT(ct ? parse(text, NULL, NULL) : parse(NULL, text, NULL), MOQ_OK);
        double start = test_seconds();
        int known = 0;
        for (int i = 0; i < MODULES; i++) known += covers(names[i]);
        double seconds = test_seconds() - start;
        CHECK_INT(known, MODULES);
        if (getenv("TEST_VERBOSE")) fprintf(stderr, "60000 claims: %.1f ms\n", seconds * 1e3);
        CHECK(seconds < 3.0); /* generous: sanitizers and shared machines; plain -O2 takes a tenth of it */
    }
}

/* Every failing allocation is reported and nothing leaks. */
static void test_config_failing_allocations(void)
{
    static const char *const texts[][3] = {
        {"{\"quantization_config\": {\"quant_method\": \"compressed-tensors\", \"version\": \"0.20.0\", \"format\": \"pack-quantized\", \"config_groups\": {\"W4A16\": [\"re:.*a\", \"Linear\", \"b\"]}, \"ignore\": [\"re:x.*\", \"c\"],"
         "\"transform_config\": {\"config_groups\": {\"v\": {\"type\": \"hadamard\", \"head_dim\": 32, \"apply\": [{\"location\": \"input\", \"targets\": [\"Linear\"], \"ignore\": [\"q\"]}]}}}}}", NULL, NULL},
        {NULL, "{\"producer\": {\"name\": \"m\", \"version\": \"1\"}, \"quantization\": {\"quant_algo\": \"MIXED_PRECISION\", \"exclude_modules\": [\"a\", \"b*\", \"c*d\"], \"quantized_layers\": {\"x\": {\"quant_algo\": \"FP8\"}}}}", NULL},
        {NULL, "{\"quantization\": {\"quant_algo\": \"FP8\", \"exclude_modules\": [\"a\"]}}", NULL},
        {NULL, NULL, "{\"bits\": 4, \"modules_to_not_convert\": [\"z\"], \"dynamic\": {\"+:a\": {\"bits\": 8}}}"},
        {"{\"quantization_config\": {\"quant_method\": \"fp8\", \"moe_quant_algo\": \"NVFP4\"}}", NULL, NULL},
        {"{\"quantization_config\": {\"quant_method\": \"mxfp4\"}}", NULL, NULL},
        {"{\"quantization_config\": {\"quant_method\": \"awq\", \"bits\": 4}}", NULL, NULL}};
    drop();
    test_state.live_allocs = 0;
    for (size_t i = 0; i < MOQI_COUNT(texts); i++) {
        for (int forever = 0; forever < 2; forever++) {
            long k = 1;
            for (; k < 200; k++) {
                moq_result r;
                drop();
                test_state.fail_at = k;
                test_state.fail_forever = forever;
                r = parse(texts[i][0], texts[i][1], texts[i][2]); /* only the arena uses the failing allocator */
                int failed = test_state.fail_at <= (forever ? 1 : 0) && r != MOQ_OK;
                test_state.fail_at = 0;
                if (!failed && r == MOQ_OK) break;
                CHECK_INT(r, MOQ_E_NOMEM);
                CHECK_INT(p.err.code, MOQ_E_NOMEM);
            }
            CHECK(k > 1 && k < 200);
        }
    }
    drop();
    CHECK_INT(test_state.live_allocs, 0);
}

/* ---- golden folders ---- */

typedef struct golden {
    const char *folder;
    moq_family family;
    const char *algo;
    moq_kv_format kv;
    const char *module; /* one of its quantized modules ... */
    const char *claimed; /* ... and the claim: ModelOpt's algorithm, or the name of the scheme of its two codings */
} golden;

#define UP "model.layers.0.mlp.up_proj"
#define MO(name, algo, kv, module, claimed) {"modelopt/" name, MOQ_FAMILY_MODELOPT, algo, kv, module, claimed}
#define CT(name, format, claimed) {"compressed-tensors/" name, MOQ_FAMILY_COMPRESSED_TENSORS, format, MOQ_KV_WIDE, UP, claimed}
static const golden goldens[] = {
    MO("deepseek_v3-nvfp4", "NVFP4", MOQ_KV_WIDE, "model.layers.1.mlp.experts.3.up_proj", "NVFP4"),
    MO("gpt_oss-fp8", "FP8", MOQ_KV_WIDE, "model.layers.0.mlp.experts.gate_up_proj", "FP8"),
    MO("gpt_oss-mxfp4", "mxfp4", MOQ_KV_WIDE, "model.layers.0.mlp.experts.down_proj", "MXFP4"),
    MO("gpt_oss-nvfp4", "NVFP4", MOQ_KV_WIDE, "model.layers.0.self_attn.q_proj", "NVFP4"),
    MO("gpt_oss-nvfp4_mlp_only", "NVFP4", MOQ_KV_WIDE, "model.layers.0.mlp.experts.gate_up_proj", "NVFP4"),
    MO("llama-auto_grad_5.5", "MIXED_PRECISION", MOQ_KV_WIDE, "model.layers.0.mlp.down_proj", "FP8"),
    MO("llama-auto_kl_6.5", "MIXED_PRECISION", MOQ_KV_WIDE, UP, "FP8"),
    MO("llama-auto_kl_awq_8.0", "MIXED_PRECISION", MOQ_KV_WIDE, "model.layers.1.self_attn.o_proj", "W4A16_AWQ"),
    MO("llama-fp8", "FP8", MOQ_KV_WIDE, UP, "FP8"),
    MO("llama-fp8-kv_fp8", "FP8", MOQ_KV_FP8, UP, "FP8"),
    MO("llama-fp8_pb_wo", "fp8_pb_wo", MOQ_KV_WIDE, UP, "FP8_PB_WO"),
    MO("llama-fp8_pc_pt", "FP8_PER_CHANNEL_PER_TOKEN", MOQ_KV_WIDE, UP, "FP8_PER_CHANNEL_PER_TOKEN"),
    MO("llama-int4_awq", "W4A16_AWQ", MOQ_KV_WIDE, UP, "W4A16_AWQ"),
    MO("llama-int4_blockwise", "W4A16_AWQ", MOQ_KV_WIDE, UP, "W4A16_AWQ"),
    MO("llama-int8_sq", "W8A8_SQ_PER_CHANNEL", MOQ_KV_WIDE, UP, "W8A8_SQ_PER_CHANNEL"),
    MO("llama-int8_wo", "W8A16", MOQ_KV_WIDE, UP, "W8A16"),
    MO("llama-mxfp4", "mxfp4", MOQ_KV_WIDE, UP, "MXFP4"),
    MO("llama-mxfp4_mlp_weight_only", "mxfp4", MOQ_KV_WIDE, UP, "MXFP4"),
    MO("llama-mxfp8", "MXFP8", MOQ_KV_WIDE, UP, "MXFP8"),
    MO("llama-none-kv_fp8", "MIXED_PRECISION", MOQ_KV_FP8, "model.embed_tokens", "W8A16"),
    MO("llama-nvfp4", "NVFP4", MOQ_KV_WIDE, UP, "NVFP4"),
    MO("llama-nvfp4-kv_fp8", "NVFP4", MOQ_KV_FP8, UP, "NVFP4"),
    MO("llama-nvfp4-kv_fp8_affine", "NVFP4", MOQ_KV_FP8, UP, "NVFP4"),
    MO("llama-nvfp4-kv_nvfp4", "NVFP4", MOQ_KV_NVFP4, UP, "NVFP4"),
    MO("llama-nvfp4-kv_nvfp4_affine", "NVFP4", MOQ_KV_NVFP4_AFFINE, UP, "NVFP4"),
    MO("llama-nvfp4-kv_nvfp4_rotate", "NVFP4", MOQ_KV_NVFP4, UP, "NVFP4"),
    MO("llama-nvfp4_act_headroom-kv_fp8_cast", "NVFP4", MOQ_KV_FP8, UP, "NVFP4"),
    MO("llama-nvfp4_awq_clip", "NVFP4", MOQ_KV_WIDE, UP, "NVFP4"),
    MO("llama-nvfp4_awq_full", "NVFP4_AWQ", MOQ_KV_WIDE, UP, "NVFP4_AWQ"),
    MO("llama-nvfp4_awq_lite", "NVFP4_AWQ", MOQ_KV_WIDE, UP, "NVFP4_AWQ"),
    MO("llama-nvfp4_default-kv_nvfp4_cast", "NVFP4", MOQ_KV_NVFP4, UP, "NVFP4"),
    MO("llama-nvfp4_four_over_six", "NVFP4", MOQ_KV_WIDE, UP, "NVFP4"),
    MO("llama-nvfp4_local_hessian", "NVFP4", MOQ_KV_WIDE, UP, "NVFP4"),
    MO("llama-nvfp4_mlp_weight_only", "W4A16_NVFP4", MOQ_KV_WIDE, UP, "W4A16_NVFP4"),
    MO("llama-nvfp4_mse_sweep", "NVFP4", MOQ_KV_WIDE, UP, "NVFP4"),
    MO("llama-nvfp4_omlp_only", "NVFP4", MOQ_KV_WIDE, "model.layers.0.self_attn.o_proj", "NVFP4"),
    MO("llama-nvfp4_svdquant", "NVFP4_SVD", MOQ_KV_WIDE, UP, "NVFP4_SVD"),
    MO("llama-w4a16_nvfp4", "W4A16_NVFP4", MOQ_KV_WIDE, UP, "W4A16_NVFP4"),
    MO("llama-w4a8_awq", "W4A8_AWQ", MOQ_KV_WIDE, UP, "W4A8_AWQ"),
    MO("llama-w4a8_mxfp4_fp8", "W4A8_MXFP4_FP8", MOQ_KV_WIDE, UP, "W4A8_MXFP4_FP8"),
    MO("llama-w4a8_nvfp4_fp8", "W4A8_NVFP4_FP8", MOQ_KV_WIDE, UP, "W4A8_NVFP4_FP8"),
    MO("mixtral-nvfp4", "NVFP4", MOQ_KV_WIDE, "model.layers.0.block_sparse_moe.experts.0.w1", "NVFP4"),
    MO("nemotron_h-mamba_fp8_aggressive", "FP8", MOQ_KV_WIDE, "backbone.layers.1.mixer.experts.0.up_proj", "FP8"),
    MO("nemotron_h-mamba_nvfp4_aggressive", "NVFP4", MOQ_KV_WIDE, "backbone.layers.1.mixer.experts.0.up_proj", "NVFP4"),
    MO("qwen2-int4_awq", "W4A16_AWQ", MOQ_KV_WIDE, UP, "W4A16_AWQ"),
    MO("qwen2-int8_sq", "W8A8_SQ_PER_CHANNEL", MOQ_KV_WIDE, UP, "W8A8_SQ_PER_CHANNEL"),
    MO("qwen2-nvfp4", "NVFP4", MOQ_KV_WIDE, UP, "NVFP4"),
    MO("qwen3-nvfp4", "NVFP4", MOQ_KV_WIDE, UP, "NVFP4"),
    MO("qwen3-nvfp4_awq_lite", "NVFP4_AWQ", MOQ_KV_WIDE, UP, "NVFP4_AWQ"),
    MO("qwen3_moe-auto_grad_5.5", "MIXED_PRECISION", MOQ_KV_WIDE, "lm_head", "FP8"),
    MO("qwen3_moe-auto_kl_awq_8.0", "MIXED_PRECISION", MOQ_KV_WIDE, "model.layers.0.mlp.experts.2.up_proj", "FP8"),
    MO("qwen3_moe-fp8", "FP8", MOQ_KV_WIDE, "model.layers.0.mlp.experts.0.up_proj", "FP8"),
    MO("qwen3_moe-int8_sq", "W8A8_SQ_PER_CHANNEL", MOQ_KV_WIDE, "model.layers.0.mlp.experts.0.up_proj", "W8A8_SQ_PER_CHANNEL"),
    MO("qwen3_moe-mxfp8", "MXFP8", MOQ_KV_WIDE, "model.layers.0.mlp.experts.0.up_proj", "MXFP8"),
    MO("qwen3_moe-nvfp4", "NVFP4", MOQ_KV_WIDE, "model.layers.0.mlp.experts.0.up_proj", "NVFP4"),
    MO("qwen3_moe-nvfp4_experts_only_mse-kv_fp8_cast", "NVFP4", MOQ_KV_FP8, "model.layers.0.mlp.experts.0.up_proj", "NVFP4"),
    MO("qwen3_moe-w4a8_mxfp4_fp8", "W4A8_MXFP4_FP8", MOQ_KV_WIDE, "model.layers.0.mlp.experts.0.up_proj", "W4A8_MXFP4_FP8"),
    CT("llama-fp8-block", "float-quantized", "fp8_block128"),
    CT("llama-fp8-dynamic", "float-quantized", "fp8_pc_pt"),
    {"compressed-tensors/llama-fp8-kv", MOQ_FAMILY_COMPRESSED_TENSORS, "float-quantized", MOQ_KV_FP8, UP, "fp8_pc_pt"},
    CT("llama-fp8-static", "float-quantized", "fp8"),
    CT("llama-hadamard-w4a16-g32", "pack-quantized", "int4_g32"),
    CT("llama-mixed-nvfp4-fp8", "mixed-precision", "nvfp4"),
    CT("llama-mxfp4", "mxfp4-pack-quantized", "mxfp4_arule2"),
    CT("llama-mxfp4a16", "mxfp4-pack-quantized", "w4a16_mxfp4"),
    CT("llama-mxfp8", "mxfp8-quantized", "mxfp8_arule2"),
    CT("llama-naive-fp8a16", "naive-quantized", "w8a16_fp8_pc"),
    CT("llama-nvfp4", "nvfp4-pack-quantized", "nvfp4"),
    CT("llama-nvfp4a16", "nvfp4-pack-quantized", "w4a16_nvfp4"),
    CT("llama-w4a16-channel-sym", "pack-quantized", "int4_pc"),
    CT("llama-w4a16-g128-sym", "pack-quantized", "int4_g128"),
    CT("llama-w4a16-g32-actorder", "pack-quantized", "int4_g32"),
    CT("llama-w4a16-g32-asym", "pack-quantized", "int4_g32_zp"),
    CT("llama-w4a8-int", "int-quantized", "w4a8_int4_g128"),
    CT("llama-w4afp8-packed", "pack-quantized", "w4a8_int4_fp8_g128"),
    CT("llama-w8a16-channel", "pack-quantized", "w8a16"),
    CT("llama-w8a16-g128", "pack-quantized", "w8a16_g128"),
    CT("llama-w8a8-int8-dynamic", "int-quantized", "int8_pc_pt"),
    CT("llama-w8a8-int8-static", "int-quantized", "int8"),
    CT("llama-w8a8-int8-static-asym", "int-quantized", "int8_pt_azp"),
    {"compressed-tensors/mixtral-nvfp4", MOQ_FAMILY_COMPRESSED_TENSORS, "nvfp4-pack-quantized", MOQ_KV_WIDE, "model.layers.0.block_sparse_moe.experts.0.w1", "nvfp4"},
    {"compressed-tensors/mixtral-w4a16", MOQ_FAMILY_COMPRESSED_TENSORS, "pack-quantized", MOQ_KV_WIDE, "model.layers.0.block_sparse_moe.experts.0.w1", "int4_g128"},
    {"foreign/deepseek_v3-fp8-block", MOQ_FAMILY_FP8_BLOCK, "fp8", MOQ_KV_WIDE, "model.layers.1.mlp.experts.3.up_proj", "fp8_block128"},
    {"foreign/gpt_oss-mxfp4", MOQ_FAMILY_GPT_OSS, "mxfp4", MOQ_KV_WIDE, "model.layers.0.mlp.experts.gate_up_proj", "w4a16_mxfp4"},
    {"foreign/llama-awq-g128", MOQ_FAMILY_AWQ, "awq", MOQ_KV_WIDE, UP, "int4_g128_sf16_zp"},
    {"foreign/llama-gptq-int4-g128-sym", MOQ_FAMILY_GPTQ, "gptq", MOQ_KV_WIDE, UP, "int4_g128_sf16"},
    {"foreign/llama-gptq-int4-g32-descact", MOQ_FAMILY_GPTQ, "gptq", MOQ_KV_WIDE, UP, "int4_g32_sf16"},
    {"foreign/qwen2-awq-g64", MOQ_FAMILY_AWQ, "awq", MOQ_KV_WIDE, UP, "int4_g64_sf16_zp"},
    {"foreign/qwen2-gptq-int8-g128", MOQ_FAMILY_GPTQ, "gptq", MOQ_KV_WIDE, UP, "w8a16_g128_sf16"}};

/* A file of a golden folder as text; NULL: not there. */
static char *slurp(const char *folder, const char *name, size_t *bytes)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s/%s", GOLDEN_DIR, folder, name);
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    *bytes = (size_t)ftell(f);
    rewind(f);
    char *text = (char *)malloc(*bytes + 1);
    if (!text || fread(text, 1, *bytes, f) != *bytes) exit(2);
    text[*bytes] = 0;
    fclose(f);
    return text;
}

/* The claims against the tensors: every weight that expected.json lists is claimed; every other matrix is not, except routers and heads that a
   family leaves plain without saying so. */
static void check_golden_claims(const golden *g)
{
    size_t n, m;
    moq_error err;
    char *expected = slurp(g->folder, "expected.json", &n), *file = slurp(g->folder, "model.safetensors", &m);
    CHECK(expected && file);
    if (!expected || !file) return;
    moq_json_doc *doc = moq_json_parse(expected, n, MOQ_JSON_CONFIG, 0, "expected.json", NULL, &err);
    moq_json_doc *head = moq_json_parse(file + 8, (size_t)moqi_load_u64(file), MOQ_JSON_STRICT, 0, "header", NULL, &err);
    const moq_json *quantized = moq_json_find(moq_json_root(doc), "tensors"), *tensors = moq_json_root(head);
    int claimed = 0, plain = 0;
    for (const moq_json *t = moq_json_first(quantized); t; t = moq_json_next(quantized, t)) {
        char name[256];
        snprintf(name, sizeof name, "%s", t->key);
        if (strchr(name, '[')) continue; /* one expert of a stack */
        if (moqi_ends(name, ".weight")) name[strlen(name) - 7] = 0;
        claimed++;
        if (!covers(name)) { WRONG("a quantized weight is claimed"); fprintf(stderr, "  %s: %s\n", g->folder, name); }
    }
    for (const moq_json *t = moq_json_first(tensors); t; t = moq_json_next(tensors, t)) {
        char name[256];
        const moq_json *shape = moq_json_find(t, "shape"), *dtype = moq_json_find(t, "dtype");
        if (!shape || shape->count < 2 || !moqi_ends(t->key, ".weight") || strstr(t->key, "_input.weight") || strcmp(t->key, "model.layers.1.mlp.gate.weight") == 0) continue;
        if ((!moq_json_is(dtype, "BF16") && !moq_json_is(dtype, "F16")) || moq_json_find(quantized, t->key)) continue;
        snprintf(name, sizeof name, "%.*s", (int)strlen(t->key) - 7, t->key);
        if (strcmp(name, "backbone.embedding") == 0) continue; /* its list says "backbone.embeddings" */
        plain++;
        if (covers(name)) { WRONG("a plain weight is not claimed"); fprintf(stderr, "  %s: %s\n", g->folder, name); }
    }
    CHECK(claimed > 0 && (plain > 0 || strcmp(g->folder, "modelopt/llama-none-kv_fp8") == 0 || strstr(g->folder, "gemma")));
    moq_json_destroy(doc);
    moq_json_destroy(head);
    free(expected);
    free(file);
}

static void test_config_golden(void)
{
    int found = 0;
    for (size_t i = 0; i < MOQI_COUNT(goldens); i++) {
        const golden *g = &goldens[i];
        size_t n;
        char *config = slurp(g->folder, "config.json", &n), *hf = slurp(g->folder, "hf_quant_config.json", &n), *gptq = slurp(g->folder, "quantize_config.json", &n);
        if (!config) { test_state.skipped++; continue; } /* the repository holds a part of the set; the closing line counts the rest */
        found++;
        for (int files = 0; files < 3; files++) { /* all files; config.json alone; the tool's own file alone */
            if (files == 2 && !hf && !gptq) continue;
            CHECK_INT(parse(files < 2 ? config : NULL, files == 1 ? NULL : hf, files == 1 ? NULL : gptq), MOQ_OK);
            if (p.result != MOQ_OK) { fprintf(stderr, "  %s: %s\n", g->folder, p.err.text); break; }
            moqi_claim c = claim(g->module);
            CHECK_INT(p.findings, 0);
            CHECK_INT(p.q.family, g->family);
            CHECK_STR(p.q.algo, g->algo);
            CHECK_INT(p.q.kv, g->kv);
            if (g->family == MOQ_FAMILY_MODELOPT) CHECK_STR(c.algo, g->claimed);
            else {
                moq_scheme s;
                char name[160];
                memset(&s, 0, sizeof s);
                s.weight = c.weight;
                s.input = c.input;
                moq_scheme_name(&s, name, sizeof name);
                CHECK(c.has_coding);
                CHECK_STR(name, g->claimed);
            }
            CHECK_INT(c.act_order, strstr(g->folder, "actorder") || strstr(g->folder, "descact"));
            CHECK_INT(c.hadamard_size, strstr(g->folder, "hadamard") ? 32 : 0);
            check_golden_claims(g);
        }
        free(config);
        free(hf);
        free(gptq);
    }
    CHECK(found >= 10);
    if (getenv("TEST_VERBOSE")) fprintf(stderr, "%d golden folders\n", found);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_glob_against_brute_force);
    RUN(test_glob_table);
    RUN(test_glob_long_patterns_are_fast);
    RUN(test_regex_table);
    RUN(test_regex_against_tree_walk);
    RUN(test_modelopt_algorithms);
    RUN(test_modelopt_flat);
    RUN(test_modelopt_mixed);
    RUN(test_modelopt_damaged_names);
    RUN(test_modelopt_outer_names);
    RUN(test_config_k_rows);
    RUN(test_config_misspelled_keys);
    RUN(test_slips);
    RUN(test_config_kv);
    RUN(test_ct_arguments);
    RUN(test_ct_refusals);
    RUN(test_ct_targets);
    RUN(test_ct_old_packing);
    RUN(test_ct_transforms);
    RUN(test_gpt_oss);
    RUN(test_fp8_blocks);
    RUN(test_awq);
    RUN(test_gptq);
    RUN(test_rules_prefixes_against_globs);
    RUN(test_too_many_patterns);
    RUN(test_claims_are_cheap);
    RUN(test_config_failing_allocations);
    RUN(test_config_golden);
    drop();
    return test_end();
}
