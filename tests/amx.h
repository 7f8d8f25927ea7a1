/* amx.h - the tile instructions of AMX for processors without them, so that the kernels' own machine code is tested anywhere.

   Such a processor stops at a tile instruction with SIGILL. The handler here reads the instruction, does what the Intel SDM (volume 2) says it
   does to tiles of its own, one set for each thread, and goes on behind it: ldtilecfg, tilerelease, tilezero, tileloadd, tilestored,
   tileloaddt1, tdpbf16ps, tdpbsud, tdpbssd. Linux on x86-64 only; the file that includes it defines _GNU_SOURCE first. */
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
static long amx_count, amx_bytes_count; /* instructions done, and products of bytes */

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

/* 0: none of the instructions above. Three bytes of VEX: C4, RXB and map, W vvvv L pp. */
static int amx_step(ucontext_t *c)
{
    const uint8_t *p = (const uint8_t *)(uintptr_t)c->uc_mcontext.gregs[REG_RIP];
    amx_state *t = &amx_tiles;
    int64_t stride;
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
