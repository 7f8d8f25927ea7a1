/* test_base.c - results, messages, checked arithmetic, memory, arena, buffer, map, sort. */
#include "test.h"

static void test_base_results(void)
{
    CHECK_STR(moq_result_name(MOQ_OK), "MOQ_OK");
    CHECK_STR(moq_result_name(MOQ_E_STATE), "MOQ_E_STATE");
    CHECK_STR(moq_result_name((moq_result)5), "?");
    CHECK_STR(moq_result_text((moq_result)-29), "?");
    CHECK_INT(MOQ_E_ARG, -1);
    CHECK_INT(MOQ_E_STATE, -28);
    int count = 0;
#define MOQ_X(name, value, text) \
    CHECK_STR(moq_result_name(MOQ_##name), "MOQ_" #name); \
    CHECK_STR(moq_result_text(MOQ_##name), text); \
    CHECK_INT(MOQ_##name, -count); \
    count++;
    MOQ_RESULTS(MOQ_X)
#undef MOQ_X
    CHECK_INT(count, 29);
}

static void test_base_checked_arithmetic(void)
{
    static const uint64_t edge[] = {0, 1, 2, 3, 5, 7, 255, 65535, 65536, 4294967295u, 4294967296u, 4294967297u, (uint64_t)1 << 62, (uint64_t)1 << 63, UINT64_MAX / 3, UINT64_MAX / 2, UINT64_MAX - 1, UINT64_MAX};
    for (size_t i = 0; i < MOQI_COUNT(edge); i++)
        for (size_t j = 0; j < MOQI_COUNT(edge); j++) {
            uint64_t a = edge[i], b = edge[j], out = 42;
            /* The oracle: 128-bit sum and product from 32-bit halves, kept as carry and low part. */
            uint64_t a0 = a & 0xffffffffu, a1 = a >> 32, b0 = b & 0xffffffffu, b1 = b >> 32;
            uint64_t mid = a1 * b0 + (a0 * b0 >> 32), mid2 = a0 * b1 + (mid & 0xffffffffu), high = a1 * b1 + (mid >> 32) + (mid2 >> 32);
            CHECK_INT(moqi_mul(a, b, &out), high == 0);
            CHECK(out == (high ? 42 : a * b));
            out = 42;
            int carry = a + b < a;
            CHECK_INT(moqi_add(a, b, &out), !carry);
            CHECK(out == (carry ? 42 : a + b));
        }
    CHECK(moqi_ceil_div(0, 16) == 0 && moqi_ceil_div(1, 16) == 1 && moqi_ceil_div(16, 16) == 1 && moqi_ceil_div(17, 16) == 2);
    CHECK(moqi_min(-1, 2) == -1 && moqi_max(-1, 2) == 2);
    static const uint8_t bytes[] = {0xff, 1, 2, 3, 4, 5, 6, 7, 0x88};
    CHECK(moqi_load_u32(bytes + 1) == 0x04030201u && moqi_load_u64(bytes + 1) == 0x8807060504030201u);
}

/* ---- formatting, against the C library's own ---- */

#define CHECK_FORMAT(...) \
    do { \
        char mine_[200], theirs_[200]; \
        int want_ = snprintf(theirs_, sizeof theirs_, __VA_ARGS__); \
        CHECK_INT(moqi_format(mine_, sizeof mine_, __VA_ARGS__), want_); \
        CHECK_STR(mine_, theirs_); \
    } while (0)

static void test_base_format_integers(void)
{
    static const long long v[] = {0, 1, -1, 7, -10, 99, 100, 12345678, -12345678, 2147483647, -2147483647 - 1, INT64_MAX, INT64_MIN};
    for (size_t i = 0; i < MOQI_COUNT(v); i++) {
        CHECK_FORMAT("%lld|%5lld|%05lld|%20lld|%020lld", v[i], v[i], v[i], v[i], v[i]);
        CHECK_FORMAT("%llu %llx %016llx", (unsigned long long)v[i], (unsigned long long)v[i], (unsigned long long)v[i]);
        CHECK_FORMAT("%d %i %u %x %02x", (int)v[i], (int)v[i], (unsigned)v[i], (unsigned)v[i], (unsigned)v[i] & 255);
        CHECK_FORMAT("%ld %lu %zu", (long)v[i], (unsigned long)v[i], (size_t)v[i]);
    }
    CHECK_FORMAT("%c%c %% %s %.3s %.*s|", 'a', '~', "text", "abcdef", 2, "xyz");
}

static void test_base_format_doubles(void)
{
    static const double v[] = {0, 1, -1, 0.5, 1.5, 3.25, 100, 1234.5, 0.001, 0.0001, 0.00001, 123456, 1234567, 1e10, 6.25e-8, 999999.5, 448, 57344, 0.1, -2.75, 1e100, 1e-40};
    for (size_t i = 0; i < MOQI_COUNT(v); i++) {
        CHECK_FORMAT("%g", v[i]);
        if (v[i] < 1e18) { CHECK_FORMAT("%f|%.1f|%.3f", v[i], v[i] + 0.01, v[i]); }
    }
    char text[64];
    double zero = 0, huge = 1e300;
    moqi_format(text, sizeof text, "%g %g %g", huge * huge, -huge * huge, -zero);
    CHECK_STR(text, "inf -inf -0");
}

static void test_base_format_never_passes_the_end(void)
{
    for (size_t cap = 0; cap < 40; cap++) {
        char *text = (char *)test_copy("########################################", 40);
        size_t need = moqi_format(text, cap, "%s-%d-%g-%q", "abc", -12345, 1.5, "q\x01\xff");
        CHECK_INT(need, 3 + 1 + 6 + 1 + 3 + 1 + 9);
        for (size_t i = cap; i < 40; i++) CHECK(text[i] == '#');
        if (cap > 0) {
            CHECK(strlen(text) == (need < cap ? need : cap - 1));
            CHECK(strncmp(text, "abc--12345-1.5-q\\x01\\xff", strlen(text)) == 0);
        }
        free(text);
    }
    char cut[400], name[300];
    memset(name, 'n', sizeof name);
    name[sizeof name - 1] = 0;
    moqi_format(cut, sizeof cut, "%q", name);
    CHECK_INT(strlen(cut), 123);
    CHECK_STR(cut + 120, "...");
}

static void test_base_errors(void)
{
    moq_error err;
    CHECK_INT(moqi_fail(&err, MOQ_E_SHAPE, moqi_at("model.safetensors", "tensor", "a\nb", 77), "has %d dimensions", 3), MOQ_E_SHAPE);
    CHECK_INT(err.code, MOQ_E_SHAPE);
    CHECK_INT(err.offset, 77);
    CHECK_INT(err.os_code, 0);
    CHECK_STR(err.file, "model.safetensors");
    CHECK_STR(err.object, "a\\x0ab");
    CHECK_STR(err.text, "model.safetensors: tensor 'a\\x0ab': has 3 dimensions");
    CHECK_INT(moq_fail(&err, MOQ_E_CONFIG, "layer 3", "%s is %g", "eps", 0.5), MOQ_E_CONFIG);
    CHECK_STR(err.text, "layer 3: eps is 0.5");
    CHECK_INT(err.offset, -1);
    CHECK_INT(moq_fail(&err, MOQ_E_CONFIG, NULL, "plain"), MOQ_E_CONFIG);
    CHECK_STR(err.text, "plain");
    CHECK_INT(moq_fail(NULL, MOQ_E_ARG, "x", "y"), MOQ_E_ARG);
    /* Names of any length and content: never past the arrays, always terminated, always printable. */
    char name[2000];
    for (int turn = 0; turn < 200; turn++) {
        size_t n = (size_t)turn * 10;
        for (size_t i = 0; i < n; i++) name[i] = (char)(1 + test_random() % 255);
        name[n] = 0;
        memset(&err, 0x7f, sizeof err);
        moqi_fail(&err, MOQ_E_IO, moqi_at(name, "key", name, -1), "%s", "what");
        CHECK(memchr(err.file, 0, sizeof err.file) && memchr(err.object, 0, sizeof err.object) && memchr(err.text, 0, sizeof err.text));
        for (const char *p = err.text; *p; p++) CHECK(*p >= 0x20 && *p < 0x7f);
        for (const char *p = err.object; *p; p++) CHECK(*p >= 0x20 && *p < 0x7f);
    }
}

/* ---- memory ---- */

static void test_base_allocate(void)
{
    moq_allocator a = test_allocator();
    for (int own = 0; own < 2; own++) {
        uint8_t *block[100];
        size_t size[100];
        for (size_t i = 0; i < 100; i++) {
            size[i] = i * i * 7 % 5000;
            block[i] = (uint8_t *)moq_allocate(own ? &a : NULL, size[i]);
            CHECK(block[i] && ((uintptr_t)block[i] & 63) == 0);
            for (size_t k = 0; k < size[i]; k++) CHECK(block[i][k] == 0);
            memset(block[i], 0xaa, size[i]);
        }
        CHECK_INT(test_state.live_allocs, own ? 100 : 0);
        for (size_t i = 0; i < 100; i++) moq_release(own ? &a : NULL, block[i], size[i]);
        CHECK_INT(test_state.live_allocs, 0);
    }
    CHECK(moq_allocate(NULL, SIZE_MAX) == NULL && moq_allocate(NULL, SIZE_MAX - 70) == NULL);
    /* zeros too where the memory was somebody's before: below and above the sizes from which a C library asks the system for each */
    for (int turn = 0; turn < 3; turn++)
        for (size_t n = 1000; n < (size_t)48 << 20; n = n * 3 + 5) {
            uint8_t *p = (uint8_t *)moq_allocate(NULL, n);
            CHECK(p && p[0] == 0 && memcmp(p, p + 1, n - 1) == 0);
            if (p) memset(p, 0x55, n);
            moq_release(NULL, p, n);
        }
    moq_release(NULL, NULL, 5);
    moq_release(&a, NULL, 5);
    moq_allocator zero;
    memset(&zero, 0, sizeof zero);
    void *p = moq_allocate(&zero, 10);
    CHECK(p != NULL);
    moq_release(&zero, p, 10);
}

static void test_base_arena(void)
{
    moq_allocator a = test_allocator();
    moqi_arena r = moqi_arena_make(&a);
    static struct { uint8_t *p; size_t n; } taken[2000];
    for (size_t i = 0; i < 2000; i++) {
        size_t align = (size_t)1 << (test_random() % 7);
        taken[i].n = i % 97 == 0 ? 20000 : test_random() % 200;
        taken[i].p = (uint8_t *)moqi_take(&r, taken[i].n, align);
        CHECK(taken[i].p && ((uintptr_t)taken[i].p & (align - 1)) == 0);
        for (size_t k = 0; k < taken[i].n; k++) CHECK(taken[i].p[k] == 0);
        memset(taken[i].p, (int)(i & 255), taken[i].n);
    }
    for (size_t i = 0; i < 2000; i++) /* nobody overlaps anybody */
        for (size_t k = 0; k < taken[i].n; k++) CHECK(taken[i].p[k] == (i & 255));
    CHECK(test_state.live_allocs < 60);
    CHECK_STR(moqi_take_text(&r, "hello world", 5), "hello");
    CHECK(moqi_take(&r, UINT64_MAX, 8) == NULL && moqi_take_array(&r, (uint64_t)1 << 62, 16) == NULL && moqi_take_array(&r, (uint64_t)1 << 61, 8) == NULL);
    test_state.fail_at = 1;
    CHECK(moqi_take(&r, 5000000, 8) == NULL);
    CHECK(moqi_take(&r, 8, 8) != NULL); /* still usable */
    moqi_arena_drop(&r);
    CHECK_INT(test_state.live_allocs, 0);
    moqi_arena_drop(&r);
}

static void test_base_buffer(void)
{
    moq_allocator a = test_allocator();
    moqi_buffer b;
    memset(&b, 0, sizeof b);
    b.a = a;
    size_t n = 0;
    for (int i = 0; i < 3000; i++) {
        uint8_t piece[40];
        size_t len = test_random() % 40;
        for (size_t k = 0; k < len; k++) piece[k] = (uint8_t)((n + k) * 31);
        CHECK(moqi_buffer_add(&b, piece, len));
        n += len;
    }
    CHECK_INT(b.bytes, n);
    for (size_t i = 0; i < n; i++) CHECK(b.data[i] == (uint8_t)(i * 31));
    CHECK(moqi_buffer_room(&b, SIZE_MAX / 2) == NULL);
    test_state.fail_at = 1;
    CHECK(!moqi_buffer_add(&b, b.data, b.capacity) && b.bytes == n);
    moqi_buffer_drop(&b);
    CHECK_INT(test_state.live_allocs, 0);
    moqi_buffer_drop(&b);
}

/* ---- map and sort ---- */

static void test_base_map(void)
{
    enum { N = 20000 };
    moq_allocator a = test_allocator();
    moqi_arena r = moqi_arena_make(&a);
    moqi_map m;
    memset(&m, 0, sizeof m);
    CHECK(moqi_map_find(&m, "x", 1) == NULL);
    CHECK(moqi_map_make(&m, &r, N));
    char *names = (char *)malloc((size_t)N * 64);
    for (uint32_t i = 0; i < N; i++) {
        char *s = names + (size_t)i * 64;
        /* same length, differing in one place only, or prefixes of each other */
        if (i % 2) snprintf(s, 64, "model.layers.%05u.self_attn.q_proj.weight", (unsigned)i);
        else snprintf(s, 64, "%0*u", (int)(1 + i % 50), (unsigned)i);
        if (strlen(s) > 40 && i % 2 == 0) s[0] = 'p';
        CHECK((moqi_map_add(&m, s, strlen(s), i) == NULL) || i % 2 == 0);
    }
    for (uint32_t i = 1; i < N; i += 2) {
        const char *s = names + (size_t)i * 64;
        const moqi_entry *e = moqi_map_find(&m, s, strlen(s));
        CHECK(e && e->value == i && e->bytes == strlen(s));
        CHECK(moqi_map_add(&m, s, strlen(s), 7) == e && e->value == i);
        CHECK(moqi_map_find(&m, s, strlen(s) - 1) == NULL);
    }
    CHECK(moqi_map_find(&m, "", 0) == NULL && moqi_map_add(&m, "", 0, 5) == NULL && moqi_map_find(&m, "", 0)->value == 5);
    CHECK(moqi_map_add(&m, "a\0b", 3, 1) == NULL && moqi_map_add(&m, "a\0c", 3, 2) == NULL && moqi_map_find(&m, "a", 1) == NULL && moqi_map_find(&m, "a\0c", 3)->value == 2);
    free(names);
    moqi_arena_drop(&r);
    r = moqi_arena_make(&a);
    test_state.fail_at = 1;
    CHECK(!moqi_map_make(&m, &r, 100) && moqi_map_find(&m, "x", 1) == NULL);
    moqi_arena_drop(&r);
    CHECK_INT(test_state.live_allocs, 0);
}

static void test_base_hash_spreads(void)
{
    /* Names as they occur, into 2^16 places: no place may be crowded as by a weak hash. */
    static uint16_t place[65536];
    memset(place, 0, sizeof place);
    unsigned worst = 0;
    char s[100];
    for (unsigned i = 0; i < 65536; i++) {
        snprintf(s, sizeof s, "model.layers.%u.mlp.experts.%u.down_proj.weight_scale", i >> 8, i & 255);
        uint16_t *p = &place[moqi_hash(7, s, strlen(s)) & 65535];
        if (++*p > worst) worst = *p;
    }
    CHECK(worst <= 12);
    /* All keys of one and two bytes differ, NUL aside: names have none. */
    static uint64_t seen[65536 + 256 + 1];
    size_t n = 0;
    for (unsigned v = 0; v < 65536; v++) {
        char k[2] = {(char)(v >> 8), (char)(v & 255)};
        if ((v & 255) != 0 && v >> 8 != 0) seen[n++] = moqi_hash(7, k, 2);
        if (v > 0 && v < 256) seen[n++] = moqi_hash(7, k + 1, 1);
    }
    for (size_t gap = n / 2; gap > 0; gap /= 2) /* shell sort */
        for (size_t i = gap; i < n; i++)
            for (size_t j = i; j >= gap && seen[j - gap] > seen[j]; j -= gap) {
                uint64_t t = seen[j];
                seen[j] = seen[j - gap];
                seen[j - gap] = t;
            }
    CHECK_INT(n, 255 * 255 + 255);
    for (size_t i = 1; i < n; i++) CHECK(seen[i] != seen[i - 1]);
}

typedef struct pair { uint32_t key, order; } pair;
static long comparisons;

static int compare_pairs(const void *a, const void *b)
{
    const pair *x = (const pair *)a, *y = (const pair *)b;
    comparisons++;
    return x->key < y->key ? -1 : x->key > y->key;
}

static void test_base_sort(void)
{
    enum { N = 3000 };
    static pair data[N];
    static const void *items[N], *scratch[N];
    for (size_t n = 0; n <= N; n = n < 70 ? n + 1 : n * 2 - 1)
        for (int kind = 0; kind < 4; kind++) {
            for (size_t i = 0; i < n; i++) {
                data[i].key = kind == 0 ? test_random() % 10 : kind == 1 ? test_random() : kind == 2 ? (uint32_t)i : (uint32_t)(n - i);
                data[i].order = (uint32_t)i;
                items[i] = &data[i];
            }
            comparisons = 0;
            moqi_sort(items, scratch, n, compare_pairs);
            uint64_t sum = 0;
            for (size_t i = 0; i < n; i++) {
                const pair *p = (const pair *)items[i], *q = i ? (const pair *)items[i - 1] : NULL;
                sum += p->order;
                CHECK(!q || q->key < p->key || (q->key == p->key && q->order < p->order)); /* stable */
            }
            CHECK(sum == (n ? (uint64_t)n * (n - 1) / 2 : 0));
            CHECK(comparisons <= (long)n * 13);
        }
}

static void test_base_text_helpers(void)
{
    CHECK(moqi_starts("weight_scale", "weight") && moqi_starts("a", "") && !moqi_starts("wei", "weight"));
    CHECK(moqi_ends("model.weight", ".weight") && moqi_ends("a", "") && !moqi_ends("ght", "weight") && !moqi_ends("weight_", "weight"));
    CHECK(moqi_same("NVFP4", "nvfp4") && moqi_same("", "") && !moqi_same("a", "ab") && !moqi_same("ab", "a") && !moqi_same("a", "b"));
    CHECK(moqi_lower('Z') == 'z' && moqi_lower('z') == 'z' && moqi_lower('[') == '[' && moqi_lower('@') == '@');
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_base_results);
    RUN(test_base_checked_arithmetic);
    RUN(test_base_format_integers);
    RUN(test_base_format_doubles);
    RUN(test_base_format_never_passes_the_end);
    RUN(test_base_errors);
    RUN(test_base_allocate);
    RUN(test_base_arena);
    RUN(test_base_buffer);
    RUN(test_base_map);
    RUN(test_base_hash_spreads);
    RUN(test_base_sort);
    RUN(test_base_text_helpers);
    return test_end();
}
