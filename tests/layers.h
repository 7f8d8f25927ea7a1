/* layers.h - layers of every storage format, made from random codes, with their exact weights.

   The packing here is written bit by bit from the layout rules in modelopt_q.h, not with the library's own reader, so it is
   an oracle for moq_get_codes and moq_dequantize too. */
#ifndef LAYERS_H
#define LAYERS_H

enum { ZERO_NONE, ZERO_CONSTANT, ZERO_PACKED, ZERO_BYTES };

typedef struct layer_format {
    const char *name;
    moq_dtype elem;
    int bits, word_bits, along_rows, padded, awq, is_unsigned;
    int column_major;          /* words of one column (or of one packed line of columns) follow each other over rows */
    int group_rows, group_cols;
    moq_dtype scale;
    int scale_column_major;
    int global;                /* 0 none, 1 multiplier, 2 divisor */
    int zero, zero_add;
    int act_order;
    int row_unit, col_unit;    /* shapes are multiples of these */
} layer_format;

static const layer_format layer_formats[] = {
    {"f32", MOQ_F32, 32, 32, 0, 0, 0, 0, 0, 0, 0, MOQ_NONE, 0, 0, 0, 0, 0, 1, 1},
    {"f16", MOQ_F16, 16, 16, 0, 0, 0, 0, 0, 0, 0, MOQ_NONE, 0, 0, 0, 0, 0, 1, 1},
    {"bf16", MOQ_BF16, 16, 16, 0, 0, 0, 0, 0, 0, 0, MOQ_NONE, 0, 0, 0, 0, 0, 1, 1},
    {"bf16 [in, out]", MOQ_BF16, 16, 16, 0, 0, 0, 0, 1, 0, 0, MOQ_NONE, 0, 0, 0, 0, 0, 1, 1},
    {"nvfp4", MOQ_F4, 4, 8, 0, 0, 0, 0, 0, 1, 16, MOQ_F8_E4M3, 0, 1, 0, 0, 0, 1, 16},
    {"nvfp4 g32", MOQ_F4, 4, 8, 0, 0, 0, 0, 0, 1, 32, MOQ_F8_E4M3, 0, 1, 0, 0, 0, 1, 32},
    {"nvfp4 divisor", MOQ_F4, 4, 8, 0, 0, 0, 0, 0, 1, 16, MOQ_F8_E4M3, 0, 2, 0, 0, 0, 1, 16},
    {"nvfp4 [in/2, out]", MOQ_F4, 4, 8, 0, 0, 0, 0, 1, 1, 16, MOQ_F8_E4M3, 1, 1, 0, 0, 0, 1, 16},
    {"mxfp4", MOQ_F4, 4, 8, 0, 0, 0, 0, 0, 1, 32, MOQ_F8_E8M0, 0, 0, 0, 0, 0, 1, 32},
    {"mxfp4 along rows", MOQ_F4, 4, 8, 1, 0, 0, 0, 1, 32, 1, MOQ_F8_E8M0, 1, 0, 0, 0, 0, 32, 1},
    {"mxfp6 in bytes", MOQ_F6_E3M2, 8, 8, 0, 0, 0, 0, 0, 1, 32, MOQ_F8_E8M0, 0, 0, 0, 0, 0, 1, 32},
    {"fp8 tensor", MOQ_F8_E4M3, 8, 8, 0, 0, 0, 0, 0, -1, -1, MOQ_F32, 0, 0, 0, 0, 0, 1, 1},
    {"fp8 row", MOQ_F8_E4M3, 8, 8, 0, 0, 0, 0, 0, 1, -1, MOQ_BF16, 0, 0, 0, 0, 0, 1, 1},
    {"fp8 [in, out]", MOQ_F8_E4M3, 8, 8, 0, 0, 0, 0, 1, -1, -1, MOQ_F32, 0, 0, 0, 0, 0, 1, 1},
    {"fp8 block128", MOQ_F8_E4M3, 8, 8, 0, 0, 0, 0, 0, 128, 128, MOQ_F32, 0, 0, 0, 0, 0, 1, 1},
    {"mxfp8", MOQ_F8_E4M3, 8, 8, 0, 0, 0, 0, 0, 1, 32, MOQ_F8_E8M0, 0, 0, 0, 0, 0, 1, 32},
    {"int8 row", MOQ_I8, 8, 8, 0, 0, 0, 0, 0, 1, -1, MOQ_F32, 0, 0, 0, 0, 0, 1, 1},
    {"int8 g128", MOQ_I8, 8, 8, 0, 0, 0, 0, 0, 1, 128, MOQ_F16, 0, 0, 0, 0, 0, 1, 128},
    {"int8 zero points", MOQ_I8, 8, 8, 0, 0, 0, 0, 0, 1, -1, MOQ_F32, 0, 0, ZERO_BYTES, 0, 0, 1, 1},
    {"int4 modelopt", MOQ_I4, 4, 8, 1, 0, 0, 0, 0, 1, 128, MOQ_F32, 0, 0, 0, 0, 0, 2, 128},
    {"int4 in bytes", MOQ_I4, 8, 8, 0, 0, 0, 0, 0, 1, 32, MOQ_BF16, 0, 0, 0, 0, 0, 1, 32},
    {"pack4 g32", MOQ_I4, 4, 32, 0, 0, 0, 1, 0, 1, 32, MOQ_BF16, 0, 0, ZERO_CONSTANT, 8, 0, 1, 32},
    {"pack4 zero points", MOQ_I4, 4, 32, 0, 0, 0, 1, 0, 1, 32, MOQ_F16, 0, 0, ZERO_PACKED, 0, 0, 1, 32},
    {"pack4 actorder", MOQ_I4, 4, 32, 0, 0, 0, 1, 0, 1, 32, MOQ_F32, 0, 0, ZERO_CONSTANT, 8, 1, 1, 32},
    {"pack8 channel", MOQ_I8, 8, 32, 0, 0, 0, 1, 0, 1, -1, MOQ_F32, 0, 0, ZERO_CONSTANT, 128, 0, 1, 1},
    {"pack2 g64", MOQ_I2, 2, 32, 0, 0, 0, 1, 0, 1, 64, MOQ_F32, 0, 0, ZERO_CONSTANT, 2, 0, 1, 64},
    {"pack3 g32", MOQ_I3, 3, 32, 0, 0, 0, 1, 0, 1, 32, MOQ_F32, 0, 0, ZERO_CONSTANT, 4, 0, 1, 32},
    {"pack5 zero points", MOQ_I5, 5, 32, 0, 0, 0, 1, 0, 1, 32, MOQ_F32, 0, 0, ZERO_PACKED, 0, 0, 1, 32},
    {"pack6 padded", MOQ_I6, 6, 32, 0, 1, 0, 1, 0, 1, 16, MOQ_F32, 0, 0, ZERO_CONSTANT, 32, 0, 1, 16},
    {"pack7", MOQ_I7, 7, 32, 0, 0, 0, 1, 0, 1, -1, MOQ_F32, 0, 0, ZERO_CONSTANT, 64, 0, 1, 1},
    {"awq", MOQ_I4, 4, 32, 1, 0, 1, 1, 1, 1, 64, MOQ_F16, 1, 0, ZERO_PACKED, 0, 0, 8, 64},
    {"gptq4", MOQ_I4, 4, 32, 0, 0, 0, 1, 1, 1, 128, MOQ_F16, 1, 0, ZERO_PACKED, 1, 0, 8, 128},
    {"gptq4 desc_act", MOQ_I4, 4, 32, 0, 0, 0, 1, 1, 1, 32, MOQ_F16, 1, 0, ZERO_PACKED, 1, 1, 8, 32},
    {"gptq3", MOQ_I3, 3, 32, 0, 0, 0, 1, 1, 1, 32, MOQ_F16, 1, 0, ZERO_PACKED, 1, 0, 32, 32},
    {"gptq8", MOQ_I8, 8, 32, 0, 0, 0, 1, 1, 1, 128, MOQ_F16, 1, 0, ZERO_PACKED, 1, 0, 4, 128}
};

typedef struct layer {
    moq_linear w;
    double *exact; /* [rows, cols] */
    void *memory[12];
    int blocks;
} layer;

static void *layer_memory(layer *l, size_t bytes)
{
    void *p = calloc(bytes ? bytes : 1, 1); /* exact size: a sanitizer sees a read too far */
    if (!p) exit(2);
    l->memory[l->blocks++] = p;
    return p;
}

static void layer_free(layer *l)
{
    for (int i = 0; i < l->blocks; i++) free(l->memory[i]);
    memset(l, 0, sizeof *l);
}

/* Position of a code: line by line in the packed direction, bit by bit. */
static void layer_put(uint8_t *data, const moq_packing *p, int64_t row, int64_t col, uint32_t code)
{
    static const int order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    int64_t n = p->along_rows ? row : col, step = p->along_rows ? p->row_stride : p->col_stride;
    int64_t start = p->along_rows ? col * p->col_stride : row * p->row_stride, first = n * p->bits;
    int per = p->word_bits / p->bits;
    if (p->padded) first = n / per * p->word_bits + n % per * p->bits;
    if (p->awq_order) {
        int slot = 0;
        while (order[slot] != n % 8) slot++;
        first = n / 8 * 32 + slot * 4;
    }
    for (int b = 0; b < p->bits; b++) {
        int64_t at = first + b, word = start + at / p->word_bits * step, bit = at % p->word_bits;
        uint8_t *byte = data + word * (p->word_bits / 8) + bit / 8;
        if (code >> b & 1) *byte = (uint8_t)(*byte | 1u << (bit % 8));
    }
}

static int64_t layer_words(int64_t n, const moq_packing *p)
{
    int per = p->word_bits / p->bits;
    return p->padded || p->awq_order ? (n + per - 1) / per : (n * p->bits + p->word_bits - 1) / p->word_bits;
}

/* Strides for [rows, cols]; returns the number of words. */
static int64_t layer_strides(moq_packing *p, int64_t rows, int64_t cols, int column_major)
{
    int64_t high = p->along_rows ? layer_words(rows, p) : rows, wide = p->along_rows ? cols : layer_words(cols, p);
    p->row_stride = column_major ? 1 : wide;
    p->col_stride = column_major ? high : 1;
    return high * wide;
}

static double layer_e2m1(unsigned c)
{
    static const double v[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    return c & 8 ? -v[c & 7] : v[c & 7];
}

static double layer_small(unsigned c, int exponent_bits, int mantissa_bits, int bias) /* sign, exponent, mantissa */
{
    int e = (int)(c >> mantissa_bits) & ((1 << exponent_bits) - 1), m = (int)c & ((1 << mantissa_bits) - 1);
    double v = e ? ldexp(1 + ldexp(m, -mantissa_bits), e - bias) : ldexp(m, 1 - bias - mantissa_bits);
    return c >> (exponent_bits + mantissa_bits) & 1 ? -v : v;
}

/* The nearest E4M3 number by trying all of them, the even code of equals; saturates. */
MOQI_UNUSED static double layer_nearest_e4m3(double v)
{
    double best = 0, gap = 1e300;
    for (unsigned c = 0; c < 127; c++) {
        double x = layer_small(c, 4, 3, 7), d = fabs(fabs(v) - x);
        if (d < gap || (d == gap && c % 2 == 0)) { gap = d; best = x; }
    }
    return v < 0 ? -best : best;
}

/* A random number of a dtype, positive when `scale`: stores its bits at out and returns its value. */
static double layer_number(moq_dtype t, int scale, uint8_t *out)
{
    float f = scale ? 0.002f + (float)(test_random() % 1000) * 0.0001f : test_normal() * 0.1f;
    if (scale && test_random() % 50 == 0) f *= 20;
    uint32_t bits;
    uint16_t half;
    switch ((int)t) {
    case MOQ_F32: memcpy(&bits, &f, 4); memcpy(out, &bits, 4); return (double)f;
    case MOQ_BF16: memcpy(&bits, &f, 4); half = (uint16_t)(bits >> 16); memcpy(out, &half, 2); bits = (uint32_t)half << 16; memcpy(&f, &bits, 4); return (double)f;
    case MOQ_F16: half = (uint16_t)(0x1c00 + test_random() % 0x1800); if (!scale && test_random() % 2) half |= 0x8000; memcpy(out, &half, 2); return layer_small(half, 5, 10, 15);
    case MOQ_F8_E4M3: *out = (uint8_t)(test_random() % 20 == 0 ? 1 + test_random() % 0x7e : 0x28 + test_random() % 0x28); return layer_small(*out, 4, 3, 7);
    default: *out = (uint8_t)(118 + test_random() % 8); return ldexp(1, *out - 127); /* E8M0 */
    }
}

static void layer_make_codes(layer *l, const layer_format *f)
{
    moq_linear *w = &l->w;
    int64_t words = layer_strides(&w->packing, w->rows, w->cols, f->column_major);
    uint8_t *data = (uint8_t *)layer_memory(l, (size_t)(words * f->word_bits / 8));
    w->codes.data = data;
    w->codes.count = (uint64_t)words;
    w->codes.dtype = f->bits > 8 ? f->elem : f->word_bits == 32 ? MOQ_I32 : f->elem == MOQ_F8_E4M3 ? MOQ_F8_E4M3 : MOQ_U8;
    for (int64_t r = 0; r < w->rows; r++)
        for (int64_t c = 0; c < w->cols; c++) {
            double *v = &l->exact[r * w->cols + c];
            uint32_t code = test_random() & ((1u << (f->bits > 8 ? 8 : f->bits)) - 1);
            if (f->bits > 8) { *v = layer_number(f->elem, 0, data + (r * w->packing.row_stride + c * w->packing.col_stride) * (f->bits / 8)); continue; }
            if (f->elem == MOQ_F8_E4M3 && (code & 0x7f) == 0x7f) code ^= 1;
            if (f->elem == MOQ_F6_E3M2) code &= 63;
            if (f->elem == MOQ_I4 && f->bits == 8) code = (uint32_t)(int)((int)(code & 15) - 8) & 255;
            *v = f->elem == MOQ_F4 ? layer_e2m1(code) : f->elem == MOQ_F8_E4M3 ? layer_small(code, 4, 3, 7) : f->elem == MOQ_F6_E3M2 ? layer_small(code, 3, 2, 3)
               : f->is_unsigned ? (double)code : (double)code - (code >> (f->bits - 1) ? (double)(1u << f->bits) : 0);
            layer_put(data, &w->packing, r, c, code);
        }
}

static int layer_value_bytes(moq_dtype t) { return t == MOQ_F32 ? 4 : t == MOQ_BF16 || t == MOQ_F16 ? 2 : 1; }

static void layer_make_scales(layer *l, const layer_format *f)
{
    moq_linear *w = &l->w;
    int64_t high = f->group_rows < 0 ? 1 : (w->rows + f->group_rows - 1) / f->group_rows, wide = f->group_cols < 0 ? 1 : (w->cols + f->group_cols - 1) / f->group_cols;
    int bytes = layer_value_bytes(f->scale);
    uint8_t *s = (uint8_t *)layer_memory(l, (size_t)(high * wide * bytes));
    double *value = (double *)layer_memory(l, (size_t)(high * wide) * 2 * sizeof(double)), *zero = value + high * wide;
    int32_t *index = f->act_order ? (int32_t *)layer_memory(l, (size_t)w->cols * 4) : NULL;
    w->scales.data = s;
    w->scales.dtype = f->scale;
    w->scales.count = (uint64_t)(high * wide);
    w->scale_row_stride = f->scale_column_major ? 1 : wide;
    w->scale_col_stride = f->scale_column_major ? high : 1;
    for (int64_t i = 0; i < high * wide; i++)
        value[i] = layer_number(f->scale, 1, s + (i / wide * w->scale_row_stride + i % wide * w->scale_col_stride) * bytes);
    w->zero_add = f->zero_add;
    if (f->zero >= ZERO_PACKED) {
        moq_packing *p = &w->zero_packing;
        *p = w->packing;
        if (f->zero == ZERO_PACKED) p->along_rows = 1;
        int64_t words = layer_strides(p, high, wide, f->scale_column_major);
        uint8_t *data = (uint8_t *)layer_memory(l, (size_t)(words * p->word_bits / 8));
        w->zeros.data = data;
        w->zeros.dtype = p->word_bits == 32 ? MOQ_I32 : MOQ_I8;
        w->zeros.count = (uint64_t)words;
        for (int64_t i = 0; i < high * wide; i++) {
            uint32_t code = f->zero == ZERO_BYTES ? test_random() % 256 : test_random() % (1u << f->bits);
            zero[i] = (f->zero == ZERO_BYTES ? (double)(int8_t)code : (double)code) + f->zero_add;
            layer_put(data, p, i / wide, i % wide, code);
        }
    } else for (int64_t i = 0; i < high * wide; i++) zero[i] = f->zero == ZERO_CONSTANT ? f->zero_add : 0;
    for (int64_t c = 0; index && c < w->cols; c++) index[c] = (int32_t)(c / f->group_cols);
    for (int64_t c = w->cols - 1; index && c > 0; c--) { /* shuffled */
        int64_t o = test_random() % (uint32_t)(c + 1);
        int32_t t = index[c];
        index[c] = index[o];
        index[o] = t;
    }
    w->group_index.data = index;
    w->group_index.dtype = MOQ_I32;
    w->group_index.count = index ? (uint64_t)w->cols : 0;
    if (f->global) *(f->global == 1 ? &w->global_mul : &w->global_div) = f->global == 1 ? 0.0123f : 87.5f;
    for (int64_t r = 0; r < w->rows; r++)
        for (int64_t c = 0; c < w->cols; c++) {
            int64_t i = (f->group_rows < 0 ? 0 : r / f->group_rows) * wide + (index ? index[c] : f->group_cols < 0 ? 0 : c / f->group_cols);
            double *v = &l->exact[r * w->cols + c];
            *v = (*v - zero[i]) * value[i] * (double)w->global_mul / (double)w->global_div;
        }
}

/* A layer of about rows x cols (rounded up to what the format allows). */
static void layer_make(layer *l, const layer_format *f, int64_t rows, int64_t cols)
{
    memset(l, 0, sizeof *l);
    moq_linear *w = &l->w;
    w->name = w->tensor = f->name;
    w->rows = (rows + f->row_unit - 1) / f->row_unit * f->row_unit;
    w->cols = (cols + f->col_unit - 1) / f->col_unit * f->col_unit;
    w->row_step = 1;
    w->global_mul = w->global_div = 1;
    w->scheme.weight.elem = f->elem;
    w->scheme.weight.group_rows = f->group_rows;
    w->scheme.weight.group_cols = f->group_cols;
    w->scheme.weight.scale = f->scale;
    w->scheme.weight.has_global = f->global != 0;
    w->scheme.weight.zero_point = f->zero >= ZERO_PACKED;
    w->scheme.act_order = (uint8_t)f->act_order;
    w->packing.bits = (uint8_t)f->bits;
    w->packing.word_bits = (uint8_t)f->word_bits;
    w->packing.along_rows = (uint8_t)f->along_rows;
    w->packing.padded = (uint8_t)f->padded;
    w->packing.awq_order = (uint8_t)f->awq;
    w->packing.is_unsigned = (uint8_t)f->is_unsigned;
    l->exact = (double *)layer_memory(l, (size_t)(w->rows * w->cols) * sizeof(double));
    layer_make_codes(l, f);
    if (f->scale != MOQ_NONE) layer_make_scales(l, f);
}

/* count random F32 numbers that live as long as the layer. */
MOQI_UNUSED static float *layer_floats(layer *l, int64_t count, float factor)
{
    float *v = (float *)layer_memory(l, (size_t)count * sizeof *v);
    for (int64_t i = 0; i < count; i++) v[i] = test_normal() * factor;
    return v;
}

MOQI_UNUSED static moq_view layer_view(const void *data, moq_dtype dtype, int64_t count)
{
    moq_view v;
    v.data = data;
    v.dtype = dtype;
    v.count = (uint64_t)count;
    return v;
}

/* Input codings that some reader produces. */
typedef struct input_format { const char *name; moq_coding c; float scale; int32_t zero; } input_format;

MOQI_UNUSED static const input_format input_formats[] = {
    {"fp8 static", {MOQ_F8_E4M3, MOQ_ALL, MOQ_ALL, MOQ_F32, 0, 0, 0, 0}, 0.013f, 0},
    {"fp8 token", {MOQ_F8_E4M3, 1, MOQ_ALL, MOQ_F32, 0, 1, 0, 0}, 0, 0},
    {"fp8 group 128", {MOQ_F8_E4M3, 1, 128, MOQ_F32, 0, 1, 0, 0}, 0, 0},
    {"int8 static", {MOQ_I8, MOQ_ALL, MOQ_ALL, MOQ_F32, 0, 0, 0, 0}, 0.02f, 0},
    {"int8 static asymmetric", {MOQ_I8, MOQ_ALL, MOQ_ALL, MOQ_F32, 0, 0, 1, 0}, 0.03f, -37},
    {"int8 token", {MOQ_I8, 1, MOQ_ALL, MOQ_F32, 0, 1, 0, 0}, 0, 0},
    {"int8 token asymmetric", {MOQ_I8, 1, MOQ_ALL, MOQ_F32, 0, 1, 1, 0}, 0, 0},
    {"nvfp4", {MOQ_F4, 1, 16, MOQ_F8_E4M3, 1, 1, 0, 0}, 0.0008f, 0},
    {"mxfp4 ceil", {MOQ_F4, 1, 32, MOQ_F8_E8M0, 0, 1, 0, MOQ_RULE_E8M0_CEIL}, 0, 0},
    {"mxfp4 round", {MOQ_F4, 1, 32, MOQ_F8_E8M0, 0, 1, 0, MOQ_RULE_E8M0_ROUND}, 0, 0},
    {"mxfp8 ceil", {MOQ_F8_E4M3, 1, 32, MOQ_F8_E8M0, 0, 1, 0, MOQ_RULE_E8M0_CEIL}, 0, 0},
    {"mxfp8 round", {MOQ_F8_E4M3, 1, 32, MOQ_F8_E8M0, 0, 1, 0, MOQ_RULE_E8M0_ROUND}, 0, 0}
};
#endif
