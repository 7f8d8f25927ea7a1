/* moq_measure.h - the part of moq.c that measures: random layers of every kind, the verbs bench and selftest.

   moq.c includes it once; it is no interface. The numbers of a layer are evaluated here a second time, in float64 and straight
   from the stored bits, so that selftest does not ask the library whether the library is right. */

/* ------------------------------------------------------------------------------------------------
   >>layers          random layers of every kind
   ------------------------------------------------------------------------------------------------ */

/* How codes lie in memory. */
enum {
    LAY_PLAIN,  /* row-major elements of 16 or 32 bits */
    LAY_BYTES,  /* row-major, the lower bits first: NVFP4, MXFP4, FP8, INT8 */
    LAY_PAIRS,  /* two rows a byte: ModelOpt's INT4 */
    LAY_WORDS,  /* 32-bit words along the columns, offset codes: compressed-tensors */
    LAY_GPTQ,   /* 32-bit words along the columns, [cols * bits / 32, rows] */
    LAY_AWQ     /* eight rows a 32-bit word in AWQ's order, [cols, rows / 8] */
};

typedef struct layer_kind {
    const char *name;
    int lay, bits, zeros, hadamard; /* zeros: zero points are stored; hadamard: block of the input transform */
    float input_scale;
    moq_scheme scheme;
} layer_kind;

#define CODE_WIDE {MOQ_NONE, 0, 0, MOQ_NONE, 0, 0, 0, 0}
#define CODE_NVFP4(group, dynamic) {MOQ_F4, 1, group, MOQ_F8_E4M3, 1, dynamic, 0, 0}
#define CODE_MX(elem, dynamic) {elem, 1, 32, MOQ_F8_E8M0, 0, dynamic, 0, (dynamic) ? MOQ_RULE_E8M0_CEIL : 0}
#define CODE_TENSOR(elem) {elem, MOQ_ALL, MOQ_ALL, MOQ_F32, 0, 0, 0, 0}
#define CODE_ROW(elem, dynamic) {elem, 1, MOQ_ALL, MOQ_F32, 0, dynamic, 0, 0}
#define CODE_GROUP(elem, group, scale, zero) {elem, 1, group, scale, 0, 0, zero, 0}

/* One of every kind of layer that a checkpoint can hold: each is benchmarked and tested by its name. */
static const layer_kind layer_kinds[] = {
    {"f32", LAY_PLAIN, 32, 0, 0, 0, {{MOQ_F32, 0, 0, MOQ_NONE, 0, 0, 0, 0}, CODE_WIDE, 0, 0, 0, 0, 0}},
    {"f16", LAY_PLAIN, 16, 0, 0, 0, {{MOQ_F16, 0, 0, MOQ_NONE, 0, 0, 0, 0}, CODE_WIDE, 0, 0, 0, 0, 0}},
    {"bf16", LAY_PLAIN, 16, 0, 0, 0, {{MOQ_BF16, 0, 0, MOQ_NONE, 0, 0, 0, 0}, CODE_WIDE, 0, 0, 0, 0, 0}},
    {"nvfp4", LAY_BYTES, 4, 0, 0, 0.002f, {CODE_NVFP4(16, 0), CODE_NVFP4(16, 1), 0, 0, 0, 0, 0}},
    {"nvfp4_awq", LAY_BYTES, 4, 0, 0, 0.002f, {CODE_NVFP4(16, 0), CODE_NVFP4(16, 1), 1, 0, 0, 0, 0}},
    {"nvfp4_svd", LAY_BYTES, 4, 0, 0, 0.002f, {CODE_NVFP4(16, 0), CODE_NVFP4(16, 1), 1, 0, 0, 0, 8}},
    {"w4a16_nvfp4", LAY_BYTES, 4, 0, 0, 0, {CODE_NVFP4(16, 0), CODE_WIDE, 0, 0, 0, 0, 0}},
    {"w4a8_nvfp4_fp8", LAY_BYTES, 4, 0, 0, 0.02f, {CODE_NVFP4(32, 0), CODE_TENSOR(MOQ_F8_E4M3), 0, 0, 0, 0, 0}},
    {"mxfp4", LAY_BYTES, 4, 0, 0, 0, {CODE_MX(MOQ_F4, 0), CODE_MX(MOQ_F4, 1), 0, 0, 0, 0, 0}},
    {"w4a16_mxfp4", LAY_BYTES, 4, 0, 0, 0, {CODE_MX(MOQ_F4, 0), CODE_WIDE, 0, 0, 0, 0, 0}},
    {"w4a8_mxfp4_fp8", LAY_BYTES, 4, 0, 0, 0, {CODE_MX(MOQ_F4, 0), CODE_ROW(MOQ_F8_E4M3, 1), 0, 0, 0, 0, 0}},
    {"mxfp8", LAY_BYTES, 8, 0, 0, 0, {CODE_MX(MOQ_F8_E4M3, 0), CODE_MX(MOQ_F8_E4M3, 1), 0, 0, 0, 0, 0}},
    {"fp8", LAY_BYTES, 8, 0, 0, 0.02f, {CODE_TENSOR(MOQ_F8_E4M3), CODE_TENSOR(MOQ_F8_E4M3), 0, 0, 0, 0, 0}},
    {"w8a16_fp8", LAY_BYTES, 8, 0, 0, 0, {CODE_TENSOR(MOQ_F8_E4M3), CODE_WIDE, 0, 0, 0, 0, 0}},
    {"fp8_pc_pt", LAY_BYTES, 8, 0, 0, 0, {CODE_ROW(MOQ_F8_E4M3, 0), CODE_ROW(MOQ_F8_E4M3, 1), 0, 0, 0, 0, 0}},
    {"fp8_block128", LAY_BYTES, 8, 0, 0, 0, {{MOQ_F8_E4M3, 128, 128, MOQ_F32, 0, 0, 0, 0}, {MOQ_F8_E4M3, 1, 128, MOQ_F32, 0, 1, 0, 0}, 0, 0, 0, 0, 0}},
    {"fp8_pb_wo", LAY_BYTES, 8, 0, 0, 0, {{MOQ_F8_E4M3, 128, 128, MOQ_F32, 0, 0, 0, 0}, CODE_WIDE, 0, 0, 0, 0, 0}},
    {"int8", LAY_BYTES, 8, 0, 0, 0.05f, {CODE_ROW(MOQ_I8, 0), CODE_TENSOR(MOQ_I8), 0, 0, 0, 0, 0}},
    {"int8_sq", LAY_BYTES, 8, 0, 0, 0.05f, {CODE_ROW(MOQ_I8, 0), CODE_TENSOR(MOQ_I8), 1, 0, 0, 0, 0}},
    {"int8_pc_pt", LAY_BYTES, 8, 0, 0, 0, {CODE_ROW(MOQ_I8, 0), CODE_ROW(MOQ_I8, 1), 0, 0, 0, 0, 0}},
    {"w8a16", LAY_BYTES, 8, 0, 0, 0, {CODE_ROW(MOQ_I8, 0), CODE_WIDE, 0, 0, 0, 0, 0}},
    {"int4", LAY_PAIRS, 4, 0, 0, 0, {CODE_GROUP(MOQ_I4, 128, MOQ_F32, 0), CODE_WIDE, 0, 0, 0, 0, 0}},
    {"int4_awq", LAY_PAIRS, 4, 0, 0, 0, {CODE_GROUP(MOQ_I4, 128, MOQ_F32, 0), CODE_WIDE, 1, 0, 0, 0, 0}},
    {"w4a8_awq", LAY_PAIRS, 4, 0, 0, 0.02f, {{MOQ_I4, 1, 128, MOQ_F32, 1, 0, 0, 0}, CODE_TENSOR(MOQ_F8_E4M3), 1, 0, 1, 0, 0}},
    {"int4_packed_g32", LAY_WORDS, 4, 1, 0, 0, {CODE_GROUP(MOQ_I4, 32, MOQ_BF16, 1), CODE_WIDE, 0, 0, 0, 0, 0}},
    {"int3_packed_g64", LAY_WORDS, 3, 0, 0, 0, {CODE_GROUP(MOQ_I3, 64, MOQ_BF16, 0), CODE_WIDE, 0, 0, 0, 0, 0}},
    {"int4_hadamard", LAY_WORDS, 4, 0, 32, 0, {CODE_GROUP(MOQ_I4, 32, MOQ_BF16, 0), CODE_WIDE, 0, 0, 0, 1, 0}},
    {"w4a8_int4", LAY_WORDS, 4, 0, 0, 0, {CODE_GROUP(MOQ_I4, 128, MOQ_BF16, 0), CODE_ROW(MOQ_I8, 1), 0, 0, 0, 0, 0}},
    {"gptq_int4_g128", LAY_GPTQ, 4, 1, 0, 0, {CODE_GROUP(MOQ_I4, 128, MOQ_F16, 1), CODE_WIDE, 0, 0, 0, 0, 0}},
    {"gptq_int8_g128", LAY_GPTQ, 8, 1, 0, 0, {CODE_GROUP(MOQ_I8, 128, MOQ_F16, 1), CODE_WIDE, 0, 0, 0, 0, 0}},
    {"gptq_int4_g32_act_order", LAY_GPTQ, 4, 1, 0, 0, {CODE_GROUP(MOQ_I4, 32, MOQ_F16, 1), CODE_WIDE, 0, 1, 0, 0, 0}},
    {"awq_int4_g64", LAY_AWQ, 4, 1, 0, 0, {CODE_GROUP(MOQ_I4, 64, MOQ_F16, 1), CODE_WIDE, 0, 0, 0, 0, 0}}
};

static const layer_kind *find_kind(const char *name)
{
    for (int i = 0; i < COUNT(layer_kinds); i++)
        if (strcmp(layer_kinds[i].name, name) == 0) return &layer_kinds[i];
    return NULL;
}

/* A layer over memory of its own. */
typedef struct layer {
    moq_linear l;
    const layer_kind *kind;
    uint64_t bytes; /* codes, scales and zero points: what one pass over the weight reads */
    void *memory[8];
    int count;
} layer;

/* In pages as the library asks for them. */
static void *layer_memory(layer *w, size_t bytes)
{
    void *p = moq_allocate(NULL, bytes + 8);
    if (!p) {
        drop_unfinished();
        exit(refuse("out of memory (%zu bytes)", bytes));
    }
    w->memory[w->count++] = p;
    return p;
}

static void free_layer(layer *w)
{
    for (int i = 0; i < w->count; i++) moq_release(NULL, w->memory[i], 0);
    memset(w, 0, sizeof *w);
}

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state * 0x2545f4914f6cdd1du;
}

static double random_unit(uint64_t *state) { return (double)(next_random(state) >> 11) / 9007199254740992.0; }

/* Sum of four uniform values, with an outlier every fifty or so. */
static double random_value(uint64_t *state)
{
    double x = random_unit(state) + random_unit(state) + random_unit(state) + random_unit(state) - 2;
    return next_random(state) >> 32 < (uint64_t)1 << 26 ? x * 40 : x;
}

static void fill_random(void *data, size_t bytes, uint64_t *state)
{
    for (size_t i = 0; i + 8 <= bytes; i += 8) {
        uint64_t r = next_random(state);
        memcpy((char *)data + i, &r, 8);
    }
    for (size_t i = bytes / 8 * 8; i < bytes; i++) ((uint8_t *)data)[i] = (uint8_t)(next_random(state) >> 33);
}

static void put_number(void *data, moq_dtype dtype, int64_t index, double value)
{
    float f = (float)value;
    uint16_t h = dtype == MOQ_F16 ? moq_f16_encode(f) : moq_bf16_encode(f);
    if (dtype == MOQ_F32) memcpy((char *)data + 4 * index, &f, 4);
    else memcpy((char *)data + 2 * index, &h, 2);
}

/* Numbers of a stored type as a view over new memory. */
static moq_view random_view(layer *w, moq_dtype dtype, int64_t count, double base, double spread, uint64_t *state)
{
    moq_view v;
    void *data = layer_memory(w, (size_t)count * (size_t)moq_dtype_bits(dtype) / 8);
    for (int64_t i = 0; i < count; i++) {
        if (dtype == MOQ_F8_E8M0) ((uint8_t *)data)[i] = (uint8_t)(117 + next_random(state) % 8);
        else if (dtype == MOQ_F8_E4M3) ((uint8_t *)data)[i] = (uint8_t)(0x20 + next_random(state) % 0x30);
        else put_number(data, dtype, i, base + spread * (random_unit(state) - 0.5));
    }
    v.data = data;
    v.dtype = dtype;
    v.count = (uint64_t)count;
    return v;
}

static void pack_layer(layer *w, uint64_t *state)
{
    moq_linear *l = &w->l;
    moq_packing *p = &l->packing;
    int64_t bits = w->kind->bits, words = (l->cols * bits + 31) / 32, bytes = l->rows * words * 4;
    uint8_t *codes;
    p->bits = (uint8_t)bits;
    p->word_bits = 32;
    p->is_unsigned = w->kind->lay >= LAY_WORDS;
    p->row_stride = words;
    p->col_stride = 1;
    if (w->kind->lay == LAY_BYTES || w->kind->lay == LAY_PAIRS) {
        p->word_bits = 8;
        p->row_stride = (l->cols * bits + 7) / 8;
        bytes = l->rows * p->row_stride;
    }
    if (w->kind->lay == LAY_PAIRS) {
        p->along_rows = 1;
        p->row_stride = l->cols;
        bytes = (l->rows + 1) / 2 * l->cols;
    }
    if (w->kind->lay == LAY_GPTQ) { p->row_stride = 1; p->col_stride = l->rows; }
    if (w->kind->lay == LAY_AWQ) {
        p->along_rows = p->awq_order = 1;
        p->row_stride = 1;
        p->col_stride = l->rows / 8;
        bytes = l->cols * l->rows / 2;
    }
    codes = (uint8_t *)layer_memory(w, (size_t)bytes);
    fill_random(codes, (size_t)bytes, state);
    for (int64_t i = 0; i < bytes && l->scheme.weight.elem == MOQ_F8_E4M3; i++)
        if ((codes[i] & 0x7f) == 0x7f) codes[i] &= 0xf7; /* no NaN */
    l->codes.data = codes;
    l->codes.dtype = p->word_bits == 32 ? MOQ_I32 : l->scheme.weight.elem == MOQ_F8_E4M3 || l->scheme.weight.elem == MOQ_I8 ? l->scheme.weight.elem : MOQ_U8;
    l->codes.count = (uint64_t)(bytes * 8 / p->word_bits);
    w->bytes += (uint64_t)bytes;
}

/* Scales row-major [row groups, column groups], but [column groups, rows] for GPTQ and AWQ; zero points packed along the rows. */
static void scale_layer(layer *w, uint64_t *state)
{
    moq_linear *l = &w->l;
    const moq_coding *c = &l->scheme.weight;
    int turned = w->kind->lay == LAY_GPTQ || w->kind->lay == LAY_AWQ;
    int64_t groups = c->group_cols > 0 ? (l->cols + c->group_cols - 1) / c->group_cols : 1;
    int64_t lines = c->group_rows > 0 ? (l->rows + c->group_rows - 1) / c->group_rows : 1;
    l->scales = random_view(w, c->scale, lines * groups, 0.012, 0.016, state);
    w->bytes += l->scales.count * (uint64_t)moq_dtype_bits(c->scale) / 8;
    l->scale_row_stride = turned ? 1 : c->group_rows > 0 ? groups : 0;
    l->scale_col_stride = turned ? lines : groups > 1 || c->group_cols > 0 ? 1 : 0;
    if (c->has_global && !l->scheme.requantize_fp8) l->global_mul = 0.037f;
    if (l->packing.is_unsigned) l->zero_add = w->kind->zeros ? turned && w->kind->lay == LAY_GPTQ : 1 << (w->kind->bits - 1);
    if (w->kind->zeros) {
        int64_t words = (l->rows * w->kind->bits + 31) / 32;
        void *zeros = layer_memory(w, (size_t)(words * groups * 4));
        fill_random(zeros, (size_t)(words * groups * 4), state);
        l->zeros.data = zeros;
        l->zeros.dtype = MOQ_I32;
        l->zeros.count = (uint64_t)(words * groups);
        l->zero_packing = l->packing;
        l->zero_packing.along_rows = 1;
        l->zero_packing.row_stride = turned ? 1 : groups;
        l->zero_packing.col_stride = turned ? words : 1;
        w->bytes += (uint64_t)(words * groups * 4);
    }
    if (l->scheme.act_order) {
        int32_t *order = (int32_t *)layer_memory(w, (size_t)l->cols * 4);
        for (int64_t i = 0; i < l->cols; i++) order[i] = (int32_t)(i * 7 % groups);
        l->group_index.data = order;
        l->group_index.dtype = MOQ_I32;
        l->group_index.count = (uint64_t)l->cols;
    }
}

static void make_layer(layer *w, const layer_kind *kind, int64_t rows, int64_t cols, int with_bias, uint64_t seed)
{
    uint64_t state = seed * 0x9e3779b97f4a7c15u + 88172645463325252u;
    moq_linear *l = &w->l;
    memset(w, 0, sizeof *w);
    w->kind = kind;
    if (kind->lay == LAY_PLAIN) {
        moq_view v = random_view(w, kind->scheme.weight.elem, rows * cols, 0, 0.2, &state);
        moq_make_linear(l, kind->name, v.dtype, v.data, rows, cols);
        w->bytes = v.count * (uint64_t)kind->bits / 8;
    } else {
        l->name = l->tensor = kind->name;
        l->rows = rows;
        l->cols = cols;
        l->row_step = 1;
        l->scheme = kind->scheme;
        l->global_mul = l->global_div = 1;
        l->input_scale = kind->input_scale;
        l->requant_scale = kind->scheme.requantize_fp8 ? 0.0021f : 0;
        pack_layer(w, &state);
        scale_layer(w, &state);
    }
    if (with_bias) l->bias = random_view(w, MOQ_F32, rows, 0, 1, &state);
    if (kind->scheme.pre_quant_scale) l->pre_quant_scale = random_view(w, MOQ_BF16, cols, 1, 1.5, &state);
    if (kind->scheme.lora_rank) l->lora_a = random_view(w, MOQ_BF16, kind->scheme.lora_rank * cols, 0, 0.2, &state);
    if (kind->scheme.lora_rank) l->lora_b = random_view(w, MOQ_BF16, rows * kind->scheme.lora_rank, 0, 0.2, &state);
    l->hadamard_size = kind->hadamard;
    l->hadamard_scale = kind->hadamard ? (float)(1 / sqrt((double)kind->hadamard)) : 0;
}

/* ---- the same numbers in float64, straight from the bits ---- */

/* The stored code at packed position `at` of line `line`. */
static uint32_t code_bits(const moq_view *v, const moq_packing *p, int64_t row, int64_t col)
{
    int64_t at = p->along_rows ? row : col, line = p->along_rows ? col : row;
    int64_t step = p->along_rows ? p->row_stride : p->col_stride, base = line * (p->along_rows ? p->col_stride : p->row_stride);
    uint32_t code = 0;
    if (p->awq_order) at = at / 8 * 8 + (at % 2 ? 4 + at % 8 / 2 : at % 8 / 2);
    for (int b = 0; b < p->bits; b++) { /* bit by bit: codes may straddle two words */
        int64_t bit = at * p->bits + b, word = base + bit / p->word_bits * step, byte = word * (p->word_bits / 8) + bit % p->word_bits / 8;
        code |= (uint32_t)(((const uint8_t *)v->data)[byte] >> (bit % 8) & 1) << b;
    }
    return code;
}

/* sign, e exponent bits, m mantissa bits, bias 2^(e-1) - 1 */
static double small_float(uint32_t code, int e, int m)
{
    uint32_t fraction = code & ((1u << m) - 1), exponent = code >> m & ((1u << e) - 1);
    double v = exponent ? ldexp(1 + ldexp((double)fraction, -m), (int)exponent - (1 << (e - 1)) + 1) : ldexp((double)fraction, 2 - (1 << (e - 1)) - m);
    return code >> (e + m) & 1 ? -v : v;
}

static double signed_code(uint32_t code, const moq_packing *p)
{
    return p->is_unsigned || !(code >> (p->bits - 1) & 1) ? (double)code : (double)code - ldexp(1, p->bits);
}

static double weight_at(const layer *w, int64_t r, int64_t c)
{
    const moq_linear *l = &w->l;
    const moq_coding *k = &l->scheme.weight;
    int64_t g = l->group_index.data ? ((const int32_t *)l->group_index.data)[c] : k->group_cols > 0 ? c / k->group_cols : 0;
    int64_t at = (k->group_rows > 0 ? r / k->group_rows : 0) * l->scale_row_stride + g * l->scale_col_stride;
    uint32_t code;
    double v, scale;
    if (w->kind->lay == LAY_PLAIN) return (double)view_float(&l->codes, r * l->cols + c);
    code = code_bits(&l->codes, &l->packing, r, c);
    if (k->elem == MOQ_F4) v = small_float(code, 2, 1);
    else if (k->elem == MOQ_F8_E4M3) v = small_float(code, 4, 3);
    else v = signed_code(code, &l->packing) - l->zero_add;
    if (l->zeros.data) v -= signed_code(code_bits(&l->zeros, &l->zero_packing, r, g), &l->zero_packing);
    if (k->scale == MOQ_F8_E4M3) scale = small_float(((const uint8_t *)l->scales.data)[at], 4, 3);
    else if (k->scale == MOQ_F8_E8M0) scale = ldexp(1, ((const uint8_t *)l->scales.data)[at] - 127);
    else scale = (double)view_float(&l->scales, at);
    return v * scale * (double)l->global_mul / (double)l->global_div;
}

/* ------------------------------------------------------------------------------------------------
   >>bench           how fast layers and folders run
   ------------------------------------------------------------------------------------------------ */

/* Memory of a plain read. */
typedef struct span { const void *data; uint64_t bytes; } span;

typedef struct reader {
    const span *at;                              /* [count] */
    int count, first, turns, loop, threads;      /* spans first, first + 1, ... in turn */
    uint64_t sum;
} reader;

enum { READ_LOOPS = 5, TEAM_THREADS = 256, SMALL_SPAN = 65536 };

/* Parts of a work, one a thread. Threads begin together once all of them run: starting and joining them is not timed. */
typedef struct team {
    void (*work)(void *user, int part);
    void *user;
    uint64_t ready, go;
} team;

typedef struct member { team *of; int part, started; double end; } member;

static void *member_worker(void *user)
{
    member *m = (member *)user;
    moqi_atomic_add(&m->of->ready, 1);
    while (!moqi_atomic_get(&m->of->go)) sched_yield();
    m->of->work(m->of->user, m->part);
    m->end = moq_seconds();
    return NULL;
}

/* Seconds from the common start to the end of the last part. Parts whose thread cannot be had follow the caller's own. */
static double time_team(void (*work)(void *user, int part), void *user, int threads)
{
    pthread_t id[TEAM_THREADS];
    member m[TEAM_THREADS];
    team all = {NULL, NULL, 0, 0};
    uint64_t started = 0;
    double start, end;
    all.work = work;
    all.user = user;
    for (int i = 1; i < threads; i++) {
        m[i].of = &all;
        m[i].part = i;
        m[i].end = 0;
        m[i].started = pthread_create(&id[i], NULL, member_worker, &m[i]) == 0;
        started += (uint64_t)m[i].started;
    }
    while (moqi_atomic_get(&all.ready) < started) sched_yield();
    start = moq_seconds();
    moqi_atomic_set(&all.go, 1);
    work(user, 0);
    for (int i = 1; i < threads; i++)
        if (!m[i].started) work(user, i);
    end = moq_seconds();
    for (int i = 1; i < threads; i++) {
        if (!m[i].started) continue;
        pthread_join(id[i], NULL);
        end = m[i].end > end ? m[i].end : end;
    }
    return end - start;
}

static uint64_t read_word(const char *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* One of several plain read loops: `streams` cursors side by side, prefetching `ahead` bytes. */
static uint64_t read_loop(const char *p, size_t bytes, size_t streams, size_t ahead)
{
    uint64_t s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
    size_t part = bytes / streams / 64 * 64;
    for (size_t i = 0; i < part; i += 64)
        for (size_t k = 0; k < streams; k++) {
            const char *q = p + k * part + i;
#if defined(__GNUC__)
            if (ahead) __builtin_prefetch(q + ahead);
#endif
            s0 += read_word(q); s1 += read_word(q + 8); s2 += read_word(q + 16); s3 += read_word(q + 24);
            s4 += read_word(q + 32); s5 += read_word(q + 40); s6 += read_word(q + 48); s7 += read_word(q + 56);
        }
    for (size_t i = part * streams; i + 8 <= bytes; i += 8) s0 += read_word(p + i); /* what the streams leave */
    for (size_t i = bytes / 8 * 8; i < bytes; i++) s0 += (uint8_t)p[i];
    return s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7;
}

/* Each span is divided among the threads; small ones are dealt out whole, SMALL_SPAN bytes of them to each thread in turn. */
static void read_part(void *user, int part)
{
    static const size_t streams[READ_LOOPS] = {1, 1, 4, 4, 8}, ahead[READ_LOOPS] = {0, 1024, 0, 512, 0};
    reader *r = (reader *)user + part;
    uint64_t dealt = 0;
    for (int i = 0; i < r->turns; i++) {
        const span *s = &r->at[(r->first + i) % r->count];
        size_t bytes = (size_t)s->bytes, share = bytes / (size_t)r->threads / 64 * 64, from = share * (size_t)part;
        if (bytes == 0) continue;
        if (bytes < SMALL_SPAN) {
            int mine = (int)(dealt / SMALL_SPAN % (uint64_t)r->threads) == part;
            dealt += bytes;
            if (!mine) continue;
            from = 0;
        } else
            bytes = part == r->threads - 1 ? bytes - from : share;
        r->sum += read_loop((const char *)s->data + from, bytes, streams[r->loop], ahead[r->loop]);
    }
}

/* Seconds of one plain read of `turns` spans from `first` on, with all threads. */
static double read_spans(const span *at, int count, int first, int turns, int loop, int threads)
{
    reader r[TEAM_THREADS];
    double seconds;
    uint64_t sum = 0;
    if (threads > TEAM_THREADS) threads = TEAM_THREADS;
    for (int i = 0; i < threads; i++) {
        r[i].at = at;
        r[i].count = count;
        r[i].first = first;
        r[i].turns = turns;
        r[i].loop = loop;
        r[i].threads = threads;
        r[i].sum = 0;
    }
    seconds = time_team(read_part, r, threads);
    for (int i = 0; i < threads; i++) sum += r[i].sum; /* the sums are used, so the loops stay */
    return sum == 1 ? seconds + 1e-12 : seconds;
}

/* ---- what the arithmetic units can do: multiply-adds in registers, by the instruction that a row of the table was computed with ---- */

enum { PEAK_NONE, PEAK_FMA, PEAK_VNNI, PEAK_PAIRS, PEAK_AMX, PEAK_AMX_BYTES, PEAK_AMX_PARTS };

#if defined(__x86_64__) && defined(__GNUC__) && !defined(MOQ_NO_SIMD)
#define PEAK_TEN(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9)
/* 10 independent sums hide the latency; -> operations of one pass over them */
__attribute__((target("avx512f,avx512vnni"))) static double peak_512(int kind, int passes)
{
    __m512 f = _mm512_set1_ps(0.5f);
#define PEAK_F(i) __asm__ volatile("vfmadd231ps %0, %0, %%zmm" #i : : "v"(f) : "xmm" #i);
#define PEAK_V(i) __asm__ volatile("vpdpbusd %0, %0, %%zmm" #i : : "v"(f) : "xmm" #i);
#define PEAK_P(i) __asm__ volatile("vdpbf16ps %0, %0, %%zmm" #i : : "v"(f) : "xmm" #i);
    for (int p = 0; p < passes && kind == PEAK_FMA; p++) { PEAK_TEN(PEAK_F) }
    for (int p = 0; p < passes && kind == PEAK_VNNI; p++) { PEAK_TEN(PEAK_V) }
#ifdef MOQI_BF16
    for (int p = 0; p < passes && kind == PEAK_PAIRS; p++) { PEAK_TEN(PEAK_P) }
#endif
    return (kind == PEAK_VNNI ? 128.0 : kind == PEAK_PAIRS ? 64.0 : 32.0) * 10 * passes;
}

__attribute__((target("avx2,fma"))) static double peak_256(int passes)
{
    __m256 f = _mm256_set1_ps(0.5f);
#define PEAK_Y(i) __asm__ volatile("vfmadd231ps %0, %0, %%ymm" #i : : "x"(f) : "xmm" #i);
    for (int p = 0; p < passes; p++) { PEAK_TEN(PEAK_Y) }
    return 16.0 * 10 * passes;
}

/* AVX-VNNI: the same instruction in 256 bits. */
static double peak_bytes_256(int passes)
{
#ifdef MOQI_DOTPROD
#define PEAK_B(i) __asm__ volatile("%{vex%} vpdpbusd %%ymm15, %%ymm15, %%ymm" #i : : : "xmm" #i);
    for (int p = 0; p < passes; p++) { PEAK_TEN(PEAK_B) }
    __asm__ volatile("vzeroupper");
#endif
    return 64.0 * 10 * passes;
}

/* Four sums of 16 x 16 with 16 x 32 x 16 products each, of bytes twice as many. Of numbers: with zeros the processor runs faster than it ever
   does at work. */
static double peak_amx(int bytes, int passes)
{
#ifdef MOQI_AMX
    uint16_t some[512]; /* from 1 to 2, of both signs */
    for (int i = 0; i < 512; i++) some[i] = (uint16_t)(0x3f80 | (i * 40503 >> 4 & 0x807f));
    moqi_amx_configure(16, 16);
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm4\n\ttileloadd (%0,%1,1), %%tmm5\n\ttileloadd (%0,%1,1), %%tmm6\n\ttileloadd (%0,%1,1), %%tmm7"
                     : : "r"(some), "r"((int64_t)64) : "memory");
    for (int p = 0; p < passes && bytes; p++)
        __asm__ volatile("tdpbsud %%tmm6, %%tmm4, %%tmm0\n\ttdpbsud %%tmm7, %%tmm4, %%tmm1\n\t"
                         "tdpbsud %%tmm6, %%tmm5, %%tmm2\n\ttdpbsud %%tmm7, %%tmm5, %%tmm3" : : : "memory");
    for (int p = 0; p < passes && !bytes; p++)
        __asm__ volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\ttdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
                         "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3" : : : "memory");
    __asm__ volatile("tilerelease");
#endif
    return 4.0 * 16384 * (bytes ? 2 : 1) * passes;
}

typedef struct peak_work { int kind, wide; double operations; } peak_work;

static void peak_part(void *user, int part)
{
    peak_work *w = (peak_work *)user + part;
    w->operations = w->kind >= PEAK_AMX ? peak_amx(w->kind == PEAK_AMX_BYTES, 15000) : w->wide ? peak_512(w->kind, 150000)
                    : w->kind == PEAK_VNNI ? peak_bytes_256(150000) : peak_256(150000);
}
#else
typedef struct peak_work { int kind, wide; double operations; } peak_work;
static void peak_part(void *user, int part) { ((peak_work *)user)[part].operations = 0; }
#endif

/* Which instruction does the backend's arithmetic for m rows? PEAK_AMX_PARTS: with F32 inputs in three parts, three products are one. */
static int peak_kind(const moq_backend *be, const moq_weight *w, int32_t m, const char *kernel)
{
    const moqi_way *way;
    if (strcmp(be->name, "cpu") != 0 || (strncmp(kernel, "avx", 3) != 0 && strcmp(kernel, "amx") != 0)) return PEAK_NONE;
    way = moqi_way_for(((const moqi_weight *)(const void *)w)->part, m);
#ifdef MOQI_AMX
    if (way == &moqi_amx_way_rows || way == &moqi_amx_way_i8) return PEAK_AMX_BYTES;
    if (way == &moqi_amx_way_wide) return PEAK_AMX_PARTS;
#endif
    return way && (way->unit == 2 || way->unit == MOQI_TWINS) ? strcmp(kernel, "amx") == 0 ? PEAK_AMX : PEAK_PAIRS : way && way->unit == 4 ? PEAK_VNNI : PEAK_FMA;
}

/* Operations per second of all threads together; 0 when there is no loop for this kind. */
static double peak_once(int kind, const char *kernel, int threads)
{
    peak_work w[TEAM_THREADS];
    double operations = 0, seconds;
    if (kind == PEAK_NONE || (kind == PEAK_VNNI && strncmp(kernel, "avx2", 4) == 0)) return 0;
    if (threads > TEAM_THREADS) threads = TEAM_THREADS;
    for (int i = 0; i < threads; i++) {
        w[i].kind = kind;
        w[i].wide = strncmp(kernel, "avx2", 4) != 0 && strcmp(kernel, "avxvnni") != 0;
        w[i].operations = 0;
    }
    seconds = time_team(peak_part, w, threads);
    for (int i = 0; i < threads; i++) operations += w[i].operations / (kind == PEAK_AMX_PARTS ? 3 : 1);
    return seconds > 0 ? operations / seconds : 0;
}

/* The best of three. */
static double peak_rate(int kind, const char *kernel, int threads)
{
    double best = 0;
    for (int run = 0; run < 3; run++) {
        const double rate = peak_once(kind, kernel, threads);
        if (rate > best) best = rate;
    }
    return best;
}

/* ---- what a GPU can do, see moq_cuda.cu; seconds, 0: unknown ---- */

#ifdef MOQ_CUDA
double moq_gpu_read_seconds(int device, uint64_t bytes, int copies);
double moq_gpu_blas_seconds(int device, int64_t rows, int64_t cols, int32_t m);
uint64_t moq_gpu_cache(int device);
#else
static double moq_gpu_read_seconds(int device, uint64_t bytes, int copies) { (void)device; (void)bytes; (void)copies; return 0; }
static double moq_gpu_blas_seconds(int device, int64_t rows, int64_t cols, int32_t m) { (void)device; (void)rows; (void)cols; (void)m; return 0; }
static uint64_t moq_gpu_cache(int device) { (void)device; return 0; }
#endif

/* Number of the device of a CUDA backend; -1: it is the CPU. */
static int gpu_of(const moq_backend *be) { return strncmp(be->name, "cuda", 4) == 0 ? atoi(be->name + (be->name[4] == ':' ? 5 : 4)) : -1; }

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *sample, int n)
{
    qsort(sample, (size_t)n, sizeof *sample, compare_doubles);
    return sample[n / 2];
}

/* The same as time_linear where a device records calls: a launch costs what it costs in a decoder, and nobody waits for the host. */
static double time_recorded(moq_backend *be, moq_weight *const *w, int count, const void *x, int32_t rows, void *y)
{
    double sample[25], start;
    int n = 0, turns = 1;
    moq_error err;
    moq_graph *g;
    be->linear(be, w[0], x, rows, y); /* code is loaded on first use */
    if (be->sync(be, &err) != MOQ_OK || be->capture_begin(be, &err) != MOQ_OK) { refuse_error(NULL, &err); return -1; }
    for (int i = 0; i < count; i++) be->linear(be, w[i], x, rows, y);
    g = be->capture_end(be, &err);
    if (!g) { refuse_error(NULL, &err); return -1; }
    for (int i = -2; i < COUNT(sample) && !stop_requested; i++) {
        start = moq_seconds();
        for (int k = 0; k < turns; k++) be->replay(be, g);
        if (be->sync(be, &err) != MOQ_OK) {
            refuse_error(NULL, &err);
            be->release_graph(be, g);
            return -1;
        }
        start = moq_seconds() - start;
        if (i == -2 && start < 0.003) turns = (int)(0.003 / (start + 1e-6)) + 1;
        if (i >= 0) sample[n++] = start / turns / count;
    }
    be->release_graph(be, g);
    if (n == 0) { refuse("stopped"); return -1; }
    return median(sample, n);
}

/* What a bench compares. Rounds of products with some weights in turn, of what the instruction gives alone, at the clock that the processor has
   then, and of plain reads of layers in turn by every loop: all are medians of the rounds' means, the read's of the loop that is fastest by that. */
typedef struct rounds {
    const span *read; /* [each * count]; NULL: nothing to read */
    int each, threads;
    uint64_t bytes;   /* of one layer */
    double plain;     /* seconds of a read of one layer; 0: unknown */
    int kind;         /* of peak */
    const char *kernel;
    double peak;      /* operations a second */
} rounds;

/* Seconds of one call over at least 0.4 s with what is read between. Negative after an error line. */
static double time_linear(moq_backend *be, moq_weight *const *w, int count, const void *x, int32_t rows, void *y, rounds *r)
{
    enum { ROUNDS = 64 };
    double sample[ROUNDS], plain[READ_LOOPS][ROUNDS], peak[ROUNDS], start, begun;
    int n = 0, turns, reads, at = 0;
    moq_error err;
    if (be->capture_begin && be->capture_end && be->replay && be->release_graph) return time_recorded(be, w, count, x, rows, y);
    be->linear(be, w[count - 1], x, rows, y);
    if (be->sync(be, &err) != MOQ_OK) { refuse_error(NULL, &err); return -1; }
    begun = start = moq_seconds();
    be->linear(be, w[at++ % count], x, rows, y);
    be->sync(be, NULL);
    turns = 1 + (int)(0.004 / (moq_seconds() - start + 1e-7)); /* long beside the clock */
    reads = 1 + (int)(((uint64_t)64 << 20) / (r->bytes + 1));  /* and so, however few the turns */
    if (reads < turns) reads = turns;
    while (n < ROUNDS && (n < 5 || moq_seconds() - begun < 0.4) && !stop_requested) {
        be->linear(be, w[at++ % count], x, rows, y); /* wakes threads */
        be->sync(be, NULL);
        start = moq_seconds();
        for (int i = 0; i < turns; i++) be->linear(be, w[at++ % count], x, rows, y);
        be->sync(be, NULL);
        sample[n] = (moq_seconds() - start) / turns;
        peak[n] = peak_once(r->kind, r->kernel, r->threads);
        for (int i = 0; i < READ_LOOPS && r->read; i++, at += reads)
            plain[i][n] = read_spans(r->read, r->each * count, r->each * (at % count), r->each * reads, i, r->threads) / reads;
        n++;
    }
    if (n == 0) { refuse("stopped"); return -1; }
    r->peak = median(peak, n);
    for (int i = 0; i < READ_LOOPS && r->read; i++) {
        double seconds = median(plain[i], n);
        if (i == 0 || seconds < r->plain) r->plain = seconds;
    }
    return median(sample, n);
}

typedef struct bench {
    const options *o;
    moq_backend *be;
    json_out j;
    int threads, gpu;                    /* gpu: the device, -1: the CPU */
    int32_t m[16];
    int m_count;
    double prompt_rate, generation_rate; /* tokens per second of a folder */
    double prompt_peak, read_ratio;      /* share of the peak of the instruction; of what a plain read of a token's weights would give */
} bench;

/* Bytes of the last-level cache; 64 MB where the system does not say. */
static uint64_t cache_bytes(int gpu)
{
    long bytes = 0;
    if (gpu >= 0 && moq_gpu_cache(gpu) > 0) return moq_gpu_cache(gpu);
#ifdef _SC_LEVEL3_CACHE_SIZE
    bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (bytes <= 0) bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return bytes > 0 ? (uint64_t)bytes : (uint64_t)64 << 20;
}

/* How many copies of a layer of so many bytes are used in turn, so that each comes from memory: twice the last-level cache, within an eighth of the memory. */
static int copies_of(const options *o, int gpu, uint64_t bytes)
{
    uint64_t wanted = 2 * cache_bytes(gpu), most = moq_machine_memory() / 8, copies;
    if (o->copies > 0) return (int)o->copies;
    copies = ((most && wanted > most ? most : wanted) + bytes - 1) / bytes;
    return copies < MOST_COPIES ? (int)copies : MOST_COPIES;
}

/* A number that may be unknown. */
static void json_ratio(json_out *j, const char *name, double value)
{
    if (value > 0) { json_number(j, name, value); return; }
    json_item(j, name);
    fputs("null", j->to);
}

/* plain: seconds of a plain read; peak: operations per second; blas: seconds of cuBLAS with BF16 weights. 0 when unknown. */
static void bench_report(bench *b, const layer *w, int copies, int32_t m, double seconds, double plain, double peak, double blas, const char *kernel)
{
    double flops = 2.0 * (double)m * (double)w->l.rows * (double)w->l.cols;
    if (!b->o->json) {
        char share[32] = "-", read[32] = "-";
        if (plain > 0) snprintf(read, sizeof read, "%.3f", plain / seconds);
        if (peak > 0) snprintf(share, sizeof share, "%.3f", flops / seconds / peak);
        if (b->gpu >= 0 && blas > 0) snprintf(share, sizeof share, "%.3f", blas / seconds);
        printf("%-24s %6" PRId64 "x%-6" PRId64 " %5d %10.1f %8.2f %9.1f %6s %6s %6d  %s\n", w->kind->name, w->l.rows, w->l.cols, m, seconds * 1e6,
               (double)w->bytes / seconds / 1e9, flops / seconds / 1e9, read, share, copies, kernel);
        fflush(stdout);
        return;
    }
    json_open(&b->j, NULL, '{');
    json_string(&b->j, "scheme", w->kind->name);
    json_shape(&b->j, &w->l);
    json_int(&b->j, "m", m);
    json_number(&b->j, "us", seconds * 1e6);
    json_number(&b->j, "gbps", (double)w->bytes / seconds / 1e9);
    json_number(&b->j, "gflops", flops / seconds / 1e9);
    json_ratio(&b->j, "read_ratio", plain / seconds);
    json_ratio(&b->j, "peak_ratio", peak > 0 ? flops / seconds / peak : 0);
    if (b->gpu >= 0) json_ratio(&b->j, "cublas_ratio", blas / seconds);
    json_string(&b->j, "kernel", kernel);
    json_int(&b->j, "copies", copies);
    json_close(&b->j, '}');
}

static span span_of(const moq_view *v)
{
    span s;
    s.data = v->data;
    s.bytes = v->count * (uint64_t)moq_dtype_bits(v->dtype) / 8;
    return s;
}

/* Bytes of the activations of `most` rows: float32 here, and what the backend gets and gives. At most 2^40. */
static uint64_t activation_bytes(int64_t rows, int64_t cols, int32_t most) { return (uint64_t)most * (uint64_t)(2 * cols + rows) * 4; }

/* Do the layer, its copies, these as they are prepared and the activations fit into three quarters of the memory? On a GPU the prepared lie in its own
   memory, of which nothing is known here: prepare_linear says when it is used up. Arguments are so bounded that no sum exceeds 2^54. */
static int bench_fits(const bench *b, const layer *w, int copies, int32_t most)
{
    uint64_t times = b->gpu >= 0 ? 1 : 2, rest = activation_bytes(w->l.rows, w->l.cols, most) + w->bytes, limit = moq_machine_memory() / 4 * 3;
    if (!limit || rest + times * (uint64_t)copies * w->bytes <= limit) return 0;
    if (rest + times * w->bytes > limit)
        return refuse("--shape %" PRId64 "x%" PRId64 " --m %d: layers of %" PRIu64 " bytes and their activations do not fit into memory; take fewer outputs, "
                      "inputs or rows", w->l.rows, w->l.cols, (int)most, w->bytes);
    return refuse("--copies: %d of %" PRIu64 " bytes%s do not fit into memory; take at most %" PRIu64, copies, w->bytes,
                  times == 2 ? ", and as much again prepared," : "", (limit - rest) / times / w->bytes);
}

/* One kind and shape: a line for every m. */
static int bench_layer(bench *b, const layer_kind *kind, int64_t rows, int64_t cols)
{
    layer w, *copy;
    moq_error err;
    moq_backend *be = b->be;
    moq_weight **prepared;
    char kernel[200] = "";
    int32_t most = b->m[0];
    rounds r = {NULL, 3, b->threads, 0, 0, PEAK_NONE, NULL, 0};
    span *read;
    float *host;
    void *x = NULL, *y = NULL;
    int bad = 0, copies;
    for (int i = 1; i < b->m_count; i++) most = b->m[i] > most ? b->m[i] : most;
    make_layer(&w, kind, rows, cols, 0, 1);
    copies = copies_of(b->o, b->gpu, w.bytes);
    r.bytes = w.bytes;
    bad = bench_fits(b, &w, copies, most);
    if (bad) {
        free_layer(&w);
        return bad;
    }
    copy = (layer *)take((size_t)copies, sizeof *copy);
    prepared = (moq_weight **)take((size_t)copies, sizeof *prepared);
    read = (span *)take((size_t)copies * 3, sizeof *read);
    if (b->gpu < 0) r.read = read;
    for (int i = 0; i < copies && !bad; i++) {
        make_layer(&copy[i], kind, rows, cols, 0, (uint64_t)i + 2);
        read[3 * i] = span_of(&copy[i].l.codes);
        read[3 * i + 1] = span_of(&copy[i].l.scales);
        read[3 * i + 2] = span_of(&copy[i].l.zeros);
        prepared[i] = be->prepare_linear(be, &copy[i].l, 1, &err);
        const int copied = b->o->weights && strcmp(b->o->weights, "copied") == 0 && be->copy_weight;
        if (!prepared[i] || (copied && be->copy_weight(be, prepared[i], &err) != MOQ_OK)) bad = refuse_error(NULL, &err);
    }
    if (be->explain) be->explain(be, &w.l, kernel, sizeof kernel);
    kernel[strcspn(kernel, ":")] = 0;
    host = (float *)take((size_t)most * (size_t)cols, sizeof *host);
    for (int64_t i = 0; i < most * cols; i++) { uint64_t state = (uint64_t)i * 2654435761u + 1; next_random(&state); host[i] = (float)random_value(&state); }
    if (!bad) x = be->alloc(be, (size_t)most * (size_t)cols * (size_t)moq_dtype_bits(be->act) / 8, &err);
    y = x ? be->alloc(be, (size_t)most * (size_t)rows * (size_t)moq_dtype_bits(be->act) / 8, &err) : NULL;
    if (!bad && (!y || be->reserve(be, most, &err) != MOQ_OK)) bad = refuse_error(NULL, &err);
    if (!bad) be->upload_act(be, x, host, (size_t)most * (size_t)cols);
    if (!bad && b->gpu >= 0) r.plain = moq_gpu_read_seconds(b->gpu, w.bytes, copies);
    for (int i = 0; i < b->m_count && !bad && !stop_requested; i++) {
        r.kind = peak_kind(be, prepared[0], b->m[i], kernel);
        r.kernel = kernel;
        double seconds = time_linear(be, prepared, copies, x, b->m[i], y, &r), blas = b->gpu >= 0 ? moq_gpu_blas_seconds(b->gpu, rows, cols, b->m[i]) : 0;
        if (seconds < 0) bad = 2;
        else bench_report(b, &w, copies, b->m[i], seconds, r.plain, r.peak, blas, kernel);
    }
    if (y) be->release(be, y);
    if (x) be->release(be, x);
    free(read);
    for (int i = 0; i < copies; i++) {
        if (prepared[i]) be->release_weight(be, prepared[i]);
        free_layer(&copy[i]);
    }
    free(prepared);
    free(copy);
    free(host);
    free_layer(&w);
    return bad;
}

/* Operations per second of the instruction that serves `rows` rows of the folder's first quantized layer, or of its first layer; 0: unknown. */
static double folder_peak(const bench *b, const engine *e, int32_t rows)
{
    const moq_backend *be = b->be;
    char kernel[200] = "";
    moq_linear l, best;
    moq_weight *w;
    moq_error err;
    double rate;
    int found = 0;
    for (size_t i = 0; i < moq_module_count(e->ck) && found < 2; i++) {
        if (moq_get_module(e->ck, i, &l, &err) != MOQ_OK || (l.experts > 0 && moq_slice_expert(&l, 0, &l, &err) != MOQ_OK)) continue;
        if (found && !moq_scheme_is_quantized(&l.scheme)) continue;
        best = l;
        found = moq_scheme_is_quantized(&l.scheme) ? 2 : 1;
    }
    w = found ? e->be->prepare_linear(e->be, &best, 1, &err) : NULL;
    if (!w) return 0;
    if (be->explain) e->be->explain(e->be, &best, kernel, sizeof kernel);
    kernel[strcspn(kernel, ":")] = 0;
    rate = peak_rate(peak_kind(be, w, rows, kernel), kernel, b->threads);
    e->be->release_weight(e->be, w);
    return rate;
}

/* Tensors of a folder up to a GB, for plain reads of the bytes of its tensors -> their number and bytes. */
static int folder_spans(const engine *e, span **read, uint64_t *bytes)
{
    int n = 0;
    *read = (span *)take(moq_tensor_count(e->ck), sizeof **read);
    *bytes = 0;
    for (size_t i = 0; i < moq_tensor_count(e->ck) && n < 100000 && *bytes < (uint64_t)1 << 30; i++) {
        const moq_tensor *t = moq_get_tensor(e->ck, i);
        if (t->bytes < 4096) continue;
        (*read)[n].data = t->data;
        (*read)[n++].bytes = t->bytes;
        *bytes += t->bytes;
    }
    return n;
}

enum { FOLDER_RUNS = 3 };

/* Seconds of each run; plain: of a read of as many bytes as a token takes, by every loop after each of them. */
typedef struct folder_times {
    double prompt[FOLDER_RUNS], step[FOLDER_RUNS], plain[READ_LOOPS][FOLDER_RUNS];
    int runs, read;
} folder_times;

/* `prompt` tokens at once and `steps` tokens one by one, each with its logits, and plain reads between. */
static moq_result time_folder(const bench *b, const engine *e, const int32_t *ids, int32_t prompt, int32_t steps, float *logits, folder_times *f,
                              moq_error *err)
{
    moq_result r = MOQ_OK;
    span *read;
    uint64_t bytes;
    int count = folder_spans(e, &read, &bytes), passes = bytes ? (int)(100000000 / bytes) + 1 : 0;
    f->read = strcmp(b->be->name, "cpu") == 0 && count > 0;
    for (f->runs = 0; f->runs < FOLDER_RUNS && !stop_requested; f->runs++) {
        double start = moq_seconds(), middle;
        r = llm_forward(e->m, 0, ids, prompt, 0, NULL, logits, err);
        middle = moq_seconds();
        for (int32_t i = 0; i < steps && r == MOQ_OK; i++) r = llm_forward(e->m, 0, ids + i, 1, i, NULL, logits, err);
        if (r != MOQ_OK) break;
        f->prompt[f->runs] = middle - start;
        f->step[f->runs] = (moq_seconds() - middle) / steps;
        for (int i = 0; i < READ_LOOPS && f->read; i++)
            f->plain[i][f->runs] = read_spans(read, count, 0, count * passes, i, b->threads) / passes / (double)bytes * (double)e->info->token_bytes;
    }
    free(read);
    return r;
}

/* More than 1 of a plain read is no mistake of the clock: the read goes through the whole folder in turn, a token through the same weights again. */
static void note_cached(const bench *b, const llm_info *info)
{
    if (!(b->read_ratio > 1)) return;
    fflush(stdout);
    fprintf(stderr, "moq: note: more than a plain read gives: of the %.1f MB of a token a part stays in the cache (%.0f MB) from token to token; "
                "this ratio says nothing of memory\n", (double)info->token_bytes / 1e6, (double)cache_bytes(b->gpu) / 1048576);
}

/* Prompt and generation speed of a folder: a prompt of up to 512 tokens, then up to 128 tokens one by one from position 0. */
static int bench_folder(bench *b, engine *e)
{
    enum { PROMPT = 512, STEPS = 128 };
    moq_error err;
    const llm_info *info = e->info;
    int32_t ids[PROMPT], n = info->context < PROMPT ? info->context : PROMPT, steps = n < STEPS ? n : STEPS;
    double peak, plain = 0, products;
    folder_times f;
    float *logits = (float *)take((size_t)info->vocab, sizeof *logits);
    moq_result r;
    for (int32_t i = 0; i < n; i++) ids[i] = (int32_t)((i * 7919 + 13) % info->vocab);
    r = time_folder(b, e, ids, n, steps, logits, &f, &err);
    free(logits);
    if (r != MOQ_OK) return refuse_error(e->path, &err);
    if (f.runs == 0) return refuse("stopped");
    b->prompt_rate = n / median(f.prompt, f.runs);
    b->generation_rate = 1 / median(f.step, f.runs);
    peak = folder_peak(b, e, n);
    /* the output layer runs for the last token of the prompt only */
    products = (double)info->token_products - (double)info->vocab * info->hidden * (n - 1) / n;
    if (peak > 0) b->prompt_peak = b->prompt_rate * 2 * products / peak;
    for (int i = 0; i < READ_LOOPS && f.read; i++) {
        double seconds = median(f.plain[i], f.runs);
        if (i == 0 || seconds < plain) plain = seconds;
    }
    if (b->gpu >= 0) plain = moq_gpu_read_seconds(b->gpu, info->token_bytes, copies_of(b->o, b->gpu, info->token_bytes));
    b->read_ratio = plain * b->generation_rate;
    if (b->o->json) { note_cached(b, info); return 0; }
    printf("%s: prompt %.1f tokens/s (%d tokens), generation %.1f tokens/s (%d tokens)\n", e->path, b->prompt_rate, n, b->generation_rate, steps);
    printf("prompt: %.1f GFLOP/s in weights", b->prompt_rate * 2 * products / 1e9);
    if (peak > 0) printf(", %.3f of the %.1f that its instruction alone gives", b->prompt_peak, peak / 1e9);
    printf("\ngeneration: %.2f MB of weights a token (output layer %s), %.2f GB/s", (double)info->token_bytes / 1e6, info->head,
           (double)info->token_bytes * b->generation_rate / 1e9);
    if (plain > 0) printf(", %.3f of a plain read of as many bytes", b->read_ratio);
    printf("\n");
    note_cached(b, info);
    return 0;
}

static const char *const usual_kinds[] = {"bf16", "fp8", "int8", "nvfp4", "mxfp4", "int4"};

static const layer_kind *bench_kind(const options *o, int i)
{
    return find_kind(o->scheme.count ? o->scheme.item[i] : usual_kinds[i]);
}

/* The k-th --shape, 4096x4096 without any: outputs x inputs. */
static int bench_shape(const options *o, int k, int64_t *rows, int64_t *cols)
{
    const char *text = o->shape.count ? o->shape.item[k] : "4096x4096";
    long long n, m;
    char rest;
    if (sscanf(text, "%lldx%lld%c", &n, &m, &rest) != 2 || n < 1 || m < 1 || n > 1 << 20 || m > 1 << 20)
        return refuse("--shape is outputs x inputs, each up to %d, such as 4096x14336, not '%s'", 1 << 20, text);
    if (m % 128 != 0 || n % 8 != 0) return refuse("--shape %s: inputs must be a multiple of 128, outputs of 8", text);
    *rows = n;
    *cols = m;
    return 0;
}

/* --m: "1,8,64". */
static int bench_rows(bench *b, const char *text)
{
    char *end;
    for (const char *at = text; at; at = *end ? end + 1 : NULL) { /* a comma at the end leaves a number to be read */
        long n = strtol(at, &end, 10);
        if (end == at || (*end && *end != ',') || n < 1 || n > 65536 || b->m_count == COUNT(b->m))
            return refuse("--m is 1 to %d numbers of rows from 1 to 65536, such as 1,8,64, not '%s'", COUNT(b->m), text);
        b->m[b->m_count++] = (int32_t)n;
    }
    return 0;
}

/* Neither a layer's weights nor its activations may take more than a quarter of the memory. */
static int bench_size(const bench *b, const layer_kind *kind, int64_t rows, int64_t cols)
{
    uint64_t bytes = (uint64_t)rows * (uint64_t)cols * (uint64_t)kind->bits / 8, limit = moq_machine_memory() / 4;
    int32_t most = 1;
    for (int i = 0; i < b->m_count; i++) most = b->m[i] > most ? b->m[i] : most;
    if (!limit) return 0;
    if (bytes > limit)
        return refuse("--shape %" PRId64 "x%" PRId64 ": %" PRIu64 " bytes of %s are more than a quarter of the memory; take fewer outputs or inputs",
                      rows, cols, bytes, kind->name);
    if (activation_bytes(rows, cols, most) > limit)
        return refuse("--m %d: the activations of --shape %" PRId64 "x%" PRId64 " are more than a quarter of the memory; take at most %" PRIu64 " rows",
                      (int)most, rows, cols, limit / activation_bytes(rows, cols, 1));
    return 0;
}

/* All arguments are checked before anything is printed. */
static int bench_arguments(bench *b)
{
    const options *o = b->o;
    const struct { const char *name; int given; } of_folder[] = {
        {"kv", o->kv != NULL}, {"head", o->head != NULL}, {"context", o->context > 0}, {"chunk", o->chunk > 0}, {"max-memory", o->max_memory != NULL},
        {"quantize", o->quantize != NULL}
    };
    int64_t rows, cols;
    for (int i = 0; i < COUNT(of_folder) && !o->arg_count; i++)
        if (of_folder[i].given)
            return refuse("--%s says how a model runs: moq bench DIR --%s ...; layers alone have no use for it", of_folder[i].name, of_folder[i].name);
    int bad = bench_rows(b, o->m ? o->m : "1,8,64,512"), layers = !o->arg_count || o->scheme.count || o->shape.count;
    for (int i = 0; !bad && i < o->scheme.count; i++)
        if (!bench_kind(o, i)) bad = refuse("--scheme %s: not known; `moq help bench` lists the kinds of layers", o->scheme.item[i]);
    for (int k = 0; !bad && k < o->shape.count; k++) bad = bench_shape(o, k, &rows, &cols);
    for (int i = 0; !bad && layers && i < (o->scheme.count ? o->scheme.count : COUNT(usual_kinds)); i++)
        for (int k = 0; !bad && k < (o->shape.count ? o->shape.count : 1); k++) {
            bad = bench_shape(o, k, &rows, &cols);
            if (!bad) bad = bench_size(b, bench_kind(o, i), rows, cols);
        }
    return bad;
}

static int bench_layers(bench *b)
{
    const options *o = b->o;
    int bad = 0;
    int64_t rows = 0, cols = 0;
    if (!o->json)
        printf("%-24s %13s %5s %10s %8s %9s %6s %6s %6s  %s\n", "scheme", "shape", "m", "us", "GB/s", "GFLOP/s", "read", b->gpu >= 0 ? "cuBLAS" : "peak",
               "copies", "kernel");
    for (int i = 0; i < (o->scheme.count ? o->scheme.count : COUNT(usual_kinds)) && !bad; i++)
        for (int k = 0; k < (o->shape.count ? o->shape.count : 1) && !bad && !stop_requested; k++) {
            bad = bench_shape(o, k, &rows, &cols);
            if (!bad) bad = bench_layer(b, bench_kind(o, i), rows, cols);
        }
    return bad;
}

static int run_bench(bench *b, engine *e)
{
    const options *o = b->o;
    int layers = !e || o->scheme.count || o->shape.count, bad;
    b->gpu = gpu_of(b->be);
    bad = e ? bench_folder(b, e) : 0;
    if (bad) return bad;
    if (o->json) {
        json_open(&b->j, NULL, '{');
        json_string(&b->j, "device", b->be->name);
        json_int(&b->j, "threads", b->threads);
        json_string(&b->j, "cpu", moq_cpu_features());
        json_int(&b->j, "cache_bytes", (int64_t)cache_bytes(b->gpu));
        if (e) json_number(&b->j, "prompt_tokens_per_second", b->prompt_rate);
        if (e) json_number(&b->j, "generated_tokens_per_second", b->generation_rate);
        if (e) json_string(&b->j, "head", e->info->head);
        if (e) json_int(&b->j, "token_bytes", (int64_t)e->info->token_bytes);
        if (e) json_number(&b->j, "prompt_peak_ratio", b->prompt_peak);
        if (e) json_number(&b->j, "generation_read_ratio", b->read_ratio);
        json_open(&b->j, "rows", '[');
    } else if (layers && b->gpu >= 0)
        fprintf(stderr, "moq: %s; read: speed over that of a plain read of the same bytes on it; cuBLAS: over that of cuBLAS with\n"
                    "moq: BF16 weights (-: it is not there); copies: layers used in turn, and read in turn (L2 cache %.0f MB)\n", b->be->name,
                    (double)cache_bytes(b->gpu) / 1048576);
    else if (layers) fprintf(stderr, "moq: %s, %d threads; read: speed over that of a plain read of the same bytes; peak: over the\n"
                    "moq: same instruction (FMA, VNNI or AMX) alone in registers; copies: layers used in turn, and read in turn\n"
                    "moq: between products, in the layers' own memory; both are medians of rounds, the read of its fastest loop\n"
                    "moq: (last-level cache %.0f MB; --copies 1: weights stay in it if they fit)\n", b->be->name, b->threads,
                    (double)cache_bytes(-1) / 1048576);
    if (layers) bad = bench_layers(b);
    if (o->json) json_close(&b->j, ']');
    if (o->json) json_close(&b->j, '}');
    return !bad && stop_requested ? refuse("stopped") : bad;
}

static int verb_bench(const options *o)
{
    bench b;
    engine e;
    int bad;
    if (o->encode) return bench_encode(o);
    memset(&b, 0, sizeof b);
    b.o = o;
    b.j = json_to(stdout, 2);
    b.threads = o->threads ? (int)o->threads : moq_cpu_count();
    bad = bench_arguments(&b);
    if (!bad && o->arg_count) {
        bad = open_engine(&e, o, o->args[0], 1024, 1);
        b.be = bad ? NULL : e.be;
        if (!bad) bad = run_bench(&b, &e);
        close_engine(&e);
        return bad;
    }
    if (!bad) bad = open_backend(o, o->kernel, &b.be);
    if (!bad) bad = run_bench(&b, NULL);
    moq_backend_destroy(b.be);
    return bad;
}

/* ------------------------------------------------------------------------------------------------
   >>selftest        every kernel against float64
   ------------------------------------------------------------------------------------------------ */

typedef struct selftest {
    const options *o;
    moq_backend *be;
    const char *kernel;
    uint64_t passed, failed;
    json_out j;
} selftest;

static void check(selftest *s, int good, const char *what, double error, double bound)
{
    s->passed += (uint64_t)good;
    s->failed += (uint64_t)!good;
    if (good) return;
    if (!s->o->json) { printf("FAILED %s, kernel %s: error %g, allowed %g\n", what, s->kernel, error, bound); return; }
    json_open(&s->j, NULL, '{');
    json_string(&s->j, "check", what);
    json_string(&s->j, "kernel", s->kernel);
    json_number(&s->j, "error", error);
    json_number(&s->j, "allowed", bound);
    json_close(&s->j, '}');
}

/* y[i] against want[i] within `relative` of size[i]; NaN fails. */
static void check_values(selftest *s, const char *what, const float *y, const double *want, const double *size, int64_t n, double bound)
{
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        double e = fabs((double)y[i] - want[i]), r = e / (size[i] > 1e-30 ? size[i] : 1e-30);
        if (e != 0 && !(r <= worst)) worst = r;
    }
    check(s, worst <= bound, what, worst, bound);
}

/* Nearest number of an input format, with the scale of its group: what "as stored" means, written down a second time. */
static float round_one(moq_dtype elem, float x, float scale)
{
    float v = scale > 0 ? x / scale : 0;
    if (scale <= 0) return 0;
    if (elem == MOQ_F4) return (float)small_float(moq_e2m1_encode(v), 2, 1) * scale;
    if (elem == MOQ_F8_E4M3) return (float)small_float(moq_e4m3_encode(v), 4, 3) * scale;
    v = nearbyintf(v);
    return (v < -128 ? -128 : v > 127 ? 127 : v) * scale;
}

/* The scale of a group with largest magnitude `amax`: two-level for E4M3 scales, a power of two for E8M0, else amax / largest. */
static float group_scale(const moq_linear *l, float amax)
{
    const moq_coding *c = &l->scheme.input;
    float largest = c->elem == MOQ_F4 ? 6.0f : c->elem == MOQ_F8_E4M3 ? 448.0f : 127.0f;
    if (!c->dynamic) return l->input_scale;
    if (c->scale == MOQ_F8_E8M0) return amax > 0 ? (float)ldexp(1, (int)ceil(log2((double)(amax / largest)))) : 0;
    if (c->scale != MOQ_F8_E4M3) return amax / largest;
    amax = amax / (largest * l->input_scale);
    return (float)small_float(moq_e4m3_encode(amax < 448 ? amax : 448), 4, 3) * l->input_scale;
}

static void round_token(const moq_linear *l, const float *x, float *out)
{
    const moq_coding *c = &l->scheme.input;
    int64_t group = c->group_cols > 0 ? c->group_cols : l->cols;
    for (int64_t i = 0; i < l->cols; i += group) {
        float amax = 0, scale;
        for (int64_t k = i; k < i + group && k < l->cols; k++) amax = fabsf(x[k]) > amax ? fabsf(x[k]) : amax;
        scale = group_scale(l, amax);
        for (int64_t k = i; k < i + group && k < l->cols; k++) out[k] = c->elem == MOQ_NONE ? x[k] : round_one(c->elem, x[k], scale);
    }
}

/* How inputs are rounded, and what --act calls it. */
enum { ACT_WIDE, ACT_STORED, ACT_AUTO, ACT_BF16 };
static const char *const act_names[] = {"wide", "stored", "auto", "bf16"};

/* To 8 significant bits, ties to even. */
static float nearest_bf16(float v)
{
    int e;
    double m = frexp((double)v, &e);
    return (float)ldexp(nearbyint(ldexp(m, 8)), e - 8);
}

/* What one token becomes before it meets the codes: rotated and smoothed in float as the library promises, rounded when stored, or to BF16. */
static void feed_token(const moq_linear *l, const float *x, int act, float *smooth, float *rounded)
{
    for (int64_t c = 0; c < l->cols; c++) {
        double t = (double)x[c];
        int n = l->hadamard_size;
        if (n > 0) {
            t = 0;
            for (int i = 0; i < n; i++) t += (double)x[c / n * n + i] * hadamard_at(l, i, (int)(c % n)) * (double)l->hadamard_scale;
        }
        smooth[c] = (float)t;
        if (l->pre_quant_scale.data) smooth[c] *= view_float(&l->pre_quant_scale, c);
        if (act == ACT_BF16) smooth[c] = nearest_bf16(smooth[c]);
    }
    if (act == ACT_STORED) round_token(l, smooth, rounded);
    else memcpy(rounded, smooth, (size_t)l->cols * sizeof *rounded);
}

/* W4A8_AWQ as stored: the exact weight is rounded once more, to E4M3. */
static double requantized(const moq_linear *l, double v)
{
    double scale = (double)l->requant_scale;
    return small_float(moq_e4m3_encode(sticky_float(v / scale)), 4, 3) * scale;
}

/* y and the sum of the magnitudes that went into it, for `m` tokens. x: [m, cols], w: [rows, cols], want, size: [m, rows]. */
static void expect_linear(const layer *w, const double *weights, const float *x, int64_t m, int act, double *want, double *size)
{
    const moq_linear *l = &w->l;
    float *smooth = (float *)take((size_t)l->cols * 2, sizeof *smooth), *rounded = smooth + l->cols;
    int64_t rank = l->scheme.lora_rank;
    for (int64_t t = 0; t < m; t++) {
        feed_token(l, x + t * l->cols, act, smooth, rounded);
        for (int64_t r = 0; r < l->rows; r++) {
            double sum = 0, magnitude = 0;
            for (int64_t c = 0; c < l->cols; c++) {
                double v = weights[r * l->cols + c];
                if (act == ACT_STORED && l->requant_scale > 0) v = requantized(l, v);
                sum += v * (double)rounded[c];
                magnitude += fabs(v * (double)rounded[c]);
            }
            for (int64_t k = 0; k < rank; k++) {
                double a = 0, b = (double)view_float(&l->lora_b, r * rank + k);
                for (int64_t c = 0; c < l->cols; c++) a += (double)view_float(&l->lora_a, k * l->cols + c) * (double)smooth[c];
                sum += a * b;
                for (int64_t c = 0; c < l->cols; c++) magnitude += fabs(b * (double)view_float(&l->lora_a, k * l->cols + c) * (double)smooth[c]);
            }
            if (l->bias.data) sum += (double)view_float(&l->bias, r);
            want[t * l->rows + r] = sum;
            size[t * l->rows + r] = magnitude + fabs(sum);
        }
    }
    free(smooth);
}

static void random_floats(float *x, int64_t n, uint64_t seed)
{
    uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
    for (int64_t i = 0; i < n; i++) x[i] = (float)random_value(&state);
}

/* What automatic rounding may take from input c: with BF16 on both sides (1 + 2^-8)^2 - 1 of the product; by 16 bits a step of the largest of 256
   columns, which share a scale; by 8 bits half a step of the largest of 32, of 64 where the checkpoint wants 4 bits. */
static double automatic_loss(const moq_linear *l, const float *x, int64_t c)
{
    int eight = l->scheme.input.elem != MOQ_NONE;
    int64_t own = !eight ? 256 : l->scheme.input.elem == MOQ_F4 ? 64 : 32, first = c / own * own;
    double most = 0, pair = fabs((double)x[c]) * (1.0 / 128 + 1.0 / 65536);
    if (l->scheme.weight.scale == MOQ_NONE) return 0; /* not quantized: wide */
    for (int64_t k = first; k < first + own && k < l->cols; k++) most = fabs((double)x[k]) > most ? fabs((double)x[k]) : most;
    most /= eight ? 253 : 32000;
    return most > pair ? most : pair;
}

/* What rounding to BF16 may take beyond that of x itself: half a step of 8 bits of a quantized weight, and a whole one of an input that was rotated,
   because float sums fall on either side of where it is rounded. */
static double bf16_loss(const moq_linear *l, double x)
{
    return fabs(x) * ((l->scheme.weight.scale != MOQ_NONE ? 1.0 / 255 : 0) + (l->hadamard_size > 0 ? 1.0 / 127 : 0));
}

/* size[m, rows] grows by what rounding of x that `act` allows may take from a product, over `bound`. */
static void loosen(const layer *w, const double *weights, const float *x, int64_t m, int act, double bound, double *size)
{
    const moq_linear *l = &w->l;
    float *smooth = (float *)take((size_t)l->cols * 2, sizeof *smooth);
    for (int64_t t = 0; t < m; t++) {
        feed_token(l, x + t * l->cols, act, smooth, smooth + l->cols);
        for (int64_t c = 0; c < l->cols; c++) {
            double loss = (act == ACT_BF16 ? bf16_loss(l, (double)smooth[c]) : automatic_loss(l, smooth, c)) / bound;
            for (int64_t r = 0; r < l->rows; r++) size[t * l->rows + r] += loss * fabs(weights[r * l->cols + c]);
        }
    }
    free(smooth);
}

/* One layer, its dequantized values and its products with 1, 3 and 17 tokens. The bound is that of a float sum of `cols` products. */
static void test_layer(selftest *s, const layer_kind *kind, int64_t rows, int64_t cols, int act, uint64_t seed)
{
    static const int32_t tokens[] = {1, 3, 17};
    enum { MOST = 17 };
    layer w;
    moq_error err;
    moq_weight *prepared;
    char what[160];
    double *weights = (double *)take((size_t)(rows * cols), sizeof *weights);
    double *want = (double *)take((size_t)(2 * MOST * rows), sizeof *want), *size = want + MOST * rows;
    float *x = (float *)take((size_t)(MOST * (rows + cols)), sizeof *x), *y = x + MOST * cols;
    double bound = ((double)cols / 4 + 24 + (kind->hadamard ? 40 : 0)) / 16777216.0;
    make_layer(&w, kind, rows, cols, seed % 2 == 0, seed);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) weights[r * cols + c] = weight_at(&w, r, c);
    random_floats(x, MOST * cols, seed);
    int does = act == ACT_AUTO && moqi_is_int(w.l.scheme.input.elem) ? ACT_STORED : act; /* what every CPU can compute with, it does */
    expect_linear(&w, weights, x, MOST, does, want, size);
    if (does == ACT_AUTO || does == ACT_BF16) loosen(&w, weights, x, MOST, does, bound, size);
    snprintf(what, sizeof what, "%s %" PRId64 "x%" PRId64 " act %s", kind->name, rows, cols, act_names[act]);
    prepared = s->be->prepare_linear(s->be, &w.l, 1, &err);
    if (!prepared || s->be->reserve(s->be, MOST, &err) != MOQ_OK) {
        check(s, 0, err.text, 0, 0);
        prepared = NULL;
    }
    for (int i = 0; prepared && i < COUNT(tokens); i++) {
        void *dx = s->be->alloc(s->be, (size_t)tokens[i] * (size_t)cols * 4, &err), *dy = s->be->alloc(s->be, (size_t)tokens[i] * (size_t)rows * 4, &err);
        if (dx && dy) {
            s->be->upload_act(s->be, dx, x, (size_t)(tokens[i] * cols));
            s->be->linear(s->be, prepared, dx, tokens[i], dy);
            s->be->download_act(s->be, y, dy, (size_t)(tokens[i] * rows));
            check_values(s, what, y, want, size, tokens[i] * rows, s->be->act == MOQ_F32 ? bound : bound + 1.0 / 128);
        } else check(s, 0, err.text, 0, 0);
        if (dx) s->be->release(s->be, dx);
        if (dy) s->be->release(s->be, dy);
    }
    if (prepared) s->be->release_weight(s->be, prepared);
    free_layer(&w);
    free(weights);
    free(want);
    free(x);
}

/* moq_dequantize is the exact product rounded once: equal to the float64 product, rounded. */
static void test_dequantize(selftest *s, const layer_kind *kind, int64_t rows, int64_t cols, uint64_t seed)
{
    layer w;
    float *row = (float *)take((size_t)cols, sizeof *row);
    double worst = 0;
    make_layer(&w, kind, rows, cols, 0, seed);
    for (int64_t r = 0; r < rows; r++) {
        moq_dequantize(&w.l, r, 1, row);
        for (int64_t c = 0; c < cols; c++) {
            double e = fabs((double)row[c] - (double)(float)weight_at(&w, r, c));
            if (!(e <= worst)) worst = e;
        }
    }
    check(s, worst == 0, kind->name, worst, 0);
    free_layer(&w);
    free(row);
}

static void test_layers(selftest *s, int act)
{
    static const int64_t row_counts[] = {1, 7, 19}, col_counts[] = {1, 3, 5};
    for (int i = 0; i < COUNT(layer_kinds); i++) {
        const layer_kind *k = &layer_kinds[i];
        int64_t row_unit = k->lay == LAY_PAIRS ? 2 : k->lay == LAY_GPTQ || k->lay == LAY_AWQ ? 8 : 1;
        int64_t col_unit = k->scheme.weight.group_cols > 0 ? k->scheme.weight.group_cols : 33;
        for (int a = 0; a < COUNT(row_counts) && !stop_requested; a++)
            for (int b = 0; b < COUNT(col_counts); b++) {
                uint64_t seed = (uint64_t)(i * 100 + a * 10 + b + 1);
                if (act == ACT_WIDE) test_dequantize(s, k, row_unit * row_counts[a], col_unit * col_counts[b], seed);
                test_layer(s, k, row_unit * row_counts[a], col_unit * col_counts[b], act, seed);
            }
    }
}

static void test_norm(selftest *s)
{
    enum { ROWS = 3, COLS = 77 };
    float *x = (float *)s->be->alloc(s->be, ROWS * COLS * 4, NULL), *weight = (float *)s->be->alloc(s->be, COLS * 4, NULL), host[ROWS * COLS], gain[COLS];
    double want[ROWS * COLS], size[ROWS * COLS];
    moq_norm_desc d;
    if (!x || !weight) { check(s, 0, "norm: no memory", 0, 0); return; }
    random_floats(host, ROWS * COLS, 5);
    random_floats(gain, COLS, 6);
    for (int r = 0; r < ROWS; r++) {
        double sum = 0;
        for (int c = 0; c < COLS; c++) sum += (double)host[r * COLS + c] * (double)host[r * COLS + c];
        for (int c = 0; c < COLS; c++) want[r * COLS + c] = (double)host[r * COLS + c] / sqrt(sum / COLS + 1e-5) * (double)gain[c];
    }
    for (int i = 0; i < ROWS * COLS; i++) size[i] = fabs(want[i]);
    memset(&d, 0, sizeof d);
    s->be->upload_act(s->be, x, host, ROWS * COLS);
    s->be->upload(s->be, weight, gain, sizeof gain);
    d.x = d.y = x;
    d.weight = weight;
    d.rows = ROWS;
    d.cols = COLS;
    d.eps = 1e-5f;
    s->be->norm(s->be, &d);
    s->be->download_act(s->be, host, x, ROWS * COLS);
    check_values(s, "norm 3x77", host, want, size, ROWS * COLS, s->be->act == MOQ_F32 ? 2e-6 : 0.01);
    s->be->release(s->be, x);
    s->be->release(s->be, weight);
}

static double activation_of(moq_activation kind, double g, double u)
{
    switch (kind) {
    case MOQ_SILU_MUL: return g / (1 + exp(-g)) * u;
    case MOQ_GELU_MUL: return g * 0.5 * erfc(-g * 0.70710678118654752) * u;
    case MOQ_GELU_TANH_MUL: return 0.5 * g * (1 + tanh(0.79788456080286536 * (g + 0.044715 * g * g * g))) * u;
    case MOQ_SWIGLU_CLAMP: g = g < 7 ? g : 7; u = u < -7 ? -7 : u > 7 ? 7 : u; return g / (1 + exp(-(double)1.702f * g)) * (u + 1);
    case MOQ_RELU2: break;
    }
    return g > 0 ? g * g : 0;
}

static void test_activations(selftest *s)
{
    enum { N = 91 };
    float *x = (float *)s->be->alloc(s->be, 2 * N * 4, NULL), *y = (float *)s->be->alloc(s->be, N * 4, NULL), host[2 * N], got[N];
    double want[N], size[N];
    if (!x || !y) { check(s, 0, "activation: no memory", 0, 0); return; }
    random_floats(host, 2 * N, 7);
    s->be->upload_act(s->be, x, host, 2 * N);
    for (int kind = MOQ_SILU_MUL; kind <= (int)MOQ_RELU2; kind++) {
        moq_activation_desc d;
        char what[40];
        d.kind = (moq_activation)kind;
        d.limit = 7;
        d.alpha = 1.702f;
        d.beta = 1;
        s->be->activation(s->be, &d, x, 1, N, y);
        s->be->download_act(s->be, got, y, N);
        for (int i = 0; i < N; i++) {
            want[i] = activation_of(d.kind, (double)host[i], (double)host[N + i]);
            size[i] = fabs(want[i]) + 1e-3 * fabs((double)host[i] * (double)host[N + i]);
        }
        snprintf(what, sizeof what, "activation %d", kind);
        check_values(s, what, got, want, size, N, s->be->act == MOQ_F32 ? 5e-6 : 0.02);
    }
    s->be->release(s->be, x);
    s->be->release(s->be, y);
}

/* One sequence in a KV cache of every format: causal attention of the last 3 of 21 positions, 4 heads over 2, in float64 over
   what moq_round_kv makes of keys and values. */
static void test_attention(selftest *s, moq_kv_format format)
{
    enum { LENGTH = 21, LAST = 3, HEADS = 4, KV = 2, DIM = 32, ROW = KV * DIM };
    float k[LENGTH * ROW], v[LENGTH * ROW], q[LAST * HEADS * DIM], got[LAST * HEADS * DIM], rk[LENGTH * ROW], rv[LENGTH * ROW], scale = 0.02f;
    int32_t host_slot[LENGTH], host_pos[LENGTH];
    double want[LAST * HEADS * DIM], size[LAST * HEADS * DIM], p[LENGTH];
    moq_backend *be = s->be;
    moq_kv_desc d;
    moq_batch b;
    moq_attention_desc a;
    moq_error err;
    char what[48];
    void *dk = be->alloc(be, sizeof k, NULL), *dv = be->alloc(be, sizeof v, NULL), *dq = be->alloc(be, sizeof q, NULL), *dy = be->alloc(be, sizeof got, NULL);
    int32_t *slot = (int32_t *)be->alloc(be, sizeof host_slot, NULL), *pos = (int32_t *)be->alloc(be, sizeof host_pos, NULL);
    snprintf(what, sizeof what, "attention, KV %s", moq_kv_format_name(format));
    memset(&d, 0, sizeof d);
    d.name = what;
    d.slots = 1;
    d.capacity = LENGTH;
    d.kv_heads = KV;
    d.head_dim = DIM;
    d.kv.format = format;
    if (format != MOQ_KV_WIDE && format != MOQ_KV_MXFP4) {
        d.kv.k_scale.data = d.kv.v_scale.data = &scale;
        d.kv.k_scale.dtype = d.kv.v_scale.dtype = MOQ_F32;
        d.kv.k_scale.count = d.kv.v_scale.count = 1;
    }
    random_floats(k, LENGTH * ROW, 11);
    random_floats(v, LENGTH * ROW, 12);
    random_floats(q, LAST * HEADS * DIM, 13);
    for (int t = 0; t < LENGTH; t++) {
        host_slot[t] = 0;
        host_pos[t] = t;
        for (int h = 0; h < KV; h++) {
            moq_round_kv(format, format == MOQ_KV_MXFP4 ? 1 : scale, NULL, k + t * ROW + h * DIM, DIM, rk + t * ROW + h * DIM);
            moq_round_kv(format, format == MOQ_KV_MXFP4 ? 1 : scale, NULL, v + t * ROW + h * DIM, DIM, rv + t * ROW + h * DIM);
        }
    }
    for (int i = 0; i < LAST; i++)
        for (int h = 0; h < HEADS; h++) {
            int seen = LENGTH - LAST + i + 1;
            double top = -1e300, sum = 0;
            for (int t = 0; t < seen; t++) {
                p[t] = 0;
                for (int c = 0; c < DIM; c++) p[t] += (double)q[(i * HEADS + h) * DIM + c] * (double)rk[t * ROW + h / 2 * DIM + c] / sqrt((double)DIM);
                top = p[t] > top ? p[t] : top;
            }
            for (int t = 0; t < seen; t++) sum += p[t] = exp(p[t] - top);
            for (int c = 0; c < DIM; c++) {
                double y = 0, magnitude = 0;
                for (int t = 0; t < seen; t++) y += p[t] / sum * (double)rv[t * ROW + h / 2 * DIM + c];
                for (int t = 0; t < seen; t++) magnitude += p[t] / sum * fabs((double)rv[t * ROW + h / 2 * DIM + c]);
                want[(i * HEADS + h) * DIM + c] = y;
                size[(i * HEADS + h) * DIM + c] = magnitude + 1e-3;
            }
        }
    memset(&a, 0, sizeof a);
    a.cache = dk && dv && dq && dy && slot && pos ? be->kv_create(be, &d, &err) : NULL;
    if (!a.cache) check(s, 0, what, 0, 0);
    else {
        be->upload_act(be, dk, k, LENGTH * ROW);
        be->upload_act(be, dv, v, LENGTH * ROW);
        be->upload_act(be, dq, q, LAST * HEADS * DIM);
        be->upload(be, slot, host_slot, sizeof host_slot);
        be->upload(be, pos, host_pos, sizeof host_pos);
        b.rows = LENGTH;
        b.max_pos = LENGTH - 1;
        b.slot = slot;
        b.pos = pos;
        be->kv_append(be, a.cache, &b, dk, ROW, dv, ROW);
        b.rows = LAST;
        b.pos = pos + LENGTH - LAST;
        a.q = dq;
        a.y = dy;
        a.q_stride = a.y_stride = HEADS * DIM;
        a.heads = HEADS;
        be->attention(be, &b, &a);
        be->download_act(be, got, dy, LAST * HEADS * DIM);
        check_values(s, what, got, want, size, LAST * HEADS * DIM, be->act == MOQ_F32 ? 2e-5 : 0.03);
        be->kv_release(be, a.cache);
    }
    be->release(be, dk);
    be->release(be, dv);
    be->release(be, dq);
    be->release(be, dy);
    be->release(be, slot);
    be->release(be, pos);
}

/* One kernel name under all ways of rounding inputs. 0 when this machine does not have it. */
static int test_kernel(selftest *s, const char *kernel)
{
    options o = *s->o;
    moq_cpu_desc probe;
    moq_backend *be;
    s->kernel = kernel;
    memset(&probe, 0, sizeof probe);
    probe.kernel = kernel;
    if (!o.backend || strcmp(o.backend, "cpu") == 0) {
        be = moq_cpu_backend(&probe, NULL);
        if (!be) return 0;
        moq_backend_destroy(be);
    }
    for (int i = 0; i < COUNT(act_names) && !stop_requested; i++) {
        int cpu = !o.backend || strcmp(o.backend, "cpu") == 0;
        o.act = cpu ? act_names[i] : NULL;
        if (open_backend(&o, cpu ? kernel : NULL, &s->be)) { s->failed++; return 1; }
        test_layers(s, i);
        if (i == 0) {
            test_norm(s);
            test_activations(s);
            for (int f = 0; f < (int)MOQ_KV_FORMAT_COUNT; f++)
                if (f != (int)MOQ_KV_NVFP4_ROTATE) test_attention(s, (moq_kv_format)f);
        }
        moq_backend_destroy(s->be);
        s->be = NULL;
        if (!cpu) break;
    }
    return 1;
}

static int verb_selftest(const options *o)
{
    static const char *const kernels[] = {"reference", "plain", "avx2", "avx512", "avx512vnni", "avx512bf16", "avxvnni", "amx", "neon", "neondot", "neonmm",
                                          "auto"};
    selftest s;
    int cpu = !o->backend || strcmp(o->backend, "cpu") == 0, known = !o->kernel;
    memset(&s, 0, sizeof s);
    for (int i = 0; i < COUNT(kernels); i++) known |= o->kernel && strcmp(o->kernel, kernels[i]) == 0;
    if (!known)
        return refuse("--kernel %s: known are reference, plain, avx2, avxvnni, avx512, avx512vnni, avx512bf16, amx, neon, neondot, neonmm and auto", o->kernel);
    s.o = o;
    s.j = json_to(stdout, 2);
    if (!cpu) { /* a device that is not there is no failure of a kernel */
        moq_backend *be;
        int bad = open_backend(o, NULL, &be);
        if (bad) return bad;
        moq_backend_destroy(be);
    }
    if (o->json) json_open(&s.j, NULL, '{');
    if (o->json) json_open(&s.j, "failures", '[');
    for (int i = cpu ? 0 : COUNT(kernels) - 1; i < COUNT(kernels) && !stop_requested; i++) {
        uint64_t passed = s.passed, failed = s.failed;
        if (o->kernel && strcmp(o->kernel, kernels[i]) != 0) continue;
        if (!test_kernel(&s, kernels[i])) {
            if (o->kernel) return refuse("--kernel %s: this machine does not have it", o->kernel);
            fprintf(stderr, "moq: note: kernel %s is not for this machine\n", kernels[i]);
        } else if (!o->json) printf("kernel %s: %" PRIu64 " passed, %" PRIu64 " failed\n", kernels[i], s.passed - passed, s.failed - failed);
    }
    if (o->json) {
        json_close(&s.j, ']');
        json_int(&s.j, "passed", (int64_t)s.passed);
        json_int(&s.j, "failed", (int64_t)s.failed);
        json_close(&s.j, '}');
    } else printf("%" PRIu64 " passed, %" PRIu64 " failed\n", s.passed, s.failed);
    if (stop_requested) return refuse("stopped");
    return s.failed > 0 || s.passed == 0;
}
