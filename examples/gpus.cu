/* gpus.cu - one model on several GPUs: each holds its share of the heads and of the MLPs, and what the blocks compute is summed over peer memory.

       nvcc -O2 -arch=native gpus.cu ../modelopt_q_cuda.cu -o gpus -lpthread          H100, H200: -gencode=arch=compute_90a,code=sm_90a
       ./gpus [FOLDER [RANKS [PROMPT]]]

   Without RANKS there are as many as GPUs. Every rank computes the whole answer; the first one prints it. A sum is a kernel on the stream of the backend,
   which becomes part of the recorded step: the host sees none of it. More ranks than GPUs share them, so that it can be tried on one, and then the
   host stands between, because kernels that wait for each other need a GPU of their own. With NCCL the body of queue_sum would be one ncclAllReduce. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define MODELOPT_Q_IMPLEMENTATION
#include "../modelopt_q.h"
#define LLM_IMPLEMENTATION
#include "llm.h"
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

/* A sum of at most WORDS words of 4 bytes goes word by word; of what is larger, PIECE words at a time. PATIENCE: seconds. */
enum { MOST = 8, WORDS = 1 << 17, PIECE = 1 << 22, THREADS = 256, BLOCKS = WORDS / (2 * THREADS), PIECE_BLOCKS = 128, PATIENCE = 20 };

/* What a rank has in the memory of its GPU, and the others write. Sums take the two sets in turn: a rank that sends its share of a sum has all shares of the
   sum before, so everybody else has begun that one, and the one before it, which used the same set, is over. */
typedef struct room {
    uint64_t word[2][MOST][WORDS];     /* of each rank, [i] = number of the sum << 32 | word: what is there is told apart from what was there */
    uint32_t told[MOST][PIECE_BLOCKS]; /* number of the sum whose piece is there whole, of each rank's block */
    uint32_t sums[2][BLOCKS];          /* sums so far, of each block of the two kernels. In device memory, because a recorded step counts, too */
} room;                                /* behind it: uint4 piece[2][ranks][PIECE / 4] */

/* What a kernel knows. */
typedef struct peers {
    room *of[MOST];
    int rank, ranks;
    int *gone;                     /* on the host: 0, or 1 + MOST * rank + the rank that it waited for in vain (itself: it failed). All stop waiting then */
} peers;

/* Where the ranks meet on the host. */
typedef struct team {
    pthread_barrier_t barrier;
    unsigned here;            /* ranks that came to a meeting, counted on and on */
    int ranks, devices;
    int queues;               /* sums are kernels */
    int reaches[MOST][MOST];  /* device a reads the memory of device b */
    int failed[2][MOST];      /* of each rank, read by all behind a meeting; two sets here, too */
    void *x[2][MOST];         /* what each wants summed, in its device's memory */
    room *rooms[MOST];
    int *gone;
    const char *folder, *prompt;
} team;

typedef struct member {
    team *t;
    int rank, turn;
    peers p;
    void *spare;              /* [3, count] of this rank's device: the two sets, and what a device that is out of reach sent */
    size_t spare_bytes;
    unsigned meetings;
    moq_error err;
} member;

/* ---- sums on the GPUs ---- */

/* Waiting goes on? Looks at the clock, and at the host, now and then. */
static __device__ int patient(const peers &p, int from, unsigned *turns, uint64_t *until)
{
    volatile int *gone = p.gone;
    uint64_t now;
    if (++*turns % 4096) return 1;
    if (*gone) return 0;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (*until == 0) *until = now + (uint64_t)PATIENCE * 1000000000u;
    if (now < *until) return 1;
    *gone = 1 + MOST * p.rank + from;
    return 0;
}

/* The values of a word: one F32, or two BF16. */
template <int BF16> static __device__ float2 values_of(uint32_t w)
{
    return BF16 ? make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u)) : make_float2(__uint_as_float(w), 0);
}

template <int BF16> static __device__ uint32_t word_of(float2 v)
{
    __nv_bfloat162 pair;
    uint32_t w;
    if (!BF16) return __float_as_uint(v.x);
    pair = __floats2bfloat162_rn(v.x, v.y);
    memcpy(&w, &pair, sizeof w);
    return w;
}

/* sum + w, or w alone where it is the first */
template <int BF16> static __device__ void add_word(float2 *sum, uint32_t w, int first)
{
    const float2 v = values_of<BF16>(w);
    sum->x = first ? v.x : sum->x + v.x;
    sum->y = first ? v.y : sum->y + v.y;
}

/* What was queued before has ended; what comes behind may take its place on the GPU meanwhile. See cudaLaunchAttributeProgrammaticStreamSerialization. */
static __device__ void follow(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* x [words], two of them a thread. Each word travels with the number of its sum in one store of 8 bytes, so it needs no flag and no fence: 1 us. */
template <int BF16> static __global__ void sum_words(const peers p, uint32_t *x, int words)
{
    follow();
    room *own = p.of[p.rank];
    const uint32_t sum = own->sums[0][blockIdx.x] + 1, set = sum & 1;
    const int i = 2 * (int)(blockIdx.x * THREADS + threadIdx.x);
    if (i < words) {
        const uint32_t mine[2] = {x[i], i + 1 < words ? x[i + 1] : 0};
        const uint64_t tag = (uint64_t)sum << 32;
        float2 a = {0, 0}, b = {0, 0};
        unsigned turns = 0;
        uint64_t until = 0;
        for (int r = 0; r < p.ranks; r++)
            if (r != p.rank)
                asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" :: "l"(&p.of[r]->word[set][p.rank][i]), "l"(tag | mine[0]), "l"(tag | mine[1])
                             : "memory");
        for (int r = 0; r < p.ranks; r++) {
            uint64_t v[2] = {tag | mine[0], tag | mine[1]};
            if (r != p.rank)
                do asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(v[0]), "=l"(v[1]) : "l"(&own->word[set][r][i]) : "memory");
                while ((v[0] >> 32 != sum || v[1] >> 32 != sum) && patient(p, r, &turns, &until));
            add_word<BF16>(&a, (uint32_t)v[0], r == 0);
            add_word<BF16>(&b, (uint32_t)v[1], r == 0);
        }
        x[i] = word_of<BF16>(a);
        if (i + 1 < words) x[i + 1] = word_of<BF16>(b);
    }
    __syncthreads();
    if (threadIdx.x == 0) own->sums[0][blockIdx.x] = sum;
}

/* [PIECE / 4] what rank `from` sends to rank `at`. */
static __device__ uint4 *piece_of(const peers &p, int at, uint32_t set, int from)
{
    return (uint4 *)(void *)(p.of[at] + 1) + (size_t)((int)set * p.ranks + from) * (PIECE / 4);
}

/* x [quads of words]: each block sends its share whole, then says so. Half the bytes on the wire, and a few us more. */
template <int BF16> static __global__ void sum_piece(const peers p, uint4 *x, int quads)
{
    room *own = p.of[p.rank];
    const uint32_t sum = own->sums[1][blockIdx.x] + 1, set = sum & 1;
    const int share = (quads + PIECE_BLOCKS - 1) / PIECE_BLOCKS, first = (int)blockIdx.x * share, end = min(first + share, quads), r = (int)threadIdx.x;
    for (int i = first + (int)threadIdx.x; i < end; i += blockDim.x)
        for (int to = 0; to < p.ranks; to++) if (to != p.rank) piece_of(p, to, set, p.rank)[i] = x[i];
    __syncthreads();
    if (r < p.ranks && r != p.rank) {
        unsigned turns = 0;
        uint64_t until = 0;
        uint32_t told;
        __threadfence_system();
        asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(&p.of[r]->told[p.rank][blockIdx.x]), "r"(sum) : "memory");
        do asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(told) : "l"(&own->told[r][blockIdx.x]) : "memory");
        while (told != sum && patient(p, r, &turns, &until));
    }
    __syncthreads();
    for (int i = first + (int)threadIdx.x; i < end; i += blockDim.x) {
        const uint4 mine = x[i];
        float2 s[4];
        for (int k = 0; k < p.ranks; k++) {
            const uint4 v = k == p.rank ? mine : __ldcg(piece_of(p, p.rank, set, k) + i);
            add_word<BF16>(&s[0], v.x, k == 0);
            add_word<BF16>(&s[1], v.y, k == 0);
            add_word<BF16>(&s[2], v.z, k == 0);
            add_word<BF16>(&s[3], v.w, k == 0);
        }
        x[i] = make_uint4(word_of<BF16>(s[0]), word_of<BF16>(s[1]), word_of<BF16>(s[2]), word_of<BF16>(s[3]));
    }
    if (threadIdx.x == 0) own->sums[1][blockIdx.x] = sum;
}

/* x [words] of this rank becomes the sum, at most PIECE. A launch that may begin while the kernel before it ends saves a microsecond. */
template <int BF16> static cudaError_t launch_sum(const peers *p, cudaStream_t stream, uint32_t *x, int words)
{
    cudaLaunchConfig_t how = {};
    cudaLaunchAttribute early = {};
    int device = 0, major = 0;
    if (words > WORDS) {
        sum_piece<BF16><<<PIECE_BLOCKS, 512, 0, stream>>>(*p, (uint4 *)(void *)x, words / 4);
        if (words % 4 == 0) return cudaGetLastError();
        x += words / 4 * 4;
        words %= 4;
    }
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    how.gridDim = (unsigned)(words + 2 * THREADS - 1) / (2 * THREADS);
    how.blockDim = THREADS;
    how.stream = stream;
    how.attrs = &early;
    how.numAttrs = major >= 9;
    return cudaLaunchKernelEx(&how, sum_words<BF16>, *p, x, words);
}

/* Only queues, so it may be recorded: llm_desc.all_reduce_queues. The same order of additions everywhere gives the same bits. */
static moq_result queue_sum(void *user, moq_backend *be, void *x, size_t count, moq_error *err)
{
    member *m = (member *)user;
    const int bf16 = be->act == MOQ_BF16, gone = *(volatile int *)m->t->gone - 1;
    const size_t words = count / (bf16 ? 2 : 1);
    cudaStream_t stream = (cudaStream_t)moq_cuda_stream(be);
    if (gone >= 0 && gone / MOST == gone % MOST) return moq_fail(err, MOQ_E_BACKEND, "all_reduce", "rank %d failed", gone / MOST);
    if (gone >= 0) return moq_fail(err, MOQ_E_BACKEND, "all_reduce", "rank %d waited %d s for rank %d", gone / MOST, (int)PATIENCE, gone % MOST);
    if (bf16 && count % 2) return moq_fail(err, MOQ_E_SHAPE, "all_reduce", "%zu values of two bytes do not fill words", count);
    for (size_t at = 0; at < words; at += PIECE) {
        const int n = (int)(words - at < PIECE ? words - at : (size_t)PIECE);
        const cudaError_t e = bf16 ? launch_sum<1>(&m->p, stream, (uint32_t *)x + at, n) : launch_sum<0>(&m->p, stream, (uint32_t *)x + at, n);
        if (e != cudaSuccess) return moq_fail(err, MOQ_E_BACKEND, "all_reduce", "a launch failed: %s", cudaGetErrorString(e));
    }
    return MOQ_OK;
}

/* ---- sums by way of the host, of ranks that share a GPU ---- */

/* A barrier that takes a microsecond, where one of pthreads puts threads to sleep. 0: a rank is gone. */
static int meet(member *m)
{
    unsigned all = ++m->meetings * (unsigned)m->t->ranks;
    int turns = 0;
    __atomic_fetch_add(&m->t->here, 1, __ATOMIC_ACQ_REL);
    while ((int)(__atomic_load_n(&m->t->here, __ATOMIC_ACQUIRE) - all) < 0) {
        if (__atomic_load_n(m->t->gone, __ATOMIC_ACQUIRE)) return 0;
        if (++turns > 10000) sched_yield();
    }
    return 1;
}

/* Rank 0's values, then those of the others added in their order: the same bits everywhere. Only the host waits, once, for its own device. */
static moq_result host_sum(void *user, moq_backend *be, void *x, size_t count, moq_error *err)
{
    member *m = (member *)user;
    team *t = m->t;
    size_t bytes = count * (be->act == MOQ_BF16 ? 2 : 4);
    moq_result code = MOQ_OK;
    int set = m->turn ^= 1, here = m->rank % t->devices;
    if (bytes > m->spare_bytes) {                              /* the same for all: their sums are of one size */
        code = be->sync(be, err);
        if (!meet(m)) return moq_fail(err, MOQ_E_BACKEND, "all_reduce", "another rank failed");
        if (m->spare) be->release(be, m->spare);               /* nobody reads it any more */
        m->spare = be->alloc(be, 3 * bytes, err);
        m->spare_bytes = m->spare ? bytes : 0;
        if (!m->spare) code = MOQ_E_NOMEM;
    }
    t->x[set][m->rank] = m->spare ? (char *)m->spare + (size_t)set * m->spare_bytes : NULL;
    if (code >= 0) be->copy(be, t->x[set][m->rank], x, bytes);
    if (code >= 0) code = be->sync(be, err);
    t->failed[set][m->rank] = code < 0;
    if (!meet(m)) return moq_fail(err, MOQ_E_BACKEND, "all_reduce", "another rank failed"); /* else everybody's x is there */
    for (int r = 0; r < t->ranks && code >= 0; r++)            /* what fails on one rank fails on all: none waits for another */
        if (t->failed[set][r]) code = moq_fail(err, MOQ_E_BACKEND, "all_reduce", "rank %d failed", r);
    if (code < 0) return code;
    be->copy(be, x, t->x[set][0], bytes);
    for (int r = 1; r < t->ranks; r++) {
        void *from = t->x[set][r];
        if (!t->reaches[here][r % t->devices]) {
            from = (char *)m->spare + 2 * m->spare_bytes;
            be->copy(be, from, t->x[set][r], bytes);           /* through the host */
        }
        be->add(be, x, from, count);
    }
    return MOQ_OK;
}

/* ---- a rank ---- */

/* The memory that others write. A GPU divides its fast memory anew when it is idle only: the kernel between products takes what they leave. */
static moq_result make_room(member *m, moq_backend *be)
{
    team *t = m->t;
    if (!t->queues) return MOQ_OK;
    t->rooms[m->rank] = (room *)be->alloc(be, sizeof(room) + 2 * (size_t)t->ranks * PIECE * sizeof(uint32_t), &m->err);
    if (!t->rooms[m->rank]) return MOQ_E_NOMEM;
    cudaFuncSetAttribute(sum_words<0>, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    cudaFuncSetAttribute(sum_words<1>, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    return be->sync(be, &m->err);
}

static void answer(member *m, llm *bot)
{
    const team *t = m->t;
    const llm_stats *s = llm_get_stats(bot);
    const char *piece;
    for (int r = 0; r < t->ranks; r++) m->p.of[r] = t->rooms[r];
    m->p.rank = m->rank;
    m->p.ranks = t->ranks;
    m->p.gone = t->gone;
    llm_say(bot, "user", t->prompt);
    while ((piece = llm_next(bot, &m->err)) != NULL)
        if (m->rank == 0) { fputs(piece, stdout); fflush(stdout); }
    if (m->err.code != MOQ_OK) __atomic_store_n(t->gone, 1 + MOST * m->rank + m->rank, __ATOMIC_RELEASE);
    else if (m->rank == 0)
        printf("\n%d ranks on %d GPUs: %d tokens read, %d written, %.0f tokens per second\n", t->ranks, t->devices, (int)s->prompt_tokens,
               (int)s->generated_tokens, s->generate_seconds > 0 ? (double)s->generated_tokens / s->generate_seconds : 0.0);
}

static void *run(void *user)
{
    member *m = (member *)user;
    team *t = m->t;
    llm_desc desc = {};
    llm *bot = NULL;
    int failed = 0;
    cudaSetDevice(m->rank % t->devices);
    desc.path = t->folder;
    desc.ranks = t->ranks;
    desc.rank = m->rank;
    desc.all_reduce = t->queues ? queue_sum : host_sum;
    desc.all_reduce_queues = t->queues;
    desc.all_reduce_user = m;
    desc.backend = moq_cuda_backend(m->rank % t->devices, &m->err);
    if (desc.backend && make_room(m, desc.backend) == MOQ_OK) bot = llm_open(&desc, &m->err);
    t->failed[0][m->rank] = !bot;
    pthread_barrier_wait(&t->barrier);                         /* nobody begins unless all can */
    for (int r = 0; r < t->ranks; r++) failed |= t->failed[0][r];
    if (!failed) answer(m, bot);
    llm_close(bot);
    pthread_barrier_wait(&t->barrier);                         /* others may still read and write this rank's memory */
    if (desc.backend) moq_backend_destroy(desc.backend);       /* and what it has left */
    return NULL;
}

/* Which device reads which; when all of them do, and none has two ranks, they sum by themselves. */
static void look_at_devices(team *t)
{
    t->queues = t->ranks <= t->devices;
    for (int a = 0; a < t->devices; a++)
        for (int b = 0; b < t->devices; b++) {
            t->reaches[a][b] = a == b || (cudaSetDevice(a) == cudaSuccess && cudaDeviceEnablePeerAccess(b, 0) == cudaSuccess);
            if (a < t->ranks && b < t->ranks) t->queues &= t->reaches[a][b];
        }
    cudaGetLastError();
}

int main(int argc, char **argv)
{
    static team t;
    static member members[MOST];
    pthread_t threads[MOST];
    int code = 0;
    if (cudaGetDeviceCount(&t.devices) != cudaSuccess || t.devices < 1) { puts("no GPU was found"); return 1; }
    if (t.devices > MOST) t.devices = MOST;
    t.folder = argc > 1 ? argv[1] : "demo-model";
    t.ranks = argc > 2 ? atoi(argv[2]) : t.devices;
    t.prompt = argc > 3 ? argv[3] : "please put the red pillow on the bedroom bed";
    if (t.ranks < 1 || t.ranks > MOST) { printf("RANKS: 1 to %d\n", MOST); return 2; }
    look_at_devices(&t);
    if (cudaHostAlloc((void **)&t.gone, sizeof *t.gone, cudaHostAllocPortable | cudaHostAllocMapped) != cudaSuccess) { puts("no host memory"); return 1; }
    *t.gone = 0;
    pthread_barrier_init(&t.barrier, NULL, (unsigned)t.ranks);
    for (int r = 0; r < t.ranks; r++) {
        members[r].t = &t;
        members[r].rank = r;
        if (pthread_create(&threads[r], NULL, run, &members[r]) != 0) { puts("a thread cannot be made"); exit(1); }
    }
    for (int r = 0; r < t.ranks; r++) pthread_join(threads[r], NULL);
    for (int r = 0; r < t.ranks && !code; r++)
        if (members[r].err.code < 0) { printf("rank %d: %s\n", r, members[r].err.text); code = 1; }
    pthread_barrier_destroy(&t.barrier);
    cudaFreeHost(t.gone);
    return code;
}
