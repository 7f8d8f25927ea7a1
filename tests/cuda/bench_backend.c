/* Times of table entries on the GPU: products, mixtures of experts, attention. Everything runs as a recorded graph over copies that are larger
   than the cache together; the median of 7. Bytes: weights or cache, each read once.
       bench_backend [linear|moe|attention [FORMAT [POSITIONS [HEAD SIZE]]]] */
#include "../test.h"

extern moq_backend *moq_cuda_backend_full(const moq_cuda_desc *desc, moq_dtype activations, const moq_allocator *memory, moq_error *err);

static moq_backend *be;
static moq_error err;

static void *taken(size_t bytes)
{
    void *p = be->alloc(be, bytes, &err);
    if (!p) { fprintf(stderr, "%s\n", err.text); exit(2); }
    return p;
}

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Seconds of one of the `calls` that the graph holds. */
static double time_graph(moq_graph *g, int calls)
{
    double t[7];
    int turns = 1;
    if (!g) { fprintf(stderr, "%s\n", err.text); exit(2); }
    be->replay(be, g);
    for (int i = -1; i < 7; i++) {
        be->sync(be, &err);
        double start = moq_seconds();
        for (int k = 0; k < turns; k++) be->replay(be, g);
        if (be->sync(be, &err) != MOQ_OK) { fprintf(stderr, "%s\n", err.text); exit(2); }
        double one = (moq_seconds() - start) / turns;
        if (i >= 0) t[i] = one / calls;
        else turns = one > 0.005 ? 1 : (int)(0.005 / one) + 1;
    }
    qsort(t, 7, sizeof *t, compare_double);
    be->release_graph(be, g);
    return t[3];
}

/* A layer of random bytes: the codes of real layers cost the same. */
static void raw_layer(moq_linear *w, moq_scheme s, int bits, const uint8_t *noise, int64_t rows, int64_t cols)
{
    moq_make_linear(w, "bench", MOQ_BF16, noise, rows, cols);
    w->scheme = s;
    if (bits >= 16) return;
    w->codes.dtype = bits == 8 ? MOQ_F8_E4M3 : MOQ_U8;
    w->codes.count = (uint64_t)(rows * cols * bits / 8);
    w->packing.bits = (uint8_t)bits;
    w->packing.word_bits = 8;
    w->packing.row_stride = cols * bits / 8;
    w->scales.data = noise;
    w->scales.dtype = s.weight.scale;
    w->scales.count = (uint64_t)(rows * cols / 16);
    if (s.weight.group_cols > 0) { w->scale_row_stride = cols / s.weight.group_cols; w->scale_col_stride = 1; }
    w->global_mul = 1e-4f;
}

static const struct { const char *name; int bits; moq_coding weight; double bytes; } schemes[] = {
    {"nvfp4", 4, {MOQ_F4, 1, 16, MOQ_F8_E4M3, 1, 0, 0, 0}, 0.5625},
    {"mxfp4", 4, {MOQ_F4, 1, 32, MOQ_F8_E8M0, 0, 0, 0, 0}, 0.53125},
    {"int4 g128", 4, {MOQ_I4, 1, 128, MOQ_BF16, 0, 0, 0, 0}, 0.515625},
    {"fp8", 8, {MOQ_F8_E4M3, MOQ_ALL, MOQ_ALL, MOQ_F32, 0, 0, 0, 0}, 1},
    {"bf16", 16, {MOQ_BF16, 0, 0, MOQ_NONE, 0, 0, 0, 0}, 2}};

static const uint8_t *noise_of(size_t bytes)
{
    uint8_t *p = (uint8_t *)malloc(bytes);
    for (size_t i = 0; i < bytes; i++) p[i] = (uint8_t)(0x28 + test_random() % 0x20);
    return p;
}

static void bench_linear(const uint8_t *noise)
{
    static const int shapes[5][2] = {{4096, 4096}, {14336, 4096}, {4096, 14336}, {8192, 8192}, {28672, 8192}}, rows[] = {1, 2, 8, 16, 64, 512};
    printf("%-10s %13s", "linear us", "");
    for (size_t m = 0; m < MOQI_COUNT(rows); m++) printf("  M=%-7d", rows[m]);
    printf("\n");
    for (size_t s = 0; s < MOQI_COUNT(schemes); s++)
        for (int k = 0; k < 5; k++) {
            moq_linear w;
            moq_scheme scheme;
            memset(&scheme, 0, sizeof scheme);
            scheme.weight = schemes[s].weight;
            int64_t n = shapes[k][0], c = shapes[k][1];
            int copies = (int)(150e6 / ((double)(n * c) * schemes[s].bytes)) + 1;
            moq_weight *p[64];
            if (copies > 64) copies = 64;
            raw_layer(&w, scheme, schemes[s].bits, noise, n, c);
            for (int i = 0; i < copies; i++) if (!(p[i] = be->prepare_linear(be, &w, 1, &err))) { fprintf(stderr, "%s\n", err.text); exit(2); }
            be->reserve(be, 512, &err);
            void *x = taken((size_t)(512 * c) * 4), *y = taken((size_t)(512 * n) * 4);
            printf("%-10s %6dx%-6d", schemes[s].name, (int)n, (int)c);
            for (size_t m = 0; m < MOQI_COUNT(rows); m++) {
                be->capture_begin(be, &err);
                for (int i = 0; i < copies; i++) be->linear(be, p[i], x, rows[m], y);
                printf("  %-9.1f", 1e6 * time_graph(be->capture_end(be, &err), copies));
                fflush(stdout);
            }
            printf("\n");
            for (int i = 0; i < copies; i++) be->release_weight(be, p[i]);
            be->release(be, x);
            be->release(be, y);
        }
}

static void bench_moe(const uint8_t *noise)
{
    static const struct { const char *name; int experts, top, hidden, inter; } cases[] = {{"8 of 128, 2048x768", 128, 8, 2048, 768}, {"4 of 32, 2880x2880", 32, 4, 2880, 2880}};
    enum { MOST = 2048 };
    static const int rows[] = {1, 2, 4, 8, 16, 32, 64, 256, MOST};
    for (int k = 0; k < 2; k++) {
        enum { COPIES = 3 };
        moq_linear *l = (moq_linear *)calloc(3 * 128, sizeof *l);
        moq_moe m;
        moq_scheme scheme;
        moq_experts *p[COPIES];
        int E = cases[k].experts, h = cases[k].hidden, n = cases[k].inter;
        memset(&scheme, 0, sizeof scheme);
        memset(&m, 0, sizeof m);
        scheme.weight = schemes[0].weight;
        for (int e = 0; e < E; e++) {
            raw_layer(&l[e], scheme, 4, noise, n, h);
            raw_layer(&l[E + e], scheme, 4, noise, n, h);
            raw_layer(&l[2 * E + e], scheme, 4, noise, h, n);
        }
        m.name = "bench";
        m.routing.experts = E;
        m.routing.top_k = cases[k].top;
        m.routing.renormalize = 1;
        m.gate = l;
        m.up = l + E;
        m.down = l + 2 * E;
        for (int i = 0; i < COPIES; i++) if (!(p[i] = be->prepare_moe(be, &m, &err))) { fprintf(stderr, "%s\n", err.text); exit(2); }
        if (be->reserve(be, MOST, &err) < 0) { fprintf(stderr, "%s\n", err.text); exit(2); } /* without: passes of a few rows */
        float *logits = (float *)malloc(sizeof(float) * MOST * 128);
        void *x = taken((size_t)(MOST * h) * 4), *y = taken((size_t)(MOST * h) * 4), *dl[16];
        for (int i = 0; i < 16; i++) { /* other experts every time */
            for (int j = 0; j < MOST * E; j++) logits[j] = test_normal();
            be->upload_act(be, dl[i] = taken((size_t)(MOST * E) * 4), logits, (size_t)(MOST * E));
        }
        float *numbers = (float *)malloc(sizeof(float) * (size_t)(MOST * h));
        for (int i = 0; i < MOST * h; i++) numbers[i] = test_normal();
        be->upload_act(be, x, numbers, (size_t)(MOST * h));
        free(numbers);
        for (size_t r = 0; r < MOQI_COUNT(rows); r++) {
            be->capture_begin(be, &err);
            for (int i = 0; i < 48; i++) be->moe(be, p[i % COPIES], x, dl[i % 16], rows[r], y);
            double t = time_graph(be->capture_end(be, &err), 48), bytes = (double)cases[k].top * 3 * h * n * 0.5625;
            printf("moe nvfp4 %s, %4d rows: %8.1f us", cases[k].name, rows[r], 1e6 * t);
            if (rows[r] == 1) printf(", %.0f GB/s of %.1f MB", 1e-9 * bytes / t, 1e-6 * bytes);
            if (rows[r] >= 256) printf(", %.0f TFLOP/s", 6e-12 * rows[r] * cases[k].top * h * n / t);
            printf("\n");
        }
        for (int i = 0; i < COPIES; i++) be->release_moe(be, p[i]);
        for (int i = 0; i < 16; i++) be->release(be, dl[i]);
        be->release(be, x);
        be->release(be, y);
        free(l);
        free(logits);
    }
}

/* Operations of attention for a head of one value: two for the score of each position that a row sees, two for its value. */
static double work_of(int first, int rows) { return 4.0 * rows * (first + 0.5 * (rows + 1)); }

/* Rows at positions [first, first + rows) of the cache. */
static double time_rows(moq_batch *b, const moq_attention_desc *a, int32_t *pos, int first, int rows)
{
    for (int j = 0; j < rows; j++) pos[j] = first + j;
    b->rows = rows;
    b->max_pos = first + rows - 1;
    be->upload(be, (void *)(uintptr_t)b->pos, pos, sizeof *pos * (size_t)rows);
    be->capture_begin(be, &err);
    for (int i = 0; i < 4; i++) be->attention(be, b, a);
    return time_graph(be->capture_end(be, &err), 4);
}

static void bench_attention(const char *format, int length, int dim) /* "" and 0: all; values of a head */
{
    static const int lengths[] = {1024, 4096, 32768}, formats[] = {MOQ_KV_WIDE, MOQ_KV_FP8, MOQ_KV_INT8, MOQ_KV_NVFP4, MOQ_KV_MXFP4};
    static const double bytes[] = {2, 1, 1, 0.5625, 0.53125};
    for (size_t f = 0; f < MOQI_COUNT(formats); f++)
        for (size_t k = 0; k < MOQI_COUNT(lengths); k++) {
            enum { HEADS = 32, KV = 8, COPIES = 4, MANY = 512, PROMPT = 2048 };
            if ((length && length != lengths[k]) || (*format && strcmp(format, moq_kv_format_name((moq_kv_format)formats[f])) != 0)) continue;
            moq_kv_desc d;
            moq_kv_cache *c[COPIES];
            moq_attention_desc a;
            moq_batch b;
            int32_t slot[PROMPT] = {0}, pos[PROMPT];
            memset(&d, 0, sizeof d);
            memset(&a, 0, sizeof a);
            d.name = "kv";
            d.slots = 1;
            d.capacity = (lengths[k] < PROMPT ? PROMPT : lengths[k]) + MANY;
            d.kv_heads = KV;
            d.head_dim = dim;
            d.kv.format = (moq_kv_format)formats[f];
            double wide = be->act == MOQ_BF16 || f > 0 ? 1 : 2, total = 2.0 * KV * dim * lengths[k] * bytes[f] * wide;
            int copies = total > 60e6 ? 2 : COPIES;
            for (int i = 0; i < copies; i++) if (!(c[i] = be->kv_create(be, &d, &err))) { fprintf(stderr, "%s\n", err.text); exit(2); }
            void *q = taken(PROMPT * HEADS * dim * 4), *y = taken(PROMPT * HEADS * dim * 4);
            float *host = (float *)malloc(sizeof(float) * PROMPT * HEADS * dim);
            for (int i = 0; i < PROMPT * HEADS * dim; i++) host[i] = test_normal();
            be->upload_act(be, q, host, PROMPT * HEADS * dim);
            int32_t *ds = (int32_t *)taken(sizeof slot), *dp = (int32_t *)taken(sizeof pos);
            be->upload(be, ds, slot, sizeof slot);
            b.slot = ds;
            b.pos = dp;
            b.rows = MANY;
            for (int i = 0; i < d.capacity; i += MANY) { /* fill the caches */
                for (int j = 0; j < MANY; j++) pos[j] = i + j;
                b.max_pos = i + MANY - 1;
                be->upload(be, dp, pos, sizeof pos);
                for (int j = 0; j < copies; j++) be->kv_append(be, c[j], &b, q, KV * dim, q, KV * dim);
            }
            a.q = q;
            a.y = y;
            a.q_stride = a.y_stride = HEADS * dim;
            a.heads = HEADS;
            b.rows = 1;
            b.max_pos = pos[0] = lengths[k] - 1;
            be->upload(be, dp, pos, sizeof pos);
            be->capture_begin(be, &err);
            for (int i = 0; i < 16; i++) { a.cache = c[i % copies]; be->attention(be, &b, &a); }
            double one = time_graph(be->capture_end(be, &err), 16);
            a.cache = c[0];
            const double many = time_rows(&b, &a, pos, lengths[k] - MANY, MANY), prompt = time_rows(&b, &a, pos, 0, PROMPT);
            printf("attention %-6s %6d positions: 1 row %8.1f us, %5.0f GB/s; %d rows %8.1f us, %5.1f TFLOP/s; %d rows from 0 %8.1f us, %5.1f TFLOP/s\n",
                   moq_kv_format_name(d.kv.format), lengths[k], 1e6 * one, 1e-9 * total / one, MANY, 1e6 * many,
                   1e-12 * work_of(lengths[k] - MANY, MANY) * HEADS * dim / many, PROMPT, 1e6 * prompt, 1e-12 * work_of(0, PROMPT) * HEADS * dim / prompt);
            for (int i = 0; i < copies; i++) be->kv_release(be, c[i]);
            be->release(be, q);
            be->release(be, y);
            be->release(be, ds);
            be->release(be, dp);
            free(host);
        }
}

int main(int argc, char **argv)
{
    const uint8_t *noise = noise_of((size_t)28672 * 8192 * 2);
    const char *only = argc > 1 ? argv[1] : "";
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int a = 0; a < 2; a++) {
        moq_cuda_desc d;
        memset(&d, 0, sizeof d);
        d.act = MOQ_ACT_WIDE;
        be = moq_cuda_backend_full(&d, a ? MOQ_BF16 : MOQ_F32, NULL, &err);
        if (!be) { fprintf(stderr, "%s\n", err.text); return 2; }
        printf("---- activations %s\n", moq_dtype_name(be->act));
        if (!*only || strstr("attention", only)) bench_attention(argc > 2 ? argv[2] : "", argc > 3 ? atoi(argv[3]) : 0, argc > 4 ? atoi(argv[4]) : 128);
        if (!*only || strstr("moe", only)) bench_moe(noise);
        if (!*only || strstr("linear", only)) bench_linear(noise);
        moq_backend_destroy(be);
    }
    return 0;
}
