/* Linear layers with few rows of x, beside a plain read of the same bytes. Weights rotate through copies larger than the cache, calls are recorded
   as a graph; the median of 9. nrmse: the root of the mean squared error of 64 rows of W against float64, over the root of the mean square.
       bench [form [rows x cols [bf16]]]     e.g. bench nvfp4 4096x4096, bench nvfp4 all bf16; activations: F32, or BF16 */
#include "../../modelopt_q.h"
#include "measure.h"

extern "C" moq_backend *moq_cuda_backend_full(const moq_cuda_desc *desc, moq_dtype activations, const moq_allocator *memory, moq_error *err);
extern "C" double moq_gpu_read_seconds(int device, uint64_t bytes, int copies); /* of tools/moq_cuda.cu */

enum { TURNS = 9, MOST_COPIES = 64, SAMPLES = 64 };

static moq_backend *be;

/* ---- layers ---- */

typedef struct form { const char *name; int bits; moq_dtype elem, scale; int group; } form;
static const form forms[] = {
    {"nvfp4", 4, MOQ_F4, MOQ_F8_E4M3, 16}, {"mxfp4", 4, MOQ_F4, MOQ_F8_E8M0, 32}, {"int4-g128", 4, MOQ_I4, MOQ_BF16, 128}, {"int4-g32", 4, MOQ_I4, MOQ_BF16, 32},
    {"fp8", 8, MOQ_F8_E4M3, MOQ_F32, 0}, {"int8", 8, MOQ_I8, MOQ_F32, 0}, {"bf16", 16, MOQ_BF16, MOQ_NONE, 0}};

/* Random codes of every value (no NaN), scales over a few powers of two with some large and some subnormal ones. */
static void make_layer(moq_linear *w, const form *f, int64_t rows, int64_t cols, uint8_t *codes, uint8_t *scales)
{
    int64_t groups = f->group ? cols / f->group : 1;
    memset(w, 0, sizeof *w);
    moq_make_linear(w, "bench", MOQ_BF16, codes, rows, cols);
    for (int64_t i = 0; i < rows * cols * f->bits / 8; i++) {
        codes[i] = (uint8_t)(next_random() >> 20);
        if (f->elem == MOQ_F8_E4M3 && (codes[i] & 127) == 127) codes[i] ^= 1;
    }
    if (f->bits == 16)
        for (int64_t i = 0; i < rows * cols; i++) ((uint16_t *)(void *)codes)[i] = (uint16_t)((next_random() >> 20 & 0x80ff) | (0x3a00 + (next_random() >> 30 & 0x1ff)));
    if (f->bits == 16) return;
    w->scheme.weight.elem = f->elem;
    w->scheme.weight.scale = f->scale;
    w->scheme.weight.group_rows = f->group ? 1 : MOQ_ALL;
    w->scheme.weight.group_cols = f->group ? f->group : MOQ_ALL;
    w->codes.dtype = f->bits == 4 ? MOQ_U8 : f->elem == MOQ_I8 ? MOQ_I8 : MOQ_F8_E4M3;
    w->codes.count = (uint64_t)(rows * cols * f->bits / 8);
    w->packing.bits = (uint8_t)f->bits;
    w->packing.word_bits = 8;
    w->packing.row_stride = cols * f->bits / 8;
    w->packing.col_stride = 1;
    w->scales.data = scales;
    w->scales.dtype = f->scale;
    w->scales.count = (uint64_t)(f->group ? rows * groups : 1);
    if (f->group) { w->scale_row_stride = groups; w->scale_col_stride = 1; }
    for (int64_t i = 0; i < (int64_t)w->scales.count; i++) {
        uint64_t r = next_random();
        if (f->scale == MOQ_F8_E4M3) scales[i] = (uint8_t)(r % 97 == 0 ? 0 : r % 89 == 0 ? r >> 16 & 7 : r % 83 == 0 ? 0x7e : 24 + (r >> 8) % 48);
        else if (f->scale == MOQ_F8_E8M0) scales[i] = (uint8_t)(r % 97 == 0 ? 131 : 116 + (r >> 8) % 8);
        else if (f->scale == MOQ_BF16) ((uint16_t *)(void *)scales)[i] = (uint16_t)(0x3c00 + (r >> 8) % 0x100);
        else ((float *)(void *)scales)[i] = 0.01f;
    }
}

static double nrmse_of(const moq_linear *w, const float *x, int m, const float *y)
{
    float *line = (float *)malloc((size_t)w->cols * sizeof *line);
    double error = 0, all = 0;
    for (int s = 0; s < SAMPLES; s++) {
        int64_t row = (int64_t)(next_random() % (uint64_t)w->rows);
        moq_dequantize(w, row, 1, line);
        for (int i = 0; i < m; i++) {
            double want = 0;
            for (int64_t c = 0; c < w->cols; c++) want += (double)line[c] * (double)x[i * w->cols + c];
            double d = want - (double)y[i * w->rows + row];
            error += d * d;
            all += want * want;
        }
    }
    free(line);
    return sqrt(error / all);
}

static double time_linear(moq_weight **p, int copies, const void *x, int rows, void *y)
{
    double t[TURNS];
    check(be->capture_begin(be, &err) == MOQ_OK, "capture");
    for (int k = 0; k < 4; k++) for (int i = 0; i < copies; i++) be->linear(be, p[i], x, rows, y);
    moq_graph *g = be->capture_end(be, &err);
    check(g != NULL, "capture");
    for (int i = -2; i < TURNS; i++) {
        check(be->sync(be, &err) == MOQ_OK, "sync");
        double start = moq_seconds();
        for (int k = 0; k < 5; k++) be->replay(be, g);
        check(be->sync(be, &err) == MOQ_OK, "sync");
        if (i >= 0) t[i] = (moq_seconds() - start) * 1e6 / 5 / 4 / copies;
    }
    be->release_graph(be, g);
    return median(t, TURNS);
}

static void bench(moq_dtype act, int argc, char **argv)
{
    static const int shapes[5][2] = {{4096, 4096}, {14336, 4096}, {4096, 14336}, {8192, 8192}, {28672, 8192}}, rows_of_x[] = {1, 2, 8, 16};
    const size_t most = (size_t)28672 * 8192;
    uint8_t *codes = (uint8_t *)malloc(most * 2), *scales = (uint8_t *)malloc(most / 4);
    moq_cuda_desc d;
    memset(&d, 0, sizeof d);
    d.act = MOQ_ACT_WIDE;
    be = moq_cuda_backend_full(&d, act, NULL, &err);
    check(be != NULL, "moq_cuda_backend_full");
    printf("%s activations\n%-10s %11s %6s", moq_dtype_name(act), "form", "rows x cols", "read");
    for (int k = 0; k < 4; k++) printf("   M=%-2d us ratio   nrmse", rows_of_x[k]);
    printf("\n");
    for (size_t f = 0; f < sizeof forms / sizeof *forms; f++)
        for (int s = 0; s < 5; s++) {
            char shape[32];
            int64_t n = shapes[s][0], c = shapes[s][1];
            moq_linear w;
            moq_weight *p[MOST_COPIES];
            snprintf(shape, sizeof shape, "%dx%d", (int)n, (int)c);
            if ((argc > 1 && strcmp(argv[1], forms[f].name)) || (argc > 2 && strcmp(argv[2], "all") && strcmp(argv[2], shape))) continue;
            make_layer(&w, &forms[f], n, c, codes, scales);
            double bytes = (double)(n * c) * forms[f].bits / 8 + (forms[f].group ? (double)(n * c / forms[f].group) * (forms[f].scale == MOQ_BF16 ? 2 : 1) : 0);
            int copies = (int)(250e6 / bytes) + 1;
            float *x = (float *)malloc((size_t)(16 * c) * 4), *y = (float *)malloc((size_t)(16 * n) * 4);
            for (int64_t i = 0; i < 16 * c; i++) {
                x[i] = ((float)(next_random() >> 40) / 8388608.0f - 1) * (next_random() % 512 ? 1.0f : 300.0f);
                if (act == MOQ_BF16) x[i] = moq_bf16_decode(moq_bf16_encode(x[i]));
            }
            for (int i = 0; i < copies; i++) { p[i] = be->prepare_linear(be, &w, 1, &err); check(p[i] != NULL, "prepare_linear"); }
            check(be->reserve(be, 16, &err) == MOQ_OK, "reserve");
            void *dx = be->alloc(be, (size_t)(16 * c) * 4, &err), *dy = be->alloc(be, (size_t)(16 * n) * 4, &err);
            check(dx && dy, "alloc");
            be->upload_act(be, dx, x, (size_t)(16 * c));
            double read = moq_gpu_read_seconds(0, (uint64_t)bytes / 16 * 16, copies) * 1e6;
            if (read == 0) { fprintf(stderr, "the plain read cannot be measured\n"); exit(2); }
            printf("%-10s %11s %6.2f", forms[f].name, shape, read);
            for (int k = 0; k < 4; k++) {
                be->linear(be, p[0], dx, rows_of_x[k], dy);
                be->download_act(be, y, dy, (size_t)(rows_of_x[k] * n));
                check(be->sync(be, &err) == MOQ_OK, "sync");
                double wrong = nrmse_of(&w, x, rows_of_x[k], y), us = time_linear(p, copies, dx, rows_of_x[k], dy);
                printf("   %7.2f %5.2f %7.1e", us, us / read, wrong);
                fflush(stdout);
            }
            printf("\n");
            for (int i = 0; i < copies; i++) be->release_weight(be, p[i]);
            be->release(be, dx);
            be->release(be, dy);
            free(x);
            free(y);
        }
    moq_backend_destroy(be);
    free(codes);
    free(scales);
}

int main(int argc, char **argv)
{
    cudaDeviceProp prop;
    cuda(cudaGetDeviceProperties(&prop, 0));
    printf("%s\n", prop.name);
    bench(argc > 3 && strcmp(argv[3], "bf16") == 0 ? MOQ_BF16 : MOQ_F32, argc, argv);
    return 0;
}
