/* amx.h - the tile instructions of AMX for processors without them, so that the kernels' own machine code is tested anywhere.

   Such a processor stops at a tile instruction with SIGILL. The handler here reads the instruction, does what the Intel SDM (volume 2) says it
   does to tiles of its own, one set for each thread, and goes on behind it: ldtilecfg, tilerelease, tilezero, tileloadd, tilestored,
   tileloaddt1, tdpbf16ps, tdpbsud, tdpbssd; and vmulph, vfmadd231ph and vcvtne2ps2bf16 of three registers of 512 bits, which every processor with tiles
   has. Linux on x86-64 only; the file that includes it defines _GNU_SOURCE first. */
#ifndef AMX_H
#define AMX_H

#if defined(__linux__) && defined(__x86_64__)
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

typedef struct amx_state {
    uint16_t bytes[8];
    uint8_t rows[8];
    uint8_t tile[8][16][64];
} amx_state;

static __thread amx_state amx_tiles;
static long amx_count, amx_bytes_count, amx_halves_count; /* instructions of tiles done, of them products of bytes; products of F16 */

static int64_t amx_register(const ucontext_t *c, int i)
{
    static const int at[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                               REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return (int64_t)c->uc_mcontext.gregs[at[i]];
}

/* The address in ModRM, SIB and displacement at *p, which moves behind them. stride: the index register times its scale, when split from the
   address as tile loads do. */
static uint8_t *amx_address(const ucontext_t *c, const uint8_t **p, int x, int b, int64_t *stride)
{
    const uint8_t *at = *p;
    int mod = *at >> 6, rm = *at & 7;
    int64_t base = 0;
    int32_t far = 0;
    *stride = 0;
    at++;
    if (rm == 4) {
        int index = (*at >> 3 & 7) | x << 3, from = (*at & 7) | b << 3;
        if (index != 4) *stride = amx_register(c, index) * ((int64_t)1 << (*at >> 6));
        if (mod == 0 && (*at & 7) == 5) mod = 4;
        else base = amx_register(c, from);
        at++;
    } else if (mod == 0 && rm == 5) {
        memcpy(&far, at, 4);
        *p = at + 4;
        return (uint8_t *)(uintptr_t)(at + 4 + far);
    } else {
        base = amx_register(c, rm | b << 3);
    }
    if (mod == 1) far = (int8_t)*at++;
    if (mod == 2 || mod == 4) { memcpy(&far, at, 4); at += 4; }
    *p = at;
    return (uint8_t *)(uintptr_t)(base + far);
}

static float amx_bf16(const uint8_t *from)
{
    uint32_t bits = (uint32_t)(from[0] | from[1] << 8) << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

/* d[m][n] += a[m][k][0] b[k][n][0] + a[m][k][1] b[k][n][1] */
static void amx_product(amx_state *t, int d, int a, int b)
{
    for (int m = 0; m < t->rows[d]; m++)
        for (int n = 0; n < t->bytes[d] / 4; n++) {
            float sum;
            memcpy(&sum, t->tile[d][m] + 4 * n, 4);
            for (int k = 0; k < t->bytes[a] / 4 && k < t->rows[b]; k++)
                for (int i = 0; i < 2; i++) sum += amx_bf16(t->tile[a][m] + 4 * k + 2 * i) * amx_bf16(t->tile[b][k] + 4 * n + 2 * i);
            memcpy(t->tile[d][m] + 4 * n, &sum, 4);
        }
}

/* d[m][n] += sum over i < 4 of a[m][k][i] b[k][n][i], a with sign and b with or without */
static void amx_bytes(amx_state *t, int d, int a, int b, int sign)
{
    for (int m = 0; m < t->rows[d]; m++)
        for (int n = 0; n < t->bytes[d] / 4; n++) {
            uint32_t sum;
            memcpy(&sum, t->tile[d][m] + 4 * n, 4);
            for (int k = 0; k < t->bytes[a] / 4 && k < t->rows[b]; k++)
                for (int i = 0; i < 4; i++) {
                    int w = t->tile[b][k][4 * n + i];
                    sum += (uint32_t)((int8_t)t->tile[a][m][4 * k + i] * (sign ? (int8_t)w : w));
                }
            memcpy(t->tile[d][m] + 4 * n, &sum, 4);
        }
}

/* Where the signal's frame keeps part `part` of register i of 512 bits: its lowest 128 bits (0), the next (1), the upper half (2). All 512 of
   registers 16 and on lie in one piece. The frame has the layout of XSAVE that is not compacted. */
static uint8_t *amx_vector(const ucontext_t *c, int i, int part)
{
    uint8_t *frame = (uint8_t *)c->uc_mcontext.fpregs;
    uint32_t a = 0xd, b = 0, n = i >= 16 ? 7 : part == 1 ? 2 : 6, d = 0;
    if (i < 16 && part == 0) return frame + 160 + 16 * i;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(n), "=d"(d));
    return frame + b + (i >= 16 ? 64 * (i - 16) + (part == 0 ? 0 : part == 1 ? 16 : 32) : part == 1 ? 16 * i : 32 * i);
}

static void amx_vector_copy(const ucontext_t *c, int i, uint8_t *v, int store)
{
    static const int at[3] = {0, 16, 32}, bytes[3] = {16, 16, 32};
    for (int part = 0; part < 3; part++) {
        uint8_t *there = amx_vector(c, i, part);
        if (store) memcpy(there, v + at[part], (size_t)bytes[part]);
        else memcpy(v + at[part], there, (size_t)bytes[part]);
    }
}

/* A double as F16, rounded once: F32 between them keeps whether anything was cut off in its last bit. */
static uint16_t amx_half(double v)
{
    float f = (float)v;
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((double)f != v && v == v) {
        if (fabs((double)f) > fabs(v)) bits--;
        bits |= 1;
        memcpy(&f, &bits, 4);
    }
    return moq_f16_encode(f);
}

/* vmulph zmm, zmm, zmm: 62, then R X B R' 0 1 0 1, W vvvv 1 00, z LL b V' aaa; vfmadd231ph: 0 1 1 0, 01. Products of 11 bits each are exact in F32, and in F64
   sums with them are but where they are 2^30 times larger. */
static int amx_halves(ucontext_t *c, const uint8_t *p)
{
    const int sums = (p[1] & 15) == 6 && (p[2] & 0x87) == 5 && p[4] == 0xb8;
    if ((!sums && ((p[1] & 15) != 5 || (p[2] & 0x87) != 4 || p[4] != 0x59)) || (p[3] & 0xf7) != 0x40 || p[5] < 0xc0) return 0;
    const int to = (p[5] >> 3 & 7) | (~p[1] >> 7 & 1) << 3 | (~p[1] >> 4 & 1) << 4, first = (~p[2] >> 3 & 15) | (~p[3] >> 3 & 1) << 4;
    const int second = (p[5] & 7) | (~p[1] >> 5 & 1) << 3 | (~p[1] >> 6 & 1) << 4;
    uint16_t a[32], b[32], d[32];
    amx_vector_copy(c, to, (uint8_t *)d, 0);
    amx_vector_copy(c, first, (uint8_t *)a, 0);
    amx_vector_copy(c, second, (uint8_t *)b, 0);
    for (int i = 0; i < 32; i++) {
        const double v = (double)moq_f16_decode(a[i]) * (double)moq_f16_decode(b[i]);
        a[i] = amx_half(sums ? v + (double)moq_f16_decode(d[i]) : v);
    }
    amx_vector_copy(c, to, (uint8_t *)a, 1);
    __atomic_fetch_add(&amx_halves_count, 1, __ATOMIC_RELAXED);
    c->uc_mcontext.gregs[REG_RIP] += 6;
    return 1;
}

/* vcvtne2ps2bf16 zmm, zmm, zmm: R X B R' 0 0 1 0, 0 vvvv 1 11, and as above. The upper half comes from the first source; subnormal numbers are 0, before and
   after; ties go to even; a NaN stays one. */
static int amx_rounded(ucontext_t *c, const uint8_t *p)
{
    if ((p[1] & 15) != 2 || (p[2] & 0x87) != 7 || p[4] != 0x72 || (p[3] & 0xf7) != 0x40 || p[5] < 0xc0) return 0;
    const int to = (p[5] >> 3 & 7) | (~p[1] >> 7 & 1) << 3 | (~p[1] >> 4 & 1) << 4, first = (~p[2] >> 3 & 15) | (~p[3] >> 3 & 1) << 4;
    const int second = (p[5] & 7) | (~p[1] >> 5 & 1) << 3 | (~p[1] >> 6 & 1) << 4;
    uint32_t from[32];
    uint16_t r[32];
    amx_vector_copy(c, second, (uint8_t *)from, 0);
    amx_vector_copy(c, first, (uint8_t *)(from + 16), 0);
    for (int i = 0; i < 32; i++) {
        const uint32_t v = from[i], size = v & 0x7fffffff;
        if (size > 0x7f800000) r[i] = (uint16_t)(v >> 16 | 0x40);
        else if (size < 0x00800000) r[i] = (uint16_t)(v >> 31 << 15);
        else r[i] = (uint16_t)((v + 0x7fff + (v >> 16 & 1)) >> 16);
    }
    amx_vector_copy(c, to, (uint8_t *)r, 1);
    c->uc_mcontext.gregs[REG_RIP] += 6;
    return 1;
}

/* 0: none of the instructions above. Three bytes of VEX: C4, RXB and map, W vvvv L pp. */
static int amx_step(ucontext_t *c)
{
    const uint8_t *p = (const uint8_t *)(uintptr_t)c->uc_mcontext.gregs[REG_RIP];
    amx_state *t = &amx_tiles;
    int64_t stride;
    if (p[0] == 0x62) return amx_halves(c, p) || amx_rounded(c, p);
    if (p[0] != 0xc4 || (p[1] & 31) != 2) return 0;
    int x = !(p[1] >> 6 & 1), b = !(p[1] >> 5 & 1), third = ~p[2] >> 3 & 15, prefix = p[2] & 3, op = p[3], mod = p[4] >> 6, reg = p[4] >> 3 & 7, rm = p[4] & 7;
    p += 4;
    if (op == 0x49 && prefix == 0 && mod == 3) {
        memset(t, 0, sizeof *t);
        p++;
    } else if (op == 0x49 && prefix == 0) {
        const uint8_t *from = amx_address(c, &p, x, b, &stride) + stride;
        memset(t, 0, sizeof *t);
        memcpy(t->bytes, from + 16, sizeof t->bytes);
        memcpy(t->rows, from + 48, sizeof t->rows);
    } else if (op == 0x49 && prefix == 3 && mod == 3) {
        memset(t->tile[reg], 0, sizeof t->tile[reg]);
        p++;
    } else if (op == 0x4b && prefix != 0 && mod != 3) { /* 1, 3: loads */
        uint8_t *at = amx_address(c, &p, x, b, &stride);
        if (prefix & 1) memset(t->tile[reg], 0, sizeof t->tile[reg]);
        for (int r = 0; r < t->rows[reg]; r++, at += stride) {
            if (prefix & 1) memcpy(t->tile[reg][r], at, t->bytes[reg]);
            else memcpy(at, t->tile[reg][r], t->bytes[reg]);
        }
    } else if (op == 0x5c && prefix == 2 && mod == 3) {
        amx_product(t, reg, rm, third);
        p++;
    } else if (op == 0x5e && (prefix == 2 || prefix == 3) && mod == 3) {
        amx_bytes(t, reg, rm, third, prefix == 3);
        __atomic_fetch_add(&amx_bytes_count, 1, __ATOMIC_RELAXED);
        p++;
    } else {
        return 0;
    }
    __atomic_fetch_add(&amx_count, 1, __ATOMIC_RELAXED);
    c->uc_mcontext.gregs[REG_RIP] = (greg_t)(uintptr_t)p;
    return 1;
}

static void amx_trap(int number, siginfo_t *info, void *context)
{
    (void)info;
    if (!amx_step((ucontext_t *)context)) signal(number, SIG_DFL); /* the instruction runs again and ends the program */
}

static void amx_emulate(void)
{
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_sigaction = amx_trap;
    a.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &a, NULL);
}
#endif
#endif
