/* The reference kernels against independent oracles in double. */
#include "test.h"
#include "layers.h"

/* ---- weights ---- */

static void test_cpu_dequantize(void)
{
    for (size_t i = 0; i < MOQI_COUNT(layer_formats); i++) {
        layer l;
        layer_make(&l, &layer_formats[i], 37, 200);
        float *row = (float *)malloc((size_t)l.w.cols * sizeof *row);
        long wrong = 0;
        for (int64_t r = 0; r < l.w.rows; r++) {
            moq_dequantize(&l.w, r, 1, row);
            for (int64_t c = 0; c < l.w.cols; c++) {
                float want = (float)l.exact[r * l.w.cols + c];
                wrong += memcmp(&want, &row[c], 4) != 0;
            }
        }
        if (wrong) fprintf(stderr, "%s: %ld weights differ\n", layer_formats[i].name, wrong);
        CHECK_INT(wrong, 0);
        free(row);
        layer_free(&l);
    }
}

/* ---- rounding: every code is tried, the nearest wins, the even code of equals ---- */

static double nearest(moq_dtype elem, double v, double zero)
{
    double best = 0, gap = 1e300;
    if (elem == MOQ_I8) {
        double f = floor(v), q = v - f < 0.5 ? f : v - f > 0.5 ? f + 1 : fmod(f, 2) == 0 ? f : f + 1;
        q += zero;
        return (q < -128 ? -128 : q > 127 ? 127 : q) - zero;
    }
    for (unsigned c = 0; c < (elem == MOQ_F4 ? 8u : 127u); c++) {
        double x = elem == MOQ_F4 ? layer_e2m1(c) : layer_small(c, 4, 3, 7), d = fabs(fabs(v) - x);
        if (d < gap || (d == gap && c % 2 == 0)) { gap = d; best = x; }
    }
    return v < 0 ? -best : best;
}

/* The scale of a group of inputs, from the definitions; `nudge` moves amax by a rounding error. */
static double oracle_scale(const moq_coding *c, double global, const float *x, int64_t n, double nudge, double *zero)
{
    double amax = 0, lo = x[0], hi = x[0], top = c->elem == MOQ_F4 ? 6 : c->elem == MOQ_I8 ? 127 : 448;
    for (int64_t i = 0; i < n; i++) {
        amax = fabs((double)x[i]) > amax ? fabs((double)x[i]) : amax;
        lo = (double)x[i] < lo ? (double)x[i] : lo;
        hi = (double)x[i] > hi ? (double)x[i] : hi;
    }
    if (c->scale == MOQ_F8_E8M0) {
        int e = -127;
        if (c->rule == MOQ_RULE_E8M0_CEIL) while (e < 127 && amax > ldexp(top, e)) e++;
        else {
            e = (int)floor(log2(amax));
            if (amax / ldexp(1, e) >= 1.75) e++;
            e -= top == 6 ? 2 : 8;
        }
        return ldexp(1, e);
    }
    amax *= nudge;
    if (c->scale == MOQ_F8_E4M3) {
        double s = amax / (6 * global);
        return nearest(MOQ_F8_E4M3, s > 448 ? 448 : s, 0) * global;
    }
    if (c->zero_point) {
        double s = (hi - lo) / 255 * nudge;
        *zero = nearest(MOQ_I8, -128 - lo / s, 0);
        return s;
    }
    return amax / top;
}

/* Is `got` what rounding x gives, allowing for a value or scale that lies on an edge? 1: exactly so, 0: only after a nudge, -1: no. */
static int agrees(const moq_coding *c, const input_format *f, const float *group, int64_t n, float x, float got)
{
    static const double nudges[5] = {1, 1 + 3e-7, 1 - 3e-7, 1 + 6e-7, 1 - 6e-7};
    int fixed = f && !c->dynamic;
    for (int a = 0; a < 5; a++)
        for (int b = 0; b < 5; b++) {
            double zero = fixed ? (double)f->zero : 0, s = fixed ? (double)f->scale : oracle_scale(c, f ? (double)f->scale : 0, group, n, nudges[a], &zero);
            double want = s > 0 ? nearest(c->elem, (double)x / s * nudges[b], zero) * s : 0;
            if (fabs(want - (double)got) <= 1e-6 * fabs(want)) return a == 0 && b == 0;
        }
    return -1;
}

static void test_cpu_round_input(void)
{
    enum { COLS = 437 };
    for (size_t i = 0; i < MOQI_COUNT(input_formats); i++) {
        const input_format *f = &input_formats[i];
        moq_linear w;
        float x[COLS], y[COLS], z[COLS];
        int edge = 0, wrong = 0, changed = 0;
        moq_make_linear(&w, "w", MOQ_F32, x, 1, COLS);
        w.scheme.input = f->c;
        w.input_scale = f->scale;
        w.input_zero = f->zero;
        for (int turn = 0; turn < 8; turn++) {
            for (int c = 0; c < COLS; c++) x[c] = test_normal();
            for (int c = 64; c < 80; c++) x[c] *= turn % 2 ? 1e-6f : 0; /* a block of zeros, a block below the scales */
            moq_round_input(&w, x, y);
            memcpy(z, x, sizeof z);
            moq_round_input(&w, z, z);
            CHECK(memcmp(y, z, sizeof y) == 0);
            int64_t g = f->c.group_cols > 0 ? f->c.group_cols : COLS;
            for (int64_t c = 0; c < COLS; c++) {
                int64_t first = c / g * g, n = COLS - first < g ? COLS - first : g;
                int ok = agrees(&f->c, f, x + first, n, x[c], y[c]);
                wrong += ok < 0;
                edge += ok == 0;
                changed += y[c] != x[c];
            }
        }
        if (wrong || edge > 16) fprintf(stderr, "%s: %d wrong, %d on an edge\n", f->name, wrong, edge);
        CHECK_INT(wrong, 0);
        CHECK(edge <= 16 && changed > 2000);
    }
}

static void test_cpu_round_input_by_hand(void)
{
    moq_linear w;
    float x[32] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f, 6.0f, -0.25f, -0.75f, -1.25f, -1.75f, -2.5f, -3.5f, -5.0f, -0.3f}, y[32];
    static const float want[16] = {0, 1, 1, 2, 2, 4, 4, 6, 0, -1, -1, -2, -2, -4, -4, -0.5f};
    moq_make_linear(&w, "w", MOQ_F32, x, 1, 32);
    w.scheme.input = input_formats[7].c; /* nvfp4: amax 6, global 1 / 448 -> scale 448 / 448 */
    w.input_scale = 1.0f / 448;
    moq_round_input(&w, x, y);
    for (int i = 0; i < 16; i++) CHECK(y[i] == want[i]);
    for (int i = 16; i < 32; i++) CHECK(y[i] == 0);
    w.scheme.input = input_formats[3].c;
    w.input_scale = 0.5f;
    x[0] = 0.25f; x[1] = 0.75f; x[2] = -1.25f; x[3] = 1000; x[4] = -1000;
    moq_round_input(&w, x, y);
    CHECK(y[0] == 0 && y[1] == 1 && y[2] == -1 && y[3] == 63.5f && y[4] == -64);
    w.scheme.input = input_formats[4].c;
    w.input_zero = -100; /* codes -128 .. 127 stand for -28 .. 227 halves */
    moq_round_input(&w, x, y);
    CHECK(y[3] == 113.5f && y[4] == -14 && y[0] == 0);
    w.input_zero = 0;
    w.scheme.input = input_formats[0].c;
    w.input_scale = 1;
    moq_round_input(&w, x, y);
    CHECK(y[3] == 448 && y[4] == -448);
    w.scheme.input = input_formats[8].c; /* amax 6 needs 2^0, the next number above 2^1 */
    x[3] = 6; x[4] = 1;
    x[5] = 1.5f;
    memset(x + 6, 0, 26 * sizeof *x);
    moq_round_input(&w, x, y);
    CHECK(y[3] == 6 && y[4] == 1 && y[0] == 0 && y[5] == 1.5f);
    x[3] = 6.0000005f;
    moq_round_input(&w, x, y);
    CHECK(y[3] == 6 && y[4] == 1 && y[0] == 0 && y[5] == 2);
    w.scheme.input = input_formats[9].c; /* 7 = 1.75 * 4 is rounded up to 8: scale 2; 6.9 keeps 1 */
    x[3] = 7;
    moq_round_input(&w, x, y);
    CHECK(y[3] == 8 && y[4] == 1 && y[5] == 2);
    x[3] = 6.9f;
    moq_round_input(&w, x, y);
    CHECK(y[3] == 6 && y[4] == 1 && y[5] == 1.5f);
    memset(x, 0, sizeof x);
    for (size_t i = 0; i < MOQI_COUNT(input_formats); i++) { /* zeros stay zeros, NaN stays NaN */
        w.scheme.input = input_formats[i].c;
        w.input_scale = input_formats[i].scale;
        w.input_zero = input_formats[i].zero;
        x[3] = 0;
        moq_round_input(&w, x, y);
        for (int j = 0; j < 32; j++) CHECK(y[j] == 0);
        x[3] = moqi_bits_f32(0x7fc00000u);
        moq_round_input(&w, x, y);
        CHECK(moqi_is_nan(y[3]) && y[0] == 0);
    }
}

static void test_cpu_round_kv(void)
{
    enum { N = 72 };
    float x[N], y[N], bias[N];
    for (int i = 0; i < N; i++) bias[i] = test_uniform();
    for (int turn = 0; turn < 20; turn++) {
        int wrong = 0, edge = 0, affine = 0;
        for (int i = 0; i < N; i++) x[i] = test_normal();
        moq_round_kv(MOQ_KV_WIDE, 0.01f, bias, x, N, y);
        CHECK(memcmp(x, y, sizeof x) == 0);
        static const moq_kv_format formats[5] = {MOQ_KV_FP8, MOQ_KV_INT8, MOQ_KV_NVFP4, MOQ_KV_NVFP4_AFFINE, MOQ_KV_MXFP4};
        for (int f = 0; f < 5; f++) {
            static const moq_coding codings[5] = {{MOQ_F8_E4M3, 0, 0, MOQ_F32, 0, 0, 0, 0}, {MOQ_I8, 0, 0, MOQ_F32, 0, 0, 0, 0}, {MOQ_F4, 1, 16, MOQ_F8_E4M3, 1, 1, 0, 0},
                                                  {MOQ_F4, 1, 16, MOQ_F8_E4M3, 1, 1, 0, 0}, {MOQ_F4, 1, 32, MOQ_F8_E8M0, 0, 1, 0, MOQ_RULE_E8M0_CEIL}};
            input_format in = {"", {MOQ_NONE, 0, 0, MOQ_NONE, 0, 0, 0, 0}, 0.02f, 0};
            if (f == 2 || f == 3) in.scale = 0.02f / 6;
            moq_round_kv(formats[f], 0.02f, bias, x, N, y);
            for (int i = 0; i < N; i++) {
                int g = f < 2 ? N : codings[f].group_cols, first = i / g * g, n = N - first < g ? N - first : g;
                int ok = agrees(&codings[f], &in, x + first, n, x[i], y[i]);
                wrong += ok < 0;
                edge += ok == 0;
                if (ok < 0) fprintf(stderr, "%s: %g -> %g\n", moq_kv_format_name(formats[f]), (double)x[i], (double)y[i]);
            }
        }
        moq_round_kv(MOQ_KV_FP8_AFFINE, 0.02f, bias, x, N, y);
        for (int i = 0; i < N; i++) {
            double want = nearest(MOQ_F8_E4M3, ((double)x[i] - (double)bias[i]) / 0.02, 0) * 0.02 + (double)bias[i];
            affine += fabs(want - (double)y[i]) > 1e-5 * (1 + fabs((double)x[i]));
        }
        CHECK_INT(wrong, 0);
        CHECK(edge <= 3 && affine <= 1);
    }
}

/* Rotated keys: the same as rotating with a matrix, rounding, rotating back. */
static void test_cpu_round_kv_rotated(void)
{
    enum { N = 64 };
    float x[N], t[N], y[N];
    for (int i = 0; i < N; i++) x[i] = test_normal();
    for (int i = 0; i < N; i++) {
        double s = 0;
        for (int j = 0; j < N; j++) {
            int bits = 0;
            for (int b = i & j; b; b &= b - 1) bits++;
            s += (double)x[j] * (bits % 2 ? -1 : 1);
        }
        t[i] = (float)(s / 8);
    }
    moq_round_kv(MOQ_KV_NVFP4, 0.05f, NULL, t, N, t);
    moq_round_kv(MOQ_KV_NVFP4_ROTATE, 0.05f, NULL, x, N, y);
    for (int i = 0; i < N; i++) {
        double s = 0;
        for (int j = 0; j < N; j++) {
            int bits = 0;
            for (int b = i & j; b; b &= b - 1) bits++;
            s += (double)t[j] * (bits % 2 ? -1 : 1);
        }
        CHECK(fabs(s / 8 - (double)y[i]) < 1e-5);
    }
}

/* ---- inner loops: every set of kernels against the plain one ---- */

static void test_cpu_kernels_agree(void)
{
    static const moq_dtype types[] = {MOQ_F32, MOQ_F16, MOQ_BF16, MOQ_F8_E4M3, MOQ_F8_E8M0, MOQ_I8, MOQ_U8};
    enum { N = 263 };
    static float a[N * 4], b[N * 4];
    static uint8_t src[N * 4 + 1];
    float table[16], s[N], zero[N];
    for (size_t i = 0; i < sizeof src; i++) src[i] = (uint8_t)(i < 257 ? i : test_random());
    for (int i = 0; i < 16; i++) table[i] = test_normal();
    for (int i = 0; i < N; i++) { s[i] = test_normal(); zero[i] = test_normal(); }
    for (int i = 0; moqi_get_kernels(i); i++) {
        const moqi_kernels *k = moqi_get_kernels(i);
        for (size_t t = 0; t < MOQI_COUNT(types); t++)
            for (int64_t n = 0; n <= N; n += n < 40 ? 1 : 37) { /* unaligned on purpose; every E4M3 and E8M0 code in the long runs */
                memset(a, 0x55, sizeof a);
                memset(b, 0x55, sizeof b);
                moqi_plain_expand(types[t], src + 1, n, a);
                k->expand(types[t], src + 1, n, b);
                for (int64_t j = 0; j < n; j++)
                    if (moqi_is_nan(a[j])) { CHECK(moqi_is_nan(b[j])); a[j] = b[j] = 0; }
                CHECK(memcmp(a, b, sizeof a) == 0);
            }
        for (int64_t n = 0; n <= N; n++) {
            moqi_plain_nibbles(src + 1, n, table, a);
            k->nibbles(src + 1, n, table, b);
            CHECK(memcmp(a, b, sizeof a) == 0);
            for (int shift = 4; shift <= 8; shift++) {
                memcpy(a, b, sizeof a);
                for (int64_t j = 0; j < n; j++) a[j] = (a[j] - (shift == 5 ? zero[j / 32] : 0)) * s[j / (1 << shift)];
                k->scale(b, n, shift, s, shift == 5 ? zero : NULL);
                CHECK(memcmp(a, b, sizeof a) == 0);
            }
        }
    }
}

static void test_cpu_products(void)
{
    enum { N = 528, M = 7 };
    static float w[4 * N], x[M * N], y[M * 5], z[M * 5];
    for (int i = 0; i < 4 * N; i++) w[i] = test_normal();
    for (int i = 0; i < M * N; i++) x[i] = test_normal();
    for (int i = 0; moqi_get_kernels(i); i++) {
        const moqi_kernels *k = moqi_get_kernels(i);
        for (int rows = 1; rows <= 4; rows++) {
            for (int j = 0; j < M * 5; j++) y[j] = (float)j;
            k->tile(w, N, rows, x, N, M, N, y, 5);
            for (int j = 0; j < M; j++)
                for (int r = 0; r < 5; r++) {
                    double sum = j * 5 + r, size = 100;
                    for (int c = 0; r < rows && c < N; c++) { sum += (double)w[r * N + c] * (double)x[j * N + c]; size += fabs((double)w[r * N + c] * (double)x[j * N + c]); }
                    CHECK(fabs(sum - (double)y[j * 5 + r]) <= 3e-6 * size);
                }
            for (int j = 0; j < M * 5; j++) z[j] = (float)j;
            for (int j = 0; j < M; j++) k->tile(w, N, rows, x + j * N, N, 1, N, z + j * 5, 5);
            CHECK(memcmp(y, z, sizeof y) == 0); /* a row does not depend on its batch */
        }
        for (int n = 0; n < 100; n++) {
            double sum = 0, size = 0;
            for (int c = 0; c < n; c++) { sum += (double)w[c] * (double)x[c]; size += fabs((double)w[c] * (double)x[c]); }
            CHECK(fabs(sum - (double)k->dot(w, x, n)) <= 3e-6 * size);
            float line[101];
            memcpy(line, w, sizeof line);
            k->axpy(0.37f, x, line, n);
            for (int c = 0; c < 101; c++) CHECK(fabs((double)line[c] - ((double)w[c] + (c < n ? (double)0.37f * (double)x[c] : 0))) <= 2e-6 * (1 + fabs((double)line[c])));
        }
    }
}

/* ---- routing against a brute-force oracle ---- */

static void oracle_route(const moq_routing *r, const float *bias, const float *logits, int *index, double *weight)
{
    enum { MAX = 64 };
    double p[MAX], rank[MAX], sum = 0, max = -1e300;
    int alive[MAX], n = r->experts;
    for (int e = 0; e < n; e++) max = (double)logits[e] > max ? (double)logits[e] : max;
    for (int e = 0; e < n; e++) sum += exp((double)logits[e] - max);
    for (int e = 0; e < n; e++) {
        p[e] = r->score == MOQ_SCORE_SIGMOID ? 1 / (1 + exp(-(double)logits[e])) : exp((double)logits[e] - max) / sum;
        rank[e] = p[e] + (bias ? (double)bias[e] : 0);
        alive[e] = 1;
    }
    if (r->groups > 1) { /* a group survives when fewer than top_groups beat it */
        int size = n / r->groups;
        double score[MAX];
        for (int g = 0; g < r->groups; g++) {
            score[g] = -1e300;
            for (int i = 0; i < size; i++) {
                if (r->score == MOQ_SCORE_SOFTMAX) { if (p[g * size + i] > score[g]) score[g] = p[g * size + i]; continue; }
                for (int j = 0; j < size; j++) if (i != j && rank[g * size + i] + rank[g * size + j] > score[g]) score[g] = rank[g * size + i] + rank[g * size + j];
            }
        }
        for (int g = 0; g < r->groups; g++) {
            int better = 0;
            for (int o = 0; o < r->groups; o++) better += score[o] > score[g] || (score[o] == score[g] && o < g);
            for (int i = 0; i < size; i++) alive[g * size + i] = better < r->top_groups;
        }
    }
    sum = 0;
    for (int e = 0; e < n; e++) {
        int better = 0;
        if (!alive[e]) continue;
        for (int o = 0; o < n; o++) better += alive[o] && (rank[o] > rank[e] || (rank[o] == rank[e] && o < e));
        if (better < r->top_k) { index[better] = e; weight[better] = p[e]; sum += p[e]; }
    }
    for (int i = 0; i < r->top_k; i++) weight[i] = weight[i] / (r->renormalize ? sum : 1) * (r->scale != 0 ? (double)r->scale : 1);
}

static void test_cpu_routing(void)
{
    float logits[32], bias[32], scratch[160], weight[8];
    int32_t index[8];
    int want[8], ties = 0;
    double value[8];
    for (int turn = 0; turn < 4000; turn++) {
        moq_routing r;
        memset(&r, 0, sizeof r);
        r.experts = turn % 3 == 0 ? 32 : turn % 3 == 1 ? 24 : 8;
        r.top_k = 1 + (int32_t)(test_random() % (r.experts == 8 ? 4u : 8u));
        r.score = test_random() % 2 ? MOQ_SCORE_SIGMOID : MOQ_SCORE_SOFTMAX;
        r.renormalize = (int32_t)(test_random() % 2);
        r.scale = test_random() % 2 ? 2.5f : 0;
        if (test_random() % 2) { r.groups = 4; r.top_groups = r.experts == 8 ? 2 : 2 + (int32_t)(test_random() % 2); }
        if (r.experts == 24 && r.groups) r.top_groups = 3;
        int use_bias = (int)(test_random() % 2), coarse = (int)(test_random() % 2);
        for (int e = 0; e < r.experts; e++) {
            logits[e] = coarse ? (float)(test_random() % 5) * 0.5f : test_normal();
            bias[e] = coarse ? (float)(test_random() % 3) * 0.25f : test_uniform();
        }
        for (int e = 1; e < r.experts; e++) ties += logits[e] == logits[e - 1];
        moqi_route(&r, use_bias ? bias : NULL, logits, scratch, index, weight);
        oracle_route(&r, use_bias ? bias : NULL, logits, want, value);
        int same = 1;
        for (int i = 0; i < r.top_k; i++) same &= index[i] == want[i] && fabs((double)weight[i] - value[i]) < 2e-6 * (1 + value[i]);
        CHECK(same);
    }
    CHECK(ties > 1000);
}

/* ---- small operations ---- */

static void test_cpu_activations(void)
{
    for (int i = 0; i < 2000; i++) {
        float x[2] = {test_normal() * 3, test_normal() * 3}, y;
        double g = (double)x[0], u = (double)x[1], want[5];
        want[MOQ_SILU_MUL] = g / (1 + exp(-g)) * u;
        want[MOQ_GELU_MUL] = g * 0.5 * erfc(-g / sqrt(2.0)) * u;
        want[MOQ_GELU_TANH_MUL] = g * 0.5 * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (g + 0.044715 * g * g * g))) * u;
        double cg = g > 7 ? 7 : g, cu = u > 7 ? 7 : u < -7 ? -7 : u;
        want[MOQ_SWIGLU_CLAMP] = cg / (1 + exp(-(double)1.702f * cg)) * (cu + 1);
        want[MOQ_RELU2] = g > 0 ? g * g : 0;
        for (int k = 0; k < 5; k++) {
            moq_activation_desc a = {(moq_activation)k, 7, 1.702f, 1};
            moqi_activate_row(&a, x, 1, &y);
            CHECK(fabs((double)y - want[k]) <= 3e-6 * (fabs(want[k]) + fabs(g * u) * 0.1));
        }
    }
}

static void test_cpu_sylvester(void)
{
    float x[32], y[32], h[32 * 32];
    for (int i = 0; i < 32; i++) x[i] = test_normal();
    for (int i = 0; i < 1024; i++) {
        int bits = 0;
        for (int b = (i / 32) & (i % 32); b; b &= b - 1) bits++;
        h[i] = bits % 2 ? -1.0f : 1.0f;
    }
    moqi_rotate_input(NULL, 16, 0.25f, x, 32, y);
    for (int i = 0; i < 32; i++) {
        double s = 0;
        for (int j = 0; j < 16; j++) s += (double)x[i / 16 * 16 + j] * (double)h[j * 32 + i % 16];
        CHECK(fabs(s / 4 - (double)y[i]) < 1e-5);
    }
    for (int i = 0; i < 1024; i++) h[i] = test_uniform(); /* not symmetric: rows and columns must not be mixed up */
    moqi_rotate_input(h, 32, 0.5f, x, 32, y);
    for (int i = 0; i < 32; i++) {
        double s = 0;
        for (int j = 0; j < 32; j++) s += (double)x[j] * (double)h[j * 32 + i];
        CHECK(fabs(s / 2 - (double)y[i]) < 1e-5);
    }
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_cpu_dequantize);
    RUN(test_cpu_round_input);
    RUN(test_cpu_round_input_by_hand);
    RUN(test_cpu_round_kv);
    RUN(test_cpu_round_kv_rotated);
    RUN(test_cpu_kernels_agree);
    RUN(test_cpu_products);
    RUN(test_cpu_routing);
    RUN(test_cpu_activations);
    RUN(test_cpu_sylvester);
    return test_end();
}
