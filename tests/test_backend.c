/* The CPU function table: every kernel set against double, threads, memory, caches, experts. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* names of registers, for amx.h */
#endif
#include "test.h"
#include "layers.h"
#include "amx.h"

static moq_backend *backend_of(const char *kernel, moq_act act, int threads)
{
    moq_cpu_desc d;
    moq_error err;
    memset(&d, 0, sizeof d);
    d.kernel = kernel;
    d.act = act;
    d.threads = threads;
    d.allocator = test_allocator();
    moq_backend *be = moq_cpu_backend(&d, &err);
    if (!be) { fprintf(stderr, "%s\n", err.text); exit(2); }
    return be;
}

/* y = x W^T + lora + bias in double, from the numbers that enter the product. xr: inputs as rounded, xt: before rounding.
   bound: sum of |x w|, what float errors scale with. */
static double oracle_output(const layer *l, int64_t row, const float *xt, const float *xr, double *bound)
{
    const moq_linear *w = &l->w;
    double y = 0, rank = w->scheme.lora_rank;
    *bound = 1e-6;
    for (int64_t c = 0; c < w->cols; c++) {
        double v = l->exact[row * w->cols + c];
        if (w->requant_scale > 0) v = layer_nearest_e4m3(v / (double)w->requant_scale) * (double)w->requant_scale;
        y += v * (double)xr[c];
        *bound += fabs(v * (double)xr[c]);
    }
    for (int i = 0; w->lora_a.data && i < (int)rank; i++) {
        double mid = 0, size = 0, b = (double)((const float *)w->lora_b.data)[row * (int)rank + i];
        for (int64_t c = 0; c < w->cols; c++) {
            double t = (double)((const float *)w->lora_a.data)[i * w->cols + c] * (double)xt[c];
            mid += t;
            size += fabs(t);
        }
        y += mid * b;
        *bound += size * fabs(b);
    }
    if (w->bias.data) { double b = (double)((const float *)w->bias.data)[row]; y += b; *bound += fabs(b); }
    return y;
}

enum { WIDE, STORED, SHORT, SHORT_PAIRS }; /* SHORT: inputs in BF16. PAIRS: quantized weights may be, too */

static long check_linear(moq_backend *be, const layer *l, int how, int rows)
{
    const moq_linear *w = &l->w;
    moq_error err;
    long wrong = 0;
    float *x = (float *)malloc((size_t)(rows * w->cols) * 4), *y = (float *)malloc((size_t)(rows * w->rows) * 4);
    float *xt = (float *)malloc((size_t)w->cols * 4), *xr = (float *)malloc((size_t)w->cols * 4);
    for (int64_t i = 0; i < rows * w->cols; i++) x[i] = test_normal();
    moq_weight *p = be->prepare_linear(be, w, 1, &err);
    if (!p) { fprintf(stderr, "%s\n", err.text); return 1; }
    long before = test_state.total_allocs;
    be->linear(be, p, x, rows, y);
    CHECK_INT(test_state.total_allocs, before);
    for (int64_t i = 0; i < rows; i++) {
        memcpy(xt, x + i * w->cols, (size_t)w->cols * 4);
        for (int64_t c = 0; w->pre_quant_scale.data && c < w->cols; c++) xt[c] *= ((const float *)w->pre_quant_scale.data)[c];
        for (int64_t c = 0; how >= SHORT && c < w->cols; c++) xt[c] = moq_bf16_decode(moq_bf16_encode(xt[c]));
        if (how == STORED) moq_round_input(w, xt, xr);
        else memcpy(xr, xt, (size_t)w->cols * 4);
        for (int64_t r = 0; r < w->rows; r++) {
            double bound, want = oracle_output(l, r, xt, xr, &bound);
            wrong += !(fabs(want - (double)y[i * w->rows + r]) <= (how == SHORT_PAIRS && w->scheme.weight.scale != MOQ_NONE ? 1.0 / 255 : 2e-6) * bound);
        }
    }
    be->release_weight(be, p);
    free(x); free(y); free(xt); free(xr);
    return wrong;
}

/* Every storage format, odd shapes, several tiles of rows and columns. */
static void test_backend_formats(void)
{
    static const int shapes[6][3] = {{1, 1, 1}, {37, 200, 3}, {19, 1060, 1}, {130, 515, 6}, {67, 1100, 19}, {33, 192, 37}};
    for (int k = 0; moqi_get_kernels(k); k++) {
        moq_backend *be = backend_of(moqi_get_kernels(k)->name, MOQ_ACT_WIDE, 2);
        for (size_t i = 0; i < MOQI_COUNT(layer_formats); i++)
            for (int s = 0; s < 6; s++) {
                layer l;
                layer_make(&l, &layer_formats[i], shapes[s][0], shapes[s][1]);
                long wrong = check_linear(be, &l, 0, shapes[s][2]);
                if (wrong) fprintf(stderr, "%s, %s, [%d, %d]: %ld wrong\n", be->name, layer_formats[i].name, shapes[s][0], shapes[s][1], wrong);
                CHECK_INT(wrong, 0);
                layer_free(&l);
            }
        moq_backend_destroy(be);
        CHECK_INT(test_state.live_allocs, 0);
    }
}

/* Automatic activations: inputs may lose bits where the processor multiplies shorter numbers faster. Of layers whose inputs the checkpoint
   wants quantized 8 bits are left, with a scale for 32 columns at most, or 64 where it wants 4; of other quantized layers 16; of unquantized
   ones all. */
static long check_automatic(moq_backend *be, const layer *l, int rows, int *rounded)
{
    const moq_linear *w = &l->w;
    moq_error err;
    long wrong = 0;
    int bits = w->scheme.weight.scale == MOQ_NONE ? 32 : w->scheme.input.elem == MOQ_NONE ? 16 : 8;
    int64_t own = w->scheme.input.elem == MOQ_F4 ? 64 : 32;
    float *x = (float *)malloc((size_t)(rows * w->cols) * 4), *y = (float *)malloc((size_t)(rows * w->rows) * 4);
    for (int64_t i = 0; i < rows * w->cols; i++) x[i] = test_normal() * (i % 61 == 0 ? 20.0f : 1.0f);
    moq_weight *p = be->prepare_linear(be, w, 1, &err);
    if (!p) { fprintf(stderr, "%s\n", err.text); free(x); free(y); return 1; }
    be->linear(be, p, x, rows, y);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t r = 0; r < w->rows; r++) {
            const float *row = x + i * w->cols;
            double bound, want = oracle_output(l, r, row, row, &bound), allowed = 2e-6 * bound;
            *rounded += fabs(want - (double)y[i * w->rows + r]) > allowed;
            for (int64_t c = 0; bits < 32 && c < w->cols; c++) { /* BF16: half a step of 8 bits of x, and of the weight; 8 bits: half a step of the largest */
                double v = fabs(l->exact[r * w->cols + c]), most = 0;
                for (int64_t k = c / own * own; bits == 8 && k < c / own * own + own && k < w->cols; k++) most = fabs((double)row[k]) > most ? fabs((double)row[k]) : most;
                double eight = most / 254, sixteen = fabs((double)row[c]) / 128;
                allowed += v * 1.01 * (eight > sixteen ? eight : sixteen);
            }
            wrong += !(fabs(want - (double)y[i * w->rows + r]) <= allowed);
        }
    be->release_weight(be, p);
    free(x); free(y);
    return wrong;
}

/* Every storage format with any number of rows; -> how many results differ from wide ones, so that the caller sees rounding happen. */
static int automatic_formats(moq_backend *be, const char *name)
{
    static const int rows[] = {1, 2, 3, 4, 5, 7, 8, 13, 33, 50};
    moq_error err;
    int rounded = 0;
    CHECK(be->reserve(be, 64, &err) == MOQ_OK);
    for (size_t i = 0; i < MOQI_COUNT(layer_formats); i++)
        for (size_t m = 0; m < MOQI_COUNT(rows); m++) {
            layer l;
            layer_make(&l, &layer_formats[i], m % 3 ? 45 : 16, m % 2 ? 576 : 290);
            if (m % 2 && l.w.scheme.weight.scale != MOQ_NONE) { l.w.scheme.input = input_formats[0].c; l.w.input_scale = 0.1f; }
            long wrong = check_automatic(be, &l, rows[m], &rounded);
            if (wrong) fprintf(stderr, "%s, %s, %d rows: %ld wrong\n", name, layer_formats[i].name, rows[m], wrong);
            CHECK_INT(wrong, 0);
            layer_free(&l);
        }
    return rounded;
}

/* Inputs that the checkpoint stores as bytes are rounded by every backend alike: nothing else may be lost. */
static void integer_formats(moq_backend *be, const char *name)
{
    static const int rows[] = {6, 16, 37, 50};
    for (size_t i = 0; i < MOQI_COUNT(layer_formats); i++)
        for (size_t m = 0; m < MOQI_COUNT(rows); m++) {
            layer l;
            const input_format *in = &input_formats[m % 2 ? 5 : 3];
            layer_make(&l, &layer_formats[i], 45, m == 3 ? 1600 : m == 0 ? 99 : 576);
            l.w.scheme.input = in->c;
            l.w.input_scale = in->scale;
            long wrong = moqi_is_int(l.w.scheme.weight.elem) ? check_linear(be, &l, 1, rows[m]) : 0;
            if (wrong) fprintf(stderr, "%s, %s, %s, %d rows: %ld wrong\n", name, layer_formats[i].name, in->name, rows[m], wrong);
            CHECK_INT(wrong, 0);
            layer_free(&l);
        }
}

/* Inputs of more steps than 2^31, the most that a conversion to whole numbers takes: on both sides they are the largest code. */
static void large_inputs(moq_backend *be, const char *name)
{
    static const int rows[] = {1, 3, 16, 37};
    for (size_t i = 0; i < MOQI_COUNT(layer_formats); i++)
        for (size_t m = 0; m < MOQI_COUNT(rows); m++) {
            layer l;
            layer_make(&l, &layer_formats[i], 45, 576);
            l.w.scheme.input = input_formats[3].c;
            l.w.input_scale = 2e-10f;
            long wrong = moqi_is_int(l.w.scheme.weight.elem) ? check_linear(be, &l, 1, rows[m]) : 0;
            if (wrong) fprintf(stderr, "%s, %s, large inputs, %d rows: %ld wrong\n", name, layer_formats[i].name, rows[m], wrong);
            CHECK_INT(wrong, 0);
            layer_free(&l);
        }
}

/* Scales near the end of what their type holds. */
static void large_scales(moq_backend *be, const char *name)
{
    layer l;
    int rounded = 0;
    layer_make(&l, &layer_formats[8], 45, 576);
    CHECK_STR(l.w.name, "mxfp4");
    for (int64_t i = 0; i < l.w.rows * l.w.cols / 32; i++) ((uint8_t *)(uintptr_t)l.w.scales.data)[i] = (uint8_t)(((const uint8_t *)l.w.scales.data)[i] + 110);
    for (int64_t i = 0; i < l.w.rows * l.w.cols; i++) l.exact[i] *= ldexp(1, 110);
    l.w.scheme.input = input_formats[0].c;
    l.w.input_scale = 0.1f;
    for (int rows = 1; rows < 40; rows += 19) {
        long wrong = check_automatic(be, &l, rows, &rounded);
        if (wrong) fprintf(stderr, "%s, large scales, %d rows: %ld wrong\n", name, rows, wrong);
        CHECK_INT(wrong, 0);
    }
    layer_free(&l);
}

/* E4M3 scales that are subnormal or NaN, and rows of x that are tiny, huge or zero: tiles work with powers of two beside them, pairs without. */
static void extreme_rows(moq_backend *be, const char *name)
{
    layer l;
    moq_error err;
    enum { ROWS = 40, COLS = 192, TOKENS = 20 };
    static float x[TOKENS * COLS], y[TOKENS * ROWS];
    long wrong = 0;
    layer_make(&l, &layer_formats[4], ROWS, COLS);
    CHECK(l.w.scales.dtype == MOQ_F8_E4M3 && l.w.scheme.weight.group_cols == 16);
    for (int r = 0; r < ROWS; r += 3)
        for (int c = 0; c < COLS; c += 16) {
            uint8_t *s = (uint8_t *)(uintptr_t)l.w.scales.data + r * l.w.scale_row_stride + c / 16 * l.w.scale_col_stride;
            double was = (double)moq_e4m3_decode(*s);
            *s = (uint8_t)(r == 3 && c == 32 ? 0x7f : 1 + (c / 16 + r) % 9);
            for (int k = c; k < c + 16; k++) l.exact[r * COLS + k] *= (double)moq_e4m3_decode(*s) / was;
        }
    for (int i = 0; i < TOKENS * COLS; i++) x[i] = test_normal() * (i / COLS == 0 ? 1e-30f : i / COLS == 1 ? 1e30f : i / COLS == 2 ? 0.0f : 1.0f);
    moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
    CHECK(w != NULL);
    if (w) be->linear(be, w, x, TOKENS, y);
    for (int t = 0; t < TOKENS && w; t++)
        for (int r = 0; r < ROWS; r++) {
            double bound, want = oracle_output(&l, r, x + t * COLS, x + t * COLS, &bound), got = (double)y[t * ROWS + r];
            wrong += r == 3 ? !moqi_is_nan((float)got) : !(fabs(want - got) <= bound / 200);
        }
    if (wrong) fprintf(stderr, "%s, extreme scales and inputs: %ld wrong\n", name, wrong);
    CHECK_INT(wrong, 0);
    be->release_weight(be, w);
    layer_free(&l);
}

/* So many rows of x that they are taken in pieces, and so many of weights that a task has several panels. */
static void many_rows(moq_backend *be, const char *name)
{
    moq_error err;
    static const int counts[] = {290, 530, 257, 513};
    int rounded = 0;
    CHECK(be->reserve(be, 530, &err) == MOQ_OK);
    for (int i = 0; i < 8; i++) {
        layer l;
        layer_make(&l, &layer_formats[i % 2 ? 16 : 4], i & 2 ? 45 : 520, i & 2 ? 1100 : 600);
        if (i % 2) { l.w.scheme.input = input_formats[5].c; l.w.input_scale = input_formats[5].scale; }
        long wrong = i % 2 ? check_linear(be, &l, 1, counts[i / 2]) : check_automatic(be, &l, counts[i / 2], &rounded);
        if (wrong) fprintf(stderr, "%s, %s, many rows: %ld wrong\n", name, l.w.name, wrong);
        CHECK_INT(wrong, 0);
        layer_free(&l);
    }
}

/* A scale or a code that is no number, in one row. */
static void layer_poison(layer *l, int64_t row)
{
    const moq_linear *w = &l->w;
    const int64_t group = w->scheme.weight.group_cols, at = row * w->scale_row_stride + (group > 0 ? (w->cols - 1) / group : 0) * w->scale_col_stride;
    uint8_t *scales = (uint8_t *)(uintptr_t)w->scales.data;
    const uint32_t none = 0x7fc00000;
    if (!scales) { memset((uint8_t *)(uintptr_t)w->codes.data + 2 * (row * w->cols + w->cols - 1), 0xff, 2); return; } /* BF16 */
    if (w->scheme.weight.elem == MOQ_F8_E4M3 && w->scales.dtype != MOQ_F8_E8M0) ((uint8_t *)(uintptr_t)w->codes.data)[row * w->cols + w->cols - 1] = 0xff;
    else if (w->scales.dtype == MOQ_F8_E8M0) scales[at] = 0xff;
    else if (w->scales.dtype == MOQ_F8_E4M3) scales[at] = 0x7f;
    else if (w->scales.dtype == MOQ_F16) { scales[2 * at] = 0; scales[2 * at + 1] = 0x7e; }
    else memcpy(scales + 4 * at, &none, 4);
}

/* Rows of x for which AMX takes strips of every kind, in one part and in two, and in four tiles of weights; more columns than go at once, even and odd chunks
   of them, less than one, rows in one block that end in one tile, two, four; then a scale or a code that is no number, which no other row may see. */
static void strip_rows(moq_backend *be, const char *name)
{
    static const int cols[] = {4240, 144, 4240, 288, 96, 624, 16656, 8208, 272, 592, 576, 48, 1600, 1632, 640, 16400}, rows[] = {70, 128, 20, 50, 20, 200, 20, 40, 129, 300, 177, 529, 21, 9, 16, 32};
    static const int formats[] = {4, 12, 16, 8, 15, 14, 16, 24, 22, 30, 31, 25, 2}; /* 4 bits with groups of 32, 64 and 128, with zero points and without; BF16 */
    enum { KINDS = MOQI_COUNT(formats), BYTES = 2, PLAIN = KINDS - 1 };
    moq_error err;
    int rounded = 0;
    CHECK(be->reserve(be, 530, &err) == MOQ_OK);
    for (size_t i = 0; i < KINDS * MOQI_COUNT(cols); i++) {
        const int kind = (int)(i % KINDS), m = rows[i / KINDS];
        layer l;
        if (m < 17 && formats[kind] != 4 && formats[kind] != 8) continue; /* others may lie better where they are */
        layer_make(&l, &layer_formats[formats[kind]], m < 17 ? 150 : 45, cols[i / KINDS]);
        const int high = (int)l.w.rows, wide = (int)l.w.cols; /* what the format makes of them */
        if (kind == BYTES) { l.w.scheme.input = input_formats[5].c; l.w.input_scale = input_formats[5].scale; }
        long wrong = kind == BYTES || kind == PLAIN ? check_linear(be, &l, kind == BYTES ? STORED : WIDE, m) : check_automatic(be, &l, m, &rounded), others = 0;
        if (wrong) fprintf(stderr, "%s, %s, %d rows: %ld wrong\n", name, l.w.name, m, wrong);
        CHECK_INT(wrong, 0);
        layer_poison(&l, 20);
        float *x = (float *)malloc((size_t)(m * wide) * 4), *y = (float *)malloc((size_t)(m * high) * 4);
        for (int k = 0; k < m * wide; k++) x[k] = test_normal();
        moq_weight *p = be->prepare_linear(be, &l.w, 1, &err);
        CHECK(p != NULL && moqi_feeds_words(moqi_way_for(((moqi_weight *)(void *)p)->part, m)));
        if (p) be->linear(be, p, x, m, y);
        for (int k = 0; p && k < m * high; k++) others += moqi_is_nan(y[k]) != (k % high == 20); /* also where the compiler takes no number for none */
        if (others) fprintf(stderr, "%s, %s, a number that is none, %d columns, %d rows: %ld wrong\n", name, l.w.name, wide, m, others);
        CHECK_INT(others, 0);
        be->release_weight(be, p);
        free(x); free(y);
        layer_free(&l);
    }
}

/* F32 inputs of weights in BF16: rows of x near both ends of what F32 holds, with subnormal numbers, with zeros; then with numbers that are none or infinite,
   which no other row may see. */
static void extreme_wide_rows(moq_backend *be, const char *name)
{
    layer l;
    moq_error err;
    enum { ROWS = 40, COLS = 192, TOKENS = 150 };
    static float x[TOKENS * COLS], y[TOKENS * ROWS];
    static const float by[8] = {1, 1e-30f, 1e-44f, 1e30f, 0, 1e-38f, 3e-36f, 1};
    volatile float smallest = 1.17549435e-38f, half = 0.5f;
    const double last = smallest * half > 0 ? 1.5e-45 : 1.2e-38; /* the last place of a subnormal sum; -ffast-math lets the processor take those for 0 */
    CHECK(be->reserve(be, TOKENS, &err) == MOQ_OK);
    for (int turn = 0; turn < 2; turn++) {
        const int tokens = turn ? TOKENS : 40;
        long wrong = 0, others = 0;
        layer_make(&l, &layer_formats[2], ROWS, COLS);
        for (int i = 0; i < tokens * COLS; i++) {
            const int t = i / COLS % 8;
            x[i] = t == 7 ? (i % COLS == 5 ? 3.4028234e38f : i % COLS == 6 ? -3.4e38f : 0) : test_normal() * by[t];
        }
        moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
        CHECK(w != NULL);
        if (w) be->linear(be, w, x, tokens, y);
        for (int t = 0; t < tokens && w; t++)
            for (int r = 0; r < ROWS; r++) {
                double bound = 0, want = 0;
                for (int c = 0; c < COLS; c++) {
                    const double v = l.exact[r * COLS + c] * (double)x[t * COLS + c];
                    want += v;
                    bound += fabs(v);
                }
                wrong += bound < 3.4e38 && !(fabs(want - (double)y[t * ROWS + r]) <= 2e-6 * bound + last);
            }
        if (wrong) fprintf(stderr, "%s, extreme F32 inputs, %d rows: %ld wrong\n", name, tokens, wrong);
        CHECK_INT(wrong, 0);
        for (int i = 0; i < tokens * COLS; i++) x[i] = test_normal();
        x[3 * COLS + 100] = moqi_bits_f32(0x7f800001);
        x[17 * COLS + 7] = moqi_bits_f32(0xffffffff);
        x[35 * COLS + 191] = moqi_bits_f32(0x7f800000);
        if (w) be->linear(be, w, x, tokens, y);
        for (int t = 0; t < tokens && w; t++)
            for (int r = 0; r < ROWS; r++) {
                const float v = y[t * ROWS + r], out = (float)(l.exact[r * COLS + 191] * 1e300); /* a weight of 0 would make NaN of infinity */
                others += t == 3 || t == 17 ? !moqi_is_nan(v) : t == 35 ? moqi_f32_bits(v) != moqi_f32_bits(out) : moqi_is_nan(v) || !(fabsf(v) < 1e9f);
            }
        CHECK_INT(others, 0);
        be->release_weight(be, w);
        layer_free(&l);
    }
}

static void test_backend_automatic(void)
{
    for (int k = 0; moqi_get_kernels(k); k++) {
        const char *name = moqi_get_kernels(k)->name;
        moq_backend *be = backend_of(name, MOQ_ACT_AUTO, 2);
        moq_error err;
        CHECK(be->reserve(be, 64, &err) == MOQ_OK);
        uint64_t seed = test_state.seed; /* what follows sees the numbers that it always saw */
        integer_formats(be, name);
        large_scales(be, name);
        large_inputs(be, name);
        if (strcmp(name, "amx") == 0 || strcmp(name, "avx512bf16") == 0) many_rows(be, name);
        if (strcmp(name, "amx") == 0 || strcmp(name, "avx512bf16") == 0) extreme_rows(be, name);
        if (strcmp(name, "amx") == 0) strip_rows(be, name);
        if (strcmp(name, "amx") == 0) extreme_wide_rows(be, name);
        test_state.seed = seed;
        int rounded = automatic_formats(be, name), shortens = strcmp(name, "amx") == 0 || strstr(name, "vnni") != NULL || strstr(name, "bf16") != NULL || strncmp(name, "neon", 4) == 0;
#ifdef MOQI_DOTS
        shortens |= strcmp(name, "avx2") == 0;
#endif
        if (strcmp(name, "avx512") == 0 || strcmp(name, "plain") == 0 || strcmp(name, "reference") == 0) CHECK_INT(rounded, 0);
        if (shortens) CHECK((rounded > 0) == (strcmp(name, "neon") != 0));
        moq_backend_destroy(be);
    }
}

/* Inputs in BF16, of quantized layers and of others: what is lost is known but for the order of sums, and for quantized weights where pairs are
   multiplied. Weights that are stored in more bits than BF16 has keep them. */
static void bf16_formats(moq_backend *be, const char *name, int pairs)
{
    static const int rows[] = {1, 2, 5, 8, 16, 17, 33, 50};
    moq_error err;
    CHECK(be->reserve(be, 64, &err) == MOQ_OK);
    for (size_t i = 0; i < MOQI_COUNT(layer_formats); i++)
        for (size_t m = 0; m < MOQI_COUNT(rows); m++) {
            layer l;
            char text[200];
            if (pairs > 1 && layer_formats[i].elem == MOQ_F4) continue;
            layer_make(&l, &layer_formats[i], m % 3 ? 45 : 16, m % 2 ? 1100 : 290);
            if (m % 2 && l.w.scheme.weight.scale != MOQ_NONE) { l.w.scheme.input = input_formats[0].c; l.w.input_scale = 0.1f; }
            if (m % 4 > 1) {
                float *smooth = layer_floats(&l, l.w.cols, 0.3f);
                for (int64_t c = 0; c < l.w.cols; c++) smooth[c] = 0.5f + fabsf(smooth[c]);
                l.w.pre_quant_scale = layer_view(smooth, MOQ_F32, l.w.cols);
                l.w.scheme.pre_quant_scale = 1;
            }
            if (m % 8 > 5) {
                l.w.scheme.lora_rank = 5;
                l.w.lora_a = layer_view(layer_floats(&l, 5 * l.w.cols, 0.1f), MOQ_F32, 5 * l.w.cols);
                l.w.lora_b = layer_view(layer_floats(&l, l.w.rows * 5, 0.1f), MOQ_F32, l.w.rows * 5);
            }
            long wrong = check_linear(be, &l, pairs ? SHORT_PAIRS : SHORT, rows[m]);
            be->explain(be, &l.w, text, sizeof text);
            wrong += strstr(text, "inputs rounded to BF16") == NULL;
            if (wrong) fprintf(stderr, "%s, %s, BF16 inputs, %d rows: %ld wrong: %s\n", name, layer_formats[i].name, rows[m], wrong, text);
            CHECK_INT(wrong, 0);
            layer_free(&l);
        }
}

static void test_backend_bf16(void)
{
    for (int k = 0; moqi_get_kernels(k); k++) {
        const char *name = moqi_get_kernels(k)->name;
        moq_backend *be = backend_of(name, MOQ_ACT_BF16, 2);
        bf16_formats(be, name, strcmp(name, "amx") == 0 || strcmp(name, "avx512bf16") == 0 || strcmp(name, "neonmm") == 0);
        moq_backend_destroy(be);
    }
}

/* Tile instructions where the processor has none, but the rest of what their kernels need. */
static void test_backend_tiles(void)
{
#if defined(MOQI_AMX) && defined(AMX_H)
    uint32_t flags = moqi_cpu_flags();
    if (flags & MOQI_CPU_AMX) return; /* test_backend_automatic has run them as they are */
    if (!(flags & MOQI_CPU_VNNI) || !(flags & MOQI_CPU_VBMI)) { printf("skipped: tiles, for want of AVX-512 with VNNI and VBMI\n"); test_state.skipped++; return; }
    struct sigaction before;
    sigaction(SIGILL, NULL, &before);
    amx_emulate();
    moq_backend *be = backend_of("avx512vnni", MOQ_ACT_BF16, 2);
    moqi_cpu_of(be)->k = &moqi_amx_kernels;
    bf16_formats(be, "amx, emulated", 1);
    CHECK(amx_count > 1000);
    moq_backend_destroy(be);
    be = backend_of("avx512vnni", MOQ_ACT_AUTO, 2);
    moqi_cpu_of(be)->k = &moqi_amx_kernels;
    CHECK(automatic_formats(be, "amx, emulated") > 0);
    CHECK(amx_count > 1000 && amx_bytes_count == 0);
    integer_formats(be, "amx, emulated");
    CHECK(amx_bytes_count > 1000);
    strip_rows(be, "amx, emulated");
    many_rows(be, "amx, emulated");
    extreme_rows(be, "amx, emulated");
    extreme_wide_rows(be, "amx, emulated");
    moq_backend_destroy(be);
    sigaction(SIGILL, &before, NULL);
#else
    printf("skipped: tiles, not for this system\n");
    test_state.skipped++;
#endif
}

/* Inputs with scales of their own: the vector version against the plain one, whose quotients it may miss by a rounding. */
static void test_backend_codes(void)
{
#ifdef MOQI_X86
    static const int formats[] = {4, 8, 16}; /* nvfp4, mxfp4, int8 row */
    static const int cols[] = {16, 100, 290, 576, 1536};
    if (!(moqi_cpu_flags() & MOQI_CPU_VNNI)) { printf("skipped: codes of inputs, for want of AVX-512 with VNNI\n"); test_state.skipped++; return; }
    for (int f = 0; f < 3; f++)
        for (int s = 0; s < 5; s++) {
            moq_backend *be = backend_of("avx512vnni", MOQ_ACT_AUTO, 1);
            moq_error err;
            layer l;
            int64_t n = cols[s], all = (n + 127) / 128 * 128;
            layer_make(&l, &layer_formats[formats[f]], 16, n);
            l.w.scheme.input = input_formats[0].c;
            l.w.input_scale = 0.1f;
            moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
            const moqi_tiled *p = ((const moqi_weight *)(const void *)w)->part;
            int64_t chunk = moqi_i8_chunk(p), wrong = 0, differ = 0;
            float x[1536], want[1536], got[1536];
            for (int64_t i = 0; i < n; i++) x[i] = test_normal() * ldexpf(1, (int)(i / 32 % 5) * 20 - 40) * (i / 16 % 7 != 3);
            if (n > 300) { x[37] = moqi_bits_f32(0x7fc00000); x[200] = moqi_bits_f32(0xff800000); x[290] = 1e-42f; }
            memset(got, 0x5a, sizeof got);
            moqi_i8_arrange(p, x, n, want, 0);
            moqi_i8_arrange_512(p, x, n, got, 0);
            for (int64_t c = 0; c < all / chunk; c++) {
                const int8_t *a = (const int8_t *)want + c * chunk, *b = (const int8_t *)got + c * chunk;
                float sa = want[all / 4 + c], sb = got[all / 4 + c];
                int32_t start, sum = 0;
                memcpy(&start, &got[all / 4 + all / 16 + c], 4);
                for (int64_t i = 0; i < chunk; i++) {
                    sum += b[i];
                    wrong += sa > 1e-30f && abs(a[i] - b[i]) > 1;
                    differ += sa > 1e-30f && a[i] != b[i];
                    wrong += sa == 0 && b[i] != 0;
                }
                wrong += start != moqi_i8_start(p) - sum * moqi_i8_off(p);
                wrong += moqi_is_nan(sa) ? !moqi_is_nan(sb) : sa > 1e-30f ? fabsf(sa - sb) > 3e-7f * sa : !(sb >= 0 && sb < 2e-30f);
            }
            if (wrong) fprintf(stderr, "%s, %d columns: %d wrong\n", l.w.name, cols[s], (int)wrong);
            CHECK_INT(wrong, 0);
            CHECK(differ <= all / 100);
            be->release_weight(be, w);
            layer_free(&l);
            moq_backend_destroy(be);
        }
#else
    printf("skipped: codes of inputs, not for this processor\n");
    test_state.skipped++;
#endif
}

/* What is read where it lies and what is rewritten: a format must not fall back to the slow path unnoticed. */
static void test_backend_forms(void)
{
    moq_backend *be = backend_of("plain", MOQ_ACT_WIDE, 1);
    for (size_t i = 0; i < MOQI_COUNT(layer_formats); i++) {
        layer l;
        moq_error err;
        const char *name = layer_formats[i].name;
        layer_make(&l, &layer_formats[i], 256, 1024);
        moq_weight *p = be->prepare_linear(be, &l.w, 1, &err);
        const moqi_tiled *t = ((const moqi_weight *)(const void *)p)->part;
        int slow = strcmp(name, "mxfp4 along rows") == 0 || strcmp(name, "mxfp6 in bytes") == 0;
        if ((t->form == MOQI_CODES_SLOW) != slow) fprintf(stderr, "%s\n", name);
        CHECK((t->form == MOQI_CODES_SLOW) == slow);
        int in_place = strstr("f32 f16 bf16 nvfp4 mxfp4 mxfp8", name) != NULL || strncmp(name, "fp8 row", 7) == 0;
        if (in_place) CHECK(be->weight_bytes(be, p) < 8192);
        be->release_weight(be, p);
        layer_free(&l);
    }
    moq_backend_destroy(be);
}

/* Inputs as stored, with and without what may stand before and beside the product. */
static void test_backend_inputs(void)
{
    for (int k = 0; moqi_get_kernels(k); k++) {
        moq_backend *be = backend_of(moqi_get_kernels(k)->name, MOQ_ACT_STORED, 1);
        for (size_t i = 0; i < MOQI_COUNT(input_formats); i++)
            for (int extra = 0; extra < 4; extra++) {
                layer l;
                layer_make(&l, &layer_formats[i % 2 ? 4 : 16], 21, 304);
                l.w.scheme.input = input_formats[i].c;
                l.w.input_scale = input_formats[i].scale;
                l.w.input_zero = input_formats[i].zero;
                if (extra & 1) {
                    float *p = layer_floats(&l, l.w.cols, 0.3f);
                    for (int64_t c = 0; c < l.w.cols; c++) p[c] = 0.5f + fabsf(p[c]);
                    l.w.pre_quant_scale = layer_view(p, MOQ_F32, l.w.cols);
                    l.w.scheme.pre_quant_scale = 1;
                    l.w.bias = layer_view(layer_floats(&l, l.w.rows, 1), MOQ_F32, l.w.rows);
                }
                if (extra & 2) {
                    l.w.scheme.lora_rank = 5;
                    l.w.lora_a = layer_view(layer_floats(&l, 5 * l.w.cols, 0.1f), MOQ_F32, 5 * l.w.cols);
                    l.w.lora_b = layer_view(layer_floats(&l, l.w.rows * 5, 0.1f), MOQ_F32, l.w.rows * 5);
                }
                long wrong = check_linear(be, &l, 1, 3);
                if (wrong) fprintf(stderr, "%s, extra %d: %ld wrong\n", input_formats[i].name, extra, wrong);
                CHECK_INT(wrong, 0);
                layer_free(&l);
            }
        layer l; /* W4A8_AWQ: the weight is rounded once more, only when inputs are */
        layer_make(&l, &layer_formats[19], 34, 256);
        CHECK_STR(l.w.name, "int4 modelopt");
        l.w.scheme.input = input_formats[0].c;
        l.w.input_scale = 0.01f;
        l.w.scheme.requantize_fp8 = 1;
        l.w.requant_scale = 0.003f;
        CHECK_INT(check_linear(be, &l, 1, 2), 0);
        moq_backend *wide = backend_of(moqi_get_kernels(k)->name, MOQ_ACT_WIDE, 1), *automatic = backend_of(moqi_get_kernels(k)->name, MOQ_ACT_AUTO, 1);
        CHECK(check_linear(wide, &l, 1, 2) > 0);
        l.w.requant_scale = 0;
        CHECK_INT(check_linear(wide, &l, 0, 2), 0);
        int rounded = 0;
        CHECK_INT(check_automatic(automatic, &l, 2, &rounded), 0); /* automatic: FP8 within the bounds of 8 bits, INT8 as stored */
        l.w.scheme.input = input_formats[3].c;
        CHECK_INT(check_linear(automatic, &l, 1, 2), 0);
        CHECK_INT(check_linear(wide, &l, 0, 2), 0);
        layer_free(&l);
        moq_backend_destroy(wide);
        moq_backend_destroy(automatic);
        moq_backend_destroy(be);
    }
}

static void test_backend_rotation(void)
{
    for (int stored = 0; stored < 2; stored++) {
        moq_backend *be = backend_of(NULL, MOQ_ACT_WIDE, 1);
        moq_error err;
        layer l;
        layer_make(&l, &layer_formats[0], 9, 96);
        l.w.scheme.hadamard = 1;
        l.w.hadamard_size = 32;
        l.w.hadamard_scale = 0.25f;
        float *h = layer_floats(&l, 1024, 1), x[96], t[96], y[9];
        if (stored) l.w.hadamard = layer_view(h, MOQ_F32, 1024);
        for (int i = 0; i < 96; i++) x[i] = test_normal();
        moqi_rotate_input(stored ? h : NULL, 32, 0.25f, x, 96, t);
        moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
        CHECK(w != NULL);
        be->linear(be, w, x, 1, y);
        for (int64_t r = 0; r < 9; r++) {
            double bound, want = oracle_output(&l, r, t, t, &bound);
            CHECK(fabs(want - (double)y[r]) <= 2e-6 * bound);
        }
        be->release_weight(be, w);
        l.w.hadamard_size = 36;
        CHECK(be->prepare_linear(be, &l.w, 1, &err) == NULL && err.code == MOQ_E_SHAPE);
        layer_free(&l);
        moq_backend_destroy(be);
    }
}

/* Slices of rows (also interleaved) and of columns compute what the same rows and columns of the whole do. */
static void test_backend_slices(void)
{
    for (size_t i = 0; i < MOQI_COUNT(layer_formats); i++) {
        layer l, s;
        moq_error err;
        layer_make(&l, &layer_formats[i], 256, 768);
        if (layer_formats[i].act_order) { layer_free(&l); continue; } /* a layer's group vector does not divide */
        int64_t first = layer_formats[i].padded ? 160 : 128, cols = layer_formats[i].padded ? 480 : 512; /* 5 codes of 6 bits fill a word */
        for (int k = 0; moqi_get_kernels(k); k++) {
            moq_backend *be = backend_of(moqi_get_kernels(k)->name, MOQ_ACT_WIDE, 1);
            s = l;
            l.w.bias = layer_view(layer_floats(&l, l.w.rows, 1), MOQ_F32, l.w.rows);
            if (moq_slice_rows(&l.w, 129, 50, 2, &s.w, &err) < 0 || moq_slice_cols(&s.w, first, cols, &s.w, &err) < 0) { fprintf(stderr, "%s\n", err.text); CHECK(0); break; }
            s.exact = (double *)malloc(sizeof(double) * (size_t)(50 * cols));
            float *bias = (float *)malloc(50 * sizeof *bias);
            for (int64_t r = 0; r < 50; r++) {
                memcpy(s.exact + r * cols, l.exact + (129 + 2 * r) * l.w.cols + first, (size_t)cols * sizeof(double));
                bias[r] = ((const float *)l.w.bias.data)[129 + 2 * r];
            }
            float x[512], y[50];
            for (int c = 0; c < cols; c++) x[c] = test_normal();
            moq_weight *w = be->prepare_linear(be, &s.w, 1, &err);
            CHECK(w != NULL);
            be->linear(be, w, x, 1, y);
            s.w.bias.data = bias;
            long wrong = 0;
            for (int64_t r = 0; r < 50; r++) {
                double bound, want = oracle_output(&s, r, x, x, &bound);
                wrong += !(fabs(want - (double)y[r]) <= 2e-6 * bound);
            }
            if (wrong) fprintf(stderr, "%s, %s: %ld wrong\n", moqi_get_kernels(k)->name, l.w.name, wrong);
            CHECK_INT(wrong, 0);
            be->release_weight(be, w);
            moq_backend_destroy(be);
            free(s.exact);
            free(bias);
            memset(&l.w.bias, 0, sizeof l.w.bias);
            free(l.memory[--l.blocks]);
        }
        layer_free(&l);
    }
}

/* ---- several parts in one, many rows, many threads ---- */

static void backwards(void *user, int tasks, void (*task)(void *arg, int index, int worker), void *arg)
{
    (*(int *)user)++;
    for (int i = tasks - 1; i >= 0; i--) task(arg, i, i % 3);
}

/* The same products added up in another order: within 2e-6 of the largest. */
static int close_floats(const float *a, const float *b, int n)
{
    float size = 0;
    for (int i = 0; i < n; i++) size = fabsf(a[i]) > size ? fabsf(a[i]) : size;
    for (int i = 0; i < n; i++) if (!(fabsf(a[i] - b[i]) <= 2e-6f * size)) return 0;
    return 1;
}

/* y of three fused layers: [rows, 3 different heights]. */
static void run_fused(moq_backend *be, const layer *l, int rows, const float *x, float *y)
{
    moq_error err;
    moq_linear parts[3] = {l[0].w, l[1].w, l[2].w};
    moq_weight *w = be->prepare_linear(be, parts, 3, &err);
    CHECK(w != NULL);
    be->linear(be, w, x, rows, y);
    be->release_weight(be, w);
}

/* Layers of any two formats as parts of one: their codes may want the same x in another order. */
static void test_backend_mixed_parts(void)
{
    enum { FORMATS = (int)(sizeof layer_formats / sizeof *layer_formats), ROWS = 3, COLS = 256, HEIGHT = 32 };
    static layer l[FORMATS];
    static float x[ROWS * COLS], alone[FORMATS][ROWS * HEIGHT], y[ROWS * 2 * HEIGHT];
    moq_error err;
    for (int i = 0; i < ROWS * COLS; i++) x[i] = test_normal();
    for (int i = 0; i < FORMATS; i++) layer_make(&l[i], &layer_formats[i], HEIGHT, COLS);
    for (int k = 0; moqi_get_kernels(k); k++) {
        moq_backend *be = backend_of(moqi_get_kernels(k)->name, MOQ_ACT_WIDE, 1);
        int wrong = 0;
        for (int i = 0; i < FORMATS * (FORMATS + 1); i++) {
            int a = i / FORMATS - 1, b = i % FORMATS, count = a < 0 ? 1 : 2;
            moq_linear parts[2] = {l[a < 0 ? b : a].w, l[b].w};
            moq_weight *w = be->prepare_linear(be, parts, count, &err);
            be->linear(be, w, x, ROWS, a < 0 ? alone[b] : y);
            be->release_weight(be, w);
            for (int r = 0; r < ROWS && a >= 0; r++) {
                int bad = memcmp(y + r * 2 * HEIGHT, alone[a] + r * HEIGHT, HEIGHT * sizeof *y) != 0 ||
                          memcmp(y + r * 2 * HEIGHT + HEIGHT, alone[b] + r * HEIGHT, HEIGHT * sizeof *y) != 0;
                if (bad && !wrong) printf("    %s: %s beside %s\n", moqi_get_kernels(k)->name, layer_formats[a].name, layer_formats[b].name);
                wrong += bad;
            }
        }
        CHECK_INT(wrong, 0);
        moq_backend_destroy(be);
    }
    for (int i = 0; i < FORMATS; i++) layer_free(&l[i]);
}

static void test_backend_fused_and_threads(void)
{
    enum { ROWS = 21, COLS = 544 };
    static const int heights[3] = {130, 47, 64};
    layer l[3];
    moq_error err;
    int out = 0, at = 0, calls = 0;
    for (int i = 0; i < 3; i++) {
        layer_make(&l[i], &layer_formats[i == 1 ? 8 : 4], heights[i], COLS);
        l[i].w.scheme.input = input_formats[i == 2 ? 0 : 7].c; /* the first two share their rounded input */
        l[i].w.input_scale = 0.001f;
        l[i].w.scheme.lora_rank = 3;
        l[i].w.lora_a = layer_view(layer_floats(&l[i], 3 * COLS, 0.1f), MOQ_F32, 3 * COLS);
        l[i].w.lora_b = layer_view(layer_floats(&l[i], heights[i] * 3, 0.1f), MOQ_F32, heights[i] * 3);
        out += heights[i];
    }
    float *x = (float *)malloc(sizeof(float) * ROWS * COLS), *y = (float *)malloc(sizeof(float) * (size_t)(ROWS * out)), *z = (float *)malloc(sizeof(float) * (size_t)(ROWS * out));
    for (int i = 0; i < ROWS * COLS; i++) x[i] = test_normal();
    for (int k = 0; moqi_get_kernels(k); k++) {
        const char *name = moqi_get_kernels(k)->name;
        moq_backend *be = backend_of(name, MOQ_ACT_STORED, 1);
        run_fused(be, l, ROWS, x, y);
        at = 0;
        for (int i = 0; i < 3; i++) { /* fused equals single; one row at a time may be added up in another order than many at once */
            moq_weight *w = be->prepare_linear(be, &l[i].w, 1, &err);
            be->linear(be, w, x, ROWS, z);
            for (int r = 0; r < ROWS; r++) CHECK(memcmp(z + r * heights[i], y + r * out + at, (size_t)heights[i] * sizeof *z) == 0);
            for (int r = 0; r < ROWS; r++) {
                be->linear(be, w, x + r * COLS, 1, z);
                CHECK(close_floats(z, y + r * out + at, heights[i]));
            }
            be->release_weight(be, w);
            at += heights[i];
        }
        CHECK(be->reserve(be, 64, &err) == MOQ_OK && be->max_rows == 64);
        run_fused(be, l, ROWS, x, z);
        CHECK(close_floats(y, z, ROWS * out));
        CHECK(be->reserve(be, 0, &err) == MOQ_E_ARG);
        moq_backend_destroy(be);
        for (int threads = 2; threads <= 5; threads += threads == 3 ? 2 : 1) {
            be = backend_of(name, MOQ_ACT_STORED, threads);
            memset(z, 0x7f, sizeof(float) * (size_t)(ROWS * out));
            run_fused(be, l, ROWS, x, z);
            CHECK(memcmp(y, z, sizeof(float) * (size_t)(ROWS * out)) == 0);
            moq_backend_destroy(be);
        }
        moq_cpu_desc d;
        memset(&d, 0, sizeof d);
        d.kernel = name;
        d.act = MOQ_ACT_STORED;
        d.parallel.run = backwards;
        d.parallel.workers = 3;
        d.parallel.user = &calls;
        be = moq_cpu_backend(&d, &err);
        calls = 0;
        run_fused(be, l, ROWS, x, z);
        CHECK(calls > 0 && memcmp(y, z, sizeof(float) * (size_t)(ROWS * out)) == 0);
        moq_backend_destroy(be);
    }
    for (int i = 0; i < 3; i++) layer_free(&l[i]);
    free(x); free(y); free(z);
}

/* A few rows of x, where tasks of one, two and five workers differ: the same bits, and near the product in double. Last columns fill a quarter of a block
   of 256, half of one, or none; 2080 of them are more than one piece of 2048 for 9 rows. */
static void test_backend_few_rows_and_threads(void)
{
    enum { FORMATS = (int)(sizeof layer_formats / sizeof *layer_formats), HEIGHT = 264, MOST = 2080, ROWS = 9, SIZES = 6 };
    static const int widths[SIZES] = {576, 592, 896, 48, 592, MOST}, heights[SIZES] = {HEIGHT, HEIGHT, HEIGHT, HEIGHT, 263, 263};
    static const int counts[] = {1, 2, ROWS}, workers[] = {1, 2, 5};
    static float x[ROWS * MOST], y[3][ROWS * HEIGHT];
    moq_error err;
    for (int i = 0; i < ROWS * MOST; i++) x[i] = test_normal() * (i % 97 == 0 ? 20 : 1);
    for (int i = 0; i < FORMATS * SIZES; i++) {
        const layer_format *f = &layer_formats[i / SIZES];
        int cols = widths[i % SIZES], height = heights[i % SIZES], wrong = 0, far = 0;
        layer l;
        if ((f->elem != MOQ_F4 && !moqi_is_int(f->elem)) || cols % f->col_unit || height % f->row_unit) continue; /* no whole number of groups */
        layer_make(&l, f, height, cols);
        for (int narrow = 0; narrow < 2; narrow++) {
            if (narrow) l.w.scheme.input = input_formats[7].c; /* of 4 bits: then few rows get 8, else 16 or what they have */
            l.w.input_scale = 0.001f;
            for (int k = 0; k < 3; k++) {
                for (int t = 0; t < 3; t++) {
                    moq_backend *be = backend_of(NULL, MOQ_ACT_AUTO, workers[t]);
                    moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
                    CHECK(w != NULL);
                    be->linear(be, w, x, counts[k], y[t]);
                    be->release_weight(be, w);
                    moq_backend_destroy(be);
                    wrong += memcmp(y[0], y[t], sizeof(float) * (size_t)(counts[k] * height)) != 0;
                }
                for (int j = (counts[k] - 1) * height; j < counts[k] * height; j++) {
                    double want = 0, size = 0, most = 0; /* 8 bits for 32 columns of x: half a step is the largest of them / 254 */
                    for (int c = 0; c < cols; c++) {
                        const float *from = x + j / height * cols + c;
                        if (c % 32 == 0) most = 0;
                        for (int e = 0; c % 32 == 0 && e < 32 && c + e < cols; e++) most = fmax(most, (double)fabsf(from[e]));
                        want += l.exact[j % height * cols + c] * (double)*from;
                        size += fabs(l.exact[j % height * cols + c]) * most;
                    }
                    far += !(fabs((double)y[0][j] - want) <= size / 250 + 1e-9);
                }
            }
        }
        for (int t = 0; t < 4 && strcmp(f->name, "nvfp4") == 0; t++) { /* a scale that is no number is one of its row only */
            moq_backend *be = backend_of(NULL, MOQ_ACT_AUTO, workers[t % 3]);
            moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
            be->linear(be, w, x, 1, y[t > 0]);
            be->release_weight(be, w);
            moq_backend_destroy(be);
            ((uint8_t *)(uintptr_t)l.w.scales.data)[2] = 0x7f;
            wrong += t > 0 && (y[1][0] == y[1][0] || memcmp(y[0] + 1, y[1] + 1, sizeof(float) * (size_t)(height - 1)) != 0);
        }
        if (wrong || far) printf("    %s, %d rows, %d columns: %d, %d\n", f->name, height, cols, wrong, far);
        CHECK_INT(wrong, 0);
        CHECK_INT(far, 0);
        layer_free(&l);
    }
}

/* Weights of 8 and 16 bits that AVX-512 reads where they lie: each row of x as if it were alone, whatever the number of threads; near the product in
   double; and a code that is no number makes its own row none, no other. */
static void test_backend_few_rows_alone(void)
{
    enum { HEIGHT = 45, MOST = 1090, ROWS = 9 };
    static const int widths[] = {33, 290, 576, MOST};
    static float x[ROWS * MOST], shorts[ROWS * MOST], one[HEIGHT], y[2][ROWS * HEIGHT];
    moq_error err;
    for (int i = 0; i < ROWS * MOST; i++) x[i] = test_normal() * (i % 97 == 0 ? 20 : 1);
    for (int i = 0; i < ROWS * MOST; i++) shorts[i] = moq_bf16_decode(moq_bf16_encode(x[i]));
    for (int i = 0; i < (int)MOQI_COUNT(layer_formats) * 4; i++) {
        const layer_format *f = &layer_formats[i / 4];
        int cols = widths[i % 4], wrong = 0, far = 0;
        if ((f->elem != MOQ_F16 && f->elem != MOQ_BF16 && f->elem != MOQ_F8_E4M3) || strstr(f->name, "out]") || cols % f->col_unit) continue;
        layer l;
        layer_make(&l, f, HEIGHT, cols);
        l.w.bias = layer_view(layer_floats(&l, HEIGHT, 0.3f), MOQ_F32, HEIGHT); /* a compiler may fuse it with a product */
        for (int nan = 0; nan < 2 && (!nan || f->elem == MOQ_F8_E4M3); nan++) {
            if (nan) ((uint8_t *)(uintptr_t)l.w.codes.data)[20 * cols + 3] = 0xff;
            for (int k = 0; moqi_get_kernels(k); k++) {
                if (strncmp(moqi_get_kernels(k)->name, "avx512", 6) != 0) continue;
                for (int act = 0; act < 3; act++) {
                    static const moq_act acts[] = {MOQ_ACT_AUTO, MOQ_ACT_WIDE, MOQ_ACT_BF16};
                    moq_backend *be[2];
                    moq_weight *w[2];
                    for (int t = 0; t < 2; t++) {
                        be[t] = backend_of(moqi_get_kernels(k)->name, acts[act], t ? 5 : 1);
                        w[t] = be[t]->prepare_linear(be[t], &l.w, 1, &err);
                        CHECK(w[t] != NULL && be[t]->reserve(be[t], ROWS, &err) == MOQ_OK);
                    }
                    for (int m = 1; m <= ROWS; m++) {
                        be[0]->linear(be[0], w[0], x, m, y[0]);
                        be[1]->linear(be[1], w[1], x, m, y[1]);
                        be[0]->linear(be[0], w[0], x + (m - 1) * cols, 1, one);
                        wrong += memcmp(y[0], y[1], sizeof(float) * (size_t)(m * HEIGHT)) != 0;
                        wrong += memcmp(y[0] + (m - 1) * HEIGHT, one, sizeof one) != 0;
                        for (int j = 0; j < HEIGHT; j++) {
                            double bound, want = oracle_output(&l, j, x + (m - 1) * cols, (act < 2 ? x : shorts) + (m - 1) * cols, &bound);
                            if (nan && j == 20) far += one[j] == one[j];
                            else far += !(fabs(want - (double)one[j]) <= bound * (act || f->elem != MOQ_F8_E4M3 ? 2e-5 : 0.004)); /* half a step of BF16 */
                        }
                    }
                    for (int t = 0; t < 2; t++) { be[t]->release_weight(be[t], w[t]); moq_backend_destroy(be[t]); }
                }
            }
        }
        if (wrong || far) printf("    %s, %d columns: %d, %d\n", f->name, cols, wrong, far);
        CHECK_INT(wrong, 0);
        CHECK_INT(far, 0);
        layer_free(&l);
    }
}

/* One row of x: tasks of a worker alone are longer than those of several, and nobody can tell from what they write. */
static void test_backend_long_tasks(void)
{
    enum { HEIGHT = 2080, WIDTH = 128 };
    static float x[WIDTH], y[2][HEIGHT];
    moq_error err;
    for (int i = 0; i < WIDTH; i++) x[i] = test_normal();
    for (size_t i = 0; i < MOQI_COUNT(layer_formats); i++) {
        layer l;
        layer_make(&l, &layer_formats[i], HEIGHT, WIDTH);
        l.w.bias = layer_view(layer_floats(&l, HEIGHT, 0.3f), MOQ_F32, HEIGHT);
        for (int k = 0; moqi_get_kernels(k); k++)
            for (int act = 0; act <= (int)MOQ_ACT_BF16; act++) {
                for (int t = 0; t < 2; t++) {
                    moq_backend *be = backend_of(moqi_get_kernels(k)->name, (moq_act)act, t ? 5 : 1);
                    moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
                    CHECK(w != NULL && be->reserve(be, 1, &err) == MOQ_OK);
                    be->linear(be, w, x, 1, y[t]);
                    be->release_weight(be, w);
                    moq_backend_destroy(be);
                }
                CHECK(memcmp(y[0], y[1], sizeof y[0]) == 0);
            }
        layer_free(&l);
    }
}

/* A product in slices is the product, and nothing else is written: a layer of two parts, cut before, in and behind their border. */
static long wrong_slices(moq_backend *be, const moq_linear *parts, const float *x, int rows)
{
    static const int cuts[] = {0, 64, 256, 320, 384, 414};
    static float whole[20 * 414], y[20 * 414], was[20 * 414];
    moq_error err;
    moq_weight *w = be->prepare_linear(be, parts, 2, &err);
    long wrong = w == NULL;
    if (!w) return wrong;
    be->linear(be, w, x, rows, whole);
    for (int i = 0; i < rows * 414; i++) y[i] = was[i] = (float)(i + 1);
    for (int c = 4; c >= 0; c--) { /* any order */
        for (int i = 0; i < rows * 414; i++)
            if (i % 414 >= cuts[c] && i % 414 < cuts[c + 1]) was[i] = whole[i];
        be->linear_rows(be, w, x, rows, cuts[c], cuts[c + 1] - cuts[c], y);
        wrong += memcmp(y, was, sizeof *y * (size_t)(rows * 414)) != 0;
    }
    be->release_weight(be, w);
    return wrong;
}

static void test_backend_linear_rows(void)
{
    static const int counts[] = {1, 3, 20}, widths[] = {256, 320, 576}; /* of the last two a few rows share the last block */
    static float x[20 * 576];
    static uint16_t low[3 * 576 + 350 * 3];
    moq_error err;
    for (int i = 0; i < 20 * 576; i++) x[i] = test_normal();
    for (size_t i = 0; i < MOQI_COUNT(low); i++) low[i] = moq_bf16_encode(test_normal());
    for (size_t i = 0; i < MOQI_COUNT(layer_formats) * 3; i++) {
        const layer_format *f = &layer_formats[i / 3];
        const int cols = widths[i % 3];
        layer a, b;
        if (350 % f->row_unit || cols % f->col_unit) continue;
        layer_make(&a, f, 350, cols);
        layer_make(&b, &layer_formats[4], 64, cols);
        for (int way = 0; way < (cols == 256 ? 3 : 1); way++) { /* inputs wide, short, with a low-rank branch */
            moq_linear parts[2] = {a.w, b.w};
            if (way == 1) parts[0].scheme.input = input_formats[7].c;
            parts[0].input_scale = 0.001f;
            if (way == 2) {
                parts[0].scheme.lora_rank = 3;
                parts[0].lora_a.data = low;
                parts[0].lora_b.data = low + 3 * 256;
                parts[0].lora_a.dtype = parts[0].lora_b.dtype = MOQ_BF16;
                parts[0].lora_a.count = 3 * 256;
                parts[0].lora_b.count = 350 * 3;
            }
            for (int k = 0; moqi_get_kernels(k); k++)
                for (int n = 0; n < 3; n++) {
                    moq_backend *be = backend_of(moqi_get_kernels(k)->name, MOQ_ACT_AUTO, 1 + n % 2);
                    CHECK(be->reserve(be, 16, &err) == MOQ_OK); /* 20 rows go in two */
                    long wrong = wrong_slices(be, parts, x, counts[n]);
                    if (wrong) fprintf(stderr, "%s, %s, %d columns, inputs %d, %d rows: %ld slices wrong\n", moqi_get_kernels(k)->name, f->name, cols, way, counts[n], wrong);
                    CHECK_INT(wrong, 0);
                    moq_backend_destroy(be);
                }
        }
        layer_free(&a);
        layer_free(&b);
    }
}

/* An MLP in one call has the bits of the three calls that it stands for. -> how often it was not made of them: mid is as it was. */
static long check_mlp(const layer_format *f, int n, int cols, int rows, int threads, moq_act act, moq_activation kind, float factor, int at)
{
    enum { OUT = 96, ROWS = 530, COLS = 1152, MID = 384 };
    static float x[ROWS * COLS], both[ROWS * 2 * MID], mid[ROWS * MID], want[ROWS * OUT], got[ROWS * OUT];
    moq_activation_desc a = {kind, 7, 1.702f, 1};
    moq_error err;
    layer gate, up, down;
    moq_linear parts[2];
    long alone = 1;
    layer_make(&gate, f, n, cols);
    layer_make(&up, f, n, cols);
    layer_make(&down, f, OUT, n);
    if (factor == 1) gate.w.bias = layer_view(layer_floats(&gate, n, 0.3f), MOQ_F32, n); /* beside which small rows would not be small */
    if (rows % 2) down.w.pre_quant_scale = layer_view(layer_floats(&down, n, 1.0f), MOQ_F32, n);
    parts[0] = gate.w;
    parts[1] = up.w;
    for (int i = 0; i < rows * cols; i++) x[i] = test_normal();
    for (int i = 0; i < cols; i++) x[at % rows * cols + i] *= factor;
    moq_backend *be = backend_of(NULL, act, threads);
    moq_weight *w = be->prepare_linear(be, parts, 2, &err), *d = be->prepare_linear(be, &down.w, 1, &err);
    CHECK(w != NULL && d != NULL && be->mlp != NULL && be->reserve(be, 520, &err) == MOQ_OK); /* 530 rows go in two, of which the first takes two goes */
    be->linear(be, w, x, rows, both);
    be->activation(be, &a, both, rows, n, mid);
    be->linear(be, d, mid, rows, want);
    for (int i = 0; i < rows * n; i++) mid[i] = 12345;
    be->mlp(be, w, &a, d, x, rows, both, mid, got);
    for (int i = 0; i < rows * n; i++) alone = alone && mid[i] == 12345;
    if (memcmp(want, got, sizeof *got * (size_t)(rows * OUT)) != 0)
        fprintf(stderr, "%s, %d x %d, %d rows, activation %d, row %d times %g: another result\n", f->name, n, cols, rows, (int)kind, at, (double)factor);
    CHECK(memcmp(want, got, sizeof *got * (size_t)(rows * OUT)) == 0);
    be->release_weight(be, w);
    be->release_weight(be, d);
    moq_backend_destroy(be);
    layer_free(&gate);
    layer_free(&up);
    layer_free(&down);
    return alone;
}

static void test_backend_mlp(void)
{
    static const int counts[] = {1, 100, 129, 265, 530};
    const int tiles = strcmp(moqi_get_kernels(0)->name, "amx") == 0;
    for (size_t i = 0; i < MOQI_COUNT(layer_formats); i++) {
        const layer_format *f = &layer_formats[i];
        const int heavy = tiles || i == 4; /* without tiles these are the three calls */
        for (int n = 0; n < (heavy ? 5 : 1); n++)
            for (int high = 0; high < 2; high++)
                check_mlp(f, high ? 256 : 384, high ? 1152 : 576, counts[n], 1 + (n + high) % 3, n == 2 ? MOQ_ACT_BF16 : MOQ_ACT_AUTO,
                          (moq_activation)((int)(i + (size_t)n) % 4), 1, 0);
    }
    for (int high = 0; high < 2; high++) { /* rows of other sizes, and with what is no number */
        const int n = high ? 256 : 384, cols = high ? 1152 : 576;
        const layer_format *f = &layer_formats[4];
        CHECK_INT(check_mlp(f, n, cols, 144, 2, MOQ_ACT_AUTO, MOQ_SILU_MUL, 1, 0), tiles);
        CHECK_INT(check_mlp(f, n, cols, 144, 2, MOQ_ACT_AUTO, MOQ_SILU_MUL, 0, 143), tiles);
        CHECK_INT(check_mlp(f, n, cols, 144, 2, MOQ_ACT_AUTO, MOQ_SILU_MUL, 1e-3f, 5), tiles);
        CHECK_INT(check_mlp(f, n, cols, 144, 2, MOQ_ACT_AUTO, MOQ_SILU_MUL, 1e-12f, 17), 0);
        CHECK_INT(check_mlp(f, n, cols, 144, 2, MOQ_ACT_AUTO, MOQ_SILU_MUL, 1e12f, 31), 0);
        CHECK_INT(check_mlp(f, n, cols, 144, 2, MOQ_ACT_AUTO, MOQ_SILU_MUL, NAN, 32), 0);
    }
}

/* Copies of weights change no bit, lie one behind the other, and take what was said: whole layers, and rows and columns of them. */
static long woven_copies[2][5][2]; /* [inputs wide, short][MOQI_DOT_...][there are zero points] */

static void check_copies(const char *kernel, const char *what, const moq_linear *parts, int32_t count, const float *x)
{
    static const int counts[] = {1, 3, 20};
    static float want[20 * 414], got[20 * 414];
    moq_error err;
    moq_backend *be = backend_of(kernel, MOQ_ACT_AUTO, 2), *alone = backend_of(kernel, MOQ_ACT_AUTO, 1); /* tasks of other sizes */
    moq_weight *w = be->prepare_linear(be, parts, count, &err), *v = be->prepare_linear(be, parts, count, &err), *u = be->prepare_linear(be, parts, 1, &err);
    const int64_t rows = parts[0].rows + (count > 1 ? parts[1].rows : 0);
    long wrong = 0;
    CHECK(w && v && u && be->reserve(be, 20, &err) == MOQ_OK);
    if (!w || !v || !u) return;
    const size_t bytes = be->copy_bytes(be, parts, count), before = be->weight_bytes(be, v);
    for (int again = 0; again < 2; again++) {
        CHECK_INT(be->copy_weight(be, v, &err), MOQ_OK);
        CHECK_INT(be->copy_weight(be, u, &err), MOQ_OK);
        CHECK_INT(be->weight_bytes(be, v), before + bytes);
    }
#ifdef MOQI_X86
    const moqi_tiled *p = ((const moqi_weight *)(const void *)v)->part;
    if (p->woven) woven_copies[parts[0].scheme.input.elem != MOQ_NONE][moqi_dot_lie_512(p)][p->zeros != NULL]++;
#endif
    for (size_t n = 0; n < MOQI_COUNT(counts); n++) {
        be->linear(be, w, x, counts[n], want);
        be->linear(be, v, x, counts[n], got);
        wrong += memcmp(want, got, sizeof *got * (size_t)(counts[n] * rows)) != 0;
    }
    for (int first = 0; first < rows && be->linear_rows; first += 64) { /* some of them no multiple of 4 */
        const int64_t some = rows - first < 30 ? rows - first : 30;
        be->linear_rows(be, w, x, 1, first, some, want);
        be->linear_rows(be, v, x, 1, first, some, got);
        wrong += memcmp(want + first, got + first, sizeof *got * (size_t)some) != 0;
    }
    if (wrong) fprintf(stderr, "%s, %s: %ld products differ\n", kernel, what, wrong);
    CHECK_INT(wrong, 0);
    be->release_weight(be, v);
    be->linear(be, w, x, 1, want);
    be->linear(be, u, x, 1, got);
    CHECK(memcmp(want, got, sizeof *got * (size_t)parts[0].rows) == 0);
    v = alone->prepare_linear(alone, parts, 1, &err);
    CHECK(v && alone->copy_weight(alone, v, &err) == MOQ_OK);
    if (v) alone->linear(alone, v, x, 1, got);
    CHECK(v && memcmp(want, got, sizeof *got * (size_t)parts[0].rows) == 0);
    alone->release_weight(alone, v);
    moq_backend_destroy(alone);
    be->release_weight(be, u);
    CHECK(!moqi_cpu_of(be)->store);
    be->release_weight(be, w);
    moq_backend_destroy(be);
}

static void test_backend_copies(void)
{
    static const int widths[] = {256, 320, 384, 448, 576, 2432}; /* columns that fill no block: none, 64, 128, 192; more scales than lie together */
    static float x[20 * 2432];
    moq_error err;
    for (int i = 0; i < 20 * 2432; i++) x[i] = test_normal();
    layer l;
    layer_make(&l, &layer_formats[4], 350, 256);
    moq_backend *be = moq_cpu_backend(NULL, &err); /* with an allocator of the caller's every weight has a block of its own */
    moq_weight *w = be->prepare_linear(be, &l.w, 1, &err), *v = be->prepare_linear(be, &l.w, 1, &err);
    CHECK(be->copy_weight(be, w, &err) == MOQ_OK && be->copy_weight(be, v, &err) == MOQ_OK);
    const uint8_t *first = ((moqi_weight *)(void *)w)->part[0].codes, *second = ((moqi_weight *)(void *)v)->part[0].codes;
    CHECK_INT(second - first, (int64_t)be->copy_bytes(be, &l.w, 1) - MOQI_STORE_HEAD);
    be->release_weight(be, v);
    be->release_weight(be, w);
    moq_backend_destroy(be);
    layer_free(&l);
    for (size_t i = 0; i < MOQI_COUNT(layer_formats) * MOQI_COUNT(widths); i++) {
        const layer_format *f = &layer_formats[i / MOQI_COUNT(widths)];
        const int cols = widths[i % MOQI_COUNT(widths)];
        layer a, b;
        const int rows = cols > 600 ? 160 : 352;
        if (rows % f->row_unit || cols % f->col_unit) continue;
        layer_make(&a, f, rows, cols);
        layer_make(&b, &layer_formats[4], 62, cols);
        for (int k = 0; moqi_get_kernels(k); k++) {
            moq_linear parts[2] = {a.w, b.w}, cut[2] = {a.w, b.w};
            check_copies(moqi_get_kernels(k)->name, f->name, parts, 2, x);
            parts[0].scheme.input = input_formats[7].c;
            parts[0].input_scale = 0.001f;
            check_copies(moqi_get_kernels(k)->name, f->name, parts, 2, x);
            if (moq_slice_rows(&a.w, 96, 64, 1, &cut[0], &err) == MOQ_OK) check_copies(moqi_get_kernels(k)->name, "rows", cut, 2, x);
            if (moq_slice_cols(&a.w, 128, 128, &cut[0], &err) == MOQ_OK) check_copies(moqi_get_kernels(k)->name, "columns", cut, 1, x);
        }
        layer_free(&a);
        layer_free(&b);
    }
    for (int k = 0; moqi_get_kernels(k); k++)
        for (int i = 0; i < 2 && moqi_get_kernels(k)->zen; i++)
            CHECK(woven_copies[i][MOQI_DOT_E4M3][0] > 0 && woven_copies[i][MOQI_DOT_E8M0][0] > 0 && woven_copies[i][MOQI_DOT_F32][0] > 0 &&
                  woven_copies[i][MOQI_DOT_HALF][0] > 0 && woven_copies[i][MOQI_DOT_HALF][1] > 0);
}

/* What explain and copy_bytes foresee of a layer is what prepare finds. */
static void test_backend_foreseen(void)
{
    static const int inputs[] = {-1, 7, 0, 5};
    moq_error err;
    for (int at = 0; moqi_get_kernels(at / 4); at++) {
        moq_backend *be = backend_of(moqi_get_kernels(at / 4)->name, (moq_act)(at % 4), 1);
        for (size_t i = 0; i < MOQI_COUNT(layer_formats) * MOQI_COUNT(inputs); i++) {
            const int input = inputs[i % MOQI_COUNT(inputs)];
            moqi_tiled foreseen;
            layer l;
            layer_make(&l, &layer_formats[i / MOQI_COUNT(inputs)], 32, 256);
            if (input >= 0) { l.w.scheme.input = input_formats[input].c; l.w.input_scale = 0.01f; }
            moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
            if (w) { /* not every way to round goes with every format */
                const moqi_tiled *p = ((const moqi_weight *)(const void *)w)->part;
                moqi_foresee(moqi_cpu_of(be), &l.w, &foreseen);
                const int same = memcmp(p->way, foreseen.way, sizeof p->way) == 0 && memcmp(p->from, foreseen.from, sizeof p->from) == 0;
                if (!same) fprintf(stderr, "%s, rounding %d, %s, inputs %d: other ways than foreseen\n", be->name, at % 4, layer_formats[i / MOQI_COUNT(inputs)].name, input);
                CHECK(same);
            }
            be->release_weight(be, w);
            layer_free(&l);
        }
        moq_backend_destroy(be);
    }
}

/* Scales far from their neighbours', negative, subnormal, zero, times whole numbers, which no rounding of x changes: what short scales lose is less than 2^-13 of
   the largest of 64 columns. */
static long wrong_far_scales(moq_backend *be, const layer *l, const float *x, int rows)
{
    const int64_t cols = l->w.cols, groups = cols / 16;
    static float y[21 * 45];
    moq_error err;
    long wrong = 0;
    moq_weight *w = be->prepare_linear(be, &l->w, 1, &err);
    CHECK(w != NULL);
    if (!w) return 1;
    be->linear(be, w, x, rows, y);
    for (int64_t i = 0; i < rows * l->w.rows; i++) {
        const int64_t r = i % l->w.rows;
        const uint8_t *s = (const uint8_t *)l->w.scales.data + r * groups;
        double want = 0, allowed = 1e-6;
        for (int64_t g = 0; g < groups; g++) {
            double sum = 0, most = 0, own = layer_small(s[g], 4, 3, 7);
            for (int64_t k = g / 4 * 4; k < g / 4 * 4 + 4 && k < groups; k++) most = fmax(most, fabs(layer_small(s[k], 4, 3, 7)));
            for (int64_t c = 16 * g; c < 16 * g + 16; c++) sum += l->exact[r * cols + c] * (double)x[i / l->w.rows * cols + c];
            for (int64_t c = 16 * g; c < 16 * g + 16; c++) allowed += 2e-6 * fabs(own * l->exact[r * cols + c] * (double)x[i / l->w.rows * cols + c]);
            want += own * sum;
            allowed += most > fabs(own) ? ldexp(most * fabs(sum), -13) : 0;
        }
        wrong += !(fabs(want - (double)y[i / l->w.rows * l->w.rows + r]) <= allowed);
    }
    be->release_weight(be, w);
    return wrong;
}

static void test_backend_far_scales(void)
{
    enum { COLS = 592 };
    static const int counts[] = {1, 4, 5, 8, 13, 21};
    static float x[21 * COLS];
    moq_error err;
    layer l;
    for (int i = 0; i < 21 * COLS; i++) x[i] = i % 16 == 3 ? 127 : (float)((int)(test_random() % 255) - 127);
    layer_make(&l, &layer_formats[4], 45, COLS);
    l.w.scheme.input = input_formats[7].c;
    l.w.input_scale = 0.001f;
    uint8_t *s = (uint8_t *)(uintptr_t)l.w.scales.data;
    for (int i = 0; i < 45 * COLS; i++) l.exact[i] /= layer_small(s[i / 16], 4, 3, 7);
    for (int kind = 0; kind < 4; kind++) {
        for (int i = 0; i < 45 * COLS / 16; i++) { /* any; the smallest normal ones beside 448; subnormal or zero beside others; all of these */
            const unsigned any = test_random() % 127, tiny = test_random() % 8, sign = test_random() % 2 * 128;
            s[i] = (uint8_t)(sign | (kind == 0 ? any : kind == 1 ? i % 2 ? 8 + tiny : 0x7e : kind == 2 && i % 2 ? any : tiny));
        }
        for (int k = 0; moqi_get_kernels(k); k++) {
            moq_backend *be = backend_of(moqi_get_kernels(k)->name, MOQ_ACT_AUTO, 1);
            CHECK(be->reserve(be, 21, &err) == MOQ_OK);
            for (size_t n = 0; n < MOQI_COUNT(counts); n++) {
                long wrong = wrong_far_scales(be, &l, x, counts[n]);
                if (wrong) fprintf(stderr, "%s, scales %d, %d rows: %ld wrong\n", be->name, kind, counts[n], wrong);
                CHECK_INT(wrong, 0);
            }
            moq_backend_destroy(be);
        }
    }
    layer_free(&l);
}

/* Inputs so large that products with codes alone, before their scale, are near the end of F32 or beyond: results of a few rows that fit are right. FP8
   weights of every kind of scale. (Many rows go through tiles, whose sums of codes times inputs have to fit.) */
static void test_backend_far_inputs(void)
{
    enum { HEIGHT = 37, COLS = 640, ROWS = 4 };
    static const int formats[] = {11, 12, 14, 15};
    static float x[ROWS * COLS], y[ROWS * HEIGHT];
    moq_error err;
    for (size_t i = 0; i < MOQI_COUNT(formats); i++) {
        layer l;
        layer_make(&l, &layer_formats[formats[i]], HEIGHT, COLS);
        double most = 0;
        for (int j = 0; j < HEIGHT * COLS; j++) most = fmax(most, fabs(l.exact[j]));
        for (int far_out = 0; far_out < 2; far_out++) {
            const double size = far_out ? 4e35 / most : 1; /* sums of 640 products reach some 1e37 */
            for (int j = 0; j < ROWS * COLS; j++) x[j] = (float)((double)test_normal() * fmin(size, 1e37));
            for (int k = 0; moqi_get_kernels(k); k++) {
                long wrong = 0;
                moq_backend *be = backend_of(moqi_get_kernels(k)->name, MOQ_ACT_AUTO, 1);
                moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
                CHECK(w != NULL && be->reserve(be, ROWS, &err) == MOQ_OK);
                for (int rows = 1; rows <= ROWS && w; rows++) {
                    be->linear(be, w, x, rows, y);
                    for (int j = 0; j < rows * HEIGHT; j++) {
                        double want = 0, all = 0;
                        for (int c = 0; c < COLS; c++) {
                            const double v = l.exact[j % HEIGHT * COLS + c] * (double)x[j / HEIGHT * COLS + c];
                            want += v;
                            all += fabs(v);
                        }
                        wrong += !(fabs(want - (double)y[j]) <= all / 128);
                    }
                }
                if (wrong) fprintf(stderr, "%s, %s, inputs about %g, weights up to %g: %ld wrong\n", moqi_get_kernels(k)->name, layer_formats[formats[i]].name,
                                   fmin(size, 1e37), most, wrong);
                CHECK_INT(wrong, 0);
                be->release_weight(be, w);
                moq_backend_destroy(be);
            }
        }
        layer_free(&l);
    }
}

/* A scale that is NaN with all bits set makes its rows NaN, whatever the kernel does with its bits. */
static void test_backend_scale_of_ones(void)
{
    enum { HEIGHT = 40, COLS = 512, ROWS = 40 };
    static const int counts[] = {1, 3, ROWS};
    static float x[ROWS * COLS], y[ROWS * HEIGHT];
    moq_error err;
    for (int i = 0; i < ROWS * COLS; i++) x[i] = test_normal();
    for (size_t i = 0; i < MOQI_COUNT(layer_formats); i++) {
        const layer_format *f = &layer_formats[i];
        layer l;
        if (f->scale != MOQ_F32 || HEIGHT % f->row_unit || COLS % f->col_unit) continue;
        layer_make(&l, f, HEIGHT, COLS);
        memset((void *)(uintptr_t)l.w.scales.data, 0xff, (size_t)l.w.scales.count * 4);
        for (int k = 0; moqi_get_kernels(k); k++) {
            moq_backend *be = backend_of(moqi_get_kernels(k)->name, MOQ_ACT_AUTO, 1);
            moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
            CHECK(w != NULL && be->reserve(be, ROWS, &err) == MOQ_OK);
            for (int n = 0; n < 3 && w; n++) {
                int numbers = 0;
                be->linear(be, w, x, counts[n], y);
                for (int j = 0; j < counts[n] * HEIGHT; j++) numbers += y[j] == y[j];
                if (numbers) fprintf(stderr, "%s, %s, %d rows: %d numbers\n", moqi_get_kernels(k)->name, f->name, counts[n], numbers);
                CHECK_INT(numbers, 0);
            }
            be->release_weight(be, w);
            moq_backend_destroy(be);
        }
        layer_free(&l);
    }
}

/* So many rows that a task takes 128 of them: the low-rank branch gets by with the scratch memory of a task. */
static void test_backend_tall_low_rank(void)
{
    enum { ROWS = 40, COLS = 64, HEIGHT = 1100 };
    layer l;
    moq_error err;
    layer_make(&l, &layer_formats[4], HEIGHT, COLS);
    l.w.scheme.lora_rank = 3;
    l.w.lora_a = layer_view(layer_floats(&l, 3 * COLS, 0.1f), MOQ_F32, 3 * COLS);
    l.w.lora_b = layer_view(layer_floats(&l, HEIGHT * 3, 0.1f), MOQ_F32, HEIGHT * 3);
    float *x = (float *)malloc(sizeof(float) * ROWS * COLS), *y = (float *)malloc(sizeof(float) * ROWS * HEIGHT), *z = (float *)malloc(sizeof(float) * HEIGHT);
    for (int i = 0; i < ROWS * COLS; i++) x[i] = test_normal();
    for (int k = 0; moqi_get_kernels(k); k++)
        for (int threads = 1; threads < 3; threads++) {
            moq_backend *be = backend_of(moqi_get_kernels(k)->name, MOQ_ACT_WIDE, threads);
            moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
            CHECK(w != NULL);
            if (w) be->linear(be, w, x, ROWS, y);
            for (int r = 0; w && r < ROWS; r++) {
                be->linear(be, w, x + r * COLS, 1, z);
                CHECK(close_floats(z, y + r * HEIGHT, HEIGHT));
            }
            be->release_weight(be, w);
            moq_backend_destroy(be);
        }
    layer_free(&l);
    free(x); free(y); free(z);
}

/* A job system such as a caller has: the same pool, started and owned by the caller. */
static void callers_run(void *user, int tasks, void (*task)(void *arg, int index, int worker), void *arg) { moqi_pool_run(user, tasks, task, arg); }

/* The least of 20 runs after one another: of one row, so that the products are short and calls many. */
static double least_time(moq_backend *be, const moq_weight *w, const float *x, float *y)
{
    double least = 1e9;
    for (int i = 0; i < 20; i++) {
        double start = moq_seconds(), t;
        for (int k = 0; k < 4; k++) be->linear(be, w, x, 1, y);
        t = moq_seconds() - start;
        least = t < least ? t : least;
    }
    return least;
}

/* A caller's parallel-for gives the same bits; what it costs is told (the aim: at most 5 %). Both sides are tried in turn until the best of
   each agree, for two seconds at most. */
static void test_backend_callers_jobs(void)
{
    moq_error err;
    moq_cpu_desc d;
    layer l;
    double own = 1e9, callers = 1e9, start = moq_seconds();
    float x[576], *y = (float *)malloc(3072 * sizeof *y), first[3072];
    moqi_pool *pool = moqi_pool_create(2, NULL, &err);
    memset(&d, 0, sizeof d);
    d.parallel.run = callers_run;
    d.parallel.workers = 2;
    d.parallel.user = pool;
    moq_backend *a = backend_of(NULL, MOQ_ACT_AUTO, 2), *b = moq_cpu_backend(&d, &err);
    layer_make(&l, &layer_formats[4], 3072, 576);
    for (int i = 0; i < 576; i++) x[i] = test_normal();
    moq_weight *wa = a->prepare_linear(a, &l.w, 1, &err), *wb = b->prepare_linear(b, &l.w, 1, &err);
    CHECK(wa && wb);
    do {
        double t = least_time(a, wa, x, y);
        own = t < own ? t : own;
        t = least_time(b, wb, x, y);
        callers = t < callers ? t : callers;
    } while (callers > 1.05 * own && moq_seconds() - start < 2);
    printf("note: a caller's parallel-for takes %.3f of the built-in pool's time\n", callers / own); /* not judged: other programs may run */
    memcpy(first, y, sizeof first);
    memset(y, 0, 3072 * sizeof *y);
    a->linear(a, wa, x, 1, y);
    CHECK(a->sync(a, &err) == MOQ_OK && memcmp(first, y, sizeof first) == 0);
    a->release_weight(a, wa);
    b->release_weight(b, wb);
    moq_backend_destroy(a);
    moq_backend_destroy(b);
    moqi_pool_destroy(pool);
    layer_free(&l);
    free(y);
}

static void test_backend_refuses(void)
{
    moq_error err;
    moq_cpu_desc d;
    layer l;
    memset(&d, 0, sizeof d);
    d.kernel = "abacus";
    CHECK(moq_cpu_backend(&d, &err) == NULL && err.code == MOQ_E_ARG && strstr(err.text, "abacus") && strstr(err.text, "reference"));
    moq_backend *be = backend_of(NULL, MOQ_ACT_STORED, 1);
    layer_make(&l, &layer_formats[4], 16, 64);
    moq_linear two[2] = {l.w, l.w}, bad = l.w;
    two[1].cols = 32;
    CHECK(be->prepare_linear(be, two, 2, &err) == NULL && err.code == MOQ_E_SHAPE && strstr(err.text, "nvfp4"));
    CHECK(be->prepare_linear(be, two, 0, &err) == NULL && err.code == MOQ_E_ARG);
    bad.experts = 4;
    CHECK(be->supports(be, &bad, &err) == MOQ_E_ARG);
    bad = l.w;
    bad.scheme.input = input_formats[0].c; /* static, but no scale */
    CHECK(be->supports(be, &bad, &err) == MOQ_E_MISSING);
    bad.scheme.input.elem = MOQ_F64;
    CHECK(be->supports(be, &bad, &err) == MOQ_E_UNSUPPORTED);
    bad = l.w;
    bad.scales.data = NULL;
    CHECK(be->supports(be, &bad, &err) == MOQ_E_MISSING);
    bad = l.w;
    bad.scheme.weight.elem = MOQ_I64;
    CHECK(be->supports(be, &bad, &err) == MOQ_E_UNSUPPORTED && strstr(err.text, "I64"));
    bad = l.w;
    bad.scheme.input = input_formats[7].c;
    bad.input_scale = 0.01f;
    char text[200];
    size_t n = be->explain(be, &bad, text, sizeof text);
    CHECK(n == strlen(text) && strstr(text, "nvfp4") && strstr(text, "as stored"));
    CHECK(be->explain(be, &bad, text, 5) == n && strlen(text) == 4);
    moq_backend_destroy(be);
    moq_backend_destroy(NULL);
    layer_free(&l);
    CHECK_INT(test_state.live_allocs, 0);
}

static void test_backend_embed(void)
{
    moq_backend *be = backend_of(NULL, MOQ_ACT_WIDE, 2);
    moq_error err;
    layer l;
    int32_t ids[5] = {3, 0, 99, 100, -1};
    float y[5 * 64];
    layer_make(&l, &layer_formats[4], 100, 64);
    moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
    be->embed(be, w, ids, 5, 2.5f, y);
    for (int i = 0; i < 5; i++)
        for (int c = 0; c < 64; c++) CHECK(y[i * 64 + c] == (ids[i] >= 0 && ids[i] < 100 ? (float)l.exact[ids[i] * 64 + c] * 2.5f : 0));
    be->release_weight(be, w);
    moq_backend_destroy(be);
    layer_free(&l);
}

/* ---- mixtures of experts ---- */

typedef struct mixture { layer gate[12], up[12], down[12]; moq_linear g[12], u[12], d[12]; moq_moe moe; float bias[12]; } mixture;

/* extras < 0: all weights in BF16 */
static void mixture_make(mixture *m, int experts, int top, moq_activation kind, int extras)
{
    memset(m, 0, sizeof *m);
    for (int e = 0; e < experts; e++) {
        layer_make(&m->gate[e], &layer_formats[extras < 0 ? 2 : 4], 40, 96);
        layer_make(&m->up[e], &layer_formats[extras < 0 ? 2 : 4], 40, 96);
        layer_make(&m->down[e], &layer_formats[extras > 0 ? 11 : 2], 50, 40);
        layer *all[3] = {&m->gate[e], &m->up[e], &m->down[e]};
        for (int i = 0; extras > 0 && i < 3; i++) {
            moq_linear *w = &all[i]->w;
            w->bias = layer_view(layer_floats(all[i], w->rows, 0.3f), MOQ_F32, w->rows);
            if (extras > 1) { /* gate and up want different inputs, down is rotated */
                w->pre_quant_scale = layer_view(layer_floats(all[i], w->cols, 1), MOQ_F32, w->cols);
                w->lora_a = layer_view(layer_floats(all[i], 2 * w->cols, 0.1f), MOQ_F32, 2 * w->cols);
                w->lora_b = layer_view(layer_floats(all[i], 2 * w->rows, 0.1f), MOQ_F32, 2 * w->rows);
                w->scheme.lora_rank = 2;
                w->scheme.pre_quant_scale = 1;
            }
        }
        m->g[e] = m->gate[e].w;
        m->u[e] = m->up[e].w;
        m->d[e] = m->down[e].w;
        m->bias[e] = test_uniform() * 0.2f;
    }
    m->moe.name = "moe";
    m->moe.routing.experts = experts;
    m->moe.routing.top_k = top;
    m->moe.routing.renormalize = 1;
    m->moe.routing.score = extras > 0 ? MOQ_SCORE_SIGMOID : MOQ_SCORE_SOFTMAX;
    if (extras > 0) m->moe.routing.bias = layer_view(m->bias, MOQ_F32, experts);
    m->moe.activation.kind = kind;
    m->moe.activation.limit = 7;
    m->moe.activation.alpha = 1.702f;
    m->moe.activation.beta = 1;
    m->moe.gate = kind == MOQ_RELU2 ? NULL : m->g;
    m->moe.up = m->u;
    m->moe.down = m->d;
}

static void mixture_free(mixture *m)
{
    for (int e = 0; e < 12; e++) { layer_free(&m->gate[e]); layer_free(&m->up[e]); layer_free(&m->down[e]); }
}

/* One layer of an expert in double, inputs wide or in BF16. */
static void oracle_expert_layer(const layer *l, const float *x, int bf16, double *y)
{
    float t[96];
    for (int64_t c = 0; c < l->w.cols; c++) t[c] = l->w.pre_quant_scale.data ? x[c] * ((const float *)l->w.pre_quant_scale.data)[c] : x[c];
    for (int64_t c = 0; bf16 && c < l->w.cols; c++) t[c] = moq_bf16_decode(moq_bf16_encode(t[c]));
    for (int64_t r = 0; r < l->w.rows; r++) {
        double bound;
        y[r] = oracle_output(l, r, t, t, &bound);
    }
}

/* y [rows, 50] against all of it in double, within `part` of what it holds. */
static void check_mixture(const mixture *m, int rows, const float *x, const float *logits, int bf16, double part, const float *y)
{
    const int experts = m->moe.routing.experts, top = m->moe.routing.top_k;
    for (int r = 0; r < rows; r++, y += 50) {
        float scratch[60], weight[3], mid[40];
        int32_t index[3];
        double want[50] = {0}, g[40], u[40], d[50], size = 0, gap = 0;
        moqi_route(&m->moe.routing, m->moe.routing.bias.data ? m->bias : NULL, logits + r * experts, scratch, index, weight);
        for (int i = 0; i < top; i++) {
            oracle_expert_layer(&m->gate[index[i]], x + r * 96, bf16, g);
            oracle_expert_layer(&m->up[index[i]], x + r * 96, bf16, u);
            for (int j = 0; j < 40; j++) mid[j] = moqi_activate(&m->moe.activation, (float)(m->moe.gate ? g[j] : u[j]), (float)u[j]);
            oracle_expert_layer(&m->down[index[i]], mid, bf16, d);
            for (int c = 0; c < 50; c++) want[c] += (double)weight[i] * d[c];
        }
        for (int c = 0; c < 50; c++) { size += want[c] * want[c]; gap += (want[c] - (double)y[c]) * (want[c] - (double)y[c]); }
        CHECK(gap <= part * size && size > 0);
    }
}

/* Experts that enough rows choose for tiles. */
static void test_backend_moe_tiles(void)
{
#if defined(MOQI_AMX) && defined(AMX_H)
    enum { ROWS = 75 };
    uint32_t flags = moqi_cpu_flags();
    struct sigaction before;
    mixture m;
    moq_error err;
    float *x = (float *)malloc(sizeof *x * ROWS * 96), logits[ROWS * 3], *y = (float *)malloc(sizeof *y * ROWS * 50);
    if (!(flags & MOQI_CPU_VNNI) || !(flags & MOQI_CPU_VBMI)) { printf("skipped: tiles, for want of AVX-512 with VNNI and VBMI\n"); test_state.skipped++; free(x); free(y); return; }
    sigaction(SIGILL, NULL, &before);
    amx_emulate();
    for (int turn = 0; turn < 4; turn++) {
        const int kind = turn % 2 ? (int)MOQ_RELU2 : 0, wide = turn / 2;
        moq_backend *be = backend_of("avx512vnni", wide ? MOQ_ACT_WIDE : MOQ_ACT_BF16, 2);
        moqi_cpu_of(be)->k = &moqi_amx_kernels;
        CHECK(be->reserve(be, ROWS, &err) == MOQ_OK);
        mixture_make(&m, 3, 2, (moq_activation)kind, -wide);
        for (int i = 0; i < ROWS * 96; i++) x[i] = test_normal();
        for (int i = 0; i < ROWS * 3; i++) logits[i] = test_normal();
        moq_experts *p = be->prepare_moe(be, &m.moe, &err);
        CHECK(p != NULL);
        for (int rows = ROWS; p && rows > 4; rows = rows > 30 ? 30 : rows - 3) { /* experts with little more than a tile of 16 rows, and with a part of one */
            be->moe(be, p, x, logits, rows, y);
            check_mixture(&m, rows, x, logits, !wide, wide ? 1e-11 : 1e-5, y);
        }
        be->release_moe(be, p);
        moq_backend_destroy(be);
        mixture_free(&m);
    }
    sigaction(SIGILL, &before, NULL);
    free(x);
    free(y);
#else
    printf("skipped: tiles, not for this system\n");
    test_state.skipped++;
#endif
}

/* Experts of many columns that few rows choose, in every format and set of kernels: inputs in tiles take the room of 16 rows. Each row alone, by other
   ways, gives the same but for the rounding of inputs. */
static void test_backend_moe_few(void)
{
    enum { EXPERTS = 3, COLS = 640, INNER = 256, OUT = 64, MOST = 8 };
    float *x = (float *)malloc(sizeof *x * MOST * COLS), logits[MOST * EXPERTS], y[MOST * OUT], z[MOST * OUT];
    for (int i = 0; i < MOST * COLS; i++) x[i] = test_normal();
    for (int i = 0; i < MOST * EXPERTS; i++) logits[i] = test_normal();
    for (size_t f = 0; f < MOQI_COUNT(layer_formats); f++) {
        mixture m;
        memset(&m, 0, sizeof m);
        for (int e = 0; e < EXPERTS; e++) {
            layer_make(&m.gate[e], &layer_formats[f], INNER, COLS);
            layer_make(&m.up[e], &layer_formats[f], INNER, COLS);
            layer_make(&m.down[e], &layer_formats[f], OUT, INNER);
            m.g[e] = m.gate[e].w;
            m.u[e] = m.up[e].w;
            m.d[e] = m.down[e].w;
        }
        m.moe.name = "moe";
        m.moe.routing.experts = m.moe.routing.top_k = EXPERTS;
        m.moe.gate = m.g;
        m.moe.up = m.u;
        m.moe.down = m.d;
        for (int k = 0; moqi_get_kernels(k); k++) {
            moq_error err;
            moq_backend *be = backend_of(moqi_get_kernels(k)->name, MOQ_ACT_AUTO, 2);
            CHECK(be->reserve(be, MOST, &err) == MOQ_OK);
            moq_experts *p = be->prepare_moe(be, &m.moe, &err);
            if (!p) fprintf(stderr, "%s: %s\n", layer_formats[f].name, err.text);
            CHECK(p != NULL);
            for (int r = 0; p && r < MOST; r++) be->moe(be, p, x + r * COLS, logits + r * EXPERTS, 1, z + r * OUT);
            for (int rows = 4; p && rows <= MOST; rows++) {
                double gap = 0, size = 0;
                be->moe(be, p, x, logits, rows, y);
                for (int i = 0; i < rows * OUT; i++) { gap += ((double)y[i] - (double)z[i]) * ((double)y[i] - (double)z[i]); size += (double)z[i] * (double)z[i]; }
                if (!(gap <= 4e-4 * size)) fprintf(stderr, "%s, %s, %d rows: off by %.2g\n", be->name, layer_formats[f].name, rows, sqrt(gap / size));
                CHECK(gap <= 4e-4 * size && size > 0);
            }
            be->release_moe(be, p);
            moq_backend_destroy(be);
        }
        mixture_free(&m);
    }
    free(x);
}

static void test_backend_moe(void)
{
    enum { ROWS = 19, OUT = 50, COLS = 96 };
    for (int k = 0; moqi_get_kernels(k); k++)
        for (int kind = 0; kind <= (int)MOQ_RELU2; kind++)
            for (int extras = 0; extras < 4; extras++) { /* 3: as 2, inputs in BF16 */
                mixture m;
                moq_error err;
                const int bf16 = extras > 2;
                moq_backend *be = backend_of(moqi_get_kernels(k)->name, bf16 ? MOQ_ACT_BF16 : MOQ_ACT_WIDE, 2);
                mixture_make(&m, 12, 3, (moq_activation)kind, extras);
                float x[ROWS * COLS], logits[ROWS * 12], y[ROWS * OUT], z[ROWS * OUT];
                for (int i = 0; i < ROWS * COLS; i++) x[i] = test_normal();
                for (int i = 0; i < ROWS * 12; i++) logits[i] = test_normal();
                moq_experts *p = be->prepare_moe(be, &m.moe, &err);
                CHECK(p != NULL);
                if (!p) { fprintf(stderr, "%s\n", err.text); return; }
                long before = test_state.total_allocs;
                be->moe(be, p, x, logits, ROWS, y);
                CHECK_INT(test_state.total_allocs, before);
                for (int r = 0; r < ROWS; r++) be->moe(be, p, x + r * COLS, logits + r * 12, 1, z + r * OUT);
                CHECK(close_floats(y, z, ROWS * OUT)); /* a row does not depend on its batch, but for the order of sums */
                check_mixture(&m, ROWS, x, logits, bf16, bf16 ? 1e-5 : 1e-9, y); /* what meets down may be rounded either way */
                be->release_moe(be, p);
                moq_backend_destroy(be);
                mixture_free(&m);
            }
}

/* Inputs of experts rounded as stored: the same as their layers one by one. */
static void test_backend_moe_stored(void)
{
    enum { ROWS = 40, OUT = 50, COLS = 96 };
    mixture m;
    moq_error err;
    moq_backend *be = backend_of(NULL, MOQ_ACT_STORED, 3);
    mixture_make(&m, 8, 2, MOQ_SILU_MUL, 0);
    for (int e = 0; e < 8; e++) { /* gate and up of odd experts have scales of their own */
        m.g[e].scheme.input = m.u[e].scheme.input = input_formats[7].c;
        m.g[e].input_scale = 0.001f;
        m.u[e].input_scale = e % 2 ? 0.002f : 0.001f;
        m.d[e].scheme.input = input_formats[2].c;
    }
    float x[ROWS * COLS], logits[ROWS * 8], y[ROWS * OUT];
    for (int i = 0; i < ROWS * COLS; i++) x[i] = test_normal();
    for (int i = 0; i < ROWS * 8; i++) logits[i] = test_normal();
    moq_experts *p = be->prepare_moe(be, &m.moe, &err);
    be->moe(be, p, x, logits, ROWS, y);
    for (int r = 0; r < ROWS; r++) {
        float scratch[40], weight[2], both[80], mid[40], out[OUT], want[OUT] = {0};
        int32_t index[2];
        moqi_route(&m.moe.routing, NULL, logits + r * 8, scratch, index, weight);
        for (int i = 0; i < 2; i++) {
            moq_linear pair[2] = {m.g[index[i]], m.u[index[i]]};
            moq_weight *gu = be->prepare_linear(be, pair, 2, &err), *d = be->prepare_linear(be, &m.d[index[i]], 1, &err);
            be->linear(be, gu, x + r * COLS, 1, both);
            be->activation(be, &m.moe.activation, both, 1, 40, mid);
            be->linear(be, d, mid, 1, out);
            for (int c = 0; c < OUT; c++) want[c] += weight[i] * out[c];
            be->release_weight(be, gu);
            be->release_weight(be, d);
        }
        for (int c = 0; c < OUT; c++) CHECK(fabsf(want[c] - y[r * OUT + c]) <= 1e-5f * (1 + fabsf(want[c])));
    }
    be->release_moe(be, p);
    m.moe.routing.top_k = 9;
    CHECK(be->prepare_moe(be, &m.moe, &err) == NULL && err.code == MOQ_E_ARG);
    m.moe.routing.top_k = 2;
    m.moe.routing.groups = 3;
    m.moe.routing.top_groups = 1;
    CHECK(be->prepare_moe(be, &m.moe, &err) == NULL && err.code == MOQ_E_ARG);
    m.moe.routing.groups = 0;
    m.moe.gate = NULL;
    CHECK(be->prepare_moe(be, &m.moe, &err) == NULL && err.code == MOQ_E_ARG);
    m.moe.gate = m.g;
    m.d[3].cols = 16;
    CHECK(be->prepare_moe(be, &m.moe, &err) == NULL && err.code == MOQ_E_SHAPE);
    moq_backend_destroy(be);
    CHECK_INT(test_state.live_allocs, 0);
    mixture_free(&m);
}

/* ---- attention ---- */

enum { SLOTS = 3, CAPACITY = 90, LONG = 1300, KV_HEADS = 2, MAX_DIM = 64 };

typedef struct history { float k[SLOTS][LONG][KV_HEADS * MAX_DIM], v[SLOTS][LONG][KV_HEADS * MAX_DIM]; } history; /* as the cache should hold them */

static void keep_bf16(float *x, int n)
{
    for (int i = 0; i < n; i++) x[i] = moq_bf16_decode(moq_bf16_encode(x[i]));
}

/* Append the rows of a batch and remember what a cache of this format keeps of them. */
static void append_rows(moq_backend *be, moq_kv_cache *cache, const moq_kv_desc *d, const moq_batch *b, history *h)
{
    int dim = d->head_dim, vdim = d->value_dim ? d->value_dim : dim;
    int half = d->bf16 && be->kv_read(be, cache, 0, 1, NULL) != (size_t)(KV_HEADS * (dim + vdim)) * 4; /* the reference keeps F32 */
    static float k[64 * 200], v[64 * 200];
    for (int r = 0; r < b->rows; r++)
        for (int i = 0; i < 200; i++) { k[r * 200 + i] = test_normal(); v[r * 200 + i] = test_normal(); }
    for (int r = 0; r < b->rows; r++)
        for (int n = 0; n < KV_HEADS; n++) {
            const float *ks = (const float *)d->kv.k_scale.data, *vs = (const float *)d->kv.v_scale.data, *kb = (const float *)d->kv.k_bias.data, *vb = (const float *)d->kv.v_bias.data;
            float kscale = ks ? ks[d->kv.k_scale.count > 1 ? n : 0] : 1, vscale = vs ? vs[d->kv.v_scale.count > 1 ? n : 0] : 1;
            moq_kv_format vf = d->kv.format == MOQ_KV_NVFP4_ROTATE ? MOQ_KV_NVFP4 : d->kv.format;
            moq_round_kv(d->kv.format, kscale, kb ? kb + n * dim : NULL, k + r * 200 + n * dim, dim, h->k[b->slot[r]][b->pos[r]] + n * dim);
            moq_round_kv(vf, vscale, vb ? vb + n * vdim : NULL, v + r * 200 + n * vdim, vdim, h->v[b->slot[r]][b->pos[r]] + n * vdim);
            if (half) keep_bf16(h->k[b->slot[r]][b->pos[r]] + n * dim, dim);
            if (half) keep_bf16(h->v[b->slot[r]][b->pos[r]] + n * vdim, vdim);
        }
    be->kv_append(be, cache, b, k, 200, v, 200);
}

static void check_attention(moq_backend *be, moq_kv_cache *cache, const moq_kv_desc *d, const moq_batch *b, const history *h, int heads, int window, float cap, const float *sinks)
{
    int dim = d->head_dim, vdim = d->value_dim ? d->value_dim : dim;
    static float q[64 * 600], y[64 * 600], again[64 * 600];
    moq_attention_desc a;
    memset(&a, 0, sizeof a);
    for (int i = 0; i < b->rows * 600; i++) q[i] = test_normal();
    a.cache = cache;
    a.q = q;
    a.y = y;
    a.q_stride = 600;
    a.y_stride = 600;
    a.heads = heads;
    a.window = window;
    a.softcap = cap;
    a.sinks = sinks;
    a.scale = cap > 0 ? 0.2f : 0;
    double scale = cap > 0 ? (double)0.2f : 1 / sqrt((double)dim);
    long before = test_state.total_allocs, wrong = 0;
    be->attention(be, b, &a);
    CHECK_INT(test_state.total_allocs, before);
    for (int r = 0; r < b->rows; r++)
        for (int n = 0; n < heads; n++) {
            int kv = n / (heads / KV_HEADS), s = b->slot[r], from = window > 0 && b->pos[r] - window + 1 > 0 ? b->pos[r] - window + 1 : 0;
            double p[LONG], max = sinks ? (double)sinks[n] : -1e300, sum = 0;
            for (int t = from; t <= b->pos[r]; t++) {
                p[t] = 0;
                for (int i = 0; i < dim; i++) p[t] += (double)q[r * 600 + n * dim + i] * (double)h->k[s][t][kv * dim + i];
                p[t] *= scale;
                if (cap > 0) p[t] = (double)cap * tanh(p[t] / (double)cap);
                if (p[t] > max) max = p[t];
            }
            if (sinks) sum = exp((double)sinks[n] - max);
            for (int t = from; t <= b->pos[r]; t++) sum += p[t] = exp(p[t] - max);
            for (int i = 0; i < vdim; i++) {
                double want = 0, size = 0;
                for (int t = from; t <= b->pos[r]; t++) { want += p[t] / sum * (double)h->v[s][t][kv * vdim + i]; size += p[t] / sum * fabs((double)h->v[s][t][kv * vdim + i]); }
                wrong += !(fabs(want - (double)y[r * 600 + n * vdim + i]) <= 4e-5 * size + 1e-6);
            }
        }
    if (wrong) fprintf(stderr, "%s, heads %d, window %d, cap %g: %ld wrong\n", moq_kv_format_name(d->kv.format), heads, window, (double)cap, wrong);
    CHECK_INT(wrong, 0);
    moq_batch one = *b;
    one.rows = 1;
    for (int r = 0; r < b->rows; r++) { /* row by row: the same bits */
        one.slot = b->slot + r;
        one.pos = b->pos + r;
        a.q = q + r * 600;
        a.y = again + r * 600;
        be->attention(be, &one, &a);
        CHECK(memcmp(again + r * 600, y + r * 600, (size_t)(heads * vdim) * sizeof(float)) == 0);
    }
}

static void test_backend_attention(void)
{
    static history h;
    float kscale[2] = {0.02f, 0.05f}, vscale[1] = {0.03f}, bias[KV_HEADS * MAX_DIM], sinks[34];
    for (int i = 0; i < KV_HEADS * MAX_DIM; i++) bias[i] = test_uniform();
    for (int i = 0; i < 34; i++) sinks[i] = test_normal();
    for (int k = 0; moqi_get_kernels(k); k++)
        for (int f = 0; f <= (int)MOQ_KV_FORMAT_COUNT; f++) /* the last: wide as BF16 */
            for (int shape = 0; shape < 4; shape++) { /* FP4 rows of 2 or 3 numbers are as many bytes */
                static const int dims[4][3] = {{64, 0, 2}, {32, 48, 6}, {16, 0, 34}, {2, 3, 4}}; /* head_dim, value_dim, heads */
                moq_backend *be = backend_of(moqi_get_kernels(k)->name, MOQ_ACT_WIDE, 2);
                moq_error err;
                moq_kv_desc d;
                memset(&d, 0, sizeof d);
                d.name = "attention";
                d.slots = SLOTS;
                d.capacity = CAPACITY;
                d.kv_heads = KV_HEADS;
                d.head_dim = dims[shape][0];
                d.value_dim = dims[shape][1];
                d.kv.format = (moq_kv_format)(f % (int)MOQ_KV_FORMAT_COUNT);
                d.bf16 = f > 0 && d.kv.format == MOQ_KV_WIDE;
                d.kv.k_scale = layer_view(kscale, MOQ_F32, 2);
                d.kv.v_scale = layer_view(vscale, MOQ_F32, 1);
                d.kv.k_bias = layer_view(bias, MOQ_F32, KV_HEADS * dims[shape][0]);
                d.kv.v_bias = layer_view(bias, MOQ_F32, KV_HEADS * (dims[shape][1] ? dims[shape][1] : dims[shape][0]));
                long live = test_state.live_allocs;
                moq_kv_cache *c = be->kv_create(be, &d, &err);
                CHECK(c != NULL);
                CHECK(be->kv_bytes(be, &d) > 0);
                int32_t slot[64], pos[64];
                moq_batch b = {0, 0, slot, pos};
                memset(&h, 0, sizeof h);
                for (b.rows = 0; b.rows < 60; b.rows++) { slot[b.rows] = b.rows < 40 ? 1 : 0; pos[b.rows] = b.rows < 40 ? b.rows : b.rows - 40; }
                b.max_pos = 39;
                append_rows(be, c, &d, &b, &h);
                check_attention(be, c, &d, &b, &h, dims[shape][2], 0, 0, NULL);
                for (b.rows = 0; b.rows < 45; b.rows++) { slot[b.rows] = 1; pos[b.rows] = 40 + b.rows; }
                b.max_pos = 84;
                append_rows(be, c, &d, &b, &h);
                check_attention(be, c, &d, &b, &h, dims[shape][2], 0, 0, NULL);
                check_attention(be, c, &d, &b, &h, dims[shape][2], 7, 0, sinks);
                check_attention(be, c, &d, &b, &h, dims[shape][2], 40, 3, sinks);
                b.rows = 3; /* mixed slots in one batch */
                slot[0] = 0; pos[0] = 20; slot[1] = 1; pos[1] = 85; slot[2] = 2; pos[2] = 0;
                b.max_pos = 85;
                append_rows(be, c, &d, &b, &h);
                check_attention(be, c, &d, &b, &h, dims[shape][2], 0, 5, NULL);
                be->kv_copy(be, c, 2, 10, 1, 30, 40); /* fork */
                memcpy(h.k[2][10], h.k[1][30], sizeof h.k[0][0] * 40);
                memcpy(h.v[2][10], h.v[1][30], sizeof h.v[0][0] * 40);
                be->kv_copy(be, c, 1, 0, 1, 5, 80); /* shift down over itself */
                memmove(h.k[1][0], h.k[1][5], sizeof h.k[0][0] * 80);
                memmove(h.v[1][0], h.v[1][5], sizeof h.v[0][0] * 80);
                be->kv_copy(be, c, 0, 9, 0, 2, 18); /* and up */
                memmove(h.k[0][9], h.k[0][2], sizeof h.k[0][0] * 18);
                memmove(h.v[0][9], h.v[0][2], sizeof h.v[0][0] * 18);
                slot[0] = 2; pos[0] = 49; slot[1] = 1; pos[1] = 79; slot[2] = 0; pos[2] = 26;
                check_attention(be, c, &d, &b, &h, dims[shape][2], 25, 0, NULL);
                size_t bytes = be->kv_read(be, c, 2, 50, NULL); /* out of one slot and into another */
                uint8_t *kept = (uint8_t *)malloc(bytes);
                be->kv_read(be, c, 2, 50, kept);
                be->kv_write(be, c, 0, 50, kept);
                free(kept);
                memcpy(h.k[0], h.k[2], sizeof h.k[0][0] * 50);
                memcpy(h.v[0], h.v[2], sizeof h.v[0][0] * 50);
                pos[2] = 49;
                check_attention(be, c, &d, &b, &h, dims[shape][2], 40, 0, NULL);
                float junk[600] = {0}; /* rows outside of the cache change nothing and get zeros */
                slot[0] = 7; pos[1] = CAPACITY; pos[2] = -1;
                be->kv_append(be, c, &b, junk, 0, junk, 0);
                be->kv_release(be, c);
                (void)live;
                moq_backend_destroy(be);
                CHECK_INT(test_state.live_allocs, 0);
            }
}

/* A copy within the cache, and within what it should hold. */
static void copy_rows(moq_backend *be, moq_kv_cache *c, history *h, int to_slot, int to, int from_slot, int from, int count)
{
    be->kv_copy(be, c, to_slot, to, from_slot, from, count);
    memmove(h->k[to_slot][to], h->k[from_slot][from], sizeof h->k[0][0] * (size_t)count);
    memmove(h->v[to_slot][to], h->v[from_slot][from], sizeof h->v[0][0] * (size_t)count);
}

/* The first `count` positions of a slot as kv_read gives them: [keys, values][head][position] rows, so fewer positions are the first rows of each head; as F32
   they are the numbers themselves. Then out of `from` and into `to`. */
static void check_state(moq_backend *be, moq_kv_cache *c, const moq_kv_desc *d, history *h, int to, int from, int count)
{
    const int some = count * 2 / 3;
    const size_t all = be->kv_read(be, c, from, count, NULL), part = be->kv_read(be, c, from, some, NULL), keys = be->kv_read(be, c, from, 1, NULL) / KV_HEADS;
    const size_t wide = d->kv.format == MOQ_KV_WIDE && keys == (size_t)(d->head_dim + d->value_dim) * 4;
    uint8_t *bytes = (uint8_t *)malloc(all), *first = (uint8_t *)malloc(part), *x = bytes;
    CHECK(all == keys * KV_HEADS * (size_t)count && part == keys * KV_HEADS * (size_t)some);
    CHECK(be->kv_read(be, c, from, count, bytes) == all && be->kv_read(be, c, from, some, first) == part);
    for (int i = 0; i < 2 && wide; i++)
        for (int n = 0, dim = i ? d->value_dim : d->head_dim; n < KV_HEADS; n++)
            for (int t = 0; t < count; t++, x += (size_t)dim * 4)
                CHECK(memcmp(x, (i ? h->v : h->k)[from][t] + n * dim, (size_t)dim * 4) == 0);
    if (wide) CHECK(memcmp(first, bytes, (size_t)(some * d->head_dim) * 4) == 0);
    be->kv_write(be, c, to, count, bytes);
    CHECK(be->kv_read(be, c, to, some, bytes) == part && memcmp(bytes, first, part) == 0);
    memcpy(h->k[to], h->k[from], sizeof h->k[0][0] * (size_t)count);
    memcpy(h->v[to], h->v[from], sizeof h->v[0][0] * (size_t)count);
    free(bytes);
    free(first);
}

/* Positions beyond one span: computed side by side by three workers where there is one row, one after the other where there are more;
   check_attention wants the same bits of both. Then copies and saved states over the ends of what lies together in a cache, whose last piece is shorter. */
static void test_backend_attention_spans(void)
{
    static history h;
    static const moq_kv_format formats[] = {MOQ_KV_WIDE, MOQ_KV_FP8, MOQ_KV_NVFP4_ROTATE, MOQ_KV_WIDE};
    float scale[1] = {0.03f}, sinks[6];
    for (int i = 0; i < 6; i++) sinks[i] = test_normal();
    for (int k = 0; moqi_get_kernels(k); k++)
        for (int f = 0; f < 4; f++) {
            moq_backend *be = backend_of(moqi_get_kernels(k)->name, MOQ_ACT_WIDE, 3);
            moq_error err;
            moq_kv_desc d;
            int32_t slot[64], pos[64];
            moq_batch b = {0, 0, slot, pos};
            memset(&d, 0, sizeof d);
            d.slots = 2;
            d.capacity = LONG;
            d.kv_heads = KV_HEADS;
            d.head_dim = formats[f] == MOQ_KV_NVFP4_ROTATE ? 32 : 40; /* 40: no multiple of 16 */
            d.value_dim = 24;
            d.kv.format = formats[f];
            d.bf16 = f == 3;
            d.kv.k_scale = d.kv.v_scale = layer_view(scale, MOQ_F32, 1);
            moq_kv_cache *c = be->kv_create(be, &d, &err);
            CHECK(c != NULL);
            for (int first = 0; first < LONG; first += b.rows) {
                for (b.rows = 0; b.rows < 64 && first + b.rows < LONG; b.rows++) { slot[b.rows] = 1; pos[b.rows] = first + b.rows; }
                b.max_pos = first + b.rows - 1;
                append_rows(be, c, &d, &b, &h);
            }
            slot[0] = slot[1] = slot[2] = slot[3] = 1;
            pos[0] = LONG - 1; pos[1] = 511; pos[2] = 512; pos[3] = 1030;
            b.rows = 4;
            b.max_pos = LONG - 1;
            check_attention(be, c, &d, &b, &h, 6, 0, 0, NULL);
            check_attention(be, c, &d, &b, &h, 6, 600, 0, sinks);
            check_attention(be, c, &d, &b, &h, 6, 1, 0, NULL);
            copy_rows(be, c, &h, 0, 0, 1, 100, 900);
            copy_rows(be, c, &h, 0, 900, 1, 37, LONG - 900);
            copy_rows(be, c, &h, 1, 301, 1, 30, LONG - 301); /* up over itself */
            slot[0] = slot[2] = 0;
            check_attention(be, c, &d, &b, &h, 6, 0, 0, NULL);
            copy_rows(be, c, &h, 1, 5, 1, 130, LONG - 130); /* and down */
            check_state(be, c, &d, &h, 0, 1, LONG - 70);
            pos[3] = LONG - 130;
            check_attention(be, c, &d, &b, &h, 6, 0, 0, NULL);
            be->kv_release(be, c);
            moq_backend_destroy(be);
            CHECK_INT(test_state.live_allocs, 0);
        }
}

#if defined(MOQI_AMX) && defined(AMX_H)
/* A backend of tiles with a cache, as if a layer had rounded inputs, and scratch for it. */
typedef struct tiled { moq_backend *be; moq_kv_cache *cache; } tiled;

static tiled tiled_make(const moq_kv_desc *d, moq_act act, int threads)
{
    moq_error err;
    tiled t;
    t.be = backend_of("avx512vnni", act, threads);
    moqi_cpu_of(t.be)->k = &moqi_amx_kernels;
    moqi_cpu_of(t.be)->o = moqi_loops_for(&moqi_amx_kernels);
    moqi_cpu_of(t.be)->need.rounds = 1;
    t.cache = t.be->kv_create(t.be, d, &err);
    CHECK(t.cache != NULL);
    return t;
}

static void tiled_free(tiled *t)
{
    t->be->kv_release(t->be, t->cache);
    moq_backend_destroy(t->be);
}

enum { TILED_ROWS = 90, TILED_STRIDE = 600 };

/* The rows of b by three workers as by one; `same`: to the last bit as where nothing is rounded, else not quite, and near the sums in double. Of 16 bits
   two pieces keep all but 2^-16 of a number, and of a product the smaller pieces' is missing, below 2^-15 of it: scores are off by 1.75 * 2^-15 of their
   sums of sizes, weights by twice that, and their products by as much again. */
static void check_tiled(const tiled t[3], const moq_kv_desc *d, const moq_batch *b, const history *h, const moq_attention_desc *desc, int same)
{
    static float y[3][TILED_ROWS * TILED_STRIDE];
    moq_attention_desc a = *desc;
    const int dim = d->head_dim, vdim = d->value_dim ? d->value_dim : dim;
    const double scale = a.scale != 0 ? (double)a.scale : 1 / sqrt((double)dim);
    double gap = 0, all = 0;
    long wrong = 0, before = test_state.total_allocs;
    for (int i = 0; i < 3; i++) {
        memset(y[i], 0, sizeof y[i]);
        a.y = y[i];
        a.y_stride = TILED_STRIDE;
        t[i].be->attention(t[i].be, b, &a);
    }
    CHECK_INT(test_state.total_allocs, before);
    CHECK(memcmp(y[0], y[1], sizeof y[0]) == 0);
    CHECK((memcmp(y[0], y[2], sizeof y[0]) == 0) == same);
    for (int r = 0; r < b->rows && !same; r++)
        for (int n = 0; n < a.heads; n++) {
            const float *q = (const float *)a.q + r * a.q_stride + n * dim;
            int kv = n / (a.heads / KV_HEADS), s = b->slot[r], from = a.window > 0 && b->pos[r] - a.window + 1 > 0 ? b->pos[r] - a.window + 1 : 0;
            double p[LONG], max = a.sinks ? (double)a.sinks[n] : -1e300, sum = 0, most = 0;
            for (int k = from; k <= b->pos[r]; k++) {
                double size = p[k] = 0;
                for (int i = 0; i < dim; i++) {
                    double v = scale * (double)q[i] * (double)h->k[s][k][kv * dim + i];
                    p[k] += v;
                    size += fabs(v);
                }
                if (p[k] > max) max = p[k];
                if (size > most) most = size;
            }
            if (a.sinks) sum = exp((double)a.sinks[n] - max);
            for (int k = from; k <= b->pos[r]; k++) sum += p[k] = exp(p[k] - max);
            for (int i = 0; i < vdim; i++) {
                double want = 0, size = 0, got = (double)y[0][r * TILED_STRIDE + n * vdim + i];
                for (int k = from; k <= b->pos[r]; k++) { want += p[k] / sum * (double)h->v[s][k][kv * vdim + i]; size += p[k] / sum * fabs((double)h->v[s][k][kv * vdim + i]); }
                const double bound = ((3.5 * most + 1.75) / 32768 + 4e-5) * size + 1e-6;
                wrong += !(fabs(want - got) <= bound);
                gap += (want - got) * (want - got);
                all += bound * bound;
            }
        }
    if (wrong || !(same || gap <= 1e-3 * all))
        fprintf(stderr, "tiles, %s, %d of %d, window %d: %ld wrong, error %g\n", moq_kv_format_name(d->kv.format), dim, vdim, a.window, wrong, sqrt(gap / all));
    CHECK(wrong == 0 && (same || gap <= 1e-3 * all)); /* of so many the most are far below */
}

/* Rows of a sequence alone, behind `shift` rows of another one, and with its last row behind all others: the same to the last bit. */
static void check_tiled_alone(const tiled *t, const moq_batch *b, const moq_attention_desc *desc, int first)
{
    static float q[TILED_ROWS * TILED_STRIDE], alone[TILED_ROWS * TILED_STRIDE], y[TILED_ROWS * TILED_STRIDE];
    const int count = b->rows - first;
    for (int turn = 0; turn < 3; turn++)
        for (int shift = 0; shift <= (turn ? 23 : 0); shift += 1 + shift) {
            int32_t slot[TILED_ROWS], pos[TILED_ROWS], from[TILED_ROWS], n = 0;
            moq_batch one = {0, b->max_pos, slot, pos};
            moq_attention_desc a = *desc;
            for (int i = 0; i < shift; i++) from[n++] = i;
            for (int i = 0; i < count - (turn == 2); i++) from[n++] = first + i;
            if (turn == 2) { from[n++] = shift; from[n++] = b->rows - 1; }
            for (int i = 0; i < n; i++) {
                slot[i] = b->slot[from[i]];
                pos[i] = b->pos[from[i]];
                memcpy(q + i * TILED_STRIDE, (const float *)desc->q + from[i] * TILED_STRIDE, TILED_STRIDE * sizeof *q);
            }
            one.rows = n;
            a.q = q;
            a.y = turn ? y : alone;
            a.y_stride = TILED_STRIDE;
            memset(turn ? y : alone, 0, sizeof y);
            t->be->attention(t->be, &one, &a);
            if (!turn) continue;
            CHECK(memcmp(y + shift * TILED_STRIDE, alone, (size_t)((count - (turn == 2)) * TILED_STRIDE) * sizeof *y) == 0);
            if (turn == 2) CHECK(memcmp(y + (n - 1) * TILED_STRIDE, alone + (count - 1) * TILED_STRIDE, TILED_STRIDE * sizeof *y) == 0);
        }
}

/* 90 rows of two sequences, the second of which goes on behind another span, in one format and shape. extreme: 1 tiny, 2 infinite, 3 the largest values. */
static void tiled_attention(const moq_kv_desc *d, int heads, int extreme, moq_act act)
{
    static history h;
    static float q[TILED_ROWS * TILED_STRIDE];
    int32_t slot[TILED_ROWS], pos[TILED_ROWS];
    float sinks[34];
    moq_batch b = {0, 0, slot, pos};
    moq_attention_desc a;
    tiled t[3] = {tiled_make(d, act, 1), tiled_make(d, act, 3), tiled_make(d, MOQ_ACT_WIDE, 1)};
    for (int i = 0; i < TILED_ROWS * TILED_STRIDE; i++) q[i] = test_normal();
    for (int i = 0; i < 34; i++) sinks[i] = test_normal();
    for (int first = 0; first < 555; first += b.rows) {
        for (b.rows = 0; b.rows < 60 && first + b.rows < 555; b.rows++) { slot[b.rows] = 1; pos[b.rows] = first + b.rows; }
        append_rows(t[0].be, t[0].cache, d, &b, &h);
    }
    for (b.rows = 0; b.rows < 37; b.rows++) { slot[b.rows] = 0; pos[b.rows] = b.rows; }
    append_rows(t[0].be, t[0].cache, d, &b, &h);
    memset(&a, 0, sizeof a);
    a.cache = t[0].cache;
    a.q = q;
    a.q_stride = TILED_STRIDE;
    a.heads = heads;
    for (b.rows = 0; b.rows < TILED_ROWS; b.rows++) { /* 37 rows, then 53 that begin within 16 others */
        slot[b.rows] = b.rows >= 37;
        pos[b.rows] = b.rows < 37 ? b.rows : 555 - TILED_ROWS + b.rows;
    }
    b.max_pos = 554;
    if (extreme) { /* one number of every 32 keys or values: all blocks are left to F32 */
        static float x[2][KV_HEADS * MAX_DIM];
        static const float numbers[] = {0, 1e-33f, 0, 3e38f};
        float number = extreme == 2 ? moqi_bits_f32(0x7f800000) : numbers[extreme];
        moq_batch one = {1, 0, slot, pos};
        for (int i = 0; i < KV_HEADS * MAX_DIM; i++) x[0][i] = x[1][i] = 1e-3f;
        for (int n = 0; n < KV_HEADS; n++) x[1][n * (d->value_dim ? d->value_dim : d->head_dim)] = number;
        if (extreme == 1) for (int n = 0; n < KV_HEADS; n++) x[0][n * d->head_dim] = number;
        for (int s = 0; s < 2; s++)
            for (int p = 0; p < (s ? 555 : 37); p += 32) {
                int32_t at[2];
                at[0] = s;
                at[1] = p;
                one.slot = at;
                one.pos = at + 1;
                t[0].be->kv_append(t[0].be, t[0].cache, &one, x[0], 0, x[1], 0);
            }
        check_tiled(t, d, &b, &h, &a, 1);
    } else {
        check_tiled(t, d, &b, &h, &a, 0);
        a.wide = act == MOQ_ACT_AUTO; /* of a model that rounds nothing, beside another one that does */
        check_tiled(t, d, &b, &h, &a, a.wide);
        a.wide = 0;
        for (int i = 0; i < 3; i++) check_tiled_alone(&t[i], &b, &a, 37);
        a.window = 70;
        a.sinks = sinks;
        check_tiled(t, d, &b, &h, &a, 0);
        a.window = 9;
        a.scale = 0.3f;
        check_tiled(t, d, &b, &h, &a, 0);
        a.softcap = 5; /* of which tiles know nothing */
        check_tiled(t, d, &b, &h, &a, 1);
        a.softcap = 0;
    }
    for (int i = 0; i < 3; i++) tiled_free(&t[i]);
    CHECK_INT(test_state.live_allocs, 0);
}
#endif

/* Attention of many rows by tiles, of the processor or emulated: every format, odd sizes, numbers that two of BF16 do not keep. */
static void test_backend_attention_tiles(void)
{
#if defined(MOQI_AMX) && defined(AMX_H)
    static const int dims[][3] = {{64, 0, 6}, {32, 48, 2}, {16, 0, 34}, {40, 24, 6}};
    uint32_t flags = moqi_cpu_flags();
    struct sigaction before;
    float scale[1] = {0.03f}, bias[KV_HEADS * MAX_DIM];
    if (!(flags & MOQI_CPU_VNNI) || !(flags & MOQI_CPU_VBMI)) { printf("skipped: tiles, for want of AVX-512 with VNNI and VBMI\n"); test_state.skipped++; return; }
    sigaction(SIGILL, NULL, &before);
    amx_emulate();
    for (int i = 0; i < KV_HEADS * MAX_DIM; i++) bias[i] = test_uniform();
    for (int f = 0; f <= (int)MOQ_KV_FORMAT_COUNT; f++) /* the last: wide as BF16 */
        for (int shape = 0; shape < (f == (int)MOQ_KV_WIDE || f == (int)MOQ_KV_FORMAT_COUNT ? 4 : f % 3 + 1); shape++) {
            moq_kv_desc d;
            memset(&d, 0, sizeof d);
            d.name = "tiles";
            d.slots = 2;
            d.capacity = 600;
            d.kv_heads = KV_HEADS;
            d.head_dim = dims[shape][0];
            d.value_dim = dims[shape][1];
            d.kv.format = (moq_kv_format)(f % (int)MOQ_KV_FORMAT_COUNT);
            d.bf16 = f > 0 && d.kv.format == MOQ_KV_WIDE;
            d.kv.k_scale = d.kv.v_scale = layer_view(scale, MOQ_F32, 1);
            d.kv.k_bias = layer_view(bias, MOQ_F32, KV_HEADS * dims[shape][0]);
            d.kv.v_bias = layer_view(bias, MOQ_F32, KV_HEADS * (dims[shape][1] ? dims[shape][1] : dims[shape][0]));
            for (int extreme = 0; extreme < (d.kv.format == MOQ_KV_WIDE ? 4 : 1); extreme++) tiled_attention(&d, dims[shape][2], extreme, f % 2 ? MOQ_ACT_BF16 : MOQ_ACT_AUTO);
        }
    sigaction(SIGILL, &before, NULL);
#else
    printf("skipped: tiles, not for this system\n");
    test_state.skipped++;
#endif
}

/* Every kernel's activations, norms and rotations against double; the widest numbers and NaN too. */
static void test_backend_between(void)
{
    static const float odd[] = {0, -0.0f, 200, -200, 88.5f, -88.5f, 1e30f, -1e30f, 1e-30f};
    for (int k = 0; moqi_get_kernels(k); k++) {
        const moqi_loops *o = moqi_loops_for(moqi_get_kernels(k));
        for (int kind = 0; kind < 5; kind++)
            for (int turn = 0; turn < 30; turn++) {
                moq_activation_desc a = {(moq_activation)kind, 7, 1.702f, 1};
                float x[2 * 53], y[53];
                int n = 53;
                for (int i = 0; i < 2 * n; i++) x[i] = i < n && i % 7 == turn % 7 && turn < 9 ? odd[(i + turn) % 9] : test_normal() * 3;
                o->activate(&a, x, n, y);
                for (int i = 0; i < n; i++) {
                    double g = (double)x[i], u = kind == MOQ_RELU2 ? 1 : (double)x[n + i], cg = g > 7 ? 7 : g, cu = u > 7 ? 7 : u < -7 ? -7 : u, want = 0;
                    if (kind == MOQ_SILU_MUL) want = g / (1 + exp(-g)) * u;
                    if (kind == MOQ_GELU_MUL) want = g * 0.5 * erfc(-g / sqrt(2.0)) * u;
                    if (kind == MOQ_GELU_TANH_MUL) want = g < -50 ? 0 : g / (1 + exp(-2 * sqrt(2 / 3.14159265358979323846) * (g + 0.044715 * g * g * g))) * u;
                    if (kind == MOQ_SWIGLU_CLAMP) want = cg / (1 + exp(-(double)1.702f * cg)) * (cu + 1);
                    if (kind == MOQ_RELU2) want = g > 0 ? g * g : 0;
                    if (!(fabs(want) < 3e38)) continue;
                    double slack = fabs(g) > 50 ? 1e-35 * fabs(g * u) : 0.1 * fabs(g * u);
                    CHECK(fabs((double)y[i] - want) <= 3e-6 * (fabs(want) + slack) + 1e-34);
                }
                x[17] = moqi_bits_f32(0x7fc00000u);
                o->activate(&a, x, n, y);
                CHECK(moqi_is_nan(y[17]) && !moqi_is_nan(y[18]));
            }
        float x[96], w[96], y[96], z[96], table[96];
        float most[2] = {0, 0}; /* of x and of the table: two products are added, one of them perhaps without rounding */
        for (int i = 0; i < 96; i++) {
            x[i] = test_normal(); w[i] = test_normal(); table[i] = test_normal();
            if (fabsf(x[i]) > most[0]) most[0] = fabsf(x[i]);
            if (fabsf(table[i]) > most[1]) most[1] = fabsf(table[i]);
        }
        o->weigh(x, w, 0.3f, 93, y);
        for (int i = 0; i < 93; i++) CHECK(y[i] == x[i] * 0.3f * w[i]);
        o->weigh(x, NULL, 0.3f, 93, y);
        for (int i = 0; i < 93; i++) CHECK(y[i] == x[i] * 0.3f);
        for (int dims = 8; dims <= 96; dims += 8)
            for (int pairs = 0; pairs < 2; pairs++) {
                memcpy(y, x, sizeof x);
                memcpy(z, x, sizeof x);
                o->rotate(y, table, dims, pairs);
                moqi_rope_head(z, table, dims, pairs);
                for (int i = 0; i < 96; i++) CHECK(fabsf(y[i] - z[i]) <= 4 * 1.2e-7f * most[0] * most[1]);
            }
    }
}

#if defined(__linux__)
/* Pages of this process in memory, in bytes; 0: not known. */
static size_t bytes_in_memory(void)
{
    long all = 0, in = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    const int n = f ? fscanf(f, "%ld %ld", &all, &in) : 0;
    if (f) fclose(f);
    return n == 2 ? (size_t)in * 4096 : 0;
}

/* A cache takes memory as its sequences grow: neither creating one nor its first tokens may touch it all. 4 heads of 16 MB, keys and values, each of which
   begins in a large page of its own. */
static void test_backend_kv_takes_little(void)
{
    static float k[4 * 128];
    static const int32_t none[2] = {0, 0};
    moq_error err;
    moq_cpu_desc cpu;
    moq_kv_desc d;
    moq_batch b;
    memset(&cpu, 0, sizeof cpu);
    memset(&d, 0, sizeof d);
    memset(&b, 0, sizeof b);
    cpu.threads = 1;
    d.name = "attn";
    d.slots = 1; d.capacity = 32768; d.kv_heads = 4; d.head_dim = 128;
    b.rows = 1;
    b.slot = b.pos = none;
    moq_backend *be = moq_cpu_backend(&cpu, &err);
    CHECK(be != NULL);
    if (!be) return;
    const size_t before = bytes_in_memory();
    moq_kv_cache *c = be->kv_create(be, &d, &err);
    CHECK(c != NULL && be->kv_bytes(be, &d) >= (size_t)128 << 20);
    if (c) be->kv_append(be, c, &b, k, 4 * 128, k, 4 * 128);
    const size_t after = bytes_in_memory();
    /* 16 MB at most, and a sanitizer notes something beside the bytes */
    CHECK(before == 0 || after - before < (size_t)40 << 20 || after < before);
    be->kv_release(be, c);
    moq_backend_destroy(be);
}
#endif

static void test_backend_kv_refuses(void)
{
    moq_backend *be = backend_of(NULL, MOQ_ACT_WIDE, 1);
    moq_error err;
    moq_kv_desc d, bad;
    float zero = 0;
    memset(&d, 0, sizeof d);
    d.name = "attn";
    d.slots = 1; d.capacity = 16; d.kv_heads = 3; d.head_dim = 48;
    bad = d; bad.capacity = 0;
    CHECK(be->kv_create(be, &bad, &err) == NULL && err.code == MOQ_E_ARG && be->kv_bytes(be, &bad) == 0);
    bad = d; bad.kv.format = MOQ_KV_NVFP4_ROTATE;
    CHECK(be->kv_create(be, &bad, &err) == NULL && err.code == MOQ_E_UNSUPPORTED);
    bad = d; bad.kv.k_scale = layer_view(&zero, MOQ_F32, 1);
    CHECK(be->kv_create(be, &bad, &err) == NULL && err.code == MOQ_E_SCALE);
    bad.kv.k_scale.count = 2;
    CHECK(be->kv_create(be, &bad, &err) == NULL && err.code == MOQ_E_SHAPE);
    bad = d; bad.slots = bad.capacity = bad.kv_heads = bad.head_dim = 0x7fffffff;
    CHECK(be->kv_create(be, &bad, &err) == NULL && err.code == MOQ_E_OVERFLOW);
    be->kv_release(be, NULL);
    be->release_weight(be, NULL);
    be->release_moe(be, NULL);
    moq_backend_destroy(be);
    CHECK_INT(test_state.live_allocs, 0);
}

/* ---- small operations ---- */

static void test_backend_norm(void)
{
    for (int k = 0; moqi_get_kernels(k); k++) {
        moq_backend *be = backend_of(moqi_get_kernels(k)->name, MOQ_ACT_WIDE, 2);
        enum { ROWS = 300, GROUPS = 3, COLS = 37, STRIDE = 130 };
        static float x[ROWS * STRIDE], was[ROWS * STRIDE], add[ROWS * GROUPS * COLS], y[ROWS * 150], w[COLS];
        for (int use = 0; use < 4; use++) {
            moq_norm_desc d;
            memset(&d, 0, sizeof d);
            for (int i = 0; i < ROWS * STRIDE; i++) was[i] = x[i] = test_normal();
            for (int i = 0; i < ROWS * GROUPS * COLS; i++) add[i] = test_normal();
            for (int i = 0; i < COLS; i++) w[i] = test_normal();
            d.x = x; d.y = y; d.weight = use & 1 ? w : NULL; d.add = use & 2 ? add : NULL;
            d.x_stride = STRIDE; d.y_stride = 150; d.rows = ROWS; d.cols = COLS; d.groups = GROUPS; d.eps = 0.01f;
            be->norm(be, &d);
            for (int r = 0; r < ROWS; r++)
                for (int g = 0; g < GROUPS; g++) {
                    double v[COLS], sum = 0;
                    for (int c = 0; c < COLS; c++) {
                        v[c] = (double)was[r * STRIDE + g * COLS + c] + (use & 2 ? (double)add[(r * GROUPS + g) * COLS + c] : 0);
                        CHECK(fabs(v[c] - (double)x[r * STRIDE + g * COLS + c]) <= 1e-6 * (1 + fabs(v[c])));
                        sum += v[c] * v[c];
                    }
                    for (int c = 0; c < COLS; c++) {
                        double want = v[c] / sqrt(sum / COLS + (double)0.01f) * (use & 1 ? (double)w[c] : 1);
                        CHECK(fabs(want - (double)y[r * 150 + g * COLS + c]) <= 2e-6 * (1 + fabs(want)));
                    }
                }
        }
        moq_backend_destroy(be);
    }
}

static void test_backend_rope(void)
{
    enum { ROWS = 5, HEADS = 3, DIM = 24, STRIDE = 100 };
    moq_backend *be = backend_of(NULL, MOQ_ACT_WIDE, 2);
    int32_t pos[ROWS] = {0, 1, 77, 4000, 131071};
    float inv[8], table[ROWS * 16], x[ROWS * STRIDE], was[ROWS * STRIDE];
    for (int dims = 16; dims >= 8; dims -= 8)
        for (int inter = 0; inter < 2; inter++) {
            moq_rope_desc d;
            for (int i = 0; i < dims / 2; i++) inv[i] = powf(10000, -2.0f * (float)i / (float)dims);
            be->rope_table(be, pos, ROWS, inv, dims / 2, 1.25f, table);
            for (int i = 0; i < ROWS * STRIDE; i++) was[i] = x[i] = test_normal();
            memset(&d, 0, sizeof d);
            d.x = x; d.stride = STRIDE; d.rows = ROWS; d.heads = HEADS; d.head_dim = DIM; d.first = dims == 8 ? 4 : 0; d.dims = dims; d.interleaved = inter; d.table = table;
            be->rope(be, &d);
            for (int r = 0; r < ROWS; r++)
                for (int j = 0; j < STRIDE; j++) {
                    double want = (double)was[r * STRIDE + j];
                    int c = j % DIM - d.first;
                    if (j < HEADS * DIM && c >= 0 && c < dims) {
                        int pair = inter ? c / 2 : c % (dims / 2), second = inter ? c % 2 : c >= dims / 2, mate = inter ? (second ? -1 : 1) : (second ? -dims / 2 : dims / 2);
                        double angle = (double)pos[r] * (double)inv[pair], other = (double)was[r * STRIDE + j + mate];
                        want = 1.25 * (second ? want * cos(angle) + other * sin(angle) : want * cos(angle) - other * sin(angle));
                    }
                    CHECK(fabs(want - (double)x[r * STRIDE + j]) <= 1e-6 * (1 + fabs(want)) * 20);
                }
        }
    moq_backend_destroy(be);
}

static void test_backend_small(void)
{
    moq_backend *be = backend_of(NULL, MOQ_ACT_WIDE, 2);
    moq_error err;
    float *x = (float *)be->alloc(be, 1000 * sizeof *x, &err), y[1000], z[1000];
    int32_t best[6];
    CHECK(x != NULL && ((uintptr_t)x & 63) == 0 && x[999] == 0);
    for (int i = 0; i < 1000; i++) y[i] = test_normal();
    be->upload_act(be, x, y, 1000);
    be->add(be, x, y, 1000);
    be->download_act(be, z, x, 1000);
    for (int i = 0; i < 1000; i++) CHECK(z[i] == y[i] + y[i]);
    be->copy(be, x, x + 10, 100 * sizeof *x);
    for (int i = 0; i < 100; i++) CHECK(x[i] == z[i + 10]);
    float rows[6][5] = {{1, 3, 3, 2, 0}, {-5, -4, -4, -9, -4}, {0, 0, 0, 0, 1}, {0, 2, 1, 0, 2}};
    rows[3][0] = rows[4][2] = moqi_bits_f32(0x7fc00000u);
    for (int i = 0; i < 5; i++) { if (i != 2) rows[4][i] = -INFINITY; rows[5][i] = i == 3 ? -3e38f : -INFINITY; }
    be->argmax(be, rows, 6, 5, best);
    CHECK(best[0] == 1 && best[1] == 1 && best[2] == 4 && best[3] == 1 && best[4] == -1 && best[5] == 3);
    CHECK(be->sync(be, &err) == MOQ_OK && strcmp(be->name, "cpu") == 0 && be->act == MOQ_F32);
    be->release(be, x);
    be->release(be, NULL);
    CHECK(be->alloc(be, SIZE_MAX - 8, &err) == NULL && err.code == MOQ_E_NOMEM);
    moq_backend_destroy(be);
    CHECK_INT(test_state.live_allocs, 0);
}

/* ---- every allocation may fail ---- */

static void test_backend_failing_allocations(void)
{
    mixture m;
    layer l[3];
    moq_error err;
    moq_cpu_desc d;
    moq_kv_desc kv;
    long k;
    memset(&d, 0, sizeof d);
    d.threads = 3;
    d.allocator = test_allocator();
    for (k = 1;; k++) {
        test_state.fail_at = k;
        moq_backend *be = moq_cpu_backend(&d, &err);
        test_state.fail_at = 0;
        if (be) { moq_backend_destroy(be); break; }
        CHECK(err.code == MOQ_E_NOMEM && test_state.live_allocs == 0);
    }
    CHECK(k > 2);
    mixture_make(&m, 6, 2, MOQ_SILU_MUL, 2);
    layer_make(&l[0], &layer_formats[32], 40, 2048); /* sorted columns, repacked */
    layer_make(&l[1], &layer_formats[19], 40, 2048);
    layer_make(&l[2], &layer_formats[4], 40, 2048);
    l[2].w.lora_a = layer_view(layer_floats(&l[2], 3 * 2048, 1), MOQ_F32, 3 * 2048);
    l[2].w.lora_b = layer_view(layer_floats(&l[2], 3 * 40, 1), MOQ_F32, 3 * 40);
    l[2].w.scheme.lora_rank = 3;
    l[2].w.pre_quant_scale = layer_view(layer_floats(&l[2], 2048, 1), MOQ_F32, 2048);
    l[2].w.bias = layer_view(layer_floats(&l[2], 40, 1), MOQ_F32, 40);
    memset(&kv, 0, sizeof kv);
    kv.slots = 2; kv.capacity = 64; kv.kv_heads = 2; kv.head_dim = 128; kv.kv.format = MOQ_KV_FP8;
    for (int what = 0; what < 4; what++) {
        int refused = 0;
        for (k = 1;; k++) {
            moq_backend *be = moq_cpu_backend(&d, &err);
            long base = test_state.live_allocs;
            void *made = NULL;
            moq_linear parts[3] = {l[0].w, l[1].w, l[2].w};
            test_state.fail_at = k;
            if (what == 0) made = be->prepare_linear(be, parts, 3, &err);
            if (what == 1) made = be->prepare_moe(be, &m.moe, &err);
            if (what == 2) made = be->kv_create(be, &kv, &err);
            if (what == 3) {
                moq_weight *w;
                test_state.fail_at = 0;
                w = be->prepare_linear(be, parts, 3, &err);
                base = test_state.live_allocs - 1; /* the scratch block is replaced */
                test_state.fail_at = k;
                made = be->reserve(be, 500, &err) == MOQ_OK ? be : NULL;
                float *x = (float *)calloc(40 * 2048, 4), *y = (float *)calloc(40 * 120, 4);
                test_state.fail_at = 0;
                CHECK(be->max_rows == (made ? 500 : 16));
                be->linear(be, w, x, 40, y); /* still works after a refusal */
                free(x);
                free(y);
                be->release_weight(be, w);
                moq_backend_destroy(be);
                CHECK_INT(test_state.live_allocs, 0);
                refused += made == NULL;
                if (made) break;
                CHECK(err.code == MOQ_E_NOMEM);
                continue;
            }
            test_state.fail_at = 0;
            if (!made) {
                refused++;
                CHECK(err.code == MOQ_E_NOMEM);
                CHECK(test_state.live_allocs <= base + 1); /* at most the scratch block, which the backend owns */
            }
            if (what == 0) be->release_weight(be, (moq_weight *)made);
            if (what == 1) be->release_moe(be, (moq_experts *)made);
            if (what == 2) be->kv_release(be, (moq_kv_cache *)made);
            moq_backend_destroy(be);
            CHECK_INT(test_state.live_allocs, 0);
            if (made) break;
        }
        CHECK(refused >= (what == 3 ? 1 : 2));
    }
    for (int i = 0; i < 3; i++) layer_free(&l[i]);
    mixture_free(&m);
}

/* Slices of a layer with a low-rank branch: rows with a step give those rows of the whole, halves of the columns add up to it. */
static void test_backend_slices_low_rank(void)
{
    moq_error err;
    moq_checkpoint *ck = moq_open(GOLDEN_DIR "/modelopt/llama-nvfp4_svdquant", NULL, &err);
    moq_cpu_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.act = MOQ_ACT_WIDE;
    moq_backend *be = moq_cpu_backend(&desc, &err);
    moq_linear whole, part[4];
    CHECK(ck && be);
    if (!ck || !be) { moq_close(ck); moq_backend_destroy(be); return; }
    CHECK_INT(moq_find_linear(ck, "model.layers.0.mlp.down_proj", &whole, &err), MOQ_OK);
    CHECK(whole.scheme.lora_rank == 32 && whole.rows == 128 && whole.cols == 256);
    CHECK_INT(moq_slice_rows(&whole, 3, 60, 2, &part[0], &err), MOQ_OK);
    CHECK_INT(moq_slice_cols(&whole, 0, 128, &part[1], &err), MOQ_OK);
    CHECK_INT(moq_slice_cols(&whole, 128, 128, &part[2], &err), MOQ_OK);
    part[3] = whole;
    float x[256], y[4][128];
    for (int i = 0; i < 256; i++) x[i] = test_normal();
    for (int i = 0; i < 4; i++) {
        moq_weight *w = be->prepare_linear(be, &part[i], 1, &err);
        CHECK(w != NULL);
        if (w) be->linear(be, w, i == 2 ? x + 128 : x, 1, y[i]);
        be->release_weight(be, w);
    }
    double rows = 0, cols = 0, all = 0;
    for (int i = 0; i < 60; i++) rows += fabs((double)y[0][i] - (double)y[3][3 + 2 * i]);
    for (int i = 0; i < 128; i++) { cols += fabs((double)y[1][i] + (double)y[2][i] - (double)y[3][i]); all += fabs((double)y[3][i]); }
    CHECK(all > 1 && rows < 1e-5 * all && cols < 1e-5 * all);
    moq_backend_destroy(be);
    moq_close(ck);
}

/* Scores as large as numbers get, all alike, or those of the first or the later keys: weights are what they are for small ones. Keys and queries are exact in
   BF16, so every way of attention has the same scores. */
static void test_backend_attention_large(void)
{
    enum { N = 600, ROWS = 32, DIM = 32 };
    static const float sizes[] = {1e3f, 1e5f, 1e7f, 1e9f, 3e9f, 1e10f, 1e20f, 1e30f, -1e3f, -1e5f, -1e7f, -1e9f, -1e10f, -1e20f, -1e30f};
    static const struct { const char *kernel; moq_act act; } ways[] = {{"reference", MOQ_ACT_WIDE}, {"auto", MOQ_ACT_WIDE}, {"auto", MOQ_ACT_BF16}};
    static float k[N][DIM], v[N][DIM], q[ROWS][DIM], y[3][ROWS][DIM];
    static int32_t slot[N], pos[N];
    moq_error err;
    for (int i = 0; i < N; i++) {
        pos[i] = i;
        for (int j = 0; j < DIM; j++) v[i][j] = j == 0 ? 1 : j == 1 ? (float)i : (float)(i % (j + 30));
    }
    for (int r = 0; r < ROWS; r++) q[r][0] = 1;
    for (size_t i = 0; i < MOQI_COUNT(sizes) * 3; i++) {
        const int kind = (int)(i % 3); /* 0: all keys, 1: all but the first 32, 2: these alone */
        const float size = moq_bf16_decode(moq_bf16_encode(sizes[i / 3]));
        for (int p = 0; p < N; p++) k[p][0] = (kind == 1 && p < 32) || (kind == 2 && p >= 32) ? 0 : size;
        for (size_t w = 0; w < MOQI_COUNT(ways); w++) {
            moq_cpu_desc d;
            moq_kv_desc c;
            moq_attention_desc a;
            moq_batch all = {N, N - 1, slot, pos}, last = {ROWS, N - 1, slot, pos + N - ROWS};
            memset(&d, 0, sizeof d);
            memset(&c, 0, sizeof c);
            memset(&a, 0, sizeof a);
            d.kernel = ways[w].kernel;
            d.act = ways[w].act;
            d.threads = 1;
            moq_backend *be = moq_cpu_backend(&d, &err);
            CHECK(be != NULL);
            if (!be) return;
            c.name = "large";
            c.slots = c.kv_heads = 1;
            c.capacity = N;
            c.head_dim = DIM;
            CHECK(be->reserve(be, N, &err) == MOQ_OK);
            moq_kv_cache *cache = be->kv_create(be, &c, &err);
            CHECK(cache != NULL);
            be->kv_append(be, cache, &all, k[0], DIM, v[0], DIM);
            a.cache = cache;
            a.q = q[0];
            a.y = y[w][0];
            a.q_stride = a.y_stride = DIM;
            a.heads = 1;
            a.scale = 1;
            be->attention(be, &last, &a);
            be->kv_release(be, cache);
            moq_backend_destroy(be);
        }
        for (size_t w = 1; w < MOQI_COUNT(ways); w++)
            for (int r = 0; r < ROWS; r++)
                for (int j = 0; j < DIM; j++) CHECK(fabsf(y[w][r][j] - y[0][r][j]) <= 2e-4f * fabsf(y[0][r][j]) + 1e-4f);
    }
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_backend_formats);
    RUN(test_backend_automatic);
    RUN(test_backend_bf16);
    RUN(test_backend_codes);
    RUN(test_backend_tiles);
    RUN(test_backend_forms);
    RUN(test_backend_inputs);
    RUN(test_backend_rotation);
    RUN(test_backend_slices);
    RUN(test_backend_mixed_parts);
    RUN(test_backend_fused_and_threads);
    RUN(test_backend_linear_rows);
    RUN(test_backend_mlp);
    RUN(test_backend_copies);
    RUN(test_backend_foreseen);
    RUN(test_backend_far_scales);
    RUN(test_backend_far_inputs);
    RUN(test_backend_scale_of_ones);
    RUN(test_backend_tall_low_rank);
    RUN(test_backend_few_rows_and_threads);
    RUN(test_backend_few_rows_alone);
    RUN(test_backend_long_tasks);
    RUN(test_backend_callers_jobs);
    RUN(test_backend_refuses);
    RUN(test_backend_embed);
    RUN(test_backend_moe);
    RUN(test_backend_moe_tiles);
    RUN(test_backend_moe_few);
    RUN(test_backend_moe_stored);
    RUN(test_backend_attention);
    RUN(test_backend_attention_spans);
    RUN(test_backend_attention_tiles);
    RUN(test_backend_between);
#if defined(__linux__)
    RUN(test_backend_kv_takes_little);
#endif
    RUN(test_backend_kv_refuses);
    RUN(test_backend_norm);
    RUN(test_backend_rope);
    RUN(test_backend_small);
    RUN(test_backend_failing_allocations);
    RUN(test_backend_attention_large);
    RUN(test_backend_slices_low_rank);
    return test_end();
}
