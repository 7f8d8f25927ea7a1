/* test_layout.c - where a code lies. Every layout is packed here by a writer of its own, element by element, bound, and read back:
   codes, weights, slices of both. The oracle never looks at moq_packing. */
#include "test.h"

enum { CT_STREAM, CT_PADDED, AWQ, GPTQ, INT4_ROWS, INT8_GROUP, FP8_TENSOR, FP8_ROW, FP8_BLOCK, MXFP8_2D, NVFP4_2D, NVFP4_CT, NVFP4_STACK, NVFP4_RESTACK,
       FP8_STACK, MXFP4_2D, MXFP4_STACK, MXFP4_BLOCKS, BF16_STACK, LAYOUTS };

static const char *const layout_names[] = {"ct stream", "ct padded", "awq", "gptq", "int4 rows", "int8 group", "fp8 tensor", "fp8 row", "fp8 block", "mxfp8",
    "nvfp4", "nvfp4 ct", "nvfp4 stack", "nvfp4 restack", "fp8 stack", "mxfp4", "mxfp4 stack", "mxfp4 blocks", "bf16 stack"};

#define MAX_PARTS 8

/* What is true, and the tensors that say so. */
typedef struct sample {
    int layout, bits, rows, cols, group, experts, zeros, order; /* experts: 0 for one layer */
    int32_t *code;   /* [experts, rows, cols] as moq_get_codes must give them */
    float *value;    /* the same, dequantized */
    moq_tensor t[MAX_PARTS];
    int parts;
    moqi_arena arena;
    moqi_map map;
    moqi_tensor_set set;
    moqi_quant q;
    moq_json_doc *config;
} sample;

static uint8_t *add(sample *s, const char *name, moq_dtype dtype, int rank, int a, int b, int c)
{
    moq_tensor *t = &s->t[s->parts++];
    uint64_t n = 1;
    int dims[3] = {a, b, c};
    memset(t, 0, sizeof *t);
    t->name = name;
    t->name_bytes = (uint32_t)strlen(name);
    t->dtype = dtype;
    t->rank = (uint32_t)rank;
    for (int i = 0; i < rank; i++) { t->shape[i] = (uint64_t)dims[i]; n *= t->shape[i]; }
    t->bytes = n * (uint64_t)moq_dtype_bits(dtype) / 8;
    uint8_t *p = (uint8_t *)calloc(1, t->bytes ? t->bytes : 1); /* exact: a sanitizer sees a read too far */
    t->data = p;
    return p;
}

static void reshape(sample *s, int a, int b, int c, int d)
{
    moq_tensor *t = &s->t[s->parts - 1];
    t->rank = 4;
    t->shape[0] = (uint64_t)a; t->shape[1] = (uint64_t)b; t->shape[2] = (uint64_t)c; t->shape[3] = (uint64_t)d;
}

/* ---- formats, once more and slowly ---- */

static double slow_float(int code, int exponent_bits, int mantissa_bits, int bias)
{
    int m = code & ((1 << mantissa_bits) - 1), e = code >> mantissa_bits & ((1 << exponent_bits) - 1), sign = code >> (mantissa_bits + exponent_bits) & 1;
    double v = e ? ldexp((1 << mantissa_bits) + m, e - bias - mantissa_bits) : ldexp(m, 1 - bias - mantissa_bits);
    return sign ? -v : v;
}

static double e2m1(int code) { return slow_float(code, 2, 1, 1); }
static double e4m3(int code) { return slow_float(code, 4, 3, 7); }

static void put_bits(uint8_t *p, uint64_t bit, int bits, int32_t code) /* little-endian bit stream */
{
    for (int i = 0; i < bits; i++)
        if (code >> i & 1) p[(bit + (uint64_t)i) / 8] |= (uint8_t)(1 << ((bit + (uint64_t)i) % 8));
}

static float random_scale(void) { return 0.001f + (float)(test_random() % 10000) * 1.2345e-5f; }
static int random_e4m3(void) { return (int)(test_random() % 126) + 1; }         /* positive, no NaN */
static int random_code8(void) { int c = (int)(test_random() & 255); return (c & 127) == 127 ? 0x80 : c; }
static void put_f32(uint8_t *p, int64_t i, float v) { memcpy(p + 4 * i, &v, 4); }

static float put_f16(uint8_t *p, int64_t i)
{
    uint16_t v = (uint16_t)(0x1000 + test_random() % 0x2000);
    memcpy(p + 2 * i, &v, 2);
    return (float)slow_float(v, 5, 10, 15);
}

static float put_bf16(uint8_t *p, int64_t i)
{
    uint16_t v = (uint16_t)(0x3a00 + test_random() % 0x400);
    memcpy(p + 2 * i, &v, 2);
    return (float)slow_float(v, 8, 7, 127);
}

static void truth(sample *s, int e, int r, int c, int32_t code, double value)
{
    int64_t at = ((int64_t)e * s->rows + r) * s->cols + c;
    s->code[at] = code;
    s->value[at] = (float)value;
}

/* ---- one writer for each layout ---- */

static void write_ct(sample *s)
{
    int b = s->bits, padded = s->layout == CT_PADDED, per = 32 / b, half = 1 << (b - 1), g = s->cols / s->group;
    int words = padded ? (s->cols + per - 1) / per : (s->cols * b + 31) / 32, zwords = padded ? (s->rows + per - 1) / per : (s->rows * b + 31) / 32;
    uint8_t *code = add(s, "m.weight_packed", MOQ_I32, 2, s->rows, words, 0), *scale = add(s, "m.weight_scale", MOQ_BF16, 2, s->rows, g, 0);
    uint8_t *shape = add(s, "m.weight_shape", MOQ_I64, 1, 2, 0, 0), *zero = s->zeros ? add(s, "m.weight_zero_point", MOQ_I32, 2, zwords, g, 0) : NULL;
    uint8_t *order = s->order ? add(s, "m.weight_g_idx", MOQ_I32, 1, s->cols, 0, 0) : NULL;
    int64_t dims[2] = {s->rows, s->cols};
    int *group = (int *)malloc(sizeof(int) * (size_t)s->cols);
    memcpy(shape, dims, sizeof dims);
    for (int c = 0; c < s->cols; c++) {
        int32_t v = s->order ? (int32_t)(test_random() % (uint32_t)g) : c / s->group;
        if (order) memcpy(order + 4 * c, &v, 4);
        group[c] = v;
    }
    for (int r = 0; r < s->rows; r++) {
        float sc[64];
        int z[64];
        for (int k = 0; k < g; k++) {
            sc[k] = put_bf16(scale, (int64_t)r * g + k);
            z[k] = zero ? (int)(test_random() % (1u << b)) : half;
            if (!zero) continue; /* packed down the rows: one bit stream for each group, a word every g words */
            for (int i = 0; i < b; i++) {
                int64_t n = padded ? (int64_t)(r / per) * 32 + r % per * b + i : (int64_t)r * b + i;
                if (z[k] >> i & 1) put_bits(zero, (uint64_t)((n / 32 * g + k) * 32 + n % 32), 1, 1);
            }
        }
        for (int c = 0; c < s->cols; c++) {
            int32_t u = (int32_t)(test_random() & ((1u << b) - 1));
            put_bits(code, (uint64_t)r * (uint64_t)words * 32 + (uint64_t)(padded ? c / per * 32 + c % per * b : c * b), b, u);
            truth(s, 0, r, c, u, (double)(u - z[group[c]]) * (double)sc[group[c]]);
        }
    }
    free(group);
}

static void write_awq(sample *s)
{
    static const int order[8] = {0, 2, 4, 6, 1, 3, 5, 7}; /* nibble i of a word holds this row */
    int g = s->cols / s->group;
    uint8_t *code = add(s, "m.qweight", MOQ_I32, 2, s->cols, s->rows / 8, 0), *zero = add(s, "m.qzeros", MOQ_I32, 2, g, s->rows / 8, 0);
    uint8_t *scale = add(s, "m.scales", MOQ_F16, 2, g, s->rows, 0);
    int *z = (int *)malloc(sizeof(int) * (size_t)(g * s->rows));
    float *sc = (float *)malloc(sizeof(float) * (size_t)(g * s->rows));
    for (int k = 0; k < g; k++)
        for (int w = 0; w < s->rows / 8; w++)
            for (int i = 0; i < 8; i++) {
                int r = 8 * w + order[i];
                z[k * s->rows + r] = (int)(test_random() & 15);
                put_bits(zero, (uint64_t)(((int64_t)k * (s->rows / 8) + w) * 32 + 4 * i), 4, z[k * s->rows + r]);
                sc[k * s->rows + r] = put_f16(scale, (int64_t)k * s->rows + r);
            }
    for (int c = 0; c < s->cols; c++)
        for (int w = 0; w < s->rows / 8; w++)
            for (int i = 0; i < 8; i++) {
                int r = 8 * w + order[i], k = c / s->group * s->rows + r, u = (int)(test_random() & 15);
                put_bits(code, (uint64_t)(((int64_t)c * (s->rows / 8) + w) * 32 + 4 * i), 4, u);
                truth(s, 0, r, c, u, (double)(u - z[k]) * (double)sc[k]);
            }
    free(z);
    free(sc);
}

static void write_gptq(sample *s)
{
    int b = s->bits, g = s->cols / s->group, zwords = s->rows * b / 32;
    uint8_t *code = add(s, "m.qweight", MOQ_I32, 2, s->cols * b / 32, s->rows, 0), *zero = add(s, "m.qzeros", MOQ_I32, 2, g, zwords, 0);
    uint8_t *scale = add(s, "m.scales", MOQ_F16, 2, g, s->rows, 0), *index = add(s, "m.g_idx", MOQ_I32, 1, s->cols, 0, 0);
    int *z = (int *)malloc(sizeof(int) * (size_t)(g * s->rows)), *group = (int *)malloc(sizeof(int) * (size_t)s->cols);
    float *sc = (float *)malloc(sizeof(float) * (size_t)(g * s->rows));
    for (int c = 0; c < s->cols; c++) {
        int32_t v = s->order ? (int32_t)(test_random() % (uint32_t)g) : c / s->group;
        memcpy(index + 4 * c, &v, 4);
        group[c] = v;
    }
    for (int k = 0; k < g; k++)
        for (int r = 0; r < s->rows; r++) {
            int stored = (int)(test_random() % (1u << b));
            put_bits(zero, (uint64_t)k * (uint64_t)zwords * 32 + (uint64_t)(r * b), b, stored);
            z[k * s->rows + r] = stored + 1;
            sc[k * s->rows + r] = put_f16(scale, (int64_t)k * s->rows + r);
        }
    for (int r = 0; r < s->rows; r++)
        for (int c = 0; c < s->cols; c++) {
            int u = (int)(test_random() % (1u << b)), k = group[c] * s->rows + r;
            for (int i = 0; i < b; i++) /* bit n of the column's stream is bit n % 32 of word n / 32, `rows` words apart */
                if (u >> i & 1) put_bits(code, (uint64_t)(((int64_t)((c * b + i) / 32) * s->rows + r) * 32 + (c * b + i) % 32), 1, 1);
            truth(s, 0, r, c, u, (double)(u - z[k]) * (double)sc[k]);
        }
    free(z);
    free(sc);
    free(group);
}

static void write_int(sample *s)
{
    int rowwise = s->layout == INT4_ROWS, g = s->cols / s->group;
    uint8_t *code = rowwise ? add(s, "m.weight", MOQ_U8, 2, s->rows / 2, s->cols, 0) : add(s, "m.weight", MOQ_I8, 2, s->rows, s->cols, 0);
    uint8_t *scale = add(s, "m.weight_scale", MOQ_F32, 2, s->rows, g, 0), *zero = rowwise ? NULL : add(s, "m.weight_zero_point", MOQ_I8, 2, s->rows, g, 0);
    for (int r = 0; r < s->rows; r++)
        for (int c = 0; c < s->cols; c++) {
            int64_t k = (int64_t)r * g + c / s->group;
            float sc;
            if (c % s->group == 0) {
                put_f32(scale, k, random_scale());
                if (zero) zero[k] = (uint8_t)test_random();
            }
            memcpy(&sc, scale + 4 * k, 4);
            int q = rowwise ? (int)(test_random() & 15) - 8 : (int)(test_random() & 255) - 128;
            if (rowwise) code[(int64_t)(r / 2) * s->cols + c] |= (uint8_t)((q & 15) << (r & 1 ? 4 : 0));
            else code[(int64_t)r * s->cols + c] = (uint8_t)q;
            truth(s, 0, r, c, q, (double)(q - (zero ? (int8_t)zero[k] : 0)) * (double)sc);
        }
}

static void write_fp8(sample *s)
{
    int stack = s->layout == FP8_STACK, n = stack ? s->experts : 1, br = 128, bc = 128, x = 1, y = 1;
    uint8_t *scale, *code = stack ? add(s, "m.experts.up_proj", MOQ_F8_E4M3, 3, n, s->cols, s->rows) : add(s, "m.weight", MOQ_F8_E4M3, 2, s->rows, s->cols, 0);
    switch (s->layout) {
    case FP8_TENSOR: br = s->rows; bc = s->cols; scale = add(s, "m.weight_scale", MOQ_F32, 0, 0, 0, 0); break;
    case FP8_ROW: br = 1; bc = s->cols; x = s->rows; scale = add(s, "m.weight_scale", MOQ_F32, 1, x, 0, 0); break;
    case MXFP8_2D: br = 1; bc = 32; x = s->rows; y = s->cols / 32; scale = add(s, "m.weight_scale", MOQ_U8, 2, x, y, 0); break;
    case FP8_BLOCK: x = (s->rows + 127) / 128; y = (s->cols + 127) / 128; scale = add(s, "m.weight_scale", MOQ_F32, 2, x, y, 0); reshape(s, x, 1, y, 1); break;
    default: br = s->rows; bc = s->cols; scale = add(s, "m.experts.up_proj_weight_scale", MOQ_F32, 1, n, 0, 0); break;
    }
    for (int i = 0; i < n * x * y; i++) {
        if (s->layout == MXFP8_2D) scale[i] = (uint8_t)(test_random() % 40 + (i % 9 ? 100 : 0));
        else put_f32(scale, i, random_scale());
    }
    for (int e = 0; e < n; e++)
        for (int r = 0; r < s->rows; r++)
            for (int c = 0; c < s->cols; c++) {
                int u = random_code8(), k = stack ? e : r / br * y + c / bc;
                float sc = 0;
                if (s->layout != MXFP8_2D) memcpy(&sc, scale + 4 * k, 4);
                code[stack ? ((int64_t)e * s->cols + c) * s->rows + r : (int64_t)r * s->cols + c] = (uint8_t)u;
                truth(s, e, r, c, u, e4m3(u) * (s->layout == MXFP8_2D ? ldexp(1, scale[k] - 127) : (double)sc));
            }
}

static void write_nvfp4(sample *s)
{
    int n = s->experts ? s->experts : 1, half = s->cols / 2, g = s->cols / s->group, t = s->layout == NVFP4_STACK, ct = s->layout == NVFP4_CT;
    uint8_t *code, *scale, *global;
    if (t) {
        code = add(s, "m.experts.up_proj", MOQ_U8, 3, n, half, s->rows);
        scale = add(s, "m.experts.up_proj_weight_scale", MOQ_F8_E4M3, 3, n, g, s->rows);
        global = add(s, "m.experts.up_proj_weight_scale_2", MOQ_F32, 0, 0, 0, 0);
    } else if (s->layout == NVFP4_RESTACK) {
        code = add(s, "m.weight", MOQ_U8, 3, n, s->rows, half);
        scale = add(s, "m.weight_scale", MOQ_F8_E4M3, 3, n, s->rows, g);
        global = add(s, "m.weight_scale_2", MOQ_F32, 1, n, 0, 0);
        for (int e = 0; e < n; e++) put_f32(global, e, random_scale());
    } else {
        code = add(s, ct ? "m.weight_packed" : "m.weight", MOQ_U8, 2, s->rows, half, 0);
        scale = add(s, "m.weight_scale", MOQ_F8_E4M3, 2, s->rows, g, 0);
        global = add(s, ct ? "m.weight_global_scale" : "m.weight_scale_2", MOQ_F32, ct, 1, 0, 0);
    }
    if (s->layout != NVFP4_RESTACK) put_f32(global, 0, ct ? 1234.5f : random_scale());
    for (int e = 0; e < n; e++)
        for (int r = 0; r < s->rows; r++)
            for (int c = 0; c < s->cols; c++) {
                int64_t byte = t ? ((int64_t)e * half + c / 2) * s->rows + r : ((int64_t)e * s->rows + r) * half + c / 2;
                int64_t k = t ? ((int64_t)e * g + c / s->group) * s->rows + r : ((int64_t)e * s->rows + r) * g + c / s->group;
                int u = (int)(test_random() & 15);
                float gl;
                if (c % s->group == 0) scale[k] = (uint8_t)random_e4m3();
                memcpy(&gl, global + (s->layout == NVFP4_RESTACK ? 4 * e : 0), 4);
                code[byte] |= (uint8_t)(u << (c & 1 ? 4 : 0));
                truth(s, e, r, c, u, ct ? e2m1(u) * e4m3(scale[k]) / (double)gl : e2m1(u) * e4m3(scale[k]) * (double)gl);
            }
}

static void write_mxfp4(sample *s)
{
    int n = s->experts ? s->experts : 1, stack = s->layout == MXFP4_STACK, blocks = s->layout == MXFP4_BLOCKS;
    int lines = stack ? s->cols : s->rows, wide = stack ? s->rows : s->cols; /* stored [lines, wide] */
    uint8_t *code, *scale;
    if (stack || blocks) {
        code = add(s, stack ? "m.experts.up_proj" : "m.experts.up_proj_blocks", MOQ_U8, 3, n, lines, wide / 2);
        if (blocks) reshape(s, n, lines, wide / 32, 16);
        scale = add(s, stack ? "m.experts.up_proj_weight_scale" : "m.experts.up_proj_scales", MOQ_U8, 3, n, lines, wide / 32);
    } else {
        code = add(s, "m.weight", MOQ_U8, 2, lines, wide / 2, 0);
        scale = add(s, "m.weight_scale", MOQ_U8, 2, lines, wide / 32, 0);
    }
    for (int e = 0; e < n; e++)
        for (int i = 0; i < lines; i++)
            for (int j = 0; j < wide; j++) {
                int64_t line = (int64_t)e * lines + i, k = line * (wide / 32) + j / 32;
                int u = (int)(test_random() & 15);
                if (j % 32 == 0) scale[k] = (uint8_t)(test_random() % 3 ? 110 + test_random() % 30 : test_random() % 255);
                code[line * (wide / 2) + j / 2] |= (uint8_t)(u << (j & 1 ? 4 : 0));
                truth(s, e, stack ? j : i, stack ? i : j, u, e2m1(u) * ldexp(1, scale[k] - 127));
            }
}

static void write_bf16_stack(sample *s)
{
    uint8_t *code = add(s, "m.experts.up_proj", MOQ_BF16, 3, s->experts, s->cols, s->rows);
    for (int e = 0; e < s->experts; e++)
        for (int c = 0; c < s->cols; c++)
            for (int r = 0; r < s->rows; r++) truth(s, e, r, c, 0, (double)put_bf16(code, ((int64_t)e * s->cols + c) * s->rows + r));
}

/* ---- making, binding ---- */

static int by_name(const void *a, const void *b) { return strcmp(((const moq_tensor *)a)->name, ((const moq_tensor *)b)->name); }

static int make(sample *s, int layout, int bits, int rows, int cols, int group, int experts, int flags, moq_linear *w)
{
    char config[500];
    moq_error err;
    moqi_module *m = NULL;
    size_t count = 0, n;
    memset(s, 0, sizeof *s);
    s->layout = layout; s->bits = bits; s->rows = rows; s->cols = cols; s->group = group; s->experts = experts;
    s->zeros = flags & 1; s->order = flags >> 1 & 1;
    n = (size_t)(experts ? experts : 1) * (size_t)rows * (size_t)cols;
    s->code = (int32_t *)calloc(n, sizeof *s->code);
    s->value = (float *)calloc(n, sizeof *s->value);
    switch (layout) {
    case CT_STREAM: case CT_PADDED: write_ct(s); break;
    case AWQ: write_awq(s); break;
    case GPTQ: write_gptq(s); break;
    case INT4_ROWS: case INT8_GROUP: write_int(s); break;
    case FP8_TENSOR: case FP8_ROW: case FP8_BLOCK: case MXFP8_2D: case FP8_STACK: write_fp8(s); break;
    case MXFP4_2D: case MXFP4_STACK: case MXFP4_BLOCKS: write_mxfp4(s); break;
    case BF16_STACK: write_bf16_stack(s); break;
    default: write_nvfp4(s); break;
    }
    s->arena = moqi_arena_make(NULL);
    qsort(s->t, (size_t)s->parts, sizeof s->t[0], by_name);
    moqi_map_make(&s->map, &s->arena, MAX_PARTS);
    for (int i = 0; i < s->parts; i++) moqi_map_add(&s->map, s->t[i].name, s->t[i].name_bytes, (uint32_t)i);
    s->set.list = s->t;
    s->set.count = (size_t)s->parts;
    s->set.map = &s->map;
    snprintf(config, sizeof config, "{\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"group_0\":"
             "{\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":%d,\"type\":\"int\",\"strategy\":\"group\",\"group_size\":%d,\"symmetric\":%s}}},\"ignore\":[],"
             "\"version\":\"%s\"}}", bits, group, s->zeros ? "false" : "true", layout == CT_PADDED ? "0.9.0" : "0.20.0");
    if (layout > CT_PADDED) snprintf(config, sizeof config, "{}");
    s->config = moq_json_parse(config, strlen(config), MOQ_JSON_CONFIG, 0, "config.json", NULL, &err);
    if (moqi_quant_parse(&s->q, moq_json_root(s->config), NULL, NULL, &s->arena, NULL, &err) < 0 ||
        moqi_collect_modules(&s->set, &s->q, &s->arena, &m, &count, NULL, &err) < 0 || count != 1 || moqi_bind_linear(&s->set, &s->q, m, w, &err) < 0) {
        fprintf(stderr, "%s: %d modules, %s\n", layout_names[layout], (int)count, err.text);
        return 0;
    }
    return w->rows == rows && w->cols == cols && w->experts == experts;
}

static void drop(sample *s)
{
    for (int i = 0; i < s->parts; i++) free((void *)(size_t)s->t[i].data);
    free(s->code);
    free(s->value);
    moqi_arena_drop(&s->arena);
    moq_json_destroy(s->config);
}

/* ---- comparing ---- */

/* Is w the part of expert e that starts at (r0, c0), every `step` rows? Codes in odd pieces, weights whole. */
static int same(const sample *s, const moq_linear *w, int e, int64_t r0, int64_t step, int64_t c0)
{
    int16_t code[700];
    float *x = (float *)malloc(sizeof(float) * (size_t)(w->rows * w->cols));
    int ok = 1;
    moq_dequantize(w, 0, w->rows, x);
    for (int64_t r = 0; r < w->rows && ok; r++) {
        int64_t at = ((int64_t)e * s->rows + r0 + r * step) * s->cols + c0;
        if (memcmp(x + r * w->cols, s->value + at, sizeof(float) * (size_t)w->cols) != 0) ok = 0;
        for (int64_t c = 0, n; c < w->cols && s->layout != BF16_STACK; c += n) {
            n = 1 + (int64_t)(test_random() % 37);
            if (n > w->cols - c) n = w->cols - c;
            moq_get_codes(w, r, c, n, code);
            for (int64_t i = 0; i < n; i++) ok = ok && code[i] == s->code[at + c + i];
        }
        for (int64_t c = 0; c < w->cols && ok && s->layout != BF16_STACK; c += 7) { /* the parts give the product too */
            int64_t g = moqi_group_of(w, c);
            moq_linear v = *w;
            double values[256];
            moqi_code_values(&v, values);
            double p = (values[(uint8_t)s->code[at + c]] - moqi_zero_at(w, r, g)) * moqi_scale_at(w, r, g) * (double)w->global_mul / (double)w->global_div;
            if ((float)p != s->value[at + c]) ok = 0;
        }
    }
    free(x);
    return ok;
}

static void check_slices(const sample *s, const moq_linear *w, int e)
{
    const char *why;
    int64_t unit = moqi_col_unit(w, &why), units = moqi_ceil_div(w->cols, unit);
    moq_error err;
    for (int i = 0; i < 12; i++) {
        moq_linear a;
        int64_t r0 = (int64_t)(test_random() % (uint32_t)w->rows), step = 1 + (int64_t)(test_random() % 3), most = (w->rows - 1 - r0) / step + 1;
        int64_t n = 1 + (int64_t)(test_random() % (uint32_t)most), c0 = (int64_t)(test_random() % (uint32_t)units) * unit;
        int64_t cols = (1 + (int64_t)(test_random() % (uint32_t)(units - c0 / unit))) * unit;
        if (c0 + cols > w->cols) cols = w->cols - c0;
        if (i & 1) { /* columns first, in two steps */
            CHECK_INT(moq_slice_cols(w, c0, w->cols - c0, &a, &err), MOQ_OK);
            CHECK_INT(moq_slice_cols(&a, 0, cols, &a, &err), MOQ_OK);
            CHECK_INT(moq_slice_rows(&a, r0, n, step, &a, &err), MOQ_OK);
        } else { /* rows of rows */
            CHECK_INT(moq_slice_rows(w, r0, most, step, &a, &err), MOQ_OK);
            CHECK_INT(moq_slice_rows(&a, 0, n, 1, &a, &err), MOQ_OK);
            CHECK_INT(moq_slice_cols(&a, c0, cols, &a, &err), MOQ_OK);
        }
        if (!same(s, &a, e, r0, step, c0)) { fprintf(stderr, "%s %d bits: slice %d+%d*%d, %d\n", layout_names[s->layout], s->bits, (int)r0, (int)n, (int)step, (int)c0); CHECK(0); }
    }
    if (unit > 1 && w->cols > unit) {
        moq_linear a = *w;
        CHECK_INT(moq_slice_cols(w, 1, unit, &a, &err), MOQ_E_SHAPE);
        CHECK_INT(moq_slice_cols(w, 0, unit - 1, &a, &err), MOQ_E_SHAPE);
        CHECK(strstr(err.text, "expected multiples of") != NULL && memcmp(&a, w, sizeof a) == 0);
    }
}

static void check_layout(int layout, int bits, int rows, int cols, int group, int experts, int flags)
{
    sample s;
    moq_linear w, one;
    moq_error err;
    if (!make(&s, layout, bits, rows, cols, group, experts, flags, &w)) {
        fprintf(stderr, "%s, %d bits, [%d, %d]: not bound\n", layout_names[layout], bits, rows, cols);
        CHECK(0);
        drop(&s);
        return;
    }
    CHECK((w.zeros.data != NULL) == (layout == AWQ || layout == GPTQ || layout == INT8_GROUP || s.zeros));
    CHECK((w.group_index.data != NULL) == s.order && w.scheme.act_order == s.order);
    if (experts) { /* all at once, and expert by expert */
        int64_t n = (int64_t)experts * rows * cols;
        float *x = (float *)malloc(sizeof(float) * (size_t)n);
        moq_dequantize(&w, 0, (int64_t)experts * rows, x);
        CHECK(memcmp(x, s.value, sizeof(float) * (size_t)n) == 0);
        moq_dequantize(&w, rows - 1, 2, x);
        CHECK(memcmp(x, s.value + (int64_t)(rows - 1) * cols, sizeof(float) * 2 * (size_t)cols) == 0);
        free(x);
        CHECK_INT(moq_slice_expert(&w, experts, &one, &err), MOQ_E_ARG);
        CHECK_INT(moq_slice_expert(&w, -1, &one, &err), MOQ_E_ARG);
    }
    for (int e = 0; e < (experts ? experts : 1); e++) {
        one = w;
        if (experts) CHECK_INT(moq_slice_expert(&w, e, &one, &err), MOQ_OK);
        if (!same(&s, &one, e, 0, 1, 0)) { fprintf(stderr, "%s, %d bits, [%d, %d], expert %d differs\n", layout_names[layout], bits, rows, cols, e); CHECK(0); }
        check_slices(&s, &one, e);
    }
    drop(&s);
}

static void test_layout_compressed_tensors(void)
{
    for (int bits = 2; bits <= 8; bits++)
        for (int flags = 0; flags < 4; flags++) {
            check_layout(CT_STREAM, bits, 37, 96, 32, 0, flags);
            check_layout(CT_STREAM, bits, 5, 176, 16, 0, flags);
            if (32 % bits) check_layout(CT_PADDED, bits, 37, 128, 32, 0, flags);
            if (32 % bits) check_layout(CT_PADDED, bits, 3, 256, 64, 0, flags);
        }
}

static void test_layout_awq_gptq(void)
{
    static const int bits[] = {2, 3, 4, 8};
    check_layout(AWQ, 4, 40, 96, 32, 0, 0);
    check_layout(AWQ, 4, 8, 640, 128, 0, 0);
    for (int i = 0; i < 4; i++)
        for (int order = 0; order < 2; order++) {
            check_layout(GPTQ, bits[i], 64, 96, 32, 0, order * 2);
            check_layout(GPTQ, bits[i], 96, 192, 64, 0, order * 2);
        }
}

static void test_layout_integers(void)
{
    check_layout(INT4_ROWS, 4, 38, 256, 128, 0, 0);
    check_layout(INT4_ROWS, 4, 2, 96, 32, 0, 0);
    check_layout(INT8_GROUP, 8, 33, 192, 64, 0, 0);
}

static void test_layout_floats(void)
{
    check_layout(FP8_TENSOR, 8, 33, 71, 1, 0, 0);
    check_layout(FP8_ROW, 8, 33, 71, 1, 0, 0);
    check_layout(FP8_BLOCK, 8, 130, 257, 1, 0, 0);
    check_layout(FP8_BLOCK, 8, 300, 40, 1, 0, 0);
    check_layout(MXFP8_2D, 8, 7, 96, 32, 0, 0);
    check_layout(NVFP4_2D, 4, 37, 176, 16, 0, 0);
    check_layout(NVFP4_2D, 4, 5, 1056, 32, 0, 0);
    check_layout(NVFP4_CT, 4, 37, 176, 16, 0, 0);
    check_layout(MXFP4_2D, 4, 37, 160, 32, 0, 0);
}

static void test_layout_stacks(void)
{
    check_layout(NVFP4_STACK, 4, 37, 80, 16, 3, 0);
    check_layout(NVFP4_RESTACK, 4, 37, 80, 16, 3, 0);
    check_layout(FP8_STACK, 8, 33, 21, 1, 3, 0);
    check_layout(MXFP4_STACK, 4, 96, 37, 32, 3, 0);
    check_layout(MXFP4_BLOCKS, 4, 37, 96, 32, 3, 0);
    check_layout(BF16_STACK, 16, 37, 21, 1, 3, 0);
}

/* ---- the rest ---- */

static void test_layout_plain(void)
{
    float x[35], y[35];
    uint16_t h[35];
    moq_linear w, a;
    moq_error err;
    for (int i = 0; i < 35; i++) { x[i] = test_normal(); h[i] = moq_f16_encode(x[i]); }
    x[3] = -0.0f;
    moq_make_linear(&w, "mine", MOQ_F32, x, 5, 7);
    moq_dequantize(&w, 0, 5, y);
    CHECK(memcmp(x, y, sizeof x) == 0 && strcmp(w.name, "mine") == 0 && !moq_scheme_is_quantized(&w.scheme));
    CHECK_INT(moq_slice_rows(&w, 1, 2, 2, &a, &err), MOQ_OK);
    CHECK_INT(moq_slice_cols(&a, 3, 2, &a, &err), MOQ_OK);
    moq_dequantize(&a, 0, 2, y);
    CHECK(y[0] == x[10] && y[1] == x[11] && y[2] == x[24] && y[3] == x[25]);
    moq_make_linear(&w, "half", MOQ_F16, h, 5, 7);
    moq_dequantize(&w, 2, 1, y);
    for (int i = 0; i < 7; i++) CHECK(y[i] == moq_f16_decode(h[14 + i]));
}

static void test_layout_bad_slices(void)
{
    float x[35];
    moq_linear w, a;
    moq_error err;
    memset(x, 0, sizeof x);
    moq_make_linear(&w, "m", MOQ_F32, x, 5, 7);
    a = w;
    static const int64_t rows[][3] = {{-1, 1, 1}, {0, 0, 1}, {0, 6, 1}, {5, 1, 1}, {4, 2, 1}, {0, 3, 3}, {0, 1, 0}, {0, 1, -1}, {1, INT64_MAX, 1}, {0, 2, INT64_MAX}};
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) {
        CHECK_INT(moq_slice_rows(&w, rows[i][0], rows[i][1], rows[i][2], &a, &err), MOQ_E_ARG);
        CHECK(err.code == MOQ_E_ARG && strstr(err.text, "'m'") && memcmp(&a, &w, sizeof a) == 0);
    }
    static const int64_t cols[][2] = {{-1, 1}, {0, 0}, {0, 8}, {7, 1}, {1, INT64_MAX}, {8, -1}};
    for (size_t i = 0; i < MOQI_COUNT(cols); i++) CHECK_INT(moq_slice_cols(&w, cols[i][0], cols[i][1], &a, &err), MOQ_E_ARG);
    CHECK_INT(moq_slice_rows(&w, 0, 2, 4, &a, &err), MOQ_OK);
    CHECK_INT(moq_slice_expert(&w, 0, &a, &err), MOQ_E_ARG);
    CHECK_INT(moq_slice_rows(&w, 0, 6, 1, &a, NULL), MOQ_E_ARG);
}

/* Values from an independent computation, and the tiling as the permutation that it is documented to be. */
static void test_layout_swizzle(void)
{
    static const int rows[][3] = {{0, 0, 0}, {0, 1, 1}, {0, 4, 512}, {1, 0, 16}, {32, 0, 4}, {33, 5, 533}, {127, 7, 1023}, {128, 0, 1024}};
    for (size_t i = 0; i < MOQI_COUNT(rows); i++) CHECK_INT(moq_swizzle_128x4(rows[i][0], rows[i][1], 8), rows[i][2]);
    CHECK_INT(moq_swizzle_128x4_bytes(1, 1), 512);
    CHECK_INT(moq_swizzle_128x4_bytes(129, 5), 2 * 2 * 512);
    int r128 = 2, c4 = 3, at = 0, used = 0;
    uint8_t seen[2 * 3 * 512];
    memset(seen, 0, sizeof seen);
    for (int a = 0; a < r128; a++) /* view [R/128, 4, 32, C/4, 4] permuted to (0, 3, 2, 1, 4) */
        for (int d = 0; d < c4; d++)
            for (int c = 0; c < 32; c++)
                for (int b = 0; b < 4; b++)
                    for (int e = 0; e < 4; e++, at++) CHECK_INT(moq_swizzle_128x4(a * 128 + b * 32 + c, d * 4 + e, c4 * 4 - 1), at);
    for (int r = 0; r < 256; r++)
        for (int g = 0; g < 12; g++) {
            size_t p = moq_swizzle_128x4(r, g, 12);
            CHECK(p < sizeof seen && !seen[p]);
            if (p < sizeof seen) { seen[p] = 1; used++; }
        }
    CHECK_INT(used, sizeof seen);
}

/* ModelOpt INT4: rows 0 and 1 hold -3 and 5 in column 0: byte 0x5D. The same row 0 of compressed-tensors: low nibble 5. */
static void test_layout_known_bytes(void)
{
    uint8_t b[128];
    float scale[2] = {1, 1};
    int16_t code[2];
    moq_linear w;
    memset(b, 0, sizeof b);
    memset(&w, 0, sizeof w);
    b[0] = 0x5d;
    w.rows = 2; w.cols = 128; w.row_step = 1; w.global_mul = w.global_div = 1;
    w.scheme.weight.elem = MOQ_I4; w.scheme.weight.group_rows = 1; w.scheme.weight.group_cols = 128;
    w.codes.data = b; w.codes.dtype = MOQ_U8; w.codes.count = sizeof b;
    w.scales.data = scale; w.scales.dtype = MOQ_F32; w.scales.count = 2;
    w.scale_row_stride = 1;
    w.packing = moqi_make_packing(4, 8, 1, 128, 1);
    moq_get_codes(&w, 0, 0, 1, &code[0]);
    moq_get_codes(&w, 1, 0, 1, &code[1]);
    CHECK(code[0] == -3 && code[1] == 5);
    b[0] = 5;
    w.packing = moqi_make_packing(4, 32, 0, 16, 1);
    w.packing.is_unsigned = 1;
    w.zero_add = 8;
    float x[256];
    moq_dequantize(&w, 0, 1, x);
    CHECK(x[0] == -3.0f && x[1] == -8.0f);
    b[0] = 0x5d; b[1] = 0x87; /* two's complement along columns */
    w.packing = moqi_make_packing(4, 8, 0, 64, 1);
    w.zero_add = 0;
    moq_dequantize(&w, 0, 1, x);
    CHECK(x[0] == -3.0f && x[1] == 5.0f && x[2] == 7.0f && x[3] == -8.0f);
    moq_get_codes(&w, 0, 1, 2, code);
    CHECK(code[0] == 5 && code[1] == 7);
}

/* A slice of columns keeps whole words, groups, input groups and rotated blocks: their least common multiple. */
static void test_layout_column_units(void)
{
    uint8_t b[4096];
    moq_linear w, a;
    moq_error err;
    memset(b, 0, sizeof b);
    memset(&w, 0, sizeof w);
    w.name = "m";
    w.rows = 2; w.cols = 192; w.row_step = 1;
    w.codes.data = b;
    w.scheme.weight.elem = MOQ_I3; w.scheme.weight.group_rows = 1; w.scheme.weight.group_cols = 16;
    w.packing = moqi_make_packing(3, 32, 0, 18, 1);
    CHECK_INT(moq_slice_cols(&w, 16, 32, &a, &err), MOQ_E_SHAPE); /* 32 codes of 3 bits fill 3 words */
    CHECK(strstr(err.text, "a word of codes") && strstr(err.text, "32"));
    CHECK_INT(moq_slice_cols(&w, 32, 64, &a, &err), MOQ_OK);
    w.packing = moqi_make_packing(8, 8, 0, 192, 1);
    CHECK_INT(moq_slice_cols(&w, 16, 48, &a, &err), MOQ_OK);
    w.hadamard_size = 24;
    CHECK_INT(moq_slice_cols(&w, 16, 48, &a, &err), MOQ_E_SHAPE);
    CHECK(strstr(err.text, "rotated") && strstr(err.text, "48"));
    CHECK_INT(moq_slice_cols(&w, 48, 96, &a, &err), MOQ_OK);
    w.hadamard_size = 0;
    w.scheme.input.group_cols = 128;
    CHECK_INT(moq_slice_cols(&w, 0, 64, &a, &err), MOQ_E_SHAPE);
    CHECK_INT(moq_slice_cols(&w, 128, 64, &a, &err), MOQ_OK); /* to the end */
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_layout_compressed_tensors);
    RUN(test_layout_awq_gptq);
    RUN(test_layout_integers);
    RUN(test_layout_floats);
    RUN(test_layout_stacks);
    RUN(test_layout_plain);
    RUN(test_layout_bad_slices);
    RUN(test_layout_swizzle);
    RUN(test_layout_known_bytes);
    RUN(test_layout_column_units);
    return test_end();
}
