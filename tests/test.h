/* test.h - what every test program shares. A test file is one program:

       #include "test.h"
       static void test_json_depth(void) { CHECK(1 + 1 == 2); }
       int main(int argc, char **argv)
       {
           test_begin(argc, argv);          argv[1], if given: run only tests whose name contains it
           RUN(test_json_depth);
           return test_end();               prints "N passed, N failed"
       }

   It includes the implementation, so private functions can be tested without exporting them. */
#ifndef TEST_H
#define TEST_H

#ifndef MODELOPT_Q_IMPLEMENTATION
#define MODELOPT_Q_IMPLEMENTATION
#endif
#include "../modelopt_q.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static struct {
    const char *only;
    int passed, failed, skipped, broken; /* tests; broken: checks of the current test that failed */
    long live_allocs, total_allocs, fail_at; /* of test_allocator; fail_at: the k-th allocation from now fails (0: none) */
    int fail_forever;
    uint64_t seed;
} test_state;

#define CHECK(condition) \
    do { \
        if (!(condition)) { test_state.broken++; fprintf(stderr, "%s:%d: CHECK(%s)\n", __FILE__, __LINE__, #condition); } \
    } while (0)

#define CHECK_INT(a, b) \
    do { \
        long long test_a_ = (long long)(a), test_b_ = (long long)(b); \
        if (test_a_ != test_b_) { test_state.broken++; fprintf(stderr, "%s:%d: %s = %lld, expected %lld\n", __FILE__, __LINE__, #a, test_a_, test_b_); } \
    } while (0)

#define CHECK_STR(a, b) \
    do { \
        const char *test_a_ = (a), *test_b_ = (b); \
        if (!test_a_ || !test_b_ || strcmp(test_a_, test_b_) != 0) { test_state.broken++; fprintf(stderr, "%s:%d: %s = \"%s\", expected \"%s\"\n", __FILE__, __LINE__, #a, test_a_ ? test_a_ : "(null)", test_b_ ? test_b_ : "(null)"); } \
    } while (0)

#define RUN(test) test_run(#test, test)

static void test_run(const char *name, void (*test)(void))
{
    if (test_state.only && !strstr(name, test_state.only)) return;
    test_state.broken = 0;
    test_state.seed = 0x853c49e6748fea9bu;
    test_state.live_allocs = test_state.fail_at = 0;
    test_state.fail_forever = 0;
    test();
    if (test_state.broken) { test_state.failed++; fprintf(stderr, "FAILED %s\n", name); }
    else test_state.passed++;
}

static void test_begin(int argc, char **argv) { test_state.only = argc > 1 ? argv[1] : NULL; }

static int test_end(void)
{
    printf("%d passed, %d failed", test_state.passed, test_state.failed);
    if (test_state.skipped) printf(", %d skipped", test_state.skipped);
    printf("\n");
    if (test_state.only && test_state.passed + test_state.failed + test_state.skipped == 0) {
        fprintf(stderr, "no test has '%s' in its name\n", test_state.only);
        return 1;
    }
    return test_state.failed ? 1 : 0;
}

/* Seconds of the processor so far: a limit on it holds while other programs run too. */
MOQI_UNUSED static double test_seconds(void) { return (double)clock() / CLOCKS_PER_SEC; }

/* ---- random numbers: reproducible, with outliers, never all zero ---- */

MOQI_UNUSED static uint32_t test_random(void) /* PCG XSH-RR */
{
    uint64_t s = test_state.seed;
    test_state.seed = s * 6364136223846793005u + 1442695040888963407u;
    uint32_t x = (uint32_t)(((s >> 18) ^ s) >> 27), r = (uint32_t)(s >> 59);
    return x >> r | x << ((0u - r) & 31);
}

MOQI_UNUSED static float test_uniform(void) { return (float)((double)test_random() / 4294967296.0 * 2 - 1); }

/* Roughly normal, one value in 64 twenty times larger. */
MOQI_UNUSED static float test_normal(void)
{
    float v = (test_uniform() + test_uniform() + test_uniform() + test_uniform()) * 0.9f;
    return test_random() % 64 == 0 ? v * 20 : v;
}

/* ---- an allocator that counts and fails on demand ---- */

static void *test_alloc(void *user, size_t bytes, size_t align)
{
    (void)user;
    test_state.total_allocs++;
    if (test_state.fail_at > 0 && --test_state.fail_at == 0) {
        if (test_state.fail_forever) test_state.fail_at = 1;
        return NULL;
    }
    size_t *base = (size_t *)malloc(bytes + align + 2 * sizeof(size_t));
    if (!base) return NULL;
    uintptr_t at = ((uintptr_t)(base + 2) + align - 1) & ~(uintptr_t)(align - 1);
    size_t *p = (size_t *)(void *)((uint8_t *)base + (at - (uintptr_t)base));
    p[-1] = bytes;
    p[-2] = (size_t)base;
    test_state.live_allocs++;
    return p;
}

static void test_release(void *user, void *ptr, size_t bytes)
{
    (void)user;
    if (((size_t *)ptr)[-1] != bytes) { test_state.broken++; fprintf(stderr, "release of %zu bytes, allocated %zu\n", bytes, ((size_t *)ptr)[-1]); }
    test_state.live_allocs--;
    free((void *)((size_t *)ptr)[-2]);
}

MOQI_UNUSED static moq_allocator test_allocator(void)
{
    moq_allocator a = {test_alloc, test_release, NULL};
    return a;
}

/* An exact-size heap copy, so that a sanitizer sees a read of one byte too many. */
MOQI_UNUSED static uint8_t *test_copy(const void *data, size_t bytes)
{
    uint8_t *p = (uint8_t *)malloc(bytes ? bytes : 1);
    if (p && bytes) memcpy(p, data, bytes);
    return p;
}

/* "DIR/name" of this folder's data; the result lives until the fourth call after. */
#ifndef TEST_DIR
#define TEST_DIR "."
#endif
MOQI_UNUSED static const char *test_path(const char *name)
{
    static char text[4][1024];
    static int turn;
    turn = (turn + 1) & 3;
    snprintf(text[turn], sizeof text[turn], "%s/%s", TEST_DIR, name);
    return text[turn];
}
#endif
