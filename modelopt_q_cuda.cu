/* modelopt_q_cuda.cu - the CUDA backend of modelopt_q.h.

   Add this file to the compiler line and ask for the backend; nothing else changes:

       nvcc -O2 -arch=native chat.c modelopt_q_cuda.cu -o chat          H100, H200: -gencode=arch=compute_90a,code=sm_90a, prompts about twice as fast

       desc.backend = moq_cuda_backend(0, &err);          device 0
       ...
       moq_backend_destroy(desc.backend);

   Needs the CUDA Toolkit 12.1 or later and a GPU of compute capability 8.0 or higher. The implementation part of modelopt_q.h
   lies in one of the program's other files, as always. Do not compile with -use_fast_math: rounding as stored needs exact divisions.

   What a caller sees is struct moq_backend of modelopt_q.h, and the CPU filling of that table is the definition of right and wrong.
   Activations are F32, or BF16 where moq_cuda_backend_full is asked for it. Work of one backend runs in order on a stream of its own; calls return
   before the device is done. Nothing is global: several backends, on one device or on several, do not know of each other.

   Errors: calls that can fail name call, device and remedy in moq_error. A failed launch or copy in one of the others is kept and
   comes out of the next `sync`. Running out of device memory leaves the backend as it was.

   The same call gives the same bits in every run: sums have a fixed order, there are no floating-point atomics.

   Words used below: `part` is one linear layer in device form; `bank` is the parts that are prepared together (the q, k and v of
   a layer, all experts of a mixture); `feed` is what happens to inputs before the product (rotation, pre_quant_scale, rounding);
   functions on the host are moqc_..., on the device moqk_...

   Contents: search for the tag.
       >>cuda-api        what this file adds to the declarations of modelopt_q.h
       >>cuda-base       errors, device memory, the stream, uploads and downloads, scratch
       >>cuda-numbers    number formats on the device
       >>cuda-prepare    moq_linear -> part: codes, scales and zero points in one row-major form
       >>cuda-linear     the feed; products of any scheme and any number of rows
       >>cuda-decode     1 to 16 rows of x: weights stream through the tensor cores once
       >>cuda-ring       the same on SM90: weights of 8 and 16 bits, or much of x
       >>cuda-runs       the same of 4-bit weights, but for experts
       >>cuda-gemm       17 and more rows of x: what the kernels of both instruction sets share
       >>cuda-gemm-wgmma   the same on compute capability 9.0: wgmma with decoded weights in registers
       >>cuda-gemm-bytes   the same where inputs are rounded to 8 bits as stored: products of bytes
       >>cuda-gemm-mma   the same on every device: mma.sync
       >>cuda-dispatch   which kernel a layer gets: the table
       >>cuda-few-host   how products of 1 to 16 rows are cut and launched
       >>cuda-gemm-host  how products of 17 and more rows are cut and launched
       >>cuda-together   calls of a recording that become one launch
       >>cuda-ops        embed, norm, rope, activation, add, argmax
       >>cuda-kv         KV caches
       >>cuda-attention  attention with F32 arithmetic: every format and head size
       >>cuda-attention-mma  steps of caches as operands of tensor cores
       >>cuda-attention-stream  attention of few queries on tensor cores: caches stream through shared memory
       >>cuda-attention-tiles  attention of many queries on tensor cores: what the kernels of both instruction sets share
       >>cuda-attention-wgmma  the same on compute capability 9.0: wgmma
       >>cuda-attention-sync   the same on every device: mma.sync
       >>cuda-attention-host   which of them runs
       >>cuda-moe        mixtures of experts: routing, grouping, the weighted sum
       >>cuda-moe-few    the same of few rows on SM90, 4-bit weights: one launch
       >>cuda-moe-runs   the same of few rows for each of many experts: two launches
       >>cuda-moe-host   which of them runs, and their launches
       >>cuda-ssm        state-space mixers; copies of heads
       >>cuda-backend    graphs, the function table, creation
*/
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "modelopt_q_cuda.cu needs compute capability 8.0 or higher: compile with -arch=sm_80 or later (-arch=native finds no GPU on this machine, or an older one)"
#endif

#include "modelopt_q.h"

#include <cuda.h> /* types: no function of the driver is linked */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* ------------------------------------------------------------------------------------------------
   >>cuda-api        what this file adds to the declarations of modelopt_q.h
   ------------------------------------------------------------------------------------------------ */

/* moq_cuda_backend_with, and two choices more. activations: MOQ_F32 or MOQ_BF16. memory: where device memory comes from, called with the
   device current; NULL: cudaMalloc. A program that uses it repeats this declaration. */
extern "C" moq_backend *moq_cuda_backend_full(const moq_cuda_desc *desc, moq_dtype activations, const moq_allocator *memory, moq_error *err);

/* ------------------------------------------------------------------------------------------------
   >>cuda-base       errors, device memory, the stream, uploads and downloads, scratch
   The only place that takes device memory and that waits for the device.
   ------------------------------------------------------------------------------------------------ */

/* Instructions of compute capability 9.0 alone: nvcc -gencode=arch=compute_90a,code=sm_90a. */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MOQK_WGMMA 1
#else
#define MOQK_WGMMA 0
#endif

/* Code for devices before compute capability 9.0: no copy engine, no clusters, no launches that overlap. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define MOQK_SM80 1
#else
#define MOQK_SM80 0
#endif

enum {
    MOQC_SLOTS = 4,               /* pinned staging: so many pieces of */
    MOQC_SLOT_BYTES = 4 << 20,
    MOQC_MOE_ROWS = 2048,         /* rows of one pass through a mixture of experts */
    MOQC_MOE_FED = 1024,          /* the same where inputs go through the feed */
    MOQC_MOE_EACH = 12,           /* choices of an expert, on average, up to which experts that could do without may go through it */
    MOQC_PARTIALS = 16384,        /* partial results of one attention call: rows * heads * splits */
    MOQC_GIVEN = 4 * 24,          /* bytes of what splits of attention give to one of them, per value of a head: 8 heads have 2 quads of it, shares are less
                                     than twice as large */
    MOQC_TILE_TOKENS = 304,       /* the most rows of x in a tile of >>cuda-gemm */
    MOQC_FEW_ROWS = 16            /* rows of x that need none of the room of >>cuda-gemm */
};

/* Device memory that was handed out; kept so that `release` knows its size and `destroy` finds all of it. */
typedef struct moqc_block {
    struct moqc_block *next;
    void *ptr;
    size_t bytes;
    int host; /* pinned memory of the host instead */
} moqc_block;

/* Room that everything prepared so far needs; counts of elements. A row is a row of a call, a choice a pair of row and expert. */
typedef struct moqc_need {
    int64_t cols, rank;                      /* per row */
    int64_t moe_cols, moe_feed, moe_rank, moe_hidden, moe_out; /* per choice; moe_feed: of those that always go through the feed */
    int64_t moe_top;                         /* choices per row */
    int64_t experts;
    int64_t partial;                         /* per partial result of attention */
    int64_t chains;                          /* per row: neighbours in their slots */
} moqc_need;

/* cuTensorMapEncodeTiled. */
typedef CUresult (*moqc_encode_map)(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *at, const cuuint64_t *size, const cuuint64_t *pitch,
                                    const cuuint32_t *box, const cuuint32_t *step, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);

typedef struct moqc_ctx {
    moq_backend be;
    moq_allocator host, memory;
    int device, sm, sm_count, most_shared;   /* sm: 10 * major + minor of the compute capability; shared memory of a block */
    int bf16;                                /* activations are BF16, else F32 */
    moqc_encode_map encode_map;              /* NULL: the driver has none */
    int wgmma;                               /* compute capability 9.0, and compiled for its own instructions (sm_90a) */
    int cooperates;                          /* cooperative launches are there */
    int gemm_tokens, gemm_cut; /* for measurements: tokens of a tile; 1 to 4 blocks of a cluster that share one, 5, 6 runs (mma: 2, 3); 0: automatic */
    char name[24], kernel[40];
    moq_act act;
    cudaStream_t stream;
    moq_error error;                         /* the first one since the last sync; code MOQ_OK: none */
    int capturing, graphs;
    int holds, waiting;                      /* the product that is being launched may wait; something does: see >>cuda-together */
    struct moqc_held *held;
    moqc_block *blocks;

    uint8_t *pinned;                         /* [MOQC_SLOTS][MOQC_SLOT_BYTES], then one more for downloads; NULL until the first copy */
    cudaEvent_t slot_free[MOQC_SLOTS], half_full[2]; /* of uploads; of the two halves of the download piece */
    int slot;
    size_t slot_used;

    uint8_t *raw;                            /* stored bytes on their way into a part; NULL when nothing is being prepared */
    size_t raw_bytes, raw_used;
    uint8_t *aside;                          /* forms that are dropped again */
    size_t aside_bytes;

    moqc_need need;
    uint8_t *scratch;
    size_t scratch_bytes;
    int64_t moe_rows;
    float *t, *r, *mid, *hidden, *out, *weight, *partial; /* in scratch */
    uint8_t *parted;                         /* x of few rows as >>cuda-ring reads it */
    int32_t *index, *place, *row_of, *expert_of, *tiles, *arrived, *chains;
    uint32_t *given;                         /* see moqk_attend_args; its own block, because it must stay as a launch leaves it; for heads of so many values */
    int32_t given_dim;
    uint8_t *x16;                            /* see >>cuda-gemm; NULL while rows are few */
    float *partial_sums, *token_unit;
    int32_t *turn;
    int narrows;                             /* a product of F32 inputs could have read them as BF16 where they are */
    const void *narrowed;                    /* [narrow_rows, narrow_cols] F32, of which x16 is BF16 now, row by row; NULL: none */
    int64_t narrow_rows, narrow_cols;
} moqc_ctx;

static moqc_ctx *moqc_of(const moq_backend *be) { return (moqc_ctx *)be->ctx; }

static int64_t moqc_max(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t moqc_min(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ static constexpr int64_t moqk_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ static constexpr int64_t moqk_pad(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

/* Do these bytes not touch those? */
static int moqc_apart(const void *a, int64_t a_bytes, const void *b, int64_t b_bytes)
{
    return (uintptr_t)a + (uintptr_t)a_bytes <= (uintptr_t)b || (uintptr_t)b + (uintptr_t)b_bytes <= (uintptr_t)a;
}

/* ---- errors ---- */

static void moqc_let_go(moqc_ctx *c); /* see >>cuda-together */

/* This backend's device is current while one of these lives; the caller's comes back afterwards. Launches that wait come first, and what is narrowed may
   change, unless the caller looks at both itself. */
struct moqc_on {
    int before;
    explicit moqc_on(moqc_ctx *c, int keeps = 0) : before(c->device)
    {
        cudaGetDevice(&before);
        if (before != c->device) cudaSetDevice(c->device);
        now = c->device;
        if (!keeps) c->narrowed = NULL;
        if (c->waiting && !keeps) moqc_let_go(c);
    }
    ~moqc_on() { if (before != now) cudaSetDevice(before); }
private:
    int now;
};

static const char *moqc_remedy(cudaError_t e)
{
    switch (e) {
    case cudaErrorMemoryAllocation: return "use a smaller context, fewer slots or a smaller model, or free memory on this device";
    case cudaErrorNoKernelImageForDevice: return "compile modelopt_q_cuda.cu for this device, e.g. nvcc -arch=native";
    case cudaErrorInsufficientDriver: return "install a driver that is as new as the CUDA Toolkit of this program";
    case cudaErrorNoDevice: case cudaErrorInvalidDevice: return "check the device number and that the driver sees the GPU (nvidia-smi)";
    case cudaErrorIllegalAddress: case cudaErrorMisalignedAddress: case cudaErrorLaunchFailure: case cudaErrorIllegalInstruction: case cudaErrorAssert:
        return "a buffer passed in is too small or no memory of this backend, or a kernel has a defect; the device context is lost, start the program again";
    default: return "the CUDA documentation explains this code; run under compute-sanitizer to find the place";
    }
}

static moq_result moqc_fail(const moqc_ctx *c, cudaError_t e, const char *what, moq_error *err)
{
    moq_result code = e == cudaErrorMemoryAllocation ? MOQ_E_NOMEM : MOQ_E_BACKEND;
    return moq_fail(err, code, c->name, "%s failed: %s (%s); %s", what, cudaGetErrorString(e), cudaGetErrorName(e), moqc_remedy(e));
}

/* Keep the first error for sync. Returns 1 when there is none. */
static int moqc_ok(moqc_ctx *c, cudaError_t e, const char *what)
{
    if (e == cudaSuccess) return 1;
    cudaGetLastError();
    if (c->error.code == MOQ_OK) moqc_fail(c, e, what, &c->error);
    return 0;
}

/* The error that was kept, if any; it does not come out of sync a second time. */
static moq_result moqc_told(moqc_ctx *c, moq_error *err)
{
    moq_result code = c->error.code;
    if (code != MOQ_OK && err) *err = c->error;
    c->error.code = MOQ_OK;
    return code;
}

/* Why something could not be made: the error that was kept, which is told here and not again by sync, else host memory ran out. */
static moq_result moqc_why(moqc_ctx *c, const char *name, moq_error *err)
{
    return c->error.code != MOQ_OK ? moqc_told(c, err) : moq_fail(err, MOQ_E_NOMEM, name, "no host memory to prepare it");
}

static int moqc_launched(moqc_ctx *c, const char *what) { return moqc_ok(c, cudaGetLastError(), what); }

static void moqc_clear(moq_error *err)
{
    if (err) { err->code = MOQ_OK; err->os_code = 0; err->offset = -1; err->file[0] = err->object[0] = err->text[0] = 0; }
}

/* The kernel of the table entry's activation type. */
#define MOQC_BY_ACT(c, call_f32, call_bf16) do { if ((c)->bf16) { call_bf16; } else { call_f32; } } while (0)

/* ---- device memory ---- */

/* `bytes` (at least 1) of device memory, not zeroed, or NULL; *err says how much was asked for and what is left. */
static void *moqc_take(moqc_ctx *c, size_t bytes, const char *what, moq_error *err)
{
    size_t left = 0, total = 0;
    void *ptr = NULL;
    moqc_block *b = (moqc_block *)moq_allocate(&c->host, sizeof *b);
    if (!b) { moq_fail(err, MOQ_E_NOMEM, c->name, "no host memory for %s", what); return NULL; }
    if (bytes == 0) bytes = 1;
    if (c->memory.alloc) ptr = c->memory.alloc(c->memory.user, bytes, 256);
    else if (bytes < SIZE_MAX / 2 && cudaMalloc(&ptr, bytes) != cudaSuccess) { cudaGetLastError(); ptr = NULL; }
    if (!ptr) {
        moq_release(&c->host, b, sizeof *b);
        if (cudaMemGetInfo(&left, &total) != cudaSuccess) cudaGetLastError();
        moq_fail(err, MOQ_E_NOMEM, c->name, "no device memory for %llu bytes of %s, %llu of %llu MiB are free; %s", (unsigned long long)bytes, what,
                 (unsigned long long)(left >> 20), (unsigned long long)(total >> 20), moqc_remedy(cudaErrorMemoryAllocation));
        return NULL;
    }
    b->ptr = ptr;
    b->bytes = bytes;
    b->host = 0;
    b->next = c->blocks;
    c->blocks = b;
    return ptr;
}

/* Waits for the stream: work that was queued may still use the block. */
static void moqc_give(moqc_ctx *c, void *ptr)
{
    moqc_block **at = &c->blocks, *b;
    if (!ptr) return;
    while (*at && (*at)->ptr != ptr) at = &(*at)->next;
    if (!*at) return;
    b = *at;
    *at = b->next;
    if (!c->capturing) moqc_ok(c, cudaStreamSynchronize(c->stream), "waiting before memory is released");
    if (b->host) moqc_ok(c, cudaFreeHost(ptr), "cudaFreeHost");
    else if (c->memory.alloc) c->memory.release(c->memory.user, ptr, b->bytes);
    else moqc_ok(c, cudaFree(ptr), "cudaFree");
    moq_release(&c->host, b, sizeof *b);
}

static void *moqc_alloc(moq_backend *be, size_t bytes, moq_error *err)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    moqc_clear(err);
    void *p = moqc_take(c, bytes, "a buffer", err);
    if (p) moqc_ok(c, cudaMemsetAsync(p, 0, bytes, c->stream), "cudaMemset");
    return p;
}

static void moqc_release(moq_backend *be, void *ptr)
{
    moqc_on on(moqc_of(be));
    moqc_give(moqc_of(be), ptr);
}

/* At least `bytes` of device memory at *ptr; what it held is lost. 0: there is none, and *ptr is as it was. */
static int moqc_widen(moqc_ctx *c, uint8_t **ptr, size_t *have, size_t bytes, moq_error *err)
{
    size_t want = bytes > ((size_t)8 << 20) ? bytes : (size_t)8 << 20;
    if (bytes <= *have) return 1;
    uint8_t *p = (uint8_t *)moqc_take(c, want, "weights on their way", err);
    if (!p) return 0;
    moqc_give(c, *ptr);
    *ptr = p;
    *have = want;
    return 1;
}

/* ---- copies: through pinned memory, because the driver would copy a mapped file page by page ---- */

static int moqc_pinned(moqc_ctx *c)
{
    if (c->pinned) return 1;
    if (!moqc_ok(c, cudaMallocHost((void **)&c->pinned, (size_t)(MOQC_SLOTS + 1) * MOQC_SLOT_BYTES), "cudaMallocHost")) c->pinned = NULL;
    return c->pinned != NULL;
}

/* Copies cannot be part of a graph: their host memory is reused. */
static int moqc_no_capture(moqc_ctx *c, const char *what)
{
    if (!c->capturing) return 1;
    if (c->error.code == MOQ_OK) moq_fail(&c->error, MOQ_E_STATE, c->name,
                                          "%s between capture_begin and capture_end; move it out of the recorded calls", what);
    return 0;
}

/* Pinned memory for `bytes` <= MOQC_SLOT_BYTES that the device has finished reading. Small pieces share a slot. */
static uint8_t *moqc_slot(moqc_ctx *c, size_t bytes)
{
    if (!moqc_pinned(c)) return NULL;
    if (c->slot_used + bytes > MOQC_SLOT_BYTES) {
        if (!moqc_ok(c, cudaEventRecord(c->slot_free[c->slot], c->stream), "cudaEventRecord")) return NULL;
        c->slot = (c->slot + 1) % MOQC_SLOTS;
        c->slot_used = 0;
        if (!moqc_ok(c, cudaEventSynchronize(c->slot_free[c->slot]), "waiting for a copy")) return NULL;
    }
    uint8_t *p = c->pinned + (size_t)c->slot * MOQC_SLOT_BYTES + c->slot_used;
    c->slot_used += (size_t)moqk_pad((int64_t)bytes, 16);
    return p;
}

static int moqc_send(moqc_ctx *c, void *dst, const void *src, size_t bytes)
{
    for (size_t at = 0, n; at < bytes; at += n) {
        n = bytes - at < MOQC_SLOT_BYTES ? bytes - at : (size_t)MOQC_SLOT_BYTES;
        uint8_t *p = moqc_slot(c, n);
        if (!p) return 0;
        memcpy(p, (const uint8_t *)src + at, n);
        if (!moqc_ok(c, cudaMemcpyAsync((uint8_t *)dst + at, p, n, cudaMemcpyHostToDevice, c->stream), "an upload")) return 0;
    }
    return 1;
}

static void moqc_upload(moq_backend *be, void *dst, const void *src, size_t bytes)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    if (moqc_no_capture(c, "upload")) moqc_send(c, dst, src, bytes);
}

enum { MOQC_HALF_BYTES = MOQC_SLOT_BYTES / 2 };

/* Takes `bytes` values that a download brought to the host. */
typedef void (*moqc_taker)(void *dst, size_t at, const uint8_t *piece, size_t bytes);

/* `bytes` at src, after all work before, piece by piece through the two halves of the pinned piece: one is on its way while the other is taken. */
static void moqc_fetch(moqc_ctx *c, const void *src, size_t bytes, moqc_taker take, void *dst)
{
    if (bytes == 0 || !moqc_pinned(c)) return;
    uint8_t *p = c->pinned + (size_t)MOQC_SLOTS * MOQC_SLOT_BYTES;
    const size_t pieces = (bytes + MOQC_HALF_BYTES - 1) / MOQC_HALF_BYTES;
    for (size_t i = 0; i <= pieces; i++) {
        const size_t at = i * MOQC_HALF_BYTES, before = at - MOQC_HALF_BYTES;
        if (i < pieces) {
            const size_t n = bytes - at < MOQC_HALF_BYTES ? bytes - at : (size_t)MOQC_HALF_BYTES;
            cudaError_t e = cudaMemcpyAsync(p + i % 2 * MOQC_HALF_BYTES, (const uint8_t *)src + at, n, cudaMemcpyDeviceToHost, c->stream);
            if (e == cudaSuccess && i + 1 < pieces) e = cudaEventRecord(c->half_full[i % 2], c->stream);
            if (!moqc_ok(c, e, "a download")) return;
        }
        if (i == 0) continue;
        if (!moqc_ok(c, i < pieces ? cudaEventSynchronize(c->half_full[(i - 1) % 2]) : cudaStreamSynchronize(c->stream), "waiting for a download")) return;
        take(dst, before, p + (i - 1) % 2 * MOQC_HALF_BYTES, bytes - before < MOQC_HALF_BYTES ? bytes - before : (size_t)MOQC_HALF_BYTES);
    }
}

static void moqc_take_bytes(void *dst, size_t at, const uint8_t *piece, size_t bytes) { memcpy((uint8_t *)dst + at, piece, bytes); }

/* BF16 becomes F32, four values at a time. */
static void moqc_take_bf16(void *dst, size_t at, const uint8_t *piece, size_t bytes)
{
    uint8_t *to = (uint8_t *)dst + at * 2;
    size_t i = 0;
    for (; i + 8 <= bytes; i += 8) {
        uint64_t w, pair[2];
        memcpy(&w, piece + i, 8);
        pair[0] = (w & 0xffff) << 16 | (w & 0xffff0000u) << 32;
        pair[1] = (w >> 32 & 0xffff) << 16 | w >> 48 << 48;
        memcpy(to + 2 * i, pair, 16);
    }
    for (; i < bytes; i += 2) {
        const uint32_t v = (uint32_t)(piece[i] | piece[i + 1] << 8) << 16;
        memcpy(to + 2 * i, &v, 4);
    }
}

static void moqc_download(moq_backend *be, void *dst, const void *src, size_t bytes)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    if (moqc_no_capture(c, "download")) moqc_fetch(c, src, bytes, moqc_take_bytes, dst);
}

static void moqc_upload_act(moq_backend *be, void *dst, const float *src, size_t count)
{
    moqc_ctx *c = moqc_of(be);
    if (!c->bf16) { moqc_upload(be, dst, src, count * sizeof *src); return; }
    moqc_on on(c);
    if (!moqc_no_capture(c, "upload_act")) return;
    for (size_t at = 0, n, most = MOQC_SLOT_BYTES / 2; at < count; at += n) {
        n = count - at < most ? count - at : most;
        uint16_t *p = (uint16_t *)(void *)moqc_slot(c, n * 2);
        if (!p) return;
        for (size_t i = 0; i < n; i++) p[i] = moq_bf16_encode(src[at + i]);
        if (!moqc_ok(c, cudaMemcpyAsync((uint16_t *)dst + at, p, n * 2, cudaMemcpyHostToDevice, c->stream), "an upload")) return;
    }
}

static void moqc_download_act(moq_backend *be, float *dst, const void *src, size_t count)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    if (moqc_no_capture(c, "download_act")) moqc_fetch(c, src, count * (c->bf16 ? 2 : 4), c->bf16 ? moqc_take_bf16 : moqc_take_bytes, dst);
}

/* ---- memory of the host that the device writes ---- */

static void *moqc_host_alloc(moq_backend *be, size_t bytes, moq_error *err)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    void *ptr = NULL;
    moqc_clear(err);
    moqc_block *b = (moqc_block *)moq_allocate(&c->host, sizeof *b);
    if (b && cudaHostAlloc(&ptr, bytes ? bytes : 1, cudaHostAllocPortable) != cudaSuccess) { cudaGetLastError(); ptr = NULL; }
    if (!ptr) {
        if (b) moq_release(&c->host, b, sizeof *b);
        moq_fail(err, MOQ_E_NOMEM, c->name, "no %llu bytes of pinned host memory; use fewer slots", (unsigned long long)bytes);
        return NULL;
    }
    memset(ptr, 0, bytes);
    b->ptr = ptr;
    b->bytes = bytes;
    b->host = 1;
    b->next = c->blocks;
    c->blocks = b;
    return ptr;
}

/* ---- copies on the device: overlapping ranges too, as memmove ---- */

/* One block; pieces of 4 KiB in the direction that reads before it overwrites. */
__global__ void moqk_move(uint8_t *dst, const uint8_t *src, size_t bytes)
{
    size_t piece = (size_t)blockDim.x * 4, pieces = (bytes + piece - 1) / piece;
    for (size_t i = 0; i < pieces; i++) {
        size_t at = (dst < src ? i : pieces - 1 - i) * piece + threadIdx.x;
        uint8_t v[4];
        for (int j = 0; j < 4; j++) v[j] = at + j * blockDim.x < bytes ? src[at + j * blockDim.x] : 0;
        __syncthreads();
        for (int j = 0; j < 4; j++) if (at + j * blockDim.x < bytes) dst[at + j * blockDim.x] = v[j];
        __syncthreads();
    }
}

static void moqc_copy(moq_backend *be, void *dst, const void *src, size_t bytes)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    const uint8_t *s = (const uint8_t *)src;
    uint8_t *d = (uint8_t *)dst;
    if (bytes == 0 || d == s) return;
    if (d + bytes <= s || s + bytes <= d) { moqc_ok(c, cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, c->stream), "a copy on the device"); return; }
    moqk_move<<<1, 1024, 0, c->stream>>>(d, s, bytes);
    moqc_launched(c, "copy");
}

static moq_result moqc_sync(moq_backend *be, moq_error *err)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    moqc_clear(err);
    if (!c->capturing) moqc_ok(c, cudaStreamSynchronize(c->stream), "work on the device");
    return moqc_told(c, err);
}

/* ---- scratch: one block, carved anew whenever a need grows ---- */

/* Hands out pieces of a block; with at NULL it only measures. */
typedef struct moqc_carver { uint8_t *at; size_t bytes; int overflow; } moqc_carver;

static void *moqc_carve(moqc_carver *v, int64_t a, int64_t b, size_t size)
{
    size_t start = v->bytes, n = (size_t)a * (size_t)b;
    if (a < 0 || b < 0 || (b > 0 && n / (size_t)b != (size_t)a) || n > (SIZE_MAX >> 2) / size || start > SIZE_MAX >> 1) { v->overflow = 1; n = 0; }
    v->bytes += (n * size + 255) & ~(size_t)255;
    return v->at ? v->at + start : NULL;
}

static void moqc_carve_all(moqc_ctx *c, moqc_carver *v)
{
    const moqc_need *n = &c->need;
    int64_t rows = c->be.max_rows, moe = n->moe_top > 0 ? moqc_min(rows, MOQC_MOE_ROWS) : 0, choices = moe * n->moe_top;
    const int64_t always = moqc_min(moe, MOQC_MOE_FED) * n->moe_top, few = moqc_min(choices, MOQC_MOE_EACH * n->experts);
    const int64_t fed = moqc_max(always * n->moe_feed, few * n->moe_cols);
    c->moe_rows = moe;
    c->t = (float *)moqc_carve(v, 1, moqc_max(rows * n->cols, fed), 4);
    c->r = (float *)moqc_carve(v, 1, moqc_max(rows * n->cols, fed), 4);
    c->parted = (uint8_t *)moqc_carve(v, moqc_min(rows, 16), moqk_pad(moqc_max(n->cols, n->rank), 256), 4);
    c->mid = (float *)moqc_carve(v, 1, moqc_max(rows * n->rank, always * n->moe_rank), 4);
    c->hidden = (float *)moqc_carve(v, choices, n->moe_hidden, 4);
    c->out = (float *)moqc_carve(v, choices, n->moe_out, 4);
    c->weight = (float *)moqc_carve(v, 1, choices, 4);
    c->index = (int32_t *)moqc_carve(v, 1, choices, 4);
    c->place = (int32_t *)moqc_carve(v, 1, choices, 4);
    c->row_of = (int32_t *)moqc_carve(v, 1, choices, 4);
    c->expert_of = (int32_t *)moqc_carve(v, 1, choices, 4);
    c->tiles = (int32_t *)moqc_carve(v, choices + n->experts + 1, 4, 4);
    c->partial = (float *)moqc_carve(v, n->partial > 0 ? MOQC_PARTIALS : 0, n->partial, 4);
    c->chains = (int32_t *)moqc_carve(v, rows, n->chains, 4);
    c->arrived = (int32_t *)moqc_carve(v, 1, n->partial > 0 ? MOQC_PARTIALS : 0, 4);
    const int64_t past = MOQC_TILE_TOKENS + 8, tokens = rows > MOQC_FEW_ROWS && n->cols > 0 ? rows + past : 0,
                  chosen = rows > MOQC_FEW_ROWS && choices > 0 ? choices + past : 0;
    c->x16 = (uint8_t *)moqc_carve(v, 1, moqc_max(tokens * moqk_pad(n->cols, 256), chosen * moqk_pad(n->moe_cols, 256)), c->bf16 ? 2 : 4);
    c->token_unit = (float *)moqc_carve(v, 1, moqc_max(tokens, chosen) + 1, 4); /* read in pairs */
    c->partial_sums = (float *)moqc_carve(v, tokens + chosen > 0 ? c->sm_count : 0, 2 * 128 * MOQC_TILE_TOKENS, 4);
    c->turn = (int32_t *)moqc_carve(v, tokens + chosen > 0 ? c->sm_count : 0, 4, 4);
    if (tokens + chosen == 0) c->turn = NULL;
}

/* Room for `need` and `rows` on top of what there is; nothing changes on failure. Graphs hold pointers into the old block, so it
   stays (until destroy) while there are any, and nothing moves within it: counters are zero where a graph looks for them. */
static moq_result moqc_grow(moqc_ctx *c, const moqc_need *need, int32_t rows, moq_error *err)
{
    moqc_ctx was = *c;
    moqc_carver v = {NULL, 0, 0};
    const int64_t *more = (const int64_t *)(const void *)need;
    int64_t *have = (int64_t *)(void *)&c->need;
    for (size_t i = 0; i < sizeof *need / sizeof *more; i++) have[i] = moqc_max(have[i], more[i]);
    if (c->graphs > 0) rows = (int32_t)moqc_max(rows, c->be.max_rows); /* room for fewer would be another block beside theirs */
    c->be.max_rows = rows;
    moqc_carve_all(c, &v);
    if (v.overflow) {
        *c = was;
        return moq_fail(err, MOQ_E_OVERFLOW, c->name, "scratch memory for %d rows does not fit the address space; reserve fewer", (int)rows);
    }
    const int moves = rows != was.be.max_rows || memcmp(&c->need, &was.need, sizeof was.need) != 0;
    if (v.bytes > c->scratch_bytes || (moves && c->graphs > 0)) {
        void *block = moqc_take(c, v.bytes, "scratch", err);
        if (!block) { *c = was; return MOQ_E_NOMEM; }
        if (c->graphs == 0 && !c->capturing) moqc_give(c, was.scratch);
        c->scratch = (uint8_t *)block;
        c->scratch_bytes = v.bytes;
    }
    v.at = c->scratch;
    v.bytes = 0;
    if (v.at) moqc_carve_all(c, &v);
    if (v.at && c->turn) moqc_ok(c, cudaMemsetAsync(c->turn, 0, (size_t)c->sm_count * 16, c->stream), "cudaMemset");
    if (v.at && c->need.partial > 0) moqc_ok(c, cudaMemsetAsync(c->arrived, 0, MOQC_PARTIALS * sizeof *c->arrived, c->stream), "cudaMemset");
    return MOQ_OK;
}

static moq_result moqc_reserve(moq_backend *be, int32_t rows, moq_error *err)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    moqc_need none;
    moqc_clear(err);
    memset(&none, 0, sizeof none);
    if (rows < 1) return moq_fail(err, MOQ_E_ARG, c->name, "reserve of %d rows, expected at least 1", (int)rows);
    moqc_give(c, c->raw); /* whoever reserves has prepared everything */
    moqc_give(c, c->aside);
    c->raw = c->aside = NULL;
    c->raw_bytes = c->raw_used = c->aside_bytes = 0;
    return moqc_grow(c, &none, rows, err);
}

/* ---- launches that overlap ---- */

__device__ __forceinline__ void moqk_dependents_may_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* Everything that kernels before this one wrote is there, when they were started early. */
__device__ __forceinline__ void moqk_wait_for_before()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* First words of a kernel that moqc_chain launches: what comes next may start (and fetch its weights), and what came before has ended. */
__device__ __forceinline__ void moqk_follow()
{
    moqk_dependents_may_start();
    moqk_wait_for_before();
}

/* A multiprocessor divides its memory into cache and shared memory anew only when it is idle. Products want all of it, so that the kernels between them
   take it as it is. */
static void moqc_all_shared(moqc_ctx *c, const void *kernel)
{
    moqc_ok(c, cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared), "cudaFuncSetAttribute");
}

/* A launch that may begin while the kernel before it ends; from SM90 on. */
template <typename... A, typename... B> static void moqc_chain(moqc_ctx *c, const char *what, void (*kernel)(A...), dim3 grid, dim3 threads,
                                                               size_t shared, B... args)
{
    cudaLaunchConfig_t how = {};
    cudaLaunchAttribute with[1];
    memset(with, 0, sizeof with);
    with[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    with[0].val.programmaticStreamSerializationAllowed = 1;
    how.gridDim = grid;
    how.blockDim = threads;
    how.dynamicSmemBytes = shared;
    how.stream = c->stream;
    how.attrs = with;
    how.numAttrs = c->sm >= 90 ? 1 : 0;
    if (c->capturing) moqc_all_shared(c, (const void *)kernel);
    moqc_ok(c, cudaLaunchKernelEx(&how, kernel, static_cast<A>(args)...), what);
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-numbers    number formats on the device
   Pure. Encoders and scales follow the formulas of the CPU reference to the bit; decoders of weights are exact.
   ------------------------------------------------------------------------------------------------ */

template <typename T> __device__ __forceinline__ float moqk_get(const T *p, int64_t i);
template <> __device__ __forceinline__ float moqk_get<float>(const float *p, int64_t i) { return p[i]; }
template <> __device__ __forceinline__ float moqk_get<__nv_bfloat16>(const __nv_bfloat16 *p, int64_t i) { return __bfloat162float(p[i]); }

template <typename T> __device__ __forceinline__ void moqk_put(T *p, int64_t i, float v);
template <> __device__ __forceinline__ void moqk_put<float>(float *p, int64_t i, float v) { p[i] = v; }
template <> __device__ __forceinline__ void moqk_put<__nv_bfloat16>(__nv_bfloat16 *p, int64_t i, float v) { p[i] = __float2bfloat16_rn(v); }
template <typename T> __device__ __forceinline__ float moqk_rounded(float v) { return sizeof(T) == 2 ? __bfloat162float(__float2bfloat16_rn(v)) : v; } /* to T */

/* Four neighbours at once; p is aligned to four of them. */
template <typename T> __device__ __forceinline__ float4 moqk_get4(const T *p)
{
    if (sizeof(T) == 4) return *(const float4 *)(const void *)p;
    uint2 h = *(const uint2 *)(const void *)p;
    return make_float4(__uint_as_float(h.x << 16), __uint_as_float(h.x & 0xffff0000u), __uint_as_float(h.y << 16),
                       __uint_as_float(h.y & 0xffff0000u));
}

template <typename T> __device__ __forceinline__ void moqk_put4(T *p, float4 v)
{
    if (sizeof(T) == 4) { *(float4 *)(void *)p = v; return; }
    __nv_bfloat162 a = __floats2bfloat162_rn(v.x, v.y), b = __floats2bfloat162_rn(v.z, v.w);
    *(uint2 *)(void *)p = make_uint2(*(const uint32_t *)&a, *(const uint32_t *)&b);
}

enum { MOQK_NORM_QUADS = 2 }; /* four values at a time that a thread of a norm takes */

/* The same sum wherever it is made: norms of their own and those that a product makes give the same bits. */
__device__ __forceinline__ float moqk_add_squares(float sum, float4 v)
{
    return __fmaf_rn(v.w, v.w, __fmaf_rn(v.z, v.z, __fmaf_rn(v.y, v.y, __fmaf_rn(v.x, v.x, sum))));
}

/* v / sqrt(mean + eps) * w */
__device__ __forceinline__ float moqk_norm_factor(float sum, int32_t cols, float eps) { return 1 / sqrtf(__fadd_rn(__fdiv_rn(sum, (float)cols), eps)); }

__device__ __forceinline__ float4 moqk_normed(float4 v, float s, float4 w)
{
    return make_float4(v.x * s * w.x, v.y * s * w.y, v.z * s * w.z, v.w * s * w.w);
}

/* Where the type is known at run time only. */
__device__ __forceinline__ float moqk_get_any(const void *p, int64_t i, int bf16)
{
    return bf16 ? __bfloat162float(((const __nv_bfloat16 *)p)[i]) : ((const float *)p)[i];
}

__device__ __forceinline__ uint32_t moqk_bits_any(const void *p, int64_t i, int bf16) { return bf16 ? ((const uint16_t *)p)[i] : ((const uint32_t *)p)[i]; }

__device__ __forceinline__ const void *moqk_place_any(const void *p, int64_t i, int bf16) { return (const uint8_t *)p + i * (bf16 ? 2 : 4); }

__device__ __forceinline__ void moqk_put_any(void *p, int64_t i, float v, int bf16)
{
    if (bf16) ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(v);
    else ((float *)p)[i] = v;
}

__device__ __forceinline__ float moqk_rounded_any(float v, int bf16) { return bf16 ? moqk_rounded<__nv_bfloat16>(v) : v; }

__device__ __forceinline__ float moqk_e4m3(uint32_t b)
{
    uint32_t e = b >> 3 & 15, m = b & 7;
    float v = e ? __uint_as_float((e + 120) << 23 | m << 20) : (float)m * 0.001953125f;
    if ((b & 127) == 127) v = __uint_as_float(0x7fc00000u);
    return b & 128 ? -v : v;
}

__device__ __forceinline__ float moqk_e8m0(uint32_t b) { return b == 255 ? __uint_as_float(0x7fc00000u) : b == 0 ? __uint_as_float(0x00400000u) : __uint_as_float(b << 23); }

__device__ __forceinline__ float moqk_e2m1(uint32_t c)
{
    uint32_t m = c & 7;
    float v = m < 2 ? (float)m * 0.5f : __uint_as_float((126 + (m >> 1)) << 23 | (m & 1) << 22);
    return c & 8 ? -v : v;
}

/* Nearest, ties to even, saturating at 448; NaN stays NaN. */
__device__ __forceinline__ uint32_t moqk_to_e4m3(float v)
{
    uint32_t bits = __float_as_uint(v), sign = bits >> 24 & 128, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return sign | 127;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %1;" : "=h"(pair) : "f"(v));
    return pair & 255;
#else
    const float a = __uint_as_float(size);
    if (a > 448) return sign | 126;
    if (a < 0.015625f) return sign | (uint32_t)__float2int_rn(a * 512);
    return sign | ((size + 0x7ffffu + (size >> 20 & 1)) >> 20) - (120u << 3);
#endif
}

__device__ __forceinline__ float moqk_round_e5m2(float v)
{
    uint32_t bits = __float_as_uint(v), sign = bits & 0x80000000u, size = bits & 0x7fffffffu;
    float a = __uint_as_float(size);
    if (a > 57344) return __uint_as_float(sign | __float_as_uint(57344.0f));
    if (a < 6.103515625e-5f) a = (float)__float2int_rn(a * 65536) * 1.52587890625e-5f;
    else a = __uint_as_float((size + 0xfffffu + (size >> 21 & 1)) >> 21 << 21);
    return __uint_as_float(sign | __float_as_uint(a));
}

/* Nearest, ties to the even code; +-6 at most, the sign of zero stays, NaN gives +6. */
__device__ __forceinline__ uint32_t moqk_to_e2m1(float v)
{
    float a = fabsf(v);
    if (!(a == a)) return 7;
    uint32_t c = (uint32_t)(a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
    return c | (__float_as_uint(v) >> 28 & 8);
}

/* The largest code of an element type that inputs are rounded to. */
__host__ __device__ static inline float moqk_largest(int elem)
{
    switch (elem) {
    case MOQ_F4: return 6;
    case MOQ_F8_E4M3: return 448;
    case MOQ_F8_E5M2: return 57344;
    case MOQ_I8: return 127;
    case MOQ_I2: case MOQ_I3: case MOQ_I4: case MOQ_I5: case MOQ_I6: case MOQ_I7: return (float)((1 << (elem - MOQ_I2 + 1)) - 1);
    default: return 0;
    }
}

/* `zero` moves the window of integer codes: clamp(rne(v) + zero) - zero. */
__device__ __forceinline__ float moqk_round_code(int elem, float v, float zero)
{
    if (!(v == v)) return v;
    if (elem == MOQ_F4) return moqk_e2m1(moqk_to_e2m1(v));
    if (elem == MOQ_F8_E4M3) return moqk_e4m3(moqk_to_e4m3(v));
    if (elem == MOQ_F8_E5M2) return moqk_round_e5m2(v);
    float top = moqk_largest(elem), q = rintf(v) + zero;
    return (q < -top - 1 ? -top - 1 : q > top ? top : q) - zero;
}

/* Exponent of the E8M0 scale of a block, -127..127. ModelOpt: ceil(log2(amax / largest)), found by comparing mantissas; compressed-tensors:
   amax is rounded up where its mantissa is 1.75 or more, then floor(log2 amax) - exponent of the largest code. */
__device__ __forceinline__ int moqk_e8m0_exponent(int rule, float largest, float amax)
{
    int top, e;
    float top_mantissa = frexpf(largest, &top);
    if (rule == MOQ_RULE_E8M0_ROUND) {
        e = (int)((__float_as_uint(amax) + (1u << 21)) >> 23) - 127 - (top - 1);
    } else {
        float mantissa = frexpf(amax, &e);
        e = amax > 0 ? e - top + (mantissa > top_mantissa) : -127;
    }
    return e < -127 ? -127 : e > 127 ? 127 : e;
}

/* The sum or maximum over a warp, the same in every lane. */
__device__ __forceinline__ float moqk_warp_sum(float v)
{
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

__device__ __forceinline__ float moqk_warp_max(float v)
{
    for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}

/* The sum over a block of up to 1024 threads, the same in every thread. `room`: 33 floats of shared memory. */
__device__ __forceinline__ float moqk_block_sum(float v, float *room)
{
    int warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
    v = moqk_warp_sum(v);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) room[warp] = v;
    __syncthreads();
    if (warp == 0) {
        v = moqk_warp_sum(threadIdx.x < warps ? room[threadIdx.x] : 0);
        if (threadIdx.x == 0) room[32] = v;
    }
    __syncthreads();
    return room[32];
}

__device__ __forceinline__ float moqk_block_max(float v, float *room)
{
    int warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
    v = moqk_warp_max(v);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) room[warp] = v;
    __syncthreads();
    if (warp == 0) {
        v = moqk_warp_max(threadIdx.x < warps ? room[threadIdx.x] : -3.4e38f);
        if (threadIdx.x == 0) room[32] = v;
    }
    __syncthreads();
    return room[32];
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-prepare    moq_linear -> part: codes, scales and zero points in one row-major form
   Stored bytes go to the device as they are and are rewritten there, once. Every packing, slice and column order that moq_linear can
   describe ends in the same few forms, so no kernel knows of them.
   ------------------------------------------------------------------------------------------------ */

/* How a weight's codes lie: kind, bytes of 8 columns, what a code stands for. Integers of 2 to 4 bits become U4 and of 5 to 8 bits U8,
   signed ones moved up by half their range and the zero point with them; both 6-bit floats are exact in E4M3. */
enum moqk_kind { MOQK_E2M1, MOQK_U4, MOQK_E4M3, MOQK_U8, MOQK_BF16, MOQK_F16, MOQK_F32, MOQK_KINDS };
enum moqk_scale { MOQK_NO_SCALE, MOQK_SCALE_E4M3, MOQK_SCALE_E8M0, MOQK_SCALE_F32 };

__host__ __device__ static constexpr int moqk_kind_bytes(int kind) /* of 8 columns */
{
    return kind <= MOQK_U4 ? 4 : kind <= MOQK_U8 ? 8 : kind <= MOQK_F16 ? 16 : 32;
}

/* One layer on the device. W[r][c] = (code(r, c) - zero(r, g)) * scale(r, g) * factor with g = c / group. */
typedef struct moqk_part {
    const uint8_t *codes;      /* [rows, row_bytes]; 4 bits: the low nibble is the even column; columns past cols are zero bits */
    const uint8_t *scales;     /* [rows, scale_stride] of scale_kind */
    const int16_t *zeros;      /* [rows, scale_stride] or NULL: `zero` everywhere */
    const float *bias;         /* [rows] or NULL */
    const float *smooth;       /* [feed_cols] pre_quant_scale or NULL */
    const float *rotation;     /* [hadamard_size, hadamard_size] or NULL: Sylvester's matrix */
    const int32_t *place;      /* [feed_cols] column of the codes that input column c belongs to; NULL: c */
    int64_t row_bytes;         /* a multiple of 16 */
    int32_t scale_stride;      /* groups of a row; 0: all rows share one row of scales */
    int32_t rows, cols;        /* cols: of the codes, with columns that pad act-order groups */
    int32_t feed_cols;         /* inputs */
    int32_t group;             /* columns of a group */
    uint8_t kind, scale_kind;
    uint8_t group8;            /* 8 neighbouring columns from a multiple of 8 never belong to two groups */
    uint8_t has_zeros;         /* there are `zeros`; known before the pointers are */
    uint8_t rounds;            /* inputs are rounded: */
    uint8_t in_elem, in_scale, in_rule, in_dynamic, in_zero_point;
    int32_t in_group;          /* inputs that share a scale; 0: a whole token */
    float input_scale, input_zero;
    int32_t hadamard_size;
    float hadamard_scale;
    float factor, zero;
    float global_mul, global_div; /* factor as a fraction, for rows that must be exact (embeddings) */
    const uint8_t *packed[2];  /* layouts 1 and 2 of the dispatch table. codes, scales and zeros are NULL when only those are used */
} moqk_part;

enum { MOQC_REGIMES = 4, MOQC_LAYOUTS = 3 }; /* numbers of rows of x that get a kernel of their own; layouts, 0: row-major */

struct moqc_kernel;

/* The host's view of a part while it is prepared and run. */
typedef struct moqc_part {
    moqk_part d;
    moq_linear layer;          /* as given; its views are read while preparing only */
    const struct moqc_kernel *kernel[MOQC_REGIMES]; /* see >>cuda-dispatch */
    float requant;             /* W4A8 as stored: weights are rounded again to E4M3 with this scale; 0: not */
    int32_t groups;            /* of a row */
    int32_t *order, *group_of; /* act order, on the host while preparing: column of the layer (-1: padding), stored group; else NULL */
    size_t at[9];              /* where the pieces begin in: */
    size_t bytes[2];           /* the row-major weights; everything else of the part */
    int keep;                  /* 1: a chosen kernel reads the row-major weights */
    int has_lora;
} moqc_part;

enum { MOQC_CODES, MOQC_SCALES, MOQC_ZEROS, MOQC_BIAS, MOQC_SMOOTH, MOQC_ROTATION, MOQC_PLACE, MOQC_PACKED };

/* Parts that are prepared together. All parts of an expert read the same x; their rows follow each other in y. */
typedef struct moqc_bank {
    int32_t experts, parts;    /* a dense layer is one expert */
    int grouped;               /* runs on choices of a mixture */
    int64_t rows, cols;        /* rows of all parts of an expert; inputs */
    int32_t ranks;             /* padded ranks of the low-rank branches of an expert, summed; 0: none */
    moqc_part *part;           /* [experts, parts], then as many A and B of low-rank branches */
    moqk_part *device;         /* the same array on the device */
    uint8_t *memory;
    size_t bytes;
    int32_t count;             /* of part */
    uint8_t *shares;           /* [parts] 1: the same feed as the part before, in every expert */
    uint8_t *direct;           /* [parts] 1: reads x as it is, in every expert */
    uint8_t *raw;              /* [parts] bit per regime: the kernel rounds x itself, in every expert */
} moqc_bank;

static int moqc_is_int(moq_dtype t) { return t == MOQ_I8 || (t >= MOQ_I2 && t <= MOQ_I7); }

static float moqc_f32_at(const moq_view *v, int64_t i)
{
    float f = 0;
    const uint8_t *p = (const uint8_t *)v->data + i * (moq_dtype_bits(v->dtype) / 8);
    if (v->dtype == MOQ_F8_E4M3) return moq_e4m3_decode(*p);
    if (v->dtype == MOQ_F8_E8M0) return moq_e8m0_decode(*p);
    moq_to_f32(v->dtype, p, 1, &f);
    return f;
}

/* ---- what a layer becomes: forms and sizes, nothing moves yet ---- */

/* Does the layer name a rounding of its inputs that can be carried out? */
static int moqc_rounds_input(const moq_linear *w)
{
    const moq_coding *c = &w->scheme.input;
    if (moqk_largest(c->elem) <= 0) return 0;
    if (c->scale == MOQ_F8_E8M0 || (c->dynamic && c->scale != MOQ_F8_E4M3)) return 1;
    return w->input_scale > 0;
}

/* Does this backend round the layer's inputs? AUTO: where the device multiplies in that format. */
static int moqc_wants_rounding(const moqc_ctx *c, const moq_linear *w)
{
    moq_dtype e = w->scheme.input.elem;
    if (c->act == MOQ_ACT_WIDE || c->act == MOQ_ACT_BF16 || e == MOQ_NONE || moqk_largest(e) <= 0) return c->act == MOQ_ACT_STORED && e != MOQ_NONE;
    if (c->act == MOQ_ACT_STORED) return 1;
    return moqc_rounds_input(w) && (moqc_is_int(e) || (e == MOQ_F8_E4M3 && c->sm >= 89));
}

static int moqc_choose_kind(const moq_linear *w)
{
    switch ((int)w->scheme.weight.elem) {
    case MOQ_F4: return MOQK_E2M1;
    case MOQ_F8_E4M3: case MOQ_F6_E2M3: case MOQ_F6_E3M2: return MOQK_E4M3;
    case MOQ_BF16: case MOQ_F16: case MOQ_F32: return w->codes.dtype == MOQ_BF16 ? MOQK_BF16 : w->codes.dtype == MOQ_F16 ? MOQK_F16 : MOQK_F32;
    default: return w->packing.bits <= 4 ? MOQK_U4 : MOQK_U8;
    }
}

/* Act order: columns sorted by group, so that a group is a run again. Groups of full size stay as they are; others (a slice of such a layer)
   are cut into groups of 16 with padding columns that no input reaches. */
static int moqc_sort_columns(moqc_ctx *c, moqc_part *p, int64_t groups)
{
    const moq_linear *w = &p->layer;
    const uint8_t *index = (const uint8_t *)w->group_index.data + 4 * w->col_first;
    int32_t g = w->scheme.weight.group_cols, *count = (int32_t *)moq_allocate(&c->host, (size_t)groups * 4), of;
    int regular = g > 0 && g % 8 == 0;
    if (!count) return 0;
    for (int64_t i = 0; i < w->cols; i++) { memcpy(&of, index + 4 * i, 4); if (of >= 0 && of < groups) count[of]++; }
    for (int64_t i = 0; i < groups; i++) regular &= count[i] == 0 || count[i] == g;
    int64_t unit = regular ? g : 16, total = 0;
    for (int64_t i = 0; i < groups; i++) total += moqk_ceil(count[i], unit);
    moq_release(&c->host, count, (size_t)groups * 4);
    p->d.group = (int32_t)unit;
    p->d.cols = (int32_t)(total * unit);
    p->groups = (int32_t)total;
    p->order = (int32_t *)moq_allocate(&c->host, (size_t)(total * unit) * 4);
    p->group_of = (int32_t *)moq_allocate(&c->host, (size_t)total * 4);
    if (!p->order || !p->group_of) return 0;
    int64_t at = 0;
    for (int64_t k = 0; k < groups; k++) {
        int64_t begin = at;
        for (int64_t i = 0; i < w->cols; i++) { memcpy(&of, index + 4 * i, 4); if (of == k) p->order[at++] = (int32_t)i; }
        while (at % unit) p->order[at++] = -1;
        for (int64_t i = begin / unit; i < at / unit; i++) p->group_of[i] = (int32_t)k;
    }
    return 1;
}

static void moqc_free_plan(moqc_ctx *c, moqc_part *p)
{
    if (p->order) moq_release(&c->host, p->order, (size_t)p->d.cols * 4);
    if (p->group_of) moq_release(&c->host, p->group_of, (size_t)p->groups * 4);
    p->order = p->group_of = NULL;
}

/* Pieces of the weights or of the rest, each aligned to 256 bytes. */
static void moqc_lay(moqc_part *p, int piece, int64_t count, int64_t size)
{
    size_t *bytes = &p->bytes[piece > MOQC_ZEROS];
    p->at[piece] = count > 0 ? *bytes : SIZE_MAX;
    *bytes += (size_t)moqk_pad(count * size, 256);
}

/* Everything about a part that is known from its description. 0: out of host memory. */
static int moqc_plan_part(moqc_ctx *c, const moq_linear *w, moqc_part *p)
{
    moqk_part *d = &p->d;
    const moq_coding *in = &w->scheme.input;
    int64_t g = w->scheme.weight.group_cols, stored_groups = 1;
    int each_row = w->scales.data && w->scheme.weight.group_rows > 0;
    p->layer = *w;
    d->rows = (int32_t)w->rows;
    d->cols = d->feed_cols = (int32_t)w->cols;
    d->kind = (uint8_t)moqc_choose_kind(w);
    d->rounds = (uint8_t)moqc_wants_rounding(c, w);
    p->requant = d->rounds && c->act == MOQ_ACT_STORED ? w->requant_scale : 0;
    d->group = d->cols;
    p->groups = 1;
    if (w->group_index.data && w->scales.data) {
        stored_groups = w->scale_col_stride > 0 ? ((int64_t)w->scales.count - 1) / w->scale_col_stride + 1 : 1;
        for (int64_t i = 0; i < w->cols; i++) { int32_t of; memcpy(&of, (const uint8_t *)w->group_index.data + 4 * (w->col_first + i), 4); stored_groups = moqc_max(stored_groups, of + 1); }
        if (!moqc_sort_columns(c, p, stored_groups)) return 0;
    } else if (g > 0 && (w->scales.data || w->zeros.data)) {
        d->group = w->col_first % g == 0 ? (int32_t)g : 1; /* a slice that begins inside a group: a scale for every column */
        p->groups = (int32_t)moqk_ceil(d->cols, d->group);
    }
    d->group8 = d->group % 8 == 0 || p->groups == 1;
    d->has_zeros = w->zeros.data != NULL;
    d->scale_kind = MOQK_NO_SCALE;
    if (w->scales.data) d->scale_kind = w->scales.dtype == MOQ_F8_E4M3 ? MOQK_SCALE_E4M3 : w->scales.dtype == MOQ_F8_E8M0 ? MOQK_SCALE_E8M0
        : MOQK_SCALE_F32;
    d->scale_stride = each_row || p->groups > 1 || w->zeros.data ? p->groups : 0;
    d->row_bytes = moqk_pad(moqk_ceil(d->cols, 8) * moqk_kind_bytes(d->kind), 16);
    d->global_mul = w->global_mul;
    d->global_div = w->global_div;
    d->factor = w->global_mul / w->global_div;
    d->zero = (float)(w->zeros.data ? 0 : w->zero_add);
    if (d->kind == MOQK_U4 || d->kind == MOQK_U8) d->zero += w->packing.is_unsigned ? 0 : (float)(1 << (w->packing.bits - 1));
    d->in_elem = (uint8_t)in->elem;
    d->in_scale = (uint8_t)in->scale;
    d->in_rule = in->rule;
    d->in_dynamic = in->dynamic;
    d->in_zero_point = in->zero_point;
    d->in_group = in->group_cols > 0 && (in->dynamic || in->scale == MOQ_F8_E8M0 || in->scale == MOQ_F8_E4M3) && in->group_cols < w->cols
        ? in->group_cols : 0;
    d->input_scale = w->input_scale;
    d->input_zero = (float)w->input_zero;
    d->hadamard_size = w->hadamard_size;
    d->hadamard_scale = w->hadamard_scale;
    int64_t scale_rows = d->scale_stride > 0 ? d->rows : 1, values = scale_rows * p->groups;
    moqc_lay(p, MOQC_CODES, d->rows, d->row_bytes);
    moqc_lay(p, MOQC_SCALES, w->scales.data ? values : 0, d->scale_kind == MOQK_SCALE_F32 ? 4 : 1);
    moqc_lay(p, MOQC_ZEROS, w->zeros.data ? values : 0, 2);
    moqc_lay(p, MOQC_BIAS, w->bias.data ? d->rows : 0, 4);
    moqc_lay(p, MOQC_SMOOTH, w->pre_quant_scale.data ? w->cols : 0, 4);
    moqc_lay(p, MOQC_ROTATION, w->hadamard.data ? (int64_t)w->hadamard.count : 0, 4);
    moqc_lay(p, MOQC_PLACE, p->order ? w->cols : 0, 4);
    return 1;
}

/* W4A8 as stored: the weights become E4M3 with one scale. Only the weights of the plan change. */
static void moqc_plan_requant(const moqc_part *p, moqc_part *out)
{
    *out = *p;
    out->d.kind = MOQK_E4M3;
    out->d.scale_kind = MOQK_NO_SCALE;
    out->d.scale_stride = 0;
    out->d.has_zeros = 0;
    out->d.group = out->d.cols;
    out->d.group8 = 1;
    out->d.factor = out->d.global_mul = p->requant;
    out->d.global_div = 1;
    out->d.zero = 0;
    out->d.row_bytes = moqk_pad(out->d.cols, 16);
    out->bytes[0] = 0;
    moqc_lay(out, MOQC_CODES, out->d.rows, out->d.row_bytes);
    moqc_lay(out, MOQC_SCALES, 0, 1);
    moqc_lay(out, MOQC_ZEROS, 0, 1);
}

/* ---- stored bytes to the device ---- */

/* Room for `bytes` of stored bytes. The space is used again from the start when it is full: the stream keeps the order. */
static uint8_t *moqc_raw(moqc_ctx *c, size_t bytes, moq_error *err)
{
    bytes = (bytes + 255) & ~(size_t)255;
    if (!moqc_widen(c, &c->raw, &c->raw_bytes, bytes, err)) return NULL;
    if (c->raw_used + bytes > c->raw_bytes) c->raw_used = 0;
    uint8_t *p = c->raw + c->raw_used;
    c->raw_used += bytes;
    return p;
}

static uint8_t *moqc_send_raw(moqc_ctx *c, const void *src, size_t bytes, moq_error *err)
{
    uint8_t *p = moqc_raw(c, bytes, err);
    if (p && !moqc_send(c, p, src, bytes)) {
        moqc_why(c, c->name, err);
        return NULL;
    }
    return p;
}

/* A view's elements first, first + step, ... as F32. */
static int moqc_send_floats(moqc_ctx *c, void *dst, const moq_view *v, int64_t first, int64_t step, int64_t count)
{
    for (int64_t at = 0, n; at < count; at += n) {
        n = moqc_min(count - at, MOQC_SLOT_BYTES / 4);
        float *p = (float *)(void *)moqc_slot(c, (size_t)n * 4);
        if (!p) return 0;
        if (step == 1 && moq_dtype_bits(v->dtype) >= 16) moq_to_f32(v->dtype,
                                                                    (const uint8_t *)v->data + (first + at) * (moq_dtype_bits(v->dtype) / 8),
                                                                        (size_t)n, p);
        else for (int64_t i = 0; i < n; i++) p[i] = moqc_f32_at(v, first + (at + i) * step);
        if (!moqc_ok(c, cudaMemcpyAsync((float *)dst + at, p, (size_t)n * 4, cudaMemcpyHostToDevice, c->stream), "an upload")) return 0;
    }
    return 1;
}

/* ---- the repack kernels ---- */

/* Stored codes: raw holds them from byte `begin` on. `flip` is xored into every code; `map`: 1 E2M3, 2 E3M2 to E4M3. */
typedef struct moqk_source {
    const uint8_t *raw;
    int64_t begin, row_first, row_step, col_first, row_stride, col_stride;
    const int32_t *order;      /* column of the layer for a column of the part, -1: none; NULL: the same */
    int32_t bits, word_bits, along_rows, padded, awq, flip, map;
} moqk_source;

/* Which slot of a word holds neighbour n in AutoAWQ's order: 0 4 1 5 2 6 3 7. */
__host__ __device__ static inline int moqk_awq_slot(int n) { return n >> 1 | (n & 1) << 2; }

/* Where neighbour n of a line of codes lies. */
__host__ __device__ static inline void moqk_place(int bits, int word_bits, int padded, int awq, int64_t n, int64_t *word, int *bit)
{
    if (padded || awq) {
        int per = word_bits / bits, slot = (int)(n % per);
        *word = n / per;
        *bit = bits * (awq ? moqk_awq_slot(slot & 7) : slot);
    } else {
        *word = n * bits / word_bits;
        *bit = (int)(n * bits % word_bits);
    }
}

__device__ __forceinline__ uint32_t moqk_word(const uint8_t *p, int word_bits)
{
    return word_bits == 8 ? *p : word_bits == 16 ? *(const uint16_t *)p : *(const uint32_t *)p;
}

/* The code at stored coordinates, not sign-extended. */
__device__ __forceinline__ uint32_t moqk_code_at(const moqk_source &s, int64_t row, int64_t col)
{
    int64_t word, step = s.along_rows ? s.row_stride : s.col_stride;
    int bit, bytes = s.word_bits >> 3;
    moqk_place(s.bits, s.word_bits, s.padded, s.awq, s.along_rows ? row : col, &word, &bit);
    int64_t at = word * step + (s.along_rows ? col * s.col_stride : row * s.row_stride);
    uint64_t v = moqk_word(s.raw + at * bytes - s.begin, s.word_bits) >> bit;
    if (bit + s.bits > s.word_bits) v |= (uint64_t)moqk_word(s.raw + (at + step) * bytes - s.begin, s.word_bits) << (s.word_bits - bit);
    return (uint32_t)(v & (((uint64_t)1 << s.bits) - 1));
}

/* E2M3 and E3M2 codes as E4M3: the value is exact there. */
__device__ __forceinline__ uint32_t moqk_widen_f6(uint32_t c, int map)
{
    uint32_t m = map == 1 ? c & 7 : c & 3, e = map == 1 ? c >> 3 & 3 : c >> 2 & 7;
    float v = map == 1 ? (e ? (float)(8 + m) * 0.125f * (float)(1 << (e - 1)) : (float)m * 0.125f)
                       : (e ? (float)(4 + m) * 0.25f * exp2f((float)e - 3) : (float)m * 0.0625f);
    return moqk_to_e4m3(c & 32 ? -v : v);
}

/* A thread writes 8 columns of one row. out: [rows, row_bytes] from layer row `row0` on. Reads and writes each code once. */
__global__ void moqk_repack(moqk_source s, uint8_t *out, int64_t row_bytes, int64_t row0, int32_t rows, int32_t cols, int kind)
{
    int64_t chunks = moqk_ceil(cols, 8), i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= chunks * rows) return;
    int64_t row = i / chunks, first = i % chunks * 8, stored = s.row_first + (row0 + row) * s.row_step;
    uint32_t v[8] = {0, 0, 0, 0, 0, 0, 0, 0}, word[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int j = 0; j < 8 && first + j < cols; j++) {
        int64_t c = s.order ? s.order[first + j] : first + j;
        if (c < 0) continue;
        v[j] = moqk_code_at(s, stored, s.col_first + c) ^ (uint32_t)s.flip;
        if (s.map) v[j] = moqk_widen_f6(v[j] & 63, s.map);
    }
    int bits = kind <= MOQK_U4 ? 4 : kind <= MOQK_U8 ? 8 : kind <= MOQK_F16 ? 16 : 32, bytes = moqk_kind_bytes(kind);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        uint32_t code = bits == 32 ? v[j] : v[j] & ((1u << bits) - 1);
        if (bits == 4) word[0] |= code << (4 * j);
        else if (bits == 8) word[j / 4] |= code << (8 * (j & 3));
        else if (bits == 16) word[j / 2] |= code << (16 * (j & 1));
        else word[j] = code;
    }
    uint32_t *to = (uint32_t *)(out + (row0 + row) * row_bytes + first / 8 * bytes);
#pragma unroll
    for (int j = 0; j < 8; j++) if (j < bytes / 4) to[j] = word[j];
}

/* Stored scales: element (r / group_rows) * row_stride + group * col_stride. */
typedef struct moqk_scales {
    const uint8_t *raw;
    int64_t begin, row_first, row_step, group_rows, row_stride, col_stride; /* begin: the element that raw starts with */
    const int32_t *group_of;   /* stored group of a group of the part; NULL: */
    int64_t first, step;       /* (first + group * step) / divide */
    int64_t divide;
    int32_t dtype, out_f32;
} moqk_scales;

__device__ __forceinline__ int64_t moqk_stored_group(const moqk_scales &s, int64_t g)
{
    return s.group_of ? s.group_of[g] : (s.first + g * s.step) / s.divide;
}

__device__ __forceinline__ float moqk_stored_float(const uint8_t *p, int64_t i, int dtype)
{
    switch (dtype) {
    case MOQ_F8_E4M3: return moqk_e4m3(p[i]);
    case MOQ_F8_E8M0: return moqk_e8m0(p[i]);
    case MOQ_BF16: return __uint_as_float((uint32_t)((const uint16_t *)p)[i] << 16);
    case MOQ_F16: return __half2float(((const __half *)p)[i]);
    case MOQ_F64: return (float)((const double *)p)[i];
    default: return ((const float *)p)[i];
    }
}

__global__ void moqk_take_scales(moqk_scales s, void *out, int64_t rows, int64_t groups)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * groups) return;
    int64_t r = s.row_first + i / groups * s.row_step, at = (s.group_rows > 0 ? r / s.group_rows : 0) * s.row_stride +
        moqk_stored_group(s, i % groups) * s.col_stride - s.begin;
    if (s.out_f32) ((float *)out)[i] = moqk_stored_float(s.raw, at, s.dtype);
    else ((uint8_t *)out)[i] = s.raw[at];
}

/* Zero points: packed like codes, element (r, stored group). */
__global__ void moqk_take_zeros(moqk_source z, moqk_scales s, int is_signed, int add, int16_t *out, int64_t rows, int64_t groups)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * groups) return;
    int32_t v = (int32_t)moqk_code_at(z, z.row_first + i / groups * z.row_step, moqk_stored_group(s, i % groups)), sign = 1 << (z.bits - 1);
    out[i] = (int16_t)((is_signed ? (v ^ sign) - sign : v) + add);
}

/* ---- one weight of a part, exactly: for embeddings and for rounding weights again ---- */

__device__ __forceinline__ double moqk_code_value(const moqk_part &p, int64_t row, int64_t col)
{
    const uint8_t *line = p.codes + row * p.row_bytes;
    switch (p.kind) {
    case MOQK_E2M1: return (double)moqk_e2m1(line[col >> 1] >> (4 * (col & 1)) & 15);
    case MOQK_U4: return (double)(line[col >> 1] >> (4 * (col & 1)) & 15);
    case MOQK_E4M3: return (double)moqk_e4m3(line[col]);
    case MOQK_U8: return (double)line[col];
    case MOQK_BF16: return (double)__uint_as_float((uint32_t)((const uint16_t *)line)[col] << 16);
    case MOQK_F16: return (double)__half2float(((const __half *)line)[col]);
    default: return (double)((const float *)line)[col];
    }
}

/* (code - zero) * scale * global_mul / global_div: F32 rounds it once. */
__device__ __forceinline__ double moqk_weight_at(const moqk_part &p, int64_t row, int64_t col)
{
    int64_t at = row * p.scale_stride + col / p.group;
    double scale = 1;
    if (p.scale_kind == MOQK_SCALE_E4M3) scale = (double)moqk_e4m3(p.scales[at]);
    else if (p.scale_kind == MOQK_SCALE_E8M0) scale = (double)moqk_e8m0(p.scales[at]);
    else if (p.scale_kind == MOQK_SCALE_F32) scale = (double)((const float *)p.scales)[at];
    double zero = (double)p.zero + (p.zeros ? (double)p.zeros[at] : 0);
    return (moqk_code_value(p, row, col) - zero) * (scale * (double)p.global_mul) / (double)p.global_div;
}

/* e4m3(w / scale), rounded once: F32 keeps in its last bit whether anything was cut off (rounding to odd). A thread per weight. */
__global__ void moqk_requantize(moqk_part from, float scale, uint8_t *out, int64_t row_bytes)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (int64_t)from.rows * from.cols) return;
    int64_t row = i / from.cols, col = i % from.cols;
    double v = moqk_weight_at(from, row, col) / (double)scale;
    float f = __double2float_rz(v);
    out[row * row_bytes + col] = (uint8_t)moqk_to_e4m3((double)f == v ? f : __uint_as_float(__float_as_uint(f) | 1));
}

/* ---- filling a part ---- */

static void moqc_describe_source(const moq_packing *k, moqk_source *s)
{
    memset(s, 0, sizeof *s);
    s->bits = k->bits;
    s->word_bits = k->word_bits;
    s->along_rows = k->along_rows;
    s->padded = k->padded;
    s->awq = k->awq_order;
    s->row_stride = k->row_stride;
    s->col_stride = k->col_stride;
}

/* The word that a code begins in. */
static int64_t moqc_word_of(const moq_packing *k, int64_t row, int64_t col)
{
    int64_t word;
    int bit;
    moqk_place(k->bits, k->word_bits, k->padded, k->awq_order, k->along_rows ? row : col, &word, &bit);
    return k->along_rows ? word * k->row_stride + col * k->col_stride : row * k->row_stride + word * k->col_stride;
}

/* Codes that lie row by row travel in pieces of at most 32 MiB, others whole. */
static moq_result moqc_fill_codes(moqc_ctx *c, moqc_part *p, uint8_t *out, const int32_t *order, moq_error *err)
{
    const moq_linear *w = &p->layer;
    const moq_packing *k = &w->packing;
    moq_dtype e = w->scheme.weight.elem;
    moqk_source s;
    int64_t bytes = k->word_bits / 8, piece = w->rows, end_of_codes = (int64_t)w->codes.count * (moq_dtype_bits(w->codes.dtype) / 8);
    int64_t step = k->along_rows ? k->row_stride : k->col_stride;
    moqc_describe_source(k, &s);
    s.row_first = w->row_first;
    s.row_step = w->row_step;
    s.col_first = w->col_first;
    s.order = order;
    s.flip = (p->d.kind == MOQK_U4 || p->d.kind == MOQK_U8) && !k->is_unsigned ? 1 << (k->bits - 1) : 0;
    s.map = e == MOQ_F6_E2M3 ? 1 : e == MOQ_F6_E3M2 ? 2 : 0;
    if (!k->along_rows && k->row_stride > k->col_stride) {
        piece = ((int64_t)32 << 20) / moqc_max(1, k->row_stride * bytes * w->row_step);
        piece = moqc_max(1, moqc_min(piece, w->rows));
    }
    for (int64_t row = 0, n; row < w->rows; row += n) {
        n = moqc_min(piece, w->rows - row);
        int64_t r0 = w->row_first + row * w->row_step, r1 = r0 + (n - 1) * w->row_step, c1 = w->col_first + w->cols - 1;
        int64_t begin = moqc_word_of(k, r0, w->col_first) * bytes, end = (moqc_word_of(k, r1, c1) + 1) * bytes, word;
        int bit;
        moqk_place(k->bits, k->word_bits, k->padded, k->awq_order, k->along_rows ? r1 : c1, &word, &bit);
        if (bit + k->bits > k->word_bits) end += step * bytes;
        if (end_of_codes > 0) end = moqc_min(end, end_of_codes);
        s.raw = moqc_send_raw(c, (const uint8_t *)w->codes.data + begin, (size_t)(end - begin), err);
        s.begin = begin;
        if (!s.raw) return MOQ_E_NOMEM;
        int64_t threads = n * moqk_ceil(p->d.cols, 8);
        moqk_repack<<<(unsigned)moqk_ceil(threads, 256), 256, 0, c->stream>>>(s, out, p->d.row_bytes, row, (int32_t)n, p->d.cols, p->d.kind);
    }
    return MOQ_OK;
}

static moq_result moqc_fill_scales(moqc_ctx *c, moqc_part *p, uint8_t *scales, int16_t *zeros, const int32_t *group_of, moq_error *err)
{
    const moq_linear *w = &p->layer;
    int64_t g = w->scheme.weight.group_cols, gr = w->scheme.weight.group_rows, rows = p->d.scale_stride > 0 ? p->d.rows : 1, last = 0;
    moqk_scales s;
    memset(&s, 0, sizeof s);
    s.row_first = w->row_first;
    s.row_step = w->row_step;
    s.group_rows = gr;
    s.row_stride = w->scale_row_stride;
    s.col_stride = w->scale_col_stride;
    s.group_of = group_of;
    s.first = g > 0 ? w->col_first : 0;
    s.step = p->d.group;
    s.divide = g > 0 ? g : INT64_MAX;
    s.dtype = w->scales.dtype;
    s.out_f32 = p->d.scale_kind == MOQK_SCALE_F32;
    int64_t low = p->groups > 0 ? s.first / s.divide : 0;
    last = (s.first + (p->groups - 1) * s.step) / s.divide;
    for (int32_t i = 0; p->group_of && i < p->groups; i++) { low = i ? moqc_min(low, p->group_of[i]) : p->group_of[i]; last = i ? moqc_max(last, p->group_of[i]) : p->group_of[i]; }
    unsigned blocks = (unsigned)moqk_ceil(rows * p->groups, 256);
    if (scales) {
        int64_t r0 = w->row_first, r1 = r0 + (rows - 1) * w->row_step, size = moq_dtype_bits(w->scales.dtype) / 8;
        int64_t begin = (gr > 0 ? r0 / gr : 0) * s.row_stride + low * s.col_stride,
            end = (gr > 0 ? r1 / gr : 0) * s.row_stride + last * s.col_stride + 1;
        s.begin = begin;
        s.raw = moqc_send_raw(c, (const uint8_t *)w->scales.data + begin * size, (size_t)((end - begin) * size), err);
        if (!s.raw) return MOQ_E_NOMEM;
        moqk_take_scales<<<blocks, 256, 0, c->stream>>>(s, scales, rows, p->groups);
    }
    if (zeros) {
        moqk_source z;
        moqc_describe_source(&w->zero_packing, &z);
        z.row_first = w->row_first;
        z.row_step = w->row_step;
        z.raw = moqc_send_raw(c, w->zeros.data, (size_t)w->zeros.count * (size_t)(moq_dtype_bits(w->zeros.dtype) / 8), err);
        if (!z.raw) return MOQ_E_NOMEM;
        moqk_take_zeros<<<blocks, 256, 0, c->stream>>>(z, s, !w->zero_packing.is_unsigned, w->zero_add, zeros, rows, p->groups);
    }
    return MOQ_OK;
}

/* Pointers of a part: weights and everything else. */
static const uint8_t *moqc_at(const uint8_t *base, size_t at) { return at == SIZE_MAX ? NULL : base + at; }

static void moqc_point_weights(moqc_part *p, const uint8_t *base)
{
    p->d.codes = moqc_at(base, p->at[MOQC_CODES]);
    p->d.scales = moqc_at(base, p->at[MOQC_SCALES]);
    p->d.zeros = (const int16_t *)(const void *)moqc_at(base, p->at[MOQC_ZEROS]);
}

static void moqc_point_rest(moqc_part *p, const uint8_t *base)
{
    p->d.bias = (const float *)(const void *)moqc_at(base, p->at[MOQC_BIAS]);
    p->d.smooth = (const float *)(const void *)moqc_at(base, p->at[MOQC_SMOOTH]);
    p->d.rotation = (const float *)(const void *)moqc_at(base, p->at[MOQC_ROTATION]);
    p->d.place = (const int32_t *)(const void *)moqc_at(base, p->at[MOQC_PLACE]);
    for (int i = 0; i < MOQC_LAYOUTS - 1; i++) p->d.packed[i] = moqc_at(base, p->at[MOQC_PACKED + i]);
}

/* Codes, scales and zero points of the form that the plan describes. lists: [cols] order, [groups] stored groups, or NULL. */
static moq_result moqc_fill_weights(moqc_ctx *c, moqc_part *p, const int32_t *lists, moq_error *err)
{
    moq_result rc = moqc_fill_codes(c, p, (uint8_t *)p->d.codes, lists, err);
    if (rc < 0) return rc;
    return moqc_fill_scales(c, p, (uint8_t *)p->d.scales, (int16_t *)p->d.zeros, lists ? lists + p->d.cols : NULL, err);
}

/* Where each input column goes, the inverse of the order. */
static int moqc_send_place(moqc_ctx *c, const moqc_part *p, const int32_t *to)
{
    size_t bytes = (size_t)p->d.feed_cols * 4;
    int32_t *place = (int32_t *)moq_allocate(&c->host, bytes);
    if (!place) return 0;
    for (int32_t i = 0; i < p->d.cols; i++) if (p->order[i] >= 0) place[p->order[i]] = i;
    int fine = moqc_send(c, (void *)to, place, bytes);
    moq_release(&c->host, place, bytes);
    return fine;
}

/* Everything of a part but its packed layouts into its zeroed block: the row-major weights first, when they are kept. Others lie in `aside`
   until the next part; so do column lists, and weights before they are rounded again. */
static moq_result moqc_fill_part(moqc_ctx *c, moqc_part *p, uint8_t *block, moq_error *err)
{
    const moq_linear *w = &p->layer;
    moqc_part stored = *p, final = *p;
    int again = p->requant > 0, fine = 1;
    size_t order = p->order ? (size_t)p->d.cols * 4 : 0, groups = p->order ? (size_t)p->groups * 4 : 0, lists = (order + groups + 255) & ~(size_t)255;
    if (again) moqc_plan_requant(p, &final);
    size_t before = again ? stored.bytes[0] : 0, need = lists + before + (p->keep ? 0 : final.bytes[0]);
    if (need > 0 && !moqc_widen(c, &c->aside, &c->aside_bytes, need, err)) return MOQ_E_NOMEM;
    if (need > 0) fine &= moqc_ok(c, cudaMemsetAsync(c->aside, 0, need, c->stream), "cudaMemset");
    const int32_t *list = p->order ? (const int32_t *)(const void *)c->aside : NULL;
    if (list) fine &= moqc_send(c, c->aside, p->order, order) && moqc_send(c, c->aside + order, p->group_of, groups);
    moqc_point_weights(&final, p->keep ? block : c->aside + lists + before);
    moqc_point_rest(&final, block + (p->keep ? final.bytes[0] : 0));
    if (again) moqc_point_weights(&stored, c->aside + lists);
    moq_result rc = moqc_fill_weights(c, again ? &stored : &final, list, err);
    if (rc < 0) return rc;
    if (again)
        moqk_requantize<<<(unsigned)moqk_ceil((int64_t)p->d.rows * p->d.cols, 256), 256, 0, c->stream>>>(stored.d, p->requant, (uint8_t *)final.d.codes, final.d.row_bytes);
    if (final.d.place && !moqc_send_place(c, p, final.d.place)) return moq_fail(err, MOQ_E_NOMEM, w->name, "no host memory for the column order");
    if (final.d.bias) fine &= moqc_send_floats(c, (void *)final.d.bias, &w->bias, w->row_first, w->row_step, w->rows);
    if (final.d.smooth) fine &= moqc_send_floats(c, (void *)final.d.smooth, &w->pre_quant_scale, w->col_first, 1, w->cols);
    if (final.d.rotation) fine &= moqc_send_floats(c, (void *)final.d.rotation, &w->hadamard, 0, 1, (int64_t)w->hadamard.count);
    moqc_free_plan(c, p);
    final.order = final.group_of = NULL;
    *p = final;
    return moqc_launched(c, "repacking a weight") && fine ? MOQ_OK : moqc_why(c, w->name, err);
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-linear     the feed; products of any scheme and any number of rows
   The kernels here take every part that >>cuda-prepare makes: slower rows of the dispatch table fall back on nothing else.
   ------------------------------------------------------------------------------------------------ */

/* One product of a launch: y[m][rows of the parts] = x W^T (+ bias). Dense: rows 0..m of x and y. Grouped: the rows of x and y are
   choices sorted by expert, and a tile names an expert and a run of its choices. */
typedef struct moqk_call {
    const moqk_part *parts;    /* of expert 0; expert e: parts + e * expert_stride */
    int32_t expert_stride, part_count;
    const void *x;
    int64_t ldx;
    void *y;
    int64_t ldy;
    int32_t m;                 /* dense: rows; grouped: rows of a tile */
    int32_t all;               /* rows; grouped: choices */
    const int32_t *row_of;     /* grouped: x row of a choice; NULL: the choice itself */
    const int32_t *expert_of;  /* grouped: of a choice */
    const int32_t *tiles;      /* grouped: [tile_count][expert, first, count, -], tile_count stands at tiles[-4]; NULL: dense */
    int32_t most_tiles;        /* grouped: an upper bound known to the host */
    uint8_t x_bf16, y_bf16;
    uint8_t accumulate;        /* y += instead of y = */
    uint8_t raw;               /* x has not been through the feed: see moqk_pack_bytes */
    int32_t slices;            /* warps of a block that share a row group of moqk_gemv */
} moqk_call;

/* ---- the feed: a token on its way into a layer ---- */

typedef struct moqk_feed_args {
    const moqk_part *parts;    /* of expert 0 */
    int32_t expert_stride;
    const void *x;             /* [tokens, cols], or [choices, gate n | up n] before an activation */
    int64_t ldx;
    int32_t x_bf16, fused;     /* fused: x goes through `activation` first */
    moq_activation_desc activation;
    const int32_t *row_of, *expert_of; /* grouped, else NULL */
    float *t, *r;              /* [rows, ld]: before rounding (may be r when nothing reads it), as the codes want it */
    int64_t ld;
    int32_t segment;           /* columns of a block; a multiple of every group and rotated block */
} moqk_feed_args;

__device__ __forceinline__ float moqk_activate(const moq_activation_desc &a, float g, float u)
{
    switch ((int)a.kind) {
    case MOQ_GELU_MUL: return 0.5f * g * (1 + erff(g * 0.70710678f)) * u;
    case MOQ_GELU_TANH_MUL: return 0.5f * g * (1 + tanhf(0.79788456f * (g + 0.044715f * g * g * g))) * u;
    case MOQ_SWIGLU_CLAMP:
        g = g > a.limit ? a.limit : g;
        u = u > a.limit ? a.limit : u < -a.limit ? -a.limit : u;
        return g / (1 + expf(-a.alpha * g)) * (u + a.beta);
    case MOQ_RELU2: return g > 0 ? g * g : g < 0 ? 0 : g * 0;
    default: return g / (1 + expf(-g)) * u;
    }
}

/* Columns [lo, hi) of t rotated block by block; all threads of the block take part. `room`: the same columns of r, free until the end. */
__device__ void moqk_rotate(const moqk_part &p, float *t, float *room, int32_t lo, int32_t hi)
{
    int32_t size = p.hadamard_size;
    if (!p.rotation) { /* Sylvester's matrix: H[i][j] = (-1)^popcount(i & j) by butterflies */
        for (int32_t half = 1; half < size; half *= 2) {
            __syncthreads();
            for (int32_t i = threadIdx.x; i < (hi - lo) / 2; i += blockDim.x) {
                int32_t a = lo + i / half * 2 * half + i % half;
                float u = t[a], v = t[a + half];
                t[a] = u + v;
                t[a + half] = u - v;
            }
        }
        __syncthreads();
        for (int32_t i = lo + threadIdx.x; i < hi; i += blockDim.x) t[i] *= p.hadamard_scale;
        return;
    }
    __syncthreads();
    for (int32_t i = lo + threadIdx.x; i < hi; i += blockDim.x) {
        const float *x = t + i / size * size;
        float y = 0;
        for (int32_t j = 0; j < size; j++) y += x[j] * p.rotation[(int64_t)j * size + i % size];
        room[i] = y;
    }
    __syncthreads();
    for (int32_t i = lo + threadIdx.x; i < hi; i += blockDim.x) t[i] = room[i] * p.hadamard_scale;
}

/* One value rounded with its group's scale; s = 0: nothing to scale (asymmetric: all values of the group are equal, one exact code). */
__device__ __forceinline__ float moqk_round_with(const moqk_part &p, float x, float s, float zero, int asymmetric)
{
    if (s > 0) return moqk_round_code(p.in_elem, x / s, zero) * s;
    return asymmetric || !(x == x) ? x : 0;
}

/* The scale of a group from its largest magnitude, or its ends when asymmetric. */
__device__ __forceinline__ float moqk_group_scale(const moqk_part &p, float amax, float lo, float hi, float *zero)
{
    float largest = moqk_largest(p.in_elem);
    *zero = 0;
    if (p.in_zero_point) {
        float s = (hi - lo) / (2 * largest + 1);
        if (s > 0) *zero = rintf(-largest - 1 - lo / s);
        return s;
    }
    if (p.in_scale == MOQ_F8_E8M0) return ldexpf(1.0f, moqk_e8m0_exponent(p.in_rule, largest, amax));
    if (p.in_scale != MOQ_F8_E4M3) return amax / largest;
    float s = amax / (largest * p.input_scale);
    return moqk_e4m3(moqk_to_e4m3(s < 448 ? s : 448)) * p.input_scale;
}

/* Columns [lo, hi) of t rounded into r; a group is scaled by 16 or 32 neighbouring lanes, a whole token by the block. */
__device__ void moqk_round_segment(const moqk_part &p, const float *t, float *r, int32_t lo, int32_t hi, float *room)
{
    int dynamic = p.in_dynamic || p.in_scale == MOQ_F8_E8M0 || p.in_scale == MOQ_F8_E4M3;
    int asymmetric = dynamic && p.in_zero_point;
    float s = p.input_scale, zero = p.input_zero;
    if (!dynamic || p.in_group == 0) {
        if (dynamic) {
            float amax = 0, low = 3.4e38f, high = -3.4e38f;
            for (int32_t i = lo + threadIdx.x; i < hi; i += blockDim.x) { amax = fmaxf(amax, fabsf(t[i])); low = fminf(low, t[i]); high = fmaxf(high, t[i]); }
            amax = moqk_block_max(amax, room);
            high = moqk_block_max(high, room);
            low = -moqk_block_max(-low, room);
            s = moqk_group_scale(p, amax, low, high, &zero);
        }
        for (int32_t i = lo + threadIdx.x; i < hi; i += blockDim.x) r[p.place ? p.place[i] : i] = moqk_round_with(p, t[i], s, zero, asymmetric);
        return;
    }
    int lanes = p.in_group >= 32 ? 32 : 16, lane = threadIdx.x % lanes, teams = blockDim.x / lanes;
    int32_t groups = (int32_t)moqk_ceil(hi - lo, p.in_group);
    for (int32_t base = 0; base < groups; base += teams) { /* the whole warp stays together for the shuffles */
        int32_t g = base + threadIdx.x / lanes, first = lo + g * p.in_group, end = g < groups ? min(first + p.in_group, hi) : 0;
        float amax = 0, low = 3.4e38f, high = -3.4e38f;
        for (int32_t i = first + lane; i < end; i += lanes) { amax = fmaxf(amax, fabsf(t[i])); low = fminf(low, t[i]); high = fmaxf(high, t[i]); }
        for (int o = lanes / 2; o > 0; o >>= 1) {
            amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, o));
            low = fminf(low, __shfl_xor_sync(0xffffffffu, low, o));
            high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, o));
        }
        s = moqk_group_scale(p, amax, low, high, &zero);
        for (int32_t i = first + lane; i < end; i += lanes) r[p.place ? p.place[i] : i] = moqk_round_with(p, t[i], s, zero, asymmetric);
    }
}

/* x -> t = rotated and smoothed, r = t rounded, in the order of the codes; both padded with zeros to ld. Grid: rows, segments. */
__global__ void __launch_bounds__(256) moqk_feed(moqk_feed_args a)
{
    moqk_follow();
    __shared__ float room[33];
    int64_t row = blockIdx.x, from = a.row_of ? a.row_of[row] : row;
    const moqk_part &p = a.parts[a.expert_of ? (int64_t)a.expert_of[row] * a.expert_stride : 0];
    int32_t cols = p.feed_cols, lo = (int32_t)min((int64_t)blockIdx.y * a.segment, (int64_t)cols),
        hi = (int32_t)min((int64_t)lo + a.segment, (int64_t)cols);
    float *t = a.t + row * a.ld, *r = a.r + row * a.ld;
    int64_t up = a.activation.kind == MOQ_RELU2 ? 0 : cols;
    for (int32_t i = lo + threadIdx.x; i < hi; i += blockDim.x) {
        float v = moqk_get_any(a.x, from * a.ldx + i, a.x_bf16);
        if (a.fused) v = moqk_activate(a.activation, v, moqk_get_any(a.x, from * a.ldx + up + i, a.x_bf16));
        t[i] = v;
    }
    if (p.hadamard_size > 0) moqk_rotate(p, t, r, lo, hi);
    __syncthreads();
    for (int32_t i = lo + threadIdx.x; p.smooth && i < hi; i += blockDim.x) t[i] *= p.smooth[i];
    if (p.place) { /* one segment: columns that pad groups are zero */
        __syncthreads();
        for (int32_t i = threadIdx.x; i < a.ld; i += blockDim.x) r[i] = 0;
    } else if (hi == cols) {
        for (int32_t i = cols + threadIdx.x; i < a.ld; i += blockDim.x) r[i] = t[i] = 0;
    }
    __syncthreads();
    if (p.rounds) moqk_round_segment(p, t, r, lo, hi, room);
    else if (t != r || p.place) for (int32_t i = lo + threadIdx.x; i < hi; i += blockDim.x) r[p.place ? p.place[i] : i] = t[i];
}

/* ---- eight neighbouring weights in registers ---- */

/* E2M1 through F16: sign, exponent and mantissa bits moved to their places give value * 2^-14. */
__device__ __forceinline__ void moqk_decode_e2m1(uint32_t w, float v[8])
{
    const __half2 fix = __float2half2_rn(16384.0f);
#pragma unroll
    for (int j = 0; j < 4; j++) { /* nibbles j and j + 4 */
        uint32_t at = w << (12 - 4 * j), h = (at & 0x80008000u) | (at >> 3 & 0x0e000e00u);
        float2 f = __half22float2(__hmul2(*(const __half2 *)&h, fix));
        v[j] = f.x;
        v[j + 4] = f.y;
    }
}

/* E4M3 through F16, value * 2^-8. NaN is finite there: put back. */
__device__ __forceinline__ void moqk_decode_e4m3(uint32_t w, float *v)
{
#if __CUDA_ARCH__ >= 890
    uint32_t lo, hi;
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b; }" : "=r"(lo), "=r"(hi) : "r"(w));
    float2 f = __half22float2(*(const __half2 *)&lo), g = __half22float2(*(const __half2 *)&hi);
    v[0] = f.x;
    v[1] = f.y;
    v[2] = g.x;
    v[3] = g.y;
#else
    const __half2 fix = __float2half2_rn(256.0f);
#pragma unroll
    for (int j = 0; j < 2; j++) { /* bytes j and j + 2 */
        uint32_t at = j ? w : w << 8, h = (at & 0x80008000u) | (at >> 1 & 0x3f803f80u);
        float2 f = __half22float2(__hmul2(*(const __half2 *)&h, fix));
        v[j] = (w >> (8 * j) & 127) == 127 ? __uint_as_float(0x7fc00000u) : f.x;
        v[j + 2] = (w >> (8 * j + 16) & 127) == 127 ? __uint_as_float(0x7fc00000u) : f.y;
    }
#endif
}

/* Raw bits of 8 columns: one load. */
template <int KIND> struct moqk_bits { uint32_t w[moqk_kind_bytes(KIND) / 4]; };

template <int KIND> __device__ __forceinline__ moqk_bits<KIND> moqk_load8(const uint8_t *p)
{
    moqk_bits<KIND> b;
    if constexpr (KIND <= MOQK_U4) b.w[0] = __ldg((const unsigned *)p);
    else if constexpr (KIND <= MOQK_U8) { uint2 v = __ldg((const uint2 *)p); b.w[0] = v.x; b.w[1] = v.y; }
    else {
#pragma unroll
        for (int i = 0; i < moqk_kind_bytes(KIND) / 16; i++) { uint4 v = __ldg((const uint4 *)p + i); b.w[4 * i] = v.x; b.w[4 * i + 1] = v.y; b.w[4 * i + 2] = v.z; b.w[4 * i + 3] = v.w; }
    }
    return b;
}

/* Code minus zero point as F32. Integers: 2^23 + n is a float, so one subtraction converts and moves: exact. */
template <int KIND> __device__ __forceinline__ void moqk_decode8(const moqk_bits<KIND> &b, float zero, float v[8])
{
    if constexpr (KIND == MOQK_E2M1) moqk_decode_e2m1(b.w[0], v);
    else if constexpr (KIND == MOQK_U4) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = __uint_as_float((b.w[0] >> (4 * i) & 15) | 0x4b000000u) - (8388608.0f + zero);
    } else if constexpr (KIND == MOQK_E4M3) {
        moqk_decode_e4m3(b.w[0], v);
        moqk_decode_e4m3(b.w[1], v + 4);
    } else if constexpr (KIND == MOQK_U8) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = __uint_as_float(__byte_perm(b.w[i / 4], 0x4b000000u, 0x7540 + (i & 3))) - (8388608.0f + zero);
    } else if constexpr (KIND == MOQK_BF16) {
#pragma unroll
        for (int i = 0; i < 4; i++) { v[2 * i] = __uint_as_float(b.w[i] << 16); v[2 * i + 1] = __uint_as_float(b.w[i] & 0xffff0000u); }
    } else if constexpr (KIND == MOQK_F16) {
#pragma unroll
        for (int i = 0; i < 4; i++) { float2 f = __half22float2(*(const __half2 *)&b.w[i]); v[2 * i] = f.x; v[2 * i + 1] = f.y; }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = __uint_as_float(b.w[i]);
    }
}

__device__ __forceinline__ float moqk_scale_at(const uint8_t *scales, int kind, int64_t at)
{
    if (kind == MOQK_SCALE_E4M3) {
        float v[4];
        moqk_decode_e4m3(__ldg(scales + at), v);
        return v[0];
    }
    return kind == MOQK_SCALE_E8M0 ? moqk_e8m0(__ldg(scales + at)) : __ldg((const float *)scales + at);
}

/* What eight neighbouring codes are moved and multiplied by. */
typedef struct moqk_eight { float zero[8], scale[8]; } moqk_eight;

/* Those of columns [c, c + 8) where groups end between them; `at`: the row's first group. Rare, so one copy of it for all kernels. */
static __device__ __noinline__ moqk_eight moqk_each_scale(const uint8_t *scales, int kind, const int16_t *zeros, float zero, int64_t at, int32_t c, int32_t cols,
                                                          int32_t group)
{
    moqk_eight e;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int64_t k = at + min(c + i, cols - 1) / group;
        e.zero[i] = zeros ? zero + (float)zeros[k] : zero;
        e.scale[i] = kind == MOQK_NO_SCALE ? 1.0f : moqk_scale_at(scales, kind, k);
    }
    return e;
}

/* Columns [c, c + 8) of a row: code minus zero, and the scale that they share (returned) or, where they do not, multiplied in already. */
template <int KIND> __device__ __forceinline__ float moqk_weights8(const moqk_part &p, const moqk_bits<KIND> &b, int64_t row, int32_t c, float v[8])
{
    int64_t at = row * p.scale_stride;
    if (p.group8) {
        at += c / p.group;
        moqk_decode8<KIND>(b, p.zeros ? p.zero + (float)p.zeros[at] : p.zero, v);
        return p.scale_kind == MOQK_NO_SCALE ? 1.0f : moqk_scale_at(p.scales, p.scale_kind, at);
    }
    const moqk_eight e = moqk_each_scale(p.scales, p.scale_kind, p.zeros, p.zero, at, c, p.cols, p.group);
    moqk_decode8<KIND>(b, 0, v);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = (v[i] - e.zero[i]) * e.scale[i];
    return 1.0f;
}

/* Eight neighbouring inputs; x is aligned to 16 bytes. */
__device__ __forceinline__ void moqk_inputs8(const void *x, int64_t at, int bf16, float v[8])
{
    if (bf16) {
        uint4 q = *(const uint4 *)((const __nv_bfloat16 *)x + at);
        const uint32_t w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int i = 0; i < 4; i++) { v[2 * i] = __uint_as_float(w[i] << 16); v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u); }
    } else {
        float4 a = ((const float4 *)((const float *)x + at))[0], b = ((const float4 *)((const float *)x + at))[1];
        v[0] = a.x; v[1] = a.y; v[2] = a.z; v[3] = a.w;
        v[4] = b.x; v[5] = b.y; v[6] = b.z; v[7] = b.w;
    }
}

__device__ __forceinline__ void moqk_store(const moqk_call &a, int64_t at, float v)
{
    if (a.accumulate) v += moqk_get_any(a.y, at, a.y_bf16);
    moqk_put_any(a.y, at, v, a.y_bf16);
}

/* The expert's parts, the first row of x and y and the number of rows of this block. 0: nothing to do. */
__device__ __forceinline__ int moqk_locate(const moqk_call &a, int32_t most, const moqk_part **parts, int32_t *first, int32_t *count)
{
    *parts = a.parts;
    if (!a.tiles) {
        *first = blockIdx.y * most;
        *count = min(most, a.m - *first);
        return 1;
    }
    if ((int32_t)blockIdx.y >= a.tiles[-4]) return 0;
    const int32_t *tile = a.tiles + 4 * (int64_t)blockIdx.y;
    *parts += (int64_t)tile[0] * a.expert_stride;
    *first = tile[1];
    *count = tile[2];
    return 1;
}

/* Few rows of x: a warp multiplies 4 rows of W, `slices` warps of the block share the columns. Lane l of slice s takes columns
   (s + slices * i) * 256 + 8 l; sums are over lanes, then over slices: a fixed order. Reads the weights once for MT rows of x. */
template <int KIND, int MT> __global__ void __launch_bounds__(256) moqk_gemv(moqk_call a)
{
    __shared__ float sums[8][4 * MT];
    const moqk_part *p;
    int32_t first, count, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, slice = warp % a.slices;
    int32_t group = blockIdx.x * (8 / a.slices) + warp / a.slices, y_first = 0, part = 0;
    if (!moqk_locate(a, MT, &p, &first, &count)) return;
    for (; part < a.part_count && group >= (p->rows + 3) / 4; part++, p++) { group -= (p->rows + 3) / 4; y_first += p->rows; }
    int active = part < a.part_count && p->kind == KIND;
    float acc[4][MT];
#pragma unroll
    for (int r = 0; r < 4; r++)
        for (int t = 0; t < MT; t++) acc[r][t] = 0;
    if (active) {
        const moqk_part q = *p;
        int32_t end = (q.cols + 7) / 8 * 8;
        for (int32_t c = slice * 256 + lane * 8; c < end; c += a.slices * 256) {
            moqk_bits<KIND> bits[4];
#pragma unroll
            for (int r = 0; r < 4; r++) bits[r] = moqk_load8<KIND>(q.codes + (int64_t)min(group * 4 + r, q.rows - 1) * q.row_bytes +
                                                                   c / 8 * moqk_kind_bytes(KIND));
            float w[4][8], s[4], x[8];
#pragma unroll
            for (int r = 0; r < 4; r++) s[r] = moqk_weights8<KIND>(q, bits[r], min(group * 4 + r, q.rows - 1), c, w[r]);
#pragma unroll
            for (int t = 0; t < MT; t++) {
                if (t >= count) break;
                int64_t row = a.row_of ? a.row_of[first + t] : first + t;
                moqk_inputs8(a.x, row * a.ldx + c, a.x_bf16, x);
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    float dot = w[r][0] * x[0];
#pragma unroll
                    for (int i = 1; i < 8; i++) dot += w[r][i] * x[i];
                    acc[r][t] += dot * s[r];
                }
            }
        }
#pragma unroll
        for (int t = 0; t < MT; t++) {
            if (t >= count) break;
#pragma unroll
            for (int r = 0; r < 4; r++) {
                float v = moqk_warp_sum(acc[r][t]);
                if (lane == 0) sums[warp][r * MT + t] = v;
            }
        }
    }
    __syncthreads();
    if (!active || slice != 0) return;
    for (int i = lane; i < 4 * MT; i += 32) {
        int32_t row = group * 4 + i / MT, t = i % MT;
        float v = 0;
        for (int s = 0; s < a.slices; s++) v += sums[warp + s][i];
        if (row < p->rows && t < count) moqk_store(a, (first + t) * a.ldy + y_first + row, v * p->factor + (p->bias ? p->bias[row] : 0));
    }
}

/* The first n of four neighbouring sums as y[at..] = v * factor + bias; bias: the first of them, or NULL. */
static __device__ __noinline__ void moqk_store_four(void *y, int bf16, int accumulate, int64_t at, int n, float4 v, float factor, const float *bias)
{
    const float each[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (i >= n) break;
        float sum = each[i] * factor + (bias ? bias[i] : 0);
        if (accumulate) sum += moqk_get_any(y, at + i, bf16);
        moqk_put_any(y, at + i, sum, bf16);
    }
}

/* Many rows of x: tiles of 128 rows of W and BM rows of x, 32 columns at a time through shared memory, 8 x BM/16 sums a thread. Each 32
   columns are summed apart before they are added: the error grows with the root of cols / 32. */
template <int KIND, int BM> __global__ void __launch_bounds__(256) moqk_gemm(moqk_call a)
{
    constexpr int TM = BM / 16; /* rows of x that a thread owns */
    __shared__ __align__(16) float ws[32][128];
    __shared__ __align__(16) float xs[32][BM + 4];
    const moqk_part *p;
    int32_t first, count, tile = blockIdx.x, y_first = 0, part = 0, tid = threadIdx.x;
    if (!moqk_locate(a, BM, &p, &first, &count)) return;
    for (; part < a.part_count && tile >= (p->rows + 127) / 128; part++, p++) { tile -= (p->rows + 127) / 128; y_first += p->rows; }
    if (part == a.part_count || p->kind != KIND) return;
    const moqk_part q = *p;
    int32_t end = (q.cols + 7) / 8 * 8, wr = tid & 127, half = tid >> 7, w_row = min(tile * 128 + wr, q.rows - 1);
    int32_t x_row = tid % BM, x_col = tid / BM * 8, tx = tid & 15, ty = tid >> 4;
    int64_t x_from = 0;
    if (x_row < count) x_from = (a.row_of ? a.row_of[first + x_row] : first + x_row) * a.ldx;
    float acc[8][TM], run[8][TM];
#pragma unroll
    for (int r = 0; r < 8; r++)
        for (int t = 0; t < TM; t++) acc[r][t] = 0;
    for (int32_t k = 0; k < end; k += 32) {
        float v[8];
#pragma unroll
        for (int r = 0; r < 8; r++)
            for (int t = 0; t < TM; t++) run[r][t] = 0;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int32_t c = k + half * 16 + j * 8;
            float s = 0;
            for (int i = 0; i < 8; i++) v[i] = 0;
            if (c < end) s = moqk_weights8<KIND>(q, moqk_load8<KIND>(q.codes + (int64_t)w_row * q.row_bytes + c / 8 * moqk_kind_bytes(KIND)), w_row,
                                                 c, v);
#pragma unroll
            for (int i = 0; i < 8; i++) ws[half * 16 + j * 8 + i][wr] = v[i] * s;
        }
        if (x_col < 32) {
            for (int i = 0; i < 8; i++) v[i] = 0;
            if (x_row < count && k + x_col < end) moqk_inputs8(a.x, x_from + k + x_col, a.x_bf16, v);
#pragma unroll
            for (int i = 0; i < 8; i++) xs[x_col + i][x_row] = v[i];
        }
        __syncthreads();
#pragma unroll 8
        for (int i = 0; i < 32; i++) {
            float4 w0 = *(const float4 *)&ws[i][tx * 4], w1 = *(const float4 *)&ws[i][64 + tx * 4];
            const float w[8] = {w0.x, w0.y, w0.z, w0.w, w1.x, w1.y, w1.z, w1.w};
#pragma unroll
            for (int t = 0; t < TM; t++) {
                float x = xs[i][ty * TM + t];
#pragma unroll
                for (int r = 0; r < 8; r++) run[r][t] += w[r] * x;
            }
        }
#pragma unroll
        for (int r = 0; r < 8; r++)
            for (int t = 0; t < TM; t++) acc[r][t] += run[r][t];
        __syncthreads();
    }
#pragma unroll
    for (int t = 0; t < TM; t++)
#pragma unroll
        for (int r = 0; r < 8; r += 4) {
            const int32_t row = tile * 128 + 16 * r + tx * 4, token = ty * TM + t;
            if (row < q.rows && token < count)
                moqk_store_four(a.y, a.y_bf16, a.accumulate, (first + token) * a.ldy + y_first + row, q.rows - row,
                                make_float4(acc[r][t], acc[r + 1][t], acc[r + 2][t], acc[r + 3][t]), q.factor, q.bias ? q.bias + row : NULL);
        }
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-decode     1 to 16 rows of x: weights stream through the tensor cores once
   Weights are the 16-row operand of mma.m16n8k16, decoded in registers; x is the 8-column operand. An F32 x goes in as two columns of BF16,
   hi = bf16(x) and lo = bf16(x - hi), which keeps 17 bits of it: four rows of x fill the columns of one product. Codes are exact in BF16
   (4-bit floats times their group's scale too); other scales multiply F32 sums of a group. Sums have a fixed order.

   Layout: chunks of 16 rows x (2048 bytes of codes), row tile by row tile. A lane's 16 bytes are rows g and g + 8 (g = lane / 4) of its share
   of the columns, in the order of the product's registers: one load, no shuffles. The order of columns inside a product is free as long as
   both operands agree: see moqk_fast_col. Bytes read per launch: the codes and scales once, x once per block.
   ------------------------------------------------------------------------------------------------ */

enum moqk_form { MOQK_NVFP4, MOQK_MXFP4, MOQK_FAST_U4, MOQK_FAST_E4M3, MOQK_FAST_U8, MOQK_FAST_BF16, MOQK_FORMS };

__host__ __device__ static constexpr int moqk_fast_bits(int form) { return form <= MOQK_FAST_U4 ? 4 : form <= MOQK_FAST_U8 ? 8 : 16; }
__host__ __device__ static constexpr int moqk_chunk_cols(int form) { return 1024 / moqk_fast_bits(form); }
/* 4-bit floats carry the scales of their 256 columns in the chunk; others have theirs behind all chunks. */
__host__ __device__ static constexpr int moqk_chunk_bytes(int form) { return form == MOQK_NVFP4 ? 2304 : form == MOQK_MXFP4 ? 2176 : 2048; }

/* Column in a block of 64 of element e (0..3) of lane t of a quad in step s (0..3): 4-bit floats give a lane 16 neighbours, one group's
   scale; the others give a step 16 neighbours, so that a step never crosses groups of 32. Elements 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of 16 are where a
   product has them, so that the others' order is that of x itself, and word s of lane t of 4-bit floats is word t of lane s there. */
__host__ __device__ static constexpr int moqk_fast_col(int form, int t, int s, int e)
{
    return (form <= MOQK_MXFP4 ? t * 16 + s * 2 : s * 16 + t * 2) + (e & 1) + (e & 2) * 4;
}

/* Where among the 32 x 16 bytes of a unit those of a lane lie. Of 4-bit floats so that not only neighbours of a lane but also lanes t, t + 4, ... t + 28 find
   theirs in different banks: products that want 16 neighbouring columns read them so, see moqk_staged. */
__host__ __device__ static constexpr int moqk_fast_slot(int form, int lane) { return form <= MOQK_MXFP4 ? lane ^ lane >> 3 : lane; }

/* The form of a part, or -1. */
__host__ __device__ static inline int moqk_form_of(const moqk_part &p)
{
    int64_t g = p.group;
    int whole = g >= p.cols, fine = whole || (g >= 32 && (g & (g - 1)) == 0);
    if (p.kind == MOQK_E2M1) {
        if (p.zero != 0 || p.scale_stride == 0) return -1;
        return p.scale_kind == MOQK_SCALE_E4M3 && g == 16 ? MOQK_NVFP4 : p.scale_kind == MOQK_SCALE_E8M0 && g == 32 ? MOQK_MXFP4 : -1;
    }
    if (p.kind == MOQK_U4) return fine && p.zero >= 0 && p.zero <= 16 ? MOQK_FAST_U4 : -1;
    if (p.kind == MOQK_E4M3) return fine && p.zero == 0 ? MOQK_FAST_E4M3 : -1;
    if (p.kind == MOQK_U8) return whole && p.zero >= 0 && p.zero <= 128 ? MOQK_FAST_U8 : -1;
    return p.kind == MOQK_BF16 && p.scale_kind == MOQK_NO_SCALE && p.zero == 0 ? MOQK_FAST_BF16 : -1;
}

/* How scales reach the sums: 0 once at the end, 32 or 64: groups of 32, or of a multiple of 64 columns. 4-bit floats: on the weights. */
__host__ __device__ static inline int moqk_form_step(const moqk_part &p, int form)
{
    return form <= MOQK_MXFP4 || form >= MOQK_FAST_U8 || p.group >= p.cols ? 0 : p.group == 32 ? 32 : 64;
}

/* Where the pieces lie: chunks [tiles][chunks], scales [tiles][groups][8] of float2 (rows g, g + 8), zeros of integers
   [tiles][groups][8] of two bytes; MXFP4: there the largest scale byte of each row [tiles][8] of two bytes. */
typedef struct moqk_fast {
    int64_t tiles, chunks, groups, scales_at, zeros_at, bytes;
} moqk_fast;

__host__ __device__ static inline moqk_fast moqk_fast_of(const moqk_part &p, int form)
{
    moqk_fast f;
    f.tiles = moqk_ceil(p.rows, 16);
    f.chunks = moqk_ceil(p.cols, moqk_chunk_cols(form));
    f.groups = form <= MOQK_MXFP4 ? 0 : p.group >= p.cols ? 1 : moqk_ceil(f.chunks * moqk_chunk_cols(form), p.group);
    f.scales_at = f.tiles * f.chunks * moqk_chunk_bytes(form);
    f.zeros_at = f.scales_at + f.tiles * f.groups * 64;
    f.bytes = f.zeros_at + (form == MOQK_FAST_U4 || form == MOQK_FAST_U8 ? f.tiles * f.groups * 16 : form == MOQK_MXFP4 ? f.tiles * 16 : 0);
    return f;
}

/* ---- preparing ---- */

/* Raw code; outside the matrix 0, which only meets columns where x is 0 or rows that nobody stores. */
__device__ __forceinline__ uint32_t moqk_raw_code(const moqk_part &p, int64_t row, int64_t col)
{
    if (row >= p.rows || col >= p.cols) return 0;
    const uint8_t *line = p.codes + row * p.row_bytes;
    if (p.kind <= MOQK_U4) return line[col >> 1] >> (4 * (col & 1)) & 15;
    return p.kind <= MOQK_U8 ? line[col] : ((const uint16_t *)line)[col];
}

/* E4M3 as 5 bits of exponent (bias 10) and 3 of mantissa, so that no scale is subnormal. Not for 0. */
__device__ __forceinline__ uint32_t moqk_e5m3(uint32_t b)
{
    int e = b >> 3 & 15, m = b & 7;
    if (e == 0) {
        for (e = 1; m < 8; e--) m *= 2;
        m &= 7;
    }
    return (uint32_t)((e + 3) << 3 | m);
}

/* Two codes (the halves of register r of a step) as bits of a word. 4-bit floats: signs at 15, 12, 14, 13 and magnitudes at 6, 3, 0, 9 of
   each half for r = 0..3: a sign or magnitude is at most one shift away from where BF16 has it. */
__device__ __forceinline__ uint32_t moqk_fast_bits_of(int form, int r, uint32_t low, uint32_t high)
{
    const uint32_t both = low | high << 16;
    if (form <= MOQK_MXFP4) return (both >> 3 & 0x00010001u) << (0xdecf >> (4 * r) & 15) | (both & 0x00070007u) << (0x9036 >> (4 * r) & 15);
    if (form == MOQK_FAST_U4) return both << (4 * r);
    if (form == MOQK_FAST_U8) return (both ^ 0x00800080u) << (8 * (r & 1));
    return form == MOQK_FAST_E4M3 ? both << (8 * (r & 1)) : both;
}

/* Row-major form -> chunks. A thread writes 4 bytes of codes. Reads and writes each code once. */
__global__ void moqk_fast_codes(moqk_part p, int form, moqk_fast f, uint8_t *out)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, chunk = i >> 9, tile = chunk / f.chunks, c = chunk % f.chunks;
    if (tile >= f.tiles) return;
    int word = i & 3, lane = i >> 2 & 31, unit = i >> 7 & 3, t = lane & 3, bits = moqk_fast_bits(form);
    int regs = 16 / bits, sequence = (unit * 4 + word) * regs; /* which register of the chunk: 16 per block of 64 columns */
    uint32_t v = 0;
    for (int k = 0; k < regs; k++) {
        int at = sequence + k, block = at >> 4, step = at >> 2 & 3, r = at & 3;
        int64_t row = tile * 16 + (lane >> 2) + 8 * (r & 1), col = c * moqk_chunk_cols(form) + block * 64 + moqk_fast_col(form, t, step, (r >> 1) * 2);
        uint32_t low = moqk_raw_code(p, row, col), high = moqk_raw_code(p, row, col + 1);
        if (form == MOQK_NVFP4 && row < p.rows && col < p.cols) { /* a scale of 0 has no 5-bit exponent: 0 codes; of -s: codes change sign */
            uint32_t s = p.scales[row * p.scale_stride + col / 16];
            if ((s & 127) == 0) low = high = 0;
            else if (s & 128) low ^= 8, high ^= 8;
        }
        v |= moqk_fast_bits_of(form, r, low, high);
    }
    *(uint32_t *)(out + chunk * moqk_chunk_bytes(form) + unit * 512 + moqk_fast_slot(form, lane) * 16 + word * 4) = v;
}

/* Scales of 4-bit floats: 8 bytes a lane (MXFP4: shared by lanes t and t ^ 1), [block of 64 columns][row g, g + 8]. */
__global__ void moqk_fast_bytes(moqk_part p, int form, moqk_fast f, uint8_t *out)
{
    int each = form == MOQK_NVFP4 ? 256 : 128, group = form == MOQK_NVFP4 ? 16 : 32, quads = 64 / group;
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, chunk = i / each, tile = chunk / f.chunks, c = chunk % f.chunks;
    if (tile >= f.tiles) return;
    int at = (int)(i % each), slot = at >> 3, g = slot / quads, q = slot % quads, block = at >> 1 & 3;
    int64_t row = tile * 16 + g + 8 * (at & 1), col = c * 256 + block * 64 + q * group;
    uint32_t s = row < p.rows && col < p.cols ? p.scales[row * p.scale_stride + col / group] : 0;
    if (form == MOQK_NVFP4) s = (s & 127) == 0 ? 0 : moqk_e5m3(s & 127);
    out[chunk * moqk_chunk_bytes(form) + 2048 + at] = (uint8_t)s;
}

/* Scales and zero points that multiply sums, as F32 and bytes. */
__global__ void moqk_fast_groups(moqk_part p, moqk_fast f, uint8_t *out)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, half = i & 1, group = (i >> 4) % f.groups, tile = (i >> 4) / f.groups;
    if (tile >= f.tiles) return;
    int64_t row = tile * 16 + (i >> 1 & 7) + 8 * half, at = row * p.scale_stride + group;
    int inside = row < p.rows && group * p.group < p.cols;
    ((float *)(out + f.scales_at))[i] = !inside ? 0.0f : p.scale_kind == MOQK_NO_SCALE ? 1.0f : moqk_scale_at(p.scales, p.scale_kind, at);
    if (p.kind == MOQK_U4 || p.kind == MOQK_U8) /* 4 bits: 128 + zero must be a BF16 */
        out[f.zeros_at + i] = inside ? (uint8_t)min(max((int)p.zero + (p.zeros ? p.zeros[at] : 0), 0), p.kind == MOQK_U4 ? 127 : 255) : 0;
}

/* The largest E8M0 byte of each row of MXFP4. A warp per row. */
__global__ void moqk_fast_tops(moqk_part p, moqk_fast f, uint8_t *out)
{
    int64_t i = blockIdx.x * 8 + (threadIdx.x >> 5), row = (i >> 4) * 16 + (i >> 1 & 7) + 8 * (i & 1);
    if (i >= f.tiles * 16) return;
    int top = 0;
    for (int32_t g = threadIdx.x & 31; row < p.rows && g < p.scale_stride; g += 32) top = max(top, (int)p.scales[row * p.scale_stride + g]);
    for (int o = 16; o > 0; o >>= 1) top = max(top, __shfl_xor_sync(0xffffffffu, top, o));
    if ((threadIdx.x & 31) == 0) out[f.zeros_at + i] = (uint8_t)top;
}

static size_t moqc_fast_bytes(const moqk_part *p)
{
    int form = moqk_form_of(*p);
    return form < 0 ? 0 : (size_t)moqk_fast_of(*p, form).bytes;
}

static void moqc_fast_prepare(moqc_ctx *c, const moqk_part *p, uint8_t *to)
{
    int form = moqk_form_of(*p);
    if (form < 0) return;
    moqk_fast f = moqk_fast_of(*p, form);
    moqk_fast_codes<<<(unsigned)moqk_ceil(f.tiles * f.chunks * 512, 256), 256, 0, c->stream>>>(*p, form, f, to);
    if (f.groups == 0) moqk_fast_bytes<<<(unsigned)moqk_ceil(f.tiles * f.chunks * 256, 256), 256, 0, c->stream>>>(*p, form, f, to);
    else moqk_fast_groups<<<(unsigned)moqk_ceil(f.tiles * f.groups * 16, 256), 256, 0, c->stream>>>(*p, f, to);
    if (form == MOQK_MXFP4) moqk_fast_tops<<<(unsigned)moqk_ceil(f.tiles * 16, 8), 256, 0, c->stream>>>(*p, f, to);
}

/* ---- small pieces of the kernel ---- */

/* Weights pass once: no room in L1 for them, and in the L2 they go before the code of the other kernels and what those have made. */
__device__ __forceinline__ uint64_t moqk_pass_once()
{
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint4 moqk_stream16(const uint8_t *p, uint64_t policy)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4], %5;" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p), "l"(policy));
    return v;
}

__device__ __forceinline__ void moqk_product(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t moqk_mul_pair(uint32_t a, uint32_t b)
{
    __nv_bfloat162 v = __hmul2(*(const __nv_bfloat162 *)&a, *(const __nv_bfloat162 *)&b);
    return *(const uint32_t *)&v;
}

/* One half of v twice, in a form that the compiler makes part of the multiplication. */
__device__ __forceinline__ uint32_t moqk_low_twice(uint32_t v)
{
    uint32_t r;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l}; }" : "=r"(r) : "r"(v));
    return r;
}
__device__ __forceinline__ uint32_t moqk_high_twice(uint32_t v)
{
    uint32_t r;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h}; }" : "=r"(r) : "r"(v));
    return r;
}

__device__ __forceinline__ uint32_t moqk_sub_pair(uint32_t a, uint32_t b)
{
    __nv_bfloat162 v = __hsub2(*(const __nv_bfloat162 *)&a, *(const __nv_bfloat162 *)&b);
    return *(const uint32_t *)&v;
}

/* Four matrices of 8 x 8 values of 16 bits: lane 8 i + n says where row n of matrix i lies, lane 4 g + t gets columns 2 t, 2 t + 1 of row g of each. */
__device__ __forceinline__ void moqk_load_matrices(uint32_t at, uint32_t (&r)[4])
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ uint32_t moqk_word_of(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

/* What raw codes lack: 4-bit floats come out as value * 2^-126 with a scale of 2^119 (NVFP4) or 2^55 (MXFP4: good from 2^-55 to 2^72) on
   top; E4M3 as value * 2^-120, which would leave products below F32's range, so x is taken times 2^60. */
__device__ static constexpr float moqk_form_x(int form) { return form == MOQK_FAST_E4M3 ? 1152921504606846976.0f : 1.0f; }
__device__ static constexpr float moqk_form_fix(int form)
{
    return form == MOQK_NVFP4 ? 128.0f : form == MOQK_MXFP4 ? 2361183241434822606848.0f : form == MOQK_FAST_E4M3 ? 1152921504606846976.0f : 1.0f;
}

/* A scale byte as a pair of BF16. E5M3: exponent e - 10 + 119 + 127 = e + 236 would leave 8 bits, so the bias is folded: byte * 16 + 0x7600. */
template <int FORM> __device__ __forceinline__ uint32_t moqk_scale_pair(uint32_t v, int i)
{
    uint32_t s = __byte_perm(v, 0, 0x4440 | i);
    if (FORM == MOQK_NVFP4) return s * 0x00100010u + 0x76007600u;
    return min(s + 55, 254u) * 0x00800080u;
}

/* Bytes 2 * half (low) and 2 * half + 1 (high) of v, scales of rows g and g + 8, as two BF16; see moqk_scale_pair. */
template <int FORM> __device__ __forceinline__ uint32_t moqk_scale_both(uint32_t v, int half)
{
    const uint32_t s = __byte_perm(v, 0, half ? 0x4342 : 0x4140);
    if (FORM == MOQK_NVFP4) return s * 16 + 0x76007600u;
    return __vminu2(s + 0x00370037u, 0x00fe00feu) * 128;
}

/* Of each half of a word of E2M1 codes, bits 2..0 and the sign in bit 14 as those of a BF16: up by 6 and by 1 in one product, whose two parts do not meet. */
__device__ __forceinline__ uint32_t moqk_third_pair(uint32_t v) { return (v & 0x40074007u) * 66 & 0x81c081c0u; }

/* Registers of step `s` of a block of 64 columns, from the lane's 16-byte units of the block; z: 128 + zero (8 bits: zero - 128) of rows
   g and g + 8. */
template <int FORM> __device__ __forceinline__ void moqk_fast_decode(const uint4 *w, int s, const uint32_t z[2], uint32_t a[4])
{
    if constexpr (FORM <= MOQK_MXFP4) {
        uint32_t v = moqk_word_of(w[0], s);
        a[0] = v & 0x81c081c0u;
        a[1] = v << 3 & 0x81c081c0u;
        a[2] = moqk_third_pair(v);
        a[3] = (v >> 3 & 0x01c001c0u) | (v << 2 & 0x80008000u);
    } else if constexpr (FORM == MOQK_FAST_U4) { /* 0x4300 | n is 128 + n: the difference is exact */
        uint32_t v = moqk_word_of(w[0], s);
#pragma unroll
        for (int r = 0; r < 4; r++) a[r] = moqk_sub_pair((v >> (4 * r) & 0x000f000fu) | 0x43004300u, z[r & 1]);
    } else if constexpr (FORM == MOQK_FAST_BF16) {
        a[0] = w[s].x;
        a[1] = w[s].y;
        a[2] = w[s].z;
        a[3] = w[s].w;
    } else {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            uint32_t v = moqk_word_of(w[s >> 1], (s & 1) * 2 + (r >> 1));
            if (FORM == MOQK_FAST_E4M3) a[r] = r & 1 ? (v & 0x80008000u) | (v >> 4 & 0x07f007f0u) : (v << 8 & 0x80008000u) | (v << 4 & 0x07f007f0u);
            else { /* n - 128 = (128 + low 7 bits) - (256 or 128); the top bit is stored inverted */
                uint32_t n = r & 1 ? v >> 8 : v;
                a[r] = moqk_sub_pair(moqk_sub_pair((n & 0x007f007fu) | 0x43004300u, (n & 0x00800080u) | 0x43004300u), z[r & 1]);
            }
        }
    }
}

/* Where block `b` of 64 columns of column `col` of the product lies in shared memory, for lane t and steps 2 * half, 2 * half + 1: neighbouring
   columns of x start at opposite halves of the banks. */
__device__ __forceinline__ uint32_t moqk_fast_x(int32_t b, int32_t columns, int32_t col, int t, int half)
{
    return (uint32_t)((b * columns + col) * 128 + (half ^ (col & 1)) * 64 + t * 16);
}

__device__ __forceinline__ uint32_t moqk_pack(float a, float b) /* a: low half */
{
    __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *(const uint32_t *)&v;
}

/* Four neighbouring values of x. Not through the read-only path: kernels that still run when this one starts may have written them. */
template <int SPLIT> __device__ __forceinline__ float4 moqk_fast_x4(const moqk_call &a, int64_t at)
{
    float4 v;
    uint2 h;
    if (SPLIT) asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"((const float *)a.x + at));
    else {
        asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(h.x), "=r"(h.y) : "l"((const __nv_bfloat16 *)a.x + at));
        v = make_float4(__uint_as_float(h.x << 16), __uint_as_float(h.x & 0xffff0000u), __uint_as_float(h.y << 16), __uint_as_float(h.y & 0xffff0000u));
    }
    return v;
}

/* Columns 4 i .. 4 i + 3 of the staged ones, row m of x, as one or two columns of the product: two pairs, of neighbouring steps or lanes (see
   moqk_fast_col). */
template <int FORM, int SPLIT> __device__ __forceinline__ void moqk_fast_put(float4 v, int32_t i, int32_t m, int32_t columns, uint8_t *xs)
{
    const float up = moqk_form_x(FORM), each[4] = {v.x * up, v.y * up, v.z * up, v.w * up};
    const int32_t q = i >> 2 & 3, first = (i & 1) * 2, half = i >> 1 & 1;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const int32_t t = FORM <= MOQK_MXFP4 ? q : first + k, s = FORM <= MOQK_MXFP4 ? first + k : q;
        const float x = each[2 * k], y = each[2 * k + 1];
        const uint32_t hi = moqk_pack(x, y);
        *(uint32_t *)(xs + moqk_fast_x(i >> 4, columns, SPLIT ? 2 * m : m, t, s >> 1) + (s & 1) * 8 + half * 4) = hi;
        if (SPLIT)
            *(uint32_t *)(xs + moqk_fast_x(i >> 4, columns, 2 * m + 1, t, s >> 1) + (s & 1) * 8 + half * 4)
                = moqk_pack(x - __uint_as_float(hi << 16), y - __uint_as_float(hi & 0xffff0000u));
    }
}

/* Columns [k0, k0 + 64 * blocks) of `count` rows of x into shared memory: a thread has U loads of MU rows in flight. */
template <int FORM, int SPLIT, int MU, int U>
__device__ __forceinline__ void moqk_fast_stage(const moqk_call &a, int64_t first, int32_t count, int32_t cols, int32_t k0, int32_t blocks, int32_t thread,
                                                int32_t threads, uint8_t *xs)
{
    const int32_t columns = count * (SPLIT ? 2 : 1), all = blocks * 16;
    for (int32_t m0 = 0; m0 < count; m0 += MU)
        for (int32_t i0 = thread; i0 < all; i0 += threads * (U / MU)) {
            float4 v[U];
#pragma unroll
            for (int u = 0; u < U; u++) {
                int32_t m = m0 + u % MU, i = i0 + u / MU * threads, k = k0 + 4 * i;
                v[u] = make_float4(0, 0, 0, 0);
                if (m < count && i < all && k < cols) v[u] = moqk_fast_x4<SPLIT>(a, (a.row_of ? (int64_t)a.row_of[first + m] : first + m) * a.ldx + k);
            }
#pragma unroll
            for (int u = 0; u < U; u++) {
                int32_t m = m0 + u % MU, i = i0 + u / MU * threads;
                if (m < count && i < all) moqk_fast_put<FORM, SPLIT>(v[u], i, m, columns, xs);
            }
        }
}

enum { MOQK_NORM_PLAYED = 2 }; /* warps of a norm that a warp plays */

/* The norm of a single row that a product makes of its x itself. */
typedef struct moqk_own_norm {
    int32_t threads;           /* of the norm's own launch; 0: x is as it is */
    float eps;
    const float *weight;       /* [cols] or NULL */
    void *normed;              /* [cols]: what the norm gives */
} moqk_own_norm;

/* x of a block, quads [from, end) of the norm of a row, with the bits of moqk_norm_rows: its warps are played by those of the block. Every block makes the
   whole sum: a row is in L2, and no launch stands between. put: takes a quad and its place behind `from`, zeros behind the last column; writes: this block
   writes them to `normed` too; room: a float for each warp that is played; ask: called when x is under way. PLAYED: by a warp, at most. */
template <int SPLIT, int PLAYED = MOQK_NORM_PLAYED, class ASK, class PUT>
__device__ __forceinline__ void moqk_norm_own(const moqk_call &a, const moqk_own_norm &d, int32_t warp, int32_t warps, int32_t cols, int32_t from, int32_t end,
                                              int writes, float *room, const ASK &ask, const PUT &put)
{
    const int32_t lane = threadIdx.x, played = d.threads >> 5, quads = cols >> 2;
    float4 v[PLAYED][MOQK_NORM_QUADS], w[PLAYED][MOQK_NORM_QUADS];
#pragma unroll
    for (int i = 0; i < PLAYED; i++)
#pragma unroll
        for (int k = 0; k < MOQK_NORM_QUADS; k++) { /* weights never change: before the kernel before has ended */
            const int32_t j = warp + i * warps, q = j * 32 + lane + k * d.threads;
            w[i][k] = j < played && q < quads && d.weight ? __ldg((const float4 *)(const void *)d.weight + q) : make_float4(1, 1, 1, 1);
        }
    moqk_wait_for_before();
#pragma unroll
    for (int i = 0; i < PLAYED; i++)
#pragma unroll
        for (int k = 0; k < MOQK_NORM_QUADS; k++) {
            const int32_t j = warp + i * warps, q = j * 32 + lane + k * d.threads;
            v[i][k] = make_float4(0, 0, 0, 0);
            if (j < played && q < quads) v[i][k] = moqk_fast_x4<SPLIT>(a, 4 * q);
        }
    ask();
#pragma unroll
    for (int i = 0; i < PLAYED; i++) {
        float sum = 0;
#pragma unroll
        for (int k = 0; k < MOQK_NORM_QUADS; k++) sum = moqk_add_squares(sum, v[i][k]);
        sum = moqk_warp_sum(sum);
        if (lane == 0 && warp + i * warps < played) room[warp + i * warps] = sum;
    }
    __syncthreads();
    const float s = moqk_norm_factor(moqk_warp_sum(lane < played ? room[lane] : 0), cols, d.eps);
#pragma unroll
    for (int i = 0; i < PLAYED; i++)
#pragma unroll
        for (int k = 0; k < MOQK_NORM_QUADS; k++) {
            const int32_t j = warp + i * warps, q = j * 32 + lane + k * d.threads;
            if (j >= played || q >= quads || q < from || q >= end) continue;
            v[i][k] = moqk_normed(v[i][k], s, w[i][k]);
            put(v[i][k], q - from);
            if (!writes) continue;
            if (SPLIT) moqk_put4((float *)d.normed + 4 * q, v[i][k]);
            else moqk_put4((__nv_bfloat16 *)d.normed + 4 * q, v[i][k]);
        }
    for (int32_t q = max(quads, from) + warp * 32 + lane; q < end; q += warps * 32) put(make_float4(0, 0, 0, 0), q - from);
}

/* All blocks of a cluster; relaxed_arrive: only that they run. */
__device__ __forceinline__ void moqk_cluster_arrive(int relaxed)
{
#if __CUDA_ARCH__ >= 900
    if (relaxed) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    else asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void moqk_cluster_wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/* To the shared memory of block `rank` of the cluster. */
__device__ __forceinline__ void moqk_store_at(float *p, float v, int blocks, uint32_t rank)
{
#if __CUDA_ARCH__ >= 900
    if (blocks > 1) {
        uint32_t at = (uint32_t)__cvta_generic_to_shared(p);
        asm volatile("{ .reg .u32 q; mapa.shared::cluster.u32 q, %0, %1; st.shared::cluster.f32 [q], %2; }" :: "r"(at), "r"(rank), "f"(v) : "memory");
        return;
    }
#endif
    *p = v;
}

/* ---- the kernel ---- */

/* How a launch is cut: a block takes `tiles` row tiles of a part; its warps are tiles x ways, where `ways` warps share the columns chunk by
   chunk; threads: 32, tiles, ways; `blocks` blocks of a cluster (1 or 2) halve the columns; x is staged `stage` chunks at a time. Warps: tiles * ways <= 16. */
typedef struct moqk_cut {
    int32_t tiles, ways, blocks, stage, rows; /* rows of x at most */
    int32_t tile_pitch;        /* floats of one row of x in the partial sums: tiles * 16 + 4 */
    moqk_own_norm norm;
} moqk_cut;

/* What a lane holds of a chunk while the one before is worked on. */
template <int FORM, int STEP> struct moqk_hand {
    static constexpr int BLOCKS = moqk_chunk_cols(FORM) / 64, GROUPS = STEP == 0 ? 1 : STEP == 32 ? BLOCKS * 2 : BLOCKS;
    uint4 w[4];
    uint2 bytes;               /* scales of 4-bit floats */
    float2 scale[GROUPS];
    uint32_t zero[FORM == MOQK_FAST_U4 ? GROUPS : 1];
};

/* Scales of a lane's rows for a chunk. */
template <int FORM, int STEP>
__device__ __forceinline__ void moqk_fast_scales(moqk_hand<FORM, STEP> &h, const uint8_t *chunk, int32_t c, int lane, const float2 *scales,
                                                 const uint16_t *zeros, int shift)
{
    if constexpr (FORM == MOQK_NVFP4) h.bytes = __ldg((const uint2 *)(chunk + 2048) + lane);
    if constexpr (FORM == MOQK_MXFP4) h.bytes = __ldg((const uint2 *)(chunk + 2048) + (lane >> 1));
    if constexpr (STEP > 0) {
#pragma unroll
        for (int i = 0; i < moqk_hand<FORM, STEP>::GROUPS; i++) {
            int32_t group = (c * moqk_chunk_cols(FORM) + i * STEP) >> shift;
            h.scale[i] = __ldg(scales + group * 8);
            if (FORM == MOQK_FAST_U4) h.zero[i] = __ldg(zeros + group * 8);
        }
    }
}

/* One block of 64 columns: acc += W x. */
template <int FORM, int STEP, int NB>
__device__ __forceinline__ void moqk_fast_block(const moqk_hand<FORM, STEP> &h, int block, const uint8_t *const x[NB], const int flip[NB], uint32_t step,
                                                const uint32_t z[2], float acc[NB][4])
{
    constexpr int UNITS = 4 / moqk_hand<FORM, STEP>::BLOCKS;
    uint4 b[NB][2];
    uint32_t s[2] = {0, 0}, zero[2] = {z[0], z[1]};
    float d[NB][4];
#pragma unroll
    for (int n = 0; n < NB; n++) {
        b[n][0] = *(const uint4 *)(x[n] + block * step + flip[n] * 64);
        b[n][1] = *(const uint4 *)(x[n] + block * step + 64 - flip[n] * 64);
    }
    if constexpr (FORM <= MOQK_MXFP4) {
        uint32_t v = block < 2 ? h.bytes.x : h.bytes.y;
        s[0] = moqk_scale_pair<FORM>(v, (block & 1) * 2);
        s[1] = moqk_scale_pair<FORM>(v, (block & 1) * 2 + 1);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t a[4];
        constexpr int each = STEP == 32 ? 2 : 4; /* steps of a scale */
        int group = STEP == 32 ? block * 2 + i / 2 : STEP == 64 ? block : 0;
        if (FORM == MOQK_FAST_U4 && STEP > 0 && i % each == 0) {
            zero[0] = (h.zero[group] & 255) * 0x00010001u | 0x43004300u;
            zero[1] = (h.zero[group] >> 8) * 0x00010001u | 0x43004300u;
        }
        moqk_fast_decode<FORM>(h.w + block * UNITS, i, zero, a);
        if constexpr (FORM <= MOQK_MXFP4) {
#pragma unroll
            for (int r = 0; r < 4; r++) a[r] = moqk_mul_pair(a[r], s[r & 1]);
        }
#pragma unroll
        for (int n = 0; n < NB; n++) {
            const uint32_t b0 = i & 1 ? b[n][i >> 1].z : b[n][i >> 1].x, b1 = i & 1 ? b[n][i >> 1].w : b[n][i >> 1].y;
            if constexpr (STEP == 0) moqk_product(acc[n], a, b0, b1); /* the caller's sum of a chunk */
            else {
                if (i % each == 0) d[n][0] = d[n][1] = d[n][2] = d[n][3] = 0;
                moqk_product(d[n], a, b0, b1);
                if (i % each != each - 1) continue;
                acc[n][0] += d[n][0] * h.scale[group].x;
                acc[n][1] += d[n][1] * h.scale[group].x;
                acc[n][2] += d[n][2] * h.scale[group].y;
                acc[n][3] += d[n][3] * h.scale[group].y;
            }
        }
    }
}

/* Grid: blocks of a cluster, groups of row tiles of all parts, tiles of choices. Reads the weights once; deterministic. NORM: x, a single row, is the norm
   of the call's x: it is staged all at once, and blocks have no cluster. */
template <int FORM, int STEP, int NB, int SPLIT, int NORM = 0> __global__ void __launch_bounds__(512, 1) moqk_decode(moqk_call a, moqk_cut cut)
{
    extern __shared__ __align__(128) uint8_t shared[];
    typedef moqk_hand<FORM, STEP> hand;
    const moqk_part *p = a.parts;
    int32_t first = 0, count = a.m, part = 0, y_first = 0, tile = blockIdx.y, lane = threadIdx.x, g = lane >> 2, t = lane & 3;
    const int32_t local = threadIdx.y, way = threadIdx.z, thread = lane + 32 * (local + cut.tiles * way), threads = 32 * cut.tiles * cut.ways;
    if (a.tiles) {
        moqk_wait_for_before();
        if ((int32_t)blockIdx.z >= a.tiles[-4]) return; /* all blocks of a cluster */
        const int32_t *choice = a.tiles + 4 * (int64_t)blockIdx.z;
        p += (int64_t)choice[0] * a.expert_stride;
        first = choice[1];
        count = choice[2];
    }
    for (; part < a.part_count; part++, p++) {
        int32_t groups = (p->rows + 16 * cut.tiles - 1) / (16 * cut.tiles);
        if (tile < groups) break;
        tile -= groups;
        y_first += p->rows;
    }
    if (part == a.part_count || moqk_form_of(*p) != FORM || moqk_form_step(*p, FORM) != STEP) return; /* another launch has it */
    moqk_dependents_may_start();
    const int32_t rows = p->rows, cols = p->cols, chunks = (cols + moqk_chunk_cols(FORM) - 1) / moqk_chunk_cols(FORM), columns = count * (SPLIT ? 2 : 1);
    const int32_t my_tile = tile * cut.tiles + local, tile_count = (rows + 15) / 16;
    const int32_t half = (chunks + cut.blocks - 1) / cut.blocks, begin = half * blockIdx.x, end = min(begin + half, chunks);
    const int live = my_tile < tile_count;
    const int32_t groups = FORM <= MOQK_MXFP4 ? 0 : p->group >= cols ? 1 : (chunks * moqk_chunk_cols(FORM) + p->group - 1) / p->group;
    const int shift = STEP > 0 ? __ffs(p->group) - 1 : 0;
    const uint8_t *packed = p->packed[0], *src = packed + (int64_t)my_tile * chunks * moqk_chunk_bytes(FORM);
    const int64_t scales_at = (int64_t)tile_count * chunks * moqk_chunk_bytes(FORM), at = (int64_t)my_tile * groups * 8 + g;
    const float2 *scales = (const float2 *)(packed + scales_at) + at;
    const uint16_t *zeros = (const uint16_t *)(packed + scales_at + (int64_t)tile_count * groups * 64) + at;
    uint32_t z[2] = {0, 0};
    hand h;
    const uint64_t policy = moqk_pass_once();
    int32_t c = begin + way;
    if (live && c < end) { /* the first weights, before x is known to be there */
#pragma unroll
        for (int i = 0; i < 4; i++) h.w[i] = moqk_stream16(src + (int64_t)c * moqk_chunk_bytes(FORM) + i * 512 + moqk_fast_slot(FORM, lane) * 16, policy);
        moqk_fast_scales<FORM, STEP>(h, src + (int64_t)c * moqk_chunk_bytes(FORM), c, lane, scales, zeros, shift);
    }
    if (NORM && live && c + cut.ways < end && lane < moqk_chunk_bytes(FORM) / 128) /* the next ones into L2 */
        asm volatile("prefetch.global.L2 [%0];" :: "l"(src + (int64_t)(c + cut.ways) * moqk_chunk_bytes(FORM) + lane * 128));
    if ((FORM == MOQK_FAST_U4 || FORM == MOQK_FAST_U8) && STEP == 0 && live) {
        uint32_t both = zeros[0];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float zero = (float)(both >> (8 * i) & 255) + (FORM == MOQK_FAST_U4 ? 128.0f : -128.0f);
            z[i] = moqk_pack(zero, zero);
        }
    }
    float *sums = (float *)(void *)shared;
    uint8_t *xs = shared + (size_t)cut.blocks * cut.ways * cut.rows * cut.tile_pitch * 4;
    if constexpr (NORM)
        moqk_norm_own<SPLIT>(a, cut.norm, local + cut.tiles * way, cut.tiles * cut.ways, cols, 0, chunks * hand::BLOCKS * 16, blockIdx.y == 0, sums, [] {},
                             [&](float4 v, int32_t i) { moqk_fast_put<FORM, SPLIT>(v, i, 0, columns, xs); });
    else moqk_wait_for_before();
    if (cut.blocks > 1) moqk_cluster_arrive(1);
    float acc[NB][4];
    const uint8_t *x[NB];
    int flip[NB];
    const uint32_t step = (uint32_t)columns * 128;
#pragma unroll
    for (int n = 0; n < NB; n++) {
        int col = 8 * n + g < columns ? 8 * n + g : 0; /* columns that nobody stores repeat another */
        flip[n] = col & 1;
        x[n] = xs + col * 128 + t * 16;
        for (int i = 0; i < 4; i++) acc[n][i] = 0;
    }
    for (int32_t from = begin; from < end; from += cut.stage) {
        int32_t until = min(from + cut.stage, end);
        if (from > begin) __syncthreads();
        const int32_t k0 = from * moqk_chunk_cols(FORM), staged = (until - from) * hand::BLOCKS;
        if (NORM) { /* it is there */
        } else if (count < 4) moqk_fast_stage<FORM, SPLIT, 1, 4>(a, first, count, cols, k0, staged, thread, threads, xs);
        else moqk_fast_stage<FORM, SPLIT, 8, 8>(a, first, count, cols, k0, staged, thread, threads, xs);
        __syncthreads();
        for (; live && c < until; c += cut.ways) {
            const uint8_t *now[NB], *next = src + (int64_t)(c + cut.ways) * moqk_chunk_bytes(FORM);
            int more = c + cut.ways < end;
#pragma unroll
            for (int n = 0; n < NB; n++) now[n] = x[n] + (uint32_t)(c - from) * hand::BLOCKS * step;
            float sum[NB][4]; /* products cut sums off instead of rounding them: short runs keep that below the error of x */
#pragma unroll
            for (int n = 0; n < NB; n++) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
#pragma unroll
            for (int b = 0; b < hand::BLOCKS; b++) { /* a unit's registers are filled again as soon as it is used */
                moqk_fast_block<FORM, STEP, NB>(h, b, now, flip, step, z, STEP == 0 ? sum : acc);
#pragma unroll
                for (int i = 0; i < 4 / hand::BLOCKS; i++)
                    if (more)
                        h.w[b * (4 / hand::BLOCKS) + i] = moqk_stream16(next + (b * (4 / hand::BLOCKS) + i) * 512 + moqk_fast_slot(FORM, lane) * 16, policy);
            }
            if (STEP == 0)
#pragma unroll
                for (int n = 0; n < NB; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) acc[n][i] += sum[n][i];
            if (more) moqk_fast_scales<FORM, STEP>(h, next, c + cut.ways, lane, scales, zeros, shift);
        }
    }

    /* Partial sums go to the block that owns the tile (tiles alternate), which adds them in the order of the columns' shares. */
    if (cut.blocks > 1) moqk_cluster_wait();
    {
        int32_t slot = blockIdx.x * cut.ways + way;
        uint32_t owner = cut.blocks > 1 ? local & 1 : 0;
#pragma unroll
        for (int n = 0; n < NB; n++) {
#pragma unroll
            for (int i = 0; i < 4; i += SPLIT ? 2 : 1) {
                int32_t m = SPLIT ? 4 * n + t : 8 * n + 2 * t + (i & 1);
                float v = SPLIT ? acc[n][i] + acc[n][i + 1] : acc[n][i];
                if (m < count) moqk_store_at(sums + (slot * cut.rows + m) * cut.tile_pitch + local * 16 + g + 8 * (i >> 1), v, cut.blocks, owner);
            }
        }
    }
    if (cut.blocks > 1) { moqk_cluster_arrive(0); moqk_cluster_wait(); }
    else __syncthreads();
    const float factor = p->factor * moqk_form_fix(FORM);
    for (int32_t i = thread; i < count * cut.tiles * 16; i += threads) {
        int32_t m = i / (cut.tiles * 16), r = i % (cut.tiles * 16), row = tile * cut.tiles * 16 + r;
        if (row >= rows || (cut.blocks > 1 && (uint32_t)(r >> 4 & 1) != blockIdx.x)) continue;
        float v = 0;
        for (int32_t s = 0; s < cut.blocks * cut.ways; s++) v += sums[(s * cut.rows + m) * cut.tile_pitch + r];
        if (STEP == 0 && FORM > MOQK_MXFP4) v *= ((const float *)(packed + scales_at))[((int64_t)(row >> 4) * 8 + (row & 7)) * 2 + (row >> 3 & 1)];
        moqk_store(a, (int64_t)(first + m) * a.ldy + y_first + row, v * factor + (p->bias ? p->bias[row] : 0));
    }
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-ring       1 to 16 rows of x on SM90: the products of >>cuda-decode, fed by the copy engine
   A block's last warp keeps a ring of steps full: a step is one chunk for every other warp, and with more than a few rows the x that belongs
   to it, which a small launch before wrote in the order of the products (moqk_split). Nothing in the loop waits for the whole block. The first
   steps of the ring are under way before the kernel before has ended. Bytes read per launch: codes and scales once, x once per block.
   ------------------------------------------------------------------------------------------------ */

/* How a launch is cut: a block takes `tiles` row tiles of a part, R of them a warp; `ways` warps share the columns chunk by chunk; `blocks` blocks
   of a cluster share the columns in runs of chunks. */
typedef struct moqk_ring {
    int32_t tiles, ways, blocks, stages;
    int32_t warps;             /* tiles / R * ways; one more fills the ring */
    int32_t owned, pitch;      /* row tiles that a block of the cluster adds up: tiles / blocks, rounded up; floats of a row of x in the sums */
    int32_t rows;              /* of x */
    int32_t whole_x;           /* the block stages its share of x itself, before it begins; else x comes with the steps, from: */
    int32_t ahead;             /* chunks of each row tile to fetch into L2 behind the ring, before x is there */
    const uint8_t *x;          /* what moqk_split wrote */
    uint32_t stage_bytes, x_at, sums_at; /* of shared memory; x_at: in a stage, or of the whole x */
    int32_t join;              /* sums lie where the ring was */
} moqk_ring;

__device__ __forceinline__ void moqk_barrier_init(uint32_t at, uint32_t count)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(at), "r"(count) : "memory");
#endif
}

__device__ __forceinline__ void moqk_barrier_wait(uint32_t at, uint32_t parity)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again; }" :: "r"(at), "r"(parity) : "memory");
#endif
}

__device__ __forceinline__ void moqk_barrier_arrive(uint32_t at)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(at) : "memory");
#endif
}

/* The lane's loads from shared memory are done, and a copy into the same place may be asked for when the warp has met behind this. Neither an arrival
   nor a copy waits for loads that are under way: beside queued products they took longer than the next copy, and got that one's weights. */
__device__ __forceinline__ void moqk_end_reads(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/* A warp has read its share of a stage that the copy engine fills. */
__device__ __forceinline__ void moqk_free_stage(uint32_t bar, int lane)
{
    moqk_end_reads();
    __syncwarp();
    if (lane == 0) moqk_barrier_arrive(bar);
}

__device__ __forceinline__ void moqk_barrier_expect(uint32_t at, uint32_t bytes)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(at), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ void moqk_bulk_copy(uint32_t to, const uint8_t *from, uint32_t bytes, uint32_t barrier)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
#endif
}

__device__ __forceinline__ void moqk_bulk_prefetch(const uint8_t *from, uint32_t bytes)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(from), "r"(bytes) : "memory");
#endif
}

/* x [rows, cols] -> blocks of 64 columns, each [columns of the product][128 bytes] as moqk_fast_put lays them; past the columns zeros. A thread
   per 4 values. */
template <int FORM, int SPLIT> __global__ void __launch_bounds__(256) moqk_split(moqk_call a, int32_t cols, int32_t blocks, uint8_t *out)
{
    int32_t i = blockIdx.x * 256 + threadIdx.x, m = blockIdx.y;
    float4 v = make_float4(0, 0, 0, 0);
    moqk_dependents_may_start();
    moqk_wait_for_before();
    if (i >= blocks * 16) return;
    if (4 * i < cols) v = moqk_fast_x4<SPLIT>(a, m * a.ldx + 4 * i);
    moqk_fast_put<FORM, SPLIT>(v, i, m, a.m * (SPLIT ? 2 : 1), out);
}

/* What the copies of a block need to know. */
typedef struct moqk_ring_source {
    const uint8_t *weights, *x; /* of the block's first tile and chunk; of its first chunk */
    int64_t tile_bytes;
    int32_t live, steps, chunks; /* tiles that exist, steps, chunks of the block */
    uint32_t chunk_x;          /* bytes of x of a chunk; 0: x does not come with the steps */
    uint32_t ring, full, empty; /* in shared memory */
} moqk_ring_source;

/* Weights (and later x) of step s into its place; the last step may have fewer chunks. */
template <int FORM> __device__ __forceinline__ void moqk_ring_weights(const moqk_ring &cut, const moqk_ring_source &f, int32_t s, int32_t slot, int lane)
{
    uint32_t ways = (uint32_t)min(cut.ways, f.chunks - s * cut.ways), bytes = ways * moqk_chunk_bytes(FORM), at = f.ring + (uint32_t)slot * cut.stage_bytes;
    if (lane == 0) moqk_barrier_expect(f.full + 8 * (uint32_t)slot, ways * f.chunk_x + bytes * (uint32_t)f.live);
    __syncwarp();
    if (lane < f.live) moqk_bulk_copy(at + (uint32_t)(lane * cut.ways) * moqk_chunk_bytes(FORM), f.weights + lane * f.tile_bytes + (int64_t)s * cut.ways * moqk_chunk_bytes(FORM), bytes, f.full + 8 * (uint32_t)slot);
}

__device__ __forceinline__ void moqk_ring_x(const moqk_ring &cut, const moqk_ring_source &f, int32_t s, int32_t slot, int lane)
{
    uint32_t ways = (uint32_t)min(cut.ways, f.chunks - s * cut.ways);
    if (lane == 31 && f.chunk_x) moqk_bulk_copy(f.ring + (uint32_t)slot * cut.stage_bytes + cut.x_at, f.x + (int64_t)s * cut.ways * f.chunk_x, ways * f.chunk_x, f.full + 8 * (uint32_t)slot);
}

/* The last warp: fills the ring as warps leave it. */
template <int FORM> __device__ __forceinline__ void moqk_ring_fill(const moqk_ring &cut, const moqk_ring_source &f, int lane)
{
    int32_t first = min(cut.stages, f.steps), more = min(cut.ahead, f.chunks - first * cut.ways);
    for (int32_t s = 0; s < first; s++) moqk_ring_weights<FORM>(cut, f, s, s, lane);
    if (lane < f.live && more > 0) moqk_bulk_prefetch(f.weights + lane * f.tile_bytes + (int64_t)first * cut.ways * moqk_chunk_bytes(FORM), (uint32_t)more * moqk_chunk_bytes(FORM));
    moqk_wait_for_before();
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async;" ::: "memory"); /* x was written by ordinary stores */
#endif
    for (int32_t s = 0; s < first; s++) moqk_ring_x(cut, f, s, s, lane);
    for (int32_t s = first, slot = 0, turn = 0; s < f.steps; s++) {
        moqk_barrier_wait(f.empty + 8 * (uint32_t)slot, (uint32_t)turn & 1);
        moqk_ring_weights<FORM>(cut, f, s, slot, lane);
        moqk_ring_x(cut, f, s, slot, lane);
        if (++slot == cut.stages) { slot = 0; turn++; }
    }
}

/* Scales of a lane's rows that multiply sums, for one chunk. */
template <int FORM, int STEP> struct moqk_factors {
    static constexpr int GROUPS = STEP == 0 ? 1 : moqk_chunk_cols(FORM) / STEP;
    float2 scale[GROUPS];
    uint32_t zero[FORM == MOQK_FAST_U4 ? GROUPS : 1];

    __device__ __forceinline__ void load(const float2 *scales, const uint16_t *zeros, int32_t c, int shift)
    {
        if constexpr (STEP > 0) {
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                int32_t group = (c * moqk_chunk_cols(FORM) + i * STEP) >> shift;
                scale[i] = __ldg(scales + group * 8);
                if (FORM == MOQK_FAST_U4) zero[i] = __ldg(zeros + group * 8);
            }
        }
    }
};

/* One chunk of R row tiles: acc += W x. w: the lane's first 16 bytes of each tile's chunk in shared memory; x: the chunk's, with the lane's
   place in each column. */
template <int FORM, int STEP, int NB, int R>
__device__ __forceinline__ void moqk_ring_chunk(const uint8_t *w, uint32_t tile_step, int lane, const moqk_factors<FORM, STEP> *h, const uint8_t *x, const uint32_t place[NB],
                                                const uint32_t other[NB], uint32_t x_step, const uint32_t z[R][2], float acc[R][NB][4])
{
    constexpr int BLOCKS = moqk_chunk_cols(FORM) / 64, UNITS = 4 / BLOCKS;
    constexpr int each = STEP == 32 ? 2 : 4; /* steps of a scale */
    uint2 bytes[R];
    float sum[R][NB][4]; /* products cut sums off instead of rounding them: short runs keep that below the error of x */
#pragma unroll
    for (int r = 0; r < R; r++) {
        if constexpr (FORM <= MOQK_MXFP4)
            bytes[r] = *(const uint2 *)(w + r * tile_step + 2048 - moqk_fast_slot(FORM, lane) * 16 + (FORM == MOQK_NVFP4 ? lane : lane >> 1) * 8);
    }
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        uint4 unit[R][UNITS];
        uint32_t s[R][2], zero[R][2];
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int u = 0; u < UNITS; u++) unit[r][u] = *(const uint4 *)(w + r * tile_step + (b * UNITS + u) * 512);
            if constexpr (FORM <= MOQK_MXFP4) {
                uint32_t v = b < 2 ? bytes[r].x : bytes[r].y;
                s[r][0] = moqk_scale_pair<FORM>(v, (b & 1) * 2);
                s[r][1] = moqk_scale_pair<FORM>(v, (b & 1) * 2 + 1);
            }
            zero[r][0] = z[r][0];
            zero[r][1] = z[r][1];
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 xb[NB];
#pragma unroll
            for (int n = 0; n < NB; n++) xb[n] = *(const uint4 *)(x + b * x_step + (half ? other[n] : place[n]));
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const int i = half * 2 + k, group = STEP == 32 ? b * 2 + half : STEP == 64 ? b : 0;
#pragma unroll
                for (int r = 0; r < R; r++) {
                    uint32_t a[4];
                    if (FORM == MOQK_FAST_U4 && STEP > 0 && i % each == 0) {
                        zero[r][0] = (h[r].zero[group] & 255) * 0x00010001u | 0x43004300u;
                        zero[r][1] = (h[r].zero[group] >> 8) * 0x00010001u | 0x43004300u;
                    }
                    moqk_fast_decode<FORM>(unit[r], i, zero[r], a);
                    if constexpr (FORM <= MOQK_MXFP4) {
#pragma unroll
                        for (int q = 0; q < 4; q++) a[q] = moqk_mul_pair(a[q], s[r][q & 1]);
                    }
#pragma unroll
                    for (int n = 0; n < NB; n++) {
                        if (STEP > 0 ? i % each == 0 : b == 0 && i == 0) sum[r][n][0] = sum[r][n][1] = sum[r][n][2] = sum[r][n][3] = 0;
                        moqk_product(sum[r][n], a, k ? xb[n].z : xb[n].x, k ? xb[n].w : xb[n].y);
                        if (STEP == 0 || i % each != each - 1) continue;
                        acc[r][n][0] += sum[r][n][0] * h[r].scale[group].x;
                        acc[r][n][1] += sum[r][n][1] * h[r].scale[group].x;
                        acc[r][n][2] += sum[r][n][2] * h[r].scale[group].y;
                        acc[r][n][3] += sum[r][n][3] * h[r].scale[group].y;
                    }
                }
            }
        }
    }
    if (STEP == 0)
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int n = 0; n < NB; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[r][n][i] += sum[r][n][i];
}

/* Partial sums of a warp's tiles to the block that owns each of them: tile i belongs to block i % blocks, as its tile i / blocks. */
template <int NB, int R>
__device__ __forceinline__ void moqk_ring_hand_over(const moqk_ring &cut, float *sums, int32_t slot, int32_t tile, int32_t count, int split, const float acc[R][NB][4], int lane)
{
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int r = 0; r < R; r++) {
        int32_t owner = cut.blocks > 1 ? (tile + r) % cut.blocks : 0, mine = cut.blocks > 1 ? (tile + r) / cut.blocks : tile + r;
#pragma unroll
        for (int n = 0; n < NB; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int32_t m = split ? 4 * n + t : 8 * n + 2 * t + (i & 1);
                float v = split ? acc[r][n][i & 2] + acc[r][n][i | 1] : acc[r][n][i];
                if (m < count && !(split && (i & 1))) moqk_store_at(sums + (slot * cut.rows + m) * cut.pitch + mine * 16 + g + 8 * (i >> 1), v, cut.blocks, (uint32_t)owner);
            }
    }
}

/* Grid: blocks of a cluster, groups of row tiles of all parts. Reads the weights once; deterministic. */
template <int FORM, int STEP, int NB, int R> __global__ void __launch_bounds__(512, R == 1 && NB == 1 && STEP == 0 ? 2 : 1) moqk_decode_ring(moqk_call a, moqk_ring cut)
{
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr int BLOCKS = moqk_chunk_cols(FORM) / 64;
    const moqk_part *p = a.parts;
    int32_t part = 0, y_first = 0, group = blockIdx.y, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int g = lane >> 2, t = lane & 3, split = !a.x_bf16;
    moqk_dependents_may_start();
    for (; part < a.part_count; part++, p++) {
        int32_t groups = (p->rows + 16 * cut.tiles - 1) / (16 * cut.tiles);
        if (group < groups) break;
        group -= groups;
        y_first += p->rows;
    }
    if (part == a.part_count || moqk_form_of(*p) != FORM || moqk_form_step(*p, FORM) != STEP) { moqk_wait_for_before(); return; } /* another launch has it */
    const int32_t rows = p->rows, cols = p->cols, count = a.m, columns = count * (split ? 2 : 1), chunks = (cols + moqk_chunk_cols(FORM) - 1) / moqk_chunk_cols(FORM);
    const int32_t share = (chunks + cut.blocks - 1) / cut.blocks, begin = min(share * (int32_t)blockIdx.x, chunks), tile_count = (rows + 15) / 16;
    const uint8_t *packed = p->packed[0];
    const int64_t scales_at = (int64_t)tile_count * chunks * moqk_chunk_bytes(FORM);
    moqk_ring_source f;
    f.tile_bytes = (int64_t)chunks * moqk_chunk_bytes(FORM);
    f.weights = packed + (int64_t)group * cut.tiles * f.tile_bytes + (int64_t)begin * moqk_chunk_bytes(FORM);
    f.live = min(cut.tiles, tile_count - group * cut.tiles);
    f.chunks = min(share, chunks - begin);
    f.steps = (f.chunks + cut.ways - 1) / cut.ways;
    f.chunk_x = cut.whole_x ? 0 : (uint32_t)(columns * 128 * BLOCKS);
    f.x = cut.x + (int64_t)begin * f.chunk_x;
    f.full = (uint32_t)__cvta_generic_to_shared(shared);
    f.empty = f.full + 8 * (uint32_t)cut.stages;
    f.ring = f.full + 128;
    if (threadIdx.x < cut.stages) {
        moqk_barrier_init(f.full + 8 * threadIdx.x, 1);
        moqk_barrier_init(f.empty + 8 * threadIdx.x, (uint32_t)cut.warps);
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
    __syncthreads();
    if (cut.blocks > 1) moqk_cluster_arrive(1);
    float *sums = (float *)(void *)(shared + cut.sums_at);
    const int32_t groups = cut.tiles / R, local = warp % groups * R, way = warp / groups;
    float acc[R][NB][4];
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int n = 0; n < NB; n++) acc[r][n][0] = acc[r][n][1] = acc[r][n][2] = acc[r][n][3] = 0;
    if (warp == cut.warps) moqk_ring_fill<FORM>(cut, f, lane);
    else {
        const int32_t scale_groups = FORM <= MOQK_MXFP4 ? 0 : p->group >= cols ? 1 : (chunks * moqk_chunk_cols(FORM) + p->group - 1) / p->group;
        const int32_t tile = min(group * cut.tiles + local, tile_count - 1);
        const int64_t at = (int64_t)tile * scale_groups * 8 + g;
        const float2 *scales = (const float2 *)(packed + scales_at) + at;
        const uint16_t *zeros = (const uint16_t *)(packed + scales_at + (int64_t)tile_count * scale_groups * 64) + at;
        const int shift = STEP > 0 ? __ffs(p->group) - 1 : 0, live = local < f.live;
        uint32_t z[R][2], place[NB], other[NB];
        moqk_factors<FORM, STEP> h[R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            z[r][0] = z[r][1] = 0;
            if ((FORM == MOQK_FAST_U4 || FORM == MOQK_FAST_U8) && STEP == 0 && local + r < f.live) {
                uint32_t both = zeros[r * 8];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float zero = (float)(both >> (8 * i) & 255) + (FORM == MOQK_FAST_U4 ? 128.0f : -128.0f);
                    z[r][i] = moqk_pack(zero, zero);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < NB; n++) {
            int col = 8 * n + g < columns ? 8 * n + g : 0; /* columns that nobody stores repeat another */
            place[n] = (uint32_t)(col * 128 + t * 16 + (col & 1) * 64);
            other[n] = (uint32_t)(col * 128 + t * 16 + 64 - (col & 1) * 64);
        }
        if (way < f.chunks) h[0].load(scales, zeros, begin + way, shift);
        if (cut.whole_x) {
            moqk_wait_for_before();
            if (split) moqk_fast_stage<FORM, 1, 1, 4>(a, 0, count, cols, begin * moqk_chunk_cols(FORM), f.chunks * BLOCKS, (int32_t)threadIdx.x, cut.warps * 32, shared + cut.x_at);
            else moqk_fast_stage<FORM, 0, 1, 4>(a, 0, count, cols, begin * moqk_chunk_cols(FORM), f.chunks * BLOCKS, (int32_t)threadIdx.x, cut.warps * 32, shared + cut.x_at);
            asm volatile("bar.sync 1, %0;" :: "r"(cut.warps * 32) : "memory");
        }
        const uint8_t *x = shared + cut.x_at + (cut.whole_x ? 0u : 128u);
        const uint8_t *w = shared + 128 + (local * cut.ways + way) * moqk_chunk_bytes(FORM) + moqk_fast_slot(FORM, lane) * 16;
        const uint32_t x_step = (uint32_t)columns * 128, tile_step = (uint32_t)cut.ways * moqk_chunk_bytes(FORM);
        for (int32_t s = 0, slot = 0, turn = 0; s < f.steps; s++) {
            const int32_t c = s * cut.ways + way;
            moqk_barrier_wait(f.full + 8 * (uint32_t)slot, (uint32_t)turn & 1);
            if (live && c < f.chunks) {
                const uint8_t *now = x + (cut.whole_x ? (uint32_t)c * BLOCKS * x_step : (uint32_t)slot * cut.stage_bytes + (uint32_t)way * BLOCKS * x_step);
                moqk_ring_chunk<FORM, STEP, NB, R>(w + (uint32_t)slot * cut.stage_bytes, tile_step, lane, h, now, place, other, x_step, z, acc);
                if (STEP > 0 && c + cut.ways < f.chunks) h[0].load(scales, zeros, begin + c + cut.ways, shift);
            }
            moqk_free_stage(f.empty + 8 * (uint32_t)slot, lane);
            if (++slot == cut.stages) { slot = 0; turn++; }
        }
    }

    __syncwarp();
    moqk_wait_for_before(); /* long since true: what follows may read y */
    if (cut.blocks > 1) {
        moqk_cluster_wait();
        if (cut.join) { moqk_cluster_arrive(0); moqk_cluster_wait(); }
    } else if (cut.join) __syncthreads();
    if (warp < cut.warps) moqk_ring_hand_over<NB, R>(cut, sums, (int32_t)blockIdx.x * cut.ways + way, local, count, split, acc, lane);
    if (cut.blocks > 1) { moqk_cluster_arrive(0); moqk_cluster_wait(); }
    else __syncthreads();
    const float factor = p->factor * moqk_form_fix(FORM);
    for (int32_t i = (int32_t)threadIdx.x; i < count * cut.owned * 16; i += (int32_t)blockDim.x) {
        int32_t m = i / (cut.owned * 16), r = i % (cut.owned * 16), mine = (r >> 4) * cut.blocks + (int32_t)blockIdx.x, row = (group * cut.tiles + mine) * 16 + (r & 15);
        if (mine >= cut.tiles || row >= rows) continue;
        float v = 0;
        for (int32_t s = 0; s < cut.blocks * cut.ways; s++) v += sums[(s * cut.rows + m) * cut.pitch + r];
        if (STEP == 0 && FORM > MOQK_MXFP4) v *= ((const float *)(packed + scales_at))[((int64_t)(row >> 4) * 8 + (row & 7)) * 2 + (row >> 3 & 1)];
        moqk_store(a, (int64_t)m * a.ldy + y_first + row, v * factor + (p->bias ? p->bias[row] : 0));
    }
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-runs       1 to 16 rows of x, 4-bit weights: every warp streams a run of chunks of its own
   A block keeps its share of x whole in shared memory (moqk_decode_wide: two chunks at a time) and room for a chunk or two of each warp, on SM90 filled
   by the copy engine: while a warp multiplies a chunk out of its registers, the next is under way. The first ones are under way before the kernel before
   has ended, and the kernel after may start when the last ones of a warp of each block are. Nothing in the loop waits for another warp. The warps of a
   block and the blocks of a cluster share the columns; the sums of all runs meet in the block that owns the rows, which adds them in the order of the
   columns. Bytes read per launch: codes and scales once, x once per block, or per two that share it.
   Before SM90 a warp's lanes copy its next chunk, launches do not overlap, there are no clusters, and BF16 x that does not fit comes to two places of
   each way, in turn. From compute capability 10.0 on it is as on SM90 without clusters; nobody has run it on such a device.
   ------------------------------------------------------------------------------------------------ */

/* A part of a launch, as its parameters have it. */
typedef struct moqk_run_part {
    const uint8_t *packed;
    const float *bias;         /* [rows] or NULL */
    int32_t rows, y_first;     /* y_first: of the part in a row of y */
    int32_t end;               /* groups of row tiles of the parts up to this one */
    int32_t groups, shift;     /* groups of columns that have a scale; log2 of their columns. See moqk_fast_of */
    float factor;
} moqk_run_part;

/* What a kernel of this section can do beside its product; each costs registers, which the loop of INT4 has none of. JOINED: pairs, `into` and `mid` of
   moqk_run, and a warp has one stage. ROW: these, of one row, with the least code: in a step of one token most of a launch but its loop is code that runs
   once. NORM: likewise, and x is the norm of the call's x. */
enum { MOQK_RUN_PLAIN, MOQK_RUN_JOINED, MOQK_RUN_ROW, MOQK_RUN_NORM };
enum { MOQK_RUN_PARTS = 4, MOQK_RUN_PHASES = 4 };

/* Warps of a block at most. Kernels of MOQK_RUN_FEW have registers to spare; those of MOQK_RUN_ALL read x all at once. */
enum { MOQK_RUN_ALL = 32, MOQK_RUN_MOST = 28, MOQK_RUN_FEW = 16 };

/* How a launch is cut. Threads: 32, tiles, ways. A block takes `tiles` row tiles of a part, one a warp; its ways x the blocks of a cluster share
   the columns in runs of chunks. */
typedef struct moqk_run {
    int32_t tiles, ways, blocks, stages;
    int32_t tiles_own, own;    /* row tiles and rows that a block of the cluster adds up */
    uint32_t own_magic;        /* 2^32 / own, rounded up */
    int32_t pairs;             /* 1: row tiles of parts 0 and 1, which have equal rows, in turn */
    int32_t chunks, each, more; /* of a row tile; a run has `each`, the first `more` runs one more */
    int32_t rows, columns;     /* of x; of the products: rows, or twice as many where x is F32 */
    int32_t cols;              /* of a row of x */
    int32_t bulk;              /* x comes by the copy engine, as it is */
    int32_t share;             /* 1: two neighbouring blocks form a cluster, each fetches every second row of x for both; blocks is 1, x comes in bulk */
    int32_t phase;             /* chunks of a run whose x arrives together */
    uint32_t bars_at, sums_at, x_at, x_pitch; /* of shared memory; bytes of a row of x */
    int32_t pitch;             /* floats of a row of x in the sums */
    /* What the calls before and after a product do in the same launch: see >>cuda-together */
    moqk_own_norm norm;        /* MOQK_RUN_NORM */
    void *into;                /* [rows of x, ldy]: y is added to it; or NULL */
    moq_activation_desc activation;
    void *mid;                 /* [rows of x, rows of a part]: the activation of parts 0 and 1, which are in pairs; or NULL */
    int32_t parts;
    moqk_run_part part[MOQK_RUN_PARTS];
    int32_t eager;             /* warps that ask for weights before x is there; those of the others would stand in its way */
    int32_t wide;              /* 1: moqk_decode_wide */
    uint32_t tiles_magic;      /* 2^16 / warps of a way, rounded up */
    int32_t ahead;             /* phases of x that are asked for at once; each later one when one is begun. 0: MOQK_RUN_ALL */
    int32_t copies;            /* before SM90: bytes of factors behind a chunk in shared memory */
    uint32_t place;            /* before SM90: bytes of a way's place for a phase of a BF16 x, of which there are two; 0: x lies there whole */
} moqk_run;

/* A copy of weights. The number is what moqk_pass_once gives, which would be worked out anew at each copy. */
__device__ __forceinline__ void moqk_bulk_stream(uint32_t to, const uint8_t *from, uint32_t bytes, uint32_t barrier)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(0x12f0000000000000ull) : "memory");
#endif
}

/* The same for x, into both blocks of a cluster: each finds it at the same place, and its own barrier counts it. Without the instructions of 9.0
   alone (sm_90, PTX) it is two copies: ptxas warns of `multicast` there. */
__device__ __forceinline__ void moqk_bulk_both(uint32_t to, const uint8_t *from, uint32_t bytes, uint32_t barrier)
{
#if __CUDA_ARCH__ >= 900 && !MOQK_WGMMA
    for (uint32_t rank = 0; rank < 2; rank++) {
        uint32_t there, count;
        asm volatile("mapa.shared::cluster.u32 %0, %2, %3; mapa.shared::cluster.u32 %1, %4, %3;" : "=r"(there), "=r"(count) : "r"(to), "r"(rank), "r"(barrier));
        moqk_bulk_stream(there, from, bytes, count);
    }
#elif __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(barrier), "h"((uint16_t)3) : "memory");
#endif
}

/* Four values into the shared memory of block `rank` of the cluster, where the barrier counts the bytes: a fence of the cluster would wait for all
   that is under way. */
__device__ __forceinline__ void moqk_run_give(uint32_t to, const float *v, uint32_t barrier, uint32_t rank)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .u32 p, q; mapa.shared::cluster.u32 p, %0, %6; mapa.shared::cluster.u32 q, %5, %6;"
                 " st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [p], {%1, %2, %3, %4}, [q]; }"
                 :: "r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier), "r"(rank) : "memory");
#endif
}

/* One thread of a warp whose threads are all here. */
__device__ __forceinline__ int moqk_elected()
{
    uint32_t one = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(one));
#endif
    return (int)one;
}

__device__ __forceinline__ uint4 moqk_shared16(uint32_t at)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}

__device__ __forceinline__ uint2 moqk_shared8(uint32_t at)
{
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
    return v;
}

__device__ __forceinline__ uint32_t moqk_fma_pair(uint32_t a, uint32_t b, uint32_t c)
{
    __nv_bfloat162 v = __hfma2(*(const __nv_bfloat162 *)&a, *(const __nv_bfloat162 *)&b, *(const __nv_bfloat162 *)&c);
    return *(const uint32_t *)&v;
}

/* Integers of 4 bits come out of the words as BF16 below the smallest normal ones, where the lowest 8 bits count in steps of 2^-133: codes at bit 0
   or 4, times 2^127 or 2^123, are n * 2^-6. zero: -zero point * 2^-6, of each row. */
enum { MOQK_RUN_LOW = 0x7f007f00, MOQK_RUN_HIGH = 0x7d007d00 };

__device__ __forceinline__ uint32_t moqk_run_zero(uint32_t zero) { return moqk_mul_pair(zero * 0x00010001u, 0xff00ff00u); }

/* Columns 2 * half and 2 * half + 1 of a word, of rows g and g + 8. */
template <int FORM> __device__ __forceinline__ void moqk_run_pair(uint32_t v, int half, const uint32_t s[2], uint32_t *a)
{
    if (FORM == MOQK_FAST_U4) {
        if (half) v >>= 8;
        a[0] = moqk_fma_pair(v & 0x000f000fu, MOQK_RUN_LOW, s[0]);
        a[1] = moqk_fma_pair(v & 0x00f000f0u, MOQK_RUN_HIGH, s[1]);
        return;
    }
    a[0] = moqk_mul_pair(half ? moqk_third_pair(v) : v & 0x81c081c0u, s[0]);
    a[1] = moqk_mul_pair(half ? (v >> 3 & 0x01c001c0u) | (v << 2 & 0x80008000u) : v << 3 & 0x81c081c0u, s[1]);
}

/* Scales and zero points of integers: lane t of four holds those of groups t and t + 4 of a chunk, for its two rows. */
template <int FORM, int STEP> struct moqk_run_factors {
    static constexpr int EACH = STEP == 32 ? 2 : 1;
    float2 scale[EACH];
    uint32_t zero[EACH];

    __device__ __forceinline__ void load(const float2 *scales, const uint16_t *zeros, int32_t c, int shift)
    {
        if constexpr (STEP > 0) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int32_t group = (c * 256 + (i * 4 + ((int32_t)threadIdx.x & 3)) * STEP) >> shift;
                scale[i] = __ldg(scales + group * 8);
                zero[i] = __ldg(zeros + group * 8);
            }
        }
    }
    __device__ __forceinline__ void ask(const float2 *scales, const uint16_t *zeros, int32_t c, int shift) const /* for what load will want, in L2 */
    {
        if constexpr (STEP > 0) {
            const int32_t group = (c * 256 + ((int32_t)threadIdx.x & 3) * STEP) >> shift;
            asm volatile("prefetch.global.L2 [%0];" :: "l"(scales + group * 8));
            asm volatile("prefetch.global.L2 [%0];" :: "l"(zeros + group * 8));
        }
    }
    /* Before SM90 they come into the lane's own places behind a chunk's codes, [EACH] of 8 bytes x 32 lanes and of 4 x 32. */
    static constexpr uint32_t COPIES = STEP > 0 ? EACH * 384 : 0;
    __device__ __forceinline__ void take(uint32_t at)
    {
#pragma unroll
        for (int i = 0; i < (STEP > 0 ? EACH : 0); i++) {
            const uint2 v = moqk_shared8(at + (i * 32 + threadIdx.x) * 8);
            scale[i] = make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
            asm volatile("ld.shared.u16 %0, [%1];" : "=r"(zero[i]) : "r"(at + EACH * 256 + (i * 32 + threadIdx.x) * 4 + (threadIdx.x >> 1 & 2)));
        }
    }
    __device__ __forceinline__ float2 group(int i, uint32_t z[2]) const
    {
        const uint32_t both = __shfl_sync(0xffffffffu, zero[i >> 2], i & 3, 4);
        z[0] = moqk_run_zero(both & 255);
        z[1] = moqk_run_zero(both >> 8);
        return make_float2(__shfl_sync(0xffffffffu, scale[i >> 2].x, i & 3, 4), __shfl_sync(0xffffffffu, scale[i >> 2].y, i & 3, 4));
    }
};

/* A warp's next chunk before SM90, where no copy engine is: each lane copies 16 bytes at a time, and its own factors. More than a chunk of a warp on its
   way delays x there. Addresses are made while the chunk before is on its way: what stands between a chunk and the request for the next delays all behind. */
template <int FORM, int STEP> struct moqk_run_copies {
    static constexpr uint32_t BYTES = moqk_chunk_bytes(FORM);
    static constexpr int EACH = STEP == 0 ? 0 : moqk_run_factors<FORM, STEP>::EACH;
    const uint8_t *src;        /* the lane's codes of the next chunk */
    const uint8_t *scales, *zeros; /* those of group 0; zeros of two rows */
    const uint8_t *scale[2], *zero[2]; /* of the next chunk */
    uint32_t to, scale_to, zero_to;
    int32_t col, shift;        /* the lane's first column of the next chunk */

    __device__ __forceinline__ void open(const uint8_t *first, uint32_t at, const float2 *s, const uint16_t *z, int32_t c, int32_t group_shift)
    {
        const uint32_t lane = threadIdx.x;
        src = first + lane * 16;
        to = at + lane * 16;
        if (STEP == 0) return;
        scales = (const uint8_t *)s;
        zeros = (const uint8_t *)((uintptr_t)z & ~(uintptr_t)3);
        scale_to = at + BYTES + lane * 8;
        zero_to = at + BYTES + EACH * 256 + lane * 4;
        col = c * 256 + (int32_t)(lane & 3) * STEP;
        shift = group_shift;
    }
    __device__ __forceinline__ void aim()
    {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int32_t group = (col + i * 4 * STEP) >> shift;
            scale[i] = scales + (int64_t)group * 64;
            zero[i] = zeros + (int64_t)group * 16;
            asm volatile("" : "+l"(scale[i]), "+l"(zero[i])); /* here, not where they are used */
        }
    }
    __device__ __forceinline__ void copy()
    {
        const uint32_t lane = threadIdx.x;
#pragma unroll
        for (uint32_t i = 0; i < BYTES; i += 512)
            if (i + 512 <= BYTES || lane < (BYTES - i) / 16)
                asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" :: "r"(to + i), "l"(src + i) : "memory");
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(scale_to + i * 256), "l"(scale[i]) : "memory");
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(zero_to + i * 128), "l"(zero[i]) : "memory");
        }
    }
    __device__ __forceinline__ void step()
    {
        src += BYTES;
        col += 256;
    }
};

/* Asks for the first `count` chunks of a run, a lane each. */
template <int FORM> __device__ __forceinline__ void moqk_run_ask(const uint8_t *src, uint32_t ring, uint32_t bar, int32_t count)
{
    constexpr uint32_t BYTES = moqk_chunk_bytes(FORM);
    const int32_t lane = threadIdx.x;
    if (lane >= count) return;
    moqk_barrier_expect(bar + 8 * (uint32_t)lane, BYTES);
    moqk_bulk_stream(ring + (uint32_t)lane * BYTES, src + lane * BYTES, BYTES, bar + 8 * (uint32_t)lane);
}

/* A warp's row tile: its part, the tiles of that, the block's first one there, its own. */
typedef struct moqk_run_tile { int32_t part, count, first, tile; } moqk_run_tile;

/* pairs: as in moqk_run; local: which of the block's. */
__device__ __forceinline__ moqk_run_tile moqk_run_locate(const moqk_run &cut, int pairs, int32_t local)
{
    int32_t part = pairs ? local & 1 : 0, group = blockIdx.y;
    while (part + 1 < cut.parts && group >= cut.part[part].end) part++;
    if (part > 0 && !pairs) group -= cut.part[part - 1].end;
    const int32_t count = (cut.part[part].rows + 15) >> 4, first = group * (cut.tiles >> pairs);
    return {part, count, first, min(first + (local >> pairs), count - 1)}; /* one that is not there repeats the last */
}

/* First chunk of a run. */
__device__ __forceinline__ int32_t moqk_run_first(const moqk_run &u, int32_t slot) { return slot * u.each + min(slot, u.more); }

__device__ __forceinline__ void moqk_put_shared8(uint32_t at, uint32_t a, uint32_t b)
{
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" :: "r"(at), "r"(a), "r"(b) : "memory");
}

/* Four values of x (F32, or BF16 widened) into shared memory as one or two columns of the products. */
template <int SPLIT> __device__ __forceinline__ void moqk_run_put(float4 v, uint32_t at, uint32_t pitch)
{
    const uint32_t a = moqk_pack(v.x, v.y), b = moqk_pack(v.z, v.w);
    moqk_put_shared8(at, a, b);
    if (!SPLIT) return;
    v.x -= __uint_as_float(a << 16);
    v.y -= __uint_as_float(a & 0xffff0000u);
    v.z -= __uint_as_float(b << 16);
    v.w -= __uint_as_float(b & 0xffff0000u);
    moqk_put_shared8(at + pitch, moqk_pack(v.x, v.y), moqk_pack(v.z, v.w));
}

/* x of a run by ordinary loads: columns [k0, k0 + 4 * quads) of all rows, zeros behind the last column; a thread has U loads of MU rows in flight.
   ROW: there is one row. ask: called once, behind the thread's first loads. */
template <int SPLIT, int MU, int U, int ROW, class ASK>
__device__ __forceinline__ void moqk_run_stage(const moqk_call &a, const moqk_run &u, int32_t k0, int32_t quads, int32_t thread, int32_t threads,
                                               uint32_t to, const ASK &ask)
{
    if (thread >= quads) ask();
    for (int32_t m0 = 0; m0 < (ROW ? 1 : u.rows); m0 += MU)
        for (int32_t i0 = thread; i0 < quads; i0 += threads * (U / MU)) {
            float4 v[U];
#pragma unroll
            for (int k = 0; k < U; k++) {
                const int32_t m = m0 + k % MU, i = i0 + k / MU * threads, col = k0 + 4 * i;
                v[k] = make_float4(0, 0, 0, 0);
                if (m < (ROW ? 1 : u.rows) && i < quads && col < u.cols) v[k] = moqk_fast_x4<SPLIT>(a, m * a.ldx + col);
            }
            if (m0 == 0 && i0 == thread) ask();
#pragma unroll
            for (int k = 0; k < U; k++) {
                const int32_t m = m0 + k % MU, i = i0 + k / MU * threads;
                if (m < (ROW ? 1 : u.rows) && i < quads) moqk_run_put<SPLIT>(v[k], to + (uint32_t)(SPLIT ? 2 * m : m) * u.x_pitch + (uint32_t)i * 8, u.x_pitch);
            }
        }
}

/* One chunk of a row tile: acc += W x. w: the lane's codes, of 64 columns each; x: in shared memory, the lane's 16 columns in its row of each
   product's x (4-bit floats), or the row that it names for moqk_load_matrices. A product takes neighbouring registers of one read of x, and so of 4-bit
   floats half a word and half of the next one: with all of a word, x would have to be moved. */
template <int FORM, int STEP, int NB, int LATE>
__device__ __forceinline__ void moqk_run_chunk(const uint4 (&w)[4], uint2 bytes, const moqk_run_factors<FORM, STEP> &h, const uint32_t (&x)[NB],
                                               const uint32_t (&z)[2], float (&acc)[NB][4])
{
    float sum[NB][4];          /* products cut sums off instead of rounding them: short runs keep that below the error of x */
    float2 f = make_float2(1, 1);
    uint32_t s[2] = {z[0], z[1]}; /* what moqk_run_pair takes */
#pragma unroll
    for (int b = 0; b < 4; b++) {
        if constexpr (FORM <= MOQK_MXFP4 && LATE) {
            const uint32_t both = moqk_scale_both<FORM>(b < 2 ? bytes.x : bytes.y, b & 1);
            s[0] = moqk_low_twice(both);
            s[1] = moqk_high_twice(both);
        } else if constexpr (FORM <= MOQK_MXFP4) {
            s[0] = moqk_scale_pair<FORM>(b < 2 ? bytes.x : bytes.y, (b & 1) * 2);
            s[1] = moqk_scale_pair<FORM>(b < 2 ? bytes.x : bytes.y, (b & 1) * 2 + 1);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int first = STEP == 0 ? b == 0 && half == 0 : STEP == 32 || half == 0;
            uint32_t v[NB][4];
#pragma unroll
            for (int n = 0; n < NB; n++) {
                if constexpr (FORM == MOQK_FAST_U4)
                    moqk_load_matrices(x[n] + b * 128 + half * 64, v[n]);
                else {
                    const uint4 q = moqk_shared16(x[n] + b * 128 + half * 16);
                    for (int i = 0; i < 4; i++) v[n][i] = moqk_word_of(q, i);
                }
            }
            if (STEP > 0 && first) f = h.group(STEP == 32 ? b * 2 + half : b, s);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t word = moqk_word_of(w[b], FORM == MOQK_FAST_U4 ? half * 2 + i : i * 2);
                uint32_t d[4];
                moqk_run_pair<FORM>(word, FORM == MOQK_FAST_U4 ? 0 : half, s, d);
                moqk_run_pair<FORM>(FORM == MOQK_FAST_U4 ? word : moqk_word_of(w[b], i * 2 + 1), FORM == MOQK_FAST_U4 ? 1 : half, s, d + 2);
#pragma unroll
                for (int n = 0; n < NB; n++) {
                    float (&to)[4] = sum[n];
                    if (first && i == 0) to[0] = to[1] = to[2] = to[3] = 0;
                    moqk_product(to, d, v[n][i * 2], v[n][i * 2 + 1]);
                }
            }
            const int last = STEP == 0 ? b == 3 && half == 1 : STEP == 32 || half == 1;
#pragma unroll
            for (int n = 0; n < NB; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (last) acc[n][i] += STEP == 0 ? sum[n][i] : sum[n][i] * (i < 2 ? f.x : f.y);
            if (MOQK_SM80 && STEP == 64 && (LATE || last)) __syncwarp(); /* else ptxas moves the reads of x together: no registers */
        }
    }
}

/* Before SM90: chunks [from, from + phase) of a way's BF16 x, those that there are, into one of its two places. The warps of the way share the rows. */
__device__ __forceinline__ void moqk_run_place(const moqk_call &a, const moqk_run &cut, int32_t c0, int32_t n, int32_t from, uint32_t to)
{
    const int32_t count = min(n - from, cut.phase), lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
#pragma unroll 1
    for (int32_t row = warp; row < cut.rows; row += warps)
#pragma unroll 1
        for (int32_t k = 0; k < count; k++) {
            const int32_t col = (c0 + from + k) * 256 + lane * 8, bytes = max(0, min(16, (cut.cols - col) * 2));
            const uint8_t *src = (const uint8_t *)a.x + (row * a.ldx + (bytes > 0 ? col : 0)) * 2;
            const uint32_t at = to + (uint32_t)row * cut.x_pitch + (uint32_t)k * 512 + (uint32_t)lane * 16;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(at), "l"(src), "r"(bytes) : "memory");
        }
}

/* Asks for the warp's rows of phase `at` of its way's x. */
__device__ __forceinline__ void moqk_run_phase(const moqk_call &a, const moqk_run &cut, int32_t c0, int32_t n, uint32_t mine, uint32_t x_bar, int32_t at)
{
    const int32_t from = at * cut.phase, row = ((int32_t)(threadIdx.y + threadIdx.x * blockDim.y) << cut.share) + ((int32_t)blockIdx.y & cut.share);
    if (from >= n || row >= cut.rows) return;
    const uint8_t *x = (const uint8_t *)a.x + (row * a.ldx + (int64_t)(c0 + from) * 256) * 2;
    const uint32_t to = mine + (uint32_t)row * cut.x_pitch + (uint32_t)from * 512, bytes = (uint32_t)min(n - from, cut.phase) * 512;
    if (cut.share) moqk_bulk_both(to, x, bytes, x_bar + 8 * (uint32_t)at);
    else moqk_bulk_copy(to, x, bytes, x_bar + 8 * (uint32_t)at);
}

/* x of a warp's way, when it is there: by the copy engine (its barriers know how much will come), or by the warps of the way. The pairs of row and
   phase are shared among these warps, because a warp issues its copies one after another. LATE: all of it at once would stand between the first
   weights and the next, so only the first phases are asked for. ROW: one row, by ordinary loads always. ask: called when x is
   under way. */
template <int LATE, int ROW, class ASK>
__device__ __forceinline__ void moqk_run_x(const moqk_call &a, const moqk_run &cut, int32_t c0, int32_t n, uint32_t mine, uint32_t x_bar, const ASK &ask)
{
    const int32_t lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
    if (MOQK_SM80 && LATE && cut.place) {
        ask();
        moqk_run_place(a, cut, c0, n, 0, mine);
        return;
    }
    if (ROW || !cut.bulk) {
        const int32_t k0 = c0 * 256, quads = n * 64, thread = warp * 32 + lane, threads = warps * 32;
        moqk_wait_for_before();
        if (MOQK_SM80 && !ROW && a.x_bf16 && cut.rows < 4) moqk_run_stage<0, 1, 4, 0>(a, cut, k0, quads, thread, threads, mine, ask);
        else if (a.x_bf16) moqk_run_stage<0, ROW ? 1 : 4, ROW ? 4 : 8, ROW>(a, cut, k0, quads, thread, threads, mine, ask);
        else if (ROW || cut.rows < 4) moqk_run_stage<1, 1, 4, ROW>(a, cut, k0, quads, thread, threads, mine, ask);
        else moqk_run_stage<1, 4, 8, 0>(a, cut, k0, quads, thread, threads, mine, ask);
        return;
    }
#if __CUDA_ARCH__ >= 900
    const int32_t phases = (n + cut.phase - 1) / cut.phase, odd = (int32_t)blockIdx.y & cut.share, rows = (cut.rows - odd + cut.share) >> cut.share;
    int32_t pair = warp + lane * warps, at = pair / rows, i = pair - at * rows;
    if (warp == 0 && lane < phases)
        moqk_barrier_expect(x_bar + 8 * (uint32_t)lane, (uint32_t)cut.rows * (uint32_t)min(n - lane * cut.phase, cut.phase) * 512);
    if (cut.share) { /* the other block's barriers are there */
        moqk_cluster_arrive(LATE);
        moqk_cluster_wait();
    } else __syncthreads();
    moqk_wait_for_before();
    asm volatile("fence.proxy.async;" ::: "memory"); /* x was written by ordinary stores */
    if constexpr (LATE) {
        for (int32_t first = 0; first < cut.ahead; first++) moqk_run_phase(a, cut, c0, n, mine, x_bar, first);
    } else for (; at < phases; pair += 32 * warps, at = pair / rows, i = pair - at * rows) {
        const int32_t from = at * cut.phase, row = (i << cut.share) + odd;
        const uint8_t *x = (const uint8_t *)a.x + (row * a.ldx + (int64_t)(c0 + from) * 256) * 2;
        const uint32_t to = mine + (uint32_t)row * cut.x_pitch + (uint32_t)from * 512, bytes = (uint32_t)min(n - from, cut.phase) * 512;
        if (cut.share) moqk_bulk_both(to, x, bytes, x_bar + 8 * (uint32_t)at);
        else moqk_bulk_copy(to, x, bytes, x_bar + 8 * (uint32_t)at);
    }
    ask();
#endif
}

/* A warp's run: acc += its chunks times x. src: the first chunk that is not under way; h: the factors of the first chunk. ONE: a warp has one stage, so
   that nothing but the parity of its barrier moves. ROW: x is all there. */
template <int FORM, int STEP, int NB, int LATE, int ONE, int ROW>
__device__ __forceinline__ void moqk_run_chunks(const moqk_call &a, const moqk_run &cut, int32_t c0, int32_t n, const uint8_t *src, uint32_t ring, uint32_t bar,
                                                uint32_t x_bar, uint32_t mine, const float2 *scales, const uint16_t *zeros, int shift,
                                                const uint32_t (&z)[1][2], moqk_run_factors<FORM, STEP> (&h)[1], float (&acc)[1][NB][4])
{
    constexpr uint32_t BYTES = moqk_chunk_bytes(FORM);
    const int lane = threadIdx.x, g = lane >> 2, t = lane & 3;
    uint32_t x[NB], at = ring, full = bar, parity = 0;
    int32_t s = cut.stages;
#pragma unroll
    for (int b = 0; b < NB; b++) { /* columns that nobody stores repeat another */
        const int32_t row = 8 * b + (FORM <= MOQK_MXFP4 ? g : lane & 7);
        x[b] = mine + (uint32_t)(row < cut.columns ? row : 0) * cut.x_pitch + (uint32_t)(FORM <= MOQK_MXFP4 ? t * 32 : (lane >> 3) * 16);
        acc[0][b][0] = acc[0][b][1] = acc[0][b][2] = acc[0][b][3] = 0;
    }
    if (ONE) asm volatile("" : "+r"(at), "+r"(full)); /* or they are worked out anew in the loop */
#if MOQK_SM80
    uint32_t jump = cut.place; /* to the other place */
    moqk_run_copies<FORM, STEP> next;
    next.open(src, at, scales, zeros, c0 + 1, shift);
    for (int32_t c = 0, turn = cut.place ? 0 : n; c < n;) {
#else
    const uint32_t first_x_bar = x_bar;
    for (int32_t c = 0, ahead = cut.ahead, turn = cut.bulk ? 0 : n; c < n;) {
#endif
        const int32_t until = LATE || ROW || MOQK_SM80 ? n : min(n, c + cut.phase);
        if (!MOQK_SM80 && !LATE && !ROW && cut.bulk) moqk_barrier_wait(x_bar, 0); /* x of these chunks */
        if (!LATE) x_bar += 8;
#pragma unroll 1
        for (; c < until; c++) {
            uint4 w[1][4];
            uint2 bytes[1] = {make_uint2(0, 0)};
#if MOQK_SM80
            next.aim();
            asm volatile("cp.async.wait_all;" ::: "memory");
            __syncwarp();
#else
            moqk_barrier_wait(full, ONE ? (uint32_t)c & 1 : parity);
#endif
            if (FORM == MOQK_NVFP4) bytes[0] = moqk_shared8(at + 2048 + (uint32_t)lane * 8);
            if (FORM == MOQK_MXFP4) bytes[0] = moqk_shared8(at + 2048 + (uint32_t)(lane >> 1) * 8);
#pragma unroll
            for (int i = 0; i < 4; i++) w[0][i] = moqk_shared16(at + i * 512 + (uint32_t)moqk_fast_slot(FORM, lane) * 16);
#if MOQK_SM80
            h[0].take(at + BYTES);
            __syncwarp();
            if (c + 1 < n) next.copy();
            next.step();
#else
            moqk_run_factors<FORM, STEP> next;
            next.load(scales, zeros, min(c0 + c + 1, c0 + n - 1), shift); /* a chunk ahead */
            moqk_end_reads();
            __syncwarp();
            if (c + (ONE ? 1 : cut.stages) >= n) moqk_dependents_may_start(); /* all of this warp's weights are under way */
            else if (moqk_elected()) {
                moqk_barrier_expect(full, BYTES);
                moqk_bulk_stream(at, src, BYTES, full);
            }
            src += BYTES;
#endif
#if MOQK_SM80
            if (LATE && c == turn) { /* this phase of x is there for the whole way, which is done with the one before */
                asm volatile("bar.sync %0, %1;" :: "r"(threadIdx.z + 1), "r"(blockDim.y * 32) : "memory");
                moqk_run_place(a, cut, c0, n, c + cut.phase, mine + (jump == cut.place ? jump : 0));
#pragma unroll
                for (int b = 0; b < NB; b++) if (c > 0) x[b] -= jump + (uint32_t)cut.phase * 512;
                turn += cut.phase;
                jump = 0 - jump;
            }
#else
            if (LATE && c == turn) { /* the same, when the next weights have been asked for */
                moqk_run_phase(a, cut, c0, n, mine, first_x_bar, ahead++);
                moqk_barrier_wait(x_bar, 0);
                x_bar += 8;
                turn += cut.phase;
            }
#endif
            moqk_run_chunk<FORM, STEP, NB, LATE>(w[0], bytes[0], h[0], x, z[0], acc[0]);
#if !MOQK_SM80
            h[0] = next;
#endif
#pragma unroll
            for (int b = 0; b < NB; b++) x[b] += 512;
            if (ONE) continue;
            if (--s == 0) {
                s = cut.stages;
                at = ring;
                full = bar;
                parity ^= 1;
            } else {
                at += BYTES;
                full += 8;
            }
        }
    }
}

/* Row `row` of a part out of the sums of all runs, in the order of the columns. */
template <int FORM, int STEP, int ROW>
__device__ __forceinline__ float moqk_run_sum(const moqk_run &cut, const moqk_run_part &p, const float *from, int32_t row)
{
    const int64_t scales_at = (int64_t)((p.rows + 15) >> 4) * cut.chunks * moqk_chunk_bytes(FORM);
    float v = 0;
#pragma unroll 4
    for (int32_t s = 0; s < cut.blocks * cut.ways; s++) v += from[s * (ROW ? 1 : cut.rows) * cut.pitch];
    v *= p.factor * (FORM == MOQK_FAST_U4 ? 64.0f : moqk_form_fix(FORM)); /* see moqk_run_pair */
    if (STEP == 0 && FORM > MOQK_MXFP4) v *= __ldg((const float *)(p.packed + scales_at) + ((int64_t)(row >> 4) * 8 + (row & 7)) * 2 + (row >> 3 & 1));
    return v + (p.bias ? __ldg(p.bias + row) : 0);
}

/* Sum o of a block: row m of x, and row r of those that the block adds up. 0: it is none. */
__device__ __forceinline__ int moqk_run_row(const moqk_run &cut, int32_t last, int32_t o, int32_t *m, int32_t *r)
{
    *m = (int32_t)__umulhi((uint32_t)o, cut.own_magic);
    *r = o - *m * cut.own;
    return *r < last;
}

/* y = [gate | up], and what an activation makes of the two. */
__device__ __forceinline__ void moqk_run_pair_up(const moqk_call &a, const moqk_run &cut, int32_t m, int32_t row, int64_t at, float gate, float up)
{
    moqk_store(a, at, gate);
    moqk_store(a, at + cut.part[1].y_first - cut.part[0].y_first, up);
    if (cut.mid)
        moqk_put_any(cut.mid, (int64_t)m * cut.part[0].rows + row,
                     moqk_activate(cut.activation, moqk_rounded_any(gate, a.y_bf16), moqk_rounded_any(up, a.y_bf16)), a.y_bf16);
}

/* What a row of a part makes of its sum; one rounding in all kernels. */
template <int FORM, int STEP> __device__ __forceinline__ float moqk_run_scaled(const moqk_run &cut, const moqk_run_part &p, float v, int32_t row)
{
    const int64_t scales_at = (int64_t)((p.rows + 15) >> 4) * cut.chunks * moqk_chunk_bytes(FORM);
    float by = p.factor * (FORM == MOQK_FAST_U4 ? 64.0f : moqk_form_fix(FORM)); /* see moqk_run_pair */
    if (STEP == 0 && FORM > MOQK_MXFP4) {
        v *= by;
        by = __ldg((const float *)(p.packed + scales_at) + ((int64_t)(row >> 4) * 8 + (row & 7)) * 2 + (row >> 3 & 1));
    }
    return fmaf(v, by, p.bias ? __ldg(p.bias + row) : 0.0f);
}

/* Of a product's sums as a lane holds them, those of all runs in the order of the columns. each: of a run. */
__device__ __forceinline__ float4 moqk_run_sum4(const moqk_run &cut, const float4 *from, int32_t each)
{
    float4 v = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int32_t s = 0; s < cut.blocks * cut.ways; s++, from += each) {
        const float4 u = *from;
        v.x += u.x;
        v.y += u.y;
        v.z += u.z;
        v.w += u.w;
    }
    return v;
}

/* Sum i of a lane's four: row g (+ 8) and column 2 t (+ 1) of the products; split: of hi and lo, which are neighbours. */
__device__ __forceinline__ float moqk_run_value(const float4 &v, int i, int split)
{
    if (split) return i < 2 ? v.x + v.y : v.z + v.w;
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

/* The end of a block that does not take x all at once: its share of the rows, a warp per row tile and product. The sums lie as the lanes hold them,
   [run][row tile][product][lane] of float4. first, last: rows of part q that are the block's. */
template <int FORM, int STEP, int NB, int KIND>
__device__ __forceinline__ void moqk_run_end(const moqk_call &a, const moqk_run &cut, const moqk_run_part &q, const float4 *sums, int32_t warp, int32_t warps,
                                             int32_t first, int32_t last)
{
    const int32_t lane = threadIdx.x, g = lane >> 2, t = lane & 3, split = !a.x_bf16, pairs = KIND == MOQK_RUN_PLAIN ? 0 : cut.pairs;
    const int32_t each = cut.tiles_own * NB * 32;
    for (int32_t o = warp; o < (cut.tiles_own >> pairs) * NB; o += warps) {
        const int32_t tile = o / NB, b = o - tile * NB;
        const float4 *from = sums + ((tile << pairs) * NB + b) * 32 + lane;
        const float4 v = moqk_run_sum4(cut, from, each), up = pairs ? moqk_run_sum4(cut, from + NB * 32, each) : v; /* tiles of gate and up in turn */
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int32_t r = tile * 16 + g + 8 * (i >> 1), m = split ? 4 * b + t : 8 * b + 2 * t + (i & 1);
            if (r >= last || m >= cut.rows || (split && (i & 1))) continue;
            const int64_t at = (int64_t)m * a.ldy + q.y_first + first + r;
            const float y = moqk_run_scaled<FORM, STEP>(cut, q, moqk_run_value(v, i, split), first + r);
            if (pairs) {
                moqk_run_pair_up(a, cut, m, first + r, at, y, moqk_run_scaled<FORM, STEP>(cut, cut.part[1], moqk_run_value(up, i, split), first + r));
                continue;
            }
            moqk_store(a, at, y);
            if (KIND != MOQK_RUN_PLAIN && cut.into) moqk_put_any(cut.into, at, moqk_get_any(cut.into, at, a.y_bf16) + moqk_rounded_any(y, a.y_bf16), a.y_bf16);
        }
    }
}

/* ---- 9 to 16 rows of BF16 x: wgmma ----
   Four warps with a row tile each decode the left operand of one product into their registers; x, the right one, is read from shared memory once for the
   four. Chunks of x come one after the other into two places of each way: a warp of its own asks for a chunk as soon as all warps of the way are done
   with the one that lay there. More places, or more chunks of weights, would delay what is needed first. */

/* Bytes of a chunk of x: four blocks of 64 columns, rows of 128 bytes with the swizzle of 128. Warps of a block that multiply, at most: with the one that
   asks for x, as many as leave a thread 96 registers. */
enum { MOQK_WIDE_X = 8192, MOQK_WIDE_PLACES = 2, MOQK_WIDE_WARPS = 16 };

/* The row tile of a warp: its first chunk, factors of its rows g, g + 8. */
typedef struct moqk_wide_tile {
    const uint8_t *src;
    const float2 *scales;
    const uint16_t *zeros;
    int32_t shift;
} moqk_wide_tile;

#if MOQK_WGMMA
/* A slab of x as right operand: address / 16; 1024 bytes between groups of 8 tokens; 128-byte swizzle. The upper half of it is a constant: see
   MOQK_WGMMA_OF. */
__device__ __forceinline__ uint32_t moqk_x_desc(uint32_t at) { return at >> 4 | 1u << 16; }

/* d (+)= A[64 x 16] B[16 x 16]; desc: see moqk_x_desc. */
__device__ __forceinline__ void moqk_wide_product(float (&d)[8], const uint32_t *a, uint32_t desc, int add)
{
    asm volatile("{ .reg .pred p; .reg .b64 q; setp.ne.b32 p, %13, 0; mov.b64 q, {%12, 1073741888}; wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, q, p, 1, 1, 0; }"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(desc), "r"(add));
}

/* acc += d, times the scales of the lane's two rows, when all products but those of the last UNDER_WAY batches are done. */
template <int UNDER_WAY> __device__ __forceinline__ void moqk_wide_add(float (&acc)[2][4], float (&d)[8], float2 f)
{
    asm volatile("wgmma.wait_group.sync.aligned %8;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) : "n"(UNDER_WAY) : "memory");
#pragma unroll
    for (int i = 0; i < 8; i++) acc[i >> 2][i & 3] += d[i] * (i & 2 ? f.y : f.x);
}

/* A run of a warp: acc += its chunks times x. mine: there is a row tile; a warp without multiplies what lies there. at: where its chunks come to, bar: their
   barrier; x: the way's x, x_bar: its barriers, those of free places free_at behind those of full ones. */
template <int FORM, int STEP>
__device__ __forceinline__ void moqk_wide_chunks(const moqk_run &cut, int32_t c0, int32_t n, int mine, const moqk_wide_tile &tile, uint32_t at, uint32_t bar,
                                                 uint32_t x, uint32_t x_bar, float (&acc)[2][4])
{
    constexpr uint32_t BYTES = moqk_chunk_bytes(FORM);
    constexpr int BATCH = STEP == 32 ? 2 : 4, BATCHES = 16 / BATCH; /* products of 16 columns between two waits: integers, those that have a scale */
    constexpr int SUMS = STEP > 0 ? 2 : 1;
    const int lane = threadIdx.x;
    const uint32_t free_at = 8 * MOQK_WIDE_PLACES * (uint32_t)cut.ways, first_x = x, first_bar = x_bar;
    uint32_t x_parity = 0, before = 0, s[2] = {0, 0}, a[2][4 * BATCH];
    /* Codes of 4-bit floats lie as mma.sync reads them beside neighbouring columns of x: matrices of 8 x 4 words, turned, are what wgmma reads
       beside x as it is. */
    uint32_t codes = at + (uint32_t)moqk_fast_slot(FORM, FORM <= MOQK_MXFP4 ? (lane & 7) * 4 + (lane >> 3) : lane) * 16;
    uint32_t scales = at + 2048 + (uint32_t)(lane >> 2) * (FORM == MOQK_NVFP4 ? 32 : 16);
    float sum[SUMS][8];        /* products cut sums off instead of rounding them: short runs keep that below the error of x */
    float2 f[2] = {make_float2(1, 1), make_float2(1, 1)};
    moqk_run_factors<FORM, STEP> h, next;
    if (FORM == MOQK_FAST_U4 && STEP == 0) {
        const uint32_t both = __ldg(tile.zeros);
        s[0] = moqk_run_zero(both & 255);
        s[1] = moqk_run_zero(both >> 8);
    }
    h.load(tile.scales, tile.zeros, c0, tile.shift);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        acc[i >> 2][i & 3] = 0;
        for (int k = 0; k < SUMS; k++) sum[k][i] = 0;
    }
    asm volatile("" : "+r"(codes), "+r"(scales), "+r"(bar), "+r"(n)); /* or they are worked out anew in the loop */
    moqk_wait_for_before(); /* weights that are needed later are not to delay x */
#pragma unroll 1
    for (int32_t c = 0; c < n; c++) {
        uint4 w[4], bytes[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
        if (mine) moqk_barrier_wait(bar, (uint32_t)c & 1);
#pragma unroll
        for (int b = 0; b < 4; b++) {
            if constexpr (FORM <= MOQK_MXFP4) {
                uint32_t v[4];
                moqk_load_matrices(codes + b * 512, v);
                w[b] = make_uint4(v[0], v[1], v[2], v[3]);
            } else w[b] = moqk_shared16(codes + b * 512);
        }
        if (FORM <= MOQK_MXFP4) bytes[0] = moqk_shared16(scales); /* of the row's four quads of lanes: each has every fourth group of 16 columns */
        if (FORM == MOQK_NVFP4) bytes[1] = moqk_shared16(scales + 16);
        next.load(tile.scales, tile.zeros, min(c0 + c + 1, c0 + n - 1), tile.shift); /* a chunk ahead */
        moqk_end_reads();
        __syncwarp();
        if (c + 1 >= n) moqk_dependents_may_start();
        else if (mine && moqk_elected()) {
            moqk_barrier_expect(bar, BYTES);
            moqk_bulk_stream(at, tile.src + (c + 1) * BYTES, BYTES, bar);
        }
        const uint32_t desc = moqk_x_desc(x);
#pragma unroll
        for (int k = 0; k < BATCHES; k++) {
            if (STEP > 0) f[k & 1] = h.group(k, s);
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const int p = k * BATCH + i, b = p >> 2;
                const uint32_t word = moqk_word_of(w[b], p & 3);
                if constexpr (FORM <= MOQK_MXFP4) {
                    const int group = FORM == MOQK_NVFP4 ? p & 3 : (p & 3) >> 1;
                    const uint32_t both = moqk_scale_both<FORM>(moqk_word_of(bytes[group >> 1], (group & 1) * 2 + (b >> 1)), b & 1);
                    s[0] = moqk_low_twice(both);
                    s[1] = moqk_high_twice(both);
                }
                moqk_run_pair<FORM>(word, 0, s, a[k & 1] + 4 * i);
                moqk_run_pair<FORM>(word, 1, s, a[k & 1] + 4 * i + 2);
            }
            if (k == 0) { /* meanwhile the chunk before has come to its end */
                if (c > 0) {
                    moqk_wide_add<0>(acc, sum[SUMS - 1], f[1]);
                    if (moqk_elected()) moqk_barrier_arrive(before + free_at);
                }
                moqk_barrier_wait(x_bar, x_parity);
            }
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const int p = k * BATCH + i;
                moqk_wide_product(sum[k & (SUMS - 1)], a[k & 1] + 4 * i, desc + (p >> 2) * 128 + (p & 3) * 2, STEP > 0 ? i > 0 : p > 0);
            }
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            if (k > 0 && STEP > 0) moqk_wide_add<1>(acc, sum[(k - 1) & 1], f[(k - 1) & 1]);
            else if (k > 0) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); /* what the next batch is decoded into is free */
        }
        h = next;
        before = x_bar;
        x += MOQK_WIDE_X;
        x_bar += 8;
        if (x_bar == first_bar + 8 * MOQK_WIDE_PLACES) {
            x = first_x;
            x_bar = first_bar;
            x_parity ^= 1;
        }
    }
    moqk_wide_add<0>(acc, sum[SUMS - 1], f[1]);
}

/* Four boxes of 64 columns of 16 rows, from column 64 * block on, into shared memory. */
__device__ __forceinline__ void moqk_copy_blocks(uint32_t to, const CUtensorMap *map, int block, uint32_t bar)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %2, %3}], [%4];"
                 :: "r"(to), "l"(map), "r"(0), "r"(block), "r"(bar) : "memory");
}

/* x of all ways, chunk by chunk as places get free. One thread. */
__device__ __forceinline__ void moqk_wide_x(const moqk_run &cut, const CUtensorMap *map, uint32_t x, uint32_t bars)
{
    const int32_t first = (int32_t)blockIdx.x * cut.ways;
    moqk_wait_for_before();
    asm volatile("fence.proxy.async;" ::: "memory"); /* x was written by ordinary stores */
    for (int32_t c = 0; c < cut.each + (cut.more > 0); c++)
        for (int32_t way = 0; way < cut.ways; way++) {
            const int32_t at = moqk_run_first(cut, first + way) + c, slot = way * MOQK_WIDE_PLACES + c % MOQK_WIDE_PLACES;
            if (at >= moqk_run_first(cut, first + way + 1)) break; /* those behind are no longer */
            const uint32_t full = bars + 8 * (uint32_t)slot;
            if (c >= MOQK_WIDE_PLACES) moqk_barrier_wait(full + 8 * MOQK_WIDE_PLACES * (uint32_t)cut.ways, (uint32_t)(c / MOQK_WIDE_PLACES - 1) & 1);
            moqk_barrier_expect(full, MOQK_WIDE_X);
            moqk_copy_blocks(x + (uint32_t)slot * MOQK_WIDE_X, map, at * 4, full);
        }
}
#endif

/* The same as moqk_decode_run, with x in such places. Threads: 32; the warps of all ways, whose row tiles fill up to fours, then the warp that asks. */
template <int FORM, int STEP, int KIND>
__global__ void __launch_bounds__(MOQK_WIDE_WARPS * 32 + 32, 1)
moqk_decode_wide(const __grid_constant__ moqk_call a, const __grid_constant__ moqk_run cut, const __grid_constant__ CUtensorMap map)
{
#if MOQK_WGMMA
    extern __shared__ __align__(1024) uint8_t wide_shared[];
    constexpr uint32_t BYTES = moqk_chunk_bytes(FORM);
    const int lane = threadIdx.x, pairs = KIND == MOQK_RUN_PLAIN ? 0 : cut.pairs;
    const int32_t warp = __shfl_sync(0xffffffffu, threadIdx.y, 0), each = (cut.tiles + 3) & ~3; /* the compiler learns that a warp has one of it */
    const int32_t way = (int32_t)((uint32_t)warp * cut.tiles_magic >> 16), local = warp - way * each;
    const int32_t live = way < cut.ways, mine = live && local < cut.tiles, rank = blockIdx.x, slot = rank * cut.ways + way;
    const int32_t c0 = moqk_run_first(cut, slot), n = moqk_run_first(cut, slot + 1) - c0;
    const uint32_t base = (uint32_t)__cvta_generic_to_shared(wide_shared), places = cut.ways * MOQK_WIDE_PLACES, x_bars = base + cut.bars_at;
    const uint32_t codes = base + places * MOQK_WIDE_X + (uint32_t)warp * BYTES;
    const uint32_t bar = x_bars + (places * 2 + (uint32_t)warp) * 8, sum_bar = base + cut.sums_at - 8;
    const moqk_run_tile found = moqk_run_locate(cut, pairs, min(local, cut.tiles - 1));
    const moqk_run_part &p = cut.part[found.part];
    const uint8_t *scales = p.packed + (int64_t)found.count * cut.chunks * BYTES;
    const int64_t row = (int64_t)found.tile * p.groups * 8 + (lane >> 2);
    const moqk_wide_tile tile = {p.packed + ((int64_t)found.tile * cut.chunks + c0) * BYTES, (const float2 *)(const void *)scales + row,
                                 (const uint16_t *)(const void *)(scales + (int64_t)found.count * p.groups * 64) + row, p.shift};
    if (live && lane == 0) moqk_barrier_init(bar, 1);
    if (!live) {
        for (uint32_t i = lane; i < 2 * places; i += 32) moqk_barrier_init(x_bars + 8 * i, i < places ? 1 : (uint32_t)each);
        if (lane == 0) moqk_barrier_init(sum_bar, 1);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();
    if (mine) moqk_run_ask<FORM>(tile.src, codes, bar, 1); /* the first weights, before x is known to be there */
    if (!live && lane == 0)
        moqk_barrier_expect(sum_bar, (uint32_t)(cut.blocks * cut.ways * 2) * 512 * (uint32_t)max(min(cut.tiles_own, cut.tiles - rank * cut.tiles_own), 0));
    __syncthreads();
    if (cut.blocks > 1) moqk_cluster_arrive(1);
    float acc[2][4];
    if (!live) {
        moqk_dependents_may_start();
        if (lane == 0) moqk_wide_x(cut, &map, base, x_bars);
        __syncwarp();
    } else {
        const uint32_t first = (uint32_t)(way * MOQK_WIDE_PLACES);
        moqk_wide_chunks<FORM, STEP>(cut, c0, n, mine, tile, codes, bar, base + first * MOQK_WIDE_X, x_bars + 8 * first, acc);
    }
    if (cut.blocks > 1) moqk_cluster_wait();
    float4 *sums = (float4 *)(void *)(wide_shared + cut.sums_at);
    if (mine) {
        int32_t owner = 0, here = local;
        for (; here >= cut.tiles_own; here -= cut.tiles_own) owner++;
        const int32_t to = (slot * cut.tiles_own + here) * 64 + lane;
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const float (&v)[4] = acc[b];
            if (cut.blocks > 1) moqk_run_give(base + cut.sums_at + (uint32_t)(to + b * 32) * 16, v, sum_bar, (uint32_t)owner);
            else sums[to + b * 32] = make_float4(v[0], v[1], v[2], v[3]);
        }
    }
    if (cut.blocks > 1) moqk_barrier_wait(sum_bar, 0);
    else __syncthreads();
    if (!live) return;
    moqk_wait_for_before(); /* long since: what `into` holds */
    const moqk_run_part &q = cut.part[pairs ? 0 : found.part]; /* the part whose rows the block adds up */
    const int32_t first = (found.first + rank * (cut.tiles_own >> pairs)) * 16;
    const int32_t last = min(min(cut.own, ((cut.tiles - rank * cut.tiles_own) >> pairs) * 16), q.rows - first);
    moqk_run_end<FORM, STEP, 2, KIND>(a, cut, q, sums, warp, each * cut.ways, first, last);
#endif
}

/* Grid: blocks of a cluster, groups of row tiles of all parts. Reads the weights once; deterministic. No integer divisions on the way to the weights
   and after x is there: a launch takes a few microseconds. */
template <int FORM, int STEP, int NB, int KIND, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, 1) moqk_decode_run(const __grid_constant__ moqk_call a, const __grid_constant__ moqk_run cut)
{
    static_assert((NB == 1 || WARPS != MOQK_RUN_ALL) && (KIND < MOQK_RUN_ROW || WARPS == MOQK_RUN_ALL), "sums of one product");
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr uint32_t BYTES = moqk_chunk_bytes(FORM), EACH = BYTES + (MOQK_SM80 ? moqk_run_factors<FORM, STEP>::COPIES : 0);
    constexpr int LATE = WARPS != MOQK_RUN_ALL, ONE = MOQK_SM80 || KIND != MOQK_RUN_PLAIN, ROW = KIND >= MOQK_RUN_ROW;
    const int lane = threadIdx.x, g = lane >> 2, t = lane & 3, split = !a.x_bf16, pairs = KIND == MOQK_RUN_PLAIN ? 0 : cut.pairs;
    const int32_t local = threadIdx.y, way = threadIdx.z, warp = way * cut.tiles + local, rank = blockIdx.x, slot = rank * cut.ways + way;
    const int32_t c0 = moqk_run_first(cut, slot), n = moqk_run_first(cut, slot + 1) - c0, begin = moqk_run_first(cut, rank * cut.ways);
    const int32_t stages = ONE ? 1 : cut.stages;
    const uint32_t base = (uint32_t)__cvta_generic_to_shared(shared), ring = base + (uint32_t)(warp * stages) * EACH;
    const uint32_t x_bar = base + cut.bars_at + (uint32_t)way * (8 * MOQK_RUN_PHASES);
    const uint32_t bar = base + cut.bars_at + (uint32_t)(cut.ways * MOQK_RUN_PHASES + warp * stages) * 8;
    const uint32_t sum_bar = base + cut.sums_at - 8; /* the last of the barriers */
    const moqk_run_tile found = moqk_run_locate(cut, pairs, local);
    const int32_t part = found.part, tile_count = found.count, first_tile = found.first, tile = found.tile;
    const moqk_run_part &p = cut.part[part];
    const int64_t tile_bytes = (int64_t)cut.chunks * BYTES, scales_at = tile_count * tile_bytes, scale = (int64_t)tile * p.groups * 8 + g;
    const uint8_t *src = p.packed + tile * tile_bytes + (int64_t)c0 * BYTES;
    if (lane < stages) moqk_barrier_init(bar + 8 * (uint32_t)lane, 1);
    if (!ROW && local == 0 && lane < MOQK_RUN_PHASES) moqk_barrier_init(x_bar + 8 * (uint32_t)lane, 1);
    if (LATE && warp == 0 && lane == 0) moqk_barrier_init(sum_bar, 1);
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    __syncwarp();
    const int32_t early = KIND == MOQK_RUN_PLAIN || warp < cut.eager;
#if MOQK_SM80
    const float2 *scales = (const float2 *)(p.packed + scales_at) + scale;
    const uint16_t *zeros = (const uint16_t *)(p.packed + scales_at + (int64_t)tile_count * p.groups * 64) + scale;
    const auto ask_now = [&] {
        moqk_run_copies<FORM, STEP> first;
        first.open(src, ring, scales, zeros, c0, p.shift);
        first.aim();
        if (n > 0) first.copy();
    };
    if (early) ask_now();
    const auto ask = [&] { if (!early) ask_now(); };
#else
    if (early) moqk_run_ask<FORM>(src, ring, bar, min(stages, n)); /* the first weights, before x is known to be there */
    const auto ask = [&] { if (!early) moqk_run_ask<FORM>(src, ring, bar, min(stages, n)); };
    const float2 *scales = (const float2 *)(p.packed + scales_at) + scale;
    const uint16_t *zeros = (const uint16_t *)(p.packed + scales_at + (int64_t)tile_count * p.groups * 64) + scale;
#endif
    uint32_t z[1][2] = {{0, 0}};
    moqk_run_factors<FORM, STEP> h[1];
    if (FORM == MOQK_FAST_U4 && STEP == 0) {
        const uint32_t both = __ldg(zeros);
#pragma unroll
        for (int i = 0; i < 2; i++) z[0][i] = moqk_run_zero(both >> (8 * i) & 255);
    }
    const uint32_t mine = base + cut.x_at + (MOQK_SM80 && cut.place ? (uint32_t)way * 2 * cut.place : (uint32_t)(c0 - begin) * 512);
    float acc[1][NB][4];
    float *sums = (float *)(void *)(shared + cut.sums_at);
    if constexpr (KIND == MOQK_RUN_NORM) { /* needs all registers: what a warp loaded before would be waited for, to be put away */
        if (!MOQK_SM80) h[0].ask(scales, zeros, c0, p.shift);
        const uint32_t to = mine - (uint32_t)(c0 - begin) * 512;
        const int32_t from = begin * 64, end = moqk_run_first(cut, (rank + 1) * cut.ways) * 64, warps = blockDim.y * blockDim.z;
        if (split)
            moqk_norm_own<1>(a, cut.norm, warp, warps, cut.cols, from, end, blockIdx.y == 0, sums, ask,
                             [&](float4 v, int32_t i) { moqk_run_put<1>(v, to + (uint32_t)i * 8, cut.x_pitch); });
        else
            moqk_norm_own<0>(a, cut.norm, warp, warps, cut.cols, from, end, blockIdx.y == 0, sums, ask,
                             [&](float4 v, int32_t i) { moqk_run_put<0>(v, to + (uint32_t)i * 8, cut.x_pitch); });
        if (!MOQK_SM80) h[0].load(scales, zeros, c0, p.shift);
    } else if constexpr (!MOQK_SM80 && LATE && STEP > 0) { /* likewise */
        h[0].ask(scales, zeros, c0, p.shift);
        moqk_run_x<LATE, ROW>(a, cut, c0, n, mine, x_bar, ask);
        h[0].load(scales, zeros, c0, p.shift);
    } else {
        if (!MOQK_SM80) h[0].load(scales, zeros, c0, p.shift);
        moqk_run_x<LATE, ROW>(a, cut, c0, n, mine, x_bar, ask);
    }
    if (LATE && warp == 0 && lane == 0)
        moqk_barrier_expect(sum_bar, (uint32_t)(cut.blocks * cut.ways * NB) * 512 * (uint32_t)max(min(cut.tiles_own, cut.tiles - rank * cut.tiles_own), 0));
    if (cut.blocks > 1) moqk_cluster_arrive(1);
    __syncthreads();
    moqk_run_chunks<FORM, STEP, NB, LATE, ONE, ROW>(a, cut, c0, n, src + stages * BYTES, ring, bar, x_bar, mine, scales, zeros, p.shift, z, h, acc);

    if (cut.blocks > 1) moqk_cluster_wait();
    if (MOQK_SM80 && LATE && cut.place) __syncthreads(); /* sums lie where x was */
    int32_t owner = 0, here = local;
    for (; here >= cut.tiles_own; here -= cut.tiles_own) owner++;
    if constexpr (LATE) {
        const uint32_t to = base + cut.sums_at + (uint32_t)((slot * cut.tiles_own + here) * NB * 32 + lane) * 16;
#pragma unroll
        for (int b = 0; b < NB; b++) {
            if (cut.blocks > 1) moqk_run_give(to + b * 512, acc[0][b], sum_bar, (uint32_t)owner);
            else ((float4 *)(void *)(shared + (to - base)))[b * 32] = make_float4(acc[0][b][0], acc[0][b][1], acc[0][b][2], acc[0][b][3]);
        }
    } else {
        float *to = sums + here * 16 + g + slot * (ROW ? 1 : cut.rows) * cut.pitch;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int32_t m = split ? t : 2 * t + (i & 1);
            const float v = split ? acc[0][0][i & 2] + acc[0][0][i | 1] : acc[0][0][i];
            if (m < (ROW ? 1 : cut.rows) && !(split && (i & 1))) moqk_store_at(to + m * cut.pitch + 8 * (i >> 1), v, cut.blocks, (uint32_t)owner);
        }
    }
    if (LATE && cut.blocks > 1) moqk_barrier_wait(sum_bar, 0);
    else if (cut.blocks > 1) { moqk_cluster_arrive(0); moqk_cluster_wait(); }
    else __syncthreads();
    /* Nothing of this is made earlier: there is no register for it beside the products. */
    const moqk_run_part &q = cut.part[pairs ? 0 : part]; /* the part whose rows the block adds up */
    const int32_t first = (first_tile + rank * (cut.tiles_own >> pairs)) * 16;
    const int32_t last = min(min(cut.own, ((cut.tiles - rank * cut.tiles_own) >> pairs) * 16), q.rows - first);
    if constexpr (LATE) {
        moqk_run_end<FORM, STEP, NB, KIND>(a, cut, q, (const float4 *)(const void *)sums, warp, cut.tiles * cut.ways, first, last);
    } else for (int32_t o = warp * 32 + lane; o < (ROW ? last : cut.rows * cut.own); o += cut.tiles * cut.ways * 32) {
        int32_t m = 0, r = o;
        if (!ROW && !moqk_run_row(cut, last, o, &m, &r)) continue;
        const float *from = sums + m * cut.pitch + r;
        const int64_t at = (int64_t)m * a.ldy + q.y_first + first + r;
        if (!pairs) {
            const float v = moqk_run_sum<FORM, STEP, ROW>(cut, q, from, first + r);
            moqk_store(a, at, v);
            if (KIND != MOQK_RUN_PLAIN && cut.into) moqk_put_any(cut.into, at, moqk_get_any(cut.into, at, a.y_bf16) + moqk_rounded_any(v, a.y_bf16), a.y_bf16);
            continue;
        }
        from += r & ~15; /* tiles of gate and up in turn */
        moqk_run_pair_up(a, cut, m, first + r, at, moqk_run_sum<FORM, STEP, ROW>(cut, q, from, first + r),
                         moqk_run_sum<FORM, STEP, ROW>(cut, cut.part[1], from + 16, first + r));
    }
}

/* ---- rows of the dispatch table; defined behind it ---- */

struct moqc_shape;
struct moqc_job;
static int moqc_fits_decode(const struct moqc_shape *s);
static void moqc_launch_decode(const struct moqc_job *j);

#define MOQC_DECODE_LAYOUT {moqc_fast_bytes, moqc_fast_prepare}
#define MOQC_DECODE_KERNELS \
    {"decode-mma", 1, 8, moqc_fits_decode, 1, moqc_launch_decode, "weights stream once through mma.sync, x as two BF16 parts, F32 sums"}, \
    {"decode-mma", 9, 16, moqc_fits_decode, 1, moqc_launch_decode, "weights stream once through mma.sync, x as two BF16 parts, F32 sums"},

#ifndef MOQC_FAST_LAYOUTS
#define MOQC_FAST_LAYOUTS MOQC_DECODE_LAYOUT, {NULL, NULL}
#define MOQC_FAST_KERNELS MOQC_DECODE_KERNELS
#endif

/* ------------------------------------------------------------------------------------------------
   >>cuda-gemm       17 and more rows of x: what the kernels of both instruction sets share
   y^T = W x^T in tiles of 128 rows of W and BM rows of x ("tokens"). Weights are the layout of >>cuda-decode: the registers of its products
   are those of wgmma, too, so one copy of the weights serves any number of rows. Tiles of x are
       [slab of 64 columns][tokens][64] of BF16, 16-byte pieces of a token's 128 bytes exchanged by xor with token & 7,
   which is the 128-byte swizzle of wgmma. x in BF16 that is wanted as it is comes so by the copy engine (tensor maps). Otherwise a pass before the
   product rounds it and writes x16 [part][slab][tokens, padded][64], where a tile is one contiguous copy. part 0: bf16(x); part 1, where two are
   needed: bf16(x - part 0), which the product takes as as many columns more, with the same weights once again. Codes that stored inputs were
   rounded to are exact in one part: x is divided by its scale, the sums multiplied by it.

   Work is cut in units of 256 columns of one tile. Blocks take whole tiles in turn; where tiles are few, the blocks of a cluster share the
   columns of each and add up through distributed shared memory. Tiles that would leave blocks idle in the last round come first: each block takes an
   equal run of all their units; the partial sums of a tile go through memory and the block that comes last adds them. Always in the order of the
   columns: deterministic.
   ------------------------------------------------------------------------------------------------ */

/* Tells the host which code was chosen: blocks of it may have 64 threads with wgmma, else 32. Never launched. */
__global__ void __launch_bounds__(MOQK_WGMMA ? 64 : 32) moqk_has_wgmma() {}

enum { MOQK_NO_UNIT, MOQK_STATIC_UNIT, MOQK_TOKEN_UNIT }; /* what x was divided by: nothing, the part's input_scale, a value per token */

typedef struct moqk_pack_args {
    const void *x;             /* [*, ldx] */
    int64_t ldx, tokens;       /* tokens: of x16, padded */
    const int32_t *row_of, *expert_of;
    const moqk_part *part;     /* of expert 0 */
    const float *token_unit;   /* [m] */
    uint8_t *x16;
    float up;                  /* a power of two that the form of the weights wants on x */
    int32_t expert_stride, m, cols, slabs, parts, form, unit, x_bf16;
    float *unit_out, *scale;   /* moqk_pack_bytes */
    int32_t raw, as_weights;   /* as_weights: columns as the words of the weights have them, else as they come */
    int32_t whole;             /* x may be read 16 bytes at a time */
} moqk_pack_args;

/* One unit of the work of a GEMM kernel's launch. */
typedef struct moqk_gemm_args {
    const uint8_t *x16;
    int64_t tokens;
    float *partial;            /* [2 * blocks][warpgroups][BM / 8][128] of float4; mma.sync: halves of a tile's rows for warpgroups */
    int32_t *turn;             /* [blocks][warpgroups], 0 between launches; few tokens by mma.sync: [blocks] */
    const float *token_unit;
    const float *x_scale;      /* >>cuda-gemm-bytes: of 128 columns of a token, [slabs][tokens]; NULL: none */
    int32_t units, w_units;    /* of a tile: of all parts of x, of one */
    int32_t row_tiles;         /* of 128 rows, of all parts of an expert */
    int32_t token_tiles;       /* dense */
    int32_t whole, unit;       /* so many tiles, the last ones, are not cut */
    int32_t split;             /* blocks of a cluster that share the columns of a tile: 1 to 4 */
    float fix;                 /* the power of two that sums lack; see moqk_form_fix */
    int32_t direct, y_direct;  /* x is read where it is, y is written, by the maps */
    int32_t known;             /* parts of a dense call that stand here, too: nothing has to be read before x can be asked for; or 0 */
    int32_t tile_tokens;       /* of a tile where the kernel takes several: mma.sync */
    moqk_part part[3];
} moqk_gemm_args;

/* x as the copy engine sees it, [slab of 64 columns][token][64]: boxes of the slabs of a stage and moqk_box_tokens(BM) tokens, and of one slab and the tokens
   that are left over in the end. y: boxes of 64 rows of moqk_put_tokens(BM). */
typedef struct moqk_maps { CUtensorMap whole, part, y; } moqk_maps;

/* Tokens of a tile that are turned at once, and of a copy of them into y; see moqk_finish_pairs. */
__host__ __device__ static constexpr int moqk_turn_tokens(int tokens) { return tokens % 64 ? 32 : 64; }
__host__ __device__ static constexpr int moqk_put_tokens(int tokens) { return tokens % 32 ? 16 : moqk_turn_tokens(tokens); }
enum { MOQK_FLOAT_TOKENS = 16 }; /* of a copy of 32 rows into an F32 y; see moqk_finish_floats */
/* Tokens of a copy of x and of a product: all of a tile, or half of it where those are more than 256. */
__host__ __device__ static constexpr int moqk_box_tokens(int tokens) { return tokens > 256 ? tokens / 2 : tokens; }

__host__ __device__ static inline int moqk_form_grouped(const moqk_part &p, int form) { return (form == MOQK_FAST_U4 || form == MOQK_FAST_E4M3) && p.group < p.cols; }

/* The scale of a token that was rounded with one of its own: its largest magnitude is the largest code. A block per token. */
__global__ void __launch_bounds__(256) moqk_token_units(moqk_pack_args a, float *unit)
{
    __shared__ float room[33];
    const int64_t row = blockIdx.x, from = a.row_of ? a.row_of[row] : row;
    const moqk_part &p = a.part[a.expert_of ? (int64_t)a.expert_of[row] * a.expert_stride : 0];
    float top = 0;
    for (int32_t i = threadIdx.x; i < a.cols; i += blockDim.x) top = fmaxf(top, fabsf(moqk_get_any(a.x, from * a.ldx + i, a.x_bf16)));
    top = moqk_block_max(top, room);
    if (threadIdx.x == 0) unit[row] = top > 0 ? top / moqk_largest(p.in_elem) : 1;
}

/* Two neighbouring values of x; eight (sixteen) whose columns all exist or, if not `inside`, are 0. */
__device__ __forceinline__ float2 moqk_get2(const moqk_pack_args &a, int64_t at)
{
    if (!a.x_bf16) return *(const float2 *)((const float *)a.x + at);
    const uint32_t w = *(const uint32_t *)((const __nv_bfloat16 *)a.x + at);
    return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
}
__device__ __forceinline__ void moqk_get8(const moqk_pack_args &a, int64_t at, int inside, float2 *v)
{
    uint4 w[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
    if (inside) {
        w[0] = *(const uint4 *)((const uint8_t *)a.x + at * (a.x_bf16 ? 2 : 4));
        if (!a.x_bf16) w[1] = *(const uint4 *)((const float *)a.x + at + 4);
    }
    const uint32_t each[4] = {w[0].x, w[0].y, w[0].z, w[0].w}, more[4] = {w[1].x, w[1].y, w[1].z, w[1].w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (a.x_bf16) v[i] = make_float2(__uint_as_float(each[i] << 16), __uint_as_float(each[i] & 0xffff0000u));
        else v[i] = make_float2(__uint_as_float(i < 2 ? each[2 * i] : more[2 * i - 4]), __uint_as_float(i < 2 ? each[2 * i + 1] : more[2 * i - 3]));
    }
}
__device__ __forceinline__ void moqk_get16(const moqk_pack_args &a, int64_t at, int inside, float *v)
{
    float2 w[8];
    moqk_get8(a, at, inside, w);
    moqk_get8(a, at + 8, inside, w + 4);
#pragma unroll
    for (int i = 0; i < 8; i++) { v[2 * i] = w[i].x; v[2 * i + 1] = w[i].y; }
}

/* Word t of lane s of four, which are 2 and 4 apart, becomes word s of lane t. */
__device__ __forceinline__ void moqk_turn_words(int s, uint32_t (&w)[4])
{
#pragma unroll
    for (int by = 1; by <= 2; by++) { /* pairs of words that are `by` apart */
        const int high = s & by;
        const uint32_t a = __shfl_xor_sync(0xffffffffu, high ? w[0] : w[by], 2 * by), b = __shfl_xor_sync(0xffffffffu, high ? w[3 - by] : w[3], 2 * by);
        w[0] = high ? a : w[0];
        w[by] = high ? w[by] : a;
        w[3 - by] = high ? b : w[3 - by];
        w[3] = high ? w[3] : b;
    }
}

/* x -> x16. A thread makes 16 bytes of four tokens; 8 lanes share a token's 64 columns. Reads x once. Grid: 4 slabs, 32 tokens. */
__global__ void __launch_bounds__(256) moqk_pack_x(moqk_pack_args a)
{
    moqk_dependents_may_start();
    moqk_wait_for_before();
    const int32_t lane = threadIdx.x & 31, slab = blockIdx.x * 4 + (lane >> 3), c = lane & 7, s = c >> 1, h = c & 1;
    const int turned = a.form <= MOQK_MXFP4 && a.as_weights;
    float2 v[4][4];
    float by[4];
#pragma unroll
    for (int u = 0; u < 4; u++) {
        int32_t m = blockIdx.y * 32 + u * 8 + (threadIdx.x >> 5);
        by[u] = a.up;
        if (m >= a.m) { by[u] = 0; continue; }
        int64_t from = a.row_of ? a.row_of[m] : m;
        if (a.unit == MOQK_STATIC_UNIT) by[u] /= a.part[a.expert_of ? (int64_t)a.expert_of[m] * a.expert_stride : 0].input_scale;
        if (a.unit == MOQK_TOKEN_UNIT) by[u] /= a.token_unit[m];
        if (a.whole) {
            moqk_get8(a, from * a.ldx + slab * 64 + 8 * c, slab * 64 + 8 * c < a.cols, v[u]);
            continue;
        }
#pragma unroll
        for (int t = 0; t < 4; t++) {
            int32_t col = slab * 64 + 8 * h + (turned ? t * 16 + s * 2 : s * 16 + t * 2);
            v[u][t] = make_float2(0, 0);
            if (col < a.cols) v[u][t] = moqk_get2(a, from * a.ldx + col);
            if (col + 1 >= a.cols) v[u][t].y = 0;
        }
    }
#pragma unroll
    for (int u = 0; u < 4; u++) {
        int32_t m = blockIdx.y * 32 + u * 8 + (threadIdx.x >> 5);
        if (m >= a.m) continue;
        uint32_t w[4], low[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            float x = v[u][t].x * by[u], y = v[u][t].y * by[u];
            w[t] = moqk_pack(x, y);
            low[t] = moqk_pack(x - __uint_as_float(w[t] << 16), y - __uint_as_float(w[t] & 0xffff0000u));
        }
        if (a.whole && turned) {
            moqk_turn_words(s, w);
            if (a.parts > 1) moqk_turn_words(s, low);
        }
        if (slab >= a.slabs) continue;
        uint8_t *to = a.x16 + ((int64_t)slab * a.tokens + m) * 128 + ((c ^ (m & 7)) << 4);
        *(uint4 *)to = make_uint4(w[0], w[1], w[2], w[3]);
        if (a.parts > 1) *(uint4 *)(to + a.slabs * a.tokens * 128) = make_uint4(low[0], low[1], low[2], low[3]);
    }
}

/* Eight values of an activation; up: those behind the gate's, or none. */
__device__ __forceinline__ void moqk_activate8(const moq_activation_desc &a, float2 *v, const float2 *up)
{
#pragma unroll
    for (int t = 0; t < 4; t++) v[t] = make_float2(moqk_activate(a, v[t].x, up[t].x), moqk_activate(a, v[t].y, up[t].y));
}

/* The same of rows that go through an activation first, [gate | up] or up alone: 8 lanes share a token's 64 columns. Grid: slabs, 32
   tokens. */
__global__ void __launch_bounds__(256) moqk_pack_activated(moqk_pack_args a, moq_activation_desc activation)
{
    moqk_dependents_may_start();
    moqk_wait_for_before();
    const int32_t c = threadIdx.x & 7, slab = blockIdx.x, m = blockIdx.y * 32 + (threadIdx.x >> 3), col = slab * 64 + 8 * c;
    if (m >= a.m) return;
    const int inside = col < a.cols;
    float2 v[4], up[4];
    moqk_get8(a, m * a.ldx + col, inside, v);
    moqk_get8(a, m * a.ldx + (activation.kind == MOQ_RELU2 ? 0 : a.cols) + col, inside, up);
    if (inside) moqk_activate8(activation, v, up);
    uint32_t w[4], low[4];
#pragma unroll
    for (int t = 0; t < 4; t++) {
        const float x = v[t].x * a.up, y = v[t].y * a.up;
        w[t] = moqk_pack(x, y);
        low[t] = moqk_pack(x - __uint_as_float(w[t] << 16), y - __uint_as_float(w[t] & 0xffff0000u));
    }
    uint8_t *to = a.x16 + ((int64_t)slab * a.tokens + m) * 128 + ((c ^ (m & 7)) << 4);
    *(uint4 *)(void *)to = make_uint4(w[0], w[1], w[2], w[3]);
    if (a.parts > 1) *(uint4 *)(void *)(to + a.slabs * a.tokens * 128) = make_uint4(low[0], low[1], low[2], low[3]);
}

/* ---- a block's work ---- */

/* A run of units of one tile, and what the tile is. */
typedef struct moqk_piece {
    const moqk_part *p;
    int32_t at;                /* the block's next unit or tile */
    int32_t tile, from, to;    /* units */
    int32_t row_tile, y_first; /* of 128 rows in the part; first row of the part in y */
    int32_t rows;              /* of the part */
    int32_t x_first, first, end; /* the tile's first token in x16, a multiple of 8; those that are its own */
} moqk_piece;

/* Equal runs: the first blocks take one unit more than the others. */
__device__ __forceinline__ uint32_t moqk_run_start(uint32_t total, uint32_t block) { return total / gridDim.x * block + min(total % gridDim.x, block); }

__device__ __forceinline__ uint32_t moqk_run_of(uint32_t total, uint32_t unit)
{
    uint32_t each = total / gridDim.x, more = total % gridDim.x, longer = more * (each + 1);
    return unit < longer ? unit / (each + 1) : more + (unit - longer) / each;
}

__device__ __forceinline__ int32_t moqk_tiles_of(const moqk_call &a, const moqk_gemm_args &b) { return b.row_tiles * (a.tiles ? a.tiles[-4] : b.token_tiles); }

/* Where a tile lies; tiles that stand side by side share weights (dense) or tokens (experts). 0: it has no rows of this launch. BM 0: b.tile_tokens. */
template <int FORM, int GROUPED, int BM> __device__ __forceinline__ int moqk_locate_tile(const moqk_call &a, const moqk_gemm_args &b, moqk_piece *q)
{
    int64_t part = 0; /* counted, not pointed at: nvcc 13.0 reads the first part where a pointer to parts moves in a branch or a loop */
    int32_t row_tile, y_first = 0, rows = 0, left = a.part_count;
    if (a.tiles) {
        const int32_t *t = a.tiles + 4 * (int64_t)(q->tile / b.row_tiles);
        row_tile = q->tile % b.row_tiles;
        part = (int64_t)t[0] * a.expert_stride;
        q->first = t[1];
        q->end = t[1] + t[2];
        q->x_first = t[1] & ~7;
    } else {
        row_tile = b.token_tiles == 1 ? q->tile : q->tile / b.token_tiles;
        q->x_first = q->first = (q->tile - row_tile * b.token_tiles) * (BM ? BM : b.tile_tokens);
        q->end = min(q->first + (BM ? BM : b.tile_tokens), a.m);
    }
    for (; left > 0; left--, part++) {
        rows = b.known ? b.part[part].rows : a.parts[part].rows;
        const int32_t n = (rows + 127) / 128;
        if (row_tile < n) break;
        row_tile -= n;
        y_first += rows;
    }
    q->p = b.known ? &b.part[left > 0 ? part : 0] : a.parts + part;
    q->rows = rows;
    q->y_first = y_first;
    q->row_tile = row_tile;
    if (b.known == 1) return left > 0; /* the launch is its own */
    return left > 0 && moqk_form_of(*q->p) == FORM && moqk_form_grouped(*q->p, FORM) == (FORM > MOQK_MXFP4 && GROUPED > 0);
}

/* Tiles that are cut: the first ones. */
__device__ __forceinline__ int32_t moqk_cut_tiles(const moqk_call &a, const moqk_gemm_args &b) { return max(moqk_tiles_of(a, b) - b.whole, 0); }

/* x / split for 1 to 4 blocks. */
__device__ __forceinline__ int32_t moqk_over(int32_t x, int32_t split)
{
    return split == 3 ? (int32_t)(__umulhi((uint32_t)x, 0xaaaaaaabu) >> 1) : x >> (split >> 1);
}

/* The next piece with work, or 0. Start with at = -1. at: a unit of the tiles that are cut, then the others, from the number of those units + 1 on. */
template <int FORM, int GROUPED, int BM> __device__ __forceinline__ int moqk_next_piece(const moqk_call &a, const moqk_gemm_args &b, moqk_piece *q)
{
    const int32_t tiles = moqk_tiles_of(a, b), cut = moqk_cut_tiles(a, b), total = cut * b.units;
    if (q->at < 0) q->at = cut > 0 ? (int32_t)moqk_run_start(total, blockIdx.x) : 0;
    while (1) {
        const int32_t end = q->at < total ? (int32_t)moqk_run_start(total, blockIdx.x + 1) : 0;
        if (q->at < end) {
            q->tile = q->at / b.units;
            q->from = q->at - q->tile * b.units;
            q->to = min(b.units, q->from + (end - q->at));
            q->at += q->to - q->from;
        } else {
            const int32_t set = moqk_over(blockIdx.x, b.split), rank = blockIdx.x - set * b.split;
            if (q->at <= total) q->at = total + 1 + set;
            q->tile = cut + (q->at - total - 1);
            if (q->tile >= tiles) return 0;
            q->from = moqk_over(b.units * rank, b.split);
            q->to = moqk_over(b.units * (rank + 1), b.split);
            q->at += moqk_over(gridDim.x, b.split);
        }
        if (moqk_locate_tile<FORM, GROUPED, BM>(a, b, q)) return 1;
    }
}

__device__ __forceinline__ uint32_t moqk_shared_at(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ uint4 moqk_read16(uint32_t at)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}

__device__ __forceinline__ void moqk_sync_group(int group) { asm volatile("bar.sync %0, 128;" :: "r"(group + 1) : "memory"); }
/* Any of the group's threads? */
__device__ __forceinline__ int moqk_any_of_group(int group, int mine)
{
    int any;
    asm volatile("{\n"
                 "  .reg .pred p, q;\n"
                 "  setp.ne.b32 p, %1, 0;\n"
                 "  bar.red.or.pred q, %2, 128, p;\n"
                 "  selp.b32 %0, 1, 0, q;\n"
                 "}" : "=r"(any) : "r"(mine), "r"(group + 1) : "memory");
    return any;
}

/* A thread's share of another block's sums of a tile. */
template <int BM> __device__ __forceinline__ void moqk_add_partial(const float4 *from, float (&d)[BM / 2])
{
#pragma unroll
    for (int i = 0; i < BM / 8; i++) {
        float4 v = __ldcg(from + i * 128);
        d[4 * i] += v.x;
        d[4 * i + 1] += v.y;
        d[4 * i + 2] += v.z;
        d[4 * i + 3] += v.w;
    }
}

/* Sums of a tile that several blocks share: each leaves its own in memory, the last to come adds them in the order of the columns into d and
   returns 1. d: a thread's sums of its warpgroup's 64 x BM, in any order that all blocks agree on. */
template <int BM> __device__ int moqk_join(const moqk_gemm_args &b, const moqk_piece &q, uint32_t total, int group, int thread, volatile int *room, float (&d)[BM / 2])
{
    const uint32_t begin = (uint32_t)(q.tile * b.units), low = moqk_run_of(total, begin), high = moqk_run_of(total, begin + b.units - 1), me = blockIdx.x;
    const uint32_t size = 128 * (BM / 8);
    float4 *all = (float4 *)b.partial + group * size + thread;
    int32_t *turn = b.turn + 2 * low + group, others = (int32_t)(high - low);
    const int early = me <= low + 1; /* adding the others to what it has is the order of the columns */
    if (thread == 0) room[group] = early && atomicAdd(turn, 0) == others;
    moqk_sync_group(group);
    int last = room[group];
    if (!last) {
        float4 *mine = all + (2 * me + (moqk_run_start(total, me) <= begin)) * 2 * size;
#pragma unroll
        for (int i = 0; i < BM / 8; i++) __stcg(mine + i * 128, make_float4(d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]));
        __threadfence();
        moqk_sync_group(group);
        if (thread == 0) room[group] = atomicAdd(turn, 1) == others;
        moqk_sync_group(group);
        last = room[group];
    }
    if (!last) return 0;
    __threadfence();
    if (thread == 0) *turn = 0;
#pragma unroll
    for (int i = 0; i < BM / 2; i++) d[i] = early ? d[i] : 0;
    for (uint32_t c = low; c <= high; c++)
        if (!early || c != me) moqk_add_partial<BM>(all + (2 * c + (moqk_run_start(total, c) <= begin)) * 2 * size, d);
    return 1;
}

/* Where scales lie behind the codes; see moqk_fast_of. */
template <int FORM> __device__ __forceinline__ int64_t moqk_scales_at(const moqk_part &p)
{
    return (int64_t)((p.rows + 15) / 16) * ((p.cols + moqk_chunk_cols(FORM) - 1) / moqk_chunk_cols(FORM)) * moqk_chunk_bytes(FORM);
}

/* What four neighbouring rows of y need: scales, biases, where they begin; whole: one store writes them. */
typedef struct moqk_rows {
    float scale[4], bias[4];
    int32_t first, whole;      /* row of the part */
} moqk_rows;

/* What the sums of a row are multiplied by. */
template <int FORM, int GROUPED> __device__ __forceinline__ float moqk_row_scale(const moqk_gemm_args &b, const moqk_part &p, int32_t row)
{
    const int32_t r = min(row, p.rows - 1);
    const int64_t at = ((int64_t)(r >> 4) * 8 + (r & 7)) * 2 + (r >> 3 & 1);
    float v = p.factor * b.fix * (b.unit == MOQK_STATIC_UNIT ? p.input_scale : 1);
    if (FORM > MOQK_MXFP4 && !GROUPED) v *= ((const float *)(p.packed[0] + moqk_scales_at<FORM>(p)))[at];
    if (FORM == MOQK_MXFP4 && GROUPED) v *= moqk_e8m0((p.packed[0] + moqk_scales_at<FORM>(p))[at]) * 0.5f; /* see >>cuda-gemm-bytes */
    return v;
}

/* Scales and biases of the tile's 128 rows. */
template <int FORM, int GROUPED> __device__ __forceinline__ float2 moqk_row_of(const moqk_gemm_args &b, const moqk_piece &q, int row)
{
    const int32_t r = q.row_tile * 128 + row;
    return make_float2(moqk_row_scale<FORM, GROUPED>(b, *q.p, r), q.p->bias ? q.p->bias[min(r, q.rows - 1)] : 0);
}

/* told: them, or NULL. */
template <int FORM, int GROUPED>
__device__ __forceinline__ moqk_rows moqk_rows_of(const moqk_call &a, const moqk_gemm_args &b, const moqk_piece &q, const float2 *told, int group, int r4)
{
    moqk_rows o;
    const int elem = a.y_bf16 ? 2 : 4;
    o.first = q.row_tile * 128 + group * 64 + r4 * 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = group * 64 + r4 * 4 + i;
        const float2 v = told ? told[row] : moqk_row_of<FORM, GROUPED>(b, q, row);
        o.scale[i] = v.x;
        o.bias[i] = v.y;
    }
    o.whole = !a.accumulate && o.first + 3 < q.rows && a.ldy % 4 == 0 && (((uintptr_t)a.y + (uintptr_t)(q.y_first + o.first) * elem) & (4 * elem - 1)) == 0;
    return o;
}

/* Sums of four rows of token m of x16 into y, if the token is the tile's own. */
__device__ __forceinline__ void moqk_put_rows(const moqk_call &a, const moqk_gemm_args &b, const moqk_piece &q, const moqk_rows &o, int32_t m, float4 v)
{
    if (m < q.first || m >= q.end || o.first >= q.rows) return;
    const float unit = b.unit == MOQK_TOKEN_UNIT ? b.token_unit[m] : 1;
    const int64_t at = (int64_t)m * a.ldy + q.y_first + o.first;
    const float each[4] = {v.x * o.scale[0] * unit + o.bias[0], v.y * o.scale[1] * unit + o.bias[1], v.z * o.scale[2] * unit + o.bias[2],
                           v.w * o.scale[3] * unit + o.bias[3]};
    if (o.whole && a.y_bf16) *(uint2 *)((__nv_bfloat16 *)a.y + at) = make_uint2(moqk_pack(each[0], each[1]), moqk_pack(each[2], each[3]));
    else if (o.whole) *(float4 *)((float *)a.y + at) = make_float4(each[0], each[1], each[2], each[3]);
    else for (int i = 0; i < 4; i++) if (o.first + i < q.rows) moqk_store(a, at + i, each[i]);
}

/* Sums of tokens from * TOKENS on into [tokens][68] of shared memory. d: register 4 j + i is row g + 8 (i / 2) of the warp's 16, token 8 j + 2 t + i % 2,
   as both kinds of products leave them. */
template <int TOKENS, int N, typename T> __device__ __forceinline__ void moqk_lay_sums(float *room, int thread, const T (&d)[N], int from)
{
    const int lane = thread & 31, warp = thread >> 5;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            room[(8 * j + 2 * (lane & 3) + (i & 1)) * 68 + warp * 16 + (lane >> 2) + 8 * (i >> 1)] = (float)d[from * (TOKENS / 2) + j * 4 + i];
}

/* y = sums * scales + bias. `room`: the warpgroup's [32 tokens, or 16][68] floats of shared memory. */
template <int FORM, int GROUPED, int BM, typename T>
__device__ void moqk_finish(const moqk_call &a, const moqk_gemm_args &b, const moqk_piece &q, const float2 *told, int group, int thread, float *room,
                            const T (&d)[BM / 2])
{
    constexpr int TOKENS = BM % 32 ? 16 : 32;
    const moqk_rows o = moqk_rows_of<FORM, GROUPED>(a, b, q, told, group, thread & 15);
#pragma unroll 1 /* only what names registers is there for every round */
    for (int r = 0; r < BM / TOKENS && q.x_first + r * TOKENS < q.end; r++) {
        moqk_sync_group(group);
#pragma unroll
        for (int k = 0; k < BM / TOKENS; k++) if (k == r) moqk_lay_sums<TOKENS>(room, thread, d, k);
        moqk_sync_group(group);
#pragma unroll 1 /* few instructions: most launches run them once */
        for (int token = thread >> 4; token < TOKENS; token += 8)
            moqk_put_rows(a, b, q, o, q.x_first + r * TOKENS + token, *(const float4 *)(room + token * 68 + (thread & 15) * 4));
    }
}

#if MOQK_WGMMA
/* What the thread gave to the copy engine was read: its room is free. It is in y: nobody may end before. */
__device__ __forceinline__ void moqk_sums_read(const moqk_gemm_args &b, int thread)
{
    if (thread == 0 && b.y_direct) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void moqk_sums_stored(const moqk_gemm_args &b, int thread)
{
    if (thread == 0 && b.y_direct) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

/* Sums whose rows of y are BF16 and whole: pairs of them are turned by stmatrix, so that 64 rows of a token lie side by side. */
template <typename T> struct moqk_turned {
    float scale[2], bias[2];   /* of the thread's rows */
    __nv_bfloat16 *y;          /* the warpgroup's rows of token 0, from the lane's 8 on */

    __device__ __forceinline__ moqk_turned(const moqk_call &a, const moqk_piece &q, const float2 *told, int group, int thread)
    {
        const int32_t lane = thread & 31, warp = thread >> 5;
        y = (__nv_bfloat16 *)a.y + q.y_first + q.row_tile * 128 + group * 64 + (thread & 7) * 8;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float2 v = told[group * 64 + warp * 16 + (lane >> 2) + 8 * i];
            scale[i] = v.x;
            bias[i] = v.y;
        }
    }
    __device__ __forceinline__ int fits(const moqk_call &a, const moqk_piece &q, int group) const
    {
        return a.y_bf16 && !a.accumulate && q.row_tile * 128 + group * 64 + 63 < q.rows && a.ldy % 8 == 0 && ((uintptr_t)y & 15) == 0;
    }
    /* TOKENS of them from `first` on into shared memory: [tokens][128 bytes], 16-byte pieces exchanged by xor with token & 7. UNITS: tokens have units. */
    template <int TOKENS, int UNITS>
    __device__ __forceinline__ void turn(const moqk_gemm_args &b, const moqk_piece &q, int thread, uint32_t at, int32_t first, const T *f) const
    {
        const int32_t lane = thread & 31, warp = thread >> 5;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j += 2) {
            uint32_t v[4];
#pragma unroll
            for (int i = 0; i < 4; i++, f += 2) {
                const int32_t m = first + (j + i / 2) * 8 + 2 * (lane & 3);
                const float2 unit = UNITS && m < q.end ? *(const float2 *)(b.token_unit + m) : make_float2(1, 1);
                if (UNITS) v[i] = moqk_pack((float)f[0] * scale[i & 1] * unit.x + bias[i & 1], (float)f[1] * scale[i & 1] * unit.y + bias[i & 1]);
                else v[i] = moqk_pack((float)f[0] * scale[i & 1] + bias[i & 1], (float)f[1] * scale[i & 1] + bias[i & 1]);
            }
            const int token = (j + (lane >> 4)) * 8 + (lane & 7), piece = warp * 2 + (lane >> 3 & 1);
            asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                         :: "r"(at + token * 128 + ((piece ^ (token & 7)) << 4)), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
        }
    }
    /* From there into y, the tile's own: 8 lanes write a token's 128 bytes. */
    __device__ __forceinline__ void put(const moqk_call &a, const moqk_piece &q, int thread, uint32_t at, int32_t first, int tokens) const
    {
#pragma unroll 2
        for (int token = thread >> 3; token < tokens; token += 16) {
            const uint4 v = moqk_read16(at + token * 128 + (((thread & 7) ^ (token & 7)) << 4));
            if (first + token >= q.first && first + token < q.end) *(uint4 *)(y + (int64_t)(first + token) * a.ldy) = v;
        }
    }
};

/* Sums of 8 tokens after 8 from `first` on times what x of a token was divided by: apart from moqk_turned, for most calls have no such units. */
template <int N> __device__ __forceinline__ void moqk_apply_units(const moqk_gemm_args &b, const moqk_piece &q, int thread, int32_t first, float (&d)[N])
{
    if (b.unit != MOQK_TOKEN_UNIT) return;
#pragma unroll
    for (int j = 0; j < N; j += 4) {
        const int32_t m = first + j * 2 + 2 * (thread & 3);
        const float2 unit = m < q.end ? *(const float2 *)(b.token_unit + m) : make_float2(1, 1);
        d[j] *= unit.x;
        d[j + 1] *= unit.y;
        d[j + 2] *= unit.x;
        d[j + 3] *= unit.y;
    }
}
template <int N> __device__ __forceinline__ void moqk_apply_units(const moqk_gemm_args &, const moqk_piece &, int, int32_t, int (&)[N]) {}

/* As moqk_finish for whole rows of BF16, moqk_turn_tokens(BM) at a time. The copy engine writes them while the next ones are turned or, where y cannot be
   mapped, the threads. 0: it is not such a tile. `room`: the warpgroup's [BUFFERS][tokens][128 bytes]. */
template <int BM, int BUFFERS, int UNITS, typename T>
__device__ int moqk_finish_pairs(const moqk_call &a, const moqk_gemm_args &b, const CUtensorMap *map, const moqk_piece &q, const float2 *told, int group,
                                 int thread, float *room, T (&d)[BM / 2])
{
    constexpr int TOKENS = moqk_turn_tokens(BM), REST = BM % TOKENS, PUT = moqk_put_tokens(BM);
    const moqk_turned<T> rows(a, q, told, group, thread);
    if (!rows.fits(a, q, group)) {
        moqk_sums_read(b, thread); /* see moqk_finish */
        return 0;
    }
    if (!UNITS) moqk_apply_units(b, q, thread, q.x_first, d);
#pragma unroll
    for (int r = 0; r < (BM + TOKENS - 1) / TOKENS; r++) {
        const int tokens = r < BM / TOKENS ? TOKENS : REST;
        const uint32_t at = (uint32_t)__cvta_generic_to_shared(room) + r % BUFFERS * (TOKENS * 128);
        const int32_t first = q.x_first + r * TOKENS;
        if (first >= q.end) break;
        if (r == 0 || r >= BUFFERS || !b.y_direct) {
            if (thread == 0 && b.y_direct && r == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); /* of the tile before: all buffers */
            if (thread == 0 && b.y_direct && r > 0) asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(BUFFERS - 1) : "memory");
            moqk_sync_group(group);
        }
        if (tokens == TOKENS) rows.template turn<TOKENS, UNITS>(b, q, thread, at, first, d + r * (TOKENS / 2));
        else rows.template turn<REST, UNITS>(b, q, thread, at, first, d + r * (TOKENS / 2));
        if (b.y_direct) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        moqk_sync_group(group);
        if (!b.y_direct) rows.put(a, q, thread, at, first, tokens);
        else if (thread == 0) {
#pragma unroll
            for (int k = 0; k < tokens; k += PUT)
                asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                             :: "l"(map), "r"(q.y_first + q.row_tile * 128 + group * 64), "r"(first + k), "r"(at + k * 128) : "memory");
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
    }
    return 1;
}

/* As moqk_finish for whole rows of F32 that can be mapped: the copy engine writes MOQK_FLOAT_TOKENS tokens of 32 rows at a time while the next ones are
   laid down, 16-byte pieces exchanged by xor with token & 7. 0: it is not such a tile. `room`: the warpgroup's, of ROOM bytes, which nobody reads. */
template <int BM, int ROOM>
__device__ int moqk_finish_floats(const moqk_call &a, const moqk_gemm_args &b, const CUtensorMap *map, const moqk_piece &q, const float2 *told, int group,
                                  int thread, float *room, const float (&d)[BM / 2])
{
    constexpr int TOKENS = BM % 32 == 0 && ROOM >= 16384 ? 32 : MOQK_FLOAT_TOKENS, BUFFERS = ROOM / (TOKENS * 256);
    const int32_t lane = thread & 31, row = (thread >> 5) * 16 + (lane >> 2), y_row = q.row_tile * 128 + group * 64;
    if (a.y_bf16 || !b.y_direct || a.accumulate || b.unit == MOQK_TOKEN_UNIT || y_row + 63 >= q.rows) return 0;
    const float2 by[2] = {told[group * 64 + row], told[group * 64 + row + 8]};
#pragma unroll
    for (int r = 0; r < BM / TOKENS; r++) {
        const uint32_t at = (uint32_t)__cvta_generic_to_shared(room) + r % BUFFERS * (TOKENS * 256);
        const int32_t first = q.x_first + r * TOKENS;
        if (first >= q.end) break;
        if (r == 0 || r >= BUFFERS) {
            if (thread == 0 && r > 0) asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(BUFFERS - 1) : "memory");
            moqk_sync_group(group);
        }
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int token = 8 * j + 2 * (lane & 3) + (i & 1), here = row + 8 * (i >> 1);
                const float v = __fadd_rn(__fmul_rn(d[r * (TOKENS / 2) + 4 * j + i], by[i >> 1].x), by[i >> 1].y); /* the bits of moqk_put_rows */
                const uint32_t place = (here >> 5) * (TOKENS * 128) + token * 128 + (((here >> 2 & 7) ^ (token & 7)) << 4) + (here & 3) * 4;
                asm volatile("st.shared.f32 [%0], %1;" :: "r"(at + place), "f"(v) : "memory");
            }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        moqk_sync_group(group);
        if (thread == 0) {
#pragma unroll
            for (int k = 0; k < 2 * TOKENS; k += MOQK_FLOAT_TOKENS)
                asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                             :: "l"(map), "r"(q.y_first + y_row + k / TOKENS * 32), "r"(first + k % TOKENS), "r"(at + k * 128) : "memory");
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
    }
    return 1;
}
#endif

__device__ __forceinline__ void moqk_copy_async(uint32_t dst, const void *src)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void moqk_copy_async8(uint32_t dst, const void *src)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void moqk_copy_async4(uint32_t dst, const void *src)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(dst), "l"(src) : "memory");
}
/* The same from AT bytes after both addresses. */
template <int AT> __device__ __forceinline__ void moqk_copy_async_from(uint32_t dst, const void *src)
{
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %2], 16;" :: "r"(dst), "l"(src), "n"(AT) : "memory");
}
__device__ __forceinline__ uint32_t moqk_read4(uint32_t at) { uint32_t v; asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory"); return v; }
__device__ __forceinline__ uint2 moqk_read8(uint32_t at) { uint2 v; asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory"); return v; }

/* The same into what keeps its value where they are not wanted. */
__device__ __forceinline__ void moqk_read8_if(int wanted, uint32_t at, float2 &v)
{
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p ld.shared.v2.f32 {%0, %1}, [%2]; }" : "+f"(v.x), "+f"(v.y) : "r"(at), "r"(wanted) : "memory");
}
__device__ __forceinline__ void moqk_read2_if(int wanted, uint32_t at, uint32_t &v)
{
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.shared.u16 %0, [%1]; }" : "+r"(v) : "r"(at), "r"(wanted) : "memory");
}

/* Room of a warp for a block of 64 columns of its weights, 2 x 16 rows; of that and the scales of `blocks` such. */
__host__ __device__ static constexpr int moqk_stream_block(int form, int grouped)
{
    return 256 * moqk_fast_bits(form) + (form > MOQK_MXFP4 && grouped ? 384 : 0);
}
__host__ __device__ static constexpr int moqk_stream_bytes(int form, int grouped, int blocks)
{
    return blocks * moqk_stream_block(form, grouped) + (form <= MOQK_MXFP4 ? 512 : 0);
}

/* A warp's 16 rows as left operands. GROUPED: 0 no scales of groups (those of 4-bit floats are always on the weights), 1 they multiply the weights, 2 the
   caller's sums. VALUES: E4M3 comes out as its values, and x needs no factor (see moqk_form_x). */
template <int FORM, int GROUPED, int VALUES = 0> struct moqk_operands {
    static constexpr int BLOCKS = moqk_chunk_cols(FORM) / 64, UNITS = 4 / BLOCKS;
    /* U4 whose scales bring it up: the low 8 bits of a BF16 are an integer times 2^-133, so codes of row g are so, those of row g + 8 (bits 7..4) times
       2^-129; both leave as value * 2^-45. Scales between 2^-81 and 2^39 lose nothing. */
    static constexpr int LINEAR = GROUPED == 1 && FORM == MOQK_FAST_U4;
    float2 scale[2];           /* of the block that was fetched last, 32 columns each */
    uint32_t zero[2];
    uint32_t z[2];             /* zero points of whole rows */
    int32_t shift;             /* 2^shift columns are a group */

    /* both: zero points of the lane's two rows. */
    __device__ __forceinline__ void whole_zeros(uint32_t both)
    {
        if (FORM == MOQK_FAST_U8) {
            z[0] = moqk_pack((float)(both & 255) - 128.0f, (float)(both & 255) - 128.0f);
            z[1] = moqk_pack((float)(both >> 8) - 128.0f, (float)(both >> 8) - 128.0f);
        } else {
            z[0] = (both & 255) * 0x00010001u | 0x43004300u;
            z[1] = (both >> 8) * 0x00010001u | 0x43004300u;
        }
    }

    /* A block as left operands of four products. bytes: 4-bit floats' scales of rows g and g + 8 for each product, in half `half` of a word. */
    __device__ __forceinline__ void decode_words(const uint4 (&w)[UNITS], const uint32_t (&bytes)[4], int half, uint32_t (&a)[16]) const
    {
        uint32_t zz[2] = {z[0], z[1]}, s[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t r4[4];
            if (FORM <= MOQK_MXFP4) {
                const uint32_t both = moqk_scale_both<FORM>(bytes[i], half);
                s[0] = moqk_low_twice(both);
                s[1] = moqk_high_twice(both);
            }
            if (GROUPED == 1 && (i == 0 || (i == 2 && shift < 6))) {
                const float up = FORM == MOQK_FAST_E4M3 ? 1298074214633706907132624082305024.0f : /* 2^110: E4M3 decodes as value * 2^-120 */
                                 FORM == MOQK_FAST_U4 ? 309485009821345068724781056.0f : 1.0f, more = LINEAR ? up / 16 : up; /* 2^88 */
                s[0] = moqk_pack(scale[i / 2].x * up, scale[i / 2].x * up);
                s[1] = moqk_pack(scale[i / 2].y * more, scale[i / 2].y * more);
            }
            if (LINEAR && (i == 0 || (i == 2 && shift < 6))) {
                zz[0] = __byte_perm(zero[i / 2], 0, 0x4040);
                zz[1] = moqk_mul_pair(__byte_perm(zero[i / 2], 0, 0x4141), 0x41804180u);
            } else if (GROUPED && FORM == MOQK_FAST_U4 && (i == 0 || (i == 2 && shift < 6))) {
                zz[0] = (zero[i / 2] & 255) * 0x00010001u | 0x43004300u;
                zz[1] = (zero[i / 2] >> 8 & 255) * 0x00010001u | 0x43004300u;
            }
            if (LINEAR) {
                const uint32_t v = moqk_word_of(w[0], i);
#pragma unroll
                for (int r = 0; r < 4; r++) r4[r] = moqk_sub_pair((r & 2 ? v >> 8 : v) & (r & 1 ? 0x00f000f0u : 0x000f000fu), zz[r & 1]);
            } else moqk_fast_decode<FORM>(w, i, zz, r4);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                if (FORM <= MOQK_MXFP4 || GROUPED == 1) a[4 * i + r] = moqk_mul_pair(r4[r], s[r & 1]);
                else if (FORM == MOQK_FAST_E4M3 && VALUES) a[4 * i + r] = moqk_mul_pair(r4[r], 0x7b807b80u); /* 2^120 */
                else asm volatile("mov.b32 %0, %1;" : "=r"(a[4 * i + r]) : "r"(r4[r])); /* loads must not arrive where a product reads */
            }
        }
    }
};

/* The weights of a warp's rows, 16 of a tile's first 64 and 16 of the others, block of 64 columns by block. They go through shared memory, each lane's by
   itself: loads into registers would be moved to where they are used. A block's room is free when its words are in registers. */
template <int FORM, int GROUPED> struct moqk_stream {
    typedef moqk_operands<FORM, GROUPED> T;
    static constexpr int BLOCKS = T::BLOCKS, UNITS = T::UNITS, CODES = UNITS * 512, EACH = moqk_stream_block(FORM, GROUPED);
    T rows[2];
    const uint8_t *src;        /* the lane's first codes */
    const float2 *scales;
    const uint16_t *zeros;
    int32_t apart, groups_apart; /* from the first 16 rows to the others: bytes of codes, groups of 8 scales */
    uint32_t room, bytes_room; /* shared memory of the warp: blocks; scales of a chunk of 4-bit floats */
    uint2 bytes[2];            /* these scales */
    int32_t chunks, groups, wrap;
    uint4 w[2][UNITS];         /* the block that was fetched last */

    /* Sixteen rows from row_tile * 16 on, and from (row_tile + 4) * 16 on; past the end the last ones again, for rows that nobody stores. */
    __device__ __forceinline__ void open(const moqk_part &p, int32_t row_tile, int32_t w_units, uint32_t shared_room, int32_t slots)
    {
        const int32_t lane = threadIdx.x & 31, tiles = (p.rows + 15) / 16, more = min(row_tile + 4, tiles - 1) - min(row_tile, tiles - 1);
        const int64_t tile = min(row_tile, tiles - 1);
        room = shared_room + lane * 16;
        bytes_room = shared_room + slots * EACH + lane * 8;
        wrap = w_units * 4;
        chunks = (p.cols + moqk_chunk_cols(FORM) - 1) / moqk_chunk_cols(FORM);
        src = p.packed[0] + tile * chunks * moqk_chunk_bytes(FORM) + moqk_fast_slot(FORM, lane) * 16;
        apart = more * chunks * moqk_chunk_bytes(FORM);
        if (FORM <= MOQK_MXFP4) return;
        groups = GROUPED ? (chunks * moqk_chunk_cols(FORM) + p.group - 1) >> (__ffs(p.group) - 1) : 1;
        groups_apart = more * groups * 8;
        scales = (const float2 *)(p.packed[0] + moqk_scales_at<FORM>(p)) + tile * groups * 8 + (lane >> 2);
        zeros = (const uint16_t *)(p.packed[0] + moqk_scales_at<FORM>(p) + (int64_t)tiles * groups * 64) + tile * groups * 8 + (lane >> 2);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            rows[r].shift = GROUPED ? __ffs(p.group) - 1 : 31;
            rows[r].z[0] = rows[r].z[1] = 0;
            if (FORM == MOQK_FAST_U8 || (FORM == MOQK_FAST_U4 && !GROUPED)) rows[r].whole_zeros(zeros[r * groups_apart]);
        }
    }

    /* Asks for block `at`. A chunk's scales come with its first block: up to three blocks ahead, when those of the chunk before are in registers. */
    __device__ __forceinline__ void ask(int32_t at, int32_t slot)
    {
        const int lane = threadIdx.x & 31;
        if (at >= wrap) at -= wrap;
        const uint32_t chunk = min((uint32_t)at / BLOCKS, (uint32_t)chunks - 1), from = chunk * moqk_chunk_bytes(FORM) + (uint32_t)at % BLOCKS * CODES;
        const uint32_t to = room + slot * EACH;
        const uint8_t *const each[2] = {src + from, src + from + apart};
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int i = 0; i < UNITS; i++) moqk_copy_async(to + r * CODES + i * 512, each[r] + i * 512);
            if (FORM <= MOQK_MXFP4 && at % 4 == 0)
                moqk_copy_async8(bytes_room + r * 256, each[r] + (2048 - moqk_fast_slot(FORM, lane) * 16 + (FORM == MOQK_NVFP4 ? lane : lane >> 1) * 8));
            if (GROUPED && (lane & 3) < 2) { /* lanes 0 and 1 of a quad: 32 columns each */
                const int32_t group = min((at * 64 + (lane & 1) * 32) >> rows[0].shift, groups - 1) * 8 + r * groups_apart;
                const uint32_t here = to - lane * 16 + 2 * CODES + r * 192 + (lane & 1) * 96;
                moqk_copy_async8(here + (lane >> 2) * 8, scales + group);
                if (FORM == MOQK_FAST_U4 && !(lane & 4)) moqk_copy_async4(here + 64 + (lane >> 3) * 4, zeros + group); /* of two rows */
            }
        }
    }

    /* Block `at` from `slot`. All lanes' scales are there. */
    __device__ __forceinline__ void fetch(int32_t at, int32_t slot)
    {
        const int lane = threadIdx.x & 31;
        const uint32_t from = room + slot * EACH;
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int i = 0; i < UNITS; i++) w[r][i] = moqk_read16(from + r * CODES + i * 512);
            if (FORM <= MOQK_MXFP4 && at % 4 == 0) bytes[r] = moqk_read8(bytes_room + r * 256);
            if (GROUPED)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const uint32_t here = from - lane * 16 + 2 * CODES + r * 192 + h * 96;
                    const uint2 v = moqk_read8(here + (lane >> 2) * 8);
                    rows[r].scale[h] = make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
                    if (FORM == MOQK_FAST_U4) rows[r].zero[h] = moqk_read4(here + 64 + (lane >> 3) * 4) >> (lane >> 2 & 1) * 16;
                }
        }
    }

    /* The block `at` that was fetched, as left operands of four products for each 16 rows. A unit has four blocks: `at` may go on past `wrap`. */
    __device__ __forceinline__ void decode(int32_t at, uint32_t (&a)[2][16]) const
    {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint32_t v = (at & 2) == 0 ? bytes[r].x : bytes[r].y, each[4] = {v, v, v, v};
            rows[r].decode_words(w[r], each, at & 1, a[r]);
        }
    }
};

/* ------------------------------------------------------------------------------------------------
   >>cuda-gemm-wgmma   17 and more rows of x on compute capability 9.0: wgmma with decoded weights in registers
   Warps copy weights and tiles of x into two rings in shared memory; two warpgroups of 64 rows (few tokens: two pairs of them) decode a slab of 64 columns
   while the tensor cores work on the one before. The next tile is on its way while the last one is stored, and the first weights before x is there.
   ------------------------------------------------------------------------------------------------ */

#if MOQK_WGMMA
/* D[64 x N] += A[64 x 16] (registers) B[16 x N] (shared memory, 128-byte swizzle), four of them behind each other along a slab; `add` 0: D = A B. One
   statement for the four: what the compiler spends on N registers that go into it and come out again is what compiling these kernels costs. Lists of
   registers; then the letter of D's, the numbers of the operands behind them, and what stands behind all of them: signs and order. */
#define MOQK_L8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define MOQK_L16 MOQK_L8(0, 1, 2, 3, 4, 5, 6, 7) "," MOQK_L8(8, 9, 10, 11, 12, 13, 14, 15)
#define MOQK_L32 MOQK_L16 "," \
    MOQK_L8(16, 17, 18, 19, 20, 21, 22, 23) "," MOQK_L8(24, 25, 26, 27, 28, 29, 30, 31)
#define MOQK_L64 MOQK_L32 "," MOQK_L8(32, 33, 34, 35, 36, 37, 38, 39) "," MOQK_L8(40, 41, 42, 43, 44, 45, 46, 47) "," MOQK_L8(48, 49, 50, 51, 52, 53, 54, 55) "," \
    MOQK_L8(56, 57, 58, 59, 60, 61, 62, 63)
#define MOQK_L80 MOQK_L64 "," MOQK_L8(64, 65, 66, 67, 68, 69, 70, 71) "," MOQK_L8(72, 73, 74, 75, 76, 77, 78, 79)
#define MOQK_L76 MOQK_L64 "," MOQK_L8(64, 65, 66, 67, 68, 69, 70, 71) ",%72,%73,%74,%75"
#define MOQK_L96 MOQK_L80 "," MOQK_L8(80, 81, 82, 83, 84, 85, 86, 87) "," MOQK_L8(88, 89, 90, 91, 92, 93, 94, 95)
#define MOQK_L128 MOQK_L64 "," MOQK_L8(64, 65, 66, 67, 68, 69, 70, 71) "," MOQK_L8(72, 73, 74, 75, 76, 77, 78, 79) "," MOQK_L8(80, 81, 82, 83, 84, 85, 86, 87) "," \
    MOQK_L8(88, 89, 90, 91, 92, 93, 94, 95) "," MOQK_L8(96, 97, 98, 99, 100, 101, 102, 103) "," MOQK_L8(104, 105, 106, 107, 108, 109, 110, 111) "," \
    MOQK_L8(112, 113, 114, 115, 116, 117, 118, 119) "," MOQK_L8(120, 121, 122, 123, 124, 125, 126, 127)
#define MOQK_D4(kind, i) kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3])
#define MOQK_D16(kind, i) MOQK_D4(kind, i), MOQK_D4(kind, i + 4), MOQK_D4(kind, i + 8), MOQK_D4(kind, i + 12)
#define MOQK_D32(kind, i) MOQK_D16(kind, i), MOQK_D16(kind, i + 16)
#define MOQK_WGMMA_NEXT(shape, signs, list, a0, a1, a2, a3, at, k) \
    "add.u32 x, %" #at ", " #k "; mov.b64 q, {x, 1073741888}; wgmma.mma_async.sync.aligned." shape " {" list "}, " \
    "{%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, q, t" signs "; "
#define MOQK_WGMMA_OF(name, type, count, shape, signs, list, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, at, more, ...) \
    __device__ __forceinline__ void name(type (&d)[count], const uint32_t *a, uint32_t desc, int add) \
    { \
        asm volatile("{ .reg .pred p, t; .reg .b32 x; .reg .b64 q; setp.eq.b32 t, 0, 0; setp.ne.b32 p, %" #more ", 0; " \
                     "mov.b64 q, {%" #at ", 1073741888}; " /* 64 | 1 << 30: see moqk_x_desc */ \
                     "wgmma.mma_async.sync.aligned." shape " {" list "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, q, p" signs "; " \
                     MOQK_WGMMA_NEXT(shape, signs, list, a4, a5, a6, a7, at, 2) MOQK_WGMMA_NEXT(shape, signs, list, a8, a9, a10, a11, at, 4) \
                     MOQK_WGMMA_NEXT(shape, signs, list, a12, a13, a14, a15, at, 6) "}" \
                     : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]), "r"(a[6]), "r"(a[7]), "r"(a[8]), "r"(a[9]), \
                       "r"(a[10]), "r"(a[11]), "r"(a[12]), "r"(a[13]), "r"(a[14]), "r"(a[15]), "r"(desc), "r"(add)); \
    }
MOQK_WGMMA_OF(moqk_wgmma, float, 16, "m64n32k16.f32.bf16.bf16", ", 1, 1, 0", MOQK_L16, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33,
              MOQK_D16("+f", 0))
MOQK_WGMMA_OF(moqk_wgmma, float, 32, "m64n64k16.f32.bf16.bf16", ", 1, 1, 0", MOQK_L32, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49,
              MOQK_D32("+f", 0))
MOQK_WGMMA_OF(moqk_wgmma, float, 64, "m64n128k16.f32.bf16.bf16", ", 1, 1, 0", MOQK_L64, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80,
              81, MOQK_D32("+f", 0), MOQK_D32("+f", 32))
MOQK_WGMMA_OF(moqk_wgmma, float, 76, "m64n152k16.f32.bf16.bf16", ", 1, 1, 0", MOQK_L76, 76, 77, 78, 79, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 91, 92,
              93, MOQK_D32("+f", 0), MOQK_D32("+f", 32), MOQK_D4("+f", 64), MOQK_D4("+f", 68), MOQK_D4("+f", 72))
MOQK_WGMMA_OF(moqk_wgmma, float, 80, "m64n160k16.f32.bf16.bf16", ", 1, 1, 0", MOQK_L80, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 91, 92, 93, 94, 95, 96,
              97, MOQK_D32("+f", 0), MOQK_D32("+f", 32), MOQK_D16("+f", 64))
MOQK_WGMMA_OF(moqk_wgmma, float, 96, "m64n192k16.f32.bf16.bf16", ", 1, 1, 0", MOQK_L96, 96, 97, 98, 99, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110,
              111, 112, 113, MOQK_D32("+f", 0), MOQK_D32("+f", 32), MOQK_D32("+f", 64))
MOQK_WGMMA_OF(moqk_wgmma, float, 128, "m64n256k16.f32.bf16.bf16", ", 1, 1, 0", MOQK_L128, 128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139, 140,
              141, 142, 143, 144, 145, MOQK_D32("+f", 0), MOQK_D32("+f", 32), MOQK_D32("+f", 64), MOQK_D32("+f", 96))
/* The same of bytes: A[64 x 32] B[32 x N]. */
MOQK_WGMMA_OF(moqk_wgmma_bytes, float, 32, "m64n64k32.f32.e4m3.e4m3", ", 1, 1", MOQK_L32, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48,
              49, MOQK_D32("+f", 0))
MOQK_WGMMA_OF(moqk_wgmma_bytes, float, 64, "m64n128k32.f32.e4m3.e4m3", ", 1, 1", MOQK_L64, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80,
              81, MOQK_D32("+f", 0), MOQK_D32("+f", 32))
MOQK_WGMMA_OF(moqk_wgmma_bytes, float, 80, "m64n160k32.f32.e4m3.e4m3", ", 1, 1", MOQK_L80, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 91, 92, 93, 94, 95, 96,
              97, MOQK_D32("+f", 0), MOQK_D32("+f", 32), MOQK_D16("+f", 64))
MOQK_WGMMA_OF(moqk_wgmma_bytes, int, 64, "m64n128k32.s32.s8.s8", "", MOQK_L64, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80, 81,
              MOQK_D32("+r", 0), MOQK_D32("+r", 32))
MOQK_WGMMA_OF(moqk_wgmma_bytes, int, 80, "m64n160k32.s32.s8.s8", "", MOQK_L80, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 91, 92, 93, 94, 95, 96, 97,
              MOQK_D32("+r", 0), MOQK_D32("+r", 32), MOQK_D16("+r", 64))
MOQK_WGMMA_OF(moqk_wgmma_bytes, int, 128, "m64n256k32.s32.s8.s8", "", MOQK_L128, 128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139, 140, 141, 142,
              143, 144, 145, MOQK_D32("+r", 0), MOQK_D32("+r", 32), MOQK_D32("+r", 64), MOQK_D32("+r", 96))

__device__ __forceinline__ uint32_t moqk_of_block(uint32_t at, uint32_t rank)
{
    uint32_t r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(at), "r"(rank));
    return r;
}

/* Barriers that the blocks of a cluster have alike: rings are free; the sums of 32 tokens that the warpgroup is sent are there. */
struct moqk_share {
    static constexpr int ROUNDS = 5; /* of 32 tokens: half of the largest tile */
    uint32_t free, ready;

    __device__ __forceinline__ moqk_share(uint32_t at, int group) : free(at), ready(at + (1 + group % 2 * ROUNDS) * 8) {}
    /* The warpgroup does not read the rings any more, and waits for the sums of `own` times 8 tokens. Nothing that was written is handed over: no fence. */
    __device__ __forceinline__ void tell(int own, int group, int thread, int blocks) const
    {
        if (thread < (own + 3) / 4) moqk_barrier_expect(ready + thread * 8, (uint32_t)((blocks - 1) * min(own - thread * 4, 4) * 2048));
        moqk_sync_group(group);
        if (thread < blocks) asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" :: "r"(moqk_of_block(free, thread)) : "memory");
    }
};

/* Four sums into the shared memory of a block of the cluster, where `bar` counts the bytes. */
__device__ __forceinline__ void moqk_send4(uint32_t to, uint32_t bar, const float *v)
{
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                 :: "r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(bar) : "memory");
}
__device__ __forceinline__ void moqk_send4(uint32_t to, uint32_t bar, const int *v)
{
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%1, %2, %3, %4}, [%5];"
                 :: "r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(bar) : "memory");
}
__device__ __forceinline__ void moqk_put4(void *to, const float *v) { *(float4 *)to = make_float4(v[0], v[1], v[2], v[3]); }
__device__ __forceinline__ void moqk_put4(void *to, const int *v) { *(int4 *)to = make_int4(v[0], v[1], v[2], v[3]); }
__device__ __forceinline__ void moqk_add_bits(float *sum, uint32_t v) { *sum += __uint_as_float(v); }
__device__ __forceinline__ void moqk_add_bits(int *sum, uint32_t v) { *sum += (int)v; }

/* As moqk_finish for a tile whose columns the blocks of a cluster share, the only one that they have: each is sent the sums of some of the tokens and adds
   them up in the order of the columns, 32 tokens as soon as they are there. `ring`: both rings, which nobody needs any more:
   [block][warpgroup][8 tokens][thread] of four sums. */
template <int FORM, int GROUPED, int BM, int UNITS, typename T>
__device__ void moqk_finish_shared(const moqk_call &a, const moqk_gemm_args &b, const moqk_piece &q, const float2 *told, int group, int thread,
                                   uint8_t *ring, float *room, const moqk_share &share, const T (&d)[BM / 2])
{
    const int rank = blockIdx.x % b.split, groups = min((q.end - q.x_first + 7) / 8, BM / 8); /* of 8 tokens */
    const int each = (groups + b.split - 1) / b.split, own = max(min(each, groups - rank * each), 0); /* of a block, of this one */
    const uint32_t slot = 2 * each * 2048, here = moqk_shared_at(ring) + group * each * 2048 + thread * 16;
    share.tell(own, group, thread, b.split);
    uint8_t *mine = ring + group * each * 2048 + thread * 16 + rank * slot;
    uint32_t to = 0, bar = 0;
    int owner = -1, at = each;
    moqk_barrier_wait(share.free, 0);
#pragma unroll
    for (int i = 0; i < BM / 8; i++, at++) {
        if (i >= groups) break;
        if (at == each) {
            at = 0;
            to = moqk_of_block(moqk_shared_at(mine), ++owner);
            bar = moqk_of_block(share.ready, owner);
        }
        if (owner != rank) moqk_send4(to + at * 2048, bar + at / 4 * 8, d + 4 * i);
    }
#pragma unroll
    for (int i = 0; i < BM / 8; i++) /* behind what others wait for */
        if (i >= rank * each && i - rank * each < own) moqk_put4(mine + (i - rank * each) * 2048, d + 4 * i);
    const moqk_turned<T> rows(a, q, told, group, thread);
    const int whole = rows.fits(a, q, group);
#pragma unroll 1
    for (int i = 0; i < own; i += 4) {
        const int32_t first = q.x_first + (rank * each + i) * 8;
        const int tokens = min((own - i) * 8, 32);
        const uint32_t turned = moqk_shared_at(room) + i / 4 % 2 * 4096; /* two rooms: what was written before the last meeting was read */
        T sum[16];
        moqk_barrier_wait(share.ready + i / 4 * 8, 0);
#pragma unroll
        for (int k = 0; k < 16; k++) sum[k] = 0;
#pragma unroll 1
        for (uint32_t c = 0, from = here + i * 2048; c < (uint32_t)b.split; c++, from += slot)
#pragma unroll
            for (int u = 0; u < 4; u++) { /* past the end whatever lies there, for tokens that nobody stores */
                const uint4 v = moqk_read16(from + u * 2048);
                moqk_add_bits(sum + 4 * u, v.x);
                moqk_add_bits(sum + 4 * u + 1, v.y);
                moqk_add_bits(sum + 4 * u + 2, v.z);
                moqk_add_bits(sum + 4 * u + 3, v.w);
            }
        if (whole) {
            if (!UNITS) moqk_apply_units(b, q, thread, first, sum);
            rows.template turn<32, UNITS>(b, q, thread, turned, first, sum);
            moqk_sync_group(group);
            rows.put(a, q, thread, turned, first, tokens);
            continue;
        }
        moqk_sync_group(group);
        moqk_lay_sums<32>(room, thread, sum, 0);
        moqk_sync_group(group);
        const moqk_rows o = moqk_rows_of<FORM, GROUPED>(a, b, q, told, group, thread & 15);
#pragma unroll 1
        for (int token = thread >> 4; token < tokens; token += 8)
            moqk_put_rows(a, b, q, o, first + token, *(const float4 *)(room + token * 68 + (thread & 15) * 4));
    }
}

/* A box of moqk_maps::whole or part: tokens from `row` on, slabs from `slab` on. */
__device__ __forceinline__ void moqk_copy_slabs(uint32_t to, const CUtensorMap *map, int row, int slab, uint32_t bar)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
                 :: "r"(to), "l"(map), "r"(0), "r"(row), "r"(slab), "r"(bar) : "memory");
}

/* The ring: stage of the next tile of x, its round. */
struct moqk_stage {
    int at, parity;
    __device__ __forceinline__ void step(int ring, int by = 1) { if ((at += by) >= ring) { at -= ring; parity ^= 1; } }
};

#endif

/* ---- two rings of shared memory: weights and x ---- */

/* A unit of 256 columns is UNIT slabs of x (128 bytes of a token each: 64 columns as BF16, 128 as bytes). A stage of the first ring is the weights of a unit
   (BF16: of two slabs or one, bytes as they are: of one): codes of eight tiles of 16 rows, for 4-bit floats with their scales; then scales and zero points of
   groups. A stage of the second is X_SLABS slabs of x and, for bytes with scales of their own, those. Few and large copies: the copy engine takes about 90
   cycles for each. Warps of the last warpgroup fill them: 0 codes, 1 x, 2 scales; 3 finds the pieces for all others and then what their rows are multiplied
   by: loads that stand in line behind the first weights. Weights do not wait for the kernel before. */
/* Warpgroups that multiply: two, of 64 rows each. Decoding for few tokens takes longer than their products: then two pairs of them take units in turn,
   each with sums of its own, which are added up in the end. */
__host__ __device__ static constexpr int moqk_teams(int form, int tokens, int bytes) { return !bytes && tokens <= 64 && moqk_fast_bits(form) == 4 ? 4 : 2; }

/* What warp 3 says of a piece; no `more`: there is none. rows: see moqk_row_of; they come later, with a barrier of their own. */
typedef struct moqk_told { moqk_piece q; float2 rows[128]; int32_t more; } moqk_told;

template <int FORM, int GROUPED, int BM, int BYTES> struct moqk_rings {
    static constexpr int UNIT = BYTES ? 2 : 4, BITS = moqk_fast_bits(FORM), W_SLABS = BITS == 16 ? (BM <= 128 ? 2 : 1) : BITS == 8 && BYTES ? 1 : UNIT;
    static constexpr int STAGES = UNIT / W_SLABS, TEAMS = moqk_teams(FORM, BM, BYTES), HALVES = TEAMS / 2; /* warpgroups that multiply; see moqk_teams */
    static constexpr int TILES = 8; /* of 16 rows */
    static constexpr int W_COLS = 256 / STAGES, TILE = BITS == 4 ? moqk_chunk_bytes(FORM) : (BITS == 8 && !BYTES) || (BITS == 16 && W_SLABS == 2) ? 4096 : 2048;
    static constexpr int HAS_GROUPS = FORM > MOQK_MXFP4 && GROUPED, GROUPS = HAS_GROUPS ? (BYTES ? W_COLS / 128 : 8) : 0, ZEROS = FORM == MOQK_FAST_U4 ? 16 : 0;
    static constexpr int SCALES_AT = TILES * TILE, ZEROS_AT = SCALES_AT + TILES * GROUPS * 64;
    static constexpr int W_STAGE = (ZEROS_AT + TILES * GROUPS * ZEROS + 1023) / 1024 * 1024;
    static constexpr int W_RING = BITS == 4 ? (BM <= 32 ? 6 : BM <= 64 ? 4 : BM <= 256 ? 3 : 2)
                                : BITS == 8 ? (W_COLS < 256 ? 4 : 2) : BM <= 128 ? 3 : BM <= 256 ? 4 : 3;
    static constexpr int X_SLABS = BM <= 64 ? UNIT : BM <= (BYTES || BITS == 16 ? 128 : 192) ? 2 : 1;
    static constexpr int X_SCALED = BYTES && FORM == MOQK_FAST_E4M3 && GROUPED, X_SCALES_AT = X_SLABS * BM * 128;
    static constexpr int X_STAGE = (X_SCALES_AT + (X_SCALED ? X_SLABS * BM * 4 : 0) + 1023) / 1024 * 1024;
    /* Behind the rings: room of two warpgroups for the sums of 32 tokens or, if it is left, as much as it takes to store them without waiting; barriers,
       what is said of two pieces. */
    static constexpr int BARS = 50, SMALL = 9216, LARGE = 16384, PARTS = BARS * 8 + 2 * (int)sizeof(moqk_told) + 16;
    static constexpr int x_ring(int room)
    {
        return (232448 - 1024 - 2 * room - PARTS - W_RING * W_STAGE) / X_STAGE > 8 ? 8 : (232448 - 1024 - 2 * room - PARTS - W_RING * W_STAGE) / X_STAGE;
    }
    static constexpr int ROOM = BM > 64 && x_ring(LARGE) == x_ring(SMALL) ? LARGE : SMALL, REST = 2 * ROOM + PARTS, X_RING = x_ring(ROOM);
    /* Barriers of stages of x that are there. Halves take units in turn: in a ring of an odd number they take each stage in turn, too, and one that runs
       ahead would see the round before its last as the one that it waits for. Then each half has barriers of its own. */
    static constexpr int X_FULL = HALVES > 1 && X_RING % 2 ? 2 * X_RING : X_RING;
    static_assert(X_FULL <= 8 && (HALVES == 1 || W_RING % 2 == 0), "room of barriers; stages of weights that are one half's");
    static constexpr int BUFFERS = ROOM / (moqk_turn_tokens(BM) * 128), ROOM_AT = W_RING * W_STAGE + X_RING * X_STAGE, BARS_AT = ROOM_AT + 2 * ROOM;
    static constexpr int TOLD_AT = BARS_AT + BARS * 8, FLAGS_AT = TOLD_AT + 2 * (int)sizeof(moqk_told);
    static constexpr int SHARED = 1024 + ROOM_AT + REST;

    uint32_t x, w, x_full, x_empty, w_full, w_empty, share, told_full, told_rows, told_empty; /* in shared memory; w: stages of weights */

    __device__ __forceinline__ void open(uint32_t base)
    {
        x = base; /* aligned to 1024 */
        w = base + X_RING * X_STAGE;
        x_full = base + BARS_AT;
        x_empty = x_full + 8 * 8;
        w_full = x_empty + 8 * 8;
        w_empty = w_full + 6 * 8;
        share = w_empty + 6 * 8;
        told_full = share + 12 * 8;
        told_rows = told_full + 2 * 8;
        told_empty = told_rows + 2 * 8;
    }

#if MOQK_WGMMA
    __device__ __forceinline__ void start(int split) const
    {
        for (int i = 0; i < X_FULL; i++) moqk_barrier_init(x_full + i * 8, 1);
        for (int i = 0; i < X_RING; i++) moqk_barrier_init(x_empty + i * 8, TILES);
        for (int i = 0; i < W_RING; i++) { moqk_barrier_init(w_full + i * 8, HAS_GROUPS ? 33 : 1); moqk_barrier_init(w_empty + i * 8, TILES); }
        for (int i = 0; i < 2; i++) {
            moqk_barrier_init(told_full + i * 8, 1);
            moqk_barrier_init(told_rows + i * 8, 32);
            moqk_barrier_init(told_empty + i * 8, TEAMS * 4 + 2 + HAS_GROUPS); /* warps that multiply, and that copy */
        }
        for (int i = 0; i <= 2 * moqk_share::ROUNDS; i++) moqk_barrier_init(share + i * 8, i ? 1 : 2 * split);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }

    /* The next piece for a warp that copies, or 0. */
    __device__ __forceinline__ int hear(const moqk_told *told, moqk_stage &heard, moqk_piece &q, int lane) const
    {
        moqk_barrier_wait(told_full + heard.at * 8, (uint32_t)heard.parity);
        q = told[heard.at].q;
        const int more = told[heard.at].more;
        __syncwarp();
        if (lane == 0) moqk_barrier_arrive(told_empty + heard.at * 8);
        heard.step(2);
        return more;
    }

    __device__ __forceinline__ void fill_codes(const moqk_gemm_args &b, const moqk_told *told, int lane) const
    {
        moqk_piece q;
        moqk_stage heard = {0, 0};
        moqk_stage s = {0, 0};
        while (hear(told, heard, q, lane)) {
            const moqk_part &p = *q.p;
            const int32_t chunks = (p.cols + moqk_chunk_cols(FORM) - 1) / moqk_chunk_cols(FORM), wrap = b.w_units * STAGES, end = q.to * STAGES;
            const uint8_t *codes = p.packed[0] + (int64_t)min(q.row_tile * 8 + lane % TILES, (p.rows + 15) / 16 - 1) * chunks * moqk_chunk_bytes(FORM);
            for (int32_t i = q.from * STAGES; i < end; i++) {
                const int32_t at = (i >= wrap ? i - wrap : i) * (TILE == 4096 ? 2 : 1), from = min(at, chunks - 1);
                const int32_t bytes = TILE == 4096 ? min(2, chunks - from) * 2048 : TILE;
                moqk_barrier_wait(w_empty + s.at * 8, s.parity ^ 1);
                if (lane == 0) moqk_barrier_expect(w_full + s.at * 8, TILES * bytes);
                __syncwarp();
                if (lane < TILES) moqk_bulk_copy(w + s.at * W_STAGE + lane * TILE, codes + (int64_t)from * moqk_chunk_bytes(FORM), bytes, w_full + s.at * 8);
                s.step(W_RING);
            }
        }
    }

    /* By ordinary copies: those of groups are small, and the copy engine takes as long for each as for 2 KB. */
    __device__ __forceinline__ void fill_scales(const moqk_gemm_args &b, const moqk_told *told, int lane) const
    {
        moqk_piece q;
        moqk_stage heard = {0, 0};
        moqk_stage s = {0, 0};
        while (hear(told, heard, q, lane)) {
            const moqk_part &p = *q.p;
            const int32_t tiles = (p.rows + 15) / 16, tile = min(q.row_tile * 8 + lane % TILES, tiles - 1), shift = __ffs(p.group) - 1;
            const int32_t cols = (p.cols + moqk_chunk_cols(FORM) - 1) / moqk_chunk_cols(FORM) * moqk_chunk_cols(FORM), groups = (cols + p.group - 1) >> shift;
            const uint8_t *rest = p.packed[0] + moqk_scales_at<FORM>(p);
            for (int32_t i = q.from * STAGES; i < q.to * STAGES; i++) {
                const int32_t col = (i >= b.w_units * STAGES ? i - b.w_units * STAGES : i) * W_COLS, first = min(col >> shift, groups - 1), n = min(max(W_COLS >> shift, 1), groups - first);
                const uint32_t to = w + s.at * W_STAGE;
                const int64_t from = (int64_t)tile * groups + first;
                moqk_barrier_wait(w_empty + s.at * 8, s.parity ^ 1);
                for (int32_t k = lane / TILES; k < n * 4; k += 32 / TILES)
                    moqk_copy_async(to + SCALES_AT + lane % TILES * (GROUPS * 64) + k * 16, rest + from * 64 + k * 16);
                for (int32_t k = lane / TILES; k < n && ZEROS; k += 32 / TILES)
                    moqk_copy_async(to + ZEROS_AT + lane % TILES * (GROUPS * 16) + k * 16, rest + (int64_t)tiles * groups * 64 + (from + k) * 16);
                asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(w_full + s.at * 8) : "memory");
                s.step(W_RING);
            }
        }
    }

    /* x as the caller has it: one copy of all slabs of a stage, for each copy costs the products some 50 clocks, or two where it holds more tokens than a
       copy may. What lies past the last token costs as much as what is there: where that is a quarter or more, or a stage is one slab, a copy a slab takes
       the others. */
    __device__ __forceinline__ void fill_direct(const moqk_maps &maps, const moqk_told *told, int lane) const
    {
        moqk_piece q;
        moqk_stage heard = {0, 0};
        constexpr int BOX = moqk_box_tokens(BM);
        moqk_stage s = {0, 0}, full = s;
        while (hear(told, heard, q, lane)) {
            const int tokens = q.end - q.first, rest = tokens % BOX, filled = X_SLABS > 1 && 4 * rest > 3 * BOX, whole = tokens / BOX + filled;
            const int copies = whole + (rest > 0 && !filled ? X_SLABS : 0);
            const int bytes = X_SLABS * 128 * (whole * BOX + (copies > whole ? rest : 0));
            for (int32_t i = q.from * UNIT; i < q.to * UNIT; i += X_SLABS) {
                const uint32_t to = x + s.at * X_STAGE, bar = x_full + full.at * 8;
                moqk_barrier_wait(x_empty + s.at * 8, s.parity ^ 1);
                if (lane == 0) moqk_barrier_expect(bar, bytes);
                __syncwarp();
                if (lane < whole) moqk_copy_slabs(to + lane * (BOX * 128), &maps.whole, q.first + lane * BOX, i, bar);
                else if (lane < copies)
                    moqk_copy_slabs(to + (lane - whole) * (BM * 128) + whole * (BOX * 128), &maps.part, q.first + whole * BOX, i + lane - whole, bar);
                s.step(X_RING);
                full.step(X_FULL);
            }
        }
    }

    /* One copy where the tokens of all slabs are one tile and lie together. */
    __device__ __forceinline__ void fill_x(const moqk_gemm_args &b, const moqk_told *told, int lane) const
    {
        moqk_piece q;
        moqk_stage heard = {0, 0};
        const int copies = b.tokens == BM ? 1 : X_SLABS;
        moqk_stage s = {0, 0}, full = s;
        while (hear(told, heard, q, lane))
            for (int32_t i = q.from * UNIT; i < q.to * UNIT; i += X_SLABS) {
                const int64_t from = (int64_t)(i + (lane & 15)) * b.tokens + q.x_first;
                const uint32_t to = x + s.at * X_STAGE, bar = x_full + full.at * 8;
                moqk_barrier_wait(x_empty + s.at * 8, s.parity ^ 1);
                if (lane == 0) moqk_barrier_expect(bar, X_SLABS * BM * (X_SCALED ? 132 : 128));
                __syncwarp();
                if (lane < copies) moqk_bulk_copy(to + lane * (BM * 128), b.x16 + from * 128, X_SLABS / copies * (BM * 128), bar);
                if (X_SCALED && lane >= 16 && lane < 16 + copies)
                    moqk_bulk_copy(to + X_SCALES_AT + (lane & 15) * (BM * 4), (const uint8_t *)(b.x_scale + from), X_SLABS / copies * (BM * 4), bar);
                s.step(X_RING);
                full.step(X_FULL);
            }
    }

    /* Finds the pieces for all others; what their rows are multiplied by is needed last. */
    __device__ __forceinline__ void tell(const moqk_call &a, const moqk_gemm_args &b, moqk_told *told, int lane) const
    {
        moqk_stage s = {0, 0};
        moqk_piece q;
        q.at = -1;
        while (1) {
            const int more = moqk_next_piece<FORM, GROUPED, BM>(a, b, &q);
            moqk_barrier_wait(told_empty + s.at * 8, s.parity ^ 1);
            if (lane == 0) {
                told[s.at].q = q;
                told[s.at].more = more;
                moqk_barrier_arrive(told_full + s.at * 8);
            }
            if (!more) return;
#pragma unroll
            for (int i = lane; i < 128; i += 32) told[s.at].rows[i] = moqk_row_of<FORM, GROUPED>(b, q, i);
            moqk_barrier_arrive(told_rows + s.at * 8);
            s.step(2);
        }
    }

    /* The last warpgroup. */
    __device__ __forceinline__ void fill(const moqk_call &a, const moqk_gemm_args &b, const moqk_maps &maps, moqk_told *told, int warp, int lane) const
    {
        if (warp == 3) tell(a, b, told, lane);
        if (warp == 0) fill_codes(b, told, lane);
        if (warp == 2 && HAS_GROUPS) fill_scales(b, told, lane);
        if (warp != 1) return;
        if (!BYTES && b.direct && lane < 2) asm volatile("prefetch.tensormap [%0];" :: "l"(lane ? &maps.part : &maps.whole) : "memory");
        if (b.y_direct && lane == 2) asm volatile("prefetch.tensormap [%0];" :: "l"(&maps.y) : "memory");
        moqk_wait_for_before();
        moqk_dependents_may_start();
        if (!BYTES && b.direct) fill_direct(maps, told, lane);
        else fill_x(b, told, lane);
    }
#endif
};

#if MOQK_WGMMA
/* The weights of a warp's 16 rows out of their ring, block of 64 columns by block, as left operands of BF16. */
template <int FORM, int GROUPED, int BM> struct moqk_staged : moqk_operands<FORM, GROUPED, 1> {
    typedef moqk_rings<FORM, GROUPED, BM, 0> R;
    using moqk_operands<FORM, GROUPED, 1>::UNITS;
    using moqk_operands<FORM, GROUPED, 1>::shift;
    moqk_stage next;
    int32_t warp, chunks, wrap;
    uint32_t turned;           /* of 4-bit floats: where the lane's row of its matrix lies in a block's codes */
    uint4 w[UNITS];
    uint32_t each[4];          /* scales of 4-bit floats: a word is those of two blocks */

    __device__ __forceinline__ void open(const moqk_part &p, int32_t row_tile, int32_t w_units)
    {
        const int32_t lane = threadIdx.x & 31, tiles = (p.rows + 15) / 16;
        chunks = (p.cols + moqk_chunk_cols(FORM) - 1) / moqk_chunk_cols(FORM);
        wrap = w_units;
        turned = (uint32_t)moqk_fast_slot(FORM, (lane & 7) * 4 + (lane >> 3)) * 16;
        shift = GROUPED ? __ffs(p.group) - 1 : 31;
        if (GROUPED) asm volatile("" : "+r"(shift)); /* a register, or it is found anew for every block */
        this->z[0] = this->z[1] = 0;
        if (!GROUPED && (FORM == MOQK_FAST_U8 || FORM == MOQK_FAST_U4)) {
            const uint8_t *zeros = p.packed[0] + moqk_scales_at<FORM>(p) + (int64_t)tiles * 64;
            this->whole_zeros(((const uint16_t *)(const void *)zeros)[min(row_tile, tiles - 1) * 8 + (lane >> 2)]);
        }
    }

    /* Block b (0..3) of a unit comes into registers: codes, scales, zero points. */
    __device__ __forceinline__ void fetch(const R &r, int32_t unit, int b)
    {
        const int lane = threadIdx.x & 31;
        const uint32_t stage = r.w + next.at * R::W_STAGE;
        if (b % R::W_SLABS == 0) moqk_barrier_wait(r.w_full + next.at * 8, (uint32_t)next.parity);
        if (unit >= wrap) unit -= wrap;
        uint32_t codes = stage + warp * R::TILE;
        const uint32_t scales = codes + 2048 + b / 2 * 4 + (lane >> 2) * (FORM == MOQK_NVFP4 ? 32 : 16); /* of 4-bit floats: see moqk_fast_bytes */
        if (R::BITS == 4) codes += b * 512;
        if (R::BITS == 16 && R::W_SLABS == 2) codes += (b & 1) && unit * 4 + b < chunks ? 2048 : 0;
        if (R::BITS == 8) codes += (b & 1) * 1024 + (b > 1 && unit * 2 + 1 < chunks ? 2048 : 0); /* past the end: the last chunk again */
#pragma unroll
        for (int i = 0; i < UNITS && FORM > MOQK_MXFP4; i++) w[i] = moqk_read16(codes + i * 512 + lane * 16);
        if (FORM <= MOQK_MXFP4) { /* word s of lane t is word t of lane s: the columns in their order */
            uint32_t v[4];
            moqk_load_matrices(codes + turned, v);
            w[0] = make_uint4(v[0], v[1], v[2], v[3]);
        }
        if (FORM <= MOQK_MXFP4 && b % 2 == 0)
#pragma unroll
            for (int i = 0; i < 4; i++)
                each[i] = FORM == MOQK_MXFP4 && (i & 1) ? each[i - 1] : moqk_read4(scales + (FORM == MOQK_NVFP4 ? i : i >> 1) * 8);
        if (GROUPED) {
            /* Chunks of 4 bits are whole units, of which none is past the end. No branches: loads behind one would wait for those before it. */
            const int whole = moqk_chunk_cols(FORM) == 256;
            const int32_t groups = whole ? 0 : ((chunks * moqk_chunk_cols(FORM) - 1) >> shift) + 1, first = whole ? 0 : min((unit * 256) >> shift, groups - 1);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int wanted = h == 1 ? shift < 6 : b % 2 == 0 || shift < 7; /* else those of the block before, or the same once more */
                const int32_t g = whole ? (b * 64 + h * 32) >> shift : min((unit * 256 + b * 64 + h * 32) >> shift, groups - 1) - first;
                const uint32_t at = stage + (warp * R::GROUPS + g) * 64 + (lane >> 2) * 8;
                moqk_read8_if(wanted, at + R::SCALES_AT, this->scale[h]);
                if (FORM == MOQK_FAST_U4) moqk_read2_if(wanted, stage + R::ZEROS_AT + (warp * R::GROUPS + g) * 16 + (lane >> 2) * 2, this->zero[h]);
            }
        }
        if (b % R::W_SLABS == R::W_SLABS - 1) {
            moqk_free_stage(r.w_empty + next.at * 8, lane);
            next.step(R::W_RING, R::HALVES);
        }
    }

    /* What was fetched last, as left operands of four products. */
    __device__ __forceinline__ void decode(int b, uint32_t (&a)[16]) const { this->decode_words(w, each, b & 1, a); }
};

/* What a warpgroup multiplies, and stages of x it is done with. */
template <int FORM, int GROUPED, int BM> struct moqk_consumer {
    typedef moqk_rings<FORM, GROUPED, BM, 0> R;
    static constexpr int BOX = moqk_box_tokens(BM);
    static constexpr int AHEAD = BM <= 128 && R::BITS < 16; /* else registers are short, and there is time; BF16 is not decoded */
    moqk_stage run;            /* the next product's, of X_FULL */
    int done;                  /* the next stage to free */

    /* Block b of a unit: d += its products. */
    __device__ __forceinline__ void multiply(const R &r, float (&d)[BM / 2], const uint32_t (&a)[16], int b, int add)
    {
        if (b % R::X_SLABS == 0) moqk_barrier_wait(r.x_full + run.at * 8, (uint32_t)run.parity);
        const int stage = R::X_FULL > R::X_RING && run.at >= R::X_RING ? run.at - R::X_RING : run.at;
        const uint32_t desc = moqk_x_desc(r.x + stage * R::X_STAGE + b % R::X_SLABS * (BM * 128));
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int t = 0; t < BM; t += BOX) moqk_wgmma((float (&)[BOX / 2])d[t / 2], a, desc + t * 8, add);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (b % R::X_SLABS == R::X_SLABS - 1) run.step(R::X_FULL, R::HALVES);
    }
    /* The products of block b are done: with its stage's last one the stage is free. One arrival a warp. */
    __device__ __forceinline__ void release(const R &r, int b, int lane)
    {
        if (b % R::X_SLABS != R::X_SLABS - 1) return;
        if (lane == 0) moqk_barrier_arrive(r.x_empty + done * 8);
        if ((done += R::HALVES) >= R::X_RING) done -= R::X_RING;
    }

    /* Block b of a unit is multiplied; then, while it is, the next one is decoded and the one behind that fetched. last: no unit follows. */
    __device__ __forceinline__ void step(const R &r, moqk_staged<FORM, GROUPED, BM> &w, float (&d)[BM / 2], const uint32_t (&now)[16], uint32_t (&next)[16],
                                         int32_t unit, int b, int first, int last, int lane)
    {
        multiply(r, d, now, b, !first || b > 0);
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (!first || b > 0) release(r, (b + 3) & 3, lane);
        if (!AHEAD && (b < 3 || !last)) w.fetch(r, unit + (b == 3), (b + 1) & 3);
        if (b < 3 || !last) w.decode(b + 1, next);
        if (AHEAD && (b < 2 || !last)) w.fetch(r, unit + (b >= 2), (b + 2) & 3);
    }

    /* d = every second unit of a piece, one block after the other: the other warpgroups' products hide the decoding. */
    __device__ __forceinline__ void run_half(const R &r, moqk_staged<FORM, GROUPED, BM> &w, float (&d)[BM / 2], int32_t from, int32_t to, int lane)
    {
        uint32_t a[16];
        if (from >= to) {
#pragma unroll
            for (int i = 0; i < BM / 2; i++) d[i] = 0;
            return;
        }
        w.fetch(r, from, 0);
        for (int32_t unit = from; unit < to; unit += 2)
#pragma unroll
            for (int b = 0; b < 4; b++) {
                w.decode(b, a);
                multiply(r, d, a, b, unit > from || b > 0);
                if (b < 3 || unit + 2 < to) w.fetch(r, unit + (b == 3) * 2, (b + 1) & 3);
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                release(r, b, lane);
            }
    }

    /* d = all units of a piece. */
    __device__ __forceinline__ void run_units(const R &r, moqk_staged<FORM, GROUPED, BM> &w, float (&d)[BM / 2], int32_t from, int32_t to, int lane)
    {
        uint32_t a0[16], a1[16];
        w.fetch(r, from, 0);
        w.decode(0, a0);
        if (AHEAD) w.fetch(r, from, 1);
        for (int32_t unit = from; unit < to; unit++) {
            const int first = unit == from, last = unit + 1 == to;
            step(r, w, d, a0, a1, unit, 0, first, last, lane);
            step(r, w, d, a1, a0, unit, 1, first, last, lane);
            step(r, w, d, a0, a1, unit, 2, first, last, lane);
            step(r, w, d, a1, a0, unit, 3, first, last, lane);
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        release(r, 3, lane);
    }
};
#endif

#if MOQK_WGMMA
/* d of the first half of the units += d of the second, for the warpgroup's rows, 32 tokens at a time through its room. */
template <int BM> __device__ __forceinline__ void moqk_add_halves(float *room, int group, int half, int thread, float (&d)[BM / 2])
{
    float4 *at = (float4 *)(void *)room + thread;
#pragma unroll
    for (int r = 0; r < BM / 32; r++) {
        asm volatile("bar.sync %0, 256;" :: "r"(group + 4) : "memory"); /* the room is free */
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int k = 16 * r + 4 * i;
            if (half) at[i * 128] = make_float4(d[k], d[k + 1], d[k + 2], d[k + 3]);
        }
        asm volatile("bar.sync %0, 256;" :: "r"(group + 4) : "memory");
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int k = 16 * r + 4 * i;
            if (half) continue;
            const float4 v = at[i * 128];
            d[k] += v.x;
            d[k + 1] += v.y;
            d[k + 2] += v.z;
            d[k + 3] += v.w;
        }
    }
}
#endif

/* Grid: any number of blocks. Warpgroups but the last multiply, warps of the last copy; it gives its registers to the others. */
template <int FORM, int GROUPED, int BM>
__global__ void __launch_bounds__(128 * moqk_teams(FORM, BM, 0) + 128, 1) moqk_gemm_wgmma(const __grid_constant__ moqk_call a,
    const __grid_constant__ moqk_gemm_args b, const __grid_constant__ moqk_maps maps)
{
#if MOQK_WGMMA
    typedef moqk_rings<FORM, GROUPED, BM, 0> R;
    extern __shared__ __align__(128) uint8_t shared[];
    uint8_t *base = shared + (-moqk_shared_at(shared) & 1023);
    float *room = (float *)(void *)(base + R::ROOM_AT + (threadIdx.x >> 7 & 1) * R::ROOM);
    moqk_told *told = (moqk_told *)(void *)(base + R::TOLD_AT);
    const int thread = threadIdx.x & 127, team = threadIdx.x >> 7, group = team % 2, lane = threadIdx.x & 31, warp = thread >> 5;
    const int half = R::HALVES > 1 ? team / 2 : 0;
    R r;
    r.open(moqk_shared_at(base));
    if (threadIdx.x == 0) r.start(b.split);
    __syncthreads();
    if (b.split > 1) { moqk_cluster_arrive(0); moqk_cluster_wait(); }
    if (a.tiles) moqk_wait_for_before(); /* they say what is to be done */
    if (team == R::TEAMS) { /* all together may have what the block began with: 5 x 96 or 3 x 168 */
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(R::TEAMS == 4 ? 32 : 40));
        r.fill(a, b, maps, told, warp, lane);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(R::TEAMS == 4 ? 112 : 232));
    const moqk_share share(r.share, group);
    moqk_consumer<FORM, GROUPED, BM> k = {{half, 0}, half};
    volatile int *flags = (volatile int *)(void *)(base + R::FLAGS_AT);
    int32_t taken = 0;         /* units of the pieces before: they go to the halves in turn */
    moqk_staged<FORM, GROUPED, BM> w;
    w.next = k.run;
    w.warp = group * 4 + warp;
    float d[BM / 2];
    moqk_stage next = {0, 0};
    moqk_wait_for_before(); /* for y and the scales of tokens */
    while (1) {
        moqk_barrier_wait(r.told_full + next.at * 8, (uint32_t)next.parity);
        const moqk_told &t = told[next.at]; /* read when it is needed: registers are short */
        if (!t.more) break;
        const int32_t from = t.q.from, to = t.q.to;
        w.open(*t.q.p, t.q.row_tile * 8 + group * 4 + warp, b.w_units);
        if (R::HALVES == 1) k.run_units(r, w, d, from, to, lane);
        else k.run_half(r, w, d, from + ((taken ^ half) & 1), to, lane);
        taken += to - from;
        if (R::HALVES > 1) {
            if (!half) moqk_sums_read(b, thread);
            moqk_add_halves<BM>(room, group, half, thread, d);
        }
        const moqk_piece q = t.q;
        moqk_barrier_wait(r.told_rows + next.at * 8, (uint32_t)next.parity);
        if (R::HALVES > 1 && half) {}
        else if (b.split > 1) moqk_finish_shared<FORM, GROUPED, BM, 0>(a, b, q, t.rows, group, thread, base, room, share, d);
        else if ((from == 0 && to == b.units) || moqk_join<BM>(b, q, moqk_cut_tiles(a, b) * b.units, group, thread, flags, d))
            if (!moqk_finish_pairs<BM, R::BUFFERS, 0>(a, b, &maps.y, q, t.rows, group, thread, room, d) &&
                !moqk_finish_floats<BM, R::ROOM>(a, b, &maps.y, q, t.rows, group, thread, room, d))
                moqk_finish<FORM, GROUPED, BM>(a, b, q, t.rows, group, thread, room, d);
        moqk_free_stage(r.told_empty + next.at * 8, lane);
        next.step(2);
    }
    moqk_sums_stored(b, thread);
#endif
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-gemm-bytes   17 and more rows of x that are rounded to 8 bits as stored: products of bytes, twice as many a second as of BF16
   E4M3 x E4M3 and I8 x I8 of compute capability 9.0, with the weights of >>cuda-decode as they are: four codes of a row are a register of the
   product after one exchange of bytes. Weights of 4 bits become E4M3 in registers: integers less their zero point exactly (at most 4 bits), MXFP4
   with the scale of its group as a power of two beside the largest of its row: exact for scales within 2^9 of that one, then as E4M3 rounds
   small numbers, by 2^-11 of the row's largest scale at most.

   x8 [slab of 128 columns][tokens, padded][128], 16-byte pieces exchanged by xor with token & 7 as in x16: the inputs' codes. The scale of a token goes
   to its sums at the end, scales of 128 columns (of inputs, of weights) to the sums of 128 columns.

   Tensor cores keep about 14 bits of a sum of E4M3 products. So sums of 256 columns (with scales: of 128) are added up in F32 apart, and the error is
   2^-13 of those.
   Sums of I8 are exact in I32: fewer than 2^17 columns.
   ------------------------------------------------------------------------------------------------ */

enum { MOQK_RELATIVE = 3 }; /* GROUPED of MXFP4: scales beside the largest of the row */

/* Four values as codes of E4M3 or I8: nearest, ties to even, saturating. */
__device__ __forceinline__ uint32_t moqk_four_bytes(int elem, float a, float b, float c, float d)
{
    uint32_t w = 0;
#if MOQK_WGMMA
    if (elem == MOQ_F8_E4M3) {
        asm("{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, %2, %1; cvt.rn.satfinite.e4m3x2.f32 h, %4, %3; mov.b32 %0, {l, h}; }"
            : "=r"(w) : "f"(a), "f"(b), "f"(c), "f"(d));
    } else {
        const float v[4] = {a, b, c, d};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int code;
            asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(code) : "f"(v[i]));
            w |= (uint32_t)(code & 255) << (8 * i);
        }
    }
#endif
    return w;
}

/* v / unit, rounded correctly where it matters; `by`: 1 / unit. Quotients beyond every code only stay beyond them. */
__device__ __forceinline__ float moqk_divide(float v, float unit, float by)
{
    const float q = v * by;
    return fabsf(q) < 1073741824.0f ? fmaf(fmaf(-q, unit, v), by, q) : q;
}

/* Columns 2 k, 2 k + 1 of the 16 that a piece of x8 holds: as the weights have them. */
__device__ __forceinline__ int32_t moqk_byte_col(int form, int piece, int k)
{
    const int t = k & 3;
    return form == MOQK_MXFP4 ? (piece >> 2) * 64 + t * 16 + (piece & 3) * 2 + (k >> 2) * 8 : piece * 16 + k * 2;
}

/* x -> x8 and the scales of its tokens: what the feed would round it to, as codes. x is what the feed left (whose rounded values have the same codes
   once more), or raw. A block per token, 16 codes a thread. Reads x once, or twice where the scale is the token's. */
__global__ void __launch_bounds__(256) moqk_pack_bytes(moqk_pack_args a)
{
    __shared__ float room[33];
    moqk_dependents_may_start();
    moqk_wait_for_before();
    const int32_t m = blockIdx.x, lane = threadIdx.x & 31;
    const int64_t from = (a.row_of ? a.row_of[m] : m) * a.ldx;
    const moqk_part &p = a.part[a.expert_of ? (int64_t)a.expert_of[m] * a.expert_stride : 0];
    const float *smooth = a.raw ? p.smooth : NULL;
    const int elem = p.in_elem, by_group = p.in_dynamic && p.in_group > 0;
    const float largest = moqk_largest(elem);
    float unit = p.input_scale;
    int odd = 0;
    for (int pass = p.in_dynamic && !by_group ? 0 : 1; pass < 2; pass++) {
        float top = 0;
        for (int32_t i = threadIdx.x; i < a.slabs * 8; i += blockDim.x) {
            const int32_t slab = i >> 3, piece = i & 7;
            float v[16]; /* 2 t, 2 t + 1, 2 t + 8, 2 t + 9 become a register of lane t: see moqk_fast_col */
            uint32_t w[4];
            if (a.whole && a.form != MOQK_MXFP4) {
                moqk_get16(a, from + slab * 128 + piece * 16, slab * 128 + piece * 16 < a.cols, v);
            } else {
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    const int32_t col = slab * 128 + moqk_byte_col(a.form, piece, k);
                    float2 x = make_float2(0, 0);
                    if (col < a.cols) x = moqk_get2(a, from + col);
                    v[2 * k] = x.x;
                    v[2 * k + 1] = x.y;
                }
            }
            if (smooth)
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    const int32_t col = slab * 128 + moqk_byte_col(a.form, piece, k);
                    if (col < a.cols) { v[2 * k] *= smooth[col]; v[2 * k + 1] *= smooth[col + 1]; }
                }
            if (pass == 0 || by_group) {
                if (by_group) top = 0;
#pragma unroll
                for (int k = 0; k < 16; k++) top = fmaxf(top, fabsf(v[k]));
            }
            if (pass == 0) continue;
            if (by_group) {
                for (int o = 4; o > 0; o >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffu << (lane & 24), top, o));
                unit = top > 0 ? top / largest : 1;
            }
            if (piece == 0 && a.scale) a.scale[slab * a.tokens + m] = unit;
            if (unit > 8.7e-19f && unit < 1.1e18f) { /* no quotient that matters is subnormal */
                const float by = 1 / unit;
#pragma unroll
                for (int k = 0; k < 16; k++) v[k] = moqk_divide(v[k], unit, by);
            } else {
#pragma unroll
                for (int k = 0; k < 16; k++) v[k] = v[k] / unit;
            }
            if (elem != MOQ_F8_E4M3)
#pragma unroll
                for (int k = 0; k < 16; k++) odd |= !(v[k] == v[k]);
#pragma unroll
            for (int t = 0; t < 4; t++) w[t] = moqk_four_bytes(elem, v[2 * t], v[2 * t + 1], v[2 * t + 8], v[2 * t + 9]);
            *(uint4 *)(a.x16 + ((int64_t)slab * a.tokens + m) * 128 + ((piece ^ (m & 7)) << 4)) = make_uint4(w[0], w[1], w[2], w[3]);
        }
        if (pass == 0) {
            top = moqk_block_max(top, room);
            unit = top > 0 ? top / largest : 1;
        }
    }
    odd = __syncthreads_or(odd);
    if (threadIdx.x == 0) a.unit_out[m] = odd ? __uint_as_float(0x7fc00000u) : a.scale ? 1.0f : unit; /* integers know no NaN */
}

#if MOQK_WGMMA
/* Sums are read from here on. */
template <int N> __device__ __forceinline__ void moqk_settle(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}
template <int N> __device__ __forceinline__ void moqk_settle(int (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(d[i]) :: "memory");
}

template <int FORM> struct moqk_bytes_sum { typedef float type; };
template <> struct moqk_bytes_sum<MOQK_FAST_U8> { typedef int type; };

/* d = or d += the products of 128 columns, begun. */
template <int N, typename T> __device__ __forceinline__ void moqk_begin_bytes(T (&d)[N], const uint32_t (&a)[16], uint32_t desc, int add)
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    moqk_wgmma_bytes(d, a, desc, add);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Two pairs of F16 as four E4M3. */
__device__ __forceinline__ uint32_t moqk_halves_to_e4m3(uint32_t low, uint32_t high)
{
    uint32_t r;
    asm("{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f16x2 a, %1; cvt.rn.satfinite.e4m3x2.f16x2 b, %2; mov.b32 %0, {a, b}; }" : "=r"(r) : "r"(low), "r"(high));
    return r;
}
__device__ __forceinline__ uint32_t moqk_mul_halves(uint32_t a, uint32_t b) { uint32_t r; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
__device__ __forceinline__ uint32_t moqk_sub_halves(uint32_t a, uint32_t b) { uint32_t r; asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }

/* A word of a block of >>cuda-decode (16 columns) as two registers: rows g and g + 8. s: scales as F16 pairs; the bits of E2M1 in F16 are its value * 2^-14. */
__device__ __forceinline__ void moqk_e2m1_bytes(uint32_t v, const uint32_t *s, uint32_t *a)
{
    const uint32_t sign = 0x80008000u, size = 0x0e000e00u, up = v << 3;
    a[0] = moqk_halves_to_e4m3(moqk_mul_halves((v & sign) | (up & size), s[0]), moqk_mul_halves((v << 1 & sign) | (v << 9 & size), s[0]));
    a[1] = moqk_halves_to_e4m3(moqk_mul_halves((up & sign) | (v << 6 & size), s[1]), moqk_mul_halves((v << 2 & sign) | (v & size), s[1]));
}
/* z: 1024 + zero point of row g, 64 + that of row g + 8, as pairs of F16: a code ored into the bits of 1024 or 64 is their sum. */
__device__ __forceinline__ void moqk_u4_bytes(uint32_t v, const uint32_t *z, uint32_t *a)
{
    const uint32_t u = v >> 8;
    a[0] = moqk_halves_to_e4m3(moqk_sub_halves((v & 0x000f000fu) | 0x64006400u, z[0]), moqk_sub_halves((u & 0x000f000fu) | 0x64006400u, z[0]));
    a[1] = moqk_halves_to_e4m3(moqk_sub_halves((v & 0x00f000f0u) | 0x54005400u, z[1]), moqk_sub_halves((u & 0x00f000f0u) | 0x54005400u, z[1]));
}

/* What a warp needs of 128 columns: left operands of four products (32 columns each), scales of rows g and g + 8. */
template <int FORM, int GROUPED, int BM> struct moqk_bytes_staged {
    typedef moqk_rings<FORM, GROUPED, BM, 1> R;
    moqk_stage next;
    int32_t warp, chunks, shift;
    int top[2];                /* MXFP4: the scale byte that becomes 2^-15; constant for a tile */
    uint32_t z[2];             /* U4: zero points of whole rows */
    float scale[2];

    __device__ __forceinline__ void open(const moqk_part &p, int32_t row_tile)
    {
        const int32_t lane = threadIdx.x & 31, tiles = (p.rows + 15) / 16, tile = min(row_tile, tiles - 1);
        const uint8_t *rest = p.packed[0] + moqk_scales_at<FORM>(p);
        chunks = (p.cols + moqk_chunk_cols(FORM) - 1) / moqk_chunk_cols(FORM);
        shift = R::HAS_GROUPS ? __ffs(p.group) - 1 : 31;
        if (FORM == MOQK_MXFP4) {
            const uint32_t both = ((const uint16_t *)(const void *)rest)[tile * 8 + (lane >> 2)];
            top[0] = (int)(both & 255) - 30;
            top[1] = (int)(both >> 8) - 30;
        }
        if (FORM == MOQK_FAST_U4 && !GROUPED) zeros(((const uint16_t *)(const void *)(rest + (int64_t)tiles * 64))[tile * 8 + (lane >> 2)]);
    }
    __device__ __forceinline__ void zeros(uint32_t both)
    {
        z[0] = (both & 255) * 0x00010001u | 0x64006400u;
        z[1] = (both >> 8 & 255) * 0x00100010u + 0x54005400u;
    }

    /* Half h of the unit. */
    __device__ __forceinline__ void take(const R &r, int32_t unit, int h, uint32_t (&a)[16])
    {
        const int lane = threadIdx.x & 31;
        const uint32_t stage = r.w + next.at * R::W_STAGE, codes = stage + warp * R::TILE;
        if (R::W_SLABS == 1 || h == 0) moqk_barrier_wait(r.w_full + next.at * 8, (uint32_t)next.parity);
        if (R::BITS == 8) {
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const uint4 v = moqk_read16(codes + u * 512 + lane * 16);
                a[4 * u] = __byte_perm(v.x, v.y, 0x6420);
                a[4 * u + 1] = __byte_perm(v.x, v.y, 0x7531);
                a[4 * u + 2] = __byte_perm(v.z, v.w, 0x6420);
                a[4 * u + 3] = __byte_perm(v.z, v.w, 0x7531);
            }
        }
        if (R::HAS_GROUPS) {
            const int32_t groups = ((chunks * moqk_chunk_cols(FORM) - 1) >> shift) + 1, first = min((unit * 256 + (R::W_SLABS == 1 ? h * 128 : 0)) >> shift, groups - 1);
            const int32_t g = min((unit * 256 + h * 128) >> shift, groups - 1) - first;
            const uint2 v = moqk_read8(stage + R::SCALES_AT + (warp * R::GROUPS + g) * 64 + (lane >> 2) * 8);
            scale[0] = __uint_as_float(v.x);
            scale[1] = __uint_as_float(v.y);
            if (FORM == MOQK_FAST_U4) zeros(moqk_read4(stage + R::ZEROS_AT + (warp * R::GROUPS + g) * 16 + (lane >> 3) * 4) >> (lane >> 2 & 1) * 16);
        }
        if (R::BITS == 4) {
            const uint32_t groups = FORM == MOQK_MXFP4 ? moqk_read4(codes + 2048 + (lane >> 1) * 8 + h * 4) : 0;
#pragma unroll
            for (int u = 0; u < 2; u++) { /* 64 columns */
                const uint4 v = moqk_read16(codes + (h * 2 + u) * 512 + moqk_fast_slot(FORM, lane) * 16);
                const uint32_t w[4] = {v.x, v.y, v.z, v.w};
                uint32_t s[2] = {z[0], z[1]};
                if (FORM == MOQK_MXFP4)
#pragma unroll
                    for (int k = 0; k < 2; k++) s[k] = (uint32_t)max((int)(groups >> (16 * u + 8 * k) & 255) - top[k], 0) * 0x04000400u;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (FORM == MOQK_MXFP4) moqk_e2m1_bytes(w[i], s, a + 8 * u + 2 * i);
                    else moqk_u4_bytes(w[i], s, a + 8 * u + 2 * i);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 16; i++) asm volatile("" : "+r"(a[i])); /* loads must not arrive where a product reads */
        if (R::W_SLABS > 1 && h == 0) return;
        moqk_free_stage(r.w_empty + next.at * 8, lane);
        next.step(R::W_RING);
    }
};

/* sum += d, times the scales of rows and, at x_scales, of tokens. */
template <int FORM, int GROUPED, int N, int M>
__device__ __forceinline__ void moqk_add_bytes(float (&sum)[M], const float (&d)[N], int from, const float (&scale)[2], uint32_t x_scales)
{
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        float each[4] = {1, 1, 1, 1};
        if (FORM == MOQK_FAST_E4M3 && GROUPED) {
            const uint2 v = moqk_read8(x_scales + (8 * j + 2 * (threadIdx.x & 3)) * 4);
            each[0] = scale[0] * __uint_as_float(v.x);
            each[1] = scale[0] * __uint_as_float(v.y);
            each[2] = scale[1] * __uint_as_float(v.x);
            each[3] = scale[1] * __uint_as_float(v.y);
        } else if (FORM > MOQK_MXFP4 && GROUPED) { each[0] = each[1] = scale[0]; each[2] = each[3] = scale[1]; }
#pragma unroll
        for (int k = 0; k < 4; k++) sum[from + 4 * j + k] += d[4 * j + k] * each[k];
    }
}

/* A warpgroup's products of whole units. */
template <int FORM, int GROUPED, int BM> struct moqk_bytes_consumer {
    typedef moqk_rings<FORM, GROUPED, BM, 1> R;
    static constexpr int PARTS = BM > 160 ? BM / 128 : 1, N = BM / PARTS; /* tokens of a product of E4M3: sums apart need registers */
    static constexpr int SCALED = FORM > MOQK_MXFP4 && GROUPED;
    moqk_stage run;            /* of x */

    /* x of half h of the unit, the first of which has been waited for; the second stage: X_SLABS 1. */
    __device__ __forceinline__ int stage_of(int h) const { return R::X_SLABS == 2 || h == 0 ? run.at : run.at + 1 == R::X_RING ? 0 : run.at + 1; }
    __device__ __forceinline__ uint32_t desc_of(const R &r, int h, int token) const
    {
        return moqk_x_desc(r.x + stage_of(h) * R::X_STAGE + (R::X_SLABS == 2 ? h * (BM * 128) : 0)) + token * 8;
    }
    __device__ __forceinline__ void wait(const R &r, int h) const
    {
        if (R::X_SLABS == 2 && h) return;
        moqk_barrier_wait(r.x_full + stage_of(h) * 8, (uint32_t)(run.parity ^ (h && run.at + 1 == R::X_RING)));
    }
    /* The stages of a unit are free. */
    __device__ __forceinline__ void release(const R &r, int lane)
    {
#pragma unroll
        for (int h = 0; h < 2 / R::X_SLABS; h++) {
            if (R::X_SCALED) moqk_free_stage(r.x_empty + run.at * 8, lane); /* scales came by loads */
            else if (lane == 0) moqk_barrier_arrive(r.x_empty + run.at * 8);
            run.step(R::X_RING);
        }
    }

    /* Integers: sums stay where they are. */
    __device__ __forceinline__ void run_units(const R &r, moqk_bytes_staged<FORM, GROUPED, BM> &w, int (&sum)[BM / 2], int32_t from, int32_t to, int lane)
    {
        uint32_t a0[16], a1[16];
        w.take(r, from, 0, a0);
        for (int32_t i = from; i < to; i++) {
            wait(r, 0);
            moqk_begin_bytes(sum, a0, desc_of(r, 0, 0), i > from);
            w.take(r, i, 1, a1);
            wait(r, 1);
            moqk_begin_bytes(sum, a1, desc_of(r, 1, 0), 1);
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (i + 1 < to) w.take(r, i + 1, 0, a0);
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            release(r, lane);
        }
        moqk_settle(sum);
    }

    /* E4M3 without scales of groups: sums of a unit's 256 columns apart. While one half's products run the other half is decoded. */
    __device__ __forceinline__ void run_plain(const R &r, moqk_bytes_staged<FORM, GROUPED, BM> &w, float (&sum)[BM / 2], int32_t from, int32_t to, int lane)
    {
        uint32_t a0[16], a1[16];
        w.take(r, from, 0, a0);
        for (int32_t i = from; i < to; i++) {
#pragma unroll
            for (int t = 0; t < PARTS; t++) {
                float d[N / 2];
                if (t == 0) wait(r, 0);
                moqk_begin_bytes(d, a0, desc_of(r, 0, t * N), 0);
                if (t == 0) { w.take(r, i, 1, a1); wait(r, 1); }
                moqk_begin_bytes(d, a1, desc_of(r, 1, t * N), 1);
                if (t == PARTS - 1) {
                    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                    if (i + 1 < to) w.take(r, i + 1, 0, a0);
                }
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
                if (t == PARTS - 1) release(r, lane);
                moqk_settle(d);
                moqk_add_bytes<FORM, GROUPED>(sum, d, t * (N / 2), w.scale, 0);
            }
        }
    }

    /* With scales: sums of 128 columns apart. Half h of unit i is multiplied (`now`), meanwhile the next one decoded. */
    __device__ __forceinline__ void add_scaled(const R &r, moqk_bytes_staged<FORM, GROUPED, BM> &w, float (&sum)[BM / 2], uint32_t (&now)[16], uint32_t (&next)[16],
                                               int32_t i, int h, int more)
    {
        const uint32_t x_scales = r.x + stage_of(h) * R::X_STAGE + R::X_SCALES_AT + (R::X_SLABS == 2 ? h * BM * 4 : 0);
        const float scale[2] = {w.scale[0], w.scale[1]};
        wait(r, h);
#pragma unroll
        for (int t = 0; t < PARTS; t++) {
            float d[N / 2];
            moqk_begin_bytes(d, now, desc_of(r, h, t * N), 0);
            if (PARTS == 1 && more) w.take(r, i + h, 1 - h, next);
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            moqk_settle(d);
            if (PARTS > 1 && t == PARTS - 1 && more) w.take(r, i + h, 1 - h, now); /* registers are short: the other warpgroup's products run meanwhile */
            moqk_add_bytes<FORM, GROUPED>(sum, d, t * (N / 2), scale, x_scales + t * N * 4);
        }
    }
    __device__ __forceinline__ void run_scaled(const R &r, moqk_bytes_staged<FORM, GROUPED, BM> &w, float (&sum)[BM / 2], int32_t from, int32_t to, int lane)
    {
        uint32_t a0[16], a1[16];
        w.take(r, from, 0, a0);
        for (int32_t i = from; i < to; i++) {
            add_scaled(r, w, sum, a0, a1, i, 0, 1);
            if (PARTS == 1) add_scaled(r, w, sum, a1, a0, i, 1, i + 1 < to);
            else add_scaled(r, w, sum, a0, a1, i, 1, i + 1 < to);
            release(r, lane);
        }
    }

    __device__ __forceinline__ void run_units(const R &r, moqk_bytes_staged<FORM, GROUPED, BM> &w, float (&sum)[BM / 2], int32_t from, int32_t to, int lane)
    {
#pragma unroll
        for (int i = 0; i < BM / 2; i++) sum[i] = 0;
        if (SCALED) run_scaled(r, w, sum, from, to, lane);
        else run_plain(r, w, sum, from, to, lane);
    }
};
#endif

/* Threads as in moqk_gemm_wgmma. GROUPED: scales of 128 columns or more on sums, MOQK_RELATIVE. */
template <int FORM, int GROUPED, int BM>
__global__ void __launch_bounds__(384, 1) moqk_gemm_bytes(const __grid_constant__ moqk_call a, const __grid_constant__ moqk_gemm_args b,
    const __grid_constant__ moqk_maps maps)
{
#if MOQK_WGMMA
    typedef moqk_rings<FORM, GROUPED, BM, 1> R;
    extern __shared__ __align__(128) uint8_t shared[];
    uint8_t *base = shared + (-moqk_shared_at(shared) & 1023);
    float *room = (float *)(void *)(base + R::ROOM_AT + (threadIdx.x >> 7 & 1) * R::ROOM);
    moqk_told *told = (moqk_told *)(void *)(base + R::TOLD_AT);
    const int thread = threadIdx.x & 127, group = threadIdx.x >> 7, lane = threadIdx.x & 31, warp = thread >> 5;
    R r;
    r.open(moqk_shared_at(base));
    if (threadIdx.x == 0) r.start(b.split);
    __syncthreads();
    if (b.split > 1) { moqk_cluster_arrive(0); moqk_cluster_wait(); }
    if (a.tiles) moqk_wait_for_before();
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(FORM == MOQK_FAST_U8 || BM < 256 ? 40 : 24));
        r.fill(a, b, maps, told, warp, lane);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(FORM == MOQK_FAST_U8 || BM < 256 ? 232 : 240)); /* sums of two kinds */
    const moqk_share share(r.share, group);
    moqk_bytes_consumer<FORM, GROUPED, BM> k = {{0, 0}};
    moqk_bytes_staged<FORM, GROUPED, BM> w;
    w.next.at = w.next.parity = 0;
    w.warp = group * 4 + warp;
    typename moqk_bytes_sum<FORM>::type sum[BM / 2];
    moqk_stage next = {0, 0};
    moqk_wait_for_before();
    while (1) {
        moqk_barrier_wait(r.told_full + next.at * 8, (uint32_t)next.parity);
        const moqk_told &t = told[next.at];
        if (!t.more) break;
        w.open(*t.q.p, t.q.row_tile * 8 + group * 4 + warp);
        k.run_units(r, w, sum, t.q.from, t.q.to, lane);
        const moqk_piece q = t.q;
        moqk_barrier_wait(r.told_rows + next.at * 8, (uint32_t)next.parity);
        if (b.split > 1) moqk_finish_shared<FORM, GROUPED, BM, 1>(a, b, q, t.rows, group, thread, base, room, share, sum);
        else if (!moqk_finish_pairs<BM, R::BUFFERS, 1>(a, b, &maps.y, q, t.rows, group, thread, room, sum))
            moqk_finish<FORM, GROUPED, BM>(a, b, q, t.rows, group, thread, room, sum);
        moqk_free_stage(r.told_empty + next.at * 8, lane);
        next.step(2);
    }
    moqk_sums_stored(b, thread);
#endif
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-gemm-mma   17 and more rows of x on every device: mma.sync
   Four warps of 32 rows x 128 tokens, or as many of these as a tile has; x comes by cp.async through a ring in shared memory and by ldmatrix into registers,
   a step ahead of its products. Each register of x meets 32 rows of decoded weights: reading x takes half of the clocks that the products take. Group scales
   may multiply F32 sums instead of weights here (GROUPED 2), which keeps 4-bit integers and FP8 blocks as exact as their scales.
   Weights of 4 bits have a kernel for tiles of up to 32 tokens where there is no wgmma: with a quarter of the sums four blocks run on a multiprocessor (24 KB
   of shared memory each, on 8.6 too), which hide what decoding waits for, and BF16 x that is wanted as it is comes from where it is.
   ------------------------------------------------------------------------------------------------ */

/* Tiles of up to so many tokens; few ones of 4-bit weights, so many blocks on a multiprocessor; tokens of x that a block's threads copy at a time. */
enum { MOQK_MMA_TOKENS = 128, MOQK_MMA_FEW = 32, MOQK_MMA_BLOCKS = 4, MOQK_MMA_COPY = 16 };

/* Bytes of a slab of x and how many slabs shared memory holds, one more than blocks of the weights; what a tile of so many tokens needs: 48.5 KB at
   most, 56 KB for few tokens of BF16 weights, so that two blocks fit on a multiprocessor of compute capability 8.6 (100 KB), too, but for those. */
__host__ __device__ static constexpr int moqk_mma_slab(int tokens, int most)
{
    return most < MOQK_MMA_TOKENS ? most * 128 : tokens > 64 ? MOQK_MMA_TOKENS * 128 : 8192;
}
__host__ __device__ static constexpr int moqk_mma_ring(int form, int tokens, int most)
{
    return most < MOQK_MMA_TOKENS ? 3 : tokens > 64 ? 2 : moqk_fast_bits(form) == 4 ? 4 : 3;
}
__host__ __device__ static constexpr int moqk_mma_shared(int form, int grouped, int tokens, int most)
{
    return moqk_mma_ring(form, tokens, most) * moqk_mma_slab(tokens, most) + 4 * moqk_stream_bytes(form, grouped, moqk_mma_ring(form, tokens, most) - 1);
}

/* A slab's 64 columns are worked on in steps of 16 products: 32 columns of 32 tokens or, ALL, all columns of 16 tokens: where scales are on sums, which are
   half as many at a time then, and where x is as it came. Where a step's matrix i of four lies: its 8 tokens, its half of the columns. */
template <int ALL> __device__ static constexpr int moqk_step_tokens(int step, int i) { return ALL ? 2 * step + (i & 1) : (step >> 1) * 4 + i; }
template <int ALL> __device__ static constexpr int moqk_step_half(int step, int i) { return ALL ? i >> 1 : step & 1; }

/* A step's right operands. x: where the lane's row of the slab's first matrix is, and of the one 32 columns on. AS_IS: columns are not turned for weights of
   4-bit floats (see moqk_pack_x), whose product k takes columns 2 k and 2 k + 1 of the lane's 16 and those 8 on: x is where the 16 are, and their second 8. */
template <int STEP, int ALL, int AS_IS> __device__ __forceinline__ void moqk_load_step(const uint32_t (&x)[2], uint32_t (&v)[4][4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t at = x[moqk_step_half<ALL>(STEP, i)] + moqk_step_tokens<ALL>(STEP, i) * 1024;
        if (AS_IS) {
            const uint4 q = moqk_read16(at);
            v[i][0] = q.x;
            v[i][1] = q.y;
            v[i][2] = q.z;
            v[i][3] = q.w;
        } else moqk_load_matrices(at, v[i]);
    }
}

/* d += W x of a slab from STEP on or, with scales on sums, d += scale * (W x) of 32 columns at a time or, WIDE, of all. The next step's x comes while this
   one's products run; v: the first one's. */
template <int STEP, int GROUPED, int WIDE, int BM, int AS_IS, typename W>
__device__ __forceinline__ void moqk_multiply_slab(float (&d)[2][BM / 2], const uint32_t (&a)[2][16], const uint32_t (&x)[2], int32_t tokens, const W (&w)[2],
                                                   uint32_t (&v)[2][4][4])
{
    constexpr int STEPS = BM / 16, ALL = GROUPED == 2 || AS_IS;
    if constexpr (STEP < STEPS) {
        constexpr int NEXT = (STEP + 1) % STEPS;
        const int more = STEP < STEPS - 1 && (moqk_step_half<ALL>(NEXT, 0) > 0 || tokens > moqk_step_tokens<ALL>(NEXT, 0) * 8);
        if (more) moqk_load_step<NEXT, ALL, AS_IS>(x, v[NEXT & 1]);
        float sum[2][2][4];
        constexpr int EACH = ALL || STEP >= 6 ? 2 : 4; /* tiles of 104 and 112 tokens end in the middle of the last steps */
#pragma unroll
        for (int pair = 0; pair < (ALL ? 2 : 4); pair += EACH) {
            if (pair > 0 && tokens <= moqk_step_tokens<ALL>(STEP, pair) * 8) break;
#pragma unroll
            for (int k = 0; k < (ALL ? 4 : 2); k++) {
                const int first = k == 0 || (!WIDE && k == 2), last = k == 3 || (!WIDE && k == 1), half = moqk_step_half<ALL>(STEP, k & 2);
#pragma unroll
                for (int ir = 0; ir < 2 * EACH; ir++) {
                    const int i = pair + ir / 2, r = ir % 2;
                    const uint32_t (&now)[4][4] = v[STEP & 1], *left = a[r] + 8 * half + 4 * (k & 1);
                    const uint32_t u[2] = {AS_IS ? now[i][k] : now[ALL ? (k & 2) + i : i][(k & 1) * 2],
                                           AS_IS ? now[(2 + i) & 3][k] : now[ALL ? (k & 2) + i : i][(k & 1) * 2 + 1]};
                    float *to = d[r] + 4 * moqk_step_tokens<ALL>(STEP, i);
                    if (GROUPED != 2) { moqk_product(to, left, u[0], u[1]); continue; }
                    if (first) sum[r][i][0] = sum[r][i][1] = sum[r][i][2] = sum[r][i][3] = 0;
                    moqk_product(sum[r][i], left, u[0], u[1]);
                    if (!last) continue;
#pragma unroll
                    for (int j = 0; j < 4; j++) to[j] += sum[r][i][j] * (j < 2 ? w[r].scale[half].x : w[r].scale[half].y);
                }
            }
        }
        if (more) moqk_multiply_slab<STEP + 1, GROUPED, WIDE, BM, AS_IS>(d, a, x, tokens, w, v);
    }
}

/* A thread's 16 bytes of each MOQK_MMA_COPY tokens of a slab of x, from AT on. */
template <int AT> __device__ __forceinline__ void moqk_ask_tokens(uint32_t to, const uint8_t *src, int32_t tokens)
{
    if constexpr (AT < MOQK_MMA_TOKENS) {
        if (AT == 0 || AT < tokens) moqk_copy_async_from<AT * 128>(to, src);
        moqk_ask_tokens<AT + MOQK_MMA_COPY>(to, src, tokens);
    }
}

/* As moqk_join, of all rows of a tile of so many tokens: both halves are left, and added, at once. */
template <int BM>
__device__ __forceinline__ int moqk_join_tile(const moqk_gemm_args &b, const moqk_piece &q, uint32_t total, int32_t tokens, volatile int &room,
                                              float (&d)[2][BM / 2])
{
    const uint32_t begin = (uint32_t)(q.tile * b.units), low = moqk_run_of(total, begin), high = moqk_run_of(total, begin + b.units - 1), me = blockIdx.x;
    constexpr uint32_t SIZE = 128 * (BM / 8);
    constexpr int HALF = BM > 64 ? BM / 16 : BM / 8;
    float4 *all = (float4 *)b.partial + threadIdx.x;
    int32_t *turn = b.turn + (BM == MOQK_MMA_FEW ? low : 2 * low), others = (int32_t)(high - low);
    const int early = me <= low + 1; /* adding the others to what it has is the order of the columns */
    if (threadIdx.x == 0) room = early && atomicAdd(turn, 0) == others;
    __syncthreads();
    int last = room;
    if (!last) {
        float4 *mine = all + (2 * me + (moqk_run_start(total, me) <= begin)) * 2 * SIZE;
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < BM / 8; i++)
                if (i * 8 < tokens) __stcg(mine + r * SIZE + i * 128, make_float4(d[r][4 * i], d[r][4 * i + 1], d[r][4 * i + 2], d[r][4 * i + 3]));
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) room = atomicAdd(turn, 1) == others;
        __syncthreads();
        last = room;
    }
    if (!last) return 0;
    __threadfence();
    if (threadIdx.x == 0) *turn = 0;
#pragma unroll
    for (int i = 0; i < BM; i++) d[i / (BM / 2)][i % (BM / 2)] = early ? d[i / (BM / 2)][i % (BM / 2)] : 0;
#pragma unroll 1
    for (uint32_t c = low; c <= high; c++) {
        if (early && c == me) continue;
        const float4 *from = all + (2 * c + (moqk_run_start(total, c) <= begin)) * 2 * SIZE;
#pragma unroll
        for (int half = 0; half < BM / 8 / HALF; half++) { /* of the tokens: all reads of one are on their way at once */
            if (half * HALF * 8 >= tokens) break;
            float4 v[2][HALF];
#pragma unroll
            for (int i = 0; i < 2 * HALF; i++) {
                const int at = half * HALF + i % HALF;
                v[i / HALF][i % HALF] = at * 8 < tokens ? __ldcg(from + i / HALF * SIZE + at * 128) : make_float4(0, 0, 0, 0);
            }
#pragma unroll
            for (int i = 0; i < 2 * HALF; i++) {
                float *to = d[i / HALF] + half * HALF * 4 + i % HALF * 4;
                const float4 u = v[i / HALF][i % HALF];
                to[0] += u.x;
                to[1] += u.y;
                to[2] += u.z;
                to[3] += u.w;
            }
        }
    }
    return 1;
}

template <int FORM, int GROUPED, int BM>
__global__ void __launch_bounds__(128, BM == MOQK_MMA_FEW ? MOQK_MMA_BLOCKS : 2)
moqk_gemm_mma(const __grid_constant__ moqk_call a, const __grid_constant__ moqk_gemm_args b)
{
    if constexpr (MOQK_WGMMA && BM == MOQK_MMA_FEW) return; /* nobody calls it there: see moqc_mma_few */
    extern __shared__ __align__(128) uint8_t shared[];
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int32_t stages = moqk_mma_ring(FORM, b.tile_tokens, BM), slab = moqk_mma_slab(b.tile_tokens, BM);
    const int32_t bytes = moqk_stream_bytes(FORM, GROUPED, stages - 1);
    const uint32_t weights = (uint32_t)__cvta_generic_to_shared(shared), ring = weights + 4 * bytes;
    constexpr int FEW = BM == MOQK_MMA_FEW, AS_IS = FEW && FORM <= MOQK_MXFP4;
    const int direct = FEW && b.direct;
    const uint32_t row = AS_IS ? (lane >> 2) * 128 + ((2 * (lane & 3) ^ (lane >> 2)) << 4) : (lane & 7) * 128 + (((lane >> 3) ^ (lane & 7)) << 4);
    const uint32_t mine = thread * 16 ^ (direct ? (thread >> 3 & 7) << 4 : 0); /* in a slab */
    __shared__ int flag;
    moqk_stream<FORM, GROUPED> w;
    moqk_piece q;
    q.at = -1;
    moqk_wait_for_before();
    while (moqk_next_piece<FORM, GROUPED, 0>(a, b, &q)) {
        const int32_t first = q.from * 4, last = q.to * 4 - 1, tokens = q.end - q.x_first;
        const uint8_t *src = b.x16 + ((int64_t)first * b.tokens + q.x_first) * 128 + thread * 16;
        int64_t pitch = b.tokens * 128, apart = MOQK_MMA_COPY * 128; /* from a slab to the next one, to the other half of few tokens */
        if (direct) {
            const int32_t token = q.x_first + (thread >> 3);
            src = (const uint8_t *)a.x + ((int64_t)min(token, a.m - 1) * a.ldx + first * 64 + (thread & 7) * 8) * 2;
            pitch = 128;
            apart = (int64_t)(min(token + MOQK_MMA_COPY, a.m - 1) - min(token, a.m - 1)) * a.ldx * 2;
        }
        const auto ask_x = [&](int32_t slot_to) {
            const uint32_t at = ring + slot_to * slab + mine;
            if constexpr (FEW) {
                moqk_copy_async(at, src);
                if (tokens > MOQK_MMA_COPY) moqk_copy_async(at + MOQK_MMA_COPY * 128, src + apart);
            } else moqk_ask_tokens<0>(ring + slot_to * slab + thread * 16, src, tokens);
        };
        float d[2][BM / 2];
        int32_t to = 0, slot = 0, weights_slot = 0; /* the next of x to be written; those of the block that is worked on */
        w.open(*q.p, q.row_tile * 8 + warp, b.w_units, weights + warp * bytes, stages - 1);
#pragma unroll
        for (int i = 0; i < BM; i++) d[i / (BM / 2)][i % (BM / 2)] = 0;
        __syncthreads(); /* the ring was the room of the tile before */
#pragma unroll 1
        for (; to < stages - 1; to++) { /* a block of x and of the weights are a group, an empty one past the last */
            if (first + to <= last) {
                ask_x(to);
                src += FEW ? pitch : b.tokens * 128;
                w.ask(first + to, to);
            }
            asm volatile("cp.async.commit_group;" ::: "memory");
        }
#pragma unroll 1
        for (int32_t at = first; at <= last; at++) {
            uint32_t fragments[2][16], v[2][4][4];
            const uint32_t x[2] = {ring + slot * slab + row, (ring + slot * slab + row) ^ (AS_IS ? 16 : 64)};
            if (stages == 2) asm volatile("cp.async.wait_group 0;" ::: "memory");
            else if (stages == 3) asm volatile("cp.async.wait_group 1;" ::: "memory");
            else asm volatile("cp.async.wait_group 2;" ::: "memory");
            __syncthreads(); /* block `at` is there for all, the one before is done with */
            moqk_load_step<0, GROUPED == 2 || AS_IS, AS_IS>(x, v[0]);
            w.fetch(at, weights_slot);
            const int more = at + stages - 1 <= last;
            if (more) ask_x(to);
            w.decode(at, fragments);
            if (GROUPED) __syncwarp(); /* all lanes have their scales */
            if (more) w.ask(at + stages - 1, weights_slot);
            asm volatile("cp.async.commit_group;" ::: "memory");
            if (GROUPED == 2 && w.rows[0].shift >= 6) moqk_multiply_slab<0, GROUPED, 1, BM, AS_IS>(d, fragments, x, tokens, w.rows, v);
            else moqk_multiply_slab<0, GROUPED, 0, BM, AS_IS>(d, fragments, x, tokens, w.rows, v);
            src += FEW ? pitch : b.tokens * 128;
            if (++to == stages) to = 0;
            if (++slot == stages) slot = 0;
            if (++weights_slot == stages - 1) weights_slot = 0;
        }
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();
        if ((q.from > 0 || q.to < b.units) && !moqk_join_tile<BM>(b, q, moqk_cut_tiles(a, b) * b.units, tokens, flag, d)) continue;
        /* A warp's 32 rows are 16 of each half of a tile, as those of two warpgroups. */
#pragma unroll 1
        for (int group = 0; group < 2; group++) {
            moqk_finish<FORM, GROUPED, BM>(a, b, q, NULL, group, thread, (float *)(void *)shared, d[0]);
#pragma unroll
            for (int i = 0; i < BM / 2; i++) d[0][i] = d[1][i];
        }
    }
}

/* ---- rows of the dispatch table; defined behind it ---- */

static int moqc_fits_bytes(const struct moqc_shape *s);
static int moqc_fits_wgmma(const struct moqc_shape *s);
static int moqc_fits_mma(const struct moqc_shape *s);
static void moqc_launch_bytes(const struct moqc_job *j);
static void moqc_launch_wgmma(const struct moqc_job *j);
static void moqc_launch_mma(const struct moqc_job *j);

#define MOQC_GEMM_KERNELS \
    {"gemm-bytes", 17, INT32_MAX, moqc_fits_bytes, 1, moqc_launch_bytes, "inputs and weights as 8 bits for wgmma, sums of 128 or 256 columns in F32"}, \
    {"gemm-wgmma", 17, INT32_MAX, moqc_fits_wgmma, 1, moqc_launch_wgmma, "weights decoded in registers for wgmma, F32 sums"}, \
    {"gemm-mma", 17, INT32_MAX, moqc_fits_mma, 1, moqc_launch_mma, "weights decoded in registers for mma.sync, F32 sums"},

/* ------------------------------------------------------------------------------------------------
   >>cuda-dispatch   which kernel a layer gets: the table
   A kernel is a row: what it is called, for which rows of x, which layers it takes and why it is chosen. The first row that fits wins.
   ------------------------------------------------------------------------------------------------ */

/* Regimes: so many rows of x at most. */
static const int32_t moqc_regime_rows[MOQC_REGIMES] = {8, 16, 64, INT32_MAX};

/* What a row's predicate sees. */
typedef struct moqc_shape {
    const moqk_part *part;
    int32_t rows_of_x;         /* the largest number of the regime */
    int grouped;               /* experts */
    int sm, bf16;              /* device, activations */
    moq_act act;
    int wgmma;                 /* this program holds code for it */
} moqc_shape;

/* What a launcher gets: parts [first, first + count) of a bank, all with this kernel and the same feed. */
typedef struct moqc_job {
    moqc_ctx *c;
    const moqc_bank *bank;
    const moqc_part *part;     /* on the host: those of expert 0 */
    moqk_call call;            /* call.parts: the same on the device */
    int64_t row_blocks4, row_blocks128; /* groups of 4 and of 128 rows of these parts */
    uint32_t kinds;            /* bit per moqk_kind among them, all experts */
    const moq_activation_desc *fused; /* x goes through it first, which the launcher sees to; or NULL */
} moqc_job;

typedef struct moqc_kernel {
    const char *name;
    int32_t min_rows, max_rows; /* of x */
    int (*fits)(const moqc_shape *s);
    int layout;                /* 0: row-major; else it reads packed[layout - 1] of a part, see moqc_layouts */
    void (*launch)(const moqc_job *j);
    const char *why;
} moqc_kernel;

/* A layout of fast kernels: the bytes that a part needs, and the launch that writes them (zeroed before) from the row-major form. */
typedef struct moqc_layout {
    size_t (*bytes)(const moqk_part *p);
    void (*prepare)(moqc_ctx *c, const moqk_part *p, uint8_t *to);
} moqc_layout;

static int moqc_fits_all(const moqc_shape *s) { (void)s; return 1; }
static int moqc_fits_dense(const moqc_shape *s) { return !s->grouped; }

/* ---- launchers of the kernels that take everything ---- */

#define MOQC_EACH_KIND(kinds, CALL) \
    do { \
        if ((kinds) >> MOQK_E2M1 & 1) { CALL(MOQK_E2M1); } \
        if ((kinds) >> MOQK_U4 & 1) { CALL(MOQK_U4); } \
        if ((kinds) >> MOQK_E4M3 & 1) { CALL(MOQK_E4M3); } \
        if ((kinds) >> MOQK_U8 & 1) { CALL(MOQK_U8); } \
        if ((kinds) >> MOQK_BF16 & 1) { CALL(MOQK_BF16); } \
        if ((kinds) >> MOQK_F16 & 1) { CALL(MOQK_F16); } \
        if ((kinds) >> MOQK_F32 & 1) { CALL(MOQK_F32); } \
    } while (0)

/* Warps that share a row group: enough that about 16 warps run on every multiprocessor. */
static int32_t moqc_slices(const moqc_ctx *c, int64_t row_groups, int64_t cols)
{
    int32_t n = 1;
    while (n < 8 && row_groups * n < (int64_t)c->sm_count * 24 && cols > 256 * n) n *= 2;
    return n;
}

static void moqc_launch_gemv(const moqc_job *j)
{
    moqk_call a = j->call;
    int64_t most = a.tiles ? a.most_tiles : 1, rows = a.tiles ? a.m : a.m;
    a.slices = moqc_slices(j->c, j->row_blocks4 * most, j->bank->cols);
    unsigned blocks = (unsigned)moqk_ceil(j->row_blocks4, 8 / a.slices);
    int step = rows <= 1 ? 1 : 8;
    dim3 grid(blocks, (unsigned)(a.tiles ? most : moqk_ceil(rows, step)));
    cudaStream_t stream = j->c->stream;
#define MOQC_CALL(K) \
    if (step == 1) moqk_gemv<K, 1><<<grid, 256, 0, stream>>>(a); \
    else moqk_gemv<K, 8><<<grid, 256, 0, stream>>>(a);
    MOQC_EACH_KIND(j->kinds, MOQC_CALL);
#undef MOQC_CALL
    moqc_launched(j->c, "gemv");
}

/* Rows of x that a tile of moqk_gemm holds; the tiles of grouped calls are made before the launch. */
static int32_t moqc_gemm_tile(int64_t rows) { return rows <= 16 ? 16 : 64; }

static void moqc_launch_gemm(const moqc_job *j)
{
    moqk_call a = j->call;
    int32_t tile = moqc_gemm_tile(a.m);
    dim3 grid((unsigned)j->row_blocks128, (unsigned)(a.tiles ? a.most_tiles : moqk_ceil(a.m, tile)));
    cudaStream_t stream = j->c->stream;
#define MOQC_CALL(K) \
    if (tile == 16) moqk_gemm<K, 16><<<grid, 256, 0, stream>>>(a); \
    else moqk_gemm<K, 64><<<grid, 256, 0, stream>>>(a);
    MOQC_EACH_KIND(j->kinds, MOQC_CALL);
#undef MOQC_CALL
    moqc_launched(j->c, "gemm");
}

/* ---- the table ---- */

#ifndef MOQC_FAST_LAYOUTS
#define MOQC_FAST_LAYOUTS {NULL, NULL}, {NULL, NULL}
#endif
static const moqc_layout moqc_layouts[MOQC_LAYOUTS] = {{NULL, NULL}, MOQC_FAST_LAYOUTS};

static const moqc_kernel moqc_kernels[] = {
    /* name, rows of x, fits, layout, launch, why */
#ifdef MOQC_FAST_KERNELS
    MOQC_FAST_KERNELS
#endif
    MOQC_GEMM_KERNELS
    {"reference-gemv", 1, 8, moqc_fits_all, 0, moqc_launch_gemv, "weights read once, decoded in registers, F32 sums"},
    {"reference-gemv", 9, 16, moqc_fits_dense, 0, moqc_launch_gemv, "eight rows at a time cost less than a tile of the matrix kernel"},
    {"reference-gemm", 1, INT32_MAX, moqc_fits_all, 0, moqc_launch_gemm, "weights decoded once for 64 rows, F32 sums"}
};
enum { MOQC_KERNELS = sizeof moqc_kernels / sizeof moqc_kernels[0] };

/* A kernel that was asked for by name stands for its rows of x; what it does not take gets the reference ones, as does `any`thing that asks for them. */
static const moqc_kernel *moqc_choose(const moqc_ctx *c, const moqk_part *p, int regime, int grouped, int any)
{
    moqc_shape s;
    int32_t least = regime ? moqc_regime_rows[regime - 1] + 1 : 1, most = moqc_regime_rows[regime];
    memset(&s, 0, sizeof s);
    s.part = p;
    s.rows_of_x = most;
    s.grouped = grouped;
    s.sm = c->sm;
    s.bf16 = c->bf16;
    s.act = c->act;
    s.wgmma = c->wgmma;
    for (int i = 0; i < MOQC_KERNELS; i++) {
        const moqc_kernel *k = &moqc_kernels[i];
        int reference = strncmp(k->name, "reference", 9) == 0,
            wanted = reference || (!any && (strcmp(c->kernel, "auto") == 0 || strcmp(c->kernel, k->name) == 0));
        if (wanted && k->min_rows <= least && k->max_rows >= most && k->fits(&s)) return k;
    }
    return &moqc_kernels[MOQC_KERNELS - 1];
}

/* Kernels of all regimes, and room for the layouts that they read. Tables of words are also read row by row, so they keep the row-major form. */
static void moqc_choose_kernels(const moqc_ctx *c, moqc_part *p, int grouped, int any)
{
    int used[MOQC_LAYOUTS] = {0};
    p->keep = p->layer.name && strstr(p->layer.name, "embed") != NULL;
    for (int i = 0; i < MOQC_REGIMES; i++) {
        p->kernel[i] = moqc_choose(c, &p->d, i, grouped, any);
        used[p->kernel[i]->layout] = 1;
    }
    p->keep |= used[0];
    for (int i = 1; i < MOQC_LAYOUTS; i++) moqc_lay(p, MOQC_PACKED + i - 1, used[i] ? (int64_t)moqc_layouts[i].bytes(&p->d) : 0, 1);
}

static int moqc_regime(int64_t rows)
{
    int i = 0;
    while (rows > moqc_regime_rows[i]) i++;
    return i;
}

/* ---- can it run, and how ---- */

static int moqc_precise(int bf16, moq_act act); /* see >>cuda-gemm-host */
static int moqc_few_likely(const moqc_ctx *c, const moqc_part *p, int kernel_layout); /* see >>cuda-moe-host */

static moq_result moqc_supports(moq_backend *be, const moq_linear *w, moq_error *err)
{
    const moqc_ctx *c = moqc_of(be);
    const moq_scheme *s = &w->scheme;
    const char *name = w->name ? w->name : "";
    int64_t size = w->hadamard_size, rank = s->lora_rank;
    moq_dtype e = s->weight.elem;
    moqc_clear(err);
    if (w->experts > 0) return moq_fail(err, MOQ_E_ARG, name, "a stack of %d experts; take one with moq_slice_expert", (int)w->experts);
    if (w->rows < 1 || w->cols < 1 || w->cols > INT32_MAX / 2 || w->rows > INT32_MAX / 2 || !w->codes.data)
        return moq_fail(err, MOQ_E_ARG, name, "no weights: shape [%lld, %lld]", (long long)w->rows, (long long)w->cols);
    if (!moqc_is_int(e) && e != MOQ_F4 && e != MOQ_F6_E2M3 && e != MOQ_F6_E3M2 && e != MOQ_F8_E4M3 && e != MOQ_BF16 && e != MOQ_F16 && e != MOQ_F32)
        return moq_fail(err, MOQ_E_UNSUPPORTED, name, "weights of type %s; known are integers to 8 bits, F4, F6, F8, BF16, F16, F32",
                        moq_dtype_name(e));
    if (s->weight.scale != MOQ_NONE && !w->scales.data)
        return moq_fail(err, MOQ_E_MISSING, name, "%s scales are named by the scheme, but absent", moq_dtype_name(s->weight.scale));
    if (moqc_wants_rounding(c, w) && moqk_largest(s->input.elem) <= 0)
        return moq_fail(err, MOQ_E_UNSUPPORTED, name, "inputs of type %s cannot be rounded here; use wide activations",
                        moq_dtype_name(s->input.elem));
    if (moqc_wants_rounding(c, w) && !moqc_rounds_input(w))
        return moq_fail(err, MOQ_E_MISSING, name, "%s inputs need an input_scale greater than 0, found %g; use wide activations",
                        moq_dtype_name(s->input.elem), (double)w->input_scale);
    if (size < 0 || (size > 0 && (w->cols % size != 0 || w->col_first % size != 0)))
        return moq_fail(err, MOQ_E_SHAPE, name, "%lld columns from %lld, expected multiples of the input rotation's %lld", (long long)w->cols,
                        (long long)w->col_first, (long long)size);
    if (size > 0 && (w->hadamard.data ? w->hadamard.count != (uint64_t)size * (uint64_t)size : (size & (size - 1)) != 0))
        return moq_fail(err, MOQ_E_SHAPE, name, "the input rotation is no [%lld, %lld] matrix and no power of two", (long long)size, (long long)size);
    if (w->lora_a.data && (rank < 1 || !w->lora_b.data || w->lora_a.count % (uint64_t)rank != 0 || w->lora_b.count % (uint64_t)rank != 0))
        return moq_fail(err, MOQ_E_SHAPE, name, "low-rank tensors of %llu and %llu elements, expected a multiple of the rank %lld",
                        (unsigned long long)w->lora_a.count,
                        (unsigned long long)w->lora_b.count, (long long)rank);
    return MOQ_OK;
}

static size_t moqc_explain(moq_backend *be, const moq_linear *w, char *text, size_t capacity)
{
    moqc_ctx *c = moqc_of(be);
    moqc_part p;
    moq_error err;
    char scheme[80], inputs[120];
    int n;
    if (moqc_supports(be, w, &err) < 0) n = snprintf(text, capacity, "none: %s", err.text);
    else {
        memset(&p, 0, sizeof p);
        if (!moqc_plan_part(c, w, &p)) return 0;
        moqc_free_plan(c, &p);
        moq_scheme_name(&w->scheme, scheme, sizeof scheme);
        const char *in = moq_dtype_name(w->scheme.input.elem);
        if (p.d.rounds) snprintf(inputs, sizeof inputs, ", inputs rounded to %s as stored", in);
        else if (w->scheme.input.elem == MOQ_NONE) inputs[0] = 0;
        else snprintf(inputs, sizeof inputs, ", wide inputs (%s)",
                      c->act == MOQ_ACT_WIDE || c->act == MOQ_ACT_BF16 ? "asked for" : "automatic: no arithmetic of that format on this device");
        const int expert = w->name && strstr(w->name, ".experts") != NULL; /* nothing else tells: a slice of a stack has its name */
        const moqc_kernel *few = moqc_choose(c, &p.d, 0, expert, 0), *many = moqc_choose(c, &p.d, MOQC_REGIMES - 1, expert, 0);
        const char *mixture = expert && moqc_few_likely(c, &p, few->layout) ? "; all steps of its mixture in one launch for few rows (moe-few)" : "";
        const char *kept = moqc_precise(c->bf16, c->act) ? ", inputs as two BF16 parts there" : ", inputs rounded to BF16 there";
        if (strncmp(many->name, "gemm-", 5) != 0 || c->bf16 || p.d.rounds) kept = "";
        n = snprintf(text, capacity, "%s: %s on SM%d: %s%s; %s from 65 rows on: %s%s%s", few->name, scheme, c->sm, few->why, mixture, many->name, many->why,
                     kept, inputs);
    }
    return n > 0 ? (size_t)n : 0;
}

/* ---- preparing a bank ---- */

/* Would both parts turn the same x into the same numbers? */
static int moqc_same_feed(const moqc_part *a, const moqc_part *b)
{
    const moq_linear *u = &a->layer, *v = &b->layer;
    const moqk_part *p = &a->d, *q = &b->d;
    if (p->rounds != q->rounds || p->place || q->place || a->order || b->order || p->hadamard_size != q->hadamard_size ||
        p->cols != q->cols) return 0;
    if (p->hadamard_size > 0 && (p->hadamard_scale != q->hadamard_scale || u->hadamard.data != v->hadamard.data)) return 0;
    if ((u->pre_quant_scale.data != NULL) != (v->pre_quant_scale.data != NULL)) return 0;
    if (u->pre_quant_scale.data && u->pre_quant_scale.data != v->pre_quant_scale.data) {
        size_t size = (size_t)moq_dtype_bits(u->pre_quant_scale.dtype) / 8;
        if (u->pre_quant_scale.dtype != v->pre_quant_scale.dtype) return 0;
        if (memcmp((const uint8_t *)u->pre_quant_scale.data + (size_t)u->col_first * size,
                   (const uint8_t *)v->pre_quant_scale.data + (size_t)v->col_first * size, (size_t)u->cols * size)) return 0;
    }
    return !p->rounds || (p->in_elem == q->in_elem && p->in_group == q->in_group && p->in_scale == q->in_scale && p->in_dynamic == q->in_dynamic &&
                          p->in_zero_point == q->in_zero_point && p->in_rule == q->in_rule && p->input_zero == q->input_zero &&
                              p->input_scale == q->input_scale);
}

/* Can the rows of x be read where they are? */
static int moqc_direct(const moqk_part *p) { return !p->rounds && !p->place && !p->smooth && p->hadamard_size == 0 && p->cols % 8 == 0; }

/* Does the kernel of a regime read x as it is and round it? A low-rank branch wants the feed's t. */
static int moqc_rounds_itself(const moqc_part *p, int regime);
static int moqc_takes_raw(const moqc_part *p, int regime)
{
    return moqc_rounds_itself(p, regime) && !p->d.place && !p->order && p->d.hadamard_size == 0 && p->d.cols % 16 == 0 &&
        p->d.cols == p->d.feed_cols && !p->has_lora;
}

static moqc_bank *moqc_bank_new(moqc_ctx *c, int32_t experts, int32_t parts, int grouped)
{
    moqc_bank *b = (moqc_bank *)moq_allocate(&c->host, sizeof *b);
    if (!b) return NULL;
    b->experts = experts;
    b->grouped = grouped;
    b->parts = parts;
    b->count = 3 * experts * parts;
    b->part = (moqc_part *)moq_allocate(&c->host, (size_t)b->count * sizeof *b->part);
    b->shares = (uint8_t *)moq_allocate(&c->host, 3 * (size_t)parts);
    b->direct = b->shares ? b->shares + parts : NULL;
    b->raw = b->shares ? b->shares + 2 * parts : NULL;
    return b;
}

static void moqc_bank_free(moqc_ctx *c, moqc_bank *b)
{
    if (!b) return;
    for (int32_t i = 0; b->part && i < b->count; i++) moqc_free_plan(c, &b->part[i]);
    moqc_give(c, b->memory);
    moq_release(&c->host, b->part, (size_t)b->count * sizeof *b->part);
    moq_release(&c->host, b->shares, 3 * (size_t)b->parts);
    moq_release(&c->host, b, sizeof *b);
}

/* The matrices of a low-rank branch as layers: A [rank, cols] follows the columns of a slice, B [rows, rank] its rows. */
static void moqc_lora_layers(const moq_linear *w, moq_linear *a, moq_linear *b)
{
    int64_t rank = w->scheme.lora_rank;
    moq_make_linear(a, w->name, w->lora_a.dtype, w->lora_a.data, rank, (int64_t)w->lora_a.count / rank);
    a->cols = w->cols;
    a->col_first = w->col_first;
    moq_make_linear(b, w->name, w->lora_b.dtype, w->lora_b.data, (int64_t)w->lora_b.count / rank, rank);
    b->rows = w->rows;
    b->row_first = w->row_first;
    b->row_step = w->row_step;
}

/* A part as its kernels will read it; any: kernels that take everything. */
static void moqc_final_part(const moqc_ctx *c, const moqc_bank *b, const moqc_part *p, int any, moqc_part *final)
{
    *final = *p;
    if (p->requant > 0) moqc_plan_requant(p, final);
    moqc_choose_kernels(c, final, b->grouped, any);
}

/* Do two experts want different kernels, or inputs rounded in different ways? */
static int moqc_differ(const moqc_part *a, const moqc_part *b)
{
    const moqk_part *p = &a->d, *q = &b->d;
    if (memcmp(a->kernel, b->kernel, sizeof a->kernel) != 0 || p->rounds != q->rounds) return 1;
    return p->rounds && (p->in_elem != q->in_elem || p->in_group != q->in_group || p->in_scale != q->in_scale || p->in_dynamic != q->in_dynamic ||
                         p->in_zero_point != q->in_zero_point || p->in_rule != q->in_rule);
}

/* Kernels of part `first` of every expert, and their device bytes, added to *total. One launch runs all experts, so those that differ get the
   kernels that take everything. */
static void moqc_plan_kernels(const moqc_ctx *c, const moqc_bank *b, int32_t first, size_t *total)
{
    moqc_part one, final;
    int differ = 0, seen = 0;
    for (int32_t e = 0; e < b->experts && !differ; e++) {
        const moqc_part *p = &b->part[first + e * b->parts];
        if (p->d.rows == 0) continue; /* no low-rank branch */
        moqc_final_part(c, b, p, 0, seen ? &final : &one);
        differ = seen && moqc_differ(&one, &final);
        seen = 1;
    }
    for (int32_t e = 0; e < b->experts; e++) {
        moqc_part *p = &b->part[first + e * b->parts];
        if (p->d.rows == 0) continue;
        moqc_final_part(c, b, p, differ, &final);
        memcpy(p->kernel, final.kernel, sizeof p->kernel);
        memcpy(p->at + MOQC_PACKED, final.at + MOQC_PACKED, sizeof p->at[0] * (MOQC_LAYOUTS - 1));
        p->bytes[1] = final.bytes[1];
        p->keep = final.keep;
        *total += final.bytes[1] + (final.keep ? final.bytes[0] : 0);
    }
}

/* Plans of all parts and their low-rank branches, then one block of device memory for them. */
static moq_result moqc_bank_plan(moqc_ctx *c, moqc_bank *b, const moq_linear *const *roles, moq_error *err)
{
    int32_t n = b->experts * b->parts;
    size_t total = 0;
    for (int32_t i = 0; i < n; i++) {
        const moq_linear *w = &roles[i % b->parts][i / b->parts];
        moqc_part *p = &b->part[i], *low[2] = {&b->part[n + i], &b->part[2 * n + i]};
        moq_linear ab[2];
        if (moqc_supports(&c->be, w, err) < 0) return MOQ_E_UNSUPPORTED;
        if (!moqc_plan_part(c, w, p)) return moq_fail(err, MOQ_E_NOMEM, w->name, "no host memory to prepare it");
        p->has_lora = w->lora_a.data != NULL;
        if (p->has_lora != b->part[i % b->parts].has_lora || w->scheme.lora_rank != roles[i % b->parts]->scheme.lora_rank)
            return moq_fail(err, MOQ_E_UNSUPPORTED, w->name,
                            "a low-rank branch of rank %d beside %d of the first expert; all experts need the same", (int)w->scheme.lora_rank,
                            (int)roles[i % b->parts]->scheme.lora_rank);
        if (!p->has_lora) continue;
        moqc_lora_layers(w, &ab[0], &ab[1]);
        for (int k = 0; k < 2; k++)
            if (!moqc_plan_part(c, &ab[k], low[k])) return moq_fail(err, MOQ_E_NOMEM, w->name, "no host memory to prepare it");
    }
    for (int32_t i = 0; i < 3 * b->parts; i++) moqc_plan_kernels(c, b, i / b->parts * n + i % b->parts, &total);
    b->bytes = total + (size_t)moqk_pad((int64_t)b->count * (int64_t)sizeof(moqk_part), 256);
    b->memory = (uint8_t *)moqc_take(c, b->bytes, "weights", err);
    if (!b->memory) return MOQ_E_NOMEM;
    return moqc_ok(c, cudaMemsetAsync(b->memory, 0, b->bytes, c->stream), "cudaMemset") ? MOQ_OK : MOQ_E_BACKEND;
}

static moq_result moqc_bank_fill(moqc_ctx *c, moqc_bank *b, moq_error *err)
{
    uint8_t *at = b->memory;
    size_t list = (size_t)b->count * sizeof(moqk_part);
    int32_t n = b->experts * b->parts;
    for (int32_t i = 0; i < b->count; i++) {
        moqc_part *p = &b->part[i];
        if (p->d.rows == 0) continue; /* no low-rank branch */
        moq_result rc = moqc_fill_part(c, p, at, err);
        if (rc < 0) return rc;
        for (int k = 1; k < MOQC_LAYOUTS; k++) if (p->d.packed[k - 1]) moqc_layouts[k].prepare(c, &p->d, (uint8_t *)p->d.packed[k - 1]);
        at += p->bytes[1] + (p->keep ? p->bytes[0] : 0);
        if (!p->keep) p->d.codes = p->d.scales = NULL, p->d.zeros = NULL;
    }
    moqk_part *parts = (moqk_part *)moq_allocate(&c->host, list);
    if (!parts) return moq_fail(err, MOQ_E_NOMEM, c->name, "no host memory for %d layers", (int)n);
    for (int32_t i = 0; i < b->count; i++) parts[i] = b->part[i].d;
    b->device = (moqk_part *)(void *)at;
    int fine = moqc_send(c, b->device, parts, list);
    moq_release(&c->host, parts, list);
    return fine && c->error.code == MOQ_OK ? MOQ_OK : moqc_why(c, c->name, err);
}

/* roles[part][expert]. Layers of an expert share their input; ranks and shapes agree between experts. */
static moqc_bank *moqc_bank_create(moqc_ctx *c, const moq_linear *const *roles, int32_t experts, int32_t parts, int grouped, moqc_need *need,
                                   moq_error *err)
{
    moqc_bank *b = moqc_bank_new(c, experts, parts, grouped);
    if (!b || !b->part || !b->shares) moq_fail(err, MOQ_E_NOMEM, c->name, "no host memory for %d layers", (int)(experts * parts));
    else if (moqc_bank_plan(c, b, roles, err) == MOQ_OK && moqc_bank_fill(c, b, err) == MOQ_OK) {
        b->cols = b->part[0].d.feed_cols;
        for (int32_t j = 0; j < parts; j++) {
            int32_t rank = 0;
            b->rows += b->part[j].d.rows;
            b->shares[j] = j > 0;
            b->direct[j] = 1;
            b->raw[j] = (1 << MOQC_REGIMES) - 1;
            for (int32_t e = 0; e < experts; e++) {
                const moqc_part *p = &b->part[e * parts + j];
                if (j > 0) b->shares[j] = b->shares[j] && moqc_same_feed(p - 1, p);
                b->direct[j] = b->direct[j] && moqc_direct(&p->d);
                for (int r = 0; r < MOQC_REGIMES && p->d.rows > 0; r++) if (!moqc_takes_raw(p, r)) b->raw[j] &= (uint8_t)~(1 << r);
                need->cols = moqc_max(need->cols, moqk_pad(moqc_max(p->d.cols, p->d.feed_cols), 16));
                rank = (int32_t)moqc_max(rank, p->has_lora ? moqk_pad(p->layer.scheme.lora_rank, 16) : 0);
            }
            b->ranks += rank;
        }
        need->rank = moqc_max(need->rank, b->ranks);
        return b;
    }
    moqc_bank_free(c, b);
    return NULL;
}

/* ---- running products ---- */

static int moqc_packs(const moqc_bank *b, const void *x, int64_t ldx, int64_t rows); /* see >>cuda-gemm-host */

/* Inputs and outputs of one product over a whole bank. */
typedef struct moqc_run {
    const void *x;             /* [rows, ldx] of the activation type, or F32 (x_f32) */
    void *y;
    int64_t ldx, ldy;
    int32_t m;                 /* rows of x; grouped: choices */
    int32_t x_f32, y_f32;      /* F32 also when activations are BF16 */
    const int32_t *row_of, *expert_of, *tiles; /* grouped */
    int32_t most_tiles, tile_rows;
    const moq_activation_desc *fused; /* x goes through it first: [gate | up] */
} moqc_run;

static void moqc_launch_feed(moqc_ctx *c, const moqc_bank *b, int32_t part, const moqc_run *u, int keep_t, int64_t ld)
{
    moqk_feed_args f;
    const moqk_part *p = &b->part[part].d;
    int64_t unit = 1;
    int whole = 0, aside = keep_t;
    memset(&f, 0, sizeof f);
    for (int32_t e = 0; e < b->experts; e++) {
        const moqk_part *q = &b->part[e * b->parts + part].d;
        whole |= q->place != NULL || (q->rounds && q->in_dynamic && q->in_group == 0);
        aside |= q->place != NULL || q->rotation != NULL;
    }
    for (int32_t i = 0; i < 2 * b->experts; i++) { /* the least common multiple of groups and rotated blocks */
        const moqk_part *q = &b->part[i / 2 * b->parts + part].d;
        int64_t n = i % 2 ? q->hadamard_size : q->rounds ? q->in_group : 0, a = unit, d = n;
        if (n < 1) continue;
        while (d) { int64_t rest = a % d; a = d; d = rest; }
        unit = unit / a * n;
    }
    f.segment = whole ? p->feed_cols : (int32_t)moqc_min(moqk_pad(1024, unit), INT32_MAX);
    f.parts = b->device + part;
    f.expert_stride = b->parts;
    f.x = u->x;
    f.ldx = u->ldx;
    f.x_bf16 = c->bf16 && !u->x_f32;
    f.fused = u->fused != NULL;
    if (u->fused) f.activation = *u->fused;
    f.row_of = u->row_of;
    f.expert_of = u->expert_of;
    f.r = c->r;
    f.t = aside ? c->t : c->r;
    f.ld = ld;
    dim3 grid((unsigned)u->m, (unsigned)moqk_ceil(p->feed_cols, f.segment));
    moqc_chain(c, "the feed of a layer", moqk_feed, grid, 256, 0, f);
    moqc_launched(c, "the feed of a layer");
}

/* The kernel of a part in every expert: experts of a mixture are alike, so the first one that has the part tells. */
static const moqc_kernel *moqc_kernel_of(const moqc_bank *b, const moqc_part *p, int regime)
{
    for (int32_t e = 0; e < b->experts; e++) if (p[e * b->parts].d.rows > 0) return p[e * b->parts].kernel[regime];
    return NULL;
}

/* Parts [first, first + count) of array `which` (0 weights, 1 A, 2 B), cut into runs with the same kernel. */
static void moqc_launch_parts(moqc_ctx *c, const moqc_bank *b, int which, int32_t first, int32_t count, const moqk_call *base, int64_t rows,
                              const moq_activation_desc *fused = NULL)
{
    int32_t start = which * b->experts * b->parts + first, regime = moqc_regime(rows);
    uint8_t *y = (uint8_t *)base->y;
    for (int32_t i = 0, next; i < count; i = next) {
        const moqc_part *p = &b->part[start + i];
        const moqc_kernel *k = moqc_kernel_of(b, p, regime);
        int64_t y_rows = 0;
        moqc_job j;
        memset(&j, 0, sizeof j);
        for (next = i; next < count && moqc_kernel_of(b, &b->part[start + next], regime) == k; next++) {
            int64_t most = 0;
            for (int32_t e = 0; e < b->experts; e++) {
                const moqk_part *d = &b->part[start + next + e * b->parts].d;
                most = moqc_max(most, d->rows);
                if (d->rows > 0) j.kinds |= 1u << d->kind;
            }
            j.row_blocks4 += moqk_ceil(most, 4);
            j.row_blocks128 += moqk_ceil(most, 128);
            y_rows += most;
        }
        j.c = c;
        j.bank = b;
        j.part = p;
        j.call = *base;
        j.call.parts = b->device + start + i;
        j.call.expert_stride = b->parts;
        j.call.part_count = next - i;
        j.call.y = y;
        j.fused = fused;
        if (k) k->launch(&j);
        y += y_rows * (base->y_bf16 ? 2 : 4);
    }
}

/* y = all parts of a bank, run by run of parts that share their feed. */
static void moqc_run_bank(moqc_ctx *c, const moqc_bank *b, const moqc_run *u)
{
    int64_t y_at = 0, rows = u->m;
    int elem = c->bf16 && !u->y_f32 ? 2 : 4;
    if (u->tiles) rows = u->tile_rows;
    for (int32_t i = 0, next; i < b->parts; i = next) {
        const moqc_part *p = &b->part[i];
        int64_t ld = moqk_pad(moqc_max(p->d.cols, p->d.feed_cols), 16), out = 0, mid_at = 0;
        int x_elem = c->bf16 && !u->x_f32 ? 2 : 4, has_lora = 0;
        for (next = i; next < b->parts && (next == i || b->shares[next]); next++) { out += b->part[next].d.rows; has_lora |= b->part[next].has_lora; }
        for (int32_t k = i; k < next; k++) for (int32_t e = 0; e < b->experts; e++) ld = moqc_max(ld, moqk_pad(b->part[e * b->parts + k].d.cols, 16));
        const int plain = !u->fused && ((uintptr_t)u->x & 15) == 0 && (u->ldx * x_elem) % 16 == 0;
        int raw = plain;
        for (int32_t k = i; k < next; k++) raw = raw && (b->raw[k] >> moqc_regime(rows) & 1);
        const int packs = u->fused && b->parts == 1 && moqc_packs(b, u->x, u->ldx, rows), direct = raw || packs || (plain && b->direct[i]);
        if (!direct) moqc_launch_feed(c, b, i, u, has_lora, ld);
        moqk_call a;
        memset(&a, 0, sizeof a);
        a.x = direct ? u->x : c->r;
        a.ldx = direct ? u->ldx : ld;
        a.x_bf16 = direct && x_elem == 2;
        a.y = (uint8_t *)u->y + y_at * elem;
        a.ldy = u->ldy;
        a.y_bf16 = elem == 2;
        a.m = (int32_t)rows;
        a.all = u->m;
        a.row_of = direct ? u->row_of : NULL;
        a.expert_of = u->expert_of;
        a.tiles = u->tiles;
        a.most_tiles = u->most_tiles;
        a.raw = (uint8_t)raw;
        moqc_launch_parts(c, b, 0, i, next - i, &a, rows, packs ? u->fused : NULL);
        for (int32_t k = i; k < next && has_lora; k++) { /* one low-rank branch at a time: y += B (A t) */
            const moqc_part *part = &b->part[k];
            moqk_call low = a;
            if (part->has_lora) {
                low.x = direct ? u->x : c->t;
                low.y = c->mid + mid_at * u->m;
                low.ldy = moqk_pad(part->layer.scheme.lora_rank, 16);
                low.y_bf16 = 0;
                if (part->layer.scheme.lora_rank % 8 != 0) /* the columns that pad the rank must be numbers */
                    moqc_ok(c, cudaMemsetAsync(low.y, 0, (size_t)u->m * (size_t)low.ldy * 4, c->stream), "cudaMemset");
                moqc_launch_parts(c, b, 1, k, 1, &low, rows);
                low.x = low.y;
                low.ldx = low.ldy;
                low.x_bf16 = 0;
                low.row_of = NULL;
                low.y = a.y;
                for (int32_t q = i; q < k; q++) low.y = (uint8_t *)low.y + (size_t)b->part[q].d.rows * (size_t)elem;
                low.ldy = a.ldy;
                low.y_bf16 = a.y_bf16;
                low.accumulate = 1;
                moqc_launch_parts(c, b, 2, k, 1, &low, rows);
                mid_at += moqk_pad(part->layer.scheme.lora_rank, 16);
            }
        }
        y_at += out;
    }
}

/* ---- dense layers ---- */

static moq_weight *moqc_prepare_linear(moq_backend *be, const moq_linear *layers, int32_t parts, moq_error *err)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    moqc_need need;
    moqc_clear(err);
    memset(&need, 0, sizeof need);
    if (parts < 1) { moq_fail(err, MOQ_E_ARG, c->name, "no layers to prepare"); return NULL; }
    for (int32_t i = 1; i < parts; i++)
        if (layers[i].cols != layers[0].cols) {
            moq_fail(err, MOQ_E_SHAPE, layers[i].name, "%lld columns beside %lld of '%s': fused layers share their input",
                     (long long)layers[i].cols, (long long)layers[0].cols,
                     layers[0].name ? layers[0].name : "");
            return NULL;
        }
    size_t list = (size_t)parts * sizeof(const moq_linear *);
    const moq_linear **roles = (const moq_linear **)moq_allocate(&c->host, list);
    if (!roles) { moq_fail(err, MOQ_E_NOMEM, c->name, "no host memory for %d layers", (int)parts); return NULL; }
    for (int32_t i = 0; i < parts; i++) roles[i] = &layers[i];
    moqc_bank *b = moqc_bank_create(c, roles, 1, parts, 0, &need, err);
    moq_release(&c->host, roles, list);
    if (b && moqc_grow(c, &need, c->be.max_rows, err) < 0) { moqc_bank_free(c, b); b = NULL; }
    return (moq_weight *)(void *)b;
}

static void moqc_release_weight(moq_backend *be, moq_weight *w)
{
    moqc_on on(moqc_of(be));
    moqc_bank_free(moqc_of(be), (moqc_bank *)(void *)w);
}

static size_t moqc_weight_bytes(const moq_backend *be, const moq_weight *w)
{
    (void)be;
    return w ? ((const moqc_bank *)(const void *)w)->bytes : 0;
}

static int moqc_may_hold(const moqc_ctx *c, const moqc_bank *b, const void *x, int32_t rows); /* see >>cuda-together */
static int moqc_may_norm(const moqc_ctx *c, const moqc_bank *b, const void *x, int32_t rows); /* likewise */

static void moqc_linear(moq_backend *be, const moq_weight *w, const void *x, int32_t rows, void *y)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c, 1);
    const moqc_bank *b = (const moqc_bank *)(const void *)w;
    int elem = c->bf16 ? 2 : 4;
    c->holds = moqc_may_hold(c, b, x, rows);
    if (!c->holds && !moqc_may_norm(c, b, x, rows)) moqc_let_go(c);
    for (int64_t first = 0; first < rows; first += c->be.max_rows) {
        moqc_run u;
        memset(&u, 0, sizeof u);
        u.m = (int32_t)moqc_min(rows - first, c->be.max_rows);
        u.x = (const uint8_t *)x + first * b->cols * elem;
        u.y = (uint8_t *)y + first * b->rows * elem;
        u.ldx = b->cols;
        u.ldy = b->rows;
        moqc_run_bank(c, b, &u);
    }
    if (c->narrowed && !moqc_apart(y, (int64_t)rows * b->rows * elem, c->narrowed, c->narrow_rows * c->narrow_cols * 4)) c->narrowed = NULL;
    c->holds = 0;
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-few-host   how products of 1 to 16 rows are cut and launched
   What the rows of the table take, and their launches: >>cuda-decode first, then >>cuda-ring and >>cuda-runs.
   ------------------------------------------------------------------------------------------------ */

/* x as two BF16 parts is good to 2^-17 of each value in the worst case, 2e-6 on average: rows with few columns, where one term may be the
   whole sum, are left to the F32 kernels. Sums of several experts are long enough sooner. */
static int moqc_fits_decode(const struct moqc_shape *s) { return s->part->cols >= (s->grouped ? 512 : 1024) && s->part->rows >= 16 && moqk_form_of(*s->part) >= 0; }

/* Bytes of shared memory of a cut: partial sums, then `stage` chunks of x. */
static int64_t moqc_decode_sums(const moqk_cut *u) { return (int64_t)u->blocks * u->ways * u->rows * u->tile_pitch * 4; }

/* The cut with the least estimated time, in chunks that one multiprocessor reads: whole rounds of blocks, x per block, too few warps. */
static int moqc_decode_cut(const moqc_job *j, int form, int64_t choices, int columns, int64_t room, moqk_cut *best)
{
    const moqc_bank *b = j->bank;
    int64_t cols = j->part->d.cols, chunks = moqk_ceil(cols, moqk_chunk_cols(form)), block_bytes = (int64_t)moqk_chunk_cols(form) / 64 * columns * 128;
    double least = 1e30, x_cost = (double)moqk_chunk_cols(form) * 2 * columns * 0.8 / 2048;
    int most_blocks = j->c->sm >= 90 ? 2 : 1;
    for (int32_t tiles = 1; tiles <= 16; tiles++)
        for (int32_t blocks = 1; blocks <= most_blocks; blocks++) {
            moqk_cut u = {};
            int64_t half = moqk_ceil(chunks, blocks), groups = 0;
            if (blocks > 1 && (chunks < 4 || tiles < 2 || half * (blocks - 1) >= chunks)) continue;
            u.tiles = tiles;
            u.blocks = blocks;
            u.ways = (int32_t)moqc_max(1, moqc_min(16 / tiles, half));
            u.rows = j->call.m;
            u.tile_pitch = tiles * 16 + 4;
            u.stage = (int32_t)moqc_min((room - moqc_decode_sums(&u)) / block_bytes, moqk_pad(half, u.ways));
            u.stage -= u.stage % u.ways;
            if (u.stage < u.ways) continue;
            for (int32_t i = 0; i < j->call.part_count; i++) {
                int64_t rows = 0;
                for (int32_t e = 0; e < b->experts; e++) rows = moqc_max(rows, j->part[i + e * b->parts].d.rows);
                groups += moqk_ceil(rows, 16 * tiles);
            }
            int64_t warps = (int64_t)tiles * u.ways, at_once = moqc_max(1, moqc_min(16 / warps, 2)), total = groups * blocks * choices;
            int64_t rounds = moqk_ceil(total, (int64_t)j->c->sm_count * at_once), steps = moqk_ceil(half, u.ways) * u.ways;
            double busy = (double)moqc_min(warps * at_once, 16) / 16, each = (double)tiles * (double)steps + x_cost * (double)half;
            double time = (double)rounds * (double)at_once * each / (0.4 + 0.6 * busy) + 4 * (double)rounds + (blocks > 1 ? 3 : 0);
            if (time < least) { least = time; *best = u; best->rows = j->call.m; }
        }
    return least < 1e30;
}

typedef void (*moqc_decode_kernel)(moqk_call, moqk_cut);

template <int FORM, int STEP> static moqc_decode_kernel moqc_decode_for(int columns, int split, int norm)
{
    if constexpr (FORM > MOQK_MXFP4 && FORM != MOQK_FAST_U4) { /* else >>cuda-runs makes it */
        if (norm) return split ? moqk_decode<FORM, STEP, 1, 1, 1> : moqk_decode<FORM, STEP, 1, 0, 1>;
    }
    if (split) return columns <= 8 ? moqk_decode<FORM, STEP, 1, 1> : columns <= 16 ? moqk_decode<FORM, STEP, 2, 1> : moqk_decode<FORM, STEP, 4, 1>;
    return columns <= 8 ? moqk_decode<FORM, STEP, 1, 0> : moqk_decode<FORM, STEP, 2, 0>;
}

static moqc_decode_kernel moqc_decode_find(int form, int step, int columns, int split, int norm)
{
    switch (form) {
    case MOQK_NVFP4: return moqc_decode_for<MOQK_NVFP4, 0>(columns, split, norm);
    case MOQK_MXFP4: return moqc_decode_for<MOQK_MXFP4, 0>(columns, split, norm);
    case MOQK_FAST_U8: return moqc_decode_for<MOQK_FAST_U8, 0>(columns, split, norm);
    case MOQK_FAST_BF16: return moqc_decode_for<MOQK_FAST_BF16, 0>(columns, split, norm);
    case MOQK_FAST_U4:
        if (step == 0) return moqc_decode_for<MOQK_FAST_U4, 0>(columns, split, norm);
        return step == 32 ? moqc_decode_for<MOQK_FAST_U4, 32>(columns, split, norm) : moqc_decode_for<MOQK_FAST_U4, 64>(columns, split, norm);
    default:
        if (step == 0) return moqc_decode_for<MOQK_FAST_E4M3, 0>(columns, split, norm);
        return step == 32 ? moqc_decode_for<MOQK_FAST_E4M3, 32>(columns, split, norm) : moqc_decode_for<MOQK_FAST_E4M3, 64>(columns, split, norm);
    }
}

/* ---- the launches of >>cuda-ring ---- */

typedef void (*moqc_ring_kernel)(moqk_call, moqk_ring);

template <int FORM, int STEP> static moqc_ring_kernel moqc_ring_for(int columns)
{
    if constexpr (moqk_fast_bits(FORM) > 4)
        if (columns <= 8) return moqk_decode_ring<FORM, STEP, 1, 1>;
    return columns <= 16 ? moqk_decode_ring<FORM, STEP, 2, 1> : moqk_decode_ring<FORM, STEP, 4, STEP == 0 ? 2 : 1>; /* else see >>cuda-runs */
}

static moqc_ring_kernel moqc_ring_find(int form, int step, int columns)
{
    switch (form) {
    case MOQK_NVFP4: return moqc_ring_for<MOQK_NVFP4, 0>(columns);
    case MOQK_MXFP4: return moqc_ring_for<MOQK_MXFP4, 0>(columns);
    case MOQK_FAST_U8: return moqc_ring_for<MOQK_FAST_U8, 0>(columns);
    case MOQK_FAST_BF16: return moqc_ring_for<MOQK_FAST_BF16, 0>(columns);
    case MOQK_FAST_U4: return step == 0 ? moqc_ring_for<MOQK_FAST_U4, 0>(columns) : step == 32 ? moqc_ring_for<MOQK_FAST_U4, 32>(columns) : moqc_ring_for<MOQK_FAST_U4, 64>(columns);
    default: return step == 0 ? moqc_ring_for<MOQK_FAST_E4M3, 0>(columns) : step == 32 ? moqc_ring_for<MOQK_FAST_E4M3, 32>(columns) : moqc_ring_for<MOQK_FAST_E4M3, 64>(columns);
    }
}

static int moqc_ring_pair(int step, int columns) { return columns > 16 && step == 0 ? 2 : 1; } /* row tiles of a warp */

/* The rest of a cut whose tiles, ways, blocks, stages and whole_x are chosen. Bytes of shared memory; 0: it cannot be. */
static int64_t moqc_ring_fill_in(moqk_ring *u, int form, int step, int64_t chunks, int columns, int rows)
{
    int64_t chunk_x = (int64_t)columns * 128 * (moqk_chunk_cols(form) / 64), share = moqk_ceil(chunks, u->blocks);
    int64_t weights = (int64_t)u->tiles * u->ways * moqk_chunk_bytes(form), pad = moqk_pad(weights, 128);
    if (u->tiles % moqc_ring_pair(step, columns) || share * (u->blocks - 1) >= chunks || u->ways > share || u->tiles > 31 || u->tiles < u->blocks) return 0;
    u->warps = u->tiles / moqc_ring_pair(step, columns) * u->ways;
    if (u->warps > 15) return 0;
    u->stages = (int32_t)moqc_min(u->stages, moqk_ceil(share, u->ways));
    u->owned = (int32_t)moqk_ceil(u->tiles, u->blocks);
    u->pitch = u->owned * 16 + 4;
    u->rows = rows;
    u->stage_bytes = (uint32_t)(pad + (u->whole_x ? 0 : chunk_x * u->ways));
    int64_t ring = 128 + (int64_t)u->stages * u->stage_bytes, sums = (int64_t)u->blocks * u->ways * rows * u->pitch * 4;
    u->x_at = (uint32_t)(u->whole_x ? ring : pad);
    if (u->whole_x) ring += share * chunk_x;
    u->sums_at = (uint32_t)(u->join ? 128 : ring);
    return u->join ? moqc_max(ring, 128 + sums) : ring + sums;
}

/* The cut that costs the busiest multiprocessor least, in chunks: its share of them and of x (blocks that fit twice begin before those of the
   launch before have ended, so that whole rounds do not count), more when few row tiles are in work at once, three chunks of every warp to fill the
   ring and to add up. The weights of these are fitted to timings on an H200 of 4 and 8 bits, five shapes, 8 and 16 rows. */
static int64_t moqc_ring_cut(const moqc_job *j, int form, int step, int columns, moqk_ring *best)
{
    int64_t chunks = moqk_ceil(j->part->d.cols, moqk_chunk_cols(form)), bytes_of_best = 0, twice = j->c->most_shared / 2 - 1024;
    int pair = moqc_ring_pair(step, columns);
    double least = 1e30, sms = j->c->sm_count, chunk_x = 0.15 * columns * 128 * (moqk_chunk_cols(form) / 64) / moqk_chunk_bytes(form);
    for (int32_t tiles = 1; tiles <= 28; tiles++)
        for (int32_t blocks = 1; blocks <= 2; blocks++)
            for (int32_t ways = 1; ways <= 15; ways++)
                for (int32_t stages = moqk_fast_bits(form) >= 8 ? 4 : 3; stages >= 2; stages--) {
                    moqk_ring u;
                    int64_t groups = 0, bytes, share = moqk_ceil(chunks, blocks);
                    for (int32_t i = 0; i < j->call.part_count; i++) groups += moqk_ceil(j->part[i].d.rows, 16 * tiles);
                    memset(&u, 0, sizeof u);
                    u.tiles = tiles;
                    u.ways = ways;
                    u.blocks = blocks;
                    u.stages = stages;
                    u.whole_x = columns <= 4;
                    bytes = moqc_ring_fill_in(&u, form, step, chunks, columns, j->call.m);
                    if (bytes == 0 || bytes > j->c->most_shared) continue;
                    double work = (double)(tiles * moqk_ceil(share, ways) * ways) + chunk_x * (double)share, grid = (double)(groups * blocks);
                    int two = bytes <= twice && (columns <= 16 || u.warps < 8) && grid > sms;
                    double busy = moqc_min(u.warps * pair * (two ? 2 : 1), 16);
                    double time = (two ? grid * work / sms + 0.25 * work : ceil(grid / sms) * work) * (0.4 + 9.6 / busy);
                    time += 3.0 * u.warps * ceil(grid / (two ? 2 * sms : sms)) + (blocks > 1 ? 30 : 0);
                    if (time < least) { least = time; *best = u; bytes_of_best = bytes; }
                }
    best->x = j->c->parted;
    return bytes_of_best;
}

static void moqc_launch_ring(const moqc_job *j, int form, int step, const moqk_ring *u, int64_t bytes)
{
    int split = !j->call.x_bf16, columns = j->call.m * (split ? 2 : 1);
    int64_t groups = 0, chunks = moqk_ceil(j->part->d.cols, moqk_chunk_cols(form));
    moqc_ring_kernel kernel = moqc_ring_find(form, step, columns);
    cudaLaunchConfig_t how = {};
    cudaLaunchAttribute with[2];
    memset(with, 0, sizeof with);
    for (int32_t i = 0; i < j->call.part_count; i++) groups += moqk_ceil(j->part[i].d.rows, 16 * u->tiles);
    with[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    with[0].val.programmaticStreamSerializationAllowed = 1;
    with[1].id = cudaLaunchAttributeClusterDimension;
    with[1].val.clusterDim.x = (unsigned)u->blocks;
    with[1].val.clusterDim.y = with[1].val.clusterDim.z = 1;
    how.stream = j->c->stream;
    how.attrs = with;
    how.numAttrs = 1;
    if (!u->whole_x) {
        int32_t blocks = (int32_t)(chunks * (moqk_chunk_cols(form) / 64));
        how.gridDim = dim3((unsigned)moqk_ceil(blocks * 16, 256), (unsigned)j->call.m);
        how.blockDim = dim3(256);
        void (*before)(moqk_call, int32_t, int32_t, uint8_t *) =
            form <= MOQK_MXFP4 ? (split ? moqk_split<MOQK_NVFP4, 1> : moqk_split<MOQK_NVFP4, 0>)
                               : form == MOQK_FAST_E4M3 ? (split ? moqk_split<MOQK_FAST_E4M3, 1> : moqk_split<MOQK_FAST_E4M3, 0>)
                                                        : (split ? moqk_split<MOQK_FAST_BF16, 1> : moqk_split<MOQK_FAST_BF16, 0>);
        if (!moqc_ok(j->c, cudaLaunchKernelEx(&how, before, j->call, j->part->d.cols, blocks, (uint8_t *)u->x), "decode-ring")) return;
    }
    how.gridDim = dim3((unsigned)u->blocks, (unsigned)groups);
    how.blockDim = dim3((unsigned)(u->warps + 1) * 32);
    how.dynamicSmemBytes = (size_t)bytes;
    how.numAttrs = u->blocks > 1 ? 2 : 1;
    if (!moqc_ok(j->c, cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, j->c->most_shared), "cudaFuncSetAttribute")) return;
    moqc_ok(j->c, cudaLaunchKernelEx(&how, kernel, j->call, *u), "decode-ring");
}

/* ---- the launches of >>cuda-runs ---- */

/* The first rows of x of a call, BF16 in rows of whole 16 bytes, as blocks of 64 columns with the swizzle that wgmma reads; a box has `slabs` of them for
   `tokens` rows. 0: the driver refuses. */
static int moqc_map_rows(const moqc_ctx *c, const moqk_call *call, int32_t rows, int32_t cols, int32_t tokens, int32_t slabs, CUtensorMap *map)
{
    static const cuuint32_t one[3] = {1, 1, 1};
    const cuuint32_t box[3] = {64, (cuuint32_t)tokens, (cuuint32_t)slabs};
    const cuuint64_t size[3] = {64, (cuuint64_t)rows, (cuuint64_t)cols / 64}, pitch[2] = {(cuuint64_t)call->ldx * 2, 128};
    return c->encode_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)(uintptr_t)call->x, size, pitch, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
                         CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

typedef void (*moqc_run_kernel)(const moqk_call, const moqk_run);

template <int FORM, int STEP, int NB, int WARPS> static moqc_run_kernel moqc_run_joined_or_not(int kind)
{
    return kind ? moqk_decode_run<FORM, STEP, NB, MOQK_RUN_JOINED, WARPS> : moqk_decode_run<FORM, STEP, NB, MOQK_RUN_PLAIN, WARPS>;
}

template <int FORM, int STEP> static moqc_run_kernel moqc_run_for(const moqk_run *u, int kind)
{
    if (kind == MOQK_RUN_NORM) return moqk_decode_run<FORM, STEP, 1, MOQK_RUN_NORM, MOQK_RUN_ALL>;
    if (kind == MOQK_RUN_ROW) return moqk_decode_run<FORM, STEP, 1, MOQK_RUN_ROW, MOQK_RUN_ALL>;
    if (u->ahead == 0) return moqc_run_joined_or_not<FORM, STEP, 1, MOQK_RUN_ALL>(kind);
    if (u->columns <= 8) return moqc_run_joined_or_not<FORM, STEP, 1, MOQK_RUN_MOST>(kind);
    if (u->tiles * u->ways > MOQK_RUN_FEW) return moqc_run_joined_or_not<FORM, STEP, 2, MOQK_RUN_MOST>(kind);
    return moqc_run_joined_or_not<FORM, STEP, 2, MOQK_RUN_FEW>(kind);
}

typedef void (*moqc_wide_kernel)(const moqk_call, const moqk_run, const CUtensorMap);

template <int FORM, int STEP> static moqc_wide_kernel moqc_wide_for(int kind)
{
    return kind ? moqk_decode_wide<FORM, STEP, MOQK_RUN_JOINED> : moqk_decode_wide<FORM, STEP, MOQK_RUN_PLAIN>;
}

static moqc_wide_kernel moqc_wide_find(int form, int step, int kind)
{
    if (form == MOQK_NVFP4) return moqc_wide_for<MOQK_NVFP4, 0>(kind);
    if (form == MOQK_MXFP4) return moqc_wide_for<MOQK_MXFP4, 0>(kind);
    if (step == 0) return moqc_wide_for<MOQK_FAST_U4, 0>(kind);
    return step == 32 ? moqc_wide_for<MOQK_FAST_U4, 32>(kind) : moqc_wide_for<MOQK_FAST_U4, 64>(kind);
}

static moqc_run_kernel moqc_run_find(int form, int step, const moqk_run *u, int kind)
{
    if (form == MOQK_NVFP4) return moqc_run_for<MOQK_NVFP4, 0>(u, kind);
    if (form == MOQK_MXFP4) return moqc_run_for<MOQK_MXFP4, 0>(u, kind);
    if (step == 0) return moqc_run_for<MOQK_FAST_U4, 0>(u, kind);
    return step == 32 ? moqc_run_for<MOQK_FAST_U4, 32>(u, kind) : moqc_run_for<MOQK_FAST_U4, 64>(u, kind);
}

/* Names the parts of this form; 0: they are more than a launch takes, or differ in columns. */
static int moqc_run_parts(const moqc_job *j, int form, int step, moqk_run *u)
{
    int32_t y_first = 0;
    for (int32_t i = 0; i < j->call.part_count; y_first += j->part[i].d.rows, i++) {
        const moqk_part *p = &j->part[i].d;
        if (p->rows == 0 || moqk_form_of(*p) != form || moqk_form_step(*p, form) != step) continue;
        if (u->parts == MOQK_RUN_PARTS || (u->parts > 0 && p->cols != u->cols)) return 0;
        moqk_run_part *q = &u->part[u->parts++];
        q->packed = p->packed[0];
        q->bias = p->bias;
        q->rows = p->rows;
        q->y_first = y_first;
        q->groups = (int32_t)moqk_fast_of(*p, form).groups;
        while (step > 0 && 1 << q->shift < p->group) q->shift++;
        q->factor = p->factor;
        u->cols = p->cols;
    }
    return u->parts > 0;
}

/* Warps of moqk_decode_wide that have the row tiles of a way: fours. */
static int32_t moqc_wide_warps(const moqk_run *u) { return (int32_t)moqk_pad(u->tiles, 4); }

/* Likewise of moqk_decode_wide, with its places. */
static int64_t moqc_wide_fill_in(moqk_run *u, int form)
{
    const int32_t slots = u->blocks * u->ways, each = moqc_wide_warps(u), warps = each * u->ways;
    if (slots > u->chunks || warps > MOQK_WIDE_WARPS) return 0;
    u->tiles_magic = 65536 / (uint32_t)each + 1;
    u->each = u->chunks / slots;
    u->more = u->chunks % slots;
    u->tiles_own = (int32_t)moqk_ceil(u->tiles, u->blocks);
    if (u->pairs && (u->tiles % 2 || u->tiles_own % 2)) return 0;
    u->own = u->tiles_own * 16 >> u->pairs;
    u->share = u->ahead = 0;
    int64_t at = (int64_t)u->ways * MOQK_WIDE_PLACES * MOQK_WIDE_X + (int64_t)warps * moqk_chunk_bytes(form);
    u->bars_at = (uint32_t)at;
    at += moqk_pad(8 * (2 * u->ways * MOQK_WIDE_PLACES + warps + 1), 128);
    u->sums_at = (uint32_t)at;
    return at + (int64_t)slots * u->tiles_own * 1024;
}

/* Before SM90, where x does not fit whole: as many chunks of it at once as find room twice in every way. Sums come to lie where x was. */
static int64_t moqc_run_places(moqk_run *u, int32_t longest, int64_t room)
{
    const int32_t warps = u->tiles * u->ways, most_ways = 15; /* which have a barrier of their own each */
    if (warps > MOQK_RUN_MOST || u->ways > most_ways) return 0;
    const int64_t sums = (int64_t)warps * (u->columns > 8 ? 2 : 1) * 512, at = u->sums_at;
    u->ahead = 1;
    u->x_at = u->sums_at;
    for (u->phase = (int32_t)moqc_min(longest, 8); u->phase > 0; u->phase--) {
        u->x_pitch = (uint32_t)(u->phase * 512 + 16);
        u->place = (uint32_t)u->columns * u->x_pitch;
        const int64_t bytes = at + moqc_max(sums, (int64_t)u->ways * 2 * u->place);
        if (bytes <= room) return bytes;
    }
    return 0;
}

/* The rest of a cut whose tiles, ways, blocks and stages are chosen. room: x comes to two places when it would need more; or 0. Bytes of shared
   memory; 0: it cannot be. */
static int64_t moqc_run_fill_in(moqk_run *u, int form, int64_t room)
{
    const int32_t slots = u->blocks * u->ways, warps = u->tiles * u->ways;
    if (slots > u->chunks) return 0;
    u->each = u->chunks / slots;
    u->more = u->chunks % slots;
    const int32_t longest = u->each + (u->more > 0), share = u->ways * u->each + (int32_t)moqc_min(u->ways, u->more);
    if (u->stages > longest) return 0;
    u->phase = (int32_t)moqk_ceil(longest, u->columns < 4 ? 1 : MOQK_RUN_PHASES);
    /* Short runs have nothing to hide x behind; few rows have little of it. */
    u->ahead = longest < MOQK_RUN_PHASES ? (u->columns > 8 ? MOQK_RUN_PHASES : 0) : u->columns > (u->bulk ? 4 : 8);
    if (u->ahead > 0 && warps > MOQK_RUN_MOST) return 0;
    u->tiles_own = (int32_t)moqk_ceil(u->tiles, u->blocks);
    if (u->pairs && (u->tiles % 2 || u->tiles_own % 2)) return 0;
    u->own = u->tiles_own * 16 >> u->pairs;
    u->own_magic = (uint32_t)(((uint64_t)1 << 32) / (uint32_t)u->own + 1);
    u->pitch = u->tiles_own * 16 + 4;
    u->x_pitch = (uint32_t)(share * 512 + 16);
    int64_t at = (int64_t)warps * u->stages * (moqk_chunk_bytes(form) + u->copies);
    u->bars_at = (uint32_t)at;
    at += moqk_pad(8 * (MOQK_RUN_PHASES * u->ways + warps * u->stages + 1), 128);
    u->sums_at = (uint32_t)at;
    at += u->ahead > 0 ? (int64_t)slots * u->tiles_own * (u->columns > 8 ? 2 : 1) * 512 : moqk_pad((int64_t)slots * u->rows * u->pitch * 4, 128);
    u->x_at = (uint32_t)at;
    u->place = 0;
    const int64_t whole = at + (int64_t)u->columns * u->x_pitch;
    return room > 0 && whole > room ? moqc_run_places(u, longest, room) : whole;
}

/* What a cut costs, in chunks that one multiprocessor works on: its share of them and of x, more when few warps are at work, when the launches
   before and after find no room beside it, when the blocks of a cluster add up. Fitted to timings on an H200: six shapes, 1 to 16 rows. */
static double moqc_run_cost(const moqc_ctx *c, const moqk_run *u, int64_t groups, int64_t bytes)
{
    const double sms = u->blocks > 2 ? c->sm_count * 10 / 11 : c->sm_count; /* clusters of 4 leave some out */
    const double share = (double)moqk_ceil(u->chunks, u->blocks), x = (u->share ? 0.025 : 0.05) * u->columns * share;
    const int warps = u->tiles * u->ways, two = 2 * (bytes + 1024) <= c->most_shared + 1024 && warps <= 16;
    const double grid = (double)(groups * u->blocks), rounds = ceil(grid / sms), run = u->each + (u->more > 0);
    const double work = u->tiles * (0.3 * run * u->ways + 0.7 * share) + x;
    const int twice = two && grid > sms && u->rows > 1; /* of a single row joined with its neighbours no two blocks share one: see moqc_run_joined */
    double cost = (twice ? 1.1 * grid / sms : rounds) * work * (1 + 1.5 / (twice ? 2 * warps : warps));
    return cost + 4 * rounds + (u->blocks > 1 ? 4 : 0) + (two ? 0 : 3) + (warps > 16 ? 8 : 0) + 0.02 * warps;
}

/* The same of moqk_decode_wide, in microseconds on an H200, 16 rows: of each chunk of a run, with more warps and more ways longer; of a launch, half of it
   where the next one finds room beside it; of sums across blocks; of x for each block. */
static double moqc_wide_cost(const moqc_ctx *c, const moqk_run *u)
{
    const double sms = u->blocks > 2 ? c->sm_count * 10 / 11 : c->sm_count, grid = (double)u->part[u->parts - 1].end * u->blocks;
    const double warps = moqc_wide_warps(u) * u->ways, run = (double)u->chunks / (u->blocks * u->ways);
    const double launch = (1.6 + 0.1 * warps) * (2 * grid <= sms ? 0.5 : 1.0), sums = u->blocks > 1 ? 0.6 : 0.0;
    return ceil(grid / sms) * (run * (0.26 + 0.055 * warps + 0.03 * u->ways) + launch) + sums + 0.001 * grid;
}

/* Is moqk_decode_wide taken? Always where the other kernel has few warps; where it has many, and with them more on its way, only by the estimate of both.
   Scales of groups cost that one more time. */
static int moqc_run_yields(const moqc_ctx *c, const moqk_run *run, const moqk_run *wide, int step)
{
    const int warps = run->tiles * run->ways, longest = run->each + (run->more > 0);
    const double rounds = ceil((double)run->part[run->parts - 1].end * run->blocks / c->sm_count), us = rounds * (4.1 + 0.074 * longest * warps);
    return warps <= MOQK_RUN_FEW || 1.04 * moqc_wide_cost(c, wide) < (step > 0 ? 1.17 : 1.0) * us;
}

/* Groups of row tiles, whose ends the parts learn. */
static int64_t moqc_run_groups(moqk_run *u)
{
    int64_t groups = 0;
    if (u->pairs) groups = u->part[0].end = u->part[1].end = (int32_t)moqk_ceil(u->part[0].rows, 8 * u->tiles);
    else for (int32_t i = 0; i < u->parts; i++) u->part[i].end = (int32_t)(groups += moqk_ceil(u->part[i].rows, 16 * u->tiles));
    return groups;
}

/* The cheapest cut of u's kernel. room: see moqc_run_fill_in. Bytes of shared memory; 0: x is too large. */
static int64_t moqc_run_search(const moqc_job *j, int form, int64_t room, moqk_run *u, moqk_run *best)
{
    int64_t bytes_of_best = 0;
    double least = 1e30;
    const int clusters = j->c->sm == 90; /* where they have run */
    for (u->blocks = 1; u->blocks == 1 || (clusters && (u->blocks == 2 || (u->blocks == 4 && (u->wide || least == 1e30)))); u->blocks *= 2)
        for (u->tiles = 1; u->tiles <= 28; u->tiles++)
            for (u->ways = 1; u->tiles * u->ways <= MOQK_RUN_ALL; u->ways++) {
                const int64_t bytes = u->wide ? moqc_wide_fill_in(u, form) : moqc_run_fill_in(u, form, room);
                if (bytes == 0 || bytes > j->c->most_shared) continue;
                const int64_t groups = moqc_run_groups(u);
                u->share = clusters && !u->wide && u->bulk && u->blocks == 1 && u->rows >= 4;
                const double cost = u->wide ? moqc_wide_cost(j->c, u) : moqc_run_cost(j->c, u, moqk_pad(groups, 1 + u->share), bytes);
                if (cost < least) { least = cost; bytes_of_best = bytes; *best = *u; }
            }
    return bytes_of_best;
}

/* The cut of a launch. Bytes of shared memory; 0: x is too large, or parts are too many. */
static int64_t moqc_run_cut(const moqc_job *j, int form, int step, int columns, moqk_run *best)
{
    moqk_run u;
    CUtensorMap map;
    memset(&u, 0, sizeof u);
    if (!moqc_run_parts(j, form, step, &u)) return 0;
    u.rows = j->call.m;
    u.columns = columns;
    u.pairs = u.parts == 2 && u.part[0].rows == u.part[1].rows; /* perhaps gate and up; the same cut whether an activation follows or not */
    u.chunks = (int32_t)moqk_ceil(u.cols, 256);
    const int pieces = j->call.x_bf16 && ((uintptr_t)j->call.x & 15) == 0 && j->call.ldx % 8 == 0; /* of 16 bytes, as they are */
    u.bulk = j->c->sm >= 90 && pieces && u.cols % 256 == 0;
    const uint32_t copies = step == 0 ? 0 : step == 32 ? moqk_run_factors<MOQK_FAST_U4, 32>::COPIES : moqk_run_factors<MOQK_FAST_U4, 64>::COPIES;
    u.copies = j->c->sm >= 90 ? 0 : (int32_t)copies;
    u.stages = 1;
    if (j->c->sm < 90 && !pieces && columns > 2 && (int64_t)columns * u.cols * 2 > j->c->most_shared / 2) return 0; /* >>cuda-decode is faster */
    int64_t bytes_of_best = moqc_run_search(j, form, j->c->sm < 90 && pieces ? j->c->most_shared : 0, &u, best);
    if (columns > 8 && u.bulk && j->c->encode_map && j->c->wgmma && moqc_map_rows(j->c, &j->call, u.rows, u.cols, 16, 4, &map)) { /* else x comes by rows */
        moqk_run wide = u;
        u.wide = 1;
        const int64_t bytes = moqc_run_search(j, form, 0, &u, &wide);
        if (bytes > 0 && (bytes_of_best == 0 || moqc_run_yields(j->c, best, &wide, step))) {
            *best = wide;
            bytes_of_best = bytes;
        }
    }
    /* Little work: fewer warps; few warps: more under way, but where the kernel's code has one stage. */
    if (bytes_of_best > 0 && columns <= 8 && best->blocks == 1 && j->c->sm >= 90) {
        const int little = best->each == 2 && best->ways % 4 == 0;
        if (little) best->ways = best->ways / 4 * 3;
        if (columns <= 2 && !best->pairs && (little || (best->each >= 8 && best->tiles * best->ways <= 14))) best->stages = 2;
        bytes_of_best = moqc_run_fill_in(best, form, 0);
        if (bytes_of_best > j->c->most_shared) {
            best->stages = 1;
            bytes_of_best = moqc_run_fill_in(best, form, 0);
        }
    }
    return bytes_of_best;
}

enum { MOQC_RUN_EAGER = 5 }; /* 2 to 7 take the same time on an H200 */

/* One row of a product that is joined with its neighbours, so that each launch waits for the one before: as much room as keeps a multiprocessor to
   itself, or of blocks that begin where the launch before ends two come to lie on one multiprocessor, which takes twice the time; and one chunk of a
   warp on its way, because more would delay x. Where many warps ask, or where the launch before is not a product (short runs: o, behind attention) and
   loads itself, even these would: all but a few wait. Products that follow each other without waiting gain by overlapping. */
static int64_t moqc_run_joined(const moqc_ctx *c, int form, moqk_run *u)
{
    u->stages = 1;
    if (u->norm.threads ? u->tiles * u->ways > 16 : u->each == 2) u->eager = MOQC_RUN_EAGER; /* a run of one chunk has nothing to do meanwhile */
    return moqc_max(moqc_run_fill_in(u, form, 0), c->most_shared / 2);
}

static void moqc_hold_run(const moqc_job *j, int form, int step, const moqk_run *u, int64_t bytes); /* see >>cuda-together */
static moqk_call moqc_norm_in_decode(const moqc_job *j, int form, moqk_cut *u);                   /* likewise */
static int moqc_hold_router(const moqc_job *j, int form, const moqk_cut *u);                      /* see >>cuda-moe-host */

static void moqc_launch_run(const moqc_job *j, int form, int step, moqk_run *u, int64_t bytes)
{
    u->eager = MOQK_RUN_ALL;
    if (u->columns <= 2 && j->c->sm >= 90 && (u->norm.threads || u->into || u->mid)) bytes = moqc_run_joined(j->c, form, u);
    if (u->wide) bytes = moqc_max(bytes, j->c->most_shared / 2); /* or two blocks come to lie on one multiprocessor: see moqc_run_joined */
    const int one = u->rows == 1 && !u->place, joined = u->pairs || u->into || u->mid;
    const int kind = u->norm.threads ? MOQK_RUN_NORM : !joined ? MOQK_RUN_PLAIN : one ? MOQK_RUN_ROW : MOQK_RUN_JOINED;
    const moqc_run_kernel kernel = u->wide ? NULL : moqc_run_find(form, step, u, kind);
    const moqc_wide_kernel wide = u->wide ? moqc_wide_find(form, step, kind) : NULL;
    const void *code = u->wide ? (const void *)wide : (const void *)kernel;
    CUtensorMap map;
    cudaLaunchConfig_t how = {};
    cudaLaunchAttribute with[2];
    memset(with, 0, sizeof with);
    with[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    with[0].val.programmaticStreamSerializationAllowed = 1;
    with[1].id = cudaLaunchAttributeClusterDimension;
    with[1].val.clusterDim.x = (unsigned)u->blocks;
    with[1].val.clusterDim.y = 1 + (unsigned)u->share;
    with[1].val.clusterDim.z = 1;
    how.gridDim = dim3((unsigned)u->blocks, (unsigned)moqk_pad(u->part[u->parts - 1].end, 1 + u->share)); /* one that is too many repeats rows */
    how.blockDim = u->wide ? dim3(32, (unsigned)(moqc_wide_warps(u) * u->ways + 1)) : dim3(32, (unsigned)u->tiles, (unsigned)u->ways);
    how.dynamicSmemBytes = (size_t)bytes;
    how.stream = j->c->stream;
    how.attrs = with;
    how.numAttrs = j->c->sm < 90 ? 0 : u->blocks > 1 || u->share ? 2 : 1;
    cudaError_t e = cudaFuncSetAttribute(code, cudaFuncAttributeMaxDynamicSharedMemorySize, j->c->most_shared);
    if (j->c->capturing) moqc_all_shared(j->c, code);
    if (!moqc_ok(j->c, e, "cudaFuncSetAttribute")) return;
    if (u->wide && !moqc_map_rows(j->c, &j->call, u->rows, u->cols, 16, 4, &map)) moqc_ok(j->c, cudaErrorInvalidValue, "cuTensorMapEncodeTiled");
    else if (u->wide) moqc_ok(j->c, cudaLaunchKernelEx(&how, wide, j->call, *u, map), "decode-run");
    else moqc_ok(j->c, cudaLaunchKernelEx(&how, kernel, j->call, *u), "decode-run");
}

/* A launch of >>cuda-decode. */
static void moqc_launch_cut(const moqc_job *j, int form, int step, const moqk_cut *cut)
{
    const int64_t choices = j->call.tiles ? j->call.most_tiles : 1;
    const int split = !j->call.x_bf16, columns = j->call.m * (split ? 2 : 1), norm = cut->norm.threads > 0;
    const moqc_bank *b = j->bank;
    const moqk_cut u = *cut;
    int64_t groups = 0;
    cudaLaunchConfig_t how = {};
    cudaLaunchAttribute with[2];
    for (int32_t i = 0; i < j->call.part_count; i++) {
        int64_t rows = 0;
        for (int32_t e = 0; e < b->experts; e++) rows = moqc_max(rows, j->part[i + e * b->parts].d.rows);
        groups += moqk_ceil(rows, 16 * u.tiles);
    }
    moqc_decode_kernel kernel = moqc_decode_find(form, step, columns, split, norm);
    size_t bytes = (size_t)moqc_decode_sums(&u) + (size_t)u.stage * (size_t)(moqk_chunk_cols(form) / 64) * (size_t)columns * 128;
    memset(with, 0, sizeof with);
    how.gridDim = dim3((unsigned)u.blocks, (unsigned)groups, (unsigned)choices);
    how.blockDim = dim3(32, (unsigned)u.tiles, (unsigned)u.ways);
    how.dynamicSmemBytes = bytes;
    how.stream = j->c->stream;
    how.attrs = with;
    if (u.blocks > 1) {
        with[how.numAttrs].id = cudaLaunchAttributeClusterDimension;
        with[how.numAttrs].val.clusterDim.x = (unsigned)u.blocks;
        with[how.numAttrs].val.clusterDim.y = with[how.numAttrs].val.clusterDim.z = 1;
        how.numAttrs++;
    }
    if (j->c->sm >= 90) { /* starts while the kernel before ends: weights are on their way when x is there */
        with[how.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        with[how.numAttrs].val.programmaticStreamSerializationAllowed = 1;
        how.numAttrs++;
    }
    const cudaError_t e = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, j->c->most_shared);
    if (moqc_ok(j->c, e, "cudaFuncSetAttribute")) moqc_ok(j->c, cudaLaunchKernelEx(&how, kernel, j->call, u), "decode-mma");
}

/* One launch for parts of one form; others of the same call find nothing to do in it. */
static void moqc_launch_decode_form(const moqc_job *j, int form, int step)
{
    const int64_t choices = j->call.tiles ? j->call.most_tiles : 1;
    const int columns = j->call.m * (j->call.x_bf16 ? 1 : 2);
    int room = 0;
    moqk_cut u;
    moqk_ring ring;
    if (!j->call.tiles && moqk_fast_bits(form) == 4 && columns <= 16) {
        moqk_run run;
        int64_t bytes = moqc_run_cut(j, form, step, columns, &run);
        if (bytes > 0 && j->c->holds) moqc_hold_run(j, form, step, &run, bytes);
        else if (bytes > 0) moqc_launch_run(j, form, step, &run, bytes);
        if (bytes > 0) return;
        moqc_let_go(j->c);
    }
    const int large = moqk_fast_bits(form) >= 8 && (int64_t)j->part->d.rows * j->part->d.cols > 100000000, known = columns > 8 || moqk_fast_bits(form) > 4;
    if (j->c->sm == 90 && !j->call.tiles && known && (j->call.m > 4 || large)) { /* the copy engine */
        int64_t bytes = moqc_ring_cut(j, form, step, columns, &ring);
        if (bytes > 0) { moqc_let_go(j->c); moqc_launch_ring(j, form, step, &ring, bytes); return; }
    }
    moqc_ok(j->c, cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, j->c->device), "cudaDeviceGetAttribute");
    if (!moqc_decode_cut(j, form, choices, columns, room, &u)) { moqc_ok(j->c, cudaErrorInvalidConfiguration, "decode-mma"); return; }
    moqc_job job = *j;
    job.call = moqc_norm_in_decode(j, form, &u);
    if (!moqc_hold_router(&job, form, &u)) moqc_launch_cut(&job, form, step, &u);
}

static void moqc_launch_decode(const struct moqc_job *j)
{
    const moqc_bank *b = j->bank;
    uint32_t forms = 0; /* bit: form * 3 + (0, 32 or 64: 0, 1, 2) */
    for (int32_t i = 0; i < j->call.part_count; i++)
        for (int32_t e = 0; e < b->experts; e++) {
            const moqk_part *p = &j->part[i + e * b->parts].d;
            int form = p->rows > 0 ? moqk_form_of(*p) : -1;
            if (form >= 0) forms |= 1u << (form * 3 + moqk_form_step(*p, form) / 32);
        }
    for (int i = 0; i < MOQK_FORMS * 3; i++) if (forms >> i & 1) moqc_launch_decode_form(j, i / 3, i % 3 * 32);
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-gemm-host  how products of 17 and more rows are cut and launched
   ------------------------------------------------------------------------------------------------ */

/* F32 activations, and the caller asked for what is stored or for all of it: products keep 16 bits of each value (two BF16 parts), and group scales stay
   out of the weights. */
static int moqc_precise(int bf16, moq_act act) { return !bf16 && act != MOQ_ACT_AUTO && act != MOQ_ACT_BF16; }

static int moqc_fits_wgmma(const struct moqc_shape *s)
{
    const moqk_part *p = s->part;
    int form = moqk_form_of(*p), precise = moqc_precise(s->bf16, s->act);
    return s->wgmma && form >= 0 && p->rows >= 16 && p->cols >= (!precise ? 64 : s->grouped ? 512 : 1024) && !(precise && moqk_form_grouped(*p, form));
}

/* Inputs that are rounded to E4M3 or I8 with a scale of the tensor, the token or 128 columns, and weights that become the same in registers. */
static int moqc_fits_bytes(const struct moqc_shape *s)
{
    const moqk_part *p = s->part;
    int form = moqk_form_of(*p), grouped = form >= 0 && moqk_form_grouped(*p, form);
    if (!s->wgmma || form < 0 || !p->rounds || p->rows < 16 || p->cols < (!moqc_precise(s->bf16, s->act) ? 128 : s->grouped ? 512 : 1024)) return 0;
    if (p->in_zero_point || p->input_zero != 0 || p->in_scale == MOQ_F8_E8M0 || p->in_scale == MOQ_F8_E4M3) return 0;
    if (p->in_elem == MOQ_I8) return form == MOQK_FAST_U8 && p->zero == 128 && !p->has_zeros && p->in_group == 0 && p->cols < 1 << 17;
    if (p->in_elem != MOQ_F8_E4M3 || (grouped && p->group % 128 != 0)) return 0;
    if (moqk_fast_bits(form) == 4 && s->rows_of_x <= 64) return 0; /* BF16 is faster there */
    if (p->in_group != 0) return form == MOQK_FAST_E4M3 && grouped && p->in_group == 128 && p->in_dynamic;
    return form == MOQK_MXFP4 || form == MOQK_FAST_U4 || form == MOQK_FAST_E4M3;
}

/* What the inputs of a call are divided by before they are rounded to BF16, so that stored codes stay exact; parts they need. */
static void moqc_unit_of(const moqc_job *j, const moqk_part *p, int *unit, int *parts)
{
    int two_level = p->in_scale == MOQ_F8_E4M3;
    *unit = MOQK_NO_UNIT;
    if (p->rounds && p->in_scale != MOQ_F8_E8M0) {
        if (!p->in_dynamic || two_level) *unit = MOQK_STATIC_UNIT;
        else if (p->in_group == 0 && !p->in_zero_point) *unit = MOQK_TOKEN_UNIT;
    }
    *parts = j->call.x_bf16 || *unit != MOQK_NO_UNIT || (p->rounds && p->in_scale == MOQ_F8_E8M0) || !moqc_precise(j->c->bf16, j->c->act) ? 1 : 2;
}

/* Any device. Few columns, where one term may be the whole sum, are left to the F32 kernels. */
static int moqc_fits_mma(const struct moqc_shape *s)
{
    const moqk_part *p = s->part;
    return moqk_form_of(*p) >= 0 && p->rows >= 16 && p->cols >= (!moqc_precise(s->bf16, s->act) ? 64 : s->grouped ? 512 : 1024);
}

typedef void (*moqc_gemm_kernel)(moqk_call, moqk_gemm_args, moqk_maps);
typedef void (*moqc_mma_kernel)(moqk_call, moqk_gemm_args);

/* A kernel, its threads, the shared memory that it needs and slabs of a stage of x. */
typedef struct moqc_gemm_choice { moqc_gemm_kernel kernel; int threads, shared, x_slabs; } moqc_gemm_choice;

template <int FORM, int GROUPED, int BM> static moqc_gemm_choice moqc_wgmma_of()
{
    typedef moqk_rings<FORM, GROUPED, BM, 0> R;
    return {moqk_gemm_wgmma<FORM, GROUPED, BM>, R::TEAMS * 128 + 128, R::SHARED, R::X_SLABS};
}

template <int FORM, int GROUPED, int BM> static moqc_gemm_choice moqc_bytes_of()
{
    return {moqk_gemm_bytes<FORM, GROUPED, BM>, 384, moqk_rings<FORM, GROUPED, BM, 1>::SHARED, 0};
}

template <int FORM, int GROUPED> static moqc_gemm_choice moqc_wgmma_for(int tokens)
{
    constexpr int BITS = moqk_fast_bits(FORM);
    if constexpr (BITS == 4) if (tokens == 32) return moqc_wgmma_of<FORM, GROUPED, 32>();
    if (tokens == 64) return moqc_wgmma_of<FORM, GROUPED, 64>();
    if (tokens == 160) return moqc_wgmma_of<FORM, GROUPED, 160>();
    if constexpr (BITS != 8) {
        if (tokens == 192) return moqc_wgmma_of<FORM, GROUPED, 192>();
        if (tokens == 304) return moqc_wgmma_of<FORM, GROUPED, 304>();
    }
    return tokens == 256 ? moqc_wgmma_of<FORM, GROUPED, 256>() : moqc_wgmma_of<FORM, GROUPED, 128>();
}

static moqc_gemm_choice moqc_wgmma_find(int form, int grouped, int tokens)
{
    switch (form) {
    case MOQK_NVFP4: return moqc_wgmma_for<MOQK_NVFP4, 0>(tokens);
    case MOQK_MXFP4: return moqc_wgmma_for<MOQK_MXFP4, 0>(tokens);
    case MOQK_FAST_U4: return grouped ? moqc_wgmma_for<MOQK_FAST_U4, 1>(tokens) : moqc_wgmma_for<MOQK_FAST_U4, 0>(tokens);
    case MOQK_FAST_U8: return moqc_wgmma_for<MOQK_FAST_U8, 0>(tokens);
    case MOQK_FAST_BF16: return moqc_wgmma_for<MOQK_FAST_BF16, 0>(tokens);
    default: return grouped ? moqc_wgmma_for<MOQK_FAST_E4M3, 1>(tokens) : moqc_wgmma_for<MOQK_FAST_E4M3, 0>(tokens);
    }
}

template <int FORM, int GROUPED> static moqc_gemm_choice moqc_bytes_for(int tokens)
{
    if constexpr (moqk_fast_bits(FORM) == 8) if (tokens == 160) return moqc_bytes_of<FORM, GROUPED, 160>();
    return tokens == 256 ? moqc_bytes_of<FORM, GROUPED, 256>() : moqc_bytes_of<FORM, GROUPED, 128>();
}

static moqc_gemm_choice moqc_bytes_find(int form, int grouped, int tokens)
{
    switch (form) {
    case MOQK_MXFP4: return moqc_bytes_for<MOQK_MXFP4, MOQK_RELATIVE>(tokens);
    case MOQK_FAST_U4: return grouped ? moqc_bytes_for<MOQK_FAST_U4, 1>(tokens) : moqc_bytes_for<MOQK_FAST_U4, 0>(tokens);
    case MOQK_FAST_U8: return moqc_bytes_for<MOQK_FAST_U8, 0>(tokens);
    default:
        if (tokens == 64) return grouped ? moqc_bytes_of<MOQK_FAST_E4M3, 1, 64>() : moqc_bytes_of<MOQK_FAST_E4M3, 0, 64>();
        if (grouped) return tokens == 160 ? moqc_bytes_of<MOQK_FAST_E4M3, 1, 160>() : moqc_bytes_of<MOQK_FAST_E4M3, 1, 128>();
        return moqc_bytes_for<MOQK_FAST_E4M3, 0>(tokens);
    }
}

/* most: tokens of a tile, MOQK_MMA_FEW only where moqc_mma_few says so. */
static moqc_mma_kernel moqc_mma_find(int form, int grouped, int most)
{
    if (most == MOQK_MMA_FEW) {
        if (form == MOQK_NVFP4) return moqk_gemm_mma<MOQK_NVFP4, 0, MOQK_MMA_FEW>;
        if (form == MOQK_MXFP4) return moqk_gemm_mma<MOQK_MXFP4, 0, MOQK_MMA_FEW>;
        return grouped ? moqk_gemm_mma<MOQK_FAST_U4, 2, MOQK_MMA_FEW> : moqk_gemm_mma<MOQK_FAST_U4, 0, MOQK_MMA_FEW>;
    }
    switch (form) {
    case MOQK_NVFP4: return moqk_gemm_mma<MOQK_NVFP4, 0, MOQK_MMA_TOKENS>;
    case MOQK_MXFP4: return moqk_gemm_mma<MOQK_MXFP4, 0, MOQK_MMA_TOKENS>;
    case MOQK_FAST_U4: return grouped ? moqk_gemm_mma<MOQK_FAST_U4, 2, MOQK_MMA_TOKENS> : moqk_gemm_mma<MOQK_FAST_U4, 0, MOQK_MMA_TOKENS>;
    case MOQK_FAST_U8: return moqk_gemm_mma<MOQK_FAST_U8, 0, MOQK_MMA_TOKENS>;
    case MOQK_FAST_BF16: return moqk_gemm_mma<MOQK_FAST_BF16, 0, MOQK_MMA_TOKENS>;
    default: return grouped ? moqk_gemm_mma<MOQK_FAST_E4M3, 2, MOQK_MMA_TOKENS> : moqk_gemm_mma<MOQK_FAST_E4M3, 0, MOQK_MMA_TOKENS>;
    }
}

enum { MOQC_MMA, MOQC_WGMMA, MOQC_BYTES, MOQC_DENSE4 }; /* the kernels of this section; only in moqc_tiles: MOQC_WGMMA with weights of 4 bits, no experts */

enum { MOQC_TILES = 18 };
static const struct { int32_t tokens, which; double slab, end, shared_end; } moqc_tiles[MOQC_TILES] = { /* see moqc_cut_gemm */
    {32, MOQC_WGMMA, 0.195, 1.2, 2.4}, {64, MOQC_WGMMA, 0.24, 1.4, 2.7}, {128, MOQC_WGMMA, 0.37, 0.9, 3.2}, {160, MOQC_WGMMA, 0.455, 1.5, 4.0},
    {192, MOQC_WGMMA, 0.505, 1.6, 4.6}, {256, MOQC_WGMMA, 0.65, 1.4, 7.4}, {304, MOQC_WGMMA, 0.757, 2.2, 8.1},
    {32, MOQC_DENSE4, 0.22, 0.9, 2.0}, {64, MOQC_DENSE4, 0.264, 2.6, 2.95}, {128, MOQC_DENSE4, 0.352, 2.7, 3.9}, {160, MOQC_DENSE4, 0.438, 2.3, 6.0},
    {192, MOQC_DENSE4, 0.512, 4.9, 5.2}, {256, MOQC_DENSE4, 0.667, 5.8, 8.6}, {304, MOQC_DENSE4, 0.794, 9.0, 11.2},
    {64, MOQC_BYTES, 0.26, 1, 3}, {128, MOQC_BYTES, 0.30, 1.5, 4}, {160, MOQC_BYTES, 0.36, 1.8, 5},
    {256, MOQC_BYTES, 0.52, 2.5, 9}};

/* How a launch is cut: tokens of a tile, blocks, tiles that are not cut; blocks of a cluster. */
typedef struct moqc_gemm_cut { int32_t tokens, blocks, whole, split; } moqc_gemm_cut;

/* The cut with the least estimated time in microseconds: of 64 columns of a tile, of a tile's end, and of one that two to four blocks of a cluster share
   or that runs of units meet in, measured on one H200. Blocks that run through tiles of their own do not share x in the cache: 8 % slower, and no gain
   where the last round is three quarters full.
   Up to 192 tokens decoding 4-bit integers takes 3 to 15 % longer, up to 64 and beyond 256 fetching BF16 14 and 10 %. Bytes: half as many slabs.
   MOQC_DENSE4 was fitted to every cut of 56 products (2048x2048 to 5120x13824, 64 to 1,024 rows) of NVFP4 and of INT4 with groups of 32 and 128: on average
   what it chooses takes 0.3 % longer than the best. There a last round goes faster the fewer multiprocessors are at work (a quarter with one), and a launch
   for at most half of them hides 2 us of its beginning behind the launch before it. */
static moqc_gemm_cut moqc_cut_gemm(const moqc_job *j, int form, int grouped, int32_t group, int64_t units, int which)
{
    moqc_gemm_cut best = {128, 1, INT32_MAX, 1}; /* every form has it: what a measurement gets that asks for a cut that is none */
    double least = 1e30;
    const int dense4 = which == MOQC_WGMMA && moqk_fast_bits(form) == 4 && !j->call.tiles;
    for (int i = 0; i < MOQC_TILES; i++) {
        const int32_t tokens = moqc_tiles[i].tokens;
        if (moqc_tiles[i].which != (dense4 ? (int)MOQC_DENSE4 : which) || (j->c->gemm_tokens && j->c->gemm_tokens != tokens)) continue;
        const int eight = moqk_fast_bits(form) == 8;
        if (tokens & (tokens - 1) && (which == MOQC_BYTES ? !eight : eight && tokens != 160)) continue;
        if (tokens == 32 && moqk_fast_bits(form) != 4) continue;
        if (tokens == 256 && which == MOQC_BYTES && form == MOQK_FAST_E4M3 && grouped) continue; /* sums of two kinds do not fit in registers */
        if (tokens == 64 && which == MOQC_BYTES && form != MOQK_FAST_E4M3) continue;
        if (j->call.tiles && tokens < j->call.m + 8) continue;
        const int halves = which == MOQC_WGMMA && moqk_teams(form, tokens, 0) == 4;
        double more = 1;
        if (which == MOQC_WGMMA && form == MOQK_FAST_U4 && tokens < 256) more = tokens == 32 ? 1.15 : tokens == 64 ? 1.03 : 1.1;
        if (dense4 && form == MOQK_FAST_U4 && tokens < 256) more = !grouped ? 1.03 : tokens <= 128 ? (group < 64 ? 1.17 : 1.15) : group < 64 ? 1.08 : 1.04;
        if (which == MOQC_WGMMA && form == MOQK_FAST_BF16 && (tokens <= 64 || tokens > 256)) more = tokens > 256 ? 1.1 : 1.14;
        const double slab = (which == MOQC_WGMMA && tokens == 64 && !halves ? 0.31 : moqc_tiles[i].slab) * more;
        const int64_t room = j->c->sm_count;
        const int64_t count = j->row_blocks128 * (j->call.tiles ? j->call.most_tiles : moqk_ceil(j->call.m, tokens));
        const int runs_of_units = 4; /* before them 1 to 4 blocks of a cluster a tile */
        const int last = which == MOQC_BYTES || (j->call.tiles && !halves) ? 3 : j->call.tiles ? 4 : 5;
        for (int k = 0; k <= last; k++) {
            const int cut = k >= runs_of_units, split = cut ? 1 : k + 1;
            if ((j->c->gemm_cut && j->c->gemm_cut != k + 1) || units < split) continue;
            const int64_t fit = split == 4 ? room * 9 / 40 : split == 3 ? room * 3 / 10 : room / split; /* clusters of 3 and 4 do not fit everywhere */
            const int64_t runs = moqc_max(1, moqc_min(fit, cut ? count * moqc_min(units, halves ? 16 : 4) : count));
            int64_t rounds = moqk_ceil(count, runs);
            if (split > 1 && rounds > 1) continue; /* see moqk_finish_shared */
            if (cut) rounds = j->call.tiles ? 0 : count / runs - (k - runs_of_units); /* of whole tiles */
            if (rounds < 0 || (cut && count == rounds * runs)) continue;
            if (cut && !j->c->gemm_cut && 4 * (count % runs) >= 3 * runs) continue;
            const double run = cut ? 1.08 * (double)moqk_ceil((count - rounds * runs) * units, runs) : 0;
            const int64_t busy = cut ? runs : (count - (rounds - 1) * runs) * split; /* multiprocessors of the last round */
            const double idle = dense4 ? 0.25 * (1 - (double)busy / (double)room) : 0, last_run = cut ? run : (double)moqk_ceil(units, split);
            const double longest = (double)(rounds * moqk_ceil(units, split)) + run - idle * last_run;
            const double more_blocks = dense4 ? (split > 2 ? 1.5 : 1) : halves ? 0.4 + 0.3 * split : 1;
            const double end = split > 1 ? moqc_tiles[i].shared_end * more_blocks : moqc_tiles[i].end;
            /* Codes of 8 bits: where few tiles are left for all runs, one block reads the sums of many: 1.3 us for those of 128 tokens. */
            const double many = cut && eight && which == MOQC_WGMMA ? 0.4 * (double)moqc_max(runs / (count - rounds * runs) - 4, 0) : 0;
            const double joins = !cut ? 0 : dense4 ? 1.85 : many + (which == MOQC_WGMMA ? (rounds > 0 ? 1.15 : 2.1) : rounds > 0 ? 1 : 1.8);
            const double time = longest * (which == MOQC_BYTES ? 2 : 4) * slab + (double)rounds * end + joins * moqc_tiles[i].shared_end -
                (dense4 && 2 * runs * split <= room ? 2 : 0);
            if (time >= least) continue;
            least = time;
            best.tokens = tokens;
            best.blocks = (int32_t)runs * split;
            best.whole = cut ? (int32_t)(rounds * runs) : INT32_MAX;
            best.split = split;
        }
    }
    return best;
}

/* Do tiles of so many tokens have the kernel for few, whose sums leave room for four blocks on a multiprocessor? Where wgmma is, mma.sync is for little. */
static int moqc_mma_few(const moqc_ctx *c, int form, int64_t tokens) { return !c->wgmma && moqk_fast_bits(form) == 4 && tokens <= MOQK_MMA_FEW; }

/* May x stay where it is? Tiles of few tokens only. */
static int moqc_mma_direct(const moqc_job *j, const moqk_part *p, int parts, int unit)
{
    return parts == 1 && unit == MOQK_NO_UNIT && j->call.x_bf16 && !j->call.tiles && !j->call.row_of && !j->fused && p->cols % 256 == 0 &&
        ((uintptr_t)j->call.x & 15) == 0 && j->call.ldx % 8 == 0;
}

/* The same for mma.sync: two blocks on a multiprocessor, tiles of equally many tokens, as few as their number allows. Blocks take whole tiles in turn, or run
   through the units of all tiles of the last round, or of the last two. `step`: tokens that products take at a time; direct: few tokens need no pass before the
   product. Few tokens were measured on an H200 that ran code of 8.6; there the estimates of the others are a fifth too long, and so are those of few here. */
static moqc_gemm_cut moqc_cut_mma(const moqc_job *j, int form, int64_t units, int64_t step, int direct)
{
    const int64_t fewest = j->call.tiles ? 1 : moqk_ceil(j->call.m, MOQK_MMA_TOKENS);
    const int64_t most = j->call.tiles ? 1 : moqc_min(moqk_ceil(j->call.m, 24), fewest + 3);
    moqc_gemm_cut best = {MOQK_MMA_TOKENS, 1, INT32_MAX, 1};
    double least = 1e30;
    for (int64_t n = fewest; n <= most; n++) {
        int64_t tokens = moqk_pad(j->call.tiles ? j->call.m + 8 : moqk_ceil(j->call.m, n), 8);
        if (j->c->gemm_tokens) tokens = moqc_min(j->c->gemm_tokens, MOQK_MMA_TOKENS);
        const int few = moqc_mma_few(j->c, form, tokens);
        const int64_t room = (few ? MOQK_MMA_BLOCKS : 2) * (int64_t)j->c->sm_count;
        const int64_t count = j->row_blocks128 * (j->call.tiles ? j->call.most_tiles : moqk_ceil(j->call.m, tokens));
        const double eighths = (double)(moqk_pad(tokens, tokens > 96 ? 16 : step) / 16), end = 1 + 0.3 * eighths, joins = 4 + 0.8 * eighths;
        for (int cut = 0; cut < 3; cut++) {
            if (j->c->gemm_cut && j->c->gemm_cut != cut + 1) continue;
            const int64_t runs = moqc_max(1, moqc_min(room, cut ? count * moqc_min(units, few ? 8 : 4) : count));
            const int64_t rounds = !cut ? moqk_ceil(count, runs) : count / runs - (cut - 1); /* of whole tiles */
            if (rounds < 0 || (cut && count == rounds * runs)) continue;
            const double run = cut ? 1.08 * (double)moqk_ceil((count - rounds * runs) * units, runs) : 0;
            const int64_t sms = j->c->sm_count, each = moqk_ceil(runs, sms); /* few blocks on a multiprocessor: faster */
            const double slab = !few ? (0.55 + 0.11 * eighths) * (each == 1 ? 0.7 : 1) : each == 1 ? 0.53 : each == 2 ? 0.66 : each == 3 ? 0.88 : 1.12;
            const double time = ((double)(rounds * units) + run) * 4 * slab + (double)rounds * end + (!cut ? 0 : few ? 10 : joins) + (few && direct ? 0 : 3.5);
            if (time >= least) continue;
            least = time;
            best.tokens = (int32_t)tokens;
            best.blocks = (int32_t)runs;
            best.whole = cut ? (int32_t)(rounds * runs) : INT32_MAX;
        }
    }
    return best;
}

/* A launch that may begin while the kernel before it ends; it waits for that one before it reads what others wrote. cluster: blocks of one; 0: all blocks run
   at the same time (a cooperative launch). */
template <typename... A, typename... B>
static void moqc_launch_early(moqc_ctx *c, void (*kernel)(A...), dim3 grid, int threads, int shared, int cluster, const char *what, const B &...args)
{
    cudaLaunchConfig_t how = {};
    cudaLaunchAttribute with[2];
    const int together = cluster == 0; /* blocks run at the same time */
    memset(with, 0, sizeof with);
    how.gridDim = grid;
    how.blockDim = dim3((unsigned)threads);
    how.dynamicSmemBytes = (size_t)shared;
    how.stream = c->stream;
    how.attrs = with;
    how.numAttrs = c->sm >= 90 ? 1 + (cluster != 1) : together;
    with[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    with[0].val.programmaticStreamSerializationAllowed = 1;
    with[1].id = cudaLaunchAttributeClusterDimension;
    with[1].val.clusterDim.x = (unsigned)cluster;
    with[1].val.clusterDim.y = with[1].val.clusterDim.z = 1;
    if (together) {
        memset(with + 1, 0, sizeof with[1]);
        with[1].id = cudaLaunchAttributeCooperative;
        with[1].val.cooperative = 1;
        if (c->sm < 90) with[0] = with[1];
    }
    if (shared > 0 && !moqc_ok(c, cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "cudaFuncSetAttribute")) return;
    moqc_ok(c, cudaLaunchKernelEx(&how, kernel, args...), what);
}

/* x of the call as the copy engine reads it, in whole slabs of 64 columns, or 0: it cannot. `tokens` and `slabs` of a stage. */
static int moqc_map_x(const moqc_ctx *c, const moqk_call *call, int32_t cols, int32_t tokens, int32_t slabs, moqk_maps *maps)
{
    if (!c->encode_map || !call->x_bf16 || call->row_of || call->tiles || ((uintptr_t)call->x & 15) || call->ldx % 8 != 0 || cols % 64 != 0) return 0;
    const int32_t most = moqk_box_tokens(tokens), rest = call->m % most;
    return moqc_map_rows(c, call, call->all, cols, most, slabs, &maps->whole) && moqc_map_rows(c, call, call->all, cols, rest ? rest : most, 1, &maps->part);
}

/* y of the call likewise, for tiles of `tokens`: boxes of 128 bytes of a token. */
static int moqc_map_y(const moqc_ctx *c, const moqk_call *call, int32_t tokens, moqk_maps *maps)
{
    static const cuuint32_t one[2] = {1, 1};
    const int elem = call->y_bf16 ? 2 : 4;
    const cuuint64_t size[2] = {(cuuint64_t)call->ldy, (cuuint64_t)call->m}, pitch[1] = {(cuuint64_t)call->ldy * elem};
    const cuuint32_t box[2] = {(cuuint32_t)(128 / elem), (cuuint32_t)(call->y_bf16 ? moqk_put_tokens(tokens) : MOQK_FLOAT_TOKENS)};
    if (!c->encode_map || call->tiles || ((uintptr_t)call->y & 15) || call->ldy * elem % 16 != 0 || call->ldy < 64) return 0;
    return c->encode_map(&maps->y, call->y_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, (void *)call->y, size, pitch, box,
                         one, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/* The same of F32 inputs, from their copy in BF16 (see >>cuda-ops); what has none yet asks for it. */
static int moqc_map_narrow(moqc_ctx *c, const moqk_call *call, int32_t cols, int32_t tokens, int32_t slabs, moqk_maps *maps)
{
    moqk_call narrow = *call;
    if (!c->encode_map || call->x_bf16 || call->row_of || call->tiles || call->ldx != cols || cols % 64 != 0) return 0;
    c->narrows = 1;
    if (c->narrowed != call->x || c->narrow_cols != cols || c->narrow_rows < call->all) return 0;
    narrow.x = c->x16;
    narrow.x_bf16 = 1;
    return moqc_map_x(c, &narrow, cols, tokens, slabs, maps);
}

/* Whether 16 columns of x may be read 16 bytes at a time. */
static int moqc_whole_x(const moqk_call *call, int32_t cols) { return cols % 16 == 0 && ((uintptr_t)call->x & 15) == 0 && call->ldx % 8 == 0; }

/* x of the call as x16 for weights of a form; `up`: what the form wants on x. */
static void moqc_pack(const moqc_job *j, const moqk_part *p, int form, float up, int as_weights, const moqk_gemm_args *b)
{
    moqc_ctx *c = j->c;
    moqk_pack_args a;
    c->narrowed = NULL;
    memset(&a, 0, sizeof a);
    a.x = j->call.x;
    a.ldx = j->call.ldx;
    a.tokens = b->tokens;
    a.row_of = j->call.row_of;
    a.expert_of = j->call.tiles ? j->call.expert_of : NULL;
    a.part = j->call.parts;
    a.expert_stride = j->call.expert_stride;
    a.token_unit = c->token_unit;
    a.x16 = c->x16;
    a.up = up;
    a.m = j->call.all;
    a.cols = p->cols;
    a.slabs = b->w_units * 4;
    a.parts = b->units / b->w_units;
    a.form = form;
    a.as_weights = as_weights;
    a.unit = b->unit;
    a.x_bf16 = j->call.x_bf16;
    a.whole = moqc_whole_x(&j->call, p->cols);
    if (j->fused) {
        moqc_launch_early(c, moqk_pack_activated, dim3((unsigned)a.slabs, (unsigned)moqk_ceil(a.m, 32)), 256, 0, 1, "laying out inputs", a, *j->fused);
        return;
    }
    if (a.unit == MOQK_TOKEN_UNIT) moqk_token_units<<<(unsigned)a.m, 256, 0, c->stream>>>(a, c->token_unit);
    dim3 grid((unsigned)a.slabs / 4, (unsigned)moqk_ceil(a.m, 32));
    moqc_launch_early(c, moqk_pack_x, grid, 256, 0, 1, "laying out inputs", a);
}

/* x of the call as x8, and the scales of its tokens. */
static void moqc_pack_bytes(const moqc_job *j, const moqk_part *p, int form, const moqk_gemm_args *b)
{
    moqc_ctx *c = j->c;
    moqk_pack_args a;
    c->narrowed = NULL;
    memset(&a, 0, sizeof a);
    a.x = j->call.x;
    a.ldx = j->call.ldx;
    a.tokens = b->tokens;
    a.row_of = j->call.row_of;
    a.expert_of = j->call.tiles ? j->call.expert_of : NULL;
    a.part = j->call.parts;
    a.expert_stride = j->call.expert_stride;
    a.x16 = c->x16;
    a.m = j->call.all;
    a.cols = p->cols;
    a.slabs = b->units * 2;
    a.form = form;
    a.x_bf16 = j->call.x_bf16;
    a.whole = moqc_whole_x(&j->call, p->cols);
    a.raw = j->call.raw;
    a.unit_out = c->token_unit;
    a.scale = (float *)b->x_scale;
    moqc_launch_early(c, moqk_pack_bytes, dim3((unsigned)a.m), 256, 0, 1, "laying out inputs", a);
}

/* moqk_form_fix for the host. */
static float moqc_form_fix(int form)
{
    return form == MOQK_NVFP4 ? 128.0f : form == MOQK_MXFP4 ? 2361183241434822606848.0f : form == MOQK_FAST_E4M3 ? 1152921504606846976.0f : 1.0f;
}

/* One launch for the parts of one form; others of the same call find nothing to do in it. */
static void moqc_launch_gemm_form(const moqc_job *j, const moqk_part *p, int form, int grouped, int which)
{
    moqc_ctx *c = j->c;
    moqk_gemm_args b;
    int parts = 1, bytes_of_x = which == MOQC_BYTES;
    memset(&b, 0, sizeof b);
    b.unit = MOQK_TOKEN_UNIT;
    if (!bytes_of_x) moqc_unit_of(j, p, &b.unit, &parts);
    b.w_units = (int32_t)moqk_ceil(p->cols, 256);
    b.units = b.w_units * parts;
    const moqc_gemm_cut u = which == MOQC_MMA ? moqc_cut_mma(j, form, b.units, grouped ? 16 : 32, moqc_mma_direct(j, p, parts, b.unit)) :
        moqc_cut_gemm(j, form, grouped, p->group, b.units, which);
    b.x16 = c->x16;
    b.tokens = moqk_pad(j->call.all, 8) + MOQC_TILE_TOKENS; /* a tile may reach past the last token */
    if (!j->call.tiles && which != MOQC_MMA && j->call.m <= u.tokens) b.tokens = u.tokens; /* one tile: its slabs lie together */
    b.partial = c->partial_sums;
    b.turn = c->turn;
    b.token_unit = c->token_unit;
    b.row_tiles = (int32_t)j->row_blocks128;
    b.token_tiles = (int32_t)moqk_ceil(j->call.m, u.tokens);
    b.whole = u.whole;
    b.split = u.split;
    b.tile_tokens = u.tokens;
    const int scaled = grouped && which == MOQC_WGMMA, values = form == MOQK_FAST_E4M3 && which == MOQC_WGMMA; /* weights leave with their scales; as values */
    for (b.known = 0; !j->call.tiles && j->bank->experts == 1 && j->call.part_count <= 3 && b.known < j->call.part_count; b.known++) b.part[b.known] = j->part[b.known].d;
    b.fix = scaled ? (form == MOQK_FAST_E4M3 ? 1024.0f : form == MOQK_FAST_U4 ? 35184372088832.0f : 1) : values ? 1 : moqc_form_fix(form); /* U4: 2^45 */
    moqk_maps maps;
    memset(&maps, 0, sizeof maps);
    const float up = form == MOQK_FAST_E4M3 && !values ? 1152921504606846976.0f : 1; /* 2^60: moqk_form_x */
    if (which == MOQC_MMA) {
        const int few = moqc_mma_few(c, form, u.tokens), most = few ? MOQK_MMA_FEW : MOQK_MMA_TOKENS;
        const int shared = moqk_mma_shared(form, grouped, u.tokens, most);
        b.direct = few && moqc_mma_direct(j, p, parts, b.unit);
        if (!b.direct) moqc_pack(j, p, form, up, !few, &b);
        moqc_launch_early(c, moqc_mma_find(form, grouped, most), dim3((unsigned)u.blocks), 128, shared, 1, "a matrix product", j->call, b);
        return;
    }
    const moqc_gemm_choice choice = bytes_of_x ? moqc_bytes_find(form, grouped, u.tokens) : moqc_wgmma_find(form, grouped, u.tokens);
    if (bytes_of_x) {
        b.fix = 1;
        if (form == MOQK_FAST_E4M3 && grouped) b.x_scale = (const float *)(const void *)(c->x16 + (int64_t)b.units * 2 * b.tokens * 128);
        moqc_pack_bytes(j, p, form, &b);
    } else {
        b.direct = up == 1 && parts == 1 && b.unit == MOQK_NO_UNIT &&
            (moqc_map_x(c, &j->call, p->cols, u.tokens, choice.x_slabs, &maps) || moqc_map_narrow(c, &j->call, p->cols, u.tokens, choice.x_slabs, &maps));
        if (!b.direct) moqc_pack(j, p, form, up, 0, &b);
    }
    b.y_direct = (j->call.y_bf16 || !bytes_of_x) && moqc_map_y(c, &j->call, u.tokens, &maps);
    moqc_launch_early(c, choice.kernel, dim3((unsigned)u.blocks), choice.threads, choice.shared, u.split, "a matrix product", j->call, b, maps);
}

static void moqc_launch_gemm_forms(const moqc_job *j, int which)
{
    uint32_t done = 0; /* bit: form * 2 + grouped */
    for (int32_t i = 0; i < j->call.part_count; i++)
        for (int32_t e = 0; e < j->bank->experts; e++) {
            const moqk_part *p = &j->part[i + e * j->bank->parts].d;
            int form = p->rows > 0 ? moqk_form_of(*p) : -1, grouped = form >= 0 && moqk_form_grouped(*p, form), bit = form * 2 + grouped;
            if (form < 0 || (done >> bit & 1)) continue;
            done |= 1u << bit;
            moqc_launch_gemm_form(j, p, form, grouped, which);
        }
}

static void moqc_launch_wgmma(const struct moqc_job *j) { moqc_launch_gemm_forms(j, MOQC_WGMMA); }
static void moqc_launch_mma(const struct moqc_job *j) { moqc_launch_gemm_forms(j, MOQC_MMA); }
static void moqc_launch_bytes(const struct moqc_job *j) { moqc_launch_gemm_forms(j, MOQC_BYTES); }

/* Does an activation in front of this bank, of one part, need no launch of its own? */
static int moqc_packs(const moqc_bank *b, const void *x, int64_t ldx, int64_t rows)
{
    int packs = b->direct[0] && b->part[0].d.cols % 16 == 0 && ((uintptr_t)x & 15) == 0 && ldx % 8 == 0;
    for (int32_t e = 0; e < b->experts; e++) packs = packs && !b->part[e].has_lora && b->part[e].kernel[moqc_regime(rows)]->launch == moqc_launch_wgmma;
    return packs;
}

static int moqc_rounds_itself(const moqc_part *p, int regime) { return p->kernel[regime]->launch == moqc_launch_bytes; }

/* Tokens of the largest tile that takes whole experts, with which the kernels of this section take every layer of a bank; 0: they do not. */
static int moqc_gemm_tokens(const moqc_bank *b)
{
    int tokens = 256;
    for (int32_t i = 0; i < b->count; i++)
        for (int r = 2; r < MOQC_REGIMES && b->part[i].d.rows > 0; r++) {
            if (b->part[i].kernel[r]->launch == moqc_launch_mma) tokens = (int)moqc_min(tokens, MOQK_MMA_TOKENS);
            else if (b->part[i].kernel[r]->launch == moqc_launch_bytes && moqk_form_grouped(b->part[i].d, MOQK_FAST_E4M3) && b->part[i].d.kind == MOQK_E4M3)
                tokens = (int)moqc_min(tokens, 128); /* as in moqc_cut_gemm */
            else if (b->part[i].kernel[r]->launch != moqc_launch_wgmma && b->part[i].kernel[r]->launch != moqc_launch_bytes) tokens = 0;
        }
    return tokens;
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-together   calls of a recording that become one launch
   A launch takes a few microseconds from the end of the one before to its own first result, and a step of one token has hundreds of them. So while a
   graph is recorded, a product of >>cuda-runs waits for the call behind it, and so do a mixture of >>cuda-moe-few, a norm of one row and heads that enter a
   cache: product and mixture themselves add what a norm would add, a product makes the activation of its gate and up; it makes the norm of its x, as one of
   >>cuda-decode too, and a mixture of one row runs its router and that one's norm; attention enters its heads. Every buffer gets what single calls give it,
   bit by bit. Any other call launches what waits before it does anything.
   ------------------------------------------------------------------------------------------------ */

/* What waits: a product, a norm, a router, a mixture, or the heads of an attention. */
typedef struct moqc_held {
    int enters;                /* heads wait for their attention: */
    moq_batch batch;
    moq_heads_desc heads;
    int run, has_norm;         /* a product waits, and makes `norm` of its x */
    moqc_job job;
    int form, step;
    moqk_run cut;
    int64_t bytes;
    int norms;                 /* `norm` waits */
    moq_norm_desc norm;
    const struct moqc_experts *experts; /* a mixture of few rows waits; NULL: none */
    const void *mixed, *logits;
    void *mixture;             /* [rows, its outputs] */
    int32_t mixed_rows;
    int routes;                /* a router waits, which makes a norm: that of the mixture that waits, if one does */
    moqc_job router;
    moqk_cut router_cut;
} moqc_held;

static void moqc_launch_norm(moqc_ctx *c, const moq_norm_desc *d); /* see >>cuda-ops */
static void moqc_launch_enter(moqc_ctx *c, const moq_batch *b, const moq_heads_desc *h); /* see >>cuda-kv */
static void moqc_launch_mixture(moqc_ctx *c, void *into);                           /* see >>cuda-moe-host */
static int moqc_mixture_adds(const moqc_ctx *c, const moq_norm_desc *n); /* likewise */

static void moqc_let_go(moqc_ctx *c)
{
    moqc_held *h = c->held;
    if (h->experts) moqc_launch_mixture(c, NULL);
    else if (h->routes) moqc_launch_cut(&h->router, MOQK_FAST_BF16, 0, &h->router_cut);
    if (h->run) moqc_launch_run(&h->job, h->form, h->step, &h->cut, h->bytes);
    if (h->norms) moqc_launch_norm(c, &h->norm);
    if (h->enters) moqc_launch_enter(c, &h->batch, &h->heads);
    h->run = h->norms = h->enters = h->routes = c->waiting = 0;
    h->experts = NULL;
}

/* Is a product over this bank one launch of moqc_launch_decode, of one form, with x as it is? Then the form, else -1. */
static int moqc_one_launch(const moqc_ctx *c, const moqc_bank *b, const void *x, int32_t rows)
{
    const int elem = c->bf16 ? 2 : 4, form = moqk_form_of(b->part[0].d);
    if (!c->capturing || rows < 1 || rows > c->be.max_rows || b->experts != 1) return -1;
    if (form < 0 || ((uintptr_t)x & 15) != 0 || b->cols * elem % 16 != 0) return -1;
    for (int32_t i = 0; i < b->parts; i++) {
        const moqc_part *p = &b->part[i];
        if (p->has_lora || !b->direct[i] || (i > 0 && !b->shares[i]) || p->d.rows < 1 || p->kernel[moqc_regime(rows)]->launch != moqc_launch_decode) return -1;
        if (moqk_form_of(p->d) != form || moqk_form_step(p->d, form) != moqk_form_step(b->part[0].d, form)) return -1;
    }
    return form;
}

/* Is it one of >>cuda-runs, which may wait? */
static int moqc_may_hold(const moqc_ctx *c, const moqc_bank *b, const void *x, int32_t rows)
{
    const int form = moqc_one_launch(c, b, x, rows);
    return form >= 0 && moqk_fast_bits(form) == 4 && rows * (c->bf16 ? 2 : 4) <= 32;
}

/* May it make the norm that waits, as one of >>cuda-decode? */
static int moqc_may_norm(const moqc_ctx *c, const moqc_bank *b, const void *x, int32_t rows)
{
    const moqc_held *h = c->held;
    if (c->sm != 90 || rows != 1 || !h->norms || h->norm.y != x || h->norm.cols != b->cols) return 0;
    const int form = moqc_one_launch(c, b, x, rows);
    return form >= 0 && moqk_fast_bits(form) > 4;
}

/* Is each of these aligned to four values of `elem` bytes? Strides count values. */
static int moqc_fours(const void *x, int64_t x_stride, const void *y, int64_t y_stride, const void *add, int elem)
{
    return (((uintptr_t)x | (uintptr_t)y | (uintptr_t)add) & (uintptr_t)(4 * elem - 1)) == 0 && ((x_stride | y_stride) & 3) == 0;
}

/* Threads of a norm's own launch, when it is one of whole rows four values at a time; else 0. */
static int32_t moqc_norm_threads(const moqc_ctx *c, const moq_norm_desc *d)
{
    const int fits = d->groups <= 1 && d->cols % 4 == 0 && d->cols <= 4096 * MOQK_NORM_QUADS && ((uintptr_t)d->weight & 15) == 0 &&
        moqc_fours(d->x, d->x_stride, d->y, d->y_stride, d->add, c->bf16 ? 2 : 4);
    return fits ? (int32_t)moqk_pad(moqk_ceil(d->cols, 4 * MOQK_NORM_QUADS), 32) : 0;
}

/* May a product by `warps` warps of a block make the norm of its x? Blocks would read what others write already where buffers touch. */
static int moqc_norm_fits(const moqc_ctx *c, const moq_norm_desc *n, const moqk_call *a, int32_t cols, int32_t warps)
{
    const int64_t elem = c->bf16 ? 2 : 4, row = n->cols * elem, y = a->ldy * elem;
    return n->y == a->x && a->m == 1 && n->cols == cols && moqc_norm_threads(c, n) <= 32 * MOQK_NORM_PLAYED * warps && moqc_apart(n->x, row, a->y, y) &&
        moqc_apart(n->y, row, a->y, y);
}

static moqk_own_norm moqc_own_norm(const moqc_ctx *c, const moq_norm_desc *n)
{
    const moqk_own_norm own = {moqc_norm_threads(c, n), n->eps, n->weight, n->y};
    return own;
}

/* The call of a product of >>cuda-decode, which makes the norm that waits, if it can: u learns it. Else what waits is launched. */
static moqk_call moqc_norm_in_decode(const moqc_job *j, int form, moqk_cut *u)
{
    moqc_ctx *c = j->c;
    moqc_held *h = c->held;
    const moq_norm_desc *n = &h->norm;
    moqk_call call = j->call;
    const int32_t cols = j->part->d.cols;
    if (h->norms && moqk_fast_bits(form) > 4 && !call.tiles && u->blocks == 1 && u->stage >= moqk_ceil(cols, moqk_chunk_cols(form)) &&
        moqc_norm_fits(c, n, &call, cols, u->tiles * u->ways)) {
        u->norm = moqc_own_norm(c, n);
        call.x = n->x;
        h->norms = c->waiting = 0;
    } else moqc_let_go(c);
    return call;
}

static void moqc_take_norm(const moqc_ctx *c, moqc_held *h)
{
    h->has_norm = 1;
    h->job.call.x = h->norm.x;
    h->cut.bulk = 0;
    h->cut.norm = moqc_own_norm(c, &h->norm);
}

static void moqc_hold_run(const moqc_job *j, int form, int step, const moqk_run *u, int64_t bytes)
{
    moqc_ctx *c = j->c;
    moqc_held *h = c->held;
    const int takes = h->norms && !u->place && moqc_norm_fits(c, &h->norm, &j->call, u->cols, u->tiles * u->ways);
    if (takes) h->norms = 0;
    moqc_let_go(c);
    h->job = *j;
    h->form = form;
    h->step = step;
    h->cut = *u;
    h->bytes = bytes;
    h->run = c->waiting = 1;
    h->has_norm = 0;
    if (takes) moqc_take_norm(c, h);
}

/* x += add of a norm by the product that made `add`. 0: it does not. */
static int moqc_add_in_run(moqc_ctx *c, const moq_norm_desc *n)
{
    moqc_held *h = c->held;
    const moqk_call *a = &h->job.call;
    const int64_t elem = c->bf16 ? 2 : 4, x = a->m * (int64_t)n->cols * elem;
    if (!h->run || !n->add || n->add != a->y || h->cut.pairs || n->groups > 1 || n->rows != a->m || a->ldy != n->cols) return 0;
    if ((n->x_stride != 0 && n->x_stride != n->cols) || h->job.bank->rows != n->cols || !moqc_apart(n->x, x, a->y, x) || !moqc_apart(n->x, x, a->x, a->m * a->ldx * elem) ||
        !moqc_apart(n->x, x, h->cut.norm.normed, h->has_norm ? h->cut.cols * elem : 0)) return 0;
    h->cut.into = (void *)(uintptr_t)n->x;
    moqc_let_go(c);
    return 1;
}

/* The same by the mixture that made `add`. */
static int moqc_add_in_mixture(moqc_ctx *c, const moq_norm_desc *n)
{
    moqc_held *h = c->held;
    if (!h->experts || n->add != h->mixture || !moqc_mixture_adds(c, n)) return 0;
    moqc_launch_mixture(c, (void *)(uintptr_t)n->x);
    h->experts = NULL;
    h->routes = c->waiting = 0;
    return 1;
}

/* The activation by the product that made gate and up. 0: it does not. */
static int moqc_activate_in_run(moqc_ctx *c, const moq_activation_desc *d, const void *x, int32_t rows, int32_t n, void *y)
{
    moqc_held *h = c->held;
    const moqk_call *a = &h->job.call;
    const int64_t elem = c->bf16 ? 2 : 4, mid = (int64_t)rows * n * elem;
    if (!h->run || x != a->y || rows != a->m || d->kind == MOQ_RELU2 || !h->cut.pairs || h->cut.part[0].rows != n) return 0;
    if (!moqc_apart(y, mid, a->y, 2 * mid) || !moqc_apart(y, mid, a->x, a->m * a->ldx * elem) ||
        !moqc_apart(y, mid, h->cut.norm.normed, h->has_norm ? h->cut.cols * elem : 0)) return 0;
    h->cut.activation = *d;
    h->cut.mid = y;
    moqc_let_go(c);
    return 1;
}

/* May this norm wait for the product that reads it? */
static int moqc_norm_waits(const moqc_ctx *c, const moq_norm_desc *n)
{
    const int64_t row = n->cols * (c->bf16 ? 2 : 4);
    return c->capturing && n->rows == 1 && !n->add && moqc_norm_threads(c, n) > 0 && moqc_apart(n->x, row, n->y, row);
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-ops        embed, norm, rope, activation, add, argmax
   One launch each; every element is read and written once. T is the activation type. What products of many rows read next, out of norm and activation,
   is also written as BF16 where they would round F32 inputs to it: a pass over it less.
   ------------------------------------------------------------------------------------------------ */

/* Where y [rows, cols] goes as BF16, too: all of it is about to be written, by a kernel that waits for those before it. NULL: nowhere. */
static __nv_bfloat16 *moqc_narrow(moqc_ctx *c, const void *y, int64_t rows, int64_t cols)
{
    c->narrowed = NULL;
    if (!c->narrows || c->bf16 || !c->x16 || rows <= MOQC_FEW_ROWS || rows > c->be.max_rows || cols > c->need.cols || cols % 8 != 0) return NULL;
    c->narrowed = y;
    c->narrow_rows = rows;
    c->narrow_cols = cols;
    return (__nv_bfloat16 *)(void *)c->x16;
}

/* y[i] = row ids[i] of the table, exactly, times scale; zeros for an id outside of it. Grid: ids, pieces of a row. */
template <typename T> __global__ void moqk_embed(const moqk_part *table, const int32_t *ids, float scale, T *y)
{
    moqk_follow();
    const moqk_part &p = *table;
    int64_t id = ids[blockIdx.x], cols = p.feed_cols;
    T *out = y + blockIdx.x * cols;
    for (int64_t i = blockIdx.y * blockDim.x + threadIdx.x; i < cols; i += gridDim.y * blockDim.x) {
        float v = 0;
        if (id >= 0 && id < p.rows) v = (float)moqk_weight_at(p, id, p.place ? p.place[i] : i) * scale;
        moqk_put(out, i, v);
    }
}

static void moqc_embed(moq_backend *be, const moq_weight *w, const int32_t *ids, int32_t count, float scale, void *y)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    const moqc_bank *b = (const moqc_bank *)(const void *)w;
    const moqk_part *table = b->device;
    dim3 grid((unsigned)count, (unsigned)moqc_max(1, moqc_min(moqk_ceil(b->cols, 256), 32)));
    if (count < 1) return;
    if (!b->part->keep) { /* only the layout of its kernels is there */
        if (c->error.code == MOQ_OK)
            moq_fail(&c->error, MOQ_E_STATE, c->name, "embed: rows of this layer were not kept; a table of words has 'embed' in its name");
        return;
    }
    MOQC_BY_ACT(c, (moqc_chain(c, "embed", moqk_embed<float>, grid, 256, 0, table, ids, scale, (float *)y)),
                (moqc_chain(c, "embed", moqk_embed<__nv_bfloat16>, grid, 256, 0, table, ids, scale, (__nv_bfloat16 *)y)));
    moqc_launched(c, "embed");
}

/* x += add; y = x / sqrt(mean(x^2) + eps) * weight. Grid: rows, groups; a thread reads back only what it wrote itself. What fits stays in
   registers, all of its loads under way at once: a step of one token waits for each of these kernels. */
template <typename T> __global__ void __launch_bounds__(1024) moqk_norm(moq_norm_desc d)
{
    enum { KEPT = 8 };
    __shared__ float room[33];
    int64_t groups = d.groups > 0 ? d.groups : 1, n = groups * d.cols, row = blockIdx.x, at = (int64_t)blockIdx.y * d.cols;
    T *x = (T *)(uintptr_t)d.x + row * (d.x_stride ? d.x_stride : n) + at, *y = (T *)d.y + row * (d.y_stride ? d.y_stride : n) + at;
    const T *add = d.add ? (const T *)d.add + row * n + at : NULL;
    const int32_t step = (int32_t)blockDim.x, rest = KEPT * step + (int32_t)threadIdx.x;
    float v[KEPT], w[KEPT], sum = 0;
    moqk_dependents_may_start();
#pragma unroll
    for (int k = 0; k < KEPT; k++) { /* weights never change: before the kernel before has ended */
        int32_t i = (int32_t)threadIdx.x + k * step;
        w[k] = i < d.cols && d.weight ? d.weight[i] : 1;
    }
    moqk_wait_for_before();
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        int32_t i = (int32_t)threadIdx.x + k * step;
        v[k] = i < d.cols ? moqk_get(x, i) + (add ? moqk_get(add, i) : 0) : 0;
    }
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        int32_t i = (int32_t)threadIdx.x + k * step;
        if (add && i < d.cols) {
            moqk_put(x, i, v[k]);
            if (sizeof(T) == 2) v[k] = __bfloat162float(__float2bfloat16_rn(v[k]));
        }
        sum += v[k] * v[k];
    }
    for (int32_t i = rest; i < d.cols; i += step) {
        float u = moqk_get(x, i);
        if (add) {
            u += moqk_get(add, i);
            moqk_put(x, i, u);
            u = moqk_get(x, i);
        }
        sum += u * u;
    }
    sum = moqk_block_sum(sum, room);
    float s = 1 / sqrtf(sum / (float)d.cols + d.eps);
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        int32_t i = (int32_t)threadIdx.x + k * step;
        if (i < d.cols) moqk_put(y, i, d.weight ? v[k] * s * w[k] : v[k] * s);
    }
    for (int32_t i = rest; i < d.cols; i += step) moqk_put(y, i, d.weight ? moqk_get(x, i) * s * d.weight[i] : moqk_get(x, i) * s);
}

/* The same for whole rows whose values come four at a time, MOQK_NORM_QUADS times four a thread: a third less time. Grid: rows. */
template <typename T> __global__ void __launch_bounds__(1024) moqk_norm_rows(moq_norm_desc d, __nv_bfloat16 *narrow)
{
    __shared__ float room[32];
    const int32_t at = 4 * (int32_t)threadIdx.x, step = 4 * (int32_t)blockDim.x;
    T *x = (T *)(uintptr_t)d.x + blockIdx.x * (d.x_stride ? d.x_stride : d.cols), *y = (T *)d.y + blockIdx.x * (d.y_stride ? d.y_stride : d.cols);
    const T *add = d.add ? (const T *)d.add + blockIdx.x * (int64_t)d.cols : NULL;
    float4 v[MOQK_NORM_QUADS], u[MOQK_NORM_QUADS], w[MOQK_NORM_QUADS];
    float sum = 0;
    moqk_dependents_may_start();
#pragma unroll
    for (int k = 0; k < MOQK_NORM_QUADS; k++) {
        w[k] = make_float4(1, 1, 1, 1);
        v[k] = u[k] = make_float4(0, 0, 0, 0);
        if (d.weight && at + k * step < d.cols) w[k] = *(const float4 *)(const void *)(d.weight + at + k * step);
    }
    moqk_wait_for_before();
#pragma unroll
    for (int k = 0; k < MOQK_NORM_QUADS; k++)
        if (at + k * step < d.cols) {
            v[k] = moqk_get4(x + at + k * step);
            if (add) u[k] = moqk_get4(add + at + k * step);
        }
#pragma unroll
    for (int k = 0; k < MOQK_NORM_QUADS; k++) {
        if (add) v[k] = make_float4(moqk_rounded<T>(v[k].x + u[k].x), moqk_rounded<T>(v[k].y + u[k].y), moqk_rounded<T>(v[k].z + u[k].z),
                                    moqk_rounded<T>(v[k].w + u[k].w));
        sum = moqk_add_squares(sum, v[k]);
    }
    sum = moqk_warp_sum(sum);
    if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = sum;
    __syncthreads();
    sum = moqk_warp_sum((threadIdx.x & 31) < blockDim.x / 32 ? room[threadIdx.x & 31] : 0);
    const float s = moqk_norm_factor(sum, d.cols, d.eps);
#pragma unroll
    for (int k = 0; k < MOQK_NORM_QUADS; k++)
        if (at + k * step < d.cols) {
            if (add) moqk_put4(x + at + k * step, v[k]);
            const float4 normed = moqk_normed(v[k], s, w[k]);
            moqk_put4(y + at + k * step, normed); /* y may be x */
            if (sizeof(T) == 4 && narrow) moqk_put4(narrow + blockIdx.x * (int64_t)d.cols + at + k * step, normed);
        }
}

static void moqc_launch_norm(moqc_ctx *c, const moq_norm_desc *d)
{
    const int32_t some = moqc_norm_threads(c, d);
    if (some > 0) {
        __nv_bfloat16 *narrow = d->y_stride == 0 || d->y_stride == d->cols ? moqc_narrow(c, d->y, d->rows, d->cols) : NULL;
        MOQC_BY_ACT(c, (moqc_chain(c, "norm", moqk_norm_rows<float>, (unsigned)d->rows, (unsigned)some, 0, *d, narrow)),
                    (moqc_chain(c, "norm", moqk_norm_rows<__nv_bfloat16>, (unsigned)d->rows, (unsigned)some, 0, *d, narrow)));
        return;
    }
    dim3 grid((unsigned)d->rows, (unsigned)(d->groups > 0 ? d->groups : 1));
    int threads = d->cols <= 128 ? 64 : d->cols <= 1024 ? 256 : 1024;
    MOQC_BY_ACT(c, (moqc_chain(c, "norm", moqk_norm<float>, grid, threads, 0, *d)),
                (moqc_chain(c, "norm", moqk_norm<__nv_bfloat16>, grid, threads, 0, *d)));
    moqc_launched(c, "norm");
}

static void moqc_norm(moq_backend *be, const moq_norm_desc *d)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c, 1);
    moq_norm_desc n = *d;
    c->narrowed = NULL;
    if (d->rows < 1 || d->cols < 1) return;
    if (moqc_add_in_run(c, &n) || moqc_add_in_mixture(c, &n)) n.add = NULL;
    moqc_let_go(c);
    if (moqc_norm_waits(c, &n)) {
        c->held->norm = n;
        c->held->norms = c->waiting = 1;
    } else moqc_launch_norm(c, &n);
}

/* In double: an angle of 10^5 radians still has 10 digits. */
__global__ void moqk_rope_table(const int32_t *pos, int64_t count, const float *inv_freq, int32_t dims, float scale, float *table)
{
    moqk_follow();
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    double angle = (double)pos[i / dims] * (double)inv_freq[i % dims], s, c;
    sincos(angle, &s, &c);
    table[2 * i] = (float)(c * (double)scale);
    table[2 * i + 1] = (float)(s * (double)scale);
}

static void moqc_rope_table(moq_backend *be, const int32_t *pos, int32_t rows, const float *inv_freq, int32_t dims, float scale, float *table)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    int64_t count = (int64_t)rows * dims;
    if (count < 1) return;
    moqc_chain(c, "rope_table", moqk_rope_table, (unsigned)moqk_ceil(count, 128), 128, 0, pos, count, inv_freq, dims, scale, table);
    moqc_launched(c, "rope_table");
}

/* (a, b) -> (a cos - b sin, b cos + a sin): a thread per pair. */
template <typename T> __global__ void moqk_rope(moq_rope_desc d, int32_t dims)
{
    moqk_follow();
    int32_t half = dims / 2;
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, pair = i % half, head = i / half % d.heads, row = i / half / d.heads;
    if (row >= d.rows) return;
    T *x = (T *)d.x + row * d.stride + head * d.head_dim + d.first;
    int64_t ia = d.interleaved ? 2 * pair : pair, ib = d.interleaved ? ia + 1 : ia + half;
    const float *table = d.table + (row * half + pair) * 2;
    float c = table[0], s = table[1], a = moqk_get(x, ia), b = moqk_get(x, ib);
    moqk_put(x, ia, a * c - b * s);
    moqk_put(x, ib, b * c + a * s);
}

static void moqc_rope(moq_backend *be, const moq_rope_desc *d)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    int32_t dims = d->dims > 0 ? d->dims : d->head_dim;
    int64_t count = (int64_t)d->rows * d->heads * (dims / 2);
    if (count < 1) return;
    unsigned blocks = (unsigned)moqk_ceil(count, 128);
    MOQC_BY_ACT(c, (moqc_chain(c, "rope", moqk_rope<float>, blocks, 128, 0, *d, dims)),
                (moqc_chain(c, "rope", moqk_rope<__nv_bfloat16>, blocks, 128, 0, *d, dims)));
    moqc_launched(c, "rope");
}

/* x: [rows, gate n | up n] -> y [rows, n]; not gated: [rows, n]. A thread makes QUADS times four values, 1024 apart, or one: few blocks find room on the
   device before the product that they wait for has ended. Grid: pieces of a row, rows. */
template <typename T, int QUADS> __global__ void __launch_bounds__(256) moqk_activation(moq_activation_desc a, const T *x, int32_t rows, int32_t n,
                                                                                        T *y, __nv_bfloat16 *narrow)
{
    constexpr int EACH = QUADS > 0 ? 4 : 1, STEP = 256 * EACH;
    const int32_t gated = a.kind != MOQ_RELU2, i = (int32_t)blockIdx.x * (QUADS > 1 ? QUADS : 1) * STEP + (int32_t)threadIdx.x * EACH;
    moqk_follow();
    if (i >= n) return;
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
        const T *from = x + row * n * (1 + gated) + i;
        if constexpr (QUADS > 0) {
            float4 g[QUADS], u[QUADS];
#pragma unroll
            for (int k = 0; k < QUADS; k++) {
                const int there = k == 0 || i + k * STEP < n;
                g[k] = there ? moqk_get4(from + k * STEP) : make_float4(0, 0, 0, 0);
                u[k] = there && gated ? moqk_get4(from + n + k * STEP) : make_float4(0, 0, 0, 0);
            }
#pragma unroll
            for (int k = 0; k < QUADS; k++) {
                const float4 v = make_float4(moqk_activate(a, g[k].x, u[k].x), moqk_activate(a, g[k].y, u[k].y), moqk_activate(a, g[k].z, u[k].z),
                                             moqk_activate(a, g[k].w, u[k].w));
                if (k > 0 && i + k * STEP >= n) break;
                moqk_put4(y + row * n + i + k * STEP, v);
                if (sizeof(T) == 4 && narrow) moqk_put4(narrow + row * n + i + k * STEP, v);
            }
        } else {
            moqk_put(y + row * n, i, moqk_activate(a, moqk_get(from, 0), gated ? moqk_get(from, n) : 0));
        }
    }
}

static void moqc_activation(moq_backend *be, const moq_activation_desc *a, const void *x, int32_t rows, int32_t n, void *y)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c, 1);
    c->narrowed = NULL;
    if (rows < 1 || n < 1 || moqc_activate_in_run(c, a, x, rows, n, y)) return;
    moqc_let_go(c);
    const int quads = !moqc_fours(x, n, y, n, NULL, c->bf16 ? 2 : 4) ? 0 : rows >= 256 ? 2 : 1;
    const dim3 grid((unsigned)moqk_ceil(n, quads > 0 ? 1024 * quads : 256), (unsigned)moqc_min(rows, 65535));
    __nv_bfloat16 *narrow = quads > 0 ? moqc_narrow(c, y, rows, n) : NULL;
#define MOQC_CALL(T) \
    moqc_chain(c, "activation", quads == 2 ? moqk_activation<T, 2> : quads == 1 ? moqk_activation<T, 1> : moqk_activation<T, 0>, grid, 256, 0, *a, \
               (const T *)x, rows, n, (T *)y, narrow)
    if (c->bf16) { MOQC_CALL(__nv_bfloat16); }
    else { MOQC_CALL(float); }
#undef MOQC_CALL
    moqc_launched(c, "activation");
}

template <typename T> __global__ void moqk_add(T *x, const T *y, size_t count)
{
    moqk_follow();
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) moqk_put(x, (int64_t)i, moqk_get(x, (int64_t)i) + moqk_get(y, (int64_t)i));
}

/* x += y by the product that waits and makes y. */
static int moqc_add_whole(moqc_ctx *c, void *x, const void *y, size_t count)
{
    const int64_t rows = c->held->run ? c->held->job.call.m : 0;
    moq_norm_desc n;
    if (rows < 1 || count % (size_t)rows != 0 || count / (size_t)rows > INT32_MAX) return 0;
    memset(&n, 0, sizeof n);
    n.x = x;
    n.add = y;
    n.rows = (int32_t)rows;
    n.cols = (int32_t)(count / (size_t)rows);
    return moqc_add_in_run(c, &n);
}

static void moqc_add(moq_backend *be, void *x, const void *y, size_t count)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c, 1);
    c->narrowed = NULL;
    if (count == 0 || moqc_add_whole(c, x, y, count)) return;
    moqc_let_go(c);
    unsigned blocks = (unsigned)moqk_ceil((int64_t)count, 256);
    MOQC_BY_ACT(c, (moqc_chain(c, "add", moqk_add<float>, blocks, 256, 0, (float *)x, (const float *)y, count)),
                (moqc_chain(c, "add", moqk_add<__nv_bfloat16>, blocks, 256, 0, (__nv_bfloat16 *)x, (const __nv_bfloat16 *)y, count)));
    moqc_launched(c, "add");
}

/* F32 of BF16, across the bus: a warp writes whole lines. */
__global__ void moqk_send(const __nv_bfloat16 *x, size_t count, float *y)
{
    moqk_follow();
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = __bfloat162float(x[i]);
}

static void moqc_send_act(moq_backend *be, float *dst, const void *src, size_t count)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    if (count == 0 || !moqc_no_capture(c, "send_act")) return;
    if (c->bf16) moqc_chain(c, "send_act", moqk_send, (unsigned)moqk_ceil((int64_t)count, 256), 256, 0, (const __nv_bfloat16 *)src, count, dst);
    else moqc_ok(c, cudaMemcpyAsync(dst, src, count * sizeof *dst, cudaMemcpyDeviceToHost, c->stream), "a download");
}

/* Is value a at i a better maximum than b at j? NaN is worse than any number; the lowest index of equals. */
__device__ __forceinline__ int moqk_better(float a, int32_t i, float b, int32_t j)
{
    int a_is = a == a, b_is = b == b;
    if (a_is != b_is) return a_is;
    return a_is && a != b ? a > b : i < j;
}

__device__ __forceinline__ void moqk_warp_best(float *v, int32_t *at)
{
    for (int o = 16; o > 0; o >>= 1) {
        float u = __shfl_xor_sync(0xffffffffu, *v, o);
        int32_t j = __shfl_xor_sync(0xffffffffu, *at, o);
        if (moqk_better(u, j, *v, *at)) { *v = u; *at = j; }
    }
}

/* Grid: rows. One block reads a row, so a thread has many loads under way. */
template <typename T> __global__ void __launch_bounds__(1024) moqk_argmax(const T *x, int32_t n, int32_t *index)
{
    enum { AHEAD = 16 };
    __shared__ float value[32];
    __shared__ int32_t place[32];
    const T *row = x + (int64_t)blockIdx.x * n;
    float best = __uint_as_float(0x7fc00000u);
    int32_t at = (int32_t)threadIdx.x < n ? (int32_t)threadIdx.x : INT32_MAX, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    moqk_follow();
    for (int64_t first = threadIdx.x; first < n; first += (int64_t)AHEAD * blockDim.x) {
        float v[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) v[k] = first + k * (int64_t)blockDim.x < n ? moqk_get(row, first + k * (int64_t)blockDim.x)
            : __uint_as_float(0x7fc00000u);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            int64_t i = first + k * (int64_t)blockDim.x;
            if (v[k] == v[k] && !(v[k] <= best)) { best = v[k]; at = (int32_t)i; } /* indices rise; best may be NaN yet */
        }
    }
    moqk_warp_best(&best, &at);
    if (lane == 0) { value[warp] = best; place[warp] = at; }
    __syncthreads();
    if (warp != 0) return;
    int there = lane < (int32_t)(blockDim.x >> 5);
    best = there ? value[lane] : __uint_as_float(0x7fc00000u);
    at = there ? place[lane] : INT32_MAX;
    moqk_warp_best(&best, &at);
    if (lane == 0) index[blockIdx.x] = best > __uint_as_float(0xff800000u) ? at : -1;
}

static void moqc_argmax(moq_backend *be, const void *x, int32_t rows, int32_t n, int32_t *index)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    if (rows < 1 || n < 1) return;
    MOQC_BY_ACT(c, (moqc_chain(c, "argmax", moqk_argmax<float>, rows, 1024, 0, (const float *)x, n, index)),
                (moqc_chain(c, "argmax", moqk_argmax<__nv_bfloat16>, rows, 1024, 0, (const __nv_bfloat16 *)x, n, index)));
    moqc_launched(c, "argmax");
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-kv         KV caches
   Rows lie in the order [slot][kv head][position]; codes and block scales apart, so that every row is aligned.
   ------------------------------------------------------------------------------------------------ */

enum moqk_kv_kind { MOQK_KV_F32, MOQK_KV_BF16, MOQK_KV_E4M3, MOQK_KV_I8, MOQK_KV_NV4, MOQK_KV_MX4, MOQK_KV_ANY /* of a kernel: the cache tells */ };
enum { MOQK_KV_MOST_DIM = 512, MOQK_KEYS = 64, MOQK_QUERIES = 32 }; /* keys of a step of the first kernel; queries and keys of a tile of the second */

/* Keys or values of one layer. */
typedef struct moqk_kv {
    uint8_t *codes;          /* [slots * kv_heads * capacity, row_bytes]; values past dim are zero */
    uint8_t *scales;         /* [slots * kv_heads * capacity, blocks] */
    const float *scale;      /* [kv_heads] */
    const float *bias;       /* [kv_heads, dim] or NULL */
    int32_t dim, padded;     /* padded: to 16, MXFP4 32 */
    int32_t row_bytes, blocks;
    int32_t kind, rotate;
} moqk_kv;

typedef struct moqk_cache {
    moqk_kv k, v;
    int32_t slots, capacity, kv_heads;
} moqk_cache;

typedef struct moqc_cache {
    moqk_cache d;
    void *memory;
} moqc_cache;

/* ---- one row to and from its format ---- */

/* Sylvester's matrix times 1 / sqrt(dim) on `count` rows of shared memory; all threads of the block. */
__device__ void moqk_rotate_rows(float *x, int32_t count, int32_t stride, int32_t dim, float factor)
{
    for (int32_t half = 1; half < dim; half *= 2) {
        __syncthreads();
        for (int32_t i = threadIdx.x; i < count * (dim / 2); i += blockDim.x) {
            int32_t j = i % (dim / 2);
            float *p = x + i / (dim / 2) * stride + j / half * 2 * half + j % half, a = p[0], b = p[half];
            p[0] = a + b;
            p[half] = a - b;
        }
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < count * dim; i += blockDim.x) x[i / dim * stride + i % dim] *= factor;
    __syncthreads();
}

/* Value i of a row of a cache of 8 bits and more. */
__device__ __forceinline__ void moqk_kv_put(int32_t kind, uint8_t *row, int32_t i, float v, float scale, const float *bias)
{
    if (kind == MOQK_KV_F32) ((float *)row)[i] = v;
    else if (kind == MOQK_KV_BF16) ((__nv_bfloat16 *)row)[i] = __float2bfloat16_rn(v);
    else if (kind == MOQK_KV_E4M3) row[i] = (uint8_t)moqk_to_e4m3((bias ? v - bias[i] : v) / scale);
    else row[i] = v == v ? (uint8_t)(int)moqk_round_code(MOQ_I8, v / scale, 0) : 0;
}

/* x in shared memory -> row `at` of such a cache; `threads` stride over values. */
__device__ __forceinline__ void moqk_kv_pack_wide(const moqk_kv &c, int32_t head, int64_t at, const float *x, int32_t thread, int32_t threads)
{
    uint8_t *row = c.codes + at * c.row_bytes;
    const float scale = c.scale[head], *bias = c.bias ? c.bias + (int64_t)head * c.dim : NULL;
    for (int32_t i = thread; i < c.padded; i += threads) {
        if (i >= c.dim && c.kind == MOQK_KV_E4M3) row[i] = 0;
        else moqk_kv_put(c.kind, row, i, i < c.dim ? x[i] : 0, scale, bias);
    }
}

/* The same of any cache, by all threads of the block: one packs a block of FP4. */
__device__ void moqk_kv_pack(const moqk_kv &c, int32_t head, int64_t at, const float *x)
{
    uint8_t *row = c.codes + at * c.row_bytes;
    float scale = c.scale[head];
    if (c.kind == MOQK_KV_NV4 || c.kind == MOQK_KV_MX4) {
        int32_t block = c.kind == MOQK_KV_MX4 ? 32 : 16;
        for (int32_t b = threadIdx.x; b < c.blocks; b += blockDim.x) {
            float amax = 0, s;
            int32_t end = min(c.dim, (b + 1) * block);
            for (int32_t i = b * block; i < end; i++) amax = fmaxf(amax, fabsf(x[i]));
            if (c.kind == MOQK_KV_MX4) {
                int e = moqk_e8m0_exponent(MOQ_RULE_E8M0_CEIL, 6, amax);
                c.scales[at * c.blocks + b] = (uint8_t)(e + 127);
                s = ldexpf(1.0f, e);
            } else {
                s = amax / (6 * (scale / 6));
                uint32_t code = moqk_to_e4m3(s < 448 ? s : 448);
                c.scales[at * c.blocks + b] = (uint8_t)code;
                s = moqk_e4m3(code) * (scale / 6);
            }
            for (int32_t i = b * block; i < (b + 1) * block; i += 2) {
                uint32_t lo = s > 0 && i < end ? moqk_to_e2m1(x[i] / s) : 0, hi = s > 0 && i + 1 < end ? moqk_to_e2m1(x[i + 1] / s) : 0;
                row[i / 2] = (uint8_t)(lo | hi << 4);
            }
        }
        return;
    }
    moqk_kv_pack_wide(c, head, at, x, (int32_t)threadIdx.x, (int32_t)blockDim.x);
}

/* Grid: rows, kv heads, keys and values. */
template <typename T> __global__ void __launch_bounds__(128) moqk_append(moqk_cache c, const int32_t *slot, const int32_t *pos, const T *k,
                                                                         int64_t k_stride, const T *v, int64_t v_stride)
{
    moqk_follow();
    __shared__ float x[MOQK_KV_MOST_DIM];
    int64_t row = blockIdx.x, s = slot[row], at = pos[row];
    int32_t head = blockIdx.y, which = blockIdx.z;
    const moqk_kv &to = which ? c.v : c.k;
    const T *from = which ? v + row * v_stride : k + row * k_stride;
    if (s < 0 || s >= c.slots || at < 0 || at >= c.capacity) return; /* a caller's mistake */
    for (int32_t i = threadIdx.x; i < to.dim; i += blockDim.x) x[i] = moqk_get(from, (int64_t)head * to.dim + i);
    if (to.rotate) moqk_rotate_rows(x, 1, to.dim, to.dim, 1 / sqrtf((float)to.dim));
    __syncthreads();
    moqk_kv_pack(to, head, (s * c.kv_heads + head) * c.capacity + at, x);
}

/* A head of `dim` <= MOST values on its way through norm and turn, by one warp, whose lanes hold every 32nd value: all that it takes from memory is
   asked for at once. weight: of the norm, or NULL; from: the head; turns: of `half` pairs. */
template <int MOST> struct moqk_entering {
    uint32_t raw[MOST / 32];   /* as they are stored: nothing waits for them before all loads are under way */
    float w[MOST / 32];
    float2 by[MOST / 64];

    /* Never change. */
    __device__ __forceinline__ void weigh(const float *weight, int32_t dim)
    {
        const int32_t lane = threadIdx.x & 31;
#pragma unroll
        for (int k = 0; k < MOST / 32; k++) w[k] = weight && lane + 32 * k < dim ? weight[lane + 32 * k] : 1;
    }
    __device__ __forceinline__ void load(const void *from, int bf16, int32_t dim, const float2 *turns, int32_t half)
    {
        const int32_t lane = threadIdx.x & 31;
#pragma unroll
        for (int k = 0; k < MOST / 64; k++) by[k] = lane + 32 * k < half ? turns[lane + 32 * k] : make_float2(1, 0);
#pragma unroll
        for (int k = 0; k < MOST / 32; k++) raw[k] = lane + 32 * k < dim ? moqk_bits_any(from, lane + 32 * k, bf16) : 0;
    }
    /* Into x in shared memory. Values are rounded to the activation type where calls of their own would store them. */
    __device__ __forceinline__ void put(int normed, float eps, int bf16, int32_t dim, int32_t half, int interleaved, float *x)
    {
        const int32_t lane = threadIdx.x & 31;
        float v[MOST / 32], sum = 0;
#pragma unroll
        for (int k = 0; k < MOST / 32; k++) {
            v[k] = __uint_as_float(raw[k] << (bf16 ? 16 : 0));
            if (lane + 32 * k < dim) sum = __fmaf_rn(v[k], v[k], sum);
        }
        const float factor = normed ? moqk_norm_factor(moqk_warp_sum(sum), dim, eps) : 1;
#pragma unroll
        for (int k = 0; k < MOST / 32; k++) {
            if (normed) v[k] = moqk_rounded_any(v[k] * factor * w[k], bf16);
            if (lane + 32 * k < dim) x[lane + 32 * k] = v[k];
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < MOST / 64; k++) {
            const int32_t i = lane + 32 * k, ia = interleaved ? 2 * i : i, ib = interleaved ? ia + 1 : ia + half;
            if (i >= half) continue;
            const float a = x[ia], b = x[ib];
            x[ia] = moqk_rounded_any(__fmaf_rn(a, by[k].x, -__fmul_rn(b, by[k].y)), bf16);
            x[ib] = moqk_rounded_any(__fmaf_rn(a, by[k].y, __fmul_rn(b, by[k].x)), bf16); /* the bits of moqk_rope */
        }
        __syncwarp();
    }
};

/* A head of q, k or v, one after the other in the grid's second dimension: norm, turn, append. Blocks are small: they find room on the device before
   the product that they wait for has ended. Grid: rows, heads of all three. */
__global__ void __launch_bounds__(32) moqk_enter(moqk_cache c, const int32_t *slot, const int32_t *pos, moq_heads_desc d, int bf16)
{
    __shared__ float x[MOQK_KV_MOST_DIM];
    const int32_t kind = (int32_t)blockIdx.y < d.heads ? 0 : (int32_t)blockIdx.y < d.heads + c.kv_heads ? 1 : 2;
    const int32_t head = (int32_t)blockIdx.y - (kind > 0 ? d.heads : 0) - (kind > 1 ? c.kv_heads : 0), dim = kind == 2 ? c.v.dim : c.k.dim;
    const int64_t row = blockIdx.x;
    const moqk_kv &to = kind == 2 ? c.v : c.k;
    moqk_follow();
    const int32_t s = slot[row], at = pos[row], half = kind < 2 ? d.dims / 2 : 0;
    const float2 *turns = (const float2 *)(const void *)d.table + row * (d.dims / 2);
    const int64_t stride = kind == 0 ? d.q_stride : kind == 1 ? d.k_stride : d.v_stride;
    const float *weight = kind == 0 ? d.q_norm : kind == 1 ? d.k_norm : NULL;
    moqk_entering<MOQK_KV_MOST_DIM> e;
    e.weigh(weight, dim);
    e.load(moqk_place_any(kind == 0 ? d.q : kind == 1 ? d.k : d.v, row * stride + (int64_t)head * dim, bf16), bf16, dim, turns, half);
    e.put(weight != NULL, d.eps, bf16, dim, half, d.interleaved, x);
    if (kind == 0) {
        for (int32_t i = threadIdx.x; i < dim; i += blockDim.x) moqk_put_any(d.q, row * d.q_stride + (int64_t)head * dim + i, x[i], bf16);
        return;
    }
    if (s < 0 || s >= c.slots || at < 0 || at >= c.capacity) return; /* a caller's mistake */
    if (to.rotate) moqk_rotate_rows(x, 1, to.dim, to.dim, 1 / sqrtf((float)to.dim));
    moqk_kv_pack(to, head, ((int64_t)s * c.kv_heads + head) * c.capacity + at, x);
}

enum { MOQK_ENTER_WARPS = 8 };

/* The same of many rows with heads of DIM values, turned whole, for caches of 8 bits and more: as few instructions as it takes. A lane holds every 32nd
   value, so pairs (i, i + DIM / 2) are in one lane. A warp a head; grid: rows, MOQK_ENTER_WARPS heads of all three. */
template <typename T, int DIM>
__global__ void __launch_bounds__(32 * MOQK_ENTER_WARPS) moqk_enter_many(moqk_cache c, const int32_t *slot, const int32_t *pos, moq_heads_desc d)
{
    enum { N = DIM / 32 };
    const int32_t lane = (int32_t)threadIdx.x & 31, index = (int32_t)blockIdx.y * MOQK_ENTER_WARPS + ((int32_t)threadIdx.x >> 5);
    const int32_t kind = index < d.heads ? 0 : index < d.heads + c.kv_heads ? 1 : 2, head = index - (kind > 0 ? d.heads : 0) - (kind > 1 ? c.kv_heads : 0);
    const int64_t row = blockIdx.x;
    const float *weight = kind == 0 ? d.q_norm : kind == 1 ? d.k_norm : NULL;
    moqk_follow();
    if (index >= d.heads + 2 * c.kv_heads) return;
    T *x = (T *)(uintptr_t)(kind == 0 ? d.q : kind == 1 ? d.k : d.v) + row * (kind == 0 ? d.q_stride : kind == 1 ? d.k_stride : d.v_stride) + head * DIM + lane;
    float v[N];
    float2 by[N / 2];
#pragma unroll
    for (int k = 0; k < N; k++) v[k] = moqk_get(x, 32 * k);
    if (kind < 2) {
        const float2 *turns = (const float2 *)(const void *)d.table + row * (DIM / 2) + lane;
#pragma unroll
        for (int k = 0; k < N / 2; k++) by[k] = turns[32 * k];
    }
    if (weight) {
        float sum = 0;
#pragma unroll
        for (int k = 0; k < N; k++) sum = __fmaf_rn(v[k], v[k], sum);
        const float factor = moqk_norm_factor(moqk_warp_sum(sum), DIM, d.eps);
#pragma unroll
        for (int k = 0; k < N; k++) v[k] = moqk_rounded<T>(v[k] * factor * weight[lane + 32 * k]);
    }
    if (kind < 2)
#pragma unroll
        for (int k = 0; k < N / 2; k++) {
            const float a = v[k], b = v[k + N / 2];
            v[k] = moqk_rounded<T>(__fmaf_rn(a, by[k].x, -__fmul_rn(b, by[k].y)));
            v[k + N / 2] = moqk_rounded<T>(__fmaf_rn(a, by[k].y, __fmul_rn(b, by[k].x)));
        }
    if (kind == 0) {
#pragma unroll
        for (int k = 0; k < N; k++) moqk_put(x, 32 * k, v[k]);
        return;
    }
    const int32_t s = slot[row], at = pos[row];
    if (s < 0 || s >= c.slots || at < 0 || at >= c.capacity) return; /* a caller's mistake */
    uint8_t *to = (kind == 2 ? c.v.codes : c.k.codes) + (((int64_t)s * c.kv_heads + head) * c.capacity + at) * (kind == 2 ? c.v.row_bytes : c.k.row_bytes);
    const float scale = (kind == 2 ? c.v.scale : c.k.scale)[head], *bias = kind == 2 ? c.v.bias : c.k.bias;
    if (bias) bias += head * DIM;
#pragma unroll
    for (int k = 0; k < N; k++) moqk_kv_put(c.k.kind, to, lane + 32 * k, v[k], scale, bias);
}

/* Values [d, d + N) of a row, N = 4 or 16; d is a multiple of N. */
template <int KIND, int N> __device__ __forceinline__ void moqk_kv_read(const moqk_kv &c, int64_t at, int32_t d, float scale, const float *bias,
                                                                        float v[N])
{
    const uint8_t *row = c.codes + at * c.row_bytes;
    if constexpr (KIND == MOQK_KV_F32) {
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            float4 f = *((const float4 *)((const float *)row + d) + i);
            v[4 * i] = f.x; v[4 * i + 1] = f.y; v[4 * i + 2] = f.z; v[4 * i + 3] = f.w;
        }
    } else if constexpr (KIND == MOQK_KV_BF16) {
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            uint2 w = *((const uint2 *)((const __nv_bfloat16 *)row + d) + i);
            v[4 * i] = __uint_as_float(w.x << 16); v[4 * i + 1] = __uint_as_float(w.x & 0xffff0000u);
            v[4 * i + 2] = __uint_as_float(w.y << 16); v[4 * i + 3] = __uint_as_float(w.y & 0xffff0000u);
        }
    } else if constexpr (KIND == MOQK_KV_E4M3 || KIND == MOQK_KV_I8) {
        uint32_t w[N / 4];
        if constexpr (N == 16) { uint4 q = *(const uint4 *)(row + d); w[0] = q.x; w[1] = q.y; w[2] = q.z; w[3] = q.w; }
        else w[0] = *(const uint32_t *)(row + d);
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            if constexpr (KIND == MOQK_KV_E4M3) moqk_decode_e4m3(w[i], v + 4 * i);
            else
#pragma unroll
                for (int j = 0; j < 4; j++) v[4 * i + j] = __uint_as_float(__byte_perm(w[i] ^ 0x80808080u, 0x4b000000u, 0x7540 + j)) - 8388736.0f;
        }
#pragma unroll
        for (int i = 0; i < N; i++) v[i] *= scale;
        if (KIND == MOQK_KV_E4M3 && bias)
#pragma unroll
            for (int i = 0; i < N; i++) if (d + i < c.dim) v[i] += bias[d + i];
    } else {
        float s = KIND == MOQK_KV_MX4 ? moqk_e8m0(c.scales[at * c.blocks + d / 32]) : moqk_e4m3(c.scales[at * c.blocks + d / 16]) * (scale / 6);
        float u[8];
        if constexpr (N == 16) {
            uint2 q = *(const uint2 *)(row + d / 2);
            moqk_decode_e2m1(q.x, v);
            moqk_decode_e2m1(q.y, v + 8);
        } else {
            moqk_decode_e2m1(*(const uint16_t *)(row + d / 2), u);
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = u[i];
        }
#pragma unroll
        for (int i = 0; i < N; i++) v[i] *= s;
    }
}

/* The same of U rows, `step` apart from at + first on; zeros for those that are not before at + end. Their loads are under way together: a kind that only
   the cache knows is asked for once. */
template <int KIND, int N, int U>
__device__ __forceinline__ void moqk_kv_read_rows(const moqk_kv &c, int64_t at, int32_t first, int32_t step, int32_t end, int32_t d, float scale,
                                                  const float *bias, float (&v)[U][N])
{
#define MOQK_CALL(K) moqk_kv_read_rows<K, N, U>(c, at, first, step, end, d, scale, bias, v)
    if constexpr (KIND == MOQK_KV_ANY) {
        switch (c.kind) {
        case MOQK_KV_F32: MOQK_CALL(MOQK_KV_F32); break;
        case MOQK_KV_BF16: MOQK_CALL(MOQK_KV_BF16); break;
        case MOQK_KV_E4M3: MOQK_CALL(MOQK_KV_E4M3); break;
        case MOQK_KV_I8: MOQK_CALL(MOQK_KV_I8); break;
        case MOQK_KV_NV4: MOQK_CALL(MOQK_KV_NV4); break;
        default: MOQK_CALL(MOQK_KV_MX4); break;
        }
    } else {
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (first + u * step < end) moqk_kv_read<KIND, N>(c, at + first + u * step, d, scale, bias, v[u]);
            else
#pragma unroll
                for (int i = 0; i < N; i++) v[u][i] = 0;
        }
    }
#undef MOQK_CALL
}

/* ---- caches ---- */

/* Shapes and bytes; `err` names what is impossible. bytes: codes and block scales of keys, then of values. */
static moq_result moqc_kv_plan(const moqc_ctx *c, const moq_kv_desc *d, moqk_cache *k, size_t bytes[4], moq_error *err)
{
    const char *name = d->name ? d->name : "";
    memset(k, 0, sizeof *k);
    k->slots = d->slots;
    k->capacity = d->capacity;
    k->kv_heads = d->kv_heads;
    if (d->slots < 1 || d->capacity < 1 || d->kv_heads < 1 || d->head_dim < 1 || (unsigned)d->kv.format >= (unsigned)MOQ_KV_FORMAT_COUNT)
        return moq_fail(err, MOQ_E_ARG, name, "a cache of %d slots, %d tokens, %d heads of %d values in format %d", (int)d->slots, (int)d->capacity,
                        (int)d->kv_heads,
                        (int)d->head_dim, (int)d->kv.format);
    if (d->shared) return moq_fail(err, MOQ_E_UNSUPPORTED, name, "caches whose values are part of the keys are not supported on CUDA; keep both");
    if (d->kv.format == MOQ_KV_NVFP4_ROTATE && (d->head_dim & (d->head_dim - 1)) != 0)
        return moq_fail(err, MOQ_E_UNSUPPORTED, name, "rotated keys need a head_dim that is a power of two, found %d; use nvfp4", (int)d->head_dim);
    if (d->head_dim > MOQK_KV_MOST_DIM || d->value_dim > MOQK_KV_MOST_DIM)
        return moq_fail(err, MOQ_E_UNSUPPORTED, name, "heads of %d and %d values; at most %d are supported on CUDA", (int)d->head_dim,
                        (int)d->value_dim, (int)MOQK_KV_MOST_DIM);
    for (int i = 0; i < 2; i++) {
        moqk_kv *v = i ? &k->v : &k->k;
        const moq_view *s = i ? &d->kv.v_scale : &d->kv.k_scale, *b = i ? &d->kv.v_bias : &d->kv.k_bias;
        moq_kv_format f = d->kv.format;
        v->dim = i && d->value_dim > 0 ? d->value_dim : d->head_dim;
        v->rotate = i == 0 && f == MOQ_KV_NVFP4_ROTATE;
        v->kind = f == MOQ_KV_WIDE ? (c->bf16 ? MOQK_KV_BF16 : MOQK_KV_F32) : f == MOQ_KV_FP8 || f == MOQ_KV_FP8_AFFINE ? MOQK_KV_E4M3
            : f == MOQ_KV_INT8 ? MOQK_KV_I8 : f == MOQ_KV_MXFP4 ? MOQK_KV_MX4 : MOQK_KV_NV4;
        v->padded = (int32_t)moqk_pad(v->dim, v->kind == MOQK_KV_MX4 ? 32 : 16);
        v->blocks = v->kind == MOQK_KV_MX4 ? v->padded / 32 : v->kind == MOQK_KV_NV4 ? v->padded / 16 : 0;
        v->row_bytes = v->kind == MOQK_KV_F32 ? v->padded * 4 : v->kind == MOQK_KV_BF16 ? v->padded * 2 : v->blocks ? v->padded / 2 : v->padded;
        if ((s->data && s->count != 1 && s->count != (uint64_t)d->kv_heads) || (b->data && b->count != (uint64_t)d->kv_heads * (uint64_t)v->dim))
            return moq_fail(err, MOQ_E_SHAPE, name, "%llu scales and %llu biases of the %s cache, expected 1 or %d, and %lld",
                            (unsigned long long)s->count,
                            (unsigned long long)b->count, i ? "value" : "key", (int)d->kv_heads, (long long)d->kv_heads * (long long)v->dim);
        for (uint64_t h = 0; s->data && h < s->count; h++) {
            float x = moqc_f32_at(s, (int64_t)h);
            if (!(x > 0) || !(x < 3.4e38f)) return moq_fail(err, MOQ_E_SCALE, name, "%s scale %g, expected a number greater than 0",
                                                            i ? "value" : "key", (double)x);
        }
        double rows = (double)d->slots * d->kv_heads * d->capacity;
        if (rows * v->row_bytes > 9e15) return moq_fail(err, MOQ_E_OVERFLOW, name, "%d slots of %d tokens do not fit the address space",
                                                        (int)d->slots, (int)d->capacity);
        bytes[2 * i] = (size_t)moqk_pad((int64_t)d->slots * d->kv_heads * d->capacity * v->row_bytes, 256);
        bytes[2 * i + 1] = (size_t)moqk_pad((int64_t)d->slots * d->kv_heads * d->capacity * v->blocks, 256);
    }
    return MOQ_OK;
}

/* Floats beside the rows: scales of heads, then biases. */
static int64_t moqc_kv_floats(const moqk_cache *k) { return moqk_pad((int64_t)k->kv_heads * (2 + k->k.dim + k->v.dim), 64); }

static void moqc_kv_release(moq_backend *be, moq_kv_cache *cache)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    if (!cache) return;
    moqc_give(c, ((moqc_cache *)(void *)cache)->memory);
    moq_release(&c->host, cache, sizeof(moqc_cache));
}

/* Scales and biases of the heads. */
static int moqc_kv_numbers(moqc_ctx *c, const moq_kv_desc *d, moqk_cache *k, float *at)
{
    static const float one = 1;
    moq_view ones = {&one, MOQ_F32, 1};
    int fine = 1;
    for (int i = 0; i < 2; i++) {
        moqk_kv *v = i ? &k->v : &k->k;
        const moq_view *s = i ? &d->kv.v_scale : &d->kv.k_scale, *b = i ? &d->kv.v_bias : &d->kv.k_bias;
        v->scale = at;
        fine &= moqc_send_floats(c, at, s->data ? s : &ones, 0, s->data && s->count > 1, d->kv_heads);
        at += d->kv_heads;
        if (!b->data || d->kv.format != MOQ_KV_FP8_AFFINE) continue;
        v->bias = at;
        fine &= moqc_send_floats(c, at, b, 0, 1, (int64_t)b->count);
        at += b->count;
    }
    return fine;
}

/* The values of a head that >>cuda-attention-stream reads this cache as; 0: it does not. F32 caches have more bits than tensor cores multiply; codes of 4
   bits are read as they are. */
static int32_t moqc_stream_dim(const moqk_cache *k)
{
    const int32_t dim = k->k.dim;
    if (k->k.kind == MOQK_KV_F32 || dim != k->v.dim) return 0;
    if (dim == 64 || dim == 128 || dim == 256) return dim;
    return dim < 128 && k->k.blocks == 0 ? 128 : 0;
}

/* What splits of attention leave for each other, absent. Graphs hold pointers to what was there before. */
static int moqc_take_given(moqc_ctx *c, int32_t dim, moq_error *err)
{
    const size_t bytes = (size_t)c->sm_count * MOQC_GIVEN * (size_t)dim;
    if (c->given && c->given_dim >= dim) return 1;
    uint32_t *given = (uint32_t *)moqc_take(c, bytes, "partial results", err);
    if (!given) return 0;
    if (!moqc_ok(c, cudaMemsetAsync(given, 0xff, bytes, c->stream), "cudaMemset")) {
        moqc_give(c, given);
        moqc_why(c, c->name, err);
        return 0;
    }
    if (c->graphs == 0 && !c->capturing) moqc_give(c, c->given);
    c->given = given;
    c->given_dim = dim;
    return 1;
}

static moq_kv_cache *moqc_kv_create(moq_backend *be, const moq_kv_desc *d, moq_error *err)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    moqk_cache k;
    moqc_need need;
    size_t bytes[4], total;
    moqc_clear(err);
    if (moqc_kv_plan(c, d, &k, bytes, err) < 0) return NULL;
    memset(&need, 0, sizeof need);
    need.partial = moqc_stream_dim(&k) ? 0 : moqk_pad(k.v.dim, 4) + 2;
    if (moqc_grow(c, &need, c->be.max_rows, err) < 0 || (moqc_stream_dim(&k) && !moqc_take_given(c, moqc_stream_dim(&k), err))) return NULL;
    size_t floats = (size_t)moqc_kv_floats(&k) * 4;
    total = bytes[0] + bytes[1] + bytes[2] + bytes[3] + floats;
    moqc_cache *cache = (moqc_cache *)moq_allocate(&c->host, sizeof *cache);
    if (!cache) { moq_fail(err, MOQ_E_NOMEM, d->name, "no host memory for the cache"); return NULL; }
    uint8_t *p = (uint8_t *)moqc_take(c, total, "a KV cache", err);
    cache->memory = p;
    if (p) {
        k.k.codes = p + floats;
        k.k.scales = k.k.codes + bytes[0];
        k.v.codes = k.k.scales + bytes[1];
        k.v.scales = k.v.codes + bytes[2];
        moqc_ok(c, cudaMemsetAsync(p, 0, total, c->stream), "cudaMemset");
        if (moqc_kv_numbers(c, d, &k, (float *)(void *)p)) {
            cache->d = k;
            return (moq_kv_cache *)(void *)cache;
        }
        moqc_why(c, d->name, err);
    }
    moqc_kv_release(be, (moq_kv_cache *)(void *)cache);
    return NULL;
}

static size_t moqc_kv_bytes(const moq_backend *be, const moq_kv_desc *d)
{
    moqk_cache k;
    size_t bytes[4];
    if (moqc_kv_plan(moqc_of(be), d, &k, bytes, NULL) < 0) return 0;
    return bytes[0] + bytes[1] + bytes[2] + bytes[3] + (size_t)moqc_kv_floats(&k) * 4;
}

static void moqc_kv_append(moq_backend *be, moq_kv_cache *cache, const moq_batch *b, const void *k, int64_t k_stride, const void *v, int64_t v_stride)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    const moqk_cache *d = &((const moqc_cache *)(const void *)cache)->d;
    if (b->rows < 1) return;
    dim3 grid((unsigned)b->rows, (unsigned)d->kv_heads, 2);
    MOQC_BY_ACT(c, (moqc_chain(c, "kv_append", moqk_append<float>, grid, 128, 0, *d, b->slot, b->pos, (const float *)k, k_stride, (const float *)v,
                               v_stride)),
                (moqc_chain(c, "kv_append", moqk_append<__nv_bfloat16>, grid, 128, 0, *d, b->slot, b->pos, (const __nv_bfloat16 *)k, k_stride,
                            (const __nv_bfloat16 *)v, v_stride)));
    moqc_launched(c, "kv_append");
}

static int moqc_enter_waits(const moqc_ctx *c, const moq_batch *b, const moq_heads_desc *h); /* see >>cuda-attention-host */

static void moqc_launch_enter(moqc_ctx *c, const moq_batch *b, const moq_heads_desc *h)
{
    const moqk_cache *d = &((const moqc_cache *)(const void *)h->cache)->d;
    const int32_t heads = h->heads + 2 * d->kv_heads, dim = d->k.dim;
    if (b->rows > MOQC_FEW_ROWS && (dim == 64 || dim == 128 || dim == 256) && d->v.dim == dim && h->dims == dim && !h->interleaved && d->k.kind <= MOQK_KV_I8) {
        const dim3 grid((unsigned)b->rows, (unsigned)moqk_ceil(heads, MOQK_ENTER_WARPS));
#define MOQC_CALL(T) moqc_chain(c, "kv_enter", dim == 64 ? moqk_enter_many<T, 64> : dim == 128 ? moqk_enter_many<T, 128> : moqk_enter_many<T, 256>, grid, \
                                32 * MOQK_ENTER_WARPS, 0, *d, b->slot, b->pos, *h)
        MOQC_BY_ACT(c, MOQC_CALL(float), MOQC_CALL(__nv_bfloat16));
#undef MOQC_CALL
        return;
    }
    moqc_chain(c, "kv_enter", moqk_enter, dim3((unsigned)b->rows, (unsigned)heads), 32, 0, *d, b->slot, b->pos, *h, c->bf16);
}

static void moqc_kv_enter(moq_backend *be, const moq_batch *b, const moq_heads_desc *h)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    if (b->rows < 1) return;
    if (moqc_enter_waits(c, b, h)) {
        c->held->batch = *b;
        c->held->heads = *h;
        c->held->enters = c->waiting = 1;
    } else moqc_launch_enter(c, b, h);
}

/* `bytes` of every head, a head after `stride` bytes; ranges may overlap. Grid: heads. */
__global__ void __launch_bounds__(1024) moqk_move_heads(uint8_t *dst, const uint8_t *src, int64_t stride, int64_t bytes)
{
    int64_t pieces = moqk_ceil(bytes, blockDim.x * 4);
    dst += blockIdx.x * stride;
    src += blockIdx.x * stride;
    for (int64_t i = 0; i < pieces; i++) {
        int64_t at = (dst < src ? i : pieces - 1 - i) * blockDim.x * 4 + threadIdx.x;
        uint8_t v[4];
        for (int j = 0; j < 4; j++) v[j] = at + j * blockDim.x < bytes ? src[at + j * blockDim.x] : 0;
        __syncthreads();
        for (int j = 0; j < 4; j++) if (at + j * blockDim.x < bytes) dst[at + j * blockDim.x] = v[j];
        __syncthreads();
    }
}

static void moqc_kv_copy(moq_backend *be, moq_kv_cache *cache, int32_t dst_slot, int32_t dst_pos, int32_t src_slot, int32_t src_pos, int32_t count)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    const moqk_cache *k = &((const moqc_cache *)(const void *)cache)->d;
    int apart = dst_slot != src_slot || dst_pos + (int64_t)count <= src_pos || src_pos + (int64_t)count <= dst_pos;
    for (int i = 0; i < 4 && count > 0; i++) {
        const moqk_kv *v = i < 2 ? &k->k : &k->v;
        uint8_t *base = i & 1 ? v->scales : v->codes;
        int64_t row = i & 1 ? v->blocks : v->row_bytes, stride = k->capacity * row;
        uint8_t *dst = base + ((int64_t)dst_slot * k->kv_heads * k->capacity + dst_pos) * row;
        const uint8_t *src = base + ((int64_t)src_slot * k->kv_heads * k->capacity + src_pos) * row;
        if (row == 0) continue;
        if (apart) moqc_ok(c, cudaMemcpy2DAsync(dst, (size_t)stride, src, (size_t)stride, (size_t)(count * row), (size_t)k->kv_heads,
                                                cudaMemcpyDeviceToDevice, c->stream), "kv_copy");
        else moqk_move_heads<<<(unsigned)k->kv_heads, 1024, 0, c->stream>>>(dst, src, stride, count * row);
    }
    moqc_launched(c, "kv_copy");
}

/* Codes of keys, their block scales, the same of values: [head][position] rows each. */
static size_t moqc_kv_move(moq_backend *be, const moq_kv_cache *cache, int32_t slot, int32_t count, uint8_t *out, const uint8_t *in)
{
    const moqk_cache *k = &((const moqc_cache *)(const void *)cache)->d;
    size_t total = 0;
    for (int i = 0; i < 4 && count > 0; i++) {
        const moqk_kv *v = i < 2 ? &k->k : &k->v;
        uint8_t *base = i & 1 ? v->scales : v->codes;
        int64_t row = i & 1 ? v->blocks : v->row_bytes;
        size_t bytes = (size_t)(count * row);
        for (int64_t h = 0; h < k->kv_heads && bytes; h++, total += bytes) {
            uint8_t *at = base + ((int64_t)slot * k->kv_heads + h) * k->capacity * row;
            if (out) moqc_download(be, out + total, at, bytes);
            if (in) moqc_upload(be, at, in + total, bytes);
        }
    }
    return total;
}

static size_t moqc_kv_read(moq_backend *be, const moq_kv_cache *cache, int32_t slot, int32_t count, void *out)
{
    return moqc_kv_move(be, cache, slot, count, (uint8_t *)out, NULL);
}

static void moqc_kv_write(moq_backend *be, moq_kv_cache *cache, int32_t slot, int32_t count, const void *bytes)
{
    moqc_kv_move(be, cache, slot, count, NULL, (const uint8_t *)bytes);
}


/* ------------------------------------------------------------------------------------------------
   >>cuda-attention  attention with F32 arithmetic
   Takes every format and head size. Two kernels: few queries with the length of the sequence cut into splits, and tiles of queries that
   share keys and values.
   ------------------------------------------------------------------------------------------------ */

typedef struct moqk_attend_args {
    moqk_cache c;
    const int32_t *slot, *pos;
    const void *q;
    void *y;
    const float *sinks;
    float *partial;            /* [rows, heads, splits, values padded to 4]; NULL with one split */
    float2 *stats;             /* [rows, heads, splits] max and sum of each */
    int32_t *arrived;          /* [rows, head groups] splits that are done; zero between launches */
    uint32_t *given;           /* >>cuda-attention-stream: what splits leave for each other, [rows, head groups, owner, split, 2^shift] sums of four values,
                                  then maximum and sum of each; absent between launches. NULL: they are alone, or a cluster */
    int64_t given_stats;       /* words from the first sum to the first maximum */
    int64_t q_stride, y_stride;
    int32_t rows, heads, share, window, chunk, splits, bf16;
    int32_t ahead;             /* >>cuda-attention-stream: 1: blocks fetch their first keys and values ahead */
    int32_t enters;            /* the same: 1: the launch does what moqk_enter would do for its one row */
    int32_t clustered;         /* the same: 1: the splits of a row are the blocks of a cluster, and add up in its shared memory; given is NULL */
    int32_t shift;             /* the same: a split adds up 2^shift quads of four values */
    int32_t places;            /* the same: steps that the ring of a warp holds */
    float scale, softcap;
    moq_heads_desc enter;
} moqk_attend_args;

/* The first position that a row at `pos` sees. */
__device__ __forceinline__ int64_t moqk_first_seen(const moqk_attend_args &a, int64_t pos)
{
    if (a.chunk > 0) return pos / a.chunk * a.chunk;
    return a.window > 0 ? max((int64_t)0, pos - a.window + 1) : 0;
}

/* The queries of heads [head, head + count) of a row as the keys want them: scaled, rotated with them. q: [H][padded], the rest zero. */
__device__ void moqk_load_query(const moqk_attend_args &a, int64_t row, int32_t head, int32_t count, int32_t H, float *q)
{
    int32_t padded = a.c.k.padded, dim = a.c.k.dim;
    for (int32_t i = threadIdx.x; i < H * padded; i += blockDim.x) {
        int32_t h = i / padded, d = i % padded;
        q[i] = h < count && d < dim ? moqk_get_any(a.q, row * a.q_stride + (int64_t)(head + h) * dim + d, a.bf16) * a.scale : 0;
    }
    if (a.c.k.rotate) moqk_rotate_rows(q, H, padded, dim, 1 / sqrtf((float)dim));
    __syncthreads();
}

/* The block that is the last of its splits adds them all, in their order: y = sum e^(m_s - m) y_s / sum e^(m_s - m) l_s. weight: shared
   memory for count * splits floats. Every thread of the block comes here after its part of `partial` is written. */
__device__ void moqk_join_splits(const moqk_attend_args &a, int64_t row, int32_t head, int32_t count, float *weight)
{
    __shared__ int last;
    __shared__ float total[8];
    int32_t n = (a.c.v.dim + 3) / 4, *arrived = a.arrived + row * gridDim.y + blockIdx.y, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int64_t first = (row * a.heads + head) * a.splits;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(arrived, 1) == a.splits - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int32_t h = warp; h < count; h += blockDim.x >> 5) {
        const float2 *mine = a.stats + first + (int64_t)h * a.splits;
        float top = -3.4e38f, sum = 0;
        for (int32_t s = lane; s < a.splits; s += 32) top = fmaxf(top, __ldcg(mine + s).x);
        top = moqk_warp_max(top);
        for (int32_t s = lane; s < a.splits; s += 32) {
            float2 v = __ldcg(mine + s);
            float w = v.y != 0 ? expf(v.x - top) : 0; /* NaN goes through */
            weight[h * a.splits + s] = w;
            sum += w * v.y;
        }
        sum = moqk_warp_sum(sum);
        if (lane == 0) total[h] = sum;
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < count * n; i += blockDim.x) {
        int32_t h = i / n, d = i % n;
        const float4 *mine = (const float4 *)a.partial + (first + (int64_t)h * a.splits) * n + d;
        float v[4] = {0, 0, 0, 0}, one = total[h] != 0 ? 1 / total[h] : 0;
#pragma unroll 16
        for (int32_t s = 0; s < a.splits; s++) {
            float4 f = __ldcg(mine + (int64_t)s * n);
            float w = weight[h * a.splits + s];
            v[0] += w * f.x;
            v[1] += w * f.y;
            v[2] += w * f.z;
            v[3] += w * f.w;
        }
        for (int j = 0; j < 4; j++) {
            int32_t at = 4 * d + j;
            if (at < a.c.v.dim) moqk_put_any(a.y, row * a.y_stride + (int64_t)(head + h) * a.c.v.dim + at, v[j] * one, a.bf16);
        }
    }
    if (threadIdx.x == 0) *arrived = 0;
}

/* H query heads of one row over one split of the positions. Reads the split's keys and values once. KIND: F32, or any. Threads: for scores, teams of L lanes
   own 16 values of a key each; for values, a thread owns 4 of them for every (128 / lanes)-th key. Grid: splits, head groups, rows. */
template <int KIND, int H> __global__ void __launch_bounds__(128) moqk_attend(moqk_attend_args a)
{
    moqk_follow();
    extern __shared__ float4 room4[];
    __shared__ float max_of[H], sum_of[H], shrink[H];
    float *q = (float *)room4, *score = q + H * a.c.k.padded; /* score: [MOQK_KEYS][H] */
    int32_t tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, groups = (a.share + H - 1) / H;
    int32_t kv_head = blockIdx.y / groups, head = kv_head * a.share + blockIdx.y % groups * H, count = min(H, (kv_head + 1) * a.share - head);
    int64_t row = blockIdx.z, slot = a.slot[row], pos = a.pos[row];
    int held = slot >= 0 && slot < a.c.slots && pos >= 0 && pos < a.c.capacity;
    int64_t low = moqk_first_seen(a, pos), per = held ? moqk_pad(moqk_ceil(pos + 1 - low, a.splits), MOQK_KEYS) : 0;
    int64_t from = low + blockIdx.x * per, to = held ? min(from + per, pos + 1) : 0, base = (slot * a.c.kv_heads + kv_head) * a.c.capacity;
    float k_scale = a.c.k.scale[kv_head], v_scale = a.c.v.scale[kv_head];
    const float *k_bias = a.c.k.bias ? a.c.k.bias + (int64_t)kv_head * a.c.k.dim : NULL, *v_bias = a.c.v.bias ? a.c.v.bias + (int64_t)kv_head * a.c.v.dim : NULL;
    int32_t L = 1, v_lanes = a.c.v.padded / 4, teams = 128 / v_lanes, team = tid / v_lanes, dv = tid % v_lanes * 4;
    while (L * 16 < a.c.k.padded) L *= 2;
    int32_t dk = tid % L * 16, sub = tid / L, subs = 128 / L;
    float acc[H][4];
#pragma unroll
    for (int h = 0; h < H; h++) acc[h][0] = acc[h][1] = acc[h][2] = acc[h][3] = 0;
    moqk_load_query(a, row, head, count, H, q);
    if (tid < H) {
        int sink = a.sinks && held && blockIdx.x == 0 && tid < count;
        max_of[tid] = sink ? a.sinks[head + tid] : -3e38f;
        sum_of[tid] = sink ? 1.0f : 0.0f;
    }
    for (int64_t first = from; first < to; first += MOQK_KEYS) {
        int32_t n = (int32_t)min((int64_t)MOQK_KEYS, to - first);
        for (int32_t j = sub; j < MOQK_KEYS; j += 4 * subs) { /* four keys' loads under way */
            float k[4][16];
            moqk_kv_read_rows<KIND>(a.c.k, base + first, j, subs, dk < a.c.k.padded ? n : 0, dk, k_scale, k_bias, k);
            for (int h = 0; h < H; h++) {
                float s[4] = {0, 0, 0, 0};
                const float4 *q4 = (const float4 *)(q + h * a.c.k.padded + (dk < a.c.k.padded ? dk : 0));
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float4 f = q4[i];
#pragma unroll
                    for (int u = 0; u < 4; u++) s[u] += f.x * k[u][4 * i] + f.y * k[u][4 * i + 1] + f.z * k[u][4 * i + 2] + f.w * k[u][4 * i + 3];
                }
                for (int o = L / 2; o > 0; o >>= 1)
#pragma unroll
                    for (int u = 0; u < 4; u++) s[u] += __shfl_xor_sync(0xffffffffu, s[u], o);
                if (tid % L == 0)
#pragma unroll
                    for (int u = 0; u < 4; u++) if (j + u * subs < MOQK_KEYS) score[(j + u * subs) * H + h] = s[u];
            }
        }
        __syncthreads();
        for (int h = warp; h < H; h += 4) {
            float s[2], m = max_of[h], sum = 0;
#pragma unroll
            for (int u = 0; u < 2; u++) {
                int32_t j = lane + 32 * u;
                s[u] = j < n ? score[j * H + h] : -3.4e38f;
                if (a.softcap > 0 && j < n) s[u] = a.softcap * tanhf(s[u] / a.softcap);
            }
            float top = fmaxf(m, moqk_warp_max(fmaxf(s[0], s[1])));
#pragma unroll
            for (int u = 0; u < 2; u++) {
                int32_t j = lane + 32 * u;
                float p = j < n ? expf(s[u] - top) : 0;
                score[j * H + h] = p;
                sum += p;
            }
            sum = moqk_warp_sum(sum);
            __syncwarp(); /* every lane has read max_of */
            if (lane == 0) {
                shrink[h] = sum_of[h] > 0 ? expf(m - top) : 0;
                sum_of[h] = sum_of[h] * shrink[h] + sum;
                max_of[h] = top;
            }
        }
        __syncthreads();
#pragma unroll
        for (int h = 0; h < H; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[h][i] *= shrink[h];
        for (int32_t j = team; j < n && team < teams; j += 8 * teams) {
            float v[8][4];
            moqk_kv_read_rows<KIND>(a.c.v, base + first, j, teams, n, dv, v_scale, v_bias, v);
#pragma unroll
            for (int u = 0; u < 8; u++) {
                if (j + u * teams >= n) break;
#pragma unroll
                for (int h = 0; h < H; h++) {
                    float p = score[(j + u * teams) * H + h];
#pragma unroll
                    for (int i = 0; i < 4; i++) acc[h][i] += p * v[u][i];
                }
            }
        }
        __syncthreads();
    }
    float *sums = (float *)room4; /* [teams][H][v.padded]: the teams' sums, added in their order */
    __syncthreads();
    if (team < teams)
#pragma unroll
        for (int h = 0; h < H; h++) *(float4 *)&sums[(team * H + h) * a.c.v.padded + dv] = make_float4(acc[h][0], acc[h][1], acc[h][2], acc[h][3]);
    __syncthreads();
    for (int32_t i = tid; i < count * a.c.v.dim; i += 128) {
        int32_t h = i / a.c.v.dim, d = i % a.c.v.dim;
        float v = 0;
        for (int32_t t = 0; t < teams; t++) v += sums[(t * H + h) * a.c.v.padded + d];
        if (!a.partial) {
            moqk_put_any(a.y, row * a.y_stride + (int64_t)(head + h) * a.c.v.dim + d, sum_of[h] != 0 ? v / sum_of[h] : 0, a.bf16);
            continue;
        }
        int64_t at = (row * a.heads + head + h) * a.splits + blockIdx.x;
        a.partial[at * ((a.c.v.dim + 3) / 4 * 4) + d] = v;
        if (d == 0) a.stats[at] = make_float2(max_of[h], sum_of[h]);
    }
    if (a.partial) moqk_join_splits(a, row, head, count, sums);
}

/* A tile of rows of keys or values [first, first + MOQK_QUERIES) into shared memory as F32; zeros past `last`. */
__device__ __forceinline__ void moqk_load_tile(const moqk_kv &c, int64_t base, int64_t first, int64_t last, int32_t head, int32_t stride, float *to)
{
    int32_t chunks = c.padded / 16;
    const float *bias = c.bias ? c.bias + (int64_t)head * c.dim : NULL;
    const int32_t end = (int32_t)min(last + 1 - first, (int64_t)MOQK_QUERIES);
    float scale = c.scale[head], v[1][16];
    for (int32_t i = threadIdx.x; i < MOQK_QUERIES * chunks; i += blockDim.x) {
        int32_t j = i / chunks, d = i % chunks * 16;
        moqk_kv_read_rows<MOQK_KV_ANY>(c, base + first, j, 0, end, d, scale, bias, v);
#pragma unroll
        for (int k = 0; k < 4; k++) *(float4 *)&to[j * stride + d + 4 * k] = make_float4(v[0][4 * k], v[0][4 * k + 1], v[0][4 * k + 2], v[0][4 * k + 3]);
    }
}

/* Tiles of 32 queries (rows x heads of one kv head) against tiles of 32 positions: keys and values are decoded once for all of them.
   Rows of different slots in a tile are taken one slot after the other. A thread owns 4 queries x 2 keys of the scores, and 4 queries x 4 C
   values of the result: v.padded <= 64 C. Grid: query tiles, kv heads. */
template <int C> __global__ void __launch_bounds__(128) moqk_attend_tiles(moqk_attend_args a)
{
    extern __shared__ float4 room4[];
    __shared__ float shrink[MOQK_QUERIES], sum_of[MOQK_QUERIES];
    __shared__ int32_t q_from[MOQK_QUERIES], q_pos[MOQK_QUERIES], q_slot[MOQK_QUERIES];
    constexpr int N = MOQK_QUERIES, SS = N + 4;
    int32_t tid = threadIdx.x, dk = a.c.k.padded, dv = a.c.v.padded, stride = max(dk, dv) + 4;
    float *q = (float *)room4, *kv = q + N * stride, *score = kv + N * stride; /* score: [N][SS] */
    int32_t kv_head = blockIdx.y, qi = tid / 16 * 4, ki = tid % 16, mine = tid / 4; /* mine: this thread's query in the softmax */
    int64_t first_pair = (int64_t)blockIdx.x * N, pairs = (int64_t)a.rows * a.share;
    float acc[4][4 * C], max_of = -3e38f, sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4 * C; j++) acc[i][j] = 0;
    for (int32_t i = tid; i < N * dk; i += 128) {
        int64_t pair = first_pair + i / dk, row = pair / a.share, head = kv_head * a.share + pair % a.share;
        int32_t d = i % dk;
        q[i / dk * stride + d] = pair < pairs && d < a.c.k.dim ? moqk_get_any(a.q, row * a.q_stride + head * a.c.k.dim + d, a.bf16) * a.scale : 0;
    }
    if (tid < N) {
        int64_t pair = first_pair + tid, row = min(pair, pairs - 1) / a.share;
        int32_t slot = a.slot[row], pos = a.pos[row];
        int held = pair < pairs && slot >= 0 && slot < a.c.slots && pos >= 0 && pos < a.c.capacity;
        q_slot[tid] = held ? slot : -1;
        q_pos[tid] = pos;
        q_from[tid] = (int32_t)moqk_first_seen(a, pos);
    }
    if (a.c.k.rotate) moqk_rotate_rows(q, N, stride, a.c.k.dim, 1 / sqrtf((float)a.c.k.dim));
    __syncthreads();
    if (a.sinks && q_slot[mine] >= 0) {
        max_of = a.sinks[kv_head * a.share + (first_pair + mine) % a.share];
        sum = 1;
    }
    for (int32_t begin = 0, end; begin < N; begin = end) { /* a run of queries of one slot */
        int32_t slot = q_slot[begin], low = INT32_MAX, high = -1;
        for (end = begin; end < N && q_slot[end] == slot; end++) { low = min(low, q_from[end]); high = max(high, q_pos[end]); }
        if (slot < 0) continue;
        int64_t base = ((int64_t)slot * a.c.kv_heads + kv_head) * a.c.capacity;
        for (int32_t first = low / N * N; first <= high; first += N) {
            __syncthreads();
            moqk_load_tile(a.c.k, base, first, high, kv_head, stride, kv);
            __syncthreads();
            float s[4][2] = {{0, 0}, {0, 0}, {0, 0}, {0, 0}};
            for (int32_t d = 0; d < dk; d += 4) {
                float4 k0 = *(const float4 *)&kv[ki * stride + d], k1 = *(const float4 *)&kv[(ki + 16) * stride + d];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float4 f = *(const float4 *)&q[(qi + i) * stride + d];
                    s[i][0] += f.x * k0.x + f.y * k0.y + f.z * k0.z + f.w * k0.w;
                    s[i][1] += f.x * k1.x + f.y * k1.y + f.z * k1.z + f.w * k1.w;
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                score[(qi + i) * SS + ki] = s[i][0];
                score[(qi + i) * SS + ki + 16] = s[i][1];
            }
            __syncthreads();
            float p[8], top = max_of, more = 0;
            int inside = mine >= begin && mine < end;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                int32_t key = first + tid % 4 * 8 + j;
                p[j] = score[mine * SS + tid % 4 * 8 + j];
                if (a.softcap > 0) p[j] = a.softcap * tanhf(p[j] / a.softcap);
                if (!inside || key < q_from[mine] || key > q_pos[mine]) p[j] = -3.4e38f;
                top = fmaxf(top, p[j]);
            }
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
#pragma unroll
            for (int j = 0; j < 8; j++) {
                p[j] = p[j] <= -3.3e38f ? 0 : expf(p[j] - top);
                score[mine * SS + tid % 4 * 8 + j] = p[j];
                more += p[j];
            }
            more += __shfl_xor_sync(0xffffffffu, more, 1);
            more += __shfl_xor_sync(0xffffffffu, more, 2);
            float factor = sum != 0 ? expf(max_of - top) : 0;
            sum = sum * factor + more;
            max_of = top;
            if (tid % 4 == 0) shrink[mine] = factor;
            moqk_load_tile(a.c.v, base, first, high, kv_head, stride, kv);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4 * C; j++) acc[i][j] *= shrink[qi + i];
            for (int32_t j = 0; j < N; j += 4) {
                float w[4][4];
#pragma unroll
                for (int i = 0; i < 4; i++) { float4 f = *(const float4 *)&score[(qi + i) * SS + j]; w[i][0] = f.x; w[i][1] = f.y; w[i][2] = f.z; w[i][3] = f.w; }
#pragma unroll
                for (int u = 0; u < 4; u++)
#pragma unroll
                    for (int c = 0; c < C; c++) {
                        if (ki * 4 + 64 * c >= dv) continue;
                        float4 v = *(const float4 *)&kv[(j + u) * stride + ki * 4 + 64 * c];
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            acc[i][4 * c] += w[i][u] * v.x;
                            acc[i][4 * c + 1] += w[i][u] * v.y;
                            acc[i][4 * c + 2] += w[i][u] * v.z;
                            acc[i][4 * c + 3] += w[i][u] * v.w;
                        }
                    }
            }
        }
    }
    if (tid % 4 == 0) sum_of[mine] = sum;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int64_t pair = first_pair + qi + i, row = pair / a.share, head = kv_head * a.share + pair % a.share;
        if (pair >= pairs) continue;
#pragma unroll
        for (int j = 0; j < 4 * C; j++) {
            int32_t d = ki * 4 + 64 * (j / 4) + j % 4;
            if (d < a.c.v.dim) moqk_put_any(a.y, row * a.y_stride + head * a.c.v.dim + d, sum_of[qi + i] != 0 ? acc[i][j] / sum_of[qi + i] : 0, a.bf16);
        }
    }
}


/* ------------------------------------------------------------------------------------------------
   >>cuda-attention-mma  steps of caches as operands of tensor cores
   A number of a query goes in as hi = f16(x) and lo = f16(x - hi), 22 bits of it, so only the products with the cache's own codes count, and
   those are exact in 16 bits. Codes become operands in registers.
   ------------------------------------------------------------------------------------------------ */

__host__ __device__ static constexpr int moqk_kv_bits(int kind) { return kind == MOQK_KV_BF16 ? 16 : kind <= MOQK_KV_I8 ? 8 : 4; }

template <int BF16> __device__ __forceinline__ uint32_t moqk_pack16(float a, float b)
{
    if constexpr (BF16) { __nv_bfloat162 v = __floats2bfloat162_rn(a, b); return *(uint32_t *)&v; }
    else { __half2 v = __floats2half2_rn(a, b); return *(uint32_t *)&v; }
}

template <int BF16> __device__ __forceinline__ float2 moqk_unpack16(uint32_t v)
{
    if constexpr (BF16) return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
    else return __half22float2(*(const __half2 *)&v);
}

/* hi and lo parts of two numbers. */
template <int BF16> __device__ __forceinline__ void moqk_split16(float a, float b, uint32_t *hi, uint32_t *lo)
{
    *hi = moqk_pack16<BF16>(a, b);
    float2 f = moqk_unpack16<BF16>(*hi);
    *lo = moqk_pack16<BF16>(a - f.x, b - f.y);
}

/* c += a b: a 16 x 16, b 16 x 8. */
template <int BF16> __device__ __forceinline__ void moqk_attend_mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    if constexpr (BF16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* One word of codes as 16-bit pairs: 16 bits 1 pair, 8 bits 2 (bytes 0 1, 2 3), 4 bits 4 (nibbles j, j + 4). scale: the block's, 4 bits only. */
template <int KIND> __device__ __forceinline__ void moqk_kv_operands(uint32_t w, uint32_t scale, uint32_t *out)
{
    if constexpr (KIND == MOQK_KV_BF16) out[0] = w;
    else if constexpr (KIND == MOQK_KV_E4M3) {
#if __CUDA_ARCH__ >= 890
        asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b; }" : "=r"(out[0]), "=r"(out[1]) : "r"(w));
#else
        const __half2 fix = __float2half2_rn(256.0f);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t at = __byte_perm(w, 0, i ? 0x3424 : 0x1404), h = (at & 0x80008000u) | (at >> 1 & 0x3f803f80u);
            __half2 v = __hmul2(*(const __half2 *)&h, fix);
            out[i] = *(uint32_t *)&v;
        }
#endif
    } else if constexpr (KIND == MOQK_KV_I8) { /* 1024 + n is a half */
        const __half2 move = __float2half2_rn(1152.0f);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t h = __byte_perm(w ^ 0x80808080u, 0x64646464u, i ? 0x4342 : 0x4140);
            __half2 v = __hsub2(*(const __half2 *)&h, move);
            out[i] = *(uint32_t *)&v;
        }
    } else if constexpr (KIND == MOQK_KV_NV4) { /* bits in place are value * 2^-14; the scale comes with 2^5: value * scale * 2^-9, exact */
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t at = w << (12 - 4 * j), h = (at & 0x80008000u) | (at >> 3 & 0x0e000e00u);
            __half2 v = __hmul2(*(const __half2 *)&h, *(const __half2 *)&scale);
            out[j] = *(uint32_t *)&v;
        }
    } else { /* bits in place are value * 2^-126 */
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t at = w << (12 - 4 * j), h = (at & 0x80008000u) | (at >> 6 & 0x01c001c0u), big = 0x7e807e80u; /* 2^126 */
            __nv_bfloat162 v = __hmul2(__hmul2(*(const __nv_bfloat162 *)&h, *(const __nv_bfloat162 *)&big), *(const __nv_bfloat162 *)&scale);
            out[j] = *(uint32_t *)&v;
        }
    }
}

/* A block scale as the pair that moqk_kv_operands multiplies with. */
template <int KIND> __device__ __forceinline__ uint32_t moqk_kv_pair(uint32_t code)
{
    if constexpr (KIND == MOQK_KV_NV4) {
#if __CUDA_ARCH__ >= 890
        uint32_t h;
        asm("{ .reg .b16 a; cvt.u16.u32 a, %1; cvt.rn.f16x2.e4m3x2 %0, a; }" : "=r"(h) : "r"(code * 257));
        const __half2 v = __hmul2(*(const __half2 *)&h, __float2half2_rn(32.0f));
#else
        const __half2 v = __float2half2_rn(moqk_e4m3(code) * 32);
#endif
        return *(const uint32_t *)&v;
    }
    else if constexpr (KIND == MOQK_KV_MX4) { uint32_t v = __float_as_uint(moqk_e8m0(code)) >> 16; return v | v << 16; }
    else return 0;
}

template <int BYTES> __device__ __forceinline__ void moqk_kv_load(const uint8_t *p, uint32_t *w)
{
    if constexpr (BYTES == 4) w[0] = __ldg((const unsigned *)p);
    else if constexpr (BYTES == 8) { uint2 v = __ldg((const uint2 *)p); w[0] = v.x; w[1] = v.y; }
    else {
#pragma unroll
        for (int i = 0; i < BYTES / 16; i++) { uint4 v = __ldg((const uint4 *)p + i); w[4 * i] = v.x; w[4 * i + 1] = v.y; w[4 * i + 2] = v.z; w[4 * i + 3] = v.w; }
    }
}

/* Rows of shared memory are a little longer than a head, so that the heads lie in different banks. */
__host__ __device__ static constexpr int moqk_tensor_row(int dim) { return dim + 8; }

/* Positions of a step of a warp; blocks of a cluster at most; splits whose sums a thread reads at once. */
enum { MOQK_STREAM_KEYS = 16, MOQK_STREAM_SPLITS = 8, MOQK_STREAM_AT_ONCE = 8 };

/* Warps of a block: 4-bit codes take more instructions a byte, which more warps hide. */
__host__ __device__ static constexpr int moqk_stream_warps(int kind, int dim) { return moqk_kv_bits(kind) == 4 && dim <= 128 ? 16 : 8; }

/* Registers of a thread. With 164 and somewhat more shared memory blocks began 1.2 us later: those of >>cuda-runs must find room beside them. */
#if CUDART_VERSION >= 12040
#define MOQK_STREAM_BOUNDS(KIND, DIM) __maxnreg__(moqk_stream_warps(KIND, DIM) == 16 ? 128 : 160)
#else
#define MOQK_STREAM_BOUNDS(KIND, DIM) __launch_bounds__(moqk_stream_warps(KIND, DIM) * 32, 1)
#endif

/* Bytes of a position's codes; of its block scales, and of those of a step; of a step: codes of keys, of values, scales of keys, of values. */
__host__ __device__ static constexpr int moqk_stream_row(int kind, int dim) { return dim * moqk_kv_bits(kind) / 8; }
__host__ __device__ static constexpr int moqk_stream_blocks(int kind, int dim) { return kind == MOQK_KV_NV4 ? dim / 16 : kind == MOQK_KV_MX4 ? dim / 32 : 0; }
__host__ __device__ static constexpr int moqk_stream_scales(int kind, int dim)
{
    return moqk_stream_blocks(kind, dim) == 2 ? 64 : MOQK_STREAM_KEYS * moqk_stream_blocks(kind, dim);
}
__host__ __device__ static constexpr int moqk_stream_step(int kind, int dim)
{
    return MOQK_STREAM_KEYS * 2 * moqk_stream_row(kind, dim) + 2 * moqk_stream_scales(kind, dim);
}

/* Steps of a warp's ring at most: with twice as many on their way 32,768 positions took 5 % longer, also where steps are short. */
__host__ __device__ static constexpr int moqk_stream_stages(int kind, int dim) { return moqk_stream_row(kind, dim) >= 256 ? 2 : 3; }

/* Floats of a head's sums as warps leave them in shared memory: stores of 16 bytes meet different banks for 128 values. */
__host__ __device__ static constexpr int moqk_stream_sums(int dim) { return dim + 4; }

/* Shared memory behind the rings: queries that enter or are scaled [8][DIM + 8], key and value that enter [2][DIM], operands [DIM / 16][32] uint4. */
__host__ __device__ static constexpr int moqk_stream_heads(int dim) { return 8 * moqk_tensor_row(dim) * 4; }
__host__ __device__ static constexpr int moqk_stream_room(int dim) { return moqk_stream_heads(dim) + 2 * dim * 4 + dim * 32; }

/* 16 bytes of a row stand where no two of the lanes that read at once want the same banks: piece ^ twist(row). Bit by bit linear in the row. */
__host__ __device__ static constexpr uint32_t moqk_stream_twist(int row_bytes, int row)
{
    return (uint32_t)(row_bytes == 32 ? row >> 2 & 1 : row_bytes == 64 ? row >> 1 & 3 : (row & 1) << 2 | (row >> 1 & 3));
}

template <int ROW> __device__ __forceinline__ uint32_t moqk_stream_at(int row, int piece)
{
    return (uint32_t)(row * ROW) + (((uint32_t)piece ^ moqk_stream_twist(ROW, row)) << 4);
}

#define MOQK_LOG2E 1.44269504f

__device__ __forceinline__ float moqk_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* The lane's share of the codes of a step on its way; rows past the last one become zeros. put: its first piece in shared memory; k, v: in the caches,
   whose rows have `pitch` bytes. */
template <int ROW> __device__ __forceinline__ void moqk_stream_ask(uint32_t put, const uint8_t *k, const uint8_t *v, int32_t pitch, int32_t rows, int lane)
{
    constexpr int EACH = 512 / ROW; /* rows that the warp copies at once */
    const int32_t left = rows - lane / (ROW / 16);
#pragma unroll
    for (int j = 0; j < ROW / 32; j++) {
        const uint32_t to = (put ^ moqk_stream_twist(ROW, j * EACH) << 4) + j * 512, to_v = to + MOQK_STREAM_KEYS * ROW;
        const int32_t bytes = left > j * EACH ? 16 : 0;
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" :: "r"(to), "l"(k + j * EACH * pitch), "r"(bytes) : "memory");
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" :: "r"(to_v), "l"(v + j * EACH * pitch), "r"(bytes) : "memory");
    }
}

/* Are heads more than four? Then column g of a product is head g, first of all first terms, then of all second ones; else columns 2 h and 2 h + 1 are the
   terms of head h. So a lane, whose columns are 2 t and 2 t + 1, has heads 2 t and 2 t + 1, or head t twice. */
__device__ __forceinline__ int32_t moqk_stream_head(int many, int t, int i) { return many ? 2 * t + i : t; }

/* Queries as the other operands of keys, of all heads or in registers: those of a lane are 32 apart in `ops` [DIM / 16][32]. */
template <int DIM> struct moqk_stream_query {
    static constexpr int HELD = DIM <= 128;
    uint4 q[HELD ? DIM / 16 : 1];
    const uint4 *ops;

    __device__ __forceinline__ void begin(const uint4 *all, int lane)
    {
        ops = all + lane;
        if constexpr (HELD)
#pragma unroll
            for (int s = 0; s < DIM / 16; s++) q[s] = ops[s * 32];
    }
    __device__ __forceinline__ uint4 step(int s) const { return HELD ? q[HELD ? s : 0] : ops[s * 32]; }
};

/* Where pair p of a head's values stands in the order in which codes of keys become operands: dimensions `first` and `second` are numbers 2 i and 2 i + 1 of
   lane t in step s. A lane owns DIM / 4 neighbouring values of a key in pieces of at most 16 bytes; with MXFP4 a word of each of its blocks. */
typedef struct moqk_stream_pair { int first, second, s, t, i; } moqk_stream_pair;

template <int KIND, int DIM> __device__ __forceinline__ moqk_stream_pair moqk_stream_pair_of(int p)
{
    constexpr int BITS = moqk_kv_bits(KIND), MOST = KIND == MOQK_KV_MX4 ? 4 : 16, PIECE = DIM * BITS / 32 < MOST ? DIM * BITS / 32 : MOST;
    constexpr int PER = PIECE * 8 / BITS, STEPS = PER / 4;
    const int first = BITS == 4 ? p / 4 * 8 + p % 4 : 2 * p, in = first % PER;
    return {first, first + (BITS == 4 ? 4 : 1), first / (4 * PER) * STEPS + (BITS == 4 ? in / 8 * 2 + in % 4 / 2 : in / 4), first / PER % 4,
            BITS == 4 ? in % 2 : in / 2 % 2};
}

/* Heads that are not there have no weight in the operands, ops [DIM / 16][32]; a bias where keys have none, or there is no head. */
template <int DIM> __device__ __forceinline__ void moqk_stream_clear(int32_t count, int many, int biased, float *bias, uint4 *ops)
{
    for (int i = threadIdx.x; i < DIM * 2; i += blockDim.x)
        if ((i & 31) / (many ? 4 : 8) >= count) ops[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x < 8 && !(biased && threadIdx.x < count)) bias[threadIdx.x] = 0;
}

/* The queries of a block as operands, each made by the warp that has put it into `queries` [8][R], not yet times `unit`. */
template <int KIND, int DIM>
__device__ __forceinline__ void moqk_stream_queries(const moqk_kv &keys, int32_t dim, const float *k_bias, float unit, float *queries, int32_t count, int many,
                                                    float *bias, uint4 *ops)
{
    constexpr int BF = KIND == MOQK_KV_BF16, R = moqk_tensor_row(DIM);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (KIND == MOQK_KV_NV4 && keys.rotate) moqk_rotate_rows(queries, count, R, DIM, 1 / sqrtf((float)DIM));
    for (int h = warp; h < count; h += blockDim.x >> 5) {
        const float *x = queries + h * R;
        uint32_t *to = (uint32_t *)(void *)ops + (many ? 4 * h : 8 * h) * 4;
#pragma unroll
        for (int k = 0; k < DIM / 64; k++) {
            const moqk_stream_pair p = moqk_stream_pair_of<KIND, DIM>(lane + 32 * k);
            const float a = p.first < dim ? x[p.first] : 0, b = p.second < dim ? x[p.second] : 0;
            const int at = (p.s * 32 + p.t) * 4 + p.i;
            uint32_t hi, lo;
            moqk_split16<BF>(__fmul_rn(a, unit), __fmul_rn(b, unit), &hi, &lo);
            to[at] = hi;
            to[at + (many ? 2 : 16)] = lo;
        }
        if (!k_bias) continue;
        float sum = 0;
        for (int d = lane; d < dim; d += 32) sum += __fmul_rn(x[d], unit) * k_bias[d];
        sum = moqk_warp_sum(sum);
        if (lane == 0) bias[h] = sum;
    }
    __syncthreads();
}

/* c[0] += keys times queries, or times their first terms; then c[1] their second ones. */
template <int BF> __device__ __forceinline__ void moqk_stream_multiply(float c[2][4], const uint32_t a[4], const uint4 &q, int many)
{
    moqk_attend_mma<BF>(c[0], a, q.x, q.y);
    if (many) moqk_attend_mma<BF>(c[1], a, q.z, q.w);
}

/* s[i][n] of moqk_stream_head i and key 8 n + g, from the lane's sums of keys g and 8 + g. */
__device__ __forceinline__ void moqk_stream_columns(const float c[4], int many, float s[2][2])
{
#pragma unroll
    for (int n = 0; n < 2; n++) {
        s[0][n] = many ? c[2 * n] : c[2 * n] + c[2 * n + 1];
        s[1][n] = many ? c[2 * n + 1] : s[0][n];
    }
}

/* The two block scales behind `at` that a lane multiplies its 32 values of a key with (64 values a head: one), as pairs. */
template <int DIM> __device__ __forceinline__ void moqk_stream_pairs(uint32_t at, uint32_t pairs[2])
{
    uint32_t v;
    if constexpr (DIM == 64) asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(at));
    else asm volatile("ld.shared.u16 %0, [%1];" : "=r"(v) : "r"(at));
    moqk_kv_operands<MOQK_KV_E4M3>(__byte_perm(v, 0, DIM == 64 ? 0x4400 : 0x1100), 0, pairs);
}

/* One word of 4-bit codes as pairs of nibbles j, j + 4: bits in place are values * 2^-14 in F16, whose upper bytes hold them all, 2^-126 in BF16, where
   a product moves the sign and the other three bits apart. */
template <int BF> __device__ __forceinline__ void moqk_stream_nibbles(uint32_t w, uint32_t out[4])
{
    if constexpr (BF) {
        const uint32_t high = w >> 8;
        out[0] = (w & 0x000f000fu) * 0x1040u & 0x81c081c0u;
        out[1] = (w & 0x00f000f0u) * 0x0104u & 0x81c081c0u;
        out[2] = (high & 0x000f000fu) * 0x1040u & 0x81c081c0u;
        out[3] = (high & 0x00f000f0u) * 0x0104u & 0x81c081c0u;
    } else {
        const uint32_t even = (w << 4 & 0x80808080u) | (w << 1 & 0x0e0e0e0eu), odd = (w & 0x80808080u) | (w >> 3 & 0x0e0e0e0eu);
        out[0] = __byte_perm(even, 0, 0x2404);
        out[1] = __byte_perm(odd, 0, 0x2404);
        out[2] = even & 0xff00ff00u;
        out[3] = odd & 0xff00ff00u;
    }
}

__device__ __forceinline__ uint32_t moqk_times_pair(uint32_t a, uint32_t b)
{
    const __half2 v = __hmul2(*(const __half2 *)&a, *(const __half2 *)&b);
    return *(const uint32_t *)&v;
}

/* s[i][n] = q k of moqk_stream_head i and key 8 n + g: keys are the rows of the products, in units of moqk_stream_unit. step: codes of keys; scales: theirs. */
template <int KIND, int DIM>
__device__ __forceinline__ void moqk_stream_scores(uint32_t step, uint32_t scales, const moqk_stream_query<DIM> &q, int many, int lane, float s[2][2])
{
    constexpr int ROW = moqk_stream_row(KIND, DIM), BF = KIND == MOQK_KV_BF16, BLOCKS = moqk_stream_blocks(KIND, DIM);
    /* Words of a piece, pairs of a word, steps that a piece of four lanes makes. */
    constexpr int WORDS = ROW < 64 ? 2 : 4, PAIRS = 32 / moqk_kv_bits(KIND) / 2, STEPS = WORDS * PAIRS / 2;
    const int g = lane >> 2, t = lane & 3;
    const uint32_t first = ROW < 64 ? moqk_stream_at<ROW>(g, t >> 1) + (t & 1) * 8 : moqk_stream_at<ROW>(g, t);
    float c[2][2][4] = {{{0, 0, 0, 0}, {0, 0, 0, 0}}, {{0, 0, 0, 0}, {0, 0, 0, 0}}}; /* of steps in turn */
#pragma unroll
    for (int j = 0; j < (ROW < 64 ? 1 : ROW / 64); j++) {
        uint32_t k[2][WORDS * PAIRS]; /* of keys g and 8 + g */
#pragma unroll
        for (int n = 0; n < 2; n++) {
            uint32_t w[4], pairs[2];
            if constexpr (ROW < 64) { const uint2 v = moqk_shared8(step + n * 8 * ROW + first); w[0] = v.x; w[1] = v.y; }
            else { const uint4 v = moqk_shared16(step + n * 8 * ROW + (first ^ j << 6)); w[0] = v.x; w[1] = v.y; w[2] = v.z; w[3] = v.w; }
            if constexpr (KIND == MOQK_KV_NV4) moqk_stream_pairs<DIM>(scales + (8 * n + g) * BLOCKS + (DIM == 64 ? t : 8 * j + 2 * t), pairs);
#pragma unroll
            for (int i = 0; i < WORDS; i++) {
                if constexpr (KIND == MOQK_KV_NV4) {
                    moqk_stream_nibbles<0>(w[i], k[n] + i * PAIRS);
#pragma unroll
                    for (int p = 0; p < PAIRS; p++) k[n][i * PAIRS + p] = moqk_times_pair(k[n][i * PAIRS + p], pairs[i >> 1]);
                } else moqk_kv_operands<KIND>(w[i], 0, k[n] + i * PAIRS);
            }
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const uint32_t a[4] = {k[0][2 * i], k[1][2 * i], k[0][2 * i + 1], k[1][2 * i + 1]};
            moqk_stream_multiply<BF>(c[i & 1], a, q.step(j * STEPS + i), many);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) c[0][0][i] += c[1][0][i] + (c[0][1][i] + c[1][1][i]);
    moqk_stream_columns(c[0][0], many, s);
}

/* Four matrices of a step whose rows are positions and whose columns are 16 bytes: positions below 8, the others, the same of the next 16 bytes. */
template <int ROW> __device__ __forceinline__ uint32_t moqk_stream_matrices(int lane) { return moqk_stream_at<ROW>(lane & 15, lane >> 4); }

__device__ __forceinline__ void moqk_turned_matrices(uint32_t at, uint32_t (&r)[4])
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

/* The BLOCKS <= 8 scales of one position. */
template <int BLOCKS> __device__ __forceinline__ void moqk_stream_bytes(uint32_t at, uint32_t v[2])
{
    v[1] = 0;
    if constexpr (BLOCKS == 2) asm volatile("ld.shared.u16 %0, [%1];" : "=r"(v[0]) : "r"(at));
    else if constexpr (BLOCKS == 4) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v[0]) : "r"(at));
    else { const uint2 w = moqk_shared8(at); v[0] = w.x; v[1] = w.y; }
}

/* The same of MXFP4, whose scales may be any power of two: they multiply the sums of a block. */
template <int DIM>
__device__ __forceinline__ void moqk_stream_scores_mx(uint32_t step, uint32_t scales, const moqk_stream_query<DIM> &q, int many, int lane, float s[2][2])
{
    constexpr int ROW = moqk_stream_row(MOQK_KV_MX4, DIM), BLOCKS = DIM / 32;
    const uint32_t first = moqk_stream_matrices<ROW>(lane);
    float sum[4] = {0, 0, 0, 0};
    uint32_t scale[2][2];
#pragma unroll
    for (int n = 0; n < 2; n++) moqk_stream_bytes<BLOCKS>(scales + (8 * n + (lane >> 2)) * BLOCKS, scale[n]);
#pragma unroll
    for (int b = 0; b < BLOCKS; b += 2) {
        uint32_t w[4];
        moqk_load_matrices(step + (first ^ b << 4), w);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            uint32_t k[2][4];
            float part[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
#pragma unroll
            for (int n = 0; n < 2; n++) moqk_stream_nibbles<0>(w[2 * c + n], k[n]);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t a[4] = {k[0][2 * i], k[1][2 * i], k[0][2 * i + 1], k[1][2 * i + 1]};
                moqk_stream_multiply<0>(part, a, q.step((b + c) * 2 + i), many);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t code = scale[i >> 1][(b + c) >> 2] >> ((b + c) % 4 * 8) & 255;
                sum[i] += (part[0][i] + part[1][i]) * __uint_as_float(code << 23); /* 2^-127 is nothing beside any other */
            }
        }
    }
    moqk_stream_columns(sum, many, s);
}

__device__ __forceinline__ uint32_t moqk_turn(uint32_t v)
{
    uint32_t w;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(w) : "r"(v));
    return w;
}

/* The lane's weights e[i][n] of moqk_stream_head i and key 8 n + g as the other operands of values: of keys 2 t and 2 t + 1, 8 + 2 t and 9 + 2 t. */
template <int BF> __device__ __forceinline__ void moqk_stream_weights(const float e[2][2], int many, uint32_t p[2][2])
{
    uint32_t hi, lo;
    if (many) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            moqk_split16<BF>(e[0][n], e[1][n], &hi, &lo);
            p[0][n] = moqk_turn(hi);
            p[1][n] = moqk_turn(lo);
        }
        return;
    }
    moqk_split16<BF>(e[0][0], e[0][1], &hi, &lo);
    p[0][0] = moqk_turn(__byte_perm(hi, lo, 0x5410));
    p[0][1] = moqk_turn(__byte_perm(hi, lo, 0x7632));
}

/* out[i] += v p: rows g and 8 + g of product i are dimensions g * DIM / 8 + 2 i and the next one, its columns as in moqk_stream_head. Half of the lanes
   read their positions in the other order, for the banks' sake, which the selectors of their bytes undo. */
template <int KIND, int DIM>
__device__ __forceinline__ void moqk_stream_values(uint32_t values, const uint32_t p[2][2], int many, int lane, float (*out)[4])
{
    constexpr int ROW = moqk_stream_row(KIND, DIM), BF = KIND == MOQK_KV_BF16, LOADS = ROW / 128 > 1 ? ROW / 128 : 1, WORDS = ROW == 64 ? 2 : 4;
    const int g = lane >> 2, t = lane & 3, other = ROW == 64 ? g >> 1 & 1 : g & 1, piece = ROW == 64 ? g >> 1 : g * LOADS;
    const uint32_t first = moqk_stream_at<ROW>(2 * t + other, piece), second = moqk_stream_at<ROW>(2 * t + 1 - other, piece);
    const uint32_t low = BF ? (other ? 0x1054u : 0x5410u) : (other ? 0x1504u : 0x5140u);
    const uint32_t high = BF ? (other ? 0x3276u : 0x7632u) : (other ? 0x3726u : 0x7362u);
#pragma unroll
    for (int c = 0; c < LOADS; c++) {
        uint32_t v[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t row = (uint32_t)((i & 2) * 4 * ROW) + (i & 1 ? second : first);
            if constexpr (ROW == 64) {
                const uint2 w = moqk_shared8(values + row + (uint32_t)(g & 1) * 8);
                v[i][0] = w.x; v[i][1] = w.y;
            } else {
                const uint4 w = moqk_shared16(values + (row ^ c << 4));
                v[i][0] = w.x; v[i][1] = w.y; v[i][2] = w.z; v[i][3] = w.w;
            }
        }
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            uint32_t x[2][2], y[2][2]; /* pairs of neighbouring positions: of dimensions in turn */
#pragma unroll
            for (int j = 0; j < 2; j++) {
                moqk_kv_operands<KIND>(__byte_perm(v[0][w], v[1][w], j ? high : low), 0, x[j]);
                moqk_kv_operands<KIND>(__byte_perm(v[2][w], v[3][w], j ? high : low), 0, y[j]);
            }
#pragma unroll
            for (int j = 0; j < (BF ? 1 : 2); j++) {
                const uint32_t a[4] = {x[j][0], BF ? x[1][0] : x[j][1], y[j][0], BF ? y[1][0] : y[j][1]};
                const int i = BF ? c * 4 + w : c * 8 + 2 * w + j;
                moqk_attend_mma<BF>(out[i], a, p[0][0], p[0][1]);
                if (many) moqk_attend_mma<BF>(out[i], a, p[1][0], p[1][1]);
            }
        }
    }
}

/* The same of 4-bit codes: product 2 c + u has dimensions 32 c + 4 g + 2 u and the next one. Scales of NVFP4 multiply codes. Those of MXFP4, one for all
   rows of a product, multiply the weights, which come times 2^64: codes are 2^-126 of what they stand for. */
template <int KIND, int DIM>
__device__ __forceinline__ void moqk_stream_values4(uint32_t values, uint32_t scales, const uint32_t p[2][2], int many, int lane, float (*out)[4])
{
    constexpr int ROW = moqk_stream_row(KIND, DIM), MX = KIND == MOQK_KV_MX4, BLOCKS = moqk_stream_blocks(KIND, DIM), AT_ONCE = BLOCKS < 8 ? BLOCKS : 8;
    const int t = lane & 3, half = lane >> 4; /* of the 32 values of 16 bytes: the block of NVFP4 */
    const uint32_t first = moqk_stream_matrices<ROW>(lane);
    uint32_t scale[4][2]; /* of positions 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t */
#pragma unroll
    for (int c = 0; c < DIM / 32; c += 2) {
        const int at = MX ? c : 2 * c; /* the first block */
        if (at % AT_ONCE == 0)
#pragma unroll
            for (int i = 0; i < 4; i++) moqk_stream_bytes<AT_ONCE>(scales + (uint32_t)(2 * t + (i & 1) + (i & 2) * 4) * BLOCKS + at, scale[i]);
        uint32_t w[4], by[2][2]; /* by: pairs of positions; of both halves of them, of 16 bytes in turn */
        moqk_turned_matrices(values + (first ^ c << 4), w);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int word = at % AT_ONCE >> 2;
            if constexpr (MX) {
                const uint32_t both = __byte_perm(scale[2 * n][word], scale[2 * n + 1][word], at % 4 ? 0x7362 : 0x5140);
                by[n][0] = __byte_perm(both, 0, 0x4140) << 7;
                by[n][1] = __byte_perm(both, 0, 0x4342) << 7;
            } else moqk_kv_operands<MOQK_KV_E4M3>(__byte_perm(scale[2 * n][word], scale[2 * n + 1][word], half ? 0x7351 : 0x6240), 0, by[n]);
        }
#pragma unroll
        for (int k = 0; k < 2; k++) {
            uint32_t v[2][4], x[2][2];
#pragma unroll
            for (int n = 0; n < 2; n++) {
                moqk_stream_nibbles<MX>(w[2 * k + n], v[n]);
#pragma unroll
                for (int i = 0; i < 4 && !MX; i++) v[n][i] = moqk_times_pair(v[n][i], by[n][k]);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if constexpr (MX) {
                        const __nv_bfloat162 m = __hmul2(*(const __nv_bfloat162 *)&p[i][n], *(const __nv_bfloat162 *)&by[n][k]);
                        x[i][n] = *(const uint32_t *)&m;
                    } else x[i][n] = p[i][n];
                }
            }
#pragma unroll
            for (int u = 0; u < 2; u++) {
                const uint32_t a[4] = {v[0][2 * u], v[0][2 * u + 1], v[1][2 * u], v[1][2 * u + 1]};
                moqk_attend_mma<MX>(out[2 * (c + k) + u], a, x[0][0], x[0][1]);
                if (many) moqk_attend_mma<MX>(out[2 * (c + k) + u], a, x[1][0], x[1][1]);
            }
        }
    }
}

/* What one of a product's sums stands for: of scores, of values. */
template <int KIND> __device__ __forceinline__ void moqk_stream_units(const moqk_cache &c, int32_t kv_head, float *k, float *v)
{
    *k = *v = 1;
    if (KIND == MOQK_KV_E4M3 || KIND == MOQK_KV_I8 || KIND == MOQK_KV_NV4) { *k = c.k.scale[kv_head]; *v = c.v.scale[kv_head]; } /* never change */
    if (KIND == MOQK_KV_NV4) { *k *= 16384.0f / 6; *v *= 16384.0f / 6; }
    if (KIND == MOQK_KV_MX4) { *k = 16384; *v = 4611686018427387904.0f; } /* 2^62 */
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-attention-stream  attention of few queries on tensor cores: caches stream through shared memory
   Every warp has its next positions on their way and waits for no other warp until its sums meet theirs. Splits of a row that are no cluster give each
   other their sums through memory, where a word is its own signal; they must run at the same time: such a launch is cooperative.
   A step of one row is a chain of latencies in which a warp needs about five cycles an instruction: what can be made before the kernel before has ended
   stands before the wait, loads stand before what waits for them, and nothing branches between loads.
   ------------------------------------------------------------------------------------------------ */

/* A head that enters: where it is, the weight of its norm or NULL. */
typedef struct moqk_enter_task {
    const void *from;
    const float *weight;
    int32_t kind, half;        /* 0 query, 1 key, 2 value; pairs that turn */
} moqk_enter_task;

/* Of the tasks of a block: `count` queries from `head` on and, where heads enter, a key, a value. All else that `enter` says is zero where none do. */
__device__ __forceinline__ moqk_enter_task moqk_enter_find(const moqk_attend_args &a, int32_t dim, int64_t row, int32_t kv_head, int32_t head, int32_t count,
                                                           int32_t task)
{
    const moq_heads_desc &d = a.enter;
    const int32_t kind = task < count ? 0 : task - count + 1;
    const int64_t at = kind == 0 ? row * a.q_stride + (int64_t)(head + task) * dim : (int64_t)kv_head * dim;
    const moqk_enter_task t = {moqk_place_any(kind == 0 ? a.q : kind == 1 ? d.k : d.v, at, a.bf16),
                               kind == 0 ? d.q_norm : kind == 1 ? d.k_norm : NULL, kind, kind < 2 ? d.dims / 2 : 0};
    return t;
}

/* Threads that meet over the row's own key and value: the warps that make them, and the reader. */
__device__ __forceinline__ int32_t moqk_enter_meeting(int32_t count, int32_t warps, int32_t reader)
{
    const int32_t k = count & (warps - 1), v = (count + 1) & (warps - 1); /* warps are a power of two */
    return 32 * (1 + (k != reader) + (v != reader && v != k));
}

/* What moqk_kv_pack does, by one warp, into shared memory and the cache: a lane has neighbouring values. own: [ROW] codes, then block scales; at: the
   row of the cache. */
template <int BYTES> __device__ __forceinline__ void moqk_stream_put(const uint32_t *code, uint8_t *own, uint8_t *row)
{
    if constexpr (BYTES == 16) *(uint4 *)own = *(uint4 *)row = make_uint4(code[0], code[1], code[2], code[3]);
    else if constexpr (BYTES == 8) *(uint2 *)own = *(uint2 *)row = make_uint2(code[0], code[1]);
    else if constexpr (BYTES == 4) *(uint32_t *)own = *(uint32_t *)row = code[0];
    else if constexpr (BYTES == 2) *(uint16_t *)own = *(uint16_t *)row = (uint16_t)code[0];
    else *own = *row = (uint8_t)code[0];
}

template <int KIND, int DIM>
__device__ __forceinline__ void moqk_stream_pack(const float *x, const moqk_kv &to, int32_t head, uint8_t *own, int64_t at, int lane)
{
    constexpr int BITS = moqk_kv_bits(KIND), EACH = DIM / 32, BYTES = EACH * BITS / 8, ROW = moqk_stream_row(KIND, DIM);
    const float scale = to.scale[head], *bias = to.bias ? to.bias + (int64_t)head * DIM : NULL;
    uint32_t code[4] = {0, 0, 0, 0};
    float s = 1;
    if constexpr (BITS == 4) {
        constexpr int LANES = (KIND == MOQK_KV_MX4 ? 32 : 16) / EACH; /* of a block */
        float amax = 0;
        uint32_t c;
#pragma unroll
        for (int i = 0; i < EACH; i++) amax = fmaxf(amax, fabsf(x[lane * EACH + i]));
#pragma unroll
        for (int o = 1; o < LANES; o *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, o));
        if (KIND == MOQK_KV_MX4) {
            const int e = moqk_e8m0_exponent(MOQ_RULE_E8M0_CEIL, 6, amax);
            c = (uint32_t)(e + 127);
            s = ldexpf(1.0f, e);
        } else {
            s = amax / (6 * (scale / 6));
            c = moqk_to_e4m3(s < 448 ? s : 448);
            s = moqk_e4m3(c) * (scale / 6);
        }
        if (lane % LANES == 0) own[ROW + lane / LANES] = to.scales[at * moqk_stream_blocks(KIND, DIM) + lane / LANES] = (uint8_t)c;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const float v = x[lane * EACH + i], b = KIND == MOQK_KV_E4M3 && bias ? bias[lane * EACH + i] : 0, u = bias ? v - b : v;
        uint32_t c;
        if (KIND == MOQK_KV_BF16) { const __nv_bfloat16 h = __float2bfloat16_rn(v); c = *(const uint16_t *)&h; }
        else if (KIND == MOQK_KV_E4M3) c = moqk_to_e4m3(u / scale);
        else if (KIND == MOQK_KV_I8) c = v == v ? (uint32_t)(uint8_t)(int)moqk_round_code(MOQ_I8, v / scale, 0) : 0;
        else c = s > 0 ? moqk_to_e2m1(v / s) : 0;
        code[i * BITS / 32] |= c << i * BITS % 32;
    }
    moqk_stream_put<BYTES>(code, own + lane * BYTES, to.codes + at * ROW + lane * BYTES);
}

/* What moqk_enter does for the heads of a block before they are packed, one to a warp; now, e: the first one of each. Queries go into `queries` [8][R],
   not scaled, and where `owner` key and value into `mine` [2][DIM]. */
template <int DIM>
__device__ __forceinline__ void moqk_enter_block(const moqk_attend_args &a, int32_t dim, int64_t row, int32_t kv_head, int32_t head, int32_t count, int owner,
                                                 float *queries, float *mine, moqk_enter_task now, moqk_entering<DIM> &e)
{
    constexpr int R = moqk_tensor_row(DIM);
    const moq_heads_desc &d = a.enter;
    const int32_t warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    for (int32_t task = warp; task < count + 2 * owner; task += warps) { /* queries, key, value */
        if (task != warp) {
            now = moqk_enter_find(a, dim, row, kv_head, head, count, task);
            e.weigh(now.weight, dim);
            e.load(now.from, a.bf16, dim, (const float2 *)(const void *)d.table, now.half);
        }
        e.put(now.weight != NULL, d.eps, a.bf16, dim, now.half, d.interleaved, now.kind == 0 ? queries + task * R : mine + (now.kind - 1) * DIM);
    }
}

/* Bytes of a key or a value that enters: codes, then block scales. */
__host__ __device__ static constexpr int moqk_stream_own_bytes(int kind, int dim) { return moqk_stream_row(kind, dim) + (moqk_kv_bits(kind) == 4 ? 16 : 0); }

/* Key and value of `mine` into `own` [2][OWN] and to position `at` of the cache, by the warps that made them. Only warp `reader`, which has the last step
   of the row, needs them, later: nobody else waits. */
template <int KIND, int DIM>
__device__ __forceinline__ void moqk_enter_own(const moqk_attend_args &a, int32_t kv_head, int32_t count, int64_t at, const float *mine, uint8_t *own,
                                               int32_t reader)
{
    constexpr int OWN = moqk_stream_own_bytes(KIND, DIM);
    const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, k = count & (warps - 1), v = (count + 1) & (warps - 1);
    if (warp != k && warp != v) return;
    for (int i = 0; i < 2; i++)
        if (warp == (i ? v : k)) moqk_stream_pack<KIND, DIM>(mine + i * DIM, i ? a.c.v : a.c.k, kv_head, own + i * OWN, at, lane);
    __syncwarp();
    if (warp != reader) asm volatile("bar.arrive 1, %0;" :: "r"(moqk_enter_meeting(count, warps, reader)) : "memory");
}

/* The row's own key and value into a step, whose row r is its position, in place of what was there. scales: the block scales of keys. */
template <int KIND, int DIM> __device__ __forceinline__ void moqk_stream_own(uint32_t step, uint32_t scales, const uint8_t *own, int32_t r, int lane)
{
    constexpr int ROW = moqk_stream_row(KIND, DIM), OWN = moqk_stream_own_bytes(KIND, DIM), BLOCKS = moqk_stream_blocks(KIND, DIM);
#pragma unroll
    for (int first = 0; first < ROW / 8; first += 32) {
        const int i = first + lane, v = i >= ROW / 16, piece = i - v * (ROW / 16);
        if (i >= ROW / 8) continue;
        const uint4 w = *(const uint4 *)(const void *)(own + v * OWN + piece * 16);
        const uint32_t at = step + (uint32_t)(v * MOQK_STREAM_KEYS * ROW) + moqk_stream_at<ROW>(r, piece);
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" :: "r"(at), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
    }
    if constexpr (BLOCKS > 0)
        if (lane < 2 * BLOCKS) {
            const int v = lane >= BLOCKS, i = lane - v * BLOCKS;
            const uint32_t at = scales + (uint32_t)(v * moqk_stream_scales(KIND, DIM) + r * BLOCKS + i), c = own[v * OWN + ROW + i];
            asm volatile("st.shared.u8 [%0], %1;" :: "r"(at), "r"(c) : "memory");
        }
}

/* What the splits of a row add up: block r owns 2^shift quads of four values of the heads from quad r * 2^shift on, and gets each of every block, into
   `parts` [splits][2^shift], with maximum to base 2 and sum of its head, into `stats`. In a cluster they are sent there, and `bar` knows how many bytes that
   is. All other blocks leave them in memory, where they are their own signal: a word that is not MOQK_SPLIT_ABSENT is there. */
typedef struct moqk_splits {
    float4 *parts;
    float2 *stats;
    uint32_t bar;
    int32_t shift;
} moqk_splits;

#define MOQK_SPLIT_ABSENT 0xffffffffu

/* Before the blocks of the cluster meet. */
__device__ __forceinline__ void moqk_split_begin(const moqk_splits &c, int32_t splits, int32_t quads)
{
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x != 0) return;
    const int32_t mine = max(min(quads - ((int32_t)blockIdx.x << c.shift), 1 << c.shift), 0);
    moqk_barrier_init(c.bar, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    moqk_barrier_expect(c.bar, (uint32_t)(splits * mine) * 24);
#endif
}

/* Four words in memory of what block `to` gets from `from`; with its two others: see moqk_split_stats. */
__device__ __forceinline__ uint32_t *moqk_split_parts(const moqk_attend_args &a, uint32_t to, uint32_t from, uint32_t quad)
{
    const uint32_t group = blockIdx.z * gridDim.y + blockIdx.y;
    return a.given + ((((group * a.splits + to) * a.splits + from) << a.shift) + quad) * 4;
}
__device__ __forceinline__ uint32_t *moqk_split_stats(const moqk_attend_args &a, const uint32_t *parts)
{
    return a.given + a.given_stats + (parts - a.given) / 2;
}
__device__ __forceinline__ uint32_t moqk_split_word(float v) { return min(__float_as_uint(v), MOQK_SPLIT_ABSENT - 1); }

/* Quad i of this block, for whoever owns it. */
__device__ __forceinline__ void moqk_split_give(const moqk_attend_args &a, const moqk_splits &c, int32_t i, const float v[4], float max, float sum)
{
    const uint32_t to = (uint32_t)i >> c.shift, quad = (uint32_t)i & ((1u << c.shift) - 1);
    if (a.given) {
        uint32_t *parts = moqk_split_parts(a, to, blockIdx.x, quad);
        asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" :: "l"(parts), "r"(moqk_split_word(v[0])), "r"(moqk_split_word(v[1])),
                     "r"(moqk_split_word(v[2])), "r"(moqk_split_word(v[3])) : "memory");
        asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" :: "l"(moqk_split_stats(a, parts)), "r"(moqk_split_word(max)), "r"(moqk_split_word(sum))
                     : "memory");
        return;
    }
#if __CUDA_ARCH__ >= 900
    const uint32_t at = ((uint32_t)blockIdx.x << c.shift) + quad;
    moqk_run_give((uint32_t)__cvta_generic_to_shared(c.parts + at), v, c.bar, to);
    asm volatile("{ .reg .u32 p, q; mapa.shared::cluster.u32 p, %0, %4; mapa.shared::cluster.u32 q, %3, %4;"
                 " st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [p], {%1, %2}, [q]; }"
                 :: "r"((uint32_t)__cvta_generic_to_shared(c.stats + at)), "f"(max), "f"(sum), "r"(c.bar), "r"(to) : "memory");
#endif
}

/* Waits for what the other blocks leave in memory, takes it, and makes it absent for the next launch. */
__device__ __forceinline__ void moqk_split_take(const moqk_attend_args &a, const moqk_splits &c, int32_t quads)
{
    for (int32_t i = threadIdx.x; i < a.splits << c.shift; i += blockDim.x) {
        const int32_t quad = i & ((1 << c.shift) - 1);
        if (((int32_t)blockIdx.x << c.shift) + quad >= quads) continue;
        uint32_t *from = moqk_split_parts(a, blockIdx.x, i >> c.shift, quad), *from_stats = moqk_split_stats(a, from);
        uint4 v;
        uint2 w;
        do {
            asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
            asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(w.x), "=r"(w.y) : "l"(from_stats) : "memory");
        } while (max(max(max(v.x, v.y), max(v.z, v.w)), max(w.x, w.y)) == MOQK_SPLIT_ABSENT);
        ((uint4 *)(void *)c.parts)[i] = v;
        ((uint2 *)(void *)c.stats)[i] = w;
        *(uint4 *)(void *)from = make_uint4(~0u, ~0u, ~0u, ~0u);
        *(uint2 *)(void *)from_stats = make_uint2(~0u, ~0u);
    }
    __syncthreads();
}

/* Value i of the heads of a block, DIM of each, of which the first `dim` are there. */
template <int DIM> __device__ __forceinline__ void moqk_stream_result(const moqk_attend_args &a, int32_t dim, int64_t row, int32_t head, int32_t i, float v)
{
    if (dim == DIM) moqk_put_any(a.y, row * a.y_stride + (int64_t)head * DIM + i, v, a.bf16);
    else if (i % DIM < dim) moqk_put_any(a.y, row * a.y_stride + (int64_t)(head + i / DIM) * dim + i % DIM, v, a.bf16);
}

/* y = sum 2^(m_s - m) y_s / sum 2^(m_s - m) l_s, in the order of the splits, a value a thread. Behind it every block has read its queries. */
template <int DIM>
__device__ __forceinline__ void moqk_split_join(const moqk_attend_args &a, int32_t dim, const moqk_splits &c, int64_t row, int32_t head, int32_t quads)
{
    const int32_t first = 4 * (int32_t)blockIdx.x << c.shift, values = min(4 << c.shift, 4 * quads - first);
    const float *parts = (const float *)(const void *)c.parts;
    if (a.given) moqk_split_take(a, c, quads);
    else moqk_barrier_wait(c.bar, 0);
    for (int32_t i = threadIdx.x; i < values; i += blockDim.x) {
        float top = -1e30f, l = 0, v = 0;
#pragma unroll 1
        for (int32_t begin = 0; begin < a.splits; begin += MOQK_STREAM_AT_ONCE) {
            float part[MOQK_STREAM_AT_ONCE], best = top;
            float2 stats[MOQK_STREAM_AT_ONCE];
#pragma unroll
            for (int s = 0; s < MOQK_STREAM_AT_ONCE; s++) { /* without a branch, as in the kernel */
                const int32_t from = min(begin + s, a.splits - 1);
                part[s] = parts[(from * 4 << c.shift) + i];
                stats[s] = c.stats[(from << c.shift) + (i >> 2)];
                best = fmaxf(best, stats[s].x);
            }
            const float shrink = moqk_exp2(top - best);
            l *= shrink;
            v *= shrink;
            top = best;
#pragma unroll
            for (int s = 0; s < MOQK_STREAM_AT_ONCE; s++) {
                const float w = begin + s < a.splits ? moqk_exp2(stats[s].x - top) : 0;
                l += w * stats[s].y;
                v += w * part[s];
            }
        }
        moqk_stream_result<DIM>(a, dim, row, head, first + i, l != 0 ? v / l : 0);
    }
}

/* The queries of a block back to where they came from: q changes in place, when nobody reads it any more. */
template <int DIM> __device__ __forceinline__ void moqk_enter_back(const moqk_attend_args &a, int32_t head, int32_t count, const float *queries)
{
    for (int32_t i = threadIdx.x; i < count * DIM; i += blockDim.x)
        moqk_put_any(a.enter.q, (int64_t)head * DIM + i, queries[i / DIM * moqk_tensor_row(DIM) + i % DIM], a.bf16);
}

/* The positions of a block: [from, to) of those that its row sees; base: rows of the cache before the first that it sees; owner: the last one is the
   row's own, which enters. */
typedef struct moqk_span {
    int64_t base;
    int32_t from, to, owner;
} moqk_span;

__device__ __forceinline__ moqk_span moqk_stream_span(const moqk_attend_args &a, int32_t kv_head, int32_t slot, int32_t pos)
{
    moqk_span s = {0, 0, 0, 0};
    if (slot < 0 || slot >= a.c.slots || pos < 0 || pos >= a.c.capacity) return s;
    const int32_t low = (int32_t)moqk_first_seen(a, pos), seen = pos + 1 - low, per = (int32_t)((uint32_t)(seen + a.splits - 1) / (uint32_t)a.splits);
    s.from = (int32_t)blockIdx.x * per;
    s.to = min(s.from + per, seen);
    s.owner = a.enters && s.from < s.to && s.to == seen;
    s.base = ((int64_t)slot * a.c.kv_heads + kv_head) * a.c.capacity + low;
    return s;
}

/* 128 bytes of a thread from the block's first keys and values into L2. */
__device__ __forceinline__ void moqk_stream_ahead(const moqk_attend_args &a, int32_t pitch, const moqk_span &s)
{
    const int64_t at = (int64_t)s.from * pitch + (int64_t)threadIdx.x * 128;
    if (at >= (int64_t)s.to * pitch) return;
    asm volatile("prefetch.global.L2 [%0];" :: "l"(a.c.k.codes + s.base * pitch + at));
    asm volatile("prefetch.global.L2 [%0];" :: "l"(a.c.v.codes + s.base * pitch + at));
}

/* What a warp asks for: its steps in turn, each into the next place of its ring. LOOSE: rows of the cache are shorter than those of a step, whose rest
   is zeros. */
template <int KIND, int DIM, int LOOSE> struct moqk_stream_feed {
    static constexpr int ROW = moqk_stream_row(KIND, DIM), STEP = moqk_stream_step(KIND, DIM), STAGES = moqk_stream_stages(KIND, DIM);
    static constexpr int BLOCKS = moqk_stream_blocks(KIND, DIM);
    const uint8_t *k, *v, *scales; /* the lane's first piece of the next step; lanes from 16 on have scales of values */
    uint32_t put, put_scales;      /* where they go in the first place */
    int32_t rows, owner, run;      /* rows from the next step on; the last of them enters; rows of a step of all warps */
    int32_t place, places;         /* of the next step; of the ring */
    int32_t odd;                   /* two scales a row: bytes before the first of them in its word */
    int32_t pitch, here;           /* bytes of a row; is there something of it for this lane? */

    __device__ __forceinline__ void begin(const moqk_attend_args &a, const moqk_span &s, uint32_t ring, int lane, int warp, int warps)
    {
        const int32_t first = s.from + warp * MOQK_STREAM_KEYS;
        const int32_t row = lane / (ROW / 16), piece = lane % (ROW / 16);
        pitch = LOOSE ? a.c.k.row_bytes : ROW;
        const int64_t at = LOOSE ? (s.base + first + row) * pitch + piece * 16 : (s.base + first) * ROW + lane * 16;
        here = !LOOSE || piece * 16 < pitch;
        k = a.c.k.codes + at;
        v = a.c.v.codes + at;
        put = ring + moqk_stream_at<ROW>(row, piece);
        odd = 0;
        if constexpr (BLOCKS > 0) {
            scales = (lane < 16 ? a.c.k.scales : a.c.v.scales) + (s.base + first) * BLOCKS;
            put_scales = ring + 2 * MOQK_STREAM_KEYS * ROW + (lane >> 4) * moqk_stream_scales(KIND, DIM) + (lane & 15) * (BLOCKS == 2 ? 4 : BLOCKS);
            if (BLOCKS == 2) odd = (int32_t)(s.base + first) * 2 & 2;
            scales += (lane & 15) * (BLOCKS == 2 ? 4 : BLOCKS) - odd;
        }
        rows = s.to - first;
        owner = s.owner;
        run = warps * MOQK_STREAM_KEYS;
        place = 0;
        places = a.places;
    }
    __device__ __forceinline__ void start(int lane)
    {
#pragma unroll
        for (int i = 0; i + 1 < STAGES; i++) ask(lane);
    }
    /* Rows of two scales lie at any even address: words that hold some are copied. */
    __device__ __forceinline__ void ask_scales(int lane)
    {
        const uint32_t to = put_scales + (uint32_t)place * STEP;
        if constexpr (BLOCKS == 2) {
            const int32_t bytes = max(0, min(4, odd + 2 * (rows - owner) - 4 * (lane & 15)));
            if ((lane & 15) <= 8) asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(to), "l"(scales), "r"(bytes) : "memory");
        } else {
            const int32_t bytes = (lane & 15) < rows - owner ? BLOCKS : 0;
            asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" :: "r"(to), "l"(scales), "r"(bytes), "n"(BLOCKS > 2 ? BLOCKS : 4) : "memory");
        }
        scales += (int64_t)run * BLOCKS;
    }
    __device__ __forceinline__ void ask(int lane)
    {
        if (rows > 0) {
            moqk_stream_ask<ROW>(put + (uint32_t)place * STEP, k, v, pitch, here ? rows - owner : 0, lane);
            if constexpr (BLOCKS > 0) ask_scales(lane);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        k += (int64_t)run * pitch;
        v += (int64_t)run * pitch;
        rows -= run;
        place = place + 1 == places ? 0 : place + 1;
    }
};

/* What the warps of a block have added up, each of eight heads in its own ring: added up and given on, or the result. found: maxima and sums [8][WARPS]. */
template <int DIM, int WARPS>
__device__ __forceinline__ void moqk_stream_meet(const moqk_attend_args &a, int32_t dim, const moqk_splits &cluster, int64_t row, int32_t kv_head, int32_t head,
                                                 int32_t quads, const uint8_t *rings, int32_t ring_bytes, const float2 *found, int sink, float v_unit)
{
    constexpr int R = moqk_stream_sums(DIM);
    const uint32_t others = (blockDim.x >> 5) - 1; /* warps are a power of two */
    for (int32_t i = threadIdx.x; i < quads; i += blockDim.x) {
        const int32_t h = i / (DIM / 4), d = i % (DIM / 4) * 4;
        const uint8_t *from = rings + (h * R + d) * 4;
        const float4 *stats = (const float4 *)(const void *)(found + h * WARPS);
        float4 part[WARPS], two[WARPS / 2];
        float m = -1e30f, l = 0, x[4] = {0, 0, 0, 0};
#pragma unroll
        for (int w = 0; w < WARPS / 2; w++) two[w] = stats[w];
#pragma unroll
        for (int w = 0; w < WARPS; w++) /* those of warps that are not there have no weight */
            part[w] = *(const float4 *)(const void *)(from + ((uint32_t)w & others) * (uint32_t)ring_bytes);
#pragma unroll
        for (int w = 0; w < WARPS / 2; w++) m = fmaxf(m, fmaxf(two[w].x, two[w].z));
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float weight = moqk_exp2((w & 1 ? two[w / 2].z : two[w / 2].x) - m);
            l += weight * (w & 1 ? two[w / 2].w : two[w / 2].y);
            x[0] += weight * part[w].x; x[1] += weight * part[w].y; x[2] += weight * part[w].z; x[3] += weight * part[w].w;
        }
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] *= v_unit;
        if (a.c.v.bias) {
            const float *bias = a.c.v.bias + (int64_t)kv_head * dim, keys = l - (sink ? moqk_exp2(a.sinks[head + h] * MOQK_LOG2E - m) : 0); /* a sink has none */
#pragma unroll
            for (int j = 0; j < 4; j++) if (d + j < dim) x[j] += keys * bias[d + j];
        }
        if (a.splits > 1) {
            moqk_split_give(a, cluster, i, x, m, l);
            continue;
        }
        const float one = l != 0 ? 1 / l : 0;
#pragma unroll
        for (int j = 0; j < 4; j++) moqk_stream_result<DIM>(a, dim, row, head, 4 * i + j, x[j] * one);
    }
}

/* The sums of a warp for head h, its i-th, into its own ring. */
template <int KIND, int DIM> __device__ __forceinline__ void moqk_stream_leave(float *sums, const float (*acc)[4], int many, int i, int32_t h, int g)
{
    constexpr int N = DIM / 8, R = moqk_stream_sums(DIM);
#pragma unroll
    for (int k = 0; k < N / 2; k += 2) {
        float v[4]; /* neighbouring dimensions */
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float *x = acc[k + (j >> 1)] + (j & 1) * 2;
            v[j] = many ? x[i] : x[0] + x[1];
        }
        *(float4 *)&sums[h * R + (moqk_kv_bits(KIND) == 4 ? 16 * k + 4 * g : g * N + 2 * k)] = make_float4(v[0], v[1], v[2], v[3]);
    }
}

/* Up to 8 query heads of one row over one split of the positions; warps take runs of 16 positions in turn, the next ones on their way. Lane
   (g, t): keys g and 8 + g, heads moqk_stream_head. LOOSE: heads have fewer than DIM values. Grid: splits, head groups, rows. Reads the split's bytes
   once. */
template <int KIND, int DIM, int LOOSE> __global__ void MOQK_STREAM_BOUNDS(KIND, DIM) moqk_attend_stream(moqk_attend_args a)
{
    constexpr int ROW = moqk_stream_row(KIND, DIM), N = DIM / 8, STEP = moqk_stream_step(KIND, DIM), BITS = moqk_kv_bits(KIND);
    constexpr int STAGES = moqk_stream_stages(KIND, DIM), WARPS = moqk_stream_warps(KIND, DIM), MX = KIND == MOQK_KV_MX4;
    extern __shared__ __align__(128) uint8_t shared[]; /* places in it are found by exclusive or */
    __shared__ float bias[8];
    __shared__ __align__(16) float2 found[8][WARPS]; /* maximum and sum */
    __shared__ __align__(16) uint8_t own[2 * moqk_stream_own_bytes(KIND, DIM)]; /* key and value that enter */
    __shared__ uint64_t joined;
    const int32_t dim = LOOSE ? a.c.k.dim : DIM, ring_bytes = a.places * STEP; /* fewer than STAGES where no warp takes more steps */
    const int32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, g = lane >> 2, t = lane & 3, groups = (a.share + 7) / 8;
    const int32_t kv_head = blockIdx.y / groups, head = kv_head * a.share + blockIdx.y % groups * 8, count = min(8, (kv_head + 1) * a.share - head);
    const int32_t run = warps * MOQK_STREAM_KEYS, quads = count * (DIM / 4), many = count > 4;
    uint8_t *behind = shared + warps * ring_bytes;
    float *queries = (float *)(void *)behind, *mine = (float *)(void *)(behind + moqk_stream_heads(DIM));
    uint4 *ops = (uint4 *)(void *)(mine + 2 * DIM);
    const moqk_splits cluster = {(float4 *)(void *)(behind + moqk_stream_room(DIM)),
                                 (float2 *)(void *)(behind + moqk_stream_room(DIM) + (a.splits << a.shift) * 16),
                                 (uint32_t)__cvta_generic_to_shared(&joined), a.shift};
    const uint32_t ring = (uint32_t)__cvta_generic_to_shared(shared) + (uint32_t)(warp * ring_bytes);
    const int64_t row = blockIdx.z;
    const int32_t early_slot = __ldcg(a.slot + row), early_pos = __ldcg(a.pos + row); /* what they may not yet be */
    if (a.clustered) {
        moqk_split_begin(cluster, a.splits, quads);
        __syncwarp();
        moqk_cluster_arrive(1); /* its memory may be written to when all are here */
    }
    moqk_enter_task task = {NULL, NULL, 0, 0};
    moqk_entering<DIM> e;
    if (warp < count + 2 * a.enters) {
        task = moqk_enter_find(a, dim, row, kv_head, head, count, warp);
        e.weigh(task.weight, dim);
        asm volatile("" : "+l"(task.from), "+r"(task.half)); /* made here, not behind the wait */
    }
    moqk_stream_clear<DIM>(count, many, a.c.k.bias != NULL, bias, ops);
    for (int32_t i = threadIdx.x; warps < WARPS && i < 8 * WARPS; i += blockDim.x) found[0][i] = make_float2(-1e30f, 0); /* of warps that are not there */
    float k_unit, v_unit, top[2] = {-1e30f, -1e30f}, sum[2] = {0, 0}; /* of moqk_stream_head; exponents to base 2 */
    moqk_stream_units<KIND>(a.c, kv_head, &k_unit, &v_unit);
    moqk_dependents_may_start();
    moqk_span s = moqk_stream_span(a, kv_head, early_slot, early_pos);
    moqk_stream_feed<KIND, DIM, LOOSE> feed;
    feed.begin(a, s, ring, lane, warp, warps);
    asm volatile("" : "+l"(feed.k), "+l"(feed.v), "+r"(feed.put), "+r"(feed.rows));
    if (a.ahead) moqk_stream_ahead(a, feed.pitch, s);
    moqk_wait_for_before();
    if (task.from) e.load(task.from, a.bf16, dim, (const float2 *)(const void *)a.enter.table, task.half);
    __syncwarp(); /* the compiler would ask for the heads behind what depends on these */
    const int32_t slot = __ldcg(a.slot + row), pos = __ldcg(a.pos + row);
    feed.start(lane); /* behind the heads and not before them: those would queue behind what all blocks ask for here. Slot and position seldom change */
    if (slot != early_slot || pos != early_pos) {
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncwarp();
        s = moqk_stream_span(a, kv_head, slot, pos);
        feed.begin(a, s, ring, lane, warp, warps);
        feed.start(lane);
    }
    if (a.clustered) moqk_cluster_wait();
    moqk_enter_block<DIM>(a, dim, row, kv_head, head, count, s.owner, queries, mine, task, e);
    moqk_stream_queries<KIND, DIM>(a.c.k, dim, a.c.k.bias ? a.c.k.bias + (int64_t)kv_head * dim : NULL, a.scale, queries, count, many, bias, ops);
    moqk_stream_query<DIM> q;
    q.begin(ops, lane);
    const int32_t reader = (s.to - 1 - s.from) / MOQK_STREAM_KEYS & (warps - 1);
    if (s.owner) moqk_enter_own<KIND, DIM>(a, kv_head, count, s.base + s.to - 1, mine, own, reader);
    if (a.enters && a.splits == 1) moqk_enter_back<DIM>(a, head, count, queries);
    float acc[N / 2][4];
#pragma unroll
    for (int i = 0; i < N / 2; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;
    const float shift[2] = {bias[moqk_stream_head(many, t, 0)] * MOQK_LOG2E, bias[moqk_stream_head(many, t, 1)] * MOQK_LOG2E};
    k_unit *= MOQK_LOG2E;
    const int sink = a.sinks && s.to > 0 && blockIdx.x == 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int32_t h = moqk_stream_head(many, t, i);
        if (!sink || warp != 0 || h >= count) continue;
        top[i] = a.sinks[head + h] * MOQK_LOG2E;
        sum[i] = g == 0 ? 1.0f : 0.0f;
    }
    uint32_t at = 0;
#pragma unroll 1
    for (int32_t first = s.from + warp * MOQK_STREAM_KEYS; first < s.to; first += run) {
        const uint32_t keys = ring + at, values = keys + MOQK_STREAM_KEYS * ROW, scales = values + MOQK_STREAM_KEYS * ROW + (uint32_t)feed.odd;
        float c[2][2], best[2];
        asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
        __syncwarp();
        feed.ask(lane);
        if (s.owner && first + MOQK_STREAM_KEYS >= s.to) {
            asm volatile("bar.sync 1, %0;" :: "r"(moqk_enter_meeting(count, warps, reader)) : "memory");
            moqk_stream_own<KIND, DIM>(keys, scales, own, s.to - 1 - first, lane);
            __syncwarp();
        }
        if constexpr (MX) moqk_stream_scores_mx<DIM>(keys, scales, q, many, lane, c);
        else moqk_stream_scores<KIND, DIM>(keys, scales, q, many, lane, c);
#pragma unroll
        for (int n = 0; n < 4; n++) c[n >> 1][n & 1] = c[n >> 1][n & 1] * k_unit + shift[n >> 1];
        if (a.softcap > 0)
#pragma unroll
            for (int n = 0; n < 4; n++) c[n >> 1][n & 1] = a.softcap * MOQK_LOG2E * tanhf(c[n >> 1][n & 1] / MOQK_LOG2E / a.softcap);
        if (first + MOQK_STREAM_KEYS > s.to)
#pragma unroll
            for (int n = 0; n < 4; n++) if (first + 8 * (n & 1) + g >= s.to) c[n >> 1][n & 1] = -3e38f;
        best[0] = fmaxf(c[0][0], c[0][1]);
        best[1] = fmaxf(c[1][0], c[1][1]);
        if (__any_sync(0xffffffffu, best[0] > top[0] + 8 || best[1] > top[1] + 8)) { /* weights up to 2^8 do no harm: sums are seldom scaled again */
#pragma unroll
            for (int i = 0; i < 2; i++) {
                for (int k = 4; k < 32; k *= 2) best[i] = fmaxf(best[i], __shfl_xor_sync(0xffffffffu, best[i], k));
                best[i] = fmaxf(best[i], top[i]);
                const float shrink = moqk_exp2(top[i] - best[i]);
                sum[i] *= shrink;
#pragma unroll
                for (int n = 0; n < N / 2; n++) { acc[n][i] *= shrink; acc[n][2 + i] *= shrink; }
                top[i] = best[i];
            }
        }
        uint32_t p[2][2] = {{0, 0}, {0, 0}};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (i == 1 && !many) continue;
#pragma unroll
            for (int n = 0; n < 2; n++) c[i][n] = moqk_exp2(c[i][n] - top[i]);
            sum[i] += c[i][0] + c[i][1];
#pragma unroll
            for (int n = 0; n < 2 && MX; n++) c[i][n] *= 18446744073709551616.0f; /* 2^64 */
        }
        moqk_stream_weights<KIND == MOQK_KV_BF16 || MX>(c, many, p);
        if constexpr (BITS == 4) moqk_stream_values4<KIND, DIM>(values, scales + moqk_stream_scales(KIND, DIM), p, many, lane, acc);
        else moqk_stream_values<KIND, DIM>(values, p, many, lane, acc);
        at = (int32_t)at + STEP == ring_bytes ? 0 : at + STEP;
    }
    float *sums = (float *)(void *)(shared + warp * ring_bytes); /* [8][moqk_stream_sums], in the warp's own ring */
    __syncwarp(); /* which nobody reads any more */
    if (many) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            for (int k = 4; k < 32; k *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], k);
            if (2 * t + i >= count) continue;
            if (g == 0) found[2 * t + i][warp] = make_float2(top[i], sum[i]);
            moqk_stream_leave<KIND, DIM>(sums, acc, 1, i, 2 * t + i, g);
        }
    } else {
        for (int k = 4; k < 32; k *= 2) sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], k);
        if (t < count) {
            if (g == 0) found[t][warp] = make_float2(top[0], sum[0]);
            moqk_stream_leave<KIND, DIM>(sums, acc, 0, 0, t, g);
        }
    }
    __syncthreads();
    moqk_stream_meet<DIM, WARPS>(a, dim, cluster, row, kv_head, head, quads, shared, ring_bytes, found[0], sink, v_unit);
    if (a.splits == 1) return;
    moqk_split_join<DIM>(a, dim, cluster, row, head, quads);
    if (a.enters && blockIdx.x == 0) moqk_enter_back<DIM>(a, head, count, queries);
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-attention-tiles  attention of many queries on tensor cores: what the kernels of both instruction sets share
   Teams of four warps have 64 queries (rows x heads of one kv head), a warp 16 of them, whose scores and sums stay in its registers. Keys and values
   come in tiles, whose codes become 16-bit operands where they lie. TERMS: 1 for BF16 activations; 2 for F32 ones, whose queries and probabilities go in
   as hi + lo; 3 when the cache is F32 and is split too. With F32 activations and BF (codes that want BF16) queries and probabilities have three parts.
   What a kernel keeps in shared memory is its R: A parts of queries and probabilities, B of keys and values, tiles of KEYS positions. Operands lie in
   slabs of 64 values, 128 bytes a row, 16-byte pieces exchanged by xor with row & 7: the 128-byte swizzle of wgmma, and no conflicts for ldmatrix.
   ------------------------------------------------------------------------------------------------ */

enum { MOQK_TEAM_QUERIES = 64 };

/* x; what follows from it is computed where it is needed, where once per tile of queries is cheaper than a register throughout its products: by wgmma with
   heads of 256 values, and by mma.sync. */
template <int DIM> __device__ __forceinline__ int32_t moqk_anew(int32_t x)
{
    if (MOQK_SM80 || DIM == 256) asm volatile("" : "+r"(x));
    return x;
}

__host__ __device__ static constexpr int moqk_query_parts(int terms, int bf) { return terms == 1 ? 1 : bf ? 3 : 2; }

/* 16 codes as 16-bit pairs in their order. scale: the code of their block, 4 bits only. */
template <int KIND> __device__ __forceinline__ void moqk_kv_unpack(const uint32_t *w, uint32_t scale, uint32_t hi[8])
{
    if constexpr (moqk_kv_bits(KIND) == 4) {
        uint32_t by = moqk_kv_pair<KIND>(scale), h[4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            moqk_kv_operands<KIND>(w[i], by, h); /* pairs (j, j + 4) */
            hi[4 * i] = __byte_perm(h[0], h[1], 0x5410);
            hi[4 * i + 1] = __byte_perm(h[2], h[3], 0x5410);
            hi[4 * i + 2] = __byte_perm(h[0], h[1], 0x7632);
            hi[4 * i + 3] = __byte_perm(h[2], h[3], 0x7632);
        }
    } else
#pragma unroll
        for (int i = 0; i < 4; i++) moqk_kv_operands<KIND>(w[i], 0, hi + 2 * i);
}

/* What a number in 16 bits stands for: the scale of a head in units of moqk_kv_operands. */
__device__ __forceinline__ float moqk_unit(const moqk_kv &c, int32_t head)
{
    return c.kind <= MOQK_KV_BF16 || c.kind == MOQK_KV_MX4 ? 1 : c.kind == MOQK_KV_NV4 ? c.scale[head] * (512.0f / 6) : c.scale[head];
}

__device__ __forceinline__ void moqk_shared_put16(uint32_t at, const uint32_t *v)
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" :: "r"(at), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

/* 16 or 8 bytes, or zeros. */
template <int BYTES> __device__ __forceinline__ void moqk_copy_or_zero(uint32_t to, const uint8_t *from, int there)
{
    if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" :: "r"(to), "l"(from), "r"(there ? 8 : 0) : "memory");
}

/* Queries [begin, end) of a tile are rows of one slot, -1: of none; some of them sees position low, some high. The same for all lanes of a warp. */
template <int QUERIES, int DIM> struct moqk_team_run {
    int32_t end, slot, low, high;
    __device__ __forceinline__ void find(const moqk_attend_args &a, int32_t first_pair, int32_t begin)
    {
        const int32_t lane = threadIdx.x & 31, share = moqk_anew<DIM>(a.share), pairs = a.rows * share;
        int32_t slots[QUERIES / 32], pos[QUERIES / 32];
        slot = -1;
#pragma unroll
        for (int j = 0; j < QUERIES / 32; j++) {
            const int32_t row = (int32_t)((uint32_t)min(first_pair + lane + 32 * j, pairs - 1) / (uint32_t)share), s = a.slot[row];
            pos[j] = a.pos[row];
            slots[j] = s >= 0 && s < a.c.slots && pos[j] >= 0 && pos[j] < a.c.capacity ? s : -1;
            const int32_t first = __shfl_sync(0xffffffffu, slots[j], begin & 31);
            if (begin >> 5 == j) slot = first;
        }
        end = QUERIES;
#pragma unroll
        for (int j = QUERIES / 32 - 1; j >= 0; j--) {
            const uint32_t other = __ballot_sync(0xffffffffu, slots[j] != slot && lane + 32 * j >= begin);
            if (other) end = 32 * j + __ffs(other) - 1;
        }
        int32_t from = INT32_MAX, to = -1;
#pragma unroll
        for (int j = 0; j < QUERIES / 32; j++)
            if (lane + 32 * j >= begin && lane + 32 * j < end) { from = min(from, (int32_t)moqk_first_seen(a, pos[j])); to = max(to, pos[j]); }
        low = __reduce_min_sync(0xffffffffu, from);
        high = __reduce_max_sync(0xffffffffu, to);
    }
};

/* The tiles of queries that a block has: long ones first, every second round in reverse, so that blocks get about the same. */
template <int QUERIES> struct moqk_team_turn {
    int32_t round, items, tiles;
    __device__ __forceinline__ moqk_team_turn(const moqk_attend_args &a) : round(0)
    {
        tiles = (a.rows * a.share + QUERIES - 1) / QUERIES;
        items = tiles * a.c.kv_heads;
    }
    /* 0: no more. first_pair < 0: none in this round. */
    __device__ __forceinline__ int next(const moqk_attend_args &a, int32_t *first_pair, int32_t *kv_head)
    {
        const int32_t item = round * (int32_t)gridDim.x + (int32_t)(round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        if (round * (int32_t)gridDim.x >= items) return 0;
        round++;
        *kv_head = item % a.c.kv_heads;
        *first_pair = item < items ? (tiles - 1 - item / a.c.kv_heads) * QUERIES : -1;
        return 1;
    }
};

/* ---- keys and values ---- */

/* The kinds that a kernel reads: CALL(kind). */
#define MOQK_BY_KIND(TERMS, BF, kind, CALL) \
    if constexpr (TERMS == 3 && !BF) { CALL(MOQK_KV_F32); } \
    else if constexpr (BF) { \
        if (TERMS == 1 && (kind) == MOQK_KV_BF16) { CALL(MOQK_KV_BF16); } \
        else { CALL(MOQK_KV_MX4); } \
    } else if ((kind) == MOQK_KV_E4M3) { CALL(MOQK_KV_E4M3); } \
    else if ((kind) == MOQK_KV_I8) { CALL(MOQK_KV_I8); } \
    else { CALL(MOQK_KV_NV4); }

/* A tile that 128 threads copy: codes of 16 values go where their operands will lie, and become those when they are there. A thread has the same 16
   values of every 128 / (DIM / 16)-th row, and keeps the scales of 4-bit ones; eight neighbours have four of a row and four of the next one, whose pieces
   lie in other banks. */
template <int DIM, int KEYS> struct moqk_team_tile {
    static constexpr int STEP = 128 / (DIM / 16), EACH = KEYS / STEP, SLAB = KEYS * 128;
    static constexpr int LOW = DIM / 64 * SLAB; /* from a row's first parts to its second ones */
    uint32_t tile, scale[EACH];

    static __device__ __forceinline__ int chunk()
    {
        return (threadIdx.x & 3) + (DIM == 128 ? threadIdx.x >> 1 & 4 : DIM == 256 ? threadIdx.x >> 1 & 12 : 0);
    }
    static __device__ __forceinline__ int first_row()
    {
        return (int)(DIM == 64 ? threadIdx.x >> 2 & 31 : (threadIdx.x >> 2 & 1) + (DIM == 128 ? threadIdx.x >> 3 & 14 : threadIdx.x >> 4 & 6));
    }
    /* Where 16-byte piece `piece` of a row lies. */
    static __device__ __forceinline__ uint32_t at(int row, int piece) { return (uint32_t)((piece >> 3) * SLAB + row * 128 + (((piece ^ row) & 7) << 4)); }

    template <int KIND> __device__ __forceinline__ void ask(const moqk_kv &c, int64_t base, int32_t first, int32_t last)
    {
        constexpr int SCALED = KIND == MOQK_KV_NV4 || KIND == MOQK_KV_MX4;
        if constexpr (KIND == MOQK_KV_BF16) {
            const int thread = threadIdx.x & 127, piece = thread % (DIM / 8), row = thread / (DIM / 8), left = piece * 8 < c.padded ? last - first - row : -1;
            const uint8_t *from = c.codes + (base + first + row) * c.row_bytes + piece * 16;
            const int64_t step = (int64_t)c.row_bytes * (STEP / 2);
#pragma unroll
            for (int i = 0; i < 2 * EACH; i++, from += step) {
                const int there = i * (STEP / 2) <= left;
                moqk_copy_or_zero<16>(tile + at(row + i * (STEP / 2), piece), there ? from : c.codes, there);
            }
        } else {
            const int row = first_row(), left = chunk() * 16 < c.padded ? last - first - row : -1;
            const uint8_t *from = c.codes + (base + first + row) * c.row_bytes + chunk() * (KIND == MOQK_KV_F32 ? 64 : moqk_kv_bits(KIND) * 2);
            const uint8_t *scales = SCALED ? c.scales + (base + first + row) * c.blocks + chunk() / (KIND == MOQK_KV_MX4 ? 2 : 1) : NULL;
            const int64_t step = (int64_t)c.row_bytes * STEP;
#pragma unroll
            for (int i = 0; i < EACH; i++, from += step) {
                const int there = i * STEP <= left;
                const uint8_t *p = there ? from : c.codes;
                const uint32_t to = tile + at(row + i * STEP, 2 * chunk());
                if constexpr (SCALED) {
                    moqk_copy_or_zero<8>(to, p, there);
                    scale[i] = there ? __ldg(scales + (int64_t)i * STEP * c.blocks) : 0;
                } else if constexpr (KIND == MOQK_KV_F32) {
#pragma unroll
                    for (int k = 0; k < 4; k++) moqk_copy_or_zero<16>((to ^ (k & 1) << 4) + k / 2 * LOW, p + 16 * k, there);
                } else moqk_copy_or_zero<16>(to, p, there);
            }
        }
    }

    /* Some rows at a time: all their codes are read before the first operand is written. */
    template <int KIND> __device__ __forceinline__ void unpack() const
    {
        constexpr int SCALED = KIND == MOQK_KV_NV4 || KIND == MOQK_KV_MX4, WORDS = KIND == MOQK_KV_F32 ? 16 : SCALED ? 2 : 4;
        constexpr int BATCH = EACH == 1 ? 1 : KIND == MOQK_KV_F32 || EACH < 4 ? 2 : 4;
        if constexpr (KIND != MOQK_KV_BF16)
#pragma unroll
            for (int b = 0; b < EACH; b += BATCH) {
                uint32_t w[BATCH][WORDS], to[BATCH];
#pragma unroll
                for (int i = 0; i < BATCH; i++) {
                    to[i] = tile + at(first_row() + (b + i) * STEP, 2 * chunk());
                    if constexpr (SCALED) {
                        const uint2 v = moqk_read8(to[i]);
                        w[i][0] = v.x;
                        w[i][1] = v.y;
                    } else
#pragma unroll
                        for (int k = 0; k < WORDS / 4; k++) {
                            const uint4 v = moqk_read16((to[i] ^ (k & 1) << 4) + k / 2 * LOW);
                            w[i][4 * k] = v.x;
                            w[i][4 * k + 1] = v.y;
                            w[i][4 * k + 2] = v.z;
                            w[i][4 * k + 3] = v.w;
                        }
                }
#pragma unroll
                for (int i = 0; i < BATCH; i++) {
                    uint32_t hi[8], lo[8];
                    if constexpr (KIND == MOQK_KV_F32)
#pragma unroll
                        for (int k = 0; k < 8; k++) moqk_split16<0>(__uint_as_float(w[i][2 * k]), __uint_as_float(w[i][2 * k + 1]), &hi[k], &lo[k]);
                    else moqk_kv_unpack<KIND>(w[i], SCALED ? scale[b + i] : 0, hi);
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        moqk_shared_put16(to[i] ^ k << 4, hi + 4 * k);
                        if constexpr (KIND == MOQK_KV_F32) moqk_shared_put16((to[i] ^ k << 4) + LOW, lo + 4 * k);
                    }
                }
            }
    }
};

/* ---- queries ---- */

/* Where the values of query lane & 15 lie in rows of queries or results; the first of 16 is `first`. */
template <int DIM>
__device__ __forceinline__ int64_t moqk_team_start(const moqk_attend_args &a, int32_t first, int32_t kv_head, int64_t stride, int32_t dim)
{
    const int32_t share = moqk_anew<DIM>(a.share);
    const uint32_t pair = (uint32_t)min(first + (int32_t)(threadIdx.x & 15), a.rows * share - 1), row = pair / (uint32_t)share;
    return row * stride + (int64_t)(kv_head * share + (int32_t)(pair - row * (uint32_t)share)) * dim;
}

/* A team's queries as left operands, a warp for each 16 of them, a lane DIM / 32 neighbouring values. Four are on their way while the four before become
   operands. bias[i] = q . k_bias. */
template <typename R>
__device__ __forceinline__ void moqk_team_queries(const moqk_attend_args &a, const R &r, int32_t first_pair, int32_t kv_head, int team, float *bias)
{
    constexpr int DIM = R::DIM, BF = R::BF, N = DIM / 32, WIDE = R::A > 1, WORDS = WIDE ? N : N / 2; /* BF16 activations have one part */
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3, dim = moqk_anew<DIM>(a.c.k.dim), d = lane * N;
    const int whole = !((uintptr_t)a.q & 15) && a.q_stride % N == 0 && dim % N == 0;
    const float factor = !BF ? a.scale : a.scale < 0 ? -1.0f : 1.0f, turn = 1 / sqrtf((float)dim);
    const int64_t start = moqk_team_start<DIM>(a, first_pair + team * MOQK_TEAM_QUERIES + warp * 16, kv_head, a.q_stride, dim);
    uint32_t raw[4][WORDS] = {};
    moqk_sync_group(team);
#pragma unroll 1
    for (int next = 0; next <= 16; next += 4) {
        float v[4][N];
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int i = 0; i < N; i++)
                v[j][i] = __uint_as_float(WIDE ? raw[j][i * WORDS / N] : i % 2 ? raw[j][i / 2] & 0xffff0000u : raw[j][i / 2] << 16) * factor;
        if (next < 16) {
            int64_t from[4];
#pragma unroll
            for (int j = 0; j < 4; j++) from[j] = __shfl_sync(0xffffffffu, start, next + j) + d;
            if (whole) {
                if (d < dim)
#pragma unroll
                    for (int j = 0; j < 4; j++) moqk_kv_load<WORDS * 4>((const uint8_t *)a.q + from[j] * (WIDE ? 4 : 2), raw[j]);
            } else
#pragma unroll
                for (int j = 0; j < 4; j++)
#pragma unroll
                    for (int i = 0; i < N; i++) {
                        const uint32_t one = d + i < dim ? moqk_bits_any(a.q, from[j] + i, !WIDE) : 0;
                        if (WIDE || i % 2 == 0) raw[j][i * WORDS / N] = one;
                        else raw[j][i / 2] |= one << 16;
                    }
        }
        if (next == 0) continue;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int row = warp * 16 + next - 4 + j;
            if (a.c.k.rotate) { /* as moqk_rotate_rows */
#pragma unroll
                for (int k = 1; k < N; k *= 2)
                    if (k < dim)
#pragma unroll
                        for (int i = 0; i < N; i++) if (!(i & k)) { const float x = v[j][i], y = v[j][i | k]; v[j][i] = x + y; v[j][i | k] = x - y; }
                for (int k = 1; k * N < dim; k *= 2)
#pragma unroll
                    for (int i = 0; i < N; i++) {
                        const float other = __shfl_xor_sync(0xffffffffu, v[j][i], k);
                        v[j][i] = lane & k ? other - v[j][i] : v[j][i] + other;
                    }
#pragma unroll
                for (int i = 0; i < N; i++) v[j][i] *= turn;
            }
            if (a.c.k.bias) {
                float sum = 0;
#pragma unroll
                for (int i = 0; i < N; i++) if (d + i < dim) sum += v[j][i] * a.c.k.bias[(int64_t)kv_head * dim + d + i];
                sum = moqk_warp_sum(sum);
                if (lane == 0) bias[row] = sum;
            }
            const uint32_t to = r.queries(team) + d / 64 * 8192 + row * 128 + ((((uint32_t)d & 63) >> 3 ^ ((uint32_t)row & 7)) << 4) + (d & 7) * 2;
#pragma unroll
            for (int p = 0; p < R::A; p++) {
                uint32_t h[N / 2];
#pragma unroll
                for (int i = 0; i < N; i += 2) {
                    h[i / 2] = moqk_pack16<BF>(v[j][i], v[j][i + 1]);
                    const float2 f = moqk_unpack16<BF>(h[i / 2]);
                    v[j][i] -= f.x;
                    v[j][i + 1] -= f.y;
                }
                if constexpr (N == 8) moqk_shared_put16(to + p * R::PART, h);
                else if constexpr (N == 4) asm volatile("st.shared.v2.b32 [%0], {%1, %2};" :: "r"(to + p * R::PART), "r"(h[0]), "r"(h[1]) : "memory");
                else asm volatile("st.shared.b32 [%0], %1;" :: "r"(to + p * R::PART), "r"(h[0]) : "memory");
            }
        }
    }
#if MOQK_WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    moqk_sync_group(team);
}

/* ---- a team ---- */

/* Two probabilities as PARTS pairs of 16 bits. */
template <int PARTS, int BF> __device__ __forceinline__ void moqk_team_parts(float x, float y, uint32_t (&p)[PARTS])
{
#pragma unroll
    for (int k = 0; k < PARTS; k++) {
        p[k] = moqk_pack16<BF>(x, y);
        if (k == PARTS - 1) break;
        const float2 f = moqk_unpack16<BF>(p[k]);
        x -= f.x;
        y -= f.y;
    }
}

/* Lane (g, t) of a warp has rows g and g + 8 of its 16. Scores are compared and sums kept in powers of two: p = 2^(score * factor - top). F16 has
   few exponents: its p are up to 2^7, and BF16's up to 1, times the 2^8 that a maximum may grow before everything is scaled again. */
template <typename R> struct moqk_team {
    static constexpr int DIM = R::DIM;
    static constexpr float ROOM = R::BF ? 0.0f : 7.0f;
    float o[DIM / 2], s[R::KEYS / 2], top[2], sum[2], shrink[2], bias[2];
    int32_t from[2], to[2], all_from, all_to; /* positions that rows see, and that all rows of the warp see */
    float factor;

    /* Scores of KEYS positions from `first` on, s[at] and behind, become probabilities. */
    template <int KEYS> __device__ __forceinline__ void weigh(const moqk_attend_args &a, int32_t first, int at = 0)
    {
        const int t = threadIdx.x & 3;
        float by = factor, *p = s + at;
        if (a.softcap > 0) { /* cap tanh(x / cap), tanh(z) = 1 - 2 / (e^(2 z) + 1), in powers of two */
            const float cap = a.softcap * MOQK_LOG2E, in = 2 / a.softcap;
            by = 1;
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++) p[i] = cap - __fdividef(2 * cap, moqk_exp2((p[i] * factor + bias[i >> 1 & 1] * MOQK_LOG2E) * in) + 1);
        }
        if (first < all_from || first + KEYS - 1 > all_to)
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++) {
                const int32_t key = first + 8 * (i >> 2) + 2 * t + (i & 1);
                if (key < from[i >> 1 & 1] || key > to[i >> 1 & 1]) p[i] = -INFINITY;
            }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float best = fmaxf(p[2 * j], p[2 * j + 1]), more[2] = {0, 0};
#pragma unroll
            for (int i = 4; i < KEYS / 2; i += 4) best = fmaxf(best, fmaxf(p[2 * j + i], p[2 * j + i + 1]));
            best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
            best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2)) * by - ROOM;
            if (!(best > top[j] + 8)) best = top[j];
            shrink[j] = moqk_exp2(top[j] - best);
            top[j] = best;
#pragma unroll
            for (int i = 0; i < KEYS / 2; i += 4)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    float *v = &p[2 * j + i + k];
                    *v = moqk_exp2(fmaf(*v, by, -best));
                    more[k] += *v;
                }
            sum[j] = fmaf(sum[j], shrink[j], more[0] + more[1]);
        }
    }

    __device__ __forceinline__ void scale()
    {
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) o[i] *= shrink[i >> 1 & 1];
    }

    /* What rows g and g + 8 of the warp see, where they are of the run [begin, end) of a tile. */
    __device__ __forceinline__ void look(const moqk_attend_args &a, int32_t first_pair, int32_t index, int32_t begin, int32_t end)
    {
        const int32_t share = moqk_anew<DIM>(a.share);
#pragma unroll
        for (int j = 0; j < 2; j++, index += 8) {
            to[j] = a.pos[(uint32_t)min(first_pair + index, a.rows * share - 1) / (uint32_t)share];
            from[j] = index >= begin && index < end ? (int32_t)moqk_first_seen(a, to[j]) : INT32_MAX;
        }
        all_from = __reduce_max_sync(0xffffffffu, max(from[0], from[1]));
        all_to = __reduce_min_sync(0xffffffffu, min(to[0], to[1]));
    }

    /* q . k_bias is the same for all keys: without softcap it moves the sink alone. */
    __device__ __forceinline__ float sink_of(const moqk_attend_args &a, int32_t head, int j) const
    {
        return (a.sinks[head] - (a.softcap > 0 ? 0 : bias[j])) * MOQK_LOG2E;
    }

    __device__ __forceinline__ void begin(const moqk_attend_args &a, int32_t first_pair, int32_t kv_head, int32_t index, const float *biases)
    {
        const int32_t t = threadIdx.x & 3, share = moqk_anew<DIM>(a.share);
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) o[i] = 0;
#pragma unroll
        for (int j = 0; j < 2; j++, index += 8) {
            bias[j] = a.c.k.bias ? biases[index] : 0;
            top[j] = -1e30f;
            sum[j] = 0;
            const int32_t pair = min(first_pair + index, a.rows * share - 1), row = (int32_t)((uint32_t)pair / (uint32_t)share);
            if (!a.sinks) continue;
            top[j] = sink_of(a, kv_head * share + pair - row * share, j) - ROOM;
            sum[j] = t == 0 ? moqk_exp2(ROOM) : 0;
        }
    }

    /* y, through the room of the team's queries. v_bias comes to the probabilities of keys, not to that of a sink. */
    __device__ __forceinline__ void store(const moqk_attend_args &a, const R &r, int32_t first_pair, int32_t kv_head, int team) const
    {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, dim = moqk_anew<DIM>(a.c.v.dim);
        constexpr int wide = R::A > 1, pieces = DIM / 8 << wide; /* F32 activations, 16-byte pieces of a row */
        const int32_t first = (int32_t)(threadIdx.x >> 5 & 3) * 16, share = moqk_anew<DIM>(a.share), pairs = a.rows * share;
        const float unit = moqk_unit(a.c.v, kv_head), *v_bias = a.c.v.bias ? a.c.v.bias + (int64_t)kv_head * dim : NULL;
        const uint32_t room = r.queries(team) + (uint32_t)(first * pieces * 16);
        first_pair += team * MOQK_TEAM_QUERIES + first;
        moqk_sync_group(team); /* no warp's products read queries any more */
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int32_t pair = min(first_pair + g + 8 * j, pairs - 1), row = (int32_t)((uint32_t)pair / (uint32_t)share);
            const int32_t slot = a.slot[row], pos = a.pos[row];
            const int held = slot >= 0 && slot < a.c.slots && pos >= 0 && pos < a.c.capacity;
            float all = sum[j];
            all += __shfl_xor_sync(0xffffffffu, all, 1);
            all += __shfl_xor_sync(0xffffffffu, all, 2);
            const float sink = a.sinks ? moqk_exp2(sink_of(a, kv_head * share + pair - row * share, j) - top[j]) : 0;
            const float one = all != 0 && held ? 1 / all : 0, bias_by = (all - sink) * one, by = unit * one;
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
                const int d = 8 * n + 2 * t;
                float x = o[4 * n + 2 * j] * by, y = o[4 * n + 2 * j + 1] * by;
                if (v_bias) {
                    if (d < dim) x += bias_by * v_bias[d];
                    if (d + 1 < dim) y += bias_by * v_bias[d + 1];
                }
                const uint32_t narrow = room + (g + 8 * j) * (DIM * 2) + ((n ^ g) << 4) + 4 * t;
                const uint32_t twice = room + (g + 8 * j) * (DIM * 4) + (((2 * n + (t >> 1)) ^ 2 * g) << 4) + 8 * (t & 1);
                if (!wide) asm volatile("st.shared.b32 [%0], %1;" :: "r"(narrow), "r"(moqk_pack16<1>(x, y)) : "memory");
                else asm volatile("st.shared.v2.f32 [%0], {%1, %2};" :: "r"(twice), "f"(x), "f"(y) : "memory");
            }
        }
        __syncwarp();
        const int each = 8 >> wide, whole = !((uintptr_t)a.y & 15) && a.y_stride % each == 0 && dim % each == 0;
        const int64_t start = moqk_team_start<DIM>(a, first_pair, kv_head, a.y_stride, dim);
#pragma unroll 2
        for (int i = lane; i < 16 * pieces; i += 32) {
            const int row = i / pieces, piece = i % pieces;
            const int64_t to = __shfl_sync(0xffffffffu, start, row) + piece * each;
            if (first_pair + row >= pairs || piece * each >= dim) continue;
            const uint4 v = moqk_read16(room + (uint32_t)(row * pieces + (piece ^ (row & 7) << wide)) * 16);
            if (whole) *(uint4 *)((uint8_t *)a.y + to * (2 << wide)) = v;
            else {
                const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    if (k >= each || piece * each + k >= dim) continue;
                    if (wide) ((uint32_t *)a.y)[to + k] = w[k & 3];
                    else ((uint16_t *)a.y)[to + k] = (uint16_t)(w[k >> 1] >> (k & 1) * 16);
                }
            }
        }
    }
};

/* ------------------------------------------------------------------------------------------------
   >>cuda-attention-wgmma  the same on compute capability 9.0: wgmma; not for F32 caches with heads of more than 128 values, which do not fit
   Two teams (warpgroups) multiply; the warps of a third copy keys and values into two rings. A team's softmax of a tile runs beside its products with
   the values of the tile before, and beside the other team's. Blocks stay: while a tile's results are stored, the first keys of the next one are on
   their way.
   ------------------------------------------------------------------------------------------------ */

enum { MOQK_TEAMS_QUERIES = 2 * MOQK_TEAM_QUERIES };

template <int D, int TERMS, int B16> struct moqk_team_room {
    static constexpr int DIM = D, BF = B16, A = moqk_query_parts(TERMS, BF), B = TERMS == 3 && !BF ? 2 : 1;
    static constexpr int KEYS = DIM == 256 ? (A == 1 ? 64 : 32) : TERMS == 1 ? 128 : 64, STAGES = DIM == 256 || B == 2 ? 2 : TERMS == 1 ? 3 : 4;
    static constexpr int PART = DIM * 128;              /* bytes of a team's queries, one part: [DIM / 64][64][64] */
    static constexpr int SLAB = KEYS * 128;             /* of 64 values of a tile of keys or values */
    static constexpr int TILE = DIM / 64 * SLAB * B;    /* [part][DIM / 64][KEYS][64] */
    static constexpr int K_AT = 2 * A * PART, V_AT = K_AT + STAGES * TILE, BARRIERS_AT = V_AT + STAGES * TILE;
    static constexpr int SHARED = BARRIERS_AT + STAGES * 32 + 1024, FITS = SHARED <= 226 * 1024; /* in the shared memory of compute capability 9.0 */
    uint32_t base;
    __device__ __forceinline__ uint32_t queries(int team) const { return base + team * A * PART; }
    __device__ __forceinline__ uint32_t tile(int values, int stage) const { return base + (values ? V_AT : K_AT) + stage * TILE; }
    __device__ __forceinline__ uint32_t full(int values, int stage) const { return base + BARRIERS_AT + (values * STAGES + stage) * 8; }
    __device__ __forceinline__ uint32_t empty(int values, int stage) const { return full(values + 2, stage); }
};

#if MOQK_WGMMA
/* D[64 x N] (+)= A[64 x 16] B[16 x N], both in shared memory in rows of K; descriptors as moqk_x_desc. */
#define MOQK_WGMMA_SHARED(name, count, shape, list, at_a, at_b, more, ...) \
    __device__ __forceinline__ void name(float (&d)[count], uint32_t a, uint32_t b, int add) \
    { \
        asm volatile("{ .reg .pred p; .reg .b64 q, r; mov.b64 q, {%" #at_a ", 1073741888}; mov.b64 r, {%" #at_b ", 1073741888}; " \
                     "setp.ne.b32 p, %" #more ", 0; " \
                     "wgmma.mma_async.sync.aligned." shape " {" list "}, q, r, p, 1, 1, 0, 0; }" : __VA_ARGS__ : "r"(a), "r"(b), "r"(add)); \
    }
MOQK_WGMMA_SHARED(moqk_wgmma_keys_f16, 16, "m64n32k16.f32.f16.f16", MOQK_L16, 16, 17, 18, MOQK_D16("+f", 0))
MOQK_WGMMA_SHARED(moqk_wgmma_keys_bf16, 32, "m64n64k16.f32.bf16.bf16", MOQK_L32, 32, 33, 34, MOQK_D32("+f", 0))
MOQK_WGMMA_SHARED(moqk_wgmma_keys_f16, 32, "m64n64k16.f32.f16.f16", MOQK_L32, 32, 33, 34, MOQK_D32("+f", 0))
MOQK_WGMMA_SHARED(moqk_wgmma_keys_bf16, 64, "m64n128k16.f32.bf16.bf16", MOQK_L64, 64, 65, 66, MOQK_D32("+f", 0), MOQK_D32("+f", 32))
MOQK_WGMMA_SHARED(moqk_wgmma_keys_f16, 64, "m64n128k16.f32.f16.f16", MOQK_L64, 64, 65, 66, MOQK_D32("+f", 0), MOQK_D32("+f", 32))
/* The same of A in registers and B in rows of N: the transposed operand. */
#define MOQK_WGMMA_ONE(name, type, count, shape, signs, list, a0, a1, a2, a3, at, more, ...) \
    __device__ __forceinline__ void name(type (&d)[count], const uint32_t *a, uint32_t desc, int add) \
    { \
        asm volatile("{ .reg .pred p; .reg .b64 q; mov.b64 q, {%" #at ", 1073741888}; setp.ne.b32 p, %" #more ", 0; " \
                     "wgmma.mma_async.sync.aligned." shape " {" list "}, " \
                     "{%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, q, p" signs "; }" \
                     : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(desc), "r"(add)); \
    }
MOQK_WGMMA_ONE(moqk_wgmma_values_bf16, float, 32, "m64n64k16.f32.bf16.bf16", ", 1, 1, 1", MOQK_L32, 32, 33, 34, 35, 36, 37, MOQK_D32("+f", 0))
MOQK_WGMMA_ONE(moqk_wgmma_values_f16, float, 32, "m64n64k16.f32.f16.f16", ", 1, 1, 1", MOQK_L32, 32, 33, 34, 35, 36, 37, MOQK_D32("+f", 0))
MOQK_WGMMA_ONE(moqk_wgmma_values_bf16, float, 64, "m64n128k16.f32.bf16.bf16", ", 1, 1, 1", MOQK_L64, 64, 65, 66, 67, 68, 69, MOQK_D32("+f", 0),
              MOQK_D32("+f", 32))
MOQK_WGMMA_ONE(moqk_wgmma_values_f16, float, 64, "m64n128k16.f32.f16.f16", ", 1, 1, 1", MOQK_L64, 64, 65, 66, 67, 68, 69, MOQK_D32("+f", 0),
              MOQK_D32("+f", 32))

/* What the warps of the third warpgroup do: keys of a tile before the values of the one in front of it, as the teams use them. Two tiles are on
   their way in turn. */
template <int KIND, typename R> struct moqk_team_feed {
    struct tile_type : moqk_team_tile<R::DIM, R::KEYS> { uint32_t full; };
    moqk_stage k, v;

    __device__ __forceinline__ void ask(const moqk_attend_args &a, const R &r, tile_type &t, int values, int64_t base, int32_t first, int32_t last)
    {
        const moqk_stage s = values ? v : k;
        moqk_barrier_wait(r.empty(values, s.at), (uint32_t)s.parity ^ 1);
        t.tile = r.tile(values, s.at);
        t.full = r.full(values, s.at);
        t.template ask<KIND>(values ? a.c.v : a.c.k, base, first, last);
        if constexpr (KIND == MOQK_KV_BF16) asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(t.full) : "memory"); /* teams order it */
        else asm volatile("cp.async.commit_group;" ::: "memory");
        if (values) v.step(R::STAGES);
        else k.step(R::STAGES);
    }

    /* All but the last BEHIND tiles asked for are there: so is this one, for products too. */
    template <int BEHIND> __device__ __forceinline__ void give(const tile_type &t) const
    {
        if constexpr (KIND == MOQK_KV_BF16) return;
        asm volatile("cp.async.wait_group %0;" :: "n"(BEHIND) : "memory");
        t.template unpack<KIND>();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        moqk_barrier_arrive(t.full);
    }

    __device__ __forceinline__ void run(const moqk_attend_args &a, const R &r)
    {
        tile_type odd, even;
        moqk_team_turn<MOQK_TEAMS_QUERIES> turn(a);
        int32_t first_pair, kv_head;
        int some = 0;
        k = v = {0, 0};
        while (turn.next(a, &first_pair, &kv_head)) {
            if (first_pair < 0) continue;
            for (int32_t begin = 0; begin < MOQK_TEAMS_QUERIES;) {
                moqk_team_run<MOQK_TEAMS_QUERIES, R::DIM> run;
                run.find(a, first_pair, begin);
                begin = run.end;
                if (run.slot < 0) continue;
                const int64_t base = ((int64_t)run.slot * a.c.kv_heads + kv_head) * a.c.capacity;
                const int32_t low = run.low / R::KEYS, tiles = run.high / R::KEYS + 1 - low;
#pragma unroll 1
                for (int32_t i = 0; i < tiles; i++) { /* keys 0, keys 1, values 0, keys 2, values 1 ... the last values */
                    ask(a, r, odd, i > 0, base, (low + max(i - 1, 0)) * R::KEYS, run.high);
                    if (some) give<1>(even);
                    some = 1;
                    ask(a, r, even, i + 1 == tiles, base, (low + min(i + 1, tiles - 1)) * R::KEYS, run.high);
                    give<1>(odd);
                }
            }
        }
        if (some) give<0>(even);
    }
};

/* ---- a team ---- */

template <int D, int TERMS, int B16> struct moqk_team_wgmma : moqk_team<moqk_team_room<D, TERMS, B16>> {
    typedef moqk_team_room<D, TERMS, B16> R;
    typedef moqk_team<R> T;
    static constexpr int DIM = R::DIM, BF = R::BF, WIDE = DIM == 64 ? 64 : 128; /* values of a product */
    using T::o; using T::s; using T::shrink; using T::scale;
    uint32_t p[R::A][R::KEYS / 4];
    moqk_stage keys, values;

    __device__ __forceinline__ void multiply_keys(const R &r, int team)
    {
        moqk_barrier_wait(r.full(0, keys.at), (uint32_t)keys.parity);
        if (TERMS == 1 && BF) asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); /* BF16 comes by plain copies */
        const uint32_t q = moqk_x_desc(r.queries(team)), k = moqk_x_desc(r.tile(0, keys.at));
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int part = 0; part < R::A + R::B - 1; part++) { /* products of both low parts are left out */
            const int qp = part < R::A ? part : 0, kp = part < R::A ? 0 : 1;
#pragma unroll
            for (int i = 0; i < DIM / 16; i++) {
                const uint32_t qd = q + (qp * R::PART + i / 4 * 8192 + i % 4 * 32) / 16, kd = k + ((kp * (DIM / 64) + i / 4) * R::SLAB + i % 4 * 32) / 16;
                if constexpr (BF) moqk_wgmma_keys_bf16(s, qd, kd, part + i > 0);
                else moqk_wgmma_keys_f16(s, qd, kd, part + i > 0);
            }
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }

    __device__ __forceinline__ void multiply_values(const R &r)
    {
        moqk_barrier_wait(r.full(1, values.at), (uint32_t)values.parity);
        if (TERMS == 1 && BF) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        const uint32_t v = r.tile(1, values.at) >> 4 | (uint32_t)(R::SLAB / 16) << 16; /* slabs of 64 columns; 8 positions are 1024 bytes */
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int part = 0; part < R::A + R::B - 1; part++) {
            const int pp = part < R::A ? part : 0, vp = part < R::A ? 0 : 1;
#pragma unroll
            for (int i = 0; i < R::KEYS / 16; i++)
#pragma unroll
                for (int d = 0; d < DIM; d += WIDE) {
                    const uint32_t vd = v + ((vp * DIM + d) / 64 * R::SLAB + i * 2048) / 16;
                    float (&to)[WIDE / 2] = *(float (*)[WIDE / 2])(o + d / 2);
                    if constexpr (BF) moqk_wgmma_values_bf16(to, p[pp] + 4 * i, vd, 1);
                    else moqk_wgmma_values_f16(to, p[pp] + 4 * i, vd, 1);
                }
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }

    /* All products but those of the last BEHIND groups have ended: their stage is free. */
    template <int BEHIND> __device__ __forceinline__ void wait(const R &r, int of_values, moqk_stage &stage)
    {
        asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(BEHIND) : "memory");
        if ((threadIdx.x & 31) == 0) moqk_barrier_arrive(r.empty(of_values, stage.at));
        stage.step(R::STAGES);
    }

    /* Nothing multiplies with p any more. */
    __device__ __forceinline__ void pack()
    {
#pragma unroll
        for (int i = 0; i < R::KEYS / 4; i++) {
            uint32_t parts[R::A];
            moqk_team_parts<R::A, BF>(s[2 * i], s[2 * i + 1], parts);
#pragma unroll
            for (int k = 0; k < R::A; k++) p[k][i] = parts[k];
        }
    }

    /* o += all tiles of a run of queries. */
    __device__ __forceinline__ void run(const moqk_attend_args &a, const R &r, int team, int32_t first, int32_t last)
    {
        multiply_keys(r, team);
        wait<0>(r, 0, keys);
        moqk_settle(s);
        T::template weigh<R::KEYS>(a, first);
        scale();
        pack();
#pragma unroll 1
        for (first += R::KEYS; first <= last; first += R::KEYS) {
            asm volatile("bar.sync %0, 256;" :: "r"(3 + team) : "memory"); /* teams multiply in turn, so one's softmax falls on the other's products */
            multiply_keys(r, team);
            multiply_values(r);
            asm volatile("bar.arrive %0, 256;" :: "r"(4 - team) : "memory");
            wait<1>(r, 0, keys);
            moqk_settle(s);
            T::template weigh<R::KEYS>(a, first);
            moqk_settle(s);
            /* two ways to wait, because the compiler would move one up, before the softmax; all warps of the group must take the same */
            if (moqk_any_of_group(team, shrink[0] != 1 || shrink[1] != 1)) {
                asm volatile("wgmma.wait_group.sync.aligned 0; // and scale" ::: "memory");
                moqk_settle(o);
                scale();
            } else asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            moqk_settle(o);
            moqk_settle(s);
            wait<0>(r, 1, values);
            pack();
        }
        multiply_values(r);
        wait<0>(r, 1, values);
        moqk_settle(o);
    }
};
#endif

/* Grid: at most as many blocks as tiles of 128 queries for all kv heads. */
template <int DIM, int TERMS, int BF> __global__ void __launch_bounds__(384, 1) moqk_attend_wgmma(const __grid_constant__ moqk_attend_args a)
{
#if MOQK_WGMMA
    typedef moqk_team_room<DIM, TERMS, BF> R;
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ float biases[MOQK_TEAMS_QUERIES];
    const int team = threadIdx.x >> 7;
    R r;
    r.base = moqk_shared_at(shared) + (-moqk_shared_at(shared) & 1023);
    if (threadIdx.x < 2 * R::STAGES) {
        moqk_barrier_init(r.full(0, threadIdx.x), 128);
        moqk_barrier_init(r.empty(0, threadIdx.x), 8);
    }
    __syncthreads();
    if (team == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(56));
#define MOQK_CALL(KIND) moqk_team_feed<KIND, R>().run(a, r)
        MOQK_BY_KIND(TERMS, BF, a.c.k.kind, MOQK_CALL)
#undef MOQK_CALL
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(224));
    const int32_t index = team * MOQK_TEAM_QUERIES + (int32_t)(threadIdx.x >> 5 & 3) * 16 + (int32_t)(threadIdx.x >> 2 & 7);
    moqk_team_wgmma<DIM, TERMS, BF> m;
    if (team == 1) asm volatile("bar.arrive 3, 256;" ::: "memory");
    m.keys = m.values = {0, 0};
    moqk_team_turn<MOQK_TEAMS_QUERIES> turn(a);
    int32_t first_pair, kv_head;
    while (turn.next(a, &first_pair, &kv_head)) {
        if (first_pair < 0) continue;
        m.factor = moqk_unit(a.c.k, kv_head) * (BF ? fabsf(a.scale) : 1) * MOQK_LOG2E;
        moqk_team_queries<R>(a, r, first_pair, kv_head, team, biases + team * MOQK_TEAM_QUERIES);
        m.begin(a, first_pair, kv_head, index, biases);
        for (int32_t begin = 0; begin < MOQK_TEAMS_QUERIES;) {
            moqk_team_run<MOQK_TEAMS_QUERIES, R::DIM> run;
            run.find(a, first_pair, begin);
            m.look(a, first_pair, index, begin, run.end);
            begin = run.end;
            if (run.slot >= 0) m.run(a, r, team, run.low / R::KEYS * R::KEYS, run.high);
        }
        m.store(a, r, first_pair, kv_head, team);
    }
#endif
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-attention-sync   the same on every device: mma.sync; on compute capability 9.0 what does not fit above
   One or two teams, whose threads copy and unpack too: while all multiply a tile, the next one is on its way. Fits into 99 KB of shared memory.
   ------------------------------------------------------------------------------------------------ */

/* Queries of all teams, then STAGES tiles of keys and of values. */
template <int D, int TERMS, int B16> struct moqk_sync_room {
    static constexpr int DIM = D, BF = B16, A = moqk_query_parts(TERMS, BF), B = TERMS == 3 && !BF ? 2 : 1;
    static constexpr int TEAMS = DIM * A <= 256 ? 2 : 1, QUERIES = TEAMS * MOQK_TEAM_QUERIES, THREADS = TEAMS * 128;
    static constexpr int PART = DIM * 128;              /* bytes of a team's queries, one part: [DIM / 64][64][64] */
    static constexpr int KEYS = DIM == 64 ? 64 : DIM == 256 || B == 2 ? 16 : A == 1 ? 64 : 32;
    static constexpr int SLAB = KEYS * 128, TILE = DIM / 64 * SLAB * B; /* [part][DIM / 64][KEYS][64] */
    static constexpr int PARTS = DIM == 128 && KEYS == 64 ? 2 : 1; /* of a tile: one's scores become probabilities beside the next one's products */
    static constexpr int STAGES = DIM == 256 && B == 2 ? 1 : 2;
    static constexpr int K_AT = TEAMS * A * PART, V_AT = K_AT + STAGES * TILE, SHARED = V_AT + STAGES * TILE;
    static constexpr int BLOCKS = DIM == 64 && A == 1 ? 2 : 1; /* of a multiprocessor */
    static_assert(SHARED + QUERIES * 4 + 1024 <= 99 * 1024, "shared memory of every device");
    uint32_t base;
    __device__ __forceinline__ uint32_t queries(int team) const { return base + team * A * PART; }
    __device__ __forceinline__ uint32_t tile(int values, int stage) const { return base + (values ? V_AT : K_AT) + stage * TILE; }
};

template <int D, int TERMS, int B16> struct moqk_team_sync : moqk_team<moqk_sync_room<D, TERMS, B16>> {
    typedef moqk_sync_room<D, TERMS, B16> R;
    typedef moqk_team<R> T;
    static constexpr int DIM = R::DIM, BF = R::BF, HELD = R::A == 1; /* queries stay in registers */
    static constexpr int EACH = R::KEYS / R::PARTS;
    using T::o; using T::s;
    uint32_t q_at, k_at, v_at; /* of the lane's row of matrices: queries; keys, values from a tile on */
    uint32_t q[HELD ? DIM / 16 : 1][4];

    /* 16 bytes `piece` + 2 i of a row: (piece ^ row) << 4, to be exchanged with i << 5 within a slab. */
    static __device__ __forceinline__ uint32_t row_at(int row, int piece) { return (uint32_t)(row * 128 + (((piece ^ row) & 7) << 4)); }
    static __device__ __forceinline__ uint32_t step_at(uint32_t row, int step, int slab)
    {
        return (row ^ (uint32_t)(step & 3) << 5) + (uint32_t)((step >> 2) * slab);
    }

    __device__ __forceinline__ void open(const R &r, int team)
    {
        const int lane = threadIdx.x & 31;
        q_at = r.queries(team) + row_at((int)(threadIdx.x >> 5 & 3) * 16 + (lane & 15), lane >> 4);
        k_at = row_at((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
        v_at = row_at(lane & 15, lane >> 4);
    }

    __device__ __forceinline__ void hold()
    {
        if constexpr (HELD)
#pragma unroll
            for (int i = 0; i < DIM / 16; i++) moqk_load_matrices(step_at(q_at, i, 8192), q[i]);
    }

    /* s = queries times keys of a part of a tile. Sums of one score wait for each other: few keys have two sets of them. */
    __device__ __forceinline__ void multiply_keys(uint32_t tile, int part)
    {
        constexpr int SETS = EACH == 16 ? 2 : 1;
        float more[SETS == 2 ? EACH / 2 : 1], *const sums = s + part * (EACH / 2);
#pragma unroll
        for (int i = 0; i < EACH / 2; i++) sums[i] = more[SETS == 2 ? i : 0] = 0;
        tile += k_at + (uint32_t)(part * EACH * 128);
#pragma unroll
        for (int d = 0; d < DIM / 16; d++) {
            float *to = SETS == 2 && d & 1 ? more : sums;
            uint32_t a[R::A][4], k[EACH / 16][4];
            const uint32_t at = step_at(tile, d, R::SLAB);
#pragma unroll
            for (int n = 0; n < EACH / 16; n++) moqk_load_matrices(at + n * 2048, k[n]);
            if constexpr (HELD)
#pragma unroll
                for (int i = 0; i < 4; i++) a[0][i] = q[d][i];
            else
#pragma unroll
                for (int i = 0; i < R::A; i++) moqk_load_matrices(step_at(q_at, d, 8192) + i * R::PART, a[i]);
#pragma unroll
            for (int i = 0; i < R::A; i++)
#pragma unroll
                for (int n = 0; n < EACH / 8; n++) moqk_attend_mma<BF>(to + 4 * n, a[i], k[n / 2][n % 2 * 2], k[n / 2][n % 2 * 2 + 1]);
            if constexpr (R::B == 2) {
#pragma unroll
                for (int n = 0; n < EACH / 16; n++) moqk_load_matrices(at + DIM / 64 * R::SLAB + n * 2048, k[n]);
#pragma unroll
                for (int n = 0; n < EACH / 8; n++) moqk_attend_mma<BF>(to + 4 * n, a[0], k[n / 2][n % 2 * 2], k[n / 2][n % 2 * 2 + 1]);
            }
        }
        if constexpr (SETS == 2)
#pragma unroll
            for (int i = 0; i < EACH / 2; i++) sums[i] += more[i];
    }

    /* o += probabilities times values of a part of a tile. */
    __device__ __forceinline__ void multiply_values(uint32_t tile, int part)
    {
        const float *const sums = s + part * (EACH / 2);
        tile += v_at + (uint32_t)(part * EACH * 128);
#pragma unroll
        for (int i = 0; i < EACH / 16; i++) {
            uint32_t p[R::A][4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t parts[R::A];
                moqk_team_parts<R::A, BF>(sums[8 * i + 2 * j], sums[8 * i + 2 * j + 1], parts);
#pragma unroll
                for (int k = 0; k < R::A; k++) p[k][j] = parts[k];
            }
#pragma unroll
            for (int d = 0; d < DIM / 16; d++) {
                const uint32_t at = step_at(tile, d, R::SLAB) + i * 2048;
                uint32_t v[4];
                moqk_turned_matrices(at, v);
#pragma unroll
                for (int k = 0; k < R::A; k++)
#pragma unroll
                    for (int n = 0; n < 2; n++) moqk_attend_mma<BF>(o + 8 * d + 4 * n, p[k], v[2 * n], v[2 * n + 1]);
                if constexpr (R::B == 2) {
                    moqk_turned_matrices(at + DIM / 64 * R::SLAB, v);
#pragma unroll
                    for (int n = 0; n < 2; n++) moqk_attend_mma<BF>(o + 8 * d + 4 * n, p[0], v[2 * n], v[2 * n + 1]);
                }
            }
        }
    }
};

/* The tiles that a thread copies: of two teams one has the keys and one the values. */
template <int D, int TERMS, int B16> struct moqk_sync_feed {
    typedef moqk_sync_room<D, TERMS, B16> R;
    moqk_team_tile<R::DIM, R::KEYS> tiles[2 / R::TEAMS];

    __device__ __forceinline__ void ask(const moqk_attend_args &a, const R &r, int team, int stage, int64_t base, int32_t first, int32_t last)
    {
#pragma unroll
        for (int i = 0; i < 2 / R::TEAMS; i++) {
            const int values = R::TEAMS == 2 ? team : i;
            const moqk_kv &c = values ? a.c.v : a.c.k;
            tiles[i].tile = r.tile(values, stage);
#define MOQK_CALL(KIND) tiles[i].template ask<KIND>(c, base, first, last)
            MOQK_BY_KIND(TERMS, B16, c.kind, MOQK_CALL)
#undef MOQK_CALL
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    /* What this thread has asked for is there, as operands. */
    __device__ __forceinline__ void give(const moqk_attend_args &a) const
    {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
#pragma unroll
        for (int i = 0; i < 2 / R::TEAMS; i++) {
#define MOQK_CALL(KIND) tiles[i].template unpack<KIND>()
            MOQK_BY_KIND(TERMS, B16, a.c.k.kind, MOQK_CALL)
#undef MOQK_CALL
        }
    }
};

/* Grid: at most as many blocks as tiles of queries for all kv heads. */
template <int DIM, int TERMS, int BF>
__global__ void __launch_bounds__(moqk_sync_room<DIM, TERMS, BF>::THREADS, moqk_sync_room<DIM, TERMS, BF>::BLOCKS)
moqk_attend_sync(const __grid_constant__ moqk_attend_args a)
{
    if constexpr (!MOQK_WGMMA || !moqk_team_room<DIM, TERMS, BF>::FITS) { /* else >>cuda-attention-wgmma does it */
        typedef moqk_sync_room<DIM, TERMS, BF> R;
        extern __shared__ __align__(128) uint8_t shared[];
        __shared__ float biases[R::QUERIES];
        const int team = threadIdx.x >> 7;
        const int32_t index = (int32_t)(threadIdx.x >> 5) * 16 + (int32_t)(threadIdx.x >> 2 & 7);
        R r;
        moqk_team_sync<DIM, TERMS, BF> m;
        moqk_sync_feed<DIM, TERMS, BF> feed;
        moqk_team_turn<R::QUERIES> turn(a);
        moqk_team_run<R::QUERIES, DIM> run;
        int64_t base = 0;
        int32_t first_pair, kv_head, first = 0;
        int stage = 0;
        r.base = moqk_shared_at(shared);
        m.open(r, team);
        /* The next run of queries, and its first keys and values on their way: nobody reads that stage any more. */
        const auto start = [&](int32_t begin) {
            run.find(a, first_pair, begin);
            if (run.slot < 0) return;
            base = ((int64_t)run.slot * a.c.kv_heads + kv_head) * a.c.capacity;
            first = run.low / R::KEYS * R::KEYS;
            feed.ask(a, r, team, stage, base, first, run.high);
        };
        int there = turn.next(a, &first_pair, &kv_head) && first_pair >= 0; /* a round that has none is the last one */
        if (there) start(0);
        while (there) {
            m.factor = moqk_unit(a.c.k, kv_head) * (BF ? fabsf(a.scale) : 1) * MOQK_LOG2E;
            moqk_team_queries<R>(a, r, first_pair, kv_head, team, biases + team * MOQK_TEAM_QUERIES);
            m.begin(a, first_pair, kv_head, index, biases);
            m.hold();
            for (int32_t begin = 0;;) {
                m.look(a, first_pair, index, begin, run.end);
                if (run.slot >= 0)
#pragma unroll 1
                    for (; first <= run.high; first += R::KEYS) {
                        const int here = stage, more = first + R::KEYS <= run.high;
                        feed.give(a);
                        __syncthreads(); /* all of this tile is there, and nobody reads the one before any more */
                        if (R::STAGES == 2) stage ^= 1;
                        if (R::STAGES == 2 && more) feed.ask(a, r, team, stage, base, first + R::KEYS, run.high);
                        m.multiply_keys(r.tile(0, here), 0);
#pragma unroll
                        for (int part = 0; part < R::PARTS; part++) {
                            if (part + 1 < R::PARTS) m.multiply_keys(r.tile(0, here), part + 1);
                            m.template weigh<m.EACH>(a, first + part * m.EACH, part * (m.EACH / 2));
                            if (__any_sync(0xffffffffu, m.shrink[0] != 1 || m.shrink[1] != 1)) m.scale();
                            m.multiply_values(r.tile(1, here), part);
                        }
                        if (R::STAGES == 1) __syncthreads();
                        if (R::STAGES == 1 && more) feed.ask(a, r, team, stage, base, first + R::KEYS, run.high);
                    }
                begin = run.end;
                if (begin == R::QUERIES) break;
                start(begin);
            }
            const int32_t done_pair = first_pair, done_head = kv_head;
            there = turn.next(a, &first_pair, &kv_head) && first_pair >= 0;
            if (there) start(0); /* beside what follows */
            m.store(a, r, done_pair, done_head, team);
        }
    }
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-attention-host   which of them runs
   ------------------------------------------------------------------------------------------------ */

static size_t moqc_tiles_bytes(const moqk_cache *k) { return (size_t)MOQK_QUERIES * 4 * (size_t)(2 * (moqc_max(k->k.padded, k->v.padded) + 4) + MOQK_QUERIES + 4); }

typedef void (*moqc_teams_kernel)(moqk_attend_args);

/* A kernel of attention of many queries: threads, shared memory, queries of a tile, blocks of a multiprocessor. NULL: none. */
typedef struct moqc_teams { moqc_teams_kernel kernel; int threads, shared, queries, blocks; } moqc_teams;

/* MXFP4 has more exponents than F16, and in BF16 mode too few bits are left of a F32 query: it has parts. */
template <int DIM> static moqc_teams moqc_teams_for(int kind, int terms, int wgmma)
{
#define MOQC_SYNC(T, B) {moqk_attend_sync<DIM, T, B>, moqk_sync_room<DIM, T, B>::THREADS, moqk_sync_room<DIM, T, B>::SHARED, \
                         moqk_sync_room<DIM, T, B>::QUERIES, moqk_sync_room<DIM, T, B>::BLOCKS}
#define MOQC_TEAMS(T, B) \
    typedef moqk_team_room<DIM, T, B> room; \
    if constexpr (room::FITS) { if (wgmma) return {moqk_attend_wgmma<DIM, T, B>, 384, room::SHARED, MOQK_TEAMS_QUERIES, 1}; } \
    return MOQC_SYNC(T, B)
    if (kind == MOQK_KV_MX4 && terms > 1) {
        if constexpr (DIM > 128) return {NULL, 0, 0, 1, 1}; /* three parts of queries do not fit */
        else { MOQC_TEAMS(3, 1); }
    }
    if (kind == MOQK_KV_BF16 || kind == MOQK_KV_MX4) { MOQC_TEAMS(1, 1); }
    if (terms == 3) { MOQC_TEAMS(3, 0); }
    if (terms == 2) { MOQC_TEAMS(2, 0); }
    MOQC_TEAMS(1, 0);
#undef MOQC_TEAMS
#undef MOQC_SYNC
}

static moqc_teams moqc_teams_find(int kind, int terms, int dim, int wgmma)
{
    return dim == 64 ? moqc_teams_for<64>(kind, terms, wgmma) : dim == 128 ? moqc_teams_for<128>(kind, terms, wgmma) : moqc_teams_for<256>(kind, terms, wgmma);
}

/* More shared memory than 48 KiB must be asked for, once for each device. */
static cudaError_t moqc_allow_shared(int most, int wgmma)
{
    int bytes = most < 98304 ? most : 98304;
    cudaError_t e = cudaSuccess;
#define MOQC_ALLOW(f) if (e == cudaSuccess) e = cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)
    MOQC_ALLOW(moqk_attend_tiles<1>);
    MOQC_ALLOW(moqk_attend_tiles<2>);
    MOQC_ALLOW(moqk_attend_tiles<4>);
#undef MOQC_ALLOW
    for (int kind = 0; kind <= MOQK_KV_MX4; kind++)
        for (int terms = 1; terms <= 3; terms++)
            for (int dim = 64; dim <= 256; dim *= 2) {
                const moqc_teams t = moqc_teams_find(kind, terms, dim, wgmma);
                if (e == cudaSuccess && t.kernel) e = cudaFuncSetAttribute((const void *)t.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, t.shared);
            }
    return e;
}

/* Many queries on tensor cores; 0: there is no kernel for this cache. */
static int moqc_attend_many(moqc_ctx *c, const moqk_attend_args *a)
{
    int kind = a->c.k.kind, dim = (int)moqc_max(a->c.k.padded, a->c.v.padded), terms = kind == MOQK_KV_F32 ? 3 : c->bf16 ? 1 : 2;
    if (kind == MOQK_KV_BF16) terms = 1;
    if (terms == 3 && (int64_t)a->rows * a->share < 4 * MOQK_TEAM_QUERIES) return 0; /* so little that exact F32 is as fast */
    const moqc_teams t = moqc_teams_find(kind, terms, dim <= 64 ? 64 : dim <= 128 ? 128 : 256, c->wgmma);
    if (!t.kernel) return 0;
    const int64_t tiles = moqk_ceil((int64_t)a->rows * a->share, t.queries) * a->c.kv_heads;
    t.kernel<<<(unsigned)moqc_min(tiles, (int64_t)c->sm_count * t.blocks), (unsigned)t.threads, (size_t)t.shared, c->stream>>>(*a);
    return 1;
}

static void moqc_attend_tiles(moqc_ctx *c, const moqk_attend_args *a)
{
    dim3 grid((unsigned)moqk_ceil((int64_t)a->rows * a->share, MOQK_QUERIES), (unsigned)a->c.kv_heads);
    size_t shared = moqc_tiles_bytes(&a->c);
    int wide = a->c.v.padded;
    if (wide <= 64) moqk_attend_tiles<1><<<grid, 128, shared, c->stream>>>(*a);
    else if (wide <= 128) moqk_attend_tiles<2><<<grid, 128, shared, c->stream>>>(*a);
    else moqk_attend_tiles<4><<<grid, 128, shared, c->stream>>>(*a);
}

/* Splits of `groups` blocks per row, so that `room` blocks are there; `least` positions each. */
static int32_t moqc_attend_cut(const moqk_attend_args *a, int64_t length, int64_t groups, int64_t room, int64_t least)
{
    int64_t splits = moqc_min(moqc_max(1, room / (groups * a->rows)), moqk_ceil(length, least));
    return (int32_t)moqc_max(1, moqc_min(splits, MOQC_PARTIALS / moqc_max(1, (int64_t)a->rows * a->heads)));
}

typedef void (*moqc_stream_kernel)(moqk_attend_args);

/* loose: heads have fewer values than `dim`. */
static moqc_stream_kernel moqc_stream_find(int kind, int dim, int loose)
{
#define MOQC_CALL(K) return dim == 64 ? moqk_attend_stream<K, 64, 0> : dim == 128 ? moqk_attend_stream<K, 128, 0> : moqk_attend_stream<K, 256, 0>
    if (loose) return kind == MOQK_KV_BF16 ? moqk_attend_stream<MOQK_KV_BF16, 128, 1> : kind == MOQK_KV_E4M3 ? moqk_attend_stream<MOQK_KV_E4M3, 128, 1>
                                                                                                           : moqk_attend_stream<MOQK_KV_I8, 128, 1>;
    switch (kind) {
    case MOQK_KV_BF16: MOQC_CALL(MOQK_KV_BF16);
    case MOQK_KV_E4M3: MOQC_CALL(MOQK_KV_E4M3);
    case MOQK_KV_I8: MOQC_CALL(MOQK_KV_I8);
    case MOQK_KV_NV4: MOQC_CALL(MOQK_KV_NV4);
    default: MOQC_CALL(MOQK_KV_MX4);
    }
#undef MOQC_CALL
}

enum { MOQC_STREAM_ALONE = 256, MOQC_STREAM_CLUSTERED = 2048 };

/* One block per multiprocessor. Up to MOQC_STREAM_ALONE positions one block takes them all: adding up what two came to costs more than the second
   saves. Up to MOQC_STREAM_CLUSTERED those that a cluster holds: it adds up without the memory. Of more, blocks wait for each other in memory. */
static void moqc_attend_stream(moqc_ctx *c, moqk_attend_args *a, int64_t length)
{
    const int kind = a->c.k.kind, dim = moqc_stream_dim(&a->c), step = moqk_stream_step(kind, dim);
    const int64_t groups = (int64_t)a->c.kv_heads * moqk_ceil(a->share, 8), quads = moqc_min(a->share, 8) * (dim / 4);
    int warps = moqk_stream_warps(kind, dim), join = 0;
    moqc_stream_kernel kernel = moqc_stream_find(kind, dim, a->c.k.dim < dim);
    a->splits = moqc_attend_cut(a, length, groups, c->sm_count, length <= MOQC_STREAM_ALONE ? MOQC_STREAM_ALONE : 2 * MOQK_KEYS);
    a->clustered = c->sm >= 90 && a->splits > 1 && (length <= MOQC_STREAM_CLUSTERED || !c->cooperates);
    if (!a->clustered && !c->cooperates) a->splits = 1;
    a->shift = 0;
    if (a->clustered) a->splits = (int32_t)moqc_min(a->splits, MOQK_STREAM_SPLITS);
    a->given = a->splits > 1 && !a->clustered ? c->given : NULL; /* no more blocks than multiprocessors then */
    a->given_stats = (int64_t)c->sm_count * (MOQC_GIVEN / 6) * c->given_dim;
    while (a->splits > 1 && (int64_t)a->splits << a->shift < quads) a->shift++;
    if (a->splits > 1) join = (a->splits << a->shift) * 24;
    if (moqk_ceil(length, a->splits) <= warps / 2 * MOQK_STREAM_KEYS) warps /= 2;
    const int64_t steps = moqk_ceil(moqk_ceil(length, a->splits), warps * MOQK_STREAM_KEYS); /* a row beyond `length` would overrun shorter rings */
    a->places = (int32_t)moqc_max(2, moqc_min(steps, moqk_stream_stages(kind, dim)));
    while (warps > 1 && warps * a->places * step + moqk_stream_room(dim) + join > c->most_shared - 3072) {
        warps /= 2;
        a->places = moqk_stream_stages(kind, dim);
    }
    a->ahead = c->sm >= 90 && !a->given && a->rows * groups * a->splits <= c->sm_count; /* blocks that wait for each other begin when all others have ended */
    const dim3 grid((unsigned)a->splits, (unsigned)groups, (unsigned)a->rows);
    int shared = warps * a->places * step + moqk_stream_room(dim) + join;
    if (a->given) shared = (int)moqc_max(shared, c->most_shared / 2 + 1024); /* two of them on one multiprocessor would keep all others waiting */
    if (c->capturing) moqc_all_shared(c, (const void *)kernel);
    moqc_launch_early(c, kernel, grid, 32 * warps, shared, a->clustered ? a->splits : a->given ? 0 : 1, "attention", *a);
}

/* Query heads of a block, and splits: as many as fill the device once, at least MOQK_KEYS positions each. */
static void moqc_attend_split(moqc_ctx *c, moqk_attend_args *a, int64_t length)
{
    const int exact = a->c.k.kind == MOQK_KV_F32; /* other caches come here with heads of unusual sizes: fewer kernels for them */
    const int heads = a->share <= 1 ? 1 : !exact ? 4 : a->share <= 2 ? 2 : a->share <= 4 ? 4 : 8;
    const int64_t groups = (int64_t)a->c.kv_heads * moqk_ceil(a->share, heads);
    if (moqc_stream_dim(&a->c)) { moqc_attend_stream(c, a, length); return; }
    a->splits = moqc_attend_cut(a, length, groups, c->sm_count * 4, MOQK_KEYS);
    a->partial = a->splits > 1 ? c->partial : NULL;
    a->stats = (float2 *)(void *)(c->partial + (int64_t)a->rows * a->heads * a->splits * moqk_pad(a->c.v.dim, 4));
    a->arrived = c->arrived;
    dim3 grid((unsigned)a->splits, (unsigned)groups, (unsigned)a->rows);
    const size_t first = (size_t)heads * (size_t)(a->c.k.padded + MOQK_KEYS) * 4;
    const size_t last = (size_t)(128 / (a->c.v.padded / 4)) * (size_t)heads * (size_t)a->c.v.padded * 4;
    size_t shared = first > last ? first : last, join = (size_t)heads * (size_t)a->splits * 4;
    if (join > shared) shared = join;
    void (*kernel)(moqk_attend_args) = heads == 1 ? moqk_attend<MOQK_KV_F32, 1> : heads == 2 ? moqk_attend<MOQK_KV_F32, 2>
                                     : heads == 4 ? moqk_attend<MOQK_KV_F32, 4> : moqk_attend<MOQK_KV_F32, 8>;
    if (!exact) kernel = heads == 1 ? moqk_attend<MOQK_KV_ANY, 1> : moqk_attend<MOQK_KV_ANY, 4>;
    moqc_chain(c, "attention", kernel, grid, 128, shared, *a);
}

/* May heads wait for their attention? Those of one row, whose cache >>cuda-attention-stream reads. */
static int moqc_enter_waits(const moqc_ctx *c, const moq_batch *b, const moq_heads_desc *h)
{
    const moqk_cache *d = &((const moqc_cache *)(const void *)h->cache)->d;
    return c->capturing && b->rows == 1 && moqc_stream_dim(d) == d->k.dim && !d->k.rotate;
}

/* The heads that wait, by the attention that reads them; 0: they do not fit it. Blocks would write what others read where buffers touch. */
static int moqc_enter_in_attention(moqc_ctx *c, const moq_batch *b, const moq_attention_desc *d, moqk_attend_args *a)
{
    moqc_held *h = c->held;
    const int elem = c->bf16 ? 2 : 4;
    const int64_t q = (int64_t)d->heads * a->c.k.dim * elem, kv = (int64_t)a->c.kv_heads * a->c.k.dim * elem;
    if (!h->enters || h->heads.cache != d->cache || h->heads.q != d->q || h->heads.heads != d->heads) return 0;
    if (b->rows != 1 || b->slot != h->batch.slot || b->pos != h->batch.pos) return 0;
    if (!moqc_apart(d->y, q, d->q, q) || !moqc_apart(d->y, q, h->heads.k, kv) || !moqc_apart(d->y, q, h->heads.v, kv) || !moqc_apart(d->q, q, h->heads.k, kv) ||
        !moqc_apart(d->q, q, h->heads.v, kv)) return 0;
    a->enters = 1;
    a->enter = h->heads;
    h->enters = c->waiting = 0;
    return 1;
}

/* Tiles pay where rows share a sequence, which the host knows only when there are more rows than slots. They are not cut by positions: of few rows, whose
   tiles leave most of the device idle, each reads a cache that streams for itself. */
static void moqc_attention(moq_backend *be, const moq_batch *b, const moq_attention_desc *d)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c, 1);
    moqk_attend_args a;
    memset(&a, 0, sizeof a);
    a.c = ((const moqc_cache *)(const void *)d->cache)->d;
    a.slot = b->slot;
    a.pos = b->pos;
    a.q = d->q;
    a.y = d->y;
    a.sinks = d->sinks;
    a.q_stride = d->q_stride;
    a.y_stride = d->y_stride;
    a.heads = d->heads;
    a.share = d->heads / a.c.kv_heads;
    a.window = d->window;
    a.chunk = d->chunk;
    a.bf16 = c->bf16;
    a.scale = d->scale != 0 ? d->scale : 1 / sqrtf((float)a.c.k.dim);
    a.softcap = d->softcap;
    c->narrowed = NULL;
    if (!moqc_enter_in_attention(c, b, d, &a)) moqc_let_go(c);
    int64_t most_seen = d->chunk > 0 ? d->chunk : d->window, length = moqc_min(most_seen > 0 ? most_seen : INT32_MAX, (int64_t)b->max_pos + 1);
    int tiles = b->rows >= (moqc_stream_dim(&a.c) ? MOQC_FEW_ROWS + 1 : 8) && b->rows > a.c.slots && a.c.k.padded <= 256 && a.c.v.padded <= 256;
    int64_t most = tiles ? b->rows : moqc_min(b->rows, 32768);
    for (int64_t first = 0; first < b->rows; first += most) {
        a.rows = (int32_t)moqc_min(most, b->rows - first);
        if (tiles && !moqc_attend_many(c, &a)) moqc_attend_tiles(c, &a);
        if (!tiles) moqc_attend_split(c, &a, length);
        a.slot += a.rows;
        a.pos += a.rows;
        a.q = (const uint8_t *)a.q + a.rows * a.q_stride * (c->bf16 ? 2 : 4);
        a.y = (uint8_t *)a.y + a.rows * a.y_stride * (c->bf16 ? 2 : 4);
    }
    moqc_launched(c, "attention");
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-moe        mixtures of experts: routing, grouping, the weighted sum
   Routing, grouping, both products and the weighted sum stay on the device; launches depend on numbers of rows only.
   ------------------------------------------------------------------------------------------------ */

/* Choices of a pass: sorted by expert, then by row. */
typedef struct moqk_choices {
    int32_t *index;             /* [rows, top] expert of a row's choice */
    float *weight;              /* [rows, top] */
    int32_t *place;             /* [rows, top] where that choice stands when sorted */
    int32_t *row_of, *expert_of; /* [sorted] */
    int32_t *tiles;             /* [count, -, -, -], then [tiles][expert, first, count, -] */
} moqk_choices;

/* The best of the open candidates of a warp, the lowest index of equals; -1: none is open. */
__device__ __forceinline__ int32_t moqk_take_best(const float *value, uint8_t *open, int32_t n)
{
    float best = 0;
    int32_t at = -1, lane = threadIdx.x;
    for (int32_t i = lane; i < n; i += 32)
        if (open[i] && (at < 0 || value[i] > best)) { best = value[i]; at = i; }
    for (int o = 16; o > 0; o >>= 1) {
        float v = __shfl_xor_sync(0xffffffffu, best, o);
        int32_t i = __shfl_xor_sync(0xffffffffu, at, o);
        if (i >= 0 && (at < 0 || v > best || (v == best && i < at))) { best = v; at = i; }
    }
    __syncwarp();
    if (at >= 0 && lane == 0) open[at] = 0;
    __syncwarp();
    return at;
}

/* A group's score: its largest p (softmax) or the sum of its two largest p + bias (sigmoid); experts of the others are closed. */
__device__ void moqk_close_groups(const moq_routing &r, const float *p, const float *rank, uint8_t *open, float *score, uint8_t *group_open)
{
    int32_t size = r.experts / r.groups;
    for (int32_t g = threadIdx.x; g < r.groups; g += 32) {
        const float *v = (r.score == MOQ_SCORE_SIGMOID ? rank : p) + g * size;
        float first = v[0], second = -3e38f;
        for (int32_t i = 1; i < size; i++) {
            if (v[i] > first) { second = first; first = v[i]; }
            else if (v[i] > second) second = v[i];
        }
        score[g] = r.score == MOQ_SCORE_SIGMOID && size > 1 ? first + second : first;
        group_open[g] = 1;
    }
    __syncwarp();
    for (int32_t i = 0; i < r.top_groups; i++) moqk_take_best(score, group_open, r.groups);
    for (int32_t e = threadIdx.x; e < r.experts; e += 32) open[e] = !group_open[e / size];
    __syncwarp();
}

/* A warp chooses for one row: experts, best first, and their weights. Shared memory: p, rank, score [experts], open, group_open [experts]. */
__device__ __noinline__ void moqk_choose(const moq_routing &r, const float *bias, const void *logits, int32_t bf16, int64_t row, float *p, int32_t *index, float *weight)
{
    float *rank = p + r.experts, *score = rank + r.experts, sum = 0, top = -3.4e38f;
    uint8_t *open = (uint8_t *)(score + r.experts), *group_open = open + r.experts;
    int32_t lane = threadIdx.x, plain = r.score == MOQ_SCORE_SIGMOID && r.groups <= 1;
    for (int32_t e = lane; e < r.experts; e += 32) top = fmaxf(top, moqk_get_any(logits, row * r.experts + e, bf16));
    top = moqk_warp_max(top);
    for (int32_t e = lane; e < r.experts; e += 32) {
        float v = moqk_get_any(logits, row * r.experts + e, bf16);
        p[e] = r.score == MOQ_SCORE_SIGMOID ? 1 / (1 + expf(-v)) : expf(v - top);
        sum += p[e];
    }
    sum = moqk_warp_sum(sum);
    for (int32_t e = lane; e < r.experts; e += 32) {
        if (r.score == MOQ_SCORE_SOFTMAX) p[e] /= sum;
        rank[e] = bias ? p[e] + bias[e] : plain ? moqk_get_any(logits, row * r.experts + e, bf16) : p[e];
        open[e] = 1;
    }
    __syncwarp();
    if (r.groups > 1) moqk_close_groups(r, p, rank, open, score, group_open);
    sum = 0;
    for (int32_t i = 0; i < r.top_k; i++) {
        int32_t e = moqk_take_best(rank, open, r.experts); /* with NaN lanes may differ: what lane 0 takes is open, and counts */
        sum += p[e];
        if (lane == 0) { index[i] = e; weight[i] = p[e]; }
    }
    if (lane != 0) return;
    float factor = r.scale != 0 ? r.scale : 1;
    if (r.renormalize && sum > 0) factor /= sum;
    for (int32_t i = 0; i < r.top_k; i++) weight[i] *= factor;
}

/* x as products of BF16 want it: rows of BF16 hi, then of BF16(x - hi); x16 NULL: nothing is wanted. */
typedef struct moqk_halves {
    const float *x;            /* [rows, cols] */
    uint8_t *x16;              /* [rows][2][cols] */
    int32_t cols;              /* a multiple of 4 */
} moqk_halves;

__device__ __forceinline__ void moqk_halve(const moqk_halves &a, int64_t row, int32_t thread, int32_t threads)
{
    if (!a.x16) return;
    for (int32_t i = thread; i < a.cols / 4; i += threads) {
        const float4 v = *(const float4 *)(const void *)(a.x + row * a.cols + 4 * i);
        const uint32_t p = moqk_pack(v.x, v.y), q = moqk_pack(v.z, v.w);
        uint2 *to = (uint2 *)(void *)(a.x16 + row * a.cols * 4) + i;
        to[0] = make_uint2(p, q);
        to[a.cols / 4] = make_uint2(moqk_pack(v.x - __uint_as_float(p << 16), v.y - __uint_as_float(p & 0xffff0000u)),
                                    moqk_pack(v.z - __uint_as_float(q << 16), v.w - __uint_as_float(q & 0xffff0000u)));
    }
}

/* Numbers in the order of logits, 0 less than all of them. NaN comes first: it is chosen, and seen in the result. */
__device__ __forceinline__ uint32_t moqk_few_key(float v)
{
    const uint32_t bits = __float_as_uint(v + 0.0f);
    return v != v ? 0xffffffffu : (int32_t)bits < 0 ? ~bits : bits | 0x80000000u;
}

/* The same without groups, of up to 32 * EACH experts and 32 choices: what a lane looks at stays in its registers. */
template <int EACH>
__device__ __forceinline__ void moqk_choose_plain(const moq_routing &r, const float *bias, const void *logits, int32_t bf16, int64_t row, int32_t *index,
                                                  float *weight)
{
    const int32_t lane = threadIdx.x, sigmoid = r.score == MOQ_SCORE_SIGMOID;
    float p[EACH], own = 0, all = 0, top = -3.4e38f;
    uint32_t key[EACH];        /* in the order of scores; 0: taken or none */
    int32_t chosen = 0;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int32_t e = lane + 32 * j;
        p[j] = e < r.experts ? moqk_get_any(logits, row * r.experts + e, bf16) : 0;
        key[j] = e < r.experts ? moqk_few_key(p[j]) : 0;
        if (e < r.experts) top = fmaxf(top, p[j]);
    }
    top = moqk_warp_max(top);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int32_t e = lane + 32 * j;
        p[j] = sigmoid ? 1 / (1 + expf(-p[j])) : expf(p[j] - top);
        if (e < r.experts) all += p[j];
    }
    all = moqk_warp_sum(all);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        if (!sigmoid) p[j] /= all;
        if (bias && key[j]) key[j] = moqk_few_key(p[j] + bias[lane + 32 * j]);
    }
    all = 0;
#pragma unroll 1
    for (int32_t i = 0; i < r.top_k; i++) {
        uint32_t best = key[0];
#pragma unroll
        for (int j = 1; j < EACH; j++) best = max(best, key[j]);
        best = __reduce_max_sync(0xffffffffu, best);
        int32_t e = -1;
        float v = 0;
#pragma unroll
        for (int j = 0; j < EACH; j++) { /* of equals the first one */
            const uint32_t same = __ballot_sync(0xffffffffu, key[j] == best);
            if (e >= 0 || same == 0) continue;
            e = 32 * j + __ffs(same) - 1;
            if (lane == (e & 31)) { v = p[j]; key[j] = 0; }
        }
        v = __shfl_sync(0xffffffffu, v, e & 31);
        all += v;
        if (lane == i) { own = v; chosen = e; }
    }
    float factor = r.scale != 0 ? r.scale : 1;
    if (r.renormalize && all > 0) factor /= all;
    if (lane < r.top_k) {
        index[lane] = chosen;
        weight[lane] = own * factor;
    }
    __syncwarp();
}

__device__ __forceinline__ void moqk_choose_row(const moq_routing &r, const float *bias, const void *logits, int32_t bf16, int64_t row, float *room,
                                                int32_t *index, float *weight)
{
    if (r.groups > 1 || r.top_k > 32 || r.experts > 512) moqk_choose(r, bias, logits, bf16, row, room, index, weight);
    else if (r.experts <= 128) moqk_choose_plain<4>(r, bias, logits, bf16, row, index, weight);
    else moqk_choose_plain<16>(r, bias, logits, bf16, row, index, weight);
}

/* A block of one warp a row. With a single row it also writes what moqk_group would: its choices are all different. */
__global__ void moqk_route(moq_routing r, const float *bias, const void *logits, int32_t bf16, moqk_choices k, int32_t alone, moqk_halves h)
{
    extern __shared__ float p[];
    moqk_follow();
    moqk_choose_row(r, bias, logits, bf16, blockIdx.x, p, k.index + (int64_t)blockIdx.x * r.top_k, k.weight + (int64_t)blockIdx.x * r.top_k);
    moqk_halve(h, blockIdx.x, threadIdx.x, 32);
    if (!alone || threadIdx.x != 0) return;
    k.tiles[0] = r.top_k;
    for (int32_t i = 0; i < r.top_k; i++) {
        int32_t *tile = k.tiles + 4 * (i + 1);
        k.place[i] = i;
        k.row_of[i] = 0;
        k.expert_of[i] = tile[0] = k.index[i];
        tile[1] = i;
        tile[2] = 1;
    }
}

/* Counting sort of the choices by expert, and tiles of at most `most` choices of one expert. Blocks of 32 x 32 threads: each counts all choices, those of
   the blocks before it, and those that its warps place. room: all [experts], before [experts], places [warps][experts], sums [2][32]. */
enum { MOQK_SORT_COUNTS = 4096 };
__host__ __device__ static inline int32_t moqk_sort_warps(int32_t experts) { return experts <= MOQK_SORT_COUNTS / 32 ? 32 : MOQK_SORT_COUNTS / experts; }
__host__ __device__ static inline int32_t moqk_sort_bytes(int32_t experts) { return ((2 + moqk_sort_warps(experts)) * experts + 64) * 4; }

__device__ void moqk_sort(const moqk_choices &k, int32_t count, int32_t top, int32_t experts, int32_t most, const int32_t *index, int32_t *room,
                          int32_t share, int32_t shares)
{
    const int32_t lane = threadIdx.x, warp = threadIdx.y, thread = warp * 32 + lane, warps = moqk_sort_warps(experts);
    const int32_t each = (int32_t)moqk_pad(moqk_ceil(count, warps * shares), 32), first = share * warps * each, last = first + warps * each;
    int32_t *all = room, *before = all + experts, *places = before + experts, *sums = places + warps * experts;
    for (int32_t i = thread; i < (2 + warps) * experts; i += 1024) room[i] = 0;
    __syncthreads();
#pragma unroll 4
    for (int32_t i = thread; i < count; i += 1024) {
        const int32_t e = index[i];
        atomicAdd(all + e, 1);
        if (i < first) atomicAdd(before + e, 1);
        else if (i < last) atomicAdd(places + (i - first) / each * experts + e, 1);
    }
    __syncthreads();
    const int32_t own = experts > 1024 ? 2 : 1, e0 = thread * own;
    int32_t n[2] = {0, 0}, tiles[2] = {0, 0};
    for (int32_t j = 0; j < own && e0 + j < experts; j++) {
        n[j] = all[e0 + j];
        tiles[j] = (n[j] + most - 1) / most;
    }
    int32_t a = n[0] + n[1], b = tiles[0] + tiles[1]; /* of the experts up to the thread's */
    for (int o = 1; o < 32; o <<= 1) {
        const int32_t u = __shfl_up_sync(0xffffffffu, a, o), v = __shfl_up_sync(0xffffffffu, b, o);
        if (lane >= o) { a += u; b += v; }
    }
    if (lane == 31) { sums[warp] = a; sums[32 + warp] = b; }
    __syncthreads();
    int32_t u = lane < warp ? sums[lane] : 0, v = lane < warp ? sums[32 + lane] : 0;
    for (int o = 16; o > 0; o >>= 1) { u += __shfl_xor_sync(0xffffffffu, u, o); v += __shfl_xor_sync(0xffffffffu, v, o); }
    a += u;
    b += v;
    if (thread == 1023 && share == 0) k.tiles[0] = b;
    a -= n[0] + n[1];
    b -= tiles[0] + tiles[1];
    for (int32_t j = 0; j < own && e0 + j < experts; a += n[j], b += tiles[j], j++) {
        int32_t at = a + before[e0 + j];
        for (int32_t w = 0; w < warps; w += 8) {
            int32_t c[8];
#pragma unroll
            for (int i = 0; i < 8; i++) c[i] = w + i < warps ? places[(w + i) * experts + e0 + j] : 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (w + i < warps) places[(w + i) * experts + e0 + j] = at;
                at += c[i];
            }
        }
        for (int32_t i = 0; i < tiles[j] && share == 0; i++) {
            int32_t *tile = k.tiles + 4 * (b + i + 1);
            tile[0] = e0 + j;
            tile[1] = a + i * most;
            tile[2] = min(most, n[j] - i * most);
        }
    }
    __syncthreads();
    for (int32_t i = first + warp * each + lane, end = min(first + (warp + 1) * each, count); warp < warps && i - lane < end; i += 32) {
        const int32_t e = i < end ? index[i] : -1;
        const uint32_t same = __match_any_sync(0xffffffffu, e);
        const int32_t place = e < 0 ? 0 : places[warp * experts + e] + __popc(same & ((1u << lane) - 1));
        __syncwarp();
        if (e >= 0) {
            if (lane == __ffs(same) - 1) places[warp * experts + e] += __popc(same);
            k.place[i] = place;
            k.row_of[place] = i / top;
            k.expert_of[place] = e;
        }
        __syncwarp();
    }
}

__global__ void __launch_bounds__(1024) moqk_group(moqk_choices k, int32_t count, int32_t top, int32_t experts, int32_t most)
{
    extern __shared__ int32_t room[];
    moqk_follow();
    moqk_sort(k, count, top, experts, most, k.index, room, blockIdx.x, gridDim.x);
}

/* Both for up to MOQK_ROUTED rows, a warp a row, in the first block; the others lay out x. Threads: 32 x 32. at: where choices lie in shared memory. */
enum { MOQK_ROUTED = 32 };
__global__ void __launch_bounds__(1024) moqk_route_all(moq_routing r, const float *bias, const void *logits, int32_t bf16, moqk_choices k, int32_t rows,
                                                       int32_t most, moqk_halves h, int32_t at)
{
    extern __shared__ int32_t room[];
    const int32_t warp = threadIdx.y, each = (r.experts * 14 + 15) / 16 * 16; /* bytes of a row, see moqk_choose */
    moqk_follow();
    if (blockIdx.x > 0) {
        moqk_halve(h, blockIdx.x - 1, warp * 32 + threadIdx.x, 1024);
        return;
    }
    int32_t *index = room + at / 4;
    if (warp < rows)
        moqk_choose_row(r, bias, logits, bf16, warp, (float *)(void *)((uint8_t *)room + warp * each), index + warp * r.top_k, k.weight + warp * r.top_k);
    __syncthreads();
    moqk_sort(k, rows * r.top_k, r.top_k, r.experts, most, index, room, 0, 1);
}

/* y[row] = sum of weight * expert output, in the order of the choice. A thread has four columns. Grid: rows, pieces of 4 * threads columns. */
template <typename S, typename T> __global__ void moqk_combine(moqk_choices k, int32_t top, const S *out, int64_t n, T *y)
{
    moqk_follow();
    const int64_t row = blockIdx.x, i = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * 4;
    const int whole = n % 4 == 0 && ((uintptr_t)y & 15) == 0;
    float sum[4] = {0, 0, 0, 0};
    if (i >= n) return;
    for (int64_t j = row * top; j < (row + 1) * top; j++) {
        const float weight = k.weight[j];
        const S *from = out + k.place[j] * n + i;
        if (whole) {
            const float4 v = moqk_get4(from);
            sum[0] += weight * v.x;
            sum[1] += weight * v.y;
            sum[2] += weight * v.z;
            sum[3] += weight * v.w;
        } else for (int u = 0; u < 4 && i + u < n; u++) sum[u] += weight * (float)from[u];
    }
    if (whole) moqk_put4(y + row * n + i, make_float4(sum[0], sum[1], sum[2], sum[3]));
    else for (int u = 0; u < 4 && i + u < n; u++) moqk_put(y, row * n + i + u, sum[u]);
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-moe-few    mixtures of experts, up to 4 rows on SM90, 4-bit weights: each chosen expert is read once, in one launch
   In a recording the launch of one row makes norm and logits, too: each block the norm of its own, and a part of the router's product for all.
   Every block chooses the experts itself, a warp or, for a single row with many choices, eight, while others fetch x; the runs of chunks of a block, or of two
   that are a cluster, are listed: of its row tiles before the activation, then of its row tiles of y. A warp takes every n-th run of the list and has its next
   chunks on their way, those of the second products while the first ones are not done. What goes from the first products to the second ones is its own
   signal: a word of `hidden` that is not MOQK_FEW_ABSENT is there, so nobody waits for more than it reads; sums of a single row are, too. Blocks must
   run at the same time: the launch is cooperative. Sums have a fixed order. A launch takes ten to thirty microseconds, in which most of this code runs
   once: short code is fast code here.
   ------------------------------------------------------------------------------------------------ */

enum {
    MOQK_FEW_ROWS = 4,         /* of x in one pass: with two columns each they are the 8 columns of a product */
    MOQK_FEW_TOP = 16,
    MOQK_FEW_EXPERTS = 512,
    MOQK_FEW_WARPS = 24,
    MOQK_FEW_LISTERS = 4,      /* warps that list a single row's runs and mark its sums absent while others choose and fetch x */
    MOQK_FEW_VOTERS = 8,       /* warps that choose more than four experts for a single row, of MOQK_FEW_RANKED at most: a thread looks at half of them */
    MOQK_FEW_RANKED = MOQK_FEW_VOTERS * 16,
    MOQK_FEW_UNITS = 4,        /* row tiles of a block before the activation whose sums are under way */
    MOQK_FEW_TILES = 16,       /* row tiles of y of a block, for several rows */
    MOQK_FEW_STAGES = 2,       /* chunks of a warp in shared memory; of one row one of them is on its way, as `hidden` waits behind all that are */
    MOQK_FEW_PITCH = 528       /* bytes of a row of a chunk's x */
};

#define MOQK_FEW_ABSENT 0xffffffffu /* of a value of `hidden`, two BF16, and of a sum of one row: no rounding makes a NaN of these bits */

/* The products before or after the activation. Parts are alike: experts x [gate, up], [up] or [down]. */
typedef struct moqk_few_side {
    const uint8_t *packed;     /* of the first part */
    const float *bias;         /* of the first part, or NULL */
    int64_t part_bytes, expert_bytes; /* from one part's to the next one's, of both; the same of experts */
    int32_t parts, rows, tiles, chunks; /* parts of an expert; of a part: rows, row tiles, chunks of a row tile */
    int32_t run, runs;         /* chunks of a run; runs of a row tile */
    int32_t units, each;       /* row tiles of a block or pair at most; runs of one, of all parts */
    uint32_t magic, runs_magic, run_magic; /* see moqk_few_over: of `each`, `runs` and `run` */
    int32_t groups, shift;     /* see moqk_run_part */
} moqk_few_side;

/* The router of a single row and the norm before it, which the launch makes itself. A warp of a block multiplies every ways-th chunk of a row tile, as one
   of >>cuda-decode would, and every block adds up the sums of all. */
typedef struct moqk_few_router {
    const uint8_t *packed;     /* BF16 in the form of >>cuda-decode; NULL: logits and x are there */
    const float *bias;         /* [experts] or NULL */
    const void *x;             /* [cols] of the activation type, before the norm */
    void *logits;              /* [experts] of the activation type */
    moqk_own_norm norm;
    int32_t tiles, chunks, ways; /* row tiles; chunks of one, of 64 columns */
    float factor;
} moqk_few_router;

typedef struct moqk_few {
    moq_routing routing;
    moqk_few_router router;
    const float *bias;         /* [experts] of the routing, or NULL */
    const void *logits;        /* [rows, experts] of the activation type */
    const void *x;             /* [rows, cols] of the activation type */
    const float *factor;       /* [experts][2 or 1 of the first side, 1 of the second] */
    uint32_t *hidden;          /* [2] of sums of the router, `routed` F32 of [ways][row tiles][16], then
                                  [MOQK_FEW_ROWS][top][chunks of the second side][hi, lo][128] times the choice's weight, two BF16 a word; see state.
                                  Of one row of BF16 activations hi is all there is. */
    int32_t routed;            /* a multiple of 4 */
    int32_t *state;            /* which half a launch uses; rows that the one before it wrote to the other half, which it clears */
    void *y;                   /* [rows, rows of the second side] of the activation type */
    void *into;                /* the same: y is added to it; or NULL. See >>cuda-together */
    moqk_few_side side[2];
    moq_activation_desc activation;
    int32_t rows, cols, hidden_cols;
    int32_t pairs;             /* may blocks be pairs? */
    int32_t team;              /* 0: a block alone; 1: two blocks of a cluster share a list, of one row */
    int32_t duo;               /* 1: two blocks of a cluster share row tiles of y: as `team`, or of several rows every second run of them */
    uint32_t tiles_magic, grid_magic, duo_magic; /* of the row tiles of the first side; of the blocks or pairs that have row tiles of each side */
    uint32_t x_pitch;          /* bytes */
    uint32_t bars_at, x_at, stage_at, sums_at, more_at, half_at, factor_at, keys_at, logits_at, into_at, list_at; /* in shared memory */
    uint8_t bf16;
} moqk_few;

/* What every block finds out for itself; in shared memory. */
typedef struct moqk_few_choices {
    int32_t count;             /* different experts, of all rows together */
    int32_t expert[MOQK_FEW_ROWS * MOQK_FEW_TOP];
    uint8_t rank[MOQK_FEW_ROWS * MOQK_FEW_TOP][MOQK_FEW_ROWS]; /* 1 + number of the row's choice that is this expert; 0: it is none */
    int32_t chosen[MOQK_FEW_ROWS][MOQK_FEW_TOP];
    float weight[MOQK_FEW_ROWS][MOQK_FEW_TOP];
    uint32_t seen[MOQK_FEW_EXPERTS / 32];
    int32_t arrived[MOQK_FEW_UNITS]; /* runs of a row tile whose sums are there */
    int32_t done[MOQK_FEW_UNITS];    /* row tiles that have left the place */
    int32_t added[MOQK_FEW_TILES];   /* runs of a row tile of y that are in its sums, less all of the block's */
    uint64_t ready;            /* the weights are there */
    int2 state;
} moqk_few_choices;

/* What the key of a logit was made of. */
__device__ __forceinline__ float moqk_few_logit(uint32_t key) { return __uint_as_float((int32_t)key < 0 ? key & 0x7fffffffu : ~key); }

/* Expert e of a row, as a key; 0: there is none. */
__device__ __forceinline__ uint32_t moqk_few_read(const moqk_few &a, const void *logits, int32_t row, int32_t e)
{
    const int32_t at = row * a.routing.experts + min(e, a.routing.experts - 1);
    const uint32_t bits = a.bf16 ? (uint32_t)((const uint16_t *)logits)[at] << 16 : ((const uint32_t *)logits)[at];
    return e < a.routing.experts ? moqk_few_key(__uint_as_float(bits)) : 0;
}

/* Puts the better one of two experts of a lane, keys and places, first: of equals the one with the lower place. */
__device__ __forceinline__ void moqk_few_sort(uint32_t &key, uint32_t &at, uint32_t &other, uint32_t &other_at)
{
    const int swap = other > key || (other == key && other_at < at);
    const uint32_t k = key, p = at;
    key = swap ? other : key;
    at = swap ? other_at : at;
    other = swap ? k : other;
    other_at = swap ? p : other_at;
}

/* A warp: choices of a row where scores rank them as logits do. A lane has `each` neighbouring experts: the first lane of equals has the first one.
   keys: [rows][32][each], where a lane has more than four: these stay in its registers, in order. */
__device__ __forceinline__ void moqk_few_choose(const moqk_few &a, const void *logits, int32_t row, uint32_t *keys, moqk_few_choices *c)
{
    const int32_t lane = threadIdx.x, each = ((a.routing.experts + 127) >> 7) * 4, first = lane * each;
    const uint32_t before = (1u << lane) - 1;
    uint32_t *own = keys + (row * 32 + lane) * each, best = 0, v[4], place[4];
    int32_t at = 0;
#pragma unroll 1
    for (int32_t k = 0; k < each; k += 4) {
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = moqk_few_read(a, logits, row, first + k + i); /* all on their way before the first one is looked at */
#pragma unroll
        for (int i = 0; i < 4; i++) {
            place[i] = (uint32_t)i;
            if (each > 4) own[k + i] = v[i];
            if (v[i] > best) best = v[i], at = k + i;
        }
    }
    if (each == 4) {
        moqk_few_sort(v[0], place[0], v[1], place[1]);
        moqk_few_sort(v[2], place[2], v[3], place[3]);
        moqk_few_sort(v[0], place[0], v[2], place[2]);
        moqk_few_sort(v[1], place[1], v[3], place[3]);
        moqk_few_sort(v[1], place[1], v[2], place[2]);
        uint32_t places = place[0] | place[1] << 8 | place[2] << 16 | place[3] << 24;
#pragma unroll 1
        for (int32_t i = 0; i < a.routing.top_k; i++) {
            const uint32_t most = __reduce_max_sync(0xffffffffu, v[0]), equal = __ballot_sync(0xffffffffu, v[0] == most);
            if (v[0] == most && (equal & before) == 0) {
                c->chosen[row][i] = first + (int32_t)(places & 255);
                c->weight[row][i] = moqk_few_logit(most);
                v[0] = v[1];
                v[1] = v[2];
                v[2] = v[3];
                v[3] = 0;
                places >>= 8;
            }
        }
        return;
    }
#pragma unroll 1
    for (int32_t i = 0; i < a.routing.top_k; i++) {
        const uint32_t most = __reduce_max_sync(0xffffffffu, best), equal = __ballot_sync(0xffffffffu, best == most);
        if (best != most || (equal & before) != 0) continue;
        c->chosen[row][i] = first + at;
        c->weight[row][i] = moqk_few_logit(most);
        own[at] = 0;
        best = 0;
#pragma unroll 1
        for (int32_t k = 0; k < each; k++)
            if (own[k] > best) best = own[k], at = k;
    }
}

/* Is a single row's choice made by moqk_few_rank? Of one row and at most MOQK_FEW_RANKED experts it is faster. */
__device__ __forceinline__ int moqk_few_ranks(const moqk_few &a, int plain)
{
    return plain && a.routing.top_k > 4 && a.routing.experts <= MOQK_FEW_RANKED && blockDim.y > 12;
}

/* The same by MOQK_FEW_VOTERS warps: an expert's place is the number of those before it. The pair of lanes of an expert share the others. keys:
   [MOQK_FEW_RANKED], of which no expert's is 0 and all others are. */
__device__ __forceinline__ void moqk_few_rank(const moqk_few &a, const uint32_t *keys, moqk_few_choices *c)
{
    const int32_t thread = threadIdx.y * 32 + threadIdx.x, e = thread >> 1, half = thread & 1;
    asm volatile("bar.sync 1, %0;" :: "n"(MOQK_FEW_VOTERS * 32) : "memory");
    const uint32_t own = keys[e];
    const uint4 *all = (const uint4 *)(const void *)keys;
    int32_t before = 0;
#pragma unroll 8
    for (int32_t i = half; i < MOQK_FEW_RANKED / 4; i += 2) {
        const uint4 v = all[i];
        const uint32_t limit = i < e >> 2 ? own - 1 : own; /* equals: the first one is better */
        before += (v.x > limit) + (v.y > limit) + (v.z > limit) + (v.w > limit);
    }
    if (half == 0) {
        const uint4 v = all[e >> 2];
        before += ((e & 3) > 0 && v.x == own) + ((e & 3) > 1 && v.y == own) + ((e & 3) > 2 && v.z == own);
    }
    before += __shfl_xor_sync(0xffffffffu, before, 1);
    if (half || e >= a.routing.experts || before >= a.routing.top_k) return;
    c->chosen[0][before] = e;
    c->weight[0][before] = moqk_few_logit(own);
}

/* A warp: logits of a row's choices become weights. */
__device__ __forceinline__ void moqk_few_weigh(const moqk_few &a, const void *logits, int32_t row, moqk_few_choices *c)
{
    const int32_t lane = threadIdx.x, experts = a.routing.experts;
    const int sigmoid = a.routing.score == MOQ_SCORE_SIGMOID;
    const float top = c->weight[row][0], own = c->weight[row][lane & (MOQK_FEW_TOP - 1)];
    float p = lane >= a.routing.top_k ? 0 : sigmoid ? 1 / (1 + expf(-own)) : expf(own - top), all = p;
    if (!sigmoid && !a.routing.renormalize) {
        all = 0;
#pragma unroll 1
        for (int32_t e = lane; e < experts; e += 32) all += expf(moqk_get_any(logits, (int64_t)row * experts + e, a.bf16) - top);
    }
    all = moqk_warp_sum(all);
    if ((!sigmoid || a.routing.renormalize) && all > 0) p /= all;
    __syncwarp();
    if (lane < a.routing.top_k) c->weight[row][lane] = a.routing.scale != 0 ? p * a.routing.scale : p;
    __syncwarp();
    if (lane == 0) moqk_barrier_arrive((uint32_t)__cvta_generic_to_shared(&c->ready));
}

/* A warp: choices of a row by groups or with a bias. room: where the ring will be. */
__device__ __forceinline__ void moqk_few_route(const moqk_few &a, const void *logits, int32_t row, uint8_t *room, moqk_few_choices *c)
{
    moqk_choose(a.routing, a.bias, logits, a.bf16, row, (float *)(void *)(room + row * a.routing.experts * 16), c->chosen[row], c->weight[row]);
    __syncwarp();
    if (threadIdx.x == 0) moqk_barrier_arrive((uint32_t)__cvta_generic_to_shared(&c->ready));
    moqk_end_reads();
}

/* Of n runs of y in the order of several rows' list, those of this block: with a pair, every second one. */
template <int ONE> __device__ __forceinline__ int32_t moqk_few_share(const moqk_few &a, int32_t n)
{
    return ONE || !a.duo ? n : (n + 1 - (int32_t)(blockIdx.x & 1)) >> 1;
}

/* The different experts of several rows, in their order. */
__device__ __forceinline__ void moqk_few_merge(const moqk_few &a, moqk_few_choices *c)
{
    const int32_t thread = threadIdx.y * 32 + threadIdx.x, words = (a.routing.experts + 31) / 32;
    for (int32_t i = thread; i < a.rows * a.routing.top_k; i += (int32_t)blockDim.y * 32) {
        const int32_t e = c->chosen[i / a.routing.top_k][i % a.routing.top_k];
        atomicOr(&c->seen[e >> 5], 1u << (e & 31));
    }
    __syncthreads();
    for (int32_t i = thread; i < a.rows * a.routing.top_k; i += (int32_t)blockDim.y * 32) {
        const int32_t e = c->chosen[i / a.routing.top_k][i % a.routing.top_k];
        int32_t d = __popc(c->seen[e >> 5] & ((1u << (e & 31)) - 1));
        for (int32_t k = 0; k < e >> 5; k++) d += __popc(c->seen[k]);
        c->expert[d] = e;
        c->rank[d][i / a.routing.top_k] = (uint8_t)(i % a.routing.top_k + 1);
    }
    if (thread < MOQK_FEW_TILES) {
        int32_t n = 0;
        for (int32_t k = 0; k < words; k++) n += __popc(c->seen[k]);
        if (thread == 0) c->count = n;
        n *= a.side[1].runs;
        c->added[thread] = moqk_few_share<0>(a, thread * n) - moqk_few_share<0>(a, (thread + 1) * n);
    }
    __syncthreads();
}

/* n / d for small numbers; magic: 2^32 / d, rounded up, 0 where d is 1. */
__device__ __forceinline__ int32_t moqk_few_over(int32_t n, uint32_t magic) { return magic ? (int32_t)__umulhi((uint32_t)n, magic) : n; }

/* A run in the list of a block: second products | part << 1 | first chunk << 2 | expert << 14 | row tile of the block << 20. */
__device__ __forceinline__ uint32_t moqk_few_pack(int32_t second, int32_t part, int32_t chunk, int32_t d, int32_t unit)
{
    return (uint32_t)(second | part << 1 | chunk << 2 | d << 14 | unit << 20);
}
__device__ __forceinline__ int32_t moqk_few_chunk(uint32_t item) { return (int32_t)(item >> 2 & 4095); }
__device__ __forceinline__ int32_t moqk_few_d(uint32_t item) { return (int32_t)(item >> 14 & 63); }
__device__ __forceinline__ int32_t moqk_few_unit(uint32_t item) { return (int32_t)(item >> 20); }

/* Which row tile of its part that is. Of y: blocks with fewer row tiles before have more. */
__device__ __forceinline__ int32_t moqk_few_tile(const moqk_few &a, uint32_t item)
{
    const int32_t by = item & 1 ? a.duo : a.team, lists = (int32_t)(gridDim.x >> by), own = (int32_t)(blockIdx.x >> by), at = moqk_few_unit(item) * lists;
    return item & 1 ? at + lists - 1 - own : at + own - moqk_few_d(item) * a.side[0].tiles;
}

/* Row tiles of y of a block or of a pair. */
__device__ __forceinline__ int32_t moqk_few_tiles(const moqk_few &a)
{
    return moqk_few_over(a.side[1].tiles + (int32_t)(blockIdx.x >> a.duo), a.duo_magic);
}

/* Runs of a list before and after the activation, with so many experts. */
template <int ONE> __device__ __forceinline__ int2 moqk_few_count(const moqk_few &a, int32_t experts)
{
    const int32_t lists = (int32_t)(gridDim.x >> a.team), own = (int32_t)(blockIdx.x >> a.team);
    const int32_t units = moqk_few_over(experts * a.side[0].tiles - own + lists - 1, a.grid_magic);
    return make_int2(units * a.side[0].each, moqk_few_share<ONE>(a, moqk_few_tiles(a) * experts * a.side[1].runs));
}

/* First byte of the part that a run belongs to, behind that of the first part of its expert. */
__device__ __forceinline__ int64_t moqk_few_part(const moqk_few &a, uint32_t item) { return item >> 1 & 1 ? a.side[item & 1].part_bytes : 0; }

/* First byte of the expert that a run belongs to, behind that of the first one. */
__device__ __forceinline__ int64_t moqk_few_expert(const moqk_few &a, uint32_t item, const int32_t *expert)
{
    return expert[moqk_few_d(item)] * a.side[item & 1].expert_bytes;
}

/* The runs of a block, as its warps take them in turn: those of its row tiles before the activation, then those of its row tiles of y. An entry: where
   the run would lie in the first expert, what it is, its chunks. bytes: of a chunk. */
template <int ONE>
__device__ __forceinline__ void moqk_few_list(const moqk_few &a, int32_t experts, uint32_t bytes, int32_t thread, int32_t threads, uint4 *list)
{
    const int2 count = moqk_few_count<ONE>(a, experts);
#pragma unroll 1
    for (int32_t i = thread; i < count.x + count.y; i += threads) {
        uint32_t item;
        if (i < count.x) {
            const int32_t unit = moqk_few_over(i, a.side[0].magic), q = i - unit * a.side[0].each, part = q >= a.side[0].runs;
            const int32_t d = moqk_few_over((int32_t)(blockIdx.x >> a.team) + unit * (int32_t)(gridDim.x >> a.team), a.tiles_magic);
            item = moqk_few_pack(0, part, (q - part * a.side[0].runs) * a.side[0].run, d, unit);
        } else {
            const int32_t j = ONE || !a.duo ? i - count.x : 2 * (i - count.x) + (int32_t)(blockIdx.x & 1);
            const int32_t all = moqk_few_over(j, a.side[1].runs_magic); /* row tile, then expert, then run; of one row: expert first */
            const int32_t inner = ONE ? moqk_few_tiles(a) : experts;
            int32_t outer = 0, rest = all;
            for (; rest >= inner; rest -= inner) outer++;
            item = moqk_few_pack(1, 0, (j - all * a.side[1].runs) * a.side[1].run, ONE ? outer : rest, ONE ? rest : outer);
        }
        const moqk_few_side &s = a.side[item & 1];
        const int32_t chunk = moqk_few_chunk(item);
        const uint64_t from = (uint64_t)(uintptr_t)s.packed + (uint64_t)moqk_few_part(a, item) + (uint64_t)(moqk_few_tile(a, item) * s.chunks + chunk) * bytes;
        list[i] = make_uint4((uint32_t)from, (uint32_t)(from >> 32), item, (uint32_t)min(s.run, s.chunks - chunk));
    }
}

/* What a warp asks for next: in the run that begins at entry `next` of the list, behind what has been asked for. */
typedef struct moqk_few_ahead {
    const uint8_t *from;
    int32_t next, left;
} moqk_few_ahead;

/* Asks for the next chunk, if there is one. */
template <uint32_t BYTES>
__device__ __forceinline__ void moqk_few_ask(const moqk_few &a, const uint4 *list, int32_t end, const int32_t *expert, uint32_t to, uint32_t full,
                                             moqk_few_ahead &q)
{
    if (q.left == 0) {
        if (q.next >= end) return;
        const uint4 entry = list[q.next];
        q.from = (const uint8_t *)((uint64_t)entry.y << 32 | entry.x) + moqk_few_expert(a, entry.z, expert);
        q.left = (int32_t)entry.w;
        q.next += (int32_t)blockDim.y << a.team;
    }
    if (moqk_elected()) {
        moqk_barrier_expect(full, BYTES);
        moqk_bulk_stream(to, q.from, BYTES, full);
    }
    q.from += BYTES;
    q.left--;
}

/* Four values of x, quad i of all rows; zeros behind the last column. */
template <int ONE> __device__ __forceinline__ float4 moqk_few_x4(const moqk_few &a, int32_t i)
{
    const int32_t quads = a.side[0].chunks * 64, m = ONE ? 0 : i / quads, k = i - m * quads;
    moqk_call x;
    x.x = a.x;
    if (4 * k >= a.cols || (!ONE && m >= a.rows)) return make_float4(0, 0, 0, 0);
    return a.bf16 ? moqk_fast_x4<0>(x, (int64_t)m * a.cols + 4 * k) : moqk_fast_x4<1>(x, (int64_t)m * a.cols + 4 * k);
}

/* The same into shared memory, as BF16 or as two parts. */
template <int ONE> __device__ __forceinline__ void moqk_few_put(const moqk_few &a, int32_t i, float4 v, uint32_t to)
{
    const int32_t quads = a.side[0].chunks * 64, m = ONE ? 0 : i / quads, k = i - m * quads;
    if ((!ONE && m >= a.rows) || k >= quads) return;
    if (a.bf16) moqk_run_put<0>(v, to + (uint32_t)m * a.x_pitch + (uint32_t)k * 8, a.x_pitch);
    else moqk_run_put<1>(v, to + (uint32_t)(2 * m) * a.x_pitch + (uint32_t)k * 8, a.x_pitch);
}

/* The lane's words of hi and, if `split`, of lo: nothing may stand between the loads that waits for the first one. */
__device__ __forceinline__ void moqk_few_look(const uint32_t *at, int split, uint4 &hi, uint4 &lo)
{
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %9, 0; ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%8];"
                 " @p ld.relaxed.gpu.global.v4.u32 {%4, %5, %6, %7}, [%8 + 512]; }"
                 : "=&r"(hi.x), "=&r"(hi.y), "=&r"(hi.z), "=&r"(hi.w), "+r"(lo.x), "+r"(lo.y), "+r"(lo.z), "+r"(lo.w) : "l"(at), "r"(split) : "memory");
}

__device__ __forceinline__ void moqk_put_shared16(uint32_t at, uint4 v)
{
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" :: "r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

/* Keeps a value in its register: the compiler would make it anew, from slow special registers, wherever it is used. */
template <typename T> __device__ __forceinline__ T moqk_kept(T v)
{
    asm volatile("" : "+r"(v));
    return v;
}

__device__ __forceinline__ int moqk_few_lacks(uint4 v) { return max(max(v.x, v.y), max(v.z, v.w)) == MOQK_FEW_ABSENT; }

/* A chunk of a row of `hidden`, when it is there, as one or two columns in shared memory. from: the lane's 8 columns; there: it has some, which come in
   eights. */
template <int ONE> __device__ __forceinline__ void moqk_few_take(const uint32_t *from, int there, int split, uint32_t to)
{
    uint4 hi = make_uint4(0, 0, 0, 0), lo = hi;
    while (there) {
        moqk_few_look(from, split, hi, lo);
        if (!moqk_few_lacks(hi) && !moqk_few_lacks(lo)) break;
        if (!ONE) __nanosleep(40);
    }
    moqk_put_shared16(to, hi);
    if (split) moqk_put_shared16(to + MOQK_FEW_PITCH, lo);
}

/* Sum of n values of shared memory, `each` floats apart; wait: when none of them is MOQK_FEW_ABSENT. */
template <int WAIT> __device__ __forceinline__ float moqk_few_add(const float *from, int32_t n, int32_t each)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(from);
    float v = 0;
#pragma unroll 1
    for (int32_t k = 0; k < n; k += 8) {
        float some[8];
        uint32_t most;
        do {
            most = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                some[j] = 0;
                if (k + j < n) asm volatile("ld.volatile.shared.f32 %0, [%1];" : "=f"(some[j]) : "r"(at + (uint32_t)((k + j) * each) * 4) : "memory");
                most = max(most, __float_as_uint(some[j]));
            }
        } while (WAIT && most == MOQK_FEW_ABSENT);
#pragma unroll
        for (int j = 0; j < 8; j++) v += some[j];
    }
    return v;
}

/* The sums of a row tile of expert d are there, or on their way: what comes out of them. sums: [runs of all parts][rows][16]. */
template <int ONE>
__device__ __forceinline__ void moqk_few_finish(const moqk_few &a, moqk_few_choices *c, int32_t d, int32_t tile, const float *sums, uint32_t *hidden)
{
    const moqk_few_side &s = a.side[0];
    const int32_t lane = threadIdx.x, r = lane & 15, part = lane >> 4, h = tile * 16 + r;
    moqk_barrier_wait((uint32_t)__cvta_generic_to_shared(&c->ready), 0);
#pragma unroll 1
    for (int32_t m = 0; m < (ONE ? 1 : a.rows); m++) {
        const int32_t rank = ONE ? d + 1 : c->rank[d][m];
        if (rank == 0) continue;
        const int32_t n = ONE ? 1 : a.rows;
        float v = part < s.parts ? moqk_few_add<ONE>(sums + (part * s.runs * n + m) * 16 + r, s.runs, n * 16) : 0;
        v = moqk_activate(a.activation, v, __shfl_xor_sync(0xffffffffu, v, 16)) * c->weight[m][rank - 1];
        const float other = __shfl_xor_sync(0xffffffffu, v, 1), even = r & 1 ? other : v, odd = r & 1 ? v : other;
        const uint32_t hi = moqk_pack(even, odd), lo = moqk_pack(even - __uint_as_float(hi << 16), odd - __uint_as_float(hi & 0xffff0000u));
        if (part || h >= s.rows || (ONE && a.bf16 && (r & 1))) continue;
        uint32_t *to = hidden + (m * a.routing.top_k + rank - 1) * a.hidden_cols + (h & ~255) + (r & 1) * 128 + (h >> 1 & 127);
        asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(to), "r"(r & 1 ? lo : hi) : "memory");
    }
}

/* A value for block `rank` of a pair, or for this block: it is its own signal. */
__device__ __forceinline__ void moqk_few_send(const moqk_few &a, const float *at, float v, uint32_t rank)
{
#if __CUDA_ARCH__ >= 900
    if (rank == (blockIdx.x & (uint32_t)a.duo)) {
        asm volatile("st.volatile.shared.f32 [%0], %1;" :: "r"((uint32_t)__cvta_generic_to_shared(at)), "f"(v) : "memory");
        return;
    }
    uint32_t to;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"((uint32_t)__cvta_generic_to_shared(at)), "r"(rank));
    asm volatile("st.relaxed.cluster.shared::cluster.f32 [%0], %1;" :: "r"(to), "f"(v) : "memory");
#endif
}

/* A row tile of y: sums: [n][rows][16], of warps; of one row: of runs, when they are there. half: [rows][16] of a pair of several rows: what the other
   block has of it, when it is there, or will have from this one, whose row tile it is not (keep 0). into: of one row: what `into` holds of the row tile. */
template <int ONE>
__device__ __forceinline__ void moqk_few_sum_up(const moqk_few &a, int32_t tile, const float *sums, int32_t n, const float *half, int keep, const float *into)
{
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < (ONE ? 16 : a.rows * 16); i += 32) {
        const int32_t m = i >> 4, r = tile * 16 + (i & 15);
        float v = moqk_few_add<ONE>(sums + i, n, ONE ? 16 : a.rows * 16);
        if (!ONE && a.duo) {
            if (!keep) {
                moqk_few_send(a, half + i, v, (blockIdx.x & 1) ^ 1);
                continue;
            }
            v += moqk_few_add<1>(half + i, 1, 0);
        }
        if (r >= a.side[1].rows) continue;
        const int64_t at = (int64_t)m * a.side[1].rows + r;
        moqk_put_any(a.y, at, v, a.bf16);
        if (a.into) moqk_put_any(a.into, at, (ONE ? into[i] : moqk_get_any(a.into, at, a.bf16)) + moqk_rounded_any(v, a.bf16), a.bf16);
    }
}

/* The listers of a single row: what `into` holds of the block's row tiles of y. At the end of the launch all would wait for it. */
__device__ __forceinline__ void moqk_few_hold(const moqk_few &a, int32_t lister, float *into)
{
#pragma unroll 1
    for (int32_t i = lister * 32 + (int32_t)threadIdx.x; i < moqk_few_tiles(a) * 16; i += MOQK_FEW_LISTERS * 32) {
        const int32_t r = moqk_few_tile(a, moqk_few_pack(1, 0, 0, 0, i >> 4)) * 16 + (i & 15);
        into[i] = r < a.side[1].rows ? moqk_get_any(a.into, r, a.bf16) : 0;
    }
}

/* Adds 1 to a counter in shared memory, where the warp's sums are. 1: they were the last of `all`, and this warp sees all of them. */
__device__ __forceinline__ int moqk_few_arrive(int32_t *counter, int32_t all)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(counter);
    int32_t before = 0;
    __syncwarp();
    if (threadIdx.x == 0) asm volatile("atom.acq_rel.cta.shared::cta.add.s32 %0, [%1], 1;" : "=r"(before) : "r"(at) : "memory");
    before = __shfl_sync(0xffffffffu, before, 0);
    __syncwarp(); /* what lane 0 acquired, the others see */
    return before == all - 1;
}

/* Row tile `unit` of the block is done: its place is free for another one. */
__device__ __forceinline__ void moqk_few_leave(int32_t *arrived, int32_t *done, int32_t unit)
{
    __syncwarp();
    if (threadIdx.x != 0) return;
    *arrived = 0;
    asm volatile("st.release.cta.shared::cta.s32 [%0], %1;" :: "r"((uint32_t)__cvta_generic_to_shared(done)), "r"(unit + 1) : "memory");
}

/* Until `units` row tiles have left a place. */
__device__ __forceinline__ void moqk_few_wait(const int32_t *done, int32_t units)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(done);
    int32_t now = 0;
    while (now < units) asm volatile("ld.acquire.cta.shared::cta.s32 %0, [%1];" : "=r"(now) : "r"(at) : "memory");
}

/* Barriers and counters, before anything is waited for. */
__device__ __forceinline__ void moqk_few_begin(const moqk_few &a, moqk_few_choices *c, uint32_t bar, uint32_t *half, uint32_t *keys)
{
    const int32_t lane = threadIdx.x, thread = threadIdx.y * 32 + lane, threads = blockDim.y * 32;
    if (lane < MOQK_FEW_STAGES) moqk_barrier_init(bar + 8 * (uint32_t)lane, 1);
    if (thread == 0) moqk_barrier_init((uint32_t)__cvta_generic_to_shared(&c->ready), (uint32_t)a.rows);
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    if (thread < MOQK_FEW_UNITS) c->arrived[thread] = c->done[thread] = 0;
    if (thread == 0) c->count = a.routing.top_k;
    if (a.router.packed && thread >= a.routing.experts && thread < MOQK_FEW_RANKED) keys[thread] = 0;
    if (a.rows == 1) return;
    if (thread < MOQK_FEW_EXPERTS / 32) c->seen[thread] = 0;
    for (int32_t i = thread; i < (int32_t)(a.factor_at - a.half_at) / 4; i += threads) half[i] = MOQK_FEW_ABSENT;
    for (int32_t i = thread; i < MOQK_FEW_ROWS * MOQK_FEW_TOP; i += threads) {
        c->expert[i] = 0;
        ((uint32_t *)c->rank)[i] = 0;
    }
}

/* What the warps that do not choose do meanwhile: x, factors, sums of 0. Behind the weights a load would wait for microseconds. */
template <int ONE>
__device__ __forceinline__ void moqk_few_fetch(const moqk_few &a, int32_t thread, int32_t threads, uint32_t x, float *factor, uint32_t *sums)
{
    const int32_t all = ONE && a.router.packed ? 0 : (ONE ? 1 : a.rows) * a.side[0].chunks * 64, factors = a.routing.experts * (a.side[0].parts + 1);
#pragma unroll 1
    for (int32_t i = thread; i < all || i < factors; i += 2 * threads) {
        const float f = i < factors ? __ldg(a.factor + i) : 0, g = i + threads < factors ? __ldg(a.factor + i + threads) : 0;
        if (i < all) {
            const float4 v = moqk_few_x4<ONE>(a, i), w = moqk_few_x4<ONE>(a, i + threads);
            moqk_few_put<ONE>(a, i, v, x);
            moqk_few_put<ONE>(a, i + threads, w, x);
        }
        if (i < factors) factor[i] = f;
        if (i + threads < factors) factor[i + threads] = g;
    }
    if (!ONE) for (int32_t i = thread; i < (int32_t)(a.half_at - a.sums_at) / 4; i += threads) sums[i] = 0;
}

/* A run's sums of a single row, of rows g and g + 8: into its place, in the block that has the last run but `unit & 1` of the row tile, whose warp makes
   the tile's values; a row tile of y is the block's whose turn it is. Lanes with column 0 have them. */
__device__ __forceinline__ void moqk_few_place(const moqk_few &a, moqk_few_choices *c, int32_t i, uint32_t item, float v, float w,
                                               const float beside[2], const float *first, const float *second, uint32_t *hidden)
{
    const int32_t lane = threadIdx.x, d = moqk_few_d(item), unit = moqk_few_unit(item);
    const moqk_few_side &s = a.side[item & 1];
    const int32_t last = item & 1 ? unit : (unit + 1) * s.each - 1 - (unit & a.team), run = moqk_few_over(moqk_few_chunk(item), s.run_magic);
    const float *sums = (item & 1 ? second + ((unit * a.routing.top_k + d) * s.runs + run) * 16 : first + i * 16) + (lane >> 2);
    float weight = 1;          /* x of the second products has it in it already, the bias has not */
    if ((item & 1) && s.bias) {
        moqk_barrier_wait((uint32_t)__cvta_generic_to_shared(&c->ready), 0);
        weight = c->weight[0][d];
    }
    if ((lane & 3) == 0) {
        moqk_few_send(a, sums, v + weight * beside[0], (uint32_t)(last & a.team));
        moqk_few_send(a, sums + 8, w + weight * beside[1], (uint32_t)(last & a.team));
    }
    __syncwarp();
    if (!(item & 1) && i == last) moqk_few_finish<1>(a, c, d, moqk_few_tile(a, item), first + unit * s.each * 16, hidden);
}

/* The row tiles of y of a single row that are this warp's: their sums come from all warps. all: runs of this list; own: of a row tile. */
__device__ __forceinline__ void moqk_few_rest(const moqk_few &a, int32_t begin, int32_t step, int32_t all, int32_t own, const float *sums, const float *into,
                                              int32_t other)
{
#pragma unroll 1
    for (int32_t unit = begin; unit * own < all; unit += step) {
        const int32_t tile = moqk_few_tile(a, moqk_few_pack(1, 0, 0, 0, unit));
        moqk_few_sum_up<1>(a, tile, sums + unit * own * 16, own, NULL, 1, into + unit * 16);
        if (tile == 0 && threadIdx.x == 0) *(int2 *)(void *)a.state = make_int2(other, 1);
    }
}

/* Before anything that comes from other kernels is read: the runs of a single row, unless its norm would wait for them, and sums that are not there. Both
   blocks of a pair know when they are absent: release waits for all that a warp has under way, so the other warps have none. */
template <uint32_t BYTES> __device__ __forceinline__ void moqk_few_lay_out(const moqk_few &a, int32_t lister, uint4 *sums, uint4 *list)
{
    const int32_t thread = lister * 32 + (int32_t)threadIdx.x;
    if (lister >= 0) {
        for (int32_t i = thread; i < (int32_t)(a.factor_at - a.sums_at) / 16; i += MOQK_FEW_LISTERS * 32) sums[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
        __syncwarp();
        if (a.team) moqk_cluster_arrive(0);
        if (!a.router.packed) moqk_few_list<1>(a, a.routing.top_k, BYTES, thread, MOQK_FEW_LISTERS * 32, list);
    } else if (a.team) moqk_cluster_arrive(1);
}

/* Where the router's own room is, in that of `hidden` on its way into the second products: sums of the norm's warps, then the columns of x that the block
   multiplies, in the order of >>cuda-decode; its weights lie where the ring will be. */
enum { MOQK_FEW_ROUTED_AT = 128, MOQK_FEW_ROUTED_CHUNKS = 32 };

/* The last warp: its chunks of the router, before the kernel before has ended. */
__device__ __forceinline__ void moqk_few_ask_router(const moqk_few &a, uint32_t ring)
{
    constexpr uint32_t BYTES = moqk_chunk_bytes(MOQK_FAST_BF16);
    const moqk_few_router &r = a.router;
    const int32_t tile = (int32_t)blockIdx.x / r.ways;
    if (tile >= r.tiles) return;
    for (int32_t c = (int32_t)blockIdx.x - tile * r.ways; c < r.chunks; c += r.ways, ring += BYTES)
#pragma unroll
        for (uint32_t i = 0; i < BYTES; i += 512)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                         :: "r"(ring + i + threadIdx.x * 16), "l"(r.packed + ((int64_t)tile * r.chunks + c) * BYTES + i + threadIdx.x * 16) : "memory");
}

/* The norm of the row into shared memory, as `x` and as the router's product reads its columns. All warps; ask: called when they have waited for the kernel
   before and x is under way. */
template <int SPLIT, class ASK> __device__ __forceinline__ void moqk_few_norm(const moqk_few &a, uint8_t *room, uint32_t x, const ASK &ask)
{
    const moqk_few_router &r = a.router;
    const int32_t way = (int32_t)blockIdx.x % r.ways;
    moqk_call call;
    call.x = r.x;
    const auto put = [&](float4 v, int32_t i) {
        moqk_run_put<SPLIT>(v, x + (uint32_t)i * 8, a.x_pitch);
        int32_t n = 0;
        for (int32_t c = way; c <= i >> 4; c += r.ways, n++)
            if (c == i >> 4) moqk_fast_put<MOQK_FAST_BF16, SPLIT>(v, n * 16 + (i & 15), 0, 1 + SPLIT, room + MOQK_FEW_ROUTED_AT);
    };
    moqk_norm_own<SPLIT, 1>(call, r.norm, threadIdx.y, blockDim.y, a.cols, 0, a.side[0].chunks * 64, blockIdx.x == 0, (float *)(void *)room, ask, put);
}

/* The last warp: its sums of the router's product, with the bits of >>cuda-decode, for all blocks. */
template <int SPLIT> __device__ __forceinline__ void moqk_few_multiply(const moqk_few &a, const uint8_t *ring, const uint8_t *room, float *sums)
{
    const moqk_few_router &r = a.router;
    const int32_t lane = threadIdx.x, g = lane >> 2, t = lane & 3, tile = (int32_t)blockIdx.x / r.ways, way = (int32_t)blockIdx.x - tile * r.ways;
    if (tile >= r.tiles) return;
    const int flip[1] = {SPLIT && g == 1};
    const uint8_t *x[1] = {room + MOQK_FEW_ROUTED_AT + flip[0] * 128 + t * 16};
    const uint32_t z[2] = {0, 0};
    float acc[4] = {0, 0, 0, 0};
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
#pragma unroll 1
    for (int32_t c = way; c < r.chunks; c += r.ways) {
        moqk_hand<MOQK_FAST_BF16, 0> h;
        float sum[1][4] = {{0, 0, 0, 0}};
#pragma unroll
        for (int i = 0; i < 4; i++) h.w[i] = *(const uint4 *)(const void *)(ring + i * 512 + moqk_fast_slot(MOQK_FAST_BF16, lane) * 16);
        moqk_fast_block<MOQK_FAST_BF16, 0, 1>(h, 0, x, flip, (1 + SPLIT) * 128, z, sum);
#pragma unroll
        for (int i = 0; i < 4; i++) acc[i] += sum[0][i];
        ring += moqk_chunk_bytes(MOQK_FAST_BF16);
        x[0] += (1 + SPLIT) * 128;
    }
    moqk_end_reads();
    if (t != 0) return;
    sums += (way * r.tiles + tile) * 16 + g;
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" :: "l"(sums), "f"(SPLIT ? acc[0] + acc[1] : acc[0]) : "memory");
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" :: "l"(sums + 8), "f"(SPLIT ? acc[2] + acc[3] : acc[2]) : "memory");
}

/* MOQK_FEW_VOTERS warps: logits out of the sums of all blocks, which are their own signals, added in the order of the ways. logits: in shared memory;
   keys: as moqk_few_rank wants them, or NULL. */
__device__ __forceinline__ void moqk_few_add_up(const moqk_few &a, const float *sums, void *logits, uint32_t *keys)
{
    const moqk_few_router &r = a.router;
    const float *scale = (const float *)(const void *)(r.packed + (int64_t)r.tiles * r.chunks * moqk_chunk_bytes(MOQK_FAST_BF16));
#pragma unroll 1
    for (int32_t e = (int32_t)(threadIdx.y * 32 + threadIdx.x); e < a.routing.experts; e += MOQK_FEW_VOTERS * 32) {
        const float unit = __ldg(scale + ((e >> 4) * 8 + (e & 7)) * 2 + (e >> 3 & 1)), bias = r.bias ? __ldg(r.bias + e) : 0;
        float v = 0;
#pragma unroll 1
        for (int32_t k = 0; k < r.ways; k += 16) {
            float some[16];
            uint32_t most;
            do {
                most = 0;
#pragma unroll
                for (int j = 0; j < 16; j++) {
                    some[j] = 0;
                    if (k + j < r.ways) asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(some[j]) : "l"(sums + (k + j) * r.tiles * 16 + e) : "memory");
                }
#pragma unroll
                for (int j = 0; j < 16; j++) most = max(most, __float_as_uint(some[j]));
            } while (most == MOQK_FEW_ABSENT);
#pragma unroll
            for (int j = 0; j < 16; j++) v += some[j];
        }
        v = v * unit * r.factor + bias;
        moqk_put_any(logits, e, v, a.bf16);
        if (keys) keys[e] = moqk_few_key(moqk_rounded_any(v, a.bf16));
        if (blockIdx.x == 0) moqk_put_any(r.logits, e, v, a.bf16);
    }
}

/* Norm, x and logits of a single row, which the launch makes itself, and its runs. 1: the choice is made, too. ask: see moqk_few_norm. */
template <uint32_t BYTES, class ASK>
__device__ __forceinline__ int moqk_few_think(const moqk_few &a, uint8_t *shared, uint32_t x, int plain, moqk_few_choices *c, const ASK &ask)
{
    const int32_t warp = threadIdx.y, others = (int32_t)blockDim.y - MOQK_FEW_VOTERS - 1, thread = (warp - MOQK_FEW_VOTERS) * 32 + (int32_t)threadIdx.x;
    const int ranks = moqk_few_ranks(a, plain);
    uint32_t *keys = (uint32_t *)(void *)(shared + a.keys_at);
    uint8_t *room = shared + a.stage_at;
    if (a.bf16) moqk_few_norm<0>(a, room, x, ask);
    else moqk_few_norm<1>(a, room, x, ask);
    __syncthreads();
    float *sums = (float *)(void *)(a.hidden + (int64_t)c->state.x * (a.routed + MOQK_FEW_ROWS * a.routing.top_k * a.hidden_cols));
    if (warp < MOQK_FEW_VOTERS) {
        moqk_few_add_up(a, sums, shared + a.logits_at, ranks ? keys : NULL);
        if (ranks) moqk_few_rank(a, keys, c);
    } else if (warp < MOQK_FEW_VOTERS + others) {
        moqk_few_fetch<1>(a, thread, others * 32, x, (float *)(void *)(shared + a.factor_at), NULL);
        moqk_few_list<1>(a, a.routing.top_k, BYTES, thread, others * 32, (uint4 *)(void *)(shared + a.list_at));
    } else if (a.bf16) moqk_few_multiply<0>(a, shared, room, sums);
    else moqk_few_multiply<1>(a, shared, room, sums);
    if (!ranks) __syncthreads();
    return ranks;
}

/* What a block learns from the kernels before: its x and the choices. Warps choose, then others fetch; of a single row the listers have their work behind
   them. */
template <int ONE>
__device__ __forceinline__ void moqk_few_learn(const moqk_few &a, const void *logits, uint8_t *shared, uint32_t x, int plain, moqk_few_choices *c)
{
    const int32_t warp = threadIdx.y, warps = blockDim.y, lane = threadIdx.x;
    const int32_t ranked = ONE && moqk_few_ranks(a, plain), thread = warp * 32 + lane;
    const int32_t choosers = ranked ? MOQK_FEW_VOTERS : ONE ? 1 : a.rows;
    const int32_t fetchers = ONE && a.router.packed ? 0 : warps - choosers - (ONE ? MOQK_FEW_LISTERS : 0);
    uint32_t *keys = (uint32_t *)(void *)(shared + a.keys_at);
    if (warp >= choosers + fetchers) return;
    if (warp >= choosers)
        moqk_few_fetch<ONE>(a, (warp - choosers) * 32 + lane, fetchers * 32, x, (float *)(void *)(shared + a.factor_at),
                            (uint32_t *)(void *)(shared + a.sums_at));
    else if (ranked) {
        if (thread < MOQK_FEW_RANKED) keys[thread] = moqk_few_read(a, logits, 0, thread);
        moqk_few_rank(a, keys, c);
    }
    else if (plain) moqk_few_choose(a, logits, warp, keys, c);
    else moqk_few_route(a, logits, warp, shared, c);
}

/* ONE: a single row. Its runs have places of their own in the sums, which are their own signals. Pairs of blocks share all of its runs, of several rows
   those of y alone: each has sums of every second run, and one of them what the other has. */
template <int FORM, int STEP, int ONE> __global__ void __launch_bounds__(MOQK_FEW_WARPS * 32, 1) moqk_moe_few(const __grid_constant__ moqk_few a)
{
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ moqk_few_choices c;
    constexpr uint32_t BYTES = moqk_chunk_bytes(FORM);
    const int32_t lane = moqk_kept((int32_t)threadIdx.x), warp = threadIdx.y, warps = moqk_kept((int32_t)blockDim.y), g = lane >> 2, t = lane & 3;
    const uint32_t base = (uint32_t)__cvta_generic_to_shared(shared), ring = moqk_kept(base + (uint32_t)(warp * MOQK_FEW_STAGES) * BYTES);
    const uint32_t bar = moqk_kept(base + a.bars_at + (uint32_t)(warp * MOQK_FEW_STAGES) * 8);
    const int plain = a.routing.groups <= 1 && !a.bias;
    const int32_t rows = ONE ? 1 : a.rows, terms = ONE && a.bf16 ? 1 : 2; /* terms of what is between the products */
    const uint32_t stage = base + a.stage_at + (uint32_t)(warp * terms * a.rows) * MOQK_FEW_PITCH;
    uint4 *list = (uint4 *)(void *)(shared + a.list_at);
    float *factor = (float *)(void *)(shared + a.factor_at), *more = (float *)(void *)(shared + a.more_at);
    const int32_t team = ONE ? a.team : 0, step = warps << team, begin = (warp << team) + ((int32_t)blockIdx.x & team); /* in the list */
    moqk_few_begin(a, &c, bar, (uint32_t *)(void *)(shared + a.half_at), (uint32_t *)(void *)(shared + a.keys_at));
    if (ONE) moqk_few_lay_out<BYTES>(a, warp - warps + MOQK_FEW_LISTERS, (uint4 *)(void *)(shared + a.sums_at), list);
    else if (a.duo) moqk_cluster_arrive(0);
    const int routes = ONE && a.router.packed;
    const void *logits = routes ? shared + a.logits_at : (const uint8_t *)a.logits;
    if (routes && warp == warps - 1) moqk_few_ask_router(a, base);
    const auto begin_reads = [&] {
        moqk_dependents_may_start();
        if (warp == warps - 1 && lane == 0) c.state = *(const int2 *)(const void *)a.state;
        if (ONE && a.into && warp >= warps - MOQK_FEW_LISTERS) moqk_few_hold(a, warp - warps + MOQK_FEW_LISTERS, (float *)(void *)(shared + a.into_at));
    };
    int chosen = 0;
    if constexpr (ONE) if (routes) chosen = moqk_few_think<BYTES>(a, shared, base + a.x_at, plain, &c, begin_reads);
    if (!routes) {
        moqk_wait_for_before();
        begin_reads();
    }
    if (!chosen) moqk_few_learn<ONE>(a, logits, shared, base + a.x_at, plain, &c);
    __syncthreads();
    if (!ONE) {
        moqk_few_merge(a, &c);
        moqk_few_list<0>(a, c.count, BYTES, warp * 32 + lane, warps * 32, list);
        __syncthreads();
    }

    const int32_t *expert = ONE ? c.chosen[0] : c.expert;
    const int2 counts = moqk_few_count<ONE>(a, ONE ? a.routing.top_k : c.count);
    const int32_t end = counts.x + counts.y;
    moqk_few_ahead ahead = {NULL, begin, 0};
#pragma unroll 1
    for (uint32_t i = 0; i < (ONE ? 1 : MOQK_FEW_STAGES); i++) moqk_few_ask<BYTES>(a, list, end, expert, ring + i * BYTES, bar + 8 * i, ahead);
    if (a.duo) moqk_cluster_wait(); /* the other block's sums are absent */
    if (plain && warp >= warps - rows) moqk_few_weigh(a, logits, warp - warps + rows, &c); /* while the first ones come; the last warps have least to do */
    const int32_t half = a.routed + MOQK_FEW_ROWS * a.routing.top_k * a.hidden_cols, other = c.state.x ^ 1;
    const int32_t stale = a.routed / 4 + c.state.y * a.routing.top_k * (a.hidden_cols / 4);
    uint32_t *hidden = a.hidden + (int64_t)c.state.x * half + a.routed;
#pragma unroll 1
    for (int32_t i = ((int32_t)blockIdx.x * warps + warp) * 32 + lane; i < stale; i += (int32_t)gridDim.x * warps * 32)
        ((uint4 *)(void *)(a.hidden + (int64_t)other * half))[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
    /* Where the lane's columns of x lie, before and after the activation: those that nobody stores repeat the first one. */
    const int32_t row = FORM <= MOQK_MXFP4 ? g : lane & 7;
    const uint32_t column = FORM <= MOQK_MXFP4 ? t * 32 : (lane >> 3) * 16;
    const uint32_t x_first = base + a.x_at + (row < (a.bf16 ? a.rows : 2 * a.rows) ? row * a.x_pitch : 0) + column;
    const uint32_t x_second = stage + (row < terms * a.rows ? row * MOQK_FEW_PITCH : 0) + column;
    uint32_t turn = 0, slot = 0;
    const uint32_t codes = moqk_kept((uint32_t)moqk_fast_slot(FORM, lane) * 16);
    const uint32_t scales_at = moqk_kept(2048 + (uint32_t)(FORM == MOQK_NVFP4 ? lane : lane >> 1) * 8);
#pragma unroll 1
    for (int32_t i = begin; i < end; i += step) {
        const uint32_t item = list[i].z;
        const int32_t second = (int32_t)(item & 1), part = (int32_t)(item >> 1 & 1), d = moqk_few_d(item), unit = moqk_few_unit(item);
        const moqk_few_side &s = a.side[second];
        const int32_t split = second ? terms == 2 : !a.bf16, first = moqk_few_chunk(item), stop = min(first + s.run, s.chunks);
        const float f = factor[expert[d] * (a.side[0].parts + 1) + (second ? a.side[0].parts : part)];
        float beside[2] = {0, 0}, acc[1][1][4] = {{{0, 0, 0, 0}}};
        moqk_run_factors<FORM, STEP> h[1];
        const float2 *scales = NULL;
        const uint16_t *zeros = NULL;
        if (STEP > 0) {
            const uint8_t *at = s.packed + moqk_few_part(a, item) + moqk_few_expert(a, item, expert);
            const int64_t from = (int64_t)moqk_few_tile(a, item) * s.groups * 8 + g;
            scales = (const float2 *)(const void *)(at + (int64_t)s.tiles * s.chunks * BYTES) + from;
            zeros = (const uint16_t *)(const void *)(at + (int64_t)s.tiles * (s.chunks * (int64_t)BYTES + s.groups * 64)) + from;
            h[0].load(scales, zeros, first, s.shift);
        }
        if (s.bias && first == 0) {
            const int32_t r = moqk_few_tile(a, item) * 16 + g;
            const float *bias = (const float *)(const void *)((const uint8_t *)s.bias + moqk_few_part(a, item) + moqk_few_expert(a, item, expert)) + r;
            if (r < s.rows) beside[0] = __ldg(bias);
            if (r + 8 < s.rows) beside[1] = __ldg(bias + 8);
        }
        uint32_t x[1] = {second ? x_second : x_first + (uint32_t)first * 512};
#pragma unroll 1
        for (int32_t chunk = first; chunk < stop; chunk++) {
            if (second) {
                __syncwarp(); /* the chunk before has been read */
#pragma unroll 1
                for (int32_t m = 0; m < rows; m++) {
                    const int32_t rank = ONE ? d + 1 : c.rank[d][m], at = chunk * 256 + lane * 4;
                    moqk_few_take<ONE>(hidden + (m * a.routing.top_k + rank - 1) * a.hidden_cols + at, rank > 0 && at + lane * 4 < a.side[0].rows, terms == 2,
                                  stage + (uint32_t)(terms * m) * MOQK_FEW_PITCH + (uint32_t)lane * 16);
                }
                __syncwarp();
            }
            uint4 w[1][4];
            uint2 bytes[1] = {make_uint2(0, 0)};
            const uint32_t z[1][2] = {{0, 0}};
            const uint32_t place = ring + slot * BYTES, full = bar + 8 * slot;
            const auto ask = [&](uint32_t into) { /* the place of the chunk before, or of this one when it has been read */
                if (ahead.left == 0 && ahead.next >= end) return;
                moqk_end_reads();
                __syncwarp();
                moqk_few_ask<BYTES>(a, list, end, expert, ring + into * BYTES, bar + 8 * into, ahead);
            };
            moqk_barrier_wait(full, turn);
            if (ONE) ask(slot ^ 1);
            if (FORM <= MOQK_MXFP4) bytes[0] = moqk_shared8(place + scales_at);
#pragma unroll
            for (int k = 0; k < 4; k++) w[0][k] = moqk_shared16(place + k * 512 + codes);
            if (!ONE) ask(slot);
            static_assert(MOQK_FEW_STAGES == 2, "stages in turn");
            turn ^= slot;
            slot ^= 1;
            moqk_run_chunk<FORM, STEP, 1, 0>(w[0], bytes[0], h[0], x, z[0], acc[0]);
            if (STEP > 0) h[0].load(scales, zeros, min(chunk + 1, stop - 1), s.shift);
            if (!second) x[0] += 512;
        }

        if (ONE) {
            const float v = (split ? acc[0][0][0] + acc[0][0][1] : acc[0][0][0]) * f, w = (split ? acc[0][0][2] + acc[0][0][3] : acc[0][0][2]) * f;
            moqk_few_place(a, &c, i, item, v, w, beside, (const float *)(const void *)(shared + a.sums_at), more, hidden);
            continue;
        }
        if (!second) {
            const int32_t at = unit & (MOQK_FEW_UNITS - 1);
            float *sums = (float *)(void *)(shared + a.sums_at) + at * s.each * a.rows * 16;
            float *to = sums + (part * s.runs + moqk_few_over(first, s.run_magic)) * a.rows * 16 + g;
            if (unit >= MOQK_FEW_UNITS) moqk_few_wait(&c.done[at], unit - MOQK_FEW_UNITS + 1);
            if (split && t < a.rows) to[t * 16] = (acc[0][0][0] + acc[0][0][1]) * f + beside[0], to[t * 16 + 8] = (acc[0][0][2] + acc[0][0][3]) * f + beside[1];
#pragma unroll
            for (int k = 0; k < 2; k++)
                if (!split && 2 * t + k < a.rows) {
                    to[(2 * t + k) * 16] = acc[0][0][k] * f + beside[0];
                    to[(2 * t + k) * 16 + 8] = acc[0][0][2 + k] * f + beside[1];
                }
            if (moqk_few_arrive(&c.arrived[at], s.each)) {
                moqk_few_finish<0>(a, &c, d, moqk_few_tile(a, item), sums, hidden);
                moqk_few_leave(&c.arrived[at], &c.done[at], unit);
            }
            continue;
        }
        float weight = 0;      /* x has the weight of its choice in it already, the bias has not */
        if (s.bias) {
            const int32_t rank = t < a.rows ? c.rank[d][t] : 0;
            moqk_barrier_wait((uint32_t)__cvta_generic_to_shared(&c.ready), 0);
            if (rank) weight = c.weight[t][rank - 1];
        }
        float *sums = more + unit * warps * a.rows * 16, *to = sums + (warp * a.rows + t) * 16 + g;
        if (t < a.rows) {
            to[0] += (acc[0][0][0] + acc[0][0][1]) * f + weight * beside[0];
            to[8] += (acc[0][0][2] + acc[0][0][3]) * f + weight * beside[1];
        }
        if (moqk_few_arrive(&c.added[unit], 0)) {
            const int32_t tile = moqk_few_tile(a, item), keep = !a.duo || (unit & 1) == (int32_t)(blockIdx.x & 1);
            moqk_few_sum_up<0>(a, tile, sums, warps, (const float *)(const void *)(shared + a.half_at) + unit * a.rows * 16, keep, NULL);
            if (keep && tile == 0 && lane == 0) *(int2 *)(void *)a.state = make_int2(other, a.rows); /* read by all: each has made a part of x */
        }
    }
    if (ONE) moqk_few_rest(a, begin, step, counts.y, c.count * a.side[1].runs, more, (const float *)(const void *)(shared + a.into_at), other);
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-moe-runs   mixtures of experts, few rows for each of many experts, on SM90, 4-bit weights: weights stream through every block without a pause
   Two launches: the products before the activation, with it, and those behind it. The row tiles of all experts that were chosen are one list, of which every
   block has an equal run. What a block has of one tile of choices is a segment: the segment's x lies in shared memory, that of the next one is on its
   way, and its chunks (of gate and up in turn) are cut into equal runs, one a warp, which streams them through a stage of its own. A warp begins with the
   row tile that it will not finish and leaves those sums to the warp that has its last chunk, which takes it last: hardly anybody waits. Sums have a
   fixed order. Bytes read per launch: codes and scales once for every 8 or 16 columns of x that an expert has.
   ------------------------------------------------------------------------------------------------ */

enum {
    MOQK_RUNS_WARPS = 16,
    MOQK_RUNS_MOST = 2         /* products of 8 columns of x in a tile */
};

typedef struct moqk_moe_runs {
    const int32_t *tiles;      /* see moqk_choices */
    const int32_t *row_of;     /* row of x of a choice; NULL: the choice itself */
    const uint8_t *x;          /* [rows][halves][cols] of BF16 */
    const float *factor;       /* of the side: [experts][factors] */
    void *y;                   /* [choices][halves][rows of the side] of BF16 behind an activation, else [choices][rows] of F32 */
    moqk_few_side side;
    moq_activation_desc activation;
    int32_t activates;         /* is there an activation? */
    int32_t factors, cols;
    int32_t halves;            /* BF16 parts of a value: 1, or hi and lo, which are neighbouring columns of the products */
    int32_t products;          /* of 8 columns, at most: of a tile */
    int32_t buffers;           /* tiles of x in shared memory: 1 or 2 */
    uint32_t x_pitch, x_bytes; /* of a column, of a tile */
    uint32_t bars_at, ahead_at, sums_at, pair_at, x_at; /* in shared memory */
} moqk_moe_runs;

/* What a block has of a tile. */
typedef struct moqk_segment {
    int32_t expert, first, count; /* choices */
    int32_t unit, chunks;      /* its first row tile; chunks of all of its row tiles and parts */
} moqk_segment;

/* Units [begin, end) of all tiles are the block's; at: the first of the segment, 0: there is none. */
__device__ __forceinline__ int moqk_segment_at(const moqk_moe_runs &a, int32_t at, int32_t end, int32_t *next, moqk_segment *s)
{
    if (at >= end) return 0;
    const int32_t tile = at / a.side.tiles, *t = a.tiles + 4 * (tile + 1);
    *next = min(end, (tile + 1) * a.side.tiles);
    s->expert = t[0];
    s->first = t[1];
    s->count = t[2];
    s->unit = at - tile * a.side.tiles;
    s->chunks = (*next - at) * a.side.chunks * a.side.parts;
    return 1;
}

/* The chunks of a warp's run, in three phases: those of its last row tile if it does not finish it, whole row tiles, the rest of one that others began. */
typedef struct moqk_run_cut { int32_t begin, end, each; } moqk_run_cut; /* each: chunks of a row tile, all parts */

__device__ __forceinline__ moqk_run_cut moqk_cut_of(const moqk_moe_runs &a, const moqk_segment &s, int32_t warp)
{
    return {s.chunks * warp / MOQK_RUNS_WARPS, s.chunks * (warp + 1) / MOQK_RUNS_WARPS, a.side.chunks * a.side.parts};
}

__device__ __forceinline__ int2 moqk_phase_of(const moqk_run_cut &c, int phase)
{
    const int32_t last = c.end / c.each * c.each, whole = (c.begin + c.each - 1) / c.each * c.each;
    if (phase == 0) return make_int2(max(c.begin, last), c.end);
    if (phase == 1) return make_int2(whole, last);
    return make_int2(c.begin, whole <= c.end ? whole : c.begin);
}

/* What a warp asks for next; in shared memory, because it is looked at once in a row tile. */
typedef struct moqk_runs_ahead {
    int32_t at, phase, q, stop; /* unit behind the segment; chunks of the phase that are left */
    moqk_segment s;
} moqk_runs_ahead;

/* The next chunks of a warp that lie together: how many; 0: there are none. end: of the block's units. */
template <uint32_t BYTES> __device__ __forceinline__ int32_t moqk_runs_look(const moqk_moe_runs &a, moqk_runs_ahead *to, int32_t end, const uint8_t *&src)
{
    moqk_runs_ahead h = *to;
    const int32_t warp = threadIdx.y, each = a.side.chunks * a.side.parts;
    int32_t left = 0;
    while (left == 0) {
        if (h.q < h.stop) {
            const int32_t unit = h.q / each, rest = h.q - unit * each, part = rest >= a.side.chunks, chunk = rest - part * a.side.chunks;
            left = a.side.parts == 1 ? h.stop - h.q : min(h.stop - h.q, a.side.chunks - chunk); /* row tiles of a part follow each other */
            src = a.side.packed + h.s.expert * a.side.expert_bytes + part * a.side.part_bytes + ((int64_t)(h.s.unit + unit) * a.side.chunks + chunk) * BYTES;
            h.q += left;
        } else if (++h.phase < 3) {
            const int2 piece = moqk_phase_of(moqk_cut_of(a, h.s, warp), h.phase);
            h.q = piece.x;
            h.stop = piece.y;
        } else {
            int32_t next = h.at;
            if (!moqk_segment_at(a, h.at, end, &next, &h.s)) break;
            h.at = next;
            h.phase = -1;
        }
    }
    if (left == 0) h.phase = 3; /* and so it stays */
    __syncwarp();
    if (threadIdx.x == 0) *to = h;
    __syncwarp();
    return left;
}

/* x of a tile: two warps a column. */
__device__ __forceinline__ void moqk_runs_x(const moqk_moe_runs &a, const moqk_segment &s, uint32_t to)
{
    const int32_t warp = threadIdx.y, pieces = a.side.chunks * 32; /* of 16 bytes */
    for (int32_t i = warp; i < 2 * a.halves * s.count; i += MOQK_RUNS_WARPS) {
        const int32_t column = i >> 1, m = a.halves == 2 ? column >> 1 : column;
        const int64_t row = a.row_of ? a.row_of[s.first + m] : s.first + m;
        const uint8_t *from = a.x + (row * a.halves + (a.halves == 2 ? column & 1 : 0)) * a.cols * 2;
        const uint32_t here = to + (uint32_t)column * a.x_pitch;
        for (int32_t k = (i & 1) * 32 + (int32_t)threadIdx.x; k < pieces; k += 64) {
            const int inside = k * 8 < a.cols;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                         :: "r"(here + (uint32_t)k * 16), "l"(inside ? from + k * 16 : from), "r"(inside ? 16 : 0) : "memory");
        }
    }
}

/* Where a warp's chunks and signals are, and what it asks for next. */
typedef struct moqk_runs_place {
    uint32_t stage, full, x;   /* in shared memory; full: the barrier of the stage; x: of the segment */
    uint32_t parity;
    const uint8_t *src;
    int32_t left, end;
    moqk_runs_ahead *ahead;
} moqk_runs_place;

template <uint32_t BYTES> __device__ __forceinline__ void moqk_runs_ask(const moqk_moe_runs &a, moqk_runs_place &at)
{
    if (at.left == 0) at.left = moqk_runs_look<BYTES>(a, at.ahead, at.end, at.src);
    if (at.left == 0) return;
    if (moqk_elected()) {
        moqk_barrier_expect(at.full, BYTES);
        moqk_bulk_stream(at.stage, at.src, BYTES, at.full);
    }
    at.src += BYTES;
    at.left--;
}

/* acc += chunks [from, from + n) of a row tile of a part times x. */
template <int FORM, int STEP, int NB>
__device__ __forceinline__ void moqk_runs_chunks(const moqk_moe_runs &a, const moqk_segment &s, moqk_runs_place &at, int32_t tile, int32_t part, int32_t from,
                                                 int32_t n, float (&acc)[1][NB][4])
{
    constexpr uint32_t BYTES = moqk_chunk_bytes(FORM);
    const int32_t lane = threadIdx.x, g = lane >> 2, t = lane & 3, columns = s.count * a.halves;
    const uint32_t codes = (uint32_t)moqk_fast_slot(FORM, lane) * 16, scales_at = 2048 + (uint32_t)(FORM == MOQK_NVFP4 ? lane : lane >> 1) * 8;
    uint32_t x[NB];
#pragma unroll
    for (int b = 0; b < NB; b++) { /* columns that nobody stores repeat another */
        const int32_t row = 8 * b + (FORM <= MOQK_MXFP4 ? g : lane & 7);
        x[b] = at.x + (uint32_t)(row < columns ? row : 0) * a.x_pitch + (uint32_t)from * 512 + (uint32_t)(FORM <= MOQK_MXFP4 ? t * 32 : (lane >> 3) * 16);
    }
    moqk_run_factors<FORM, STEP> h[1];
    const float2 *scales = NULL;
    const uint16_t *zeros = NULL;
    if (STEP > 0) {
        const uint8_t *first = a.side.packed + s.expert * a.side.expert_bytes + part * a.side.part_bytes;
        const int64_t row = (int64_t)tile * a.side.groups * 8 + g;
        scales = (const float2 *)(const void *)(first + (int64_t)a.side.tiles * a.side.chunks * BYTES) + row;
        zeros = (const uint16_t *)(const void *)(first + (int64_t)a.side.tiles * (a.side.chunks * (int64_t)BYTES + a.side.groups * 64)) + row;
        h[0].load(scales, zeros, from, a.side.shift);
    }
#pragma unroll 1
    for (int32_t c = from; c < from + n; c++) {
        uint4 w[1][4];
        uint2 bytes[1] = {make_uint2(0, 0)};
        const uint32_t z[1][2] = {{0, 0}};
        moqk_barrier_wait(at.full, at.parity);
        at.parity ^= 1;
        if (FORM <= MOQK_MXFP4) bytes[0] = moqk_shared8(at.stage + scales_at);
#pragma unroll
        for (int k = 0; k < 4; k++) w[0][k] = moqk_shared16(at.stage + k * 512 + codes);
        moqk_run_factors<FORM, STEP> next;
        next.load(scales, zeros, min(c + 1, from + n - 1), a.side.shift); /* a chunk ahead */
        moqk_end_reads();
        __syncwarp();
        moqk_runs_ask<BYTES>(a, at);
        moqk_run_chunk<FORM, STEP, NB, 0>(w[0], bytes[0], h[0], x, z[0], acc[0]);
        h[0] = next;
#pragma unroll
        for (int b = 0; b < NB; b++) x[b] += 512;
    }
}

/* A row tile is done: its sums of up (or of the only part) and of gate. pair: room of the warp, [2][lane] of four. */
template <int NB>
__device__ __forceinline__ void moqk_runs_finish(const moqk_moe_runs &a, const moqk_segment &s, int32_t tile, float4 *pair, const float (&up)[1][NB][4],
                                                 const float (&gate)[NB][4])
{
    const int32_t lane = threadIdx.x, g = lane >> 2, t = lane & 3, split = a.halves == 2, both = a.side.parts == 2;
    const float *f = a.factor + s.expert * a.factors;
    const uint8_t *bias = a.side.bias ? (const uint8_t *)a.side.bias + s.expert * a.side.expert_bytes : NULL;
    if (!a.activates) {
        const float by = f[0];
#pragma unroll
        for (int b = 0; b < NB; b++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int32_t m = split ? 4 * b + t : 8 * b + 2 * t + (i & 1), row = tile * 16 + g + 8 * (i >> 1);
                if (m >= s.count || row >= a.side.rows || (split && (i & 1))) continue;
                const float v = split ? up[0][b][i] + up[0][b][i | 1] : up[0][b][i];
                ((float *)a.y)[(int64_t)(s.first + m) * a.side.rows + row] = v * by + (bias ? __ldg((const float *)(const void *)bias + row) : 0);
            }
        return;
    }
#pragma unroll
    for (int b = 0; b < NB; b++) {
        pair[lane] = make_float4(up[0][b][0], up[0][b][1], up[0][b][2], up[0][b][3]);
        pair[32 + lane] = make_float4(gate[b][0], gate[b][1], gate[b][2], gate[b][3]);
        const float *v = (const float *)(const void *)(pair + lane);
#pragma unroll 1
        for (int i = 0; i < 4; i += 1 + split) {
            const int32_t m = split ? 4 * b + t : 8 * b + 2 * t + (i & 1), row = tile * 16 + g + 8 * (i >> 1);
            if (m >= s.count || row >= a.side.rows) continue;
            float first = v[i], second = v[128 + i];
            if (split) first += v[i + 1], second += v[128 + i + 1];
            first = first * f[both] + (bias ? __ldg((const float *)(const void *)(bias + both * a.side.part_bytes) + row) : 0);
            second = second * f[0] + (bias && both ? __ldg((const float *)(const void *)bias + row) : 0);
            const float h = moqk_activate(a.activation, both ? second : first, both ? first : 0);
            __nv_bfloat16 *to = (__nv_bfloat16 *)a.y + (int64_t)(s.first + m) * a.halves * a.side.rows + row;
            const __nv_bfloat16 hi = __float2bfloat16_rn(h);
            to[0] = hi;
            if (split) to[a.side.rows] = __float2bfloat16_rn(h - __bfloat162float(hi));
        }
    }
}

/* A warp's run of a segment. sums: [warps][parts][products][lane], what warps leave for others, whose signals are `left`; turn: parity of these. */
template <int FORM, int STEP, int NB>
__device__ __forceinline__ void moqk_runs_segment(const moqk_moe_runs &a, const moqk_segment &s, moqk_runs_place &at, float4 *sums, uint32_t left, float4 *pair,
                                                  uint32_t turn)
{
    const int32_t lane = threadIdx.x, warp = threadIdx.y;
    const moqk_run_cut cut = moqk_cut_of(a, s, warp);
#pragma unroll 1
    for (int phase = 0; phase < 3; phase++) {
        const int2 piece = moqk_phase_of(cut, phase);
        int32_t q = piece.x, unit = q / cut.each, rest = q - unit * cut.each, part = rest >= a.side.chunks, chunk = rest - part * a.side.chunks;
        float acc[1][NB][4], gate[NB][4];
#pragma unroll
        for (int b = 0; b < NB; b++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[0][b][i] = gate[b][i] = 0;
#pragma unroll 1
        while (q < piece.y) {
            const int32_t n = min(piece.y - q, a.side.chunks - chunk);
            moqk_runs_chunks<FORM, STEP, NB>(a, s, at, s.unit + unit, part, chunk, n, acc);
            q += n;
            chunk += n;
            if (chunk < a.side.chunks) break; /* the end of phase 0 */
            chunk = 0;
            if (++part < a.side.parts) {
#pragma unroll
                for (int b = 0; b < NB; b++)
#pragma unroll
                    for (int i = 0; i < 4; i++) gate[b][i] = acc[0][b][i], acc[0][b][i] = 0;
                continue;
            }
            if (phase == 2) {
                int32_t w = warp;
                while (moqk_cut_of(a, s, w).begin > unit * cut.each) w--;
                for (; w < warp; w++) {
                    const moqk_run_cut other = moqk_cut_of(a, s, w);
                    if (other.begin == other.end) continue; /* it left nothing */
                    moqk_barrier_wait(left + 8 * (uint32_t)w, turn);
#pragma unroll
                    for (int b = 0; b < NB; b++) {
                        const float4 *from = sums + (w * a.side.parts * NB + b) * 32 + lane;
                        const float4 u = from[(a.side.parts - 1) * NB * 32], v = a.side.parts == 2 ? from[0] : make_float4(0, 0, 0, 0);
                        acc[0][b][0] += u.x;
                        acc[0][b][1] += u.y;
                        acc[0][b][2] += u.z;
                        acc[0][b][3] += u.w;
                        gate[b][0] += v.x;
                        gate[b][1] += v.y;
                        gate[b][2] += v.z;
                        gate[b][3] += v.w;
                    }
                }
            }
            moqk_runs_finish<NB>(a, s, s.unit + unit, pair, acc, gate);
            part = 0;
            unit++;
#pragma unroll
            for (int b = 0; b < NB; b++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[0][b][i] = gate[b][i] = 0;
        }
        if (phase > 0) continue;
        if (piece.x < piece.y)
#pragma unroll
            for (int b = 0; b < NB; b++) {
                const int begun = part + 1 == a.side.parts; /* the last part */
                float4 *to = sums + (warp * a.side.parts * NB + b) * 32 + lane;
                const float4 u = make_float4(acc[0][b][0], acc[0][b][1], acc[0][b][2], acc[0][b][3]);
                to[(a.side.parts - 1) * NB * 32] = begun ? u : make_float4(0, 0, 0, 0);
                if (a.side.parts == 2) to[0] = begun ? make_float4(gate[b][0], gate[b][1], gate[b][2], gate[b][3]) : u;
            }
        __syncwarp();
        if (lane == 0) moqk_barrier_arrive(left + 8 * (uint32_t)warp);
    }
}

/* Blocks: one a multiprocessor. */
template <int FORM, int STEP> __global__ void __launch_bounds__(MOQK_RUNS_WARPS * 32, 1) moqk_moe_run(const __grid_constant__ moqk_moe_runs a)
{
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr uint32_t BYTES = moqk_chunk_bytes(FORM);
    const int32_t warp = threadIdx.y, thread = warp * 32 + (int32_t)threadIdx.x;
    const uint32_t base = (uint32_t)__cvta_generic_to_shared(shared), left = base + a.bars_at + MOQK_RUNS_WARPS * 8;
    if (thread < 2 * MOQK_RUNS_WARPS) moqk_barrier_init(base + a.bars_at + 8 * (uint32_t)thread, 1);
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    __syncthreads();
    moqk_wait_for_before();
    moqk_dependents_may_start();
    const int64_t units = (int64_t)a.tiles[0] * a.side.tiles;
    const int32_t begin = (int32_t)(units * blockIdx.x / gridDim.x), end = (int32_t)(units * (blockIdx.x + 1) / gridDim.x);
    moqk_runs_place at = {base + (uint32_t)warp * BYTES, base + a.bars_at + 8 * (uint32_t)warp, 0, 0, NULL, 0, end,
                          (moqk_runs_ahead *)(void *)(shared + a.ahead_at) + warp};
    if (threadIdx.x == 0) *at.ahead = {begin, 3, 0, 0, {0, 0, 0, 0, 0}};
    __syncwarp();
    moqk_runs_ask<BYTES>(a, at);
    float4 *sums = (float4 *)(void *)(shared + a.sums_at), *pair = (float4 *)(void *)(shared + a.pair_at) + warp * 64;
    moqk_segment s = {0, 0, 0, 0, 0}, later = s;
    int32_t next = begin, more = moqk_segment_at(a, begin, end, &next, &s), buffer = 0;
    if (more && a.buffers == 2) moqk_runs_x(a, s, base + a.x_at);
    for (uint32_t turn = 0; more; turn ^= 1) {
        const int32_t from = next;
        at.x = base + a.x_at + (uint32_t)buffer * a.x_bytes;
        if (a.buffers == 1) {
            __syncthreads(); /* nobody reads the segment before */
            moqk_runs_x(a, s, at.x);
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();
        more = moqk_segment_at(a, from, end, &next, &later);
        if (a.buffers == 2) {
            buffer ^= 1;
            if (more) moqk_runs_x(a, later, base + a.x_at + (uint32_t)buffer * a.x_bytes);
        }
        if (s.count * a.halves <= 8) moqk_runs_segment<FORM, STEP, 1>(a, s, at, sums, left, pair, turn);
        else moqk_runs_segment<FORM, STEP, MOQK_RUNS_MOST>(a, s, at, sums, left, pair, turn);
        s = later;
    }
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-moe-host   which of them runs, and their launches
   Few rows of experts that >>cuda-moe-few takes: a launch per MOQK_FEW_ROWS rows. Somewhat more of them: >>cuda-moe-runs. All others: a launch for each
   step.
   ------------------------------------------------------------------------------------------------ */

/* Rows that >>cuda-moe-few runs faster, of experts with small matrices and of others. Measured on an H200, NVFP4, this kernel and >>cuda-moe-runs: 8 of 128
   experts of 2048x768, 2, 4 rows 20, 31 us and 42, 52, 8 rows two launches of 4 and 64; 4 of 32 of 2880x2880, 2, 4 rows 38, 67 and 56, 75, 8 rows 130
   and 100. */
enum { MOQC_MOE_SMALL = 4 << 20, MOQC_MOE_FEW = 8, MOQC_MOE_FEW_LARGE = 4 };

/* What >>cuda-moe-few needs of these experts. */
typedef struct moqc_few {
    moqk_few call;              /* without what differs between calls */
    int form, step;
    void *memory;               /* NULL: it does not take them */
    size_t bytes;
} moqc_few;

typedef struct moqc_experts {
    moq_routing routing;
    moq_activation_desc activation;
    const float *bias;          /* [experts] on the device, or NULL */
    moqc_bank *in, *down;       /* in: [gate, up] or [up] of every expert */
    int64_t cols, n, out;
    int fed;                    /* their inputs go through the feed whatever the number of rows */
    moqc_few few;
} moqc_experts;

/* ---- few rows ---- */

typedef void (*moqc_few_kernel)(const moqk_few);

/* NULL: none. */
static moqc_few_kernel moqc_few_find(int form, int step, int one)
{
    if (form == MOQK_NVFP4) return one ? moqk_moe_few<MOQK_NVFP4, 0, 1> : moqk_moe_few<MOQK_NVFP4, 0, 0>;
    if (form == MOQK_MXFP4) return one ? moqk_moe_few<MOQK_MXFP4, 0, 1> : moqk_moe_few<MOQK_MXFP4, 0, 0>;
    if (form == MOQK_FAST_U4 && step == 64) return one ? moqk_moe_few<MOQK_FAST_U4, 64, 1> : moqk_moe_few<MOQK_FAST_U4, 64, 0>;
    return NULL;
}

/* Would a mixture of parts like this one, planned but not filled, be taken? Unless its experts differ or are too many, see moqc_few_takes. */
static int moqc_few_likely(const moqc_ctx *c, const moqc_part *p, int kernel_layout)
{
    const moq_linear *w = &p->layer;
    const int form = moqk_form_of(p->d);
    if (c->sm != 90 || strcmp(c->kernel, "auto") != 0 || kernel_layout != 1 || form < 0 || !moqc_few_find(form, moqk_form_step(p->d, form), 1)) return 0;
    return !p->d.rounds && p->d.rows % 8 == 0 && p->d.cols % 8 == 0 && w->hadamard_size == 0 && !w->pre_quant_scale.data && !w->group_index.data &&
        !w->lora_a.data;
}

/* The distance in bytes between parts that are all of one form, read x as it is and lie at equal distances; 0: they are not so. */
static int64_t moqc_few_distance(const moqc_bank *b, int form, int step)
{
    const moqk_part *p = &b->part[0].d;
    const int32_t count = b->experts * b->parts;
    const int64_t apart = count > 1 ? b->part[1].d.packed[0] - p->packed[0] : 16;
    for (int32_t i = 0; i < count; i++) {
        const moqc_part *q = &b->part[i];
        if (q->kernel[0]->layout != 1 || moqk_form_of(q->d) != form || moqk_form_step(q->d, form) != step || q->d.group != p->group) return 0;
        if (q->has_lora) return 0;
        if (!moqc_direct(&q->d) || q->d.rows != p->rows || q->d.cols != p->cols || q->d.packed[0] != p->packed[0] + i * apart) return 0;
        if ((q->d.bias != NULL) != (p->bias != NULL) || (p->bias && (const uint8_t *)q->d.bias != (const uint8_t *)p->bias + i * apart)) return 0;
    }
    return apart;
}

static void moqc_few_side(const moqc_bank *b, int form, int step, moqk_few_side *s)
{
    const moqk_part *p = &b->part[0].d;
    const moqk_fast f = moqk_fast_of(*p, form);
    s->packed = p->packed[0];
    s->bias = p->bias;
    s->part_bytes = moqc_few_distance(b, form, step);
    s->parts = b->parts;
    s->expert_bytes = s->part_bytes * s->parts;
    s->rows = p->rows;
    s->tiles = (int32_t)f.tiles;
    s->chunks = (int32_t)f.chunks;
    s->groups = (int32_t)f.groups;
    while (step > 0 && 1 << s->shift < p->group) s->shift++;
}

/* Places in shared memory of a cut whose rows and runs are chosen. Returns their bytes. */
static int64_t moqc_few_fill_in(moqk_few *f, int form, int32_t warps)
{
    const int64_t rows = f->rows, columns = rows * (f->bf16 ? 1 : 2);
    int64_t at = moqk_pad(moqc_max((int64_t)warps * MOQK_FEW_STAGES * moqk_chunk_bytes(form), 16 * f->routing.experts * rows), 128); /* or moqk_choose's */
    f->bars_at = (uint32_t)at;
    at += moqk_pad((int64_t)warps * MOQK_FEW_STAGES * 8, 128);
    f->x_pitch = (uint32_t)f->side[0].chunks * 512 + 16;
    f->x_at = (uint32_t)at;
    at += columns * f->x_pitch;
    f->stage_at = (uint32_t)at;
    at += warps * (rows == 1 && f->bf16 ? 1 : 2 * rows) * MOQK_FEW_PITCH;
    f->sums_at = (uint32_t)at;
    at += (rows == 1 ? f->side[0].units : MOQK_FEW_UNITS) * f->side[0].each * rows * 64;
    f->more_at = (uint32_t)at;
    at += f->side[1].units * (rows == 1 ? f->routing.top_k * f->side[1].runs : warps) * rows * 64;
    f->half_at = (uint32_t)at;
    at += rows > 1 && f->duo ? f->side[1].units * rows * 64 : 0;
    f->factor_at = (uint32_t)at;
    at += moqk_pad((int64_t)f->routing.experts * (f->side[0].parts + 1) * 4, 16);
    const int64_t list = f->side[0].units * f->side[0].each + moqc_min(f->routing.top_k * rows, f->routing.experts) * f->side[1].units * f->side[1].runs;
    f->list_at = (uint32_t)at;
    at += list * 16;
    f->logits_at = (uint32_t)at;
    at += rows == 1 ? moqk_pad(f->routing.experts * 4, 16) : 0;
    f->into_at = (uint32_t)at;
    at += rows == 1 ? f->side[1].units * 64 : 0;
    f->keys_at = (uint32_t)at;
    return at + rows * moqk_pad(f->routing.experts, 128) * 4;
}

/* See moqk_few_over. */
static uint32_t moqc_few_magic(int32_t d) { return d == 1 ? 0 : (uint32_t)(((uint64_t)1 << 32) / (uint32_t)d + 1); }

/* Chunks of a run: as many as leave the warp with most of them least to do; to begin and end a run takes as long as a chunk. A single row's warps do so
   little that others wait for a last run from its beginning. tiles: row tiles that the warps share. */
static void moqc_few_runs(moqk_few_side *s, int64_t tiles, int32_t warps, int one)
{
    int64_t least = INT64_MAX;
    for (int32_t run = 1; run <= s->chunks; run++) {
        const int64_t work = moqk_ceil(tiles * moqk_ceil(s->chunks, run), warps) * (run + 1) + (one ? run : 0);
        if (work > least) continue;
        least = work;
        s->run = run;
    }
    s->runs = (int32_t)moqk_ceil(s->chunks, s->run);
    s->each = s->runs * s->parts;
    s->magic = moqc_few_magic(s->each);
    s->runs_magic = moqc_few_magic(s->runs);
    s->run_magic = moqc_few_magic(s->run);
}

/* Experts that the rows can choose together. */
static int64_t moqc_few_experts(const moqk_few *f) { return moqc_min((int64_t)f->routing.top_k * f->rows, f->routing.experts); }

/* The cut of a launch by blocks alone or by pairs, which of several rows share row tiles of y only; bytes of shared memory, 0: there is not enough. */
static int64_t moqc_few_try(const moqc_ctx *c, moqk_few *f, int form, int32_t duo, int32_t blocks, int32_t *warps)
{
    const int64_t all = moqc_few_experts(f);
    f->duo = duo;
    f->team = f->rows == 1 ? duo : 0;
    const int32_t lists = blocks >> f->team, pairs = blocks >> duo;
    f->tiles_magic = moqc_few_magic(f->side[0].tiles);
    f->grid_magic = moqc_few_magic(lists);
    f->duo_magic = moqc_few_magic(pairs);
    f->side[0].units = (int32_t)moqk_ceil(all * f->side[0].tiles, lists);
    f->side[1].units = (int32_t)moqk_ceil(f->side[1].tiles, pairs);
    if (f->rows > 1 && f->side[1].units > MOQK_FEW_TILES) return 0;
    if (moqc_max(f->side[0].units, moqc_max(f->side[0].chunks, f->side[1].chunks)) > 4095) return 0; /* see moqk_few_pack */
    for (*warps = MOQK_FEW_WARPS; *warps >= 8; *warps -= 4) {
        moqc_few_runs(&f->side[0], f->side[0].units * f->side[0].parts, *warps << f->team, f->rows == 1);
        moqc_few_runs(&f->side[1], all * (f->rows == 1 || duo ? f->side[1].units : 1), *warps << duo, f->rows == 1);
        if (f->team && f->side[0].each < 2) return 0; /* both blocks have a part of every row tile */
        if (duo && f->routing.top_k * f->side[1].runs < 2) return 0;
        const int64_t bytes = moqc_few_fill_in(f, form, *warps);
        if (bytes <= c->most_shared - (int64_t)sizeof(moqk_few_choices) - 64) return bytes;
    }
    return 0;
}

/* Chunks of the block that has most of them. */
static int64_t moqc_few_most(const moqk_few *f, int32_t duo, int32_t blocks)
{
    const int32_t team = f->rows == 1 ? duo : 0;
    const int64_t all = moqc_few_experts(f), first = moqk_ceil(all * f->side[0].tiles, blocks >> team) * f->side[0].parts * f->side[0].chunks;
    return (first >> team) + (moqk_ceil(f->side[1].tiles, blocks >> duo) * all * f->side[1].chunks >> duo);
}

/* The cut of a launch, and its blocks; bytes of shared memory, 0: there is not enough. Pairs where they share row tiles more evenly. */
static int64_t moqc_few_cut(const moqc_ctx *c, moqk_few *f, int form, int32_t *warps, int32_t *blocks)
{
    *blocks = (int32_t)moqc_min(c->sm_count, (int64_t)f->routing.top_k * f->side[0].tiles); /* every one has work before the activation */
    const int32_t even = *blocks & ~1;
    if (f->pairs && even > 0 && moqc_few_most(f, 1, even) * 20 < moqc_few_most(f, 0, *blocks) * 19) {
        const int64_t bytes = moqc_few_try(c, f, form, 1, even, warps);
        *blocks = bytes ? even : *blocks;
        if (bytes) return bytes;
    }
    return moqc_few_try(c, f, form, 0, *blocks, warps);
}

/* Is there a kernel for them, and room for as many rows as it takes? */
static int moqc_few_takes(const moqc_ctx *c, const moqc_experts *x)
{
    const moq_routing *r = &x->routing;
    const moqk_part *in = &x->in->part[0].d, *down = &x->down->part[0].d;
    const int form = moqk_form_of(*in), step = form < 0 ? 0 : moqk_form_step(*in, form);
    int32_t warps, blocks;
    moqk_few f;
    if (c->sm != 90 || strcmp(c->kernel, "auto") != 0 || form < 0 || !moqc_few_find(form, step, 1)) return 0;
    if (r->top_k > MOQK_FEW_TOP || r->experts > MOQK_FEW_EXPERTS || x->n % 8 != 0 || x->cols % 4 != 0 || down->cols != in->rows) return 0;
    if (moqc_few_distance(x->in, form, step) == 0 || moqc_few_distance(x->down, form, step) == 0) return 0;
    for (int32_t rows = 1; rows <= MOQK_FEW_ROWS; rows++) { /* runs differ, and with them the room for sums: fewer rows may need more */
        memset(&f, 0, sizeof f);
        f.routing = *r;
        f.rows = rows;
        f.bf16 = (uint8_t)c->bf16;
        moqc_few_side(x->in, form, step, &f.side[0]);
        moqc_few_side(x->down, form, step, &f.side[1]);
        if (moqc_few_cut(c, &f, form, &warps, &blocks) == 0) return 0;
    }
    return 1;
}

/* A launch of `blocks`, in pairs or alone. with: [3], kept by the caller. */
static cudaLaunchConfig_t moqc_few_launch(const moqc_ctx *c, const moqk_few *f, int32_t warps, int32_t blocks, int64_t bytes, cudaLaunchAttribute *with)
{
    cudaLaunchConfig_t how = {};
    memset(with, 0, 3 * sizeof *with);
    with[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    with[0].val.programmaticStreamSerializationAllowed = 1;
    with[1].id = cudaLaunchAttributeCooperative;
    with[1].val.cooperative = 1;
    with[2].id = cudaLaunchAttributeClusterDimension;
    with[2].val.clusterDim.x = 2;
    with[2].val.clusterDim.y = with[2].val.clusterDim.z = 1;
    how.gridDim = dim3((unsigned)blocks);
    how.blockDim = dim3(32, (unsigned)warps);
    how.dynamicSmemBytes = (size_t)bytes;
    how.stream = c->stream;
    how.attrs = with;
    how.numAttrs = f->duo ? 3 : 2;
    return how;
}

/* All the room that the kernel can have: backends share its limit, so a launch must not lower it. */
static cudaError_t moqc_few_room(const moqc_ctx *c, moqc_few_kernel kernel)
{
    cudaFuncAttributes own;
    const cudaError_t e = cudaFuncGetAttributes(&own, (const void *)kernel);
    if (e != cudaSuccess) return e;
    return cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, c->most_shared - (int)own.sharedSizeBytes);
}

/* Do pairs have room on the device, all at once, for every number of rows that wants them? */
static int moqc_few_pairs(const moqc_ctx *c, moqk_few f, int form, int step)
{
    f.pairs = 1;
    for (f.rows = 1; f.rows <= MOQK_FEW_ROWS; f.rows++) {
        const moqc_few_kernel kernel = moqc_few_find(form, step, f.rows == 1);
        cudaLaunchAttribute with[3];
        int32_t warps, blocks;
        int clusters = 0;
        const int64_t bytes = moqc_few_cut(c, &f, form, &warps, &blocks);
        if (!f.duo) continue;
        const cudaLaunchConfig_t how = moqc_few_launch(c, &f, warps, blocks, bytes, with);
        cudaError_t e = moqc_few_room(c, kernel);
        if (e == cudaSuccess) e = cudaOccupancyMaxActiveClusters(&clusters, (const void *)kernel, &how);
        if (e != cudaSuccess) cudaGetLastError(); /* no pairs then */
        if (e != cudaSuccess || 2 * clusters < blocks) return 0;
    }
    return 1;
}

static moq_result moqc_few_prepare(moqc_ctx *c, moqc_experts *x, moq_error *err)
{
    moqc_few *few = &x->few;
    moqk_few *f = &few->call;
    const int32_t experts = x->routing.experts, parts = x->in->parts, each = parts + 1;
    const size_t factors = (size_t)experts * (size_t)each * 4, first = (size_t)moqk_pad((int64_t)factors, 256);
    few->form = moqk_form_of(x->in->part[0].d);
    few->step = moqk_form_step(x->in->part[0].d, few->form);
    moqc_few_side(x->in, few->form, few->step, &f->side[0]);
    moqc_few_side(x->down, few->form, few->step, &f->side[1]);
    f->routing = x->routing;
    f->bias = x->bias;
    f->activation = x->activation;
    f->cols = (int32_t)x->cols;
    f->hidden_cols = (int32_t)moqk_pad(x->n, 256);
    f->bf16 = (uint8_t)c->bf16;
    f->pairs = moqc_few_pairs(c, *f, few->form, few->step);
    f->routed = c->sm_count * 16;
    const size_t hidden = 2 * ((size_t)f->routed + (size_t)(MOQK_FEW_ROWS * x->routing.top_k) * (size_t)f->hidden_cols) * 4;
    few->bytes = first + hidden + 256;
    if (!(few->memory = moqc_take(c, few->bytes, "a mixture of experts", err))) return MOQ_E_NOMEM;
    f->factor = (const float *)few->memory;
    f->hidden = (uint32_t *)(void *)((uint8_t *)few->memory + first);
    f->state = (int32_t *)(void *)((uint8_t *)few->memory + first + hidden);
    const float fix = few->form == MOQK_FAST_U4 ? 64.0f : moqc_form_fix(few->form); /* see moqk_run_pair */
    float *list = (float *)moq_allocate(&c->host, factors);
    if (!list) return moq_fail(err, MOQ_E_NOMEM, c->name, "no host memory for %d experts", (int)experts);
    for (int32_t e = 0; e < experts; e++)
        for (int32_t k = 0; k < each; k++)
            list[e * each + k] = (k < parts ? x->in->part[e * parts + k].d.factor : x->down->part[e].d.factor) * fix;
    const int fine = moqc_send(c, few->memory, list, factors) && moqc_ok(c, cudaMemsetAsync(f->hidden, 0xff, hidden, c->stream), "cudaMemset") &&
        moqc_ok(c, cudaMemsetAsync(f->state, 0, 256, c->stream), "cudaMemset");
    moq_release(&c->host, list, factors);
    return fine ? MOQ_OK : moqc_why(c, c->name, err);
}

/* router: NULL: logits and x are there. */
static void moqc_launch_few(moqc_ctx *c, const moqc_experts *m, const void *x, const void *logits, int32_t rows, void *y, void *into,
                            const moqk_few_router *router)
{
    moqk_few f = m->few.call;
    if (router) f.router = *router;
    const moqc_few_kernel kernel = moqc_few_find(m->few.form, m->few.step, rows == 1);
    int32_t warps, blocks;
    cudaLaunchAttribute with[3];
    f.x = x;
    f.logits = logits;
    f.y = y;
    f.into = into;
    f.rows = rows;
    const int64_t bytes = moqc_few_cut(c, &f, m->few.form, &warps, &blocks);
    const cudaLaunchConfig_t how = moqc_few_launch(c, &f, warps, blocks, bytes, with);
    if (moqc_ok(c, moqc_few_room(c, kernel), "cudaFuncSetAttribute")) moqc_ok(c, cudaLaunchKernelEx(&how, kernel, (const moqk_few)f), "moe-few");
}

/* May a product of >>cuda-decode that makes a norm wait for a mixture? It is launched, or waits. */
static int moqc_hold_router(const moqc_job *j, int form, const moqk_cut *u)
{
    moqc_held *h = j->c->held;
    const moqk_call *a = &j->call;
    if (u->norm.threads == 0 || form != MOQK_FAST_BF16 || a->m != 1 || a->part_count != 1 || a->accumulate || j->part->d.rows > MOQK_FEW_EXPERTS) return 0;
    if (a->x_bf16 != j->c->bf16 || a->y_bf16 != j->c->bf16) return 0;
    h->router = *j;
    h->router_cut = *u;
    h->routes = j->c->waiting = 1;
    return 1;
}

/* May the router that waits be one launch with this mixture of a row? The norm's x may be where y is: every block has read it before any value of y is
   known, to which all blocks contribute. */
static int moqc_router_fits(const moqc_ctx *c, const moqc_experts *m, const void *x, const void *logits, const void *y)
{
    const moqc_held *h = c->held;
    const moqk_cut *u = &h->router_cut;
    const int64_t elem = c->bf16 ? 2 : 4, out = m->out * elem, tiles = moqk_ceil(m->routing.experts, 16), chunks = moqk_ceil(m->cols, 64);
    moqk_few f = m->few.call;
    int32_t warps, blocks;
    if (!h->routes || h->experts || h->router.call.y != logits || u->norm.normed != x || h->router.part->d.rows != m->routing.experts ||
        h->router.part->d.cols != m->cols) return 0;
    if (!moqc_apart(y, out, x, m->cols * elem) || !moqc_apart(y, out, logits, m->routing.experts * elem)) return 0;
    f.rows = 1;
    if (moqc_few_cut(c, &f, m->few.form, &warps, &blocks) == 0) return 0;
    return warps > MOQK_FEW_VOTERS + MOQK_FEW_LISTERS && u->norm.threads <= 32 * warps && tiles * u->ways <= blocks &&
        moqk_ceil(chunks, u->ways) <= MOQK_FEW_ROUTED_CHUNKS;
}

/* The mixture that waits, and its router if that does. into: see moqk_few. */
static void moqc_launch_mixture(moqc_ctx *c, void *into)
{
    const moqc_held *h = c->held;
    moqk_few_router r;
    memset(&r, 0, sizeof r);
    if (h->routes) {
        const moqk_part *p = &h->router.part->d;
        r.packed = p->packed[0];
        r.bias = p->bias;
        r.x = h->router.call.x;
        r.logits = h->router.call.y;
        r.norm = h->router_cut.norm;
        r.tiles = (int32_t)moqk_ceil(p->rows, 16);
        r.chunks = (int32_t)moqk_ceil(p->cols, 64);
        r.ways = h->router_cut.ways;
        r.factor = p->factor * moqc_form_fix(MOQK_FAST_BF16);
    }
    moqc_launch_few(c, h->experts, h->mixed, h->logits, h->mixed_rows, h->mixture, into, h->routes ? &r : NULL);
}

/* May the mixture that waits add its y to what this norm reads? Blocks would read what others write already where buffers touch. */
static int moqc_mixture_adds(const moqc_ctx *c, const moq_norm_desc *n)
{
    const moqc_held *h = c->held;
    const moqc_experts *m = h->experts;
    const int64_t rows = h->mixed_rows, elem = c->bf16 ? 2 : 4, x = rows * m->out * elem;
    return n->groups <= 1 && n->rows == rows && n->cols == m->out && (n->x_stride == 0 || n->x_stride == n->cols) && moqc_apart(n->x, x, h->mixture, x) &&
        moqc_apart(n->x, x, h->mixed, rows * m->cols * elem) && moqc_apart(n->x, x, h->logits, rows * m->routing.experts * elem);
}

/* ---- preparing ---- */

static moq_result moqc_check_moe(const moq_moe *m, moq_error *err)
{
    const moq_routing *r = &m->routing;
    const char *name = m->name ? m->name : "";
    int32_t groups = r->groups > 1 ? r->groups : 1, tops = r->groups > 1 ? r->top_groups : 1;
    if (r->experts < 1 || r->top_k < 1 || r->top_k > r->experts || !m->up || !m->down)
        return moq_fail(err, MOQ_E_ARG, name, "top %d of %d experts cannot be chosen", (int)r->top_k, (int)r->experts);
    if (r->experts > 2048) return moq_fail(err, MOQ_E_UNSUPPORTED, name, "%d experts; at most 2048 are routed here", (int)r->experts);
    if (r->experts % groups != 0 || tops < 1 || tops > groups || tops * (r->experts / groups) < r->top_k)
        return moq_fail(err, MOQ_E_ARG, name, "%d of %d groups of %d experts do not hold the %d to choose", (int)tops, (int)groups, (int)r->experts, (int)r->top_k);
    if (r->bias.data && r->bias.count != (uint64_t)r->experts)
        return moq_fail(err, MOQ_E_SHAPE, name, "routing bias of %llu elements, expected %d", (unsigned long long)r->bias.count, (int)r->experts);
    if (r->on_input) return moq_fail(err, MOQ_E_UNSUPPORTED, name, "this router's weights multiply the inputs of experts, which only the CPU backend does so far");
    if ((unsigned)m->activation.kind > (unsigned)MOQ_RELU2 || (m->activation.kind == MOQ_RELU2) != (m->gate == NULL))
        return moq_fail(err, MOQ_E_ARG, name, "activation %d %s a gate", (int)m->activation.kind, m->gate ? "has no use for" : "needs");
    for (int32_t e = 0; e < r->experts; e++) {
        const moq_linear *g = m->gate ? &m->gate[e] : &m->up[e], *u = &m->up[e], *d = &m->down[e];
        if (g->cols != m->up[0].cols || u->cols != g->cols || g->rows != m->up[0].rows || u->rows != g->rows || d->cols != u->rows || d->rows != m->down[0].rows)
            return moq_fail(err, MOQ_E_SHAPE, name, "expert %d has shapes [%lld, %lld], [%lld, %lld], [%lld, %lld] that do not fit together", (int)e, (long long)g->rows,
                            (long long)g->cols, (long long)u->rows, (long long)u->cols, (long long)d->rows, (long long)d->cols);
    }
    return MOQ_OK;
}

static void moqc_free_experts(moqc_ctx *c, moqc_experts *x)
{
    if (!x) return;
    moqc_bank_free(c, x->in);
    moqc_bank_free(c, x->down);
    moqc_give(c, (void *)x->bias);
    moqc_give(c, x->few.memory);
    moq_release(&c->host, x, sizeof *x);
}

/* Where experts have many choices, are x and what is between the products taken as they are? */
static int moqc_unfed(const moqc_experts *x)
{
    int unfed = moqc_gemm_tokens(x->in) > 0 && moqc_gemm_tokens(x->down) > 0;
    for (int32_t i = 0; i < x->in->count; i++) unfed = unfed && !x->in->part[i].has_lora;
    for (int32_t j = 0; j < x->in->parts; j++) unfed = unfed && x->in->direct[j];
    for (int r = 2; r < MOQC_REGIMES; r++) unfed = unfed && moqc_packs(x->down, NULL, x->in->rows, moqc_regime_rows[r]);
    return unfed;
}

static moq_result moqc_fill_experts(moqc_ctx *c, moqc_experts *x, const moq_moe *m, moq_error *err)
{
    const moq_linear *in[2] = {m->gate ? m->gate : m->up, m->up}, *down[1] = {m->down};
    int32_t experts = m->routing.experts, gated = m->gate != NULL;
    moqc_need first, second, need;
    memset(&first, 0, sizeof first);
    memset(&second, 0, sizeof second);
    memset(&need, 0, sizeof need);
    x->routing = m->routing;
    x->activation = m->activation;
    x->cols = m->up[0].cols;
    x->n = m->up[0].rows;
    x->out = m->down[0].rows;
    if (!(x->in = moqc_bank_create(c, in, experts, 1 + gated, 1, &first, err))) return MOQ_E_NOMEM;
    if (!(x->down = moqc_bank_create(c, down, experts, 1, 1, &second, err))) return MOQ_E_NOMEM;
    if (m->routing.bias.data) {
        if (!(x->bias = (const float *)moqc_take(c, (size_t)experts * 4, "a routing bias", err))) return MOQ_E_NOMEM;
        if (!moqc_send_floats(c, (void *)x->bias, &m->routing.bias, 0, 1, experts)) return moqc_why(c, m->name, err);
    }
    if (moqc_few_takes(c, x)) {
        moq_result rc = moqc_few_prepare(c, x, err);
        if (rc < 0) return rc;
    }
    need.moe_top = m->routing.top_k;
    need.moe_cols = moqc_max(first.cols, second.cols);
    x->fed = !moqc_unfed(x);
    need.moe_feed = x->fed ? need.moe_cols : 0;
    need.moe_rank = moqc_max(first.rank, second.rank);
    need.moe_hidden = x->n * (1 + gated);
    need.moe_out = x->out;
    need.experts = experts;
    return moqc_grow(c, &need, c->be.max_rows, err);
}

static moq_experts *moqc_prepare_moe(moq_backend *be, const moq_moe *m, moq_error *err)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    moqc_clear(err);
    if (moqc_check_moe(m, err) < 0) return NULL;
    moqc_experts *x = (moqc_experts *)moq_allocate(&c->host, sizeof *x);
    if (!x) { moq_fail(err, MOQ_E_NOMEM, m->name, "no host memory to prepare it"); return NULL; }
    if (moqc_fill_experts(c, x, m, err) < 0) { moqc_free_experts(c, x); return NULL; }
    return (moq_experts *)(void *)x;
}

static size_t moqc_moe_bytes(const moq_backend *be, const moq_experts *m)
{
    const moqc_experts *x = (const moqc_experts *)(const void *)m;
    (void)be;
    return x ? x->in->bytes + x->down->bytes + x->few.bytes : 0;
}

static void moqc_release_moe(moq_backend *be, moq_experts *m)
{
    moqc_on on(moqc_of(be));
    moqc_free_experts(moqc_of(be), (moqc_experts *)(void *)m);
}

/* ---- running ---- */

/* Rows of a tile of >>cuda-gemm, of at most `tokens`, that costs experts with `each` choices on average least: an expert has more or less of them, by
   their root. */
static int32_t moqc_moe_tokens(const moqc_experts *m, int64_t tokens, double each)
{
    static const double spread[4] = {-1.15, -0.32, 0.32, 1.15}; /* of four equal quarters of experts */
    int odd = 1;               /* there are tiles that are no power of two */
    for (const moqc_part *p : {&m->in->part[0], &m->down->part[0]})
        odd = odd && p->kernel[MOQC_REGIMES - 1]->launch == moqc_launch_wgmma && moqk_fast_bits(moqk_form_of(p->d)) != 8;
    const double slabs = (double)moqk_ceil(m->cols, 64);
    int32_t best = 24;
    double least = 1e30;
    for (int i = 0; i < MOQC_TILES; i++) {
        const int32_t most = moqc_tiles[i].tokens - 8; /* tiles begin at multiples of 8 */
        if (moqc_tiles[i].which != MOQC_WGMMA || moqc_tiles[i].tokens > tokens || most < 24 + 32 * !odd || (moqc_tiles[i].tokens % 64 && !odd)) continue;
        double time = 0;
        for (int k = 0; k < 4; k++) time += ceil(moqc_max(1, (int64_t)(each + spread[k] * sqrt(each))) / (double)most);
        time *= slabs * moqc_tiles[i].slab + moqc_tiles[i].end;
        if (time < least) { least = time; best = most; }
    }
    return best;
}

/* Rows of a tile: what the kernel of that many rows works on at once. An expert rarely gets more than its share of the choices. */
static int32_t moqc_moe_tile(const moqc_experts *m, int64_t rows, int64_t choices)
{
    const int64_t each = choices / m->routing.experts, tokens = moqc_min(moqc_gemm_tokens(m->in), moqc_gemm_tokens(m->down));
    if (rows <= 8) return rows <= 1 ? 1 : rows <= 2 ? 2 : rows <= 4 ? 4 : 8;
    if (tokens > 0 && each >= 8) return moqc_moe_tokens(m, tokens, (double)choices / m->routing.experts);
    if (tokens > 0) return 16;
    return each >= 24 ? 64 : 16;
}

/* The experts of all rows, sorted: tiles of `most` choices at most. */
static void moqc_route(moqc_ctx *c, const moqc_experts *m, const void *logits, int64_t rows, int32_t most, const moqk_choices &k, const moqk_halves &h)
{
    const moq_routing *r = &m->routing;
    const int32_t room = moqk_sort_bytes(r->experts), each = (r->experts * 14 + 15) / 16 * 16, at = (int32_t)moqc_max(room, rows * each);
    const int alone = rows == 1;
    if (!alone && rows <= MOQK_ROUTED && at + rows * r->top_k * 4 <= 48 << 10) {
        moqc_chain(c, "moe", moqk_route_all, h.x16 ? 1 + (unsigned)rows : 1, dim3(32, 32), (size_t)(at + rows * r->top_k * 4), *r, m->bias, logits, c->bf16, k,
                   (int32_t)rows, most, h, at);
    } else {
        moqc_chain(c, "moe", moqk_route, (unsigned)rows, 32, (size_t)r->experts * 14, *r, m->bias, logits, c->bf16, k, alone, h);
        const int32_t count = (int32_t)(rows * r->top_k);
        if (!alone) moqc_chain(c, "moe", moqk_group, count > 512 ? 16 : 1, dim3(32, 32), (size_t)room, k, count, r->top_k, r->experts, most);
    }
    moqc_launched(c, "routing");
}

/* half: outputs of experts are BF16. */
static void moqc_combine(moqc_ctx *c, const moqc_experts *m, int64_t rows, const moqk_choices &k, int half, void *y)
{
    const unsigned threads = rows < 64 ? 64 : 256;
    const dim3 grid((unsigned)rows, (unsigned)moqk_ceil(m->out, 4 * threads));
    const int32_t top = m->routing.top_k;
    const __nv_bfloat16 *out = (const __nv_bfloat16 *)(const void *)c->out;
    if (half) moqc_chain(c, "moe", moqk_combine<__nv_bfloat16, __nv_bfloat16>, grid, threads, 0, k, top, out, m->out, (__nv_bfloat16 *)y);
    else MOQC_BY_ACT(c, (moqc_chain(c, "moe", moqk_combine<float, float>, grid, threads, 0, k, top, c->out, m->out, (float *)y)),
                     (moqc_chain(c, "moe", moqk_combine<float, __nv_bfloat16>, grid, threads, 0, k, top, c->out, m->out, (__nv_bfloat16 *)y)));
    moqc_launched(c, "the sum of experts");
}

/* ---- few rows for each expert ---- */

typedef void (*moqc_runs_kernel)(const moqk_moe_runs);

/* NULL: none, see moqc_few_find. */
static moqc_runs_kernel moqc_runs_find(int form, int step)
{
    if (form == MOQK_NVFP4) return moqk_moe_run<MOQK_NVFP4, 0>;
    if (form == MOQK_MXFP4) return moqk_moe_run<MOQK_MXFP4, 0>;
    return form == MOQK_FAST_U4 && step == 64 ? moqk_moe_run<MOQK_FAST_U4, 64> : NULL;
}

/* Places in shared memory of a cut whose buffers are chosen. Returns their bytes. */
static int64_t moqc_runs_fill_in(moqk_moe_runs *u, int form)
{
    int64_t at = (int64_t)MOQK_RUNS_WARPS * moqk_chunk_bytes(form);
    u->bars_at = (uint32_t)at;
    at += moqk_pad(2 * 8 * MOQK_RUNS_WARPS, 128);
    u->ahead_at = (uint32_t)at;
    at += moqk_pad(MOQK_RUNS_WARPS * (int64_t)sizeof(moqk_runs_ahead), 128);
    u->sums_at = (uint32_t)at;
    at += (int64_t)MOQK_RUNS_WARPS * u->side.parts * u->products * 512;
    u->pair_at = (uint32_t)at;
    at += MOQK_RUNS_WARPS * 1024;
    u->x_pitch = (uint32_t)u->side.chunks * 512 + 16;
    u->x_bytes = (uint32_t)moqk_pad(8 * u->products * (int64_t)u->x_pitch, 128);
    u->x_at = (uint32_t)at;
    return at + (int64_t)u->buffers * u->x_bytes;
}

/* The cut of a launch: x of two tiles where there is room. Bytes of shared memory, 0: there is not enough. */
static int64_t moqc_runs_cut(const moqc_ctx *c, moqk_moe_runs *u, int form)
{
    for (u->buffers = 2; u->buffers > 0; u->buffers--) {
        const int64_t bytes = moqc_runs_fill_in(u, form);
        if (bytes <= c->most_shared) return bytes;
    }
    return 0;
}

static void moqc_runs_side(const moqc_experts *m, int second, int halves, int products, moqk_moe_runs *u)
{
    const moqk_few *f = &m->few.call;
    memset(u, 0, sizeof *u);
    u->side = f->side[second];
    u->factors = f->side[0].parts + 1;
    u->factor = f->factor + (second ? f->side[0].parts : 0);
    u->activates = !second;
    u->activation = m->activation;
    u->cols = (int32_t)(second ? m->n : m->cols);
    u->halves = halves;
    u->products = products;
}

/* Products of 8 columns of a tile; 0: >>cuda-gemm is faster, or there is no room. Measured on an H200, NVFP4, both shapes of bench_backend: one product up
   to 6 choices an expert of BF16 x, 3 of F32, which takes two columns; up to 12 this kernel. */
static int moqc_runs_products(const moqc_ctx *c, const moqc_experts *m, int64_t choices)
{
    const int halves = c->bf16 ? 1 : 2;
    const double each = (double)choices / m->routing.experts;
    int products = each > MOQC_MOE_EACH ? 0 : each * halves <= 6.5 ? 1 : 2;
    if (!m->few.memory || m->cols % 8 != 0) return 0;
    for (; products > 0; products--) {
        moqk_moe_runs u[2];
        for (int i = 0; i < 2; i++) moqc_runs_side(m, i, halves, products, &u[i]);
        if (moqc_runs_cut(c, &u[0], m->few.form) && moqc_runs_cut(c, &u[1], m->few.form)) break;
    }
    return products;
}

static void moqc_moe_runs(moqc_ctx *c, const moqc_experts *m, const void *x, const void *logits, int64_t rows, int products, void *y)
{
    const int halves = c->bf16 ? 1 : 2;
    const moqk_choices k = {c->index, c->weight, c->place, c->row_of, c->expert_of, c->tiles};
    const moqk_halves h = {(const float *)x, halves == 2 ? (uint8_t *)(void *)c->r : NULL, (int32_t)m->cols};
    const moqc_runs_kernel kernel = moqc_runs_find(m->few.form, m->few.step);
    moqc_route(c, m, logits, rows, 8 * products / halves, k, h);
    for (int second = 0; second < 2; second++) {
        moqk_moe_runs u;
        moqc_runs_side(m, second, halves, products, &u);
        u.tiles = c->tiles;
        u.row_of = second ? NULL : c->row_of;
        u.x = second ? (const uint8_t *)(const void *)c->hidden : halves == 2 ? h.x16 : (const uint8_t *)x;
        u.y = second ? (void *)c->out : (void *)c->hidden;
        const int64_t bytes = moqc_runs_cut(c, &u, m->few.form);
        const cudaError_t e = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, c->most_shared);
        if (!moqc_ok(c, e, "cudaFuncSetAttribute")) return;
        moqc_chain(c, "moe-runs", kernel, (unsigned)c->sm_count, dim3(32, MOQK_RUNS_WARPS), (size_t)bytes, u);
    }
    moqc_combine(c, m, rows, k, 0, y);
}

/* ---- all others ---- */

static void moqc_moe_pass(moqc_ctx *c, const moqc_experts *m, const void *x, const void *logits, int64_t rows, void *y)
{
    const moq_routing *r = &m->routing;
    const int64_t choices = rows * r->top_k;
    const int32_t tile = moqc_moe_tile(m, rows, choices);
    const moqk_choices k = {c->index, c->weight, c->place, c->row_of, c->expert_of, c->tiles};
    const moqk_halves none = {NULL, NULL, 0};
    moqc_route(c, m, logits, rows, tile, k, none);
    moqc_run u;
    memset(&u, 0, sizeof u);
    u.x = x;
    u.ldx = m->cols;
    const int half = c->bf16 && m->down->parts == 1 && moqc_packs(m->down, c->hidden, m->in->rows, tile); /* as linear and activate would do it */
    u.y = c->hidden;
    u.y_f32 = !half;
    u.ldy = m->in->rows;
    u.m = (int32_t)choices;
    u.row_of = k.row_of;
    u.expert_of = k.expert_of;
    u.tiles = k.tiles + 4;
    u.tile_rows = tile;
    u.most_tiles = (int32_t)(rows == 1 ? choices : moqc_min(choices, choices / tile + moqc_min(r->experts, choices)));
    moqc_run_bank(c, m->in, &u);
    u.x = c->hidden;
    u.x_f32 = !half;
    u.ldx = m->in->rows;
    u.row_of = NULL;
    u.fused = &m->activation;
    u.y = c->out;
    u.ldy = m->out;
    moqc_run_bank(c, m->down, &u);
    moqc_combine(c, m, rows, k, half, y);
}

static void moqc_moe(moq_backend *be, const moq_experts *experts, const void *x, const void *logits, int32_t rows, void *y)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c, 1);
    const moqc_experts *m = (const moqc_experts *)(const void *)experts;
    int64_t elem = c->bf16 ? 2 : 4;
    const int aligned = ((uintptr_t)x & 15) == 0;
    c->narrowed = NULL;
    const int few = m->few.memory && rows <= (m->cols * m->n <= MOQC_MOE_SMALL ? MOQC_MOE_FEW : MOQC_MOE_FEW_LARGE) && aligned;
    const int64_t little = moqc_max(MOQC_MOE_EACH * m->routing.experts / m->routing.top_k, 1); /* there is room for the feed of so many rows in any case */
    const int64_t most = moqc_min(c->moe_rows, m->fed ? (int64_t)MOQC_MOE_FED : aligned ? (int64_t)MOQC_MOE_ROWS : little);
    if (!(few && rows == 1 && c->capturing && moqc_router_fits(c, m, x, logits, y))) moqc_let_go(c);
    for (int64_t first = 0, n; first < rows; first += n) {
        const uint8_t *in = (const uint8_t *)x + first * m->cols * elem, *l = (const uint8_t *)logits + first * m->routing.experts * elem;
        uint8_t *out = (uint8_t *)y + first * m->out * elem;
        n = moqc_min(rows - first, few ? moqk_ceil(rows, moqk_ceil(rows, MOQK_FEW_ROWS)) : most);
        const int products = few || !aligned ? 0 : moqc_runs_products(c, m, n * m->routing.top_k);
        if (few && n == rows && c->capturing) { /* a norm may follow that adds y to what it reads */
            moqc_held *h = c->held;
            h->experts = m;
            h->mixed = in;
            h->logits = l;
            h->mixed_rows = rows;
            h->mixture = out;
            c->waiting = 1;
        } else if (few) moqc_launch_few(c, m, in, l, (int32_t)n, out, NULL, NULL);
        else if (products > 0) moqc_moe_runs(c, m, in, l, n, products, out);
        else moqc_moe_pass(c, m, in, l, n, out);
    }
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-ssm        state-space mixers; copies of heads
   Convolution and gate run for all rows at once; the states of a head move through the rows of their slot one after the other. F32.
   ------------------------------------------------------------------------------------------------ */

enum { MOQK_SSM_TAPS = 16 };

/* Pointers into one block; see moq_ssm_desc. */
typedef struct moqk_ssm {
    const float *taps, *conv_bias;    /* [width, conv], [width] */
    const float *dt_bias, *decay, *d; /* [heads]; decay = -exp(a_log) */
    const float *norm;                /* [inner] */
    float *past, *states;             /* [slots, width, conv - 1], [slots, heads, head_dim, state] */
    int32_t slots, heads, head_dim, state, groups, conv;
    int64_t inner, width;
    float dt_min, dt_max, eps;
} moqk_ssm;

typedef struct moqc_ssm {
    moqk_ssm d;
    void *memory;
} moqc_ssm;

/* The rows before and after each row in its slot, -1: none (of this call). Rows of no slot: previous -2. A thread per row. */
__global__ void moqk_ssm_chains(const int32_t *slot, int32_t rows, int32_t slots, int32_t *previous, int32_t *next)
{
    int32_t row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    int32_t before = row - 1, after = row + 1, s = slot[row];
    while (before >= 0 && slot[before] != s) before--;
    while (after < rows && slot[after] != s) after++;
    previous[row] = s < 0 || s >= slots ? -2 : before;
    next[row] = after < rows ? after : -1;
}

/* Input of the convolution `back` tokens before row `row` in channel i: from this call's rows, the slot's past, or before its start. */
template <typename T> __device__ __forceinline__ float moqk_ssm_input(const moqk_ssm &s, const T *x, const int32_t *previous, int32_t slot,
                                                                      int32_t pos, int32_t row, int64_t i, int32_t back)
{
    if (back > pos) return 0;
    for (; back > 0 && previous[row] >= 0; back--) row = previous[row];
    if (back == 0) return moqk_get(x, row * (s.inner + s.width + s.heads) + s.inner + i);
    return s.past[(slot * s.width + i) * (s.conv - 1) + s.conv - 1 - back];
}

/* out[row][i] = silu(bias + sum of taps). Grid: rows, channels. */
template <typename T> __global__ void moqk_ssm_convolve(moqk_ssm s, const int32_t *slot, const int32_t *pos, const int32_t *previous, const T *x,
                                                        float *out)
{
    int32_t row = blockIdx.x;
    int64_t i = (int64_t)blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= s.width || previous[row] == -2) return;
    float sum = s.conv_bias[i];
    for (int32_t k = 0; k < s.conv; k++) sum += s.taps[i * s.conv + s.conv - 1 - k] * moqk_ssm_input(s, x, previous, slot[row], pos[row], row, i, k);
    out[row * s.width + i] = sum / (1 + expf(-sum));
}

/* The last conv - 1 inputs of every slot that had rows. Grid: rows, channels. */
template <typename T> __global__ void moqk_ssm_remember(moqk_ssm s, const int32_t *slot, const int32_t *pos, const int32_t *previous,
                                                        const int32_t *next, const T *x)
{
    int32_t row = blockIdx.x;
    int64_t i = (int64_t)blockIdx.y * blockDim.x + threadIdx.x;
    float v[MOQK_SSM_TAPS];
    if (i >= s.width || previous[row] == -2 || next[row] >= 0) return;
    for (int32_t k = 0; k + 1 < s.conv; k++) v[k] = moqk_ssm_input(s, x, previous, slot[row], pos[row], row, i, k);
    for (int32_t k = 0; k + 1 < s.conv; k++) s.past[(slot[row] * s.width + i) * (s.conv - 1) + s.conv - 2 - k] = v[k];
}

/* S = exp(t A) S + t x B^T; u = S C + D x, for one head and the rows of one slot. A warp owns rows of S; lanes run along `state`.
   Grid: heads, rows (a block works where a slot's rows begin). Dynamic shared memory: S, or none (then S stays in memory). */
template <typename T> __global__ void __launch_bounds__(256) moqk_ssm_scan(moqk_ssm s, const int32_t *slot, const int32_t *pos,
                                                                           const int32_t *previous, const int32_t *next, const T *x,
                                                                          const float *conv, float *u, int32_t shared)
{
    extern __shared__ float4 room4[];
    int32_t row = blockIdx.y, h = blockIdx.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, n = s.state, count = s.head_dim * n;
    if (previous[row] != -1) return;
    float *kept = s.states + ((int64_t)slot[row] * s.heads + h) * count, *state = shared ? (float *)room4 : kept;
    int64_t group = h / (s.heads / s.groups), b_at = s.inner + group * n, c_at = s.inner + (s.groups + group) * n;
    for (int32_t i = threadIdx.x; shared && i < count; i += blockDim.x) state[i] = kept[i];
    __syncthreads();
    for (; row >= 0; row = next[row]) {
        int fresh = pos[row] == 0;
        const float *in = conv + row * s.width;
        double v = (double)moqk_get(x, row * (s.inner + s.width + s.heads) + s.inner + s.width + h) + (double)s.dt_bias[h];
        v = v > 20 ? v : log1p(exp(v));
        v = v < (double)s.dt_min ? (double)s.dt_min : v;
        float step = (float)(s.dt_max > 0 && v > (double)s.dt_max ? (double)s.dt_max : v), keep = (float)exp((double)step * (double)s.decay[h]);
        for (int32_t p = warp; p < s.head_dim; p += blockDim.x >> 5) {
            float xp = in[(int64_t)h * s.head_dim + p], add = step * xp, sum = 0;
            for (int32_t i = lane; i < n; i += 32) {
                float w = (fresh ? 0 : keep * state[p * n + i]) + add * in[b_at + i];
                state[p * n + i] = w;
                sum += w * in[c_at + i];
            }
            sum = moqk_warp_sum(sum);
            if (lane == 0) u[row * s.inner + (int64_t)h * s.head_dim + p] = sum + s.d[h] * xp;
        }
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; shared && i < count; i += blockDim.x) kept[i] = state[i];
}

/* y = norm * v / sqrt(mean(v^2) + eps), v = u silu(z). Grid: rows, groups. */
template <typename T> __global__ void moqk_ssm_gate(moqk_ssm s, const int32_t *previous, const T *x, float *u, T *y)
{
    __shared__ float room[33];
    int64_t row = blockIdx.x, n = s.inner / s.groups, first = blockIdx.y * n;
    const int64_t stride = s.inner + s.width + s.heads;
    float sum = 0;
    int held = previous[row] != -2;
    for (int64_t i = first + threadIdx.x; held && i < first + n; i += blockDim.x) {
        float z = moqk_get(x, row * stride + i), v = u[row * s.inner + i] * (z / (1 + expf(-z)));
        u[row * s.inner + i] = v;
        sum += v * v;
    }
    sum = moqk_block_sum(sum, room);
    float f = 1 / sqrtf(sum / (float)n + s.eps);
    for (int64_t i = first + threadIdx.x; i < first + n; i += blockDim.x) moqk_put(y, row * s.inner + i,
                                                                                   held ? u[row * s.inner + i] * f * s.norm[i] : 0);
}

/* ---- the object ---- */

static moq_result moqc_check_ssm_view(const moq_ssm_desc *d, const char *what, const moq_view *v, int64_t count, moq_error *err)
{
    float probe;
    if (v->data && v->count == (uint64_t)count && moq_to_f32(v->dtype, v->data, 1, &probe)) return MOQ_OK;
    return moq_fail(err, MOQ_E_SHAPE, d->name ? d->name : "", "%s has %llu values of type %s, expected %llu of BF16, F16 or F32", what,
                    (unsigned long long)(v->data ? v->count : 0),
                    moq_dtype_name(v->dtype), (unsigned long long)count);
}

/* Sizes; *floats: all vectors, pasts and states. */
static moq_result moqc_ssm_plan(const moq_ssm_desc *d, moqk_ssm *s, int64_t *floats, moq_error *err)
{
    const char *name = d->name ? d->name : "";
    memset(s, 0, sizeof *s);
    if (d->slots < 1 || d->heads < 1 || d->head_dim < 1 || d->state < 1 || d->groups < 1 || d->conv < 1 || d->heads % d->groups)
        return moq_fail(err, MOQ_E_ARG, name, "a mixer of %d slots, %d heads of %d, %d states, %d groups, %d taps cannot be made", (int)d->slots,
                        (int)d->heads, (int)d->head_dim,
                        (int)d->state, (int)d->groups, (int)d->conv);
    if (d->conv > MOQK_SSM_TAPS) return moq_fail(err, MOQ_E_UNSUPPORTED, name, "a convolution of %d taps; at most %d are supported on CUDA",
                                                 (int)d->conv, (int)MOQK_SSM_TAPS);
    s->slots = d->slots;
    s->heads = d->heads;
    s->head_dim = d->head_dim;
    s->state = d->state;
    s->groups = d->groups;
    s->conv = d->conv;
    s->dt_min = d->dt_min;
    s->dt_max = d->dt_max;
    s->eps = d->eps;
    s->inner = (int64_t)d->heads * d->head_dim;
    s->width = s->inner + 2 * (int64_t)d->groups * d->state;
    double all = (double)s->width * (d->conv + 1.0) + (double)s->inner + 3.0 * d->heads +
        (double)d->slots * ((double)s->width * (d->conv - 1.0) + (double)s->inner * d->state);
    if (s->width >= INT32_MAX || all > 1e15) return moq_fail(err, MOQ_E_OVERFLOW, name, "the states of %d slots do not fit the address space",
                                                             (int)d->slots);
    *floats = s->width * (d->conv + 1) + s->inner + 3 * (int64_t)d->heads + d->slots * (s->width * (d->conv - 1) + s->inner * d->state);
    return MOQ_OK;
}

/* The vectors of the description into the block; an absent conv_bias stays zero. */
static int moqc_ssm_fill(moqc_ctx *c, const moq_ssm_desc *desc, moqk_ssm *s, float *next)
{
    const moq_view *views[5] = {&desc->conv_weight, &desc->conv_bias, &desc->dt_bias, &desc->d, &desc->norm};
    const float **to[5] = {&s->taps, &s->conv_bias, &s->dt_bias, &s->d, &s->norm};
    int64_t counts[5] = {s->width * s->conv, s->width, s->heads, s->heads, s->inner};
    size_t bytes = (size_t)s->heads * sizeof(float);
    int fine = 1;
    for (int i = 0; i < 5; next += counts[i], i++) {
        *to[i] = next;
        if (views[i]->data) fine &= moqc_send_floats(c, next, views[i], 0, 1, counts[i]);
    }
    float *decay = (float *)moq_allocate(&c->host, bytes); /* stored as log(-A) */
    for (int32_t h = 0; decay && h < s->heads; h++) decay[h] = (float)-exp((double)moqc_f32_at(&desc->a_log, h));
    fine &= decay && moqc_send(c, next, decay, bytes);
    moq_release(&c->host, decay, bytes);
    s->decay = next;
    s->past = next + s->heads;
    s->states = s->past + (int64_t)s->slots * s->width * (s->conv - 1);
    return fine;
}

static void moqc_ssm_release(moq_backend *be, moq_ssm *ssm)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    if (!ssm) return;
    moqc_give(c, ((moqc_ssm *)(void *)ssm)->memory);
    moq_release(&c->host, ssm, sizeof(moqc_ssm));
}

static moq_result moqc_check_ssm(const moq_ssm_desc *d, const moqk_ssm *s, moq_error *err)
{
    moq_result rc = moqc_check_ssm_view(d, "conv_weight", &d->conv_weight, s->width * s->conv, err);
    if (rc == MOQ_OK && d->conv_bias.data) rc = moqc_check_ssm_view(d, "conv_bias", &d->conv_bias, s->width, err);
    if (rc == MOQ_OK) rc = moqc_check_ssm_view(d, "dt_bias", &d->dt_bias, s->heads, err);
    if (rc == MOQ_OK) rc = moqc_check_ssm_view(d, "a_log", &d->a_log, s->heads, err);
    if (rc == MOQ_OK) rc = moqc_check_ssm_view(d, "d", &d->d, s->heads, err);
    if (rc == MOQ_OK) rc = moqc_check_ssm_view(d, "norm", &d->norm, s->inner, err);
    return rc;
}

static moq_ssm *moqc_ssm_create(moq_backend *be, const moq_ssm_desc *desc, moq_error *err)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    moqc_need need;
    moqk_ssm s;
    int64_t floats;
    moqc_clear(err);
    if (moqc_ssm_plan(desc, &s, &floats, err) < 0 || moqc_check_ssm(desc, &s, err) < 0) return NULL;
    memset(&need, 0, sizeof need);
    need.cols = s.width;
    need.chains = 2;
    if (moqc_grow(c, &need, c->be.max_rows, err) < 0) return NULL;
    moqc_ssm *ssm = (moqc_ssm *)moq_allocate(&c->host, sizeof *ssm);
    if (!ssm) { moq_fail(err, MOQ_E_NOMEM, desc->name, "no host memory for the mixer"); return NULL; }
    ssm->memory = moqc_take(c, (size_t)floats * 4, "a state-space mixer", err);
    if (ssm->memory) {
        moqc_ok(c, cudaMemsetAsync(ssm->memory, 0, (size_t)floats * 4, c->stream), "cudaMemset");
        if (moqc_ssm_fill(c, desc, &s, (float *)ssm->memory)) {
            ssm->d = s;
            return (moq_ssm *)(void *)ssm;
        }
        moqc_why(c, desc->name, err);
    }
    moqc_ssm_release(be, (moq_ssm *)(void *)ssm);
    return NULL;
}

static size_t moqc_ssm_bytes(const moq_backend *be, const moq_ssm_desc *desc)
{
    moqk_ssm s;
    int64_t floats;
    (void)be;
    return moqc_ssm_plan(desc, &s, &floats, NULL) < 0 ? 0 : (size_t)floats * 4;
}

/* ---- running ---- */

template <typename T> static void moqc_ssm_rows(moqc_ctx *c, const moqk_ssm *s, const int32_t *slot, const int32_t *pos, int32_t rows, const T *x,
                                                T *y)
{
    int32_t *previous = c->chains, *next = c->chains + rows;
    dim3 channels((unsigned)rows, (unsigned)moqk_ceil(s->width, 256));
    size_t bytes = (size_t)s->head_dim * (size_t)s->state * 4;
    int shared = bytes <= 48 << 10;
    moqk_ssm_chains<<<(unsigned)moqk_ceil(rows, 128), 128, 0, c->stream>>>(slot, rows, s->slots, previous, next);
    moqk_ssm_convolve<<<channels, 256, 0, c->stream>>>(*s, slot, pos, previous, x, c->t);
    if (s->conv > 1) moqk_ssm_remember<<<channels, 256, 0, c->stream>>>(*s, slot, pos, previous, next, x);
    moqk_ssm_scan<<<dim3((unsigned)s->heads, (unsigned)rows), 256, shared ? bytes : 0, c->stream>>>(*s, slot, pos, previous, next, x, c->t, c->r, shared);
    moqk_ssm_gate<<<dim3((unsigned)rows, (unsigned)s->groups), 256, 0, c->stream>>>(*s, previous, x, c->r, y);
    moqc_launched(c, "ssm");
}

static void moqc_ssm_run(moq_backend *be, moq_ssm *ssm, const moq_batch *b, const void *x, void *y)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    const moqk_ssm *s = &((const moqc_ssm *)(const void *)ssm)->d;
    int64_t in = s->inner + s->width + s->heads;
    for (int64_t first = 0; first < b->rows; first += c->be.max_rows) {
        int32_t rows = (int32_t)moqc_min(b->rows - first, c->be.max_rows);
        MOQC_BY_ACT(c, (moqc_ssm_rows(c, s, b->slot + first, b->pos + first, rows, (const float *)x + first * in, (float *)y + first * s->inner)),
                    (moqc_ssm_rows(c, s, b->slot + first, b->pos + first, rows, (const __nv_bfloat16 *)x + first * in,
                                   (__nv_bfloat16 *)y + first * s->inner)));
    }
}

/* Slots outside of the object are a caller's mistake and change nothing. */
static void moqc_ssm_copy(moq_backend *be, moq_ssm *ssm, int32_t dst_slot, int32_t src_slot)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    const moqk_ssm *s = &((const moqc_ssm *)(const void *)ssm)->d;
    int64_t past = s->width * (s->conv - 1), state = s->inner * s->state;
    if (dst_slot < 0 || src_slot < 0 || dst_slot >= s->slots || src_slot >= s->slots || dst_slot == src_slot) return;
    if (past > 0) moqc_ok(c, cudaMemcpyAsync(s->past + dst_slot * past, s->past + src_slot * past, (size_t)past * 4, cudaMemcpyDeviceToDevice,
                                             c->stream), "ssm_copy");
    moqc_ok(c, cudaMemcpyAsync(s->states + dst_slot * state, s->states + src_slot * state, (size_t)state * 4, cudaMemcpyDeviceToDevice, c->stream),
            "ssm_copy");
}

/* Out: the past of the convolution, then the states. */
static size_t moqc_ssm_read(moq_backend *be, const moq_ssm *ssm, int32_t slot, void *out)
{
    const moqk_ssm *s = &((const moqc_ssm *)(const void *)ssm)->d;
    int64_t past = s->width * (s->conv - 1), state = s->inner * s->state;
    if (out) moqc_download(be, out, s->past + slot * past, (size_t)past * 4);
    if (out) moqc_download(be, (float *)out + past, s->states + slot * state, (size_t)state * 4);
    return (size_t)(past + state) * 4;
}

static void moqc_ssm_write(moq_backend *be, moq_ssm *ssm, int32_t slot, const void *bytes)
{
    const moqk_ssm *s = &((const moqc_ssm *)(const void *)ssm)->d;
    int64_t past = s->width * (s->conv - 1), state = s->inner * s->state;
    moqc_upload(be, s->past + slot * past, bytes, (size_t)past * 4);
    moqc_upload(be, s->states + slot * state, (const float *)bytes + past, (size_t)state * 4);
}

/* A thread per value. */
template <typename T> __global__ void moqk_copy_heads(moq_copy_desc d)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, at = i % d.width, h = i / d.width % d.heads, row = i / d.width / d.heads;
    if (row < d.rows) ((T *)d.y)[row * d.y_stride + h * d.y_step + at] = ((const T *)d.x)[row * d.x_stride + h * d.x_step + at];
}

static void moqc_copy_heads(moq_backend *be, const moq_copy_desc *d)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    int64_t count = (int64_t)d->rows * d->heads * d->width;
    if (count < 1) return;
    unsigned blocks = (unsigned)moqk_ceil(count, 256);
    MOQC_BY_ACT(c, (moqk_copy_heads<float><<<blocks, 256, 0, c->stream>>>(*d)), (moqk_copy_heads<__nv_bfloat16><<<blocks, 256, 0, c->stream>>>(*d)));
    moqc_launched(c, "copy_heads");
}

/* ------------------------------------------------------------------------------------------------
   >>cuda-backend    graphs, the function table, creation
   ------------------------------------------------------------------------------------------------ */

typedef struct moqc_graph {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
} moqc_graph;

static moq_result moqc_capture_begin(moq_backend *be, moq_error *err)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    moqc_clear(err);
    if (c->capturing) return moq_fail(err, MOQ_E_STATE, c->name, "capture_begin twice; call capture_end first");
    cudaError_t e = cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal);
    if (e != cudaSuccess) { cudaGetLastError(); return moqc_fail(c, e, "cudaStreamBeginCapture", err); }
    c->capturing = 1;
    return MOQ_OK;
}

/* An error of a recorded call fails the whole recording. */
static moq_graph *moqc_capture_end(moq_backend *be, moq_error *err)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    moqc_clear(err);
    if (!c->capturing) { moq_fail(err, MOQ_E_STATE, c->name, "capture_end without capture_begin"); return NULL; }
    moqc_let_go(c);
    c->capturing = 0;
    cudaError_t e = cudaStreamEndCapture(c->stream, &graph);
    if (e == cudaSuccess && c->error.code == MOQ_OK) e = cudaGraphInstantiate(&exec, graph, 0);
    moqc_graph *g = e == cudaSuccess && exec ? (moqc_graph *)moq_allocate(&c->host, sizeof *g) : NULL;
    if (g) {
        g->graph = graph;
        g->exec = exec;
        c->graphs++;
        return (moq_graph *)(void *)g;
    }
    if (c->error.code != MOQ_OK) { if (err) *err = c->error; c->error.code = MOQ_OK; }
    else if (e != cudaSuccess) moqc_fail(c, e, "recording a graph", err);
    else moq_fail(err, MOQ_E_NOMEM, c->name, "no host memory for a graph");
    cudaGetLastError();
    if (exec) cudaGraphExecDestroy(exec);
    if (graph) cudaGraphDestroy(graph);
    return NULL;
}

static void moqc_replay(moq_backend *be, moq_graph *g)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    moqc_ok(c, cudaGraphLaunch(((moqc_graph *)(void *)g)->exec, c->stream), "cudaGraphLaunch");
}

static void moqc_release_graph(moq_backend *be, moq_graph *graph)
{
    moqc_ctx *c = moqc_of(be);
    moqc_on on(c);
    moqc_graph *g = (moqc_graph *)(void *)graph;
    if (!g) return;
    moqc_ok(c, cudaStreamSynchronize(c->stream), "waiting for a graph");
    cudaGraphExecDestroy(g->exec);
    cudaGraphDestroy(g->graph);
    c->graphs--;
    moq_release(&c->host, g, sizeof *g);
}

/* What a backend is made of. */
typedef struct moqc_whole {
    moqc_ctx c;
    moqc_held held;
} moqc_whole;

/* Frees what the caller left, too: weights and caches are no use without the backend. Their host structs are the caller's loss. */
static void moqc_destroy(moq_backend *be)
{
    moqc_ctx *c = moqc_of(be);
    moq_allocator host = c->host;
    {
        moqc_on on(c);
        if (c->stream) cudaStreamSynchronize(c->stream);
        while (c->blocks) moqc_give(c, c->blocks->ptr);
        for (int i = 0; i < MOQC_SLOTS; i++) if (c->slot_free[i]) cudaEventDestroy(c->slot_free[i]);
        for (int i = 0; i < 2; i++) if (c->half_full[i]) cudaEventDestroy(c->half_full[i]);
        if (c->pinned) cudaFreeHost(c->pinned);
        if (c->stream) cudaStreamDestroy(c->stream);
        cudaGetLastError();
    }
    moq_release(&host, c, sizeof(moqc_whole));
}

/* In the order of struct moq_backend. */
static const moq_backend moqc_table = {
    NULL, NULL, MOQ_F32, 16,
    moqc_destroy, moqc_alloc, moqc_release, moqc_upload, moqc_download, moqc_copy, moqc_upload_act, moqc_download_act, moqc_sync,
    moqc_reserve, moqc_supports, moqc_explain,
    moqc_prepare_linear, moqc_release_weight, moqc_weight_bytes, moqc_linear, moqc_embed,
    moqc_prepare_moe, moqc_release_moe, moqc_moe,
    moqc_kv_create, moqc_kv_release, moqc_kv_bytes, moqc_kv_append, moqc_kv_copy, moqc_attention,
    moqc_norm, moqc_rope_table, moqc_rope, moqc_activation, moqc_add, moqc_argmax,
    moqc_capture_begin, moqc_capture_end, moqc_replay, moqc_release_graph,
    moqc_ssm_create, moqc_ssm_release, moqc_ssm_bytes, moqc_ssm_run, moqc_ssm_copy, moqc_copy_heads,
    moqc_moe_bytes, moqc_kv_read, moqc_kv_write, moqc_ssm_read, moqc_ssm_write,
    NULL, NULL, NULL, NULL, NULL, /* latent attention keeps its wide keys and values here */
    moqc_kv_enter,
    NULL, /* a product is queued in microseconds, whatever it takes */
    NULL, NULL, /* weights are copied to the device in any case */
    512, /* tiles of mma.sync are full by then; see moqc_open_device */
    moqc_host_alloc, moqc_release, moqc_send_act,
    NULL /* recordings join what they can by themselves, see >>cuda-together */
};

/* The device itself: is it there, new enough, does this program hold code for it. */
static moq_result moqc_open_device(moqc_ctx *c, moq_error *err)
{
    int count = 0, major = 0, minor = 0;
    cudaFuncAttributes attributes;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (e != cudaSuccess) { cudaGetLastError(); return moqc_fail(c, e, "looking for CUDA devices", err); }
    if (c->device < 0 || c->device >= count)
        return moq_fail(err, MOQ_E_NOTFOUND, c->name, "there is no such device, %d CUDA devices are visible; check CUDA_VISIBLE_DEVICES", count);
    moqc_on on(c);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, c->device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, c->device);
    cudaDeviceGetAttribute(&c->sm_count, cudaDevAttrMultiProcessorCount, c->device);
    cudaDeviceGetAttribute(&c->cooperates, cudaDevAttrCooperativeLaunch, c->device);
    e = cudaDeviceGetAttribute(&c->most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, c->device);
    c->sm = 10 * major + minor;
    if (e == cudaSuccess && c->sm < 80) return moq_fail(err, MOQ_E_UNSUPPORTED, c->name,
                                                        "compute capability %d.%d, 8.0 (Ampere) or later is needed", major, minor);
    if (e == cudaSuccess) e = cudaFuncGetAttributes(&attributes, moqk_move);
    if (e == cudaSuccess && c->sm > attributes.ptxVersion) c->sm = attributes.ptxVersion; /* code for older devices lacks what newer ones could do */
    if (e == cudaSuccess) e = cudaFuncGetAttributes(&attributes, moqk_has_wgmma);
    c->wgmma = e == cudaSuccess && c->sm == 90 && attributes.maxThreadsPerBlock == 64;
    if (c->wgmma) c->be.pass_rows = 1024; /* a prompt takes a third less time than with 256, and 3 % more than with 2048 and twice the memory */
    if (c->wgmma) {
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
        void *at = NULL;
#if CUDART_VERSION >= 12050
        const int called = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &at, 12000, cudaEnableDefault, &found) == cudaSuccess;
#else
        const int called = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &at, cudaEnableDefault, &found) == cudaSuccess;
#endif
        if (called && found == cudaDriverEntryPointSuccess) c->encode_map = (moqc_encode_map)at;
        else cudaGetLastError(); /* x then comes by a pass of its own */
    }
    if (e == cudaSuccess) e = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking);
    for (int i = 0; i < MOQC_SLOTS && e == cudaSuccess; i++) e = cudaEventCreateWithFlags(&c->slot_free[i], cudaEventDisableTiming);
    for (int i = 0; i < 2 && e == cudaSuccess; i++) e = cudaEventCreateWithFlags(&c->half_full[i], cudaEventDisableTiming);
    if (e == cudaSuccess) e = moqc_allow_shared(c->most_shared, c->wgmma);
    if (e == cudaSuccess) return MOQ_OK;
    cudaGetLastError();
    return moqc_fail(c, e, "opening the device", err);
}

static int moqc_known_kernel(const char *name)
{
    if (strcmp(name, "auto") == 0 || strcmp(name, "reference") == 0) return 1;
    for (int i = 0; i < MOQC_KERNELS; i++) if (strcmp(moqc_kernels[i].name, name) == 0) return 1;
    return 0;
}

extern "C" moq_backend *moq_cuda_backend_full(const moq_cuda_desc *desc, moq_dtype activations, const moq_allocator *memory, moq_error *err)
{
    const char *kernel = desc->kernel && desc->kernel[0] ? desc->kernel : "auto";
    moqc_clear(err);
    if (!moqc_known_kernel(kernel)) {
        char known[256];
        size_t n = 0;
        known[0] = 0;
        for (int i = 0; i < MOQC_KERNELS && n < sizeof known; i++) n += (size_t)snprintf(known + n, sizeof known - n, ", %s", moqc_kernels[i].name);
        moq_fail(err, MOQ_E_ARG, "cuda", "no kernel '%s'; known are auto, reference%s", kernel, known);
        return NULL;
    }
    if (activations != MOQ_F32 && activations != MOQ_BF16) {
        moq_fail(err, MOQ_E_UNSUPPORTED, "cuda", "activations of type %s; F32 and BF16 are known", moq_dtype_name(activations));
        return NULL;
    }
    moqc_whole *whole = (moqc_whole *)moq_allocate(&desc->allocator, sizeof *whole);
    if (!whole) { moq_fail(err, MOQ_E_NOMEM, "cuda", "no host memory for the backend"); return NULL; }
    moqc_ctx *c = &whole->c;
    c->held = &whole->held;
    c->be = moqc_table;
    c->be.ctx = c;
    c->host = desc->allocator;
    if (memory) c->memory = *memory;
    c->device = desc->device;
    c->act = desc->act;
    c->bf16 = activations == MOQ_BF16;
    snprintf(c->name, sizeof c->name, "cuda:%d", (int)desc->device);
    snprintf(c->kernel, sizeof c->kernel, "%s", kernel);
    c->be.name = c->name;
    c->be.act = activations;
    if (moqc_open_device(c, err) == MOQ_OK) return &c->be;
    moqc_destroy(&c->be);
    return NULL;
}

extern "C" moq_backend *moq_cuda_backend_with(const moq_cuda_desc *desc, moq_error *err) { return moq_cuda_backend_full(desc, MOQ_F32, NULL, err); }

extern "C" void *moq_cuda_stream(moq_backend *be)
{
    if (!be || be->destroy != moqc_destroy) return NULL;
    moqc_on on(moqc_of(be)); /* launches what waits */
    return moqc_of(be)->stream;
}

extern "C" moq_backend *moq_cuda_backend(int device, moq_error *err)
{
    moq_cuda_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.device = device;
    return moq_cuda_backend_with(&desc, err);
}
