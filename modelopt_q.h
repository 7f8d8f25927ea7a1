/* modelopt_q.h - open, inspect and run quantized model checkpoints in plain C.

   Do this in exactly one C or C++ file to get the implementation:

       #define MODELOPT_Q_IMPLEMENTATION
       #include "modelopt_q.h"

   and include it without the macro everywhere else. Link with -lm -pthread.

   Quick start: one layer of any checkpoint, without an engine (examples/hello.c is the whole program)

       moq_error err;
       moq_checkpoint *ck = moq_open("Llama-3.1-8B-Instruct-NVFP4", NULL, &err);
       if (!ck) { puts(err.text); return 1; }
       moq_linear up;                                               plain data: views, shape, scheme
       moq_find_linear(ck, "model.layers.0.mlp.up_proj", &up, &err);
       moq_backend *be = moq_cpu_backend(NULL, &err);
       moq_weight *w = be->prepare_linear(be, &up, 1, &err);        repacked once for this backend
       be->linear(be, w, x, rows, y);                               y[rows][up.rows] = x[rows][up.cols] * W^T
       be->release_weight(be, w);
       moq_backend_destroy(be);
       moq_close(ck);

   What opens: folders written by NVIDIA ModelOpt (hf_quant_config.json or config.json), compressed-tensors
   (llm-compressor), gpt-oss MXFP4, DeepSeek FP8 blocks, AutoAWQ, GPTQ, and plain BF16 / F16 / F32.
   Each becomes the same moq_linear with one moq_scheme; behind the binding there is one convention:

       W[r][c] = (code(r, c) - zero(r, group(c))) * scale(r, group(c)) * global_mul / global_div
       y       = round_input(hadamard(x) * pre_quant_scale) * W^T + lora + bias

   Dimension words: rows = outputs, cols = inputs, group = elements that share one scale, heads, kv_heads,
   head_dim. A linear layer is stored [rows, cols]; activations are [tokens, cols], row-major.

   Ownership words, each with one meaning:
       open / close         an object backed by files; close frees everything reachable from it
       create / destroy     a heap object owned by the caller (moq_cpu_backend and prepare_* count as create)
       get_ / find_         a borrowed pointer or plain data, valid until its owner is closed; never freed
       view                 borrowed bytes, no copy
   Closing or destroying NULL is allowed. Every out-pointer is NULL after a failure. NULL where a value is needed is MOQ_E_ARG, or
   the empty answer (0, NULL) of calls that cannot fail; only pointers inside a backend's calls are not looked at.

   Threads: a checkpoint is immutable once open and may be shared. A backend belongs to one thread at a time.
   Nothing is global: two backends, two checkpoints, two threads do not know of each other.

   Errors: calls that can fail take `moq_error *err` last (may be NULL) and return NULL or a negative moq_result.
   err->text is one whole sentence that names file, tensor, what was found, what was expected and what to do.
   The library never aborts, exits, prints, sets signal handlers or reads the environment.

   Options, defined before the implementation is compiled:
       MOQ_STATIC               all functions static (one translation unit)
       MOQ_NO_OS                no files, mapping or clock: moq_open_memory only
       MOQ_NO_THREADS           no built-in thread pool; moq_parallel hooks still work
       MOQ_NO_SIMD              plain C kernels only
       MOQ_QUANTIZE             adds quantizing, calibrating and exporting; define it wherever the header is included
       MOQ_MALLOC, MOQ_FREE     default allocator (define both or none); moq_allocator overrides it per object
       MOQ_ASSERT               internal invariants, never input; default: nothing unless MOQ_DEBUG
       MOQ_MAX_...              limits on what a file may ask for, see >>api-base

   Contents: search for the tag. Declarations >>api-x and bodies >>x stand in the same order; a section uses
   only sections above it.
       >>api-base        >>base         results, errors, allocator, hooks; checked arithmetic, arena, hash map
       >>api-os          >>os           files, mapping, clock
                         >>threads      processor count and features, the built-in thread pool
                         >>decimal      UTF-8; decimal numbers to doubles and back
       >>api-json        >>json         parser for two dialects, and a writer
       >>api-num         >>num          number formats: E2M1 E4M3 E5M2 E8M0 BF16 F16, both ways
       >>api-st          >>st           safetensors files, read and write
       >>api-scheme      >>scheme       how a layer is quantized, as a value; the recipe table
                         >>match        module names against globs, regular expressions and rule lists
                         >>modelopt     ModelOpt's quantization blocks
                         >>foreign      compressed-tensors, gpt-oss, FP8 blocks, AWQ, GPTQ
       >>api-config      >>config       what the configuration files say of a folder and of each module
                         >>storage      how weights of every format are stored: shapes, packing, scales
       >>api-bind        >>bind         tensors of a module -> moq_linear, moq_kv
       >>api-checkpoint  >>checkpoint   folders, shards, index, tensors, modules, verification
                         >>verify       every value that opening did not touch
       >>api-layout      >>layout       where a code lies; row, column and expert slices; repackings
       >>api-cpu         >>cpu          reference kernels in plain C
                         >>simd         vector versions of the inner loops
                         >>tiles        blocks of a matrix product
                         >>stream       4-bit rows times a few inputs, straight from the file's nibbles
                        >>panels       weights turned once for many inputs; which instruction set serves a layer
                         >>layers       prepared layers: linear, experts, caches
                         >>ssm          state-space mixers and copies on the CPU
       >>api-backend     >>backend      the function table and its CPU filling
       >>api-quant       >>quant        encoders of every format, and the weight searches that need no data
                         >>recipe       which modules a recipe covers, recorded calibration, smoothing, shared scales
       >>api-calib       >>calib        calibration algorithms over float arrays
                         >>observe      a backend that shows what goes through another one
                         >>search       AutoQuantize: which units get which format within a budget of bits
                         >>calibrate    passes of a model under observation
                        >>statistics   what passes found, under ModelOpt's names
                         >>container    a layer as tensors of either container
                         >>pack         tensors of an exported folder
                         >>describe     JSON files of an exported folder
       >>api-export      >>export       ModelOpt folders: tensors, shards, JSON files
*/
#ifndef MODELOPT_Q_H
#define MODELOPT_Q_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------------
   >>api-base        results, errors, hooks
   ------------------------------------------------------------------------------------------------ */

#define MOQ_VERSION "0.1.0"

#ifndef MOQ_API
#if defined(MOQ_STATIC) && defined(__GNUC__)
#define MOQ_API static __attribute__((unused))
#elif defined(MOQ_STATIC)
#define MOQ_API static
#else
#define MOQ_API extern
#endif
#endif

/* Limits: a file that asks for more gets MOQ_E_LIMIT naming the macro. Raise them if you trust the file. */
#ifndef MOQ_MAX_HEADER_BYTES
#define MOQ_MAX_HEADER_BYTES 100000000u /* safetensors header */
#endif
#ifndef MOQ_MAX_RANK
#define MOQ_MAX_RANK 8
#endif
#ifndef MOQ_MAX_NAME_BYTES
#define MOQ_MAX_NAME_BYTES 4096u /* tensor name */
#endif
#ifndef MOQ_MAX_TENSORS
#define MOQ_MAX_TENSORS 1048576u /* in one file */
#endif
#ifndef MOQ_MAX_SHARDS
#define MOQ_MAX_SHARDS 4096u
#endif
#ifndef MOQ_MAX_CONFIG_BYTES
#define MOQ_MAX_CONFIG_BYTES 67108864u /* config.json and its kin, and the index */
#endif
#ifndef MOQ_MAX_JSON_BYTES
#define MOQ_MAX_JSON_BYTES 268435456u /* any other JSON text, e.g. tokenizer.json */
#endif

/* Results: name, value, meaning. Values are never reused. */
#define MOQ_RESULTS(X)                                                      \
    X(OK, 0, "success")                                                     \
    X(E_ARG, -1, "the caller broke a documented condition")                 \
    X(E_NOMEM, -2, "the allocator returned NULL")                           \
    X(E_IO, -3, "the operating system reported an error")                   \
    X(E_NOTFOUND, -4, "file, folder or name absent")                        \
    X(E_TRUNCATED, -5, "fewer bytes than declared")                         \
    X(E_HEADER, -6, "header object malformed")                              \
    X(E_JSON, -7, "not JSON")                                               \
    X(E_UTF8, -8, "invalid text encoding")                                  \
    X(E_DUPLICATE, -9, "same key or tensor twice")                          \
    X(E_DTYPE, -10, "unknown or forbidden dtype")                           \
    X(E_SHAPE, -11, "shape impossible or not the one required")             \
    X(E_OFFSETS, -12, "byte range inconsistent")                            \
    X(E_OVERLAP, -13, "two tensors share bytes")                            \
    X(E_HOLE, -14, "bytes owned by nobody")                                 \
    X(E_OVERFLOW, -15, "arithmetic over 64 bits or over the address space") \
    X(E_LIMIT, -16, "a configured limit was exceeded")                      \
    X(E_MISSING, -17, "required tensor, shard or key absent")               \
    X(E_MISMATCH, -18, "two sources disagree")                              \
    X(E_SCALE, -19, "scale is NaN, infinite, negative or zero where forbidden") \
    X(E_CONFIG, -20, "configuration value impossible")                      \
    X(E_UNSUPPORTED, -21, "valid, but not implemented")                     \
    X(E_PATH, -22, "file name leaves the folder or is not a plain name")    \
    X(E_TOKENIZER, -23, "tokenizer definition inconsistent")                \
    X(E_TEMPLATE, -24, "chat template cannot be rendered")                  \
    X(E_GRAMMAR, -25, "schema or grammar cannot be enforced")               \
    X(E_BACKEND, -26, "driver, kernel or device failure")                   \
    X(E_CANCELLED, -27, "stopped by the caller")                            \
    X(E_STATE, -28, "call not valid now, or saved state does not fit")

typedef enum moq_result {
#define MOQ_X(name, value, text) MOQ_##name = value,
    MOQ_RESULTS(MOQ_X)
#undef MOQ_X
    MOQ_RESULT_FORCE_INT = 0x7fffffff
} moq_result;

/* The symbolic name ("MOQ_E_SHAPE") and the meaning of a result; "?" for an unknown value. */
MOQ_API const char *moq_result_name(moq_result code);
MOQ_API const char *moq_result_text(moq_result code);

/* What went wrong. Fixed arrays, so filling it never allocates; all text is printable ASCII. */
typedef struct moq_error {
    moq_result code;
    int32_t os_code;   /* errno or GetLastError(); 0: none */
    int64_t offset;    /* byte in `file`; -1: none */
    char file[96];     /* base name of the file, or "" */
    char object[160];  /* tensor, key or layer name, escaped and cut, or "" */
    char text[768];    /* the whole sentence: file: object: what is wrong; what to do */
} moq_error;

/* Memory. Zero-filled: MOQ_MALLOC / MOQ_FREE. `align` is a power of two. NULL from alloc: the call fails with
   MOQ_E_NOMEM. release gets the size back, so an arena needs no headers. Must be thread-safe if shared. */
typedef struct moq_allocator {
    void *(*alloc)(void *user, size_t bytes, size_t align);
    void (*release)(void *user, void *ptr, size_t bytes);
    void *user;
} moq_allocator;

/* `bytes` of zeroed memory aligned to 64, or NULL; `a` may be NULL for the default. Release with the same size. */
MOQ_API void *moq_allocate(const moq_allocator *a, size_t bytes);
MOQ_API void moq_release(const moq_allocator *a, void *ptr, size_t bytes);

/* One parallel-for. `run` calls task(arg, index, worker) once for every index in [0, tasks), any order, any
   thread, 0 <= worker < workers, no two calls with one worker at the same time, and returns when all are done.
   Zero-filled: the backend's own pool. Results never depend on `workers`. */
typedef struct moq_parallel {
    void (*run)(void *user, int tasks, void (*task)(void *arg, int index, int worker), void *arg);
    int workers;
    void *user;
} moq_parallel;

/* Findings that are no errors. Silent when NULL. May be called from any thread that calls the library. */
typedef enum moq_log_level { MOQ_LOG_INFO = 1, MOQ_LOG_WARNING = 2 } moq_log_level;
typedef void (*moq_log_fn)(void *user, moq_log_level level, moq_result code, const char *text);

/* Long work reports itself; a non-zero return cancels (MOQ_E_CANCELLED). `done` and `total` are bytes or items. */
typedef enum moq_stage {
    MOQ_STAGE_LOAD = 1, MOQ_STAGE_PREPARE, MOQ_STAGE_VERIFY, MOQ_STAGE_CALIBRATE, MOQ_STAGE_QUANTIZE, MOQ_STAGE_EXPORT, MOQ_STAGE_PREFILL
} moq_stage;
typedef int (*moq_progress_fn)(void *user, moq_stage stage, uint64_t done, uint64_t total);

/* Fill `err` (may be NULL) as the library does, for code built on top of it: text = "object: message" with
   printf-style formatting (d i u x c s f g with l, ll, z, a width and precision; q is an s that is escaped and cut). Returns `code`. */
MOQ_API moq_result moq_fail(moq_error *err, moq_result code, const char *object, const char *format, ...);

/* ------------------------------------------------------------------------------------------------
   >>api-os          clock, whole files, CPU features
   ------------------------------------------------------------------------------------------------ */

/* A file already in memory, for moq_open_memory. The bytes stay the caller's and must outlive the checkpoint. */
typedef struct moq_file {
    const char *name; /* plain file name, e.g. "model.safetensors" */
    const void *data;
    size_t bytes;
} moq_file;

/* Monotonic seconds from an arbitrary start; 0 with MOQ_NO_OS. */
MOQ_API double moq_seconds(void);

/* Read a whole file of at most `limit` bytes. The text is followed by a NUL byte that is not counted.
   Release with moq_release(a, ptr, *bytes + 1). NULL on failure. */
MOQ_API char *moq_read_file(const char *path, uint64_t limit, const moq_allocator *a, size_t *bytes, moq_error *err);

/* Write a whole file through a temporary name in the same folder: the target is old or new, never partial. */
MOQ_API moq_result moq_write_file(const char *path, const void *data, size_t bytes, moq_error *err);

/* Physical cores of this machine that the process may use; 1 when unknown. */
MOQ_API int moq_cpu_count(void);

/* Vector instruction sets that the library found and may use, space-separated ("avx2 fma f16c avx512 vnni"). */
MOQ_API const char *moq_cpu_features(void);

/* ------------------------------------------------------------------------------------------------
   >>api-json        JSON documents
   ------------------------------------------------------------------------------------------------ */

typedef enum moq_json_type {
    MOQ_JSON_NULL, MOQ_JSON_FALSE, MOQ_JSON_TRUE, MOQ_JSON_NUMBER, MOQ_JSON_STRING, MOQ_JSON_ARRAY, MOQ_JSON_OBJECT
} moq_json_type;

/* STRICT is RFC 8259. CONFIG also takes one leading BOM and bare NaN, Infinity, -Infinity (real config.json files
   hold them). Both refuse duplicate keys, invalid UTF-8 and lone surrogates. */
typedef enum moq_json_dialect { MOQ_JSON_STRICT, MOQ_JSON_CONFIG } moq_json_dialect;

/* One value. Nodes of a document lie in one array in text order; members of an object are the values, each with
   its key. Read it with the functions below. */
typedef struct moq_json {
    const char *key;   /* member name, NUL-terminated, unescaped; NULL outside objects */
    const char *text;  /* string: unescaped bytes, NUL-terminated; number: its spelling */
    uint32_t key_bytes, text_bytes;
    uint32_t count;    /* elements of an array or object */
    uint32_t skip;     /* nodes of this value including itself: node + skip is the next sibling */
    uint32_t offset;   /* byte in the source text */
    moq_json_type type;
} moq_json;

typedef struct moq_json_doc moq_json_doc;

/* Parse `bytes` of text; nesting deeper than `max_depth` is MOQ_E_LIMIT (0: 64). The text is copied as needed and may
   be freed. Linear time, no recursion. `name` (may be NULL) is the file name used in errors. */
MOQ_API moq_json_doc *moq_json_parse(const char *text, size_t bytes, moq_json_dialect dialect, int max_depth, const char *name,
                                     const moq_allocator *a, moq_error *err);
MOQ_API void moq_json_destroy(moq_json_doc *doc);
MOQ_API const moq_json *moq_json_root(const moq_json_doc *doc);

/* Member of an object, element of an array (both linear), or NULL; `v` may be NULL or of another type. */
MOQ_API const moq_json *moq_json_find(const moq_json *v, const char *key);
MOQ_API const moq_json *moq_json_at(const moq_json *v, size_t index);

/* Iterate: for (e = moq_json_first(v); e; e = moq_json_next(v, e)). */
MOQ_API const moq_json *moq_json_first(const moq_json *v);
MOQ_API const moq_json *moq_json_next(const moq_json *parent, const moq_json *e);

/* Typed reads: 1 and *out on success, else 0 with *out untouched. Integers must be written as integers and fit;
   floats accept NaN and Infinity of the CONFIG dialect and {"__float__": "Infinity"}. */
MOQ_API int moq_json_int(const moq_json *v, int64_t *out);
MOQ_API int moq_json_u64(const moq_json *v, uint64_t *out);
MOQ_API int moq_json_float(const moq_json *v, double *out);
MOQ_API int moq_json_bool(const moq_json *v, int *out);
MOQ_API const char *moq_json_string(const moq_json *v); /* NULL unless a string */
MOQ_API int moq_json_is(const moq_json *v, const char *text); /* a string equal to text */

/* ------------------------------------------------------------------------------------------------
   >>api-num         number formats
   ------------------------------------------------------------------------------------------------ */

/* Element types: name, bits, is a safetensors dtype. I2..I7 exist only packed. F4 is E2M1. */
#define MOQ_DTYPES(X)                                                                                                  \
    X(BOOL, 8, 1) X(U8, 8, 1) X(I8, 8, 1) X(F8_E5M2, 8, 1) X(F8_E4M3, 8, 1) X(F8_E8M0, 8, 1) X(F8_E4M3FNUZ, 8, 1)      \
    X(F8_E5M2FNUZ, 8, 1) X(F4, 4, 1) X(F6_E2M3, 6, 1) X(F6_E3M2, 6, 1) X(I16, 16, 1) X(U16, 16, 1) X(F16, 16, 1)       \
    X(BF16, 16, 1) X(I32, 32, 1) X(U32, 32, 1) X(F32, 32, 1) X(C64, 64, 1) X(F64, 64, 1) X(I64, 64, 1) X(U64, 64, 1)   \
    X(I2, 2, 0) X(I3, 3, 0) X(I4, 4, 0) X(I5, 5, 0) X(I6, 6, 0) X(I7, 7, 0)

typedef enum moq_dtype {
    MOQ_NONE = 0,
#define MOQ_X(name, bits, stored) MOQ_##name,
    MOQ_DTYPES(MOQ_X)
#undef MOQ_X
    MOQ_DTYPE_COUNT
} moq_dtype;

MOQ_API int moq_dtype_bits(moq_dtype t);          /* 0 for MOQ_NONE */
MOQ_API const char *moq_dtype_name(moq_dtype t);  /* "BF16"; "none" for MOQ_NONE */
MOQ_API moq_dtype moq_dtype_find(const char *name, size_t bytes); /* safetensors spelling only; MOQ_NONE if unknown */

/* Single values. Encoders round to nearest, ties to even. e4m3 and e5m2 saturate to +-448 / +-57344, NaN stays NaN;
   e2m1 saturates to +-6 and keeps the sign of zero (NaN gives +6). e8m0 is 2^(b-127), 255 is NaN. */
MOQ_API float moq_f16_decode(uint16_t v);
MOQ_API uint16_t moq_f16_encode(float v);
MOQ_API float moq_bf16_decode(uint16_t v);
MOQ_API uint16_t moq_bf16_encode(float v);
MOQ_API float moq_e4m3_decode(uint8_t v);
MOQ_API uint8_t moq_e4m3_encode(float v);
MOQ_API float moq_e5m2_decode(uint8_t v);
MOQ_API uint8_t moq_e5m2_encode(float v);
MOQ_API float moq_e8m0_decode(uint8_t v);
MOQ_API float moq_e2m1_decode(uint8_t v); /* low four bits */
MOQ_API uint8_t moq_e2m1_encode(float v);
MOQ_API float moq_e2m3_decode(uint8_t v); /* low six bits */
MOQ_API float moq_e3m2_decode(uint8_t v); /* low six bits */
MOQ_API uint8_t moq_e2m3_encode(float v);
MOQ_API uint8_t moq_e3m2_encode(float v);

/* `count` elements of a stored dtype of 8 or more bits (not C64) to F32, each rounded once; any alignment. 0 if the dtype has no number. */
MOQ_API int moq_to_f32(moq_dtype dtype, const void *src, size_t count, float *dst);

/* ------------------------------------------------------------------------------------------------
   >>api-st          safetensors files
   ------------------------------------------------------------------------------------------------ */

/* One tensor of a file. Data may be unaligned: copy, do not cast. */
typedef struct moq_tensor {
    const char *name;               /* NUL-terminated UTF-8, owned by the file or checkpoint */
    const void *data;               /* view of `bytes` bytes */
    uint64_t bytes;
    uint64_t offset;                /* of the first byte in its file */
    uint64_t shape[MOQ_MAX_RANK];
    uint32_t rank;                  /* 0: a scalar, one element */
    moq_dtype dtype;
    uint32_t shard;                 /* index of the file in a checkpoint */
    uint32_t name_bytes;
} moq_tensor;

/* How files are opened. Zero-filled: map them. */
typedef struct moq_open_desc {
    uint32_t flags;                 /* MOQ_OPEN_... */
    moq_allocator allocator;
    moq_log_fn log;                 /* findings */
    void *log_user;
    moq_progress_fn progress;
    void *progress_user;
} moq_open_desc;

enum {
    MOQ_OPEN_READ = 1,      /* read whole files into memory instead of mapping: safe when files may shrink meanwhile */
    MOQ_OPEN_SUBFOLDERS = 2 /* allow forward-slash subfolders in an index's weight_map */
};

typedef struct moq_st moq_st;

/* Open one .safetensors file and check every rule of the format; memory: the bytes stay the caller's. */
MOQ_API moq_st *moq_st_open(const char *path, const moq_open_desc *desc, moq_error *err);
MOQ_API moq_st *moq_st_open_memory(const void *data, size_t bytes, const char *name, const moq_open_desc *desc, moq_error *err);
MOQ_API void moq_st_close(moq_st *st);
MOQ_API size_t moq_st_count(const moq_st *st);
MOQ_API const moq_tensor *moq_st_get(const moq_st *st, size_t index);          /* sorted by name; NULL past the end */
MOQ_API const moq_tensor *moq_st_find(const moq_st *st, const char *name);     /* NULL: not there */
MOQ_API const char *moq_st_metadata(const moq_st *st, const char *key);        /* NULL: not there */

/* Write tensors (name, data, dtype, rank, shape; `bytes` must agree) as one file, ordered by width of dtype, widest first,
   then name, header padded to 8: equal input gives equal bytes. `metadata` is `pairs` key, value, key, value ... (may be
   NULL). Atomic: through a temporary name, fsync and rename. */
MOQ_API moq_result moq_st_write(const char *path, const moq_tensor *tensors, size_t count, const char *const *metadata, size_t pairs,
                                const moq_allocator *a, moq_error *err);

/* ------------------------------------------------------------------------------------------------
   >>api-scheme      how a layer is quantized
   ------------------------------------------------------------------------------------------------ */

#define MOQ_ALL (-1) /* a group that spans the whole dimension */

/* How an activation scale is found; E8M0 scales differ between tools. */
typedef enum moq_scale_rule {
    MOQ_RULE_AMAX = 0,   /* amax / largest code */
    MOQ_RULE_E8M0_CEIL,  /* 2^ceil(log2(amax / largest code)): ModelOpt */
    MOQ_RULE_E8M0_ROUND  /* amax rounded up in the mantissa, then 2^(floor(log2) - emax): compressed-tensors */
} moq_scale_rule;

/* How one operand's numbers are stored or rounded. */
typedef struct moq_coding {
    moq_dtype elem;        /* F4 F6_E2M3 F6_E3M2 F8_E4M3 I2..I8 BF16 F16 F32; MOQ_NONE for an input that stays wide */
    int32_t group_rows;    /* rows (input: tokens) sharing one scale: 1, 128, MOQ_ALL; 0 when there is no scale */
    int32_t group_cols;    /* columns sharing one scale: 16, 32, 128, MOQ_ALL; 0 when there is no scale */
    moq_dtype scale;       /* as stored: F8_E4M3, F8_E8M0, F32, BF16, F16; MOQ_NONE: no scale */
    uint8_t has_global;    /* a second, per-tensor F32 scale */
    uint8_t dynamic;       /* input: (group) scales computed from the values at run time */
    uint8_t zero_point;    /* asymmetric */
    uint8_t rule;          /* moq_scale_rule, for dynamic scales */
} moq_coding;

/* How a layer is quantized. Plain data: every reader fills it, every kernel, exporter and printer looks only at it. */
typedef struct moq_scheme {
    moq_coding weight;
    moq_coding input;
    uint8_t pre_quant_scale; /* x is multiplied by a per-channel vector first (AWQ, SmoothQuant) */
    uint8_t act_order;       /* columns name their group by an index vector (GPTQ) */
    uint8_t requantize_fp8;  /* W4A8_AWQ: as stored, the weight is rounded once more to E4M3 with the global scale */
    uint8_t hadamard;        /* the input is rotated block by block first */
    uint16_t lora_rank;      /* SVDQuant: y += B (A x) in high precision; 0: none */
} moq_scheme;

/* Is the weight stored quantized at all? */
MOQ_API int moq_scheme_is_quantized(const moq_scheme *s);

/* A short printable name, e.g. "nvfp4", "w4a16_nvfp4", "int4_g128_zp", "fp8_block128", "bf16". Returns the length needed. */
MOQ_API size_t moq_scheme_name(const moq_scheme *s, char *text, size_t capacity);

/* Same numbers format: equal in every field. */
MOQ_API int moq_scheme_equal(const moq_scheme *a, const moq_scheme *b);

/* KV-cache formats: name in the command line, what is stored. */
typedef enum moq_kv_format {
    MOQ_KV_WIDE = 0,      /* activations' own type */
    MOQ_KV_FP8,           /* E4M3 of x / scale */
    MOQ_KV_FP8_AFFINE,    /* E4M3 of (x - bias) / scale */
    MOQ_KV_INT8,          /* round(x / scale) */
    MOQ_KV_NVFP4,         /* blocks of 16 along head_dim, E4M3 block scales, global scale k_scale / 6 */
    MOQ_KV_NVFP4_AFFINE,  /* stored like NVFP4: ModelOpt's forward ignores the bias it calibrated with */
    MOQ_KV_NVFP4_ROTATE,  /* NVFP4 of Hadamard-rotated keys; nothing in a checkpoint marks it, the caller chooses it */
    MOQ_KV_MXFP4,         /* blocks of 32, E8M0 scales */
    MOQ_KV_FORMAT_COUNT
} moq_kv_format;

MOQ_API const char *moq_kv_format_name(moq_kv_format f);               /* "fp8" */
MOQ_API int moq_kv_format_find(const char *name, moq_kv_format *out);  /* 1: found; "wide" and "none" are WIDE */

/* One recipe: a row of the table that `moq recipes` prints. */
typedef struct moq_recipe {
    const char *name;         /* "nvfp4_awq_lite" */
    const char *modelopt;     /* "NVFP4_AWQ_LITE_CFG" */
    const char *algo;         /* quant_algo that the export says: "NVFP4_AWQ" */
    const char *covers;       /* "all linears", "mlp", "experts" ... */
    const char *calibration;  /* "none", "max", "awq_lite" ... */
    moq_scheme scheme;
} moq_recipe;

MOQ_API size_t moq_recipe_count(void);
MOQ_API const moq_recipe *moq_get_recipe(size_t index);         /* NULL past the end */
MOQ_API const moq_recipe *moq_find_recipe(const char *name);    /* our name or ModelOpt's constant, any case */

/* ------------------------------------------------------------------------------------------------
   >>api-config      what the configuration files say
   ------------------------------------------------------------------------------------------------ */

/* Who wrote the quantization description. */
typedef enum moq_family {
    MOQ_FAMILY_NONE = 0, MOQ_FAMILY_MODELOPT, MOQ_FAMILY_COMPRESSED_TENSORS, MOQ_FAMILY_GPT_OSS, MOQ_FAMILY_FP8_BLOCK,
    MOQ_FAMILY_AWQ, MOQ_FAMILY_GPTQ
} moq_family;

/* Summary of a checkpoint. Strings are owned by the checkpoint, never NULL. */
typedef struct moq_info {
    moq_family family;
    const char *family_name;   /* "modelopt" */
    const char *model_type;    /* "llama", or "" without config.json */
    const char *quant_algo;    /* as written, e.g. "NVFP4", or "" */
    const char *producer;      /* "modelopt 0.47.0", or "" */
    moq_kv_format kv;          /* KV cache as the checkpoint asks for */
    uint64_t total_bytes;      /* of all tensors */
    uint32_t shards;
} moq_info;

/* Shell-style match: `*` (crosses dots), `?`, everything else literal. At most pattern x name steps. */
MOQ_API int moq_glob_match(const char *pattern, const char *name);

/* ------------------------------------------------------------------------------------------------
   >>api-bind        layers as plain data
   ------------------------------------------------------------------------------------------------ */

/* Borrowed elements of a stored dtype, contiguous unless said otherwise. data NULL: not there. */
typedef struct moq_view {
    const void *data;
    moq_dtype dtype;
    uint64_t count;
} moq_view;

/* Where the code of element (r, c) lies, settled once at binding. Codes are packed along one axis into little-endian
   words; the word of element (r, c) is word(r', c') with the packed coordinate divided by the codes a word holds:
       packed along columns:  r * row_stride + bit(c) / word_bits * col_stride
       packed along rows:     c * col_stride + bit(r) / word_bits * row_stride
   A code may straddle two neighbouring words unless `padded`. */
typedef struct moq_packing {
    uint8_t bits;        /* of one code: 2..8, 16, 32 */
    uint8_t word_bits;   /* 8, 16 or 32 */
    uint8_t along_rows;  /* 0: neighbours along columns share a word; 1: along rows */
    uint8_t padded;      /* word_bits / bits codes a word, the rest unused */
    uint8_t awq_order;   /* slot i of a word holds neighbour 0,2,4,6,1,3,5,7 [i] */
    uint8_t is_unsigned; /* integer codes are 0..2^bits-1, else two's complement */
    int64_t row_stride;  /* in words */
    int64_t col_stride;  /* in words */
} moq_packing;

/* One linear layer, plain data: views into the checkpoint, valid until it is closed. Element (r, c) of the layer is element
   (row_first + r * row_step, col_first + c) of what is stored: slices of fused or stacked tensors cost nothing. */
typedef struct moq_linear {
    const char *name;          /* module, e.g. "model.layers.0.mlp.up_proj" */
    const char *tensor;        /* the tensor that holds the codes */
    int64_t rows, cols;        /* outputs, inputs */
    int64_t row_first, row_step, col_first;
    int32_t experts;           /* 0: one layer; > 0: a stack of so many, see moq_slice_expert */
    moq_scheme scheme;

    moq_view codes;
    moq_packing packing;
    int64_t expert_codes;      /* bytes from one expert of a stack to the next, of codes, scales, bias */
    int64_t expert_scales;
    int64_t expert_bias;

    moq_view scales;           /* scale of (r, c): element (r / group_rows) * scale_row_stride + group(c) * scale_col_stride */
    int64_t scale_row_stride, scale_col_stride;
    moq_view group_index;      /* I32 [cols]: group of a column; absent: c / group_cols */
    moq_view zeros;            /* zero points, packed like codes; element (r, group) */
    moq_packing zero_packing;
    int32_t zero_add;          /* added to every zero point as stored (GPTQ v1: 1); without `zeros`: the zero point itself */
    float global_mul, global_div; /* per-tensor scale as a fraction, so that the product can be rounded once; 1 and 1: none */
    moq_view expert_global;    /* F32 [experts]: stacks whose experts have a global scale each; slicing puts it into global_mul */
    moq_view expert_input;     /* the same for input_scale */

    float requant_scale;       /* W4A8_AWQ as stored: the weight is rounded again, e4m3(w / requant_scale) * requant_scale; 0: not */
    float input_scale;         /* static scale or NVFP4 global scale of the input, a multiplier on read; 0: none */
    int32_t input_zero;        /* static zero point of the input */
    moq_view bias;             /* [rows of what is stored] */
    moq_view pre_quant_scale;  /* [cols of what is stored] */
    moq_view lora_a, lora_b;   /* [rank, cols], [rows, rank] */
    moq_view hadamard;         /* F32 [size, size], applied to blocks of the input: x_block * H * hadamard_scale; absent: Sylvester's matrix */
    int32_t hadamard_size;     /* block length; 0: none */
    float hadamard_scale;
} moq_linear;

/* A layer over the caller's own memory: row-major [rows, cols] of F32, F16 or BF16. */
MOQ_API void moq_make_linear(moq_linear *out, const char *name, moq_dtype dtype, const void *data, int64_t rows, int64_t cols);

/* KV-cache quantization of one attention module. Missing scales are 1. */
typedef struct moq_kv {
    moq_kv_format format;
    moq_view k_scale, v_scale; /* 1 or kv_heads elements; absent: 1 */
    moq_view k_bias, v_bias;   /* [kv_heads * head_dim]; absent: 0 */
} moq_kv;

/* ------------------------------------------------------------------------------------------------
   >>api-checkpoint  folders
   ------------------------------------------------------------------------------------------------ */

typedef struct moq_checkpoint moq_checkpoint;

/* Open a checkpoint folder: config files, index, shards, and every module's tensors against its scheme. Only headers,
   JSON and scalar scales are read; tensor data is mapped, so time and memory do not grow with it.
   `desc` may be NULL. NULL on failure, with nothing left open. Close with moq_close. */
MOQ_API moq_checkpoint *moq_open(const char *dir, const moq_open_desc *desc, moq_error *err);

/* The same over files already in memory (a game's own archive). */
MOQ_API moq_checkpoint *moq_open_memory(const moq_file *files, size_t count, const moq_open_desc *desc, moq_error *err);
MOQ_API void moq_close(moq_checkpoint *ck);

MOQ_API const moq_info *moq_get_info(const moq_checkpoint *ck);
MOQ_API const moq_allocator *moq_get_allocator(const moq_checkpoint *ck);
MOQ_API const char *moq_get_name(const moq_checkpoint *ck);                      /* base name of the folder, for messages */

/* config.json (never NULL: an empty object when there is none). */
MOQ_API const moq_json *moq_get_config(const moq_checkpoint *ck);

/* Parse another JSON file of the folder (limit MOQ_MAX_JSON_BYTES); destroy it with moq_json_destroy. MOQ_E_NOTFOUND when absent. */
MOQ_API moq_json_doc *moq_read_json(const moq_checkpoint *ck, const char *name, moq_json_dialect dialect, moq_error *err);

/* Read another text file of the folder; release as moq_read_file says, with moq_get_allocator(ck). */
MOQ_API char *moq_read_text(const moq_checkpoint *ck, const char *name, size_t *bytes, moq_error *err);

/* All tensors, sorted by name. */
MOQ_API size_t moq_tensor_count(const moq_checkpoint *ck);
MOQ_API const moq_tensor *moq_get_tensor(const moq_checkpoint *ck, size_t index);
MOQ_API const moq_tensor *moq_find_tensor(const moq_checkpoint *ck, const char *name);
MOQ_API const char *moq_get_shard_name(const moq_checkpoint *ck, uint32_t shard);

/* Modules: everything that holds a matrix of weights (linear layers, embeddings, routers, expert stacks), sorted by name. */
MOQ_API size_t moq_module_count(const moq_checkpoint *ck);
MOQ_API moq_result moq_get_module(const moq_checkpoint *ck, size_t index, moq_linear *out, moq_error *err);

/* The layer of a module name ("lm_head", "model.layers.0.mlp.experts.3.up_proj", or a stack "....mlp.experts.gate_up_proj").
   MOQ_E_NOTFOUND when nothing of that name holds weights. */
MOQ_API moq_result moq_find_linear(const moq_checkpoint *ck, const char *name, moq_linear *out, moq_error *err);
MOQ_API int moq_has_linear(const moq_checkpoint *ck, const char *name);

/* KV-cache quantization of one attention module ("model.layers.0.self_attn"). MOQ_OK with format WIDE when there is none. */
MOQ_API moq_result moq_find_kv(const moq_checkpoint *ck, const char *attention, moq_kv *out, moq_error *err);

/* Check everything that opening did not touch: every scale, with MOQ_VERIFY_DEEP every code. `found` is called for each
   finding (fatal: 1 = a reader must refuse it, 0 = worth knowing). Returns the first fatal code or MOQ_OK. */
typedef void (*moq_finding_fn)(void *user, int fatal, const moq_error *finding);
enum { MOQ_VERIFY_DEEP = 1 };
MOQ_API moq_result moq_verify(const moq_checkpoint *ck, uint32_t flags, moq_finding_fn found, void *user, moq_error *err);

/* ------------------------------------------------------------------------------------------------
   >>api-layout      slices and repackings
   ------------------------------------------------------------------------------------------------ */

/* Rows first, first + step, ... (count of them) and columns [first, first + count) of a layer; expert e of a stack.
   A column slice must start and end on group and word boundaries: MOQ_E_SHAPE otherwise. Bias follows rows;
   lora_b follows rows, lora_a and pre_quant_scale follow columns. `out` may be `in`. */
MOQ_API moq_result moq_slice_rows(const moq_linear *in, int64_t first, int64_t count, int64_t step, moq_linear *out, moq_error *err);
MOQ_API moq_result moq_slice_cols(const moq_linear *in, int64_t first, int64_t count, moq_linear *out, moq_error *err);
MOQ_API moq_result moq_slice_expert(const moq_linear *in, int32_t expert, moq_linear *out, moq_error *err);

/* Raw codes of columns [col, col + count) of row r, sign-extended for integers, as unsigned codes for floats
   (E2M1 0..15, E4M3 0..255). Not for elements wider than 8 bits. */
MOQ_API void moq_get_codes(const moq_linear *w, int64_t row, int64_t col, int64_t count, int16_t *codes);

/* The 128x4 tiling of block scales that SM100 and SM120 tensor cores read: byte position of scale (row, group), and the bytes of
   a whole tiled array (rows padded to 128, groups to 4). */
MOQ_API size_t moq_swizzle_128x4(int64_t row, int64_t group, int64_t groups);
MOQ_API size_t moq_swizzle_128x4_bytes(int64_t rows, int64_t groups);

/* ------------------------------------------------------------------------------------------------
   >>api-cpu         reference kernels
   ------------------------------------------------------------------------------------------------ */

/* Rows [first, first + count) of the weight as F32: the exact real product of the stored numbers, rounded once; -0 codes keep
   their sign. pre_quant_scale, lora and hadamard are no part of it. out: [count, cols]. */
MOQ_API void moq_dequantize(const moq_linear *w, int64_t first, int64_t count, float *out);

/* What `--act stored` does to one token: x [cols] rounded as the scheme's input coding says (after pre_quant_scale and hadamard).
   out may be x. */
MOQ_API void moq_round_input(const moq_linear *w, const float *x, float *out);

/* K or V of one head (n values) rounded as the KV format says: `bias` may be NULL. out may be x. */
MOQ_API void moq_round_kv(moq_kv_format format, float scale, const float *bias, const float *x, int n, float *out);

/* ------------------------------------------------------------------------------------------------
   >>api-backend     the function table
   ------------------------------------------------------------------------------------------------ */

typedef struct moq_backend moq_backend;
typedef struct moq_weight moq_weight;     /* a prepared layer, opaque, owned by the caller until release_weight */
typedef struct moq_experts moq_experts;   /* a prepared mixture of experts */
typedef struct moq_kv_cache moq_kv_cache;
typedef struct moq_graph moq_graph;
typedef struct moq_ssm moq_ssm;           /* a prepared state-space mixer with the states of its sequences */

/* How inputs of quantized layers are rounded. */
typedef enum moq_act {
    MOQ_ACT_AUTO = 0, /* as stored where this device computes in that format, wide elsewhere; explain() says which */
    MOQ_ACT_STORED,   /* exactly as the checkpoint says */
    MOQ_ACT_WIDE      /* never rounded below the backend's own activation type */
} moq_act;

typedef enum moq_activation {
    MOQ_SILU_MUL = 0,   /* g * sigmoid(g) * u */
    MOQ_GELU_MUL,       /* gelu(g) * u, exact erf */
    MOQ_GELU_TANH_MUL,  /* tanh approximation */
    MOQ_SWIGLU_CLAMP,   /* gpt-oss: g = min(g, limit), u = clamp(u, +-limit): g * sigmoid(alpha g) * (u + beta) */
    MOQ_RELU2           /* not gated: max(x, 0)^2 */
} moq_activation;

typedef struct moq_activation_desc {
    moq_activation kind;
    float limit, alpha, beta; /* MOQ_SWIGLU_CLAMP only: 7, 1.702, 1 for gpt-oss */
} moq_activation_desc;

typedef enum moq_score { MOQ_SCORE_SOFTMAX = 0, MOQ_SCORE_SIGMOID } moq_score;

/* How router logits choose experts. p = score(logits); candidates are ranked by p + bias; the chosen weights are p without
   bias, divided by their sum if `renormalize`, times `scale`. With groups > 1 only the `top_groups` best groups compete:
   a group's score is its largest p (softmax) or the sum of its two largest p + bias (sigmoid). Ties: the lower index. */
typedef struct moq_routing {
    int32_t experts, top_k;
    moq_score score;
    int32_t renormalize;
    int32_t groups, top_groups; /* 0 or 1: none */
    float scale;                /* 0: 1 */
    moq_view bias;              /* [experts] or absent */
} moq_routing;

/* A mixture of experts as bound: arrays of routing.experts layers. Not gated: gate NULL. Biases are the layers' own. */
typedef struct moq_moe {
    const char *name;
    moq_routing routing;
    moq_activation_desc activation;
    const moq_linear *gate, *up, *down;
} moq_moe;

/* Which sequence and position each row of a step belongs to. The arrays live in the backend's memory. */
typedef struct moq_batch {
    int32_t rows;
    int32_t max_pos;     /* largest value in pos, known to the host */
    const int32_t *slot; /* [rows] sequence of the KV cache */
    const int32_t *pos;  /* [rows] position in that sequence */
} moq_batch;

/* A KV cache of one layer: `slots` sequences of up to `capacity` tokens. */
typedef struct moq_kv_desc {
    const char *name;       /* for messages */
    int32_t slots, capacity, kv_heads;
    int32_t head_dim;       /* of keys */
    int32_t value_dim;      /* of values; 0: head_dim */
    moq_kv kv;              /* format, scales, biases */
} moq_kv_desc;

typedef struct moq_norm_desc {
    const void *x;          /* [rows, groups * cols], row stride x_stride elements (0: groups * cols) */
    void *y;                /* may be x */
    const float *weight;    /* [cols], in the backend's memory; NULL: ones */
    const void *add;        /* may be NULL; [rows, groups * cols] contiguous: x += add first, and x is updated (then x must be writable) */
    int64_t x_stride, y_stride;
    int32_t rows, cols;
    int32_t groups;         /* 0: 1; per-head norms: heads, all with the same weight */
    float eps;
} moq_norm_desc;

typedef struct moq_rope_desc {
    void *x;                /* [rows, heads, head_dim], row stride `stride` elements, in place */
    int64_t stride;
    int32_t rows, heads, head_dim;
    int32_t first, dims;    /* rotates dims values from `first` of each head (0: all from 0) */
    int32_t interleaved;    /* pairs (2i, 2i+1) instead of (i, i + dims/2) */
    const float *table;     /* [rows, dims/2, 2] cos, sin from rope_table */
} moq_rope_desc;

typedef struct moq_attention_desc {
    moq_kv_cache *cache;
    const void *q;          /* [rows, heads, head_dim], row stride q_stride elements */
    void *y;                /* [rows, heads, value_dim], row stride y_stride elements */
    int64_t q_stride, y_stride;
    int32_t heads;          /* a multiple of kv_heads: head h reads kv head h / (heads / kv_heads) */
    int32_t window;         /* 0: all; else only the last `window` positions including its own */
    float scale;            /* of q.k; 0: 1 / sqrt(head_dim) */
    float softcap;          /* 0: none; else scores = cap * tanh(score / cap) */
    const float *sinks;     /* [heads] extra logits in the softmax denominator, backend memory; NULL: none */
} moq_attention_desc;

/* A Mamba-2 mixer (Dao and Gu 2024) between its two projections, with the states of `slots` sequences. Below, inner is
   heads * head_dim, and the convolution runs over width = inner + 2 * groups * state channels: x, B, C. */
typedef struct moq_ssm_desc {
    const char *name;       /* for messages */
    int32_t slots, heads, head_dim, state;
    int32_t groups;         /* divides heads: head h reads B and C of group h / (heads / groups) */
    int32_t conv;           /* taps of the causal convolution */
    float dt_min, dt_max;   /* limits of the step; dt_max 0: none */
    float eps;              /* of the norm */
    moq_view conv_weight;   /* [width, conv], the last tap is the current token */
    moq_view conv_bias;     /* [width] or absent */
    moq_view dt_bias, a_log, d; /* [heads] */
    moq_view norm;          /* [inner] */
} moq_ssm_desc;

/* Values that change places: y[r][h][i] = x[r][h][i] for rows, heads, width. Strides in elements. */
typedef struct moq_copy_desc {
    const void *x;
    void *y;                    /* does not overlap x */
    int64_t x_stride, y_stride; /* from row to row */
    int64_t x_step, y_step;     /* from head to head; x_step 0: every head gets the same values */
    int32_t rows, heads, width;
} moq_copy_desc;

/* The table. Activations are row-major matrices of element type `act` in the backend's own memory (alloc / upload / download);
   on the CPU that is plain F32 memory and any pointer will do. Calls are ordered; they do not fail one by one: a device
   error stays until `sync` reports it. Nothing allocates after prepare and kv_create, except as said at `reserve`.
   An entry that a backend lacks is NULL. Callers may fill or wrap a table of their own. */
struct moq_backend {
    void *ctx;
    const char *name;       /* "cpu", "cuda:0" */
    moq_dtype act;          /* element type of activations: F32 on the CPU */
    int32_t max_rows;       /* rows that scratch memory is reserved for; see reserve */

    void (*destroy)(moq_backend *be);
    void *(*alloc)(moq_backend *be, size_t bytes, moq_error *err); /* zeroed, 64-byte aligned */
    void (*release)(moq_backend *be, void *ptr);
    void (*upload)(moq_backend *be, void *dst, const void *src, size_t bytes);
    void (*download)(moq_backend *be, void *dst, const void *src, size_t bytes); /* waits */
    void (*copy)(moq_backend *be, void *dst, const void *src, size_t bytes);
    /* F32 host values to and from activations. */
    void (*upload_act)(moq_backend *be, void *dst, const float *src, size_t count);
    void (*download_act)(moq_backend *be, float *dst, const void *src, size_t count); /* waits */
    moq_result (*sync)(moq_backend *be, moq_error *err);

    /* Make room for calls of up to `rows` rows over everything prepared so far. Calls with more rows are split. */
    moq_result (*reserve)(moq_backend *be, int32_t rows, moq_error *err);

    /* MOQ_OK, or why this layer cannot run here. explain: the kernel it would get and why, one line; returns the length needed. */
    moq_result (*supports)(moq_backend *be, const moq_linear *w, moq_error *err);
    size_t (*explain)(moq_backend *be, const moq_linear *w, char *text, size_t capacity);

    /* `parts` layers that share their input become one: y = [part 0 | part 1 | ...], each exactly by its own scheme and scales. */
    moq_weight *(*prepare_linear)(moq_backend *be, const moq_linear *layers, int32_t parts, moq_error *err);
    void (*release_weight)(moq_backend *be, moq_weight *w);
    size_t (*weight_bytes)(const moq_backend *be, const moq_weight *w); /* memory it holds beyond the checkpoint's */
    /* y[rows, out] = x[rows, in] W^T (+ bias). */
    void (*linear)(moq_backend *be, const moq_weight *w, const void *x, int32_t rows, void *y);
    /* y[i] = row ids[i] of the table, times `scale`. ids in backend memory, each < rows of the table. */
    void (*embed)(moq_backend *be, const moq_weight *w, const int32_t *ids, int32_t count, float scale, void *y);

    moq_experts *(*prepare_moe)(moq_backend *be, const moq_moe *moe, moq_error *err);
    void (*release_moe)(moq_backend *be, moq_experts *m);
    /* y[rows, cols] = sum over the chosen experts; logits [rows, experts] come from the router's own linear. */
    void (*moe)(moq_backend *be, const moq_experts *m, const void *x, const void *logits, int32_t rows, void *y);

    moq_kv_cache *(*kv_create)(moq_backend *be, const moq_kv_desc *desc, moq_error *err);
    void (*kv_release)(moq_backend *be, moq_kv_cache *cache);
    size_t (*kv_bytes)(const moq_backend *be, const moq_kv_desc *desc); /* what kv_create would take */
    /* k: [rows, kv_heads, head_dim], v: [rows, kv_heads, value_dim], with row strides in elements. Rotated keys in, after rope. */
    void (*kv_append)(moq_backend *be, moq_kv_cache *cache, const moq_batch *b, const void *k, int64_t k_stride, const void *v, int64_t v_stride);
    /* Copy `count` tokens of a sequence: to another slot (fork), or within one (shift). Ranges may overlap. */
    void (*kv_copy)(moq_backend *be, moq_kv_cache *cache, int32_t dst_slot, int32_t dst_pos, int32_t src_slot, int32_t src_pos, int32_t count);
    /* Row i attends to positions max(0, pos - window + 1) .. pos of its slot, all appended before. */
    void (*attention)(moq_backend *be, const moq_batch *b, const moq_attention_desc *a);

    void (*norm)(moq_backend *be, const moq_norm_desc *n); /* RMS norm: x / sqrt(mean(x^2) + eps) * weight */
    /* table[rows, dims, 2] = scale * cos, sin of pos * inv_freq; inv_freq [dims] in backend memory. */
    void (*rope_table)(moq_backend *be, const int32_t *pos, int32_t rows, const float *inv_freq, int32_t dims, float scale, float *table);
    void (*rope)(moq_backend *be, const moq_rope_desc *r);
    /* x: [rows, gate n | up n] -> y [rows, n]; not gated: x [rows, n]. y may be x only when not gated. */
    void (*activation)(moq_backend *be, const moq_activation_desc *a, const void *x, int32_t rows, int32_t n, void *y);
    void (*add)(moq_backend *be, void *x, const void *y, size_t count); /* x += y */
    void (*argmax)(moq_backend *be, const void *x, int32_t rows, int32_t n, int32_t *index); /* backend memory; ties: the lowest */

    /* Record the calls between begin and end and repeat them with the same pointers. NULL where a device has no graphs. */
    moq_result (*capture_begin)(moq_backend *be, moq_error *err);
    moq_graph *(*capture_end)(moq_backend *be, moq_error *err);
    void (*replay)(moq_backend *be, moq_graph *g);
    void (*release_graph)(moq_backend *be, moq_graph *g);

    /* State-space mixers. Tensors of the description are copied; an unusable one is refused with its name. */
    moq_ssm *(*ssm_create)(moq_backend *be, const moq_ssm_desc *desc, moq_error *err);
    void (*ssm_release)(moq_backend *be, moq_ssm *s);
    size_t (*ssm_bytes)(const moq_backend *be, const moq_ssm_desc *desc); /* what ssm_create would take */
    /* x: [rows, inner z | inner x | groups * state B | groups * state C | heads dt] -> y [rows, inner]. Row i continues the state of its
       slot, which has seen exactly pos[i] tokens: rows of one slot stand in order, and pos 0 starts from nothing. Per row:
           (x, B, C) = silu(conv_bias + sum over taps conv_weight * (x, B, C of the last `conv` tokens))
           t[h]      = clamp(softplus(dt[h] + dt_bias[h]), dt_min, dt_max)
           S[h]      = exp(-exp(a_log[h]) t[h]) S[h] + t[h] x[h] B^T      S[h]: [head_dim, state]
           u[h]      = S[h] C + d[h] x[h]
           v         = u * silu(z)
           y         = norm * v / sqrt(mean(v^2) + eps), the mean over each inner / groups values by itself
       State and sums are F32, whatever `act` is. */
    void (*ssm)(moq_backend *be, moq_ssm *s, const moq_batch *b, const void *x, void *y);
    void (*ssm_copy)(moq_backend *be, moq_ssm *s, int32_t dst_slot, int32_t src_slot); /* fork */
    void (*copy_heads)(moq_backend *be, const moq_copy_desc *c);

    size_t (*moe_bytes)(const moq_backend *be, const moq_experts *m); /* as weight_bytes, of a mixture */
    /* The first `count` tokens of a slot as they are stored, to and from host memory, for saving a sequence. They fit a cache of the same
       description on the same kind of backend only. kv_read returns the bytes; out NULL: only that. All four wait. */
    size_t (*kv_read)(moq_backend *be, const moq_kv_cache *cache, int32_t slot, int32_t count, void *out);
    void (*kv_write)(moq_backend *be, moq_kv_cache *cache, int32_t slot, int32_t count, const void *bytes);
    /* The same for the state of a slot, whatever its length. */
    size_t (*ssm_read)(moq_backend *be, const moq_ssm *s, int32_t slot, void *out);
    void (*ssm_write)(moq_backend *be, moq_ssm *s, int32_t slot, const void *bytes);
};

typedef struct moq_cpu_desc {
    int32_t threads;         /* 0: physical cores; ignored when parallel.run is set */
    moq_act act;             /* AUTO on the CPU: INT8 as stored, every other input format wide */
    const char *kernel;      /* NULL or "auto": fastest; "reference": plain C; else a name that explain() prints */
    moq_parallel parallel;   /* the caller's job system */
    moq_allocator allocator;
} moq_cpu_desc;

/* The CPU backend. `desc` may be NULL. Destroy with moq_backend_destroy. */
MOQ_API moq_backend *moq_cpu_backend(const moq_cpu_desc *desc, moq_error *err);

typedef struct moq_cuda_desc {
    int32_t device;          /* counts from 0 */
    moq_act act;             /* AUTO: as stored where the GPU computes in that format, else wide */
    const char *kernel;      /* NULL or "auto"; "reference"; else a name that explain() prints */
    moq_allocator allocator; /* host memory */
} moq_cuda_desc;

/* The CUDA backend: defined in modelopt_q_cuda.cu. moq_cuda_backend(device, err) is the one with every default. */
extern moq_backend *moq_cuda_backend(int device, moq_error *err);
extern moq_backend *moq_cuda_backend_with(const moq_cuda_desc *desc, moq_error *err);

MOQ_API void moq_backend_destroy(moq_backend *be);

/* With MOQ_QUANTIZE, defined wherever the header is included: quantizing, calibrating, exporting. */
#ifdef MOQ_QUANTIZE
/* ------------------------------------------------------------------------------------------------
   >>api-quant       float matrices to codes and scales
   ------------------------------------------------------------------------------------------------ */

/* How the amax (largest magnitude) of each NVFP4 block is chosen. With MAX block scales are those of the data; with the others, or
   with given `amax` values, they are "static": the encoder takes them as they are. */
typedef enum moq_amax_search {
    MOQ_SEARCH_MAX = 0,
    MOQ_SEARCH_SWEEP,        /* of all E4M3 scales the one with the smallest squared error */
    MOQ_SEARCH_FOUR_OVER_SIX /* the largest value becomes code 6 or code 4, whichever errs less; block scales end at 256 */
} moq_amax_search;

/* One float matrix and what to make of it. Rounding, clamps, zero blocks and ties are those of ModelOpt's exporter on a GPU, so the
   bytes are the same. Zero-filled fields mean: from the data. */
typedef struct moq_encode_desc {
    moq_scheme scheme;       /* weight coding; W4A8_AWQ and W4A8_NVFP4_FP8 are told by requantize_fp8 and the input coding */
    const char *name;        /* for messages; may be NULL */
    const void *data;        /* [rows, cols], row-major */
    moq_dtype dtype;         /* of data: F32, BF16, F16 */
    moq_dtype model;         /* type that ModelOpt would hold the weight in; per-tensor FP8 divides in it. 0: dtype */
    int64_t rows, cols;
    const float *amax;       /* of each scale group, [row groups, col groups]; NULL: from the data */
    float global_amax;       /* of the whole matrix, or of the group of layers that share a global scale; 0: from the data */
    moq_amax_search search;
    moq_parallel parallel;   /* zero: this thread */
    const moq_allocator *allocator; /* scratch: one row for each worker; may be NULL */
} moq_encode_desc;

/* Bytes that moq_encode writes; MOQ_E_SHAPE when the format cannot hold this shape. */
MOQ_API moq_result moq_encode_bytes(const moq_encode_desc *d, uint64_t *codes, uint64_t *scales, moq_error *err);

/* Encode as ModelOpt stores it: codes packed along columns (INT4: along rows), low nibble first; scales row-major in the scheme's
   dtype, one per group. *global: the per-tensor scale where the scheme has one, else 0; it may be NULL. Codes and scales have
   the sizes of moq_encode_bytes; codes may be NULL when only scales are wanted. Fails with MOQ_E_SCALE on non-finite values. */
MOQ_API moq_result moq_encode(const moq_encode_desc *d, void *codes, void *scales, float *global, moq_error *err);

/* The amax of each scale group, [row groups, col groups] (one for per-tensor scales), found as `search` says. For a search the
   global amax counts: give that of the group of layers. `amax` may be NULL when only *global_amax, the largest, is wanted. */
MOQ_API moq_result moq_find_amax(const moq_encode_desc *d, float *amax, float *global_amax, moq_error *err);

/* ------------------------------------------------------------------------------------------------
   >>api-calib       watching a model run, calibration, AutoQuantize's choice
   ------------------------------------------------------------------------------------------------ */

/* What an observing backend shows. All arrays are host F32, row-major and the backend's own; entries may be NULL. */
typedef struct moq_observer {
    void *user;
    /* The input x [rows, cols] of `parts` layers that share it, before their own rounding. May be changed in place: return 1 and
       the product is computed from the changed values. In a mixture of experts only the rows of the chosen expert are shown. */
    int (*input)(void *user, const moq_linear *layers, int32_t parts, float *x, int32_t rows);
    /* The output y [rows, sum of the parts' rows] of a layer. */
    void (*output)(void *user, const moq_linear *layers, int32_t parts, const float *y, int32_t rows);
    /* Keys [rows, kv_heads, head_dim] after rope and values [rows, kv_heads, value_dim], as they enter the cache. */
    void (*kv)(void *user, const moq_kv_desc *cache, const float *k, const float *v, int32_t rows);
    /* moq_end_batch was called. */
    void (*end_batch)(void *user);
    /* 1: every result is rounded to BF16 and the small operations go step by step as PyTorch does them in BF16, so that statistics are
       those of a BF16 model and not of an F32 one. */
    int32_t bf16;
} moq_observer;

/* A backend that passes every call on to `inner` and shows what goes by. It must be destroyed before `inner`, which stays the caller's.
   Engines need not know that they are watched; it is slow, and has no graphs. */
MOQ_API moq_backend *moq_observing_backend(moq_backend *inner, const moq_observer *observer, const moq_allocator *a, moq_error *err);

/* Runs all samples, one forward pass each, on a model of `source` whose backend is `watch`, and calls moq_end_batch(watch) after each batch:
   averages are taken over batches. Called once for each pass that an algorithm needs. Only the forward pass knows the tokens, so
   padding is whatever it runs. */
typedef moq_result (*moq_forward_fn)(void *data, const moq_checkpoint *source, moq_backend *watch, moq_error *err);
MOQ_API void moq_end_batch(moq_backend *watch);

/* What to quantize a module with: the recipe, or NULL to leave it as it is. */
typedef const moq_recipe *(*moq_choose_fn)(void *user, const char *module);

/* How a search over scales judges a candidate. */
typedef enum moq_judge {
    MOQ_JUDGE_AUTO = 0, /* EXACT for up to 4096 tokens, then GRAM */
    MOQ_JUDGE_EXACT,    /* by the layer's outputs, rounded to BF16 step by step as ModelOpt does; time grows with the tokens */
    MOQ_JUDGE_GRAM      /* by sums of x^T x: the same loss without those roundings; memory cols^2 for each input */
} moq_judge;

typedef struct moq_calibrate_desc {
    const moq_checkpoint *source;
    const char *recipe;             /* of moq_find_recipe */
    moq_choose_fn choose;           /* NULL: the recipe for what it covers */
    void *choose_user;
    const char *kv;                 /* "fp8", "fp8_affine", "nvfp4_rotate" ...; NULL, "none" and the cast presets need no statistics */
    int32_t smooth_experts;         /* 1: AWQ searches every expert as a layer of its own; 0: experts stay plain, as in ModelOpt's fused experts */
    moq_forward_fn forward;
    void *data;
    moq_backend *backend;           /* runs the model; NULL: a CPU backend of its own */
    int32_t threads;                /* of that one; 0: physical cores */
    moq_judge judge;
    int32_t f32;                    /* 1: statistics of an F32 model; 0: of a BF16 model, as ModelOpt calibrates */
    moq_allocator allocator;
    moq_progress_fn progress;       /* MOQ_STAGE_CALIBRATE: passes done, passes in all */
    void *progress_user;
} moq_calibrate_desc;

/* Statistics, named as ModelOpt names its quantizers in memory: "M.input_quantizer.amax", "M.input_quantizer.pre_quant_scale",
   "M.awq_lite.best_scale", "M.weight_quantizer.amax", "A.k_bmm_quantizer.amax" ... all F32. */
typedef struct moq_stats moq_stats;

/* Run the model as often as the recipe's algorithm needs and return what it found. Destroy with moq_stats_destroy. */
MOQ_API moq_stats *moq_calibrate(const moq_calibrate_desc *desc, moq_error *err);
MOQ_API void moq_stats_destroy(moq_stats *s);
MOQ_API size_t moq_stats_count(const moq_stats *s);
MOQ_API const moq_tensor *moq_get_stat(const moq_stats *s, size_t index);           /* in the order they were found; NULL past the end */
MOQ_API const moq_tensor *moq_find_stat(const moq_stats *s, const char *name);      /* NULL: not there */
/* A .safetensors file that moq_quantize_desc.calibration takes. */
MOQ_API moq_result moq_stats_save(const moq_stats *s, const char *path, moq_error *err);

/* ---- AutoQuantize ---- */

/* Layers that get the same format: what they may get, ascending by bits; the last is usually "as it is" with score 0. */
typedef struct moq_unit {
    const char *name;
    int32_t formats;
    const double *scores;   /* [formats] harm; smaller is better */
    const double *costs;    /* [formats] elements * bits / 16 * weight */
} moq_unit;

typedef enum moq_solve_method {
    MOQ_SOLVE_SUM = 0,      /* the smallest sum of scores within the budget (gradient scores): exact */
    MOQ_SOLVE_THRESHOLD     /* each unit takes its first format with a score of at most t, the t found by bisection (KL scores) */
} moq_solve_method;

typedef struct moq_solve_desc {
    const moq_unit *units;
    size_t count;
    double effective_bits;  /* budget = effective_bits / 16 * uncompressed */
    double uncompressed;    /* sum of elements * weight, units that are not searched included; 0: the largest costs of the units */
    double fixed_cost;      /* cost of what is not searched */
    double lower;           /* smallest cost as a fraction of the budget; 0: none (ModelOpt tries .99, .90, none for active experts) */
    moq_solve_method method;
    moq_allocator allocator;
} moq_solve_desc;

/* choice [count]: index of each unit's format. MOQ_E_CONFIG when no choice fits the budget. *score, *cost may be NULL. */
MOQ_API moq_result moq_solve(const moq_solve_desc *desc, int32_t *choice, double *score, double *cost, moq_error *err);

/* The group that a module belongs to: "P.qkv" for q, k and v of P, "P.gate_up", "P.experts" for all experts of a layer, else its own
   name. Returns the length needed. */
MOQ_API size_t moq_unit_name(const char *module, char *text, size_t capacity);

/* Bits of an element as AutoQuantize counts a recipe; 16 for NULL. */
MOQ_API double moq_recipe_bits(const moq_recipe *recipe);


/* ------------------------------------------------------------------------------------------------
   >>api-export      whole folders: quantize, convert
   ------------------------------------------------------------------------------------------------ */

/* Modules whose name (or `name.weight_quantizer`) matches the pattern take another recipe; "none" leaves them as they are. */
typedef struct moq_rule {
    const char *pattern;
    const char *recipe;
} moq_rule;

/* A float checkpoint folder in, a quantized folder out. Zero-filled fields are defaults. */
typedef struct moq_quantize_desc {
    const char *source;          /* folder; quantized sources (FP8 blocks, MXFP4 ...) are decoded to BF16 first */
    const char *target;          /* folder that does not exist yet */
    const char *recipe;          /* moq_find_recipe's names, or "none" to quantize only the KV cache */
    const char *kv;              /* "fp8", "fp8_affine", "fp8_cast", "nvfp4" ...; NULL or "none": as it is */
    const char *const *exclude;  /* patterns of modules to leave as they are */
    size_t exclude_count;
    const moq_rule *rules;       /* mixed precision: the last rule that matches decides, else `recipe` */
    size_t rule_count;
    const char *calibration;     /* .safetensors with recorded amax and pre_quant_scale values, named as ModelOpt names its quantizers */
    /* Or measure them: runs the samples in `data` on a model of `source` with the backend `watch` (see moq_calibrate). Used when the
       recipe needs statistics and no file is given. */
    moq_result (*calibrate)(void *data, const struct moq_checkpoint *source, struct moq_backend *watch, moq_error *err);
    void *data;
    struct moq_backend *backend; /* runs the model meanwhile; NULL: the CPU */
    const char *save_calibration; /* keep what was measured in this file, weights' amax too; recipes without any (MX) write none; may be NULL */
    const char *format;          /* "modelopt" (also NULL) or "compressed-tensors": the same numbers under its names */
    uint64_t shard_bytes;        /* largest shard; 0: 10 GB */
    int threads;                 /* 0: physical cores */
    moq_progress_fn progress;    /* MOQ_STAGE_QUANTIZE in bytes of the target; a non-zero return cancels */
    void *progress_user;
    moq_log_fn log;
    void *log_user;
    moq_allocator allocator;
} moq_quantize_desc;

/* Writes what ModelOpt would write: same tensor bytes, same JSON. The folder appears under its name only when it is complete, flushed
   and has been opened again and verified; on any failure nothing is left. */
MOQ_API moq_result moq_quantize(const moq_quantize_desc *desc, moq_error *err);

/* A quantized folder in, the same numbers in the other container out. Zero-filled fields are defaults. */
typedef struct moq_convert_desc {
    const char *source;          /* folder of any family that moq_open reads */
    const char *target;          /* folder that does not exist yet */
    const char *to;              /* "modelopt" or "compressed-tensors" */
    const char *recipe;          /* NULL, or "nvfp4": MXFP4 layers become weight-only NVFP4 with the same values; where the exponents of one
                                    layer lie more than 2^17 apart its smallest blocks are rounded, and `log` says how many */
    uint64_t shard_bytes;        /* largest shard; 0: 10 GB */
    uint64_t max_memory;         /* bytes of a band of rows that is repacked at a time; 0: 64 MB */
    int threads;                 /* 0: physical cores */
    moq_progress_fn progress;    /* MOQ_STAGE_QUANTIZE in bytes of the target; a non-zero return cancels */
    void *progress_user;
    moq_log_fn log;
    void *log_user;
    moq_allocator allocator;
} moq_convert_desc;

/* Codes, scales, zero points and KV scales keep their values, so weights dequantize to the same floats. One exception: NVFP4's global
   scale is a multiplier in ModelOpt's folders and a divisor in compressed-tensors', so it becomes its reciprocal; products may then
   differ in their last bit. A layer that the other container cannot hold fails with
   MOQ_E_UNSUPPORTED and is named, before anything is written. The folder appears only when it is complete and has been verified. */
MOQ_API moq_result moq_convert(const moq_convert_desc *desc, moq_error *err);


#endif /* MOQ_QUANTIZE */

#ifdef __cplusplus
}
#endif

/* ================================================================================================
   The public part ends here. What follows is the implementation.
   ================================================================================================ */
#endif /* MODELOPT_Q_H */

#if defined(MODELOPT_Q_IMPLEMENTATION) && !defined(MODELOPT_Q_IMPLEMENTED)
#define MODELOPT_Q_IMPLEMENTED

/* ------------------------------------------------------------------------------------------------
   >>base            results, errors, allocator; checked arithmetic, formatting, arena, hash map, sort
   No OS, no stdio: only this section's includes and pure functions.
   ------------------------------------------------------------------------------------------------ */

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <string.h>

#if defined(MOQ_MALLOC) != defined(MOQ_FREE)
#error "define both MOQ_MALLOC and MOQ_FREE, or none"
#endif
#ifndef MOQ_MALLOC
#include <stdlib.h>
#define MOQ_MALLOC(bytes) malloc(bytes)
#define MOQ_FREE(ptr) free(ptr)
#endif

#ifndef MOQ_ASSERT
#ifdef MOQ_DEBUG
#include <assert.h>
#define MOQ_ASSERT(x) assert(x)
#else
#define MOQ_ASSERT(x) ((void)0)
#endif
#endif

#if defined(__GNUC__)
#define MOQI_UNUSED __attribute__((unused))
#else
#define MOQI_UNUSED
#endif

#define MOQI_COUNT(array) (sizeof(array) / sizeof((array)[0]))

static int64_t moqi_min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t moqi_max(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t moqi_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* a * b and a + b; 0 when the result does not fit 64 bits. */
static int moqi_mul(uint64_t a, uint64_t b, uint64_t *out)
{
    if (b != 0 && a > UINT64_MAX / b) return 0;
    *out = a * b;
    return 1;
}

static int moqi_add(uint64_t a, uint64_t b, uint64_t *out)
{
    if (a > UINT64_MAX - b) return 0;
    *out = a + b;
    return 1;
}

/* Unaligned little-endian loads. */
static uint32_t moqi_load_u32(const void *p)
{
    const uint8_t *b = (const uint8_t *)p;
    return (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

static uint64_t moqi_load_u64(const void *p)
{
    return (uint64_t)moqi_load_u32(p) | (uint64_t)moqi_load_u32((const uint8_t *)p + 4) << 32;
}

/* ---- results ---- */

MOQ_API const char *moq_result_name(moq_result code)
{
    switch ((int)code) {
#define MOQ_X(name, value, text) case value: return "MOQ_" #name;
        MOQ_RESULTS(MOQ_X)
#undef MOQ_X
    default: return "?";
    }
}

MOQ_API const char *moq_result_text(moq_result code)
{
    switch ((int)code) {
#define MOQ_X(name, value, text) case value: return text;
        MOQ_RESULTS(MOQ_X)
#undef MOQ_X
    default: return "?";
    }
}

/* ---- formatting: enough of printf for messages, locale-free, never past `cap` ---- */

typedef struct moqi_text {
    char *at;
    size_t cap;  /* including the NUL */
    size_t need; /* bytes that were asked for, without the NUL */
} moqi_text;

static void moqi_put(moqi_text *t, char c)
{
    size_t i = t->need++;
    if (t->cap > 0 && i < t->cap - 1) t->at[i] = c;
}

static void moqi_puts(moqi_text *t, const char *s, size_t limit)
{
    for (size_t i = 0; i < limit && s[i]; i++) moqi_put(t, s[i]);
}

/* Printable ASCII as it is, the rest escaped; long names are cut. Messages must never carry raw control bytes. */
static void moqi_put_escaped(moqi_text *t, const char *s, size_t limit)
{
    static const char hex[] = "0123456789abcdef";
    for (size_t i = 0; s[i]; i++) {
        unsigned char c = (unsigned char)s[i];
        if (i >= limit) { moqi_puts(t, "...", 3); return; }
        if (c >= 0x20 && c < 0x7f) { moqi_put(t, (char)c); continue; }
        moqi_puts(t, "\\x", 2);
        moqi_put(t, hex[c >> 4]);
        moqi_put(t, hex[c & 15]);
    }
}

static void moqi_put_unsigned(moqi_text *t, uint64_t v, unsigned base, int width, char pad, int negative)
{
    char digits[24];
    int n = 0;
    do { digits[n++] = "0123456789abcdef"[v % base]; v /= base; } while (v);
    if (negative && pad == '0') moqi_put(t, '-');
    for (int i = n + negative; i < width; i++) moqi_put(t, pad);
    if (negative && pad != '0') moqi_put(t, '-');
    while (n > 0) moqi_put(t, digits[--n]);
}

/* %f with `digits` decimals, or %g: the shortest of up to 6 significant digits with an exponent where needed. */
static void moqi_put_double(moqi_text *t, double v, int digits, int general)
{
    if (v != v) { moqi_puts(t, "nan", 3); return; }
    if (v < 0 || (v == 0 && 1 / v < 0)) { moqi_put(t, '-'); v = -v; }
    if (v > 1.7976931348623157e308) { moqi_puts(t, "inf", 3); return; }
    int exponent = 0;
    if (general && v != 0) {
        exponent = (int)floor(log10(v));
        if (v / pow(10.0, exponent) >= 9.999995) exponent++;
        digits = digits ? digits : 6;
        if (exponent < -4 || exponent >= digits) v /= pow(10.0, exponent);
        else { digits = digits - 1 - exponent; exponent = 0; }
        if (exponent) digits--;
    } else if (general) {
        digits = 0;
    }
    double unit = 0.5;
    for (int i = 0; i < digits; i++) unit /= 10;
    v += unit;
    double whole = floor(v), rest = v - whole;
    char tail[40];
    int n = 0;
    for (; n < digits && n < 38; n++) {
        rest *= 10;
        int d = (int)rest;
        tail[n] = (char)('0' + (d > 9 ? 9 : d));
        rest -= d;
    }
    while (general && n > 0 && tail[n - 1] == '0') n--;
    if (whole < 1.8e19) moqi_put_unsigned(t, (uint64_t)whole, 10, 0, ' ', 0);
    else moqi_puts(t, "huge", 4);
    if (n > 0) moqi_put(t, '.');
    for (int i = 0; i < n; i++) moqi_put(t, tail[i]);
    if (exponent) {
        moqi_put(t, 'e');
        moqi_put(t, exponent < 0 ? '-' : '+');
        moqi_put_unsigned(t, (uint64_t)(exponent < 0 ? -exponent : exponent), 10, 2, '0', 0);
    }
}

static int64_t moqi_arg_signed(va_list *args, int size)
{
    if (size == 2) return va_arg(*args, long long);
    if (size == 1) return va_arg(*args, long);
    if (size == 3) return (int64_t)va_arg(*args, size_t);
    return va_arg(*args, int);
}

static uint64_t moqi_arg_unsigned(va_list *args, int size)
{
    if (size == 2) return va_arg(*args, unsigned long long);
    if (size == 1) return va_arg(*args, unsigned long);
    if (size == 3) return va_arg(*args, size_t);
    return va_arg(*args, unsigned);
}

typedef struct moqi_spec { int zero, width, precision, size; } moqi_spec; /* size: 0 int, 1 long, 2 long long, 3 size_t */

static const char *moqi_parse_spec(const char *f, va_list *args, moqi_spec *s)
{
    memset(s, 0, sizeof *s);
    s->precision = -1;
    if (*f == '0') { s->zero = 1; f++; }
    for (; *f >= '0' && *f <= '9'; f++) s->width = s->width * 10 + (*f - '0');
    if (*f == '.') {
        f++;
        if (*f == '*') { s->precision = va_arg(*args, int); f++; }
        else for (s->precision = 0; *f >= '0' && *f <= '9'; f++) s->precision = s->precision * 10 + (*f - '0');
    }
    for (; *f == 'l'; f++) s->size++;
    if (*f == 'z') { s->size = 3; f++; }
    return f;
}

/* %d %i %u %x %c %s %f %g %% with 0, width, .precision, l, ll, z; %q is a %s that is escaped and cut at 120 bytes. */
static void moqi_vformat(moqi_text *t, const char *f, va_list *args)
{
    for (; *f; f++) {
        moqi_spec s;
        if (*f != '%') { moqi_put(t, *f); continue; }
        f = moqi_parse_spec(f + 1, args, &s);
        char pad = s.zero ? '0' : ' ';
        switch (*f) {
        case 'd': case 'i': {
            int64_t v = moqi_arg_signed(args, s.size);
            moqi_put_unsigned(t, v < 0 ? 0 - (uint64_t)v : (uint64_t)v, 10, s.width, pad, v < 0);
            break;
        }
        case 'u': moqi_put_unsigned(t, moqi_arg_unsigned(args, s.size), 10, s.width, pad, 0); break;
        case 'x': moqi_put_unsigned(t, moqi_arg_unsigned(args, s.size), 16, s.width, pad, 0); break;
        case 'c': moqi_put(t, (char)va_arg(*args, int)); break;
        case 's': moqi_puts(t, va_arg(*args, const char *), s.precision < 0 ? SIZE_MAX : (size_t)s.precision); break;
        case 'q': moqi_put_escaped(t, va_arg(*args, const char *), 120); break;
        case 'f': moqi_put_double(t, va_arg(*args, double), s.precision < 0 ? 6 : s.precision, 0); break;
        case 'g': moqi_put_double(t, va_arg(*args, double), s.precision < 0 ? 6 : s.precision, 1); break;
        case '%': moqi_put(t, '%'); break;
        default: MOQ_ASSERT(0); return;
        }
    }
}

static void moqi_text_end(moqi_text *t)
{
    if (t->cap > 0) t->at[t->need < t->cap ? t->need : t->cap - 1] = 0;
}

/* snprintf of the library: the length needed, always terminated. */
static size_t moqi_format(char *text, size_t capacity, const char *format, ...)
{
    moqi_text t = {text, capacity, 0};
    va_list args;
    va_start(args, format);
    moqi_vformat(&t, format, &args);
    va_end(args);
    moqi_text_end(&t);
    return t.need;
}

/* ---- errors ---- */

/* Where something is wrong: file, what kind of thing, its name, the byte. */
typedef struct moqi_where {
    const char *file;   /* base name or NULL */
    const char *kind;   /* "tensor", "key", "layer" or NULL */
    const char *object; /* name or NULL */
    int64_t offset;     /* -1: none */
} moqi_where;

static moqi_where moqi_at(const char *file, const char *kind, const char *object, int64_t offset)
{
    moqi_where w;
    w.file = file;
    w.kind = kind;
    w.object = object;
    w.offset = offset;
    return w;
}

static void moqi_vfail(moq_error *err, moq_result code, moqi_where at, const char *format, va_list *args)
{
    moqi_text t = {err->text, sizeof err->text, 0};
    memset(err, 0, sizeof *err);
    err->code = code;
    err->offset = at.offset;
    if (at.file) moqi_format(err->file, sizeof err->file, "%q", at.file);
    if (at.object) moqi_format(err->object, sizeof err->object, "%q", at.object);
    if (at.file && at.file[0]) { moqi_put_escaped(&t, at.file, 90); moqi_puts(&t, ": ", 2); }
    if (at.kind) moqi_puts(&t, at.kind, 40);
    if (at.kind && at.object) moqi_put(&t, ' ');
    if (at.object) {
        if (at.kind) moqi_put(&t, '\'');
        moqi_put_escaped(&t, at.object, 120);
        if (at.kind) moqi_put(&t, '\'');
    }
    if (at.kind || at.object) moqi_puts(&t, ": ", 2);
    moqi_vformat(&t, format, args);
    moqi_text_end(&t);
}

/* Record an error (err may be NULL) and return its code, so that `return moqi_fail(...)` reads well. */
static moq_result moqi_fail(moq_error *err, moq_result code, moqi_where at, const char *format, ...)
{
    if (err) {
        va_list args;
        va_start(args, format);
        moqi_vfail(err, code, at, format, &args);
        va_end(args);
    }
    return code;
}

MOQ_API moq_result moq_fail(moq_error *err, moq_result code, const char *object, const char *format, ...)
{
    if (err) {
        va_list args;
        va_start(args, format);
        moqi_vfail(err, code, moqi_at(NULL, NULL, object && object[0] ? object : NULL, -1), format, &args);
        va_end(args);
    }
    return code;
}

static moq_result moqi_nomem(moq_error *err, uint64_t bytes)
{
    return moqi_fail(err, MOQ_E_NOMEM, moqi_at(NULL, NULL, NULL, -1), "out of memory: %llu bytes were refused", (unsigned long long)bytes);
}

static void moqi_clear(moq_error *err)
{
    if (err) {
        memset(err, 0, sizeof *err);
        err->offset = -1;
    }
}

/* ---- memory ---- */

#define MOQI_ALIGN 64

/* MOQ_MALLOC promises no alignment: the block's real start is kept in front of the aligned address. */
static void *moqi_default_alloc(size_t bytes)
{
    if (bytes > SIZE_MAX - MOQI_ALIGN - sizeof(void *)) return NULL;
    uint8_t *base = (uint8_t *)MOQ_MALLOC(bytes + MOQI_ALIGN + sizeof(void *));
    if (!base) return NULL;
    uintptr_t at = ((uintptr_t)base + sizeof(void *) + MOQI_ALIGN - 1) & ~(uintptr_t)(MOQI_ALIGN - 1);
    uint8_t *p = base + (at - (uintptr_t)base);
    memcpy(p - sizeof(void *), &base, sizeof(void *));
    return p;
}

MOQ_API void *moq_allocate(const moq_allocator *a, size_t bytes)
{
    void *p = a && a->alloc ? a->alloc(a->user, bytes ? bytes : 1, MOQI_ALIGN) : moqi_default_alloc(bytes ? bytes : 1);
    if (p) memset(p, 0, bytes);
    return p;
}

MOQ_API void moq_release(const moq_allocator *a, void *ptr, size_t bytes)
{
    if (!ptr) return;
    if (a && a->alloc) {
        if (a->release) a->release(a->user, ptr, bytes ? bytes : 1);
        return;
    }
    void *base;
    memcpy(&base, (uint8_t *)ptr - sizeof(void *), sizeof(void *));
    MOQ_FREE(base);
}

/* Arena: everything an object keeps, freed in one call. Memory is zeroed; a failed take leaves the arena usable. */
typedef struct moqi_block {
    struct moqi_block *next;
    size_t bytes, used; /* of the whole block, header included */
} moqi_block;

typedef struct moqi_arena {
    moq_allocator a;
    moqi_block *head;
    size_t next_bytes;
} moqi_arena;

static moqi_arena moqi_arena_make(const moq_allocator *a)
{
    moqi_arena r;
    memset(&r, 0, sizeof r);
    if (a) r.a = *a;
    r.next_bytes = 4096;
    return r;
}

/* NULL when out of memory. align: a power of two up to 64. */
static void *moqi_take(moqi_arena *r, uint64_t bytes, size_t align)
{
    if (bytes > SIZE_MAX / 2) return NULL;
    moqi_block *b = r->head;
    if (b) {
        size_t at = (b->used + align - 1) & ~(align - 1);
        if (at <= b->bytes && bytes <= b->bytes - at) {
            b->used = at + (size_t)bytes;
            return (uint8_t *)b + at;
        }
    }
    size_t header = (sizeof(moqi_block) + MOQI_ALIGN - 1) & ~(size_t)(MOQI_ALIGN - 1);
    size_t total = header + (size_t)bytes;
    if (total < r->next_bytes) total = r->next_bytes;
    b = (moqi_block *)moq_allocate(&r->a, total);
    if (!b) return NULL;
    if (r->next_bytes < ((size_t)1 << 20)) r->next_bytes *= 2;
    b->bytes = total;
    b->used = header + (size_t)bytes;
    b->next = r->head;
    r->head = b;
    return (uint8_t *)b + header;
}

/* count * size bytes, 0 on overflow too. */
MOQI_UNUSED static void *moqi_take_array(moqi_arena *r, uint64_t count, size_t size)
{
    uint64_t bytes;
    return moqi_mul(count, size, &bytes) ? moqi_take(r, bytes, 16) : NULL;
}

static char *moqi_take_text(moqi_arena *r, const char *s, size_t bytes)
{
    char *p = (char *)moqi_take(r, (uint64_t)bytes + 1, 1);
    if (p) memcpy(p, s, bytes);
    return p;
}

static void moqi_arena_drop(moqi_arena *r)
{
    for (moqi_block *b = r->head, *next; b; b = next) {
        next = b->next;
        moq_release(&r->a, b, b->bytes);
    }
    r->head = NULL;
}

/* Growable bytes for texts and lists whose length is not known. */
typedef struct moqi_buffer {
    moq_allocator a;
    uint8_t *data;
    size_t bytes, capacity;
} moqi_buffer;

/* Room for `more` bytes at the end, or NULL; does not change `bytes`. */
static void *moqi_buffer_room(moqi_buffer *b, size_t more)
{
    if (more > SIZE_MAX / 4 || b->bytes > SIZE_MAX / 4) return NULL;
    if (b->capacity - b->bytes < more) {
        size_t want = b->capacity ? b->capacity * 2 : 256;
        while (want < b->bytes + more) want *= 2;
        uint8_t *p = (uint8_t *)moq_allocate(&b->a, want);
        if (!p) return NULL;
        if (b->bytes) memcpy(p, b->data, b->bytes);
        moq_release(&b->a, b->data, b->capacity);
        b->data = p;
        b->capacity = want;
    }
    return b->data + b->bytes;
}

static int moqi_buffer_add(moqi_buffer *b, const void *data, size_t bytes)
{
    void *p = moqi_buffer_room(b, bytes);
    if (!p) return 0;
    if (bytes) memcpy(p, data, bytes);
    b->bytes += bytes;
    return 1;
}

static void moqi_buffer_drop(moqi_buffer *b)
{
    moq_release(&b->a, b->data, b->capacity);
    b->data = NULL;
    b->bytes = b->capacity = 0;
}

/* ---- hash map: borrowed names to indices ---- */

typedef struct moqi_entry { const char *name; uint32_t bytes, value; uint64_t hash; } moqi_entry;

typedef struct moqi_map {
    moqi_entry *entries; /* open addressing, a power of two, at most half full */
    size_t capacity, count;
    uint64_t seed;
} moqi_map;

/* Multiply-and-fold over 8 bytes at a time. Every map starts from a seed of its own, its place in memory, so names cannot be made
   to collide beforehand; maps are never walked through, so the seed shows in no result. */
static uint64_t moqi_mix(uint64_t a, uint64_t b)
{
    uint64_t lo = (a & 0xffffffffu) * (b & 0xffffffffu), hi = (a >> 32) * (b >> 32);
    uint64_t m1 = (a >> 32) * (b & 0xffffffffu), m2 = (a & 0xffffffffu) * (b >> 32);
    return (lo + (m1 << 32) + (m2 << 32)) ^ (hi + (m1 >> 32) + (m2 >> 32));
}

static uint64_t moqi_hash(uint64_t seed, const char *s, size_t n)
{
    uint64_t h = (seed ^ 0x2545f4914f6cdd1du) * (2 * (uint64_t)n + 1);
    for (; n >= 8; s += 8, n -= 8) h = moqi_mix(h ^ moqi_load_u64(s), 0xbf58476d1ce4e5b9u);
    uint64_t last = 0;
    for (size_t i = 0; i < n; i++) last |= (uint64_t)(uint8_t)s[i] << (8 * i);
    h = moqi_mix(h ^ last, 0x94d049bb133111ebu);
    return moqi_mix(h, h ^ 0xd6e8feb86659fd93u) ^ h >> 29;
}

/* Room for `count` names; 0 when out of memory. */
static int moqi_map_make(moqi_map *m, moqi_arena *r, size_t count)
{
    size_t capacity = 16;
    while (capacity < count * 2) capacity *= 2;
    m->entries = (moqi_entry *)moqi_take_array(r, capacity, sizeof(moqi_entry));
    m->capacity = m->entries ? capacity : 0;
    m->count = 0;
    m->seed = moqi_mix((uint64_t)(uintptr_t)m->entries | 1, 0x9e3779b97f4a7c15u);
    return m->entries != NULL;
}

static moqi_entry *moqi_map_slot(const moqi_map *m, const char *name, size_t bytes, uint64_t hash)
{
    size_t i = (size_t)hash & (m->capacity - 1);
    while (m->entries[i].name) {
        moqi_entry *e = &m->entries[i];
        if (e->hash == hash && e->bytes == bytes && memcmp(e->name, name, bytes) == 0) break;
        i = (i + 1) & (m->capacity - 1);
    }
    return &m->entries[i];
}

/* The entry of a name, or NULL. */
static const moqi_entry *moqi_map_find(const moqi_map *m, const char *name, size_t bytes)
{
    if (m->capacity == 0) return NULL;
    const moqi_entry *e = moqi_map_slot(m, name, bytes, moqi_hash(m->seed, name, bytes));
    return e->name ? e : NULL;
}

/* Adds a name that must outlive the map; returns the entry already there, or NULL when it was new. */
static const moqi_entry *moqi_map_add(moqi_map *m, const char *name, size_t bytes, uint32_t value)
{
    uint64_t hash = moqi_hash(m->seed, name, bytes);
    moqi_entry *e = moqi_map_slot(m, name, bytes, hash);
    if (e->name) return e;
    MOQ_ASSERT(m->count < m->capacity / 2 + 1);
    e->name = name;
    e->bytes = (uint32_t)bytes;
    e->value = value;
    e->hash = hash;
    m->count++;
    return NULL;
}

/* ---- sort: merge sort of pointers, stable, n log n for every input ---- */

typedef int (*moqi_compare_fn)(const void *a, const void *b);

static void moqi_sort(const void **items, const void **scratch, size_t n, moqi_compare_fn compare)
{
    const void **from = items, **to = scratch;
    for (size_t width = 1; width < n; width *= 2) {
        for (size_t lo = 0; lo < n; lo += 2 * width) {
            size_t mid = lo + width < n ? lo + width : n, hi = lo + 2 * width < n ? lo + 2 * width : n;
            size_t i = lo, j = mid;
            for (size_t k = lo; k < hi; k++)
                to[k] = i < mid && (j >= hi || compare(from[i], from[j]) <= 0) ? from[i++] : from[j++];
        }
        const void **t = from;
        from = to;
        to = t;
    }
    if (from != items && n) memcpy((void *)items, (const void *)from, n * sizeof *items);
}

/* ---- small helpers over text ---- */

static int moqi_starts(const char *s, const char *prefix) { return strncmp(s, prefix, strlen(prefix)) == 0; }

static int moqi_ends(const char *s, const char *suffix)
{
    size_t n = strlen(s), m = strlen(suffix);
    return n >= m && memcmp(s + n - m, suffix, m) == 0;
}

static char moqi_lower(char c) { return c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c; }

/* Equal without regard to ASCII case. */
static int moqi_same(const char *a, const char *b)
{
    for (; *a && moqi_lower(*a) == moqi_lower(*b); a++, b++) {}
    return *a == 0 && *b == 0;
}

static void moqi_log(const moq_open_desc *d, moq_log_level level, moq_result code, moqi_where at, const char *format, ...)
{
    if (!d || !d->log) return;
    moq_error e;
    va_list args;
    va_start(args, format);
    moqi_vfail(&e, code, at, format, &args);
    va_end(args);
    d->log(d->log_user, level, code, e.text);
}

/* Parsing and binding run once per folder: compiled for size, which also halves the time to compile them. */
#if defined(__clang__)
#define MOQI_COLD_BEGIN _Pragma("clang attribute push(__attribute__((minsize)), apply_to = function)")
#define MOQI_COLD_END _Pragma("clang attribute pop")
#elif defined(__GNUC__)
#define MOQI_COLD_BEGIN _Pragma("GCC push_options") _Pragma("GCC optimize(\"O1\")")
#define MOQI_COLD_END _Pragma("GCC pop_options")
#else
#define MOQI_COLD_BEGIN
#define MOQI_COLD_END
#endif

MOQI_COLD_BEGIN

/* ------------------------------------------------------------------------------------------------
   >>os              files, mapping, clock
   With >>threads the only place that touches the system. Every failure names the file, the system's number and a remedy;
   nothing stays open after one, and an existing file is never left half written.
   ------------------------------------------------------------------------------------------------ */

/* Two ways to hold a file's bytes, because both are needed: a mapping costs no memory and no time however large the
   file is, but its pages vanish with a truncation; a copy is safe and slow. Headers and JSON are always copied by their
   readers, so a file that changes while it is mapped can spoil numbers, never sizes or pointers. */
/* Bytes of one file: mapped, read into memory, or the caller's. data is never NULL after success. */
typedef struct moqi_blob {
    const uint8_t *data;
    uint64_t bytes;
    void *map;           /* start of the mapping or of the owned memory */
    size_t held;         /* bytes of it, for the release */
    uint8_t mapped, owned;
} moqi_blob;

/* The writer promises: after a crash or an error at any point the target is its old self or the whole new file; a
   failure leaves no temporary file; equal calls write equal bytes. Space is not asked for in advance, since systems do
   not agree on how: a full disk shows as a failing write, which is as harmless. */
/* A file being written under a temporary name in the folder of its target. */
typedef struct moqi_writer {
    intptr_t file;       /* descriptor or HANDLE; -1: none */
    char path[4096], temp[4096 + 40];
} moqi_writer;

enum { MOQI_NOTHING = 0, MOQI_IS_FILE, MOQI_IS_DIR, MOQI_IS_OTHER }; /* what a path leads to */

/* What stands after the last separator; messages show only that, so that they are the same on every machine and
   do not tell where a user keeps files. A trailing separator belongs to the name before it. */
static const char *moqi_base_name(const char *path)
{
    const char *base = path;
    for (; *path; path++)
        if ((*path == '/' || *path == '\\') && path[1]) base = path + 1;
    return base;
}

/* ---- the system calls, one small set per system ---- */

/* Both systems fill the same set, so that everything below is written once:
       moqi_path_kind                      what a path leads to, links followed
       moqi_sys_open, _create, _close      a handle, or -1 and moqi_os_code()
       moqi_sys_size, _read, _write        from the handle, never from the path: a path may be replaced meanwhile
       moqi_sys_flush, _flush_dir          contents to the disk, then the folder that holds the name
       moqi_sys_map, _unmap                read-only view of a whole file
       moqi_sys_rename, _remove            replace a name, delete a name
       moqi_dir_open, _next, _close        names in a folder, any order
   read and write move at most 1 GB a call, since larger counts fail on some systems. */
#if defined(MOQ_NO_OS)

/* nothing: the functions below say MOQ_E_UNSUPPORTED */

#elif defined(_WIN32)

#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>

#define MOQI_WIDE_PATH 4096

/* Call at once after a failure: the next system call may overwrite it. */
static int moqi_os_code(void) { return (int)GetLastError(); }

/* UTF-8 path to what the system takes: absolute with the \\?\ prefix, so that more than 260 characters work. */
static int moqi_wide(const char *path, wchar_t *out)
{
    wchar_t plain[MOQI_WIDE_PATH];
    int n = MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, plain, MOQI_WIDE_PATH);
    if (n <= 0) return 0;
    if (n < 240) { memcpy(out, plain, (size_t)n * sizeof *out); return 1; }
    memcpy(out, L"\\\\?\\", 4 * sizeof *out);
    DWORD got = GetFullPathNameW(plain, MOQI_WIDE_PATH - 4, out + 4, NULL);
    return got > 0 && got < MOQI_WIDE_PATH - 4;
}

/* Links and junctions are followed by the attributes of their target when the file is opened, not here. */
static int moqi_path_kind(const char *path)
{
    wchar_t wide[MOQI_WIDE_PATH];
    if (!moqi_wide(path, wide)) return MOQI_NOTHING;
    DWORD a = GetFileAttributesW(wide);
    if (a == INVALID_FILE_ATTRIBUTES) return MOQI_NOTHING;
    return a & FILE_ATTRIBUTE_DIRECTORY ? MOQI_IS_DIR : a & FILE_ATTRIBUTE_DEVICE ? MOQI_IS_OTHER : MOQI_IS_FILE;
}

/* FILE_SHARE_DELETE: another program may replace the file by renaming while we read, as on POSIX. */
static intptr_t moqi_sys_open(const char *path)
{
    wchar_t wide[MOQI_WIDE_PATH];
    if (!moqi_wide(path, wide)) { SetLastError(ERROR_INVALID_NAME); return -1; }
    HANDLE h = CreateFileW(wide, GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_DELETE, NULL, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, NULL);
    if (h != INVALID_HANDLE_VALUE && GetFileType(h) != FILE_TYPE_DISK) {
        CloseHandle(h);
        SetLastError(ERROR_BAD_FILE_TYPE);
        return -1;
    }
    return (intptr_t)h;
}

/* Rights come from the folder; share mode 0 keeps others away from a half-written file. */
static intptr_t moqi_sys_create(const char *temp, const char *target)
{
    wchar_t wide[MOQI_WIDE_PATH];
    (void)target;
    if (!moqi_wide(temp, wide)) { SetLastError(ERROR_INVALID_NAME); return -1; }
    return (intptr_t)CreateFileW(wide, GENERIC_WRITE, 0, NULL, CREATE_NEW, FILE_ATTRIBUTE_NORMAL, NULL);
}

static void moqi_sys_close(intptr_t file) { CloseHandle((HANDLE)file); }

static int moqi_sys_size(intptr_t file, uint64_t *bytes)
{
    LARGE_INTEGER n;
    if (!GetFileSizeEx((HANDLE)file, &n)) return 0;
    *bytes = (uint64_t)n.QuadPart;
    return 1;
}

static int64_t moqi_sys_read(intptr_t file, void *to, size_t bytes)
{
    DWORD got = 0;
    return ReadFile((HANDLE)file, to, (DWORD)moqi_min((int64_t)bytes, 1 << 30), &got, NULL) ? (int64_t)got : -1;
}

static int64_t moqi_sys_write(intptr_t file, const void *from, size_t bytes)
{
    DWORD put = 0;
    return WriteFile((HANDLE)file, from, (DWORD)moqi_min((int64_t)bytes, 1 << 30), &put, NULL) ? (int64_t)put : -1;
}

static int moqi_sys_flush(intptr_t file) { return FlushFileBuffers((HANDLE)file) != 0; }
static void moqi_sys_flush_dir(const char *path) { (void)path; }

/* Windows refuses to truncate a mapped file, so a view cannot lose its pages later. */
static void *moqi_sys_map(intptr_t file, size_t bytes)
{
    HANDLE m = CreateFileMappingW((HANDLE)file, NULL, PAGE_READONLY, 0, 0, NULL);
    void *p = m ? MapViewOfFile(m, FILE_MAP_READ, 0, 0, bytes) : NULL;
    if (m) CloseHandle(m); /* the view keeps the mapping alive */
    return p;
}

static void moqi_sys_unmap(void *map, size_t bytes) { (void)bytes; UnmapViewOfFile(map); }

/* Fails while the target is mapped, with ERROR_USER_MAPPED_FILE: nothing is written then, and the message says so. */
static int moqi_sys_rename(const char *from, const char *to)
{
    wchar_t a[MOQI_WIDE_PATH], b[MOQI_WIDE_PATH];
    return moqi_wide(from, a) && moqi_wide(to, b) && MoveFileExW(a, b, MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH);
}

static void moqi_sys_remove(const char *path)
{
    wchar_t wide[MOQI_WIDE_PATH];
    if (moqi_wide(path, wide)) DeleteFileW(wide);
}

static unsigned moqi_sys_process(void) { return (unsigned)GetCurrentProcessId(); }

static int moqi_os_missing(int code) { return code == ERROR_FILE_NOT_FOUND || code == ERROR_PATH_NOT_FOUND; }

/* FormatMessage speaks the user's language, and messages here are ASCII. */
static const char *moqi_os_text(int code)
{
    static const struct { int code; const char *text; } table[] = {
        {ERROR_ACCESS_DENIED, "access denied"}, {ERROR_SHARING_VIOLATION, "another program or a mapped checkpoint holds it; close that first"},
        {ERROR_USER_MAPPED_FILE, "it is mapped; close the checkpoint first"}, {ERROR_DISK_FULL, "no space left"},
        {ERROR_INVALID_NAME, "not a valid path"}, {ERROR_BAD_FILE_TYPE, "not a regular file"}, {ERROR_TOO_MANY_OPEN_FILES, "too many open files"},
    };
    for (size_t i = 0; i < MOQI_COUNT(table); i++)
        if (table[i].code == code) return table[i].text;
    return "system error";
}

/* A folder being listed. The first name comes from opening it; names that are no valid UTF-16 are left out. */
typedef struct moqi_dir { HANDLE find; int first; WIN32_FIND_DATAW data; char name[1024]; } moqi_dir;

static int moqi_dir_open(moqi_dir *d, const char *path)
{
    wchar_t wide[MOQI_WIDE_PATH];
    char pattern[4096];
    if (moqi_format(pattern, sizeof pattern, "%s\\*", path) >= sizeof pattern || !moqi_wide(pattern, wide)) return 0;
    d->find = FindFirstFileW(wide, &d->data);
    d->first = 1;
    return d->find != INVALID_HANDLE_VALUE;
}

static const char *moqi_dir_next(moqi_dir *d)
{
    while (d->first || FindNextFileW(d->find, &d->data)) {
        d->first = 0;
        if (WideCharToMultiByte(CP_UTF8, 0, d->data.cFileName, -1, d->name, (int)sizeof d->name, NULL, NULL) > 0) return d->name;
    }
    return NULL;
}

static void moqi_dir_close(moqi_dir *d) { FindClose(d->find); }

#else /* POSIX */

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
#ifndef MOQ_NO_THREADS
#include <pthread.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

/* With -std=c99 the C library hides these, and a header comes too late to ask for them. The declarations are POSIX's. */
#if defined(__linux__) && !defined(__cplusplus)
extern int fsync(int fd);
extern int clock_gettime(clockid_t id, struct timespec *t);
#endif
#ifdef CLOCK_MONOTONIC
#define MOQI_CLOCK CLOCK_MONOTONIC
#else
#define MOQI_CLOCK 1
#endif

static int moqi_os_code(void) { return errno; }

/* stat, not lstat: hub caches keep checkpoints as links to blobs, and only the final target matters. */
static int moqi_path_kind(const char *path)
{
    struct stat st;
    if (stat(path, &st) != 0) return MOQI_NOTHING;
    return S_ISREG(st.st_mode) ? MOQI_IS_FILE : S_ISDIR(st.st_mode) ? MOQI_IS_DIR : MOQI_IS_OTHER;
}

/* O_NONBLOCK: if a FIFO took the file's place after the check above, opening it still returns. */
/* FD_CLOEXEC after the fact, since O_CLOEXEC is hidden by -std=c99: a child started by the host in between would
   inherit a read-only handle, which harms nobody. */
static intptr_t moqi_sys_open(const char *path)
{
    int fd;
    do fd = open(path, O_RDONLY | O_NONBLOCK); while (fd < 0 && errno == EINTR);
    if (fd < 0) return -1;
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    struct stat st;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) return fd;
    close(fd);
    errno = EISDIR;
    return -1;
}

/* A new file; it takes the mode bits of an existing target, else what the umask leaves. */
static intptr_t moqi_sys_create(const char *temp, const char *target)
{
    struct stat st;
    int fd = open(temp, O_WRONLY | O_CREAT | O_EXCL, 0666);
    if (fd < 0) return -1;
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    if (stat(target, &st) == 0 && chmod(temp, st.st_mode & 0777) != 0) {
        int code = errno;
        close(fd);
        unlink(temp);
        errno = code;
        return -1;
    }
    return fd;
}

static void moqi_sys_close(intptr_t file) { close((int)file); }

static int moqi_sys_size(intptr_t file, uint64_t *bytes)
{
    struct stat st;
    if (fstat((int)file, &st) != 0 || st.st_size < 0) return 0;
    *bytes = (uint64_t)st.st_size;
    return 1;
}

/* A signal of the host may interrupt any of these calls; that is no failure. 0 is the end of the file. */
static int64_t moqi_sys_read(intptr_t file, void *to, size_t bytes)
{
    ssize_t n;
    do n = read((int)file, to, (size_t)moqi_min((int64_t)bytes, 1 << 30)); while (n < 0 && errno == EINTR);
    return n;
}

static int64_t moqi_sys_write(intptr_t file, const void *from, size_t bytes)
{
    ssize_t n;
    do n = write((int)file, from, (size_t)moqi_min((int64_t)bytes, 1 << 30)); while (n < 0 && errno == EINTR);
    return n;
}

/* Until here a write error may still be hidden in the cache, so the result matters as much as that of write. */
static int moqi_sys_flush(intptr_t file)
{
    int r;
    do r = fsync((int)file); while (r != 0 && errno == EINTR);
    return r == 0;
}

/* The name is in the folder's own data. Not every file system can flush a folder; then the rename is still atomic. */
static void moqi_sys_flush_dir(const char *path)
{
    char folder[4096];
    size_t n = (size_t)(moqi_base_name(path) - path);
    if (n >= sizeof folder) return;
    memcpy(folder, path, n);
    folder[n] = 0;
    int fd = open(n ? folder : ".", O_RDONLY);
    if (fd < 0) return;
    fsync(fd);
    close(fd);
}

/* MAP_PRIVATE and PROT_READ: nothing in this library can write into a checkpoint through its mapping. A file that is
   truncated later raises SIGBUS when its lost pages are read; callers who must survive that ask for MOQ_OPEN_READ. */
static void *moqi_sys_map(intptr_t file, size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, (int)file, 0);
    return p == MAP_FAILED ? NULL : p;
}

static void moqi_sys_unmap(void *map, size_t bytes) { munmap(map, bytes); }
static int moqi_sys_rename(const char *from, const char *to) { return rename(from, to) == 0; }
static void moqi_sys_remove(const char *path) { unlink(path); }
static unsigned moqi_sys_process(void) { return (unsigned)getpid(); }

static int moqi_os_missing(int code) { return code == ENOENT || code == ENOTDIR; }

/* strerror follows the locale and is not thread-safe everywhere. */
static const char *moqi_os_text(int code)
{
    static const struct { int code; const char *text; } table[] = {
        {EACCES, "permission denied"}, {EPERM, "not permitted"}, {EISDIR, "not a regular file"}, {EIO, "input/output error"},
        {EMFILE, "too many open files"}, {ENFILE, "too many open files in the system"}, {ENOMEM, "out of memory"},
        {ENOSPC, "no space left on the device"}, {EROFS, "read-only file system"}, {EXDEV, "target is on another device"},
        {ENAMETOOLONG, "name too long"}, {ELOOP, "too many symbolic links"}, {EFBIG, "file too large"}, {EBUSY, "busy"}, {EEXIST, "exists already"},
        {ENOENT, "no such file or folder"}, {ENOTDIR, "a part of the path is no folder"},
    };
    for (size_t i = 0; i < MOQI_COUNT(table); i++)
        if (table[i].code == code) return table[i].text;
    return "system error";
}

/* A folder being listed. Names come in any order and with . and .. among them. */
typedef struct moqi_dir { DIR *dir; } moqi_dir;

static int moqi_dir_open(moqi_dir *d, const char *path)
{
    d->dir = opendir(path);
    return d->dir != NULL;
}

static const char *moqi_dir_next(moqi_dir *d)
{
    struct dirent *e = readdir(d->dir);
    return e ? e->d_name : NULL;
}

static void moqi_dir_close(moqi_dir *d) { closedir(d->dir); }

#endif

/* ---- files ---- */

#ifdef MOQ_NO_OS

/* The same names without files, so that the sections above compile unchanged. */
static moq_result moqi_no_os(const char *path, moq_error *err)
{
    return moqi_fail(err, MOQ_E_UNSUPPORTED, moqi_at(moqi_base_name(path), NULL, NULL, -1),
                     "compiled with MOQ_NO_OS: there are no files; use moq_open_memory");
}

MOQI_UNUSED static int moqi_is_dir(const char *path) { (void)path; return 0; }
MOQI_UNUSED static int moqi_file_exists(const char *path) { (void)path; return 0; }

MOQI_UNUSED static moq_result moqi_blob_open(moqi_blob *out, const char *path, const char *base_name, int read_all,
                                             const moq_allocator *a, moq_error *err)
{
    (void)base_name; (void)read_all; (void)a;
    memset(out, 0, sizeof *out);
    return moqi_no_os(path, err);
}

MOQI_UNUSED static void moqi_blob_close(moqi_blob *b, const moq_allocator *a) { (void)a; memset(b, 0, sizeof *b); }

MOQI_UNUSED static moq_result moqi_list_dir(const char *path, moqi_arena *r, const char ***names, size_t *count, moq_error *err)
{
    (void)r;
    *names = NULL;
    *count = 0;
    return moqi_no_os(path, err);
}

static moq_result moqi_writer_open(moqi_writer *w, const char *path, moq_error *err)
{
    memset(w, 0, sizeof *w);
    w->file = -1;
    return moqi_no_os(path, err);
}

static moq_result moqi_writer_put(moqi_writer *w, const void *data, size_t bytes, moq_error *err)
{
    (void)data; (void)bytes;
    return moqi_no_os(w->path, err);
}

static moq_result moqi_writer_commit(moqi_writer *w, moq_error *err) { return moqi_no_os(w->path, err); }
MOQI_UNUSED static void moqi_writer_abort(moqi_writer *w) { (void)w; }

#else

/* A failed system call as an error: absent is E_NOTFOUND, all else E_IO, always with the system's own number. */
static moq_result moqi_fail_os(moq_error *err, const char *base_name, const char *what, int code)
{
    moq_result r = moqi_os_missing(code) ? MOQ_E_NOTFOUND : MOQ_E_IO;
    moqi_fail(err, r, moqi_at(base_name, NULL, NULL, -1), "%s: %s (system error %d)", what, moqi_os_text(code), code);
    if (err) err->os_code = code;
    return r;
}

/* Links are followed. A wrong answer is harmless: whoever opens the path checks again on the open handle. */
MOQI_UNUSED static int moqi_is_dir(const char *path) { return moqi_path_kind(path) == MOQI_IS_DIR; }
MOQI_UNUSED static int moqi_file_exists(const char *path) { return moqi_path_kind(path) == MOQI_IS_FILE; }

/* A regular file and its size. The kind is asked before opening: opening a device or a FIFO can have effects. */
static moq_result moqi_file_open(const char *path, const char *base_name, intptr_t *file, uint64_t *bytes, moq_error *err)
{
    int kind = moqi_path_kind(path);
    *file = -1;
    if (kind == MOQI_IS_DIR || kind == MOQI_IS_OTHER)
        return moqi_fail(err, MOQ_E_IO, moqi_at(base_name, NULL, NULL, -1), "is %s; expected a regular file",
                         kind == MOQI_IS_DIR ? "a folder" : "a device or a pipe");
    *file = moqi_sys_open(path);
    if (*file == -1) return moqi_fail_os(err, base_name, "cannot be opened", moqi_os_code());
    if (moqi_sys_size(*file, bytes)) return MOQ_OK;
    int code = moqi_os_code();
    moqi_sys_close(*file);
    *file = -1;
    return moqi_fail_os(err, base_name, "its size cannot be read", code);
}

/* Exactly `bytes` bytes. Short reads go on, end of file before that is a file that shrank since its size was taken. */
static moq_result moqi_file_fill(intptr_t file, const char *base_name, uint8_t *to, size_t bytes, moq_error *err)
{
    size_t done = 0;
    while (done < bytes) {
        int64_t n = moqi_sys_read(file, to + done, bytes - done);
        if (n < 0) return moqi_fail_os(err, base_name, "cannot be read", moqi_os_code());
        if (n == 0)
            return moqi_fail(err, MOQ_E_TRUNCATED, moqi_at(base_name, NULL, NULL, (int64_t)done),
                             "ended after %zu of %zu bytes: it shrank while being read; try again", done, bytes);
        done += (size_t)n;
    }
    return MOQ_OK;
}

/* The size is asked again after mapping: pages past the end of a file that shrank meanwhile must not be touched. */
static moq_result moqi_blob_load(moqi_blob *out, intptr_t file, const char *base_name, int read_all, const moq_allocator *a, moq_error *err)
{
    uint64_t again = 0;
    size_t bytes = (size_t)out->bytes;
    void *map = read_all ? NULL : moqi_sys_map(file, bytes);
    out->held = bytes;
    if (map) {
        out->map = map;
        out->mapped = 1;
    } else {
        out->map = moq_allocate(a, bytes);
        if (!out->map) return moqi_nomem(err, bytes);
        out->owned = 1;
        moq_result e = moqi_file_fill(file, base_name, (uint8_t *)out->map, bytes, err);
        if (e != MOQ_OK) return e;
    }
    out->data = (const uint8_t *)out->map;
    if (!moqi_sys_size(file, &again)) return moqi_fail_os(err, base_name, "its size cannot be read", moqi_os_code());
    if (again >= out->bytes) return MOQ_OK;
    return moqi_fail(err, MOQ_E_TRUNCATED, moqi_at(base_name, NULL, NULL, (int64_t)again),
                     "shrank from %llu to %llu bytes while being opened; try again", (unsigned long long)out->bytes, (unsigned long long)again);
}

/* `a` is the allocator that opened it. Twice is harmless. */
MOQI_UNUSED static void moqi_blob_close(moqi_blob *b, const moq_allocator *a)
{
    if (b->mapped) moqi_sys_unmap(b->map, b->held);
    if (b->owned) moq_release(a, b->map, b->held);
    memset(b, 0, sizeof *b);
}

/* Map a file, or read it when `read_all` is set or mapping fails. *out is empty after a failure. */
MOQI_UNUSED static moq_result moqi_blob_open(moqi_blob *out, const char *path, const char *base_name, int read_all,
                                             const moq_allocator *a, moq_error *err)
{
    /* mmap refuses zero bytes, and callers want a pointer that they may compare and add to. */
    static const uint8_t nothing[1] = {0};
    intptr_t file;
    memset(out, 0, sizeof *out);
    if (!base_name) base_name = moqi_base_name(path);
    moq_result e = moqi_file_open(path, base_name, &file, &out->bytes, err);
    if (e != MOQ_OK) return e;
    out->data = nothing;
    if (out->bytes > SIZE_MAX / 2)
        e = moqi_fail(err, MOQ_E_OVERFLOW, moqi_at(base_name, NULL, NULL, -1), "%llu bytes do not fit the address space of this program",
                      (unsigned long long)out->bytes);
    else if (out->bytes > 0)
        e = moqi_blob_load(out, file, base_name, read_all, a, err);
    moqi_sys_close(file);
    if (e != MOQ_OK) moqi_blob_close(out, a);
    return e;
}

/* Bytewise: the order must not depend on the host's locale. */
static int moqi_compare_names(const void *a, const void *b) { return strcmp((const char *)a, (const char *)b); }

/* The list grows by doubling inside the arena; the upper half of each list is the scratch space of the sort. */
static moq_result moqi_dir_collect(moqi_dir *d, moqi_arena *r, const char ***names, size_t *count)
{
    const void **list = NULL;
    size_t n = 0, capacity = 0;
    for (const char *s = moqi_dir_next(d); s; s = moqi_dir_next(d)) {
        if (strcmp(s, ".") == 0 || strcmp(s, "..") == 0) continue;
        if (n == capacity) {
            const void **more = (const void **)moqi_take_array(r, (capacity = capacity ? capacity * 2 : 64), 2 * sizeof *more);
            if (!more) return MOQ_E_NOMEM;
            if (n) memcpy((void *)more, (const void *)list, n * sizeof *more);
            list = more;
        }
        list[n] = moqi_take_text(r, s, strlen(s));
        if (!list[n++]) return MOQ_E_NOMEM;
    }
    if (n) moqi_sort(list, list + capacity, n, moqi_compare_names);
    *names = (const char **)list;
    *count = n;
    return MOQ_OK;
}

/* Names of everything in a folder but . and .., sorted bytewise, owned by the arena. */
MOQI_UNUSED static moq_result moqi_list_dir(const char *path, moqi_arena *r, const char ***names, size_t *count, moq_error *err)
{
    moqi_dir d;
    *names = NULL;
    *count = 0;
    if (!moqi_dir_open(&d, path)) return moqi_fail_os(err, moqi_base_name(path), "folder cannot be listed", moqi_os_code());
    moq_result e = moqi_dir_collect(&d, r, names, count);
    moqi_dir_close(&d);
    return e == MOQ_OK ? e : moqi_nomem(err, 4096);
}

/* ---- atomic writing: temporary file, flush, rename, flush of the folder ---- */

/* The temporary name carries the process number and a counter, and must be new: two writers of one target never
   share it. It lies in the same folder, because a rename is atomic only inside one file system. */
static moq_result moqi_writer_open(moqi_writer *w, const char *path, moq_error *err)
{
    const char *base = moqi_base_name(path);
    int code = 0;
    w->file = -1;
    if (moqi_format(w->path, sizeof w->path, "%s", path) >= sizeof w->path)
        return moqi_fail(err, MOQ_E_ARG, moqi_at(base, NULL, NULL, -1), "path longer than %zu bytes", sizeof w->path - 1);
    /* Said before anything is written: the rename at the end would fail only after all the work. */
    if (moqi_path_kind(path) == MOQI_IS_DIR)
        return moqi_fail(err, MOQ_E_IO, moqi_at(base, NULL, NULL, -1), "is a folder; a file of that name cannot be written");
    if (moqi_path_kind(path) == MOQI_IS_OTHER) /* the rename would put a file in the place of /dev/full */
        return moqi_fail(err, MOQ_E_IO, moqi_at(base, NULL, NULL, -1), "is a device or a pipe; name a file");
    for (unsigned i = 0; i < 100 && w->file == -1; i++) { /* another writer of the same target may hold a name */
        moqi_format(w->temp, sizeof w->temp, "%s.tmp-%u-%u", path, moqi_sys_process(), i);
        w->file = moqi_sys_create(w->temp, path);
        code = w->file == -1 ? moqi_os_code() : 0;
        if (w->file == -1 && moqi_path_kind(w->temp) == MOQI_NOTHING) break;
    }
    return w->file == -1 ? moqi_fail_os(err, base, "a temporary file beside it cannot be created", code) : MOQ_OK;
}

/* Gives up: the target stays as it was. Harmless after a commit or a failure. */
static void moqi_writer_abort(moqi_writer *w)
{
    if (w->file == -1) return;
    moqi_sys_close(w->file);
    moqi_sys_remove(w->temp);
    w->file = -1;
}

/* The code is taken first: closing and removing may change it. */
static moq_result moqi_writer_give_up(moqi_writer *w, const char *what, moq_error *err)
{
    int code = moqi_os_code();
    moqi_writer_abort(w);
    return moqi_fail_os(err, moqi_base_name(w->path), what, code);
}

/* After a failure the writer is closed and the temporary file gone, so a full disk is given its space back. */
static moq_result moqi_writer_put(moqi_writer *w, const void *data, size_t bytes, moq_error *err)
{
    const uint8_t *p = (const uint8_t *)data;
    while (bytes > 0) {
        int64_t n = moqi_sys_write(w->file, p, bytes);
        if (n <= 0) return moqi_writer_give_up(w, "cannot be written; the target is unchanged", err);
        p += n;
        bytes -= (size_t)n;
    }
    return MOQ_OK;
}

/* The order matters for a crash at any point: contents on the disk, then the name, then the folder that holds it.
   Without the first flush a rename could survive with an empty file behind it. */
static moq_result moqi_writer_commit(moqi_writer *w, moq_error *err)
{
    if (!moqi_sys_flush(w->file)) return moqi_writer_give_up(w, "cannot be flushed; the target is unchanged", err);
    moqi_sys_close(w->file);
    w->file = -1;
    if (!moqi_sys_rename(w->temp, w->path)) {
        int code = moqi_os_code();
        moqi_sys_remove(w->temp);
        return moqi_fail_os(err, moqi_base_name(w->path), "the finished temporary file cannot be renamed to it", code);
    }
    moqi_sys_flush_dir(w->path);
    return MOQ_OK;
}

#endif

/* ---- clock ---- */

/* A wall clock may jump when the system sets it; this one only runs forward. */
MOQ_API double moq_seconds(void)
{
#if defined(MOQ_NO_OS)
    return 0;
#elif defined(_WIN32)
    LARGE_INTEGER now, frequency;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&frequency);
    return (double)now.QuadPart / (double)frequency.QuadPart;
#else
    struct timespec t;
    return clock_gettime(MOQI_CLOCK, &t) == 0 ? (double)t.tv_sec + (double)t.tv_nsec * 1e-9 : 0;
#endif
}

/* ---- whole files ---- */

/* For text: one byte more than the file, NUL, so that parsers and messages may treat it as a string. The limit is
   checked before memory is asked for: a wrong file of 100 GB costs nothing. */
MOQ_API char *moq_read_file(const char *path, uint64_t limit, const moq_allocator *a, size_t *bytes, moq_error *err)
{
    size_t ignored;
    if (!bytes) bytes = &ignored;
    *bytes = 0;
    moqi_clear(err);
    if (!path) { moqi_fail(err, MOQ_E_ARG, moqi_at(NULL, NULL, NULL, -1), "moq_read_file: path is NULL"); return NULL; }
#ifdef MOQ_NO_OS
    (void)limit; (void)a;
    moqi_no_os(path, err);
    return NULL;
#else
    const char *base = moqi_base_name(path);
    intptr_t file;
    uint64_t size = 0;
    if (moqi_file_open(path, base, &file, &size, err) != MOQ_OK) return NULL;
    char *text = NULL;
    if (size > limit || size > SIZE_MAX / 2)
        moqi_fail(err, MOQ_E_LIMIT, moqi_at(base, NULL, NULL, -1),
                  "%llu bytes, the limit for such a file is %llu; raise the MOQ_MAX_ macro if you trust it",
                  (unsigned long long)size, (unsigned long long)limit);
    else if (!(text = (char *)moq_allocate(a, (size_t)size + 1)))
        moqi_nomem(err, size + 1);
    else if (moqi_file_fill(file, base, (uint8_t *)text, (size_t)size, err) != MOQ_OK) {
        moq_release(a, text, (size_t)size + 1);
        text = NULL;
    }
    moqi_sys_close(file);
    if (text) *bytes = (size_t)size;
    return text;
#endif
}

/* No allocation: the two paths live on the stack. */
MOQ_API moq_result moq_write_file(const char *path, const void *data, size_t bytes, moq_error *err)
{
    moqi_writer w;
    moqi_clear(err);
    if (!path || (!data && bytes))
        return moqi_fail(err, MOQ_E_ARG, moqi_at(NULL, NULL, NULL, -1), "moq_write_file: path or data is NULL");
    moq_result e = moqi_writer_open(&w, path, err);
    if (e == MOQ_OK) e = moqi_writer_put(&w, data, bytes, err);
    return e == MOQ_OK ? moqi_writer_commit(&w, err) : e;
}

#ifdef MOQ_QUANTIZE

/* ---- folders: made, emptied, renamed; used by the exporters, which build a folder beside its target ---- */

#if !defined(MOQ_NO_OS)
#if defined(_WIN32)
static int moqi_sys_make_dir(const char *path)
{
    wchar_t w[MOQI_WIDE];
    return moqi_wide(path, w) && CreateDirectoryW(w, NULL) != 0;
}

static void moqi_sys_remove_dir(const char *path)
{
    wchar_t w[MOQI_WIDE];
    if (moqi_wide(path, w)) RemoveDirectoryW(w);
}
#else
static int moqi_sys_make_dir(const char *path) { return mkdir(path, 0777) == 0; }
static void moqi_sys_remove_dir(const char *path) { rmdir(path); }
#endif

/* Deletes the plain files of a folder and then the folder. Only for folders that this library has made. */
static void moqi_remove_folder(const char *path)
{
    moqi_arena r = moqi_arena_make(NULL);
    const char **names = NULL;
    size_t count = 0;
    char text[4096 + 300];
    if (moqi_list_dir(path, &r, &names, &count, NULL) == MOQ_OK) {
        for (size_t i = 0; i < count; i++) {
            moqi_format(text, sizeof text, "%s/%s", path, names[i]);
            moqi_sys_remove(text);
        }
    }
    moqi_arena_drop(&r);
    moqi_sys_remove_dir(path);
}

/* A new folder beside the target, "TARGET.tmp-PROCESS-N". The target itself must not exist. */
static moq_result moqi_folder_begin(const char *target, char *temp, size_t capacity, moq_error *err)
{
    const char *base = moqi_base_name(target);
    if (moqi_path_kind(target) != MOQI_NOTHING)
        return moqi_fail(err, MOQ_E_ARG, moqi_at(base, NULL, NULL, -1), "exists already; choose another target or remove it first");
    for (unsigned i = 0; i < 100; i++) {
        if (moqi_format(temp, capacity, "%s.tmp-%u-%u", target, moqi_sys_process(), i) >= capacity)
            return moqi_fail(err, MOQ_E_ARG, moqi_at(base, NULL, NULL, -1), "path longer than %zu bytes", capacity - 1);
        if (moqi_sys_make_dir(temp)) return MOQ_OK;
        if (moqi_path_kind(temp) == MOQI_NOTHING) break;
    }
    return moqi_fail_os(err, base, "a temporary folder beside it cannot be created", moqi_os_code());
}

/* The finished folder takes its name; both it and its parent are flushed. */
static moq_result moqi_folder_commit(const char *temp, const char *target, moq_error *err)
{
    char inside[4096 + 60];
    moqi_format(inside, sizeof inside, "%s/x", temp);
    moqi_sys_flush_dir(inside);
    if (!moqi_sys_rename(temp, target)) return moqi_fail_os(err, moqi_base_name(target), "the finished folder cannot be renamed to it", moqi_os_code());
    moqi_sys_flush_dir(target);
    return MOQ_OK;
}
#endif
#endif /* MOQ_QUANTIZE */

/* ------------------------------------------------------------------------------------------------
   >>threads         processors and their features; the built-in thread pool
   One parallel-for. Nothing is allocated while it runs, no two calls share a worker number at one time, and which
   worker runs what is the only thing that changes from run to run. Nothing is cached in globals.
   ------------------------------------------------------------------------------------------------ */

/* ---- processors ---- */

#if defined(__linux__) && !defined(MOQ_NO_OS)

/* A small text file of the kernel, cut at capacity - 1 bytes; "" when it cannot be read. */
static const char *moqi_kernel_text(const char *path, char *text, size_t capacity)
{
    size_t n = 0;
    intptr_t file = moqi_sys_open(path);
    if (file != -1) {
        int64_t got = 1;
        while (n + 1 < capacity && got > 0) {
            got = moqi_sys_read(file, text + n, capacity - 1 - n);
            if (got > 0) n += (size_t)got;
        }
        moqi_sys_close(file);
    }
    text[n] = 0;
    return text;
}

/* Decimal digits at *s, which moves past them; saturates far above any processor number. */
static long moqi_kernel_number(const char **s)
{
    long v = 0;
    for (; **s >= '0' && **s <= '9'; ++*s) v = v < 100000000 ? v * 10 + (**s - '0') : v;
    return v;
}

/* The next range of a processor list such as "0-3,8"; 0 at its end. */
static int moqi_kernel_range(const char **s, long *first, long *last)
{
    if (**s == ',') ++*s;
    if (**s < '0' || **s > '9') return 0;
    *first = *last = moqi_kernel_number(s);
    if (**s == '-') { ++*s; *last = moqi_kernel_number(s); }
    return 1;
}

/* A processor counts unless another thread of its core, with a lower number, is in the allowed list. */
static int moqi_is_first_sibling(const char *allowed, long cpu)
{
    char path[96], text[256];
    long a, b, first, last;
    moqi_format(path, sizeof path, "/sys/devices/system/cpu/cpu%ld/topology/thread_siblings_list", cpu);
    const char *siblings = moqi_kernel_text(path, text, sizeof text);
    while (moqi_kernel_range(&siblings, &first, &last))
        for (long sibling = first; sibling <= last && sibling < cpu; sibling++)
            for (const char *list = allowed; moqi_kernel_range(&list, &a, &b);)
                if (sibling >= a && sibling <= b) return 0;
    return 1;
}

/* The allowed list of this process (affinity and cpusets), then the CPU time quota of its container. */
static int moqi_count_cores(void)
{
    char text[8192], quota[64];
    const char *status = strstr(moqi_kernel_text("/proc/self/status", text, sizeof text), "Cpus_allowed_list:");
    long first, last, count = 0;
    if (!status) return 1;
    for (status += strlen("Cpus_allowed_list:"); *status == ' ' || *status == '\t'; status++) {}
    for (const char *list = status; moqi_kernel_range(&list, &first, &last);)
        for (long cpu = first; cpu <= last && cpu < first + 4096; cpu++) count += moqi_is_first_sibling(status, cpu);
    const char *q = moqi_kernel_text("/sys/fs/cgroup/cpu.max", quota, sizeof quota);
    long part = moqi_kernel_number(&q); /* "200000 100000": microseconds per period, or "max" */
    if (part > 0 && *q == ' ') {
        q++;
        long period = moqi_kernel_number(&q), share = period > 0 ? (part + period - 1) / period : 0;
        if (share > 0 && share < count) count = share;
    }
    return count > 0 ? (int)count : 1;
}

#elif defined(_WIN32) && !defined(MOQ_NO_OS)

/* Cores with at least one processor that the affinity mask leaves to us, in this processor group. */
static int moqi_count_cores(void)
{
    SYSTEM_LOGICAL_PROCESSOR_INFORMATION info[512];
    DWORD bytes = (DWORD)sizeof info;
    DWORD_PTR mine = 0, all = 0;
    int count = 0;
    if (!GetProcessAffinityMask(GetCurrentProcess(), &mine, &all) || !GetLogicalProcessorInformation(info, &bytes)) return 1;
    for (DWORD i = 0; i < bytes / sizeof info[0]; i++) count += info[i].Relationship == RelationProcessorCore && (info[i].ProcessorMask & mine) != 0;
    return count > 0 ? count : 1;
}

#elif defined(__APPLE__) && !defined(MOQ_NO_OS)

static int moqi_count_cores(void)
{
    int count = 0;
    size_t bytes = sizeof count;
    return sysctlbyname("hw.physicalcpu", &count, &bytes, NULL, 0) == 0 && count > 0 ? count : 1;
}

#else

static int moqi_count_cores(void)
{
#if defined(_SC_NPROCESSORS_ONLN) && !defined(MOQ_NO_OS)
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 && n < 4096 ? (int)n : 1;
#else
    return 1;
#endif
}

#endif

/* Cores, not hardware threads: two threads of one core share its load ports and its cache, and a decoder that is bound
   by memory gets slower with both. */
MOQ_API int moq_cpu_count(void) { return moqi_count_cores(); }

/* Grouped as kernels need them: AVX512 means the four subsets that every server core with any of them has, AMX means
   tiles with both number types. A flag also says that the system saves the registers it needs. */
enum {
    MOQI_CPU_AVX2 = 1, MOQI_CPU_FMA = 2, MOQI_CPU_F16C = 4, MOQI_CPU_AVX512 = 8 /* F + BW + DQ + VL */, MOQI_CPU_VNNI = 16,
    MOQI_CPU_AVXVNNI = 32, MOQI_CPU_BF16 = 64, MOQI_CPU_VBMI = 128, MOQI_CPU_AMX = 256 /* tiles + INT8 + BF16 */,
    MOQI_CPU_NEON = 512, MOQI_CPU_DOTPROD = 1024, MOQI_CPU_I8MM = 2048
};

#if defined(MOQ_NO_SIMD)
#define MOQI_CPUID 0
#elif (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#include <cpuid.h>
#define MOQI_CPUID 1
/* eax ebx ecx edx of a leaf; zeros when the processor does not have it. */
static void moqi_cpuid(unsigned leaf, unsigned sub, unsigned out[4])
{
    memset(out, 0, 4 * sizeof *out);
    __get_cpuid_count(leaf, sub, &out[0], &out[1], &out[2], &out[3]);
}

/* XCR0: which register files the system saves at a task switch. Only with OSXSAVE. */
static uint64_t moqi_xcr0(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low | (uint64_t)high << 32;
}
#elif defined(_MSC_VER) && (defined(_M_X64) || defined(_M_IX86))
#include <intrin.h>
#define MOQI_CPUID 1
static void moqi_cpuid(unsigned leaf, unsigned sub, unsigned out[4]) { __cpuidex((int *)out, (int)leaf, (int)sub); }
static uint64_t moqi_xcr0(void) { return _xgetbv(0); }
#else
#define MOQI_CPUID 0
#endif

#if MOQI_CPUID

/* Linux gives the AMX tile state only to processes that ask: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA). */
static int moqi_amx_allowed(uint64_t xcr0)
{
    if ((xcr0 >> 17 & 3) != 3) return 0;
#if defined(__linux__) && defined(__x86_64__) && !defined(MOQ_NO_OS)
    long r;
    __asm__ volatile("syscall" : "=a"(r) : "a"(158L), "D"(0x1023L), "S"(18L) : "rcx", "r11", "memory");
    return r == 0;
#else
    return 0;
#endif
}

/* Bit positions: Intel SDM volume 2, CPUID leaves 1, 7.0 and 7.1. */
static uint32_t moqi_cpu_flags(void)
{
    unsigned one[4], seven[4], more[4] = {0, 0, 0, 0};
    uint32_t flags = 0;
    moqi_cpuid(1, 0, one);
    moqi_cpuid(7, 0, seven);
    if (seven[0] >= 1) moqi_cpuid(7, 1, more);
    if (!(one[2] >> 27 & 1)) return 0; /* OSXSAVE */
    uint64_t xcr0 = moqi_xcr0();
    unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    if ((xcr0 & 6) != 6 || !(one[2] >> 12 & 1) || !(one[2] >> 29 & 1) || !(seven[1] >> 5 & 1)) return 0;
    flags = MOQI_CPU_AVX2 | MOQI_CPU_FMA | MOQI_CPU_F16C; /* every processor with AVX2 that matters has the other two */
    if (more[0] >> 4 & 1) flags |= MOQI_CPU_AVXVNNI;
    if ((xcr0 & 0xe6) != 0xe6 || (seven[1] & avx512) != avx512) return flags;
    flags |= MOQI_CPU_AVX512;
    if (seven[2] >> 11 & 1) flags |= MOQI_CPU_VNNI;
    if (seven[2] >> 1 & 1) flags |= MOQI_CPU_VBMI;
    if (more[0] >> 5 & 1) flags |= MOQI_CPU_BF16;
    if ((seven[3] >> 22 & 1) && (seven[3] >> 24 & 3) == 3 && moqi_amx_allowed(xcr0)) flags |= MOQI_CPU_AMX;
    return flags;
}

#elif defined(__aarch64__) && !defined(MOQ_NO_SIMD)

#if defined(__linux__) && !defined(MOQ_NO_OS)
#include <sys/auxv.h>
#endif

/* HWCAP_ASIMDDP is bit 20 of AT_HWCAP, HWCAP2_I8MM bit 13 of AT_HWCAP2. */
static uint32_t moqi_cpu_flags(void)
{
    uint32_t flags = MOQI_CPU_NEON;
#if defined(__linux__) && !defined(MOQ_NO_OS)
    if (getauxval(AT_HWCAP) >> 20 & 1) flags |= MOQI_CPU_DOTPROD;
    if (getauxval(AT_HWCAP2) >> 13 & 1) flags |= MOQI_CPU_I8MM;
#elif defined(__APPLE__)
    flags |= MOQI_CPU_DOTPROD; /* every Apple Silicon Mac */
#endif
    return flags;
}

#else

/* Other processors, and MOQ_NO_SIMD: the plain C kernels. */
static uint32_t moqi_cpu_flags(void) { return 0; }

#endif

/* All texts that moq_cpu_features can return, as constants: the result must outlive the call without a writable global.
   The highest bit of the index adds the first word. */
#define MOQI_WORDS_1(a) a, a " amx"
#define MOQI_WORDS_2(a) MOQI_WORDS_1(a), MOQI_WORDS_1(a " vbmi")
#define MOQI_WORDS_3(a) MOQI_WORDS_2(a), MOQI_WORDS_2(a " bf16")
#define MOQI_WORDS_4(a) MOQI_WORDS_3(a), MOQI_WORDS_3(a " avx_vnni")
#define MOQI_WORDS_5(a) MOQI_WORDS_4(a), MOQI_WORDS_4(a " vnni")
#define MOQI_WORDS_6(a) MOQI_WORDS_5(a), MOQI_WORDS_5(a " avx512")

/* For people and for logs; code asks moqi_cpu_flags. */
MOQ_API const char *moq_cpu_features(void)
{
    static const char *const x86[] = {MOQI_WORDS_6("avx2 fma f16c")};
    static const char *const arm[] = {"neon", "neon dotprod", "neon i8mm", "neon dotprod i8mm"};
    uint32_t f = moqi_cpu_flags(), index = 0;
    if (f & MOQI_CPU_NEON) return arm[f / MOQI_CPU_DOTPROD & 3];
    for (uint32_t bit = MOQI_CPU_AVX512; bit <= MOQI_CPU_AMX; bit *= 2) index = index * 2 + ((f & bit) != 0);
    return f & MOQI_CPU_AVX2 ? x86[index] : "";
}

/* ---- thread pool ---- */

#if defined(MOQ_NO_OS) || defined(MOQ_NO_THREADS) || !(defined(__GNUC__) || defined(_MSC_VER))
#define MOQI_THREADS 0
#else
#define MOQI_THREADS 1
#endif

#if !MOQI_THREADS

/* Without threads: the same interface, one worker, the caller's own thread. */
typedef struct moqi_pool { moq_allocator a; int workers; } moqi_pool;

MOQI_UNUSED static moqi_pool *moqi_pool_create(int workers, const moq_allocator *a, moq_error *err)
{
    moqi_pool *p = (moqi_pool *)moq_allocate(a, sizeof *p);
    (void)workers;
    if (!p) { moqi_nomem(err, sizeof *p); return NULL; }
    if (a) p->a = *a;
    p->workers = 1;
    return p;
}

MOQI_UNUSED static void moqi_pool_run(void *pool, int tasks, void (*task)(void *arg, int index, int worker), void *arg)
{
    (void)pool;
    for (int i = 0; i < tasks; i++) task(arg, i, 0);
}

MOQI_UNUSED static void moqi_pool_destroy(moqi_pool *p)
{
    if (!p) return;
    moq_allocator a = p->a;
    moq_release(&a, p, sizeof *p);
}

#else

/* A thread, a lock, a condition to wait for: the few calls of each system that the pool needs. They cannot fail once
   made, except for starting a thread. */
#ifdef _WIN32
typedef HANDLE moqi_thread;
typedef SRWLOCK moqi_lock;
typedef CONDITION_VARIABLE moqi_signal;
static void moqi_lock_init(moqi_lock *l) { InitializeSRWLock(l); }
static void moqi_signal_init(moqi_signal *s) { InitializeConditionVariable(s); }
static void moqi_lock_drop(moqi_lock *l) { (void)l; }
static void moqi_signal_drop(moqi_signal *s) { (void)s; }
static void moqi_lock_take(moqi_lock *l) { AcquireSRWLockExclusive(l); }
static void moqi_lock_give(moqi_lock *l) { ReleaseSRWLockExclusive(l); }
static void moqi_signal_wait(moqi_signal *s, moqi_lock *l) { SleepConditionVariableSRW(s, l, INFINITE, 0); }
static void moqi_signal_all(moqi_signal *s) { WakeAllConditionVariable(s); }
static int moqi_thread_is_self(moqi_thread t) { return GetThreadId(t) == GetCurrentThreadId(); }
#define MOQI_THREAD_RESULT DWORD WINAPI
#define MOQI_THREAD_RETURN 0
#else
typedef pthread_t moqi_thread;
typedef pthread_mutex_t moqi_lock;
typedef pthread_cond_t moqi_signal;
static void moqi_lock_init(moqi_lock *l) { pthread_mutex_init(l, NULL); }
static void moqi_signal_init(moqi_signal *s) { pthread_cond_init(s, NULL); }
static void moqi_lock_drop(moqi_lock *l) { pthread_mutex_destroy(l); }
static void moqi_signal_drop(moqi_signal *s) { pthread_cond_destroy(s); }
static void moqi_lock_take(moqi_lock *l) { pthread_mutex_lock(l); }
static void moqi_lock_give(moqi_lock *l) { pthread_mutex_unlock(l); }
static void moqi_signal_wait(moqi_signal *s, moqi_lock *l) { pthread_cond_wait(s, l); }
static void moqi_signal_all(moqi_signal *s) { pthread_cond_broadcast(s); }
static int moqi_thread_is_self(moqi_thread t) { return pthread_equal(t, pthread_self()) != 0; }
#define MOQI_THREAD_RESULT void *
#define MOQI_THREAD_RETURN NULL
#endif

/* Sequentially consistent 64-bit atomics; C99 has none. The strongest order everywhere: a run takes microseconds, a fence
   nanoseconds, and the reasoning below needs one order that all threads agree on. */
#if defined(__GNUC__)
static uint64_t moqi_atomic_get(uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static void moqi_atomic_set(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
static uint64_t moqi_atomic_add(uint64_t *p, uint64_t v) { return __atomic_add_fetch(p, v, __ATOMIC_SEQ_CST); }
static int moqi_atomic_swap(uint64_t *p, uint64_t was, uint64_t v)
{
    return __atomic_compare_exchange_n(p, &was, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
#else
static uint64_t moqi_atomic_get(uint64_t *p) { return (uint64_t)InterlockedCompareExchange64((volatile LONG64 *)p, 0, 0); }
static void moqi_atomic_set(uint64_t *p, uint64_t v) { InterlockedExchange64((volatile LONG64 *)p, (LONG64)v); }
static uint64_t moqi_atomic_add(uint64_t *p, uint64_t v) { return (uint64_t)InterlockedExchangeAdd64((volatile LONG64 *)p, (LONG64)v) + v; }
static int moqi_atomic_swap(uint64_t *p, uint64_t was, uint64_t v)
{
    return (uint64_t)InterlockedCompareExchange64((volatile LONG64 *)p, (LONG64)v, (LONG64)was) == was;
}
#endif

/* Tells the core that this is a waiting loop: saves power and lets the other hardware thread of the core run. */
static void moqi_pause(void)
{
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
    __asm__ volatile("pause");
#elif defined(__GNUC__) && defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* How a run goes, and why nobody runs a task twice or a task of the wrong run:
     1. The caller closes the old run (no index is free), writes the description, resets `done`, then publishes a ticket
        with a new round number and index 0, and wakes sleepers.
     2. Everyone reads the description, then the ticket. If the ticket shows the expected round and a free index, the
        description that was read belongs to that round, since it only changes while no index is free.
     3. An index is claimed by swapping ticket t for t + 1. It fails if anybody else was faster or the round changed.
     4. Whoever finishes a task adds one to `done`; the last one wakes the caller. The caller cannot return earlier, so
        a claimed task never outlives its run. */
/* `ticket` holds the number of the run in its upper half and the next free index in the lower: claiming an index is one
   compare-and-swap that fails if the run has changed since its description was read. `done` counts finished tasks;
   the caller returns when all are done and never waits for workers that found nothing to do. */
typedef struct moqi_pool {
    uint64_t ticket, done, sleepers, waiting, stop, busy; /* atomics */
    uint64_t tasks, task, arg; /* the run: a count, a function, a pointer; atomics, since late workers may still look */
    moq_allocator a;
    int workers, spin, started;
    moqi_thread *threads;      /* [workers - 1]; thread i is worker i + 1 */
    struct moqi_seat *seats;   /* [workers - 1] */
    moqi_lock lock;
    moqi_signal wake, finish;  /* sleeping workers; a caller that waits for the last tasks */
} moqi_pool;

/* The signature of moq_parallel.run: a caller's own job system and this pool are called the same way. */
typedef void (*moqi_task)(void *arg, int index, int worker);

/* Worker numbers are fixed for the life of a thread, so per-worker scratch memory stays in one core's cache. */
typedef struct moqi_seat { moqi_pool *pool; int worker; } moqi_seat; /* what a thread gets told */

/* Wakes those who sleep on `s` and announced it in `count`. */
static void moqi_pool_notify(moqi_pool *p, uint64_t *count, moqi_signal *s)
{
    if (!moqi_atomic_get(count)) return;
    moqi_lock_take(&p->lock);
    moqi_signal_all(s);
    moqi_lock_give(&p->lock);
}

/* Runs tasks of the run `round` until none is free. */
static void moqi_pool_work(moqi_pool *p, uint64_t round, int worker)
{
    uint64_t tasks = moqi_atomic_get(&p->tasks), where = moqi_atomic_get(&p->task), arg = moqi_atomic_get(&p->arg);
    for (;;) {
        uint64_t t = moqi_atomic_get(&p->ticket);
        if (t >> 32 != round || (t & 0xffffffffu) >= tasks) return;
        if (!moqi_atomic_swap(&p->ticket, t, t + 1)) continue;
        uintptr_t at = (uintptr_t)where;
        moqi_task task;
        memcpy(&task, &at, sizeof task);
        task((void *)(uintptr_t)arg, (int)(t & 0xffffffffu), worker);
        if (moqi_atomic_add(&p->done, 1) == tasks) moqi_pool_notify(p, &p->waiting, &p->finish);
    }
}

/* Is there still nothing to do? `tasks` > 0: the caller asks, and waits for the last task of its run. 0: a worker asks,
   and waits for a run other than `round`, or for the end of the pool. */
static int moqi_pool_idle(moqi_pool *p, uint64_t round, uint64_t tasks)
{
    if (tasks) return moqi_atomic_get(&p->done) != tasks; /* the caller, waiting for the end */
    return moqi_atomic_get(&p->ticket) >> 32 == round && !moqi_atomic_get(&p->stop);
}

/* Spin briefly, for decoding has a run every few microseconds; then sleep, for pure spinning collapses when other
   programs want the cores. A sleeper announces itself before its last look, a waker looks for sleepers after its change. */
static void moqi_pool_wait(moqi_pool *p, uint64_t round, uint64_t tasks)
{
    for (int i = 0; i < p->spin; i++) {
        if (!moqi_pool_idle(p, round, tasks)) return;
        moqi_pause();
    }
    uint64_t *count = tasks ? &p->waiting : &p->sleepers;
    moqi_lock_take(&p->lock);
    moqi_atomic_add(count, 1);
    while (moqi_pool_idle(p, round, tasks)) moqi_signal_wait(tasks ? &p->finish : &p->wake, &p->lock);
    moqi_atomic_add(count, (uint64_t)-1);
    moqi_lock_give(&p->lock);
}

/* The life of a worker. Its round may be old when it arrives late; then there is nothing to claim, and it waits again. */
static MOQI_THREAD_RESULT moqi_pool_thread(void *arg)
{
    moqi_seat *seat = (moqi_seat *)arg;
    moqi_pool *p = seat->pool;
    uint64_t round = 0;
    while (!moqi_atomic_get(&p->stop)) {
        moqi_pool_work(p, round, seat->worker);
        moqi_pool_wait(p, round, 0);
        round = moqi_atomic_get(&p->ticket) >> 32;
    }
    return MOQI_THREAD_RETURN;
}

/* 0 when the system refuses: a container may limit the number of threads. */
static int moqi_thread_start(moqi_thread *t, moqi_seat *seat)
{
#ifdef _WIN32
    *t = CreateThread(NULL, 0, moqi_pool_thread, seat, 0, NULL);
    return *t != NULL;
#else
    return pthread_create(t, NULL, moqi_pool_thread, seat) == 0;
#endif
}

static void moqi_thread_join(moqi_thread t)
{
#ifdef _WIN32
    WaitForSingleObject(t, INFINITE);
    CloseHandle(t);
#else
    pthread_join(t, NULL);
#endif
}

/* The pool, its seats and its threads in one block, so that create has one allocation that can fail. */
static size_t moqi_pool_bytes(int workers)
{
    return sizeof(moqi_pool) + (size_t)(workers - 1) * (sizeof(moqi_seat) + sizeof(moqi_thread));
}

/* Only between runs. Sleepers are woken, spinners see `stop` by themselves. */
static void moqi_pool_destroy(moqi_pool *p)
{
    if (!p) return;
    moq_allocator a = p->a;
    moqi_atomic_set(&p->stop, 1);
    moqi_pool_notify(p, &p->sleepers, &p->wake);
    for (int i = 0; i < p->started; i++) moqi_thread_join(p->threads[i]);
    moqi_signal_drop(&p->finish);
    moqi_signal_drop(&p->wake);
    moqi_lock_drop(&p->lock);
    moq_release(&a, p, moqi_pool_bytes(p->workers));
}

/* `workers` threads, the caller of moqi_pool_run among them as worker 0. When the system refuses a thread, the pool
   does with those it has: worker numbers stay below `workers`. */
MOQI_UNUSED static moqi_pool *moqi_pool_create(int workers, const moq_allocator *a, moq_error *err)
{
    if (workers < 1) workers = 1;
    if (workers > 1024) workers = 1024;
    size_t bytes = moqi_pool_bytes(workers), others = (size_t)(workers - 1);
    moqi_pool *p = (moqi_pool *)moq_allocate(a, bytes);
    if (!p) { moqi_nomem(err, bytes); return NULL; }
    if (a) p->a = *a;
    p->workers = workers;
    p->spin = workers <= moq_cpu_count() ? 2000 : 20;
    p->seats = (moqi_seat *)(void *)(p + 1);
    p->threads = (moqi_thread *)(void *)(p->seats + others);
    moqi_lock_init(&p->lock);
    moqi_signal_init(&p->wake);
    moqi_signal_init(&p->finish);
    for (int i = 0; i < workers - 1; i++) {
        p->seats[i].pool = p;
        p->seats[i].worker = i + 1;
        if (!moqi_thread_start(&p->threads[i], &p->seats[i])) break;
        p->started++;
    }
    return p;
}

/* A run inside a task of the same pool: on the thread it is called from, under that thread's worker number. */
static void moqi_pool_nested(moqi_pool *p, int tasks, moqi_task task, void *arg)
{
    int worker = 0;
    for (int i = 0; i < p->started; i++)
        if (moqi_thread_is_self(p->threads[i])) worker = i + 1;
    for (int i = 0; i < tasks; i++) task(arg, i, worker);
}

/* Returns when every task has run. A single task, or a pool whose threads were refused, stays on this thread and costs
   nothing. Only one thread may call this at a time; a call from inside a task is a nested one. */
MOQI_UNUSED static void moqi_pool_run(void *pool, int tasks, void (*task)(void *arg, int index, int worker), void *arg)
{
    moqi_pool *p = (moqi_pool *)pool;
    if (tasks < 2 || p->started == 0 || moqi_atomic_get(&p->busy)) {
        moqi_pool_nested(p, tasks, task, arg);
        return;
    }
    uintptr_t at;
    memcpy(&at, &task, sizeof at);
    uint64_t round = ((moqi_atomic_get(&p->ticket) >> 32) + 1) & 0xffffffffu;
    moqi_atomic_set(&p->busy, 1);
    /* No index is free now, so nothing can be claimed while the description changes. */
    moqi_atomic_set(&p->ticket, (round - 1) << 32 | 0xffffffffu);
    moqi_atomic_set(&p->tasks, (uint64_t)tasks);
    moqi_atomic_set(&p->task, at);
    moqi_atomic_set(&p->arg, (uint64_t)(uintptr_t)arg);
    moqi_atomic_set(&p->done, 0);
    moqi_atomic_set(&p->ticket, round << 32);
    moqi_pool_notify(p, &p->sleepers, &p->wake);
    moqi_pool_work(p, round, 0);
    moqi_pool_wait(p, round, (uint64_t)tasks);
    moqi_atomic_set(&p->busy, 0);
}

#endif

/* ------------------------------------------------------------------------------------------------
   >>decimal         UTF-8, and decimal numbers to doubles and back, exactly
   Pure integer arithmetic on the stack: correctly rounded for every input, with no part for the C library's locale.
   ------------------------------------------------------------------------------------------------ */

/* ---- UTF-8 (RFC 3629) ---- */

/* Bytes of the well-formed sequence at s[0..n), 0 if there is none: no overlong forms, no surrogates, nothing over
   U+10FFFF. The second byte's range is where RFC 3629 section 4 differs between lead bytes. */
static size_t moqi_utf8_step(const uint8_t *s, size_t n)
{
    uint8_t c = s[0], low = 0x80, high = 0xbf;
    size_t len = c < 0x80 ? 1 : c < 0xc2 ? 0 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : c < 0xf5 ? 4 : 0;
    if (len < 2 || len > n) return len > n ? 0 : len;
    if (c == 0xe0) low = 0xa0;
    if (c == 0xed) high = 0x9f;
    if (c == 0xf0) low = 0x90;
    if (c == 0xf4) high = 0x8f;
    if (s[1] < low || s[1] > high) return 0;
    for (size_t i = 2; i < len; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    return len;
}

/* 1 if all of it is well-formed, else 0 and *bad (may be NULL) the byte where the first bad sequence starts. */
static int moqi_utf8_valid(const uint8_t *s, size_t n, size_t *bad)
{
    size_t i = 0;
    while (i < n) {
        if (n - i >= 8 && !((moqi_load_u32(s + i) | moqi_load_u32(s + i + 4)) & 0x80808080u)) { i += 8; continue; }
        size_t len = moqi_utf8_step(s + i, n - i);
        if (len == 0) {
            if (bad) *bad = i;
            return 0;
        }
        i += len;
    }
    return 1;
}

/* UTF-8 of a code point, 1 to 4 bytes. */
/* c is a code point that may stand: callers have refused surrogates and values over U+10FFFF. */
static size_t moqi_utf8_put(uint32_t c, char *out)
{
    size_t len = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    static const uint8_t lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (size_t i = len - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3f));
    out[0] = (char)(lead[len] | c);
    return len;
}

/* ---- decimal to double and back, exactly ---- */

/* Unsigned big integer, little-endian 32-bit limbs. 120 limbs hold 3840 bits: a double needs at most 767 digits to be
   told from its neighbours, so 780 digits and a sticky one over 10^1111 (3691 bits) is the largest fraction below. */
#define MOQI_BIG_LIMBS 120
#define MOQI_DECIMAL_DIGITS 780

typedef struct moqi_big {
    uint32_t limb[MOQI_BIG_LIMBS];
    int n; /* limbs in use; 0: zero */
} moqi_big;

/* The value v; limbs above n are never read, so they need no clearing. */
static void moqi_big_set(moqi_big *b, uint64_t v)
{
    b->limb[0] = (uint32_t)v;
    b->limb[1] = (uint32_t)(v >> 32);
    b->n = v >> 32 ? 2 : v != 0;
}

/* b = b * m + add */
static void moqi_big_mul(moqi_big *b, uint32_t m, uint32_t add)
{
    uint64_t carry = add;
    for (int i = 0; i < b->n; i++) {
        carry += (uint64_t)b->limb[i] * m;
        b->limb[i] = (uint32_t)carry;
        carry >>= 32;
    }
    MOQ_ASSERT(b->n < MOQI_BIG_LIMBS || carry == 0);
    if (carry && b->n < MOQI_BIG_LIMBS) b->limb[b->n++] = (uint32_t)carry;
}

/* b * 10^power, nine digits a step: 10^9 is the largest power of ten in a limb. */
static void moqi_big_mul_pow10(moqi_big *b, int64_t power)
{
    for (; power >= 9; power -= 9) moqi_big_mul(b, 1000000000u, 0);
    for (; power > 0; power--) moqi_big_mul(b, 10, 0);
}

/* Position of the highest bit, from 1; 0 for zero. */
static int moqi_big_bits(const moqi_big *b)
{
    int bits = 32 * b->n;
    if (b->n == 0) return 0;
    for (uint32_t top = b->limb[b->n - 1]; !(top & 0x80000000u); top <<= 1) bits--;
    return bits;
}

/* b * 2^by */
static void moqi_big_shift(moqi_big *b, int by)
{
    for (; by >= 31; by -= 31) moqi_big_mul(b, 0x80000000u, 0);
    if (by > 0) moqi_big_mul(b, (uint32_t)1 << by, 0);
}

/* -1, 0, 1. Numbers carry no leading zero limbs, so the longer one is the larger. */
static int moqi_big_compare(const moqi_big *a, const moqi_big *b)
{
    if (a->n != b->n) return a->n < b->n ? -1 : 1;
    for (int i = a->n - 1; i >= 0; i--)
        if (a->limb[i] != b->limb[i]) return a->limb[i] < b->limb[i] ? -1 : 1;
    return 0;
}

/* a -= b, b not larger than a */
static void moqi_big_sub(moqi_big *a, const moqi_big *b)
{
    uint64_t borrow = 0;
    for (int i = 0; i < a->n; i++) {
        uint64_t d = (uint64_t)a->limb[i] - (i < b->n ? b->limb[i] : 0) - borrow;
        a->limb[i] = (uint32_t)d;
        borrow = d >> 63;
    }
    while (a->n > 0 && a->limb[a->n - 1] == 0) a->n--;
}

/* Bits of the double nearest to num / den, ties to even; the infinity code when it is too large. Both are changed. */
static uint64_t moqi_big_divide(moqi_big *num, moqi_big *den)
{
    int e = moqi_big_bits(num) - moqi_big_bits(den);
    uint64_t q = 0;
    if (e > 0) moqi_big_shift(den, e);
    else moqi_big_shift(num, -e);
    if (moqi_big_compare(num, den) < 0) { moqi_big_shift(num, 1); e--; }
    /* Now 1 <= num / den < 2 and the value is that times 2^e: schoolbook division gives 64 bits and a remainder. */
    for (int i = 0; i < 64; i++) {
        q <<= 1;
        if (moqi_big_compare(num, den) >= 0) { moqi_big_sub(num, den); q |= 1; }
        moqi_big_shift(num, 1);
    }
    /* q holds 64 bits, the top one set. A normal double keeps 53 of them; below 2^-1022 the unit stays 2^-1074 and
       fewer remain. More than 64 to drop: less than half of the smallest double. */
    int shift = e >= -1022 ? 11 : 11 - 1022 - e;
    if (e > 1023) return 0x7ff0000000000000u;
    if (shift > 64) return 0;
    uint64_t kept = shift == 64 ? 0 : q >> shift, rest = shift == 64 ? q : q & (((uint64_t)1 << shift) - 1);
    uint64_t half = (uint64_t)1 << (shift - 1);
    if (rest > half || (rest == half && (num->n > 0 || (kept & 1)))) kept++;
    /* The hidden bit adds one to the exponent field, and so does a carry out of the mantissa. */
    return kept + (e >= -1022 ? (uint64_t)(e + 1022) << 52 : 0);
}

/* The double nearest to a number in JSON's spelling, ties to even; 0 when it is too large for one. Small ones become 0. */
static int moqi_read_decimal(const char *s, double *out)
{
    moqi_big num, den;
    int64_t point = 0, exponent = 0; /* the value is 0.DIGITS * 10^point */
    int minus = *s == '-', fraction = 0, digits = 0, sticky = 0;
    uint64_t bits = 0;
    moqi_big_set(&num, 0);
    moqi_big_set(&den, 1);
    /* Leading zeros only move the point. Digits past the 780th cannot decide anything but a tie, so whether one of them
       is not zero is all that is kept. */
    for (s += minus; *s && *s != 'e' && *s != 'E'; s++) {
        uint32_t d = (uint32_t)(*s - '0');
        if (*s == '.') { fraction = 1; continue; }
        if (digits > 0 || d > 0) {
            if (digits < MOQI_DECIMAL_DIGITS) { moqi_big_mul(&num, 10, d); digits++; }
            else sticky |= d > 0;
            point += !fraction;
        } else {
            point -= fraction;
        }
    }
    if (*s) {
        /* Stops growing long before it overflows, and long after it decides: the text has fewer digits than 10^12. */
        int negative = s[1] == '-';
        for (s += 1 + (s[1] == '-' || s[1] == '+'); *s; s++)
            if (exponent < 1000000000000) exponent = exponent * 10 + (*s - '0');
        point += negative ? -exponent : exponent;
    }
    if (sticky) { moqi_big_mul(&num, 10, 1); digits++; }
    /* 10^309 is over every double, 10^-330 under half of the smallest: no big number need be built for them. */
    if (digits > 0 && point > 310) return 0;
    if (digits > 0 && point > -330) {
        moqi_big_mul_pow10(point >= digits ? &num : &den, point >= digits ? point - digits : digits - point);
        bits = moqi_big_divide(&num, &den);
    }
    if (bits == 0x7ff0000000000000u) return 0;
    bits |= (uint64_t)minus << 63;
    memcpy(out, &bits, sizeof bits);
    return 1;
}

/* The first `count` decimal digits of the double with magnitude bits `b` (not 0), cut, and whether anything follows:
   value = d0.d1d2... * 10^*power. */
static int moqi_decimal_digits(uint64_t b, int count, uint8_t *digits, int *power)
{
    moqi_big num, den;
    int field = (int)(b >> 52), e = (field ? field : 1) - 1075;
    moqi_big_set(&num, (b & 0xfffffffffffffu) | (uint64_t)(field > 0) << 52);
    moqi_big_set(&den, 1);
    int top = moqi_big_bits(&num) + e - 1; /* 2^top <= value */
    moqi_big_shift(e > 0 ? &num : &den, e > 0 ? e : -e);
    /* log10(2) = 0.30103: an estimate of the decimal exponent that is never too large, corrected below by one. */
    *power = (top * 30103) / 100000 - (top < 0); /* rounds down for negative ones too */
    moqi_big_mul_pow10(*power > 0 ? &den : &num, *power > 0 ? *power : -*power);
    moqi_big ten = den;
    moqi_big_mul(&ten, 10, 0);
    if (moqi_big_compare(&num, &ten) >= 0) { den = ten; ++*power; }
    for (int i = 0; i < count; i++) {
        digits[i] = 0;
        while (moqi_big_compare(&num, &den) >= 0) { moqi_big_sub(&num, &den); digits[i]++; }
        moqi_big_mul(&num, 10, 0);
    }
    return num.n > 0;
}

/* "d.ddde+x" with `count` digits rounded to nearest, ties to even, from 18 cut ones; trailing zeros dropped. */
static void moqi_decimal_spell(const uint8_t *exact, int tail, int count, int power, char *digits, int *used, int *exponent)
{
    int up = exact[count] > 5;
    if (exact[count] == 5) {
        up = tail || (count > 0 && (exact[count - 1] & 1));
        for (int i = count + 1; i < 18; i++) up |= exact[i] > 0;
    }
    for (int i = 0; i < count; i++) digits[i] = (char)('0' + exact[i]);
    int i = count - 1;
    for (; up && i >= 0; i--) {
        up = digits[i] == '9';
        digits[i] = (char)(up ? '0' : digits[i] + 1);
    }
    *exponent = power + up;
    if (up) digits[0] = '1'; /* 9.99 became 10.0 */
    while (count > 1 && digits[count - 1] == '0') count--;
    *used = count;
}

/* The shortest decimal that reads back as v (finite), spelled as Python's repr does: 1.0, 0.0001, 1e-05, 1.5e+16. */
static size_t moqi_write_double(double v, char *text, size_t capacity)
{
    uint64_t b, back = 0;
    uint8_t exact[18];
    char digits[20], scientific[40];
    int power = 0, used = 0, exponent = 0;
    memcpy(&b, &v, sizeof b);
    const char *sign = b >> 63 ? "-" : "";
    b &= 0x7fffffffffffffffu;
    if (b == 0) return moqi_format(text, capacity, "%s0.0", sign);
    /* 17 digits always tell a double from its neighbours; the 18th and the tail decide how the 17th is rounded. */
    int tail = moqi_decimal_digits(b, 18, exact, &power);
    for (int count = 1; count <= 17 && back != b; count++) {
        double r = 0;
        moqi_decimal_spell(exact, tail, count, power, digits, &used, &exponent);
        digits[used] = 0;
        moqi_format(scientific, sizeof scientific, "%c.%s0e%d", digits[0], digits + 1, exponent);
        moqi_read_decimal(scientific, &r);
        memcpy(&back, &r, sizeof back);
    }
    if (exponent < -4 || exponent >= 16)
        return moqi_format(text, capacity, "%s%c%s%se%c%02d", sign, digits[0], used > 1 ? "." : "", digits + 1, exponent < 0 ? '-' : '+',
                           exponent < 0 ? -exponent : exponent);
    if (exponent < 0) return moqi_format(text, capacity, "%s0.%.*s%s", sign, -exponent - 1, "000", digits);
    if (exponent + 1 >= used) return moqi_format(text, capacity, "%s%s%.*s.0", sign, digits, exponent + 1 - used, "000000000000000");
    return moqi_format(text, capacity, "%s%.*s.%s", sign, exponent + 1, digits, digits + exponent + 1);
}

/* ------------------------------------------------------------------------------------------------
   >>json            parser for two dialects, and a writer
   Iterative and bounded: time is linear (n log n in the members of one object), memory a fixed multiple of the text,
   and the C library's locale has no part in any number.
   ------------------------------------------------------------------------------------------------ */

/* ---- reader ---- */

/* A document is two arrays. Strings are copied out of the source, unescaped, one behind the other; a string of the source
   loses two quotes and gains a NUL, a number is followed by a separator or the end, so the source's size + 1 is enough
   whatever it holds. Nodes are 40 bytes; the densest text, "[0,0,0]", has one for every two bytes. */
struct moq_json_doc {
    moq_allocator a;
    moq_json *nodes;  /* [capacity], count used, in text order */
    char *text;       /* all strings and numbers, each NUL-terminated: never more bytes than the source + 1 */
    size_t count, capacity, text_capacity;
};

#define MOQI_JSON_NONE 0xffffffffu

/* One member of the outermost object, complete and sound: judged, then its nodes and its text are given up. */
typedef moq_result (*moqi_json_member_fn)(void *user, const moq_json *v, moq_error *err);

/* Everything that one parse needs; lives on the stack. A failed parse leaves nothing to undo. */
typedef struct moqi_json_reader {
    const char *s;        /* [n] the source */
    size_t n, pos, used;  /* used: bytes of doc->text */
    moq_json_doc *doc;
    uint32_t open;        /* innermost open container; while open, its skip holds the container around it */
    int depth, max_depth, config;
    const char *name;
    uint8_t *scratch;     /* for the search of duplicate keys */
    size_t scratch_bytes;
    moqi_json_member_fn member; /* may be NULL: the document is kept whole */
    void *user;
    moq_error *err;
} moqi_json_reader;

/* Line and column (in characters) from 1, found only when there is an error to report. */
static void moqi_json_position(const moqi_json_reader *r, size_t pos, unsigned *line, unsigned *column)
{
    *line = *column = 1;
    for (size_t i = 0; i < pos && i < r->n; i++) {
        if (r->s[i] == '\n') { ++*line; *column = 1; }
        else if (((uint8_t)r->s[i] & 0xc0) != 0x80) ++*column;
    }
}

/* "file: line L, column C: what": nothing of the text itself is quoted but the one byte found, so a message stays
   printable whatever the file holds. */
static moq_result moqi_json_fail(moqi_json_reader *r, moq_result code, size_t pos, const char *what)
{
    unsigned line, column;
    if (!r->err) return code;
    moqi_json_position(r, pos, &line, &column);
    return moqi_fail(r->err, code, moqi_at(r->name, NULL, NULL, (int64_t)pos), "line %u, column %u: %s", line, column, what);
}

/* "found X, expected Y", with the remedy for what people write by habit from other languages. */
static moq_result moqi_json_unexpected(moqi_json_reader *r, const char *expected)
{
    static const struct { char found; const char *hint; } hints[] = {
        {'\'', "; strings take double quotes"}, {'/', "; JSON has no comments"}, {'#', "; JSON has no comments"},
        {'N', "; NaN and None are not JSON"}, {'I', "; Infinity is not JSON"}, {'T', "; write true"}, {'F', "; write false"},
        {'+', "; numbers take no plus sign"}, {'.', "; write a digit before the point"},
    };
    char text[160], found[24];
    const char *hint = "";
    size_t before = r->pos;
    char c = r->pos < r->n ? r->s[r->pos] : 0;
    if (r->pos >= r->n) moqi_format(found, sizeof found, "the end of the text");
    else if (c > 0x20 && c < 0x7f) moqi_format(found, sizeof found, "'%c'", c);
    else moqi_format(found, sizeof found, "byte 0x%02x", (unsigned)(uint8_t)c);
    for (size_t i = 0; i < MOQI_COUNT(hints); i++)
        if (r->pos < r->n && c == hints[i].found) hint = hints[i].hint;
    while (before > 0 && (r->s[before - 1] == ' ' || r->s[before - 1] == '\n' || r->s[before - 1] == '\r' || r->s[before - 1] == '\t')) before--;
    if ((c == '}' || c == ']') && before > 0 && r->s[before - 1] == ',') hint = "; the comma before it must go";
    if (r->pos >= r->n) hint = "; the file is probably incomplete";
    moqi_format(text, sizeof text, "found %s, expected %s%s", found, expected, hint);
    return moqi_json_fail(r, MOQ_E_JSON, r->pos, text);
}

/* The four blanks of RFC 8259 section 2; form feed, vertical tab and the Unicode blanks are errors. */
static void moqi_json_space(moqi_json_reader *r)
{
    while (r->pos < r->n) {
        char c = r->s[r->pos];
        if (c != ' ' && c != '\n' && c != '\t' && c != '\r') break;
        r->pos++;
    }
}

/* Four hexadecimal digits at `pos`, or -1. */
static int32_t moqi_json_hex4(const moqi_json_reader *r, size_t pos)
{
    int32_t v = 0;
    if (r->n - pos < 4) return -1;
    for (size_t i = pos; i < pos + 4; i++) {
        char c = moqi_lower(r->s[i]);
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
        if (digit < 0) return -1;
        v = v * 16 + digit;
    }
    return v;
}

/* The escape at pos (a backslash), appended to the text. A surrogate half alone is no character: E_UTF8. */
static moq_result moqi_json_escape(moqi_json_reader *r)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    size_t at = r->pos;
    char c = r->n - at > 1 ? r->s[at + 1] : 0;
    const char *simple = c ? strchr(from, c) : NULL;
    if (simple) {
        r->doc->text[r->used++] = to[simple - from];
        r->pos += 2;
        return MOQ_OK;
    }
    if (c != 'u')
        return moqi_json_fail(r, MOQ_E_JSON, at, "unknown escape; after a backslash only one of \" \\ / b f n r t u may stand");
    int32_t v = moqi_json_hex4(r, at + 2);
    if (v < 0) return moqi_json_fail(r, MOQ_E_JSON, at, "\\u must be followed by four hexadecimal digits");
    r->pos += 6;
    if (v >= 0xd800 && v < 0xe000) {
        int pair = v < 0xdc00 && r->n - r->pos >= 6 && r->s[r->pos] == '\\' && r->s[r->pos + 1] == 'u';
        int32_t low = pair ? moqi_json_hex4(r, r->pos + 2) : -1;
        if (low < 0xdc00 || low > 0xdfff)
            return moqi_json_fail(r, MOQ_E_UTF8, at, "\\u escape of half a surrogate pair, which is no character; its writer cut a text in two");
        v = 0x10000 + ((v - 0xd800) << 10) + (low - 0xdc00);
        r->pos += 6;
    }
    r->used += moqi_utf8_put((uint32_t)v, r->doc->text + r->used);
    return MOQ_OK;
}

/* The string whose opening quote is at pos: *out and *bytes, unescaped and NUL-terminated. */
static moq_result moqi_json_read_string(moqi_json_reader *r, const char **out, uint32_t *bytes)
{
    size_t start = r->used, opening = r->pos++;
    for (;;) {
        /* Runs without anything special are copied whole; the text is known to be UTF-8. */
        size_t from = r->pos, at = from;
        while (at < r->n && (uint8_t)r->s[at] >= 0x20 && r->s[at] != '"' && r->s[at] != '\\') at++;
        memcpy(r->doc->text + r->used, r->s + from, at - from);
        r->used += at - from;
        r->pos = at;
        if (at >= r->n) return moqi_json_fail(r, MOQ_E_JSON, opening, "string is not closed; the file is probably incomplete");
        if (r->s[at] == '"') break;
        if (r->s[at] != '\\') return moqi_json_fail(r, MOQ_E_JSON, at, "control byte inside a string; write it as an escape such as \\n");
        moq_result e = moqi_json_escape(r);
        if (e != MOQ_OK) return e;
    }
    r->pos++;
    r->doc->text[r->used] = 0;
    *out = r->doc->text + start;
    *bytes = (uint32_t)(r->used - start);
    r->used++;
    return MOQ_OK;
}

/* How many decimal digits were skipped. */
static size_t moqi_json_digits(moqi_json_reader *r)
{
    size_t from = r->pos;
    while (r->pos < r->n && r->s[r->pos] >= '0' && r->s[r->pos] <= '9') r->pos++;
    return r->pos - from;
}

/* Skips `word` if it stands here. What may follow it is the caller's business: "truex" fails at the x. */
static int moqi_json_accept(moqi_json_reader *r, const char *word)
{
    size_t n = strlen(word);
    if (r->n - r->pos < n || memcmp(r->s + r->pos, word, n) != 0) return 0;
    r->pos += n;
    return 1;
}

/* The same for one byte: this is asked several times for every value. */
static int moqi_json_skip(moqi_json_reader *r, char c)
{
    int here = r->pos < r->n && r->s[r->pos] == c;
    r->pos += (size_t)here;
    return here;
}

/* -? (0 | [1-9][0-9]*) (. [0-9]+)? ([eE] [+-]? [0-9]+)?, and in the CONFIG dialect NaN, Infinity and -Infinity. */
static moq_result moqi_json_read_number(moqi_json_reader *r, moq_json *v)
{
    size_t from = r->pos;
    int minus = moqi_json_skip(r, '-');
    if (!(r->config && ((!minus && moqi_json_accept(r, "NaN")) || moqi_json_accept(r, "Infinity")))) {
        if (!moqi_json_skip(r, '0') && moqi_json_digits(r) == 0) return moqi_json_unexpected(r, minus ? "a digit after '-'" : "a value");
        if (moqi_json_skip(r, '.') && moqi_json_digits(r) == 0) return moqi_json_unexpected(r, "a digit after the point");
        if (moqi_json_skip(r, 'e') || moqi_json_skip(r, 'E')) {
            if (!moqi_json_skip(r, '+')) moqi_json_skip(r, '-');
            if (moqi_json_digits(r) == 0) return moqi_json_unexpected(r, "a digit of the exponent");
        }
    }
    char *text = r->doc->text + r->used;
    v->type = MOQ_JSON_NUMBER;
    v->text = text;
    v->text_bytes = (uint32_t)(r->pos - from);
    memcpy(text, r->s + from, r->pos - from);
    text[v->text_bytes] = 0;
    r->used += (size_t)v->text_bytes + 1;
    return MOQ_OK;
}

/* Upper bound of the values in the source: one, one per comma, one per bracket, strings skipped. Only a hint. */
static size_t moqi_json_estimate(const char *s, size_t n)
{
    size_t count = 1;
    for (size_t i = 0; i < n; i++) {
        char c = s[i];
        count += c == ',' || c == '[' || c == '{';
        if (c != '"') continue;
        for (i++; i < n && s[i] != '"'; i++) i += s[i] == '\\';
    }
    return count;
}

/* A zeroed node at the end, or NULL. A text of 60 MB of brackets may be invalid from its second byte on, so the first
   array never takes more than four times the text; doubling keeps the total linear. */
static moq_json *moqi_json_push(moqi_json_reader *r)
{
    moq_json_doc *d = r->doc;
    if (d->count == d->capacity) {
        size_t want = d->capacity * 2, few = r->n / (sizeof(moq_json) / 4) + 16;
        if (want == 0) {
            want = r->member ? 32 : moqi_json_estimate(r->s, r->n);
            if (want > few) want = few;
        }
        moq_json *p = (moq_json *)moq_allocate(&d->a, want * sizeof *p);
        if (!p) return NULL;
        if (d->count) memcpy(p, d->nodes, d->count * sizeof *p);
        moq_release(&d->a, d->nodes, d->capacity * sizeof *p);
        d->nodes = p;
        d->capacity = want;
    }
    memset(&d->nodes[d->count], 0, sizeof(moq_json)); /* it may have held one that was given up */
    return &d->nodes[d->count++];
}

/* ---- duplicate keys ---- */

/* RFC 8259 leaves repeated keys open, and readers differ in which of the two they take: a file with two values for one
   tensor would mean different things to different programs. Both dialects refuse it. */
typedef struct moqi_json_key { uint64_t hash; const moq_json *v; } moqi_json_key;

/* After unescaping: "a" and "\u0061" are one key. */
static int moqi_json_same_key(const moq_json *a, const moq_json *b)
{
    return a->key_bytes == b->key_bytes && memcmp(a->key, b->key, a->key_bytes) == 0;
}

/* By hash, then length, then bytes; equal only for equal keys. */
static int moqi_json_compare_keys(const void *x, const void *y)
{
    const moqi_json_key *a = (const moqi_json_key *)x, *b = (const moqi_json_key *)y;
    if (a->hash != b->hash) return a->hash < b->hash ? -1 : 1;
    if (a->v->key_bytes != b->v->key_bytes) return a->v->key_bytes < b->v->key_bytes ? -1 : 1;
    return memcmp(a->v->key, b->v->key, a->v->key_bytes);
}

/* Sorted by hash first, so that long common prefixes are read once per key and not once per comparison. A crafted
   set of equal hashes still costs n log n only. *found: the first repeated member in text order, or NULL. */
static moq_result moqi_json_sort_keys(moqi_json_reader *r, const moq_json *object, const moq_json **found)
{
    size_t n = object->count, bytes = n * (sizeof(moqi_json_key) + 2 * sizeof(void *));
    if (bytes > r->scratch_bytes) {
        moq_release(&r->doc->a, r->scratch, r->scratch_bytes);
        r->scratch_bytes = 0;
        r->scratch = (uint8_t *)moq_allocate(&r->doc->a, bytes);
        if (!r->scratch) return moqi_nomem(r->err, bytes);
        r->scratch_bytes = bytes;
    }
    /* scratch: n keys, n pointers to be sorted, n pointers for the sort. It stays for the next large object. */
    moqi_json_key *keys = (moqi_json_key *)(void *)r->scratch;
    const void **items = (const void **)(void *)(keys + n);
    const moq_json *v = object + 1;
    for (size_t i = 0; i < n; i++, v += v->skip) {
        keys[i].hash = moqi_hash((uint64_t)(uintptr_t)keys, v->key, v->key_bytes);
        keys[i].v = v;
        items[i] = &keys[i];
    }
    moqi_sort(items, items + n, n, moqi_json_compare_keys);
    for (size_t i = 1; i < n; i++) {
        const moq_json *repeat = ((const moqi_json_key *)items[i])->v;
        if (moqi_json_compare_keys(items[i - 1], items[i]) == 0 && (!*found || repeat < *found)) *found = repeat;
    }
    return MOQ_OK;
}

/* Called when an object closes. Few members are compared in pairs: most objects have two or three. The error names the
   first key that repeats an earlier one, so that the same file always gives the same message. */
static moq_result moqi_json_check_keys(moqi_json_reader *r, const moq_json *object)
{
    const moq_json *found = NULL, *end = object + object->skip;
    moq_result e = MOQ_OK;
    if (object->count > 12) e = moqi_json_sort_keys(r, object, &found);
    else
        for (const moq_json *v = object + 1; v < end && !found; v += v->skip)
            for (const moq_json *w = object + 1; w < v && !found; w += w->skip)
                if (moqi_json_same_key(v, w)) found = v;
    if (e != MOQ_OK || !found) return e;
    unsigned line, column;
    moqi_json_position(r, found->offset, &line, &column);
    return moqi_fail(r->err, MOQ_E_DUPLICATE, moqi_at(r->name, "key", found->key, (int64_t)found->offset),
                     "occurs twice in one object, the second time with the value at line %u, column %u; remove one", line, column);
}

/* ---- the parser itself ---- */

/* One value at pos. For a container: it becomes the innermost open one. */
static moq_result moqi_json_read_value(moqi_json_reader *r, const char *key, uint32_t key_bytes)
{
    moq_json *v = moqi_json_push(r);
    if (!v) return moqi_nomem(r->err, (uint64_t)r->doc->capacity * 2 * sizeof *v);
    v->key = key;
    v->key_bytes = key_bytes;
    v->offset = (uint32_t)r->pos;
    v->skip = 1;
    if (r->open != MOQI_JSON_NONE) r->doc->nodes[r->open].count++;
    /* The type of a value shows in its first byte; past the end it is 0, which starts none. */
    char c = r->pos < r->n ? r->s[r->pos] : 0;
    if (c == '"') {
        v->type = MOQ_JSON_STRING;
        return moqi_json_read_string(r, &v->text, &v->text_bytes);
    }
    if (c == '{' || c == '[') {
        char text[80];
        if (r->depth == r->max_depth) {
            moqi_format(text, sizeof text, "nested deeper than %d levels", r->max_depth);
            return moqi_json_fail(r, MOQ_E_LIMIT, r->pos, text);
        }
        v->type = c == '{' ? MOQ_JSON_OBJECT : MOQ_JSON_ARRAY;
        v->skip = r->open;
        r->open = (uint32_t)(r->doc->count - 1);
        r->depth++;
        r->pos++;
        return MOQ_OK;
    }
    if (c == 't' && moqi_json_accept(r, "true")) v->type = MOQ_JSON_TRUE;
    else if (c == 'f' && moqi_json_accept(r, "false")) v->type = MOQ_JSON_FALSE;
    else if (c != 'n' || !moqi_json_accept(r, "null")) return moqi_json_read_number(r, v);
    return MOQ_OK;
}

/* "key" : */
static moq_result moqi_json_read_key(moqi_json_reader *r, const char **key, uint32_t *bytes)
{
    if (r->pos >= r->n || r->s[r->pos] != '"') return moqi_json_unexpected(r, "a key in double quotes");
    moq_result e = moqi_json_read_string(r, key, bytes);
    if (e != MOQ_OK) return e;
    moqi_json_space(r);
    if (!moqi_json_skip(r, ':')) return moqi_json_unexpected(r, "':' after a key");
    moqi_json_space(r);
    return MOQ_OK;
}

/* A member of the outermost object is complete: shown and forgotten when somebody takes them one by one. */
static moq_result moqi_json_show(moqi_json_reader *r)
{
    if (!r->member || r->open != 0 || r->doc->count == 1 || r->doc->nodes[0].type != MOQ_JSON_OBJECT) return MOQ_OK;
    moq_result e = r->member(r->user, r->doc->nodes + 1, r->err);
    r->doc->count = 1;
    r->used = 0;
    return e;
}

/* After a value: closes every container that ends here. *more: a comma says that another element follows. */
static moq_result moqi_json_close(moqi_json_reader *r, int *more, int may_be_empty)
{
    *more = 0;
    while (r->open != MOQI_JSON_NONE) {
        moq_result e = moqi_json_show(r);
        if (e != MOQ_OK) return e;
        moq_json *v = &r->doc->nodes[r->open];
        int object = v->type == MOQ_JSON_OBJECT, kept = !r->member || r->open != 0;
        moqi_json_space(r);
        if (moqi_json_skip(r, object ? '}' : ']')) {
            /* Now that its nodes are counted, skip gets its final meaning. */
            r->open = v->skip;
            r->depth--;
            v->skip = (uint32_t)(&r->doc->nodes[r->doc->count] - v);
            e = object && kept ? moqi_json_check_keys(r, v) : MOQ_OK;
            if (e != MOQ_OK) return e;
            may_be_empty = 0;
            continue;
        }
        *more = 1;
        if (may_be_empty) return MOQ_OK;
        if (!moqi_json_skip(r, ',')) return moqi_json_unexpected(r, object ? "',' or '}' after a member" : "',' or ']' after an element");
        moqi_json_space(r);
        return MOQ_OK;
    }
    return MOQ_OK;
}

/* One round per value. No stack: a container that is still open keeps the index of the one around it in `skip`. */
static moq_result moqi_json_run(moqi_json_reader *r)
{
    int more = 1;
    moqi_json_space(r);
    while (more) {
        const char *key = NULL;
        uint32_t key_bytes = 0, was_open = r->open;
        moq_result e = MOQ_OK;
        if (r->open != MOQI_JSON_NONE && r->doc->nodes[r->open].type == MOQ_JSON_OBJECT) e = moqi_json_read_key(r, &key, &key_bytes);
        if (e == MOQ_OK) e = moqi_json_read_value(r, key, key_bytes);
        if (e == MOQ_OK) e = moqi_json_close(r, &more, r->open != was_open);
        if (e != MOQ_OK) return e;
    }
    /* One document and blanks: a second value, a comment or a NUL byte is an error. */
    moqi_json_space(r);
    return r->pos == r->n ? MOQ_OK : moqi_json_unexpected(r, "nothing after the value");
}

/* Byte order marks and text that is not UTF-8, before anything else. */
static moq_result moqi_json_check_text(moqi_json_reader *r)
{
    const uint8_t *s = (const uint8_t *)r->s;
    size_t bad = 0;
    if (r->n > MOQ_MAX_JSON_BYTES || r->n > 0x7fffffffu)
        return moqi_fail(r->err, MOQ_E_LIMIT, moqi_at(r->name, NULL, NULL, -1),
                         "%zu bytes of JSON, the limit is %llu; raise MOQ_MAX_JSON_BYTES if you trust the file", r->n,
                         (unsigned long long)MOQ_MAX_JSON_BYTES);
    /* UTF-16 starts with a byte order mark or has a zero in one of its first two bytes; JSON in UTF-8 never does. */
    int utf16 = r->n >= 2 && ((s[0] == 0xff && s[1] == 0xfe) || (s[0] == 0xfe && s[1] == 0xff) || (s[0] == 0) != (s[1] == 0));
    if (utf16) return moqi_json_fail(r, MOQ_E_UTF8, 0, "the text looks like UTF-16; save it as UTF-8");
    if (r->n >= 3 && memcmp(s, "\xef\xbb\xbf", 3) == 0) {
        if (!r->config) return moqi_json_fail(r, MOQ_E_UTF8, 0, "byte order mark before the text; save it as UTF-8 without BOM");
        r->pos = 3;
    }
    if (moqi_utf8_valid(s, r->n, &bad)) return MOQ_OK;
    char text[96];
    moqi_format(text, sizeof text, "byte 0x%02x starts no valid UTF-8 sequence; the file is damaged or in another encoding", (unsigned)s[bad]);
    return moqi_json_fail(r, MOQ_E_UTF8, bad, text);
}

/* Order of the checks, and so the first error: size, encoding of the whole text, then the grammar from left to right,
   with the keys of an object when it closes. One allocation for all strings, one (growing) for all nodes.
   With `member` the outermost object is shown member by member instead of kept, and whether its keys repeat is for
   `member` to see: memory is then that of the largest member and of the text. */
static moq_json_doc *moqi_json_parse(const char *text, size_t bytes, moq_json_dialect dialect, int max_depth, const char *name,
                                     moqi_json_member_fn member, void *user, const moq_allocator *a, moq_error *err)
{
    moqi_json_reader r;
    memset(&r, 0, sizeof r);
    moqi_clear(err);
    r.s = text ? text : "";
    r.n = text ? bytes : 0;
    r.config = dialect == MOQ_JSON_CONFIG;
    r.max_depth = max_depth > 0 ? max_depth : 64;
    r.open = MOQI_JSON_NONE;
    r.name = name;
    r.member = member;
    r.user = user;
    r.err = err;
    if (moqi_json_check_text(&r) != MOQ_OK) return NULL;
    moq_json_doc *doc = (moq_json_doc *)moq_allocate(a, sizeof *doc);
    if (!doc) { moqi_nomem(err, sizeof *doc); return NULL; }
    if (a) doc->a = *a;
    r.doc = doc;
    doc->text = (char *)moq_allocate(a, r.n + 1);
    doc->text_capacity = doc->text ? r.n + 1 : 0;
    moq_result e = doc->text ? moqi_json_run(&r) : moqi_nomem(err, (uint64_t)r.n + 1);
    moq_release(a, r.scratch, r.scratch_bytes);
    if (e != MOQ_OK) { moq_json_destroy(doc); return NULL; }
    return doc;
}

MOQ_API moq_json_doc *moq_json_parse(const char *text, size_t bytes, moq_json_dialect dialect, int max_depth, const char *name,
                                     const moq_allocator *a, moq_error *err)
{
    return moqi_json_parse(text, bytes, dialect, max_depth, name, NULL, NULL, a, err);
}

/* The allocator lives inside the document, so it is copied before its home goes. */
MOQ_API void moq_json_destroy(moq_json_doc *doc)
{
    if (!doc) return;
    moq_allocator a = doc->a;
    moq_release(&a, doc->nodes, doc->capacity * sizeof(moq_json));
    moq_release(&a, doc->text, doc->text_capacity);
    moq_release(&a, doc, sizeof *doc);
}

MOQ_API const moq_json *moq_json_root(const moq_json_doc *doc) { return doc ? doc->nodes : NULL; }

/* ---- reading values ---- */

/* Linear, like everything that walks an object: callers that look up many keys build a moqi_map. */
MOQ_API const moq_json *moq_json_find(const moq_json *v, const char *key)
{
    if (!v || !key || v->type != MOQ_JSON_OBJECT) return NULL;
    size_t n = strlen(key);
    for (const moq_json *e = moq_json_first(v); e; e = moq_json_next(v, e))
        if (e->key_bytes == n && memcmp(e->key, key, n) == 0) return e;
    return NULL;
}

/* Past the end, or of something that is no array: NULL, so that chains of look-ups need one check at their end. */
MOQ_API const moq_json *moq_json_at(const moq_json *v, size_t index)
{
    const moq_json *e = v && v->type == MOQ_JSON_ARRAY && index < v->count ? v + 1 : NULL;
    for (; e && index > 0; index--) e += e->skip;
    return e;
}

/* The first child stands right behind its parent, the next sibling `skip` nodes on. */
MOQ_API const moq_json *moq_json_first(const moq_json *v)
{
    return v && v->count ? v + 1 : NULL;
}

MOQ_API const moq_json *moq_json_next(const moq_json *parent, const moq_json *e)
{
    return parent && e && e + e->skip < parent + parent->skip ? e + e->skip : NULL;
}

/* Digits only, up to 2^64 - 1. */
static int moqi_read_u64(const char *s, uint64_t *out)
{
    uint64_t v = 0;
    if (!*s) return 0;
    for (; *s; s++) {
        if (*s < '0' || *s > '9') return 0;
        if (!moqi_mul(v, 10, &v) || !moqi_add(v, (uint64_t)(*s - '0'), &v)) return 0;
    }
    *out = v;
    return 1;
}

/* Spelled as an integer: 2.0 and 2e0 are refused, since a writer of integers never makes them. -0 is 0. */
MOQ_API int moq_json_int(const moq_json *v, int64_t *out)
{
    uint64_t u;
    if (!v || !out || v->type != MOQ_JSON_NUMBER) return 0;
    int minus = v->text[0] == '-';
    if (!moqi_read_u64(v->text + minus, &u) || u > (uint64_t)INT64_MAX + (unsigned)minus) return 0;
    *out = minus ? (int64_t)(0 - u) : (int64_t)u;
    return 1;
}

/* No sign at all, not even of zero: shapes and offsets are plain digits. */
MOQ_API int moq_json_u64(const moq_json *v, uint64_t *out)
{
    return v && out && v->type == MOQ_JSON_NUMBER && moqi_read_u64(v->text, out);
}

/* Newer transformers write {"__float__": "Infinity"} where older ones wrote a bare Infinity; both mean the float.
   A number over the largest double is refused rather than turned into infinity. */
MOQ_API int moq_json_float(const moq_json *v, double *out)
{
    static const struct { const char *name; uint64_t bits; } special[] = {
        {"NaN", 0x7ff8000000000000u}, {"Infinity", 0x7ff0000000000000u}, {"-Infinity", 0xfff0000000000000u},
    };
    if (!v || !out) return 0;
    /* Exactly that one member: an object with more in it is something else. */
    if (v->type == MOQ_JSON_OBJECT && v->count == 1) {
        v = moq_json_find(v, "__float__");
        if (!v || v->type != MOQ_JSON_STRING) return 0;
    } else if (v->type != MOQ_JSON_NUMBER) {
        return 0;
    }
    for (size_t i = 0; i < MOQI_COUNT(special); i++)
        if (v->text_bytes == strlen(special[i].name) && memcmp(v->text, special[i].name, v->text_bytes) == 0) {
            memcpy(out, &special[i].bits, sizeof *out);
            return 1;
        }
    return v->type == MOQ_JSON_NUMBER && moqi_read_decimal(v->text, out);
}

/* 1 and "true" are not booleans: a file that says so was not written by a known writer. */
MOQ_API int moq_json_bool(const moq_json *v, int *out)
{
    if (!v || !out || (v->type != MOQ_JSON_TRUE && v->type != MOQ_JSON_FALSE)) return 0;
    *out = v->type == MOQ_JSON_TRUE;
    return 1;
}

/* May hold NUL bytes inside; v->text_bytes tells. */
MOQ_API const char *moq_json_string(const moq_json *v)
{
    return v && v->type == MOQ_JSON_STRING ? v->text : NULL;
}

/* The usual question about a configuration value: is it this word? Case matters; see moqi_same where it must not. */
MOQ_API int moq_json_is(const moq_json *v, const char *text)
{
    return v && text && v->type == MOQ_JSON_STRING && v->text_bytes == strlen(text) && memcmp(v->text, text, v->text_bytes) == 0;
}

/* ---- writer ---- */

/* Text under construction; check `failed` once at the end, then use b.data[0..b.bytes) and drop the buffer. */
typedef struct moqi_json_out {
    moqi_buffer b;
    moq_result failed; /* the first failure: E_NOMEM, E_UTF8 */
    int pretty;        /* 4 spaces a level and ": ", else no blank at all */
    int depth, comma, after_key;
} moqi_json_out;

/* Nothing is allocated before the first byte. */
MOQI_UNUSED static void moqi_json_out_make(moqi_json_out *o, const moq_allocator *a, int pretty)
{
    memset(o, 0, sizeof *o);
    if (a) o->b.a = *a;
    o->pretty = pretty;
}

/* After the first failure nothing is added any more. */
static void moqi_json_raw(moqi_json_out *o, const char *s, size_t bytes)
{
    if (o->failed == MOQ_OK && !moqi_buffer_add(&o->b, s, bytes)) o->failed = MOQ_E_NOMEM;
}

/* A new line with the indentation of the current level, when pretty. */
static void moqi_json_line(moqi_json_out *o)
{
    if (!o->pretty) return;
    moqi_json_raw(o, "\n", 1);
    for (int i = 0; i < o->depth; i++) moqi_json_raw(o, "    ", 4);
}

/* `comma` says that something stands before in this container, `after_key` that a colon does. Calls nest freely and the
   writer keeps no stack: a container that ends is itself something that stands before. */
/* What stands before a key or an element. */
static void moqi_json_separate(moqi_json_out *o)
{
    if (!o->after_key) {
        if (o->comma) moqi_json_raw(o, ",", 1);
        if (o->depth > 0) moqi_json_line(o);
    }
    o->after_key = 0;
    o->comma = 1;
}

/* Escapes what RFC 8259 section 7 demands and nothing else: other characters stay UTF-8. */
static void moqi_json_quote(moqi_json_out *o, const char *s, size_t bytes)
{
    static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
    if (!moqi_utf8_valid((const uint8_t *)s, bytes, NULL)) o->failed = o->failed == MOQ_OK ? MOQ_E_UTF8 : o->failed;
    moqi_json_raw(o, "\"", 1);
    for (size_t i = 0, done = 0; i <= bytes; i++) {
        char c = i < bytes ? s[i] : 0, text[8];
        if (i < bytes && (uint8_t)c >= 0x20 && c != '"' && c != '\\') continue;
        moqi_json_raw(o, s + done, i - done);
        done = i + 1;
        if (i == bytes) break;
        const char *simple = c ? strchr(from, c) : NULL;
        size_t n = simple ? moqi_format(text, sizeof text, "\\%c", to[simple - from])
                          : moqi_format(text, sizeof text, "\\u%04x", (unsigned)(uint8_t)c);
        moqi_json_raw(o, text, n);
    }
    moqi_json_raw(o, "\"", 1);
}

/* '{' or '[', and the end of it. */
MOQI_UNUSED static void moqi_json_begin(moqi_json_out *o, char bracket)
{
    moqi_json_separate(o);
    moqi_json_raw(o, &bracket, 1);
    o->depth++;
    o->comma = 0;
}

/* An empty container closes on the line it opened: {} and []. */
MOQI_UNUSED static void moqi_json_end(moqi_json_out *o, char bracket)
{
    o->depth--;
    if (o->comma) moqi_json_line(o);
    moqi_json_raw(o, &bracket, 1);
    o->comma = 1;
}

/* Followed by exactly one value. */
MOQI_UNUSED static void moqi_json_put_key(moqi_json_out *o, const char *key)
{
    moqi_json_separate(o);
    moqi_json_quote(o, key, strlen(key));
    moqi_json_raw(o, ": ", o->pretty ? 2 : 1);
    o->after_key = 1;
}

/* A string that may hold NUL bytes. */
MOQI_UNUSED static void moqi_json_put_text(moqi_json_out *o, const char *s, size_t bytes)
{
    moqi_json_separate(o);
    moqi_json_quote(o, s, bytes);
}

/* A value that is JSON already: a number, a literal, a finished document. */
MOQI_UNUSED static void moqi_json_put_raw(moqi_json_out *o, const char *json)
{
    moqi_json_separate(o);
    moqi_json_raw(o, json, strlen(json));
}

MOQI_UNUSED static void moqi_json_put_string(moqi_json_out *o, const char *s) { moqi_json_put_text(o, s, strlen(s)); }
MOQI_UNUSED static void moqi_json_put_bool(moqi_json_out *o, int v) { moqi_json_put_raw(o, v ? "true" : "false"); }
MOQI_UNUSED static void moqi_json_put_null(moqi_json_out *o) { moqi_json_put_raw(o, "null"); }

/* Integers keep all 64 bits; they are never passed through a double. */
MOQI_UNUSED static void moqi_json_put_int(moqi_json_out *o, int64_t v)
{
    char text[24];
    moqi_format(text, sizeof text, "%lld", (long long)v);
    moqi_json_put_raw(o, text);
}

MOQI_UNUSED static void moqi_json_put_u64(moqi_json_out *o, uint64_t v)
{
    char text[24];
    moqi_format(text, sizeof text, "%llu", (unsigned long long)v);
    moqi_json_put_raw(o, text);
}

/* Values that JSON cannot spell become {"__float__": "Infinity"}, which both dialects read. */
MOQI_UNUSED static void moqi_json_put_float(moqi_json_out *o, double v)
{
    char text[40];
    uint64_t b;
    memcpy(&b, &v, sizeof b);
    if ((b & 0x7ff0000000000000u) != 0x7ff0000000000000u) {
        moqi_write_double(v, text, sizeof text);
        moqi_json_put_raw(o, text);
        return;
    }
    moqi_json_begin(o, '{');
    moqi_json_put_key(o, "__float__");
    moqi_json_put_string(o, b & 0xfffffffffffffu ? "NaN" : b >> 63 ? "-Infinity" : "Infinity");
    moqi_json_end(o, '}');
}

MOQI_COLD_END

/* ------------------------------------------------------------------------------------------------
   >>num             number formats: E2M1 E4M3 E5M2 E8M0 E2M3 E3M2 BF16 F16, both ways
   Pure functions over bit patterns: no tables, no float comparisons, the same result under every rounding and
   flush mode and with -ffast-math. Encoders round once, to nearest, ties to even.
   ------------------------------------------------------------------------------------------------ */

static const struct { const char *name; uint8_t bits, stored; } moqi_dtypes[] = {
    {"none", 0, 0},
#define MOQ_X(name, bits, stored) {#name, bits, stored},
    MOQ_DTYPES(MOQ_X)
#undef MOQ_X
};

/* Any int may come in from a file or another language, so the range is checked here and not by every caller. */
MOQ_API int moq_dtype_bits(moq_dtype t)
{
    return (unsigned)t < (unsigned)MOQ_DTYPE_COUNT ? moqi_dtypes[(unsigned)t].bits : 0;
}

MOQ_API const char *moq_dtype_name(moq_dtype t)
{
    return (unsigned)t < (unsigned)MOQ_DTYPE_COUNT ? moqi_dtypes[(unsigned)t].name : "?";
}

/* Exact spelling: the official reader knows no "f32" and no "FLOAT", and a reader that guesses would hide bad writers. */
MOQ_API moq_dtype moq_dtype_find(const char *name, size_t bytes)
{
    for (unsigned i = 1; i < (unsigned)MOQ_DTYPE_COUNT && name; i++) {
        const char *s = moqi_dtypes[i].name;
        if (moqi_dtypes[i].stored && strlen(s) == bytes && memcmp(s, name, bytes) == 0) return (moq_dtype)i;
    }
    return MOQ_NONE;
}

/* ---- bits ---- */

/* memcpy is the way between value and bits that is defined in C and in C++; it costs no instruction. */
static uint32_t moqi_f32_bits(float v)
{
    uint32_t b;
    memcpy(&b, &v, sizeof b);
    return b;
}

static float moqi_bits_f32(uint32_t b)
{
    float v;
    memcpy(&v, &b, sizeof v);
    return v;
}

/* The compiler may delete v != v and comparisons with infinity (-ffast-math), but not a test of the bits. */
MOQI_UNUSED static int moqi_is_nan(float v) { return (moqi_f32_bits(v) & 0x7fffffffu) > 0x7f800000u; }
MOQI_UNUSED static int moqi_is_finite(float v) { return (moqi_f32_bits(v) & 0x7f800000u) != 0x7f800000u; }

#if defined(__BYTE_ORDER__) && defined(__ORDER_BIG_ENDIAN__)
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define MOQI_BIG_ENDIAN 1
#endif
#endif
#ifndef MOQI_BIG_ENDIAN
#define MOQI_BIG_ENDIAN 0
#endif

/* Unaligned little-endian loads that compilers turn into vector loads inside a loop. */
static uint16_t moqi_get_u16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return MOQI_BIG_ENDIAN ? (uint16_t)(v >> 8 | v << 8) : v;
}

static uint32_t moqi_get_u32(const uint8_t *p)
{
    uint32_t v;
    if (MOQI_BIG_ENDIAN) return moqi_load_u32(p);
    memcpy(&v, p, sizeof v);
    return v;
}

static uint64_t moqi_get_u64(const uint8_t *p)
{
    uint64_t v;
    if (MOQI_BIG_ENDIAN) return moqi_load_u64(p);
    memcpy(&v, p, sizeof v);
    return v;
}

/* ---- small floats: one decoder and one encoder for every width ---- */

/* Magnitude code of a float with `mantissa` fraction bits and exponent bias `bias`, to F32 bits.
   normal: 2^(e - bias) * (1 + m / 2^mantissa) has the same bit string as in F32, shifted and re-biased;
   subnormal: m * 2^(1 - bias - mantissa), a product of an integer and a normal power of two, so exact. */
static uint32_t moqi_small_decode(uint32_t code, unsigned mantissa, unsigned bias)
{
    uint32_t normal = (code << (23 - mantissa)) + ((127 - bias) << 23);
    uint32_t tiny = moqi_f32_bits((float)(int32_t)code * moqi_bits_f32((128 - bias - mantissa) << 23));
    return code >> mantissa ? normal : tiny;
}

/* The reverse for finite magnitude bits `a`: nearest code, ties to even. A carry out of the mantissa moves into the
   exponent by itself; the result may pass the format's largest code, which the caller saturates. */
static uint32_t moqi_small_encode(uint32_t a, unsigned mantissa, unsigned bias)
{
    unsigned exponent = a >> 23;
    if (exponent + bias > 127) { /* normal in the target */
        unsigned shift = 23 - mantissa;
        a -= (127 - bias) << 23;
        return (a + ((1u << (shift - 1)) - 1) + (a >> shift & 1)) >> shift;
    }
    /* 1.f * 2^(exponent - 127) in units of 2^(1 - bias - mantissa); below half a unit everything is zero. */
    unsigned shift = 151 - bias - mantissa - exponent;
    if (shift > 24) return 0;
    uint32_t m = (a & 0x7fffffu) | 0x800000u;
    return (m + ((1u << (shift - 1)) - 1) + (m >> shift & 1)) >> shift;
}

/* ---- F16: 5 exponent bits, 10 mantissa bits, bias 15, infinities ---- */

MOQ_API float moq_f16_decode(uint16_t v)
{
    uint32_t sign = (uint32_t)(v & 0x8000u) << 16, code = v & 0x7fffu;
    uint32_t b = moqi_small_decode(code, 10, 15);
    /* Selections instead of branches, for loops over whole tensors: exponent 31 becomes 255, and a signalling NaN
       becomes quiet, as in hardware. */
    b += code >= 0x7c00u ? (uint32_t)112 << 23 : 0;
    b |= code > 0x7c00u ? 0x400000u : 0;
    return moqi_bits_f32(sign | b);
}

/* Overflow begins at 65520, half way between the largest finite value and the next power of two, and gives infinity:
   F16 is a format of weights here, never of quantized codes, so it follows IEEE 754 and does not saturate. */
MOQ_API uint16_t moq_f16_encode(float v)
{
    uint32_t b = moqi_f32_bits(v), sign = b >> 16 & 0x8000u, a = b & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (a >> 13 & 0x3ffu));
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520: half way between 65504 and 2^16 */
    return (uint16_t)(sign | moqi_small_encode(a, 10, 15));
}

/* ---- BF16: the upper half of an F32 ---- */

MOQ_API float moq_bf16_decode(uint16_t v) { return moqi_bits_f32((uint32_t)v << 16); }

/* Adding just under half of the dropped part, and the lowest kept bit, rounds to nearest with ties to even; the carry
   moves into the exponent and from the largest finite value to infinity, as it should. */
MOQ_API uint16_t moq_bf16_encode(float v)
{
    uint32_t b = moqi_f32_bits(v);
    if ((b & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(b >> 16 | 0x40u); /* never lets a payload round to infinity */
    return (uint16_t)((b + 0x7fffu + (b >> 16 & 1)) >> 16);
}

/* ---- FP8 ---- */

/* E4M3 "fn": no infinities, 0x7f and 0xff are NaN, largest 448 = 0x7e. */
MOQ_API float moq_e4m3_decode(uint8_t v)
{
    uint32_t sign = (uint32_t)(v & 0x80u) << 24, code = v & 0x7fu;
    return moqi_bits_f32(sign | (code == 0x7fu ? 0x7fc00000u : moqi_small_decode(code, 3, 7)));
}

/* Infinity saturates too: the format has none, and ModelOpt's exporter clamps before it casts. */
MOQ_API uint8_t moq_e4m3_encode(float v)
{
    uint32_t b = moqi_f32_bits(v), sign = b >> 24 & 0x80u, a = b & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint8_t)(sign | 0x7fu);
    if (a >= 0x43e00000u) return (uint8_t)(sign | 0x7eu);
    return (uint8_t)(sign | moqi_small_encode(a, 3, 7));
}

/* E5M2: infinities 0x7c and 0xfc, NaN above; largest finite 57344 = 0x7b. */
MOQ_API float moq_e5m2_decode(uint8_t v)
{
    return moq_f16_decode((uint16_t)(v << 8)); /* the upper half of an F16 */
}

/* Saturates although the format has infinities: a quantizer must not turn an outlier into one. */
MOQ_API uint8_t moq_e5m2_encode(float v)
{
    uint32_t b = moqi_f32_bits(v), sign = b >> 24 & 0x80u, a = b & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint8_t)(sign | 0x7fu);
    if (a >= 0x47600000u) return (uint8_t)(sign | 0x7bu);
    return (uint8_t)(sign | moqi_small_encode(a, 2, 15));
}

/* 2^(v - 127); code 0 is 2^-127, a subnormal F32. */
MOQ_API float moq_e8m0_decode(uint8_t v)
{
    uint32_t b = (uint32_t)v << 23;
    if (v == 0) b = 0x00400000u;
    if (v == 255) b = 0x7fc00000u;
    return moqi_bits_f32(b);
}

/* The "fnuz" variants: the code of -0 is the only NaN, exponent bias one larger. E4M3FNUZ: mantissa 3, bias 8;
   E5M2FNUZ: mantissa 2, bias 16. */
static float moqi_fnuz_decode(uint8_t v, unsigned mantissa, unsigned bias)
{
    uint32_t sign = (uint32_t)(v & 0x80u) << 24;
    return moqi_bits_f32(v == 0x80u ? 0x7fc00000u : sign | moqi_small_decode(v & 0x7fu, mantissa, bias));
}

/* ---- 4 and 6 bits: no NaN, no infinity ---- */

/* E2M1: 0 0.5 1 1.5 2 3 4 6. */
MOQ_API float moq_e2m1_decode(uint8_t v)
{
    return moqi_bits_f32((uint32_t)(v & 8u) << 28 | moqi_small_decode(v & 7u, 1, 1));
}

/* 5 is half way between 4 (code 6) and 6 (code 7) and goes to 4: the even code, as everywhere. */
MOQ_API uint8_t moq_e2m1_encode(float v)
{
    uint32_t b = moqi_f32_bits(v), sign = b >> 28 & 8u, a = b & 0x7fffffffu;
    if (a > 0x7f800000u) return 7;
    if (a >= 0x40c00000u) return (uint8_t)(sign | 7u);
    return (uint8_t)(sign | moqi_small_encode(a, 1, 1));
}

/* E2M3 reaches 7.5 in steps of at least 1/8, E3M2 reaches 28 in steps of at least 1/16. */
MOQ_API float moq_e2m3_decode(uint8_t v)
{
    return moqi_bits_f32((uint32_t)(v & 32u) << 26 | moqi_small_decode(v & 31u, 3, 1));
}

/* E3M2: bias 3, so that its smallest step is 2^-4. */
MOQ_API float moq_e3m2_decode(uint8_t v)
{
    return moqi_bits_f32((uint32_t)(v & 32u) << 26 | moqi_small_decode(v & 31u, 2, 3));
}

/* Six bits: sign, then the code of the magnitude, which ends at 31. NaN becomes the largest, as in ModelOpt's simulation. */
static uint8_t moqi_f6_encode(float v, unsigned mantissa, unsigned bias)
{
    uint32_t b = moqi_f32_bits(v), a = b & 0x7fffffffu, code = a >= 0x42000000u ? 31 : moqi_small_encode(a, mantissa, bias); /* 32 and more */
    return (uint8_t)(a > 0x7f800000u ? 31 : (b >> 26 & 32u) | (code > 31 ? 31 : code));
}

MOQ_API uint8_t moq_e2m3_encode(float v) { return moqi_f6_encode(v, 3, 1); }
MOQ_API uint8_t moq_e3m2_encode(float v) { return moqi_f6_encode(v, 2, 3); }

/* ---- arrays ---- */

/* F64 to F32, rounded once by hand: a cast would follow the host's rounding and flush modes. */
static float moqi_round_f64(uint64_t b)
{
    uint32_t sign = (uint32_t)(b >> 32) & 0x80000000u;
    uint64_t a = b & 0x7fffffffffffffffu;
    if (a > 0x7ff0000000000000u) return moqi_bits_f32(sign | 0x7fc00000u);
    if (a >= 0x47f0000000000000u) return moqi_bits_f32(sign | 0x7f800000u); /* 2^128 and more */
    unsigned exponent = (unsigned)(a >> 52), shift = 29;
    if (exponent > 896) { /* normal F32: re-bias; a carry may reach the infinity code, which is right */
        a -= (uint64_t)896 << 52;
    } else { /* subnormal F32: units of 2^-149 */
        shift = 926 - exponent;
        if (shift > 53) return moqi_bits_f32(sign);
        a = (a & 0xfffffffffffffu) | 0x10000000000000u;
    }
    uint64_t half = (uint64_t)1 << (shift - 1);
    return moqi_bits_f32(sign | (uint32_t)((a + (half - 1) + (a >> shift & 1)) >> shift));
}

/* Sign and magnitude instead of (float)(int64_t): two conversions that hardware has for every target and round once. */
static float moqi_round_i64(uint64_t v)
{
    return v >> 63 ? -(float)(0 - v) : (float)v;
}

/* F32 to F32: a copy where the host is little-endian as the file is. */
static void moqi_copy_f32(const uint8_t *src, size_t count, float *dst)
{
    if (!MOQI_BIG_ENDIAN) memcpy(dst, src, count * 4);
    else for (size_t i = 0; i < count; i++) dst[i] = moqi_bits_f32(moqi_get_u32(src + 4 * i));
}

/* src: [count] elements of `dtype`, any alignment. One plain loop per dtype, so that the compiler can vectorise each. */
MOQ_API int moq_to_f32(moq_dtype dtype, const void *src, size_t count, float *dst)
{
    const uint8_t *p = (const uint8_t *)src;
    if (count && (!src || !dst)) return 0;
#define MOQI_EACH(expression) for (size_t i = 0; i < count; i++) dst[i] = (expression); return 1
    switch ((int)dtype) {
    case MOQ_F32: if (count) moqi_copy_f32(p, count, dst); return 1;
    case MOQ_BF16: MOQI_EACH(moq_bf16_decode(moqi_get_u16(p + 2 * i)));
    case MOQ_F16: MOQI_EACH(moq_f16_decode(moqi_get_u16(p + 2 * i)));
    case MOQ_F8_E4M3: MOQI_EACH(moq_e4m3_decode(p[i]));
    case MOQ_F8_E5M2: MOQI_EACH(moq_e5m2_decode(p[i]));
    case MOQ_F8_E8M0: MOQI_EACH(moq_e8m0_decode(p[i]));
    case MOQ_F8_E4M3FNUZ: MOQI_EACH(moqi_fnuz_decode(p[i], 3, 8));
    case MOQ_F8_E5M2FNUZ: MOQI_EACH(moqi_fnuz_decode(p[i], 2, 16));
    case MOQ_I8: MOQI_EACH((float)(int8_t)p[i]);
    case MOQ_U8: MOQI_EACH((float)p[i]);
    case MOQ_BOOL: MOQI_EACH(p[i] ? 1.0f : 0.0f);
    case MOQ_I16: MOQI_EACH((float)(int16_t)moqi_get_u16(p + 2 * i));
    case MOQ_U16: MOQI_EACH((float)moqi_get_u16(p + 2 * i));
    case MOQ_I32: MOQI_EACH((float)(int32_t)moqi_get_u32(p + 4 * i));
    case MOQ_U32: MOQI_EACH((float)moqi_get_u32(p + 4 * i));
    case MOQ_I64: MOQI_EACH(moqi_round_i64(moqi_get_u64(p + 8 * i)));
    case MOQ_U64: MOQI_EACH((float)moqi_get_u64(p + 8 * i));
    case MOQ_F64: MOQI_EACH(moqi_round_f64(moqi_get_u64(p + 8 * i)));
    default: return 0;
    }
#undef MOQI_EACH
}

MOQI_COLD_BEGIN

/* ------------------------------------------------------------------------------------------------
   >>st              safetensors files, read and write
   Every rule of the format is checked before any use; n log n time; data is never touched, only pointed at.
   ------------------------------------------------------------------------------------------------ */

#define MOQI_ST_DEPTH 8 /* nesting of a header: object, entry, list; deeper is no header */

/* An open file. Names and metadata are copies in the arena; only `data` of the tensors points into the blob. */
struct moq_st {
    moqi_arena arena;
    moqi_blob blob;
    const char *file;          /* base name, for messages */
    uint64_t data_at;          /* first byte of the data section: 8 + header bytes */
    moq_tensor *tensors;       /* in the order of the header */
    const moq_tensor **sorted; /* the same by name */
    size_t count;
    const char **metadata;     /* key, value, key, value ... */
    size_t pairs;
};

/* What reading a header needs besides: the names so far, and whose word the error is. */
typedef struct moqi_st_reader {
    moq_st *st;
    moqi_arena arena; /* of the map */
    moqi_map names;   /* name -> index in tensors */
    int metadata;     /* __metadata__ was there */
    int judged;       /* the error is about an entry, not about the text */
} moqi_st_reader;

/* "[4096, 128]" */
static void moqi_shape_text(const uint64_t *shape, uint32_t rank, char *text, size_t capacity)
{
    size_t n = moqi_format(text, capacity, "[");
    for (uint32_t i = 0; i < rank && n < capacity; i++)
        n += moqi_format(text + n, capacity - n, "%s%llu", i ? ", " : "", (unsigned long long)shape[i]);
    if (n < capacity) moqi_format(text + n, capacity - n, "]");
}

/* Bytes of a tensor. The product leaves zero dimensions out, so that an absurd shape is refused wherever its zero stands. */
static moq_result moqi_tensor_bytes(moq_dtype dtype, const uint64_t *shape, uint32_t rank, uint64_t *bytes, moqi_where at, moq_error *err)
{
    uint64_t elements = 1, bits = 0;
    int empty = 0, fits = 1;
    char text[200];
    for (uint32_t i = 0; i < rank; i++) {
        if (shape[i] == 0) empty = 1;
        else fits = fits && moqi_mul(elements, shape[i], &elements);
    }
    fits = fits && moqi_mul(elements, (uint64_t)moq_dtype_bits(dtype), &bits);
    *bytes = empty ? 0 : bits / 8;
    if (fits && (empty || bits % 8 == 0)) return MOQ_OK;
    moqi_shape_text(shape, rank, text, sizeof text);
    if (!fits) return moqi_fail(err, MOQ_E_OVERFLOW, at, "shape %s of %s does not fit in 64 bits", text, moq_dtype_name(dtype));
    return moqi_fail(err, MOQ_E_SHAPE, at, "shape %s of %s is %llu bits, no whole number of bytes", text, moq_dtype_name(dtype),
                     (unsigned long long)bits);
}

/* ---- the frame: length, text, closing brace ---- */

/* Other kinds of file that often carry the name: what they begin with. */
static const struct { const char *magic; uint32_t bytes; const char *kind; } moqi_st_kinds[] = {
    {"version https://git-lfs", 23, "a Git-LFS pointer: run `git lfs pull`"},
    {"PK\003\004", 4, "a zip archive (a PyTorch .bin or .pt file?)"},
    {"\200\002", 2, "a Python pickle"}, {"\200\003", 2, "a Python pickle"}, {"\200\004", 2, "a Python pickle"},
    {"\200\005", 2, "a Python pickle"}, {"GGUF", 4, "a GGUF file"}, {"<!", 2, "an HTML page"}, {"<html", 5, "an HTML page"},
    {"<HTML", 5, "an HTML page"}, {"<?xml", 5, "an XML page"}, {"\211HDF", 4, "an HDF5 file"}, {"\037\213", 2, "a gzip archive"},
    {"{", 1, "a JSON text"}, {"[", 1, "a JSON text"}
};

/* What the file is if its first bytes say so, else NULL. Such bytes read as a length are far above the limit, or the file is tiny:
   the hint costs nothing and ends most bug reports. */
static const char *moqi_st_kind(const moqi_blob *b)
{
    for (size_t i = 0; i < MOQI_COUNT(moqi_st_kinds); i++)
        if (b->bytes >= moqi_st_kinds[i].bytes && memcmp(b->data, moqi_st_kinds[i].magic, moqi_st_kinds[i].bytes) == 0) return moqi_st_kinds[i].kind;
    return NULL;
}

/* The header length N, first 8 bytes, little-endian. 8 + N is never formed before N is known to be small: comparisons go by
   subtraction, before anything is allocated. The limit is decimal, as the reference reader has it. */
static moq_result moqi_st_length(const moq_st *st, uint64_t *length, moq_error *err)
{
    const moqi_blob *b = &st->blob;
    moqi_where at = moqi_at(st->file, NULL, NULL, 0);
    const char *kind = moqi_st_kind(b);
    const char *looks = kind ? "; this looks like " : "";
    unsigned long long bytes = b->bytes;
    if (!kind) kind = "";
    if (b->bytes < 10)
        return moqi_fail(err, MOQ_E_TRUNCATED, at, "the file has %llu bytes, a safetensors file at least 10%s%s. Download it again", bytes, looks,
                         kind);
    uint64_t n = moqi_load_u64(b->data), swapped = 0;
    for (int i = 0; i < 8; i++) swapped = swapped << 8 | b->data[i];
    if (n < 2 || n > MOQ_MAX_HEADER_BYTES) {
        if (!looks[0] && swapped >= 2 && swapped <= b->bytes - 8) kind = "; the byte order is wrong: the length must be little-endian";
        return moqi_fail(err, MOQ_E_LIMIT, at, "header length N = %llu, expected 2 to %llu (MOQ_MAX_HEADER_BYTES)%s%s",
                         (unsigned long long)n, (unsigned long long)MOQ_MAX_HEADER_BYTES, looks, kind);
    }
    if (n > b->bytes - 8)
        return moqi_fail(err, MOQ_E_TRUNCATED, at, "the header says %llu bytes but the file has %llu%s%s. The download is probably incomplete",
                         (unsigned long long)n, bytes, looks, kind);
    *length = n;
    return MOQ_OK;
}

/* What a look at braces and quotes alone tells about a header. */
typedef struct moqi_st_mark {
    size_t end;        /* byte after the brace that closes the first; SIZE_MAX: none does */
    size_t key, comma; /* the last key of the outer object that begins before `stop`, the last comma; 0: none */
    size_t commas;     /* of the outer object */
} moqi_st_mark;

/* Linear: strings are stepped over, so braces in names do not count. A key is fresh after `{` or `,` of the outer object, which
   tells keys from values without a grammar. */
static moqi_st_mark moqi_st_walk(const char *s, size_t n, size_t stop)
{
    moqi_st_mark m = {SIZE_MAX, 0, 0, 0};
    size_t depth = 0;
    int in_string = 0, fresh = 0;
    for (size_t i = 0; i < n; i++) {
        char c = s[i];
        if (in_string) {
            if (c == '\\') i++;
            else if (c == '"') in_string = 0;
        } else if (c == '"') {
            in_string = 1;
            if (depth == 1 && fresh && i < stop) m.key = i;
            fresh = 0;
        } else if (c == '{' || c == '[') {
            fresh = ++depth == 1;
        } else if (c == '}' || c == ']') {
            if (--depth == 0) { m.end = i + 1; return m; }
        } else if (c == ',' && depth == 1) {
            fresh = 1;
            m.commas++;
            if (i < stop) m.comma = i;
        }
    }
    return m;
}

/* ---- entries, in the order of the text ---- */

/* A value as messages show it: strings in quotes and escaped, numbers as spelled, the rest by their kind. */
static void moqi_st_value(const moq_json *v, char *text, size_t capacity)
{
    static const char *const words[] = {"null", "false", "true", "", "", "a list", "an object"};
    if (v->type == MOQ_JSON_STRING) moqi_format(text, capacity, "\"%q\"", v->text);
    else if (v->type == MOQ_JSON_NUMBER) moqi_format(text, capacity, "%q", v->text);
    else moqi_format(text, capacity, "%s", words[v->type]);
}

/* Digits and nothing else: no sign, fraction or exponent (the grammar refuses leading zeros). */
static int moqi_st_digits(const moq_json *v)
{
    if (v->type != MOQ_JSON_NUMBER) return 0;
    for (const char *s = v->text; *s; s++)
        if (*s < '0' || *s > '9') return 0;
    return 1;
}

/* Exact spelling: a reader that takes "f32" or "float32" lets files appear that no other reader opens. */
static moq_result moqi_st_dtype(const moq_json *v, moq_tensor *t, moqi_where at, moq_error *err)
{
    char got[160];
    t->dtype = v->type == MOQ_JSON_STRING ? moq_dtype_find(v->text, v->text_bytes) : MOQ_NONE;
    if (t->dtype != MOQ_NONE) return MOQ_OK;
    moqi_st_value(v, got, sizeof got);
    return moqi_fail(err, MOQ_E_DTYPE, at, "dtype %s is none of the format's 22 (F32, BF16, F16, F8_E4M3, U8, I32 ..., exactly so)", got);
}

/* Zero dimensions are legal (an empty tensor), and so is an empty list (one element). Parsers that go through a double would take
   2.0 and 2e0 and lose digits above 2^53: only the spelling decides. */
static moq_result moqi_st_shape(const moq_json *v, moq_tensor *t, moqi_where at, moq_error *err)
{
    char got[160];
    if (v->type != MOQ_JSON_ARRAY) {
        moqi_st_value(v, got, sizeof got);
        return moqi_fail(err, MOQ_E_SHAPE, at, "shape is %s, expected a list of whole numbers", got);
    }
    if (v->count > MOQ_MAX_RANK)
        return moqi_fail(err, MOQ_E_LIMIT, at, "shape has %u dimensions, at most %d are allowed (MOQ_MAX_RANK)", v->count, MOQ_MAX_RANK);
    for (const moq_json *e = moq_json_first(v); e; e = moq_json_next(v, e)) {
        int digits = moqi_st_digits(e);
        if (digits && moq_json_u64(e, &t->shape[t->rank])) { t->rank++; continue; }
        moqi_st_value(e, got, sizeof got);
        if (digits) return moqi_fail(err, MOQ_E_OVERFLOW, at, "dimension %s of the shape does not fit in 64 bits", got);
        return moqi_fail(err, MOQ_E_SHAPE, at, "dimension %u of the shape is %s, expected plain digits", t->rank, got);
    }
    return MOQ_OK;
}

/* [begin, end) relative to the data section; `range` gets both. An end beyond the section is the mark of a download that stopped:
   it has a code of its own, so that a caller can resume instead of giving up. */
static moq_result moqi_st_offsets(const moq_st *st, const moq_json *v, uint64_t *range, moqi_where at, moq_error *err)
{
    uint64_t section = st->blob.bytes - st->data_at;
    char got[160];
    if (v->type != MOQ_JSON_ARRAY || v->count != 2) {
        moqi_st_value(v, got, sizeof got);
        return moqi_fail(err, MOQ_E_OFFSETS, at, "data_offsets is %s with %u values, expected a list of two whole numbers", got, v->count);
    }
    for (int i = 0; i < 2; i++) {
        const moq_json *e = moq_json_at(v, (size_t)i);
        int digits = moqi_st_digits(e);
        if (digits && moq_json_u64(e, &range[i])) continue;
        moqi_st_value(e, got, sizeof got);
        if (digits) return moqi_fail(err, MOQ_E_OVERFLOW, at, "data_offsets holds %s, which does not fit in 64 bits", got);
        return moqi_fail(err, MOQ_E_OFFSETS, at, "data_offsets holds %s, expected plain digits", got);
    }
    unsigned long long begin = range[0], end = range[1];
    if (begin > end) return moqi_fail(err, MOQ_E_OFFSETS, at, "data_offsets [%llu, %llu] end before they begin", begin, end);
    if (end > section)
        return moqi_fail(err, MOQ_E_TRUNCATED, at, "its bytes end at %llu of a data section of %llu. The download is probably incomplete",
                         end, (unsigned long long)section);
    return MOQ_OK;
}

/* One tensor: {"dtype": ..., "shape": [...], "data_offsets": [begin, end]} in any order, nothing more, nothing less. Each member is
   judged where it stands; what needs all three comes after. Unknown keys are refused: a future format must not be half understood. */
static moq_result moqi_st_entry(const moq_st *st, const moq_json *v, moq_tensor *t, moq_error *err)
{
    static const char *const keys[3] = {"dtype", "shape", "data_offsets"};
    unsigned seen = 0;
    uint64_t range[2] = {0, 0}, bytes = 0;
    moqi_where at = moqi_at(st->file, "tensor", v->key, (int64_t)(8 + (uint64_t)v->offset));
    moq_result r = MOQ_OK;
    char got[160];
    if (v->type != MOQ_JSON_OBJECT) {
        moqi_st_value(v, got, sizeof got);
        return moqi_fail(err, MOQ_E_HEADER, at, "its entry is %s, expected an object (byte %lld)", got, (long long)at.offset);
    }
    for (const moq_json *e = moq_json_first(v); e && r == MOQ_OK; e = moq_json_next(v, e)) {
        unsigned which = 0;
        while (which < 3 && strcmp(e->key, keys[which]) != 0) which++;
        if (which == 3 || strlen(e->key) != e->key_bytes)
            return moqi_fail(err, MOQ_E_HEADER, at, "its entry has the unknown key '%q' (byte %llu)", e->key, 8 + (unsigned long long)e->offset);
        seen |= 1u << which;
        at.offset = (int64_t)(8 + (uint64_t)e->offset);
        r = which == 0 ? moqi_st_dtype(e, t, at, err) : which == 1 ? moqi_st_shape(e, t, at, err) : moqi_st_offsets(st, e, range, at, err);
    }
    if (r != MOQ_OK) return r;
    at.offset = (int64_t)(8 + (uint64_t)v->offset);
    for (unsigned i = 0; i < 3; i++)
        if (!(seen >> i & 1)) return moqi_fail(err, MOQ_E_HEADER, at, "its entry lacks the key '%s' (byte %lld)", keys[i], (long long)at.offset);
    r = moqi_tensor_bytes(t->dtype, t->shape, t->rank, &bytes, at, err);
    if (r != MOQ_OK) return r;
    t->bytes = range[1] - range[0];
    t->offset = st->data_at + range[0];
    if (t->bytes == bytes) return MOQ_OK;
    moqi_shape_text(t->shape, t->rank, got, sizeof got);
    return moqi_fail(err, MOQ_E_OFFSETS, at, "data_offsets span %llu bytes, but shape %s of %s takes %llu",
                     (unsigned long long)t->bytes, got, moq_dtype_name(t->dtype), (unsigned long long)bytes);
}

/* What is wrong with a tensor name, or NULL. Names go to terminals, logs and file systems: no control bytes. */
static const char *moqi_st_bad_name(const char *s, size_t n)
{
    if (n == 0) return "the name is empty";
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)s[i] < 0x20 || s[i] == 0x7f) return "the name holds a control byte";
    return NULL;
}

/* The first bytes of a text that may hold a NUL, printable, for messages. */
static const char *moqi_escape(const char *s, size_t n, char *text, size_t capacity)
{
    char one[2] = {0, 0};
    moqi_text t = {text, capacity, 0};
    for (size_t i = 0; i < n && t.need + 8 < capacity; i++) {
        one[0] = s[i];
        if (one[0]) moqi_put_escaped(&t, one, 1);
        else moqi_puts(&t, "\\x00", 4);
    }
    moqi_text_end(&t);
    return text;
}

/* The entry's key becomes the tensor's name, a copy that outlives the JSON. Long and hostile names are shown cut and escaped. */
static moq_result moqi_st_name(moq_st *st, const moq_json *v, moq_tensor *t, moq_error *err)
{
    char shown[80] = "";
    const char *wrong = moqi_st_bad_name(v->key, v->key_bytes);
    moqi_where at = moqi_at(st->file, "tensor", shown, (int64_t)(8 + (uint64_t)v->offset));
    if (wrong || v->key_bytes > MOQ_MAX_NAME_BYTES) moqi_escape(v->key, v->key_bytes, shown, sizeof shown);
    if (wrong) return moqi_fail(err, MOQ_E_HEADER, at, "%s (byte %lld)", wrong, (long long)at.offset);
    if (v->key_bytes > MOQ_MAX_NAME_BYTES)
        return moqi_fail(err, MOQ_E_LIMIT, at, "the name has %u bytes, at most %u are allowed (MOQ_MAX_NAME_BYTES)", v->key_bytes,
                         MOQ_MAX_NAME_BYTES);
    t->name = moqi_take_text(&st->arena, v->key, v->key_bytes);
    t->name_bytes = v->key_bytes;
    return t->name ? MOQ_OK : moqi_nomem(err, v->key_bytes);
}

/* __metadata__: an object of strings, kept as pairs in the order of the text. Keys are unique: the parser has seen to it. */
static moq_result moqi_st_metadata(moq_st *st, const moq_json *v, moq_error *err)
{
    moqi_where at = moqi_at(st->file, "key", "__metadata__", (int64_t)(8 + (uint64_t)v->offset));
    char got[160];
    if (v->type != MOQ_JSON_OBJECT) {
        moqi_st_value(v, got, sizeof got);
        return moqi_fail(err, MOQ_E_HEADER, at, "the value is %s, expected an object of strings", got);
    }
    st->metadata = (const char **)moqi_take_array(&st->arena, (uint64_t)v->count * 2, sizeof(char *));
    if (!st->metadata) return moqi_nomem(err, (uint64_t)v->count * 2 * sizeof(char *));
    for (const moq_json *e = moq_json_first(v); e; e = moq_json_next(v, e)) {
        at.object = e->key;
        at.offset = (int64_t)(8 + (uint64_t)e->offset);
        if (e->type != MOQ_JSON_STRING) {
            moqi_st_value(e, got, sizeof got);
            return moqi_fail(err, MOQ_E_HEADER, at, "the value in __metadata__ is %s, expected a string", got);
        }
        const char *key = moqi_take_text(&st->arena, e->key, e->key_bytes);
        const char *value = moqi_take_text(&st->arena, e->text, e->text_bytes);
        if (!key || !value) return moqi_nomem(err, (uint64_t)e->key_bytes + e->text_bytes);
        st->metadata[2 * st->pairs] = key;
        st->metadata[2 * st->pairs++ + 1] = value;
    }
    return MOQ_OK;
}

/* One entry of the outer object as the parser reaches it, so that the first wrong one is the one reported. A second value under one
   name would mean different things to different programs. */
static moq_result moqi_st_member(void *user, const moq_json *v, moq_error *err)
{
    moqi_st_reader *r = (moqi_st_reader *)user;
    moq_st *st = r->st;
    moqi_where at = moqi_at(st->file, NULL, NULL, (int64_t)(8 + (uint64_t)v->offset));
    int metadata = strcmp(v->key, "__metadata__") == 0 && v->key_bytes == 12;
    r->judged = 1;
    if (metadata ? r->metadata : moqi_map_find(&r->names, v->key, v->key_bytes) != NULL) {
        at.kind = "entry";
        at.object = v->key;
        return moqi_fail(err, MOQ_E_DUPLICATE, at, "occurs twice in the header, the second time at byte %lld; remove one", (long long)at.offset);
    }
    if (!metadata && st->count == MOQ_MAX_TENSORS)
        return moqi_fail(err, MOQ_E_LIMIT, at, "the file has more than %u tensors (MOQ_MAX_TENSORS)", (unsigned)MOQ_MAX_TENSORS);
    moq_result e = MOQ_OK;
    if (metadata) {
        e = moqi_st_metadata(st, v, err);
        r->metadata = 1;
    } else {
        moq_tensor *t = &st->tensors[st->count];
        e = moqi_st_name(st, v, t, err);
        if (e == MOQ_OK) e = moqi_st_entry(st, v, t, err);
        if (e == MOQ_OK) moqi_map_add(&r->names, t->name, t->name_bytes, (uint32_t)st->count);
        st->count++;
    }
    r->judged = e != MOQ_OK;
    return e;
}

/* ---- the whole data section, each byte with one owner ---- */

/* Equal starts: the empty range first, so that two tensors may meet at a point. Equal ranges keep the order of the header. */
static int moqi_st_by_range(const void *a, const void *b)
{
    const moq_tensor *x = (const moq_tensor *)a, *y = (const moq_tensor *)b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

/* Bytewise, the same on every system. */
static int moqi_st_by_name(const void *a, const void *b) { return strcmp(((const moq_tensor *)a)->name, ((const moq_tensor *)b)->name); }

/* Tensors in offset order must touch: the first begins at 0, each where the one before ends, the last ends with the file. So no byte
   has two owners (writing one tensor would change another) and none has no owner (nothing can hide between them). */
static moq_result moqi_st_ranges(const moq_st *st, moq_error *err)
{
    uint64_t end = st->data_at;
    const moq_tensor *before = NULL;
    for (size_t i = 0; i < st->count; i++) {
        const moq_tensor *t = st->sorted[i];
        unsigned long long first = t->offset - st->data_at, last = first + t->bytes, reached = end - st->data_at;
        moqi_where at = moqi_at(st->file, "tensor", t->name, (int64_t)t->offset);
        if (t->offset < end)
            return moqi_fail(err, MOQ_E_OVERLAP, at, "bytes %llu..%llu overlap tensor '%q' %llu..%llu (byte %llu + offset). "
                             "No safetensors library writes this", first, last, before ? before->name : "",
                             (unsigned long long)(before ? before->offset - st->data_at : 0), reached, (unsigned long long)st->data_at);
        if (t->offset > end)
            return moqi_fail(err, MOQ_E_HOLE, at, "%llu bytes before it (%llu..%llu, after %s%q%s) belong to no tensor",
                             first - reached, reached, first, before ? "tensor '" : "the ", before ? before->name : "header", before ? "'" : "");
        end = t->offset + t->bytes;
        before = t;
    }
    if (end < st->blob.bytes)
        return moqi_fail(err, MOQ_E_HOLE, moqi_at(st->file, NULL, NULL, (int64_t)end),
                         "%llu bytes after the last tensor belong to nobody (the file has %llu)",
                         (unsigned long long)(st->blob.bytes - end), (unsigned long long)st->blob.bytes);
    return MOQ_OK;
}

/* Sorts unless the list is in order already, as writers that follow the offsets leave it. */
static void moqi_st_sort(const void **list, const void **scratch, size_t n, moqi_compare_fn compare)
{
    size_t i = 1;
    while (i < n && compare(list[i - 1], list[i]) <= 0) i++;
    if (i < n) moqi_sort(list, scratch, n, compare);
}

/* Range rules, then the order by name. Only pointers are sorted: a tensor is larger than the bytes that compare it. */
static moq_result moqi_st_order(moq_st *st, moq_error *err)
{
    size_t bytes = (st->count + 1) * sizeof(void *);
    const void **scratch = (const void **)moq_allocate(&st->arena.a, bytes);
    st->sorted = (const moq_tensor **)moqi_take(&st->arena, bytes, sizeof(void *));
    moq_result r = scratch && st->sorted ? MOQ_OK : moqi_nomem(err, bytes);
    if (r == MOQ_OK) {
        for (size_t i = 0; i < st->count; i++) st->sorted[i] = &st->tensors[i];
        moqi_st_sort((const void **)st->sorted, scratch, st->count, moqi_st_by_range);
        r = moqi_st_ranges(st, err);
        moqi_st_sort((const void **)st->sorted, scratch, st->count, moqi_st_by_name);
    }
    moq_release(&st->arena.a, (void *)scratch, bytes);
    return r;
}

/* The JSON parser refused the text: say so with the entry that holds the place. */
static moq_result moqi_st_refuse(const moq_st *st, const char *text, size_t bytes, const moq_error *json, moq_error *err)
{
    char name[80] = "";
    size_t at = json->offset < 0 ? 0 : (size_t)json->offset;
    moqi_st_mark m = moqi_st_walk(text, bytes, at + 1);
    for (size_t i = 0; m.key > m.comma && i + 1 < sizeof name && m.key + 1 + i < bytes && text[m.key + 1 + i] != '"'; i++) name[i] = text[m.key + 1 + i];
    return moqi_fail(err, json->code, moqi_at(st->file, name[0] ? "entry" : NULL, name[0] ? name : NULL, (int64_t)(8 + at)),
                     "%s (byte %llu of the file)", json->text, 8 + (unsigned long long)at);
}

/* Rules of the text as a whole: encoding, first byte, padding. *used: the bytes up to the closing brace. The encoding is checked
   over all of N, also behind the brace, and before the parser sees a byte. */
static moq_result moqi_st_frame(const moq_st *st, const char *text, size_t bytes, size_t *used, moq_error *err)
{
    size_t bad = 0;
    if (!moqi_utf8_valid((const uint8_t *)text, bytes, &bad) || (bytes >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0))
        return moqi_fail(err, MOQ_E_UTF8, moqi_at(st->file, NULL, NULL, (int64_t)(8 + bad)),
                         "the header is not plain UTF-8 (byte 0x%02x at byte %llu). "
                         "The file is damaged or was not written by a safetensors library", (unsigned)(unsigned char)text[bad], 8 + (unsigned long long)bad);
    if (text[0] != '{')
        return moqi_fail(err, MOQ_E_HEADER, moqi_at(st->file, NULL, NULL, 8), "the header begins with byte 0x%02x '%c', expected '{' (byte 8)",
                         (unsigned)(unsigned char)text[0], text[0] >= 0x20 && text[0] < 0x7f ? text[0] : '?');
    while (text[bytes - 1] == ' ') bytes--;
    *used = bytes;
    return MOQ_OK;
}

/* Room for the entries: their number follows from the commas of the outer object, and never exceeds MOQ_MAX_TENSORS, so a header of
   100 MB cannot ask for more memory than that. */
static moq_result moqi_st_room(moqi_st_reader *r, const char *text, size_t used, moq_error *err)
{
    moqi_st_mark m = moqi_st_walk(text, used, 0);
    size_t most = m.commas + 1 < MOQ_MAX_TENSORS ? m.commas + 1 : MOQ_MAX_TENSORS;
    r->st->tensors = (moq_tensor *)moqi_take_array(&r->st->arena, most, sizeof(moq_tensor));
    return r->st->tensors && moqi_map_make(&r->names, &r->arena, most) ? MOQ_OK : moqi_nomem(err, (uint64_t)most * sizeof(moq_tensor));
}

/* The entries of a header whose text ends at `used`, in one pass and in the order of the bytes: the first error is the one
   reported, whether the JSON is broken there or an entry is wrong. */
static moq_result moqi_st_header(moqi_st_reader *r, const char *text, size_t used, moq_error *err)
{
    moq_st *st = r->st;
    moq_error json;
    moq_result e = moqi_st_room(r, text, used, err);
    if (e != MOQ_OK) return e;
    moq_json_doc *doc = moqi_json_parse(text, used, MOQ_JSON_STRICT, MOQI_ST_DEPTH, NULL, moqi_st_member, r, &st->arena.a, &json);
    size_t end = doc && text[used - 1] == '}' ? used : moqi_st_walk(text, used, 0).end;
    moq_json_destroy(doc);
    if (doc && end == used) return MOQ_OK;
    if (!doc && (r->judged || json.code == MOQ_E_NOMEM)) {
        if (err) *err = json;
        return json.code;
    }
    if (end >= used) return moqi_st_refuse(st, text, used, &json, err);
    /* the parser takes any blank after the brace, the format only spaces */
    return moqi_fail(err, MOQ_E_HEADER, moqi_at(st->file, NULL, NULL, (int64_t)(8 + end)),
                     "byte 0x%02x follows the closing brace of the header (byte %llu), only spaces may", (unsigned)(unsigned char)text[end],
                     8 + (unsigned long long)end);
}

/* Check st->blob and fill the rest. The header is copied first, so that a file that changes meanwhile cannot be read two ways. */
static moq_result moqi_st_parse(moq_st *st, moq_error *err)
{
    uint64_t bytes = 0;
    size_t used = 0;
    moq_result r = moqi_st_length(st, &bytes, err);
    if (r != MOQ_OK) return r;
    st->data_at = 8 + bytes;
    char *text = (char *)moq_allocate(&st->arena.a, (size_t)bytes);
    if (!text) return moqi_nomem(err, bytes);
    memcpy(text, st->blob.data + 8, (size_t)bytes);
    r = moqi_st_frame(st, text, (size_t)bytes, &used, err);
    if (r == MOQ_OK) {
        moqi_st_reader reader;
        memset(&reader, 0, sizeof reader);
        reader.st = st;
        reader.arena = moqi_arena_make(&st->arena.a);
        r = moqi_st_header(&reader, text, used, err);
        moqi_arena_drop(&reader.arena);
    }
    moq_release(&st->arena.a, text, (size_t)bytes);
    return r == MOQ_OK ? moqi_st_order(st, err) : r;
}

/* A file from its bytes, which it takes over, also on failure. Data pointers are set last: until then nothing can touch the data. */
static moq_st *moqi_st_make(moqi_blob *blob, const char *name, const moq_allocator *a, moq_error *err)
{
    moqi_arena arena = moqi_arena_make(a);
    moq_st *st = (moq_st *)moqi_take(&arena, sizeof(moq_st), 16);
    moq_result r = MOQ_OK;
    if (!st) {
        moqi_nomem(err, sizeof(moq_st));
        moqi_arena_drop(&arena);
        moqi_blob_close(blob, a);
        return NULL;
    }
    st->arena = arena;
    st->blob = *blob;
    st->file = moqi_take_text(&st->arena, name, strlen(name));
    r = st->file ? moqi_st_parse(st, err) : moqi_nomem(err, strlen(name) + 1);
    for (size_t i = 0; i < st->count && r == MOQ_OK; i++) st->tensors[i].data = st->blob.data + (size_t)st->tensors[i].offset;
    if (r == MOQ_OK) return st;
    moq_st_close(st);
    return NULL;
}

MOQ_API moq_st *moq_st_open(const char *path, const moq_open_desc *desc, moq_error *err)
{
    moqi_blob blob;
    const moq_allocator *a = desc ? &desc->allocator : NULL;
    moqi_clear(err);
    if (!path) { moq_fail(err, MOQ_E_ARG, "moq_st_open", "path is NULL"); return NULL; }
    const char *name = moqi_base_name(path);
    if (moqi_blob_open(&blob, path, name, desc && desc->flags & MOQ_OPEN_READ, a, err) != MOQ_OK) return NULL;
    return moqi_st_make(&blob, name, a, err);
}

MOQ_API moq_st *moq_st_open_memory(const void *data, size_t bytes, const char *name, const moq_open_desc *desc, moq_error *err)
{
    moqi_blob blob;
    moqi_clear(err);
    if (!data && bytes) { moq_fail(err, MOQ_E_ARG, "moq_st_open_memory", "data is NULL"); return NULL; }
    memset(&blob, 0, sizeof blob);
    blob.data = (const uint8_t *)data;
    blob.bytes = bytes;
    return moqi_st_make(&blob, name ? name : "", desc ? &desc->allocator : NULL, err);
}

/* The mapping goes first; views of the tensors die with it. */
MOQ_API void moq_st_close(moq_st *st)
{
    if (!st) return;
    moqi_arena arena = st->arena; /* st lies in it */
    moqi_blob_close(&st->blob, &arena.a);
    moqi_arena_drop(&arena);
}

MOQ_API size_t moq_st_count(const moq_st *st) { return st ? st->count : 0; }

MOQ_API const moq_tensor *moq_st_get(const moq_st *st, size_t index) { return st && index < st->count ? st->sorted[index] : NULL; }

MOQ_API const moq_tensor *moq_st_find(const moq_st *st, const char *name)
{
    size_t lo = 0, hi = st && name ? st->count : 0;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        int order = strcmp(st->sorted[mid]->name, name);
        if (order == 0) return st->sorted[mid];
        if (order < 0) lo = mid + 1;
        else hi = mid;
    }
    return NULL;
}

MOQ_API const char *moq_st_metadata(const moq_st *st, const char *key)
{
    for (size_t i = 0; st && key && i < st->pairs; i++)
        if (strcmp(st->metadata[2 * i], key) == 0) return st->metadata[2 * i + 1];
    return NULL;
}

/* ---- writer ---- */

/* What the caller gave must be a tensor that the reader would take. Broken conditions are E_ARG; impossible tensors have the reader's
   own codes. */
static moq_result moqi_st_check_written(const moq_tensor *t, const char *file, moq_error *err)
{
    moqi_where at = moqi_at(file, "tensor", t->name, -1);
    uint64_t bytes = 0;
    size_t bad = 0, n = t->name ? strlen(t->name) : 0;
    const char *wrong = moqi_st_bad_name(t->name, n);
    if (wrong) return moqi_fail(err, MOQ_E_ARG, at, "%s", wrong);
    if (strcmp(t->name, "__metadata__") == 0) return moqi_fail(err, MOQ_E_ARG, at, "this name is reserved by the format");
    if (n > MOQ_MAX_NAME_BYTES) return moqi_fail(err, MOQ_E_LIMIT, at, "the name has %zu bytes, at most %u are allowed (MOQ_MAX_NAME_BYTES)", n,
                                                 MOQ_MAX_NAME_BYTES);
    if (!moqi_utf8_valid((const uint8_t *)t->name, n, &bad)) return moqi_fail(err, MOQ_E_UTF8, at, "byte %zu of the name is not UTF-8", bad);
    if (moq_dtype_find(moq_dtype_name(t->dtype), strlen(moq_dtype_name(t->dtype))) == MOQ_NONE)
        return moqi_fail(err, MOQ_E_DTYPE, at, "dtype %s cannot be stored in a safetensors file", moq_dtype_name(t->dtype));
    if (t->rank > MOQ_MAX_RANK) return moqi_fail(err, MOQ_E_LIMIT, at, "rank %u, at most %d is allowed (MOQ_MAX_RANK)", t->rank, MOQ_MAX_RANK);
    moq_result r = moqi_tensor_bytes(t->dtype, t->shape, t->rank, &bytes, at, err);
    if (r != MOQ_OK) return r;
    if (t->bytes != bytes)
        return moqi_fail(err, MOQ_E_ARG, at, "%llu bytes given, but its shape and dtype take %llu", (unsigned long long)t->bytes,
                         (unsigned long long)bytes);
    return t->data || bytes == 0 ? MOQ_OK : moqi_fail(err, MOQ_E_ARG, at, "data is NULL");
}

/* Widest elements first, so that every tensor is aligned to its own element; then by name. */
static int moqi_st_by_width(const void *a, const void *b)
{
    int x = moq_dtype_bits(((const moq_tensor *)a)->dtype), y = moq_dtype_bits(((const moq_tensor *)b)->dtype);
    return x != y ? y - x : moqi_st_by_name(a, b);
}

/* 8 bytes of length, the header, spaces up to a multiple of 8: the data section begins aligned to every dtype's width, and because the
   widest tensors come first each later one does too. Offsets count from there. */
static void moqi_st_build(moqi_json_out *o, const moq_tensor *const *sorted, size_t count, const char *const *metadata, size_t pairs)
{
    uint64_t at = 0;
    moqi_json_raw(o, "        ", 8);
    moqi_json_begin(o, '{');
    if (pairs) {
        moqi_json_put_key(o, "__metadata__");
        moqi_json_begin(o, '{');
        for (size_t i = 0; i < pairs; i++) {
            moqi_json_put_key(o, metadata[2 * i]);
            moqi_json_put_string(o, metadata[2 * i + 1]);
        }
        moqi_json_end(o, '}');
    }
    for (size_t i = 0; i < count; i++) {
        const moq_tensor *t = sorted[i];
        moqi_json_put_key(o, t->name);
        moqi_json_begin(o, '{');
        moqi_json_put_key(o, "dtype");
        moqi_json_put_string(o, moq_dtype_name(t->dtype));
        moqi_json_put_key(o, "shape");
        moqi_json_begin(o, '[');
        for (uint32_t k = 0; k < t->rank; k++) moqi_json_put_u64(o, t->shape[k]);
        moqi_json_end(o, ']');
        moqi_json_put_key(o, "data_offsets");
        moqi_json_begin(o, '[');
        moqi_json_put_u64(o, at);
        moqi_json_put_u64(o, at += t->bytes);
        moqi_json_end(o, ']');
        moqi_json_end(o, '}');
    }
    moqi_json_end(o, '}');
    moqi_json_raw(o, "        ", (8 - o->b.bytes % 8) % 8);
    for (size_t i = 0; i < 8 && o->failed == MOQ_OK; i++) o->b.data[i] = (uint8_t)((uint64_t)(o->b.bytes - 8) >> (8 * i));
}

/* Our own reader must take the header before a byte of it is written: this also finds double names and sizes over the limits. */
static moq_result moqi_st_proofread(const moqi_buffer *header, uint64_t data_bytes, const char *file, moq_error *err)
{
    moq_st st;
    memset(&st, 0, sizeof st);
    st.arena = moqi_arena_make(&header->a);
    st.file = file;
    st.blob.data = header->data;
    st.blob.bytes = header->bytes + data_bytes;
    moq_result r = moqi_st_parse(&st, err);
    moqi_arena_drop(&st.arena);
    return r;
}

/* The only part that writes. The writer's target stays as it was until commit; an empty tensor has no bytes to put. */
static moq_result moqi_st_put(const char *path, const moqi_buffer *header, const moq_tensor *const *sorted, size_t count, moq_error *err)
{
    moqi_writer w;
    moq_result r = moqi_writer_open(&w, path, err);
    if (r != MOQ_OK) return r;
    r = moqi_writer_put(&w, header->data, header->bytes, err);
    for (size_t i = 0; i < count && r == MOQ_OK; i++)
        if (sorted[i]->bytes) r = moqi_writer_put(&w, sorted[i]->data, (size_t)sorted[i]->bytes, err);
    if (r == MOQ_OK) return moqi_writer_commit(&w, err);
    moqi_writer_abort(&w);
    return r;
}

MOQ_API moq_result moq_st_write(const char *path, const moq_tensor *tensors, size_t count, const char *const *metadata, size_t pairs,
                                const moq_allocator *a, moq_error *err)
{
    uint64_t data_bytes = 0;
    moq_result r = MOQ_OK;
    moqi_json_out o;
    moqi_clear(err);
    if (!path || (!tensors && count) || (!metadata && pairs)) return moq_fail(err, MOQ_E_ARG, "moq_st_write", "path, tensors or metadata is NULL");
    const char *file = moqi_base_name(path);
    for (size_t i = 0; i < count && r == MOQ_OK; i++) {
        r = moqi_st_check_written(&tensors[i], file, err);
        if (r == MOQ_OK && !moqi_add(data_bytes, tensors[i].bytes, &data_bytes)) r = moqi_fail(err, MOQ_E_OVERFLOW, moqi_at(file, NULL, NULL, -1),
                                                                                               "more than 2^64 bytes of tensors");
    }
    for (size_t i = 0; i < 2 * pairs && r == MOQ_OK; i++) {
        if (!metadata[i]) r = moq_fail(err, MOQ_E_ARG, "moq_st_write", "text %zu of the metadata is NULL", i);
        else if (!moqi_utf8_valid((const uint8_t *)metadata[i], strlen(metadata[i]), NULL))
            r = moqi_fail(err, MOQ_E_UTF8, moqi_at(file, "metadata", metadata[i], -1), "the text is not UTF-8");
    }
    if (r != MOQ_OK) return r;
    moqi_arena arena = moqi_arena_make(a);
    const moq_tensor **sorted = (const moq_tensor **)moqi_take_array(&arena, (uint64_t)count + 1, 2 * sizeof(void *));
    moqi_json_out_make(&o, a, 0);
    if (sorted) {
        for (size_t i = 0; i < count; i++) sorted[i] = &tensors[i];
        moqi_sort((const void **)sorted, (const void **)sorted + count, count, moqi_st_by_width);
        moqi_st_build(&o, sorted, count, metadata, pairs);
    }
    if (!sorted || o.failed != MOQ_OK) r = moqi_nomem(err, (uint64_t)count * 2 * sizeof(void *) + o.b.bytes);
    if (r == MOQ_OK) r = moqi_st_proofread(&o.b, data_bytes, file, err);
    if (r == MOQ_OK) r = moqi_st_put(path, &o.b, sorted, count, err);
    moqi_buffer_drop(&o.b);
    moqi_arena_drop(&arena);
    return r;
}

/* ------------------------------------------------------------------------------------------------
   >>scheme          names of schemes and KV formats, the recipe table
   Pure functions over const tables; nothing allocates.
   ------------------------------------------------------------------------------------------------ */

/* Codings, in the order of moq_coding: elem, group_rows, group_cols, scale, has_global, dynamic, zero_point, rule. */
#define MOQI_WIDE         {MOQ_NONE, 0, 0, MOQ_NONE, 0, 0, 0, 0}
#define MOQI_NVFP4        {MOQ_F4, 1, 16, MOQ_F8_E4M3, 1, 0, 0, 0}
#define MOQI_NVFP4_G32    {MOQ_F4, 1, 32, MOQ_F8_E4M3, 1, 0, 0, 0}
#define MOQI_NVFP4_IN     {MOQ_F4, 1, 16, MOQ_F8_E4M3, 1, 1, 0, 0} /* static global scale, block scales at run time */
#define MOQI_MX(elem)     {elem, 1, 32, MOQ_F8_E8M0, 0, 0, 0, 0}
#define MOQI_MX_IN(elem)  {elem, 1, 32, MOQ_F8_E8M0, 0, 1, 0, MOQ_RULE_E8M0_CEIL}
#define MOQI_TENSOR(elem) {elem, MOQ_ALL, MOQ_ALL, MOQ_F32, 0, 0, 0, 0}
#define MOQI_ROW(elem)    {elem, 1, MOQ_ALL, MOQ_F32, 0, 0, 0, 0} /* a scale per output channel */
#define MOQI_TOKEN(elem)  {elem, 1, MOQ_ALL, MOQ_F32, 0, 1, 0, 0} /* an input scale per token, found at run time */
#define MOQI_BLOCK128     {MOQ_F8_E4M3, 128, 128, MOQ_F32, 0, 0, 0, 0}
#define MOQI_GROUP128_IN  {MOQ_F8_E4M3, 1, 128, MOQ_F32, 0, 1, 0, 0}
#define MOQI_GROUP128(elem) {elem, 1, 128, MOQ_F32, 0, 0, 0, 0}
#define MOQI_AWQ_W4A8     {MOQ_I4, 1, 128, MOQ_F32, 1, 0, 0, 0} /* the global scale is that of the second rounding, to E4M3 */
#define MOQI_PLAIN(elem)  {elem, 0, 0, MOQ_NONE, 0, 0, 0, 0}
#define MOQI_ANY_GROUP(elem) {elem, 0, 0, MOQ_F32, 0, 0, 0, 0}

/* Which name goes with which numbers. Readers and quantizers build codings from the macros above, so a format is written down once:
     weight of nvfp4    E2M1 codes, E4M3 scale per 16 columns, times one F32        W = code * scale * global
     weight of mx...    codes of the element type, E8M0 scale per 32 columns        W = code * 2^(scale - 127)
     row, tensor        one F32 scale per output row, or one in all                 W = code * scale
     block128           one F32 scale per 128 x 128 weights (DeepSeek)              W = code * scale
     group128           one scale per 128 columns of a row (INT4)                   W = (code - zero) * scale */
typedef struct moqi_named_scheme {
    const char *name;
    moq_scheme scheme; /* weight, input, pre_quant_scale, act_order, requantize_fp8, hadamard, lora_rank */
} moqi_named_scheme;

/* How to read a name: bits or format of the weight, w4a16 where that is not clear from it, then suffixes.
     _g128 _pc _pt _b128x128   weight scales: groups of 128 columns, one per row, one per tensor, blocks
     _sbf16                    their dtype, where it is not the usual one of the row
     _global _dyn _zp _rule2   second-level scale, dynamic, zero points, moq_scale_rule
     _ag32 _atoken _apt ...    the same of the input, after an a
     _pqs _actorder _requant _hadamard _r16
                               pre_quant_scale, group index, second rounding to E4M3, rotated input, low rank
   A flag followed by 0 says that this scheme lacks what the row has ("nvfp4_aglobal0"). */

/* The names of schemes. A scheme is called by the row that it differs least from (the first of equals), followed by a suffix for
   every field that differs, so different schemes never share a name. Integers name their group always. */
static const moqi_named_scheme moqi_scheme_rows[] = {
    {"bf16",           {MOQI_PLAIN(MOQ_BF16), MOQI_WIDE, 0, 0, 0, 0, 0}},
    {"f16",            {MOQI_PLAIN(MOQ_F16), MOQI_WIDE, 0, 0, 0, 0, 0}},
    {"f32",            {MOQI_PLAIN(MOQ_F32), MOQI_WIDE, 0, 0, 0, 0, 0}},
    {"nvfp4",          {MOQI_NVFP4, MOQI_NVFP4_IN, 0, 0, 0, 0, 0}},
    {"nvfp4_awq",      {MOQI_NVFP4, MOQI_NVFP4_IN, 1, 0, 0, 0, 0}},
    {"nvfp4_svd",      {MOQI_NVFP4, MOQI_NVFP4_IN, 1, 0, 0, 0, 32}},
    {"w4a16_nvfp4",    {MOQI_NVFP4, MOQI_WIDE, 0, 0, 0, 0, 0}},
    {"w4a8_nvfp4_fp8", {MOQI_NVFP4_G32, MOQI_TENSOR(MOQ_F8_E4M3), 0, 0, 0, 0, 0}},
    {"mxfp4",          {MOQI_MX(MOQ_F4), MOQI_MX_IN(MOQ_F4), 0, 0, 0, 0, 0}},
    {"w4a16_mxfp4",    {MOQI_MX(MOQ_F4), MOQI_WIDE, 0, 0, 0, 0, 0}},
    {"w4a8_mxfp4_fp8", {MOQI_MX(MOQ_F4), MOQI_TOKEN(MOQ_F8_E4M3), 0, 0, 0, 0, 0}},
    {"mxfp6",          {MOQI_MX(MOQ_F6_E3M2), MOQI_MX_IN(MOQ_F6_E3M2), 0, 0, 0, 0, 0}},
    {"mxfp6_e2m3",     {MOQI_MX(MOQ_F6_E2M3), MOQI_MX_IN(MOQ_F6_E2M3), 0, 0, 0, 0, 0}},
    {"mxfp8",          {MOQI_MX(MOQ_F8_E4M3), MOQI_MX_IN(MOQ_F8_E4M3), 0, 0, 0, 0, 0}},
    {"w8a16_mxfp8",    {MOQI_MX(MOQ_F8_E4M3), MOQI_WIDE, 0, 0, 0, 0, 0}},
    {"mxint8",         {MOQI_MX(MOQ_I8), MOQI_MX_IN(MOQ_I8), 0, 0, 0, 0, 0}},
    {"fp8",            {MOQI_TENSOR(MOQ_F8_E4M3), MOQI_TENSOR(MOQ_F8_E4M3), 0, 0, 0, 0, 0}},
    {"fp8_pc_pt",      {MOQI_ROW(MOQ_F8_E4M3), MOQI_TOKEN(MOQ_F8_E4M3), 0, 0, 0, 0, 0}},
    {"fp8_block128",   {MOQI_BLOCK128, MOQI_GROUP128_IN, 0, 0, 0, 0, 0}},
    {"fp8_pb_wo",      {MOQI_BLOCK128, MOQI_WIDE, 0, 0, 0, 0, 0}},
    {"w8a16_fp8",      {MOQI_TENSOR(MOQ_F8_E4M3), MOQI_WIDE, 0, 0, 0, 0, 0}},
    {"w8a16_fp8_pc",   {MOQI_ROW(MOQ_F8_E4M3), MOQI_WIDE, 0, 0, 0, 0, 0}},
    {"int8",           {MOQI_ROW(MOQ_I8), MOQI_TENSOR(MOQ_I8), 0, 0, 0, 0, 0}},
    {"int8_sq",        {MOQI_ROW(MOQ_I8), MOQI_TENSOR(MOQ_I8), 1, 0, 0, 0, 0}},
    {"int8_pc_pt",     {MOQI_ROW(MOQ_I8), MOQI_TOKEN(MOQ_I8), 0, 0, 0, 0, 0}},
    {"w8a16",          {MOQI_ROW(MOQ_I8), MOQI_WIDE, 0, 0, 0, 0, 0}},
    {"int4_awq",       {MOQI_GROUP128(MOQ_I4), MOQI_WIDE, 1, 0, 0, 0, 0}},
    {"w4a8_awq",       {MOQI_AWQ_W4A8, MOQI_TENSOR(MOQ_F8_E4M3), 1, 0, 1, 0, 0}},
    {"int4",           {MOQI_ANY_GROUP(MOQ_I4), MOQI_WIDE, 0, 0, 0, 0, 0}},
    {"w4a8_int4",      {MOQI_ANY_GROUP(MOQ_I4), MOQI_TOKEN(MOQ_I8), 0, 0, 0, 0, 0}},
    {"w4a8_int4_fp8",  {MOQI_ANY_GROUP(MOQ_I4), MOQI_TOKEN(MOQ_F8_E4M3), 0, 0, 0, 0, 0}}
};

/* The fields of a scheme: how two schemes differ and what a suffix says about it. */
typedef enum moqi_field {
    MOQI_F_W_GROUP, MOQI_F_W_SCALE, MOQI_F_W_GLOBAL, MOQI_F_W_DYNAMIC, MOQI_F_W_ZERO, MOQI_F_W_RULE, MOQI_F_A_GROUP, MOQI_F_A_SCALE,
    MOQI_F_A_GLOBAL, MOQI_F_A_DYNAMIC, MOQI_F_A_ZERO, MOQI_F_A_RULE, MOQI_F_SMOOTH, MOQI_F_ORDER, MOQI_F_REQUANT, MOQI_F_HADAMARD,
    MOQI_F_LORA, MOQI_F_COUNT
} moqi_field;

MOQ_API int moq_scheme_is_quantized(const moq_scheme *s)
{
    moq_dtype e = s ? s->weight.elem : MOQ_NONE;
    return e != MOQ_NONE && e != MOQ_BF16 && e != MOQ_F16 && e != MOQ_F32 && e != MOQ_F64;
}

/* Differences are found and printed field by field through one function, so that a new field cannot be forgotten in one of them. */
/* The value of one field as a number; both group lengths in one, so that a suffix can say them together. */
static int64_t moqi_scheme_field(const moq_scheme *s, int field)
{
    const moq_coding *c = field < MOQI_F_A_GROUP ? &s->weight : &s->input;
    switch (field < MOQI_F_SMOOTH ? field % MOQI_F_A_GROUP : field) {
    case MOQI_F_W_GROUP: return (int64_t)((uint64_t)(uint32_t)c->group_rows << 32 | (uint32_t)c->group_cols);
    case MOQI_F_W_SCALE: return (int64_t)c->scale;
    case MOQI_F_W_GLOBAL: return c->has_global;
    case MOQI_F_W_DYNAMIC: return c->dynamic;
    case MOQI_F_W_ZERO: return c->zero_point;
    case MOQI_F_W_RULE: return c->rule;
    case MOQI_F_SMOOTH: return s->pre_quant_scale;
    case MOQI_F_ORDER: return s->act_order;
    case MOQI_F_REQUANT: return s->requantize_fp8;
    case MOQI_F_HADAMARD: return s->hadamard;
    default: return s->lora_rank;
    }
}

/* How far a scheme is from a row: fields that differ, a missing low-rank branch twice, a group of a row without groups not at all.
   -1 when they do not even hold the same kinds of numbers. */
static int moqi_scheme_distance(const moq_scheme *s, const moq_scheme *row)
{
    int n = 0;
    if (s->weight.elem != row->weight.elem || s->input.elem != row->input.elem) return -1;
    for (int f = 0; f < MOQI_F_COUNT; f++) n += moqi_scheme_field(s, f) != moqi_scheme_field(row, f);
    if (row->weight.group_cols == 0 && s->weight.group_cols != 0) n--;
    return n + ((s->lora_rank == 0) != (row->lora_rank == 0));
}

/* Names of dtypes in lower case, as all names here. */
static void moqi_put_lower(moqi_text *t, const char *s)
{
    for (; *s; s++) moqi_put(t, moqi_lower(*s));
}

static void moqi_put_number(moqi_text *t, int64_t v)
{
    moqi_put_unsigned(t, v < 0 ? 0 - (uint64_t)v : (uint64_t)v, 10, 0, ' ', v < 0);
}

/* g128: groups of columns; pc / token: one scale a row; pt: one scale in all; b128x128: blocks. */
static void moqi_put_group(moqi_text *t, const moq_coding *c, int is_input)
{
    if (c->group_rows == 1 && c->group_cols == MOQ_ALL) { moqi_puts(t, is_input ? "token" : "pc", 8); return; }
    if (c->group_rows == MOQ_ALL && c->group_cols == MOQ_ALL) { moqi_puts(t, "pt", 8); return; }
    moqi_put(t, c->group_rows == 1 ? 'g' : 'b');
    if (c->group_rows != 1) { moqi_put_number(t, c->group_rows); moqi_put(t, 'x'); }
    moqi_put_number(t, c->group_cols);
}

/* One suffix: '_' [ 'a' for the input ] what it is; numbers where a flag does not say it all. */
static void moqi_put_suffix(moqi_text *t, const moq_scheme *s, int field)
{
    static const char *const words[MOQI_F_COUNT] = {
        "", "s", "global", "dyn", "zp", "rule", "", "s", "global", "dyn", "zp", "rule", "pqs", "actorder", "requant", "hadamard", "r"};
    int is_input = field >= MOQI_F_A_GROUP && field < MOQI_F_SMOOTH;
    const moq_coding *c = is_input ? &s->input : &s->weight;
    int64_t v = moqi_scheme_field(s, field);
    moqi_put(t, '_');
    if (is_input) moqi_put(t, 'a');
    moqi_puts(t, words[field], 16);
    if (field == MOQI_F_W_GROUP || field == MOQI_F_A_GROUP) moqi_put_group(t, c, is_input);
    else if (field == MOQI_F_W_SCALE || field == MOQI_F_A_SCALE) moqi_put_lower(t, moq_dtype_name(c->scale));
    else if (v != 1 || field == MOQI_F_LORA) moqi_put_number(t, v);
}

MOQ_API size_t moq_scheme_name(const moq_scheme *s, char *text, size_t capacity)
{
    moqi_text t = {text, capacity, 0};
    moq_scheme plain;
    const moq_scheme *near_row = NULL;
    int best = MOQI_F_COUNT + 1;
    if (!s) { moqi_text_end(&t); return 0; }
    for (size_t i = 0; i < MOQI_COUNT(moqi_scheme_rows); i++) {
        int d = moqi_scheme_distance(s, &moqi_scheme_rows[i].scheme);
        if (d < 0 || d >= best) continue;
        best = d;
        near_row = &moqi_scheme_rows[i].scheme;
        t.need = 0;
        moqi_puts(&t, moqi_scheme_rows[i].name, 40);
    }
    if (!near_row) { /* no row holds these kinds of numbers: name both, and every field that is not zero */
        memset(&plain, 0, sizeof plain);
        near_row = &plain;
        moqi_puts(&t, "w-", 2);
        moqi_put_lower(&t, moq_dtype_name(s->weight.elem));
        moqi_puts(&t, "-a-", 3);
        moqi_put_lower(&t, moq_dtype_name(s->input.elem));
    }
    for (int f = 0; f < MOQI_F_COUNT; f++)
        if (moqi_scheme_field(s, f) != moqi_scheme_field(near_row, f)) moqi_put_suffix(&t, s, f);
    moqi_text_end(&t);
    return t.need;
}

MOQ_API int moq_scheme_equal(const moq_scheme *a, const moq_scheme *b)
{
    if (!a || !b) return a == b;
    int same = a->weight.elem == b->weight.elem && a->input.elem == b->input.elem;
    for (int f = 0; f < MOQI_F_COUNT && same; f++) same = moqi_scheme_field(a, f) == moqi_scheme_field(b, f);
    return same;
}

/* ---- KV formats ---- */

static const char *const moqi_kv_names[MOQ_KV_FORMAT_COUNT] = {
    "wide", "fp8", "fp8_affine", "int8", "nvfp4", "nvfp4_affine", "nvfp4_rotate", "mxfp4"};

MOQ_API const char *moq_kv_format_name(moq_kv_format f)
{
    return (unsigned)f < (unsigned)MOQ_KV_FORMAT_COUNT ? moqi_kv_names[f] : "?";
}

MOQ_API int moq_kv_format_find(const char *name, moq_kv_format *out)
{
    /* The cast presets fix amax at calibration; what a cache stores is the plain format. */
    static const struct { const char *name; moq_kv_format format; } aliases[] = {
        {"none", MOQ_KV_WIDE}, {"fp8_cast", MOQ_KV_FP8}, {"nvfp4_cast", MOQ_KV_NVFP4}};
    if (!name || !out) return 0;
    for (int f = 0; f < (int)MOQ_KV_FORMAT_COUNT; f++)
        if (moqi_same(name, moqi_kv_names[f])) { *out = (moq_kv_format)f; return 1; }
    for (size_t i = 0; i < MOQI_COUNT(aliases); i++)
        if (moqi_same(name, aliases[i].name)) { *out = aliases[i].format; return 1; }
    return 0;
}

/* Recipes differ from checkpoints in one thing: their scheme is what quantizing makes, so integers have F32 scales and smoothing
   recipes always a pre_quant_scale, also where an export later folds it away. */
/* ---- recipes ---- */

#define MOQI_S_INT8      {MOQI_ROW(MOQ_I8), MOQI_TENSOR(MOQ_I8), 0, 0, 0, 0, 0}
#define MOQI_S_INT8_SQ   {MOQI_ROW(MOQ_I8), MOQI_TENSOR(MOQ_I8), 1, 0, 0, 0, 0}
#define MOQI_S_W8A16     {MOQI_ROW(MOQ_I8), MOQI_WIDE, 0, 0, 0, 0, 0}
#define MOQI_S_FP8       {MOQI_TENSOR(MOQ_F8_E4M3), MOQI_TENSOR(MOQ_F8_E4M3), 0, 0, 0, 0, 0}
#define MOQI_S_FP8_PC_PT {MOQI_ROW(MOQ_F8_E4M3), MOQI_TOKEN(MOQ_F8_E4M3), 0, 0, 0, 0, 0}
#define MOQI_S_FP8_PB_WO {MOQI_BLOCK128, MOQI_WIDE, 0, 0, 0, 0, 0}
#define MOQI_S_INT4      {MOQI_GROUP128(MOQ_I4), MOQI_WIDE, 0, 0, 0, 0, 0}
#define MOQI_S_INT4_AWQ  {MOQI_GROUP128(MOQ_I4), MOQI_WIDE, 1, 0, 0, 0, 0}
#define MOQI_S_W4A8_AWQ  {MOQI_AWQ_W4A8, MOQI_TENSOR(MOQ_F8_E4M3), 1, 0, 1, 0, 0}
#define MOQI_S_MX(elem)  {MOQI_MX(elem), MOQI_MX_IN(elem), 0, 0, 0, 0, 0}
#define MOQI_S_MXFP4_WO  {MOQI_MX(MOQ_F4), MOQI_WIDE, 0, 0, 0, 0, 0}
#define MOQI_S_MXFP4_FP8 {MOQI_MX(MOQ_F4), MOQI_TOKEN(MOQ_F8_E4M3), 0, 0, 0, 0, 0}
#define MOQI_S_NVFP4     {MOQI_NVFP4, MOQI_NVFP4_IN, 0, 0, 0, 0, 0}
#define MOQI_S_NVFP4_AWQ {MOQI_NVFP4, MOQI_NVFP4_IN, 1, 0, 0, 0, 0}
#define MOQI_S_NVFP4_SVD {MOQI_NVFP4, MOQI_NVFP4_IN, 1, 0, 0, 0, 32}
#define MOQI_S_NVFP4_WO  {MOQI_NVFP4, MOQI_WIDE, 0, 0, 0, 0, 0}
#define MOQI_S_NVFP4_WO32 {MOQI_NVFP4_G32, MOQI_WIDE, 0, 0, 0, 0, 0}
#define MOQI_S_NVFP4_FP8 {MOQI_NVFP4_G32, MOQI_TENSOR(MOQ_F8_E4M3), 0, 0, 0, 0, 0}

#define MOQI_ALL_LINEARS "all linears but heads, routers, vision"

/* ModelOpt 0.47's presets: our name, its constant (or recipe file), the quant_algo its export says ("": it cannot export this),
   what is quantized, calibration. awq_clip exports as plain NVFP4: it clips weights and leaves no input scale vector. */
/* ModelOpt computes with mxfp6 and mxint8 but cannot export them: their names in a folder are this library's, the layout is MXFP8's.
   w4a8_mxfp4_fp8 collects no amax, so its inputs are scaled per token. */
static const moq_recipe moqi_recipes[] = {
    {"fp8", "FP8_DEFAULT_CFG", "FP8", MOQI_ALL_LINEARS, "max", MOQI_S_FP8},
    {"fp8_per_channel_per_token", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_PER_CHANNEL_PER_TOKEN", MOQI_ALL_LINEARS, "max", MOQI_S_FP8_PC_PT},
    {"fp8_2d_blockwise_weight_only", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "fp8_pb_wo", MOQI_ALL_LINEARS, "max", MOQI_S_FP8_PB_WO},
    {"int8", "INT8_DEFAULT_CFG", "W8A8_SQ_PER_CHANNEL", MOQI_ALL_LINEARS, "max", MOQI_S_INT8},
    {"int8_weight_only", "INT8_WEIGHT_ONLY_CFG", "W8A16", MOQI_ALL_LINEARS, "max", MOQI_S_W8A16},
    {"int8_smoothquant", "INT8_SMOOTHQUANT_CFG", "W8A8_SQ_PER_CHANNEL", MOQI_ALL_LINEARS, "smoothquant alpha 1.0", MOQI_S_INT8_SQ},
    {"int4_blockwise_weight_only", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "W4A16_AWQ", MOQI_ALL_LINEARS, "max", MOQI_S_INT4},
    {"int4_awq", "INT4_AWQ_CFG", "W4A16_AWQ", MOQI_ALL_LINEARS, "awq_lite alpha_step 0.1", MOQI_S_INT4_AWQ},
    {"w4a8_awq_beta", "W4A8_AWQ_BETA_CFG", "W4A8_AWQ", MOQI_ALL_LINEARS, "awq_lite", MOQI_S_W4A8_AWQ},
    {"nvfp4", "NVFP4_DEFAULT_CFG", "NVFP4", MOQI_ALL_LINEARS, "max", MOQI_S_NVFP4},
    {"w4a16_nvfp4", "W4A16_NVFP4_CFG", "W4A16_NVFP4", MOQI_ALL_LINEARS, "max", MOQI_S_NVFP4_WO},
    {"w4a8_nvfp4_fp8", "W4A8_NVFP4_FP8_CFG", "W4A8_NVFP4_FP8", MOQI_ALL_LINEARS, "max", MOQI_S_NVFP4_FP8},
    {"nvfp4_awq_lite", "NVFP4_AWQ_LITE_CFG", "NVFP4_AWQ", MOQI_ALL_LINEARS, "awq_lite", MOQI_S_NVFP4_AWQ},
    {"nvfp4_awq_clip", "NVFP4_AWQ_CLIP_CFG", "NVFP4", MOQI_ALL_LINEARS, "awq_clip", MOQI_S_NVFP4},
    {"nvfp4_awq_full", "NVFP4_AWQ_FULL_CFG", "NVFP4_AWQ", MOQI_ALL_LINEARS, "awq_full alpha_step 0.1", MOQI_S_NVFP4_AWQ},
    {"nvfp4_svdquant", "NVFP4_SVDQUANT_DEFAULT_CFG", "NVFP4_SVD", MOQI_ALL_LINEARS, "svdquant rank 32", MOQI_S_NVFP4_SVD},
    {"nvfp4_four_over_six", "NVFP4_FOUR_OVER_SIX_CFG", "NVFP4", MOQI_ALL_LINEARS, "mse 1.0 to 1.5 step 0.5", MOQI_S_NVFP4},
    {"nvfp4_w4a4_weight_mse_fp8_sweep", "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG", "NVFP4", MOQI_ALL_LINEARS, "mse fp8_scale_sweep", MOQI_S_NVFP4},
    {"nvfp4_w4a4_weight_local_hessian", "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG", "NVFP4", MOQI_ALL_LINEARS, "local_hessian fp8_scale_sweep", MOQI_S_NVFP4},
    {"nvfp4_act_headroom", "general/ptq/nvfp4_act_headroom-kv_fp8_cast", "NVFP4", MOQI_ALL_LINEARS, "nvfp4_act_headroom", MOQI_S_NVFP4},
    {"nvfp4_mlp_only", "NVFP4_MLP_ONLY_CFG", "NVFP4", "mlp, experts", "max", MOQI_S_NVFP4},
    {"nvfp4_mlp_weight_only", "NVFP4_MLP_WEIGHT_ONLY_CFG", "W4A16_NVFP4", "mlp, experts", "max", MOQI_S_NVFP4_WO32},
    {"nvfp4_omlp_only", "NVFP4_OMLP_ONLY_CFG", "NVFP4", "o_proj, mlp, experts", "max", MOQI_S_NVFP4},
    {"nvfp4_experts_only", "NVFP4_EXPERTS_ONLY_CFG", "NVFP4", "experts", "max", MOQI_S_NVFP4},
    {"nvfp4_experts_only_mse", "general/ptq/nvfp4_experts_only_mse-kv_fp8_cast", "NVFP4", "experts", "mse fp8_scale_sweep", MOQI_S_NVFP4},
    {"nvfp4_fp8_mha", "NVFP4_FP8_MHA_CONFIG", "NVFP4", "all linears, fp8 attention", "max", MOQI_S_NVFP4},
    {"mxfp4", "MXFP4_DEFAULT_CFG", "mxfp4", MOQI_ALL_LINEARS, "none", MOQI_S_MX(MOQ_F4)},
    {"mxfp4_mlp_weight_only", "MXFP4_MLP_WEIGHT_ONLY_CFG", "mxfp4", "mlp, experts", "none", MOQI_S_MXFP4_WO},
    {"w4a8_mxfp4_fp8", "W4A8_MXFP4_FP8_CFG", "W4A8_MXFP4_FP8", MOQI_ALL_LINEARS, "none", MOQI_S_MXFP4_FP8},
    {"mxfp8", "MXFP8_DEFAULT_CFG", "MXFP8", MOQI_ALL_LINEARS, "none", MOQI_S_MX(MOQ_F8_E4M3)},
    {"mxfp6", "MXFP6_DEFAULT_CFG", "MXFP6_E3M2", MOQI_ALL_LINEARS, "none", MOQI_S_MX(MOQ_F6_E3M2)},
    {"mxfp6_e2m3", "MXFP6_DEFAULT_CFG with num_bits (2, 3)", "MXFP6_E2M3", MOQI_ALL_LINEARS, "none", MOQI_S_MX(MOQ_F6_E2M3)},
    {"mxint8", "MXINT8_DEFAULT_CFG", "MXINT8", MOQI_ALL_LINEARS, "none", MOQI_S_MX(MOQ_I8)},
    {"mamba_moe_fp8_aggressive", "MAMBA_MOE_FP8_AGGRESSIVE_CFG", "FP8", "experts, mixer projections", "max", MOQI_S_FP8},
    {"mamba_moe_fp8_conservative", "MAMBA_MOE_FP8_CONSERVATIVE_CFG", "FP8", "experts", "max", MOQI_S_FP8},
    {"mamba_moe_nvfp4_aggressive", "MAMBA_MOE_NVFP4_AGGRESSIVE_CFG", "NVFP4", "experts, mixer projections", "max", MOQI_S_NVFP4},
    {"mamba_moe_nvfp4_conservative", "MAMBA_MOE_NVFP4_CONSERVATIVE_CFG", "NVFP4", "experts", "max", MOQI_S_NVFP4}
};

MOQ_API size_t moq_recipe_count(void) { return MOQI_COUNT(moqi_recipes); }

MOQ_API const moq_recipe *moq_get_recipe(size_t index)
{
    return index < MOQI_COUNT(moqi_recipes) ? &moqi_recipes[index] : NULL;
}

MOQ_API const moq_recipe *moq_find_recipe(const char *name)
{
    for (size_t i = 0; name && i < MOQI_COUNT(moqi_recipes); i++)
        if (moqi_same(name, moqi_recipes[i].name) || moqi_same(name, moqi_recipes[i].modelopt)) return &moqi_recipes[i];
    return NULL;
}

/* ------------------------------------------------------------------------------------------------
   >>match           names against globs, regular expressions and lists of rules
   Matching allocates nothing; its time is bounded by pattern x name for every pattern.
   ------------------------------------------------------------------------------------------------ */

/* ---- globs ---- */

/* Backtracks to the last star only: at most pattern x name steps, never exponential. */
static int moqi_glob(const char *pattern, size_t pattern_bytes, const char *name, size_t name_bytes)
{
    size_t p = 0, n = 0, star = SIZE_MAX, mark = 0;
    while (n < name_bytes) {
        if (p < pattern_bytes && pattern[p] == '*') { star = ++p; mark = n; }
        else if (p < pattern_bytes && (pattern[p] == '?' || pattern[p] == name[n])) { p++; n++; }
        else if (star != SIZE_MAX) { p = star; n = ++mark; }
        else return 0;
    }
    while (p < pattern_bytes && pattern[p] == '*') p++;
    return p == pattern_bytes;
}

/* ---- regular expressions ----
   The part of Python's re that such files use, as a position automaton: every literal or class of the pattern is a position,
   follow[p] the positions that may come after it. A set of positions is a few words, so matching is linear in the name.
   '^' and '$' are positions too: they consume a mark before the first and after the last byte.

   Known:   literals . [...] [^...] \d \w \s \D \W \S, \ before punctuation, \n \t and the like, \A ^ $
            * + ? {m} {m,} {,n} {m,n} and their lazy forms, (...) (?:...) (?P<name>...) and |
   Refused: look-around, back references, flags, \b \B \Z, possessive repeats, non-ASCII bytes in [...], over 256 positions

   Building it: first(x) are the positions that x may begin with, last(x) those it may end with, and
            x y     follow[p] += first(y) for p in last(x)
            x*      follow[p] += first(x) for p in last(x)
            x{2,3}  x x x?, each copy with positions of its own
   Matching: at = first(whole); for each byte: hit = at & takes[byte]; a hit in last(whole) is a match (re.match does not ask for the
   end of the name); at = union of follow[p] for p in hit. */

#define MOQI_RE_POSITIONS 256
#define MOQI_RE_WORDS (MOQI_RE_POSITIONS / 64)
#define MOQI_RE_DEPTH 24
enum { MOQI_RE_START = 256, MOQI_RE_END, MOQI_RE_SYMBOLS };

typedef struct moqi_set { uint64_t w[MOQI_RE_WORDS]; } moqi_set;
typedef struct moqi_re_node { moqi_set first, last; int nullable; } moqi_re_node;

typedef struct moqi_regex {
    const uint64_t *mask;   /* [MOQI_RE_SYMBOLS, words]: positions that take a symbol */
    const uint64_t *follow; /* [positions, words] */
    moqi_set first, last;
    int words, nullable;
} moqi_regex;

typedef struct moqi_re_build {
    const char *p, *end;
    const char *bad;        /* what is not supported, or NULL */
    int positions, steps;
    moqi_set takes[MOQI_RE_SYMBOLS];
    moqi_set follow[MOQI_RE_POSITIONS];
} moqi_re_build;

/* a |= b. */
static void moqi_set_or(moqi_set *a, const moqi_set *b)
{
    for (int i = 0; i < MOQI_RE_WORDS; i++) a->w[i] |= b->w[i];
}

/* Every position of `from` may be followed by every one of `to`. */
static void moqi_re_link(moqi_re_build *b, const moqi_set *from, const moqi_set *to)
{
    for (int i = 0; i < b->positions; i++)
        if (from->w[i / 64] >> (i % 64) & 1) moqi_set_or(&b->follow[i], to);
}

/* Matches the empty name only. */
static moqi_re_node moqi_re_empty(void)
{
    moqi_re_node n;
    memset(&n, 0, sizeof n);
    n.nullable = 1;
    return n;
}

/* x then y: what ends x is followed by what begins y; where one of them may be empty, the other shows through. Positions are numbered
   in text order, so links made once stay right however large the pattern grows around them. */
static moqi_re_node moqi_re_concat(moqi_re_build *b, moqi_re_node x, const moqi_re_node *y)
{
    moqi_re_link(b, &x.last, &y->first);
    if (x.nullable) moqi_set_or(&x.first, &y->first);
    if (!y->nullable) memset(&x.last, 0, sizeof x.last);
    moqi_set_or(&x.last, &y->last);
    x.nullable &= y->nullable;
    return x;
}

/* A new position that takes the symbols set in `bytes` (256 bits), or one mark. */
static moqi_re_node moqi_re_position(moqi_re_build *b, const moqi_set *bytes, int mark)
{
    moqi_re_node n = moqi_re_empty();
    if (b->positions == MOQI_RE_POSITIONS) { b->bad = "it is too long"; return n; }
    int i = b->positions++;
    uint64_t bit = (uint64_t)1 << (i % 64);
    for (int s = 0; s < 256 && bytes; s++)
        if (bytes->w[s / 64] >> (s % 64) & 1) b->takes[s].w[i / 64] |= bit;
    if (!bytes) b->takes[mark].w[i / 64] |= bit;
    n.first.w[i / 64] = n.last.w[i / 64] = bit;
    n.nullable = 0;
    return n;
}

/* Bytes from..to, both included. */
static void moqi_re_add_range(moqi_set *s, int from, int to)
{
    for (int c = from; c <= to; c++) s->w[c / 64] |= (uint64_t)1 << (c % 64);
}

/* The other bytes. Names are UTF-8: what is not ASCII is matched byte by byte, which `*` and `+` make good. */
static void moqi_re_invert(moqi_set *s)
{
    for (int i = 0; i < 4; i++) s->w[i] = ~s->w[i];
}

/* The escape after a backslash: a class is added to `s` (-1), else the literal byte; -2: not supported. */
static int moqi_re_escape(moqi_re_build *b, moqi_set *s)
{
    static const char *const plain = "n\nt\tr\rf\fv\va\a";
    moqi_set c;
    memset(&c, 0, sizeof c);
    if (b->p == b->end) return -2;
    char e = *b->p++, kind = moqi_lower(e);
    if (kind == 'd' || kind == 'w') moqi_re_add_range(&c, '0', '9');
    if (kind == 'w') { moqi_re_add_range(&c, 'a', 'z'); moqi_re_add_range(&c, 'A', 'Z'); moqi_re_add_range(&c, '_', '_'); }
    if (kind == 's') { moqi_re_add_range(&c, 9, 13); moqi_re_add_range(&c, ' ', ' '); }
    if (kind == 'd' || kind == 'w' || kind == 's') {
        if (e != kind) moqi_re_invert(&c);
        moqi_set_or(s, &c);
        return -1;
    }
    for (int i = 0; plain[i]; i += 2)
        if (e == plain[i]) return plain[i + 1];
    return (kind >= 'a' && kind <= 'z') || (e >= '0' && e <= '9') ? -2 : (int)(unsigned char)e;
}

/* One end of a range inside [...]: a byte, -1 a class escape, -2 an error. */
static int moqi_re_class_item(moqi_re_build *b, moqi_set *s)
{
    int c = (unsigned char)*b->p++;
    return c == '\\' ? moqi_re_escape(b, s) : c >= 0x80 ? -2 : c;
}

/* [...] after its opening bracket. */
static moqi_re_node moqi_re_class(moqi_re_build *b)
{
    moqi_set s;
    int negated = b->p < b->end && *b->p == '^', first = 1;
    memset(&s, 0, sizeof s);
    if (negated) b->p++;
    for (; b->p < b->end && (first || *b->p != ']'); first = 0) {
        int lo = moqi_re_class_item(b, &s), hi = lo;
        if (lo >= 0 && b->end - b->p >= 2 && b->p[0] == '-' && b->p[1] != ']') { b->p++; hi = moqi_re_class_item(b, &s); }
        if (lo == -2 || hi < lo) { b->bad = "a character class it does not know"; return moqi_re_empty(); }
        if (lo >= 0) moqi_re_add_range(&s, lo, hi);
    }
    if (b->p == b->end) { b->bad = "a [ without ]"; return moqi_re_empty(); }
    b->p++;
    if (negated) moqi_re_invert(&s);
    return moqi_re_position(b, &s, 0);
}

/* forward: groups hold alternatives */
static moqi_re_node moqi_re_alternatives(moqi_re_build *b, int depth);

/* (...), (?:...) or (?P<name>...) after its opening bracket: what a group captures is of no interest here. Look-arounds and flags cannot be
   said with positions and are refused. */
static moqi_re_node moqi_re_group(moqi_re_build *b, int depth)
{
    if (depth >= MOQI_RE_DEPTH) { b->bad = "groups nested too deep"; return moqi_re_empty(); }
    if (b->p < b->end && *b->p == '?') {
        size_t left = (size_t)(b->end - b->p);
        if (left >= 2 && b->p[1] == ':') b->p += 2;
        else if (left >= 3 && b->p[1] == 'P' && b->p[2] == '<') {
            while (b->p < b->end && *b->p != '>') b->p++;
            if (b->p < b->end) b->p++;
        } else { b->bad = "a look-around or flag group"; return moqi_re_empty(); }
    }
    moqi_re_node n = moqi_re_alternatives(b, depth + 1);
    if (b->p == b->end && !b->bad) b->bad = "a ( without )";
    if (b->p < b->end) b->p++;
    return n;
}

/* {m}, {m,}, {,n}, {m,n} at b->p: 1 and past it; anything else is a literal brace. max -1: no bound. */
static int moqi_re_counts(moqi_re_build *b, int *min, int *max)
{
    const char *p = b->p + 1;
    int n[2] = {0, 0}, digits[2] = {0, 0}, part = 0;
    if (b->p == b->end || *b->p != '{') return 0;
    for (; p < b->end && *p != '}'; p++) {
        if (*p == ',' && part == 0) { part = 1; continue; }
        if (*p < '0' || *p > '9') return 0;
        if (n[part] <= MOQI_RE_POSITIONS) n[part] = n[part] * 10 + (*p - '0');
        digits[part]++;
    }
    if (p == b->end || (!digits[0] && !digits[1] && !part)) return 0;
    *min = n[0];
    *max = part == 0 ? n[0] : digits[1] ? n[1] : -1;
    if (*max >= 0 && *max < *min) b->bad = "a repeat count upside down";
    b->p = p + 1;
    return 1;
}

/* One literal, class, mark or group. */
static moqi_re_node moqi_re_atom(moqi_re_build *b, int depth)
{
    moqi_set s;
    int min, max;
    memset(&s, 0, sizeof s);
    if (moqi_re_counts(b, &min, &max)) { b->bad = "nothing to repeat"; return moqi_re_empty(); }
    if (++b->steps > 16 * MOQI_RE_POSITIONS) { b->bad = "it is too long"; return moqi_re_empty(); } /* (((){99}){99}){99} */
    int c = (unsigned char)*b->p++;
    switch (c) {
    case '(': return moqi_re_group(b, depth);
    case '[': return moqi_re_class(b);
    case '^': return moqi_re_position(b, NULL, MOQI_RE_START);
    case '$': return moqi_re_position(b, NULL, MOQI_RE_END);
    case '*': case '+': case '?': b->bad = "nothing to repeat"; return moqi_re_empty();
    case '.':
        moqi_re_add_range(&s, '\n', '\n');
        moqi_re_invert(&s);
        return moqi_re_position(b, &s, 0);
    case '\\':
        if (b->p < b->end && *b->p == 'A') { b->p++; return moqi_re_position(b, NULL, MOQI_RE_START); }
        c = moqi_re_escape(b, &s);
        if (c == -2) { b->bad = "an escape it does not know"; return moqi_re_empty(); }
        break;
    default: break;
    }
    if (c >= 0) moqi_re_add_range(&s, c, c);
    return moqi_re_position(b, &s, 0);
}

/* An atom and its quantifier; counted repeats parse the atom again for every copy. Lazy or greedy is the same for yes and no. */
static moqi_re_node moqi_re_piece(moqi_re_build *b, int depth)
{
    const char *start = b->p, *after;
    int min = 1, max = 1, again;
    moqi_re_node one = moqi_re_atom(b, depth), all = moqi_re_empty();
    if (b->bad || b->p == b->end) return one;
    if (*b->p == '*' || *b->p == '+' || *b->p == '?') {
        min = *b->p == '+';
        max = *b->p == '?' ? 1 : -1;
        b->p++;
    } else if (!moqi_re_counts(b, &min, &max)) return one;
    if (b->p < b->end && *b->p == '?') b->p++;
    after = b->p;
    if (b->p < b->end && (*b->p == '*' || *b->p == '+' || *b->p == '?' || moqi_re_counts(b, &again, &again))) b->bad = "a repeat of a repeat";
    for (int i = 0; i < (max < 0 ? (int)moqi_max(min, 1) : max) && !b->bad; i++) {
        if (i > 0) { b->p = start; one = moqi_re_atom(b, depth); }
        if (max < 0 && i + 1 >= min) moqi_re_link(b, &one.last, &one.first);
        if (i >= min) one.nullable = 1;
        all = moqi_re_concat(b, all, &one);
    }
    b->p = after;
    return all;
}

/* a|b|...: begins and ends as any branch does. An empty branch matches the empty name. */
static moqi_re_node moqi_re_alternatives(moqi_re_build *b, int depth)
{
    moqi_re_node all = moqi_re_empty();
    for (int branch = 0;; branch++) {
        moqi_re_node seq = moqi_re_empty();
        while (b->p < b->end && *b->p != '|' && *b->p != ')' && !b->bad) {
            moqi_re_node piece = moqi_re_piece(b, depth);
            seq = moqi_re_concat(b, seq, &piece);
        }
        moqi_set_or(&all.first, &seq.first);
        moqi_set_or(&all.last, &seq.last);
        all.nullable = branch == 0 ? seq.nullable : all.nullable | seq.nullable;
        if (b->bad || b->p == b->end || *b->p != '|') return all;
        b->p++;
    }
}

/* Compile into the arena: one word of 64 positions does for nearly every pattern in use, so a compiled pattern takes about 3 kB.
   The working state is released before the call returns. MOQ_E_UNSUPPORTED names the pattern and what it uses. */
static moq_result moqi_regex_compile(moqi_regex *out, const char *pattern, moqi_arena *r, moqi_where at, moq_error *err)
{
    moqi_re_build *b = (moqi_re_build *)moq_allocate(&r->a, sizeof *b);
    if (!b) return moqi_nomem(err, sizeof *b);
    b->p = pattern;
    b->end = pattern + strlen(pattern);
    moqi_re_node n = moqi_re_alternatives(b, 0);
    if (!b->bad && b->p != b->end) b->bad = "a ) without (";
    const char *bad = b->bad;
    size_t words = ((size_t)b->positions + 63) / 64, used = words ? words : 1;
    uint64_t *mask = bad ? NULL : (uint64_t *)moqi_take_array(r, used * (MOQI_RE_SYMBOLS + (size_t)b->positions), sizeof *mask);
    for (size_t i = 0; mask && i < MOQI_RE_SYMBOLS; i++) memcpy(mask + i * used, b->takes[i].w, used * sizeof *mask);
    uint64_t *follow = mask ? mask + used * MOQI_RE_SYMBOLS : NULL;
    for (size_t i = 0; mask && i < (size_t)b->positions; i++) memcpy(follow + i * used, b->follow[i].w, used * sizeof *mask);
    moq_release(&r->a, b, sizeof *b);
    if (bad)
        return moqi_fail(err, MOQ_E_UNSUPPORTED, at, "pattern '%q' uses what this library cannot match: %s; simplify it, or list the names", pattern,
                         bad);
    if (!mask) return moqi_nomem(err, used * sizeof *mask);
    out->mask = mask;
    out->follow = follow;
    out->first = n.first;
    out->last = n.last;
    out->words = (int)used;
    out->nullable = n.nullable;
    return MOQ_OK;
}

/* Positions of `at` that take `symbol`: 1 when one of them ends the pattern; *next becomes what may follow them. */
static int moqi_regex_step(const moqi_regex *x, const moqi_set *at, int symbol, moqi_set *next)
{
    const uint64_t *mask = x->mask + (size_t)symbol * (size_t)x->words;
    memset(next, 0, sizeof *next);
    for (int i = 0; i < x->words; i++) {
        uint64_t hit = at->w[i] & mask[i];
        if (hit & x->last.w[i]) return 1;
        for (int bit = 0; hit; bit++, hit >>= 1) {
            if (!(hit & 1)) continue;
            const uint64_t *f = x->follow + (size_t)(i * 64 + bit) * (size_t)x->words;
            for (int k = 0; k < x->words; k++) next->w[k] |= f[k];
        }
    }
    return 0;
}

/* Consume the marks that stand here until nothing new appears; '^' and '$' meet in an empty name. */
static int moqi_regex_marks(const moqi_regex *x, moqi_set *at, int starts, int ends)
{
    for (;;) {
        moqi_set next, before = *at;
        if (starts && moqi_regex_step(x, at, MOQI_RE_START, &next)) return 1;
        if (starts) moqi_set_or(at, &next);
        if (ends && moqi_regex_step(x, at, MOQI_RE_END, &next)) return 1;
        if (ends) moqi_set_or(at, &next);
        if (memcmp(&before, at, sizeof before) == 0) return 0;
    }
}

/* One pass over the name, a few words a byte; it ends early when nothing can follow. */
/* Python's re.match: anchored at the start only. '$' also stands before a last newline. */
static int moqi_regex_match(const moqi_regex *x, const char *name, size_t bytes)
{
    moqi_set at = x->first, next;
    if (x->nullable) return 1;
    for (size_t i = 0; i < bytes; i++) {
        uint64_t any = 0;
        int ends = i + 1 == bytes && name[i] == '\n';
        if ((i == 0 || ends) && moqi_regex_marks(x, &at, i == 0, ends)) return 1;
        if (moqi_regex_step(x, &at, (unsigned char)name[i], &next)) return 1;
        at = next;
        for (int k = 0; k < x->words; k++) any |= at.w[k];
        if (!any) return 0;
    }
    return moqi_regex_marks(x, &at, bytes == 0, 1);
}

/* ---- rules ----
   A list of names and patterns in file order; each carries a value. Exact names sit in a hash map, and `prefix*` patterns in a
   sorted list when only yes or no matters, so a lookup costs little however many modules and names there are. */

enum { MOQI_RULE_EXACT, MOQI_RULE_GLOB, MOQI_RULE_REGEX, MOQI_RULE_LINEAR, MOQI_RULE_EMBEDDING };

typedef struct moqi_rule {
    const char *text;
    size_t bytes;
    int kind;
    uint32_t value;
    moqi_regex regex;
} moqi_rule;

/* Order matters where rules carry values, so every lookup returns the first rule of the file that fits. For yes and no any will do. */
typedef struct moqi_rules {
    moqi_map exact;          /* name -> index in list */
    moqi_rule *list;
    uint32_t count;
    uint32_t *patterns;      /* indices of rules that are no names, in order */
    uint32_t pattern_count;
    const char **prefixes;   /* sorted, none a prefix of another; the star is cut off */
    uint32_t prefix_count;
    int inner;               /* a name or pattern covers what lies below it, and parts of names count */
} moqi_rules;

/* An empty list with room for `room` rules; nothing grows later. */
static moq_result moqi_rules_make(moqi_rules *s, moqi_arena *r, size_t room, moq_error *err)
{
    memset(s, 0, sizeof *s);
    s->list = (moqi_rule *)moqi_take_array(r, room + 1, sizeof *s->list);
    s->patterns = (uint32_t *)moqi_take_array(r, room + 1, sizeof *s->patterns);
    s->prefixes = (const char **)moqi_take_array(r, room + 1, 2 * sizeof *s->prefixes); /* the second half is scratch for sorting */
    if (!s->list || !s->patterns || !s->prefixes || !moqi_map_make(&s->exact, r, room + 1)) return moqi_nomem(err, room * sizeof *s->list);
    return MOQ_OK;
}

/* `text` must live as long as the rules. */
static void moqi_rules_add(moqi_rules *s, const char *text, int kind, uint32_t value, const moqi_regex *regex)
{
    moqi_rule *x = &s->list[s->count];
    x->text = text;
    x->bytes = strlen(text);
    x->kind = kind;
    x->value = value;
    if (regex) x->regex = *regex;
    if (kind == MOQI_RULE_EXACT) moqi_map_add(&s->exact, text, x->bytes, s->count);
    else s->patterns[s->pattern_count++] = s->count;
    s->count++;
}

static int moqi_compare_text(const void *a, const void *b) { return strcmp((const char *)a, (const char *)b); }

/* Sort the prefixes and drop those that a shorter one covers: then the largest one not above a name decides. */
static void moqi_rules_finish(moqi_rules *s)
{
    uint32_t kept = 0;
    moqi_sort((const void **)s->prefixes, (const void **)(s->prefixes + s->prefix_count), s->prefix_count, moqi_compare_text);
    for (uint32_t i = 0; i < s->prefix_count; i++)
        if (kept == 0 || !moqi_starts(s->prefixes[i], s->prefixes[kept - 1])) s->prefixes[kept++] = s->prefixes[i];
    s->prefix_count = kept;
}

/* Binary search: as no kept prefix begins with another, only the last one that sorts before the name can match. */
static int moqi_rules_prefix(const moqi_rules *s, const char *name, size_t bytes)
{
    uint32_t lo = 0, hi = s->prefix_count;
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        size_t n = strlen(s->prefixes[mid]);
        int order = memcmp(s->prefixes[mid], name, n < bytes ? n : bytes);
        if (order == 0 && n <= bytes) return 1;
        if (order > 0 || (order == 0 && n > bytes)) hi = mid;
        else lo = mid + 1;
    }
    return 0;
}

/* Last part of a module name that is a table, not a linear layer: class targets tell them apart. */
static int moqi_is_embedding(const char *name, size_t bytes)
{
    static const char *const parts[] = {"embed_tokens", "embeddings", "embedding", "word_embeddings", "tok_embeddings", "embed_in", "wte", "wpe"};
    size_t from = bytes;
    while (from > 0 && name[from - 1] != '.') from--;
    for (size_t i = 0; i < MOQI_COUNT(parts); i++)
        if (strlen(parts[i]) == bytes - from && memcmp(parts[i], name + from, bytes - from) == 0) return 1;
    return 0;
}

/* One pattern or class against one name. */
static int moqi_rule_matches(const moqi_rule *x, const char *name, size_t bytes)
{
    switch (x->kind) {
    case MOQI_RULE_GLOB: return moqi_glob(x->text, x->bytes, name, bytes);
    case MOQI_RULE_REGEX: return moqi_regex_match(&x->regex, name, bytes);
    case MOQI_RULE_LINEAR: return !moqi_is_embedding(name, bytes);
    case MOQI_RULE_EMBEDDING: return moqi_is_embedding(name, bytes);
    default: return 0;
    }
}

/* The first rule, in file order, that names this module; names and patterns before class names. NULL: none. */
static const moqi_rule *moqi_rules_match(const moqi_rules *s, const char *name, size_t bytes)
{
    const moqi_entry *e = moqi_map_find(&s->exact, name, bytes);
    const moqi_rule *best = e ? &s->list[e->value] : NULL;
    for (uint32_t i = 0; i < s->pattern_count; i++) {
        const moqi_rule *x = &s->list[s->patterns[i]];
        int by_class = x->kind >= MOQI_RULE_LINEAR;
        if (best && (by_class || best < x)) continue;
        if (moqi_rule_matches(x, name, bytes)) {
            if (!by_class) return x;
            best = x;
            for (i++; i < s->pattern_count; i++) { /* a later name pattern still goes before the class */
                x = &s->list[s->patterns[i]];
                if (x->kind < MOQI_RULE_LINEAR && moqi_rule_matches(x, name, bytes)) return x;
            }
        }
    }
    return best;
}

/* Any run of whole parts of the name ("mlp.gate" in "model.layers.0.mlp.gate"), from at most 16 starts. */
static int moqi_rules_part(const moqi_rules *s, const char *name, size_t bytes)
{
    size_t start = 0;
    for (int k = 0; k < 16 && start < bytes; k++) {
        size_t end = start;
        for (int parts = 0; end < bytes && parts < 16; parts++) {
            for (end += parts > 0; end < bytes && name[end] != '.'; end++) {}
            if (moqi_map_find(&s->exact, name + start, end - start)) return 1;
        }
        while (start < bytes && name[start] != '.') start++;
        start++;
    }
    return 0;
}

/* Does a rule name the module or something that it lies in? The longest name goes first. */
static const moqi_rule *moqi_rules_cover(const moqi_rules *s, const char *name, size_t bytes)
{
    const moqi_rule *x = moqi_rules_match(s, name, bytes);
    for (size_t n = bytes; n > 0 && !x; n--) {
        if (name[n - 1] != '.') continue;
        if (s->inner) { x = moqi_rules_match(s, name, n - 1); continue; }
        const moqi_entry *e = moqi_map_find(&s->exact, name, n - 1);
        if (e) x = &s->list[e->value];
    }
    return x;
}

/* Is the module in an exclude list? Names and patterns of the list cover everything below them, as ModelOpt lists containers. */
static int moqi_rules_exclude(const moqi_rules *s, const char *name, size_t bytes)
{
    if (s->count == 0 && s->prefix_count == 0) return 0;
    return moqi_rules_prefix(s, name, bytes) || moqi_rules_cover(s, name, bytes) || (s->inner && moqi_rules_part(s, name, bytes));
}

/* ------------------------------------------------------------------------------------------------
   >>modelopt        keys and KV formats of a quantization block, and ModelOpt's own blocks
   Reads JSON only, never a tensor: the tensors decide, these claims are cross-checked.
   ------------------------------------------------------------------------------------------------ */

/* How a compressed-tensors group stores its weights. */
enum { MOQI_CT_NONE = 0, MOQI_CT_PACK, MOQI_CT_NVFP4, MOQI_CT_MXFP4, MOQI_CT_MXFP8, MOQI_CT_FLOAT, MOQI_CT_INT, MOQI_CT_NAIVE, MOQI_CT_DENSE };

/* Sources of the rules below: the exporter writes hf_quant_config.json (settings nested under "quantization") and a converted, flat copy
   in config.json that has lost group sizes of most algorithms. Only quant_algo, kv_cache_*, group_size, exclude_modules / ignore and
   quantized_layers are read: config_groups of mixed files describe several algorithms wrongly. */
/* What the description says of one module. */
typedef struct moqi_claim {
    int known;               /* it says something */
    int excluded;            /* an ignore list names it; the rest still says what it would have been */
    const char *algo;        /* ModelOpt's quant_algo in upper case; "" for other families */
    int32_t group_size;      /* 0: not said; MOQ_ALL: channel */
    int has_coding;          /* other families than ModelOpt: the two codings below; scales of integers are said to be F32 */
    moq_coding weight, input;
    int32_t weight_bits;     /* compressed-tensors, AWQ, GPTQ: 2..8; 0: not said */
    int packed_format;       /* MOQI_CT_... */
    int old_packing;         /* words padded when the bits do not divide 32 */
    int32_t hadamard_size;   /* online input transform: block length; 0 none, -1 the whole width */
    const char *transform;   /* its name ("v": tensor "v_input.weight"), or NULL */
    int act_order, zero_point, gptq_v2;
    int32_t block_rows, block_cols; /* FP8 blocks; 0: none */
} moqi_claim;

/* ---- the description as read ---- */

/* A rotation that the runtime applies to inputs. */
typedef struct moqi_transform {
    const char *name;
    int32_t size; /* -1: the whole width */
    moqi_rules targets, ignore;
} moqi_transform;

/* The whole description of a folder. Parsed once; claims are then made from it for each module.
     uniform      one claim for all, and a list of exceptions (ModelOpt with one algorithm, gpt-oss, FP8, AWQ, GPTQ)
     targets      names and patterns with a claim each (MIXED_PRECISION, compressed-tensors, GPTQ's overrides)
     ignore       names and patterns that are left out */
typedef struct moqi_quant {
    moq_family family;
    const char *algo;        /* as written, "" when nothing is said */
    const char *producer;    /* "modelopt 0.47.0" or "" */
    moq_kv_format kv;
    int kv_from_config;      /* the description names a KV format */
    int uniform;             /* claims[0] holds for every module that no rule names */
    int experts_only;        /* gpt-oss: only expert stacks are quantized */
    int plain_ends;          /* FP8, AWQ, GPTQ: embedding and lm_head are left out unless the file says "lm_head": true */
    int outer_names;         /* some name says "language_model": try names with other outermost parts */
    moqi_claim *claims;
    uint32_t claim_count;
    moqi_rules targets;      /* value: index in claims */
    moqi_rules ignore;
    moqi_transform *transforms;
    uint32_t transform_count;
} moqi_quant;

/* What every reader of a block needs. */
typedef struct moqi_quant_read {
    moqi_quant *q;
    moqi_arena *r;
    const moq_open_desc *desc;
    moq_error *err;
    const char *file;
} moqi_quant_read;

/* An error at a key of the file being read. */
static moq_result moqi_bad_key(const moqi_quant_read *c, moq_result code, const char *key, const char *wanted)
{
    return moqi_fail(c->err, code, moqi_at(c->file, "key", key, -1), "%s", wanted);
}

/* A member that is there and not null: writers use both for "not set". */
static const moq_json *moqi_get(const moq_json *object, const char *key)
{
    const moq_json *v = moq_json_find(object, key);
    return v && v->type != MOQ_JSON_NULL ? v : NULL;
}

/* A whole number within [lo, hi]; `fallback` when the key is absent or null. */
static moq_result moqi_get_int(const moqi_quant_read *c, const moq_json *object, const char *key, int64_t lo, int64_t hi, int32_t fallback,
                               int32_t *out)
{
    const moq_json *v = moqi_get(object, key);
    int64_t n;
    *out = fallback;
    if (!v) return MOQ_OK;
    if (!moq_json_int(v, &n) || n < lo || n > hi)
        return moqi_fail(c->err, MOQ_E_CONFIG, moqi_at(c->file, "key", key, -1), "%q where a whole number from %lld to %lld is expected",
                         v->text ? v->text : "(no number)", (long long)lo, (long long)hi);
    *out = (int32_t)n;
    return MOQ_OK;
}

/* true or false; `fallback` when absent or null. */
static moq_result moqi_get_bool(const moqi_quant_read *c, const moq_json *object, const char *key, int fallback, int *out)
{
    const moq_json *v = moqi_get(object, key);
    *out = fallback;
    return !v || moq_json_bool(v, out) ? MOQ_OK : moqi_bad_key(c, MOQ_E_CONFIG, key, "true or false is expected");
}

/* A string, "" when absent or null. */
static moq_result moqi_get_string(const moqi_quant_read *c, const moq_json *object, const char *key, const char **out)
{
    const moq_json *v = moqi_get(object, key);
    *out = v ? moq_json_string(v) : "";
    if (*out) return MOQ_OK;
    *out = "";
    return moqi_bad_key(c, MOQ_E_CONFIG, key, "a string is expected");
}

/* Groups are powers of two from 16 to 65536, as every writer makes them; -1 is a whole row where `channel` allows it. */
static moq_result moqi_get_group(const moqi_quant_read *c, const moq_json *object, int channel, int32_t *out)
{
    const moq_json *v = moqi_get(object, "group_size");
    int64_t n = 0;
    *out = 0;
    if (!v) return MOQ_OK;
    int is_int = moq_json_int(v, &n);
    if (is_int && ((n >= 16 && n <= 65536 && (n & (n - 1)) == 0) || (n == -1 && channel))) { *out = (int32_t)n; return MOQ_OK; }
    return moqi_fail(c->err, MOQ_E_CONFIG, moqi_at(c->file, "key", "group_size", -1),
                     "%q is no group size; a power of two from 16 to 65536%s is expected", v->text ? v->text : "(no number)",
                     channel ? ", or -1 for a whole row," : "");
}

/* A copy that outlives the JSON document, NULL when out of memory. */
static const char *moqi_keep(const moqi_quant_read *c, const char *s)
{
    const char *p = moqi_take_text(c->r, s, strlen(s));
    if (!p) moqi_nomem(c->err, strlen(s) + 1);
    return p;
}

/* "a b", or "a" when b is empty, in the arena. */
static moq_result moqi_keep_pair(const moqi_quant_read *c, const char *a, const char *b, const char **out)
{
    size_t n = strlen(a) + strlen(b) + 2;
    char *p = (char *)moqi_take(c->r, n, 1);
    if (!p) return moqi_nomem(c->err, n);
    moqi_format(p, n, b[0] ? "%s %s" : "%s%s", a, b);
    *out = p;
    return MOQ_OK;
}

/* Patterns are tried one by one on every module, and real files hold a handful: a file with thousands is no model. */
#define MOQI_MAX_PATTERNS 4096u

static moq_result moqi_check_count(const moqi_quant_read *c, uint64_t count, const char *key)
{
    if (count <= MOQI_MAX_PATTERNS) return MOQ_OK;
    return moqi_fail(c->err, MOQ_E_LIMIT, moqi_at(c->file, "key", key, -1), "%llu patterns; at most %u (MOQI_MAX_PATTERNS) are accepted",
                     (unsigned long long)count, MOQI_MAX_PATTERNS);
}

/* The names of a list in one line, for messages. */
static void moqi_join(char *text, size_t capacity, const char *const *names, size_t count)
{
    moqi_text t = {text, capacity, 0};
    for (size_t i = 0; i < count; i++) {
        if (i) moqi_puts(&t, ", ", 2);
        moqi_puts(&t, names[i], 80);
    }
    moqi_text_end(&t);
}

/* The group lengths of a claim follow from its weight coding: blocks, groups of columns, or whole rows. */
static void moqi_set_group(moqi_claim *a)
{
    a->has_coding = 1;
    if (a->weight.group_rows > 1) {
        a->block_rows = a->weight.group_rows;
        a->block_cols = a->weight.group_cols;
    } else if (a->weight.group_rows == 1) {
        a->group_size = a->weight.group_cols;
    }
}

/* ---- KV cache ---- */

/* A KV format by name. kv_from_config: the caller may tell "wide, as said" from "nothing said". */
static moq_result moqi_kv_name(const moqi_quant_read *c, const char *key, const char *name)
{
    static const struct { const char *name; moq_kv_format format; } extra[] = { /* what engines call these */
        {"FLOAT8", MOQ_KV_FP8}, {"FP8_E4M3", MOQ_KV_FP8}, {"FP4", MOQ_KV_NVFP4}, {"FLOAT4", MOQ_KV_NVFP4}};
    c->q->kv_from_config = 1;
    if (moq_kv_format_find(name, &c->q->kv)) return MOQ_OK;
    for (size_t i = 0; i < MOQI_COUNT(extra); i++)
        if (moqi_same(name, extra[i].name)) { c->q->kv = extra[i].format; return MOQ_OK; }
    return moqi_fail(c->err, MOQ_E_UNSUPPORTED, moqi_at(c->file, "key", key, -1),
                     "KV cache format '%q' is not known; known are FP8, FP8_AFFINE, INT8, NVFP4, NVFP4_AFFINE, NVFP4_ROTATE, MXFP4", name);
}

/* A name, or arguments {num_bits, type}; both tools write the latter for FP8. */
static moq_result moqi_read_kv(const moqi_quant_read *c, const moq_json *block, const char *key)
{
    const moq_json *v = moqi_get(block, key);
    int32_t bits, group;
    int dynamic = 0, symmetric = 1;
    const char *type, *scale, *strategy;
    moq_result r;
    if (!v) return MOQ_OK;
    if (moq_json_string(v)) return moqi_kv_name(c, key, moq_json_string(v));
    if (v->type != MOQ_JSON_OBJECT) return moqi_bad_key(c, MOQ_E_CONFIG, key, "the name of a KV cache format, or an object, is expected");
    if ((r = moqi_get_int(c, v, "num_bits", 1, 64, 8, &bits)) != MOQ_OK || (r = moqi_get_int(c, v, "group_size", -1, 65536, 0, &group)) != MOQ_OK ||
        (r = moqi_get_string(c, v, "type", &type)) != MOQ_OK || (r = moqi_get_string(c, v, "scale_dtype", &scale)) != MOQ_OK ||
        (r = moqi_get_string(c, v, "strategy", &strategy)) != MOQ_OK || (r = moqi_get_bool(c, v, "symmetric", 1, &symmetric)) != MOQ_OK)
        return r;
    const moq_json *d = moqi_get(v, "dynamic");
    if (d && !moq_json_is(d, "local") && !moq_json_bool(d, &dynamic))
        return moqi_bad_key(c, MOQ_E_CONFIG, "dynamic", "true, false or \"local\" is expected");
    int is_float = moqi_same(type, "float"), is_int = !type[0] || moqi_same(type, "int");
    int known = !strategy[0] || moqi_same(strategy, "tensor") || moqi_same(strategy, "attn_head") || moqi_ends(strategy, "group");
    const char *name = NULL;
    if (is_float && bits == 8) name = "fp8";
    if (is_float && bits == 4) name = strstr(scale, "uint8") || group == 32 ? "mxfp4" : "nvfp4";
    if (is_int && bits == 8) name = "int8";
    if (!known) return moqi_bad_key(c, MOQ_E_UNSUPPORTED, "strategy", "the KV cache is supported with one scale per tensor or head");
    if (name && symmetric && (!dynamic || bits == 4)) return moqi_kv_name(c, key, name);
    return moqi_fail(c->err, MOQ_E_UNSUPPORTED, moqi_at(c->file, "key", key, -1),
                     "a KV cache of %d-bit %q%s%s is not supported; static FP8, INT8, NVFP4, MXFP4 are", bits, type[0] ? type : "int",
                     symmetric ? "" : ", asymmetric", dynamic ? ", dynamic" : "");
}

/* ---- ModelOpt ---- */

/* Every quant_algo of the exporter in upper case, and spellings of other tools for the same. */
static const char *const moqi_algo_names[] = {
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_PB_REAL", "MXFP8", "MXFP4", "W4A8_MXFP4_FP8", "NVFP4", "W4A16_NVFP4",
    "NVFP4_AWQ", "W4A8_NVFP4_FP8", "NVFP4_SVD", "W4A16_AWQ", "W4A8_AWQ", "W8A16", "W8A8_SQ_PER_CHANNEL", "MIXED_PRECISION",
    "MXFP6_E3M2", "MXFP6_E2M3", "MXINT8"};
static const char *const moqi_algo_aliases[][2] = {
    {"NVFP4_SVDQUANT", "NVFP4_SVD"}, {"MXFP6", "MXFP6_E3M2"}, {"INT4_AWQ", "W4A16_AWQ"}, {"INT8_SQ", "W8A8_SQ_PER_CHANNEL"}, {"INT8_WO", "W8A16"}};

/* The algorithm of `object`, from the table; "" when absent or null. */
static moq_result moqi_read_algo(const moqi_quant_read *c, const moq_json *object, const char *where, const char **out)
{
    char known[360];
    const char *name;
    *out = "";
    if (moqi_get_string(c, object, "quant_algo", &name) != MOQ_OK) return MOQ_E_CONFIG;
    if (!name[0]) return MOQ_OK;
    for (size_t i = 0; i < MOQI_COUNT(moqi_algo_aliases); i++)
        if (moqi_same(name, moqi_algo_aliases[i][0])) name = moqi_algo_aliases[i][1];
    for (size_t i = 0; i < MOQI_COUNT(moqi_algo_names); i++)
        if (moqi_same(name, moqi_algo_names[i])) { *out = moqi_algo_names[i]; return MOQ_OK; }
    moqi_join(known, sizeof known, moqi_algo_names, MOQI_COUNT(moqi_algo_names));
    return moqi_fail(c->err, MOQ_E_UNSUPPORTED, moqi_at(c->file, "key", where, -1), "quant_algo '%q' is not known; known are %s", name, known);
}

/* One entry {quant_algo, group_size, has_zero_point, ...} as a claim. */
static moq_result moqi_read_entry(const moqi_quant_read *c, const moq_json *e, const char *where, moqi_claim *a)
{
    moq_result r;
    memset(a, 0, sizeof *a);
    a->algo = "";
    if ((r = moqi_read_algo(c, e, where, &a->algo)) != MOQ_OK || (r = moqi_get_group(c, e, 0, &a->group_size)) != MOQ_OK ||
        (r = moqi_get_bool(c, e, "has_zero_point", 0, &a->zero_point)) != MOQ_OK)
        return r;
    if (a->zero_point)
        return moqi_bad_key(c, MOQ_E_UNSUPPORTED, "has_zero_point", "ModelOpt weights with zero points are not supported; no release writes them");
    a->known = a->algo[0] != 0;
    return MOQ_OK;
}

/* A list of strings, as every exclude list is. The index of the first other element is named. */
static moq_result moqi_check_list(const moqi_quant_read *c, const moq_json *list, const char *key)
{
    if (list->type != MOQ_JSON_ARRAY) return moqi_bad_key(c, MOQ_E_CONFIG, key, "a list of module names is expected");
    uint32_t i = 0;
    for (const moq_json *e = moq_json_first(list); e; e = moq_json_next(list, e), i++)
        if (e->type != MOQ_JSON_STRING)
            return moqi_fail(c->err, MOQ_E_CONFIG, moqi_at(c->file, "key", key, -1), "element %u is no string; a list of module names is expected",
                             (unsigned)i);
    return MOQ_OK;
}

/* An exclude list of names and globs. Nemotron-H exports damage every entry, "lm_head.<NUL>sentinel*": it ends at the NUL and the dot before it.
   `prefix*` and `prefix.*`, the only globs that the exporter makes, go to the sorted list. */
static moq_result moqi_read_excludes(const moqi_quant_read *c, const moq_json *list, const char *key, int inner)
{
    moqi_rules *s = &c->q->ignore;
    if (!list) return MOQ_OK;
    moq_result r = moqi_check_list(c, list, key);
    if (r == MOQ_OK) r = moqi_rules_make(s, c->r, list->count, c->err);
    if (r != MOQ_OK) return r;
    s->inner = inner;
    for (const moq_json *e = moq_json_first(list); e; e = moq_json_next(list, e)) {
        size_t n = strlen(e->text);
        if (n < e->text_bytes && n > 0 && e->text[n - 1] == '.') n--;
        char *text = moqi_take_text(c->r, e->text, n);
        if (!text) return moqi_nomem(c->err, n);
        size_t wild = strcspn(text, "*?");
        /* three kinds: a name, a prefix (sorted later), any other glob */
        if (strstr(text, "language_model")) c->q->outer_names = 1;
        if (n == 0) continue;
        if (wild == n) { moqi_rules_add(s, text, MOQI_RULE_EXACT, 0, NULL); continue; }
        if (wild + 1 != n || text[wild] != '*') { moqi_rules_add(s, text, MOQI_RULE_GLOB, 0, NULL); continue; }
        text[wild] = 0;
        s->prefixes[s->prefix_count++] = text;
    }
    moqi_rules_finish(s);
    return moqi_check_count(c, s->pattern_count, key);
}

/* quantized_layers: module or container name (some scripts: a glob) -> entry. */
static moq_result moqi_read_layers(const moqi_quant_read *c, const moq_json *map)
{
    moqi_quant *q = c->q;
    if (map->type != MOQ_JSON_OBJECT) return moqi_bad_key(c, MOQ_E_CONFIG, "quantized_layers", "an object of module names is expected");
    moq_result r = moqi_rules_make(&q->targets, c->r, map->count, c->err);
    if (r != MOQ_OK) return r;
    q->claims = (moqi_claim *)moqi_take_array(c->r, (uint64_t)map->count + 1, sizeof *q->claims);
    if (!q->claims) return moqi_nomem(c->err, map->count * sizeof *q->claims);
    for (const moq_json *e = moq_json_first(map); e; e = moq_json_next(map, e)) {
        size_t n = strlen(e->key);
        if (n < e->key_bytes && n > 0 && e->key[n - 1] == '.') n--; /* damaged like the exclude lists */
        const char *name = moqi_take_text(c->r, e->key, n);
        if (!name) return moqi_nomem(c->err, n + 1);
        if (e->type != MOQ_JSON_OBJECT) return moqi_bad_key(c, MOQ_E_CONFIG, name, "an object with quant_algo is expected");
        if ((r = moqi_read_entry(c, e, name, &q->claims[q->claim_count])) != MOQ_OK) return r;
        if (strcmp(q->claims[q->claim_count].algo, "MIXED_PRECISION") == 0)
            return moqi_bad_key(c, MOQ_E_CONFIG, name, "one module cannot be MIXED_PRECISION");
        if (strstr(name, "language_model")) q->outer_names = 1;
        moqi_rules_add(&q->targets, name, strpbrk(name, "*?") ? MOQI_RULE_GLOB : MOQI_RULE_EXACT, q->claim_count++, NULL);
    }
    return MOQ_OK;
}

/* The part of a block that holds the settings: raw files nest it. */
static const moq_json *moqi_modelopt_settings(const moq_json *block)
{
    const moq_json *inner = moqi_get(block, "quantization");
    return inner && inner->type == MOQ_JSON_OBJECT ? inner : block;
}

/* "modelopt 0.47.0" for moq_info; absent in hand-made files. */
static moq_result moqi_read_producer(const moqi_quant_read *c, const moq_json *block)
{
    const moq_json *p = moqi_get(block, "producer");
    const char *name, *version;
    if (!p || p->type != MOQ_JSON_OBJECT) return MOQ_OK;
    if (moqi_get_string(c, p, "name", &name) != MOQ_OK || moqi_get_string(c, p, "version", &version) != MOQ_OK) return MOQ_E_CONFIG;
    return moqi_keep_pair(c, name, version, &c->q->producer);
}

/* Both forms: nested (kv_cache_quant_algo, exclude_modules) and flat (kv_cache_scheme, ignore). `other` is the block of config.json when
   hf_quant_config.json is read: it lends quantized_layers to a file without. */
static moq_result moqi_read_modelopt(const moqi_quant_read *c, const moq_json *block, const moq_json *other)
{
    moqi_quant *q = c->q;
    const moq_json *s = moqi_modelopt_settings(block), *layers;
    const char *written;
    moqi_claim base;
    moq_result r;
    q->family = MOQ_FAMILY_MODELOPT;
    if ((r = moqi_read_producer(c, block)) != MOQ_OK || (r = moqi_get_string(c, s, "quant_algo", &written)) != MOQ_OK ||
        (r = moqi_read_entry(c, s, "quant_algo", &base)) != MOQ_OK || (r = moqi_keep_pair(c, written, "", &q->algo)) != MOQ_OK)
        return r;
    const char *kv = moqi_get(s, "kv_cache_quant_algo") ? "kv_cache_quant_algo" : "kv_cache_scheme";
    const char *ignore = moqi_get(s, "exclude_modules") ? "exclude_modules" : "ignore";
    if ((r = moqi_read_kv(c, s, kv)) != MOQ_OK || (r = moqi_read_excludes(c, moqi_get(s, ignore), ignore, 0)) != MOQ_OK) return r;
    /* mixed: the map names every quantized layer; there is no exclude list but for layers that were never looked at */
    if (strcmp(base.algo, "MIXED_PRECISION") == 0) {
        layers = moqi_get(s, "quantized_layers");
        if (!layers) layers = moqi_get(moqi_modelopt_settings(other), "quantized_layers");
        if (layers) return moqi_read_layers(c, layers);
        moqi_log(c->desc, MOQ_LOG_WARNING, MOQ_E_CONFIG, moqi_at(c->file, "key", "quant_algo", -1),
                 "MIXED_PRECISION without quantized_layers; the tensors decide");
        return MOQ_OK;
    }
    /* nothing but the KV cache is quantized, or the writer forgot: either way the tensors show it */
    if (!base.known) {
        if (moqi_get(s, "group_size"))
            moqi_log(c->desc, MOQ_LOG_WARNING, MOQ_E_CONFIG, moqi_at(c->file, "key", "quant_algo", -1),
                     "absent although group_size is set; the tensors decide");
        return MOQ_OK;
    }
    if (base.group_size == 0) { /* flat form: the group says it, where there is one */
        const moq_json *weights = moqi_get(moqi_get(moqi_get(s, "config_groups"), "group_0"), "weights");
        if ((r = moqi_get_group(c, weights, 0, &base.group_size)) != MOQ_OK) return r;
    }
    q->claims = (moqi_claim *)moqi_take_array(c->r, 1, sizeof *q->claims);
    if (!q->claims) return moqi_nomem(c->err, sizeof *q->claims);
    q->claims[q->claim_count++] = base;
    q->uniform = 1;
    return MOQ_OK;
}

/* hf_quant_config.json wins; where config.json says otherwise, both values are reported. */
static void moqi_compare_blocks(const moqi_quant_read *c, const moq_json *block)
{
    moqi_quant other;
    moqi_quant_read probe = *c;
    memset(&other, 0, sizeof other);
    probe.q = &other;
    probe.err = NULL;
    const moq_json *s = moqi_modelopt_settings(block), *method = moqi_get(block, "quant_method"), *algo = moqi_get(s, "quant_algo");
    const char *said = moq_json_string(algo ? algo : method);
    if (!said || (!algo && moqi_starts(said, "modelopt"))) said = "";
    if (!moqi_same(said, c->q->algo))
        moqi_log(c->desc, MOQ_LOG_WARNING, MOQ_E_MISMATCH, moqi_at(c->file, "key", "quant_algo", -1),
                 "'%q' here, '%q' in config.json; this file wins", c->q->algo, said);
    moq_result r = moqi_read_kv(&probe, s, moqi_get(s, "kv_cache_quant_algo") ? "kv_cache_quant_algo" : "kv_cache_scheme");
    if (r != MOQ_OK || other.kv != c->q->kv)
        moqi_log(c->desc, MOQ_LOG_WARNING, MOQ_E_MISMATCH, moqi_at(c->file, "key", "kv_cache_quant_algo", -1),
                 "'%s' here, '%s' in config.json; this file wins", moq_kv_format_name(c->q->kv),
                 r == MOQ_OK ? moq_kv_format_name(other.kv) : "unknown");
}

/* ------------------------------------------------------------------------------------------------
   >>foreign         blocks of other tools: compressed-tensors, gpt-oss, FP8 blocks, AWQ, GPTQ
   Everything becomes claims with codings; what is not supported is refused by name.
   ------------------------------------------------------------------------------------------------ */

/* ---- compressed-tensors ---- */

static const char *const moqi_ct_formats[] = { /* by MOQI_CT_... */
    "", "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "float-quantized", "int-quantized",
    "naive-quantized", "dense"};

/* The library's presets: a group named so is a list of targets. */
#define MOQI_CT_MX_IN(elem) {elem, 1, 32, MOQ_F8_E8M0, 0, 1, 0, MOQ_RULE_E8M0_ROUND}
static const struct { const char *name; int format; moq_coding weight, input; } moqi_ct_presets[] = {
    {"NVFP4", MOQI_CT_NVFP4, MOQI_NVFP4, MOQI_NVFP4_IN},
    {"NVFP4A16", MOQI_CT_NVFP4, MOQI_NVFP4, MOQI_WIDE},
    {"MXFP4", MOQI_CT_MXFP4, MOQI_MX(MOQ_F4), MOQI_CT_MX_IN(MOQ_F4)},
    {"MXFP4A16", MOQI_CT_MXFP4, MOQI_MX(MOQ_F4), MOQI_WIDE},
    {"MXFP8", MOQI_CT_MXFP8, MOQI_MX(MOQ_F8_E4M3), MOQI_CT_MX_IN(MOQ_F8_E4M3)},
    {"MXFP8A16", MOQI_CT_MXFP8, MOQI_MX(MOQ_F8_E4M3), MOQI_WIDE},
    {"W8A16", MOQI_CT_PACK, MOQI_ROW(MOQ_I8), MOQI_WIDE},
    {"W4A16", MOQI_CT_PACK, MOQI_GROUP128(MOQ_I4), MOQI_WIDE},
    {"W4A16_ASYM", MOQI_CT_PACK, {MOQ_I4, 1, 128, MOQ_F32, 0, 0, 1, 0}, MOQI_WIDE},
    {"W8A8", MOQI_CT_INT, MOQI_ROW(MOQ_I8), MOQI_TOKEN(MOQ_I8)},
    {"INT8", MOQI_CT_INT, MOQI_ROW(MOQ_I8), MOQI_TOKEN(MOQ_I8)},
    {"W4A8", MOQI_CT_INT, MOQI_GROUP128(MOQ_I4), MOQI_TOKEN(MOQ_I8)},
    {"W4AFP8", MOQI_CT_PACK, MOQI_GROUP128(MOQ_I4), MOQI_TOKEN(MOQ_F8_E4M3)},
    {"FP8", MOQI_CT_FLOAT, MOQI_TENSOR(MOQ_F8_E4M3), MOQI_TENSOR(MOQ_F8_E4M3)},
    {"FP8_DYNAMIC", MOQI_CT_FLOAT, MOQI_ROW(MOQ_F8_E4M3), MOQI_TOKEN(MOQ_F8_E4M3)},
    {"FP8_BLOCK", MOQI_CT_FLOAT, MOQI_BLOCK128, MOQI_GROUP128_IN}
};

/* What a group's arguments become:
     type int, num_bits 2..8    elem I2..I8                    type float, num_bits 4, 8   elem F4, F8_E4M3
     strategy tensor            one scale in all: ALL x ALL    channel, token              one a row: 1 x ALL
     group                      1 x group_size                 tensor_group                the same, and a global scale
     block                      block_structure rows x cols    none given                  group_size > 0: group, -1: channel, else tensor
     scale_dtype                uint8: E8M0; with tensor_group: E4M3; else the scales' own dtype, said here to be F32
     dynamic                    true: all scales of inputs are found at run time; "local": those of groups only
     actorder                   group, dynamic, true: columns name their group by weight_g_idx; weight, static: only the order of rounding
   Inputs have no channel and block, weights no token and no dynamic: such files come from no release and are refused. */
/* [rows, cols] or "128x128". */
static moq_result moqi_ct_block(const moqi_quant_read *c, const moq_json *v, moq_coding *out)
{
    int64_t n[2] = {0, 0};
    const char *s = v ? moq_json_string(v) : NULL;
    if (s) {
        int part = 0;
        for (; *s && part < 2 && n[part] <= 65536; s++) {
            if (*s == 'x' || *s == 'X') part++;
            else if (*s >= '0' && *s <= '9') n[part] = n[part] * 10 + (*s - '0');
            else part = 2;
        }
        if (part != 1) n[0] = 0;
    } else if (v && v->type == MOQ_JSON_ARRAY && v->count == 2) {
        if (!moq_json_int(moq_json_at(v, 0), &n[0]) || !moq_json_int(moq_json_at(v, 1), &n[1])) n[0] = 0;
    }
    if (n[0] < 1 || n[1] < 1 || n[0] > 65536 || n[1] > 65536)
        return moqi_bad_key(c, MOQ_E_CONFIG, v && v->key ? v->key : "block_structure", "two block lengths are expected, [128, 128] or \"128x128\"");
    out->group_rows = (int32_t)n[0];
    out->group_cols = (int32_t)n[1];
    return MOQ_OK;
}

/* Lengths of groups from strategy, group_size and block_structure; the strategy may have to be inferred. */
static moq_result moqi_ct_strategy(const moqi_quant_read *c, const moq_json *a, int input, moq_coding *out)
{
    const char *name;
    int32_t group;
    moq_result r;
    if ((r = moqi_get_string(c, a, "strategy", &name)) != MOQ_OK || (r = moqi_get_group(c, a, 1, &group)) != MOQ_OK) return r;
    const moq_json *block = moqi_get(a, "block_structure");
    if (!name[0]) name = group > 0 ? "group" : group == MOQ_ALL ? "channel" : block ? "block" : "tensor";
    int grouped = strcmp(name, "group") == 0 || strcmp(name, "tensor_group") == 0;
    out->has_global = strcmp(name, "tensor_group") == 0;
    out->group_rows = 1;
    out->group_cols = MOQ_ALL;
    if (strcmp(name, "tensor") == 0) out->group_rows = MOQ_ALL;
    else if (grouped && group == 0) return moqi_bad_key(c, MOQ_E_CONFIG, "group_size", "missing although the strategy has groups");
    else if (grouped) out->group_cols = group;
    else if (strcmp(name, "block") == 0 && !input) return moqi_ct_block(c, block, out);
    else if (strcmp(name, input ? "token" : "channel") != 0)
        return moqi_fail(c->err, MOQ_E_UNSUPPORTED, moqi_at(c->file, "key", "strategy", -1), "'%q' is not supported for %s", name,
                         input ? "input_activations" : "weights");
    return MOQ_OK;
}

/* QuantizationArgs of weights or inputs as a coding. */
static moq_result moqi_ct_args(const moqi_quant_read *c, const moq_json *a, int input, moq_coding *out)
{
    static const moq_dtype ints[9] = {MOQ_NONE, MOQ_NONE, MOQ_I2, MOQ_I3, MOQ_I4, MOQ_I5, MOQ_I6, MOQ_I7, MOQ_I8};
    const char *type, *scale, *key = input ? "input_activations" : "weights";
    const moq_json *d = moqi_get(a, "dynamic");
    int32_t bits;
    int symmetric, dynamic = 0;
    moq_result r;
    memset(out, 0, sizeof *out);
    if (a->type != MOQ_JSON_OBJECT) return moqi_bad_key(c, MOQ_E_CONFIG, key, "an object is expected");
    if ((r = moqi_get_int(c, a, "num_bits", 1, 64, 8, &bits)) != MOQ_OK || (r = moqi_get_string(c, a, "type", &type)) != MOQ_OK ||
        (r = moqi_get_bool(c, a, "symmetric", 1, &symmetric)) != MOQ_OK || (r = moqi_get_string(c, a, "scale_dtype", &scale)) != MOQ_OK ||
        (r = moqi_ct_strategy(c, a, input, out)) != MOQ_OK)
        return r;
    if (moqi_same(type, "float")) out->elem = bits == 8 ? MOQ_F8_E4M3 : bits == 4 ? MOQ_F4 : MOQ_NONE;
    else if (!type[0] || moqi_same(type, "int")) out->elem = bits <= 8 ? ints[bits] : MOQ_NONE;
    if (out->elem == MOQ_NONE)
        return moqi_fail(c->err, MOQ_E_UNSUPPORTED, moqi_at(c->file, "key", key, -1),
                         "%d-bit '%q' is not supported; int of 2 to 8 bits and float of 4 or 8 are", bits, type);
    int local = d && moq_json_is(d, "local");
    if (d && !local && !moq_json_bool(d, &dynamic)) return moqi_bad_key(c, MOQ_E_CONFIG, "dynamic", "true, false or \"local\" is expected");
    if (local && !out->has_global) return moqi_bad_key(c, MOQ_E_CONFIG, "dynamic", "\"local\" needs the strategy tensor_group");
    if (!input && (dynamic || local)) return moqi_bad_key(c, MOQ_E_UNSUPPORTED, "dynamic", "weights cannot be dynamic");
    if (input && out->group_rows == 1 && !dynamic && !local)
        return moqi_bad_key(c, MOQ_E_UNSUPPORTED, "dynamic", "inputs with a static scale per token or group are not supported");
    if (input && out->has_global && !local) return moqi_bad_key(c, MOQ_E_UNSUPPORTED, "dynamic", "inputs with tensor_group must be \"local\"");
    if (!symmetric && (out->elem == MOQ_F4 || out->elem == MOQ_F8_E4M3))
        return moqi_bad_key(c, MOQ_E_UNSUPPORTED, "symmetric", "asymmetric float is not supported");
    out->dynamic = (uint8_t)(dynamic || local);
    out->zero_point = (uint8_t)!symmetric;
    out->scale = out->has_global ? MOQ_F8_E4M3 : strstr(scale, "uint8") || strstr(scale, "e8m0") ? MOQ_F8_E8M0 : MOQ_F32;
    return MOQ_OK;
}

/* The format of a group: its own, else the file's; "mixed-precision" and none leave it to the codings. */
static moq_result moqi_ct_format(const moqi_quant_read *c, const moq_json *block, const moq_json *group, const moqi_claim *a, int *out)
{
    char known[200];
    const char *name;
    moq_dtype e = a->weight.elem;
    if (moqi_get_string(c, group, "format", &name) != MOQ_OK || (!name[0] && moqi_get_string(c, block, "format", &name) != MOQ_OK))
        return MOQ_E_CONFIG;
    for (int i = 1; i <= MOQI_CT_DENSE; i++)
        if (moqi_same(name, moqi_ct_formats[i])) { *out = i; return MOQ_OK; }
    moqi_join(known, sizeof known, moqi_ct_formats + 1, MOQI_CT_DENSE);
    if (name[0] && !moqi_same(name, "mixed-precision"))
        return moqi_fail(c->err, MOQ_E_UNSUPPORTED, moqi_at(c->file, "key", "format", -1), "'%q' is not supported; known are %s", name, known);
    if (e == MOQ_F4) *out = a->weight.has_global ? MOQI_CT_NVFP4 : MOQI_CT_MXFP4;
    else if (e == MOQ_F8_E4M3) *out = a->weight.scale == MOQ_F8_E8M0 ? MOQI_CT_MXFP8 : MOQI_CT_FLOAT;
    else *out = a->input.elem == MOQ_NONE ? MOQI_CT_PACK : MOQI_CT_INT;
    return MOQ_OK;
}

/* What follows from the codings and the format. MX inputs use this library's own rounding of scales. */
static void moqi_ct_finish(moqi_claim *a, int format, int old_packing)
{
    int mx = format == MOQI_CT_MXFP4 || format == MOQI_CT_MXFP8;
    a->known = 1;
    a->algo = "";
    a->packed_format = format;
    a->zero_point = a->weight.zero_point;
    a->weight_bits = moq_dtype_bits(a->weight.elem);
    a->old_packing = old_packing && 32 % a->weight_bits != 0;
    if (mx) a->weight.scale = MOQ_F8_E8M0; /* releases before 0.13 do not write scale_dtype */
    if (mx && a->input.group_cols == 32) a->input.scale = MOQ_F8_E8M0;
    if (a->input.scale == MOQ_F8_E8M0) a->input.rule = a->input.elem == MOQ_I8 ? MOQ_RULE_E8M0_CEIL : MOQ_RULE_E8M0_ROUND; /* MXINT8 is ModelOpt's */
    moqi_set_group(a);
}

/* compressed-tensors before 0.18 put 32 / bits whole codes into a word and left the rest empty; since then codes are dense and may straddle
   two words. For 2, 4 and 8 bits both are the same. A file without a version is older than the key. */
static int moqi_ct_is_old(const char *version)
{
    int n[2] = {0, 0}, part = 0;
    for (; *version && part < 2; version++) {
        if (*version == '.') part++;
        else if (*version < '0' || *version > '9' || n[part] > 10000) return 1;
        else n[part] = n[part] * 10 + (*version - '0');
    }
    return n[0] == 0 && n[1] < 18;
}

/* Targets or ignore entries: "re:..." , a class name, or a module name. */
static moq_result moqi_ct_names(const moqi_quant_read *c, const moq_json *list, const char *key, uint32_t value, moqi_rules *s)
{
    moqi_regex x;
    if (!list) return MOQ_OK;
    moq_result r = moqi_check_list(c, list, key);
    for (const moq_json *e = moq_json_first(list); e && r == MOQ_OK; e = moq_json_next(list, e)) {
        const char *text = moqi_keep(c, e->text);
        if (!text) return MOQ_E_NOMEM;
        int is_regex = moqi_starts(text, "re:"), is_class = !is_regex && text[0] >= 'A' && text[0] <= 'Z';
        if (is_regex && (r = moqi_regex_compile(&x, text + 3, c->r, moqi_at(c->file, "key", key, -1), c->err)) != MOQ_OK) return r;
        int kind = is_regex ? MOQI_RULE_REGEX : MOQI_RULE_EXACT;
        if (is_class && strstr(text, "Linear")) kind = MOQI_RULE_LINEAR;
        if (is_class && strstr(text, "Embedding")) kind = MOQI_RULE_EMBEDDING;
        if (is_class && kind == MOQI_RULE_EXACT)
            moqi_log(c->desc, MOQ_LOG_WARNING, MOQ_E_UNSUPPORTED, moqi_at(c->file, "key", key, -1), "class '%q' is unknown and matches nothing",
                     text);
        moqi_rules_add(s, text, kind, value, is_regex ? &x : NULL);
        r = moqi_check_count(c, s->pattern_count, key);
    }
    return r;
}

/* One config group: {targets, weights, input_activations, format}, or a preset's name with a list of targets. Quantized outputs are
   written by no preset; a group without weights says that its modules are plain. */
static moq_result moqi_ct_group(const moqi_quant_read *c, const moq_json *block, const moq_json *g, int old_packing, moqi_claim *a)
{
    const moq_json *weights = moqi_get(g, "weights"), *inputs = moqi_get(g, "input_activations"), *order = moqi_get(weights, "actorder");
    int format = MOQI_CT_NONE;
    moq_result r = MOQ_OK;
    a->algo = "";
    if (g->type == MOQ_JSON_ARRAY) {
        for (size_t i = 0; i < MOQI_COUNT(moqi_ct_presets); i++) {
            if (!moqi_same(g->key, moqi_ct_presets[i].name)) continue;
            a->weight = moqi_ct_presets[i].weight;
            a->input = moqi_ct_presets[i].input;
            moqi_ct_finish(a, moqi_ct_presets[i].format, old_packing);
            return MOQ_OK;
        }
        return moqi_fail(c->err, MOQ_E_UNSUPPORTED, moqi_at(c->file, "key", g->key, -1), "no preset of that name is known; write the group out");
    }
    if (g->type != MOQ_JSON_OBJECT) return moqi_bad_key(c, MOQ_E_CONFIG, g->key, "an object is expected");
    if (moqi_get(g, "output_activations")) return moqi_bad_key(c, MOQ_E_UNSUPPORTED, "output_activations", "quantized outputs are not supported");
    if (!weights && inputs)
        return moqi_bad_key(c, MOQ_E_UNSUPPORTED, "input_activations", "quantized inputs of unquantized weights are not supported");
    if (!weights) { a->known = a->excluded = 1; return MOQ_OK; }
    if ((r = moqi_ct_args(c, weights, 0, &a->weight)) != MOQ_OK || (inputs && (r = moqi_ct_args(c, inputs, 1, &a->input)) != MOQ_OK)) return r;
    if (order && !moq_json_bool(order, &a->act_order)) {
        const char *name = moq_json_string(order);
        if (!name) return moqi_bad_key(c, MOQ_E_CONFIG, "actorder", "a name, true, false or null is expected");
        a->act_order = moqi_same(name, "group") || moqi_same(name, "dynamic");
    }
    if ((r = moqi_ct_format(c, block, g, a, &format)) != MOQ_OK) return r;
    moqi_ct_finish(a, format, old_packing);
    return MOQ_OK;
}

/* One entry of transform_config: what touches weights is folded already; what the runtime must do to inputs is kept. */
static moq_result moqi_ct_transform(const moqi_quant_read *c, const moq_json *t)
{
    const char *type, *location, *size_key = moqi_get(t, "head_dim") ? "head_dim" : "block_size";
    const moq_json *apply = moqi_get(t, "apply");
    int32_t size;
    int inverse;
    moq_result r;
    if ((r = moqi_get_string(c, t, "type", &type)) != MOQ_OK || (r = moqi_get_int(c, t, size_key, 1, 65536, -1, &size)) != MOQ_OK) return r;
    for (const moq_json *e = moq_json_first(apply); e; e = moq_json_next(apply, e)) {
        const moq_json *targets = moqi_get(e, "targets"), *ignore = moqi_get(e, "ignore");
        if ((r = moqi_get_string(c, e, "location", &location)) != MOQ_OK || (r = moqi_get_bool(c, e, "inverse", 0, &inverse)) != MOQ_OK) return r;
        if (moqi_same(location, "weight_input") || moqi_same(location, "weight_output")) continue;
        if (!moqi_same(location, "input"))
            return moqi_fail(c->err, MOQ_E_UNSUPPORTED, moqi_at(c->file, "key", t->key, -1),
                             "transform location '%q' is not supported; input, weight_input, weight_output are", location);
        if ((!moqi_same(type, "hadamard") && !moqi_same(type, "random-hadamard")) || (inverse && !moqi_same(type, "hadamard")))
            return moqi_fail(c->err, MOQ_E_UNSUPPORTED, moqi_at(c->file, "key", t->key, -1),
                             "%stransform type '%q' of inputs is not supported; hadamard and random-hadamard are", inverse ? "inverse " : "", type);
        moqi_transform *x = &c->q->transforms[c->q->transform_count++];
        x->name = moqi_keep(c, t->key);
        x->size = size;
        if (!x->name) return MOQ_E_NOMEM;
        if ((r = moqi_rules_make(&x->targets, c->r, targets ? targets->count : 0, c->err)) != MOQ_OK ||
            (r = moqi_ct_names(c, targets, "targets", 0, &x->targets)) != MOQ_OK ||
            (r = moqi_rules_make(&x->ignore, c->r, ignore ? ignore->count : 0, c->err)) != MOQ_OK ||
            (r = moqi_ct_names(c, ignore, "ignore", 0, &x->ignore)) != MOQ_OK)
            return r;
    }
    return MOQ_OK;
}

/* transform_config: {config_groups: {name: {type, apply: [...]}}}. Only entries that act on inputs at run time become transforms. */
static moq_result moqi_ct_transforms(const moqi_quant_read *c, const moq_json *groups)
{
    size_t n = 0;
    moq_result r = MOQ_OK;
    for (const moq_json *t = moq_json_first(groups); t; t = moq_json_next(groups, t)) {
        const moq_json *apply = moqi_get(t, "apply");
        n += apply ? apply->count : 0;
    }
    if (n == 0 || (r = moqi_check_count(c, n, "transform_config")) != MOQ_OK) return r;
    c->q->transforms = (moqi_transform *)moqi_take_array(c->r, n, sizeof *c->q->transforms);
    if (!c->q->transforms) return moqi_nomem(c->err, n * sizeof *c->q->transforms);
    for (const moq_json *t = moq_json_first(groups); t && r == MOQ_OK; t = moq_json_next(groups, t)) r = moqi_ct_transform(c, t);
    return r;
}

/* The whole block. Claims are numbered by group; a target's value is the number of its group, so that the first matching target in file
   order gives the claim, names and regular expressions before class names, as the engines resolve them. */
static moq_result moqi_read_ct(const moqi_quant_read *c, const moq_json *block)
{
    moqi_quant *q = c->q;
    const moq_json *groups = moqi_get(block, "config_groups"), *ignore = moqi_get(block, "ignore"),
                   *sparse = moqi_get(moqi_get(block, "sparsity_config"), "format");
    const char *version, *format;
    size_t names = 0;
    moq_result r;
    q->family = MOQ_FAMILY_COMPRESSED_TENSORS;
    if ((r = moqi_get_string(c, block, "version", &version)) != MOQ_OK || (r = moqi_get_string(c, block, "format", &format)) != MOQ_OK ||
        (r = moqi_keep_pair(c, format, "", &q->algo)) != MOQ_OK || (r = moqi_keep_pair(c, "compressed-tensors", version, &q->producer)) != MOQ_OK ||
        (r = moqi_read_kv(c, block, "kv_cache_scheme")) != MOQ_OK)
        return r;
    if (sparse && !moq_json_is(sparse, "dense"))
        return moqi_bad_key(c, MOQ_E_UNSUPPORTED, "sparsity_config", "sparse weights are not supported; save the model dense");
    if (groups && groups->type != MOQ_JSON_OBJECT) return moqi_bad_key(c, MOQ_E_CONFIG, "config_groups", "an object is expected");
    for (const moq_json *g = moq_json_first(groups); g; g = moq_json_next(groups, g)) {
        const moq_json *targets = g->type == MOQ_JSON_ARRAY ? g : moqi_get(g, "targets");
        names += targets ? targets->count : 0;
    }
    q->claims = (moqi_claim *)moqi_take_array(c->r, (groups ? groups->count : 0) + 1, sizeof *q->claims);
    if (!q->claims) return moqi_nomem(c->err, sizeof *q->claims);
    if ((r = moqi_rules_make(&q->targets, c->r, names, c->err)) != MOQ_OK ||
        (r = moqi_rules_make(&q->ignore, c->r, ignore ? ignore->count : 0, c->err)) != MOQ_OK ||
        (r = moqi_ct_names(c, ignore, "ignore", 0, &q->ignore)) != MOQ_OK)
        return r;
    for (const moq_json *g = moq_json_first(groups); g; g = moq_json_next(groups, g), q->claim_count++) {
        if ((r = moqi_ct_group(c, block, g, moqi_ct_is_old(version), &q->claims[q->claim_count])) != MOQ_OK ||
            (r = moqi_ct_names(c, g->type == MOQ_JSON_ARRAY ? g : moqi_get(g, "targets"), "targets", q->claim_count, &q->targets)) != MOQ_OK)
            return r;
    }
    return moqi_ct_transforms(c, moqi_get(moqi_get(block, "transform_config"), "config_groups"));
}

/* ---- gpt-oss, FP8 blocks, AWQ, GPTQ: one claim for all, and a list of exceptions ---- */

/* What these blocks share: the base claim, claims[0], that holds for every module, room for `more_claims` others, and the skip list. Its
   names are parts of module names ("mlp.gate", "visual") or patterns for containers ("model.layers.*.self_attn"). */
static moq_result moqi_read_common(const moqi_quant_read *c, const moq_json *block, const char *algo, size_t more_claims, moqi_claim **out)
{
    moqi_quant *q = c->q;
    const char *key = moqi_get(block, "modules_to_not_convert") ? "modules_to_not_convert" : "ignored_layers";
    const moq_json *skip = moqi_get(block, key);
    int head;
    moq_result r = moqi_keep_pair(c, algo, "", &q->algo);
    if (r == MOQ_OK) r = moqi_get_bool(c, block, "lm_head", 0, &head);
    if (r == MOQ_OK) q->plain_ends = !head;
    if (r == MOQ_OK && skip) r = moqi_read_excludes(c, skip, key, 1);
    if (r != MOQ_OK) return r;
    q->claims = (moqi_claim *)moqi_take_array(c->r, 1 + (uint64_t)more_claims, sizeof *q->claims);
    if (!q->claims) return moqi_nomem(c->err, sizeof *q->claims);
    q->uniform = 1;
    q->claim_count = 1;
    q->claims[0].known = 1;
    q->claims[0].algo = "";
    *out = q->claims;
    return MOQ_OK;
}

/* gpt-oss: expert stacks in MXFP4, weight-only; nothing else is quantized whatever the skip list says. */
static moq_result moqi_read_gpt_oss(const moqi_quant_read *c, const moq_json *block)
{
    static const moq_coding weight = MOQI_MX(MOQ_F4);
    moqi_claim *a;
    c->q->family = MOQ_FAMILY_GPT_OSS;
    c->q->experts_only = 1;
    moq_result r = moqi_read_common(c, block, "mxfp4", 0, &a);
    if (r != MOQ_OK) return r;
    a->weight = weight;
    moqi_set_group(a);
    return MOQ_OK;
}

/* Keys of an "fp8" block: fmt e4m3, activation_scheme dynamic or static, weight_block_size [rows, cols] or absent, scale_fmt ue8m0 (DeepSeek V3.1:
   scales of inputs are powers of two, 2^ceil(log2(amax / 448))), modules_to_not_convert or ignored_layers, moe_quant_algo. */
/* DeepSeek: blocks of weight_block_size, inputs per token and group of as many columns; without blocks, one scale per tensor. */
static moq_result moqi_read_fp8(const moqi_quant_read *c, const moq_json *block)
{
    static const moq_coding tensor = MOQI_TENSOR(MOQ_F8_E4M3), blocks = MOQI_BLOCK128;
    const moq_json *size = moqi_get(block, "weight_block_size");
    const char *scheme, *scale, *format;
    moqi_claim *a;
    moq_result r;
    c->q->family = MOQ_FAMILY_FP8_BLOCK;
    if ((r = moqi_get_string(c, block, "activation_scheme", &scheme)) != MOQ_OK || (r = moqi_get_string(c, block, "scale_fmt", &scale)) != MOQ_OK ||
        (r = moqi_get_string(c, block, "fmt", &format)) != MOQ_OK || (r = moqi_read_common(c, block, "fp8", 1, &a)) != MOQ_OK ||
        (r = moqi_read_kv(c, block, "kv_cache_scheme")) != MOQ_OK)
        return r;
    a->weight = size ? blocks : tensor;
    a->input = tensor;
    if (size && (r = moqi_ct_block(c, size, &a->weight)) != MOQ_OK) return r;
    if (scheme[0] && !moqi_same(scheme, "dynamic") && !moqi_same(scheme, "static"))
        return moqi_fail(c->err, MOQ_E_UNSUPPORTED, moqi_at(c->file, "key", "activation_scheme", -1), "'%q' is not known; dynamic and static are",
                         scheme);
    if (format[0] && !moqi_same(format, "e4m3") && !moqi_same(format, "float8_e4m3fn"))
        return moqi_fail(c->err, MOQ_E_UNSUPPORTED, moqi_at(c->file, "key", "fmt", -1), "'%q' is not supported; e4m3 is", format);
    if (!moqi_same(scheme, "static")) {
        a->input.dynamic = 1;
        a->input.group_rows = 1;
        a->input.group_cols = size ? a->weight.group_cols : MOQ_ALL;
        if (moqi_same(scale, "ue8m0")) { /* scales are rounded up to powers of two */
            a->input.scale = MOQ_F8_E8M0;
            a->input.rule = MOQ_RULE_E8M0_CEIL;
        }
    }
    moqi_set_group(a);
    const char *experts; /* hybrid exports: experts as ModelOpt's NVFP4 inside an FP8 model */
    if ((r = moqi_get_string(c, block, "moe_quant_algo", &experts)) != MOQ_OK || !experts[0]) return r;
    if (!moqi_same(experts, "NVFP4"))
        return moqi_fail(c->err, MOQ_E_UNSUPPORTED, moqi_at(c->file, "key", "moe_quant_algo", -1), "'%q' is not known; NVFP4 is", experts);
    if ((r = moqi_rules_make(&c->q->targets, c->r, 1, c->err)) != MOQ_OK) return r;
    c->q->claims[1].known = 1;
    c->q->claims[1].algo = "NVFP4";
    moqi_rules_add(&c->q->targets, "*.experts.*", MOQI_RULE_GLOB, c->q->claim_count++, NULL);
    return MOQ_OK;
}

/* Settings that AWQ and GPTQ share: an unsigned integer per weight, groups along the input, one zero point per group. */
static moq_result moqi_read_int_group(const moqi_quant_read *c, const moq_json *o, const moqi_claim *base, moqi_claim *a)
{
    static const moq_dtype ints[9] = {MOQ_NONE, MOQ_NONE, MOQ_I2, MOQ_I3, MOQ_I4, MOQ_NONE, MOQ_NONE, MOQ_NONE, MOQ_I8};
    int32_t group, bits;
    moq_result r;
    *a = *base;
    if ((r = moqi_get_int(c, o, "bits", 1, 64, base->weight_bits, &bits)) != MOQ_OK || (r = moqi_get_group(c, o, 1, &group)) != MOQ_OK) return r;
    if (bits > 8 || ints[bits] == MOQ_NONE)
        return moqi_fail(c->err, bits ? MOQ_E_UNSUPPORTED : MOQ_E_CONFIG, moqi_at(c->file, "key", "bits", -1),
                         "%d bits are not supported; 2, 3, 4 and 8 are", bits);
    if (group == 0) group = base->group_size;
    if (group == 0) group = 128; /* both tools' default */
    a->weight_bits = bits;
    a->weight.elem = ints[bits];
    a->weight.group_rows = 1;
    a->weight.group_cols = group;
    a->weight.scale = MOQ_F16;
    a->weight.zero_point = (uint8_t)a->zero_point;
    moqi_set_group(a);
    return MOQ_OK;
}

/* AutoAWQ's gemm layout, 4 bits. Other layouts (gemv, llm-awq) hold the same names with other bit orders, so they must not be guessed. */
static moq_result moqi_read_awq(const moqi_quant_read *c, const moq_json *block)
{
    const char *version, *backend;
    moqi_claim *a, base;
    moq_result r;
    c->q->family = MOQ_FAMILY_AWQ;
    if ((r = moqi_get_string(c, block, "version", &version)) != MOQ_OK || (r = moqi_get_string(c, block, "backend", &backend)) != MOQ_OK ||
        (r = moqi_read_common(c, block, "awq", 0, &a)) != MOQ_OK || (r = moqi_get_bool(c, block, "zero_point", 1, &a->zero_point)) != MOQ_OK)
        return r;
    if ((version[0] && !moqi_same(version, "gemm")) || (backend[0] && !moqi_same(backend, "autoawq")))
        return moqi_fail(c->err, MOQ_E_UNSUPPORTED, moqi_at(c->file, "key", "version", -1), "AWQ layout '%q' %q is not supported; gemm of autoawq is",
                         version, backend);
    base = *a;
    base.weight_bits = 4;
    if ((r = moqi_read_int_group(c, block, &base, a)) != MOQ_OK) return r;
    return a->weight_bits == 4 ? MOQ_OK : moqi_bad_key(c, MOQ_E_UNSUPPORTED, "bits", "AWQ is read with 4 bits only");
}

/* GPTQModel's per-module overrides: "-:regex" leaves out, "+:regex" or "regex" changes settings; the first that matches counts. */
static moq_result moqi_read_dynamic(const moqi_quant_read *c, const moq_json *map)
{
    moqi_quant *q = c->q;
    moqi_regex x;
    moq_result r = moqi_check_count(c, map->count, "dynamic");
    if (r == MOQ_OK) r = moqi_rules_make(&q->targets, c->r, map->count, c->err);
    for (const moq_json *e = moq_json_first(map); e && r == MOQ_OK; e = moq_json_next(map, e)) {
        int skip = moqi_starts(e->key, "-:");
        const char *pattern = moqi_keep(c, e->key + (skip || moqi_starts(e->key, "+:") ? 2 : 0));
        moqi_claim *a = &q->claims[q->claim_count];
        if (!pattern) return MOQ_E_NOMEM;
        if ((r = moqi_regex_compile(&x, pattern, c->r, moqi_at(c->file, "key", "dynamic", -1), c->err)) != MOQ_OK ||
            (r = moqi_read_int_group(c, e, &q->claims[0], a)) != MOQ_OK ||
            (r = moqi_get_bool(c, e, "desc_act", q->claims[0].act_order, &a->act_order)) != MOQ_OK)
            return r;
        a->excluded = skip;
        moqi_rules_add(&q->targets, pattern, MOQI_RULE_REGEX, q->claim_count++, &x);
    }
    return r;
}

/* GPTQ: checkpoint_format gptq stores zero points minus one, gptq_v2 as they are; sym: all zero points are the middle of the range. */
static moq_result moqi_read_gptq(const moqi_quant_read *c, const moq_json *block)
{
    const moq_json *dynamic = moqi_get(block, "dynamic");
    const char *format;
    int marlin;
    moqi_claim *a, base;
    moq_result r;
    c->q->family = MOQ_FAMILY_GPTQ;
    if (dynamic && dynamic->type != MOQ_JSON_OBJECT) return moqi_bad_key(c, MOQ_E_CONFIG, "dynamic", "an object of patterns is expected");
    if ((r = moqi_get_string(c, block, "checkpoint_format", &format)) != MOQ_OK ||
        (!format[0] && (r = moqi_get_string(c, block, "format", &format)) != MOQ_OK) ||
        (r = moqi_get_bool(c, block, "is_marlin_format", 0, &marlin)) != MOQ_OK ||
        (r = moqi_read_common(c, block, "gptq", dynamic ? dynamic->count : 0, &a)) != MOQ_OK ||
        (r = moqi_get_bool(c, block, "desc_act", 0, &a->act_order)) != MOQ_OK || (r = moqi_get_bool(c, block, "sym", 1, &a->zero_point)) != MOQ_OK)
        return r;
    /* read as `sym` above; files hold zero points either way */
    a->zero_point = !a->zero_point;
    a->gptq_v2 = moqi_same(format, "gptq_v2");
    if (marlin || (format[0] && !a->gptq_v2 && !moqi_same(format, "gptq")))
        return moqi_fail(c->err, MOQ_E_UNSUPPORTED, moqi_at(c->file, "key", "checkpoint_format", -1), "'%q' is not supported; gptq and gptq_v2 are",
                         marlin ? "marlin" : format);
    base = *a;
    if (!moqi_get(block, "bits")) return moqi_bad_key(c, MOQ_E_CONFIG, "bits", "missing");
    if ((r = moqi_read_int_group(c, block, &base, a)) != MOQ_OK) return r;
    return dynamic ? moqi_read_dynamic(c, dynamic) : MOQ_OK;
}

/* ------------------------------------------------------------------------------------------------
   >>config          what the configuration files say of a folder and of each module
   A lookup allocates nothing and costs little: exact names lie in a hash map.
   ------------------------------------------------------------------------------------------------ */

MOQ_API int moq_glob_match(const char *pattern, const char *name)
{
    return pattern && name && moqi_glob(pattern, strlen(pattern), name, strlen(name));
}

/* config.json alone: there is no other block to borrow from. */
static moq_result moqi_read_flat_modelopt(const moqi_quant_read *c, const moq_json *block) { return moqi_read_modelopt(c, block, NULL); }

/* quant_method -> reader. Names are compared without case and with '_' as '-'. */
static const struct { const char *name; moq_result (*read)(const moqi_quant_read *c, const moq_json *block); } moqi_methods[] = {
    {"modelopt", moqi_read_flat_modelopt}, {"compressed-tensors", moqi_read_ct}, {"mxfp4", moqi_read_gpt_oss},
    {"fp8", moqi_read_fp8}, {"awq", moqi_read_awq}, {"gptq", moqi_read_gptq}
};

/* A block by its quant_method. Without one, ModelOpt's and compressed-tensors' keys tell them apart; `fallback` is what the place of
   the block suggests. */
static moq_result moqi_read_block(const moqi_quant_read *c, const moq_json *block, const char *fallback)
{
    char method[64], known[120];
    const char *names[MOQI_COUNT(moqi_methods)], *written;
    if (block->type != MOQ_JSON_OBJECT)
        return moqi_bad_key(c, MOQ_E_CONFIG, block->key ? block->key : "quantization_config", "an object is expected");
    if (moqi_get_string(c, block, "quant_method", &written) != MOQ_OK) return MOQ_E_CONFIG;
    int nested = moqi_get(block, "quantization") || moqi_get(block, "quant_algo");
    if (!written[0]) written = nested ? "modelopt" : moqi_get(block, "config_groups") ? "compressed-tensors" : fallback;
    moqi_format(method, sizeof method, "%s", written);
    for (char *p = method; *p; p++) *p = *p == '_' ? '-' : moqi_lower(*p);
    /* modelopt_fp4 and the like are what engines turn "modelopt" into, and some files were saved that way */
    if (moqi_starts(method, "modelopt")) method[8] = 0;
    for (size_t i = 0; i < MOQI_COUNT(moqi_methods); i++) {
        names[i] = moqi_methods[i].name;
        if (strcmp(method, names[i]) == 0) return moqi_methods[i].read(c, block);
    }
    moqi_join(known, sizeof known, names, MOQI_COUNT(names));
    return moqi_fail(c->err, MOQ_E_UNSUPPORTED, moqi_at(c->file, "key", "quant_method", -1), "'%q' is not supported; known are %s", written, known);
}

/* Read the description of a folder: hf_quant_config.json goes before config.json, where the block may lie in four places, and that before
   quantize_config.json. config may be an empty object; hf_quant and gptq may be NULL. Everything kept is copied into the arena. */
MOQI_UNUSED static moq_result moqi_quant_parse(moqi_quant *q, const moq_json *config, const moq_json *hf_quant, const moq_json *gptq, moqi_arena *r,
                                               const moq_open_desc *desc, moq_error *err)
{
    const char *places[] = {"quantization_config", "text_config", "compression_config"};
    const moq_json *block = NULL;
    moqi_quant_read c;
    memset(q, 0, sizeof *q);
    q->algo = q->producer = "";
    c.q = q;
    c.r = r;
    c.desc = desc;
    c.err = err;
    c.file = "hf_quant_config.json";
    for (size_t i = 0; i < MOQI_COUNT(places) && !block; i++) {
        block = moqi_get(config, places[i]);
        if (i == 1) block = moqi_get(block, "quantization_config");
    }
    /* ModelOpt's own file keeps what the converted copy loses, so it goes first and the copy is only compared */
    if (hf_quant) {
        if (hf_quant->type != MOQ_JSON_OBJECT) return moqi_fail(err, MOQ_E_CONFIG, moqi_at(c.file, NULL, NULL, -1), "an object is expected");
        moq_result res = moqi_read_modelopt(&c, hf_quant, block);
        if (res == MOQ_OK && block) moqi_compare_blocks(&c, block);
        return res;
    }
    c.file = "config.json";
    if (block) return moqi_read_block(&c, block, moqi_get(config, "compression_config") == block ? "compressed-tensors" : "(none)");
    c.file = "quantize_config.json";
    return gptq ? moqi_read_block(&c, gptq, "gptq") : MOQ_OK;
}

/* One spelling of a module name against all rules. 1: the description knows it. */
static int moqi_claim_name(const moqi_quant *q, const char *name, size_t bytes, moqi_claim *out)
{
    const moqi_rule *x = NULL;
    if (q->targets.count > 0 && q->family == MOQ_FAMILY_MODELOPT) x = moqi_rules_cover(&q->targets, name, bytes);
    else if (q->targets.count > 0) x = moqi_rules_match(&q->targets, name, bytes);
    if (x) *out = q->claims[x->value];
    if (moqi_rules_exclude(&q->ignore, name, bytes)) out->known = out->excluded = 1;
    return out->known;
}

/* A multimodal model's outermost parts: checkpoints and descriptions put them in different order. */
static int moqi_claim_outer(const moqi_quant *q, const char *module, moqi_claim *out)
{
    static const char *const outer[] = {"model.language_model.", "language_model.model.", "language_model.", "model.", ""};
    char name[MOQ_MAX_NAME_BYTES + 32];
    const char *rest = NULL;
    for (size_t i = 0; i < MOQI_COUNT(outer) && !rest; i++)
        if (moqi_starts(module, outer[i])) rest = module + strlen(outer[i]);
    for (size_t i = 0; i < MOQI_COUNT(outer); i++) {
        size_t n = moqi_format(name, sizeof name, "%s%s", outer[i], rest);
        if (n < sizeof name && moqi_claim_name(q, name, n, out)) return 1;
    }
    return 0;
}

/* What the description says of a module. MOQ_E_UNSUPPORTED when two input transforms meet. */
MOQI_UNUSED static moq_result moqi_quant_claim(const moqi_quant *q, const char *module, moqi_claim *out, moq_error *err)
{
    size_t bytes = strlen(module);
    memset(out, 0, sizeof *out);
    out->algo = "";
    if (!moqi_claim_name(q, module, bytes, out) && (q->outer_names || strstr(module, "language_model"))) moqi_claim_outer(q, module, out);
    /* an excluded module still gets the common claim: if its tensors hold scales after all, they decide and need it */
    if (q->uniform && (!out->known || (out->excluded && !out->has_coding && !out->algo[0]))) {
        int excluded = out->excluded;
        if (!q->experts_only || strstr(module, ".experts")) *out = q->claims[0];
        out->excluded |= excluded;
    }
    /* other tools never quantize embeddings and, unless they say so, the head, and do not list them */
    if (q->plain_ends && (moqi_ends(module, "lm_head") || moqi_is_embedding(module, bytes))) out->excluded = 1;
    /* transforms have targets and exceptions of their own, apart from those of quantization */
    for (uint32_t i = 0; i < q->transform_count; i++) {
        const moqi_transform *t = &q->transforms[i];
        if (!moqi_rules_match(&t->targets, module, bytes) || moqi_rules_match(&t->ignore, module, bytes)) continue;
        if (out->transform)
            return moqi_fail(err, MOQ_E_UNSUPPORTED, moqi_at("config.json", "layer", module, -1),
                             "two input transforms, '%q' and '%q'; one is supported", out->transform, t->name);
        out->transform = t->name;
        out->hadamard_size = t->size;
    }
    return MOQ_OK;
}

/* ------------------------------------------------------------------------------------------------
   >>storage         how weights of every format are stored: dtypes, shapes, packing, scales
   Copies nothing: shapes are checked exactly, scalar scales are read, everything else stays a view.
   ------------------------------------------------------------------------------------------------ */

/* The tensors of one checkpoint: sorted by name, with an index of the names and the base names of the files. */
typedef struct moqi_tensor_set {
    const moq_tensor *list;
    size_t count;
    const moqi_map *map;
    const char *const *files;
} moqi_tensor_set;

/* Which naming a module's tensors follow:

       kind      codes                                scales and their like
       WEIGHT    M.weight [rows, cols or packed]      M.weight_scale, M.weight_scale_2, M.input_scale, M.bias
       PACKED    M.weight_packed                      M.weight_scale, M.weight_global_scale, M.weight_zero_point, M.weight_shape
       QWEIGHT   M.qweight                            M.scales, M.qzeros, M.g_idx
       STACK     P [experts, cols, rows]              P_weight_scale, P_weight_scale_2, P_input_scale, P_bias
       RESTACK   M.weight [experts, rows, cols]       as WEIGHT, each with the experts in front
       BLOCKS    P_blocks [experts, rows, groups, 16] P_scales, P_bias

   M is a module, P a parameter without one; the module of P is called P. */
enum {
    MOQI_STORE_WEIGHT = 1, /* M.weight [rows, cols] or packed; M.weight_scale ... */
    MOQI_STORE_PACKED,     /* compressed-tensors: M.weight_packed */
    MOQI_STORE_QWEIGHT,    /* AutoAWQ and GPTQ: M.qweight, M.qzeros, M.scales */
    MOQI_STORE_STACK,      /* a parameter P [experts, cols, rows]; P_weight_scale ... */
    MOQI_STORE_RESTACK,    /* M.weight [experts, rows, cols]; M.weight_scale ... */
    MOQI_STORE_BLOCKS      /* gpt-oss: P_blocks [experts, rows, cols/32, 16], P_scales */
};

typedef struct moqi_module {
    const char *name;
    const char *tensor;    /* that holds the codes */
    const char *transform; /* tensor of the online input transform, or NULL */
    uint32_t kind;         /* MOQI_STORE_... */
} moqi_module;

/* Everything that the functions below share while one module is bound. */
typedef struct moqi_binder {
    const moqi_tensor_set *set;
    const moqi_quant *q;
    const moqi_module *m;
    const moq_open_desc *desc; /* takes findings, or NULL */
    moq_error *err;
    const moq_tensor *t;       /* the codes */
    moq_linear *w;
    moqi_claim claim;
    int64_t a, b;              /* stored matrix [a, b] in elements of t, without the dimension of experts */
    int stacked, transposed;
} moqi_binder;

/* ---- names ---- */

/* A tensor of any name, or NULL. The map holds every name once, so this is one probe. */
static const moq_tensor *moqi_set_find(const moqi_tensor_set *set, const char *name)
{
    const moqi_entry *e = moqi_map_find(set->map, name, strlen(name));
    return e ? &set->list[e->value] : NULL;
}

/* A tensor name, an ending and the NUL. A name that is cut would match nothing, for no tensor is longer than the limit. */
#define MOQI_NAME_ROOM (MOQ_MAX_NAME_BYTES + 64)

/* "M.part", or "P_part" beside a parameter without a module of its own. */
static void moqi_part_name(const moqi_module *m, const char *part, char *text)
{
    int bare = m->kind == MOQI_STORE_STACK || m->kind == MOQI_STORE_BLOCKS;
    moqi_format(text, MOQI_NAME_ROOM, "%s%c%s", m->name, bare ? '_' : '.', part);
}

/* The tensor that stands beside the codes under that ending, or NULL. */
static const moq_tensor *moqi_part(const moqi_binder *b, const char *part)
{
    char text[MOQI_NAME_ROOM];
    moqi_part_name(b->m, part, text);
    return moqi_set_find(b->set, text);
}

/* Shapes and dtypes are wrong as a whole, so no byte is named. */
static moqi_where moqi_at_tensor(const moqi_binder *b, const moq_tensor *t)
{
    return moqi_at(b->set->files ? b->set->files[t->shard] : NULL, "tensor", t->name, -1);
}

/* ---- failures: each names the tensor, what was found and what was expected ---- */

/* A scheme without one of its tensors cannot be read (robustness Q3): names the tensor that is not there and the one that asks for it. */
static moq_result moqi_missing(const moqi_binder *b, const char *part)
{
    char text[MOQI_NAME_ROOM];
    moqi_part_name(b->m, part, text);
    moqi_where at = moqi_at_tensor(b, b->t);
    at.object = text;
    return moqi_fail(b->err, MOQ_E_MISSING, at, "not there, but '%q' (%s) cannot be read without it; download or export the folder again", b->t->name,
                     moq_dtype_name(b->t->dtype));
}

/* Bytes of the wrong type would be read as numbers that they are not. */
static moq_result moqi_bad_dtype(const moqi_binder *b, const moq_tensor *t, const char *expected)
{
    return moqi_fail(b->err, MOQ_E_DTYPE, moqi_at_tensor(b, t), "dtype %s, expected %s (the description says '%q')", moq_dtype_name(t->dtype), expected,
                     b->claim.algo[0] ? b->claim.algo : b->q->algo);
}

/* A shape that is expected. */
typedef struct moqi_dims { uint32_t rank; uint64_t n[4]; } moqi_dims;

/* [x, y], or [x] when y is 0. A shape that follows the weight's: an expert stack has the number of experts in front. */
static moqi_dims moqi_dims2(const moqi_binder *b, int64_t x, int64_t y)
{
    moqi_dims d;
    memset(&d, 0, sizeof d);
    if (b->stacked) d.n[d.rank++] = (uint64_t)b->w->experts;
    d.n[d.rank++] = (uint64_t)x;
    if (y > 0) d.n[d.rank++] = (uint64_t)y;
    return d;
}

static int moqi_has_dims(const moq_tensor *t, moqi_dims d)
{
    return t->rank == d.rank && memcmp(t->shape, d.n, d.rank * sizeof d.n[0]) == 0;
}

/* `why` says in a few words what the dimensions count. */
static moq_result moqi_bad_shape(const moqi_binder *b, const moq_tensor *t, moqi_dims want, const char *why)
{
    char got[96], expected[96];
    moqi_shape_text(t->shape, t->rank, got, sizeof got);
    moqi_shape_text(want.n, want.rank, expected, sizeof expected);
    return moqi_fail(b->err, MOQ_E_SHAPE, moqi_at_tensor(b, t), "shape %s, expected %s (%s)", got, expected, why);
}

/* Shapes are exact: a tensor that is larger than needed belongs to another layout, and guessing would give wrong weights. */
static moq_result moqi_expect(const moqi_binder *b, const moq_tensor *t, moqi_dims want, const char *why)
{
    return moqi_has_dims(t, want) ? MOQ_OK : moqi_bad_shape(b, t, want, why);
}

/* ---- small facts about tensors ---- */

/* 1 for a scalar of rank 0. */
static uint64_t moqi_elements(const moq_tensor *t)
{
    uint64_t n = 1;
    for (uint32_t i = 0; i < t->rank; i++) n *= t->shape[i]; /* cannot overflow: the file holds them */
    return n;
}

/* The types that scales, biases and weights that are not quantized come in. */
static int moqi_is_float(moq_dtype d) { return d == MOQ_F32 || d == MOQ_BF16 || d == MOQ_F16; }
static int moqi_is_e8m0(moq_dtype d) { return d == MOQ_U8 || d == MOQ_F8_E8M0; }

/* All of a tensor. */
static moq_view moqi_view_of(const moq_tensor *t)
{
    moq_view v;
    v.data = t->data;
    v.dtype = t->dtype;
    v.count = moqi_elements(t);
    return v;
}

/* Is every code of the weight a zero? Only asked when the global scale is zero: then the layer is all zeros either way (N2, N3).
   Nothing else here reads the data of a weight. */
static int moqi_codes_are_zero(const moq_tensor *t)
{
    const uint8_t *p = (const uint8_t *)t->data;
    uint8_t mask = t->dtype == MOQ_U8 ? 0x77 : t->dtype == MOQ_F8_E4M3 ? 0x7f : 0xff; /* all but the signs of floats */
    for (uint64_t i = 0; i < t->bytes; i++)
        if (p[i] & mask) return 0;
    return 1;
}

/* A scale that multiplies a whole tensor must be finite and positive, else every weight is lost (robustness N1 to N5, N13). Judged
   by its bits, so that the answer does not depend on -ffast-math or on flushing subnormals. `weight`: of weights, else of inputs. */
static moq_result moqi_check_scale(const moqi_binder *b, const moq_tensor *t, float v, int weight)
{
    uint32_t bits = moqi_f32_bits(v);
    if (bits > 0 && bits < 0x7f800000u) {
        if (bits < 0x00800000u) moqi_log(b->desc, MOQ_LOG_WARNING, MOQ_E_SCALE, moqi_at_tensor(b, t), "the scale %g is subnormal", (double)v);
        return MOQ_OK;
    }
    if (bits == 0 && weight && moqi_codes_are_zero(b->t)) {
        moqi_log(b->desc, MOQ_LOG_WARNING, MOQ_E_SCALE, moqi_at_tensor(b, t), "the scale is 0, and so are all codes");
        return MOQ_OK;
    }
    return moqi_fail(b->err, MOQ_E_SCALE, moqi_at_tensor(b, t), "value is %g, expected a finite number above 0: %s; export the layer again", (double)v,
                     weight ? "every weight of this layer would be lost" : "no input could be scaled by it");
}

/* A per-tensor scale of any rank with one element: writers use [], [1] and [1, 1, 1, 1] for the same thing. A stack may have one
   for each expert; these stay a view in `each`, and moq_slice_expert takes its own. `each` may be NULL: one only. */
static moq_result moqi_scalar(const moqi_binder *b, const moq_tensor *t, int weight, float *out, moq_view *each)
{
    uint64_t n = moqi_elements(t);
    if (!moqi_is_float(t->dtype)) return moqi_bad_dtype(b, t, "F32, BF16 or F16");
    if (n != 1 && !(b->stacked && each && t->dtype == MOQ_F32 && n == (uint64_t)b->w->experts)) {
        moqi_dims one = {0, {0, 0, 0, 0}};
        return moqi_bad_shape(b, t, one, "one number; [1] will do as well");
    }
    for (uint64_t i = 0; i < n; i++) {
        float v;
        moq_to_f32(t->dtype, (const uint8_t *)t->data + i * (t->bytes / n), 1, &v);
        moq_result r = moqi_check_scale(b, t, v, weight);
        if (r < 0) return r;
        if (i == 0) *out = v;
    }
    if (n > 1) {
        *each = moqi_view_of(t);
        *out = 1;
    }
    return MOQ_OK;
}

/* ---- filling the descriptors ---- */

/* Strides count words, see moq_packing. */
static moq_packing moqi_make_packing(int bits, int word_bits, int along_rows, int64_t row_stride, int64_t col_stride)
{
    moq_packing p;
    memset(&p, 0, sizeof p);
    p.bits = (uint8_t)bits;
    p.word_bits = (uint8_t)word_bits;
    p.along_rows = (uint8_t)along_rows;
    p.row_stride = row_stride;
    p.col_stride = col_stride;
    return p;
}

/* rows and cols are the layer's, whichever way it is stored. */
static void moqi_put_codes(moqi_binder *b, moq_dtype elem, int64_t rows, int64_t cols, moq_packing p)
{
    moq_linear *w = b->w;
    w->rows = rows;
    w->cols = cols;
    w->codes = moqi_view_of(b->t);
    w->packing = p;
    w->scheme.weight.elem = elem;
    if (b->stacked) w->expert_codes = (int64_t)(b->t->bytes / (uint64_t)w->experts);
}

/* `dtype` is what the bytes mean: E8M0 scales are stored as U8. Strides count scales. One scale for all experts has no stride
   from one to the next. */
static void moqi_put_scales(moqi_binder *b, const moq_tensor *t, moq_dtype dtype, int32_t group_rows, int32_t group_cols, int64_t row_stride,
                            int64_t col_stride)
{
    moq_linear *w = b->w;
    w->scales = moqi_view_of(t);
    w->scales.dtype = dtype;
    w->scheme.weight.scale = dtype;
    w->scheme.weight.group_rows = group_rows;
    w->scheme.weight.group_cols = group_cols;
    w->scale_row_stride = row_stride;
    w->scale_col_stride = col_stride;
    if (b->stacked && w->scales.count % (uint64_t)w->experts == 0 && w->scales.count > 1) w->expert_scales = (int64_t)(t->bytes / (uint64_t)w->experts);
}

/* Columns that share a scale: cols / groups, a power of two of at least 16, as the description says and as the format wants
   (`standard`, 0: any). A tensor that contradicts both is malformed; one that contradicts only the description is a mismatch. */
static moq_result moqi_group_size(const moqi_binder *b, const moq_tensor *scale, int64_t cols, int64_t groups, int32_t standard, int32_t *out)
{
    int32_t said = b->claim.group_size;
    int64_t want = said > 0 ? said : standard, g = groups > 0 ? cols / groups : 0;
    *out = MOQ_ALL;
    if (groups == 1 && standard == 0 && (said == MOQ_ALL || said == 0)) return MOQ_OK;
    if (want > 0 && cols % want != 0)
        return moqi_fail(b->err, MOQ_E_SHAPE, moqi_at_tensor(b, b->t), "%lld columns, expected a multiple of the group of %lld", (long long)cols,
                         (long long)want);
    if (groups <= 0 || cols % groups != 0 || (said == standard && said > 0 && g != said)) {
        int64_t wanted = want > 0 ? cols / want : 0;
        return moqi_bad_shape(b, scale, b->transposed ? moqi_dims2(b, wanted, b->w->rows) : moqi_dims2(b, b->w->rows, wanted), "one scale for each group of columns");
    }
    if ((said > 0 && g != said) || (said == MOQ_ALL && groups > 1))
        return moqi_fail(b->err, MOQ_E_MISMATCH, moqi_at(moqi_at_tensor(b, b->t).file, "layer", b->m->name, -1),
                         "'%q' has groups of %lld (%lld columns / %lld), but the description says %d", scale->name, (long long)g, (long long)cols,
                         (long long)groups, (int)said);
    if (g < 16 || (g & (g - 1)) != 0 || g > (1 << 30))
        return moqi_fail(b->err, MOQ_E_MISMATCH, moqi_at_tensor(b, scale), "groups of %lld (%lld columns / %lld), expected a power of two of at least 16",
                         (long long)g, (long long)cols, (long long)groups);
    *out = (int32_t)g;
    return MOQ_OK;
}

/* The scale tensor as a matrix [x, y] beside the codes. */
static moq_result moqi_scale_plane(const moqi_binder *b, const moq_tensor *t, int64_t *x, int64_t *y)
{
    uint32_t lead = b->stacked ? 1 : 0;
    if (t->rank != 2 + lead || (lead && t->shape[0] != (uint64_t)b->w->experts))
        return moqi_bad_shape(b, t, moqi_dims2(b, b->w->rows, b->w->cols / 16), "a scale for each row and group, as the codes are laid out");
    *x = (int64_t)t->shape[lead];
    *y = (int64_t)t->shape[lead + 1];
    return MOQ_OK;
}

/* ---- floats of four bits ---- */

/* ModelOpt stores E8M0 as U8; newer writers have a dtype for it (X14). */
static void moqi_note_e8m0(const moqi_binder *b, const moq_tensor *scale)
{
    if (scale->dtype == MOQ_U8) return;
    moqi_log(b->desc, MOQ_LOG_INFO, MOQ_E_DTYPE, moqi_at_tensor(b, scale), "scales of dtype %s where U8 is usual; the bits are the same", moq_dtype_name(scale->dtype));
}

/* Block scales tiled for tensor cores are padded to 128 rows and 4 groups: an engine's layout, never an export's (X3). Padding is
   how it shows; where nothing needs padding it cannot be told from the plain layout. */
static moq_result moqi_bad_block_rows(const moqi_binder *b, const moq_tensor *scale, int64_t rows, int64_t cols, int64_t x)
{
    int32_t g = b->claim.group_size > 0 ? b->claim.group_size : 16;
    int swizzled = x == moqi_ceil_div(rows, 128) * 128;
    moqi_dims want = b->transposed ? moqi_dims2(b, cols / g, rows) : moqi_dims2(b, rows, cols / g);
    return moqi_bad_shape(b, scale, want, swizzled ? "padded to 128 rows: an engine layout, not a ModelOpt export" : "a scale for each row and group of columns");
}

/* NVFP4: E2M1 nibbles, the even column low, with an E4M3 scale for a group of columns and one F32 scale over all.
       codes [rows, cols/2], scale [rows, cols/group]: W = e2m1 * scale * weight_scale_2, or / weight_global_scale
   A stack of experts [E, cols/2, rows] with scales [E, cols/group, rows] has the same pairs of columns, along its middle
   dimension (modelopt-checkpoints 8). The group is 16, or 32 in weight-only and W4A8 layers: cols / scale columns says. */
static moq_result moqi_bind_nvfp4(moqi_binder *b, const moq_tensor *scale, const char *global, int divisor)
{
    int64_t rows = b->transposed ? b->b : b->a, half = b->transposed ? b->a : b->b, x = 0, y = 0;
    moqi_put_codes(b, MOQ_F4, rows, half * 2, moqi_make_packing(4, 8, 0, b->transposed ? 1 : half, b->transposed ? rows : 1));
    moq_result r = moqi_scale_plane(b, scale, &x, &y);
    if (r < 0) return r;
    if ((b->transposed ? y : x) != rows) return moqi_bad_block_rows(b, scale, rows, half * 2, b->transposed ? y : x);
    int64_t groups = b->transposed ? x : y;
    int32_t g;
    int padded = half * 2 % 64 != 0 && groups == moqi_ceil_div(half * 2 / 16, 4) * 4;
    if (padded && rows % 128 == 0 && !b->transposed)
        return moqi_bad_shape(b, scale, moqi_dims2(b, rows, half * 2 / 16), "padded to 4 groups: an engine layout, not a ModelOpt export");
    if ((r = moqi_group_size(b, scale, half * 2, groups, 16, &g)) < 0) return r;
    moqi_put_scales(b, scale, MOQ_F8_E4M3, 1, g, b->transposed ? 1 : groups, b->transposed ? rows : 1);
    const moq_tensor *t = moqi_part(b, global);
    if (!t) return moqi_missing(b, global);
    b->w->scheme.weight.has_global = 1;
    return moqi_scalar(b, t, 1, divisor ? &b->w->global_div : &b->w->global_mul, divisor ? NULL : &b->w->expert_global);
}

/* MXFP4: E2M1 nibbles with a power-of-two scale for 32 columns.
       codes [rows, cols/2], scale [rows, cols/32]: W = e2m1 * 2^(scale - 127)
   ModelOpt's stacks of experts [E, cols, rows/2] with scales [E, cols, rows/32] are packed and grouped along their last
   dimension, which is the rows (modelopt-checkpoints 5.5). There is no second scale and no other group. */
static moq_result moqi_bind_mxfp4(moqi_binder *b, const moq_tensor *scale)
{
    int64_t a = b->a, n = b->b * 2;
    if (n % 32 != 0)
        return moqi_fail(b->err, MOQ_E_SHAPE, moqi_at_tensor(b, b->t), "%lld elements in a line, expected a multiple of the group of 32", (long long)n);
    moqi_note_e8m0(b, scale);
    if (b->transposed) {
        moqi_put_codes(b, MOQ_F4, n, a, moqi_make_packing(4, 8, 1, 1, b->b));
        moqi_put_scales(b, scale, MOQ_F8_E8M0, 32, 1, 1, n / 32);
    } else {
        moqi_put_codes(b, MOQ_F4, a, n, moqi_make_packing(4, 8, 0, b->b, 1));
        moqi_put_scales(b, scale, MOQ_F8_E8M0, 1, 32, n / 32, 1);
    }
    if (b->claim.group_size > 0 && b->claim.group_size != 32)
        return moqi_fail(b->err, MOQ_E_MISMATCH, moqi_at_tensor(b, scale), "MX formats have groups of 32, but the description says %d", (int)b->claim.group_size);
    return moqi_expect(b, scale, moqi_dims2(b, a, n / 32), "one scale for 32 elements");
}

/* MXFP6: a stream of six-bit codes along each row, low bits first, with a power-of-two scale for 32 columns.
       codes [rows, 3*cols/4], scale [rows, cols/32]: W = e3m2 * 2^(scale - 127), or e2m3
   No tool exports it; nothing but the description tells E3M2 from E2M3 or from MXFP4. */
static moq_result moqi_bind_mxfp6(moqi_binder *b, const moq_tensor *scale, moq_dtype elem)
{
    int64_t cols = b->b / 3 * 4;
    if (b->stacked || b->b % 24 != 0)
        return moqi_fail(b->err, MOQ_E_SHAPE, moqi_at_tensor(b, b->t), "%lld bytes in a row, expected a multiple of 24: 32 codes of six bits", (long long)b->b);
    moqi_put_codes(b, elem, b->a, cols, moqi_make_packing(6, 8, 0, b->b, 1));
    moqi_put_scales(b, scale, MOQ_F8_E8M0, 1, 32, cols / 32, 1);
    return moqi_expect(b, scale, moqi_dims2(b, b->a, cols / 32), "one scale for 32 columns");
}

/* ---- scales of FP8 and INT8 weights: one, one a row, one a group of columns, one a block ---- */

/* One scale for the tensor, or for each expert of a stack. A weight of a single block has one too, of any rank (5.3). */
static moq_result moqi_bind_tensor_scale(moqi_binder *b, const moq_tensor *t)
{
    moq_view each = {NULL, MOQ_NONE, 0};
    int block = b->claim.block_rows > 0 || moqi_starts(b->claim.algo, "FP8_PB");
    int32_t br = b->claim.block_rows > 0 ? b->claim.block_rows : 128, bc = b->claim.block_cols > 0 ? b->claim.block_cols : 128;
    float v;
    if (block && !b->stacked && b->w->rows <= br && b->w->cols <= bc) moqi_put_scales(b, t, t->dtype, br, bc, 1, 1);
    else moqi_put_scales(b, t, t->dtype, MOQ_ALL, MOQ_ALL, 0, 0);
    if (b->w->scheme.weight.elem == MOQ_I8 && !b->stacked && !b->claim.has_coding)
        moqi_log(b->desc, MOQ_LOG_INFO, MOQ_E_SHAPE, moqi_at_tensor(b, t), "one scale for all rows where one a row is usual");
    return moqi_scalar(b, t, 1, &v, &each);
}

/* [rows] or [rows, 1]; in a stack also [E, 1, rows], beside codes [E, cols, rows]. */
static int moqi_is_row_scale(const moqi_binder *b, const moq_tensor *t, int64_t rows)
{
    if (moqi_has_dims(t, moqi_dims2(b, rows, 0)) || moqi_has_dims(t, moqi_dims2(b, rows, 1))) return 1;
    return b->stacked && moqi_has_dims(t, moqi_dims2(b, 1, rows));
}

/* [ceil(rows/128), ceil(cols/128)], or ModelOpt's [.., 1, .., 1]. */
static int moqi_is_block_scale(const moq_tensor *t, int64_t x, int64_t y)
{
    uint64_t n[4] = {(uint64_t)x, 1, (uint64_t)y, 1};
    if (t->rank == 4) return memcmp(t->shape, n, sizeof n) == 0;
    return t->rank == 2 && t->shape[0] == n[0] && t->shape[1] == n[2];
}

/* What the shape of float scales says, tried in this order:
       one element of any rank        the whole tensor (a stack: all experts), or the only block of a small weight
       [experts]                      a number for each expert
       [rows], [rows, 1]              a number for each row
       [ceil(rows/128), 1, ceil(cols/128), 1] or without the ones: a number for each block, the last ones cropped
       [rows, cols/group]             a number for each row and group of columns: integers, or when the description has a group */
static moq_result moqi_bind_wide_scale(moqi_binder *b, const moq_tensor *t, moq_dtype dtype)
{
    int64_t rows = b->w->rows, cols = b->w->cols;
    int32_t br = b->claim.block_rows > 0 ? b->claim.block_rows : 128, bc = b->claim.block_cols > 0 ? b->claim.block_cols : 128, g;
    int64_t x = moqi_ceil_div(rows, br), y = moqi_ceil_div(cols, bc);
    uint64_t n = moqi_elements(t);
    if (dtype != MOQ_F8_E8M0 && !moqi_is_float(dtype)) return moqi_bad_dtype(b, t, "F32, BF16 or F16");
    if (moqi_is_float(dtype) && (n == 1 || (b->stacked && n == (uint64_t)b->w->experts && t->shape[0] == n))) return moqi_bind_tensor_scale(b, t);
    if (moqi_is_row_scale(b, t, rows)) { /* one group of all columns may be called so or by its length */
        moqi_put_scales(b, t, dtype, 1, b->claim.group_size == cols ? (int32_t)cols : MOQ_ALL, 1, 0);
        return MOQ_OK;
    }
    if (!b->stacked && b->t->dtype != MOQ_I8 && moqi_is_block_scale(t, x, y)) {
        moqi_put_scales(b, t, dtype, br, bc, y, 1);
        return MOQ_OK;
    }
    int grouped = b->claim.group_size > 0 || b->t->dtype == MOQ_I8;
    if (grouped && !b->transposed && t->rank == 2u + (b->stacked ? 1u : 0u) && t->shape[t->rank - 2] == (uint64_t)rows) {
        int64_t groups = (int64_t)t->shape[t->rank - 1];
        moq_result r = moqi_group_size(b, t, cols, groups, 0, &g);
        if (r == MOQ_OK) moqi_put_scales(b, t, dtype, 1, g, groups, 1);
        return r;
    }
    if (t->rank == 4 && !b->stacked) {
        moqi_dims want = {4, {(uint64_t)x, 1, (uint64_t)y, 1}};
        return moqi_bad_shape(b, t, want, "one scale for each block of the weight");
    }
    if (t->rank == 2 && !b->stacked && t->shape[1] > 1) return moqi_bad_shape(b, t, moqi_dims2(b, x, y), "one scale for each block of the weight");
    return moqi_bad_shape(b, t, moqi_dims2(b, rows, 0), "one scale for each row, or one for all");
}

/* FP8: E4M3 with float scales, or with E8M0 scales of 32 columns (MXFP8).
       codes [rows, cols] (a stack: [E, cols, rows]): W = e4m3 * scale, or e4m3 * 2^(scale - 127)
   Blocks of 128 x 128 may have E8M0 scales too; their shape tells them from those of 32 columns. */
static moq_result moqi_bind_fp8(moqi_binder *b, const moq_tensor *scale)
{
    int64_t rows = b->transposed ? b->b : b->a, cols = b->transposed ? b->a : b->b;
    moqi_put_codes(b, MOQ_F8_E4M3, rows, cols, moqi_make_packing(8, 8, 0, b->transposed ? 1 : cols, b->transposed ? rows : 1));
    if (!moqi_is_e8m0(scale->dtype)) return moqi_bind_wide_scale(b, scale, scale->dtype);
    if (scale->dtype == MOQ_F8_E8M0 && !b->stacked && cols > 32 && moqi_is_block_scale(scale, moqi_ceil_div(rows, 128), moqi_ceil_div(cols, 128)))
        return moqi_bind_wide_scale(b, scale, MOQ_F8_E8M0);
    if (cols % 32 != 0)
        return moqi_fail(b->err, MOQ_E_SHAPE, moqi_at_tensor(b, b->t), "%lld columns, expected a multiple of the group of 32", (long long)cols);
    moqi_note_e8m0(b, scale);
    moqi_put_scales(b, scale, MOQ_F8_E8M0, 1, 32, b->transposed ? 1 : cols / 32, b->transposed ? rows : 1);
    return moqi_expect(b, scale, b->transposed ? moqi_dims2(b, cols / 32, rows) : moqi_dims2(b, rows, cols / 32), "one scale for 32 columns");
}

/* ---- integers ---- */

/* ModelOpt INT4: byte [j, i] holds row 2j low and row 2j + 1 high, two's complement, no zero point.
       codes [rows/2, cols], scale [rows, cols/group]: W = q * scale
   The halved dimension is the rows: codes halved along the columns, as most other formats have them, give a scale with the wrong
   number of rows and are refused (X11). W4A8_AWQ adds a second-stage scale that is no part of the weight: as stored, the product
   is rounded to E4M3 with it once more (modelopt-checkpoints 5.10). */
static moq_result moqi_bind_int4(moqi_binder *b, const moq_tensor *scale)
{
    int64_t rows = b->a * 2, cols = b->b, x = 0, y = 0;
    int32_t g;
    if (b->transposed)
        return moqi_fail(b->err, MOQ_E_UNSUPPORTED, moqi_at_tensor(b, b->t), "INT4 experts stacked as one parameter are not supported; export them one by one");
    moqi_put_codes(b, MOQ_I4, rows, cols, moqi_make_packing(4, 8, 1, cols, 1));
    moq_result r = moqi_scale_plane(b, scale, &x, &y);
    if (r < 0) return r;
    if (x % 2 != 0 || x != rows) {
        int64_t wide = y * (b->claim.group_size > 0 ? b->claim.group_size : 128);
        char got[96], other[96];
        moqi_shape_text(b->t->shape, b->t->rank, got, sizeof got);
        moqi_shape_text(scale->shape, scale->rank, other, sizeof other);
        if (x % 2 != 0)
            return moqi_fail(b->err, MOQ_E_SHAPE, moqi_at_tensor(b, b->t), "shape %s beside '%q' %s: INT4 packs two rows into a byte, expected an even number of rows",
                             got, scale->name, other);
        return moqi_fail(b->err, MOQ_E_SHAPE, moqi_at_tensor(b, b->t), "shape %s beside '%q' %s, expected [%lld, %lld]: INT4 packs pairs of rows, not of columns",
                         got, scale->name, other, (long long)(x / 2), (long long)wide);
    }
    if ((r = moqi_group_size(b, scale, cols, y, 0, &g)) < 0) return r;
    moqi_put_scales(b, scale, scale->dtype, 1, g, y, 1);
    const moq_tensor *second = moqi_part(b, "weight_scale_2");
    if (!second) return MOQ_OK;
    b->w->scheme.requantize_fp8 = 1;
    b->w->scheme.weight.has_global = 1;
    return moqi_scalar(b, second, 1, &b->w->requant_scale, NULL);
}

/* MOQ_I2 .. MOQ_I8 by the number of bits. */
static moq_dtype moqi_int_dtype(int bits)
{
    static const moq_dtype of[9] = {MOQ_NONE, MOQ_NONE, MOQ_I2, MOQ_I3, MOQ_I4, MOQ_I5, MOQ_I6, MOQ_I7, MOQ_I8};
    return bits >= 2 && bits <= 8 ? of[bits] : MOQ_NONE;
}

/* Integers of up to 8 bits, one a byte: W = (q - zero) * scale. compressed-tensors stores 4-bit numbers so too when the inputs are
   INT8: then the element is I4 though its code takes a byte. Zero points, if any, are laid out as the scales are. */
static moq_result moqi_bind_int8(moqi_binder *b, const moq_tensor *scale)
{
    int64_t rows = b->transposed ? b->b : b->a, cols = b->transposed ? b->a : b->b;
    int bits = b->claim.weight_bits >= 2 && b->claim.weight_bits < 8 ? b->claim.weight_bits : 8;
    moqi_put_codes(b, moqi_int_dtype(bits), rows, cols, moqi_make_packing(8, 8, 0, b->transposed ? 1 : cols, b->transposed ? rows : 1));
    if (moqi_is_e8m0(scale->dtype) && !b->stacked) { /* MXINT8: a power of two for 32 columns */
        if (cols % 32 != 0)
            return moqi_fail(b->err, MOQ_E_SHAPE, moqi_at_tensor(b, b->t), "%lld columns, expected a multiple of the group of 32", (long long)cols);
        moqi_put_scales(b, scale, MOQ_F8_E8M0, 1, 32, cols / 32, 1);
        return moqi_expect(b, scale, moqi_dims2(b, rows, cols / 32), "one scale for 32 columns");
    }
    moq_result r = moqi_bind_wide_scale(b, scale, scale->dtype);
    const moq_tensor *zero = moqi_part(b, "weight_zero_point");
    if (r < 0 || !zero) return r;
    if (zero->dtype != MOQ_I8 || b->stacked) return moqi_bad_dtype(b, zero, "I8 of a layer that is no stack");
    if (moqi_elements(zero) != b->w->scales.count) {
        moqi_dims want = moqi_dims2(b, scale->rank > 0 ? (int64_t)scale->shape[0] : 1, scale->rank > 1 ? (int64_t)scale->shape[1] : 0);
        return moqi_bad_shape(b, zero, want, "one zero point for each scale");
    }
    b->w->scheme.weight.zero_point = 1;
    b->w->zeros = moqi_view_of(zero);
    b->w->zero_packing = moqi_make_packing(8, 8, 0, b->w->scale_row_stride, b->w->scale_col_stride);
    return MOQ_OK;
}

/* The group of every column (act order): t is I32 [cols]. A list that only counts up says nothing and is dropped, as is one that
   was never filled (-1). Every number is checked here, once, because later it is an index into the scales without a check. */
static moq_result moqi_bind_group_index(moqi_binder *b, const moq_tensor *t, int64_t groups)
{
    const uint8_t *p = (const uint8_t *)t->data;
    int64_t cols = b->w->cols, g = b->w->scheme.weight.group_cols;
    int plain = 1, unset = 1;
    if (t->dtype != MOQ_I32) return moqi_bad_dtype(b, t, "I32");
    moq_result r = moqi_expect(b, t, moqi_dims2(b, cols, 0), "the group of each column");
    if (r < 0) return r;
    for (int64_t c = 0; c < cols; c++) {
        int64_t v = (int32_t)moqi_load_u32(p + 4 * c);
        if (v != -1) unset = 0;
        if (v != (g > 0 ? c / g : 0)) plain = 0;
    }
    if (unset || plain) return MOQ_OK;
    for (int64_t c = 0; c < cols; c++) {
        int64_t v = (int32_t)moqi_load_u32(p + 4 * c);
        if (v < 0 || v >= groups)
            return moqi_fail(b->err, MOQ_E_MISMATCH, moqi_at_tensor(b, t), "column %lld names group %lld of %lld", (long long)c, (long long)v, (long long)groups);
    }
    b->w->group_index = moqi_view_of(t);
    b->w->scheme.act_order = 1;
    return MOQ_OK;
}

/* Words of 32 bits for n codes: a stream in which codes straddle words, or (older writers) whole codes and padding. */
static int64_t moqi_packed_words(int64_t n, int bits, int padded)
{
    return padded ? moqi_ceil_div(n, 32 / bits) : moqi_ceil_div(n * bits, 32);
}

/* bits and padding of a compressed-tensors weight: the description's bits, else the first width that fits the number of words.
   Where both ways to fill words give that number, the version of the writer decides. */
static moq_result moqi_pack_bits(const moqi_binder *b, int64_t cols, int *bits, int *padded)
{
    static const int order[] = {4, 8, 2, 3, 5, 6, 7};
    int said = b->claim.weight_bits;
    for (size_t i = 0; i < MOQI_COUNT(order); i++) {
        int v = order[i];
        int stream = b->b == moqi_packed_words(cols, v, 0), pads = b->b == moqi_packed_words(cols, v, 1);
        if ((said && said != v) || (!stream && !pads)) continue;
        *bits = v;
        *padded = stream && pads ? b->claim.old_packing : pads;
        return MOQ_OK;
    }
    return moqi_bad_shape(b, b->t, moqi_dims2(b, b->a, moqi_packed_words(cols, said >= 2 && said <= 8 ? said : 4, 0)),
                          "words of 32 bits for the columns that weight_shape says");
}

/* The true [rows, cols] of a packed weight: the last word of a row may be part empty, so the words alone do not say. */
static moq_result moqi_true_shape(const moqi_binder *b, const moq_tensor *t, int64_t *rows, int64_t *cols)
{
    moqi_dims two = {1, {2, 0, 0, 0}};
    uint64_t n[2];
    if (t->dtype != MOQ_I64 && t->dtype != MOQ_I32) return moqi_bad_dtype(b, t, "I64");
    moq_result r = moqi_expect(b, t, two, "rows and columns");
    if (r < 0) return r;
    for (int i = 0; i < 2; i++)
        n[i] = t->dtype == MOQ_I64 ? moqi_load_u64((const uint8_t *)t->data + 8 * i) : moqi_load_u32((const uint8_t *)t->data + 4 * i);
    /* 16 codes at most share a word */
    if (n[0] != (uint64_t)b->a || n[1] == 0 || n[1] > (uint64_t)b->b * 16)
        return moqi_fail(b->err, MOQ_E_SHAPE, moqi_at_tensor(b, t), "says [%llu, %llu], but '%q' is [%lld, %lld] words", (unsigned long long)n[0],
                         (unsigned long long)n[1], b->t->name, (long long)b->a, (long long)b->b);
    *rows = (int64_t)n[0];
    *cols = (int64_t)n[1];
    return MOQ_OK;
}

/* compressed-tensors integers (runtime-layouts 1.8), stored as u = q + 2^(bits-1) in I32 words:
       codes [rows, words of a row], scale [rows, groups], zero points [words of a column of rows, groups], packed along the rows
       W = (u - 2^(bits-1)) * scale, or (u - zero) * scale with zero points, which have the same offset */
static moq_result moqi_bind_pack(moqi_binder *b, const moq_tensor *scale)
{
    const moq_tensor *shape = moqi_part(b, "weight_shape"), *zero = moqi_part(b, "weight_zero_point"), *order = moqi_part(b, "weight_g_idx");
    int64_t rows = 0, cols = 0, x = 1, y = 1;
    int bits = 0, padded = 0;
    int32_t g;
    if (!shape) return moqi_missing(b, "weight_shape");
    moq_result r = moqi_true_shape(b, shape, &rows, &cols);
    if (r < 0 || (r = moqi_pack_bits(b, cols, &bits, &padded)) < 0) return r;
    moq_packing p = moqi_make_packing(bits, 32, 0, b->b, 1);
    p.padded = (uint8_t)padded;
    p.is_unsigned = 1;
    moqi_put_codes(b, moqi_int_dtype(bits), rows, cols, p);
    b->w->zero_add = zero ? 0 : 1 << (bits - 1);
    if (!moqi_is_float(scale->dtype)) return moqi_bad_dtype(b, scale, "F32, BF16 or F16");
    if (moqi_elements(scale) == 1 && rows > 1) {
        if ((r = moqi_bind_tensor_scale(b, scale)) < 0) return r;
    } else {
        if ((r = moqi_scale_plane(b, scale, &x, &y)) < 0) return r;
        if (x != rows) return moqi_bad_shape(b, scale, moqi_dims2(b, rows, y), "a scale for each row and group of columns");
        if ((r = moqi_group_size(b, scale, cols, y, 0, &g)) < 0) return r;
        moqi_put_scales(b, scale, scale->dtype, 1, g, y, 1);
    }
    if (!zero && b->claim.zero_point) return moqi_missing(b, "weight_zero_point");
    if (!order && b->claim.act_order) return moqi_missing(b, "weight_g_idx");
    if (zero) {
        if (zero->dtype != MOQ_I32) return moqi_bad_dtype(b, zero, "I32");
        if ((r = moqi_expect(b, zero, moqi_dims2(b, moqi_packed_words(x, bits, padded), y), "zero points packed along the rows")) < 0) return r;
        b->w->scheme.weight.zero_point = 1;
        b->w->zeros = moqi_view_of(zero);
        int one = x == 1 && rows > 1; /* one zero point for all rows: the first code of the first word */
        p.along_rows = (uint8_t)!one;
        p.row_stride = one ? 0 : y;
        p.col_stride = one ? 0 : 1;
        b->w->zero_packing = p;
    }
    return order ? moqi_bind_group_index(b, order, y) : MOQ_OK;
}

/* Scales and zero points of AutoAWQ and GPTQ: scale [groups, rows], qzeros [groups, rows * bits / 32], packed along the rows in the
   same order as the codes of p. Without qzeros the zero point is the middle code. */
static moq_result moqi_bind_qscales(moqi_binder *b, const moq_tensor *scale, int64_t rows, int64_t cols, moq_packing p, int zero_add)
{
    const moq_tensor *zero = moqi_part(b, "qzeros");
    int64_t groups = (int64_t)scale->shape[0];
    int32_t g;
    b->transposed = 1;
    int ragged = b->claim.group_size > 0 && cols % b->claim.group_size != 0 && groups == moqi_ceil_div(cols, b->claim.group_size) && moqi_part(b, "g_idx");
    moq_result r = MOQ_OK;
    if (ragged) g = b->claim.group_size; /* GPTQ: the last group may be short, g_idx names it */
    else if ((r = moqi_group_size(b, scale, cols, groups, 0, &g)) < 0) return r;
    moqi_put_scales(b, scale, scale->dtype, 1, g, 1, rows);
    b->w->zero_add = 1 << (p.bits - 1);
    if (!zero && b->claim.zero_point) return moqi_missing(b, "qzeros");
    if (!zero) return MOQ_OK;
    if (zero->dtype != MOQ_I32) return moqi_bad_dtype(b, zero, "I32");
    if ((r = moqi_expect(b, zero, moqi_dims2(b, groups, rows * p.bits / 32), "zero points packed along the rows")) < 0) return r;
    b->w->scheme.weight.zero_point = 1;
    b->w->zeros = moqi_view_of(zero);
    b->w->zero_add = zero_add;
    p.along_rows = 1;
    p.row_stride = 1;
    p.col_stride = rows * p.bits / 32;
    b->w->zero_packing = p;
    return MOQ_OK;
}

/* bits of a GPTQ layer: qzeros is [groups, rows * bits / 32], so its width tells them; else what the description says. */
static int moqi_gptq_bits(const moqi_binder *b, int64_t rows)
{
    const moq_tensor *zero = moqi_part(b, "qzeros");
    int64_t n = zero && zero->rank == 2 ? (int64_t)zero->shape[1] * 32 : 0;
    int64_t bits = n > 0 && n % rows == 0 ? n / rows : b->claim.weight_bits;
    return bits == 2 || bits == 3 || bits == 4 || bits == 8 ? (int)bits : 0;
}

/* AutoAWQ: qweight [cols, rows/8], eight rows a word in the order 0 2 4 6 1 3 5 7. GPTQ: qweight [cols * bits / 32, rows], a bit
   stream down the columns; version 1 stores zero - 1. Which of the two follows from the shapes. */
static moq_result moqi_bind_qweight(moqi_binder *b)
{
    const moq_tensor *scale = moqi_part(b, "scales"), *order = moqi_part(b, "g_idx");
    if (!scale) return moqi_missing(b, "scales");
    if (!order && b->claim.act_order) return moqi_missing(b, "g_idx");
    if (b->t->dtype != MOQ_I32) return moqi_bad_dtype(b, b->t, "I32");
    if (!moqi_is_float(scale->dtype)) return moqi_bad_dtype(b, scale, "F16, BF16 or F32");
    if (scale->rank != 2 || scale->shape[1] == 0) return moqi_bad_shape(b, scale, moqi_dims2(b, 1, b->b), "a scale for each group and row");
    int64_t rows = (int64_t)scale->shape[1];
    if (b->b * 8 == rows) {
        if (b->claim.weight_bits && b->claim.weight_bits != 4)
            return moqi_fail(b->err, MOQ_E_MISMATCH, moqi_at_tensor(b, b->t), "eight codes a word, but the description says %d bits", (int)b->claim.weight_bits);
        moq_packing p = moqi_make_packing(4, 32, 1, 1, b->b);
        p.is_unsigned = p.awq_order = 1;
        moqi_put_codes(b, MOQ_I4, rows, b->a, p);
        return moqi_bind_qscales(b, scale, rows, b->a, p, 0);
    }
    if (b->b != rows) return moqi_bad_shape(b, b->t, moqi_dims2(b, b->a, rows), "as many words in a line as there are scales");
    int bits = moqi_gptq_bits(b, rows);
    if (bits == 0)
        return moqi_fail(b->err, MOQ_E_UNSUPPORTED, moqi_at_tensor(b, b->t), "neither 'qzeros' nor the description says 2, 3, 4 or 8 bits");
    if (b->claim.weight_bits && b->claim.weight_bits != bits)
        return moqi_fail(b->err, MOQ_E_MISMATCH, moqi_at_tensor(b, b->t), "the zero points have %d bits, but the description says %d", bits, (int)b->claim.weight_bits);
    if (b->a * 32 % bits != 0 || rows * bits % 32 != 0)
        return moqi_bad_shape(b, b->t, moqi_dims2(b, moqi_ceil_div(b->a, bits) * bits, moqi_ceil_div(rows, 32) * 32), "whole words of codes");
    moq_packing p = moqi_make_packing(bits, 32, 0, 1, rows);
    p.is_unsigned = 1;
    moqi_put_codes(b, moqi_int_dtype(bits), rows, b->a * 32 / bits, p);
    moq_result r = moqi_bind_qscales(b, scale, rows, b->w->cols, p, b->claim.gptq_v2 ? 0 : 1);
    return r < 0 || !order ? r : moqi_bind_group_index(b, order, (int64_t)scale->shape[0]);
}

/* ---- weights that are not quantized ---- */

/* W = the stored number. A parameter of fused experts is [E, cols, rows]: its rows are a column of what is stored. */
static void moqi_put_plain(moqi_binder *b)
{
    int bits = moq_dtype_bits(b->t->dtype);
    int64_t rows = b->transposed ? b->b : b->a, cols = b->transposed ? b->a : b->b;
    moqi_put_codes(b, b->t->dtype, rows, cols, moqi_make_packing(bits, bits, 0, b->transposed ? 1 : cols, b->transposed ? rows : 1));
}

/* A float where the description promises codes happens (routers and convolutions are missing in exclude lists): a finding. */
static moq_result moqi_bind_plain(moqi_binder *b)
{
    const moq_tensor *scale = moqi_part(b, "weight_scale");
    if (!moqi_is_float(b->t->dtype)) return moqi_bad_dtype(b, b->t, "BF16, F16, F32, F8_E4M3, U8 or I8");
    const char *is = moq_dtype_name(b->t->dtype);
    if (scale) moqi_log(b->desc, MOQ_LOG_WARNING, MOQ_E_MISMATCH, moqi_at_tensor(b, scale), "a scale beside a weight of %s, which needs none", is);
    else if (b->claim.known && !b->claim.excluded && b->claim.algo[0])
        moqi_log(b->desc, MOQ_LOG_INFO, MOQ_E_MISMATCH, moqi_at_tensor(b, b->t), "stored as %s, though the description says %s", is, b->claim.algo);
    moqi_put_plain(b);
    return MOQ_OK;
}

/* ------------------------------------------------------------------------------------------------
   >>bind            tensors of a module -> moq_linear, moq_kv; finding the modules
   The tensors decide how a layer is stored; what the description claims is cross-checked. Linear in the number of tensors.
   ------------------------------------------------------------------------------------------------ */

/* ---- what the algorithms of ModelOpt store, and how their inputs are rounded ---- */

/* Static input scales are used when the tensor is there; without it FP8, NVFP4 and INT8 layers are weight-only (Q3) and FP8_TOKEN
   takes a scale per token. MX inputs have dynamic scales only. */
enum {
    MOQI_IN_WIDE, MOQI_IN_FP8, MOQI_IN_FP8_TOKEN, MOQI_IN_NVFP4, MOQI_IN_MXFP4, MOQI_IN_MXFP8, MOQI_IN_INT8, MOQI_IN_MXFP6_E3M2, MOQI_IN_MXFP6_E2M3,
    MOQI_IN_MXINT8
};

/* A quant_algo of hf_quant_config.json. */
typedef struct moqi_algo {
    const char *name;
    moq_dtype weight, scale; /* as stored; E8M0 scales have dtype U8 */
    int input;               /* MOQI_IN_... */
} moqi_algo;

static const moqi_algo moqi_algos[] = {
    {"FP8", MOQ_F8_E4M3, MOQ_F32, MOQI_IN_FP8},
    {"FP8_PER_CHANNEL_PER_TOKEN", MOQ_F8_E4M3, MOQ_F32, MOQI_IN_FP8_TOKEN},
    {"FP8_PB_WO", MOQ_F8_E4M3, MOQ_F32, MOQI_IN_WIDE},
    {"FP8_PB_REAL", MOQ_F8_E4M3, MOQ_F32, MOQI_IN_WIDE},
    {"MXFP8", MOQ_F8_E4M3, MOQ_U8, MOQI_IN_MXFP8},
    {"MXFP4", MOQ_U8, MOQ_U8, MOQI_IN_MXFP4},
    {"W4A8_MXFP4_FP8", MOQ_U8, MOQ_U8, MOQI_IN_FP8_TOKEN},
    {"NVFP4", MOQ_U8, MOQ_F8_E4M3, MOQI_IN_NVFP4},
    {"W4A16_NVFP4", MOQ_U8, MOQ_F8_E4M3, MOQI_IN_NVFP4},
    {"NVFP4_AWQ", MOQ_U8, MOQ_F8_E4M3, MOQI_IN_NVFP4},
    {"NVFP4_SVD", MOQ_U8, MOQ_F8_E4M3, MOQI_IN_NVFP4},
    {"NVFP4_SVDQUANT", MOQ_U8, MOQ_F8_E4M3, MOQI_IN_NVFP4},
    {"W4A8_NVFP4_FP8", MOQ_U8, MOQ_F8_E4M3, MOQI_IN_FP8},
    {"W4A16_AWQ", MOQ_U8, MOQ_F32, MOQI_IN_FP8},
    {"W4A8_AWQ", MOQ_U8, MOQ_F32, MOQI_IN_FP8},
    {"W8A16", MOQ_I8, MOQ_F32, MOQI_IN_INT8},
    {"W8A8_SQ_PER_CHANNEL", MOQ_I8, MOQ_F32, MOQI_IN_INT8},
    {"MXFP6_E3M2", MOQ_U8, MOQ_U8, MOQI_IN_MXFP6_E3M2},
    {"MXFP6_E2M3", MOQ_U8, MOQ_U8, MOQI_IN_MXFP6_E2M3},
    {"MXINT8", MOQ_I8, MOQ_U8, MOQI_IN_MXINT8}
};

/* The row that the description names for this module; NULL for other families and for modules that it leaves out. */
static const moqi_algo *moqi_find_algo(const moqi_binder *b)
{
    if (!b->claim.known || b->claim.excluded) return NULL;
    for (size_t i = 0; i < MOQI_COUNT(moqi_algos); i++)
        if (moqi_same(moqi_algos[i].name, b->claim.algo)) return &moqi_algos[i];
    return NULL;
}

/* The input rule that the stored weight itself suggests, for modules of which the description says nothing. */
static int moqi_guess_input(const moqi_binder *b, int has_scale)
{
    const moq_coding *c = &b->w->scheme.weight;
    if (c->elem == MOQ_I8) return c->scale == MOQ_F8_E8M0 ? MOQI_IN_MXINT8 : MOQI_IN_INT8;
    if (c->elem == MOQ_F4 && c->scale == MOQ_F8_E8M0) return has_scale ? MOQI_IN_FP8 : MOQI_IN_MXFP4;
    if (c->elem == MOQ_F4) return c->group_cols == 16 ? MOQI_IN_NVFP4 : MOQI_IN_FP8;
    if (c->elem != MOQ_F8_E4M3 || c->group_rows > 1) return MOQI_IN_FP8;
    if (c->scale == MOQ_F8_E8M0) return MOQI_IN_MXFP8;
    return c->group_cols == MOQ_ALL && c->group_rows == 1 ? MOQI_IN_FP8_TOKEN : MOQI_IN_FP8;
}

/* `has_scale`: a static scale is stored. */
static moq_coding moqi_input_coding(int rule, int has_scale)
{
    static const moq_coding of[] = {
        MOQI_WIDE, MOQI_TENSOR(MOQ_F8_E4M3), MOQI_TOKEN(MOQ_F8_E4M3), MOQI_NVFP4_IN, MOQI_MX_IN(MOQ_F4), MOQI_MX_IN(MOQ_F8_E4M3), MOQI_TENSOR(MOQ_I8),
        MOQI_MX_IN(MOQ_F6_E3M2), MOQI_MX_IN(MOQ_F6_E2M3), MOQI_MX_IN(MOQ_I8)
    };
    if (rule == MOQI_IN_FP8_TOKEN && has_scale) rule = MOQI_IN_FP8;
    if (!has_scale && (rule == MOQI_IN_FP8 || rule == MOQI_IN_NVFP4 || rule == MOQI_IN_INT8)) rule = MOQI_IN_WIDE;
    return of[rule];
}

/* The coding of another family needs its static scale, except where every scale is dynamic. An asymmetric static INT8 input has a
   zero point too: x = (q - zero) * input_scale. */
static moq_result moqi_bind_claimed_input(moqi_binder *b, int has_scale)
{
    moq_coding c = b->claim.input;
    int wants = c.elem != MOQ_NONE && (c.has_global || !c.dynamic);
    b->w->scheme.input = c;
    if (wants && !has_scale) return moqi_missing(b, c.has_global ? "input_global_scale" : "input_scale");
    if (!wants && has_scale && c.elem == MOQ_NONE)
        moqi_log(b->desc, MOQ_LOG_INFO, MOQ_E_MISMATCH, moqi_at_tensor(b, b->t), "an input scale is stored, but the description says weight-only");
    const moq_tensor *zero = moqi_part(b, "input_zero_point");
    if (!zero || c.elem == MOQ_NONE) return MOQ_OK;
    if (zero->dtype != MOQ_I8 || moqi_elements(zero) != 1) return moqi_bad_dtype(b, zero, "one number of I8");
    b->w->input_zero = ((const int8_t *)zero->data)[0];
    return MOQ_OK;
}

/* input_scale is a multiplier on read; compressed-tensors stores the global one as a divisor. The rule of rounding comes from, in
   this order: the description of another family, a tensor that only one rule has, ModelOpt's algorithm, the weight itself. */
static moq_result moqi_bind_input(moqi_binder *b)
{
    const moq_tensor *t = moqi_part(b, "input_scale"), *divisor = moqi_part(b, "input_global_scale");
    const moqi_algo *algo = moqi_find_algo(b);
    moq_result r = MOQ_OK;
    if (algo && algo->weight != b->t->dtype) algo = NULL; /* it is something else: judge by the weight */
    if (!moq_scheme_is_quantized(&b->w->scheme)) return MOQ_OK;
    if (t) r = moqi_scalar(b, t, 0, &b->w->input_scale, &b->w->expert_input);
    else if (divisor && (r = moqi_scalar(b, divisor, 0, &b->w->input_scale, NULL)) == MOQ_OK) {
        b->w->input_scale = 1.0f / b->w->input_scale;
        if (!moqi_is_finite(b->w->input_scale)) r = moqi_check_scale(b, divisor, b->w->input_scale, 0);
    }
    if (r < 0) return r;
    if (b->claim.has_coding && b->q->family != MOQ_FAMILY_MODELOPT) return moqi_bind_claimed_input(b, t || divisor);
    if (b->m->kind == MOQI_STORE_QWEIGHT || b->m->kind == MOQI_STORE_BLOCKS) return MOQ_OK;
    if (divisor && !t) b->w->scheme.input = moqi_input_coding(MOQI_IN_NVFP4, 1);
    else if (moqi_part(b, "weight_scale_inv") && b->w->scheme.weight.group_rows > 1 && !algo) {
        static const moq_coding group = MOQI_GROUP128_IN; /* DeepSeek: a scale per token and 128 columns */
        b->w->scheme.input = group;
        b->w->scheme.input.group_cols = b->w->scheme.weight.group_cols;
    } else if (b->m->kind != MOQI_STORE_PACKED) b->w->scheme.input = moqi_input_coding(algo ? algo->input : moqi_guess_input(b, t != NULL), t != NULL);
    if (algo && !t && (algo->input == MOQI_IN_FP8 || algo->input == MOQI_IN_NVFP4) && moqi_starts(algo->name, "W4A16") == 0)
        moqi_log(b->desc, MOQ_LOG_INFO, MOQ_E_MISSING, moqi_at(NULL, "layer", b->m->name, -1), "no input_scale: weight-only, though the description says %s", algo->name);
    return MOQ_OK;
}

/* ---- what may stand beside every weight ---- */

/* A vector or matrix of floats under that ending; absent is no error. */
static moq_result moqi_bind_vector(const moqi_binder *b, const char *part, moqi_dims want, const char *why, moq_view *out)
{
    const moq_tensor *t = moqi_part(b, part);
    if (!t) return MOQ_OK;
    if (!moqi_is_float(t->dtype)) return moqi_bad_dtype(b, t, "BF16, F16 or F32");
    moq_result r = moqi_expect(b, t, want, why);
    if (r == MOQ_OK) *out = moqi_view_of(t);
    return r;
}

/* SVDQuant: y += B (A x), x after pre_quant_scale. A [rank, cols], B [rows, rank], under either of two prefixes: transformers and
   diffusers exports differ (modelopt-checkpoints 5.9). */
static moq_result moqi_bind_lora(moqi_binder *b)
{
    static const char *const names[2][2] = {{"weight_quantizer._svdquant_lora_a", "weight_quantizer._svdquant_lora_b"}, {"svdquant_lora_a", "svdquant_lora_b"}};
    for (int i = 0; i < 2; i++) {
        const moq_tensor *a = moqi_part(b, names[i][0]), *c = moqi_part(b, names[i][1]);
        if (!a && !c) continue;
        if (!a || !c) return moqi_missing(b, names[i][a ? 1 : 0]);
        int64_t rank = a->rank == 2 && a->shape[0] > 0 && a->shape[0] <= 65535 ? (int64_t)a->shape[0] : 1;
        moq_result r = moqi_bind_vector(b, names[i][0], moqi_dims2(b, rank, b->w->cols), "rank and columns", &b->w->lora_a);
        if (r == MOQ_OK) r = moqi_bind_vector(b, names[i][1], moqi_dims2(b, b->w->rows, rank), "rows and rank", &b->w->lora_b);
        b->w->scheme.lora_rank = (uint16_t)rank;
        return r;
    }
    return MOQ_OK;
}

/* An online rotation of the input: x_block * H / sqrt(size), block by block; H is [size, size] of F32. It is stored once for all
   modules that share it; moqi_collect_modules found out where. Without a stored one H is Sylvester's matrix. */
static moq_result moqi_bind_hadamard(moqi_binder *b)
{
    moq_linear *w = b->w;
    int64_t size = b->claim.hadamard_size < 0 ? w->cols : b->claim.hadamard_size;
    if (size == 0) return MOQ_OK;
    if (size > w->cols || w->cols % size != 0 || size > 65536)
        return moqi_fail(b->err, MOQ_E_SHAPE, moqi_at_tensor(b, b->t), "%lld columns, expected a multiple of the %lld that the input transform rotates",
                         (long long)w->cols, (long long)size);
    const moq_tensor *t = b->m->transform ? moqi_set_find(b->set, b->m->transform) : NULL;
    if (!t && b->claim.transform)
        return moqi_fail(b->err, MOQ_E_MISSING, moqi_at(moqi_at_tensor(b, b->t).file, "layer", b->m->name, -1), "no tensor '%q_input.weight' [%lld, %lld] anywhere",
                         b->claim.transform, (long long)size, (long long)size);
    if (!t && (size & (size - 1)) != 0)
        return moqi_fail(b->err, MOQ_E_UNSUPPORTED, moqi_at_tensor(b, b->t), "the input transform has %lld columns: without a stored matrix only powers of two",
                         (long long)size);
    if (t && t->dtype != MOQ_F32) return moqi_bad_dtype(b, t, "F32");
    if (t && (t->rank != 2 || t->shape[0] != (uint64_t)size || t->shape[1] != (uint64_t)size)) {
        moqi_dims want = {2, {(uint64_t)size, (uint64_t)size, 0, 0}};
        return moqi_bad_shape(b, t, want, "the block that the input transform rotates");
    }
    if (t) w->hadamard = moqi_view_of(t);
    w->hadamard_size = (int32_t)size;
    w->hadamard_scale = (float)(1.0 / sqrt((double)size));
    w->scheme.hadamard = 1;
    return MOQ_OK;
}

/* Stacks of experts have a bias [experts, rows] and no smoothing: ModelOpt does not copy pre_quant_scale to experts (8). */
static moq_result moqi_bind_extras(moqi_binder *b)
{
    moq_linear *w = b->w;
    moq_result r = moqi_bind_vector(b, "bias", moqi_dims2(b, w->rows, 0), "one number for each row", &w->bias);
    if (r < 0) return r;
    if (b->stacked && w->bias.data) w->expert_bias = w->rows * (moq_dtype_bits(w->bias.dtype) / 8);
    if ((r = moqi_bind_input(b)) < 0) return r;
    if (!b->stacked) {
        moqi_dims cols = {1, {(uint64_t)w->cols, 0, 0, 0}};
        if ((r = moqi_bind_vector(b, "pre_quant_scale", cols, "one number for each column", &w->pre_quant_scale)) < 0) return r;
        if ((r = moqi_bind_lora(b)) < 0) return r;
    }
    w->scheme.pre_quant_scale = w->pre_quant_scale.data != NULL;
    return moqi_bind_hadamard(b);
}

/* ---- which of them it is ---- */

/* The description names an algorithm: its dtypes must be there, else the bytes would be read as what they are not. */
static moq_result moqi_check_algo(const moqi_binder *b, const moq_tensor *scale)
{
    const moqi_algo *algo = moqi_find_algo(b);
    if (!algo) return MOQ_OK;
    if (b->t->dtype == MOQ_F8_E4M3 && algo->weight != MOQ_F8_E4M3) { /* cannot be mistaken for anything else */
        moqi_log(b->desc, MOQ_LOG_WARNING, MOQ_E_MISMATCH, moqi_at_tensor(b, b->t), "stored as F8_E4M3, though the description says %s", algo->name);
        return MOQ_OK;
    }
    if (b->t->dtype != algo->weight && !(algo->weight == MOQ_F8_E4M3 && b->t->dtype == MOQ_U8 && scale && moqi_is_e8m0(scale->dtype)))
        return moqi_bad_dtype(b, b->t, moq_dtype_name(algo->weight));
    if (!scale || scale->dtype == algo->scale || (algo->scale == MOQ_U8 && scale->dtype == MOQ_F8_E8M0)) return MOQ_OK;
    if (moqi_is_float(scale->dtype) && algo->scale == MOQ_F32) return MOQ_OK;
    return b->t->dtype == algo->weight ? moqi_bad_dtype(b, scale, moq_dtype_name(algo->scale)) : MOQ_OK;
}

/* M.weight and its stacked relatives: the dtypes of weight and scale say what it is (modelopt-checkpoints 5.0). */
static moq_result moqi_bind_weight(moqi_binder *b)
{
    const moq_tensor *scale = moqi_part(b, "weight_scale");
    if (!scale) scale = moqi_part(b, "weight_scale_inv"); /* DeepSeek's name; a multiplier like the other */
    if (b->t->dtype == MOQ_F8_E5M2 || b->t->dtype == MOQ_F8_E4M3FNUZ || b->t->dtype == MOQ_F8_E5M2FNUZ || b->t->dtype == MOQ_F64)
        return moqi_fail(b->err, MOQ_E_UNSUPPORTED, moqi_at_tensor(b, b->t), "weights of dtype %s are not supported; expected F8_E4M3", moq_dtype_name(b->t->dtype));
    if (b->t->dtype != MOQ_F8_E4M3 && b->t->dtype != MOQ_U8 && b->t->dtype != MOQ_I8) return moqi_bind_plain(b);
    moq_result r = moqi_check_algo(b, scale);
    if (r < 0) return r;
    if (!scale) return moqi_missing(b, "weight_scale");
    if (b->claim.excluded) moqi_log(b->desc, MOQ_LOG_INFO, MOQ_E_MISMATCH, moqi_at_tensor(b, b->t), "the description excludes it, but it is stored quantized");
    if (b->t->dtype == MOQ_F8_E4M3) return moqi_bind_fp8(b, scale);
    if (b->t->dtype == MOQ_I8) return moqi_bind_int8(b, scale);
    if (scale->dtype == MOQ_F8_E4M3) return moqi_bind_nvfp4(b, scale, "weight_scale_2", 0);
    if (moqi_is_e8m0(scale->dtype) && moqi_starts(b->claim.algo, "MXFP6"))
        return moqi_bind_mxfp6(b, scale, moqi_same(b->claim.algo, "MXFP6_E2M3") ? MOQ_F6_E2M3 : MOQ_F6_E3M2);
    if (moqi_is_e8m0(scale->dtype)) return moqi_bind_mxfp4(b, scale);
    if (moqi_is_float(scale->dtype)) return moqi_bind_int4(b, scale);
    return moqi_bad_dtype(b, scale, "F8_E4M3 (NVFP4), U8 (MXFP4) or F32 (INT4)");
}

/* compressed-tensors: the dtype of weight_packed tells integers from FP4, that of the scale NVFP4 from MXFP4. */
static moq_result moqi_bind_packed(moqi_binder *b)
{
    const moq_tensor *scale = moqi_part(b, "weight_scale");
    if (!scale) return moqi_missing(b, "weight_scale");
    if (b->t->dtype == MOQ_I32) return moqi_bind_pack(b, scale);
    if (b->t->dtype != MOQ_U8) return moqi_bad_dtype(b, b->t, "I32 (integers) or U8 (FP4)");
    if (scale->dtype == MOQ_F8_E4M3) return moqi_bind_nvfp4(b, scale, "weight_global_scale", 1);
    if (moqi_is_e8m0(scale->dtype)) return moqi_bind_mxfp4(b, scale);
    return moqi_bad_dtype(b, scale, "F8_E4M3 (NVFP4) or U8 (MXFP4)");
}

/* gpt-oss: [experts, rows, cols/32, 16] is contiguous, so it is the packed matrix [experts, rows, cols/2]. */
static moq_result moqi_bind_blocks(moqi_binder *b)
{
    const moq_tensor *scale = moqi_part(b, "scales");
    if (!scale) return moqi_missing(b, "scales");
    if (b->t->dtype != MOQ_U8) return moqi_bad_dtype(b, b->t, "U8");
    if (!moqi_is_e8m0(scale->dtype)) return moqi_bad_dtype(b, scale, "U8");
    b->claim.group_size = 0;
    return moqi_bind_mxfp4(b, scale);
}

/* Split the shape of the codes into experts and a matrix; no dimension may be zero. */
static moq_result moqi_bind_shape(moqi_binder *b)
{
    const moq_tensor *t = b->t;
    uint32_t kind = b->m->kind, lead;
    b->stacked = kind == MOQI_STORE_STACK || kind == MOQI_STORE_RESTACK || kind == MOQI_STORE_BLOCKS;
    b->transposed = kind == MOQI_STORE_STACK;
    lead = b->stacked ? 1 : 0;
    uint32_t rank = lead + (kind == MOQI_STORE_BLOCKS ? 3u : 2u);
    int ok = t->rank == rank && moqi_elements(t) > 0 && (kind != MOQI_STORE_BLOCKS || t->shape[3] == 16);
    for (uint32_t i = 0; i < rank && ok; i++) ok = t->shape[i] <= INT32_MAX;
    if (!ok) {
        char got[96];
        moqi_shape_text(t->shape, t->rank, got, sizeof got);
        return moqi_fail(b->err, MOQ_E_SHAPE, moqi_at_tensor(b, t), "shape %s, expected %s, no dimension empty or above 2^31", got,
                         kind == MOQI_STORE_BLOCKS ? "[experts, rows, groups, 16]" : b->stacked ? "[experts, .., ..]" : "a matrix");
    }
    if (b->stacked) b->w->experts = (int32_t)t->shape[0];
    b->a = (int64_t)t->shape[lead];
    b->b = (int64_t)t->shape[lead + 1];
    if (kind == MOQI_STORE_BLOCKS) b->b *= 16;
    return MOQ_OK;
}

/* The steps for one module, in the order in which errors are reported. */
static moq_result moqi_bind_all(moqi_binder *b)
{
    moq_result r = moqi_quant_claim(b->q, b->m->name, &b->claim, b->err);
    if (r < 0 || (r = moqi_bind_shape(b)) < 0) return r;
    switch (b->m->kind) {
    case MOQI_STORE_PACKED: r = moqi_bind_packed(b); break;
    case MOQI_STORE_QWEIGHT: r = moqi_bind_qweight(b); break;
    case MOQI_STORE_BLOCKS: r = moqi_bind_blocks(b); break;
    default: r = moqi_bind_weight(b); break;
    }
    return r < 0 ? r : moqi_bind_extras(b);
}

/* As moqi_bind_linear below; findings go to desc->log. On failure *out is all zero. */
static moq_result moqi_bind_logged(const moqi_tensor_set *set, const moqi_quant *q, const moqi_module *m, const moq_open_desc *desc, moq_linear *out,
                                   moq_error *err)
{
    moqi_binder b;
    memset(&b, 0, sizeof b);
    memset(out, 0, sizeof *out);
    b.set = set;
    b.q = q;
    b.m = m;
    b.desc = desc;
    b.err = err;
    b.w = out;
    b.claim.algo = "";
    b.t = moqi_set_find(set, m->tensor);
    if (!b.t) return moqi_fail(err, MOQ_E_NOTFOUND, moqi_at(NULL, "tensor", m->tensor, -1), "not in this checkpoint");
    out->name = m->name;
    out->tensor = b.t->name;
    out->row_step = 1;
    out->global_mul = out->global_div = 1;
    moq_result r = moqi_bind_all(&b);
    if (r < 0) memset(out, 0, sizeof *out);
    return r;
}

/* One module as plain data: shapes against the scheme, scalar scales, views of the rest. Allocates nothing. */
MOQI_UNUSED static moq_result moqi_bind_linear(const moqi_tensor_set *set, const moqi_quant *q, const moqi_module *m, moq_linear *out, moq_error *err)
{
    return moqi_bind_logged(set, q, m, NULL, out, err);
}

MOQ_API void moq_make_linear(moq_linear *out, const char *name, moq_dtype dtype, const void *data, int64_t rows, int64_t cols)
{
    if (!out) return;
    memset(out, 0, sizeof *out);
    out->name = out->tensor = name;
    out->rows = rows;
    out->cols = cols;
    out->row_step = 1;
    out->global_mul = out->global_div = 1;
    out->scheme.weight.elem = dtype;
    out->codes.data = data;
    out->codes.dtype = dtype;
    out->codes.count = (uint64_t)rows * (uint64_t)cols;
    out->packing = moqi_make_packing(moq_dtype_bits(dtype), moq_dtype_bits(dtype), 0, cols, 1);
}

/* ---- finding the modules ---- */

/* Endings of tensors that belong to a weight. They are looked for from the end of a name. */
static const char *const moqi_companions[] = {
    ".weight_scale", ".weight_scale_2", ".weight_scale_inv", ".weight_global_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx",
    ".input_scale", ".input_global_scale", ".input_zero_point", ".pre_quant_scale", ".qzeros", ".scales", ".g_idx",
    ".weight_quantizer._svdquant_lora_a", ".weight_quantizer._svdquant_lora_b", ".svdquant_lora_a", ".svdquant_lora_b",
    "_weight_scale", "_weight_scale_2", "_input_scale", "_scales"
};

/* What one pass over the tensors gathers. */
typedef struct moqi_collector {
    const moqi_tensor_set *set;
    const moqi_quant *q;
    moqi_arena *r;
    const moq_open_desc *desc;
    moq_error *err;
    moqi_module *list;  /* as found: ordered by tensor name */
    size_t count;
    moqi_map modules;   /* name -> index in list */
    moqi_map transforms; /* "v_input.weight/32" -> tensor */
} moqi_collector;

/* Is it the matrix of an online transform: M.v_input.weight, square, beside M's own weight? */
static int moqi_is_transform(const moqi_tensor_set *set, const moq_tensor *t)
{
    static const char *const codes[] = {".weight_packed", ".weight", ".qweight"};
    char text[MOQI_NAME_ROOM];
    const char *dot = t->name + t->name_bytes - 7; /* of ".weight" */
    if (t->rank != 2 || t->shape[0] != t->shape[1] || t->name_bytes < 14 || memcmp(dot - 6, "_input", 6) != 0) return 0;
    do dot--; while (dot > t->name && *dot != '.');
    for (size_t i = 0; i < MOQI_COUNT(codes) && dot > t->name; i++) {
        moqi_format(text, sizeof text, "%.*s%s", (int)(dot - t->name), t->name, codes[i]);
        if (moqi_set_find(set, text)) return 1;
    }
    return 0;
}

/* A 3-D parameter of experts: quantized when it has a scale, else by the names that fused experts have. */
static int moqi_is_stack(const moqi_tensor_set *set, const moq_tensor *t)
{
    char text[MOQI_NAME_ROOM];
    if (t->rank != 3) return 0;
    moqi_format(text, sizeof text, "%s_weight_scale", t->name);
    if (moqi_set_find(set, text)) return 1;
    return moqi_is_float(t->dtype) && strstr(t->name, "experts.") && moqi_ends(t->name, "_proj");
}

/* A 3-D M.weight is a stack of experts when it has a scale or says so; else a convolution. */
static int moqi_is_restack(const moqi_tensor_set *set, const moq_tensor *t)
{
    char text[MOQI_NAME_ROOM];
    if (t->rank != 3) return 0;
    moqi_format(text, sizeof text, "%s_scale", t->name);
    return moqi_set_find(set, text) != NULL || (t->shape[1] > 1 && (strstr(t->name, ".moe.") || strstr(t->name, "experts.")));
}

/* The kind of module that a tensor carries, 0 if none, and the bytes of its name that name the module. */
static uint32_t moqi_carrier(const moqi_tensor_set *set, const moq_tensor *t, size_t *bytes)
{
    const char *s = t->name;
    size_t n = t->name_bytes;
    if (n > 7 && moqi_ends(s, ".weight")) {
        *bytes = n - 7;
        if (t->rank == 2) return moqi_is_transform(set, t) ? 0 : MOQI_STORE_WEIGHT;
        return moqi_is_restack(set, t) ? MOQI_STORE_RESTACK : 0;
    }
    *bytes = n > 14 ? n - 14 : 0;
    if (n > 14 && moqi_ends(s, ".weight_packed")) return MOQI_STORE_PACKED;
    *bytes = n > 8 ? n - 8 : 0;
    if (n > 8 && moqi_ends(s, ".qweight")) return MOQI_STORE_QWEIGHT;
    *bytes = n > 7 ? n - 7 : 0;
    if (n > 7 && t->rank == 4 && moqi_ends(s, "_blocks")) return MOQI_STORE_BLOCKS;
    *bytes = n;
    return moqi_is_stack(set, t) ? MOQI_STORE_STACK : 0;
}

/* Two tensors that both carry the codes of one module contradict each other (X16): which one is right cannot be known. */
static moq_result moqi_add_module(moqi_collector *c, const moq_tensor *t, uint32_t kind, size_t bytes)
{
    moqi_module *m = &c->list[c->count];
    m->name = moqi_take_text(c->r, t->name, bytes);
    if (!m->name) return moqi_nomem(c->err, bytes);
    m->tensor = t->name;
    m->transform = NULL;
    m->kind = kind;
    const moqi_entry *e = moqi_map_add(&c->modules, m->name, bytes, (uint32_t)c->count);
    if (e)
        return moqi_fail(c->err, MOQ_E_DUPLICATE, moqi_at(c->set->files ? c->set->files[t->shard] : NULL, "tensor", t->name, -1),
                         "the same weight is also stored as '%q'; delete one of them", c->list[e->value].tensor);
    c->count++;
    return MOQ_OK;
}

/* Remember a rotation under its own name and size, the first of equals: modules that share it look there. */
static moq_result moqi_add_transform(moqi_collector *c, const moq_tensor *t, size_t index)
{
    const char *dot = t->name + t->name_bytes - 7;
    do dot--; while (dot > t->name && *dot != '.');
    char text[MOQI_NAME_ROOM];
    size_t n = moqi_format(text, sizeof text, "%s/%llu", dot + 1, (unsigned long long)t->shape[0]);
    const char *key = moqi_take_text(c->r, text, n);
    if (!key) return moqi_nomem(c->err, n);
    moqi_map_add(&c->transforms, key, n, (uint32_t)index);
    return MOQ_OK;
}

/* Norms and other vectors called weight must be floats; a scale that belongs to no weight is worth knowing. */
static moq_result moqi_check_other(const moqi_collector *c, const moq_tensor *t)
{
    moqi_where at = moqi_at(c->set->files ? c->set->files[t->shard] : NULL, "tensor", t->name, -1);
    if (t->rank == 1 && moqi_ends(t->name, ".weight") && !moqi_is_float(t->dtype) && t->dtype != MOQ_F64)
        return moqi_fail(c->err, MOQ_E_DTYPE, at, "dtype %s, expected BF16, F16 or F32 for a vector of weights", moq_dtype_name(t->dtype));
    for (size_t i = 0; i < MOQI_COUNT(moqi_companions) && c->desc && c->desc->log; i++) {
        size_t n = strlen(moqi_companions[i]);
        if (!moqi_ends(t->name, moqi_companions[i]) || moqi_map_find(&c->modules, t->name, t->name_bytes - n)) continue;
        moqi_log(c->desc, MOQ_LOG_WARNING, MOQ_E_MISMATCH, at, "belongs to a weight that is not there");
        break;
    }
    return MOQ_OK;
}

/* Columns of a module that is no stack, read off its tensors; 0 when they do not say. */
static int64_t moqi_module_cols(const moqi_tensor_set *set, const moqi_module *m)
{
    char text[MOQI_NAME_ROOM];
    const moq_tensor *t = moqi_set_find(set, m->tensor);
    if (!t || t->rank != 2) return 0;
    if (t->dtype != MOQ_I32) return (int64_t)(t->shape[1] * (m->kind == MOQI_STORE_PACKED ? 2u : 1u));
    moqi_part_name(m, "weight_shape", text);
    t = moqi_set_find(set, text);
    return t && t->dtype == MOQ_I64 && t->bytes == 16 ? (int64_t)moqi_load_u64((const uint8_t *)t->data + 8) : 0;
}

/* Which stored matrix rotates the input of a module: its own, else the one of that name and size elsewhere. The writer of
   safetensors keeps a shared matrix under one of its names only. */
static moq_result moqi_find_transform(moqi_collector *c, moqi_module *m)
{
    moqi_claim claim;
    char text[MOQI_NAME_ROOM];
    moq_result r = moqi_quant_claim(c->q, m->name, &claim, c->err);
    if (r < 0 || !claim.transform || claim.hadamard_size == 0) return r;
    moqi_format(text, sizeof text, "%s.%s_input.weight", m->name, claim.transform);
    const moq_tensor *t = moqi_set_find(c->set, text);
    if (!t) {
        int64_t size = claim.hadamard_size < 0 ? moqi_module_cols(c->set, m) : claim.hadamard_size;
        size_t n = moqi_format(text, sizeof text, "%s_input.weight/%lld", claim.transform, (long long)size);
        const moqi_entry *e = n < sizeof text ? moqi_map_find(&c->transforms, text, n) : NULL;
        t = e ? &c->set->list[e->value] : NULL;
    }
    m->transform = t ? t->name : NULL;
    return MOQ_OK;
}

/* Module order differs from tensor order: "a-b.weight" < "a.weight", but "a" < "a-b". */
static int moqi_compare_modules(const void *a, const void *b)
{
    return strcmp(((const moqi_module *)a)->name, ((const moqi_module *)b)->name);
}

/* Sorted copies of the modules found. */
static moqi_module *moqi_sort_modules(moqi_collector *c)
{
    const void **items = (const void **)moqi_take_array(c->r, c->count, 2 * sizeof(void *));
    moqi_module *out = (moqi_module *)moqi_take_array(c->r, c->count, sizeof(moqi_module));
    if (!items || !out) return NULL;
    for (size_t i = 0; i < c->count; i++) items[i] = &c->list[i];
    moqi_sort(items, items + c->count, c->count, moqi_compare_modules);
    for (size_t i = 0; i < c->count; i++) out[i] = *(const moqi_module *)items[i];
    return out;
}

/* Everything that holds a matrix of weights. With desc->log, every module is bound once here so that findings are told. */
MOQI_UNUSED static moq_result moqi_collect_modules(const moqi_tensor_set *set, const moqi_quant *q, moqi_arena *r, moqi_module **out, size_t *count,
                                                   const moq_open_desc *desc, moq_error *err)
{
    moqi_collector c;
    moq_result rc = MOQ_OK;
    size_t bytes;
    memset(&c, 0, sizeof c);
    c.set = set;
    c.q = q;
    c.r = r;
    c.desc = desc;
    c.err = err;
    *out = NULL;
    *count = 0;
    c.list = (moqi_module *)moqi_take_array(r, set->count + 1, sizeof(moqi_module));
    if (!c.list || !moqi_map_make(&c.modules, r, set->count) || !moqi_map_make(&c.transforms, r, set->count))
        return moqi_nomem(err, set->count * sizeof(moqi_module));
    for (size_t i = 0; i < set->count && rc == MOQ_OK; i++) {
        const moq_tensor *t = &set->list[i];
        uint32_t kind = moqi_carrier(set, t, &bytes);
        if (kind) rc = moqi_add_module(&c, t, kind, bytes);
        else if (moqi_ends(t->name, "_input.weight") && moqi_is_transform(set, t)) rc = moqi_add_transform(&c, t, i);
    }
    for (size_t i = 0; i < set->count && rc == MOQ_OK; i++) rc = moqi_check_other(&c, &set->list[i]);
    for (size_t i = 0; i < c.count && rc == MOQ_OK && c.transforms.count; i++) rc = moqi_find_transform(&c, &c.list[i]);
    if (rc < 0) return rc;
    moqi_module *sorted = moqi_sort_modules(&c);
    if (!sorted) return moqi_nomem(err, c.count * sizeof(moqi_module));
    for (size_t i = 0; i < c.count && desc && desc->log; i++) {
        moq_linear w;
        if ((rc = moqi_bind_logged(set, q, &sorted[i], desc, &w, err)) < 0) return rc;
    }
    *out = sorted;
    *count = c.count;
    return MOQ_OK;
}

/* ---- KV cache ---- */

/* Where writers put a scale of attention A: ModelOpt, compressed-tensors, engines' fused projections (runtime-layouts 6.1). */
static const moq_tensor *moqi_kv_part(const moqi_tensor_set *set, const char *attention, char which, const char *part)
{
    static const char *const forms[] = {"k_proj.", "", "attn.", "qkv_proj.", "qkqkv_proj."};
    char text[MOQI_NAME_ROOM];
    for (size_t i = 0; i < MOQI_COUNT(forms); i++) {
        moqi_format(text, sizeof text, "%s.%s%c_%s", attention, i == 0 && which == 'v' ? "v_proj." : forms[i], which, part);
        const moq_tensor *t = moqi_set_find(set, text);
        if (t) return t;
    }
    if (strcmp(part, "scale") != 0) return NULL;
    moqi_format(text, sizeof text, "%s.kv_scale", attention); /* one for both, by older writers */
    return moqi_set_find(set, text);
}

/* Every number is read: there are at most heads * head_dim of them. `positive`: a scale, else a bias (N16). */
static moq_result moqi_kv_view(const moqi_tensor_set *set, const moq_tensor *t, int positive, moq_view *out, moq_error *err)
{
    moqi_where at = moqi_at(set->files ? set->files[t->shard] : NULL, "tensor", t->name, -1);
    uint64_t n = moqi_elements(t);
    float v;
    if (!moqi_is_float(t->dtype)) return moqi_fail(err, MOQ_E_DTYPE, at, "dtype %s, expected F32, BF16 or F16", moq_dtype_name(t->dtype));
    if (n == 0) return moqi_fail(err, MOQ_E_SHAPE, at, "no elements, expected one or one for each head");
    for (uint64_t i = 0; i < n; i++) {
        moq_to_f32(t->dtype, (const uint8_t *)t->data + i * (t->bytes / n), 1, &v);
        uint32_t bits = moqi_f32_bits(v);
        if (positive ? bits == 0 || bits >= 0x7f800000u : !moqi_is_finite(v))
            return moqi_fail(err, MOQ_E_SCALE, at, "value %llu is %g, expected a finite number%s", (unsigned long long)i, (double)v, positive ? " above 0" : "");
    }
    *out = moqi_view_of(t);
    return MOQ_OK;
}

/* The description chooses the format; scales of a cache that it does not quantize are ignored, as engines do. Missing scales are
   1 and no error: the *_cast recipes store none (modelopt-checkpoints 7). Affine FP8 shows in its biases alone. */
MOQI_UNUSED static moq_result moqi_bind_kv(const moqi_tensor_set *set, const moqi_quant *q, const char *attention, moq_kv *out, moq_error *err)
{
    const moq_tensor *part[4] = {moqi_kv_part(set, attention, 'k', "scale"), moqi_kv_part(set, attention, 'v', "scale"),
                                 moqi_kv_part(set, attention, 'k', "bias"), moqi_kv_part(set, attention, 'v', "bias")};
    moq_view *view[4] = {&out->k_scale, &out->v_scale, &out->k_bias, &out->v_bias};
    memset(out, 0, sizeof *out);
    out->format = q->kv;
    if (q->family == MOQ_FAMILY_NONE && !q->kv_from_config && q->kv == MOQ_KV_WIDE && part[0]) out->format = MOQ_KV_FP8; /* no description at all */
    if (out->format == MOQ_KV_WIDE) return MOQ_OK;
    if (!part[1]) part[1] = part[0]; /* a lone k_scale serves both */
    if (out->format != MOQ_KV_FP8 && out->format != MOQ_KV_FP8_AFFINE && out->format != MOQ_KV_NVFP4_AFFINE) part[2] = part[3] = NULL;
    for (int i = 0; i < 4; i++) {
        moq_result r = part[i] ? moqi_kv_view(set, part[i], i < 2, view[i], err) : MOQ_OK;
        if (r < 0) {
            memset(out, 0, sizeof *out);
            return r;
        }
    }
    if (out->format == MOQ_KV_FP8 && (out->k_bias.data || out->v_bias.data)) out->format = MOQ_KV_FP8_AFFINE;
    return MOQ_OK;
}

/* ------------------------------------------------------------------------------------------------
   >>checkpoint      folders, shards, index, tensors, modules, verification
   Opening reads headers, JSON and scalar scales, never other tensor data; a folder and the same files in memory get one verdict.
   ------------------------------------------------------------------------------------------------ */

/* A finding made while opening, kept for moq_verify. */
typedef struct moqi_note {
    struct moqi_note *next;
    moq_result code;
    const char *text;
} moqi_note;

/* One .safetensors file of the folder. Its tensor array is only a source for ck->tensors; its blob holds the data. */
typedef struct moqi_shard {
    const char *name;
    moq_st *st;
} moqi_shard;

/* Immutable after moq_open, hence shareable between threads: functions that take a const checkpoint use heap scratch, never its arena. */
struct moq_checkpoint {
    moqi_arena arena;
    moq_open_desc desc;      /* the caller's */
    moq_open_desc noting;    /* the same, but findings pass through moqi_ck_note */
    const char *dir;         /* NULL: the files lie in memory */
    const char *name;        /* base name of the folder */
    const moq_file *files;
    size_t file_count;
    moq_json_doc *config, *hf_quant, *gptq, *index;
    moqi_shard *shards;      /* sorted by name */
    const char **shard_names;
    uint32_t shard_count;
    moq_tensor *tensors;     /* of all shards, sorted by name */
    size_t count;
    moqi_map map;            /* tensor name -> index */
    moqi_tensor_set set;     /* the same for >>bind */
    moqi_quant quant;
    moqi_module *modules;    /* sorted by name */
    size_t module_count;
    moqi_map module_map;     /* module name -> index */
    moq_info info;
    moqi_note *notes, **last_note;
    int note_lost;           /* no memory for one: opening fails */
};

/* Log hook of the sections below: keeps the sentence and passes it on. Called only while opening. */
static void moqi_ck_note(void *user, moq_log_level level, moq_result code, const char *text)
{
    moq_checkpoint *ck = (moq_checkpoint *)user;
    moqi_note *n = (moqi_note *)moqi_take(&ck->arena, sizeof(moqi_note), sizeof(void *));
    const char *copy = moqi_take_text(&ck->arena, text, strlen(text));
    if (n && copy) {
        n->code = code;
        n->text = copy;
        *ck->last_note = n;
        ck->last_note = &n->next;
    } else {
        ck->note_lost = 1;
    }
    if (ck->desc.log) ck->desc.log(ck->desc.log_user, level, code, text);
}

/* The caller's hook; non-zero stops. */
static moq_result moqi_ck_progress(const moq_checkpoint *ck, moq_stage stage, uint64_t done, uint64_t total, moq_error *err)
{
    if (!ck->desc.progress || !ck->desc.progress(ck->desc.progress_user, stage, done, total)) return MOQ_OK;
    return moqi_fail(err, MOQ_E_CANCELLED, moqi_at(ck->name, NULL, NULL, -1), "stopped by the caller after %llu of %llu", (unsigned long long)done,
                     (unsigned long long)total);
}

/* ---- files of the folder ---- */

/* CON, NUL, COM1 ... open a device on Windows, with any extension, in any case, and with blanks before the dot. */
static int moqi_is_device_name(const char *s, size_t n)
{
    static const char *const names[] = {"con", "prn", "aux", "nul", "com", "lpt", "conin$", "conout$"};
    size_t stem = 0;
    while (stem < n && s[stem] != '.') stem++;
    while (stem > 0 && s[stem - 1] == ' ') stem--;
    for (size_t i = 0; i < MOQI_COUNT(names); i++) {
        size_t k = 0, length = strlen(names[i]);
        while (k < length && k < stem && moqi_lower(s[k]) == names[i][k]) k++;
        int numbered = i == 4 || i == 5;
        if (k == length && (numbered ? stem == 4 && s[3] >= '0' && s[3] <= '9' : stem == length)) return 1;
    }
    return 0;
}

/* Why a name from a file cannot be opened, or NULL. The same on every system, so that a folder does not open here and fail there. */
static const char *moqi_path_problem(const char *s, size_t n, int subfolders, const char *suffix)
{
    size_t start = 0;
    if (strlen(s) != n) return "a NUL byte is inside";
    for (size_t i = 0; i <= n; i++) {
        if (i < n && ((unsigned char)s[i] < 0x20 || s[i] == 0x7f)) return "a control byte is inside";
        if (i < n && (s[i] == '\\' || s[i] == ':' || (s[i] == '/' && !subfolders))) return "file names must be plain names inside the folder";
        if (i < n && s[i] != '/') continue;
        size_t length = i - start;
        const char *part = s + start;
        if (length == 0 || length > 255) return "a name has 1 to 255 bytes";
        if (part[length - 1] == '.' || part[length - 1] == ' ') return "file names must be plain names inside the folder, without a dot or blank at the end";
        if (moqi_is_device_name(part, length)) return "this name is a device on some systems";
        start = i + 1;
    }
    return suffix && !moqi_ends(s, suffix) ? "a shard's name ends in .safetensors" : NULL;
}

/* DIR/NAME in the arena, or NULL. */
static char *moqi_ck_path(const moq_checkpoint *ck, const char *name, moqi_arena *r)
{
    size_t bytes = strlen(ck->dir) + strlen(name) + 2;
    char *path = (char *)moqi_take(r, bytes, 1);
    if (path) moqi_format(path, bytes, "%s/%s", ck->dir, name);
    return path;
}

/* Files in memory are few: a linear search. */
static const moq_file *moqi_ck_file(const moq_checkpoint *ck, const char *name)
{
    for (size_t i = 0; i < ck->file_count; i++)
        if (strcmp(ck->files[i].name, name) == 0) return &ck->files[i];
    return NULL;
}

/* *found: a file of that name is there. */
static moq_result moqi_ck_exists(const moq_checkpoint *ck, const char *name, int *found, moq_error *err)
{
    *found = !ck->dir && moqi_ck_file(ck, name) != NULL;
    if (!ck->dir) return MOQ_OK;
    moqi_arena r = moqi_arena_make(&ck->desc.allocator);
    char *path = moqi_ck_path(ck, name, &r);
    if (path) *found = moqi_file_exists(path);
    moqi_arena_drop(&r);
    return path ? MOQ_OK : moqi_nomem(err, strlen(ck->dir) + strlen(name));
}

/* A text file as moq_read_file gives it. */
static char *moqi_ck_text(const moq_checkpoint *ck, const char *name, uint64_t limit, size_t *bytes, moq_error *err)
{
    const moq_allocator *a = &ck->desc.allocator;
    moqi_where at = moqi_at(name, NULL, NULL, -1);
    *bytes = 0;
    if (ck->dir) {
        moqi_arena r = moqi_arena_make(a);
        char *path = moqi_ck_path(ck, name, &r), *text = NULL;
        if (path) text = moq_read_file(path, limit, a, bytes, err);
        else moqi_nomem(err, strlen(ck->dir) + strlen(name));
        moqi_arena_drop(&r);
        return text;
    }
    const moq_file *f = moqi_ck_file(ck, name);
    if (!f) { moqi_fail(err, MOQ_E_NOTFOUND, at, "no such file in '%q'", ck->name); return NULL; }
    if (f->bytes > limit) {
        moqi_fail(err, MOQ_E_LIMIT, at, "%zu bytes, the limit for such a file is %llu; raise the MOQ_MAX_ macro if you trust it", f->bytes,
                  (unsigned long long)limit);
        return NULL;
    }
    char *text = (char *)moq_allocate(a, f->bytes + 1);
    if (!text) { moqi_nomem(err, (uint64_t)f->bytes + 1); return NULL; }
    if (f->bytes) memcpy(text, f->data, f->bytes);
    *bytes = f->bytes;
    return text;
}

/* Parse a file of the folder. Text is read, never mapped, so that it cannot change under the parser; it is released at once. */
static moq_result moqi_ck_json(const moq_checkpoint *ck, const char *name, moq_json_dialect dialect, int depth, uint64_t limit, moq_json_doc **out,
                               moq_error *err)
{
    moq_error e;
    size_t bytes = 0;
    char *text = moqi_ck_text(ck, name, limit, &bytes, &e);
    *out = text ? moq_json_parse(text, bytes, dialect, depth, name, &ck->desc.allocator, &e) : NULL;
    moq_release(&ck->desc.allocator, text, bytes + 1);
    if (*out) return MOQ_OK;
    if (err) *err = e;
    return e.code;
}

/* A JSON file of the folder that may be absent. When present it must hold an object; only its absence is forgiven, not a file that
   cannot be read. Real config.json files hold Infinity and NaN, hence the CONFIG dialect. */
static moq_result moqi_ck_optional(const moq_checkpoint *ck, const char *name, moq_json_doc **out, moq_error *err)
{
    moq_result r = moqi_ck_json(ck, name, MOQ_JSON_CONFIG, 64, MOQ_MAX_CONFIG_BYTES, out, err);
    if (r == MOQ_E_NOTFOUND) moqi_clear(err);
    if (r != MOQ_OK) return r == MOQ_E_NOTFOUND ? MOQ_OK : r;
    if (moq_json_root(*out)->type == MOQ_JSON_OBJECT) return MOQ_OK;
    return moqi_fail(err, MOQ_E_CONFIG, moqi_at(name, NULL, NULL, 0), "the file holds no object, expected { \"key\": value, ... }");
}

/* ---- which shards ---- */

/* Shard names, sorted bytewise, become ck->shards: the number of a shard does not depend on the order in the index. */
static moq_result moqi_ck_set_shards(moq_checkpoint *ck, const char **names, size_t count, moq_error *err)
{
    const char **scratch = (const char **)moqi_take_array(&ck->arena, count + 1, sizeof(char *));
    ck->shards = (moqi_shard *)moqi_take_array(&ck->arena, count + 1, sizeof(moqi_shard));
    ck->shard_names = names;
    if (!scratch || !ck->shards) return moqi_nomem(err, count * sizeof(moqi_shard));
    moqi_sort((const void **)names, (const void **)scratch, count, moqi_compare_text);
    for (size_t i = 0; i < count; i++) ck->shards[i].name = names[i];
    ck->shard_count = (uint32_t)count;
    return MOQ_OK;
}

#define MOQI_INDEX "model.safetensors.index.json"
#define MOQI_SINGLE "model.safetensors"

/* One row of weight_map: tensor name -> shard. The name comes from the network: nothing outside the folder may be opened. */
static moq_result moqi_ck_index_row(const moq_checkpoint *ck, const moq_json *v, moq_error *err)
{
    char shown[200];
    moqi_where at = moqi_at(MOQI_INDEX, "tensor", v->key, (int64_t)v->offset);
    if (v->type != MOQ_JSON_STRING) return moqi_fail(err, MOQ_E_HEADER, at, "its value in weight_map is no file name, expected a string");
    const char *problem = moqi_path_problem(v->text, v->text_bytes, (ck->desc.flags & MOQ_OPEN_SUBFOLDERS) != 0, ".safetensors");
    if (!problem) return MOQ_OK;
    return moqi_fail(err, MOQ_E_PATH, at, "its shard in weight_map is \"%s\": %s", moqi_escape(v->text, v->text_bytes, shown, sizeof shown), problem);
}

/* Shards that the index names, each once. The index is written by machines: the STRICT dialect. Errors come in the order of its rows;
   the document stays open, because shard names and the check of the rows use it. */
static moq_result moqi_ck_read_index(moq_checkpoint *ck, moq_error *err)
{
    moqi_map seen;
    moq_result r = moqi_ck_json(ck, MOQI_INDEX, MOQ_JSON_STRICT, 8, MOQ_MAX_CONFIG_BYTES, &ck->index, err);
    if (r != MOQ_OK) return r;
    const moq_json *map = moq_json_find(moq_json_root(ck->index), "weight_map");
    if (!map || map->type != MOQ_JSON_OBJECT)
        return moqi_fail(err, MOQ_E_HEADER, moqi_at(MOQI_INDEX, "key", "weight_map", map ? (int64_t)map->offset : -1),
                         "%s, expected an object of tensor name: file name",
                         map ? "it is no object" : "it is missing");
    size_t most = map->count < MOQ_MAX_SHARDS ? map->count : MOQ_MAX_SHARDS, count = 0;
    const char **names = (const char **)moqi_take_array(&ck->arena, most + 1, sizeof(char *));
    if (!names || !moqi_map_make(&seen, &ck->arena, most + 1)) return moqi_nomem(err, most * sizeof(char *));
    for (const moq_json *v = moq_json_first(map); v; v = moq_json_next(map, v)) {
        if ((r = moqi_ck_index_row(ck, v, err)) != MOQ_OK) return r;
        if (moqi_map_find(&seen, v->text, v->text_bytes)) continue;
        if (count == most)
            return moqi_fail(err, MOQ_E_LIMIT, moqi_at(MOQI_INDEX, NULL, NULL, (int64_t)v->offset), "more than %u shards (MOQ_MAX_SHARDS)",
                             (unsigned)MOQ_MAX_SHARDS);
        moqi_map_add(&seen, v->text, v->text_bytes, 0);
        names[count++] = v->text;
    }
    if (count == 0) return moqi_fail(err, MOQ_E_MISSING, moqi_at(MOQI_INDEX, "key", "weight_map", (int64_t)map->offset),
                                     "it is empty: no shard to open");
    return moqi_ck_set_shards(ck, names, count, err);
}

/* PREFIX-00001-of-00003.safetensors: the number, the total and the bytes of the prefix. */
static int moqi_shard_number(const char *s, uint32_t *number, uint32_t *total, size_t *prefix)
{
    static const char form[] = "-00000-of-00000.safetensors";
    size_t n = strlen(s), tail = sizeof form - 1;
    uint32_t value[2] = {0, 0};
    if (n <= tail) return 0;
    const char *p = s + n - tail;
    for (size_t i = 0; i < tail; i++) {
        if (form[i] != '0' && p[i] != form[i]) return 0;
        if (form[i] == '0' && (p[i] < '0' || p[i] > '9')) return 0;
        if (form[i] == '0') value[i > 6] = value[i > 6] * 10 + (uint32_t)(p[i] - '0');
    }
    *number = value[0];
    *total = value[1];
    *prefix = n - tail;
    return value[0] >= 1 && value[0] <= value[1];
}

/* Names in the folder, sorted. */
static moq_result moqi_ck_list(moq_checkpoint *ck, const char ***names, size_t *count, moq_error *err)
{
    if (ck->dir) return moqi_list_dir(ck->dir, &ck->arena, names, count, err);
    const char **list = (const char **)moqi_take_array(&ck->arena, (uint64_t)ck->file_count + 1, 2 * sizeof(char *));
    if (!list) return moqi_nomem(err, ck->file_count * sizeof(char *));
    for (size_t i = 0; i < ck->file_count; i++) list[i] = ck->files[i].name;
    moqi_sort((const void **)list, (const void **)list + ck->file_count + 1, ck->file_count, moqi_compare_text);
    *names = list;
    *count = ck->file_count;
    return MOQ_OK;
}

/* Without an index: one complete numbered set, and nothing that could be another. The names are sorted and zero-padded, so the set is
   complete if the numbers come as 1, 2, 3 ...; the first gap is the one reported. Other files are left alone. */
static moq_result moqi_ck_numbered(moq_checkpoint *ck, moq_error *err)
{
    const char **names = NULL, *first = NULL;
    size_t count = 0, found = 0, prefix = 0, bytes = 0;
    uint32_t total = 0, n = 0, i = 0;
    moqi_where at = moqi_at(ck->name, NULL, NULL, -1);
    moq_result r = moqi_ck_list(ck, &names, &count, err);
    if (r != MOQ_OK) return r;
    for (size_t k = 0; k < count; k++) {
        if (!moqi_shard_number(names[k], &i, &n, &bytes)) continue;
        if (first && (n != total || bytes != prefix || memcmp(first, names[k], prefix) != 0))
            return moqi_fail(err, MOQ_E_NOTFOUND, at, "'%q' and '%q' belong to different sets of shards, and no " MOQI_INDEX " says which to open",
                             first, names[k]);
        if (!first) { first = names[k]; total = n; prefix = bytes; }
        if (total > MOQ_MAX_SHARDS) return moqi_fail(err, MOQ_E_LIMIT, at, "'%q' is one of %u shards, at most %u are allowed (MOQ_MAX_SHARDS)",
                                                     first, total, (unsigned)MOQ_MAX_SHARDS);
        if (i != found + 1) break;
        names[found++] = names[k]; /* sorted, so the numbers come in order */
    }
    if (!first)
        return moqi_fail(err, MOQ_E_NOTFOUND, at,
                         "the folder has neither " MOQI_SINGLE " nor " MOQI_INDEX " nor shards named model-00001-of-000NN.safetensors");
    if (found != total) {
        char shown[200];
        return moqi_fail(err, MOQ_E_MISSING, at,
                         "shard number %zu of %u (%s-%05u-of-%05u.safetensors) is missing. The download is probably incomplete",
                         found + 1, total, moqi_escape(first, prefix, shown, sizeof shown), (unsigned)found + 1, total);
    }
    return moqi_ck_set_shards(ck, names, found, err);
}

/* The index decides. Without one there must be exactly model.safetensors or one complete numbered set: guessing among several files
   would open half a model. A lone model.safetensors beside an index whose shards are gone is what a merged export leaves behind. */
static moq_result moqi_ck_find_shards(moq_checkpoint *ck, moq_error *err)
{
    int single = 0, indexed = 0, there = 0, absent = 0;
    moq_result r = moqi_ck_exists(ck, MOQI_SINGLE, &single, err);
    if (r == MOQ_OK) r = moqi_ck_exists(ck, MOQI_INDEX, &indexed, err);
    if (r != MOQ_OK) return r;
    if (!indexed && !single) return moqi_ck_numbered(ck, err);
    if (indexed) {
        r = moqi_ck_read_index(ck, err);
        if (r != MOQ_OK || !single) return r;
        for (uint32_t i = 0; i < ck->shard_count; i++) {
            if (strcmp(ck->shards[i].name, MOQI_SINGLE) == 0) return MOQ_OK;
            if ((r = moqi_ck_exists(ck, ck->shards[i].name, &there, err)) != MOQ_OK) return r;
            absent += !there;
        }
        moqi_log(&ck->noting, MOQ_LOG_WARNING, MOQ_E_MISMATCH, moqi_at(MOQI_INDEX, NULL, NULL, -1),
                 "a lone " MOQI_SINGLE " stands beside the index; %s is used",
                 absent ? "shards of the index are missing, so the lone file" : "the index");
        if (!absent) return MOQ_OK;
        moq_json_destroy(ck->index);
        ck->index = NULL;
    }
    const char **names = NULL;
    size_t count = 0, bytes = 0;
    uint32_t number = 0, total = 0;
    r = moqi_ck_list(ck, &names, &count, err);
    for (size_t i = 0; i < count && r == MOQ_OK && !indexed; i++)
        if (moqi_shard_number(names[i], &number, &total, &bytes))
            r = moqi_fail(err, MOQ_E_NOTFOUND, moqi_at(ck->name, NULL, NULL, -1), MOQI_SINGLE " and '%q' stand side by side, and no " MOQI_INDEX
                          " says which to open. Remove what is left over from an older download", names[i]);
    if (r != MOQ_OK) return r;
    names = (const char **)moqi_take_array(&ck->arena, 1, sizeof(char *));
    if (!names) return moqi_nomem(err, sizeof(char *));
    names[0] = MOQI_SINGLE;
    return moqi_ck_set_shards(ck, names, 1, err);
}

/* ---- tensors of all shards ---- */

/* Header and ranges are judged by the parser of >>st, the same for every way of opening. The handle is closed once mapped. */
static moq_result moqi_ck_open_shard(moq_checkpoint *ck, moqi_shard *s, moq_error *err)
{
    moqi_blob blob;
    moq_result r = MOQ_OK;
    const moq_file *f = ck->dir ? NULL : moqi_ck_file(ck, s->name);
    memset(&blob, 0, sizeof blob);
    if (ck->dir) {
        moqi_arena arena = moqi_arena_make(&ck->desc.allocator);
        char *path = moqi_ck_path(ck, s->name, &arena);
        r = path ? moqi_blob_open(&blob, path, s->name, (ck->desc.flags & MOQ_OPEN_READ) != 0, &ck->desc.allocator, err) : moqi_nomem(err,
                strlen(ck->dir));
        moqi_arena_drop(&arena);
    } else if (f) {
        blob.data = (const uint8_t *)f->data;
        blob.bytes = f->bytes;
    }
    if (r == MOQ_E_NOTFOUND || (!ck->dir && !f))
        return moqi_fail(err, MOQ_E_MISSING, moqi_at(s->name, NULL, NULL, -1), "this shard is not in '%q'. The download is probably incomplete",
                         ck->name);
    if (r != MOQ_OK) return r;
    moq_error e;
    s->st = moqi_st_make(&blob, s->name, &ck->desc.allocator, &e);
    if (!s->st && err) *err = e;
    return s->st ? MOQ_OK : e.code;
}

/* Progress counts shards: opening one takes no longer for a large one. */
static moq_result moqi_ck_open_shards(moq_checkpoint *ck, moq_error *err)
{
    moq_result r = MOQ_OK;
    for (uint32_t i = 0; i < ck->shard_count && r == MOQ_OK; i++) {
        r = moqi_ck_progress(ck, MOQ_STAGE_LOAD, i, ck->shard_count, err);
        if (r == MOQ_OK) r = moqi_ck_open_shard(ck, &ck->shards[i], err);
    }
    return r == MOQ_OK ? moqi_ck_progress(ck, MOQ_STAGE_LOAD, ck->shard_count, ck->shard_count, err) : r;
}

/* All tensors into ck->tensors; `sorted` holds pointers to them by name. A name in two shards is ambiguous: which one would be run
   depends on the reader. */
static moq_result moqi_ck_fill(moq_checkpoint *ck, const moq_tensor *const *sorted, moq_error *err)
{
    ck->tensors = (moq_tensor *)moqi_take_array(&ck->arena, (uint64_t)ck->count + 1, sizeof(moq_tensor));
    if (!ck->tensors || !moqi_map_make(&ck->map, &ck->arena, ck->count)) return moqi_nomem(err, ck->count * sizeof(moq_tensor));
    for (size_t i = 0; i < ck->count; i++) {
        const moq_tensor *t = sorted[i];
        ck->tensors[i] = *t;
        ck->info.total_bytes += t->bytes;
        if (!moqi_map_add(&ck->map, t->name, t->name_bytes, (uint32_t)i)) continue;
        return moqi_fail(err, MOQ_E_DUPLICATE, moqi_at(ck->shard_names[t->shard], "tensor", t->name, (int64_t)t->offset),
                         "it is also in shard '%q'. Delete one of them",
                         ck->shard_names[sorted[i - 1]->shard]);
    }
    return MOQ_OK;
}

/* Sorting pointers of all shards is n log n; each shard's are sorted already, so one shard needs no sort. */
static moq_result moqi_ck_merge(moq_checkpoint *ck, moq_error *err)
{
    moqi_arena scratch = moqi_arena_make(&ck->desc.allocator);
    uint64_t total = 0;
    size_t n = 0;
    for (uint32_t s = 0; s < ck->shard_count; s++) total += ck->shards[s].st->count;
    if (total > 0x7fffffffu) return moqi_fail(err, MOQ_E_LIMIT, moqi_at(ck->name, NULL, NULL, -1), "%llu tensors in all, at most 2^31 are allowed",
                                              (unsigned long long)total);
    ck->count = (size_t)total;
    const void **list = (const void **)moqi_take_array(&scratch, total + 1, 2 * sizeof(void *));
    moq_result r = list ? MOQ_OK : moqi_nomem(err, total * 2 * sizeof(void *));
    for (uint32_t s = 0; s < ck->shard_count && list; s++) {
        const moq_st *st = ck->shards[s].st;
        for (size_t i = 0; i < st->count; i++) st->tensors[i].shard = s;
        for (size_t i = 0; i < st->count; i++) list[n++] = st->sorted[i];
    }
    if (list && ck->shard_count > 1) moqi_sort(list, list + ck->count, ck->count, moqi_st_by_name);
    if (r == MOQ_OK) r = moqi_ck_fill(ck, (const moq_tensor *const *)list, err);
    moqi_arena_drop(&scratch);
    return r;
}

/* metadata.total_size is informative: some writers count elements, padding or shared tensors differently, a few write it as a float. */
static moq_result moqi_ck_total_size(const moq_checkpoint *ck, moq_error *err)
{
    const moq_json *v = moq_json_find(moq_json_find(moq_json_root(ck->index), "metadata"), "total_size");
    uint64_t said = 0;
    double real = 0;
    if (!v) return MOQ_OK;
    moqi_where at = moqi_at(MOQI_INDEX, "key", "total_size", (int64_t)v->offset);
    if (v->type != MOQ_JSON_NUMBER) return moqi_fail(err, MOQ_E_CONFIG, at, "its value is no number");
    int same = moq_json_u64(v, &said) ? said == ck->info.total_bytes : moq_json_float(v,
            &real) && real >= 0 && real < 1.8e19 && (uint64_t)real == ck->info.total_bytes;
    if (!same) moqi_log(&ck->noting, MOQ_LOG_INFO, MOQ_E_MISMATCH, at, "it says %q bytes, the tensors have %llu", v->text,
                        (unsigned long long)ck->info.total_bytes);
    return MOQ_OK;
}

/* Every row of weight_map is a tensor of exactly that shard, and every tensor is in weight_map: else the folder is a mix of two
   downloads. Rows are judged in the order of the index, tensors by name. */
static moq_result moqi_ck_check_index(moq_checkpoint *ck, moq_error *err)
{
    const moq_json *map = moq_json_find(moq_json_root(ck->index), "weight_map");
    moqi_arena scratch = moqi_arena_make(&ck->desc.allocator);
    uint8_t *listed = (uint8_t *)moqi_take(&scratch, ck->count + 1, 1);
    moq_result r = listed ? MOQ_OK : moqi_nomem(err, ck->count);
    for (const moq_json *v = moq_json_first(map); v && r == MOQ_OK; v = moq_json_next(map, v)) {
        const moqi_entry *e = moqi_map_find(&ck->map, v->key, v->key_bytes);
        const char *real = e ? ck->shard_names[ck->tensors[e->value].shard] : NULL;
        if (e) listed[e->value] = 1;
        if (e && strcmp(real, v->text) == 0) continue;
        r = moqi_fail(err, MOQ_E_MISSING, moqi_at(v->text, "tensor", v->key, -1),
                      "the index puts it into this shard, but %s%s%s. Download the folder again",
                      e ? "it is in '" : "no shard has it", e ? real : "", e ? "'" : "");
    }
    for (size_t i = 0; i < ck->count && r == MOQ_OK; i++)
        if (!listed[i])
            r = moqi_fail(err, MOQ_E_MISMATCH,
                          moqi_at(ck->shard_names[ck->tensors[i].shard], "tensor", ck->tensors[i].name, (int64_t)ck->tensors[i].offset),
                          "the shard holds it, but " MOQI_INDEX " does not list it");
    moqi_arena_drop(&scratch);
    return r == MOQ_OK ? moqi_ck_total_size(ck, err) : r;
}

/* ---- modules ---- */

/* KV scales of every attention are read once, so that a bad one is refused now. An attention is what holds a key projection. Exports
   with constant ranges store no scale, which means 1; that is told once, not once a layer. */
static moq_result moqi_ck_bind_kv(moq_checkpoint *ck, moq_error *err)
{
    static const char *const ends[] = {".k_proj", ".qkv_proj", ".kv_b_proj"};
    char name[MOQ_MAX_NAME_BYTES + 1], first[MOQ_MAX_NAME_BYTES + 1] = "";
    uint64_t missing = 0;
    for (size_t i = 0; i < ck->module_count; i++) {
        moq_kv kv;
        for (size_t k = 0; k < MOQI_COUNT(ends); k++) {
            if (!moqi_ends(ck->modules[i].name, ends[k])) continue;
            moqi_format(name, sizeof name, "%.*s", (int)(strlen(ck->modules[i].name) - strlen(ends[k])), ck->modules[i].name);
            moq_result r = moqi_bind_kv(&ck->set, &ck->quant, name, &kv, err);
            if (r != MOQ_OK) return r;
            if (kv.format == MOQ_KV_WIDE || kv.format == MOQ_KV_MXFP4 || kv.k_scale.data) continue;
            if (missing++ == 0) moqi_format(first, sizeof first, "%s", name);
        }
    }
    if (missing)
        moqi_log(&ck->noting, MOQ_LOG_INFO, MOQ_E_MISSING, moqi_at(ck->name, "layer", first, -1),
                 "the KV cache is quantized but has no k_scale here (%llu layers); the scale is 1",
                 (unsigned long long)missing);
    return MOQ_OK;
}

/* The description, the modules, and every module bound once: a folder that opens can be run layer by layer without a surprise.
   moqi_collect_modules does the binding, because ck->noting has a log. */
static moq_result moqi_ck_modules(moq_checkpoint *ck, moq_error *err)
{
    ck->set.list = ck->tensors;
    ck->set.count = ck->count;
    ck->set.map = &ck->map;
    ck->set.files = ck->shard_names;
    moq_result r = moqi_quant_parse(&ck->quant, moq_json_root(ck->config), moq_json_root(ck->hf_quant), moq_json_root(ck->gptq), &ck->arena,
                                    &ck->noting, err);
    if (r == MOQ_OK) r = moqi_collect_modules(&ck->set, &ck->quant, &ck->arena, &ck->modules, &ck->module_count, &ck->noting, err);
    if (r != MOQ_OK) return r;
    if (!moqi_map_make(&ck->module_map, &ck->arena, ck->module_count)) return moqi_nomem(err, ck->module_count * sizeof(moqi_entry));
    for (size_t i = 0; i < ck->module_count; i++) moqi_map_add(&ck->module_map, ck->modules[i].name, strlen(ck->modules[i].name), (uint32_t)i);
    return moqi_ck_bind_kv(ck, err);
}

/* Summary, from what is parsed already. Strings are borrowed from the JSON documents, which stay open. */
static void moqi_ck_info(moq_checkpoint *ck)
{
    static const char *const families[] = {"none", "modelopt", "compressed-tensors", "gpt-oss", "fp8-block", "awq", "gptq"};
    const char *type = moq_json_string(moq_json_find(moq_json_root(ck->config), "model_type"));
    ck->info.family = ck->quant.family;
    ck->info.family_name = families[ck->quant.family];
    ck->info.model_type = type ? type : "";
    ck->info.quant_algo = ck->quant.algo ? ck->quant.algo : "";
    ck->info.producer = ck->quant.producer ? ck->quant.producer : "";
    ck->info.kv = ck->quant.kv;
    ck->info.shards = ck->shard_count;
}

/* Everything after the place is known, cheap refusals first: JSON, then headers, then shapes. */
static moq_result moqi_ck_load(moq_checkpoint *ck, moq_error *err)
{
    moq_result r = moqi_ck_optional(ck, "config.json", &ck->config, err);
    if (r == MOQ_OK && !ck->config)
        r = moqi_fail(err, MOQ_E_NOTFOUND, moqi_at(ck->name, NULL, NULL, -1),
                      "the folder has no config.json; is it a checkpoint? (a lone .safetensors file opens with moq_st_open)");
    if (r == MOQ_OK) r = moqi_ck_optional(ck, "hf_quant_config.json", &ck->hf_quant, err);
    if (r == MOQ_OK) r = moqi_ck_optional(ck, "quantize_config.json", &ck->gptq, err);
    if (r == MOQ_OK) r = moqi_ck_find_shards(ck, err);
    if (r == MOQ_OK) r = moqi_ck_open_shards(ck, err);
    if (r == MOQ_OK) r = moqi_ck_merge(ck, err);
    if (r == MOQ_OK && ck->index) r = moqi_ck_check_index(ck, err);
    if (r == MOQ_OK) r = moqi_ck_modules(ck, err);
    if (r == MOQ_OK && ck->note_lost) r = moqi_nomem(err, sizeof(moqi_note));
    if (r == MOQ_OK) moqi_ck_info(ck);
    return r;
}

/* An empty checkpoint that lies in its own arena: everything it will own is freed in one place. */
static moq_checkpoint *moqi_ck_make(const char *name, size_t name_bytes, const moq_open_desc *desc, moq_error *err)
{
    moqi_arena arena = moqi_arena_make(desc ? &desc->allocator : NULL);
    moq_checkpoint *ck = (moq_checkpoint *)moqi_take(&arena, sizeof(moq_checkpoint), 16);
    const char *copy = moqi_take_text(&arena, name, name_bytes);
    if (!ck || !copy) {
        moqi_nomem(err, sizeof(moq_checkpoint) + name_bytes);
        moqi_arena_drop(&arena);
        return NULL;
    }
    ck->arena = arena;
    if (desc) ck->desc = *desc;
    ck->noting = ck->desc;
    ck->noting.log = moqi_ck_note;
    ck->noting.log_user = ck;
    ck->last_note = &ck->notes;
    ck->name = copy;
    return ck;
}

/* ck is closed when anything fails. */
static moq_checkpoint *moqi_ck_finish(moq_checkpoint *ck, moq_result r, moq_error *err)
{
    if (r == MOQ_OK) r = moqi_ck_load(ck, err);
    if (r == MOQ_OK) return ck;
    moq_close(ck);
    return NULL;
}

MOQ_API moq_checkpoint *moq_open(const char *dir, const moq_open_desc *desc, moq_error *err)
{
    moqi_clear(err);
    if (!dir) { moq_fail(err, MOQ_E_ARG, "moq_open", "dir is NULL"); return NULL; }
#ifdef MOQ_NO_OS
    (void)desc;
    moqi_no_os(dir, err);
    return NULL;
#else
    size_t n = strlen(dir);
    while (n > 1 && (dir[n - 1] == '/' || dir[n - 1] == '\\')) n--;
    size_t start = n;
    while (start > 0 && dir[start - 1] != '/' && dir[start - 1] != '\\') start--;
    const char *base = dir + start;
    if (!moqi_is_dir(dir)) {
        moqi_fail(err, MOQ_E_NOTFOUND, moqi_at(base, NULL, NULL, -1),
                  moqi_file_exists(dir) ? "is a file; expected the folder of a checkpoint" : "no such folder");
        return NULL;
    }
    moq_checkpoint *ck = moqi_ck_make(base, n - start, desc, err);
    if (!ck) return NULL;
    ck->dir = moqi_take_text(&ck->arena, dir, n);
    return moqi_ck_finish(ck, ck->dir ? MOQ_OK : moqi_nomem(err, n), err);
#endif
}

MOQ_API moq_checkpoint *moq_open_memory(const moq_file *files, size_t count, const moq_open_desc *desc, moq_error *err)
{
    moqi_clear(err);
    for (size_t i = 0; i < count; i++)
        if (!files || !files[i].name || (!files[i].data && files[i].bytes)) { moq_fail(err, MOQ_E_ARG, "moq_open_memory",
                                                                                       "file %zu has no name or no data", i); return NULL; }
    moq_checkpoint *ck = moqi_ck_make("memory", 6, desc, err);
    if (!ck) return NULL;
    moq_file *copy = (moq_file *)moqi_take_array(&ck->arena, (uint64_t)count + 1, sizeof(moq_file));
    moq_result r = copy ? MOQ_OK : moqi_nomem(err, count * sizeof(moq_file));
    for (size_t i = 0; i < count && r == MOQ_OK; i++) {
        copy[i] = files[i];
        copy[i].name = moqi_take_text(&ck->arena, files[i].name, strlen(files[i].name));
        if (!copy[i].name) r = moqi_nomem(err, strlen(files[i].name) + 1);
    }
    ck->files = copy;
    ck->file_count = r == MOQ_OK ? count : 0;
    return moqi_ck_finish(ck, r, err);
}

/* Safe at any stage of a failed opening: what is not there yet is NULL. */
MOQ_API void moq_close(moq_checkpoint *ck)
{
    if (!ck) return;
    moqi_arena arena = ck->arena; /* ck lies in it */
    for (uint32_t i = 0; i < ck->shard_count; i++) moq_st_close(ck->shards[i].st);
    moq_json_destroy(ck->config);
    moq_json_destroy(ck->hf_quant);
    moq_json_destroy(ck->gptq);
    moq_json_destroy(ck->index);
    moqi_arena_drop(&arena);
}

MOQ_API const moq_info *moq_get_info(const moq_checkpoint *ck) { return ck ? &ck->info : NULL; }
MOQ_API const moq_allocator *moq_get_allocator(const moq_checkpoint *ck) { return ck ? &ck->desc.allocator : NULL; }
MOQ_API const char *moq_get_name(const moq_checkpoint *ck) { return ck ? ck->name : NULL; }
MOQ_API const moq_json *moq_get_config(const moq_checkpoint *ck) { return ck ? moq_json_root(ck->config) : NULL; }

/* Names from a caller may come from a file too: the same rules as for shards, except that subfolders are allowed. */
MOQ_API moq_json_doc *moq_read_json(const moq_checkpoint *ck, const char *name, moq_json_dialect dialect, moq_error *err)
{
    size_t bytes = 0;
    char *text = moq_read_text(ck, name, &bytes, err);
    if (!text) return NULL;
    moq_json_doc *doc = moq_json_parse(text, bytes, dialect, 64, name, &ck->desc.allocator, err);
    moq_release(&ck->desc.allocator, text, bytes + 1);
    return doc;
}

MOQ_API char *moq_read_text(const moq_checkpoint *ck, const char *name, size_t *bytes, moq_error *err)
{
    size_t ignored = 0;
    moqi_clear(err);
    const char *problem = name ? moqi_path_problem(name, strlen(name), 1, NULL) : "it is NULL";
    if (bytes) *bytes = 0;
    if (!ck) { moq_fail(err, MOQ_E_ARG, "moq_read_text", "ck is NULL"); return NULL; }
    if (problem) { moqi_fail(err, MOQ_E_PATH, moqi_at(ck->name, "file", name ? name : "", -1), "%s", problem); return NULL; }
    return moqi_ck_text(ck, name, MOQ_MAX_JSON_BYTES, bytes ? bytes : &ignored, err);
}

MOQ_API size_t moq_tensor_count(const moq_checkpoint *ck) { return ck ? ck->count : 0; }
MOQ_API const moq_tensor *moq_get_tensor(const moq_checkpoint *ck, size_t index) { return ck && index < ck->count ? &ck->tensors[index] : NULL; }
MOQ_API const moq_tensor *moq_find_tensor(const moq_checkpoint *ck, const char *name) { return ck && name ? moqi_set_find(&ck->set, name) : NULL; }
MOQ_API const char *moq_get_shard_name(const moq_checkpoint *ck, uint32_t shard)
{
    return ck && shard < ck->shard_count ? ck->shard_names[shard] : NULL;
}

MOQ_API size_t moq_module_count(const moq_checkpoint *ck) { return ck ? ck->module_count : 0; }

MOQ_API moq_result moq_get_module(const moq_checkpoint *ck, size_t index, moq_linear *out, moq_error *err)
{
    moqi_clear(err);
    if (!ck || !out) return moq_fail(err, MOQ_E_ARG, "moq_get_module", "ck or out is NULL");
    memset(out, 0, sizeof *out);
    if (index >= ck->module_count) return moqi_fail(err, MOQ_E_ARG, moqi_at(ck->name, NULL, NULL, -1), "module %zu of %zu", index, ck->module_count);
    return moqi_bind_linear(&ck->set, &ck->quant, &ck->modules[index], out, err);
}

MOQ_API moq_result moq_find_linear(const moq_checkpoint *ck, const char *name, moq_linear *out, moq_error *err)
{
    moqi_clear(err);
    if (out) memset(out, 0, sizeof *out);
    if (!ck || !name || !out) return moq_fail(err, MOQ_E_ARG, "moq_find_linear", "ck, name or out is NULL");
    const moqi_entry *e = moqi_map_find(&ck->module_map, name, strlen(name));
    if (e) return moqi_bind_linear(&ck->set, &ck->quant, &ck->modules[e->value], out, err);
    return moqi_fail(err, MOQ_E_NOTFOUND, moqi_at(ck->name, "layer", name, -1), "nothing of that name holds weights%s",
                     moqi_ends(name, ".weight") ? "; layers are named without '.weight'" : "");
}

MOQ_API int moq_has_linear(const moq_checkpoint *ck, const char *name)
{
    return ck && name && moqi_map_find(&ck->module_map, name, strlen(name)) != NULL;
}

MOQ_API moq_result moq_find_kv(const moq_checkpoint *ck, const char *attention, moq_kv *out, moq_error *err)
{
    moqi_clear(err);
    if (out) memset(out, 0, sizeof *out);
    if (!ck || !attention || !out) return moq_fail(err, MOQ_E_ARG, "moq_find_kv", "ck, attention or out is NULL");
    return moqi_bind_kv(&ck->set, &ck->quant, attention, out, err);
}

/* ------------------------------------------------------------------------------------------------
   >>verify          every value that opening did not touch
   Reads only; a table says what the values of each kind of tensor may be. NaN and infinity are told by their bits.
   ------------------------------------------------------------------------------------------------ */

/* What the values of a kind of tensor may be. NaN is fatal everywhere: one makes every output NaN. */
enum { MOQI_ANY_FINITE = 0, MOQI_NO_NEGATIVE = 1, MOQI_NO_ZERO = 2, MOQI_PLAIN = 4 /* a weight: only NaN is fatal */ };

/* Tensors that hold scales, by the end of the name; the first row that fits. Zero block scales are legal: the block is zero. */
static const struct { const char *ending; int rule; } moqi_scale_kinds[] = {
    {"input_scale", MOQI_NO_NEGATIVE | MOQI_NO_ZERO}, {"input_global_scale", MOQI_NO_NEGATIVE | MOQI_NO_ZERO},
    {"weight_scale", MOQI_NO_NEGATIVE}, {"weight_scale_2", MOQI_NO_NEGATIVE}, {"weight_scale_inv", MOQI_NO_NEGATIVE},
    {"weight_global_scale", MOQI_NO_NEGATIVE}, {".scales", MOQI_NO_NEGATIVE}, {"_scales", MOQI_NO_NEGATIVE},
    {".pre_quant_scale", MOQI_ANY_FINITE}, {".k_bias", MOQI_ANY_FINITE}, {".v_bias", MOQI_ANY_FINITE},
    {".k_scale", MOQI_NO_NEGATIVE | MOQI_NO_ZERO}, {".v_scale", MOQI_NO_NEGATIVE | MOQI_NO_ZERO}, {".kv_scale", MOQI_NO_NEGATIVE | MOQI_NO_ZERO}
};

static const char *const moqi_bad_values[] = {"NaN", "infinite", "negative", "zero"};

/* How often each kind of bad value occurs in a tensor and where first: a broken tensor has millions, one sentence is enough. */
typedef struct moqi_scan { uint64_t count[4], first[4]; } moqi_scan; /* of moqi_bad_values */

/* One run. Nothing is allocated; the checkpoint is only read, so several threads may verify it. */
typedef struct moqi_verify {
    const moq_checkpoint *ck;
    moq_finding_fn found;
    void *user;
    moq_error first;  /* the first fatal finding; code MOQ_OK: none */
    uint64_t done;    /* bytes, for progress */
    uint32_t flags;
} moqi_verify;

/* `found` may be NULL: then only the first fatal finding counts. */
static void moqi_report(moqi_verify *v, int fatal, const moq_error *e)
{
    if (fatal && v->first.code == MOQ_OK) v->first = *e;
    if (v->found) v->found(v->user, fatal, e);
}

/* Count NaN, infinite, negative and zero values, told by their bits, which -ffast-math cannot optimise away. -0 counts as zero. Values go
   through F32 in pieces of 512; progress is called every 2 M values. A dtype without numbers has nothing to count. */
static moq_result moqi_scan_values(moqi_verify *v, const moq_tensor *t, moq_dtype dtype, moqi_scan *s, moq_error *err)
{
    uint64_t n = moqi_elements(t), step = (uint64_t)moq_dtype_bits(dtype) / 8;
    float values[512];
    memset(s, 0, sizeof *s);
    for (uint64_t i = 0; i < n; i += 512) {
        size_t some = (size_t)(n - i < 512 ? n - i : 512);
        if (!moq_to_f32(dtype, (const uint8_t *)t->data + i * step, some, values)) return MOQ_OK;
        for (size_t k = 0; k < some; k++) {
            uint32_t bits = moqi_f32_bits(values[k]), size = bits & 0x7fffffffu;
            int what = size > 0x7f800000u ? 0 : size == 0x7f800000u ? 1 : size == 0 ? 3 : bits >> 31 ? 2 : 4;
            if (what < 4 && s->count[what]++ == 0) s->first[what] = i + k;
        }
        if (i % (1u << 21) != 0 || i == 0) continue;
        moq_result r = moqi_ck_progress(v->ck, MOQ_STAGE_VERIFY, v->done + i * step, v->ck->info.total_bytes, err);
        if (r != MOQ_OK) return r;
    }
    return MOQ_OK;
}

/* "row 5, group 3" or "element 17" */
static void moqi_index_text(const moq_tensor *t, uint64_t index, int scale, char *text, size_t capacity)
{
    unsigned long long width = t->rank >= 2 ? t->shape[t->rank - 1] : 0, i = index;
    if (width > 0) moqi_format(text, capacity, "row %llu, %s %llu", i / width, scale ? "group" : "column", i % width);
    else moqi_format(text, capacity, "element %llu", i);
}

/* Findings of a scanned tensor, in the order NaN, infinite, negative, zero. Plain weights may be negative and zero; an infinite one is
   told but not fatal, because masks hold them. */
static void moqi_verify_scan(moqi_verify *v, const moq_tensor *t, int rule, const moqi_scan *s)
{
    const int fatal[4] = {1, !(rule & MOQI_PLAIN), (rule & MOQI_NO_NEGATIVE) != 0, (rule & MOQI_NO_ZERO) != 0};
    char place[80];
    moq_error e;
    for (int i = 0; i < 4; i++) {
        if (s->count[i] == 0 || (i == 2 && !fatal[2]) || (i == 3 && rule & MOQI_PLAIN)) continue;
        moqi_index_text(t, s->first[i], !(rule & MOQI_PLAIN), place, sizeof place);
        moqi_fail(&e, MOQ_E_SCALE,
                  moqi_at(v->ck->shard_names[t->shard], "tensor", t->name, (int64_t)(t->offset + s->first[i] * (t->bytes / moqi_elements(t)))),
                  "%llu of %llu values %s %s, the first at %s", (unsigned long long)s->count[i], (unsigned long long)moqi_elements(t), s->count[i] == 1 ? "is" : "are",
                  moqi_bad_values[i], place);
        moqi_report(v, fatal[i], &e);
    }
}

/* Which rule the values of a tensor follow; -1: nothing to check. A scale that no part of the library reads is told: it may mean that the
   layer is computed wrongly. Companions of a weight that is not there were told when the folder was opened. */
static int moqi_verify_rule(moqi_verify *v, const moq_tensor *t)
{
    const char *last = t->name;
    moq_error e;
    for (size_t i = 0; i < MOQI_COUNT(moqi_scale_kinds); i++)
        if (moqi_ends(t->name, moqi_scale_kinds[i].ending)) return moqi_scale_kinds[i].rule;
    for (const char *s = t->name; *s; s++)
        if (*s == '.') last = s + 1;
    if (strstr(last, "_scale") || strcmp(last, "scale") == 0) {
        moqi_fail(&e, MOQ_E_MISMATCH, moqi_at(v->ck->shard_names[t->shard], "tensor", t->name, -1), "it is named like a scale, but nothing reads it");
        moqi_report(v, 0, &e);
    }
    return v->flags & MOQ_VERIFY_DEEP && (moqi_is_float(t->dtype) || t->dtype == MOQ_F64 || t->dtype == MOQ_F8_E4M3 || t->dtype == MOQ_F8_E5M2) ? MOQI_PLAIN : -1;
}

/* U8 under the name of a scale is E8M0: a power of two with 255 for NaN, neither zero nor negative. */
static moq_result moqi_verify_tensor(moqi_verify *v, const moq_tensor *t, moq_error *err)
{
    moqi_scan s;
    int rule = moqi_verify_rule(v, t);
    moq_dtype dtype = t->dtype == MOQ_U8 ? MOQ_F8_E8M0 : t->dtype; /* scales stored as U8 are E8M0 */
    if (rule < 0 || t->bytes == 0) return MOQ_OK;
    moq_result r = moqi_scan_values(v, t, dtype, &s, err);
    if (r != MOQ_OK) return r;
    if (dtype == MOQ_F8_E8M0) s.count[3] = 0; /* the format has no zero; 2^-127 may be flushed to it */
    moqi_verify_scan(v, t, rule, &s);
    return MOQ_OK;
}

/* A block scale times the global scale must stay in the range of F32, else whole blocks become infinite. E4M3 scales end at 448, so their
   bytes need no look unless the global scale is huge. */
static void moqi_verify_product(moqi_verify *v, const moqi_module *m)
{
    moq_linear w;
    moq_error e;
    float value, largest = 0, global = 0;
    if (moqi_bind_linear(&v->ck->set, &v->ck->quant, m, &w, &e) != MOQ_OK) { moqi_report(v, 1, &e); return; }
    if (!w.scheme.weight.has_global || !w.scales.data) return;
    for (uint64_t i = 0; i < w.expert_global.count; i++) {
        moq_to_f32(w.expert_global.dtype, (const uint8_t *)w.expert_global.data + 4 * i, 1, &value);
        if (moqi_is_finite(value) && value > global) global = value;
    }
    double factor = (w.expert_global.count ? (double)global : (double)w.global_mul) / (double)w.global_div;
    if (w.scales.dtype == MOQ_F8_E4M3 && 448 * factor < 3.4028235e38) return; /* no code is larger than 448 */
    for (uint64_t i = 0, step = (uint64_t)moq_dtype_bits(w.scales.dtype) / 8; i < w.scales.count; i++) {
        moq_to_f32(w.scales.dtype, (const uint8_t *)w.scales.data + i * step, 1, &value);
        if (moqi_is_finite(value) && value > largest) largest = value;
    }
    if ((double)largest * factor < 3.4028235677973366e38) return;
    moqi_fail(&e, MOQ_E_SCALE, moqi_at(v->ck->name, "tensor", w.tensor, -1),
              "its largest block scale %g times the global scale %g is beyond F32. Export the layer again",
              (double)largest, factor);
    moqi_report(v, 1, &e);
}

/* Three passes: what opening noted, every tensor by name, every layer's scales together. The order is fixed, so the first fatal
   finding is the same every time. */
MOQ_API moq_result moq_verify(const moq_checkpoint *ck, uint32_t flags, moq_finding_fn found, void *user, moq_error *err)
{
    moqi_verify v;
    moq_result r = MOQ_OK;
    memset(&v, 0, sizeof v);
    moqi_clear(err);
    if (!ck) return moq_fail(err, MOQ_E_ARG, "moq_verify", "ck is NULL");
    v.ck = ck;
    v.found = found;
    v.user = user;
    v.flags = flags;
    for (const moqi_note *n = ck->notes; n; n = n->next) {
        moq_error e;
        moqi_clear(&e);
        e.code = n->code;
        moqi_format(e.text, sizeof e.text, "%s", n->text);
        moqi_report(&v, 0, &e);
    }
    for (size_t i = 0; i < ck->count && r == MOQ_OK; i++) {
        r = moqi_ck_progress(ck, MOQ_STAGE_VERIFY, v.done, ck->info.total_bytes, err);
        if (r == MOQ_OK) r = moqi_verify_tensor(&v, &ck->tensors[i], err);
        v.done += ck->tensors[i].bytes;
    }
    for (size_t i = 0; i < ck->module_count && r == MOQ_OK; i++) moqi_verify_product(&v, &ck->modules[i]);
    if (r == MOQ_OK) r = moqi_ck_progress(ck, MOQ_STAGE_VERIFY, v.done, ck->info.total_bytes, err);
    if (r != MOQ_OK || v.first.code == MOQ_OK) return r;
    if (err) *err = v.first;
    return v.first.code;
}

MOQI_COLD_END

/* ------------------------------------------------------------------------------------------------
   >>layout          where a code lies; slices of layers; the tiling of block scales
   Pure functions over moq_linear: no memory, no errors but the checks of slices. The only place that walks packed codes.
   ------------------------------------------------------------------------------------------------ */

/* A slice is arithmetic on row_first, row_step and col_first: nothing that is stored moves. Errors leave `out` alone. */
static moq_result moqi_bad_slice(const moq_linear *w, const char *what, int64_t first, int64_t count, int64_t limit, moq_error *err)
{
    return moqi_fail(err, MOQ_E_ARG, moqi_at(NULL, "layer", w->name, -1), "%s [%lld, +%lld) of %lld", what, (long long)first, (long long)count, (long long)limit);
}

MOQ_API moq_result moq_slice_rows(const moq_linear *in, int64_t first, int64_t count, int64_t step, moq_linear *out, moq_error *err)
{
    moqi_clear(err);
    if (!in || !out) return moq_fail(err, MOQ_E_ARG, "moq_slice_rows", "in or out is NULL");
    if (first < 0 || count <= 0 || step <= 0 || first >= in->rows || (count - 1) > (in->rows - 1 - first) / step)
        return moqi_bad_slice(in, "rows", first, count, in->rows, err);
    int64_t begin = in->row_first + first * in->row_step;
    *out = *in;
    out->row_first = begin;
    out->row_step = in->row_step * step;
    out->rows = count;
    return MOQ_OK;
}

/* Make *unit a multiple of n too; `why` names the largest of the parts. */
static void moqi_join_unit(int64_t *unit, int64_t n, int64_t *largest, const char *name, const char **why)
{
    int64_t a = *unit, b = n;
    if (n <= 1) return;
    while (b != 0) { int64_t rest = a % b; a = b; b = rest; } /* greatest common divisor */
    *unit *= n / a;
    if (n > *largest) { *largest = n; *why = name; }
}

/* Columns that cannot be cut apart: what shares a word, a scale, an input scale or a rotated block. Act order has no groups of
   neighbours, so only its words count. */
static int64_t moqi_col_unit(const moq_linear *w, const char **why)
{
    const moq_packing *p = &w->packing;
    int64_t word = 1, unit = 1, largest = 0;
    *why = "a column";
    if (!p->along_rows && p->bits > 0 && p->bits < p->word_bits) { /* the smallest count of codes that fills whole words */
        int straddles = p->word_bits % p->bits != 0 && !p->padded; /* 3, 5, 6, 7 bits */
        word = straddles ? p->word_bits : p->word_bits / p->bits;
    }
    moqi_join_unit(&unit, word, &largest, "a word of codes", why);
    if (!w->group_index.data) moqi_join_unit(&unit, w->scheme.weight.group_cols, &largest, "a group of the weight", why);
    moqi_join_unit(&unit, w->scheme.input.group_cols, &largest, "a group of the input", why);
    moqi_join_unit(&unit, w->hadamard_size, &largest, "a rotated block of the input", why);
    return unit;
}

MOQ_API moq_result moq_slice_cols(const moq_linear *in, int64_t first, int64_t count, moq_linear *out, moq_error *err)
{
    const char *why;
    moqi_clear(err);
    if (!in || !out) return moq_fail(err, MOQ_E_ARG, "moq_slice_cols", "in or out is NULL");
    if (first < 0 || count <= 0 || first > in->cols || count > in->cols - first) return moqi_bad_slice(in, "columns", first, count, in->cols, err);
    int64_t unit = moqi_col_unit(in, &why), begin = in->col_first + first, end = begin + count;
    if (begin % unit != 0 || (end % unit != 0 && first + count != in->cols))
        return moqi_fail(err, MOQ_E_SHAPE, moqi_at(NULL, "layer", in->name, -1), "columns [%lld, +%lld) cut through %s: expected multiples of %lld",
                         (long long)first, (long long)count, why, (long long)unit);
    *out = *in;
    out->col_first = begin;
    out->cols = count;
    return MOQ_OK;
}

/* One of `experts` equal parts of a view. */
static moq_view moqi_view_part(moq_view v, int64_t stride, int32_t experts, int32_t expert)
{
    if (v.data && stride > 0) {
        v.data = (const uint8_t *)v.data + stride * expert;
        v.count /= (uint64_t)experts;
    }
    return v;
}

MOQ_API moq_result moq_slice_expert(const moq_linear *in, int32_t expert, moq_linear *out, moq_error *err)
{
    moqi_clear(err);
    if (!in || !out) return moq_fail(err, MOQ_E_ARG, "moq_slice_expert", "in or out is NULL");
    if (in->experts <= 0) return moqi_fail(err, MOQ_E_ARG, moqi_at(NULL, "layer", in->name, -1), "is no stack of experts");
    if (expert < 0 || expert >= in->experts) return moqi_bad_slice(in, "experts", expert, 1, in->experts, err);
    int32_t n = in->experts;
    float v;
    *out = *in;
    out->experts = 0;
    out->codes = moqi_view_part(in->codes, in->expert_codes, n, expert);
    out->scales = moqi_view_part(in->scales, in->expert_scales, n, expert);
    out->bias = moqi_view_part(in->bias, in->expert_bias, n, expert);
    if (out->expert_global.data) {
        moq_to_f32(MOQ_F32, (const uint8_t *)out->expert_global.data + 4 * (int64_t)expert, 1, &v);
        out->global_mul *= v; /* 1 until now: the product stays exact */
        memset(&out->expert_global, 0, sizeof out->expert_global);
    }
    if (out->expert_input.data) {
        moq_to_f32(MOQ_F32, (const uint8_t *)out->expert_input.data + 4 * (int64_t)expert, 1, &out->input_scale);
        memset(&out->expert_input, 0, sizeof out->expert_input);
    }
    out->expert_codes = out->expert_scales = out->expert_bias = 0;
    return MOQ_OK;
}

/* ---- codes ---- */

static uint32_t moqi_load_word(const uint8_t *p, int word_bits)
{
    return word_bits == 8 ? p[0] : word_bits == 16 ? moqi_get_u16(p) : moqi_get_u32(p);
}

/* Which slot of a word holds neighbour n in AutoAWQ's order. */
static const uint8_t moqi_awq_slot[8] = {0, 4, 1, 5, 2, 6, 3, 7};

/* Where neighbour n of a line of codes lies: the word and its lowest bit. */
static void moqi_place(const moq_packing *p, int64_t n, int64_t *word, int *bit)
{
    int64_t per = p->word_bits / p->bits;
    if (p->padded || p->awq_order) {
        int64_t slot = n % per;
        *word = n / per;
        *bit = p->bits * (int)(p->awq_order ? moqi_awq_slot[slot & 7] : slot);
    } else {
        *word = n * p->bits / p->word_bits;
        *bit = (int)(n * p->bits % p->word_bits);
    }
}

/* The code at stored coordinates, sign-extended when it is two's complement and `is_signed`. */
static int32_t moqi_code_at(const void *data, const moq_packing *p, int is_signed, int64_t row, int64_t col)
{
    const uint8_t *base = (const uint8_t *)data;
    int64_t word, step = p->along_rows ? p->row_stride : p->col_stride;
    int bit;
    moqi_place(p, p->along_rows ? row : col, &word, &bit);
    int64_t at = word * step + (p->along_rows ? col * p->col_stride : row * p->row_stride);
    uint64_t v = moqi_load_word(base + at * (p->word_bits / 8), p->word_bits) >> bit;
    if (bit + p->bits > p->word_bits) v |= (uint64_t)moqi_load_word(base + (at + step) * (p->word_bits / 8), p->word_bits) << (p->word_bits - bit);
    int32_t code = (int32_t)(v & (((uint64_t)1 << p->bits) - 1)), sign = (int32_t)1 << (p->bits - 1);
    return is_signed ? (code ^ sign) - sign : code;
}

static int moqi_signed_codes(const moq_linear *w)
{
    moq_dtype e = w->scheme.weight.elem;
    return !w->packing.is_unsigned && e != MOQ_F4 && e != MOQ_F8_E4M3 && e != MOQ_F6_E2M3 && e != MOQ_F6_E3M2;
}

/* Codes along columns in whole bytes: 8 bits, or pairs of nibbles. p: the byte of column 0; step: bytes to the next byte of the row. */
static void moqi_get_bytes(const uint8_t *p, int64_t step, int bits, int is_signed, int64_t col, int64_t count, int16_t *codes)
{
    if (bits == 8) {
        p += col * step;
        if (is_signed) for (int64_t i = 0; i < count; i++) codes[i] = (int16_t)(int8_t)p[i * step];
        else for (int64_t i = 0; i < count; i++) codes[i] = p[i * step];
        return;
    }
    int flip = is_signed ? 8 : 0;
    int64_t i = 0;
    if ((col & 1) && count > 0) codes[i++] = (int16_t)(((p[(col >> 1) * step] >> 4) ^ flip) - flip);
    p += ((col + i) >> 1) * step;
    for (; i + 2 <= count; i += 2, p += step) {
        codes[i] = (int16_t)(((*p & 15) ^ flip) - flip);
        codes[i + 1] = (int16_t)(((*p >> 4) ^ flip) - flip);
    }
    if (i < count) codes[i] = (int16_t)(((*p & 15) ^ flip) - flip);
}

/* Codes of one row that all lie in the same bits of their words: packed along rows, not straddling. */
static void moqi_get_slot(const moq_linear *w, int is_signed, int64_t word, int bit, int64_t col, int64_t count, int16_t *codes)
{
    const moq_packing *p = &w->packing;
    int bytes = p->word_bits / 8, byte = bit / 8, shift = bit % 8;
    int32_t mask = ((int32_t)1 << p->bits) - 1, sign = is_signed ? (int32_t)1 << (p->bits - 1) : 0;
    const uint8_t *at = (const uint8_t *)w->codes.data + (word * p->row_stride + col * p->col_stride) * bytes;
    if (shift + p->bits <= 8) { /* little-endian words: the code lies in one byte */
        at += byte;
        for (int64_t i = 0; i < count; i++) codes[i] = (int16_t)(((at[i * p->col_stride * bytes] >> shift & mask) ^ sign) - sign);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        int32_t v = (int32_t)(moqi_load_word(at + i * p->col_stride * bytes, p->word_bits) >> bit) & mask;
        codes[i] = (int16_t)((v ^ sign) - sign);
    }
}

MOQ_API void moq_get_codes(const moq_linear *w, int64_t row, int64_t col, int64_t count, int16_t *codes)
{
    if (!w || !codes) return;
    const moq_packing *p = &w->packing;
    int is_signed = moqi_signed_codes(w), bit;
    int64_t r = w->row_first + row * w->row_step, c = w->col_first + col, word;
    if (!p->along_rows && (p->bits == 8 || p->bits == 4) && !p->awq_order && (p->word_bits == 8 || p->col_stride == 1)) {
        const uint8_t *line = (const uint8_t *)w->codes.data + r * p->row_stride * (p->word_bits / 8); /* a stream of bytes */
        moqi_get_bytes(line, p->col_stride, p->bits, is_signed, c, count, codes);
        return;
    }
    if (p->along_rows) {
        moqi_place(p, r, &word, &bit);
        if (bit + p->bits <= p->word_bits) {
            moqi_get_slot(w, is_signed, word, bit, c, count, codes);
            return;
        }
    }
    for (int64_t i = 0; i < count; i++) codes[i] = (int16_t)moqi_code_at(w->codes.data, p, is_signed, r, c + i);
}

/* ---- scales and zero points, in coordinates of the layer ---- */

/* Element `index` of a view as F32. */
MOQI_UNUSED static float moqi_view_f32(const moq_view *v, uint64_t index)
{
    float f = 0;
    const uint8_t *p = (const uint8_t *)v->data + index * (uint64_t)(moq_dtype_bits(v->dtype) / 8);
    if (v->dtype == MOQ_F8_E4M3) return moq_e4m3_decode(*p);
    if (v->dtype == MOQ_F8_E8M0) return moq_e8m0_decode(*p);
    moq_to_f32(v->dtype, p, 1, &f);
    return f;
}

/* The group that a column of the layer belongs to. */
MOQI_UNUSED static int64_t moqi_group_of(const moq_linear *w, int64_t col)
{
    int64_t c = w->col_first + col;
    if (w->group_index.data) return (int32_t)moqi_load_u32((const uint8_t *)w->group_index.data + 4 * c);
    return w->scheme.weight.group_cols > 0 ? c / w->scheme.weight.group_cols : 0;
}

/* Scale of a row of the layer in a group that moqi_group_of returned; 1 when there are no scales. */
MOQI_UNUSED static double moqi_scale_at(const moq_linear *w, int64_t row, int64_t group)
{
    int64_t r = w->row_first + row * w->row_step, g = w->scheme.weight.group_rows;
    if (!w->scales.data) return 1;
    int64_t at = (g > 0 ? r / g : 0) * w->scale_row_stride + group * w->scale_col_stride;
    return (double)moqi_view_f32(&w->scales, (uint64_t)at);
}

MOQI_UNUSED static int32_t moqi_zero_at(const moq_linear *w, int64_t row, int64_t group)
{
    if (!w->zeros.data) return w->zero_add;
    return moqi_code_at(w->zeros.data, &w->zero_packing, !w->zero_packing.is_unsigned, w->row_first + row * w->row_step, group) + w->zero_add;
}

/* ---- the 128x4 tiling ----
   Tiles of 128 rows x 4 groups, 512 bytes each, a row of tiles after the other; within a tile the rows m, m + 32, m + 64, m + 96
   stand side by side: ((m / 128) * (groups / 4) + j / 4) * 512 + (m % 32) * 16 + (m / 32 % 4) * 4 + j % 4. */

MOQ_API size_t moq_swizzle_128x4(int64_t row, int64_t group, int64_t groups)
{
    int64_t tile = row / 128 * moqi_ceil_div(groups, 4) + group / 4;
    return (size_t)(tile * 512 + row % 32 * 16 + row / 32 % 4 * 4 + group % 4);
}

MOQ_API size_t moq_swizzle_128x4_bytes(int64_t rows, int64_t groups)
{
    return (size_t)(moqi_ceil_div(rows, 128) * moqi_ceil_div(groups, 4) * 512);
}

/* ------------------------------------------------------------------------------------------------
   >>cpu             reference kernels in plain C
   Plain functions over float arrays: no table, no threads, no memory of their own. They define what every faster path must give.
   ------------------------------------------------------------------------------------------------ */

/* ---- weights as F32 ---- */

/* The number that each code of up to 8 bits stands for, by its low byte: sign-extended codes of fewer bits stay distinct there.
   Double holds every one of them exactly, and the sign of zero too. values: [256]. */
static void moqi_code_values(const moq_linear *w, double values[256])
{
    int is_signed = moqi_signed_codes(w);
    for (int i = 0; i < 256; i++) {
        uint8_t c = (uint8_t)i;
        switch (w->scheme.weight.elem) {
        case MOQ_F4: values[i] = (double)moq_e2m1_decode(c & 15); break;
        case MOQ_F8_E4M3: values[i] = (double)moq_e4m3_decode(c); break;
        case MOQ_F6_E2M3: values[i] = (double)moq_e2m3_decode(c & 63); break;
        case MOQ_F6_E3M2: values[i] = (double)moq_e3m2_decode(c & 63); break;
        default: values[i] = is_signed ? (double)(int8_t)c : (double)c; break;
        }
    }
}

/* n weights of one group: products of at most 8 + 24 + 4 significant bits are exact in double, so only the last step rounds.
   A quotient rounds in double too, but lies too far from a tie of F32 for that to matter: code and divisor have 28 bits. */
static void moqi_scale_codes(const double *values, const int16_t *codes, int64_t n, double zero, double scale, double divisor, float *out)
{
    if (divisor != 1)
        for (int64_t i = 0; i < n; i++) out[i] = (float)((values[(uint8_t)codes[i]] - zero) * scale / divisor);
    else if (zero != 0)
        for (int64_t i = 0; i < n; i++) out[i] = (float)((values[(uint8_t)codes[i]] - zero) * scale);
    else
        for (int64_t i = 0; i < n; i++) out[i] = (float)(values[(uint8_t)codes[i]] * scale);
}

/* One row of a quantized layer: out[c] = (code - zero) * scale * global_mul / global_div. Codes are fetched in pieces that fit the
   cache; the scale is looked up once for each group, and again only where act order jumps between groups. out: [cols]. */
static void moqi_dequantize_row(const moq_linear *w, const double *values, int64_t row, float *out)
{
    int16_t codes[512];
    int32_t g = w->scheme.weight.group_cols;
    double scale = 0, zero = 0;
    int64_t group = -1;
    for (int64_t at = 0; at < w->cols; at += (int64_t)MOQI_COUNT(codes)) {
        int64_t n = moqi_min(w->cols - at, (int64_t)MOQI_COUNT(codes));
        moq_get_codes(w, row, at, n, codes);
        for (int64_t i = 0, run; i < n; i += run) {
            int64_t now = moqi_group_of(w, at + i);
            run = w->group_index.data ? 1 : g > 0 ? moqi_min(n - i, g - (w->col_first + at + i) % g) : n - i;
            if (now != group) {
                group = now;
                scale = moqi_scale_at(w, row, group) * (double)w->global_mul;
                zero = (double)moqi_zero_at(w, row, group);
            }
            moqi_scale_codes(values, codes + i, run, zero, scale, (double)w->global_div, out + at + i);
        }
    }
}

/* One row of a layer that is stored as floats; parameters of fused experts have their rows as stored columns. out: [cols]. */
static void moqi_convert_row(const moq_linear *w, int64_t row, float *out)
{
    int64_t bytes = w->packing.word_bits / 8, step = w->packing.col_stride * bytes;
    const uint8_t *p = (const uint8_t *)w->codes.data + (w->row_first + row * w->row_step) * w->packing.row_stride * bytes + w->col_first * step;
    if (step == bytes) {
        moq_to_f32(w->codes.dtype, p, (size_t)w->cols, out);
        return;
    }
    for (int64_t i = 0; i < w->cols; i++) moq_to_f32(w->codes.dtype, p + i * step, 1, out + i);
}

/* Rows of a stack count through all experts: row r is row r % rows of expert r / rows. */
MOQ_API void moq_dequantize(const moq_linear *w, int64_t first, int64_t count, float *out)
{
    double values[256];
    if (!w || !out) return;
    moq_linear one = *w;
    int32_t expert = -1;
    if (w->packing.bits <= 8) moqi_code_values(w, values);
    for (int64_t i = 0; i < count; i++) {
        int64_t row = first + i;
        if (w->experts > 0) {
            if (row / w->rows != expert) {
                expert = (int32_t)(row / w->rows);
                if (moq_slice_expert(w, expert, &one, NULL) < 0) return;
            }
            row %= w->rows;
        }
        if (w->packing.bits <= 8) moqi_dequantize_row(&one, values, row, out + i * w->cols);
        else moqi_convert_row(&one, row, out + i * w->cols);
    }
}

/* ---- rounding of inputs: what ModelOpt, compressed-tensors and DeepSeek do to one token ----
   The order in front of a product is x -> rotation -> * pre_quant_scale -> rounding; this part is the rounding only.
       static              s = input_scale                                   FP8, INT8 of ModelOpt and compressed-tensors
       dynamic             s = amax / largest code, per token or group       FP8 per token, FP8 groups of 128, INT8 per token
       two-level           s = e4m3(min(amax / (6 global), 448)) * global    NVFP4: global = input_scale, blocks of 16
       E8M0                s = a power of two                                MXFP4, MXFP8: two rules, see moqi_e8m0_scale
   and then x becomes code(x / s) * s. All of it in F32 with true divisions. */

/* The largest code of an element type that inputs are rounded to; 0 for any other type. */
static float moqi_largest(moq_dtype elem)
{
    switch ((int)elem) {
    case MOQ_F4: return 6;
    case MOQ_F8_E4M3: return 448;
    case MOQ_F8_E5M2: return 57344;
    case MOQ_F6_E2M3: return 7.5f;
    case MOQ_F6_E3M2: return 28;
    case MOQ_I2: case MOQ_I3: case MOQ_I4: case MOQ_I5: case MOQ_I6: case MOQ_I7: case MOQ_I8:
        return (float)((1 << (moq_dtype_bits(elem) - 1)) - 1);
    default: return 0;
    }
}

/* The nearest code, ties to even, saturating; NaN stays NaN so that a broken activation is not hidden. `zero` moves the window of
   integer codes: clamp(rne(v) + zero) - zero. */
static float moqi_round_code(moq_dtype elem, float v, float zero)
{
    if (moqi_is_nan(v)) return v;
    if (elem == MOQ_F4) return moq_e2m1_decode(moq_e2m1_encode(v));
    if (elem == MOQ_F8_E4M3) return moq_e4m3_decode(moq_e4m3_encode(v));
    if (elem == MOQ_F8_E5M2) return moq_e5m2_decode(moq_e5m2_encode(v));
    if (elem == MOQ_F6_E2M3) return moq_e2m3_decode(moq_e2m3_encode(v));
    if (elem == MOQ_F6_E3M2) return moq_e3m2_decode(moq_e3m2_encode(v));
    float top = moqi_largest(elem), q = rintf(v) + zero;
    return (q < -top - 1 ? -top - 1 : q > top ? top : q) - zero;
}

/* E8M0 scale of a block. ModelOpt: 2^ceil(log2(amax / largest)), found exactly by comparing mantissas. compressed-tensors: amax is
   rounded up where its mantissa is 1.75 or more, then 2^(floor(log2 amax) - exponent of the largest code). */
static float moqi_e8m0_scale(int rule, float largest, float amax)
{
    int top, e;
    float top_mantissa = frexpf(largest, &top);
    if (rule == MOQ_RULE_E8M0_ROUND) {
        e = (int)((moqi_f32_bits(amax) + (1u << 21)) >> 23) - 127 - (top - 1);
    } else {
        float mantissa = frexpf(amax, &e);
        e = amax > 0 ? e - top + (mantissa > top_mantissa) : -127;
    }
    return ldexpf(1.0f, e < -127 ? -127 : e > 127 ? 127 : e);
}

/* Largest magnitude of n values; NaN is passed over, so one broken value does not erase the scale of its block. */
static float moqi_amax(const float *x, int64_t n)
{
    float amax = 0;
    for (int64_t i = 0; i < n; i++) {
        float a = fabsf(x[i]);
        if (a > amax) amax = a;
    }
    return amax;
}

/* The scale of one group of inputs: two-level for E4M3 block scales (`global` is the calibrated input_scale), a power of two for
   E8M0, else amax / largest. 0 when the group has nothing to scale. */
static float moqi_input_scale(const moq_coding *c, float global, const float *x, int64_t n)
{
    float amax = moqi_amax(x, n), largest = moqi_largest(c->elem);
    if (c->scale == MOQ_F8_E8M0) return moqi_e8m0_scale(c->rule, largest, amax);
    if (c->scale != MOQ_F8_E4M3) return amax / largest;
    float s = amax / (largest * global);
    return moq_e4m3_decode(moq_e4m3_encode(s < 448 ? s : 448)) * global;
}

/* Asymmetric integers, dynamic: s = (max - min) / (2^bits - 1), zero = rne(lowest code - min / s). */
static float moqi_input_range(const moq_coding *c, const float *x, int64_t n, float *zero)
{
    float lo = x[0], hi = x[0], top = moqi_largest(c->elem);
    for (int64_t i = 1; i < n; i++) {
        if (x[i] < lo) lo = x[i];
        if (x[i] > hi) hi = x[i];
    }
    float s = (hi - lo) / (2 * top + 1);
    if (s > 0) *zero = rintf(-top - 1 - lo / s);
    return s;
}

/* Does the layer name a rounding of its inputs that can be carried out? */
static int moqi_rounds_input(const moq_linear *w)
{
    const moq_coding *c = &w->scheme.input;
    if (moqi_largest(c->elem) <= 0) return 0;
    if (c->scale == MOQ_F8_E8M0 || (c->dynamic && c->scale != MOQ_F8_E4M3)) return 1;
    return w->input_scale > 0; /* static, or the global scale of two-level blocks */
}

/* Group by group: find the scale, divide, take the nearest code, multiply. The division is a true one, as in every exporter: a
   product with the reciprocal would move values that lie on an edge. */
MOQ_API void moq_round_input(const moq_linear *w, const float *x, float *out)
{
    if (!w || !x || !out) return;
    const moq_coding *c = &w->scheme.input;
    if (!moqi_rounds_input(w)) {
        if (out != x) memcpy(out, x, (size_t)w->cols * sizeof *out);
        return;
    }
    int fixed = !c->dynamic && c->scale != MOQ_F8_E8M0 && c->scale != MOQ_F8_E4M3;
    int64_t group = c->group_cols > 0 && !fixed ? c->group_cols : w->cols;
    for (int64_t first = 0; first < w->cols; first += group) {
        int64_t n = moqi_min(group, w->cols - first);
        float zero = fixed ? (float)w->input_zero : 0, s = w->input_scale;
        int asymmetric = !fixed && c->zero_point;
        if (asymmetric) s = moqi_input_range(c, x + first, n, &zero);
        else if (!fixed) s = moqi_input_scale(c, w->input_scale, x + first, n);
        for (int64_t i = first; i < first + n; i++) {
            if (s > 0) out[i] = moqi_round_code(c->elem, x[i] / s, zero) * s;
            else out[i] = asymmetric || moqi_is_nan(x[i]) ? x[i] : 0; /* all values equal: the range is one exact code */
        }
    }
}

/* Sylvester's matrix applied to n = 2^k values in place: H[i][j] = (-1)^popcount(i & j). */
static void moqi_sylvester(float *x, int64_t n)
{
    for (int64_t half = 1; half < n; half *= 2)
        for (int64_t i = 0; i < n; i += 2 * half)
            for (int64_t j = i; j < i + half; j++) {
                float a = x[j], b = x[j + half];
                x[j] = a + b;
                x[j + half] = a - b;
            }
}

/* Blocks of the input times H: x [cols] -> out [cols] (not x). h: [size, size] as F32, NULL for Sylvester's. */
static void moqi_rotate_input(const float *h, int64_t size, float factor, const float *x, int64_t cols, float *out)
{
    for (int64_t first = 0; first < cols; first += size) {
        float *y = out + first;
        if (!h) {
            memcpy(y, x + first, (size_t)size * sizeof *y);
            moqi_sylvester(y, size);
        } else {
            memset(y, 0, (size_t)size * sizeof *y);
            for (int64_t i = 0; i < size; i++)
                for (int64_t j = 0; j < size; j++) y[j] += x[first + i] * h[i * size + j];
        }
        for (int64_t j = 0; j < size; j++) y[j] *= factor;
    }
}

/* ---- the inner loops that have vector versions ----
   Decoding is split in two steps, codes to numbers and numbers times scales, because every format is some expansion followed by the
   same scaling: seven element types and five scale types need no loop of their own for each pair. Both run on 2 KB that stay in the
   first-level cache, so the second pass costs a load and a store and no memory traffic. */

/* One instruction set. The order of a sum depends on n alone, so a row of `tile` is the same in every batch. */
typedef struct moqi_kernels {
    const char *name;
    /* n stored values of a dtype of 8 or more bits, any alignment, as F32 */
    void (*expand)(moq_dtype dtype, const uint8_t *src, int64_t n, float *dst);
    /* n 4-bit codes, low nibble first, through a table of 16 values */
    void (*nibbles)(const uint8_t *src, int64_t n, const float *table, float *dst);
    /* w[i] = (w[i] - zero[i >> shift]) * s[i >> shift]; zero may be NULL; shift >= 4 */
    void (*scale)(float *w, int64_t n, int shift, const float *s, const float *zero);
    /* y[j][r] += dot(w[r], x[j]) for r < rows <= 4 and j < m; w: [4, ldw], x: [m, ldx], n a multiple of 16 */
    void (*tile)(const float *w, int64_t ldw, int rows, const float *x, int64_t ldx, int64_t m, int64_t n, float *y, int64_t ldy);
    float (*dot)(const float *a, const float *b, int64_t n);
    void (*axpy)(float a, const float *x, float *y, int64_t n); /* y += a x */
    const struct moqi_way *const *ways; /* products without tiles, the preferred first, NULL at the end; or NULL */
} moqi_kernels;

/* The plain loops are the definition: products in F32, added in the order of the columns. */
static void moqi_plain_expand(moq_dtype dtype, const uint8_t *src, int64_t n, float *dst)
{
    moq_to_f32(dtype, src, (size_t)n, dst);
}

/* Byte i / 2 holds elements i (low nibble) and i + 1 (high nibble) in every format that keeps pairs along columns. */
static void moqi_plain_nibbles(const uint8_t *src, int64_t n, const float *table, float *dst)
{
    for (int64_t i = 0; i < n; i++) dst[i] = table[(unsigned)src[i / 2] >> (4 * (i & 1)) & 15];
}

/* The zero point is taken off before the product: code - zero is exact, and a weight equal to its zero point stays exactly 0. */
static void moqi_plain_scale(float *w, int64_t n, int shift, const float *s, const float *zero)
{
    for (int64_t i = 0; i < n; i++) w[i] = (zero ? w[i] - zero[i >> shift] : w[i]) * s[i >> shift];
}

/* Sums of 16 columns, then the sum of those: the rounding error of n products is that of 16 + n / 16. Four rows side by side give four
   independent sums, which is all the speed that a compiler can find here. */
static void moqi_plain_tile(const float *w, int64_t ldw, int rows, const float *x, int64_t ldx, int64_t m, int64_t n, float *y, int64_t ldy)
{
    for (int64_t j = 0; j < m; j++) {
        float sum[4] = {0, 0, 0, 0};
        for (int64_t i = 0; i < n; i += 16) {
            float run[4] = {0, 0, 0, 0};
            for (int64_t c = i; c < i + 16; c++)
                for (int r = 0; r < 4; r++) run[r] += w[r * ldw + c] * x[j * ldx + c];
            for (int r = 0; r < 4; r++) sum[r] += run[r];
        }
        for (int r = 0; r < rows; r++) y[j * ldy + r] += sum[r];
    }
}

static float moqi_plain_dot(const float *a, const float *b, int64_t n)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void moqi_plain_axpy(float a, const float *x, float *y, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] += a * x[i];
}

/* "reference" always decodes through moq_dequantize, whole rows at a time; "plain" decodes by tiles like the vector versions. */
static const moqi_kernels moqi_reference_kernels = {"reference", moqi_plain_expand, moqi_plain_nibbles, moqi_plain_scale,
                                                    moqi_plain_tile, moqi_plain_dot, moqi_plain_axpy, NULL};
static const moqi_kernels moqi_plain_kernels = {"plain", moqi_plain_expand, moqi_plain_nibbles, moqi_plain_scale,
                                                moqi_plain_tile, moqi_plain_dot, moqi_plain_axpy, NULL};

/* ---- keys and values: one row of n numbers in its cache format ---- */

/* Bytes of one row of n values: FP4 rows are n/2 bytes of codes followed by one scale byte for every block, 0.5625 n for NVFP4. */
static size_t moqi_kv_row_bytes(moq_kv_format format, int64_t n)
{
    if (format == MOQ_KV_WIDE) return (size_t)n * 4;
    if (format == MOQ_KV_FP8 || format == MOQ_KV_FP8_AFFINE || format == MOQ_KV_INT8) return (size_t)n;
    return (size_t)(moqi_ceil_div(n, 2) + moqi_ceil_div(n, format == MOQ_KV_MXFP4 ? 32 : 16)); /* codes, then block scales */
}

/* Block scales as activations get them (runtime-layouts 6.2): NVFP4 rounds amax / (6 global) to E4M3 with `global` = k_scale / 6,
   MXFP4 takes the next power of two. A block whose scale rounds to 0 is stored as zeros.
   x: [n]; row: [(n + 1) / 2 codes][blocks] */
static void moqi_kv_pack_fp4(moq_kv_format format, float global, const float *x, int64_t n, uint8_t *row)
{
    int64_t block = format == MOQ_KV_MXFP4 ? 32 : 16;
    uint8_t *scales = row + moqi_ceil_div(n, 2);
    memset(row, 0, (size_t)moqi_ceil_div(n, 2));
    for (int64_t b = 0; b * block < n; b++) {
        int64_t end = moqi_min(n, (b + 1) * block);
        float amax = moqi_amax(x + b * block, end - b * block), s;
        if (format == MOQ_KV_MXFP4) {
            s = moqi_e8m0_scale(MOQ_RULE_E8M0_CEIL, 6, amax);
            scales[b] = (uint8_t)(ilogbf(s) + 127);
        } else {
            s = amax / (6 * global);
            scales[b] = moq_e4m3_encode(s < 448 ? s : 448);
            s = moq_e4m3_decode(scales[b]) * global;
        }
        for (int64_t i = b * block; i < end; i++)
            row[i / 2] = (uint8_t)(row[i / 2] | (s > 0 ? moq_e2m1_encode(x[i] / s) : 0) << (4 * (i & 1)));
    }
}

/* NVFP4's global scale is k_scale / 6: k_scale is amax / 448, block scales reach 448. bias: FP8_AFFINE only. */
static void moqi_kv_pack(moq_kv_format format, float scale, const float *bias, const float *x, int64_t n, uint8_t *row)
{
    switch ((int)format) {
    case MOQ_KV_WIDE: memcpy(row, x, (size_t)n * 4); break;
    case MOQ_KV_FP8: for (int64_t i = 0; i < n; i++) row[i] = moq_e4m3_encode(x[i] / scale); break;
    case MOQ_KV_FP8_AFFINE: for (int64_t i = 0; i < n; i++) row[i] = moq_e4m3_encode((x[i] - (bias ? bias[i] : 0)) / scale); break;
    case MOQ_KV_INT8:
        for (int64_t i = 0; i < n; i++) {
            float q = x[i] / scale;
            row[i] = (uint8_t)(moqi_is_nan(q) ? 0 : (int)moqi_round_code(MOQ_I8, q, 0));
        }
        break;
    default: moqi_kv_pack_fp4(format, scale / 6, x, n, row); break;
    }
}

/* E2M1 by its four bits; code 8 is minus zero. */
static const float moqi_e2m1_table[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

/* The inverse of moqi_kv_pack: row -> out [n]. The scale is applied after the codes are expanded, and a bias last. */
static void moqi_kv_unpack(const moqi_kernels *k, moq_kv_format format, float scale, const float *bias, const uint8_t *row, int64_t n, float *out)
{
    int64_t block = format == MOQ_KV_MXFP4 ? 32 : 16;
    if (format == MOQ_KV_WIDE) { memcpy(out, row, (size_t)n * 4); return; }
    if (format == MOQ_KV_FP8 || format == MOQ_KV_FP8_AFFINE || format == MOQ_KV_INT8) {
        k->expand(format == MOQ_KV_INT8 ? MOQ_I8 : MOQ_F8_E4M3, row, n, out);
        for (int64_t i = 0; i < n; i++) out[i] *= scale;
        for (int64_t i = 0; format == MOQ_KV_FP8_AFFINE && bias && i < n; i++) out[i] += bias[i];
        return;
    }
    k->nibbles(row, n, moqi_e2m1_table, out);
    for (int64_t b = 0; b * block < n; b++) {
        uint8_t code = row[moqi_ceil_div(n, 2) + b];
        float s = format == MOQ_KV_MXFP4 ? moq_e8m0_decode(code) : moq_e4m3_decode(code) * (scale / 6);
        for (int64_t i = b * block; i < moqi_min(n, (b + 1) * block); i++) out[i] *= s;
    }
}

/* Packing and unpacking is the rounding, so a cache holds exactly what this function says. */
MOQ_API void moq_round_kv(moq_kv_format format, float scale, const float *bias, const float *x, int n, float *out)
{
    uint8_t row[128]; /* 32 values: every block scale belongs to one slice */
    if (!x || !out || n <= 0) return;
    int rotate = format == MOQ_KV_NVFP4_ROTATE && (n & (n - 1)) == 0;
    float norm = 1 / sqrtf((float)n);
    if (out != x) memmove(out, x, (size_t)n * sizeof *out);
    for (int turn = 0; turn <= rotate; turn++) { /* rotated keys come back rotated once more: H H = n */
        if (rotate) moqi_sylvester(out, n);
        for (int i = 0; rotate && i < n; i++) out[i] *= norm;
        for (int first = 0; turn == 0 && first < n; first += 32) {
            int count = n - first < 32 ? n - first : 32;
            moqi_kv_pack(format, scale, bias ? bias + first : NULL, out + first, count, row);
            moqi_kv_unpack(&moqi_plain_kernels, format, scale, bias ? bias + first : NULL, row, count, out + first);
        }
    }
}

/* ---- attention ----
   For each query: scores = scale * q . k over the positions it may see, softmax, weighted sum of the values. Keys and values are unpacked
   32 positions at a time and shared by up to 8 rows and 16 query heads; the softmax is a running one, so no buffer grows with the
   length of the sequence:
       m' = max(m, scores of the block)      l' = l e^(m - m') + sum e^(score - m')      y' = y e^(m - m') + sum e^(score - m') v
   and at the end y / l. A sink is a score without a value: it enters l only, which then begins at 1 with m = sink. */

/* Cache of one layer. Rows lie in the order [slot][kv head][position], keys first, then values. */
typedef struct moqi_cache {
    moq_kv_desc desc;
    int64_t dim[2];           /* of keys, of values */
    size_t row_bytes[2];
    moq_kv_format format[2];  /* only keys are rotated */
    const float *scale[2];    /* [kv_heads] */
    const float *bias[2];     /* [kv_heads, dim] or NULL */
    uint8_t *data[2];
    void *memory;
    size_t bytes;
} moqi_cache;

/* Bytes of one position of one head; which: 0 keys, 1 values. Positions of a head are neighbours: attention reads them in order. */
static uint8_t *moqi_kv_row(const moqi_cache *c, int which, int64_t slot, int64_t head, int64_t pos)
{
    return c->data[which] + (size_t)((slot * c->desc.kv_heads + head) * c->desc.capacity + pos) * c->row_bytes[which];
}

enum { MOQI_ATTEND_ROWS = 8, MOQI_ATTEND_HEADS = 16, MOQI_ATTEND_KEYS = 32 };

/* Floats of scratch that one call of moqi_attend needs: queries, a block of keys, a block of values. */
static int64_t moqi_attend_floats(int64_t head_dim, int64_t value_dim)
{
    return MOQI_ATTEND_ROWS * MOQI_ATTEND_HEADS * head_dim + MOQI_ATTEND_KEYS * (head_dim + value_dim);
}

/* Unpack positions [first, last] of one head as F32 rows of dim values. */
static void moqi_kv_fetch(const moqi_kernels *k, const moqi_cache *c, int which, int64_t slot, int64_t head, int64_t first, int64_t last, float *out)
{
    int64_t dim = c->dim[which];
    const float *bias = c->bias[which] ? c->bias[which] + head * dim : NULL;
    for (int64_t pos = first; pos <= last; pos++)
        moqi_kv_unpack(k, c->format[which], c->scale[which][head], bias, moqi_kv_row(c, which, slot, head, pos), dim, out + (pos - first) * dim);
}

/* Running state of one query: exp(score - max) never overflows, and a later larger score rescales what was summed before. */
typedef struct moqi_softmax { float max, sum; } moqi_softmax; /* of the scores seen so far: sum of exp(score - max) */

/* One query over keys [from, to] of a block: the running softmax is rescaled when a larger score appears. y: [value_dim]. */
static void moqi_attend_block(const moqi_kernels *k, const moq_attention_desc *a, const moqi_cache *c, const float *q, const float *keys,
                              const float *values, int64_t from, int64_t to, moqi_softmax *state, float *y)
{
    float score[MOQI_ATTEND_KEYS], max = state->max;
    for (int64_t j = from; j <= to; j++) {
        score[j] = k->dot(q, keys + j * c->dim[0], c->dim[0]);
        if (a->softcap > 0) score[j] = a->softcap * tanhf(score[j] / a->softcap);
        if (score[j] > max) max = score[j];
    }
    if (max > state->max) {
        float shrink = state->sum > 0 ? expf(state->max - max) : 0;
        state->sum *= shrink;
        for (int64_t i = 0; i < c->dim[1]; i++) y[i] *= shrink;
        state->max = max;
    }
    for (int64_t j = from; j <= to; j++) {
        float p = expf(score[j] - max);
        state->sum += p;
        k->axpy(p, values + j * c->dim[1], y, c->dim[1]);
    }
}

/* Rows [row, row + rows) of a batch, all of one slot, for query heads [head, head + heads) that read one kv head. Blocks of keys begin at
   multiples of their length, so a row's result does not depend on its neighbours. */
static void moqi_attend(const moqi_kernels *k, const moq_batch *b, const moq_attention_desc *a, int64_t row, int64_t rows, int64_t head,
                        int64_t heads, int64_t kv_head, float *scratch)
{
    const moqi_cache *c = (const moqi_cache *)(const void *)a->cache;
    int64_t slot = b->slot[row], dim = c->dim[0], low = b->pos[row], high = 0;
    float *q = scratch, *keys = q + rows * heads * dim, *values = keys + MOQI_ATTEND_KEYS * dim;
    float scale = a->scale != 0 ? a->scale : 1 / sqrtf((float)dim);
    float norm = c->format[0] == MOQ_KV_NVFP4_ROTATE ? scale / sqrtf((float)dim) : scale;
    moqi_softmax state[MOQI_ATTEND_ROWS * MOQI_ATTEND_HEADS];
    for (int64_t i = 0; i < rows * heads; i++) {
        int64_t r = row + i / heads, h = head + i % heads;
        const float *src = (const float *)a->q + r * a->q_stride + h * dim;
        memcpy(q + i * dim, src, (size_t)dim * sizeof *q);
        if (c->format[0] == MOQ_KV_NVFP4_ROTATE) moqi_sylvester(q + i * dim, dim); /* (q H) . (k H) = n q . k */
        for (int64_t d = 0; d < dim; d++) q[i * dim + d] *= norm;
        memset((float *)a->y + r * a->y_stride + h * c->dim[1], 0, (size_t)c->dim[1] * sizeof(float));
        state[i].max = a->sinks ? a->sinks[h] : -3e38f;
        state[i].sum = a->sinks ? 1.0f : 0.0f;
        low = moqi_min(low, a->window > 0 ? moqi_max(0, b->pos[r] - (int64_t)a->window + 1) : 0);
        high = moqi_max(high, b->pos[r]);
    }
    for (int64_t first = low / MOQI_ATTEND_KEYS * MOQI_ATTEND_KEYS; first <= high; first += MOQI_ATTEND_KEYS) {
        int64_t last = moqi_min(high, first + MOQI_ATTEND_KEYS - 1);
        moqi_kv_fetch(k, c, 0, slot, kv_head, first, last, keys);
        moqi_kv_fetch(k, c, 1, slot, kv_head, first, last, values);
        for (int64_t i = 0; i < rows * heads; i++) {
            int64_t r = row + i / heads, h = head + i % heads, pos = b->pos[r];
            int64_t from = moqi_max(first, a->window > 0 ? pos - (int64_t)a->window + 1 : 0), to = moqi_min(last, pos);
            float *y = (float *)a->y + r * a->y_stride + h * c->dim[1];
            if (from <= to) moqi_attend_block(k, a, c, q + i * dim, keys, values, from - first, to - first, &state[i], y);
        }
    }
    for (int64_t i = 0; i < rows * heads; i++) {
        float *y = (float *)a->y + (row + i / heads) * a->y_stride + (head + i % heads) * c->dim[1];
        for (int64_t d = 0; d < c->dim[1]; d++) y[d] /= state[i].sum;
    }
}

/* ---- routing ----
   The variants in use (runtime-layouts 4.4): softmax then top k (Mixtral, Qwen; with renormalization the same as gpt-oss' softmax over
   the chosen), sigmoid, DeepSeek-V2's groups by their largest score, DeepSeek-V3's sigmoid with a correction bias that ranks experts but
   does not weigh them, and groups by the sum of their two best. */

/* p = softmax or sigmoid of logits [experts]. */
static void moqi_router_scores(moq_score score, const float *logits, int32_t experts, float *p)
{
    float max = logits[0], sum = 0;
    for (int32_t e = 1; e < experts; e++) if (logits[e] > max) max = logits[e];
    for (int32_t e = 0; e < experts; e++) {
        p[e] = score == MOQ_SCORE_SIGMOID ? 1 / (1 + expf(-logits[e])) : expf(logits[e] - max);
        sum += p[e];
    }
    for (int32_t e = 0; score == MOQ_SCORE_SOFTMAX && e < experts; e++) p[e] /= sum;
}

/* The best of the still open candidates, the lowest index among equals; it is closed. */
static int32_t moqi_take_best(const float *value, float *open, int32_t n)
{
    int32_t best = -1;
    for (int32_t i = 0; i < n; i++)
        if (open[i] > 0 && (best < 0 || value[i] > value[best])) best = i;
    if (best < 0) return 0;
    open[best] = 0;
    return best;
}

/* Experts of groups that do not compete are closed. A group's score: its largest p (softmax) or the sum of its two largest (sigmoid).
   rank: [experts] p + bias; scratch: [2 * groups]. */
static void moqi_close_groups(const moq_routing *r, const float *p, const float *rank, float *open, float *scratch)
{
    int32_t size = r->experts / r->groups;
    for (int32_t g = 0; g < r->groups; g++) {
        const float *v = (r->score == MOQ_SCORE_SIGMOID ? rank : p) + g * size;
        float first = v[0], second = -3e38f;
        for (int32_t i = 1; i < size; i++) {
            if (v[i] > first) { second = first; first = v[i]; }
            else if (v[i] > second) second = v[i];
        }
        scratch[g] = r->score == MOQ_SCORE_SIGMOID && size > 1 ? first + second : first;
        scratch[r->groups + g] = 1;
    }
    for (int32_t i = 0; i < r->top_groups; i++) moqi_take_best(scratch, scratch + r->groups, r->groups);
    for (int32_t e = 0; e < r->experts; e++) open[e] = scratch[r->groups + e / size] > 0 ? 0.0f : 1.0f;
}

/* Choose top_k experts for one token. bias: [experts] or NULL; scratch: [5 * experts]; index, weight: [top_k]. */
static void moqi_route(const moq_routing *r, const float *bias, const float *logits, float *scratch, int32_t *index, float *weight)
{
    float *p = scratch, *rank = p + r->experts, *open = rank + r->experts, sum = 0;
    moqi_router_scores(r->score, logits, r->experts, p);
    for (int32_t e = 0; e < r->experts; e++) {
        rank[e] = bias ? p[e] + bias[e] : p[e];
        open[e] = 1;
    }
    if (r->groups > 1) moqi_close_groups(r, p, rank, open, open + r->experts);
    for (int32_t i = 0; i < r->top_k; i++) {
        index[i] = moqi_take_best(rank, open, r->experts);
        weight[i] = p[index[i]];
        sum += weight[i];
    }
    float factor = r->scale != 0 ? r->scale : 1;
    if (r->renormalize && sum > 0) factor /= sum;
    for (int32_t i = 0; i < r->top_k; i++) weight[i] *= factor;
}

/* ---- the small operations between layers, one row at a time ---- */

/* g: the gate, u: the other half (runtime-layouts 4.7). alpha multiplies inside the sigmoid, beta is added to u. */
static float moqi_activate(const moq_activation_desc *a, float g, float u)
{
    switch ((int)a->kind) {
    case MOQ_GELU_MUL: return 0.5f * g * (1 + erff(g * 0.70710678f)) * u;
    case MOQ_GELU_TANH_MUL: return 0.5f * g * (1 + tanhf(0.79788456f * (g + 0.044715f * g * g * g))) * u;
    case MOQ_SWIGLU_CLAMP:
        g = g > a->limit ? a->limit : g;
        u = u > a->limit ? a->limit : u < -a->limit ? -a->limit : u;
        return g / (1 + expf(-a->alpha * g)) * (u + a->beta);
    case MOQ_RELU2: return g > 0 ? g * g : g < 0 ? 0 : g * 0;
    default: return g / (1 + expf(-g)) * u;
    }
}

/* x: [gate n | up n], or [n] when not gated -> y [n] */
static void moqi_activate_row(const moq_activation_desc *a, const float *x, int64_t n, float *y)
{
    int64_t up = a->kind == MOQ_RELU2 ? 0 : n;
    for (int64_t i = 0; i < n; i++) y[i] = moqi_activate(a, x[i], x[up + i]);
}

/* y = x / sqrt(mean(x^2) + eps) * weight */
static void moqi_norm_row(const moqi_kernels *k, const float *x, const float *weight, int64_t n, float eps, float *y)
{
    float s = 1 / sqrtf(k->dot(x, x, n) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = weight ? x[i] * s * weight[i] : x[i] * s;
}

/* (a, b) -> (a cos - b sin, b cos + a sin) for the pairs of one head. table: [dims / 2][cos, sin] */
static void moqi_rope_head(float *x, const float *table, int64_t dims, int interleaved)
{
    int64_t half = dims / 2;
    for (int64_t i = 0; i < half; i++) {
        float *a = x + (interleaved ? 2 * i : i), *b = interleaved ? a + 1 : a + half;
        float c = table[2 * i], s = table[2 * i + 1], va = *a, vb = *b;
        *a = va * c - vb * s;
        *b = vb * c + va * s;
    }
}

/* GCC 12 takes the undefined values inside its own AVX-512 headers for ours; clang at -O1 speaks of loops it leaves rolled. */
#if defined(__clang__)
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpass-failed"
#elif defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

/* ------------------------------------------------------------------------------------------------
   >>simd            vector versions of the inner loops, chosen at run time
   With >>stream the only place with intrinsics. Each loop equals its plain version but for the order of a sum; tails run the plain one.
   ------------------------------------------------------------------------------------------------ */

#if !defined(MOQ_NO_SIMD) && defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#define MOQI_X86 1
#include <immintrin.h>
#elif !defined(MOQ_NO_SIMD) && defined(__aarch64__) && defined(__ARM_NEON)
#define MOQI_ARM 1
#include <arm_neon.h>
#endif

/* What each version has to give: expand, nibbles and scale the same bits as the plain loops (they are exact, or round once), tile,
   dot and axpy the same sum in an order of their own. Which instructions exist is asked at run time and every function carries its
   own target, so one binary serves all CPUs of a family and the caller's compiler flags do not matter.
   E4M3 through F16: the same sign, exponent and mantissa fields give value / 256, subnormals included, without subnormal F32
   numbers on the way. Code 0x7f is NaN in E4M3 but finite in F16, so it is put back. */

#ifdef MOQI_X86
#define MOQI_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define MOQI_AVX2 __attribute__((target("avx2,fma,f16c")))

/* ---- AVX-512 ---- */

/* 16 E4M3 bytes: sign to bit 15, exponent and mantissa to bits 7..13 of an F16. */
MOQI_AVX512 static __m512 moqi_e4m3_512(__m128i v)
{
    __m256i w = _mm256_cvtepu8_epi16(v), size = _mm256_and_si256(w, _mm256_set1_epi16(0x7f));
    __m256i h = _mm256_or_si256(_mm256_slli_epi16(size, 7), _mm256_slli_epi16(_mm256_sub_epi16(w, size), 8));
    __mmask16 nan = _mm256_cmpeq_epi16_mask(size, _mm256_set1_epi16(0x7f));
    __m512 f = _mm512_mul_ps(_mm512_cvtph_ps(h), _mm512_set1_ps(256));
    return _mm512_mask_mov_ps(f, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
}

/* 16 E8M0 bytes: the byte is the exponent field; 0 is 2^-127, a subnormal with the top mantissa bit, and 255 is NaN. */
MOQI_AVX512 static __m512 moqi_e8m0_512(__m128i v)
{
    __m512i w = _mm512_cvtepu8_epi32(v), bits = _mm512_slli_epi32(w, 23);
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(w, _mm512_setzero_si512()), _mm512_set1_epi32(0x00400000));
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(w, _mm512_set1_epi32(255)), _mm512_set1_epi32(0x7fc00000));
    return _mm512_castsi512_ps(bits);
}

/* 16 elements a step; the tail of up to 15 goes through the plain loop, so nothing past the last byte is read. */
MOQI_AVX512 static void moqi_expand_512(moq_dtype dtype, const uint8_t *src, int64_t n, float *dst)
{
    int64_t i = 0, end = n / 16 * 16;
#define MOQI_EACH(type, bytes, value) \
    for (; i < end; i += 16) { \
        type v = value(src + i * (bytes)); \
        _mm512_storeu_ps(dst + i,
#define MOQI_LOAD16(p) _mm_loadu_si128((const __m128i *)(const void *)(p))
#define MOQI_LOAD32(p) _mm256_loadu_si256((const __m256i *)(const void *)(p))
    switch ((int)dtype) {
    case MOQ_F32: memcpy(dst, src, (size_t)n * 4); return;
    case MOQ_BF16: MOQI_EACH(__m256i, 2, MOQI_LOAD32) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16))); } break;
    case MOQ_F16: MOQI_EACH(__m256i, 2, MOQI_LOAD32) _mm512_cvtph_ps(v)); } break;
    case MOQ_F8_E4M3: MOQI_EACH(__m128i, 1, MOQI_LOAD16) moqi_e4m3_512(v)); } break;
    case MOQ_F8_E8M0: MOQI_EACH(__m128i, 1, MOQI_LOAD16) moqi_e8m0_512(v)); } break;
    case MOQ_I8: MOQI_EACH(__m128i, 1, MOQI_LOAD16) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(v))); } break;
    case MOQ_U8: MOQI_EACH(__m128i, 1, MOQI_LOAD16) _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(v))); } break;
    default: break;
    }
#undef MOQI_EACH
    if (i < n) moqi_plain_expand(dtype, src + i * (moq_dtype_bits(dtype) / 8), n - i, dst + i);
}

/* 8 bytes to all lanes, lane i shifts its nibble down, a permutation looks it up (it reads the low 4 bits of each index). */
MOQI_AVX512 static void moqi_nibbles_512(const uint8_t *src, int64_t n, const float *table, float *dst)
{
    const __m512i half = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i shift = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m512 values = _mm512_loadu_ps(table);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512i v = _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i *)(const void *)(src + i / 2)));
        v = _mm512_srlv_epi32(_mm512_permutexvar_epi32(half, v), shift);
        _mm512_storeu_ps(dst + i, _mm512_permutexvar_ps(v, values));
    }
    if (i < n) moqi_plain_nibbles(src + i / 2, n - i, table, dst + i);
}

/* One scale serves at least 16 neighbours, so each step broadcasts a single one. */
MOQI_AVX512 static void moqi_scale_512(float *w, int64_t n, int shift, const float *s, const float *zero)
{
    int64_t i = 0;
    if (zero)
        for (; i + 16 <= n; i += 16)
            _mm512_storeu_ps(w + i, _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(w + i), _mm512_set1_ps(zero[i >> shift])),
                                                  _mm512_set1_ps(s[i >> shift])));
    else
        for (; i + 16 <= n; i += 16) _mm512_storeu_ps(w + i, _mm512_mul_ps(_mm512_loadu_ps(w + i), _mm512_set1_ps(s[i >> shift])));
    for (; i < n; i++) w[i] = (zero ? w[i] - zero[i >> shift] : w[i]) * s[i >> shift];
}

/* 4 rows of w times 4 (or 1) of x: 16 accumulators, 8 loads for 16 multiply-adds. */
MOQI_AVX512 static void moqi_tile_512(const float *w, int64_t ldw, int rows, const float *x, int64_t ldx, int64_t m, int64_t n, float *y, int64_t ldy)
{
    int64_t j = 0;
    float sum[16];
    for (; j + 4 <= m; j += 4, x += 4 * ldx) {
        __m512 a[16];
        for (int c = 0; c < 16; c++) a[c] = _mm512_setzero_ps();
#define MOQI_FMA4(c, v) \
    a[c] = _mm512_fmadd_ps(w0, v, a[c]); a[c + 1] = _mm512_fmadd_ps(w1, v, a[c + 1]); \
    a[c + 2] = _mm512_fmadd_ps(w2, v, a[c + 2]); a[c + 3] = _mm512_fmadd_ps(w3, v, a[c + 3]);
        for (int64_t i = 0; i < n; i += 16) {
            __m512 w0 = _mm512_loadu_ps(w + i), w1 = _mm512_loadu_ps(w + ldw + i);
            __m512 w2 = _mm512_loadu_ps(w + 2 * ldw + i), w3 = _mm512_loadu_ps(w + 3 * ldw + i);
            __m512 x0 = _mm512_loadu_ps(x + i), x1 = _mm512_loadu_ps(x + ldx + i);
            __m512 x2 = _mm512_loadu_ps(x + 2 * ldx + i), x3 = _mm512_loadu_ps(x + 3 * ldx + i);
            MOQI_FMA4(0, x0) MOQI_FMA4(4, x1) MOQI_FMA4(8, x2) MOQI_FMA4(12, x3)
        }
        for (int c = 0; c < 16; c++) sum[c] = _mm512_reduce_add_ps(a[c]);
        for (int c = 0; c < 4; c++)
            for (int r = 0; r < rows; r++) y[(j + c) * ldy + r] += sum[4 * c + r];
    }
    for (; j < m; j++, x += ldx) {
        __m512 a[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t i = 0; i < n; i += 16) {
            __m512 w0 = _mm512_loadu_ps(w + i), w1 = _mm512_loadu_ps(w + ldw + i), x0 = _mm512_loadu_ps(x + i);
            __m512 w2 = _mm512_loadu_ps(w + 2 * ldw + i), w3 = _mm512_loadu_ps(w + 3 * ldw + i);
            MOQI_FMA4(0, x0)
        }
        for (int r = 0; r < 4; r++) sum[r] = _mm512_reduce_add_ps(a[r]);
        for (int r = 0; r < rows; r++) y[j * ldy + r] += sum[r];
    }
#undef MOQI_FMA4
}

/* Two chains hide the latency of the multiply-add. */
MOQI_AVX512 static float moqi_dot_512(const float *a, const float *b, int64_t n)
{
    __m512 s = _mm512_setzero_ps(), t = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        s = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), s);
        t = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16), _mm512_loadu_ps(b + i + 16), t);
    }
    float sum = _mm512_reduce_add_ps(_mm512_add_ps(s, t));
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

MOQI_AVX512 static void moqi_axpy_512(float a, const float *x, float *y, int64_t n)
{
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) _mm512_storeu_ps(y + i, _mm512_fmadd_ps(_mm512_set1_ps(a), _mm512_loadu_ps(x + i), _mm512_loadu_ps(y + i)));
    for (; i < n; i++) y[i] += a * x[i];
}

/* ---- AVX2 with FMA and F16C ---- */

/* Sum of 8 lanes, always in the same order. */
MOQI_AVX2 static float moqi_sum_256(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* As in the AVX-512 version, 8 at a time. */
MOQI_AVX2 static __m256 moqi_e4m3_256(__m128i v)
{
    __m128i w = _mm_cvtepu8_epi16(v), size = _mm_and_si128(w, _mm_set1_epi16(0x7f));
    __m128i h = _mm_or_si128(_mm_slli_epi16(size, 7), _mm_slli_epi16(_mm_sub_epi16(w, size), 8));
    __m256i nan = _mm256_cvtepi16_epi32(_mm_cmpeq_epi16(size, _mm_set1_epi16(0x7f)));
    __m256 f = _mm256_mul_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(256));
    return _mm256_blendv_ps(f, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), _mm256_castsi256_ps(nan));
}

/* 255 << 23 is infinity; with the top mantissa bit it becomes NaN. */
MOQI_AVX2 static __m256 moqi_e8m0_256(__m128i v)
{
    __m256i w = _mm256_cvtepu8_epi32(v), bits = _mm256_slli_epi32(w, 23);
    __m256i zero = _mm256_and_si256(_mm256_cmpeq_epi32(w, _mm256_setzero_si256()), _mm256_set1_epi32(0x00400000));
    __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi32(w, _mm256_set1_epi32(255)), _mm256_set1_epi32(0x00400000));
    return _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_or_si256(zero, nan)));
}

/* 8 elements a step. */
MOQI_AVX2 static void moqi_expand_256(moq_dtype dtype, const uint8_t *src, int64_t n, float *dst)
{
    int64_t i = 0, end = n / 8 * 8;
#define MOQI_EACH(bytes, value) \
    for (; i < end; i += 8) { \
        __m128i v = value(src + i * (bytes)); \
        _mm256_storeu_ps(dst + i,
#define MOQI_LOAD8(p) _mm_loadl_epi64((const __m128i *)(const void *)(p))
    switch ((int)dtype) {
    case MOQ_F32: memcpy(dst, src, (size_t)n * 4); return;
    case MOQ_BF16: MOQI_EACH(2, MOQI_LOAD16) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16))); } break;
    case MOQ_F16: MOQI_EACH(2, MOQI_LOAD16) _mm256_cvtph_ps(v)); } break;
    case MOQ_F8_E4M3: MOQI_EACH(1, MOQI_LOAD8) moqi_e4m3_256(v)); } break;
    case MOQ_F8_E8M0: MOQI_EACH(1, MOQI_LOAD8) moqi_e8m0_256(v)); } break;
    case MOQ_I8: MOQI_EACH(1, MOQI_LOAD8) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v))); } break;
    case MOQ_U8: MOQI_EACH(1, MOQI_LOAD8) _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(v))); } break;
    default: break;
    }
#undef MOQI_EACH
    if (i < n) moqi_plain_expand(dtype, src + i * (moq_dtype_bits(dtype) / 8), n - i, dst + i);
}

/* Permutations of 8 lanes: both halves of the table are looked up, bit 3 of the code chooses. */
MOQI_AVX2 static void moqi_nibbles_256(const uint8_t *src, int64_t n, const float *table, float *dst)
{
    const __m256i shift = _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256i v = _mm256_srlv_epi32(_mm256_set1_epi32((int)moqi_load_u32(src + i / 2)), shift);
        __m256 choose = _mm256_castsi256_ps(_mm256_slli_epi32(v, 28));
        _mm256_storeu_ps(dst + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, v), _mm256_permutevar8x32_ps(high, v), choose));
    }
    if (i < n) moqi_plain_nibbles(src + i / 2, n - i, table, dst + i);
}

/* w: [n]; s, zero: [groups] */
MOQI_AVX2 static void moqi_scale_256(float *w, int64_t n, int shift, const float *s, const float *zero)
{
    int64_t i = 0;
    if (zero)
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(w + i, _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(w + i), _mm256_set1_ps(zero[i >> shift])),
                                                  _mm256_set1_ps(s[i >> shift])));
    else
        for (; i + 8 <= n; i += 8) _mm256_storeu_ps(w + i, _mm256_mul_ps(_mm256_loadu_ps(w + i), _mm256_set1_ps(s[i >> shift])));
    for (; i < n; i++) w[i] = (zero ? w[i] - zero[i >> shift] : w[i]) * s[i >> shift];
}

/* 4 rows of w times 2 (or 1) of x: 8 accumulators fit the 16 registers. */
MOQI_AVX2 static void moqi_tile_256(const float *w, int64_t ldw, int rows, const float *x, int64_t ldx, int64_t m, int64_t n, float *y, int64_t ldy)
{
    for (int64_t j = 0; j < m; j += 2, x += 2 * ldx) {
        const float *second = j + 1 < m ? x + ldx : x;
        __m256 a[8];
        float sum[8];
        for (int c = 0; c < 8; c++) a[c] = _mm256_setzero_ps();
        for (int64_t i = 0; i < n; i += 8) {
            __m256 x0 = _mm256_loadu_ps(x + i), x1 = _mm256_loadu_ps(second + i), v;
            v = _mm256_loadu_ps(w + i);
            a[0] = _mm256_fmadd_ps(v, x0, a[0]); a[4] = _mm256_fmadd_ps(v, x1, a[4]);
            v = _mm256_loadu_ps(w + ldw + i);
            a[1] = _mm256_fmadd_ps(v, x0, a[1]); a[5] = _mm256_fmadd_ps(v, x1, a[5]);
            v = _mm256_loadu_ps(w + 2 * ldw + i);
            a[2] = _mm256_fmadd_ps(v, x0, a[2]); a[6] = _mm256_fmadd_ps(v, x1, a[6]);
            v = _mm256_loadu_ps(w + 3 * ldw + i);
            a[3] = _mm256_fmadd_ps(v, x0, a[3]); a[7] = _mm256_fmadd_ps(v, x1, a[7]);
        }
        for (int c = 0; c < 8; c++) sum[c] = moqi_sum_256(a[c]);
        for (int r = 0; r < rows; r++) y[j * ldy + r] += sum[r];
        for (int r = 0; r < rows && j + 1 < m; r++) y[(j + 1) * ldy + r] += sum[4 + r];
    }
}

MOQI_AVX2 static float moqi_dot_256(const float *a, const float *b, int64_t n)
{
    __m256 s = _mm256_setzero_ps(), t = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        s = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), s);
        t = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8), _mm256_loadu_ps(b + i + 8), t);
    }
    float sum = moqi_sum_256(_mm256_add_ps(s, t));
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

MOQI_AVX2 static void moqi_axpy_256(float a, const float *x, float *y, int64_t n)
{
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, _mm256_fmadd_ps(_mm256_set1_ps(a), _mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
    for (; i < n; i++) y[i] += a * x[i];
}

#undef MOQI_LOAD8
#undef MOQI_LOAD16
#undef MOQI_LOAD32
#endif

/* ---- NEON ---- */

#ifdef MOQI_ARM
/* Conversion from F16 is part of every AArch64 CPU. */
static float32x4_t moqi_f16_neon(uint16x4_t v) { return vcvt_f32_f16(vreinterpret_f16_u16(v)); }

static float32x4_t moqi_e4m3_neon(uint16x4_t w)
{
    uint16x4_t size = vand_u16(w, vdup_n_u16(0x7f)), h = vorr_u16(vshl_n_u16(size, 7), vshl_n_u16(vsub_u16(w, size), 8));
    int16x4_t nan = vreinterpret_s16_u16(vceq_u16(size, vdup_n_u16(0x7f)));
    float32x4_t f = vmulq_n_f32(moqi_f16_neon(h), 256);
    return vbslq_f32(vreinterpretq_u32_s32(vmovl_s16(nan)), vreinterpretq_f32_u32(vdupq_n_u32(0x7fc00000)), f);
}

/* 8 elements a step; E8M0 and U8 are rare enough for the plain loop. */
static void moqi_expand_neon(moq_dtype dtype, const uint8_t *src, int64_t n, float *dst)
{
    int64_t i = 0, end = n / 8 * 8;
    for (; i < end; i += 8) {
        float32x4_t low, high;
        if (dtype == MOQ_BF16 || dtype == MOQ_F16) {
            uint16x8_t v = vreinterpretq_u16_u8(vld1q_u8(src + 2 * i));
            int wide = dtype == MOQ_BF16;
            low = wide ? vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(v), 16)) : moqi_f16_neon(vget_low_u16(v));
            high = wide ? vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(v), 16)) : moqi_f16_neon(vget_high_u16(v));
        } else if (dtype == MOQ_F8_E4M3) {
            uint16x8_t v = vmovl_u8(vld1_u8(src + i));
            low = moqi_e4m3_neon(vget_low_u16(v));
            high = moqi_e4m3_neon(vget_high_u16(v));
        } else if (dtype == MOQ_I8) {
            int16x8_t v = vmovl_s8(vreinterpret_s8_u8(vld1_u8(src + i)));
            low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(v)));
            high = vcvtq_f32_s32(vmovl_s16(vget_high_s16(v)));
        } else break;
        vst1q_f32(dst + i, low);
        vst1q_f32(dst + i + 4, high);
    }
    if (i < n) moqi_plain_expand(dtype, src + i * (moq_dtype_bits(dtype) / 8), n - i, dst + i);
}

static void moqi_scale_neon(float *w, int64_t n, int shift, const float *s, const float *zero)
{
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(w + i, vmulq_n_f32(vsubq_f32(vld1q_f32(w + i), vdupq_n_f32(zero ? zero[i >> shift] : 0)), s[i >> shift]));
    for (; i < n; i++) w[i] = (zero ? w[i] - zero[i >> shift] : w[i]) * s[i >> shift];
}

/* 4 rows of w times 2 (or 1) of x in 8 of the 32 registers. */
static void moqi_tile_neon(const float *w, int64_t ldw, int rows, const float *x, int64_t ldx, int64_t m, int64_t n, float *y, int64_t ldy)
{
    for (int64_t j = 0; j < m; j += 2, x += 2 * ldx) {
        const float *second = j + 1 < m ? x + ldx : x;
        float32x4_t a[8];
        for (int c = 0; c < 8; c++) a[c] = vdupq_n_f32(0);
        for (int64_t i = 0; i < n; i += 4) {
            float32x4_t x0 = vld1q_f32(x + i), x1 = vld1q_f32(second + i);
            for (int r = 0; r < 4; r++) {
                float32x4_t v = vld1q_f32(w + r * ldw + i);
                a[r] = vfmaq_f32(a[r], v, x0);
                a[4 + r] = vfmaq_f32(a[4 + r], v, x1);
            }
        }
        for (int r = 0; r < rows; r++) y[j * ldy + r] += vaddvq_f32(a[r]);
        for (int r = 0; r < rows && j + 1 < m; r++) y[(j + 1) * ldy + r] += vaddvq_f32(a[4 + r]);
    }
}

static float moqi_dot_neon(const float *a, const float *b, int64_t n)
{
    float32x4_t s = vdupq_n_f32(0), t = vdupq_n_f32(0);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        s = vfmaq_f32(s, vld1q_f32(a + i), vld1q_f32(b + i));
        t = vfmaq_f32(t, vld1q_f32(a + i + 4), vld1q_f32(b + i + 4));
    }
    float sum = vaddvq_f32(vaddq_f32(s, t));
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void moqi_axpy_neon(float a, const float *x, float *y, int64_t n)
{
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) vst1q_f32(y + i, vfmaq_n_f32(vld1q_f32(y + i), vld1q_f32(x + i), a));
    for (; i < n; i++) y[i] += a * x[i];
}
#endif

/* ------------------------------------------------------------------------------------------------
   >>tiles           prepared layers: codes to F32 tiles, tiles times inputs
   What lies in rows is read where it lies; other packings are rewritten once. Any format falls back to moq_dequantize.
   ------------------------------------------------------------------------------------------------ */

/* A product walks the weights in tiles of 16 rows x 512 columns:

       codes (file)  --expand-->  F32 tile (32 KB)  --4 rows x 4 tokens at a time-->  y[m][16]
       scales        --expand-->  one number for each group of the run

   A tile is decoded once and used for every row of x, so decoding is the whole cost of one token and a small part of a prompt.
   Groups must begin where tiles begin: their length divides 512 or is a multiple of it, which holds for every format whose groups
   run along columns. The rest (MXFP4 stacks grouped along rows, 6-bit floats) is decoded row by row by moq_dequantize. */
#define MOQI_TILE_ROWS 16
#define MOQI_TILE_COLS 512 /* a tile is 32 KB of F32 */
#define MOQI_SLOW_ROWS 4   /* of a tile that moq_dequantize fills, at full width */

enum { MOQI_CODES_SLOW, MOQI_CODES_WIDE, MOQI_CODES_NIBBLES }; /* moq_dequantize; one value per element; two codes per byte */

struct moqi_tiled;

/* A way to multiply without tiles: what an instruction set has beyond the inner loops. `decode` and `block` are for the ways that
   go through moqi_panels; what they get and give is said in >>panels. */
struct moqi_panel;
typedef struct moqi_way {
    const char *name;         /* for explain: "4-bit codes in place" */
    int unit;                 /* columns in 32 bits of a panel: 1 F32, 2 BF16, 4 INT8; 0: no panels */
    /* The least number of rows of x that this way is made for, 0: not for this layer */
    int (*takes)(const struct moqi_tiled *p);
    /* x [n] -> out [n padded to 128] F32 or what fits there, zeros after x; x may be out */
    void (*arrange)(const struct moqi_tiled *p, const float *x, int64_t n, float *out);
    /* y[m][rows] = bias + x W^T; x: [m, ldx] arranged; scratch: MOQI_WAY_FLOATS */
    void (*multiply)(const struct moqi_way *way, const struct moqi_tiled *p, int64_t row, int64_t rows, const float *x, int64_t ldx, int64_t m,
                     float *y, int64_t ldy, float *scratch);
    void (*decode)(struct moqi_panel *w);
    void (*block)(const struct moqi_panel *w, const float *x, int64_t ldx, int64_t m, float *y, int64_t ldy);
} moqi_way;

enum { MOQI_WAYS = 3, MOQI_WAY_ROWS = 256 /* of one task */, MOQI_WAY_FLOATS = 40960 /* of scratch */ };

/* A prepared layer. It keeps the moq_linear, whose views stay the checkpoint's, and says how tiles are read from it. */
typedef struct moqi_tiled {
    moq_linear layer;         /* as it was given */
    int form;                 /* MOQI_CODES_... */
    moq_dtype dtype;          /* of `codes` when WIDE */
    const uint8_t *codes;     /* row r begins at codes + r * row_bytes */
    int64_t row_bytes;
    float table[16];          /* values of 4-bit codes */
    moq_dtype scale_dtype;    /* MOQ_NONE: no scale */
    const uint8_t *scales;    /* [row group][column group] from the layer's first column; NULL: one scale, `factor` */
    int64_t scale_stride;     /* elements from one row group to the next */
    int64_t scale_first, scale_step; /* row r of the layer is row scale_first + r * scale_step of the scales */
    int64_t group_rows, group_cols;
    int shift;                /* group of column i of a tile: i >> shift */
    float factor;             /* global scale */
    const int16_t *zeros;     /* [rows, groups] or NULL; then `zero` for all */
    int64_t groups;
    float zero;
    float requant;            /* W4A8 as stored: round again with this scale; 0: not */
    const int32_t *order;     /* column i of the codes is column order[i] of the layer; NULL: the same */
    int rounds;               /* inputs are rounded */
    const moqi_kernels *k;
    int input_bits;           /* inputs may be rounded to so many: 32 (not at all), 16 or 8 */
    const moqi_way *way[MOQI_WAYS]; /* instead of tiles; NULL at the end */
    int from[MOQI_WAYS];      /* rows of x from which each serves, ascending */
    int shares;               /* its inputs are those of the part before it */
    const float *rotation;    /* F32 [size, size] or NULL */
    const float *smooth;      /* pre_quant_scale as F32 [cols] or NULL */
    const float *bias;        /* F32 [rows] or NULL */
    struct moqi_tiled *lora_a, *lora_b;
} moqi_tiled;

/* Inner loops step by 16 columns; whatever lies between cols and the next multiple of 16 is zero on both sides. Rows of x have room
   for a whole block of a stream, 128. */
static int64_t moqi_pad16(int64_t n) { return (n + 15) / 16 * 16; }
static int64_t moqi_pad_x(int64_t n) { return (n + 127) / 128 * 128 + 16; } /* + 16: rows of x do not all fall into the same cache sets */

/* How m rows of x are multiplied; NULL: by tiles. */
static const moqi_way *moqi_way_for(const moqi_tiled *p, int64_t m)
{
    const moqi_way *way = NULL;
    for (int i = 0; i < MOQI_WAYS && p->way[i] && m >= p->from[i]; i++) way = p->way[i];
    return way;
}

/* Rows of one task. A way reads memory in order and shares x, so it likes long runs of rows as long as there are enough for `workers`.
   No result depends on where runs begin. */
static int64_t moqi_tile_rows(const moqi_tiled *p, int64_t m, int64_t workers)
{
    int64_t tile = MOQI_TILE_ROWS, most = m < 16 ? 64 : MOQI_WAY_ROWS;
    if (p->form == MOQI_CODES_SLOW) return MOQI_SLOW_ROWS;
    if (!moqi_way_for(p, m)) return tile;
    for (tile *= 2; tile < most && p->layer.rows / (2 * tile) >= 4 * workers;) tile *= 2;
    return tile;
}

/* Scales of the groups that columns [first, first + n) of a row fall into, times the global one. */
static void moqi_run_scales(const moqi_kernels *k, const moqi_tiled *p, int64_t row, int64_t first, int64_t n, float *s)
{
    int64_t g = first / p->group_cols, count = moqi_ceil_div(n, p->group_cols);
    if (p->scales) {
        int64_t at = (p->scale_first + row * p->scale_step) / p->group_rows * p->scale_stride + g;
        k->expand(p->scale_dtype, p->scales + at * (moq_dtype_bits(p->scale_dtype) / 8), count, s);
        if (p->factor != 1) k->scale(s, count, 62, &p->factor, NULL);
    } else {
        for (int64_t i = 0; i < count; i++) s[i] = p->factor;
    }
}

/* E4M3 of a double, rounded once: F32 keeps whether anything was cut off in its last bit (rounding to odd), far below E4M3's. */
static float moqi_round_e4m3_exact(double v)
{
    float f = (float)v;
    uint32_t b = moqi_f32_bits(f);
    if ((double)f != v) {
        if (fabs((double)f) > fabs(v)) b--;
        b |= 1;
    }
    return moq_e4m3_decode(moq_e4m3_encode(moqi_bits_f32(b)));
}

/* Columns [first, first + n) of a row: codes times the scales of their groups. `first` is a multiple of MOQI_TILE_COLS. */
static void moqi_decode_run(const moqi_kernels *k, const moqi_tiled *p, int64_t row, int64_t first, int64_t n, float *out)
{
    const uint8_t *src = p->codes + row * p->row_bytes;
    if (p->form == MOQI_CODES_NIBBLES) k->nibbles(src + first / 2, n, p->table, out);
    else k->expand(p->dtype, src + first * (moq_dtype_bits(p->dtype) / 8), n, out);
    if (p->scale_dtype == MOQ_NONE) return;
    float s[MOQI_TILE_COLS / 16], zero[MOQI_TILE_COLS / 16];
    moqi_run_scales(k, p, row, first, n, s);
    if (p->requant > 0) { /* W4A8: the product is rounded to E4M3 before anything rounds it to F32 */
        for (int64_t i = 0; i < n; i++) out[i] = moqi_round_e4m3_exact((double)out[i] * (double)s[i >> p->shift] / (double)p->requant) * p->requant;
        return;
    }
    int64_t g = first / p->group_cols, count = moqi_ceil_div(n, p->group_cols);
    if (p->zeros || p->zero != 0)
        for (int64_t i = 0; i < count; i++) zero[i] = p->zeros ? (float)p->zeros[row * p->groups + g + i] : p->zero;
    k->scale(out, n, p->shift, s, p->zeros || p->zero != 0 ? zero : NULL);
}

/* The same from the codes as stored, for the reference. */
static void moqi_decode_requant(const moqi_tiled *p, int64_t row, int64_t n, float *out)
{
    const moq_linear *w = &p->layer;
    int16_t codes[64];
    for (int64_t c = 0; c < n; c += 64) {
        int64_t m = moqi_min(64, n - c);
        moq_get_codes(w, row, c, m, codes);
        for (int64_t i = 0; i < m; i++)
            out[c + i] = moqi_round_e4m3_exact(codes[i] * moqi_scale_at(w, row, moqi_group_of(w, c + i)) / (double)p->requant) * p->requant;
    }
}

/* A row as the layer computes with it, padded with zeros to a multiple of 16. */
static void moqi_decode(const moqi_kernels *k, const moqi_tiled *p, int64_t row, int64_t first, int64_t n, float *out)
{
    if (p->form == MOQI_CODES_SLOW && p->requant > 0) moqi_decode_requant(p, row, n, out);
    else if (p->form == MOQI_CODES_SLOW) moq_dequantize(&p->layer, row, 1, out);
    else moqi_decode_run(k, p, row, first, n, out);
    for (int64_t i = n; i < moqi_pad16(n); i++) out[i] = 0;
}

/* Ask for the codes that follow n columns from `first`: the next run of this row, or the first one of the row a tile below. A tile
   reads short runs of many rows, which the hardware does not foresee. */
static void moqi_prefetch(const moqi_tiled *p, int64_t row, int64_t first, int64_t n)
{
#ifdef __GNUC__
    int bits = p->form == MOQI_CODES_NIBBLES ? 4 : moq_dtype_bits(p->dtype);
    int64_t next = first + n < p->layer.cols ? first + n : 0, below = next ? row : row + MOQI_TILE_ROWS;
    if (p->form == MOQI_CODES_SLOW || below >= p->layer.rows) return;
    const uint8_t *at = p->codes + below * p->row_bytes + next * bits / 8;
    for (int64_t bytes = moqi_min(n, p->layer.cols - next) * bits / 8, i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
#else
    (void)p; (void)row; (void)first; (void)n;
#endif
}

/* y[m][rows] += x W^T for `rows` rows of W from `row`. x: [m, ldx], ldx >= cols padded to 16. tile: scratch. */
static void moqi_multiply(const moqi_kernels *k, const moqi_tiled *p, int64_t row, int64_t rows, const float *x, int64_t ldx, int64_t m,
                          float *y, int64_t ldy, float *tile)
{
    int64_t cols = p->layer.cols, width = p->form == MOQI_CODES_SLOW ? moqi_pad16(cols) : MOQI_TILE_COLS;
    for (int64_t first = 0; first < cols; first += width) {
        int64_t n = moqi_min(width, cols - first);
        for (int64_t r = 0; r < rows; r++) {
            moqi_prefetch(p, row + r, first, n);
            moqi_decode(k, p, row + r, first, n, tile + r * width);
        }
        for (int64_t r = 0; r < rows; r += 4)
            k->tile(tile + r * width, width, (int)moqi_min(4, rows - r), x + first, ldx, m, moqi_pad16(n), y + r, ldy);
    }
}

/* Does x enter the product as it is? */
static int moqi_is_plain(const moqi_tiled *p)
{
    return !p->rounds && !p->order && !p->smooth && !p->lora_a && p->layer.hadamard_size == 0;
}

/* One of m tokens going into a layer: x [cols] -> t = rotated and smoothed (the low-rank branch reads it), r = t rounded, in the order of
   the codes or as the way of m rows wants it. Both are padded with zeros to a multiple of 16. x may be r. A plain layer has no use for t. */
static void moqi_feed(const moqi_tiled *p, int64_t m, const float *x, float *t, float *r)
{
    int64_t cols = p->layer.cols;
    const moqi_way *way = moqi_way_for(p, m);
    if (way && moqi_is_plain(p)) { way->arrange(p, x, cols, r); return; }
    if (p->layer.hadamard_size > 0) moqi_rotate_input(p->rotation, p->layer.hadamard_size, p->layer.hadamard_scale, x, cols, t);
    else if (x != t) memcpy(t, x, (size_t)cols * sizeof *t);
    for (int64_t i = 0; p->smooth && i < cols; i++) t[i] *= p->smooth[i];
    if (p->rounds) moq_round_input(&p->layer, t, r);
    else for (int64_t i = 0; i < cols; i++) r[i] = t[p->order ? p->order[i] : i];
    for (int64_t i = cols; i < moqi_pad16(cols); i++) t[i] = r[i] = 0;
    if (way) way->arrange(p, r, cols, r);
}

/* ---- preparing one layer: which bytes can be used as they lie, which are repacked ---- */

/* Integer element types, in whatever container they are stored. */
static int moqi_is_int(moq_dtype t) { return t == MOQ_I8 || (t >= MOQ_I2 && t <= MOQ_I7); }

/* Compared as bits, so NaN and -0 are values like any other; both NULL count as the same. */
static int moqi_same_bytes(const void *a, const void *b, size_t bytes) { return a == b || (a && b && memcmp(a, b, bytes) == 0); }

/* Elements first, first + step, ... of a view as F32 in the arena, or NULL when out of memory. */
static float *moqi_take_floats(moqi_arena *r, const moq_view *v, int64_t first, int64_t step, int64_t count)
{
    float *out = (float *)moqi_take_array(r, (uint64_t)count, sizeof *out);
    for (int64_t i = 0; out && i < count; i++) out[i] = moqi_view_f32(v, (uint64_t)(first + i * step));
    return out;
}

/* Are the rows contiguous runs of codes that an inner loop reads directly? Sets form, dtype, codes and row_bytes. */
static int moqi_use_codes(moqi_tiled *p)
{
    const moq_linear *w = &p->layer;
    const moq_packing *k = &w->packing;
    int whole = k->bits == k->word_bits; /* one code a word: any strides along rows */
    if (p->order || k->col_stride != 1 || k->awq_order || (k->along_rows && !whole)) return 0;
    if (p->form == MOQI_CODES_NIBBLES ? k->bits != 4 || w->col_first % 2 != 0 : k->bits != moq_dtype_bits(p->dtype)) return 0;
    int64_t row_bytes = k->row_stride * (k->word_bits / 8);
    p->codes = (const uint8_t *)w->codes.data + w->row_first * row_bytes + w->col_first * k->bits / 8;
    p->row_bytes = row_bytes * w->row_step;
    return 1;
}

/* How a row will be stored: nibbles through a table, or a dtype that has an expander. 0: only moq_dequantize can read it. */
static int moqi_choose_form(moqi_tiled *p)
{
    const moq_linear *w = &p->layer;
    moq_dtype elem = w->scheme.weight.elem;
    int integer = moqi_is_int(elem), bits = w->packing.bits;
    p->form = MOQI_CODES_WIDE;
    p->dtype = elem;
    if (elem == MOQ_F4 || (integer && bits <= 4)) {
        p->form = MOQI_CODES_NIBBLES;
        for (int i = 0; i < 16; i++) p->table[i] = elem == MOQ_F4 ? moqi_e2m1_table[i] : (float)(i < 8 || w->packing.is_unsigned ? i : i - 16);
        return 1;
    }
    if (integer) p->dtype = w->packing.is_unsigned ? MOQ_U8 : MOQ_I8;
    return integer || elem == MOQ_F8_E4M3 || elem == MOQ_BF16 || elem == MOQ_F16 || elem == MOQ_F32;
}

/* Columns sorted by their group, when every group has its full size: then groups are runs again. where[column] = new place. */
static moq_result moqi_order_columns(moqi_tiled *p, moqi_arena *r, int32_t **where)
{
    const moq_linear *w = &p->layer;
    int64_t g = w->scheme.weight.group_cols, groups = g > 0 ? w->cols / g : 0;
    *where = NULL;
    if (!w->group_index.data || p->form == MOQI_CODES_SLOW) return MOQ_OK;
    int32_t *order = (int32_t *)moqi_take_array(r, (uint64_t)w->cols, sizeof *order);
    int32_t *place = (int32_t *)moqi_take_array(r, (uint64_t)w->cols, sizeof *place);
    int32_t *filled = (int32_t *)moqi_take_array(r, (uint64_t)groups + 1, sizeof *filled);
    if (!order || !place || !filled) return MOQ_E_NOMEM;
    int regular = groups > 0 && groups * g == w->cols && !p->rounds && w->col_first == 0;
    for (int64_t c = 0; regular && c < w->cols; c++) {
        int64_t of = moqi_group_of(w, c);
        regular = of >= 0 && of < groups && filled[of] < g;
        if (!regular) break;
        place[c] = (int32_t)(of * g + filled[of]++);
        order[place[c]] = (int32_t)c;
    }
    if (!regular) p->form = MOQI_CODES_SLOW;
    else { p->order = order; *where = place; }
    return MOQ_OK;
}

/* Arguments of moqi_repack_rows. where: new place of each column, NULL: unchanged. */
typedef struct moqi_repack { moqi_tiled *part; uint8_t *out; const int32_t *where; } moqi_repack;

/* 16 rows of codes into contiguous rows: nibbles, bytes, or wider elements copied. */
static void moqi_repack_rows(void *arg, int index, int worker)
{
    const moqi_repack *t = (const moqi_repack *)arg;
    const moqi_tiled *p = t->part;
    const moq_linear *w = &p->layer;
    const moq_packing *k = &w->packing;
    int64_t size = p->form == MOQI_CODES_NIBBLES ? 0 : moq_dtype_bits(p->dtype) / 8;
    int16_t codes[256];
    (void)worker;
    for (int64_t row = (int64_t)index * 16; row < moqi_min(w->rows, (int64_t)index * 16 + 16); row++) {
        uint8_t *out = t->out + row * p->row_bytes;
        for (int64_t first = 0; first < w->cols; first += 256) {
            int64_t n = moqi_min(256, w->cols - first);
            if (size < 2) moq_get_codes(w, row, first, n, codes);
            for (int64_t i = 0; i < n; i++) {
                int64_t c = first + i, at = t->where ? t->where[c] : c;
                int64_t word = (w->row_first + row * w->row_step) * k->row_stride + (w->col_first + c) * k->col_stride;
                if (size == 0) out[at / 2] = (uint8_t)(out[at / 2] | (codes[i] & 15) << (4 * (at & 1)));
                else if (size == 1) out[at] = (uint8_t)(codes[i] & 255);
                else memcpy(out + at * size, (const uint8_t *)w->codes.data + word * size, (size_t)size);
            }
        }
    }
}

/* Scales as they lie when a row's groups are neighbours, else gathered as F32. 0: groups that tiles cannot follow. */
static int moqi_choose_groups(moqi_tiled *p)
{
    const moq_linear *w = &p->layer;
    int64_t g = w->scheme.weight.group_cols, rows = w->scheme.weight.group_rows;
    p->factor = w->global_mul / w->global_div;
    p->zero = (float)(w->zeros.data ? 0 : w->zero_add);
    p->scale_dtype = w->scales.data ? w->scales.dtype : p->factor != 1 || p->zero != 0 || w->zeros.data ? MOQ_F32 : MOQ_NONE;
    p->group_rows = rows > 0 ? rows : INT64_MAX;
    p->shift = 4;
    while (p->shift < 62 && ((int64_t)1 << p->shift) < (g > 0 ? g : INT64_MAX)) p->shift++;
    if (g <= 0 || (g >= w->cols && w->col_first == 0)) {
        p->group_cols = moqi_ceil_div(w->cols, MOQI_TILE_COLS) * MOQI_TILE_COLS;
        p->groups = 1;
        return 1;
    }
    p->group_cols = g;
    p->groups = moqi_ceil_div(w->cols, g);
    return g % 16 == 0 && (g % MOQI_TILE_COLS == 0 || MOQI_TILE_COLS % g == 0) && w->col_first % g == 0;
}

/* Zero points become one int16 for each row and group: with GPTQ's + 1 an 8-bit zero point reaches 256. Scales stay in the
   checkpoint where neighbours in a row are neighbours in memory. */
static moq_result moqi_take_groups(moqi_tiled *p, moqi_arena *r)
{
    const moq_linear *w = &p->layer;
    if (w->zeros.data) {
        int16_t *z = (int16_t *)moqi_take_array(r, (uint64_t)w->rows * (uint64_t)p->groups, sizeof *z);
        if (!z) return MOQ_E_NOMEM;
        for (int64_t i = 0; i < w->rows * p->groups; i++) z[i] = (int16_t)moqi_zero_at(w, i / p->groups, moqi_group_of(w,
                0) * !p->order + i % p->groups);
        p->zeros = z;
    }
    if (!w->scales.data) return MOQ_OK;
    int64_t first = w->scheme.weight.group_cols > 0 ? w->col_first / p->group_cols : 0;
    if (w->scale_col_stride == 1 || p->groups == 1) {
        p->scales = (const uint8_t *)w->scales.data + first * w->scale_col_stride * (moq_dtype_bits(p->scale_dtype) / 8);
        p->scale_stride = w->scale_row_stride;
        p->scale_first = w->row_first;
        p->scale_step = w->row_step;
        return MOQ_OK;
    }
    float *s = (float *)moqi_take_array(r, (uint64_t)w->rows * (uint64_t)p->groups, sizeof *s);
    if (!s) return MOQ_E_NOMEM;
    for (int64_t i = 0; i < w->rows * p->groups; i++) s[i] = (float)moqi_scale_at(w, i / p->groups, first + i % p->groups);
    p->scales = (const uint8_t *)s;
    p->scale_dtype = MOQ_F32;
    p->scale_stride = p->groups;
    p->scale_step = p->group_rows = 1;
    return MOQ_OK;
}

/* ------------------------------------------------------------------------------------------------
   >>stream          4-bit rows times inputs, straight from the file's nibbles
   Codes never become a tile in memory: they are looked up in registers, so one token runs at the speed of a read.
   ------------------------------------------------------------------------------------------------ */

/* A vector load of a row holds L words of 8 consecutive codes (L = 16 in AVX-512). Shifted right by 4 j, lane l holds code 8 l + j of the
   block in its low bits, which is all that a permutation reads as an index: one shift and one permutation give L weights. So x is
   stored, once per call, in the order in which the lanes ask for it:

       x'[128 b + 16 j + l] = x[128 b + 8 l + j]                         l < 16, j < 8
       y[r] = bias[r] + factor * sum over l of ( sum over blocks b of s[r][group of (b, l)] * ( sum over j of w x' ) )

   Groups have at least 16 codes, two lanes, so a scale multiplies sums and not weights. This order of sums is the same for one row of x
   and for many (the loops over x only share the look-ups), and it depends on neither tile nor thread. */

#ifdef MOQI_X86
#if defined(__clang__)
#define MOQI_UNROLL _Pragma("clang loop unroll(full)")
#else
#define MOQI_UNROLL _Pragma("GCC unroll 16")
#endif
/* f for every token: `tokens` is a constant after inlining, so only the wanted ones stay. */
#define MOQI_TOKENS(f) f(0) if (tokens > 1) { f(1) } if (tokens > 2) { f(2) f(3) } if (tokens > 4) { f(4) f(5) f(6) f(7) }
#define MOQI_INLINE static inline __attribute__((always_inline))

enum { MOQI_STREAM_AHEAD = 2048 }; /* bytes that are asked for before they are needed: a few hundred nanoseconds at 10 GB/s */

/* Where the scales of a row are, as element number of its first group. */
static int64_t moqi_stream_scale_at(const moqi_tiled *p, int64_t row)
{
    return (p->scale_first + row * p->scale_step) / p->group_rows * p->scale_stride;
}

/* Number of the group that column c begins in; lengths that divide a tile are powers of two. */
static int64_t moqi_stream_group(const moqi_tiled *p, int64_t c) { return p->shift < 9 ? c >> p->shift : c / p->group_cols; }

enum { MOQI_STREAM_ANY, MOQI_STREAM_ZEROS, MOQI_STREAM_NVFP4 }; /* any scales; also zero points; E4M3 on groups of 16 */

/* ---- AVX-512 ---- */

/* Up to 16 scales from element `at` on; lanes past the count are 0 and nothing there is read. E4M3 comes out as value / 256. */
MOQI_INLINE MOQI_AVX512 __m512 moqi_stream_scales_512(const moqi_tiled *p, int64_t at, int64_t count)
{
    __mmask16 some = (__mmask16)(count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0);
    const uint8_t *s = p->scales;
    __m256i w, h, size;
    switch ((int)p->scale_dtype) {
    case MOQ_F8_E4M3:
        w = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(some, s + at));
        size = _mm256_and_si256(w, _mm256_set1_epi16(0x7f));
        h = _mm256_or_si256(_mm256_slli_epi16(size, 7), _mm256_slli_epi16(_mm256_sub_epi16(w, size), 8));
        return _mm512_mask_mov_ps(_mm512_cvtph_ps(h), _mm256_cmpeq_epi16_mask(size, _mm256_set1_epi16(0x7f)),
                                  _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
    case MOQ_F8_E8M0: return moqi_e8m0_512(_mm_maskz_loadu_epi8(some, s + at));
    case MOQ_BF16: return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, s + 2 * at)), 16));
    case MOQ_F16: return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, s + 2 * at));
    default: return _mm512_maskz_loadu_ps(some, s + 4 * at);
    }
}

/* What one pass over columns [first, end) of some rows needs. */
typedef struct moqi_stream_pass {
    const moqi_tiled *p;
    const float *x;       /* [16 columns of this pass][token][16] in the order of the lanes */
    int64_t first, end;
    float table[16];      /* values of the codes, less a zero point that is the same everywhere */
    int32_t lane[64];     /* [4 blocks of a run of 512 columns][lane] -> its scale among 16 */
} moqi_stream_pass;

/* The 32 E4M3 scales of a run of 512 columns as value / 256; past the count they are 0 and not read. */
MOQI_INLINE MOQI_AVX512 void moqi_stream_e4m3_512(const uint8_t *scales, int64_t count, __m512 *s0, __m512 *s1)
{
    __m256i b = count >= 32 ? _mm256_loadu_si256((const __m256i *)(const void *)scales) : _mm256_maskz_loadu_epi8(((__mmask32)1 << count) - 1, scales);
    __m512i w = _mm512_cvtepi8_epi16(b); /* sign-extended, so a shift puts the sign where F16 has it, and once more below */
    __m512i h = _mm512_and_si512(_mm512_slli_epi16(w, 7), _mm512_set1_epi16((short)0xbfff));
    __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(w, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(0x7f));
    h = _mm512_mask_mov_epi16(h, nan, _mm512_set1_epi16(0x7e00));
    *s0 = _mm512_cvtph_ps(_mm512_castsi512_si256(h));
    *s1 = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1));
}

/* The scales and zero points of the run of 512 columns from c, 16 to a vector. g: number of their first group */
MOQI_INLINE MOQI_AVX512 void moqi_stream_groups_512(const moqi_tiled *p, int64_t row, int64_t at, int64_t g, int zeros, __m512 *s, __m512 *z)
{
    int64_t count = p->groups - g;
    if (p->scales) s[1] = s[0] = moqi_stream_scales_512(p, at + g, count);
    if (p->scales && p->shift == 4) s[1] = moqi_stream_scales_512(p, at + g + 16, count - 16);
    if (!zeros) return;
    __mmask16 low = (__mmask16)(count >= 16 ? 0xffff : (1 << count) - 1);
    __mmask16 high = (__mmask16)(count >= 32 ? 0xffff : count > 16 ? (1 << (count - 16)) - 1 : 0);
    const int16_t *from = p->zeros + row * p->groups + g;
    z[1] = z[0] = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(low, from)));
    if (p->shift == 4) z[1] = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(high, from + 16)));
}

/* acc[t] += row . x[t] over the pass; tokens and kind are constants where this is called. */
MOQI_INLINE MOQI_AVX512 void moqi_stream_row_512(const moqi_stream_pass *pass, int64_t row, int tokens, int kind, float *acc)
{
    const moqi_tiled *p = pass->p;
    const uint8_t *codes = p->codes + row * p->row_bytes;
    const __m512 table = _mm512_loadu_ps(pass->table);
    int64_t at = moqi_stream_scale_at(p, row), cols = p->layer.cols, first = pass->first, end = pass->end;
    const int zeros = kind == MOQI_STREAM_ZEROS;
    __m512 a[8], b[8], s[2], z[2];
    z[0] = z[1] = s[0] = s[1] = _mm512_set1_ps(1);
#define MOQI_LOAD(t) a[t] = _mm512_loadu_ps(acc + 16 * (t));
#define MOQI_STORE(t) _mm512_storeu_ps(acc + 16 * (t), a[t]);
#define MOQI_FIRST(t) b[t] = _mm512_mul_ps(w, _mm512_loadu_ps(x + (t) * 16));
#define MOQI_NEXT(t) b[t] = _mm512_fmadd_ps(w, _mm512_loadu_ps(xj + (t) * 16), b[t]);
#define MOQI_LAST(t) a[t] = _mm512_fmadd_ps(b[t], scale, a[t]);
#define MOQI_LOOKUP(v) w = _mm512_permutexvar_ps(v, table); if (zeros) w = _mm512_sub_ps(w, zero);
#define MOQI_STEP(j, v) { const float *xj = x + 16 * (j) * tokens; MOQI_LOOKUP(v) MOQI_TOKENS(MOQI_NEXT) }
    MOQI_TOKENS(MOQI_LOAD)
    for (int64_t c = first; c < end; c += 512) {
        if (kind == MOQI_STREAM_NVFP4) moqi_stream_e4m3_512(p->scales + at + c / 16, p->groups - c / 16, &s[0], &s[1]);
        else moqi_stream_groups_512(p, row, at, moqi_stream_group(p, c), zeros, s, z);
        MOQI_UNROLL for (int k = 0; k < 4; k++) {
            int64_t col = c + 128 * k;
            const uint8_t *src = codes + col / 2;
            const float *x = pass->x + (col - first) * tokens;
            __m512i v, v8, v16, v24, lane = _mm512_loadu_si512(pass->lane + 16 * k);
            __m512 w, scale = _mm512_permutexvar_ps(lane, s[k / 2]), zero = zeros ? _mm512_permutexvar_ps(lane, z[k / 2]) : scale;
            if (col >= end) break;
            if (cols - col >= 134) { /* shifts by whole bytes are left to the loads while there are codes behind this block */
                v = _mm512_loadu_si512(src);
                v8 = _mm512_loadu_si512(src + 1);
                v16 = _mm512_loadu_si512(src + 2);
                v24 = _mm512_loadu_si512(src + 3);
            } else {
                v = cols - col >= 128 ? _mm512_loadu_si512(src) : _mm512_maskz_loadu_epi8(((__mmask64)1 << ((cols - col + 1) / 2)) - 1, src);
                v8 = _mm512_srli_epi32(v, 8);
                v16 = _mm512_srli_epi32(v, 16);
                v24 = _mm512_srli_epi32(v, 24);
            }
            __builtin_prefetch(src + MOQI_STREAM_AHEAD);
            MOQI_LOOKUP(v)
            MOQI_TOKENS(MOQI_FIRST)
            MOQI_STEP(1, _mm512_srli_epi32(v, 4))
            MOQI_STEP(2, v8)
            MOQI_STEP(3, _mm512_srli_epi32(v8, 4))
            MOQI_STEP(4, v16)
            MOQI_STEP(5, _mm512_srli_epi32(v16, 4))
            MOQI_STEP(6, v24)
            MOQI_STEP(7, _mm512_srli_epi32(v24, 4))
            MOQI_TOKENS(MOQI_LAST)
        }
    }
    MOQI_TOKENS(MOQI_STORE)
#undef MOQI_LOAD
#undef MOQI_STORE
#undef MOQI_FIRST
#undef MOQI_NEXT
#undef MOQI_LAST
#undef MOQI_LOOKUP
#undef MOQI_STEP
}

/* `rows` rows for 1, 2, 4 or 8 tokens; one body for each, so that sums stay in registers. acc: [rows, tokens, 16] */
MOQI_AVX512 static void moqi_stream_rows_512(const moqi_stream_pass *s, int64_t row, int64_t rows, int tokens, float *acc)
{
    int kind = s->p->zeros ? MOQI_STREAM_ZEROS :
               s->p->scales && s->p->scale_dtype == MOQ_F8_E4M3 && s->p->shift == 4 ? MOQI_STREAM_NVFP4 : MOQI_STREAM_ANY;
#define MOQI_KIND(n, k) if (tokens == n && kind == k) for (int64_t r = 0; r < rows; r++) moqi_stream_row_512(s, row + r, n, k, acc + 16 * n * r);
#define MOQI_CASE(n) MOQI_KIND(n, MOQI_STREAM_NVFP4) MOQI_KIND(n, MOQI_STREAM_ANY) MOQI_KIND(n, MOQI_STREAM_ZEROS)
    MOQI_CASE(1) MOQI_CASE(2) MOQI_CASE(4) MOQI_CASE(8)
#undef MOQI_CASE
#undef MOQI_KIND
}

/* x [n] -> out [n padded to 128], in the order of the lanes. x may be out. */
static void moqi_stream_arrange_512(const moqi_tiled *p, const float *x, int64_t n, float *out)
{
    float block[128];
    (void)p;
    for (int64_t c = 0; c < n; c += 128) {
        int64_t m = moqi_min(128, n - c);
        memcpy(block, x + c, (size_t)m * sizeof *x);
        for (int64_t i = m; i < 128; i++) block[i] = 0;
        for (int j = 0; j < 8; j++)
            for (int l = 0; l < 16; l++) out[c + 16 * j + l] = block[8 * l + j];
    }
}

/* Sum of 16 lanes, always in the same order. */
MOQI_AVX512 static float moqi_stream_sum_512(const float *a)
{
    __m256 h = _mm256_add_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(a + 8));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* Columns [first, end) of some rows of x, 16 columns of all of them side by side: 32 KB that stay in the first-level cache. */
MOQI_AVX512 static void moqi_stream_pack_512(const float *x, int64_t ldx, int tokens, int64_t first, int64_t end, float *out)
{
    int64_t n = moqi_pad_x(end - first);
    for (int t = 0; t < tokens; t++)
        for (int64_t i = 0; i < n; i += 16) _mm512_storeu_ps(out + i * tokens + 16 * t, _mm512_loadu_ps(x + t * ldx + first + i));
}

/* Tokens run in groups of 8; x of a group is taken in pieces that stay in the first-level cache while the rows pass by. */
static void moqi_stream_512(const moqi_way *way, const moqi_tiled *p, int64_t row, int64_t rows, const float *x, int64_t ldx, int64_t m, float *y,
                            int64_t ldy, float *acc)
{
    moqi_stream_pass s;
    float *pack = acc + rows * 128;
    (void)way;
    float mul = p->scales && p->scale_dtype == MOQ_F8_E4M3 ? p->factor * 256 : p->factor;
    s.p = p;
    for (int i = 0; i < 16; i++) s.table[i] = p->table[i] - p->zero;
    for (int i = 0; i < 64; i++) s.lane[i] = p->shift < 9 ? (int32_t)(8 * i >> p->shift & 15) : 0;
    for (int64_t j = 0; j < m;) {
        int tokens = m - j >= 8 ? 8 : m - j >= 4 ? 4 : m - j >= 2 ? 2 : 1;
        int64_t piece = 8192 / tokens;
        memset(acc, 0, (size_t)(rows * tokens * 16) * sizeof *acc);
        for (s.first = 0; s.first < p->layer.cols; s.first = s.end) {
            s.end = moqi_min(p->layer.cols, s.first + piece);
            s.x = tokens == 1 ? x + j * ldx + s.first : pack;
            if (tokens > 1) moqi_stream_pack_512(x + j * ldx, ldx, tokens, s.first, s.end, pack);
            moqi_stream_rows_512(&s, row, rows, tokens, acc);
        }
        for (int t = 0; t < tokens; t++)
            for (int64_t r = 0; r < rows; r++) {
                float sum = moqi_stream_sum_512(acc + (r * tokens + t) * 16);
                y[(j + t) * ldy + r] = (p->bias ? p->bias[row + r] : 0) + mul * sum;
            }
        j += tokens;
    }
}

/* Two codes a byte and groups that lie as runs, of scales that it can expand. */
static int moqi_stream_takes_512(const moqi_tiled *p) { return p->form == MOQI_CODES_NIBBLES && p->requant <= 0; }

static const moqi_way moqi_stream_way_512 = {"codes in place", 0, moqi_stream_takes_512, moqi_stream_arrange_512, moqi_stream_512, NULL, NULL};
#endif

/* ------------------------------------------------------------------------------------------------
   >>panels          weights turned once for many inputs; which instruction set serves a layer
   A panel is decoded once and used for every row of x. Sums go along the columns in order: they depend on no thread and no task.
   ------------------------------------------------------------------------------------------------ */

/* How an instruction set joins. Weights lie in rows, but a vector unit wants neighbouring outputs in its lanes: so 32 rows by up to
   512 columns are decoded and turned into a panel, 32 bits of each row side by side,

       data[column / unit][32 rows][unit columns]           unit: 1 F32, 2 BF16, 4 INT8

   which serves multiply-adds (unit 1), dot products of pairs or of four bytes (AVX-VNNI, AVX-512 VNNI, NEON dotprod, bfdot) and tiles
   of AMX alike, because all of these take their second operand in that order. Per instruction set and number type there is one
   moqi_way with four functions:
       takes      is the layer of a form that decode knows, and how many rows of x make it worth while
       arrange    one row of x as 32-bit words in the order of the columns (what else a row needs, such as scales, behind them)
       decode     codes -> panel. moqi_panel_bare and moqi_decode_run give rows of F32 for every format there is; a decoder of its own
                  for 4-bit codes is worth it only where few rows of x share the panel
       block      y[j][r] += mul[r] * sum over the panel's columns of w[r] x[j]; rows past w->rows are not stored
   and moqi_panels drives them. The way's address goes into the list of its moqi_kernels, fastest first; nothing else changes. */

enum { MOQI_PANEL_ROWS = 32 };

typedef struct moqi_panel {
    const moqi_tiled *p;
    int64_t row, rows;        /* of the layer; up to 32 */
    int64_t col, n;           /* columns [col, col + n), n <= MOQI_TILE_COLS, col a multiple of it */
    float mul[MOQI_PANEL_ROWS]; /* what the numbers of a row are still to be multiplied with */
    uint32_t *data;           /* see above; up to 64 KB, zeros past n up to a multiple of 16 words */
    float *scale;             /* integers only: [columns / chunk][32] */
    int chunk;
    float *tile;              /* scratch: [16, 512] */
} moqi_panel;

/* y[m][rows] = bias, then every panel is added. A block of columns is walked through all rows of the task before the next, so that
   block of x stays in the second-level cache. */
static void moqi_panels(const moqi_way *way, const moqi_tiled *p, int64_t row, int64_t rows, const float *x, int64_t ldx, int64_t m, float *y,
                        int64_t ldy, float *scratch)
{
    moqi_panel w;
    w.p = p;
    w.tile = scratch;
    w.data = (uint32_t *)(void *)(scratch + MOQI_TILE_ROWS * MOQI_TILE_COLS);
    w.scale = (float *)(void *)(w.data + MOQI_PANEL_ROWS * MOQI_TILE_COLS);
    w.chunk = 0;
    for (int64_t j = 0; j < m; j++)
        for (int64_t r = 0; r < rows; r++) y[j * ldy + r] = p->bias ? p->bias[row + r] : 0;
    for (w.col = 0; w.col < p->layer.cols; w.col += MOQI_TILE_COLS)
        for (int64_t r = 0; r < rows; r += MOQI_PANEL_ROWS) {
            w.n = moqi_min(MOQI_TILE_COLS, p->layer.cols - w.col);
            w.row = row + r;
            w.rows = moqi_min(MOQI_PANEL_ROWS, rows - r);
            way->decode(&w);
            way->block(&w, x, ldx, m, y + r, ldy);
        }
}

/* The layer without the factors that need not enter the panel: mul takes a scale that is the same along the row, or the global one. */
static void moqi_panel_bare(moqi_panel *w, moqi_tiled *bare)
{
    const moqi_tiled *p = w->p;
    int whole = p->groups == 1 && !p->zeros && p->zero == 0 && p->scale_dtype != MOQ_NONE;
    *bare = *p;
    for (int64_t r = 0; r < MOQI_PANEL_ROWS; r++) w->mul[r] = 1;
    if (p->requant > 0) return;
    for (int64_t r = 0; r < w->rows; r++) {
        if (whole) moqi_run_scales(p->k, p, w->row + r, 0, 1, &w->mul[r]);
        else w->mul[r] = p->factor;
    }
    if (whole) bare->scale_dtype = MOQ_NONE;
    bare->factor = 1;
}

/* Rows [first, first + 16) of the panel as F32 in w->tile, zeros where there is no row or column. */
static void moqi_panel_rows(const moqi_panel *w, const moqi_tiled *bare, int64_t first)
{
    for (int64_t r = first; r < first + MOQI_TILE_ROWS; r++) {
        float *out = w->tile + (r - first) * MOQI_TILE_COLS;
        int64_t n = r < w->rows ? w->n : 0;
        if (n > 0) moqi_decode_run(w->p->k, bare, w->row + r, w->col, n, out);
        memset(out + n, 0, (size_t)(moqi_min(MOQI_TILE_COLS, (w->n + 63) / 64 * 64) - n) * sizeof *out);
        if (w->row + r + MOQI_TILE_ROWS < w->p->layer.rows) moqi_prefetch(w->p, w->row + r, w->col - w->n, w->n);
    }
}

/* Every form that tiles decode. */
static int moqi_panel_takes_any(const moqi_tiled *p) { return p->form != MOQI_CODES_SLOW; }

/* x as it is, zeros up to a multiple of 128. */
static void moqi_panel_copy(const moqi_tiled *p, const float *x, int64_t n, float *out)
{
    (void)p;
    if (out != x) memmove(out, x, (size_t)n * sizeof *x);
    for (int64_t i = n; i < (n + 127) / 128 * 128; i++) out[i] = 0;
}

/* ---- AVX-512: F32 ---- */

#ifdef MOQI_X86
/* 16 rows of 16 words turned: dst[c][r] = src[r][c]. */
MOQI_AVX512 static void moqi_turn_512(const void *src, int64_t lds, void *dst, int64_t ldd)
{
    __m512i a[16], b[16];
#define MOQI_LOAD(i) a[i] = _mm512_loadu_si512((const uint32_t *)src + (i) * lds);
#define MOQI_PAIR(i) b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]); b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
#define MOQI_FOUR(i) \
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]); a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]); \
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]); a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
#define MOQI_EIGHT(i) \
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88); b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
#define MOQI_LAST(i) \
    _mm512_storeu_si512((uint32_t *)dst + (i) * ldd, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88)); \
    _mm512_storeu_si512((uint32_t *)dst + (i + 8) * ldd, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
#define MOQI_ALL4(f, i, step) f(i) f(i + step) f(i + 2 * step) f(i + 3 * step)
    MOQI_ALL4(MOQI_LOAD, 0, 1) MOQI_ALL4(MOQI_LOAD, 4, 1) MOQI_ALL4(MOQI_LOAD, 8, 1) MOQI_ALL4(MOQI_LOAD, 12, 1)
    MOQI_ALL4(MOQI_PAIR, 0, 2) MOQI_ALL4(MOQI_PAIR, 8, 2)
    MOQI_ALL4(MOQI_FOUR, 0, 4)
    MOQI_ALL4(MOQI_EIGHT, 0, 1) MOQI_ALL4(MOQI_EIGHT, 8, 1)
    MOQI_ALL4(MOQI_LAST, 0, 1) MOQI_ALL4(MOQI_LAST, 4, 1)
#undef MOQI_LOAD
#undef MOQI_PAIR
#undef MOQI_FOUR
#undef MOQI_EIGHT
#undef MOQI_LAST
}

/* Any format through rows of F32. */
MOQI_AVX512 static void moqi_panel_f32_512(moqi_panel *w)
{
    moqi_tiled bare;
    moqi_panel_bare(w, &bare);
    for (int64_t h = 0; h < MOQI_PANEL_ROWS; h += 16) {
        moqi_panel_rows(w, &bare, h);
        for (int64_t c = 0; c < w->n; c += 16) moqi_turn_512(w->tile + c, MOQI_TILE_COLS, w->data + c * MOQI_PANEL_ROWS + h, MOQI_PANEL_ROWS);
    }
}

/* f for every token: `tokens` is a constant after inlining, so only the wanted ones stay. */
#define MOQI_TOKENS12(f) f(0) f(1) if (tokens > 2) { f(2) f(3) } if (tokens > 4) { f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11) }

/* Words [from, from + n) of a panel times 12, 4 or 2 rows of x; `valid` of them are stored. 24 accumulators, two loads of weights and
   12 broadcasts for 24 multiply-adds. */
MOQI_INLINE MOQI_AVX512 void moqi_panel_f32_tokens(const moqi_panel *w, int64_t from, int64_t n, const float *x, int64_t ldx, float *y,
                                                   int64_t ldy, int valid, int tokens)
{
    const float *d = (const float *)(const void *)w->data + from * MOQI_PANEL_ROWS, *x4 = x + 4 * ldx, *x8 = x + 8 * ldx;
    const __mmask16 some[2] = {(__mmask16)(w->rows >= 16 ? 0xffff : (1 << w->rows) - 1),
                               (__mmask16)(w->rows >= 32 ? 0xffff : w->rows > 16 ? (1 << (w->rows - 16)) - 1 : 0)};
    __m512 lo[12], hi[12], m0, m1;
#define MOQI_ZERO(t) lo[t] = hi[t] = _mm512_setzero_ps();
#define MOQI_FMA(t) { \
        __m512 v = _mm512_set1_ps(((t) < 4 ? x : (t) < 8 ? x4 : x8)[((t) & 3) * ldx + k]); \
        lo[t] = _mm512_fmadd_ps(w0, v, lo[t]); hi[t] = _mm512_fmadd_ps(w1, v, hi[t]); }
#define MOQI_STORE(t) if ((t) < valid) { \
        float *to = y + (t) * ldy; \
        _mm512_mask_storeu_ps(to, some[0], _mm512_fmadd_ps(lo[t], m0, _mm512_maskz_loadu_ps(some[0], to))); \
        _mm512_mask_storeu_ps(to + 16, some[1], _mm512_fmadd_ps(hi[t], m1, _mm512_maskz_loadu_ps(some[1], to + 16))); }
    MOQI_TOKENS12(MOQI_ZERO)
    for (int64_t k = 0; k < n; k++, d += MOQI_PANEL_ROWS) {
        __m512 w0 = _mm512_loadu_ps(d), w1 = _mm512_loadu_ps(d + 16);
        MOQI_TOKENS12(MOQI_FMA)
    }
    m0 = _mm512_loadu_ps(w->mul);
    m1 = _mm512_loadu_ps(w->mul + 16);
    MOQI_TOKENS12(MOQI_STORE)
#undef MOQI_ZERO
#undef MOQI_FMA
#undef MOQI_STORE
}

/* 256 columns at a time: 32 KB of the panel stay in the first-level cache while the rows of x pass by. */
MOQI_AVX512 static void moqi_block_f32_512(const moqi_panel *w, const float *x, int64_t ldx, int64_t m, float *y, int64_t ldy)
{
    for (int64_t k = 0; k < w->n; k += 256) {
        int64_t n = moqi_min(256, w->n - k), j = 0;
        const float *at = x + w->col + k;
        for (; j + 12 <= m; j += 12) moqi_panel_f32_tokens(w, k, n, at + j * ldx, ldx, y + j * ldy, ldy, 12, 12);
        for (; j + 4 <= m; j += 4) moqi_panel_f32_tokens(w, k, n, at + j * ldx, ldx, y + j * ldy, ldy, 4, 4);
        for (; j < m; j += 2) moqi_panel_f32_tokens(w, k, n, at + j * ldx, j + 1 < m ? ldx : 0, y + j * ldy, ldy, (int)moqi_min(2, m - j), 2);
    }
}

/* 4-bit codes are read in place for a few rows; other forms have no other way. */
static int moqi_panel_takes_f32_512(const moqi_tiled *p) { return !moqi_panel_takes_any(p) ? 0 : moqi_stream_takes_512(p) ? 17 : 2; }

static const moqi_way moqi_f32_way_512 = {"F32 panels", 1, moqi_panel_takes_f32_512, moqi_panel_copy, moqi_panels, moqi_panel_f32_512,
                                          moqi_block_f32_512};
#endif

/* ---- which instruction set ---- */

#ifdef MOQI_X86
static const moqi_way *const moqi_avx512_ways[] = {&moqi_stream_way_512, &moqi_f32_way_512, NULL};
static const moqi_kernels moqi_avx512_kernels = {"avx512", moqi_expand_512, moqi_nibbles_512, moqi_scale_512,
                                                 moqi_tile_512, moqi_dot_512, moqi_axpy_512, moqi_avx512_ways};
static const moqi_kernels moqi_avx2_kernels = {"avx2", moqi_expand_256, moqi_nibbles_256, moqi_scale_256,
                                               moqi_tile_256, moqi_dot_256, moqi_axpy_256, NULL};
#endif
#ifdef MOQI_ARM
static const moqi_kernels moqi_neon_kernels = {"neon", moqi_expand_neon, moqi_plain_nibbles, moqi_scale_neon,
                                               moqi_tile_neon, moqi_dot_neon, moqi_axpy_neon, NULL};
#endif

/* Every set, fastest first, and the features that it needs. "reference" is last and never the automatic choice. */
static const struct { const moqi_kernels *k; uint32_t needs; } moqi_kernel_sets[] = {
#ifdef MOQI_X86
    {&moqi_avx512_kernels, MOQI_CPU_AVX2 | MOQI_CPU_FMA | MOQI_CPU_F16C | MOQI_CPU_AVX512},
    {&moqi_avx2_kernels, MOQI_CPU_AVX2 | MOQI_CPU_FMA | MOQI_CPU_F16C},
#endif
#ifdef MOQI_ARM
    {&moqi_neon_kernels, MOQI_CPU_NEON},
#endif
    {&moqi_plain_kernels, 0},
    {&moqi_reference_kernels, 0}
};
enum { MOQI_KERNEL_SETS = (int)(sizeof moqi_kernel_sets / sizeof moqi_kernel_sets[0]) };

/* The sets that this machine can run -> their number. Asking the processor takes microseconds (a virtual machine traps it), so this
   runs once for each backend. */
static int moqi_list_kernels(const moqi_kernels *found[MOQI_KERNEL_SETS])
{
    uint32_t flags = moqi_cpu_flags();
    int count = 0;
    for (int i = 0; i < MOQI_KERNEL_SETS; i++)
        if ((flags & moqi_kernel_sets[i].needs) == moqi_kernel_sets[i].needs) found[count++] = moqi_kernel_sets[i].k;
    return count;
}

/* The i-th of them, or NULL. */
static const moqi_kernels *moqi_get_kernels(int i)
{
    const moqi_kernels *found[MOQI_KERNEL_SETS];
    return i >= 0 && i < moqi_list_kernels(found) ? found[i] : NULL;
}

/* Each part gets the ways of its kernel set that take it, in ascending order of the rows of x that they are for; of two for the same
   number the first of the list. */
static void moqi_choose_ways(moqi_tiled *p)
{
    int count = 0;
    for (const moqi_way *const *w = p->k->ways; w && *w; w++) {
        int from = (*w)->takes(p), at = 0;
        if (from < 1) continue;
        while (at < count && p->from[at] < from) at++;
        if (at >= MOQI_WAYS || (at < count && p->from[at] == from)) continue;
        count = count < MOQI_WAYS ? count + 1 : MOQI_WAYS;
        for (int i = count - 1; i > at; i--) { p->way[i] = p->way[i - 1]; p->from[i] = p->from[i - 1]; }
        p->way[at] = *w;
        p->from[at] = from;
    }
}

#if defined(__clang__)
#pragma clang diagnostic pop
#elif defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

/* ------------------------------------------------------------------------------------------------
   >>layers          the CPU backend's memory, its layers and their products
   Work is cut into fixed tiles, each computed wholly by one task: results do not depend on the number of workers. Memory is
   taken when something is prepared, never while it runs.
   ------------------------------------------------------------------------------------------------ */

/* ---- the backend object ----
   Running must not allocate and must not fail. So every prepare adds what a call of one row will need to moqi_need, and one block of
   scratch memory is laid out for max_rows rows of the largest of everything; a call with more rows is cut into pieces of max_rows.
   Cutting changes no result but for the order of sums, where a few rows are multiplied in another way than many. */

/* Room that everything prepared so far needs; counts of F32 unless said otherwise. */
typedef struct moqi_need {
    int64_t worker;             /* per worker */
    int64_t cols, rank;         /* per row: inputs, low-rank middle */
    int64_t moe_cols, moe_rank, moe_hidden, moe_out, moe_top; /* per row of a mixture of experts */
    int64_t experts, jobs;      /* numbers of them */
} moqi_need;

/* One matrix product of a launch: y[m][part rows] = x W^T + mid B^T + bias. */
typedef struct moqi_job {
    const moqi_tiled *part;
    const float *x;             /* [m, ldx] as the part's codes want it */
    const float *t;             /* [m, ldx] before rounding, for the low-rank branch */
    float *mid;                 /* [m, rank padded to 16] */
    float *y;                   /* [m, ldy] */
    int64_t ldx, ldy, m, first; /* first: index of its first task */
} moqi_job;

/* The context behind the table. */
typedef struct moqi_cpu {
    moq_backend be;
    moq_allocator a;
    moq_parallel par;
    moqi_pool *pool;            /* NULL: one thread, or the caller's job system */
    const moqi_kernels *k;
    moq_act act;
    moqi_need need;
    uint8_t *scratch;
    size_t scratch_bytes;
    int64_t moe_rows;           /* rows of one pass through a mixture of experts */
    float *worker, *t, *r, *mid, *hidden, *out, *weight; /* in scratch */
    int32_t *index, *place, *row_of, *expert_of, *begin;
    moqi_job *jobs;             /* [2 * need.jobs]: products, then their low-rank branches */
} moqi_cpu;

/* A caller may wrap the table and call with a copy of it, so the object is always reached through ctx. */
static moqi_cpu *moqi_cpu_of(const moq_backend *be) { return (moqi_cpu *)be->ctx; }

typedef void (*moqi_task_fn)(void *arg, int index, int worker);

/* Small work is not worth waking anybody. work: multiplications or so, in all. */
static void moqi_run(const moqi_cpu *c, int64_t tasks, double work, moqi_task_fn task, void *arg)
{
    if (tasks > 1 && c->par.workers > 1 && work > 30000) c->par.run(c->par.user, (int)tasks, task, arg);
    else for (int64_t i = 0; i < tasks; i++) task(arg, (int)i, 0);
}

/* Hands out one scratch block piece by piece; with at NULL it only measures. */
typedef struct moqi_carver { uint8_t *at; uint64_t bytes; int overflow; } moqi_carver;

/* The next a * b elements, at a multiple of 64 bytes. */
static void *moqi_carve(moqi_carver *v, int64_t a, int64_t b, size_t size)
{
    uint64_t n, start = v->bytes;
    if (!moqi_mul((uint64_t)a, (uint64_t)b, &n) || !moqi_mul(n, size, &n) || !moqi_add(n, 63, &n)) v->overflow = 1;
    else if (!moqi_add(start, n & ~(uint64_t)63, &v->bytes)) v->overflow = 1;
    return v->at ? v->at + start : NULL;
}

/* The layout of the scratch block. Layers, experts and attention never run at the same time, so they share the workers' part
   and the rows t and r; a pass through experts is at most 256 rows, or a long prefill would need gigabytes. */
static void moqi_carve_all(moqi_cpu *c, moqi_carver *v)
{
    const moqi_need *n = &c->need;
    int64_t rows = c->be.max_rows, moe = n->moe_top > 0 ? moqi_min(rows, 256) : 0;
    c->moe_rows = moe;
    c->worker = (float *)moqi_carve(v, c->par.workers, n->worker, 4);
    c->t = (float *)moqi_carve(v, 1, moqi_max(rows * n->cols, moe * n->moe_cols), 4);
    c->r = (float *)moqi_carve(v, 1, moqi_max(rows * n->cols, moe * n->moe_cols), 4);
    c->mid = (float *)moqi_carve(v, 1, moqi_max(rows * n->rank, moe * n->moe_rank), 4);
    c->hidden = (float *)moqi_carve(v, moe, n->moe_hidden, 4);
    c->out = (float *)moqi_carve(v, moe, n->moe_out, 4);
    c->weight = (float *)moqi_carve(v, moe, n->moe_top, 4);
    c->index = (int32_t *)moqi_carve(v, moe, n->moe_top, 4);
    c->place = (int32_t *)moqi_carve(v, moe, n->moe_top, 4);
    c->row_of = (int32_t *)moqi_carve(v, moe, n->moe_top, 4);
    c->expert_of = (int32_t *)moqi_carve(v, moe, n->moe_top, 4);
    c->begin = (int32_t *)moqi_carve(v, 1, n->experts + 1, 4);
    c->jobs = (moqi_job *)moqi_carve(v, 2, n->jobs, sizeof *c->jobs);
}

/* Room for `need` and `rows` on top of what there is; nothing changes on failure. */
static moq_result moqi_grow(moqi_cpu *c, const moqi_need *need, int32_t rows, moq_error *err)
{
    moqi_cpu was = *c;
    moqi_carver v = {NULL, 0, 0};
    const int64_t *more = (const int64_t *)(const void *)need;
    int64_t *have = (int64_t *)(void *)&c->need;
    for (size_t i = 0; i < sizeof *need / sizeof *more; i++) have[i] = moqi_max(have[i], more[i]);
    c->be.max_rows = rows;
    moqi_carve_all(c, &v);
    if (v.overflow || v.bytes > SIZE_MAX / 2) {
        *c = was;
        return moqi_fail(err, MOQ_E_OVERFLOW, moqi_at(NULL, NULL, NULL, -1),
                         "scratch memory for %d rows does not fit the address space; reserve fewer", (int)rows);
    }
    if (v.bytes + 64 > c->scratch_bytes) {
        v.at = (uint8_t *)moq_allocate(&c->a, (size_t)v.bytes + 64);
        if (!v.at) { *c = was; return moqi_nomem(err, v.bytes + 64); }
        moq_release(&c->a, c->scratch, c->scratch_bytes);
        c->scratch = v.at;
        c->scratch_bytes = (size_t)v.bytes + 64;
    }
    /* vector loads that cross a cache line take twice as long, and an allocator promises 16 bytes at most */
    v.at = c->scratch ? c->scratch + (64 - (uintptr_t)c->scratch % 64) % 64 : NULL;
    v.bytes = 0;
    if (v.at) moqi_carve_all(c, &v);
    return MOQ_OK;
}

/* Only max_rows changes: the needs of what is prepared are remembered. */
static moq_result moqi_cpu_reserve(moq_backend *be, int32_t rows, moq_error *err)
{
    moqi_need none;
    memset(&none, 0, sizeof none);
    moqi_clear(err);
    if (rows < 1) return moqi_fail(err, MOQ_E_ARG, moqi_at(NULL, NULL, NULL, -1), "reserve of %d rows, expected at least 1", (int)rows);
    moq_result r = moqi_grow(moqi_cpu_of(be), &none, rows, err);
    be->max_rows = moqi_cpu_of(be)->be.max_rows;
    return r;
}

/* ---- layers ---- */

/* What moq_weight points to. */
typedef struct moqi_weight {
    moqi_arena arena;           /* holds this struct too */
    int32_t parts;
    int64_t rows, cols;
    moqi_tiled *part;
} moqi_weight;

/* Does this backend round the layer's inputs? */
static int moqi_wants_rounding(const moqi_cpu *c, const moq_linear *w)
{
    if (c->act == MOQ_ACT_WIDE || w->scheme.input.elem == MOQ_NONE) return 0;
    return c->act == MOQ_ACT_STORED || (moqi_is_int(w->scheme.input.elem) && moqi_rounds_input(w));
}

/* Everything that could go wrong later is refused here, with the layer's name: running never fails. */
static moq_result moqi_cpu_supports(moq_backend *be, const moq_linear *w, moq_error *err)
{
    const moqi_cpu *c = moqi_cpu_of(be);
    const moq_scheme *s = &w->scheme;
    moqi_where at = moqi_at(NULL, "layer", w->name ? w->name : "", -1);
    int64_t size = w->hadamard_size, rank = s->lora_rank;
    moqi_clear(err);
    if (w->experts > 0) return moqi_fail(err, MOQ_E_ARG, at, "a stack of %d experts; take one with moq_slice_expert", (int)w->experts);
    if (w->rows < 1 || w->cols < 1 || w->cols > INT32_MAX || w->rows > INT32_MAX || !w->codes.data)
        return moqi_fail(err, MOQ_E_ARG, at, "no weights: shape [%lld, %lld]", (long long)w->rows, (long long)w->cols);
    moq_dtype e = s->weight.elem;
    if (!moqi_is_int(e) && e != MOQ_F4 && e != MOQ_F6_E2M3 && e != MOQ_F6_E3M2 && e != MOQ_F8_E4M3 && e != MOQ_BF16 && e != MOQ_F16 && e != MOQ_F32)
        return moqi_fail(err, MOQ_E_UNSUPPORTED, at, "weights of type %s; known are integers to 8 bits, F4, F6, F8, BF16, F16, F32",
                         moq_dtype_name(e));
    if (s->weight.scale != MOQ_NONE && !w->scales.data)
        return moqi_fail(err, MOQ_E_MISSING, at, "%s scales are named by the scheme, but absent", moq_dtype_name(s->weight.scale));
    if (moqi_wants_rounding(c, w) && moqi_largest(s->input.elem) <= 0)
        return moqi_fail(err, MOQ_E_UNSUPPORTED, at, "inputs of type %s cannot be rounded here; use wide activations", moq_dtype_name(s->input.elem));
    if (moqi_wants_rounding(c, w) && !moqi_rounds_input(w))
        return moqi_fail(err, MOQ_E_MISSING, at, "%s inputs need an input_scale greater than 0, found %g; use wide activations",
                         moq_dtype_name(s->input.elem), (double)w->input_scale);
    if (size < 0 || (size > 0 && (w->cols % size != 0 || w->col_first % size != 0)))
        return moqi_fail(err, MOQ_E_SHAPE, at, "%lld columns from %lld, expected multiples of the input rotation's %lld", (long long)w->cols,
                         (long long)w->col_first, (long long)size);
    if (size > 0 && (w->hadamard.data ? w->hadamard.count != (uint64_t)size * (uint64_t)size : (size & (size - 1)) != 0))
        return moqi_fail(err, MOQ_E_SHAPE, at, "the input rotation is no [%lld, %lld] matrix and no power of two", (long long)size, (long long)size);
    if (w->lora_a.data && (rank < 1 || !w->lora_b.data || w->lora_a.count % (uint64_t)rank != 0 || w->lora_b.count % (uint64_t)rank != 0))
        return moqi_fail(err, MOQ_E_SHAPE, at, "low-rank tensors of %llu and %llu elements, expected a multiple of the rank %lld",
                         (unsigned long long)w->lora_a.count,
                         (unsigned long long)w->lora_b.count, (long long)rank);
    if (w->lora_a.data && (w->col_first + w->cols > (int64_t)w->lora_a.count / rank || w->row_first + (w->rows - 1) * w->row_step >= (int64_t)w->lora_b.count / rank))
        return moqi_fail(err, MOQ_E_SHAPE, at, "the low-rank tensors end before the slice of the layer");
    return MOQ_OK;
}

/* Kernel, format, how the weights are read, what happens to the inputs. */
static size_t moqi_cpu_explain(moq_backend *be, const moq_linear *w, char *text, size_t capacity)
{
    const moqi_cpu *c = moqi_cpu_of(be);
    char scheme[80];
    moq_error err;
    if (moqi_cpu_supports(be, w, &err) < 0) return moqi_format(text, capacity, "none: %s", err.text);
    moq_scheme_name(&w->scheme, scheme, sizeof scheme);
    const char *how = c->k == &moqi_reference_kernels ? "rows dequantized to F32" : "decoded to F32 by tiles";
    if (moqi_wants_rounding(c, w)) return moqi_format(text, capacity, "%s: %s %s, inputs rounded to %s as stored", c->k->name, scheme, how,
                                                      moq_dtype_name(w->scheme.input.elem));
    if (w->scheme.input.elem == MOQ_NONE) return moqi_format(text, capacity, "%s: %s %s", c->k->name, scheme, how);
    return moqi_format(text, capacity, "%s: %s %s, wide inputs (%s: no %s arithmetic here)", c->k->name, scheme, how,
                       c->act == MOQ_ACT_WIDE ? "asked for" : "automatic", moq_dtype_name(w->scheme.input.elem));
}

/* Codes, groups and zero points of one part. */
static moq_result moqi_prepare_codes(const moqi_cpu *c, moqi_tiled *p, moqi_arena *r)
{
    const moq_linear *w = &p->layer;
    int32_t *where = NULL;
    if (!moqi_choose_form(p) || c->k == &moqi_reference_kernels || !moqi_choose_groups(p)) p->form = MOQI_CODES_SLOW;
    moq_result rc = moqi_order_columns(p, r, &where);
    if (rc < 0 || p->form == MOQI_CODES_SLOW) return rc;
    if ((rc = moqi_take_groups(p, r)) < 0) return rc;
    if (moqi_use_codes(p)) return rc;
    moqi_repack t;
    p->row_bytes = p->form == MOQI_CODES_NIBBLES ? moqi_ceil_div(w->cols, 2) : w->cols * (moq_dtype_bits(p->dtype) / 8);
    t.part = p;
    t.where = where;
    t.out = (uint8_t *)moqi_take_array(r, (uint64_t)w->rows, (size_t)p->row_bytes);
    if (!t.out) return MOQ_E_NOMEM;
    moqi_run(c, moqi_ceil_div(w->rows, 16), (double)w->rows * (double)w->cols, moqi_repack_rows, &t);
    p->codes = t.out;
    return MOQ_OK;
}

/* A matrix of the low-rank branch as a part of its own. */
static moqi_tiled *moqi_prepare_lora(const moqi_cpu *c, const moq_view *v, int64_t stored_cols, const moq_linear *part, moqi_arena *r)
{
    moqi_tiled *p = (moqi_tiled *)moqi_take(r, sizeof *p, 16);
    if (!p) return NULL;
    p->k = c->k;
    moq_make_linear(&p->layer, "", v->dtype, v->data, (int64_t)v->count / stored_cols, stored_cols);
    p->layer.rows = part->rows;
    p->layer.cols = part->cols;
    p->layer.row_first = part->row_first;
    p->layer.row_step = part->row_step;
    p->layer.col_first = part->col_first;
    return p->layer.cols > 0 && moqi_prepare_codes(c, p, r) == MOQ_OK ? p : NULL;
}

/* To how many bits may this part's inputs be rounded, if that is what the fast instructions take? */
static int moqi_input_bits(const moqi_cpu *c, const moqi_tiled *p)
{
    const moq_scheme *s = &p->layer.scheme;
    if (c->act != MOQ_ACT_AUTO || p->rounds || s->weight.scale == MOQ_NONE) return 32;
    return s->input.elem == MOQ_NONE ? 16 : 8;
}

/* Small vectors are copied as F32; matrices stay where they are, the two of the low-rank branch too. */
static moq_result moqi_prepare_part(const moqi_cpu *c, const moq_linear *w, moqi_arena *r, moqi_tiled *p)
{
    int64_t rank = w->scheme.lora_rank;
    p->layer = *w;
    p->rounds = moqi_wants_rounding(c, w);
    p->requant = p->rounds && c->act == MOQ_ACT_STORED ? w->requant_scale : 0;
    p->k = c->k;
    p->input_bits = moqi_input_bits(c, p);
    moq_result rc = moqi_prepare_codes(c, p, r);
    if (rc < 0) return rc;
    moqi_choose_ways(p);
    if (w->bias.data && !(p->bias = moqi_take_floats(r, &w->bias, w->row_first, w->row_step, w->rows))) return MOQ_E_NOMEM;
    if (w->pre_quant_scale.data && !(p->smooth = moqi_take_floats(r, &w->pre_quant_scale, w->col_first, 1, w->cols))) return MOQ_E_NOMEM;
    if (w->hadamard.data && !(p->rotation = moqi_take_floats(r, &w->hadamard, 0, 1, (int64_t)w->hadamard.count))) return MOQ_E_NOMEM;
    if (!w->lora_a.data) return MOQ_OK;
    /* slices: A [rank, cols] keeps the layer's columns, B [rows, rank] its rows */
    moq_linear a = *w, b = *w;
    a.rows = b.cols = rank;
    a.row_first = b.col_first = 0;
    a.row_step = 1;
    p->lora_a = moqi_prepare_lora(c, &w->lora_a, (int64_t)w->lora_a.count / rank, &a, r);
    p->lora_b = moqi_prepare_lora(c, &w->lora_b, rank, &b, r);
    if (!p->lora_a || !p->lora_b) return MOQ_E_NOMEM;
    return MOQ_OK;
}

/* Would both parts turn the same x into the same numbers? */
static int moqi_same_feed(const moqi_tiled *a, const moqi_tiled *b)
{
    const moq_linear *u = &a->layer, *v = &b->layer;
    const moq_coding *p = &u->scheme.input, *q = &v->scheme.input;
    if (memcmp(a->way, b->way, sizeof a->way) != 0 || memcmp(a->from, b->from, sizeof a->from) != 0) return 0;
    if (moqi_is_plain(a) != moqi_is_plain(b) || (a->way[0] && (a->form != b->form || a->shift != b->shift))) return 0;
    if (a->rounds != b->rounds || a->order || b->order || u->hadamard_size != v->hadamard_size || u->cols != v->cols) return 0;
    if (!moqi_same_bytes(&u->hadamard_scale, &v->hadamard_scale, 4) || !moqi_same_bytes(a->smooth, b->smooth, (size_t)u->cols * 4)) return 0;
    if (!moqi_same_bytes(a->rotation, b->rotation, (size_t)u->hadamard_size * (size_t)u->hadamard_size * 4)) return 0;
    if (!a->rounds) return 1;
    if (p->elem != q->elem || p->group_cols != q->group_cols || p->scale != q->scale || p->rule != q->rule) return 0;
    if (p->has_global != q->has_global || p->dynamic != q->dynamic || p->zero_point != q->zero_point) return 0;
    return u->input_zero == v->input_zero && moqi_same_bytes(&u->input_scale, &v->input_scale, 4);
}

/* Room of one part for calls of one row; `copies` rows of it are live at once. */
static void moqi_need_part(moqi_need *n, const moqi_tiled *p)
{
    int64_t cols = moqi_pad_x(p->layer.cols), rank = p->lora_a ? moqi_pad16(p->layer.scheme.lora_rank) : 0;
    int64_t tile = MOQI_TILE_ROWS * (int64_t)MOQI_TILE_COLS;
    if (p->form == MOQI_CODES_SLOW || (p->lora_a && p->lora_a->form == MOQI_CODES_SLOW)) tile = moqi_max(tile, MOQI_SLOW_ROWS * cols);
    if (p->way[0]) tile = moqi_max(tile, MOQI_WAY_FLOATS);
    n->worker = moqi_pad16(moqi_max(n->worker, moqi_max(tile, MOQI_TILE_ROWS * rank)));
    n->cols = moqi_max(n->cols, cols);
    n->rank = moqi_max(n->rank, rank);
}

/* All memory of an arena, its slack included. */
static size_t moqi_arena_bytes(const moqi_arena *r)
{
    size_t bytes = 0;
    for (const moqi_block *b = r->head; b; b = b->next) bytes += b->bytes;
    return bytes;
}

/* The weight owns one arena; growing the scratch block comes last, so a failure leaves the backend as it was. */
static moq_weight *moqi_cpu_prepare_linear(moq_backend *be, const moq_linear *layers, int32_t parts, moq_error *err)
{
    moqi_cpu *c = moqi_cpu_of(be);
    moqi_need need;
    moqi_arena r = moqi_arena_make(&c->a);
    moq_result rc = MOQ_OK;
    moqi_clear(err);
    memset(&need, 0, sizeof need);
    if (parts < 1) { moqi_fail(err, MOQ_E_ARG, moqi_at(NULL, NULL, NULL, -1), "no layers to prepare"); return NULL; }
    for (int32_t i = 0; i < parts; i++) {
        if (moqi_cpu_supports(be, &layers[i], err) < 0) return NULL;
        if (layers[i].cols != layers[0].cols) {
            moqi_fail(err, MOQ_E_SHAPE, moqi_at(NULL, "layer", layers[i].name, -1),
                      "%lld columns beside %lld of '%q': fused layers share their input",
                      (long long)layers[i].cols, (long long)layers[0].cols, layers[0].name);
            return NULL;
        }
    }
    moqi_weight *w = (moqi_weight *)moqi_take(&r, sizeof *w, 16);
    moqi_tiled *p = (moqi_tiled *)moqi_take_array(&r, (uint64_t)parts, sizeof *p);
    if (!w || !p) rc = MOQ_E_NOMEM;
    for (int32_t i = 0; rc == MOQ_OK && i < parts; i++) {
        rc = moqi_prepare_part(c, &layers[i], &r, &p[i]);
        p[i].shares = i > 0 && rc == MOQ_OK && moqi_same_feed(&p[i - 1], &p[i]);
        if (rc == MOQ_OK) moqi_need_part(&need, &p[i]);
    }
    need.rank *= parts; /* the middles of parts that share their input are live together */
    need.jobs = parts;
    if (rc < 0) moqi_nomem(err, 0);
    else rc = moqi_grow(c, &need, c->be.max_rows, err);
    if (rc < 0) { moqi_arena_drop(&r); return NULL; }
    w->part = p;
    w->parts = parts;
    w->cols = layers[0].cols;
    for (int32_t i = 0; i < parts; i++) w->rows += layers[i].rows;
    w->arena = r;
    return (moq_weight *)(void *)w;
}

static void moqi_cpu_release_weight(moq_backend *be, moq_weight *weight)
{
    (void)be;
    if (!weight) return;
    moqi_arena r = ((moqi_weight *)(void *)weight)->arena;
    moqi_arena_drop(&r);
}

static size_t moqi_cpu_weight_bytes(const moq_backend *be, const moq_weight *weight)
{
    (void)be;
    return weight ? moqi_arena_bytes(&((const moqi_weight *)(const void *)weight)->arena) : 0;
}

/* ---- running products ----
   A launch is a list of jobs (parts of a fused layer, or chosen experts) whose tiles are numbered through and handed to the workers.
   Each tile writes 16 columns of y from its bias to its last product, so no two tasks touch the same number and nothing is summed
   across tasks. The low-rank branch of SVDQuant is two more matrices: A runs first, for all jobs, and B is added inside of each tile. */

/* One parallel run over the tiles of several products. */
typedef struct moqi_launch { const moqi_cpu *c; const moqi_job *jobs; int64_t count; } moqi_launch;

/* One tile of rows of one job: bias, then the weights, then the low-rank branch. */
static void moqi_product_task(void *arg, int index, int worker)
{
    const moqi_launch *l = (const moqi_launch *)arg;
    int64_t lo = 0, hi = l->count;
    while (hi - lo > 1) {
        int64_t mid = (lo + hi) / 2;
        if (l->jobs[mid].first <= index) lo = mid;
        else hi = mid;
    }
    const moqi_job *j = &l->jobs[lo];
    const moqi_tiled *p = j->part;
    const moqi_way *way = moqi_way_for(p, j->m);
    int64_t tile = moqi_tile_rows(p, j->m, l->c->par.workers), row = (index - j->first) * tile, rows = moqi_min(tile, p->layer.rows - row);
    float *scratch = l->c->worker + worker * l->c->need.worker, *y = j->y + row;
    if (way) way->multiply(way, p, row, rows, j->x, j->ldx, j->m, y, j->ldy, scratch);
    for (int64_t i = 0; i < j->m && !way; i++)
        for (int64_t r = 0; r < rows; r++) y[i * j->ldy + r] = p->bias ? p->bias[row + r] : 0;
    if (!way) moqi_multiply(l->c->k, p, row, rows, j->x, j->ldx, j->m, y, j->ldy, scratch);
    if (p->lora_b) moqi_multiply(l->c->k, p->lora_b, row, rows, j->mid, moqi_pad16(p->lora_b->layer.cols), j->m, y, j->ldy, scratch);
}

/* Tiles of all jobs are numbered through. A tile is 16 rows of weights for all rows of x: decoded once, used m times. */
static void moqi_launch_jobs(const moqi_cpu *c, moqi_job *jobs, int64_t count)
{
    moqi_launch l;
    int64_t tasks = 0;
    double work = 0;
    for (int64_t i = 0; i < count; i++) {
        const moq_linear *w = &jobs[i].part->layer;
        jobs[i].first = tasks;
        tasks += moqi_ceil_div(w->rows, moqi_tile_rows(jobs[i].part, jobs[i].m, c->par.workers));
        work += (double)w->rows * (double)w->cols * (double)jobs[i].m;
    }
    l.c = c;
    l.jobs = jobs;
    l.count = count;
    if (count > 0) moqi_run(c, tasks, work, moqi_product_task, &l);
}

/* All products of jobs[0..count) after the low-rank middles they need. */
static void moqi_products(const moqi_cpu *c, int64_t count)
{
    moqi_job *jobs = c->jobs, *low = c->jobs + c->need.jobs;
    float *mid = c->mid;
    int64_t branches = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!jobs[i].part->lora_a) continue;
        int64_t ld = moqi_pad16(jobs[i].part->lora_b->layer.cols);
        memset(mid, 0, (size_t)(jobs[i].m * ld) * sizeof *mid);
        low[branches] = jobs[i];
        low[branches].part = jobs[i].part->lora_a;
        low[branches].x = jobs[i].t;
        low[branches].y = jobs[i].mid = mid;
        low[branches++].ldy = ld;
        mid += jobs[i].m * ld;
    }
    moqi_launch_jobs(c, low, branches);
    moqi_launch_jobs(c, jobs, count);
}

/* Arguments of moqi_feed_task. x: [rows, cols] */
typedef struct moqi_feeding { const moqi_cpu *c; const moqi_tiled *part; const float *x; int64_t m; } moqi_feeding;

/* One row of x into t and r. */
static void moqi_feed_task(void *arg, int index, int worker)
{
    const moqi_feeding *f = (const moqi_feeding *)arg;
    int64_t cols = f->part->layer.cols, ld = moqi_pad_x(cols);
    (void)worker;
    moqi_feed(f->part, f->m, f->x + index * cols, f->c->t + index * ld, f->c->r + index * ld);
}

/* Can the rows of x be read where they are? */
static int moqi_direct(const moqi_tiled *p, int64_t m)
{
    return !moqi_way_for(p, m) && !p->rounds && !p->order && !p->smooth && p->layer.hadamard_size == 0 && p->layer.cols % 16 == 0;
}

/* Parts that read the same inputs run as one launch; a part with inputs of its own begins the next. */
static void moqi_cpu_linear(moq_backend *be, const moq_weight *weight, const void *x, int32_t rows, void *y)
{
    const moqi_cpu *c = moqi_cpu_of(be);
    const moqi_weight *w = (const moqi_weight *)(const void *)weight;
    for (int64_t first = 0; first < rows; first += c->be.max_rows) {
        int64_t m = moqi_min(rows - first, c->be.max_rows), out = 0;
        moqi_feeding f;
        f.c = c;
        f.m = m;
        f.x = (const float *)x + first * w->cols;
        for (int32_t i = 0, next; i < w->parts; i = next) {
            int direct = moqi_direct(&w->part[i], m);
            f.part = &w->part[i];
            if (!direct) moqi_run(c, m, (double)m * (double)w->cols * 8, moqi_feed_task, &f);
            for (next = i; next < w->parts && (next == i || w->part[next].shares); next++) {
                moqi_job *j = &c->jobs[next - i];
                j->part = &w->part[next];
                j->x = direct ? f.x : c->r;
                j->t = direct ? f.x : c->t;
                j->ldx = direct ? w->cols : moqi_pad_x(w->cols);
                j->y = (float *)y + first * w->rows + out;
                j->ldy = w->rows;
                j->m = m;
                out += w->part[next].layer.rows;
            }
            moqi_products(c, next - i);
        }
    }
}

/* Arguments of moqi_embed_task. y: [count, cols] */
typedef struct moqi_embedding { const moq_linear *table; const int32_t *ids; float scale; float *y; } moqi_embedding;

/* An id outside of the table gives a row of zeros. */
static void moqi_embed_task(void *arg, int index, int worker)
{
    const moqi_embedding *e = (const moqi_embedding *)arg;
    int64_t cols = e->table->cols;
    float *y = e->y + index * cols;
    (void)worker;
    if (e->ids[index] < 0 || e->ids[index] >= e->table->rows) { memset(y, 0, (size_t)cols * sizeof *y); return; }
    moq_dequantize(e->table, e->ids[index], 1, y);
    for (int64_t i = 0; e->scale != 1 && i < cols; i++) y[i] *= e->scale;
}

/* Exact rows: an embedding is looked up, not multiplied, so there is nothing to gain from tiles. */
static void moqi_cpu_embed(moq_backend *be, const moq_weight *weight, const int32_t *ids, int32_t count, float scale, void *y)
{
    moqi_embedding e;
    e.table = &((const moqi_weight *)(const void *)weight)->part[0].layer;
    e.ids = ids;
    e.scale = scale;
    e.y = (float *)y;
    moqi_run(moqi_cpu_of(be), count, (double)count * (double)e.table->cols * 8, moqi_embed_task, &e);
}

/* ------------------------------------------------------------------------------------------------
   >>ssm             state-space mixers and copies on the CPU
   A task is one group of one call: it owns the group's heads, states and norm, so results do not depend on the number of workers.
   ------------------------------------------------------------------------------------------------ */

/* ---- the object ----
   One block of memory: the struct, the vectors as F32, then of every slot the last conv - 1 inputs of the convolution
   [slots, width, conv - 1] and the states [slots, heads, head_dim, state]. */
typedef struct moqi_ssm {
    moq_ssm_desc desc;
    size_t bytes;
    int64_t inner, width;       /* heads * head_dim; inner + 2 groups * state */
    float *taps, *conv_bias;    /* [width, conv], [width] */
    float *dt_bias, *decay, *d; /* [heads]; decay = -exp(a_log) */
    float *norm;                /* [inner] */
    float *past, *states;
} moqi_ssm;

/* A vector of the description has this many elements of a type that can be read. */
static moq_result moqi_check_ssm_view(const moq_ssm_desc *d, const char *what, const moq_view *v, uint64_t count, moq_error *err)
{
    float probe;
    if (v->data && v->count == count && moq_to_f32(v->dtype, v->data, 1, &probe)) return MOQ_OK;
    return moqi_fail(err, MOQ_E_SHAPE, moqi_at(NULL, "layer", d->name ? d->name : "", -1), "%s has %llu values of type %s, expected %llu of BF16, F16 or F32",
                     what, (unsigned long long)(v->data ? v->count : 0), moq_dtype_name(v->dtype), (unsigned long long)count);
}

/* Sizes of one object, or why there is none. */
static moq_result moqi_ssm_plan(const moq_ssm_desc *d, moqi_ssm *s, moq_error *err)
{
    moqi_where at = moqi_at(NULL, "layer", d->name ? d->name : "", -1);
    uint64_t values, past, states, bytes;
    memset(s, 0, sizeof *s);
    s->desc = *d;
    if (d->slots < 1 || d->heads < 1 || d->head_dim < 1 || d->state < 1 || d->groups < 1 || d->conv < 1 || d->heads % d->groups)
        return moqi_fail(err, MOQ_E_ARG, at, "a mixer of %d slots, %d heads of %d, %d states, %d groups, %d taps cannot be made", (int)d->slots,
                         (int)d->heads, (int)d->head_dim, (int)d->state, (int)d->groups, (int)d->conv);
    /* x, B and C of all groups pass through one convolution */
    s->inner = (int64_t)d->heads * d->head_dim;
    s->width = s->inner + 2 * (int64_t)d->groups * d->state;
    int fits = s->inner < INT32_MAX && s->width < INT32_MAX && moqi_mul((uint64_t)s->width, (uint64_t)d->conv + 1, &values) &&
        moqi_add(values, (uint64_t)s->inner + 3 * (uint64_t)d->heads, &values) && moqi_mul((uint64_t)s->width, (uint64_t)d->conv - 1, &past) &&
        moqi_mul(past, (uint64_t)d->slots, &past) && moqi_mul((uint64_t)s->inner, (uint64_t)d->state, &states) &&
        moqi_mul(states, (uint64_t)d->slots, &states) && moqi_add(values, past, &bytes) && moqi_add(bytes, states, &bytes) &&
        moqi_mul(bytes, sizeof(float), &bytes) && moqi_add(bytes, sizeof *s, &bytes) && bytes < SIZE_MAX / 2;
    if (!fits) return moqi_fail(err, MOQ_E_OVERFLOW, at, "the states of %d slots do not fit the address space", (int)d->slots);
    s->bytes = (size_t)bytes;
    return MOQ_OK;
}

/* Every vector has the length that the sizes ask for. */
static moq_result moqi_check_ssm(const moqi_ssm *s, moq_error *err)
{
    const moq_ssm_desc *d = &s->desc;
    uint64_t width = (uint64_t)s->width, heads = (uint64_t)d->heads;
    moq_result rc = moqi_check_ssm_view(d, "conv_weight", &d->conv_weight, width * (uint64_t)d->conv, err);
    if (rc == MOQ_OK && d->conv_bias.data) rc = moqi_check_ssm_view(d, "conv_bias", &d->conv_bias, width, err);
    if (rc == MOQ_OK) rc = moqi_check_ssm_view(d, "dt_bias", &d->dt_bias, heads, err);
    if (rc == MOQ_OK) rc = moqi_check_ssm_view(d, "a_log", &d->a_log, heads, err);
    if (rc == MOQ_OK) rc = moqi_check_ssm_view(d, "d", &d->d, heads, err);
    if (rc == MOQ_OK) rc = moqi_check_ssm_view(d, "norm", &d->norm, (uint64_t)s->inner, err);
    return rc;
}

/* The next vector of the block; an absent one is zeros. */
static float *moqi_ssm_vector(float **next, const moq_view *v, int64_t count)
{
    float *out = *next;
    if (v->data) moq_to_f32(v->dtype, v->data, (size_t)count, out);
    *next += count;
    return out;
}

static moq_ssm *moqi_cpu_ssm_create(moq_backend *be, const moq_ssm_desc *desc, moq_error *err)
{
    moqi_cpu *c = moqi_cpu_of(be);
    moqi_ssm plan;
    moqi_need need;
    moqi_clear(err);
    if (moqi_ssm_plan(desc, &plan, err) < 0 || moqi_check_ssm(&plan, err) < 0) return NULL;
    memset(&need, 0, sizeof need);
    need.worker = moqi_pad16(plan.inner / desc->groups + 2 * (int64_t)desc->state);
    if (moqi_grow(c, &need, c->be.max_rows, err) < 0) return NULL;
    moqi_ssm *s = (moqi_ssm *)moq_allocate(&c->a, plan.bytes);
    if (!s) { moqi_nomem(err, plan.bytes); return NULL; }
    *s = plan;
    float *next = (float *)(void *)(s + 1);
    s->taps = moqi_ssm_vector(&next, &desc->conv_weight, s->width * desc->conv);
    s->conv_bias = moqi_ssm_vector(&next, &desc->conv_bias, s->width);
    s->dt_bias = moqi_ssm_vector(&next, &desc->dt_bias, desc->heads);
    s->decay = moqi_ssm_vector(&next, &desc->a_log, desc->heads);
    s->d = moqi_ssm_vector(&next, &desc->d, desc->heads);
    s->norm = moqi_ssm_vector(&next, &desc->norm, s->inner);
    s->past = next;
    s->states = next + (int64_t)desc->slots * s->width * (desc->conv - 1);
    /* stored as log(-A), so that A stays negative and the state never grows by itself */
    for (int32_t h = 0; h < desc->heads; h++) s->decay[h] = (float)-exp((double)s->decay[h]);
    return (moq_ssm *)(void *)s;
}

static void moqi_cpu_ssm_release(moq_backend *be, moq_ssm *ssm)
{
    if (ssm) moq_release(&moqi_cpu_of(be)->a, ssm, ((moqi_ssm *)(void *)ssm)->bytes);
}

/* 0 for an impossible description. */
static size_t moqi_cpu_ssm_bytes(const moq_backend *be, const moq_ssm_desc *desc)
{
    moqi_ssm plan;
    (void)be;
    return moqi_ssm_plan(desc, &plan, NULL) < 0 ? 0 : plan.bytes;
}

/* ---- running ---- */

/* Arguments of moqi_ssm_task. x: [rows, 2 inner + 2 groups * state + heads], y: [rows, inner] */
typedef struct moqi_ssm_run { const moqi_cpu *c; const moqi_ssm *s; const moq_batch *b; const float *x; float *y; } moqi_ssm_run;

/* x * sigmoid(x), in double where it costs nothing. */
static float moqi_ssm_silu(float x) { return (float)((double)x / (1 + exp(-(double)x))); }

/* Channels [first, first + n) of the convolution of one token, whose inputs are x [n]; their past moves on by one token. */
static void moqi_ssm_convolve(const moqi_ssm *s, float *past, int64_t first, int64_t n, const float *x, float *out)
{
    int64_t taps = s->desc.conv;
    for (int64_t i = 0; i < n; i++) {
        const float *w = s->taps + (first + i) * taps;
        float *p = past + (first + i) * (taps - 1), sum = s->conv_bias[first + i] + w[taps - 1] * x[i];
        for (int64_t k = 0; k + 1 < taps; k++) sum += w[k] * p[k];
        for (int64_t k = 0; k + 2 < taps; k++) p[k] = p[k + 1];
        if (taps > 1) p[taps - 2] = x[i];
        out[i] = moqi_ssm_silu(sum);
    }
}

/* The step of head h: softplus, which is the argument itself where exp would say nothing new. */
static float moqi_ssm_step(const moqi_ssm *s, int64_t h, float dt)
{
    double v = (double)dt + (double)s->dt_bias[h];
    v = v > 20 ? v : log1p(exp(v));
    v = v < (double)s->desc.dt_min ? (double)s->desc.dt_min : v;
    return (float)(s->desc.dt_max > 0 && v > (double)s->desc.dt_max ? (double)s->desc.dt_max : v);
}

/* One head of one token: state [head_dim, n] moves on and is read. x, u: [head_dim]; b, c: [n] */
static void moqi_ssm_head(const moqi_ssm_run *t, int64_t h, float step, const float *x, const float *b, const float *c, float *state, float *u)
{
    int64_t n = t->s->desc.state;
    /* S = exp(t A) S + t x B^T, then u = S C + D x */
    float keep = (float)exp((double)step * (double)t->s->decay[h]);
    for (int64_t p = 0; p < t->s->desc.head_dim; p++, state += n) {
        float in = step * x[p];
        for (int64_t i = 0; i < n; i++) state[i] = keep * state[i] + in * b[i];
        u[p] = t->c->k->dot(state, c, n) + t->s->d[h] * x[p];
    }
}

/* One group of one row. Scratch: x [inner / groups], b [state], c [state] after the convolution. */
static void moqi_ssm_row(const moqi_ssm_run *t, int64_t row, int64_t group, float *scratch)
{
    const moqi_ssm *s = t->s;
    int64_t heads = s->desc.heads / s->desc.groups, dim = s->desc.head_dim, n = heads * dim, state = s->desc.state, slot = t->b->slot[row];
    const float *in = t->x + row * (s->inner + s->width + s->desc.heads), *z = in + group * n, *x = in + s->inner;
    float *past = s->past + slot * s->width * (s->desc.conv - 1), *states = s->states + (slot * s->desc.heads + group * heads) * dim * state;
    float *cx = scratch, *cb = cx + n, *cc = cb + state, *y = t->y + row * s->inner + group * n;
    int64_t first[3] = {group * n, s->inner + group * state, s->inner + (s->desc.groups + group) * state};
    if (t->b->pos[row] == 0) { /* a new sequence */
        memset(states, 0, (size_t)(n * state) * sizeof *states);
        for (int i = 0; i < 3; i++) {
            int64_t taps = s->desc.conv - 1;
            memset(past + first[i] * taps, 0, (size_t)((i ? state : n) * taps) * sizeof *past);
        }
    }
    /* B and C belong to the group, so each task convolves its own and no other task reads them */
    moqi_ssm_convolve(s, past, first[0], n, x + first[0], cx);
    moqi_ssm_convolve(s, past, first[1], state, x + first[1], cb);
    moqi_ssm_convolve(s, past, first[2], state, x + first[2], cc);
    for (int64_t h = 0; h < heads; h++) {
        float step = moqi_ssm_step(s, group * heads + h, x[s->width + group * heads + h]);
        moqi_ssm_head(t, group * heads + h, step, cx + h * dim, cb, cc, states + h * dim * state, y + h * dim);
    }
    /* the gate comes before the norm, and the norm sees one group */
    for (int64_t i = 0; i < n; i++) y[i] *= moqi_ssm_silu(z[i]);
    moqi_norm_row(t->c->k, y, s->norm + group * n, n, s->desc.eps, y);
}

/* Rows one after the other: each needs the state that the row before left. Rows of no slot give zeros. */
static void moqi_ssm_task(void *arg, int group, int worker)
{
    const moqi_ssm_run *t = (const moqi_ssm_run *)arg;
    int64_t n = t->s->inner / t->s->desc.groups;
    for (int64_t row = 0; row < t->b->rows; row++) {
        if (t->b->slot[row] >= 0 && t->b->slot[row] < t->s->desc.slots) moqi_ssm_row(t, row, group, t->c->worker + worker * t->c->need.worker);
        else memset(t->y + row * t->s->inner + group * n, 0, (size_t)n * sizeof(float));
    }
}

static void moqi_cpu_ssm(moq_backend *be, moq_ssm *ssm, const moq_batch *b, const void *x, void *y)
{
    moqi_ssm_run t;
    t.c = moqi_cpu_of(be);
    t.s = (const moqi_ssm *)(const void *)ssm;
    t.b = b;
    t.x = (const float *)x;
    t.y = (float *)y;
    moqi_run(t.c, t.s->desc.groups, (double)b->rows * (double)t.s->inner * (2.0 * t.s->desc.state + t.s->desc.conv + 16), moqi_ssm_task, &t);
}

/* Slots outside of the object are a caller's mistake and change nothing. */
static void moqi_cpu_ssm_copy(moq_backend *be, moq_ssm *ssm, int32_t dst_slot, int32_t src_slot)
{
    const moqi_ssm *s = (const moqi_ssm *)(const void *)ssm;
    int64_t past = s->width * (s->desc.conv - 1), state = s->inner * s->desc.state;
    (void)be;
    if (dst_slot < 0 || src_slot < 0 || dst_slot >= s->desc.slots || src_slot >= s->desc.slots || dst_slot == src_slot) return;
    memcpy(s->past + dst_slot * past, s->past + src_slot * past, (size_t)past * sizeof(float));
    memcpy(s->states + dst_slot * state, s->states + src_slot * state, (size_t)state * sizeof(float));
}

/* Out: the past of the convolution, then the states. */
static size_t moqi_cpu_ssm_read(moq_backend *be, const moq_ssm *ssm, int32_t slot, void *out)
{
    const moqi_ssm *s = (const moqi_ssm *)(const void *)ssm;
    size_t past = (size_t)(s->width * (s->desc.conv - 1)) * sizeof(float), state = (size_t)(s->inner * s->desc.state) * sizeof(float);
    (void)be;
    if (!out) return past + state;
    memcpy(out, (const uint8_t *)s->past + (size_t)slot * past, past);
    memcpy((uint8_t *)out + past, (const uint8_t *)s->states + (size_t)slot * state, state);
    return past + state;
}

static void moqi_cpu_ssm_write(moq_backend *be, moq_ssm *ssm, int32_t slot, const void *bytes)
{
    const moqi_ssm *s = (const moqi_ssm *)(const void *)ssm;
    size_t past = (size_t)(s->width * (s->desc.conv - 1)) * sizeof(float), state = (size_t)(s->inner * s->desc.state) * sizeof(float);
    (void)be;
    memcpy((uint8_t *)s->past + (size_t)slot * past, bytes, past);
    memcpy((uint8_t *)s->states + (size_t)slot * state, (const uint8_t *)bytes + past, state);
}

/* ---- copies ---- */

static void moqi_copy_task(void *arg, int row, int worker)
{
    const moq_copy_desc *d = (const moq_copy_desc *)arg;
    (void)worker;
    for (int64_t h = 0; h < d->heads; h++)
        memcpy((float *)d->y + row * d->y_stride + h * d->y_step, (const float *)d->x + row * d->x_stride + h * d->x_step,
               (size_t)d->width * sizeof(float));
}

static void moqi_cpu_copy_heads(moq_backend *be, const moq_copy_desc *d)
{
    moq_copy_desc own = *d;
    moqi_run(moqi_cpu_of(be), d->rows, (double)d->rows * d->heads * d->width, moqi_copy_task, &own);
}

/* ------------------------------------------------------------------------------------------------
   >>backend         the function table and its CPU filling
   Mixtures of experts, KV cache, attention and the small operations; nothing allocates outside of create, prepare and reserve.
   ------------------------------------------------------------------------------------------------ */

/* ---- mixtures of experts ----
   One pass takes up to 256 rows: route every row, sort the (row, expert) assignments by expert, make the inputs of each assignment (an
   expert may have its own pre_quant_scale and input_scale), then run gate and up of all chosen experts as one launch, the activation,
   and all down projections as one launch. At the end each row adds its experts' outputs in the order in which it chose them. */

/* What moq_experts points to. */
typedef struct moqi_experts {
    moqi_arena arena;           /* holds this struct too */
    moq_routing routing;
    moq_activation_desc activation;
    const float *bias;          /* [experts] or NULL */
    moqi_tiled *gate, *up, *down; /* [experts]; gate NULL: not gated */
    int64_t cols, n, out;
    int shares;                 /* gate and up of every expert read the same inputs */
} moqi_experts;

/* What is wrong with the description itself. */
static moq_result moqi_check_moe(const moq_moe *m, moq_error *err)
{
    const moq_routing *r = &m->routing;
    moqi_where at = moqi_at(NULL, "layer", m->name ? m->name : "", -1);
    int32_t groups = r->groups > 1 ? r->groups : 1, tops = r->groups > 1 ? r->top_groups : 1;
    if (r->experts < 1 || r->top_k < 1 || r->top_k > r->experts || !m->up || !m->down)
        return moqi_fail(err, MOQ_E_ARG, at, "top %d of %d experts cannot be chosen", (int)r->top_k, (int)r->experts);
    if (r->experts % groups != 0 || tops < 1 || tops > groups || tops * (r->experts / groups) < r->top_k)
        return moqi_fail(err, MOQ_E_ARG, at, "%d of %d groups of %d experts do not hold the %d to choose", (int)tops, (int)groups, (int)r->experts,
                         (int)r->top_k);
    if (r->bias.data && r->bias.count != (uint64_t)r->experts)
        return moqi_fail(err, MOQ_E_SHAPE, at, "routing bias of %llu elements, expected %d", (unsigned long long)r->bias.count, (int)r->experts);
    if ((unsigned)m->activation.kind > (unsigned)MOQ_RELU2 || (m->activation.kind == MOQ_RELU2) != (m->gate == NULL))
        return moqi_fail(err, MOQ_E_ARG, at, "activation %d %s a gate", (int)m->activation.kind, m->gate ? "has no use for" : "needs");
    for (int32_t e = 0; e < r->experts; e++) {
        const moq_linear *g = m->gate ? &m->gate[e] : &m->up[e], *u = &m->up[e], *d = &m->down[e];
        if (g->cols != m->up[0].cols || u->cols != g->cols || g->rows != m->up[0].rows || u->rows != g->rows || d->cols != u->rows ||
            d->rows != m->down[0].rows)
            return moqi_fail(err, MOQ_E_SHAPE, at, "expert %d has shapes [%lld, %lld], [%lld, %lld], [%lld, %lld] that do not fit together",
                             (int)e, (long long)g->rows,
                             (long long)g->cols, (long long)u->rows, (long long)u->cols, (long long)d->rows, (long long)d->cols);
    }
    return MOQ_OK;
}

/* The same role of all experts. */
static moqi_tiled *moqi_prepare_role(moqi_cpu *c, const moq_linear *layers, int32_t experts, moqi_arena *r, moqi_need *need, moq_error *err)
{
    moqi_tiled *p = (moqi_tiled *)moqi_take_array(r, (uint64_t)experts, sizeof *p);
    if (!p) { moqi_nomem(err, (uint64_t)experts * sizeof *p); return NULL; }
    for (int32_t e = 0; e < experts; e++) {
        if (moqi_cpu_supports(&c->be, &layers[e], err) < 0) return NULL;
        if (moqi_prepare_part(c, &layers[e], r, &p[e]) < 0) { moqi_nomem(err, 0); return NULL; }
        moqi_need_part(need, &p[e]);
    }
    return p;
}

/* Scratch for one row is top_k times what one expert needs. Gate and up run together, so their low-rank middles count twice. */
static moq_result moqi_fill_moe(moqi_cpu *c, moqi_experts *x, const moq_moe *m, moqi_arena *r, moq_error *err)
{
    int32_t count = m->routing.experts;
    int64_t top = m->routing.top_k;
    moqi_need part, need;
    memset(&part, 0, sizeof part);
    memset(&need, 0, sizeof need);
    x->routing = m->routing;
    x->activation = m->activation;
    x->cols = m->up[0].cols;
    x->n = m->up[0].rows;
    x->out = m->down[0].rows;
    if (m->gate && !(x->gate = moqi_prepare_role(c, m->gate, count, r, &part, err))) return MOQ_E_NOMEM;
    if (!(x->up = moqi_prepare_role(c, m->up, count, r, &part, err))) return MOQ_E_NOMEM;
    if (!(x->down = moqi_prepare_role(c, m->down, count, r, &part, err))) return MOQ_E_NOMEM;
    if (m->routing.bias.data && !(x->bias = moqi_take_floats(r, &m->routing.bias, 0, 1, count))) return moqi_nomem(err, (uint64_t)count * 4);
    x->shares = 1;
    for (int32_t e = 0; x->gate && e < count; e++) x->shares = x->shares && moqi_same_feed(&x->gate[e], &x->up[e]);
    need.worker = moqi_max(part.worker, moqi_pad16(5 * (int64_t)count));
    need.moe_top = top;
    need.moe_cols = top * part.cols;
    need.moe_rank = top * part.rank * 2;
    need.moe_hidden = top * x->n * (x->gate ? 2 : 1);
    need.moe_out = top * x->out;
    need.experts = count;
    need.jobs = 2 * (int64_t)count;
    return moqi_grow(c, &need, c->be.max_rows, err);
}

/* As moqi_cpu_prepare_linear: one arena, scratch last. */
static moq_experts *moqi_cpu_prepare_moe(moq_backend *be, const moq_moe *m, moq_error *err)
{
    moqi_cpu *c = moqi_cpu_of(be);
    moqi_arena r = moqi_arena_make(&c->a);
    moqi_clear(err);
    if (moqi_check_moe(m, err) < 0) return NULL;
    moqi_experts *x = (moqi_experts *)moqi_take(&r, sizeof *x, 16);
    if (!x) moqi_nomem(err, sizeof *x);
    if (!x || moqi_fill_moe(c, x, m, &r, err) < 0) { moqi_arena_drop(&r); return NULL; }
    x->arena = r;
    return (moq_experts *)(void *)x;
}

static void moqi_cpu_release_moe(moq_backend *be, moq_experts *m)
{
    (void)be;
    if (!m) return;
    moqi_arena r = ((moqi_experts *)(void *)m)->arena;
    moqi_arena_drop(&r);
}

static size_t moqi_cpu_moe_bytes(const moq_backend *be, const moq_experts *m)
{
    (void)be;
    return m ? moqi_arena_bytes(&((const moqi_experts *)(const void *)m)->arena) : 0;
}

/* One pass: an assignment is a pair of row and chosen expert; assignments lie sorted by expert, then by row. */
typedef struct moqi_pass {
    const moqi_cpu *c;
    const moqi_experts *m;
    const moqi_tiled *parts;     /* the role whose inputs are made */
    const float *x, *logits;    /* [rows, cols], [rows, experts] */
    float *y;                   /* [rows, out] */
} moqi_pass;

/* One row of logits -> index, weight [top_k]. */
static void moqi_route_task(void *arg, int row, int worker)
{
    const moqi_pass *t = (const moqi_pass *)arg;
    const moqi_cpu *c = t->c;
    int64_t at = (int64_t)row * t->m->routing.top_k;
    moqi_route(&t->m->routing, t->m->bias, t->logits + (int64_t)row * t->m->routing.experts, c->worker + worker * c->need.worker, c->index + at,
               c->weight + at);
}

/* Counting sort of the rows' choices by expert. */
static void moqi_sort_choices(const moqi_cpu *c, const moqi_experts *m, int64_t rows)
{
    int64_t top = m->routing.top_k, count = rows * top;
    int32_t experts = m->routing.experts;
    memset(c->begin, 0, ((size_t)experts + 1) * sizeof *c->begin);
    for (int64_t i = 0; i < count; i++) c->begin[c->index[i] + 1]++;
    for (int32_t e = 0; e < experts; e++) c->begin[e + 1] += c->begin[e];
    for (int64_t i = 0; i < count; i++) {
        int32_t place = c->begin[c->index[i]]++;
        c->place[i] = place;
        c->row_of[place] = (int32_t)(i / top);
        c->expert_of[place] = c->index[i];
    }
    for (int32_t e = experts; e > 0; e--) c->begin[e] = c->begin[e - 1];
    c->begin[0] = 0;
}

/* The row of assignment i as the inputs of its expert: t, r [assignments, cols]. */
static void moqi_gather_task(void *arg, int i, int worker)
{
    const moqi_pass *t = (const moqi_pass *)arg;
    int64_t ld = moqi_pad_x(t->m->cols);
    (void)worker;
    int64_t e = t->c->expert_of[i], m = t->c->begin[e + 1] - t->c->begin[e];
    moqi_feed(&t->parts[e], m, t->x + t->c->row_of[i] * t->m->cols, t->c->t + i * ld, t->c->r + i * ld);
}

/* hidden [assignments, gate n | up n] -> activation -> the inputs of down: t, r [assignments, n]. */
static void moqi_middle_task(void *arg, int i, int worker)
{
    const moqi_pass *t = (const moqi_pass *)arg;
    int64_t n = t->m->n, ld = moqi_pad_x(n);
    float *r = t->c->r + i * ld;
    (void)worker;
    moqi_activate_row(&t->m->activation, t->c->hidden + i * n * (t->m->gate ? 2 : 1), n, r);
    int64_t e = t->c->expert_of[i], m = t->c->begin[e + 1] - t->c->begin[e];
    moqi_feed(&t->m->down[e], m, r, t->c->t + i * ld, r);
}

/* y[row] = sum of weight * expert output, in the order of the choice. */
static void moqi_combine_task(void *arg, int row, int worker)
{
    const moqi_pass *t = (const moqi_pass *)arg;
    int64_t out = t->m->out, top = t->m->routing.top_k;
    float *y = t->y + row * out;
    (void)worker;
    memset(y, 0, (size_t)out * sizeof *y);
    for (int64_t i = row * top; i < (row + 1) * top; i++) t->c->k->axpy(t->c->weight[i], t->c->out + t->c->place[i] * out, y, out);
}

/* Jobs of one role for every expert that was chosen, from jobs[count] on; returns the new count. */
static int64_t moqi_expert_jobs(const moqi_cpu *c, const moqi_experts *m, const moqi_tiled *parts, int64_t count, float *y, int64_t ldy)
{
    for (int32_t e = 0; e < m->routing.experts; e++) {
        int64_t first = c->begin[e], ld = moqi_pad_x(parts[e].layer.cols);
        moqi_job *j = &c->jobs[count];
        if (c->begin[e + 1] == first) continue;
        j->part = &parts[e];
        j->x = c->r + first * ld;
        j->t = c->t + first * ld;
        j->ldx = ld;
        j->y = y + first * ldy;
        j->ldy = ldy;
        j->m = c->begin[e + 1] - first;
        count++;
    }
    return count;
}

/* Route, sort, gate and up of all chosen experts in one launch, activation, down in one launch, combine. Every expert's weights are
   decoded once for all rows that chose it. */
static void moqi_moe_pass(const moqi_cpu *c, moqi_pass *t, int64_t rows)
{
    const moqi_experts *m = t->m;
    int64_t count = rows * m->routing.top_k, width = m->n * (m->gate ? 2 : 1), jobs = 0;
    double inputs = (double)count * (double)m->cols * 8, middles = (double)count * (double)m->n * 16;
    moqi_run(c, rows, (double)rows * (double)m->routing.experts * 16, moqi_route_task, t);
    moqi_sort_choices(c, m, rows);
    t->parts = m->up;
    moqi_run(c, count, inputs, moqi_gather_task, t);
    jobs = moqi_expert_jobs(c, m, m->up, 0, c->hidden + (m->gate ? m->n : 0), width);
    if (m->gate && !m->shares) {
        moqi_products(c, jobs);
        t->parts = m->gate;
        moqi_run(c, count, inputs, moqi_gather_task, t);
        jobs = 0;
    }
    if (m->gate) jobs = moqi_expert_jobs(c, m, m->gate, jobs, c->hidden, width);
    moqi_products(c, jobs);
    moqi_run(c, count, middles, moqi_middle_task, t);
    moqi_products(c, moqi_expert_jobs(c, m, m->down, 0, c->out, m->out));
    moqi_run(c, rows, (double)count * (double)m->out, moqi_combine_task, t);
}

/* Passes of at most moe_rows rows; a row's result does not depend on where the cuts are. */
static void moqi_cpu_moe(moq_backend *be, const moq_experts *experts, const void *x, const void *logits, int32_t rows, void *y)
{
    const moqi_cpu *c = moqi_cpu_of(be);
    moqi_pass t;
    t.c = c;
    t.m = (const moqi_experts *)(const void *)experts;
    for (int64_t first = 0; first < rows; first += c->moe_rows) {
        t.x = (const float *)x + first * t.m->cols;
        t.logits = (const float *)logits + first * t.m->routing.experts;
        t.y = (float *)y + first * t.m->out;
        moqi_moe_pass(c, &t, moqi_min(rows - first, c->moe_rows));
    }
}

/* ---- KV cache and attention ----
   Keys and values are stored packed in the cache's format and unpacked when they are read: FP8 takes a quarter of F32, NVFP4 a seventh.
   Memory is [slot][kv head][position] rows, so one head's history is one run of bytes, and copying a range is one memmove a head. */

/* Shapes and bytes of a cache; `err` names what is impossible. */
static moq_result moqi_kv_plan(const moq_kv_desc *d, moqi_cache *c, uint64_t bytes[2], moq_error *err)
{
    moqi_where at = moqi_at(NULL, "layer", d->name ? d->name : "", -1);
    uint64_t rows;
    memset(c, 0, sizeof *c);
    c->desc = *d;
    c->dim[0] = d->head_dim;
    c->dim[1] = d->value_dim > 0 ? d->value_dim : d->head_dim;
    c->format[0] = d->kv.format;
    c->format[1] = d->kv.format == MOQ_KV_NVFP4_ROTATE ? MOQ_KV_NVFP4 : d->kv.format;
    if (d->slots < 1 || d->capacity < 1 || d->kv_heads < 1 || d->head_dim < 1 || (unsigned)d->kv.format >= (unsigned)MOQ_KV_FORMAT_COUNT)
        return moqi_fail(err, MOQ_E_ARG, at, "a cache of %d slots, %d tokens, %d heads of %d values in format %d", (int)d->slots, (int)d->capacity,
                         (int)d->kv_heads,
                         (int)d->head_dim, (int)d->kv.format);
    if (d->kv.format == MOQ_KV_NVFP4_ROTATE && (d->head_dim & (d->head_dim - 1)) != 0)
        return moqi_fail(err, MOQ_E_UNSUPPORTED, at, "rotated keys need a head_dim that is a power of two, found %d; use nvfp4", (int)d->head_dim);
    for (int i = 0; i < 2; i++) {
        const moq_view *s = i ? &d->kv.v_scale : &d->kv.k_scale, *b = i ? &d->kv.v_bias : &d->kv.k_bias;
        c->row_bytes[i] = moqi_kv_row_bytes(c->format[i], c->dim[i]);
        if ((s->data && s->count != 1 && s->count != (uint64_t)d->kv_heads) || (b->data && b->count != (uint64_t)d->kv_heads * (uint64_t)c->dim[i]))
            return moqi_fail(err, MOQ_E_SHAPE, at, "%llu scales and %llu biases of the %s cache, expected 1 or %d, and %lld",
                             (unsigned long long)s->count,
                             (unsigned long long)b->count, i ? "value" : "key", (int)d->kv_heads, (long long)d->kv_heads * (long long)c->dim[i]);
        for (uint64_t h = 0; s->data && h < s->count; h++) {
            float v = moqi_view_f32(s, h);
            if (!(v > 0) || !moqi_is_finite(v)) return moqi_fail(err, MOQ_E_SCALE, at, "%s scale %g, expected a number greater than 0",
                                                                 i ? "value" : "key", (double)v);
        }
        if (!moqi_mul((uint64_t)d->slots * (uint64_t)d->kv_heads, (uint64_t)d->capacity, &rows) || !moqi_mul(rows, c->row_bytes[i], &bytes[i]) ||
            bytes[i] > SIZE_MAX / 4)
            return moqi_fail(err, MOQ_E_OVERFLOW, at, "%d slots of %d tokens do not fit the address space", (int)d->slots, (int)d->capacity);
        bytes[i] = (bytes[i] + 63) & ~(uint64_t)63;
    }
    return MOQ_OK;
}

/* One block: the struct, scales and biases as F32, then the rows of keys and of values. */
static moq_kv_cache *moqi_cpu_kv_create(moq_backend *be, const moq_kv_desc *desc, moq_error *err)
{
    moqi_cpu *cpu = moqi_cpu_of(be);
    moqi_cache plan;
    moqi_need need;
    uint64_t bytes[2];
    moqi_clear(err);
    if (moqi_kv_plan(desc, &plan, bytes, err) < 0) return NULL;
    memset(&need, 0, sizeof need);
    need.worker = moqi_pad16(moqi_attend_floats(plan.dim[0], plan.dim[1]));
    if (moqi_grow(cpu, &need, cpu->be.max_rows, err) < 0) return NULL;
    size_t heads = (size_t)desc->kv_heads, values = heads * (2 + (size_t)(plan.dim[0] + plan.dim[1]));
    size_t total = ((sizeof plan + values * sizeof(float) + 63) & ~(size_t)63) + (size_t)(bytes[0] + bytes[1]);
    uint8_t *memory = (uint8_t *)moq_allocate(&cpu->a, total);
    if (!memory) { moqi_nomem(err, total); return NULL; }
    float *next = (float *)(void *)(memory + sizeof plan);
    plan.bytes = total;
    plan.data[0] = memory + total - bytes[0] - bytes[1];
    plan.data[1] = plan.data[0] + bytes[0];
    for (int i = 0; i < 2; i++) {
        const moq_view *s = i ? &desc->kv.v_scale : &desc->kv.k_scale, *b = i ? &desc->kv.v_bias : &desc->kv.k_bias;
        plan.scale[i] = next;
        for (size_t h = 0; h < heads; h++) *next++ = s->data ? moqi_view_f32(s, s->count > 1 ? h : 0) : 1.0f;
        if (b->data && plan.format[i] == MOQ_KV_FP8_AFFINE) plan.bias[i] = next;
        for (uint64_t j = 0; plan.bias[i] && j < b->count; j++) *next++ = moqi_view_f32(b, j);
    }
    memcpy(memory, &plan, sizeof plan);
    return (moq_kv_cache *)(void *)memory;
}

static void moqi_cpu_kv_release(moq_backend *be, moq_kv_cache *cache)
{
    if (cache) moq_release(&moqi_cpu_of(be)->a, cache, ((moqi_cache *)(void *)cache)->bytes);
}

/* The same sum as in moqi_cpu_kv_create; 0 for an impossible description. */
static size_t moqi_cpu_kv_bytes(const moq_backend *be, const moq_kv_desc *desc)
{
    moqi_cache plan;
    uint64_t bytes[2];
    (void)be;
    if (moqi_kv_plan(desc, &plan, bytes, NULL) < 0) return 0;
    size_t values = (size_t)desc->kv_heads * (2 + (size_t)(plan.dim[0] + plan.dim[1]));
    return ((sizeof plan + values * sizeof(float) + 63) & ~(size_t)63) + (size_t)(bytes[0] + bytes[1]);
}

/* Rows outside of the cache are ignored: they can only come from a caller's mistake. */
static int moqi_kv_holds(const moqi_cache *c, const moq_batch *b, int64_t row)
{
    return b->slot[row] >= 0 && b->slot[row] < c->desc.slots && b->pos[row] >= 0 && b->pos[row] < c->desc.capacity;
}

/* Arguments of moqi_append_task; from, stride: of keys and of values. */
typedef struct moqi_append { const moqi_cpu *cpu; moqi_cache *c; const moq_batch *b; const float *from[2]; int64_t stride[2]; } moqi_append;

/* One row: its keys and values of all heads, packed in place. Rotated keys pass through the worker's scratch. */
static void moqi_append_task(void *arg, int row, int worker)
{
    const moqi_append *t = (const moqi_append *)arg;
    const moqi_cache *c = t->c;
    float *turned = t->cpu->worker + worker * t->cpu->need.worker;
    if (!moqi_kv_holds(c, t->b, row)) return;
    for (int i = 0; i < 2; i++) {
        for (int64_t h = 0; h < c->desc.kv_heads; h++) {
            const float *x = t->from[i] + row * t->stride[i] + h * c->dim[i];
            if (c->format[i] == MOQ_KV_NVFP4_ROTATE) {
                float norm = 1 / sqrtf((float)c->dim[i]);
                memcpy(turned, x, (size_t)c->dim[i] * sizeof *x);
                moqi_sylvester(turned, c->dim[i]);
                for (int64_t d = 0; d < c->dim[i]; d++) turned[d] *= norm;
                x = turned;
            }
            moqi_kv_pack(c->format[i], c->scale[i][h], c->bias[i] ? c->bias[i] + h * c->dim[i] : NULL, x, c->dim[i], moqi_kv_row(c, i,
                    t->b->slot[row], h, t->b->pos[row]));
        }
    }
}

static void moqi_cpu_kv_append(moq_backend *be, moq_kv_cache *cache, const moq_batch *b, const void *k, int64_t k_stride, const void *v,
                               int64_t v_stride)
{
    moqi_append t;
    t.cpu = moqi_cpu_of(be);
    t.c = (moqi_cache *)(void *)cache;
    t.b = b;
    t.from[0] = (const float *)k;
    t.from[1] = (const float *)v;
    t.stride[0] = k_stride;
    t.stride[1] = v_stride;
    moqi_run(t.cpu, b->rows, (double)b->rows * (double)t.c->desc.kv_heads * (double)(t.c->dim[0] + t.c->dim[1]) * 8, moqi_append_task, &t);
}

/* Rows move as they are stored: nothing is rounded again, and memmove takes care of overlap. */
static void moqi_cpu_kv_copy(moq_backend *be, moq_kv_cache *cache, int32_t dst_slot, int32_t dst_pos, int32_t src_slot, int32_t src_pos,
                             int32_t count)
{
    const moqi_cache *c = (const moqi_cache *)(const void *)cache;
    (void)be;
    for (int i = 0; i < 2 && count > 0; i++)
        for (int64_t h = 0; h < c->desc.kv_heads; h++)
            memmove(moqi_kv_row(c, i, dst_slot, h, dst_pos), moqi_kv_row(c, i, src_slot, h, src_pos), (size_t)count * c->row_bytes[i]);
}

/* Out: [head][position] rows of keys, then of values. */
static size_t moqi_cpu_kv_read(moq_backend *be, const moq_kv_cache *cache, int32_t slot, int32_t count, void *out)
{
    const moqi_cache *c = (const moqi_cache *)(const void *)cache;
    size_t heads = (size_t)c->desc.kv_heads, rows = count > 0 ? (size_t)count : 0;
    uint8_t *to = (uint8_t *)out;
    (void)be;
    for (int i = 0; i < 2 && to; i++)
        for (size_t h = 0; h < heads; h++, to += rows * c->row_bytes[i]) memcpy(to, moqi_kv_row(c, i, slot, (int64_t)h, 0), rows * c->row_bytes[i]);
    return heads * rows * (c->row_bytes[0] + c->row_bytes[1]);
}

static void moqi_cpu_kv_write(moq_backend *be, moq_kv_cache *cache, int32_t slot, int32_t count, const void *bytes)
{
    const moqi_cache *c = (const moqi_cache *)(const void *)cache;
    size_t heads = (size_t)c->desc.kv_heads, rows = count > 0 ? (size_t)count : 0;
    const uint8_t *from = (const uint8_t *)bytes;
    (void)be;
    for (int i = 0; i < 2; i++)
        for (size_t h = 0; h < heads; h++, from += rows * c->row_bytes[i]) memcpy(moqi_kv_row(c, i, slot, (int64_t)h, 0), from, rows * c->row_bytes[i]);
}

/* Arguments of moqi_attend_task. */
typedef struct moqi_attending { const moqi_cpu *cpu; const moq_batch *b; const moq_attention_desc *a; } moqi_attending;

/* A block of rows for one kv head: runs of rows of one slot share the unpacked keys and values. */
static void moqi_attend_task(void *arg, int index, int worker)
{
    const moqi_attending *t = (const moqi_attending *)arg;
    const moqi_cache *c = (const moqi_cache *)(const void *)t->a->cache;
    int64_t kv_head = index % c->desc.kv_heads, row = index / c->desc.kv_heads * MOQI_ATTEND_ROWS;
    int64_t end = moqi_min(row + MOQI_ATTEND_ROWS, t->b->rows), share = t->a->heads / c->desc.kv_heads;
    float *scratch = t->cpu->worker + worker * t->cpu->need.worker;
    for (int64_t next; row < end; row = next) {
        next = row + 1;
        if (!moqi_kv_holds(c, t->b, row)) {
            memset((float *)t->a->y + row * t->a->y_stride + kv_head * share * c->dim[1], 0, (size_t)(share * c->dim[1]) * sizeof(float));
            continue;
        }
        while (next < end && t->b->slot[next] == t->b->slot[row] && moqi_kv_holds(c, t->b, next)) next++;
        for (int64_t h = 0; h < share; h += MOQI_ATTEND_HEADS)
            moqi_attend(t->cpu->k, t->b, t->a, row, next - row, kv_head * share + h, moqi_min(MOQI_ATTEND_HEADS, share - h), kv_head, scratch);
    }
}

/* Tasks are blocks of rows times kv heads. */
static void moqi_cpu_attention(moq_backend *be, const moq_batch *b, const moq_attention_desc *a)
{
    const moqi_cache *c = (const moqi_cache *)(const void *)a->cache;
    moqi_attending t;
    t.cpu = moqi_cpu_of(be);
    t.b = b;
    t.a = a;
    double keys = a->window > 0 && a->window < b->max_pos ? a->window : b->max_pos + 1.0;
    moqi_run(t.cpu, moqi_ceil_div(b->rows, MOQI_ATTEND_ROWS) * c->desc.kv_heads,
             (double)b->rows * a->heads * keys * (double)(c->dim[0] + c->dim[1]), moqi_attend_task, &t);
}

/* ---- the operations between layers ---- */

/* Arguments of one row-wise call; each task is one row. */
typedef struct moqi_rows {
    const moqi_cpu *c;
    const void *desc;
    const float *x;
    float *y;
    int64_t n;
} moqi_rows;

/* One row: the sum first, then each group by itself. */
static void moqi_norm_task(void *arg, int row, int worker)
{
    const moqi_rows *t = (const moqi_rows *)arg;
    const moq_norm_desc *d = (const moq_norm_desc *)t->desc;
    int64_t groups = d->groups > 0 ? d->groups : 1, n = groups * d->cols;
    const float *x = (const float *)d->x + row * (d->x_stride ? d->x_stride : n);
    float *y = (float *)d->y + row * (d->y_stride ? d->y_stride : n);
    (void)worker;
    if (d->add) {
        float *sum = (float *)(uintptr_t)x; /* writable when there is something to add */
        for (int64_t i = 0; i < n; i++) sum[i] += ((const float *)d->add)[row * n + i];
    }
    for (int64_t g = 0; g < groups; g++) moqi_norm_row(t->c->k, x + g * d->cols, d->weight, d->cols, d->eps, y + g * d->cols);
}

static void moqi_cpu_norm(moq_backend *be, const moq_norm_desc *d)
{
    moqi_rows t = {moqi_cpu_of(be), d, NULL, NULL, 0};
    moqi_run(t.c, d->rows, (double)d->rows * d->cols * (d->groups > 0 ? d->groups : 1) * 3, moqi_norm_task, &t);
}

/* In double: an angle of 10^5 radians still has 10 digits. */
static void moqi_cpu_rope_table(moq_backend *be, const int32_t *pos, int32_t rows, const float *inv_freq, int32_t dims, float scale, float *table)
{
    (void)be;
    for (int64_t i = 0; i < (int64_t)rows * dims; i++) {
        double angle = (double)pos[i / dims] * (double)inv_freq[i % dims];
        table[2 * i] = (float)(cos(angle) * (double)scale);
        table[2 * i + 1] = (float)(sin(angle) * (double)scale);
    }
}

/* One row: all its heads turn by the same angles. */
static void moqi_rope_task(void *arg, int row, int worker)
{
    const moq_rope_desc *d = (const moq_rope_desc *)((const moqi_rows *)arg)->desc;
    int64_t dims = d->dims > 0 ? d->dims : d->head_dim;
    float *x = (float *)d->x + row * d->stride + d->first;
    (void)worker;
    for (int64_t h = 0; h < d->heads; h++) moqi_rope_head(x + h * d->head_dim, d->table + row * dims, dims, d->interleaved);
}

static void moqi_cpu_rope(moq_backend *be, const moq_rope_desc *d)
{
    moqi_rows t = {moqi_cpu_of(be), d, NULL, NULL, 0};
    moqi_run(t.c, d->rows, (double)d->rows * d->heads * d->head_dim * 2, moqi_rope_task, &t);
}

/* x: [rows, 2 n] or [rows, n] -> y [rows, n] */
static void moqi_activate_task(void *arg, int row, int worker)
{
    const moqi_rows *t = (const moqi_rows *)arg;
    const moq_activation_desc *a = (const moq_activation_desc *)t->desc;
    (void)worker;
    moqi_activate_row(a, t->x + row * t->n * (a->kind == MOQ_RELU2 ? 1 : 2), t->n, t->y + row * t->n);
}

static void moqi_cpu_activation(moq_backend *be, const moq_activation_desc *a, const void *x, int32_t rows, int32_t n, void *y)
{
    moqi_rows t = {moqi_cpu_of(be), a, (const float *)x, (float *)y, n};
    moqi_run(t.c, rows, (double)rows * n * 16, moqi_activate_task, &t);
}

static void moqi_cpu_add(moq_backend *be, void *x, const void *y, size_t count)
{
    moqi_cpu_of(be)->k->axpy(1, (const float *)y, (float *)x, (int64_t)count);
}

/* The lowest index among equals; NaN never wins against a number. */
static void moqi_cpu_argmax(moq_backend *be, const void *x, int32_t rows, int32_t n, int32_t *index)
{
    (void)be;
    for (int64_t r = 0; r < rows; r++) {
        const float *v = (const float *)x + r * n;
        int32_t best = 0;
        for (int32_t i = 1; i < n; i++) if (v[i] > v[best] || (moqi_is_nan(v[best]) && !moqi_is_nan(v[i]))) best = i;
        index[r] = best;
    }
}

/* ---- memory ---- */

/* The size stands in front of the block: release gets it back. */
static void *moqi_cpu_alloc(moq_backend *be, size_t bytes, moq_error *err)
{
    moqi_clear(err);
    uint8_t *p = bytes > SIZE_MAX - 64 ? NULL : (uint8_t *)moq_allocate(&moqi_cpu_of(be)->a, bytes + 64);
    if (!p) { moqi_nomem(err, bytes); return NULL; }
    memcpy(p, &bytes, sizeof bytes);
    return p + 64;
}

static void moqi_cpu_release(moq_backend *be, void *ptr)
{
    size_t bytes;
    if (!ptr) return;
    memcpy(&bytes, (uint8_t *)ptr - 64, sizeof bytes);
    moq_release(&moqi_cpu_of(be)->a, (uint8_t *)ptr - 64, bytes + 64);
}

/* Upload, download and copy are one thing on the CPU; ranges may overlap. */
static void moqi_cpu_copy(moq_backend *be, void *dst, const void *src, size_t bytes)
{
    (void)be;
    if (bytes) memmove(dst, src, bytes);
}

static void moqi_cpu_upload_act(moq_backend *be, void *dst, const float *src, size_t count) { moqi_cpu_copy(be, dst, src, count * sizeof *src); }
static void moqi_cpu_download_act(moq_backend *be, float *dst, const void *src, size_t count) { moqi_cpu_copy(be, dst, src, count * sizeof *dst); }

/* Calls have finished when they return and cannot fail. */
static moq_result moqi_cpu_sync(moq_backend *be, moq_error *err)
{
    (void)be;
    moqi_clear(err);
    return MOQ_OK;
}

/* ---- the table ---- */

static void moqi_cpu_destroy(moq_backend *be)
{
    moqi_cpu *c = moqi_cpu_of(be);
    moq_allocator a = c->a;
    if (c->pool) moqi_pool_destroy(c->pool);
    moq_release(&a, c->scratch, c->scratch_bytes);
    moq_release(&a, c, sizeof *c);
}

/* In the order of struct moq_backend; no graphs to capture. */
static const moq_backend moqi_cpu_table = {
    NULL, "cpu", MOQ_F32, 16,
    moqi_cpu_destroy, moqi_cpu_alloc, moqi_cpu_release,
    moqi_cpu_copy, moqi_cpu_copy, moqi_cpu_copy, moqi_cpu_upload_act, moqi_cpu_download_act, moqi_cpu_sync,
    moqi_cpu_reserve, moqi_cpu_supports, moqi_cpu_explain,
    moqi_cpu_prepare_linear, moqi_cpu_release_weight, moqi_cpu_weight_bytes, moqi_cpu_linear, moqi_cpu_embed,
    moqi_cpu_prepare_moe, moqi_cpu_release_moe, moqi_cpu_moe,
    moqi_cpu_kv_create, moqi_cpu_kv_release, moqi_cpu_kv_bytes, moqi_cpu_kv_append, moqi_cpu_kv_copy, moqi_cpu_attention,
    moqi_cpu_norm, moqi_cpu_rope_table, moqi_cpu_rope, moqi_cpu_activation, moqi_cpu_add, moqi_cpu_argmax,
    NULL, NULL, NULL, NULL,
    moqi_cpu_ssm_create, moqi_cpu_ssm_release, moqi_cpu_ssm_bytes, moqi_cpu_ssm, moqi_cpu_ssm_copy, moqi_cpu_copy_heads,
    moqi_cpu_moe_bytes, moqi_cpu_kv_read, moqi_cpu_kv_write, moqi_cpu_ssm_read, moqi_cpu_ssm_write
};

/* By name, or the fastest. */
static const moqi_kernels *moqi_find_kernels(const char *name, moq_error *err)
{
    char known[64];
    size_t n = 0;
    const moqi_kernels *found[MOQI_KERNEL_SETS];
    if (!name || !name[0] || strcmp(name, "auto") == 0) return moqi_get_kernels(0);
    int count = moqi_list_kernels(found);
    known[0] = 0;
    for (int i = 0; i < count; i++) {
        const moqi_kernels *k = found[i];
        if (strcmp(k->name, name) == 0) return k;
        n += moqi_format(known + n, sizeof known - n, "%s%s", i ? ", " : "", k->name);
    }
    moqi_fail(err, MOQ_E_ARG, moqi_at(NULL, NULL, NULL, -1), "no kernels '%q' on this machine; known are auto, %s", name, known);
    return NULL;
}

/* The table lies inside of its own context: one allocation, besides the pool. */
MOQ_API moq_backend *moq_cpu_backend(const moq_cpu_desc *desc, moq_error *err)
{
    moq_cpu_desc none;
    moqi_clear(err);
    memset(&none, 0, sizeof none);
    if (!desc) desc = &none;
    const moqi_kernels *k = moqi_find_kernels(desc->kernel, err);
    if (!k) return NULL;
    moqi_cpu *c = (moqi_cpu *)moq_allocate(&desc->allocator, sizeof *c);
    if (!c) { moqi_nomem(err, sizeof *c); return NULL; }
    c->be = moqi_cpu_table;
    c->be.ctx = c;
    c->a = desc->allocator;
    c->par = desc->parallel;
    c->act = desc->act;
    c->k = k;
    if (c->par.run) {
        if (c->par.workers < 1) c->par.workers = 1;
        return &c->be;
    }
    c->par.workers = desc->threads > 0 ? desc->threads : moq_cpu_count();
    if (c->par.workers > 1) {
        c->pool = moqi_pool_create(c->par.workers, &c->a, err);
        if (!c->pool) { moqi_cpu_destroy(&c->be); return NULL; }
        c->par.run = moqi_pool_run;
        c->par.user = c->pool;
    }
    return &c->be;
}

MOQ_API void moq_backend_destroy(moq_backend *be)
{
    if (be && be->destroy) be->destroy(be);
}

/* Quantizing, calibrating and exporting are compiled on request: programs that only run models need none of it. */
#ifdef MOQ_QUANTIZE

/* ------------------------------------------------------------------------------------------------
   >>quant           encoders of every format, and the weight searches that need no data
   Bytes equal to ModelOpt's GPU exporter; results do not depend on the number of workers.
   ------------------------------------------------------------------------------------------------ */

/* PyTorch on a GPU divides a tensor by a Python number by multiplying with the F32 reciprocal, so every "amax / bound" here is
   amax * fl32(1 / bound); divisions between tensors are true divisions. The difference is one unit in the last place of scales. */
#define MOQI_INV_6    0x3e2aaaabu
#define MOQI_INV_7    0x3e124925u
#define MOQI_INV_127  0x3c010204u
#define MOQI_INV_448  0x3b124925u
#define MOQI_INV_1536 0x3a2aaaabu
#define MOQI_INV_2688 0x39c30c31u

enum { MOQI_MAX_TASKS = 64 };

typedef struct moqi_encoder moqi_encoder;

/* Encodes rows [first, last); x: scratch of three rows for this worker. Returns the bits of the largest magnitude. */
typedef uint32_t (*moqi_encode_rows)(const moqi_encoder *e, int64_t first, int64_t last, float *x);

struct moqi_encoder {
    const moq_encode_desc *d;
    moqi_encode_rows rows;
    int64_t group_rows, group_cols;  /* of one scale, never MOQ_ALL */
    int64_t grid_rows, grid_cols;    /* scales */
    uint32_t inverse;                /* bits of 1 / bound of the group scale */
    float bound;                     /* largest code */
    float global_amax, global;       /* global: the stored per-tensor scale */
    float norm;                      /* NVFP4: block scales reach 448, or 256 */
    const uint8_t *table;            /* per-tensor FP8 of 16-bit sources: code of every input */
    uint8_t *codes;                  /* packed rows */
    void *scales;
    float *amax;                     /* moq_find_amax: [grid_rows, grid_cols], may be NULL */
    float *scratch;                  /* [workers, 3, cols] */
    int avx2;                        /* loops for it may run */
    int64_t step;                    /* rows of a task */
    uint32_t top[MOQI_MAX_TASKS];    /* bits of the largest magnitude, by task */
};

/* ---- small parts ---- */

/* Magnitude bits order like the numbers, and NaN and infinity are the largest: one integer maximum finds both. */
static uint32_t moqi_top_bits(const float *x, int64_t n)
{
    int32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t b = (int32_t)(moqi_f32_bits(x[i]) & 0x7fffffffu);
        top = b > top ? b : top;
    }
    return (uint32_t)top;
}

/* What a scale is made of: ModelOpt's export_amax turns 0 into the bound, so that the scale is 1. */
static float moqi_scale_of(float amax, float bound, uint32_t inverse)
{
    return (amax > 0 ? amax : bound) * moqi_bits_f32(inverse);
}

/* E4M3 of a finite value without branches. Below 2^-6 the unit is 2^-9: adding 2^14 leaves the count of units, rounded to even, in
   the low bits of the sum. */
static uint8_t moqi_e4m3_code(float v)
{
    int32_t b = (int32_t)moqi_f32_bits(v), a = b & 0x7fffffff;
    int32_t normal = (int32_t)(((uint32_t)a + 0x7ffffu + ((uint32_t)a >> 20 & 1u)) >> 20) - (120 << 3);
    int32_t tiny = (int32_t)moqi_f32_bits(moqi_bits_f32((uint32_t)a) + 16384.0f) - 0x46800000;
    int32_t code = a < 0x3c800000 ? tiny : normal;
    code = code > 0x7e ? 0x7e : code;
    return (uint8_t)(code | (b < 0 ? 0x80 : 0));
}

/* NVFP4: ties to even, and the sign bit is (t < 0), so tiny negatives become -0 while -0 itself becomes +0. */
static uint32_t moqi_e2m1_code(float t)
{
    float a = fabsf(t);
    int i = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
    return (uint32_t)(i | (t < 0 ? 8 : 0));
}

/* MXFP4 (MXFP4QTensor): ties toward zero, and the sign bit is set for 0 too. */
static uint32_t moqi_mx_e2m1_code(float t)
{
    float a = fabsf(t);
    int i = (a > 0.25f) + (a > 0.75f) + (a > 1.25f) + (a > 1.75f) + (a > 2.5f) + (a > 3.5f) + (a > 5.0f);
    return (uint32_t)(i | (t > 0 ? 0 : 8));
}

/* Nearest integer, ties to even, clamped to [-bound - 1, bound]; |v| < 2^22. */
static int32_t moqi_int_code(float v, int32_t bound)
{
    int32_t q = (int32_t)moqi_f32_bits(v + 12582912.0f) - 0x4b400000; /* 1.5 * 2^23: the unit of the sum is 1 */
    return q > bound ? bound : q < -bound - 1 ? -bound - 1 : q;
}

/* q[i] = code of x[i] / step[i]. One loop for each format, written so that compilers vectorise it, and compiled twice on x86. */
#define MOQI_CODE_LOOP(name, attribute, code) \
    attribute static void name(const float *x, const float *step, int64_t n, uint8_t *q) \
    { \
        for (int64_t i = 0; i < n; i++) { \
            float t = x[i] / step[i]; \
            q[i] = (uint8_t)(code); \
        } \
    }
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("O3")
#endif
MOQI_CODE_LOOP(moqi_codes_e2m1, , moqi_e2m1_code(t))
MOQI_CODE_LOOP(moqi_codes_mx_e2m1, , moqi_mx_e2m1_code(t))
MOQI_CODE_LOOP(moqi_codes_e4m3, , moqi_e4m3_code(t))
#ifdef MOQI_X86
MOQI_CODE_LOOP(moqi_codes_e2m1_avx2, MOQI_AVX2, moqi_e2m1_code(t))
MOQI_CODE_LOOP(moqi_codes_mx_e2m1_avx2, MOQI_AVX2, moqi_mx_e2m1_code(t))
MOQI_CODE_LOOP(moqi_codes_e4m3_avx2, MOQI_AVX2, moqi_e4m3_code(t))
#endif

/* Magnitude bits of the largest value of each group of g. */
#define MOQI_TOP_LOOP(name, attribute) \
    attribute static void name(const float *x, int64_t groups, int64_t g, int32_t *tops) \
    { \
        for (int64_t k = 0; k < groups; k++) { \
            const float *b = x + k * g; \
            int32_t top = 0; \
            for (int64_t i = 0; i < g; i++) { \
                int32_t v = (int32_t)(moqi_f32_bits(b[i]) & 0x7fffffffu); \
                top = v > top ? v : top; \
            } \
            tops[k] = top; \
        } \
    }
MOQI_TOP_LOOP(moqi_tops_any, )
#ifdef MOQI_X86
MOQI_TOP_LOOP(moqi_tops_avx2, MOQI_AVX2)
#endif

static void moqi_tops(int avx2, const float *x, int64_t groups, int64_t g, int32_t *tops)
{
#ifdef MOQI_X86
    if (avx2) { moqi_tops_avx2(x, groups, g, tops); return; }
#endif
    (void)avx2;
    moqi_tops_any(x, groups, g, tops);
}

/* Pairs of codes to bytes, even index low. */
static void moqi_pack_nibbles(const uint8_t *q, int64_t n, uint8_t *out)
{
    for (int64_t i = 0; i < n / 2; i++) out[i] = (uint8_t)(q[2 * i] | q[2 * i + 1] << 4);
}

/* Largest magnitude of 16-bit floats, as their bits without sign. */
static uint16_t moqi_top_u16(const uint8_t *in, int64_t n)
{
    uint16_t most = 0;
    for (int64_t c = 0; c < n; c++) {
        uint16_t v = (uint16_t)(moqi_get_u16(in + 2 * c) & 0x7fffu);
        most = v > most ? v : most;
    }
    return most;
}
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

enum { MOQI_CODES_E2M1, MOQI_CODES_MX_E2M1, MOQI_CODES_E4M3 };

static void moqi_codes(int avx2, int kind, const float *x, const float *step, int64_t n, uint8_t *q)
{
#ifdef MOQI_X86
    if (avx2 && kind == MOQI_CODES_E2M1) { moqi_codes_e2m1_avx2(x, step, n, q); return; }
    if (avx2 && kind == MOQI_CODES_MX_E2M1) { moqi_codes_mx_e2m1_avx2(x, step, n, q); return; }
    if (avx2) { moqi_codes_e4m3_avx2(x, step, n, q); return; }
#endif
    (void)avx2;
    if (kind == MOQI_CODES_E2M1) moqi_codes_e2m1(x, step, n, q);
    else if (kind == MOQI_CODES_MX_E2M1) moqi_codes_mx_e2m1(x, step, n, q);
    else moqi_codes_e4m3(x, step, n, q);
}

static void moqi_fill(float *p, int64_t n, float v)
{
    for (int64_t i = 0; i < n; i++) p[i] = v;
}

/* A value as the model's own type holds it. */
static float moqi_in_model(moq_dtype t, float v)
{
    return t == MOQ_BF16 ? moq_bf16_decode(moq_bf16_encode(v)) : t == MOQ_F16 ? moq_f16_decode(moq_f16_encode(v)) : v;
}

/* Row r of the source as F32, [cols]. */
static void moqi_source_row(const moqi_encoder *e, int64_t r, float *x)
{
    const moq_encode_desc *d = e->d;
    size_t bytes = (size_t)moq_dtype_bits(d->dtype) / 8;
    moq_to_f32(d->dtype, (const uint8_t *)d->data + (size_t)(r * d->cols) * bytes, (size_t)d->cols, x);
}

static uint32_t moqi_max_u32(uint32_t a, uint32_t b) { return a > b ? a : b; }

/* ---- FP8 ---- */

/* One scale for all: ModelOpt's quotient is computed and rounded in the model's type, by the scale rounded to that type; the stored
   scale is unrounded. Source: a 0-d tensor does not promote. F32 models divide in F32. */
static uint8_t moqi_fp8_code(const moqi_encoder *e, float v)
{
    moq_dtype t = e->d->model;
    return moqi_e4m3_code(moqi_in_model(t, v / moqi_in_model(t, e->global)));
}

static uint32_t moqi_rows_fp8_tensor(const moqi_encoder *e, int64_t first, int64_t last, float *x)
{
    int64_t cols = e->d->cols;
    uint32_t top = 0;
    for (int64_t r = first; r < last; r++) {
        uint8_t *out = e->codes + r * cols;
        if (e->table) {
            const uint8_t *in = (const uint8_t *)e->d->data + (size_t)(r * cols) * 2;
            uint16_t most = moqi_top_u16(in, cols);
            for (int64_t c = 0; c < cols; c++) out[c] = e->table[moqi_get_u16(in + 2 * c)];
            top = moqi_max_u32(top, moqi_f32_bits(e->d->dtype == MOQ_BF16 ? moq_bf16_decode(most) : moq_f16_decode(most)));
            continue;
        }
        moqi_source_row(e, r, x);
        top = moqi_max_u32(top, moqi_top_bits(x, cols));
        for (int64_t c = 0; c < cols; c++) out[c] = moqi_fp8_code(e, x[c]);
    }
    return top;
}

/* A scale for every row, F32 division. */
static uint32_t moqi_rows_fp8_row(const moqi_encoder *e, int64_t first, int64_t last, float *x)
{
    int64_t cols = e->d->cols;
    uint32_t all = 0;
    for (int64_t r = first; r < last; r++) {
        moqi_source_row(e, r, x);
        int32_t most;
        moqi_tops(e->avx2, x, 1, cols, &most);
        uint32_t top = (uint32_t)most;
        float s = moqi_scale_of(e->d->amax ? e->d->amax[r] : moqi_bits_f32(top), e->bound, e->inverse);
        ((float *)e->scales)[r] = s;
        moqi_fill(x + cols, cols, s);
        if (e->codes) moqi_codes(e->avx2, MOQI_CODES_E4M3, x, x + cols, cols, e->codes + r * cols);
        all = moqi_max_u32(all, top);
    }
    return all;
}

/* Blocks of rows and columns; a task holds whole block rows. The scales [grid_cols] of a block row hold its amax values first. */
static uint32_t moqi_rows_fp8_block(const moqi_encoder *e, int64_t first, int64_t last, float *x)
{
    int64_t cols = e->d->cols, g = e->group_cols;
    uint32_t all = 0;
    for (int64_t r0 = first; r0 < last; r0 += e->group_rows) {
        int64_t r1 = moqi_min(last, r0 + e->group_rows), band = r0 / e->group_rows * e->grid_cols;
        float *s = (float *)e->scales + band;
        memset(s, 0, (size_t)e->grid_cols * sizeof *s);
        for (int64_t r = r0; r < r1; r++) {
            moqi_source_row(e, r, x);
            for (int64_t k = 0; k < e->grid_cols; k++) {
                uint32_t top = moqi_top_bits(x + k * g, moqi_min(g, cols - k * g));
                if (top > moqi_f32_bits(s[k])) s[k] = moqi_bits_f32(top);
                all = moqi_max_u32(all, top);
            }
        }
        for (int64_t k = 0; k < e->grid_cols; k++) s[k] = moqi_scale_of(e->d->amax ? e->d->amax[band + k] : s[k], e->bound, e->inverse);
        for (int64_t c = 0; c < cols; c += g) moqi_fill(x + cols + c, moqi_min(g, cols - c), s[c / g]);
        for (int64_t r = r0; e->codes && r < r1; r++) {
            moqi_source_row(e, r, x);
            moqi_codes(e->avx2, MOQI_CODES_E4M3, x, x + cols, cols, e->codes + r * cols);
        }
    }
    return all;
}

/* ---- integers ---- */

static uint32_t moqi_rows_int8(const moqi_encoder *e, int64_t first, int64_t last, float *x)
{
    int64_t cols = e->d->cols;
    uint32_t all = 0;
    for (int64_t r = first; r < last; r++) {
        moqi_source_row(e, r, x);
        int32_t most;
        moqi_tops(e->avx2, x, 1, cols, &most);
        uint32_t top = (uint32_t)most;
        float s = moqi_scale_of(e->d->amax ? e->d->amax[r] : moqi_bits_f32(top), e->bound, e->inverse);
        ((float *)e->scales)[r] = s;
        for (int64_t c = 0; e->codes && c < cols; c++) e->codes[r * cols + c] = (uint8_t)moqi_int_code(x[c] / s, 127);
        all = moqi_max_u32(all, top);
    }
    return all;
}

/* Scales of one row of groups; x becomes its codes as small integers. */
static uint32_t moqi_int4_row(const moqi_encoder *e, int64_t r, float *x)
{
    int64_t g = e->group_cols;
    uint32_t all = 0;
    moqi_source_row(e, r, x);
    for (int64_t k = 0; k < e->grid_cols; k++) {
        float *b = x + k * g;
        uint32_t top = moqi_top_bits(b, g);
        float s = moqi_scale_of(e->d->amax ? e->d->amax[r * e->grid_cols + k] : moqi_bits_f32(top), e->bound, e->inverse);
        ((float *)e->scales)[r * e->grid_cols + k] = s;
        for (int64_t c = 0; e->codes && c < g; c++) b[c] = (float)moqi_int_code(b[c] / s, 7);
        all = moqi_max_u32(all, top);
    }
    return all;
}

/* Two rows make a row of bytes: even row in the low nibble. */
static uint32_t moqi_rows_int4(const moqi_encoder *e, int64_t first, int64_t last, float *x)
{
    int64_t cols = e->d->cols;
    uint32_t all = 0;
    for (int64_t r = first; r < last; r += 2) {
        float *y = x + cols;
        all = moqi_max_u32(all, moqi_int4_row(e, r, x));
        all = moqi_max_u32(all, moqi_int4_row(e, r + 1, y));
        for (int64_t c = 0; e->codes && c < cols; c++) e->codes[r / 2 * cols + c] = (uint8_t)(((int32_t)x[c] & 15) | ((int32_t)y[c] & 15) << 4);
    }
    return all;
}

/* ---- NVFP4 ---- */

/* The stored E4M3 block scale, clamped to [2^-9, 448] so that it is never 0.
     from the data: s = amax / (6 global), 0 becomes 1
     static:        s = amax / 6 in weight units, 0 becomes 1; then s * M / (global_amax / 6), M = 448 or 256 */
static uint8_t moqi_block_scale(const moqi_encoder *e, float amax, int is_static)
{
    float s;
    if (is_static) {
        s = amax * moqi_bits_f32(MOQI_INV_6);
        if (!(s > 0)) s = 1;
        s = s * e->norm / (e->global_amax * moqi_bits_f32(MOQI_INV_6));
    } else {
        s = amax / (6 * e->global);
        if (!(s > 0)) s = 1;
    }
    s = s < 0.001953125f ? 0.001953125f : s > 448 ? 448 : s;
    return moqi_e4m3_code(s);
}

static uint32_t moqi_rows_nvfp4(const moqi_encoder *e, int64_t first, int64_t last, float *x)
{
    int64_t cols = e->d->cols, g = e->group_cols, n = e->grid_cols;
    uint32_t all = 0;
    int32_t *tops = (int32_t *)(void *)(x + 2 * cols);
    for (int64_t r = first; r < last; r++) {
        moqi_source_row(e, r, x);
        moqi_tops(e->avx2, x, n, g, tops);
        for (int64_t k = 0; k < n; k++) {
            uint32_t top = (uint32_t)tops[k];
            const float *given = e->d->amax ? &e->d->amax[r * n + k] : NULL;
            uint8_t s = moqi_block_scale(e, given ? *given : moqi_bits_f32(top), given != NULL);
            ((uint8_t *)e->scales)[r * n + k] = s;
            moqi_fill(x + cols + k * g, g, moq_e4m3_decode(s) * e->global);
            all = moqi_max_u32(all, top);
        }
        if (!e->codes) continue;
        moqi_codes(e->avx2, MOQI_CODES_E2M1, x, x + cols, cols, (uint8_t *)(x + 2 * cols));
        moqi_pack_nibbles((const uint8_t *)(x + 2 * cols), cols, e->codes + r * cols / 2);
    }
    return all;
}

/* ---- MX: a power of two for every 32 columns ---- */

/* The smallest e with amax <= bound * 2^e, as a byte e + 127: ceil(log2(amax / bound)), not below -127. The quotient's exponent is one
   too small exactly when its mantissa is not zero. */
static uint8_t moqi_mx_scale(float amax, float bound)
{
    uint32_t b = moqi_f32_bits(amax / bound);
    uint32_t e = b <= 0x00400000u ? 0 : (b >> 23) + ((b & 0x7fffffu) != 0);
    return (uint8_t)(e > 254 ? 254 : e);
}

/* Code of a value already divided by its scale, for the element types of MX. */
static uint32_t moqi_mx_code(moq_dtype elem, float v)
{
    switch ((int)elem) {
    case MOQ_F4: return moqi_mx_e2m1_code(v);
    case MOQ_F8_E4M3: return moqi_e4m3_code(v);
    case MOQ_F6_E2M3: return moq_e2m3_encode(v);
    case MOQ_F6_E3M2: return moq_e3m2_encode(v);
    default: { /* integers, symmetric */
        int32_t q = moqi_int_code(v, 127);
        return (uint32_t)(q < -127 ? -127 : q) & 255u;
    }
    }
}

/* One row whose scales stand behind it: x [2, cols]. */
static void moqi_mx_codes(const moqi_encoder *e, float *x, uint8_t *out)
{
    moq_dtype elem = e->d->scheme.weight.elem;
    int64_t cols = e->d->cols, bits = moq_dtype_bits(elem);
    uint8_t *q = (uint8_t *)(x + 2 * cols);
    if (elem == MOQ_F8_E4M3) { moqi_codes(e->avx2, MOQI_CODES_E4M3, x, x + cols, cols, out); return; }
    if (elem == MOQ_F4) {
        moqi_codes(e->avx2, MOQI_CODES_MX_E2M1, x, x + cols, cols, q);
        moqi_pack_nibbles(q, cols, out);
        return;
    }
    memset(out, 0, (size_t)(cols * bits / 8));
    for (int64_t c = 0; c < cols; c++) { /* any width, low bits first */
        uint32_t code = moqi_mx_code(elem, x[c] / x[cols + c]) << (c * bits % 8);
        out[c * bits / 8] = (uint8_t)(out[c * bits / 8] | (code & 255u));
        if (code >> 8) out[c * bits / 8 + 1] = (uint8_t)(code >> 8);
    }
}

static uint32_t moqi_rows_mx(const moqi_encoder *e, int64_t first, int64_t last, float *x)
{
    int64_t cols = e->d->cols, g = e->group_cols, n = e->grid_cols;
    int bits = moq_dtype_bits(e->d->scheme.weight.elem);
    uint32_t all = 0;
    int32_t *tops = (int32_t *)(void *)(x + 2 * cols);
    for (int64_t r = first; r < last; r++) {
        moqi_source_row(e, r, x);
        moqi_tops(e->avx2, x, n, g, tops);
        for (int64_t k = 0; k < n; k++) {
            uint32_t top = (uint32_t)tops[k];
            uint8_t s = moqi_mx_scale(moqi_bits_f32(top), e->bound);
            ((uint8_t *)e->scales)[r * n + k] = s;
            moqi_fill(x + cols + k * g, g, moq_e8m0_decode(s)); /* dividing by a power of two is exact */
            all = moqi_max_u32(all, top);
        }
        if (e->codes) moqi_mx_codes(e, x, e->codes + r * (cols * bits / 8));
    }
    return all;
}

/* ---- amax and searches ---- */

/* Squared error of a block quantized with one scale. */
static float moqi_block_error(const float *x, int64_t n, float step)
{
    static const float values[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    float sum = 0;
    for (int64_t i = 0; i < n; i++) {
        float q = values[moqi_e2m1_code(x[i] / step) & 7u] * step, d = fabsf(x[i]) - q;
        sum += d * d;
    }
    return sum;
}

/* All 126 positive E4M3 scales: c = code * fl32(1/448), step c * A / 6; the smaller scale wins a tie. A scale that clips the largest
   value by more than the best error so far cannot win. */
static float moqi_sweep_block(const float *x, int64_t n, float amax, float global_amax)
{
    float best = -1, choice = global_amax;
    for (int code = 1; code <= 0x7e; code++) {
        float c = moq_e4m3_decode((uint8_t)code) * moqi_bits_f32(MOQI_INV_448);
        float top = c * global_amax, clipped = amax - top;
        float step = top / 6;
        if (best >= 0 && clipped > 0 && clipped * clipped * 0.999f > best) continue;
        if (!(step > 0)) continue;
        float loss = moqi_block_error(x, n, step);
        if (best >= 0 && !(loss < best)) continue;
        best = loss;
        choice = top;
    }
    return choice;
}

/* Fake quantization with a static block scale: S = (A * 448 / M) / 6, k = 448 / S, s = e4m3(a / 6 * k) / k. A scale of 0 makes all 0. */
static float moqi_static_error(const float *x, int64_t n, float amax, float global_amax, float norm)
{
    float whole = global_amax * (448 / norm) * moqi_bits_f32(MOQI_INV_6), k = 448 / whole;
    float s = moq_e4m3_decode(moqi_e4m3_code(amax * moqi_bits_f32(MOQI_INV_6) * k)) * (1 / k);
    return moqi_block_error(x, n, s > 0 ? s : 1e30f);
}

/* Rows of amax values, [grid_cols] for each row; scales of several rows are merged by moq_find_amax. */
static uint32_t moqi_rows_amax(const moqi_encoder *e, int64_t first, int64_t last, float *x)
{
    int64_t cols = e->d->cols, g = e->group_cols, n = e->grid_cols;
    uint32_t all = 0;
    if (!e->amax && moq_dtype_bits(e->d->dtype) == 16) { /* only the largest of all: no need to decode */
        uint16_t most = moqi_top_u16((const uint8_t *)e->d->data + (size_t)(first * cols) * 2, (last - first) * cols);
        return moqi_f32_bits(e->d->dtype == MOQ_BF16 ? moq_bf16_decode(most) : moq_f16_decode(most));
    }
    for (int64_t r = first; r < last; r++) {
        moqi_source_row(e, r, x);
        all = moqi_max_u32(all, moqi_top_bits(x, cols));
        for (int64_t k = 0; e->amax && k < n; k++) {
            const float *b = x + k * g;
            int64_t m = moqi_min(g, cols - k * g);
            float v = moqi_bits_f32(moqi_top_bits(b, m));
            if (e->d->search == MOQ_SEARCH_SWEEP) v = moqi_sweep_block(b, m, v, e->global_amax);
            if (e->d->search == MOQ_SEARCH_FOUR_OVER_SIX) {
                float wide = v * 1.5f; /* in F32: ModelOpt multiplies its F32 amax */
                if (moqi_static_error(b, m, wide, e->global_amax, e->norm) < moqi_static_error(b, m, v, e->global_amax, e->norm)) v = wide;
            }
            float *out = &e->amax[r / e->group_rows * n + k];
            if (e->group_rows == 1 || v > *out) *out = v;
        }
    }
    return all;
}

/* ---- running ---- */

static void moqi_encode_task(void *arg, int index, int worker)
{
    moqi_encoder *e = (moqi_encoder *)arg;
    int64_t first = index * e->step;
    e->top[index] = e->rows(e, first, moqi_min(e->d->rows, first + e->step), e->scratch + (size_t)worker * 3 * (size_t)e->d->cols);
}

/* All rows through `rows`; *top: the largest magnitude. Tasks are whole bands of group_rows, and at least two rows. */
static moq_result moqi_encode_run(moqi_encoder *e, moqi_encode_rows rows, float *top, moq_error *err)
{
    const moq_encode_desc *d = e->d;
    int banded = rows == moqi_rows_fp8_block || (rows == moqi_rows_amax && e->amax); /* a band of rows shares scales */
    int64_t unit = banded && e->group_rows > 1 ? e->group_rows : 2;
    e->step = moqi_ceil_div(moqi_ceil_div(d->rows, MOQI_MAX_TASKS), unit) * unit;
    int tasks = (int)moqi_ceil_div(d->rows, e->step), workers = d->parallel.run ? d->parallel.workers : 1;
    uint64_t bytes = (uint64_t)workers * 3 * (uint64_t)d->cols * sizeof(float);
    uint32_t all = 0;
    e->rows = rows;
    e->scratch = bytes <= SIZE_MAX / 2 ? (float *)moq_allocate(d->allocator, (size_t)bytes) : NULL;
    if (!e->scratch) return moqi_nomem(err, bytes);
    if (d->parallel.run) d->parallel.run(d->parallel.user, tasks, moqi_encode_task, e);
    else for (int i = 0; i < tasks; i++) moqi_encode_task(e, i, 0);
    moq_release(d->allocator, e->scratch, (size_t)bytes);
    for (int i = 0; i < tasks; i++) all = moqi_max_u32(all, e->top[i]);
    if (all >= 0x7f800000u)
        return moqi_fail(err, MOQ_E_SCALE, moqi_at(NULL, "layer", d->name ? d->name : "", -1),
                         "the weights hold NaN or infinity, which no quantized format can express; repair the source checkpoint");
    if (top) *top = moqi_bits_f32(all);
    return MOQ_OK;
}

/* What can be encoded: element, scale, bits of 1 / bound, bound, rows function. */
static const struct { moq_dtype elem, scale; float bound; uint32_t inverse; moqi_encode_rows rows; } moqi_encoders[] = {
    {MOQ_F8_E4M3, MOQ_F32, 448, MOQI_INV_448, moqi_rows_fp8_row},
    {MOQ_I8, MOQ_F32, 127, MOQI_INV_127, moqi_rows_int8},
    {MOQ_I4, MOQ_F32, 7, MOQI_INV_7, moqi_rows_int4},
    {MOQ_F4, MOQ_F8_E4M3, 6, MOQI_INV_6, moqi_rows_nvfp4},
    {MOQ_F4, MOQ_F8_E8M0, 6, 0, moqi_rows_mx},
    {MOQ_F6_E3M2, MOQ_F8_E8M0, 28, 0, moqi_rows_mx},
    {MOQ_F6_E2M3, MOQ_F8_E8M0, 7.5f, 0, moqi_rows_mx},
    {MOQ_F8_E4M3, MOQ_F8_E8M0, 448, 0, moqi_rows_mx},
    {MOQ_I8, MOQ_F8_E8M0, 127, 0, moqi_rows_mx}
};

/* Rules of shape: groups of columns are whole, INT4 rows come in pairs; only FP8 blocks may be ragged. */
static moq_result moqi_check_shape(const moqi_encoder *e, moq_error *err)
{
    const moq_encode_desc *d = e->d;
    moqi_where at = moqi_at(NULL, "layer", d->name ? d->name : "", -1);
    char format[64];
    moq_scheme_name(&d->scheme, format, sizeof format);
    int blocks = d->scheme.weight.elem == MOQ_F8_E4M3 && d->scheme.weight.scale == MOQ_F32;
    if (!blocks && d->cols % e->group_cols != 0)
        return moqi_fail(err, MOQ_E_SHAPE, at, "%lld input features are no multiple of the %lld that share a scale in %s; exclude this layer or choose "
                         "another recipe", (long long)d->cols, (long long)e->group_cols, format);
    if (d->scheme.weight.elem == MOQ_I4 && d->rows % 2 != 0)
        return moqi_fail(err, MOQ_E_SHAPE, at, "%lld output features cannot be packed in pairs as %s does; exclude this layer", (long long)d->rows, format);
    return MOQ_OK;
}

/* Find the encoder of a scheme and resolve its groups. */
static moq_result moqi_encoder_make(moqi_encoder *e, const moq_encode_desc *d, moq_error *err)
{
    const moq_coding *w = &d->scheme.weight;
    char format[64];
    memset(e, 0, sizeof *e);
    e->d = d;
    e->avx2 = (moqi_cpu_flags() & (uint32_t)MOQI_CPU_AVX2) != 0;
    if (d->rows <= 0 || d->cols <= 0 || (d->dtype != MOQ_F32 && d->dtype != MOQ_BF16 && d->dtype != MOQ_F16))
        return moqi_fail(err, MOQ_E_ARG, moqi_at(NULL, "layer", d->name ? d->name : "", -1), "the source must be a matrix of F32, BF16 or F16");
    for (size_t i = 0; i < MOQI_COUNT(moqi_encoders); i++) {
        if (moqi_encoders[i].elem != w->elem || moqi_encoders[i].scale != w->scale) continue;
        e->rows = moqi_encoders[i].rows;
        e->bound = moqi_encoders[i].bound;
        e->inverse = moqi_encoders[i].inverse;
    }
    e->group_rows = w->group_rows == MOQ_ALL ? d->rows : w->group_rows;
    e->group_cols = w->group_cols == MOQ_ALL ? d->cols : w->group_cols;
    if (!e->rows || e->group_rows <= 0 || e->group_cols <= 0 || w->zero_point) {
        moq_scheme_name(&d->scheme, format, sizeof format);
        return moqi_fail(err, MOQ_E_UNSUPPORTED, moqi_at(NULL, "layer", d->name ? d->name : "", -1), "weights cannot be encoded as %s", format);
    }
    if (w->group_rows == MOQ_ALL && w->elem == MOQ_F8_E4M3) e->rows = moqi_rows_fp8_tensor;
    else if (w->group_rows != 1 && w->elem == MOQ_F8_E4M3) e->rows = moqi_rows_fp8_block;
    e->grid_rows = moqi_ceil_div(d->rows, e->group_rows);
    e->grid_cols = moqi_ceil_div(d->cols, e->group_cols);
    e->norm = d->search == MOQ_SEARCH_FOUR_OVER_SIX ? 256.0f : 448.0f;
    return moqi_check_shape(e, err);
}

/* The stored per-tensor scale: amax / (6 * M) of NVFP4; / 448 where the product of code and block scale must fit E4M3, for the second
   rounding of W4A8_AWQ and for FP8. An all-zero NVFP4 tensor takes the scale of amax 1: any would do, but 0 would divide 0 by 0. */
static float moqi_global_scale(const moq_scheme *s, moq_amax_search search, float amax)
{
    if (s->weight.elem != MOQ_F4 || s->input.elem == MOQ_F8_E4M3) return moqi_scale_of(amax, 448, MOQI_INV_448);
    return (amax > 0 ? amax : 1) * moqi_bits_f32(search == MOQ_SEARCH_FOUR_OVER_SIX ? MOQI_INV_1536 : MOQI_INV_2688);
}

static void moqi_set_global(moqi_encoder *e, float amax)
{
    e->global_amax = amax > 0 ? amax : 1;
    e->global = moqi_global_scale(&e->d->scheme, e->d->search, amax);
}

MOQ_API moq_result moq_encode_bytes(const moq_encode_desc *d, uint64_t *codes, uint64_t *scales, moq_error *err)
{
    moqi_encoder e;
    if (!d || !codes || !scales) return moq_fail(err, MOQ_E_ARG, "moq_encode_bytes", "desc, codes or scales is NULL");
    *codes = *scales = 0;
    moq_result r = moqi_encoder_make(&e, d, err);
    if (r != MOQ_OK) return r;
    uint64_t n, m;
    if (!moqi_mul((uint64_t)d->rows, (uint64_t)d->cols, &n) || !moqi_mul(n, 8, &m) || n > (uint64_t)INT64_MAX / 64)
        return moqi_fail(err, MOQ_E_OVERFLOW, moqi_at(NULL, "layer", d->name ? d->name : "", -1), "[%lld, %lld] does not fit in memory",
                         (long long)d->rows, (long long)d->cols);
    *codes = n * (uint64_t)moq_dtype_bits(d->scheme.weight.elem) / 8;
    *scales = (uint64_t)e.grid_rows * (uint64_t)e.grid_cols * (uint64_t)moq_dtype_bits(d->scheme.weight.scale) / 8;
    return MOQ_OK;
}

/* The code of every 16-bit input, for matrices that are larger than the table: 65536 encodings instead of one for each weight. */
static moq_result moqi_fp8_table(moqi_encoder *e, uint8_t **table, moq_error *err)
{
    const moq_encode_desc *d = e->d;
    *table = NULL;
    if (moq_dtype_bits(d->dtype) != 16 || d->rows < 65536 / d->cols) return MOQ_OK;
    *table = (uint8_t *)moq_allocate(d->allocator, 65536);
    if (!*table) return moqi_nomem(err, 65536);
    for (uint32_t i = 0; i < 65536; i++)
        (*table)[i] = moqi_fp8_code(e, d->dtype == MOQ_BF16 ? moq_bf16_decode((uint16_t)i) : moq_f16_decode((uint16_t)i));
    e->table = *table;
    return MOQ_OK;
}

MOQ_API moq_result moq_encode(const moq_encode_desc *d, void *codes, void *scales, float *global, moq_error *err)
{
    moqi_encoder e;
    if (!d || !d->data || !scales) return moq_fail(err, MOQ_E_ARG, "moq_encode", "desc, its data or scales is NULL");
    moq_encode_desc copy = *d;
    uint8_t *table = NULL;
    float *found = NULL;
    uint64_t found_bytes = 0;
    if (!copy.model) copy.model = copy.dtype;
    if (global) *global = 0;
    moqi_clear(err);
    moq_result r = moqi_encoder_make(&e, &copy, err);
    if (r != MOQ_OK) return r;
    moqi_encode_rows rows = e.rows;
    int per_tensor = rows == moqi_rows_fp8_tensor;
    float amax = per_tensor && copy.amax ? copy.amax[0] : copy.global_amax;
    if (!(amax > 0) && (per_tensor || copy.scheme.weight.has_global)) r = moqi_encode_run(&e, moqi_rows_amax, &amax, err);
    e.rows = rows;
    moqi_set_global(&e, amax);
    if (r == MOQ_OK && rows == moqi_rows_nvfp4 && copy.search != MOQ_SEARCH_MAX && !copy.amax) { /* static blocks: search them first */
        found_bytes = (uint64_t)e.grid_rows * (uint64_t)e.grid_cols * sizeof(float);
        found = (float *)moq_allocate(copy.allocator, (size_t)found_bytes);
        e.amax = found;
        r = found ? moqi_encode_run(&e, moqi_rows_amax, NULL, err) : moqi_nomem(err, found_bytes);
        copy.amax = found;
    }
    if (r == MOQ_OK && per_tensor && codes) r = moqi_fp8_table(&e, &table, err);
    e.codes = (uint8_t *)codes;
    e.scales = scales;
    if (r == MOQ_OK && (codes || !per_tensor)) r = moqi_encode_run(&e, rows, NULL, err);
    if (r == MOQ_OK && per_tensor) memcpy(scales, &e.global, sizeof e.global);
    if (r == MOQ_OK && global && copy.scheme.weight.has_global) *global = e.global;
    moq_release(copy.allocator, table, 65536);
    moq_release(copy.allocator, found, (size_t)found_bytes);
    return r;
}

MOQ_API moq_result moq_find_amax(const moq_encode_desc *d, float *amax, float *global_amax, moq_error *err)
{
    moqi_encoder e;
    if (!d || !d->data) return moq_fail(err, MOQ_E_ARG, "moq_find_amax", "desc or its data is NULL");
    moq_encode_desc copy = *d;
    float top = copy.global_amax;
    if (!copy.model) copy.model = copy.dtype;
    if (global_amax) *global_amax = 0;
    moqi_clear(err);
    moq_result r = moqi_encoder_make(&e, &copy, err);
    if (r == MOQ_OK && (!amax || copy.search != MOQ_SEARCH_MAX) && !(top > 0)) r = moqi_encode_run(&e, moqi_rows_amax, &top, err);
    if (r == MOQ_OK && amax) {
        e.global_amax = top;
        e.amax = amax;
        memset(amax, 0, (size_t)(e.grid_rows * e.grid_cols) * sizeof *amax);
        r = moqi_encode_run(&e, moqi_rows_amax, copy.global_amax > 0 ? NULL : &top, err);
    }
    if (r == MOQ_OK && global_amax) *global_amax = top;
    return r;
}

/* ------------------------------------------------------------------------------------------------
   >>recipe          which modules a recipe covers, recorded calibration, smoothing, shared scales
   Fills a plan: one target for each module of the source, with everything that its encoding needs. Reads weights, writes nothing.
   ------------------------------------------------------------------------------------------------ */

/* ModelOpt matches quantizer names ("model.layers.0.mlp.up_proj.weight_quantizer") against ordered pattern lists; later entries win.
   Every preset but one ends with this list of what is never quantized. */
static const char *const moqi_never[] = {
    "*block_sparse_moe.gate*", "*linear_attn.conv1d*", "*self_attention.conv1d*", "*linear_attn.in_proj_a*", "*linear_attn.in_proj_b*",
    "*lm_head*", "*mixer.conv1d*", "*mlp.gate.*", "*mlp.shared_expert_gate.*", "*output_layer*", "*proj_out.*", "*router*", "mtp.*", "output.*",
    "*embed_vision*", "*vision_tower*", "*visual*", "*vision_model*", "*multi_modal_projector*"
};

#define MOQI_MAMBA_OFF "*fc1_latent_proj*", "*fc2_latent_proj*", "*q_proj*", "*k_proj*", "*v_proj*", "*o_proj*", \
    "*self_attention.linear_qkv*", "*self_attention.linear_proj*"

/* Recipes that do not simply cover every linear: patterns that turn on (none: all), patterns that turn off. */
typedef struct moqi_coverage {
    const char *recipe;
    const char *on[6];
    const char *off[10];
    int heads;          /* without the list above: lm_head too */
} moqi_coverage;

static const moqi_coverage moqi_coverages[] = {
    {"nvfp4_mlp_only", {"*mlp*", "*.mixer.up_proj*", "*.mixer.down_proj*", "*block_sparse_moe*", "*.experts.*", NULL}, {NULL}, 0},
    {"nvfp4_mlp_weight_only", {"*mlp*", "*block_sparse_moe*", NULL}, {NULL}, 0},
    {"mxfp4_mlp_weight_only", {"*mlp*", "*block_sparse_moe*", NULL}, {NULL}, 0},
    {"nvfp4_omlp_only", {"*o_proj*", "*mlp*", "*.mixer.up_proj*", "*.mixer.down_proj*", "*block_sparse_moe*", NULL}, {NULL}, 0},
    {"nvfp4_experts_only", {"*block_sparse_moe*", "*.experts.*", NULL}, {NULL}, 0},
    {"nvfp4_experts_only_mse", {"*block_sparse_moe*", "*.experts.*", NULL}, {NULL}, 0},
    {"nvfp4_fp8_mha", {NULL}, {NULL}, 1},
    {"mamba_moe_fp8_aggressive", {NULL}, {MOQI_MAMBA_OFF, NULL}, 0},
    {"mamba_moe_fp8_conservative", {NULL}, {MOQI_MAMBA_OFF, "*mixer.in_proj*", "*mixer.out_proj*"}, 0},
    {"mamba_moe_nvfp4_aggressive", {NULL}, {MOQI_MAMBA_OFF, NULL}, 0},
    {"mamba_moe_nvfp4_conservative", {NULL}, {MOQI_MAMBA_OFF, "*mixer.in_proj*", "*mixer.out_proj*"}, 0}
};

/* One module of the source and what becomes of it. Vectors are F32 [cols] unless said otherwise; NULL: none. */
typedef struct moqi_target {
    const char *name;
    moq_linear w;             /* the source, as bound */
    const moq_recipe *recipe; /* NULL: left as it is */
    moq_dtype model;          /* float type of the source; BF16 for quantized sources */
    uint32_t kind;            /* MOQI_STORE_... of the source */
    uint8_t expert;           /* a member of a list of experts: "....experts.3.up_proj" */
    uint8_t embedding;
    uint8_t cast;             /* MXFP4 to NVFP4: the codes stay, scales are only written differently */
    size_t leader;            /* first member of the group that shares an input; its own index when alone */
    size_t members;           /* of the group, said by its leader */
    moq_amax_search search;
    float input_amax;         /* 0: none */
    float global_amax;        /* of the weight, the largest of the group where scales are shared */
    const float *amax;        /* recorded or searched amax of scale groups */
    float *kept;              /* searched blocks between the scales and the codes; bytes of it */
    uint64_t kept_bytes;
    float recorded_amax;      /* scalar, where calibration clipped it; 0: of the weight */
    const float *smooth;      /* weight columns are multiplied by it: 1 / p */
    const float *own_p;       /* pre_quant_scale in the model's type */
    const float *mean_p;      /* of the group, when it has more than one member */
    const float *row_p;       /* [rows] pre_quant_scale of the next layer, folded into this one's rows */
    const float *out_p;       /* pre_quant_scale to store; NULL: none or folded away */
} moqi_target;

/* A norm whose weight takes up the pre_quant_scale of the layers behind it. */
typedef struct moqi_fold { const char *tensor; const float *p; int plus_one; } moqi_fold;

typedef struct moqi_plan {
    const moq_checkpoint *ck;
    const moq_quantize_desc *desc;
    const moq_recipe *recipe;     /* NULL: "none" */
    moqi_arena *r;
    const moq_tensor **records;   /* recorded calibration, sorted by name */
    size_t record_count;
    const char *records_name;     /* file, for messages; NULL: nothing recorded */
    moqi_target *targets;         /* in the order of the checkpoint's modules, by name */
    size_t count;
    moqi_map map;                 /* module name -> target */
    moqi_fold *folds;
    size_t fold_count;
    float *work;                  /* one weight as F32, for those that cannot be read in place */
    uint64_t work_bytes;
    moq_parallel parallel;
    int nemotron;                 /* modules are "backbone. ..." on disk, "model. ..." in calibration */
} moqi_plan;

/* ---- coverage ---- */

static int moqi_any_glob(const char *const *patterns, size_t count, const char *name)
{
    for (size_t i = 0; i < count && patterns[i]; i++)
        if (moq_glob_match(patterns[i], name)) return 1;
    return 0;
}

/* Does the recipe quantize the module, given by its quantizer's name? */
static int moqi_recipe_covers(const moq_recipe *recipe, const char *quantizer)
{
    const moqi_coverage *c = NULL;
    for (size_t i = 0; i < MOQI_COUNT(moqi_coverages); i++)
        if (strcmp(moqi_coverages[i].recipe, recipe->name) == 0) c = &moqi_coverages[i];
    if (c && c->on[0] && !moqi_any_glob(c->on, MOQI_COUNT(c->on), quantizer)) return 0;
    if (c && moqi_any_glob(c->off, MOQI_COUNT(c->off), quantizer)) return 0;
    return (c && c->heads) || !moqi_any_glob(moqi_never, MOQI_COUNT(moqi_never), quantizer);
}

/* Last component of a dotted name. */
static const char *moqi_last_part(const char *name)
{
    const char *dot = strrchr(name, '.');
    return dot ? dot + 1 : name;
}

static int moqi_is_one_of(const char *s, const char *const *list, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(s, list[i]) == 0) return 1;
    return 0;
}

/* "...experts.3.up_proj": the parts around the number; 0 when it is no expert. */
static int moqi_expert_name(const char *name, size_t *container, uint32_t *number, const char **part)
{
    const char *at = strstr(name, "experts.");
    for (const char *next = at; next; next = strstr(next + 1, "experts.")) at = next;
    if (!at || at[8] < '0' || at[8] > '9') return 0;
    const char *p = at + 8;
    uint32_t n = 0;
    for (; *p >= '0' && *p <= '9' && n < 100000; p++) n = n * 10 + (uint32_t)(*p - '0');
    if (*p != '.') return 0;
    *container = (size_t)(at - name) + 7;
    *number = n;
    *part = p + 1;
    return 1;
}

/* A router is the child `gate`, `router` or `shared_expert_gate` of a module that has experts. */
static int moqi_is_router(const moqi_plan *p, const char *name)
{
    static const char *const names[] = {"gate", "router", "shared_expert_gate"};
    const char *last = moqi_last_part(name);
    char text[MOQ_MAX_NAME_BYTES + 16];
    if (!moqi_is_one_of(last, names, MOQI_COUNT(names)) || last == name) return 0;
    size_t n = moqi_format(text, sizeof text, "%.*sexperts", (int)(last - name), name);
    for (size_t i = 0; i < p->ck->module_count; i++)
        if (strncmp(p->ck->modules[i].name, text, n) == 0) return 1;
    return 0;
}

/* Layers past num_hidden_layers predict further tokens; ModelOpt leaves them alone. */
static int moqi_is_extra_layer(const moqi_plan *p, const char *name)
{
    int64_t layers, n = 0;
    const char *at = strstr(name, "layers.");
    if (!at || !moq_json_int(moq_json_find(moq_get_config(p->ck), "num_hidden_layers"), &layers)) return 0;
    for (at += 7; *at >= '0' && *at <= '9' && n < 1000000; at++) n = n * 10 + (*at - '0');
    return n >= layers;
}

/* Does a pattern name the module, its quantizer, or the container of experts that it is in? */
static int moqi_names(const char *pattern, const char *name, const char *quantizer)
{
    char container[MOQ_MAX_NAME_BYTES + 8];
    size_t n;
    uint32_t number;
    const char *leaf;
    if (moq_glob_match(pattern, name) || moq_glob_match(pattern, quantizer)) return 1;
    if (!moqi_expert_name(name, &n, &number, &leaf)) return 0;
    moqi_format(container, sizeof container, "%.*s", (int)n, name);
    return moq_glob_match(pattern, container);
}

/* The recipe of one module, after rules and exclusions. A rule may name what recipes leave alone (lm_head), but never an embedding, a
   router or a layer that the model does not run. */
static moq_result moqi_choose_recipe(const moqi_plan *p, moqi_target *t, moq_error *err)
{
    static const char *const tables[] = {"embed_tokens", "embeddings", "embedding", "word_embeddings", "wte", "wpe", "position_embeddings"};
    const moq_quantize_desc *d = p->desc;
    char quantizer[MOQ_MAX_NAME_BYTES + 32];
    int named = 0;
    t->recipe = p->recipe;
    t->embedding = (uint8_t)moqi_is_one_of(moqi_last_part(t->name), tables, MOQI_COUNT(tables));
    moqi_format(quantizer, sizeof quantizer, "%s.weight_quantizer", t->name);
    for (size_t i = 0; i < d->rule_count; i++) {
        if (!moqi_names(d->rules[i].pattern, t->name, quantizer)) continue;
        named = 1;
        t->recipe = moq_find_recipe(d->rules[i].recipe);
        if (!t->recipe && !moqi_same(d->rules[i].recipe, "none"))
            return moqi_fail(err, MOQ_E_ARG, moqi_at(NULL, NULL, d->rules[i].recipe, -1), "no recipe has this name; `moq recipes` lists them");
    }
    for (size_t i = 0; i < d->exclude_count; i++)
        if (moqi_names(d->exclude[i], t->name, quantizer)) t->recipe = NULL;
    if (t->recipe && (t->embedding || moqi_is_router(p, t->name) || moqi_is_extra_layer(p, t->name))) t->recipe = NULL;
    if (t->recipe && !named && !moqi_recipe_covers(t->recipe, quantizer)) t->recipe = NULL;
    return MOQ_OK;
}

/* ---- recorded calibration ---- */

/* The name that ModelOpt's in-memory model gives a module: Nemotron-H and Mixtral are renamed on the way to disk. */
static void moqi_memory_name(const moqi_plan *p, const char *name, char *text, size_t capacity)
{
    const char *moe = strstr(name, ".block_sparse_moe.");
    const char *start = p->nemotron && moqi_starts(name, "backbone.") ? "model." : "";
    const char *rest = start[0] ? name + 9 : name;
    if (moe) moqi_format(text, capacity, "%s%.*s.mlp.%s", start, (int)(moe - rest), rest, moe + 18);
    else moqi_format(text, capacity, "%s%s", start, rest);
}

static int moqi_records_by_name(const void *a, const void *b) { return strcmp(((const moq_tensor *)a)->name, ((const moq_tensor *)b)->name); }

static const moq_tensor *moqi_find_record(const moqi_plan *p, const char *name)
{
    size_t lo = 0, hi = p->record_count;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        int order = strcmp(p->records[mid]->name, name);
        if (order == 0) return p->records[mid];
        if (order < 0) lo = mid + 1;
        else hi = mid;
    }
    return NULL;
}

/* A recorded tensor of a target as F32 in the arena: `part` is "input_quantizer.amax", "weight_quantizer.amax", ... Tried under its own
   name, ModelOpt's, and that of the fused container of experts. *skip: elements before this module's share of a fused tensor. */
static const moq_tensor *moqi_recorded_tensor(const moqi_plan *p, const moqi_target *t, const char *part, int *up_half)
{
    char memory[MOQ_MAX_NAME_BYTES + 64], text[MOQ_MAX_NAME_BYTES + 160];
    size_t container;
    uint32_t number;
    const char *leaf;
    const moq_tensor *found;
    *up_half = 0;
    moqi_memory_name(p, t->name, memory, sizeof memory);
    moqi_format(text, sizeof text, "%s%c%s", t->name, t->w.experts > 0 ? '_' : '.', part);
    if ((found = moqi_find_record(p, text)) != NULL) return found;
    moqi_format(text, sizeof text, "%s.%s", memory, part);
    if ((found = moqi_find_record(p, text)) != NULL) return found;
    if (!moqi_expert_name(memory, &container, &number, &leaf)) return NULL;
    int down = strcmp(leaf, "down_proj") == 0 || strcmp(leaf, "w2") == 0, weight = moqi_starts(part, "weight_quantizer.");
    const char *tail = strchr(part, '.');
    for (int fused = 1; fused >= 0 && tail; fused--) { /* experts without a gate keep the name up_proj */
        const char *base = down ? "down_proj" : fused ? "gate_up_proj" : "up_proj";
        if (weight) moqi_format(text, sizeof text, "%.*s.%s_weight_quantizers.%u%s", (int)container, memory, base, number, tail);
        else moqi_format(text, sizeof text, "%.*s.%s_%s", (int)container, memory, base, part);
        *up_half = fused && !down && (strcmp(leaf, "up_proj") == 0 || strcmp(leaf, "w3") == 0);
        if ((found = moqi_find_record(p, text)) != NULL) return found;
    }
    return NULL;
}

/* A recorded value in F32 in the arena: `count` numbers, or half of twice as many for gate and up. NULL in *out when not recorded. */
static moq_result moqi_recorded(const moqi_plan *p, const moqi_target *t, const char *part, uint64_t count, const float **out, moq_error *err)
{
    int up_half;
    const moq_tensor *found = moqi_recorded_tensor(p, t, part, &up_half);
    *out = NULL;
    if (!found) return MOQ_OK;
    uint64_t n = moqi_elements(found);
    moqi_where at = moqi_at(p->records_name, "tensor", found->name, (int64_t)found->offset);
    if (n != count && (n != 2 * count || !t->expert))
        return moqi_fail(err, MOQ_E_SHAPE, at, "has %llu values, expected %llu for layer '%q'; it was recorded with another model or recipe",
                         (unsigned long long)n, (unsigned long long)count, t->name);
    float *v = (float *)moqi_take_array(p->r, n, sizeof *v);
    if (!v) return moqi_nomem(err, n * sizeof *v);
    if (!moq_to_f32(found->dtype, found->data, (size_t)n, v)) return moqi_fail(err, MOQ_E_DTYPE, at, "dtype %s holds no numbers", moq_dtype_name(found->dtype));
    for (uint64_t i = 0; i < n; i++)
        if (!moqi_is_finite(v[i]) || v[i] < 0)
            return moqi_fail(err, MOQ_E_SCALE, at, "value %llu is %g, expected a positive number", (unsigned long long)i, (double)v[i]);
    *out = n == count || !up_half ? v : v + count;
    return MOQ_OK;
}

static int moqi_recipe_searches(const moq_recipe *recipe)
{
    return moqi_starts(recipe->calibration, "mse") || moqi_starts(recipe->calibration, "local_hessian");
}

/* How a recipe that searches does it; local_hessian's blocks come from data, so what it is here never counts. */
static moq_amax_search moqi_recipe_search(const moq_recipe *recipe)
{
    return moqi_starts(recipe->calibration, "mse") && !moqi_ends(recipe->calibration, "sweep") ? MOQ_SEARCH_FOUR_OVER_SIX : MOQ_SEARCH_SWEEP;
}

static int moqi_recipe_clips(const moq_recipe *recipe) { return moqi_starts(recipe->calibration, "awq_clip") || moqi_starts(recipe->calibration, "awq_full"); }

/* Fused experts are no linears to ModelOpt's smoothing steps: they stay plain max-calibrated. */
static int moqi_is_smoothed(const moqi_target *t) { return t->recipe->scheme.pre_quant_scale && !t->expert && t->w.experts == 0; }

/* p = recorded pre_quant_scale, or 1 / best_scale of AWQ, in F32. The stored vector is p in the model's type; the weight is multiplied
   by fl32(1 / p). SmoothQuant (alpha 1) has p = 1 / amax with a BF16 amax, so p is found again from its BF16 value. */
static moq_result moqi_load_smoothing(const moqi_plan *p, moqi_target *t, moq_error *err)
{
    uint64_t n = (uint64_t)t->w.cols;
    const float *best, *given;
    moq_result r = moqi_recorded(p, t, "awq_lite.best_scale", n, &best, err);
    if (r == MOQ_OK) r = moqi_recorded(p, t, "input_quantizer.pre_quant_scale", n, &given, err);
    if (r != MOQ_OK) return r;
    if (!best && !given)
        return moqi_fail(err, MOQ_E_MISSING, moqi_at(p->records_name, "layer", t->name, -1),
                         "recipe %s needs a pre_quant_scale for it, and there is none", t->recipe->name);
    float *smooth = (float *)moqi_take_array(p->r, n, sizeof *smooth), *own = (float *)moqi_take_array(p->r, n, sizeof *own);
    if (!smooth || !own) return moqi_nomem(err, n * 8);
    for (uint64_t i = 0; i < n; i++) {
        float v = best ? 1 / best[i] : given[i];
        own[i] = moqi_in_model(t->model, v);
        if (!best) {
            float whole = 1 / moqi_in_model(t->model, 1 / v);
            if (moqi_f32_bits(moqi_in_model(t->model, whole)) == moqi_f32_bits(own[i])) v = whole;
        }
        smooth[i] = 1 / v;
    }
    t->smooth = smooth;
    t->own_p = own;
    return MOQ_OK;
}

/* Does the export of this recipe store an input scale? */
static int moqi_has_input_scale(const moq_recipe *recipe)
{
    const moq_coding *c = &recipe->scheme.input;
    return c->elem != MOQ_NONE && (c->has_global || (!c->dynamic && c->scale == MOQ_F32));
}

/* Everything that calibration says of one target. */
static moq_result moqi_load_target(const moqi_plan *p, moqi_target *t, moq_error *err)
{
    const float *v = NULL;
    moq_result r = MOQ_OK;
    moqi_where at = moqi_at(p->records_name, "layer", t->name, -1);
    if (moqi_has_input_scale(t->recipe)) {
        r = moqi_recorded(p, t, "input_quantizer.amax", 1, &v, err);
        if (r == MOQ_OK && !v)
            return moqi_fail(err, MOQ_E_MISSING, at, "recipe %s needs the largest input of this layer, and %s; give a calibration file that has it",
                             t->recipe->name, p->records_name ? "the calibration has none" : "nothing was calibrated");
        if (v) t->input_amax = v[0];
    }
    if (r == MOQ_OK && moqi_is_smoothed(t)) r = moqi_load_smoothing(p, t, err);
    if (r == MOQ_OK && moqi_recipe_clips(t->recipe)) {
        r = moqi_recorded(p, t, "weight_quantizer.amax", 1, &v, err);
        if (r == MOQ_OK && v) t->recorded_amax = v[0];
        else if (r == MOQ_OK && !t->expert) r = moqi_fail(err, MOQ_E_MISSING, at, "recipe %s needs the clipped weight amax of this layer", t->recipe->name);
    }
    if (r == MOQ_OK && moqi_is_smoothed(t) && t->recipe->scheme.weight.elem == MOQ_I8) /* rows of the weight that F32 vectors smoothed */
        r = moqi_recorded(p, t, "weight_quantizer.amax", (uint64_t)t->w.rows, &t->amax, err);
    if (r != MOQ_OK || !moqi_recipe_searches(t->recipe)) return r;
    int fixed = moqi_starts(t->recipe->calibration, "mse");
    t->search = moqi_recipe_search(t->recipe);
    uint64_t experts = t->w.experts > 0 ? (uint64_t)t->w.experts : 1;
    r = moqi_recorded(p, t, "weight_quantizer.amax", experts * (uint64_t)t->w.rows * (uint64_t)(t->w.cols / 16), &t->amax, err);
    if (r == MOQ_OK && !t->amax && !fixed)
        return moqi_fail(err, MOQ_E_MISSING, at, "recipe %s needs the block amax of this layer from a calibration run", t->recipe->name);
    return r;
}

/* ---- groups of layers that receive the same tensor ---- */

/* Last parts that share an input below one parent: ModelOpt finds them by a dummy forward. Experts pair up gate and up. */
static const char *const moqi_shared[][6] = {
    {"q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa", NULL},
    {"gate_proj", "up_proj", NULL, NULL, NULL, NULL},
    {"w1", "w3", NULL, NULL, NULL, NULL},
    {"in_proj_qkv", "in_proj_z", NULL, NULL, NULL, NULL}
};

/* leader and members of every target. Members have the same recipe. */
static void moqi_group_targets(moqi_plan *p)
{
    char text[MOQ_MAX_NAME_BYTES + 32];
    for (size_t i = 0; i < p->count; i++) {
        moqi_target *t = &p->targets[i];
        const char *last = moqi_last_part(t->name);
        int row = -1;
        t->leader = i;
        t->members = 1;
        for (size_t k = 0; k < MOQI_COUNT(moqi_shared); k++)
            for (size_t j = 0; j < 6 && moqi_shared[k][j]; j++)
                if (strcmp(last, moqi_shared[k][j]) == 0) row = (int)k;
        for (size_t j = 0; row >= 0 && t->recipe && j < 6 && moqi_shared[row][j]; j++) {
            size_t n = moqi_format(text, sizeof text, "%.*s%s", (int)(last - t->name), t->name, moqi_shared[row][j]);
            const moqi_entry *e = moqi_map_find(&p->map, text, n);
            if (!e || e->value >= i || p->targets[e->value].recipe != t->recipe || p->targets[e->value].w.cols != t->w.cols) continue;
            t->leader = p->targets[e->value].leader;
        }
        if (t->leader != i) p->targets[t->leader].members++;
    }
}

/* ---- smoothing: averaging and folding ---- */

/* The target of a sibling path: `name` with its last `parts` components replaced. */
static moqi_target *moqi_sibling(const moqi_plan *p, const char *name, const char *last)
{
    char text[MOQ_MAX_NAME_BYTES + 32];
    const char *old = moqi_last_part(name);
    size_t n = moqi_format(text, sizeof text, "%.*s%s", (int)(old - name), name, last);
    const moqi_entry *e = moqi_map_find(&p->map, text, n);
    return e ? &p->targets[e->value] : NULL;
}

/* NVFP4_AWQ only: o_proj's vector moves into the rows of v_proj, down_proj's into those of up_proj, for the classes that ModelOpt
   names, and only where the lengths agree (no grouped-query attention). */
static void moqi_fold_into_rows(const moqi_plan *p)
{
    static const char *const attention[] = {"llama", "qwen3", "qwen3_moe"};
    const char *type = moq_get_info(p->ck)->model_type;
    if (!moqi_is_one_of(type, attention, MOQI_COUNT(attention))) return;
    for (size_t i = 0; i < p->count; i++) {
        moqi_target *t = &p->targets[i];
        const char *last = moqi_last_part(t->name);
        const char *before = strcmp(last, "o_proj") == 0 ? "v_proj" : strcmp(last, "down_proj") == 0 ? "up_proj" : NULL;
        if (!t->own_p || !before || strcmp(t->recipe->algo, "NVFP4_AWQ") != 0) continue;
        moqi_target *v = moqi_sibling(p, t->name, before);
        if (!v || v->recipe != t->recipe || v->w.rows != t->w.cols) continue;
        v->row_p = t->own_p;
        t->out_p = NULL;
    }
}

/* The norm that produces the shared input of a group, or NULL. A norm that also feeds a router or experts must keep its weight. */
static const char *moqi_norm_before(const moqi_plan *p, const moqi_target *t)
{
    static const char *const attention[] = {"input_layernorm", NULL}, *const mlp[] = {"pre_feedforward_layernorm", "post_attention_layernorm", NULL};
    char text[MOQ_MAX_NAME_BYTES + 64];
    const char *last = moqi_last_part(t->name), *dot = last - 1, *parent;
    if (last == t->name) return NULL;
    do dot--; while (dot > t->name && *dot != '.');
    parent = dot + 1;
    int is_mlp = moqi_starts(parent, "mlp."), is_attention = moqi_starts(parent, "self_attn.");
    if (dot <= t->name || (!is_mlp && !is_attention)) return NULL;
    for (const char *const *n = is_mlp ? mlp : attention; *n; n++) {
        moqi_format(text, sizeof text, "%.*s%s.weight", (int)(parent - t->name), t->name, *n);
        const moq_tensor *norm = moq_find_tensor(p->ck, text);
        if (norm && norm->rank == 1 && norm->shape[0] == (uint64_t)t->w.cols) return norm->name;
    }
    return NULL;
}

/* One group: the mean of the members' vectors in the model's type; then, for AWQ formats, into the norm. */
static moq_result moqi_average_group(moqi_plan *p, size_t leader, moq_error *err)
{
    const moqi_target *t = &p->targets[leader];
    size_t n = (size_t)t->w.cols;
    float *mean = (float *)moqi_take_array(p->r, n, sizeof *mean);
    if (!mean) return moqi_nomem(err, n * sizeof *mean);
    for (size_t c = 0; c < n; c++) {
        float sum = 0;
        for (size_t i = leader; i < p->count; i++)
            if (p->targets[i].leader == leader) sum += p->targets[i].own_p[c];
        mean[c] = moqi_in_model(t->model, sum / (float)t->members);
    }
    const char *norm = strstr(t->recipe->algo, "AWQ") ? moqi_norm_before(p, t) : NULL;
    for (size_t i = leader; i < p->count; i++) {
        if (p->targets[i].leader != leader) continue;
        p->targets[i].mean_p = mean;
        p->targets[i].amax = NULL; /* smoothed once more: recorded values no longer fit */
        p->targets[i].out_p = norm ? NULL : mean;
    }
    if (norm) {
        p->folds[p->fold_count].tensor = norm;
        p->folds[p->fold_count].plus_one = moqi_starts(moq_get_info(p->ck)->model_type, "gemma");
        p->folds[p->fold_count++].p = mean;
    }
    return MOQ_OK;
}

static moq_result moqi_smooth_targets(moqi_plan *p, moq_error *err)
{
    moq_result r = MOQ_OK;
    for (size_t i = 0; i < p->count; i++) p->targets[i].out_p = p->targets[i].own_p;
    moqi_fold_into_rows(p);
    for (size_t i = 0; i < p->count && r == MOQ_OK; i++)
        if (p->targets[i].own_p && p->targets[i].leader == i && p->targets[i].members > 1) r = moqi_average_group(p, i, err);
    return r;
}

/* ---- weights ---- */

/* Can the encoder read the source where it lies? */
static int moqi_is_direct(const moqi_target *t, const moq_linear *w)
{
    int64_t bits = moq_dtype_bits(w->codes.dtype);
    return moqi_is_float(w->codes.dtype) && w->scheme.weight.elem == w->codes.dtype && !t->smooth && !t->row_p && w->row_step == 1 && w->row_first == 0 &&
           w->col_first == 0 && w->packing.col_stride == 1 && w->packing.row_stride == w->cols && w->packing.word_bits == bits;
}

/* The smoothed weight in F32, every step rounded as ModelOpt's tensors are: W * (1/p), rows * p of the next layer, (W * p) / mean. */
static void moqi_load_weight(const moqi_target *t, const moq_linear *w, float *out)
{
    moq_dequantize(w, 0, w->rows, out);
    for (int64_t row = 0; row < w->rows; row++) {
        float *x = out + row * w->cols;
        for (int64_t c = 0; c < w->cols; c++) {
            float v = moqi_in_model(t->model, x[c]);
            if (t->smooth) v = moqi_in_model(t->model, v * t->smooth[c]);
            if (t->row_p) v = moqi_in_model(t->model, v * t->row_p[row]);
            if (t->mean_p) v = moqi_in_model(t->model, v * t->own_p[c] / t->mean_p[c]);
            x[c] = v;
        }
    }
}

/* What to encode: the source in place, or its smoothed copy in the plan's scratch memory. `expert`: of a stack, else 0. */
static moq_result moqi_encode_source(moqi_plan *p, const moqi_target *t, int32_t expert, moq_encode_desc *d, moq_error *err)
{
    moq_linear w = t->w;
    moq_result r = MOQ_OK;
    memset(d, 0, sizeof *d);
    if (w.experts > 0) r = moq_slice_expert(&t->w, expert, &w, err);
    if (r != MOQ_OK) return r;
    d->scheme = t->recipe->scheme;
    d->name = t->name;
    d->rows = w.rows;
    d->cols = w.cols;
    d->model = t->w.experts > 0 ? MOQ_F32 : t->model; /* stacks are divided in F32 */
    d->search = t->search;
    d->parallel = p->parallel;
    d->allocator = &p->desc->allocator;
    d->dtype = MOQ_F32;
    if (moqi_is_direct(t, &w)) {
        d->dtype = w.codes.dtype;
        d->data = w.codes.data;
        return MOQ_OK;
    }
    uint64_t bytes = (uint64_t)w.rows * (uint64_t)w.cols * sizeof(float);
    if (bytes > p->work_bytes) {
        moq_release(&p->desc->allocator, p->work, (size_t)p->work_bytes);
        p->work = (float *)moq_allocate(&p->desc->allocator, (size_t)bytes);
        p->work_bytes = p->work ? bytes : 0;
        if (!p->work) return moqi_nomem(err, bytes);
    }
    moqi_load_weight(t, &w, p->work);
    d->data = p->work;
    return MOQ_OK;
}

/* Does one amax of the whole weight enter the encoding? */
static int moqi_needs_global(const moqi_target *t)
{
    const moq_coding *c = &t->recipe->scheme.weight;
    return c->has_global || (c->group_rows == MOQ_ALL && c->group_cols == MOQ_ALL);
}

/* One block of 128 x 128 or less has a scalar amax in ModelOpt's view, and scalars are shared. */
static int moqi_is_one_block(const moqi_target *t)
{
    const moq_coding *c = &t->recipe->scheme.weight;
    return c->group_rows == 128 && t->w.rows <= 128 && t->w.cols <= 128 && !t->expert;
}

/* MXFP4 to NVFP4 without loss: with k the exponents of the blocks, the global scale is 2^m, m = max k - 8, and a block scale is
   2^(k - m), exact in E4M3 while k - m >= -9. In terms of amax: 2688 * 2^m for the weight, 6 * 2^k for a block. */
static moq_result moqi_cast_global(moqi_target *t, moq_error *err)
{
    double top = 0;
    for (int32_t k = 0; k < (t->w.experts > 0 ? t->w.experts : 1); k++) {
        moq_linear w = t->w;
        moq_result r = w.experts > 0 ? moq_slice_expert(&t->w, k, &w, err) : MOQ_OK;
        if (r != MOQ_OK) return r;
        for (int64_t row = 0; row < w.rows; row++) {
            for (int64_t g = 0; g < w.cols / 32; g++) {
                double s = moqi_scale_at(&w, row, g);
                if (s > top) top = s;
            }
        }
    }
    t->global_amax = (float)(top / 256 * 2688);
    return MOQ_OK;
}

/* Block amax of one matrix x [rows, cols]. Blocks below the range take that of their values and lose precision; returns how many. */
static int64_t moqi_cast_blocks(const moqi_target *t, const moq_linear *w, const float *x, float *amax)
{
    double unit = (double)t->global_amax / 2688;
    int64_t n = w->cols / 16, lost = 0;
    for (int64_t i = 0; i < w->rows * n; i++) {
        double s = moqi_scale_at(w, i / n, i % n / 2);
        float top = moqi_bits_f32(moqi_top_bits(x + i * 16, 16));
        int fits = s >= unit / 512;
        amax[i] = fits ? (float)(6 * s) : top;
        lost += !fits && top > 0;
    }
    return lost;
}

/* The largest weight of each target, then of each group that shares it: NVFP4 and the second stage of W4A8 over all layers with
   one input, per-tensor FP8 only inside an expert. Input amax is shared too, but for FP8 outside of experts. */
static moq_result moqi_find_globals(moqi_plan *p, moq_error *err)
{
    for (size_t i = 0; i < p->count; i++) {
        moqi_target *t = &p->targets[i];
        moq_encode_desc d;
        float top = 0;
        if (!t->recipe || (!moqi_needs_global(t) && !moqi_is_one_block(t))) continue;
        if (t->cast) {
            moq_result r = moqi_cast_global(t, err);
            if (r != MOQ_OK) return r;
            continue;
        }
        if (t->recorded_amax > 0 && !t->row_p && !t->mean_p) { t->global_amax = t->recorded_amax; continue; }
        for (int32_t k = 0; k < (t->w.experts > 0 ? t->w.experts : 1); k++) {
            moq_result r = moqi_encode_source(p, t, k, &d, err);
            d.search = MOQ_SEARCH_MAX;
            if (r == MOQ_OK) r = moq_find_amax(&d, NULL, &top, err);
            if (r != MOQ_OK) return r;
            if (top > t->global_amax) t->global_amax = top;
        }
    }
    for (int pass = 0; pass < 2; pass++) {
        for (size_t i = 0; i < p->count; i++) {
            moqi_target *t = &p->targets[i], *lead = &p->targets[t->leader];
            int fp8 = t->recipe && strcmp(t->recipe->algo, "FP8") == 0;
            if (!t->recipe || (fp8 && !t->expert)) continue;
            moqi_target *from = pass ? lead : t, *to = pass ? t : lead;
            if (from->global_amax > to->global_amax) to->global_amax = from->global_amax;
            if (from->input_amax > to->input_amax) to->input_amax = from->input_amax;
        }
    }
    return MOQ_OK;
}

/* ---- the plan ---- */

/* Recipes that need more than recorded values, and stacks that a recipe cannot fill. */
static moq_result moqi_check_target(const moqi_target *t, moq_error *err)
{
    const moq_coding *c = &t->recipe->scheme.weight;
    moqi_where at = moqi_at(NULL, "layer", t->name, -1);
    if (t->recipe->algo[0] == 0)
        return moqi_fail(err, MOQ_E_UNSUPPORTED, at, "recipe %s cannot be stored in a ModelOpt folder", t->recipe->name);
    if (t->recipe->scheme.lora_rank)
        return moqi_fail(err, MOQ_E_UNSUPPORTED, at, "recipe %s needs a decomposition that recorded values do not hold", t->recipe->name);
    int fits = (c->elem == MOQ_F4 && (c->scale == MOQ_F8_E8M0 || c->group_cols == 16)) || (c->elem == MOQ_F8_E4M3 && c->group_rows == MOQ_ALL);
    if (t->w.experts > 0 && !fits)
        return moqi_fail(err, MOQ_E_UNSUPPORTED, at, "recipe %s cannot be stored for a stack of experts; exclude it, or use fp8, nvfp4 or mxfp4", t->recipe->name);
    moq_encode_desc d;
    uint64_t codes, scales;
    memset(&d, 0, sizeof d);
    d.scheme = t->recipe->scheme;
    d.name = t->name;
    d.dtype = MOQ_F32;
    int turned = t->w.experts > 0 && c->scale == MOQ_F8_E8M0;
    d.rows = turned ? t->w.cols : t->w.rows;
    d.cols = turned ? t->w.rows : t->w.cols;
    return moq_encode_bytes(&d, &codes, &scales, err);
}

static moq_result moqi_choose_targets(moqi_plan *p, moq_error *err)
{
    size_t n = moq_module_count(p->ck);
    moq_result r = MOQ_OK;
    p->nemotron = moqi_starts(moq_get_info(p->ck)->model_type, "nemotron");
    p->targets = (moqi_target *)moqi_take_array(p->r, n + 1, sizeof *p->targets);
    p->folds = (moqi_fold *)moqi_take_array(p->r, n + 1, sizeof *p->folds);
    if (!p->targets || !p->folds || !moqi_map_make(&p->map, p->r, n)) return moqi_nomem(err, (uint64_t)n * sizeof *p->targets);
    for (size_t i = 0; i < n && r == MOQ_OK; i++) {
        moqi_target *t = &p->targets[p->count];
        size_t container;
        uint32_t number;
        const char *leaf;
        r = moq_get_module(p->ck, i, &t->w, err);
        if (r != MOQ_OK) return r;
        t->name = t->w.name;
        t->kind = p->ck->modules[i].kind;
        t->model = moqi_is_float(t->w.scheme.weight.elem) ? t->w.scheme.weight.elem : MOQ_BF16;
        t->expert = (uint8_t)moqi_expert_name(t->name, &container, &number, &leaf);
        moqi_map_add(&p->map, t->name, strlen(t->name), (uint32_t)p->count++);
        r = moqi_choose_recipe(p, t, err);
        if (r == MOQ_OK && t->recipe) {
            const moq_coding *from = &t->w.scheme.weight, *to = &t->recipe->scheme.weight;
            t->cast = from->elem == MOQ_F4 && from->scale == MOQ_F8_E8M0 && from->group_cols == 32 && to->elem == MOQ_F4 && to->scale == MOQ_F8_E4M3 &&
                      to->group_cols == 16 && strcmp(t->recipe->calibration, "max") == 0;
            r = moqi_check_target(t, err);
        }
    }
    return r;
}

/* With the records at hand: values, groups, smoothing, shared scales. */
static moq_result moqi_load_targets(moqi_plan *p, moq_error *err)
{
    moq_result r = MOQ_OK;
    for (size_t i = 0; i < p->count && r == MOQ_OK; i++)
        if (p->targets[i].recipe) r = moqi_load_target(p, &p->targets[i], err);
    if (r != MOQ_OK) return r;
    moqi_group_targets(p);
    r = moqi_smooth_targets(p, err);
    return r == MOQ_OK ? moqi_find_globals(p, err) : r;
}

/* ------------------------------------------------------------------------------------------------
   >>calib           calibration algorithms over float arrays
   Pure functions: statistics in, scales and choices out. Nothing here knows of files, models or backends.
   ------------------------------------------------------------------------------------------------ */

/* ModelOpt runs the model in BF16, and its searches compare numbers that were rounded at every step. The same roundings are made
   here where they decide a choice: the losses of two neighbouring candidates often differ by less than they change. */
static float moqi_bf16(float v) { return moq_bf16_decode(moq_bf16_encode(v)); }

/* Searches repeat these loops for every candidate, so GCC is asked to use vectors whatever the caller compiles with. */
#if defined(__GNUC__) && !defined(__clang__)
#define MOQI_VECTOR __attribute__((optimize("O3")))
#else
#define MOQI_VECTOR
#endif

/* x [n] to BF16 values in place. Bits only, so that the loop is vectorised; NaN keeps a payload bit. */
MOQI_VECTOR static void moqi_bf16_all(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t b = moqi_f32_bits(x[i]), r = (b + 0x7fffu + (b >> 16 & 1)) & 0xffff0000u;
        x[i] = moqi_bits_f32((b & 0x7fffffffu) > 0x7f800000u ? b | 0x400000u : r);
    }
}

/* Rows of F32 that start at multiples of 16 elements, zero-padded: what the tile kernels read. */
typedef struct moqi_matrix {
    float *data;          /* [rows, ld] */
    int64_t rows, cols, ld;
} moqi_matrix;

/* Zeroed; data NULL when out of memory. */
static moqi_matrix moqi_matrix_make(const moq_allocator *a, int64_t rows, int64_t cols)
{
    moqi_matrix m;
    uint64_t n;
    m.rows = rows;
    m.cols = cols;
    m.ld = moqi_pad16(cols);
    m.data = moqi_mul((uint64_t)rows, (uint64_t)m.ld, &n) && n <= SIZE_MAX / 8 ? (float *)moq_allocate(a, (size_t)n * sizeof(float)) : NULL;
    return m;
}

static void moqi_matrix_drop(const moq_allocator *a, moqi_matrix *m)
{
    moq_release(a, m->data, (size_t)(m->rows * m->ld) * sizeof(float));
    m->data = NULL;
}

/* Runs tasks 0..n-1 on the caller's workers, or here. */
static void moqi_spread(const moq_parallel *par, int64_t n, void (*task)(void *arg, int index, int worker), void *arg)
{
    if (par && par->run && par->workers > 1 && n > 1) par->run(par->user, (int)n, task, arg);
    else for (int64_t i = 0; i < n; i++) task(arg, (int)i, 0);
}

/* Arguments of moqi_multiply_task. */
typedef struct moqi_multiply_work { const moqi_kernels *k; const moqi_matrix *x, *w; float *y; int64_t ldy; int half; } moqi_multiply_work;

enum { MOQI_PRODUCT_ROWS = 32 };

/* 32 rows of W. Tiles read four rows that must exist, so the last few go one by one. `half`: only x rows from the first row of W on. */
static void moqi_multiply_task(void *arg, int index, int worker)
{
    const moqi_multiply_work *p = (const moqi_multiply_work *)arg;
    const moqi_kernels *k = p->k;
    int64_t first = (int64_t)index * MOQI_PRODUCT_ROWS, last = moqi_min(first + MOQI_PRODUCT_ROWS, p->w->rows), t0 = p->half ? first : 0;
    (void)worker;
    for (int64_t t = t0; t < p->x->rows; t++) memset(p->y + t * p->ldy + first, 0, (size_t)(last - first) * sizeof(float));
    for (int64_t t = t0; t < p->x->rows; t += 64) { /* 64 rows of x stay in the cache */
        int64_t n = moqi_min(64, p->x->rows - t), r = first;
        for (; r + 4 <= last; r += 4)
            k->tile(p->w->data + r * p->w->ld, p->w->ld, 4, p->x->data + t * p->x->ld, p->x->ld, n, p->w->ld, p->y + t * p->ldy + r, p->ldy);
        for (; r < last; r++)
            for (int64_t i = t; i < t + n; i++) p->y[i * p->ldy + r] = k->dot(p->w->data + r * p->w->ld, p->x->data + i * p->x->ld, p->w->ld);
    }
}

/* y [x.rows, ldy] = x W^T, each product summed in F32. */
static void moqi_product(const moq_parallel *par, const moqi_matrix *x, const moqi_matrix *w, float *y, int64_t ldy)
{
    moqi_multiply_work p;
    p.k = moqi_get_kernels(0); /* once: asking the processor costs as much as a small product */
    p.x = x;
    p.w = w;
    p.y = y;
    p.ldy = ldy;
    p.half = 0;
    moqi_spread(par, moqi_ceil_div(w->rows, MOQI_PRODUCT_ROWS), moqi_multiply_task, &p);
}

/* h [n, h.ld] = xt xt^T, for xt [n, tokens] transposed inputs: the lower half is computed, the upper copied. */
static void moqi_gram(const moq_parallel *par, const moqi_matrix *xt, moqi_matrix *h)
{
    moqi_multiply_work p;
    p.k = moqi_get_kernels(0);
    p.x = p.w = xt;
    p.y = h->data;
    p.ldy = h->ld;
    p.half = 1;
    moqi_spread(par, moqi_ceil_div(xt->rows, MOQI_PRODUCT_ROWS), moqi_multiply_task, &p);
    for (int64_t i = 0; i < h->rows; i++)
        for (int64_t j = i + 1; j < h->rows; j++) h->data[i * h->ld + j] = h->data[j * h->ld + i];
}

/* ---- fake quantization: quantize and dequantize (calibration.md 3) ---- */

/* Nearest E2M1 value of n values times 1 / s, times s: steps of 1/2 below 2, of 1 below 4, of 2 above. Adding 1.5 * 2^23 rounds to an
   integer with ties to even, which are the even codes. */
MOQI_VECTOR static void moqi_fake_e2m1(const float *x, int64_t n, float s, float *out)
{
    for (int64_t i = 0; i < n; i++) {
        float v = x[i] / s, a = fabsf(v);
        float step = a < 2 ? 0.5f : a < 4 ? 1.0f : 2.0f, inverse = a < 2 ? 2.0f : a < 4 ? 1.0f : 0.5f;
        a = a > 6 ? 6 : a;
        int32_t q = (int32_t)(moqi_f32_bits(a * inverse + 12582912.0f) - 0x4b400000u);
        float r = (float)q * step * s;
        out[i] = v < 0 ? -r : r;
    }
}

/* n values that share one scale, made from amax; `top` is the amax of the whole tensor, used by two-level blocks only. out may be x. */
static void moqi_fake_group(const moq_coding *c, float amax, float top, const float *x, int64_t n, float *out)
{
    float bound = moqi_largest(c->elem), s;
    if (c->scale == MOQ_F8_E4M3) { /* NVFP4 with dynamic blocks: g = A / 2688, s = e4m3(amax / 6g) g */
        float g = top * moqi_bits_f32(MOQI_INV_2688);
        if (!(g > 0)) g = 1e-12f;
        s = amax / (6 * g);
        s = moq_e4m3_decode(moqi_e4m3_code(s < 448 ? s : 448)) * g;
        if (s < 1e-5f) s = 1;
        moqi_fake_e2m1(x, n, s, out);
    } else if (c->scale == MOQ_F8_E8M0) {
        s = moqi_e8m0_scale(MOQ_RULE_E8M0_CEIL, bound, amax);
        for (int64_t i = 0; i < n; i++) out[i] = moqi_round_code(c->elem, x[i] / s, 0) * s;
    } else if (c->elem == MOQ_F8_E4M3) {
        s = 448 / (amax > 5.9604645e-8f ? amax : 1);
        float back = 1 / s;
        for (int64_t i = 0; i < n; i++) out[i] = moq_e4m3_decode(moqi_e4m3_code(x[i] * s)) * back;
    } else {
        s = amax >= 5.9604645e-8f ? bound / amax : 0;
        for (int64_t i = 0; i < n; i++) {
            float q = rintf(x[i] * s);
            q = q < -bound - 1 ? -bound - 1 : q > bound ? bound : q;
            out[i] = s > 0 ? q / s : 0;
        }
    }
}

/* Largest magnitude of a block of rows and columns of a matrix. */
static float moqi_block_amax(const moqi_matrix *w, int64_t r0, int64_t r1, int64_t c0, int64_t c1)
{
    float top = 0;
    for (int64_t r = r0; r < r1; r++) {
        float v = moqi_amax(w->data + r * w->ld + c0, c1 - c0);
        if (v > top) top = v;
    }
    return top;
}

/* Arguments of moqi_fake_task. */
typedef struct moqi_fake_work { const moq_coding *c; const moqi_matrix *w; moqi_matrix *q; float top; int64_t gr, gc; } moqi_fake_work;

/* One band of rows that share scales, or 16 rows with scales of their own. */
static void moqi_fake_task(void *arg, int index, int worker)
{
    const moqi_fake_work *p = (const moqi_fake_work *)arg;
    int64_t band = p->gr == 1 ? 16 : p->gr, first = index * band, last = moqi_min(first + band, p->w->rows);
    int whole = p->gr >= p->w->rows && p->gc >= p->w->cols;
    (void)worker;
    for (int64_t r0 = first; r0 < last; r0 += p->gr)
        for (int64_t c0 = 0; c0 < p->w->cols; c0 += p->gc) {
            int64_t r1 = moqi_min(r0 + p->gr, last), c1 = moqi_min(c0 + p->gc, p->w->cols);
            float amax = whole && p->top > 0 ? p->top : moqi_block_amax(p->w, r0, r1, c0, c1);
            for (int64_t r = r0; r < r1; r++) moqi_fake_group(p->c, amax, p->top, p->w->data + r * p->w->ld + c0, c1 - c0, p->q->data + r * p->q->ld + c0);
        }
    moqi_bf16_all(p->q->data + first * p->q->ld, (last - first) * p->q->ld);
}

/* q = the weight as its coding holds it, in BF16. top: amax of the tensor (two-level: of the global scale); 0: from w. The kernels that
   ModelOpt searches with work on NVFP4 blocks of 16 whatever the recipe says. */
static void moqi_fake_weight(const moq_parallel *par, const moq_coding *c, float top, const moqi_matrix *w, moqi_matrix *q)
{
    moqi_fake_work p;
    int two_level = c->scale == MOQ_F8_E4M3;
    p.c = c;
    p.w = w;
    p.q = q;
    p.gr = c->group_rows == MOQ_ALL ? w->rows : moqi_max(c->group_rows, 1);
    p.gc = two_level ? 16 : c->group_cols == MOQ_ALL || c->group_cols <= 0 ? w->cols : c->group_cols;
    p.top = two_level && !(top > 0) ? moqi_block_amax(w, 0, w->rows, 0, w->cols) : top;
    moqi_spread(par, moqi_ceil_div(w->rows, p.gr == 1 ? 16 : p.gr), moqi_fake_task, &p);
}

/* One token as the input coding rounds it, in BF16; amax: as calibrated (0: found in the token). out may be x. */
static void moqi_fake_input(const moq_coding *c, float amax, const float *x, int64_t cols, float *out)
{
    int blocks = c->scale == MOQ_F8_E4M3 || c->scale == MOQ_F8_E8M0;
    int64_t g = blocks && c->group_cols > 0 ? c->group_cols : cols;
    for (int64_t first = 0; first < cols; first += g) {
        int64_t n = moqi_min(g, cols - first);
        float own = moqi_amax(x + first, n);
        moqi_fake_group(c, blocks || !(amax > 0) || c->dynamic ? own : amax, amax > 0 ? amax : own, x + first, n, out + first);
    }
    moqi_bf16_all(out, cols);
}

/* ---- awq_lite (calibration.md 8.1): move the difficulty of large input channels into the weight, by a power that is searched ---- */

enum { MOQI_ALPHAS = 11, MOQI_RATIOS = 11 };

/* arange(0, 1 + step, step) of step 0.1 in F32. */
static float moqi_alpha(int i) { return (float)(i * 0.1); }

/* out [cols] = mean over rows of |W| / largest |W| of its block, in BF16 as ModelOpt computes it. */
static void moqi_awq_weight_scale(const moqi_matrix *w, int64_t group, float *out)
{
    if (group <= 0) group = w->cols;
    memset(out, 0, (size_t)w->cols * sizeof *out);
    for (int64_t r = 0; r < w->rows; r++)
        for (int64_t first = 0; first < w->cols; first += group) {
            const float *x = w->data + r * w->ld;
            int64_t end = moqi_min(first + group, w->cols);
            float amax = moqi_amax(x + first, end - first) + 1.17549435e-38f;
            for (int64_t c = first; c < end; c++) out[c] += moqi_bf16(fabsf(x[c]) / amax);
        }
    for (int64_t c = 0; c < w->cols; c++) out[c] = moqi_bf16(out[c] / (float)w->rows);
}

/* s = clamp(act^alpha / (wsc^(1 - alpha) + tiny), 1e-4, 1e4), then divided by sqrt(max * min): the geometric middle becomes 1. */
static void moqi_awq_scale(const float *act, const float *wsc, int64_t cols, float alpha, float *s)
{
    float low = 1e30f, high = 0;
    for (int64_t c = 0; c < cols; c++) {
        float v = powf(act[c], alpha) / (powf(wsc[c], 1 - alpha) + 1.17549435e-38f);
        v = v < 1e-4f ? 1e-4f : v > 1e4f ? 1e4f : v;
        s[c] = v;
        if (v < low) low = v;
        if (v > high) high = v;
    }
    float middle = sqrtf(high * low);
    for (int64_t c = 0; c < cols; c++) s[c] /= middle;
}

/* out = bf16(w * s) by columns, s rounded to BF16 first when `narrow` (the search), else as it is (what is exported). */
MOQI_VECTOR static void moqi_scale_cols(const moqi_matrix *w, const float *s, int narrow, moqi_matrix *out)
{
    for (int64_t r = 0; r < w->rows; r++) {
        const float *x = w->data + r * w->ld;
        float *y = out->data + r * out->ld;
        for (int64_t c = 0; c < w->cols; c++) y[c] = x[c] * (narrow ? moqi_bf16(s[c]) : s[c]);
        moqi_bf16_all(y, w->cols);
    }
}

/* Mean of the squared difference of two outputs of n values. Outputs and difference are BF16, square and sum are not. */
MOQI_VECTOR static double moqi_output_error(const float *y, const float *ref, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        float d = moqi_bf16(moqi_bf16(y[i]) - moqi_bf16(ref[i]));
        sum += (double)(d * d);
    }
    return sum / (double)(n > 0 ? n : 1);
}

/* Working memory of a search over one layer and one batch. */
typedef struct moqi_bench {
    moqi_matrix w, scaled, q, x;  /* [rows, cols] three times; [tokens, cols] */
    float *y, *ref, *s;           /* [tokens, rows or cols] twice; [cols] */
    const moq_parallel *par;
} moqi_bench;

static void moqi_bench_drop(const moq_allocator *a, moqi_bench *b)
{
    size_t out = (size_t)(b->x.rows * moqi_max(b->w.rows, b->w.cols)) * sizeof(float);
    moqi_matrix_drop(a, &b->w);
    moqi_matrix_drop(a, &b->scaled);
    moqi_matrix_drop(a, &b->q);
    moqi_matrix_drop(a, &b->x);
    moq_release(a, b->y, out);
    moq_release(a, b->ref, out);
    moq_release(a, b->s, (size_t)b->w.cols * sizeof(float));
}

/* 0 when out of memory, and then nothing is held. */
static int moqi_bench_make(const moq_allocator *a, moqi_bench *b, int64_t rows, int64_t cols, int64_t tokens, const moq_parallel *par)
{
    b->par = par;
    b->w = moqi_matrix_make(a, rows, cols);
    b->scaled = moqi_matrix_make(a, rows, cols);
    b->q = moqi_matrix_make(a, rows, cols);
    b->x = moqi_matrix_make(a, tokens, cols);
    b->y = (float *)moq_allocate(a, (size_t)(tokens * moqi_max(rows, cols)) * sizeof(float));
    b->ref = (float *)moq_allocate(a, (size_t)(tokens * moqi_max(rows, cols)) * sizeof(float));
    b->s = (float *)moq_allocate(a, (size_t)cols * sizeof(float));
    if (b->w.data && b->scaled.data && b->q.data && b->x.data && b->y && b->ref && b->s) return 1;
    moqi_bench_drop(a, b);
    return 0;
}

/* loss[i] += mean((Qw(W s) (x / s) - W x)^2) for the alphas of the grid. x: [tokens, cols] of one batch, in b->x.ld rows; b->w: W. */
static void moqi_awq_losses(moqi_bench *b, const moq_coding *c, const float *act, const float *wsc, const float *x, double loss[MOQI_ALPHAS])
{
    int64_t n = b->x.rows * b->w.rows;
    for (int64_t t = 0; t < b->x.rows; t++) memcpy(b->x.data + t * b->x.ld, x + t * b->x.cols, (size_t)b->x.cols * sizeof *x);
    moqi_product(b->par, &b->x, &b->w, b->ref, b->w.rows);
    for (int i = 0; i < MOQI_ALPHAS; i++) {
        moqi_awq_scale(act, wsc, b->w.cols, moqi_alpha(i), b->s);
        moqi_scale_cols(&b->w, b->s, 1, &b->scaled);
        moqi_fake_weight(b->par, c, 0, &b->scaled, &b->q);
        for (int64_t j = 0; j < b->w.cols; j++) b->s[j] = moqi_bf16(1 / b->s[j]);
        for (int64_t t = 0; t < b->x.rows; t++)
            for (int64_t j = 0; j < b->x.cols; j++) b->x.data[t * b->x.ld + j] = moqi_bf16(x[t * b->x.cols + j] * b->s[j]);
        moqi_product(b->par, &b->x, &b->q, b->y, b->w.rows);
        loss[i] += (double)(float)moqi_output_error(b->y, b->ref, n);
    }
}

/* The same losses from H = sum over batches of X^T X / tokens: mean over rows of d H d^T, d = Qw(W s) / s - W. Outputs are not rounded
   to BF16 here; the cost does not grow with the tokens. Work: b->x is [rows, cols], b->y [rows, cols]. */
static double moqi_gram_loss(moqi_bench *b, const moqi_matrix *h)
{
    double sum = 0;
    moqi_product(b->par, &b->x, h, b->y, b->w.cols);
    for (int64_t r = 0; r < b->w.rows; r++) {
        float part = 0;
        for (int64_t c = 0; c < b->w.cols; c++) part += b->x.data[r * b->x.ld + c] * b->y[r * b->w.cols + c];
        sum += (double)part;
    }
    return sum / (double)b->w.rows;
}

static void moqi_awq_gram_losses(moqi_bench *b, const moq_coding *c, const float *act, const float *wsc, const moqi_matrix *h, double loss[MOQI_ALPHAS])
{
    for (int i = 0; i < MOQI_ALPHAS; i++) {
        moqi_awq_scale(act, wsc, b->w.cols, moqi_alpha(i), b->s);
        moqi_scale_cols(&b->w, b->s, 1, &b->scaled);
        moqi_fake_weight(b->par, c, 0, &b->scaled, &b->q);
        for (int64_t j = 0; j < b->w.cols; j++) b->s[j] = moqi_bf16(1 / b->s[j]);
        for (int64_t r = 0; r < b->w.rows; r++)
            for (int64_t j = 0; j < b->w.cols; j++) b->x.data[r * b->x.ld + j] = b->q.data[r * b->q.ld + j] * b->s[j] - b->w.data[r * b->w.ld + j];
        loss[i] = moqi_gram_loss(b, h);
    }
}

/* First smallest of n losses; a NaN is never the smallest. */
static int moqi_first_min(const double *loss, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++)
        if (loss[i] < loss[best]) best = i;
    return best;
}

/* bf16(max_j(bf16(a_j) p_j)): the input's amax after it was multiplied with p, without seeing the input again. */
static float moqi_scaled_amax(const float *a, const float *p, int64_t cols)
{
    float top = 0;
    for (int64_t c = 0; c < cols; c++) {
        float v = moqi_bf16(a[c]) * p[c];
        if (v > top) top = v;
    }
    return moqi_bf16(top);
}

/* ---- awq_clip (8.2): is it better to let the largest weights saturate? ---- */

static float moqi_ratio(int i) { return (float)(0.5 + 0.05 * i); }

/* Two-level and per-tensor scales: one ratio for the layer. loss[i] += mean((x Qw(W; amax r)^T - x W^T)^2). b->w: W, b->x: the batch. */
static void moqi_clip_losses(moqi_bench *b, const moq_coding *c, double loss[MOQI_RATIOS])
{
    float top = moqi_block_amax(&b->w, 0, b->w.rows, 0, b->w.cols);
    moqi_product(b->par, &b->x, &b->w, b->ref, b->w.rows);
    for (int i = 0; i < MOQI_RATIOS; i++) {
        moqi_fake_weight(b->par, c, moqi_bf16(top * moqi_ratio(i)), &b->w, &b->q);
        moqi_product(b->par, &b->x, &b->q, b->y, b->w.rows);
        loss[i] += (double)(float)moqi_output_error(b->y, b->ref, b->x.rows * b->w.rows);
    }
}

/* Integer groups: a ratio for every group of every row, from every max(1, N / 64)-th token. loss [ratios, rows, groups] is added to. */
static void moqi_clip_group_losses(const moqi_bench *b, const moq_coding *c, float *loss)
{
    int64_t g = c->group_cols > 0 ? c->group_cols : b->w.cols, groups = moqi_ceil_div(b->w.cols, g), step = moqi_max(1, b->x.rows / 64);
    int64_t used = moqi_ceil_div(b->x.rows, step);
    for (int64_t r = 0; r < b->w.rows; r++)
        for (int64_t k = 0; k < groups; k++) {
            const float *w = b->w.data + r * b->w.ld + k * g;
            int64_t n = moqi_min(g, b->w.cols - k * g);
            float amax = moqi_amax(w, n), *d = b->q.data;
            for (int i = 0; i < MOQI_RATIOS; i++) {
                double sum = 0;
                moqi_fake_group(c, moqi_bf16(amax * moqi_ratio(i)), 0, w, n, d);
                for (int64_t j = 0; j < n; j++) d[j] = moqi_bf16(d[j]) - w[j];
                for (int64_t t = 0; t < b->x.rows; t += step) {
                    const float *x = b->x.data + t * b->x.ld + k * g;
                    float e = 0;
                    for (int64_t j = 0; j < n; j++) e += x[j] * d[j];
                    sum += (double)e * (double)e;
                }
                loss[(i * b->w.rows + r) * groups + k] += (float)(sum / (double)used);
            }
        }
}

/* ---- smoothquant (7) ---- */

/* p = b^(1 - alpha) / a^alpha from the channel maxima of weight and input. When the smallest p vanishes, dead channels get 1. */
static void moqi_smooth_scale(const float *a, const float *b, int64_t cols, float alpha, float *p)
{
    const float tiny = 4.6566129e-10f; /* 2^-31 */
    float low = 1e30f;
    for (int64_t c = 0; c < cols; c++) {
        p[c] = powf(b[c], 1 - alpha) / powf(a[c], alpha);
        if (!(p[c] >= low)) low = p[c];
    }
    for (int64_t c = 0; c < cols; c++) {
        if (low <= tiny && a[c] <= tiny) p[c] = 1;
        p[c] = !(p[c] > 1e-4f) ? 1e-4f : p[c] > 1e4f ? 1e4f : p[c];
    }
}

/* Largest |W| of every column. */
static void moqi_col_amax(const moqi_matrix *w, float *out)
{
    memset(out, 0, (size_t)w->cols * sizeof *out);
    for (int64_t r = 0; r < w->rows; r++)
        for (int64_t c = 0; c < w->cols; c++) {
            float v = fabsf(w->data[r * w->ld + c]);
            if (v > out[c]) out[c] = v;
        }
}

/* ---- mse (5): the general search over multiples of amax ---- */

/* The best of ceil((stop - start) / step) + 1 multiples of the amax of one group of n values; the first smallest wins. */
MOQI_UNUSED static float moqi_mse_group(const moq_coding *c, float amax, float top, const float *x, int64_t n, double start, double stop, double step, float *work)
{
    int count = (int)ceil((stop - start) / step - 1e-9) + 1;
    float best = -1, choice = amax;
    for (int k = 0; k < count; k++) {
        float m = (float)(count > 1 ? start + (stop - start) * k / (count - 1) : start), loss = 0;
        moqi_fake_group(c, amax * m, top, x, n, work);
        for (int64_t i = 0; i < n; i++) loss += (x[i] - work[i]) * (x[i] - work[i]);
        if (best < 0 || loss < best) { best = loss; choice = amax * m; }
    }
    return choice;
}

/* ---- local_hessian (6): block scales that err least on the inputs seen ---- */

/* h [blocks, 16, 16] += x_b^T x_b of one token. */
static void moqi_hessian_add(float *h, const float *x, int64_t cols)
{
    for (int64_t first = 0; first + 16 <= cols; first += 16, h += 256)
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 16; j++) h[i * 16 + j] += x[first + i] * x[first + j];
}

/* The amax of one block of 16 weights: of the 126 E4M3 scales the one with the smallest d^T H d; ties to the smaller.
   The step follows the static formula of section 3 with a_b = c A, which makes it c A / 6 up to the last bit. */
static float moqi_hessian_block(const float *h, const float *w, float global_amax)
{
    float whole = global_amax * moqi_bits_f32(MOQI_INV_6), k = 448 / whole, best = -1, choice = global_amax;
    for (int code = 1; code <= 0x7e; code++) {
        float a = global_amax * (moq_e4m3_decode((uint8_t)code) * moqi_bits_f32(MOQI_INV_448)), d[16], loss = 0;
        float s = moq_e4m3_decode(moqi_e4m3_code(a * moqi_bits_f32(MOQI_INV_6) * k)) * (1 / k);
        for (int i = 0; i < 16; i++) d[i] = w[i] - (s > 0 ? moq_e2m1_decode(moq_e2m1_encode(w[i] / s)) * s : 0);
        for (int i = 0; i < 16; i++) {
            float row = 0;
            for (int j = 0; j < 16; j++) row += h[i * 16 + j] * d[j];
            loss += d[i] * row;
        }
        if (best >= 0 && !(loss < best)) continue;
        best = loss;
        choice = a;
    }
    return choice;
}

/* ---- nvfp4_act_headroom (11): the scale from a histogram of block maxima ---- */

enum { MOQI_BINS = 512 };

/* Bins of 80 / 512 octaves over 2^-40 .. 2^40. Zero blocks are not counted. */
static void moqi_headroom_add(uint64_t bins[MOQI_BINS], const float *x, int64_t cols)
{
    for (int64_t first = 0; first < cols; first += 16) {
        float amax = moqi_amax(x + first, moqi_min(16, cols - first));
        if (!(amax > 0)) continue;
        int bin = (int)floorf((log2f(amax) + 40) * 6.4f);
        bins[bin < 0 ? 0 : bin >= MOQI_BINS ? MOQI_BINS - 1 : bin]++;
    }
}

/* Centre of the first bin at or above `low` whose running count reaches percent of the total. */
static double moqi_headroom_value(const uint64_t bins[MOQI_BINS], double percent, double low)
{
    double total = 0, sum = 0;
    for (int i = 0; i < MOQI_BINS; i++)
        if (exp2(-40 + (i + 0.5) * 0.15625) >= low) total += (double)bins[i];
    for (int i = 0; i < MOQI_BINS; i++) {
        double value = exp2(-40 + (i + 0.5) * 0.15625);
        if (value < low) continue;
        sum += (double)bins[i];
        if (sum >= percent / 100 * total && sum > 0) return value;
    }
    return 0;
}

/* amax = max(rho * the value at 1 %, the value at 99.99 %): small blocks keep normal scales, unseen large ones do not saturate. */
static float moqi_headroom_amax(const uint64_t bins[MOQI_BINS], float running_max)
{
    double upper = moqi_headroom_value(bins, 99.99, 0);
    if (!(upper > 0)) return running_max;
    double anchor = moqi_headroom_value(bins, 1, upper / 1e6) * 16384;
    return (float)(anchor > upper ? anchor : upper);
}

/* ---- svdquant (9): the largest directions of the weight stay wide ---- */

/* One-sided Jacobi (Hestenes) in double: rotate pairs of vectors until all are orthogonal, |a . b| <= 1e-15 |a| |b|. Singular values are
   exact to a few units of 2^-52 of the largest. vectors: [n, length]; turns: [n, n], what was done, from the identity.
   Afterwards vectors = turns * (what they were), and the singular values are their lengths. */
static void moqi_jacobi(double *vectors, double *turns, int64_t n, int64_t length)
{
    memset(turns, 0, (size_t)(n * n) * sizeof *turns);
    for (int64_t i = 0; i < n; i++) turns[i * n + i] = 1;
    for (int sweep = 0, moved = 1; moved && sweep < 60; sweep++) {
        moved = 0;
        for (int64_t p = 0; p < n - 1; p++)
            for (int64_t q = p + 1; q < n; q++) {
                double *a = vectors + p * length, *b = vectors + q * length, aa = 0, bb = 0, ab = 0;
                for (int64_t i = 0; i < length; i++) { aa += a[i] * a[i]; bb += b[i] * b[i]; ab += a[i] * b[i]; }
                if (!(fabs(ab) > 1e-15 * sqrt(aa * bb))) continue;
                double zeta = (bb - aa) / (2 * ab), t = (zeta >= 0 ? 1 : -1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
                double c = 1 / sqrt(1 + t * t), s = c * t, *u = turns + p * n, *v = turns + q * n;
                moved = 1;
                for (int64_t i = 0; i < length; i++) { double x = a[i]; a[i] = c * x - s * b[i]; b[i] = s * x + c * b[i]; }
                for (int64_t i = 0; i < n; i++) { double x = u[i]; u[i] = c * x - s * v[i]; v[i] = s * x + c * v[i]; }
            }
    }
}

/* Indices of the `rank` longest of n vectors, longest first; `size` [n] is left holding the squared lengths. */
static void moqi_longest(const double *vectors, int64_t n, int64_t length, int64_t rank, double *size, int64_t *index)
{
    for (int64_t i = 0; i < n; i++) {
        size[i] = 0;
        for (int64_t j = 0; j < length; j++) size[i] += vectors[i * length + j] * vectors[i * length + j];
    }
    for (int64_t k = 0; k < rank; k++) {
        index[k] = -1;
        for (int64_t i = 0; i < n; i++) {
            int used = 0;
            for (int64_t j = 0; j < k; j++) used = used || index[j] == i;
            if (!used && (index[k] < 0 || size[i] > size[index[k]])) index[k] = i;
        }
    }
}

/* W [rows, cols] ~ b [rows, rank] a [rank, cols], b = (U S)[:, :rank], a = V^T[:rank]; missing ranks are zero. 0 when out of memory.
   The shorter side is rotated: columns of W when it is tall (then b are the rotated columns), else its rows (then a are, made unit). */
MOQI_UNUSED static int moqi_low_rank(const moq_allocator *m, const moqi_matrix *w, int64_t rank, float *b, float *a)
{
    int tall = w->rows >= w->cols;
    int64_t n = tall ? w->cols : w->rows, length = tall ? w->rows : w->cols, have = moqi_min(rank, n);
    size_t bytes = (size_t)(n * length + n * n + n + rank) * sizeof(double);
    double *vectors = (double *)moq_allocate(m, bytes);
    if (!vectors) return 0;
    double *turns = vectors + n * length, *size = turns + n * n;
    int64_t *index = (int64_t *)(void *)(size + n);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < length; j++) vectors[i * length + j] = (double)(tall ? w->data[j * w->ld + i] : w->data[i * w->ld + j]);
    moqi_jacobi(vectors, turns, n, length);
    moqi_longest(vectors, n, length, have, size, index);
    memset(b, 0, (size_t)(w->rows * rank) * sizeof *b);
    memset(a, 0, (size_t)(rank * w->cols) * sizeof *a);
    for (int64_t k = 0; k < have; k++) {
        const double *v = vectors + index[k] * length, *u = turns + index[k] * n;
        double s = sqrt(size[index[k]]);
        for (int64_t j = 0; j < length; j++) {
            if (tall) b[j * rank + k] = (float)v[j];
            else a[k * w->cols + j] = (float)(s > 0 ? v[j] / s : 0);
        }
        for (int64_t j = 0; j < n; j++) {
            if (tall) a[k * w->cols + j] = (float)u[j];
            else b[j * rank + k] = (float)(u[j] * s);
        }
    }
    moq_release(m, vectors, bytes);
    return 1;
}

/* W := bf16(W - bf16(b a)) after both factors were rounded to BF16. */
MOQI_UNUSED static void moqi_take_low_rank(moqi_matrix *w, float *b, float *a, int64_t rank)
{
    moqi_bf16_all(b, w->rows * rank);
    moqi_bf16_all(a, rank * w->cols);
    for (int64_t r = 0; r < w->rows; r++)
        for (int64_t c = 0; c < w->cols; c++) {
            float sum = 0;
            for (int64_t k = 0; k < rank; k++) sum += b[r * rank + k] * a[k * w->cols + c];
            w->data[r * w->ld + c] = moqi_bf16(w->data[r * w->ld + c] - moqi_bf16(sum));
        }
}

/* ---- gptq (10): spread the error of each column over those that follow ---- */

/* In-place Cholesky of a symmetric positive definite h [n, n]: h = L L^T, L in the lower half. 0 when it is not definite. */
static int moqi_cholesky(double *h, int64_t n)
{
    for (int64_t j = 0; j < n; j++) {
        for (int64_t i = j; i < n; i++) {
            double sum = h[i * n + j];
            for (int64_t k = 0; k < j; k++) sum -= h[i * n + k] * h[j * n + k];
            if (i == j && !(sum > 0)) return 0;
            h[i * n + j] = i == j ? sqrt(sum) : sum / h[j * n + j];
        }
    }
    return 1;
}

/* u [n, n] = the upper Cholesky factor of h^-1 (h^-1 = U^T U); h is destroyed. The identity when h is not definite, as ModelOpt does.
   h^-1 = L^-T L^-1 is formed column by column and factored again. */
MOQI_UNUSED static int moqi_inverse_factor(double *h, double *u, int64_t n)
{
    int definite = moqi_cholesky(h, n);
    memset(u, 0, (size_t)(n * n) * sizeof *u);
    for (int64_t c = 0; definite && c < n; c++) { /* column c of h^-1 into row c of u: forward, then backward substitution */
        double *y = u + c * n;
        y[c] = 1;
        for (int64_t i = c; i < n; i++) {
            for (int64_t k = c; k < i; k++) y[i] -= h[i * n + k] * y[k];
            y[i] /= h[i * n + i];
        }
        for (int64_t i = n - 1; i >= 0; i--) {
            for (int64_t k = i + 1; k < n; k++) y[i] -= h[k * n + i] * y[k];
            y[i] /= h[i * n + i];
        }
    }
    definite = definite && moqi_cholesky(u, n);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < i; j++) {
            if (definite) u[j * n + i] = u[i * n + j];
            u[i * n + j] = 0;
        }
    for (int64_t i = 0; !definite && i < n; i++) { memset(u + i * n, 0, (size_t)n * sizeof *u); u[i * n + i] = 1; }
    return definite;
}

/* H += damp * mean(diag) * I after dead columns (all zero in W) were made units. */
MOQI_UNUSED static void moqi_gptq_damp(const moqi_matrix *w, double *h, double damp)
{
    int64_t n = w->cols;
    double mean = 0;
    for (int64_t c = 0; c < n; c++) {
        int alive = 0;
        for (int64_t r = 0; r < w->rows && !alive; r++) alive = w->data[r * w->ld + c] < 0 || w->data[r * w->ld + c] > 0;
        for (int64_t i = 0; !alive && i < n; i++) h[c * n + i] = h[i * n + c] = 0;
        if (!alive) h[c * n + c] = 1;
    }
    for (int64_t c = 0; c < n; c++) mean += h[c * n + c] / (double)n;
    for (int64_t c = 0; c < n; c++) h[c * n + c] += damp * mean;
}

/* The weight is replaced by its quantized values, column by column; scales: amax [rows, groups] of each group frozen before. u: of
   moqi_inverse_factor. Rows are independent, so no blocks are needed: the result is that of any block size. */
MOQI_UNUSED static void moqi_gptq_rows(const moq_coding *c, float top, const float *amax, moqi_matrix *w, const double *u)
{
    int64_t n = w->cols, g = c->group_cols > 0 ? c->group_cols : n, groups = moqi_ceil_div(n, g);
    for (int64_t r = 0; r < w->rows; r++) {
        float *x = w->data + r * w->ld;
        for (int64_t i = 0; i < n; i++) {
            float q;
            moqi_fake_group(c, amax[r * groups + i / g], top, x + i, 1, &q);
            double e = ((double)x[i] - (double)q) / u[i * n + i];
            for (int64_t j = i + 1; j < n; j++) x[j] -= (float)(e * u[i * n + j]);
            x[i] = q;
        }
    }
}

/* ---- keys and values (16) and rotation (17) ---- */

/* x [n] := x H / sqrt(block) in blocks of `block`, a power of two; rounded to BF16. */
static void moqi_rotate_blocks(float *x, int64_t n, int64_t block)
{
    float norm = 1 / sqrtf((float)block);
    for (int64_t first = 0; first + block <= n; first += block) moqi_sylvester(x + first, block);
    for (int64_t i = 0; i < n; i++) x[i] = moqi_bf16(x[i] * norm);
}

/* The largest power of two that divides n. */
static int64_t moqi_rotation_block(int64_t n) { return n > 0 ? n & -n : 1; }

/* Running mean over batches, rounded at each step: bias [n] = (bias * count + mean) / (count + 1). */
static void moqi_bias_add(float *bias, const float *mean, int64_t n, int64_t count)
{
    for (int64_t i = 0; i < n; i++) bias[i] = moqi_bf16((bias[i] * (float)count + moqi_bf16(mean[i])) / (float)(count + 1));
}

/* ------------------------------------------------------------------------------------------------
   >>observe         a backend that shows what goes through another one
   Every call is passed on. Nothing is hidden from the engine but this: experts are computed one by one, so that each can be seen.
   ------------------------------------------------------------------------------------------------ */

/* Layers that were prepared as one, and the inner backend's weight. */
typedef struct moqi_seen {
    moq_weight *inner;
    moq_linear *layers;     /* [parts], in the same block */
    int32_t parts;
    int64_t rows, cols;     /* rows: of all parts */
    size_t bytes;           /* of this block */
} moqi_seen;

/* A mixture of experts, taken apart. */
typedef struct moqi_seen_moe {
    moqi_arena arena;       /* holds this struct too */
    moq_routing routing;
    moq_activation_desc activation;
    const float *bias;      /* [experts] or NULL */
    moqi_seen **up, **down; /* [experts]; up: gate and up as one, or up alone */
    int64_t cols, n, out;
    int gated;
} moqi_seen_moe;

/* A cache, and in BF16 a copy of its rows on the host: attention is computed from it. */
typedef struct moqi_seen_kv {
    moq_kv_cache *inner;
    moq_kv_desc desc;       /* its name lies behind the rows */
    int64_t dim[2];         /* of keys, of values */
    float *rows[2];         /* [slots, capacity, kv_heads, dim] or NULL */
    size_t bytes;           /* of this block */
} moqi_seen_kv;

enum { MOQI_HOST_X, MOQI_HOST_Y, MOQI_HOST_IN, MOQI_HOST_OUT, MOQI_HOST_ROUTE, MOQI_HOST_CHOICE, MOQI_HOST_COUNT };
enum { MOQI_DEVICE_IN, MOQI_DEVICE_MID, MOQI_DEVICE_ACT, MOQI_DEVICE_OUT, MOQI_DEVICE_COUNT };

/* The context behind the table. Buffers grow while running: watching is not the fast path. */
typedef struct moqi_watch {
    moq_backend be, *inner;
    moq_observer o;
    moq_allocator a;
    float *host[MOQI_HOST_COUNT];      /* floats */
    size_t host_count[MOQI_HOST_COUNT];
    void *device[MOQI_DEVICE_COUNT];   /* activations */
    size_t device_count[MOQI_DEVICE_COUNT];
    size_t elem;                       /* bytes of one activation */
    const moqi_kernels *k;             /* for what is computed on the host */
    int round;                         /* results become BF16 */
    moq_error failed;                  /* the first failure while running, for sync */
} moqi_watch;

static moqi_watch *moqi_watch_of(const moq_backend *be) { return (moqi_watch *)be->ctx; }
static const moqi_seen *moqi_seen_of(const moq_weight *w) { return (const moqi_seen *)(const void *)w; }
static void *moqi_act_at(const moqi_watch *w, const void *base, int64_t i) { return (uint8_t *)(uintptr_t)base + i * (int64_t)w->elem; }

/* Room for n floats on the host; NULL and a kept error when there is none. */
static float *moqi_host_room(moqi_watch *w, int which, int64_t n)
{
    if (n <= (int64_t)w->host_count[which]) return w->host[which];
    moq_release(&w->a, w->host[which], w->host_count[which] * sizeof(float));
    w->host[which] = (float *)moq_allocate(&w->a, (size_t)n * sizeof(float));
    w->host_count[which] = w->host[which] ? (size_t)n : 0;
    if (!w->host[which] && w->failed.code == MOQ_OK) moqi_nomem(&w->failed, (uint64_t)n * sizeof(float));
    return w->host[which];
}

/* Room for n activations on the inner backend. */
static void *moqi_device_room(moqi_watch *w, int which, int64_t n)
{
    moq_error err;
    if (n <= (int64_t)w->device_count[which]) return w->device[which];
    if (w->device[which]) w->inner->release(w->inner, w->device[which]);
    w->device[which] = w->inner->alloc(w->inner, (size_t)n * w->elem, &err);
    w->device_count[which] = w->device[which] ? (size_t)n : 0;
    if (!w->device[which] && w->failed.code == MOQ_OK) w->failed = err;
    return w->device[which];
}

/* n activations at p become BF16 values. */
static void moqi_watch_round(moqi_watch *w, void *p, int64_t n)
{
    float *h = w->round ? moqi_host_room(w, MOQI_HOST_Y, n) : NULL;
    if (!h) return;
    w->inner->download_act(w->inner, h, p, (size_t)n);
    moqi_bf16_all(h, n);
    w->inner->upload_act(w->inner, p, h, (size_t)n);
}

/* ---- memory: passed on ---- */

static void moqi_watch_destroy(moq_backend *be)
{
    moqi_watch *w = moqi_watch_of(be);
    moq_allocator a = w->a;
    for (int i = 0; i < MOQI_HOST_COUNT; i++) moq_release(&a, w->host[i], w->host_count[i] * sizeof(float));
    for (int i = 0; i < MOQI_DEVICE_COUNT; i++)
        if (w->device[i]) w->inner->release(w->inner, w->device[i]);
    moq_release(&a, w, sizeof *w);
}

static void *moqi_watch_alloc(moq_backend *be, size_t bytes, moq_error *err)
{
    moqi_watch *w = moqi_watch_of(be);
    return w->inner->alloc(w->inner, bytes, err);
}

static void moqi_watch_release(moq_backend *be, void *p)
{
    moqi_watch *w = moqi_watch_of(be);
    w->inner->release(w->inner, p);
}

static void moqi_watch_upload(moq_backend *be, void *dst, const void *src, size_t bytes)
{
    moqi_watch *w = moqi_watch_of(be);
    w->inner->upload(w->inner, dst, src, bytes);
}

static void moqi_watch_download(moq_backend *be, void *dst, const void *src, size_t bytes)
{
    moqi_watch *w = moqi_watch_of(be);
    w->inner->download(w->inner, dst, src, bytes);
}

static void moqi_watch_copy(moq_backend *be, void *dst, const void *src, size_t bytes)
{
    moqi_watch *w = moqi_watch_of(be);
    w->inner->copy(w->inner, dst, src, bytes);
}

static void moqi_watch_upload_act(moq_backend *be, void *dst, const float *src, size_t count)
{
    moqi_watch *w = moqi_watch_of(be);
    w->inner->upload_act(w->inner, dst, src, count);
}

static void moqi_watch_download_act(moq_backend *be, float *dst, const void *src, size_t count)
{
    moqi_watch *w = moqi_watch_of(be);
    w->inner->download_act(w->inner, dst, src, count);
}

/* A failure of the watching itself comes out here, once. */
static moq_result moqi_watch_sync(moq_backend *be, moq_error *err)
{
    moqi_watch *w = moqi_watch_of(be);
    moq_error kept = w->failed;
    moqi_clear(&w->failed);
    if (kept.code == MOQ_OK) return w->inner->sync(w->inner, err);
    if (err) *err = kept;
    return kept.code;
}

static moq_result moqi_watch_reserve(moq_backend *be, int32_t rows, moq_error *err)
{
    moqi_watch *w = moqi_watch_of(be);
    moq_result r = w->inner->reserve(w->inner, rows, err);
    be->max_rows = w->be.max_rows = w->inner->max_rows;
    return r;
}

static moq_result moqi_watch_supports(moq_backend *be, const moq_linear *layer, moq_error *err)
{
    moqi_watch *w = moqi_watch_of(be);
    return w->inner->supports(w->inner, layer, err);
}

static size_t moqi_watch_explain(moq_backend *be, const moq_linear *layer, char *text, size_t capacity)
{
    moqi_watch *w = moqi_watch_of(be);
    return w->inner->explain(w->inner, layer, text, capacity);
}

/* ---- layers ---- */

static moqi_seen *moqi_seen_make(moqi_watch *w, const moq_linear *layers, int32_t parts, moq_error *err)
{
    moqi_clear(err);
    if (!layers || parts < 1 || parts > 1024) {
        moqi_fail(err, MOQ_E_ARG, moqi_at(NULL, NULL, NULL, -1), "%d layers cannot be prepared as one", (int)parts);
        return NULL;
    }
    size_t head = (sizeof(moqi_seen) + 15) & ~(size_t)15, bytes = head + (size_t)parts * sizeof *layers;
    moqi_seen *s = (moqi_seen *)moq_allocate(&w->a, bytes);
    if (!s) { moqi_nomem(err, bytes); return NULL; }
    s->layers = (moq_linear *)(void *)((uint8_t *)s + head);
    memcpy(s->layers, layers, (size_t)parts * sizeof *layers);
    s->parts = parts;
    s->cols = layers[0].cols;
    s->bytes = bytes;
    for (int32_t i = 0; i < parts; i++) s->rows += layers[i].rows;
    s->inner = w->inner->prepare_linear(w->inner, layers, parts, err);
    if (s->inner) return s;
    moq_release(&w->a, s, bytes);
    return NULL;
}

static void moqi_seen_drop(moqi_watch *w, moqi_seen *s)
{
    if (!s) return;
    w->inner->release_weight(w->inner, s->inner);
    moq_release(&w->a, s, s->bytes);
}

static moq_weight *moqi_watch_prepare_linear(moq_backend *be, const moq_linear *layers, int32_t parts, moq_error *err)
{
    return (moq_weight *)(void *)moqi_seen_make(moqi_watch_of(be), layers, parts, err);
}

static void moqi_watch_release_weight(moq_backend *be, moq_weight *weight)
{
    moqi_seen_drop(moqi_watch_of(be), (moqi_seen *)(void *)weight);
}

static size_t moqi_watch_weight_bytes(const moq_backend *be, const moq_weight *weight)
{
    const moqi_watch *w = moqi_watch_of(be);
    return w->inner->weight_bytes(w->inner, moqi_seen_of(weight)->inner) + moqi_seen_of(weight)->bytes;
}

/* Show x, compute, show y. x is written back only to a buffer of our own: the engine may use it again. */
static void moqi_watch_product(moqi_watch *w, const moqi_seen *s, const void *x, int32_t rows, void *y)
{
    int64_t in = (int64_t)rows * s->cols, out = (int64_t)rows * s->rows;
    float *h = w->o.input ? moqi_host_room(w, MOQI_HOST_IN, in) : NULL;
    if (h) {
        w->inner->download_act(w->inner, h, x, (size_t)in);
        if (w->o.input(w->o.user, s->layers, s->parts, h, rows)) {
            void *changed = moqi_device_room(w, MOQI_DEVICE_IN, in);
            if (changed) w->inner->upload_act(w->inner, changed, h, (size_t)in);
            if (changed) x = changed;
        }
    }
    w->inner->linear(w->inner, s->inner, x, rows, y);
    moqi_watch_round(w, y, out);
    h = w->o.output ? moqi_host_room(w, MOQI_HOST_Y, out) : NULL;
    if (!h) return;
    w->inner->download_act(w->inner, h, y, (size_t)out);
    w->o.output(w->o.user, s->layers, s->parts, h, rows);
}

static void moqi_watch_linear(moq_backend *be, const moq_weight *weight, const void *x, int32_t rows, void *y)
{
    moqi_watch_product(moqi_watch_of(be), moqi_seen_of(weight), x, rows, y);
}

static void moqi_watch_embed(moq_backend *be, const moq_weight *weight, const int32_t *ids, int32_t count, float scale, void *y)
{
    moqi_watch *w = moqi_watch_of(be);
    w->inner->embed(w->inner, moqi_seen_of(weight)->inner, ids, count, scale, y);
    moqi_watch_round(w, y, (int64_t)count * moqi_seen_of(weight)->cols);
}

/* ---- mixtures of experts ---- */

static void moqi_watch_release_moe(moq_backend *be, moq_experts *experts)
{
    moqi_watch *w = moqi_watch_of(be);
    moqi_seen_moe *m = (moqi_seen_moe *)(void *)experts;
    if (!m) return;
    for (int32_t e = 0; e < m->routing.experts; e++) {
        if (m->up) moqi_seen_drop(w, m->up[e]);
        if (m->down) moqi_seen_drop(w, m->down[e]);
    }
    moqi_arena arena = m->arena;
    moqi_arena_drop(&arena);
}

/* Every expert's layers, gate and up as one. Biases of the layers come along in the products. */
static moq_result moqi_seen_moe_fill(moqi_watch *w, moqi_seen_moe *m, const moq_moe *moe, moq_error *err)
{
    int32_t count = moe->routing.experts;
    m->up = (moqi_seen **)moqi_take_array(&m->arena, (uint64_t)count, sizeof *m->up);
    m->down = (moqi_seen **)moqi_take_array(&m->arena, (uint64_t)count, sizeof *m->down);
    if (!m->up || !m->down) return moqi_nomem(err, (uint64_t)count * sizeof *m->up);
    if (moe->routing.bias.data && !(m->bias = moqi_take_floats(&m->arena, &moe->routing.bias, 0, 1, count))) return moqi_nomem(err, (uint64_t)count * 4);
    m->gated = moe->gate != NULL;
    m->cols = moe->up[0].cols;
    m->n = moe->up[0].rows;
    m->out = moe->down[0].rows;
    for (int32_t e = 0; e < count; e++) {
        moq_linear pair[2];
        pair[0] = moe->gate ? moe->gate[e] : moe->up[e];
        pair[1] = moe->up[e];
        m->up[e] = moqi_seen_make(w, pair, moe->gate ? 2 : 1, err);
        m->down[e] = m->up[e] ? moqi_seen_make(w, &moe->down[e], 1, err) : NULL;
        if (!m->down[e]) return err && err->code < 0 ? err->code : MOQ_E_BACKEND;
    }
    return MOQ_OK;
}

static moq_experts *moqi_watch_prepare_moe(moq_backend *be, const moq_moe *moe, moq_error *err)
{
    moqi_watch *w = moqi_watch_of(be);
    moqi_arena r = moqi_arena_make(&w->a);
    moqi_clear(err);
    if (moqi_check_moe(moe, err) < 0) return NULL;
    moqi_seen_moe *m = (moqi_seen_moe *)moqi_take(&r, sizeof *m, 16);
    if (!m) { moqi_nomem(err, sizeof *m); return NULL; }
    m->arena = r;
    m->routing = moe->routing;
    m->activation = moe->activation;
    if (moqi_seen_moe_fill(w, m, moe, err) >= 0) return (moq_experts *)(void *)m;
    moqi_watch_release_moe(be, (moq_experts *)(void *)m);
    return NULL;
}

static void moqi_watch_activation(moq_backend *be, const moq_activation_desc *a, const void *x, int32_t rows, int32_t n, void *y);

/* The rows that chose expert e: x [count, cols] on the host -> its output [count, out], on the host. NULL when out of memory. */
static float *moqi_watch_expert(moqi_watch *w, const moqi_seen_moe *m, int32_t e, const float *x, int32_t count)
{
    int64_t width = m->gated ? 2 * m->n : m->n;
    void *in = moqi_device_room(w, MOQI_DEVICE_OUT, count * moqi_max(m->cols, m->out));
    void *mid = moqi_device_room(w, MOQI_DEVICE_MID, count * width), *act = moqi_device_room(w, MOQI_DEVICE_ACT, count * m->n);
    float *out = moqi_host_room(w, MOQI_HOST_OUT, count * m->out);
    if (!in || !mid || !act || !out) return NULL;
    w->inner->upload_act(w->inner, in, x, (size_t)(count * m->cols));
    moqi_watch_product(w, m->up[e], in, count, mid);
    moqi_watch_activation(&w->be, &m->activation, mid, count, (int32_t)m->n, act);
    moqi_watch_product(w, m->down[e], act, count, in);
    w->inner->download_act(w->inner, out, in, (size_t)(count * m->out));
    return out;
}

/* Choices of all rows, then expert after expert; each row's sum is kept on the host. Buffers: X holds the rows of one expert after the rows
   of all, ROUTE the logits, the scratch of routing, and the sums. */
static void moqi_watch_moe(moq_backend *be, const moq_experts *experts, const void *x, const void *logits, int32_t rows, void *y)
{
    moqi_watch *w = moqi_watch_of(be);
    const moqi_seen_moe *m = (const moqi_seen_moe *)(const void *)experts;
    int64_t count = m->routing.experts, top = m->routing.top_k;
    float *in = moqi_host_room(w, MOQI_HOST_X, 2 * rows * m->cols), *route = moqi_host_room(w, MOQI_HOST_ROUTE, (rows + 5) * count + rows * m->out);
    float *choice = moqi_host_room(w, MOQI_HOST_CHOICE, 2 * rows * top);
    if (!in || !route || !choice) return;
    float *chosen = in + rows * m->cols, *scratch = route + rows * count, *sum = scratch + 5 * count, *weight = choice + rows * top;
    int32_t *index = (int32_t *)(void *)choice;
    w->inner->download_act(w->inner, in, x, (size_t)(rows * m->cols));
    w->inner->download_act(w->inner, route, logits, (size_t)(rows * count));
    memset(sum, 0, (size_t)(rows * m->out) * sizeof *sum);
    for (int64_t r = 0; r < rows; r++) moqi_route(&m->routing, m->bias, route + r * count, scratch, index + r * top, weight + r * top);
    if (w->round) moqi_bf16_all(weight, rows * top);
    for (int32_t e = 0; e < (int32_t)count; e++) {
        int32_t n = 0;
        for (int64_t i = 0; i < rows * top; i++)
            if (index[i] == e) memcpy(chosen + n++ * m->cols, in + i / top * m->cols, (size_t)m->cols * sizeof *in);
        float *out = n > 0 ? moqi_watch_expert(w, m, e, chosen, n) : NULL;
        for (int64_t i = 0; out && i < rows * top; i++) {
            if (index[i] != e) continue;
            for (int64_t c = 0; c < m->out; c++) {
                float v = weight[i] * out[c];
                sum[i / top * m->out + c] += w->round ? moqi_bf16(v) : v;
            }
            out += m->out;
        }
    }
    if (w->round) moqi_bf16_all(sum, rows * m->out);
    w->inner->upload_act(w->inner, y, sum, (size_t)(rows * m->out));
}

/* ---- KV cache and attention ---- */

static moq_kv_cache *moqi_watch_kv_create(moq_backend *be, const moq_kv_desc *desc, moq_error *err)
{
    moqi_watch *w = moqi_watch_of(be);
    moq_kv_cache *inner = w->inner->kv_create(w->inner, desc, err); /* checks the description */
    if (!inner) return NULL;
    size_t name = desc->name ? strlen(desc->name) + 1 : 1, head = (sizeof(moqi_seen_kv) + 15) & ~(size_t)15;
    uint64_t tokens = (uint64_t)desc->slots * (uint64_t)desc->capacity * (uint64_t)desc->kv_heads, n[2] = {0, 0};
    int64_t dim[2];
    dim[0] = desc->head_dim;
    dim[1] = desc->value_dim > 0 ? desc->value_dim : desc->head_dim;
    for (int i = 0; w->round && i < 2; i++) n[i] = tokens * (uint64_t)dim[i];
    size_t bytes = head + (size_t)(n[0] + n[1]) * sizeof(float) + name;
    moqi_seen_kv *s = (moqi_seen_kv *)moq_allocate(&w->a, bytes);
    if (!s) {
        w->inner->kv_release(w->inner, inner);
        moqi_nomem(err, bytes);
        return NULL;
    }
    float *rows = (float *)(void *)((uint8_t *)s + head);
    char *text = (char *)(rows + n[0] + n[1]);
    if (desc->name) memcpy(text, desc->name, name);
    s->inner = inner;
    s->desc = *desc;
    s->desc.name = text;
    for (int i = 0; i < 2; i++) s->dim[i] = dim[i];
    if (w->round) { s->rows[0] = rows; s->rows[1] = rows + n[0]; }
    s->bytes = bytes;
    return (moq_kv_cache *)(void *)s;
}

static void moqi_watch_kv_release(moq_backend *be, moq_kv_cache *cache)
{
    moqi_watch *w = moqi_watch_of(be);
    moqi_seen_kv *s = (moqi_seen_kv *)(void *)cache;
    if (!s) return;
    w->inner->kv_release(w->inner, s->inner);
    moq_release(&w->a, s, s->bytes);
}

static size_t moqi_watch_kv_bytes(const moq_backend *be, const moq_kv_desc *desc)
{
    const moqi_watch *w = moqi_watch_of(be);
    return w->inner->kv_bytes(w->inner, desc);
}

/* Rows of n values with a stride, side by side on the host. */
static void moqi_gather(const moqi_watch *w, const void *x, int64_t rows, int64_t n, int64_t stride, float *out)
{
    for (int64_t r = 0; r < rows; r++) w->inner->download_act(w->inner, out + r * n, moqi_act_at(w, x, r * stride), (size_t)n);
}

/* The row of all heads of one token. */
static float *moqi_seen_row(const moqi_seen_kv *s, int which, int64_t slot, int64_t pos)
{
    return s->rows[which] + (slot * s->desc.capacity + pos) * s->desc.kv_heads * s->dim[which];
}

/* Slots and positions of a batch on the host: [rows] slots, [rows] positions. NULL when out of memory. */
static const int32_t *moqi_watch_batch(moqi_watch *w, const moq_batch *b)
{
    int32_t *at = (int32_t *)(void *)moqi_host_room(w, MOQI_HOST_CHOICE, 2 * (int64_t)b->rows);
    if (!at) return NULL;
    w->inner->download(w->inner, at, b->slot, (size_t)b->rows * sizeof *at);
    w->inner->download(w->inner, at + b->rows, b->pos, (size_t)b->rows * sizeof *at);
    return at;
}

static void moqi_watch_kv_append(moq_backend *be, moq_kv_cache *cache, const moq_batch *b, const void *k, int64_t k_stride, const void *v,
                                 int64_t v_stride)
{
    moqi_watch *w = moqi_watch_of(be);
    const moqi_seen_kv *s = (const moqi_seen_kv *)(const void *)cache;
    int64_t kn = s->desc.kv_heads * s->dim[0], vn = s->desc.kv_heads * s->dim[1];
    float *kh = w->o.kv || w->round ? moqi_host_room(w, MOQI_HOST_X, b->rows * kn) : NULL, *vh = kh ? moqi_host_room(w, MOQI_HOST_Y, b->rows * vn) : NULL;
    const int32_t *at = vh && w->round ? moqi_watch_batch(w, b) : NULL;
    if (vh) {
        moqi_gather(w, k, b->rows, kn, k_stride, kh);
        moqi_gather(w, v, b->rows, vn, v_stride, vh);
        if (w->o.kv) w->o.kv(w->o.user, &s->desc, kh, vh, b->rows);
    }
    for (int64_t r = 0; at && r < b->rows; r++) {
        int32_t slot = at[r], pos = at[b->rows + r];
        if (slot < 0 || slot >= s->desc.slots || pos < 0 || pos >= s->desc.capacity) continue;
        memcpy(moqi_seen_row(s, 0, slot, pos), kh + r * kn, (size_t)kn * sizeof *kh);
        memcpy(moqi_seen_row(s, 1, slot, pos), vh + r * vn, (size_t)vn * sizeof *vh);
    }
    w->inner->kv_append(w->inner, s->inner, b, k, k_stride, v, v_stride);
}

static void moqi_watch_kv_copy(moq_backend *be, moq_kv_cache *cache, int32_t dst_slot, int32_t dst_pos, int32_t src_slot, int32_t src_pos,
                               int32_t count)
{
    moqi_watch *w = moqi_watch_of(be);
    const moqi_seen_kv *s = (const moqi_seen_kv *)(const void *)cache;
    for (int i = 0; s->rows[0] && count > 0 && i < 2; i++)
        memmove(moqi_seen_row(s, i, dst_slot, dst_pos), moqi_seen_row(s, i, src_slot, src_pos),
                (size_t)(count * s->desc.kv_heads * s->dim[i]) * sizeof(float));
    w->inner->kv_copy(w->inner, s->inner, dst_slot, dst_pos, src_slot, src_pos, count);
}

/* The rows of y may lie apart; what is between them is not ours. */
static void moqi_watch_round_rows(moqi_watch *w, void *y, int64_t rows, int64_t n, int64_t stride)
{
    if (stride == n) moqi_watch_round(w, y, rows * n);
    else for (int64_t r = 0; r < rows; r++) moqi_watch_round(w, moqi_act_at(w, y, r * stride), n);
}

/* One query head over the keys [first, last] of a slot, as PyTorch's plain ("eager") attention does it in BF16: q.k rounded, times the scale
   rounded, softmax in F32 and rounded, sum of p v rounded. score: [last - first + 1]; y: [value_dim]. */
static void moqi_eager_head(const moqi_kernels *k, const moqi_seen_kv *s, const moq_attention_desc *a, const float *q, int64_t head, int32_t slot,
                            int64_t first, int64_t last, float sink, float *score, float *y)
{
    int64_t kv = head / (a->heads / s->desc.kv_heads);
    float scale = a->scale != 0 ? a->scale : 1 / sqrtf((float)s->dim[0]), max = a->sinks ? sink : -3e38f, sum = 0;
    for (int64_t i = first; i <= last; i++) {
        float v = moqi_bf16(moqi_bf16(k->dot(q, moqi_seen_row(s, 0, slot, i) + kv * s->dim[0], s->dim[0])) * scale);
        if (a->softcap > 0) v = moqi_bf16(moqi_bf16(tanhf(moqi_bf16(v / a->softcap))) * a->softcap);
        score[i - first] = v;
        if (v > max) max = v;
    }
    for (int64_t i = first; i <= last; i++) sum += score[i - first] = expf(score[i - first] - max);
    if (a->sinks) sum += expf(sink - max);
    memset(y, 0, (size_t)s->dim[1] * sizeof *y);
    for (int64_t i = first; i <= last; i++) k->axpy(moqi_bf16(score[i - first] / sum), moqi_seen_row(s, 1, slot, i) + kv * s->dim[1], y, s->dim[1]);
    moqi_bf16_all(y, s->dim[1]);
}

/* All rows and heads on the host. */
static void moqi_eager_attention(moqi_watch *w, const moqi_seen_kv *s, const moq_batch *b, const moq_attention_desc *a)
{
    int64_t qn = a->heads * s->dim[0], yn = a->heads * s->dim[1];
    const int32_t *at = moqi_watch_batch(w, b);
    float *q = moqi_host_room(w, MOQI_HOST_X, qn + yn), *score = moqi_host_room(w, MOQI_HOST_ROUTE, s->desc.capacity + a->heads);
    if (!at || !q || !score) return;
    float *y = q + qn, *sinks = score + s->desc.capacity;
    if (a->sinks) w->inner->download(w->inner, sinks, a->sinks, (size_t)a->heads * sizeof *sinks);
    for (int64_t r = 0; r < b->rows; r++) {
        int64_t pos = at[b->rows + r], first = a->window > 0 ? moqi_max(0, pos - a->window + 1) : 0;
        w->inner->download_act(w->inner, q, moqi_act_at(w, a->q, r * a->q_stride), (size_t)qn);
        memset(y, 0, (size_t)yn * sizeof *y);
        for (int64_t h = 0; at[r] >= 0 && at[r] < s->desc.slots && pos >= 0 && pos < s->desc.capacity && h < a->heads; h++)
            moqi_eager_head(w->k, s, a, q + h * s->dim[0], h, at[r], first, pos, a->sinks ? sinks[h] : 0, score, y + h * s->dim[1]);
        w->inner->upload_act(w->inner, moqi_act_at(w, a->y, r * a->y_stride), y, (size_t)yn);
    }
}

static void moqi_watch_attention(moq_backend *be, const moq_batch *b, const moq_attention_desc *a)
{
    moqi_watch *w = moqi_watch_of(be);
    const moqi_seen_kv *s = (const moqi_seen_kv *)(const void *)a->cache;
    moq_attention_desc d = *a;
    if (w->round) { moqi_eager_attention(w, s, b, a); return; }
    d.cache = s->inner;
    w->inner->attention(w->inner, b, &d);
}

/* ---- small operations, in BF16 step by step where asked ---- */

/* PyTorch: x += add in BF16; x / rms in F32, rounded; times the weight, rounded again. */
static void moqi_watch_norm(moq_backend *be, const moq_norm_desc *n)
{
    moqi_watch *w = moqi_watch_of(be);
    moq_norm_desc d = *n;
    int64_t groups = n->groups > 0 ? n->groups : 1, width = groups * n->cols, stride = n->y_stride ? n->y_stride : width;
    if (!w->round) { w->inner->norm(w->inner, n); return; }
    float *weight = n->weight ? moqi_host_room(w, MOQI_HOST_ROUTE, n->cols) : NULL, *h = moqi_host_room(w, MOQI_HOST_X, width);
    if (!h || (n->weight && !weight)) return;
    if (n->add) {
        void *x = moqi_act_at(w, n->x, 0);
        for (int64_t r = 0; r < n->rows; r++)
            w->inner->add(w->inner, moqi_act_at(w, x, r * (n->x_stride ? n->x_stride : width)), moqi_act_at(w, n->add, r * width), (size_t)width);
        moqi_watch_round_rows(w, x, n->rows, width, n->x_stride ? n->x_stride : width);
    }
    d.add = NULL;
    d.weight = NULL;
    w->inner->norm(w->inner, &d);
    if (weight) w->inner->download(w->inner, weight, n->weight, (size_t)n->cols * sizeof *weight);
    for (int64_t r = 0; r < n->rows; r++) {
        void *at = moqi_act_at(w, n->y, r * stride);
        w->inner->download_act(w->inner, h, at, (size_t)width);
        for (int64_t i = 0; i < width; i++) h[i] = weight ? moqi_bf16(moqi_bf16(h[i]) * weight[i % n->cols]) : moqi_bf16(h[i]);
        w->inner->upload_act(w->inner, at, h, (size_t)width);
    }
}

static void moqi_watch_rope_table(moq_backend *be, const int32_t *pos, int32_t rows, const float *inv_freq, int32_t dims, float scale, float *table)
{
    moqi_watch *w = moqi_watch_of(be);
    w->inner->rope_table(w->inner, pos, rows, inv_freq, dims, scale, table);
}

/* PyTorch: cos and sin in BF16, x cos + turned(x) sin with every product rounded. */
static void moqi_watch_rope(moq_backend *be, const moq_rope_desc *r)
{
    moqi_watch *w = moqi_watch_of(be);
    int64_t dims = r->dims > 0 ? r->dims : r->head_dim, half = dims / 2, width = (int64_t)r->heads * r->head_dim;
    if (!w->round) { w->inner->rope(w->inner, r); return; }
    float *h = moqi_host_room(w, MOQI_HOST_X, width), *t = moqi_host_room(w, MOQI_HOST_ROUTE, dims);
    for (int64_t row = 0; h && t && row < r->rows; row++) {
        void *at = moqi_act_at(w, r->x, row * r->stride);
        w->inner->download(w->inner, t, r->table + row * dims, (size_t)dims * sizeof *t);
        w->inner->download_act(w->inner, h, at, (size_t)width);
        moqi_bf16_all(t, dims);
        for (int64_t head = 0; head < r->heads; head++)
            for (int64_t i = 0; i < half; i++) {
                float *base = h + head * r->head_dim + r->first, *a = base + (r->interleaved ? 2 * i : i), *b = base + (r->interleaved ? 2 * i + 1 : i + half);
                float x = *a, y = *b, c = t[2 * i], s = t[2 * i + 1];
                *a = moqi_bf16(moqi_bf16(x * c) - moqi_bf16(y * s));
                *b = moqi_bf16(moqi_bf16(y * c) + moqi_bf16(x * s));
            }
        w->inner->upload_act(w->inner, at, h, (size_t)width);
    }
}

/* PyTorch: the activated gate is rounded before it is multiplied. */
static void moqi_watch_activation(moq_backend *be, const moq_activation_desc *a, const void *x, int32_t rows, int32_t n, void *y)
{
    moqi_watch *w = moqi_watch_of(be);
    int gated = a->kind != MOQ_RELU2, steps = a->kind == MOQ_SILU_MUL || a->kind == MOQ_GELU_MUL || a->kind == MOQ_GELU_TANH_MUL;
    int64_t width = gated ? 2 * (int64_t)n : n;
    float *h = w->round && steps ? moqi_host_room(w, MOQI_HOST_Y, width) : NULL;
    if (!h) {
        w->inner->activation(w->inner, a, x, rows, n, y);
        moqi_watch_round(w, y, (int64_t)rows * n);
        return;
    }
    for (int64_t r = 0; r < rows; r++) {
        w->inner->download_act(w->inner, h, moqi_act_at(w, x, r * width), (size_t)width);
        for (int64_t i = 0; i < n; i++) h[i] = moqi_bf16(moqi_bf16(moqi_activate(a, h[i], 1)) * h[n + i]);
        w->inner->upload_act(w->inner, moqi_act_at(w, y, r * n), h, (size_t)n);
    }
}

static void moqi_watch_add(moq_backend *be, void *x, const void *y, size_t count)
{
    moqi_watch *w = moqi_watch_of(be);
    w->inner->add(w->inner, x, y, count);
    moqi_watch_round(w, x, (int64_t)count);
}

static void moqi_watch_argmax(moq_backend *be, const void *x, int32_t rows, int32_t n, int32_t *index)
{
    moqi_watch *w = moqi_watch_of(be);
    w->inner->argmax(w->inner, x, rows, n, index);
}

/* ---- state-space mixers: passed on; only the result is rounded ---- */

typedef struct moqi_seen_ssm { moq_ssm *inner; int64_t width; } moqi_seen_ssm; /* width: of one row of results */

static moq_ssm *moqi_watch_ssm_create(moq_backend *be, const moq_ssm_desc *desc, moq_error *err)
{
    moqi_watch *w = moqi_watch_of(be);
    moqi_seen_ssm *s = (moqi_seen_ssm *)moq_allocate(&w->a, sizeof *s);
    if (!s) { moqi_nomem(err, sizeof *s); return NULL; }
    s->inner = w->inner->ssm_create(w->inner, desc, err);
    s->width = (int64_t)desc->heads * desc->head_dim;
    if (s->inner) return (moq_ssm *)(void *)s;
    moq_release(&w->a, s, sizeof *s);
    return NULL;
}

static void moqi_watch_ssm_release(moq_backend *be, moq_ssm *ssm)
{
    moqi_watch *w = moqi_watch_of(be);
    moqi_seen_ssm *s = (moqi_seen_ssm *)(void *)ssm;
    if (!s) return;
    w->inner->ssm_release(w->inner, s->inner);
    moq_release(&w->a, s, sizeof *s);
}

static size_t moqi_watch_ssm_bytes(const moq_backend *be, const moq_ssm_desc *desc)
{
    const moqi_watch *w = moqi_watch_of(be);
    return w->inner->ssm_bytes(w->inner, desc);
}

static void moqi_watch_ssm(moq_backend *be, moq_ssm *ssm, const moq_batch *b, const void *x, void *y)
{
    moqi_watch *w = moqi_watch_of(be);
    moqi_seen_ssm *s = (moqi_seen_ssm *)(void *)ssm;
    w->inner->ssm(w->inner, s->inner, b, x, y);
    moqi_watch_round(w, y, b->rows * s->width);
}

static void moqi_watch_ssm_copy(moq_backend *be, moq_ssm *ssm, int32_t dst_slot, int32_t src_slot)
{
    moqi_watch *w = moqi_watch_of(be);
    w->inner->ssm_copy(w->inner, ((moqi_seen_ssm *)(void *)ssm)->inner, dst_slot, src_slot);
}

static void moqi_watch_copy_heads(moq_backend *be, const moq_copy_desc *c)
{
    moqi_watch *w = moqi_watch_of(be);
    w->inner->copy_heads(w->inner, c);
}

/* Every expert is watched as layers of its own. */
static size_t moqi_watch_moe_bytes(const moq_backend *be, const moq_experts *experts)
{
    const moqi_seen_moe *m = (const moqi_seen_moe *)(const void *)experts;
    size_t total = m ? moqi_arena_bytes(&m->arena) : 0;
    for (int32_t e = 0; m && e < m->routing.experts; e++)
        total += moqi_watch_weight_bytes(be, (moq_weight *)(void *)m->up[e]) + moqi_watch_weight_bytes(be, (moq_weight *)(void *)m->down[e]);
    return total;
}

/* ---- the table ---- */

/* In the order of struct moq_backend; no graphs: a replay could not be watched, and neither could a sequence that comes from a file. */
static const moq_backend moqi_watch_table = {
    NULL, "observe", MOQ_F32, 16,
    moqi_watch_destroy, moqi_watch_alloc, moqi_watch_release, moqi_watch_upload, moqi_watch_download, moqi_watch_copy, moqi_watch_upload_act,
    moqi_watch_download_act, moqi_watch_sync, moqi_watch_reserve, moqi_watch_supports, moqi_watch_explain, moqi_watch_prepare_linear,
    moqi_watch_release_weight, moqi_watch_weight_bytes, moqi_watch_linear, moqi_watch_embed, moqi_watch_prepare_moe, moqi_watch_release_moe,
    moqi_watch_moe, moqi_watch_kv_create, moqi_watch_kv_release, moqi_watch_kv_bytes, moqi_watch_kv_append, moqi_watch_kv_copy,
    moqi_watch_attention, moqi_watch_norm, moqi_watch_rope_table, moqi_watch_rope, moqi_watch_activation, moqi_watch_add, moqi_watch_argmax,
    NULL, NULL, NULL, NULL,
    moqi_watch_ssm_create, moqi_watch_ssm_release, moqi_watch_ssm_bytes, moqi_watch_ssm, moqi_watch_ssm_copy, moqi_watch_copy_heads,
    moqi_watch_moe_bytes, NULL, NULL, NULL, NULL
};

/* What the inner backend lacks, this one lacks too, so that an engine finds out when it prepares. */
MOQ_API moq_backend *moq_observing_backend(moq_backend *inner, const moq_observer *observer, const moq_allocator *a, moq_error *err)
{
    moqi_clear(err);
    if (!inner || !observer) {
        moqi_fail(err, MOQ_E_ARG, moqi_at(NULL, NULL, NULL, -1), "observing needs a backend to watch and an observer");
        return NULL;
    }
    moqi_watch *w = (moqi_watch *)moq_allocate(a, sizeof *w);
    if (!w) { moqi_nomem(err, sizeof *w); return NULL; }
    w->be = moqi_watch_table;
    w->be.ctx = w;
    w->be.act = inner->act;
    w->be.max_rows = inner->max_rows;
    w->inner = inner;
    w->o = *observer;
    if (a) w->a = *a;
    w->elem = (size_t)moq_dtype_bits(inner->act) / 8;
    w->k = moqi_get_kernels(0);
    w->round = observer->bf16 && inner->act == MOQ_F32;
    moqi_clear(&w->failed);
    if (!inner->kv_create) w->be.kv_create = NULL;
    if (!inner->attention) w->be.attention = NULL;
    if (!inner->norm) w->be.norm = NULL;
    if (!inner->rope) w->be.rope = NULL;
    if (!inner->rope_table) w->be.rope_table = NULL;
    if (!inner->activation) { w->be.activation = NULL; w->be.prepare_moe = NULL; w->be.moe = NULL; }
    if (!inner->add) w->be.add = NULL;
    if (!inner->argmax) w->be.argmax = NULL;
    if (!inner->embed) w->be.embed = NULL;
    if (!inner->ssm) { w->be.ssm_create = NULL; w->be.ssm = NULL; }
    if (!inner->copy_heads) w->be.copy_heads = NULL;
    return &w->be;
}

MOQ_API void moq_end_batch(moq_backend *watch)
{
    moqi_watch *w = watch && watch->destroy == moqi_watch_destroy ? moqi_watch_of(watch) : NULL;
    if (w && w->o.end_batch) w->o.end_batch(w->o.user);
}

/* ------------------------------------------------------------------------------------------------
   >>search          AutoQuantize: which units get which format within a budget of bits
   Exact: the answer is the best there is, not the best that was found in time. Recorded scores and costs decide alone.
   ------------------------------------------------------------------------------------------------ */

/* ---- grouping (calibration.md 15.2) ---- */

/* Length of `s` when `name` ends in ".s", else 0. */
static size_t moqi_ends_in(const char *name, size_t n, const char *s)
{
    size_t m = strlen(s);
    return n > m && name[n - m - 1] == '.' && memcmp(name + n - m, s, m) == 0 ? m : 0;
}

/* Position of ".experts." or the like in a name, with its length; n when there is none. */
static size_t moqi_find_part(const char *name, size_t n, const char *part)
{
    size_t m = strlen(part);
    for (size_t i = 0; i + m <= n; i++)
        if (memcmp(name + i, part, m) == 0) return i;
    return n;
}

/* First rule that matches: qkv, experts, gate and up, linear attention; then the module alone. */
MOQ_API size_t moq_unit_name(const char *module, char *text, size_t capacity)
{
    static const struct { const char *tail, *group; } rules[] = {
        {"q_proj", "qkv"}, {"k_proj", "qkv"}, {"v_proj", "qkv"}, {"gate_proj", "gate_up"}, {"up_proj", "gate_up"},
        {"in_proj_qkv", "in_proj_qkvz"}, {"in_proj_z", "in_proj_qkvz"}, {"in_proj_a", "in_proj_ab"}, {"in_proj_b", "in_proj_ab"}};
    if (!module) module = "";
    size_t n = strlen(module), at = moqi_find_part(module, n, ".experts.");
    if (at < n) return moqi_format(text, capacity, "%.*s.experts", (int)at, module);
    at = moqi_find_part(module, n, ".mixer.");
    for (size_t i = 0; i < MOQI_COUNT(rules); i++) {
        size_t m = moqi_ends_in(module, n, rules[i].tail);
        if (m == 0 || (at < n && strcmp(rules[i].group, "gate_up") == 0)) continue;
        return moqi_format(text, capacity, "%.*s.%s", (int)(n - m - 1), module, rules[i].group);
    }
    return moqi_format(text, capacity, "%s", module);
}

/* The least bits of a recipe's operands (15.4): only NVFP4 with dynamic blocks of 16 counts its scales, 4.5; MX and INT formats count codes. */
MOQ_API double moq_recipe_bits(const moq_recipe *recipe)
{
    if (!recipe) return 16;
    const moq_coding *c = &recipe->scheme.weight;
    int bits = moq_dtype_bits(c->elem);
    /* static blocks come from the searches of block scales */
    int fixed = strncmp(recipe->calibration, "mse", 3) == 0 || strncmp(recipe->calibration, "local_hessian", 13) == 0;
    return bits == 4 && c->scale == MOQ_F8_E4M3 && c->group_cols == 16 && !fixed ? 4.5 : bits;
}

/* ---- the budget ---- */

static double moqi_total(const moq_solve_desc *d, const int32_t *choice, int scores)
{
    double sum = scores ? 0 : d->fixed_cost;
    for (size_t i = 0; i < d->count; i++) sum += scores ? d->units[i].scores[choice[i]] : d->units[i].costs[choice[i]];
    return sum;
}

/* effective_bits / 16 of everything uncompressed. A relative 1e-12 forgives the order of additions. */
static double moqi_budget(const moq_solve_desc *d)
{
    double all = d->uncompressed;
    if (!(all > 0)) {
        all = d->fixed_cost;
        for (size_t i = 0; i < d->count; i++) {
            double top = 0;
            for (int32_t f = 0; f < d->units[i].formats; f++)
                if (d->units[i].costs[f] > top) top = d->units[i].costs[f];
            all += top;
        }
    }
    return d->effective_bits / 16 * all;
}

static moq_result moqi_check_units(const moq_solve_desc *d, double budget, moq_error *err)
{
    double least = d->fixed_cost;
    for (size_t i = 0; i < d->count; i++) {
        const moq_unit *u = &d->units[i];
        double low = 0;
        if (u->formats < 1 || !u->scores || !u->costs)
            return moqi_fail(err, MOQ_E_ARG, moqi_at(NULL, "unit", u->name ? u->name : "", -1), "there is no format to choose from");
        for (int32_t f = 0; f < u->formats; f++) {
            if (!(fabs(u->scores[f]) < 1e300) || !(u->costs[f] >= 0 && u->costs[f] < 1e300))
                return moqi_fail(err, MOQ_E_ARG, moqi_at(NULL, "unit", u->name ? u->name : "", -1), "format %d has score %g and cost %g, which are no finite numbers",
                                 (int)f, u->scores[f], u->costs[f]);
            if (f == 0 || u->costs[f] < low) low = u->costs[f];
        }
        least += low;
    }
    if (least > budget * (1 + 1e-12))
        return moqi_fail(err, MOQ_E_CONFIG, moqi_at(NULL, NULL, "effective_bits", -1), "the most compressed choice costs %g, the budget of %g bits is %g; raise it",
                         least, d->effective_bits, budget);
    return MOQ_OK;
}

/* ---- the threshold of KL scores (15.5) ---- */

/* Each unit's first format with a score of at most t; none: the most compressed. Returns the cost. */
static double moqi_choose_below(const moq_solve_desc *d, double t, int32_t *choice)
{
    for (size_t i = 0; i < d->count; i++) {
        choice[i] = 0;
        for (int32_t f = 0; f < d->units[i].formats; f++)
            if (d->units[i].scores[f] <= t) { choice[i] = f; break; }
    }
    return moqi_total(d, choice, 0);
}

/* A hundred halvings between the smallest and the largest score. The selection evaluated last counts: the interval has shrunk to two
   neighbouring doubles by then, and a score is a float, so the middle is the score itself. */
static void moqi_solve_threshold(const moq_solve_desc *d, double budget, int32_t *choice)
{
    double low = d->units[0].scores[0], high = low;
    for (size_t i = 0; i < d->count; i++)
        for (int32_t f = 0; f < d->units[i].formats; f++) {
            if (d->units[i].scores[f] < low) low = d->units[i].scores[f];
            if (d->units[i].scores[f] > high) high = d->units[i].scores[f];
        }
    for (int i = 0; i < 100; i++) {
        double middle = (low + high) / 2;
        if (moqi_choose_below(d, middle, choice) <= budget * (1 + 1e-12)) high = middle;
        else low = middle;
    }
}

/* ---- the smallest sum (multiple-choice knapsack), by dynamic programming over the costs that can occur ---- */

/* One partial choice: units 0..i. Of equal costs only the best score is kept; without a lower limit also nothing that is both dearer and worse. */
typedef struct moqi_state {
    double cost, score;
    uint32_t from;          /* state of the level before */
    int32_t choice;
} moqi_state;

enum { MOQI_MAX_STATES = 1 << 22 };

static int moqi_state_before(const moqi_state *a, const moqi_state *b)
{
    return a->cost < b->cost || (!(b->cost < a->cost) && a->score < b->score);
}

/* Heapsort by cost, then score: in place, no recursion. */
static void moqi_sort_states(moqi_state *s, size_t n)
{
    for (size_t end = n, root = n / 2; end > 1;) {
        if (root > 0) root--;
        else { moqi_state t = s[0]; s[0] = s[--end]; s[end] = t; }
        for (size_t i = root, child; (child = 2 * i + 1) < end; i = child) {
            if (child + 1 < end && moqi_state_before(&s[child], &s[child + 1])) child++;
            if (!moqi_state_before(&s[i], &s[child])) break;
            moqi_state t = s[i]; s[i] = s[child]; s[child] = t;
        }
    }
}

/* Bounds for the units after i: what they cost at least, and the least of score + lambda * cost. */
typedef struct moqi_rest { double least, most, relaxed; } moqi_rest;

static void moqi_fill_rest(const moq_solve_desc *d, double lambda, moqi_rest *rest)
{
    memset(&rest[d->count], 0, sizeof *rest);
    for (size_t i = d->count; i-- > 0;) {
        const moq_unit *u = &d->units[i];
        double low = u->costs[0], high = low, relaxed = u->scores[0] + lambda * low;
        for (int32_t f = 1; f < u->formats; f++) {
            if (u->costs[f] < low) low = u->costs[f];
            if (u->costs[f] > high) high = u->costs[f];
            if (u->scores[f] + lambda * u->costs[f] < relaxed) relaxed = u->scores[f] + lambda * u->costs[f];
        }
        rest[i].least = rest[i + 1].least + low;
        rest[i].most = rest[i + 1].most + high;
        rest[i].relaxed = rest[i + 1].relaxed + relaxed;
    }
}

/* Each unit's best format at a price per cost; returns the cost, *score the sum. Ties: the cheaper. */
static double moqi_at_price(const moq_solve_desc *d, double lambda, double *score)
{
    double cost = d->fixed_cost;
    *score = 0;
    for (size_t i = 0; i < d->count; i++) {
        const moq_unit *u = &d->units[i];
        int32_t best = 0;
        for (int32_t f = 1; f < u->formats; f++) {
            double a = u->scores[f] + lambda * u->costs[f], b = u->scores[best] + lambda * u->costs[best];
            if (a < b || (!(b < a) && u->costs[f] < u->costs[best])) best = f;
        }
        cost += u->costs[best];
        *score += u->scores[best];
    }
    return cost;
}

/* The price at which the relaxed choice just fits, and the score of that choice: an upper bound of the answer. */
static double moqi_find_price(const moq_solve_desc *d, double budget, double *bound)
{
    double low = 0, high = 1, score;
    if (moqi_at_price(d, 0, bound) <= budget) return 0;
    for (int i = 0; i < 2000 && moqi_at_price(d, high, &score) > budget; i++) high *= 2;
    for (int i = 0; i < 200; i++) {
        double middle = (low + high) / 2;
        if (moqi_at_price(d, middle, &score) > budget) low = middle;
        else high = middle;
    }
    moqi_at_price(d, high, bound);
    return high;
}

/* The states of one level from those before it. out has room for `count` * formats. */
static size_t moqi_next_states(const moq_solve_desc *d, size_t i, const moqi_state *in, size_t count, const moqi_rest *rest, double lambda,
                               double budget, double floor_cost, double bound, moqi_state *out)
{
    const moq_unit *u = &d->units[i];
    size_t n = 0, kept = 0;
    for (size_t j = 0; j < count; j++)
        for (int32_t f = 0; f < u->formats; f++) {
            moqi_state s;
            s.cost = in[j].cost + u->costs[f];
            s.score = in[j].score + u->scores[f];
            s.from = (uint32_t)j;
            s.choice = f;
            if (s.cost + rest[i + 1].least > budget || s.cost + rest[i + 1].most < floor_cost) continue;
            if (s.score + lambda * s.cost + rest[i + 1].relaxed - lambda * budget > bound + 1e-9 * fabs(bound)) continue;
            out[n++] = s;
        }
    moqi_sort_states(out, n);
    for (size_t j = 0; j < n; j++) {
        int worse = kept > 0 && !(out[j].score < out[kept - 1].score);
        int same = kept > 0 && !(out[j].cost > out[kept - 1].cost);
        if (worse && (same || floor_cost <= 0)) continue;
        out[kept++] = out[j];
    }
    return kept;
}

/* Levels of states, kept for the way back. */
typedef struct moqi_level { moqi_state *states; size_t count, room; } moqi_level;

static moq_result moqi_solve_sum(const moq_solve_desc *d, double budget, double floor_cost, moqi_level *level, moqi_rest *rest, int32_t *choice,
                                 moq_error *err)
{
    double bound = 1e300, lambda = moqi_find_price(d, budget, &bound);
    moqi_state start = {d->fixed_cost, 0, 0, 0};
    const moqi_state *in = &start;
    size_t count = 1;
    if (floor_cost > 0) bound = 1e300;
    moqi_fill_rest(d, lambda, rest);
    for (size_t i = 0; i < d->count; i++) {
        moqi_level *l = &level[i];
        l->room = count * (size_t)d->units[i].formats;
        if (l->room > MOQI_MAX_STATES)
            return moqi_fail(err, MOQ_E_LIMIT, moqi_at(NULL, NULL, "autoquant", -1), "more than %d partial choices at unit %llu; round the costs or search fewer formats",
                             (int)MOQI_MAX_STATES, (unsigned long long)i);
        l->states = (moqi_state *)moq_allocate(&d->allocator, l->room * sizeof *l->states);
        if (!l->states) return moqi_nomem(err, l->room * sizeof *l->states);
        l->count = moqi_next_states(d, i, in, count, rest, lambda, budget, floor_cost, bound, l->states);
        if (l->count == 0)
            return moqi_fail(err, MOQ_E_CONFIG, moqi_at(NULL, NULL, "effective_bits", -1), "no choice costs between %g and %g", floor_cost, budget);
        in = l->states;
        count = l->count;
    }
    size_t at = 0;
    for (size_t j = 1; j < count; j++)
        if (in[j].score < in[at].score) at = j;
    for (size_t i = d->count; i-- > 0;) {
        choice[i] = level[i].states[at].choice;
        at = level[i].states[at].from;
    }
    return MOQ_OK;
}

MOQ_API moq_result moq_solve(const moq_solve_desc *desc, int32_t *choice, double *score, double *cost, moq_error *err)
{
    if (!desc || !choice) return moq_fail(err, MOQ_E_ARG, "moq_solve", "desc or choice is NULL");
    double budget = moqi_budget(desc);
    size_t levels = desc->count * sizeof(moqi_level), rests = (desc->count + 1) * sizeof(moqi_rest);
    moqi_clear(err);
    if (desc->count == 0) return moqi_fail(err, MOQ_E_ARG, moqi_at(NULL, NULL, "autoquant", -1), "there are no units to choose for");
    moq_result r = moqi_check_units(desc, budget, err);
    if (r < 0) return r;
    if (desc->method == MOQ_SOLVE_THRESHOLD) {
        moqi_solve_threshold(desc, budget, choice);
    } else {
        moqi_level *level = (moqi_level *)moq_allocate(&desc->allocator, levels);
        moqi_rest *rest = (moqi_rest *)moq_allocate(&desc->allocator, rests);
        r = level && rest ? moqi_solve_sum(desc, budget * (1 + 1e-12), desc->lower * budget, level, rest, choice, err) : moqi_nomem(err, levels + rests);
        for (size_t i = 0; level && i < desc->count; i++) moq_release(&desc->allocator, level[i].states, level[i].room * sizeof(moqi_state));
        moq_release(&desc->allocator, level, levels);
        moq_release(&desc->allocator, rest, rests);
    }
    if (r < 0) return r;
    if (score) *score = moqi_total(desc, choice, 1);
    if (cost) *cost = moqi_total(desc, choice, 0);
    return MOQ_OK;
}

/* ------------------------------------------------------------------------------------------------
   >>calibrate       passes of a model under observation
   One record for each layer that is quantized. The forward pass is the caller's; it may run any family on any backend.
   ------------------------------------------------------------------------------------------------ */

/* The algorithms of the recipe table, by the first word of moq_recipe.calibration. */
typedef enum moqi_algorithm {
    MOQI_ALG_NONE = 0, MOQI_ALG_MAX, MOQI_ALG_SMOOTH, MOQI_ALG_AWQ, MOQI_ALG_CLIP, MOQI_ALG_AWQ_FULL, MOQI_ALG_SVD, MOQI_ALG_HESSIAN, MOQI_ALG_HEADROOM
} moqi_algorithm;

/* Passes, in this order; a run makes those that some record needs.
     STATS    amax, channel amax, mean magnitude of channels, histograms; keys and values
     SEARCH   the loss of every alpha (awq_lite)
     AGAIN    on inputs times pre_quant_scale: amax, the loss of every clip ratio
     HESSIAN  x^T x of inputs in a model whose inputs are quantized */
enum { MOQI_PASS_STATS = 1, MOQI_PASS_SEARCH = 2, MOQI_PASS_AGAIN = 4, MOQI_PASS_HESSIAN = 8 };

static const struct { const char *word; moqi_algorithm algorithm; int passes; } moqi_algorithms[] = {
    {"none", MOQI_ALG_NONE, 0},
    {"max", MOQI_ALG_MAX, MOQI_PASS_STATS},
    {"mse", MOQI_ALG_MAX, MOQI_PASS_STATS}, /* the search of block scales needs no data: the encoder makes it */
    {"smoothquant", MOQI_ALG_SMOOTH, MOQI_PASS_STATS},
    {"awq_lite", MOQI_ALG_AWQ, MOQI_PASS_STATS | MOQI_PASS_SEARCH},
    {"awq_clip", MOQI_ALG_CLIP, MOQI_PASS_AGAIN},
    {"awq_full", MOQI_ALG_AWQ_FULL, MOQI_PASS_STATS | MOQI_PASS_SEARCH | MOQI_PASS_AGAIN},
    {"svdquant", MOQI_ALG_SVD, MOQI_PASS_STATS | MOQI_PASS_SEARCH | MOQI_PASS_AGAIN},
    {"local_hessian", MOQI_ALG_HESSIAN, MOQI_PASS_STATS | MOQI_PASS_HESSIAN},
    {"nvfp4_act_headroom", MOQI_ALG_HEADROOM, MOQI_PASS_STATS}};

/* One layer. Vectors are F32 [cols], taken from the arena when the record is made. */
typedef struct moqi_record {
    const char *name;
    moq_linear layer;
    const moq_recipe *recipe;
    moqi_algorithm algorithm;
    int passes, expert;
    struct moqi_record *leader;     /* the first layer that shares this one's input, maybe itself; NULL: never ran */
    int64_t tokens;                 /* seen in the pass so far */
    float amax;                     /* running, of the current pass */
    float input_amax;               /* the result; 0: never ran or not wanted */
    float *channel_amax, *batch_sum, *act, *wsc, *best_scale, *p; /* p: 1 / best_scale, or SmoothQuant's; NULL where not used */
    int64_t batch_tokens, batches;
    moqi_buffer batch;              /* inputs of the current batch, leaders only: [tokens, cols] */
    moqi_matrix gram;               /* leaders of long runs: sum over batches of X^T X / tokens, [cols, cols] */
    double alpha_loss[MOQI_ALPHAS], clip_loss[MOQI_RATIOS];
    int best_alpha, best_ratio;     /* -1: none */
    float *group_loss;              /* integer groups: [ratios, rows, groups] */
    uint64_t *bins;                 /* [MOQI_BINS] */
    float *hessian;                 /* [cols / 16, 16, 16] */
    float *weight_amax;             /* result: of the tensor, or of each group */
    uint64_t weight_amax_count;
    float global_amax;              /* local_hessian: of the layers that share an input */
} moqi_record;

/* Keys and values of one attention module. */
typedef struct moqi_kv_record {
    struct moqi_kv_record *next;
    const char *name;
    int64_t heads, dim[2];
    float amax[2];
    float *bias[2];                 /* [heads * dim] or NULL */
    moqi_buffer batch[2];           /* [tokens, heads * dim], only with a bias */
    int64_t batches;
} moqi_kv_record;

struct moq_stats {
    moq_allocator a;
    moqi_arena arena;
    moqi_buffer list;               /* of moq_tensor */
};

typedef struct moqi_calibration {
    const moq_calibrate_desc *desc;
    moqi_arena arena;
    moqi_plan plan;                 /* only to choose and to name */
    moq_quantize_desc rules;
    moqi_record *records;
    size_t count;
    moqi_map map;                   /* layer name -> record */
    moqi_kv_record *kv;
    moq_kv_format kv_format;
    int wants_kv, pass;
    int64_t longest;                /* most tokens that a layer saw in the pass of statistics */
    moq_parallel par;               /* for the searches */
    moqi_pool *pool;
    moq_error failed;               /* the first failure inside of a callback */
} moqi_calibration;

/* ---- records ---- */

static float *moqi_take_zeros(moqi_calibration *c, int64_t n)
{
    float *p = (float *)moqi_take_array(&c->arena, (uint64_t)n, sizeof *p);
    if (!p && c->failed.code == MOQ_OK) moqi_nomem(&c->failed, (uint64_t)n * sizeof *p);
    return p;
}

/* What a record's algorithm keeps. 0 when out of memory. */
static int moqi_record_room(moqi_calibration *c, moqi_record *r)
{
    int64_t n = r->layer.cols, g = r->recipe->scheme.weight.group_cols;
    int awq = (r->passes & MOQI_PASS_SEARCH) != 0, clip = r->algorithm == MOQI_ALG_CLIP || r->algorithm == MOQI_ALG_AWQ_FULL;
    if (awq || r->algorithm == MOQI_ALG_SMOOTH) {
        r->channel_amax = moqi_take_zeros(c, n);
        r->p = moqi_take_zeros(c, n);
        if (!r->channel_amax || !r->p) return 0;
    }
    if (awq) {
        r->batch_sum = moqi_take_zeros(c, n);
        r->act = moqi_take_zeros(c, n);
        r->wsc = moqi_take_zeros(c, n);
        r->best_scale = moqi_take_zeros(c, n);
        if (!r->batch_sum || !r->act || !r->wsc || !r->best_scale) return 0;
    }
    if (clip && r->recipe->scheme.weight.scale != MOQ_F8_E4M3 && g > 0 &&
        !(r->group_loss = moqi_take_zeros(c, MOQI_RATIOS * r->layer.rows * moqi_ceil_div(n, g)))) return 0;
    if (r->algorithm == MOQI_ALG_HEADROOM && !(r->bins = (uint64_t *)moqi_take_array(&c->arena, MOQI_BINS, sizeof *r->bins))) return 0;
    if (r->algorithm == MOQI_ALG_HESSIAN && !(r->hessian = moqi_take_zeros(c, n / 16 * 256))) return 0;
    return 1;
}

/* The algorithm of a recipe, or what it becomes for experts: fused experts are no linears to ModelOpt's smoothing steps. */
static moq_result moqi_set_algorithm(const moqi_calibration *c, moqi_record *r, moq_error *err)
{
    for (size_t i = 0; i < MOQI_COUNT(moqi_algorithms); i++) {
        if (!moqi_starts(r->recipe->calibration, moqi_algorithms[i].word)) continue;
        r->algorithm = moqi_algorithms[i].algorithm;
        r->passes = moqi_algorithms[i].passes;
        if (r->expert && r->algorithm != MOQI_ALG_NONE && r->algorithm != MOQI_ALG_HEADROOM && r->algorithm != MOQI_ALG_HESSIAN &&
            (!c->desc->smooth_experts || r->algorithm == MOQI_ALG_SMOOTH || r->layer.experts > 0)) {
            r->algorithm = MOQI_ALG_MAX;
            r->passes = MOQI_PASS_STATS;
        }
        if (r->algorithm == MOQI_ALG_HESSIAN && (r->layer.cols % 16 != 0 || r->layer.experts > 0)) { r->algorithm = MOQI_ALG_MAX; r->passes = MOQI_PASS_STATS; }
        /* weights alone need no pass */
        if (r->algorithm == MOQI_ALG_MAX && !moqi_has_input_scale(r->recipe)) r->passes = 0;
        return MOQ_OK;
    }
    return moqi_fail(err, MOQ_E_UNSUPPORTED, moqi_at(NULL, "recipe", r->recipe->name, -1), "its calibration '%q' is not known here", r->recipe->calibration);
}

/* Which recipe a module gets, by the caller's choice or by what the recipe covers. */
static moq_result moqi_record_recipe(moqi_calibration *c, const moq_linear *w, const moq_recipe **out, moq_error *err)
{
    moqi_target t;
    if (c->desc->choose) {
        *out = c->desc->choose(c->desc->choose_user, w->name);
        return MOQ_OK;
    }
    memset(&t, 0, sizeof t);
    t.name = w->name;
    t.w = *w;
    moq_result r = moqi_choose_recipe(&c->plan, &t, err);
    *out = t.recipe;
    return r;
}

/* A record for every layer of the source that is quantized; one for all experts of a stack, which have one input quantizer. */
static moq_result moqi_make_records(moqi_calibration *c, moq_error *err)
{
    size_t n = moq_module_count(c->desc->source);
    c->records = (moqi_record *)moqi_take_array(&c->arena, n ? n : 1, sizeof *c->records);
    if (!c->records || !moqi_map_make(&c->map, &c->arena, n)) return moqi_nomem(err, n * sizeof *c->records);
    for (size_t i = 0; i < n; i++) {
        moqi_record *r = &c->records[c->count];
        size_t container;
        uint32_t number;
        const char *part;
        moq_result code = moq_get_module(c->desc->source, i, &r->layer, err);
        if (code >= 0) code = moqi_record_recipe(c, &r->layer, &r->recipe, err);
        if (code < 0) return code;
        if (!r->recipe) continue;
        r->name = r->layer.name;
        r->expert = r->layer.experts > 0 || moqi_expert_name(r->name, &container, &number, &part);
        r->best_alpha = r->best_ratio = -1;
        r->batch.a = c->desc->allocator;
        if ((code = moqi_set_algorithm(c, r, err)) < 0) return code;
        if (r->algorithm == MOQI_ALG_NONE) continue;
        if (!moqi_record_room(c, r)) return moqi_nomem(err, 0);
        moqi_map_add(&c->map, r->name, strlen(r->name), (uint32_t)c->count);
        c->count++;
    }
    return MOQ_OK;
}

/* amax [groups] of a layer's weight, smoothed as it will be stored, and of all of it; amax may be NULL. `whole`: of the layers that share
   it, for a search. */
static moq_result moqi_record_amax(moqi_calibration *c, const moqi_record *r, float whole, float *amax, float *top, moq_error *err)
{
    moqi_target t;
    moq_encode_desc d;
    moqi_arena scratch = moqi_arena_make(&c->desc->allocator);
    float *smooth = r->p ? (float *)moqi_take_array(&scratch, (uint64_t)r->layer.cols, sizeof *smooth) : NULL, own;
    memset(&t, 0, sizeof t);
    t.name = r->name;
    t.w = r->layer;
    t.recipe = r->recipe;
    t.model = moqi_is_float(t.w.scheme.weight.elem) ? t.w.scheme.weight.elem : MOQ_BF16;
    for (int64_t i = 0; smooth && i < t.w.cols; i++) smooth[i] = 1 / r->p[i];
    t.smooth = smooth;
    *top = 0;
    moq_result code = r->p && !smooth ? moqi_nomem(err, (uint64_t)t.w.cols * sizeof *smooth) : MOQ_OK;
    for (int32_t k = 0; k < (t.w.experts > 0 ? t.w.experts : 1) && code >= 0; k++) {
        code = moqi_encode_source(&c->plan, &t, k, &d, err);
        if (code < 0) break;
        d.search = amax && moqi_recipe_searches(r->recipe) ? moqi_recipe_search(r->recipe) : MOQ_SEARCH_MAX;
        d.global_amax = whole;
        code = moq_find_amax(&d, amax, &own, err);
        if (own > *top) *top = own;
    }
    moqi_arena_drop(&scratch);
    return code;
}

/* Weights that are no numbers are refused before the model runs for an hour. */
static moq_result moqi_check_weights(moqi_calibration *c, moq_error *err)
{
    moq_result code = MOQ_OK;
    float top;
    for (size_t i = 0; i < c->count && code >= 0; i++) {
        float *p = c->records[i].p;
        c->records[i].p = NULL; /* not yet known */
        code = moqi_record_amax(c, &c->records[i], 0, NULL, &top, err);
        c->records[i].p = p;
    }
    return code;
}

static moqi_record *moqi_record_of(const moqi_calibration *c, const moq_linear *w)
{
    const moqi_entry *e = w->name ? moqi_map_find(&c->map, w->name, strlen(w->name)) : NULL;
    return e ? &c->records[e->value] : NULL;
}

/* The weight as the model holds it. 0 when out of memory. */
static int moqi_record_weight(const moqi_calibration *c, const moqi_record *r, moqi_matrix *w)
{
    *w = moqi_matrix_make(&c->desc->allocator, r->layer.rows, r->layer.cols);
    for (int64_t i = 0; w->data && i < w->rows; i++) moq_dequantize(&r->layer, i, 1, w->data + i * w->ld);
    return w->data != NULL;
}

/* ---- one token of one layer, by pass ---- */

static void moqi_see_stats(moqi_record *r, const float *x)
{
    int64_t n = r->layer.cols;
    float top = moqi_amax(x, n);
    if (top > r->amax) r->amax = top;
    for (int64_t i = 0; r->channel_amax && i < n; i++)
        if (fabsf(x[i]) > r->channel_amax[i]) r->channel_amax[i] = fabsf(x[i]);
    for (int64_t i = 0; r->batch_sum && i < n; i++) r->batch_sum[i] += fabsf(x[i]);
    if (r->bins) moqi_headroom_add(r->bins, x, n);
}

/* max |bf16(x * bf16(p))|: pre_quant_scale as it is stored. */
static void moqi_see_scaled(moqi_record *r, const float *x)
{
    for (int64_t i = 0; i < r->layer.cols; i++) {
        float v = fabsf(r->p ? moqi_bf16(x[i] * moqi_bf16(r->p[i])) : x[i]);
        if (v > r->amax) r->amax = v;
    }
}

/* x [rows, cols] of layers that share it. Searches keep the batch and work at its end. */
static int moqi_on_input(void *user, const moq_linear *layers, int32_t parts, float *x, int32_t rows)
{
    moqi_calibration *c = (moqi_calibration *)user;
    moqi_record *leader = NULL;
    int64_t cols = layers[0].cols;
    int buffered = 0, changed = 0;
    for (int32_t i = 0; i < parts; i++) {
        moqi_record *r = moqi_record_of(c, &layers[i]);
        if (!r || !(r->passes & c->pass) || (leader && r == moqi_record_of(c, &layers[i - 1]))) continue; /* gate and up of one stack */
        if (!leader) leader = r;
        r->leader = leader;
        r->tokens += rows;
        r->batch_tokens += rows;
        buffered = buffered || c->pass == MOQI_PASS_SEARCH || (c->pass == MOQI_PASS_AGAIN && r->algorithm != MOQI_ALG_SVD);
        for (int64_t t = 0; t < rows; t++) {
            if (c->pass == MOQI_PASS_STATS) moqi_see_stats(r, x + t * cols);
            if (c->pass == MOQI_PASS_AGAIN) moqi_see_scaled(r, x + t * cols);
            if (c->pass == MOQI_PASS_HESSIAN) moqi_hessian_add(r->hessian, x + t * cols, cols);
        }
    }
    if (buffered && !moqi_buffer_add(&leader->batch, x, (size_t)(rows * cols) * sizeof *x) && c->failed.code == MOQ_OK)
        moqi_nomem(&c->failed, (uint64_t)(rows * cols) * sizeof *x);
    for (int64_t t = 0; leader && c->pass == MOQI_PASS_HESSIAN && t < rows; t++, changed = 1)
        moqi_fake_input(&leader->recipe->scheme.input, leader->input_amax, x + t * cols, cols, x + t * cols);
    return changed;
}

/* ---- keys and values ---- */

static moqi_kv_record *moqi_kv_record_of(moqi_calibration *c, const moq_kv_desc *d)
{
    moqi_kv_record *r = c->kv, **last = &c->kv;
    for (; r; last = &r->next, r = r->next)
        if (strcmp(r->name, d->name) == 0) return r;
    r = (moqi_kv_record *)moqi_take(&c->arena, sizeof *r, 16);
    if (!r) return NULL;
    r->name = moqi_take_text(&c->arena, d->name, strlen(d->name));
    r->heads = d->kv_heads;
    r->dim[0] = d->head_dim;
    r->dim[1] = d->value_dim > 0 ? d->value_dim : d->head_dim;
    if (!r->name) return NULL;
    for (int i = 0; i < 2; i++) {
        r->batch[i].a = c->desc->allocator;
        int affine = c->kv_format == MOQ_KV_FP8_AFFINE || c->kv_format == MOQ_KV_NVFP4_AFFINE;
        if (affine && !(r->bias[i] = moqi_take_zeros(c, r->heads * r->dim[i]))) return NULL;
    }
    *last = r;
    return r;
}

/* Keys are rotated first where the recipe does; with a bias the batch is kept, because its mean comes before its amax. */
static void moqi_on_kv(void *user, const moq_kv_desc *cache, const float *k, const float *v, int32_t rows)
{
    moqi_calibration *c = (moqi_calibration *)user;
    moqi_kv_record *r = c->wants_kv && c->pass == MOQI_PASS_STATS ? moqi_kv_record_of(c, cache) : NULL;
    for (int i = 0; r && i < 2; i++) {
        const float *x = i ? v : k;
        int64_t n = r->heads * r->dim[i], block = moqi_rotation_block(r->dim[i]);
        if (r->bias[i]) {
            if (!moqi_buffer_add(&r->batch[i], x, (size_t)(rows * n) * sizeof *x) && c->failed.code == MOQ_OK) moqi_nomem(&c->failed, (uint64_t)(rows * n) * sizeof *x);
            continue;
        }
        if (i == 0 && c->kv_format == MOQ_KV_NVFP4_ROTATE) {
            float *turned = (float *)moq_allocate(&c->desc->allocator, (size_t)n * sizeof *turned);
            for (int64_t t = 0; turned && t < rows; t++) {
                memcpy(turned, x + t * n, (size_t)n * sizeof *turned);
                moqi_rotate_blocks(turned, n, block);
                float top = moqi_amax(turned, n);
                if (top > r->amax[i]) r->amax[i] = top;
            }
            if (!turned && c->failed.code == MOQ_OK) moqi_nomem(&c->failed, (uint64_t)n * sizeof *turned);
            moq_release(&c->desc->allocator, turned, (size_t)n * sizeof *turned);
            continue;
        }
        float top = moqi_bf16(moqi_amax(x, rows * n));
        if (top > r->amax[i]) r->amax[i] = top;
    }
}

/* The running mean takes this batch in first; then amax of bf16(x - bias). */
static void moqi_kv_end_batch(moqi_calibration *c, moqi_kv_record *r)
{
    int seen = 0;
    for (int i = 0; i < 2; i++) {
        int64_t n = r->heads * r->dim[i], tokens = n > 0 ? (int64_t)(r->batch[i].bytes / sizeof(float)) / n : 0;
        float *x = (float *)(void *)r->batch[i].data, *mean = tokens > 0 ? (float *)moq_allocate(&c->desc->allocator, (size_t)n * sizeof *mean) : NULL;
        if (!mean) continue;
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t j = 0; j < n; j++) mean[j] += x[t * n + j];
        for (int64_t j = 0; j < n; j++) mean[j] /= (float)tokens;
        moqi_bias_add(r->bias[i], mean, n, r->batches);
        for (int64_t j = 0; j < tokens * n; j++) {
            float v = fabsf(moqi_bf16(x[j] - r->bias[i][j % n]));
            if (v > r->amax[i]) r->amax[i] = v;
        }
        moq_release(&c->desc->allocator, mean, (size_t)n * sizeof *mean);
        r->batch[i].bytes = 0;
        seen = 1;
    }
    r->batches += seen;
}

/* ---- the end of a batch ---- */

/* Is the search made from X^T X? Beyond a few thousand tokens its sums are as good a judge, and the work no longer grows with them. */
static int moqi_uses_gram(const moqi_calibration *c)
{
    moq_judge judge = c->desc->judge;
    return c->pass == MOQI_PASS_SEARCH && (judge == MOQ_JUDGE_GRAM || (judge == MOQ_JUDGE_AUTO && c->longest > 4096));
}

/* gram += X^T X / tokens of the leader's batch. */
static void moqi_gram_batch(moqi_calibration *c, moqi_record *r)
{
    const moq_allocator *a = &c->desc->allocator;
    int64_t n = r->layer.cols, tokens = (int64_t)(r->batch.bytes / sizeof(float)) / n;
    const float *x = (const float *)(const void *)r->batch.data;
    if (tokens == 0) return;
    if (!r->gram.data) r->gram = moqi_matrix_make(a, n, n);
    moqi_matrix xt = moqi_matrix_make(a, n, tokens), h = moqi_matrix_make(a, n, n);
    if (r->gram.data && xt.data && h.data) {
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t j = 0; j < n; j++) xt.data[j * xt.ld + t] = x[t * n + j];
        moqi_gram(&c->par, &xt, &h);
        for (int64_t i = 0; i < n * h.ld; i++) r->gram.data[i] += h.data[i] / (float)tokens;
    } else if (c->failed.code == MOQ_OK) {
        moqi_nomem(&c->failed, (uint64_t)(n * n) * 8);
    }
    moqi_matrix_drop(a, &xt);
    moqi_matrix_drop(a, &h);
}

/* Losses of one layer from its leader's sums. */
static moq_result moqi_search_gram(moqi_calibration *c, moqi_record *r, moq_error *err)
{
    moqi_bench b;
    if (r->tokens == 0 || !r->leader->gram.data) return MOQ_OK;
    if (!moqi_bench_make(&c->desc->allocator, &b, r->layer.rows, r->layer.cols, r->layer.rows, &c->par))
        return moqi_nomem(err, (uint64_t)(r->layer.rows * r->layer.cols) * 16);
    for (int64_t i = 0; i < b.w.rows; i++) moq_dequantize(&r->layer, i, 1, b.w.data + i * b.w.ld);
    moqi_awq_gram_losses(&b, &r->recipe->scheme.weight, r->act, r->wsc, &r->leader->gram, r->alpha_loss);
    moqi_bench_drop(&c->desc->allocator, &b);
    return MOQ_OK;
}

/* Losses of one layer on the batch that its leader kept. */
static void moqi_search_batch(moqi_calibration *c, moqi_record *r)
{
    int64_t tokens = r->leader ? (int64_t)(r->leader->batch.bytes / sizeof(float)) / r->layer.cols : 0;
    const float *x = tokens > 0 ? (const float *)(const void *)r->leader->batch.data : NULL;
    const moq_coding *coding = &r->recipe->scheme.weight;
    moqi_bench b;
    if (!x || (c->pass == MOQI_PASS_AGAIN && r->algorithm == MOQI_ALG_SVD)) return;
    if (!moqi_bench_make(&c->desc->allocator, &b, r->layer.rows, r->layer.cols, tokens, &c->par)) {
        if (c->failed.code == MOQ_OK) moqi_nomem(&c->failed, (uint64_t)(r->layer.rows * r->layer.cols) * 12);
        return;
    }
    for (int64_t i = 0; i < b.w.rows; i++) moq_dequantize(&r->layer, i, 1, b.w.data + i * b.w.ld);
    if (c->pass == MOQI_PASS_SEARCH) {
        moqi_awq_losses(&b, coding, r->act, r->wsc, x, r->alpha_loss);
    } else {
        for (int64_t i = 0; r->p && i < b.w.cols; i++) b.s[i] = 1 / r->p[i];
        if (r->p) moqi_scale_cols(&b.w, b.s, 0, &b.w);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t i = 0; i < b.x.cols; i++)
                b.x.data[t * b.x.ld + i] = r->p ? moqi_bf16(x[t * b.x.cols + i] * moqi_bf16(r->p[i])) : x[t * b.x.cols + i];
        if (r->group_loss) moqi_clip_group_losses(&b, coding, r->group_loss);
        else moqi_clip_losses(&b, coding, r->clip_loss);
    }
    moqi_bench_drop(&c->desc->allocator, &b);
}

/* Averages are over batches, each with the same weight. */
static void moqi_on_batch(void *user)
{
    moqi_calibration *c = (moqi_calibration *)user;
    for (size_t i = 0; i < c->count; i++) {
        moqi_record *r = &c->records[i];
        if (r->batch_tokens == 0) continue;
        if (c->pass == MOQI_PASS_STATS && r->act) {
            for (int64_t j = 0; j < r->layer.cols; j++) {
                r->act[j] += moqi_bf16(r->batch_sum[j] / (float)r->batch_tokens);
                r->batch_sum[j] = 0;
            }
        }
        if (moqi_uses_gram(c)) { if (r->leader == r) moqi_gram_batch(c, r); }
        else if (c->pass == MOQI_PASS_SEARCH || c->pass == MOQI_PASS_AGAIN) moqi_search_batch(c, r);
        r->batches++;
    }
    for (size_t i = 0; i < c->count; i++) {
        c->records[i].batch.bytes = 0;
        c->records[i].batch_tokens = 0;
    }
    for (moqi_kv_record *r = c->kv; r; r = r->next)
        if (c->pass == MOQI_PASS_STATS && r->bias[0]) moqi_kv_end_batch(c, r);
}

/* ---- the end of a pass ---- */

/* Every channel's statistics are numbers, so a search can be made. */
static int moqi_all_finite(const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (!moqi_is_finite(x[i])) return 0;
    return 1;
}

static moq_result moqi_end_stats(const moqi_calibration *c, moqi_record *r, moq_error *err)
{
    moqi_matrix w;
    r->input_amax = r->bins ? moqi_headroom_amax(r->bins, r->amax) : moqi_bf16(r->amax);
    if (!r->channel_amax) return MOQ_OK;
    if (!moqi_record_weight(c, r, &w)) return moqi_nomem(err, (uint64_t)(w.rows * w.cols) * 4);
    if (r->algorithm == MOQI_ALG_SMOOTH) {
        moqi_matrix columns = moqi_matrix_make(&c->desc->allocator, 1, w.cols);
        if (columns.data) {
            moqi_col_amax(&w, columns.data);
            moqi_smooth_scale(r->channel_amax, columns.data, w.cols, 1, r->p);
            r->input_amax = moqi_scaled_amax(r->channel_amax, r->p, w.cols);
        }
        moqi_matrix_drop(&c->desc->allocator, &w);
        if (!columns.data) return moqi_nomem(err, (uint64_t)w.cols * 4);
        moqi_matrix_drop(&c->desc->allocator, &columns);
        return MOQ_OK;
    }
    moqi_awq_weight_scale(&w, r->recipe->scheme.weight.group_cols, r->wsc);
    moqi_matrix_drop(&c->desc->allocator, &w);
    for (int64_t i = 0; r->batches > 0 && i < r->layer.cols; i++) r->act[i] /= (float)r->batches;
    /* a layer that saw no tokens, or broken numbers: p = 1 and no search */
    if (r->batches == 0 || !moqi_all_finite(r->act, r->layer.cols) || !moqi_all_finite(r->wsc, r->layer.cols)) {
        for (int64_t i = 0; i < r->layer.cols; i++) r->best_scale[i] = r->p[i] = 1;
        r->passes &= ~MOQI_PASS_SEARCH;
    }
    return MOQ_OK;
}

static void moqi_end_search(moqi_record *r)
{
    if (r->tokens == 0) return;
    r->best_alpha = moqi_first_min(r->alpha_loss, MOQI_ALPHAS);
    moqi_awq_scale(r->act, r->wsc, r->layer.cols, moqi_alpha(r->best_alpha), r->best_scale);
    for (int64_t i = 0; i < r->layer.cols; i++) r->p[i] = 1 / r->best_scale[i];
    r->input_amax = moqi_scaled_amax(r->channel_amax, r->p, r->layer.cols);
}

/* The clipped amax, of the tensor or of every group. */
static moq_result moqi_end_clip(moqi_calibration *c, moqi_record *r, moq_error *err)
{
    moqi_matrix w;
    int64_t g = r->recipe->scheme.weight.group_cols, groups = r->group_loss ? moqi_ceil_div(r->layer.cols, g) : 1, n = r->group_loss ? r->layer.rows * groups : 1;
    r->input_amax = moqi_bf16(r->amax);
    if (r->algorithm == MOQI_ALG_SVD || r->tokens == 0) return MOQ_OK;
    if (!(r->weight_amax = moqi_take_zeros(c, n)) || !moqi_record_weight(c, r, &w)) return moqi_nomem(err, (uint64_t)n * 4);
    for (int64_t i = 0; r->p && i < w.rows; i++)
        for (int64_t j = 0; j < w.cols; j++) w.data[i * w.ld + j] = moqi_bf16(w.data[i * w.ld + j] * (1 / r->p[j]));
    r->weight_amax_count = (uint64_t)n;
    r->best_ratio = moqi_first_min(r->clip_loss, MOQI_RATIOS);
    if (!r->group_loss) r->weight_amax[0] = moqi_bf16(moqi_block_amax(&w, 0, w.rows, 0, w.cols) * moqi_ratio(r->best_ratio));
    for (int64_t i = 0; r->group_loss && i < n; i++) {
        int best = 0;
        for (int k = 1; k < MOQI_RATIOS; k++)
            if (r->group_loss[k * n + i] < r->group_loss[best * n + i]) best = k;
        int64_t first = i % groups * g;
        r->weight_amax[i] = moqi_bf16(moqi_amax(w.data + i / groups * w.ld + first, moqi_min(g, w.cols - first)) * moqi_ratio(best));
    }
    moqi_matrix_drop(&c->desc->allocator, &w);
    return MOQ_OK;
}

/* First the global amax of the layers that share an input, then every block. A layer that saw no tokens is left to the encoder. */
static moq_result moqi_end_hessian(moqi_calibration *c, moqi_record *r, moq_error *err)
{
    moqi_matrix w;
    int64_t blocks = r->layer.cols / 16;
    if (r->tokens == 0) return MOQ_OK;
    if (!(r->global_amax > 0)) { /* once for the group */
        float top = 0;
        for (size_t i = 0; i < c->count; i++) {
            if (c->records[i].leader != r->leader) continue;
            if (!moqi_record_weight(c, &c->records[i], &w)) return moqi_nomem(err, (uint64_t)(w.rows * w.cols) * 4);
            float v = moqi_block_amax(&w, 0, w.rows, 0, w.cols);
            if (v > top) top = v;
            moqi_matrix_drop(&c->desc->allocator, &w);
        }
        for (size_t i = 0; i < c->count; i++)
            if (c->records[i].leader == r->leader) c->records[i].global_amax = top;
    }
    r->weight_amax_count = (uint64_t)(r->layer.rows * blocks);
    if (!(r->weight_amax = moqi_take_zeros(c, r->layer.rows * blocks)) || !moqi_record_weight(c, r, &w)) return moqi_nomem(err, r->weight_amax_count * 4);
    for (int64_t i = 0; i < blocks * 256; i++) r->hessian[i] /= (float)r->tokens;
    for (int64_t i = 0; i < w.rows; i++)
        for (int64_t b = 0; b < blocks; b++)
            r->weight_amax[i * blocks + b] = moqi_hessian_block(r->hessian + b * 256, w.data + i * w.ld + b * 16, r->global_amax);
    moqi_matrix_drop(&c->desc->allocator, &w);
    return MOQ_OK;
}

/* One forward pass of all samples, and what follows from it. */
static moq_result moqi_make_pass(moqi_calibration *c, moq_backend *watch, int pass, moq_error *err)
{
    moq_result code = MOQ_OK;
    c->pass = pass;
    for (size_t i = 0; i < c->count; i++) {
        moqi_record *r = &c->records[i];
        r->amax = 0;
        r->tokens = r->batch_tokens = r->batches = 0;
        r->leader = NULL;
    }
    moqi_clear(err);
    code = c->desc->forward(c->desc->data, c->desc->source, watch, err);
    if (code < 0) return code;
    moqi_on_batch(c);
    if (c->failed.code < 0) {
        if (err) *err = c->failed;
        return c->failed.code;
    }
    for (size_t i = 0; i < c->count && code >= 0; i++) {
        moqi_record *r = &c->records[i];
        if (!(r->passes & pass)) continue;
        if (pass == MOQI_PASS_STATS) code = moqi_end_stats(c, r, err);
        if (pass == MOQI_PASS_STATS && r->tokens > c->longest) c->longest = r->tokens;
        if (moqi_uses_gram(c)) code = moqi_search_gram(c, r, err);
        if (pass == MOQI_PASS_SEARCH && code >= 0) moqi_end_search(r);
        if (pass == MOQI_PASS_AGAIN) code = moqi_end_clip(c, r, err);
        if (pass == MOQI_PASS_HESSIAN) code = moqi_end_hessian(c, r, err);
    }
    for (size_t i = 0; i < c->count; i++)
        if (c->records[i].gram.data) moqi_matrix_drop(&c->desc->allocator, &c->records[i].gram);
    return code;
}

/* ------------------------------------------------------------------------------------------------
   >>statistics      what passes found, under ModelOpt's names; moq_calibrate
   Names and shapes are those that ModelOpt's model has in memory before its export, so either side's files can be read.
   ------------------------------------------------------------------------------------------------ */

/* Append one tensor; data is copied. rank 0: a scalar. */
static int moqi_stat_add(moq_stats *s, const char *module, const char *tail, const float *data, uint64_t count, uint32_t rank, const uint64_t *shape)
{
    char name[MOQ_MAX_NAME_BYTES + 64];
    moq_tensor t;
    memset(&t, 0, sizeof t);
    size_t n = moqi_format(name, sizeof name, "%s%s", module, tail);
    float *copy = (float *)moqi_take_array(&s->arena, count, sizeof *copy);
    t.name = n < sizeof name ? moqi_take_text(&s->arena, name, n) : NULL;
    if (!copy || !t.name) return 0;
    memcpy(copy, data, (size_t)count * sizeof *copy);
    t.name_bytes = (uint32_t)n;
    t.data = copy;
    t.bytes = count * sizeof *copy;
    t.dtype = MOQ_F32;
    t.rank = rank;
    for (uint32_t i = 0; i < rank; i++) t.shape[i] = shape[i];
    return moqi_buffer_add(&s->list, &t, sizeof t);
}

/* The largest input of all experts of a container that share a projection: ModelOpt's fused experts have one input quantizer for each. */
static int moqi_stat_container(const moqi_calibration *c, moq_stats *s, const moqi_record *first)
{
    char memory[MOQ_MAX_NAME_BYTES + 64], tail[64];
    size_t container, other;
    uint32_t number;
    const char *part, *leaf;
    float top = 0;
    moqi_expert_name(first->name, &container, &number, &part);
    int down = strcmp(part, "down_proj") == 0 || strcmp(part, "w2") == 0, gated = 0;
    for (size_t i = 0; i < c->count; i++) {
        const moqi_record *r = &c->records[i];
        if (!r->expert || strncmp(r->name, first->name, container) != 0 || !moqi_expert_name(r->name, &other, &number, &leaf) || other != container) continue;
        gated = gated || strcmp(leaf, "gate_proj") == 0 || strcmp(leaf, "w1") == 0;
        if ((strcmp(leaf, "down_proj") == 0 || strcmp(leaf, "w2") == 0) != down) continue;
        if (r < first) return 1; /* done with the first of them */
        if (r->input_amax > top) top = r->input_amax;
    }
    if (!(top > 0)) return 1;
    moqi_memory_name(&c->plan, first->name, memory, sizeof memory);
    moqi_expert_name(memory, &container, &number, &part);
    memory[container] = 0;
    moqi_format(tail, sizeof tail, ".%s_input_quantizer.amax", down ? "down_proj" : gated ? "gate_up_proj" : "up_proj");
    return moqi_stat_add(s, memory, tail, &top, 1, 0, NULL);
}

/* Everything that the inputs of one layer gave. An expert that was smoothed has results of its own; else its container speaks for it. */
static int moqi_stat_inputs(const moqi_calibration *c, moq_stats *s, const moqi_record *r)
{
    char memory[MOQ_MAX_NAME_BYTES + 64];
    uint64_t n = (uint64_t)r->layer.cols;
    int ok = 1, inputs = moqi_has_input_scale(r->recipe);
    moqi_memory_name(&c->plan, r->name, memory, sizeof memory);
    if (r->layer.experts > 0) return !inputs || !(r->input_amax > 0) || moqi_stat_add(s, memory, "_input_quantizer.amax", &r->input_amax, 1, 0, NULL);
    if (r->expert && !r->p && r->algorithm != MOQI_ALG_HESSIAN && r->algorithm != MOQI_ALG_CLIP) return inputs ? moqi_stat_container(c, s, r) : 1;
    if (inputs && r->input_amax > 0) ok = moqi_stat_add(s, memory, ".input_quantizer.amax", &r->input_amax, 1, 0, NULL);
    if (ok && r->p && (inputs || !r->best_scale)) { /* wide inputs have no quantizer that could hold it */
        float *rounded = (float *)moqi_take_array(&s->arena, n, sizeof *rounded);
        for (uint64_t i = 0; rounded && i < n; i++) rounded[i] = moqi_bf16(r->p[i]);
        ok = rounded && moqi_stat_add(s, memory, ".input_quantizer.pre_quant_scale", rounded, n, 1, &n);
    }
    if (ok && r->best_scale) {
        ok = moqi_stat_add(s, memory, ".awq_lite.act_scale", r->act, n, 1, &n) && moqi_stat_add(s, memory, ".awq_lite.weight_scale", r->wsc, n, 1, &n) &&
             moqi_stat_add(s, memory, ".awq_lite.best_scale", r->best_scale, n, 1, &n);
    }
    return ok;
}

/* ---- weights: what ModelOpt's weight quantizers hold ---- */

/* Layers below one parent whose input is the same tensor have one global amax in a search. */
static int moqi_same_input(const moqi_record *a, const moqi_record *b)
{
    const char *x = moqi_last_part(a->name), *y = moqi_last_part(b->name);
    if (a == b) return 1;
    if (x - a->name != y - b->name || strncmp(a->name, b->name, (size_t)(x - a->name)) != 0 || a->recipe != b->recipe) return 0;
    for (size_t k = 0; k < MOQI_COUNT(moqi_shared); k++) {
        int found = 0;
        for (size_t j = 0; j < 6 && moqi_shared[k][j]; j++) found |= (strcmp(x, moqi_shared[k][j]) == 0) | (strcmp(y, moqi_shared[k][j]) == 0) << 1;
        if (found == 3) return 1;
    }
    return 0;
}

/* Groups of a weight, as ModelOpt views them: one a row or block of columns with a last dimension of 1; blocks of both are four-dimensional. */
static uint32_t moqi_amax_shape(const moqi_record *r, uint64_t shape[4])
{
    const moq_coding *w = &r->recipe->scheme.weight;
    int searched = moqi_recipe_searches(r->recipe);
    uint64_t rows = (uint64_t)r->layer.rows, cols = (uint64_t)r->layer.cols, g = w->group_cols > 0 ? (uint64_t)w->group_cols : cols;
    shape[0] = shape[1] = shape[2] = shape[3] = 1;
    if ((w->scale == MOQ_F8_E4M3 && !searched) || w->group_rows == MOQ_ALL || r->layer.experts > 0) return 0;
    if (w->group_rows == 128) {
        shape[0] = (rows + 127) / 128;
        shape[2] = (cols + 127) / 128;
        return shape[0] * shape[2] == 1 ? 0 : 4;
    }
    shape[0] = rows * ((cols + g - 1) / g);
    return 2;
}

/* "....experts.gate_up_proj_weight_quantizers.3", or the module itself and ".weight_quantizer". Returns -1 for the second half of a pair,
   1 for a pair that begins here. */
static int moqi_weight_quantizer(const moqi_calibration *c, const moqi_record *r, const moqi_record **up, char *text, size_t capacity)
{
    char memory[MOQ_MAX_NAME_BYTES + 64];
    size_t container, n;
    uint32_t number;
    const char *part;
    const moqi_entry *e;
    *up = NULL;
    moqi_memory_name(&c->plan, r->name, memory, sizeof memory);
    moqi_format(text, capacity, "%s%sweight_quantizer", memory, r->layer.experts > 0 ? "_" : ".");
    if (r->layer.experts > 0 || r->p || !moqi_expert_name(memory, &container, &number, &part)) return 0;
    int second = strcmp(part, "up_proj") == 0 || strcmp(part, "w3") == 0, down = strcmp(part, "down_proj") == 0 || strcmp(part, "w2") == 0;
    n = moqi_format(text, capacity, "%.*s%s", (int)(moqi_last_part(r->name) - r->name), r->name, second ? "gate_proj" : "up_proj");
    if (!(e = moqi_map_find(&c->map, text, n))) {
        n = moqi_format(text, capacity, "%.*s%s", (int)(moqi_last_part(r->name) - r->name), r->name, second ? "w1" : "w3");
        e = moqi_map_find(&c->map, text, n);
    }
    if (second && e) return -1;
    if (!down && e) *up = &c->records[e->value];
    moqi_format(text, capacity, "%.*s.%s_weight_quantizers.%u", (int)container, memory, down ? "down_proj" : e ? "gate_up_proj" : "up_proj", number);
    return *up != NULL;
}

/* amax of a weight quantizer; gate and up of an expert are one, gate first. W4A8 has two: blocks, then the whole. */
static moq_result moqi_stat_weight(moqi_calibration *c, moq_stats *s, const moqi_record *r, moq_error *err)
{
    char name[MOQ_MAX_NAME_BYTES + 160];
    const moqi_record *halves[2];
    const moq_coding *w = &r->recipe->scheme.weight;
    uint64_t shape[4];
    uint32_t rank = moqi_amax_shape(r, shape);
    int pair = moqi_weight_quantizer(c, r, &halves[1], name, sizeof name), two = w->scale == MOQ_F32 && w->has_global, searched = moqi_recipe_searches(r->recipe);
    uint64_t n = shape[0] * shape[2];
    float top = 0, one = 0;
    if (pair < 0 || w->scale == MOQ_F8_E8M0) return MOQ_OK;
    halves[0] = r;
    float *amax = (float *)moqi_take_array(&s->arena, 2 * n, sizeof *amax);
    if (!amax) return moqi_nomem(err, 2 * n * sizeof *amax);
    for (size_t i = 0; searched && i < c->count; i++) {
        if (!moqi_same_input(r, &c->records[i])) continue;
        moq_result code = moqi_record_amax(c, &c->records[i], 0, NULL, &one, err);
        if (code < 0) return code;
        if (one > top) top = one;
    }
    float whole = r->global_amax > 0 ? r->global_amax : top;
    for (int i = 0; i <= pair; i++) {
        moq_result code = r->weight_amax ? MOQ_OK : moqi_record_amax(c, halves[i], whole, rank ? amax + (uint64_t)i * n : NULL, &one, err);
        if (code < 0) return code;
        if (r->weight_amax) memcpy(amax, r->weight_amax, (size_t)n * sizeof *amax);
        if (one > top) top = one;
    }
    if (pair && rank) shape[0] *= 2;
    if (rank == 0 && !r->weight_amax) amax[0] = top;
    if (!moqi_stat_add(s, name, two ? ".0.amax" : ".amax", amax, rank ? n * (pair ? 2 : 1) : 1, rank, shape) ||
        (two && !moqi_stat_add(s, name, ".1.amax", &top, 1, 0, NULL)) || (searched && !moqi_stat_add(s, name, ".global_amax", &whole, 1, 0, NULL)))
        return moqi_nomem(err, n * sizeof *amax);
    return MOQ_OK;
}

static int moqi_stat_kv(moq_stats *s, const moqi_kv_record *r)
{
    static const char *const amax[2] = {".k_bmm_quantizer.amax", ".v_bmm_quantizer.amax"};
    static const char *const bias[2] = {".k_bmm_quantizer.bias_value", ".v_bmm_quantizer.bias_value"};
    for (int i = 0; i < 2; i++) {
        uint64_t shape[4];
        shape[0] = shape[2] = 1;
        shape[1] = (uint64_t)r->heads;
        shape[3] = (uint64_t)r->dim[i];
        if (!moqi_stat_add(s, r->name, amax[i], &r->amax[i], 1, 0, NULL)) return 0;
        if (r->bias[i] && !moqi_stat_add(s, r->name, bias[i], r->bias[i], shape[1] * shape[3], 4, shape)) return 0;
    }
    return 1;
}

static moq_stats *moqi_make_stats(moqi_calibration *c, moq_error *err)
{
    moq_stats *s = (moq_stats *)moq_allocate(&c->desc->allocator, sizeof *s);
    int ok = s != NULL;
    moq_result code = MOQ_OK;
    if (s) {
        s->a = c->desc->allocator;
        s->arena = moqi_arena_make(&s->a);
        s->list.a = s->a;
    }
    for (size_t i = 0; ok && code >= 0 && i < c->count; i++) {
        ok = moqi_stat_inputs(c, s, &c->records[i]);
        if (ok) code = moqi_stat_weight(c, s, &c->records[i], err);
    }
    for (const moqi_kv_record *r = c->kv; ok && r; r = r->next) ok = moqi_stat_kv(s, r);
    if (ok && code >= 0) return s;
    moq_stats_destroy(s);
    if (!ok) moqi_nomem(err, 0);
    return NULL;
}

/* ---- the run ---- */

static void moqi_calibration_drop(moqi_calibration *c)
{
    for (size_t i = 0; i < c->count; i++) {
        moqi_buffer_drop(&c->records[i].batch);
        if (c->records[i].gram.data) moqi_matrix_drop(&c->desc->allocator, &c->records[i].gram);
    }
    for (moqi_kv_record *r = c->kv; r; r = r->next)
        for (int i = 0; i < 2; i++) moqi_buffer_drop(&r->batch[i]);
    moqi_arena_drop(&c->arena);
}

/* All passes that some record needs, on a backend that shows them. */
static moq_result moqi_run_passes(moqi_calibration *c, moq_backend *inner, moq_error *err)
{
    moq_observer o;
    moq_result code = MOQ_OK;
    int all = c->wants_kv ? MOQI_PASS_STATS : 0;
    uint64_t done = 0, total = 0;
    const moq_calibrate_desc *d = c->desc;
    memset(&o, 0, sizeof o);
    o.user = c;
    o.input = moqi_on_input;
    o.kv = moqi_on_kv;
    o.end_batch = moqi_on_batch;
    o.bf16 = !d->f32;
    for (size_t i = 0; i < c->count; i++) all |= c->records[i].passes;
    for (int pass = 1; pass <= MOQI_PASS_HESSIAN; pass *= 2) total += (all & pass) != 0;
    moq_backend *watch = moq_observing_backend(inner, &o, &d->allocator, err);
    if (!watch) return err && err->code < 0 ? err->code : MOQ_E_NOMEM;
    for (int pass = 1; pass <= MOQI_PASS_HESSIAN && code >= 0; pass *= 2) {
        if (!(all & pass)) continue;
        if (d->progress && d->progress(d->progress_user, MOQ_STAGE_CALIBRATE, done, total))
            code = moqi_fail(err, MOQ_E_CANCELLED, moqi_at(NULL, NULL, NULL, -1), "stopped by the caller");
        if (code >= 0) code = moqi_make_pass(c, watch, pass, err);
        done++;
    }
    if (code >= 0 && d->progress) d->progress(d->progress_user, MOQ_STAGE_CALIBRATE, total, total);
    moq_backend_destroy(watch);
    return code;
}

static moq_result moqi_check_calibrate(moqi_calibration *c, moq_error *err)
{
    const moq_calibrate_desc *d = c->desc;
    moqi_where at = moqi_at(NULL, NULL, "moq_calibrate", -1);
    if (!d->source || !d->forward) return moqi_fail(err, MOQ_E_ARG, at, "a source and a forward pass are needed");
    if (!d->recipe && !d->choose) return moqi_fail(err, MOQ_E_ARG, at, "a recipe is needed; `moq recipes` lists them");
    c->plan.ck = d->source;
    c->plan.desc = &c->rules;
    c->rules.allocator = d->allocator;
    c->plan.nemotron = strcmp(moq_get_info(d->source)->model_type, "nemotron_h") == 0;
    c->plan.recipe = d->recipe ? moq_find_recipe(d->recipe) : NULL;
    if (d->recipe && !c->plan.recipe && !moqi_same(d->recipe, "none")) return moqi_fail(err, MOQ_E_ARG, at, "no recipe '%q'; `moq recipes` lists them", d->recipe);
    int cast = d->kv && moqi_ends(d->kv, "_cast");
    if (d->kv && !moq_kv_format_find(d->kv, &c->kv_format)) return moqi_fail(err, MOQ_E_ARG, at, "'%q' is no KV cache format; try fp8", d->kv);
    c->wants_kv = c->kv_format != MOQ_KV_WIDE && c->kv_format != MOQ_KV_MXFP4 && !cast;
    return MOQ_OK;
}

MOQ_API moq_stats *moq_calibrate(const moq_calibrate_desc *desc, moq_error *err)
{
    moqi_calibration c;
    moq_backend *own = NULL;
    moq_stats *s = NULL;
    moqi_clear(err);
    memset(&c, 0, sizeof c);
    if (!desc) { moq_fail(err, MOQ_E_ARG, "moq_calibrate", "desc is NULL"); return NULL; }
    c.desc = desc;
    c.arena = moqi_arena_make(&desc->allocator);
    moqi_clear(&c.failed);
    moq_result code = moqi_check_calibrate(&c, err);
    if (code >= 0) code = moqi_make_records(&c, err);
    if (code >= 0 && !desc->backend) {
        moq_cpu_desc cpu;
        memset(&cpu, 0, sizeof cpu);
        cpu.threads = desc->threads;
        cpu.act = MOQ_ACT_WIDE;
        cpu.allocator = desc->allocator;
        own = moq_cpu_backend(&cpu, err);
        if (!own) code = MOQ_E_BACKEND;
    }
    if (code >= 0) {
        c.par.workers = desc->threads > 0 ? desc->threads : moq_cpu_count();
        c.pool = c.par.workers > 1 ? moqi_pool_create(c.par.workers, &desc->allocator, err) : NULL;
        c.par.run = c.pool ? moqi_pool_run : NULL;
        c.par.user = c.pool;
        if (c.par.workers > 1 && !c.pool) code = MOQ_E_NOMEM;
    }
    c.plan.parallel = c.par;
    if (code >= 0) code = moqi_check_weights(&c, err);
    if (code >= 0) code = moqi_run_passes(&c, own ? own : desc->backend, err);
    if (code >= 0) s = moqi_make_stats(&c, err);
    moq_backend_destroy(own);
    moq_release(&desc->allocator, c.plan.work, (size_t)c.plan.work_bytes);
    if (c.pool) moqi_pool_destroy(c.pool);
    moqi_calibration_drop(&c);
    return s;
}

MOQ_API void moq_stats_destroy(moq_stats *s)
{
    if (!s) return;
    moq_allocator a = s->a;
    moqi_buffer_drop(&s->list);
    moqi_arena_drop(&s->arena);
    moq_release(&a, s, sizeof *s);
}

MOQ_API size_t moq_stats_count(const moq_stats *s) { return s ? s->list.bytes / sizeof(moq_tensor) : 0; }

MOQ_API const moq_tensor *moq_get_stat(const moq_stats *s, size_t index)
{
    return index < moq_stats_count(s) ? (const moq_tensor *)(const void *)s->list.data + index : NULL;
}

MOQ_API const moq_tensor *moq_find_stat(const moq_stats *s, const char *name)
{
    for (size_t i = 0; name && i < moq_stats_count(s); i++)
        if (strcmp(moq_get_stat(s, i)->name, name) == 0) return moq_get_stat(s, i);
    return NULL;
}

MOQ_API moq_result moq_stats_save(const moq_stats *s, const char *path, moq_error *err)
{
    if (!s) return moq_fail(err, MOQ_E_ARG, "moq_stats_save", "stats is NULL");
    return moq_st_write(path, (const moq_tensor *)(const void *)s->list.data, moq_stats_count(s), NULL, 0, &s->a, err);
}

/* ------------------------------------------------------------------------------------------------
   >>container       a layer as the tensors of a ModelOpt or a compressed-tensors folder
   Pure: the same codes and scales under other names and packings. What a container cannot hold is refused by name.
   ------------------------------------------------------------------------------------------------ */

/* Where the two differ for the same numbers:
       NVFP4      weight, weight_scale_2, input_scale (0-d, multipliers)     weight_packed, weight_global_scale, input_global_scale ([1], divisors)
       MXFP4      weight                                                     weight_packed
       INT4       weight, pairs of rows in a byte, two's complement          weight_packed, a stream of 32-bit words along the columns, plus 8
       FP8        weight_scale [], [rows], [.., 1, .., 1]                    [1], [rows, 1], [.., ..]
       scales     F32                                                        the model's type where it holds them exactly, else F32
       KV cache   A.k_proj.k_scale                                           A.k_scale */
enum { MOQI_MODELOPT = 0, MOQI_COMPRESSED };

/* Tensors of a layer. The first four are as large as the weight or a part of it and are made when their turn comes. */
enum { MOQI_PIECE_CODES = 0, MOQI_PIECE_SCALES, MOQI_PIECE_ZEROS, MOQI_PIECE_ORDER, MOQI_PIECE_GLOBAL, MOQI_PIECE_INPUT, MOQI_PIECE_INPUT_ZERO, MOQI_PIECE_SHAPE };

typedef struct moqi_piece {
    int what;             /* MOQI_PIECE_... */
    const char *ending;   /* of the tensor's name */
    moq_dtype dtype;
    uint32_t rank;
    uint64_t shape[4];
    float value;          /* GLOBAL, INPUT, INPUT_ZERO */
} moqi_piece;

enum { MOQI_MAX_PIECES = 8 };

/* How one layer is written. */
typedef struct moqi_form {
    int container;
    int format;           /* compressed-tensors: MOQI_CT_... */
    const char *algo;     /* ModelOpt: quant_algo */
    moq_scheme scheme;    /* as readers of the container will find it */
    moq_dtype scale;      /* of float scales */
    int zeros;            /* zero points that are not all the middle */
    int raw;              /* the source is such a folder: its tensors are copied */
    int stack;            /* experts in one tensor */
} moqi_form;

static const char *const moqi_container_names[2] = {"a ModelOpt folder", "a compressed-tensors folder"};

/* ---- small parts ---- */

static int moqi_coding_is(const moq_coding *c, moq_dtype elem, int32_t rows, int32_t cols)
{
    return c->elem == elem && c->group_rows == rows && c->group_cols == cols;
}

/* Integers of every tool as two's complement around a zero point: unsigned codes lose their offset. */
static int32_t moqi_code_offset(const moq_linear *w) { return w->packing.is_unsigned ? 1 << (moq_dtype_bits(w->scheme.weight.elem) - 1) : 0; }

static int64_t moqi_group_count(const moq_linear *w)
{
    int64_t g = w->scheme.weight.group_cols;
    return g > 0 ? moqi_ceil_div(w->cols, g) : 1;
}

static int64_t moqi_band_count(const moq_linear *w)
{
    int64_t g = w->scheme.weight.group_rows;
    return g > 0 ? moqi_ceil_div(w->rows, g) : 1;
}

/* The zero point of a group, where codes are two's complement. */
static int32_t moqi_signed_zero(const moq_linear *w, int64_t row, int64_t group) { return moqi_zero_at(w, row, group) - moqi_code_offset(w); }

/* 0: all zero points are 0; 1: some are not; -1: one does not fit the bits of a code. */
static int moqi_scan_zeros(const moq_linear *w)
{
    int32_t half = 1 << (moq_dtype_bits(w->scheme.weight.elem) - 1);
    int found = 0;
    for (int64_t i = 0; i < moqi_band_count(w) * moqi_group_count(w); i++) {
        int64_t rows = w->scheme.weight.group_rows > 0 ? w->scheme.weight.group_rows : 0;
        int32_t z = moqi_signed_zero(w, i / moqi_group_count(w) * rows, i % moqi_group_count(w));
        if (z < -half || z >= half) return -1;
        found |= z != 0;
    }
    return found;
}

/* 1 when v is a power of two from 2^-127 to 2^127; *byte: its E8M0 code. */
static int moqi_e8m0_of(float v, uint8_t *byte)
{
    uint32_t b = moqi_f32_bits(v), e = b >> 23;
    if (b == 0x00400000u) e = 0; /* 2^-127 is subnormal */
    else if (e == 0 || e > 254 || (b & 0x7fffffu)) return 0;
    if (byte) *byte = (uint8_t)e;
    return 1;
}

/* MXINT8: INT8 in groups of 32 whose scales are powers of two, whatever type they are stored in, and inputs of the same kind. */
static int moqi_is_mxint8(const moq_linear *w)
{
    const moq_coding *c = &w->scheme.weight, *in = &w->scheme.input;
    int64_t groups = moqi_group_count(w);
    if (!moqi_coding_is(c, MOQ_I8, 1, 32) || !moqi_coding_is(in, MOQ_I8, 1, 32) || in->scale != MOQ_F8_E8M0) return 0;
    for (int64_t i = 0; i < w->rows * groups && w->scales.data && c->scale != MOQ_F8_E8M0; i++)
        if (!moqi_e8m0_of((float)moqi_scale_at(w, i / groups, i % groups), NULL)) return 0;
    return 1;
}

/* Does a type hold these numbers exactly? */
static int moqi_fits(moq_dtype t, double v)
{
    float f = (float)v;
    return (double)f == v && (double)moqi_in_model(t, f) == v;
}

/* The type of float scales: `model` (BF16 or F16) when it holds all of them, F32 otherwise. */
static moq_dtype moqi_scale_type(const moq_linear *w, moq_dtype model)
{
    int64_t groups = moqi_group_count(w), step = w->scheme.weight.group_rows > 0 ? w->scheme.weight.group_rows : 1;
    if (w->scheme.weight.scale == MOQ_F8_E8M0 && w->scheme.weight.elem == MOQ_I8) return MOQ_BF16; /* holds all powers of two */
    if (!w->scales.data || (model != MOQ_BF16 && model != MOQ_F16)) return MOQ_F32;
    for (int64_t i = 0; i < moqi_band_count(w) * groups; i++)
        if (!moqi_fits(model, moqi_scale_at(w, i / groups * step, i % groups))) return MOQ_F32;
    return model;
}

/* A multiplier as a divisor or the other way round: the reciprocal, which keeps products within 2^-24 of their size and a rounding. Where
   several floats have v as their reciprocal, the one that the other tool would have computed: ModelOpt multiplies the largest of BF16
   numbers by fl32(1 / 2688), compressed-tensors divides 2688 by it in BF16. */
static float moqi_turn_global(float v, int to_divisor)
{
    float turned = 1 / v;
    for (int step = -2; step <= 2; step++) {
        float c = moqi_bits_f32(moqi_f32_bits(turned) + (uint32_t)step), amax = moq_bf16_decode(moq_bf16_encode(c * 2688));
        float less = moq_bf16_decode(moq_bf16_encode(c * 1536)) * moqi_bits_f32(MOQI_INV_1536); /* four over six */
        int native = to_divisor ? moqi_fits(MOQ_BF16, (double)c) : moqi_f32_bits(amax * moqi_bits_f32(MOQI_INV_2688)) == moqi_f32_bits(c) ||
                                                                   moqi_f32_bits(less) == moqi_f32_bits(c);
        if (moqi_is_finite(c) && native && moqi_f32_bits(1 / c) == moqi_f32_bits(v)) return c;
    }
    return turned;
}

static void moqi_put_piece(moqi_piece *list, int *n, int what, const char *ending, moq_dtype dtype, uint32_t rank, int64_t a, int64_t b)
{
    moqi_piece *p = &list[(*n)++];
    memset(p, 0, sizeof *p);
    p->what = what;
    p->ending = ending;
    p->dtype = dtype;
    p->rank = rank;
    p->shape[0] = (uint64_t)a;
    p->shape[1] = (uint64_t)b;
}

/* ---- what a container can hold ---- */

static moq_result moqi_refuse_form(const moqi_form *f, const moq_linear *w, const char *why, moq_error *err)
{
    char name[96];
    moq_scheme_name(&w->scheme, name, sizeof name);
    return moqi_fail(err, MOQ_E_UNSUPPORTED, moqi_at(NULL, "layer", w->name, -1), "%s cannot be stored in %s: %s", name, moqi_container_names[f->container], why);
}

/* Both: a quantized input in a form that the container can say. `tensor`, `token`: FP8 and INT8 with such scales are allowed. */
static int moqi_input_is(const moq_linear *w, moq_dtype elem, int tensor, int token)
{
    const moq_coding *c = &w->scheme.input;
    if (c->elem != elem || c->scale == MOQ_F8_E8M0 || w->input_zero != 0) return 0;
    return (tensor && !c->dynamic && c->group_rows == MOQ_ALL) || (token && c->dynamic && c->group_rows == 1 && c->group_cols == MOQ_ALL);
}

static moq_result moqi_ct_form_int(const moq_linear *w, moqi_form *f, moq_error *err)
{
    const moq_coding *c = &w->scheme.weight, *in = &w->scheme.input;
    int zeros = moqi_scan_zeros(w), mx = c->scale == MOQ_F8_E8M0 || in->scale == MOQ_F8_E8M0;
    if (zeros < 0) return moqi_refuse_form(f, w, "a zero point lies outside the range of the codes", err);
    if (c->group_rows != 1 && c->group_rows != MOQ_ALL) return moqi_refuse_form(f, w, "integers have scales of rows and groups of columns only", err);
    f->zeros = zeros;
    f->scheme.weight.zero_point = (uint8_t)zeros;
    f->format = in->elem == MOQ_I8 ? MOQI_CT_INT : MOQI_CT_PACK;
    if (in->elem == MOQ_I8 && (w->scheme.act_order || (mx && !moqi_is_mxint8(w)))) return moqi_refuse_form(f, w, "no format of integers has that", err);
    if (in->elem == MOQ_I8 && !mx && in->group_cols != MOQ_ALL) return moqi_refuse_form(f, w, "inputs have one scale, or one for each token", err);
    if (in->elem != MOQ_NONE && in->elem != MOQ_I8 && !moqi_input_is(w, MOQ_F8_E4M3, 0, 1))
        return moqi_refuse_form(f, w, "integer weights go with FP8 inputs that have a scale for each token, or INT8 inputs", err);
    if (in->elem == MOQ_NONE && mx) return moqi_refuse_form(f, w, "integers with power-of-two scales need INT8 inputs", err);
    return MOQ_OK;
}

/* compressed-tensors: the presets of its quant_scheme.py and what its golden folders show. */
static moq_result moqi_ct_form(const moq_linear *w, moq_dtype model, moqi_form *f, moq_error *err)
{
    const moq_coding *c = &w->scheme.weight, *in = &w->scheme.input;
    int wide = in->elem == MOQ_NONE, mx = in->scale == MOQ_F8_E8M0 && in->group_cols == 32;
    f->scale = moqi_scale_type(w, model);
    if (w->experts > 0) return moqi_refuse_form(f, w, "experts that are stacked in one tensor have no name there; exclude them", err);
    if (w->scheme.pre_quant_scale) return moqi_refuse_form(f, w, "no pre_quant_scale can stand beside a weight; choose a recipe without smoothing for it", err);
    if (w->scheme.lora_rank) return moqi_refuse_form(f, w, "it has a low-rank branch", err);
    if (w->scheme.requantize_fp8) return moqi_refuse_form(f, w, "weights cannot be rounded twice", err);
    if (w->scheme.hadamard) return moqi_refuse_form(f, w, "its input is rotated", err);
    if (moqi_is_int(c->elem)) return moqi_ct_form_int(w, f, err);
    if (c->elem == MOQ_F4 && c->scale == MOQ_F8_E4M3) {
        f->format = MOQI_CT_NVFP4;
        if (c->group_cols != 16) return moqi_refuse_form(f, w, "NVFP4 has groups of 16 there", err);
        return wide || in->elem == MOQ_F4 ? MOQ_OK : moqi_refuse_form(f, w, "NVFP4 weights go with wide or NVFP4 inputs", err);
    }
    if (c->elem == MOQ_F4 || (c->elem == MOQ_F8_E4M3 && c->scale == MOQ_F8_E8M0 && c->group_cols == 32)) {
        f->format = c->elem == MOQ_F4 ? MOQI_CT_MXFP4 : MOQI_CT_MXFP8;
        if (!moqi_coding_is(c, c->elem, 1, 32)) return moqi_refuse_form(f, w, "MX formats have groups of 32 columns there", err);
        return wide || (in->elem == c->elem && mx) ? MOQ_OK : moqi_refuse_form(f, w, "MX weights go with wide inputs or inputs of the same format", err);
    }
    if (c->elem != MOQ_F8_E4M3) return moqi_refuse_form(f, w, "it has no floats of six bits", err);
    f->format = wide ? MOQI_CT_NAIVE : MOQI_CT_FLOAT;
    int blocks = in->elem == MOQ_F8_E4M3 && in->dynamic && in->group_rows == 1 && in->group_cols > 0 && in->scale != MOQ_F8_E8M0;
    return wide || blocks || moqi_input_is(w, MOQ_F8_E4M3, 1, 1) ? MOQ_OK : moqi_refuse_form(f, w, "FP8 weights go with wide or FP8 inputs", err);
}

static moq_result moqi_modelopt_form_int(const moq_linear *w, moqi_form *f, moq_error *err)
{
    const moq_coding *c = &w->scheme.weight, *in = &w->scheme.input;
    int wide = in->elem == MOQ_NONE;
    if (w->experts > 0) return moqi_refuse_form(f, w, "integers of stacked experts have no layout there; exclude them", err);
    if (w->scheme.act_order) return moqi_refuse_form(f, w, "columns cannot name their group", err);
    if (moqi_scan_zeros(w) != 0) return moqi_refuse_form(f, w, "it has zero points", err);
    f->scheme.weight.zero_point = 0;
    if (moqi_is_mxint8(w)) {
        f->algo = "MXINT8";
        f->scheme.weight.scale = MOQ_F8_E8M0;
        return MOQ_OK;
    }
    if (c->elem == MOQ_I8) {
        f->algo = wide ? "W8A16" : "W8A8_SQ_PER_CHANNEL";
        if (c->group_cols != MOQ_ALL && c->group_cols != w->cols) return moqi_refuse_form(f, w, "INT8 has one scale for each row there", err);
        f->scheme.weight.group_rows = 1;
        f->scheme.weight.group_cols = MOQ_ALL;
        return wide || moqi_input_is(w, MOQ_I8, 1, 0) ? MOQ_OK : moqi_refuse_form(f, w, "INT8 inputs have one static, symmetric scale there", err);
    }
    if (c->elem != MOQ_I4) return moqi_refuse_form(f, w, "it has integers of 4 and 8 bits only", err);
    f->algo = w->scheme.requantize_fp8 ? "W4A8_AWQ" : "W4A16_AWQ";
    if (w->rows % 2 != 0) return moqi_refuse_form(f, w, "INT4 packs pairs of rows, and their number is odd", err);
    f->scheme.weight.group_rows = 1;
    if (c->group_cols == MOQ_ALL) f->scheme.weight.group_cols = (int32_t)w->cols;
    return wide || (w->scheme.requantize_fp8 && moqi_input_is(w, MOQ_F8_E4M3, 1, 0)) ? MOQ_OK : moqi_refuse_form(f, w, "INT4 weights go with wide inputs there", err);
}

static moq_result moqi_modelopt_form_fp8(const moq_linear *w, moqi_form *f, moq_error *err)
{
    const moq_coding *c = &w->scheme.weight, *in = &w->scheme.input;
    int wide = in->elem == MOQ_NONE, tensor = c->group_rows == MOQ_ALL && c->group_cols == MOQ_ALL;
    if (c->scale == MOQ_F8_E8M0 && c->group_cols == 32) {
        f->algo = "MXFP8";
        return moqi_coding_is(in, MOQ_F8_E4M3, 1, 32) ? MOQ_OK : moqi_refuse_form(f, w, "MXFP8 weights go with MXFP8 inputs there", err);
    }
    if (c->group_rows > 1) {
        f->algo = "fp8_pb_wo";
        if (c->group_rows != 128 || c->group_cols != 128) return moqi_refuse_form(f, w, "FP8 has blocks of 128 x 128 there", err);
        memset(&f->scheme.input, 0, sizeof f->scheme.input); /* weight-only there; the caller is told */
        return w->experts > 0 ? moqi_refuse_form(f, w, "blocks of stacked experts have no layout there; exclude them", err) : MOQ_OK;
    }
    if (c->group_cols != MOQ_ALL && c->group_cols != w->cols) return moqi_refuse_form(f, w, "FP8 has no groups of columns there", err);
    if (moqi_input_is(w, MOQ_F8_E4M3, 0, 1)) {
        f->algo = "FP8_PER_CHANNEL_PER_TOKEN";
        f->scheme.weight.group_rows = 1;
        f->scheme.weight.group_cols = MOQ_ALL;
        return w->experts > 0 ? moqi_refuse_form(f, w, "stacked experts have one scale in all", err) : MOQ_OK;
    }
    f->algo = "FP8";
    if (!tensor) return moqi_refuse_form(f, w, "FP8 with a scale for each row goes with a scale for each token there", err);
    return wide || moqi_input_is(w, MOQ_F8_E4M3, 1, 0) ? MOQ_OK : moqi_refuse_form(f, w, "FP8 inputs have one scale, or one for each token", err);
}

/* ModelOpt: the algorithms that its exporter writes, and for MXFP6 and MXINT8, which it computes with but cannot write, their names in its
   own pattern: codes and E8M0 scales as MXFP8 has them. */
static moq_result moqi_modelopt_form(const moq_linear *w, moqi_form *f, moq_error *err)
{
    const moq_coding *c = &w->scheme.weight, *in = &w->scheme.input;
    int wide = in->elem == MOQ_NONE;
    f->stack = w->experts > 0;
    f->scale = MOQ_F32;
    if (w->scheme.hadamard) return moqi_refuse_form(f, w, "its input is rotated", err);
    if (w->expert_global.data || w->expert_input.data || (w->expert_scales && c->group_cols == MOQ_ALL))
        return moqi_refuse_form(f, w, "stacked experts share their scales of whole tensors", err);
    if (moqi_is_int(c->elem)) return moqi_modelopt_form_int(w, f, err);
    if (c->elem == MOQ_F8_E4M3) return moqi_modelopt_form_fp8(w, f, err);
    if (c->elem == MOQ_F6_E3M2 || c->elem == MOQ_F6_E2M3) {
        f->algo = c->elem == MOQ_F6_E3M2 ? "MXFP6_E3M2" : "MXFP6_E2M3";
        return moqi_coding_is(in, c->elem, 1, 32) && w->experts == 0 ? MOQ_OK : moqi_refuse_form(f, w, "MXFP6 weights go with MXFP6 inputs", err);
    }
    if (c->scale == MOQ_F8_E8M0) {
        f->algo = in->elem == MOQ_F8_E4M3 ? "W4A8_MXFP4_FP8" : "mxfp4";
        if (w->experts > 0 && !w->packing.along_rows)
            return moqi_refuse_form(f, w, "MXFP4 stacks are grouped along the outputs there, and these along the inputs; convert with --recipe nvfp4, "
                                          "which keeps the numbers", err);
        return wide || in->elem == MOQ_F4 || moqi_input_is(w, MOQ_F8_E4M3, 0, 1) ? MOQ_OK : moqi_refuse_form(f, w, "MXFP4 goes with wide, MXFP4 or FP8 inputs", err);
    }
    f->algo = w->scheme.lora_rank ? "NVFP4_SVD" : w->scheme.pre_quant_scale ? "NVFP4_AWQ" : wide ? "W4A16_NVFP4" : in->elem == MOQ_F4 ? "NVFP4" : "W4A8_NVFP4_FP8";
    return wide || in->elem == MOQ_F4 || moqi_input_is(w, MOQ_F8_E4M3, 1, 0) ? MOQ_OK : moqi_refuse_form(f, w, "NVFP4 goes with wide, NVFP4 or FP8 inputs", err);
}

/* How `container` stores a layer, or MOQ_E_UNSUPPORTED with the reason. `model`: the float type of the model. */
static moq_result moqi_find_form(int container, const moq_linear *w, moq_dtype model, moqi_form *f, moq_error *err)
{
    memset(f, 0, sizeof *f);
    f->container = container;
    f->scheme = w->scheme;
    f->algo = "";
    return container == MOQI_COMPRESSED ? moqi_ct_form(w, model, f, err) : moqi_modelopt_form(w, f, err);
}

/* ---- its tensors ---- */

/* Shape of float scales: by form, not by how the source had them. */
static void moqi_scale_piece(const moqi_form *f, const moq_linear *w, moqi_piece *list, int *n)
{
    const moq_coding *c = &f->scheme.weight;
    int64_t bands = c->group_rows > 0 ? moqi_ceil_div(w->rows, c->group_rows) : 1, groups = c->group_cols > 0 ? moqi_ceil_div(w->cols, c->group_cols) : 1;
    int ct = f->container == MOQI_COMPRESSED, tensor = c->group_rows == MOQ_ALL;
    moqi_put_piece(list, n, MOQI_PIECE_SCALES, ".weight_scale", f->scale, 2, bands, groups);
    moqi_piece *p = &list[*n - 1];
    if (tensor) p->rank = (uint32_t)ct;
    else if (!ct && c->group_cols == MOQ_ALL) p->rank = 1;
    else if (!ct && c->group_rows > 1) {
        p->rank = bands * groups == 1 ? 0 : 4; /* one block: a scalar, as ModelOpt writes it */
        p->shape[2] = p->shape[1];
        p->shape[1] = p->shape[3] = 1;
    }
}

/* The tensors of one layer in either container; names begin with the module's. Returns how many of `list`, at most MOQI_MAX_PIECES. */
static int moqi_list_pieces(const moqi_form *f, const moq_linear *w, moqi_piece *list)
{
    const moq_coding *c = &f->scheme.weight;
    moq_dtype small = c->scale == MOQ_F8_E8M0 ? MOQ_U8 : MOQ_F8_E4M3;
    int n = 0, ct = f->container == MOQI_COMPRESSED, bits = moq_dtype_bits(c->elem), nvfp4 = c->elem == MOQ_F4 && c->scale == MOQ_F8_E4M3;
    int64_t groups = c->group_cols > 0 ? moqi_ceil_div(w->cols, c->group_cols) : 1, words = moqi_ceil_div(w->cols * bits, 32);
    float global = w->global_mul / w->global_div;
    if (ct && f->format == MOQI_CT_PACK) {
        moqi_put_piece(list, &n, MOQI_PIECE_CODES, ".weight_packed", MOQ_I32, 2, w->rows, words);
        moqi_put_piece(list, &n, MOQI_PIECE_SHAPE, ".weight_shape", MOQ_I64, 1, 2, 0);
        if (f->zeros) moqi_put_piece(list, &n, MOQI_PIECE_ZEROS, ".weight_zero_point", MOQ_I32, 2, moqi_ceil_div(moqi_band_count(w) * bits, 32), groups);
        if (w->group_index.data) moqi_put_piece(list, &n, MOQI_PIECE_ORDER, ".weight_g_idx", MOQ_I32, 1, w->cols, 0);
    } else if (!ct && c->elem == MOQ_I4) {
        moqi_put_piece(list, &n, MOQI_PIECE_CODES, ".weight", MOQ_U8, 2, w->rows / 2, w->cols);
    } else if (bits == 8 || moqi_is_int(c->elem)) {
        moqi_put_piece(list, &n, MOQI_PIECE_CODES, ".weight", bits == 8 ? c->elem : MOQ_I8, 2, w->rows, w->cols);
        if (f->zeros) moqi_put_piece(list, &n, MOQI_PIECE_ZEROS, ".weight_zero_point", MOQ_I8, 2, moqi_band_count(w), groups);
    } else {
        moqi_put_piece(list, &n, MOQI_PIECE_CODES, ct ? ".weight_packed" : ".weight", MOQ_U8, 2, w->rows, w->cols * bits / 8);
    }
    if (c->elem == MOQ_F4 || (c->scale == MOQ_F8_E8M0 && c->group_cols == 32 && f->format != MOQI_CT_INT))
        moqi_put_piece(list, &n, MOQI_PIECE_SCALES, ".weight_scale", small, 2, w->rows, groups);
    else moqi_scale_piece(f, w, list, &n);
    if (nvfp4 || w->requant_scale > 0) {
        moqi_put_piece(list, &n, MOQI_PIECE_GLOBAL, ct ? ".weight_global_scale" : ".weight_scale_2", MOQ_F32, (uint32_t)ct, 1, 0);
        list[n - 1].value = w->requant_scale > 0 ? w->requant_scale : !ct ? (w->global_div != 1 ? moqi_turn_global(w->global_div, 0) : global)
                          : w->global_div != 1 ? w->global_div : moqi_turn_global(global, 1);
    }
    if (f->scheme.input.elem != MOQ_NONE && w->input_scale > 0) {
        int divisor = ct && f->scheme.input.elem == MOQ_F4;
        moq_dtype type = ct && !divisor && f->scale != MOQ_F32 && moqi_fits(f->scale, (double)w->input_scale) ? f->scale : MOQ_F32;
        moqi_put_piece(list, &n, MOQI_PIECE_INPUT, divisor ? ".input_global_scale" : ".input_scale", type, (uint32_t)ct, 1, 0);
        list[n - 1].value = divisor ? moqi_turn_global(w->input_scale, 1) : w->input_scale;
    }
    if (ct && f->scheme.input.zero_point && !f->scheme.input.dynamic) {
        moqi_put_piece(list, &n, MOQI_PIECE_INPUT_ZERO, ".input_zero_point", MOQ_I8, 1, 1, 0);
        list[n - 1].value = (float)w->input_zero;
    }
    for (int i = 0; f->stack && i < n; i++) { /* [experts, in, out]: pairs and groups of inputs stand one below the other; scalars are shared */
        if (list[i].rank < 2) continue;
        list[i].shape[2] = list[i].shape[0];
        list[i].shape[0] = (uint64_t)w->experts;
        list[i].rank = 3;
    }
    return n;
}

/* ---- their bytes ---- */

/* `bits` of v at bit position `at` of a stream that begins as zeros, low bits first. */
static void moqi_put_bits(uint8_t *out, int64_t at, uint32_t v, int bits)
{
    for (v <<= (unsigned)(at & 7), bits += (int)(at & 7), at >>= 3; bits > 0; bits -= 8, v >>= 8) out[at++] |= (uint8_t)v;
}

/* One row of codes as two's complement, or as the format's own codes. */
static void moqi_row_codes(const moq_linear *w, int64_t row, int32_t offset, int16_t *q)
{
    moq_get_codes(w, row, 0, w->cols, q);
    for (int64_t c = 0; offset && c < w->cols; c++) q[c] = (int16_t)(q[c] - offset);
}

/* The codes of one layer (of a stack: one expert). q: scratch of one row; out: zeros on entry. */
static void moqi_store_codes(const moqi_form *f, const moq_linear *w, int16_t *q, uint8_t *out)
{
    int bits = moq_dtype_bits(f->scheme.weight.elem), pack = f->format == MOQI_CT_PACK, pairs = f->container == MOQI_MODELOPT && f->scheme.weight.elem == MOQ_I4;
    int bytes = !pack && !pairs && (bits == 8 || moqi_is_int(f->scheme.weight.elem));
    int32_t offset = moqi_is_int(f->scheme.weight.elem) ? moqi_code_offset(w) : 0;
    uint32_t half = 1u << (bits - 1), mask = (1u << bits) - 1;
    int64_t stride = moqi_ceil_div(w->cols * bits, pack ? 32 : 8) * (pack ? 4 : 1);
    for (int64_t r = 0; r < w->rows; r++) {
        moqi_row_codes(w, r, offset, q);
        uint8_t *row = out + (pairs ? r / 2 : r) * (pairs || bytes ? w->cols : stride);
        if (f->stack && bits == 4) for (int64_t c = 0; c < w->cols; c += 2) out[c / 2 * w->rows + r] = (uint8_t)((q[c] & 15) | (q[c + 1] & 15) << 4);
        else if (f->stack) for (int64_t c = 0; c < w->cols; c++) out[c * w->rows + r] = (uint8_t)q[c];
        else if (pairs) for (int64_t c = 0; c < w->cols; c++) row[c] |= (uint8_t)((q[c] & 15) << (r & 1 ? 4 : 0));
        else if (bytes) for (int64_t c = 0; c < w->cols; c++) row[c] = (uint8_t)q[c];
        else if (pack) for (int64_t c = 0; c < w->cols; c++) moqi_put_bits(row, c * bits, ((uint32_t)(int32_t)q[c] + half) & mask, bits);
        else if (bits == 4) for (int64_t c = 0; c + 1 < w->cols; c += 2) row[c / 2] = (uint8_t)((q[c] & 15) | (q[c + 1] & 15) << 4);
        else for (int64_t c = 0; c < w->cols; c++) moqi_put_bits(row, c * bits, (uint32_t)(int32_t)q[c] & mask, bits);
    }
}

/* A float little-endian in F32, BF16 or F16. */
static void moqi_store_float(moq_dtype type, float v, uint8_t *p)
{
    uint32_t b = type == MOQ_F32 ? moqi_f32_bits(v) : type == MOQ_F16 ? moq_f16_encode(v) : moq_bf16_encode(v);
    for (int i = 0; i < moq_dtype_bits(type) / 8; i++, b >>= 8) p[i] = (uint8_t)b;
}

/* Scales of one layer in the order of the form's grid; those of one scale for all are repeated where the form has one a row. */
static void moqi_store_scales(const moqi_form *f, const moqi_piece *p, const moq_linear *w, uint8_t *out)
{
    const moq_coding *c = &f->scheme.weight;
    int64_t bands = c->group_rows > 0 ? moqi_ceil_div(w->rows, c->group_rows) : 1, groups = c->group_cols > 0 ? moqi_ceil_div(w->cols, c->group_cols) : 1;
    int64_t step = c->group_rows > 0 ? c->group_rows : 1, own = moqi_group_count(w), bytes = moq_dtype_bits(p->dtype) / 8;
    for (int64_t i = 0; i < bands * groups; i++) {
        int64_t r = i / groups * step, g = own == groups ? i % groups : 0;
        if (bytes > 1) { moqi_store_float(p->dtype, (float)moqi_scale_at(w, r, g), out + i * bytes); continue; }
        if (moq_dtype_bits(w->scales.dtype) > 8) { moqi_e8m0_of((float)moqi_scale_at(w, r, g), out + i); continue; }
        int64_t band = w->row_first + r * w->row_step;
        if (w->scheme.weight.group_rows > 1) band /= w->scheme.weight.group_rows;
        uint8_t byte = ((const uint8_t *)w->scales.data)[band * w->scale_row_stride + g * w->scale_col_stride];
        if (f->stack) out[i % groups * w->rows + i / groups] = byte;
        else out[i] = byte;
    }
}

/* Zero points: bytes beside the scales, or packed along the rows with the offset of the codes. out: zeros on entry. */
static void moqi_store_zeros(const moqi_form *f, const moq_linear *w, uint8_t *out)
{
    int bits = moq_dtype_bits(f->scheme.weight.elem);
    int64_t groups = moqi_group_count(w), step = w->scheme.weight.group_rows > 0 ? w->scheme.weight.group_rows : 1;
    for (int64_t i = 0; i < moqi_band_count(w) * groups; i++) {
        int64_t r = i / groups, g = i % groups;
        int32_t z = moqi_signed_zero(w, r * step, g);
        if (f->format != MOQI_CT_PACK) { out[i] = (uint8_t)z; continue; }
        uint32_t v = (uint32_t)(z + (1 << (bits - 1)));
        for (int k = 0; k < bits; k++) { /* word [bit / 32] of the column of groups g */
            int64_t at = r * bits + k;
            out[4 * (at / 32 * groups + g) + at % 32 / 8] |= (uint8_t)((v >> k & 1u) << (at & 7));
        }
    }
}

/* The bytes of one large piece of a layer, an expert or a band of rows; `out` is overwritten. q: scratch of one row of codes. */
static void moqi_store_piece(const moqi_form *f, const moqi_piece *p, const moq_linear *w, int16_t *q, uint8_t *out, uint64_t bytes)
{
    memset(out, 0, (size_t)bytes);
    if (p->what == MOQI_PIECE_CODES) moqi_store_codes(f, w, q, out);
    else if (p->what == MOQI_PIECE_SCALES) moqi_store_scales(f, p, w, out);
    else if (p->what == MOQI_PIECE_ZEROS) moqi_store_zeros(f, w, out);
    else for (int64_t c = 0; c < w->cols; c++) { /* group of every column */
        uint32_t g = (uint32_t)moqi_group_of(w, c);
        for (int k = 0; k < 4; k++) out[4 * c + k] = (uint8_t)(g >> (8 * k));
    }
}

/* ------------------------------------------------------------------------------------------------
   >>pack            the tensors of a quantized folder, encoded and written shard by shard
   Memory holds one layer at a time; tensor names, shapes and their order in the file are ModelOpt's.
   ------------------------------------------------------------------------------------------------ */

/* Order of work: the list of tensors with their shapes is complete before the first byte is written, since the header of a
   safetensors file comes first. Then each tensor is made when its turn comes. Scales stand before codes in the file (the library
   sorts E4M3 before U8, F32 before both), so a layer is looked at twice: once for its scales, once for its codes. */
/* Where the bytes of a written tensor come from. Codes and scales are made when their turn comes, so that memory holds one layer. */
enum { MOQI_OUT_DATA = 0, MOQI_OUT_CODES, MOQI_OUT_SCALES, MOQI_OUT_FLOAT, MOQI_OUT_PIECE };

typedef struct moqi_out {
    moq_tensor t;   /* first: the writer of >>st sorts by it. data: for MOQI_OUT_DATA */
    int what;
    size_t target;
    moqi_piece piece; /* for MOQI_OUT_PIECE */
} moqi_out;

/* A line of the JSON description: a module, or a container of experts. */
typedef struct moqi_unit {
    const char *name;
    const moq_scheme *scheme; /* NULL: not quantized */
    const char *algo;
    const char *order;        /* name in ModelOpt's memory, by which it sorts */
    int64_t place;            /* in the model */
} moqi_unit;

typedef struct moqi_export {
    moqi_plan plan;
    moqi_arena arena;
    moq_st *file;              /* calibration from a file, or measured */
    moq_stats *stats;
    moqi_out *outs;
    size_t count, capacity;
    moqi_unit *units;          /* by name */
    const moqi_unit **by_place;
    size_t unit_count;
    uint8_t *codes, *scales;   /* of the target encoded last */
    uint64_t code_bytes, scale_bytes, code_room, scale_room;
    size_t encoded;            /* index of that target; SIZE_MAX: none */
    int with_codes;            /* its codes are there too, not only its scales */
    uint64_t done, total;      /* bytes written, of all */
    const char *kv_algo;       /* "FP8" ...; NULL: none */
    int container;             /* MOQI_MODELOPT, MOQI_COMPRESSED */
    int convert;               /* quantized layers of the source keep their numbers */
    int cast;                  /* but for MXFP4, which becomes NVFP4 */
    moqi_form *forms;          /* of each target: how it is written as pieces; algo NULL: it is not */
    uint8_t *pieces;           /* one band of a piece */
    uint64_t piece_room, band_bytes;
    char temp[4096 + 40];
    uint32_t shards;
} moqi_export;

/* ---- the list of tensors ---- */

/* Adds a tensor; shape of `rank` numbers. NULL when out of memory. */
static moqi_out *moqi_add_out(moqi_export *x, const char *name, const char *ending, moq_dtype dtype, uint32_t rank, const uint64_t *shape)
{
    char text[MOQ_MAX_NAME_BYTES + 64];
    size_t n = moqi_format(text, sizeof text, "%s%s", name, ending);
    if (x->count == x->capacity || n >= sizeof text) return NULL;
    moqi_out *o = &x->outs[x->count];
    memset(o, 0, sizeof *o);
    o->t.name = moqi_take_text(&x->arena, text, n);
    if (!o->t.name) return NULL;
    o->t.name_bytes = (uint32_t)n;
    o->t.dtype = dtype;
    o->t.rank = rank;
    o->t.bytes = (uint64_t)moq_dtype_bits(dtype) / 8;
    for (uint32_t i = 0; i < rank; i++) {
        o->t.shape[i] = shape[i];
        o->t.bytes *= shape[i];
    }
    x->count++;
    return o;
}

/* A tensor of values that are known now, rounded to dtype (F32, BF16, F16). */
static moq_result moqi_add_values(moqi_export *x, const char *name, const char *ending, moq_dtype dtype, uint32_t rank, const uint64_t *shape, const float *v,
                                  moq_error *err)
{
    moqi_out *o = moqi_add_out(x, name, ending, dtype, rank, shape);
    uint8_t *p = o ? (uint8_t *)moqi_take(&x->arena, o->t.bytes, 16) : NULL;
    if (!p) return moqi_nomem(err, MOQ_MAX_NAME_BYTES);
    o->t.data = p;
    size_t n = (size_t)(o->t.bytes / ((uint64_t)moq_dtype_bits(dtype) / 8));
    for (size_t i = 0; i < n; i++) {
        uint32_t b = dtype == MOQ_F32 ? moqi_f32_bits(v[i]) : dtype == MOQ_F16 ? moq_f16_encode(v[i]) : moq_bf16_encode(v[i]);
        if (dtype == MOQ_F32) { p[4 * i] = (uint8_t)b; p[4 * i + 1] = (uint8_t)(b >> 8); p[4 * i + 2] = (uint8_t)(b >> 16); p[4 * i + 3] = (uint8_t)(b >> 24); }
        else { p[2 * i] = (uint8_t)b; p[2 * i + 1] = (uint8_t)(b >> 8); }
    }
    return MOQ_OK;
}

/* 0-d: scales of whole tensors have no dimension in ModelOpt's files. */
static moq_result moqi_add_scalar(moqi_export *x, const char *name, const char *ending, float v, moq_error *err)
{
    return moqi_add_values(x, name, ending, MOQ_F32, 0, NULL, &v, err);
}

/* Codes and scales as ModelOpt shapes them. Stacks of experts are [experts, in, out] with pairs along in; MXFP4 stacks keep the
   orientation of the parameter, so pairs and blocks run along out. A single block of FP8 has a scalar scale. */
static void moqi_shapes(const moqi_target *t, uint64_t *codes, uint32_t *code_rank, uint64_t *scales, uint32_t *scale_rank)
{
    const moq_coding *c = &t->recipe->scheme.weight;
    uint64_t rows = (uint64_t)t->w.rows, cols = (uint64_t)t->w.cols, experts = t->w.experts > 0 ? (uint64_t)t->w.experts : 0;
    uint64_t pack = c->elem == MOQ_F4 || c->elem == MOQ_I4 ? 2 : 1, group = c->group_cols > 0 ? (uint64_t)c->group_cols : cols;
    if (experts) {
        int turned = c->scale == MOQ_F8_E8M0;
        codes[0] = scales[0] = experts;
        codes[1] = turned ? cols : cols / pack;
        codes[2] = turned ? rows / pack : rows;
        scales[1] = turned ? cols : cols / group;
        scales[2] = turned ? rows / group : rows;
        *code_rank = 3;
        *scale_rank = c->elem == MOQ_F8_E4M3 ? 0 : 3;
        return;
    }
    *code_rank = 2;
    codes[0] = c->elem == MOQ_I4 ? rows / 2 : rows;
    codes[1] = c->elem == MOQ_I4 ? cols : moq_dtype_bits(c->elem) == 6 ? cols / 4 * 3 : cols / pack;
    scales[0] = rows;
    scales[1] = cols / group;
    *scale_rank = c->group_rows == MOQ_ALL ? 0 : c->group_cols == MOQ_ALL ? 1 : 2;
    if (c->group_rows != 128) return;
    const char *last = moqi_last_part(t->name);
    int half = t->expert && strcmp(last, "down_proj") != 0 && strcmp(last, "w2") != 0;
    scales[0] = (uint64_t)moqi_ceil_div(t->w.rows, 128);
    scales[2] = (uint64_t)moqi_ceil_div(t->w.cols, 128);
    scales[1] = scales[3] = 1;
    *scale_rank = scales[0] * scales[2] == 1 && !half ? 0 : 4;
}

/* The stored scale of static inputs. */
static float moqi_target_input(const moqi_target *t)
{
    moq_dtype e = t->recipe->scheme.input.elem;
    return e == MOQ_F8_E4M3 ? moqi_scale_of(t->input_amax, 448, MOQI_INV_448) : e == MOQ_I8 ? moqi_scale_of(t->input_amax, 127, MOQI_INV_127)
                            : moqi_scale_of(t->input_amax, 6, MOQI_INV_2688);
}

/* All tensors of a quantized target but its bias. */
static moq_result moqi_add_target(moqi_export *x, size_t index, moq_error *err)
{
    const moqi_target *t = &x->plan.targets[index];
    const moq_scheme *s = &t->recipe->scheme;
    int stack = t->w.experts > 0;
    uint64_t codes[4], scales[4], cols = (uint64_t)t->w.cols;
    uint32_t code_rank, scale_rank;
    moqi_shapes(t, codes, &code_rank, scales, &scale_rank);
    moq_dtype code_dtype = moq_dtype_bits(s->weight.elem) == 8 ? s->weight.elem : MOQ_U8;
    moqi_out *o = moqi_add_out(x, t->name, stack ? "" : ".weight", code_dtype, code_rank, codes);
    if (!o) return moqi_nomem(err, sizeof *o);
    o->what = MOQI_OUT_CODES;
    o->target = index;
    moq_result r = MOQ_OK;
    if (scale_rank == 0 && s->weight.group_rows == MOQ_ALL) {
        r = moqi_add_scalar(x, t->name, stack ? "_weight_scale" : ".weight_scale", moqi_global_scale(s, t->search, t->global_amax), err);
    } else {
        moq_dtype dtype = s->weight.scale == MOQ_F8_E8M0 ? MOQ_U8 : s->weight.scale;
        o = moqi_add_out(x, t->name, stack ? "_weight_scale" : ".weight_scale", dtype, scale_rank, scales);
        if (!o) return moqi_nomem(err, sizeof *o);
        o->what = MOQI_OUT_SCALES;
        o->target = index;
    }
    if (r == MOQ_OK && s->weight.has_global)
        r = moqi_add_scalar(x, t->name, stack ? "_weight_scale_2" : ".weight_scale_2", moqi_global_scale(s, t->search, t->global_amax), err);
    if (r == MOQ_OK && moqi_has_input_scale(t->recipe)) {
        r = moqi_add_scalar(x, t->name, stack ? "_input_scale" : ".input_scale", moqi_target_input(t), err);
    }
    if (r == MOQ_OK && t->out_p) r = moqi_add_values(x, t->name, ".pre_quant_scale", t->model, 1, &cols, t->out_p, err);
    return r;
}

/* A float tensor times the pre_quant_scale that moved into it; (1 + w) norms keep their offset. */
static moq_result moqi_add_folded(moqi_export *x, const moq_tensor *t, const float *p, int plus_one, moq_error *err)
{
    size_t n = (size_t)moqi_elements(t);
    float *v = (float *)moqi_take_array(&x->arena, n, sizeof *v);
    if (!v) return moqi_nomem(err, (uint64_t)n * sizeof *v);
    moq_to_f32(t->dtype, t->data, n, v);
    for (size_t i = 0; i < n; i++) v[i] = plus_one ? (v[i] + 1) * p[i] - 1 : v[i] * p[i];
    return moqi_add_values(x, t->name, "", t->dtype, t->rank, t->shape, v, err);
}

/* The target that a source tensor belongs to, NULL for norms and the like. Biases are never quantized and stay as they are. */
static moqi_target *moqi_owner(const moqi_plan *p, const moq_tensor *t, int *is_bias)
{
    static const char *const more[] = {".weight", ".weight_packed", ".qweight", "_blocks", ".bias", ""};
    size_t total = MOQI_COUNT(moqi_companions) + MOQI_COUNT(more);
    for (size_t i = 0; i < total; i++) {
        const char *end = i < MOQI_COUNT(more) ? more[i] : moqi_companions[i - MOQI_COUNT(more)];
        if (!moqi_ends(t->name, end)) continue;
        const moqi_entry *e = moqi_map_find(&p->map, t->name, t->name_bytes - strlen(end));
        if (!e) continue;
        *is_bias = strcmp(end, ".bias") == 0;
        return &p->targets[e->value];
    }
    return NULL;
}

static int moqi_is_kv_part(const char *name)
{
    static const char *const ends[] = {".k_scale", ".v_scale", ".k_bias", ".v_bias"};
    for (size_t i = 0; i < MOQI_COUNT(ends); i++)
        if (moqi_ends(name, ends[i])) return 1;
    return 0;
}

/* Everything that is not quantized: copied, folded, or decoded from a quantized source. */
static moq_result moqi_add_rest(moqi_export *x, moq_error *err)
{
    const moqi_plan *p = &x->plan;
    for (size_t i = 0; i < moq_tensor_count(p->ck); i++) {
        const moq_tensor *t = moq_get_tensor(p->ck, i);
        int is_bias = 0;
        const moqi_target *owner = moqi_owner(p, t, &is_bias);
        const moqi_fold *fold = NULL;
        moq_result r = MOQ_OK;
        for (size_t k = 0; k < p->fold_count; k++)
            if (strcmp(p->folds[k].tensor, t->name) == 0) fold = &p->folds[k];
        int raw = owner && x->forms[owner - p->targets].raw;
        if (owner && !is_bias && !raw && (owner->recipe || moq_scheme_is_quantized(&owner->w.scheme))) continue;
        if (x->convert && moqi_is_kv_part(t->name)) continue;
        if (fold) r = moqi_add_folded(x, t, fold->p, fold->plus_one, err);
        else if (owner && is_bias && owner->row_p) r = moqi_add_folded(x, t, owner->row_p, 0, err);
        else {
            moqi_out *o = moqi_add_out(x, t->name, "", t->dtype, t->rank, t->shape);
            if (!o) return moqi_nomem(err, sizeof *o);
            o->t.data = t->data;
            o->t.bytes = t->bytes;
        }
        if (r != MOQ_OK) return r;
    }
    return MOQ_OK;
}

/* ---- KV cache ---- */

/* Names of the command line, what the JSON says, what must be recorded. Cast recipes have the constant amax 448, hence no tensor. */
static const struct { const char *name, *algo; int recorded, bias; } moqi_kv_recipes[] = {
    {"fp8", "FP8", 1, 0}, {"fp8_affine", "FP8", 1, 1}, {"fp8_cast", "FP8", 0, 0}, {"nvfp4", "NVFP4", 1, 0}, {"nvfp4_affine", "NVFP4_AFFINE", 1, 1},
    {"nvfp4_cast", "NVFP4", 0, 0}, {"nvfp4_rotate", "NVFP4", 1, 0}
};

/* k_scale and v_scale are amax / 448 for every format; a bias keeps the shape of its record, in BF16. */
static moq_result moqi_add_kv_tensor(moqi_export *x, const moq_tensor *t, const char *module, char which, int bias, moq_error *err)
{
    char name[MOQ_MAX_NAME_BYTES + 64];
    size_t n = (size_t)moqi_elements(t);
    float *v = (float *)moqi_take_array(&x->arena, n, sizeof *v);
    if (!v) return moqi_nomem(err, (uint64_t)n * sizeof *v);
    if (!moq_to_f32(t->dtype, t->data, n, v) || (!bias && n != 1) || n == 0)
        return moqi_fail(err, MOQ_E_SHAPE, moqi_at(x->plan.records_name, "tensor", t->name, (int64_t)t->offset), "expected one number");
    if (!bias) v[0] = moqi_scale_of(v[0], 448, MOQI_INV_448);
    if (x->container == MOQI_COMPRESSED) {
        uint64_t one = 1;
        moqi_format(name, sizeof name, "%s%c_scale", module, which);
        return moqi_add_values(x, name, "", MOQ_F32, 1, &one, v, err);
    }
    moqi_format(name, sizeof name, "%s%c_proj.%c_%s", module, which, which, bias ? "bias" : "scale");
    return moqi_add_values(x, name, "", bias ? MOQ_BF16 : MOQ_F32, bias ? t->rank : 0, t->shape, v, err);
}

/* Keys and values of the source in the other container: "A.k_proj.k_scale" of one number, "A.k_scale" of [1] in the model's type where
   that holds it. Only FP8 without a bias is known to both. */
static moq_result moqi_convert_kv(moqi_export *x, moq_error *err)
{
    const moq_checkpoint *ck = x->plan.ck;
    moq_kv_format kv = moq_get_info(ck)->kv;
    int ct = x->container == MOQI_COMPRESSED, same = moq_get_info(ck)->family == (ct ? MOQ_FAMILY_COMPRESSED_TENSORS : MOQ_FAMILY_MODELOPT);
    char name[MOQ_MAX_NAME_BYTES + 64];
    uint64_t one = 1;
    moq_result r = MOQ_OK;
    if (kv == MOQ_KV_WIDE) return MOQ_OK;
    x->kv_algo = kv == MOQ_KV_NVFP4 ? "NVFP4" : kv == MOQ_KV_NVFP4_AFFINE ? "NVFP4_AFFINE" : "FP8";
    if (kv != MOQ_KV_FP8 && !same)
        return moqi_fail(err, MOQ_E_UNSUPPORTED, moqi_at(moq_get_name(ck), NULL, NULL, -1), "a KV cache of %s cannot be described in %s", moq_kv_format_name(kv),
                         moqi_container_names[x->container]);
    for (size_t i = 0; i < moq_tensor_count(ck) && r == MOQ_OK; i++) {
        const moq_tensor *t = moq_get_tensor(ck, i);
        float v = 1;
        if (!moqi_is_kv_part(t->name)) continue;
        if (same) {
            moqi_out *o = moqi_add_out(x, t->name, "", t->dtype, t->rank, t->shape);
            if (!o) return moqi_nomem(err, sizeof *o);
            o->t.data = t->data;
            continue;
        }
        if (moqi_elements(t) != 1 || !moq_to_f32(t->dtype, t->data, 1, &v) || !moqi_ends(t->name, "_scale"))
            return moqi_fail(err, MOQ_E_UNSUPPORTED, moqi_at(NULL, "tensor", t->name, -1), "only one scale for all heads can be stored in %s",
                             moqi_container_names[x->container]);
        const char *last = moqi_last_part(t->name), which = *last, *end = last - 1;
        int below = moqi_starts(last - (last - t->name >= 7 ? 7 : 0), which == 'k' ? "k_proj." : "v_proj.");
        int length = (int)(end - t->name) - (below ? 7 : 0);
        if (ct) moqi_format(name, sizeof name, "%.*s.%c_scale", length, t->name, which);
        else moqi_format(name, sizeof name, "%.*s.%c_proj.%c_scale", length, t->name, which, which);
        r = moqi_add_values(x, name, "", ct && moqi_fits(MOQ_BF16, (double)v) ? MOQ_BF16 : MOQ_F32, (uint32_t)ct, &one, &v, err);
    }
    return r;
}

/* Every recorded "....k_bmm_quantizer.amax" and its like becomes a tensor beside the attention's projections. */
static moq_result moqi_add_kv(moqi_export *x, moq_error *err)
{
    const char *kv = x->plan.desc->kv;
    size_t found = 0, row = MOQI_COUNT(moqi_kv_recipes);
    char module[MOQ_MAX_NAME_BYTES + 16];
    if (!kv || moqi_same(kv, "none") || moqi_same(kv, "wide")) return MOQ_OK;
    for (size_t i = 0; i < MOQI_COUNT(moqi_kv_recipes); i++)
        if (moqi_same(kv, moqi_kv_recipes[i].name)) row = i;
    if (row == MOQI_COUNT(moqi_kv_recipes))
        return moqi_fail(err, MOQ_E_ARG, moqi_at(NULL, NULL, kv, -1), "is no KV recipe of a ModelOpt folder: fp8, fp8_affine, fp8_cast, nvfp4, nvfp4_affine, "
                         "nvfp4_cast, nvfp4_rotate, none");
    x->kv_algo = moqi_kv_recipes[row].algo;
    if (x->container == MOQI_COMPRESSED && (strcmp(x->kv_algo, "FP8") != 0 || moqi_kv_recipes[row].bias))
        return moqi_fail(err, MOQ_E_UNSUPPORTED, moqi_at(NULL, NULL, kv, -1), "this KV cache cannot be described in a compressed-tensors folder; fp8 and fp8_cast can");
    if (!moqi_kv_recipes[row].recorded) return MOQ_OK;
    for (size_t i = 0; i < x->plan.record_count; i++) {
        const moq_tensor *t = x->plan.records[i];
        int bias = moqi_ends(t->name, "_bmm_quantizer.bias_value");
        const char *at = moqi_last_part(t->name);
        if (!bias && !moqi_ends(t->name, "_bmm_quantizer.amax")) continue;
        at -= 16; /* "k_bmm_quantizer." */
        if ((*at != 'k' && *at != 'v') || (bias && !moqi_kv_recipes[row].bias)) continue;
        int renamed = x->plan.nemotron && moqi_starts(t->name, "model.");
        const char *start = renamed ? t->name + 6 : t->name;
        moqi_format(module, sizeof module, "%s%.*s", renamed ? "backbone." : "", (int)(at - start), start);
        moq_result r = moqi_add_kv_tensor(x, t, module, *at, bias, err);
        if (r != MOQ_OK) return r;
        found += !bias;
    }
    return found ? MOQ_OK : moqi_fail(err, MOQ_E_MISSING, moqi_at(NULL, NULL, kv, -1), "this KV recipe needs the largest keys and values of every layer, and "
                                      "they were not calibrated; give a calibration file, or use %s_cast", moqi_starts(kv, "fp8") ? "fp8" : "nvfp4");
}

/* ---- encoding one target ---- */

/* Grows a buffer that holds nothing any more. */
static moq_result moqi_room(const moq_allocator *a, uint8_t **p, uint64_t *room, uint64_t bytes, moq_error *err)
{
    if (bytes <= *room) return MOQ_OK;
    moq_release(a, *p, (size_t)*room);
    *p = bytes <= SIZE_MAX / 2 ? (uint8_t *)moq_allocate(a, (size_t)bytes) : NULL;
    *room = *p ? bytes : 0;
    return *p ? MOQ_OK : moqi_nomem(err, bytes);
}

/* out[j * rows + i] = in[i * cols + j] for bytes. */
static void moqi_transpose(const uint8_t *in, int64_t rows, int64_t cols, uint8_t *out)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) out[j * rows + i] = in[i * cols + j];
}

/* Expert k of a stack: encoded [out, in] and turned, or for MX turned first. `spare` has room for one expert's F32 matrix. */
static moq_result moqi_encode_expert(moqi_export *x, const moqi_target *t, int32_t k, moq_encode_desc *d, float *spare, moq_error *err)
{
    uint64_t codes, scales;
    uint8_t *to = (uint8_t *)spare, *from;
    if (d->scheme.weight.scale == MOQ_F8_E8M0) {
        const float *in = x->plan.work;
        for (int64_t i = 0; i < t->w.rows; i++)
            for (int64_t j = 0; j < t->w.cols; j++) spare[j * t->w.rows + i] = in[i * t->w.cols + j];
        d->data = spare;
        d->rows = t->w.cols;
        d->cols = t->w.rows;
        moq_result r = moq_encode_bytes(d, &codes, &scales, err);
        return r == MOQ_OK ? moq_encode(d, x->codes + (uint64_t)k * codes, x->scales + (uint64_t)k * scales, NULL, err) : r;
    }
    moq_result r = moq_encode_bytes(d, &codes, &scales, err);
    if (r == MOQ_OK) r = moq_encode(d, to, to + codes, NULL, err);
    if (r != MOQ_OK) return r;
    from = to;
    moqi_transpose(from, t->w.rows, (int64_t)codes / t->w.rows, x->codes + (uint64_t)k * codes);
    if (d->scheme.weight.elem == MOQ_F4) moqi_transpose(from + codes, t->w.rows, (int64_t)scales / t->w.rows, x->scales + (uint64_t)k * scales);
    else memcpy(x->scales, from + codes, 4);
    return MOQ_OK;
}

/* The blocks that a search has chosen are kept until the codes have been written: searching twice would cost far more. */
static moq_result moqi_keep_search(moqi_export *x, moqi_target *t, const moq_encode_desc *d, moq_error *err)
{
    uint64_t n = (uint64_t)d->rows * (uint64_t)(d->cols / 16);
    if (t->cast && !t->kept) {
        t->kept_bytes = n * sizeof(float);
        t->kept = (float *)moq_allocate(&x->plan.desc->allocator, (size_t)t->kept_bytes);
        if (!t->kept) return moqi_nomem(err, t->kept_bytes);
    }
    if (t->cast) return MOQ_OK;
    if (t->search == MOQ_SEARCH_MAX || t->amax || t->w.experts > 0) return MOQ_OK;
    t->kept_bytes = n * sizeof(float);
    t->kept = (float *)moq_allocate(&x->plan.desc->allocator, (size_t)t->kept_bytes);
    t->amax = t->kept;
    return t->kept ? moq_find_amax(d, t->kept, NULL, err) : moqi_nomem(err, t->kept_bytes);
}

/* Memory of a search goes back as soon as its codes are written. */
static void moqi_drop_search(const moqi_export *x, moqi_target *t)
{
    if (!t->kept) return;
    moq_release(&x->plan.desc->allocator, t->kept, (size_t)t->kept_bytes);
    t->kept = NULL;
    t->amax = NULL;
}

/* Block amax values of expert k (0: of the layer) for a cast without loss; says once where it is not without loss. */
static moq_result moqi_cast_expert(const moqi_export *x, moqi_target *t, int32_t k, moq_encode_desc *d, int tell, moq_error *err)
{
    const moq_quantize_desc *q = x->plan.desc;
    moq_linear w = t->w;
    moq_open_desc log;
    moq_result r = w.experts > 0 ? moq_slice_expert(&t->w, k, &w, err) : MOQ_OK;
    if (r != MOQ_OK) return r;
    int64_t lost = moqi_cast_blocks(t, &w, (const float *)d->data, t->kept);
    d->amax = t->kept;
    memset(&log, 0, sizeof log);
    log.log = q->log;
    log.log_user = q->log_user;
    if (lost && tell)
        moqi_log(&log, MOQ_LOG_WARNING, MOQ_OK, moqi_at(NULL, "layer", t->name, -1), "%lld of %lld blocks (expert %d) lie more than 2^17 below the largest one and are "
                 "rounded; all others keep their codes", (long long)lost, (long long)(w.rows * (w.cols / 16)), (int)k);
    return MOQ_OK;
}

/* Scales, and with `codes` the codes, of one target into x->scales and x->codes, unless they are there already. A file holds all scales
   of a shard before its codes, so scales are made alone first, which costs one look at the weight. */
static moq_result moqi_encode_target(moqi_export *x, size_t index, int codes, moq_error *err)
{
    moqi_target *t = &x->plan.targets[index];
    const moq_allocator *a = &x->plan.desc->allocator;
    int32_t experts = t->w.experts > 0 ? t->w.experts : 1;
    moq_encode_desc d;
    float *spare = NULL;
    uint64_t spare_bytes = 0;
    if (x->encoded == index && (x->with_codes || !codes)) return MOQ_OK;
    x->encoded = SIZE_MAX;
    moq_result r = MOQ_OK;
    for (int32_t k = 0; k < experts && r == MOQ_OK; k++) {
        r = moqi_encode_source(&x->plan, t, k, &d, err);
        float one = t->global_amax;
        d.global_amax = t->global_amax;
        if (r == MOQ_OK) r = moqi_keep_search(x, t, &d, err);
        d.amax = t->amax;
        if (r == MOQ_OK && t->cast) r = moqi_cast_expert(x, t, k, &d, codes, err);
        if (moqi_is_one_block(t) && one > 0) d.amax = &one;
        if (r == MOQ_OK && k == 0) {
            r = moq_encode_bytes(&d, &x->code_bytes, &x->scale_bytes, err);
            if (r == MOQ_OK) r = moqi_room(a, &x->codes, &x->code_room, x->code_bytes * (uint64_t)experts, err);
            if (r == MOQ_OK) r = moqi_room(a, &x->scales, &x->scale_room, x->scale_bytes * (uint64_t)experts + 16, err);
        }
        if (r == MOQ_OK && t->w.experts == 0) r = moq_encode(&d, codes ? x->codes : NULL, x->scales, NULL, err);
        if (r != MOQ_OK || t->w.experts == 0) continue;
        if (!spare) {
            spare_bytes = (uint64_t)d.rows * (uint64_t)d.cols * sizeof(float);
            spare = (float *)moq_allocate(a, (size_t)spare_bytes);
            if (!spare) r = moqi_nomem(err, spare_bytes);
        }
        if (r == MOQ_OK) r = moqi_encode_expert(x, t, k, &d, spare, err);
    }
    moq_release(a, spare, (size_t)spare_bytes);
    if (r == MOQ_OK) x->encoded = index;
    x->with_codes = codes || t->w.experts > 0;
    if (codes || r != MOQ_OK) moqi_drop_search(x, t);
    return r;
}

/* A target of a quantized source that stays unquantized: BF16, stacks as [experts, in, out]. */
static moq_result moqi_decode_target(moqi_export *x, size_t index, moq_error *err)
{
    const moqi_target *t = &x->plan.targets[index];
    const moq_allocator *a = &x->plan.desc->allocator;
    int64_t experts = t->w.experts > 0 ? t->w.experts : 1, rows = t->w.rows, cols = t->w.cols;
    moq_result r = moqi_room(a, &x->codes, &x->code_room, (uint64_t)(experts * rows * cols) * 2, err);
    float *row = (float *)moq_allocate(a, (size_t)cols * sizeof *row);
    x->encoded = SIZE_MAX;
    if (r == MOQ_OK && !row) r = moqi_nomem(err, (uint64_t)cols * sizeof *row);
    for (int64_t i = 0; i < experts * rows && r == MOQ_OK; i++) {
        moq_dequantize(&t->w, i, 1, row);
        for (int64_t c = 0; c < cols; c++) {
            int64_t at = t->w.experts > 0 ? (i / rows * cols + c) * rows + i % rows : i * cols + c;
            uint16_t v = moq_bf16_encode(row[c]);
            x->codes[2 * at] = (uint8_t)v;
            x->codes[2 * at + 1] = (uint8_t)(v >> 8);
        }
    }
    moq_release(a, row, (size_t)cols * sizeof *row);
    return r;
}

/* ---- layers as pieces ---- */

/* A target as a layer over the encoder's output; without data while nothing is encoded yet. */
static void moqi_made_linear(const moqi_export *x, const moqi_target *t, moq_linear *w)
{
    const moq_coding *c = &t->recipe->scheme.weight;
    int bits = moq_dtype_bits(c->elem), rows = c->elem == MOQ_I4;
    int64_t groups = c->group_cols > 0 ? moqi_ceil_div(t->w.cols, c->group_cols) : 1;
    memset(w, 0, sizeof *w);
    w->name = t->name;
    w->rows = t->w.rows;
    w->cols = t->w.cols;
    w->experts = t->w.experts;
    w->row_step = 1;
    w->scheme = t->recipe->scheme;
    w->scheme.pre_quant_scale = t->out_p != NULL;
    w->packing = moqi_make_packing(bits, 8, rows, rows ? w->cols : w->cols * bits / 8, 1);
    w->codes.data = x->codes;
    w->scales.data = x->scales;
    w->scales.dtype = c->scale;
    w->scale_row_stride = c->group_rows == MOQ_ALL ? 0 : groups;
    w->scale_col_stride = c->group_cols == MOQ_ALL ? 0 : 1;
    w->global_mul = c->has_global && c->elem == MOQ_F4 ? moqi_global_scale(&w->scheme, t->search, t->global_amax) : 1;
    w->global_div = 1;
    if (moqi_has_input_scale(t->recipe)) w->input_scale = moqi_target_input(t);
}

/* The layer that the pieces of a target are made of: kept as the source has it, or encoded. */
static moq_result moqi_piece_source(moqi_export *x, const moqi_out *o, moq_linear *w, moq_error *err)
{
    const moqi_target *t = &x->plan.targets[o->target];
    *w = t->w;
    if (!t->recipe) return MOQ_OK;
    moq_result r = moqi_encode_target(x, o->target, o->piece.what != MOQI_PIECE_SCALES, err);
    moqi_made_linear(x, t, w);
    return r;
}

/* All tensors of a target as pieces. */
static moq_result moqi_add_pieces(moqi_export *x, size_t index, moq_error *err)
{
    const moqi_target *t = &x->plan.targets[index];
    moqi_form *f = &x->forms[index];
    moqi_piece list[MOQI_MAX_PIECES];
    moq_dtype model = t->w.scales.dtype == MOQ_F16 ? MOQ_F16 : t->model;
    moq_linear w = t->w;
    if (t->recipe) {
        moqi_made_linear(x, t, &w);
        w.codes.data = w.scales.data = NULL;
    }
    moq_result r = moqi_find_form(x->container, &w, model, f, err);
    moq_family family = moq_get_info(x->plan.ck)->family;
    f->raw = !t->recipe && family == (x->container == MOQI_COMPRESSED ? MOQ_FAMILY_COMPRESSED_TENSORS : MOQ_FAMILY_MODELOPT);
    int n = r == MOQ_OK && !f->raw ? moqi_list_pieces(f, &w, list) : 0;
    for (int i = 0; i < n && r == MOQ_OK; i++) {
        moqi_piece *p = &list[i];
        char stack[32];
        moqi_format(stack, sizeof stack, "_%s", p->ending + 1);
        const char *ending = !f->stack ? p->ending : p->what == MOQI_PIECE_CODES ? "" : stack;
        if (p->what == MOQI_PIECE_GLOBAL || p->what == MOQI_PIECE_INPUT) {
            r = moqi_add_values(x, t->name, ending, p->dtype, p->rank, p->shape, &p->value, err);
            continue;
        }
        moqi_out *o = moqi_add_out(x, t->name, ending, p->dtype, p->rank, p->shape);
        uint8_t *data = o ? (uint8_t *)moqi_take(&x->arena, 16, 16) : NULL;
        if (!data) return moqi_nomem(err, sizeof *o);
        o->target = index;
        o->piece = *p;
        if (p->what < MOQI_PIECE_GLOBAL) { o->what = MOQI_OUT_PIECE; continue; }
        o->t.data = data;
        memset(data, 0, 16);
        if (p->what == MOQI_PIECE_INPUT_ZERO) data[0] = (uint8_t)(int)p->value;
        for (int k = 0; p->what == MOQI_PIECE_SHAPE && k < 8; k++) {
            data[k] = (uint8_t)((uint64_t)w.rows >> (8 * k));
            data[8 + k] = (uint8_t)((uint64_t)w.cols >> (8 * k));
        }
    }
    return r;
}

/* ---- shards ---- */

/* Progress, and the place where a caller can stop the work. */
static moq_result moqi_tell(moqi_export *x, uint64_t more, moq_error *err)
{
    const moq_quantize_desc *d = x->plan.desc;
    x->done += more;
    if (d->progress && d->progress(d->progress_user, MOQ_STAGE_QUANTIZE, x->done, x->total))
        return moqi_fail(err, MOQ_E_CANCELLED, moqi_at(moqi_base_name(d->target), NULL, NULL, -1), "stopped; nothing was written");
    return MOQ_OK;
}

/* Some bytes to the file, 64 MB at a time, so that cancelling is heard. */
static moq_result moqi_put_bytes(moqi_export *x, moqi_writer *w, const uint8_t *p, uint64_t bytes, moq_error *err)
{
    moq_result r = MOQ_OK;
    for (uint64_t at = 0, step; at < bytes && r == MOQ_OK; at += step) {
        step = (uint64_t)moqi_min((int64_t)(bytes - at), 64 << 20);
        r = moqi_writer_put(w, p + at, (size_t)step, err);
        if (r == MOQ_OK) r = moqi_tell(x, step, err);
    }
    return r;
}

/* A piece, expert by expert or in bands of rows of about band_bytes, so that memory does not grow with the layer. */
static moq_result moqi_put_pieces(moqi_export *x, moqi_writer *file, const moqi_out *o, moq_error *err)
{
    const moqi_form *f = &x->forms[o->target];
    const moq_allocator *a = &x->plan.desc->allocator;
    moq_linear w, one;
    moq_result r = moqi_piece_source(x, o, &w, err);
    int rows = !f->stack && o->piece.what <= MOQI_PIECE_SCALES && o->t.rank > 0 && (o->piece.what == MOQI_PIECE_CODES || o->t.shape[0] > 1);
    int64_t parts = f->stack && o->t.rank > 0 ? w.experts : 1, band = w.rows;
    if (r != MOQ_OK) return r;
    if (rows) band = moqi_max(128, (int64_t)(x->band_bytes / (o->t.bytes / (uint64_t)w.rows + 1)) / 128 * 128);
    if (rows) parts = moqi_ceil_div(w.rows, band);
    /* rows of the layer in a line of the piece: one, a pair, or those of a block */
    int64_t lines = rows ? (int64_t)o->t.shape[0] : 1, unit = f->scheme.weight.group_rows;
    if (lines == w.rows) unit = 1;
    else if (o->piece.what == MOQI_PIECE_CODES) unit = 2;
    int16_t *q = (int16_t *)moq_allocate(a, (size_t)w.cols * sizeof *q);
    if (!q) return moqi_nomem(err, (uint64_t)w.cols * sizeof *q);
    for (int64_t i = 0; i < parts && r == MOQ_OK; i++) {
        int64_t count = moqi_min(band, w.rows - i * band);
        uint64_t bytes = o->t.bytes / (uint64_t)parts;
        one = w;
        if (f->stack) r = moq_slice_expert(&w, (int32_t)i, &one, err);
        else if (rows) {
            bytes = o->t.bytes / o->t.shape[0] * (uint64_t)moqi_ceil_div(count, unit);
            r = moq_slice_rows(&w, i * band, count, 1, &one, err);
        }
        if (r == MOQ_OK) r = moqi_room(a, &x->pieces, &x->piece_room, bytes, err);
        if (r == MOQ_OK) moqi_store_piece(f, &o->piece, &one, q, x->pieces, bytes);
        if (r == MOQ_OK) r = moqi_put_bytes(x, file, x->pieces, bytes, err);
    }
    moq_release(a, q, (size_t)w.cols * sizeof *q);
    return r;
}

/* The bytes of one tensor: copied from the source's mapping, or made now. */
static moq_result moqi_put_out(moqi_export *x, moqi_writer *w, const moqi_out *o, moq_error *err)
{
    const void *data = o->t.data;
    moq_result r = MOQ_OK;
    if (o->what == MOQI_OUT_PIECE) return moqi_put_pieces(x, w, o, err);
    if (o->what == MOQI_OUT_FLOAT) r = moqi_decode_target(x, o->target, err);
    else if (o->what != MOQI_OUT_DATA) r = moqi_encode_target(x, o->target, o->what == MOQI_OUT_CODES, err);
    if (r != MOQ_OK) return r;
    if (o->what != MOQI_OUT_DATA) data = o->what == MOQI_OUT_SCALES ? x->scales : x->codes;
    return moqi_put_bytes(x, w, (const uint8_t *)data, o->t.bytes, err);
}

/* The order of the safetensors library: dtype, widest first and in its own order among equals, then name. */
static int moqi_outs_by_file(const void *a, const void *b)
{
    const moq_tensor *x = (const moq_tensor *)a, *y = (const moq_tensor *)b;
    return moq_dtype_bits(x->dtype) == moq_dtype_bits(y->dtype) && x->dtype != y->dtype ? (int)y->dtype - (int)x->dtype : moqi_st_by_width(a, b);
}

/* One file: tensors [first, last) of the list, which is in the order of names. */
static moq_result moqi_write_shard(moqi_export *x, const char *file, size_t first, size_t last, moq_error *err)
{
    static const char *const metadata[] = {"format", "pt"};
    const moq_allocator *a = &x->plan.desc->allocator;
    size_t n = last - first;
    uint64_t bytes = 0;
    char path[4096 + 120];
    moqi_json_out header;
    moqi_writer w;
    moqi_arena r0 = moqi_arena_make(a);
    const moq_tensor **sorted = (const moq_tensor **)moqi_take_array(&r0, (uint64_t)n + 1, 2 * sizeof(void *));
    moq_result r = sorted ? MOQ_OK : moqi_nomem(err, (uint64_t)n * 16);
    moqi_json_out_make(&header, a, 0);
    w.file = -1;
    if (r == MOQ_OK) {
        for (size_t i = 0; i < n; i++) {
            sorted[i] = &x->outs[first + i].t;
            bytes += sorted[i]->bytes;
        }
        moqi_sort((const void **)sorted, (const void **)sorted + n, n, moqi_outs_by_file);
        moqi_st_build(&header, sorted, n, metadata, 1);
        r = header.failed == MOQ_OK ? moqi_st_proofread(&header.b, bytes, file, err) : moqi_nomem(err, header.b.bytes);
    }
    moqi_format(path, sizeof path, "%s/%s", x->temp, file);
    if (r == MOQ_OK) r = moqi_writer_open(&w, path, err);
    if (r == MOQ_OK) r = moqi_writer_put(&w, header.b.data, header.b.bytes, err);
    for (size_t i = 0; i < n && r == MOQ_OK; i++) r = moqi_put_out(x, &w, (const moqi_out *)(const void *)sorted[i], err);
    if (r == MOQ_OK) r = moqi_writer_commit(&w, err);
    else if (w.file != -1) moqi_writer_abort(&w);
    moqi_buffer_drop(&header.b);
    moqi_arena_drop(&r0);
    return r;
}

static int moqi_outs_by_name(const void *a, const void *b) { return strcmp(((const moqi_out *)a)->t.name, ((const moqi_out *)b)->t.name); }

/* Sorts the list by name, so that layers stay together, and says where shard `from` ends. */
static size_t moqi_shard_end(const moqi_export *x, size_t from)
{
    uint64_t limit = x->plan.desc->shard_bytes ? x->plan.desc->shard_bytes : 10000000000u, bytes = 0;
    size_t i = from;
    for (; i < x->count; i++) {
        if (bytes > 0 && bytes + x->outs[i].t.bytes > limit) break;
        bytes += x->outs[i].t.bytes;
    }
    return i;
}

/* The list by name, the sum of bytes, the number of shards. */
static moq_result moqi_sort_outs(moqi_export *x, moq_error *err)
{
    size_t n = x->count;
    const void **list = (const void **)moqi_take_array(&x->arena, (uint64_t)n + 1, 2 * sizeof(void *));
    moqi_out *sorted = (moqi_out *)moqi_take_array(&x->arena, (uint64_t)n + 1, sizeof *sorted);
    if (!list || !sorted) return moqi_nomem(err, (uint64_t)n * sizeof *sorted);
    for (size_t i = 0; i < n; i++) list[i] = &x->outs[i];
    moqi_sort(list, list + n, n, moqi_outs_by_name);
    for (size_t i = 0; i < n; i++) sorted[i] = *(const moqi_out *)list[i];
    x->outs = sorted;
    for (size_t i = 0; i < n; i++) x->total += sorted[i].t.bytes;
    for (size_t i = 0; i < n; i = moqi_shard_end(x, i)) x->shards++;
    return MOQ_OK;
}

/* Names as the transformers library numbers them. */
static void moqi_shard_name(const moqi_export *x, uint32_t number, char *text, size_t capacity)
{
    if (x->shards == 1) moqi_format(text, capacity, "model.safetensors");
    else moqi_format(text, capacity, "model-%05u-of-%05u.safetensors", number, x->shards);
}

/* Writes finished JSON text and drops it. */
static moq_result moqi_write_json(moqi_export *x, const char *file, moqi_json_out *o, moq_error *err)
{
    char path[4096 + 120];
    moq_result r = o->failed == MOQ_OK ? MOQ_OK : moqi_fail(err, o->failed, moqi_at(file, NULL, NULL, -1), "cannot be composed");
    moqi_format(path, sizeof path, "%s/%s", x->temp, file);
    if (r == MOQ_OK) r = moq_write_file(path, o->b.data, o->b.bytes, err);
    moqi_buffer_drop(&o->b);
    return r;
}

/* All files, and the index when there is more than one. */
static moq_result moqi_write_shards(moqi_export *x, moq_error *err)
{
    moqi_json_out index;
    char file[64];
    moq_result r = MOQ_OK;
    uint32_t number = 0;
    moqi_json_out_make(&index, &x->plan.desc->allocator, 1);
    moqi_json_begin(&index, '{');
    moqi_json_put_key(&index, "metadata");
    moqi_json_begin(&index, '{');
    moqi_json_put_key(&index, "total_size");
    moqi_json_put_u64(&index, x->total);
    moqi_json_end(&index, '}');
    moqi_json_put_key(&index, "weight_map");
    moqi_json_begin(&index, '{');
    for (size_t i = 0, end; i < x->count && r == MOQ_OK; i = end) {
        end = moqi_shard_end(x, i);
        moqi_shard_name(x, ++number, file, sizeof file);
        for (size_t k = i; k < end; k++) {
            moqi_json_put_key(&index, x->outs[k].t.name);
            moqi_json_put_string(&index, file);
        }
        r = moqi_write_shard(x, file, i, end, err);
    }
    moqi_json_end(&index, '}');
    moqi_json_end(&index, '}');
    if (r == MOQ_OK && x->shards > 1) return moqi_write_json(x, "model.safetensors.index.json", &index, err);
    moqi_buffer_drop(&index.b);
    return r;
}


/* ------------------------------------------------------------------------------------------------
   >>describe        hf_quant_config.json and config.json as ModelOpt writes them
   Equal up to the order of keys; names are those of the tensors, also where ModelOpt's renaming leaves debris (Nemotron-H).
   ------------------------------------------------------------------------------------------------ */

/* Two texts say the same: hf_quant_config.json in ModelOpt's own words, quantization_config in the words of its converter. Which
   modules are excluded is computed from what was not quantized, not from the patterns of the recipe. */
/* ---- units: modules, and containers of experts ---- */

/* The unit that a target belongs to in the description: experts count as one container. */
static const char *moqi_unit_name(moqi_export *x, const moqi_target *t)
{
    size_t n;
    uint32_t number;
    const char *leaf;
    if (t->w.experts > 0) n = (size_t)(moqi_last_part(t->name) - t->name) - 1;
    else if (!moqi_expert_name(t->name, &n, &number, &leaf)) return t->name;
    return moqi_take_text(&x->arena, t->name, n);
}

/* Where a unit stands in the model: config groups are numbered in that order. Heads come last, attention before the rest of a layer. */
static int64_t moqi_unit_place(const char *name)
{
    static const char *const parts[] = {"q_proj", "q_a_proj", "q_b_proj", "k_proj", "kv_a_proj_with_mqa", "kv_b_proj", "v_proj", "o_proj", "experts", "gate_proj",
                                        "up_proj", "down_proj"};
    const char *at = strstr(name, "layers.");
    int64_t n = 0, part = (int64_t)MOQI_COUNT(parts);
    if (!at) return INT64_MAX;
    for (at += 7; *at >= '0' && *at <= '9' && n < 1000000; at++) n = n * 10 + (*at - '0');
    for (size_t i = 0; i < MOQI_COUNT(parts); i++)
        if (strcmp(moqi_last_part(name), parts[i]) == 0) part = (int64_t)i;
    return n * 64 + part;
}

static int moqi_units_by_place(const void *a, const void *b)
{
    int64_t x = ((const moqi_unit *)a)->place, y = ((const moqi_unit *)b)->place;
    return x < y ? -1 : x > y;
}

static int moqi_units_by_order(const void *a, const void *b) { return strcmp(((const moqi_unit *)a)->order, ((const moqi_unit *)b)->order); }

/* Adds a unit; a unit of several targets counts as quantized when one of them is. */
static moq_result moqi_add_unit(moqi_export *x, const char *name, const moq_scheme *scheme, const char *algo, moq_error *err)
{
    char text[MOQ_MAX_NAME_BYTES + 16];
    if (!name) return moqi_nomem(err, MOQ_MAX_NAME_BYTES);
    moqi_unit *u = x->unit_count ? &x->units[x->unit_count - 1] : NULL;
    if (u && strcmp(u->name, name) == 0) {
        if (scheme && !u->scheme) x->unit_count--;
        else return MOQ_OK;
    }
    moqi_memory_name(&x->plan, name, text, sizeof text);
    u = &x->units[x->unit_count++];
    u->name = name;
    u->scheme = scheme;
    u->algo = algo;
    u->place = moqi_unit_place(name);
    u->order = moqi_take_text(&x->arena, text, strlen(text));
    return u->order ? MOQ_OK : moqi_nomem(err, strlen(text));
}

/* All units, sorted. Gemma's scaled embedding is of a class that ModelOpt does not know; a tied head has no tensor but is listed. */
static moq_result moqi_make_units(moqi_export *x, moq_error *err)
{
    const moqi_plan *p = &x->plan;
    moq_result r = MOQ_OK;
    size_t room = moq_tensor_count(p->ck) + p->count + 2;
    const void **list = (const void **)moqi_take_array(&x->arena, room, 2 * sizeof(void *));
    moqi_unit *sorted = (moqi_unit *)moqi_take_array(&x->arena, room, sizeof *sorted);
    x->units = (moqi_unit *)moqi_take_array(&x->arena, room, sizeof *x->units);
    if (!list || !sorted || !x->units) return moqi_nomem(err, (uint64_t)room * sizeof *sorted);
    for (size_t i = 0; i < p->count && r == MOQ_OK; i++) {
        const moqi_target *t = &p->targets[i];
        if (t->embedding && moqi_starts(moq_get_info(p->ck)->model_type, "gemma")) continue;
        const moqi_form *f = &x->forms[i];
        const char *algo = t->recipe ? t->recipe->algo : f->algo;
        if (t->recipe && (t->expert || t->w.experts > 0) && strcmp(algo, "NVFP4_AWQ") == 0) algo = "NVFP4"; /* experts are not smoothed */
        r = moqi_add_unit(x, moqi_unit_name(x, t), t->recipe ? &t->recipe->scheme : f->algo ? &f->scheme : NULL, algo, err);
    }
    for (size_t i = 0; i < moq_tensor_count(p->ck) && r == MOQ_OK; i++) { /* convolutions */
        const moq_tensor *t = moq_get_tensor(p->ck, i);
        if (t->rank < 3 || !moqi_ends(t->name, ".weight") || moqi_map_find(&p->map, t->name, t->name_bytes - 7u)) continue;
        r = moqi_add_unit(x, moqi_take_text(&x->arena, t->name, t->name_bytes - 7u), NULL, NULL, err);
    }
    int tied = 0;
    moq_json_bool(moq_json_find(moq_get_config(p->ck), "tie_word_embeddings"), &tied);
    if (r == MOQ_OK && (tied || moqi_starts(moq_get_info(p->ck)->model_type, "gemma")) && !moqi_map_find(&p->map, "lm_head", 7))
        r = moqi_add_unit(x, "lm_head", NULL, NULL, err);
    for (size_t i = 0; i < x->unit_count; i++) list[i] = &x->units[i];
    moqi_sort(list, list + room, x->unit_count, moqi_units_by_order);
    for (size_t i = 0; i < x->unit_count; i++) sorted[i] = *(const moqi_unit *)list[i];
    for (size_t i = 0; i < x->unit_count; i++) list[i] = &sorted[i];
    moqi_sort(list, list + room, x->unit_count, moqi_units_by_place);
    x->by_place = (const moqi_unit **)list;
    x->units = sorted;
    return r;
}

/* Length of the shortest dotted prefix whose pattern hits no quantized unit; 0: the whole name. *dot: the pattern is "prefix.*". */
static size_t moqi_exclude_prefix(const moqi_export *x, const char *name, int *dot)
{
    for (size_t n = 1; name[n]; n++) {
        int star = 0, dotted = 0;
        if (name[n] != '.') continue;
        for (size_t i = 0; i < x->unit_count; i++) {
            if (!x->units[i].scheme || strncmp(x->units[i].name, name, n) != 0) continue;
            star = 1;
            dotted |= x->units[i].name[n] == '.' || x->units[i].name[n] == 0;
        }
        *dot = star;
        if (!star || !dotted) return n;
    }
    return 0;
}

/* exclude_modules / ignore: exact names, or prefix patterns shared by neighbours. */
static void moqi_put_excludes(moqi_export *x, moqi_json_out *o)
{
    char text[MOQ_MAX_NAME_BYTES + 8], before[MOQ_MAX_NAME_BYTES + 8] = "";
    moqi_json_begin(o, '[');
    for (size_t i = 0; i < x->unit_count; i++) {
        int dot = 0;
        if (x->units[i].scheme) continue;
        size_t n = moqi_exclude_prefix(x, x->units[i].name, &dot);
        if (n) moqi_format(text, sizeof text, "%.*s%s", (int)n, x->units[i].name, dot ? ".*" : "*");
        else moqi_format(text, sizeof text, "%s", x->units[i].name);
        if (strcmp(text, before) == 0) continue;
        moqi_json_put_string(o, text);
        memcpy(before, text, sizeof before);
    }
    moqi_json_end(o, ']');
}

/* What a quant_algo carries in the description, and the groups that ModelOpt prints for it: bits and type of inputs and weights ('f'
   float, 'i' integer), with group_size or not. Several are wrong as descriptions; readers go by the algorithm and the tensors. */
typedef struct moqi_algo_json {
    const char *algo;
    int group, flags;                 /* group_size; has_zero_point and pre_quant_scale */
    int uniform;                      /* config_groups also when all modules are alike */
    int in_bits; char in_type; int in_group;
    int w_bits; char w_type; int w_group, channel;
} moqi_algo_json;

static const moqi_algo_json moqi_algo_jsons[] = {
    {"FP8", 0, 0, 1, 8, 'f', 0, 8, 'f', 0, 0},
    {"FP8_PER_CHANNEL_PER_TOKEN", 0, 0, 0, 8, 'f', 0, 8, 'f', 0, 1},
    {"NVFP4", 1, 0, 1, 4, 'f', 1, 4, 'f', 1, 0},
    {"W4A16_AWQ", 1, 1, 0, 0, 0, 0, 4, 'i', 1, 0},
    {"W4A16_NVFP4", 1, 0, 1, 0, 0, 0, 4, 'f', 1, 0},
    {"NVFP4_SVD", 1, 1, 1, 4, 'f', 1, 4, 'f', 1, 0},
    {"NVFP4_AWQ", 1, 1, 0, 8, 'f', 1, 4, 'f', 1, 0},
    {"W4A8_AWQ", 1, 1, 0, 8, 'f', 1, 4, 'f', 1, 0},
    {"W8A16", 0, 0, 0, 0, 0, 0, 8, 'i', 0, 0},
    {"W8A8_SQ_PER_CHANNEL", 0, 0, 0, 8, 'i', 0, 8, 'i', 0, 1},
    {"W4A8_NVFP4_FP8", 1, 0, 0, 8, 'f', 0, 4, 'f', 1, 0},
    {"W4A8_MXFP4_FP8", 1, 0, 0, 8, 'f', 0, 4, 'f', 1, 0},
    {"MXFP8", 1, 0, 0, 8, 'f', 1, 8, 'f', 1, 0},
    {"MXFP6_E3M2", 1, 0, 0, 6, 'f', 1, 6, 'f', 1, 0},
    {"MXFP6_E2M3", 1, 0, 0, 6, 'f', 1, 6, 'f', 1, 0},
    {"MXINT8", 1, 0, 0, 8, 'i', 1, 8, 'i', 1, 0}
};

/* NULL for the lower-case names that fall through ModelOpt's table (mxfp4, fp8_pb_wo): they carry nothing but themselves. */
static const moqi_algo_json *moqi_find_algo_json(const char *algo)
{
    for (size_t i = 0; i < MOQI_COUNT(moqi_algo_jsons); i++)
        if (strcmp(moqi_algo_jsons[i].algo, algo) == 0) return &moqi_algo_jsons[i];
    return NULL;
}

/* ModelOpt compares whole entries: NVFP4 with groups of 16 beside NVFP4 with groups of 32 is already mixed precision. */
static int moqi_same_entry(const moqi_unit *a, const moqi_unit *b)
{
    const moqi_algo_json *j = moqi_find_algo_json(a->algo);
    return strcmp(a->algo, b->algo) == 0 && (!j || !j->group || a->scheme->weight.group_cols == b->scheme->weight.group_cols);
}

/* group_size, has_zero_point, pre_quant_scale of an algorithm. */
static void moqi_put_entry(moqi_json_out *o, const moqi_unit *u)
{
    const moqi_algo_json *j = moqi_find_algo_json(u->algo);
    if (j && j->group) {
        moqi_json_put_key(o, "group_size");
        moqi_json_put_int(o, u->scheme->weight.group_cols);
    }
    if (j && j->flags) {
        moqi_json_put_key(o, "has_zero_point");
        moqi_json_put_bool(o, 0);
        moqi_json_put_key(o, "pre_quant_scale");
        moqi_json_put_bool(o, 1);
    }
}

/* "dynamic" is false for every format, also where scales are found at run time. */
static void moqi_put_numbers(moqi_json_out *o, const char *key, int bits, char type, int group, int channel)
{
    moqi_json_put_key(o, key);
    moqi_json_begin(o, '{');
    if (channel) {
        moqi_json_put_key(o, "strategy");
        moqi_json_put_string(o, "channel");
    }
    moqi_json_put_key(o, "dynamic");
    moqi_json_put_bool(o, 0);
    moqi_json_put_key(o, "num_bits");
    moqi_json_put_int(o, bits);
    moqi_json_put_key(o, "type");
    moqi_json_put_string(o, type == 'i' ? "int" : "float");
    if (group) {
        moqi_json_put_key(o, "group_size");
        moqi_json_put_int(o, group);
    }
    moqi_json_end(o, '}');
}

/* One config group for all units that are like `u`; targets "Linear" when everything is. */
static void moqi_put_config_group(moqi_export *x, moqi_json_out *o, const moqi_unit *u, int mixed)
{
    const moqi_algo_json *j = moqi_find_algo_json(u->algo);
    int group = u->scheme->weight.group_cols;
    moqi_json_begin(o, '{');
    if (!j) {
        moqi_json_put_key(o, "quant_algo");
        moqi_json_put_string(o, u->algo);
    } else {
        if (j->in_bits) moqi_put_numbers(o, "input_activations", j->in_bits, j->in_type, j->in_group ? group : 0, 0);
        moqi_put_numbers(o, "weights", j->w_bits, j->w_type, j->w_group ? group : 0, j->channel);
        if (strcmp(u->algo, "NVFP4_SVD") == 0) {
            moqi_json_put_key(o, "has_zero_point");
            moqi_json_put_bool(o, 0);
            moqi_json_put_key(o, "pre_quant_scale");
            moqi_json_put_bool(o, 1);
        }
    }
    moqi_json_put_key(o, "targets");
    moqi_json_begin(o, '[');
    if (!mixed) moqi_json_put_string(o, "Linear");
    for (size_t i = 0; mixed && i < x->unit_count; i++)
        if (x->units[i].scheme && moqi_same_entry(&x->units[i], u)) moqi_json_put_string(o, x->units[i].name);
    moqi_json_end(o, ']');
    moqi_json_end(o, '}');
}

/* The first quantized unit, and whether others differ from it. */
static const moqi_unit *moqi_first_unit(const moqi_export *x, int *mixed)
{
    const moqi_unit *first = NULL;
    *mixed = 0;
    for (size_t i = 0; i < x->unit_count; i++) {
        if (!x->units[i].scheme) continue;
        if (!first) first = &x->units[i];
        else if (!moqi_same_entry(first, &x->units[i])) *mixed = 1;
    }
    return first;
}

/* Everything that is not in this map is unquantized; there is no exclude list beside it. */
static void moqi_put_layers(moqi_export *x, moqi_json_out *o)
{
    moqi_json_put_key(o, "quantized_layers");
    moqi_json_begin(o, '{');
    for (size_t i = 0; i < x->unit_count; i++) {
        if (!x->units[i].scheme) continue;
        moqi_json_put_key(o, x->units[i].name);
        moqi_json_begin(o, '{');
        moqi_json_put_key(o, "quant_algo");
        moqi_json_put_string(o, x->units[i].algo);
        moqi_put_entry(o, &x->units[i]);
        moqi_json_end(o, '}');
    }
    moqi_json_end(o, '}');
}

/* Consumers compare the version to choose among old spellings; 0.47.0 is the release whose files these are. */
static void moqi_put_producer(moqi_json_out *o)
{
    moqi_json_put_key(o, "producer");
    moqi_json_begin(o, '{');
    moqi_json_put_key(o, "name");
    moqi_json_put_string(o, "modelopt");
    moqi_json_put_key(o, "version");
    moqi_json_put_string(o, "0.47.0");
    moqi_json_end(o, '}');
}

/* Written only when weights or the KV cache are quantized. Without quantized weights the map is there and empty. */
static moq_result moqi_write_hf_quant(moqi_export *x, moq_error *err)
{
    moqi_json_out o;
    int mixed;
    const moqi_unit *u = moqi_first_unit(x, &mixed);
    if ((!u && !x->kv_algo) || x->container == MOQI_COMPRESSED) return MOQ_OK;
    moqi_json_out_make(&o, &x->plan.desc->allocator, 1);
    moqi_json_begin(&o, '{');
    moqi_put_producer(&o);
    moqi_json_put_key(&o, "quantization");
    moqi_json_begin(&o, '{');
    moqi_json_put_key(&o, "quant_algo");
    if (u) moqi_json_put_string(&o, mixed ? "MIXED_PRECISION" : u->algo);
    else moqi_json_put_null(&o);
    moqi_json_put_key(&o, "kv_cache_quant_algo");
    if (x->kv_algo) moqi_json_put_string(&o, x->kv_algo);
    else moqi_json_put_null(&o);
    if (!u || mixed) moqi_put_layers(x, &o);
    else {
        moqi_put_entry(&o, u);
        moqi_json_put_key(&o, "exclude_modules");
        moqi_put_excludes(x, &o);
    }
    moqi_json_end(&o, '}');
    moqi_json_end(&o, '}');
    return moqi_write_json(x, "hf_quant_config.json", &o, err);
}

/* quantization_config of config.json: ModelOpt's converted form of the same. */
static void moqi_put_config(moqi_export *x, moqi_json_out *o)
{
    int mixed;
    char name[32];
    const moqi_unit *u = moqi_first_unit(x, &mixed);
    const moqi_algo_json *j = u ? moqi_find_algo_json(u->algo) : NULL;
    moqi_json_begin(o, '{');
    if (u && (mixed || (j && j->uniform))) {
        const moqi_unit *kinds[64]; /* more than there are recipes and group sizes */
        int n = 0;
        moqi_json_put_key(o, "config_groups");
        moqi_json_begin(o, '{');
        for (size_t i = 0; i < x->unit_count; i++) { /* a group at the first unit of each kind */
            const moqi_unit *next = x->by_place[i];
            int seen = !next->scheme;
            for (int k = 0; k < n && !seen; k++) seen = moqi_same_entry(kinds[k], next);
            if (seen || n == (int)MOQI_COUNT(kinds)) continue;
            moqi_format(name, sizeof name, "group_%d", n);
            kinds[n++] = next;
            moqi_json_put_key(o, name);
            moqi_put_config_group(x, o, next, mixed);
        }
        moqi_json_end(o, '}');
    }
    if (mixed) moqi_put_layers(x, o);
    moqi_json_put_key(o, "ignore");
    if (u && !mixed) moqi_put_excludes(x, o);
    else {
        moqi_json_begin(o, '[');
        moqi_json_end(o, ']');
    }
    if (u) {
        moqi_json_put_key(o, "quant_algo");
        moqi_json_put_string(o, mixed ? "MIXED_PRECISION" : u->algo);
    }
    if (x->kv_algo) {
        moqi_json_put_key(o, "kv_cache_scheme");
        if (strcmp(x->kv_algo, "FP8") != 0) moqi_json_put_string(o, x->kv_algo);
        else {
            moqi_json_begin(o, '{');
            moqi_json_put_key(o, "dynamic");
            moqi_json_put_bool(o, 0);
            moqi_json_put_key(o, "num_bits");
            moqi_json_put_int(o, 8);
            moqi_json_put_key(o, "type");
            moqi_json_put_string(o, "float");
            moqi_json_end(o, '}');
        }
    }
    moqi_put_producer(o);
    moqi_json_put_key(o, "quant_method");
    moqi_json_put_string(o, "modelopt");
    moqi_json_end(o, '}');
}

/* ---- compressed-tensors ---- */

/* null, true, false, numbers, or a string in the way the library prints them. */
static void moqi_put_field(moqi_json_out *o, const char *key, const char *raw, const char *text)
{
    moqi_json_put_key(o, key);
    if (text) moqi_json_put_string(o, text);
    else moqi_json_put_raw(o, raw);
}

/* Arguments of weights or inputs. Observers say how the library's presets would calibrate; no reader needs them. */
static void moqi_put_ct_args(moqi_json_out *o, const moq_coding *c, int input, int act_order)
{
    char number[24];
    int nvfp4 = c->elem == MOQ_F4 && c->has_global, is_int = moqi_is_int(c->elem), group = c->group_rows == 1 && c->group_cols > 0;
    int mx = !is_int && c->scale == MOQ_F8_E8M0 && c->group_cols == 32, one = c->group_rows == MOQ_ALL;
    moqi_json_begin(o, '{');
    if (act_order) moqi_put_field(o, "actorder", NULL, "group");
    if (c->group_rows > 1) {
        moqi_json_put_key(o, "block_structure");
        moqi_json_begin(o, '[');
        moqi_json_put_int(o, c->group_rows);
        moqi_json_put_int(o, c->group_cols);
        moqi_json_end(o, ']');
    }
    moqi_put_field(o, "dynamic", input && c->dynamic ? "true" : "false", input && nvfp4 ? "local" : NULL);
    moqi_format(number, sizeof number, "%d", (int)c->group_cols);
    moqi_put_field(o, "group_size", group ? number : "null", NULL);
    moqi_json_put_key(o, "num_bits");
    moqi_json_put_int(o, moq_dtype_bits(c->elem));
    if (input && (nvfp4 || (one && !c->dynamic && !is_int))) moqi_put_field(o, "observer", NULL, "static_minmax");
    if (nvfp4 || mx) moqi_put_field(o, "scale_dtype", NULL, nvfp4 ? "torch.float8_e4m3fn" : "torch.uint8");
    else if (input && c->scale == MOQ_F8_E8M0) moqi_put_field(o, "scale_dtype", NULL, "torch.float8_e8m0fnu"); /* MXINT8 */
    moqi_put_field(o, "strategy", NULL, nvfp4 ? "tensor_group" : group ? "group" : one ? "tensor" : c->group_rows > 1 ? "block" : input ? "token" : "channel");
    moqi_put_field(o, "symmetric", c->zero_point ? "false" : "true", NULL);
    moqi_put_field(o, "type", NULL, is_int ? "int" : "float");
    moqi_json_end(o, '}');
}

/* Do two layers belong to one group? The type of float scales is no part of the description. */
static int moqi_same_form(const moqi_form *a, const moqi_form *b)
{
    moq_scheme x = a->scheme, y = b->scheme;
    if (moqi_is_float(x.weight.scale) && moqi_is_float(y.weight.scale)) x.weight.scale = y.weight.scale;
    if (moqi_is_float(x.input.scale) && moqi_is_float(y.input.scale)) x.input.scale = y.input.scale;
    x.input.rule = y.input.rule;
    return a->format == b->format && moq_scheme_equal(&x, &y);
}

/* One config group: all layers that are like `f`, by name or as the class. */
static void moqi_put_ct_group(const moqi_export *x, moqi_json_out *o, const moqi_form *f, int named)
{
    const moqi_plan *p = &x->plan;
    moqi_json_begin(o, '{');
    moqi_put_field(o, "format", NULL, moqi_ct_formats[f->format]);
    moqi_json_put_key(o, "input_activations");
    if (f->scheme.input.elem != MOQ_NONE) moqi_put_ct_args(o, &f->scheme.input, 1, 0);
    else moqi_json_put_null(o);
    moqi_put_field(o, "output_activations", "null", NULL);
    moqi_json_put_key(o, "targets");
    moqi_json_begin(o, '[');
    if (!named) moqi_json_put_string(o, "Linear");
    for (size_t i = 0; named && i < p->count; i++)
        if (x->forms[i].algo && moqi_same_form(&x->forms[i], f)) moqi_json_put_string(o, p->targets[i].name);
    moqi_json_end(o, ']');
    moqi_json_put_key(o, "weights");
    moqi_put_ct_args(o, &f->scheme.weight, 0, f->scheme.act_order);
    moqi_json_end(o, '}');
}

/* Names of linear layers that are left as they are; a tied head has no tensor but is one. */
static void moqi_put_ct_ignore(const moqi_export *x, moqi_json_out *o)
{
    const moqi_plan *p = &x->plan;
    int tied = 0;
    moq_json_bool(moq_json_find(moq_get_config(p->ck), "tie_word_embeddings"), &tied);
    moqi_json_put_key(o, "ignore");
    moqi_json_begin(o, '[');
    if ((tied || moqi_starts(moq_get_info(p->ck)->model_type, "gemma")) && !moqi_map_find(&p->map, "lm_head", 7)) moqi_json_put_string(o, "lm_head");
    for (size_t i = 0; i < p->count; i++) {
        const moqi_target *t = &p->targets[i];
        if (!x->forms[i].algo && !t->embedding && t->w.experts == 0) moqi_json_put_string(o, t->name);
    }
    moqi_json_end(o, ']');
}

/* The whole block as release 0.20 of the library writes it. One group of all linear layers where there is one, else groups by name. */
static void moqi_put_ct_config(const moqi_export *x, moqi_json_out *o)
{
    enum { MOST = 64 };
    const moqi_plan *p = &x->plan;
    const moqi_form *groups[MOST];
    int n = 0, named = 0, mixed = 0;
    char name[32];
    for (size_t i = 0; i < p->count; i++) {
        const moqi_form *f = &x->forms[i];
        int k = 0;
        if (!f->algo) continue;
        while (k < n && !moqi_same_form(groups[k], f)) k++;
        if (k == n && n < (int)MOST) groups[n++] = f;
        named |= p->targets[i].embedding;
        mixed |= f->format != groups[0]->format;
    }
    named |= n > 1;
    moqi_json_begin(o, '{');
    moqi_json_put_key(o, "config_groups");
    moqi_json_begin(o, '{');
    for (int k = 0; k < n; k++) {
        moqi_format(name, sizeof name, "group_%d", k);
        moqi_json_put_key(o, name);
        moqi_put_ct_group(x, o, groups[k], named);
    }
    moqi_json_end(o, '}');
    moqi_put_field(o, "format", NULL, n == 0 ? "dense" : mixed ? "mixed-precision" : moqi_ct_formats[groups[0]->format]);
    moqi_put_field(o, "global_compression_ratio", "null", NULL);
    moqi_put_ct_ignore(x, o);
    moqi_json_put_key(o, "kv_cache_scheme");
    if (x->kv_algo) {
        moq_coding kv;
        memset(&kv, 0, sizeof kv);
        kv.elem = MOQ_F8_E4M3;
        kv.group_rows = kv.group_cols = MOQ_ALL;
        moqi_put_ct_args(o, &kv, 0, 0);
    } else moqi_json_put_null(o);
    moqi_put_field(o, "moe_sparsity_config", "null", NULL);
    moqi_put_field(o, "quant_method", NULL, "compressed-tensors");
    moqi_put_field(o, "quantization_status", NULL, "compressed");
    moqi_put_field(o, "sparsity_config", "{}", NULL);
    moqi_put_field(o, "transform_config", "{}", NULL);
    moqi_put_field(o, "version", NULL, "0.20.0");
    moqi_json_end(o, '}');
}

/* A value as it was read: numbers keep their spelling. Containers are walked by their ends, so nesting takes no stack. */
static void moqi_json_copy(moqi_json_out *o, const moq_json *root)
{
    const moq_json *ends[66];
    char close[66];
    int depth = 0;
    for (const moq_json *v = root, *end = root + root->skip; v < end; v++) {
        while (depth > 0 && v >= ends[depth - 1]) moqi_json_end(o, close[--depth]);
        if (v != root && v->key) moqi_json_put_key(o, v->key);
        int container = v->type == MOQ_JSON_OBJECT || v->type == MOQ_JSON_ARRAY;
        if (!container) {
            if (v->type == MOQ_JSON_STRING) moqi_json_put_text(o, v->text, v->text_bytes);
            else if (v->type == MOQ_JSON_NUMBER) moqi_json_put_raw(o, v->text);
            else moqi_json_put_raw(o, v->type == MOQ_JSON_NULL ? "null" : v->type == MOQ_JSON_TRUE ? "true" : "false");
            continue;
        }
        moqi_json_begin(o, v->type == MOQ_JSON_OBJECT ? '{' : '[');
        close[depth] = v->type == MOQ_JSON_OBJECT ? '}' : ']';
        ends[depth++] = v + v->skip;
    }
    while (depth > 0) moqi_json_end(o, close[--depth]);
}

/* The source's config with a new quantization_config at its end; an old one is dropped, since its layers have been decoded. */
static moq_result moqi_write_config(moqi_export *x, moq_error *err)
{
    const moq_json *config = moq_get_config(x->plan.ck);
    int mixed;
    moqi_json_out o;
    moqi_json_out_make(&o, &x->plan.desc->allocator, 1);
    moqi_json_begin(&o, '{');
    for (const moq_json *v = moq_json_first(config); v; v = moq_json_next(config, v)) {
        if (strcmp(v->key, "quantization_config") == 0) continue;
        moqi_json_put_key(&o, v->key);
        moqi_json_copy(&o, v);
    }
    if (moqi_first_unit(x, &mixed) || x->kv_algo) {
        moqi_json_put_key(&o, "quantization_config");
        if (x->container == MOQI_COMPRESSED) moqi_put_ct_config(x, &o);
        else moqi_put_config(x, &o);
    }
    moqi_json_end(&o, '}');
    return moqi_write_json(x, "config.json", &o, err);
}


/* ------------------------------------------------------------------------------------------------
   >>export          moq_quantize: the whole folder
   A folder is built beside its target, opened again, verified and only then renamed; failures leave nothing.
   ------------------------------------------------------------------------------------------------ */

/* ---- the folder ---- */

/* Files that go along unchanged: what a tokenizer, a processor or remote code needs. */
static moq_result moqi_copy_files(moqi_export *x, moq_error *err)
{
    static const char *const wanted[] = {
        "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "*preprocessor_config.json",
        "processor_config.json", "spiece.model", "sentencepiece*", "tekken.json", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "USE_POLICY*"};
    char from[4096 + 300], to[4096 + 300];
    const char **names = NULL;
    size_t count = 0;
    moq_result r = moqi_list_dir(x->plan.desc->source, &x->arena, &names, &count, err);
    for (size_t i = 0; i < count && r == MOQ_OK; i++) {
        size_t bytes = 0;
        if (!moqi_any_glob(wanted, MOQI_COUNT(wanted), names[i])) continue;
        moqi_format(from, sizeof from, "%s/%s", x->plan.desc->source, names[i]);
        moqi_format(to, sizeof to, "%s/%s", x->temp, names[i]);
        if (!moqi_file_exists(from)) continue;
        char *data = moq_read_file(from, MOQ_MAX_JSON_BYTES, &x->plan.desc->allocator, &bytes, err);
        r = data ? moq_write_file(to, data, bytes, err) : err ? err->code : MOQ_E_IO;
        moq_release(&x->plan.desc->allocator, data, data ? bytes + 1 : 0);
    }
    return r;
}

/* What was written must open here and pass the checks of `moq verify`. */
static moq_result moqi_reopen(const moqi_export *x, moq_error *err)
{
    moq_open_desc d;
    memset(&d, 0, sizeof d);
    d.allocator = x->plan.desc->allocator;
    moq_checkpoint *ck = moq_open(x->temp, &d, err);
    if (!ck) return err ? err->code : MOQ_E_STATE;
    moq_result r = moq_verify(ck, 0, NULL, NULL, err);
    moq_close(ck);
    return r;
}

/* The recipe of a module, for the calibration of the same plan. */
static const moq_recipe *moqi_planned(void *user, const char *module)
{
    const moqi_plan *p = (const moqi_plan *)user;
    const moqi_entry *e = moqi_map_find(&p->map, module, strlen(module));
    return e ? p->targets[e->value].recipe : NULL;
}

/* Does anything in the plan need statistics of data? */
static int moqi_needs_data(const moqi_plan *p)
{
    const char *kv = p->desc->kv;
    for (size_t i = 0; i < p->count; i++) {
        const moq_recipe *recipe = p->targets[i].recipe;
        if (recipe && (moqi_has_input_scale(recipe) || recipe->scheme.pre_quant_scale)) return 1;
    }
    return kv && !moqi_same(kv, "none") && !moqi_same(kv, "wide") && !moqi_ends(kv, "_cast");
}

/* Calibration from the file, or measured now; sorted by name. */
static moq_result moqi_get_records(moqi_export *x, moq_error *err)
{
    moqi_plan *p = &x->plan;
    const moq_quantize_desc *d = p->desc;
    moq_calibrate_desc c;
    moq_result r = MOQ_OK;
    if (!d->calibration && d->calibrate && (moqi_needs_data(p) || d->save_calibration)) {
        memset(&c, 0, sizeof c);
        c.source = p->ck;
        c.recipe = d->recipe;
        c.choose = moqi_planned;
        c.choose_user = p;
        c.kv = d->kv;
        c.forward = d->calibrate;
        c.data = d->data;
        c.backend = d->backend;
        c.threads = d->threads;
        c.allocator = d->allocator;
        c.progress = d->progress;
        c.progress_user = d->progress_user;
        x->stats = moq_calibrate(&c, err);
        if (!x->stats) return err->code;
        p->records_name = "calibration";
        if (d->save_calibration && moq_stats_count(x->stats)) r = moq_stats_save(x->stats, d->save_calibration, err);
    }
    size_t n = x->file ? moq_st_count(x->file) : x->stats ? moq_stats_count(x->stats) : 0;
    p->records = (const moq_tensor **)moqi_take_array(&x->arena, (uint64_t)n + 1, 2 * sizeof(void *));
    if (!p->records) return moqi_nomem(err, (uint64_t)n * 16);
    for (size_t i = 0; i < n; i++) p->records[i] = x->file ? moq_st_get(x->file, i) : moq_get_stat(x->stats, i);
    moqi_sort((const void **)p->records, (const void **)p->records + n, n, moqi_records_by_name);
    p->record_count = n;
    return r;
}

/* MXFP4 layers become NVFP4 without new numbers; everything else keeps its format. */
static moq_result moqi_choose_casts(moqi_plan *p, moq_error *err)
{
    const moq_recipe *cast = moq_find_recipe("w4a16_nvfp4");
    size_t n = 0;
    for (size_t i = 0; i < p->count; i++) {
        moqi_target *t = &p->targets[i];
        const moq_coding *c = &t->w.scheme.weight;
        if (c->elem != MOQ_F4 || c->scale != MOQ_F8_E8M0 || c->group_cols != 32) continue;
        t->recipe = cast;
        t->cast = 1;
        n++;
    }
    if (n) return MOQ_OK;
    return moqi_fail(err, MOQ_E_ARG, moqi_at(moq_get_name(p->ck), NULL, NULL, -1), "no layer is MXFP4 with groups of inputs, so nothing can be cast to NVFP4");
}

/* The recipe of a conversion, if any, and whether there is anything to convert. */
static moq_result moqi_choose_kept(moqi_export *x, moq_error *err)
{
    moqi_plan *p = &x->plan;
    const moq_info *info = moq_get_info(p->ck);
    size_t n = 0;
    for (size_t i = 0; i < p->count; i++) n += moq_scheme_is_quantized(&p->targets[i].w.scheme) != 0;
    if (!n && info->kv == MOQ_KV_WIDE)
        return moqi_fail(err, MOQ_E_ARG, moqi_at(moq_get_name(p->ck), NULL, NULL, -1), "nothing in it is quantized; `moq quantize` makes a quantized folder of it");
    if (x->cast) return moqi_choose_casts(p, err);
    if (info->family == (x->container == MOQI_COMPRESSED ? MOQ_FAMILY_COMPRESSED_TENSORS : MOQ_FAMILY_MODELOPT))
        return moqi_fail(err, MOQ_E_ARG, moqi_at(moq_get_name(p->ck), NULL, NULL, -1), "is %s already", moqi_container_names[x->container]);
    return MOQ_OK;
}

/* Everything that can be refused is refused here, before a byte is written. */
static moq_result moqi_prepare_export(moqi_export *x, moq_error *err)
{
    moqi_plan *p = &x->plan;
    moq_result r = moqi_choose_targets(p, err);
    if (r == MOQ_OK && x->convert) r = moqi_choose_kept(x, err);
    if (r == MOQ_OK) r = moqi_get_records(x, err);
    if (r == MOQ_OK) r = moqi_load_targets(p, err);
    if (r != MOQ_OK) return r;
    x->capacity = moq_tensor_count(p->ck) + MOQI_MAX_PIECES * moq_module_count(p->ck) + 64 + p->record_count;
    x->outs = (moqi_out *)moqi_take_array(&x->arena, x->capacity, sizeof *x->outs);
    x->forms = (moqi_form *)moqi_take_array(&x->arena, p->count + 1, sizeof *x->forms);
    if (!x->outs || !x->forms) return moqi_nomem(err, (uint64_t)x->capacity * sizeof *x->outs);
    memset(x->forms, 0, (p->count + 1) * sizeof *x->forms);
    for (size_t i = 0; i < p->count && r == MOQ_OK; i++) {
        const moqi_target *t = &p->targets[i];
        int kept = x->convert && !t->recipe && moq_scheme_is_quantized(&t->w.scheme);
        if (kept || (t->recipe && x->container == MOQI_COMPRESSED)) r = moqi_add_pieces(x, i, err);
        else if (t->recipe) r = moqi_add_target(x, i, err);
        else if (moq_scheme_is_quantized(&t->w.scheme)) {
            uint64_t shape[3] = {(uint64_t)t->w.experts, (uint64_t)t->w.cols, (uint64_t)t->w.rows}, flat[2] = {(uint64_t)t->w.rows, (uint64_t)t->w.cols};
            int stack = t->w.experts > 0;
            moqi_out *o = moqi_add_out(x, t->name, stack ? "" : ".weight", MOQ_BF16, stack ? 3 : 2, stack ? shape : flat);
            if (!o) return moqi_nomem(err, sizeof *o);
            o->what = MOQI_OUT_FLOAT;
            o->target = i;
        }
    }
    if (r == MOQ_OK) r = moqi_add_rest(x, err);
    if (r == MOQ_OK) r = x->convert ? moqi_convert_kv(x, err) : moqi_add_kv(x, err);
    if (r == MOQ_OK) r = moqi_sort_outs(x, err);
    if (r == MOQ_OK) r = moqi_make_units(x, err);
    int mixed;
    if (r == MOQ_OK && p->recipe && !moqi_first_unit(x, &mixed))
        r = moqi_fail(err, MOQ_E_ARG, moqi_at(moq_get_name(p->ck), NULL, NULL, -1), "recipe %s covers no layer of this model", p->recipe->name);
    return r;
}

#ifdef MOQ_NO_OS
static moq_result moqi_write_folder(moqi_export *x, moq_error *err)
{
    (void)moqi_write_shards; (void)moqi_write_hf_quant; (void)moqi_write_config; (void)moqi_copy_files; (void)moqi_reopen;
    return moqi_no_os(x->plan.desc->target, err);
}
#else
static moq_result moqi_write_folder(moqi_export *x, moq_error *err)
{
    moq_result r = moqi_write_shards(x, err);
    if (r == MOQ_OK) r = moqi_write_config(x, err);
    if (r == MOQ_OK) r = moqi_write_hf_quant(x, err);
    if (r == MOQ_OK) r = moqi_copy_files(x, err);
    if (r == MOQ_OK) r = moqi_reopen(x, err);
    if (r == MOQ_OK) r = moqi_folder_commit(x->temp, x->plan.desc->target, err);
    return r;
}
#endif

/* Made before anything takes long, so that a target that exists or cannot be written is refused at once. */
static moq_result moqi_begin_folder(moqi_export *x, moq_error *err)
{
#ifdef MOQ_NO_OS
    (void)x; (void)err; /* said when the folder is to be written */
    return MOQ_OK;
#else
    moq_result r = moqi_folder_begin(x->plan.desc->target, x->temp, sizeof x->temp, err);
    if (r != MOQ_OK) x->temp[0] = 0;
    return r;
#endif
}

/* A folder that was not finished goes. */
static void moqi_abort_folder(const moqi_export *x)
{
#ifdef MOQ_NO_OS
    (void)x;
#else
    if (x->temp[0]) moqi_remove_folder(x->temp);
#endif
}

static int moqi_find_container(const char *name)
{
    return moqi_same(name, "modelopt") ? MOQI_MODELOPT : moqi_same(name, "compressed-tensors") || moqi_same(name, "compressed_tensors") ? MOQI_COMPRESSED : -1;
}

/* Names of recipe and format, the source, the calibration file. */
static moq_result moqi_open_sources(moqi_export *x, const moq_quantize_desc *d, moq_checkpoint **ck, moq_error *err)
{
    moq_open_desc open;
    memset(&open, 0, sizeof open);
    open.allocator = d->allocator;
    open.log = d->log;
    open.log_user = d->log_user;
    if (!d->source || !d->target || !d->recipe) return moq_fail(err, MOQ_E_ARG, "moq_quantize", "source, target and recipe must be given");
    if (d->format && moqi_find_container(d->format) < 0)
        return moq_fail(err, MOQ_E_UNSUPPORTED, d->format, "folders of this format cannot be written; use modelopt or compressed-tensors");
    x->container = d->format ? moqi_find_container(d->format) : MOQI_MODELOPT;
    x->plan.recipe = moq_find_recipe(d->recipe);
    if (!x->plan.recipe && !moqi_same(d->recipe, "none")) return moq_fail(err, MOQ_E_ARG, d->recipe, "no recipe has this name; `moq recipes` lists them");
    *ck = moq_open(d->source, &open, err);
    if (!*ck) return err->code;
    x->plan.ck = *ck;
    if (!d->calibration) return MOQ_OK;
    x->file = moq_st_open(d->calibration, &open, err);
    if (!x->file) return err->code;
    x->plan.records_name = moqi_base_name(d->calibration);
    if (moq_st_count(x->file) == 0) return moqi_fail(err, MOQ_E_MISSING, moqi_at(x->plan.records_name, NULL, NULL, -1), "holds no recorded values");
    return MOQ_OK;
}

/* What the other container says differently about inputs; weights are the same. */
static void moqi_note_inputs(const moqi_export *x)
{
    size_t wide = 0, rounded = 0;
    moq_open_desc log;
    for (size_t i = 0; x->convert && i < x->plan.count; i++) {
        const moqi_form *f = &x->forms[i];
        const moq_scheme *s = &x->plan.targets[i].w.scheme;
        if (!f->algo || f->raw || x->plan.targets[i].recipe) continue;
        wide += s->input.elem != MOQ_NONE && f->scheme.input.elem == MOQ_NONE;
        rounded += s->input.elem == MOQ_NONE && x->container == MOQI_MODELOPT && strcmp(f->algo, "mxfp4") == 0;
    }
    memset(&log, 0, sizeof log);
    log.log = x->plan.desc->log;
    log.log_user = x->plan.desc->log_user;
    moqi_where at = moqi_at(moq_get_name(x->plan.ck), NULL, NULL, -1);
    if (wide)
        moqi_log(&log, MOQ_LOG_WARNING, MOQ_OK, at, "%zu layers keep their weights, but ModelOpt's FP8 blocks say nothing of rounded inputs: readers leave them wide",
                 wide);
    if (rounded)
        moqi_log(&log, MOQ_LOG_WARNING, MOQ_OK, at, "%zu layers keep their weights, but ModelOpt's mxfp4 cannot say weight-only: readers round inputs to MXFP4",
                 rounded);
}

/* From an opened source to the finished folder, and everything released. */
static moq_result moqi_run_export(moqi_export *x, moq_checkpoint *ck, moq_result r, moq_error *err)
{
    const moq_quantize_desc *d = x->plan.desc;
    const moq_allocator *a = &d->allocator;
    int workers = d->threads > 0 ? d->threads : moq_cpu_count();
    moqi_pool *pool = r == MOQ_OK && workers > 1 ? moqi_pool_create(workers, a, err) : NULL;
    if (pool) {
        x->plan.parallel.run = moqi_pool_run;
        x->plan.parallel.workers = workers;
        x->plan.parallel.user = pool;
    } else if (r == MOQ_OK && workers > 1) {
        r = err->code;
    }
    if (r == MOQ_OK) r = moqi_begin_folder(x, err);
    if (r == MOQ_OK) r = moqi_prepare_export(x, err);
    if (r == MOQ_OK) moqi_note_inputs(x);
    if (r == MOQ_OK) r = moqi_tell(x, 0, err);
    if (r == MOQ_OK) r = moqi_write_folder(x, err);
    if (r != MOQ_OK) moqi_abort_folder(x);
    moqi_pool_destroy(pool);
    for (size_t i = 0; i < x->plan.count; i++) moqi_drop_search(x, &x->plan.targets[i]);
    moq_release(a, x->codes, (size_t)x->code_room);
    moq_release(a, x->scales, (size_t)x->scale_room);
    moq_release(a, x->pieces, (size_t)x->piece_room);
    moq_release(a, x->plan.work, (size_t)x->plan.work_bytes);
    moq_st_close(x->file);
    moq_stats_destroy(x->stats);
    moq_close(ck);
    moqi_arena_drop(&x->arena);
    moq_release(a, x, sizeof *x);
    return r;
}

/* A zero-filled export of `desc`. */
static moqi_export *moqi_begin_export(const moq_quantize_desc *desc, moq_error *err)
{
    moqi_export *x = (moqi_export *)moq_allocate(&desc->allocator, sizeof *x);
    if (!x) { moqi_nomem(err, sizeof *x); return NULL; }
    x->arena = moqi_arena_make(&desc->allocator);
    x->plan.r = &x->arena;
    x->plan.desc = desc;
    x->encoded = SIZE_MAX;
    x->band_bytes = 64 << 20;
    return x;
}

MOQ_API moq_result moq_quantize(const moq_quantize_desc *desc, moq_error *err)
{
    moq_error own;
    moq_checkpoint *ck = NULL;
    if (!err) err = &own;
    moqi_clear(err);
    if (!desc) return moq_fail(err, MOQ_E_ARG, "moq_quantize", "desc is NULL");
    moqi_export *x = moqi_begin_export(desc, err);
    if (!x) return MOQ_E_NOMEM;
    moq_result r = moqi_open_sources(x, desc, &ck, err);
    return moqi_run_export(x, ck, r, err);
}

MOQ_API moq_result moq_convert(const moq_convert_desc *desc, moq_error *err)
{
    moq_error own;
    moq_checkpoint *ck = NULL;
    moq_quantize_desc d;
    if (!err) err = &own;
    moqi_clear(err);
    if (!desc || !desc->source || !desc->target || !desc->to) return moq_fail(err, MOQ_E_ARG, "moq_convert", "source, target and to must be given");
    if (desc->recipe && !moqi_same(desc->recipe, "nvfp4") && !moqi_same(desc->recipe, "w4a16_nvfp4"))
        return moq_fail(err, MOQ_E_ARG, desc->recipe, "only a cast to nvfp4 keeps numbers; `moq quantize` makes new ones");
    memset(&d, 0, sizeof d);
    d.source = desc->source;
    d.target = desc->target;
    d.recipe = "none";
    d.format = desc->to;
    d.shard_bytes = desc->shard_bytes;
    d.threads = desc->threads;
    d.progress = desc->progress;
    d.progress_user = desc->progress_user;
    d.log = desc->log;
    d.log_user = desc->log_user;
    d.allocator = desc->allocator;
    moqi_export *x = moqi_begin_export(&d, err);
    if (!x) return MOQ_E_NOMEM;
    x->convert = 1;
    x->cast = desc->recipe != NULL;
    if (desc->max_memory) x->band_bytes = desc->max_memory;
    moq_result r = moqi_open_sources(x, &d, &ck, err);
    return moqi_run_export(x, ck, r, err);
}

#endif /* MOQ_QUANTIZE */

#endif /* MODELOPT_Q_IMPLEMENTATION */
