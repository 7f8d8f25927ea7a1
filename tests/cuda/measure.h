/* measure.h - what the two CUDA programs that call the backend from nvcc share: failures, random bits, the median. */
#ifndef MEASURE_H
#define MEASURE_H
#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static moq_error err;

static void check(int fine, const char *what)
{
    if (fine) return;
    fprintf(stderr, "%s: %s\n", what, err.text);
    exit(2);
}

static void cuda(cudaError_t e) { if (e != cudaSuccess) { fprintf(stderr, "%s\n", cudaGetErrorString(e)); exit(2); } }

static uint64_t state = 88172645463325252ull;
static uint64_t next_random(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *t, int n)
{
    qsort(t, (size_t)n, sizeof *t, compare_double);
    return t[n / 2];
}
#endif
