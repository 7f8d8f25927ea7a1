/* gpus.c - one model on several GPUs: each holds its share of the heads and of the MLPs, and what the blocks compute is summed over peer memory.

       nvcc -O2 -arch=native gpus.c ../modelopt_q_cuda.cu -o gpus -lpthread
       ./gpus [FOLDER [RANKS [PROMPT]]]

   Without RANKS there are as many as GPUs. More ranks than GPUs share them, so that it can be tried on one. Every rank computes the whole
   answer; the first one prints it. With NCCL the body of all_reduce would be one ncclAllReduce on a stream that waits for the backend. */
#define _POSIX_C_SOURCE 200809L
#define MODELOPT_Q_IMPLEMENTATION
#include "../modelopt_q.h"
#define LLM_IMPLEMENTATION
#include "llm.h"
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

enum { MOST = 8, CHUNK = 64 };

/* Where the ranks meet. Two sets of everything, taken in turn: nobody is still reading a set when it is written again. */
typedef struct team {
    pthread_barrier_t barrier;
    unsigned here;            /* ranks that came to a meeting, counted on and on */
    int ranks, devices;
    int reaches[MOST][MOST];  /* device a reads the memory of device b */
    int failed[2][MOST];      /* of each rank, read by all behind a meeting */
    void *x[2][MOST];         /* what each wants summed, in its device's memory */
    const char *folder, *prompt;
} team;

typedef struct member {
    team *t;
    int rank, turn;
    void *room;               /* [3, count] of this rank's device: the two sets, and what a device that is out of reach sent */
    size_t room_bytes;
    unsigned meetings;
    moq_error err;
} member;

/* A barrier that takes a microsecond, where one of pthreads puts threads to sleep. */
static void meet(member *m)
{
    unsigned all = ++m->meetings * (unsigned)m->t->ranks;
    int turns = 0;
    __atomic_fetch_add(&m->t->here, 1, __ATOMIC_ACQ_REL);
    while ((int)(__atomic_load_n(&m->t->here, __ATOMIC_ACQUIRE) - all) < 0)
        if (++turns > 10000) sched_yield();
}

/* Rank 0's values, then those of the others added in their order: the same bits everywhere. Only the host waits, once, for its own device. */
static moq_result all_reduce(void *user, moq_backend *be, void *x, size_t count, moq_error *err)
{
    member *m = (member *)user;
    team *t = m->t;
    size_t bytes = count * (be->act == MOQ_BF16 ? 2 : 4);
    moq_result code = MOQ_OK;
    int set = m->turn ^= 1, here = m->rank % t->devices;
    if (bytes > m->room_bytes) {                               /* the same for all: their sums are of one size */
        code = be->sync(be, err);
        meet(m);                                               /* nobody reads the old room */
        if (m->room) be->release(be, m->room);
        m->room = be->alloc(be, 3 * bytes, err);
        m->room_bytes = m->room ? bytes : 0;
        if (!m->room) code = MOQ_E_NOMEM;
    }
    t->x[set][m->rank] = m->room ? (char *)m->room + (size_t)set * m->room_bytes : NULL;
    if (code >= 0) be->copy(be, t->x[set][m->rank], x, bytes);
    if (code >= 0) code = be->sync(be, err);
    t->failed[set][m->rank] = code < 0;
    meet(m);                                                   /* everybody's x is there */
    for (int r = 0; r < t->ranks && code >= 0; r++)            /* what fails on one rank fails on all: none waits for another */
        if (t->failed[set][r]) code = moq_fail(err, MOQ_E_BACKEND, "all_reduce", "rank %d failed", r);
    if (code < 0) return code;
    be->copy(be, x, t->x[set][0], bytes);
    for (int r = 1; r < t->ranks; r++) {
        void *from = t->x[set][r];
        if (!t->reaches[here][r % t->devices]) {
            from = (char *)m->room + 2 * m->room_bytes;
            be->copy(be, from, t->x[set][r], bytes);           /* through the host */
        }
        be->add(be, x, from, count);
    }
    return MOQ_OK;
}

static void *run(void *user)
{
    member *m = (member *)user;
    team *t = m->t;
    llm_desc desc = {0};
    const char *piece;
    llm *bot = NULL;
    int failed = 0;
    cudaSetDevice(m->rank % t->devices);
    desc.path = t->folder;
    desc.chunk = CHUNK;
    desc.ranks = t->ranks;
    desc.rank = m->rank;
    desc.all_reduce = all_reduce;
    desc.all_reduce_user = m;
    desc.backend = moq_cuda_backend(m->rank % t->devices, &m->err);
    if (desc.backend) bot = llm_open(&desc, &m->err);
    t->failed[0][m->rank] = !bot;
    pthread_barrier_wait(&t->barrier);                         /* nobody begins unless all can */
    for (int r = 0; r < t->ranks; r++) failed |= t->failed[0][r];
    if (!failed) {
        const llm_stats *s = llm_get_stats(bot);
        llm_say(bot, "user", t->prompt);
        while ((piece = llm_next(bot, &m->err)) != NULL)
            if (m->rank == 0) { fputs(piece, stdout); fflush(stdout); }
        if (m->rank == 0 && m->err.code == MOQ_OK)
            printf("\n%d ranks on %d GPUs: %d tokens read, %d written, %.0f tokens per second\n", t->ranks, t->devices, (int)s->prompt_tokens,
                   (int)s->generated_tokens, s->generate_seconds > 0 ? (double)s->generated_tokens / s->generate_seconds : 0.0);
    }
    llm_close(bot);
    pthread_barrier_wait(&t->barrier);                         /* others may still read this rank's room */
    if (m->room) desc.backend->release(desc.backend, m->room);
    if (desc.backend) moq_backend_destroy(desc.backend);
    return NULL;
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
    for (int a = 0; a < t.devices; a++)
        for (int b = 0; b < t.devices; b++)
            t.reaches[a][b] = a == b || (cudaSetDevice(a) == cudaSuccess && cudaDeviceEnablePeerAccess(b, 0) == cudaSuccess);
    cudaGetLastError();
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
    return code;
}
