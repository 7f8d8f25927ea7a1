/* moq_cuda.cu - what `moq bench` sets beside the CUDA backend: a plain read of as many bytes, and cuBLAS with BF16 weights.

   Both rotate through copies as the backend's layers do, recorded as a graph. cuBLAS is looked for when the program runs, so that it need not
   be there; the backend never uses it. The bench of tests/cuda takes the plain read from here, too. A GPU function returns seconds, 0: it cannot be measured here. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdlib.h>
#if defined(__unix__) && defined(__has_include)
#if __has_include(<cublas_v2.h>) && __has_include(<dlfcn.h>)
#define GPU_BLAS
#include <cublas_v2.h>
#include <dlfcn.h>
#endif
#endif

enum { GPU_TURNS = 9, GPU_STREAM_COPIES = 64 };

/* What a measurement holds; all of it goes with it. */
struct gpu_run {
    cudaStream_t stream;
    cudaEvent_t begin, end;
    void *memory[3];
    int fine;

    explicit gpu_run(int device) : stream(NULL), begin(NULL), end(NULL), memory(), fine(0)
    {
        fine = cudaSetDevice(device) == cudaSuccess && cudaStreamCreate(&stream) == cudaSuccess && cudaEventCreate(&begin) == cudaSuccess && cudaEventCreate(&end) == cudaSuccess;
    }
    ~gpu_run()
    {
        for (int i = 0; i < 3; i++) cudaFree(memory[i]);
        if (begin) cudaEventDestroy(begin);
        if (end) cudaEventDestroy(end);
        if (stream) cudaStreamDestroy(stream);
        cudaGetLastError(); /* it is not the backend's */
    }
    void *take(int i, size_t bytes)
    {
        if (fine && cudaMalloc(&memory[i], bytes) != cudaSuccess) { memory[i] = NULL; fine = 0; }
        return memory[i];
    }
};

static int gpu_compare(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Seconds of a replay of what was recorded on the run's stream: the median. */
static double gpu_replay(gpu_run *r)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    float ms[GPU_TURNS];
    double seconds = 0;
    int fine = cudaStreamEndCapture(r->stream, &graph) == cudaSuccess && cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess;
    for (int i = -2; i < GPU_TURNS && fine; i++) {
        float one;
        fine = cudaEventRecord(r->begin, r->stream) == cudaSuccess && cudaGraphLaunch(exec, r->stream) == cudaSuccess && cudaEventRecord(r->end, r->stream) == cudaSuccess &&
               cudaEventSynchronize(r->end) == cudaSuccess && cudaEventElapsedTime(&one, r->begin, r->end) == cudaSuccess;
        if (i >= 0) ms[i] = one;
    }
    if (fine) {
        qsort(ms, GPU_TURNS, sizeof *ms, gpu_compare);
        seconds = ms[GPU_TURNS / 2] * 1e-3;
    }
    if (exec) cudaGraphExecDestroy(exec);
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    return seconds;
}

/* Bytes of the second-level cache. */
extern "C" uint64_t moq_gpu_cache(int device)
{
    int bytes = 0;
    if (cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device) != cudaSuccess) cudaGetLastError();
    return bytes > 0 ? (uint64_t)bytes : (uint64_t)64 << 20;
}

/* p: [n] pieces of 16 bytes; four of a thread are under way at once. */
static __global__ void gpu_read(const uint4 *p, size_t n, unsigned *out)
{
    unsigned sum = 0;
    size_t step = (size_t)gridDim.x * blockDim.x, i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < n; i += 4 * step) {
        uint4 v[4];
#pragma unroll
        for (int k = 0; k < 4; k++) v[k] = __ldcs(p + i + k * step);
#pragma unroll
        for (int k = 0; k < 4; k++) sum ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    for (; i < n; i += step) {
        uint4 v = __ldcs(p + i);
        sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == 0x12345678u) *out = sum; /* it might be: so nothing is left out */
}

/* Seconds of the fastest of several plain reads of `bytes`, going through `copies` times as many. */
extern "C" double moq_gpu_read_seconds(int device, uint64_t bytes, int copies)
{
    gpu_run r(device);
    size_t each = (size_t)(bytes + 255) / 256 * 256;
    uint8_t *p = (uint8_t *)r.take(0, each * (size_t)copies);
    unsigned *out = (unsigned *)r.take(1, 256);
    int processors = 0;
    double best = 0;
    if (!r.fine || cudaMemset(p, 1, each * (size_t)copies) != cudaSuccess || cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
    for (int threads = 256; threads <= 1024; threads *= 2)
        for (int blocks = 1; blocks <= 8; blocks *= 2) {
            if (cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal) != cudaSuccess) return 0;
            for (int i = 0; i < copies; i++) gpu_read<<<blocks * processors, threads, 0, r.stream>>>((const uint4 *)(const void *)(p + each * (size_t)i), (size_t)bytes / 16, out);
            double seconds = gpu_replay(&r) / copies;
            if (seconds > 0 && (best == 0 || seconds < best)) best = seconds;
        }
    return best;
}

#ifdef GPU_BLAS
static __global__ void gpu_fill(__nv_bfloat16 *p, size_t n)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        unsigned v = (unsigned)i * 2654435761u;
        v ^= v >> 15;
        v *= 2246822519u;
        v ^= v >> 13;
        p[i] = __float2bfloat16(((float)(v & 0xffff) / 32768.0f - 1) * 0.05f);
    }
}

/* The functions that are called, from whichever release is there. */
struct gpu_blas {
    void *library;
    decltype(&cublasCreate_v2) create;
    decltype(&cublasDestroy_v2) destroy;
    decltype(&cublasSetStream_v2) set_stream;
    decltype(&cublasSetWorkspace_v2) set_workspace;
    cublasStatus_t (*gemm)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const void *, const void *, cudaDataType, int, const void *, cudaDataType, int,
                           const void *, void *, cudaDataType, int, cublasComputeType_t, cublasGemmAlgo_t);
};

static int gpu_blas_open(gpu_blas *b)
{
    static const char *const names[] = {"libcublas.so", "libcublas.so.13", "libcublas.so.12", "libcublas.so.11"};
    b->library = NULL;
    for (int i = 0; i < 4 && !b->library; i++) b->library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (!b->library) return 0;
    b->create = (decltype(b->create))dlsym(b->library, "cublasCreate_v2");
    b->destroy = (decltype(b->destroy))dlsym(b->library, "cublasDestroy_v2");
    b->set_stream = (decltype(b->set_stream))dlsym(b->library, "cublasSetStream_v2");
    b->set_workspace = (decltype(b->set_workspace))dlsym(b->library, "cublasSetWorkspace_v2");
    b->gemm = (decltype(b->gemm))dlsym(b->library, "cublasGemmEx");
    return b->create && b->destroy && b->set_stream && b->set_workspace && b->gemm;
}

/* Seconds of y = x W^T with BF16 weights [rows, cols], x [m, cols]. */
extern "C" double moq_gpu_blas_seconds(int device, int64_t rows, int64_t cols, int32_t m)
{
    enum { WORKSPACE = 64 << 20 };
    const float one = 1, zero = 0;
    const size_t elements = (size_t)rows * (size_t)cols, wanted = 2 * (size_t)moq_gpu_cache(device) / (elements * 2) + 1;
    const int copies = wanted < GPU_STREAM_COPIES ? (int)wanted : (int)GPU_STREAM_COPIES;
    gpu_blas b;
    cublasHandle_t handle = NULL;
    double seconds = 0;
    if (!gpu_blas_open(&b)) return 0;
    {
        gpu_run r(device);
        __nv_bfloat16 *w = (__nv_bfloat16 *)r.take(0, elements * 2 * (size_t)copies);
        __nv_bfloat16 *x = (__nv_bfloat16 *)r.take(1, (size_t)m * (size_t)(rows + cols) * 2 + 512), *y = x + ((size_t)m * (size_t)cols + 127) / 128 * 128;
        void *space = r.take(2, WORKSPACE);
        int fine = r.fine && b.create(&handle) == CUBLAS_STATUS_SUCCESS && b.set_stream(handle, r.stream) == CUBLAS_STATUS_SUCCESS &&
                   b.set_workspace(handle, space, WORKSPACE) == CUBLAS_STATUS_SUCCESS;
        if (fine) {
            gpu_fill<<<1024, 256, 0, r.stream>>>(w, elements * (size_t)copies);
            gpu_fill<<<256, 256, 0, r.stream>>>(x, (size_t)m * (size_t)cols);
        }
        for (int turn = 0; turn < 2 && fine; turn++) { /* the first time code is loaded, which cannot be recorded */
            if (turn) fine = cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
            for (int i = 0; i < copies && fine; i++)
                fine = b.gemm(handle, CUBLAS_OP_T, CUBLAS_OP_N, (int)rows, m, (int)cols, &one, w + elements * (size_t)i, CUDA_R_16BF, (int)cols, x, CUDA_R_16BF, (int)cols, &zero, y,
                              CUDA_R_16BF, (int)rows, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS;
            if (turn) seconds = gpu_replay(&r) / copies; /* it ends the recording, too */
        }
        if (!fine) seconds = 0;
        if (handle) b.destroy(handle);
    }
    dlclose(b.library);
    return seconds;
}
#else
extern "C" double moq_gpu_blas_seconds(int device, int64_t rows, int64_t cols, int32_t m)
{
    (void)device; (void)rows; (void)cols; (void)m;
    return 0;
}
#endif
