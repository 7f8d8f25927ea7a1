/* test_num.c - number formats: every code both ways, encoders against an independent slow oracle. */
#include "test.h"

/* ---- the oracle: values from the definition of a format, in double arithmetic, nothing shared with the header ---- */

typedef struct format {
    int exponent_bits, mantissa_bits, bias;
    int ieee;      /* the largest exponent means infinity and NaN */
    unsigned nan;  /* a single NaN magnitude, or 0xffff */
} format;

static const format f16 = {5, 10, 15, 1, 0xffff}, bf16 = {8, 7, 127, 1, 0xffff}, e4m3 = {4, 3, 7, 0, 0x7f}, e5m2 = {5, 2, 15, 1, 0xffff},
                    e2m1 = {2, 1, 1, 0, 0xffff}, e2m3 = {2, 3, 1, 0, 0xffff}, e3m2 = {3, 2, 3, 0, 0xffff};

static double power_of_two(int e)
{
    double v = 1;
    for (; e > 0; e--) v *= 2;
    for (; e < 0; e++) v /= 2;
    return v;
}

/* 0: finite, *value set; 1: infinity; 2: NaN. `code` is the magnitude. */
static int oracle_value(const format *f, unsigned code, double *value)
{
    unsigned e = code >> f->mantissa_bits, m = code & ((1u << f->mantissa_bits) - 1), top = (1u << f->exponent_bits) - 1;
    double fraction = (double)m / (double)(1u << f->mantissa_bits);
    if (code == f->nan) return 2;
    if (f->ieee && e == top) return m ? 2 : 1;
    *value = e ? (1 + fraction) * power_of_two((int)e - f->bias) : fraction * power_of_two(1 - f->bias);
    return 0;
}

static uint32_t bits_of(float v)
{
    uint32_t b;
    memcpy(&b, &v, 4);
    return b;
}

static double as_double(float v) { return (double)v; }

/* A float of the format against its code: kind, value, sign. */
static int same_value(const format *f, unsigned code, int negative, float got)
{
    double want = 0;
    uint32_t b;
    memcpy(&b, &got, 4);
    int kind = oracle_value(f, code, &want);
    if ((int)(b >> 31) != negative) return 0;
    b &= 0x7fffffffu;
    if (kind == 1) return b == 0x7f800000u;
    if (kind == 2) return b > 0x7f800000u;
    return b < 0x7f800000u && as_double(got) == (negative ? -want : want);
}

static void test_num_decode_every_code(void)
{
    for (unsigned v = 0; v < 65536; v++) {
        CHECK(same_value(&f16, v & 0x7fff, (int)(v >> 15), moq_f16_decode((uint16_t)v)));
        CHECK(same_value(&bf16, v & 0x7fff, (int)(v >> 15), moq_bf16_decode((uint16_t)v)));
    }
    for (unsigned v = 0; v < 256; v++) {
        CHECK(same_value(&e4m3, v & 0x7f, (int)(v >> 7), moq_e4m3_decode((uint8_t)v)));
        CHECK(same_value(&e5m2, v & 0x7f, (int)(v >> 7), moq_e5m2_decode((uint8_t)v)));
        CHECK(same_value(&e2m1, v & 7, (int)(v >> 3 & 1), moq_e2m1_decode((uint8_t)v))); /* upper bits are ignored */
        CHECK(same_value(&e2m3, v & 31, (int)(v >> 5 & 1), moq_e2m3_decode((uint8_t)v)));
        CHECK(same_value(&e3m2, v & 31, (int)(v >> 5 & 1), moq_e3m2_decode((uint8_t)v)));
        if (v < 255) CHECK(as_double(moq_e8m0_decode((uint8_t)v)) == power_of_two((int)v - 127));
        float fnuz[2];
        uint8_t code = (uint8_t)v;
        CHECK(moq_to_f32(MOQ_F8_E4M3FNUZ, &code, 1, &fnuz[0]) && moq_to_f32(MOQ_F8_E5M2FNUZ, &code, 1, &fnuz[1]));
        if (v == 128) { CHECK(bits_of(fnuz[0]) == 0x7fc00000u && bits_of(fnuz[1]) == 0x7fc00000u); continue; }
        format a = {4, 3, 8, 0, 0xffff}, b = {5, 2, 16, 0, 0xffff};
        CHECK(same_value(&a, v & 0x7f, (int)(v >> 7), fnuz[0]));
        CHECK(same_value(&b, v & 0x7f, (int)(v >> 7), fnuz[1]));
    }
    CHECK_INT(bits_of(moq_e8m0_decode(255)), 0x7fc00000);
    CHECK(as_double(moq_e2m1_decode(7)) == 6 && as_double(moq_e4m3_decode(0x7e)) == 448 && as_double(moq_e5m2_decode(0x7b)) == 57344);
    CHECK(as_double(moq_e2m3_decode(31)) == 7.5 && as_double(moq_e3m2_decode(31)) == 28);
}

/* ---- encoders ---- */

typedef struct encoder {
    const char *name;
    const format *f;
    unsigned bits;       /* of a code, sign included */
    int saturates;       /* overflow gives the largest finite code instead of infinity */
    double value[32769]; /* of finite magnitude codes, and one step past them */
    unsigned finite;     /* how many */
} encoder;

static unsigned encode(const encoder *e, float v)
{
    return e->f == &f16 ? moq_f16_encode(v) : e->f == &bf16 ? moq_bf16_encode(v) : e->f == &e4m3 ? moq_e4m3_encode(v)
         : e->f == &e5m2 ? moq_e5m2_encode(v) : moq_e2m1_encode(v);
}

static float decode(const encoder *e, unsigned v)
{
    return e->f == &f16 ? moq_f16_decode((uint16_t)v) : e->f == &bf16 ? moq_bf16_decode((uint16_t)v) : e->f == &e4m3 ? moq_e4m3_decode((uint8_t)v)
         : e->f == &e5m2 ? moq_e5m2_decode((uint8_t)v) : moq_e2m1_decode((uint8_t)v);
}

static encoder encoders[5] = {
    {"f16", &f16, 16, 0, {0}, 0}, {"bf16", &bf16, 16, 0, {0}, 0}, {"e4m3", &e4m3, 8, 1, {0}, 0}, {"e5m2", &e5m2, 8, 1, {0}, 0}, {"e2m1", &e2m1, 4, 1, {0}, 0},
};

static void make_encoders(void)
{
    for (int i = 0; i < 5; i++) {
        encoder *e = &encoders[i];
        unsigned n = 0, limit = 1u << (e->bits - 1);
        while (n < limit && oracle_value(e->f, n, &e->value[n]) == 0) n++;
        e->finite = n;
        /* One more value where an unbounded exponent would put it: the midpoint before it is where overflow begins. */
        e->value[n] = 2 * e->value[n - 1] - e->value[n - 2];
    }
}

/* Nearest of all codes by distance, ties to the even code: magnitude and sign. NaN is checked elsewhere. */
static unsigned oracle_encode(const encoder *e, float v)
{
    uint32_t b;
    memcpy(&b, &v, 4);
    unsigned sign = b >> 31 ? 1u << (e->bits - 1) : 0;
    double a = fabs((double)v);
    unsigned lo = 0, hi = e->finite;
    if ((b & 0x7fffffffu) == 0x7f800000u || a >= e->value[hi]) return sign | (e->saturates ? e->finite - 1 : e->finite);
    while (hi - lo > 1) {
        unsigned mid = (lo + hi) / 2;
        if (e->value[mid] <= a) lo = mid; else hi = mid;
    }
    double below = a - e->value[lo], above = e->value[hi] - a;
    unsigned code = below < above ? lo : above < below ? hi : lo & 1 ? hi : lo;
    if (code == e->finite && e->saturates) code--;
    return sign | code;
}

static void check_encode(const encoder *e, uint32_t bits)
{
    float v;
    memcpy(&v, &bits, 4);
    unsigned got = encode(e, v), want;
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        want = got;
        if (e->f == &e2m1) want = 7;
        else {
            double ignored;
            unsigned sign = 1u << (e->bits - 1);
            CHECK(oracle_value(e->f, got & (sign - 1), &ignored) == 2 && (got & sign) == (bits >> 31 ? sign : 0));
        }
    } else want = oracle_encode(e, v);
    if (got != want) {
        test_state.broken++;
        fprintf(stderr, "%s: encode(%08x) = %x, expected %x\n", e->name, bits, got, want);
    }
}

static void test_num_encode_inverts_decode(void)
{
    make_encoders();
    for (int i = 0; i < 5; i++)
        for (unsigned v = 0; v < 1u << encoders[i].bits; v++) {
            float d = decode(&encoders[i], v);
            uint32_t b;
            memcpy(&b, &d, 4);
            if ((b & 0x7fffffffu) > 0x7f800000u) CHECK_INT(encode(&encoders[i], d), i == 0 ? v | 0x200 : i == 1 ? v | 0x40 : (v & 0x80) | 0x7f); /* quiet */
            else if ((b & 0x7fffffffu) == 0x7f800000u && encoders[i].saturates) CHECK_INT(encode(&encoders[i], d), (v & 0x80) | (encoders[i].finite - 1));
            else CHECK_INT(encode(&encoders[i], d), v);
        }
}

static void test_num_encode_midpoints(void)
{
    make_encoders();
    for (int i = 0; i < 5; i++)
        for (unsigned c = 0; c < encoders[i].finite; c++) {
            float mid = (float)((encoders[i].value[c] + encoders[i].value[c + 1]) / 2);
            uint32_t b;
            memcpy(&b, &mid, 4);
            for (uint32_t near = b > 3 ? b - 3 : 0; near <= b + 3; near++) {
                check_encode(&encoders[i], near);
                check_encode(&encoders[i], near | 0x80000000u);
            }
        }
}

static void test_num_encode_stride(void)
{
    make_encoders();
    for (int i = 0; i < 5; i++) {
        uint32_t bits = (uint32_t)i * 977;
        for (;;) {
            check_encode(&encoders[i], bits);
            uint32_t next = bits + 769 + (bits & 63);
            if (next < bits) break;
            bits = next;
        }
        static const uint32_t edges[] = {0, 1, 0x7fffff, 0x800000, 0x7f7fffff, 0x7f800000, 0x7f800001, 0x7fbfffff, 0x7fc00000, 0x7fffffff};
        for (size_t k = 0; k < MOQI_COUNT(edges); k++) {
            check_encode(&encoders[i], edges[k]);
            check_encode(&encoders[i], edges[k] | 0x80000000u);
        }
    }
}

/* ---- arrays ---- */

static void test_num_to_f32_unaligned(void)
{
    /* Every dtype, every length to 40, every alignment to 7, against one element at a time. */
    for (int t = 0; t < (int)MOQ_DTYPE_COUNT + 3; t++) {
        uint8_t raw[8 * 40 + 8];
        float out[41], one;
        int bits = moq_dtype_bits((moq_dtype)t), has_number = bits >= 8 && t != MOQ_C64;
        for (size_t i = 0; i < sizeof raw; i++) raw[i] = (uint8_t)test_random();
        CHECK_INT(moq_to_f32((moq_dtype)t, raw, 1, &one), has_number);
        if (!has_number) continue;
        size_t size = (size_t)bits / 8;
        for (size_t n = 0; n <= 40; n++)
            for (size_t at = 0; at < 8; at++) {
                uint8_t *src = test_copy(raw + at, n * size);
                out[n] = 12345;
                CHECK(moq_to_f32((moq_dtype)t, src, n, out));
                CHECK(bits_of(out[n]) == bits_of(12345.0f));
                for (size_t i = 0; i < n; i++) {
                    CHECK(moq_to_f32((moq_dtype)t, raw + at + i * size, 1, &one));
                    CHECK(bits_of(one) == bits_of(out[i]));
                }
                free(src);
            }
    }
}

static float from_bytes(moq_dtype t, uint64_t v)
{
    uint8_t raw[8];
    float out = -1;
    for (int i = 0; i < 8; i++) raw[i] = (uint8_t)(v >> (8 * i));
    CHECK(moq_to_f32(t, raw, 1, &out));
    return out;
}

static void test_num_to_f32_values(void)
{
    CHECK(from_bytes(MOQ_I8, 0x80) == -128.0f && from_bytes(MOQ_U8, 0x80) == 128.0f && from_bytes(MOQ_BOOL, 1) == 1.0f);
    CHECK(from_bytes(MOQ_I16, 0xffff) == -1.0f && from_bytes(MOQ_U16, 0xffff) == 65535.0f);
    CHECK(from_bytes(MOQ_I32, 0xffffffffu) == -1.0f && from_bytes(MOQ_U32, 0xffffffffu) == 4294967296.0f);
    CHECK(from_bytes(MOQ_I64, ~(uint64_t)0) == -1.0f && from_bytes(MOQ_U64, ~(uint64_t)0) == 18446744073709551616.0f);
    CHECK(from_bytes(MOQ_I64, (uint64_t)1 << 63) == -9223372036854775808.0f);
    /* 2^53 + 2^29 + 1 rounds up to 2^53 + 2^30; through a double it would lose the last bit and tie to even. */
    CHECK(from_bytes(MOQ_I64, ((uint64_t)1 << 54) + ((uint64_t)1 << 30) + 1) == 18014400656965632.0f);
    CHECK(from_bytes(MOQ_U64, ((uint64_t)1 << 63) + ((uint64_t)1 << 39) + 1) == 9223373136366403584.0f);
    CHECK(bits_of(from_bytes(MOQ_F8_E8M0, 0)) == 0x400000u && bits_of(from_bytes(MOQ_BF16, 0x3f80)) == 0x3f800000u);
}

/* F64 to F32 against a search: the two neighbouring floats, compared by distance in double (exact here). */
static uint32_t oracle_f64(double v)
{
    uint64_t b;
    memcpy(&b, &v, 8);
    double a = fabs(v);
    uint32_t sign = (uint32_t)(b >> 63) << 31, lo = 0, hi = 0x7f800000u;
    if (a >= power_of_two(128)) return sign | hi;
    while (hi - lo > 1) {
        uint32_t mid = lo + (hi - lo) / 2;
        float f;
        memcpy(&f, &mid, 4);
        if ((double)f <= a) lo = mid; else hi = mid;
    }
    float below, above;
    memcpy(&below, &lo, 4);
    memcpy(&above, &hi, 4);
    double top = hi == 0x7f800000u ? power_of_two(128) : (double)above;
    double d = a - (double)below, u = top - a;
    return sign | (d < u ? lo : u < d ? hi : lo & 1 ? hi : lo);
}

static void test_num_f64(void)
{
    for (int i = 0; i < 60000; i++) {
        uint64_t b = (uint64_t)test_random() << 32 | test_random();
        double v;
        if (i % 2) b = (b & 0x800fffffffffffffu) | (uint64_t)(860 + test_random() % 300) << 52;
        if (i % 3 == 0) b &= ~(uint64_t)0x1fffffff; /* exact or a tie */
        if (i % 3 == 1) b = (b & ~(uint64_t)0x1fffffff) | 0x10000000u;
        if (i % 7 == 0) b &= 0xfff8000000000000u;
        if (((b >> 52) & 0x7ff) == 0x7ff) continue;
        memcpy(&v, &b, 8);
        uint32_t want = oracle_f64(v), got = bits_of(from_bytes(MOQ_F64, b));
        if (got != want) { CHECK_INT(got, want); fprintf(stderr, "  of %a\n", v); }
    }
    CHECK(bits_of(from_bytes(MOQ_F64, 0x7ff0000000000000u)) == 0x7f800000u && bits_of(from_bytes(MOQ_F64, 0xfff0000000000000u)) == 0xff800000u);
    CHECK(bits_of(from_bytes(MOQ_F64, 0x7ff0000000000001u)) == 0x7fc00000u);
    CHECK(bits_of(from_bytes(MOQ_F64, 0x8000000000000000u)) == 0x80000000u);
}

static void test_num_dtype_names(void)
{
    int stored = 0;
    for (int t = 1; t < (int)MOQ_DTYPE_COUNT; t++) {
        const char *name = moq_dtype_name((moq_dtype)t);
        moq_dtype back = moq_dtype_find(name, strlen(name));
        CHECK(back == (moq_dtype)t || (back == MOQ_NONE && t >= MOQ_I2));
        stored += back != MOQ_NONE;
        CHECK(moq_dtype_bits((moq_dtype)t) > 0);
    }
    CHECK_INT(stored, 22);
    CHECK(moq_dtype_find("f32", 3) == MOQ_NONE && moq_dtype_find("F32 ", 4) == MOQ_NONE && moq_dtype_find("F3", 2) == MOQ_NONE);
    CHECK(moq_dtype_find("", 0) == MOQ_NONE && moq_dtype_find("none", 4) == MOQ_NONE && moq_dtype_find("I4", 2) == MOQ_NONE && moq_dtype_find("F8_E3M4", 7) == MOQ_NONE);
    CHECK_STR(moq_dtype_name(MOQ_NONE), "none");
    CHECK_STR(moq_dtype_name((moq_dtype)-1), "?");
    CHECK_INT(moq_dtype_bits(MOQ_NONE), 0);
    CHECK_INT(moq_dtype_bits((moq_dtype)1000), 0);
    CHECK_INT(moq_dtype_bits(MOQ_F4), 4);
    CHECK_INT(moq_dtype_bits(MOQ_C64), 64);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_num_decode_every_code);
    RUN(test_num_encode_inverts_decode);
    RUN(test_num_encode_midpoints);
    RUN(test_num_encode_stride);
    RUN(test_num_to_f32_unaligned);
    RUN(test_num_to_f32_values);
    RUN(test_num_f64);
    RUN(test_num_dtype_names);
    return test_end();
}
