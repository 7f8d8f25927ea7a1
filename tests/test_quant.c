/* Encoders against a slow second implementation: nearest value by search in float64, with each format's own rule for ties. */
#define MOQ_QUANTIZE
#include "test.h"

/* ---- the oracle ---- */

enum { TIE_EVEN, TIE_ZERO };

/* Index of the magnitude nearest to v >= 0 in an ascending table; a tie goes to the even index or to the smaller value. */
static int nearest_code(const double *table, int n, double v, int tie)
{
    int best = 0;
    for (int i = 1; i < n; i++) {
        double a = fabs(table[i] - v), b = fabs(table[best] - v);
        if (a < b || (a == b && tie == TIE_EVEN && i % 2 == 0)) best = i;
    }
    return best;
}

static double e4m3_table[127], e3m2_table[32];
static const double e2m1_table[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};

static void make_tables(void)
{
    for (int i = 0; i < 127; i++) e4m3_table[i] = i < 8 ? ldexp(i, -9) : ldexp(1 + (i & 7) / 8.0, (i >> 3) - 7);
    for (int i = 0; i < 32; i++) e3m2_table[i] = i < 4 ? ldexp(i, -4) : ldexp(1 + (i & 3) / 4.0, (i >> 2) - 3);
}

static int oracle_e4m3(double v) { return nearest_code(e4m3_table, 127, fabs(v), TIE_EVEN) | (signbit(v) ? 0x80 : 0); }

/* BF16 has 8 significant bits. */
static double oracle_bf16(double v)
{
    int e;
    if (v == 0) return v;
    double m = frexp(v, &e), scaled = ldexp(m, 8), low = floor(scaled), rest = scaled - low;
    if (rest > 0.5 || (rest == 0.5 && fmod(low, 2) != 0)) low += 1;
    return ldexp(low, e - 8);
}

static long oracle_int(double v, long low, long high)
{
    double f = floor(v), rest = v - f;
    if (rest > 0.5 || (rest == 0.5 && fmod(f, 2) != 0)) f += 1;
    return f < (double)low ? low : f > (double)high ? high : (long)f;
}

/* ---- matrices ---- */

typedef struct matrix { int64_t rows, cols; uint16_t *bits; float *x; } matrix;

/* BF16 values with outliers, exact zeros of both signs, a zero block and tiny values. */
static matrix random_matrix(int64_t rows, int64_t cols)
{
    matrix m = {rows, cols, NULL, NULL};
    m.bits = (uint16_t *)malloc((size_t)(rows * cols) * 2);
    m.x = (float *)malloc((size_t)(rows * cols) * 4);
    for (int64_t i = 0; i < rows * cols; i++) {
        float v = test_normal() * 0.05f;
        if (test_random() % 37 == 0) v = test_random() % 2 ? 0.0f : -0.0f;
        if (test_random() % 41 == 0) v *= 1e-6f;
        if (i / 32 == 3) v = 0; /* a whole block */
        m.bits[i] = moq_bf16_encode(v);
        m.x[i] = moq_bf16_decode(m.bits[i]);
    }
    return m;
}

static void free_matrix(matrix *m)
{
    free(m->bits);
    free(m->x);
}

static double group_amax(const matrix *m, int64_t r0, int64_t r1, int64_t c0, int64_t c1)
{
    double top = 0;
    for (int64_t r = r0; r < r1 && r < m->rows; r++)
        for (int64_t c = c0; c < c1 && c < m->cols; c++)
            if (fabs((double)m->x[r * m->cols + c]) > top) top = fabs((double)m->x[r * m->cols + c]);
    return top;
}

typedef struct encoded { uint8_t *codes, *scales; uint64_t code_bytes, scale_bytes; float global; } encoded;

static moq_encode_desc desc_of(const matrix *m, const char *recipe)
{
    moq_encode_desc d;
    memset(&d, 0, sizeof d);
    d.scheme = moq_find_recipe(recipe)->scheme;
    d.data = m->bits;
    d.dtype = MOQ_BF16;
    d.rows = m->rows;
    d.cols = m->cols;
    return d;
}

static encoded encode(const moq_encode_desc *d)
{
    encoded e;
    moq_error err;
    memset(&e, 0, sizeof e);
    CHECK(moq_encode_bytes(d, &e.code_bytes, &e.scale_bytes, &err) == MOQ_OK);
    e.codes = (uint8_t *)malloc((size_t)e.code_bytes);
    e.scales = (uint8_t *)malloc((size_t)e.scale_bytes);
    memset(e.codes, 0xee, (size_t)e.code_bytes);
    memset(e.scales, 0xee, (size_t)e.scale_bytes);
    CHECK(moq_encode(d, e.codes, e.scales, &e.global, &err) == MOQ_OK);
    return e;
}

static void free_encoded(encoded *e)
{
    free(e->codes);
    free(e->scales);
}

/* amax * fl32(1 / bound) in F32; 0 takes the bound. */
static float oracle_scale(double amax, float bound) { return (float)(amax > 0 ? amax : (double)bound) * (float)(1.0 / (double)bound); }

/* ---- tests ---- */

static void test_quant_small_codes(void)
{
    CHECK_INT(moqi_f32_bits((float)(1.0 / 6)), MOQI_INV_6);
    CHECK_INT(moqi_f32_bits((float)(1.0 / 7)), MOQI_INV_7);
    CHECK_INT(moqi_f32_bits((float)(1.0 / 127)), MOQI_INV_127);
    CHECK_INT(moqi_f32_bits((float)(1.0 / 448)), MOQI_INV_448);
    CHECK_INT(moqi_f32_bits((float)(1.0 / 1536)), MOQI_INV_1536);
    CHECK_INT(moqi_f32_bits((float)(1.0 / 2688)), MOQI_INV_2688);
    int wrong = 0;
    for (int i = 0; i < 200000; i++) {
        float v = i < 1000 ? (float)ldexp(i - 500, -11) : (float)ldexp((double)test_uniform(), (int)(test_random() % 24) - 14);
        wrong += moqi_e4m3_code(v) != oracle_e4m3((double)v);
        wrong += moqi_e4m3_code(v) != moq_e4m3_encode(v);
        wrong += moqi_int_code(v, 127) != oracle_int((double)v, -128, 127);
        wrong += (moqi_e2m1_code(v) & 7u) != (unsigned)nearest_code(e2m1_table, 8, fabs((double)v), TIE_EVEN);
        wrong += (moqi_mx_e2m1_code(v) & 7u) != (unsigned)nearest_code(e2m1_table, 8, fabs((double)v), TIE_ZERO);
        wrong += (moqi_e3m2_code(v) & 31u) != (unsigned)nearest_code(e3m2_table, 32, fabs((double)v), TIE_EVEN);
        wrong += moqi_e3m2_code(v) != moq_e3m2_encode(v) || moqi_e2m3_code(v) != moq_e2m3_encode(v);
    }
    CHECK_INT(wrong, 0);
    static const float ties[] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
    static const unsigned even[] = {0, 2, 2, 4, 4, 6, 6};
    for (unsigned i = 0; i < 7; i++) {
        CHECK_INT(moqi_e2m1_code(ties[i]), even[i]);
        CHECK_INT(moqi_e2m1_code(-ties[i]), even[i] + 8);
        CHECK_INT(moqi_mx_e2m1_code(ties[i]), i);
    }
    CHECK_INT(moqi_e2m1_code(0.0f), 0);
    CHECK_INT(moqi_e2m1_code(-0.0f), 0);
    CHECK_INT(moqi_e2m1_code(-1e-9f), 8);
    CHECK_INT(moqi_mx_e2m1_code(0.0f), 8);
}

static const int64_t shapes[][2] = {{1, 128}, {2, 32}, {34, 160}, {130, 416}, {258, 256}};

/* FP8, one scale: BF16 scale, BF16 quotient. The last shape is large enough for the table. */
static void test_quant_fp8_tensor(void)
{
    for (size_t k = 0; k < 5; k++) {
        matrix m = random_matrix(shapes[k][0], shapes[k][1]);
        moq_encode_desc d = desc_of(&m, "fp8");
        encoded e = encode(&d);
        float scale = oracle_scale(group_amax(&m, 0, m.rows, 0, m.cols), 448), stored;
        double s16 = oracle_bf16((double)scale);
        int wrong = 0;
        memcpy(&stored, e.scales, 4);
        CHECK(e.scale_bytes == 4 && stored == scale);
        for (int64_t i = 0; i < m.rows * m.cols; i++) wrong += e.codes[i] != oracle_e4m3(oracle_bf16((double)(float)((double)m.x[i] / s16)));
        CHECK_INT(wrong, 0);
        d.dtype = MOQ_F32; /* an F32 model divides in F32 */
        d.data = m.x;
        moq_error err;
        CHECK(moq_encode(&d, e.codes, e.scales, NULL, &err) == MOQ_OK);
        for (int64_t i = 0; i < m.rows * m.cols; i++) wrong += e.codes[i] != oracle_e4m3((double)(float)((double)m.x[i] / (double)scale));
        CHECK_INT(wrong, 0);
        free_encoded(&e);
        free_matrix(&m);
    }
}

/* Rows and ragged 128 x 128 blocks. */
static void test_quant_fp8_groups(void)
{
    for (size_t k = 0; k < 10; k++) {
        matrix m = random_matrix(shapes[k % 5][0], shapes[k % 5][1]);
        int64_t g = k < 5 ? 1 : 128, h = k < 5 ? m.cols : 128, n = moqi_ceil_div(m.cols, h);
        moq_encode_desc d = desc_of(&m, k < 5 ? "fp8_per_channel_per_token" : "fp8_2d_blockwise_weight_only");
        encoded e = encode(&d);
        int wrong = 0;
        for (int64_t r = 0; r < m.rows; r++) {
            for (int64_t c = 0; c < m.cols; c++) {
                float s = oracle_scale(group_amax(&m, r / g * g, r / g * g + g, c / h * h, c / h * h + h), 448), stored;
                if (c % h == 0 && r % g == 0) { memcpy(&stored, e.scales + 4 * (r / g * n + c / h), 4); wrong += stored != s; }
                wrong += e.codes[r * m.cols + c] != oracle_e4m3((double)(float)((double)m.x[r * m.cols + c] / (double)s));
                if (g > 1 && c % 16) c += 15; /* the maximum of a block is slow */
            }
        }
        CHECK_INT(wrong, 0);
        free_encoded(&e);
        free_matrix(&m);
    }
}

static void test_quant_integers(void)
{
    for (size_t k = 0; k < 2; k++) {
        matrix m = random_matrix(34, 384);
        int64_t g = k ? 128 : m.cols, n = m.cols / g;
        float bound = k ? 7 : 127;
        moq_encode_desc d = desc_of(&m, k ? "int4_blockwise_weight_only" : "int8_weight_only");
        encoded e = encode(&d);
        int wrong = 0;
        CHECK_INT(e.code_bytes, k ? 34 * 384 / 2 : 34 * 384);
        for (int64_t r = 0; r < m.rows; r++) {
            for (int64_t c = 0; c < m.cols; c++) {
                float s = oracle_scale(group_amax(&m, r, r + 1, c / g * g, c / g * g + g), bound), stored;
                long q = oracle_int((double)(float)((double)m.x[r * m.cols + c] / (double)s), k ? -8 : -128, (long)bound);
                memcpy(&stored, e.scales + 4 * (r * n + c / g), 4);
                long got = k ? e.codes[r / 2 * m.cols + c] >> (r % 2 * 4) & 15 : e.codes[r * m.cols + c];
                wrong += stored != s || got != (q & (k ? 15 : 255));
            }
        }
        CHECK_INT(wrong, 0);
        free_encoded(&e);
        free_matrix(&m);
    }
}

/* NVFP4, blocks of 16 and 32, from the data and with given amax. */
static void test_quant_nvfp4(void)
{
    static const char *const recipes[] = {"nvfp4", "w4a8_nvfp4_fp8", "nvfp4_mlp_weight_only", "nvfp4"};
    for (size_t k = 0; k < 4; k++) {
        matrix m = random_matrix(35, 192);
        moq_encode_desc d = desc_of(&m, recipes[k]);
        int64_t g = d.scheme.weight.group_cols, n = m.cols / g;
        float amax[35 * 12], top = (float)group_amax(&m, 0, m.rows, 0, m.cols);
        for (int64_t i = 0; i < m.rows * n; i++) amax[i] = (float)group_amax(&m, i / n, i / n + 1, i % n * g, i % n * g + g) * (i % 3 ? 1.0f : 0.8f);
        if (k == 3) d.amax = amax;
        encoded e = encode(&d);
        float global = k == 1 ? top * (float)(1.0 / 448) : top * (float)(1.0 / 2688);
        int wrong = 0;
        CHECK(e.global == global);
        for (int64_t r = 0; r < m.rows; r++) {
            for (int64_t c = 0; c < m.cols; c++) {
                float b = (float)group_amax(&m, r, r + 1, c / g * g, c / g * g + g);
                float s = k == 3 ? amax[r * n + c / g] * (float)(1.0 / 6) : b / (6 * global);
                if (s == 0) s = 1;
                if (k == 3) s = s * 448 / (top * (float)(1.0 / 6));
                int code = oracle_e4m3((double)(s < ldexpf(1, -9) ? ldexpf(1, -9) : s > 448 ? 448 : s));
                float t = m.x[r * m.cols + c] / ((float)e4m3_table[code] * global);
                int q = nearest_code(e2m1_table, 8, fabs((double)t), TIE_EVEN) | (t < 0 ? 8 : 0);
                wrong += e.scales[r * n + c / g] != code || (e.codes[(r * m.cols + c) / 2] >> (c % 2 * 4) & 15) != q;
            }
        }
        CHECK_INT(wrong, 0);
        free_encoded(&e);
        free_matrix(&m);
    }
}

/* MX formats: the scale is the smallest power of two that holds the block; 6-bit codes are packed bit by bit, low bits first. */
static void test_quant_mx(void)
{
    static const struct { const char *recipe; int bits; double bound; } rows[] = {
        {"mxfp4", 4, 6}, {"mxfp6", 6, 28}, {"mxfp8", 8, 448}, {"mxint8", 8, 127}, {"mxfp6_e2m3", 6, 7.5}};
    double e2m3_table[32];
    for (int i = 0; i < 32; i++) e2m3_table[i] = i < 8 ? i / 8.0 : (1 + i % 8 / 8.0) * (1 << (i / 8 - 1));
    for (size_t k = 0; k < 5; k++) {
        matrix m = random_matrix(33, 160);
        moq_encode_desc d = desc_of(&m, rows[k].recipe);
        encoded e = encode(&d);
        int wrong = 0;
        CHECK_INT(e.code_bytes, 33 * 160 * rows[k].bits / 8);
        for (int64_t i = 0; i < m.rows * m.cols; i++) {
            int64_t r = i / m.cols, c = i % m.cols;
            double top = group_amax(&m, r, r + 1, c / 32 * 32, c / 32 * 32 + 32), v;
            int scale = -127, q;
            while (scale < 127 && top > rows[k].bound * ldexp(1, scale)) scale++;
            v = ldexp((double)m.x[i], -scale);
            if (k == 0) q = nearest_code(e2m1_table, 8, fabs(v), TIE_ZERO) | (v > 0 ? 0 : 8);
            else if (k == 4) q = nearest_code(e2m3_table, 32, fabs(v), TIE_EVEN) | (signbit(v) ? 32 : 0);
            else if (k == 1) q = nearest_code(e3m2_table, 32, fabs(v), TIE_EVEN) | (signbit(v) ? 32 : 0);
            else q = k == 2 ? oracle_e4m3(v) : (int)(oracle_int(v, -127, 127) & 255);
            int64_t bit = c * rows[k].bits;
            const uint8_t *row = e.codes + r * m.cols * rows[k].bits / 8;
            int got = row[bit / 8] >> (bit % 8);
            if (bit % 8 + rows[k].bits > 8) got |= row[bit / 8 + 1] << (8 - bit % 8);
            wrong += (got & ((1 << rows[k].bits) - 1)) != q || e.scales[r * 5 + c / 32] != scale + 127;
        }
        CHECK_INT(wrong, 0);
        free_encoded(&e);
        free_matrix(&m);
    }
}

/* Searches: the chosen amax gives an error no larger than any other candidate's, found in float64. */
static void test_quant_searches(void)
{
    matrix m = random_matrix(16, 128);
    moq_error err;
    for (int four = 0; four < 2; four++) {
        moq_encode_desc d = desc_of(&m, "nvfp4");
        float amax[128], top = 0;
        d.search = four ? MOQ_SEARCH_FOUR_OVER_SIX : MOQ_SEARCH_SWEEP;
        CHECK(moq_find_amax(&d, amax, &top, &err) == MOQ_OK);
        CHECK(top == (float)group_amax(&m, 0, m.rows, 0, m.cols));
        for (int64_t i = 0; i < 128; i++) {
            double best = 1e30, mine = 0;
            for (int code = 0; code <= 126; code++) { /* code 0: the chosen one */
                double largest = group_amax(&m, i / 8, i / 8 + 1, i % 8 * 16, i % 8 * 16 + 16);
                double a = code == 0 ? (double)amax[i] : four ? largest * (code == 1 ? 1 : 1.5) : e4m3_table[code] / 448 * (double)top, step = a / 6, loss = 0;
                if (four) step = e4m3_table[nearest_code(e4m3_table, 127, a * 256 / (double)top, TIE_EVEN)] * (double)top / 1536;
                for (int c = 0; c < 16; c++) {
                    double v = fabs((double)m.x[i * 16 + c]), q = step > 0 ? e2m1_table[nearest_code(e2m1_table, 8, v / step, TIE_EVEN)] * step : 0;
                    loss += (v - q) * (v - q);
                }
                if (code == 0) mine = loss;
                else if (loss < best) best = loss;
                if (four && code == 2) break;
            }
            CHECK(mine <= best * 1.0001 + 1e-15);
        }
        encoded e = encode(&d), given;
        d.amax = amax;
        given = encode(&d);
        CHECK(memcmp(e.codes, given.codes, (size_t)e.code_bytes) == 0 && memcmp(e.scales, given.scales, (size_t)e.scale_bytes) == 0);
        free_encoded(&e);
        free_encoded(&given);
    }
    free_matrix(&m);
}

/* mse over multiples: no multiple of a group's amax errs less than the chosen one, integers too; the loss is counted in double here. */
static void test_quant_multiples(void)
{
    static const char *const recipes[] = {"int4_mse", "nvfp4_mse", "int8_weight_only"};
    matrix m = random_matrix(16, 256);
    moq_error err;
    for (size_t i = 0; i < 3; i++) {
        moq_encode_desc d = desc_of(&m, recipes[i]);
        float amax[256], top = 0;
        int64_t g = i == 0 ? 128 : i == 1 ? 16 : 256, n = m.cols / g;
        int moved = 0;
        d.search = MOQ_SEARCH_MULTIPLES;
        CHECK(moq_find_amax(&d, amax, &top, &err) == MOQ_OK);
        for (int64_t k = 0; k < m.rows * n; k++) {
            double largest = group_amax(&m, k / n, k / n + 1, k % n * g, k % n * g + g), best = 1e30, mine = -1;
            if (!(largest > 0)) continue;
            for (int t = 0; t < 39; t++) {
                double a = largest * (0.25 + 3.75 / 38 * t), loss = 0, bound = i == 2 ? 127 : 7;
                double step = i == 1 ? e4m3_table[nearest_code(e4m3_table, 127, a * 448 / (double)top, TIE_EVEN)] * (double)top / 2688 : a / bound;
                for (int64_t c = 0; c < g; c++) {
                    double v = (double)m.x[k * g + c], q = rint(v / step), w = fabs(v);
                    q = q < -bound - 1 ? -bound - 1 : q > bound ? bound : q;
                    q = i == 1 ? (step > 0 ? e2m1_table[nearest_code(e2m1_table, 8, w / step, TIE_EVEN)] * step : 0) : fabs(q * step);
                    loss += (w - q) * (w - q);
                }
                if (fabs(a / (double)amax[k] - 1) < 1e-5) mine = loss;
                if (loss < best) best = loss;
            }
            CHECK(mine >= 0 && mine <= best * 1.001 + 1e-12);
            moved += (double)amax[k] < 0.99 * largest;
        }
        CHECK(moved > 0 || i == 2); /* eight bits are never better clipped here */
        encoded e = encode(&d), given;
        d.amax = amax;
        given = encode(&d);
        CHECK(memcmp(e.codes, given.codes, (size_t)e.code_bytes) == 0 && memcmp(e.scales, given.scales, (size_t)e.scale_bytes) == 0);
        free_encoded(&e);
        free_encoded(&given);
        d.amax = NULL;
        d.search = MOQ_SEARCH_SWEEP;
        CHECK(i == 1 || moq_find_amax(&d, amax, &top, &err) == MOQ_E_UNSUPPORTED);
    }
    free_matrix(&m);
}

/* Workers and the source's type change nothing; codes may be left out. */
static void test_quant_threads(void)
{
    static const char *const recipes[] = {"fp8", "fp8_per_channel_per_token", "fp8_2d_blockwise_weight_only", "int8", "int4_awq", "nvfp4", "mxfp4", "mxfp6", "mxfp8"};
    moq_error err;
    matrix m = random_matrix(300, 256);
    moqi_pool *pool = moqi_pool_create(5, NULL, &err);
    for (size_t k = 0; k < sizeof recipes / sizeof *recipes; k++) {
        moq_encode_desc d = desc_of(&m, recipes[k]);
        encoded one = encode(&d), many;
        d.parallel.run = moqi_pool_run;
        d.parallel.user = pool;
        many = encode(&d); /* workers 0: the caller's thread and its scratch memory (ASan) */
        CHECK(memcmp(one.codes, many.codes, (size_t)one.code_bytes) == 0);
        free_encoded(&many);
        d.parallel.workers = 5;
        d.dtype = MOQ_F32;
        d.model = MOQ_BF16;
        d.data = m.x;
        many = encode(&d);
        CHECK(memcmp(one.codes, many.codes, (size_t)one.code_bytes) == 0);
        CHECK(memcmp(one.scales, many.scales, (size_t)one.scale_bytes) == 0 && one.global == many.global);
        memset(many.scales, 0, (size_t)many.scale_bytes);
        CHECK(moq_encode(&d, NULL, many.scales, NULL, &err) == MOQ_OK);
        CHECK(memcmp(one.scales, many.scales, (size_t)one.scale_bytes) == 0);
        free_encoded(&one);
        free_encoded(&many);
    }
    moqi_pool_destroy(pool);
    free_matrix(&m);
}

static void test_quant_refusals(void)
{
    static const char *const recipes[] = {"fp8", "fp8_per_channel_per_token", "fp8_2d_blockwise_weight_only", "int8", "int4_awq", "nvfp4", "mxfp4", "mxfp6", "mxfp8"};
    static const uint16_t bad[] = {0x7fc0, 0xff80, 0x7f80};
    moq_error err;
    uint64_t a, b;
    float scales[4096], global;
    uint8_t codes[65536 * 2];
    for (size_t k = 0; k < sizeof recipes / sizeof *recipes; k++) {
        matrix m = random_matrix(k == 0 ? 512 : 20, 256);
        moq_encode_desc d = desc_of(&m, recipes[k]);
        d.global_amax = 1; /* given: no first pass looks at the values */
        m.bits[m.rows * m.cols - 7] = bad[k % 3];
        CHECK_INT(moq_encode(&d, codes, scales, &global, &err), MOQ_E_SCALE);
        CHECK(strstr(err.text, "NaN or infinity") != NULL);
        CHECK_INT(moq_find_amax(&d, NULL, &global, &err), MOQ_OK); /* known already */
        d.global_amax = 0;
        CHECK_INT(moq_find_amax(&d, NULL, &global, &err), MOQ_E_SCALE);
        d.allocator = NULL;
        free_matrix(&m);
    }
    matrix m = random_matrix(5, 100);
    moq_encode_desc d = desc_of(&m, "nvfp4");
    CHECK_INT(moq_encode_bytes(&d, &a, &b, &err), MOQ_E_SHAPE);
    d = desc_of(&m, "fp8");
    CHECK_INT(moq_encode_bytes(&d, &a, &b, &err), MOQ_OK);
    d.rows = 0;
    CHECK_INT(moq_encode_bytes(&d, &a, &b, &err), MOQ_E_ARG);
    d = desc_of(&m, "fp8");
    d.dtype = MOQ_I8;
    CHECK_INT(moq_encode_bytes(&d, &a, &b, &err), MOQ_E_ARG);
    d = desc_of(&m, "fp8");
    d.scheme.weight.elem = MOQ_I3;
    CHECK_INT(moq_encode_bytes(&d, &a, &b, &err), MOQ_E_UNSUPPORTED);
    d = desc_of(&m, "fp8");
    moq_allocator al = test_allocator();
    d.allocator = &al;
    for (long k = 1; k < 20; k++) {
        test_state.fail_at = k;
        moq_result r = moq_encode(&d, codes, scales, NULL, &err);
        CHECK_INT(test_state.live_allocs, 0);
        if (r == MOQ_OK) { CHECK(k > 1); break; }
        CHECK_INT(r, MOQ_E_NOMEM);
    }
    test_state.fail_at = 0;
    CHECK_INT(test_state.live_allocs, 0);
    free_matrix(&m);
    /* all zeros: positive scales, zero codes */
    static const uint16_t zeros[64 * 32];
    for (size_t k = 0; k < sizeof recipes / sizeof *recipes; k++) {
        matrix z = {64, 32, (uint16_t *)(uintptr_t)zeros, NULL};
        d = desc_of(&z, recipes[k]);
        if (d.scheme.weight.group_cols == 128 && d.scheme.weight.elem == MOQ_I4) continue;
        CHECK_INT(moq_encode(&d, codes, scales, &global, &err), MOQ_OK);
        CHECK(codes[5] == 0 || (codes[5] == 0x88 && strcmp(recipes[k], "mxfp4") == 0));
        CHECK(!d.scheme.weight.has_global || global > 0);
        if (d.scheme.weight.scale == MOQ_F32) CHECK(scales[0] > 0.99f && scales[0] < 1.01f);
    }
}

/* Bytes of BF16 a second on one thread: printed, judged only for being there at all. */
static void test_quant_speed(void)
{
    static const char *const recipes[] = {"fp8", "fp8_per_channel_per_token", "nvfp4", "mxfp4", "mxfp8", "int8", "int4_awq"};
    matrix m = random_matrix(512, 2048);
    for (size_t k = 0; k < sizeof recipes / sizeof *recipes; k++) {
        moq_encode_desc d = desc_of(&m, recipes[k]);
        moq_error err;
        uint64_t a, b;
        moq_encode_bytes(&d, &a, &b, &err);
        uint8_t *codes = (uint8_t *)malloc((size_t)a), *scales = (uint8_t *)malloc((size_t)b);
        double best = 1e9;
        for (int i = 0; i < 6; i++) {
            double start = moq_seconds();
            CHECK(moq_encode(&d, codes, scales, NULL, &err) == MOQ_OK);
            double t = moq_seconds() - start;
            if (t < best) best = t;
        }
        printf("%-28s %6.2f GB/s of BF16\n", recipes[k], (double)(m.rows * m.cols) * 2 / best / 1e9);
        free(codes);
        free(scales);
    }
    free_matrix(&m);
}

int main(int argc, char **argv)
{
    make_tables();
    test_begin(argc, argv);
    RUN(test_quant_small_codes);
    RUN(test_quant_fp8_tensor);
    RUN(test_quant_fp8_groups);
    RUN(test_quant_integers);
    RUN(test_quant_nvfp4);
    RUN(test_quant_mx);
    RUN(test_quant_searches);
    RUN(test_quant_multiples);
    RUN(test_quant_threads);
    RUN(test_quant_refusals);
    RUN(test_quant_speed);
    return test_end();
}
