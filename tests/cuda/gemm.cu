/* Products with 17 and more rows of x: against float64, the same bits in every run, and their times beside cuBLAS on BF16 weights in the same run.
       gemm test [form]              random codes, outliers, odd shapes; ends with "N passed, N failed"
       gemm stored [form [RxC]]      bench with inputs that are rounded to the 8 bits of the form
       gemm bench [form [RxC]]       graphs over copies of the weights that are larger than the cache together; the median of 7 turns
   Needs an object with the implementation of modelopt_q.h, modelopt_q_cuda.o and -lcublas. */
#ifdef GEMM_INTERNAL
#include "../../modelopt_q_cuda.cu" /* to measure every way of cutting a product, not only the one that is chosen */
#else
#include "../../modelopt_q.h"
extern "C" moq_backend *moq_cuda_backend_full(const moq_cuda_desc *desc, moq_dtype activations, const moq_allocator *memory, moq_error *err);
#endif
#include "measure.h"

#include <cublas_v2.h>
#include <cuda_bf16.h>

static int passed, failed;

static float random_normal(void)
{
    double u = ((double)(next_random() >> 11) + 1) / 9007199254740993.0, v = (double)(next_random() >> 11) / 9007199254740992.0;
    return (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

/* ---- layers: random codes of every value (no NaN), scales over some powers of two ---- */

typedef struct form {
    const char *name;
    int bits;
    moq_dtype elem, scale;
    int group;                 /* columns; 0: the row, -1: the tensor */
    int group_rows, zero;
    moq_dtype input;           /* rounding of inputs in the tests of stored ones; MOQ_NONE: wide */
    moq_dtype in_scale;
    int in_group, in_dynamic;
} form;

static const form forms[] = {
    {"nvfp4", 4, MOQ_F4, MOQ_F8_E4M3, 16, 1, 0, MOQ_F4, MOQ_F8_E4M3, 16, 1},
    {"mxfp4", 4, MOQ_F4, MOQ_F8_E8M0, 32, 1, 0, MOQ_F8_E4M3, MOQ_F32, -1, 0},
    {"int4-g128", 4, MOQ_I4, MOQ_BF16, 128, 1, 0, MOQ_NONE, MOQ_NONE, 0, 0},
    {"int4-g128-fp8", 4, MOQ_I4, MOQ_BF16, 128, 1, 1, MOQ_F8_E4M3, MOQ_F32, -1, 0},
    {"int4-g32-zeros", 4, MOQ_I4, MOQ_BF16, 32, 1, 1, MOQ_NONE, MOQ_NONE, 0, 0},
    {"int4-channel", 4, MOQ_I4, MOQ_F32, 0, 1, 0, MOQ_NONE, MOQ_NONE, 0, 0},
    {"fp8-tensor", 8, MOQ_F8_E4M3, MOQ_F32, -1, -1, 0, MOQ_F8_E4M3, MOQ_F32, -1, 0},
    {"fp8-channel", 8, MOQ_F8_E4M3, MOQ_F32, 0, 1, 0, MOQ_F8_E4M3, MOQ_F32, -1, 1},
    {"fp8-block128", 8, MOQ_F8_E4M3, MOQ_F32, 128, 128, 0, MOQ_F8_E4M3, MOQ_F32, 128, 1},
    {"mxfp8", 8, MOQ_F8_E4M3, MOQ_F8_E8M0, 32, 1, 0, MOQ_F8_E4M3, MOQ_F8_E8M0, 32, 1},
    {"int8", 8, MOQ_I8, MOQ_F32, 0, 1, 0, MOQ_I8, MOQ_F32, -1, 1},
    {"bf16", 16, MOQ_BF16, MOQ_NONE, 0, 0, 0, MOQ_NONE, MOQ_NONE, 0, 0}};

typedef struct room { uint8_t *codes, *scales, *zeros; } room;

static void make_layer(moq_linear *w, const form *f, int64_t rows, int64_t cols, room *m)
{
    int64_t groups = f->group > 0 ? (cols + f->group - 1) / f->group : 1, line = (cols * f->bits + 7) / 8, high = f->group_rows > 0 ? (rows + f->group_rows - 1) / f->group_rows : 1;
    m->codes = (uint8_t *)calloc((size_t)(rows * line + 16), 1);
    m->scales = (uint8_t *)calloc((size_t)(high * groups * 4 + 16), 1);
    m->zeros = (uint8_t *)calloc((size_t)(rows * groups + 16), 1);
    memset(w, 0, sizeof *w);
    moq_make_linear(w, "layer", MOQ_BF16, m->codes, rows, cols);
    for (int64_t i = 0; i < rows * line; i++) {
        m->codes[i] = (uint8_t)(next_random() >> 20);
        if (f->elem == MOQ_F8_E4M3 && (m->codes[i] & 127) == 127) m->codes[i] ^= 1;
    }
    if (f->bits == 16) {
        for (int64_t i = 0; i < rows * cols; i++) ((uint16_t *)(void *)m->codes)[i] = (uint16_t)((next_random() >> 20 & 0x80ff) | (0x3a00 + (next_random() >> 30 & 0x1ff)));
        return;
    }
    w->scheme.weight.elem = f->elem;
    w->scheme.weight.scale = f->scale;
    w->scheme.weight.group_rows = f->group_rows > 0 ? f->group_rows : MOQ_ALL;
    w->scheme.weight.group_cols = f->group > 0 ? f->group : MOQ_ALL;
    w->codes.dtype = f->bits == 4 ? MOQ_U8 : f->elem == MOQ_I8 ? MOQ_I8 : MOQ_F8_E4M3;
    w->codes.count = (uint64_t)(rows * line);
    w->packing.bits = (uint8_t)f->bits;
    w->packing.word_bits = 8;
    w->packing.row_stride = line;
    w->packing.col_stride = 1;
    w->scales.data = m->scales;
    w->scales.dtype = f->scale;
    w->scales.count = (uint64_t)(high * groups);
    w->scale_row_stride = groups;
    w->scale_col_stride = 1;
    if (f->scale == MOQ_F8_E4M3) w->global_mul = 0.0002f * (float)(1 + (next_random() >> 20 & 3)); /* of a layer: experts differ */
    for (int64_t i = 0; i < high * groups; i++) {
        uint64_t r = next_random();
        if (f->scale == MOQ_F8_E4M3) m->scales[i] = (uint8_t)(r % 97 == 0 ? 0 : r % 89 == 0 ? r >> 16 & 7 : r % 83 == 0 ? 0x7e : 24 + (r >> 8) % 48);
        else if (f->scale == MOQ_F8_E8M0) m->scales[i] = (uint8_t)(r % 97 == 0 ? 131 : 116 + (r >> 8) % 8);
        else if (f->scale == MOQ_BF16) ((uint16_t *)(void *)m->scales)[i] = (uint16_t)(0x3c00 + (r >> 8) % 0x100);
        else ((float *)(void *)m->scales)[i] = 0.002f + 0.0001f * (float)(r >> 8 & 127);
    }
    if (!f->zero) return;
    w->scheme.weight.zero_point = 1;
    w->zeros.data = m->zeros;
    w->zeros.dtype = MOQ_I8;
    w->zeros.count = (uint64_t)(rows * groups);
    w->zero_packing.bits = w->zero_packing.word_bits = 8;
    w->zero_packing.row_stride = groups;
    w->zero_packing.col_stride = 1;
    for (int64_t i = 0; i < rows * groups; i++) m->zeros[i] = (uint8_t)(int)(next_random() >> 30 & 15) - 8;
}

static void free_layer(room *m)
{
    free(m->codes);
    free(m->scales);
    free(m->zeros);
}

/* ---- float64 on the GPU, from weights that the CPU decoded ---- */

/* How far an output may be off:
       near  * |y|            rounding of y, and a few roundings of its scale
       round * sum |x w|      rounding of factors: see bounds_of
       2^-22 * (2 * sum over steps of |sum so far| + sum |x w|)
   The last is what tensor cores lose: a step adds 16 products to a sum in F32; addends are cut to the bits of the largest, and the result is cut
   again, both towards zero (IEEE says nothing of it), 2^-23 of the largest each. Blocks that share columns begin anew, and their sums are differences
   of those here: twice. The second part of x comes after all columns of the first, when the sum is nearly y.
   out: sum of squared errors, of squares; number of outputs further off. */
__global__ void compare(const float *w, const float *x, const void *y, int bf16, int rows, int cols, int m, double near, double round, int parts, double *out)
{
    int row = blockIdx.x * 16 + threadIdx.x, token = blockIdx.y * 16 + threadIdx.y;
    double want = 0, size = 0, steps = 0;
    if (row >= rows || token >= m) return;
    for (int c = 0; c < cols; c++) {
        double v = (double)w[(int64_t)row * cols + c] * (double)x[(int64_t)token * cols + c];
        want += v;
        size += fabs(v);
        if (c % 16 == 15 || c == cols - 1) steps += fabs(want);
    }
    steps += (parts - 1) * (cols / 16) * fabs(want);
    int64_t at = (int64_t)token * rows + row;
    double got = bf16 ? (double)__bfloat162float(((const __nv_bfloat16 *)y)[at]) : (double)((const float *)y)[at], e = fabs(got - want);
    atomicAdd(out, e * e);
    atomicAdd(out + 1, want * want);
    if (!(e <= near * fabs(want) + round * size + (2 * steps + size) / 4194304)) atomicAdd(out + 2, 1.0);
}

enum { WIDE, STORED, AUTO, BF16_WIDE, BF16_AUTO, MODES };
static const char *const mode_names[MODES] = {"F32 wide", "F32 as stored", "F32 automatic", "BF16 wide", "BF16 automatic"};

static moq_backend *backend_of(int mode, const char *kernel)
{
    moq_cuda_desc d;
    memset(&d, 0, sizeof d);
    d.kernel = kernel;
    d.act = mode == STORED ? MOQ_ACT_STORED : mode == AUTO || mode == BF16_AUTO ? MOQ_ACT_AUTO : MOQ_ACT_WIDE;
    moq_backend *be = moq_cuda_backend_full(&d, mode >= BF16_WIDE ? MOQ_BF16 : MOQ_F32, NULL, &err);
    check(be != NULL, "moq_cuda_backend_full");
    return be;
}

/* May inputs be rounded to the form's type? AUTO: where the device multiplies in it, which explain says. */
static int rounded(int mode, const form *f)
{
    return f->input != MOQ_NONE && (mode == STORED || ((mode == AUTO || mode == BF16_AUTO) && (f->input == MOQ_I8 || f->input == MOQ_F8_E4M3)));
}

static void round_inputs(moq_linear *w, const form *f)
{
    w->scheme.input.elem = f->input;
    w->scheme.input.scale = f->in_scale;
    w->scheme.input.group_rows = f->in_group == -1 && !f->in_dynamic ? MOQ_ALL : 1;
    w->scheme.input.group_cols = f->in_group > 0 ? f->in_group : MOQ_ALL;
    w->scheme.input.dynamic = (uint8_t)f->in_dynamic;
    w->input_scale = f->elem == MOQ_F4 && f->in_group > 0 ? 0.013f : 0.21f;
}

/* What may be lost, and the most that all errors together may be of all outputs (root of the mean squares). */
typedef struct bounds { double near, round, most; int parts; } bounds;

/* BF16 has 8 significant bits: it keeps a number up to 2^-8 of it, two parts of F32 up to 2^-17 (the rest is half a unit at most, and of that 8 bits).
   Codes of inputs that have a scale for the tensor, for the token or a power of two are exact. Where weights with scales of groups are not precise,
   the scale is BF16 (exact for BF16 and powers of two) and the product with it is rounded once more: exact for powers of two. The mean of squares
   is 2^-8 / sqrt(3) at most for each rounding; the sums of tensor cores drift by half of what a step may lose.
   Products of bytes (`bytes`): both factors are exact, and so are sums of integers; sums of E4M3 keep 14 bits within 128 columns. MXFP4 whose scales
   lie further apart than 2^9 in a row (here 2^15) is rounded at 2^-11 of the largest scale. */
static bounds bounds_of(int mode, const form *f, int rounds, int64_t cols, int bytes)
{
    bounds b;
    if (bytes) {
        b.parts = 1;
        b.near = mode >= BF16_WIDE ? ldexp(1.001, -8) : 1e-6;
        b.round = f->input == MOQ_I8 ? ldexp(1, -22) : f->elem == MOQ_F4 ? ldexp(1, -6) : ldexp(1, -9);
        b.most = (mode >= BF16_WIDE ? ldexp(1, -8) / sqrt(3.0) : 0) + (f->input == MOQ_I8 ? 1e-6 : f->elem == MOQ_F4 ? 2e-3 : ldexp(1, -10));
        return b;
    }
    int precise = mode == WIDE || mode == STORED, grouped = !precise && f->bits <= 8 && f->elem != MOQ_F4 && f->group > 0;
    int exact = (mode >= BF16_WIDE && !rounds) || (rounds && (f->in_scale == MOQ_F8_E8M0 || f->in_group == -1));
    double x = exact ? ldexp(1, -20) : precise ? ldexp(1, -17) : ldexp(1, -8), w = grouped && f->scale != MOQ_F8_E8M0 ? ldexp(f->scale == MOQ_BF16 ? 1 : 2, -8) : ldexp(1, -22);
    b.parts = precise && !exact ? 2 : 1;
    b.near = mode >= BF16_WIDE ? ldexp(1.001, -8) : 1e-6;
    b.round = x + w + x * w;
    b.most = (sqrt(x * x + w * w) + (mode >= BF16_WIDE ? ldexp(1, -8) : 0)) / sqrt(3.0) + (double)(cols / 16 * b.parts + 16) * ldexp(1, -25) + 1e-6;
    return b;
}

/* One product in one mode; the second and third run must give the same bits. */
static void test_one(moq_backend *be, int mode, const form *f, const moq_linear *w, const float *device_w, int m, int verbose)
{
    int64_t n = w->rows, k = w->cols;
    double r[3], *sums;
    float *x = (float *)malloc((size_t)(m * k) * 4), *xr = (float *)malloc((size_t)(m * k) * 4), *y[3], *dx;
    char why[400];
    be->explain(be, w, why, sizeof why);
    const int rounds = rounded(mode, f) && (mode == STORED || strstr(why, "as stored"));
    for (int64_t i = 0; i < m * k; i++) {
        x[i] = random_normal() * (i % k % 97 == 5 ? 30.0f : 1.0f);
        if (mode >= BF16_WIDE) x[i] = moq_bf16_decode(moq_bf16_encode(x[i]));
    }
    for (int i = 0; i < m; i++) {
        if (rounds) moq_round_input(w, x + i * k, xr + i * k);
        else memcpy(xr + i * k, x + i * k, (size_t)k * 4);
    }
    moq_weight *p = be->prepare_linear(be, w, 1, &err);
    check(p != NULL, "prepare_linear");
    void *x_room = be->alloc(be, (size_t)(m * k + 8) * 4, &err), *y_room = be->alloc(be, (size_t)(m * n + 8) * 4, &err);
    check(x_room && y_room, "alloc");
    const int shift = mode >= BF16_WIDE && m == 100 ? 8 : 0; /* rows of x and y that begin at 8 of 16 bytes */
    void *px = (char *)x_room + shift, *py = (char *)y_room + shift;
    cuda(cudaMalloc(&dx, (size_t)(m * k) * 4));
    cuda(cudaMalloc(&sums, sizeof r));
    cuda(cudaMemcpy(dx, xr, (size_t)(m * k) * 4, cudaMemcpyHostToDevice));
    cuda(cudaMemset(sums, 0, sizeof r));
    be->upload_act(be, px, x, (size_t)(m * k));
    for (int turn = 0; turn < 3; turn++) {
        y[turn] = (float *)malloc((size_t)(m * n) * 4);
        for (int64_t i = 0; i < m * n; i++) y[turn][i] = NAN;
        be->upload_act(be, py, y[turn], (size_t)(m * n));
        be->linear(be, p, px, m, py);
        be->download_act(be, y[turn], py, (size_t)(m * n));
        check(be->sync(be, &err) == MOQ_OK, "sync");
    }
    int same = memcmp(y[0], y[1], (size_t)(m * n) * 4) == 0 && memcmp(y[0], y[2], (size_t)(m * n) * 4) == 0;
    bounds b = bounds_of(mode, f, rounds, k, strstr(why, "gemm-bytes") != NULL && (f->bits > 4 || m > 64)); /* few rows: weights of 4 bits become BF16 */
    compare<<<dim3((unsigned)(n + 15) / 16, (unsigned)(m + 15) / 16), dim3(16, 16)>>>(device_w, dx, py, mode >= BF16_WIDE, (int)n, (int)k, m, b.near, b.round, b.parts, sums);
    cuda(cudaMemcpy(r, sums, sizeof r, cudaMemcpyDeviceToHost));
    int good = same && r[2] == 0 && sqrt(r[0] / r[1]) <= b.most;
    passed += good;
    failed += !good;
    const char *many = strstr(why, "gemm-");
    if (!good || verbose)
        printf("%-15s %-14s %5dx%-5d %4d rows: nrmse %.2e, %.0f of %.0f outside%s; %.10s\n", f->name, mode_names[mode], (int)n, (int)k, m, sqrt(r[0] / r[1]), r[2], (double)m * (double)n,
               same ? "" : ", BITS DIFFER", many ? many : why);
    be->release_weight(be, p);
    be->release(be, x_room);
    be->release(be, y_room);
    cudaFree(dx);
    cudaFree(sums);
    free(x);
    free(xr);
    for (int i = 0; i < 3; i++) free(y[i]);
}

enum { OTHER_BYTES = 100 << 20 }; /* more than the cache holds */

/* Outputs whose bits are not those of the first run. */
__global__ void count_other_bits(const uint32_t *a, const uint32_t *b, size_t words, unsigned *count)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < words; i += (size_t)gridDim.x * blockDim.x) if (a[i] != b[i]) atomicAdd(count, 1);
}

/* Many runs of one product: a stage of a ring that is written anew before all of it was read, or read before it is there, shows in some of them only, the
   latter where x comes from memory: every second run begins with a cache full of other bytes. Shapes: the largest tiles; tiles that blocks share; few columns,
   where a block's first stages are all that it has; at 300 rows long runs of small tiles. */
static void test_repeat(const form *f, int mode, int rows, uint8_t *other_bytes, const char *kernel)
{
    enum { RUNS = 60 };
    static const int shapes[4][2] = {{4096, 1024}, {1024, 4096}, {1088, 512}, {384, 14336}};
    moq_backend *be = backend_of(mode, kernel);
    check(be->reserve(be, rows, &err) == MOQ_OK, "reserve");
    for (int s = rows == 300 ? 3 : 0; s < (rows == 300 ? 4 : 3); s++) {
        const int64_t n = shapes[s][0], k = shapes[s][1];
        const size_t each = mode >= BF16_WIDE ? 2 : 4, bytes = (size_t)(rows * n) * each;
        moq_linear w;
        room m;
        unsigned *count, other = 0;
        void *first;
        make_layer(&w, f, n, k, &m);
        if (rounded(mode, f)) round_inputs(&w, f);
        float *x = (float *)malloc((size_t)(rows * k) * 4);
        for (int64_t i = 0; i < rows * k; i++) x[i] = random_normal();
        moq_weight *p = be->prepare_linear(be, &w, 1, &err);
        void *dx = be->alloc(be, (size_t)(rows * k) * 4, &err), *dy = be->alloc(be, (size_t)(rows * n) * 4, &err);
        check(p && dx && dy, "prepare_linear, alloc");
        be->upload_act(be, dx, x, (size_t)(rows * k));
        cuda(cudaMalloc(&first, bytes));
        cuda(cudaMalloc(&count, sizeof *count));
        cuda(cudaMemset(count, 0, sizeof *count));
        for (int run = 0; run < RUNS; run++) {
            if (run % 2) cuda(cudaMemset(other_bytes, run, OTHER_BYTES));
            cuda(cudaDeviceSynchronize());
            be->linear(be, p, dx, rows, dy);
            check(be->sync(be, &err) == MOQ_OK, "sync");
            if (run == 0) cuda(cudaMemcpy(first, dy, bytes, cudaMemcpyDeviceToDevice));
            else count_other_bits<<<512, 256>>>((const uint32_t *)first, (const uint32_t *)dy, bytes / 4, count);
            cuda(cudaDeviceSynchronize());
        }
        cuda(cudaMemcpy(&other, count, sizeof other, cudaMemcpyDeviceToHost));
        passed += other == 0;
        failed += other != 0;
        if (other) printf("%-15s %-14s %5dx%-5d %4d rows: BITS DIFFER in %d runs, %u times\n", f->name, mode_names[mode], (int)n, (int)k, rows, (int)RUNS, other);
        be->release_weight(be, p);
        be->release(be, dx);
        be->release(be, dy);
        cudaFree(first);
        cudaFree(count);
        free(x);
        free_layer(&m);
    }
    moq_backend_destroy(be);
}

/* A mixture of experts beside the F32 kernels, which take small tiles: every tile of choices. */
static void test_moe(const form *f, int rows, const char *kernel)
{
    enum { EXPERTS = 12, TOP = 3, COLS = 1088, INNER = 544 };
    static moq_linear l[3 * EXPERTS];
    room m[3 * EXPERTS];
    moq_moe moe;
    float *x = (float *)malloc((size_t)rows * COLS * 4), *logits = (float *)malloc((size_t)rows * EXPERTS * 4), *y[3];
    double error = 0, all = 0;
    int same = 1;
    memset(&moe, 0, sizeof moe);
    for (int i = 0; i < 3 * EXPERTS; i++) make_layer(&l[i], f, i < 2 * EXPERTS ? INNER : COLS, i < 2 * EXPERTS ? COLS : INNER, &m[i]);
    moe.name = "mixture";
    moe.routing.experts = EXPERTS;
    moe.routing.top_k = TOP;
    moe.routing.renormalize = 1;
    moe.gate = l;
    moe.up = l + EXPERTS;
    moe.down = l + 2 * EXPERTS;
    for (int i = 0; i < rows * COLS; i++) x[i] = random_normal() * 0.2f;
    for (int i = 0; i < rows * EXPERTS; i++) logits[i] = random_normal() + (float)(i % EXPERTS) * 0.2f; /* uneven */
    for (int k = 0; k < 3; k++) {
        moq_backend *be = backend_of(AUTO, k == 0 ? "reference" : kernel);
        check(be->reserve(be, rows, &err) == MOQ_OK, "reserve");
        moq_experts *p = be->prepare_moe(be, &moe, &err);
        check(p != NULL, "prepare_moe");
        void *dx = be->alloc(be, (size_t)rows * COLS * 4, &err), *dl = be->alloc(be, (size_t)rows * EXPERTS * 4, &err), *dy = be->alloc(be, (size_t)rows * COLS * 4, &err);
        check(dx && dl && dy, "alloc");
        be->upload_act(be, dx, x, (size_t)rows * COLS);
        be->upload_act(be, dl, logits, (size_t)rows * EXPERTS);
        be->moe(be, p, dx, dl, rows, dy);
        y[k] = (float *)malloc((size_t)rows * COLS * 4);
        be->download_act(be, y[k], dy, (size_t)rows * COLS);
        check(be->sync(be, &err) == MOQ_OK, "sync");
        be->release_moe(be, p);
        moq_backend_destroy(be);
    }
    for (int i = 0; i < rows * COLS; i++) {
        double d = (double)y[0][i] - (double)y[1][i];
        error += d * d;
        all += (double)y[0][i] * (double)y[0][i];
    }
    same = memcmp(y[1], y[2], (size_t)rows * COLS * 4) == 0;
    int good = same && sqrt(error / all) < 8e-3;
    passed += good;
    failed += !good;
    printf("%-15s 3 of 12 experts %4d rows: nrmse %.2e%s\n", f->name, rows, sqrt(error / all), same ? "" : ", BITS DIFFER");
    for (int i = 0; i < 3 * EXPERTS; i++) free_layer(&m[i]);
    for (int k = 0; k < 3; k++) free(y[k]);
    free(x);
    free(logits);
}

static void test_all(const char *only, const char *kernel)
{
    static const int shapes[][2] = {{128, 512}, {137, 1160}, {1000, 768}, {2056, 4096}, {384, 14336}, {16, 1024}, {14296, 768}, {1000, 832}, {264, 2880}};
    static const int rows[] = {17, 33, 64, 100, 129, 192, 300, 513}, repeated[] = {30, 60, 1000, 300};
    uint8_t *other;
    cuda(cudaMalloc(&other, OTHER_BYTES));
    for (int mode = 0; mode < MODES; mode++) {
        moq_backend *be = backend_of(mode, kernel);
        check(be->reserve(be, 520, &err) == MOQ_OK, "reserve");
        for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
            if (only && strcmp(only, forms[i].name)) continue;
            for (int s = 0; s < 9; s++) { /* 14296: more tiles than multiprocessors, and a round that is not full; 832, 2880: x is read in place, and the last stage is not whole */
                moq_linear w;
                room m;
                int64_t n = shapes[s][0], k = shapes[s][1];
                if (forms[i].group > 0) k = k / forms[i].group * forms[i].group;
                make_layer(&w, &forms[i], n, k, &m);
                if (rounded(mode, &forms[i])) round_inputs(&w, &forms[i]);
                float *line = (float *)malloc((size_t)(n * k) * 4), *dw;
                moq_dequantize(&w, 0, n, line);
                cuda(cudaMalloc(&dw, (size_t)(n * k) * 4));
                cuda(cudaMemcpy(dw, line, (size_t)(n * k) * 4, cudaMemcpyHostToDevice));
                for (int r = 0; r < 8; r++) {
                    if (s >= 3 && (r == 0 || r == 2 || r == 4)) continue;
                    test_one(be, mode, &forms[i], &w, dw, rows[r], r == 7 && s == 3);
                }
                free(line);
                cudaFree(dw);
                free_layer(&m);
            }
        }
        moq_backend_destroy(be);
    }
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++)
        for (int mode = 0; mode < MODES; mode++)
            for (int r = 0; r < 4 && (!only || strcmp(only, forms[i].name) == 0); r++) test_repeat(&forms[i], mode, repeated[r], other, kernel);
    cudaFree(other);
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++)
        for (int rows = 40; rows <= 640 && forms[i].group != 128; rows *= 4) if (!only || strcmp(only, forms[i].name) == 0) test_moe(&forms[i], rows, kernel);
    printf("%d passed, %d failed\n", passed, failed);
}

/* ---- times ---- */

enum { TURNS = 7, MOST = 64 };

/* Microseconds of one of the calls of a graph. */
static double time_replay(cudaGraphExec_t g, cudaStream_t stream, int calls)
{
    double t[TURNS];
    float ms;
    cudaEvent_t a, b;
    cuda(cudaEventCreate(&a));
    cuda(cudaEventCreate(&b));
    int repeat = 1;
    for (int i = -2; i < TURNS; i++) {
        cuda(cudaEventRecord(a, stream));
        for (int k = 0; k < repeat; k++) cuda(cudaGraphLaunch(g, stream));
        cuda(cudaEventRecord(b, stream));
        cuda(cudaEventSynchronize(b));
        cuda(cudaEventElapsedTime(&ms, a, b));
        if (i >= 0) t[i] = (double)ms * 1e3 / calls / repeat;
        if (i == -2) repeat = ms > 3 ? 1 : (int)(3 / (double)ms) + 1;
    }
    cudaEventDestroy(a);
    cudaEventDestroy(b);
    return median(t, TURNS);
}

typedef struct bench {
    moq_backend *be;
    moq_weight *p[MOST];
    void *x, *y;
    __nv_bfloat16 *blas_w[MOST];
    int copies, blas_copies;
    int64_t n, k;
    cublasHandle_t blas;
    cudaStream_t stream;
} bench;

static double time_ours(bench *b, int m)
{
    moq_backend *be = b->be;
    double t[TURNS];
    int repeat = 1;
    check(be->capture_begin(be, &err) == MOQ_OK, "capture");
    for (int i = 0; i < b->copies; i++) be->linear(be, b->p[i], b->x, m, b->y);
    moq_graph *g = be->capture_end(be, &err);
    check(g != NULL, "capture");
    for (int i = -2; i < TURNS; i++) {
        check(be->sync(be, &err) == MOQ_OK, "sync");
        double start = moq_seconds();
        for (int k = 0; k < repeat; k++) be->replay(be, g);
        check(be->sync(be, &err) == MOQ_OK, "sync");
        double one = (moq_seconds() - start) * 1e6;
        if (i >= 0) t[i] = one / b->copies / repeat;
        if (i == -2) repeat = one > 3000 ? 1 : (int)(3000 / one) + 1;
    }
    be->release_graph(be, g);
    return median(t, TURNS);
}

static double time_blas(bench *b, int m)
{
    const float one = 1, zero = 0;
    cudaGraph_t graph;
    cudaGraphExec_t run;
    cuda(cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < b->blas_copies; i++)
        if (cublasGemmEx(b->blas, CUBLAS_OP_T, CUBLAS_OP_N, (int)b->n, m, (int)b->k, &one, b->blas_w[i], CUDA_R_16BF, (int)b->k, b->x, CUDA_R_16BF, (int)b->k, &zero, b->y, CUDA_R_16BF,
                         (int)b->n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT)) { fprintf(stderr, "cublas\n"); exit(2); }
    cuda(cudaStreamEndCapture(b->stream, &graph));
    cuda(cudaGraphInstantiate(&run, graph, 0));
    double t = time_replay(run, b->stream, b->blas_copies);
    cudaGraphExecDestroy(run);
    cudaGraphDestroy(graph);
    return t;
}

__global__ void fill_bf16(__nv_bfloat16 *p, size_t n, unsigned seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        unsigned v = (unsigned)i * 2654435761u + seed;
        v ^= v >> 15; v *= 2246822519u; v ^= v >> 13; v *= 3266489917u; v ^= v >> 16;
        p[i] = __float2bfloat16(((float)(v & 0xffffff) / 8388608.0f - 1) * 0.05f);
    }
}

static void bench_all(const char *only, const char *shape_only, int f32, int sweep, const char *kernel, int stored)
{
    static const int shapes[5][2] = {{4096, 4096}, {14336, 4096}, {4096, 14336}, {8192, 8192}, {28672, 8192}}, rows[] = {17, 32, 64, 128, 256, 300, 512, 1024, 2048, 4096};
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++)
        for (int s = 0; s < 5; s++) {
            bench b;
            moq_linear w;
            room m;
            char shape[32];
            moq_cuda_desc d;
            memset(&b, 0, sizeof b);
            memset(&d, 0, sizeof d);
            snprintf(shape, sizeof shape, "%dx%d", shapes[s][0], shapes[s][1]);
            if ((only && *only && strcmp(only, forms[i].name)) || (shape_only && *shape_only && strcmp(shape_only, shape))) continue;
            if (stored && forms[i].input != MOQ_F8_E4M3 && forms[i].input != MOQ_I8) continue;
            b.n = shapes[s][0];
            b.k = shapes[s][1];
            d.kernel = kernel;
            b.be = moq_cuda_backend_full(&d, f32 ? MOQ_F32 : MOQ_BF16, NULL, &err);
            check(b.be != NULL, "backend");
            make_layer(&w, &forms[i], b.n, b.k, &m);
            if (stored) round_inputs(&w, &forms[i]);
            double bytes = (double)(b.n * b.k) * forms[i].bits / 8;
            b.copies = (int)(150e6 / bytes) + 1;
            b.blas_copies = (int)(150e6 / ((double)(b.n * b.k) * 2)) + 1;
            for (int c = 0; c < b.copies; c++) check((b.p[c] = b.be->prepare_linear(b.be, &w, 1, &err)) != NULL, "prepare");
            check(b.be->reserve(b.be, 4096, &err) == MOQ_OK, "reserve");
            cuda(cudaMalloc(&b.x, (size_t)(4096 * b.k) * 4));
            cuda(cudaMalloc(&b.y, (size_t)(4096 * b.n) * 4));
            if (f32) { /* F32 normal numbers from BF16 bits would be odd: upload real ones */
                float *hx = (float *)malloc((size_t)(4096 * b.k) * 4);
                for (int64_t j = 0; j < 4096 * b.k; j++) hx[j] = (float)((int)(next_random() >> 40 & 0xffff) - 32768) * 1e-4f;
                cuda(cudaMemcpy(b.x, hx, (size_t)(4096 * b.k) * 4, cudaMemcpyHostToDevice));
                free(hx);
            } else fill_bf16<<<1024, 256>>>((__nv_bfloat16 *)b.x, (size_t)(4096 * b.k), 7);
            for (int c = 0; c < b.blas_copies; c++) {
                cuda(cudaMalloc(&b.blas_w[c], (size_t)(b.n * b.k) * 2));
                fill_bf16<<<1024, 256>>>(b.blas_w[c], (size_t)(b.n * b.k), (unsigned)c);
            }
            cublasCreate(&b.blas);
            cuda(cudaStreamCreate(&b.stream));
            cublasSetStream(b.blas, b.stream);
            void *workspace;
            cuda(cudaMalloc(&workspace, 64 << 20));
            cublasSetWorkspace(b.blas, workspace, 64 << 20);
            for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
                if (b.n * b.k > (int64_t)2e8 && rows[r] > 1024) continue;
                double ours = time_ours(&b, rows[r]), blas = time_blas(&b, rows[r]), again = time_ours(&b, rows[r]);
                if (again < ours) ours = again;
                printf("%-15s %11s M=%-4d %8.1f us %5.0f TFLOP/s, cuBLAS BF16 %8.1f us %5.0f, ratio %.2f", forms[i].name, shape, rows[r], ours, 2e-6 * (double)b.n * (double)b.k * rows[r] / ours, blas,
                       2e-6 * (double)b.n * (double)b.k * rows[r] / blas, blas / ours);
#ifdef GEMM_INTERNAL
                static const int tokens[] = {64, 128, 160, 192, 256, 304};
                for (int t = 0; sweep && t < 6; t++)
                    for (int split = 1; split <= 6; split++) { /* blocks of a cluster; runs of units in a last round, in two */
                        if (tokens[t] & (tokens[t] - 1) && (stored || forms[i].bits == 8)) continue;
                        if (stored && tokens[t] == 64 && forms[i].elem != MOQ_F8_E4M3) continue;
                        if (stored && split > 4) continue; /* there is no such cut */
                        if ((tokens[t] == 64 && rows[r] > 300) || (tokens[t] > 128 && rows[r] < 128) || (split > 1 && split < 5 && (b.n + 127) / 128 * ((rows[r] + tokens[t] - 1) / tokens[t]) * split > 116)) /* more do not fit */
                            continue;
                        moqc_of(b.be)->gemm_tokens = tokens[t];
                        moqc_of(b.be)->gemm_cut = split;
                        printf("  %d/%d %.1f", tokens[t], split, time_ours(&b, rows[r]));
                        moqc_of(b.be)->gemm_tokens = moqc_of(b.be)->gemm_cut = 0;
                    }
#else
                (void)sweep;
#endif
                printf("\n");
                fflush(stdout);
            }
            moq_backend_destroy(b.be);
            for (int c = 0; c < b.blas_copies; c++) cudaFree(b.blas_w[c]);
            cudaFree(b.x);
            cudaFree(b.y);
            cudaFree(workspace);
            cublasDestroy(b.blas);
            cudaStreamDestroy(b.stream);
            free_layer(&m);
        }
}

int main(int argc, char **argv)
{
    const char *form_only = argc > 2 ? argv[2] : NULL, *shape = argc > 3 ? argv[3] : NULL;
    if (argc > 1 && strcmp(argv[1], "test") == 0) { test_all(form_only && *form_only ? form_only : NULL, shape); return failed > 0; }
    bench_all(form_only, shape, argc > 4 && strcmp(argv[4], "f32") == 0, argc > 5 && strcmp(argv[5], "sweep") == 0, argc > 6 ? argv[6] : NULL, argc > 1 && strcmp(argv[1], "stored") == 0);
    return 0;
}
