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

/* ---- Marlin ----
   The oracle goes the other way round than the library: word by word, what lies in each slot, as the descriptions of the repacking say. */

/* Column and row of slot `slot` of word `word`; rows: of the layer. */
static void slow_marlin_slot(int bits, int narrow, int rows, int word, int slot, int *col, int *row)
{
    static const int k4[8] = {0, 8, 0, 8, 1, 9, 1, 9}, n4[8] = {0, 0, 8, 8, 0, 0, 8, 8}, k8[4] = {0, 8, 1, 9}, narrow4[8] = {0, 16, 1, 17, 2, 18, 3, 19};
    int words = bits == 4 ? 128 : 256, tile = word / words, in = word % words, across = rows / (narrow ? 32 : 64), kt = tile / across, nt = tile % across;
    int lane = bits == 4 ? in / 4 : in / 8, w = bits == 4 ? in % 4 : in % 8 / 2, h = in % 2;
    if (!narrow) {
        int k0 = 16 * kt + 2 * (lane % 4), n0 = 64 * nt + 16 * w + lane / 4;
        *col = k0 + (bits == 4 ? k4[slot] : k8[slot]);
        *row = n0 + (bits == 4 ? n4[slot] : 8 * h);
    } else {
        int k0 = 32 * kt + 4 * (lane % 4);
        *row = 32 * nt + 16 * (w / 2) + 8 * (w % 2) + lane / 4;
        *col = k0 + (bits == 4 ? narrow4[slot] : 16 * h + slot);
    }
}

/* codes: [rows, cols] as they are stored; order: NULL or the column at each place. */
static void slow_marlin_codes(int bits, int narrow, int rows, int cols, const int32_t *codes, const int32_t *order, uint8_t *out)
{
    int per = 32 / bits, r, c;
    for (int word = 0; word < rows * cols / per; word++) {
        uint32_t v = 0;
        for (int slot = 0; slot < per; slot++) {
            slow_marlin_slot(bits, narrow, rows, word, slot, &c, &r);
            v |= ((uint32_t)codes[(int64_t)r * cols + (order ? order[c] : c)] & ((1u << bits) - 1)) << (bits * slot);
        }
        for (int i = 0; i < 4; i++) out[4 * word + i] = (uint8_t)(v >> (8 * i));
    }
}

/* Which row each place of a line of scales holds. */
static void slow_marlin_scales(int rows, int single, int bytes, int *row_at)
{
    static const int one[8] = {0, 1, 8, 9, 16, 17, 24, 25}, swap[4] = {0, 2, 1, 3};
    int *line = (int *)malloc(sizeof(int) * (size_t)rows);
    for (int i = 0; i < rows; i++)
        line[i] = single ? i / 32 * 32 + 2 * (i % 32 / 8) + one[i % 8] : i / 64 * 64 + i % 64 / 8 + 8 * (i % 8);
    for (int i = 0; i < rows; i++) row_at[i] = bytes ? line[i / 4 * 4 + swap[i % 4]] : line[i];
    free(line);
}

/* The permutation of the first publication, built as its reference does: 16 x 16 tiles flattened, four of them side by side. */
static void test_marlin_first_publication(void)
{
    static const int interleave[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    int perm[1024], n = 0, c, r;
    for (int i = 0; i < 32; i++)
        for (int j = 0; j < 4; j++)
            for (int block = 0; block < 2; block++)
                for (int k = 0; k < 4; k++) perm[n++] = 16 * (2 * (i % 4) + k % 2 + k / 2 * 8) + i / 4 + 8 * block + 256 * j;
    for (int i = 0; i < 1024; i++) { /* slot i holds element perm[...] of four tiles of 16 columns x 16 rows */
        int from = perm[i / 8 * 8 + interleave[i % 8]];
        slow_marlin_slot(4, 0, 64, i / 8, i % 8, &c, &r);
        CHECK(c == from % 256 / 16 && r == from / 256 * 16 + from % 16);
    }
}

static void test_marlin_known_places(void)
{
    static const int group[16] = {0, 8, 16, 24, 32, 40, 48, 56, 1, 9, 17, 25, 33, 41, 49, 57}, bytes[16] = {0, 16, 8, 24, 32, 48, 40, 56, 1, 17, 9, 25, 33, 49, 41, 57};
    static const int one[32] = {0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27, 4, 5, 12, 13, 20, 21, 28, 29, 6, 7, 14, 15, 22, 23, 30, 31};
    static const int e4m3_code[] = {0x08, 0x38, 0x3c, 0x40, 0x7e, 0x01, 0x07}, byte[] = {0x80, 0xb0, 0xb4, 0xb8, 0xf6, 0x68, 0x7e};
    moq_marlin m;
    memset(&m, 0, sizeof m);
    m.rows = m.cols = 64;
    m.groups = 4;
    m.bits = 4;
    m.act = m.scale = MOQ_F16;
    CHECK_INT(moq_marlin_code(&m, 9, 17), 144 * 8 + 6);
    CHECK_INT(moq_marlin_code(&m, 63, 63), 511 * 8 + 7);
    for (int i = 0; i < 16; i++) CHECK_INT(moq_marlin_scale(&m, group[i], 0), i);
    m.scale = MOQ_F8_E4M3;
    for (int i = 0; i < 16; i++) CHECK_INT(moq_marlin_scale(&m, bytes[i], 2), 128 + i);
    m.flags = MOQ_MARLIN_KEEP_TINY;
    for (int i = 0; i < 7; i++) CHECK_INT(moqi_marlin_encode(&m, e4m3(e4m3_code[i])), byte[i]);
    m.scale = MOQ_F16;
    m.groups = 1;
    for (int i = 0; i < 32; i++) CHECK_INT(moq_marlin_scale(&m, one[i], 0), i);
    m.bits = 8;
    CHECK_INT(moq_marlin_code(&m, 21, 40), 674 * 4 + 1);
    CHECK(moq_marlin_code(NULL, 1, 1) == 0 && moq_marlin_scale(NULL, 1, 1) == 0 && moq_marlin_zero(NULL, 1, 1) == 0);
}

/* What a kernel makes of a code and a scale in its registers (formulas of its bit tricks), times the factor of its sums. */
static double kernel_value(const moq_linear *w, const moq_marlin *m, const uint8_t *codes, const uint8_t *scales, float global, int r, int c, int group, int zero)
{
    uint64_t at = moq_marlin_code(m, r, c), s = moq_marlin_scale(m, r, group);
    int f16 = m->act == MOQ_F16, u = m->bits == 8 ? codes[at] : codes[at / 2] >> (4 * (at & 1)) & 15;
    double scale, value = u - zero;
    uint16_t bits = 0;
    if (w->scheme.weight.elem == MOQ_F4) bits = (uint16_t)((u & 8) << 12 | (u & 7) << (f16 ? 9 : 6));
    if (w->scheme.weight.elem == MOQ_F8_E4M3) bits = (uint16_t)((u & 128) << 8 | (u & 127) << (f16 ? 7 : 4));
    if (w->scheme.weight.elem == MOQ_F4 || w->scheme.weight.elem == MOQ_F8_E4M3) value = f16 ? slow_float(bits, 5, 10, 15) : slow_float(bits, 8, 7, 127);
    if (m->scale == MOQ_F8_E8M0) {
        /* the decoding of E2M1 leaves 2^-126 (E4M3: 2^-120), which the kernels multiply back */
        scale = slow_float((uint16_t)(scales[s] << 7), 8, 7, 127) * ldexp(1, m->bits == 4 ? 126 : 120);
        if (scales[s] == 0) scale = ldexp(1, -127 + (m->bits == 4 ? 126 : 120)); /* 0 in the kernel */
    } else if (m->scale == MOQ_F8_E4M3) {
        scale = f16 ? slow_float((uint16_t)(scales[s] << 7), 5, 10, 15) : slow_float((uint16_t)((scales[s] & 128) << 7 | (scales[s] & 127) << 4), 8, 7, 127);
    } else {
        scale = f16 ? slow_float(scales[2 * s] | scales[2 * s + 1] << 8, 5, 10, 15) : slow_float(scales[2 * s] | scales[2 * s + 1] << 8, 8, 7, 127);
    }
    return value * scale * (double)global;
}

/* Pack a layer, compare with the oracle, decode as a kernel would, unpack. `flags` as in check_layout. */
static void check_marlin(int layout, int bits, int rows, int cols, int group, int flags, moq_dtype act, uint32_t how)
{
    sample s;
    moq_linear w;
    moq_marlin m;
    moq_error err;
    float global = 0;
    CHECK(make(&s, layout, bits, rows, cols, group, 0, flags, &w));
    if (layout == MXFP4_2D || layout == MXFP8_2D) for (uint64_t i = 0; i < w.scales.count; i++) { /* what act * 2^6 holds */
        uint8_t *p = (uint8_t *)(uintptr_t)w.scales.data + i;
        if (*p > 240) *p = 240;
    }
    CHECK_INT(moq_marlin_describe(&w, act, how, &m, &err), MOQ_OK);
    int groups = (int)m.groups, narrow = (how & MOQ_MARLIN_NARROW) != 0, one = m.scale == MOQ_F8_E4M3 || m.scale == MOQ_F8_E8M0, size = one ? 1 : 2, bad = 0;
    CHECK_INT(groups, w.scheme.weight.group_cols > 0 ? cols / w.scheme.weight.group_cols : 1);
    size_t code_bytes = (size_t)rows * (size_t)cols * (size_t)m.bits / 8, count = (size_t)rows * (size_t)groups;
    uint8_t *codes = (uint8_t *)malloc(code_bytes), *want = (uint8_t *)malloc(code_bytes), *scales = (uint8_t *)malloc(count * 2), *back = (uint8_t *)malloc(count * 2);
    uint8_t *zeros = w.zeros.data ? (uint8_t *)malloc(count / 2) : NULL;
    int32_t *order = s.order ? (int32_t *)malloc(sizeof *order * (size_t)cols) : NULL, *stored = (int32_t *)malloc(sizeof *stored * (size_t)rows * (size_t)cols);
    int *row_at = (int *)malloc(sizeof(int) * (size_t)rows), n = 0;
    for (int g = 0; order && g < groups; g++) /* columns by their groups */
        for (int c = 0; c < cols; c++) if (moqi_group_of(&w, c) == g) order[n++] = c;
    int middle = w.scheme.weight.elem == MOQ_I8 && s.layout != CT_STREAM ? 128 : 0;
    for (int i = 0; i < rows * cols; i++) stored[i] = s.code[i] + middle;
    CHECK_INT(moq_marlin_pack(&w, &m, order, codes, scales, zeros, &global, &err), MOQ_OK);
    slow_marlin_codes(m.bits, narrow, rows, cols, stored, order, want);
    CHECK(memcmp(codes, want, code_bytes) == 0);
    slow_marlin_scales(rows, groups == 1 || narrow, one && !narrow, row_at);
    for (int g = 0; g < groups; g++)
        for (int i = 0; i < rows; i++) if (moq_marlin_scale(&m, row_at[i], g) != (uint64_t)(g * rows + i)) bad++;
    for (int g = 0; zeros && g < groups; g++) { /* the permutation of scales, then 0 2 4 6 1 3 5 7 within eight */
        static const int awq[8] = {0, 2, 4, 6, 1, 3, 5, 7};
        slow_marlin_scales(rows, 0, 0, row_at);
        for (int i = 0; i < rows; i++) {
            int at = g * rows + i, z = zeros[at / 2] >> (4 * (at & 1)) & 15;
            if (z != moqi_zero_at(&w, row_at[i / 8 * 8 + awq[i % 8]], g)) bad++;
        }
    }
    CHECK_INT(bad, 0);
    for (int r = 0; r < rows && !narrow; r += 5) /* every place of a tile, some of each group */
        for (int c = 0; c < cols; c += 3) {
            int column = order ? order[c] : c, g = (int)moqi_group_of(&w, column);
            double scale = moqi_scale_at(&w, r, g), v = s.value[(int64_t)r * cols + column];
            int zero = moqi_zero_at(&w, r, g) + middle;
            if (!one) { /* scales are rounded to the type of the kernel */
                float rounded = act == MOQ_F16 ? moq_f16_decode(moq_f16_encode((float)scale)) : moq_bf16_decode(moq_bf16_encode((float)scale));
                v = scale == 0 ? 0 : (w.scheme.weight.elem == MOQ_F8_E4M3 ? e4m3(s.code[(int64_t)r * cols + column]) : s.code[(int64_t)r * cols + column] + middle - zero) * (double)rounded;
            } else if (m.scale == MOQ_F8_E8M0) v = (m.bits == 4 ? e2m1(s.code[(int64_t)r * cols + column]) : e4m3(s.code[(int64_t)r * cols + column])) * scale;
            else if (!(how & MOQ_MARLIN_KEEP_TINY) && scale * ldexp(1, 7 + m.shift) < 2) v = 0;
            else if (act == MOQ_BF16 && scale * ldexp(1, 7 + m.shift) < 2) continue; /* what the kernel gets wrong */
            double got = kernel_value(&w, &m, codes, scales, global, r, c, g, zero);
            int differ = layout == NVFP4_CT ? fabs(got - v) > 1.2e-7 * fabs(v) : m.scale == MOQ_F8_E4M3 ? (float)got != (float)v : got != v;
            if (differ) { /* CT: 1 / divisor is rounded once more */ if (bad++ < 3) fprintf(stderr, "[%d, %d]: %.9g, expected %.9g\n", r, c, got, v); }
        }
    CHECK_INT(bad, 0);
    moq_marlin_unpack(&m, codes, scales, want, back); /* exact inverse */
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < cols; c++) {
            int64_t at = (int64_t)r * cols + c;
            if ((m.bits == 8 ? want[at] : want[at / 2] >> (4 * (at & 1)) & 15) != (stored[(int64_t)r * cols + (order ? order[c] : c)] & (m.bits == 8 ? 255 : 15))) bad++;
        }
        for (int g = 0; g < groups; g++) {
            const uint8_t *p = back + (size_t)size * (size_t)(r * groups + g);
            double scale = moqi_scale_at(&w, r, g), v = m.scale == MOQ_F8_E8M0 ? ldexp(1, *p - 127) : m.scale == MOQ_F8_E4M3 ? e4m3(*p) :
                           act == MOQ_F16 ? slow_float(p[0] | p[1] << 8, 5, 10, 15) : slow_float(p[0] | p[1] << 8, 8, 7, 127);
            if (!one) scale = act == MOQ_F16 ? moq_f16_decode(moq_f16_encode((float)scale)) : moq_bf16_decode(moq_bf16_encode((float)scale));
            if (m.scale == MOQ_F8_E4M3 && !(how & MOQ_MARLIN_KEEP_TINY) && scale * ldexp(1, 7 + m.shift) < 2) scale = 0;
            if (v != scale) bad++;
        }
    }
    if (bad) fprintf(stderr, "marlin %s, %d bits, [%d, %d], act %s, flags %d\n", layout_names[layout], bits, rows, cols, moq_dtype_name(act), (int)how);
    CHECK_INT(bad, 0);
    free(codes); free(want); free(scales); free(back); free(zeros); free(order); free(stored); free(row_at);
    drop(&s);
}

static void test_marlin_integers(void)
{
    static const int groups[] = {32, 64, 128, 256};
    for (int i = 0; i < 4; i++)
        for (int flags = 0; flags < 4; flags += 2) { /* 2: act order */
            check_marlin(CT_STREAM, 4, 64, 256, groups[i], flags, MOQ_F16, 0);
            check_marlin(CT_STREAM, 8, 192, 256, groups[i], flags, MOQ_BF16, 0);
        }
    check_marlin(AWQ, 4, 128, 256, 64, 0, MOQ_F16, 0);
    check_marlin(CT_STREAM, 4, 128, 128, 32, 1, MOQ_BF16, 0);
    check_marlin(CT_STREAM, 4, 128, 96, 96 / 3, 1, MOQ_F16, 0);
    check_marlin(CT_STREAM, 4, 64, 128, 128, 0, MOQ_BF16, MOQ_MARLIN_NARROW);
    check_marlin(CT_STREAM, 8, 128, 64, 64, 0, MOQ_F16, MOQ_MARLIN_NARROW);
}

static void test_marlin_floats(void)
{
    for (int i = 0; i < 2; i++) {
        moq_dtype act = i ? MOQ_BF16 : MOQ_F16;
        check_marlin(NVFP4_2D, 4, 128, 176, 16, 0, act, 0);
        check_marlin(NVFP4_2D, 4, 64, 48, 16, 0, act, MOQ_MARLIN_KEEP_TINY);
        check_marlin(NVFP4_CT, 4, 64, 64, 16, 0, act, 0);
        check_marlin(FP8_TENSOR, 8, 64, 48, 1, 0, act, 0);
        check_marlin(FP8_ROW, 8, 128, 80, 1, 0, act, 0);
        check_marlin(FP8_BLOCK, 8, 192, 256, 1, 0, act, 0);
    }
    check_marlin(MXFP4_2D, 4, 192, 160, 32, 0, MOQ_BF16, 0);
    check_marlin(MXFP4_2D, 4, 64, 96, 32, 0, MOQ_BF16, MOQ_MARLIN_NARROW);
    check_marlin(MXFP8_2D, 8, 64, 96, 32, 0, MOQ_BF16, 0);
}

/* All 127 codes of E4M3 under every power of two: out and back; those below 2 / 2^(7 + shift) become 0. */
static void test_marlin_scale_bytes(void)
{
    moq_marlin m;
    memset(&m, 0, sizeof m);
    m.rows = 64;
    m.cols = 16;
    m.groups = 2;
    m.bits = 4;
    m.act = MOQ_BF16;
    m.scale = MOQ_F8_E4M3;
    for (m.shift = 0; m.shift < 15; m.shift++)
        for (int keep = 0; keep < 2; keep++)
            for (int c = 0; c < 127; c++) {
                uint8_t in[128], out[128];
                m.flags = keep ? MOQ_MARLIN_KEEP_TINY : 0;
                int32_t b = moqi_marlin_encode(&m, e4m3(c));
                if (e4m3(c) * ldexp(1, 7 + m.shift) > 65504) { CHECK_INT(b, -1); continue; }
                CHECK(b >= 0 && b < 256);
                memset(in, b, sizeof in);
                moq_marlin_unpack(&m, NULL, in, NULL, out);
                CHECK_INT(out[77], keep || e4m3(c) * ldexp(1, 7 + m.shift) >= 2 ? c : 0);
            }
    m.shift = 0;
    CHECK(moqi_marlin_encode(&m, -1.0) == -1 && moqi_marlin_encode(&m, (double)moq_e4m3_decode(0x7f)) == -1);
    m.scale = MOQ_F8_E8M0;
    CHECK(moqi_marlin_encode(&m, (double)moq_e8m0_decode(255)) == -1 && moqi_marlin_encode(&m, (double)moq_e8m0_decode(0)) == 0);
    for (int c = 0; c < 255; c++) CHECK_INT(moqi_marlin_encode(&m, ldexp(1, c - 127)), c);
}

static void test_marlin_refusals(void)
{
    static const struct { int layout, bits, rows, cols, group, flags; moq_dtype act; uint32_t how; moq_result code; const char *says; } bad[] = {
        {CT_STREAM, 4, 96, 64, 32, 0, MOQ_F16, 0, MOQ_E_SHAPE, "multiples of 64 rows"}, {NVFP4_2D, 4, 64, 176, 16, 0, MOQ_F32, 0, MOQ_E_UNSUPPORTED, "F16 or BF16"},
        {CT_STREAM, 4, 64, 112, 16, 0, MOQ_F16, MOQ_MARLIN_NARROW, MOQ_E_UNSUPPORTED, "one scale a row"}, {CT_STREAM, 3, 64, 64, 32, 0, MOQ_F16, 0, MOQ_E_UNSUPPORTED, "INT4, INT8"},
        {CT_STREAM, 8, 64, 64, 32, 1, MOQ_F16, 0, MOQ_E_UNSUPPORTED, "INT4 alone"}, {MXFP4_2D, 4, 64, 64, 32, 0, MOQ_F16, 0, MOQ_E_UNSUPPORTED, "BF16 is needed"},
        {NVFP4_2D, 4, 64, 64, 16, 0, MOQ_BF16, MOQ_MARLIN_NARROW, MOQ_E_UNSUPPORTED, "MXFP4"}, {MXFP4_2D, 4, 64, 32, 32, 0, MOQ_BF16, 0, MOQ_OK, ""},
        {FP8_TENSOR, 8, 64, 72, 1, 0, MOQ_F16, 0, MOQ_E_SHAPE, "16 columns"}
    };
    for (size_t i = 0; i < MOQI_COUNT(bad); i++) {
        sample s;
        moq_linear w;
        moq_marlin m;
        moq_error err;
        CHECK(make(&s, bad[i].layout, bad[i].bits, bad[i].rows, bad[i].cols, bad[i].group, 0, bad[i].flags, &w));
        CHECK_INT(moq_marlin_describe(&w, bad[i].act, bad[i].how, &m, &err), bad[i].code);
        CHECK(strstr(err.text, bad[i].says) != NULL);
        if (bad[i].code == MOQ_OK) { /* a scale that is no number */
            uint8_t codes[64 * 16], scales[64];
            float global;
            ((uint8_t *)(uintptr_t)w.scales.data)[5] = 255;
            CHECK_INT(moq_marlin_pack(&w, &m, NULL, codes, scales, NULL, &global, &err), MOQ_E_SCALE);
            CHECK(strstr(err.text, "row 5") != NULL);
            CHECK_INT(moq_marlin_pack(&w, &m, NULL, codes, scales, codes, &global, &err), MOQ_E_ARG);
            CHECK_INT(moq_marlin_pack(&w, &m, NULL, codes, NULL, NULL, &global, &err), MOQ_E_ARG);
            CHECK_INT(moq_marlin_pack(NULL, &m, NULL, codes, scales, NULL, &global, NULL), MOQ_E_ARG);
            CHECK_INT(moq_marlin_describe(NULL, MOQ_F16, 0, &m, &err), MOQ_E_ARG);
            CHECK_INT(moq_marlin_describe(&w, MOQ_F16, 0, NULL, &err), MOQ_E_ARG);
            moq_marlin_unpack(NULL, codes, scales, codes, scales);
        }
        drop(&s);
    }
}

/* ---- folders in Marlin's layout, and the same numbers as plain GPTQ ---- */

typedef struct buffer { uint8_t *p; size_t n; } buffer;

/* A safetensors file of a 64-bit length, a header and up to 4 tensors; freed by the caller. */
static buffer shard(int count, const char *const *names, const char *const *dtypes, const int (*shape)[2], const void *const *data)
{
    char head[1000];
    size_t n = 0, end = 0, sizes[4];
    buffer b;
    n += (size_t)snprintf(head, sizeof head, "{");
    for (int i = 0; i < count; i++) {
        sizes[i] = (size_t)shape[i][0] * (size_t)shape[i][1] * (strcmp(dtypes[i], "I32") == 0 ? 4u : 2u);
        n += (size_t)snprintf(head + n, sizeof head - n, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%d,%d],\"data_offsets\":[%u,%u]}", i ? "," : "", names[i], dtypes[i], shape[i][0],
                              shape[i][1], (unsigned)end, (unsigned)(end + sizes[i]));
        end += sizes[i];
    }
    n += (size_t)snprintf(head + n, sizeof head - n, "}");
    b.n = 8 + n + end;
    b.p = (uint8_t *)calloc(1, b.n);
    for (int i = 0; i < 8; i++) b.p[i] = (uint8_t)((uint64_t)n >> (8 * i));
    memcpy(b.p + 8, head, n);
    for (int i = 0, at = (int)(8 + n); i < count; at += (int)sizes[i++]) memcpy(b.p + at, data[i], sizes[i]);
    return b;
}

static moq_checkpoint *open_pair(const char *config, buffer tensors, int fails, moq_error *err)
{
    moq_file files[2];
    moq_open_desc d;
    memset(files, 0, sizeof files);
    memset(&d, 0, sizeof d);
    files[0].name = "config.json";
    files[0].data = config;
    files[0].bytes = strlen(config);
    files[1].name = "model.safetensors";
    files[1].data = tensors.p;
    files[1].bytes = tensors.n;
    d.allocator = test_allocator();
    if (fails) test_state.fail_at = fails;
    moq_checkpoint *ck = moq_open_memory(files, 2, &d, err);
    test_state.fail_at = 0;
    return ck;
}

static void check_marlin_folder(int rows, int cols, int group, int awq)
{
    enum { WORD = 4, HALF = 2 };
    static const char *const marlin_types[2] = {"I32", "F16"}, *const plain_types[4] = {"I32", "F16", "I32", "I32"};
    static const char *const names[2][2] = {{"m.up_proj.B", "m.up_proj.s"}, {"m.up_proj.qweight", "m.up_proj.scales"}};
    static const char *const plain_names[2] = {"m.up_proj.qweight", "m.up_proj.scales"};
    int g = group > 0 ? cols / group : 1, *row_at = (int *)malloc(sizeof(int) * (size_t)rows), bad = 0;
    const int shape[2][2] = {{cols / 16, rows * 2}, {g, rows}}, plain_shape[2][2] = {{cols / 8, rows}, {g, rows}};
    int32_t *code = (int32_t *)malloc(sizeof *code * (size_t)rows * (size_t)cols);
    uint8_t *tiled = (uint8_t *)malloc((size_t)rows * (size_t)cols / 2), *plain = (uint8_t *)calloc((size_t)rows, (size_t)cols / 2);
    uint8_t *scale = (uint8_t *)malloc((size_t)rows * (size_t)g * HALF), *permuted = (uint8_t *)malloc((size_t)rows * (size_t)g * HALF);
    char config[2][300];
    moq_error err;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) {
            code[r * cols + c] = (int32_t)(test_random() & 15);
            put_bits(plain, (uint64_t)((c / 8 * rows + r) * 32 + c % 8 * 4), 4, code[r * cols + c]); /* GPTQ: [cols / 8, rows] words */
        }
    slow_marlin_codes(4, 0, rows, cols, code, NULL, tiled);
    slow_marlin_scales(rows, g == 1, 0, row_at);
    for (int i = 0; i < g * rows; i++) put_f16(scale, i);
    for (int k = 0; k < g; k++)
        for (int i = 0; i < rows; i++) memcpy(permuted + HALF * (k * rows + i), scale + HALF * (k * rows + row_at[i]), HALF);
    const void *data[2] = {tiled, permuted}, *plain_data[2] = {plain, scale};
    buffer a = shard(2, names[awq], marlin_types, shape, data), b = shard(2, plain_names, plain_types, plain_shape, plain_data);
    snprintf(config[0], sizeof config[0], awq ? "{\"quantization_config\":{\"quant_method\":\"awq\",\"version\":\"marlin\",\"zero_point\":false,\"bits\":4,\"group_size\":%d}}" :
             group == 128 ? "{\"quantization_config\":{\"quant_method\":\"gptq\",\"is_marlin_format\":true,\"bits\":4,\"group_size\":%d}}" :
             "{\"quantization_config\":{\"quant_method\":\"gptq\",\"checkpoint_format\":\"marlin\",\"sym\":true,\"desc_act\":false,\"bits\":4,\"group_size\":%d}}", group);
    snprintf(config[1], sizeof config[1], "{\"quantization_config\":{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":%d}}", group);
    moq_checkpoint *x = open_pair(config[0], a, 0, &err), *y = open_pair(config[1], b, 0, &err);
    CHECK(x != NULL && y != NULL);
    if (x && y) {
        moq_linear v, w;
        float *p = (float *)malloc(sizeof(float) * (size_t)rows * (size_t)cols), *q = (float *)malloc(sizeof(float) * (size_t)rows * (size_t)cols);
        CHECK_INT(moq_find_linear(x, "m.up_proj", &v, &err), MOQ_OK);
        CHECK_INT(moq_find_linear(y, "m.up_proj", &w, &err), MOQ_OK);
        CHECK(moq_scheme_equal(&v.scheme, &w.scheme) && v.rows == rows && v.cols == cols && v.zero_add == 8);
        CHECK_STR(v.tensor, names[awq][0]);
        moq_dequantize(&v, 0, rows, p);
        moq_dequantize(&w, 0, rows, q);
        CHECK(memcmp(p, q, sizeof(float) * (size_t)rows * (size_t)cols) == 0);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++) {
                const uint8_t *h = scale + HALF * ((group > 0 ? c / group : 0) * rows + r);
                if ((double)p[r * cols + c] != (double)(float)((code[r * cols + c] - 8) * slow_float(h[0] | h[1] << 8, 5, 10, 15))) bad++;
            }
        CHECK_INT(bad, 0);
        CHECK_INT(moq_verify(x, MOQ_VERIFY_DEEP, NULL, NULL, &err), MOQ_OK);
        free(p);
        free(q);
    }
    moq_close(x);
    moq_close(y);
    for (int k = 1; k < 60; k++) { /* every allocation may fail */
        x = open_pair(config[0], a, k, &err);
        if (!x) CHECK_INT(err.code, MOQ_E_NOMEM);
        moq_close(x);
    }
    CHECK_INT(test_state.live_allocs, 0);
    memset(a.p + a.n - HALF, 0xff, HALF); /* NaN */
    CHECK((x = open_pair(config[0], a, 0, &err)) != NULL);
    CHECK_INT(moq_verify(x, 0, NULL, NULL, &err), MOQ_E_SCALE);
    moq_close(x);
    free(a.p);
    const int other[2][2] = {{cols / 16, rows * 2}, {g, rows - 1}};
    a = shard(2, names[awq], marlin_types, other, data);
    CHECK(open_pair(config[0], a, 0, &err) == NULL && err.code == MOQ_E_SHAPE && strstr(err.text, "tiles of 16 columns x 64 rows"));
    free(a.p);
    a = shard(1, names[awq], marlin_types, shape, data);
    CHECK(open_pair(config[0], a, 0, &err) == NULL && err.code == MOQ_E_MISSING && strstr(err.text, names[awq][1]));
    CHECK(open_pair(config[0], b, 0, &err) == NULL && err.code == MOQ_E_SHAPE); /* plain codes under a claim of Marlin */
    free(a.p); free(b.p); free(row_at); free(code); free(tiled); free(plain); free(scale); free(permuted);
}

static void test_marlin_folders(void)
{
    for (int awq = 0; awq < 2; awq++) {
        check_marlin_folder(256, 384, 128, awq);
        check_marlin_folder(64, 256, 64, awq);
        check_marlin_folder(192, 128, -1, awq);
        check_marlin_folder(128, 128, 128, awq); /* one group as wide as the row: permuted as a single scale */
    }
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
    RUN(test_marlin_first_publication);
    RUN(test_marlin_known_places);
    RUN(test_marlin_integers);
    RUN(test_marlin_floats);
    RUN(test_marlin_scale_bytes);
    RUN(test_marlin_refusals);
    RUN(test_marlin_folders);
    return test_end();
}
