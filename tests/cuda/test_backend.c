/* The CUDA function table against float64 and the CPU table: every scheme, odd shapes, caches, experts, graphs, memory. */
#include "../test.h"
#include "../layers.h"

extern moq_backend *moq_cuda_backend_full(const moq_cuda_desc *desc, moq_dtype activations, const moq_allocator *memory, moq_error *err);

static moq_backend *backend_of(moq_act act, const char *kernel, moq_dtype activations)
{
    moq_cuda_desc d;
    moq_error err;
    memset(&d, 0, sizeof d);
    d.act = act;
    d.kernel = kernel;
    d.allocator = test_allocator();
    moq_backend *be = moq_cuda_backend_full(&d, activations, NULL, &err);
    if (!be) { fprintf(stderr, "%s\n", err.text); exit(2); }
    return be;
}

static moq_backend *wide_backend(void) { return backend_of(MOQ_ACT_WIDE, NULL, MOQ_F32); }

/* Destroy, after whatever the calls before left behind has come out. */
static void done(moq_backend *be)
{
    moq_error err;
    if (be->sync(be, &err) != MOQ_OK) { fprintf(stderr, "%s\n", err.text); CHECK(0); }
    moq_backend_destroy(be);
    CHECK_INT(test_state.live_allocs, 0);
}

/* Device memory of activations; filled with NaN so that an unwritten element shows. */
static void *device_floats(moq_backend *be, const float *from, size_t count)
{
    moq_error err;
    float *poison = (float *)malloc((count + 1) * sizeof *poison);
    void *p = be->alloc(be, (count + 8) * 4, &err);
    if (!p || !poison) { fprintf(stderr, "%s\n", err.text); exit(2); }
    for (size_t i = 0; i < count; i++) poison[i] = from ? from[i] : moqi_bits_f32(0x7fc00000u);
    be->upload_act(be, p, poison, count);
    free(poison);
    return p;
}

static void *device_bytes(moq_backend *be, const void *from, size_t bytes)
{
    moq_error err;
    void *p = be->alloc(be, bytes, &err);
    if (!p) { fprintf(stderr, "%s\n", err.text); exit(2); }
    be->upload(be, p, from, bytes);
    return p;
}

static float *random_floats(size_t count)
{
    float *v = (float *)malloc((count + 1) * sizeof *v);
    for (size_t i = 0; i < count; i++) v[i] = test_normal();
    return v;
}

static float bf16_of(float v) { return moq_bf16_decode(moq_bf16_encode(v)); }

/* y = x W^T for host arrays. */
static void run_linear(moq_backend *be, const moq_weight *w, const float *x, int rows, int64_t cols, int64_t out, float *y)
{
    void *dx = device_floats(be, x, (size_t)(rows * cols)), *dy = device_floats(be, NULL, (size_t)(rows * out));
    be->linear(be, w, dx, rows, dy);
    be->download_act(be, y, dy, (size_t)(rows * out));
    be->release(be, dx);
    be->release(be, dy);
}

/* ---- products ---- */

/* Output `row` for one token in double; xr: inputs as rounded, xt: before rounding. bound: sum of |x w|. */
static double oracle_output(const layer *l, int64_t row, const float *xt, const float *xr, double *bound)
{
    const moq_linear *w = &l->w;
    double y = 0;
    int64_t rank = w->scheme.lora_rank, a_cols = rank ? (int64_t)w->lora_a.count / rank : 0;
    *bound = 1e-6;
    for (int64_t c = 0; c < w->cols; c++) {
        double v = l->exact[row * w->cols + c];
        if (w->requant_scale > 0) v = layer_nearest_e4m3(v / (double)w->requant_scale) * (double)w->requant_scale;
        y += v * (double)xr[c];
        *bound += fabs(v * (double)xr[c]);
    }
    for (int64_t i = 0; w->lora_a.data && i < rank; i++) {
        double mid = 0, size = 0, b = (double)((const float *)w->lora_b.data)[(w->row_first + row * w->row_step) * rank + i];
        for (int64_t c = 0; c < w->cols; c++) {
            double t = (double)((const float *)w->lora_a.data)[i * a_cols + w->col_first + c] * (double)xt[c];
            mid += t;
            size += fabs(t);
        }
        y += mid * b;
        *bound += size * fabs(b);
    }
    if (w->bias.data) { double b = (double)((const float *)w->bias.data)[w->row_first + row * w->row_step]; y += b; *bound += fabs(b); }
    return y;
}

/* Number of outputs outside of the error bound; with BF16 activations x is rounded first and y last. rounds: F32 inputs of many rows may become BF16. */
static long check_linear_as(moq_backend *be, const layer *l, int stored, int rounds, int rows)
{
    const moq_linear *w = &l->w;
    moq_error err;
    long wrong = 0;
    int bf16 = be->act == MOQ_BF16;
    float *x = random_floats((size_t)(rows * w->cols)), *y = random_floats((size_t)(rows * w->rows)), *xt = random_floats((size_t)w->cols), *xr = random_floats((size_t)w->cols);
    for (int64_t i = 0; bf16 && i < rows * w->cols; i++) x[i] = bf16_of(x[i]);
    moq_weight *p = be->prepare_linear(be, w, 1, &err);
    if (!p) { fprintf(stderr, "%s\n", err.text); return 1; }
    run_linear(be, p, x, rows, w->cols, w->rows, y);
    for (int64_t i = 0; i < rows; i++) {
        memcpy(xt, x + i * w->cols, (size_t)w->cols * 4);
        for (int64_t c = 0; w->pre_quant_scale.data && c < w->cols; c++) xt[c] *= ((const float *)w->pre_quant_scale.data)[w->col_first + c];
        if (stored) moq_round_input(w, xt, xr);
        else memcpy(xr, xt, (size_t)w->cols * 4);
        for (int64_t r = 0; r < w->rows; r++) {
            double bound, want = oracle_output(l, r, xt, xr, &bound), got = (double)y[i * w->rows + r];
            if (bf16 && rows > 16 && w->scales.data && w->scheme.weight.group_cols > 0 && w->scheme.weight.elem != MOQ_F4)
                bound *= 20; /* scales of groups multiply weights, which are rounded to BF16 again */
            double allowed = bf16 ? 4e-3 * fabs(want) * (w->lora_a.data ? 3 : 1) + 2e-4 * bound : 6e-8 * (16 + 2 * sqrt((double)w->cols)) * bound;
            if (rounds && rows > 16) allowed += bound / (w->scales.data && w->scheme.weight.group_cols > 0 ? 64 : 250); /* inputs are BF16, and weights with scales of groups */
            if (!bf16 && w->cols >= 1024) allowed += 3.8e-6 * bound; /* from 1024 columns on F32 inputs are two BF16 parts: 2^-18 of each may be lost */
            wrong += !(fabs(want - got) <= allowed);
        }
    }
    be->release_weight(be, p);
    free(x); free(y); free(xt); free(xr);
    return wrong;
}

static long check_linear(moq_backend *be, const layer *l, int stored, int rows) { return check_linear_as(be, l, stored, 0, rows); }

static const int token_counts[7] = {1, 2, 3, 8, 17, 64, 130};

static void check_formats(moq_dtype activations, moq_act act, const char *kernel)
{
    static const int shapes[6][2] = {{1, 1}, {37, 200}, {19, 1060}, {130, 515}, {257, 768}, {512, 256}};
    moq_backend *be = backend_of(act, kernel, activations);
    moq_error err;
    CHECK(be->reserve(be, 100, &err) == MOQ_OK); /* 130 rows are split */
    for (size_t i = 0; i < MOQI_COUNT(layer_formats); i++)
        for (int s = 0; s < 6; s++) {
            layer l;
            layer_make(&l, &layer_formats[i], shapes[s][0], shapes[s][1]);
            for (int m = 0; m < 7; m++) {
                long wrong = check_linear_as(be, &l, 0, act != MOQ_ACT_WIDE, token_counts[m]);
                if (wrong) fprintf(stderr, "%s, %s, [%d, %d], %d rows: %ld wrong\n", moq_dtype_name(activations), layer_formats[i].name, shapes[s][0], shapes[s][1], token_counts[m], wrong);
                CHECK_INT(wrong, 0);
            }
            layer_free(&l);
        }
    done(be);
}

static void test_cuda_formats(void) { check_formats(MOQ_F32, MOQ_ACT_WIDE, NULL); }
static void test_cuda_formats_reference(void) { check_formats(MOQ_F32, MOQ_ACT_WIDE, "reference"); }
static void test_cuda_formats_bf16(void) { check_formats(MOQ_BF16, MOQ_ACT_WIDE, NULL); }
static void test_cuda_formats_automatic(void) { check_formats(MOQ_F32, MOQ_ACT_AUTO, NULL); }

/* Larger shapes, where columns are cut between warps and rows between blocks. */
static void test_cuda_larger(void)
{
    static const int formats[] = {2, 4, 8, 11, 14, 16, 21};
    for (int a = 0; a < 2; a++) {
        moq_backend *be = backend_of(MOQ_ACT_WIDE, NULL, a ? MOQ_BF16 : MOQ_F32);
        moq_error err;
        CHECK(be->reserve(be, 300, &err) == MOQ_OK);
        for (size_t i = 0; i < MOQI_COUNT(formats); i++) {
            layer l;
            layer_make(&l, &layer_formats[formats[i]], 520, 4096);
            CHECK_INT(check_linear(be, &l, 0, 1), 0);
            CHECK_INT(check_linear(be, &l, 0, 5), 0);
            CHECK_INT(check_linear(be, &l, 0, 24), 0);
            CHECK_INT(check_linear(be, &l, 0, 260), 0);
            layer_free(&l);
        }
        done(be);
    }
}

/* 4-bit weights and few rows of x: columns shared between warps, blocks and clusters, columns that end inside a chunk, rows that end inside a tile. */
static void test_cuda_few(void)
{
    static const int formats[] = {4, 8, 19, 22, 30}, shapes[5][2] = {{264, 4096}, {72, 14336}, {40, 1296}, {2056, 1024}, {40, 10256}};
    static const int tokens[] = {1, 4, 8, 11, 16};
    for (int a = 0; a < 2; a++) {
        moq_backend *be = backend_of(MOQ_ACT_WIDE, NULL, a ? MOQ_BF16 : MOQ_F32);
        moq_error err;
        CHECK(be->reserve(be, 16, &err) == MOQ_OK);
        for (size_t i = 0; i < MOQI_COUNT(formats); i++)
            for (int s = 0; s < 5; s++) {
                layer l;
                layer_make(&l, &layer_formats[formats[i]], shapes[s][0], shapes[s][1]);
                for (size_t m = 0; m < MOQI_COUNT(tokens); m++) {
                    long wrong = check_linear(be, &l, 0, tokens[m]);
                    if (wrong) fprintf(stderr, "%s, [%d, %d], %d rows: %ld wrong\n", layer_formats[formats[i]].name, shapes[s][0], shapes[s][1], tokens[m], wrong);
                    CHECK_INT(wrong, 0);
                }
                layer_free(&l);
            }
        done(be);
    }
}

/* The same for several layers of one launch, of which one has another form: as each of them alone, and the same bits every time. */
static void test_cuda_few_fused(void)
{
    enum { ROWS = 13, COLS = 2048, OUT = 264 + 50 + 72 + 40 };
    static const int heights[4] = {264, 50, 72, 40}, tokens[] = {1, 6, ROWS};
    layer l[4];
    moq_linear parts[4];
    moq_error err;
    moq_backend *be = backend_of(MOQ_ACT_WIDE, NULL, MOQ_F32);
    float *x = random_floats(ROWS * COLS), *y = random_floats(ROWS * OUT), *z = random_floats(ROWS * OUT);
    for (int i = 0; i < 4; i++) {
        layer_make(&l[i], &layer_formats[i == 1 ? 8 : 4], heights[i], COLS);
        float *bias = layer_floats(&l[i], heights[i], 0.3f);
        l[i].w.bias = layer_view(bias, MOQ_F32, heights[i]);
        parts[i] = l[i].w;
    }
    CHECK(be->reserve(be, 16, &err) == MOQ_OK);
    moq_weight *w = be->prepare_linear(be, parts, 4, &err);
    CHECK(w != NULL);
    for (size_t m = 0; m < MOQI_COUNT(tokens); m++) {
        int at = 0;
        run_linear(be, w, x, tokens[m], COLS, OUT, y);
        run_linear(be, w, x, tokens[m], COLS, OUT, z);
        CHECK(memcmp(y, z, (size_t)(tokens[m] * OUT) * sizeof *y) == 0);
        for (int i = 0; i < 4; at += heights[i], i++) {
            moq_weight *one = be->prepare_linear(be, &parts[i], 1, &err);
            run_linear(be, one, x, tokens[m], COLS, heights[i], z);
            for (int r = 0; r < tokens[m]; r++)
                for (int c = 0; c < heights[i]; c++) CHECK(fabsf(z[r * heights[i] + c] - y[r * OUT + at + c]) <= 1e-4f * (1 + fabsf(y[r * OUT + at + c])));
            be->release_weight(be, one);
        }
    }
    be->release_weight(be, w);
    for (int i = 0; i < 4; i++) layer_free(&l[i]);
    free(x); free(y); free(z);
    done(be);
}

static void add_smooth_and_bias(layer *l)
{
    float *p = layer_floats(l, l->w.cols + l->w.rows, 0.3f); /* one block: a layer has room for eight */
    for (int64_t c = 0; c < l->w.cols; c++) p[c] = 0.5f + fabsf(p[c]);
    l->w.pre_quant_scale = layer_view(p, MOQ_F32, l->w.cols);
    l->w.scheme.pre_quant_scale = 1;
    l->w.bias = layer_view(p + l->w.cols, MOQ_F32, l->w.rows);
}

static void add_lora(layer *l, int rank)
{
    l->w.scheme.lora_rank = (uint16_t)rank;
    float *p = layer_floats(l, rank * (l->w.cols + l->w.rows), 0.1f);
    l->w.lora_a = layer_view(p, MOQ_F32, rank * l->w.cols);
    l->w.lora_b = layer_view(p + rank * l->w.cols, MOQ_F32, l->w.rows * rank);
}

/* Inputs as stored, with and without what may stand before and beside the product. */
static void test_cuda_inputs(void)
{
    static const int formats[4] = {4, 16, 23, 14}; /* nvfp4, int8, act order, fp8 blocks */
    moq_backend *be = backend_of(MOQ_ACT_STORED, NULL, MOQ_F32);
    for (size_t i = 0; i < MOQI_COUNT(input_formats); i++)
        for (int f = 0; f < 4; f++)
            for (int extra = 0; extra < 4; extra++) {
                layer l;
                layer_make(&l, &layer_formats[formats[f]], 21, 304);
                l.w.scheme.input = input_formats[i].c;
                l.w.input_scale = input_formats[i].scale;
                l.w.input_zero = input_formats[i].zero;
                if (extra & 1) add_smooth_and_bias(&l);
                if (extra & 2) add_lora(&l, 5);
                for (int m = 1; m < 20; m += 8) {
                    long wrong = check_linear(be, &l, 1, m);
                    if (wrong) fprintf(stderr, "%s, %s, extra %d, %d rows: %ld wrong\n", input_formats[i].name, l.w.name, extra, m, wrong);
                    CHECK_INT(wrong, 0);
                }
                layer_free(&l);
            }
    for (int wide = 0; wide < 2; wide++) { /* a row that several blocks feed; whole tokens */
        layer l;
        layer_make(&l, &layer_formats[4], 24, 4112);
        l.w.scheme.input = input_formats[wide ? 7 : 5].c;
        l.w.input_scale = 0.0008f;
        add_smooth_and_bias(&l);
        add_lora(&l, 16);
        CHECK_INT(check_linear(be, &l, 1, 3), 0);
        layer_free(&l);
    }
    done(be);
}

/* W4A8_AWQ: the weight is rounded once more, only when inputs are. */
static void test_cuda_requantized(void)
{
    layer l;
    moq_backend *be = backend_of(MOQ_ACT_STORED, NULL, MOQ_F32), *wide;
    layer_make(&l, &layer_formats[19], 34, 256);
    l.w.scheme.input = input_formats[0].c;
    l.w.input_scale = 0.01f;
    l.w.scheme.requantize_fp8 = 1;
    l.w.requant_scale = 0.003f;
    CHECK_INT(check_linear(be, &l, 1, 2), 0);
    CHECK_INT(check_linear(be, &l, 1, 70), 0);
    done(be);
    wide = wide_backend();
    CHECK(check_linear(wide, &l, 1, 2) > 0);
    l.w.requant_scale = 0;
    CHECK_INT(check_linear(wide, &l, 0, 2), 0);
    done(wide);
    layer_free(&l);
}

static void test_cuda_rotation(void)
{
    moq_backend *be = wide_backend();
    for (int turn = 0; turn < 4; turn++) {
        moq_error err;
        layer l;
        int stored = turn & 1, cols = turn & 2 ? 2048 : 96;
        layer_make(&l, &layer_formats[0], 9, cols);
        l.w.scheme.hadamard = 1;
        l.w.hadamard_size = 32;
        l.w.hadamard_scale = 0.25f;
        float *h = layer_floats(&l, 1024, 1), *x = random_floats((size_t)(2 * cols)), *t = random_floats((size_t)(2 * cols)), y[18];
        if (stored) l.w.hadamard = layer_view(h, MOQ_F32, 1024);
        for (int r = 0; r < 2; r++) moqi_rotate_input(stored ? h : NULL, 32, 0.25f, x + r * cols, cols, t + r * cols);
        moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
        CHECK(w != NULL);
        run_linear(be, w, x, 2, cols, 9, y);
        for (int64_t r = 0; r < 18; r++) {
            double bound, want = oracle_output(&l, r % 9, t + r / 9 * cols, t + r / 9 * cols, &bound);
            CHECK(fabs(want - (double)y[r]) <= 4e-6 * bound);
        }
        be->release_weight(be, w);
        l.w.hadamard_size = 36;
        CHECK(be->prepare_linear(be, &l.w, 1, &err) == NULL && err.code == MOQ_E_SHAPE);
        free(x); free(t);
        layer_free(&l);
    }
    done(be);
}

/* Slices of rows (also interleaved) and of columns: what the same rows and columns of the whole layer give. */
static void test_cuda_slices(void)
{
    moq_backend *be = wide_backend();
    for (size_t i = 0; i < MOQI_COUNT(layer_formats); i++) {
        layer l, s;
        moq_error err;
        layer_make(&l, &layer_formats[i], 256, 768);
        int64_t first = layer_formats[i].padded ? 160 : 128, cols = layer_formats[i].padded ? 480 : 512;
        add_smooth_and_bias(&l);
        add_lora(&l, 3);
        s = l;
        if (moq_slice_rows(&l.w, 129, 50, 2, &s.w, &err) < 0 || moq_slice_cols(&s.w, first, cols, &s.w, &err) < 0) { fprintf(stderr, "%s\n", err.text); CHECK(0); continue; }
        s.exact = (double *)malloc(sizeof(double) * (size_t)(50 * cols));
        for (int64_t r = 0; r < 50; r++) memcpy(s.exact + r * cols, l.exact + (129 + 2 * r) * l.w.cols + first, (size_t)cols * sizeof(double));
        for (int m = 1; m < 20; m += 18) {
            long wrong = check_linear(be, &s, 0, m);
            if (wrong) fprintf(stderr, "%s: %ld wrong\n", l.w.name, wrong);
            CHECK_INT(wrong, 0);
        }
        free(s.exact);
        layer_free(&l);
    }
    done(be);
}

/* Several layers of one input; parts that share their feed and parts that do not. */
static void test_cuda_fused(void)
{
    enum { ROWS = 21, COLS = 544 };
    static const int heights[4] = {130, 47, 64, 5};
    layer l[4];
    moq_linear parts[4];
    moq_error err;
    int out = 0, at = 0;
    for (int i = 0; i < 4; i++) {
        layer_make(&l[i], &layer_formats[i == 1 ? 8 : i == 3 ? 2 : 4], heights[i], COLS);
        l[i].w.scheme.input = input_formats[i >= 2 ? 0 : 7].c;
        l[i].w.input_scale = 0.001f;
        add_lora(&l[i], 3);
        parts[i] = l[i].w;
        out += heights[i];
    }
    float *x = random_floats(ROWS * COLS), *y = random_floats((size_t)(ROWS * out)), *z = random_floats((size_t)(ROWS * out));
    moq_backend *be = backend_of(MOQ_ACT_STORED, NULL, MOQ_F32);
    moq_weight *w = be->prepare_linear(be, parts, 4, &err);
    CHECK(w != NULL && be->weight_bytes(be, w) > 0);
    run_linear(be, w, x, ROWS, COLS, out, y);
    for (int i = 0; i < 4; i++) {
        moq_weight *one = be->prepare_linear(be, &parts[i], 1, &err);
        run_linear(be, one, x, ROWS, COLS, heights[i], z);
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < heights[i]; c++) CHECK(fabsf(z[r * heights[i] + c] - y[r * out + at + c]) <= 1e-4f * (1 + fabsf(y[r * out + at + c])));
        be->release_weight(be, one);
        at += heights[i];
    }
    be->release_weight(be, w);
    parts[1].cols = 32;
    CHECK(be->prepare_linear(be, parts, 2, &err) == NULL && err.code == MOQ_E_SHAPE && strstr(err.text, "nvfp4"));
    CHECK(be->prepare_linear(be, parts, 0, &err) == NULL && err.code == MOQ_E_ARG);
    for (int i = 0; i < 4; i++) layer_free(&l[i]);
    free(x); free(y); free(z);
    done(be);
}

/* Layers of different heights and one input, as q, k and v of grouped heads: each as it is alone. y begins as a number that nothing writes. */
static void check_bank(moq_dtype activations, moq_act act, int format, int cols, const int heights[3], int rows)
{
    layer l[3];
    moq_linear parts[3];
    moq_error err;
    int out = 0, at = 0, wrong = 0;
    moq_backend *be = backend_of(act, NULL, activations);
    for (int i = 0; i < 3; i++) {
        layer_make(&l[i], &layer_formats[format], heights[i], cols);
        parts[i] = l[i].w;
        out += heights[i];
    }
    const size_t n = (size_t)(rows * out);
    float *x = random_floats((size_t)(rows * cols)), *y = random_floats(n), *z = random_floats(n);
    moq_weight *w = be->prepare_linear(be, parts, 3, &err);
    CHECK(w && be->reserve(be, rows, &err) == MOQ_OK);
    for (size_t i = 0; i < n; i++) y[i] = -1e30f;
    void *dx = device_floats(be, x, (size_t)(rows * cols)), *dy = device_floats(be, y, n);
    be->linear(be, w, dx, rows, dy);
    be->download_act(be, y, dy, n);
    be->release(be, dx);
    be->release(be, dy);
    for (int i = 0; i < 3; at += heights[i++]) {
        double size = 0;
        moq_weight *one = be->prepare_linear(be, &parts[i], 1, &err);
        run_linear(be, one, x, rows, cols, heights[i], z);
        for (int k = 0; k < rows * heights[i]; k++) size += (double)z[k] * (double)z[k];
        size = sqrt(size / (rows * heights[i]));
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < heights[i]; c++) wrong += !(fabs((double)z[r * heights[i] + c] - (double)y[r * out + at + c]) <= 0.02 * (size + fabs((double)z[r * heights[i] + c])));
        be->release_weight(be, one);
    }
    if (wrong) fprintf(stderr, "%s, act %d, %s, [%d + %d + %d, %d], %d rows: %d wrong\n", moq_dtype_name(activations), (int)act, layer_formats[format].name, heights[0],
                       heights[1], heights[2], cols, rows, wrong);
    CHECK_INT(wrong, 0);
    be->release_weight(be, w);
    for (int i = 0; i < 3; i++) layer_free(&l[i]);
    free(x); free(y); free(z);
    done(be);
}

static void test_cuda_banks(void)
{
    static const int formats[] = {2, 4, 8, 11, 14, 16, 19}, rows[] = {1, 8, 16, 19, 40, 130}, heights[2][3] = {{256, 128, 128}, {48, 400, 16}};
    for (size_t f = 0; f < MOQI_COUNT(formats); f++)
        for (size_t r = 0; r < MOQI_COUNT(rows); r++)
            for (int h = 0; h < 2; h++) {
                check_bank(MOQ_F32, MOQ_ACT_AUTO, formats[f], 256, heights[h], rows[r]);
                check_bank(MOQ_F32, MOQ_ACT_WIDE, formats[f], 1152, heights[h], rows[r]);
                check_bank(MOQ_BF16, MOQ_ACT_AUTO, formats[f], 640, heights[h], rows[r]);
            }
}

static void test_cuda_refuses(void)
{
    moq_error err;
    moq_cuda_desc d;
    layer l;
    char text[400];
    memset(&d, 0, sizeof d);
    d.kernel = "abacus";
    CHECK(moq_cuda_backend_with(&d, &err) == NULL && err.code == MOQ_E_ARG && strstr(err.text, "abacus") && strstr(err.text, "reference"));
    CHECK(moq_cuda_backend(4711, &err) == NULL && err.code == MOQ_E_NOTFOUND && strstr(err.text, "cuda:4711"));
    CHECK(moq_cuda_backend(-1, &err) == NULL && err.code == MOQ_E_NOTFOUND);
    moq_backend *be = backend_of(MOQ_ACT_STORED, NULL, MOQ_F32);
    layer_make(&l, &layer_formats[4], 16, 64);
    moq_linear bad = l.w;
    bad.experts = 4;
    CHECK(be->supports(be, &bad, &err) == MOQ_E_ARG);
    bad = l.w;
    bad.scheme.input = input_formats[0].c; /* static, but no scale */
    CHECK(be->supports(be, &bad, &err) == MOQ_E_MISSING);
    bad.scheme.input.elem = MOQ_F6_E2M3;
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
    size_t n = be->explain(be, &bad, text, sizeof text);
    CHECK(n == strlen(text) && strstr(text, "nvfp4") && strstr(text, "as stored"));
    CHECK(be->explain(be, &bad, text, 5) == n && strlen(text) == 4);
    bad = l.w;
    be->explain(be, &bad, text, sizeof text);
    CHECK(!strstr(text, "moe-few"));
    bad.name = "model.layers.0.mlp.experts.3.up_proj"; /* 64 columns are too few */
    be->explain(be, &bad, text, sizeof text);
    CHECK(!strstr(text, "moe-few"));
    layer_free(&l);
    layer_make(&l, &layer_formats[4], 768, 512);
    l.w.name = bad.name;
    be->explain(be, &l.w, text, sizeof text);
    CHECK((strstr(text, "moe-few") != NULL) == (strstr(text, "SM90") != NULL)); /* the only one that it is written for */
    CHECK(strstr(text, "decode-mma: ") == text); /* from 512 columns on; a layer that stands alone: from 1024 on */
    l.w.name = "model.layers.0.mlp.shared_experts.up_proj";
    be->explain(be, &l.w, text, sizeof text);
    CHECK(!strstr(text, "moe-few") && strstr(text, "reference-gemv: ") == text);
    CHECK(be->reserve(be, 0, &err) == MOQ_E_ARG);
    layer_free(&l);
    done(be);
}

/* A table without "embed" in its name: its rows, or a refusal where kernels read another layout alone. */
static void check_other_table(moq_backend *be, int format, int64_t cols)
{
    moq_error err;
    layer l;
    const int32_t id = 7;
    layer_make(&l, &layer_formats[format], 64, cols);
    l.w.name = "words";
    float *y = random_floats((size_t)l.w.cols);
    moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
    int32_t *did = (int32_t *)device_bytes(be, &id, sizeof id);
    void *dy = device_floats(be, NULL, (size_t)l.w.cols);
    be->embed(be, w, did, 1, 1, dy);
    const moq_result code = be->sync(be, &err);
    CHECK(code == MOQ_OK || (code == MOQ_E_STATE && strstr(err.text, "embed")));
    be->download_act(be, y, dy, (size_t)l.w.cols);
    for (int64_t c = 0; code == MOQ_OK && c < l.w.cols; c++) CHECK(y[c] == (float)l.exact[id * l.w.cols + c]);
    be->release_weight(be, w);
    be->release(be, did);
    be->release(be, dy);
    free(y);
    layer_free(&l);
}

static void test_cuda_embed(void)
{
    moq_error err;
    int32_t ids[5] = {3, 0, 99, 100, -1};
    moq_backend *be = wide_backend();
    for (size_t f = 0; f < MOQI_COUNT(layer_formats); f++) {
        layer l;
        layer_make(&l, &layer_formats[f], 100, 64);
        if (l.w.rows != 100) { layer_free(&l); continue; }
        l.w.name = "embed_tokens";
        int64_t cols = l.w.cols;
        float *y = random_floats((size_t)(5 * cols));
        moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
        int32_t *dids = (int32_t *)device_bytes(be, ids, sizeof ids);
        void *dy = device_floats(be, NULL, (size_t)(5 * cols));
        be->embed(be, w, dids, 5, 2.5f, dy);
        be->download_act(be, y, dy, (size_t)(5 * cols));
        long wrong = 0;
        for (int i = 0; i < 5; i++)
            for (int64_t c = 0; c < cols; c++) wrong += y[i * cols + c] != (ids[i] >= 0 && ids[i] < 100 ? (float)l.exact[ids[i] * cols + c] * 2.5f : 0);
        if (wrong) fprintf(stderr, "%s: %ld wrong\n", layer_formats[f].name, wrong);
        CHECK_INT(wrong, 0);
        be->release_weight(be, w);
        be->release(be, dids);
        be->release(be, dy);
        free(y);
        layer_free(&l);
        check_other_table(be, (int)f, 1024);
    }
    done(be);
}

/* ---- mixtures of experts ---- */

enum { MIXED = 12 };

typedef struct mixture { layer gate[MIXED], up[MIXED], down[MIXED]; moq_linear g[MIXED], u[MIXED], d[MIXED]; moq_moe moe; float bias[MIXED]; int inter; } mixture;

static void mixture_make(mixture *m, int experts, int top, moq_activation kind, int extras)
{
    memset(m, 0, sizeof *m);
    m->inter = extras == 4 ? 64 : 40; /* a multiple of the format's groups */
    for (int e = 0; e < experts; e++) {
        layer_make(&m->gate[e], &layer_formats[extras == 4 ? 15 : 4], m->inter, 96); /* 4: MXFP8 */
        layer_make(&m->up[e], &layer_formats[extras == 4 ? 15 : extras == 3 && e % 2 ? 21 : 4], m->inter, 96); /* 3: two formats side by side */
        layer_make(&m->down[e], &layer_formats[extras == 4 ? 15 : extras ? 11 : 2], 50, m->inter);
        layer *all[3] = {&m->gate[e], &m->up[e], &m->down[e]};
        for (int i = 0; extras && i < 3; i++) {
            moq_linear *w = &all[i]->w;
            w->bias = layer_view(layer_floats(all[i], w->rows, 0.3f), MOQ_F32, w->rows);
            if (extras == 2) { /* gate and up want different inputs */
                w->pre_quant_scale = layer_view(layer_floats(all[i], w->cols, 1), MOQ_F32, w->cols);
                w->scheme.pre_quant_scale = 1;
                add_lora(all[i], 2);
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
    m->moe.routing.renormalize = extras != 3;
    m->moe.routing.score = extras ? MOQ_SCORE_SIGMOID : MOQ_SCORE_SOFTMAX;
    m->moe.routing.scale = extras == 3 ? 2.5f : 0;
    if (extras) m->moe.routing.bias = layer_view(m->bias, MOQ_F32, experts);
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
    for (int e = 0; e < MIXED; e++) { layer_free(&m->gate[e]); layer_free(&m->up[e]); layer_free(&m->down[e]); }
}

/* One layer of an expert in double, inputs wide or rounded. */
static void oracle_expert_layer(const layer *l, const moq_linear *w, int stored, const float *x, double *y)
{
    float t[96], r[96];
    for (int64_t c = 0; c < l->w.cols; c++) t[c] = l->w.pre_quant_scale.data ? x[c] * ((const float *)l->w.pre_quant_scale.data)[c] : x[c];
    if (stored) moq_round_input(w, t, r);
    else memcpy(r, t, sizeof r);
    for (int64_t i = 0; i < l->w.rows; i++) {
        double bound;
        y[i] = oracle_output(l, i, t, r, &bound);
    }
}

static void check_moe(moq_backend *be, mixture *m, int rows, int stored, double limit)
{
    enum { OUT = 50, COLS = 96 };
    moq_error err;
    int experts = m->moe.routing.experts, top = m->moe.routing.top_k;
    moq_activation kind = m->moe.activation.kind;
    float *x = random_floats((size_t)(rows * COLS)), *logits = random_floats((size_t)(rows * experts)), *y = random_floats((size_t)(rows * OUT));
    for (int i = 0; be->act == MOQ_BF16 && i < rows * COLS; i++) x[i] = bf16_of(x[i]);
    for (int i = 0; be->act == MOQ_BF16 && i < rows * experts; i++) logits[i] = bf16_of(logits[i]);
    moq_experts *p = be->prepare_moe(be, &m->moe, &err);
    if (!p) { fprintf(stderr, "%s\n", err.text); CHECK(0); return; }
    void *dx = device_floats(be, x, (size_t)(rows * COLS)), *dl = device_floats(be, logits, (size_t)(rows * experts)), *dy = device_floats(be, NULL, (size_t)(rows * OUT));
    be->moe(be, p, dx, dl, rows, dy);
    be->download_act(be, y, dy, (size_t)(rows * OUT));
    float *scratch = (float *)calloc((size_t)(5 * experts), sizeof *scratch);
    for (int r = 0; r < rows; r++) {
        float weight[8], mid[96];
        int32_t index[8];
        double want[OUT] = {0}, g[64], u[64], d[OUT], size = 0, gap = 0;
        moqi_route(&m->moe.routing, (const float *)m->moe.routing.bias.data, logits + r * experts, scratch, index, weight);
        for (int i = 0; i < top; i++) {
            int e = index[i] % MIXED; /* see test_cuda_moe_experts */
            oracle_expert_layer(&m->gate[e], &m->g[e], stored, x + r * COLS, g);
            oracle_expert_layer(&m->up[e], &m->u[e], stored, x + r * COLS, u);
            for (int j = 0; j < m->inter; j++) mid[j] = moqi_activate(&m->moe.activation, (float)(kind == MOQ_RELU2 ? u[j] : g[j]), (float)u[j]);
            oracle_expert_layer(&m->down[e], &m->d[e], stored, mid, d);
            for (int c = 0; c < OUT; c++) want[c] += (double)weight[i] * d[c];
        }
        for (int c = 0; c < OUT; c++) { size += want[c] * want[c]; gap += (want[c] - (double)y[r * OUT + c]) * (want[c] - (double)y[r * OUT + c]); }
        if (!(gap <= limit * size && size > 0)) fprintf(stderr, "activation %d, row %d of %d: %g\n", (int)kind, r, rows, sqrt(gap / size));
        CHECK(gap <= limit * size && size > 0);
    }
    be->release(be, dx);
    be->release(be, dl);
    be->release(be, dy);
    be->release_moe(be, p);
    free(x); free(logits); free(y); free(scratch);
}

static void test_cuda_moe(void)
{
    static const int rows[6] = {1, 2, 5, 19, 70, 130};
    for (int kind = 0; kind <= (int)MOQ_RELU2; kind++)
        for (int extras = 0; extras < 4; extras++) {
            mixture m;
            moq_error err;
            moq_backend *be = wide_backend();
            mixture_make(&m, 12, 3, (moq_activation)kind, extras);
            if (extras == 1 || extras == 3) { m.moe.routing.groups = 4; m.moe.routing.top_groups = 2; }
            be->reserve(be, kind == 0 ? 64 : 130, &err);
            for (int i = 0; i < 6; i++) check_moe(be, &m, rows[i], 0, 1e-10);
            done(be);
            mixture_free(&m);
        }
}

/* More experts than a warp keeps in registers, than the warps that sort choices count apart, than threads: the first ones over and over. */
static void test_cuda_moe_experts(void)
{
    static const int counts[] = {200, 600, 1100}, rows[] = {1, 20, 100};
    for (size_t k = 0; k < MOQI_COUNT(counts); k++) {
        mixture m;
        moq_error err;
        moq_backend *be = wide_backend();
        const int experts = counts[k];
        moq_linear *all = (moq_linear *)calloc((size_t)(3 * experts), sizeof *all);
        float *bias = random_floats((size_t)experts);
        mixture_make(&m, MIXED, 6, MOQ_SILU_MUL, 0);
        for (int e = 0; e < experts; e++) {
            all[e] = m.g[e % MIXED];
            all[experts + e] = m.u[e % MIXED];
            all[2 * experts + e] = m.d[e % MIXED];
        }
        m.moe.gate = all;
        m.moe.up = all + experts;
        m.moe.down = all + 2 * experts;
        m.moe.routing.experts = experts;
        if (k == 1) {
            m.moe.routing.score = MOQ_SCORE_SIGMOID;
            m.moe.routing.bias = layer_view(bias, MOQ_F32, experts);
        }
        CHECK(be->reserve(be, 100, &err) == MOQ_OK);
        for (size_t i = 0; i < MOQI_COUNT(rows); i++) check_moe(be, &m, rows[i], 0, 2.4e-10); /* see few_row */
        done(be);
        free(all);
        free(bias);
        mixture_free(&m);
    }
}

/* One kind with everything on top, few rows and a tile: for tools that make each access dear. */
static void test_cuda_moe_small(void)
{
    mixture m;
    moq_error err;
    moq_backend *be = wide_backend();
    mixture_make(&m, 12, 3, MOQ_SILU_MUL, 1);
    m.moe.routing.groups = 4;
    m.moe.routing.top_groups = 2;
    CHECK(be->reserve(be, 19, &err) == MOQ_OK);
    check_moe(be, &m, 1, 0, 1e-10);
    check_moe(be, &m, 19, 0, 1e-10);
    done(be);
    mixture_free(&m);
}

/* Experts that are all alike and large enough have a kernel of their own for few rows: against double, the same bits in eager calls and graphs. */
typedef struct few_case {
    int format, experts, top, kind_of_routing;
    moq_activation kind;
    int cols, n, out, biases;
    moq_dtype activations;
    int unlike;
} few_case;

enum { FEW_ROWS = 40, FEW_EXPERTS = 40 };

static void few_oracle(const few_case *f, const layer *l, const moq_moe *m, const float *x, const float *logits, double *want)
{
    float scratch[5 * FEW_EXPERTS], weight[8];
    int32_t index[8];
    double *mid = (double *)calloc((size_t)f->n, sizeof *mid);
    moqi_route(&m->routing, (const float *)m->routing.bias.data, logits, scratch, index, weight);
    for (int o = 0; o < f->out; o++) want[o] = 0;
    for (int i = 0; i < f->top; i++) {
        const layer *part[3] = {&l[index[i]], &l[f->experts + index[i]], &l[2 * f->experts + index[i]]};
        for (int j = 0; j < f->n; j++) {
            double v[2];
            for (int k = 0; k < 2; k++) {
                v[k] = part[k]->w.bias.data ? (double)((const float *)part[k]->w.bias.data)[j] : 0;
                for (int c = 0; c < f->cols; c++) v[k] += part[k]->exact[(int64_t)j * f->cols + c] * (double)x[c];
            }
            mid[j] = (double)moqi_activate(&m->activation, (float)(f->kind == MOQ_RELU2 ? v[1] : v[0]), (float)v[1]);
        }
        for (int o = 0; o < f->out; o++) {
            double v = part[2]->w.bias.data ? (double)((const float *)part[2]->w.bias.data)[o] : 0;
            for (int j = 0; j < f->n; j++) v += part[2]->exact[(int64_t)o * f->n + j] * mid[j];
            want[o] += (double)weight[i] * v;
        }
    }
    free(mid);
}

/* 0: softmax, 1: sigmoid with a bias, 2: sigmoid as it is, 3: sigmoid with a bias and groups, 4: softmax over all. */
static void few_routing(const few_case *f, float *bias, moq_routing *r)
{
    const int k = f->kind_of_routing;
    r->experts = f->experts;
    r->top_k = f->top;
    r->score = k >= 1 && k <= 3 ? MOQ_SCORE_SIGMOID : MOQ_SCORE_SOFTMAX;
    r->renormalize = k != 2 && k != 4;
    r->scale = k == 1 || k == 3 ? 2.5f : 0;
    if (k == 1 || k == 3) r->bias = layer_view(bias, MOQ_F32, f->experts);
    if (k == 3) { r->groups = 4; r->top_groups = 2; }
}

static void few_row(const few_case *f, const layer *l, const moq_moe *m, const float *x, const float *logits, const float *y, int rows)
{
    double *want = (double *)calloc((size_t)f->out, sizeof *want), size = 0, gap = 0;
    /* F32: 16 bits of x and of what is between the products, (2 * 2^-17)^2. BF16, many rows: gate, up and the experts' outputs are BF16, too, and so are
       weights times the scales of their groups */
    const double limit = f->activations != MOQ_BF16 ? 2.4e-10 : rows <= 16 ? 4e-5 : 1.2e-4;
    few_oracle(f, l, m, x, logits, want);
    for (int o = 0; o < f->out; o++) { size += want[o] * want[o]; gap += (want[o] - (double)y[o]) * (want[o] - (double)y[o]); }
    if (!(gap <= limit * size && size > 0)) fprintf(stderr, "%s, routing %d, %d rows: %g\n", layer_formats[f->format].name, f->kind_of_routing, rows, sqrt(gap / size));
    CHECK(gap <= limit * size && size > 0);
    free(want);
}

/* A score that is NaN, of an expert that nobody would choose: softmax makes the row NaN, and no other. */
static void few_nan(const few_case *f, moq_backend *be, moq_experts *p, const float *x, float *logits, float *y)
{
    const int worst = f->kind_of_routing == 0 || f->kind_of_routing == 4 ? f->experts - 1 : -1;
    if (worst < 0) return;
    float kept = logits[f->experts + worst];
    logits[f->experts + worst] = -(float)NAN;
    void *dx = device_floats(be, x, (size_t)(2 * f->cols)), *dl = device_floats(be, logits, (size_t)(2 * f->experts)), *dy = device_floats(be, NULL, (size_t)(2 * f->out));
    be->moe(be, p, dx, dl, 2, dy);
    be->download_act(be, y, dy, (size_t)(2 * f->out));
    int nan = 0, numbers = 0;
    for (int i = 0; i < f->out; i++) { numbers += y[i] == y[i]; nan += y[f->out + i] != y[f->out + i]; }
    CHECK(numbers == f->out && nan == f->out);
    logits[f->experts + worst] = kept;
    be->release(be, dx);
    be->release(be, dl);
    be->release(be, dy);
}

/* A single row whose every sum is NaN: blocks that wait for sums take it for one. bits: of the NaN. */
static void few_nan_x(const few_case *f, moq_backend *be, moq_experts *p, const float *logits, float *y, uint32_t bits)
{
    float *x = random_floats((size_t)f->cols), *again = random_floats((size_t)f->out);
    int nan = 0;
    memcpy(x + 1, &bits, sizeof bits);
    void *dx = device_floats(be, x, (size_t)f->cols), *dl = device_floats(be, logits, (size_t)f->experts), *dy = device_floats(be, NULL, (size_t)f->out);
    be->moe(be, p, dx, dl, 1, dy);
    be->download_act(be, y, dy, (size_t)f->out);
    be->moe(be, p, dx, dl, 1, dy);
    be->download_act(be, again, dy, (size_t)f->out);
    for (int i = 0; i < f->out; i++) nan += y[i] != y[i] && again[i] != again[i];
    CHECK(nan == f->out);
    be->release(be, dx);
    be->release(be, dl);
    be->release(be, dy);
    free(x);
    free(again);
}

/* Two backends at work at once, whose blocks wait for each other within each launch: both come to an end, with equal bits. */
static void few_two(const few_case *f, const moq_moe *m, const float *x, const float *logits, float *y)
{
    enum { TURNS = 100 };
    moq_error err;
    moq_backend *be[2];
    moq_experts *p[2];
    void *dx[2], *dl[2], *dy[2];
    float *other = random_floats((size_t)f->out);
    for (int i = 0; i < 2; i++) {
        be[i] = backend_of(MOQ_ACT_WIDE, NULL, f->activations);
        p[i] = be[i]->prepare_moe(be[i], m, &err);
        CHECK(p[i] && be[i]->reserve(be[i], 4, &err) == MOQ_OK);
        dx[i] = device_floats(be[i], x, (size_t)f->cols);
        dl[i] = device_floats(be[i], logits, (size_t)f->experts);
        dy[i] = device_floats(be[i], NULL, (size_t)f->out);
    }
    for (int turn = 0; turn < 2 * TURNS; turn++) be[turn & 1]->moe(be[turn & 1], p[turn & 1], dx[turn & 1], dl[turn & 1], 1, dy[turn & 1]);
    be[0]->download_act(be[0], y, dy[0], (size_t)f->out);
    be[1]->download_act(be[1], other, dy[1], (size_t)f->out);
    CHECK(memcmp(y, other, (size_t)f->out * sizeof *y) == 0);
    for (int i = 0; i < 2; i++) {
        be[i]->release(be[i], dx[i]);
        be[i]->release(be[i], dl[i]);
        be[i]->release(be[i], dy[i]);
        be[i]->release_moe(be[i], p[i]);
        CHECK(be[i]->sync(be[i], &err) == MOQ_OK);
        moq_backend_destroy(be[i]);
    }
    free(other);
}

static void check_few(const few_case *f)
{
    layer *l = (layer *)calloc(3 * FEW_EXPERTS, sizeof *l);
    moq_linear *all = (moq_linear *)calloc(3 * FEW_EXPERTS, sizeof *all);
    moq_moe m;
    moq_error err;
    moq_backend *be = backend_of(MOQ_ACT_WIDE, NULL, f->activations);
    const size_t nx = (size_t)(FEW_ROWS * f->cols), nl = (size_t)(FEW_ROWS * f->experts), ny = (size_t)(FEW_ROWS * f->out);
    float *x = random_floats(nx), *logits = random_floats(nl), *bias = random_floats((size_t)f->experts), *y = random_floats(ny), *again = random_floats(ny);
    memset(&m, 0, sizeof m);
    for (int i = 0; i < 3 * f->experts; i++) {
        layer_make(&l[i], &layer_formats[f->unlike && i % 4 == 1 ? 0 : f->format], i < 2 * f->experts ? f->n : f->out, i < 2 * f->experts ? f->cols : f->n);
        if (f->biases) l[i].w.bias = layer_view(layer_floats(&l[i], l[i].w.rows, 1), MOQ_F32, l[i].w.rows);
        all[i] = l[i].w;
    }
    for (size_t i = 0; i < nx; i++) if (be->act == MOQ_BF16) x[i] = bf16_of(x[i]);
    logits[1] = logits[2] = 1.5f; /* equals: the first one is better */
    for (size_t i = 0; i < nl; i++) if (be->act == MOQ_BF16) logits[i] = bf16_of(logits[i]);
    memcpy(logits + f->experts, logits, (size_t)f->experts * sizeof *logits); /* two rows that want the same */
    m.name = "few";
    few_routing(f, bias, &m.routing);
    m.activation.kind = f->kind;
    m.activation.limit = 7;
    m.activation.alpha = 1.702f;
    m.activation.beta = 1;
    m.gate = f->kind == MOQ_RELU2 ? NULL : all;
    m.up = all + f->experts;
    m.down = all + 2 * f->experts;
    moq_experts *p = be->prepare_moe(be, &m, &err);
    if (!p) { fprintf(stderr, "%s\n", err.text); CHECK(0); return; }
    CHECK(be->reserve(be, FEW_ROWS, &err) == MOQ_OK);
    void *dx = device_floats(be, x, nx), *dl = device_floats(be, logits, nl), *dy = device_floats(be, NULL, ny);
    static const int numbers[] = {1, 2, 3, 4, 5, 6, 9, 16, 21, FEW_ROWS};
    for (size_t i = 0; i < MOQI_COUNT(numbers); i++) {
        const int rows = numbers[i];
        moq_graph *g = NULL;
        if (rows % 3 == 1) {
            CHECK(be->capture_begin(be, &err) == MOQ_OK);
            be->moe(be, p, dx, dl, rows, dy);
            CHECK((g = be->capture_end(be, &err)) != NULL);
        }
        for (int turn = 0; turn < 4; turn++) {
            if (g && turn > 1) be->replay(be, g);
            else be->moe(be, p, dx, dl, rows, dy);
            be->download_act(be, turn ? again : y, dy, (size_t)(rows * f->out));
            CHECK(turn == 0 || memcmp(y, again, (size_t)(rows * f->out) * sizeof *y) == 0);
        }
        if (g) be->release_graph(be, g);
        for (int r = 0; r < rows; r++)
            if (rows == 1 || r == rows - 1 || (rows == FEW_ROWS && r == 1)) few_row(f, l, &m, x + r * f->cols, logits + r * f->experts, y + r * f->out, rows); /* double takes its time */
    }
    few_nan(f, be, p, x, logits, again);
    few_nan_x(f, be, p, logits, again, 0x7fc00000u);
    few_nan_x(f, be, p, logits, again, 0xffffffffu);
    few_two(f, &m, x, logits, y);
    be->release(be, dx);
    be->release(be, dl);
    be->release(be, dy);
    be->release_moe(be, p);
    for (int i = 0; i < 3 * f->experts; i++) layer_free(&l[i]);
    free(l); free(all); free(x); free(logits); free(bias); free(y); free(again);
    done(be);
}

static void test_cuda_moe_few(void)
{
    static const few_case cases[] = {
        {4, 9, 3, 0, MOQ_SILU_MUL, 1024, 528, 600, 0, MOQ_F32, 0}, {8, 7, 2, 1, MOQ_SWIGLU_CLAMP, 1056, 544, 528, 1, MOQ_F32, 0},
        {30, 5, 1, 2, MOQ_SILU_MUL, 1024, 512, 640, 1, MOQ_F32, 0}, {31, 6, 4, 4, MOQ_GELU_TANH_MUL, 768, 640, 512, 0, MOQ_F32, 0},
        {4, 40, 2, 3, MOQ_RELU2, 512, 1152, 520, 1, MOQ_BF16, 0}, {8, 6, 5, 0, MOQ_GELU_MUL, 544, 512, 512, 0, MOQ_BF16, 0},
        {19, 4, 3, 1, MOQ_RELU2, 512, 640, 544, 0, MOQ_BF16, 0}, {4, 36, 6, 3, MOQ_SILU_MUL, 2048, 512, 2064, 0, MOQ_F32, 0},
        {4, 40, 8, 0, MOQ_SILU_MUL, 512, 512, 512, 0, MOQ_F32, 0}};
    for (size_t i = 0; i < MOQI_COUNT(cases); i++) check_few(&cases[i]);
}

static void test_cuda_moe_few_small(void)
{
    static const few_case one = {8, 6, 2, 0, MOQ_SWIGLU_CLAMP, 512, 512, 512, 1, MOQ_F32, 0};
    check_few(&one);
}

/* Some experts have F32 weights, which the kernels of the others do not take. */
static void test_cuda_moe_unlike(void)
{
    static const few_case cases[] = {
        {4, 5, 3, 0, MOQ_SILU_MUL, 512, 512, 512, 0, MOQ_F32, 1}, {19, 6, 4, 1, MOQ_RELU2, 512, 640, 512, 1, MOQ_BF16, 1}};
    for (size_t i = 0; i < MOQI_COUNT(cases); i++) check_few(&cases[i]);
}

static void test_cuda_moe_bf16(void)
{
    mixture m;
    moq_backend *be = backend_of(MOQ_ACT_WIDE, NULL, MOQ_BF16);
    mixture_make(&m, 12, 3, MOQ_SILU_MUL, 1);
    check_moe(be, &m, 1, 0, 4e-5);
    check_moe(be, &m, 70, 0, 4e-5);
    done(be);
    mixture_free(&m);
}

static void test_cuda_moe_stored(void)
{
    mixture m;
    moq_error err;
    moq_backend *be = backend_of(MOQ_ACT_STORED, NULL, MOQ_F32);
    mixture_make(&m, 8, 2, MOQ_SILU_MUL, 0);
    for (int e = 0; e < 8; e++) { /* gate and up of odd experts have scales of their own */
        m.g[e].scheme.input = m.u[e].scheme.input = input_formats[7].c;
        m.g[e].input_scale = 0.001f;
        m.u[e].input_scale = e % 2 ? 0.002f : 0.001f;
    }
    check_moe(be, &m, 1, 1, 1e-10);
    check_moe(be, &m, 40, 1, 1e-10);
    for (int e = 0; e < 8; e++) m.d[e].scheme.input = input_formats[5].c; /* whole tokens; a flip at a rounding edge is allowed for */
    check_moe(be, &m, 1, 1, 1e-3);
    check_moe(be, &m, 33, 1, 1e-3);
    m.moe.routing.top_k = 9;
    CHECK(be->prepare_moe(be, &m.moe, &err) == NULL && err.code == MOQ_E_ARG);
    m.moe.routing.top_k = 2;
    m.moe.routing.groups = 3;
    m.moe.routing.top_groups = 1;
    CHECK(be->prepare_moe(be, &m.moe, &err) == NULL && err.code == MOQ_E_ARG);
    m.moe.routing.groups = 0;
    m.d[3].cols = 16;
    CHECK(be->prepare_moe(be, &m.moe, &err) == NULL && err.code == MOQ_E_SHAPE);
    done(be);
    mixture_free(&m);
}

/* gpt-oss with MXFP8 experts: biases, the clamped activation, softmax over the chosen; inputs wide, then rounded as stored. */
static void test_cuda_moe_mxfp8(void)
{
    for (int stored = 0; stored < 2; stored++) {
        mixture m;
        moq_error err;
        moq_backend *be = backend_of(stored ? MOQ_ACT_STORED : MOQ_ACT_WIDE, NULL, MOQ_F32);
        mixture_make(&m, 12, 4, MOQ_SWIGLU_CLAMP, 4);
        m.moe.routing.score = MOQ_SCORE_SOFTMAX;
        m.moe.routing.bias.data = NULL;
        CHECK(be->reserve(be, 130, &err) == MOQ_OK);
        for (int e = 0; stored && e < 12; e++) m.g[e].scheme.input = m.u[e].scheme.input = m.d[e].scheme.input = input_formats[10].c;
        check_moe(be, &m, 1, stored, stored ? 1e-3 : 1e-10); /* the middle may round to the other side */
        check_moe(be, &m, 7, stored, stored ? 1e-3 : 1e-10);
        check_moe(be, &m, 130, stored, stored ? 1e-3 : 1e-10);
        done(be);
        mixture_free(&m);
    }
}

/* ---- attention ---- */

enum { SLOTS = 3, CAPACITY = 4200, MAX_WIDTH = 512 }; /* kv_heads * dim */

typedef struct history { float k[SLOTS][CAPACITY][MAX_WIDTH], v[SLOTS][CAPACITY][MAX_WIDTH]; } history; /* as the cache should hold them */

typedef struct device_batch { moq_batch host, device; } device_batch;

static device_batch batch_of(moq_backend *be, int rows, const int32_t *slot, const int32_t *pos)
{
    device_batch b;
    b.host.rows = rows;
    b.host.max_pos = 0;
    b.host.slot = slot;
    b.host.pos = pos;
    for (int i = 0; i < rows; i++) if (pos[i] > b.host.max_pos) b.host.max_pos = pos[i];
    b.device = b.host;
    b.device.slot = (const int32_t *)device_bytes(be, slot, (size_t)rows * 4);
    b.device.pos = (const int32_t *)device_bytes(be, pos, (size_t)rows * 4);
    return b;
}

static void batch_free(moq_backend *be, device_batch *b)
{
    be->release(be, (void *)(uintptr_t)b->device.slot);
    be->release(be, (void *)(uintptr_t)b->device.pos);
}

/* Append the rows of a batch and remember what a cache of this format keeps of them. */
static void append_rows(moq_backend *be, moq_kv_cache *cache, const moq_kv_desc *d, const device_batch *b, history *h)
{
    enum { STRIDE = MAX_WIDTH + 4 };
    int dim = d->head_dim, vdim = d->value_dim ? d->value_dim : dim, rows = b->host.rows;
    float *k = random_floats((size_t)rows * STRIDE), *v = random_floats((size_t)rows * STRIDE);
    for (int i = 0; be->act == MOQ_BF16 && i < rows * STRIDE; i++) { k[i] = bf16_of(k[i]); v[i] = bf16_of(v[i]); }
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < d->kv_heads; n++) {
            const float *ks = (const float *)d->kv.k_scale.data, *vs = (const float *)d->kv.v_scale.data, *kb = (const float *)d->kv.k_bias.data, *vb = (const float *)d->kv.v_bias.data;
            float kscale = ks ? ks[d->kv.k_scale.count > 1 ? n : 0] : 1, vscale = vs ? vs[d->kv.v_scale.count > 1 ? n : 0] : 1;
            moq_kv_format vf = d->kv.format == MOQ_KV_NVFP4_ROTATE ? MOQ_KV_NVFP4 : d->kv.format;
            moq_round_kv(d->kv.format, kscale, kb ? kb + n * dim : NULL, k + r * STRIDE + n * dim, dim, h->k[b->host.slot[r]][b->host.pos[r]] + n * dim);
            moq_round_kv(vf, vscale, vb ? vb + n * vdim : NULL, v + r * STRIDE + n * vdim, vdim, h->v[b->host.slot[r]][b->host.pos[r]] + n * vdim);
        }
    void *dk = device_floats(be, k, (size_t)rows * STRIDE), *dv = device_floats(be, v, (size_t)rows * STRIDE);
    be->kv_append(be, cache, &b->device, dk, STRIDE, dv, STRIDE);
    be->release(be, dk);
    be->release(be, dv);
    free(k); free(v);
}

/* What a score of one key may be off by: `sizes` is the sum of |q k|, `flat` of |k| and |q|, both times the scale.
     2^-21       a number as two F16 parts keeps 22 bits; the product of both low parts is left out where keys have two, too
     2^-25       below the smallest exponent of F16 a low part keeps steps of 2^-24
     2^-22       of the largest addend, for each of 3 dim / 16 steps on tensor cores, which cut instead of rounding (F32 arithmetic loses less)
     2^-23       of score and maximum: their difference goes into the exponential
     2^-11       BF16 activations: one F16 part */
static double score_loss(double sizes, double flat, int dim, double score, double top, int bf16)
{
    return sizes * (ldexp(1, -21) + 3.0 * ((dim + 15) / 16) * ldexp(1, -22) + (bf16 ? ldexp(1, -11) : 0)) + flat * ldexp(1, -25) + ldexp(fabs(score) + fabs(top), -23);
}

/* y = sum p v / sum p, so dy = sum p (v - y) ds to first order; then what probabilities and sums lose. */
static void check_attention(moq_backend *be, moq_kv_cache *cache, const moq_kv_desc *d, const device_batch *b, const history *h, int heads, int window, float cap, const float *sinks)
{
    int dim = d->head_dim, vdim = d->value_dim ? d->value_dim : dim, rows = b->host.rows, q_stride = heads * dim + 4, y_stride = heads * vdim + 8;
    float *q = random_floats((size_t)(rows * q_stride)), *y = random_floats((size_t)(rows * y_stride));
    double *p = (double *)malloc(CAPACITY * 3 * sizeof *p), *sizes = p + CAPACITY, *flat = sizes + CAPACITY;
    const float *bias = (const float *)d->kv.k_bias.data;
    moq_attention_desc a;
    memset(&a, 0, sizeof a);
    for (int i = 0; be->act == MOQ_BF16 && i < rows * q_stride; i++) q[i] = bf16_of(q[i]);
    void *dq = device_floats(be, q, (size_t)(rows * q_stride)), *dy = device_floats(be, NULL, (size_t)(rows * y_stride)), *ds = sinks ? device_bytes(be, sinks, (size_t)heads * 4) : NULL;
    a.cache = cache;
    a.q = dq;
    a.y = dy;
    a.q_stride = q_stride;
    a.y_stride = y_stride;
    a.heads = heads;
    a.window = window;
    a.softcap = cap;
    a.sinks = (const float *)ds;
    a.scale = cap > 0 ? 0.2f : 0;
    double scale = cap > 0 ? (double)0.2f : 1 / sqrt((double)dim), loose = be->act == MOQ_BF16 ? 8e-3 : 4e-5;
    long wrong = 0;
    be->attention(be, &b->device, &a);
    be->download_act(be, y, dy, (size_t)(rows * y_stride));
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < heads; n++) {
            int kv = n / (heads / d->kv_heads), s = b->host.slot[r], last = b->host.pos[r], from = window > 0 && last - window + 1 > 0 ? last - window + 1 : 0;
            double top = sinks ? (double)sinks[n] : -1e300, sum = 0;
            for (int t = from; t <= last; t++) {
                double qq = 0, kk = 0;
                p[t] = sizes[t] = flat[t] = 0;
                for (int i = 0; i < dim; i++) {
                    double x = (double)q[r * q_stride + n * dim + i], k = (double)h->k[s][t][kv * dim + i], size = fabs(k) + (bias ? 2 * fabs((double)bias[kv * dim + i]) : 0);
                    p[t] += x * k;
                    sizes[t] += fabs(x) * size * scale; /* k - bias and bias are multiplied apart */
                    flat[t] += size + fabs(x) * scale;
                    qq += x * x;
                    kk += k * k;
                }
                if (d->kv.format == MOQ_KV_NVFP4_ROTATE && sqrt(qq * kk) * scale > sizes[t]) sizes[t] = sqrt(qq * kk) * scale; /* both are rotated */
                p[t] *= scale;
                if (cap > 0) p[t] = (double)cap * tanh(p[t] / (double)cap);
                if (p[t] > top) top = p[t];
            }
            if (sinks) sum = exp((double)sinks[n] - top);
            for (int t = from; t <= last; t++) {
                sizes[t] = score_loss(sizes[t], flat[t], dim, p[t], top, be->act == MOQ_BF16);
                sum += p[t] = exp(p[t] - top);
            }
            for (int i = 0; i < vdim; i++) {
                double want = 0, size = 0, reach = 0, slope = 0; /* probabilities go in as two F16 parts: 2^-25 of the largest */
                for (int t = from; t <= last; t++) reach += fabs((double)h->v[s][t][kv * vdim + i]) * 3e-8 / sum;
                for (int t = from; t <= last; t++) { want += p[t] / sum * (double)h->v[s][t][kv * vdim + i]; size += p[t] / sum * fabs((double)h->v[s][t][kv * vdim + i]); }
                for (int t = from; t <= last; t++) slope += p[t] / sum * fabs((double)h->v[s][t][kv * vdim + i] - want) * sizes[t];
                wrong += !(fabs(want - (double)y[r * y_stride + n * vdim + i]) <= loose * size + 1.05 * slope + reach + 1e-6);
            }
        }
    if (wrong) fprintf(stderr, "%s, dims %d %d, heads %d, rows %d, window %d, cap %g: %ld wrong\n", moq_kv_format_name(d->kv.format), dim, vdim, heads, rows, window, (double)cap, wrong);
    CHECK_INT(wrong, 0);
    be->release(be, dq);
    be->release(be, dy);
    be->release(be, ds);
    free(q); free(y); free(p);
}

/* One number of one query head that is NaN: so is all that this head comes to, and nothing else. */
static void check_nan(moq_backend *be, moq_kv_cache *cache, const moq_kv_desc *d, const device_batch *b, int heads)
{
    int dim = d->head_dim, vdim = d->value_dim ? d->value_dim : dim, rows = b->host.rows, bad = heads - 1;
    float *q = random_floats((size_t)(rows * heads * dim)), *y = random_floats((size_t)(rows * heads * vdim));
    moq_attention_desc a;
    long wrong = 0;
    for (int r = 0; r < rows; r++) q[(r * heads + bad) * dim + dim / 2] = moqi_bits_f32(0x7fc00000u);
    void *dq = device_floats(be, q, (size_t)(rows * heads * dim)), *dy = device_floats(be, NULL, (size_t)(rows * heads * vdim));
    memset(&a, 0, sizeof a);
    a.cache = cache;
    a.q = dq;
    a.y = dy;
    a.q_stride = heads * dim;
    a.y_stride = heads * vdim;
    a.heads = heads;
    be->attention(be, &b->device, &a);
    be->download_act(be, y, dy, (size_t)(rows * heads * vdim));
    for (int i = 0; i < rows * heads * vdim; i++) wrong += (y[i] != y[i]) != (i / vdim % heads == bad);
    if (wrong) fprintf(stderr, "%s, dims %d %d, heads %d, rows %d, NaN: %ld wrong\n", moq_kv_format_name(d->kv.format), dim, vdim, heads, rows, wrong);
    CHECK_INT(wrong, 0);
    be->release(be, dq);
    be->release(be, dy);
    free(q); free(y);
}

static history told; /* large */

static void attention_case(moq_dtype activations, moq_kv_format format, int dim, int vdim, int kv_heads, int heads)
{
    float kscale[4] = {0.02f, 0.05f, 0.03f, 0.04f}, vscale[1] = {0.03f}, bias[MAX_WIDTH], sinks[64];
    int32_t slot[256], pos[256];
    moq_backend *be = backend_of(MOQ_ACT_WIDE, NULL, activations);
    moq_error err;
    moq_kv_desc d;
    device_batch b;
    for (int i = 0; i < MAX_WIDTH; i++) bias[i] = test_uniform();
    for (int i = 0; i < 64; i++) sinks[i] = test_normal();
    memset(&told, 0, sizeof told);
    memset(&d, 0, sizeof d);
    d.name = "attention";
    d.slots = SLOTS;
    d.capacity = CAPACITY;
    d.kv_heads = kv_heads;
    d.head_dim = dim;
    d.value_dim = vdim;
    d.kv.format = format;
    d.kv.k_scale = layer_view(kscale, MOQ_F32, kv_heads);
    d.kv.v_scale = layer_view(vscale, MOQ_F32, 1);
    d.kv.k_bias = layer_view(bias, MOQ_F32, kv_heads * dim);
    d.kv.v_bias = layer_view(bias, MOQ_F32, kv_heads * (vdim ? vdim : dim));
    moq_kv_cache *c = be->kv_create(be, &d, &err);
    if (!c) { fprintf(stderr, "%s\n", err.text); CHECK(0); return; }
    CHECK(be->kv_bytes(be, &d) > 0);
    for (int i = 0; i < 60; i++) { slot[i] = i < 40 ? 1 : 0; pos[i] = i < 40 ? i : i - 40; }
    b = batch_of(be, 60, slot, pos);
    append_rows(be, c, &d, &b, &told);
    check_attention(be, c, &d, &b, &told, heads, 0, 0, NULL);
    batch_free(be, &b);
    for (int i = 0; i < 245; i++) { slot[i] = 1; pos[i] = 40 + i; }
    b = batch_of(be, 245, slot, pos);
    append_rows(be, c, &d, &b, &told);
    check_attention(be, c, &d, &b, &told, heads, 0, 0, NULL);
    check_attention(be, c, &d, &b, &told, heads, 7, 0, sinks);
    check_attention(be, c, &d, &b, &told, heads, 40, 3, sinks);
    check_nan(be, c, &d, &b, heads);
    batch_free(be, &b);
    b = batch_of(be, 12, slot, pos); /* few rows of one sequence, as drafts are looked at */
    check_attention(be, c, &d, &b, &told, heads, 0, 0, sinks);
    check_attention(be, c, &d, &b, &told, heads, 40, 3, NULL);
    batch_free(be, &b);
    slot[0] = 0; pos[0] = 20; slot[1] = 1; pos[1] = 285; slot[2] = 2; pos[2] = 0; /* mixed slots in one batch */
    b = batch_of(be, 3, slot, pos);
    append_rows(be, c, &d, &b, &told);
    check_attention(be, c, &d, &b, &told, heads, 0, 5, NULL);
    check_attention(be, c, &d, &b, &told, heads, 0, 0, sinks);
    check_nan(be, c, &d, &b, heads);
    b.device.max_pos = 4095; /* rows may be shorter than what a launch is cut for: some splits see nothing */
    check_attention(be, c, &d, &b, &told, heads, 0, 5, sinks);
    check_nan(be, c, &d, &b, heads);
    batch_free(be, &b);
    be->kv_copy(be, c, 2, 10, 1, 30, 40); /* fork */
    memcpy(told.k[2][10], told.k[1][30], sizeof told.k[0][0] * 40);
    memcpy(told.v[2][10], told.v[1][30], sizeof told.v[0][0] * 40);
    be->kv_copy(be, c, 1, 0, 1, 5, 280); /* shift down over itself */
    memmove(told.k[1][0], told.k[1][5], sizeof told.k[0][0] * 280);
    memmove(told.v[1][0], told.v[1][5], sizeof told.v[0][0] * 280);
    be->kv_copy(be, c, 0, 9, 0, 2, 18); /* and up */
    memmove(told.k[0][9], told.k[0][2], sizeof told.k[0][0] * 18);
    memmove(told.v[0][9], told.v[0][2], sizeof told.v[0][0] * 18);
    slot[0] = 2; pos[0] = 49; slot[1] = 1; pos[1] = 279; slot[2] = 0; pos[2] = 26;
    b = batch_of(be, 3, slot, pos);
    check_attention(be, c, &d, &b, &told, heads, 25, 0, NULL);
    batch_free(be, &b);
    slot[0] = 7; pos[1] = CAPACITY; pos[2] = -1; /* rows outside of the cache change nothing and get zeros */
    b = batch_of(be, 3, slot, pos);
    b.device.max_pos = CAPACITY - 1;
    float zero[3] = {1, 1, 1};
    moq_attention_desc a;
    memset(&a, 0, sizeof a);
    void *junk = device_floats(be, NULL, (size_t)(heads * (dim > vdim ? dim : vdim)) * 4), *out = device_floats(be, NULL, (size_t)(heads * (dim > vdim ? dim : vdim)) * 4);
    be->kv_append(be, c, &b.device, junk, 0, junk, 0);
    a.cache = c;
    a.q = junk;
    a.y = out;
    a.y_stride = heads * (vdim ? vdim : dim);
    a.heads = heads;
    be->attention(be, &b.device, &a);
    be->download_act(be, zero, out, 3);
    for (int i = 0; i < 3; i++) CHECK(zero[i] == 0);
    batch_free(be, &b);
    be->release(be, junk);
    be->release(be, out);
    be->kv_release(be, c);
    done(be);
}

/* Thousands of positions: rings of every warp go round, splits join through memory, launches of different geometry follow each other. */
static void long_case(moq_dtype activations, moq_kv_format format, int dim, int kv_heads, int heads)
{
    static const int last[] = {4000, 2100, 30, 4095, 3071}, max[] = {4095, 4095, 4095, 4095, 3071};
    float scale[1] = {0.03f};
    int32_t slot[256], pos[256];
    moq_backend *be = backend_of(MOQ_ACT_WIDE, NULL, activations);
    moq_error err;
    moq_kv_desc d;
    device_batch b;
    memset(&d, 0, sizeof d);
    d.name = "long";
    d.slots = 2;
    d.capacity = CAPACITY;
    d.kv_heads = kv_heads;
    d.head_dim = dim;
    d.kv.format = format;
    d.kv.k_scale = d.kv.v_scale = layer_view(scale, MOQ_F32, 1);
    moq_kv_cache *c = be->kv_create(be, &d, &err);
    if (!c) { fprintf(stderr, "%s\n", err.text); CHECK(0); return; }
    for (int first = 0; first < 4096; first += 256) {
        for (int i = 0; i < 256; i++) { slot[i] = 1; pos[i] = first + i; }
        b = batch_of(be, 256, slot, pos);
        append_rows(be, c, &d, &b, &told);
        batch_free(be, &b);
    }
    for (size_t i = 0; i < sizeof last / sizeof last[0]; i++) {
        slot[0] = 1;
        pos[0] = last[i];
        b = batch_of(be, 1, slot, pos);
        b.device.max_pos = max[i];
        for (int again = 0; again < 2; again++) check_attention(be, c, &d, &b, &told, heads, 0, 0, NULL);
        check_attention(be, c, &d, &b, &told, heads, 700, 0, NULL);
        batch_free(be, &b);
    }
    for (int i = 0; i < 3; i++) { slot[i] = 1; pos[i] = last[i]; }
    b = batch_of(be, 3, slot, pos);
    check_attention(be, c, &d, &b, &told, heads, 0, 0, NULL);
    batch_free(be, &b);
    for (int i = 0; i < 17; i++) { slot[i] = 1; pos[i] = i < 5 ? 4095 - i : i * 1237 % 4096; } /* in no order: few rows of one sequence, a tile of queries */
    b = batch_of(be, 11, slot, pos);
    check_attention(be, c, &d, &b, &told, heads, 0, 0, NULL);
    check_attention(be, c, &d, &b, &told, heads, 700, 3, NULL);
    check_nan(be, c, &d, &b, heads);
    batch_free(be, &b);
    b = batch_of(be, 17, slot, pos);
    check_attention(be, c, &d, &b, &told, kv_heads, 0, 0, NULL); /* one query head each: the oracle is slow */
    check_attention(be, c, &d, &b, &told, kv_heads, 700, 3, NULL);
    batch_free(be, &b);
    for (int i = 0; i < 17; i++) pos[i] = 4000 + i; /* the first keys that a tile sees are far from 0 */
    b = batch_of(be, 17, slot, pos);
    check_attention(be, c, &d, &b, &told, kv_heads, 700, 0, NULL);
    batch_free(be, &b);
    be->kv_release(be, c);
    done(be);
}

/* More tiles of queries than the device has multiprocessors; tiles of two slots, and rows of none. */
static void prompt_case(moq_dtype activations, moq_kv_format format, int dim)
{
    enum { ROWS = 165, HEADS = 128 };
    const int KV = dim > 128 ? 2 : 4;
    float scale[1] = {0.03f};
    int32_t slot[ROWS], pos[ROWS];
    moq_backend *be = backend_of(MOQ_ACT_WIDE, NULL, activations);
    moq_error err;
    moq_kv_desc d;
    memset(&d, 0, sizeof d);
    d.name = "prompt";
    d.slots = 2;
    d.capacity = ROWS;
    d.kv_heads = KV;
    d.head_dim = dim;
    d.kv.format = format;
    d.kv.k_scale = d.kv.v_scale = layer_view(scale, MOQ_F32, 1);
    moq_kv_cache *c = be->kv_create(be, &d, &err);
    if (!c) { fprintf(stderr, "%s\n", err.text); CHECK(0); return; }
    for (int i = 0; i < ROWS; i++) { slot[i] = i >= 70; pos[i] = i < 70 ? i : i - 70; }
    device_batch b = batch_of(be, ROWS, slot, pos);
    append_rows(be, c, &d, &b, &told);
    check_attention(be, c, &d, &b, &told, HEADS, dim < 128 ? 30 : 0, 0, NULL);
    float *first = (float *)malloc(sizeof(float) * ROWS * HEADS * dim), *again = (float *)malloc(sizeof(float) * ROWS * HEADS * dim);
    float *q = random_floats((size_t)(ROWS * HEADS * dim));
    void *dq = device_floats(be, q, (size_t)(ROWS * HEADS * dim)), *dy = device_floats(be, NULL, (size_t)(ROWS * HEADS * dim));
    moq_attention_desc a;
    memset(&a, 0, sizeof a);
    a.cache = c;
    a.q = dq;
    a.y = dy;
    a.q_stride = a.y_stride = HEADS * dim;
    a.heads = HEADS;
    be->attention(be, &b.device, &a);
    be->download_act(be, first, dy, (size_t)(ROWS * HEADS * dim));
    for (int i = 0; i < 5; i++) {
        be->attention(be, &b.device, &a);
        be->download_act(be, again, dy, (size_t)(ROWS * HEADS * dim));
        CHECK(memcmp(first, again, sizeof(float) * (size_t)(ROWS * HEADS * dim)) == 0);
    }
    batch_free(be, &b);
    for (int i = 0; i < ROWS; i++) if (i % 20 == 3) { if (i % 3) slot[i] = 7; else pos[i] = i % 2 ? -1 : ROWS; } /* the others keep their bits */
    b = batch_of(be, ROWS, slot, pos);
    be->attention(be, &b.device, &a);
    be->download_act(be, again, dy, (size_t)(ROWS * HEADS * dim));
    for (int i = 0; i < ROWS * HEADS * dim; i++) if (i / (HEADS * dim) % 20 == 3) first[i] = 0;
    CHECK(memcmp(first, again, sizeof(float) * (size_t)(ROWS * HEADS * dim)) == 0);
    batch_free(be, &b);
    be->release(be, dq);
    be->release(be, dy);
    free(first); free(again); free(q);
    be->kv_release(be, c);
    done(be);
}

static void test_cuda_attention_prompt(void)
{
    prompt_case(MOQ_F32, MOQ_KV_WIDE, 64);
    prompt_case(MOQ_F32, MOQ_KV_WIDE, 256);
    prompt_case(MOQ_F32, MOQ_KV_FP8, 128);
    prompt_case(MOQ_F32, MOQ_KV_MXFP4, 64);
    prompt_case(MOQ_BF16, MOQ_KV_WIDE, 128);
    prompt_case(MOQ_BF16, MOQ_KV_MXFP4, 64);
    prompt_case(MOQ_BF16, MOQ_KV_FP8, 256);
    prompt_case(MOQ_F32, MOQ_KV_NVFP4, 256);
}

static void test_cuda_attention_long(void)
{
    long_case(MOQ_F32, MOQ_KV_FP8, 128, 2, 8);
    long_case(MOQ_BF16, MOQ_KV_FP8, 128, 4, 32);
    long_case(MOQ_BF16, MOQ_KV_WIDE, 128, 2, 4);
    long_case(MOQ_F32, MOQ_KV_INT8, 64, 3, 9);
    long_case(MOQ_BF16, MOQ_KV_NVFP4, 64, 2, 10);
    long_case(MOQ_F32, MOQ_KV_NVFP4, 128, 2, 8);
    long_case(MOQ_F32, MOQ_KV_MXFP4, 128, 3, 3);
    long_case(MOQ_BF16, MOQ_KV_MXFP4, 64, 2, 14);
    long_case(MOQ_F32, MOQ_KV_MXFP4, 256, 1, 6);
    long_case(MOQ_F32, MOQ_KV_FP8, 256, 2, 16);
    long_case(MOQ_BF16, MOQ_KV_WIDE, 256, 2, 4);
    long_case(MOQ_F32, MOQ_KV_INT8, 96, 2, 4);
    long_case(MOQ_F32, MOQ_KV_WIDE, 128, 2, 14);
    long_case(MOQ_F32, MOQ_KV_MXFP4, 64, 2, 6);
}

/* A recorded step whose slot and position change inside of it: what attention reads before the kernel before it has ended is not yet true then. */
static void check_replay(moq_dtype activations, moq_kv_format format, int dim, int kv_heads, int heads, int most)
{
    static const int32_t at[][2] = {{1, 0}, {0, 700}, {1, 1300}, {1, 255}, {0, 256}, {1, 1399}, {0, 0}};
    enum { LONG = 1400 };
    float scale[1] = {0.03f};
    moq_backend *be = backend_of(MOQ_ACT_WIDE, NULL, activations);
    const size_t width = (size_t)(heads * dim), kv_width = (size_t)(kv_heads * dim);
    float *x = random_floats(width), *rows = random_floats(100 * kv_width), *want = random_floats(width), *got = random_floats(width);
    int32_t slot[100], pos[100];
    moq_attention_desc a;
    moq_kv_desc d;
    moq_error err;
    memset(&a, 0, sizeof a);
    memset(&d, 0, sizeof d);
    d.name = "replay";
    d.slots = 2;
    d.capacity = LONG;
    d.kv_heads = kv_heads;
    d.head_dim = dim;
    d.kv.format = format;
    d.kv.k_scale = d.kv.v_scale = layer_view(scale, MOQ_F32, 1);
    moq_kv_cache *cache = be->kv_create(be, &d, &err);
    CHECK(cache != NULL);
    void *dq = device_floats(be, x, width), *dy = device_floats(be, NULL, width), *dr = device_floats(be, rows, 100 * kv_width);
    int32_t *next = (int32_t *)device_bytes(be, at[0], 8);
    for (int first = 0; first < 2 * LONG; first += 100) {
        for (int i = 0; i < 100; i++) { slot[i] = first / LONG; pos[i] = (first + i) % LONG; }
        device_batch b = batch_of(be, 100, slot, pos);
        be->kv_append(be, cache, &b.device, dr, (int64_t)kv_width, dr, (int64_t)kv_width);
        batch_free(be, &b);
    }
    device_batch b = batch_of(be, 1, at[0], at[0] + 1);
    b.device.max_pos = most;
    a.cache = cache;
    a.q = dq;
    a.y = dy;
    a.q_stride = a.y_stride = (int64_t)width;
    a.heads = heads;
    CHECK(be->capture_begin(be, &err) == MOQ_OK);
    for (int i = 0; i < 3; i++) {
        be->copy(be, (void *)(uintptr_t)b.device.slot, next, 4);
        be->copy(be, (void *)(uintptr_t)b.device.pos, next + 1, 4);
        be->attention(be, &b.device, &a);
    }
    moq_graph *g = be->capture_end(be, &err);
    CHECK(g != NULL);
    for (size_t i = 0; g && i < 2 * MOQI_COUNT(at); i++) {
        const int32_t *to = at[i % MOQI_COUNT(at)];
        be->upload_act(be, dy, rows, width);
        be->upload(be, next, to, 8);
        be->replay(be, g);
        be->download_act(be, got, dy, width);
        be->upload(be, (void *)(uintptr_t)b.device.slot, to, 4);
        be->upload(be, (void *)(uintptr_t)b.device.pos, to + 1, 4);
        be->attention(be, &b.device, &a);
        be->download_act(be, want, dy, width);
        CHECK(memcmp(got, want, sizeof *got * width) == 0);
    }
    be->release_graph(be, g);
    be->kv_release(be, cache);
    batch_free(be, &b);
    be->release(be, dq); be->release(be, dy); be->release(be, dr); be->release(be, next);
    free(x); free(rows); free(want); free(got);
    done(be);
}

static void test_cuda_attention_replay(void)
{
    static const int most[] = {1399, 2047, 4095}; /* a cluster, a cluster, splits that join through memory */
    for (size_t i = 0; i < MOQI_COUNT(most); i++) {
        check_replay(MOQ_BF16, MOQ_KV_FP8, 128, 2, 8, most[i]);
        check_replay(MOQ_F32, MOQ_KV_NVFP4, 128, 2, 16, most[i]);
        check_replay(MOQ_BF16, MOQ_KV_MXFP4, 64, 1, 3, most[i]);
        check_replay(MOQ_F32, MOQ_KV_INT8, 256, 1, 4, most[i]);
        check_replay(MOQ_F32, MOQ_KV_WIDE, 64, 1, 4, most[i]);
    }
}

static void test_cuda_attention(void)
{
    static const int dims[8][4] = {{64, 0, 2, 2}, {32, 48, 2, 6}, {16, 0, 2, 34}, {128, 0, 2, 8}, {256, 0, 2, 4}, {80, 0, 2, 14}, {192, 128, 1, 3}, {512, 64, 1, 2}};
    for (int f = 0; f < (int)MOQ_KV_FORMAT_COUNT; f++)
        for (int i = 0; i < 8; i++) {
            if (f == MOQ_KV_NVFP4_ROTATE && (dims[i][0] & (dims[i][0] - 1))) continue;
            attention_case(MOQ_F32, (moq_kv_format)f, dims[i][0], dims[i][1], dims[i][2], dims[i][3]);
        }
    attention_case(MOQ_BF16, MOQ_KV_WIDE, 128, 0, 2, 8);
    attention_case(MOQ_BF16, MOQ_KV_FP8, 64, 0, 2, 8);
    attention_case(MOQ_BF16, MOQ_KV_NVFP4, 64, 0, 2, 2);
    attention_case(MOQ_BF16, MOQ_KV_MXFP4, 128, 0, 2, 12);
    attention_case(MOQ_BF16, MOQ_KV_WIDE, 256, 0, 2, 10);
    attention_case(MOQ_BF16, MOQ_KV_WIDE, 96, 0, 2, 4);
    attention_case(MOQ_BF16, MOQ_KV_INT8, 72, 40, 2, 6);
    attention_case(MOQ_BF16, MOQ_KV_MXFP4, 256, 0, 2, 10);
    attention_case(MOQ_F32, MOQ_KV_FP8, 200, 104, 2, 6);
    attention_case(MOQ_F32, MOQ_KV_NVFP4_ROTATE, 256, 0, 1, 8);
}

/* Products of 17 and more rows that are small enough for a sanitizer: tiles and columns that end early, one and several tiles of rows. */
static void check_many(int cols)
{
    static const int formats[] = {2, 4, 8, 14, 19}, tokens[] = {17, 40, 64, 100, 150};
    for (int bf16 = 0; bf16 < 2; bf16++) {
        moq_backend *be = backend_of(MOQ_ACT_WIDE, NULL, bf16 ? MOQ_BF16 : MOQ_F32);
        moq_error err;
        CHECK(be->reserve(be, 160, &err) == MOQ_OK);
        for (size_t i = 0; i < MOQI_COUNT(formats); i++) {
            layer l;
            layer_make(&l, &layer_formats[formats[i]], 168, cols);
            for (size_t m = 0; m < MOQI_COUNT(tokens); m++) CHECK_INT(check_linear(be, &l, 0, tokens[m]), 0);
            layer_free(&l);
        }
        done(be);
    }
}

static void test_cuda_many_small(void) { check_many(256); }
static void test_cuda_many_cut(void) { check_many(1184); } /* columns shared by the blocks of a cluster */
static void test_cuda_many_odd(void) { check_many(832); }  /* 13 slabs of 64 columns, which is no whole number of stages */

/* Every kernel once on little data: what the slower tools of compute-sanitizer run. */
static void test_cuda_each_kernel(void)
{
    static const int formats[] = {0, 1, 2, 4, 9, 11, 14, 16, 18, 19, 22, 23, 27, 30, 32};
    moq_backend *be = wide_backend();
    for (size_t i = 0; i < MOQI_COUNT(formats); i++) {
        layer l;
        layer_make(&l, &layer_formats[formats[i]], 37, 200);
        add_smooth_and_bias(&l);
        if (i % 4 == 3) add_lora(&l, 5);
        for (int m = 0; m < 6; m++) CHECK_INT(check_linear(be, &l, 0, token_counts[m]), 0);
        layer_free(&l);
    }
    done(be);
    for (int f = 0; f < (int)MOQ_KV_FORMAT_COUNT; f++) attention_case(MOQ_F32, (moq_kv_format)f, f % 2 ? 64 : 32, f % 2 ? 0 : 48, 2, 2 << f % 4);
    attention_case(MOQ_BF16, MOQ_KV_WIDE, 128, 0, 1, 3);
}

static void test_cuda_kv_refuses(void)
{
    moq_backend *be = wide_backend();
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
    bad = d; bad.head_dim = 513;
    CHECK(be->kv_create(be, &bad, &err) == NULL && err.code == MOQ_E_UNSUPPORTED);
    bad = d; bad.kv.k_scale = layer_view(&zero, MOQ_F32, 1);
    CHECK(be->kv_create(be, &bad, &err) == NULL && err.code == MOQ_E_SCALE);
    bad = d; bad.kv.v_scale = layer_view(&zero, MOQ_F32, 2);
    CHECK(be->kv_create(be, &bad, &err) == NULL && err.code == MOQ_E_SHAPE);
    bad = d; bad.capacity = 2000000000; bad.slots = 2000000000;
    CHECK(be->kv_create(be, &bad, &err) == NULL && (err.code == MOQ_E_OVERFLOW || err.code == MOQ_E_NOMEM));
    done(be);
}

/* ---- the small operations, against the CPU table ---- */

static void compare(const char *what, const float *a, const float *b, size_t n, double limit)
{
    long wrong = 0;
    for (size_t i = 0; i < n; i++) wrong += !(fabs((double)a[i] - (double)b[i]) <= limit * (1 + fabs((double)b[i])));
    if (wrong) fprintf(stderr, "%s: %ld of %zu differ\n", what, wrong, n);
    CHECK_INT(wrong, 0);
}

static void check_norm(moq_backend *be, moq_backend *cpu, int rows, int cols, int groups, int stride, int add, int in_place, double limit)
{
    size_t n = (size_t)rows * (size_t)(stride ? stride : cols * (groups ? groups : 1)), m = (size_t)rows * (size_t)(cols * (groups ? groups : 1));
    float *x = random_floats(n), *y = random_floats(n), *w = random_floats((size_t)cols), *a = random_floats(m), *gx = random_floats(n), *gy = random_floats(n);
    for (size_t i = 0; be->act == MOQ_BF16 && i < n; i++) x[i] = bf16_of(x[i]);
    for (size_t i = 0; be->act == MOQ_BF16 && i < m; i++) a[i] = bf16_of(a[i]);
    moq_norm_desc d;
    memset(&d, 0, sizeof d);
    d.rows = rows;
    d.cols = cols;
    d.groups = groups;
    d.x_stride = d.y_stride = stride;
    d.eps = 1e-5f;
    void *dx = device_floats(be, x, n), *dy = device_floats(be, y, n), *dw = device_bytes(be, w, (size_t)cols * 4), *da = device_floats(be, a, m);
    d.x = dx;
    d.y = in_place ? dx : dy;
    d.weight = (const float *)dw;
    d.add = add ? da : NULL;
    be->norm(be, &d);
    be->download_act(be, gx, dx, n);
    be->download_act(be, gy, dy, n);
    d.x = x;
    d.y = in_place ? x : y;
    d.weight = w;
    d.add = add ? a : NULL;
    cpu->norm(cpu, &d);
    compare("norm x", gx, x, n, limit);
    compare("norm y", gy, y, n, limit);
    be->release(be, dx);
    be->release(be, dy);
    be->release(be, dw);
    be->release(be, da);
    free(x); free(y); free(w); free(a); free(gx); free(gy);
}

static void check_rope(moq_backend *be, moq_backend *cpu, int interleaved, int first, int dims)
{
    enum { ROWS = 5, HEADS = 3, DIM = 64, STRIDE = 200 };
    float *x = random_floats(ROWS * STRIDE), *gx = random_floats(ROWS * STRIDE), inv[32], table[ROWS * 64], gtable[ROWS * 64];
    int32_t pos[ROWS] = {0, 1, 77, 4096, 130000}, half = (dims ? dims : DIM) / 2;
    for (int i = 0; i < 32; i++) inv[i] = powf(10000, -(float)i / 32);
    for (int i = 0; be->act == MOQ_BF16 && i < ROWS * STRIDE; i++) x[i] = bf16_of(x[i]);
    void *dx = device_floats(be, x, ROWS * STRIDE), *dp = device_bytes(be, pos, sizeof pos), *di = device_bytes(be, inv, sizeof inv), *dt = device_bytes(be, table, sizeof table);
    be->rope_table(be, (const int32_t *)dp, ROWS, (const float *)di, half, 1.25f, (float *)dt);
    cpu->rope_table(cpu, pos, ROWS, inv, half, 1.25f, table);
    be->download(be, gtable, dt, sizeof(float) * (size_t)(ROWS * half * 2));
    compare("rope_table", gtable, table, (size_t)(ROWS * half * 2), 2e-7);
    moq_rope_desc d;
    memset(&d, 0, sizeof d);
    d.stride = STRIDE;
    d.rows = ROWS;
    d.heads = HEADS;
    d.head_dim = DIM;
    d.first = first;
    d.dims = dims;
    d.interleaved = interleaved;
    d.x = dx;
    d.table = (const float *)dt;
    be->rope(be, &d);
    be->download_act(be, gx, dx, ROWS * STRIDE);
    d.x = x;
    d.table = table;
    cpu->rope(cpu, &d);
    compare("rope", gx, x, ROWS * STRIDE, be->act == MOQ_BF16 ? 4e-3 : 1e-6);
    be->release(be, dx);
    be->release(be, dp);
    be->release(be, di);
    be->release(be, dt);
    free(x); free(gx);
}

static void check_argmax(moq_backend *be)
{
    enum { ROWS = 8, N = 1301 };
    float *x = random_floats(ROWS * N), nan = moqi_bits_f32(0x7fc00000u);
    int32_t got[ROWS], want[ROWS] = {700, 3, 1, -1, 0, 1300, -1, 900};
    x[700] = 1000; x[900] = 1000;                                   /* the lowest of equals */
    x[N + 3] = 1e30f; x[N + 2] = nan;
    for (int i = 0; i < N; i++) { x[2 * N + i] = i == 1 ? -5 : nan; x[3 * N + i] = nan; x[4 * N + i] = -1e30f; }
    x[5 * N + 1300] = 5000;
    for (int i = 0; i < N; i++) { x[6 * N + i] = i % 3 ? -INFINITY : nan; x[7 * N + i] = i == 900 ? -3e38f : -INFINITY; }
    void *dx = device_floats(be, x, ROWS * N), *di = device_bytes(be, got, sizeof got);
    be->argmax(be, dx, ROWS, N, (int32_t *)di);
    be->download(be, got, di, sizeof got);
    for (int i = 0; i < ROWS; i++) CHECK_INT(got[i], want[i]);
    be->release(be, dx);
    be->release(be, di);
    free(x);
}

/* kv_enter beside the calls that it stands for: q to rounding of the sums of squares, what the cache stores byte for byte, but for codes whose
   value lay at the middle between two. Then a row at a time: to the bit. */
static void check_enter(int rows, moq_dtype activations, moq_kv_format format, int dim, int vdim, int dims, int interleaved, int norms)
{
    enum { ROWS = 40, HEADS = 6, KV = 3, CAPACITY = 27, WAYS = 3 };
    moq_backend *be = backend_of(MOQ_ACT_WIDE, NULL, activations);
    const int stride = HEADS * dim + KV * (dim + vdim) + 5, elem = activations == MOQ_BF16 ? 2 : 4;
    int32_t slot[ROWS] = {0, 1, 1, 0, 1}, pos[ROWS] = {0, 3, 4, 8, 5};
    for (int i = 5; i < ROWS; i++) { slot[i] = i % 2; pos[i] = 9 + (i - 5) / 2; }
    float *x = random_floats((size_t)(rows * stride)), *norm = random_floats((size_t)(2 * dim)), *turn = random_floats((size_t)(rows * (dims + 1))), *got[WAYS];
    device_batch b = batch_of(be, rows, slot, pos);
    moq_kv_desc kd;
    uint8_t *kept[WAYS];
    size_t bytes = 0;
    long apart = 0;
    moq_error err;
    memset(&kd, 0, sizeof kd);
    kd.name = "kv";
    kd.slots = 2;
    kd.capacity = CAPACITY;
    kd.kv_heads = KV;
    kd.head_dim = dim;
    kd.value_dim = vdim;
    kd.kv.format = format;
    float *dn = (float *)device_bytes(be, norm, sizeof *norm * (size_t)(2 * dim)), *dt = (float *)device_bytes(be, turn, sizeof *turn * (size_t)(rows * dims));
    for (int way = 0; way < WAYS; way++) {
        moq_kv_cache *cache = be->kv_create(be, &kd, &err);
        CHECK(cache != NULL);
        uint8_t *d = (uint8_t *)device_floats(be, x, (size_t)(rows * stride)), *k = d + (size_t)(HEADS * dim * elem), *v = k + (size_t)(KV * dim * elem);
        moq_heads_desc h = {cache, d, k, v, stride, stride, stride, HEADS, norms ? dn : NULL, norms ? dn + dim : NULL, 1e-5f, dims, interleaved, dt};
        if (way == 1) {
            be->kv_enter(be, &b.device, &h);
        } else if (way == 2) {
            for (int r = 0; r < rows; r++) {
                const size_t past = (size_t)(r * stride * elem);
                const moq_batch one = {1, b.device.max_pos, b.device.slot + r, b.device.pos + r};
                h.q = d + past;
                h.k = k + past;
                h.v = v + past;
                h.table = dt + r * dims;
                be->kv_enter(be, &one, &h);
            }
        } else {
            for (int i = 0; i < 2; i++) {
                moq_norm_desc n;
                moq_rope_desc r = {i ? k : d, stride, rows, i ? KV : HEADS, dim, 0, dims, interleaved, dt};
                memset(&n, 0, sizeof n);
                n.x = n.y = i ? k : d;
                n.weight = dn + i * dim;
                n.x_stride = n.y_stride = stride;
                n.rows = rows;
                n.cols = dim;
                n.groups = i ? KV : HEADS;
                n.eps = 1e-5f;
                if (norms) be->norm(be, &n);
                if (dims) be->rope(be, &r);
            }
            be->kv_append(be, cache, &b.device, k, stride, v, stride);
        }
        got[way] = (float *)malloc(sizeof(float) * (size_t)(rows * stride));
        be->download_act(be, got[way], d, (size_t)(rows * stride));
        bytes = be->kv_read(be, cache, 0, CAPACITY, NULL);
        kept[way] = (uint8_t *)malloc(2 * bytes);
        for (int s = 0; s < 2; s++) be->kv_read(be, cache, s, CAPACITY, kept[way] + (size_t)s * bytes);
        be->kv_release(be, cache);
        be->release(be, d);
    }
    for (int r = 0; r < rows; r++) compare("kv_enter", got[1] + r * stride, got[0] + r * stride, (size_t)(HEADS * dim), activations == MOQ_BF16 ? 1e-2 : 2e-6);
    for (size_t i = 0; i < 2 * bytes; i++) apart += kept[0][i] != kept[1][i];
    if (format == MOQ_KV_WIDE && activations == MOQ_F32) /* every last bit may differ there: by value */
        compare("keys and values", (const float *)(const void *)kept[1], (const float *)(const void *)kept[0], 2 * bytes / 4, 2e-6);
    else if (apart * 50 > (long)(2 * bytes)) { printf("%s, %d, %d: %ld of %ld bytes apart\n", moq_kv_format_name(format), dim, dims, apart, (long)(2 * bytes)); CHECK(0); }
    if (!norms && dims == 0) CHECK_INT(apart, 0);
    for (int r = 0; r < rows; r++) CHECK(memcmp(got[1] + r * stride, got[2] + r * stride, sizeof(float) * (size_t)(HEADS * dim)) == 0);
    CHECK(memcmp(kept[1], kept[2], 2 * bytes) == 0);
    for (int i = 0; i < WAYS; i++) { free(got[i]); free(kept[i]); }
    be->release(be, dn);
    be->release(be, dt);
    batch_free(be, &b);
    free(x); free(norm); free(turn);
    done(be);
}

static void test_cuda_enter(void)
{
    for (int a = 0; a < 4; a++) {
        const moq_dtype t = a % 2 ? MOQ_BF16 : MOQ_F32;
        const int rows = a / 2 ? 40 : 5; /* heads in blocks of their own; many of them in one */
        check_enter(rows, t, MOQ_KV_WIDE, 128, 128, 128, 0, 0);
        check_enter(rows, t, MOQ_KV_FP8, 128, 128, 128, 0, 1);
        check_enter(rows, t, MOQ_KV_WIDE, 64, 64, 64, 1, 1);
        check_enter(rows, t, MOQ_KV_INT8, 80, 48, 32, 0, 1);
        check_enter(rows, t, MOQ_KV_INT8, 64, 64, 64, 0, 0);
        check_enter(rows, t, MOQ_KV_FP8, 256, 256, 256, 0, 1);
        check_enter(rows, t, MOQ_KV_NVFP4, 192, 128, 64, 1, 0);
        check_enter(rows, t, MOQ_KV_NVFP4_ROTATE, 256, 256, 0, 0, 1);
        check_enter(rows, t, MOQ_KV_MXFP4, 96, 96, 0, 0, 0);
    }
}

/* And its sum with what it was made of. */
static void check_activation(moq_backend *be, moq_backend *cpu, int kind, int rows, double limit)
{
    const int each = kind == MOQ_RELU2 ? 1 : 2, n = rows >= 256 ? 1420 : 9000 / rows / each, N = rows * n * each; /* of many: quads a step of the block apart */
    float *x = random_floats((size_t)N), *y = random_floats((size_t)N), *g = random_floats((size_t)N);
    moq_activation_desc d = {(moq_activation)kind, 7, 1.702f, 1};
    for (int i = 0; be->act == MOQ_BF16 && i < N; i++) x[i] = bf16_of(x[i]);
    void *dx = device_floats(be, x, (size_t)N), *dy = device_floats(be, NULL, (size_t)N);
    be->activation(be, &d, dx, rows, n, dy);
    be->download_act(be, g, dy, (size_t)(rows * n));
    if (rows < 256) {
        cpu->activation(cpu, &d, x, rows, n, y);
        compare("activation", g, y, (size_t)(rows * n), limit);
    } else { /* as in calls of few rows, to the bit */
        const size_t elem = be->act == MOQ_BF16 ? 2 : 4;
        for (int r = 0; r < rows; r += 10)
            be->activation(be, &d, (const uint8_t *)dx + (size_t)(r * n * each) * elem, 10, n, (uint8_t *)dy + (size_t)(r * n) * elem);
        be->download_act(be, y, dy, (size_t)(rows * n));
        CHECK(memcmp(g, y, sizeof *g * (size_t)(rows * n)) == 0);
    }
    be->add(be, dx, dy, (size_t)(rows * n));
    be->download_act(be, g, dx, (size_t)(rows * n));
    be->download_act(be, y, dy, (size_t)(rows * n));
    cpu->add(cpu, x, y, (size_t)(rows * n));
    compare("add", g, x, (size_t)(rows * n), limit);
    be->release(be, dx);
    be->release(be, dy);
    free(x); free(y); free(g);
}

static void test_cuda_ops(void)
{
    for (int a = 0; a < 2; a++) {
        moq_backend *be = backend_of(MOQ_ACT_WIDE, NULL, a ? MOQ_BF16 : MOQ_F32), *cpu = moq_cpu_backend(NULL, NULL);
        double limit = a ? 1e-2 : 2e-6;
        check_norm(be, cpu, 3, 128, 0, 0, 0, 0, limit);
        check_norm(be, cpu, 5, 1000, 0, 1010, 0, 1, limit);
        check_norm(be, cpu, 2, 5120, 1, 0, 1, 0, limit);
        check_norm(be, cpu, 7, 33, 6, 300, 0, 1, limit);
        check_norm(be, cpu, 7, 33, 6, 300, 1, 0, limit);
        check_rope(be, cpu, 0, 0, 0);
        check_rope(be, cpu, 1, 0, 0);
        check_rope(be, cpu, 0, 16, 32);
        check_rope(be, cpu, 1, 16, 48);
        check_argmax(be);
        for (int kind = 0; kind <= (int)MOQ_RELU2; kind++) {
            check_activation(be, cpu, kind, 9, limit);
            check_activation(be, cpu, kind, 29, limit);
            check_activation(be, cpu, kind, 300, limit);
        }
        moq_backend_destroy(cpu);
        done(be);
    }
}

/* What norm and activation leave in BF16 for the product behind them is what the product would have made of it, and nobody reads it once the F32 values
   have changed: the same calls with a wait behind each give the same bits. */
static void test_cuda_narrowed(void)
{
    enum { ROWS = 70, COLS = 256, INNER = 384 };
    moq_backend *be = backend_of(MOQ_ACT_AUTO, NULL, MOQ_F32);
    moq_error err;
    layer l[3];
    moq_weight *w[3];
    float *x = random_floats(ROWS * COLS), *other = random_floats(ROWS * COLS), *weight = random_floats(COLS), *got[2];
    for (int i = 0; i < 3; i++) layer_make(&l[i], &layer_formats[i == 2 ? 2 : 4], i == 0 ? 2 * INNER : COLS, i == 1 ? INNER : COLS);
    for (int i = 0; i < 3; i++) w[i] = be->prepare_linear(be, &l[i].w, 1, &err);
    CHECK(w[0] && w[1] && w[2] && be->reserve(be, 100, &err) == MOQ_OK);
    void *dx = device_floats(be, x, ROWS * COLS), *dw = device_bytes(be, weight, COLS * 4), *h = device_floats(be, NULL, ROWS * COLS);
    void *g = device_floats(be, NULL, ROWS * 2 * INNER), *mid = device_floats(be, NULL, ROWS * INNER), *y = device_floats(be, NULL, ROWS * COLS);
    for (int i = 0; i < 2; i++) got[i] = (float *)malloc(sizeof(float) * ROWS * COLS);
    for (int turn = 0; turn < 8; turn++)
        for (int waits = 0; waits < 2; waits++) {
            moq_norm_desc n;
            moq_activation_desc a;
            memset(&n, 0, sizeof n);
            memset(&a, 0, sizeof a);
            n.x = dx;
            n.y = h;
            n.weight = (const float *)dw;
            n.rows = turn == 6 ? 33 : ROWS; /* of fewer rows than the product has */
            n.cols = COLS;
            n.eps = 1e-5f;
            if (turn == 6) be->upload_act(be, h, other, ROWS * COLS);
            be->norm(be, &n);
            if (waits) be->sync(be, &err);
            if (turn == 3) be->upload_act(be, h, other, ROWS * COLS);
            if (turn == 4) be->linear(be, w[2], dx, ROWS, h);
            if (turn == 5) be->add(be, h, dx, ROWS * COLS);
            if (waits) be->sync(be, &err);
            be->linear(be, w[0], h, ROWS, g);
            if (waits) be->sync(be, &err);
            be->activation(be, &a, g, ROWS, INNER, mid);
            if (waits) be->sync(be, &err);
            if (turn == 7) be->copy(be, mid, g, sizeof(float) * ROWS * INNER);
            be->linear(be, w[1], mid, ROWS, y);
            be->download_act(be, got[waits], y, ROWS * COLS);
            CHECK(waits == 0 || memcmp(got[0], got[1], sizeof(float) * ROWS * COLS) == 0);
        }
    for (int i = 0; i < 3; i++) { be->release_weight(be, w[i]); layer_free(&l[i]); }
    for (int i = 0; i < 2; i++) free(got[i]);
    be->release(be, dx); be->release(be, dw); be->release(be, h); be->release(be, g); be->release(be, mid); be->release(be, y);
    free(x); free(other); free(weight);
    done(be);
}

/* Mixers against the CPU table: sequences in pieces, interleaved slots, a fork. */
static void check_ssm(moq_backend *be, moq_backend *cpu, int heads, int dim, int state, int groups, int conv)
{
    enum { ROWS = 30 };
    static const struct { int rows, slot[8], period; } calls[5] = {{7, {0}, 1}, {1, {1}, 1}, {24, {0, 1, 1, 2}, 4}, {3, {2, 0, 1}, 3}, {30, {2, 2, 0}, 3}};
    moq_ssm_desc d;
    moq_error err;
    int inner = heads * dim, width = inner + 2 * groups * state, in = inner + width + heads, seen[3] = {0, 0, 0};
    float *w = random_floats((size_t)(width * (conv + 1) + 3 * heads + inner)), *at = w, *x = random_floats((size_t)(ROWS * in)), *y = random_floats((size_t)(ROWS * inner)), *g = random_floats((size_t)(ROWS * inner));
    memset(&d, 0, sizeof d);
    d.name = "mixer";
    d.slots = 3;
    d.heads = heads;
    d.head_dim = dim;
    d.state = state;
    d.groups = groups;
    d.conv = conv;
    d.dt_min = 0.01f;
    d.dt_max = 2;
    d.eps = 1e-5f;
    d.conv_weight = layer_view(at, MOQ_F32, width * conv); at += width * conv;
    if (conv > 2) d.conv_bias = layer_view(at, MOQ_F32, width);
    at += width;
    d.dt_bias = layer_view(at, MOQ_F32, heads); at += heads;
    d.a_log = layer_view(at, MOQ_F32, heads); at += heads;
    d.d = layer_view(at, MOQ_F32, heads); at += heads;
    d.norm = layer_view(at, MOQ_F32, inner);
    for (int i = 0; i < heads; i++) ((float *)w)[width * (conv + 1) + heads + i] = test_uniform();
    moq_ssm *a = be->ssm_create(be, &d, &err), *b = cpu->ssm_create(cpu, &d, &err);
    CHECK(a && b && be->ssm_bytes(be, &d) > 0);
    void *dx = device_floats(be, x, (size_t)(ROWS * in)), *dy = device_floats(be, NULL, (size_t)(ROWS * inner));
    for (int k = 0; a && b && k < 5; k++) {
        int32_t slot[ROWS], pos[ROWS];
        moq_batch host = {calls[k].rows, 0, slot, pos};
        for (int r = 0; r < calls[k].rows; r++) {
            slot[r] = calls[k].slot[r % calls[k].period];
            pos[r] = seen[slot[r]]++;
            for (int i = 0; i < in; i++) x[r * in + i] = be->act == MOQ_BF16 ? bf16_of(test_normal()) : test_normal();
        }
        if (k == 4) slot[5] = -1; /* a row of no slot gives zeros, and the others go on: both tables are told the same */
        device_batch batch = batch_of(be, host.rows, slot, pos);
        be->upload_act(be, dx, x, (size_t)(host.rows * in));
        be->ssm(be, a, &batch.device, dx, dy);
        be->download_act(be, g, dy, (size_t)(host.rows * inner));
        cpu->ssm(cpu, b, &host, x, y);
        compare("ssm", g, y, (size_t)(host.rows * inner), be->act == MOQ_BF16 ? 2e-2 : 2e-5);
        batch_free(be, &batch);
        if (k == 2) {
            be->ssm_copy(be, a, 2, 0);
            cpu->ssm_copy(cpu, b, 2, 0);
            seen[2] = seen[0];
        }
    }
    be->release(be, dx);
    be->release(be, dy);
    be->ssm_release(be, a);
    cpu->ssm_release(cpu, b);
    d.conv = 0;
    CHECK(be->ssm_create(be, &d, &err) == NULL && err.code == MOQ_E_ARG);
    free(w); free(x); free(y); free(g);
}

static void test_cuda_ssm(void)
{
    for (int a = 0; a < 2; a++) {
        moq_backend *be = backend_of(MOQ_ACT_WIDE, NULL, a ? MOQ_BF16 : MOQ_F32), *cpu = moq_cpu_backend(NULL, NULL);
        moq_error err;
        check_ssm(be, cpu, 6, 20, 24, 3, 4);
        check_ssm(be, cpu, 2, 7, 5, 1, 1);
        be->reserve(be, 64, &err);
        check_ssm(be, cpu, 4, 64, 128, 2, 4);
        check_ssm(be, cpu, 2, 128, 128, 2, 2); /* states too large for shared memory */
        float x[60], y[200], z[200];
        moq_copy_desc d = {x, y, 12, 40, 4, 8, 5, 3, 4};
        for (int i = 0; i < 60; i++) x[i] = bf16_of(test_normal());
        for (int i = 0; i < 200; i++) y[i] = bf16_of(test_normal());
        for (int turn = 0; turn < 2; turn++) {
            void *dx = device_floats(be, x, 60), *dy = device_floats(be, y, 200);
            d.x_step = turn ? 0 : 4;
            d.x = x;
            d.y = y;
            cpu->copy_heads(cpu, &d);
            d.x = dx;
            d.y = dy;
            be->copy_heads(be, &d);
            be->download_act(be, z, dy, 200);
            compare("copy_heads", z, y, 200, 0);
            be->release(be, dx);
            be->release(be, dy);
        }
        moq_backend_destroy(cpu);
        done(be);
    }
}

/* What is sent to memory of the host is what a download brings; it may be kept there while the source changes. */
static void check_send(moq_dtype activations)
{
    enum { N = 3001, ODD = 777 };
    moq_backend *be = backend_of(MOQ_ACT_WIDE, NULL, activations);
    moq_error err;
    float *x = random_floats(N), y[N], *host = (float *)be->host_alloc(be, 2 * N * sizeof *host, &err);
    CHECK(host != NULL && host[0] == 0 && host[2 * N - 1] == 0);
    void *d = device_floats(be, x, N);
    be->send_act(be, host, d, N);
    be->add(be, d, d, N);
    be->send_act(be, host + N + 1, (const char *)d + (activations == MOQ_BF16 ? 2 : 4) * ODD, N - ODD);
    CHECK(be->sync(be, &err) == MOQ_OK);
    be->download_act(be, y, d, N);
    for (int i = 0; i < N; i++) CHECK(host[i] + host[i] == y[i]);
    CHECK(host[N] == 0 && memcmp(host + N + 1, y + ODD, (N - ODD) * sizeof *y) == 0);
    be->release(be, d);
    be->host_release(be, host);
    CHECK(be->host_alloc(be, (size_t)1 << 60, &err) == NULL && err.code == MOQ_E_NOMEM);
    free(x);
    done(be);
}

/* Copies of any size, also overlapping ones; uploads larger than the staging memory. */
static void test_cuda_copies(void)
{
    enum { N = 21 << 20 };
    check_send(MOQ_F32);
    check_send(MOQ_BF16);
    moq_backend *be = wide_backend();
    uint8_t *a = (uint8_t *)malloc(N), *b = (uint8_t *)malloc(N);
    for (int i = 0; i < N; i++) a[i] = (uint8_t)test_random();
    uint8_t *d = (uint8_t *)device_bytes(be, a, N);
    be->download(be, b, d, N);
    CHECK(memcmp(a, b, N) == 0);
    static const int moves[5][3] = {{5, 0, 100000}, {0, 5, 100000}, {1000, 200000, 4097}, {300000, 299999, 4096}, {7, 7, 50}};
    for (int i = 0; i < 5; i++) {
        be->copy(be, d + moves[i][0], d + moves[i][1], (size_t)moves[i][2]);
        memmove(a + moves[i][0], a + moves[i][1], (size_t)moves[i][2]);
        be->download(be, b, d, N);
        CHECK(memcmp(a, b, N) == 0);
    }
    for (int i = 0; i < 3000; i++) { /* many small ones */
        be->upload(be, d + i * 7, a + N - 7 - i, 7);
        memmove(b + i * 7, a + N - 7 - i, 7);
    }
    be->download(be, a, d, N);
    CHECK(memcmp(a, b, N) == 0);
    be->release(be, d);
    free(a); free(b);
    done(be);
}

/* ---- graphs, determinism, two backends, memory ---- */

/* A small decoder step: two products, a norm, attention over a cache, experts. */
typedef struct step {
    moq_backend *be;
    layer l[2];
    mixture m;
    moq_weight *w[2];
    moq_experts *experts;
    moq_kv_cache *kv;
    device_batch batch;
    void *x, *h, *qkv, *att, *logits, *y;
    int rows;
} step;

enum { HIDDEN = 96, QKV = (4 + 2 + 2) * 32, ATT = 4 * 32 };

static void step_make(step *s, moq_backend *be, int rows)
{
    moq_error err;
    moq_kv_desc d;
    int32_t slot[64], pos[64];
    memset(s, 0, sizeof *s);
    memset(&d, 0, sizeof d);
    s->be = be;
    s->rows = rows;
    layer_make(&s->l[0], &layer_formats[4], QKV, HIDDEN);
    layer_make(&s->l[1], &layer_formats[11], HIDDEN, ATT);
    for (int i = 0; i < 2; i++) { s->l[i].w.scheme.input = input_formats[i ? 1 : 7].c; s->l[i].w.input_scale = 0.001f; }
    mixture_make(&s->m, 8, 2, MOQ_SILU_MUL, 1);
    for (int i = 0; i < 2; i++) s->w[i] = be->prepare_linear(be, &s->l[i].w, 1, &err);
    s->experts = be->prepare_moe(be, &s->m.moe, &err);
    d.name = "kv";
    d.slots = 2;
    d.capacity = 200;
    d.kv_heads = 2;
    d.head_dim = 32;
    d.kv.format = MOQ_KV_FP8;
    s->kv = be->kv_create(be, &d, &err);
    CHECK(s->w[0] && s->w[1] && s->experts && s->kv && be->reserve(be, 64, &err) == MOQ_OK);
    for (int i = 0; i < rows; i++) { slot[i] = i & 1; pos[i] = 20 + i / 2; }
    s->batch = batch_of(be, rows, slot, pos);
    float *x = random_floats((size_t)(rows * HIDDEN)), *fill = random_floats(200 * QKV), *logits = random_floats((size_t)(rows * 8));
    s->x = device_floats(be, x, (size_t)(rows * HIDDEN));
    s->logits = device_floats(be, logits, (size_t)(rows * 8));
    s->h = device_floats(be, NULL, (size_t)(rows * HIDDEN));
    s->qkv = device_floats(be, fill, 64 * QKV);
    s->att = device_floats(be, NULL, (size_t)(rows * ATT));
    s->y = device_floats(be, NULL, (size_t)(rows * 50));
    for (int i = 0; i < 40; i++) { slot[i] = i & 1; pos[i] = i / 2; }
    device_batch before = batch_of(be, 40, slot, pos);
    be->kv_append(be, s->kv, &before.device, s->qkv, QKV, s->qkv, QKV);
    batch_free(be, &before);
    free(x); free(fill); free(logits);
}

static void step_run(step *s)
{
    moq_backend *be = s->be;
    moq_norm_desc n;
    moq_attention_desc a;
    memset(&n, 0, sizeof n);
    memset(&a, 0, sizeof a);
    n.x = s->x;
    n.y = s->h;
    n.rows = s->rows;
    n.cols = HIDDEN;
    n.eps = 1e-5f;
    be->norm(be, &n);
    be->linear(be, s->w[0], s->h, s->rows, s->qkv);
    be->kv_append(be, s->kv, &s->batch.device, (float *)s->qkv + 4 * 32, QKV, (float *)s->qkv + 6 * 32, QKV);
    a.cache = s->kv;
    a.q = s->qkv;
    a.q_stride = QKV;
    a.y = s->att;
    a.y_stride = ATT;
    a.heads = 4;
    be->attention(be, &s->batch.device, &a);
    be->linear(be, s->w[1], s->att, s->rows, s->h);
    be->moe(be, s->experts, s->h, s->logits, s->rows, s->y);
}

static void step_result(step *s, float *y)
{
    s->be->download_act(s->be, y, s->y, (size_t)(s->rows * 50));
    float *poison = (float *)malloc((size_t)(s->rows * 50) * sizeof *poison);
    for (int i = 0; i < s->rows * 50; i++) poison[i] = moqi_bits_f32(0x7fc00000u);
    s->be->upload_act(s->be, s->y, poison, (size_t)(s->rows * 50));
    free(poison);
}

static void step_free(step *s)
{
    moq_backend *be = s->be;
    void *all[6] = {s->x, s->h, s->qkv, s->att, s->logits, s->y};
    for (int i = 0; i < 6; i++) be->release(be, all[i]);
    batch_free(be, &s->batch);
    for (int i = 0; i < 2; i++) { be->release_weight(be, s->w[i]); layer_free(&s->l[i]); }
    be->release_moe(be, s->experts);
    be->kv_release(be, s->kv);
    mixture_free(&s->m);
}

static void test_cuda_graphs(void)
{
    static const int rows[3] = {1, 5, 24};
    for (int i = 0; i < 3; i++) {
        step s;
        moq_error err;
        float y[64 * 50], z[64 * 50];
        moq_backend *be = backend_of(MOQ_ACT_STORED, NULL, MOQ_F32);
        size_t bytes = (size_t)(rows[i] * 50) * sizeof(float);
        step_make(&s, be, rows[i]);
        CHECK(be->capture_begin(be, &err) == MOQ_OK); /* recorded before any of it has run once */
        CHECK(be->capture_begin(be, &err) == MOQ_E_STATE);
        step_run(&s);
        moq_graph *g = be->capture_end(be, &err);
        if (!g) { fprintf(stderr, "%s\n", err.text); CHECK(0); return; }
        for (int turn = 0; turn < 5; turn++) {
            be->replay(be, g);
            step_result(&s, turn ? z : y);
            CHECK(turn == 0 || memcmp(y, z, bytes) == 0);
        }
        CHECK(y[0] == y[0]);
        step_run(&s);
        step_result(&s, z);
        CHECK(memcmp(y, z, bytes) == 0);
        CHECK(be->reserve(be, 700, &err) == MOQ_OK); /* scratch moves; the graph still has its own */
        be->replay(be, g);
        step_result(&s, z);
        CHECK(memcmp(y, z, bytes) == 0);
        be->release_graph(be, g);
        CHECK(be->capture_end(be, &err) == NULL && err.code == MOQ_E_STATE);
        CHECK(be->capture_begin(be, &err) == MOQ_OK); /* a copy cannot be recorded: an error, and the backend lives */
        be->upload(be, s.x, y, 16);
        CHECK(be->capture_end(be, &err) == NULL && err.code == MOQ_E_STATE && strstr(err.text, "upload"));
        step_run(&s);
        step_result(&s, z);
        CHECK(memcmp(y, z, bytes) == 0);
        step_free(&s);
        done(be);
    }
}

/* A graph finds its counters as it left them, though others reserve fewer rows and fill the scratch memory in their own way. */
static void test_cuda_graphs_keep(void)
{
    enum { ROWS = 40, COLS = 2048, OUT = 64, DIM = 64, LONG = 1400 };
    moq_backend *be = wide_backend();
    moq_error err;
    layer l;
    moq_kv_desc d;
    moq_attention_desc a;
    int32_t slot[LONG], pos[LONG];
    float want[DIM], got[DIM], *x = random_floats(ROWS * COLS), *rows = random_floats(LONG * DIM);
    memset(&d, 0, sizeof d);
    memset(&a, 0, sizeof a);
    d.name = "graphs keep";
    d.slots = 1;
    d.capacity = LONG;
    d.kv_heads = 1;
    d.head_dim = DIM;
    layer_make(&l, &layer_formats[4], OUT, COLS);
    moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
    moq_kv_cache *cache = be->kv_create(be, &d, &err); /* F32: splits of a row meet at a counter in scratch memory */
    CHECK(w && cache);
    void *dx = device_floats(be, x, ROWS * COLS), *dy = device_floats(be, NULL, ROWS * OUT);
    void *dr = device_floats(be, rows, LONG * DIM), *da = device_floats(be, NULL, DIM);
    for (int i = 0; i < LONG; i++) { slot[i] = 0; pos[i] = i; }
    device_batch all = batch_of(be, LONG, slot, pos), last = batch_of(be, 1, slot, pos + LONG - 1);
    be->kv_append(be, cache, &all.device, dr, DIM, dr, DIM);
    a.cache = cache;
    a.q = dr;
    a.y = da;
    a.q_stride = a.y_stride = DIM;
    a.heads = 1;
    for (int more = 1; more <= 12; more++) { /* other counters would lie in other places of what the product writes */
        CHECK(be->reserve(be, ROWS + more, &err) == MOQ_OK && be->capture_begin(be, &err) == MOQ_OK);
        be->attention(be, &last.device, &a);
        moq_graph *g = be->capture_end(be, &err);
        CHECK(g != NULL);
        be->replay(be, g);
        be->download_act(be, want, da, DIM);
        CHECK(be->reserve(be, ROWS, &err) == MOQ_OK);
        be->linear(be, w, dx, ROWS, dy);
        be->upload_act(be, da, rows + DIM, DIM);
        be->replay(be, g);
        be->download_act(be, got, da, DIM);
        CHECK(memcmp(want, got, sizeof got) == 0);
        be->release_graph(be, g);
    }
    batch_free(be, &all);
    batch_free(be, &last);
    be->kv_release(be, cache);
    be->release_weight(be, w);
    be->release(be, dx); be->release(be, dy); be->release(be, dr); be->release(be, da);
    layer_free(&l);
    free(x); free(rows);
    done(be);
}

/* ---- calls of a recording that become one launch ---- */

enum { CHAIN_LAYERS = 4, CHAIN_BUFFERS = 8 };

/* Two halves of a decoder layer: norm, gate and up, activation, down, norm with addition, q k v, a product of its own, norm with addition. */
typedef struct chain {
    moq_backend *be;
    layer l[2 + 1 + 3 + 1];
    moq_weight *w[CHAIN_LAYERS];
    void *at[CHAIN_BUFFERS]; /* x, h, gate | up, mid, d, q | k | v, y, norm weights */
    int count[CHAIN_BUFFERS];
    float *x;
    int rows, hidden, inter, odd;
} chain;

/* odd: what is odd about it; see chain_run. */
static void chain_make(chain *c, moq_backend *be, int format, int rows, int hidden, int inter, int odd)
{
    moq_error err;
    moq_linear parts[7];
    const int heights[7] = {inter, inter, hidden, 240, 96, 48, hidden}, widths[7] = {hidden, hidden, inter, hidden, hidden, hidden, 384};
    const int first[CHAIN_LAYERS] = {0, 2, 3, 6}, count[CHAIN_LAYERS] = {2, 1, 3, 1};
    const int sizes[CHAIN_BUFFERS] = {hidden, hidden, hidden > 2 * inter ? hidden : 2 * inter, inter, hidden, 384, hidden, hidden};
    memset(c, 0, sizeof *c);
    c->be = be;
    c->rows = rows;
    c->hidden = hidden;
    c->inter = inter;
    c->odd = odd;
    for (int i = 0; i < 7; i++) {
        layer_make(&c->l[i], &layer_formats[format], heights[i], widths[i]);
        if (odd & 1) c->l[i].w.bias = layer_view(layer_floats(&c->l[i], heights[i], 0.3f), MOQ_F32, heights[i]);
        if ((odd & 2) && i >= 2 && i < 6) { /* the same of layers that share their input */
            float *p = layer_floats(&c->l[i], widths[i], 0);
            for (int k = 0; k < widths[i]; k++) p[k] = 0.5f + (float)(k % 7) / 8;
            c->l[i].w.pre_quant_scale = layer_view(p, MOQ_F32, widths[i]);
            c->l[i].w.scheme.pre_quant_scale = 1;
        }
        parts[i] = c->l[i].w;
    }
    CHECK(be->reserve(be, 16, &err) == MOQ_OK);
    for (int i = 0; i < CHAIN_LAYERS; i++) {
        c->w[i] = be->prepare_linear(be, parts + first[i], count[i], &err);
        if (!c->w[i]) { fprintf(stderr, "%s\n", err.text); exit(2); }
    }
    for (int i = 0; i < CHAIN_BUFFERS; i++) {
        c->count[i] = (i == 7 ? 1 : rows) * sizes[i];
        c->at[i] = i == 7 ? NULL : device_floats(be, NULL, (size_t)c->count[i]);
    }
    float *weight = random_floats((size_t)hidden);
    c->at[7] = device_bytes(be, weight, (size_t)hidden * 4);
    c->x = random_floats((size_t)c->count[0]);
    free(weight);
}

static void chain_norm(const chain *c, void *x, const void *add, void *y, int weighted)
{
    moq_norm_desc n;
    memset(&n, 0, sizeof n);
    n.x = x;
    n.add = add;
    n.y = y;
    n.weight = weighted ? (const float *)c->at[7] : NULL;
    n.rows = c->rows;
    n.cols = c->hidden;
    n.eps = 1e-5f;
    c->be->norm(c->be, &n);
}

/* odd: 1 biases, 2 pre_quant_scale, 4 norms in place after a product, 8 norms that two products read, 16 another call between, 32 an activation that
   is no gated one, 64 a sum into what the product reads, 128 a sum by itself, and somebody who wants the stream behind it. */
static void chain_run(chain *c)
{
    moq_backend *be = c->be;
    moq_activation_desc a;
    void **at = c->at;
    memset(&a, 0, sizeof a);
    a.kind = c->odd & 32 ? MOQ_RELU2 : c->odd & 1 ? MOQ_GELU_TANH_MUL : MOQ_SILU_MUL;
    chain_norm(c, at[0], NULL, at[1], 1);
    be->linear(be, c->w[0], at[1], c->rows, at[2]);
    if (c->odd & 16) be->copy(be, at[6], at[1], 64);
    if (c->odd & 32) be->activation(be, &a, at[2], c->rows, 2 * c->inter, at[2]);
    a.kind = MOQ_SILU_MUL;
    be->activation(be, &a, at[2], c->rows, c->inter, at[3]);
    be->linear(be, c->w[1], at[3], c->rows, at[4]);
    if (c->odd & 4) chain_norm(c, at[4], NULL, at[4], 0);
    if (c->odd & 128) be->add(be, at[0], at[4], (size_t)c->count[0]);
    if (c->odd & 128) CHECK(moq_cuda_stream(be) != NULL);
    chain_norm(c, at[0], c->odd & 128 ? NULL : at[4], at[1], c->odd & 1);
    if (c->odd & 16) be->copy(be, at[6], at[1], 64);
    be->linear(be, c->w[2], at[1], c->rows, at[5]);
    if (c->odd & 8) be->linear(be, c->w[0], at[1], c->rows, at[2]);
    be->linear(be, c->w[3], at[5], c->rows, at[6]);
    if (c->odd & 64) { /* y = x + W y would be another sum if blocks added up while others read */
        be->linear(be, c->w[0], at[0], c->rows, at[2]);
        be->linear(be, c->w[1], at[2], c->rows, at[4]);
        chain_norm(c, at[2], at[4], at[1], 0);
    } else chain_norm(c, at[0], at[6], at[1], 1);
}

/* Everything that the calls write, into out: [sum of counts]. */
static void chain_result(chain *c, float *out, moq_graph *g)
{
    moq_backend *be = c->be;
    float *nan = (float *)malloc((size_t)c->count[2] * sizeof *nan);
    for (int i = 0; i < c->count[2]; i++) nan[i] = moqi_bits_f32(0x7fc00000u);
    for (int i = 1; i < 7; i++) be->upload_act(be, c->at[i], nan, (size_t)c->count[i]);
    be->upload_act(be, c->at[0], c->x, (size_t)c->count[0]);
    if (g) be->replay(be, g);
    else chain_run(c);
    for (int i = 0; i < 7; out += c->count[i], i++) be->download_act(be, out, c->at[i], (size_t)c->count[i]);
    free(nan);
}

static void chain_free(chain *c)
{
    for (int i = 0; i < CHAIN_BUFFERS; i++) c->be->release(c->be, c->at[i]);
    for (int i = 0; i < CHAIN_LAYERS; i++) c->be->release_weight(c->be, c->w[i]);
    for (int i = 0; i < 7; i++) layer_free(&c->l[i]);
    free(c->x);
}

/* A recording gives every buffer the bits of the single calls. */
static void check_chain(moq_dtype activations, int format, int rows, int hidden, int inter, int odd)
{
    chain c;
    moq_error err;
    moq_backend *be = backend_of(MOQ_ACT_WIDE, NULL, activations);
    chain_make(&c, be, format, rows, hidden, inter, odd);
    size_t all = 0;
    for (int i = 0; i < 7; i++) all += (size_t)c.count[i];
    float *y = random_floats(all), *z = random_floats(all);
    chain_result(&c, y, NULL);
    CHECK(be->capture_begin(be, &err) == MOQ_OK);
    chain_run(&c);
    moq_graph *g = be->capture_end(be, &err);
    if (!g) { fprintf(stderr, "%s\n", err.text); CHECK(0); return; }
    for (int turn = 0; turn < 3; turn++) {
        chain_result(&c, z, g);
        size_t wrong = 0, first = 0;
        for (size_t i = 0; i < all; i++) if (memcmp(y + i, z + i, 4) != 0 && wrong++ == 0) first = i;
        if (wrong) fprintf(stderr, "%s, %s, %d rows of %d and %d, odd %d: %zu of %zu differ, the first at %zu: %g and %g\n", moq_dtype_name(activations),
                           layer_formats[format].name, rows, hidden, inter, odd, wrong, all, first, (double)y[first], (double)z[first]);
        CHECK(wrong == 0);
    }
    CHECK(y[all - 1] == y[all - 1]);
    be->release_graph(be, g);
    chain_free(&c);
    free(y); free(z);
    done(be);
}

static void test_cuda_together(void)
{
    static const int formats[7] = {4, 8, 19, 11, 2, 14, 16}, shapes[4][2] = {{1024, 1536}, {1312, 1056}, {2080, 1120}, {8192, 1216}};
    static const int odds[8] = {0, 1, 2, 4, 8 + 16, 32 + 1, 64, 128};
    for (int bf16 = 0; bf16 < 2; bf16++) {
        const moq_dtype t = bf16 ? MOQ_BF16 : MOQ_F32;
        for (size_t o = 0; o < MOQI_COUNT(odds); o++) check_chain(t, 4, 1, 1312, 1056, odds[o]);
        for (int m = 2; m <= 13; m += m == 2 ? 1 : 5) check_chain(t, 4, m, shapes[0][0], shapes[0][1], m == 3 ? 128 : 1);
        for (int s = bf16; s < 4; s += 2) check_chain(t, 4, 1, shapes[s][0], shapes[s][1], 0);
        for (int f = 1; f < 7; f++)
            for (int m = 1; m <= 13; m += 12) check_chain(t, formats[f], m, 1024, 1280, 0);
    }
}

/* The second block of a layer with experts, and what follows: h = norm(x), logits = router h, d = experts(h), x += d, h = norm(x), q = W h. odd: 1 another
   call between norm and router, 2 one behind the experts, 4 the sum by itself, 8 x and h are one buffer, which nobody may join, 16 one between router and
   experts, 32 experts of h that follow logits of another row, 64 a NaN in x, 128 the router has biases. */
typedef struct mixed { moq_backend *be; moq_weight *router, *next; moq_experts *experts; void *at[7]; int count[6], rows, odd; } mixed;

static void mixed_run(mixed *c)
{
    moq_backend *be = c->be;
    void **at = c->at, *h = at[c->odd & 8 ? 0 : 1];
    moq_norm_desc n;
    memset(&n, 0, sizeof n);
    n.x = at[0];
    n.y = h;
    n.rows = c->rows;
    n.cols = c->count[0] / c->rows;
    n.eps = 1e-5f;
    be->norm(be, &n);
    if (c->odd & 1) be->copy(be, at[5], h, 64);
    be->linear(be, c->router, h, c->rows, at[2]);
    if (c->odd & 16) be->copy(be, at[5], h, 64);
    be->moe(be, c->experts, h, c->odd & 32 ? at[6] : at[2], c->rows, at[3]);
    if (c->odd & 2) be->copy(be, at[5], at[3], 64);
    if (c->odd & 4) be->add(be, at[0], at[3], (size_t)c->count[0]);
    else n.add = at[3];
    n.y = at[1];
    be->norm(be, &n);
    be->linear(be, c->next, at[1], c->rows, at[4]);
}

static void mixed_result(mixed *c, const float *x, float *out, moq_graph *g)
{
    c->be->upload_act(c->be, c->at[0], x, (size_t)c->count[0]);
    if (g) c->be->replay(c->be, g);
    else mixed_run(c);
    for (int i = 0; i < 6; out += c->count[i], i++) c->be->download_act(c->be, out, c->at[i], (size_t)c->count[i]);
}

/* The routing of these, as few_routing says; n: between an expert's products. */
typedef struct mixed_experts { int count, top, kind_of_routing, n; } mixed_experts;

/* router: its format; hidden: a multiple of 32, from 1024 on the router's product may make the norm. */
static void check_mixed(moq_dtype activations, int router, int rows, int hidden, int odd, mixed_experts x_of)
{
    enum { MOST = 128 };
    const int EXPERTS = x_of.count, INTER = x_of.n;
    const few_case routing = {4, EXPERTS, x_of.top, x_of.kind_of_routing, MOQ_SILU_MUL, hidden, INTER, hidden, 0, activations, 0};
    moq_error err;
    mixed c;
    layer l[2], *e = (layer *)calloc(3 * MOST, sizeof *e);
    moq_linear *all = (moq_linear *)calloc(3 * MOST, sizeof *all);
    float *bias = random_floats(MOST);
    moq_moe m;
    const int counts[6] = {hidden, hidden, EXPERTS, hidden, 96, 64};
    memset(&c, 0, sizeof c);
    memset(&m, 0, sizeof m);
    c.be = backend_of(MOQ_ACT_WIDE, NULL, activations);
    c.rows = rows;
    c.odd = odd;
    layer_make(&l[0], &layer_formats[router], EXPERTS, hidden);
    layer_make(&l[1], &layer_formats[4], 96, hidden);
    for (int i = 0; i < 3 * EXPERTS; i++) {
        layer_make(&e[i], &layer_formats[4], i < 2 * EXPERTS ? INTER : hidden, i < 2 * EXPERTS ? hidden : INTER);
        all[i] = e[i].w;
    }
    m.name = "mixed";
    if (odd & 128) l[0].w.bias = layer_view(layer_floats(&l[0], EXPERTS, 1), MOQ_F32, EXPERTS);
    few_routing(&routing, bias, &m.routing);
    m.activation.kind = MOQ_SILU_MUL;
    m.gate = all;
    m.up = all + EXPERTS;
    m.down = all + 2 * EXPERTS;
    c.router = c.be->prepare_linear(c.be, &l[0].w, 1, &err);
    c.next = c.be->prepare_linear(c.be, &l[1].w, 1, &err);
    c.experts = c.be->prepare_moe(c.be, &m, &err);
    CHECK(c.router && c.next && c.experts && c.be->reserve(c.be, 16, &err) == MOQ_OK);
    size_t sum = 0;
    for (int i = 0; i < 6; i++) sum += (size_t)(c.count[i] = counts[i] * (i == 5 ? 1 : rows));
    for (int i = 0; i < 6; i++) c.at[i] = device_floats(c.be, NULL, (size_t)c.count[i]);
    float *x = random_floats((size_t)c.count[0]), *y = random_floats(sum), *z = random_floats(sum);
    c.at[6] = device_floats(c.be, y, (size_t)c.count[2]);
    if (odd & 64) x[hidden / 2] = moqi_bits_f32(0xffffffffu);
    mixed_result(&c, x, y, NULL);
    CHECK(c.be->capture_begin(c.be, &err) == MOQ_OK);
    mixed_run(&c);
    moq_graph *g = c.be->capture_end(c.be, &err);
    CHECK(g != NULL);
    for (int turn = 0; g && turn < 3; turn++) {
        size_t wrong = 0, first = 0;
        mixed_result(&c, x, z, g);
        for (size_t i = 0; i < sum; i++) if (memcmp(y + i, z + i, 4) != 0 && wrong++ == 0) first = i;
        if (wrong) fprintf(stderr, "%s, router %s, %d rows of %d, odd %d: %zu of %zu differ, the first at %zu: %g and %g\n", moq_dtype_name(activations),
                           layer_formats[router].name, rows, hidden, odd, wrong, sum, first, (double)y[first], (double)z[first]);
        CHECK(wrong == 0);
    }
    CHECK((y[0] == y[0] && y[c.count[0]] == y[c.count[0]]) == !(odd & 64));
    c.be->release_graph(c.be, g);
    for (int i = 0; i < 7; i++) c.be->release(c.be, c.at[i]);
    c.be->release_weight(c.be, c.router);
    c.be->release_weight(c.be, c.next);
    c.be->release_moe(c.be, c.experts);
    for (int i = 0; i < 3 * EXPERTS; i++) layer_free(&e[i]);
    for (int i = 0; i < 2; i++) layer_free(&l[i]);
    free(x); free(y); free(z); free(bias); free(e); free(all);
    done(c.be);
}

static void test_cuda_together_mixed(void)
{
    static const int routers[5] = {2, 11, 14, 16, 4}, odds[9] = {0, 1, 2, 4, 8, 16, 32, 64, 128};
    static const mixed_experts plain = {16, 3, 0, 512}, others[5] = {{16, 6, 1, 512}, {24, 5, 2, 256}, {16, 3, 3, 512}, {40, 6, 4, 512}, {128, 8, 0, 272}};
    for (int bf16 = 0; bf16 < 2; bf16++) {
        const moq_dtype t = bf16 ? MOQ_BF16 : MOQ_F32;
        for (size_t o = 0; o < MOQI_COUNT(odds); o++) check_mixed(t, 2, 1, 1056, odds[o], plain);
        for (size_t f = 0; f < MOQI_COUNT(routers); f++) check_mixed(t, routers[f], 1, 1024, 0, plain);
        for (int rows = 2; rows <= 6; rows += 2) check_mixed(t, 2, rows, 1024, 0, plain);
        check_mixed(t, 2, 1, 512, 0, plain);
        check_mixed(t, 2, 1, 2080, 0, plain);
        for (size_t i = 0; i < MOQI_COUNT(others); i++) check_mixed(t, 2, 1, 1024 + 32 * (int)i, i % 2 ? 128 : 0, others[i]);
    }
}

/* Heads that enter a cache and their attention, recorded: the bits of the two calls. */
static void check_entering(moq_dtype activations, moq_kv_format format, int dim, int heads, int kv_heads, int pos, int most, int window, int norms)
{
    enum { LONG = 700 };
    moq_backend *be = backend_of(MOQ_ACT_WIDE, NULL, activations);
    const int width = (heads + 2 * kv_heads) * dim, elem = activations == MOQ_BF16 ? 2 : 4, kv_width = 2 * kv_heads * dim, at = pos < 0 ? 3 : pos;
    const int32_t slot = pos < 0 ? 5 : 1;
    float *x = random_floats((size_t)width), *before = random_floats((size_t)(LONG * kv_width)), *numbers = random_floats((size_t)(3 * dim + heads)), *got[2];
    int32_t slots[LONG], place[LONG];
    uint8_t *kept[3];
    moq_kv_desc kd;
    moq_attention_desc a;
    moq_graph *g = NULL;
    moq_error err;
    memset(&kd, 0, sizeof kd);
    memset(&a, 0, sizeof a);
    kd.name = "kv";
    kd.slots = 2;
    kd.capacity = LONG;
    kd.kv_heads = kv_heads;
    kd.head_dim = dim;
    kd.kv.format = format;
    moq_kv_cache *cache = be->kv_create(be, &kd, &err);
    CHECK(cache != NULL && be->reserve(be, LONG, &err) == MOQ_OK);
    for (int i = 0; i < LONG; i++) { slots[i] = 1; place[i] = i; }
    device_batch b = batch_of(be, 1, &slot, &at), all = batch_of(be, LONG, slots, place);
    void *fill = device_floats(be, before, (size_t)(LONG * kv_width)), *y = device_floats(be, NULL, (size_t)(heads * dim));
    float *dn = (float *)device_bytes(be, numbers, sizeof *numbers * (size_t)(3 * dim + heads));
    uint8_t *d = (uint8_t *)device_floats(be, x, (size_t)width), *k = d + (size_t)(heads * dim * elem), *v = k + (size_t)(kv_heads * dim * elem);
    moq_heads_desc h = {cache, d, k, v, width, width, width, heads, norms ? dn : NULL, norms ? dn + dim : NULL, 1e-5f, dim, 0, dn + 2 * dim};
    be->kv_append(be, cache, &all.device, fill, kv_width, (uint8_t *)fill + (size_t)(kv_heads * dim * elem), kv_width);
    const size_t bytes = be->kv_read(be, cache, 1, LONG, NULL);
    for (int i = 0; i < 3; i++) kept[i] = (uint8_t *)malloc(bytes);
    be->kv_read(be, cache, 1, LONG, kept[2]);
    a.cache = cache;
    a.q = d;
    a.y = y;
    a.q_stride = width;
    a.y_stride = heads * dim;
    a.heads = heads;
    a.window = window;
    a.sinks = norms ? dn + 3 * dim : NULL;
    b.device.max_pos = most;
    for (int one = 0; one < 2; one++) {
        if (one) CHECK(be->capture_begin(be, &err) == MOQ_OK);
        be->kv_enter(be, &b.device, &h);
        be->attention(be, &b.device, &a);
        if (one) {
            g = be->capture_end(be, &err);
            if (!g) { fprintf(stderr, "%s\n", err.text); CHECK(0); return; }
            be->kv_write(be, cache, 1, LONG, kept[2]);
            be->upload_act(be, d, x, (size_t)width);
            be->upload_act(be, y, before, (size_t)(heads * dim));
            be->replay(be, g);
        }
        got[one] = (float *)malloc(sizeof(float) * (size_t)(width + heads * dim));
        be->download_act(be, got[one], d, (size_t)width);
        be->download_act(be, got[one] + width, y, (size_t)(heads * dim));
        be->kv_read(be, cache, 1, LONG, kept[one]);
    }
    const int same[2] = {memcmp(got[0], got[1], sizeof(float) * (size_t)(width + heads * dim)) == 0, memcmp(kept[0], kept[1], bytes) == 0};
    if (!same[0] || !same[1])
        fprintf(stderr, "%s, %s, heads %d of %d, %d at %d of %d, window %d, norms %d: numbers %d, cache %d\n", moq_dtype_name(activations),
                moq_kv_format_name(format), heads, dim, kv_heads, pos, most, window, norms, same[0], same[1]);
    CHECK(same[0] && same[1]);
    CHECK((memcmp(kept[0], kept[2], bytes) != 0) == (pos >= 0));
    be->release_graph(be, g);
    be->kv_release(be, cache);
    batch_free(be, &b);
    batch_free(be, &all);
    be->release(be, fill); be->release(be, y); be->release(be, dn); be->release(be, d);
    for (int i = 0; i < 3; i++) { if (i < 2) free(got[i]); free(kept[i]); }
    free(x); free(before); free(numbers);
    done(be);
}

static void test_cuda_entering(void)
{
    static const int heads[5][3] = {{128, 8, 2}, {64, 6, 6}, {128, 20, 2}, {64, 16, 1}, {256, 6, 1}}, at[8] = {0, 15, 16, 63, 200, 255, 699, -1};
    static const moq_kv_format formats[5] = {MOQ_KV_FP8, MOQ_KV_INT8, MOQ_KV_WIDE, MOQ_KV_NVFP4, MOQ_KV_MXFP4};
    for (int bf16 = 0; bf16 < 2; bf16++)
        for (int f = 0; f < 5; f++)
            for (int h = 0; h < 5; h++)
                for (int p = 0; p < 8; p++) {
                    check_entering(bf16 ? MOQ_BF16 : MOQ_F32, formats[f], heads[h][0], heads[h][1], heads[h][2], at[p], p % 3 == 0 ? 4095 : p % 2 || at[p] > 255 ? 699 : 255,
                                   p == 4 ? 50 : 0, (h + p) % 2);
                }
}

static void test_cuda_same_bits(void)
{
    static const int rows[3] = {1, 7, 40};
    for (int i = 0; i < 3; i++) {
        step s;
        float y[64 * 50], z[64 * 50];
        moq_backend *be = backend_of(MOQ_ACT_STORED, NULL, MOQ_F32);
        step_make(&s, be, rows[i]);
        for (int turn = 0; turn < 20; turn++) {
            step_run(&s);
            step_result(&s, turn ? z : y);
            CHECK(turn == 0 || memcmp(y, z, (size_t)(rows[i] * 50) * sizeof(float)) == 0);
        }
        step_free(&s);
        done(be);
    }
}

/* Calls of two backends on one device, in turn: neither sees the other. */
static void test_cuda_two_backends(void)
{
    step s, t;
    moq_error err;
    float y[64 * 50], z[64 * 50], v[64 * 50];
    uint64_t seed = test_state.seed;
    moq_backend *a = backend_of(MOQ_ACT_STORED, NULL, MOQ_F32), *b = backend_of(MOQ_ACT_STORED, NULL, MOQ_F32);
    step_make(&s, a, 6);
    test_state.seed = seed;
    step_make(&t, b, 6);
    step_run(&s);
    step_result(&s, y);
    for (int turn = 0; turn < 10; turn++) {
        step_run(&s);
        step_run(&t);
        step_run(&s);
        step_result(&t, z);
        step_result(&s, v);
        CHECK(memcmp(y, z, sizeof(float) * 300) == 0 && memcmp(y, v, sizeof(float) * 300) == 0);
    }
    step_free(&s);
    CHECK(a->sync(a, &err) == MOQ_OK);
    moq_backend_destroy(a);
    step_run(&t);
    step_result(&t, z);
    CHECK(memcmp(y, z, sizeof(float) * 300) == 0);
    step_free(&t);
    done(b);
}

/* Device memory that runs out on demand: the hook takes it from one block. */
typedef struct pool { moq_backend *lender; int fail_at, live; void *held[512]; } pool;

static void *pool_alloc(void *user, size_t bytes, size_t align)
{
    pool *p = (pool *)user;
    moq_error err;
    (void)align;
    if (p->fail_at > 0 && --p->fail_at == 0) return NULL;
    void *ptr = p->lender->alloc(p->lender, bytes, &err);
    if (ptr) p->live++;
    return ptr;
}

static void pool_release(void *user, void *ptr, size_t bytes)
{
    pool *p = (pool *)user;
    (void)bytes;
    p->live--;
    p->lender->release(p->lender, ptr);
}

static void test_cuda_out_of_memory(void)
{
    enum { ROWS = 20 };
    pool p;
    moq_error err;
    moq_cuda_desc desc;
    mixture m;
    layer l, good;
    memset(&p, 0, sizeof p);
    memset(&desc, 0, sizeof desc);
    desc.act = MOQ_ACT_STORED;
    p.lender = wide_backend();
    moq_allocator memory = {pool_alloc, pool_release, &p};
    moq_backend *be = moq_cuda_backend_full(&desc, MOQ_F32, &memory, &err);
    CHECK(be != NULL && be->reserve(be, 64, &err) == MOQ_OK);
    mixture_make(&m, 8, 2, MOQ_SILU_MUL, 2);
    layer_make(&good, &layer_formats[4], 33, 160);
    layer_make(&l, &layer_formats[19], 34, 256);
    l.w.scheme.input = input_formats[0].c;
    l.w.input_scale = 0.01f;
    l.w.requant_scale = 0.003f;
    moq_weight *w = be->prepare_linear(be, &good.w, 1, &err);
    float *x = random_floats(ROWS * 160), y[ROWS * 33], z[ROWS * 33];
    run_linear(be, w, x, ROWS, 160, 33, y);
    int failures = 0, fine = 0;
    for (int k = 1; k < 60 && fine < 4; k++) {
        fine = 0;
        for (int what = 0; what < 4; what++) {
            moq_kv_desc d;
            int live = p.live;
            memset(&d, 0, sizeof d);
            d.name = "kv"; d.slots = 1; d.capacity = 50 * k; d.kv_heads = 1; d.head_dim = 64 + 8 * k;
            p.fail_at = k;
            moq_weight *a = what == 0 ? be->prepare_linear(be, &l.w, 1, &err) : NULL;
            moq_experts *e = what == 1 ? be->prepare_moe(be, &m.moe, &err) : NULL;
            moq_kv_cache *c = what == 2 ? be->kv_create(be, &d, &err) : NULL;
            moq_result r = what == 3 ? be->reserve(be, 100 * k, &err) : MOQ_OK;
            int failed = what == 3 ? r < 0 : !a && !e && !c;
            p.fail_at = 0;
            failures += failed;
            fine += !failed;
            if (failed) CHECK(err.code == MOQ_E_NOMEM && strstr(err.text, "memory"));
            if (what != 3 && failed) CHECK(p.live <= live + 2); /* staging that grew may stay */
            run_linear(be, w, x, ROWS, 160, 33, z);
            CHECK(memcmp(y, z, sizeof y) == 0);
            be->release_weight(be, a);
            be->release_moe(be, e);
            be->kv_release(be, c);
        }
    }
    CHECK(failures >= 6 && fine == 4);
    CHECK(be->alloc(be, (size_t)1 << 60, &err) == NULL && err.code == MOQ_E_NOMEM);
    be->release_weight(be, w);
    CHECK(be->sync(be, &err) == MOQ_OK);
    moq_backend_destroy(be);
    CHECK_INT(p.live, 0);
    free(x);
    mixture_free(&m);
    layer_free(&l);
    layer_free(&good);
    done(p.lender);
}

/* A host allocator that fails at the k-th call: nothing leaks, and the backend goes on. */
static void test_cuda_out_of_host_memory(void)
{
    moq_error err;
    moq_backend *be = wide_backend();
    layer l;
    layer_make(&l, &layer_formats[23], 33, 160);
    add_lora(&l, 3);
    int fine = 0;
    for (int k = 1; k < 40 && !fine; k++) {
        long live = test_state.live_allocs;
        test_state.fail_at = k;
        moq_weight *w = be->prepare_linear(be, &l.w, 1, &err);
        test_state.fail_at = 0;
        fine = w != NULL;
        if (!w) CHECK(err.code == MOQ_E_NOMEM);
        be->release_weight(be, w);
        CHECK(test_state.live_allocs <= live + 3);
    }
    CHECK(fine);
    CHECK_INT(check_linear(be, &l, 0, 3), 0);
    layer_free(&l);
    done(be);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_cuda_copies);
    RUN(test_cuda_enter);
    RUN(test_cuda_ops);
    RUN(test_cuda_narrowed);
    RUN(test_cuda_ssm);
    RUN(test_cuda_embed);
    RUN(test_cuda_formats);
    RUN(test_cuda_formats_reference);
    RUN(test_cuda_formats_bf16);
    RUN(test_cuda_formats_automatic);
    RUN(test_cuda_larger);
    RUN(test_cuda_few);
    RUN(test_cuda_few_fused);
    RUN(test_cuda_inputs);
    RUN(test_cuda_requantized);
    RUN(test_cuda_rotation);
    RUN(test_cuda_slices);
    RUN(test_cuda_fused);
    RUN(test_cuda_banks);
    RUN(test_cuda_refuses);
    RUN(test_cuda_moe);
    RUN(test_cuda_moe_experts);
    RUN(test_cuda_moe_small);
    RUN(test_cuda_moe_few);
    RUN(test_cuda_moe_few_small);
    RUN(test_cuda_moe_bf16);
    RUN(test_cuda_moe_unlike);
    RUN(test_cuda_moe_stored);
    RUN(test_cuda_moe_mxfp8);
    RUN(test_cuda_attention);
    RUN(test_cuda_attention_long);
    RUN(test_cuda_attention_replay);
    RUN(test_cuda_attention_prompt);
    RUN(test_cuda_many_small);
    RUN(test_cuda_many_cut);
    RUN(test_cuda_many_odd);
    RUN(test_cuda_each_kernel);
    RUN(test_cuda_kv_refuses);
    RUN(test_cuda_graphs);
    RUN(test_cuda_graphs_keep);
    RUN(test_cuda_together);
    RUN(test_cuda_together_mixed);
    RUN(test_cuda_entering);
    RUN(test_cuda_same_bits);
    RUN(test_cuda_two_backends);
    RUN(test_cuda_out_of_memory);
    RUN(test_cuda_out_of_host_memory);
    return test_end();
}
